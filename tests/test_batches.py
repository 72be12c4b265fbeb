# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches from the worker to the device.

Every number in a batch is compared bitwise with `expected_batch`, which says in a few lines what a position holds.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffit.batches import BatchPreparer, load_batches
from diffit.decode import decode_pixels
from diffit.formulations import DDPM, EDM
from diffit.packing import ALIGNMENT, Batch
from diffit.stream import AUGMENTATION, DIFFUSION, ImageDataset, PositionGenerator, position_generator
from helpers import batch_at, encode, encode_npy, make_dataset, noise_image, write_files

NUM_IMAGES = 10


def expected_batch(dataset: ImageDataset, positions: range) -> dict[str, torch.Tensor]:
    """What a batch holds, written out: one image after the other, each decoded from its file."""
    table, seed, rows = dataset.table, dataset.stream.seed, []
    for position in positions:
        index = dataset.stream.index(position)
        rng = position_generator(seed, position, AUGMENTATION)
        flip, top, left = rng.random(3)
        numbers = np.concatenate([rng.random(8, dtype=np.float32), rng.standard_normal(4, dtype=np.float32)])
        crop = (0.5, 0.5) if dataset.center_crop else (top, left)
        flip = dataset.random_flip and flip < 0.5
        pixels = decode_pixels(*table.read(index), dataset.resolution, dataset.num_channels, crop, flip=flip)
        rng = position_generator(seed, position, DIFFUSION)
        row = {"position": torch.tensor(position), "pixel_values": pixels}
        row |= {name: torch.tensor(rng.random(dtype=np.float32)) for name in ("time_uniform", "dropout_uniform")}
        for name in ("noise",) if dataset.latent_shape is None else ("noise", "posterior_noise"):
            shape = dataset.latent_shape or tuple(pixels.shape)
            row[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if dataset.augment:
            row["augmentation"] = torch.from_numpy(numbers)
        if table.class_names is not None:
            row["class_labels"] = torch.tensor(table.label(index))
        rows.append(row)
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    if len({pixels.dtype for pixels in batch["pixel_values"]}) > 1:
        batch["pixel_values"] = [pixels.float() for pixels in batch["pixel_values"]]
    return {name: torch.stack(values) for name, values in batch.items()}


def assert_same(batch: Batch, expected: dict[str, torch.Tensor]) -> None:
    tensors = batch.tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 color images in two classes: half of 12 x 12 pixels, half of 6 x 9."""
    sizes = ((12, 12), (6, 9))
    files = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i, *sizes[i % 2], 3)) for i in range(NUM_IMAGES)}
    return write_files(tmp_path / "images", files)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers in a batch


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"random_flip": True, "augment": True}, {"center_crop": True, "random_flip": True}]
    + [{"latent_shape": (2, 3, 3), "random_flip": True, "num_channels": 1}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_batches_hold_what_each_position_says(folder, options, num_workers):
    """Three epochs, from the middle of one as after a resume."""
    dataset = make_dataset(folder, seed=3, **options)
    positions = [range(first, first + 4) for first in range(6, 36, 4)]
    pairs = [[(position, dataset.stream.index(position)) for position in batch] for batch in positions]
    for batch, expected in zip(load_batches(dataset, pairs, num_workers), positions, strict=True):
        assert_same(batch, expected_batch(dataset, expected))


def test_images_of_8_and_16_bits_and_arrays_are_as_decoded(tmp_path):
    files = {f"{i}.png": encode(noise_image(i, 6, 6).astype(np.uint16) * 256 + 7) for i in range(3)}
    files |= {f"{i}.png": encode(noise_image(i, 6, 6)) for i in range(3, 6)}
    dataset = make_dataset(write_files(tmp_path / "f", files | {"a.npy": encode_npy(noise_image(9, 6, 6))}))
    for first in range(0, 21, 3):
        assert_same(batch_at(dataset, range(first, first + 3)), expected_batch(dataset, range(first, first + 3)))


def test_moved_generator_equals_a_new_one():
    moved = PositionGenerator(seed=2**63 - 1)
    for position, stream in itertools.product((0, 7, 2**40, 3), range(3)):
        rng, new = moved.at(position, stream), position_generator(2**63 - 1, position, stream)
        for draw in ("random", "standard_normal"):  # an odd number of float32 leaves half a word behind
            arguments = {"size": 3, "dtype": np.float32}
            assert getattr(rng, draw)(**arguments).tolist() == getattr(new, draw)(**arguments).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# One block of memory


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batch_is_one_aligned_tensor_shared_by_its_worker(folder, num_workers):
    dataset = make_dataset(folder, augment=True)
    (batch,) = load_batches(dataset, [[(0, 0), (1, 1), (2, 2)]], num_workers)
    assert batch.data.is_shared() == (num_workers == 1)
    start = batch.data.data_ptr()
    offsets = {name: tensor.data_ptr() - start for name, tensor in batch.tensors().items()}
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values()) and len(set(offsets.values())) == len(offsets)
    assert max(offsets.values()) < batch.data.numel()


class CopyCounter(TorchDispatchMode):
    """Counts copies from the host to the device "meta", and how many of them the host waits for."""

    count, waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            self.count += args[0].device.type == "cpu"
            self.waits += not kwargs.get("non_blocking", False)
        return function(*args, **kwargs)


def test_batch_travels_to_the_device_in_one_copy(folder):
    batch = batch_at(make_dataset(folder, augment=True), range(4))
    prepare = BatchPreparer(EDM(), torch.device("meta"), None, 2, 0.5, augmentation_probability=0.1)
    with CopyCounter() as copies:
        noisy = prepare(batch)
    tensors = [*noisy.network_inputs, noisy.clean_images, noisy.noise, noisy.levels, noisy.level_bins]
    assert {tensor.device.type for tensor in [*tensors, *noisy.conditions.values()]} == {"meta"}
    assert (copies.count, copies.waits) == (1, 0)


@pytest.mark.parametrize("formulation", [DDPM(), EDM()])
def test_prepared_batch_equals_its_definition(folder, formulation):
    dataset = make_dataset(folder, random_flip=True)
    expected = expected_batch(dataset, range(8, 14))
    noisy = BatchPreparer(formulation, torch.device("cpu"), None, 2, label_dropout=0.5)(
        batch_at(dataset, range(8, 14))
    )
    clean = expected["pixel_values"].float() / 127.5 - 1
    levels = formulation.noise_levels(expected["time_uniform"])
    labels = torch.where(expected["dropout_uniform"] < 0.5, 2, expected["class_labels"])
    assert noisy.first_position == 8 and {2} < set(labels.tolist())
    pairs = [(noisy.clean_images, clean), (noisy.noise, expected["noise"]), (noisy.levels, levels)]
    pairs += [(noisy.level_bins, (4 * expected["time_uniform"]).long()), (noisy.conditions["class_labels"], labels)]
    pairs += zip(noisy.network_inputs, formulation.network_inputs(clean, expected["noise"], levels), strict=True)
    for actual, value in pairs:
        assert actual.dtype == value.dtype and torch.equal(actual, value)


def test_packed_tensors_keep_their_values():
    tensors = {"a": torch.arange(3), "b": torch.rand(3, 5), "c": torch.randint(0, 255, (3, 7), dtype=torch.uint8)}
    assert_same(Batch.pack(tensors), tensors)
    filled = Batch.pack(tensors).fill(levels=torch.rand(3).double(), labels=torch.tensor([7, 8, 9]))
    assert filled["levels"].dtype == torch.float64 and filled["labels"].tolist() == [7, 8, 9]
    assert "level_bins" not in filled and torch.equal(filled["b"], tensors["b"])
