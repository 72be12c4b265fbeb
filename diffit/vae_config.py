# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The settings of train_vae.py.

The script parses its flags before its slow imports, so nothing slow is imported here.
"""

from dataclasses import dataclass

from diffit.command_line import (
    Parser,
    add_flags,
    flag,
    nested,
    number_type,
    parse_config,
    path_type,
    positive_int,
    require_one,
)
from diffit.device_config import DeviceConfig
from diffit.errors import UserError
from diffit.source_config import SOURCES, SourceConfig


@dataclass(frozen=True)
class VaeConfig:
    """A request to train_vae.py.

    Raises:
        UserError: unless there is exactly one source of images, or if the levels do not divide --resolution.
    """

    output_dir: str = flag(None, "folder for the trained VAE (required)", type=path_type, required=True)
    resolution: int = flag(32, "height and width of the images in pixels", type=positive_int)
    num_channels: int | None = flag(
        None, "channels of the images (default: detected; required for arrays of more than 4)", type=positive_int
    )
    block_out_channels: tuple[int, ...] = flag(
        (16, 32, 32, 32),
        "channels of each level; each level but the first halves height and width",
        type=positive_int,
        nargs="+",
    )
    latent_channels: int = flag(4, "channels of the latents", type=positive_int)
    kl_weight: float = flag(
        1e-2, "weight of the KL term, which is averaged over pixels and channels", type=number_type(float, 0)
    )
    max_train_steps: int = flag(300, "optimizer steps", type=positive_int)
    train_batch_size: int = flag(64, "images per optimizer step", type=positive_int)
    learning_rate: float = flag(
        2e-3,
        "peak learning rate of AdamW, with 20 steps of warm-up and cosine decay",
        type=number_type(float, 0),
    )
    seed: int = flag(0, "seed of weights, image order and noise", type=number_type(int, 0, 2**63 - 1))
    device: DeviceConfig = nested(DeviceConfig)
    source: SourceConfig = nested(SourceConfig, title="data: --dataset_name, --train_data_dir or --train_data_file")
    debug: bool = False

    def __post_init__(self):
        require_one(self, SOURCES)
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.resolution % factor:
            raise UserError(
                f"--resolution {self.resolution} must be a multiple of {factor} (see --block_out_channels)"
            )


def parse_args(argv: list[str] | None = None, description: str | None = None) -> VaeConfig:
    """Reads the command line of train_vae.py.

    Args:
        argv: the flags; default: `sys.argv`.
        description: for `--help`.
    """
    parser = Parser(description)
    add_flags(parser, VaeConfig)
    return parse_config(parser, VaeConfig, argv)
