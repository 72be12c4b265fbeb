# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Encodes images and their mirror images with a VAE in advance, so that training does not have to.

    python scripts/prepare_latents.py --vae_model_name_or_path outputs/vae-digits --resolution 32 --no-mirror \\
        --train_data_file data/digits.parquet --output_dir outputs/latents-digits
    torchrun --nproc_per_node 8 scripts/prepare_latents.py --vae_model_name_or_path stabilityai/sd-vae-ft-ema \\
        --train_data_dir imagenet/train --resolution 256 --batch_size 64 --dataloader_num_workers 12 \\
        --output_dir imagenet-latents

Images are center-cropped. The script stores the moments of the VAE's posterior (means and log-variances, float32), so
that training still samples from it: 64 KiB for a 256x256 image and its mirror image.

`--output_dir` will hold `latents.json` and `data/train-00000-of-00002.parquet`, ..., which
`datasets.load_dataset(DIR)` reads. The columns are `moments` and `mirrored_moments` (2c, h, w), `label` (if the images
have labels) and `bad_image`. Row i is image i of the source. With `--on_bad_image skip`, the row of a bad image gives
the reason in `bad_image`, and its moments are NaN. No row is left out, so training sees the same images at the same
positions with or without prepared latents.

A shard holds a range of images. It is written under a temporary name and then renamed, so it is complete or does not
exist. The same command therefore resumes an interrupted run, on any number of processes, with the same result.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports, during which the launcher may die

import argparse
import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features
from datasets import disable_progress_bars as disable_datasets_progress_bars
from diffusers import AutoencoderKL
from torch.utils.data import BatchSampler, DataLoader
from tqdm.auto import tqdm

from diffit.command_line import Parser, number_type, path_type, resolution_type, run_script
from diffit.decode import decode_image
from diffit.errors import BadImageError, UserError, user_errors
from diffit.latents import (
    LATENTS_METADATA,
    encode_moments,
    latent_features,
    latent_shard_names,
    load_vae,
    vae_description,
    vae_latent_shape,
)
from diffit.lock import OutputDirLock
from diffit.processes import check_agreement, join_processes, on_all_processes, run_on_main_and_broadcast
from diffit.run_dir import OutputFolder
from diffit.sources import ImageTable, detect_num_channels, load_image_table

logger = logging.getLogger("prepare_latents")

