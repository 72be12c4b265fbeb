# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Configs of saved schedulers, completed with the defaults of their classes."""

import inspect
from typing import Any

import diffusers
from diffusers import SchedulerMixin


def scheduler_defaults(scheduler_config: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a saved scheduler's class for the settings that its config leaves out; empty if unknown."""
    name = scheduler_config.get("_class_name", "DDPMScheduler")
    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        return {}
    parameters = inspect.signature(scheduler_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def complete_scheduler_config(scheduler_config: dict[str, Any]) -> dict[str, Any]:
    """A saved scheduler's config with its class's defaults: diffusers reads a config that leaves them out."""
    return scheduler_defaults(scheduler_config) | scheduler_config
