# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Errors written for users: one line that names the flag or file and its value.

`diffit.command_line.run_script` prints them without a traceback. Any other exception is a bug and keeps its traceback.
"""

import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any


class UserError(ValueError):
    """A request that cannot be fulfilled, such as a wrong flag. Ends a script with exit code 2.

    Attributes:
        raised_in: which processes raise the same error, so that it is printed only once: `"node"`, all processes on
            this machine; `"run"`, all processes of the run; `"process"`, only this one.
    """

    raised_in = "node"


class BadImageError(UserError):
    """An image that cannot be read as requested; the message names its file."""

    raised_in = "process"  # the other processes read other images

    def __init__(self, message: str):
        super().__init__(_without_traceback(message, type(self).__name__))


class RunError(RuntimeError):
    """A run that cannot continue through no mistake in the request: a full disk, divergence. Exit code 1."""

    raised_in = "node"


@contextlib.contextmanager
def user_errors(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns a library's exceptions, raised in the `with` block, into a `UserError`.

    Args:
        what: start of the message: the flag and its value.
        kinds: exception classes that the user's input may cause; a `UserError` passes through unchanged.

    Raises:
        UserError: `what`, followed by the library's message.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {message_of(error)}") from error


def load_model(what: str, load: Callable, *arguments, **keywords):
    """Loads a network or a pipeline from untrusted files, which may make a library raise anything.

    Args:
        what: start of an error message: the flag and its value.
        load: loader such as `AutoencoderKL.from_pretrained`, called with the remaining arguments.

    Returns:
        What `load` returns.

    Raises:
        UserError: `what`, followed by the library's message or the names of missing weights.
    """
    with user_errors(what, Exception):
        loaded = load(*arguments, **keywords)
    for module in getattr(loaded, "components", {"": loaded}).values():
        if hasattr(module, "named_parameters"):
            missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if missing:
                raise UserError(f"{what}: {len(missing)} weights are missing, such as {missing[0]}")
    return loaded


def printable(text: str) -> str:
    """Escapes line breaks, terminal codes and what is not UTF-8, so that a stranger's file name stays on its line."""
    if text.isprintable():
        return text
    escaped = ("Cc", "Cs", "Zl", "Zp")  # controls, surrogates, separators of lines and paragraphs
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign) in escaped else sign for sign in text
    )


def check_finite_weights(what: str, module: Any) -> None:
    """Refuses a network whose weights have NaN or infinite values, as those of a training that diverged.

    Args:
        what: start of an error message: the flag and its value.
        module: a torch module.

    Raises:
        UserError: `what`, the number of such weights, and the name of one.
    """
    damaged = [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    if damaged:
        raise UserError(f"{what}: {len(damaged)} weights have NaN or infinite values, such as {damaged[0]}")


def message_of(error: BaseException) -> str:
    """The message of an exception on one line, without the traceback that a data-loader worker prepends."""
    return " ".join(_without_traceback(str(error), type(error).__name__).split()) or type(error).__name__


def _without_traceback(message: str, kind: str) -> str:
    """The message of an exception of class `kind`, without the traceback that a data-loader worker prepends."""
    if message.startswith("Caught ") and " in DataLoader worker process " in message.split("\n")[0]:
        return message.rpartition(f"{kind}: ")[2].strip()
    return message


def local_rank() -> int:
    """Rank of this process on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def global_rank() -> int:
    """Rank of this process in the run; 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def speaks_for(error: UserError | RunError) -> bool:
    """Whether this process prints the error. Of the processes that raise it, exactly one does."""
    if error.raised_in == "process":
        return True
    return (global_rank() if error.raised_in == "run" else local_rank()) == 0
