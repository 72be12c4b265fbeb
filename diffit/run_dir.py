# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tells our own files in a folder, which may be overwritten or deleted and are never read as data, from the user's.

Before a script writes a file into a folder that the user chose, it lists the file in the folder's mark, the hidden
`.diffit.json`; afterwards it adds the file's fingerprint. A file that the mark does not list, or that has changed
since, belongs to the user: it is never overwritten, deleted or moved, and if a script needs its name, the script
refuses the folder at the start. The same lists exclude the products of earlier runs from a data folder.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import yaml

from diffit.errors import UserError, user_errors

MARK = ".diffit.json"
CODE_FOLDER = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"  # size and checksum of each file in a checkpoint
HASHED_BYTES = 16 * 2**20  # the fingerprint of a larger file is its size alone
SHOWN = 3  # maximum number of file names in a message

# Everything that a training run writes. A folder stands for everything below it.
PIPELINE_FILES = ("README.md", "sample_grid.png", "diffit_pipeline.py", "training_args.yaml", "model_index.json")
PIPELINE_FOLDERS = ("unet", "transformer", "vae", "scheduler")
RUN_OUTPUTS = (
    *PIPELINE_FILES,
    *PIPELINE_FOLDERS,
    *("best", "tmp-pipeline", "tmp-checkpoint-*", "previews/step_*.png", "eval/best.json"),
)


