# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Faster layers for DiffiT networks on a CPU in float32, put in place of the reference layers of `diffit_model.py`.

`kernelize` changes the classes of modules in place. Parameters, their names and the saved config stay, and each kernel
falls back to its reference layer, in the same bits, wherever it does not apply: on other devices and dtypes, under
autocast and torch.compile, and for modules with hooks or adapters. A kernel repeats the `forward` of its reference
layer, so a change there has to be made here too; `tests/test_cpu_kernels.py` compares the two.

Shapes as in `diffit_model.py`; K is the width of an MLP between its two linear layers.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from diffit_model import (
    ChannelNorm,
    DiffiTAttnProcessor,
    DiffiTBlock,
    DiffiTMLP,
    DiffiTResBlock,
    TimeDependentSelfAttention,
    TokenNorm,
    add_windows,
    is_exactly,
    partition_windows,
)


def kernelize(model: nn.Module) -> nn.Module:
    """Puts the kernels in place, if all weights of the network are on a CPU, and returns the network.

    Call it after loading, placement, compilation (`compile_repeated_blocks` looks for the class names of the reference
    layers) and before wrapping the network for DDP. Networks other than DiffiT, and modules of a subclass of a
    reference layer, are left as they are.

    Args:
        model: a network, or one of its modules; changed in place.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    for module in model.modules():
        if isinstance(module, DiffiTBlock) and type(module.dropout) is nn.Dropout:
            module.dropout.__class__ = Dropout16
        if isinstance(module, TimeDependentSelfAttention) and type(module.processor) is DiffiTAttnProcessor:
            module.processor.__class__ = CPUAttnProcessor
        module.__class__ = KERNELS.get(type(module), type(module))
    return model


def is_eager_float32(tensor: torch.Tensor) -> bool:
    """Whether the kernels apply to a tensor: on a CPU, in float32, eager and without autocast."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------------------------------
# Attention with a bias that is trained


def attention_with_trained_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`plain_attention` at a scale of 1 with fewer passes over the scores.

    Args:
        query, key, value: shape (B, N, h, d) each; the query is scaled already.
        bias: shape (1 or B, h, N, N).

    Returns:
        softmax(Q K^T + B) V, shape (B, N, h, d).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    scores = (query @ key.transpose(-1, -2)).add_(bias)  # (B, h, N, N)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)  # (B, N, h, d)


class CPUAttnProcessor(DiffiTAttnProcessor):
    """Replaces the backend `native` while the relative position bias is trained.

    SDPA has no fused CPU kernel for a bias that requires grad, and its fallback makes four more passes to guard
    against fully masked rows.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends. Arguments as in `DiffiTAttnProcessor`."""
        trains_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        is_native = self.backend == AttentionBackendName.NATIVE
        if is_native and scale == 1 and trains_bias and query.device.type == "cpu":
            return attention_with_trained_bias(query, key, value, bias.to(query.dtype))
        return super().__call__(query, key, value, bias, scale)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm


class NormalizeTokens(torch.autograd.Function):
    """Non-affine LayerNorm that saves its output for backward instead of its input.

    The following linear layer saves that tensor anyway.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, eps: float) -> torch.Tensor:
        """Maps tokens of shape (..., D) to tokens of mean 0 and variance 1."""
        normalized, _, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], None, None, eps)
        ctx.save_for_backward(normalized, rstd)
        return normalized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient of `tokens`, shape (..., D)."""
        normalized, rstd = ctx.saved_tensors
        # The gradient of normalizing `normalized`, whose mean is 0 and deviation 1, is that of `tokens` / rstd.
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        shape, needed = grad.shape[-1:], [True, False, False]
        grad = torch.ops.aten.native_layer_norm_backward(grad, normalized, shape, mean, one, None, None, needed)[0]
        return grad.mul_(rstd), None


