# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The plan of a training: everything derived from its config, data and processes, computed once by pure functions.

Flags that contradict each other, the model config or the data are refused here, before anything slow happens.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import ModelMixin

from diffit.augment import NUM_AUGMENT_LABELS
from diffit.config import BatchConfig, ModelConfig, ScheduleConfig, TrainConfig, ValidationConfig
from diffit.decode import warn_about_narrow_levels
from diffit.diffusion_config import DiffusionConfig
from diffit.errors import UserError, user_errors
from diffit.formulations import Formulation, choose_formulation, differences, formulation_flags
from diffit.latents import LatentTable
from diffit.networks import model_class, model_overrides, training_flops_per_image
from diffit.run_dir import listed
from diffit.sources import Table, detect_num_channels
from diffit_model import DiffiTModelMixin, DiffiTTransformer2DModel, DiffiTUNet2DModel
from diffit_pipeline import Autoencoder, latent_channels, pixels_per_latent

logger = get_logger(__name__, log_level="INFO")

WARMUP_STEPS = 500  # default length of the warm-up, in optimizer steps


@dataclass(frozen=True)
class DataFacts:
    """The facts about the training data that a plan depends on.

    Attributes:
        source: name of the data in messages.
        num_images: number of training images, without held-out ones.
        digest: checksum of the images and labels.
        class_names: names of the classes, or None if the data has no labels.
        num_channels: number of image channels, or None for prepared latents.
        prepared_resolution: height and width in pixels of the images that latents were prepared from, or None for
            images.
    """

    source: str
    num_images: int
    digest: str
    class_names: tuple[str, ...] | None
    num_channels: int | None
    prepared_resolution: tuple[int, int] | None = None


@dataclass(frozen=True)
class VaeFacts:
    """The facts about a VAE that a plan depends on.

    Attributes:
        pixels_per_latent: downsampling factor along a side.
        image_channels: number of channels of its images.
        latent_channels: number of channels of its latents.
    """

    pixels_per_latent: int
    image_channels: int
    latent_channels: int


