# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches: opening the data, loading it, and preparing a batch on the device (VAE, augmentation, noise)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader

from diffit.augment import augment
from diffit.config import DataConfig, ValidationConfig
from diffit.decode import normalize_pixels
from diffit.decoded_images import share_decoded_images
from diffit.errors import UserError
from diffit.formulations import Formulation
from diffit.latents import (
    LatentDataset,
    LatentTable,
    encode_moments,
    load_latent_table,
    sample_latents,
    warn_of_scale,
)
from diffit.losses import NoisyBatch
from diffit.networks import sample_shape
from diffit.packing import Batch
from diffit.plan import Plan
from diffit.processes import ignore_stop_signals
from diffit.sources import Table, load_image_table
from diffit.stream import ImageDataset, PositionStream, StreamBatchSampler, StreamDataset, split_table
from diffit_pipeline import Autoencoder, latent_scaling

logger = get_logger(__name__, log_level="INFO")

LEVEL_BINS = 4  # losses are logged per quartile of the noise level


def open_tables(data: DataConfig, validation: ValidationConfig) -> tuple[Table, Table | None]:
    """Opens the training images (or prepared latents) and the held-out images, without decoding any.

    Returns:
        The training data, and the held-out images or None.

    Raises:
        UserError: if the images or labels that the flags name do not exist.
    """
    held_out = None
    if data.latents_dir is not None:
        table = load_latent_table(data.latents_dir, data.source.cache_dir)
    else:
        table = load_image_table(data.source, need_labels=data.class_conditional)
    if data.class_conditional and table.class_names is None:
        raise UserError(f"--class_conditional: {table.source} has no labels: {table.no_labels}")
    if data.class_conditional:
        table.warn_about_empty_classes()
    if validation.validation_split is not None:
        held_out_source = replace(data.source, dataset_split=validation.validation_split)
        held_out = load_image_table(held_out_source, need_labels=data.class_conditional)
        if data.class_conditional:
            held_out = held_out.with_class_names(table.class_names)
    elif validation.validation_fraction is not None:
        table, held_out = split_table(table, validation.validation_fraction)
    return table, held_out


def build_batches(
    table: Table, plan: Plan, data: DataConfig, seed: int, start_position: int, accelerator: Accelerator
) -> Iterator[Batch]:
    """Iterates endlessly over this process's micro-batches. Must be called by all processes.

    Args:
        table: the training images or latents.
        plan: sizes of batches and images.
        data: the flags of cropping, flipping, bad images and workers.
        seed: seed of the stream.
        start_position: first position of the stream to read.
        accelerator: gives the number of processes and this one's index.
    """
    stream = PositionStream(len(table), seed)
    dataset = build_dataset(table, stream, plan, data)
    if isinstance(dataset, ImageDataset):  # prepared latents are mapped from a file, so they are shared already
        shape = (dataset.num_channels, *plan.resolution)
        dataset.decoded = share_decoded_images(accelerator, len(table), shape)
    shard = (accelerator.num_processes, accelerator.process_index)
    sampler = StreamBatchSampler(stream, plan.batch.per_process, start_position, *shard)
    return iter(load_batches(dataset, sampler, plan.num_workers, pin_memory=accelerator.device.type == "cuda"))


