# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Class labels: where they are found in a folder or zip of images, and how names become numbers."""

import json
import logging
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
from datasets import ClassLabel, Features, Value

from diffit.errors import UserError, global_rank
from diffit.listing import OUTSIDE_A_ZIP, READ_FILES, Files

logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000  # one absurd label must not fill the memory with class names


def encode_labels(
    values: list[int | str], source: str, names: list[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the class of each image and the class names. Integer labels keep their values.

    Args:
        values: class names or integers.
        source: for messages.
        names: of the classes, if the data set has them.

    Raises:
        UserError: names labels that are neither all names nor all numbers of classes.
    """
    most = len(names or range(MAX_CLASSES)) - 1
    if unusable := [str(value) for value in values if type(value) not in (int, str)]:  # None, lists, structs
        raise UserError(_wrong_labels(source, most, unusable))
    distinct = set(values)
    if distinct and all(isinstance(value, str) for value in distinct):
        if alike := same_in_unicode(distinct):
            raise UserError(
                f"{source}: the classes {ascii(alike[0])} and {ascii(alike[1])} are one name in two Unicode normal "
                "forms (NFC, NFD): rename one"
            )
        numeric = all(value.isdecimal() for value in distinct)
        names = sorted(distinct, key=(lambda name: (int(name), name)) if numeric else None)  # "2" before "10"
        numbers = {name: number for number, name in enumerate(names)}
        values = [numbers[value] for value in values]
    elif all(type(value) is int and 0 <= value <= most for value in distinct):
        names = names or [str(number) for number in range(max(distinct) + 1)]
    else:
        wrong = [str(value) for value in distinct if type(value) is not int or not 0 <= value <= most]
        raise UserError(_wrong_labels(source, most, wrong))
    return np.array(values, np.int64), tuple(names)


def _wrong_labels(source: str, most: int, wrong: list[str]) -> str:
    shown = [value if len(value) <= 60 else f"{value[:60]}..." for value in sorted(set(wrong))[:5]]
    return (
        f"{source}: labels must all be class names, or all integers from 0 to {most}, got {shown} for {len(wrong)} "
        "images or classes"
    )


def parse_json(text: bytes, name: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError, too
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def same_in_unicode(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that look alike, because they differ in their Unicode normal form only; None if there are none."""
    first: dict[str, str] = {}
    for name in sorted(names):
        if name != first.setdefault(_canonical(name), name):
            return first[_canonical(name)], name
    return None


def _canonical(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def check_listed(
    listed: list, images: list[str], source: str, others: Iterable[str] = ()
) -> dict[str, int | str | None]:
    """Checks pairs of a file name and a label, and returns the labels by file name.

    A listed name may begin with `./`, or be in another Unicode normal form than the file's name.

    Args:
        listed: the pairs.
        images: names of the images that exist.
        source: file of the pairs, for messages.
        others: names of other files there, for messages.

    Raises:
        UserError: names an entry that is not such a pair, or an image that does not exist or has two labels.
    """
    if not isinstance(listed, list):
        raise UserError(f"{source}: expected a list of [file name, label], got {listed!r}")
    known, canonical = set(images), {_canonical(name): name for name in images}
    labels: dict[str, int | str | None] = {}
    other_forms = 0
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UserError(f"{source}: expected [file name, label], got {entry!r}")
        name = PurePosixPath(entry[0]).as_posix()  # without ./
        if name not in known and _canonical(name) in canonical:
            name, other_forms = canonical[_canonical(name)], other_forms + 1
        if name not in known:
            why = "is there, but is not read as an image" if name in others else "does not exist"
            if OUTSIDE_A_ZIP.search(name):
                why = "is not given relative to that folder, with / between folders"
            raise UserError(f"{source} names an image that {why}: {entry[0]!r}")
        if not isinstance(entry[1], int | str | None):
            raise UserError(f"{source}: the label of {entry[0]} must be a class name or a number, got {entry[1]!r}")
        if labels.setdefault(name, entry[1]) != entry[1]:
            raise UserError(f"{source} gives {entry[0]} two labels: {labels[name]!r} and {entry[1]!r}")
    if other_forms and global_rank() == 0:
        logger.warning(f"{source}: {other_forms} names match files in another Unicode normal form (NFC, NFD)")
    return labels


def find_labels(
    files: Files, images: list[str], label_column: str | None, needed: bool
) -> tuple[list[str], dict[str, int | str | None] | None, str]:
    """Finds the labels of the images in a folder or zip.

    They come from `dataset.json`, otherwise from `metadata.jsonl`, otherwise from the names of the first-level
    sub-folders, if every image lies in one and there are several.

    Args:
        files: of the folder or zip; images that `metadata.jsonl` does not list are counted there as left out.
        images: names of the images.
        label_column: key in `metadata.jsonl`, or None for `label`.
        needed: whether a damaged `dataset.json`, or wrong labels in `metadata.jsonl`, are an error or a reason to have
            no labels.

    Returns:
        Names of the images that are used; their labels by name, or None; and if None, why there are none.

    Raises:
        UserError: if a list is damaged or names an image that does not exist.
    """
    folders = {name.split("/")[0] for name in images}
    if "dataset.json" in files.names:
        source = f"dataset.json in {files.root}"
        try:
            listed = parse_json(files.read("dataset.json"), source).get("labels")
            if listed is not None:
                return images, check_listed(listed, images, source, set(files.names)), ""
        except UserError as error:
            if needed:
                raise
            return images, None, str(error)
        return images, None, f"{source} has no labels"
    if "metadata.jsonl" in files.names:
        return _labels_of_metadata(files, images, label_column, needed)
    if all("/" in name for name in images) and len(folders) > 1:
        return images, {name: name.split("/")[0] for name in images}, ""
    return images, None, _why_no_labels(files, images)


def _labels_of_metadata(
    files: Files, images: list[str], label_column: str | None, needed: bool
) -> tuple[list[str], dict[str, int | str | None] | None, str]:
    source = f"metadata.jsonl in {files.root}"
    records = [parse_json(line, source) for line in files.read("metadata.jsonl").split(b"\n") if line.strip()]
    column = label_column or "label"
    if label_column is not None and not any(column in record for record in records):
        raise UserError(f"--label_column {label_column}: {source} has no such key")
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("file_name"), str):
            raise UserError(f"{source}: record {number} has no text under the key file_name: {record!r:.200}")
    pairs = [[record["file_name"], record.get(column)] for record in records]
    reason = ""
    try:
        listed = check_listed(pairs, images, source, set(files.names))
    except UserError as error:
        if needed:
            raise
        reason = str(error)
        listed = check_listed([[name, None] for name, _ in pairs], images, source, set(files.names))
    files.leave_out("images that metadata.jsonl does not list", (name for name in images if name not in listed))
    images = [name for name in images if name in listed]
    if not images:
        raise UserError(f"{source} names no image")
    if reason:
        return images, None, reason
    if any(label is not None for label in listed.values()):
        return images, listed, ""
    keys = sorted({key for record in records for key in record} - {"file_name"})
    if column in keys:
        return images, None, f"the key {column} is null for all images of {source}"
    return images, None, f"{source} has no key label, but {', '.join(keys) or 'none'}: --label_column names the key"


def _why_no_labels(files: Files, images: list[str]) -> str:
    """What was looked at in a folder or zip without labels, and what would help."""
    beside = [name for name in images if "/" not in name]
    top = images[0].split("/")[0]
    reasons = []
    if beside and len(beside) < len(images):
        reasons.append(f"{len(beside)} images lie next to the folders of classes, such as {beside[0]}")
    elif not beside:
        advice = (
            "repack it without that folder"
            if files.root.is_file()
            else f"if it holds classes, give {files.root / top}"
        )
        reasons.append(f"all images lie in {top}/: {advice}")
    for name in [name for name in files.names if name.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))][:3]:
        where = f"only in {files.root} itself" if PurePosixPath(name).name in READ_FILES else "only dataset.json and"
        where += "" if where.endswith("itself") else " metadata.jsonl are"
        reasons.append(f"{name} is not read, {where}")
    return "; ".join(reasons) or "there is no dataset.json, no metadata.jsonl, and no folder for each class"


def why_no_label_column(features: Features) -> str:
    """Why none of the columns besides the images was taken for labels, and which could be."""
    if several := [name for name, feature in features.items() if isinstance(feature, ClassLabel)]:
        return f"--label_column must choose one of the columns {', '.join(several)}"
    fitting = [
        f"{name} ({feature.dtype})"
        for name, feature in features.items()
        if isinstance(feature, Value) and ("string" in feature.dtype or "int" in feature.dtype)
    ]
    others = f"the other columns are {', '.join(features)}" if features else "there is no column besides the images"
    advice = f"--label_column can name {', '.join(fitting)}" if fitting else others
    return f"no column is of type ClassLabel; {advice}"
