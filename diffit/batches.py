# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches: read, moved to the device, encoded, augmented, and given their noise."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from diffit.augment import augment
from diffit.decode import normalize_pixels
from diffit.formulations import NoiseScheduler, build_network_inputs, build_noise_levels
from diffit.latents import LatentDataset, LatentTable, encode_moments, sample_latents
from diffit.networks import sample_shape
from diffit.processes import ignore_stop_signals
from diffit.sources import Table
from diffit.stream import ImageDataset, PositionStream, StreamBatchSampler, StreamDataset, collate

logger = get_logger(__name__, log_level="INFO")

LEVEL_BINS = 4  # the loss is logged by quartile of the noise levels


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
    latent_shape = None if args.vae_model_name_or_path is None else sample_shape(config)
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


def batch_labels(batch: dict, label_dropout: float, null: int | None) -> torch.Tensor | None:
    """Labels with a share replaced by the null class, shape (B); None for an unconditional network."""
    if null is None:
        return None
    return torch.where(batch["dropout_uniform"] < label_dropout, null, batch["class_labels"])


def encode_images(batch: dict, vae: AutoencoderKL | None, device: torch.device) -> torch.Tensor:
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


def prepare_batch(
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
        batch: of `diffit.stream.collate`.
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
    clean_images = encode_images(batch, vae, device)
    tensors = (batch["noise"], levels, level_bins)
    noise, levels, level_bins = (tensor.to(device, non_blocking=True) for tensor in tensors)
    conditions = {"class_labels": None if labels is None else labels.to(device, non_blocking=True)}
    if "augmentation" in batch:
        numbers = batch["augmentation"].to(device, non_blocking=True)
        clean_images, conditions["augment_labels"] = augment(clean_images, numbers, args.augmentation_probability)
    network_inputs = build_network_inputs(clean_images, noise, levels, noise_scheduler)
    return NoisyBatch(network_inputs, clean_images, noise, levels, level_bins, conditions)


def report_bad_images(messages: list[str], seen: set[str]) -> None:
    """Logs each skipped image once."""
    for message in messages:
        if message not in seen:
            seen.add(message)
            logger.warning(f"skipped ({len(seen)} so far): {message}", main_process_only=False)