def fingerprint(file: Path) -> str:
    """Identifies the contents of a file: its SHA-256, or the size in bytes above `HASHED_BYTES`."""
    size = file.stat().st_size
    if size > HASHED_BYTES:
        return f"size:{size}"
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def file_digest(file: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with file.open("rb") as handle:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def files_below(path: Path) -> Iterator[Path]:
    """Yields a file or link itself, or all files and links below a folder. Links are not followed."""
    if path.is_symlink() or path.is_file():
        yield path
    elif path.is_dir():
        for folder, subfolders, names in os.walk(path):
            yield from (Path(folder, name) for name in names)
            yield from (Path(folder, name) for name in subfolders if Path(folder, name).is_symlink())


class OutputFolder:
    """A folder that a script writes to. Only one process of a run may use it.

    Args:
        folder: the folder; it need not exist.
        writer: name of the script, for the mark and for messages. Files of other scripts do not count as this one's.
        flag: flag that names the folder, for messages.

    Raises:
        UserError: if `folder` is not a folder, or its mark is not a file.

    Attributes:
        files: maps our files, by their names relative to the folder, to their fingerprints; None while a file is
            being written. A name that ends in `/` stands for everything below that folder, `./` for all of this one.
        unproved: names of files that may have been edited, and that are left alone without refusing the folder: the
            model cards of a run by a version without marks.
    """

    def __init__(self, folder: str | Path, writer: str, flag: str = "--output_dir"):
        self.folder, self.writer, self.flag = Path(folder), writer, flag
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder")
        if (self.folder / MARK).is_dir():
            raise UserError(f"{flag} {folder}: {MARK} must be a file, the list of files written there; it is a folder")
        self.files: dict[str, str | None] = our_files(self.folder, writer)
        is_marked = bool(read_mark(self.folder))
        self.unproved = set() if is_marked or not self.files else {"README.md", "best/README.md"}

    def is_ours(self, name: str) -> bool:
        """Whether the mark proves that a file, named relative to the folder, is ours."""
        return is_listed(name, self.files)

    def is_unchanged(self, name: str) -> bool:
        """Whether a file is ours and has not changed since it was written."""
        file, recorded = self.folder / name, self.files.get(name)
        if not self.is_ours(name) or file.is_symlink() or not file.is_file():
            return False
        return recorded is None or recorded == fingerprint(file)

    def refuse_code_folder(self) -> None:
        """Refuses the folder of this code, which outputs would clutter or overwrite.

        Raises:
            UserError: names the flag, if it is that folder.
        """
        if self.folder.resolve() == CODE_FOLDER or is_within(self.folder, CODE_FOLDER / "diffit"):
            raise UserError(f"{self.flag} {self.folder} is the folder of this code; choose another folder")

    def create(self) -> None:
        """Creates the folder.

        Raises:
            UserError: if it cannot be created, or is the folder of this code.
        """
        self.refuse_code_folder()
        with user_errors(f"{self.flag} {self.folder}", OSError):
            self.folder.mkdir(parents=True, exist_ok=True)

    def check_free(self, names: Iterable[str]) -> None:
        """Checks that no file of the user's would be overwritten. To be called at the start, before any slow work.

        Args:
            names: everything that will be written: files, folders, and patterns for `Path.glob`.

        Raises:
            UserError: lists files with these names that are not ours, or have changed since we wrote them.
        """
        foreign, changed = [], []
        for name in names:
            for relative in self._found(name):
                if relative in self.unproved:
                    continue
                if not self.is_ours(relative):
                    foreign.append(relative)
                elif not self.is_unchanged(relative):
                    changed.append(relative)
        if foreign:
            raise UserError(
                f"{self.flag} {self.folder} holds {listed(foreign)}, which {self.writer} did not write and would "
                "overwrite; choose another folder, or move your files away"
            )
        if changed:
            raise UserError(
                f"{self.flag} {self.folder}: {listed(changed)} changed since {self.writer} wrote it and would be "
                "overwritten; move your version away, or choose another folder"
            )

    def _found(self, name: str) -> Iterator[str]:
        """Names of existing files that are in the way of a file, folder or pattern to be written."""
        for parent in list(PurePosixPath(name).parents)[-2::-1]:
            place = self.folder / parent
            if os.path.lexists(place) and not place.is_dir():  # a file where a folder is needed
                yield parent.as_posix()
                return
        is_pattern = any(sign in name for sign in "*?[")
        for found in sorted(self.folder.glob(name)) if is_pattern else [self.folder / name]:
            if not os.path.lexists(found):
                continue
            below = list(files_below(found))
            if not below and found.suffix:  # an empty folder where a file is needed
                below = [found]
            yield from (file.relative_to(self.folder).as_posix() for file in below)

    def announce(self, names: Iterable[str]) -> None:
        """Lists files in the mark before they are written."""
        self._update({name: None for name in names})

    def record(self, names: Iterable[str]) -> None:
        """Records the fingerprints of files that have been written, and removes missing files from the mark."""
        names = list(names)
        there = [name for name in names if (self.folder / name).is_file()]
        self._update({name: fingerprint(self.folder / name) for name in there}, set(names) - set(there))

    def forget(self, names: Iterable[str]) -> None:
        """Removes files from the mark that no longer exist."""
        self._update({}, set(names))

    def _update(self, entries: dict[str, str | None], struck_off: Iterable[str] = ()) -> None:
        # Read again: another process may have changed the mark, for example a second sampling into this folder.
        marked = read_mark(self.folder)
        files = {**marked.get(self.writer, self.files), **entries}
        self.files = {name: value for name, value in files.items() if name not in struck_off}
        write_mark(self.folder, marked | {self.writer: self.files})

    def write(self, name: str, save: Callable[[Path], object]) -> bool:
        """Writes one file, unless a file of that name exists that is not ours or has changed.

        Args:
            name: name of the file, relative to the folder.
            save: function that writes the file to a given path.

        Returns:
            Whether the file was written.
        """
        file = self.folder / name
        if os.path.lexists(file) and not self.is_unchanged(name):
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        self.announce([name])
        save(file)
        self.record([name])
        return True

    def publish(self, staged: Path, target: str = "", earlier: Iterable[str] = ()) -> list[str]:
        """Moves the files of a staging folder to their final places, `model_index.json` last.

        An existing file that is not ours, or has changed, stays; its new version then stays in the staging folder.

        Args:
            staged: staging folder below this folder.
            target: sub-folder that the files are moved to; "" for this folder.
            earlier: names of the files of the version that is replaced; those without a new version are deleted.

        Returns:
            Names of the existing files that were kept.
        """
        found = sorted(files_below(staged), key=lambda file: (file.name == "model_index.json", file))
        places = {file: PurePosixPath(target, file.relative_to(staged).as_posix()).as_posix() for file in found}
        kept = [
            name for name in places.values() if os.path.lexists(self.folder / name) and not self.is_unchanged(name)
        ]
        moved = {file: name for file, name in places.items() if name not in kept}
        self.announce(moved.values())
        for file, name in moved.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.folder / name)
        self.record(moved.values())
        self.remove(set(earlier) - set(places.values()))
        remove_empty_folders(staged)
        return kept

    def remove(self, names: Iterable[str]) -> None:
        """Deletes those of the files that are ours and unchanged, then folders that have become empty.

        Args:
            names: files, or folders that end in `/`, relative to this folder. Everything below a folder is deleted.
        """
        names = list(names)
        for name in names:
            file = self.folder / name
            if name.endswith("/"):
                for inner in list(files_below(file)):
                    inner.unlink(missing_ok=True)
                remove_empty_folders(file)
            elif self.is_unchanged(name):
                file.unlink()
            for parent in PurePosixPath(name).parents:
                if parent.as_posix() != ".":
                    with contextlib.suppress(OSError):
                        (self.folder / parent).rmdir()
        self.forget([name for name in names if not os.path.lexists(self.folder / name)])


