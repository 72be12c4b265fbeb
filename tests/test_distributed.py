"""Several processes: one run per folder, and agreement at the start."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from diffit.command_line import EXIT_USER_ERROR
from diffit.launcher import EXIT_STOPPED
from diffit.lock import OutputDirLock
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from helpers import mentions, train, wait_for_file
from warm_start import WarmProcess, run_ranks

# --- one run for one folder


def write_owner(lock: OutputDirLock, **changes) -> None:
    """Writes an owner file into a folder: this process with some fields changed."""
    with OutputDirLock(lock.folder) as token:
        owner = json.loads(lock.file.read_text())
        assert owner["token"] == token
    lock.folder.mkdir(exist_ok=True)
    lock.file.write_text(json.dumps(owner | {"token": "other"} | changes))


def test_folder_of_a_living_run_is_refused(tmp_path):
    with OutputDirLock(tmp_path):
        with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path, os.getpid())):
            OutputDirLock(tmp_path).__enter__()
    with OutputDirLock(tmp_path):  # given back
        pass


def test_folder_of_a_dead_run_is_taken_over_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_owner(OutputDirLock(tmp_path / "run"), pid=process.pid)
    started = time.monotonic()
    with OutputDirLock(tmp_path / "run") as token:
        assert json.loads((tmp_path / "run/.running").read_text())["token"] == token
    assert time.monotonic() - started < 5
    assert not (tmp_path / "run").exists()  # nothing was written there


def test_reused_process_id_of_a_dead_run_is_not_an_owner(tmp_path):
    write_owner(OutputDirLock(tmp_path / "run"), started=1.0)
    with OutputDirLock(tmp_path / "run", heartbeat=0.1, patience=0.5) as token:
        assert json.loads((tmp_path / "run/.running").read_text())["token"] == token


def test_live_owner_keeps_the_folder_when_the_clock_changes(tmp_path):
    """The start of a process as the system tells it moves with the clock."""
    with OutputDirLock(tmp_path, heartbeat=0.05) as token:
        owner = json.loads((tmp_path / ".running").read_text())
        (tmp_path / ".running").write_text(json.dumps(owner | {"started": owner["started"] + 3600}))
        with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path, os.getpid())):
            OutputDirLock(tmp_path, heartbeat=0.05, patience=5).__enter__()
        assert json.loads((tmp_path / ".running").read_text())["token"] == token


def test_owner_file_that_was_deleted_is_written_again(tmp_path):
    lock = OutputDirLock(tmp_path)
    with lock as token:
        (tmp_path / ".running").unlink()
        lock.check_owned()
        lock.check_visible(token)


def test_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=mentions(f"--output_dir {tmp_path / 'file'}", "File exists")):
        OutputDirLock(tmp_path / "file").__enter__()


def test_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(lock):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(OutputDirLock, "_create", refuse)
    with pytest.raises(ValueError, match=mentions(f"--output_dir {tmp_path}", "Permission denied")):
        OutputDirLock(tmp_path).__enter__()


def test_killed_process_that_nobody_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(process.pid).create_time()
    process.kill()
    time.sleep(0.5)
    write_owner(OutputDirLock(tmp_path / "run"), pid=process.pid, started=started)
    with OutputDirLock(tmp_path / "run") as token:
        assert json.loads((tmp_path / "run/.running").read_text())["token"] == token
    process.wait()


@pytest.mark.parametrize("content", ["", '{"token": "ab', '{"pid": 1}'])
def test_owner_of_unknown_state_is_watched_then_replaced(content, tmp_path):
    (tmp_path / ".running").write_text(content)
    with OutputDirLock(tmp_path, heartbeat=0.1, patience=0.5) as token:
        assert json.loads((tmp_path / ".running").read_text())["token"] == token


@pytest.mark.parametrize("content", ["{}", "a file of the user"])
def test_foreign_lock_file_is_refused_and_kept(content, tmp_path):
    (tmp_path / ".running").write_text(content)
    with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path, ".running")), OutputDirLock(tmp_path):
        pass
    assert (tmp_path / ".running").read_text() == content


def test_remote_owner_is_alive_while_it_touches_its_file(tmp_path):
    lock = OutputDirLock(tmp_path, heartbeat=0.1, patience=2)
    write_owner(lock, machine="elsewhere", host="node7")
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(lock.file)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path, "node7")):
        lock.__enter__()
    ended.set()
    thread.join()
    with OutputDirLock(tmp_path, heartbeat=0.1, patience=0.5):  # silent now
        pass


def test_owner_touches_its_file(tmp_path):
    with OutputDirLock(tmp_path, heartbeat=0.05):
        before = (tmp_path / ".running").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / ".running").stat().st_mtime_ns > before


def test_only_one_of_many_runs_takes_over_a_dead_runs_folder(tmp_path):
    write_owner(OutputDirLock(tmp_path), pid=2**22 + 1)
    outcomes, ready = [], threading.Barrier(8)

    def take() -> None:
        lock = OutputDirLock(tmp_path, heartbeat=0.05, patience=1)
        ready.wait()
        try:
            lock.__enter__()
            outcomes.append(lock)
        except ValueError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owners = [outcome for outcome in outcomes if isinstance(outcome, OutputDirLock)]
    assert len(outcomes) == 8 and len(owners) == 1
    owners[0].check_owned()
    owners[0].__exit__()


def test_run_that_lost_its_folder_writes_no_checkpoint(train_args, tmp_path, monkeypatch):
    """The situation after a long pause during which another run took over."""
    original = OutputDirLock.check_owned

    def steal_and_check(lock: OutputDirLock) -> None:
        lock.file.write_text('{"token": "thief", "pid": 7, "host": "node7"}')
        original(lock)

    monkeypatch.setattr(OutputDirLock, "check_owned", steal_and_check)
    with pytest.raises(RuntimeError, match=mentions("process 7", "node7", tmp_path / "run")):
        train(train_args)
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    assert json.loads((tmp_path / "run/.running").read_text())["token"] == "thief"


def test_second_run_in_a_folder_is_refused_and_the_first_continues(base_args, tmp_path):
    flags = [f"--output_dir={tmp_path / 'run'}", "--max_train_steps=100000", "--resume_from_checkpoint=latest"]
    first = WarmProcess(["train_diffit.py", *base_args, *flags, "--checkpointing_steps=10"])
    wait_for_file(tmp_path / "run/checkpoint-10", first)
    with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path / "run", first.pid)):
        train([*base_args, *flags])
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == EXIT_STOPPED
    assert not (tmp_path / "run/.running").exists()


def test_dry_run_leaves_no_folder(train_args, tmp_path):
    train([*train_args, "--dry_run"])
    assert not (tmp_path / "run").exists()


# --- agreement at the start


def two_ranks(arguments: list[str], *flags: str) -> list[list[str]]:
    """The commands of two processes; `RANK` in a flag is the number of each."""
    return [["train_diffit.py", *arguments, *(flag.replace("RANK", rank) for flag in flags)] for rank in "01"]


def refused_launch(commands: list[list[str]], tmp_path: Path, folders: list[Path] | None = None) -> str:
    """Runs the processes of one launch, which must all fail, and returns what they printed."""
    codes, output = run_ranks(*commands, folders=folders)
    assert codes == [EXIT_USER_ERROR] * len(commands), output
    assert not list(tmp_path.rglob("*checkpoint*"))
    return output


def test_arguments_that_differ_between_processes_are_named(train_args, tmp_path):
    first, second = two_ranks(train_args)
    output = refused_launch([[*first, "--learning_rate=1e-3"], [*second, "--learning_rate=1e-4"]], tmp_path)
    assert mentions("process 1", "--learning_rate", "0.001", "0.0001").search(output)


def test_data_that_differ_between_processes_are_found(train_args, image_folder, tmp_path):
    for rank in range(2):
        shutil.copytree(image_folder, tmp_path / f"data{rank}")
    image = tmp_path / "data1/green/3.png"
    image.write_bytes((tmp_path / "data1/red/0.png").read_bytes())
    output = refused_launch(two_ranks(train_args, f"--train_data_dir={tmp_path}/dataRANK"), tmp_path)
    tables = [load_image_table(SourceConfig(train_data_dir=f"{tmp_path}/data{rank}")) for rank in range(2)]
    assert mentions("process 1", *(table.data_digest() for table in tables)).search(output)


def test_data_missing_on_one_machine_is_reported_in_all_processes(train_args, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data0")
    output = refused_launch(two_ranks(train_args, f"--train_data_dir={tmp_path}/dataRANK"), tmp_path)
    errors = [line for line in output.split("\n") if "error: " in line and f"{tmp_path}/data1" in line]
    assert len(errors) == 1 and "process 1 " in errors[0]


def test_same_data_in_different_places_trains(train_args, image_folder, tmp_path):
    for rank in range(2):
        shutil.copytree(image_folder, tmp_path / f"data{rank}")
    flags = [f"--train_data_dir={tmp_path}/dataRANK", "--max_train_steps=1"]
    codes, output = run_ranks(*two_ranks(train_args, *flags))
    assert codes == [0, 0], output


def test_output_dir_that_is_not_shared_is_reported(tmp_path):
    with OutputDirLock(tmp_path / "node1") as token, OutputDirLock(tmp_path / "node2"):
        OutputDirLock(tmp_path / "node1").check_visible(token, patience=0)
        for folder in ("node2", "node3"):
            with pytest.raises(ValueError, match=mentions("--output_dir", tmp_path / folder, socket.gethostname())):
                OutputDirLock(tmp_path / folder).check_visible(token, patience=0.1)


@pytest.mark.slow
def test_processes_with_different_output_dirs_end_at_the_start(train_args, tmp_path):
    """Each process has a current folder of its own, as on machines without shared storage."""
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    folders = [tmp_path / "node0", tmp_path / "node1"]
    output = refused_launch(two_ranks(train_args, "--output_dir=run"), tmp_path, folders)
    assert mentions("--output_dir run", socket.gethostname()).search(output)
