# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lists and reads the files in folders and zips of images. Neither is trusted: see `diffit.sources`."""

import json
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from diffit.decode import MAX_IMAGE_PIXELS, PILLOW_FORMATS
from diffit.errors import BadImageError, UserError, global_rank, printable, user_errors
from diffit.run_dir import is_listed, our_files

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = {".bmp", ".gif", ".npy", ".tif", ".tiff", ".webp"}
IMAGE_EXTENSIONS |= {".jfif", ".jpe", ".jpeg", ".jpg", ".apng", ".png", ".pbm", ".pgm", ".pnm", ".ppm"}
IMAGE_EXTENSIONS |= {".avif"} if "AVIF" in PILLOW_FORMATS else set()
# Images that phones, cameras, browsers and other programs write, and that are not read here.
OTHER_FORMATS = re.compile(
    r"\.(avifs?|heic|heif|hif|jxl|jp2|j2k|jpf|jpx|jxr|wdp|tga|targa|psd|psb|xcf|kra|dds|exr|hdr|pcx|ico|icns|eps"
    r"|dng|arw|cr2|cr3|crw|nef|nrw|orf|raf|rw2|pef|srw|x3f|dcm|fits?"
    r"|(jpe?g|png|webp|gif|bmp)[^a-z].*)",  # x.jpg_large, x.jpg!d, x.png~
    re.IGNORECASE,
)
# Of NAS devices, Windows and ext4.
SYSTEM_FOLDERS = {"@eadir", "#recycle", "@recycle", "#snapshot", "$recycle.bin", "system volume information"}
SYSTEM_FOLDERS |= {"lost+found", "__macosx"}
READ_FILES = {"dataset.json", "metadata.jsonl"}
SHOWN = 5  # examples in a log line
MAX_LISTINGS = 16  # of one folder under several names, so that links cannot multiply it without end
MAX_FILE_BYTES = 8 * MAX_IMAGE_PIXELS  # 512 MiB unpacked: four channels of 16 bits of the largest image
SPLIT_WORDS = dict.fromkeys(("train", "training", "trainset", "traina", "trainb"), "training") | dict.fromkeys(
    ("test", "testing", "testset", "testa", "testb", "val", "vals", "valid", "validation", "validate", "valset")
    + ("dev", "eval", "evaluation", "holdout", "heldout"),
    "held-out",
)
NEUTRAL_WORDS = {"data", "dataset", "image", "images", "img", "imgs", "set", "split"}  # as in `train_images`
OUTSIDE_A_ZIP = re.compile(r"^/|(^|/)\.\.(/|$)|^[A-Za-z]:|\\")  # absolute, upwards, a drive, a Windows separator


