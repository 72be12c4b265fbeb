"""Data-loading throughput of one worker, ours against that of diffusers' `train_unconditional.py`.

    python -m benchmarks.data_path
    python -m benchmarks.data_path --before 77cd3ef

Measures the path from files to the float32 images and noise of a training step, in one process and one thread. The
sides divide the work differently: our worker also samples the noise and leaves scaling to the device; theirs scales
and leaves the noise to the device. Hence two ratios: of the workers alone, and of all work with the CPU as device.
Also measures how long a training waits for its workers. Writes `benchmarks/results/data_path.md`.

With --before, measures one worker of an earlier commit and of the working tree in turns instead: images per second,
and the time to hand over a batch. Replaces that section of the results.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.features
import PIL.Image
import torch
from datasets import Dataset, load_dataset
from torch.utils.benchmark import Timer
from torch.utils.data import default_collate

import train_diffit
from benchmarks.same_numbers import check_out
from diffit.decode import decode_pixels, normalize_pixels
from diffit.latents import LatentDataset, LatentTable, latent_features
from diffit.packing import Batch
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import (
    DIFFUSION,
    ImageDataset,
    PositionStream,
    StreamBatchSampler,
    StreamDataset,
    position_generator,
)

ROOT = Path(__file__).parents[1]
LATENT_SHAPE = (4, 32, 32)  # of 256 pixels, as in configs/train/imagenet256.yaml
TRAINING_STEPS, TRAINING_BATCH_SIZE = 12, 16

# A worker's function that returns its next batch, and the training process's function that finishes the batch.
Side = tuple[Callable[[], Any], Callable[[Any], list[torch.Tensor]]]


# ---------------------------------------------------------------------------------------------------------------------
# The files


def write_jpegs(folder: Path, width: int, height: int, num_images: int = 200) -> float:
    """Writes emoji on multi-scale noise as JPEGs, which take as long to decode as photos.

    Returns:
        Bytes per image.
    """
    rng = np.random.default_rng(0)
    emoji = load_image_table(SourceConfig(train_data_file=str(ROOT / "data/noto_emoji_32.parquet")))
    folder.mkdir()
    for i in range(num_images):
        picture = np.full((height, width, 3), 128, np.float32)
        for cell in (1, 4, 16, 64, 256):  # the coarser, the stronger, as in photos
            cells = (-(-height // cell), -(-width // cell), 3)
            clouds = PIL.Image.fromarray(rng.integers(0, 256, cells, dtype=np.uint8))
            clouds = clouds.resize((width, height), PIL.Image.Resampling.BICUBIC)
            picture += (np.asarray(clouds, np.float32) - 128) * cell**0.4 / 10
        image = PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        _, data = emoji.read(int(rng.integers(len(emoji))))
        side = min(width, height) // 2
        figure = PIL.Image.open(io.BytesIO(data)).convert("RGBA").resize((side, side), PIL.Image.Resampling.BICUBIC)
        image.paste(figure, (int(rng.integers(width - side)), int(rng.integers(height - side))), figure)
        image.save(folder / f"{i:04d}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir()) / num_images


# ---------------------------------------------------------------------------------------------------------------------
# The two sides


def our_side(source: dict[str, str], size: int, latent_shape: tuple[int, int, int] | None, batch_size: int) -> Side:
    """Our side: color images with random crop and flip.

    Args:
        source: arguments of `SourceConfig`.
        size: height and width in pixels.
        latent_shape: shape of two noise tensors, or None for one with the shape of the images.
        batch_size: images per batch.
    """
    table = load_image_table(SourceConfig(**source))
    stream = PositionStream(len(table), seed=0)
    dataset = ImageDataset(table, stream, (size, size), 3, random_flip=True, latent_shape=latent_shape)

    def finish(batch: Batch) -> list[torch.Tensor]:
        noise = [batch[name] for name in ("noise", "posterior_noise") if name in batch]
        return [normalize_pixels(batch["pixel_values"]), *noise]

    return our_worker(dataset, batch_size), finish


def our_worker(dataset: StreamDataset, batch_size: int) -> Callable[[], Batch]:
    """A function that returns our worker's next batch."""
    positions = iter(StreamBatchSampler(dataset.stream, batch_size))
    return lambda: dataset.__getitems__(next(positions))