def listed(names: list[str]) -> str:
    """Joins the first few names into a text that also says how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def is_listed(name: str, files: Iterable[str]) -> bool:
    """Whether the names in a mark, some of which stand for whole folders, include a file."""
    if name in files or "./" in files:
        return True
    return any(f"{parent.as_posix()}/" in files for parent in PurePosixPath(name).parents)


def remove_empty_folders(path: Path) -> None:
    """Deletes the empty folders below a path, and the path itself if nothing is left in it."""
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is `folder` or lies below it, with links resolved."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def read_mark(folder: Path) -> dict[str, dict[str, str | None]]:
    """Contents of a folder's mark, by script (see `OutputFolder.files`); empty if it is missing or damaged."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))["files_written_by"]
        return {str(writer): dict(files) for writer, files in mark.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_mark(folder: Path, files: dict[str, dict[str, str | None]]) -> None:
    """Writes a mark atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MARK}-{os.getpid()}"
    temporary.write_text(json.dumps({"files_written_by": files}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MARK)


def claim_whole_folder(folder: Path, writer: str) -> None:
    """Marks everything in a new or empty folder as ours, for folders named by a checksum of their settings."""
    if not folder.is_dir() or not any(folder.iterdir()):
        write_mark(folder, {writer: {"./": None}})


def remove_whole_folder(folder: Path) -> None:
    """Deletes a folder if everything in it is ours, otherwise leaves it untouched."""
    if "./" in our_files(folder):
        for file in list(files_below(folder)):
            file.unlink(missing_ok=True)
        remove_empty_folders(folder)


def our_files(folder: Path, writer: str | None = None) -> dict[str, str | None]:
    """Our files in a folder, by its mark, or by their contents if a version without marks has written them.

    Args:
        folder: the folder; it need not exist.
        writer: name of a script whose files are wanted; None for all scripts.

    Returns:
        Names and fingerprints as in `OutputFolder.files`.
    """
    by_writer = read_mark(folder)
    if not by_writer:
        for script, name in _unmarked_products(folder):
            by_writer.setdefault(script, {})[name] = None
    if writer is not None:
        return by_writer.get(writer, {})
    return {name: value for files in by_writer.values() for name, value in files.items()}


def _unmarked_products(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields (script, file name) of the files that versions without marks have written."""
    if (folder / "training_args.yaml").is_file():
        yield from (("train_diffit.py", name) for name in _unmarked_run(folder))
    if (folder / "samples.json").is_file():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            summary = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
            names = [row["file"] for row in summary["images"] if {"file", "seed", "class"} <= set(row)]
            if names and "arguments" in summary:
                names += ["samples.json", "grid.png", "samples.npz"]
                yield from (("sample_diffit.py", name) for name in names if (folder / name).is_file())
    if (folder / "latents.json").is_file() and (folder / "data").is_dir():
        with contextlib.suppress(OSError, ValueError, TypeError):
            if "latent_shape" in json.loads((folder / "latents.json").read_text(encoding="utf-8")):
                shards = [file.name for file in (folder / "data").iterdir()]
                names = [f"data/{name}" for name in shards if re.fullmatch(r"train-\d+-of-\d+\.parquet", name)]
                yield from (("prepare_latents.py", name) for name in ["latents.json", *names])
    if (folder / "settings.json").is_file() and re.fullmatch(r"(features|samples)-[0-9a-f]{8,}", folder.name):
        yield "eval_diffit.py", "./"
    if (folder / "neighbours.png").is_file() and (folder / "neighbour_distances.png").is_file():
        yield from (("eval_diffit.py", name) for name in ("neighbours.png", "neighbour_distances.png"))


def _unmarked_run(folder: Path) -> Iterator[str]:
    """Yields the files of a training run by a version without marks: files with our names and matching contents."""
    try:
        arguments = yaml.safe_load((folder / "training_args.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(arguments, dict) or not {"output_dir", "train_batch_size"} <= set(arguments):
        return
    if not (folder / "model_index.json").is_file() and not any(map(is_checkpoint, folder.glob("checkpoint-*"))):
        return
    for root in (folder, folder / "best"):
        names = ["training_args.yaml", "model_index.json", "sample_grid.png", "diffit_pipeline.py"]
        written = r"config\.json|scheduler_config\.json|diffit_model\.py|diffusion_pytorch_model.*\.(safetensors|json)"
        for part in PIPELINE_FOLDERS:
            files = [file for file in files_below(root / part) if re.fullmatch(written, file.name)]
            names += [file.relative_to(root).as_posix() for file in files]
        yield from ((root / name).relative_to(folder).as_posix() for name in names if (root / name).is_file())
    previews = [file for file in folder.glob("previews/step_*.png") if re.fullmatch(r"step_\d{8}.*\.png", file.name)]
    yield from (file.relative_to(folder).as_posix() for file in previews)
    yield from (
        f"{path.name}/" for path in folder.glob("tmp-*") if path.name.startswith(("tmp-pipeline", "tmp-check"))
    )
    if (folder / "eval" / "best.json").is_file():
        yield "eval/best.json"
    logs = files_below(folder / str(arguments.get("logging_dir", "logs")) / "train_diffit")
    yield from (log.relative_to(folder).as_posix() for log in logs if log.name.startswith("events.out.tfevents."))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, whose manifest serves as their mark


def manifest_files(checkpoint: Path) -> list[str]:
    """Names of the files in a checkpoint of ours, by its manifest; empty if it has no manifest or is not ours."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(manifest, dict) or not {"state.json", "training_args.yaml", "optimizer.pt"} <= set(manifest):
        return []
    return [name for name in manifest if not Path(name).is_absolute() and ".." not in Path(name).parts]


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer step N in the name `checkpoint-N`."""
    return int(checkpoint.name.split("-")[1])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, oldest first, including damaged ones (see `verify_checkpoint`)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, damaged or not."""
    return bool(manifest_files(path))


def remove_checkpoint(path: Path) -> None:
    """Deletes the files named in a checkpoint's manifest, and the folder if nothing else is in it.

    A folder that is not a checkpoint of ours is left untouched.

    Raises:
        OSError: if a file cannot be deleted, or the folder is a link.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a link")
    names = manifest_files(path)
    for name in names:
        (path / name).unlink(missing_ok=True)
    if names:
        (path / MANIFEST).unlink(missing_ok=True)
        remove_empty_folders(path)