@dataclass
class Files:
    """The files in a folder or zip, without hidden ones, and a count of what is left out.

    Attributes:
        root: the folder or zip.
        names: relative to it, sorted.
        left_out: how often something was left out, by (reason, example or extension).
    """

    root: Path
    names: list[str]
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def read(self, name: str) -> bytes:
        """Bytes of a file.

        Raises:
            BadImageError: if it is too large, or compressed in an unknown way.
        """
        return read_from_zip(str(self.root), name) if self.root.is_file() else read_file(str(self.root / name))

    def leave_out(self, reason: str, examples: Iterable[str]) -> None:
        """Counts what is left out for one reason."""
        self.left_out.update((reason, example) for example in examples)

    def check_utf8(self, names: list[str]) -> None:
        """Refuses names that are not UTF-8, which neither Arrow nor a JSON file can hold.

        Raises:
            UserError: names one, and how to rename it.
        """
        wrong = [name for name in names if not name.isascii() and any("\ud800" <= sign <= "\udfff" for sign in name)]
        if wrong:
            raise UserError(
                f"--train_data_dir {self.root}: {len(wrong)} names are not UTF-8, such as {os.fsencode(wrong[0])!r}: "
                f"rename them (names in Latin-1 with `convmv -f latin1 -t utf8 -r --notest {self.root}`)"
            )

    def images(self, skip_other_formats: bool = False) -> list[str]:
        """Names of the images; files with other extensions are counted as left out, except `READ_FILES`.

        Args:
            skip_other_formats: leave out images in other formats, rather than refuse them.

        Raises:
            UserError: names images in formats that are not read.
        """
        by_extension = Counter(PurePosixPath(name).suffix.lower() for name in self.names)
        other = {
            extension: number
            for extension, number in by_extension.items()
            if extension not in IMAGE_EXTENSIONS and OTHER_FORMATS.fullmatch(extension)
        }
        if other and not skip_other_formats:
            example = next(name for name in self.names if PurePosixPath(name).suffix.lower() in other)
            raise UserError(
                f"--train_data_dir {self.root}: {sum(other.values())} image files are in formats that are not read "
                f"({_counts(other)}), such as {example}: convert them (`magick mogrify -format png FILES`), rename "
                "them if only the extension is wrong, or leave them out with --skip_other_formats"
            )
        for extension, number in by_extension.items():
            if extension not in IMAGE_EXTENSIONS | {".parquet"}:
                reason = "images in formats that are not read" if extension in other else "files that are not images"
                self.left_out[reason, extension or "no extension"] += number
        for name in READ_FILES & set(self.names):
            self.left_out["files that are not images", PurePosixPath(name).suffix] -= 1
        images = [name for name in self.names if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
        self.check_utf8(images)
        return images

    def report(self) -> None:
        """Logs what was left out, on one line."""
        if text := self.describe_left_out():
            if global_rank() == 0:
                logger.warning(f"{self.root}: left out {text}")

    def describe_left_out(self) -> str:
        """What was left out, such as `files that are not images: 3 (.txt 2, .md); hidden folders: 1 (.git)`."""
        reasons: dict[str, dict[str, int]] = {}
        for (reason, example), number in sorted(self.left_out.items()):
            if number > 0:
                reasons.setdefault(reason, {})[example] = number
        return "; ".join(f"{reason}: {sum(counts.values())} ({_counts(counts)})" for reason, counts in reasons.items())


def _counts(counts: dict[str, int]) -> str:
    """The most frequent things with their numbers; what cannot be printed in their names is escaped."""
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    text = ", ".join(f"{name} {number}" if number > 1 else name for name, number in shown)
    return printable(text) + (", ..." if len(counts) > SHOWN else "")


def list_files(root: Path, follow_links: bool = False) -> Files:
    """Lists the files in a folder, its sub-folders and folders linked there, or in a zip.

    Args:
        root: the folder or zip.
        follow_links: also read what links to places outside of the folder.

    Raises:
        UserError: names a link that leads nowhere or out of `root`, a folder that cannot be read, or an entry of a
            zip whose path leads out of it.
    """
    if root.is_dir():
        return _list_folder(root, follow_links)
    if root.is_file():
        with root.open("rb") as file:  # from its path, zipfile would take one that cannot be read for another format
            is_zip = zipfile.is_zipfile(file)
        if is_zip:
            return _list_zip(root)
    if root.suffix.lower() == ".parquet" and root.is_file():
        raise UserError(f"--train_data_dir {root} is a parquet file: give it as --train_data_file")
    raise UserError(
        f"--train_data_dir: neither a folder nor a zip: {root}; other archives must be unpacked, URLs downloaded"
    )


def _list_folder(root: Path, follow_links: bool) -> Files:
    files, listings = Files(root, []), Counter()
    pending = [("", (os.path.realpath(root),))]  # each folder with the real paths of those above it and of itself
    while pending:
        folder, above = pending.pop()
        is_empty = True
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name, is_link, is_empty = folder + entry.name, entry.is_symlink(), False
                    is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()  # which fails at loops
                    if reason := _reason_to_leave_out(entry.name, is_folder):
                        files.leave_out(reason, [name])
                        continue
                    if is_link:
                        _check_link(root, entry.path, follow_links)
                    if is_folder:
                        real = os.path.realpath(entry.path) if is_link else os.path.join(above[-1], entry.name)
                        listings[real] += 1
                        if real in above:
                            files.leave_out("links to a folder that holds them", [name])
                        elif listings[real] > MAX_LISTINGS:
                            raise UserError(f"--train_data_dir {root}: more than {MAX_LISTINGS} links lead to {real}")
                        else:
                            pending.append((f"{name}/", (*above, real)))
                    elif entry.is_file():
                        files.names.append(name)
                    else:
                        files.leave_out("pipes, sockets and devices", [name])
        except OSError as error:
            raise UserError(f"--train_data_dir: cannot list {root / folder}: {error.strerror}") from error
        if is_empty and folder:
            files.leave_out("empty folders", [folder.rstrip("/")])
    files.names = _without_products(root, sorted(files.names))
    return files


def _reason_to_leave_out(name: str, is_folder: bool) -> str | None:
    """Why an entry of a folder is not read: it is hidden or the system's; None if it is read."""
    if is_folder and name.lower() in SYSTEM_FOLDERS:
        return "folders of the system"
    if name.startswith("."):
        return "hidden folders" if is_folder else "hidden files"
    return None


def _without_products(root: Path, names: list[str]) -> list[str]:
    """Drops the files that training, sampling and evaluation have written (see `diffit.run_dir`).

    Logs how many images and parquet files were dropped. If `root` itself is a folder of samples, they are kept: they
    are the data that the user asked for.
    """
    folders = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in names}}
    folders |= {parent for folder in folders for parent in folder.parents}
    marks = {folder: files for folder in folders if (files := our_files(root / folder))}
    real_root = root.resolve()
    above = {folder: files for folder in real_root.parents if (files := our_files(folder))}  # for RUN/previews
    if not marks and not above:  # nearly always; saves most of the time that listing takes
        return names
    asked_for = listed_samples(root)
    kept, left_out = [], {}
    for name in names:
        path, full_path = PurePosixPath(name), real_root / name
        owners = [
            folder
            for folder in path.parents
            if folder in marks and is_listed(path.relative_to(folder).as_posix(), marks[folder])
        ]
        owners += [
            folder for folder, files in above.items() if is_listed(full_path.relative_to(folder).as_posix(), files)
        ]
        if not owners or name in asked_for:
            kept.append(name)
        elif path.suffix.lower() in IMAGE_EXTENSIONS | {".parquet"}:
            left_out[owners[0]] = left_out.get(owners[0], 0) + 1
    if left_out and global_rank() == 0:
        places = {str(root / folder): number for folder, number in left_out.items()}
        logger.warning(f"{root}: skipped {sum(left_out.values())} files that DiffiT has written, in {_counts(places)}")
    return kept