DATA_FLAGS = (
    *("dataset_name", "dataset_config_name", "dataset_split", "train_data_dir", "train_data_file"),
    *("image_column", "label_column", "cache_dir"),
)
PATHS = ("vae", "source")  # metadata for people only: paths may differ although their contents are the same


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the flags. The data flags are those of `train_diffit.py`."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--vae_model_name_or_path",
        type=path_type,
        required=True,
        help="folder or hub name of the AutoencoderKL that encodes the images (required)",
    )
    parser.add_argument(
        "--output_dir",
        type=path_type,
        required=True,
        help="folder for the latents: new, or written by an interrupted run with the same flags (required)",
    )
    parser.add_argument(
        "--resolution", type=resolution_type, required=True, help="size of the images in pixels, N or HxW (required)"
    )
    parser.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="encode the mirror image of each image, too, which training with --random_flip needs (default: on)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help="images per encoder pass and process (default: %(default)s)"
    )
    parser.add_argument(
        "--images_per_shard", type=int, default=1024, help="images per parquet file (default: %(default)s)"
    )
    parser.add_argument(
        "--on_bad_image",
        choices=("error", "skip"),
        default="error",
        help="error: stop at the first image that cannot be read; skip: record it as bad and continue "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dataloader_num_workers",
        type=number_type(int, 0),
        default=0,
        help="worker processes that decode images, per process; 0 decodes in the main process (default: %(default)s)",
    )

    group = parser.add_argument_group("data: one of --dataset_name, --train_data_dir, --train_data_file")
    group.add_argument(
        "--dataset_name", type=path_type, help="hub name or local path for datasets.load_dataset (default: none)"
    )
    group.add_argument(
        "--dataset_config_name", help="configuration of --dataset_name (default: the data set's default configuration)"
    )
    group.add_argument("--dataset_split", default="train", help="split of --dataset_name (default: %(default)s)")
    group.add_argument(
        "--train_data_dir",
        type=path_type,
        help="folder or zip of images; dataset.json, metadata.jsonl and parquet files are read, too (default: none)",
    )
    group.add_argument("--train_data_file", type=path_type, help="parquet file of images (default: none)")
    group.add_argument("--image_column", help="column of the images (default: the only column of type Image)")
    group.add_argument("--label_column", help="column of the labels (default: the only column of type ClassLabel)")
    group.add_argument(
        "--cache_dir", type=path_type, help="cache folder of datasets.load_dataset (default: the datasets library's)"
    )
    args = parser.parse_args(argv)
    for name in ("batch_size", "images_per_shard"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is less than 1")
    return args


class CenterCrops(torch.utils.data.Dataset):
    """Center-cropped images by index: (pixels, None), or (NaN, reason) for a bad image. Shape (C, H, W), in [-1, 1].

    Args:
        table: reader of the images.
        resolution: height H and width W in pixels.
        num_channels: channels C.
        on_bad_image: `"error"` raises a BadImageError; `"skip"` returns the reason.
    """

    def __init__(self, table: ImageTable, resolution: tuple[int, int], num_channels: int, on_bad_image: str):
        self.table = table
        self.resolution = resolution
        self.num_channels = num_channels
        self.on_bad_image = on_bad_image

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str | None]:
        try:
            return decode_image(*self.table.read(index), self.resolution, self.num_channels), None
        except BadImageError as error:
            if self.on_bad_image != "skip":
                raise
            return torch.full((self.num_channels, *self.resolution), torch.nan), str(error)


def collate_crops(items: list[tuple[torch.Tensor, str | None]]) -> tuple[torch.Tensor, list[str | None]]:
    """Collates items of `CenterCrops` into pixels, shape (B, C, H, W), and B messages."""
    pixels, messages = zip(*items, strict=True)
    return torch.stack(pixels), list(messages)


def check_metadata(output_dir: Path, metadata: dict) -> None:
    """Writes the metadata into a new folder, or compares it with the metadata of an earlier run.

    Raises:
        UserError: names --output_dir and the settings that differ from the earlier run.
    """
    file = output_dir / LATENTS_METADATA
    names = [LATENTS_METADATA, *latent_shard_names(metadata["num_images"], metadata["images_per_shard"])]
    folder = OutputFolder(output_dir, Path(__file__).name)
    folder.check_free([LATENTS_METADATA, "data/train-*.parquet"])
    folder.create()
    (output_dir / "data").mkdir(exist_ok=True)
    if not file.exists():
        folder.announce(names)
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(json.dumps(metadata, indent=2) + "\n")
        temporary.replace(file)
    with user_errors(f"--output_dir {output_dir}: {LATENTS_METADATA} is damaged", ValueError):
        earlier = json.loads(file.read_text())
    differ = [name for name in metadata if name not in PATHS and earlier.get(name) != metadata[name]]
    if differ:
        listed = "; ".join(f"{name} is {earlier.get(name)} there, {metadata[name]} now" for name in differ)
        raise UserError(
            f"--output_dir {output_dir} holds other latents: {listed}. Use the flags of the earlier run, or another "
            "folder"
        )


def missing_shards(output_dir: Path, names: list[str]) -> list[int]:
    """Indices of the shards that have not been written yet."""
    return [number for number, name in enumerate(names) if not (output_dir / name).exists()]


