"""Reliability: signals, time limits, non-finite steps, and changes of the number of processes."""

import contextlib
import json
import math
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffit.checkpoint import verify_checkpoint
from diffit.launcher import EXIT_STOPPED
from diffit.lock import OutputDirLock
from diffit.processes import StopRequest
from diffit.run_dir import checkpoint_step, list_checkpoints
from diffit_model import DiffiTUNet2DModel, TimeDependentSelfAttention
from helpers import (
    ROOT,
    STATES,
    assert_same_files,
    losses,
    mentions,
    plain_loop,
    relative_differences,
    run,
    start,
    torchrun,
    train,
    wait_for_file,
)
from warm_start import WarmProcess, run_ranks

STEPS = 150


@pytest.fixture(scope="module")
def long_args(base_args) -> list[str]:
    """A training of several seconds with dropout, long enough for a signal to arrive in the middle."""
    periods = [f"--max_train_steps={STEPS}", "--checkpointing_steps=10", f"--validation_steps={STEPS}"]
    return [*base_args, *periods, "--model_kwargs", "dropout=0.1"]


@pytest.fixture(scope="module")
def whole_run(long_args, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    train([*long_args, f"--output_dir={run_dir}", "--checkpointing_steps=1000"])
    return run_dir / f"checkpoint-{STEPS}"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_saves_and_the_run_resumes_bitwise(name, long_args, whole_run, tmp_path):
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest"]
    process = WarmProcess(["train_diffit.py", *arguments, "--dataloader_num_workers=2"])
    wait_for_file(tmp_path / "run/checkpoint-10", process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert mentions("step", "--resume_from_checkpoint latest", name).search(output)
    last = list_checkpoints(tmp_path / "run")[-1]
    assert last.name != f"checkpoint-{STEPS}" and verify_checkpoint(last) is None
    train(arguments)
    assert_same_files(whole_run, tmp_path / "run" / f"checkpoint-{STEPS}", STATES)


def test_two_processes_stop_at_the_same_step_under_torchrun(long_args, tmp_path):
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--max_train_steps=2000"]
    process = start([*torchrun(), "train_diffit.py", *arguments])
    wait_for_file(tmp_path / "run/checkpoint-10", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    last = list_checkpoints(tmp_path / "run")[-1]
    assert mentions(f"step {checkpoint_step(last)}", "--resume_from_checkpoint latest").search(output)
    assert verify_checkpoint(last) is None


def test_time_limit_saves_and_exits_with_the_documented_code(long_args, tmp_path, caplog):
    with pytest.raises(SystemExit) as stopped:
        arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--checkpointing_steps=100000"]
        train([*arguments, "--max_train_steps=100000", "--max_train_time=0.02"])
    assert stopped.value.code == EXIT_STOPPED
    assert mentions("stopped", "--max_train_time").search(caplog.text)
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_training_in_a_thread_is_the_same_and_keeps_its_time_limit(long_args, whole_run, tmp_path, caplog):
    """As in a notebook's widget or a web application; only the main thread can handle signals."""
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--checkpointing_steps=1000"]
    ends = []

    def train_and_note_the_end(*flags: str) -> None:
        try:
            train([*arguments, *flags])
            ends.append(0)
        except BaseException as error:
            ends.append(error)

    for flags in (["--max_train_time=0.01"], ["--resume_from_checkpoint=latest"]):
        thread = threading.Thread(target=train_and_note_the_end, args=flags)
        thread.start()
        thread.join()
    assert isinstance(ends[0], SystemExit) and ends[0].code == EXIT_STOPPED and ends[1:] == [0]
    assert mentions("main thread", "SIGTERM").search(caplog.text)
    assert_same_files(whole_run, tmp_path / "run" / f"checkpoint-{STEPS}", STATES)


def test_second_interrupt_exits_at_once():
    stop = StopRequest()
    stop.begin()
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        assert stop.agreed()
        stop.first_signal -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_before_training_exits_at_once_and_releases_the_folder(name, long_args, tmp_path):
    """It comes when the folder has been taken; whether the training has begun by then makes no difference."""
    process = WarmProcess(["train_diffit.py", *long_args, f"--output_dir={tmp_path / 'run'}"])
    wait_for_file(tmp_path / "run/.running", process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert not (tmp_path / "run/.running").exists()


@pytest.mark.parametrize("written", ["", '{"token"'])
def test_signal_while_taking_the_folder_releases_it(written, tmp_path, monkeypatch):
    """The signal handler raises SystemExit at whatever line is being run."""

    def write_and_stop(lock):
        lock.file.write_text(written)
        raise SystemExit

    lock = OutputDirLock(tmp_path / "run")
    with pytest.raises(SystemExit), contextlib.ExitStack() as resources:
        resources.push(lock)
        with monkeypatch.context() as patched:
            patched.setattr(OutputDirLock, "_create", write_and_stop)
            lock.__enter__()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("flags", [["--overwrite_output_dir"], [], ["--resume_from_checkpoint={run}/checkpoint-2"]])
def test_restarted_command_resumes_regardless_of_its_flags(variable, flags, train_args, tmp_path, monkeypatch):
    train([*train_args, "--checkpointing_steps=2", "--max_train_steps=4"])
    monkeypatch.setenv(variable, "1")
    flags = [flag.format(run=tmp_path / "run") for flag in flags]
    train([*train_args, *flags, "--checkpointing_steps=2", "--max_train_steps=6"])
    numbers = json.loads((tmp_path / "run/checkpoint-6/state.json").read_text())
    assert numbers["position"] == 24
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_exit_code_is_documented():
    assert f"exit code {EXIT_STOPPED}" in (ROOT / "README.md").read_text()


def test_signal_during_a_validation_is_obeyed_at_once(long_args, whole_run, tmp_path):
    """The validation of step 10 would take minutes."""
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=latest"]
    slow = ["--validation_steps=10", "--num_validation_images=4000", "--validation_inference_steps=50"]
    process = WarmProcess(["train_diffit.py", *arguments, *slow])
    wait_for_file(tmp_path / "run/checkpoint-10", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == EXIT_STOPPED, output
    assert mentions("validation", "step 10").search(output)
    train(arguments)
    assert_same_files(whole_run, tmp_path / "run" / f"checkpoint-{STEPS}", STATES)


def test_interrupted_last_validation_is_repeated(long_args, tmp_path):
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--max_train_steps=10"]
    slow = ["--num_validation_images=4000", "--validation_inference_steps=50"]
    process = WarmProcess(["train_diffit.py", *arguments, *slow])
    wait_for_file(tmp_path / "run/checkpoint-10", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == EXIT_STOPPED, output
    assert not (tmp_path / "run/model_index.json").exists()
    train([*arguments, "--resume_from_checkpoint=latest"])
    assert (tmp_path / "run/model_index.json").exists()


# --- numbers gone bad


def spoil_losses(monkeypatch, calls: set[int], value: float = math.nan) -> None:
    """Makes the network's prediction for the second image, and so its loss, not finite in some calls (from 0)."""
    original, count = DiffiTUNet2DModel.forward, iter(range(10**6))

    def spoilt(model: DiffiTUNet2DModel, *arguments, **kwargs):
        output = original(model, *arguments, **kwargs)
        if model.training and next(count) in calls:
            output.sample = output.sample * torch.tensor([1, value, 1, 1]).reshape(4, 1, 1, 1)
        return output

    monkeypatch.setattr(DiffiTUNet2DModel, "forward", spoilt)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_steps_are_skipped_and_change_nothing(value, train_args, image_folder, tmp_path, monkeypatch, caplog):
    """Steps on positions 4-7 and 8-11 are bad: weights, schedule and count are those of a loop that skips them."""
    spoil_losses(monkeypatch, {1, 2}, value)
    train([*train_args, "--max_train_steps=3", "--num_channels=3"])
    checkpoint = tmp_path / "run/checkpoint-3"
    numbers = json.loads((checkpoint / "state.json").read_text())
    assert numbers["position"] == 20 and numbers["bad_steps"] == 2 and numbers["ema_steps"] == {"ema": 3}
    for positions in ((4, 7), (8, 11)):
        assert mentions("step 2", "positions", *positions).search(caplog.text)
    model, expected = plain_loop(image_folder, [0, 12, 16], 4)
    logged = losses(tmp_path / "run")
    assert [logged[0], logged[2]] == pytest.approx([expected[0], expected[2]], rel=1e-4)  # bad steps are in the second
    differences = relative_differences(load_file(checkpoint / STATES[0]), dict(model.named_parameters()))
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("logging_steps", [1, 1000])
def test_outcome_read_one_step_late_changes_nothing(logging_steps, train_args, tmp_path, monkeypatch):
    """With logs each step the outcome is asked for at once, without them one step later."""
    runs = {"here": [f"--logging_steps={logging_steps}"], "there": ["--checkpointing_steps=1", "--logging_steps=1"]}
    for name, flags in runs.items():
        spoil_losses(monkeypatch, {1, 4, 5})
        train([*train_args, "--max_train_steps=6", f"--output_dir={tmp_path / name}", *flags])
        monkeypatch.undo()
    assert_same_files(tmp_path / "here/checkpoint-6", tmp_path / "there/checkpoint-6", STATES)


def test_too_many_bad_steps_end_the_run_and_keep_the_checkpoint(train_args, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, {2, 3, 5, 6, 7})
    arguments = [*train_args, "--max_train_steps=9", "--checkpointing_steps=2", "--max_bad_steps=3"]
    with pytest.raises(
        RuntimeError, match=mentions("step 4", "positions", 28, 31, "--max_bad_steps", 3, "checkpoint-2")
    ):
        train(arguments)
    assert verify_checkpoint(tmp_path / "run/checkpoint-2") is None
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    monkeypatch.undo()
    train([*arguments, "--resume_from_checkpoint=latest"])


def test_too_many_bad_steps_before_the_first_checkpoint_do_not_advise_to_resume(train_args, monkeypatch):
    spoil_losses(monkeypatch, {0, 1})
    with pytest.raises(RuntimeError, match=mentions("step 1", "no checkpoint", "--learning_rate")) as error:
        train([*train_args, "--max_bad_steps=2"])
    assert "--pretrained_model_name_or_path" not in str(error.value)


def test_bad_loss_in_one_process_skips_the_step_in_all(long_args, tmp_path):
    """The second of two processes has a NaN at positions 12 to 15."""
    script = tmp_path / "spoilt.py"
    script.write_text(
        "import os\n"
        "import train_diffit\n"
        "from diffit.config import parse_args\n"
        "from diffit_model import DiffiTUNet2DModel\n"
        "original, calls = DiffiTUNet2DModel.forward, iter(range(10**6))\n"
        "def spoilt(model, *arguments, **kwargs):\n"
        "    output = original(model, *arguments, **kwargs)\n"
        "    if model.training and os.environ['RANK'] == '1' and next(calls) == 1:\n"
        "        output.sample = output.sample * float('nan')\n"
        "    return output\n"
        "DiffiTUNet2DModel.forward = spoilt\n"
        "train_diffit.main(parse_args())\n"
    )
    arguments = [*long_args, f"--output_dir={tmp_path / 'run'}", "--max_train_steps=4"]
    codes, output = run_ranks([str(script), *arguments], [str(script), *arguments])
    assert codes == [0, 0], output
    assert mentions("step 2", "positions", 8, 15).search(output)
    numbers = json.loads((tmp_path / "run/checkpoint-4/state.json").read_text())
    assert (numbers["position"], numbers["bad_steps"], numbers["global_step"]) == (40, 1, 4)
    assert all(x.isfinite().all() for x in load_file(tmp_path / "run/checkpoint-4" / STATES[0]).values())


# --- the same numbers on any topology


def test_gradients_of_key_bias_and_time_keys_are_analytically_zero(image_folder):
    """They are left out of comparisons of weights; here it is shown that there is nothing to compare."""
    model, _ = plain_loop(image_folder, [0, 16], 16)
    model.double().zero_grad()  # so that zero is told from rounding
    noisy = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(noisy, torch.tensor([3, 700]), torch.tensor([0, 3])).sample.square().mean().backward()
    for module in model.modules():
        if isinstance(module, TimeDependentSelfAttention):
            for gradient in (module.qkv.bias.grad, module.qkv_temb.weight.grad, module.qkv_temb.bias.grad):
                query, key, _ = gradient.chunk(3)
                assert key.norm() < 1e-12 * query.norm()


# One global batch of 16, dropout 0.
TOPOLOGY = ["--global_batch_size=16", "--random_flip", "--label_dropout=0.3", "--num_channels=3"]


def launch(processes: int, arguments: list[str]) -> str:
    """Trains under torchrun to the end."""
    return run([*torchrun(processes), "train_diffit.py", *arguments])


@pytest.fixture(scope="module")
def plain_run(image_folder) -> tuple:
    return plain_loop(image_folder, list(range(0, 320, 16)), 16, label_dropout=0.3, random_flip=True)


def assert_trained_like(plain_run: tuple, run_dir: Path) -> None:
    """20 steps with the losses and weights of the plain loop, to 1e-5."""
    model, expected = plain_run
    np.testing.assert_allclose(losses(run_dir), expected, rtol=1e-5)
    weights = load_file(run_dir / "checkpoint-20" / STATES[0])
    differences = relative_differences(weights, dict(model.named_parameters()))
    worst = max(differences, key=differences.get)
    assert differences[worst] <= 1e-5, f"{worst}: {differences[worst]:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 1)])
def test_any_topology_trains_like_a_plain_loop(processes, accumulation, base_args, plain_run, tmp_path):
    batch_size = 16 // (processes * accumulation)
    flags = [f"--train_batch_size={batch_size}", f"--output_dir={tmp_path}", "--dataloader_num_workers=1"]
    output = launch(processes, [*base_args, *TOPOLOGY, *flags, "--max_train_steps=20"])
    assert mentions(f"{batch_size} x {processes} processes x {accumulation}").search(output)
    assert_trained_like(plain_run, tmp_path)


@pytest.mark.slow
def test_number_of_processes_may_change_at_a_resume(base_args, plain_run, tmp_path):
    """Two processes to step 6, one to step 12, four to step 20."""
    flags = [*base_args, *TOPOLOGY, f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"]
    for processes, last_step in ((2, 6), (1, 12), (4, 20)):
        launch(processes, [*flags, f"--max_train_steps={last_step}"])
    assert_trained_like(plain_run, tmp_path)
