# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Non-leaking augmentation: geometric transforms of training images, with labels that describe them to the network.

Conditioned on the labels, the network learns from transformed images, yet generates untransformed ones when the labels
are zero. The transforms, their strengths and their labels are those of EDM (arXiv 2206.00364, appendix F.2), which
DiffiT follows; the resampling is ours. This file needs only numpy and torch.

Shapes: B images, C channels, H/W height/width in pixels, K = `NUM_AUGMENT_NUMBERS`, A = `NUM_AUGMENT_LABELS`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

NUM_AUGMENT_NUMBERS = 12
NUM_AUGMENT_LABELS = 9
SUPERSAMPLING = 2  # samples per output pixel along each axis


def sample_augmentation(rng: np.random.Generator) -> np.ndarray:
    """Samples the random numbers for the augmentation of one image, always the same count.

    Args:
        rng: generator of the image's position in the stream, so that the transforms depend on the position alone.

    Returns:
        float32 of shape (K,): first 8 uniform in [0, 1), then 4 standard normal.
    """
    return np.concatenate([rng.random(8, dtype=np.float32), rng.standard_normal(4, dtype=np.float32)])


def augment(images: torch.Tensor, numbers: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Transforms each image according to its random numbers.

    The transforms, in this order and with angles measured clockwise: a horizontal flip of half of the images (at any
    probability above 0), a vertical flip at half the given probability, isotropic scaling by 2^(0.2 n1), rotation by
    an angle in [-pi, pi), anisotropic scaling by 2^(0.2 n2) along an axis at a random angle and by the inverse across
    it, and translation by n3 / 8 of the width and n4 / 8 of the height; n1 to n4 are standard normal. Pixels from
    outside the image are filled by reflection. Apart from flips, images are interpolated, anti-aliased and clipped.

    Args:
        images: in [-1, 1], float32, shape (B, C, H, W); not modified.
        numbers: from `sample_augmentation`, float32 on the same device, shape (B, K).
        probability: of each transform except the horizontal flip, independently, in [0, 1]; 0 disables all of them.

    Returns:
        Images in the shape of `images`, bitwise unchanged where no transform applied; and labels, float32 of shape
        (B, A), zero for transforms that did not apply: x-flip 0 or 1, y-flip 0 or 1, n1, rotation (cos - 1, sin),
        n2 * (cos, sin) of the axis, n3, n4.

    Raises:
        ValueError: if the probability is out of range, or `numbers` has another shape.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    batch = images.shape[0]
    if numbers.shape != (batch, NUM_AUGMENT_NUMBERS):
        raise ValueError(f"numbers must have the shape {(batch, NUM_AUGMENT_NUMBERS)}, got {tuple(numbers.shape)}")

    # 1. transforms of each image, all of shape (B); nothing is read back from the device
    x_flip, y_flip, _, _, angle, _, axis, _ = numbers[:, :8].unbind(1)
    _, _, scaled, rotated, _, squeezed, _, moved = (numbers[:, :8] < probability).unbind(1)
    log_scale, log_stretch, right, down = numbers[:, 8:].unbind(1)
    x_flip = x_flip < (0.5 if probability > 0 else 0.0)
    y_flip = y_flip < probability / 2
    angle, axis = (math.pi * (2 * uniform - 1) for uniform in (angle, axis))
    angle, log_scale, log_stretch = angle * rotated, log_scale * scaled, log_stretch * squeezed
    right, down = right * moved, down * moved
    labels = torch.stack(
        [
            *(x_flip, y_flip, log_scale),
            *(angle.cos() - 1, angle.sin()),
            *(log_stretch * axis.cos(), log_stretch * axis.sin()),
            *(right, down),
        ],
        dim=1,
    )  # (B, A)

    # 2. flips, exact
    images = torch.where(x_flip[:, None, None, None], images.flip(-1), images)
    images = torch.where(y_flip[:, None, None, None], images.flip(-2), images)

    # 3. the other transforms, in one resampling
    warped = _warp(images, angle, axis, log_scale, log_stretch, right, down)
    is_warped = scaled | rotated | squeezed | moved
    return torch.where(is_warped[:, None, None, None], warped, images), labels


def _warp(
    images: torch.Tensor,
    angle: torch.Tensor,
    axis: torch.Tensor,
    log_scale: torch.Tensor,
    log_stretch: torch.Tensor,
    right: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Scales, rotates, stretches and translates images of shape (B, C, H, W); the other arguments have shape (B)."""
    height, width = images.shape[-2:]
    # Inverted: from points of the new image to points of the old, in pixels from the center. Without matrix products,
    # because autocast and TF32 would lower their precision.
    angle, axis, log_scale, log_stretch, right, down = (
        number[:, None, None] for number in (angle, axis, log_scale, log_stretch, right, down)
    )  # (B, 1, 1)
    x, y = (
        (torch.arange(SUPERSAMPLING * size, device=images.device) + 0.5) / SUPERSAMPLING - size / 2
        for size in (width, height)
    )  # (2W), (2H)
    x, y = x - right * width / 8, y[:, None] - down * height / 8  # (B, 1, 2W), (B, 2H, 1)
    x, y = _rotate(x, y, -axis)  # (B, 2H, 2W) each
    x, y = x * 2 ** (-0.2 * log_stretch), y * 2 ** (0.2 * log_stretch)
    x, y = _rotate(x, y, axis - angle)
    scale = 2 ** (-0.2 * log_scale)
    x, y = x * scale, y * scale
    grid = torch.stack([2 * x / width, 2 * y / height], dim=-1)  # (B, 2H, 2W, 2), -1 to 1 from edge to edge
    warped = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(warped, SUPERSAMPLING).clamp(-1, 1)  # (B, C, H, W)


def _rotate(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates points by angles from the x axis towards the y axis; the shapes broadcast."""
    cos, sin = angle.cos(), angle.sin()
    return cos * x - sin * y, sin * x + cos * y
