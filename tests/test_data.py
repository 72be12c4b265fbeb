# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sources of images, decoding, the stream of positions, and the tensors for training.

The images are constant grey, noise or simple patterns, written into `tmp_path`, so that what is read can be compared
with what was written. Grey level g of 0..255 is g / 127.5 - 1 in [-1, 1]. Where no tolerance stands, equality is
exact.
"""

import hashlib
import io
import itertools
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from torch.utils.data import DataLoader

from diffit.batches import load_batches, open_tables
from diffit.config import DataConfig
from diffit.decode import PILLOW_FORMATS, decode_image, decode_pixels, normalize_pixels
from diffit.errors import BadImageError
from diffit.packing import Batch
from diffit.source_config import SourceConfig
from diffit.sources import ImageTable, detect_num_channels, is_same_data, load_image_table
from diffit.stream import (
    AUGMENTATION,
    DIFFUSION,
    PERMUTATION,
    PositionStream,
    StreamBatchSampler,
    position_generator,
    split_table,
)
from diffit.validation_config import ValidationConfig
from helpers import (
    batch_at,
    constant,
    decode,
    encode,
    encode_npy,
    item_at,
    levels,
    load_table,
    make_dataset,
    mentions,
    noise_image,
    write_files,
)

DATA = Path(__file__).parents[1] / "data"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
IMAGE, ANIMAL, NUMBER, TEXT = Image(), ClassLabel(names=["cat", "dog"]), Value("int64"), Value("string")
ROUNDING = 1e-4  # tolerance for float32 arithmetic, in grey levels


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def write_parquet(path: Path, **columns: tuple[object, list]) -> Path:
    """Writes a parquet file from (feature, values) of each column; an image is a grey level, bytes or None."""
    features = Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    for name in (name for name, feature in features.items() if feature is IMAGE):
        files = [constant("L", value) if isinstance(value, int) else value for value in values[name]]
        values[name] = [None if data is None else {"bytes": data, "path": None} for data in files]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(values, features=features).to_parquet(path)
    return path


def contents(table: ImageTable) -> list[tuple]:
    """(grey level, label, class name) of each image, or (grey level,) in a table without labels."""
    rows = []
    for index in range(len(table)):
        level = round(float(levels(decode_image(*table.read(index), (4, 4), 1))[0, 0, 0]))
        rows.append(
            (level, table.label(index), table.class_names[table.label(index)]) if table.class_names else (level,)
        )
    return rows


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """10 noise images of 6 x 9 pixels in color, in the classes `a` and `b`."""
    files = {f"{'ab'[i % 2]}/{i}.png": encode(noise_image(i, 6, 9, 3)) for i in range(10)}
    return write_files(tmp_path / "images", files)


def contents_of(batch: Batch) -> dict:
    return batch.tensors() | {"bad_images": batch.bad_images}


def assert_same(actual: dict, expected: dict) -> None:
    """Equal keys and bitwise equal values."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value) if isinstance(value, torch.Tensor) else actual[key] == value, key


# ---------------------------------------------------------------------------------------------------------------------
# The stream of positions


def test_index_is_permutation_of_each_epoch():
    stream = PositionStream(13, seed=5)
    for epoch in (2, 0, 1):
        order = [stream.index(epoch * 13 + i) for i in range(13)]
        assert sorted(order) == list(range(13))
        assert order == position_generator(5, epoch, PERMUTATION).permutation(13).tolist()


def test_order_differs_between_epochs_and_seeds():
    orders = {tuple(PositionStream(13, seed).index(13 * e + i) for i in range(13)) for seed in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


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
    assert np.abs(correlation).max() < 0.1  # 4.5 standard deviations


def test_every_seed_has_its_own_order():
    """--seed may have 64 bits: numpy would round a key above 2**63 to a multiple of 2048, and the last one to 0."""
    seeds = [0, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    orders = {tuple(PositionStream(13, seed).index(position) for position in range(13)) for seed in seeds}
    assert len(orders) == len(seeds)


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 8), (1, 4), (1, 1), (2, 4), (2, 2), (4, 2), (4, 1)])
def test_optimizer_step_covers_same_positions_on_any_topology(num_processes, batch_size):
    stream = PositionStream(5, seed=1)
    samplers = [iter(StreamBatchSampler(stream, batch_size, 16, num_processes, r)) for r in range(num_processes)]
    accumulation = 8 // (num_processes * batch_size)
    for step in range(3):
        seen = [pair for _ in range(accumulation) for sampler in samplers for pair in next(sampler)]
        assert seen == [(p, stream.index(p)) for p in range(16 + 8 * step, 24 + 8 * step)]


def test_start_position_resumes_exactly():
    stream = PositionStream(5, seed=1)
    whole = list(itertools.islice(StreamBatchSampler(stream, 2, 0, 2, 1), 6))
    assert list(itertools.islice(StreamBatchSampler(stream, 2, 12, 2, 1), 3)) == whole[3:]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_batches_do_not_depend_on_workers(class_folder, on_bad_image):
    if on_bad_image == "skip":
        write_files(class_folder, {"a/4.png": b"", "b/7.png": "no image"})
    dataset = make_dataset(class_folder, random_flip=True, on_bad_image=on_bad_image)
    batches = []
    for num_workers in (0, 2):
        sampler = StreamBatchSampler(PositionStream(10, 0), batch_size=4, start_position=3)
        loader = load_batches(dataset, sampler, num_workers)
        batches.append([contents_of(batch) for batch in itertools.islice(loader, 4)])
    assert any(batch["bad_images"] for batch in batches[0]) == (on_bad_image == "skip")
    for actual, expected in zip(*batches, strict=True):
        assert_same(actual, expected)


def test_workers_do_not_disturb_each_other_in_a_zip(tmp_path):
    """A forked worker inherits the parent's open zip: were it shared, reads would come from another's file offset."""
    files = [encode_npy(noise_image(i, 64, 64, 3)) for i in range(16)]
    table = load_table(write_files(tmp_path / "z.zip", {f"{i:02d}.npy": data for i, data in enumerate(files)}))
    assert table.read(0)[1] == files[0]  # opens the zip here, before the workers start
    reader = DataLoader(range(4000), 16, num_workers=2, collate_fn=lambda ids: [table.read(i % 16)[1] for i in ids])
    assert all(batch == files for batch in reader)


def test_items_do_not_depend_on_order_of_asking(class_folder):
    forward, backward = (make_dataset(class_folder, seed=3, random_flip=True) for _ in range(2))
    expected = {position: item_at(forward, position) for position in range(15)}
    for position in reversed(range(15)):
        assert_same(item_at(backward, position), expected[position])


def test_random_numbers_depend_on_seed_and_position(class_folder):
    datasets = [make_dataset(class_folder, seed) for seed in (0, 1)]
    drawn = {item_at(dataset, position)["noise"].sum().item() for dataset in datasets for position in (0, 10, 20)}
    assert len(drawn) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from

