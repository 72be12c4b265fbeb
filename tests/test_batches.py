# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Micro-batches from the worker to the device, and the images that stay decoded.

Every number in a batch is compared bitwise with `expected_batch`, which says in a few lines what a position holds.
"""

import itertools
import logging
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode

from diffit import decoded_images
from diffit.batches import BatchPreparer, load_batches
from diffit.decode import decode_pixels
from diffit.decoded_images import DecodedImages, available_memory, share_decoded_images
from diffit.formulations import DDPM, EDM
from diffit.packing import ALIGNMENT, Batch
from diffit.processes import MAX_WORKERS, count_workers
from diffit.stream import AUGMENTATION, DIFFUSION, ImageDataset, PositionGenerator, position_generator
from helpers import batch_at, encode, encode_npy, losses, make_dataset, mentions, noise_image, train, write_files
from warm_start import run_ranks

NUM_IMAGES, SHAPE = 10, (3, 6, 6)


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


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """10 color images of 12 x 12 pixels in two classes."""
    files = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i, 12, 12, 3)) for i in range(NUM_IMAGES)}
    return write_files(tmp_path / "squares", files)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers in a batch


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"random_flip": True, "augment": True}, {"center_crop": True, "random_flip": True}]
    + [{"latent_shape": (2, 3, 3), "random_flip": True, "num_channels": 1}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_batches_hold_what_each_position_says(folder, options, num_workers, cached):
    """Three epochs, so that cached images are used, from the middle of one as after a resume."""
    dataset = make_dataset(folder, seed=3, **options)
    if cached:
        dataset.decoded = DecodedImages(NUM_IMAGES, (dataset.num_channels, 6, 6))
    positions = [range(first, first + 4) for first in range(6, 36, 4)]
    pairs = [[(position, dataset.stream.index(position)) for position in batch] for batch in positions]
    for batch, expected in zip(load_batches(dataset, pairs, num_workers), positions, strict=True):
        assert_same(batch, expected_batch(dataset, expected))


@pytest.mark.parametrize("cached", [False, True])
def test_images_of_8_and_16_bits_and_arrays_are_as_decoded(tmp_path, cached):
    files = {f"{i}.png": encode(noise_image(i, 6, 6).astype(np.uint16) * 256 + 7) for i in range(3)}
    files |= {f"{i}.png": encode(noise_image(i, 6, 6)) for i in range(3, 6)}
    dataset = make_dataset(write_files(tmp_path / "f", files | {"a.npy": encode_npy(noise_image(9, 6, 6))}))
    if cached:
        dataset.decoded = DecodedImages(7, (1, 6, 6))
    for first in range(0, 21, 3):
        assert_same(batch_at(dataset, range(first, first + 3)), expected_batch(dataset, range(first, first + 3)))


def test_moved_generator_equals_a_new_one():
    moved = PositionGenerator(seed=2**64 - 1)
    for position, stream in itertools.product((0, 7, 2**40, 2**64 - 1, 3), range(3)):
        rng, new = moved.at(position, stream), position_generator(2**64 - 1, position, stream)
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


# ---------------------------------------------------------------------------------------------------------------------
# Images that stay decoded


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_are_read_in_the_first_epoch_only(squares, num_workers):
    """The workers of the first epoch have ended when others find the images; the files are gone."""
    dataset = make_dataset(squares, random_flip=True, num_channels=3)
    dataset.decoded = DecodedImages(NUM_IMAGES, SHAPE)
    expected = [expected_batch(dataset, range(first, first + 5)) for first in range(0, 30, 5)]
    pairs = [[(p, dataset.stream.index(p)) for p in range(first, first + 5)] for first in range(0, 30, 5)]
    batches = list(load_batches(dataset, pairs[:2], num_workers))
    shutil.rmtree(squares)
    batches += load_batches(dataset, pairs[2:], num_workers)
    for batch, values in zip(batches, expected, strict=True):
        assert_same(batch, values)


def test_only_what_does_not_change_is_kept(folder, tmp_path):
    """A random crop of a wide image differs each time; of a square one there is a single crop."""
    kept = {}
    for center_crop in (False, True):
        dataset = make_dataset(folder, center_crop=center_crop)
        dataset.decoded = DecodedImages(NUM_IMAGES, SHAPE)
        batch_at(dataset, range(NUM_IMAGES))
        kept[center_crop] = {i for i in range(NUM_IMAGES) if dataset.decoded.get(i) is not None}
    squares = {i for i in range(NUM_IMAGES) if int(Path(dataset.table.name(i)).stem) % 2 == 0}
    assert kept == {False: squares, True: set(range(NUM_IMAGES))}

    deep = make_dataset(write_files(tmp_path / "16", {"a.png": encode(noise_image(0, 6, 6).astype(np.uint16) * 257)}))
    deep.decoded = DecodedImages(1, (1, 6, 6))
    batch_at(deep, range(2))
    assert deep.decoded.get(0) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_alike(squares, num_workers):
    write_files(squares, {"a/4.png": b"", "b/7.png": "no image"})
    batches = {}
    for cached in (False, True):
        dataset = make_dataset(squares, num_channels=3, on_bad_image="skip")
        dataset.decoded = DecodedImages(NUM_IMAGES, SHAPE) if cached else None
        pairs = [[(p, dataset.stream.index(p)) for p in range(first, first + 5)] for first in range(0, 30, 5)]
        batches[cached] = list(load_batches(dataset, pairs, num_workers))
    for actual, expected in zip(batches[True], batches[False], strict=True):
        assert_same(actual, expected.tensors())
        assert actual.bad_images == expected.bad_images
    assert sum(len(batch.bad_images) for batch in batches[True]) >= 6  # twice in each of three epochs


def test_images_of_another_process_are_opened_and_of_another_machine_are_not():
    images = DecodedImages(NUM_IMAGES, SHAPE)
    pixels = noise_image(0, 6, 6, 3).transpose(2, 0, 1)
    process = multiprocessing.get_context("spawn").Process(target=images.put, args=(7, pixels))
    process.start()
    process.join()
    assert np.array_equal(images.get(7), pixels) and images.get(6) is None
    path, token, *sizes = images.address
    with pytest.raises(OSError):
        DecodedImages.open((path, bytes(len(token)), *sizes))
    with pytest.raises(OSError):
        DecodedImages.open((f"/proc/{os.getpid()}/fd/9999", token, *sizes))


def test_training_processes_of_a_machine_share_images(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        "import numpy as np\n"
        "from diffit.decoded_images import share_decoded_images\n"
        "from diffit.processes import join_processes\n"
        "state = join_processes()\n"
        "images = share_decoded_images(state, 5, (3, 2, 2))\n"
        "if state.is_main_process:\n"
        "    images.put(3, np.full((3, 2, 2), 77, np.uint8))\n"
        "state.wait_for_everyone()\n"
        "print('rank', state.process_index, 'reads', images.get(3).sum(), images.get(2), flush=True)\n"
        "state.wait_for_everyone()\n"
        "state.destroy_process_group()\n"
    )
    codes, output = run_ranks([str(script)], [str(script)])
    assert codes == [0, 0], output
    assert {f"rank {rank} reads {12 * 77} None" for rank in (0, 1)} <= set(output.splitlines())


def test_images_that_would_take_much_memory_are_not_kept(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    state = PartialState(cpu=True)
    monkeypatch.setattr(decoded_images, "available_memory", lambda: 8 * 10_800_000)
    assert share_decoded_images(state, 100_000, SHAPE) is not None  # 10.8 MB
    assert share_decoded_images(state, 100_001, SHAPE) is None
    assert mentions("0.011 GB").search(caplog.messages[-1])


@pytest.mark.parametrize("missing", [True, False])
def test_images_are_decoded_where_memory_cannot_be_shared(monkeypatch, caplog, missing):
    def fail(name):
        raise PermissionError("not permitted here")

    caplog.set_level(logging.INFO)
    state = PartialState(cpu=True)
    monkeypatch.delattr(os, "memfd_create") if missing else monkeypatch.setattr(os, "memfd_create", fail)
    assert share_decoded_images(state, 10, SHAPE) is None
    assert mentions("operating system" if missing else "not permitted here").search(caplog.messages[-1])


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b\n", {}, 1024000),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "512000"}, 512000),
        ("0::/\n", {"memory.max": "2048000"}, 1024000),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "256000"}, 256000),
        ("4:cpu:/job\n4:memory:/gone\n", {"memory/memory.limit_in_bytes": "128000"}, 128000),
    ],
)
def test_available_memory_obeys_control_groups(tmp_path, groups, limits, expected):
    files = {"proc/meminfo": "MemTotal: 5000 kB\nMemAvailable:   1000 kB\n", "proc/self/cgroup": groups}
    write_files(tmp_path, files | {f"sys/fs/cgroup/{name}": f"{limit}\n" for name, limit in limits.items()})
    assert available_memory(tmp_path) == expected
    assert available_memory(tmp_path / "none") == 0


@pytest.mark.parametrize("flags", [[], ["--augmentation_probability=0.2", "--formulation=edm"]])
def test_training_is_the_same_with_and_without_decoded_images_and_after_a_resume(
    train_args, tmp_path, monkeypatch, caplog, flags
):
    """9 steps of 4 images go through 24 images once and a half; the resume starts in the middle of an epoch."""
    caplog.set_level(logging.INFO)
    arguments = [*train_args, *flags, "--random_flip", "--num_validation_images=1", "--checkpointing_steps=4"]
    train([*arguments, "--max_train_steps=4", f"--output_dir={tmp_path / 'resumed'}"])
    again = ["--resume_from_checkpoint=latest", "--dataloader_num_workers=2"]
    train([*arguments, "--max_train_steps=9", f"--output_dir={tmp_path / 'resumed'}", *again])
    assert mentions("decoded images are kept", "24 images").search(caplog.text)
    caplog.clear()
    monkeypatch.setattr(decoded_images, "MEMORY_SHARE", 0)
    train([*arguments, "--max_train_steps=9", f"--output_dir={tmp_path / 'decoded'}"])
    assert mentions("decoded in each epoch").search(caplog.text)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "decoded")


# ---------------------------------------------------------------------------------------------------------------------
# The number of workers


@dataclass
class Case:
    """Cores of a process, processes of the machine, and the expected number of workers."""

    cores: int
    processes: int | None
    expected: int


@pytest.mark.parametrize(
    "case", [Case(2, None, 2), Case(64, None, MAX_WORKERS), Case(64, 16, 4), Case(4, 8, 0), Case(1, None, 1)]
)
def test_workers_are_the_cores_of_a_process_unless_given(monkeypatch, case):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(case.cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if case.processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(case.processes))
    assert count_workers(None) == case.expected
    assert count_workers(0) == 0 and count_workers(12) == 12
