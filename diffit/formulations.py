# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The two formulations of training: how much noise, what the network is shown, and the loss of what it makes of it.

The noise scheduler says which one: a `DDPMScheduler` means DDPM (arXiv 2006.11239), with discrete timesteps; an
`EDMEulerScheduler` means EDM (arXiv 2206.00364), with continuous noise levels sigma. All functions are pure.

Shapes: B batch, C channels, H/W height/width of images or latents, T number of training timesteps.
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr

NoiseScheduler = DDPMScheduler | EDMEulerScheduler


def build_noise_levels(
    uniform: torch.Tensor, noise_scheduler: NoiseScheduler, sigma_mean: float = -1.2, sigma_std: float = 1.2
) -> torch.Tensor:
    """How much noise each image gets, as a function of one random number.

    Args:
        uniform: in [0, 1); shape (B).
        noise_scheduler: of DDPM or EDM.
        sigma_mean: of ln sigma, which is normally distributed (EDM, Table 1).
        sigma_std: of ln sigma.

    Returns:
        Shape (B): timesteps, int in [0, T), for DDPM; sigma, float32, for EDM.
    """
    if isinstance(noise_scheduler, EDMEulerScheduler):
        normal = torch.special.ndtri((uniform.double() + 2**-25).clamp(max=1 - 2**-25))  # the numbers are 24 bits long
        return torch.exp(sigma_mean + sigma_std * normal).float()
    return (uniform.double() * noise_scheduler.config.num_train_timesteps).long()


