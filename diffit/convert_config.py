# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The settings of convert_nvidia_checkpoint.py.

The script parses its flags before its slow imports, so nothing slow is imported here.
"""

from dataclasses import dataclass
from pathlib import Path

from diffit.command_line import Parser, add_flags, flag, parse_config, path_type
from diffit.errors import UserError


@dataclass(frozen=True)
class ConvertConfig:
    """A request to convert_nvidia_checkpoint.py.

    Raises:
        UserError: if --vae is given with --to_nvidia, or --output_dir holds something.
    """

    checkpoint: str = flag(
        None,
        "NVIDIA's .safetensors or .pt file; with --to_nvidia, the folder of a trained model (required)",
        type=path_type,
        required=True,
    )
    output_dir: str = flag(None, "folder for the result, new or empty (required)", type=path_type, required=True)
    vae: str | None = flag(
        None, "folder or hub name of the AutoencoderKL to save with the network (default: none)", type=path_type
    )
    to_nvidia: bool = flag(False, "convert a trained folder to NVIDIA's layout")
    debug: bool = False

    def __post_init__(self):
        if self.to_nvidia and self.vae is not None:
            raise UserError("--vae cannot be used with --to_nvidia: NVIDIA's layout has no VAE")
        folder = Path(self.output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output_dir {folder} is not an empty folder")


def parse_args(argv: list[str] | None = None, description: str | None = None) -> ConvertConfig:
    """Reads the command line of convert_nvidia_checkpoint.py.

    Args:
        argv: the flags; default: `sys.argv`.
        description: for `--help`.
    """
    parser = Parser(description)
    add_flags(parser, ConvertConfig)
    return parse_config(parser, ConvertConfig, argv)
