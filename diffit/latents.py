# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Latents: the posterior moments of a VAE, computed during training or prepared in advance.

Shapes: B batch, C channels, H/W height/width in pixels, c channels and h/w height/width of latents."""

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Array3D, ClassLabel, Features, Value
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2

from diffit.errors import BadImageError, UserError, check_finite_weights, load_model, message_of, user_errors
from diffit.labels import parse_json
from diffit.sources import Table, read_parquet
from diffit.stream import PositionStream, StreamDataset
from diffit_pipeline import AUTOENCODERS, Autoencoder, fold_patches, latent_channels, latent_scaling, pixels_per_latent

logger = get_logger(__name__, log_level="INFO")

LATENTS_METADATA = "latents.json"  # metadata of a folder written by `prepare_latents.py`
CHANNEL_STATISTICS = ("latents_mean", "latents_std")  # of a VAE's config, None in most
LOWEST_LOG_VARIANCE = -30.0  # of a posterior, in diffusers
USUAL_STD = (0.5, 2.0)  # standard deviation of scaled latents that a noise schedule expects to be about 1
LATENTS_METADATA_TYPES = {
    **{"encoder_digest": str, "scaling_factor": float, "shift_factor": float, "resolution": list},
    **{"latent_shape": list, "mirrored": bool, "num_images": int, "data_digest": str, "images_per_shard": int},
}


def load_vae(name_or_path: str, flag: str = "--vae_model_name_or_path", subfolder: str | None = None) -> Autoencoder:
    """Loads a VAE from a folder or the hub, frozen and in float32.

    Args:
        name_or_path: folder or hub name.
        flag: that names it, for messages.
        subfolder: folder of the VAE in a pipeline, or None.

    Raises:
        UserError: names the flag, if it does not hold one of `AUTOENCODERS` in safetensors with finite weights whose
            scaling is known.
    """
    name = read_vae_config(name_or_path, flag, subfolder)["_class_name"]
    what = f"{flag} {name_or_path}: cannot read an {name} in safetensors"
    vae = load_model(what, AUTOENCODERS[name].from_pretrained, name_or_path, subfolder=subfolder, use_safetensors=True)
    with user_errors(f"{flag} {name_or_path}", ValueError):
        latent_scaling(vae)
    check_finite_weights(f"{flag} {name_or_path}", vae)
    return vae.eval().requires_grad_(False)


def read_vae_config(
    name_or_path: str, flag: str = "--vae_model_name_or_path", subfolder: str | None = None
) -> dict[str, Any]:
    """The config of a VAE. For the arguments see `load_vae`.

    Raises:
        UserError: names the flag, if there is none, or it is of another class: that has another scale of latents.
    """
    if Path(name_or_path).is_file():
        raise UserError(f"{flag} {name_or_path} is a file: give the folder that save_pretrained wrote")
    if subfolder is None and Path(name_or_path, "model_index.json").is_file():
        raise UserError(
            f"{flag} {name_or_path} is a pipeline: give the folder of its VAE, {Path(name_or_path, 'vae')}"
        )
    try:
        config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag} {name_or_path}: no such config on this machine or on the hub: {message_of(error)}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{flag} {name_or_path}: its config.json must hold a JSON object")
    if config.get("_class_name") not in AUTOENCODERS:
        kind = config.get("_class_name", "model without a _class_name")
        raise UserError(f"{flag} {name_or_path} is a {kind}, not one of {', '.join(AUTOENCODERS)}")
    return config


def vae_latent_shape(vae: Autoencoder, resolution: tuple[int, int]) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents for images of `resolution` (H, W).

    Raises:
        UserError: names --resolution, if it is not a multiple of the VAE's downsampling factor.
    """
    factor = pixels_per_latent(vae)
    height, width = resolution
    if height % factor or width % factor:
        raise UserError(f"--resolution {height}x{width}: the VAE needs multiples of {factor}")
    return latent_channels(vae), height // factor, width // factor


