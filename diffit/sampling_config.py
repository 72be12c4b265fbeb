# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Settings of sampling, and their rules. Imports nothing slow, so that scripts can refuse a wrong flag at once."""

import math
from dataclasses import dataclass

from diffit.command_line import flag, path_type
from diffit.errors import UserError

GUIDANCE_SCHEDULES = ("constant", "power_cosine")  # as in diffit_pipeline, which is slow to import


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance by class (classifier-free) or by a weaker model (autoguidance, arXiv 2406.02507).

    Its flags have a prefix: `guidance_` when sampling and evaluating, `validation_guidance_` in training.

    Raises:
        UserError: names the flag whose value is out of range or would have no effect.
    """

    scale: float = flag(1.0, "guidance scale; 1 = off, one forward pass per step", type=float)
    schedule: str = flag(
        "constant",
        "dependence of the scale on the timestep; power_cosine rises from 1 at pure noise to the scale at the image",
        choices=GUIDANCE_SCHEDULES,
    )
    power: float = flag(4.0, "exponent of the power_cosine schedule", type=float)
    interval: tuple[float, float] = flag(
        (0.0, 1.0),
        "guide only these timesteps: fractions of the training timesteps (for EDM models, of the path of sigmas that "
        "sampling takes), where 0 is the image and 1 is pure noise",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    channels: int | None = flag(
        None, "apply guidance to the first N channels only (default: all channels)", type=int, metavar="N"
    )
    model: str | None = flag(
        None,
        "pipeline folder or hub name of a weaker model: autoguidance instead of classifier-free guidance "
        "(default: classifier-free guidance)",
        type=path_type,
    )

    def __post_init__(self):
        if not 0 <= self.scale < math.inf:
            raise UserError(f"--scale must be a finite number of at least 0, got {self.scale}")
        if self.schedule not in GUIDANCE_SCHEDULES:
            raise UserError(f"--schedule must be one of {', '.join(GUIDANCE_SCHEDULES)}, got {self.schedule!r}")
        if not 0 < self.power < math.inf:
            raise UserError(f"--power must be a finite number above 0, got {self.power}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise UserError(f"--interval must be 0 <= LOW < HIGH <= 1, got {low} {high}")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"--channels must be at least 1, got {self.channels}")
        if self.scale == 1:
            for name in ("schedule", "interval", "channels", "model"):
                if getattr(self, name) != getattr(GuidanceConfig, name):  # the class has the defaults
                    raise UserError(f"--{name} has no effect while --scale is 1 (guidance is off)")
        if self.power != GuidanceConfig.power and self.schedule != "power_cosine":
            raise UserError(f"--power {self.power} has no effect without --schedule power_cosine, got {self.schedule}")