def build_network_inputs(
    clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, noise_scheduler: NoiseScheduler
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the noise and brings the result to the scale that the network sees.

    Args:
        clean_images: images in [-1, 1] or latents; shape (B, C, H, W).
        noise: standard normal; shape (B, C, H, W).
        levels: see `build_noise_levels`; shape (B).
        noise_scheduler: of DDPM or EDM.

    Returns:
        Noisy images of about unit variance, shape (B, C, H, W), and the `timestep` of the network, shape (B): for EDM
        c_in * (image + sigma * noise) and c_noise = ln(sigma) / 4.
    """
    if isinstance(noise_scheduler, EDMEulerScheduler):
        sigma = levels[:, None, None, None]  # (B, 1, 1, 1)
        noisy_images = noise_scheduler.precondition_inputs(clean_images + sigma * noise, sigma)
        return noisy_images, noise_scheduler.precondition_noise(levels)
    return noise_scheduler.add_noise(clean_images, noise, levels), levels


def compute_loss(
    model_pred: torch.Tensor,
    noise_scheduler: NoiseScheduler,
    clean_images: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Loss of each image in the scheduler's formulation: `ddpm_loss` or `edm_loss`; shape (B), float32."""
    if isinstance(noise_scheduler, EDMEulerScheduler):
        return edm_loss(model_pred, noise_scheduler, clean_images, noise, levels)
    return ddpm_loss(model_pred, noise_scheduler, clean_images, noise, levels, snr_gamma)


def edm_loss(
    model_pred: torch.Tensor,
    noise_scheduler: EDMEulerScheduler,
    clean_images: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """EDM loss of each image: weight(sigma) * (D - image)^2 with D = c_skip * noisy + c_out * F (EDM, Eq. 7-8).

    Args:
        model_pred: F, what the network made of its inputs; shape (B, C, H, W).
        noise_scheduler: its `sigma_data` is the standard deviation of the images, 0.5 in EDM.
        clean_images: in [-1, 1]; shape (B, C, H, W).
        noise: standard normal; shape (B, C, H, W).
        sigma: standard deviation of the noise; shape (B).

    Returns:
        Shape (B), float32.
    """
    sigma_data = noise_scheduler.config.sigma_data
    sigma = sigma[:, None, None, None]  # (B, 1, 1, 1)
    denoised = noise_scheduler.precondition_outputs(clean_images + sigma * noise, model_pred.float(), sigma)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # (B, 1, 1, 1)
    return (weight * (denoised - clean_images).square()).mean(dim=(1, 2, 3))


def ddpm_loss(
    model_pred: torch.Tensor,
    noise_scheduler: DDPMScheduler,
    clean_images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """DDPM loss of each image (DDPM, Eq. 14), with min-SNR weights if asked for (arXiv 2303.09556).

    A network that learns the variance, beside epsilon, also has the variational bound in its loss.

    Args:
        model_pred: what the network made of the noisy images; shape (B, C, H, W), or (B, 2C, H, W) with a learned
            variance as the second half of the channels.
        noise_scheduler: says what the prediction is of: `epsilon`, `sample` or `v_prediction`.
        clean_images: in [-1, 1]; shape (B, C, H, W).
        noise: standard normal; shape (B, C, H, W).
        timesteps: int in [0, number of training timesteps); shape (B).
        snr_gamma: cap of the signal-to-noise ratio, or None for the plain mean squared error.

    Returns:
        Shape (B), float32.
    """
    if model_pred.shape[1] == 2 * clean_images.shape[1]:
        model_pred, variance = model_pred.chunk(2, dim=1)
        bound = variance_bound(model_pred.detach() - noise, variance, noise_scheduler, clean_images, timesteps)
        return ddpm_loss(model_pred, noise_scheduler, clean_images, noise, timesteps, snr_gamma) + bound
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "sample":
        target = clean_images
    else:
        target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B)
    if snr_gamma is None:
        return loss
    snr = compute_snr(noise_scheduler, timesteps)  # (B)
    weight = snr.clamp(max=snr_gamma)  # of the error of the image
    if prediction_type == "epsilon":
        weight = weight / snr
    elif prediction_type == "v_prediction":
        weight = weight / (snr + 1)
    return loss * weight


@functools.lru_cache(maxsize=2)
def bound_tables(noise_scheduler: DDPMScheduler, device: torch.device) -> torch.Tensor:
    """What `variance_bound` needs at each timestep, computed in float64.

    Returns:
        Shape (3, T), float32: the factor from an error of the noise to that of the mean of x_{t-1} (DDPM, Eq. 11);
        the log of the variance of q(x_{t-1} | x_t, x_0) (Eq. 7; at t = 0, where it is 0, that of t = 1), the lowest
        that is learned; the log of beta_t, the highest.
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
    """Variational bound of each image at its timestep, from which the variance is learned (arXiv 2102.09672, Eq. 4-6
    and 15), in bits per dimension.

    For t > 0 it is the divergence of q(x_{t-1} | x_t, x_0) from the network's Gaussian; for t = 0 the surprise at the
    image, in bins of 1 / 255 to both sides that are open at -1 and 1.

    Args:
        noise_error: predicted minus true noise, detached, so that the bound trains the variance alone; shape
            (B, C, H, W).
        variance: from -1 for the variance of q to 1 for beta_t, on a log scale; shape (B, C, H, W).
        noise_scheduler: the forward process.
        clean_images: shape (B, C, H, W).
        timesteps: int in [0, number of training timesteps); shape (B).

    Returns:
        Shape (B), float32.
    """
    tables = bound_tables(noise_scheduler, timesteps.device)[:, timesteps, None, None, None]  # (3, B, 1, 1, 1)
    factor, lowest, highest = tables  # 3 x (B, 1, 1, 1)
    error = factor * noise_error.float()  # of the mean; at t = 0 that is the image; (B, C, H, W)
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


def nan_if_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """Makes the gradient of a loss that is not finite NaN, so that all processes learn of it; others stay as they are.

    Shape (B) to shape (B).
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def build_noise_scheduler(args: argparse.Namespace) -> NoiseScheduler:
    """The forward process, and what the saved folder samples with."""
    if args.formulation == "edm":
        # EDM, Table 1; latents are scaled to a standard deviation of 1.
        sigma_data = 0.5 if args.vae_model_name_or_path is None else 1.0
        return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data, rho=7.0)
    return DDPMScheduler(
        num_train_timesteps=args.num_train_timesteps,
        beta_schedule=args.beta_schedule,
        prediction_type=args.prediction_type,
        timestep_spacing="trailing",  # few-step samplers must start at the last timestep (arXiv 2305.08891)
        clip_sample=args.vae_model_name_or_path is None,  # latents have no range
    )
