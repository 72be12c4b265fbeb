# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images (or latents made of them before) to tensors, and the endless stream of positions that training reads.

Two ideas hold this file together:

* An `ImageTable` is a HuggingFace data set whose images are not decoded yet, wherever they come from: a hub data set,
  parquet, a folder, a zip. Decoding happens here, so that a bad image is reported by its name.
* Randomness is a function of the position in the stream, not a state. Position p of a table of n images is image
  `permutation(seed, p // n)[p % n]`, and everything else drawn for it comes from a generator seeded by (seed, p).
  Data-loader workers therefore hold no state, and a run resumes from one integer.

Data may come from strangers, so it can name no file outside of itself, and nothing is unpacked or decoded beyond
`MAX_FILE_BYTES` and `MAX_IMAGE_PIXELS`.

Shapes: B batch, C channels, H/W height/width in pixels, c channels and h/w height/width of latents, n images in the
table.
"""

import argparse
import contextlib
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError, DatasetsError
from diffusers import AutoencoderKL
from huggingface_hub import constants as hub_constants
from torch.utils.data import Sampler, default_collate

from diffit.errors import UserError, global_rank, load_model, user_errors
from diffit.run_dir import is_listed, our_files
from diffit_augment import draw_augmentation

IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Others are not even tried, whatever a file is called: for an EPS, Pillow would start Ghostscript.
PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 8192 * 8192  # 67 megapixels: a photo of 50 is read, one of 100 is refused
MAX_FILE_BYTES = 8 * MAX_IMAGE_PIXELS  # 512 MiB, unpacked: four channels of 16 bits for the largest image
MAX_CLASSES = 100_000  # so that one absurd label cannot fill the memory with names of classes
OUTSIDE_A_ZIP = re.compile(r"^/|(^|/)\.\.(/|$)|^[A-Za-z]:|\\")  # absolute, upwards, a drive, a Windows separator

logger = logging.getLogger("diffit_data")

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}

# Independent streams of random numbers for one (seed, position).
PERMUTATION, AUGMENTATION, DIFFUSION = range(3)


class BadImageError(UserError):
    """An image that cannot be read as asked; the message names its file."""

    raised_in = "process"  # the others read other images


# ---------------------------------------------------------------------------------------------------------------------
# The stream of positions


def position_generator(seed: int, position: int, stream: int) -> np.random.Generator:
    """Random numbers as a function of (seed, position): numpy's counter-based Philox, the same on every machine.

    Args:
        seed: any int from 0 to 2**64 - 1.
        position: any int from 0 to 2**64 - 1.
        stream: `PERMUTATION`, `AUGMENTATION` or `DIFFUSION`; different ones are independent.
    """
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, stream]))


class PositionStream:
    """Which image stands at which position: epoch after epoch, each in an order of its own.

    Args:
        num_images: images n in the table.
        seed: of the permutations.
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images = num_images
        self.seed = seed
        self._epoch, self._permutation = None, None

    def index(self, position: int) -> int:
        """Index in [0, n) of the image at a position: `permutation(seed, position // n)[position % n]`."""
        epoch, offset = divmod(position, self.num_images)
        if epoch != self._epoch:
            self._permutation = position_generator(self.seed, epoch, PERMUTATION).permutation(self.num_images)
            self._epoch = epoch
        return int(self._permutation[offset])


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (position, index) for one process; does its own sharding.

    Each micro-batch of all processes together covers the next `num_processes * batch_size` positions, so an optimizer
    step covers the same positions however they are shared among processes and accumulation.

    Args:
        stream: order of the images.
        batch_size: images per micro-batch and process B.
        start_position: first position to read.
        num_processes: number of processes.
        process_index: of this process, in [0, num_processes).
    """

    def __init__(
        self,
        stream: PositionStream,
        batch_size: int,
        start_position: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.stream = stream
        self.batch_size = batch_size
        self.start_position = start_position
        self.num_processes = num_processes
        self.process_index = process_index

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_position + self.process_index * self.batch_size
        while True:
            yield [(p, self.stream.index(p)) for p in range(first, first + self.batch_size)]
            first += self.num_processes * self.batch_size


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from


@dataclass(frozen=True)
class Table(ABC):
    """Images of some form, and their labels.

    Attributes:
        rows: data set with a row for each image.
        source: what the user named: a folder, a file or a data set; used in messages.
        indices: row of each of the n images in `rows`.
        labels: class of each row, in [0, number of classes), or None if there are no labels.
        class_names: name of each class, or None.
    """

    rows: Dataset
    source: str
    indices: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> int:
        """Class of an image, in [0, number of classes)."""
        return int(self.labels[self.indices[index]])

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The bytes of an image, for `digest`.

        Raises:
            BadImageError: if it cannot be read.
        """

    def with_class_names(self, class_names: tuple[str, ...]) -> Self:
        """The same images with their classes numbered as in another table, by their names.

        Raises:
            ValueError: if there are no labels, or a class that the other table does not have.
        """
        names = self.class_names or ()
        unknown = sorted(set(names) - set(class_names))
        if not names or unknown:
            raise UserError(f"{self.source} has {f'the unknown classes {unknown[:5]}' if names else 'no labels'}")
        numbers = np.array([class_names.index(name) for name in names])
        return replace(self, labels=numbers[self.labels], class_names=class_names)

    def select(self, indices: list[int]) -> Self:
        """The table of these images, in this order."""
        return replace(self, indices=self.indices[indices])

    def digest(self, num_images: int = 64) -> str:
        """A checksum of number, labels and class names, and of the bytes of some images that are evenly spread.

        Tells whether several machines see the same images, wherever those lie.
        """
        labels = None if self.labels is None else self.labels[self.indices].tolist()
        digest = hashlib.sha256(json.dumps([len(self), labels, self.class_names]).encode())
        for index in np.linspace(0, len(self) - 1, min(num_images, len(self))).astype(int):
            with contextlib.suppress(BadImageError):  # reported when it is read for training
                digest.update(self.content(int(index)))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageTable(Table):
    """Images that are not decoded: `rows` has the column `image` ({"bytes", "path"}).

    Attributes:
        archive: the zip that the paths are in, or None.
        folders: where files may lie that rows without bytes name, as real paths, the first for relative names; None:
            anywhere, because the paths are not the data's own but were found in a folder.
    """

    archive: str | None = None
    folders: tuple[str, ...] | None = None

    def content(self, index: int) -> bytes:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[str, bytes]:
        """A name for messages and the undecoded bytes of an image.

        Raises:
            BadImageError: if the file cannot be read.
        """
        row = int(self.indices[index])
        image = self.rows[row]["image"] or {"bytes": None, "path": None}
        path = image["path"]
        if self.archive is not None:
            name = f"{path} in {self.archive}"
        elif image["bytes"] is None and path is not None:
            name = path
        else:
            name = f"row {row} of {self.source}" + (f" ({path})" if path else "")
        if image["bytes"] is not None:
            return name, image["bytes"]
        if path is None:
            raise BadImageError(f"no image in {name}")
        archive, file = (self.archive, path) if self.folders is None else self._locate(row, path)
        try:
            return name, _read_file(file) if archive is None else _read_from_zip(archive, file)
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImageError(f"cannot read image {name}: {error}") from error

    def _locate(self, row: int, path: str) -> tuple[str | None, str]:
        """Where the image is that a row names but does not hold: its zip, or None, and its name.

        Raises:
            BadImageError: if that is not among the files of the data set.
        """
        entry = re.fullmatch(r"zip://(.+)::(.+)", path)  # how `datasets` names a file in a zip
        file = entry[2] if entry else path
        real_path = os.path.realpath(os.path.join(self.folders[0], file))
        if "://" in file or not any(Path(real_path).is_relative_to(folder) for folder in self.folders):
            raise BadImageError(
                f"row {row} of {self.source} has no bytes but the path {path}, which is not of this data set: it "
                f"must be a file in {self.folders[0]}; nothing else is read, and nothing is downloaded"
            )
        return (real_path, entry[1]) if entry else (None, real_path)


