# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains a DiffiT (or diffusers' UNet2DModel) on images, on one process or many.

    python train_diffit.py --config configs/train/quickstart.yaml
    accelerate launch train_diffit.py --config configs/train/emoji32.yaml --output_dir outputs/emoji32
    torchrun --nproc_per_node 4 train_diffit.py --config configs/train/emoji32.yaml --global_batch_size 256

A config file is a list of flags: defaults < --config < command line. `--dry_run` checks everything and stops.
Randomness is a function of the position in the data stream (see `diffit_data.py`), so a run resumes exactly.
"""

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports: the launcher may die meanwhile

import argparse
import contextlib
import difflib
import functools
import glob
import inspect
import json
import logging
import math
import os
import re
import shlex
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, is_wandb_available
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers.optimization import get_wsd_schedule

from diffit.command_line import Parser, path_type, run_script
from diffit.errors import RunError, UserError, load_model, user_errors
from diffit.run_dir import (
    CODE_FOLDER,
    PIPELINE_FILES,
    PIPELINE_FOLDERS,
    RUN_OUTPUTS,
    OutputFolder,
    files_below,
    is_code_folder,
    is_within,
    remove_checkpoint,
    remove_empty_folders,
    remove_whole_folder,
)
from diffit_augment import NUM_AUGMENT_LABELS, augment
from diffit_checkpoint import (
    TrainingState,
    checkpoint_problem,
    ema_weights,
    file_digest,
    find_checkpoint,
    is_ours,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside,
    step_of,
)
from diffit_data import (
    ImageDataset,
    LatentDataset,
    LatentTable,
    PositionStream,
    StreamBatchSampler,
    StreamDataset,
    Table,
    collate,
    detect_num_channels,
    encode_moments,
    load_image_table,
    load_latent_table,
    load_vae,
    normalize_pixels,
    pixels_per_latent,
    position_generator,
    resolution_type,
    sample_latents,
    split_table,
    vae_description,
)
from diffit_distributed import (
    EXIT_STOPPED,
    OutputDirLock,
    StopRequest,
    check_agreement,
    ignore_stop_signals,
    join_processes,
    on_all_processes,
    on_main_process,
    raise_in_all,
)
from diffit_loss import NoiseScheduler, build_network_inputs, build_noise_levels, compute_loss, spread_non_finite
from diffit_metrics import (
    NEAREST,
    FeatureExtractor,
    FeatureSet,
    TableImages,
    extract_features,
    load_extractor,
    metric_values,
)
from diffit_model import (
    DiffiTModelMixin,
    DiffiTTransformer2DModel,
    DiffiTUNet2DModel,
    adapt_weights,
    choose_attention_backend,
    model_class,
    set_attention_backend,
)
from diffit_optim import MuonAdamW, matrices_of_blocks
from diffit_pipeline import (
    FORWARD_PROCESS,
    GUIDANCE_SCHEDULES,
    DiffiTPipeline,
    image_grid,
    load_network,
    null_label,
    part_name,
    viewable,
)

logger = get_logger("train_diffit", log_level="INFO")

PROJECT = "train_diffit"  # name of the run in the trackers
DROPOUT = 3  # stream of `position_generator` that seeds dropout inside the network
LEVEL_BINS = 4  # the loss is logged by quartile of the noise levels
SCHEDULES = (*(schedule.value for schedule in SchedulerType), "warmup_stable_decay")
DURATIONS = ("max_train_steps", "num_train_epochs", "max_train_kimg")
DATA_SOURCES = ("dataset_name", "train_data_dir", "train_data_file", "latents_dir")
# One flag of such a group on the command line takes the place of another in the config file.
ALTERNATIVES = (
    DATA_SOURCES,
    ("model_config", "pretrained_model_name_or_path"),
    ("global_batch_size", "gradient_accumulation_steps"),
    ("lr_warmup_steps", "lr_warmup_kimg"),
    ("lr_decay_steps", "lr_decay_kimg"),
    ("validation_split", "validation_fraction"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def number_type(kind: type, minimum: float, maximum: float = math.inf, open_ends: bool = False):
    """An argparse type: an int or a float in [minimum, maximum], or between the two if `open_ends`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        inside = minimum < value < maximum if open_ends else minimum <= value <= maximum and math.isfinite(value)
        if not inside:
            limits = f"{minimum} and {maximum}" + (", both excluded" if open_ends else "")
            raise argparse.ArgumentTypeError(f"{value} is not between {limits}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups. Units: images, optimizer steps, pixels, thousands of images (kimg)."""
    parser = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    positive, natural = number_type(int, 1), number_type(int, 0)
    not_negative, share = number_type(float, 0), number_type(float, 0, 1)
    finite = number_type(float, -math.inf, open_ends=True)
    parser.add_argument("--config", type=path_type, help="YAML list of flags, e.g. configs/train/quickstart.yaml")
    parser.add_argument("--dry_run", action=flag, default=False, help="check everything, print sizes and stop")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_config", type=path_type, help="JSON of configs/model/, or a folder saved by save_pretrained"
    )
    group.add_argument(
        "--model_kwargs", nargs="+", action="extend", metavar="KEY=VALUE", help="override fields of the model config"
    )
    group.add_argument(
        "--pretrained_model_name_or_path", type=path_type, help="start from the weights of a saved folder or hub model"
    )
    group.add_argument(
        "--reset_class_embeddings", action=flag, default=False, help="of the pretrained model: new rows, same number"
    )
    group.add_argument(
        "--vae_model_name_or_path",
        type=path_type,
        help="train in the latents of this AutoencoderKL of diffusers (folder or hub name)",
    )
    group.add_argument(
        "--attention_backend", choices=("auto", "native", "_native_math", "xformers", "flex"), default="auto"
    )
    group.add_argument("--gradient_checkpointing", action=flag, default=False, help="less memory, more time")
    group.add_argument("--compile", action=flag, default=False, help="torch.compile, block by block where it can")

    group = parser.add_argument_group("data: one of the first four")
    group.add_argument("--dataset_name", type=path_type, help="hub name, or local path for datasets.load_dataset")
    group.add_argument(
        "--train_data_dir", type=path_type, help="folder or zip of images; dataset.json, metadata.jsonl, parquet too"
    )
    group.add_argument("--train_data_file", type=path_type, help="a parquet file")
    group.add_argument(
        "--latents_dir", type=path_type, help="what scripts/prepare_latents.py wrote; needs --vae_model_name_or_path"
    )
    group.add_argument("--dataset_config_name")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--image_column", help="default: the only one of type Image")
    group.add_argument("--label_column", help="default: the only one of type ClassLabel; implies --class_conditional")
    group.add_argument("--class_conditional", action=flag, default=False, help="train on the labels")
    group.add_argument("--cache_dir", type=path_type, help="of datasets.load_dataset")
    group.add_argument("--resolution", type=resolution_type, help="N or HxW; default: the model config's sample_size")
    group.add_argument("--center_crop", action=flag, default=False, help="crop the centre, not a random place")
    group.add_argument("--random_flip", action=flag, default=False, help="mirror half of the images left and right")
    group.add_argument(
        "--augmentation_probability",
        type=share,
        default=0.0,
        help="non-leaking augmentation of pixels (arXiv 2206.00364): flips, scaling, rotation, translation, which the "
        "network is told; 0.12 to 0.15 in EDM",
    )
    group.add_argument("--num_channels", type=positive, help="default: what the images are")
    group.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    group.add_argument("--dataloader_num_workers", type=natural, default=0)

    group = parser.add_argument_group("diffusion")
    group.add_argument(
        "--formulation",
        choices=("ddpm", "edm"),
        help="discrete timesteps, or noise levels with preconditioning (arXiv 2206.00364); default: that of "
        "--pretrained_model_name_or_path, or ddpm",
    )
    group.add_argument("--sigma_mean", type=finite, help="of edm: mean of ln sigma; default -1.2")
    group.add_argument("--sigma_std", type=number_type(float, 0, open_ends=True), help="of ln sigma; default 1.2")
    group.add_argument(
        "--prediction_type",
        choices=("epsilon", "sample", "v_prediction"),
        help="of ddpm; default: that of --pretrained_model_name_or_path, or v_prediction; the next two likewise",
    )
    group.add_argument(
        "--beta_schedule",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        help="default squaredcos_cap_v2",
    )
    group.add_argument("--num_train_timesteps", type=positive, help="default 1000")
    group.add_argument(
        "--snr_gamma",
        type=not_negative,
        help="min-SNR loss weights (arXiv 2303.09556), 0 for none; default: 5 for v_prediction, else none",
    )
    group.add_argument("--label_dropout", type=share, default=0.1, help="share of labels replaced by the null class")

    group = parser.add_argument_group("batch and duration")
    group.add_argument("--train_batch_size", type=positive, default=16, help="images per process and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=positive, help="default 1")
    group.add_argument("--global_batch_size", type=positive, help="images per optimizer step; sets the accumulation")
    group.add_argument("--max_train_steps", type=positive, help="optimizer steps")
    group.add_argument("--num_train_epochs", type=number_type(float, 0, open_ends=True))
    group.add_argument("--max_train_kimg", type=number_type(float, 0, open_ends=True), help="thousands of images")
    group.add_argument(
        "--max_train_time",
        type=number_type(float, 0, open_ends=True),
        help=f"minutes; then a checkpoint is saved and the exit code is {EXIT_STOPPED}, as after SIGTERM",
    )
    group.add_argument("--seed", type=number_type(int, 0, 2**64 - 1), default=0)

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: for the matrices of the blocks, with AdamW for the rest",
    )
    group.add_argument("--learning_rate", type=not_negative, default=1e-4)
    group.add_argument(
        "--muon_lr_ratio",
        type=number_type(float, 0, open_ends=True),
        default=3.0,
        help="learning rate of muon as a multiple of --learning_rate; at 1 its updates are as large as AdamW's",
    )
    group.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant_with_warmup")
    group.add_argument("--lr_warmup_steps", type=natural, help="default 500")
    group.add_argument("--lr_warmup_kimg", type=not_negative, help="the same in thousands of images")
    group.add_argument("--lr_decay_steps", type=natural, help="of warmup_stable_decay: the last so many steps")
    group.add_argument("--lr_decay_kimg", type=not_negative, help="the same in thousands of images")
    group.add_argument("--lr_num_cycles", type=positive, default=1, help="of cosine_with_restarts")
    group.add_argument("--lr_power", type=not_negative, default=1.0, help="of polynomial")
    group.add_argument("--lr_step_rules", help='of piecewise_constant, e.g. "1:1000,0.1:2000,0.01"')
    group.add_argument("--adam_beta1", type=number_type(float, 0, 1 - 1e-9), default=0.9)
    group.add_argument("--adam_beta2", type=number_type(float, 0, 1 - 1e-9), default=0.999)
    group.add_argument("--adam_weight_decay", type=not_negative, default=0.0)
    group.add_argument("--adam_epsilon", type=number_type(float, 0, open_ends=True), default=1e-8)
    group.add_argument("--max_grad_norm", type=number_type(float, 0, open_ends=True), default=1.0)
    group.add_argument(
        "--max_bad_steps",
        type=positive,
        default=20,
        help="steps in a row that may be left out because the loss or the gradient is not finite; then training ends",
    )
    group.add_argument("--use_ema", action=flag, default=True)
    group.add_argument("--ema_max_decay", type=share, default=0.9999)
    group.add_argument("--ema_inv_gamma", type=number_type(float, 0, open_ends=True), default=1.0)
    group.add_argument("--ema_power", type=not_negative, default=0.75)
    group.add_argument(
        "--ema_half_life_kimg",
        type=number_type(float, 0, open_ends=True),
        nargs="+",
        metavar="KIMG",
        help="EMA by images seen, as in EDM, in place of the three flags before; several widths are kept side by side",
    )
    group.add_argument(
        "--ema_ramp_up",
        type=number_type(float, 1e-6, 1),
        default=0.05,
        help="half-lives are at most this share of the images seen so far",
    )

    group = parser.add_argument_group("precision")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's own config")
    group.add_argument("--allow_tf32", action=flag, default=False)
    group.add_argument("--deterministic", action=flag, default=False, help="deterministic algorithms only")

    group = parser.add_argument_group("validation, checkpoints, logs")
    group.add_argument("--output_dir", type=path_type, default="outputs/diffit")
    group.add_argument(
        "--overwrite_output_dir", action=flag, default=False, help="delete its checkpoints, previews, metrics and logs"
    )
    group.add_argument("--checkpointing_steps", type=positive, default=500)
    group.add_argument("--checkpoints_total_limit", type=positive, help="keep so many, delete the oldest")
    group.add_argument("--resume_from_checkpoint", type=path_type, help="latest, or the path of a checkpoint")
    group.add_argument("--validation_split", help="split of --dataset_name that is held out")
    group.add_argument("--validation_fraction", type=number_type(float, 0, 1, open_ends=True), help="held-out share")
    group.add_argument("--validation_steps", type=positive, default=1000, help="preview, loss, pipeline folder")
    group.add_argument("--validation_loss_images", type=positive, default=1024, help="most for the held-out loss")
    group.add_argument("--num_validation_images", type=positive, default=64, help="images in the preview grid")
    group.add_argument(
        "--validation_inference_steps",
        type=positive,
        default=50,
        help="of the preview, by DDIM, or by DPM-Solver++ for edm",
    )
    group.add_argument("--validation_guidance_scale", type=not_negative, default=1.0)
    group.add_argument("--validation_guidance_schedule", choices=GUIDANCE_SCHEDULES, default="constant")
    group.add_argument("--validation_guidance_power", type=number_type(float, 0, open_ends=True), default=4.0)
    group.add_argument(
        "--validation_guidance_interval",
        type=share,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.0, 1.0],
        help="timesteps that are guided, as shares of all",
    )
    group.add_argument("--validation_guidance_channels", type=positive, help="guide the first so many; default: all")
    group.add_argument(
        "--validation_guidance_model", type=path_type, help="folder of a weaker model: autoguidance of the preview"
    )
    group.add_argument("--eval_steps", type=positive, help="metrics of each average, and the best one kept in best/")
    group.add_argument("--eval_num_images", type=number_type(int, 8), default=1000, help="samples for the metrics")
    group.add_argument(
        "--eval_metrics",
        nargs="+",
        choices=("frechet_distance", "kernel_distance", "precision", "recall"),
        default=["frechet_distance", "kernel_distance"],
        help="the first decides what is best",
    )
    group.add_argument("--feature_extractor", default="inception", help="of eval_diffit.py; so are the next two")
    group.add_argument("--feature_model", type=path_type, help="folder or hub name, for dinov2 and clip")
    group.add_argument("--inception_path", type=path_type, help="TorchScript file; default: it is downloaded")
    group.add_argument("--logging_dir", type=path_type, default="logs", help="in --output_dir")
    group.add_argument("--logging_steps", type=positive, default=10)
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")

    group = parser.add_argument_group("hub")
    group.add_argument("--push_to_hub", action=flag, default=False, help="upload the pipeline folder at the end")
    group.add_argument("--hub_model_id")
    group.add_argument(
        "--hub_token", help="better: `hf auth login`, since launchers may print the command line of a run that fails"
    )
    group.add_argument("--hub_private_repo", action=flag, default=False)
    return parser