LAYOUTS = {  # name: (files, with a grey level for each image; what is expected)
    "flat": ({"a.PNG": 1, "b.png": 2, "notes.txt": "x"}, [(1,), (2,)]),
    "class_folders": ({"dog/x/2.png": 2, "cat/1.png": 1}, [(1, 0, "cat"), (2, 1, "dog")]),
    "classes_named_like_splits": ({"test tube/1.png": 1, "train/2.png": 2}, [(1, 0, "test tube"), (2, 1, "train")]),
    "root_and_folders": ({"0.png": 0, "a/1.png": 1, "b/2.png": 2}, [(0,), (1,), (2,)]),
    "dataset_json": (
        {f"{i // 2:05d}/img{i:08d}.png": i for i in range(3)}
        | {"dataset.json": json.dumps({"labels": [[f"{i // 2:05d}/img{i:08d}.png", 4 - 2 * i] for i in (2, 0, 1)]})},
        [(0, 4, "4"), (1, 2, "2"), (2, 0, "0")],
    ),
    "dataset_json_null": ({"00000/a.png": 1, "00001/b.png": 2, "dataset.json": '{"labels": null}'}, [(1,), (2,)]),
    "metadata_int": (
        {"a.png": 1, "b.png": 2}
        | {"metadata.jsonl": '{"file_name": "b.png", "label": 1}\n{"file_name": "a.png", "label": 3}\n'},
        [(1, 3, "3"), (2, 1, "1")],
    ),
    "metadata_string": ({"x/a.png": 1, "metadata.jsonl": '{"file_name": "x/a.png", "label": "7"}\n'}, [(1, 0, "7")]),
    "metadata_without_label": ({"a.png": 1, "metadata.jsonl": '{"file_name": "a.png", "text": "t"}\n'}, [(1,)]),
}


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_images_and_labels(tmp_path, layout, container):
    files, expected = LAYOUTS[layout]
    assert sorted(contents(load_table(write_files(tmp_path / container, files)))) == expected


def test_metadata_label_column_is_used(tmp_path):
    files = {"0.png": 0, "metadata.jsonl": '{"file_name": "0.png", "label": 0, "kind": "square"}\n'}
    assert contents(load_table(write_files(tmp_path / "f", files), label_column="kind")) == [(0, 0, "square")]


@pytest.mark.parametrize("folder", ["f", "set [1]"])  # brackets are a pattern for `datasets`
def test_folder_of_parquet_files_gives_all_rows(tmp_path, folder):
    for part in (0, 1):
        write_parquet(tmp_path / folder / f"part-{part}.parquet", image=(IMAGE, [part]), label=(ANIMAL, [1 - part]))
    assert contents(load_table(tmp_path / folder)) == [(0, 1, "dog"), (1, 0, "cat")]


@pytest.mark.parametrize(("split", "expected"), [("train", (1, 1, "dog")), ("test", (2, 0, "cat"))])
def test_dataset_name_reads_local_parquet(tmp_path, split, expected):
    write_parquet(tmp_path / "hub/train-0.parquet", image=(IMAGE, [1]), label=(ANIMAL, [1]))
    write_parquet(tmp_path / "hub/test-0.parquet", image=(IMAGE, [2]), label=(ANIMAL, [0]))
    table = load_image_table(
        SourceConfig(dataset_name=str(tmp_path / "hub"), dataset_split=split, cache_dir=str(tmp_path / "c"))
    )
    assert contents(table) == [expected]


def test_dataset_name_reads_local_image_folder(tmp_path):
    write_files(tmp_path / "f", {"train/cat/1.png": 1, "train/dog/2.png": 2})
    table = load_image_table(SourceConfig(dataset_name=str(tmp_path / "f"), cache_dir=str(tmp_path / "cache")))
    assert sorted(contents(table)) == [(1, 0, "cat"), (2, 1, "dog")]


def test_columns_are_found_by_feature_type(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", id=(NUMBER, [9]), img=(IMAGE, [3]), animal=(ANIMAL, [1]))
    assert contents(load_table(path)) == [(3, 1, "dog")]


def test_two_label_columns_are_ambiguous(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", img=(IMAGE, [3]), fine=(ANIMAL, [1]), coarse=(ANIMAL, [0]))
    with pytest.raises(ValueError, match=mentions("--label_column", "'fine', 'coarse'")):
        load_table(path)
    assert contents(load_table(path, label_column="coarse")) == [(3, 0, "cat")]


@pytest.mark.parametrize(
    ("feature", "values", "labels"),
    [(NUMBER, [5, 0, 2], [5, 0, 2]), (TEXT, ["b", "c", "a"], [1, 2, 0]), (TEXT, ["7", "9", "8"], [0, 2, 1])],
)
def test_plain_label_column_is_encoded(tmp_path, feature, values, labels):
    path = write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0, 1, 2]), kind=(feature, values))
    names = [str(value) for value in values]
    assert contents(load_table(path, label_column="kind")) == list(zip([0, 1, 2], labels, names, strict=True))


def test_digits_equal_those_of_scikit_learn():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    table = load_image_table(SourceConfig(train_data_file=str(DATA / "digits.parquet")))
    assert len(table) == 1797 and table.class_names == tuple("0123456789")
    assert table.labels.tolist() == digits.target.tolist()
    pixels = np.stack([levels(decode_image(*table.read(index), (8, 8), 1))[..., 0] for index in range(1797)])
    np.testing.assert_allclose(pixels, (digits.images * 255 / 16).round(), atol=ROUNDING)


def test_emoji_are_1906_color_images_in_9_classes():
    table = load_image_table(SourceConfig(train_data_file=str(DATA / "noto_emoji_32.parquet")))
    assert len(table) == 1906 and len(table.class_names) == 9 and set(table.labels) == set(range(9))
    images = [PIL.Image.open(io.BytesIO(table.read(index)[1])) for index in range(1906)]
    assert {image.size for image in images} == {(32, 32)} and {image.mode for image in images} <= {"RGB", "RGBA"}
    assert detect_num_channels(table) == 3


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a source


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({}, ["--dataset_name", "--train_data_dir", "--train_data_file"]),
        ({"train_data_dir": "x", "train_data_file": "y"}, ["--train_data_dir", "--train_data_file"]),
        ({"train_data_dir": "/no/such/folder"}, ["--train_data_dir", "/no/such/folder"]),
        ({"train_data_file": "/no/such.parquet"}, ["--train_data_file", "/no/such.parquet"]),
    ],
)
def test_wrong_source_is_named(sources, words):
    with pytest.raises(ValueError, match=mentions(*words)):
        load_image_table(SourceConfig(**sources))


WRONG_FILES = {  # name: (files beside the image a.png; what the message names)
    "missing_image": ({"dataset.json": '{"labels": [["a.png", 0], ["gone.png", 1]]}'}, ["dataset.json", "gone.png"]),
    "image_without_label": ({"b.png": 0, "dataset.json": '{"labels": [["a.png", 0]]}'}, ["label", "b.png"]),
    "null_label": ({"dataset.json": '{"labels": [["a.png", null]]}'}, ["label", "a.png"]),
    "mixed_labels": ({"b.png": 0, "dataset.json": '{"labels": [["a.png", 0], ["b.png", "x"]]}'}, ["'x'"]),
    "negative_label": ({"dataset.json": '{"labels": [["a.png", -1]]}'}, ["'-1'"]),
    "cut_json": ({"dataset.json": '{"labels": [['}, ["dataset.json", "JSON"]),
    "json_list": ({"dataset.json": "[1]"}, ["dataset.json", "list"]),
    "json_labels_number": ({"dataset.json": '{"labels": 5}'}, ["dataset.json", 5]),
    "absolute_name": ({"metadata.jsonl": '{"file_name": "/set/a.png"}'}, ["metadata.jsonl", "/set/a.png", "relative"]),
    "windows_name": ({"dataset.json": '{"labels": [["x\\\\a.png", 0]]}'}, ["dataset.json", r"x\\a.png", "relative"]),
    "no_file_name": (
        {"metadata.jsonl": '{"file_name": "a.png"}\n{"image": "b.png"}'},
        ["metadata.jsonl", "record 2", "file_name", "b.png"],
    ),
    "numeric_file_name": ({"metadata.jsonl": '{"file_name": 7}'}, ["metadata.jsonl", "record 1", "file_name", 7]),
    "huge_label": (
        {"dataset.json": '{"labels": [["a.png", ' + "9" * 4000 + "]]}"},
        ["labels", "'" + "9" * 60 + "...'"],
    ),
    "json_latin1": ({"dataset.json": b'{"labels": [["\xe9.png", 0]]}'}, ["dataset.json", "JSON"]),
    "missing_image_jsonl": ({"metadata.jsonl": '{"file_name": "gone.png"}'}, ["metadata.jsonl", "gone.png"]),
    "metadata_without_rows": ({"metadata.jsonl": ""}, ["metadata.jsonl"]),
    "no_json": ({"metadata.jsonl": "file_name,label"}, ["metadata.jsonl", "JSON"]),
}


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_file_is_named(tmp_path, wrong, container):
    files, words = WRONG_FILES[wrong]
    root = write_files(tmp_path / container, {"a.png": 0} | files)
    with pytest.raises(ValueError, match=mentions(root, *words)):
        load_table(root)


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_folder_without_images_is_named(tmp_path, container):
    root = write_files(tmp_path / container, {"notes.txt": "x"})
    with pytest.raises(ValueError, match=mentions("--train_data_dir", root, ".png")):
        load_table(root)


