"""Runs that are stopped by signals and time limits lose nothing."""

import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT, start, train
from test_train import STATES, assert_same_files

import train_diffit

STEPS = 150


@pytest.fixture(scope="module")
def long_args(base_args) -> list[str]:
    """A training of some seconds, in the middle of which a signal can come; dropout is on."""
    periods = [f"--max_train_steps={STEPS}", "--checkpointing_steps=10", f"--validation_steps={STEPS}"]
    return [*base_args, *periods, "--model_kwargs", "dropout=0.1"]


@pytest.fixture(scope="module")
def whole_run(long_args, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    train([*long_args, f"--output_dir={run_dir}", "--checkpointing_steps=1000"])
    return run_dir / f"checkpoint-{STEPS}"


def wait_for(path: Path, process) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_saves_and_the_run_goes_on_bitwise(name, long_args, whole_run, tmp_path):
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest"]
    process = start(["train_diffit.py", *arguments, "--dataloader_num_workers=2"])
    wait_for(tmp_path / "run/checkpoint-10", process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == train_diffit.EXIT_STOPPED, output
    assert "go on with --resume_from_checkpoint latest" in output
    last = train_diffit.list_checkpoints(tmp_path / "run")[-1]
    assert last.name != f"checkpoint-{STEPS}" and train_diffit.checkpoint_problem(last) is None
    train(arguments)
    assert_same_files(whole_run, tmp_path / "run" / f"checkpoint-{STEPS}", STATES)


def test_two_processes_stop_at_the_same_step_under_torchrun(long_args, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--max_train_steps=2000"]
    process = start([*launcher, "train_diffit.py", *arguments])
    wait_for(tmp_path / "run/checkpoint-10", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    last = train_diffit.list_checkpoints(tmp_path / "run")[-1]
    assert f"stopped at step {last.name.split('-')[1]};" in output
    assert train_diffit.checkpoint_problem(last) is None


def test_time_limit_saves_and_exits_with_the_documented_code(long_args, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--checkpointing_steps=100000"]
        train([*arguments, "--max_train_steps=100000", "--max_train_time=0.02"])
    assert stopped.value.code == train_diffit.EXIT_STOPPED
    assert len(train_diffit.list_checkpoints(tmp_path / "run")) == 1


def test_second_interrupt_leaves_at_once():
    stop = train_diffit.StopRequest(None)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        assert stop.agreed()
        stop.first_signal -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()


def test_exit_code_is_documented():
    assert f"exit code {train_diffit.EXIT_STOPPED}" in (ROOT / "README.md").read_text()
