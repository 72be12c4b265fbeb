# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saved models that a training starts from: which weights a path means, and how they were trained.

A path is the folder of a network, of a pipeline or of a checkpoint, or a hub name. The files in a folder decide what
it is, never its name.
"""

import contextlib
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from diffit.errors import UserError, user_errors
from diffit.scheduler_configs import complete_scheduler_config

logger = get_logger(__name__, log_level="INFO")

PARTS = ("unet", "transformer")  # component names of networks
FLAG = "--pretrained_model_name_or_path"


def network_subfolder(path: str) -> str | None:
    """The folder of the network in a pipeline, checkpoint or hub repository; None if the path is itself a network's.

    A checkpoint holds several sets of weights: see `checkpoint_weights`.
    """
    folder = Path(path)
    if not folder.is_dir():
        for part in PARTS:
            with contextlib.suppress(OSError):
                UNet2DModel.load_config(path, subfolder=part)
                return part
        return None
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return None
    if (folder / "state.json").is_file():
        return checkpoint_weights(folder)
    return next((part for part in PARTS if (folder / part).is_dir()), None)


def checkpoint_weights(checkpoint: Path) -> str:
    """The folder of the weights that a checkpoint stands for: its first average, or the raw weights without one."""
    folders = sorted(path.name for part in PARTS for path in checkpoint.glob(f"{part}*") if path.is_dir())
    averages = [name for name in folders if "_ema" in name]
    return next(iter([*averages, *folders]), PARTS[0])


def model_folder(path: str) -> str | None:
    """The pipeline or checkpoint that a path means: the path, or the folder around that of a network.

    None if the path is the folder of a network that belongs to neither.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "scheduler").is_dir() or (folder / "model_index.json").is_file():
        return path
    around = folder.absolute().parent
    is_part = (around / "state.json").is_file() and folder.name.startswith(PARTS)
    if not is_part and (around / "model_index.json").is_file():
        with user_errors(f"{FLAG} {path}", OSError, ValueError):
            index = DiffusionPipeline.load_config(str(around))
        is_part = folder.name in PARTS and (index.get(folder.name) or [None])[0] is not None
    return str(around) if is_part else None


def read_class_names(path: str) -> tuple[str, ...] | None:
    """Names of the classes of saved weights, in order; None if nothing around the weights tells them.

    Those of a checkpoint are in the pipeline that its run has exported, if it has done so already.
    """
    home = model_folder(path)
    if home is not None and Path(home, "state.json").is_file():
        home = str(Path(home).absolute().parent)
    if home is None or (Path(home).is_dir() and not Path(home, "model_index.json").is_file()):
        return None
    with contextlib.suppress(OSError, ValueError):
        id2label = DiffusionPipeline.load_config(home).get("id2label")
        if isinstance(id2label, dict):
            names = [id2label.get(str(index)) for index in range(len(id2label))]
            return None if None in names else tuple(names)
    return None


def read_pretrained_scheduler(path: str | None) -> dict[str, Any]:
    """Complete config of the scheduler that the weights were trained with; empty without a path or a scheduler.

    Raises:
        UserError: if the scheduler's config cannot be read.
    """
    if path is None:
        return {}
    home = model_folder(path)
    if home is not None and Path(home, "scheduler").is_dir():
        with user_errors(f"{FLAG} {path}: cannot read {Path(home, 'scheduler')}", OSError, ValueError):
            config = DDPMScheduler.load_config(home, subfolder="scheduler")
        if not isinstance(config, dict):
            raise UserError(f"{FLAG} {path}: {Path(home, 'scheduler')} must hold a JSON object")
        return complete_scheduler_config(config)
    if home is not None and not Path(home).is_dir():
        with contextlib.suppress(OSError):
            return complete_scheduler_config(dict(DDPMScheduler.load_config(home, subfolder="scheduler")))
    logger.warning(
        f"{path} has no scheduler (none in it, nor in a pipeline around it): what its weights predict and their noise "
        "schedule are taken from the flags"
    )
    return {}
