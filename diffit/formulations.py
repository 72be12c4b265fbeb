# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The training formulations DDPM, EDM and rectified flow: noise levels, network inputs, loss and schedulers.

A formulation is one class here and one choice of `--formulation` in `diffit.diffusion_config`; its fields are flags
of `DiffusionConfig`. Training, validation and evaluation call its methods and never check which formulation it is.

Shapes: B batch, C channels, H/W height/width (pixels or latents), T number of training timesteps.
"""

import copy
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
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.training_utils import compute_snr

from diffit.diffusion_config import DiffusionConfig
from diffit.errors import UserError
from diffit.learned_variance import variance_bound
from diffit.scheduler_configs import complete_scheduler_config
from diffit_pipeline import scheduler_from_config, trained_with


@dataclass(frozen=True)
class Formulation(ABC):
    """Noise levels, network inputs and loss of a training, and the scheduler that samples from the trained network.

    Attributes:
        in_latents: whether the clean images are latents, which are not limited to [-1, 1].
        inherited: settings of the forward process that have no flag and differ from ours, as (name, value); taken over
            from the scheduler of pretrained weights.
    """

    in_latents: bool = field(default=False, kw_only=True)
    inherited: tuple[tuple[str, Any], ...] = field(default=(), kw_only=True)

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        """Resolves each flag: the given value, otherwise the pretrained pipeline's, otherwise the default.

        Args:
            asked: the flags as given.
            pretrained: config of the pretrained pipeline's scheduler, or empty.
            in_latents: see the class.

        Raises:
            ValueError: names a setting of the scheduler that this formulation does not have.
        """
        given = {name: getattr(asked, name) for name in cls.flag_names()}
        recorded = cls.flags_of(pretrained) if pretrained else {}
        theirs = {name: value for name, value in recorded.items() if given[name] is None}
        for name, value in theirs.items():
            choices = DiffusionConfig.__dataclass_fields__[name].metadata["options"].get("choices")
            choices = cls.prediction_types if name == "prediction_type" else choices
            if choices is not None and value not in choices:
                raise ValueError(f"its {name} is {value!r}, not one of {', '.join(choices)}; --{name} chooses one")
        values = {name: value for name, value in (given | theirs).items() if value is not None}
        return cls(**values, in_latents=in_latents).inherit(pretrained)

    def inherit(self, pretrained: dict[str, Any]) -> Self:
        """Takes over the settings of a scheduler's config that have no flag (`without_flag`)."""
        ours = self.scheduler.config
        theirs = {name: pretrained[name] for name in self.without_flag if name in pretrained}
        theirs = {name: tuple(value) if isinstance(value, list) else value for name, value in theirs.items()}
        return dataclasses.replace(
            self, inherited=tuple((name, value) for name, value in theirs.items() if value != ours[name])
        )

    @classmethod
    def from_scheduler_config(cls, config: dict[str, Any]) -> Self:
        """The formulation that a saved pipeline was trained with, so that its losses can be evaluated.

        Args:
            config: config of the pipeline's scheduler, which may be of any class.
        """
        formulation = cls(**cls.flags_of(config))
        scheduler = scheduler_from_config(cls.scheduler_class, config)  # keeps all its other settings
        vars(formulation)["scheduler"] = scheduler
        return formulation

    @classmethod
    def flag_names(cls) -> tuple[str, ...]:
        """The flags of `DiffusionConfig` that apply to this formulation."""
        return tuple(field.name for field in dataclasses.fields(cls) if not field.kw_only)

    @classmethod
    def flags_of(cls, scheduler_config: dict[str, Any]) -> dict[str, Any]:
        """The values of those flags that the config of this formulation's scheduler records."""
        return {name: scheduler_config[name] for name in cls.flag_names() if name in scheduler_config}

    def for_input(self, channels: int, height: int, width: int) -> Self:
        """The formulation with the defaults that depend on the size of the network's input."""
        return self

    @property
    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """The forward process as a diffusers scheduler, which is saved with the model and samples from it."""

    @abstractmethod
    def preview_scheduler(self) -> SchedulerMixin:
        """A scheduler that samples well in few steps, for previews."""

    @abstractmethod
    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Maps uniform random numbers in [0, 1) to noise levels, one per image.

        Args:
            uniform: shape (B).

        Returns:
            Timesteps, standard deviations of the noise, or fractions of noise; shape (B).
        """

    @abstractmethod
    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds noise to the images and scales the result for the network.

        Args:
            clean_images: images in [-1, 1] or latents; shape (B, C, H, W).
            noise: standard normal; shape (B, C, H, W).
            levels: see `noise_levels`; shape (B).

        Returns:
            The network's `sample`, noisy images with about unit variance, shape (B, C, H, W); and its `timestep`,
            shape (B).
        """

    @abstractmethod
    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each image.

        Args:
            model_pred: the network's output for `network_inputs`; shape (B, C, H, W).
            clean_images: see `network_inputs`.
            noise: see `network_inputs`.
            levels: see `noise_levels`; shape (B).

        Returns:
            Shape (B), float32.
        """

    @abstractmethod
    def level_grid(self, count: int) -> list[float]:
        """Returns `count` noise levels from the lowest to the highest, for a plot."""

    @abstractmethod
    def axes(self) -> dict[str, str]:
        """Matplotlib axis properties for a plot of the loss over the noise level."""

    @abstractmethod
    def describe(self) -> str:
        """A short description of the training objective, for the model card."""

    @property
    @abstractmethod
    def num_sampling_steps(self) -> int:
        """The number of sampling steps that the model card recommends for `scheduler`."""

    max_sampling_steps: ClassVar[int | None] = None  # largest number of sampling steps, or None for no limit
    can_learn_variance: ClassVar[bool] = False  # whether the network may also predict the variance
    prediction_types: ClassVar[tuple[str, ...]] = ()  # choices of --prediction_type, where the formulation has any
    without_flag: ClassVar[tuple[str, ...]] = ()  # settings of `scheduler` that only pretrained weights determine


@dataclass(frozen=True)
class DDPM(Formulation):
    """Denoising diffusion with discrete timesteps (arXiv 2006.11239).

    In benchmarks/results/quality.md the defaults are the best settings on emoji, and second only to EDM on digits.

    Attributes:
        prediction_type: the prediction target: `epsilon`, `sample` or `v_prediction`.
        beta_schedule: name of the schedule of betas, the variances of the noise added at each timestep.
        num_train_timesteps: number of timesteps, T.
        snr_gamma: cap of the signal-to-noise ratio in the min-SNR loss weights (arXiv 2303.09556); None or 0 disables
            the weighting.
    """

    scheduler_class = DDPMScheduler
    prediction_types = ("epsilon", "sample", "v_prediction")
    without_flag = ("beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")

    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    snr_gamma: float | None = None

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        formulation = super().from_flags(asked, pretrained, in_latents)
        if formulation.prediction_type == "flow":
            raise UserError("--prediction_type flow is for --formulation flow, not ddpm")
        formulation.check_inherited()
        if formulation.snr_gamma is None and formulation.prediction_type == "v_prediction":
            return dataclasses.replace(formulation, snr_gamma=5.0)
        return formulation

    def inherit(self, pretrained: dict[str, Any]) -> Self:
        """The numbers of the betas belong to their schedule: with another one, none of them is taken over."""
        same_schedule = pretrained.get("beta_schedule", self.beta_schedule) == self.beta_schedule
        return super().inherit(pretrained if same_schedule else {})

    def check_inherited(self) -> None:
        """Refuses a noise schedule that this formulation cannot be trained with.

        Raises:
            ValueError: names the setting.
        """
        settings = dict(self.inherited)
        betas = settings.get("trained_betas")
        if betas is not None and len(betas) != self.num_train_timesteps:
            raise ValueError(
                f"its {len(betas)} trained_betas contradict --num_train_timesteps {self.num_train_timesteps}; drop "
                "that flag, or give another --beta_schedule"
            )
        if settings.get("rescale_betas_zero_snr") and self.prediction_type == "epsilon":
            # Arithmetic, not taste: the last timestep holds no image, and a sampler would divide by zero there.
            raise ValueError(
                "its rescale_betas_zero_snr leaves pure noise at the last timestep, from which prediction_type "
                "epsilon gives no image; give --prediction_type v_prediction, or another --beta_schedule"
            )

    @functools.cached_property
    def scheduler(self) -> DDPMScheduler:
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            timestep_spacing="trailing",  # few-step samplers must start at the last timestep (arXiv 2305.08891)
            clip_sample=not self.in_latents,
            **dict(self.inherited),
        )

    def preview_scheduler(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self.scheduler.config)

    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Uniformly distributed timesteps, int in [0, T)."""
        return (uniform.double() * self.num_train_timesteps).long()

    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scheduler.add_noise(clean_images, noise, levels), levels

    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Weighted squared error of the prediction (DDPM, Eq. 14).

        A network with a learned variance predicts (B, 2C, H, W), the variance in the second half of the channels;
        the variational bound is then added to its loss.
        """
        if model_pred.shape[1] == 2 * clean_images.shape[1]:
            model_pred, variance = model_pred.chunk(2, dim=1)
            bound = variance_bound(model_pred.detach() - noise, variance, self.scheduler, clean_images, levels)
            return self.losses(model_pred, clean_images, noise, levels) + bound
        target = self.target(clean_images, noise, levels)
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B)
        return loss * self.loss_weights(levels) if self.snr_gamma else loss

    def target(self, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The prediction target, shape (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean_images
        return self.scheduler.get_velocity(clean_images, noise, timesteps)

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR weights (arXiv 2303.09556), shape (B)."""
        snr = compute_snr(self.scheduler, timesteps)  # (B)
        weight = snr.clamp(max=self.snr_gamma)  # the weight of an error of the image (prediction type `sample`)
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
        text = f"{self.prediction_type}, {self.beta_schedule} betas, {self.num_train_timesteps} timesteps"
        return text + describe_inherited(self)

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
        sigma_mean: mean of ln sigma; its distribution in training is normal (EDM, Table 1).
        sigma_std: standard deviation of ln sigma.
    """

    scheduler_class = EDMEulerScheduler
    without_flag = ("sigma_data", "sigma_min", "sigma_max", "rho")

    sigma_mean: float = -1.2
    sigma_std: float = 1.2

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        if (target := pretrained.get("prediction_type", "epsilon")) != "epsilon":
            raise ValueError(f"its prediction_type is {target!r}: EDM's preconditioning (Eq. 7) is that of 'epsilon'")
        return super().from_flags(asked, pretrained, in_latents)

    @functools.cached_property
    def scheduler(self) -> EDMEulerScheduler:
        # EDM, Table 1; latents are scaled to a standard deviation of 1.
        settings = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 1.0 if self.in_latents else 0.5, "rho": 7.0}
        return EDMEulerScheduler(**settings | dict(self.inherited))

    def preview_scheduler(self) -> EDMDPMSolverMultistepScheduler:
        return EDMDPMSolverMultistepScheduler.from_config(self.scheduler.config)

    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Sigmas, the standard deviations of the noise; float32."""
        # `uniform` is a multiple of 2^-24: shifting it by half of that keeps the quantile function finite at 0.
        normal = torch.special.ndtri((uniform.double() + 2**-25).clamp(max=1 - 2**-25))
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
        text = f"EDM, ln sigma with mean {self.sigma_mean} and standard deviation {self.sigma_std}"
        return text + describe_inherited(self)

    @property
    def num_sampling_steps(self) -> int:
        return 18


