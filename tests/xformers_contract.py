# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What xformers asks of its callers, checked without a GPU.

Validation and choice of the operator are the installed xformers' own code. Only the device is spoofed, and the
arithmetic of the kernel is emulated in plain PyTorch.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import xformers.ops
from xformers.ops import fmha
from xformers.ops.fmha import common, dispatch


class _CudaView:
    """A CPU tensor that says it lies on `cuda:0`."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __getattr__(self, name: str):
        return torch.device("cuda:0") if name == "device" else getattr(self._tensor, name)


def _cuda_inputs(query, key, value, attn_bias=None, p=0.0, scale=None) -> common.Inputs:
    return common.Inputs(_CudaView(query), _CudaView(key), _CudaView(value), attn_bias, p, scale)


def chosen_operators(query, key, value, attn_bias=None, p=0.0, scale=None) -> tuple[str, str | None]:
    """Names of the forward and backward operators that xformers takes; call it inside `spoofed_cuda`.

    Returns:
        The two names; the second is None if neither query, key nor value requires grad.

    Raises:
        ValueError: if xformers' validation refuses the inputs.
        NotImplementedError: if no operator of xformers supports them.
    """
    common.Inputs(query, key, value, attn_bias, p, scale).validate_inputs()
    inputs = _cuda_inputs(query, key, value, attn_bias, p, scale)
    needs_gradient = any(x.requires_grad for x in (query, key, value))
    forward = dispatch._dispatch_fw(inputs, needs_gradient).NAME
    return forward, dispatch._dispatch_bw(inputs, None).NAME if needs_gradient else None


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """Stands in for the function of xformers of that name: refuses what it refuses, and computes the same."""
    chosen_operators(query, key, value, attn_bias, p, scale)
    if attn_bias is not None and attn_bias.dtype != query.dtype:  # the CUDA code checks it
        raise RuntimeError("invalid dtype for bias - should match query's dtype")
    if attn_bias is not None and not any(x.requires_grad for x in (query, key, value)):
        attn_bias = attn_bias.detach()  # as xformers does, in silence
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_bias is not None:
        scores = scores + attn_bias.float()
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


@contextlib.contextmanager
def spoofed_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[mock.Mock]:
    """Makes xformers believe in a GPU of this compute capability; yields the kernel's stand-in, which counts calls."""
    with (
        mock.patch.object(torch.version, "cuda", "12.8"),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        mock.patch.object(common, "_built_with_cuda", True),
        mock.patch.object(fmha, "Inputs", _cuda_inputs),
        mock.patch.object(
            xformers.ops, "memory_efficient_attention", side_effect=memory_efficient_attention
        ) as kernel,
    ):
        yield kernel
