# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saved models that a training starts from: which weights a path means, and how they were trained.

A path is the folder of a network, of a pipeline or of a checkpoint, or a hub name. The files in a folder decide what
it is, never its name.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from diffit.errors import UserError, user_errors
from diffit.run_dir import MANIFEST, file_digest, manifest_files
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


def model_folder(path: str, flag: str = FLAG) -> str | None:
    """The pipeline or checkpoint that a path means: the path, or the folder around that of a network.

    None if the path is the folder of a network that belongs to neither.

    Raises:
        UserError: names `flag`, if the pipeline's `model_index.json` is damaged.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "scheduler").is_dir() or (folder / "model_index.json").is_file():
        return path
    # A link to a network belongs to the folder that holds the link, otherwise to the one that its target is in.
    for network in (folder.absolute(), folder.resolve()):
        around = network.parent
        is_part = (around / "state.json").is_file() and network.name.startswith(PARTS)
        if not is_part and network.name in PARTS and (around / "model_index.json").is_file():
            is_part = _has_component(read_index(str(around), flag), network.name)
        if is_part:
            return str(around)
    return None


def pipeline_folder(path: str) -> str | None:
    """The pipeline that a path means, or that the run of a checkpoint has exported; None if there is none."""
    home = model_folder(path)
    if home is not None and Path(home, "state.json").is_file():
        home = str(Path(home).absolute().parent)
    if home is None or (Path(home).is_dir() and not Path(home, "model_index.json").is_file()):
        return None
    return home


def read_index(pipeline: str, flag: str = FLAG) -> dict[str, Any]:
    """Contents of a pipeline's `model_index.json`.

    Raises:
        UserError: names `flag`, if it cannot be read.
    """
    what = f"{flag}: cannot read the model_index.json of {pipeline}"
    with user_errors(what, OSError, ValueError):
        index = DiffusionPipeline.load_config(pipeline)
    if not isinstance(index, dict):
        raise UserError(f"{what}: it must hold a JSON object")
    return index


def _has_component(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def has_vae(pipeline: str) -> bool:
    """Whether a pipeline has a VAE, so that its network denoises latents. For the errors see `read_index`."""
    return _has_component(read_index(pipeline), "vae")


def read_class_names(path: str) -> tuple[str, ...] | None:
    """Names of the classes of saved weights, in order; None if nothing around the weights tells them.

    Those of a checkpoint are in the pipeline that its run has exported, if it has done so already.
    """
    pipeline = pipeline_folder(path)
    if pipeline is None:
        return None
    with contextlib.suppress(UserError):
        id2label = read_index(pipeline).get("id2label")
        if isinstance(id2label, dict):
            names = [id2label.get(str(index)) for index in range(len(id2label))]
            return tuple(names) if all(isinstance(name, str) for name in names) else None
    return None


def check_weights(what: str, folder: Path) -> None:
    """Refuses a checkpoint's weights that have changed since they were saved, which safetensors does not notice.

    Args:
        what: start of an error message: the flag and its value.
        folder: folder of the weights. Without a manifest next to it, nothing is checked.

    Raises:
        UserError: names the file.
    """
    checkpoint = folder.parent
    names = [name for name in manifest_files(checkpoint) if name.startswith(f"{folder.name}/")]
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")) if names else {}
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{what}: {checkpoint / name} is missing")
        if file_digest(checkpoint / name) != manifest[name]:
            raise UserError(
                f"{what}: {checkpoint / name} is damaged (size or checksum differs from {MANIFEST}): use another "
                "checkpoint"
            )


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