@dataclass(frozen=True)
class RectifiedFlow(Formulation):
    """Straight paths x_t = (1 - t) x + t e from an image x to noise e, t in [0, 1] (arXiv 2209.03003, 2403.03206).

    The network sees x_t and 1000 t, as diffusers' flow-matching models do. Its loss is that of the velocity e - x.

    Attributes:
        prediction_type: the network predicts the velocity (`flow`) or the image (`sample`).
        timestep_sampling: distribution of t before the shift: `logit_normal` or `uniform`.
        logit_mean: mean of logit t.
        logit_std: standard deviation of logit t.
        flow_shift: shift s of t in training and of the sampler's steps, `s t / (1 + (s - 1) t)` (arXiv 2403.03206,
            Eq. 23); None until `for_input`.
    """

    scheduler_class = FlowMatchEulerDiscreteScheduler
    prediction_types = ("flow", "sample")
    without_flag = ("num_train_timesteps",)

    prediction_type: str = "flow"
    timestep_sampling: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float | None = None

    lowest_fraction: ClassVar[float] = 0.05  # below it, the weight 1 / t^2 of an error of the image stops growing
    base_size: ClassVar[int] = 4 * 32 * 32  # numbers in the latents of a 256-pixel image, which need no shift

    @classmethod
    def from_flags(cls, asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Self:
        for name in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
            if pretrained.get(name):
                raise ValueError(f"its scheduler has {name} {pretrained[name]}, which is not supported")
        for name in ("logit_mean", "logit_std"):
            value = getattr(asked, name)
            if asked.timestep_sampling == "uniform" and value not in (None, getattr(cls, name)):  # as saved with a run
                raise UserError(f"--{name} {value} has no effect with --timestep_sampling uniform")
        formulation = super().from_flags(asked, pretrained, in_latents)
        if formulation.prediction_type not in cls.prediction_types:
            raise UserError(f"--prediction_type {formulation.prediction_type} is for --formulation ddpm, not flow")
        return formulation

    @classmethod
    def flags_of(cls, scheduler_config: dict[str, Any]) -> dict[str, Any]:
        prediction_type = scheduler_config.get("prediction_type", "flow")
        return {"prediction_type": prediction_type, "flow_shift": scheduler_config.get("shift", 1.0)}

    def for_input(self, channels: int, height: int, width: int) -> Self:
        """The default shift is that of arXiv 2403.03206, Eq. 23, but it never moves t toward the image."""
        if self.flow_shift is not None:
            return self
        return dataclasses.replace(self, flow_shift=max(1.0, math.sqrt(channels * height * width / self.base_size)))

    @functools.cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.flow_shift or 1.0, **dict(self.inherited))
        if self.prediction_type == "sample":
            # For `DiffiTPipeline`; the scheduler itself has none.
            scheduler.register_to_config(prediction_type="sample")
        return scheduler

    def preview_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return copy.deepcopy(self.scheduler)

    def noise_levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Fractions of noise t in [0, 1] after the shift; float32."""
        fraction = uniform.double() + 2**-25  # as in `EDM`
        if self.timestep_sampling == "logit_normal":
            normal = torch.special.ndtri(fraction.clamp(max=1 - 2**-25))
            fraction = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        shift = self.flow_shift or 1.0
        return (shift * fraction / (1 + (shift - 1) * fraction)).float()

    def network_inputs(
        self, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fraction = levels[:, None, None, None]  # (B, 1, 1, 1)
        noisy_images = (1 - fraction) * clean_images + fraction * noise
        return noisy_images, levels * self.scheduler.config.num_train_timesteps

    def losses(
        self, model_pred: torch.Tensor, clean_images: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Squared error of the velocity: that of a predicted image divided by t^2, as x_t - t v = x."""
        if self.prediction_type == "flow":
            return (model_pred.float() - (noise - clean_images)).square().mean(dim=(1, 2, 3))
        error = (model_pred.float() - clean_images).square().mean(dim=(1, 2, 3))  # (B)
        return error / levels.clamp(min=self.lowest_fraction).square()

    def level_grid(self, count: int) -> list[float]:
        return ((np.arange(count) + 0.5) / count).tolist()

    def axes(self) -> dict[str, str]:
        return {"xlabel": "fraction of noise (0 = image, 1 = noise)", "ylabel": "mean squared error of the velocity"}

    def describe(self) -> str:
        predicted = {"flow": "the velocity", "sample": "the image"}[self.prediction_type]
        levels = self.timestep_sampling
        if levels == "logit_normal":
            levels += f" with mean {self.logit_mean:g} and standard deviation {self.logit_std:g}"
        text = f"rectified flow that predicts {predicted}, fractions of noise {levels}, shift {self.flow_shift:.4g}"
        return text + describe_inherited(self)

    @property
    def num_sampling_steps(self) -> int:
        return 25


