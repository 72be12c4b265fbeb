# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lists and reads the files in folders and zips of images. Neither is trusted: see `diffit.sources`."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path, PurePosixPath

from diffit.decode import MAX_IMAGE_PIXELS
from diffit.errors import BadImageError, UserError, global_rank
from diffit.run_dir import is_listed, our_files

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_FILE_BYTES = 8 * MAX_IMAGE_PIXELS  # 512 MiB unpacked: four channels of 16 bits of the largest image
SPLIT_WORDS = dict.fromkeys(("train", "training", "trainset", "traina", "trainb"), "training") | dict.fromkeys(
    ("test", "testing", "testset", "testa", "testb", "val", "vals", "valid", "validation", "validate", "valset")
    + ("dev", "eval", "evaluation", "holdout", "heldout"),
    "held-out",
)
NEUTRAL_WORDS = {"data", "dataset", "image", "images", "img", "imgs", "set", "split"}  # as in `train_images`
OUTSIDE_A_ZIP = re.compile(r"^/|(^|/)\.\.(/|$)|^[A-Za-z]:|\\")  # absolute, upwards, a drive, a Windows separator


def list_folder(root: Path) -> list[str]:
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


def split_of(path: PurePosixPath, is_file: bool = False) -> str | None:
    """The split that a folder or a file is named after, in any case: "training", "held-out" or None.

    `train2017` and `Test images` are splits; `test tube` is not, because a folder may be a class. A file's name needs
    only one such word, since names are made like `digits-train-00000-of-00002-6f1c.parquet`.

    Args:
        path: relative to the root of the data.
        is_file: whether it is a file.
    """
    words = [word for word in re.split(r"[\W\d_]+", (path.stem if is_file else path.name).lower()) if word]
    kinds = {SPLIT_WORDS.get(word) for word in words if word not in NEUTRAL_WORDS}
    if is_file:
        kinds.discard(None)
    return kinds.pop() if len(kinds) == 1 else None


def check_splits(root: Path, names: list[str]) -> None:
    """Refuses training and held-out images that lie next to each other, at any level below `root`.

    Args:
        root: folder or zip that the user named.
        names: images or parquet files that would be trained on together.

    Raises:
        UserError: names both, and what to give instead.
    """
    files = {PurePosixPath(name) for name in names if name.lower().endswith(".parquet")}
    folders = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in names}}
    folders |= {parent for path in folders | files for parent in path.parents}
    levels: dict[PurePosixPath, dict[str, PurePosixPath]] = {}
    for path in sorted(folders | files):
        if path.name and (kind := split_of(path, path in files)):
            levels.setdefault(path.parent, {}).setdefault(kind, path)
    for splits in levels.values():
        if len(splits) == 2:
            training, held_out = splits["training"], splits["held-out"]
            if training in files or held_out in files:
                advice = "give --train_data_file, or --dataset_name with --dataset_split"
            elif root.is_file():
                advice = "repack one of them, or unpack the zip and give the folder of one"
            else:
                advice = f"give one of them, such as --train_data_dir {root / training}"
            raise UserError(
                f"--train_data_dir {root} holds a training and a held-out split, {training} and {held_out}, which are "
                f"not trained on together: {advice}; if they are no splits, rename them"
            )
    paths = {path for splits in levels.values() for path in splits.values()}
    places = sorted({str(path.parent) for path in paths if not paths & set(path.parents)})  # not train/train-0.parquet
    if files and len(places) > 1:
        raise UserError(
            f"--train_data_dir {root} holds several configurations of a data set, {' and '.join(places)}: give one of "
            "these folders"
        )


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


def list_zip(root: Path) -> list[str]:
    """Lists the files in a zip, sorted, without hidden ones.

    Raises:
        UserError: names an entry whose path leads out of the archive.
    """
    names = []
    for entry in open_zip(str(root)).infolist():
        if OUTSIDE_A_ZIP.search(entry.filename):
            raise UserError(
                f"--train_data_dir {root}: the entry {entry.filename!r} has a name that leads out of the archive; "
                "names must be relative, with / between folders. Repack it, or unpack it with a tool you trust"
            )
        if not entry.is_dir() and not any(_is_hidden(part) for part in entry.filename.split("/")):
            names.append(entry.filename)
    return sorted(names)


_open_zips: dict[str, tuple[int, zipfile.ZipFile]] = {}


def open_zip(path: str) -> zipfile.ZipFile:
    # One handle per process: a forked worker must not share its parent's file offset.
    pid, handle = _open_zips.get(path, (None, None))
    if pid != os.getpid():
        handle = zipfile.ZipFile(path)
        _open_zips[path] = (os.getpid(), handle)
    return handle


def read_from_zip(archive: str, name: str) -> bytes:
    handle = open_zip(archive)
    entry = handle.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others cannot be unpacked piecewise
        raise BadImageError(
            f"{name} in {archive} has compression method {entry.compress_type}: only stored and deflate are read"
        )
    _check_file_size(f"{name} in {archive}", entry.file_size)
    with handle.open(entry) as file:
        # `ZipFile.read` would unpack the whole entry, which may be far larger than it states.
        return file.read(entry.file_size + 1)


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        _check_file_size(path, os.fstat(file.fileno()).st_size)
        return file.read()


def _check_file_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise BadImageError(f"{name} has {num_bytes:,} bytes (unpacked), more than the limit of {MAX_FILE_BYTES:,}")