def config_file_argv(parser: argparse.ArgumentParser, path: str, skip: set[str]) -> list[str]:
    """Turns a YAML list of flags into arguments, so that argparse checks keys, types and choices.

    Args:
        parser: all flags.
        path: the YAML file: a mapping of long flag names without dashes to values.
        skip: keys to leave out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar stays the string that is written there
        keys = [key.value for key, _ in yaml.compose(text).value] if isinstance(values, dict) else []
    except OSError as error:
        parser.error(f"--config: cannot read {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: {path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config: {path} must be a list of `flag: value`")
    for key in keys:
        if keys.count(key) > 1:
            parser.error(f"{path}: {key} is given twice")
    actions = {action.dest: action for action in parser._actions}
    argv = []
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            similar = difflib.get_close_matches(key, actions, n=1)
            parser.error(f"{path}: unknown flag {key!r}" + (f", did you mean {similar[0]!r}?" if similar else ""))
        if key in skip:
            continue
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if value not in ("true", "false"):
                parser.error(f"{path}: {key} must be true or false, got {value!r}")
            argv.append(f"--{key}" if value == "true" else f"--no-{key}")
        elif isinstance(value, list) and actions[key].nargs in (2, "+") and key != "model_kwargs":
            argv += [f"--{key}", *map(str, value)]
        elif key == "model_kwargs":
            if not isinstance(value, dict):
                parser.error(f"{path}: {key} must be a mapping, got {value!r}")
            for name, item in value.items():
                if not isinstance(item, str) and not (
                    isinstance(item, list) and all(isinstance(v, str) for v in item)
                ):
                    parser.error(f"{path}: {key}: {name} must be a value or a list of values, got {item!r}")
                value[name] = item if isinstance(item, str) else f"[{', '.join(item)}]"
            argv += [f"--{key}", *(f"{name}={item}" for name, item in value.items())]
        elif not isinstance(value, str) or value in ("", "null", "~"):
            parser.error(f"{path}: {key} must be one value, got {value!r}")
        else:
            argv.append(f"--{key}={value}")
    return argv


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads --config and the command line, and checks what can be checked without touching data or models.

    A flag of `ALTERNATIVES` on the command line takes the place of its alternatives in the config file.

    Raises:
        SystemExit: with a message that names the flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.error = parser.error
    first.add_argument("--config", type=path_type)
    config = first.parse_known_args(argv)[0].config
    if config is not None:
        flags = {argument.split("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
        skip = {name for group in ALTERNATIVES if flags & set(group) for name in group}
        if "lr_scheduler" in flags:  # the decay of the file's own schedule
            skip |= {"lr_decay_steps", "lr_decay_kimg"}
        argv = config_file_argv(parser, config, skip) + argv
    args = parser.parse_args(argv)

    given = [name for name in DURATIONS if getattr(args, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name} {getattr(args, name)}" for name in given) or "none"
        parser.error(f"give exactly one of {', '.join('--' + name for name in DURATIONS)}; got {got}")
    sources = [name for name in DATA_SOURCES if getattr(args, name) is not None]
    if len(sources) != 1:
        got = " and ".join(f"--{name}" for name in sources) or "none"
        parser.error(f"give exactly one of {', '.join('--' + name for name in DATA_SOURCES)}; got {got}")
    if args.global_batch_size is not None and args.gradient_accumulation_steps is not None:
        parser.error("--global_batch_size sets --gradient_accumulation_steps: give only one of them")
    if args.model_config is None and args.pretrained_model_name_or_path is None:
        parser.error("give --model_config or --pretrained_model_name_or_path")
    if args.model_config is not None and args.pretrained_model_name_or_path is not None:
        parser.error("--pretrained_model_name_or_path brings its own architecture: do not give --model_config as well")
    if args.validation_split is not None and args.dataset_name is None:
        parser.error("--validation_split needs --dataset_name; use --validation_fraction")
    if args.validation_split is not None and args.validation_fraction is not None:
        parser.error("give --validation_split or --validation_fraction, not both")
    if args.augmentation_probability > 0 and args.vae_model_name_or_path is not None:
        parser.error("--augmentation_probability is for training in pixels, not in latents")
    if args.latents_dir is not None and args.vae_model_name_or_path is None:
        parser.error("--latents_dir needs --vae_model_name_or_path, to decode the previews and for the saved folder")
    if args.eval_steps is not None and args.latents_dir is not None:
        parser.error("--eval_steps compares with images, and --latents_dir holds none")
    if args.eval_steps is not None and args.on_bad_image == "skip":
        parser.error("--eval_steps needs images that can be read: give --on_bad_image error")
    if args.reset_class_embeddings and args.pretrained_model_name_or_path is None:
        parser.error("--reset_class_embeddings needs --pretrained_model_name_or_path")
    for name in ("lr_warmup", "lr_decay"):
        if getattr(args, f"{name}_steps") is not None and getattr(args, f"{name}_kimg") is not None:
            parser.error(f"give --{name}_steps or --{name}_kimg, not both")
    decay = [name for name in ("lr_decay_steps", "lr_decay_kimg") if getattr(args, name) is not None]
    if (args.lr_scheduler == "warmup_stable_decay") != bool(decay):
        parser.error("--lr_scheduler warmup_stable_decay and --lr_decay_steps (or --lr_decay_kimg) need each other")
    if args.ema_half_life_kimg is not None:
        if not args.use_ema:
            parser.error("--ema_half_life_kimg needs --use_ema")
        if len({f"{kimg:g}" for kimg in args.ema_half_life_kimg}) < len(args.ema_half_life_kimg):
            parser.error(f"--ema_half_life_kimg: {args.ema_half_life_kimg} names a width twice")
    if args.validation_guidance_scale == 1:
        for name in ("validation_guidance_channels", "validation_guidance_model"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} needs a --validation_guidance_scale other than 1, which is off")
    low, high = args.validation_guidance_interval
    if low >= high:
        parser.error(f"--validation_guidance_interval must be LOW < HIGH, got {low} {high}")
    if args.lr_scheduler == "piecewise_constant" and args.lr_step_rules is None:
        parser.error("--lr_scheduler piecewise_constant needs --lr_step_rules")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir would delete what --resume_from_checkpoint needs: give one of them")
    if args.mixed_precision == "fp16" and not torch.accelerator.is_available():
        parser.error("--mixed_precision fp16 does not exist on a CPU (accelerate would train in fp32): use bf16 or no")
    if args.report_to not in ("tensorboard", "wandb", "all", "none"):
        parser.error(f"--report_to: expected tensorboard, wandb, all or none, got {args.report_to!r}")
    if args.report_to == "wandb" and not is_wandb_available():
        parser.error("--report_to wandb: wandb is not installed")
    if (
        Path(args.logging_dir).is_absolute()
        or ".." in Path(args.logging_dir).parts
        or Path(args.logging_dir) == Path()
    ):
        parser.error(f"--logging_dir must be a folder inside --output_dir, got {args.logging_dir!r}")
    if args.hub_token is not None and not re.fullmatch(r"[!-~]+", args.hub_token):
        parser.error("--hub_token must be printable ASCII without blanks")  # an HTTP error would show it
    for pair in args.model_kwargs or []:
        if "=" not in pair:
            parser.error(f"--model_kwargs: expected KEY=VALUE, got {pair!r}")
    args.class_conditional = args.class_conditional or args.label_column is not None
    return args


def public_args(args: argparse.Namespace) -> dict:
    """The arguments as a config file holds them, fit to be given to --config again: without the token and what is
    derived from other flags, and only what is set."""
    private = {"hub_token", "config", "debug", "dry_run", "resume_from_checkpoint", "overwrite_output_dir"}
    derived = {"gradient_accumulation_steps"}  # from the global batch size
    if args.num_train_epochs is not None or args.max_train_kimg is not None:
        derived.add("max_train_steps")
    derived |= {f"{name}_steps" for name in ("lr_warmup", "lr_decay") if getattr(args, f"{name}_kimg") is not None}
    values = {key: value for key, value in vars(args).items() if key not in private | derived and value is not None}
    if args.resolution is not None:
        values["resolution"] = "x".join(map(str, args.resolution))
    if args.model_kwargs is not None:
        pairs = [pair.split("=", 1) for pair in args.model_kwargs]
        values["model_kwargs"] = {key: yaml.safe_load(value) for key, value in pairs}
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Builders


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Sets up the processes and resolves the batch arithmetic into `args`.

    Raises:
        ValueError: if the launcher's processes do not see each other, or --global_batch_size cannot be shared out.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    report_to = None if args.report_to == "none" else args.report_to
    logging_dir = Path(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # as `join_processes` has said already
        mixed_precision=args.mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(logging_dir)),
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes (WORLD_SIZE), but this one sees "
            f"{accelerator.num_processes}; see the launch commands in README.md"
        )
    # Where more than one process was asked for, `accelerate launch --cpu` sets the address and starts one.
    alone = accelerator.num_processes == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True"
    if alone and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process only, whatever --num_processes is: use "
            "--config_file configs/accelerate/cpu_multi_process.yaml"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch/pytorch issue 135712
        logger.warning("--max_restarts of torchrun may fail unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is exported")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # from accelerate's own config
        raise UserError("mixed precision fp16 does not exist on a CPU: give --mixed_precision bf16 or no")
    images = args.train_batch_size * accelerator.num_processes
    if args.global_batch_size is not None:
        if args.global_batch_size % images != 0:
            raise UserError(
                f"--global_batch_size {args.global_batch_size} is no multiple of --train_batch_size "
                f"{args.train_batch_size} x {accelerator.num_processes} processes"
            )
        args.gradient_accumulation_steps = args.global_batch_size // images
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1
    args.global_batch_size = images * args.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    return accelerator


def build_tables(args: argparse.Namespace) -> tuple[Table, Table | None]:
    """Training images (or their latents) and, if asked for, held-out ones."""
    if args.latents_dir is not None:
        table = load_latent_table(args.latents_dir, args.cache_dir)
        if args.class_conditional and table.class_names is None:
            raise UserError(f"--class_conditional: {table.source} has no labels")
        return (table, None) if args.validation_fraction is None else split_table(table, args.validation_fraction)
    source = {name: getattr(args, name) for name in (*DATA_SOURCES[:3], "dataset_config_name", "cache_dir")}
    source |= {name: getattr(args, name) for name in ("image_column", "label_column")}
    table = load_image_table(**source, dataset_split=args.dataset_split)
    if args.class_conditional and table.class_names is None:
        raise UserError(f"--class_conditional: {table.source} has no labels")
    validation = None
    if args.validation_split is not None:
        validation = load_image_table(**source, dataset_split=args.validation_split)
        if args.class_conditional:
            validation = validation.with_class_names(table.class_names)
    elif args.validation_fraction is not None:
        table, validation = split_table(table, args.validation_fraction)
    return table, validation


def read_model_config(args: argparse.Namespace) -> dict:
    """The model config with --model_kwargs applied, checked against the constructor.

    Raises:
        ValueError: names the file or flag and the field.
    """
    flag = "--model_config" if args.model_config else "--pretrained_model_name_or_path"
    path = args.model_config or args.pretrained_model_name_or_path
    try:
        if Path(path).suffix == ".json":
            config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if not isinstance(config, dict):
                raise UserError(f"{flag} {path}: expected a JSON object, got {type(config).__name__}")
        else:
            config = UNet2DModel.load_config(path, subfolder=network_subfolder(path))  # of any model class
            if not isinstance(config, dict):
                raise UserError(f"{flag} {path}: its config.json must hold a JSON object")
            config = dict(config)
    except json.JSONDecodeError as error:
        raise UserError(f"{flag} {path} is not valid JSON: {error}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: no such config here, nor on the hub: {error}") from error
    with user_errors(f"{flag} {path}", Exception):
        parameters = inspect.signature(model_class(config).__init__).parameters
    pairs = [pair.split("=", 1) for pair in args.model_kwargs or []]
    overrides = {key: config_value(text) for key, text in pairs}
    for source, values in ((f"{flag} {path}", config), ("--model_kwargs", overrides)):
        for key, value in values.items():
            if key.startswith("_") or key == "auto_map":
                continue
            if key not in parameters:
                similar = difflib.get_close_matches(key, parameters, n=1)
                hint = f", did you mean {similar[0]!r}?" if similar else ""
                raise UserError(f"{source}: {model_class(config).__name__} has no argument {key!r}{hint}")
            annotation = parameters[key].annotation
            if not fits(value, annotation):
                raise UserError(f"{source}: {key} must be {annotation}, got {value!r}")
    return config | overrides


def config_value(text: str):
    """A value of --model_kwargs: YAML, and numbers such as 1e-6, which PyYAML takes for strings."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--model_kwargs: {text!r} is no plain YAML value: {error}") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def fits(value, annotation) -> bool:
    """Whether a value from JSON or YAML is of an annotated type; a list does for a tuple, an int for a float."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        item_type = typing.get_args(annotation)[0]
        return isinstance(value, list | tuple) and all(fits(item, item_type) for item in value)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is type(None):
        return value is None
    return isinstance(value, int | float if annotation is float else annotation)


def network_subfolder(path: str) -> str | None:
    """`"unet"` or `"transformer"` if a folder or hub repository is that of a pipeline, None if of a network."""
    for part in ("unet", "transformer"):
        if Path(path).is_dir():
            if Path(path, part).is_dir():
                return part
            continue
        with contextlib.suppress(OSError):
            UNet2DModel.load_config(path, subfolder=part)
            return part
    return None


def outline_vae(args: argparse.Namespace) -> AutoencoderKL | None:
    """The VAE of --vae_model_name_or_path without weights (on the meta device), or None without one.

    Raises:
        ValueError: if there is none.
    """
    path = args.vae_model_name_or_path
    if path is None:
        return None
    try:
        config = AutoencoderKL.load_config(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--vae_model_name_or_path {path}: no such config here, nor on the hub: {error}") from error
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"--vae_model_name_or_path {path}: is a {config.get('_class_name')}, not an AutoencoderKL")
    with torch.device("meta"):
        return AutoencoderKL.from_config(config)


def build_vae(args: argparse.Namespace, table: Table, device: torch.device) -> AutoencoderKL | None:
    """The frozen VAE in float32, or None without --vae_model_name_or_path.

    Raises:
        ValueError: if its weights cannot be read, or prepared latents are those of another one.
    """
    if args.vae_model_name_or_path is None:
        return None
    vae = load_vae(args.vae_model_name_or_path)
    if isinstance(table, LatentTable):
        for key, value in vae_description(vae).items():
            if table.metadata[key] != value:
                raise UserError(
                    f"--latents_dir {table.source} was made by a VAE with {key} {table.metadata[key]}, that of "
                    f"{args.vae_model_name_or_path} is {value}"
                )
    return vae.to(device)


def resolve_model_config(
    args: argparse.Namespace, config: dict, table: Table, vae: AutoencoderKL | None = None
) -> dict:
    """Fills in what follows from data and flags: `sample_size`, channels, classes.

    Sets `args.resolution`, in pixels, and with a VAE `args.num_channels`, of the images.

    Raises:
        ValueError: if the config says otherwise or the network cannot divide the resolution, naming the flag.
    """
    config = dict(config)
    is_transformer = issubclass(model_class(config), DiffiTTransformer2DModel)

    # 1. size
    factor = 1 if vae is None else pixels_per_latent(vae)
    if isinstance(table, LatentTable):
        prepared = tuple(table.metadata["resolution"])
        if args.resolution not in (None, prepared):
            raise UserError(f"--resolution {args.resolution}: {table.source} was made from images of {prepared}")
        args.resolution = prepared
    if args.resolution is None:
        if config.get("sample_size") is None:
            raise UserError("give --resolution: the model config has no sample_size")
        size = config["sample_size"]
        args.resolution = tuple(factor * side for side in ([size, size] if isinstance(size, int) else size))
    size_in_words = f"--resolution {'x'.join(map(str, args.resolution))}"
    if any(side % factor for side in args.resolution):
        raise UserError(f"{size_in_words}: must be multiples of {factor}, the pixels of a latent")
    height, width = (side // factor for side in args.resolution)
    config["sample_size"] = height if height == width else [height, width]

    # 2. channels
    if vae is None and is_transformer:
        raise UserError("a transformer trains in latents: give --vae_model_name_or_path")
    if vae is None:
        channels = args.num_channels or detect_num_channels(table)
        reason = f"the images of {table.source} have {channels}; give --num_channels {config.get('in_channels')}"
    else:
        if args.num_channels not in (None, vae.config.in_channels):
            raise UserError(f"--num_channels {args.num_channels}: the VAE takes {vae.config.in_channels}")
        args.num_channels, channels = vae.config.in_channels, vae.config.latent_channels
        reason = f"the latents of {args.vae_model_name_or_path} have {channels}; give another VAE"
    allowed = {"in_channels": [channels], "out_channels": [channels, 2 * channels] if is_transformer else [channels]}
    for key, values in allowed.items():
        config[key] = channels if config.get(key) is None else config[key]
        if config[key] not in values:
            raise UserError(f"the model config says {key} {config[key]}, {reason} or another model config")

    if config["out_channels"] > channels and (args.formulation, args.prediction_type) != ("ddpm", "epsilon"):
        raise UserError(
            f"the model config says out_channels {config['out_channels']}, a learned variance: that needs "
            "--formulation ddpm --prediction_type epsilon; --model_kwargs out_channels=... leaves it out"
        )

    # 3. classes
    key = "num_embeds_ada_norm" if is_transformer else "num_class_embeds"
    num_classes = len(table.class_names) if args.class_conditional else None
    extra_row = 1 if num_classes and config.get("_class_name") == "UNet2DModel" else 0  # see `null_label`
    num_class_embeds = num_classes + extra_row if num_classes else None
    if config.get(key) not in (None, num_class_embeds) and args.pretrained_model_name_or_path is None:
        raise UserError(
            f"the model config says {key} {config[key]}, but the data gives {num_class_embeds} "
            f"(--class_conditional is {args.class_conditional})"
        )
    config[key] = num_class_embeds

    # 4. augmentation
    if args.augmentation_probability > 0:
        if not issubclass(model_class(config), DiffiTUNet2DModel):
            raise UserError("--augmentation_probability needs a DiffiTUNet2DModel, which is told the transforms")
        config["num_augment_labels"] = NUM_AUGMENT_LABELS

    described_by = "--model_config" if args.model_config else "--pretrained_model_name_or_path"
    with torch.device("meta"), user_errors(f"{described_by} with --model_kwargs", ValueError):
        model = model_class(config).from_config(config)
    if isinstance(model, DiffiTModelMixin):
        with user_errors(size_in_words, ValueError):
            model.check_size(height, width)
    return config


def build_model(config: dict, pretrained: str | None = None, reset_class_embeddings: bool = False) -> ModelMixin:
    """A new network, or one that starts from saved weights.

    For another resolution or number of classes the weights are adapted (see `adapt_weights`), and log lines say how.

    Args:
        config: complete `config.json`.
        pretrained: folder or hub name of weights.
        reset_class_embeddings: let class rows start anew even if there are as many as before.

    Raises:
        ValueError: if there are no weights in safetensors, or lists the weights that do not fit.
    """
    model = model_class(config).from_config(config)
    if pretrained is None:
        return model
    subfolder = network_subfolder(pretrained)
    source = load_model(
        f"--pretrained_model_name_or_path {pretrained}: cannot read weights in safetensors (.bin, .pt are not read)",
        *(model_class(config).from_pretrained, pretrained),
        subfolder=subfolder,
        use_safetensors=True,
    )
    with user_errors(f"--pretrained_model_name_or_path {pretrained}", ValueError):
        weights, changes = adapt_weights(source, model, reset_class_embeddings)
    for change in changes:
        logger.warning(f"{pretrained}: {change}")
    model.load_state_dict(weights)
    return model


def resolve_diffusion(args: argparse.Namespace) -> None:
    """Sets the flags of the forward process that were not given: from the pretrained pipeline, else the defaults.

    A pretrained model is of little use for another target or schedule, so a difference is logged.

    Raises:
        ValueError: if flags of one formulation are given with the other, or if the preview wants more steps than
            there are timesteps.
    """
    path = args.pretrained_model_name_or_path
    source = {}
    if path is not None:
        # The folder of a network in a pipeline.
        inside = Path(path).name.startswith(("unet", "transformer")) and Path(path).is_dir()
        with contextlib.suppress(OSError):
            source = dict(DDPMScheduler.load_config(str(Path(path).parent) if inside else path, subfolder="scheduler"))
        if not source:
            logger.warning(f"{path} has no scheduler: what its weights predict is taken from the flags")
    if source:
        source["formulation"] = "edm" if source.get("_class_name", "").startswith("EDM") else "ddpm"
    args.formulation = args.formulation or source.get("formulation", "ddpm")

    # Of what benchmarks/results/quality.md tried, the best on emoji, and on digits second to EDM alone.
    defaults = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    if args.formulation == "edm":
        for name in (*defaults, "snr_gamma"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is of --formulation ddpm, not edm")
        defaults = {}
        args.sigma_mean = -1.2 if args.sigma_mean is None else args.sigma_mean
        args.sigma_std = 1.2 if args.sigma_std is None else args.sigma_std
    elif args.sigma_mean is not None or args.sigma_std is not None:
        raise UserError("--sigma_mean and --sigma_std are of --formulation edm, not ddpm")
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, source.get(name, default))
    if args.snr_gamma is None and args.prediction_type == "v_prediction":
        args.snr_gamma = 5.0
    for name in ("formulation", *defaults):
        if source.get(name, getattr(args, name)) != getattr(args, name):
            logger.warning(f"{path} was trained with --{name} {source[name]}, this run has {getattr(args, name)}")
    if args.formulation == "ddpm" and args.validation_inference_steps > args.num_train_timesteps:
        raise UserError(
            f"--validation_inference_steps {args.validation_inference_steps} are more than --num_train_timesteps "
            f"{args.num_train_timesteps}"
        )


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


def build_optimizer(args: argparse.Namespace, model: ModelMixin) -> torch.optim.Optimizer:
    """AdamW over all parameters, or Muon for some; both can leave a step out without asking the host."""
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    matrices = matrices_of_blocks(model)
    are_matrices = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in are_matrices]
    return MuonAdamW(matrices, others, muon_lr_ratio=args.muon_lr_ratio, **settings)


def build_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning rate over optimizer steps. It stays unprepared: accelerate would step it once per process."""
    if args.lr_scheduler == "warmup_stable_decay":
        return get_wsd_schedule(
            optimizer, args.lr_warmup_steps, args.lr_decay_steps, args.max_train_steps, decay_type="linear"
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


class InPlaceEMA(EMAModel):
    """diffusers' average, updated in place: its own step makes a second copy of all weights for a moment."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes in the weights after an optimizer step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        # A parameter that is not trained stays what it was: there the average and the weight are equal.
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


class HalfLifeEMA(InPlaceEMA):
    """EMA whose memory is counted in images, so that it does not depend on the batch (EDM, appendix F.1).

    Args:
        parameters: of the network, float32.
        half_life: images after which a weight counts half.
        ramp_up: the half-life is at most this share of the images seen so far.
        batch_size: images of an optimizer step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], half_life: float, ramp_up: float, batch_size: int):
        super().__init__(parameters)
        self.half_life, self.ramp_up, self.batch_size = half_life, ramp_up, batch_size

    def get_decay(self, optimization_step: int) -> float:
        """What the average keeps of itself at an optimizer step, from 1 up; in [0, 1)."""
        half_life = min(self.half_life, self.ramp_up * optimization_step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0


def build_ema(args: argparse.Namespace, model: ModelMixin) -> dict[str, InPlaceEMA]:
    """Averages of the float32 parameters, by the end of their folder's name.

    One whose decay warms up as 1 - (1 + step / inv_gamma) ** -power; or with --ema_half_life_kimg one for each width.
    """
    if not args.use_ema:
        return {}
    if args.ema_half_life_kimg is not None:
        widths = {f"ema_{kimg:g}kimg": 1000 * kimg for kimg in args.ema_half_life_kimg}
        options = (args.ema_ramp_up, args.global_batch_size)
        return {name: HalfLifeEMA(model.parameters(), width, *options) for name, width in widths.items()}
    warm_up = {"use_ema_warmup": True, "inv_gamma": args.ema_inv_gamma, "power": args.ema_power}
    return {"ema": InPlaceEMA(model.parameters(), decay=args.ema_max_decay, **warm_up)}


def build_guidance_model(args: argparse.Namespace, model: ModelMixin, device: torch.device) -> ModelMixin | None:
    """The weaker model of --validation_guidance_model, or None.

    Raises:
        ValueError: if it is not there or does not fit the model.
    """
    path = args.validation_guidance_model
    if path is None:
        return None
    what = f"--validation_guidance_model {path}: cannot load a pipeline"
    guidance_model = load_model(what, load_network, path, model_class).to(device)
    with user_errors(what, Exception):
        theirs = DDPMScheduler.load_config(path, subfolder="scheduler")
    ours = build_noise_scheduler(args).config
    for key in FORWARD_PROCESS:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"--validation_guidance_model {path} has {key} {theirs.get(key)}, this run {ours.get(key)}"
            )
    for what in ("sample_size", "in_channels", "out_channels"):
        if model.config[what] != guidance_model.config[what]:
            raise UserError(
                f"--validation_guidance_model {path} has {what} {guidance_model.config[what]}, "
                f"the model {model.config[what]}"
            )
    if null_label(model) != null_label(guidance_model):
        raise UserError(
            f"--validation_guidance_model {path} has {null_label(guidance_model)} classes, the model "
            f"{null_label(model)}"
        )
    return guidance_model.requires_grad_(False).eval()


