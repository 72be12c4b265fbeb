# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The training formulations: noise-level sampling, input preconditioning, loss, and the schedulers to sample with.

A formulation is one class here and one choice of `--formulation` in `diffit.config`; its fields are flags of
`DiffusionConfig`. Training, validation and evaluation ask it for everything and never ask which one it is.

Shapes: B batch, C channels, H/W height/width of images or latents, T number of training timesteps.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.training_utils import compute_snr

from diffit.config import DiffusionConfig
from diffit.errors import UserError


@dataclass(frozen=True)
class Formulation(ABC):
    """What a network is trained to predict, and on what.

    Attributes:
        in_latents: whether the clean images are latents, which have no fixed range.
    """

    in_latents: bool = field(default=False, kw_only=True)

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        """Resolves the flags: as given, otherwise those of the pretrained pipeline, otherwise the defaults.

        Args:
            asked: the flags.
            pretrained: the same flags as far as the pretrained pipeline's scheduler tells them.
            in_latents: see the class.
        """
        values = {name: getattr(asked, name) for name in cls.flag_names()}
        values = {name: pretrained.get(name) if value is None else value for name, value in values.items()}
        return cls(**{name: value for name, value in values.items() if value is not None}, in_latents=in_latents)

    @classmethod
    def from_scheduler_config(cls, config: dict[str, Any]) -> Self:
        """The formulation that a saved pipeline was trained in, for evaluating it on images.

        Args:
            config: of the pipeline's scheduler, of whatever class.
        """
        formulation = cls(**{name: config[name] for name in cls.flag_names() if name in config})
        vars(formulation)["scheduler"] = cls.scheduler_class.from_config(config)  # with all its other settings
        return formulation

    @classmethod
    def flag_names(cls) -> tuple[str, ...]:
        """The flags of `DiffusionConfig` that are for this formulation."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "in_latents")

    @property
    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """The forward process as a diffusers scheduler, saved with the model and used to sample from it."""

    @abstractmethod
    def preview_scheduler(self) -> SchedulerMixin:
        """A scheduler that samples in few steps."""

    @abstractmethod
    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """How much noise each image gets, as a function of one random number in [0, 1). Shape (B) to shape (B)."""

    @abstractmethod
    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the noise and scales the result as the network expects it.

        Args:
            clean_images: images in [-1, 1] or latents; shape (B, C, H, W).
            noise: standard normal; shape (B, C, H, W).
            levels: see `noise_levels`; shape (B).

        Returns:
            Noisy images of about unit variance, shape (B, C, H, W), and the network's `timestep`, shape (B).
        """

    @abstractmethod
    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each image, given what the network predicts from `network_inputs`; shape (B), float32."""

    @abstractmethod
    def level_grid(self, count: int) -> list[float]:
        """Noise levels for a plot, from the least noise to the most."""

    @abstractmethod
    def axes(self) -> dict[str, str]:
        """Matplotlib settings of the axes of a plot of losses over noise levels."""

    @abstractmethod
    def describe(self) -> str:
        """The training objective in words, for the model card."""

    @property
    @abstractmethod
    def num_sampling_steps(self) -> int:
        """Denoising steps with which `scheduler` samples well, for the model card."""

    max_sampling_steps: ClassVar[int | None] = (
        None  # most denoising steps that a sampler may take, or None for any number
    )
    can_learn_variance: ClassVar[bool] = False  # whether the network may predict the variance in addition


@dataclass(frozen=True)
class DDPM(Formulation):
    """Denoising diffusion with discrete timesteps (arXiv 2006.11239).

    The defaults are the best settings on emoji in benchmarks/results/quality.md, and second to EDM alone on digits.

    Attributes:
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.
        beta_schedule: variance of the noise added at each timestep.
        num_train_timesteps: T.
        snr_gamma: cap of the signal-to-noise ratio in the min-SNR loss weights (arXiv 2303.09556); None or 0 for none.
    """

    scheduler_class = DDPMScheduler

    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    snr_gamma: float | None = None

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        formulation = super().from_flags(asked, pretrained, in_latents)
        if formulation.snr_gamma is None and formulation.prediction_type == "v_prediction":
            return dataclasses.replace(formulation, snr_gamma=5.0)
        return formulation

    @functools.cached_property
    def scheduler(self) -> DDPMScheduler:
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            timestep_spacing="trailing",  # few-step samplers must start at the last timestep (arXiv 2305.08891)
            clip_sample=not self.in_latents,
        )

    def preview_scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self.scheduler.config)

    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps, int in [0, T), evenly distributed."""
        return (uniform.double() * self.num_train_timesteps).long()

    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scheduler.add_noise(clean_images, noise, levels), levels

    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Weighted squared error of the prediction (DDPM, Eq. 14).

        For a network that also learns the variance, whose `model_pred` has the shape (B, 2C, H, W) with the variance
        in the second half of the channels, the variational bound is added.
        """
        if model_pred.shape[1] == 2 * clean_images.shape[1]:
            model_pred, variance = model_pred.chunk(2, dim=1)
            bound = variance_bound(model_pred.detach() - noise, variance, self.scheduler, clean_images, levels)
            return self.losses(model_pred, clean_images, noise, levels) + bound
        target = self.target(clean_images, noise, levels)
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B)
        return loss * self.loss_weights(levels) if self.snr_gamma else loss

    def target(self, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is to predict, shape (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean_images
        return self.scheduler.get_velocity(clean_images, noise, timesteps)

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR weights (arXiv 2303.09556), shape (B)."""
        snr = compute_snr(self.scheduler, timesteps)  # (B)
        weight = snr.clamp(max=self.snr_gamma)  # for the error of the image
        if self.prediction_type == "epsilon":
            return weight / snr
        return weight / (snr + 1) if self.prediction_type == "v_prediction" else weight

    def level_grid(self, count: int) -> list[int]:
        return np.linspace(0, self.num_train_timesteps - 1, count).round().astype(int).tolist()

    def axes(self) -> dict[str, str]:
        predicted = {"epsilon": "noise", "sample": "image", "v_prediction": "velocity"}[self.prediction_type]
        return {
            "xlabel": "timestep (0 = image, last = noise)",
            "ylabel": f"mean squared error of the {predicted}",
        }

    def describe(self) -> str:
        return f"{self.prediction_type}, {self.beta_schedule} betas, {self.num_train_timesteps} timesteps"

    @property
    def num_sampling_steps(self) -> int:
        return self.num_train_timesteps

    @property
    def max_sampling_steps(self) -> int:
        return self.num_train_timesteps

    @property
    def can_learn_variance(self) -> bool:
        return self.prediction_type == "epsilon"


