# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains a small `AutoencoderKL`, for data for which the VAEs of Stable Diffusion are too large.

    python scripts/train_vae.py --train_data_file data/digits.parquet --output_dir outputs/vae-digits

The defaults suit the included digits at 32x32 pixels: latents of shape (4, 4, 4), two minutes on one CPU core. The
loss is the mean squared error plus a small KL term, without the perceptual and adversarial losses that photographs
need. The scaling factor in the saved config is 1 / (standard deviation of the latents), so that they have unit
variance.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports, during which the launcher may die

import argparse
import math
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffit.command_line import Parser, number_type, path_type, positive_int, run_script
from diffit.decode import normalize_pixels
from diffit.run_dir import OutputFolder
from diffit.sources import ImageTable, detect_num_channels, load_image_table
from diffit.stream import ImageDataset, PositionStream, StreamBatchSampler, collate, split_table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the flags and checks them against each other."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--train_data_dir", type=path_type, help="folder or zip of images, see train_diffit.py (default: none)"
    )
    parser.add_argument("--train_data_file", type=path_type, help="parquet file of images (default: none)")
    parser.add_argument("--output_dir", type=path_type, required=True, help="folder for the trained VAE (required)")
    parser.add_argument(
        "--resolution",
        type=positive_int,
        default=32,
        help="height and width of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--block_out_channels",
        type=positive_int,
        nargs="+",
        default=[16, 32, 32, 32],
        help="channels of each level; each level but the first halves height and width (default: 16 32 32 32)",
    )
    parser.add_argument(
        "--latent_channels", type=positive_int, default=4, help="channels of the latents (default: %(default)s)"
    )
    parser.add_argument(
        "--kl_weight",
        type=number_type(float, 0),
        default=1e-2,
        help="weight of the KL term, which is averaged over pixels and channels (default: %(default)s)",
    )
    parser.add_argument(
        "--max_train_steps", type=positive_int, default=300, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--train_batch_size", type=positive_int, default=64, help="images per optimizer step (default: %(default)s)"
    )
    parser.add_argument(
        "--learning_rate",
        type=number_type(float, 0),
        default=2e-3,
        help="peak learning rate of AdamW, with 20 steps of warm-up and cosine decay (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=number_type(int, 0, 2**63 - 1),
        default=0,
        help="seed of weights, image order and noise (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if (args.train_data_dir is None) == (args.train_data_file is None):
        parser.error("give either --train_data_dir or --train_data_file")
    factor = 2 ** (len(args.block_out_channels) - 1)
    if args.resolution % factor:
        parser.error(f"--resolution {args.resolution} must be a multiple of {factor} (see --block_out_channels)")
    return args


def read_batches(table: ImageTable, args: argparse.Namespace, num_channels: int) -> Iterator[torch.Tensor]:
    """Endless batches of center-cropped images, shape (B, C, H, W), in [-1, 1]."""
    stream = PositionStream(len(table), args.seed)
    size = (args.resolution, args.resolution)
    dataset = ImageDataset(table, stream, size, num_channels, center_crop=True)
    loader = DataLoader(dataset, batch_sampler=StreamBatchSampler(stream, args.train_batch_size), collate_fn=collate)
    return (normalize_pixels(batch["pixel_values"]) for batch in loader)


def build_vae(args: argparse.Namespace, num_channels: int) -> AutoencoderKL:
    """Builds a small, randomly initialized VAE without attention."""
    num_levels = len(args.block_out_channels)
    return AutoencoderKL(
        in_channels=num_channels,
        out_channels=num_channels,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=1,
        latent_channels=args.latent_channels,
        norm_num_groups=math.gcd(8, *args.block_out_channels),
        sample_size=args.resolution,
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


def main(args: argparse.Namespace) -> None:
    """Trains and saves the VAE, and prints its PSNR on held-out images."""
    torch.manual_seed(args.seed)
    # Without `check_available`, a CUDA build of torch reports an accelerator even if the machine has none.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    folder = OutputFolder(args.output_dir, Path(__file__).name)
    folder.check_free(("config.json", "*.safetensors"))
    folder.create()
    table = load_image_table(train_data_dir=args.train_data_dir, train_data_file=args.train_data_file)
    num_channels = detect_num_channels(table)
    training_table, held_out_table = split_table(table, 0.05)
    batches = (images.to(device) for images in read_batches(training_table, args, num_channels))
    vae = build_vae(args, num_channels).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 20, args.max_train_steps)

    progress = tqdm(islice(batches, args.max_train_steps), total=args.max_train_steps)
    for images in progress:
        loss = compute_loss(vae, images, args.kl_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    vae.eval()
    vae.register_to_config(scaling_factor=1 / measure_std(vae, islice(batches, 8)))
    folder.announce(("config.json", "diffusion_pytorch_model.safetensors"))
    vae.save_pretrained(args.output_dir)
    folder.record(("config.json", "diffusion_pytorch_model.safetensors"))
    psnr = measure_psnr(vae, next(read_batches(held_out_table, args, num_channels)).to(device))
    print(f"{args.output_dir}: scaling factor {vae.config.scaling_factor:.4f}, PSNR of held-out images {psnr:.1f} dB")


if __name__ == "__main__":
    run_script(main, parse_args())