def noise_shape(config: dict) -> tuple[int, int, int]:
    """Channels, height and width of what the network of a complete config denoises."""
    size = config["sample_size"]
    return (config["in_channels"], *([size, size] if isinstance(size, int) else size))


def build_dataset(
    args: argparse.Namespace,
    table: Table,
    stream: PositionStream,
    config: dict,
    num_channels: int | None,
    center_crop: bool,
    random_flip: bool,
    augment: bool = False,
) -> StreamDataset:
    """Images or prepared latents by position, with the noise for the network of a complete config."""
    if isinstance(table, LatentTable):
        return LatentDataset(table, stream, random_flip, args.on_bad_image)
    latent_shape = None if args.vae_model_name_or_path is None else noise_shape(config)
    return ImageDataset(
        table,
        stream,
        args.resolution,
        num_channels,
        center_crop,
        random_flip,
        args.on_bad_image,
        latent_shape,
        augment,
    )


def build_batches(
    accelerator: Accelerator, args: argparse.Namespace, table: Table, config: dict, start_position: int
) -> Iterator[dict]:
    """Endless micro-batches of this process, from a position of the stream on."""
    stream = PositionStream(len(table), args.seed)
    flags = (args.num_channels, args.center_crop, args.random_flip, args.augmentation_probability > 0)
    dataset = build_dataset(args, table, stream, config, *flags)
    shard = (accelerator.num_processes, accelerator.process_index)
    return iter(
        DataLoader(
            dataset,
            batch_sampler=StreamBatchSampler(stream, args.train_batch_size, start_position, *shard),
            num_workers=args.dataloader_num_workers,
            collate_fn=collate,
            worker_init_fn=ignore_stop_signals,
            pin_memory=accelerator.device.type == "cuda",
        )
    )


