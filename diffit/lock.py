# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""A lock that lets only one run at a time use an output folder."""

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
    """Identifies this machine and boot, and the container, whose process ids mean nothing outside it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


class OutputDirLock:
    """Lets only one run at a time own a folder: the owner writes a file `.running` into it and keeps refreshing it.

    It needs no file locks, which many shared file systems lack. An owner on this machine is alive if its process is.
    An owner on another machine is watched for a while for a refresh, which needs no common clock. `filelock` has a
    similar lease; `benchmarks/LOG.md` says why it does not do here.

    Args:
        folder: created if it does not exist.
        heartbeat: seconds between two refreshes.
        patience: seconds without a refresh after which an owner on another machine counts as dead.
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
        """Takes the folder and returns the token that identifies this owner.

        Raises:
            UserError: names --output_dir, if another run owns the folder, or it cannot be created or written to.
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
            except OSError as error:
                raise UserError(f"--output_dir {self.folder} cannot be written to: {error.strerror}") from error
        threading.Thread(target=self._beat, daemon=True).start()
        return self.token

    def __exit__(self, *exception) -> None:
        """Releases the folder if this run still owns it, and removes the folder if it is empty."""
        self._released.set()
        if self._owner().get("token") == self.token or self._was_cut_off():
            with contextlib.suppress(OSError):
                self.file.unlink()
                self.folder.rmdir()

    def check_visible(self, token: str, patience: float = 30) -> None:
        """Checks that this process sees the folder that the main process has locked. To be called on every process.

        Args:
            token: the token that the main process got.
            patience: seconds that a shared file system may take to show a new file.

        Raises:
            UserError: names --output_dir and the machine, if this process sees another folder.
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
                os.listdir(self.folder)  # makes a network file system refresh its cache

    def check_owned(self) -> None:
        """Checks that this run still owns the folder. To be called on the main process before it writes a checkpoint.

        Raises:
            OSError: if another run has taken the folder over, as it may if this process was suspended for long.
        """
        try:
            owner = json.loads(self.file.read_text())
        except FileNotFoundError:
            logger.warning(f"{self.file} was deleted: writing it again")
            self._write_owner()
            return
        except ValueError:
            owner = {}
        if owner.get("token") != self.token:
            raise OSError(
                f"another run (process {owner.get('pid')} on {owner.get('host')}) has taken over {self.folder}"
            )

    def _is_beginning_of_ours(self) -> bool:
        """Whether the file holds the beginning of an owner's record, as a run leaves it that dies while writing it."""
        with contextlib.suppress(OSError, ValueError):
            text = self.file.read_text()
            return text.startswith('{"token"') or not text
        return True  # deleted in the meantime

    def _write_owner(self) -> None:
        self._is_writing = True  # until the file is complete: a signal may end the script at any line
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
        """Whether a signal interrupted the writing of our own file, so that it holds only the beginning."""
        try:
            return self._is_writing and self._owner_text.startswith(self.file.read_text())
        except OSError:
            return False

    def _owner(self) -> dict:
        with contextlib.suppress(OSError, ValueError):  # deleted, or not completely written yet
            return json.loads(self.file.read_text())
        return {}

    def _beat(self) -> None:
        while not self._released.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def _take_over(self) -> bool:
        """Replaces a dead owner by this one. Returns False if another run was faster.

        Raises:
            UserError: if the owner is alive, or the file is not ours.
        """
        owner = self._owner()
        if not owner and not self._is_beginning_of_ours():
            raise UserError(
                f"--output_dir {self.folder} holds a file {self.FILE} that was not written by this project; move it "
                "away, or choose another folder"
            )
        if self._is_alive(owner):
            raise UserError(
                f"--output_dir {self.folder} is in use by another run (process {owner.get('pid')} on "
                f"{owner.get('host')}); wait for it to end, or choose another folder"
            )
        if self._owner() != owner:
            return False
        temporary = self.file.with_name(f"{self.FILE}-{self.token}")
        temporary.write_text(self._owner_text)
        temporary.replace(self.file)  # atomic: were the file missing for a moment, a third run could take the folder
        time.sleep(0.5)  # if several runs get here at once, the last one wins
        if self._owner().get("token") != self.token:
            return False
        if "pid" in owner:
            logger.warning(
                f"took over {self.folder}: its owner, process {owner['pid']} on {owner.get('host')}, is dead"
            )
        return True

    def _is_alive(self, owner: dict) -> bool:
        if owner.get("machine") == _machine():
            try:
                process = psutil.Process(owner["pid"])
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False
                if abs(process.create_time() - owner["started"]) < 1:
                    return True
                # Either another process has that id now, or the clock was set. Only the file can tell.
            except psutil.Error:
                return False
        logger.warning(
            f"{self.file} belongs to a run on {owner.get('host')}: waiting {self.patience} s for a sign of life"
        )
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
            with self.file.open() as file:  # opening makes a network file system refresh its cache
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None
