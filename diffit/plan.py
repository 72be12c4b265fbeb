# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What follows from the flags, the data and the processes: batch arithmetic, sizes, channels, classes, durations."""

import argparse
import contextlib
import json
import math
import os
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin

from diffit.augment import NUM_AUGMENT_LABELS
from diffit.checkpoint import file_digest
from diffit.config import DATA_SOURCES, args_to_config
from diffit.errors import UserError, user_errors
from diffit.latents import LatentTable, load_latent_table, pixels_per_latent
from diffit.networks import model_class, training_flops_per_image
from diffit.run_dir import CODE_FOLDER
from diffit.sources import Table, detect_num_channels, load_image_table
from diffit.stream import split_table
from diffit_model import DiffiTModelMixin, DiffiTTransformer2DModel, DiffiTUNet2DModel

logger = get_logger(__name__, log_level="INFO")


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


def launch_fingerprint(args: argparse.Namespace, config: dict) -> dict:
    """What must be the same in all processes before data is touched: arguments, model config, versions, code.

    Where the data lies may differ from machine to machine: the images themselves are compared later.
    """
    places = {"train_data_dir", "train_data_file", "latents_dir", "cache_dir"}
    arguments = {f"--{key}": value for key, value in args_to_config(args).items() if key not in places}
    files = sorted([*CODE_FOLDER.glob("*.py"), *CODE_FOLDER.glob("diffit/**/*.py")])
    code = {str(file.relative_to(CODE_FOLDER)): file_digest(file)["sha256"][:8] for file in files}
    return arguments | {"the model config": config, "torch": torch.__version__, "the code": code}


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
        print(yaml.safe_dump(args_to_config(args)), end="")
        print(f"model_config_resolved: {json.dumps(config)}")
        print(f"parameters: {sum(parameter.numel() for parameter in model.parameters())}")
        print(f"training_flops_per_image: {training_flops_per_image(config)}")
    describe_run(accelerator, args, model, table, validation_table)
