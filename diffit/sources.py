# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Opens a source of images (a hub data set, parquet, a folder or a zip) as an `ImageTable`.

An `ImageTable` is a HuggingFace data set whose images are not decoded yet. `diffit.decode` decodes them, so that the
message about a bad image names its file.

Data is not trusted: it cannot name files outside of itself, and nothing larger than `listing.MAX_FILE_BYTES` is
unpacked or than `decode.MAX_IMAGE_PIXELS` decoded.
"""

import contextlib
import glob
import hashlib
import json
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
from diffit.decode import _natural_channels, _open_image
from diffit.errors import BadImageError, UserError, user_errors
from diffit.labels import check_listed, encode_labels, parse_json
from diffit.listing import IMAGE_EXTENSIONS, Files, check_splits, list_files, read_file, read_from_zip
from diffit.run_dir import our_files
from diffit.source_config import SOURCES, SourceConfig


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
            return name, read_file(file) if archive is None else read_from_zip(archive, file)
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
    rows = read_parquet([file], source.cache_dir)
    folders = (os.path.realpath(Path(file).parent),)
    return _table_from_columns(rows, file, source.image_column, source.label_column, folders)


def _load_folder_or_zip(source: SourceConfig) -> ImageTable:
    """Opens --train_data_dir: the rows of its parquet files if there are any, otherwise its image files."""
    root = Path(source.train_data_dir)
    files = list_files(root, source.follow_links)
    parquet = [name for name in files.names if name.lower().endswith(".parquet")]
    if not parquet or root.is_file():
        return _table_from_files(files, source)
    check_splits(root, parquet)
    rows = read_parquet([str(root / name) for name in parquet], source.cache_dir)
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


def read_parquet(paths: list[str], cache_dir: str | None) -> Dataset:
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
    labels, names = encode_labels(list(rows[label_column]), f"--label_column {label_column} of {source}", names)
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


def _table_from_files(files: Files, source_config: SourceConfig) -> ImageTable:
    """Opens the image files of a folder or zip, with labels if there are any.

    Labels come from `dataset.json`, otherwise from `metadata.jsonl`, otherwise from the names of the first-level
    sub-folders, if every image lies in one and there are several.
    """
    root, label_column = files.root, source_config.label_column
    names = files.images(source_config.skip_other_formats)
    if root.is_file():
        files.leave_out("parquet files in a zip", (name for name in files.names if name.lower().endswith(".parquet")))
    if not names:
        there = files.describe_left_out()
        raise UserError(
            f"--train_data_dir: no images in {root} (extensions: {', '.join(sorted(IMAGE_EXTENSIONS))})"
            + (f"; it holds {there}" if there else "")
        )
    labels = None
    if "dataset.json" in files.names:
        source = f"dataset.json in {root}"
        listed = parse_json(files.read("dataset.json"), source).get("labels")
        if listed is not None:
            labels = check_listed(listed, names, source)
    elif "metadata.jsonl" in files.names:
        source = f"metadata.jsonl in {root}"
        lines = [line for line in files.read("metadata.jsonl").split(b"\n") if line.strip()]
        records = [parse_json(line, source) for line in lines]
        column = label_column or "label"
        if label_column is not None and not any(column in record for record in records):
            raise UserError(f"--label_column {label_column}: {source} has no such key")
        listed = check_listed([[record.get("file_name"), record.get(column)] for record in records], names, source)
        files.leave_out("images that metadata.jsonl does not list", (name for name in names if name not in listed))
        names = [name for name in names if name in listed]
        if not names:
            raise UserError(f"{source} names no image")
        if any(label is not None for label in listed.values()):
            labels = listed
    elif all("/" in name for name in names) and len({name.split("/")[0] for name in names}) > 1:
        labels = {name: name.split("/")[0] for name in names}
    check_splits(root, names)
    if label_column is not None and "metadata.jsonl" not in files.names:
        raise UserError(f"--label_column {label_column}: only metadata.jsonl has columns, and {root} has none")

    files.report()
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
    numbers, class_names = encode_labels([labels[name] for name in names], str(root))
    return replace(table, labels=numbers, class_names=class_names)


def detect_num_channels(table: ImageTable, num_images: int = 64) -> int:
    """Number of channels of the images: the most that any of some evenly spaced images has.

    Args:
        table: reader of the images.
        num_images: how many of them are opened.

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
