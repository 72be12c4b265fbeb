# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags of every script that runs a network: the device, and how precisely it computes.

Nothing slow is imported here.
"""

from dataclasses import dataclass

from diffit.command_line import flag


@dataclass(frozen=True)
class DeviceConfig:
    """The device, and the precision of float32 on it."""

    cpu: bool = flag(
        False,
        "compute on the CPU even if there is a GPU; without this flag, signs of a GPU that cannot be used are an "
        "error",
    )
    allow_tf32: bool = flag(
        False,
        "compute float32 matrix products and convolutions in TensorFloat-32 on NVIDIA GPUs of compute capability 8.0 "
        "and later: faster, with 10 instead of 23 bits of mantissa",
    )


@dataclass(frozen=True)
class PrecisionConfig(DeviceConfig):
    """The device, numeric precision and determinism of a training."""

    mixed_precision: str | None = flag(
        None,
        "autocast dtype of the forward pass; weights stay in fp32, and no means fp32 throughout (default: as in "
        "accelerate's config)",
        choices=("no", "fp16", "bf16"),
    )
    deterministic: bool = flag(
        False,
        "use only deterministic algorithms, which may be slower; on a GPU, only then does a resumed run match an "
        "uninterrupted one bit for bit",
    )
