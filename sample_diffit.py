# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Samples images by seed and class from a folder that `train_diffit.py` wrote.

    python sample_diffit.py --model_path outputs/quickstart --output_dir samples --seeds 0-99 --class_labels 3
    accelerate launch sample_diffit.py --model_path outputs/emoji32 --output_dir samples --seeds 0-9999 --save_npz

The noise of a seed depends on the seed alone. Images that exist are kept, so a stopped run goes on.
"""

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports: the launcher may die meanwhile

import argparse
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from tqdm.auto import tqdm

from diffit.command_line import Parser, path_type, positive_int, run_script
from diffit.cpu_kernels import kernelize
from diffit.errors import UserError, load_model, user_errors
from diffit.features import weights_digest
from diffit.networks import choose_attention_backend, model_class, set_attention_backend
from diffit.processes import join_processes, run_on_main_and_broadcast
from diffit.run_dir import OutputFolder
from diffit.sampling import check_sampling_flags
from diffit_pipeline import (
    EDM_SCHEDULERS,
    FORWARD_PROCESS,
    GUIDANCE_SCHEDULES,
    SCHEDULERS,
    DiffiTPipeline,
    choose_scheduler,
    image_grid,
    load_network,
    null_label,
    to_displayable,
)

MOST_IN_GRID = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Arguments that an image depends on, beside the weights.
IMAGE_ARGUMENTS = (
    "scheduler",
    "num_inference_steps",
    "eta",
    "guidance_scale",
    "guidance_schedule",
    "guidance_power",
    "guidance_interval",
    "guidance_channels",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "dtype",
)


def seed_list(text: str) -> list[int]:
    """Seeds from numbers and ranges: `0-63,100` is 0, 1, ..., 63, 100."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= 2**64:
            raise argparse.ArgumentTypeError(f"expected numbers and ranges such as 0-63,100, got {part!r}")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def grid_size(text: str) -> tuple[int, int]:
    """Columns and rows from `8x8`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected COLUMNSxROWS such as 8x8, got {text!r}")
    return int(match[1]), int(match[2])


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(__doc__)
    parser.add_argument("--model_path", type=path_type, required=True, help="folder that training wrote, or hub name")
    parser.add_argument("--output_dir", type=path_type, required=True, help="folder for the images")
    parser.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="delete what an earlier sampling has written there; anything else stays",
    )
    parser.add_argument("--seeds", type=seed_list, help="such as 0-63,100; default 0-63, or as many as are needed")
    parser.add_argument("--class_labels", help="numbers or names, separated by commas; `all` for every class")
    parser.add_argument(
        "--num_images_per_class", type=positive_int, help="this many images of each class, with a seed of its own each"
    )
    parser.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS | EDM_SCHEDULERS),
        help="edm_ ones for EDM models, the others for all others; default: ddim, or edm_heun for EDM models",
    )
    parser.add_argument("--num_inference_steps", type=positive_int, default=50)
    parser.add_argument("--eta", type=float, default=0.0, help="of DDIM: 0 deterministic, 1 as much noise as DDPM")
    parser.add_argument(
        "--s_churn", type=float, default=0.0, help="of edm_heun: how much noise is renewed on the way, 0 = none"
    )
    parser.add_argument("--s_tmin", type=float, default=0.0, help="lowest sigma with churn")
    parser.add_argument("--s_tmax", type=float, help="highest sigma with churn; default: no limit")
    parser.add_argument("--s_noise", type=float, default=1.0, help="standard deviation of the noise of churn")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="1 = off, one forward pass a step")
    parser.add_argument("--guidance_schedule", choices=GUIDANCE_SCHEDULES, default="constant")
    parser.add_argument("--guidance_power", type=float, default=4.0, help="of --guidance_schedule power_cosine")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="timesteps that are guided, as fractions of the training timesteps (of EDM models, places among the "
        "sigmas of sampling), 1 being noise",
    )
    parser.add_argument("--guidance_channels", type=positive_int, help="guide only the first so many; default: all")
    parser.add_argument(
        "--guidance_model",
        type=path_type,
        help="folder of a weaker model: autoguidance in place of classifier-free guidance",
    )
    parser.add_argument(
        "--vae", type=path_type, help="folder of the AutoencoderKL, or hub name, for a latent model without vae/"
    )
    parser.add_argument("--batch_size", type=positive_int, default=64, help="images per forward pass and process")
    parser.add_argument("--grid", type=grid_size, help="COLUMNSxROWS of grid.png; default: all, almost square")
    parser.add_argument("--save_npz", action="store_true", help="samples.npz in the format of the ADM evaluators")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument(
        "--attention_backend", choices=("auto", "native", "_native_math", "xformers", "flex"), default="auto"
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked before a model is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_churn_flags(parser, args)
    if args.class_labels is None and args.num_images_per_class:
        parser.error("--num_images_per_class needs --class_labels")
    check_sampling_flags(parser, args, can_guide=args.class_labels is not None or args.guidance_model is not None)
    return args


def check_churn_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses values out of range, and flags that would do nothing."""
    if not 0 <= args.s_churn < math.inf:
        parser.error(f"--s_churn must be a number from 0 up, got {args.s_churn}")
    if args.s_churn > 0 and args.scheduler not in (None, "edm_heun"):
        parser.error(f"--s_churn is of --scheduler edm_heun, got {args.scheduler}")
    if args.s_churn == 0:
        for name in ("s_tmin", "s_tmax", "s_noise"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} needs --s_churn above 0")
    if not 0 <= args.s_tmin < (math.inf if args.s_tmax is None else args.s_tmax):
        parser.error(f"--s_tmin must be from 0 up and below --s_tmax, got {args.s_tmin} and {args.s_tmax}")
    if not 0 < args.s_noise < math.inf:
        parser.error(f"--s_noise must be a number above 0, got {args.s_noise}")