@dataclass(frozen=True)
class EDM(Formulation):
    """Continuous noise levels with preconditioning (arXiv 2206.00364).

    Attributes:
        sigma_mean: mean of ln sigma, which is normally distributed (EDM, Table 1).
        sigma_std: standard deviation of ln sigma.
    """

    scheduler_class = EDMEulerScheduler

    sigma_mean: float = -1.2
    sigma_std: float = 1.2

    @functools.cached_property
    def scheduler(self) -> EDMEulerScheduler:
        # EDM, Table 1; latents are scaled to a standard deviation of 1.
        sigma_data = 1.0 if self.in_latents else 0.5
        return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data, rho=7.0)

    def preview_scheduler(self) -> EDMDPMSolverMultistepScheduler:
        return EDMDPMSolverMultistepScheduler.from_config(self.scheduler.config)

    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Sigma, the standard deviation of the noise; float32."""
        normal = torch.special.ndtri((uniform.double() + 2**-25).clamp(max=1 - 2**-25))  # the numbers are 24 bits long
        return torch.exp(self.sigma_mean + self.sigma_std * normal).float()

    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """c_in * (image + sigma * noise) and c_noise = ln(sigma) / 4 (EDM, Eq. 7 and Table 1)."""
        sigma = levels[:, None, None, None]  # (B, 1, 1, 1)
        noisy_images = self.scheduler.precondition_inputs(clean_images + sigma * noise, sigma)
        return noisy_images, self.scheduler.precondition_noise(levels)

    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """weight(sigma) * (D - image)^2 with D = c_skip * noisy + c_out * F (EDM, Eq. 7-8)."""
        sigma_data = self.scheduler.config.sigma_data
        sigma = levels[:, None, None, None]  # (B, 1, 1, 1)
        denoised = self.scheduler.precondition_outputs(clean_images + sigma * noise, model_pred.float(), sigma)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2  # (B, 1, 1, 1)
        return (weight * (denoised - clean_images).square()).mean(dim=(1, 2, 3))

    def level_grid(self, count: int) -> list[float]:
        config = self.scheduler.config
        return np.geomspace(config.sigma_min, config.sigma_max, count).tolist()

    def axes(self) -> dict[str, str]:
        return {
            "xlabel": "standard deviation of the noise",
            "ylabel": "weighted squared error of the image",
            "xscale": "log",
        }

    def describe(self) -> str:
        return f"EDM, ln sigma of mean {self.sigma_mean} and standard deviation {self.sigma_std}"

    @property
    def num_sampling_steps(self) -> int:
        return 18


FORMULATIONS: dict[str, type[Formulation]] = {"ddpm": DDPM, "edm": EDM}


def formulation_name(scheduler_config: dict[str, Any]) -> str:
    """The name in `FORMULATIONS` of the formulation that a saved scheduler belongs to, by its class."""
    return "edm" if scheduler_config.get("_class_name", "").startswith("EDM") else "ddpm"


def formulation_of(scheduler: SchedulerMixin) -> Formulation:
    """The formulation that a saved pipeline was trained in, from the scheduler that it samples with."""
    name = formulation_name({**scheduler.config, "_class_name": type(scheduler).__name__})
    return FORMULATIONS[name].from_scheduler_config(scheduler.config)


def choose_formulation(asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Formulation:
    """The formulation that the flags ask for, with all its settings.

    Args:
        asked: the flags.
        pretrained: config of the scheduler of the pretrained pipeline, or empty; its settings are the defaults.
        in_latents: see `Formulation`.

    Raises:
        UserError: if flags of one formulation are given with another.
    """
    trained_in = formulation_name(pretrained) if pretrained else None
    name = asked.formulation or trained_in or "ddpm"
    chosen = FORMULATIONS[name]
    for other, formulation in FORMULATIONS.items():
        for flag in set(formulation.flag_names()) - set(chosen.flag_names()):
            if getattr(asked, flag) is not None:
                raise UserError(f"--{flag} is for --formulation {other}, not {name}")
    return chosen.from_flags(asked, pretrained if trained_in == name else {}, in_latents)


def formulation_flags(formulation: Formulation) -> dict[str, Any]:
    """The formulation as values of the flags of `DiffusionConfig`."""
    (name,) = (name for name, kind in FORMULATIONS.items() if type(formulation) is kind)
    return {"formulation": name} | {flag: getattr(formulation, flag) for flag in formulation.flag_names()}


def differences(formulation: Formulation, pretrained: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """In which flags a formulation differs from that of a saved scheduler: by name, their value and ours."""
    theirs = pretrained | ({"formulation": formulation_name(pretrained)} if pretrained else {})
    ours = formulation_flags(formulation)
    return {flag: (theirs[flag], ours[flag]) for flag in ours if theirs.get(flag, ours[flag]) != ours[flag]}


# ---------------------------------------------------------------------------------------------------------------------
# Where inputs, network and loss meet


@dataclass
class NoisyBatch:
    """What a training step works on, on the device.

    Attributes:
        network_inputs: see `Formulation.network_inputs`.
        clean_images: without noise, shape (B, C, H, W).
        noise: standard normal, shape (B, C, H, W).
        levels: see `Formulation.noise_levels`; shape (B).
        conditions: further arguments of the network: `class_labels`, shape (B), or None for an unconditional network;
            `augment_labels`, shape (B, 9), where images were augmented.
        level_bins: in training, quartile of each level, int in [0, LEVEL_BINS); shape (B).
        first_position: in training, that of the batch in the data stream.
    """

    network_inputs: tuple[torch.Tensor, torch.Tensor]
    clean_images: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    conditions: dict[str, torch.Tensor | None]
    level_bins: torch.Tensor | None = None
    first_position: int | None = None


def denoising_losses(model: ModelMixin, formulation: Formulation, batch: NoisyBatch) -> torch.Tensor:
    """Loss of each image, shape (B), float32: the one place where inputs, network and loss meet."""
    model_pred = model(*batch.network_inputs, **batch.conditions).sample
    return formulation.losses(model_pred, batch.clean_images, batch.noise, batch.levels)


def nan_if_non_finite(losses: torch.Tensor) -> torch.Tensor:
    """Turns a non-finite loss into NaN gradients, so that after the all-reduce every process skips the step.

    Finite losses are unchanged. Shape (B) to shape (B).
    """
    return losses * torch.where(losses.detach().isfinite(), 1.0, math.nan)


# ---------------------------------------------------------------------------------------------------------------------
# The learned variance of DDPM


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
