# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The settings of sampling and of sample_diffit.py: flags, defaults, and every rule that needs no model.

Scripts parse their flags before their slow imports, so nothing slow is imported here: the names that belong to
`diffit_pipeline` and `diffit.sampling` are repeated, and a test compares them.
"""

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from diffit.command_line import (
    Parser,
    add_flags,
    flag,
    nested,
    parse_config,
    path_type,
    positive_int,
    to_flags,
)
from diffit.device_config import DeviceConfig
from diffit.errors import UserError

SCHEDULERS = (
    *("ddim", "ddpm", "deis", "dpmsolver++", "dpmsolver++_singlestep", "edm_dpmsolver++", "edm_euler", "edm_heun"),
    *("euler", "euler_ancestral", "flow_euler", "flow_heun", "heun", "kdpm2", "unipc"),
)
DTYPES = ("bf16", "fp16", "fp32")
ATTENTION_BACKENDS = ("auto", "native", "_native_math", "xformers", "flex")
GUIDANCE_SCHEDULES = ("constant", "power_cosine")
MAX_IMAGES = 10_000_000  # of one request: lists of more take gigabytes of memory before anything is sampled


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
        "sampling takes; for rectified flow, of noise), where 0 is the image and 1 is pure noise",
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


@dataclass(frozen=True)
class SamplingConfig:
    """All that an image depends on besides weights, seed, class and batch size.

    Raises:
        UserError: names the flag whose value is out of range or would have no effect.
    """

    scheduler: str | None = flag(
        None,
        "sampler; edm_* for EDM models, flow_* for rectified flow, the others for DDPM (default: ddim, edm_heun or "
        "flow_heun)",
        choices=SCHEDULERS,
    )
    num_inference_steps: int = flag(50, "sampling steps", type=positive_int)
    eta: float = flag(
        0.0, "stochasticity of ddim: 0 = deterministic, 1 = as much noise in each step as ddpm adds", type=float
    )
    s_churn: float = flag(
        0.0, "stochasticity of edm_heun: noise added over all steps (EDM, Algorithm 2); 0 = deterministic", type=float
    )
    s_tmin: float = flag(0.0, "lowest sigma at which --s_churn adds noise", type=float)
    s_tmax: float | None = flag(None, "highest sigma at which --s_churn adds noise (default: no limit)", type=float)
    s_noise: float = flag(1.0, "standard deviation of the noise that --s_churn adds", type=float)
    guidance: GuidanceConfig = nested(GuidanceConfig, "guidance_")
    vae: str | None = flag(
        None,
        "folder or hub name of the autoencoder that decodes a latent-space model (default: vae/ of the model)",
        type=path_type,
    )
    dtype: str = flag("fp32", "dtype of the denoising network; the VAE stays in fp32", choices=DTYPES)
    attention_backend: str = flag(
        "auto",
        "attention kernels; auto = native, PyTorch's SDPA",
        choices=ATTENTION_BACKENDS,
    )

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta must be in [0, 1], got {self.eta}")
        if self.eta > 0 and self.scheduler not in (None, "ddim"):
            raise UserError(f"--eta {self.eta} needs --scheduler ddim, got {self.scheduler}")
        if not 0 <= self.s_churn < math.inf:
            raise UserError(f"--s_churn must be a finite number of at least 0, got {self.s_churn}")
        if self.s_churn > 0 and self.scheduler not in (None, "edm_heun"):
            raise UserError(f"--s_churn {self.s_churn} needs --scheduler edm_heun, got {self.scheduler}")
        if self.s_churn == 0:
            for name in ("s_tmin", "s_tmax", "s_noise"):
                if getattr(self, name) != getattr(SamplingConfig, name):  # the class has the defaults
                    raise UserError(f"--{name} has no effect while --s_churn is 0")
        if not 0 <= self.s_tmin < (math.inf if self.s_tmax is None else self.s_tmax):
            raise UserError(f"--s_tmin must be at least 0 and below --s_tmax, got {self.s_tmin} and {self.s_tmax}")
        if not 0 < self.s_noise < math.inf:
            raise UserError(f"--s_noise must be a finite number above 0, got {self.s_noise}")

    def with_scheduler(self, scheduler: str, num_inference_steps: int) -> "SamplingConfig":
        """The same settings with another scheduler, without the stochasticity that only the present one has."""
        changes = {} if scheduler == "ddim" else {"eta": 0.0}
        if scheduler != "edm_heun":
            changes |= {name: getattr(SamplingConfig, name) for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
        return dataclasses.replace(self, scheduler=scheduler, num_inference_steps=num_inference_steps, **changes)

    def image_settings(self) -> dict[str, Any]:
        """The settings that change images, by flag; without paths of models, which digests identify better."""
        values = to_flags(self)
        return {key: values[key] for key in values if key not in ("guidance_model", "vae", "attention_backend")}


# ---------------------------------------------------------------------------------------------------------------------
# sample_diffit.py


def seed_list(text: str) -> list[int]:
    """An argparse type: seeds from numbers and ranges; `0-63,100` is 0, 1, ..., 63, 100."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= 2**64:
            raise argparse.ArgumentTypeError(f"expected numbers and ranges such as 0-63,100, got {part!r}")
        if len(seeds) + last - first >= MAX_IMAGES:
            raise argparse.ArgumentTypeError(
                f"more than {MAX_IMAGES:,} seeds in {text!r}: sample them in several runs"
            )
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def grid_size(text: str) -> tuple[int, int]:
    """An argparse type: columns and rows from `8x8`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected COLUMNSxROWS such as 8x8, got {text!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class SampleConfig:
    """A request to sample_diffit.py.

    Raises:
        UserError: names the flag that lacks another one.
    """

    model_path: str = flag(
        None, "folder that training wrote, one of its checkpoint-N, or hub name", type=path_type, required=True
    )
    output_dir: str = flag(None, "folder for the images", type=path_type, required=True)
    overwrite_output_dir: bool = flag(
        False, "delete the files of an earlier sampling in --output_dir; other files stay untouched"
    )
    seeds: tuple[int, ...] | None = flag(
        None, "one seed per image, such as 0-63,100 (default: 0-63, or as many as --num_images_per_class needs)",
        type=seed_list,
    )  # fmt: skip
    class_labels: str | None = flag(
        None, "class numbers or names, separated by commas; all = every class (default: no class)"
    )
    num_images_per_class: int | None = flag(
        None,
        "images per class, each with its own seed (default: one image per seed, with the classes taking turns)",
        type=positive_int,
    )
    sampling: SamplingConfig = nested(SamplingConfig)
    device: DeviceConfig = nested(DeviceConfig)
    batch_size: int = flag(64, "images per forward pass and process", type=positive_int)
    grid: tuple[int, int] | None = flag(
        None, "COLUMNSxROWS of grid.png (default: as square as possible, or a row per class)", type=grid_size
    )
    save_npz: bool = flag(False, "also write samples.npz, the format of the ADM evaluation suite")
    debug: bool = False

    def __post_init__(self):
        if self.class_labels is None and self.num_images_per_class is not None:
            raise UserError(f"--num_images_per_class {self.num_images_per_class} needs --class_labels")
        guidance = self.sampling.guidance
        if guidance.scale != 1 and self.class_labels is None and guidance.model is None:
            raise UserError(f"--guidance_scale {guidance.scale} needs --class_labels or --guidance_model")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags of sample_diffit.py."""
    parser = Parser(description)
    add_flags(parser, SampleConfig)
    return parser


def parse_args(argv: list[str] | None = None, description: str | None = None) -> SampleConfig:
    """Reads the command line of sample_diffit.py.

    Args:
        argv: the flags; default: `sys.argv`.
        description: for `--help`.
    """
    return parse_config(build_parser(description), SampleConfig, argv)
