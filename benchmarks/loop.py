"""The overhead of the training loop over a bare training step, and its speed against `train_unconditional.py`.

    python -m benchmarks.loop

Each side runs in its own process. Two sides alternate in turns of a few steps; the first turn of each, which includes
its start-up, is not counted. Our side is `train_diffit.main` itself, with EMA, TensorBoard and data loading. Peak
memory is measured in separate processes (see `GIVE_BACK`). Writes `benchmarks/results/loop.md`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

# Heavy modules are imported by the sides only: a process's peak memory starts from that of its parent.
ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "data/noto_emoji_32.parquet"
BATCH_SIZE = 64  # of configs/train/emoji32.yaml
TURN = 3  # steps
# Which freed blocks glibc keeps varies between runs by 5 % of the peak, and requesting pages again by 2 % of the time.
# So time is measured with glibc keeping all of them, and the peak with blocks above 256 KiB returned at once, which
# makes it reproducible to about 1 MiB.
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


class Turns:
    """Measures the turns of one side, and makes it wait during the turns of the other."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.start = time.perf_counter()

    def end(self) -> None:
        """Reports a turn after its last step, and waits for the next one."""
        seconds = time.perf_counter() - self.start
        self.connection.send((seconds / TURN, peak_memory()))
        self.connection.recv()
        self.start = time.perf_counter()


def peak_memory() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def script_flags(config: str, num_turns: int, folder: str) -> list[str]:
    """Our script's flags: one log entry at the end of each turn; checkpoint and preview come after the last turn."""
    flags = ["--config", str(ROOT / "configs/train/emoji32.yaml"), "--report_to=tensorboard", "--use_ema"]
    if config == "unet":
        file = Path(folder, "unet.json")
        file.write_text(json.dumps(UNET))
        # The same loss as the other side's.
        flags += [f"--model_config={file}", "--no-class_conditional", "--prediction_type=epsilon"]
    flags += [f"--max_train_steps={TURN * num_turns}", f"--logging_steps={TURN}", "--lr_warmup_steps=1"]
    flags += ["--checkpointing_steps=1000000", "--validation_steps=1000000", "--num_validation_images=1"]
    flags += ["--dataloader_num_workers=0"]  # which would work on during the other side's turn
    return [*flags, "--validation_inference_steps=1", f"--output_dir={folder}/run"]


def run_script(connection: Connection, config: str, num_turns: int, folder: str) -> None:
    """Our training script."""
    import train_diffit

    turns = Turns(connection)
    log_training = train_diffit.log_training

    def log_and_wait(*arguments) -> None:
        log_training(*arguments)
        turns.end()

    train_diffit.log_training = log_and_wait
    train_diffit.main(train_diffit.parse_args(script_flags(config, num_turns, folder)))


def run_bare(connection: Connection, config: str, num_turns: int, folder: str) -> None:
    """Forward, backward and optimizer step of the network of configs/train/emoji32.yaml on one batch."""
    import torch
    from torch.nn import functional as F

    from diffit.config import parse_args
    from diffit.networks import build_model, read_model_config, sample_shape, set_up_model
    from diffit.optimization import build_optimizer
    from diffit.processes import build_accelerator
    from diffit.sources import load_image_table

    asked = parse_args(script_flags(config, num_turns, folder))
    accelerator = build_accelerator(asked.precision, asked.run)
    classes = load_image_table(asked.data.source).class_names
    model_config = read_model_config(asked.model) | {"num_class_embeds": len(classes)}
    model = build_model(model_config | {"in_channels": 3, "out_channels": 3})
    set_up_model(model, asked.model, accelerator.device, accelerator.mixed_precision)
    optimizer = build_optimizer(asked.optimizer, model)
    images = torch.randn(BATCH_SIZE, *sample_shape(model.config))
    timesteps = torch.randint(0, 1000, (BATCH_SIZE,))
    labels = torch.randint(0, len(classes), (BATCH_SIZE,))
    turns = Turns(connection)
    for _ in range(num_turns):
        for _ in range(TURN):
            F.mse_loss(model(images, timesteps, labels).sample, images).backward()
            optimizer.step()
            optimizer.zero_grad()
        turns.end()