@pytest.mark.parametrize("extension", ["jfif", "jpe", "JPEG", "apng", "pbm", "pgm", "pnm", "avif"])
def test_extensions_of_phones_and_browsers_are_read(extension, tmp_path):
    kind = {"apng": "PNG", "avif": "AVIF"}.get(extension, "PPM" if extension.startswith("p") else "JPEG")
    if kind == "AVIF" and kind not in PILLOW_FORMATS:
        pytest.skip("this Pillow cannot read AVIF")
    image = constant("1" if extension == "pbm" else "L", 255, kind)
    root = write_files(tmp_path / "f", {f"cat/1.{extension}": image, "dog/2.png": 0})
    assert sorted(contents(load_table(root))) == [(0, 1, "dog"), (255, 0, "cat")]


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize("extension", [".heic", ".jp2", ".TGA", ".NEF", ".jpg_large", ".png~"])
def test_images_in_other_formats_are_refused_or_counted(extension, container, tmp_path, caplog):
    root = write_files(
        tmp_path / container, {"a.png": 1, f"b{extension}": "x", f"c{extension}": "x", "notes.txt": "x"}
    )
    words = [f"--train_data_dir {root}", f"{extension.lower()} 2", f"b{extension}", "convert", "--skip_other_formats"]
    with pytest.raises(ValueError, match=mentions(*words)):
        load_table(root)
    assert contents(load_table(root, skip_other_formats=True)) == [(1,)]
    assert mentions(f"{root}: left out", f"not read: 2 ({extension.lower()} 2)", ".txt").search(caplog.text)


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_whatever_is_left_out_is_counted_by_reason(container, tmp_path, caplog):
    names = ["a.txt", "b.txt", "c.md", "LICENSE", "@eaDir/1.png", "$RECYCLE.BIN/2.png", ".git/3.png", ".git/4.png"]
    metadata = {"metadata.jsonl": '{"file_name": "1.png"}'}
    root = write_files(tmp_path / container, {"1.png": 1, "2.png": 2} | dict.fromkeys(names, "x") | metadata)
    assert contents(load_table(root)) == [(1,)]
    reasons = ["not images: 4 (.txt 2, .md, no extension)", "hidden folders: 1 (.git)"]
    reasons += ["folders of the system: 2 ($RECYCLE.BIN, @eaDir)", "metadata.jsonl does not list: 1 (2.png)"]
    assert mentions(f"{root}: left out", *reasons).search(caplog.text)


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_empty_folders_are_counted(container, tmp_path, caplog):
    """Among class folders they may be classes that someone expects."""
    root = write_files(tmp_path / container, {"cat/1.png": 1, "dog/x/2.png": 2})
    if root.is_file():
        write_files(root, {"dog/": b""})  # not empty
    for folder in ("fox", "owl/young"):
        if root.is_dir():
            (root / folder).mkdir(parents=True)
        else:
            write_files(root, {f"{folder}/": b""})
    table = load_table(root)
    assert table.class_names == ("cat", "dog")
    assert mentions(f"{root}: left out empty folders: 2 (fox, owl/young)").search(caplog.text)


def test_pipes_are_counted_and_never_opened(tmp_path, caplog):
    root = write_files(tmp_path / "f", {"1.png": 1})
    for name in ("pipe.png", "metadata.jsonl"):
        os.mkfifo(root / name)  # opening it would wait forever
    assert contents(load_table(root)) == [(1,)]
    assert mentions(f"{root}: left out pipes", "2 (metadata.jsonl, pipe.png)").search(caplog.text)


def test_zip_with_two_entries_of_one_name_is_refused(tmp_path):
    root = write_files(tmp_path / "z.zip", {"1.png": 1, "2.png": 2})
    with pytest.warns(UserWarning, match="2.png"):
        write_files(root, {"2.png": 3})
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", "2.png", "repack")):
        load_table(root)


def test_zip_entries_that_begin_with_a_dot_have_the_classes_of_their_folders(tmp_path):
    names = ["./cat/1.png", "dog//2.png", "dog/./3.png"]
    table = load_table(write_files(tmp_path / "z.zip", dict(zip(names, (1, 2, 3), strict=True))))
    assert contents(table) == [(1, 0, "cat"), (2, 1, "dog"), (3, 1, "dog")]
    assert mentions("cat/1.png").search(table.name(0))


def test_nothing_left_out_is_not_reported(tmp_path, caplog):
    load_table(write_files(tmp_path / "f", {"1.png": 1, "dataset.json": '{"labels": null}'}))
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--image_column", "['x']"]),
        ({"image_column": "nope"}, ["--image_column nope", "x"]),
        ({"image_column": "x"}, ["--image_column x"]),
        ({"image_column": "x", "label_column": "nope"}, ["--label_column nope", "x"]),
    ],
)
def test_wrong_column_names_the_flag(tmp_path, options, words):
    path = write_parquet(tmp_path / "a.parquet", x=(NUMBER, [1]))
    with pytest.raises(ValueError, match=mentions(*words)):
        load_table(path, **options)


@pytest.mark.parametrize(("feature", "label"), [(ANIMAL, 0), (TEXT, "cat")], ids=["class_label", "string"])
def test_empty_label_in_parquet_is_named(tmp_path, feature, label):
    path = write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0, 1]), label=(feature, [label, None]))
    with pytest.raises(ValueError, match=mentions("label", "a.parquet")):
        load_table(path, label_column="label")


@pytest.mark.parametrize(
    ("feature", "value"),
    [(Sequence(TEXT), ["a"]), ({"x": NUMBER}, {"x": 1}), (Value("bool"), True), (Value("float32"), 0.5)],
    ids=["list", "struct", "bool", "float"],
)
def test_label_column_of_another_kind_is_refused(feature, value, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0, 1]), tags=(feature, [value, value]))
    with pytest.raises(ValueError, match=mentions("--label_column tags", path, str(value), 99999)):
        load_table(path, label_column="tags")


