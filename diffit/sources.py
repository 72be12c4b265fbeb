# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Opens a source of images (a hub data set, parquet, a folder or a zip) as an `ImageTable`.

An `ImageTable` is a HuggingFace data set whose images are not decoded yet. `diffit.decode` decodes them, so that the
message about a bad image names its file.

Data is not trusted: it cannot name files outside of itself, and nothing larger than `MAX_FILE_BYTES` is unpacked or
than `MAX_IMAGE_PIXELS` decoded.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants as hub_constants

from diffit.command_line import require_one
from diffit.decode import MAX_IMAGE_PIXELS, _natural_channels, _open_image
from diffit.errors import BadImageError, UserError, global_rank, user_errors
from diffit.run_dir import is_listed, our_files
from diffit.source_config import SOURCES, SourceConfig

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_FILE_BYTES = 8 * MAX_IMAGE_PIXELS  # 512 MiB unpacked: four channels of 16 bits of the largest image
MAX_CLASSES = 100_000  # one absurd label must not fill the memory with class names
OUTSIDE_A_ZIP = re.compile(r"^/|(^|/)\.\.(/|$)|^[A-Za-z]:|\\")  # absolute, upwards, a drive, a Windows separator
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


@dataclass(frozen=True)
class Table(ABC):
    """Images (or their latents) and their labels.

    Attributes:
        rows: data set with one row per image.
        source: folder, file or data set that the user named; for messages.
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
        """Bytes of an image, for `digest`.

        Raises:
            BadImageError: if the image cannot be read.
        """

    def with_class_names(self, class_names: tuple[str, ...]) -> Self:
        """Renumbers the classes as in another table, matching them by name.

        Args:
            class_names: of the other table.

        Raises:
            UserError: if this table has no labels, or a class that the other one lacks.
        """
        names = self.class_names or ()
        unknown = sorted(set(names) - set(class_names))
        if not names or unknown:
            raise UserError(f"{self.source} has {f'the unknown classes {unknown[:5]}' if names else 'no labels'}")
        numbers = np.array([class_names.index(name) for name in names])
        return replace(self, labels=numbers[self.labels], class_names=class_names)

    def select(self, indices: list[int]) -> Self:
        """A table of these images, in this order."""
        return replace(self, indices=self.indices[indices])

    def digest(self, num_images: int = 64) -> str:
        """A checksum of the number of images, their labels, the class names and the bytes of some images.

        It is the same on all machines that see the same images, whatever their paths.

        Args:
            num_images: evenly spaced images whose bytes are read.
        """
        labels = None if self.labels is None else self.labels[self.indices].tolist()
        digest = hashlib.sha256(json.dumps([len(self), labels, self.class_names]).encode())
        for index in np.linspace(0, len(self) - 1, min(num_images, len(self))).astype(int):
            with contextlib.suppress(BadImageError):  # training will report it
                digest.update(self.content(int(index)))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageTable(Table):
    """Images that are not decoded yet: `rows` has the column `image` ({"bytes", "path"}).

    Attributes:
        archive: zip that contains the paths, or None.
        folders: folders (real paths) that may hold the files named by rows without bytes; relative names start from
            the first one. None allows any path, because we listed the paths ourselves.
    """

    archive: str | None = None
    folders: tuple[str, ...] | None = None

    def content(self, index: int) -> bytes:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[str, bytes]:
        """Returns a name for messages, and the undecoded bytes of an image.

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
        """Locates an image that a row names but does not hold: returns its zip (or None) and its path.

        Raises:
            BadImageError: if the path is not one of the data set's files.
        """
        entry = re.fullmatch(r"zip://(.+)::(.+)", path)  # how `datasets` names a file in a zip
        file = entry[2] if entry else path
        real_path = os.path.realpath(os.path.join(self.folders[0], file))
        if "://" in file or not any(Path(real_path).is_relative_to(folder) for folder in self.folders):
            raise BadImageError(
                f"row {row} of {self.source} has no bytes, and its path {path} is outside of the data set: it must be "
                f"a file in {self.folders[0]}; other files are not read, and nothing is downloaded"
            )
        return (real_path, entry[1]) if entry else (None, real_path)


_open_zips: dict[str, tuple[int, zipfile.ZipFile]] = {}


def _open_zip(path: str) -> zipfile.ZipFile:
    # One handle per process: a forked worker must not share its parent's file offset.
    pid, handle = _open_zips.get(path, (None, None))
    if pid != os.getpid():
        handle = zipfile.ZipFile(path)
        _open_zips[path] = (os.getpid(), handle)
    return handle


