# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""`diffit_data.py`: the stream of positions, every source of images, decoding, and the tensors for training.

The images are constant grey or simple patterns, written by Pillow into `tmp_path`, so that what is read can be compared
with what was written. Grey level g of 0..255 is g / 127.5 - 1 in [-1, 1]; where no tolerance stands, equality is exact.
"""

import io
import itertools
import json
import struct
import warnings
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from diffit_data import (
    AUGMENTATION,
    DIFFUSION,
    PERMUTATION,
    BadImageError,
    ImageDataset,
    ImageTable,
    PositionStream,
    StreamBatchSampler,
    collate,
    decode_image,
    detect_num_channels,
    load_image_table,
    position_generator,
    split_table,
)

DATA = Path(__file__).parents[1] / "data"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
HALF_STEP = 0.5 / 127.5  # half a grey level in [-1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def encode(image: PIL.Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def grey(level: int, size: tuple[int, int] = (4, 4)) -> bytes:
    return encode(PIL.Image.new("L", size, level))


def noise_image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_files(root: Path, files: dict[str, bytes | str]) -> Path:
    """Writes files into a folder, or into a zip if `root` ends in .zip."""
    if root.suffix == ".zip":
        with zipfile.ZipFile(root, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return root
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def write_parquet(path: Path, columns: dict[str, list], **features) -> Path:
    """Writes a parquet file; bytes become HuggingFace images, other columns have the type in `features`."""
    columns = {
        name: [{"bytes": value, "path": None} if isinstance(value, bytes) else value for value in values]
        for name, values in columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def load(source: Path, **options) -> ImageTable:
    """The table of a folder, a zip or a parquet file."""
    flag = "train_data_file" if source.suffix == ".parquet" else "train_data_dir"
    return load_image_table(**{flag: str(source)}, cache_dir=str(source.parent / "cache"), **options)


def contents(table: ImageTable) -> list[tuple[int, str | None]]:
    """(grey level of the first pixel, class name) of each image of a table."""
    rows = []
    for index in range(len(table)):
        pixels = decode_image(*table.read(index), (4, 4), 1)
        label = None if table.class_names is None else table.class_names[table.label(index)]
        rows.append((round((pixels[0, 0, 0].item() + 1) * 127.5), label))
    return rows


def decode(data: bytes, resolution: tuple[int, int], num_channels: int = 3, **options) -> torch.Tensor:
    return decode_image("some.file", data, resolution, num_channels, **options)


def levels(pixels: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> grey levels (H, W, C) in [0, 255]."""
    return ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()


def assert_colour(data: bytes, colour: tuple[int, ...], tolerance: float = HALF_STEP) -> None:
    """All pixels of a 4x4 image decode to `colour`, one level per channel."""
    expected = (torch.tensor(colour) / 127.5 - 1)[:, None, None].expand(-1, 4, 4)
    torch.testing.assert_close(decode(data, (4, 4), len(colour)), expected, atol=tolerance, rtol=0)


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """10 noise images of 6 x 9 pixels, RGB, in two classes."""
    files = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i, 6, 9, 3)) for i in range(10)}
    return write_files(tmp_path / "images", files)


def make_dataset(source: Path, seed: int = 0, resolution: tuple[int, int] = (6, 6), **options) -> ImageDataset:
    table = load(source)
    return ImageDataset(table, PositionStream(len(table), seed), resolution, **options)


def item_at(dataset: ImageDataset, position: int) -> dict:
    return dataset[position, dataset.stream.index(position)]


def assert_same(actual: dict, expected: dict) -> None:
    """Equal keys and bitwise equal values."""
    assert actual.keys() == expected.keys()
    for key in actual:
        if isinstance(actual[key], torch.Tensor):
            assert torch.equal(actual[key], expected[key]), key
        else:
            assert actual[key] == expected[key], key


# ---------------------------------------------------------------------------------------------------------------------
# The stream of positions


def test_index_is_permutation_in_each_epoch():
    stream = PositionStream(13, seed=5)
    for epoch in range(4):
        assert sorted(stream.index(epoch * 13 + i) for i in range(13)) == list(range(13))


def test_index_equals_permutation_of_generator():
    stream = PositionStream(13, seed=5)
    for epoch in (2, 0, 1):
        expected = position_generator(5, epoch, PERMUTATION).permutation(13)
        assert [stream.index(epoch * 13 + i) for i in range(13)] == expected.tolist()


