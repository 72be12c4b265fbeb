# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training metrics for the trackers and the progress bar."""

import contextlib
import sys
import time
from collections.abc import Iterator

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffit.batches import LEVEL_BINS
from diffit.optimization import TrainingState

PROJECT = "train_diffit"  # name of the run in the trackers


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since the start: the GPU's, or this process's without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LossBins:
    """Mean loss, overall and per quartile of the noise level, accumulated on the device without a synchronization.

    Args:
        device: device of the losses.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, LEVEL_BINS, device=device)  # per quartile: sum of the losses, number of losses

    def add(self, losses: torch.Tensor, level_bins: torch.Tensor) -> None:
        """Adds the finite losses to their quartiles.

        Args:
            losses: shape (B).
            level_bins: quartile of each noise level, int in [0, LEVEL_BINS); shape (B).
        """
        losses = losses.detach().float()
        finite = losses.isfinite()
        self.sums.index_add_(1, level_bins, torch.stack([losses.where(finite, 0), finite.float()]))

    def means(self, accelerator: Accelerator, name: str) -> dict[str, float]:
        """Returns the means over all processes and resets them. Must be called by all processes.

        Args:
            name: key of the overall mean, such as `"train/loss"`; quartiles get `_quartile_1` and so on appended.
        """
        sums, counts = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = {name: sum(sums) / max(sum(counts), 1)}
        for i in range(LEVEL_BINS):
            if counts[i] > 0:
                means[f"{name}_quartile_{i + 1}"] = sums[i] / counts[i]
        return means


class Meter:
    """Losses and throughput since the last log entry.

    Args:
        device: device of the losses.
        position: position of the data stream at which training starts.
    """

    def __init__(self, device: torch.device, position: int):
        self.losses = LossBins(device)
        self.position, self.time = position, time.perf_counter()

    def images_per_second(self, position: int) -> float:
        """Throughput of all processes since the last call, excluding the time in `paused`.

        Args:
            position: current position of the data stream.
        """
        now = time.perf_counter()
        rate = (position - self.position) / (now - self.time)
        self.position, self.time = position, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the duration of the `with` block from the throughput."""
        start = time.perf_counter()
        yield
        self.time += time.perf_counter() - start


def log_training(
    accelerator: Accelerator,
    progress: tqdm,
    state: TrainingState,
    meter: Meter,
    grad_norm: torch.Tensor,
    lr: float,
    num_bad_images: int,
) -> None:
    """Sends the metrics since the last log entry to the trackers and the progress bar.

    Must be called by all processes.

    Args:
        accelerator: holds the trackers.
        progress: progress bar, in optimizer steps.
        state: training state after the step.
        meter: losses and throughput since the last log entry.
        grad_norm: gradient norm of the last step before clipping; shape ().
        lr: learning rate of the last step.
        num_bad_images: number of images that this process has skipped so far.
    """
    images_per_second = meter.images_per_second(state.position)
    values = meter.losses.means(accelerator, "train/loss") | {
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
