# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the scripts share at their two ends: how flags are read, and how an error ends the script."""

import argparse
import atexit
import dataclasses
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from diffit.errors import RunError, UserError, local_rank, message_of, speaks_for

EXIT_USER_ERROR = 2  # as argparse
EXIT_RUN_ERROR = 1
# How gloo and NCCL say that another process has ended.
LOST_PEER = re.compile(r"connection (was )?(closed|reset|refused)|remote process exited|broken pipe", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed once a machine, without tokens of the hub.

    Every script has `--debug`. Flags are never abbreviated.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument(
            "--debug",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="show the traceback of an error that would otherwise be one line (default: off)",
        )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"hf_\w{8,}", "hf_...", " ".join(message.split()))
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n" if local_rank() == 0 else None)


def path_type(text: str) -> str:
    """An argparse type for paths, and for hub names, which are left as they are: expands a leading `~`."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    if "\0" in text or any(0xDC80 <= ord(sign) <= 0xDCFF for sign in text):  # surrogates: bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"{os.fsencode(text)!r} is not a path in UTF-8")
    if "$" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} holds a $, and variables are not expanded here: write the path out"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r}: no such user; ./{text} is the folder of that name")
    return expanded


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


def step_rules_type(text: str) -> str:
    """An argparse type for --lr_step_rules, such as `1:1000,0.1:2000,0.01`; returns the text unchanged."""
    *rules, last = text.split(",")
    try:
        float(last)
        for rule in rules:
            multiple, steps = rule.split(":")
            float(multiple), int(steps)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected MULTIPLE:STEP pairs and a last MULTIPLE, such as 1:1000,0.1:2000,0.01, got {text!r}"
        ) from None
    return text


def number_type(kind: type, minimum: float, maximum: float = math.inf, open_ends: bool = False):
    """An argparse type: an int or a float in [minimum, maximum], or between the two if `open_ends`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        inside = minimum < value < maximum if open_ends else minimum <= value <= maximum and math.isfinite(value)
        if not inside:
            limits = f"{minimum} and {maximum}" + (", both excluded" if open_ends else "")
            raise argparse.ArgumentTypeError(f"{value} is not between {limits}")
        return value

    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Flags as fields of frozen dataclasses


def flag(default: Any, help: str, *, fixed: bool = False, fixed_if: tuple[str, str] | None = None, **options) -> Any:
    """A field of a config dataclass that is a command-line flag of the same name.

    Args:
        default: value without the flag; None where the help says what happens then. `--help` shows every other one.
        help: what the flag does, with its unit.
        fixed: whether a resumed training must have the same value (see `diffit.checkpoint.check_same_run`).
        fixed_if: another flag and its value, without which this flag has no effect and may differ.
        options: of `ArgumentParser.add_argument`, such as `type`, `choices` or `nargs`. A bool needs none.
    """
    metadata = {"help": help, "fixed": fixed, "fixed_if": fixed_if, "options": options}
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(parser: argparse.ArgumentParser, config_class: type, title: str | None = None, prefix: str = "") -> None:
    """Adds a flag for each field of a config dataclass, those of nested configs included.

    Args:
        parser: gets the flags.
        config_class: its fields are made by `flag`, or are config dataclasses with a `prefix` in their metadata.
        title: of a group of their own in `--help`.
        prefix: in front of each name, such as `validation_`.
    """
    group = parser if title is None else parser.add_argument_group(title)
    for field in dataclasses.fields(config_class):
        if not field.metadata:  # `debug`, which every parser has
            continue
        if "options" not in field.metadata:
            add_flags(group, field.type, field.metadata["title"], prefix + field.metadata["prefix"])
            continue
        options, text = dict(field.metadata["options"]), field.metadata["help"]
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
            text += f" (default: {'on' if field.default else 'off'})"
        elif field.default is not None:
            shown = field.default if isinstance(field.default, tuple) else (field.default,)
            text += f" (default: {' '.join(map(str, shown))})"
        group.add_argument(f"--{prefix}{field.name}", default=field.default, help=text.replace("%", "%%"), **options)


