# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Stops a process whose launcher (torchrun or `accelerate launch`) is gone.

A launcher that dies by SIGKILL cannot stop the processes that it started. Without this module they would wait for each
other for hours or train on, and keep the output folder. Scripts call `follow_launcher` before their slow imports, so
nothing here may take long to import.
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

EXIT_STOPPED = 75  # exit code after a signal, a time limit or the launcher's death: the run can be resumed
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal that a process gets when its parent dies
POLL_SECONDS = 1.0  # how often a launcher that is not our parent is looked at

# How launchers are named on a command line: programs, modules (also as the end of a file's path) and sub-commands.
LAUNCHERS = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate launch",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli launch",
)

_launcher: int | None = None  # process number of the launcher that this process follows


def follow_launcher() -> None:
    """Makes this process get SIGTERM when its launcher dies. Does nothing without a launcher.

    To be called by a script that runs as `__main__`; importing the script must not tie the importer to a launcher.

    Raises:
        SystemExit: with `EXIT_STOPPED` if the launcher is dead already.
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
        if os.getppid() != parent:  # it died before the kernel knew that the signal is wanted
            exit_without_launcher()
        return
    threading.Thread(target=_watch, args=(launcher.pid,), daemon=True).start()


def launcher_is_gone() -> bool:
    """Whether the launcher that this process follows is dead. False without a launcher."""
    return _launcher is not None and is_dead(_launcher)


def exit_without_launcher() -> None:
    """Leaves at the very start, with one line."""
    print("the launcher (torchrun or accelerate launch) is gone: stopped before the start", file=sys.stderr)
    sys.exit(EXIT_STOPPED)


# ---------------------------------------------------------------------------------------------------------------------
# Which process is the launcher?


def find_launcher() -> psutil.Process | None:
    """The nearest ancestor that is a launcher; a shell or another program may stand in between."""
    process, ancestors = psutil.Process(), []
    with contextlib.suppress(psutil.Error):  # an ancestor ended while we looked
        while (process := process.parent()) is not None:
            ancestors.append(process)
    for ancestor in ancestors:
        if is_launcher(command_line(ancestor)):
            return ancestor
    # Not every launcher has a telling name: some programs launch through torch's or accelerate's Python API.
    if ancestors and was_launched() and has_loaded_torch(ancestors[0].pid):
        return ancestors[0]
    return None


def command_line(process: psutil.Process) -> list[str]:
    """The words of a command line; none if it cannot be read."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_launcher(command: list[str]) -> bool:
    """Whether a command line runs a launcher, rather than only mentions one, as `bash -c "torchrun ..."` does."""
    words = list(command)
    if words and re.match("python|pypy", Path(words[0]).name):
        words.pop(0)
        while words and words[0].startswith("-"):
            option = words.pop(0)
            if re.fullmatch("-[a-zA-Z]*m", option):  # a module follows; also joined with other options: -um
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
    """Whether the environment says that a launcher started this very process, and not only an ancestor."""
    if not hasattr(os, "getsid"):  # Windows
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun, which makes each process the leader of a session
        return os.getsid(0) == os.getpid()
    return "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION" in os.environ  # nobody exports this one by hand


def is_orphan() -> bool:
    """Whether this process, which has no launcher among its ancestors, had one. If in doubt, it had none."""
    if os.getppid() == 0 or not was_launched():  # 0: the parent is outside our container, and so may the launcher be
        return False
    # `accelerate launch` leaves its process in the group of the shell's job, which it leads itself if it is alone.
    group = os.getpgid(0)
    return "TORCHELASTIC_RUN_ID" in os.environ or (group != 0 and is_dead(group))


def has_loaded_torch(pid: int) -> bool:
    """Whether torch's library is in a process's memory. False where that cannot be told."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:  # not Linux, or a process of another user
        return False


# ---------------------------------------------------------------------------------------------------------------------
# When does it die?


def signal_at_parents_death() -> bool:
    """Asks Linux for SIGTERM when our parent dies; False on other systems.

    The kernel goes by the thread that started us: torchrun and `accelerate launch` do so in their main thread.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def is_dead(pid: int) -> bool:
    """Whether a process has ended, even if nobody has waited for it yet.

    Start times are not compared: they move when the clock is set, and no number is given out again within a second.
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