@dataclass(frozen=True)
class BatchPlan:
    """Images per optimizer step: `total` = `per_process` x `num_processes` x `accumulation` (micro-batches)."""

    per_process: int
    num_processes: int
    accumulation: int

    @property
    def total(self) -> int:
        return self.per_process * self.num_processes * self.accumulation


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether periodic work is due after an optimizer step: every `every` steps, and after the last one."""
    return step % every == 0 or step == last_step


@dataclass(frozen=True)
class Due:
    """The periodic work that is due after an optimizer step."""

    log: bool
    checkpoint: bool
    validation: bool
    metrics: bool
    stop: bool

    def __bool__(self) -> bool:
        return self.log or self.checkpoint or self.validation or self.stop


@dataclass(frozen=True)
class Plan:
    """Everything that is derived from a training's config, data and processes.

    Attributes:
        batch: images per optimizer step.
        formulation: noise levels, network inputs and loss.
        resolution: height and width of the images in pixels.
        num_channels: number of channels to convert images to, or None to keep those of the images.
        model_config: the network's complete config.
        class_names: names of the classes to condition on, or None for an unconditional training.
        max_train_steps: length of the training in optimizer steps.
        warmup_steps: length of the warm-up in optimizer steps.
        decay_steps: length of the final decay in optimizer steps, or None without one.
        periods: optimizer steps between logs, checkpoints, validations and metrics; None means never.
        num_images: number of training images.
        num_workers: number of processes that load images, per training process.
    """

    batch: BatchPlan
    formulation: Formulation
    resolution: tuple[int, int]
    num_channels: int | None
    model_config: dict[str, Any]
    class_names: tuple[str, ...] | None
    max_train_steps: int
    warmup_steps: int
    decay_steps: int | None
    periods: dict[str, int | None]
    num_images: int
    num_workers: int

    def due_after(self, step: int, stopping: bool = False) -> Due:
        """The periodic work that is due after an optimizer step. After the last step, all of it is.

        Args:
            step: number of the optimizer step, counted from 1.
            stopping: whether the processes have agreed to stop, in which case a checkpoint is due.
        """
        due = {
            name: every is not None and is_due(step, every, self.max_train_steps)
            for name, every in self.periods.items()
        }
        due["checkpoint"] |= stopping
        due["validation"] |= due["metrics"]
        return Due(**due, stop=stopping and step != self.max_train_steps)

    def agreement(self, data: DataFacts) -> dict[str, Any]:
        """The values that must be the same in all processes, by names that the user understands."""
        inherited = {"the noise schedule": dict(self.formulation.inherited)}
        return self.resolved_flags() | inherited | {"the training data": data.digest, "the network": self.model_config}

    def resolved_flags(self) -> dict[str, Any]:
        """The values that flags take if they were not given, as saved with the run."""
        sizes = {"resolution": list(self.resolution), "num_channels": self.num_channels}
        steps = {"global_batch_size": self.batch.total, "lr_warmup_steps": self.warmup_steps}
        return formulation_flags(self.formulation) | sizes | steps


def plan_batch(asked: BatchConfig, num_processes: int) -> BatchPlan:
    """Distributes the images of an optimizer step over processes and micro-batches.

    Raises:
        UserError: if --global_batch_size is not a multiple of --train_batch_size x processes.
    """
    images = asked.train_batch_size * num_processes
    if asked.global_batch_size is None:
        return BatchPlan(asked.train_batch_size, num_processes, asked.gradient_accumulation_steps or 1)
    if asked.global_batch_size % images != 0:
        raise UserError(
            f"--global_batch_size {asked.global_batch_size} is not a multiple of --train_batch_size "
            f"{asked.train_batch_size} x {num_processes} processes"
        )
    return BatchPlan(asked.train_batch_size, num_processes, asked.global_batch_size // images)


def plan_formulation(
    asked: DiffusionConfig, model: ModelConfig, validation: ValidationConfig, pretrained: dict[str, Any]
) -> Formulation:
    """The training formulation.

    Args:
        asked: the flags of the formulation.
        model: its VAE flag says whether the network denoises latents.
        validation: its number of sampling steps is checked.
        pretrained: config of the pretrained pipeline's scheduler (see `read_pretrained_scheduler`), or empty.

    Raises:
        UserError: if a flag belongs to another formulation, or previews take more steps than there are timesteps.
    """
    name = model.pretrained_model_name_or_path
    with user_errors(f"--pretrained_model_name_or_path {name}", ValueError):
        formulation = choose_formulation(asked, pretrained, model.vae_model_name_or_path is not None)
    if formulation.inherited:
        logger.info(f"noise schedule of {name}: {formulation.describe()}")
    flags = {"formulation", *formulation.flag_names()}
    for setting, (theirs, ours) in differences(formulation, pretrained).items():
        # Pretrained weights rarely transfer to another prediction target or noise schedule.
        setting = f"--{setting}" if setting in flags else setting
        logger.warning(f"{name} was trained with {setting} {theirs}, but this run uses {ours}")
    preview_steps, most = validation.validation_inference_steps, formulation.max_sampling_steps
    if most is not None and preview_steps > most:
        raise UserError(f"--validation_inference_steps {preview_steps} is more than --num_train_timesteps {most}")
    return formulation


def to_steps(
    batch_size: int,
    num_images: int,
    steps: int | None = None,
    epochs: float | None = None,
    kimg: float | None = None,
) -> int | None:
    """Converts a duration to optimizer steps, rounded up; None if all three durations are None.

    Args:
        batch_size: images per optimizer step.
        num_images: images per epoch.
        steps: the duration in optimizer steps.
        epochs: the duration in epochs.
        kimg: the duration in thousands of images.
    """
    if epochs is not None:
        return math.ceil(epochs * num_images / batch_size)
    if kimg is not None:
        return math.ceil(kimg * 1000 / batch_size)
    return steps


def plan_schedule(asked: ScheduleConfig, max_train_steps: int, batch: BatchPlan) -> tuple[int, int | None]:
    """The lengths of the warm-up and of the final decay (None without one) in optimizer steps.

    Raises:
        UserError: if together they are longer than the training.
    """
    warmup = to_steps(batch.total, 0, asked.lr_warmup_steps, kimg=asked.lr_warmup_kimg)
    warmup = WARMUP_STEPS if warmup is None else warmup
    decay = to_steps(batch.total, 0, asked.lr_decay_steps, kimg=asked.lr_decay_kimg)
    if decay is not None and warmup + decay > max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} are longer than the training "
            f"({max_train_steps} steps)"
        )
    if asked.lr_scheduler == "polynomial" and warmup >= max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {warmup} must be less than the length of the training ({max_train_steps} steps) with "
            "--lr_scheduler polynomial"
        )
    if warmup >= max_train_steps and asked.lr_scheduler not in ("constant", "piecewise_constant"):
        logger.warning(
            f"--lr_warmup_steps {warmup} is not shorter than the training ({max_train_steps} steps): the learning "
            f"rate only reaches {(max_train_steps - 1) / max(warmup, 1):.2g} of --learning_rate"
        )
    return warmup, decay


def make_plan(
    config: TrainConfig,
    model_config: dict[str, Any],
    batch: BatchPlan,
    formulation: Formulation,
    data: DataFacts,
    vae: VaeFacts | None = None,
    num_workers: int = 0,
) -> Plan:
    """Derives the plan of a training.

    Args:
        config: the flags.
        model_config: the network's config as given (see `read_model_config`).
        batch: see `plan_batch`.
        formulation: see `plan_formulation`.
        data: the facts about the training images or latents.
        vae: the facts about a latent-space model's VAE, or None.
        num_workers: see `count_workers`.

    Raises:
        UserError: names the flags or model config fields that contradict each other or the data.
    """
    if config.data.class_conditional and data.class_names is None:
        raise UserError(f"--class_conditional: {data.source} has no labels")
    factor = 1 if vae is None else vae.pixels_per_latent
    resolution = plan_resolution(config.data.resolution, model_config.get("sample_size"), data, factor)
    class_names = data.class_names if config.data.class_conditional else None
    durations = (config.batch.max_train_steps, config.batch.num_train_epochs, config.batch.max_train_kimg)
    max_train_steps = to_steps(batch.total, data.num_images, *durations)
    warmup_steps, decay_steps = plan_schedule(config.schedule, max_train_steps, batch)
    height, width = (side // factor for side in resolution)
    complete = model_config | {"sample_size": height if height == width else [height, width]}
    complete |= plan_channels(complete, config.data.num_channels, data, vae, config.model)
    if complete["out_channels"] > complete["in_channels"]:
        check_learned_variance(complete["out_channels"], formulation)
    complete |= plan_classes(complete, class_names, config.model.pretrained_model_name_or_path is not None)
    if config.data.augmentation_probability > 0:
        complete |= plan_augmentation(complete)
    check_network(complete, config.model, resolution, (height, width))
    return Plan(
        batch=batch,
        formulation=formulation.for_input(complete["in_channels"], height, width),
        resolution=resolution,
        num_channels=config.data.num_channels if vae is None else vae.image_channels,
        model_config=complete,
        class_names=class_names,
        max_train_steps=max_train_steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        periods={
            "log": config.run.logging_steps,
            "checkpoint": config.run.checkpointing_steps,
            "validation": config.validation.validation_steps,
            "metrics": config.metrics.eval_steps,
        },
        num_images=data.num_images,
        num_workers=num_workers,
    )


def plan_augmentation(complete: dict[str, Any]) -> dict[str, int]:
    """The field of the model config that conditions the network on the augmentation.

    Raises:
        UserError: if the network cannot be conditioned on it.
    """
    if not issubclass(model_class(complete), DiffiTUNet2DModel):
        raise UserError("--augmentation_probability needs a DiffiTUNet2DModel, which is conditioned on it")
    return {"num_augment_labels": NUM_AUGMENT_LABELS}


def plan_resolution(
    asked: tuple[int, int] | None, sample_size: int | list[int] | None, data: DataFacts, factor: int
) -> tuple[int, int]:
    """Height and width of the images in pixels: --resolution, that of prepared latents, or the model config's.

    Args:
        asked: --resolution, or None.
        sample_size: the model config's field, in latents if there is a VAE.
        data: the facts about the training data.
        factor: pixels per latent along a side, 1 without a VAE.

    Raises:
        UserError: if the three contradict each other, or the resolution is not a multiple of `factor`.
    """
    if data.prepared_resolution is not None and asked not in (None, data.prepared_resolution):
        raise UserError(f"--resolution {asked}: {data.source} was prepared at {data.prepared_resolution} pixels")
    resolution = asked or data.prepared_resolution
    if resolution is None:
        if sample_size is None:
            raise UserError("give --resolution, because the model config has no sample_size")
        sides = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
        resolution = tuple(factor * side for side in sides)
    if any(side % factor for side in resolution):
        raise UserError(
            f"{_resolution_flag(resolution)}: height and width must be multiples of {factor}, the pixels per latent"
        )
    return resolution


def _resolution_flag(resolution: tuple[int, int]) -> str:
    return f"--resolution {'x'.join(map(str, resolution))}"


def plan_channels(
    model_config: dict[str, Any], asked: int | None, data: DataFacts, vae: VaeFacts | None, model: ModelConfig
) -> dict[str, int]:
    """The network's `in_channels` and `out_channels`, which must match the images or latents.

    A transformer may have twice the output channels, the second half for a learned variance.

    Raises:
        UserError: if the model config, --num_channels, the data and the VAE contradict each other.
    """
    is_transformer = issubclass(model_class(model_config), DiffiTTransformer2DModel)
    if vae is None:
        if is_transformer:
            raise UserError("a transformer trains in latent space: give --vae_model_name_or_path")
        channels = asked or data.num_channels
        reason = f"the images of {data.source} have {channels}; give --num_channels {model_config.get('in_channels')}"
    else:
        if asked not in (None, vae.image_channels):
            raise UserError(f"--num_channels {asked}: the VAE encodes images with {vae.image_channels} channels")
        channels = vae.latent_channels
        reason = f"the latents of {model.vae_model_name_or_path} have {channels}; give another VAE"
    allowed = {"in_channels": [channels], "out_channels": [channels, 2 * channels] if is_transformer else [channels]}
    chosen = {}
    for key, values in allowed.items():
        chosen[key] = channels if model_config.get(key) is None else model_config[key]
        if chosen[key] not in values:
            raise UserError(f"the model config has {key} {chosen[key]}, but {reason} or another model config")
    return chosen


def check_learned_variance(out_channels: int, formulation: Formulation) -> None:
    """Refuses a network with a learned variance unless the formulation supports it."""
    if not formulation.can_learn_variance:
        raise UserError(
            f"the model config has out_channels {out_channels} for a learned variance, which needs --formulation ddpm "
            "--prediction_type epsilon; to train without it, give --model_kwargs out_channels=..."
        )


def plan_classes(
    model_config: dict[str, Any], class_names: tuple[str, ...] | None, is_pretrained: bool
) -> dict[str, int | None]:
    """The network's number of classes, as a model config field.

    Raises:
        UserError: if the model config has another number and no pretrained weights are to be adapted.
    """
    is_transformer = issubclass(model_class(model_config), DiffiTTransformer2DModel)
    key = "num_embeds_ada_norm" if is_transformer else "num_class_embeds"
    extra_row = 1 if class_names and model_config.get("_class_name") == "UNet2DModel" else 0  # see `null_label`
    number = len(class_names) + extra_row if class_names else None
    if model_config.get(key) not in (None, number) and not is_pretrained:
        raise UserError(
            f"the model config has {key} {model_config[key]}, but the data has {number} "
            f"(--class_conditional is {class_names is not None})"
        )
    return {key: number}


def check_overrides(model_config: dict[str, Any], model: ModelConfig) -> None:
    """Refuses a --model_kwargs that the data or another flag determines otherwise.

    Args:
        model_config: the network's complete config.
        model: the flags.

    Raises:
        UserError: names the field, with both values.
    """
    for key, value in model_overrides(model).items():
        planned = model_config[key]
        if key == "sample_size" and isinstance(planned, int) and isinstance(value, list):
            planned = [planned, planned]
        if planned != value:
            raise UserError(f"--model_kwargs {key}={value}: the data and the other flags need {key}={planned}")


def check_network(
    model_config: dict[str, Any], model: ModelConfig, resolution: tuple[int, int], size: tuple[int, int]
) -> None:
    """Refuses a model config that the network's constructor refuses, or a size that it cannot divide.

    Args:
        model_config: the network's complete config.
        model: the flags, for messages.
        resolution: height and width in pixels, for messages.
        size: height and width in pixels, or in latents for a latent-space network.

    Raises:
        UserError: with the network's own message, or see `check_overrides`.
    """
    check_overrides(model_config, model)
    described_by = "--model_config" if model.model_config else "--pretrained_model_name_or_path"
    with torch.device("meta"), user_errors(f"{described_by} with --model_kwargs", ValueError):
        network = model_class(model_config).from_config(model_config)
    if isinstance(network, DiffiTModelMixin):
        with user_errors(_resolution_flag(resolution), ValueError):
            network.check_size(*size)


# ---------------------------------------------------------------------------------------------------------------------
# Facts about the data and the VAE; descriptions for people


def describe_data(table: Table, vae: Autoencoder | None, num_channels: int | None) -> DataFacts:
    """The facts about training data. Opens some images to detect their channels unless --num_channels gives them.

    Args:
        table: the training images or latents.
        vae: a latent-space model's VAE, which determines the channels, or None.
        num_channels: --num_channels, or None.
    """
    names = None if table.class_names is None else tuple(table.class_names)
    if isinstance(table, LatentTable):
        return DataFacts(
            table.source, len(table), table.data_digest(), names, None, tuple(table.metadata["resolution"])
        )
    warn_about_narrow_levels(table)
    if vae is not None:
        if num_channels is None and detect_num_channels(table) > vae.config.in_channels:
            logger.warning(
                f"{table.source} has more channels than the VAE ({vae.config.in_channels}): colors are dropped"
            )
        num_channels = vae.config.in_channels
    return DataFacts(table.source, len(table), table.data_digest(), names, num_channels or detect_num_channels(table))


def describe_vae(vae: Autoencoder | None) -> VaeFacts | None:
    """The facts about a VAE, which may be on the meta device; None without a VAE."""
    if vae is None:
        return None
    return VaeFacts(pixels_per_latent(vae), vae.config.in_channels, latent_channels(vae))


def describe_run(plan: Plan, model: ModelMixin, table: Table, num_held_out: int) -> str:
    """One line for the log: network, data, and length of the training."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = plan.max_train_steps * plan.batch.total / plan.num_images
    held_out = f", {num_held_out:,} held out" if num_held_out else ""
    text = (
        f"{type(model).__name__} with {num_parameters:,} parameters; {plan.num_images:,} images of "
        f"{'x'.join(map(str, plan.resolution))} pixels, {model.config.in_channels} channels{held_out}; "
        f"{plan.max_train_steps:,} steps of {plan.batch.total} images ({plan.batch.per_process} x "
        f"{plan.batch.num_processes} processes x {plan.batch.accumulation} accumulation), {epochs:.1f} epochs; "
        f"{plan.num_workers} data-loader workers per process"
    )
    if table.class_names is not None and plan.class_names is None:
        text += f"; {table.source} has {len(table.class_names)} classes, which only --class_conditional uses"
    if plan.class_names is not None:
        empty = sorted(set(range(len(plan.class_names))) - set(table.labels[table.indices].tolist()))
        if empty:
            names = listed([repr(plan.class_names[index]) for index in empty])
            text += f"; {len(empty)} of {len(plan.class_names)} classes have no image, yet can be sampled: {names}"
    return text


def print_dry_run(
    accelerator: Accelerator, flags: dict[str, Any], plan: Plan, table: Table, held_out: Table | None
) -> None:
    """Prints and logs the run's flags, parameters, FLOPs and sizes in the main process.

    The network is not allocated.
    """
    with torch.device("meta"):
        model = model_class(plan.model_config).from_config(plan.model_config)
    if accelerator.is_main_process:
        print(yaml.safe_dump(flags), end="")
        print(f"model_config_resolved: {json.dumps(plan.model_config)}")
        print(f"dataloader_num_workers_resolved: {plan.num_workers}")
        print(f"parameters: {sum(parameter.numel() for parameter in model.parameters())}")
        print(f"training_flops_per_image: {training_flops_per_image(plan.model_config)}")
    logger.info(describe_run(plan, model, table, 0 if held_out is None else len(held_out)))
