# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The settings of eval_diffit.py: flags, defaults, and every rule that needs neither images nor models.

The script parses its flags before its slow imports, so nothing slow is imported here.
"""

import argparse
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from diffit.command_line import (
    Parser,
    add_flags,
    flag,
    from_flags,
    nested,
    number_type,
    path_type,
    positive_int,
    resolution_type,
    to_flags,
)
from diffit.device_config import DeviceConfig
from diffit.errors import UserError, message_of
from diffit.sampling_config import MAX_IMAGES, SCHEDULERS, GuidanceConfig, SamplingConfig
from diffit.source_config import FolderConfig

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
EXTRACTORS = ("inception", "dinov2", "clip", "efficientnet_lite0")
DEFAULT_NUM_IMAGES = 50_000  # sampled from a model
SWEPT = ("guidance_scale", "weights", "num_inference_steps")  # flags that take several values


@dataclass(frozen=True)
class EvaluatedConfig:
    """The images to evaluate, or the models whose samples are evaluated.

    Raises:
        UserError: unless there is one of the two.
    """

    images: str | None = flag(
        None,
        "folder or zip of images, parquet file, hub dataset, or npz of the ADM evaluation suite (or --model_path)",
        type=path_type,
    )
    model_path: tuple[str, ...] | None = flag(
        None,
        "folder that training wrote, one of its checkpoint-N, or hub name (or --images); may be repeated",
        type=path_type,
        action="append",
    )
    all_checkpoints: bool = flag(False, "also evaluate every checkpoint-N in the folders of --model_path")
    weights: str | None = flag(
        None, "folder of the network in a checkpoint (default: its first average, e.g. unet_ema)"
    )
    class_labels: str = flag(
        "all",
        "classes that class-conditional models sample, taking turns: numbers or names, separated by commas, or all; "
        "reference = as frequent as in the reference",
    )
    num_images: int | None = flag(
        None,
        f"number of images (default: all of --images, {DEFAULT_NUM_IMAGES} of a model)",
        type=number_type(int, 1, MAX_IMAGES),
    )

    def __post_init__(self):
        if (self.images is None) == (self.model_path is None):
            raise UserError("give one of --images and --model_path")


@dataclass(frozen=True)
class ReferenceConfig(FolderConfig):
    """The real images, and how images are read."""

    reference: str = flag(
        None,
        "real images: folder, zip, parquet file, hub dataset or npz; or an npz of statistics with mu and sigma",
        type=path_type,
        required=True,
    )
    dataset_split: str = flag("train", "split of hub datasets")
    image_column: str | None = flag(None, "column of parquet files and datasets (default: the only one of images)")
    resolution: tuple[int, int] | None = flag(
        None,
        "side in pixels, or HxW, to which image files are cropped and resized as in training; arrays and samples of "
        "a model must have it (default: the size of the evaluated images, which must then be the same for all)",
        type=resolution_type,
    )


@dataclass(frozen=True)
class EvalMetricsConfig:
    """Metrics and the features that they compare.

    Raises:
        UserError: names the flag that another one does not go with.
    """

    metrics: tuple[str, ...] = flag(
        ("frechet_distance", "kernel_distance"), "metrics to compute", nargs="+", choices=METRICS
    )
    feature_extractor: str = flag(
        "inception",
        f"{', '.join(EXTRACTORS)}, or module:function, which maps uint8 images (B, 3, H, W) to features (B, F)",
    )
    feature_model: str | None = flag(
        None,
        "folder or hub name of the network for dinov2 and clip (default: facebook/dinov2-large, "
        "openai/clip-vit-large-patch14)",
        type=path_type,
    )
    inception_path: str | None = flag(
        None, "TorchScript file of the Inception network (default: it is downloaded)", type=path_type
    )
    num_subsets: int = flag(
        5, "disjoint subsets of the images, over which the standard deviation is taken", type=positive_int
    )

    def __post_init__(self):
        if "inception_score" in self.metrics and self.feature_extractor != "inception":
            raise UserError(
                f"--metrics inception_score needs --feature_extractor inception, got {self.feature_extractor}"
            )
        for name, extractors in (("feature_model", ("dinov2", "clip")), ("inception_path", ("inception",))):
            if getattr(self, name) is not None and self.feature_extractor not in extractors:
                raise UserError(
                    f"--{name} needs --feature_extractor {' or '.join(extractors)}, got {self.feature_extractor}"
                )
        if self.num_subsets < 2:
            raise UserError(f"--num_subsets must be at least 2 for a standard deviation, got {self.num_subsets}")


@dataclass(frozen=True)
class PlotsConfig:
    """Plots, and the sampling that is done for them alone.

    Raises:
        UserError: names the flag that has no effect without --plots.
    """

    plots: str | None = flag(
        None,
        "folder for plots; several models of a run give the metrics by images seen (default: none)",
        type=path_type,
    )
    plot_steps: tuple[int, ...] | None = flag(
        None, "also plot the metrics by sampling steps, at these numbers of steps", type=positive_int, nargs="+"
    )
    plot_schedulers: tuple[str, ...] | None = flag(
        None,
        "schedulers of --plot_steps (default: ddim dpmsolver++ unipc; for EDM all edm_*, for rectified flow all "
        "flow_*)",
        nargs="+",
        choices=SCHEDULERS,
    )
    training_images: str | None = flag(
        None, "images in which --plots looks for neighbors of the samples (default: --reference)", type=path_type
    )

    def __post_init__(self):
        if self.plots is None:
            for name in ("plot_steps", "training_images"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} needs --plots")
        if self.plot_schedulers is not None and self.plot_steps is None:
            raise UserError(f"--plot_schedulers {' '.join(self.plot_schedulers)} needs --plot_steps")


@dataclass(frozen=True)
class OutputConfig:
    """Where results and intermediate files go."""

    output: str | None = flag(None, "JSON file for the results (default: they are only printed)", type=path_type)
    work_dir: str = flag(
        "outputs/evaluation", "folder for samples, features and statistics, which are reused", type=path_type
    )
    batch_size: int = flag(64, "images per forward pass and process", type=positive_int)
    dataloader_num_workers: int | None = flag(
        None,
        "worker processes that decode images, per process; 0 decodes in the main process (default: the CPU cores of a "
        "process, at most 8)",
        type=number_type(int, 0),
    )


@dataclass(frozen=True)
class SweepPoint:
    """One combination of the values of flags that were given several.

    Attributes:
        settings: the values by flag.
        sampling: settings of the sampling, with these values.
        evaluated: models and weights, with these values.
    """

    settings: dict[str, Any]
    sampling: SamplingConfig
    evaluated: EvaluatedConfig


@dataclass(frozen=True)
class EvalConfig:
    """A request to eval_diffit.py.

    `sweep` has all combinations if flags of `SWEPT` were given several values; the other fields hold their last ones.

    Raises:
        UserError: names the flag that another one does not go with.
    """

    evaluated: EvaluatedConfig = nested(EvaluatedConfig)
    reference: ReferenceConfig = nested(ReferenceConfig)
    metrics: EvalMetricsConfig = nested(EvalMetricsConfig)
    sampling: SamplingConfig = nested(SamplingConfig)
    plots: PlotsConfig = nested(PlotsConfig)
    device: DeviceConfig = nested(DeviceConfig)
    output: OutputConfig = nested(OutputConfig)
    debug: bool = False
    sweep: tuple[SweepPoint, ...] = ()

    def __post_init__(self):
        if self.evaluated.model_path is None:
            of_models = {
                name: getattr(self.evaluated, name) for name in ("all_checkpoints", "weights", "class_labels")
            }
            of_models |= to_flags(self.sampling) | {"plot_steps": self.plots.plot_steps}
            defaults = to_flags(EvaluatedConfig(images="")) | to_flags(SamplingConfig())
            for name, value in of_models.items():
                if value != defaults.get(name):
                    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                    raise UserError(f"--{name} {shown} needs --model_path: --images are not sampled")


# Headings of the groups of `--help`, by the fields of `EvalConfig`.
TITLES = {
    "evaluated": "evaluated images, or models to sample from",
    "reference": "reference images",
    "metrics": "metrics",
    "sampling": "sampling from --model_path",
    "plots": "plots",
    "device": "device and precision",
    "output": "output and speed",
}


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags of eval_diffit.py."""
    parser = Parser(description)
    for field in dataclasses.fields(EvalConfig):
        if field.name in TITLES:
            add_flags(parser, field.type, TITLES[field.name], several=SWEPT)
    return parser


