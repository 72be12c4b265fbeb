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
import logging
import os
import re
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants as hub_constants

from diffit.command_line import require_one
from diffit.decode import _natural_channels, _open_image
from diffit.errors import BadImageError, UserError, global_rank, message_of, printable, user_errors
from diffit.labels import encode_labels, find_labels, why_no_label_column
from diffit.listing import (
    IMAGE_EXTENSIONS,
    SHOWN,
    Files,
    check_splits,
    list_files,
    open_zip,
    read_file,
    read_from_zip,
)
from diffit.run_dir import our_files
from diffit.source_config import SOURCES, SourceConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table(ABC):
    """Images (or their latents) and their labels.

    Attributes:
        rows: data set with one row per image.
        source: folder, file or data set that the user named; for messages.
        indices: row of each of the n images in `rows`.
        labels: class of each row, in [0, number of classes), or None if there are no labels.
        class_names: name of each class, or None.
        no_labels: why there are no labels, with what was looked at.
    """

    rows: Dataset
    source: str
    indices: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    no_labels: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> int:
        """Class of an image, in [0, number of classes)."""
        return int(self.labels[self.indices[index]])

    def empty_classes(self) -> list[str]:
        """Names of classes without images, such as `0` where labels are the numbers 1 to 3."""
        present = set(self.labels[self.indices].tolist())
        return [name for number, name in enumerate(self.class_names) if number not in present]

    def warn_about_empty_classes(self) -> None:
        """Logs a warning if there are any."""
        if (empty := self.empty_classes()) and global_rank() == 0:
            logger.warning(
                f"{self.source}: {len(empty)} of {len(self.class_names)} classes have no image, such as {empty[0]}: "
                "the network learns nothing for them, but previews and samples of all classes include them. Numbers "
                "of classes should start at 0 and leave no gap; names (text) are numbered without gaps"
            )

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
        if not names:
            raise UserError(f"{self.source} has no labels: {self.no_labels}")
        if unknown:
            raise UserError(f"{self.source} has the unknown classes {unknown[:5]}")
        numbers = np.array([class_names.index(name) for name in names])
        return replace(self, labels=numbers[self.labels], class_names=class_names)

    def select(self, indices: list[int]) -> Self:
        """A table of these images, in this order."""
        return replace(self, indices=self.indices[indices])

    def header(self) -> bytes:
        """The number of images, their labels and the class names, for digests."""
        labels = None if self.labels is None else self.labels[self.indices].tolist()
        return json.dumps([len(self), labels, self.class_names]).encode()

    def digest(self, num_images: int = 64) -> str:
        """A checksum of the number of images, their labels, the class names and the bytes of some images.

        It is the same on all machines that see the same images, whatever their paths.

        Args:
            num_images: evenly spaced images whose bytes are read.
        """
        digest = hashlib.sha256(self.header())
        for index in np.linspace(0, len(self) - 1, min(num_images, len(self))).astype(int):
            with contextlib.suppress(BadImageError):  # training will report it
                digest.update(self.content(int(index)))
        return digest.hexdigest()[:16]

    def data_digest(self) -> str:
        """Identifies the data of a training: `digest`, then a checksum of the name and size of every image.

        An image that is replaced by another one of the same name and size is noticed only if it is among those that
        `digest` reads. Compare with `is_same_data`.
        """
        return self.digest()


def is_same_data(earlier: str, now: str) -> bool:
    """Compares what `Table.data_digest` returned, followed by further words, when a run was started and now.

    Versions without names and sizes wrote `digest` alone, whose runs can still be resumed.
    """
    if "-" not in earlier.split(" ")[0]:
        first, *rest = now.split(" ", 1)
        now = " ".join([first.split("-")[0], *rest])
    return earlier == now