PARTLY_LABELLED = {  # files, a parquet file's labels included; what the reason names
    "dataset_json": ({"b.png": 1, "dataset.json": '{"labels": [["a.png", 0]]}'}, ["1 of 2", "b.png"]),
    "damaged_json": ({"b.png": 1, "dataset.json": '{"labels": [['}, ["dataset.json", "JSON"]),
    "metadata": (
        {"b.png": 1, "metadata.jsonl": '{"file_name": "a.png", "label": 0}\n{"file_name": "b.png"}'},
        ["1 of 2", "b.png"],
    ),
    "none": ({"a.parquet": [0, None]}, ["1 of 2", "label"]),
    "all_none": ({"a.parquet": [None, None]}, ["2 of 2", "label"]),
    "list": (
        {"b.png": 1, "metadata.jsonl": '{"file_name": "a.png", "label": [1]}\n{"file_name": "b.png", "label": [2]}'},
        ["metadata.jsonl", "label", "a.png", [1]],
    ),
    "two_labels": (
        {
            "b.png": 1,
            "metadata.jsonl": "\n".join(
                json.dumps({"file_name": f"{name}.png", "label": label}) for name, label in ("ax", "by", "bz")
            ),
        },
        ["metadata.jsonl", "b.png", "'y'", "'z'"],
    ),
    "empty_text": (
        {"b.png": 1, "metadata.jsonl": '{"file_name": "a.png", "label": ""}\n{"file_name": "b.png", "label": "x"}'},
        ["1 of 2", "label", "a.png"],
    ),
    "minus_one": ({"a.parquet": [-1, -1]}, ["label", "'-1'"]),  # the test split of ImageNet and others on the hub
}


def write_table(folder: Path, files: dict) -> Path:
    """A folder of two images, in files or in the rows of a parquet file with these labels."""
    if "a.parquet" in files:
        return write_parquet(folder / "a.parquet", image=(IMAGE, [0, 1]), label=(ANIMAL, files["a.parquet"]))
    return write_files(folder, {"a.png": 0} | files)


@pytest.mark.parametrize("layout", PARTLY_LABELLED)
def test_labels_that_nobody_asked_for_are_left_out_with_a_log_line(layout, tmp_path, caplog):
    files, words = PARTLY_LABELLED[layout]
    source = write_table(tmp_path / "f", files)
    flag = "train_data_file" if source.suffix else "train_data_dir"
    source_config = SourceConfig(**{flag: str(source)}, cache_dir=str(tmp_path / "cache"))
    with caplog.at_level("INFO"):
        table = load_image_table(source_config, need_labels=False)
    assert contents(table) == [(0,), (1,)]
    assert mentions("labels", *words).search(caplog.text) and mentions(*words).search(table.no_labels)
    with pytest.raises(ValueError, match=mentions(*words)):
        load_image_table(source_config, need_labels=True)


WITHOUT_LABELS = {  # name: (files, words of the reason)
    "flat": ({"1.png": 1}, ["dataset.json", "metadata.jsonl"]),
    "one_folder": ({"pets/cat/1.png": 1, "pets/dog/1.png": 1}, ["pets/"]),
    "beside": ({"cat/1.png": 1, "dog/1.png": 1, "preview.png": 1}, ["1 images", "preview.png"]),
    "csv": ({"1.png": 1, "metadata.csv": "file_name,label\n1.png,cat\n"}, ["metadata.csv", "metadata.jsonl"]),
    "deeper": (
        {"x/1.png": 1, "x/metadata.jsonl": '{"file_name": "1.png", "label": "cat"}'},
        ["x/metadata.jsonl", "x/"],
    ),
    "null": ({"1.png": 1, "dataset.json": '{"labels": null}'}, ["dataset.json"]),
    "null_key": ({"1.png": 1, "metadata.jsonl": '{"file_name": "1.png", "label": null}'}, ["label", "null"]),
    "other_key": ({"1.png": 1, "metadata.jsonl": '{"file_name": "1.png", "kind": 1}'}, ["--label_column", "kind"]),
}


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize("layout", WITHOUT_LABELS)
def test_no_labels_says_what_was_looked_at(layout, container, tmp_path):
    files, words = WITHOUT_LABELS[layout]
    root = write_files(tmp_path / container, files)
    data = DataConfig(SourceConfig(train_data_dir=str(root)), class_conditional=True)
    with pytest.raises(ValueError, match=mentions("--class_conditional", root, "no labels", *words)):
        open_tables(data, ValidationConfig())


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/1.png", b"caf\xe9.parquet"])
def test_name_that_is_not_utf8_is_refused_with_its_bytes(name, tmp_path):
    root = write_files(tmp_path / "f", {"a.png": 0})
    file = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(constant("L", 1))
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", name, "convmv")) as error:
        load_table(root)
    str(error.value).encode()


def test_name_that_is_not_utf8_and_not_an_image_is_counted(tmp_path, caplog):
    root = write_files(tmp_path / "f", {"a.png": 0})
    (root / os.fsdecode(b".caf\xe9.png")).write_bytes(b"x")
    assert contents(load_table(root)) == [(0,)]
    assert mentions("left out hidden files: 1", "udce9").search(caplog.text.encode("utf-8").decode())


NFC, NFD = "caf\xe9", "cafe\u0301"  # the same to the eye


def test_classes_that_differ_in_unicode_normal_form_only_are_refused(tmp_path):
    root = write_files(tmp_path / "f", {f"{NFC}/1.png": 1, f"{NFD}/2.png": 2})
    with pytest.raises(ValueError, match=mentions(root, ascii(NFC), ascii(NFD))):
        load_table(root)


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize(("listed", "there"), [(NFC, NFD), (NFD, NFC), ("./x", "x"), ("y/./x", "y/x")])
@pytest.mark.parametrize(
    "text",
    [
        {"dataset.json": '{{"labels": [["{}.png", 5], ["b.png", 0]]}}'},
        {"metadata.jsonl": '{{"file_name": "{}.png", "label": 5}}\n{{"file_name": "b.png", "label": 0}}'},
    ],
)
def test_listed_name_in_another_form_is_the_same_file(text, listed, there, container, tmp_path, caplog):
    lists = {name: lines.format(listed) for name, lines in text.items()}
    root = write_files(tmp_path / container, {f"{there}.png": 1, "b.png": 2} | lists)
    assert sorted(contents(load_table(root))) == [(1, 5, "5"), (2, 0, "0")]
    if not listed.isascii():
        assert mentions(root, *lists, "1 names", "NFC").search(caplog.text)


def test_listed_file_that_is_not_read_as_an_image_is_told_from_a_missing_one(tmp_path):
    files = {"a.png": 1, "b.bin": "x", "dataset.json": '{"labels": [["a.png", 0], ["b.bin", 1]]}'}
    with pytest.raises(ValueError, match=mentions("dataset.json", "is there", "'b.bin'")):
        load_table(write_files(tmp_path / "f", files))


def test_image_with_two_labels_is_refused(tmp_path):
    files = {"a.png": 1, "dataset.json": '{"labels": [["a.png", 0], ["./a.png", 1]]}'}
    with pytest.raises(ValueError, match=mentions("dataset.json", "a.png", 0, 1)):
        load_table(write_files(tmp_path / "f", files))


@pytest.mark.parametrize(("labels", "empty"), [([1, 3], ["0", "2"]), ([0, 1], []), (["1", "3"], [])])
def test_gaps_in_label_numbers_are_reported(labels, empty, tmp_path, caplog):
    lists = {"dataset.json": json.dumps({"labels": [["1.png", labels[0]], ["2.png", labels[1]]]})}
    root = write_files(tmp_path / "f", {"1.png": 1, "2.png": 2} | lists)
    assert load_table(root).empty_classes() == empty
    open_tables(DataConfig(SourceConfig(train_data_dir=str(root)), class_conditional=True), ValidationConfig())
    warning = mentions(root, f"{len(empty)} of {max(map(int, labels)) + 1} classes", *empty[:1])
    assert bool(warning.search(caplog.text)) == bool(empty)