def from_flags(config_class: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Builds a config dataclass from parsed flags.

    Args:
        config_class: see `add_flags`.
        values: by the names of the flags; others are left alone.
        prefix: see `add_flags`.

    Raises:
        UserError: from the rules of the config, which name flags without the prefix; it is put before them here.
    """
    arguments = {}
    for field in dataclasses.fields(config_class):
        if "prefix" not in field.metadata:
            value = values[prefix + field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
        else:
            arguments[field.name] = from_flags(field.type, values, prefix + field.metadata.get("prefix", ""))
    try:
        return config_class(**arguments)
    except UserError as error:
        names = "|".join(name for name, _ in flag_fields(config_class))
        raise UserError(re.sub(rf"--({names})\b", rf"--{prefix}\1", str(error))) from error


def to_flags(config: Any, prefix: str = "") -> dict[str, Any]:
    """The opposite of `from_flags`: values by the names of the flags."""
    values = {}
    for field in dataclasses.fields(config):
        if not field.metadata:
            continue
        value = getattr(config, field.name)
        if "prefix" not in field.metadata:
            values[prefix + field.name] = list(value) if isinstance(value, tuple) else value
        else:
            values |= to_flags(value, prefix + field.metadata.get("prefix", ""))
    return values


def parse_config(parser: argparse.ArgumentParser, config_class: type, argv: list[str] | None = None) -> Any:
    """Reads the command line into a config; a value that its rules refuse ends the script like a flag that is unknown.

    Args:
        parser: with the flags of `config_class` (see `add_flags`).
        argv: the command line; default: that of this process.
    """
    values = vars(parser.parse_args(argv))
    try:
        return from_flags(config_class, values)
    except UserError as error:
        parser.error(message_of(error))


def nested(config_class: type, prefix: str = "", title: str | None = None) -> Any:
    """A field of a config dataclass that is one itself, whose flags have `prefix` before their names.

    Args:
        config_class: the inner one.
        prefix: see above.
        title: of a group of their own in `--help`; default: they stand with the flags of the outer one.
    """
    return dataclasses.field(default_factory=config_class, metadata={"prefix": prefix, "title": title})


def flag_fields(config_class: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    """All flags of a config dataclass and its nested ones, with the fields that describe them."""
    for field in dataclasses.fields(config_class):
        if "options" in field.metadata:
            yield prefix + field.name, field
        elif "prefix" in field.metadata:
            yield from flag_fields(field.type, prefix + field.metadata.get("prefix", ""))


def given(config: Any, names: tuple[str, ...]) -> list[str]:
    """Which of these flags are set; they may be those of nested configs."""
    values = to_flags(config)
    return [name for name in names if values[name] is not None]


def require_one(config: Any, names: tuple[str, ...]) -> None:
    """Refuses a config unless exactly one of these flags is set; they may be those of nested configs."""
    if len(found := given(config, names)) != 1:
        got = " and ".join(f"--{name} {to_flags(config)[name]}" for name in found) or "none"
        raise UserError(f"give exactly one of {', '.join('--' + name for name in names)}; got {got}")


def refuse_both(config: Any, first: str, second: str) -> None:
    """Refuses a config in which both fields are set."""
    if len(given(config, (first, second))) == 2:
        raise UserError(f"give --{first} or --{second}, not both")


# ---------------------------------------------------------------------------------------------------------------------
# From the first line to the last


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Runs a script to its end. An error made for people is printed as one line, once; a bug shows its traceback.

    Args:
        main: the script.
        config: its argument, the parsed command line, with `debug`.
    """
    atexit.register(_end_workers)
    try:
        main(config)
        return
    except (UserError, RunError) as error:
        if config.debug:
            raise
        message, speaks = f"error: {message_of(error)}", speaks_for(error)
        exit_code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_ERROR
    except RuntimeError as error:
        import torch.distributed

        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if config.debug or not several or not LOST_PEER.search(str(error)):
            raise
        message, speaks, exit_code = "stopped, because another process of the run has ended", True, EXIT_RUN_ERROR
    for progress in list(getattr(tqdm, "_instances", ())):
        progress.close()  # or the message would stand behind it
    if speaks:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def _end_workers() -> None:
    """Ends data-loader workers that an error has left behind.

    They ignore SIGTERM (see `ignore_stop_signals`), which is how Python would end them, and wait for their end.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their death as an error
    for worker in workers:
        worker.kill()