def load_batches(
    dataset: StreamDataset,
    positions: Iterable[list[tuple[int, int]]],
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of `Batch`es.

    Args:
        dataset: builds them.
        positions: (position, index) of each image in each batch.
        num_workers: processes that build batches; 0 builds them in this one.
        pin_memory: whether to copy them into pinned memory.
    """
    return DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=num_workers,
        collate_fn=_already_collated,
        worker_init_fn=ignore_stop_signals,
        pin_memory=pin_memory,
    )


def _already_collated(batch: Batch) -> Batch:
    return batch


def build_dataset(table: Table, stream: PositionStream, plan: Plan, data: DataConfig) -> StreamDataset:
    """A data set of images or prepared latents, indexed by position, together with their noise."""
    if isinstance(table, LatentTable):
        return LatentDataset(table, stream, data.random_flip, data.on_bad_image)
    return ImageDataset(
        table,
        stream,
        plan.resolution,
        plan.num_channels,
        data.center_crop,
        data.random_flip,
        data.on_bad_image,
        latent_shape=sample_shape(plan.model_config) if plan.formulation.in_latents else None,
        augment=data.augmentation_probability > 0,
    )


@dataclass(frozen=True)
class BatchPreparer:
    """Prepares a data loader's micro-batches for the network.

    Attributes:
        formulation: adds the noise.
        device: the network's device.
        vae: a latent-space model's VAE, or None.
        null: the null class, or None for an unconditional network.
        label_dropout: fraction of labels to replace by the null class, in [0, 1].
        augmentation_probability: probability of each augmentation, in [0, 1].
        bad_images: messages about the images skipped so far, each of which is logged once.
    """

    formulation: Formulation
    device: torch.device
    vae: Autoencoder | None = None
    null: int | None = None
    label_dropout: float = 0.0
    augmentation_probability: float = 0.0
    bad_images: set[str] = field(default_factory=set)

    def __call__(self, batch: Batch) -> NoisyBatch:
        """Moves a batch to the device, encodes it with the VAE, augments it and adds noise.

        Args:
            batch: output of a `StreamDataset`. It is augmented if it has random numbers for that.
        """
        for message in batch.bad_images:
            if message not in self.bad_images:
                self.bad_images.add(message)
                logger.warning(f"skipped ({len(self.bad_images)} so far): {message}", main_process_only=False)
        # 1. on the host: numbers that are the same on every kind of device
        first_position = int(batch["position"][0])
        levels = self.formulation.noise_levels(batch["time_uniform"])
        batch = batch.fill(levels=levels, level_bins=(batch["time_uniform"] * LEVEL_BINS).long())
        if self.null is not None:
            batch = batch.fill(labels=batch_labels(batch, self.label_dropout, self.null))

        # 2. on the device
        batch = batch.to(self.device)
        clean_images = encode_images(batch, self.vae)
        conditions = {"class_labels": None if self.null is None else batch["labels"]}
        if "augmentation" in batch:
            augmentation = (batch["augmentation"], self.augmentation_probability)
            clean_images, conditions["augment_labels"] = augment(clean_images, *augmentation)
        noise, levels = batch["noise"], batch["levels"]
        network_inputs = self.formulation.network_inputs(clean_images, noise, levels)
        return NoisyBatch(network_inputs, clean_images, noise, levels, conditions, batch["level_bins"], first_position)


def batch_labels(batch: Batch, label_dropout: float, null: int) -> torch.Tensor:
    """Class labels, a fraction of them replaced by the null class; shape (B).

    They are checked here, on the CPU: the network on an accelerator cannot read them without waiting for the device.

    Raises:
        ValueError: if there are labels outside of [0, null).
    """
    labels = batch["class_labels"]
    if labels.min() < 0 or labels.max() >= null:
        raise ValueError(f"class labels must be in [0, {null}), got {int(labels.min())} to {int(labels.max())}")
    return torch.where(batch["dropout_uniform"] < label_dropout, null, labels)


def encode_images(batch: Batch, vae: Autoencoder | None) -> torch.Tensor:
    """The clean images, as pixels in [-1, 1] or as latents if there is a VAE; shape (B, C, H, W).

    Latents are sampled from the encoder's Gaussian with noise from the batch, so they are a function of the position,
    too.
    """
    if "moments" in batch:
        moments = batch["moments"]  # (B, 2C, H, W)
    else:
        images = normalize_pixels(batch["pixel_values"])
        if vae is None:
            return images
        moments = encode_moments(vae, images)  # (B, 2C, H, W)
    return sample_latents(moments, batch["posterior_noise"], *latent_scaling(vae, moments.device))


def with_checked_latents(batches: Iterator[Batch], vae: Autoencoder | None, device: torch.device) -> Iterator[Batch]:
    """The same batches; once the first is asked for, the scale of its latents is checked (see `warn_of_scale`)."""
    first = next(batches)
    if vae is not None:
        warn_of_scale(encode_images(first.to(device), vae), vae)
    yield first
    yield from batches
