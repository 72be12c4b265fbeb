# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Samples images by seed and class from a folder that `train_diffit.py` wrote.

    python sample_diffit.py --model_path outputs/quickstart --output_dir samples --seeds 0-99 --class_labels 3
    accelerate launch sample_diffit.py --model_path outputs/emoji32 --output_dir samples --seeds 0-9999 --save_npz

The noise of a seed depends on the seed alone. Existing images are kept, so an interrupted run can be resumed.
"""

from diffit.launcher import follow_launcher
from diffit.sampling_config import MAX_IMAGES, SampleConfig, SamplingConfig, parse_args

if __name__ == "__main__":
    # Before the slow imports: the launcher may die meanwhile, and a refused flag is answered at once.
    follow_launcher()
    config = parse_args(description=__doc__)

import itertools
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
from diffusers import ModelMixin
from tqdm.auto import tqdm

from diffit.command_line import run_script, to_flags
from diffit.device_config import DeviceConfig
from diffit.devices import tf32_settings, warn_about_bfloat16
from diffit.errors import UserError, user_errors
from diffit.features import weights_digest
from diffit.processes import join_processes, run_on_main_and_broadcast
from diffit.run_dir import OutputFolder
from diffit.sampling import load_sampler, parse_class_labels, resolve_scheduler, sample_seeds
from diffit_pipeline import DiffiTPipeline, image_grid, to_displayable

MAX_GRID_IMAGES = 1024  # in grid.png, unless --grid says more
MAX_GRID_PIXELS = 2**28  # 16,384 x 16,384, which take 0.8 GB of memory in color


def list_images(
    pipeline: DiffiTPipeline, class_labels: str | None, seeds: tuple[int, ...] | None, num_images_per_class: int | None
) -> list[dict]:
    """The images to be sampled, a row for each: file name, seed and class.

    Without `num_images_per_class` there is an image for each seed, with the classes taking turns; with it, each class
    takes the next `num_images_per_class` seeds.

    Raises:
        UserError: names the flag if a class does not exist or there are too few seeds.
    """
    labels = None if class_labels is None else parse_class_labels(pipeline, class_labels)
    if num_images_per_class is not None:
        num_images = num_images_per_class * len(labels)
        if num_images > MAX_IMAGES:
            raise UserError(
                f"--num_images_per_class {num_images_per_class} of {len(labels)} classes are more than "
                f"{MAX_IMAGES:,} images: sample them in several runs"
            )
        seeds = seeds or range(num_images)
        if len(seeds) < num_images:
            raise UserError(f"--seeds gives {len(seeds)} seeds, {len(labels)} classes need {num_images}")
        pairs = [(seed, labels[i // num_images_per_class]) for i, seed in enumerate(seeds[:num_images])]
    else:
        seeds = seeds or range(64)
        pairs = [(seed, None if labels is None else labels[i % len(labels)]) for i, seed in enumerate(seeds)]
    suffix = ".png" if pipeline.image_channels in (1, 3, 4) else ".npy"
    names = pipeline.config.id2label or {}
    rows = []
    for seed, label in pairs:
        prefix = "" if label is None else f"class_{label:03d}_"
        rows.append({"file": f"{prefix}seed_{seed:08d}{suffix}", "seed": seed, "class": label})
        if str(label) in names:
            rows[-1]["class_name"] = names[str(label)]
    return rows


def grid_layout(config: SampleConfig, image_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Columns and rows of grid.png; None for as many as the images need (see `image_grid`).

    Args:
        config: the request.
        image_size: height and width of an image in pixels.

    Raises:
        UserError: if the grid of --grid would be too large for memory.
    """
    if config.grid is None:
        columns = config.num_images_per_class
        return (None if columns is None or columns > MAX_GRID_IMAGES else columns), None
    columns, rows = config.grid
    if columns * rows * max(32, image_size[0]) * max(32, image_size[1]) > MAX_GRID_PIXELS:
        raise UserError(
            f"--grid {columns}x{rows} of images of {image_size[0]} x {image_size[1]} pixels is larger than "
            f"{MAX_GRID_PIXELS:,} pixels: give fewer columns and rows"
        )
    return columns, rows


def prepare_output_dir(
    folder: OutputFolder, names: list[str], rows: list[dict], arguments: dict, settings: dict, overwrite: bool
) -> None:
    """Records in the folder's mark which files are about to be written, and writes `samples.json`.

    Args:
        folder: the folder of --output_dir.
        names: the files.
        rows: see `list_images`.
        arguments: the command line.
        settings: those that images depend on, with digests of the weights.
        overwrite: delete the files of an earlier sampling.

    Raises:
        UserError: if other files have these names, or there are images sampled with other settings.
    """
    folder.check_free(names)
    folder.create()
    if overwrite:
        folder.remove(list(folder.files))
    check_settings(folder.folder, settings)
    folder.announce(names)
    write_summary(folder.folder, rows, arguments | settings)


def write_summary(folder: Path, rows: list[dict], arguments: dict) -> None:
    """Writes `samples.json`: these images and those of earlier samplings with the same settings that are there.

    Args:
        folder: the folder of --output_dir.
        rows: see `list_images`.
        arguments: the command line and the settings that images depend on.
    """
    file, names = folder / "samples.json", {row["file"] for row in rows}
    earlier = json.loads(file.read_text(encoding="utf-8"))["images"] if file.is_file() else []  # of the same settings
    earlier = [row for row in earlier if row["file"] not in names and (folder / row["file"]).is_file()]
    text = json.dumps({"arguments": arguments, "images": earlier + rows}, indent=1) + "\n"
    file.write_text(text, encoding="utf-8")