def their_side(rows: Dataset, size: int, latent_shape: tuple[int, int, int] | None, batch_size: int) -> Side:
    """Their side: the same images as `train_unconditional.py` with --random_flip loads them.

    It follows diffusers' `examples/unconditional_image_generation/train_unconditional.py` (Apache-2.0). The transforms
    of torchvision (BSD-3-Clause) that it composes are re-implemented, because torchvision is not a dependency.
    """

    def resize(image: PIL.Image.Image) -> PIL.Image.Image:
        shorter, longer = sorted(image.size)
        if shorter == size:
            return image
        other = int(size * longer / shorter)
        new_size = (size, other) if image.width <= image.height else (other, size)
        return image.resize(new_size, PIL.Image.Resampling.BILINEAR)

    def random_crop(image: PIL.Image.Image) -> PIL.Image.Image:
        top, left = 0, 0
        if image.size != (size, size):
            top = torch.randint(0, image.height - size + 1, size=(1,)).item()
            left = torch.randint(0, image.width - size + 1, size=(1,)).item()
        return image.crop((left, top, left + size, top + size))

    def random_flip(image: PIL.Image.Image) -> PIL.Image.Image:
        return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image

    def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)

    def normalize(pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.as_tensor([0.5], dtype=pixels.dtype).view(-1, 1, 1) for _ in range(2))
        if (std == 0).any():
            raise ValueError("std is zero")
        return pixels.clone().sub_(mean).div_(std)

    def transform(examples: dict) -> dict:
        images = (random_flip(random_crop(resize(image.convert("RGB")))) for image in examples["image"])
        return {"input": [normalize(to_tensor(image)) for image in images]}

    dataset = rows.with_transform(transform)

    def sample_rows() -> Iterator[list[int]]:
        while True:
            order = torch.randperm(len(dataset)).tolist()
            yield from (order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size))

    batches = sample_rows()

    def work() -> dict:
        return default_collate(dataset.__getitems__(next(batches)))

    def finish(batch: dict) -> list[torch.Tensor]:
        clean_images = batch["input"]
        shapes = [clean_images.shape] if latent_shape is None else [(batch_size, *latent_shape)] * 2
        return [clean_images, *(torch.randn(shape) for shape in shapes)]

    return work, finish


def compare(sides: list[Side], batch_size: int, rounds: int) -> tuple[list[float], float, float]:
    """Measures two sides in turns.

    Returns:
        Medians: images per second of each worker, and the first side's time divided by the second's, for the workers
        alone and for all work.
    """
    tensors = [finish(work()) for work, finish in sides]
    assert [tensor.shape for tensor in tensors[0]] == [tensor.shape for tensor in tensors[1]]
    timers = [
        Timer(statement, globals={"work": work, "finish": finish}, num_threads=1)
        for statement in ("work()", "finish(work())")
        for work, finish in sides
    ]
    number = max(1, round(0.3 / timers[1].timeit(1).median))  # about 0.3 s
    rows = [[timer.timeit(number).median / batch_size for timer in timers] for _ in range(rounds)]
    speeds = [1 / statistics.median(seconds) for seconds in list(zip(*rows, strict=True))[:2]]
    return speeds, statistics.median(a / b for a, b, _, _ in rows), statistics.median(a / b for _, _, a, b in rows)