def vae_description(vae: Autoencoder) -> dict:
    """Everything in a VAE that latents depend on: `encoder_digest`, `scaling_factor`, `shift_factor` (0 if absent).

    And `latents_mean` and `latents_std`, if it has them; and the name of its class unless it is an `AutoencoderKL`.

    The decoder is left out on purpose: Stable Diffusion's improved decoders read the latents of the original encoder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "bn.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
    config, is_kl = vae.config, isinstance(vae, AutoencoderKL)
    return {
        "encoder_digest": digest.hexdigest()[:16],
        "scaling_factor": float(config.get("scaling_factor", 1.0)),
        "shift_factor": float(config.get("shift_factor") or 0.0),
        **{name: list(config[name]) for name in CHANNEL_STATISTICS if config.get(name) is not None},
        **({} if is_kl else {"vae_class": type(vae).__name__}),
    }


def encode_moments(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Encodes images into the mean and log-variance of the VAE's posterior; without one, the variance is negligible.

    Args:
        vae: the encoder.
        images: shape (B, C, H, W), float32 in [-1, 1].

    Returns:
        Shape (B, 2c, h, w), float32: c channels of means, then c channels of log-variances.
    """
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.dtype))
        if isinstance(vae, AutoencoderDC):
            latents = encoded.latent.float()
            return torch.cat([latents, torch.full_like(latents, LOWEST_LOG_VARIANCE)], dim=1)
        moments = encoded.latent_dist.parameters.float()
        if not isinstance(vae, AutoencoderKLFlux2):
            return moments
        return torch.cat([fold_patches(vae, part) for part in moments.chunk(2, dim=1)], dim=1)


