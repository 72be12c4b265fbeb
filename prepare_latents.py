# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Encodes images and their mirror images with a VAE in advance, so that training does not have to.

    python prepare_latents.py --vae_model_name_or_path outputs/vae-digits --resolution 32 --no-mirror \\
        --train_data_file data/digits.parquet --output_dir outputs/latents-digits
    torchrun --nproc_per_node 8 prepare_latents.py --vae_model_name_or_path stabilityai/sd-vae-ft-ema \\
        --train_data_dir imagenet/train --resolution 256 --batch_size 64 --output_dir imagenet-latents

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

from diffit.latents_config import LatentsConfig, parse_args
from diffit.launcher import follow_launcher

if __name__ == "__main__":
    # Before the slow imports: the launcher may die meanwhile, and a refused flag is answered at once.
    follow_launcher()
    CONFIG = parse_args(description=__doc__)

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features
from datasets import disable_progress_bars as disable_datasets_progress_bars
from torch.utils.data import BatchSampler, DataLoader
from tqdm.auto import tqdm

from diffit.command_line import run_script
from diffit.decode import decode_pixels, normalize_pixels, warn_about_narrow_levels
from diffit.devices import set_precision, tf32_settings
from diffit.errors import BadImageError, UserError, user_errors
from diffit.latents import (
    LATENTS_METADATA,
    encode_moments,
    latent_features,
    latent_shard_names,
    load_vae,
    sample_latents,
    vae_description,
    vae_latent_shape,
    warn_of_scale,
)
from diffit.lock import OutputDirLock
from diffit.processes import (
    check_agreement,
    count_workers,
    join_processes,
    on_all_processes,
    run_on_main_and_broadcast,
)
from diffit.run_dir import OutputFolder
from diffit.sources import ImageTable, detect_num_channels, is_same_data, load_image_table
from diffit_pipeline import Autoencoder, latent_scaling

logger = logging.getLogger("prepare_latents")

PATHS = ("vae", "source")  # metadata for people only: paths may differ although their contents are the same


