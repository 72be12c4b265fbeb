# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sampling, from a folder to pixels: used by sample_diffit.py, eval_diffit.py and the previews of training."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel

from diffit.cpu_kernels import kernelize
from diffit.errors import RunError, UserError, load_model, user_errors
from diffit.formulations import Formulation, formulation_of
from diffit.latents import load_vae
from diffit.networks import model_class, set_attention_backend
from diffit.pretrained import check_weights, checkpoint_weights
from diffit.sampling_config import SamplingConfig
from diffit_pipeline import (
    FORWARD_PROCESS,
    Autoencoder,
    DiffiTPipeline,
    NonFiniteImagesError,
    check_id2label,
    choose_scheduler,
    load_network,
    null_label,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteSamplesError(RunError):
    """The images of some seeds have NaN or infinite values; see `NonFiniteImagesError`."""

    raised_in = "process"  # the others sample other seeds

    def __init__(self, message: str, weights_are_finite: bool):
        super().__init__(message)
        self.weights_are_finite = weights_are_finite


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def resolve_scheduler(sampling: SamplingConfig, model_path: str) -> SamplingConfig:
    """Fills in the default of `scheduler`, which depends on the model.

    Args:
        sampling: the settings as requested.
        model_path: pipeline folder, checkpoint or hub name, with `scheduler/`.

    Raises:
        UserError: names the flag that this kind of model does not have.
    """
    if Path(model_path).is_file():
        raise UserError(f"--model_path {model_path} is a file: give the folder of the pipeline")
    what = f"--model_path {model_path}: cannot load a pipeline"
    with user_errors("--scheduler", ValueError), user_errors(what, OSError, TypeError, AttributeError, KeyError):
        return dataclasses.replace(sampling, scheduler=choose_scheduler(model_path, sampling.scheduler))


def load_pipeline(model_path: str, sampling: SamplingConfig, weights: str | None = None) -> DiffiTPipeline:
    """Loads a pipeline on the CPU, and refuses settings that the model cannot be sampled with.

    Args:
        model_path: pipeline folder, `checkpoint-N` of a run, or hub name.
        sampling: see `resolve_scheduler`.
        weights: folder of the network in a checkpoint; default: its first average, such as `unet_ema`.

    Raises:
        UserError: names the flag that cannot be satisfied.
    """
    vae = None
    if sampling.vae is not None:
        vae = load_vae(sampling.vae, "--vae")
    what = f"--model_path {model_path}: cannot load a pipeline"
    if Path(model_path, "state.json").is_file():
        pipeline = load_model(what, _load_checkpoint, model_path, sampling, weights, vae)
    elif weights is not None:
        raise UserError(f"--weights {weights} needs checkpoints, --model_path {model_path} is a pipeline")
    else:
        arguments = (model_path, model_class, sampling.scheduler, DTYPES[sampling.dtype], vae)
        pipeline = load_model(what, DiffiTPipeline.from_folder, *arguments)
    check_sampling(pipeline, sampling, model_path)
    return pipeline


def _load_checkpoint(
    model_path: str, sampling: SamplingConfig, weights: str | None, vae: Autoencoder | None
) -> DiffiTPipeline:
    """The pipeline of a checkpoint, with the classes and the VAE of the run that it belongs to."""
    weights = weights or checkpoint_weights(Path(model_path))
    check_weights(f"--model_path {model_path}", Path(model_path, weights).absolute())
    network_class = model_class(UNet2DModel.load_config(model_path, subfolder=weights))
    network = network_class.from_pretrained(
        model_path, subfolder=weights, torch_dtype=DTYPES[sampling.dtype], use_safetensors=True
    )
    run = Path(model_path).parent  # holds the trained pipeline, which has the names of the classes and the VAE
    if vae is None and (run / "vae").is_dir():
        vae = load_vae(str(run / "vae"), f"--model_path {model_path}: vae")
    pipeline = DiffiTPipeline.from_folder(model_path, model_class, sampling.scheduler, vae=vae, network=network)
    index = run / "model_index.json"
    id2label = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    check_id2label(id2label)
    pipeline.register_to_config(id2label=id2label)
    return pipeline


def check_sampling(pipeline: DiffiTPipeline, sampling: SamplingConfig, model_path: str) -> None:
    """Refuses settings that a model cannot be sampled with.

    Args:
        pipeline: the model.
        sampling: the settings.
        model_path: path of the model, for messages.

    Raises:
        UserError: names the flag.
    """
    if sampling.vae is not None and pipeline.transformer is None:
        raise UserError(f"--vae is for latent-space models, --model_path {model_path} is a pixel-space model")
    if sampling.vae is None and pipeline.transformer is not None and pipeline.vae is None:
        raise UserError(f"--model_path {model_path} is a latent-space model without vae/: --vae must name one")
    check_steps(sampling.num_inference_steps, formulation_of(pipeline.scheduler), model_path)
    guidance = sampling.guidance
    with user_errors("--guidance_channels", ValueError):
        pipeline.check_guidance(guidance.channels, None)
    if guidance.scale != 1 and guidance.model is None and null_label(pipeline.network) is None:
        raise UserError(
            f"--guidance_scale {guidance.scale} needs --guidance_model, as --model_path {model_path} is unconditional"
        )


def check_steps(
    num_inference_steps: int, formulation: Formulation, model_path: str, flag: str = "--num_inference_steps"
) -> None:
    """Refuses more sampling steps than the model has timesteps.

    Args:
        num_inference_steps: sampling steps.
        formulation: the model's formulation.
        model_path: path of the model, for messages.
        flag: flag that sets the steps, for messages.

    Raises:
        UserError: names the flag.
    """
    max_steps = formulation.max_sampling_steps
    if max_steps is not None and num_inference_steps > max_steps:
        raise UserError(f"{flag} {num_inference_steps} exceeds the {max_steps} timesteps of --model_path {model_path}")


def load_guidance_model(
    path: str | None,
    network: ModelMixin,
    scheduler_config: Mapping,
    dtype: torch.dtype = torch.float32,
    flag: str = "--guidance_model",
) -> ModelMixin | None:
    """Loads the weaker model of autoguidance on the CPU, ready for inference; None without a path.

    Args:
        path: pipeline folder or hub name.
        network: the model that is guided.
        scheduler_config: scheduler config of the guided model, which says how it was trained.
        dtype: dtype of the weights.
        flag: that names the path, for messages.

    Raises:
        UserError: names the flag if there is no such model, or it was trained for another task.
    """
    if path is None:
        return None
    what = f"{flag} {path}: cannot load a pipeline"
    guidance_model = load_model(what, load_network, path, model_class, dtype)
    with user_errors(what, Exception):
        its_scheduler_config = DDPMScheduler.load_config(path, subfolder="scheduler")
    pairs = [(f"{key} {{}}", scheduler_config.get(key), its_scheduler_config.get(key)) for key in FORWARD_PROCESS]
    pairs += [
        ("{} input channels", network.config.in_channels, guidance_model.config.in_channels),
        ("{} output channels", network.config.out_channels, guidance_model.config.out_channels),
        ("sample_size {}", network.config.sample_size, guidance_model.config.sample_size),
        ("{} classes", null_label(network), null_label(guidance_model)),
    ]
    for text, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(f"{flag} {path} has {text.format(theirs)}, the guided model {ours}: they must be equal")
    return guidance_model.requires_grad_(False).eval()


def load_sampler(
    model_path: str, sampling: SamplingConfig, device: torch.device, weights: str | None = None
) -> tuple[DiffiTPipeline, ModelMixin | None]:
    """Loads a pipeline and, for autoguidance, the weaker model, both ready to sample on a device.

    Args:
        model_path: see `load_pipeline`.
        sampling: see `resolve_scheduler`.
        device: for the networks.
        weights: see `load_pipeline`.

    Raises:
        UserError: names the flag that cannot be satisfied.
    """
    pipeline = load_pipeline(model_path, sampling, weights)
    scheduler_config = DDPMScheduler.load_config(model_path, subfolder="scheduler")
    guidance_model = load_guidance_model(
        sampling.guidance.model, pipeline.network, scheduler_config, DTYPES[sampling.dtype]
    )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.network, guidance_model):
        if network is None:
            continue
        network.to(device)
        with user_errors(f"--attention_backend {sampling.attention_backend}", ValueError, ImportError):
            set_attention_backend(network, sampling.attention_backend)
        kernelize(network)
    return pipeline, guidance_model