def test_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(PositionStream(13, seed).index(epoch * 13 + i) for i in range(13))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_position_generator_numbers_are_pinned():
    """Another generator would change every run: these numbers must never move."""
    assert position_generator(7, 3, PERMUTATION).permutation(8).tolist() == [4, 3, 5, 6, 0, 7, 1, 2]
    uniform = position_generator(0, 0, AUGMENTATION).random(3)
    np.testing.assert_allclose(uniform, [0.34218278, 0.57651445, 0.08665198], atol=1e-8, rtol=0)
    normal = position_generator(0, 5, DIFFUSION).standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(normal, [1.4105598, -0.23819202, 0.37775943], atol=1e-6, rtol=0)


def test_position_generator_streams_are_independent():
    keys = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**64 - 1)]
    draws = [position_generator(*key, stream).random(2000) for key in keys for stream in range(3)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.1  # standard deviation of each is 0.022


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (4, 2), (4, 1)])
def test_optimizer_step_covers_same_positions_on_any_topology(num_processes, batch_size):
    stream = PositionStream(5, seed=1)
    samplers = [iter(StreamBatchSampler(stream, batch_size, 16, num_processes, r)) for r in range(num_processes)]
    for step in range(3):
        micro_batches = range(8 // (num_processes * batch_size))
        seen = [pair for _ in micro_batches for sampler in samplers for pair in next(sampler)]
        assert seen == [(p, stream.index(p)) for p in range(16 + 8 * step, 24 + 8 * step)]


def test_start_position_resumes_exactly():
    stream = PositionStream(5, seed=1)
    whole = list(itertools.islice(StreamBatchSampler(stream, 2, 0, 2, 1), 6))
    resumed = list(itertools.islice(StreamBatchSampler(stream, 2, 12, 2, 1), 3))
    assert resumed == whole[3:]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_batches_do_not_depend_on_workers(class_folder, on_bad_image):
    if on_bad_image == "skip":
        write_files(class_folder, {"a/4.png": b"", "b/7.png": b"no image"})
    dataset = make_dataset(class_folder, random_flip=True, on_bad_image=on_bad_image)
    batches = []
    for num_workers in (0, 2):
        sampler = StreamBatchSampler(PositionStream(10, 0), batch_size=4, start_position=3)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
        batches.append(list(itertools.islice(loader, 4)))
    assert any(batch["bad_images"] for batch in batches[0]) == (on_bad_image == "skip")
    for actual, expected in zip(*batches, strict=True):
        assert_same(actual, expected)


def test_items_do_not_depend_on_order_of_asking(class_folder):
    forward, backward = (make_dataset(class_folder, seed=3, random_flip=True) for _ in range(2))
    expected = {position: item_at(forward, position) for position in range(15)}
    for position in reversed(range(15)):
        assert_same(item_at(backward, position), expected[position])


def test_random_numbers_depend_on_seed_and_position(class_folder):
    drawn = [
        item_at(make_dataset(class_folder, seed), position)["noise"].sum().item()
        for seed in (0, 1)
        for position in (0, 10, 20)
    ]
    assert len(set(drawn)) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from


def test_flat_folder_has_no_labels(tmp_path):
    table = load(write_files(tmp_path / "f", {"b.png": grey(2), "a.PNG": grey(1), "notes.txt": "x"}))
    assert contents(table) == [(1, None), (2, None)]


def test_class_folders_give_labels(tmp_path):
    table = load(write_files(tmp_path / "f", {"dog/x/2.png": grey(2), "cat/1.png": grey(1), "dog/3.png": grey(3)}))
    assert table.class_names == ("cat", "dog")
    assert sorted(contents(table)) == [(1, "cat"), (2, "dog"), (3, "dog")]


def test_folders_named_like_splits_are_classes(tmp_path):
    table = load(write_files(tmp_path / "f", {"train/1.png": grey(1), "test/2.png": grey(2)}))
    assert sorted(contents(table)) == [(1, "train"), (2, "test")]


def test_images_at_root_and_in_folders_have_no_labels(tmp_path):
    table = load(write_files(tmp_path / "f", {"0.png": grey(0), "a/1.png": grey(1), "b/2.png": grey(2)}))
    assert sorted(contents(table)) == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_dataset_json_gives_labels(tmp_path, container):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    labels = json.dumps({"labels": [[name, label] for name, label in zip(names, [7, 0, 2, 7], strict=True)]})
    files = {name: grey(10 * i) for i, name in enumerate(names)} | {"dataset.json": labels}
    table = load(write_files(tmp_path / container, files))
    assert contents(table) == [(0, "7"), (10, "0"), (20, "2"), (30, "7")]
    assert [table.label(i) for i in range(4)] == [7, 0, 2, 7]


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_dataset_json_with_null_labels_has_no_labels(tmp_path, container):
    files = {"00000/a.png": grey(1), "00001/b.png": grey(2), "dataset.json": '{"labels": null}'}
    assert contents(load(write_files(tmp_path / container, files))) == [(1, None), (2, None)]


def test_zip_of_class_folders_gives_labels(tmp_path):
    table = load(write_files(tmp_path / "z.zip", {"b/2.png": grey(2), "a/1.png": grey(1), "a/3.png": grey(3)}))
    assert contents(table) == [(1, "a"), (3, "a"), (2, "b")]


@pytest.mark.parametrize(("labels", "names"), [([3, 1], ["3", "1"]), (["zebra", "ant"], ["zebra", "ant"])])
def test_metadata_jsonl_gives_labels(tmp_path, labels, names):
    lines = [json.dumps({"file_name": f"x/{i}.png", "label": label}) for i, label in enumerate(labels)]
    files = {"x/0.png": grey(0), "x/1.png": grey(1), "metadata.jsonl": "\n".join(lines)}
    assert contents(load(write_files(tmp_path / "f", files))) == list(enumerate(names))


def test_metadata_jsonl_without_labels_has_no_labels(tmp_path):
    files = {"0.png": grey(0), "metadata.jsonl": '{"file_name": "0.png", "text": "a square"}\n'}
    assert contents(load(write_files(tmp_path / "f", files))) == [(0, None)]


def test_metadata_jsonl_label_column_is_used(tmp_path):
    files = {"0.png": grey(0), "metadata.jsonl": '{"file_name": "0.png", "label": 0, "kind": "square"}\n'}
    assert contents(load(write_files(tmp_path / "f", files), label_column="kind")) == [(0, "square")]


IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize("folder", ["f", "set [1]"])  # brackets are a pattern for `datasets`
def test_folder_of_parquet_files_gives_all_rows(tmp_path, folder):
    for part, label in enumerate([1, 0]):
        columns = {"image": [grey(part)], "label": [label]}
        write_parquet(tmp_path / folder / f"part-{part}.parquet", columns, image=IMAGE, label=CLASSES)
    assert contents(load(tmp_path / folder)) == [(0, "dog"), (1, "cat")]


def test_parquet_file_gives_images_and_labels(tmp_path):
    columns = {"image": [grey(5), grey(6)], "label": [1, 0], "text": ["x", "y"]}
    path = write_parquet(tmp_path / "a.parquet", columns, image=IMAGE, label=CLASSES, text=datasets.Value("string"))
    table = load(path)
    assert table.class_names == ("cat", "dog")
    assert contents(table) == [(5, "dog"), (6, "cat")]


@pytest.mark.parametrize(("split", "expected"), [("train", [(1, "dog")]), ("test", [(2, "cat")])])
def test_dataset_name_reads_local_parquet_folder(tmp_path, split, expected):
    for name, level, label in (("train", 1, 1), ("test", 2, 0)):
        columns = {"image": [grey(level)], "label": [label]}
        write_parquet(tmp_path / "hub" / f"{name}-0.parquet", columns, image=IMAGE, label=CLASSES)
    table = load_image_table(dataset_name=str(tmp_path / "hub"), dataset_split=split, cache_dir=str(tmp_path / "c"))
    assert contents(table) == expected


def test_dataset_name_reads_local_image_folder(tmp_path):
    write_files(tmp_path / "f", {"train/cat/1.png": grey(1), "train/dog/2.png": grey(2)})
    table = load_image_table(dataset_name=str(tmp_path / "f"), cache_dir=str(tmp_path / "cache"))
    assert sorted(contents(table)) == [(1, "cat"), (2, "dog")]


def test_columns_are_found_by_feature_type(tmp_path):
    features = {"id": datasets.Value("int64"), "img": IMAGE, "animal": CLASSES}
    path = write_parquet(tmp_path / "a.parquet", {"id": [9], "img": [grey(3)], "animal": [1]}, **features)
    assert contents(load(path)) == [(3, "dog")]


def test_two_label_columns_are_ambiguous(tmp_path):
    features = {"img": IMAGE, "fine": CLASSES, "coarse": CLASSES}
    path = write_parquet(tmp_path / "a.parquet", {"img": [grey(3)], "fine": [1], "coarse": [0]}, **features)
    with pytest.raises(ValueError, match=r"--label_column.*fine.*coarse"):
        load(path)
    assert contents(load(path, label_column="coarse")) == [(3, "cat")]


@pytest.mark.parametrize(
    ("labels", "kind", "numbers"),
    [([5, 0, 2], "int64", [5, 0, 2]), (["b", "c", "a"], "string", [1, 2, 0]), (["7", "9", "8"], "string", [0, 2, 1])],
)
def test_plain_label_columns_are_encoded(tmp_path, labels, kind, numbers):
    features = {"image": IMAGE, "kind": datasets.Value(kind)}
    path = write_parquet(tmp_path / "a.parquet", {"image": [grey(i) for i in range(3)], "kind": labels}, **features)
    table = load(path, label_column="kind")
    assert contents(table) == [(i, str(label)) for i, label in enumerate(labels)]
    assert [table.label(i) for i in range(3)] == numbers


def test_digits_equal_those_of_scikit_learn():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    table = load_image_table(train_data_file=str(DATA / "digits.parquet"))
    assert len(table) == 1797 and table.class_names == tuple("0123456789")
    assert table.rows["label"][:] == digits.target.tolist()
    expected = (digits.images * 255 / 16).round()
    for index in range(0, 1797, 7):
        pixels = levels(decode_image(*table.read(index), (8, 8), 1))[..., 0]
        np.testing.assert_allclose(pixels, expected[index], atol=1e-4)


def test_emoji_are_1906_colour_images_in_9_classes():
    table = load_image_table(train_data_file=str(DATA / "noto_emoji_32.parquet"))
    assert len(table) == 1906 and len(table.class_names) == 9
    assert set(table.rows["label"][:]) == set(range(9))
    assert detect_num_channels(table) == 3
    for index in range(0, 1906, 50):
        with PIL.Image.open(io.BytesIO(table.read(index)[1])) as image:
            assert image.size == (32, 32) and image.mode in ("RGB", "RGBA", "P")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a source


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "--dataset_name, --train_data_dir, --train_data_file.*none"),
        ({"train_data_dir": "x", "train_data_file": "y"}, "--train_data_dir and --train_data_file"),
        ({"train_data_dir": "/no/such/folder"}, "--train_data_dir.*/no/such/folder"),
        ({"train_data_file": "/no/such.parquet"}, "--train_data_file.*/no/such.parquet"),
    ],
)
def test_wrong_source_is_named(sources, message):
    with pytest.raises(ValueError, match=message):
        load_image_table(**sources)