def load_pipeline(args: argparse.Namespace) -> DiffiTPipeline:
    """The pipeline of --model_path, with --vae in it; fills in the default of --scheduler.

    Raises:
        ValueError: names the flag whose folder is not there or does not fit.
    """
    vae = None
    if args.vae is not None:
        what = f"--vae {args.vae}: cannot load an AutoencoderKL"
        vae = load_model(what, AutoencoderKL.from_pretrained, args.vae, use_safetensors=True)
    what = f"--model_path {args.model_path}: cannot load a pipeline"
    with user_errors("--scheduler", ValueError), user_errors(what, OSError, TypeError, AttributeError, KeyError):
        args.scheduler = choose_scheduler(args.model_path, args.scheduler)
    loading = (args.model_path, model_class, args.scheduler, DTYPES[args.dtype], vae)
    pipeline = load_model(what, DiffiTPipeline.from_folder, *loading)
    if args.vae is not None and pipeline.transformer is None:
        raise UserError(f"--vae is for latent models, --model_path {args.model_path} is one of pixels")
    if args.vae is None and pipeline.transformer is not None and pipeline.vae is None:
        raise UserError(f"--model_path {args.model_path} is a latent model without vae/: --vae must name one")
    for flag, needed in (("eta", "ddim"), ("s_churn", "edm_heun")):
        if getattr(args, flag) > 0 and args.scheduler != needed:
            raise UserError(f"--{flag} is of --scheduler {needed}, got {args.scheduler}")
    if args.scheduler in SCHEDULERS and args.num_inference_steps > pipeline.scheduler.config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {args.num_inference_steps} are more than the "
            f"{pipeline.scheduler.config.num_train_timesteps} timesteps of the model"
        )
    return pipeline


def load_guidance_model(args: argparse.Namespace) -> ModelMixin | None:
    """The network of --guidance_model.

    Raises:
        ValueError: names the flag if the folder is not there, or the model was trained for another task.
    """
    if args.guidance_model is None:
        return None
    what = f"--guidance_model {args.guidance_model}: cannot load a pipeline"
    network = load_model(what, load_network, args.guidance_model, model_class, DTYPES[args.dtype])
    folders = (args.model_path, args.guidance_model)
    with user_errors(what, Exception):
        ours, theirs = (DDPMScheduler.load_config(folder, subfolder="scheduler") for folder in folders)
    for key in FORWARD_PROCESS:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"--guidance_model {args.guidance_model} has {key} {theirs.get(key)}, --model_path {ours.get(key)}: "
                "they must be alike"
            )
    return network