def _file_size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:  # reading it will report that
        return None


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

    def data_digest(self) -> str:
        digest = hashlib.sha256()
        for name_and_size in self._names_and_sizes():
            digest.update(json.dumps(name_and_size).encode())
        return f"{self.digest()}-{digest.hexdigest()[:16]}"

    def _names_and_sizes(self) -> list[tuple]:
        """Name of each image and its size in bytes; no image is read.

        The names do not depend on where the data are, nor on whether they are zipped: those of files are relative to
        `source`.
        """
        entries = open_zip(self.archive)[1] if self.archive else {}
        described = []
        for batch in self.rows.with_format("arrow").iter(1000):  # slices: a selection of rows would be copied
            for images in batch["image"].chunks:
                sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).to_pylist()
                paths = pyarrow.compute.struct_field(images, "path").to_pylist()
                described += [self._describe(*row, entries) for row in zip(paths, sizes, strict=True)]
        return [described[index] for index in self.indices]

    def _describe(self, path: str | None, size: int | None, entries: dict[str, zipfile.ZipInfo]) -> tuple:
        if path in entries:
            return path, entries[path].file_size
        if size is not None or path is None:
            return path and os.path.basename(path), size
        if self.folders is None:
            return path.removeprefix(os.path.join(self.source, "")).replace(os.sep, "/"), _file_size(path)
        return os.path.basename(path), _file_size(os.path.join(self.folders[0], path))  # named by a row

    def read(self, index: int) -> tuple[str, bytes]:
        """Returns a name for messages, and the undecoded bytes of an image.

        Raises:
            BadImageError: if the file cannot be read.
        """
        row = int(self.indices[index])
        image = self.rows[row]["image"] or {"bytes": None, "path": None}
        path, name = image["path"], self._name(row, image)
        if image["bytes"] is not None:
            return name, image["bytes"]
        if path is None:
            raise BadImageError(f"no image in {name}")
        archive, file = (self.archive, path) if self.folders is None else self._locate(row, path)
        try:
            return name, read_file(file) if archive is None else read_from_zip(archive, file)
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImageError(f"cannot read image {name}: {error}") from error

    def name(self, index: int) -> str:
        """Name of an image for messages: its path, or its row in a parquet file."""
        row = int(self.indices[index])
        return self._name(row, self.rows[row]["image"] or {"bytes": None, "path": None})

    def _name(self, row: int, image: dict) -> str:
        path = image["path"] and printable(image["path"])
        if self.archive is not None:
            return f"{path} in {self.archive}"
        if image["bytes"] is None and path is not None:
            return path
        return f"row {row} of {self.source}" + (f" ({path})" if path else "")

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


def load_image_table(source: SourceConfig, need_labels: bool = True) -> ImageTable:
    """Opens the images and labels of a source. Nothing is decoded.

    Args:
        source: the flags.
        need_labels: whether incomplete or wrong labels are an error. Otherwise they are left out, with a log line,
            unless --label_column asks for them. Having no labels at all is an error in neither case.

    Raises:
        UserError: names the flag if there is not exactly one source, or a file or column is missing, ambiguous or
            unreadable.
    """
    require_one(source, SOURCES)
    need_labels = need_labels or source.label_column is not None
    loaders = {
        "dataset_name": _load_dataset,
        "train_data_file": _load_parquet_file,
        "train_data_dir": _load_folder_or_zip,
    }
    flag, load = next((flag, load) for flag, load in loaders.items() if getattr(source, flag) is not None)
    with user_errors(f"--{flag} {getattr(source, flag)}", OSError):  # such as a missing permission
        return load(source, need_labels)


def _load_dataset(source: SourceConfig, need_labels: bool) -> ImageTable:
    """Opens --dataset_name."""
    name, split = source.dataset_name, source.dataset_split
    _check_dataset_folder(Path(name))
    if Path(name).is_dir() and "[" in os.path.realpath(name):
        raise UserError(
            f"--dataset_name {name}: `datasets` reads the brackets in this path as a pattern and finds no files: "
            "rename the folder, or give it as --train_data_dir"
        )
    with _loading(f"--dataset_name {name} (--dataset_split {split})", source.cache_dir):
        rows = load_dataset(name, source.dataset_config_name, split=split, cache_dir=source.cache_dir)
    # `datasets` keeps what it downloads and unpacks in its caches.
    caches = [datasets_config.HF_DATASETS_CACHE, datasets_config.DOWNLOADED_DATASETS_PATH]
    caches += [datasets_config.EXTRACTED_DATASETS_PATH, hub_constants.HF_HUB_CACHE, source.cache_dir]
    local = name if Path(name).is_dir() else None
    folders = tuple(os.path.realpath(folder) for folder in (local, *caches) if folder is not None)
    return _table_from_columns(rows, f"{name} ({split})", source, folders, need_labels)


def _load_parquet_file(source: SourceConfig, need_labels: bool) -> ImageTable:
    """Opens --train_data_file."""
    file = source.train_data_file
    if Path(file).is_dir():
        raise UserError(f"--train_data_file {file} is a folder: give it as --train_data_dir")
    if not Path(file).is_file():
        raise UserError(f"--train_data_file: no such file: {file}")
    if _read_footer(file)[1] == 0:  # `datasets` fails at it
        raise UserError(f"--train_data_file {file} has no rows")
    rows = read_parquet([file], source.cache_dir)
    folders = (os.path.realpath(Path(file).parent),)
    return _table_from_columns(rows, file, source, folders, need_labels)