LISTED = '{"labels": [["a.png", 0], ["%s.png", 1]]}'


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "x"}, "--train_data_dir: no images in .*{root}"),
        ({"a.png": b"x", "dataset.json": LISTED % "gone"}, "dataset.json.*{root}.*gone.png"),
        ({"a.png": b"x", "b.png": b"x", "c.png": b"x", "dataset.json": LISTED % "b"}, "{root}.*no label.*c.png"),
        ({"a.png": b"x", "metadata.jsonl": '{"file_name": "gone.png"}'}, "metadata.jsonl.*{root}.*gone.png"),
        ({"a.png": b"x", "dataset.json": '{"labels": [['}, "dataset.json.*{root}.*JSON"),
        ({"a.png": b"x", "dataset.json": "[1]"}, "dataset.json.*{root}"),
        ({"a.png": b"x", "dataset.json": '{"labels": 5}'}, "dataset.json.*{root}"),
        ({"a.png": b"x", "dataset.json": b'{"labels": [["\xe9.png", 0]]}'}, "dataset.json.*{root}"),  # Latin-1
        ({"a.png": b"x", "metadata.jsonl": "file_name,label"}, "metadata.jsonl.*{root}.*JSON"),
    ],
    ids=[
        "no_images",
        "missing_image",
        "no_label",
        "missing_image_jsonl",
        "cut_json",
        "list",
        "number",
        "latin1",
        "csv",
    ],
)
def test_wrong_folder_is_named(tmp_path, container, files, message):
    root = write_files(tmp_path / container, files)
    with pytest.raises(ValueError, match=message.format(root=container)):
        load(root)


