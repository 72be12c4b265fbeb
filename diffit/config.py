# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What may be asked of a training: its flags, their YAML files, and the rules that need neither data nor models."""

import argparse
import difflib
import math
import re
import sys
from pathlib import Path

import torch
import yaml
from accelerate.utils import is_wandb_available
from diffusers.optimization import SchedulerType

from diffit.command_line import Parser, number_type, path_type, resolution_type
from diffit.launcher import EXIT_STOPPED
from diffit_pipeline import GUIDANCE_SCHEDULES

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


def step_rules_type(text: str) -> str:
    """An argparse type: rules of `piecewise_constant`, such as `1:1000,0.1:2000,0.01`."""
    *rules, last = text.split(",")
    try:
        float(last)
        for rule in rules:
            multiple, steps = rule.split(":")
            float(multiple), int(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected MULTIPLE:STEPS pairs and a last MULTIPLE, such as 1:1000,0.1:2000,0.01, got {text!r}"
        ) from None
    return text


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
    group.add_argument(
        "--lr_step_rules", type=step_rules_type, help="of piecewise_constant, e.g. 1:1000,0.1:2000,0.01"
    )
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


def args_to_config(args: argparse.Namespace) -> dict:
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
