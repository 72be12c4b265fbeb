# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The loss of a batch, which training, validation, evaluation and benchmarks share.

Shapes: B batch, C channels, H/W height/width (pixels or latents).
"""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from diffit.formulations import Formulation


@dataclass
class NoisyBatch:
    """A micro-batch on the device, ready for the network.

    Attributes:
        network_inputs: the network's `sample` and `timestep` (see `Formulation.network_inputs`).
        clean_images: images in [-1, 1] or latents; shape (B, C, H, W).
        noise: standard normal; shape (B, C, H, W).
        levels: see `Formulation.noise_levels`; shape (B).
        conditions: the network's keyword arguments: `class_labels`, shape (B), or None for an unconditional network;
            and, where images were augmented, `augment_labels`, shape (B, 9).
        level_bins: quartile of each noise level, int in [0, LEVEL_BINS), shape (B); None in an evaluation.
        first_position: the batch's first position in the data stream; None in an evaluation.
    """

    network_inputs: tuple[torch.Tensor, torch.Tensor]
    clean_images: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    conditions: dict[str, torch.Tensor | None]
    level_bins: torch.Tensor | None = None
    first_position: int | None = None


def denoising_losses(model: ModelMixin, formulation: Formulation, batch: NoisyBatch) -> torch.Tensor:
    """Runs the network and returns the loss of each image; shape (B), float32.

    Training, validation, evaluation and benchmarks all call this function.
    """
    model_pred = model(*batch.network_inputs, **batch.conditions).sample
    return formulation.losses(model_pred, batch.clean_images, batch.noise, batch.levels)


def nan_if_non_finite(losses: torch.Tensor) -> torch.Tensor:
    """Turns a non-finite loss into NaN gradients, so that after the all-reduce every process skips the step.

    Finite losses are unchanged. Shape (B) to shape (B).
    """
    values = losses.detach()
    return losses * (1 + (values - values))  # a difference of 0, or NaN
