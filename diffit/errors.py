# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Errors written for people: one line each, which names the flag or file and its value.

`diffit.command_line.run_script` prints them without a traceback. Any other exception is a bug and keeps its traceback.
"""

import contextlib
import os
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """What was asked for cannot be done. Ends a script with exit code 2.

    Attributes:
        raised_in: which processes of a run raise this very error, so that it is printed once: `"node"`, all those on
            this machine; `"run"`, all of them; `"process"`, this one alone.
    """

    raised_in = "node"


class BadImageError(UserError):
    """An image that cannot be read as asked; the message names its file."""

    raised_in = "process"  # the others read other images


class RunError(RuntimeError):
    """A run cannot continue although nothing was asked wrongly: a full disk, a diverged training. Exit code 1."""

    raised_in = "node"


@contextlib.contextmanager
def user_errors(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of a library, raised in the `with` block, into a `UserError`.

    Args:
        what: the flag and its value, which the message starts with.
        kinds: exceptions that what the user gave may cause there; a `UserError` passes through as it is.

    Raises:
        UserError: `what`, and the message of the library.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {message_of(error)}") from error


def load_model(what: str, load: Callable, *arguments, **keywords):
    """Loads a network or a pipeline from files of strangers, which may make a library raise anything.

    Args:
        what: the flag and its value, which a message starts with.
        load: such as `AutoencoderKL.from_pretrained`, with its arguments.

    Raises:
        UserError: `what` and the message of the library, or the weights that are missing.
    """
    with user_errors(what, Exception):
        loaded = load(*arguments, **keywords)
    for module in getattr(loaded, "components", {"": loaded}).values():
        if hasattr(module, "named_parameters"):
            missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if missing:
                raise UserError(f"{what}: {len(missing)} weights are missing, such as {missing[0]}")
    return loaded


def message_of(error: BaseException) -> str:
    """The message of an exception on one line, without the traceback that a data-loader worker puts before it."""
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process " in text.split("\n")[0]:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split()) or type(error).__name__


def local_rank() -> int:
    """Number of this process among those that the launcher started on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def global_rank() -> int:
    """Number of this process among all that the launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def speaks_for(error: UserError | RunError) -> bool:
    """Whether this process is the one, of those that raise an error, that prints it."""
    if error.raised_in == "process":
        return True
    return (global_rank() if error.raised_in == "run" else local_rank()) == 0
