# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What follows from a training's config, its data and its processes: computed once, by pure functions, and frozen.

All refusals across concerns are made here, before anything slow happens.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, ModelMixin

from diffit.augment import NUM_AUGMENT_LABELS
from diffit.config import BatchConfig, DiffusionConfig, ModelConfig, ScheduleConfig, TrainConfig, ValidationConfig
from diffit.errors import UserError, user_errors
from diffit.formulations import Formulation, choose_formulation, differences, formulation_flags
from diffit.latents import LatentTable, pixels_per_latent
from diffit.networks import model_class, training_flops_per_image
from diffit.sources import Table, detect_num_channels
from diffit_model import DiffiTModelMixin, DiffiTTransformer2DModel, DiffiTUNet2DModel

logger = get_logger(__name__, log_level="INFO")

WARMUP_STEPS = 500  # length of the warm-up unless it is given


@dataclass(frozen=True)
class DataFacts:
    """What a plan needs to know of the training data.

    Attributes:
        source: where the data comes from, for messages.
        num_images: without those that are held out.
        digest: of the images and labels.
        class_names: of the labels, or None if the data has none.
        num_channels: of the images, or None for prepared latents.
        prepared_resolution: height and width of the images that prepared latents were made from, otherwise None.
    """

    source: str
    num_images: int
    digest: str
    class_names: tuple[str, ...] | None
    num_channels: int | None
    prepared_resolution: tuple[int, int] | None = None


@dataclass(frozen=True)
class VaeFacts:
    """What a plan needs to know of a VAE.

    Attributes:
        pixels_per_latent: along a side.
        image_channels, latent_channels: of its images, and of its latents.
    """

    pixels_per_latent: int
    image_channels: int
    latent_channels: int


@dataclass(frozen=True)
class BatchPlan:
    """How the images of an optimizer step are spread: `total` = `per_process` x `num_processes` x `accumulation`."""

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
    """The periodic work that follows an optimizer step."""

    log: bool
    checkpoint: bool
    validation: bool
    metrics: bool
    stop: bool

    def __bool__(self) -> bool:
        return self.log or self.checkpoint or self.validation or self.stop


@dataclass(frozen=True)
class Plan:
    """Everything about a training that follows from what was asked.

    Attributes:
        batch: images per optimizer step.
        formulation: noise levels, network inputs and loss.
        resolution: height and width of the images in pixels.
        num_channels: of the images, or None to take each image as it is.
        model_config: complete config of the network.
        class_names: of the labels that are trained on, or None.
        max_train_steps, warmup_steps, decay_steps: in optimizer steps; the last is None without a final decay.
        periods: optimizer steps between two logs, checkpoints, validations and metrics; None for no metrics.
        num_images: in the training data.
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

    def due_after(self, step: int, stopping: bool = False) -> Due:
        """The periodic work that is due after an optimizer step, counted from 1; all of it is after the last one.

        Args:
            step: of the training.
            stopping: whether the processes have agreed to stop, which saves a checkpoint.
        """
        due = {
            name: every is not None and is_due(step, every, self.max_train_steps)
            for name, every in self.periods.items()
        }
        due["checkpoint"] |= stopping
        due["validation"] |= due["metrics"]
        return Due(**due, stop=stopping and step != self.max_train_steps)

    def agreement(self, data: DataFacts) -> dict[str, Any]:
        """What must be the same in all processes, by names that mean something to the user."""
        return self.resolved_flags() | {"the training data": data.digest, "the network": self.model_config}

    def resolved_flags(self) -> dict[str, Any]:
        """Values of flags for when they were not given, as they are saved with a run."""
        sizes = {"resolution": list(self.resolution), "num_channels": self.num_channels}
        steps = {"global_batch_size": self.batch.total, "lr_warmup_steps": self.warmup_steps}
        return formulation_flags(self.formulation) | sizes | steps


def plan_batch(asked: BatchConfig, num_processes: int) -> BatchPlan:
    """How the images of an optimizer step are spread over processes and micro-batches.

    Raises:
        UserError: if --global_batch_size cannot be divided that way.
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
    """The formulation of the training.

    Args:
        asked: the flags.
        model: says whether the network denoises latents.
        validation: takes some denoising steps for its previews.
        pretrained: config of the pretrained pipeline's scheduler (see `read_pretrained_scheduler`), or empty.

    Raises:
        UserError: if flags of one formulation are given with another, or the previews take more steps than there are
            timesteps.
    """
    formulation = choose_formulation(asked, pretrained, model.vae_model_name_or_path is not None)
    name = model.pretrained_model_name_or_path
    for flag, (theirs, ours) in differences(formulation, pretrained).items():
        # Pretrained weights rarely transfer to another target or noise schedule.
        logger.warning(f"{name} was trained with --{flag} {theirs}, this run has {ours}")
    preview_steps, most = validation.validation_inference_steps, formulation.max_sampling_steps
    if most is not None and preview_steps > most:
        raise UserError(f"--validation_inference_steps {preview_steps} are more than --num_train_timesteps {most}")
    return formulation


