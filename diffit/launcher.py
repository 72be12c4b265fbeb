# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Stops a process whose launcher (torchrun or `accelerate launch`) has died.

A launcher killed by SIGKILL cannot stop the processes that it started. Without this module they would wait for each
other for hours, or continue training, and block the output folder. Scripts call `follow_launcher` before their slow
imports, so this module must import quickly.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

EXIT_STOPPED = 75  # os.EX_TEMPFAIL, which Windows lacks: stopped by a signal, a time limit or the launcher's death
PR_SET_PDEATHSIG = 1  # Linux prctl option: the signal that a process gets when its parent dies
POLL_SECONDS = 1.0  # interval of checks on a launcher that is not our parent

# Names of launchers on a command line: programs, modules (also as the end of a file's path) and sub-commands.
LAUNCHERS = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate launch",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli launch",
)

_launcher: int | None = None  # process id of the launcher that this process follows


def follow_launcher() -> None:
    """Makes this process receive SIGTERM when its launcher dies. Does nothing without a launcher.

    Only a script that runs as `__main__` may call this: importing it must not tie the importing process to a launcher.

    Raises:
        SystemExit: with `EXIT_STOPPED`, if the launcher is already dead.
    """
    global _launcher
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return
    parent = os.getppid()
    launcher = find_launcher()
    if launcher is None:
        if is_orphan():
            exit_without_launcher()
        return
    _launcher = launcher.pid
    if launcher.pid == parent and is_launcher(command_line(launcher)) and signal_at_parents_death():
        if os.getppid() != parent:  # it died before the kernel was asked for the signal
            exit_without_launcher()
        return
    threading.Thread(target=_watch, args=(launcher.pid,), daemon=True).start()


def launcher_is_gone() -> bool:
    """Whether the launcher of this process is dead. False without a launcher."""
    return _launcher is not None and is_dead(_launcher)


def exit_without_launcher() -> None:
    """Exits at the very start, with a one-line message."""
    print("the launcher (torchrun or accelerate launch) is gone: stopped before the start", file=sys.stderr)
    sys.exit(EXIT_STOPPED)


# ---------------------------------------------------------------------------------------------------------------------
# Which process is the launcher?


def find_launcher() -> psutil.Process | None:
    """The nearest ancestor that is a launcher; shells or other programs may be in between."""
    process, ancestors = psutil.Process(), []
    with contextlib.suppress(psutil.Error):  # an ancestor ended in the meantime
        while (process := process.parent()) is not None:
            ancestors.append(process)
    for ancestor in ancestors:
        if is_launcher(command_line(ancestor)):
            return ancestor
    # A launcher's name need not reveal it: some programs launch through torch's or accelerate's Python API.
    if ancestors and was_launched() and has_loaded_torch(ancestors[0].pid):
        return ancestors[0]
    return None


def command_line(process: psutil.Process) -> list[str]:
    """The command line of a process as a list of words; empty if it cannot be read."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_launcher(command: list[str]) -> bool:
    """Whether a command line runs a launcher rather than merely mentioning one, as `bash -c "torchrun ..."` does."""
    words = list(command)
    if words and re.match("python|pypy", Path(words[0]).name):
        words.pop(0)
        while words and words[0].startswith("-"):
            option = words.pop(0)
            if re.fullmatch("-[a-zA-Z]*m", option):  # a module follows; -m may be combined with other options: -um
                return _names_launcher(words[:1], words[1:])
            if re.fullmatch("-[a-zA-Z]*c", option):  # code follows
                return False
            if option in ("-W", "-X"):  # a value follows
                words = words[1:]
    if not words:
        return False
    file = Path(words[0]).with_suffix("")
    return _names_launcher([file.name, ".".join(file.parts[-3:])], words[1:])


def _names_launcher(names: list[str], arguments: list[str]) -> bool:
    return any(name in LAUNCHERS or " ".join([name, *arguments[:1]]) in LAUNCHERS for name in names)


def was_launched() -> bool:
    """Whether the environment shows that a launcher started this process itself, not just one of its ancestors."""
    if not hasattr(os, "getsid"):  # Windows
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, which makes each process a session leader
        return os.getsid(0) == os.getpid()
    return "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION" in os.environ  # nobody sets this variable by hand


def is_orphan() -> bool:
    """Whether this process, which has no launcher among its ancestors, used to have one. False in case of doubt."""
    if os.getppid() == 0 or not was_launched():  # 0: the parent is outside our container, as the launcher may be
        return False
    # `accelerate launch` leaves its process in the process group of the shell job, which it leads if it runs alone.
    group = os.getpgid(0)
    return "TORCHELASTIC_RUN_ID" in os.environ or (group != 0 and is_dead(group))


def has_loaded_torch(pid: int) -> bool:
    """Whether a process has loaded torch's library. False where that cannot be determined."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:  # not Linux, or a process of another user
        return False


# ---------------------------------------------------------------------------------------------------------------------
# When does it die?


def signal_at_parents_death() -> bool:
    """Asks the Linux kernel to send SIGTERM when our parent dies. Returns False on other systems.

    The kernel sends it when the thread that started us ends, which for torchrun and `accelerate launch` is the main
    thread.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def is_dead(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not yet waited for it.

    Start times are not compared: they shift when the clock is set, and no process id is reused within a second.
    """
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _watch(launcher: int) -> None:
    while not is_dead(launcher):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
