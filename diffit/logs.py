# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a training reports to the trackers and the progress bar."""

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
    """Peak memory so far in bytes: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LossBins:
    """Mean loss of all images, and by quartile of the noise levels, without waiting for the device.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, LEVEL_BINS, device=device)  # of the losses by quartile, and their counts

    def add(self, losses: torch.Tensor, level_bins: torch.Tensor) -> None:
        """Adds the finite losses to their quartiles, both of shape (B)."""
        losses = losses.detach().float()
        finite = losses.isfinite()
        self.sums.index_add_(1, level_bins, torch.stack([losses.where(finite, 0), finite.float()]))

    def means(self, accelerator: Accelerator, name: str) -> dict[str, float]:
        """Means over all processes, under `name` such as `"train/loss"`; starts again from zero.

        To be called by all processes.
        """
        sums, counts = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        means = {name: sum(sums) / max(sum(counts), 1)}
        for i in range(LEVEL_BINS):
            if counts[i] > 0:
                means[f"{name}_quartile_{i + 1}"] = sums[i] / counts[i]
        return means


class Meter:
    """Losses and throughput since the last log.

    Args:
        device: of the losses.
        position: of the data stream, at which the training starts.
    """

    def __init__(self, device: torch.device, position: int):
        self.losses = LossBins(device)
        self.position, self.time = position, time.perf_counter()

    def images_per_second(self, position: int) -> float:
        """Of all processes, since the last call; the time in `paused` does not count."""
        now = time.perf_counter()
        rate = (position - self.position) / (now - self.time)
        self.position, self.time = position, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of the `with` block."""
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
    """Sends the numbers since the last log to the trackers and the progress bar. To be called by all processes.

    Args:
        accelerator: has the trackers.
        progress: in optimizer steps.
        state: of the training, after the step.
        meter: of the steps since the last log.
        grad_norm: of the last step before clipping, shape ().
        lr: learning rate of the last step.
        num_bad_images: skipped by this process so far.
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
