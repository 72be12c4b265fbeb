# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Encodes images and their mirror images with a VAE, once, so that training need not.

    python scripts/prepare_latents.py --vae_model_name_or_path outputs/vae-digits --resolution 32 --no-mirror \\
        --train_data_file data/digits.parquet --output_dir outputs/latents-digits
    torchrun --nproc_per_node 8 scripts/prepare_latents.py --vae_model_name_or_path stabilityai/sd-vae-ft-ema \\
        --train_data_dir imagenet/train --resolution 256 --batch_size 64 --dataloader_num_workers 12 \\
        --output_dir imagenet-latents

Images are cropped to the centre. What is stored are the moments of the VAE's posterior (means and log-variances,
float32), so that training still draws from it: 64 KiB for an image of 256 pixels and its mirror image.

`--output_dir` holds `data/train-00000-of-00002.parquet`, ..., which `datasets.load_dataset(DIR)` reads, with the
columns `moments` and `mirrored_moments` (2c, h, w), `label` (of labelled images) and `bad_image`; and `latents.json`.
Row i is image i of the source. With `--on_bad_image skip`, the row of a bad image says why in `bad_image` and its
moments are NaN; no row is left out, so training meets the same images at the same positions with or without a cache.

Shards are ranges of images. One is written under another name and renamed, so it is complete or does not exist: the
same command goes on where an earlier one ended, on any number of processes, and the result is the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports: the launcher may die meanwhile

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
PATHS = ("vae", "source")  # in the metadata, for people: they may differ where the contents are the same


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; those of the data are those of `train_diffit.py`."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--vae_model_name_or_path", type=path_type, required=True, help="an AutoencoderKL: a folder or a hub name"
    )
    parser.add_argument(
        "--output_dir", type=path_type, required=True, help="new, or of an earlier run of the same command"
    )
    parser.add_argument("--resolution", type=resolution_type, required=True, help="of the images: N or HxW pixels")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True, help="for --random_flip")
    parser.add_argument("--batch_size", type=int, default=16, help="images that a process encodes at once")
    parser.add_argument("--images_per_shard", type=int, default=1024)
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument("--dataloader_num_workers", type=number_type(int, 0), default=0)

    group = parser.add_argument_group("data: one of --dataset_name, --train_data_dir, --train_data_file")
    group.add_argument("--dataset_name", type=path_type, help="hub name, or local path for datasets.load_dataset")
    group.add_argument("--dataset_config_name")
    group.add_argument("--dataset_split", default="train")
    group.add_argument(
        "--train_data_dir", type=path_type, help="folder or zip of images; dataset.json, metadata.jsonl, parquet too"
    )
    group.add_argument("--train_data_file", type=path_type, help="a parquet file")
    group.add_argument("--image_column", help="default: the only one of type Image")
    group.add_argument("--label_column", help="default: the only one of type ClassLabel")
    group.add_argument("--cache_dir", type=path_type, help="of datasets.load_dataset")
    args = parser.parse_args(argv)
    for name in ("batch_size", "images_per_shard"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is less than 1")
    return args


class CenterCrops(torch.utils.data.Dataset):
    """Images by index, cropped to the centre: (pixels (C, H, W) in [-1, 1], None), or (NaN, why) for a bad one.

    Args:
        table: where the images are.
        resolution: height H and width W in pixels.
        num_channels: channels C.
        on_bad_image: `"error"` raises a BadImageError, `"skip"` goes on.
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
    """Pixels (B, C, H, W) and messages of a batch of `CenterCrops`."""
    pixels, messages = zip(*items, strict=True)
    return torch.stack(pixels), list(messages)


def check_metadata(output_dir: Path, metadata: dict) -> None:
    """Writes the metadata into a new folder, or compares it with that of an earlier run.

    Raises:
        ValueError: names what differs from the earlier run.
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
            f"--output_dir {output_dir} holds other latents: {listed}. Give the flags of the earlier run, or another "
            "folder"
        )


def missing_shards(output_dir: Path, names: list[str]) -> list[int]:
    """Numbers of the shards that are yet to be made."""
    return [number for number, name in enumerate(names) if not (output_dir / name).exists()]


def encode(
    vae: AutoencoderKL, batches: Iterator[tuple[torch.Tensor, list[str | None]]], mirror: bool
) -> dict[str, list]:
    """The columns of one shard, but for the labels, from batches of `CenterCrops`."""
    columns = {"moments": []} | ({"mirrored_moments": []} if mirror else {}) | {"bad_image": []}
    for pixels, messages in batches:
        pixels = pixels.to(vae.device)  # (B, C, H, W)
        columns["moments"].append(encode_moments(vae, pixels).cpu().numpy())  # (B, 2c, h, w)
        if mirror:
            columns["mirrored_moments"].append(encode_moments(vae, pixels.flip(-1)).cpu().numpy())
        columns["bad_image"].append(messages)
        for message in filter(None, messages):
            logger.warning(f"bad image, stored as such: {message}")
    return {name: np.concatenate(batches) for name, batches in columns.items()}


def write_shard(file: Path, columns: dict[str, list], features: Features) -> None:
    """Writes a parquet file that is complete or does not exist, also after a power failure.

    What a killed run left under the temporary name is overwritten.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        Dataset.from_dict(columns, features=features).to_parquet(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def prepare(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Encodes the shards that are not there yet, shared among the processes."""
    vae = on_all_processes(accelerator, load_vae, args.vae_model_name_or_path).to(accelerator.device)
    latent_shape = vae_latent_shape(vae, args.resolution)
    source = {name: getattr(args, name) for name in DATA_FLAGS}
    table = on_all_processes(accelerator, lambda: load_image_table(**source))
    num_channels = vae.config.in_channels
    if (
        run_on_main_and_broadcast(accelerator, detect_num_channels, table) > num_channels
        and accelerator.is_main_process
    ):
        logger.warning(f"{table.source} has more than the VAE's {num_channels} channels: colours are dropped")
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
    # A batch never crosses shards, so what a shard holds does not depend on who makes it.
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
    """Takes possession of --output_dir and fills it."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    disable_datasets_progress_bars()
    join_processes(timeout=timedelta(hours=12))  # at the end, they wait for the one that has the most to encode
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    lock = OutputDirLock(args.output_dir)
    with contextlib.ExitStack() as resources:
        token = run_on_main_and_broadcast(accelerator, resources.enter_context, lock)
        on_all_processes(accelerator, lock.check_visible, token)
        prepare(accelerator, args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args())