def resolve_duration(args: argparse.Namespace, num_images: int) -> None:
    """Turns durations in epochs and kimg into optimizer steps, rounded up, of the training and of its schedule."""
    if args.num_train_epochs is not None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_images / args.global_batch_size)
    elif args.max_train_kimg is not None:
        args.max_train_steps = math.ceil(args.max_train_kimg * 1000 / args.global_batch_size)
    for name in ("lr_warmup", "lr_decay"):
        if (kimg := getattr(args, f"{name}_kimg")) is not None:
            setattr(args, f"{name}_steps", math.ceil(kimg * 1000 / args.global_batch_size))
    args.lr_warmup_steps = 500 if args.lr_warmup_steps is None else args.lr_warmup_steps
    if args.lr_decay_steps is not None and args.lr_warmup_steps + args.lr_decay_steps > args.max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps} and --lr_decay_steps {args.lr_decay_steps} are longer than the "
            f"training ({args.max_train_steps} steps)"
        )
    if args.lr_scheduler == "polynomial" and args.lr_warmup_steps >= args.max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps} must be less than the {args.max_train_steps} optimizer steps "
            "with --lr_scheduler polynomial"
        )


def training_flops_per_image(config: dict) -> int:
    """FLOPs (multiplications and additions) of one image forward and backward, counted on the meta device.

    The backward pass counts twice the forward pass.
    """
    with torch.device("meta"):
        model = model_class(config).from_config(config).eval()
        sample = torch.empty(1, *noise_shape(config))
        timestep = torch.zeros(1)
        # UNet2DModel must be given labels; ours takes None for the null class.
        needs_labels = isinstance(model, UNet2DModel) and config["num_class_embeds"] is not None
        labels = torch.zeros(1, dtype=torch.long) if needs_labels else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample, timestep, class_labels=labels)
    return 3 * counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# A batch on the device


