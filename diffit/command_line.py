# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The start and the end of every script: reading flags into config dataclasses, and reporting errors."""

import argparse
import atexit
import dataclasses
import errno
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from diffit.errors import RunError, UserError, local_rank, message_of, speaks_for

EXIT_USER_ERROR = 2  # argparse's exit code
EXIT_RUN_ERROR = 1
# Matches the errors of gloo and NCCL after another process has ended.
LOST_PEER = re.compile(r"connection (was )?(closed|reset|refused)|remote process exited|broken pipe", re.IGNORECASE)
# No space left, quota exceeded, read-only file system; Windows has no quotas of that name.
FULL_DISK = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS") if hasattr(errno, name)}
FULL_DISK_TEXT = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An argument parser with a `--debug` flag that prints errors as one line, once per machine, without hub tokens.

    Flags cannot be abbreviated.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument(
            "--debug",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="show the traceback of errors that are otherwise reported in one line (default: off)",
        )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"hf_\w{8,}", "hf_...", " ".join(message.split()))
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n" if local_rank() == 0 else None)


def path_type(text: str) -> str:
    """An argparse type for paths and hub names: expands a leading `~`, and leaves everything else unchanged."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    if "\0" in text or any(0xDC80 <= ord(sign) <= 0xDCFF for sign in text):  # surrogates stand for non-UTF-8 bytes
        raise argparse.ArgumentTypeError(f"{os.fsencode(text)!r} is not a valid UTF-8 path")
    if "$" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} contains a $, but variables are not expanded here: write the path out"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r}: no such user; write ./{text} for a folder with that name")
    return expanded


def positive_int(text: str) -> int:
    """An argparse type: an int of at least 1."""
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
    """Returns an argparse type for numbers in a range.

    Args:
        kind: int or float.
        minimum: lower bound.
        maximum: upper bound. The number must be finite in any case.
        open_ends: whether the bounds are excluded.
    """

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        inside = minimum < value < maximum if open_ends else minimum <= value <= maximum and math.isfinite(value)
        if not inside:
            limits = f"{minimum} and {maximum}" + (" (exclusive)" if open_ends else "")
            raise argparse.ArgumentTypeError(f"{value} is not between {limits}")
        return value

    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Flags as fields of frozen dataclasses


def flag(default: Any, help: str, *, fixed: bool = False, fixed_if: tuple[str, str] | None = None, **options) -> Any:
    """Defines a field of a config dataclass that is also a command-line flag with the same name.

    Args:
        default: the flag's default value. `--help` shows it, except for None, which `help` must explain.
        help: what the flag does, with its unit.
        fixed: whether a resumed training must keep the value (see `diffit.checkpoint.check_same_run`).
        fixed_if: name and value of another flag, without which this one has no effect and need not be kept.
        options: arguments for `ArgumentParser.add_argument`, such as `type`, `choices` or `nargs`. A bool needs none.
    """
    metadata = {"help": help, "fixed": fixed, "fixed_if": fixed_if, "options": options}
    return dataclasses.field(default=default, metadata=metadata)


def add_flags(
    parser: argparse.ArgumentParser,
    config_class: type,
    title: str | None = None,
    prefix: str = "",
    several: Container[str] = (),
) -> None:
    """Adds the flags of a config dataclass, including those of nested configs, to a parser.

    Args:
        parser: receives the flags.
        config_class: a dataclass whose fields are defined by `flag` or `nested`.
        title: title of a separate section in `--help`, or None for no section.
        prefix: prepended to the name of each flag, such as `validation_`.
        several: names of flags that take one or more values; given on the command line, they are parsed as lists.
    """
    group = parser if title is None else parser.add_argument_group(title)
    for field in dataclasses.fields(config_class):
        if not field.metadata:  # `debug`, which `Parser` defines
            continue
        if "options" not in field.metadata:
            add_flags(group, field.type, field.metadata["title"], prefix + field.metadata["prefix"], several)
            continue
        options, text = dict(field.metadata["options"]), field.metadata["help"]
        if prefix + field.name in several:
            options["nargs"] = "+"
            text += "; of several values, all combinations with those of other such flags are measured"
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
        values: parsed values by the name of their flag; those of other flags are ignored.
        prefix: see `add_flags`.

    Raises:
        UserError: if a rule of the config is violated. The rules name flags without the prefix; it is added here.
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
    """The inverse of `from_flags`: the values of a config by the name of their flag."""
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
    """Parses the command line into a config. A violated rule ends the script as an unknown flag does.

    Args:
        parser: a parser with the flags of `config_class` (see `add_flags`).
        config_class: the config to build.
        argv: the command line, or None for that of this process.
    """
    values = vars(parser.parse_args(argv))
    try:
        return from_flags(config_class, values)
    except UserError as error:
        parser.error(message_of(error))


def nested(config_class: type, prefix: str = "", title: str | None = None) -> Any:
    """Defines a field that is itself a config dataclass.

    Args:
        config_class: the inner config.
        prefix: prepended to the names of its flags.
        title: title of a separate section in `--help`, or None to list its flags with those of the outer config.
    """
    return dataclasses.field(default_factory=config_class, metadata={"prefix": prefix, "title": title})


def flag_fields(config_class: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    """Yields the name and the field of every flag of a config dataclass, including those of nested configs."""
    for field in dataclasses.fields(config_class):
        if "options" in field.metadata:
            yield prefix + field.name, field
        elif "prefix" in field.metadata:
            yield from flag_fields(field.type, prefix + field.metadata.get("prefix", ""))


def given(config: Any, names: tuple[str, ...]) -> list[str]:
    """The names of those flags that are set; nested configs are searched as well."""
    values = to_flags(config)
    return [name for name in names if values[name] is not None]


def require_one(config: Any, names: tuple[str, ...]) -> None:
    """Refuses a config unless exactly one of these flags is set; nested configs are searched as well."""
    if len(found := given(config, names)) != 1:
        got = " and ".join(f"--{name} {to_flags(config)[name]}" for name in found) or "none"
        raise UserError(f"give exactly one of {', '.join('--' + name for name in names)}; got {got}")


def refuse_both(config: Any, first: str, second: str) -> None:
    """Refuses a config in which both fields are set."""
    if len(given(config, (first, second))) == 2:
        raise UserError(f"give --{first} or --{second}, not both")


# ---------------------------------------------------------------------------------------------------------------------
# Running a script, and ending it


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Runs a script. Errors that are no bug are printed as one line, once; any other error shows its traceback.

    Args:
        main: the script's main function.
        config: its argument, a config with a field `debug`.
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
    except Exception as error:
        explanation = explain_failure(error)
        if config.debug or explanation is None:
            raise
        message, speaks, exit_code = explanation, True, EXIT_RUN_ERROR
    for progress in list(getattr(tqdm, "_instances", ())):
        progress.close()  # otherwise the message would be printed on the same line
    if speaks:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def explain_failure(error: Exception) -> str | None:
    """A message for an error that is nobody's mistake: a full disk, or another process that has ended; otherwise None.

    A library may report a full disk by any kind of exception, such as that of safetensors.
    """
    if getattr(error, "errno", None) in FULL_DISK or FULL_DISK_TEXT.search(str(error)):
        place = f": {error.filename2 or error.filename}" if getattr(error, "filename", None) else ""
        return f"error: the disk is full, or cannot be written to{place} ({message_of(error)})"
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "stopped because another process of the run has ended"
    return None


def _end_workers() -> None:
    """Kills data-loader workers that an error has left behind.

    They ignore SIGTERM (see `ignore_stop_signals`), with which Python would otherwise end them and then wait forever.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their death as an error
    for worker in workers:
        worker.kill()
