# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The settings of prepare_latents.py.

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
    resolution_type,
)
from diffit.device_config import DeviceConfig
from diffit.source_config import SOURCES, SourceConfig


@dataclass(frozen=True)
class LatentsConfig:
    """A request to prepare_latents.py.

    Raises:
        UserError: unless there is exactly one source of images.
    """

    vae_model_name_or_path: str = flag(
        None,
        "folder or hub name of the AutoencoderKL, AutoencoderDC or AutoencoderKLFlux2 that encodes the images "
        "(required)",
        type=path_type,
        required=True,
    )
    output_dir: str = flag(
        None,
        "folder for the latents: new, or written by an interrupted run with the same flags (required)",
        type=path_type,
        required=True,
    )
    resolution: tuple[int, int] = flag(
        None, "size of the images in pixels, N or HxW (required)", type=resolution_type, required=True
    )
    mirror: bool = flag(True, "encode the mirror image of each image, too, which training with --random_flip needs")
    batch_size: int = flag(16, "images per encoder pass and process", type=positive_int)
    images_per_shard: int = flag(1024, "images per parquet file", type=positive_int)
    on_bad_image: str = flag(
        "error",
        "error: stop at the first image that cannot be read; skip: record it as bad and continue",
        choices=("error", "skip"),
    )
    dataloader_num_workers: int | None = flag(
        None,
        "worker processes that decode images, per process; 0 decodes in the main process (default: the CPU cores of a "
        "process, at most 8)",
        type=number_type(int, 0),
    )
    device: DeviceConfig = nested(DeviceConfig)
    source: SourceConfig = nested(SourceConfig, title="data: --dataset_name, --train_data_dir or --train_data_file")
    debug: bool = False

    def __post_init__(self):
        require_one(self, SOURCES)


def parse_args(argv: list[str] | None = None, description: str | None = None) -> LatentsConfig:
    """Reads the command line of prepare_latents.py.

    Args:
        argv: the flags; default: `sys.argv`.
        description: for `--help`.
    """
    parser = Parser(description)
    add_flags(parser, LatentsConfig)
    return parse_config(parser, LatentsConfig, argv)