def parse_args(argv: list[str] | None = None, description: str | None = None) -> EvalConfig:
    """Reads the command line of eval_diffit.py.

    Args:
        argv: the flags; default: `sys.argv`.
        description: for `--help`.
    """
    parser = build_parser(description)
    try:
        return build_config(vars(parser.parse_args(argv)))
    except UserError as error:
        parser.error(message_of(error))


def build_config(values: dict[str, Any]) -> EvalConfig:
    """The config of parsed flags, with all combinations if some flags of `SWEPT` have several values.

    Raises:
        UserError: names the flag that has a value twice, or that another one does not go with.
    """
    lists = {name: values[name] for name in SWEPT if isinstance(values[name], list)}
    values = values | {"sweep": ()} | {name: listed[-1] for name, listed in lists.items()}
    swept = {name: listed for name, listed in lists.items() if len(listed) > 1}
    if not swept:
        return from_flags(EvalConfig, values)
    for name, listed in swept.items():
        if len(set(listed)) < len(listed):
            raise UserError(f"--{name} {' '.join(map(str, listed))} has a value twice")
    if values["plot_steps"] is not None:
        names = " and ".join(f"--{name}" for name in swept)
        raise UserError(f"--plot_steps {' '.join(map(str, values['plot_steps']))}: give only one value of {names}")
    points = []
    for combination in itertools.product(*swept.values()):
        settings = dict(zip(swept, combination, strict=True))
        # Without guidance, the other flags of guidance would be refused.
        unguided = to_flags(GuidanceConfig(), "guidance_") if settings.get("guidance_scale") == 1 else {}
        config = from_flags(EvalConfig, values | settings | unguided)
        points.append(SweepPoint(settings, config.sampling, config.evaluated))
    return dataclasses.replace(config, sweep=tuple(points))
