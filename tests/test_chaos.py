"""A run on two processes that is killed again and again ends bitwise where the undisturbed run ends.

make chaos KILLS=200
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffit.checkpoint import verify_checkpoint
from diffit.run_dir import checkpoint_step, list_checkpoints
from helpers import ROOT, STATES, assert_same_files, torchrun

KILLS = int(os.environ.get("KILLS", 50))
STEPS = 40 * KILLS
# Where a life ends, and how often.
FATES = {
    "SIGKILL to all while a checkpoint is written": 4,
    "SIGKILL to all at any moment of the training": 3,
    "SIGTERM to the launcher": 3,
    "SIGKILL to the main process": 1,
    "SIGKILL to the other process": 1,
    "SIGTERM to the other process": 1,
    "SIGUSR1 to the main process": 1,
    "SIGKILL to all during the start": 1,
}


class Life:
    """One start of the training, its output in a file."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        with log.open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, *torchrun(), "train_diffit.py", *arguments],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def trainers(self) -> list[psutil.Process]:
        """The two processes, the main process first."""
        children = [p for p in psutil.Process(self.launcher.pid).children() if "train_diffit.py" in p.cmdline()]
        return sorted(children, key=lambda process: int(process.environ()["RANK"]))

    def wait_for(self, condition) -> bool:
        """Waits until a condition holds or the life ends by itself; whether it still lives."""
        while self.launcher.poll() is None and not condition():
            time.sleep(0.0005)
        return self.launcher.poll() is None

    def end(self, fate: str, chance: random.Random, run_dir: Path) -> bool:
        """Brings the fate about; whether the life had not ended by itself before."""
        if "start" in fate:
            time.sleep(chance.uniform(0, 6))
        elif not self.wait_for(lambda: re.search(r"\d+ steps of \d+ images", self.log.read_text())):
            return False
        if "written" in fate:
            self.wait_for(lambda: any(run_dir.glob("tmp-checkpoint-*")))
            time.sleep(chance.uniform(0, 0.03))
        elif "start" not in fate:
            time.sleep(chance.uniform(0, 0.8))
        if self.launcher.poll() is not None:
            return False
        number = getattr(signal, fate.split()[0])
        if fate.split()[2] == "all":
            everyone = [psutil.Process(self.launcher.pid), *psutil.Process(self.launcher.pid).children(recursive=True)]
            for process in everyone:  # torchrun puts its processes into groups of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        elif "launcher" in fate:
            self.launcher.send_signal(number)
        else:
            self.trainers()["other" in fate].send_signal(number)
        self.launcher.wait(timeout=90)
        return True


@pytest.mark.slow
def test_killed_run_ends_where_the_undisturbed_run_ends(base_args, tmp_path):
    chance = random.Random(0)
    arguments = [*base_args, f"--max_train_steps={STEPS}", f"--validation_steps={STEPS}", "--logging_steps=10"]
    arguments += ["--checkpointing_steps=5", "--checkpoints_total_limit=3", "--dataloader_num_workers=1"]
    arguments += ["--resume_from_checkpoint=latest", "--model_kwargs", "dropout=0.1"]
    undisturbed = Life([*arguments, f"--output_dir={tmp_path / 'whole'}"], tmp_path / "whole.log")
    assert undisturbed.launcher.wait() == 0, undisturbed.log.read_text()[-3000:]

    run_dir = tmp_path / "run"
    arguments += [f"--output_dir={run_dir}"]
    killed, last_step, started = dict.fromkeys(FATES, 0), 0, time.monotonic()
    while sum(killed.values()) < KILLS:
        life = Life(arguments, tmp_path / "life.log")
        fate = chance.choices(list(FATES), FATES.values())[0]
        disturbed = life.end(fate, chance, run_dir)
        assert disturbed, f"after {killed}, step {last_step}:\n{life.log.read_text()[-3000:]}"
        killed[fate] += 1
        complete = [c for c in list_checkpoints(run_dir) if not verify_checkpoint(c)]
        step = checkpoint_step(complete[-1]) if complete else 0
        assert step >= last_step, f"{fate}: back from {last_step} to {step}"
        last_step = step
    life = Life(arguments, tmp_path / "life.log")
    assert life.launcher.wait() == 0, life.log.read_text()[-3000:]
    minutes = (time.monotonic() - started) / 60
    print(f"{KILLS} kills in {minutes:.0f} minutes, the last at step {last_step} of {STEPS}: {killed}")
    assert_same_files(tmp_path / "whole" / f"checkpoint-{STEPS}", run_dir / f"checkpoint-{STEPS}", STATES)
