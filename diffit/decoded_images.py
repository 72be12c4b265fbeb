# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Small data sets stay decoded in memory, which the workers and training processes of a machine share.

Whoever decodes an image first keeps it for all. Only what does not depend on random numbers is kept, so the images are
bitwise those that decoding again would give.
"""

import math
import mmap
import os
import secrets
import threading
import weakref
from pathlib import Path
from typing import Self

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object

logger = get_logger(__name__, log_level="INFO")

MEMORY_SHARE = 1 / 8  # of the memory available to the processes of a machine, which decoded images may take
TOKEN_BYTES = 16
KEPT = 1  # state of an image; 0 where memory has not been written


class DecodedImages:
    """uint8 images in memory without a name, which the kernel frees when the last of the processes ends.

    It is inherited by forked processes and pickled for others of this machine. Memory is taken as images are put in.
    (Not in `/dev/shm`, whose size containers limit, and where a killed run would leave files.)

    Args:
        num_images: number of images n.
        shape: of each image, (C, H, W).

    Raises:
        OSError: if the system cannot provide such memory.
    """

    def __init__(self, num_images: int, shape: tuple[int, int, int]):
        file = os.memfd_create("diffit-decoded-images")
        os.ftruncate(file, TOKEN_BYTES + num_images * (1 + math.prod(shape)))
        self._map(file, num_images, shape)
        self._memory[:TOKEN_BYTES] = token = secrets.token_bytes(TOKEN_BYTES)
        weakref.finalize(self, os.close, file)  # until then it stays open, because others find it by its number
        self.address = (f"/proc/{os.getpid()}/fd/{file}", token, num_images, shape)

    @classmethod
    def open(cls, address: tuple[str, bytes, int, tuple[int, int, int]]) -> Self:
        """Opens the images of another process, given its `address`.

        Raises:
            OSError: if they cannot be found, such as those of another machine.
        """
        path, token, num_images, shape = address
        images = cls.__new__(cls)
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(file, TOKEN_BYTES, 0) != token:  # on another machine the path may lead anywhere
                raise FileNotFoundError(f"{path} holds something else")
            images._map(file, num_images, shape)
        finally:
            os.close(file)
        images.address = address
        return images

    def _map(self, file: int, num_images: int, shape: tuple[int, int, int]) -> None:
        self._memory = mmap.mmap(file, TOKEN_BYTES + num_images * (1 + math.prod(shape)))
        self._states = np.frombuffer(self._memory, np.uint8, num_images, TOKEN_BYTES)
        self._pixels = np.frombuffer(self._memory, np.uint8, offset=TOKEN_BYTES + num_images)
        self._pixels = self._pixels.reshape(num_images, *shape)
        self._fence = threading.Lock()

    def __reduce__(self):
        return DecodedImages.open, (self.address,)

    def get(self, index: int) -> np.ndarray | None:
        """An image, shape (C, H, W), not to be written to; None if nobody has put it in."""
        with self._fence:  # a processor that reorders memory accesses must not read the pixels before the state
            state = self._states[index]
        return self._pixels[index] if state == KEPT else None

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keeps an image, shape (C, H, W). Several processes may do so at once, with the same pixels."""
        self._pixels[index] = pixels
        with self._fence:  # as in `get`
            pass
        with self._fence:
            self._states[index] = KEPT


def share_decoded_images(
    processes: PartialState, num_images: int, shape: tuple[int, int, int]
) -> DecodedImages | None:
    """Memory for decoded images that the training processes of each machine share. To be called by all processes.

    Args:
        processes: may be an `Accelerator`.
        num_images: number of images.
        shape: of each image, (C, H, W).

    Returns:
        None if the images take more than `MEMORY_SHARE` of the memory available, or memory cannot be shared; the log
        says why.
    """
    images, problem = None, None
    size, limit = num_images * math.prod(shape), MEMORY_SHARE * available_memory()
    if processes.is_local_main_process:
        if size > limit:
            problem = f"they would take {_gigabytes(size)} of memory, and at most {_gigabytes(limit)} are used for it"
        elif not hasattr(os, "memfd_create"):
            problem = "this operating system has no memory that processes share"
        else:
            try:
                images = DecodedImages(num_images, shape)
            except OSError as error:
                problem = f"memory cannot be shared: {error}"
    offers = gather_object([None if images is None else images.address])
    if not processes.is_local_main_process:
        addresses = [address for address in offers if address is not None]
        images = _open_first(addresses)
        if addresses and images is None:
            message = "images are decoded in each epoch: the memory of this machine's first process cannot be opened"
            logger.warning(message, main_process_only=False)
    elif problem is not None:
        logger.info(f"images are decoded in each epoch: {problem}")
    else:
        logger.info(
            f"decoded images are kept in memory unless their crops vary: up to {_gigabytes(size)} for "
            f"{num_images:,} images"
        )
    return images


def _open_first(addresses: list[tuple]) -> DecodedImages | None:
    """The first images that are on this machine, or None."""
    for address in addresses:
        try:
            return DecodedImages.open(address)
        except OSError:
            continue
    return None


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.0f} GB" if number >= 1e11 else f"{number / 1e9:.2g} GB"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that the processes of this machine can use: what is free, at most the limit of their cgroup.

    Args:
        root: of the file system with `proc` and `sys`; 0 bytes where there are none.
    """
    try:
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        available = next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, StopIteration):
        return 0
    for _, controllers, group in groups:  # version 2 has one hierarchy, without a name
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / group.lstrip("/")
        for place in (folder, *folder.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                limit = (place / name).read_text().strip() if (place / name).is_file() else "max"
                available = min(available, available if limit == "max" else int(limit))
            if place == top:
                break
    return available
