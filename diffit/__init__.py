# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The library behind the scripts at the top of this repository.

A script imports something of it before diffusers, which imports xformers where that is installed.
"""

import logging


def _has_cuda(record: logging.LogRecord) -> bool:
    import torch

    return torch.cuda.is_available()


# Without a CUDA device nothing uses xformers, and "Please reinstall xformers" would be a newcomer's first screen.
logging.getLogger("xformers").addFilter(_has_cuda)
