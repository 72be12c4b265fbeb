# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What may be asked of a sampling, whichever script does it."""

import argparse
import math


def check_sampling_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, can_guide: bool) -> None:
    """Refuses values out of range, and flags that would do nothing.

    Args:
        parser: knows the defaults; ends the script with a message.
        args: as parsed.
        can_guide: whether there is something to guide by, such as classes.
    """
    if not 0 <= args.eta <= 1:
        parser.error(f"--eta must be in [0, 1], got {args.eta}")
    if args.eta > 0 and args.scheduler not in (None, "ddim"):
        parser.error(f"--eta is of --scheduler ddim, got {args.scheduler}")
    if not 0 <= args.guidance_scale < math.inf:
        parser.error(f"--guidance_scale must be a number from 0 up, got {args.guidance_scale}")
    if args.guidance_scale != 1 and not can_guide:
        parser.error("--guidance_scale needs --class_labels or --guidance_model")
    if args.guidance_scale == 1:
        for name in ("guidance_schedule", "guidance_interval", "guidance_channels", "guidance_model"):
            if getattr(args, name, None) != parser.get_default(name):
                parser.error(f"--{name} needs a --guidance_scale other than 1, which is off")
    if not 0 < args.guidance_power < math.inf:
        parser.error(f"--guidance_power must be a number above 0, got {args.guidance_power}")
    if args.guidance_power != parser.get_default("guidance_power") and args.guidance_schedule != "power_cosine":
        parser.error(f"--guidance_power is of --guidance_schedule power_cosine, got {args.guidance_schedule}")
    low, high = args.guidance_interval
    if not 0 <= low < high <= 1:
        parser.error(f"--guidance_interval must be 0 <= LOW < HIGH <= 1, got {low} {high}")