def run_peer(connection: Connection, config: str, num_turns: int, folder: str) -> None:
    """diffusers' loop, and its way to the images: Pillow, transforms one by one, a `DataLoader`."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from datasets import load_dataset
    from diffusers import DDPMPipeline, UNet2DModel  # noqa: F401 (it imports the first, too)
    from PIL import Image

    from benchmarks.train_unconditional import train_unconditional

    size, rng = UNET["sample_size"], np.random.default_rng(0)

    def transform(image: Image.Image) -> torch.Tensor:
        """torchvision's Resize, RandomCrop, ToTensor and Normalize([0.5], [0.5]); the flip is off, as in ours."""
        image = image.convert("RGB")
        short = min(image.size)
        if short != size:
            image = image.resize([round(side * size / short) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (int(rng.integers(0, side - size + 1)) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)  # (C, H, W)
        return pixels.sub(0.5).div(0.5)

    dataset = load_dataset("parquet", data_files=str(IMAGES), split="train")
    dataset.set_transform(lambda examples: {"input": [transform(image) for image in examples["image"]]})
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,  # so that all steps are alike
        collate_fn=lambda examples: torch.stack([example["input"] for example in examples]),
    )
    project = ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/logs")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), log_with="tensorboard", project_config=project)
    accelerator.init_trackers("train_unconditional")
    turns = Turns(connection)
    train_unconditional(
        UNet2DModel.from_config(UNET),
        loader,
        num_steps=TURN * num_turns,
        use_ema=True,
        accelerator=accelerator,
        on_step=lambda step, model, ema_model: turns.end() if step % TURN == 0 else None,
    )
    accelerator.end_training()


def compare(
    sides: list[Callable], config: str, pairs: int, environment: dict[str, str]
) -> list[list[tuple[float, float]]]:
    """Alternates the turns of two sides; each side is first in every other pair.

    Args:
        sides: functions such as `run_script`.
        config: `"emoji32"` or `"unet"`.
        pairs: number of counted turns per side.
        environment: environment variables of both sides.

    Returns:
        For each side, for each turn: seconds per step, and the process's peak memory so far in MiB.
    """
    context = multiprocessing.get_context("spawn")
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder:
        connections, processes = [], []
        for i, side in enumerate(sides):
            ours, theirs = context.Pipe()
            Path(folder, str(i)).mkdir()
            arguments = (theirs, config, pairs + 1, f"{folder}/{i}")
            process = context.Process(target=side, args=arguments, daemon=True)  # ends with this one
            process.start()
            theirs.close()
            ours.recv()  # the end of its first turn; an EOFError if it failed
            connections.append(ours)
            processes.append(process)
        results = [[], []]
        for pair in range(pairs):
            for i in (0, 1) if pair % 2 == 0 else (1, 0):
                connections[i].send(None)
                results[i].append(connections[i].recv())
        for connection, process in zip(connections, processes, strict=True):
            connection.send(None)
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"a side ended with exit code {process.exitcode}")
    for name in environment:
        del os.environ[name]
    return results


def seconds_and_ratios(results: list[list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Median seconds per step of each side, and the sorted ratios of the first to the second side in each pair."""
    seconds = [[turn[0] for turn in turns] for turns in results]
    return [statistics.median(side) for side in seconds], sorted(a / b for a, b in zip(*seconds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="number of counted turns per side (default: 7)")
    args = parser.parse_args()

    (script, bare), ratios = seconds_and_ratios(compare([run_script, run_bare], "emoji32", args.pairs, KEEP))
    overhead = [ratio - 1 for ratio in ratios]
    (ours, theirs), times = seconds_and_ratios(compare([run_script, run_peer], "unet", args.pairs, KEEP))
    our_memory, their_memory = (turns[-1][1] for turns in compare([run_script, run_peer], "unet", 1, GIVE_BACK))

    import torch  # after the last side has started

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate"))
    text = f"""# The training loop

`python -m benchmarks.loop`: emoji32's images, {BATCH_SIZE} per step, float32, eager, loaded in the main process.
Segments of {TURN} steps, median of {args.pairs} alternating pairs after one warm-up pair; the lowest and highest in
brackets. {torch.get_num_threads()} threads, {platform.machine()}, Python {platform.python_version()}, {versions}.

Emoji32's network and recipe:

| what | seconds per step |
|---|---|
| `train_diffit.py`: data, EMA, TensorBoard, clipping, checks, everything | {script:.3f} |
| forward, backward and optimizer step alone | {bare:.3f} |
| overhead of the loop | {statistics.median(overhead):+.1%} ({overhead[0]:+.1%} to {overhead[-1]:+.1%}) |

A `UNet2DModel` with channels {UNET["block_out_channels"]} in our loop and diffusers', both with EMA and TensorBoard:

| side | seconds per step | peak resident memory |
|---|---|---|
| `train_diffit.py` | {ours:.3f} | {our_memory:.0f} MiB |
| `train_unconditional.py` | {theirs:.3f} | {their_memory:.0f} MiB |
| ours / theirs | {statistics.median(times):.3f} ({times[0]:.3f} to {times[-1]:.3f}) \
| {our_memory / their_memory:.3f} |

It is unpredictable which freed blocks glibc keeps. Times are therefore measured with glibc keeping all of them
(`{" ".join(f"{key}={value}" for key, value in KEEP.items())}`),
and peak memory in separate runs in which it keeps no block above 256 KiB
(`{" ".join(f"{key}={value}" for key, value in GIVE_BACK.items())}`).
"""
    print(text)
    (ROOT / "benchmarks/results/loop.md").write_text(text)


if __name__ == "__main__":
    main()
