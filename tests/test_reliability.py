"""Runs that are stopped by signals and time limits lose nothing."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, start, train
from safetensors.torch import load_file
from test_train import STATES, assert_same_files, losses

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
    stop = train_diffit.StopRequest()
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


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_topology_changes_losses_and_weights_by_rounding_only(processes, accumulation, base_args, tmp_path):
    """One global batch of 16 over 20 steps, dropout 0, against one process without accumulation."""
    arguments = [*base_args, "--max_train_steps=20", "--global_batch_size=16", "--random_flip", "--label_dropout=0.3"]
    # An output of zero at the start makes the first gradients vanish, and Adam amplifies their rounding.
    arguments += ["--model_kwargs", "zero_init_output=false"]
    train([*arguments, "--train_batch_size=16", f"--output_dir={tmp_path / 'one'}"])
    batch_size = 16 // (processes * accumulation)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = [f"--train_batch_size={batch_size}", f"--output_dir={tmp_path / 'other'}", "--dataloader_num_workers=1"]
    output = run([*launcher, "train_diffit.py", *arguments, *flags])
    assert f"{batch_size} x {processes} processes x {accumulation} accumulation" in output
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "one"), rtol=1e-5)
    name = "checkpoint-20/unet/diffusion_pytorch_model.safetensors"
    one, other = load_file(tmp_path / "one" / name), load_file(tmp_path / "other" / name)
    differences = {}
    for key in one:
        a, b = one[key], other[key]
        if ".qkv" in key:  # the key bias and k_t have no gradient in truth: under Adam they move by amplified rounding
            width = a.shape[0] // 3
            kept = [0, 2] if "qkv_temb" in key or key.endswith("bias") else [0, 1, 2]
            a, b = (torch.cat([x[i * width : (i + 1) * width] for i in kept]) for x in (a, b))
        differences[key] = ((a - b).norm() / a.norm()).item()
    worst = max(differences, key=differences.get)
    assert differences[worst] <= 1e-5, f"{worst}: {differences[worst]:.1e}"