@pytest.mark.parametrize("source", ["train_data_file", "train_data_dir", "dataset_name"])
def test_no_label_column_says_which_could_be(source, tmp_path):
    file = write_parquet(
        tmp_path / "hub/train.parquet", image=(IMAGE, [1]), digit=(NUMBER, [7]), size=(Value("float32"), [1.0])
    )
    path = file if source == "train_data_file" else file.parent
    table = load_image_table(SourceConfig(**{source: str(path)}, cache_dir=str(tmp_path / "cache")))
    assert table.class_names is None and mentions("--label_column", "digit (int64)").search(table.no_labels)
    assert "size" not in table.no_labels and "image" not in table.no_labels


def test_columns_of_paths_are_not_suggested_as_labels(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", file=(TEXT, ["1.png"]), kind=(Value("large_string"), ["x"]))
    table = load_table(file, image_column="file")
    assert mentions("--label_column", "kind").search(table.no_labels) and "file" not in table.no_labels


def test_label_column_of_images_is_refused_without_showing_them(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0]))
    with pytest.raises(ValueError, match=mentions("--label_column image", file, "Image")) as error:
        load_table(file, label_column="image")
    assert len(str(error.value)) < 500 and "PNG" not in str(error.value)


def test_label_column_with_a_csv_says_that_it_is_not_read(tmp_path):
    root = write_files(tmp_path / "f", {"1.png": 1, "metadata.csv": "file_name,label\n1.png,cat\n"})
    with pytest.raises(ValueError, match=mentions("--label_column label", "metadata.csv", root)):
        load_table(root, label_column="label")


def test_parquet_without_images_next_to_images_is_counted_and_the_images_are_read(tmp_path, caplog):
    """As written by img2dataset, and by tools that keep features next to images."""
    root = write_files(tmp_path / "set", {"00000/0.jpg": constant("L", 7, "JPEG"), "00000/1.png": 9})
    write_parquet(root / "00000.parquet", url=(TEXT, ["a"]), caption=(TEXT, ["b"]))
    write_parquet(root / "features.parquet", feature=(Sequence(Value("float32")), [[1.0]]))
    assert contents(load_table(root)) == [(7,), (9,)]
    assert mentions(f"{root}: left out parquet files without images: 2", "00000.parquet").search(caplog.text)


def test_parquet_without_images_next_to_parquet_of_images_is_counted(tmp_path, caplog):
    write_parquet(tmp_path / "set/metadata.parquet", caption=(TEXT, ["b"]))
    write_parquet(tmp_path / "set/images.parquet", image=(IMAGE, [3]))
    write_parquet(tmp_path / "set/empty.parquet", image=(IMAGE, []))
    write_files(tmp_path / "set", {"preview.png": 1, "README.md": "x"})
    assert contents(load_table(tmp_path / "set")) == [(3,)]
    reasons = ["without images: 1 (metadata.parquet)", "empty parquet files: 1", "preview.png", ".md"]
    assert mentions("left out", *reasons).search(caplog.text)


def test_parquet_that_may_hold_images_next_to_images_is_refused(tmp_path):
    root = write_files(tmp_path / "set", {"1.png": 1})
    write_parquet(root / "a.parquet", blob=(Value("binary"), [constant("L", 5)]))
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", "a.parquet", "blob", "--image_column")):
        load_table(root)
    assert contents(load_table(root, image_column="blob")) == [(5,)]


@pytest.mark.parametrize("source", ["train_data_file", "train_data_dir", "dataset_name"])
def test_parquet_without_rows_is_named(source, tmp_path):
    file = write_parquet(tmp_path / "set/train.parquet", image=(IMAGE, []))
    path = file if source == "train_data_file" else file.parent
    with pytest.raises(ValueError, match=mentions(path)):
        load_image_table(SourceConfig(**{source: str(path)}, cache_dir=str(tmp_path / "cache")))


def test_source_given_by_the_wrong_flag_says_which_is_right(tmp_path):
    file = write_parquet(tmp_path / "set/train.parquet", image=(IMAGE, [1]))
    with pytest.raises(ValueError, match=mentions(f"--train_data_file {file.parent}", "--train_data_dir")):
        load_image_table(SourceConfig(train_data_file=str(file.parent)))
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {file}", "--train_data_file")):
        load_image_table(SourceConfig(train_data_dir=str(file)))


def test_dataset_name_with_brackets_says_what_helps(tmp_path):
    file = write_parquet(tmp_path / "[x]/train.parquet", image=(IMAGE, [1]))
    with pytest.raises(ValueError, match=mentions(f"--dataset_name {file.parent}", "--train_data_dir")):
        load_image_table(SourceConfig(dataset_name=str(file.parent), cache_dir=str(tmp_path / "cache")))
    assert contents(load_table(file.parent)) == [(1,)]


@pytest.mark.parametrize("source", ["train_data_file", "train_data_dir", "dataset_name"])
def test_cache_that_cannot_be_written_is_named(source, tmp_path):
    file = write_parquet(tmp_path / "set/train.parquet", image=(IMAGE, [1]))
    write_files(tmp_path, {"in_the_way": "a file"})
    cache = tmp_path / "in_the_way" / "cache"
    path = file if source == "train_data_file" else file.parent
    with pytest.raises(ValueError, match=mentions(path, cache, "--cache_dir", "HF_HOME")):
        load_image_table(SourceConfig(**{source: str(path)}, cache_dir=str(cache)))


def test_damaged_parquet_is_named(tmp_path):
    write_files(tmp_path, {"a.parquet": "this is not parquet"})
    with pytest.raises(ValueError, match=r"a\.parquet"):
        load_table(tmp_path / "a.parquet")


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
    """A palette image whose pixels all have entry 1, which is green."""
    image = PIL.Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    return encode(image, **options)