def batch_labels(batch: dict, label_dropout: float, null: int | None) -> torch.Tensor | None:
    """Labels with a share replaced by the null class, shape (B); None for an unconditional network."""
    if null is None:
        return None
    return torch.where(batch["dropout_uniform"] < label_dropout, null, batch["class_labels"])


def clean_samples(batch: dict, vae: AutoencoderKL | None, device: torch.device) -> torch.Tensor:
    """What is to be diffused, on the device: images, or with a VAE a sample of their latents; shape (B, C, H, W).

    Latents are drawn from the encoder's Gaussian with the noise of the batch, so they too are a function of the
    position.
    """
    if "moments" in batch:
        moments = batch["moments"].to(device, non_blocking=True)  # (B, 2C, H, W)
    else:
        images = normalize_pixels(batch["pixel_values"].to(device, non_blocking=True))
        if vae is None:
            return images
        moments = encode_moments(vae, images)  # (B, 2C, H, W)
    posterior_noise = batch["posterior_noise"].to(device, non_blocking=True)
    return sample_latents(moments, posterior_noise, vae.config.scaling_factor, vae.config.shift_factor or 0.0)


@dataclass
class NoisyBatch:
    """What a training step works on, on the device.

    Attributes:
        network_inputs: noisy images or latents, shape (B, C, H, W), and what tells the network their level, shape (B).
        clean_images: without noise, shape (B, C, H, W).
        noise: standard normal, shape (B, C, H, W).
        levels: timesteps or sigmas, shape (B).
        level_bins: quartile of each level, int in [0, LEVEL_BINS); shape (B).
        conditions: further arguments of the network: `class_labels`, shape (B), or None for an unconditional network;
            `augment_labels`, shape (B, 9), where images were augmented.
    """

    network_inputs: tuple[torch.Tensor, torch.Tensor]
    clean_images: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    level_bins: torch.Tensor
    conditions: dict[str, torch.Tensor | None]


def diffuse(
    batch: dict,
    args: argparse.Namespace,
    noise_scheduler: NoiseScheduler,
    label_dropout: float,
    null: int | None,
    vae: AutoencoderKL | None,
    device: torch.device,
) -> NoisyBatch:
    """Moves a batch to the device, augments it if its numbers are there, and adds its noise.

    Args:
        batch: of `diffit_data.collate`.
        args: of the distribution of noise levels of EDM, and of the augmentation.
        noise_scheduler: the forward process.
        label_dropout: share of the labels that becomes the null class.
        null: the null class, or None for an unconditional network.
        vae: of a latent model, or None.
        device: of the results.
    """
    levels = build_noise_levels(batch["time_uniform"], noise_scheduler, args.sigma_mean, args.sigma_std)
    level_bins = (batch["time_uniform"] * LEVEL_BINS).long()
    labels = batch_labels(batch, label_dropout, null)
    clean_images = clean_samples(batch, vae, device)
    tensors = (batch["noise"], levels, level_bins)
    noise, levels, level_bins = (tensor.to(device, non_blocking=True) for tensor in tensors)
    conditions = {"class_labels": None if labels is None else labels.to(device, non_blocking=True)}
    if "augmentation" in batch:
        numbers = batch["augmentation"].to(device, non_blocking=True)
        clean_images, conditions["augment_labels"] = augment(clean_images, numbers, args.augmentation_probability)
    network_inputs = build_network_inputs(clean_images, noise, levels, noise_scheduler)
    return NoisyBatch(network_inputs, clean_images, noise, levels, level_bins, conditions)


# ---------------------------------------------------------------------------------------------------------------------
# Steps that go wrong


class StepGuard:
    """Leaves out optimizer steps whose gradient is not finite, without waiting for the device.

    The device skips the update by itself. The host asks for the outcome when the gradient of the next step is on its
    way, so the device always has work.

    Args:
        optimizer: one that obeys `found_inf`, as torch's fused ones and `MuonAdamW` do; under fp16 the gradient
            scaler sets that itself.

    Raises:
        TypeError: if the optimizer does not say that it obeys, since it would take the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        # Set by torch's fused optimizers; the same attribute tells torch's GradScaler.
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"{type(optimizer).__name__} does not obey found_inf, so it would take steps whose gradient is not "
                "finite: use a fused optimizer"
            )
        self.optimizer = optimizer
        self.is_bad, self.arrived = None, None

    def watch(self, grad_norm: torch.Tensor) -> None:
        """To be called before each `optimizer.step()` with the norm of its gradient, shape ()."""
        is_bad = ~grad_norm.isfinite()
        self.optimizer.found_inf = is_bad.float()
        self.is_bad = is_bad.to("cpu", non_blocking=is_bad.device.type == "cuda")
        if is_bad.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def outcome(self) -> bool | None:
        """Whether the step that was watched last was taken; None if there is none, or it was asked for already."""
        if self.is_bad is None:
            return None
        if self.arrived is not None:
            self.arrived.synchronize()
        taken = not self.is_bad.item()
        self.is_bad = None
        return taken


def complete_step(args: argparse.Namespace, state: TrainingState, guard: StepGuard) -> bool:
    """What follows an optimizer step: learning rate schedule, EMA and count, or the count of bad steps.

    Returns:
        Whether there was a step to complete and it was taken.

    Raises:
        RunError: after --max_bad_steps bad steps in a row; weights and checkpoints stay as they were before.
    """
    taken = guard.outcome()
    if taken is None:
        return False
    if taken:
        state.lr_scheduler.step()
        for ema_model in state.ema_models.values():
            ema_model.step(state.model.parameters())
        state.global_step += 1
        state.bad_steps_in_a_row = 0
        return True
    state.bad_steps += 1
    state.bad_steps_in_a_row += 1
    first = state.position - args.global_batch_size
    message = (
        f"loss or gradient not finite in step {state.global_step + 1} on the images at positions {first} to "
        f"{state.position - 1} of the stream"
    )
    if state.bad_steps_in_a_row < args.max_bad_steps:
        logger.warning(f"{message}: passed by ({state.bad_steps} so far)")
        return False
    checkpoints = list_checkpoints(args.output_dir)
    raise_in_all(
        RunError,
        f"{message}, {state.bad_steps_in_a_row} in a row (--max_bad_steps). The last checkpoint is "
        f"{checkpoints[-1] if checkpoints else 'none'}: resume from it with --mixed_precision bf16 or no, or "
        "fine-tune from it (--pretrained_model_name_or_path) with a lower --learning_rate",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Logs, validation, the pipeline folder


def is_due(global_step: int, every: int, last_step: int) -> bool:
    """Whether periodic work is due after this optimizer step: every so many steps, and at the end."""
    return global_step % every == 0 or global_step == last_step


def peak_memory(device: torch.device) -> int:
    """Most memory used so far in bytes: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_to_bins(bins: torch.Tensor, loss: torch.Tensor, level_bins: torch.Tensor) -> None:
    """Adds losses of shape (B), those that are finite, to the sums and counts of their quartiles, also (B)."""
    loss = loss.detach().float()
    finite = loss.isfinite()
    bins.index_add_(1, level_bins, torch.stack([loss.where(finite, 0), finite.float()]))


def bin_means(accelerator: Accelerator, bins: torch.Tensor, name: str) -> dict[str, float]:
    """Mean loss of all processes, under `name`, and by quartile of the noise levels. To be called by all processes.

    Args:
        bins: sums of the losses by quartile of the noise levels, and counts; shape (2, LEVEL_BINS).
        name: for trackers, such as `"train/loss"`.
    """
    sums, counts = accelerator.reduce(bins, "sum").tolist()
    means = {name: sum(sums) / max(sum(counts), 1)}
    for i in range(LEVEL_BINS):
        if counts[i] > 0:
            means[f"{name}_quartile_{i + 1}"] = sums[i] / counts[i]
    return means


