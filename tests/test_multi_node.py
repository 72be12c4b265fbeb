"""Several machines, simulated by launchers on this one, and processes that die. For a real SLURM see test_slurm.py."""

import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore

from diffit.config import parse_args
from diffit.processes import build_accelerator, check_devices, join_slurm_step
from helpers import LAUNCH, ROOT, STATES, assert_same_files, mentions, run, start, torchrun, wait_for_file

STEPS = 400


# --- SLURM's variables


@pytest.fixture
def slurm_task(monkeypatch, tmp_path):
    """The environment of task 3 of 4, two on each of two nodes, and a `scontrol` that answers as SLURM's does."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the function sets is taken back at the end
        monkeypatch.delenv(name)
    step = {
        "JOB_ID": 4711,
        "STEP_ID": 2,
        "STEP_NUM_TASKS": 4,
        "STEP_NODELIST": "gpu[07-08]",
        "PROCID": 3,
        "LOCALID": 1,
    }
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 && echo gpu08\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return monkeypatch


def launch_variables() -> dict[str, str | None]:
    join_slurm_step()
    return {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


def test_slurm_task_becomes_a_rank(slurm_task):
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07", "MASTER_PORT": "27112"}
    assert launch_variables() == expected


def test_steps_of_one_job_meet_on_different_ports(slurm_task):
    slurm_task.setenv("SLURM_STEP_ID", "3")
    assert launch_variables()["MASTER_PORT"] == "27113"


def test_exported_address_and_port_are_kept(slurm_task):
    slurm_task.setenv("MASTER_ADDR", "10.0.0.1")
    slurm_task.setenv("MASTER_PORT", "29500")
    slurm_task.setenv("PATH", "")  # no need to ask scontrol
    variables = launch_variables()
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_variables_of_a_launcher_are_kept(slurm_task):
    slurm_task.setenv("RANK", "0")
    slurm_task.setenv("WORLD_SIZE", "2")
    variables = launch_variables()
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_ADDR"]) == ("0", "2", None)


def test_step_of_one_task_stays_alone(slurm_task):
    """An interactive shell is the same; SLURM_PROCID is set there."""
    slurm_task.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert set(launch_variables().values()) == {None}


def test_batch_script_stays_alone(slurm_task):
    """It has SLURM_PROCID and SLURM_NTASKS, but is not a task of a step."""
    slurm_task.delenv("SLURM_STEP_NUM_TASKS")
    slurm_task.setenv("SLURM_NTASKS", "4")
    assert set(launch_variables().values()) == {None}


def test_world_size_that_disagrees_with_srun_is_refused(slurm_task):
    slurm_task.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=mentions("WORLD_SIZE", 8, "srun", 4)):
        join_slurm_step()


def test_missing_scontrol_is_reported_with_a_remedy(slurm_task):
    slurm_task.setenv("PATH", "")
    with pytest.raises(ValueError, match=mentions("gpu[07-08]", "MASTER_ADDR")):
        join_slurm_step()


def test_failing_scontrol_is_reported_with_a_remedy(slurm_task):
    slurm_task.setenv("SLURM_STEP_NODELIST", "gpu[07-")
    with pytest.raises(ValueError, match=mentions("gpu[07-", "MASTER_ADDR")):
        join_slurm_step()


# --- processes that do not see each other


EXPORTED = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.slow
@pytest.mark.parametrize("exported", [{}, EXPORTED], ids=["plain", "exported"])
@pytest.mark.parametrize("flags", [["--cpu", "--num_processes=2"], ["--num_processes=2"]], ids=" ".join)
def test_accelerate_launch_that_starts_one_process_of_two_is_refused(flags, exported, train_args):
    process = start([*LAUNCH, *flags, "train_diffit.py", *train_args], **exported)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert mentions("--cpu", "--num_processes", "cpu_multi_process.yaml").search(output)


@pytest.mark.slow
def test_accelerate_launch_of_one_process_trains_whatever_address_is_exported(train_args, tmp_path):
    run([*LAUNCH, "--cpu", "--num_processes=1", "train_diffit.py", *train_args, "--max_train_steps=1"], **EXPORTED)
    assert (tmp_path / "run/checkpoint-1").is_dir()


# --- devices


@pytest.mark.parametrize("devices", [["cuda", "cuda", "cpu"], ["cpu", "cuda", "cpu"], ["cuda"] * 3, ["cpu"] * 2])
def test_processes_with_different_devices_are_refused_in_all_of_them(devices):
    """They would wait for each other over different backends, for hours."""
    store, errors = HashStore(), {}

    def check(rank: int) -> None:
        try:
            check_devices(store, devices[rank], rank, len(devices))
        except ValueError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in reversed(range(len(devices)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if len(set(devices)) == 1:
        assert errors == {}
    else:
        other = next(rank for rank, device in enumerate(devices) if device != devices[0])
        expected = mentions(f"process {other}", devices[other], "process 0", devices[0], socket.gethostname(), "--cpu")
        assert len(errors) == len(devices) and all(expected.search(message) for message in errors.values())


# --- gloo's network interface


GLOO_SCRIPT = """
import os, sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch
from diffit import processes
from diffit.command_line import run_script