GREY16 = np.full((4, 4), 32896, np.uint16)  # 128 / 255 of 65535
COLORS = {  # name: (file, color of all its pixels when it is decoded to as many channels)
    "palette": (palette_image(), GREEN),
    "palette_other_transparent": (palette_image(transparency=0), GREEN),
    "palette_transparent": (palette_image(transparency=1), WHITE),
    "rgba_transparent": (constant("RGBA", (*BLUE, 0)), WHITE),
    "rgba_half": (constant("RGBA", (*BLUE, 51)), (204, 204, 255)),
    "rgba_kept": (constant("RGBA", (*BLUE, 51)), (*BLUE, 51)),
    "grey_alpha": (constant("LA", (0, 51)), (204,)),
    "grey_alpha_to_3": (constant("LA", (0, 51)), (204, 204, 204)),
    "grey_to_3": (constant("L", 90), (90, 90, 90)),
    "grey_to_4": (constant("L", 90), (90, 90, 90, 255)),
    "color_to_1": (constant("RGB", RED), (76,)),  # luma of ITU-R 601: 0.299 * 255
    "bit_0": (constant("1", 0), (0,)),
    "bit_1": (constant("1", 1), (255,)),
    "grey16": (encode(GREY16), (128,)),
    "grey16_tiff": (encode(GREY16, "TIFF"), (128,)),
    "grey16_to_3": (encode(GREY16), (128, 128, 128)),
    "grey16_to_4": (encode(GREY16), (128, 128, 128, 255)),
    "grey16_max": (encode(np.full((4, 4), 65535, np.uint16)), (255,)),
    "npy16": (encode_npy(np.stack([GREY16, GREY16 // 128], -1)), (128, 1)),
}


@pytest.mark.parametrize("name", COLORS)
def test_mode_is_converted_as_expected(name):
    data, color = COLORS[name]
    np.testing.assert_allclose(levels(decode(data, (4, 4), len(color))), np.full((4, 4, len(color)), color), atol=0.5)


@pytest.mark.parametrize(
    ("ink", "color"), [((0, 255, 255, 0), RED), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_jpeg_has_expected_colors(ink, color):
    pixels = levels(decode(constant("CMYK", ink, "JPEG", quality=95), (4, 4)))
    np.testing.assert_allclose(pixels, np.full((4, 4, 3), color), atol=8)


def test_animation_gives_first_frame():
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in (RED, BLUE, GREEN)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(levels(decode(data, (4, 4))), np.full((4, 4, 3), RED), atol=ROUNDING)


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation_is_applied(orientation, quarter_turns, dtype):
    array = noise_image(0, 4, 6)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(array.astype(dtype) * (np.iinfo(dtype).max // 255), exif=exif)
    expected = np.rot90(array, quarter_turns)
    np.testing.assert_allclose(levels(decode(data, expected.shape, 1))[..., 0], expected, atol=ROUNDING)


@pytest.mark.parametrize(("crop_position", "start"), [(0.0, 0), (0.5, 4), (1.0, 8)])
@pytest.mark.parametrize("axis", ["height", "width"])
def test_crop_lies_at_crop_position(axis, crop_position, start):
    array = noise_image(0, 12, 8, 3)  # 12 pixels along the axis, of which 4 are kept; 8 along the other
    rows = levels(decode(encode(array), (4, 8), crop_position=(crop_position, 0.3)))
    if axis == "width":
        data = encode(np.ascontiguousarray(array.transpose(1, 0, 2)))
        rows = levels(decode(data, (8, 4), crop_position=(0.3, crop_position))).transpose(1, 0, 2)
    np.testing.assert_allclose(rows, array[start : start + 4], atol=ROUNDING)


NOISE = noise_image(0, 12, 9, 3)
IMAGES = {  # file, and what it holds as PIL images in color with values in [0, 255]
    "RGB": (encode(NOISE), [PIL.Image.fromarray(NOISE)]),
    "JPEG": ((jpeg := encode(NOISE, "JPEG", quality=90)), [PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")]),
    "grey": (encode(NOISE[..., 0]), [PIL.Image.fromarray(NOISE[..., 0]).convert("RGB")]),
    "16 bits": (
        encode(NOISE[..., 0].astype(np.uint16) * 256 + 77),
        [PIL.Image.fromarray((NOISE[..., 0] * np.float32(256) + 77) * (255 / 65535))] * 3,
    ),
    "array": (encode_npy(NOISE), [PIL.Image.fromarray(NOISE[..., c].astype(np.float32)) for c in range(3)]),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resolution", [(12, 9), (5, 5), (30, 20)])
@pytest.mark.parametrize("name", IMAGES)
def test_values_are_those_of_float_arithmetic_on_the_resized_image(name, resolution, flip):
    """Bitwise, as when workers converted to floats, so that old runs resume with the same numbers."""
    data, planes = IMAGES[name]
    height, width = resolution
    scale = min(12 / height, 9 / width)
    top, left = (12 - height * scale) * 0.3, (9 - width * scale) * 0.8
    box = (left, top, min(left + width * scale, 9), min(top + height * scale, 12))
    if resolution != (12, 9):
        planes = [plane.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box) for plane in planes]
    pixels = np.concatenate([np.asarray(plane, np.float32).reshape(height, width, -1) for plane in planes], axis=-1)
    expected = ((pixels[:, ::-1] if flip else pixels) / 127.5 - 1).clip(-1, 1).transpose(2, 0, 1)

    decoded = decode_pixels(name, data, resolution, 3, (0.3, 0.8), flip)
    assert decoded.dtype == (torch.float32 if name in ("16 bits", "array") else torch.uint8)
    before = decoded.clone()
    np.testing.assert_array_equal(normalize_pixels(decoded).numpy(), expected, strict=True)
    assert torch.equal(decoded, before)


def test_flip_mirrors_left_and_right():
    data = encode(noise_image(0, 4, 6, 3))
    assert torch.equal(decode(data, (4, 6), flip=True), decode(data, (4, 6)).flip(-1))


def test_npy_keeps_any_number_of_channels():
    array = noise_image(0, 4, 6, 5)
    np.testing.assert_allclose(levels(decode(encode_npy(array), (4, 6), 5)), array, atol=ROUNDING)
    assert decode(encode_npy(array), (2, 2), 5).shape == (5, 2, 2)


def test_downscaling_is_antialiased():
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    torch.testing.assert_close(decode(encode(checkerboard), (8, 8), 1), torch.zeros(1, 8, 8), atol=0.06, rtol=0)


@pytest.mark.parametrize("crop_position", [0.0, 0.5, 1.0])
def test_any_size_can_be_resized(crop_position):
    """29 / 28 * 28 > 29 in floating point, as for many other pairs: the crop must not leave the image."""
    for source, size in itertools.product((7, 14, 29, 53, 55, 58, 123, 225), (28, 32, 49, 56, 100)):
        data = encode(PIL.Image.new("L", (source, source), 77))
        pixels = levels(decode(data, (size, size), 1, crop_position=(crop_position, crop_position)))
        np.testing.assert_allclose(pixels, np.full((size, size, 1), 77), atol=ROUNDING)


def huge_png() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels, which Pillow takes for an attack."""
    data = constant("L", 0)
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


PHOTO = noise_image(0, 32, 32, 3)
UNREADABLE = {
    "truncated.png": encode(PHOTO)[:900],
    "truncated.jpg": encode(PHOTO, "JPEG")[:900],
    "empty.png": b"",
    "text.png": b"this is no image",
    "huge.png": huge_png(),
    "float.tif": encode(np.zeros((4, 4), np.float32), "TIFF"),
    "float.npy": encode_npy(np.zeros((4, 4, 3), np.float32)),
    "scalar.npy": encode_npy(np.uint8(3)),
    "truncated.npy": encode_npy(PHOTO)[:900],
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "garbled.npy": encode_npy(PHOTO).replace(b"}", b" ", 1),
}


@pytest.mark.parametrize("keep_colour", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_is_named(name, keep_colour):
    with pytest.raises(BadImageError, match=name):
        decode_image(name, UNREADABLE[name], (4, 4), 3, keep_colour=keep_colour)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_does_not_stop_channel_detection(tmp_path, name):
    table = load_table(write_files(tmp_path / "f", {"good.png": encode(PHOTO), name: UNREADABLE[name]}))
    assert detect_num_channels(table) == 3


@pytest.mark.parametrize(
    ("name", "words"), [("float.npy", ["uint8", "float32", "(4, 4, 3)"]), ("pointer.png", ["git lfs pull"])]
)
def test_unreadable_file_says_what_it_is(name, words):
    with pytest.raises(BadImageError, match=mentions(name, *words)):
        decode_image(name, UNREADABLE[name], (4, 4), 3)


def test_wrong_number_of_channels_is_named():
    with pytest.raises(BadImageError, match=mentions("--num_channels", 5, "some.file")):
        decode(constant("L", 0), (4, 4), 5)


@pytest.fixture
def grey_folder_with_one_color(tmp_path: Path) -> Path:
    """130 images; 001.png is in color, and not among the 64 evenly spread ones that channel detection looks at."""
    return write_files(tmp_path / "f", {f"{i:03d}.png": i for i in range(130)} | {"001.png": constant("RGB", RED)})


def test_color_image_among_grayscale_is_an_error(grey_folder_with_one_color):
    dataset = make_dataset(grey_folder_with_one_color)
    assert dataset.num_channels == 1
    with pytest.raises(BadImageError, match=mentions("--num_channels 1", "001.png")):
        dataset[0, 1]


def test_color_is_converted_with_explicit_channels(grey_folder_with_one_color):
    dataset = make_dataset(grey_folder_with_one_color, num_channels=1, resolution=(4, 4))
    np.testing.assert_allclose(dataset[0, 1]["pixel_values"], np.full((1, 4, 4), 76), atol=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Bad images in a table


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_member_is_named(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
        archive.writestr("a.npy", encode_npy(noise_image(0, 40, 40) % 9))
    data = bytearray((tmp_path / "z.zip").read_bytes())
    data[60:90] = bytes(byte ^ 255 for byte in data[60:90])
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(BadImageError, match=r"a\.npy"):
        load_table(tmp_path / "z.zip").read(0)


def test_empty_row_of_parquet_is_named(tmp_path):
    table = load_table(write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0, None])))
    with pytest.raises(BadImageError, match=mentions("row 1", "a.parquet")):
        table.read(1)


def test_row_is_named_as_in_the_file_after_a_selection(tmp_path):
    table = load_table(write_parquet(tmp_path / "a.parquet", image=(IMAGE, [0, 1, 2, b"broken"])))
    with pytest.raises(BadImageError, match=mentions("row 3", "a.parquet")):
        decode_image(*table.select([2, 3]).read(1), (4, 4), 1)


def test_bad_image_is_an_error_by_default(class_folder):
    dataset = make_dataset(write_files(class_folder, {"a/4.png": b""}))
    with pytest.raises(BadImageError, match=r"a/4\.png"):
        for position in range(10):
            item_at(dataset, position)


def test_skipped_image_is_replaced_by_next_readable(class_folder):
    """Where the next readable image lies in the same epoch; positions of readable images do not change."""
    clean, dataset = (make_dataset(class_folder, num_channels=3, on_bad_image="skip") for _ in range(2))
    expected = {(p, i): clean[p, i] for p in range(40) for i in range(10)}
    bad = {index: clean.table.read(index)[0] for index in (2, 3, 6)}
    for path in bad.values():
        Path(path).write_bytes(b"")
    num_replaced = 0
    for position in range(40):
        tried = list(itertools.takewhile(lambda p: clean.stream.index(p) in bad, itertools.count(position)))
        found = position + len(tried)
        if found // 10 == position // 10:
            item = item_at(dataset, position)
            messages = item["bad_images"]
            assert_same(item | {"bad_images": []}, expected[position, clean.stream.index(found)])
            assert len(messages) == len(tried)
            assert all(bad[clean.stream.index(p)] in message for p, message in zip(tried, messages, strict=True))
            num_replaced += len(tried) > 0
    assert num_replaced > 5


def test_only_readable_image_is_found_from_every_position(class_folder):
    for path in set(class_folder.rglob("*.png")) - {class_folder / "a/4.png"}:
        path.write_bytes(b"")
    dataset = make_dataset(class_folder, on_bad_image="skip")
    for position in range(40):
        assert item_at(dataset, position)["class_labels"] == 0


def test_table_of_bad_images_only_is_an_error(class_folder):
    for path in class_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match=r"\.png"):
        make_dataset(class_folder, on_bad_image="skip")
    with pytest.raises(BadImageError, match=mentions(f"in {class_folder}", ".png")):
        item_at(make_dataset(class_folder, num_channels=3, on_bad_image="skip"), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors for training


def test_item_has_stated_shapes_and_ranges(class_folder):
    item = item_at(make_dataset(class_folder, resolution=(4, 6)), 17)
    shapes = {"pixel_values": (3, 4, 6), "noise": (3, 4, 6), "time_uniform": (), "dropout_uniform": ()}
    assert item.keys() == {"position", "class_labels", "bad_images", *shapes}
    assert item["position"] == 17 and item["bad_images"] == []
    assert item["class_labels"].dtype == torch.int64 and item["class_labels"].shape == ()
    assert {key: tuple(item[key].shape) for key in shapes} == shapes
    assert item.pop("pixel_values").dtype == torch.uint8
    assert {item[key].dtype for key in shapes if key in item} == {torch.float32}


def test_label_belongs_to_image(class_folder):
    dataset = make_dataset(class_folder, resolution=(6, 9))
    for position in range(10):
        path = Path(dataset.table.read(dataset.stream.index(position))[0])
        item = item_at(dataset, position)
        assert dataset.table.class_names[item["class_labels"]] == path.parent.name
        image = noise_image(int(path.stem), 6, 9, 3)
        np.testing.assert_array_equal(item["pixel_values"].permute(1, 2, 0), image)


def test_item_without_labels_has_no_class_labels(tmp_path):
    dataset = make_dataset(write_files(tmp_path / "f", {"a.png": 0, "b.png": 1}))
    assert "class_labels" not in batch_at(dataset, (0, 1))


def test_batch_puts_its_size_in_front(class_folder):
    write_files(class_folder, {"a/4.png": b"", "b/7.png": b"", "b/9.png": b""})
    dataset = make_dataset(class_folder, resolution=(4, 6), num_channels=3, on_bad_image="skip")
    items = [item_at(dataset, position) for position in range(5)]
    batch = contents_of(batch_at(dataset, range(5)))
    bad_images = batch.pop("bad_images")
    assert bad_images == [message for item in items for message in item["bad_images"]] and len(bad_images) > 1
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "pixel_values": (5, 3, 4, 6),
        "noise": (5, 3, 4, 6),
        **dict.fromkeys(("position", "class_labels", "time_uniform", "dropout_uniform"), (5,)),
    }
    assert batch["position"].tolist() == [0, 1, 2, 3, 4] and batch["class_labels"].dtype == torch.int64


def test_images_of_8_and_16_bits_share_a_batch_with_their_own_values(tmp_path):
    sixteen = noise_image(0, 4, 4).astype(np.uint16) * 256 + 77
    files = {"a.png": encode(noise_image(1, 4, 4)), "b.png": encode(sixteen)}
    dataset = make_dataset(write_files(tmp_path / "f", files), resolution=(4, 4))
    items = [dataset[position, position] for position in range(2)]
    assert [item["pixel_values"].dtype for item in items] == [torch.uint8, torch.float32]
    expected = torch.stack([decode(data, (4, 4), 1) for data in files.values()])
    for num_workers in (0, 1):  # a worker stacks in shared memory, whose type is that of the first image
        loader = load_batches(dataset, [[(0, 0), (1, 1)]], num_workers)
        assert torch.equal(normalize_pixels(next(iter(loader))["pixel_values"]), expected)


def test_noise_is_standard_normal(class_folder):
    dataset = make_dataset(class_folder, resolution=(32, 32))
    noise = torch.stack([item_at(dataset, position)["noise"] for position in range(40)])  # 122,880 numbers
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.015  # five standard errors
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.007  # likewise
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(40)).abs().max() < 0.1


@pytest.mark.parametrize("key", ["time_uniform", "dropout_uniform"])
def test_uniform_numbers_fill_unit_interval(class_folder, key):
    dataset = make_dataset(class_folder)
    values = torch.stack([item_at(dataset, position)[key] for position in range(400)])
    assert values.min() >= 0 and values.max() < 1
    assert (torch.histc(values, bins=4, min=0, max=1) - 100).abs().max() < 44  # five standard deviations


@pytest.fixture
def gradient_folder(tmp_path: Path) -> Path:
    """One image of 4 x 64 pixels whose brightness grows from left to right."""
    return write_files(tmp_path / "f", {"a.png": encode(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (4, 1)))})


@pytest.mark.parametrize(("random_flip", "fewest", "most"), [(True, 150, 250), (False, 0, 0)])
def test_random_flip_mirrors_half(gradient_folder, random_flip, fewest, most):
    dataset = make_dataset(gradient_folder, random_flip=random_flip)
    rows = [item_at(dataset, position)["pixel_values"][0, 0] for position in range(400)]
    assert fewest <= sum(bool(row[0] > row[-1]) for row in rows) <= most  # five standard deviations


@pytest.mark.parametrize("center_crop", [False, True])
def test_crop_is_central_or_anywhere(gradient_folder, center_crop):
    dataset = make_dataset(gradient_folder, resolution=(4, 4), center_crop=center_crop)
    images = [normalize_pixels(item_at(dataset, position)["pixel_values"]) for position in range(200)]
    brightness = [pixels.mean().item() for pixels in images]
    if center_crop:
        assert len(set(brightness)) == 1 and abs(brightness[0]) < 0.05
    else:
        assert min(brightness) < -0.8 and max(brightness) > 0.8 and len(set(brightness)) > 50


# ---------------------------------------------------------------------------------------------------------------------
# Validation split


# ---------------------------------------------------------------------------------------------------------------------
# The digest, by which a resumed run notices other data


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
def test_data_digest_notices_every_name_and_size(container, tmp_path):
    """Of 130 images, 64 are read."""
    files = {f"{i:03d}.png": constant("L", i) for i in range(130)}
    others = {"same": {}, "size": {"001.png": encode(noise_image(0, 9, 9, 3))}, "name": {}}
    tables = {}
    for case, change in others.items():
        changed = files | change
        if case == "name":
            changed["001a.png"] = changed.pop("001.png")
        (tmp_path / case).mkdir()
        tables[case] = load_table(write_files(tmp_path / case / container, changed))
    original = load_table(write_files(tmp_path / container, files))
    assert tables["same"].data_digest() == original.data_digest()  # wherever it lies
    assert len({table.digest() for table in tables.values()}) == 1  # reads images 0, 2, 4, ...
    assert len({table.data_digest() for table in tables.values()}) == 3


def test_data_digest_is_the_same_for_a_folder_and_its_zip(tmp_path):
    """Data are packed when they move to another machine."""
    files = {"a/1.png": 1, "b/2.png": 2, "b/x/3.png": 3}
    folder, archive = (load_table(write_files(tmp_path / name, files)) for name in ("f", "z.zip"))
    assert folder.data_digest() == archive.data_digest()


def test_data_digest_of_parquet_notices_every_size(tmp_path):
    images = [constant("L", i) for i in range(130)]
    first, same = (load_table(write_parquet(tmp_path / f"{x}.parquet", image=(IMAGE, images))) for x in "ab")
    images[1] = encode(noise_image(0, 9, 9, 3))
    other = load_table(write_parquet(tmp_path / "c.parquet", image=(IMAGE, images)))
    assert first.data_digest() == same.data_digest() != other.data_digest() and first.digest() == other.digest()
    assert first.select([0, 2]).data_digest() == other.select([0, 2]).data_digest() != first.data_digest()


def test_data_digest_of_an_earlier_version_is_compared_without_names_and_sizes():
    vae = " {'encoder_digest': 'a-b'}"
    assert is_same_data("aaaa-bbbb", "aaaa-bbbb") and is_same_data(f"aaaa-bbbb{vae}", f"aaaa-bbbb{vae}")
    assert is_same_data("aaaa", "aaaa-bbbb") and is_same_data(f"aaaa{vae}", f"aaaa-bbbb{vae}")
    assert not is_same_data("aaaa-cccc", "aaaa-bbbb") and not is_same_data("cccc", "aaaa-bbbb")
    assert not is_same_data(f"aaaa{vae}", "aaaa-bbbb")


def test_digest_of_contents_is_pinned(tmp_path):
    """Checkpoints of earlier versions hold it."""
    table = load_table(write_files(tmp_path / "f", {"a/1.npy": b"x", "b/2.npy": b"y"}))
    expected = hashlib.sha256(b'[2, [0, 1], ["a", "b"]]' + b"xy").hexdigest()[:16]
    assert table.digest() == expected and table.data_digest().startswith(f"{expected}-")


@pytest.fixture
def table_of_20(tmp_path: Path) -> ImageTable:
    """Image i of 20 has grey level i."""
    return load_table(write_files(tmp_path / "f", {f"{i:02d}.png": i for i in range(20)}))


@pytest.mark.parametrize(("fraction", "num_validation"), [(0.25, 5), (0.5, 10), (0.001, 1), (0.95, 19)])
def test_split_is_disjoint_and_covers_all(table_of_20, fraction, num_validation):
    training, validation = split_table(table_of_20, fraction)
    assert len(validation) == num_validation
    assert sorted(contents(training) + contents(validation)) == [(i,) for i in range(20)]


def test_split_is_the_same_for_every_seed(table_of_20):
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        splits.append(contents(split_table(table_of_20, 0.25)[1]))
    assert splits[0] == splits[1]
    assert splits[0] != contents(table_of_20)[:5]  # not simply the first ones


@pytest.mark.parametrize("fraction", [0.99, 1.0, 1.5])
def test_split_that_leaves_nothing_is_an_error(table_of_20, fraction):
    with pytest.raises(ValueError, match=mentions(f"--validation_fraction {fraction}")):
        split_table(table_of_20, fraction)


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize(
    ("training", "held_out"),
    [("train", "test"), ("Train", "Test"), ("images/train", "images/VAL"), ("train2017", "val2017")]
    + [("trainA", "testA"), ("x/y/training", "x/y/eval"), ("train_images", "dev_images")],
)
def test_training_and_held_out_folders_are_never_trained_on_together(training, held_out, container, tmp_path):
    files = {f"{training}/{name}": 1 for name in ("cat/0.png", "dog/1.png")} | {f"{held_out}/cat/2.png": 2}
    root = write_files(tmp_path / container, files)
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", training, held_out)):
        load_table(root)
    if container == "folder":
        assert contents(load_table(root / training)) == [(1, 0, "cat"), (1, 1, "dog")]
        assert contents(load_table(root / held_out)) == [(2,)]


def test_training_and_held_out_images_without_classes_are_never_trained_on_together(tmp_path):
    root = write_files(tmp_path / "f", {"train/1.png": 1, "test/2.png": 2})
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root / 'train'}", "test")):
        load_table(root)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/0000.parquet", "validation/0000.parquet"], ["train", "validation", "--train_data_dir {root}/train"]),
        (["train-00000-of-00001.parquet", "dev-0.PARQUET"], ["train-00000-of-00001.parquet", "--dataset_split"]),
        (["data/digits_train.parquet", "data/digits_test.parquet"], ["data/digits_test.parquet"]),
        (["a/train/0.parquet", "b/train/0.parquet"], ["a", "b"]),
    ],
)
def test_parquet_files_of_several_splits_or_configurations_are_refused(names, words, tmp_path):
    root = tmp_path / "set"
    for name in names:
        write_parquet(root / name, image=(IMAGE, [1]))
    words = [word.format(root=root) for word in words]
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", *words)):
        load_table(root)


@pytest.mark.parametrize(
    "names",
    [["valley.parquet", "train-0.parquet"], ["test-0.parquet", "test-1.PARQUET"]]
    + [["train/train-0.parquet", "train/train-1.parquet"]],
)
def test_parquet_files_that_are_of_one_split_are_all_read(names, tmp_path):
    for level, name in enumerate(names):
        write_parquet(tmp_path / "set" / name, image=(IMAGE, [level]))
    assert sorted(contents(load_table(tmp_path / "set"))) == [(0,), (1,)]


def test_label_column_that_cannot_apply_is_refused(tmp_path):
    write_files(tmp_path, {"cat/0.png": 0, "dog/1.png": 1})
    with pytest.raises(ValueError, match="--label_column kind"):
        load_image_table(SourceConfig(train_data_dir=str(tmp_path), label_column="kind"))
