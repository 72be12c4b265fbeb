# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Class-conditional and unconditional sampling with any diffusers scheduler.

Training previews, `sample_diffit.py` and `eval_diffit.py` sample with this pipeline. `save_pretrained` copies this
file into the folder, so that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it as a
`DiffiTPipeline` anywhere. The file therefore stands alone: it imports torch and diffusers only.

Shapes: B batch (images), C channels, H/W height/width (pixels or latents).
"""

import contextlib
import inspect
import json
import math
import numbers
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    KDPM2DiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor

# Scheduler settings that a guidance model must share with the model that it guides.
FORWARD_PROCESS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "sigma_data", "prediction_type")

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "deis": DEISMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "dpmsolver++_singlestep": DPMSolverSinglestepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "kdpm2": KDPM2DiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
EDM_SCHEDULERS = {
    "edm_dpmsolver++": EDMDPMSolverMultistepScheduler,
    "edm_euler": EDMEulerScheduler,
    "edm_heun": EDMEulerScheduler,  # the same noise levels as edm_euler; the pipeline corrects each step
}
FLOW_SCHEDULERS = {
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "flow_heun": FlowMatchEulerDiscreteScheduler,  # as for EDM
}
EULER_SCHEDULERS = (EDMEulerScheduler, FlowMatchEulerDiscreteScheduler)  # whose steps Heun's method can correct
# By the formulation that a model was trained with; the default sampler of each.
SAMPLERS = {"ddpm": SCHEDULERS, "edm": EDM_SCHEDULERS, "flow": FLOW_SCHEDULERS}
DEFAULT_SAMPLERS = {"ddpm": "ddim", "edm": "edm_heun", "flow": "flow_heun"}
FORMULATION_TITLES = {"ddpm": "DDPM", "edm": "EDM", "flow": "rectified flow"}
# A setting that only the schedulers of a formulation have.
MARKS = {"ddpm": "beta_schedule", "edm": "sigma_data", "flow": "shift"}
# Highest ratio of the first two noise levels that `HeunDiscreteScheduler` can step over. Measured with the exact
# denoiser of two narrow modes: with cosine betas, 41 % of the samples miss both in 20 steps (ratio 1,666), 5 % in 30
# (1,090), 0.4 % in 40 (810); with linear betas the ratio is below 4.
MAX_HEUN_RATIO = 850
AUTOENCODERS = {
    autoencoder.__name__: autoencoder for autoencoder in (AutoencoderKL, AutoencoderDC, AutoencoderKLFlux2)
}
Autoencoder = AutoencoderKL | AutoencoderDC | AutoencoderKLFlux2
GUIDANCE_SCHEDULES = ("constant", "power_cosine")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def to_displayable(pixels: np.ndarray) -> PIL.Image.Image:
    """Converts uint8 pixels, shape (H, W, C), to a PIL image.

    All channels are shown if there are 1, 3 or 4; otherwise the first of 2, or the first 3 of 5 and more.
    """
    channels = pixels.shape[-1]
    shown = channels if channels in (1, 3, 4) else (3 if channels > 4 else 1)
    return PIL.Image.fromarray(pixels[..., 0] if shown == 1 else np.ascontiguousarray(pixels[..., :shown]))


def image_grid(images: list[PIL.Image.Image], columns: int | None = None, rows: int | None = None) -> PIL.Image.Image:
    """Arranges images in a grid, row by row, each with a thin border.

    Small images are enlarged by an integer factor, so that their shorter side has at least 32 pixels.

    Args:
        images: images of one size and mode; those that do not fit into the grid are left out.
        columns: number of columns; default: makes the grid almost square.
        rows: number of rows; default: as many as the images need.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = rows or math.ceil(len(images) / columns)
    factor = math.ceil(32 / min(images[0].size))
    tiles = [
        PIL.ImageOps.expand(
            image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST), 1, "gray"
        )
        for image in images[: columns * rows]
    ]
    blank = PIL.Image.new(tiles[0].mode, tiles[0].size, "gray")
    return make_image_grid(tiles + [blank] * (columns * rows - len(tiles)), rows, columns)


def component_name(network: torch.nn.Module) -> str:
    """Name of a network's component and folder: `"transformer"` for latent-space networks, otherwise `"unet"`."""
    return "transformer" if "num_embeds_ada_norm" in network.config else "unet"


class NonFiniteImagesError(ValueError):
    """Sampled images have NaN or infinite values; the message names their seeds and the cause.

    Attributes:
        weights_are_finite: whether the weights of all networks are finite, so that values have overflowed.
    """

    def __init__(self, message: str, weights_are_finite: bool):
        super().__init__(message)
        self.weights_are_finite = weights_are_finite


def check_finite(
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    networks: list[torch.nn.Module],
) -> None:
    """Refuses images with NaN or infinite values, which would otherwise be saved as black or white pixels.

    Args:
        images: sampled images or latents before they are clipped; shape (B, C, H, W).
        generator: generators of the noise, for their seeds: one per image, or one for all; or None.
        networks: all networks that took part, for the cause.

    Raises:
        NonFiniteImagesError: names the seeds, or the positions in the batch where there is not a seed for each image.
    """
    finite = images.isfinite().flatten(1).all(dim=1)  # (B)
    if finite.all():
        return
    positions = (~finite).nonzero().flatten().tolist()
    by_seed = isinstance(generator, list)
    numbers = [generator[i].initial_seed() if by_seed else i for i in positions]
    numbers = list(dict.fromkeys(numbers))  # a padded batch repeats its last seed
    shown = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    broken = [
        type(network).__name__
        for network in networks
        # Offloaded weights are on the meta device between calls.
        if not all(weight.is_meta or weight.isfinite().all() for weight in network.parameters())
    ]
    cause = (
        f"weights of {', '.join(broken)} are not finite"
        if broken
        else "values overflow: try float32, less guidance, or another scheduler"
    )
    which = f"{'seeds' if by_seed else 'batch positions'} {shown}"
    raise NonFiniteImagesError(f"the images of {which} have NaN or infinite values, because {cause}", not broken)