def _load_folder_or_zip(source: SourceConfig, need_labels: bool) -> ImageTable:
    """Opens --train_data_dir: the rows of parquet files that hold images if there are any, otherwise image files."""
    root = Path(source.train_data_dir)
    files = list_files(root, source.follow_links)
    parquet = [] if root.is_file() else _parquet_of_images(files, source.image_column)
    if not parquet:
        return _table_from_files(files, source, need_labels)
    check_splits(root, parquet)
    files.leave_out("image files next to parquet files of images", files.images(skip_other_formats=True))
    files.report()
    rows = read_parquet([str(root / name) for name in parquet], source.cache_dir)
    folders = (os.path.realpath(root),)
    return _table_from_columns(rows, str(root), source, folders, need_labels)


def _parquet_of_images(files: Files, image_column: str | None) -> list[str]:
    """The parquet files in a folder that hold images; the others, such as captions, are counted as left out.

    Args:
        files: of the folder.
        image_column: --image_column; without it, a column of type Image is needed if there are image files, too.

    Raises:
        UserError: names a parquet file that is damaged, or that may hold images as the image files next to it do.
    """
    parquet = [name for name in files.names if name.lower().endswith(".parquet")]
    files.check_utf8(parquet)
    footers = {name: _read_footer(str(files.root / name)) for name in parquet}
    filled = [name for name in parquet if footers[name][1] > 0]
    if parquet and not filled:
        raise UserError(f"--train_data_dir {files.root}: {parquet[0]} has no rows")
    if image_column is not None:
        chosen = [name for name in filled if image_column in footers[name][0]]
    else:
        chosen = [name for name in filled if any(isinstance(kind, Image) for kind in footers[name][0].values())]
    has_image_files = any(PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS for name in files.names)
    if not chosen and not has_image_files:
        return filled  # whose columns are then named by an error
    for name in filled if not chosen else ():
        columns = [column for column, kind in footers[name][0].items() if _may_hold_images(kind)]
        if columns:
            raise UserError(
                f"--train_data_dir {files.root} holds image files, and {name} with the columns {', '.join(columns)}, "
                "which may hold images: give --image_column, or move the parquet files away"
            )
    files.leave_out("parquet files without images", (name for name in filled if name not in set(chosen)))
    files.leave_out("empty parquet files", (name for name in parquet if footers[name][1] == 0))
    return chosen


def _read_footer(path: str) -> tuple[Features, int]:
    """Columns and number of rows of a parquet file."""
    with user_errors(f"cannot read parquet {path}", Exception), pyarrow.parquet.ParquetFile(path) as file:
        return Features.from_arrow_schema(file.schema_arrow), file.metadata.num_rows


def _may_hold_images(kind: object) -> bool:
    return getattr(kind, "dtype", None) in ("binary", "large_binary") or (isinstance(kind, dict) and "bytes" in kind)


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
    """The rows of parquet files, which `datasets` copies into its cache.

    Raises:
        UserError: names the files if one is damaged, or the cache if that cannot be written.
    """
    files = [glob.escape(os.path.abspath(path)) for path in paths]  # `datasets` reads them as patterns
    if "::" in "".join(files):
        raise UserError(
            f"cannot read parquet {paths[0]}: `datasets` takes `::` in a path for a URL: rename the folder"
        )
    others = f" and {len(paths) - SHOWN} others" if len(paths) > SHOWN else ""
    with _loading(f"cannot read parquet {', '.join(paths[:SHOWN])}{others}", cache_dir):
        return load_dataset("parquet", data_files=files, split="train", cache_dir=cache_dir)


@contextlib.contextmanager
def _loading(what: str, cache_dir: str | None) -> Iterator[None]:
    """Turns exceptions of `datasets.load_dataset` into a `UserError`, which names the cache if that is the cause."""
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:  # not there, no such configuration or split, damaged
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        problem = _cache_problem(cache_dir) or message_of(cause)
        raise UserError(f"{what}: {problem}") from error


