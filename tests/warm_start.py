"""Scripts in processes of their own whose slow imports are done: forked from a server that has done them once.

A fresh Python needs five seconds for torch and diffusers before a script begins. Where the test is about what the
process does afterwards (signals, kills, several ranks), it is forked instead, and runs the script as `__main__`. Tests
of launchers, of the first seconds and of what is printed meanwhile start a fresh Python (`helpers.start`).
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train_diffit", "torch.utils.tensorboard"])


def _run(command: list[str], log: str, cwd: Path, environment: dict[str, str]) -> None:
    """In the forked process: becomes `python COMMAND`, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # Python's own for data loaders, not that of this file
    sys.argv = list(command)
    code = 0
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # As at the end of Python, the frames are gone by now; multiprocessing by itself leaves this out.
    atexit._run_exitfuncs()
    sys.exit(code)


class WarmProcess:
    """A script with its arguments, started; the methods are those of `subprocess.Popen`."""

    started: list["WarmProcess"] = []

    def __init__(self, command: list[str], cwd: Path = ROOT, **environment: str):
        handle, log = tempfile.mkstemp(prefix="diffit-test-")
        os.close(handle)
        self._log = Path(log)
        self._process = _context.Process(target=_run, args=(command, log, cwd, environment))
        with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for what the server imports
            self._process.start()
        self.pid = self._process.pid
        self.started.append(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """Waits for the end, by a kill if need be, and returns what was printed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
        output = self._log.read_text()
        self._log.unlink()
        return output, None


def start_ranks(*commands: list[str], folders: list[Path] | None = None) -> list[WarmProcess]:
    """Starts one process for each command, as a launcher does the ranks of a machine; each in its folder if given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = {"WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(len(commands))}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        WarmProcess(command, folders[rank] if folders else ROOT, RANK=str(rank), LOCAL_RANK=str(rank), **launch)
        for rank, command in enumerate(commands)
    ]


def run_ranks(*commands: list[str], folders: list[Path] | None = None) -> tuple[list[int], str]:
    """Runs one process for each command to its end; their exit codes, and what they printed together."""
    processes = start_ranks(*commands, folders=folders)
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], "".join(outputs)