def _read_from_zip(archive: str, name: str) -> bytes:
    handle = _open_zip(archive)
    entry = handle.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be unpacked piecewise
        raise BadImageError(
            f"{name} in {archive} has compression method {entry.compress_type}: only stored and deflate are read"
        )
    _check_file_size(f"{name} in {archive}", entry.file_size)
    with handle.open(entry) as file:
        # `ZipFile.read` would unpack the whole entry, which may be far larger than it states.
        return file.read(entry.file_size + 1)


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        _check_file_size(path, os.fstat(file.fileno()).st_size)
        return file.read()


def _check_file_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise BadImageError(f"{name} has {num_bytes:,} bytes (unpacked), more than the limit of {MAX_FILE_BYTES:,}")


def _list_folder(root: Path) -> list[str]:
    """Lists the files in a folder and its sub-folders, relative to it and sorted, without hidden ones.

    A link to a folder within `root` is not followed, because its files are listed where they are.

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
    """Drops the files that training, sampling and evaluation have written (see `diffit.run_dir`).

    Logs how many images and parquet files were dropped. If `root` itself is a folder of samples, they are kept: they
    are the data that the user asked for.
    """
    folders = {folder for name in names for folder in PurePosixPath(name).parents}
    marks = {folder: files for folder in folders if (files := our_files(root / folder))}
    above = {folder: files for folder in root.resolve().parents if (files := our_files(folder))}  # for RUN/previews
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
        logger.warning(f"{root}: skipped {sum(left_out.values())} files that DiffiT has written, in {places}")
    return kept


def listed_samples(root: Path) -> set[str]:
    """Images listed in the `samples.json` that `sample_diffit.py` writes; none if there is no valid one."""
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
    """Lists the files in a zip, sorted, without hidden ones.

    Raises:
        UserError: names an entry whose path leads out of the archive.
    """
    names = []
    for entry in _open_zip(str(root)).infolist():
        if OUTSIDE_A_ZIP.search(entry.filename):
            raise UserError(
                f"--train_data_dir {root}: the entry {entry.filename!r} has a name that leads out of the archive; "
                "names must be relative, with / between folders. Repack it, or unpack it with a tool you trust"
            )
        if not entry.is_dir() and not any(_is_hidden(part) for part in entry.filename.split("/")):
            names.append(entry.filename)
    return sorted(names)


def load_image_table(source: SourceConfig) -> ImageTable:
    """Opens the images and labels of a source. Nothing is decoded.

    Args:
        source: the flags.

    Raises:
        UserError: names the flag if there is not exactly one source, or a file or column is missing or ambiguous.
    """
    require_one(source, SOURCES)
    if source.dataset_name is not None:
        return _load_dataset(source)
    if source.train_data_file is not None:
        return _load_parquet_file(source)
    return _load_folder_or_zip(source)


def _load_dataset(source: SourceConfig) -> ImageTable:
    """Opens --dataset_name."""
    name, split = source.dataset_name, source.dataset_split
    _check_dataset_folder(Path(name))
    failures = (OSError, ValueError, DatasetsError)  # not there, no such configuration or split, damaged
    with user_errors(f"--dataset_name {name} (--dataset_split {split})", *failures):
        rows = load_dataset(name, source.dataset_config_name, split=split, cache_dir=source.cache_dir)
    # `datasets` keeps what it downloads and unpacks in its caches.
    caches = [datasets_config.HF_DATASETS_CACHE, datasets_config.DOWNLOADED_DATASETS_PATH]
    caches += [datasets_config.EXTRACTED_DATASETS_PATH, hub_constants.HF_HUB_CACHE, source.cache_dir]
    local = name if Path(name).is_dir() else None
    folders = tuple(os.path.realpath(folder) for folder in (local, *caches) if folder is not None)
    return _table_from_columns(rows, f"{name} ({split})", source.image_column, source.label_column, folders)


def _load_parquet_file(source: SourceConfig) -> ImageTable:
    """Opens --train_data_file."""
    file = source.train_data_file
    if not Path(file).is_file():
        raise UserError(f"--train_data_file: no such file: {file}")
    rows = _read_parquet([file], source.cache_dir)
    folders = (os.path.realpath(Path(file).parent),)
    return _table_from_columns(rows, file, source.image_column, source.label_column, folders)


def _load_folder_or_zip(source: SourceConfig) -> ImageTable:
    """Opens --train_data_dir: the rows of its parquet files if there are any, otherwise its image files."""
    root = Path(source.train_data_dir)
    if root.is_dir():
        files = _list_folder(root)
    elif zipfile.is_zipfile(root):
        files = _list_zip(root)
    else:
        raise UserError(f"--train_data_dir: neither a folder nor a zip: {root}")
    parquet = [name for name in files if name.endswith(".parquet")]
    if not parquet or root.is_file():
        return _table_from_files(root, files, source.label_column)
    other_splits = [name for name in parquet if PurePosixPath(name).name.startswith(("test", "val"))]
    if other_splits and len(other_splits) < len(parquet):
        raise UserError(
            f"--train_data_dir {root} holds several splits ({other_splits[0]}): use --dataset_name {root} with "
            "--dataset_split, or --train_data_file"
        )
    rows = _read_parquet([str(root / name) for name in parquet], source.cache_dir)
    folders = (os.path.realpath(root),)
    return _table_from_columns(rows, str(root), source.image_column, source.label_column, folders)


def _check_dataset_folder(root: Path) -> None:
    """Refuses a local data set that holds images of ours, which `datasets.load_dataset` would read as data."""
    for folder, _, _ in os.walk(root) if root.is_dir() else ():
        images = [name for name in our_files(Path(folder)) if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
        if images:
            raise UserError(
                f"--dataset_name {root} holds images that DiffiT has written, such as {Path(folder, images[0])}: move "
                "them away, or give the folder as --train_data_dir, which skips them"
            )


def _read_parquet(paths: list[str], cache_dir: str | None) -> Dataset:
    files = [glob.escape(os.path.abspath(path)) for path in paths]  # `datasets` reads them as patterns
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
        raise UserError(f"--image_column {image_column} of {source} must hold images, it holds {kind}")

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
        raise UserError(f"{source} has several columns of type {kind.__name__}: choose one with {flag}: {candidates}")
    if not candidates and required:
        raise UserError(f"{source} has no column of type {kind.__name__}; {flag} must name one of {list(features)}")
    return candidates[0] if candidates else None


def _encode_labels(
    values: list[int | str], source: str, names: list[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the class of each image and the class names. Integer labels keep their values.

    Args:
        values: class names or integers.
        source: for messages.
        names: of the classes, if the data set has them.
    """
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
        raise UserError(f"{source}: labels must all be class names, or all integers from 0 to {most}, got {wrong[:5]}")
    return np.array(values, np.int64), tuple(names)