_open_zips: dict[str, tuple[int, zipfile.ZipFile]] = {}


def _open_zip(path: str) -> zipfile.ZipFile:
    # One handle for each process: a forked worker must not share its parent's file offset.
    pid, handle = _open_zips.get(path, (None, None))
    if pid != os.getpid():
        handle = zipfile.ZipFile(path)
        _open_zips[path] = (os.getpid(), handle)
    return handle


def _read_from_zip(archive: str, name: str) -> bytes:
    handle = _open_zip(archive)
    entry = handle.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be unpacked bit by bit
        raise BadImageError(
            f"{name} in {archive} is packed by method {entry.compress_type}: pack it stored or deflated"
        )
    _check_file_size(f"{name} in {archive}", entry.file_size)
    with handle.open(entry) as file:
        # `ZipFile.read` would unpack all that the entry holds, which may be far more than the size that it states.
        return file.read(entry.file_size + 1)


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        _check_file_size(path, os.fstat(file.fileno()).st_size)
        return file.read()


def _check_file_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise BadImageError(
            f"{name} has {num_bytes:,} bytes (unpacked), more than the {MAX_FILE_BYTES:,} that are read"
        )


def _list_folder(root: Path) -> list[str]:
    """Names of the files in a folder and its sub-folders, relative to it and sorted; hidden ones are left out.

    A link to a folder within `root` is not followed: its files are found where they are.

    Raises:
        UserError: names a link that leads out of `root` or nowhere, or a folder that cannot be read.
    """
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    if entry.is_symlink():
                        _check_link(root, entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif entry.is_file():
                        names.append(folder + entry.name)
        except OSError as error:
            raise UserError(f"--train_data_dir: cannot list {root / folder}: {error.strerror}") from error
    return _without_products(root, sorted(names))


def _without_products(root: Path, names: list[str]) -> list[str]:
    """Names of files without those that training, sampling and evaluation have written (see `diffit.run_dir`).

    How many images that leaves out is logged. Of a folder of samples that is `root` itself, the samples are data.
    """
    folders = {folder for name in names for folder in PurePosixPath(name).parents}
    marks = {folder: files for folder in folders if (files := our_files(root / folder))}
    above = {folder: files for folder in root.resolve().parents if (files := our_files(folder))}  # as of RUN/previews
    asked_for = listed_samples(root)
    kept, left_out = [], {}
    for name in names:
        path, full_path = PurePosixPath(name), root.resolve() / name
        owners = [
            folder for folder in path.parents if is_listed(path.relative_to(folder).as_posix(), marks.get(folder, ()))
        ]
        owners += [
            folder for folder, files in above.items() if is_listed(full_path.relative_to(folder).as_posix(), files)
        ]
        if not owners or name in asked_for:
            kept.append(name)
        elif path.suffix.lower() in IMAGE_EXTENSIONS | {".parquet"}:
            left_out[owners[0]] = left_out.get(owners[0], 0) + 1
    if left_out and global_rank() == 0:
        places = ", ".join(sorted(str(root / folder) for folder in left_out))
        logger.warning(f"{root}: left out {sum(left_out.values())} files that DiffiT has written, in {places}")
    return kept


def listed_samples(root: Path) -> set[str]:
    """Names of the images that `samples.json` of `sample_diffit.py` lists; none if it is not of that form."""
    try:
        summary = json.loads((root / "samples.json").read_text(encoding="utf-8"))
        return {str(row["file"]) for row in summary["images"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _check_link(root: Path, link: str) -> None:
    target = os.path.realpath(link)
    if not Path(target).is_relative_to(os.path.realpath(root)):
        raise UserError(
            f"--train_data_dir {root}: {link} is a link to {target}, outside of the folder. Links that leave it are "
            f"not followed: copy or hard-link the files (`cp -rL {root} COPY`, or `cp -rlL`, which takes no space), "
            "or give the folder that holds the files themselves"
        )
    if not os.path.exists(target):
        raise UserError(f"--train_data_dir {root}: {link} is a link to {target}, which does not exist")


def _list_zip(root: Path) -> list[str]:
    """Names of the files in a zip, sorted; hidden ones are left out.

    Raises:
        ValueError: names an entry whose name leads out of the archive.
    """
    names = []
    for entry in _open_zip(str(root)).infolist():
        if OUTSIDE_A_ZIP.search(entry.filename):
            raise UserError(
                f"--train_data_dir {root}: the entry {entry.filename!r} has a name that leads out of the archive; "
                "names must be relative, with / between folders. Pack it anew, or unpack it with a tool you trust"
            )
        if not entry.is_dir() and not any(_is_hidden(part) for part in entry.filename.split("/")):
            names.append(entry.filename)
    return sorted(names)


def positive_int(text: str) -> int:
    """An int from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def resolution_type(text: str) -> tuple[int, int]:
    """An argparse type: height and width in pixels from `N` or `HxW`."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or 0 in (size := (int(match[1]), int(match[2] or match[1]))):
        raise argparse.ArgumentTypeError(f"expected N or HxW with positive numbers, got {text!r}")
    return size


def load_image_table(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    train_data_dir: str | None = None,
    train_data_file: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> ImageTable:
    """Finds the images and labels of one of the three sources. Nothing is decoded.

    Args:
        dataset_name: hub name, or local path for `datasets.load_dataset`.
        dataset_config_name: its configuration.
        dataset_split: its split.
        train_data_dir: folder or zip of images, with class sub-folders, `dataset.json` (StyleGAN and EDM format),
            `metadata.jsonl`, or parquet files.
        train_data_file: one parquet file.
        image_column: column of the images; None: the only one of type `Image`.
        label_column: column of the labels; None: the only one of type `ClassLabel`, if there is one.
        cache_dir: of `load_dataset`.

    Raises:
        ValueError: if there is not exactly one source, or a file or column is missing or ambiguous.
    """
    sources = {
        "--dataset_name": dataset_name,
        "--train_data_dir": train_data_dir,
        "--train_data_file": train_data_file,
    }
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"give exactly one of {', '.join(sources)}; got {' and '.join(given) or 'none'}")

    if dataset_name is not None:
        _check_dataset_folder(Path(dataset_name))
        failures = (OSError, ValueError, DatasetsError)  # not there, no such configuration or split, damaged
        with user_errors(f"--dataset_name {dataset_name} (--dataset_split {dataset_split})", *failures):
            rows = load_dataset(dataset_name, dataset_config_name, split=dataset_split, cache_dir=cache_dir)
        # `datasets` keeps what it downloads and unpacks in its caches.
        caches = [datasets_config.HF_DATASETS_CACHE, datasets_config.DOWNLOADED_DATASETS_PATH]
        caches += [datasets_config.EXTRACTED_DATASETS_PATH, hub_constants.HF_HUB_CACHE, cache_dir]
        local = dataset_name if Path(dataset_name).is_dir() else None
        folders = tuple(os.path.realpath(folder) for folder in (local, *caches) if folder is not None)
        source = f"{dataset_name} ({dataset_split})"
        return _table_from_columns(rows, source, image_column, label_column, folders)
    if train_data_file is not None:
        if not Path(train_data_file).is_file():
            raise UserError(f"--train_data_file: no such file: {train_data_file}")
        rows = _read_parquet([train_data_file], cache_dir)
        folders = (os.path.realpath(Path(train_data_file).parent),)
        return _table_from_columns(rows, train_data_file, image_column, label_column, folders)

    root = Path(train_data_dir)
    if root.is_dir():
        files = _list_folder(root)
    elif zipfile.is_zipfile(root):
        files = _list_zip(root)
    else:
        raise UserError(f"--train_data_dir: neither a folder nor a zip: {root}")
    parquet = [name for name in files if name.endswith(".parquet")]
    if not parquet or root.is_file():
        return _table_from_files(root, files, label_column)
    other_splits = [name for name in parquet if PurePosixPath(name).name.startswith(("test", "val"))]
    if other_splits and len(other_splits) < len(parquet):
        raise UserError(
            f"--train_data_dir {root} holds several splits ({other_splits[0]}): use --dataset_name {root} with "
            "--dataset_split, or --train_data_file"
        )
    rows = _read_parquet([str(root / name) for name in parquet], cache_dir)
    return _table_from_columns(rows, str(root), image_column, label_column, (os.path.realpath(root),))


def _check_dataset_folder(root: Path) -> None:
    """Refuses a local folder for `datasets.load_dataset`, which lists it itself, if products of ours are in it."""
    for folder, _, names in os.walk(root) if root.is_dir() else ():
        files = our_files(Path(folder)) if {".diffit.json", "training_args.yaml", "samples.json"} & set(names) else {}
        images = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
        if images:
            raise UserError(
                f"--dataset_name {root} holds images that DiffiT has written, such as {Path(folder, images[0])}: move "
                "them away, or give the folder as --train_data_dir, which leaves them out"
            )


def _read_parquet(paths: list[str], cache_dir: str | None) -> Dataset:
    files = [glob.escape(os.path.abspath(path)) for path in paths]  # `datasets` takes them for patterns
    try:
        return load_dataset("parquet", data_files=files, split="train", cache_dir=cache_dir)
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"cannot read parquet {', '.join(paths)}: {error.__cause__ or error}") from error


def _table_from_columns(
    rows: Dataset, source: str, image_column: str | None, label_column: str | None, folders: tuple[str, ...]
) -> ImageTable:
    if isinstance(rows, DatasetDict):
        raise UserError(f"{source}: --dataset_split must name one of {list(rows)}")
    features = rows.features
    image_column = _find_column(source, "--image_column", image_column, features, Image, required=True)
    label_column = _find_column(source, "--label_column", label_column, features, ClassLabel, required=False)
    kind = features[image_column]
    plain = getattr(kind, "dtype", None) in ("binary", "large_binary", "string")
    if not isinstance(kind, Image) and not plain and not (isinstance(kind, dict) and "bytes" in kind):
        raise UserError(f"--image_column {image_column} of {source} holds no images but {kind}")

    images = rows.select_columns([image_column]).rename_columns({image_column: "image"})
    images = images.cast_column("image", Image(decode=False))
    indices = np.arange(len(images))
    if label_column is None:
        return ImageTable(images, source, indices, folders=folders)
    kind = features[label_column]
    names = kind.names if isinstance(kind, ClassLabel) else None
    labels, names = _encode_labels(list(rows[label_column]), f"--label_column {label_column} of {source}", names)
    return ImageTable(images, source, indices, labels, names, folders=folders)


def _find_column(
    source: str, flag: str, name: str | None, features: Features, kind: type, required: bool
) -> str | None:
    if name is not None:
        if name not in features:
            raise UserError(f"{flag} {name}: {source} has the columns {', '.join(features)}")
        return name
    candidates = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(candidates) > 1:
        raise UserError(f"{source} has several columns of type {kind.__name__}, choose by {flag}: {candidates}")
    if not candidates and required:
        raise UserError(f"{source} has no column of type {kind.__name__}; {flag} must name one of {list(features)}")
    return candidates[0] if candidates else None


def _encode_labels(
    values: list[int | str], source: str, names: list[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each image and the names of the classes, from class names or from numbers, which keep their values."""
    distinct = set(values)
    if distinct and all(isinstance(value, str) for value in distinct):
        numeric = all(value.isdecimal() for value in distinct)
        names = sorted(distinct, key=(lambda name: (int(name), name)) if numeric else None)  # "2" before "10"
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers[value] for value in values]
    elif all(type(value) is int and 0 <= value < len(names or range(MAX_CLASSES)) for value in distinct):
        names = names or [str(number) for number in range(max(distinct) + 1)]
    else:
        most = len(names or range(MAX_CLASSES)) - 1
        wrong = sorted(str(value) for value in distinct if type(value) is not int or not 0 <= value <= most)
        raise UserError(f"{source}: labels must be class names or integers from 0 to {most}, one kind: {wrong[:5]}")
    return np.array(values, np.int64), tuple(names)


def _table_from_files(root: Path, files: list[str], label_column: str | None) -> ImageTable:
    """Images in a folder or zip, with the labels that its layout gives.

    Labels come from `dataset.json`, else `metadata.jsonl`, else the names of the first-level sub-folders, provided
    that every image lies in one and there are several.
    """

    def read_bytes(name: str) -> bytes:
        return _read_file(str(root / name)) if root.is_dir() else _read_from_zip(str(root), name)

    names = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
    if not names:
        raise UserError(f"--train_data_dir: no images in {root} (extensions: {', '.join(sorted(IMAGE_EXTENSIONS))})")
    labels = None
    if "dataset.json" in files:
        source = f"dataset.json in {root}"
        listed = _parse_json(read_bytes("dataset.json"), source).get("labels")
        if listed is not None:
            labels = _check_listed(listed, names, source)
    elif "metadata.jsonl" in files:
        source = f"metadata.jsonl in {root}"
        lines = [line for line in read_bytes("metadata.jsonl").split(b"\n") if line.strip()]
        records = [_parse_json(line, source) for line in lines]
        column = label_column or "label"
        if label_column is not None and not any(column in record for record in records):
            raise UserError(f"--label_column {label_column}: {source} has no such key")
        listed = _check_listed([[record.get("file_name"), record.get(column)] for record in records], names, source)
        names = [name for name in names if name in listed]
        if not names:
            raise UserError(f"{source} names no image")
        if any(label is not None for label in listed.values()):
            labels = listed
    elif all("/" in name for name in names) and len({name.split("/")[0] for name in names}) > 1:
        labels = {name: name.split("/")[0] for name in names}
        if set(labels.values()) <= SPLIT_NAMES and all(name.count("/") > 1 for name in names):
            raise UserError(f"--train_data_dir {root} holds splits, not classes: give one of {set(labels.values())}")
    if label_column is not None and "metadata.jsonl" not in files:
        raise UserError(f"--label_column {label_column}: only metadata.jsonl has columns, and {root} has none")

    archive = str(root) if root.is_file() else None
    paths = names if archive else [str(root / name) for name in names]
    images = {"image": [{"bytes": None, "path": path} for path in paths]}
    table = ImageTable(
        Dataset.from_dict(images, features=Features({"image": Image(decode=False)})),
        str(root),
        np.arange(len(names)),
        archive=archive,
    )
    if labels is None:
        return table
    missing = [name for name in names if labels.get(name) is None]
    if missing:
        raise UserError(f"{root}: {len(missing)} images have no label, the first is {missing[0]}")
    numbers, class_names = _encode_labels([labels[name] for name in names], str(root))
    return replace(table, labels=numbers, class_names=class_names)


def _parse_json(text: bytes, name: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of the encoding, too
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _check_listed(listed: list, names: list[str], source: str) -> dict[str, int | str | None]:
    """Labels by file name, from pairs of the two."""
    if not isinstance(listed, list):
        raise UserError(f"{source}: expected a list of [file name, label], got {listed!r}")
    known = set(names)
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(f"{source}: expected [file name, label], got {entry!r}")
        if entry[0] not in known:
            raise UserError(f"{source} names an image that is not there: {entry[0]!r}")
        if not isinstance(entry[1], int | str | None):
            raise UserError(f"{source}: the label of {entry[0]} must be a class name or a number, got {entry[1]!r}")
    return dict(listed)


def split_table(table: Table, validation_fraction: float) -> tuple[Table, Table]:
    """Splits off a validation set, the same for every seed, so that runs can be compared.

    Args:
        table: all images.
        validation_fraction: share in (0, 1) that is held out, at least one image.

    Returns:
        Training and validation images.
    """
    order = PositionStream(len(table), seed=0)
    num_validation = max(1, round(len(table) * validation_fraction))
    if num_validation >= len(table):
        raise UserError(f"--validation_fraction {validation_fraction} leaves none of {len(table)} images to train on")
    held_out = {order.index(position) for position in range(num_validation)}
    training = [index for index in range(len(table)) if index not in held_out]
    return table.select(training), table.select(sorted(held_out))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _open_image(name: str, data: bytes) -> PIL.Image.Image | np.ndarray:
    """An image whose pixels are not decoded yet, of at most `MAX_IMAGE_PIXELS`."""
    if not data:
        raise BadImageError(f"image is empty (0 bytes): {name}")
    if data[:6] == b"\x93NUMPY":
        return _open_array(name, data)
    try:
        with warnings.catch_warnings(
            category=PIL.Image.DecompressionBombWarning, action="ignore"
        ):  # our limit is less
            image = PIL.Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise BadImageError(f"damaged, or no image of the formats {', '.join(PILLOW_FORMATS)}: {name}") from error
    except PIL.Image.DecompressionBombError as error:
        raise _too_large(name, f"more than {2 * PIL.Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImageError(f"cannot decode image {name}: {error}") from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{image.width} x {image.height} pixels")
    return image


def _open_array(name: str, data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy parses the header as Python: any error may come of it
        raise BadImageError(f"cannot decode array {name}: {error}") from error
    if dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImageError(f"array must be uint8 or uint16 of shape H x W or H x W x C: {name}")
    if shape[0] * shape[1] > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{shape[1]} x {shape[0]} pixels")
    # The file's own bytes, not `np.load`, which would allocate whatever the header promises.
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise BadImageError(f"cannot decode array: its header says {shape}, which is not the size of the file: {name}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")


def _too_large(name: str, size: str) -> BadImageError:
    return BadImageError(
        f"image of {size}, more than the {MAX_IMAGE_PIXELS:,} that are read; shrink it first, for example by "
        f"`mogrify -resize 4096x4096 FILE` of ImageMagick: {name}"
    )


def _has_transparency(image: PIL.Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _natural_channels(image: PIL.Image.Image | np.ndarray) -> int:
    """Channels that an image has by itself: transparency does not count, it is composed on white."""
    if isinstance(image, np.ndarray):
        return 1 if image.ndim == 2 else image.shape[-1]
    return 1 if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else 3


def _planes(image: PIL.Image.Image | np.ndarray, name: str, num_channels: int) -> list[PIL.Image.Image]:
    """An image as PIL images with values in [0, 255] that together have `num_channels` channels."""
    if isinstance(image, np.ndarray):
        image = image.reshape(*image.shape[:2], -1).astype(np.float32) * (255 / np.iinfo(image.dtype).max)
        planes = [PIL.Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        planes = planes * num_channels if len(planes) == 1 else planes
    elif image.mode == "F":
        raise BadImageError(f"floating point image, whose range is unknown: {name}")
    elif image.mode.startswith("I"):  # 16 bits, kept as they are rather than cut to 8
        values = np.asarray(PIL.ImageOps.exif_transpose(image)).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError(f"integer image with values outside [0, 65535]: {name}")
        planes = [PIL.Image.fromarray(values * (255 / 65535))] * min(num_channels, 3)
        if num_channels == 4:
            planes.append(PIL.Image.new("F", planes[0].size, 255))  # opaque
    else:
        PIL.ImageOps.exif_transpose(image, in_place=True)
        if num_channels == 4:
            return [image.convert("RGBA")]
        if _has_transparency(image):
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        mode = "L" if num_channels == 1 else "RGB"
        planes = [image if image.mode == mode else image.convert(mode)]
    if sum(len(plane.getbands()) for plane in planes) != num_channels:
        raise BadImageError(f"image does not have the {num_channels} channels of --num_channels: {name}")
    return planes


def decode_pixels(
    name: str,
    data: bytes,
    resolution: tuple[int, int],
    num_channels: int,
    crop_position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    keep_colour: bool = False,
) -> torch.Tensor:
    """Decodes, crops to the aspect ratio of `resolution`, resizes (Lanczos, antialiased) and flips one image.

    Transparency is composed on white unless `num_channels` is 4, EXIF rotation is applied, of an animation the first
    frame is taken, 16-bit images are scaled, not cut.

    Args:
        name: used in messages.
        data: the file's bytes; of `PILLOW_FORMATS`, or `.npy` of uint8 or uint16 with any number of channels.
        resolution: height H and width W of the result.
        num_channels: channels C of the result.
        crop_position: where the crop lies in what is left over, (top to bottom, left to right), each in [0, 1].
        flip: mirror left and right.
        keep_colour: refuse an image with more channels than `num_channels` rather than drop its colours.

    Returns:
        Shape (C, H, W), grey levels for `normalize_pixels`: uint8, or float32 for images of 16 bits and for arrays.

    Raises:
        BadImageError: names the image, for a file that is empty, truncated, no image, of an unusable mode, or of
            more than `MAX_IMAGE_PIXELS`.
    """
    height, width = resolution
    try:
        image = _open_image(name, data)
        if keep_colour and _natural_channels(image) > num_channels:
            raise BadImageError(
                f"image has colours, but those looked at were grayscale (--num_channels {num_channels} was chosen "
                f"by them; give it to convert): {name}"
            )
        planes = _planes(image, name, num_channels)
    except BadImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise BadImageError(f"cannot decode image {name}: {error}") from error
    image_width, image_height = planes[0].size
    scale = min(image_height / height, image_width / width)
    top = max(0.0, image_height - height * scale) * crop_position[0]  # rounding may leave less than nothing
    left = max(0.0, image_width - width * scale) * crop_position[1]
    box = (left, top, min(left + width * scale, image_width), min(top + height * scale, image_height))
    if (image_width, image_height) != (width, height):
        planes = [plane.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box) for plane in planes]
    if flip:
        planes = [plane.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for plane in planes]
    pixels = np.stack([np.asarray(band) for plane in planes for band in plane.split()])  # (C, H, W)
    if pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 255)  # resizing overshoots where it does not round to bytes
    return torch.from_numpy(pixels)


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Grey levels of `decode_pixels` to float32 in [-1, 1]. The device does it: workers pass on a byte for each.

    Args:
        pixels: levels in [0, 255], uint8 or float32; any shape.
    """
    # Not by a number, of which CUDA would multiply by the reciprocal: the last bit would depend on the device.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32, copy=True).div_(half).sub_(1)


def decode_image(*args, **kwargs) -> torch.Tensor:
    """The image of `decode_pixels`, which has the same arguments, shape (C, H, W), float32 in [-1, 1]."""
    return normalize_pixels(decode_pixels(*args, **kwargs))


def image_size(name: str, data: bytes) -> tuple[int, int]:
    """Height and width in pixels of an image as it is decoded, that is with its EXIF rotation applied.

    Args:
        name: used in messages.
        data: the file's bytes.
    """
    image = _open_image(name, data)
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def detect_num_channels(table: ImageTable, num_images: int = 64) -> int:
    """Channels that the images have, by a look at some that are evenly spread: the most that one of them has.

    Raises:
        BadImageError: if none of them can be opened.
    """
    found, last_error = [], None
    for index in np.linspace(0, len(table) - 1, min(num_images, len(table))).astype(int):
        try:
            name, data = table.read(int(index))
            found.append(_natural_channels(_open_image(name, data)))
        except BadImageError as error:
            last_error = error
    if not found:
        raise last_error
    return max(found)


# ---------------------------------------------------------------------------------------------------------------------
# Latents

LATENTS_METADATA = "latents.json"  # in the folder that `scripts/prepare_latents.py` writes
LATENTS_METADATA_TYPES = {
    **{"encoder_digest": str, "scaling_factor": float, "shift_factor": float, "resolution": list},
    **{"latent_shape": list, "mirrored": bool, "num_images": int, "data_digest": str, "images_per_shard": int},
}


def load_vae(name_or_path: str) -> AutoencoderKL:
    """The frozen VAE of a folder or a hub name, in float32.

    Raises:
        ValueError: names --vae_model_name_or_path, if there is no `AutoencoderKL` in safetensors.
    """
    what = f"--vae_model_name_or_path {name_or_path}: cannot read an AutoencoderKL in safetensors"
    vae = load_model(what, AutoencoderKL.from_pretrained, name_or_path, use_safetensors=True)
    return vae.eval().requires_grad_(False)


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Pixels in height and width that become one latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_latent_shape(vae: AutoencoderKL, resolution: tuple[int, int]) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents of images of `resolution` (H, W).

    Raises:
        ValueError: names --resolution, if the VAE cannot divide it.
    """
    factor = pixels_per_latent(vae)
    height, width = resolution
    if height % factor or width % factor:
        raise UserError(f"--resolution {height}x{width}: the VAE needs multiples of {factor}")
    return vae.config.latent_channels, height // factor, width // factor


def vae_description(vae: AutoencoderKL) -> dict:
    """What latents depend on: `encoder_digest`, `scaling_factor` and `shift_factor` (0 if the VAE has none).

    Decoders may differ: the improved ones of Stable Diffusion read the latents of the first encoder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
    return {
        "encoder_digest": digest.hexdigest()[:16],
        "scaling_factor": float(vae.config.scaling_factor),
        "shift_factor": float(vae.config.shift_factor or 0.0),
    }


def encode_moments(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of the posterior of a VAE.

    Args:
        images: shape (B, C, H, W), float32 in [-1, 1].

    Returns:
        Shape (B, 2c, h, w), float32: c channels of means, then c of log-variances.
    """
    with torch.no_grad():
        return vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()


def sample_latents(
    moments: torch.Tensor, posterior_noise: torch.Tensor, scaling_factor: float, shift_factor: float = 0.0
) -> torch.Tensor:
    """Latents to train on, drawn from the posterior of a VAE: the reverse of what a pipeline does before it decodes.

    Args:
        moments: means, then log-variances (which are clamped to [-30, 20], as in diffusers); shape (B, 2c, h, w).
        posterior_noise: standard normal; shape (B, c, h, w).
        scaling_factor: of the VAE's config.
        shift_factor: of the VAE's config.

    Returns:
        Shape (B, c, h, w).
    """
    mean, logvar = moments.chunk(2, dim=1)  # (B, c, h, w) each
    latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * posterior_noise
    return (latents - shift_factor) * scaling_factor


@dataclass(frozen=True)
class LatentTable(Table):
    """Moments of images and of their mirror images, written by `scripts/prepare_latents.py`.

    `rows`, in the format of Arrow, has the columns `moments` and perhaps `mirrored_moments` (2c, h, w), and
    `bad_image`: null, or why there are none.

    Attributes:
        metadata: of the folder: the VAE's `vae_description`, `resolution` [H, W], `latent_shape` [c, h, w],
            `mirrored`, `data_digest` of the images, and more.
    """

    metadata: dict = field(kw_only=True)

    def content(self, index: int) -> bytes:
        # Of the images: latents differ in the last bit if they were made in other batches.
        return f"{self.metadata['data_digest']} {int(self.indices[index])}".encode()

    def read(self, index: int, mirrored: bool = False) -> torch.Tensor:
        """Moments of an image or of its mirror image, shape (2c, h, w), float32.

        Raises:
            BadImageError: if the image could not be read when the latents were prepared.
        """
        row = self.rows[int(self.indices[index])]  # of Arrow: only the column that is asked for becomes an array
        if (message := row["bad_image"][0].as_py()) is not None:
            raise BadImageError(f"no latents in {self.source}: {message}")
        column = row["mirrored_moments" if mirrored else "moments"]
        return torch.tensor(column.chunk(0).to_numpy()[0])


def latent_shard_names(num_images: int, images_per_shard: int) -> list[str]:
    """Names of the parquet files in a folder of latents, as on the HuggingFace hub; the last may hold fewer images."""
    num_shards = math.ceil(num_images / images_per_shard)
    return [f"data/train-{shard:05d}-of-{num_shards:05d}.parquet" for shard in range(num_shards)]


def latent_features(
    latent_shape: tuple[int, int, int], mirrored: bool, class_names: tuple[str, ...] | None
) -> Features:
    """Columns of prepared latents, see `LatentTable`, and `label` if there are classes."""
    channels, height, width = latent_shape
    moments = Array3D((2 * channels, height, width), "float32")
    features = {"moments": moments} | ({"mirrored_moments": moments} if mirrored else {})
    features["bad_image"] = Value("string")
    if class_names is not None:
        features["label"] = ClassLabel(names=list(class_names))
    return Features(features)


def load_latent_table(latents_dir: str, cache_dir: str | None = None) -> LatentTable:
    """Opens a folder that `scripts/prepare_latents.py` has written.

    Args:
        latents_dir: the folder.
        cache_dir: of `load_dataset`.

    Raises:
        ValueError: if it is no such folder, not complete, or its shards are not what its metadata says.
    """
    root = Path(latents_dir)
    if not (root / LATENTS_METADATA).is_file():
        raise UserError(f"--latents_dir {root}: no {LATENTS_METADATA} there; scripts/prepare_latents.py writes one")
    metadata = _parse_json((root / LATENTS_METADATA).read_bytes(), str(root / LATENTS_METADATA))
    for name, kind in LATENTS_METADATA_TYPES.items():
        if not isinstance(metadata.get(name), kind):
            raise UserError(f"--latents_dir {root}: {LATENTS_METADATA} says {name} {metadata.get(name)!r}")
    names = latent_shard_names(metadata["num_images"], metadata["images_per_shard"])
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"--latents_dir {root}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}; "
            "run the command of scripts/prepare_latents.py again, it goes on where it ended"
        )
    rows = _read_parquet([str(root / name) for name in names], cache_dir)
    class_names = tuple(rows.features["label"].names) if "label" in rows.features else None
    features = latent_features(metadata["latent_shape"], metadata["mirrored"], class_names)
    if rows.features != features or len(rows) != metadata["num_images"]:
        raise UserError(
            f"--latents_dir {root}: the shards hold {len(rows)} rows of {rows.features}, {LATENTS_METADATA} says "
            f"{metadata['num_images']} of {features}; prepare the latents anew, in another folder"
        )
    labels = None if class_names is None else np.array(rows["label"], np.int64)
    columns = [name for name in rows.features if name != "label"]
    table = rows.select_columns(columns).with_format("arrow")
    return LatentTable(table, str(root), np.arange(len(rows)), labels, class_names, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors for training


class StreamDataset(torch.utils.data.Dataset, ABC):
    """What training needs at a position of the stream: an image, its label, and the random numbers drawn for it.

    Args:
        table: where the images are.
        stream: order of the images, for replacing bad ones.
        random_flip: mirror half of the images left and right.
        on_bad_image: `"error"`, or `"skip"`: take the next readable image of the permutation and report the name.
        latent_shape: shape (c, h, w) of the latents to train on; None: training in pixels.
        augment: draw the numbers of `diffit_augment`.
    """

    def __init__(
        self,
        table: Table,
        stream: PositionStream,
        random_flip: bool,
        on_bad_image: str,
        latent_shape: tuple[int, int, int] | None,
        augment: bool = False,
    ):
        self.table = table
        self.stream = stream
        self.random_flip = random_flip
        self.on_bad_image = on_bad_image
        self.latent_shape = latent_shape
        self.augment = augment

    def __getitem__(self, position_and_index: tuple[int, int]) -> dict:
        """Everything for one position, a function of (seed, position) alone.

        Returns:
            A dictionary: `position`; the image, see the class; `class_labels`, int (absent without labels); `noise`,
            standard normal, in the shape of what is trained on, float32; `time_uniform` and `dropout_uniform`, float32
            in [0, 1), from which timestep and label dropout follow; `posterior_noise`, like `noise` (only for
            latents), see `sample_latents`; `augmentation` (only if asked for), see `diffit_augment`; `bad_images`,
            messages about images that were skipped.

        Raises:
            BadImageError: names the file, unless bad images are skipped.
        """
        position, index = position_and_index
        rng = position_generator(self.stream.seed, position, AUGMENTATION)
        flip, *crop_position = rng.random(3)
        augmentation = {"augmentation": torch.from_numpy(draw_augmentation(rng))} if self.augment else {}
        flip = self.random_flip and flip < 0.5
        bad_images = []
        while True:
            try:
                image = self._load(index, flip, tuple(crop_position))
                break
            except BadImageError as error:
                if self.on_bad_image != "skip":
                    raise
                bad_images.append(str(error))
                num_images = len(self.table)
                if len(bad_images) == num_images:
                    raise BadImageError(f"no readable image in {self.table.source}; the last: {error}") from error
                epoch_start = position - position % num_images
                index = self.stream.index(epoch_start + (position + len(bad_images)) % num_images)
        rng = position_generator(self.stream.seed, position, DIFFUSION)
        shape = self.latent_shape or tuple(image["pixel_values"].shape)
        item = {
            "position": position,
            **image,
            **augmentation,
            "time_uniform": torch.tensor(rng.random(dtype=np.float32)),
            "dropout_uniform": torch.tensor(rng.random(dtype=np.float32)),
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "bad_images": bad_images,
        }
        if self.latent_shape is not None:
            item["posterior_noise"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if self.table.class_names is not None:
            item["class_labels"] = self.table.label(index)
        return item

    @abstractmethod
    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> dict[str, torch.Tensor]:
        """The image by its name in the item.

        Raises:
            BadImageError: if it cannot be read.
        """


class ImageDataset(StreamDataset):
    """Images to train on, or to encode on the device: `pixel_values`, shape (C, H, W), see `normalize_pixels`.

    Args:
        table: where the images are.
        stream: order of the images, for replacing bad ones.
        resolution: height and width in pixels.
        num_channels: channels C; None: what the images have, and colour among grayscale is an error.
        center_crop: crop the centre rather than a random place.
        random_flip: mirror half of the images left and right.
        on_bad_image: `"error"`, or `"skip"`: take the next readable image of the permutation and report the name.
        latent_shape: shape (c, h, w) of the latents to train on; None: training in pixels.
        augment: draw the numbers of `diffit_augment`, which transforms images on the device.
    """

    def __init__(
        self,
        table: ImageTable,
        stream: PositionStream,
        resolution: tuple[int, int],
        num_channels: int | None = None,
        center_crop: bool = False,
        random_flip: bool = False,
        on_bad_image: str = "error",
        latent_shape: tuple[int, int, int] | None = None,
        augment: bool = False,
    ):
        super().__init__(table, stream, random_flip, on_bad_image, latent_shape, augment)
        self.resolution = resolution
        self.keep_colour = num_channels is None
        self.num_channels = num_channels or detect_num_channels(table)
        self.center_crop = center_crop

    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> dict[str, torch.Tensor]:
        pixel_values = decode_pixels(
            *self.table.read(index),
            self.resolution,
            self.num_channels,
            (0.5, 0.5) if self.center_crop else crop_position,
            flip=flip,
            keep_colour=self.keep_colour,
        )
        return {"pixel_values": pixel_values}


class LatentDataset(StreamDataset):
    """Prepared latents to train on: `moments`, shape (2c, h, w), float32.

    At the same seed, the order, the flips and all random numbers are those of an `ImageDataset` with `latent_shape`.

    Args:
        table: where the latents are.
        stream: order of the images, for replacing bad ones.
        random_flip: take the mirror image of half of the images.
        on_bad_image: what to do about images that were bad when the latents were prepared, see `ImageDataset`.

    Raises:
        ValueError: names --random_flip, if there are no mirror images.
    """

    def __init__(
        self, table: LatentTable, stream: PositionStream, random_flip: bool = False, on_bad_image: str = "error"
    ):
        if random_flip and not table.metadata["mirrored"]:
            raise UserError(f"--random_flip: {table.source} was prepared without mirror images (--no-mirror)")
        super().__init__(table, stream, random_flip, on_bad_image, tuple(table.metadata["latent_shape"]))

    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> dict[str, torch.Tensor]:
        return {"moments": self.table.read(index, mirrored=flip)}


def collate(items: list[dict]) -> dict:
    """Stacks items of a `StreamDataset` to a batch: shapes gain B in front, `bad_images` becomes one list."""
    bad_images = [message for item in items for message in item["bad_images"]]
    if len({item["pixel_values"].dtype for item in items if "pixel_values" in item}) > 1:  # some are of 16 bits
        items = [item | {"pixel_values": item["pixel_values"].float()} for item in items]
    batch = default_collate([{key: value for key, value in item.items() if key != "bad_images"} for item in items])
    return batch | {"bad_images": bad_images}