class CPUTokenNorm(TokenNorm):
    """`TokenNorm` that keeps one copy of the tokens for backward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (..., D) to tokens of mean 0 and variance 1."""
        if is_eager_float32(tokens) and torch.is_grad_enabled():
            return NormalizeTokens.apply(tokens, self.eps)
        return super().forward(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# GELU and linear layer


class GELULinear(torch.autograd.Function):
    """A tanh-approximated GELU followed by a linear layer; saves only the input of the GELU for backward.

    With z = x * (a + b * x^2), a = 2 * sqrt(2 / pi) and b = 0.044715 * a, that GELU equals x * sigmoid(z), and torch's
    kernel for the sigmoid is several times as fast as that for tanh. The backward pass recomputes the output of the
    GELU, which is four times as wide as the tokens. Both passes work on chunks that fit the cache of a core.
    """

    LINEAR = 2 * math.sqrt(2 / math.pi)  # a
    CUBIC = 0.044715 * LINEAR  # b
    CHUNK = 2**17  # elements of x

    @classmethod
    def split(cls, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields matching chunks of contiguous tensors of the same shape."""
        return zip(*(tensor.view(-1).split(cls.CHUNK) for tensor in tensors), strict=True)

    @classmethod
    def sigmoid(cls, x: torch.Tensor) -> torch.Tensor:
        """sigmoid(x * (a + b * x^2)), in the shape of `x`."""
        return torch.addcmul(x.new_tensor(cls.LINEAR), x, x, value=cls.CUBIC).mul_(x).sigmoid_()

    @classmethod
    def activate(cls, x: torch.Tensor) -> torch.Tensor:
        """The GELU of a contiguous tensor."""
        activated = torch.empty_like(x)
        for x_chunk, chunk in cls.split(x, activated):
            torch.mul(cls.sigmoid(x_chunk), x_chunk, out=chunk)
        return activated

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Maps contiguous `x` of shape (..., K) to (..., D) with a weight of shape (D, K)."""
        ctx.save_for_backward(x, weight)
        return F.linear(GELULinear.activate(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of `x`, weight and bias."""
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (number of tokens, D)
        activated, grad_x = torch.empty_like(x), grad @ weight  # (..., K) each
        linear = x.new_tensor(GELULinear.LINEAR)
        for x_chunk, activated_chunk, grad_chunk in GELULinear.split(x, activated, grad_x):
            sigmoid = GELULinear.sigmoid(x_chunk)
            torch.mul(x_chunk, sigmoid, out=activated_chunk)
            # The slope: sigmoid + x * (a + 3 * b * x^2) * sigmoid * (1 - sigmoid)
            slope = torch.addcmul(linear, x_chunk, x_chunk, value=3 * GELULinear.CUBIC).mul_(x_chunk)
            torch.ops.aten.sigmoid_backward.grad_input(slope, sigmoid, grad_input=slope)
            grad_chunk.mul_(slope.add_(sigmoid))
        return grad_x, rows.T @ activated.flatten(0, -2), rows.sum(0)


class CPUMLP(DiffiTMLP):
    """`DiffiTMLP` with a faster GELU, whose output is not saved for backward."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B, N, D) to tokens of shape (B, N, D)."""
        hidden_states = self.fc1(hidden_states)  # (B, N, K)
        if is_eager_float32(hidden_states) and hidden_states.is_contiguous():
            if not torch.is_grad_enabled():
                return self.fc2(GELULinear.activate(hidden_states))
            if is_exactly(self.fc2, nn.Linear):
                return GELULinear.apply(hidden_states, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(hidden_states))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


class DropElements(torch.autograd.Function):
    """Dropout that spends 16 random bits per element and saves a one-byte mask for backward.

    torch's own draws a full-length random number per element and saves the mask in float32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, probability: float) -> torch.Tensor:
        """Zeroes elements of `x` and rescales the rest to keep the mean; the probability is rounded to 2^-16."""
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
        threshold = round(probability * 2**16)
        keep = bits >= threshold - 2**15
        ctx.scale = 2**16 / (2**16 - threshold)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient of `x`."""
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None


class Dropout16(nn.Dropout):
    """Dropout that decides with 16 random bits per element; it drops other elements than `nn.Dropout` would."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens of any shape to tokens of the same shape."""
        if self.training and self.p > 0 and is_eager_float32(tokens):
            return DropElements.apply(tokens, self.p)
        return super().forward(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# GroupNorm, SiLU and convolution


class GroupNormSiLUConv(torch.autograd.Function):
    """GroupNorm, SiLU and a 3x3 convolution; saves only the input for backward.

    The backward pass recomputes normalization and SiLU, which cost little compared with the convolution.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        num_groups: int,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """Maps `x` of shape (B, C_in, H, W) to (B, C_out, H, W) with a weight of shape (C_out, C_in, 3, 3)."""
        ctx.sizes = (*x.shape[:2], x.shape[2:].numel(), num_groups)
        ctx.eps = eps
        normalized, mean, rstd = torch.native_group_norm(x, norm_weight, norm_bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        return F.conv2d(F.silu(normalized, inplace=True), weight, bias, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of `x` and of the weights and biases of both layers."""
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        normalized = torch.native_group_norm(x, norm_weight, norm_bias, *ctx.sizes, ctx.eps)[0]
        stride, padding, dilation, output_padding, groups = (1, 1), (1, 1), (1, 1), (0, 0), 1
        layer = ((len(weight),), stride, padding, dilation, False, output_padding, groups)
        needed = [True, True, True]
        grad, *grads_of_conv = torch.ops.aten.convolution_backward(grad, F.silu(normalized), weight, *layer, needed)
        grad = torch.ops.aten.silu_backward(grad, normalized)
        grad, *grads_of_norm = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, norm_weight, *ctx.sizes, needed
        )
        return grad, *grads_of_norm, None, None, *grads_of_conv


class CPUResBlock(DiffiTResBlock):
    """`DiffiTResBlock` that saves one feature map before its convolution for backward, rather than three."""

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C_in, H, W) and time tokens of shape (B, T) to one of (B, C_out, H, W)."""
        norm, conv = self.norm, self.conv
        is_reference = is_exactly(norm, ChannelNorm) and is_exactly(conv, nn.Conv2d)
        if not is_reference or not is_eager_float32(hidden_states) or not torch.is_grad_enabled():
            return super().forward(hidden_states, time_token)
        residual = self.conv_shortcut(hidden_states)  # (B, C_out, H, W)
        if not hidden_states.is_contiguous(memory_format=torch.channels_last):
            hidden_states = hidden_states.contiguous()
        affine = (norm.weight, norm.bias, norm.num_groups, norm.eps)
        hidden_states = GroupNormSiLUConv.apply(hidden_states, *affine, conv.weight, conv.bias)  # (B, C_out, H, W)
        tokens = self.block(partition_windows(hidden_states, self.window), time_token)  # (B * G, N, D)
        return add_windows(residual, tokens, self.window)  # (B, C_out, H, W)


KERNELS = {TokenNorm: CPUTokenNorm, DiffiTMLP: CPUMLP, DiffiTResBlock: CPUResBlock}