@pytest.mark.parametrize("flag", ["image_column", "label_column"])
def test_unknown_column_is_named(tmp_path, flag):
    path = write_parquet(tmp_path / "a.parquet", {"image": [grey(0)]}, image=IMAGE)
    with pytest.raises(ValueError, match=f"--{flag} nope.*image"):
        load(path, **{flag: "nope"})


def test_no_image_column_names_the_flag(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"x": [1]}, x=datasets.Value("int64"))
    with pytest.raises(ValueError, match="--image_column.*x"):
        load(path)


def test_image_column_of_numbers_names_the_flag(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"x": [1]}, x=datasets.Value("int64"))
    with pytest.raises(ValueError, match="--image_column x"):
        load(path, image_column="x")


@pytest.mark.parametrize("kind", [CLASSES, datasets.Value("string")], ids=["class_label", "string"])
def test_empty_label_in_parquet_is_named(tmp_path, kind):
    label = 0 if kind is CLASSES else "cat"
    columns = {"image": [grey(0), grey(1)], "label": [label, None]}
    path = write_parquet(tmp_path / "a.parquet", columns, image=IMAGE, label=kind)
    with pytest.raises(ValueError, match="a.parquet"):
        load(path, label_column="label")


def test_damaged_parquet_is_named(tmp_path):
    write_files(tmp_path, {"a.parquet": "this is not parquet"})
    with pytest.raises(ValueError, match="a.parquet"):
        load(tmp_path / "a.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_pixels_at_native_size_are_exact(shape):
    array = noise_image(0, *shape)
    array[0, 0], array[0, 1] = 0, 255
    pixels = decode(encode(array), (4, 6), 1 if len(shape) == 2 else 3)
    expected = torch.from_numpy(array.reshape(4, 6, -1).astype(np.float32) / np.float32(127.5) - 1).permute(2, 0, 1)
    assert pixels.dtype == torch.float32 and torch.equal(pixels, expected)
    assert pixels[0, 0, 0] == -1 and pixels[0, 0, 1] == 1


def palette_image(**options) -> bytes:
    """All pixels have palette entry 1, which is green."""
    image = PIL.Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    return encode(image, **options)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (palette_image(), GREEN),
        (palette_image(transparency=0), GREEN),
        (palette_image(transparency=1), WHITE),
        (encode(PIL.Image.new("RGBA", (4, 4), (*BLUE, 0))), WHITE),
        (encode(PIL.Image.new("RGBA", (4, 4), (*BLUE, 51))), (204, 204, 255)),
        (encode(PIL.Image.new("LA", (4, 4), (0, 51))), (204,)),
        (encode(PIL.Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
        (encode(PIL.Image.new("RGBA", (4, 4), (*BLUE, 51))), (*BLUE, 51)),
        (encode(PIL.Image.new("L", (4, 4), 90)), (90, 90, 90)),
        (encode(PIL.Image.new("L", (4, 4), 90)), (90, 90, 90, 255)),
        (encode(PIL.Image.new("1", (4, 4), 1)), (255,)),
        (encode(PIL.Image.new("1", (4, 4), 0)), (0,)),
        (encode(PIL.Image.new("RGB", (4, 4), RED)), (76,)),  # ITU-R 601 luma: 0.299 * 255
        (encode(np.full((4, 4), 32896, np.uint16)), (128,)),
        (encode(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
        (encode(np.full((4, 4), 32896, np.uint16)), (128, 128, 128, 255)),
        (encode(np.full((4, 4), 32896, np.uint16), "TIFF"), (128,)),
        (encode_npy(np.full((4, 4, 2), 32896, np.uint16)), (128, 128)),
    ],
    ids=(
        "palette palette_other_transparent palette_transparent rgba la_1 la_3 rgba_half rgba_kept grey_3 grey_4 bit_1 "
        "bit_0 rgb_to_grey grey16 grey16_3 grey16_4 grey16_tiff npy16"
    ).split(),
)
def test_mode_is_converted_as_expected(data, colour):
    assert_colour(data, colour)


def test_transparent_colours_do_not_bleed_when_resized():
    array = np.zeros((8, 8, 4), np.uint8)  # the left half opaque red, the right half transparent green
    array[:, :4], array[:, 4:] = (*RED, 255), (*GREEN, 0)
    pixels = levels(decode(encode(array), (3, 3), 4))
    visible = pixels[pixels[..., 3] > 10]
    assert visible[:, 1].max() < 3 and visible[:, 0].min() > 252


def test_cmyk_jpeg_has_expected_colours():
    assert_colour(encode(PIL.Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=95), RED, tolerance=0.1)
    assert_colour(encode(PIL.Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG", quality=95), WHITE, tolerance=0.1)


def test_animation_gives_first_frame():
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE, GREEN)]
    assert_colour(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), RED)


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation_is_applied(orientation, quarter_turns, dtype):
    array = noise_image(0, 4, 6).astype(dtype) * (np.iinfo(dtype).max // 255)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    expected = np.rot90(array, quarter_turns)
    plain = decode(encode(np.ascontiguousarray(expected)), expected.shape, 1)
    assert torch.equal(decode(encode(array, exif=exif), expected.shape, 1), plain)


@pytest.mark.parametrize(("crop_position", "start"), [((0.5, 0.0), 0), ((0.5, 0.5), 4), ((0.5, 1.0), 8)])
def test_wide_image_is_cropped_at_position(crop_position, start):
    array = noise_image(0, 8, 12, 3)
    pixels = levels(decode(encode(array), (8, 4), crop_position=crop_position))
    np.testing.assert_allclose(pixels, array[:, start : start + 4], atol=1e-4)


@pytest.mark.parametrize(("crop_position", "start"), [((0.0, 0.5), 0), ((0.5, 0.5), 4), ((1.0, 0.5), 8)])
def test_tall_image_is_cropped_at_position(crop_position, start):
    array = noise_image(0, 12, 8, 3)
    pixels = levels(decode(encode(array), (4, 8), crop_position=crop_position))
    np.testing.assert_allclose(pixels, array[start : start + 4], atol=1e-4)


def test_flip_mirrors_left_and_right():
    data = encode(noise_image(0, 4, 6, 3))
    assert torch.equal(decode(data, (4, 6), flip=True), decode(data, (4, 6)).flip(-1))


def test_npy_keeps_any_number_of_channels():
    array = noise_image(0, 4, 6, 5)
    np.testing.assert_allclose(levels(decode(encode_npy(array), (4, 6), 5)), array, atol=1e-4)
    assert decode(encode_npy(array), (2, 2), 5).shape == (5, 2, 2)


def test_downscaling_is_antialiased():
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    torch.testing.assert_close(decode(encode(checkerboard), (8, 8), 1), torch.zeros(1, 8, 8), atol=0.06, rtol=0)


@pytest.mark.parametrize("crop_position", [0.0, 0.5, 1.0])
def test_any_size_can_be_resized(crop_position):
    """29 / 28 * 28 > 29 in floating point, and so for other pairs: the crop must not leave the image."""
    for source, size in itertools.product((7, 14, 29, 53, 55, 58, 123, 225), (28, 32, 49, 56, 100)):
        pixels = decode(grey(77, (source, source)), (size, size), 1, crop_position=(crop_position, crop_position))
        torch.testing.assert_close(levels(pixels), np.full((size, size, 1), 77, np.float32), atol=1.0, rtol=0)


def huge_png() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels: a decompression bomb for Pillow."""
    data = grey(0)
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zipfile.crc32(header)) + data[33:]


PHOTO = noise_image(0, 32, 32, 3)
UNREADABLE = {
    "truncated.png": encode(PHOTO)[:900],
    "truncated.jpg": encode(PHOTO, "JPEG")[:900],
    "empty.png": b"",
    "text.png": b"this is no image",
    "float.tif": encode(np.zeros((4, 4), np.float32), "TIFF"),
    "float.npy": encode_npy(np.zeros((4, 4, 3), np.float32)),
    "scalar.npy": encode_npy(np.uint8(3)),
    "truncated.npy": encode_npy(PHOTO)[:60],
    "garbled.npy": encode_npy(PHOTO).replace(b"}", b" ", 1),
    "huge.png": huge_png(),
}


@pytest.mark.parametrize("keep_colour", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_is_named(name, keep_colour):
    with pytest.raises(BadImageError, match=name):
        decode_image(name, UNREADABLE[name], (4, 4), 3, keep_colour=keep_colour)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_does_not_stop_channel_detection(tmp_path, name):
    table = load(write_files(tmp_path / "f", {"good.png": encode(PHOTO), name: UNREADABLE[name]}))
    assert detect_num_channels(table) == 3


def test_wrong_number_of_channels_is_named():
    with pytest.raises(BadImageError, match=r"5 channels of --num_channels.*some\.file"):
        decode(grey(0), (4, 4), 5)


@pytest.fixture
def grey_folder_with_one_colour(tmp_path: Path) -> Path:
    """130 images, one of them in colour and not among the 64 evenly spread ones that channel detection looks at."""
    files = {f"{i:03d}.png": grey(i) for i in range(130)}
    return write_files(tmp_path / "f", files | {"001.png": encode(PIL.Image.new("RGB", (4, 4), RED))})


def test_colour_among_grayscale_is_an_error(grey_folder_with_one_colour):
    dataset = make_dataset(grey_folder_with_one_colour)
    assert dataset.num_channels == 1
    with pytest.raises(BadImageError, match=r"--num_channels.*001\.png"):
        dataset[0, 1]


def test_colour_is_converted_with_explicit_channels(grey_folder_with_one_colour):
    dataset = make_dataset(grey_folder_with_one_colour, num_channels=1, resolution=(4, 4))
    np.testing.assert_allclose(levels(dataset[0, 1]["pixel_values"]), np.full((4, 4, 1), 76), atol=0.5)


def test_channels_of_rgba_are_three(tmp_path):
    files = {"a.png": encode(PIL.Image.new("RGBA", (4, 4), (*RED, 9))), "b.png": grey(0)}
    assert detect_num_channels(load(write_files(tmp_path / "f", files))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Bad images in a table


@pytest.mark.parametrize(
    ("method", "damaged"), [(zipfile.ZIP_STORED, slice(60, 90)), (zipfile.ZIP_DEFLATED, slice(60, 90))]
)
def test_damaged_zip_member_is_named(tmp_path, method, damaged):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
        archive.writestr("a.npy", encode_npy(noise_image(0, 40, 40) % 9))
    data = bytearray((tmp_path / "z.zip").read_bytes())
    data[damaged] = bytes(byte ^ 255 for byte in data[damaged])
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(BadImageError, match=r"a\.npy"):
        load(tmp_path / "z.zip").read(0)


def test_vanished_file_is_named(class_folder):
    table = load(class_folder)
    Path(class_folder, "a/0.png").unlink()
    with pytest.raises(BadImageError, match=r"a/0\.png"):
        table.read(0)


def test_empty_row_of_parquet_is_named(tmp_path):
    table = load(write_parquet(tmp_path / "a.parquet", {"image": [grey(0), None]}, image=IMAGE))
    with pytest.raises(BadImageError, match=r"row 1 of .*a\.parquet"):
        table.read(1)


def test_row_is_named_as_in_the_file_after_a_split(tmp_path):
    images = [grey(i) if i % 2 else b"broken" for i in range(8)]
    table = load(write_parquet(tmp_path / "a.parquet", {"image": images}, image=IMAGE))
    with pytest.raises(BadImageError, match=r"row 6 of .*a\.parquet"):
        decode_image(*table.select([5, 6, 7]).read(1), (4, 4), 1)


def test_bad_image_raises_by_default(class_folder):
    write_files(class_folder, {"a/4.png": b""})
    dataset = make_dataset(class_folder)
    with pytest.raises(BadImageError, match=r"a/4\.png"):
        for position in range(10):
            item_at(dataset, position)


def test_skipped_image_is_replaced_by_next_readable(class_folder):
    clean = make_dataset(class_folder, on_bad_image="skip")
    expected = [item_at(clean, position) for position in range(40)]
    bad = {2, 3, 6}  # rows: a/0 a/2 a/4 a/6 a/8 b/1 b/3 b/5 b/7 b/9
    bad_files = {index: clean.table.read(index)[0] for index in bad}
    for path in bad_files.values():
        Path(path).write_bytes(b"")
    dataset, index = make_dataset(class_folder, on_bad_image="skip"), clean.stream.index
    num_replaced = 0
    for position in range(40):
        item = item_at(dataset, position)
        if index(position) not in bad:
            assert_same(item, expected[position])
            continue
        tried = list(itertools.takewhile(lambda p: index(p) in bad, itertools.count(position)))
        if (tried[-1] + 1) // 10 == position // 10:  # the next readable image lies in the same epoch
            reference = clean[position, index(tried[-1] + 1)]
            messages = item.pop("bad_images")
            assert len(messages) == len(tried)
            assert all(bad_files[index(p)] in message for p, message in zip(tried, messages, strict=True))
            reference.pop("bad_images")
            assert_same(item, reference)
            num_replaced += 1
    assert num_replaced > 5


def test_only_readable_image_is_found_from_every_position(class_folder):
    names = [path for path in class_folder.rglob("*.png") if path.name != "4.png"]
    for path in names:
        path.write_bytes(b"")
    dataset = make_dataset(class_folder, on_bad_image="skip")
    for position in range(40):
        assert item_at(dataset, position)["class_labels"] == 0


def test_table_of_bad_images_only_is_an_error(class_folder):
    for path in class_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match=r"\.png"):
        make_dataset(class_folder, on_bad_image="skip")
    with pytest.raises(BadImageError, match="no readable image in .*images"):
        item_at(make_dataset(class_folder, num_channels=3, on_bad_image="skip"), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors for training


def test_item_has_stated_shapes_and_ranges(class_folder):
    item = item_at(make_dataset(class_folder, resolution=(4, 6)), 17)
    assert set(item) == set("position pixel_values class_labels noise time_uniform dropout_uniform bad_images".split())
    assert item["position"] == 17 and item["bad_images"] == []
    assert isinstance(item["class_labels"], int) and item["class_labels"] in (0, 1)
    for key, shape in (
        ("pixel_values", (3, 4, 6)),
        ("noise", (3, 4, 6)),
        ("time_uniform", ()),
        ("dropout_uniform", ()),
    ):
        assert item[key].shape == shape and item[key].dtype == torch.float32, key
    assert item["pixel_values"].min() >= -1 and item["pixel_values"].max() <= 1


def test_label_belongs_to_image(class_folder):
    dataset = make_dataset(class_folder, resolution=(6, 9))
    for position in range(10):
        name = Path(dataset.table.read(dataset.stream.index(position))[0])
        item = item_at(dataset, position)
        assert dataset.table.class_names[item["class_labels"]] == name.parent.name
        np.testing.assert_allclose(levels(item["pixel_values"]), noise_image(int(name.stem), 6, 9, 3), atol=1e-4)


def test_item_without_labels_has_no_class_labels(tmp_path):
    dataset = make_dataset(write_files(tmp_path / "f", {"a.png": grey(0), "b.png": grey(1)}))
    assert "class_labels" not in item_at(dataset, 0)
    assert "class_labels" not in collate([item_at(dataset, 0), item_at(dataset, 1)])


def test_collate_puts_batch_in_front(class_folder):
    dataset = make_dataset(class_folder, resolution=(4, 6), on_bad_image="skip")
    items = [item_at(dataset, position) for position in range(5)]
    items[1]["bad_images"], items[3]["bad_images"] = ["first"], ["second", "third"]
    batch = collate(items)
    shapes = {key: tuple(value.shape) for key, value in batch.items() if key != "bad_images"}
    image = (5, 3, 4, 6)
    uniform = {"time_uniform": (5,), "dropout_uniform": (5,)}
    assert shapes == {"position": (5,), "class_labels": (5,), "pixel_values": image, "noise": image} | uniform
    assert batch["position"].tolist() == [0, 1, 2, 3, 4] and batch["class_labels"].dtype == torch.int64
    assert batch["bad_images"] == ["first", "second", "third"]


def test_noise_is_standard_normal(class_folder):
    dataset = make_dataset(class_folder, resolution=(32, 32))
    noise = torch.stack([item_at(dataset, position)["noise"] for position in range(40)])  # 122,880 numbers
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.015  # five standard errors
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.007
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize("key", ["time_uniform", "dropout_uniform"])
def test_uniform_numbers_fill_unit_interval(class_folder, key):
    dataset = make_dataset(class_folder)
    values = torch.stack([item_at(dataset, position)[key] for position in range(600)])
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=4, min=0, max=1)
    assert (counts - 150).abs().max() < 55  # five standard deviations


@pytest.fixture
def gradient_folder(tmp_path: Path) -> Path:
    """One image of 4 x 64 pixels whose brightness grows from left to right."""
    return write_files(tmp_path / "f", {"a.png": encode(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (4, 1)))})


def is_mirrored(item: dict) -> bool:
    return bool(item["pixel_values"][0, 0, 0] > item["pixel_values"][0, 0, -1])


def test_random_flip_mirrors_half(gradient_folder):
    flipping, plain = (make_dataset(gradient_folder, random_flip=flag) for flag in (True, False))
    assert 160 < sum(is_mirrored(item_at(flipping, position)) for position in range(400)) < 240
    assert not any(is_mirrored(item_at(plain, position)) for position in range(20))


def test_random_crop_covers_image_and_center_crop_stays(gradient_folder):
    brightness = {}
    for center_crop in (False, True):
        dataset = make_dataset(gradient_folder, resolution=(4, 4), center_crop=center_crop)
        means = [item_at(dataset, position)["pixel_values"].mean().item() for position in range(200)]
        brightness[center_crop] = means
    assert min(brightness[False]) < -0.8 and max(brightness[False]) > 0.8
    assert len({round(value, 3) for value in brightness[False]}) > 50
    assert len(set(brightness[True])) == 1 and abs(brightness[True][0]) < 0.05


def test_flip_and_crop_are_independent(gradient_folder):
    dataset = make_dataset(gradient_folder, resolution=(4, 4), random_flip=True)
    items = [item_at(dataset, position) for position in range(400)]
    rows = [[float(is_mirrored(item)), item["pixel_values"].mean().item()] for item in items]
    assert abs(np.corrcoef(np.array(rows).T)[0, 1]) < 0.2


# ---------------------------------------------------------------------------------------------------------------------
# Validation split


def grey_folder(root: Path, num_images: int) -> Path:
    return write_files(root, {f"{i:03d}.png": grey(i) for i in range(num_images)})


@pytest.mark.parametrize(("fraction", "num_validation"), [(0.25, 5), (0.5, 10), (0.001, 1), (0.95, 19)])
def test_split_is_disjoint_and_covers_all(tmp_path, fraction, num_validation):
    training, validation = split_table(load(grey_folder(tmp_path / "f", 20)), fraction)
    assert len(validation) == num_validation
    seen = [level for level, _ in contents(training) + contents(validation)]
    assert sorted(seen) == list(range(20))


def test_split_is_the_same_for_every_seed(tmp_path):
    table = load(grey_folder(tmp_path / "f", 20))
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        splits.append(contents(split_table(table, 0.25)[1]))
    assert splits[0] == splits[1]
    assert splits[0] != contents(table)[:5]  # not simply the first ones


def test_split_keeps_labels(class_folder):
    table = load(class_folder)
    for part in split_table(table, 0.3):
        assert part.class_names == ("a", "b")
        assert all(Path(part.read(i)[0]).parent.name == "ab"[part.label(i)] for i in range(len(part)))


@pytest.mark.parametrize("fraction", [0.99, 1.0, 1.5])
def test_split_that_leaves_nothing_is_an_error(tmp_path, fraction):
    table = load(grey_folder(tmp_path / "f", 4))
    with pytest.raises(ValueError, match=f"--validation_fraction {fraction}"):
        split_table(table, fraction)
