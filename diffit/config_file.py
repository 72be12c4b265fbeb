# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Config files: YAML lists of flags, turned into arguments so that argparse checks keys, types and choices."""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml


def config_file_argv(parser: argparse.ArgumentParser, path: str, skip: set[str]) -> list[str]:
    """Turns a YAML list of flags into arguments, so that argparse checks keys, types and choices.

    Args:
        parser: the parser of all flags.
        path: the YAML file, a mapping from long flag names without dashes to values.
        skip: keys to ignore.
    """
    values = read_config_file(parser, path)
    actions = {action.dest: action for action in parser._actions}
    argv = []
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            similar = difflib.get_close_matches(key, actions, n=1)
            parser.error(f"{path}: unknown flag {key!r}" + (f", did you mean {similar[0]!r}?" if similar else ""))
        if key in skip:
            continue
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if value not in ("true", "false"):
                parser.error(f"{path}: {key} must be true or false, got {value!r}")
            argv.append(f"--{key}" if value == "true" else f"--no-{key}")
        elif key == "model_kwargs":
            argv += [f"--{key}", *model_kwargs_argv(parser, f"{path}: {key}", value)]
        elif isinstance(value, list) and actions[key].nargs in (2, "+"):
            argv += [f"--{key}", *map(str, value)]
        elif not isinstance(value, str) or value in ("", "null", "~"):
            parser.error(f"{path}: {key} must be one value, got {value!r}")
        else:
            argv.append(f"--{key}={value}")
    return argv


def read_config_file(parser: argparse.ArgumentParser, path: str) -> dict:
    """Reads a YAML config file as a mapping in which every scalar stays a string, exactly as written."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, Loader=yaml.BaseLoader)
        keys = [key.value for key, _ in yaml.compose(text).value] if isinstance(values, dict) else []
    except OSError as error:
        parser.error(f"--config: cannot read {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: {path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config: {path} must be a mapping of `flag: value` lines")
    for key in keys:
        if keys.count(key) > 1:
            parser.error(f"{path}: {key} is given twice")
    return values


def model_kwargs_argv(parser: argparse.ArgumentParser, where: str, value: Any) -> list[str]:
    """Turns a mapping from names to strings or lists of strings into KEY=VALUE arguments."""
    if not isinstance(value, dict):
        parser.error(f"{where} must be a mapping, got {value!r}")
    pairs = []
    for name, item in value.items():
        if isinstance(item, list) and all(isinstance(v, str) for v in item):
            item = f"[{', '.join(item)}]"
        if not isinstance(item, str):
            parser.error(f"{where}: {name} must be a value or a list of values, got {item!r}")
        pairs.append(f"{name}={item}")
    return pairs