FORMULATIONS: dict[str, type[Formulation]] = {"ddpm": DDPM, "edm": EDM, "flow": RectifiedFlow}


def describe_inherited(formulation: Formulation) -> str:
    """The settings taken over from pretrained weights, each after a comma; of trained betas only their number."""
    return "".join(
        f", {name} {f'({len(value)} values)' if isinstance(value, tuple) else value}"
        for name, value in formulation.inherited
    )


def trained_formulation(pretrained: dict[str, Any]) -> str | None:
    """The key in `FORMULATIONS` of a saved scheduler; None for one that belongs to no formulation here.

    Args:
        pretrained: config of the scheduler, or empty.
    """
    name = trained_with(pretrained)
    is_ddpm = "beta_schedule" in complete_scheduler_config(pretrained) and not pretrained.get("use_flow_sigmas")
    return name if pretrained and (name != "ddpm" or is_ddpm) else None


def formulation_of(scheduler: SchedulerMixin) -> Formulation:
    """The formulation that a saved pipeline was trained with, derived from its scheduler."""
    name = trained_with({**scheduler.config, "_class_name": type(scheduler).__name__})
    return FORMULATIONS[name].from_scheduler_config(scheduler.config)


def _foreign(pretrained: dict[str, Any]) -> str:
    """Describes a scheduler that belongs to no formulation here."""
    return f"{pretrained.get('_class_name')}{' with use_flow_sigmas' if pretrained.get('use_flow_sigmas') else ''}"


