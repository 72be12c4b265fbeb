# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags of validation and metrics during training. Nothing slow is imported here."""

from dataclasses import dataclass

from diffit.command_line import flag, nested, number_type, path_type, refuse_both
from diffit.sampling_config import GuidanceConfig

at_least_one = number_type(int, 1)


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out images, previews and the exported pipeline."""

    validation_split: str | None = flag(
        None, "split of --dataset_name used as held-out images (default: no held-out images)"
    )
    validation_fraction: float | None = flag(
        None,
        "fraction of the training images to hold out (default: no held-out images)",
        type=number_type(float, 0, 1, open_ends=True),
    )
    validation_steps: int = flag(
        1000,
        "optimizer steps between validations, which compute the held-out loss, sample a preview grid and export the "
        "pipeline",
        type=at_least_one,
    )
    validation_loss_images: int = flag(1024, "maximum number of images used for the held-out loss", type=at_least_one)
    num_validation_images: int = flag(64, "number of images in the preview grid", type=at_least_one)
    validation_inference_steps: int = flag(
        50,
        "sampling steps for previews and --eval_metrics, with DDIM (DPM-Solver++ for EDM, Euler for rectified flow)",
        type=at_least_one,
    )
    guidance: GuidanceConfig = nested(GuidanceConfig, "validation_guidance_")

    def __post_init__(self):
        refuse_both(self, "validation_split", "validation_fraction")


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics during training."""

    eval_steps: int | None = flag(
        None,
        "optimizer steps between computations of --eval_metrics for each EMA; the best pipeline so far is kept in "
        "best/ (default: no metrics)",
        type=at_least_one,
    )
    eval_num_images: int = flag(1000, "number of images to sample for --eval_metrics", type=number_type(int, 8))
    eval_metrics: tuple[str, ...] = flag(
        ("frechet_distance", "kernel_distance"),
        "metrics to compute; the first one selects the best EMA and the best step",
        nargs="+",
        choices=("frechet_distance", "kernel_distance", "precision", "recall"),
    )
    feature_extractor: str = flag("inception", "feature extractor for --eval_metrics (see eval_diffit.py)")
    feature_model: str | None = flag(
        None,
        "folder or hub name of the weights for --feature_extractor dinov2 or clip (default: none)",
        type=path_type,
    )
    inception_path: str | None = flag(
        None, "TorchScript file for --feature_extractor inception (default: downloaded)", type=path_type
    )
