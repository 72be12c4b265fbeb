"""Launchers that are killed alone leave no process behind.

make orphans KILLS=10
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from diffit import launcher
from diffit.checkpoint import verify_checkpoint
from diffit.launcher import EXIT_STOPPED
from diffit.processes import STOP_SIGNALS, StopRequest, meet
from diffit.run_dir import checkpoint_step, list_checkpoints
from helpers import LAUNCH, ROOT, STATES, TINY_CONFIG, assert_same_files, mentions, torchrun, train

KILLS = int(os.environ.get("KILLS", 10))
ACCELERATE = [*LAUNCH, "--config_file", "configs/accelerate/cpu.yaml"]
SCRIPTS = ("train_diffit", "sample_diffit", "eval_diffit", "prepare_latents", "train_vae")
FOLLOWER = """
import os, sys, time
from diffit.launcher import follow_launcher
follow_launcher()
print("running", flush=True)
time.sleep(100)
"""


class Run:
    """A command and all its descendants, even after they have been adopted by another process."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.mark = uuid.uuid4().hex
        self.log = log
        self.started = time.monotonic()
        environment = os.environ | {"DIFFIT_TEST_RUN": self.mark, "PYTHONPATH": str(ROOT)} | environment
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get("DIFFIT_TEST_RUN") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_for(self, condition: Callable[[], object], timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def is_waiting(self) -> bool:
        """Whether the main process has connected to the launcher's store, through which the processes meet."""
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error, KeyError):
                environment = process.environ()
                if environment["RANK"] == "0":
                    port = int(environment["MASTER_PORT"])
                    return any(c.raddr and c.raddr.port == port for c in process.net_connections("tcp"))
        return False

    def kill(self) -> float:
        """Kills the launcher alone; seconds until no process of the run was left."""
        self.process.kill()
        killed = time.monotonic()
        self.process.wait()
        while left := self.alive():
            listed = [(process.pid, process.name()) for process in left]
            assert time.monotonic() - killed < 60, f"{listed} still live:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        return time.monotonic() - killed

    def end(self) -> None:
        """Kills the processes that a failed test has left behind."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
    runs = []

    def start(command: list[str], **environment: str) -> Run:
        runs.append(Run(command, tmp_path / f"log{len(runs)}", **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.fixture
def follower(tmp_path) -> str:
    """A program that follows its launcher and starts quickly."""
    file = tmp_path / "follower.py"
    file.write_text(FOLLOWER)
    return str(file)


def held_back(arguments: list[str], tmp_path: Path) -> list[str]:
    """A launch whose second process never gets further than its model config, so that the first waits for it."""
    (tmp_path / "config0.json").write_text(json.dumps(TINY_CONFIG))
    if not (tmp_path / "config1.json").exists():
        os.mkfifo(tmp_path / "config1.json")
    command = f"exec {sys.executable} train_diffit.py {' '.join(arguments)} --model_config={tmp_path}/config$RANK.json"
    return [sys.executable, *torchrun(), "--no-python", "bash", "-c", command]


# --- the launcher dies


def test_launcher_killed_while_processes_meet_leaves_no_process(train_args, start, tmp_path):
    run = start(held_back(train_args, tmp_path))
    run.wait_for(run.is_waiting)
    assert len(run.alive()) == 3
    assert run.kill() < 30
    # By the signal, or because they see first that the launcher's store is gone.
    assert re.search("stopped before the training began|lost the connection to the store at", run.log.read_text())
    assert not (tmp_path / "run").exists()


def test_launcher_killed_in_training_leaves_a_checkpoint_and_no_lock(train_args, start, tmp_path):
    flags = ["--checkpointing_steps=10", "--dataloader_num_workers=1"]
    run = start([sys.executable, *ACCELERATE, "train_diffit.py", *train_args, *flags, "--max_train_steps=100000"])
    run.wait_for((tmp_path / "run/checkpoint-10").exists)
    assert run.kill() < 30
    last = list_checkpoints(tmp_path / "run")[-1]
    assert mentions(f"step {checkpoint_step(last)}", "--resume_from_checkpoint latest").search(run.log.read_text())
    last_step = checkpoint_step(last) + 1
    train([*train_args, f"--max_train_steps={last_step}", "--resume_from_checkpoint=latest"])


def test_launcher_behind_a_shell_is_followed(start, follower):
    command = [sys.executable, *torchrun(), "--no-python", "bash", "-c", f"{sys.executable} {follower}; true"]
    run = start(command)
    run.wait_for(lambda: run.log.read_text().count("running") == 2)
    assert run.kill() < 10


def test_program_that_uses_torchs_launch_api_is_followed(start, follower, tmp_path):
    (tmp_path / "my_launcher.py").write_text(
        "import os, subprocess, sys, torch\nsubprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)\n"
    )
    run = start([sys.executable, str(tmp_path / "my_launcher.py"), follower], TORCHELASTIC_RUN_ID="test")
    run.wait_for(lambda: "running" in run.log.read_text())
    assert run.kill() < 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_of_a_dead_launcher_exits_before_slow_imports(script, start):
    """`setsid` under a shell is where torchrun's processes find themselves once it is dead."""
    command = f"setsid {sys.executable} -X importtime {script}.py & wait $!"
    run = start(["bash", "-c", command], TORCHELASTIC_RUN_ID="test")
    assert run.process.wait(timeout=30) == EXIT_STOPPED
    output = run.log.read_text()
    assert mentions("launcher", "torchrun", "accelerate launch").search(output)
    imported = set(re.findall(r"\| +(\w+)$", output, re.MULTILINE))
    assert "psutil" in imported and not imported & {"torch", "numpy", "accelerate"}