def encode(
    vae: AutoencoderKL, batches: Iterator[tuple[torch.Tensor, list[str | None]]], mirror: bool
) -> dict[str, list]:
    """Encodes batches of `CenterCrops` into the columns of one shard, except the labels."""
    columns = {"moments": []} | ({"mirrored_moments": []} if mirror else {}) | {"bad_image": []}
    for pixels, messages in batches:
        pixels = pixels.to(vae.device)  # (B, C, H, W)
        columns["moments"].append(encode_moments(vae, pixels).cpu().numpy())  # (B, 2c, h, w)
        if mirror:
            columns["mirrored_moments"].append(encode_moments(vae, pixels.flip(-1)).cpu().numpy())
        columns["bad_image"].append(messages)
        for message in filter(None, messages):
            logger.warning(f"bad image, recorded without latents: {message}")
    return {name: np.concatenate(batches) for name, batches in columns.items()}


def write_shard(file: Path, columns: dict[str, list], features: Features) -> None:
    """Writes a parquet file atomically and durably: even after a power failure it is complete or does not exist.

    A temporary file left by a killed run is overwritten.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        Dataset.from_dict(columns, features=features).to_parquet(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def prepare(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Encodes the missing shards, divided among the processes."""
    vae = on_all_processes(accelerator, load_vae, args.vae_model_name_or_path).to(accelerator.device)
    latent_shape = vae_latent_shape(vae, args.resolution)
    source = {name: getattr(args, name) for name in DATA_FLAGS}
    table = on_all_processes(accelerator, lambda: load_image_table(**source))
    num_channels = vae.config.in_channels
    if (
        run_on_main_and_broadcast(accelerator, detect_num_channels, table) > num_channels
        and accelerator.is_main_process
    ):
        logger.warning(f"{table.source} has more channels than the VAE ({num_channels}): colours are dropped")
    metadata = {
        "vae": args.vae_model_name_or_path,
        **vae_description(vae),
        "resolution": list(args.resolution),
        "latent_shape": list(latent_shape),
        "mirrored": args.mirror,
        "source": table.source,
        "num_images": len(table),
        "data_digest": table.digest(),
        "images_per_shard": args.images_per_shard,
    }
    check_agreement(accelerator, metadata)
    output_dir = Path(args.output_dir)
    run_on_main_and_broadcast(accelerator, check_metadata, output_dir, metadata)
    names = latent_shard_names(len(table), args.images_per_shard)
    missing = run_on_main_and_broadcast(accelerator, missing_shards, output_dir, names)
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    features = latent_features(latent_shape, args.mirror, table.class_names)
    # A batch never crosses a shard boundary, so the contents of a shard do not depend on which process encodes it.
    ranges = [range(len(table))[n * args.images_per_shard : (n + 1) * args.images_per_shard] for n in mine]
    batches = [list(BatchSampler(images, args.batch_size, drop_last=False)) for images in ranges]
    loader = iter(
        DataLoader(
            CenterCrops(table, args.resolution, num_channels, args.on_bad_image),
            batch_sampler=[batch for of_shard in batches for batch in of_shard],
            num_workers=args.dataloader_num_workers,
            collate_fn=collate_crops,
        )
    )
    progress = tqdm(total=sum(map(len, ranges)), unit=" images", disable=not accelerator.is_main_process)
    for number, images, of_shard in zip(mine, ranges, batches, strict=True):
        columns = encode(vae, itertools.islice(loader, len(of_shard)), args.mirror)
        if table.class_names is not None:
            columns["label"] = [table.label(index) for index in images]
        write_shard(output_dir / names[number], columns, features)
        progress.update(len(images))
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        OutputFolder(output_dir, Path(__file__).name).record([LATENTS_METADATA, *names])
        print(f"{len(table)} images in {len(names)} shards ({len(missing)} of them new): {output_dir}")


def main(args: argparse.Namespace) -> None:
    """Locks `--output_dir`, then encodes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    disable_datasets_progress_bars()
    join_processes(timeout=timedelta(hours=12))  # at the end, all processes wait for the slowest one
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    lock = OutputDirLock(args.output_dir)
    with contextlib.ExitStack() as resources:
        token = run_on_main_and_broadcast(accelerator, resources.enter_context, lock)
        on_all_processes(accelerator, lock.check_visible, token)
        prepare(accelerator, args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args())
