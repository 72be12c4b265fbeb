# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Class labels: from names or numbers, and from lists such as `dataset.json`."""

import json

import numpy as np

from diffit.errors import UserError

MAX_CLASSES = 100_000  # one absurd label must not fill the memory with class names


def encode_labels(
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


def parse_json(text: bytes, name: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError, too
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def check_listed(listed: list, names: list[str], source: str) -> dict[str, int | str | None]:
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
