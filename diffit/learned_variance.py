# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The loss of DDPM's learned variance (improved DDPM, arXiv 2102.09672).

Shapes: B batch, C channels, H/W height/width (pixels or latents), T number of training timesteps.
"""

import functools
import math

import torch
from diffusers import DDPMScheduler


@functools.lru_cache(maxsize=2)
def bound_tables(noise_scheduler: DDPMScheduler, device: torch.device) -> torch.Tensor:
    """The constants of `variance_bound` at each timestep, computed in float64.

    Returns:
        Shape (3, T), float32. Row 0: the factor that turns an error of the noise into an error of the mean of x_{t-1}
        (DDPM, Eq. 11). Row 1: the log of the lowest variance that can be learned, that of q(x_{t-1} | x_t, x_0)
        (Eq. 7); it is 0 at t = 0, where that of t = 1 is used. Row 2: the log of the highest one, beta_t.
    """
    betas = noise_scheduler.betas.double()
    alphas_bar = torch.cumprod(1 - betas, 0)
    factor = betas / ((1 - alphas_bar) * (1 - betas)).sqrt()
    variance = betas[1:] * (1 - alphas_bar[:-1]) / (1 - alphas_bar[1:])
    variance = torch.cat([variance[:1], variance])
    return torch.stack([factor, variance.log(), betas.log()]).float().to(device)


def variance_bound(
    noise_error: torch.Tensor,
    variance: torch.Tensor,
    noise_scheduler: DDPMScheduler,
    clean_images: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The loss that trains the variance: the variational bound of each image at its timestep, in bits per dimension.

    See arXiv 2102.09672, Eq. 4-6 and 15. For t > 0 it is the KL divergence of q(x_{t-1} | x_t, x_0) from the network's
    Gaussian; for t = 0 the negative log-likelihood of the image, discretized into bins that extend 1 / 255 to both
    sides of each value, and to infinity at -1 and 1.

    Args:
        noise_error: predicted minus true noise, detached, so that the bound trains only the variance; shape
            (B, C, H, W).
        variance: the network's output, which interpolates the log-variance from that of q at -1 to beta_t at 1; shape
            (B, C, H, W).
        noise_scheduler: the forward process.
        clean_images: images in [-1, 1] or latents; shape (B, C, H, W).
        timesteps: int in [0, number of training timesteps); shape (B).

    Returns:
        Shape (B), float32.
    """
    tables = bound_tables(noise_scheduler, timesteps.device)[:, timesteps, None, None, None]  # (3, B, 1, 1, 1)
    factor, lowest, highest = tables  # 3 x (B, 1, 1, 1)
    error = factor * noise_error.float()  # error of the mean, which is the image at t = 0; (B, C, H, W)
    fraction = (variance.float() + 1) / 2
    log_variance = fraction * highest + (1 - fraction) * lowest  # (B, C, H, W)

    spread = lowest - log_variance
    divergence = 0.5 * (spread.exp() - spread - 1 + error.square() * torch.exp(-log_variance))  # (B, C, H, W)
    inverse_deviation = torch.exp(-0.5 * log_variance)
    above = torch.special.ndtr((error + 1 / 255) * inverse_deviation).where(clean_images < 0.999, 1)
    below = torch.special.ndtr((error - 1 / 255) * inverse_deviation).where(clean_images > -0.999, 0)
    surprise = -(above - below).clamp(min=1e-12).log()  # (B, C, H, W)

    nats = torch.where(timesteps[:, None, None, None] == 0, surprise, divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)
