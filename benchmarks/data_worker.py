# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Times one data-loader worker of the code that PYTHONPATH names, which may be an earlier commit.

Started by `benchmarks.data_path` for each side of its comparison. Reads a case from each line of standard input, and
writes the measured numbers: images per second of one worker, then milliseconds to receive a batch that is ready.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from diffit import stream
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream, StreamBatchSampler

HAND_OVERS = 14


def build(source: dict[str, str], size: int, batch_size: int, latent_shape: list[int] | None, keep: bool) -> tuple:
    """A data set of color images with random crop, flip and augmentation, and its batches of positions.

    Args:
        source: arguments of `SourceConfig`.
        size: height and width in pixels.
        batch_size: images per batch.
        latent_shape: of the noise, or None for that of the pixels.
        keep: whether images stay decoded.
    """
    table = load_image_table(SourceConfig(**source))
    positions = PositionStream(len(table), seed=0)
    latent_shape = None if latent_shape is None else tuple(latent_shape)
    options = {"random_flip": True, "latent_shape": latent_shape, "augment": latent_shape is None}
    dataset = ImageDataset(table, positions, (size, size), 3, **options)
    if keep:
        from diffit.decoded_images import DecodedImages

        dataset.decoded = DecodedImages(len(table), (3, size, size))
        for index in range(len(table)):
            dataset[index, index]
    return dataset, StreamBatchSampler(positions, batch_size)


def in_one_piece(batch):
    return batch


def speed(dataset: ImageDataset, sampler: StreamBatchSampler, seconds: float = 0.7) -> float:
    """Images per second of one worker, without handing them over."""
    positions = iter(sampler)
    if hasattr(stream, "collate"):  # until a batch was packed into one tensor
        work = lambda: stream.collate([dataset[pair] for pair in next(positions)])  # noqa: E731
    else:
        work = lambda: dataset.__getitems__(next(positions))  # noqa: E731
    work()
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        batches += 1
    return batches * sampler.batch_size / (time.perf_counter() - start)


def hand_over(dataset: ImageDataset, sampler: StreamBatchSampler, batch_seconds: float) -> float:
    """Milliseconds until the training process has a batch that is ready, while the worker makes another one.

    The lower quartile: others may use the machine, too, and then the worker does not run when it is asked.
    """
    collate = getattr(stream, "collate", in_one_piece)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=1, collate_fn=collate, prefetch_factor=3))
    times = []
    for _ in range(HAND_OVERS):
        time.sleep(6 * batch_seconds + 0.05)  # three batches become ready
        first = next(batches)  # now the worker starts on another one
        start = time.perf_counter()
        second = next(batches)
        times.append(time.perf_counter() - start)
        del first, second  # freeing their memory is not part of it
    return 1000 * statistics.quantiles(times[2:], n=4)[0]


def measure(cases: Iterator[dict[str, Any]]) -> Iterator[list[float]]:
    """Images per second and milliseconds of each case."""
    built = {}
    for case in cases:
        key = json.dumps(case)
        if key not in built:
            built[key] = build(**case)
        images = speed(*built[key])
        yield [images, hand_over(*built[key], case["batch_size"] / images)]


if __name__ == "__main__":
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    for numbers in measure(json.loads(line) for line in itertools.takewhile(str.strip, sys.stdin)):
        print(json.dumps(numbers), flush=True)