def test_orphan_of_accelerate_launch_exits_before_slow_imports(start, follower):
    """The shell stands for an `accelerate launch` that leads its job's process group and dies at once."""
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False"}
    run = start(["setsid", "bash", "-c", f"{sys.executable} {follower} &"], **variables)
    run.process.wait()
    assert run.kill() < 10
    assert "launcher" in run.log.read_text() and "running" not in run.log.read_text()


# --- nothing else ends a run


def test_training_without_a_launcher_survives_the_end_of_its_shell(train_args, start, tmp_path):
    """As `nohup python train_diffit.py &`, also if accelerate's variable is exported."""
    flags = ["--checkpointing_steps=10", "--max_train_steps=100000"]
    command = f"{sys.executable} train_diffit.py {' '.join([*train_args, *flags])} & wait"
    run = start(["bash", "-c", command], ACCELERATE_MIXED_PRECISION="no")
    run.wait_for((tmp_path / "run/checkpoint-10").exists)
    run.process.kill()
    run.process.wait()
    step = checkpoint_step(list_checkpoints(tmp_path / "run")[-1])
    deadline = time.monotonic() + 30
    while not (tmp_path / f"run/checkpoint-{step + 20}").exists():
        assert run.alive() and time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.01)
    (training,) = run.alive()
    training.terminate()
    psutil.wait_procs([training], timeout=30)
    assert mentions("step", "--resume_from_checkpoint latest").search(run.log.read_text())


@pytest.mark.parametrize(
    ("environment", "setsid"),
    [({}, "setsid"), ({"TORCHELASTIC_RUN_ID": "test"}, ""), ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "setsid")],
)
def test_process_without_a_launcher_is_not_an_orphan(environment, setsid, start, follower):
    """Without a launcher's variables; below a process of a launcher; with a variable that people export."""
    run = start(["bash", "-c", f"{setsid} {sys.executable} {follower} & wait"], **environment)
    run.wait_for(lambda: "running" in run.log.read_text(), timeout=20)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/python3.11 /venv/bin/torchrun --nproc_per_node 2 train_diffit.py", True),
        ("python -m torch.distributed.run train_diffit.py", True),
        ("python -X dev -um torch.distributed.launch train_diffit.py", True),
        ("python /venv/lib/python3.11/site-packages/torch/distributed/run.py train_diffit.py", True),
        ("/venv/bin/python /venv/bin/accelerate launch train_diffit.py", True),
        ("python -m accelerate.commands.launch train_diffit.py", True),
        ("python -m accelerate.commands.accelerate_cli launch train_diffit.py", True),
        ("accelerate-launch train_diffit.py", True),
        ("accelerate config", False),
        ("python train_diffit.py --output_dir torchrun", False),
        ("python -c torchrun", False),
        ("bash run.sh torchrun", False),
        ("python", False),
        ("", False),
    ],
)
def test_launcher_is_recognized_by_its_command_line(command, expected):
    assert launcher.is_launcher(command.split()) == expected


# --- waiting for others


@pytest.fixture
def rank(monkeypatch) -> Callable[[int], str]:
    """Makes this process a rank of three, whose main process hosts the store; the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def be(rank: int) -> str:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        return f"127.0.0.1:{port}"

    return be


def test_processes_that_do_not_start_are_named(rank):
    rank(0)
    with pytest.raises(RuntimeError, match=mentions("process 0 of 3", "0.01 minutes", "process 1, 2")):
        meet(timedelta(minutes=0.01))


def test_main_process_that_does_not_start_is_named(rank):
    address = rank(1)
    with pytest.raises(RuntimeError, match=mentions("process 1 of 3", "process 0", address, "0.01 minutes")):
        meet(timedelta(minutes=0.01))


# --- signals that Python's handler does not see


def exit_status_after_sigterm(function: Callable[[Callable[[], None]], None]) -> int:
    """Runs a function in a fork of this process, sends SIGTERM when it says so, and returns its status as Popen does.

    Args:
        function: calls its argument once the signal may come.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function(lambda: os.write(writing, b"ready"))
        except SystemExit as stopped:
            os._exit(stopped.code)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 5)
    os.close(reading)
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_in_torch() -> None:
    """Waits in a way that a signal cannot interrupt."""
    TCPStore("127.0.0.1", 1, 2, is_master=False, timeout=timedelta(seconds=60))


def test_signal_before_training_ends_a_process_waiting_in_torch(monkeypatch):
    monkeypatch.setattr(StopRequest, "PATIENCE", 0.5)

    def wait(ready: Callable[[], None]) -> None:
        StopRequest()
        ready()
        wait_in_torch()

    assert exit_status_after_sigterm(wait) == EXIT_STOPPED