def log_metrics(
    accelerator: Accelerator,
    progress: tqdm,
    state: TrainingState,
    bins: torch.Tensor,
    grad_norm: torch.Tensor,
    lr: float,
    images_per_second: float,
    num_bad_images: int,
) -> None:
    """Sends the numbers since the last log to the trackers and the progress bar. To be called by all processes.

    Args:
        bins: see `bin_means`.
        images_per_second: of all processes.
        num_bad_images: skipped by this process so far.
    """
    values = bin_means(accelerator, bins, "train/loss") | {
        "train/grad_norm": grad_norm.item(),
        "train/learning_rate": lr,
        "train/images_per_second": images_per_second,
        "train/peak_memory_gib": peak_memory(accelerator.device) / 2**30,
        "train/kimg": state.position / 1000,
        "train/bad_images": num_bad_images,
        "train/bad_steps": state.bad_steps,
    }
    for name, ema_model in state.ema_models.items():
        values[f"train/{name}_decay"] = ema_model.cur_decay_value
    accelerator.log(values, step=state.global_step)
    loss = values["train/loss"]
    progress.update(state.global_step - progress.n)
    progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", img_s=f"{images_per_second:.0f}", refresh=False)


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ModelMixin,
    vae: AutoencoderKL | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Loss on held-out images at fixed noise and evenly spread timesteps, in all and by quartile of the noise levels.

    It has the weights of the training loss (--snr_gamma), so the two curves are the same quantity. None if a stop was
    asked for in the middle.
    """
    stream = PositionStream(len(table), seed=0)
    num_channels = model.config.in_channels if vae is None else vae.config.in_channels
    dataset = build_dataset(args, table, stream, model.config, num_channels, center_crop=True, random_flip=False)
    num_positions = min(len(table), args.validation_loss_images)
    positions = [(p, stream.index(p)) for p in range(num_positions)]
    batches = [positions[i : i + args.train_batch_size] for i in range(0, num_positions, args.train_batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    bins = torch.zeros(2, LEVEL_BINS, device=accelerator.device)
    bad_images: set[str] = set()
    for batch in DataLoader(
        dataset,
        batch_sampler=mine,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
    ):
        report_bad_images(batch["bad_images"], bad_images)
        batch["time_uniform"] = (batch["position"] + 0.5) / num_positions
        noisy = diffuse(batch, args, noise_scheduler, 0.0, null_label(model), vae, accelerator.device)
        model_pred = model(*noisy.network_inputs, **noisy.conditions).sample
        loss = compute_loss(
            model_pred, noise_scheduler, noisy.clean_images, noisy.noise, noisy.levels, args.snr_gamma or None
        )
        add_to_bins(bins, loss, noisy.level_bins)
        if stop.is_wanted():
            break
    return None if stop.is_wanted_anywhere() else bin_means(accelerator, bins, "validation/loss")


def build_pipeline(
    model: ModelMixin,
    vae: AutoencoderKL | None,
    scheduler: SchedulerMixin,
    id2label: dict[str, str] | None = None,
) -> DiffiTPipeline:
    """What draws previews, and what all runs save but unconditional ones of DDPM in pixels."""
    return DiffiTPipeline(scheduler=scheduler, id2label=id2label, vae=vae, **{"unet": None, part_name(model): model})


@torch.no_grad()
def draw_share(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ModelMixin,
    vae: AutoencoderKL | None,
    guidance_model: ModelMixin | None,
    noise_scheduler: NoiseScheduler,
    num_images: int,
    stop: StopRequest,
) -> torch.Tensor | None:
    """This process's part of the images of the seeds 0, 1, 2, ..., class after class. To be called by all processes.

    Returns:
        uint8, shape (B, C, H, W), of the same B in all processes: gathered, the first `num_images` are those asked
        for. None if a stop was asked for in the middle.
    """
    is_edm = isinstance(noise_scheduler, EDMEulerScheduler)
    sampler = EDMDPMSolverMultistepScheduler if is_edm else DDIMScheduler
    pipeline = build_pipeline(model, vae, sampler.from_config(noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    share = math.ceil(num_images / accelerator.num_processes)
    seeds = [min(accelerator.process_index * share + i, num_images - 1) for i in range(share)]
    null = null_label(model)
    images = []
    for i in range(0, share, args.train_batch_size):
        if stop.is_wanted():
            break
        chunk = seeds[i : i + args.train_batch_size]
        drawn = pipeline(
            class_labels=None if null is None else [seed % null for seed in chunk],
            batch_size=len(chunk),
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=1.0 if null is None and guidance_model is None else args.validation_guidance_scale,
            guidance_schedule=args.validation_guidance_schedule,
            guidance_power=args.validation_guidance_power,
            guidance_interval=args.validation_guidance_interval,
            guidance_channels=args.validation_guidance_channels,
            guidance_model=guidance_model,
            generator=[torch.Generator().manual_seed(seed) for seed in chunk],
            output_type="pt",
        ).images
        images.append((drawn * 255).round().byte().to(accelerator.device))
    return None if stop.is_wanted_anywhere() else torch.cat(images)


@dataclass
class Evaluator:
    """What the samples are compared by and with.

    Attributes:
        extractor: images to features.
        reference: features of the held-out images, or of the training images where none are held out.
    """

    extractor: FeatureExtractor
    reference: FeatureSet


def build_extractor(accelerator: Accelerator, args: argparse.Namespace, source: Table) -> FeatureExtractor | None:
    """Of --feature_extractor, for --eval_steps; None without it.

    Raises:
        ValueError: if it cannot be loaded, or there are too few images to compare with.
    """
    if args.eval_steps is None:
        return None
    if len(source) <= NEAREST:
        raise UserError(f"--eval_steps compares with {len(source)} images, {NEAREST + 1} are needed at least")
    load = functools.partial(load_extractor, args.feature_extractor, accelerator.device)
    return on_all_processes(accelerator, load, args.feature_model, args.inception_path)


def build_evaluator(
    accelerator: Accelerator, args: argparse.Namespace, extractor: FeatureExtractor | None, source: Table
) -> Evaluator | None:
    """For --eval_steps; None without it. The features of the real images are kept in --output_dir.

    Args:
        extractor: see `build_extractor`.
        source: images to compare with.
    """
    if extractor is None:
        return None
    num_channels = args.num_channels or detect_num_channels(source)
    features = extract_features(
        accelerator,
        Path(args.output_dir, "eval"),
        TableImages(source, args.resolution, num_channels),
        {"data": source.digest(), "resolution": list(args.resolution), "channels": num_channels},
        extractor,
        num_workers=args.dataloader_num_workers,
    )
    return Evaluator(extractor, FeatureSet(torch.from_numpy(np.array(features))))


def evaluate(
    accelerator: Accelerator, args: argparse.Namespace, evaluator: Evaluator, pixels: torch.Tensor
) -> dict[str, float]:
    """Metrics of the samples that all processes have drawn (see `draw_share`); empty but in the main process."""
    features = torch.cat([evaluator.extractor(batch) for batch in pixels.split(64)])  # (B, F)
    features = accelerator.gather(features)[: args.eval_num_images].cpu()
    if not accelerator.is_main_process:
        return {}
    values = metric_values(args.eval_metrics, FeatureSet(features), evaluator.reference)
    return {f"eval/{name}": value for name, value in values.items()}


def log_validation(
    accelerator: Accelerator,
    args: argparse.Namespace,
    state: TrainingState,
    vae: AutoencoderKL | None,
    guidance_model: ModelMixin | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    validation_table: Table | None,
    evaluator: Evaluator | None,
    run_dir: OutputFolder,
    stop: StopRequest,
) -> bool:
    """Held-out loss, metrics if they are due, and preview grid of each average, and the pipeline folder of the best.

    To be called by all processes.

    Returns:
        False if it was given up because a stop was asked for.
    """
    model = state.model.eval()
    draw = functools.partial(draw_share, accelerator, args, model, vae, guidance_model, noise_scheduler)
    if evaluator is not None and not is_due(state.global_step, args.eval_steps, args.max_train_steps):
        evaluator = None
    results = {}  # by the name of the average: losses and metrics, and the preview
    averages = state.ema_models or {"": None}
    for name, ema_model in averages.items():
        with ema_weights(ema_model, model):
            values, pixels = {}, None
            if validation_table is not None:
                values = validation_loss(accelerator, args, model, vae, noise_scheduler, validation_table, stop)
            if values is not None and evaluator is not None:
                pixels = draw(args.eval_num_images, stop)
                values = None if pixels is None else values | evaluate(accelerator, args, evaluator, pixels)
            if values is not None:
                pixels = draw(args.num_validation_images, stop)
        if values is None or pixels is None:
            logger.info(f"gave up the validation of step {state.global_step}, because a stop was asked for")
            break
        pixels = accelerator.gather(pixels)[: args.num_validation_images].cpu().permute(0, 2, 3, 1).numpy()
        results[name] = values, image_grid([viewable(image) for image in pixels])
    finished = len(results) == len(averages)
    if finished and accelerator.is_main_process:
        for name, (values, grid) in results.items():
            suffix = f"_{name}" if len(results) > 1 else ""
            accelerator.log({f"{key}{suffix}": value for key, value in values.items()}, step=state.global_step)
            preview = f"previews/step_{state.global_step:08d}{suffix}.png"
            if not run_dir.write(preview, grid.save):
                logger.warning(f"{preview} in {run_dir.folder} is not of this run: left as it is")
            stacked = np.asarray(grid.convert("RGB"))[None]
            for tracker in accelerator.trackers:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"samples{suffix}": stacked}, step=state.global_step, **options)
        best = min(results, key=lambda name: badness(args, results[name][0]))  # or the first
        save = functools.partial(
            save_pipeline, args, state, vae, noise_scheduler, table, best, *results[best], run_dir
        )
        with ema_weights(averages[best], model):
            save()
            if evaluator is not None:
                record_file = Path(args.output_dir, "eval", "best.json")
                record = best_record(args, evaluator, state.global_step, results[best][0])
                if is_best_so_far(args, record_file, record):
                    save("best")
                    text = json.dumps(record, indent=2) + "\n"
                    run_dir.write("eval/best.json", lambda file: file.write_text(text))
    model.train()
    accelerator.wait_for_everyone()
    return finished


def badness(args: argparse.Namespace, values: dict[str, float]) -> float:
    """What the best average has least of: by the first of --eval_metrics, else by the held-out loss."""
    metric = args.eval_metrics[0]
    sign = -1 if metric in ("precision", "recall") else 1
    return sign * values[f"eval/{metric}"] if f"eval/{metric}" in values else values.get("validation/loss", 0.0)


def best_record(args: argparse.Namespace, evaluator: Evaluator, global_step: int, values: dict[str, float]) -> dict:
    """What is kept of the best metrics, and what they were measured with, without which they mean nothing."""
    measured_with = {
        **evaluator.extractor.settings,
        "extractor": evaluator.extractor.name,
        "metric": args.eval_metrics[0],
        "images": args.eval_num_images,
        "reference_images": len(evaluator.reference),
    }
    return {"global_step": global_step, "values": values, "measured_with": measured_with}


def is_best_so_far(args: argparse.Namespace, file: Path, record: dict) -> bool:
    """Whether metrics are better than those of the file; those measured otherwise, or of later steps, do not count."""
    if not file.is_file():
        return True
    earlier = json.loads(file.read_text())
    comparable = earlier["measured_with"] == record["measured_with"]
    if not comparable or earlier["global_step"] >= record["global_step"]:
        return True
    return badness(args, record["values"]) < badness(args, earlier["values"])


def save_pipeline(
    args: argparse.Namespace,
    state: TrainingState,
    vae: AutoencoderKL | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    average: str,
    validation: dict[str, float],
    grid: PIL.Image.Image,
    run_dir: OutputFolder,
    target: str = "",
) -> None:
    """Writes a pipeline folder: weights as they are now, scheduler, arguments, model card.

    It replaces the one that was there; a file that someone has changed since, such as the model card, stays.

    Args:
        average: name of the average whose weights they are, or "".
        validation: its held-out losses and metrics, as far as there are any.
        grid: its preview.
        run_dir: the folder of the run.
        target: folder in it, or "" for itself.
    """
    folder = run_dir.folder / "tmp-pipeline"
    run_dir.remove(["tmp-pipeline/"])
    run_dir.announce(["tmp-pipeline/"])
    if args.class_conditional or part_name(state.model) == "transformer" or args.formulation == "edm":
        names = table.class_names if args.class_conditional else ()
        id2label = {str(number): name for number, name in enumerate(names)} or None
        build_pipeline(state.model, vae, noise_scheduler, id2label).save_pretrained(folder)
    else:
        DDPMPipeline(state.model, noise_scheduler).save_pretrained(folder)
    (folder / "training_args.yaml").write_text(yaml.safe_dump(public_args(args)))
    grid.save(folder / "sample_grid.png")
    model_card(args, state, table, average, validation).save(folder / "README.md")
    kept = run_dir.publish(folder, target, earlier=pipeline_files(run_dir, target))
    if kept:
        logger.warning(f"changed since they were written, so left as they are: {', '.join(kept)} in {run_dir.folder}")


def pipeline_files(run_dir: OutputFolder, target: str = "") -> list[str]:
    """Names of the files of the pipeline that a run wrote into its folder, or into a folder in it."""
    prefix = f"{target}/" if target else ""
    inner = {name: name.removeprefix(prefix) for name in run_dir.files if name.startswith(prefix)}
    return [name for name, part in inner.items() if part in PIPELINE_FILES or part.split("/")[0] in PIPELINE_FOLDERS]


def model_card(
    args: argparse.Namespace, state: TrainingState, table: Table, average: str, validation: dict[str, float]
) -> ModelCard:
    """What was trained on what, and how to load it."""
    model_name = pipeline_name(args)
    # A path of the machine that trained is of no use to others, so only its last part is told.
    source = args.dataset_name or Path(table.source).name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffit", "class-conditional" if args.class_conditional else "unconditional"],
        datasets=[args.dataset_name] if args.dataset_name and not Path(args.dataset_name).exists() else None,
    )
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    objective = f"{args.prediction_type}, {args.beta_schedule} betas, {args.num_train_timesteps} timesteps"
    if args.formulation == "edm":
        objective = f"EDM, ln sigma of mean {args.sigma_mean} and standard deviation {args.sigma_std}"
    weights = f"EMA, decay up to {args.ema_max_decay}" if args.use_ema else "as trained, no EMA"
    if args.ema_half_life_kimg is not None:
        widths = ", ".join(f"{kimg:g}" for kimg in args.ema_half_life_kimg)
        criterion = next((key.removeprefix("eval/") for key in validation if key.startswith("eval/")), "held-out loss")
        chosen = f"the best by {criterion.replace('_', ' ')}" if validation else "the first"
        weights = f"`{average}`: EMA over a half-life counted in images (kimg), {chosen} of {widths}"
    classes = ""
    steps = 18 if args.formulation == "edm" else args.num_train_timesteps
    call = f"pipeline(batch_size=4, num_inference_steps={steps}).images"
    if args.class_conditional:
        classes = f"\nClasses: {', '.join(table.class_names[:50])}{', ...' if len(table.class_names) > 50 else ''}.\n"
        call = f"pipeline(class_labels=[{table.class_names[0]!r}] * 4, num_inference_steps={min(50, steps)}).images"
    rows = {
        "network": f"`{type(state.model).__name__}`, {num_parameters / 1e6:.1f} M parameters",
        "data": f"{source}, {len(table):,} images, {'x'.join(map(str, args.resolution))} pixels",
        "optimizer steps": f"{state.global_step:,} of {args.max_train_steps:,}, {args.global_batch_size} images each",
        "images seen": f"{state.position:,}",
        "objective": objective,
        "weights": weights,
    }
    if "validation/loss" in validation:
        rows["held-out loss"] = f"{validation['validation/loss']:.4f}"
    for key, value in validation.items():
        if key.startswith("eval/"):
            rows[key.removeprefix("eval/").replace("_", " ")] = (
                f"{value:.4g} ({args.feature_extractor}, {args.eval_num_images:,} images)"
            )
    table_text = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return ModelCard(f"""---
{data.to_yaml()}
---