def null_label(network: torch.nn.Module) -> int | None:
    """Index of the null class for classifier-free guidance, which is the number of classes; None if unconditional.

    DiffiT and DiT have an additional embedding for it. `UNet2DModel` does not, so this project trains it with one more
    embedding than there are classes, the last.
    """
    if "num_embeds_ada_norm" in network.config:
        return network.config.num_embeds_ada_norm
    num_class_embeds = network.config.num_class_embeds
    if num_class_embeds is None:
        return None
    network = getattr(network, "_orig_mod", network)  # unwraps a compiled network
    return num_class_embeds - 1 if type(network).__name__ == "UNet2DModel" else num_class_embeds


def latent_channels(vae: Autoencoder) -> int:
    """Number of channels of the latents that a network denoises; FLUX.2 folds patches of them into channels."""
    return vae.config.latent_channels * math.prod(patch_size(vae))


def pixels_per_latent(vae: Autoencoder) -> int:
    """Pixels per latent along each side."""
    if isinstance(vae, AutoencoderDC):
        return vae.spatial_compression_ratio
    return 2 ** (len(vae.config.block_out_channels) - 1) * patch_size(vae)[0]


def image_channels(vae: Autoencoder) -> int:
    """Number of channels of the images that a VAE decodes."""
    return vae.config.in_channels if isinstance(vae, AutoencoderDC) else vae.config.out_channels


def patch_size(vae: Autoencoder) -> tuple[int, int]:
    """Height and width of the patches that are folded into channels, after encoding."""
    return tuple(vae.config.patch_size) if isinstance(vae, AutoencoderKLFlux2) else (1, 1)