def test_process_waiting_in_torch_exits_after_its_launcher_died(monkeypatch):
    monkeypatch.setattr(StopRequest, "LAST_SECONDS", 1)
    monkeypatch.setattr("diffit.processes.launcher_is_gone", lambda: True)

    def wait(ready: Callable[[], None]) -> None:
        StopRequest().begin()
        ready()
        wait_in_torch()

    assert exit_status_after_sigterm(wait) == -signal.SIGALRM


def test_signal_to_a_forked_process_does_not_reach_its_parent(monkeypatch):
    """As that by which a pool of processes ends its own."""
    monkeypatch.setattr(StopRequest, "PATIENCE", 0.2)
    stop = StopRequest()

    def sleep(ready: Callable[[], None]) -> None:
        ready()
        time.sleep(60)

    try:
        assert exit_status_after_sigterm(sleep) == EXIT_STOPPED
        time.sleep(0.5)
        assert not stop.is_wanted()
    finally:
        stop.close()


def test_closed_stop_request_restores_handlers():
    earlier, threads = signal.set_wakeup_fd(-1), psutil.Process().num_threads()
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    stop = StopRequest()
    stop.close()
    stop.close()
    time.sleep(0.2)
    assert signal.set_wakeup_fd(earlier) == -1
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]
    assert psutil.Process().num_threads() <= threads


# --- the proof

# Where the launcher is killed, as often out of ten times.
MOMENTS = {
    "launcher starts, processes import": 3,
    "processes wait for each other": 2,
    "set-up": 1,
    "training": 3,
    "a checkpoint is written": 1,
}


def wait_for_moment(run: Run, moment: str, chance: random.Random, run_dir: Path, start_seconds: float) -> None:
    if moment.startswith("launcher"):
        time.sleep(chance.uniform(0, start_seconds))
        return
    if moment == "processes wait for each other":
        run.wait_for(run.is_waiting)
        time.sleep(chance.uniform(0, 1))
        return
    run.wait_for((run_dir / ".running").exists)
    if moment == "set-up":
        time.sleep(chance.uniform(0, 0.5))
        return
    run.wait_for(lambda: re.search(r"\d+ steps of \d+ images", run.log.read_text()))
    if moment == "training":
        time.sleep(chance.uniform(0, 3))
    else:
        run.wait_for(lambda: any(run_dir.glob("tmp-checkpoint-*")))


@pytest.mark.slow
def test_launcher_killed_at_any_moment_leaves_no_process_and_same_weights(base_args, start, tmp_path):
    chance = random.Random(int(os.environ.get("SEED", 0)))
    moments = [moment for moment, times in MOMENTS.items() for _ in range(times)]
    steps = 120 * KILLS
    arguments = [*base_args, f"--max_train_steps={steps}", f"--validation_steps={steps}", "--logging_steps=10"]
    arguments += ["--checkpointing_steps=20", "--checkpoints_total_limit=3", "--dataloader_num_workers=1"]
    arguments += ["--resume_from_checkpoint=latest", "--model_kwargs", "dropout=0.1"]
    whole = start([sys.executable, *torchrun(), "train_diffit.py", *arguments, f"--output_dir={tmp_path / 'whole'}"])
    whole.wait_for((tmp_path / "whole/.running").exists)
    start_seconds = time.monotonic() - whole.started
    assert whole.process.wait() == 0, whole.log.read_text()[-3000:]

    run_dir = tmp_path / "run"
    arguments += [f"--output_dir={run_dir}"]
    launch = [sys.executable, *torchrun(), "train_diffit.py", *arguments]
    print(f"\n{'kill':>4}  {'moment':<34} {'s after start':>13} {'processes':>9} {'s to the last':>13} {'step':>5}")
    for kill in range(1, KILLS + 1):
        if (kill - 1) % len(moments) == 0:
            chance.shuffle(moments)
        moment = moments[(kill - 1) % len(moments)]
        waits = moment == "processes wait for each other"
        run = start(held_back(arguments, tmp_path) if waits else launch)
        wait_for_moment(run, moment, chance, run_dir, start_seconds)
        assert run.process.poll() is None, run.log.read_text()[-3000:]
        since_start, processes = time.monotonic() - run.started, len(run.alive())
        seconds = run.kill()
        assert not mentions("error", "--output_dir").search(run.log.read_text())
        complete = [c for c in list_checkpoints(run_dir) if not verify_checkpoint(c)]
        step = checkpoint_step(complete[-1]) if complete else 0
        print(f"{kill:>4}  {moment:<34} {since_start:>13.2f} {processes:>9} {seconds:>13.2f} {step:>5}", flush=True)
    last = start(launch)
    assert last.process.wait() == 0, last.log.read_text()[-3000:]
    assert_same_files(tmp_path / "whole" / f"checkpoint-{steps}", run_dir / f"checkpoint-{steps}", STATES)
    print(f"resumed at step {step}, ended at step {steps}: bitwise the uninterrupted run")