def time_parts(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds per 256-pixel image of each step of our worker, and of sampling noise in both ways."""
    table = load_image_table(SourceConfig(train_data_dir=str(folder)))
    files = [table.read(index) for index in range(64)]
    decoded = [decode_pixels(*file, (256, 256), 3) for file in files]
    shape = (3, 256, 256)

    def draw(shape: tuple[int, ...]) -> None:
        for position in range(len(files)):
            position_generator(0, position, DIFFUSION).standard_normal(shape, dtype=np.float32)

    parts = {
        "a file is read": lambda: [table.read(index) for index in range(len(files))],
        "Pillow alone decodes it": lambda: [PIL.Image.open(io.BytesIO(data)).load() for _, data in files],
        "it is decoded, checked and laid out": lambda: [decode_pixels(*file, (256, 256), 3) for file in files],
        "a batch is made of 16": lambda: [torch.stack(decoded[i : i + 16]) for i in range(0, len(files), 16)],
        "noise for pixels, by position": lambda: draw(shape),
        "noise for pixels, from torch's global generator": lambda: [torch.randn(shape) for _ in files],
        "noise for latents, twice, by position": lambda: draw((2, *LATENT_SHAPE)),
    }
    timers = [Timer("part()", globals={"part": part}, num_threads=1) for part in parts.values()]
    rows = [[timer.timeit(1).median for timer in timers] for _ in range(rounds)]
    medians = [statistics.median(seconds) for seconds in zip(*rows, strict=True)]
    return {name: 1000 * seconds / len(files) for name, seconds in zip(parts, medians, strict=True)}


def other_work(archive: Path, rounds: int) -> dict[str, float]:
    """Images per second of our worker for FFHQ at 64 pixels in EDM's format, and for prepared latents."""
    table = load_image_table(SourceConfig(train_data_dir=str(archive)))
    workers = {"64-pixel PNG, zip": ImageDataset(table, PositionStream(len(table), 0), (64, 64), 3, random_flip=True)}
    for side in (32, 64):
        shape, number = (4, side, side), 256
        moments = np.random.default_rng(0).standard_normal((number, 8, side, side), np.float32)
        columns = {"moments": moments, "mirrored_moments": moments, "bad_image": [None] * number}
        file = archive.with_name(f"latents-{side}.parquet")
        Dataset.from_dict(columns, features=latent_features(shape, True, None)).to_parquet(file)
        rows = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(archive.parent / "cache"))
        metadata = {"latent_shape": shape, "mirrored": True}
        table = LatentTable(rows.with_format("arrow"), str(file), np.arange(number), None, None, metadata=metadata)
        dataset = LatentDataset(table, PositionStream(number, 0), random_flip=True)
        workers[f"prepared latents of {8 * side} pixels"] = dataset
    speeds = {}
    for name, dataset in workers.items():
        timer = Timer("work()", globals={"work": our_worker(dataset, 16)}, num_threads=1)
        timer.timeit(1)  # warm up
        speeds[name] = 16 / statistics.median(timer.timeit(10).median for _ in range(rounds))
    return speeds


# ---------------------------------------------------------------------------------------------------------------------
# Waiting


def time_waiting(num_workers: int, run_dir: str) -> tuple[float, float]:
    """Trains emoji32 for some steps; returns seconds per step, and the fraction spent waiting for a batch."""
    original = train_diffit.build_batches
    asked, given = [], []

    def timed_batches(*arguments) -> Iterator[dict]:
        batches = original(*arguments)
        while True:
            asked.append(time.perf_counter())
            batch = next(batches)
            given.append(time.perf_counter())
            yield batch

    flags = [f"--max_train_steps={TRAINING_STEPS}", f"--dataloader_num_workers={num_workers}", "--report_to=none"]
    flags += [f"--global_batch_size={TRAINING_BATCH_SIZE}", f"--train_batch_size={TRAINING_BATCH_SIZE}"]
    flags += ["--num_validation_images=1", "--validation_inference_steps=1", f"--output_dir={run_dir}"]
    train_diffit.build_batches = timed_batches
    try:
        train_diffit.main(train_diffit.parse_args(["--config", str(ROOT / "configs/train/emoji32.yaml"), *flags]))
    finally:
        train_diffit.build_batches = original
    total = given[-1] - given[0]  # the first batch waits for the workers to start
    return total / (TRAINING_STEPS - 1), (sum(given[1:]) - sum(asked[1:])) / total


# ---------------------------------------------------------------------------------------------------------------------
# Before and after

BEFORE_AND_AFTER = "## One worker, before and after"


def write_pngs(photos: Path, archive: Path, size: int) -> None:
    """Writes photos as PNGs of `size` x `size` pixels into a zip."""
    with zipfile.ZipFile(archive, "w") as file:
        for photo in sorted(photos.iterdir()):
            PIL.Image.open(photo).resize((size, size), PIL.Image.Resampling.BOX).save(buffer := io.BytesIO(), "png")
            file.writestr(f"{photo.stem}.png", buffer.getvalue())