# {model_name}

A diffusion model in the form of DiffiT ([arXiv 2312.02139](https://arxiv.org/abs/2312.02139)), trained with DiffiT
for diffusers. All arguments: `training_args.yaml`.

| | |
|---|---|
{table_text}
{classes}
![Samples of the seeds 0, 1, 2, ...](sample_grid.png)

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({json.dumps(model_name)}, trust_remote_code=True)
images = {call}
```
""")


def pipeline_name(args: argparse.Namespace) -> str:
    """What the model card calls the model: its name on the hub, or that of its folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_to_hub(args: argparse.Namespace, run_dir: OutputFolder) -> None:
    """Uploads the files of the pipeline, and nothing else of --output_dir.

    Raises:
        RunError: says how to upload by hand, if it failed, or if the repository exists and is public although
            --hub_private_repo is given.
    """
    api = HfApi(token=args.hub_token)
    name = repo_id = pipeline_name(args)
    patterns = [*PIPELINE_FILES, "unet/*", "transformer/*", "vae/*", "scheduler/*"]
    try:
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_private_repo and not api.model_info(repo_id).private:
            raise UserError(f"--hub_private_repo: {repo_id} exists already and is public")
        if repo_id != name and run_dir.is_unchanged("README.md"):  # the user's own name comes before that of the model
            card = Path(args.output_dir, "README.md").read_text(encoding="utf-8")
            card = card.replace(f"\n# {name}\n", f"\n# {repo_id}\n")
            card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
            run_dir.write("README.md", lambda file: file.write_text(card, encoding="utf-8"))
        files = [glob.escape(file) for file in pipeline_files(run_dir)]
        api.upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, allow_patterns=files, commit_message="Upload DiffiT"
        )
    except Exception as error:  # of the network, of the hub, of files: the training is over and must not look lost
        private = " --private" if args.hub_private_repo else ""
        included = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise RunError(
            f"the trained pipeline is safe in {args.output_dir}, but could not be uploaded to {repo_id}: {error}. "
            f"To upload it by hand: hf upload{private} {repo_id} {shlex.quote(args.output_dir)} . {included}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Training


def main(args: argparse.Namespace) -> None:
    """Takes possession of --output_dir and trains."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for name in ("httpx", "httpx2"):  # of older and newer versions of huggingface_hub
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.ExitStack() as resources, out_of_memory_errors():
        stop = StopRequest(args.max_train_time)
        resources.callback(stop.close)
        resume_after_restart(args)
        config = read_model_config(args)
        join_processes()
        accelerator = build_accelerator(args)
        resolve_diffusion(args)
        check_agreement(accelerator, describe_launch(args, config))
        lock = OutputDirLock(args.output_dir)
        if not args.dry_run:
            resources.push(lock)  # first, because a signal may come while it is taken
            token = on_main_process(accelerator, lock.__enter__)
            on_all_processes(accelerator, lock.check_visible, token)
        train(accelerator, args, config, lock, stop)


def is_restarted() -> bool:
    """Whether torchrun or SLURM has started this command again."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("TORCHELASTIC", "SLURM"))


def resume_after_restart(args: argparse.Namespace) -> None:
    """Where torchrun or SLURM starts the same command again, it is to go on, not to begin anew."""
    if is_restarted() and (args.overwrite_output_dir or args.resume_from_checkpoint != "latest"):
        args.overwrite_output_dir, args.resume_from_checkpoint = False, "latest"
        print("restarted: going on as with --resume_from_checkpoint latest", file=sys.stderr)


def train(
    accelerator: Accelerator, args: argparse.Namespace, config_asked: dict, lock: OutputDirLock, stop: StopRequest
) -> None:
    """Sets up, resumes, trains and saves.

    Args:
        config_asked: of the model, see `read_model_config`.
        lock: proves that --output_dir is ours.
        stop: not begun yet.
    """
    # 1. set up
    run_dir = on_main_process(accelerator, open_run_dir, args)
    resume_flags = (args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    checkpoint = on_main_process(accelerator, find_checkpoint, *resume_flags)
    table, validation_table = on_all_processes(accelerator, build_tables, args)
    config = on_all_processes(accelerator, lambda: resolve_model_config(args, config_asked, table, outline_vae(args)))
    resolve_duration(args, len(table))
    digest = table.digest()
    check_agreement(accelerator, {"the training data": digest, "the model config": config})
    if args.dry_run:
        print_dry_run(accelerator, args, config, table, validation_table)
        return
    torch.manual_seed(args.seed)
    model_source = (args.pretrained_model_name_or_path, args.reset_class_embeddings)
    raw_model = on_all_processes(accelerator, build_model, config, *model_source)
    set_up_model(accelerator, args, raw_model)
    vae = on_all_processes(accelerator, build_vae, args, table, accelerator.device)
    guidance_model = on_all_processes(accelerator, build_guidance_model, args, raw_model, accelerator.device)
    if vae is not None:  # by which the same images are other data
        digest += f" {vae_description(vae)}"
    compared_with = table if validation_table is None else validation_table
    extractor = build_extractor(accelerator, args, compared_with)
    noise_scheduler = build_noise_scheduler(args)
    raw_optimizer = build_optimizer(args, raw_model)
    lr_scheduler = build_lr_scheduler(args, raw_optimizer)
    state = TrainingState(raw_model, build_ema(args, raw_model), raw_optimizer, lr_scheduler, len(table), digest)

    # 2. resume
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, public_args(args), state)
    prepare_output_dir(accelerator, args, run_dir, state.global_step)
    evaluator = build_evaluator(accelerator, args, extractor, compared_with)
    model, optimizer = accelerator.prepare(raw_model, raw_optimizer)
    batches = build_batches(accelerator, args, table, config, state.position)
    arguments = public_args(args)
    logs = Path(args.output_dir, args.logging_dir, PROJECT)
    earlier_logs = set(files_below(logs))
    accelerator.init_trackers(
        PROJECT,
        config=None if checkpoint else {k: v if isinstance(v, int | float) else str(v) for k, v in arguments.items()},
        init_kwargs={"tensorboard": {"purge_step": state.global_step + 1}},
    )
    if accelerator.is_main_process:
        new_logs = set(files_below(logs)) - earlier_logs
        run_dir.announce(log.relative_to(args.output_dir).as_posix() for log in new_logs)
    describe_run(accelerator, args, raw_model, table, validation_table)
    stop.begin()
    validate = functools.partial(
        log_validation,
        *(
            accelerator,
            args,
            state,
            vae,
            guidance_model,
            noise_scheduler,
            table,
            validation_table,
            evaluator,
            run_dir,
            stop,
        ),
    )
    validated = True
    if state.global_step >= args.max_train_steps:
        logger.info(f"nothing left to train: {checkpoint} is at step {state.global_step} of {args.max_train_steps}")
        # It may have been cut off.
        validated = validate()

    # 3. train
    null = null_label(raw_model)
    bins = torch.zeros(2, LEVEL_BINS, device=accelerator.device)  # losses since the last log, by noise level
    bad_images: set[str] = set()
    guard = StepGuard(raw_optimizer)
    validation_periods = [every for every in (args.validation_steps, args.eval_steps) if every is not None]
    periods = (args.logging_steps, args.checkpointing_steps, *validation_periods)
    progress = tqdm(total=args.max_train_steps, initial=state.global_step, disable=not accelerator.is_main_process)
    log_position, log_time = state.position, time.perf_counter()
    model.train()
    while state.global_step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            report_bad_images(batch["bad_images"], bad_images)
            noisy = diffuse(batch, args, noise_scheduler, args.label_dropout, null, vae, accelerator.device)
            seed_dropout(args.seed, int(batch["position"][0]))
            with accelerator.accumulate(model):
                model_pred = model(*noisy.network_inputs, **noisy.conditions).sample
                loss = compute_loss(
                    model_pred, noise_scheduler, noisy.clean_images, noisy.noise, noisy.levels, args.snr_gamma or None
                )
                accelerator.backward(spread_non_finite(loss).mean())
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    complete_step(args, state, guard)  # the step before, if the host did not wait for it
                    guard.watch(grad_norm)
                    lr = lr_scheduler.get_last_lr()[0]
                optimizer.step()
                optimizer.zero_grad()
            add_to_bins(bins, loss, noisy.level_bins)
        state.position += args.global_batch_size
        stopping = stop.agreed()
        if not stopping and not any(is_due(state.global_step + 1, every, args.max_train_steps) for every in periods):
            continue
        if not complete_step(args, state, guard):
            continue
        if is_due(state.global_step, args.logging_steps, args.max_train_steps):
            images_per_second = (state.position - log_position) / (time.perf_counter() - log_time)
            log_metrics(accelerator, progress, state, bins, grad_norm, lr, images_per_second, len(bad_images))
            bins.zero_()
            log_position, log_time = state.position, time.perf_counter()
        paused = time.perf_counter()
        finished = state.global_step == args.max_train_steps
        if stopping or is_due(state.global_step, args.checkpointing_steps, args.max_train_steps):
            save_checkpoint(
                accelerator, lock, run_dir, arguments, state, noise_scheduler, args.checkpoints_total_limit
            )
        if stopping and not finished:
            break
        if any(is_due(state.global_step, every, args.max_train_steps) for every in validation_periods):
            validated = validate()
        log_time += time.perf_counter() - paused  # images/s is of training alone

    # 4. finish
    progress.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # a launcher may end the main process when the first of the others has ended
    stop.close()
    if state.global_step < args.max_train_steps or not validated:
        logger.info(f"stopped at step {state.global_step}; go on with --resume_from_checkpoint latest")
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    if accelerator.is_main_process:
        logger.info(f"the trained pipeline is {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:  # the other processes are free: the group has ended
        push_to_hub(args, run_dir)


def describe_launch(args: argparse.Namespace, config: dict) -> dict:
    """What must be the same in all processes before data is touched: arguments, model config, versions, code.

    Where the data lies may differ from machine to machine: the images themselves are compared later.
    """
    places = {"train_data_dir", "train_data_file", "latents_dir", "cache_dir"}
    arguments = {f"--{key}": value for key, value in public_args(args).items() if key not in places}
    files = sorted([*CODE_FOLDER.glob("*.py"), *CODE_FOLDER.glob("diffit/**/*.py")])
    code = {str(file.relative_to(CODE_FOLDER)): file_digest(file)["sha256"][:8] for file in files}
    return arguments | {"the model config": config, "torch": torch.__version__, "the code": code}


def set_up_model(accelerator: Accelerator, args: argparse.Namespace, model: ModelMixin) -> None:
    """Attention backend, gradient checkpointing and compilation, as the flags say; places the model on its device."""
    model.to(accelerator.device)
    backend = args.attention_backend
    if backend == "auto":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        backend, reason = choose_attention_backend(model, accelerator.device, dtype)
        logger.info(f"attention backend: {backend} ({reason})")
    elif backend == "xformers" and accelerator.device.type != "cuda":
        raise UserError(f"--attention_backend xformers needs CUDA, the device is {accelerator.device.type}")
    elif backend == "flex" and accelerator.device.type in ("cpu", "mps"):
        raise UserError(
            f"--attention_backend flex cannot train on the device {accelerator.device.type}: it has no backward pass "
            "there; use native"
        )
    set_attention_backend(model, backend)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile or backend == "flex":
        # Resolutions x widths x training and validation: by default torch leaves what is beyond 8 of them uncompiled.
        torch._dynamo.config.recompile_limit = 64
    if args.compile:  # in place, so that the names of the weights stay
        model.compile_repeated_blocks() if model._repeated_blocks else model.compile()


def seed_dropout(seed: int, position: int) -> None:
    """Makes dropout in the network a function of the seed and the first position of the micro-batch."""
    torch.manual_seed(int(position_generator(seed, position, DROPOUT).integers(2**63)))


def open_run_dir(args: argparse.Namespace) -> OutputFolder:
    """The folder of the run, in which nothing of the user's would be lost. To be called before anything is written.

    Raises:
        UserError: if --output_dir is the folder of this code or holds a model that this run reads, if it holds files
            of our names that are not ours, or a trained pipeline that no flag allows to replace.
    """
    folder = f"--output_dir {args.output_dir}"
    if is_code_folder(args.output_dir):
        raise UserError(f"{folder} is the folder of this code, which training would overwrite: choose another folder")
    for flag in ("pretrained_model_name_or_path", "vae_model_name_or_path", "validation_guidance_model"):
        model = getattr(args, flag)
        if model is not None and Path(model).exists() and is_within(model, args.output_dir):
            raise UserError(f"{folder} holds --{flag} {model}, which training would overwrite: choose another folder")
    if args.dataset_name is not None and Path(args.dataset_name).is_dir():
        if is_within(args.output_dir, args.dataset_name):
            raise UserError(
                f"{folder} lies in --dataset_name {args.dataset_name}, which would then hold this run's previews: "
                "choose another folder, or give the images as --train_data_dir, which leaves them out"
            )
    run_dir = OutputFolder(args.output_dir, "train_diffit.py")
    checkpoints = list_checkpoints(args.output_dir)
    foreign = [path.name for path in checkpoints if not is_ours(path, run_dir)]
    if foreign:
        raise UserError(
            f"{folder} holds {foreign[0]}, which this script did not write: move it, or choose another folder"
        )
    links = [path.name for path in checkpoints if path.is_symlink()]
    if links and args.overwrite_output_dir:
        raise UserError(f"{folder}: {links[0]} is a link, which --overwrite_output_dir does not delete: move it away")
    run_dir.check_free([*RUN_OUTPUTS, f"{args.logging_dir}/{PROJECT}/hparams.yml"])
    if Path(args.output_dir, "model_index.json").is_file() and not checkpoints and not is_restarted():
        if not args.overwrite_output_dir and args.resume_from_checkpoint in (None, "latest"):
            raise UserError(
                f"{folder} holds a trained pipeline and no checkpoint to resume from: give --overwrite_output_dir to "
                "replace it, or choose another folder"
            )
    return run_dir


def prepare_output_dir(
    accelerator: Accelerator, args: argparse.Namespace, run_dir: OutputFolder, global_step: int
) -> None:
    """Clears --output_dir: with --overwrite_output_dir of checkpoints, previews, metrics and logs of an earlier run.

    Where a run goes back to an earlier checkpoint, the later ones are moved aside, or `latest` would mean them.
    """
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        # What a run that was killed while writing has left.
        run_dir.remove([name for name in run_dir.files if name.startswith("tmp-")])
        if args.overwrite_output_dir:
            for old in list_checkpoints(output_dir):
                remove_checkpoint(old)
            earlier = ("previews/", "best/", "eval/", "checkpoint-", f"{args.logging_dir}/")
            run_dir.remove([name for name in run_dir.files if name.startswith(earlier)])
            for features in output_dir.glob("eval/features-*"):
                remove_whole_folder(features)
            for name in ("eval", args.logging_dir):
                remove_empty_folders(output_dir / name)
        for later in list_checkpoints(output_dir):
            if step_of(later) > global_step and checkpoint_problem(later) is None:
                logger.warning(f"resuming from step {global_step}, before {later.name}")
                set_aside(later)
    accelerator.wait_for_everyone()


def report_bad_images(messages: list[str], seen: set[str]) -> None:
    """Logs each skipped image once."""
    for message in messages:
        if message not in seen:
            seen.add(message)
            logger.warning(f"skipped ({len(seen)} so far): {message}", main_process_only=False)


def describe_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ModelMixin,
    table: Table,
    validation_table: Table | None,
) -> None:
    """Logs the sizes of the run."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = args.max_train_steps * args.global_batch_size / len(table)
    held_out = "" if validation_table is None else f", {len(validation_table):,} held out"
    logger.info(
        f"{type(model).__name__} with {num_parameters:,} parameters; {len(table):,} images of "
        f"{'x'.join(map(str, args.resolution))} pixels, {model.config.in_channels} channels{held_out}; "
        f"{args.max_train_steps:,} steps of {args.global_batch_size} images ({args.train_batch_size} x "
        f"{accelerator.num_processes} processes x {args.gradient_accumulation_steps} accumulation), "
        f"{epochs:.1f} epochs"
    )
    if table.class_names is not None and not args.class_conditional:
        logger.info(f"{table.source} has {len(table.class_names)} classes; --class_conditional would train on them")


def print_dry_run(
    accelerator: Accelerator,
    args: argparse.Namespace,
    config: dict,
    table: Table,
    validation_table: Table | None,
) -> None:
    """Prints the resolved arguments, parameters and FLOPs. The network exists on the meta device only."""
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    if accelerator.is_main_process:
        print(yaml.safe_dump(public_args(args)), end="")
        print(f"model_config_resolved: {json.dumps(config)}")
        print(f"parameters: {sum(parameter.numel() for parameter in model.parameters())}")
        print(f"training_flops_per_image: {training_flops_per_image(config)}")
    describe_run(accelerator, args, model, table, validation_table)


@contextlib.contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Says which flags help where memory runs out in the `with` block.

    Raises:
        RunError: in place of the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explanation = explain_out_of_memory(error)
        if explanation is None:
            raise
        failure = RunError(explanation)
        failure.raised_in = "process"
        raise failure from error


def explain_out_of_memory(error: Exception) -> str | None:
    """A message naming the flags that help, if an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory: {error}. What helps: a smaller --train_batch_size (with --global_batch_size the training "
            "stays the same), --gradient_checkpointing, --mixed_precision bf16, a smaller --resolution"
        )
    return None


if __name__ == "__main__":
    run_script(parse_args, main)