def choose_formulation(asked: DiffusionConfig, pretrained: dict[str, Any], in_latents: bool) -> Formulation:
    """The formulation that the flags select, with all its settings.

    Args:
        asked: the flags as given.
        pretrained: config of the pretrained pipeline's scheduler, or empty; its settings are the defaults.
        in_latents: see `Formulation`.

    Raises:
        UserError: if a flag belongs to another formulation.
        ValueError: names a setting of the pretrained pipeline's scheduler that no formulation here has.
    """
    trained_in = trained_formulation(pretrained)
    if pretrained and trained_in is None and asked.formulation is None:
        raise ValueError(
            f"its {_foreign(pretrained)} does not belong to any formulation here; --formulation selects one that the "
            "weights were not trained with"
        )
    name = asked.formulation or trained_in or "ddpm"
    chosen = FORMULATIONS[name]
    for other, formulation in FORMULATIONS.items():
        for flag in set(formulation.flag_names()) - set(chosen.flag_names()):
            if getattr(asked, flag) is not None:
                raise UserError(f"--{flag} is for --formulation {other}, not {name}")
    return chosen.from_flags(asked, pretrained if trained_in == name else {}, in_latents)


def formulation_flags(formulation: Formulation) -> dict[str, Any]:
    """The values of the flags of `DiffusionConfig` that describe a formulation."""
    (name,) = (name for name, kind in FORMULATIONS.items() if type(formulation) is kind)
    return {"formulation": name} | {flag: getattr(formulation, flag) for flag in formulation.flag_names()}


def differences(formulation: Formulation, pretrained: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which a formulation differs from a pretrained scheduler: names to (pretrained value, ours)."""
    if pretrained and trained_formulation(pretrained) is None:
        theirs = {"formulation": _foreign(pretrained)}
    else:
        theirs = pretrained | ({"formulation": trained_with(pretrained)} if pretrained else {})
    ours = formulation_flags(formulation)
    if theirs.get("formulation") == ours["formulation"]:
        theirs |= formulation.flags_of(pretrained)
        ours |= {name: formulation.scheduler.config[name] for name in formulation.without_flag}
    theirs = {name: tuple(value) if isinstance(value, list) else value for name, value in theirs.items()}
    return {name: (theirs[name], ours[name]) for name in ours if theirs.get(name, ours[name]) != ours[name]}