def to_steps(
    batch_size: int,
    num_images: int,
    steps: int | None = None,
    epochs: float | None = None,
    kimg: float | None = None,
) -> int | None:
    """A duration in optimizer steps, rounded up; None if it is given in no unit.

    Args:
        batch_size: images per optimizer step.
        num_images: per epoch.
        steps, epochs, kimg: the duration in one of these units; a kimg is a thousand images.
    """
    if epochs is not None:
        return math.ceil(epochs * num_images / batch_size)
    if kimg is not None:
        return math.ceil(kimg * 1000 / batch_size)
    return steps


def plan_schedule(asked: ScheduleConfig, max_train_steps: int, batch: BatchPlan) -> tuple[int, int | None]:
    """Lengths of the warm-up and of the final decay in optimizer steps.

    Raises:
        UserError: if they are longer than the training.
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
            f"--lr_warmup_steps {warmup} must be less than the {max_train_steps} optimizer steps with --lr_scheduler "
            "polynomial"
        )
    return warmup, decay


def make_plan(
    config: TrainConfig,
    model_config: dict[str, Any],
    batch: BatchPlan,
    formulation: Formulation,
    data: DataFacts,
    vae: VaeFacts | None = None,
) -> Plan:
    """Everything that follows from a config and its data.

    Args:
        config: as asked.
        model_config: of the network, as asked (see `read_model_config`).
        batch: see `plan_batch`.
        formulation: see `plan_formulation`.
        data: the training images, or their latents.
        vae: of a latent-space model.

    Raises:
        UserError: names the flags or fields that do not go together, or do not fit the data.
    """
    if config.data.class_conditional and data.class_names is None:
        raise UserError(f"--class_conditional: {data.source} has no labels")
    factor = 1 if vae is None else vae.pixels_per_latent
    resolution = plan_resolution(config.data.resolution, model_config.get("sample_size"), data, factor)
    class_names = data.class_names if config.data.class_conditional else None
    length = config.batch
    max_train_steps = to_steps(
        *(batch.total, data.num_images), length.max_train_steps, length.num_train_epochs, length.max_train_kimg
    )
    warmup_steps, decay_steps = plan_schedule(config.schedule, max_train_steps, batch)
    height, width = (side // factor for side in resolution)
    complete = model_config | {"sample_size": height if height == width else [height, width]}
    complete |= plan_channels(complete, config.data.num_channels, data, vae, config.model)
    if complete["out_channels"] > complete["in_channels"]:
        check_learned_variance(complete["out_channels"], formulation)
    complete |= plan_classes(complete, class_names, config.model.pretrained_model_name_or_path is not None)
    if config.data.augmentation_probability > 0:
        if not issubclass(model_class(complete), DiffiTUNet2DModel):
            raise UserError("--augmentation_probability needs a DiffiTUNet2DModel, which is told the transforms")
        complete["num_augment_labels"] = NUM_AUGMENT_LABELS
    check_network(complete, config.model, resolution, (height, width))
    return Plan(
        batch=batch,
        formulation=formulation,
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
    )


def plan_resolution(
    asked: tuple[int, int] | None, sample_size: int | list[int] | None, data: DataFacts, factor: int
) -> tuple[int, int]:
    """Height and width of the images in pixels: as asked, of the prepared latents, or as the model config says.

    Args:
        asked: --resolution.
        sample_size: of the model config, in latents if there is a VAE.
        data: the training data.
        factor: pixels per latent along a side, 1 without a VAE.
    """
    if data.prepared_resolution is not None and asked not in (None, data.prepared_resolution):
        raise UserError(f"--resolution {asked}: {data.source} was made from images of {data.prepared_resolution}")
    resolution = asked or data.prepared_resolution
    if resolution is None:
        if sample_size is None:
            raise UserError("give --resolution: the model config has no sample_size")
        sides = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
        resolution = tuple(factor * side for side in sides)
    if any(side % factor for side in resolution):
        raise UserError(f"{_resolution_flag(resolution)}: must be multiples of {factor}, the pixels per latent")
    return resolution


def _resolution_flag(resolution: tuple[int, int]) -> str:
    return f"--resolution {'x'.join(map(str, resolution))}"


def plan_channels(
    model_config: dict[str, Any], asked: int | None, data: DataFacts, vae: VaeFacts | None, model: ModelConfig
) -> dict[str, int]:
    """`in_channels` and `out_channels` of the network, which must be those of the images or latents."""
    is_transformer = issubclass(model_class(model_config), DiffiTTransformer2DModel)
    if vae is None:
        if is_transformer:
            raise UserError("a transformer trains in latent space: give --vae_model_name_or_path")
        channels = asked or data.num_channels
        reason = f"the images of {data.source} have {channels}; give --num_channels {model_config.get('in_channels')}"
    else:
        if asked not in (None, vae.image_channels):
            raise UserError(f"--num_channels {asked}: the VAE takes {vae.image_channels}")
        channels = vae.latent_channels
        reason = f"the latents of {model.vae_model_name_or_path} have {channels}; give another VAE"
    allowed = {"in_channels": [channels], "out_channels": [channels, 2 * channels] if is_transformer else [channels]}
    chosen = {}
    for key, values in allowed.items():
        chosen[key] = channels if model_config.get(key) is None else model_config[key]
        if chosen[key] not in values:
            raise UserError(f"the model config says {key} {chosen[key]}, {reason} or another model config")
    return chosen


def check_learned_variance(out_channels: int, formulation: Formulation) -> None:
    """Refuses a network that learns the variance unless the formulation has one to learn."""
    if not formulation.can_learn_variance:
        raise UserError(
            f"the model config says out_channels {out_channels}, a learned variance: that needs --formulation ddpm "
            "--prediction_type epsilon; --model_kwargs out_channels=... leaves it out"
        )


def plan_classes(
    model_config: dict[str, Any], class_names: tuple[str, ...] | None, is_pretrained: bool
) -> dict[str, int | None]:
    """The network's number of classes, which must be that of the data unless pretrained weights are adapted."""
    is_transformer = issubclass(model_class(model_config), DiffiTTransformer2DModel)
    key = "num_embeds_ada_norm" if is_transformer else "num_class_embeds"
    extra_row = 1 if class_names and model_config.get("_class_name") == "UNet2DModel" else 0  # see `null_label`
    number = len(class_names) + extra_row if class_names else None
    if model_config.get(key) not in (None, number) and not is_pretrained:
        raise UserError(
            f"the model config says {key} {model_config[key]}, but the data gives {number} "
            f"(--class_conditional is {class_names is not None})"
        )
    return {key: number}


