# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The numbers of a training for the trackers and the progress bar."""

import sys

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffit.batches import LEVEL_BINS
from diffit.optimization import TrainingState

PROJECT = "train_diffit"  # name of the run in the trackers


def is_due(global_step: int, every: int, last_step: int) -> bool:
    """Whether periodic work is due after this optimizer step: every so many steps, and at the end."""
    return global_step % every == 0 or global_step == last_step


def peak_memory(device: torch.device) -> int:
    """Most memory used so far in bytes: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_to_bins(bins: torch.Tensor, loss: torch.Tensor, level_bins: torch.Tensor) -> None:
    """Adds losses of shape (B), those that are finite, to the sums and counts of their quartiles, also (B)."""
    loss = loss.detach().float()
    finite = loss.isfinite()
    bins.index_add_(1, level_bins, torch.stack([loss.where(finite, 0), finite.float()]))


def bin_means(accelerator: Accelerator, bins: torch.Tensor, name: str) -> dict[str, float]:
    """Mean loss of all processes, under `name`, and by quartile of the noise levels. To be called by all processes.

    Args:
        bins: sums of the losses by quartile of the noise levels, and counts; shape (2, LEVEL_BINS).
        name: for trackers, such as `"train/loss"`.
    """
    sums, counts = accelerator.reduce(bins, "sum").tolist()
    means = {name: sum(sums) / max(sum(counts), 1)}
    for i in range(LEVEL_BINS):
        if counts[i] > 0:
            means[f"{name}_quartile_{i + 1}"] = sums[i] / counts[i]
    return means


def log_metrics(
    accelerator: Accelerator,
    progress: tqdm,
    state: TrainingState,
    bins: torch.Tensor,
    grad_norm: torch.Tensor,
    lr: float,
    images_per_second: float,
    num_bad_images: int,
) -> None:
    """Sends the numbers since the last log to the trackers and the progress bar. To be called by all processes.

    Args:
        bins: see `bin_means`.
        images_per_second: of all processes.
        num_bad_images: skipped by this process so far.
    """
    values = bin_means(accelerator, bins, "train/loss") | {
        "train/grad_norm": grad_norm.item(),
        "train/learning_rate": lr,
        "train/images_per_second": images_per_second,
        "train/peak_memory_gib": peak_memory(accelerator.device) / 2**30,
        "train/kimg": state.position / 1000,
        "train/bad_images": num_bad_images,
        "train/bad_steps": state.bad_steps,
    }
    for name, ema_model in state.ema_models.items():
        values[f"train/{name}_decay"] = ema_model.cur_decay_value
    accelerator.log(values, step=state.global_step)
    loss = values["train/loss"]
    progress.update(state.global_step - progress.n)
    progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", img_s=f"{images_per_second:.0f}", refresh=False)