def _cache_problem(cache_dir: str | None) -> str | None:
    cache = Path(cache_dir or datasets_config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return None
    except OSError as error:
        return (
            f"the cache of the datasets library, {cache}, cannot be written ({error.strerror}): name another folder "
            "by --cache_dir or by the environment variable HF_HOME"
        )


def _table_from_columns(
    rows: Dataset, source: str, flags: SourceConfig, folders: tuple[str, ...], need_labels: bool
) -> ImageTable:
    if isinstance(rows, DatasetDict):
        raise UserError(f"{source}: --dataset_split must name one of {list(rows)}")
    if len(rows) == 0:
        raise UserError(f"{source} has no rows")
    features = rows.features
    image_column = _find_column(source, "--image_column", flags.image_column, features, Image, required=True)
    label_column = _find_column(source, "--label_column", flags.label_column, features, ClassLabel, need_labels)
    kind = features[image_column]
    plain = getattr(kind, "dtype", None) in ("binary", "large_binary", "string")
    if not isinstance(kind, Image) and not plain and not (isinstance(kind, dict) and "bytes" in kind):
        raise UserError(f"--image_column {image_column} of {source} must hold images, it holds {kind}")

    images = rows.select_columns([image_column]).rename_columns({image_column: "image"})
    images = images.cast_column("image", Image(decode=False))
    indices = np.arange(len(images))
    table = ImageTable(images, source, indices, folders=folders)
    if label_column is None:
        others = Features({name: feature for name, feature in features.items() if name != image_column})
        return _without_labels(table, why_no_label_column(others), need_labels)
    kind = features[label_column]
    if isinstance(kind, Image) or _may_hold_images(kind):
        raise UserError(f"--label_column {label_column} of {source} must hold labels, it holds {kind}")
    names = kind.names if isinstance(kind, ClassLabel) else None
    values = list(rows[label_column])
    return _with_labels(table, values, f"--label_column {label_column} of {source}", names, need_labels)


def _find_column(
    source: str, flag: str, name: str | None, features: Features, kind: type, required: bool
) -> str | None:
    """The column that a flag names, or the only one of a kind; None if there is none, or an optional one is ambiguous.

    Args:
        source: for messages.
        flag: for messages.
        name: its value, or None.
        features: type of each column.
        kind: of the column; only an `Image` must exist.
        required: whether it must be unambiguous.
    """
    if name is not None:
        if name not in features:
            raise UserError(f"{flag} {name}: {source} has the columns {', '.join(features)}")
        return name
    candidates = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(candidates) > 1 and not required:
        return None
    if len(candidates) > 1:
        raise UserError(f"{source} has several columns of type {kind.__name__}: choose one with {flag}: {candidates}")
    if not candidates and kind is Image:
        raise UserError(f"{source} has no column of type {kind.__name__}; {flag} must name one of {list(features)}")
    return candidates[0] if candidates else None


def _table_from_files(files: Files, source: SourceConfig, need_labels: bool) -> ImageTable:
    """Opens the image files of a folder or zip, with labels if there are any."""
    root = files.root
    names = files.images(source.skip_other_formats)
    if root.is_file():
        files.leave_out("parquet files in a zip", (name for name in files.names if name.lower().endswith(".parquet")))
    if not names:
        there = files.describe_left_out()
        raise UserError(
            f"--train_data_dir: no images in {root} (extensions: {', '.join(sorted(IMAGE_EXTENSIONS))})"
            + (f"; it holds {there}" if there else "")
        )
    names, labels, reason = find_labels(files, names, source.label_column, need_labels)
    check_splits(root, names)
    if source.label_column is not None and "metadata.jsonl" not in files.names:
        raise UserError(
            f"--label_column {source.label_column}: only metadata.jsonl has columns, and {root} has none"
            + (f" ({reason})" if reason else "")
        )

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
        return _without_labels(table, reason, need_labels)
    return _with_labels(table, [labels.get(name) for name in names], str(root), None, need_labels)


def _with_labels(
    table: ImageTable, values: list[int | str | None], source: str, names: list[str] | None, needed: bool
) -> ImageTable:
    """The table with labels. Unless they are needed, labels that are incomplete or wrong are left out.

    Args:
        table: without labels.
        values: label of each row.
        source: of the labels, for messages.
        names: of the classes, if the data set has them.
        needed: raise an error instead of leaving labels out.
    """
    try:
        missing = [row for row, value in enumerate(values) if value is None or value == ""]  # "" is a cell left empty
        if missing:
            first = table.name(missing[0])
            raise UserError(f"{source}: {len(missing)} of {len(values)} images have no label, the first is {first}")
        labels, class_names = encode_labels(values, source, names)
    except UserError as error:
        if needed:
            raise UserError(f"{error}; without --class_conditional and --label_column no labels are needed") from error
        return _without_labels(table, f"labels are incomplete or wrong: {error}", needed)
    return replace(table, labels=labels, class_names=class_names)


def _without_labels(table: ImageTable, reason: str, needed: bool) -> ImageTable:
    if not needed and global_rank() == 0:
        logger.info(f"{table.source}: labels are not used: {reason}")
    return replace(table, no_labels=reason)


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
