# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags of `train_diffit.py`: one frozen dataclass per concern, one field per flag.

Each class checks the rules within its own concern. `TrainConfig` checks rules across concerns that need neither data
nor models; all other rules are in `diffit.plan`. Nothing slow is imported here, so that a flag is refused at once.
Units: images, optimizer steps, pixels, thousands of images (kimg).
"""

import argparse
import dataclasses
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffit.command_line import (
    Parser,
    add_flags,
    flag,
    flag_fields,
    from_flags,
    given,
    nested,
    number_type,
    path_type,
    refuse_both,
    require_one,
    resolution_type,
    step_rules_type,
    to_flags,
)
from diffit.config_file import config_file_argv
from diffit.device_config import PrecisionConfig
from diffit.diffusion_config import DiffusionConfig
from diffit.errors import UserError, message_of
from diffit.launcher import EXIT_STOPPED
from diffit.source_config import SOURCES, SourceConfig
from diffit.validation_config import MetricsConfig, ValidationConfig

# The names of diffusers' `SchedulerType`, and `warmup_stable_decay` for transformers' `get_wsd_schedule`.
LR_SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("piecewise_constant", "warmup_stable_decay"),
)
DURATIONS = ("max_train_steps", "num_train_epochs", "max_train_kimg")
DATA_SOURCES = (*SOURCES, "latents_dir")
# A flag on the command line replaces the other flags of its group in the config file.
ALTERNATIVES = (
    DATA_SOURCES,
    ("model_config", "pretrained_model_name_or_path"),
    ("global_batch_size", "gradient_accumulation_steps"),
    ("lr_warmup_steps", "lr_warmup_kimg"),
    ("lr_decay_steps", "lr_decay_kimg"),
    ("validation_split", "validation_fraction"),
)
# Section titles in --help where the field's name does not say enough.
TITLES = {
    "data": "data: one of --dataset_name, --train_data_dir, --train_data_file and --latents_dir is required",
    "batch": "batch and duration (exactly one of the three durations is required)",
    "schedule": "learning-rate schedule",
    "ema": "weight averages",
    "precision": "device and precision",
    "metrics": "metrics during training",
    "run": "output, checkpoints and logs",
}
# Flags of a single start rather than of the run: they are not saved with it.
OF_THIS_START = ("cpu", "hub_token", "dry_run", "resume_from_checkpoint", "overwrite_output_dir")

at_least_one, at_least_zero = number_type(int, 1), number_type(int, 0)
positive_float, non_negative_float = number_type(float, 0, open_ends=True), number_type(float, 0)
fraction, beta = number_type(float, 0, 1), number_type(float, 0, 1 - 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The concerns


@dataclass(frozen=True)
class ModelConfig:
    """The network, the VAE, and how they run."""

    model_config: str | None = flag(
        None,
        "architecture to train from scratch: a JSON file such as those in configs/model/, or a folder written by "
        "save_pretrained (required without --pretrained_model_name_or_path)",
        type=path_type,
    )
    model_kwargs: tuple[str, ...] | None = flag(
        None,
        "fields of the model config to override, e.g. dropout=0.1 (default: none)",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
    )
    pretrained_model_name_or_path: str | None = flag(
        None,
        "fine-tune from the weights in a saved folder or of a model on the hub (default: train from scratch)",
        type=path_type,
    )
    reset_class_embeddings: bool | None = flag(
        None,
        "re-initialize the pretrained class embeddings, or keep those of as many classes (default: where the number "
        "or the names of the classes differ)",
        action=argparse.BooleanOptionalAction,
    )
    vae_model_name_or_path: str | None = flag(
        None,
        "train in the latent space of this autoencoder of diffusers (AutoencoderKL, AutoencoderDC or "
        "AutoencoderKLFlux2), a folder or hub name (default: train in pixel space)",
        type=path_type,
    )
    attention_backend: str = flag(
        "auto",
        "attention kernel; auto means native, PyTorch's SDPA",
        choices=("auto", "native", "_native_math", "xformers", "flex"),
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass, which takes less memory and more time"
    )
    compile: bool = flag(False, "compile the network with torch.compile, block by block where possible")

    def __post_init__(self):
        if not given(self, ("model_config", "pretrained_model_name_or_path")):
            raise UserError("give --model_config or --pretrained_model_name_or_path")
        if len(given(self, ("model_config", "pretrained_model_name_or_path"))) == 2:
            raise UserError("--pretrained_model_name_or_path has its own architecture: drop --model_config")
        if self.reset_class_embeddings is not None and self.pretrained_model_name_or_path is None:
            raise UserError("--reset_class_embeddings needs --pretrained_model_name_or_path")
        for pair in self.model_kwargs or ():
            if "=" not in pair:
                raise UserError(f"--model_kwargs: expected KEY=VALUE, got {pair!r}")


@dataclass(frozen=True)
class DataConfig:
    """The training images and how they are cropped, augmented and read."""

    source: SourceConfig = nested(SourceConfig)
    latents_dir: str | None = flag(
        None, "latents from prepare_latents.py; needs --vae_model_name_or_path (default: none)", type=path_type
    )
    class_conditional: bool = flag(
        False, "condition the network on the class labels; --label_column implies it", fixed=True
    )
    resolution: tuple[int, int] | None = flag(
        None,
        "height and width in pixels to which images are resized and cropped: N for squares, or HxW (default: the "
        "resolution of --latents_dir, otherwise the model config's sample_size)",
        type=resolution_type,
        fixed=True,
    )
    center_crop: bool = flag(False, "crop the center of each image instead of a random position", fixed=True)
    random_flip: bool = flag(False, "mirror each image horizontally with probability 0.5", fixed=True)
    augmentation_probability: float = flag(
        0.0,
        "probability of each non-leaking augmentation (flips, scaling, rotation, translation), on which the network "
        "is conditioned; EDM (arXiv 2206.00364) uses 0.12 to 0.15; pixel space only",
        type=fraction,
        fixed=True,
    )
    num_channels: int | None = flag(
        None,
        "number of channels to convert images to: 1 grayscale, 3 RGB, 4 RGBA (default: as in the images)",
        type=at_least_one,
    )
    on_bad_image: str = flag(
        "error",
        "when an image cannot be read: end the training, or skip the image and log a warning",
        choices=("error", "skip"),
    )
    dataloader_num_workers: int | None = flag(
        None,
        "worker processes that load images, per training process; 0 for none (default: its CPU cores, at most 8)",
        type=at_least_zero,
    )

    def __post_init__(self):
        require_one(self, DATA_SOURCES)


@dataclass(frozen=True)
class BatchConfig:
    """Images per optimizer step, the length of the training, and the seed of all randomness."""

    train_batch_size: int = flag(16, "images per process and micro-batch", type=at_least_one)
    gradient_accumulation_steps: int | None = flag(
        None, "micro-batches per optimizer step (default: 1)", type=at_least_one
    )
    global_batch_size: int | None = flag(
        None,
        "images per optimizer step, over all processes; sets --gradient_accumulation_steps (default: "
        "--train_batch_size x processes x --gradient_accumulation_steps)",
        type=at_least_one,
        fixed=True,
    )
    max_train_steps: int | None = flag(None, "training length in optimizer steps (default: none)", type=at_least_one)
    num_train_epochs: float | None = flag(None, "training length in epochs (default: none)", type=positive_float)
    max_train_kimg: float | None = flag(None, "training length in 1000 images (default: none)", type=positive_float)
    max_train_time: float | None = flag(
        None,
        "time limit in minutes, after which a checkpoint is saved and the script exits with code "
        f"{EXIT_STOPPED}, as after SIGTERM (default: no limit)",
        type=positive_float,
    )
    seed: int = flag(
        0,
        "seed of the initial weights, data order, augmentations, noise and dropout",
        type=number_type(int, 0, 2**64 - 1),
        fixed=True,
    )

    def __post_init__(self):
        require_one(self, DURATIONS)
        if len(given(self, ("global_batch_size", "gradient_accumulation_steps"))) == 2:
            raise UserError("--global_batch_size sets --gradient_accumulation_steps: give only one of them")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update of the weights."""

    optimizer: str = flag(
        "adamw",
        "adamw; or muon, for small networks: Muon for the weight matrices in the blocks, AdamW for the rest",
        choices=("adamw", "muon"),
        fixed=True,
    )
    learning_rate: float = flag(1e-4, "peak learning rate, after the warm-up", type=non_negative_float, fixed=True)
    muon_lr_ratio: float = flag(
        3.0,
        "muon only: Muon's learning rate as a multiple of --learning_rate; at 1 its updates are as large as AdamW's",
        type=positive_float,
        fixed=True,
        fixed_if=("optimizer", "muon"),
    )
    adam_beta1: float = flag(0.9, "AdamW's beta1, the decay rate of the first-moment estimate", type=beta, fixed=True)
    adam_beta2: float = flag(0.999, "AdamW's beta2, that of the second-moment estimate", type=beta, fixed=True)
    adam_weight_decay: float = flag(
        0.0, "decoupled weight decay of all parameters, Muon's included", type=non_negative_float, fixed=True
    )
    adam_epsilon: float = flag(
        1e-8, "constant added to AdamW's denominator for numerical stability", type=positive_float, fixed=True
    )
    max_grad_norm: float = flag(1.0, "global norm to which gradients are clipped", type=positive_float, fixed=True)
    max_bad_steps: int = flag(
        20,
        "number of consecutive steps skipped because of a non-finite loss or gradient after which training ends",
        type=at_least_one,
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over optimizer steps."""

    lr_scheduler: str = flag(
        "constant_with_warmup",
        "learning-rate schedule over optimizer steps; constant and piecewise_constant have no warm-up",
        choices=LR_SCHEDULES,
        fixed=True,
    )
    lr_warmup_steps: int | None = flag(
        None, "length of the linear warm-up in optimizer steps (default: 500)", type=at_least_zero, fixed=True
    )
    lr_warmup_kimg: float | None = flag(
        None,
        "length of the linear warm-up in thousands of images, instead of --lr_warmup_steps (default: not used)",
        type=non_negative_float,
        fixed=True,
    )
    lr_decay_steps: int | None = flag(
        None,
        "warmup_stable_decay only, and required there: length of the final decay in optimizer steps (default: none)",
        type=at_least_zero,
        fixed=True,
    )
    lr_decay_kimg: float | None = flag(
        None,
        "warmup_stable_decay only: length of the final decay in thousands of images, instead of --lr_decay_steps "
        "(default: not used)",
        type=non_negative_float,
        fixed=True,
    )
    lr_num_cycles: int = flag(
        1, "cosine_with_restarts only: number of cosine cycles in the training", type=at_least_one, fixed=True
    )
    lr_power: float = flag(1.0, "polynomial only: exponent of the decay", type=non_negative_float, fixed=True)
    lr_step_rules: str | None = flag(
        None,
        "piecewise_constant only, and required there: multiples of --learning_rate, each with the optimizer step "
        "until which it applies; 1:1000,0.1:2000,0.01 means 1 until step 1000, 0.1 until step 2000, then 0.01 "
        "(default: none)",
        type=step_rules_type,
        fixed=True,
    )

    def __post_init__(self):
        refuse_both(self, "lr_warmup_steps", "lr_warmup_kimg")
        refuse_both(self, "lr_decay_steps", "lr_decay_kimg")
        decay = given(self, ("lr_decay_steps", "lr_decay_kimg"))
        if (self.lr_scheduler == "warmup_stable_decay") != bool(decay):
            raise UserError(
                "--lr_decay_steps (or --lr_decay_kimg) is required with --lr_scheduler warmup_stable_decay and not "
                "allowed with other schedules"
            )
        if self.lr_scheduler == "piecewise_constant" and self.lr_step_rules is None:
            raise UserError("--lr_scheduler piecewise_constant needs --lr_step_rules")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving averages of the weights."""

    use_ema: bool = flag(
        True, "keep an exponential moving average (EMA) of the weights, used for previews and export", fixed=True
    )
    ema_max_decay: float = flag(0.9999, "maximum EMA decay per optimizer step", type=fraction, fixed=True)
    ema_inv_gamma: float = flag(
        1.0,
        "inverse gamma of the EMA warm-up, in which the decay is 1 - (1 + step / inv_gamma) ** -power",
        type=positive_float,
        fixed=True,
    )
    ema_power: float = flag(
        0.75, "exponent of the EMA warm-up (see --ema_inv_gamma)", type=non_negative_float, fixed=True
    )
    ema_half_life_kimg: tuple[float, ...] | None = flag(
        None,
        "half-life of the EMA in thousands of images, as in EDM, instead of --ema_max_decay, --ema_inv_gamma and "
        "--ema_power; several values keep several averages (default: not used)",
        type=positive_float,
        nargs="+",
        metavar="KIMG",
        fixed=True,
    )
    ema_ramp_up: float = flag(
        0.05,
        "with --ema_half_life_kimg: the half-life is at most this fraction of the images seen so far",
        type=number_type(float, 1e-6, 1),
        fixed=True,
    )

    def __post_init__(self):
        if self.ema_half_life_kimg is None:
            return
        if not self.use_ema:
            raise UserError("--ema_half_life_kimg needs --use_ema")
        if len({f"{kimg:g}" for kimg in self.ema_half_life_kimg}) < len(self.ema_half_life_kimg):
            raise UserError(f"--ema_half_life_kimg: {list(self.ema_half_life_kimg)} contains a value twice")


@dataclass(frozen=True)
class RunConfig:
    """The run's folder, checkpoints and logs."""

    output_dir: str = flag(
        "outputs/diffit", "folder for the pipeline, checkpoints, previews and logs of the run", type=path_type
    )
    overwrite_output_dir: bool = flag(
        False, "start from scratch: delete an earlier run's checkpoints, previews, metrics and logs in --output_dir"
    )
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", type=at_least_one)
    checkpoints_total_limit: int | None = flag(
        None, "number of checkpoints to keep; older ones are deleted (default: keep all)", type=at_least_one
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "resume from this checkpoint: a path, or `checkpoint-N` or `latest` in --output_dir (default: start from "
        "scratch)",
        type=path_type,
    )
    logging_dir: str = flag("logs", "folder for tracker logs, relative to --output_dir", type=path_type)
    logging_steps: int = flag(10, "optimizer steps between log entries", type=at_least_one)
    report_to: str = flag("tensorboard", "tracker to log to: tensorboard, wandb, all or none")
    dry_run: bool = flag(False, "check flags, data and model config, print the resolved flags and sizes, and exit")

    def __post_init__(self):
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise UserError(
                "--overwrite_output_dir would delete what --resume_from_checkpoint needs: give one of them"
            )
        if self.report_to not in ("tensorboard", "wandb", "all", "none"):
            raise UserError(f"--report_to: expected tensorboard, wandb, all or none, got {self.report_to!r}")
        if self.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
            raise UserError("--report_to wandb: wandb is not installed")
        logs = Path(self.logging_dir)
        if logs.is_absolute() or ".." in logs.parts or logs == Path():
            raise UserError(f"--logging_dir must be a folder inside --output_dir, got {self.logging_dir!r}")


@dataclass(frozen=True)
class HubConfig:
    """Uploading the pipeline to the hub."""

    push_to_hub: bool = flag(False, "upload the pipeline to the hub after the training")
    hub_model_id: str | None = flag(
        None, "repository to upload to, NAME or OWNER/NAME (default: the name of --output_dir)"
    )
    hub_token: str | None = flag(
        None,
        "hub access token; prefer `hf auth login`, since a launcher may print the command line when a run fails "
        "(default: the token stored by `hf auth login`)",
    )
    hub_private_repo: bool = flag(False, "make the uploaded repository private")

    def __post_init__(self):
        if self.hub_token is not None and not re.fullmatch(r"[!-~]+", self.hub_token):
            # An HTTP error would print the token.
            raise UserError("--hub_token must be printable ASCII without spaces")


@dataclass(frozen=True)
class TrainConfig:
    """All flags of a training."""

    model: ModelConfig = nested(ModelConfig)
    data: DataConfig = nested(DataConfig)
    diffusion: DiffusionConfig = nested(DiffusionConfig)
    batch: BatchConfig = nested(BatchConfig)
    optimizer: OptimizerConfig = nested(OptimizerConfig)
    schedule: ScheduleConfig = nested(ScheduleConfig)
    ema: EmaConfig = nested(EmaConfig)
    precision: PrecisionConfig = nested(PrecisionConfig)
    validation: ValidationConfig = nested(ValidationConfig)
    metrics: MetricsConfig = nested(MetricsConfig)
    run: RunConfig = nested(RunConfig)
    hub: HubConfig = nested(HubConfig)
    debug: bool = False

    def folders_read(self) -> tuple[dict[str, str | None], str | None]:
        """Maps flags to the folders or hub names of the models that the run reads; and that of its data set."""
        models = {
            "--pretrained_model_name_or_path": self.model.pretrained_model_name_or_path,
            "--vae_model_name_or_path": self.model.vae_model_name_or_path,
            "--validation_guidance_model": self.validation.guidance.model,
        }
        return models, self.data.source.dataset_name

    def __post_init__(self):
        in_latents = self.model.vae_model_name_or_path is not None
        if self.model.reset_class_embeddings and not self.data.class_conditional:
            raise UserError("--reset_class_embeddings needs --class_conditional")
        if self.validation.validation_split is not None and self.data.source.dataset_name is None:
            raise UserError("--validation_split needs --dataset_name; use --validation_fraction with other data")
        if self.data.augmentation_probability > 0 and in_latents:
            raise UserError("--augmentation_probability works in pixel space only: drop --vae_model_name_or_path")
        if self.data.latents_dir is not None and not in_latents:
            raise UserError(
                "--latents_dir needs --vae_model_name_or_path, which decodes previews and is exported with the model"
            )
        if self.precision.deterministic and self.model.attention_backend == "flex":
            raise UserError(
                "--deterministic does not go with --attention_backend flex, whose backward pass adds in any order: "
                "use native"
            )
        if self.metrics.eval_steps is not None and self.data.latents_dir is not None:
            raise UserError("--eval_steps compares samples with real images, which --latents_dir does not contain")
        if self.metrics.eval_steps is not None and self.data.on_bad_image == "skip":
            raise UserError("--eval_steps needs every image to be readable: give --on_bad_image error")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line and YAML, and back


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Builds the parser of all flags, in one group per concern."""
    parser = Parser(description)
    parser.add_argument(
        "--config",
        type=path_type,
        help="YAML file of flags, e.g. configs/train/quickstart.yaml; flags on the command line take precedence "
        "(default: none)",
    )
    for field in dataclasses.fields(TrainConfig):
        if field.metadata:
            add_flags(parser, field.type, title=TITLES.get(field.name, field.name))
    return parser


def parse_args(argv: list[str] | None = None, description: str | None = None) -> TrainConfig:
    """Reads --config and the command line.

    A flag of `ALTERNATIVES` on the command line replaces its alternatives in the config file.

    Raises:
        SystemExit: with a message that names the flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(description)
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.error = parser.error
    first.add_argument("--config", type=path_type)
    config = first.parse_known_args(argv)[0].config
    if config is not None:
        flags = {argument.split("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
        skip = {name for group in ALTERNATIVES if flags & set(group) for name in group}
        if "lr_scheduler" in flags:  # the file's decay belongs to the file's schedule
            skip |= {"lr_decay_steps", "lr_decay_kimg"}
        argv = config_file_argv(parser, config, skip) + argv
    values = vars(parser.parse_args(argv))
    values["class_conditional"] = values["class_conditional"] or values["label_column"] is not None
    try:
        return from_flags(TrainConfig, values)
    except UserError as error:
        parser.error(message_of(error))


def args_to_config(config: TrainConfig, resolved: dict[str, Any] | None = None) -> dict[str, Any]:
    """The flags of a run that are set, in the form of a config file for --config.

    Args:
        config: the flags as given.
        resolved: values of flags that were not given (see `Plan.resolved_flags`).
    """
    flags = to_flags(config)
    flags |= {name: value for name, value in (resolved or {}).items() if flags[name] is None}
    if flags["lr_warmup_kimg"] is not None:
        del flags["lr_warmup_steps"]
    values = {name: value for name, value in flags.items() if name not in OF_THIS_START and value is not None}
    if "global_batch_size" in values:  # determines the accumulation
        values.pop("gradient_accumulation_steps", None)
    if "resolution" in values:
        values["resolution"] = "x".join(map(str, values["resolution"]))
    if "model_kwargs" in values:
        pairs = [pair.split("=", 1) for pair in values["model_kwargs"]]
        values["model_kwargs"] = {key: yaml.safe_load(value) for key, value in pairs}
    return values


FIXED = {name: field for name, field in flag_fields(TrainConfig) if field.metadata["fixed"]}