def list_images(args: argparse.Namespace, pipeline: DiffiTPipeline) -> list[dict]:
    """What is to be drawn, a row for each image: file name, seed and class.

    Without --num_images_per_class every seed is drawn once, with the classes taking turns; with it, each class takes
    the next so many seeds.

    Raises:
        ValueError: names the flag if classes do not exist or seeds do not suffice.
    """
    labels = None
    if args.class_labels is not None:
        if args.class_labels == "all":
            labels = list(range(null_label(pipeline.network) or 0))
        else:
            labels = [label.strip() for label in args.class_labels.split(",")]
        with user_errors(f"--class_labels {args.class_labels}", ValueError):
            labels = pipeline.label_ids(labels)
    if args.num_images_per_class:
        wanted = args.num_images_per_class * len(labels)
        seeds = args.seeds or list(range(wanted))
        if len(seeds) < wanted:
            raise UserError(f"--seeds gives {len(seeds)} seeds, {len(labels)} classes need {wanted}")
        pairs = [(seed, labels[i // args.num_images_per_class]) for i, seed in enumerate(seeds[:wanted])]
    else:
        seeds = args.seeds or list(range(64))
        pairs = [(seed, None if labels is None else labels[i % len(labels)]) for i, seed in enumerate(seeds)]
    suffix = ".png" if pipeline.image_channels in (1, 3, 4) else ".npy"
    rows = []
    for seed, label in pairs:
        prefix = "" if label is None else f"class_{label:03d}_"
        rows.append({"file": f"{prefix}seed_{seed:08d}{suffix}", "seed": seed, "class": label})
        if str(label) in (pipeline.config.id2label or {}):
            rows[-1]["class_name"] = pipeline.config.id2label[str(label)]
    return rows


def prepare_output_dir(args: argparse.Namespace, settings: dict, rows: list[dict]) -> None:
    """Lists the files that are about to be written in the folder's mark, and writes `samples.json`.

    Args:
        args: of the command line.
        settings: that the images depend on.
        rows: see `list_images`.

    Raises:
        UserError: if files of these names are not ours, or images of other settings are there.
    """
    names = [row["file"] for row in rows] + ["grid.png", "samples.json"] + (["samples.npz"] if args.save_npz else [])
    folder = OutputFolder(args.output_dir, Path(__file__).name)
    folder.check_free(names)
    folder.create()
    if args.overwrite_output_dir:
        folder.remove(list(folder.files))
    check_settings(folder.folder, settings)
    arguments = {key: value for key, value in vars(args).items() if key not in ("debug", "overwrite_output_dir")}
    folder.announce(names)
    file = folder.folder / "samples.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["images"] if file.is_file() else []  # of the same settings
    earlier = [row for row in earlier if row["file"] not in names and (folder.folder / row["file"]).is_file()]
    text = json.dumps({"arguments": arguments | settings, "images": earlier + rows}, indent=1) + "\n"
    file.write_text(text, encoding="utf-8")


def check_settings(output_dir: Path, settings: dict) -> None:
    """Refuses to mix images of other settings into a folder.

    Raises:
        ValueError: names the setting that differs.
    """
    file = output_dir / "samples.json"
    if not file.is_file():
        return
    with user_errors(f"--output_dir {output_dir}: samples.json is damaged", ValueError, TypeError, KeyError):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not any((output_dir / row["file"]).is_file() for row in summary["images"]):
            return
        given = dict(summary["arguments"])
    parser = build_parser()  # a flag that was not there yet had no effect, which is its default
    earlier = {key: given.get(key, parser.get_default(key)) for key in settings}
    differ = [key for key in settings if settings[key] != earlier[key]]
    if differ:
        was = ", ".join(f"--{key} {earlier[key]}, now {settings[key]}" for key in differ)
        raise UserError(
            f"--output_dir {output_dir} holds images drawn with other settings ({was}): choose another, or give "
            "--overwrite_output_dir to delete them"
        )


@torch.no_grad()
def draw(
    args: argparse.Namespace,
    pipeline: DiffiTPipeline,
    guidance_model: ModelMixin | None,
    rows: list[dict],
    output_dir: Path,
) -> None:
    """Draws images in batches of exactly --batch_size, the last one padded, and writes each as a PNG."""
    batch_size = args.batch_size
    progress = tqdm(total=len(rows), desc="sampling", disable=not PartialState().is_main_process)
    for i in range(0, len(rows), batch_size):
        batch = rows[i : i + batch_size]
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        images = pipeline(
            class_labels=None if batch[0]["class"] is None else [row["class"] for row in padded],
            batch_size=batch_size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            guidance_schedule=args.guidance_schedule,
            guidance_power=args.guidance_power,
            guidance_interval=args.guidance_interval,
            guidance_channels=args.guidance_channels,
            guidance_model=guidance_model,
            eta=args.eta,
            s_churn=args.s_churn,
            s_tmin=args.s_tmin,
            s_tmax=math.inf if args.s_tmax is None else args.s_tmax,
            s_noise=args.s_noise,
            generator=[torch.Generator().manual_seed(row["seed"]) for row in padded],
            output_type="np",
        ).images
        for row, image in zip(batch, (images * 255).round().astype(np.uint8), strict=False):
            temporary = output_dir / f".{os.getpid()}-{row['file']}"
            if temporary.suffix == ".npy":
                np.save(temporary, image)
            else:
                to_displayable(image).save(temporary)
            temporary.replace(output_dir / row["file"])  # an image is there whole or not at all
        progress.update(len(batch))
    progress.close()


def read_pixels(file: Path) -> np.ndarray:
    """An image that `draw` wrote; uint8, shape (H, W, C)."""
    with user_errors(f"{file} is damaged, delete it", Exception):
        if file.suffix == ".npy":
            return np.load(file)
        with PIL.Image.open(file) as image:
            return np.atleast_3d(np.asarray(image))


def write_summary(args: argparse.Namespace, rows: list[dict], output_dir: Path) -> None:
    """Writes the npz, if asked for, and the grid of all images or of the first `MOST_IN_GRID`."""
    if args.save_npz:
        pixels = np.stack([read_pixels(output_dir / row["file"]) for row in rows])
        pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels
        labels = [] if rows[0]["class"] is None else [np.array([row["class"] for row in rows], np.int64)]
        np.savez(output_dir / "samples.npz", pixels, *labels)
    columns, grid_rows = args.grid or (args.num_images_per_class, None)
    shown = rows[: columns * grid_rows if args.grid else MOST_IN_GRID]
    images = [to_displayable(read_pixels(output_dir / row["file"])) for row in shown]
    image_grid(images, columns, grid_rows).save(output_dir / "grid.png")


def main(args: argparse.Namespace) -> None:
    """Loads the models, shares the images among the processes, and draws those that are not there yet."""
    state = join_processes()
    pipeline = load_pipeline(args)
    guidance_model = load_guidance_model(args)
    with user_errors("--guidance_channels, --guidance_model", ValueError):
        pipeline.check_guidance(args.guidance_channels, guidance_model)
    pipeline.to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()  # decoding a whole batch at once takes more memory than denoising it
    networks = [pipeline.network] if guidance_model is None else [pipeline.network, guidance_model.to(state.device)]
    for network in networks:
        backend = args.attention_backend
        if backend == "auto":
            backend, _ = choose_attention_backend(network, state.device, DTYPES[args.dtype])
        set_attention_backend(network, backend)
        kernelize(network)

    rows = list_images(args, pipeline)
    output_dir = Path(args.output_dir)
    models = {"weights": pipeline.network, "vae": pipeline.vae, "guidance_model": guidance_model}
    settings = {key: getattr(args, key) for key in IMAGE_ARGUMENTS} | {
        f"{name}_sha256": None if model is None else weights_digest(model) for name, model in models.items()
    }
    run_on_main_and_broadcast(state, prepare_output_dir, args, settings, rows)
    missing = [row for row in rows if not (output_dir / row["file"]).is_file()]
    state.wait_for_everyone()  # all processes must have looked before one writes
    draw(args, pipeline, guidance_model, missing[state.process_index :: state.num_processes], output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        write_summary(args, rows, output_dir)
        written = [row["file"] for row in rows] + ["grid.png", "samples.json"]
        written += ["samples.npz"] if args.save_npz else []
        OutputFolder(output_dir, Path(__file__).name).record(written)
        print(f"{len(rows)} images ({len(missing)} new) and their grid: {output_dir / 'grid.png'}")
    state.destroy_process_group()


if __name__ == "__main__":
    run_script(main, parse_args())
