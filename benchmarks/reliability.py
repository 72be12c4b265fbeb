"""The cost of reliability: seconds of a checkpoint, and of randomness as a function of the position, for emoji32.

    python -m benchmarks.reliability

Trains 12 steps of configs/train/emoji32.yaml with a checkpoint every 4, then draws the random numbers of a batch in
both ways, alternating. Writes `benchmarks/results/reliability.md`.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import train_diffit
from diffit.logs import Meter
from diffit.stream import AUGMENTATION, DIFFUSION, position_generator

ROOT = Path(__file__).parents[1]
BATCH_SIZE, SHAPE = 64, (3, 32, 32)


def time_training(run_dir: str) -> tuple[float, list[float], int]:
    """Seconds per optimizer step, seconds of each checkpoint, and bytes per checkpoint."""
    seconds = []
    original = train_diffit.save_checkpoint

    def timed(*arguments) -> None:
        started = time.perf_counter()
        original(*arguments)
        seconds.append(time.perf_counter() - started)

    train_diffit.save_checkpoint = timed
    flags = ["--max_train_steps=12", "--checkpointing_steps=4", "--logging_steps=4", "--num_validation_images=1"]
    flags += ["--validation_inference_steps=1", "--report_to=none", f"--output_dir={run_dir}"]
    flags += ["--dataloader_num_workers=0"]  # a step includes all of its work
    steps = []
    images_per_second = Meter.images_per_second

    def record(meter: Meter, position: int) -> float:
        rate = images_per_second(meter, position)
        steps.append(BATCH_SIZE / rate)  # seconds of a step
        return rate

    Meter.images_per_second = record
    train_diffit.main(train_diffit.parse_args(["--config", str(ROOT / "configs/train/emoji32.yaml"), *flags]))
    size = sum(file.stat().st_size for file in Path(run_dir, "checkpoint-12").rglob("*"))
    return statistics.median(steps), seconds, size


def draw_by_position(start: int) -> None:
    """Samples all random numbers of a batch as `ImageDataset` does."""
    for position in range(start, start + BATCH_SIZE):
        position_generator(0, position, AUGMENTATION).random(3)
        rng = position_generator(0, position, DIFFUSION)
        rng.random(dtype=np.float32), rng.random(dtype=np.float32)
        torch.from_numpy(rng.standard_normal(SHAPE, dtype=np.float32))


def draw_from_state(start: int) -> None:
    """Samples the same numbers from torch's global generator, batch by batch, as scripts usually do."""
    torch.rand(BATCH_SIZE, 3), torch.rand(BATCH_SIZE, 2), torch.randn(BATCH_SIZE, *SHAPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="number of rounds (default: 21)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        step, checkpoints, size = time_training(run_dir)
    draws: dict[str, list[float]] = {"position": [], "state": []}
    for i in range(args.rounds):
        for name, draw in (("position", draw_by_position), ("state", draw_from_state)):
            started = time.perf_counter()
            draw(BATCH_SIZE * i)
            draws[name].append(time.perf_counter() - started)
    position, state = (statistics.median(draws[name]) for name in ("position", "state"))
    checkpoint = statistics.median(checkpoints)
    every = {n: checkpoint / (checkpoint + n * step) for n in (250, 500)}
    parameters = json.loads((ROOT / "configs/model/emoji32.json").read_text())["block_out_channels"]
    text = f"""# Cost of reliability

`python -m benchmarks.reliability`: emoji32 (channels {parameters}), {BATCH_SIZE} images per step, float32.
{torch.get_num_threads()} thread(s), {platform.machine()}, Python {platform.python_version()}, torch
{torch.__version__}; checkpoints on a local disk, median of {len(checkpoints)}; random numbers:
median of {args.rounds} alternating pairs.

| what | measured |
|---|---|
| optimizer step | {step:.2f} s |
| checkpoint: write, checksums, fsync, rename | {checkpoint:.2f} s for {size / 2**20:.0f} MiB |
| its fraction of the training time, every 250 steps (as in the recipe) | {every[250]:.2%} |
| its fraction of the training time, every 500 steps (the default) | {every[500]:.2%} |
| random numbers of a batch by position | {1000 * position:.1f} ms, {position / step:.2%} of a step |
| the same numbers from torch's global generator | {1000 * state:.1f} ms, {state / step:.2%} of a step |
| overhead of randomness by position | {(position - state) / step:.2%} of a step |
"""
    print(text)
    (ROOT / "benchmarks/results/reliability.md").write_text(text)


if __name__ == "__main__":
    main()
