# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains a small `AutoencoderKL`, for data for which the VAEs of Stable Diffusion are too large.

    python train_vae.py --train_data_file data/digits.parquet --output_dir outputs/vae-digits

The defaults suit the included digits at 32x32 pixels: latents of shape (4, 4, 4), two minutes on one CPU core. The
loss is the mean squared error plus a small KL term, without the perceptual and adversarial losses that photographs
need. The scaling factor in the saved config is 1 / (standard deviation of the latents), so that they have unit
variance.
"""

from diffit.launcher import follow_launcher
from diffit.vae_config import VaeConfig, parse_args

if __name__ == "__main__":
    # Before the slow imports: the launcher may die meanwhile, and a refused flag is answered at once.
    follow_launcher()
    CONFIG = parse_args(description=__doc__)

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from tqdm.auto import tqdm

from diffit.batches import load_batches
from diffit.command_line import run_script
from diffit.decode import normalize_pixels, warn_about_narrow_levels
from diffit.devices import set_up_device, use_cpu
from diffit.run_dir import OutputFolder
from diffit.sources import ImageTable, detect_num_channels, load_image_table
from diffit.stream import ImageDataset, PositionStream, StreamBatchSampler, split_table


def read_batches(table: ImageTable, config: VaeConfig, num_channels: int) -> Iterator[torch.Tensor]:
    """Endless batches of center-cropped images, shape (B, C, H, W), in [-1, 1]."""
    stream = PositionStream(len(table), config.seed)
    size = (config.resolution, config.resolution)
    dataset = ImageDataset(table, stream, size, num_channels, center_crop=True)
    loader = load_batches(dataset, StreamBatchSampler(stream, config.train_batch_size))
    return (normalize_pixels(batch["pixel_values"]) for batch in loader)


def build_vae(config: VaeConfig, num_channels: int) -> AutoencoderKL:
    """Builds a small, randomly initialized VAE without attention."""
    num_levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=num_channels,
        out_channels=num_channels,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=math.gcd(8, *config.block_out_channels),
        sample_size=config.resolution,
        mid_block_add_attention=False,
    )


def compute_loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Mean squared reconstruction error plus the weighted KL divergence to N(0, 1), both per pixel and channel.

    Args:
        vae: the network.
        images: shape (B, C, H, W), in [-1, 1].
        kl_weight: weight of the KL term.

    Returns:
        The loss, a scalar.
    """
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    return F.mse_loss(reconstruction, images) + kl_weight * posterior.kl().mean() / images[0].numel()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images, shape (B, C, H, W), after encoding, sampling and decoding."""
    reconstruction = vae.decode(vae.encode(images).latent_dist.sample()).sample.clamp(-1, 1)
    return -10 * math.log10(F.mse_loss(reconstruction, images).item() / 4)  # the squared range of [-1, 1] is 4


@torch.no_grad()
def measure_std(vae: AutoencoderKL, batches: Iterator[torch.Tensor]) -> float:
    """Standard deviation of latents sampled from the posterior, over batches of shape (B, C, H, W)."""
    return torch.cat([vae.encode(images).latent_dist.sample() for images in batches]).std().item()


def main(config: VaeConfig) -> None:
    """Trains and saves the VAE, and prints its PSNR on held-out images."""
    torch.manual_seed(config.seed)
    device = torch.device("cpu") if use_cpu(config.device) else torch.accelerator.current_accelerator()
    set_up_device(device, config.device)
    folder = OutputFolder(config.output_dir, Path(__file__).name)
    folder.check_free(("config.json", "*.safetensors"))
    folder.create()
    table = load_image_table(config.source, need_labels=False)
    warn_about_narrow_levels(table)
    num_channels = config.num_channels or detect_num_channels(table)
    training_table, held_out_table = split_table(table, 0.05)
    batches = (images.to(device) for images in read_batches(training_table, config, num_channels))
    vae = build_vae(config, num_channels).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 20, config.max_train_steps)

    progress = tqdm(islice(batches, config.max_train_steps), total=config.max_train_steps)
    for images in progress:
        loss = compute_loss(vae, images, config.kl_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    vae.eval()
    vae.register_to_config(scaling_factor=1 / measure_std(vae, islice(batches, 8)))
    folder.announce(("config.json", "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(config.output_dir)
    folder.record(("config.json", "diffusion_pytorch_model.safetensors"))
    psnr = measure_psnr(vae, next(read_batches(held_out_table, config, num_channels)).to(device))
    factor = vae.config.scaling_factor
    print(f"{config.output_dir}: scaling factor {factor:.4f}, PSNR of held-out images {psnr:.1f} dB")


if __name__ == "__main__":
    run_script(main, CONFIG)