def _table_from_files(root: Path, files: list[str], label_column: str | None) -> ImageTable:
    """Opens the image files of a folder or zip, with labels if there are any.

    Labels come from `dataset.json`, otherwise from `metadata.jsonl`, otherwise from the names of the first-level
    sub-folders, if every image lies in one and there are several.
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
            raise UserError(
                f"--train_data_dir {root} holds splits, not classes: give one of its folders {set(labels.values())}"
            )
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
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError, too
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _check_listed(listed: list, names: list[str], source: str) -> dict[str, int | str | None]:
    """Checks pairs of a file name and a label, and returns the labels by file name.

    Args:
        listed: the pairs.
        names: the images that exist.
        source: file of the pairs, for messages.
    """
    if not isinstance(listed, list):
        raise UserError(f"{source}: expected a list of [file name, label], got {listed!r}")
    known = set(names)
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(f"{source}: expected [file name, label], got {entry!r}")
        if entry[0] not in known:
            raise UserError(f"{source} names an image that does not exist: {entry[0]!r}")
        if not isinstance(entry[1], int | str | None):
            raise UserError(f"{source}: the label of {entry[0]} must be a class name or a number, got {entry[1]!r}")
    return dict(listed)


def detect_num_channels(table: ImageTable, num_images: int = 64, max_channels: int = 4) -> int:
    """Number of channels of the images: the most that any of some evenly spaced images has.

    Args:
        table: reader of the images.
        num_images: how many of them are opened.
        max_channels: arrays with more channels are not opened: their channels probably come first.

    Raises:
        BadImageError: if none of them can be opened.
    """
    found, last_error = [], None
    for index in np.linspace(0, len(table) - 1, min(num_images, len(table))).astype(int):
        try:
            name, data = table.read(int(index))
            found.append(_natural_channels(_open_image(name, data), name, max_channels))
        except BadImageError as error:
            last_error = error
    if not found:
        raise last_error
    return max(found)