def main(config):
    processes.START_TIMEOUT = timedelta(seconds=4)
    state = processes.join_processes()
    if state.process_index == 1 and "LATER" in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["LATER"]
    stop = processes.StopRequest()
    stop.begin()
    time.sleep(6 * state.process_index)  # longer than the time-out of connecting
    stop.agreed()
    stop.agreed()
    stop.close()
    print("met\\n", end="", flush=True)
    os._exit(0)  # without the destructors of the interpreter's end, in which gloo may abort (torch 2.13)

run_script(main, SimpleNamespace(debug=False))
"""


def run_gloo_script(tmp_path, **environment: str) -> str:
    script = tmp_path / "gloo.py"
    script.write_text(GLOO_SCRIPT)
    process = start([*torchrun(), str(script)], PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment)
    return process.communicate(timeout=120)[0]


@pytest.mark.parametrize("moment", ["GLOO_SOCKET_IFNAME", "LATER"])  # of the process group, and of the stop signals
def test_interface_that_gloo_cannot_use_is_named_with_the_remedy(moment, tmp_path):
    output = run_gloo_script(tmp_path, **{moment: "nosuch0"})
    assert mentions("gloo.py: error", "nosuch0", "GLOO_SOCKET_IFNAME=INTERFACE").search(output), output
    assert "met" not in output.split()


def test_short_time_out_of_connecting_does_not_end_slow_steps(tmp_path):
    output = run_gloo_script(tmp_path)
    assert output.split().count("met") == 2, output


# --- processes that die


@pytest.fixture(scope="module")
def long_args(base_args) -> list[str]:
    """A training of several seconds with dropout, long enough for a process to die in the middle."""
    periods = [f"--max_train_steps={STEPS}", "--checkpointing_steps=50", f"--validation_steps={STEPS}"]
    resume = ["--logging_steps=50", "--resume_from_checkpoint=latest"]
    return [*base_args, *periods, *resume, "--model_kwargs", "dropout=0.1"]


@pytest.fixture
def new_store(monkeypatch) -> None:
    """As README.md says: otherwise the processes may find the addresses of those that died."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def test_restarts_that_may_fail_log_a_warning(train_args, monkeypatch, caplog):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    config = parse_args(train_args)
    build_accelerator(config.precision, config.run)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text


@pytest.fixture(scope="module")
def whole_run(long_args, tmp_path_factory) -> Path:
    """The last checkpoint of an undisturbed run on two processes."""
    run_dir = tmp_path_factory.mktemp("whole")
    run([*torchrun(), "train_diffit.py", *long_args, f"--output_dir={run_dir}"])
    return run_dir / f"checkpoint-{STEPS}"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_killed_worker_is_restarted_and_the_run_resumes_bitwise(long_args, whole_run, new_store, tmp_path):
    """One node: torchrun starts both workers again, and they resume by themselves."""
    launcher = [*torchrun(), "--max_restarts=1"]
    process = start([*launcher, "train_diffit.py", *long_args, f"--output_dir={tmp_path}"])
    wait_for_file(tmp_path / "checkpoint-50", process)
    psutil.Process(process.pid).children()[1].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("4 x 2 processes x 1") == 2  # started twice
    assert_same_files(whole_run, tmp_path / f"checkpoint-{STEPS}", STATES)


@pytest.mark.slow
def test_killed_node_rejoins_and_the_run_resumes_bitwise(long_args, whole_run, new_store, tmp_path, free_port):
    """Two launchers meet on loopback; the second is killed with its worker and started again."""

    def launch(node: int) -> subprocess.Popen:
        rendezvous = ["--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{free_port}"]
        rendezvous += [f"--rdzv_conf=is_host={int(node == 0)}", "--local_addr=127.0.0.1"]
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", *rendezvous]
        return start([*launcher, "train_diffit.py", *long_args, f"--output_dir={tmp_path}"])

    first, second = launch(0), launch(1)
    wait_for_file(tmp_path / "checkpoint-50", first)
    (worker,) = psutil.Process(second.pid).children()
    second.send_signal(signal.SIGKILL)
    worker.kill()
    second.communicate()
    second = launch(1)
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "\n".join(outputs)
    assert "".join(outputs).count("4 x 2 processes x 1") == 2  # met twice
    assert_same_files(whole_run, tmp_path / f"checkpoint-{STEPS}", STATES)