def listed_samples(root: Path) -> set[str]:
    """The images that a `samples.json` of `sample_diffit.py` lists; empty if it is missing or not valid."""
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
                f"not trained on together: {advice}; if they are not splits, rename them"
            )
    paths = {path for splits in levels.values() for path in splits.values()}
    places = sorted({str(path.parent) for path in paths if not paths & set(path.parents)})  # not train/train-0.parquet
    if files and len(places) > 1:
        raise UserError(
            f"--train_data_dir {root} holds several configurations of a data set, {' and '.join(places)}: give one of "
            "these folders"
        )


def _check_link(root: Path, link: str, follow_links: bool) -> None:
    target = os.path.realpath(link)
    if not os.path.exists(target):
        raise UserError(
            f"--train_data_dir {root}: {link} is a link to {target}, which does not exist or is a link to itself"
        )
    if not follow_links and not Path(target).is_relative_to(os.path.realpath(root)):
        raise UserError(
            f"--train_data_dir {root}: {link} is a link to {target}, outside of the folder. Links that leave it are "
            f"only followed with --follow_links; or copy or hard-link the files (`cp -rL {root} COPY`, or `cp -rlL`, "
            "which takes no space)"
        )


def _list_zip(root: Path) -> Files:
    files, folders = Files(root, []), set()
    with user_errors(
        f"--train_data_dir {root}: damaged zip", ValueError, OSError, zipfile.BadZipFile, NotImplementedError
    ):
        entries = open_zip(str(root))[0].infolist()
    for entry in entries:
        if OUTSIDE_A_ZIP.search(entry.filename):
            raise UserError(
                f"--train_data_dir {root}: the entry {entry.filename!r} has a name that leads out of the archive; "
                "names must be relative, with / between folders. Repack it, or unpack it with a tool you trust"
            )
        path = PurePosixPath(_plain_name(entry))
        parts = [*path.parents[-2::-1], path]  # from the root downwards
        reasons = [(_reason_to_leave_out(part.name, part is not path), str(part)) for part in parts]
        if first := next((reason for reason in reasons if reason[0]), None):
            files.left_out[first] = 1  # a hidden folder counts once
        elif entry.is_dir():
            folders.add(path.as_posix())
        else:
            files.names.append(path.as_posix())
    if repeated := [name for name, number in Counter(files.names).items() if number > 1]:
        raise UserError(
            f"--train_data_dir {root} holds several entries of the name {repeated[0]}, of which only one can be read: "
            "repack it"
        )
    folders -= {parent.as_posix() for name in {*files.names, *folders} for parent in PurePosixPath(name).parents}
    files.leave_out("empty folders", folders)
    files.names.sort()
    return files


def _plain_name(entry: zipfile.ZipInfo) -> str:
    """Name of an entry without `./` and repeated separators, which some programs write."""
    return PurePosixPath(entry.filename).as_posix()


_open_zips: dict[str, tuple[int, zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] = {}


def open_zip(path: str) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Opens a zip: its handle, and its files by their names in `Files`."""
    # One handle per process: a forked worker must not share its parent's file offset.
    pid, handle, entries = _open_zips.get(path, (None, None, None))
    if pid != os.getpid():
        handle = zipfile.ZipFile(path)
        entries = {_plain_name(entry): entry for entry in handle.infolist() if not entry.is_dir()}
        _open_zips[path] = (os.getpid(), handle, entries)
    return handle, entries


def read_from_zip(archive: str, name: str) -> bytes:
    handle, entries = open_zip(archive)
    entry = entries[PurePosixPath(name).as_posix()]
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
