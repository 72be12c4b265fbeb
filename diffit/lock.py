# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""One run at a time owns an output folder."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

import psutil

from diffit.errors import UserError

logger = logging.getLogger(__name__)


def _machine() -> str:
    """Tells machines (and containers, whose process numbers differ) apart."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


class OutputDirLock:
    """Lets one run at a time own a folder: the file `.running` in it names the owner and is touched again and again.

    Needs no file locks, so it works on shared file systems that have none. An owner on this machine is alive if its
    process is; an owner elsewhere is watched for a while, which needs no common clock.

    Args:
        folder: created if it does not exist.
        heartbeat: seconds between two touches.
        patience: seconds without a touch after which an owner on another machine counts as dead.
    """

    FILE = ".running"

    def __init__(self, folder: str | Path, heartbeat: float = 10, patience: float = 60):
        self.folder = Path(folder)
        self.file = self.folder / self.FILE
        self.heartbeat, self.patience = heartbeat, patience
        self.token = uuid.uuid4().hex
        self._released = threading.Event()
        self._is_writing = False

    def __enter__(self) -> str:
        """Takes the folder and returns the token that proves it.

        Raises:
            ValueError: if another run owns the folder.
        """
        process = psutil.Process()
        owner = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "machine": _machine(),
        }
        self._owner_text = json.dumps(owner)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} cannot be created: {error.strerror}") from error
        while True:
            try:
                self._write_owner()
                break
            except FileExistsError:
                if self._take_over():
                    break
        threading.Thread(target=self._beat, daemon=True).start()
        return self.token

    def __exit__(self, *exception) -> None:
        """Gives the folder back if it was taken, and removes it if nothing was written there."""
        self._released.set()
        if self._owner().get("token") == self.token or self._was_cut_off():
            with contextlib.suppress(OSError):
                self.file.unlink()
                self.folder.rmdir()

    def check_visible(self, token: str, patience: float = 30) -> None:
        """For every process: whether the folder that it sees is the one that the main process has taken.

        Args:
            token: what the main process got.
            patience: seconds that a shared file system may take to show a new file.

        Raises:
            ValueError: if it is another folder.
        """
        deadline = time.monotonic() + patience
        while self._owner().get("token") != token:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output_dir {self.folder} on {socket.gethostname()} is not the folder that the main process "
                    "sees: all machines need one shared folder"
                )
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                os.listdir(self.folder)  # makes a network file system look again

    def check_owned(self) -> None:
        """For the main process, before it writes what another run must not find mixed with its own.

        Raises:
            OSError: if another run has taken the folder, which it may if this process stood still for long.
        """
        try:
            owner = json.loads(self.file.read_text())
        except FileNotFoundError:
            logger.warning(f"{self.file} is gone: writing it again")
            self._write_owner()
            return
        except ValueError:
            owner = {}
        if owner.get("token") != self.token:
            raise OSError(
                f"another run (process {owner.get('pid')} on {owner.get('host')}) has taken over {self.folder}"
            )

    def _is_beginning_of_ours(self) -> bool:
        """Whether the file holds what a run leaves that died while writing it: the beginning of its text."""
        with contextlib.suppress(OSError, ValueError):
            text = self.file.read_text()
            return text.startswith('{"token"') or not text
        return True  # gone meanwhile

    def _write_owner(self) -> None:
        self._is_writing = True  # until it is whole: a signal may end the script at any line
        try:
            self._create()
        except FileExistsError:
            self._is_writing = False
            raise
        self._is_writing = False

    def _create(self) -> None:
        with self.file.open("x") as file:  # fails if it exists
            file.write(self._owner_text)

    def _was_cut_off(self) -> bool:
        """Whether the file is the beginning of ours, because a signal came while it was written."""
        try:
            return self._is_writing and self._owner_text.startswith(self.file.read_text())
        except OSError:
            return False

    def _owner(self) -> dict:
        with contextlib.suppress(OSError, ValueError):  # gone, or not yet written
            return json.loads(self.file.read_text())
        return {}

    def _beat(self) -> None:
        while not self._released.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def _take_over(self) -> bool:
        """Puts this owner in the place of a dead one; False if another run did so at the same time."""
        owner = self._owner()
        if not owner and not self._is_beginning_of_ours():
            raise UserError(
                f"--output_dir {self.folder}: the file {self.FILE} there was not written by a training run"
            )
        if self._is_alive(owner):
            raise UserError(
                f"--output_dir {self.folder}: another run works there (process {owner.get('pid')} on "
                f"{owner.get('host')}); wait for its end or choose another folder"
            )
        if self._owner() != owner:
            return False
        temporary = self.file.with_name(f"{self.FILE}-{self.token}")
        temporary.write_text(self._owner_text)
        temporary.replace(self.file)  # the file is never missing, so that nobody else takes the folder in between
        time.sleep(0.5)  # of several that came here at once, the last one wins
        if self._owner().get("token") != self.token:
            return False
        if "pid" in owner:
            place = f"process {owner['pid']} on {owner.get('host')}"
            logger.warning(f"{self.folder} is taken over from {place}, which is dead")
        return True

    def _is_alive(self, owner: dict) -> bool:
        if owner.get("machine") == _machine():
            try:
                process = psutil.Process(owner["pid"])
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False
                if abs(process.create_time() - owner["started"]) < 1:
                    return True
                # Another process has its number now, or the clock was set: its file will tell.
            except psutil.Error:
                return False
        logger.warning(f"{self.file} is of a run on {owner.get('host')}: watching for {self.patience} s if it lives")
        first = self._touched()
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.heartbeat / 2))
            now = self._touched()
            if now is None:
                return False
            if now != first:
                return True
        return False

    def _touched(self) -> int | None:
        try:
            with self.file.open() as file:  # opening makes a network file system look again
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None
