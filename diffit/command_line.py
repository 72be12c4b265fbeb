# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the scripts share at their two ends: how flags are read, and how an error ends the script."""

import argparse
import atexit
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

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


def run_script(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """Runs a script to its end. An error made for people is printed as one line, once; a bug shows its traceback."""
    args = parse_args()
    atexit.register(_end_workers)
    try:
        main(args)
        return
    except (UserError, RunError) as error:
        if args.debug:
            raise
        message, speaks = f"error: {message_of(error)}", speaks_for(error)
        exit_code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_ERROR
    except RuntimeError as error:
        import torch.distributed

        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if args.debug or not several or not LOST_PEER.search(str(error)):
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
