"""The sbatch files and `srun` under a real SLURM of two nodes on this machine (`make test-slurm`, as root)."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from diffit.checkpoint import verify_checkpoint
from diffit.run_dir import checkpoint_step, list_checkpoints
from helpers import ROOT, STATES, assert_same_files, mentions, run, torchrun

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a SLURM of our own needs root"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="a SLURM of our own needs Debian's packages"),
]
SCRIPT = str(ROOT / "tests/slurm_cluster.sh")
TRAIN, PREEMPTIBLE = (str(ROOT / f"configs/slurm/{name}.sbatch") for name in ("train", "train_preemptible"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    earlier = dict(os.environ)
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an active environment
    )
    try:
        subprocess.run([SCRIPT, "start", str(folder)], check=True, timeout=600)
        yield
    finally:
        subprocess.run([SCRIPT, "stop", str(folder)], check=True, timeout=120)
        os.environ.clear()
        os.environ.update(earlier)


def slurm(*command: str, timeout: float = 120) -> str:
    """The output of a SLURM command, which must succeed."""
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def submit(log: Path, *command: str) -> str:
    """Submits a job and returns its number."""
    return slurm("sbatch", "--parsable", f"--output={log}", *command).split()[-1]


def job(number: str, field: str) -> str:
    return re.search(rf"\b{field}=(\S+)", slurm("scontrol", "show", "job", number))[1]


def wait_for(number: str, field: str, values: tuple[str, ...], log: Path, timeout: float) -> str:
    """Waits until a field of `scontrol show job` has one of these values."""
    end = time.monotonic() + timeout
    while (value := job(number, field)) not in values:
        assert time.monotonic() < end, f"{field} is still {value}\n{log.read_text() if log.exists() else ''}"
        time.sleep(0.5)
    return value


def finished(number: str, log: Path, timeout: float = 180) -> str:
    return wait_for(number, "JobState", ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), log, timeout)


def launch_locally(arguments: list[str]) -> None:
    """The undisturbed run: two processes of one launcher, without SLURM."""
    run([*torchrun(), "train_diffit.py", *arguments])


def test_train_sbatch_gives_the_weights_of_a_local_run(cluster, base_args, tmp_path):
    number = submit(tmp_path / "log", TRAIN, *base_args, f"--output_dir={tmp_path / 'run'}")
    assert finished(number, tmp_path / "log") == "COMPLETED", (tmp_path / "log").read_text()
    assert mentions("4 x 2 processes x 1").search((tmp_path / "log").read_text())
    launch_locally([*base_args, f"--output_dir={tmp_path / 'local'}"])
    assert_same_files(tmp_path / "local/checkpoint-4", tmp_path / "run/checkpoint-4", STATES)


@pytest.mark.parametrize("file", [TRAIN, PREEMPTIBLE], ids=lambda file: Path(file).stem)
def test_sbatch_starts_one_process_for_each_gpu(file, cluster, base_args, tmp_path):
    number = submit(tmp_path / "log", "--gpus-per-node=2", file, *base_args, "--dry_run")
    assert finished(number, tmp_path / "log") == "COMPLETED", (tmp_path / "log").read_text()
    assert mentions("4 x 4 processes x 1").search((tmp_path / "log").read_text())


def test_srun_without_a_launcher_starts_processes_that_see_each_other(cluster, base_args, tmp_path):
    arguments = [*base_args, f"--output_dir={tmp_path / 'run'}"]
    output = slurm("srun", "--nodes=2", "--ntasks=2", sys.executable, "train_diffit.py", *arguments)
    assert mentions("4 x 2 processes x 1").search(output)
    launch_locally([*base_args, f"--output_dir={tmp_path / 'local'}"])
    assert_same_files(tmp_path / "local/checkpoint-4", tmp_path / "run/checkpoint-4", STATES)


def test_srun_of_one_task_and_the_batch_script_start_one_process(cluster, base_args, tmp_path):
    """SLURM_PROCID is 0 in both."""
    arguments = " ".join([*base_args, "--dry_run"])
    command = f"{sys.executable} train_diffit.py {arguments} && srun --ntasks=1 --nodes=1 {sys.executable} "
    command += f"train_diffit.py {arguments}"
    number = submit(tmp_path / "log", "--nodes=2", f"--wrap={command}")
    assert finished(number, tmp_path / "log") == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("4 x 1 processes x 1 accumulation") == 2


def test_accelerate_launch_runs_on_the_nodes_of_srun(cluster, base_args, tmp_path):
    """The command at the top of configs/accelerate/multi_node.yaml, with the processes and the precision of a CPU."""
    config = ROOT / "configs/accelerate/multi_node.yaml"
    command = re.search(r"(srun .*?)\ncompute", config.read_text().replace("\n#", "").replace("\\ ", ""), re.DOTALL)[1]
    command = command.replace("--config_file", "--num_processes 2 --mixed_precision no --config_file")
    command = command.replace("--config configs/train/cifar10.yaml", " ".join([*base_args, "--dry_run"]))
    number = submit(tmp_path / "log", "--nodes=2", f"--wrap={command}")
    assert finished(number, tmp_path / "log") == "COMPLETED", (tmp_path / "log").read_text()
    assert mentions("4 x 2 processes x 1").search((tmp_path / "log").read_text())


def test_job_near_its_time_limit_is_requeued_and_resumes_bitwise(cluster, base_args, tmp_path):
    """The length is set while the job waits, so that the speed of the machine does not matter: five to ten minutes."""
    config, log, arguments = tmp_path / "run.yaml", tmp_path / "log", [*base_args, f"--config={tmp_path / 'run.yaml'}"]
    arguments = [flag for flag in arguments if not flag.startswith("--max_train_steps")]
    periods = {"checkpointing_steps": 1000000, "validation_steps": 1000000, "logging_steps": 100}
    arguments = [flag for flag in arguments if not flag.startswith("--logging_steps")]
    config.write_text(yaml.safe_dump({**periods, "max_train_steps": 1000000}))
    # SLURM sends the signal up to a minute early.
    options = ["--time=3", "--signal=USR1@60", PREEMPTIBLE]
    number = submit(log, *options, *arguments, f"--output_dir={tmp_path / 'run'}")
    wait_for(number, "Restarts", ("1",), log, timeout=240)
    saved = list_checkpoints(tmp_path / "run")
    assert len(saved) == 1 and verify_checkpoint(saved[0]) is None, log.read_text()
    assert f"stopped at step {checkpoint_step(saved[0])};" in log.read_text()

    last_step = checkpoint_step(saved[0]) + 20
    config.write_text(yaml.safe_dump({**periods, "max_train_steps": last_step}))
    assert finished(number, log, timeout=300) == "COMPLETED", log.read_text()
    launch_locally([*arguments, f"--output_dir={tmp_path / 'whole'}"])
    assert_same_files(*(tmp_path / name / f"checkpoint-{last_step}" for name in ("whole", "run")), STATES)


def test_job_that_fails_is_not_queued_again(cluster, base_args, tmp_path):
    number = submit(tmp_path / "log", PREEMPTIBLE, *base_args, "--global_batch_size=7", f"--output_dir={tmp_path}/run")
    assert finished(number, tmp_path / "log", timeout=400) == "FAILED", (tmp_path / "log").read_text()
    assert job(number, "Restarts") == "0"


def test_stopped_cluster_leaves_no_process(tmp_path):
    environment = os.environ | {"SLURM_CONF": f"{tmp_path}/slurm.conf"}
    subprocess.run([SCRIPT, "start", str(tmp_path)], check=True, timeout=600)
    try:
        command = ["srun", "--nodes=2", "sleep", "1000"]
        sleeping = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(2)
        before = processes_of(tmp_path)
    finally:
        subprocess.run([SCRIPT, "stop", str(tmp_path)], check=True, timeout=120)
    sleeping.wait(timeout=30)
    assert {"munged", "slurmctld", "slurmd", "srun", "sleep"} <= before
    assert processes_of(tmp_path) == set()


def processes_of(folder: Path) -> set[str]:
    """Names of the living processes that have the SLURM of a folder in their environment."""
    names = set()
    for process in psutil.process_iter():
        try:
            belongs = process.environ().get("SLURM_CONF") == f"{folder}/slurm.conf"
            if belongs and process.status() != psutil.STATUS_ZOMBIE:
                names.add(process.name())
        except psutil.Error:  # it has just ended
            continue
    return names