def fold_patches(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Folds patches into channels as diffusers' FLUX.2 does: (B, c, h p, w q) to (B, c p q, h, w)."""
    return torch.nn.functional.pixel_unshuffle(latents, side) if (side := patch_size(vae)[0]) > 1 else latents


def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decodes denoised latents, shape (B, c, h, w), to images in about [-1, 1], shape (B, C, H, W), float32."""
    scale, shift = latent_scaling(vae, latents.device)
    latents = latents / scale + shift
    if (side := patch_size(vae)[0]) > 1:
        latents = torch.nn.functional.pixel_shuffle(latents, side)
    # One by one, because decoding a batch at once takes more memory than denoising it.
    return torch.cat([vae.decode(part).sample for part in latents.to(vae.dtype).split(1)]).float()


def check_scaling(name: str, value: float, is_scale: bool) -> None:
    """Refuses a number in a VAE's config that would scale its latents to nothing, or to nonsense.

    Raises:
        ValueError: names the setting and its value.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or (is_scale and value <= 0):
        wanted = "a finite number above 0" if is_scale else "a finite number"
        raise ValueError(f"the vae's {name} must be {wanted}, got {value!r}")


def latent_scaling(
    vae: Autoencoder, device: torch.device | str = "cpu"
) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Scale and shift of a VAE: a network denoises `(z - shift) * scale` of the encoder's latents z.

    An `AutoencoderKL` with `latents_mean` and `latents_std` in its config has one number per channel, shape
    (1, c, 1, 1): `scaling_factor / latents_std` and `latents_mean`, as in diffusers' Stable Diffusion XL. Otherwise
    they are `scaling_factor` and `shift_factor`. An `AutoencoderDC` has a `scaling_factor` only. FLUX.2's keeps mean
    and variance of the folded channels in a batch norm.

    Args:
        vae: the VAE.
        device: for the tensors.

    Raises:
        ValueError: if the VAE is not one of `AUTOENCODERS`, or its config contradicts itself.
    """
    if not isinstance(vae, tuple(AUTOENCODERS.values())):
        raise ValueError(
            f"the vae must be one of {', '.join(AUTOENCODERS)}, got {type(vae).__name__}, whose scaling is not known"
        )
    if isinstance(vae, AutoencoderDC):
        check_scaling("scaling_factor", vae.config.scaling_factor, True)
        return vae.config.scaling_factor, 0.0
    if isinstance(vae, AutoencoderKLFlux2):
        if len(set(patch_size(vae))) > 1:
            raise ValueError(f"the vae's patch_size must be square, got {patch_size(vae)}")
        mean, variance = (one.reshape(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
        shift, scale = mean.float(), torch.rsqrt(variance.float() + vae.config.batch_norm_eps)
        return (scale, shift) if shift.is_meta else (scale.to(device), shift.to(device))
    config, scale, shift = vae.config, vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mean, std = config.latents_mean, config.latents_std
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is not None and not isinstance(values, list | tuple):
            raise ValueError(f"the vae's {name} must be a list with one number per latent channel, got {values!r}")
        if values is not None and len(values) != config.latent_channels:
            raise ValueError(f"the vae has {config.latent_channels} latent channels, but {len(values)} {name}")
    for name, values in (
        *(("scaling_factor", [scale]), ("shift_factor", [shift])),
        *(("latents_mean", mean or []), ("latents_std", std or [])),
    ):
        for value in values:
            check_scaling(name, value, is_scale=name in ("scaling_factor", "latents_std"))
    if std is not None:
        scale = scale / torch.tensor(std, device=device).reshape(1, -1, 1, 1)
    if mean is not None:
        if shift:
            raise ValueError(f"the vae has a shift_factor {shift} and a latents_mean: it must have only one of them")
        shift = torch.tensor(mean, device=device).reshape(1, -1, 1, 1)
    return scale, shift


# ---------------------------------------------------------------------------------------------------------------------
# EDM (Karras et al. 2022, arXiv 2206.00364): noise levels sigma instead of timesteps


def edm_time(sigma: float, sigma_min: float, sigma_max: float, rho: float) -> float:
    """Maps a noise level to a time in [0, 1] that is uniform over the sampling steps: the inverse of EDM Eq. 5.

    Args:
        sigma: noise level, above 0.
        sigma_min: lowest noise level of the sampler, time 0; lower ones are clamped to it.
        sigma_max: highest noise level of the sampler, time 1; higher ones are clamped to it.
        rho: exponent of the noise schedule.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return min(max((sigma ** (1 / rho) - low) / (high - low), 0.0), 1.0)


def edm_heun(
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
    sample: torch.Tensor,
    sigmas: list[float],
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Samples with Heun's method: EDM Algorithm 2, which without churn is the deterministic Algorithm 1.

    Args:
        denoise: D(x; sigma), the expected clean images given noisy images x at noise level sigma. It is called twice
            per step, but only once in a step that ends at sigma 0: 2N - 1 times (NFE). x has the dtype of the result.
        sample: noise with standard deviation `sigmas[0]`; shape (B, C, H, W).
        sigmas: N + 1 decreasing noise levels for N steps; the last is usually 0.
        s_churn: S_churn, the amount of noise that is renewed during sampling; 0 is deterministic.
        s_tmin: S_tmin, the lowest noise level at which noise is renewed.
        s_tmax: S_tmax, the highest noise level at which noise is renewed.
        s_noise: S_noise, standard deviation of the new noise; 1 in theory.
        generator: generator of the new noise: one for all images, or one per image.

    Returns:
        Images in float64 (float32 on MPS, which lacks float64), shape (B, C, H, W).
    """
    dtype = torch.float32 if sample.device.type == "mps" else torch.float64
    sample = sample.to(dtype)
    num_steps = len(sigmas) - 1
    for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            higher_sigma = sigma * (1 + min(s_churn / num_steps, math.sqrt(2) - 1))
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            sample = sample + math.sqrt(higher_sigma**2 - sigma**2) * s_noise * noise.to(dtype)
            sigma = higher_sigma
        slope = (sample - denoise(sample, sigma)) / sigma
        next_sample = sample + (next_sigma - sigma) * slope
        if next_sigma > 0:
            next_slope = (next_sample - denoise(next_sample, next_sigma)) / next_sigma
            next_sample = sample + (next_sigma - sigma) * (slope + next_slope) / 2
        sample = next_sample
    return sample


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def guidance_weight(
    timestep: float,
    num_train_timesteps: int,
    scale: float,
    schedule: str = "constant",
    power: float = 4.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> float:
    """Guidance weight w(t) at a timestep, for `other + w * (prediction - other)`; a weight of 1 means no guidance.

    Args:
        timestep: t in [0, num_train_timesteps), integer or fractional; not the index of the sampling step. For an EDM
            model, `edm_time` in [0, 1].
        num_train_timesteps: T; 1 for an EDM model.
        scale: guidance scale s.
        schedule: `"constant"` (w = s), or `"power_cosine"`: `1 + (s - 1) * (1 - cos(pi * (1 - t/T)^p)) / 2`, which
            rises from 1 at pure noise to s at the image. DiffiT samples ImageNet 256x256 with the latter.
        power: exponent p of `"power_cosine"`.
        interval: lowest and highest t/T that are guided (arXiv 2404.07724); outside, the weight is 1.

    Raises:
        ValueError: if the schedule is unknown or the interval is not within [0, 1].
    """
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval must be 0 <= low < high <= 1, got {interval}")
    time = timestep / num_train_timesteps
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule must be one of {', '.join(GUIDANCE_SCHEDULES)}, got {schedule!r}")
    if not interval[0] <= time <= interval[1]:
        return 1.0
    if schedule == "constant":
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (1 - time) ** power)) / 2


def trained_with(scheduler_config: dict) -> str:
    """The formulation of the models that a scheduler is for: a key of `SAMPLERS`.

    Args:
        scheduler_config: the scheduler's config; `_class_name` tells the formulation.
    """
    name = str(scheduler_config.get("_class_name"))
    if name in (FlowMatchEulerDiscreteScheduler.__name__, FlowMatchHeunDiscreteScheduler.__name__):
        return "flow"
    return "edm" if name.startswith("EDM") else "ddpm"


def formulation_of(scheduler) -> str:
    """`trained_with` of a scheduler."""
    return trained_with({"_class_name": type(scheduler).__name__})


def is_foreign_flow(config: dict) -> bool:
    """Whether a scheduler's config is for flow matching in a form that this pipeline does not sample."""
    foreign = str(config.get("_class_name")).startswith(("FlowMatch", "FlowMap")) and trained_with(config) != "flow"
    unsupported = any(config.get(name) for name in ("use_flow_sigmas", "use_dynamic_shifting", "invert_sigmas"))
    return foreign or unsupported or config.get("prediction_type") == "flow_prediction"


def check_scheduler(scheduler, trained_with) -> None:
    """Refuses a scheduler that is not for the model: it would sample noise, or images of poor quality.

    Args:
        scheduler: the scheduler to sample with.
        trained_with: a scheduler with the model's formulation, noise schedule and prediction type.

    Raises:
        ValueError: names the setting that differs.
    """
    name, config, expected = type(scheduler).__name__, scheduler.config, trained_with.config
    own = inspect.signature(type(scheduler)).parameters
    step = inspect.signature(scheduler.step).parameters if hasattr(scheduler, "step") else {}
    required = [key for key, parameter in list(step.items())[3:] if parameter.default is parameter.empty]
    if not step or required or "Inverse" in name:
        needs = f": its step needs {', '.join(required)}" if required else ""
        raise ValueError(f"scheduler {name} is not for sampling images from noise{needs}")
    if is_foreign_flow({**config, "_class_name": name}):
        raise ValueError(f"scheduler {name} is for a kind of flow matching that the model was not trained with")
    # `from_config` keeps settings of other formulations, so a saved scheduler may reveal one from the wrong folder.
    kind, wanted = formulation_of(scheduler), formulation_of(trained_with)
    wanted = next(
        (other for other, mark in MARKS.items() if other != kind and mark in config and mark not in own), wanted
    )
    if kind != wanted:
        names = [scheduler_class.__name__ for scheduler_class in SAMPLERS[wanted].values()]
        raise ValueError(
            f"scheduler {name} does not suit a model trained with {FORMULATION_TITLES[wanted]}: choose one of "
            f"{', '.join(dict.fromkeys(names))}"
        )
    helps = f"make it with {name}.from_pretrained(<folder of the model>, subfolder='scheduler')"
    for key in ("prediction_type", "sigma_data", "shift", *(["num_train_timesteps"] if kind == "flow" else [])):
        if config.get(key) != expected.get(key):
            values = f"{key} {config.get(key)}, the model was trained with {expected.get(key)}"
            raise ValueError(f"scheduler {name} has {values}: {helps}")
    if scheduler is trained_with or not all(hasattr(one, "alphas_cumprod") for one in (scheduler, trained_with)):
        return
    ours, theirs = scheduler.alphas_cumprod.cpu(), trained_with.alphas_cumprod.cpu()
    # The tolerance admits `rescale_betas_zero_snr`, which moves alphas by up to 0.04.
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=0.05):
        ours, theirs = (
            "{beta_schedule} betas from {beta_start} to {beta_end} in {num_train_timesteps} timesteps".format(**values)
            for values in (config, expected)
        )
        if ours == theirs:
            ours, theirs = "other noise levels (`alphas_cumprod`)", "the same betas"
        raise ValueError(f"scheduler {name} has {ours}, the model was trained with {theirs}: {helps}")


def check_call(call: dict) -> None:
    """Checks those arguments of a call of the pipeline that need no model, by the rules of `sample_diffit.py`.

    Args:
        call: arguments of `DiffiTPipeline.__call__` by their names.

    Raises:
        ValueError: names the argument and its value.
    """
    for name in ("num_inference_steps", "batch_size", "height", "width"):
        value = call[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    generator = call["generator"]
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError(f"generator must be a torch.Generator, or a list of one for each image, got {generator!r}")
    if not isinstance(call["guidance_model"], torch.nn.Module | None):
        raise ValueError(f"guidance_model must be a network, not its path, got {call['guidance_model']!r}")
    for name, is_valid, expected in (
        ("output_type", lambda value: value in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
        ("guidance_schedule", lambda value: value in GUIDANCE_SCHEDULES, f"one of {', '.join(GUIDANCE_SCHEDULES)}"),
        ("guidance_scale", lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
        ("guidance_power", lambda value: 0 < value < math.inf, "a finite number above 0"),
        ("guidance_interval", is_interval, "0 <= low < high <= 1"),
        ("eta", lambda value: 0 <= value <= 1, "in [0, 1]"),
        ("s_churn", lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
        ("s_tmin", lambda value: 0 <= value < call["s_tmax"], f"at least 0 and below s_tmax, {call['s_tmax']}"),
        ("s_noise", lambda value: 0 < value < math.inf, "a finite number above 0"),
    ):
        try:
            valid = is_valid(call[name])
        except TypeError:  # not a number
            valid = False
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {call[name]!r}")


def is_interval(interval: tuple[float, float]) -> bool:
    """Whether these are two numbers, in order, in [0, 1]."""
    return len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1


def check_id2label(id2label: dict[str, str] | None) -> None:
    """Refuses names of classes that are not a dictionary from indices, as strings, to strings.

    Raises:
        ValueError: shows what is wrong.
    """
    if id2label is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must be a dictionary of class indices and names, got {id2label!r:.80}")
    for index, name in id2label.items():
        if not str(index).isdecimal() or not isinstance(name, str):
            raise ValueError(f"id2label must map class indices to names, got {index!r}: {name!r:.80}")


def choose_scheduler(model_path: str, scheduler: str | None = None) -> str:
    """Checks the name of a scheduler against the model in a folder, or chooses the default.

    Args:
        model_path: local folder or hub name with `scheduler/`.
        scheduler: a name in `SAMPLERS` of the model's formulation. Default: that of `DEFAULT_SAMPLERS`.

    Returns:
        The name of the scheduler.

    Raises:
        ValueError: if the scheduler is unknown or does not suit the model, or the model's config is damaged.
    """
    config = DDPMScheduler.load_config(model_path, subfolder="scheduler")
    if is_foreign_flow(config):
        raise ValueError(
            f"{model_path} is a flow-matching model of a kind that is not supported ({config.get('_class_name')})"
        )
    if "_class_name" not in config:
        raise ValueError(f"{model_path}: scheduler_config.json has no _class_name, so it says nothing about the model")
    formulation = trained_with(config)
    known = (None, "flow", "sample") if formulation == "flow" else (None, "epsilon", "sample", "v_prediction")
    if config.get("prediction_type") not in known:
        raise ValueError(
            f"{model_path} has prediction_type {config['prediction_type']!r}, expected {', '.join(known[1:])}"
        )
    names = sorted(SAMPLERS[formulation])
    scheduler = scheduler or DEFAULT_SAMPLERS[formulation]
    if scheduler not in names:
        raise ValueError(
            f"scheduler {scheduler!r} does not suit {model_path}, a model trained with "
            f"{FORMULATION_TITLES[formulation]}: choose one of {', '.join(names)}"
        )
    return scheduler


def predicts_variance(network: torch.nn.Module) -> bool:
    """Whether the second half of the output channels parametrizes the variance of each step, as in improved DDPM."""
    return network.config.out_channels == 2 * network.config.in_channels


def load_network(model_path: str, model_class: Callable[[dict], type], dtype=torch.float32) -> torch.nn.Module:
    """Loads the network in `unet/` or `transformer/` of a pipeline folder, without running any code in the folder.

    Args:
        model_path: local folder or hub name with `model_index.json`.
        model_class: maps the contents of the network's `config.json` to its class.
        dtype: dtype of the weights.
    """
    part = "transformer" if "transformer" in DiffusionPipeline.load_config(model_path) else "unet"
    network_class = model_class(UNet2DModel.load_config(model_path, subfolder=part))
    return network_class.from_pretrained(model_path, subfolder=part, torch_dtype=dtype, use_safetensors=True)


def scheduler_from_config(scheduler_class: type, config: dict, **settings):
    """A scheduler with the settings of another one's config.

    diffusers' schedulers of flows do not know a `prediction_type`, and warn of one; it is kept for this pipeline.

    Args:
        scheduler_class: class of the scheduler.
        config: config of the other scheduler.
        settings: settings that replace those of the config.
    """
    config, kept = dict(config), {}
    if trained_with({"_class_name": scheduler_class.__name__}) == "flow" and "prediction_type" in config:
        kept["prediction_type"] = config.pop("prediction_type")
    scheduler = scheduler_class.from_config(config, **settings)
    scheduler.register_to_config(**kept)
    return scheduler


def load_scheduler(scheduler_class: type, model_path: str, **settings):
    """`scheduler_from_config` for the scheduler in a pipeline folder, local or on the hub."""
    config = scheduler_class.load_config(model_path, subfolder="scheduler")
    return scheduler_from_config(scheduler_class, config, **settings)


class DiffiTPipeline(DiffusionPipeline):
    """Samples images with a `DiffiTUNet2DModel`, a `DiffiTTransformer2DModel`, or a network with such an interface.

    Args:
        unet: pixel-space network with the interface of `UNet2DModel`, which predicts noise, image or velocity; None
            for a latent-space model.
        scheduler: diffusers scheduler of the model's formulation, noise schedule and prediction type. One that
            replaces it later (`pipeline.scheduler = ...`) must have the same.
        id2label: maps a class index, as a string, to the names of the class, separated by commas; None if the classes
            have no names.
        transformer: latent-space network with the interface of `DiTTransformer2DModel`; None for a pixel-space model.
            If it predicts a variance in the second half of its output channels, a `DDPMScheduler` with
            `variance_type="learned_range"` or `"learned"` uses it; any other scheduler gets the first half only.
        vae: one of `AUTOENCODERS`, which decodes the latents; without one, a latent-space model returns latents only.
        heun: with an `EDMEulerScheduler` or a `FlowMatchEulerDiscreteScheduler`, correct each Euler step by Heun's
            method, see `edm_heun`.

    Raises:
        ValueError: unless exactly one of `unet` and `transformer` is given, or if the VAE has another number of
            latent channels than the transformer, or a scaling that is not known here, or if `id2label` is not one.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]

    def __init__(
        self, unet, scheduler, id2label: dict[str, str] | None = None, transformer=None, vae=None, heun: bool = True
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("a pipeline has exactly one network: give either unet or transformer")
        if vae is not None:
            latent_scaling(vae)  # for its checks
        if vae is not None and transformer is not None and latent_channels(vae) != transformer.config.in_channels:
            raise ValueError(
                f"the VAE has {latent_channels(vae)} latent channels, the transformer {transformer.config.in_channels}"
            )
        check_id2label(id2label)
        self.register_modules(unet=unet, transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, heun=heun)
        self._trained_with = scheduler

    @classmethod
    def from_folder(
        cls,
        model_path: str,
        model_class: Callable[[dict], type],
        scheduler: str | None = None,
        dtype=torch.float32,
        vae: Autoencoder | None = None,
        network: torch.nn.Module | None = None,
    ):
        """Loads a pipeline folder written by training, or a `DiTPipeline` folder, without running any code in it.

        The scheduler keeps the noise schedule and prediction type of the folder's scheduler. For a latent-space model,
        predictions are not clipped, because latents exceed [-1, 1]; and if the network predicts a variance, `"ddpm"`
        is the ancestral sampling of improved DDPM, which uses it, with timesteps evenly spaced from first to last.

        Args:
            model_path: local folder or hub name with `model_index.json`, `scheduler/`, and `unet/` or `transformer/`.
            model_class: maps the contents of the network's `config.json` to its class.
            scheduler: name of the scheduler, see `choose_scheduler`.
            dtype: dtype of the network's weights; the VAE stays in float32.
            vae: VAE of a latent-space model that replaces the one in `vae/`.
            network: network that replaces the folder's; the folder then needs `scheduler/` only, as in a training
                checkpoint.

        Raises:
            ValueError: if the scheduler is unknown or does not suit the model.
        """
        index = cls.load_config(model_path) if network is None else {}
        scheduler = choose_scheduler(model_path, scheduler)
        heun = scheduler.endswith("_heun")
        scheduler_class = {name: kind for kinds in SAMPLERS.values() for name, kind in kinds.items()}[scheduler]
        network = load_network(model_path, model_class, dtype) if network is None else network
        if component_name(network) == "unet":
            scheduler = load_scheduler(scheduler_class, model_path)
            return cls(network, scheduler, index.get("id2label"), heun=heun)

        if vae is None and (index.get("vae") or [None])[0] is not None:
            if index["vae"][1] not in AUTOENCODERS:
                names = ", ".join(AUTOENCODERS)
                raise ValueError(f"{model_path}: the vae must be one of {names}, it is a {index['vae'][1]}")
            vae = AUTOENCODERS[index["vae"][1]].from_pretrained(model_path, subfolder="vae", use_safetensors=True)
        settings = {"clip_sample": False}
        if scheduler_class is not DDPMScheduler:
            settings["variance_type"] = None  # otherwise DPM solvers keep only three channels of the prediction
        elif predicts_variance(network):
            settings |= {"variance_type": "learned_range", "timestep_spacing": "linspace"}
        accepted = inspect.signature(scheduler_class).parameters
        settings = {key: value for key, value in settings.items() if key in accepted}
        scheduler = load_scheduler(scheduler_class, model_path, **settings)
        return cls(None, scheduler, index.get("id2label"), network, vae, heun)

    @property
    def heun(self) -> bool:
        """Whether Euler steps of an EDM or a flow scheduler are corrected by Heun's method; it is saved."""
        return self.config.heun

    @heun.setter
    def heun(self, heun: bool) -> None:
        self.register_to_config(heun=heun)

    @property
    def network(self) -> torch.nn.Module:
        """The denoising network: `unet` or `transformer`."""
        return self.transformer if self.unet is None else self.unet

    @property
    def image_channels(self) -> int:
        """Channels of the images, or of the latents if there is no VAE to decode them."""
        return self.network.config.in_channels if self.vae is None else image_channels(self.vae)

    @property
    def pixels_per_latent(self) -> int:
        """Height and width in pixels of what the VAE decodes from one latent; 1 without a VAE."""
        return 1 if self.vae is None else pixels_per_latent(self.vae)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels, unless a call says otherwise; None if each call must say so."""
        size = self.network.config.sample_size
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    def label_ids(self, class_labels: int | str | list[int | str] | range | np.ndarray | torch.Tensor) -> list[int]:
        """Converts class labels, given as indices or names, to indices.

        A name may be a class's full name or one of its comma-separated synonyms; full names take precedence. A number
        means the same as its text: the class of that name, otherwise the class with that index. It is refused if that
        class has another number for a name. A tensor always holds indices, as for the network.

        Args:
            class_labels: one label, or a list, tuple, range or array of shape (B) of labels; or a tensor, shape (B).

        Raises:
            ValueError: if the model is unconditional, there is no label, a label is unknown or means several classes;
                names the label.
        """
        are_indices = isinstance(class_labels, torch.Tensor)
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, list | tuple | range):
            class_labels = [class_labels]
        num_classes = null_label(self.network)
        if num_classes is None:
            raise ValueError(f"class labels {class_labels} were given, but the model is unconditional")
        if len(class_labels) == 0:
            raise ValueError("class_labels is empty: give one label, or one per image")
        whole_names, synonyms = {}, {}  # class indices of each name: sets, because ImageNet has two cranes
        for number, name in (self.config.id2label or {}).items():
            whole_names.setdefault(name, set()).add(int(number))
            for synonym in name.split(","):
                synonyms.setdefault(synonym.strip(), set()).add(int(number))
        numeric = {index for name, indices in whole_names.items() if name.isdecimal() for index in indices}
        ids = []
        for label in class_labels:
            text = str(label)
            matches = [] if are_indices else sorted(whole_names.get(text) or synonyms.get(text) or ())
            if not matches and text.isdecimal() and (are_indices or int(text) not in numeric):
                matches = [int(text)]
            if len(matches) > 1:
                raise ValueError(f"{label!r} is the name of the classes {matches}: give a number")
            if not matches or not 0 <= matches[0] < num_classes:
                known = ", ".join(whole_names) if 0 < len(whole_names) <= 100 else f"0 to {num_classes - 1}"
                raise ValueError(f"no class {label!r}; the classes are {known}")
            ids += matches
        return ids

    def check_guidance(self, channels: int | None, guidance_model: torch.nn.Module | None) -> None:
        """Checks guidance settings against the models.

        Args:
            channels: `guidance_channels` of a call.
            guidance_model: `guidance_model` of a call.

        Raises:
            ValueError: if the model has fewer channels, or if the two models differ in input channels or classes.
        """
        in_channels = self.network.config.in_channels
        if channels is not None and not 1 <= channels <= in_channels:
            raise ValueError(f"guidance_channels must be 1 to {in_channels}, the model's channels, got {channels}")
        if guidance_model is None:
            return
        for what, mine, other in (
            ("input channels", in_channels, guidance_model.config.in_channels),
            ("classes", null_label(self.network), null_label(guidance_model)),
        ):
            if mine != other:
                raise ValueError(f"guidance_model has {other} {what}, the model {mine}: they must be equal")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_schedule: str = "constant",
        guidance_power: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        guidance_model: torch.nn.Module | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            class_labels: class indices or names, one for all images or one per image. Default: no class, which for a
                conditional network is the null class.
            batch_size: number of images B. Default: one per class label, or 1.
            num_inference_steps: number of scheduler steps. A step of Heun's method takes two forward passes, the last
                one takes one.
            guidance_scale: scale of classifier-free guidance, `uncond + scale * (cond - uncond)`. Where it is 1,
                guidance is off, and the batch of a forward pass is not doubled.
            eta: noise of DDIM, from 0 (deterministic) to 1 (as much as DDPM); other schedulers have 0 only.
            generator: one generator for all images, or one per image. Noise is sampled in float32 on the generator's
                device. With one CPU generator per image, the noise of an image depends on its own generator only.
            height: height in pixels, or in latents without a VAE. Default: the network's `sample_size`.
            width: width in pixels, or in latents without a VAE. Default: the network's `sample_size`.
            output_type: `"pil"`; `"np"`, shape (B, H, W, C), or `"pt"`, shape (B, C, H, W), both in [0, 1]; or
                `"latent"`, the denoised sample, neither decoded nor clipped.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            guidance_schedule: dependence of the scale on the timestep, see `guidance_weight`.
            guidance_power: exponent of the `"power_cosine"` schedule, see `guidance_weight`.
            guidance_interval: lowest and highest timestep that is guided, as fractions of the training timesteps, as
                `edm_time` for an EDM model, or as fractions of noise for rectified flow.
            guidance_channels: apply guidance to the first N channels only; the other channels, and a predicted
                variance in any case, come from the conditional pass. Default: all. The published ImageNet numbers of
                DiT and DiffiT guide 3 of 4 latent channels.
            guidance_model: weaker model for autoguidance (arXiv 2406.02507), on the same device. It replaces
                classifier-free guidance by `weak + scale * (strong - weak)`, both with the same class or none. Where
                the scale is not 1, a step takes one forward pass of each model.
            s_churn: amount of noise that Heun's method renews, see `edm_heun`; 0 is deterministic.
            s_tmin: lowest sigma with churn.
            s_tmax: highest sigma with churn.
            s_noise: standard deviation of the noise that churn adds.

        Returns:
            The images, as an `ImagePipelineOutput` or a tuple of one element.

        Raises:
            ValueError: for an argument that is out of range or that the scheduler does not have, an unknown class,
                guidance without classes or a guidance model, a scheduler for other models, or counts and sizes that
                do not match.
            NonFiniteImagesError: if images have NaN or infinite values; a `ValueError` that names their seeds.
        """
        check_call(locals())
        network, device = self.network, self._execution_device
        if class_labels is None and guidance_model is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs class_labels or a guidance_model")
        if output_type != "latent" and self.transformer is not None and self.vae is None:
            raise ValueError("images of a latent model need a vae: give the pipeline one, or output_type='latent'")
        if output_type == "pil" and self.image_channels not in (1, 3, 4):
            raise ValueError(f"PIL has no images with {self.image_channels} channels: give output_type='np' or 'pt'")
        self.check_guidance(guidance_channels, guidance_model)
        self._check_steps(num_inference_steps, eta)
        uses_heun = self.heun and isinstance(self.scheduler, EULER_SCHEDULERS)
        if s_churn != 0 and not (uses_heun and isinstance(self.scheduler, EDMEulerScheduler)):
            raise ValueError(f"s_churn {s_churn} needs Heun's method: an EDMEulerScheduler, and heun=True")
        labels, batch_size = self._labels(class_labels, batch_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for {batch_size} images")

        # 1. noise
        shape = self._sample_shape(batch_size, height, width)
        sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)  # (B, C, H, W)

        # 2. scheduler
        self._set_timesteps(num_inference_steps)
        self._warn_of_heun(num_inference_steps)
        step_kwargs = self._step_kwargs(eta, generator)
        uses_variance = isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type in (
            "learned",
            "learned_range",
        )
        step_channels = None if uses_variance else network.config.in_channels

        def predict(model_input: torch.Tensor, timestep: torch.Tensor, time: float) -> torch.Tensor:
            """Guided prediction in float32, shape (B, C, H, W), or (B, 2C, H, W) with the variance; time in [0, 1]."""
            weight = guidance_weight(time, 1, guidance_scale, guidance_schedule, guidance_power, guidance_interval)
            model_input = model_input.to(network.dtype)
            prediction = self._predict(model_input, timestep, labels, weight, guidance_channels, guidance_model)
            return prediction[:, :step_channels].float()

        # 3. denoising
        with contextlib.ExitStack() as caches:
            for model in (network, guidance_model):
                if hasattr(model, "cache_for_sampling"):  # ours; not `UNet2DModel`
                    caches.enter_context(model.cache_for_sampling())
            if uses_heun:
                sample = self._heun(predict, sample, s_churn, s_tmin, s_tmax, s_noise, generator)
            else:
                flow = formulation_of(self.scheduler) == "flow"
                sample = sample if flow else sample * self.scheduler.init_noise_sigma
                timesteps = self.scheduler.timesteps
                for timestep, time in zip(self.progress_bar(timesteps), self._times(), strict=True):
                    model_input = sample if flow else self.scheduler.scale_model_input(sample, timestep)
                    prediction = predict(model_input, timestep, time)
                    if self._predicts_flow_images:
                        prediction = (sample - prediction) / time  # the velocity, which flow schedulers take
                    sample = self.scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample

        # 4. images
        images = sample if output_type == "latent" else self._decode(sample)  # (B, C, H, W)
        networks = (network, guidance_model, None if output_type == "latent" else self.vae)
        check_finite(images, generator, [each for each in networks if each is not None])
        images = images if output_type == "latent" else images.clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_steps(self, num_inference_steps: int, eta: float) -> None:
        """Refuses a scheduler that is not for the model, or that cannot take these steps."""
        scheduler = self.scheduler
        check_scheduler(scheduler, self._trained_with)
        if eta != 0 and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta {eta} needs a DDIMScheduler, {type(scheduler).__name__} has none")
        most = scheduler.config.num_train_timesteps
        if num_inference_steps > most and formulation_of(scheduler) == "ddpm":
            raise ValueError(f"num_inference_steps {num_inference_steps} exceeds the {most} timesteps of the model")

    def _warn_of_heun(self, num_inference_steps: int) -> None:
        """Warns if Heun's second-order correction overshoots in the first step, which makes images of noise."""
        if not isinstance(self.scheduler, HeunDiscreteScheduler):
            return
        first, second = self.scheduler.sigmas[:2].tolist()
        if second > 0 and first / second > MAX_HEUN_RATIO:  # a single step ends at 0, without a correction
            needed = math.ceil(num_inference_steps * first / second / MAX_HEUN_RATIO)
            warnings.warn(
                f"HeunDiscreteScheduler (heun) overshoots in the first of num_inference_steps {num_inference_steps}, "
                f"from sigma {first:.0f} to {second:.1f}, and the images are noisy: take at least {needed} steps, or "
                "another scheduler, such as UniPCMultistepScheduler (unipc)",
                stacklevel=4,  # the caller of the decorated `__call__`
            )

    def _set_timesteps(self, num_inference_steps: int) -> None:
        """Sets the scheduler's timesteps.

        Those of a `FlowMatchEulerDiscreteScheduler` are evenly spaced before the shift, which is applied once.
        """
        scheduler = self.scheduler
        # On the CPU, because schedulers look up each timestep, and a look-up on an accelerator would wait for it.
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            # By default diffusers' steps end at the lowest fraction of training after the shift, and shift it again.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            scheduler.set_timesteps(num_inference_steps, device="cpu", sigmas=sigmas)
        else:
            scheduler.set_timesteps(num_inference_steps, device="cpu")

    @property
    def _predicts_flow_images(self) -> bool:
        """Whether the network of a flow predicts the image rather than the velocity."""
        return formulation_of(self.scheduler) == "flow" and self.scheduler.config.get("prediction_type") == "sample"

    def _labels(
        self, class_labels: int | str | list[int | str] | torch.Tensor | None, batch_size: int | None
    ) -> tuple[torch.Tensor | None, int]:
        """Class indices, shape (B), or None for an unconditional network; and the number of images B."""
        null = null_label(self.network)
        if class_labels is not None:
            ids = self.label_ids(class_labels)
            if not ids:
                raise ValueError("class_labels is empty: give a class, or None for no class")
            batch_size = batch_size or len(ids)
            ids = ids * batch_size if len(ids) == 1 else ids
            if len(ids) != batch_size:
                raise ValueError(f"{len(ids)} class labels were given for {batch_size} images")
        else:
            batch_size = batch_size or 1
            ids = None if null is None else [null] * batch_size
        return None if ids is None else torch.tensor(ids, device=self._execution_device), batch_size

    def _sample_shape(self, batch_size: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Shape (B, C, H, W) of the denoised sample, for images of `height` x `width` pixels."""
        size = self.network.config.sample_size
        if size is None and (height is None or width is None):
            raise ValueError("the network has no `sample_size`: give height and width")
        sides = [size, size] if isinstance(size, int) or size is None else list(size)
        scale = self.pixels_per_latent
        for i, pixels in enumerate((height, width)):
            if pixels is not None:
                if pixels % scale:
                    raise ValueError(f"height and width must be multiples of {scale}, got {pixels}")
                sides[i] = pixels // scale
        return batch_size, self.network.config.in_channels, *sides

    def _step_kwargs(self, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> dict:
        """Optional arguments that this scheduler's `step` accepts."""
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"eta": eta} if "eta" in accepted else {}
        if "use_clipped_model_output" in accepted:
            # Recomputes the noise from the clipped image; otherwise guidance drives DDIM samples out of range.
            step_kwargs["use_clipped_model_output"] = True
        if "generator" in accepted:
            step_kwargs["generator"] = generator
        return step_kwargs

    def _times(self) -> list[float]:
        """Time in [0, 1] of each timestep of the scheduler: t / T, or `edm_time`; for flow the fraction of noise."""
        config = self.scheduler.config
        if formulation_of(self.scheduler) != "edm":
            return [timestep / config.num_train_timesteps for timestep in self.scheduler.timesteps.tolist()]
        sigmas = self.scheduler.sigmas[:-1].tolist()
        return [edm_time(sigma, config.sigma_min, config.sigma_max, config.rho) for sigma in sigmas]

    def _heun(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
        noise: torch.Tensor,
        *churn: float | torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Samples with Heun's method at the scheduler's noise levels.

        Args:
            predict: function of (model input, timestep, time in [0, 1]).
            noise: standard normal; shape (B, C, H, W).
            churn: `s_churn`, `s_tmin`, `s_tmax`, `s_noise` and the generator, for `edm_heun`.

        Returns:
            Shape (B, C, H, W), float32.
        """
        scheduler, config = self.scheduler, self.scheduler.config
        sigmas = scheduler.sigmas.tolist()
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        with self.progress_bar(total=2 * (len(sigmas) - 1) - 1) as progress:

            def denoise_flow(sample: torch.Tensor, fraction: float) -> torch.Tensor:
                """D(x_t; t) = x_t - t v: paths of a flow have the slope (x_t - D) / t, as those of EDM in sigma."""
                timestep = torch.full((), fraction * config.num_train_timesteps)
                prediction = predict(sample, timestep, fraction)
                progress.update()
                return prediction if self._predicts_flow_images else sample - fraction * prediction

            def denoise(sample: torch.Tensor, sigma: float) -> torch.Tensor:
                """D(x; sigma) of EDM Eq. 7: the scheduler turns the network into a denoiser."""
                time = edm_time(sigma, config.sigma_min, config.sigma_max, config.rho)
                level = torch.full((), sigma, dtype=sample.dtype)  # on the CPU, and so can be read without waiting
                model_input = scheduler.precondition_inputs(sample, level)
                prediction = predict(model_input, scheduler.precondition_noise(level).float(), time)
                progress.update()
                return scheduler.precondition_outputs(sample, prediction, level)

            return edm_heun(denoise_flow if flow else denoise, noise * sigmas[0], sigmas, *churn).float()

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None,
        weight: float,
        channels: int | None,
        guidance_model: torch.nn.Module | None,
    ) -> torch.Tensor:
        """Prediction of the network, guided unless the weight is 1; shape (B, out_channels, H, W)."""
        if weight != 1 and guidance_model is None:
            labels = torch.cat([labels, torch.full_like(labels, null_label(self.network))])  # (2B)
            sample = sample.repeat(2, 1, 1, 1)  # (2B, C, H, W)
        # `timestep` is on the CPU; filling a tensor with it does not wait for the device, as copying it would.
        timesteps = sample.new_full((len(sample),), timestep.item(), dtype=timestep.dtype)  # (B) or (2B)
        prediction = self.network(sample, timesteps, class_labels=labels).sample
        if weight == 1:
            return prediction
        if guidance_model is None:
            prediction, other = prediction.chunk(2)
        else:
            other = guidance_model(sample.to(guidance_model.dtype), timesteps, class_labels=labels).sample
        channels = channels or sample.shape[1]
        guided = other[:, :channels] + weight * (prediction[:, :channels] - other[:, :channels])
        return torch.cat([guided, prediction[:, channels:]], dim=1)

    def _decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Converts a denoised sample to images, in [0, 1] once clipped; shape (B, C, H, W). A VAE decodes latents."""
        if self.vae is not None:
            sample = decode_latents(self.vae, sample)
        return sample / 2 + 0.5

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Extends diffusers' method: adds this file and this class's name, so that the folder loads anywhere."""
        super().save_config(save_directory, **kwargs)
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text())
        index["_class_name"] = ["diffit_pipeline", "DiffiTPipeline"]
        index = {key: value for key, value in index.items() if value != [None, None]}  # drops missing components
        if self.heun or not isinstance(self.scheduler, EULER_SCHEDULERS):
            index.pop("heun", None)  # it is the default, or has no effect
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        target = Path(save_directory, "diffit_pipeline.py")
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)
