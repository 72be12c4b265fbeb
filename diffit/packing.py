# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches that lie in one block of memory, from the worker to the device.

A data loader hands over each tensor of a batch separately: a file descriptor from worker to trainer, a copy into
pinned memory and a copy to the device. Here all of them are views of one tensor, so each hand-over happens once.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch.utils.data import get_worker_info

ALIGNMENT = 256  # bytes, as in CUDA's own allocations, so that kernels find each tensor aligned

# int64 or float32 numbers that the training process computes on the host, one an image: room for them makes them part
# of the copy to the device.
HOST_NUMBERS = ("levels", "level_bins", "labels")


@dataclass(frozen=True)
class Batch:
    """The tensors of a micro-batch, as views of one tensor.

    Attributes:
        data: the bytes of all tensors; uint8, one dimension.
        sections: dtype, shape and offset in bytes of each tensor. The dtype is None for those of `HOST_NUMBERS` that
            have not been filled in.
        bad_images: messages about images that were skipped.
    """

    data: torch.Tensor
    sections: dict[str, tuple[torch.dtype | None, tuple[int, ...], int]]
    bad_images: list[str]

    @classmethod
    def allocate(cls, contents: dict[str, tuple[torch.dtype, tuple[int, ...]]], bad_images: list[str]) -> Self:
        """An uninitialized batch: in memory shared with the training process if this is a data-loader worker.

        Args:
            contents: dtype and shape of each tensor; the first dimension is the number of images.
            bad_images: messages about images that were skipped.
        """
        num_images = next(iter(contents.values()))[1][0]
        room = {name: (None, (num_images,)) for name in HOST_NUMBERS}
        sections, end = {}, 0
        for name, (dtype, shape) in (contents | room).items():
            sections[name] = (dtype, shape, end)
            end += -(-math.prod(shape) * (8 if dtype is None else dtype.itemsize) // ALIGNMENT) * ALIGNMENT
        if get_worker_info() is None:
            return cls(torch.empty(end, dtype=torch.uint8), sections, bad_images)
        # As torch's `default_collate` does: a tensor in ordinary memory would be copied to hand it over.
        shared = torch.UntypedStorage._new_shared(end, device="cpu")
        return cls(torch.empty(0, dtype=torch.uint8).set_(shared), sections, bad_images)

    @classmethod
    def pack(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """A batch of copies of these tensors, whose first dimension is the number of images."""
        batch = cls.allocate({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, [])
        for name, tensor in tensors.items():
            batch[name].copy_(tensor)
        return batch

    def __contains__(self, name: str) -> bool:
        return name in self.sections and self.sections[name][0] is not None

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape, offset = self.sections[name]
        return self.data[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: self[name] for name in self.sections if name in self}

    def fill(self, **numbers: torch.Tensor) -> Self:
        """Writes numbers computed on the host into the memory of this batch.

        Args:
            numbers: some of `HOST_NUMBERS`; shape (B), at most 8 bytes each.

        Returns:
            The batch with these tensors.
        """
        sections = dict(self.sections)
        for name, tensor in numbers.items():
            sections[name] = (tensor.dtype, *sections[name][1:])
        filled = replace(self, sections=sections)
        for name, tensor in numbers.items():
            filled[name].copy_(tensor)
        return filled

    def pin_memory(self) -> Self:
        """The batch in pinned memory; the data loader calls this."""
        return replace(self, data=self.data.pin_memory())

    def to(self, device: torch.device) -> Self:
        """The batch on a device, by one copy for which the host does not wait."""
        return replace(self, data=self.data.to(device, non_blocking=True))