def start_side(code: Path) -> subprocess.Popen:
    """Starts `benchmarks/data_worker.py` with the package in a folder."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/data_worker.py")],
        cwd=code,
        env=os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(side: subprocess.Popen, case: dict) -> list[float]:
    """Images per second and milliseconds per hand-over of a case."""
    side.stdin.write(json.dumps(case) + "\n")
    side.stdin.flush()
    return json.loads(side.stdout.readline())


def before_and_after(commit: str, work_dir: Path, rounds: int) -> list[str]:
    """Lines of the section: a worker of a commit, ours when it decodes, and ours once images are in memory."""
    write_jpegs(work_dir / "256", 256, 256)
    write_pngs(work_dir / "256", work_dir / "64.zip", 64)
    emoji = {"train_data_file": str(ROOT / "data/noto_emoji_32.parquet")}
    zipped, photos = {"train_data_dir": str(work_dir / "64.zip")}, {"train_data_dir": str(work_dir / "256")}
    cases = [  # name, source, pixels, images per batch, shape of latents
        ("emoji PNG, parquet", emoji, 32, 64, None),
        ("PNG, zip", zipped, 64, 64, None),
        ("JPEG, folder", photos, 256, 16, None),
        ("JPEG, folder, noise for latents", photos, 256, 16, LATENT_SHAPE),
    ]
    old = work_dir / "before"
    old.mkdir()
    check_out(commit, old)
    before, after = start_side(old), start_side(ROOT)
    lines = []
    for name, source, size, batch_size, latent_shape in cases:
        case = {"source": source, "size": size, "batch_size": batch_size, "latent_shape": latent_shape}
        sides = [(before, case | {"keep": False}), (after, case | {"keep": False}), (after, case | {"keep": True})]
        measured = [[ask(*side) for side in sides] for _ in range(rounds)]
        old_side, decoding, kept = (
            [statistics.median(values) for values in zip(*side, strict=True)] for side in zip(*measured, strict=True)
        )
        speeds = " | ".join(f"{side[0]:,.0f}" for side in (old_side, decoding, kept))
        times = " | ".join(f"{side[1]:.2f}" for side in (old_side, kept))
        lines.append(f"| {name} | {size} | {batch_size} | {speeds} | {times} |")
    for side in (before, after):
        side.communicate()
    return [
        BEFORE_AND_AFTER,
        "",
        f"`python -m benchmarks.data_path --before {commit}`, median of {rounds} rounds, in each of which the sides "
        f"take turns; a process and a thread each. {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}, numpy "
        f"{np.__version__}. With random crops and flips and, in pixel space, the random numbers of augmentation.",
        "",
        '"First epoch" decodes each image; "later" finds it in memory, where data sets stay that take at most an '
        "eighth of it. A hand-over is the time in which the training process receives a batch that is ready while the "
        "worker makes another one (lower quartile, because the machine is shared).",
        "",
        "| images | pixels | batch | before, images/s | after, first epoch | after, later | hand-over before, ms | "
        "after, ms |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ]


def write_section(lines: list[str]) -> None:
    """Replaces the last section of the results by these lines, and prints them."""
    file = ROOT / "benchmarks/results/data_path.md"
    text = "\n".join(lines) + "\n"
    print(text)
    file.write_text(file.read_text().split(BEFORE_AND_AFTER)[0].rstrip() + "\n\n" + text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds per case (default: 7)")
    parser.add_argument("--before", metavar="COMMIT", help="compare one worker with that of this commit instead")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.before is not None:
        with tempfile.TemporaryDirectory() as work_dir:
            write_section(before_and_after(args.before, Path(work_dir), args.rounds))
        return
    with tempfile.TemporaryDirectory() as work_dir:
        photos, large_photos, archive = (Path(work_dir, name) for name in ("256", "1024x768", "256.zip"))
        num_bytes = write_jpegs(photos, 256, 256)
        num_large_bytes = write_jpegs(large_photos, 1024, 768)
        with zipfile.ZipFile(archive, "w") as file:
            for photo in sorted(photos.iterdir()):
                file.write(photo, photo.name)
        digits, emoji = (str(ROOT / f"data/{name}.parquet") for name in ("digits", "noto_emoji_32"))
        folder, large_folder = {"train_data_dir": str(photos)}, {"train_data_dir": str(large_photos)}
        cases = [  # name, our source, what `datasets` loads for them, pixels, shape of latents, images per batch
            ("digits, parquet", {"train_data_file": digits}, digits, 8, None, 64),
            ("emoji, parquet", {"train_data_file": emoji}, emoji, 32, None, 64),
            ("256-pixel JPEG, folder", folder, photos, 256, None, 16),
            ("256-pixel JPEG, folder", folder, photos, 256, LATENT_SHAPE, 16),
            ("256-pixel JPEG, zip (theirs: folder)", {"train_data_dir": str(archive)}, photos, 256, LATENT_SHAPE, 16),
            ("1024 x 768 JPEG, folder", large_folder, large_photos, 256, LATENT_SHAPE, 16),
        ]
        table = []
        for name, source, theirs, size, latent_shape, batch_size in cases:
            kind, option = ("imagefolder", "data_dir") if isinstance(theirs, Path) else ("parquet", "data_files")
            rows = load_dataset(kind, split="train", cache_dir=f"{work_dir}/cache", **{option: str(theirs)})
            settings = (size, latent_shape, batch_size)
            sides = [our_side(source, *settings), their_side(rows, *settings)]
            (ours, peers), of_workers, of_all = compare(sides, batch_size, args.rounds)
            noise = "x".join(map(str, latent_shape or (3, size, size))) + (", twice" if latent_shape else "")
            table.append(
                f"| {name} | {size} | {noise} | {ours:,.0f} | {peers:,.0f} | {of_workers:.2f} | {of_all:.2f} |"
            )
        write_pngs(photos, Path(work_dir, "64.zip"), 64)
        others = other_work(Path(work_dir, "64.zip"), args.rounds)
        others = [f"| {name} | {speed:,.0f} |" for name, speed in others.items()]
        parts = [f"| {name} | {ms:.2f} |" for name, ms in time_parts(photos, args.rounds).items()]
        waiting = []
        for num_workers in (1, 2):
            step, share = time_waiting(num_workers, f"{work_dir}/run{num_workers}")
            waiting.append(f"| {num_workers} | {step:.2f} | {share:.1%} |")
    lines = [
        "# Data pipeline",
        "",
        f"`python -m benchmarks.data_path`, median of {args.rounds} alternating pairs, one process, one thread. "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, Pillow "
        f"{PIL.__version__} (libjpeg-turbo {PIL.features.version('libjpeg_turbo')}), datasets "
        f"{datasets.__version__}, numpy {np.__version__}. JPEG quality 90, {num_bytes / 1000:.0f} kB at 256 "
        f"pixels and {num_large_bytes / 1000:.0f} kB at 1024 x 768.",
        "",
        '"Theirs" is the data pipeline of `train_unconditional.py`. Our worker generates the noise and leaves scaling '
        "to the device; theirs scales and leaves noise generation to the device. The ratios are our time divided by "
        "theirs, for the workers alone and for all the work of worker and device, where the device is this CPU.",
        "",
        "| images | pixels | noise | ours, images/s per worker | theirs | ratio, workers | ratio, all work |",
        "|---|---|---|---|---|---|---|",
        *table,
        "",
        "Other formats that our workers read, with noise and random flips, 16 images per batch:",
        "",
        "| images | images/s per worker |",
        "|---|---|",
        *others,
        "",
        "Cost of a 256-pixel JPEG in our worker:",
        "",
        "| part | ms per image |",
        "|---|---|",
        *parts,
        "",
        f"Training emoji32 with {TRAINING_BATCH_SIZE} images per step and {torch.get_num_threads()} threads:",
        "",
        "| workers | step, s | fraction spent waiting for the batch |",
        "|---|---|---|",
        *waiting,
    ]
    file = ROOT / "benchmarks/results/data_path.md"
    _, *earlier = file.read_text().partition(BEFORE_AND_AFTER)
    text = "\n".join(lines) + "\n" + ("\n" + "".join(earlier) if any(earlier) else "")
    print(text)
    file.write_text(text)


if __name__ == "__main__":
    main()