def check_network(
    model_config: dict[str, Any], model: ModelConfig, resolution: tuple[int, int], size: tuple[int, int]
) -> None:
    """Refuses a config that the network's constructor refuses, or a size that the network cannot divide."""
    described_by = "--model_config" if model.model_config else "--pretrained_model_name_or_path"
    with torch.device("meta"), user_errors(f"{described_by} with --model_kwargs", ValueError):
        network = model_class(model_config).from_config(model_config)
    if isinstance(network, DiffiTModelMixin):
        with user_errors(_resolution_flag(resolution), ValueError):
            network.check_size(*size)


# ---------------------------------------------------------------------------------------------------------------------
# Facts, and the plan in words


def describe_data(table: Table, vae: AutoencoderKL | None, num_channels: int | None) -> DataFacts:
    """The facts of training data; looks at some images for their channels unless those are known.

    Args:
        table: the training images or their latents.
        vae: of a latent-space model, which says how many channels are taken.
        num_channels: how many channels are asked for, or None.
    """
    names = None if table.class_names is None else tuple(table.class_names)
    if isinstance(table, LatentTable):
        return DataFacts(table.source, len(table), table.digest(), names, None, tuple(table.metadata["resolution"]))
    num_channels = num_channels if vae is None else vae.config.in_channels
    return DataFacts(table.source, len(table), table.digest(), names, num_channels or detect_num_channels(table))


def describe_vae(vae: AutoencoderKL | None) -> VaeFacts | None:
    """The facts of a VAE, which may be on the meta device; None without one."""
    if vae is None:
        return None
    return VaeFacts(pixels_per_latent(vae), vae.config.in_channels, vae.config.latent_channels)


def describe_run(plan: Plan, model: ModelMixin, table: Table, num_held_out: int) -> str:
    """The sizes of a run in words, for the log."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = plan.max_train_steps * plan.batch.total / plan.num_images
    held_out = f", {num_held_out:,} held out" if num_held_out else ""
    text = (
        f"{type(model).__name__} with {num_parameters:,} parameters; {plan.num_images:,} images of "
        f"{'x'.join(map(str, plan.resolution))} pixels, {model.config.in_channels} channels{held_out}; "
        f"{plan.max_train_steps:,} steps of {plan.batch.total} images ({plan.batch.per_process} x "
        f"{plan.batch.num_processes} processes x {plan.batch.accumulation} accumulation), {epochs:.1f} epochs"
    )
    if table.class_names is not None and plan.class_names is None:
        text += f"; {table.source} has {len(table.class_names)} classes: --class_conditional would train on them"
    return text


def print_dry_run(accelerator: Accelerator, flags: dict[str, Any], plan: Plan) -> None:
    """Prints the flags of a run, its parameters and FLOPs, once. The network exists on the meta device only."""
    if not accelerator.is_main_process:
        return
    with torch.device("meta"):
        model = model_class(plan.model_config).from_config(plan.model_config)
    print(yaml.safe_dump(flags), end="")
    print(f"model_config_resolved: {json.dumps(plan.model_config)}")
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters())}")
    print(f"training_flops_per_image: {training_flops_per_image(plan.model_config)}")