class CenterCrops(torch.utils.data.Dataset):
    """Center-cropped images by index: (grey levels, None), or (zeros, reason) for a bad image; shape (C, H, W).

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
            return decode_pixels(*self.table.read(index), self.resolution, self.num_channels), None
        except BadImageError as error:
            if self.on_bad_image != "skip":
                raise
            return torch.zeros(self.num_channels, *self.resolution, dtype=torch.uint8), str(error)


def collate_crops(items: list[tuple[torch.Tensor, str | None]]) -> tuple[torch.Tensor, list[str | None]]:
    """Collates items of `CenterCrops` into grey levels for `normalize_pixels`, shape (B, C, H, W), and B messages."""
    pixels, messages = zip(*items, strict=True)
    if len({image.dtype for image in pixels}) > 1:  # 8-bit and 16-bit images
        pixels = [image.float() for image in pixels]
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
    with user_errors(f"--output_dir {output_dir}: {LATENTS_METADATA} is damaged", ValueError, TypeError):
        earlier = {"allow_tf32": False} | json.loads(file.read_text())  # earlier versions did not record it
    differ = [name for name in metadata if name not in PATHS and earlier.get(name) != metadata[name]]
    if "data_digest" in differ and is_same_data(str(earlier.get("data_digest")), metadata["data_digest"]):
        differ.remove("data_digest")
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
    vae: Autoencoder, batches: Iterator[tuple[torch.Tensor, list[str | None]]], mirror: bool, check_scale: bool
) -> dict[str, list]:
    """Encodes batches of `CenterCrops` into the columns of one shard, except the labels.

    Args:
        vae: the encoder.
        batches: of the shard.
        mirror: encode the mirror images, too.
        check_scale: whether to check the scale of the first batch's latents (see `warn_of_scale`).
    """
    columns = {"moments": []} | ({"mirrored_moments": []} if mirror else {}) | {"bad_image": []}
    for pixels, messages in batches:
        pixels = normalize_pixels(pixels.to(vae.device, non_blocking=True))  # (B, C, H, W)
        if any(messages):
            pixels[[message is not None for message in messages]] = torch.nan
        moments = encode_moments(vae, pixels)  # (B, 2c, h, w)
        if check_scale and not columns["moments"]:
            good = moments[[message is None for message in messages]]
            noise = torch.randn(good.chunk(2, dim=1)[0].shape, generator=torch.Generator().manual_seed(0))
            warn_of_scale(sample_latents(good, noise.to(good), *latent_scaling(vae, good.device)), vae)
        columns["moments"].append(moments.cpu().numpy())
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


def prepare(accelerator: Accelerator, config: LatentsConfig) -> None:
    """Encodes the missing shards, divided among the processes."""
    vae = on_all_processes(accelerator, load_vae, config.vae_model_name_or_path).to(accelerator.device)
    latent_shape = vae_latent_shape(vae, config.resolution)
    table = on_all_processes(accelerator, load_image_table, config.source, False)
    warn_about_narrow_levels(table)
    num_channels = vae.config.in_channels
    if (
        run_on_main_and_broadcast(accelerator, detect_num_channels, table, 64, max(4, num_channels)) > num_channels
        and accelerator.is_main_process
    ):
        logger.warning(f"{table.source} has more channels than the VAE ({num_channels}): colors are dropped")
    metadata = {
        "vae": config.vae_model_name_or_path,
        **vae_description(vae),
        "resolution": list(config.resolution),
        "latent_shape": list(latent_shape),
        "mirrored": config.mirror,
        "source": table.source,
        "num_images": len(table),
        "data_digest": table.data_digest(),
        "images_per_shard": config.images_per_shard,
        "allow_tf32": bool(tf32_settings(accelerator.device)),
    }
    check_agreement(accelerator, metadata)
    output_dir = Path(config.output_dir)
    run_on_main_and_broadcast(accelerator, check_metadata, output_dir, metadata)
    names = latent_shard_names(len(table), config.images_per_shard)
    missing = run_on_main_and_broadcast(accelerator, missing_shards, output_dir, names)
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    features = latent_features(latent_shape, config.mirror, table.class_names)
    # A batch never crosses a shard boundary, so the contents of a shard do not depend on which process encodes it.
    ranges = [range(len(table))[n * config.images_per_shard : (n + 1) * config.images_per_shard] for n in mine]
    batches = [list(BatchSampler(images, config.batch_size, drop_last=False)) for images in ranges]
    loader = iter(
        DataLoader(
            CenterCrops(table, config.resolution, num_channels, config.on_bad_image),
            batch_sampler=[batch for of_shard in batches for batch in of_shard],
            num_workers=count_workers(config.dataloader_num_workers),
            collate_fn=collate_crops,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    progress = tqdm(total=sum(map(len, ranges)), unit=" images", disable=not accelerator.is_main_process)
    for number, images, of_shard in zip(mine, ranges, batches, strict=True):
        columns = encode(vae, itertools.islice(loader, len(of_shard)), config.mirror, check_scale=number == 0)
        if table.class_names is not None:
            columns["label"] = [table.label(index) for index in images]
        write_shard(output_dir / names[number], columns, features)
        progress.update(len(images))
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        OutputFolder(output_dir, Path(__file__).name).record([LATENTS_METADATA, *names])
        print(f"{len(table)} images in {len(names)} shards ({len(missing)} of them new): {output_dir}")


def main(config: LatentsConfig) -> None:
    """Locks `--output_dir`, then encodes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    disable_datasets_progress_bars()
    # At the end, all processes wait for the slowest one.
    processes = join_processes(config.device, timeout=timedelta(hours=12))
    accelerator = Accelerator(cpu=processes.device.type == "cpu")
    set_precision(config.device)
    lock = OutputDirLock(config.output_dir)
    with contextlib.ExitStack() as resources:
        token = run_on_main_and_broadcast(accelerator, resources.enter_context, lock)
        on_all_processes(accelerator, lock.check_visible, token)
        prepare(accelerator, config)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, CONFIG)