def sample_latents(
    moments: torch.Tensor,
    posterior_noise: torch.Tensor,
    scaling_factor: float | torch.Tensor,
    shift_factor: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Samples training latents from the VAE's posterior: `(z - shift_factor) * scaling_factor`.

    A pipeline inverts the scaling before it decodes.

    Args:
        moments: means, then log-variances (clamped to [-30, 20], as in diffusers); shape (B, 2c, h, w).
        posterior_noise: standard normal; shape (B, c, h, w).
        scaling_factor, shift_factor: see `latent_scaling`; numbers, or shape (1, c, 1, 1).

    Returns:
        Shape (B, c, h, w).
    """
    mean, logvar = moments.chunk(2, dim=1)  # (B, c, h, w) each
    latents = mean + torch.exp(0.5 * logvar.clamp(LOWEST_LOG_VARIANCE, 20.0)) * posterior_noise
    return (latents - shift_factor) * scaling_factor


def warn_of_scale(latents: torch.Tensor, vae: Autoencoder) -> None:
    """Logs a warning if the standard deviation of scaled latents is far from 1, which noise schedules take it for.

    Args:
        latents: of the first batch, see `sample_latents`; shape (B, c, h, w).
        vae: that they are from, which the message names.
    """
    std = latents.std().item() if latents.numel() > 1 else 1.0
    if not USUAL_STD[0] <= std <= USUAL_STD[1]:
        logger.warning(
            f"VAE {vae.config.get('_name_or_path')}: the first {len(latents)} scaled latents have a standard "
            f"deviation of {std:.3g}, not about 1: the likely cause is a wrong scaling_factor (1 / standard "
            "deviation of the latents), latents_mean or latents_std in its config.json, or images unlike those it was "
            "trained on"
        )


@dataclass(frozen=True)
class LatentTable(Table):
    """Reads the moments of images and of their mirror images, as written by `prepare_latents.py`.

    `rows`, in Arrow format, has the columns `moments` and optionally `mirrored_moments`, each (2c, h, w), and
    `bad_image`: null, or the reason why the image has no moments.

    Attributes:
        metadata: contents of `latents.json`: the VAE's `vae_description`, `resolution` [H, W], `latent_shape`
            [c, h, w], `mirrored`, `data_digest` of the images, and more.
    """

    metadata: dict = field(kw_only=True)

    def content(self, index: int) -> bytes:
        # Identifies the image, not its latents, whose last bits depend on the batch in which they were encoded.
        # Without the names and sizes, which latents prepared by earlier versions lack.
        return f"{self.metadata['data_digest'].split('-')[0]} {int(self.indices[index])}".encode()

    def data_digest(self) -> str:
        return "-".join([self.digest(), *self.metadata["data_digest"].split("-")[1:]])

    def read(self, index: int, mirrored: bool = False) -> torch.Tensor:
        """Moments of an image or of its mirror image, shape (2c, h, w), float32.

        Raises:
            BadImageError: if the image could not be read when the latents were prepared.
        """
        row = self.rows[int(self.indices[index])]  # an Arrow table: only the column used below becomes an array
        if (message := row["bad_image"][0].as_py()) is not None:
            raise BadImageError(f"no latents in {self.source}: {message}")
        column = row["mirrored_moments" if mirrored else "moments"]
        return torch.tensor(column.chunk(0).to_numpy()[0])


def latent_shard_names(num_images: int, images_per_shard: int) -> list[str]:
    """Names of the parquet files in a folder of latents, in the hub's style; the last may hold fewer images."""
    num_shards = math.ceil(num_images / images_per_shard)
    return [f"data/train-{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]


def latent_features(
    latent_shape: tuple[int, int, int], mirrored: bool, class_names: tuple[str, ...] | None
) -> Features:
    """Columns of prepared latents (see `LatentTable`), with `label` if there are classes."""
    channels, height, width = latent_shape
    moments = Array3D((2 * channels, height, width), "float32")
    features = {"moments": moments} | ({"mirrored_moments": moments} if mirrored else {})
    features["bad_image"] = Value("string")
    if class_names is not None:
        features["label"] = ClassLabel(names=list(class_names))
    return Features(features)


def load_latent_table(latents_dir: str, cache_dir: str | None = None) -> LatentTable:
    """Opens a folder written by `prepare_latents.py`.

    Args:
        latents_dir: the folder.
        cache_dir: cache folder of `datasets.load_dataset`.

    Raises:
        UserError: names --latents_dir, if it is not such a folder, is incomplete, or its shards contradict its
            metadata.
    """
    root = Path(latents_dir)
    if not (root / LATENTS_METADATA).is_file():
        raise UserError(f"--latents_dir {root}: no {LATENTS_METADATA} there; prepare_latents.py writes one")
    metadata = parse_json((root / LATENTS_METADATA).read_bytes(), str(root / LATENTS_METADATA))
    for name, kind in LATENTS_METADATA_TYPES.items():
        if not isinstance(metadata.get(name), kind):
            raise UserError(f"--latents_dir {root}: {LATENTS_METADATA} says {name} {metadata.get(name)!r}")
    names = latent_shard_names(metadata["num_images"], metadata["images_per_shard"])
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"--latents_dir {root}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}; "
            "run the same prepare_latents.py command again to resume it"
        )
    rows = read_parquet([str(root / name) for name in names], cache_dir)
    class_names = tuple(rows.features["label"].names) if "label" in rows.features else None
    features = latent_features(metadata["latent_shape"], metadata["mirrored"], class_names)
    if rows.features != features or len(rows) != metadata["num_images"]:
        raise UserError(
            f"--latents_dir {root}: the shards hold {len(rows)} rows of {rows.features}, {LATENTS_METADATA} says "
            f"{metadata['num_images']} of {features}; prepare the latents again in a new folder"
        )
    labels = None if class_names is None else np.array(rows["label"], np.int64)
    columns = [name for name in rows.features if name != "label"]
    table = rows.select_columns(columns).with_format("arrow")
    reason = "" if class_names else f"the images had none when they were prepared from {metadata.get('source')}"
    return LatentTable(table, str(root), np.arange(len(rows)), labels, class_names, reason, metadata=metadata)


class LatentDataset(StreamDataset):
    """Prepared latents as `moments`, shape (2c, h, w), float32.

    For the same seed, order, flips and random numbers equal those of an `ImageDataset` with `latent_shape`.

    Args:
        table: reader of the latents.
        stream: order of the images; determines the replacement of a bad image.
        random_flip: take the mirror image with probability 1/2.
        on_bad_image: how to treat images that were bad when the latents were prepared, see `ImageDataset`.

    Raises:
        UserError: names --random_flip, if the latents were prepared without mirror images.
    """

    image_name = "moments"

    def __init__(
        self, table: LatentTable, stream: PositionStream, random_flip: bool = False, on_bad_image: str = "error"
    ):
        if random_flip and not table.metadata["mirrored"]:
            raise UserError(f"--random_flip: {table.source} was prepared without mirror images (--no-mirror)")
        super().__init__(table, stream, random_flip, on_bad_image, tuple(table.metadata["latent_shape"]))

    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> np.ndarray:
        return self.table.read(index, mirrored=flip).numpy()