def check_settings(output_dir: Path, settings: dict) -> None:
    """Refuses to add images to a folder whose images were sampled with other settings.

    Raises:
        UserError: names the settings that differ.
    """
    file = output_dir / "samples.json"
    if not file.is_file():
        return
    with user_errors(f"--output_dir {output_dir}: samples.json is damaged", ValueError, TypeError, KeyError):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not any((output_dir / row["file"]).is_file() for row in summary["images"]):
            return
        recorded = dict(summary["arguments"])
    # A flag that did not exist yet had no effect, as its default has none.
    defaults = to_flags(SamplingConfig()) | to_flags(DeviceConfig())
    earlier = {key: recorded.get(key, defaults.get(key)) for key in settings}
    differences = [f"--{key} {earlier[key]}, now {settings[key]}" for key in settings if settings[key] != earlier[key]]
    if differences:
        raise UserError(
            f"--output_dir {output_dir} has images sampled with other settings ({', '.join(differences)}): choose "
            "another folder, or delete them with --overwrite_output_dir"
        )


def sample_images(
    pipeline: DiffiTPipeline,
    guidance_model: ModelMixin | None,
    rows: list[dict],
    sampling: SamplingConfig,
    batch_size: int,
    output_dir: Path,
    show_progress: bool,
) -> None:
    """Samples the images of some rows (see `list_images`) and writes a file for each."""
    labels = [row["class"] for row in rows]
    labels = None if None in labels else labels
    seeds = [row["seed"] for row in rows]
    batches = sample_seeds(pipeline, seeds, labels, sampling, batch_size, guidance_model)
    images = itertools.chain.from_iterable(batches)
    progress = tqdm(rows, desc="sampling", disable=not show_progress)
    for row, image in zip(progress, images, strict=True):
        temporary = output_dir / f".{os.getpid()}-{row['file']}"
        if temporary.suffix == ".npy":
            np.save(temporary, image)
        else:
            to_displayable(image).save(temporary)
        temporary.replace(output_dir / row["file"])  # so that no image is ever incomplete on disk


def read_pixels(file: Path) -> np.ndarray:
    """An image that `sample_images` wrote; uint8, shape (H, W, C)."""
    with user_errors(f"{file} is damaged, delete it", Exception):
        if file.suffix == ".npy":
            return np.load(file)
        with PIL.Image.open(file) as image:
            return np.atleast_3d(np.asarray(image))


def write_npz(file: Path, images: list[Path], labels: list[int | None]) -> None:
    """Writes uint8 pixels (N, H, W, C) as `arr_0`, grayscale as three equal channels, and classes (N) as `arr_1`."""
    pixels = np.stack([read_pixels(image) for image in images])
    pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels
    np.savez(file, pixels, *([] if None in labels else [np.array(labels, np.int64)]))


def main(config: SampleConfig) -> None:
    """Loads the models, shards the images across processes, samples those that do not exist yet, and sums up."""
    processes = join_processes(config.device)
    warn_about_bfloat16(processes.device, config.sampling.dtype == "bf16", "--dtype fp16")

    # 1. models
    sampling = resolve_scheduler(config.sampling, config.model_path)
    pipeline, guidance_model = load_sampler(config.model_path, sampling, processes.device)
    models = {"weights": pipeline.network, "vae": pipeline.vae, "guidance_model": guidance_model}
    settings = (
        sampling.image_settings()
        | {"allow_tf32": bool(tf32_settings(processes.device))}
        | {f"{name}_sha256": None if model is None else weights_digest(model) for name, model in models.items()}
    )

    # 2. files
    columns, grid_rows = grid_layout(config, pipeline.image_size or (0, 0))
    rows = list_images(pipeline, config.class_labels, config.seeds, config.num_images_per_class)
    files = [row["file"] for row in rows]
    names = [*files, "grid.png", "samples.json"] + (["samples.npz"] if config.save_npz else [])
    arguments = {key: value for key, value in to_flags(config).items() if key != "overwrite_output_dir"}
    output_dir = Path(config.output_dir)

    def prepare() -> None:
        folder = OutputFolder(output_dir, "sample_diffit.py")
        prepare_output_dir(folder, names, rows, arguments, settings, config.overwrite_output_dir)

    run_on_main_and_broadcast(processes, prepare)
    missing = [row for row in rows if not (output_dir / row["file"]).is_file()]
    processes.wait_for_everyone()  # all processes must have looked before one writes

    # 3. images
    shard, is_main = missing[processes.process_index :: processes.num_processes], processes.is_main_process
    sample_images(pipeline, guidance_model, shard, sampling, config.batch_size, output_dir, show_progress=is_main)
    processes.wait_for_everyone()
    if is_main:
        if config.save_npz:
            write_npz(
                output_dir / "samples.npz", [output_dir / file for file in files], [row["class"] for row in rows]
            )
        shown = files[: columns * grid_rows if config.grid else MAX_GRID_IMAGES]
        grid = image_grid([to_displayable(read_pixels(output_dir / file)) for file in shown], columns, grid_rows)
        grid.save(output_dir / "grid.png")
        write_summary(output_dir, rows, arguments | settings)  # again: another sampling may have begun meanwhile
        OutputFolder(output_dir, "sample_diffit.py").record(names)
        print(f"{len(rows)} images ({len(missing)} new) and their grid: {output_dir / 'grid.png'}")
    processes.destroy_process_group()


if __name__ == "__main__":
    run_script(main, config)