def parse_class_labels(pipeline: DiffiTPipeline, text: str) -> list[int]:
    """Class numbers from --class_labels: numbers or names, separated by commas, or `all`.

    Raises:
        UserError: names the label that does not exist.
    """
    labels = [label.strip() for label in text.split(",")]
    if text == "all":
        labels = torch.arange(null_label(pipeline.network) or 0)  # indices, whatever the classes are called
    with user_errors(f"--class_labels {text}", ValueError):
        return pipeline.label_ids(labels)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_seeds(
    pipeline: DiffiTPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    sampling: SamplingConfig,
    batch_size: int,
    guidance_model: ModelMixin | None = None,
    pad: bool = True,
) -> Iterator[np.ndarray]:
    """Samples an image for each seed, batch by batch. The noise of a seed depends on the seed alone.

    Args:
        pipeline: on the device that is to compute.
        seeds: one for each image.
        labels: class number of each image; None: no class.
        sampling: the settings; `vae`, `guidance.model`, `dtype` and `attention_backend` are ignored, as the models are
            loaded already.
        batch_size: images per forward pass.
        guidance_model: the weaker model of autoguidance, on the same device.
        pad: fill up the last batch, so that every image is computed at the same batch size: rounding depends on it.

    Yields:
        uint8, shape (B, H, W, C), where B is `batch_size` but for the last batch.

    Raises:
        NonFiniteSamplesError: names the seeds whose images have NaN or infinite values.
    """
    guidance = sampling.guidance
    for start in range(0, len(seeds), batch_size):
        indices = list(range(start, min(start + batch_size, len(seeds))))
        num_images = len(indices)
        if pad:
            indices += indices[-1:] * (batch_size - num_images)
        try:
            images = pipeline(
                class_labels=None if labels is None else torch.tensor([labels[i] for i in indices]),
                batch_size=len(indices),
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=guidance.scale,
                guidance_schedule=guidance.schedule,
                guidance_power=guidance.power,
                guidance_interval=guidance.interval,
                guidance_channels=guidance.channels,
                guidance_model=guidance_model,
                eta=sampling.eta,
                s_churn=sampling.s_churn,
                s_tmin=sampling.s_tmin,
                s_tmax=math.inf if sampling.s_tmax is None else sampling.s_tmax,
                s_noise=sampling.s_noise,
                generator=[torch.Generator().manual_seed(seeds[i]) for i in indices],
                output_type="np",
            ).images  # (B, H, W, C) in [0, 1]
        except NonFiniteImagesError as error:
            raise NonFiniteSamplesError(str(error), error.weights_are_finite) from error
        yield (images[:num_images] * 255).round().astype(np.uint8)
