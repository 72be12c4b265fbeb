# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""DiffiT, the Diffusion Vision Transformer (Hatamizadeh et al., ECCV 2024, arXiv 2312.02139v3), for diffusers.

`DiffiTUNet2DModel` is the image-space network of the paper, a U-shaped transformer with the interface of diffusers'
`UNet2DModel`; `DiffiTTransformer2DModel` is the latent one, with that of `DiTTransformer2DModel`. Equation numbers are
those of version 3 of the paper. Where the paper is silent, a comment says what we do instead. This file stands alone:
torch and diffusers, and xformers only if that attention backend is chosen.

Shapes: B batch, C channels, H/W height/width (pixels or latents), G windows per image (1 = global attention),
N tokens in a window, D hidden size of the tokens, T size of the time token, A labels of augmentation, h attention
heads, d size of a head, p height and width of a patch.
"""

import contextlib
import functools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import Upsample2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import is_xformers_available, logging
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

# A saved folder is loaded as remote code, under another module name. One fixed name keeps `model_index.json`,
# `auto_map` and pickles valid wherever the file was loaded from.
sys.modules.setdefault("diffit_model", sys.modules[__name__])

logger = logging.get_logger(__name__)


# What belongs to one sampling of one thread, by module and name; a module itself may be shared by threads.
_sampling_cache: ContextVar[dict | None] = ContextVar("diffit_sampling_cache", default=None)


def cached_while_sampling(module: nn.Module, name: str):
    """What `cache_for_sampling` keeps for a module in this thread. None outside of it, and in compiled code."""
    if torch.compiler.is_compiling():
        return None
    cache = _sampling_cache.get()
    return None if cache is None else cache.get((module, name))


# ---------------------------------------------------------------------------------------------------------------------
# Windows and relative positions


def partition_windows(feature_map: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Cuts a feature map into non-overlapping windows of tokens (local attention, section 3.2).

    Args:
        feature_map: shape (B, C, H, W).
        window: height and width of a window; they divide H and W.

    Returns:
        Tokens, shape (B * G, N, C) with N = window height * window width; the windows of an image follow each other.
    """
    batch, channels, height, width = feature_map.shape
    rows, columns = height // window[0], width // window[1]
    feature_map = feature_map.reshape(batch, channels, rows, window[0], columns, window[1])
    return feature_map.permute(0, 2, 4, 3, 5, 1).reshape(batch * rows * columns, window[0] * window[1], channels)


def merge_windows(tokens: torch.Tensor, window: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Puts windows of tokens back together: the inverse of `partition_windows`.

    Args:
        tokens: shape (B * G, N, C).
        window: height and width of a window; they divide `height` and `width`.
        height: height of the feature map.
        width: width of the feature map.

    Returns:
        Feature map, shape (B, C, H, W), channels last in memory as the tokens are.
    """
    rows, columns = height // window[0], width // window[1]
    tokens = tokens.reshape(-1, rows, columns, *window, tokens.shape[-1])
    return tokens.transpose(2, 3).reshape(-1, height, width, tokens.shape[-1]).permute(0, 3, 1, 2)


def relative_position_index(window: tuple[int, int]) -> torch.Tensor:
    """Row of the relative position bias table for each pair of tokens in a window (indexed as in Swin).

    Args:
        window: height and width of a window.

    Returns:
        Integers in [0, (2 * height - 1) * (2 * width - 1)), shape (N, N).
    """
    height, width = window
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()  # (N)
    row_offset = rows[:, None] - rows[None, :] + height - 1  # (N, N)
    column_offset = columns[:, None] - columns[None, :] + width - 1  # (N, N)
    return row_offset * (2 * width - 1) + column_offset


# ---------------------------------------------------------------------------------------------------------------------
# Attention core: one readable definition, and diffusers' backends


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition that every backend must match, and the backend `_native_math`. DiffiT v3, Eq. 6.

    Args:
        query: shape (B, N, h, d).
        key: shape (B, N, h, d).
        value: shape (B, N, h, d).
        bias: relative position bias, shape (1 or B, h, N, N), or None.
        scale: of the products; None means 1 / sqrt(d).

    Returns:
        softmax(scale * Q K^T + B) V, shape (B, N, h, d).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    scores = scale * (query @ key.transpose(-1, -2))  # (B, h, N, N)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2)


def attention_with_trained_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`plain_attention` at a scale of 1 in fewer passes over the scores: the backend `native` where a CPU trains.

    SDPA has no fused kernel there for a bias that wants a gradient, and its fallback guards against rows that are
    masked as a whole, which cost it four more passes.

    Args:
        query: scaled, shape (B, N, h, d).
        key: shape (B, N, h, d).
        value: shape (B, N, h, d).
        bias: shape (1 or B, h, N, N).

    Returns:
        softmax(Q K^T + B) V, shape (B, N, h, d).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    scores = (query @ key.transpose(-1, -2)).add_(bias)  # (B, h, N, N)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def align_bias_for_xformers(bias: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Lays a bias out as xformers' kernels want it: one per batch entry, the stride of a row a multiple of 8.

    Args:
        bias: in the dtype of the query (a cast afterwards would lose the alignment), shape (1, h, N, N).
        batch_size: number of windows B.

    Returns:
        The same numbers, shape (B, h, N, N); a view, so no memory for the B copies.
    """
    num_tokens = bias.shape[-1]
    bias = F.pad(bias, (0, -num_tokens % 8))  # (1, h, N, N rounded up to 8)
    return bias.expand(batch_size, -1, -1, -1)[..., :num_tokens]


# A kernel's grid has one row for each window, and CUDA no more rows than these.
MAX_WINDOWS = 65_535


@functools.cache
def compiled_flex_attention() -> Callable:
    """FlexAttention as one fused kernel, compiled for each shape on its first use but for the number of windows.

    As a full graph, because otherwise torch runs its eager implementation after too many shapes, without a word of
    what that does under gradient checkpointing: the gradients are wrong (torch 2.13).
    """
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_attention_with_table(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    window: tuple[int, int],
    scale: float | None = None,
) -> torch.Tensor:
    """The backend `flex`: the kernel reads the relative position bias from its table, so none of N x N exists.

    The gradient of the table is summed by atomic additions, so its last bits differ from run to run. On a CPU there
    is no backward pass, and the scores exist as a whole.

    Args:
        query: shape (B, N, h, d).
        key: shape (B, N, h, d).
        value: shape (B, N, h, d).
        table: a row for each offset between two tokens, as in `relative_position_index`; any float dtype, shape
            ((2 * height - 1) * (2 * width - 1), h).
        window: height and width of a window, N tokens.
        scale: of the products; None means 1 / sqrt(d).

    Returns:
        softmax(scale * Q K^T + B) V, shape (B, N, h, d).

    Raises:
        NotImplementedError: on a CPU, if query, key or value require grad.
    """
    if query.shape[0] > MAX_WINDOWS:
        parts = zip(*(x.split(MAX_WINDOWS) for x in (query, key, value)), strict=True)
        return torch.cat([flex_attention_with_table(*part, table, window, scale) for part in parts])
    height, width = window

    def add_bias(score, batch, head, query_token, key_token):
        row_offset = query_token // width - key_token // width + height - 1
        column_offset = query_token % width - key_token % width + width - 1
        return score + table[row_offset * (2 * width - 1) + column_offset, head]

    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if head_dim < 16:  # the least that the kernel takes; zeros change no product
        query, key, value = (F.pad(x, (0, 16 - head_dim)) for x in (query, key, value))  # (B, N, h, 16)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    attend = flex_attention
    if query.device.type != "cpu" and not torch.compiler.is_compiling():
        attend = compiled_flex_attention()
        for x in (query, key, value):
            torch._dynamo.maybe_mark_dynamic(x, 0)
    hidden_states = attend(query, key, value, score_mod=add_bias, scale=scale)  # (B, h, N, d)
    return hidden_states.transpose(1, 2)[..., :head_dim]  # (B, N, h, d)


def xformers_unsupported_reasons(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    attention_op: tuple | None = None,
) -> list[str]:
    """Asks the installed xformers whether its operators can run this attention, forward and (if needed) backward.

    Args:
        query: shape (B, N, h, d).
        key: shape (B, N, h, d).
        value: shape (B, N, h, d).
        bias: shape (B, h, N, N) or None.
        attention_op: forward and backward operator; None means cutlass, the only ones that take a bias.

    Returns:
        xformers' own words, one for each rule that is broken; empty if the kernels can run.
    """
    try:
        from xformers.ops.fmha import Inputs, cutlass
    except ImportError as error:
        return [f"xformers cannot be imported: {error}"]
    inputs = Inputs(query, key, value, bias)
    inputs.validate_inputs()
    forward_op, backward_op = attention_op or (cutlass.FwOp, cutlass.BwOp)
    reasons = forward_op.not_supported_reasons(inputs)
    if query.shape[0] > MAX_WINDOWS:  # xformers would launch a kernel that CUDA refuses (its issue 845)
        reasons.append(f"{query.shape[0]} windows are more than {MAX_WINDOWS}")
    if any(x.requires_grad for x in (query, key, value)):
        reasons += backward_op.not_supported_reasons(inputs)
    elif bias is not None and bias.requires_grad:
        # xformers looks at query, key and value alone and would leave the bias without a gradient, in silence.
        reasons.append("only the bias requires grad")
    return list(dict.fromkeys(reasons))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class DiffiTAttnProcessor:
    """Attention core, softmax(Q K^T / sqrt(d) + B) V, under diffusers' backend names.

    `_attention_backend` is what `set_attention_backend` sets; None means diffusers' process-wide default. Backends:
    `native` (PyTorch's SDPA), `_native_math` (`plain_attention`), `xformers`, and any other name of diffusers'
    dispatcher whose kernel takes a bias. `flex` does not come here: see `flex_attention_with_table`.
    """

    def __init__(self):
        self._attention_backend = None
        self._parallel_config = None  # read by diffusers' set_attention_backend
        self.attention_op = None  # (forward, backward) operators of xformers; None lets xformers choose

    @property
    def backend(self) -> str:
        """What attends: the backend that was set, or diffusers' process-wide default."""
        return self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends. Arguments as in `plain_attention`, the bias of shape (1, h, N, N) in any float dtype."""
        backend = self.backend
        if backend == AttentionBackendName._NATIVE_MATH:
            return plain_attention(query, key, value, bias, scale)
        if bias is not None:
            bias = bias.to(query.dtype)
        if backend == AttentionBackendName.XFORMERS:
            aligned_bias = None if bias is None else align_bias_for_xformers(bias, query.shape[0])
            reasons = xformers_unsupported_reasons(query, key, value, aligned_bias, self.attention_op)
            if not reasons:
                import xformers.ops

                options = {"scale": scale, "op": self.attention_op}
                return xformers.ops.memory_efficient_attention(query, key, value, aligned_bias, **options)
            if not torch.compiler.is_compiling():
                _warn_once(f"xformers cannot run this attention, using `native` (SDPA): {'; '.join(reasons)}")
            backend = AttentionBackendName.NATIVE
        trains_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if backend == AttentionBackendName.NATIVE and scale == 1 and trains_bias and query.device.type == "cpu":
            return attention_with_trained_bias(query, key, value, bias)
        return dispatch_attention_fn(query, key, value, attn_mask=bias, scale=scale, backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# Time-dependent multi-head self-attention


class TimeDependentSelfAttention(nn.Module, AttentionModuleMixin):
    """Time-dependent multi-head self-attention (TMSA) with relative position bias, DiffiT v3 Eq. 3-6.

    Queries, keys and values are linear in the image tokens and in the time token. With one time token per image that
    is exactly: shift the queries by `q_t`, attend, shift the output by `v_t`. `k_t` adds one number to all logits of
    a query, which the softmax cancels, and `v_t` leaves the attention unchanged because its rows sum to 1. The
    weights of all three stay in the state dict, as in the paper and in NVIDIA's checkpoints.

    Args:
        hidden_size: size D of the tokens.
        time_embed_dim: size T of the time token.
        num_attention_heads: heads h.
        attention_head_dim: size d of a head; h * d need not equal D.
        window: height and width of a window in tokens.
    """

    _default_processor_cls = DiffiTAttnProcessor
    _available_processors = [DiffiTAttnProcessor]
    _supports_qkv_fusion = False  # always fused

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        window: tuple[int, int],
    ):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_dim = attention_head_dim
        self.window = window
        attention_width = num_attention_heads * attention_head_dim

        self.qkv = nn.Linear(hidden_size, 3 * attention_width)  # W_qs, W_ks, W_vs
        self.qkv_temb = nn.Linear(time_embed_dim, 3 * attention_width)  # W_qt, W_kt, W_vt
        self.proj = nn.Linear(attention_width, hidden_size)

        num_relative_positions = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_relative_positions, num_attention_heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)  # derived
        self.set_processor(DiffiTAttnProcessor())

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: tuple | None = None) -> None:
        """What diffusers' `enable_` and `disable_xformers_memory_efficient_attention` call on each attention.

        Disabling names `native`, not the process-wide default, which may itself be xformers.

        Raises:
            ModuleNotFoundError: if xformers is not installed.
            ValueError: if no CUDA device is there.
        """
        if valid and not is_xformers_available():
            raise ModuleNotFoundError("xformers is not installed: `pip install xformers`", name="xformers")
        if valid and not torch.cuda.is_available():
            raise ValueError("xformers' memory-efficient attention needs a CUDA device, and none is available")
        self.processor.attention_op = attention_op if valid else None
        self.set_attention_backend("xformers" if valid else "native")

    def relative_position_bias(self) -> torch.Tensor:
        """The bias B of Eq. 6, shape (1, h, N, N), contiguous; it does not depend on time."""
        # As an embedding, whose gradient is summed faster than that of indexing.
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)  # (N, N, h)
        return bias.permute(2, 0, 1).contiguous()[None]

    def forward(self, spatial_tokens: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Attends within each window.

        Args:
            spatial_tokens: image tokens, `x_s` in the paper, the windows of an image one after the other;
                shape (B * G, N, D).
            time_token: embedding of the timestep (and class), `x_t` in the paper; shape (B, T).

        Returns:
            Attended tokens, shape (B * G, N, D), same dtype as `spatial_tokens`.

        Raises:
            ValueError: if N is not the number of tokens in a window, or B * G is no multiple of B.
        """
        num_windows, num_tokens, _ = spatial_tokens.shape
        batch = time_token.shape[0]
        if num_tokens != self.window[0] * self.window[1]:
            raise ValueError(
                f"expected windows of {self.window[0]} x {self.window[1]} tokens, got {num_tokens} tokens"
            )
        if num_windows % batch != 0:
            raise ValueError(f"{num_windows} windows cannot be shared among {batch} time tokens")
        heads = (self.num_attention_heads, self.attention_head_dim)

        # DiffiT v3, Eq. 3-5, less k_t
        spatial_qkv = self.qkv(spatial_tokens).reshape(batch, -1, num_tokens, 3, *heads)  # (B, G, N, 3, h, d)
        query, key, value = spatial_qkv.unbind(3)  # 3 x (B, G, N, h, d)
        cached = cached_while_sampling(self, "temporal_qkv")
        temporal_qkv = self.qkv_temb(time_token) if cached is None else cached  # (B, 3 * h * d)
        temporal_qkv = temporal_qkv.reshape(batch, 1, 1, 3, *heads)  # (B, 1, 1, 3, h, d)
        query_shift, _, value_shift = temporal_qkv.unbind(3)  # 3 x (B, 1, 1, h, d)
        scale = self.attention_head_dim**-0.5
        query = torch.add(scale * query_shift, query, alpha=scale)  # shifted and scaled in one pass

        # DiffiT v3, Eq. 6
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (B * G, N, h, d)
        if self.processor.backend == AttentionBackendName.FLEX:
            table = self.relative_position_bias_table
            hidden_states = flex_attention_with_table(query, key, value, table, self.window, scale=1.0)
        else:
            cached = cached_while_sampling(self, "bias")
            bias = self.relative_position_bias() if cached is None else cached  # (1, h, N, N)
            hidden_states = self.processor(query, key, value, bias, scale=1.0)  # (B * G, N, h, d)
        hidden_states = hidden_states.unflatten(0, (batch, -1)) + value_shift  # (B, G, N, h, d)
        return self.proj(hidden_states.reshape(num_windows, num_tokens, -1))  # (B * G, N, D)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def is_plain_float32(tensor: torch.Tensor) -> bool:
    """Whether the fast paths of a CPU apply: eager and in float32."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class NormalizeTokens(torch.autograd.Function):
    """LayerNorm without scale and shift that keeps its output, as the linear layer behind it does, not its input."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, eps: float) -> torch.Tensor:
        """Maps tokens of shape (..., D) to tokens of mean 0 and variance 1."""
        normalized, _, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], None, None, eps)
        ctx.save_for_backward(normalized, rstd)
        return normalized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient of `tokens`."""
        normalized, rstd = ctx.saved_tensors
        # As if the normalized tokens had been normalized once more, with a mean of 0 and a deviation of 1.
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        shape, wanted = grad.shape[-1:], [True, False, False]
        grad = torch.ops.aten.native_layer_norm_backward(grad, normalized, shape, mean, one, None, None, wanted)[0]
        return grad.mul_(rstd), None


class TokenNorm(nn.LayerNorm):
    """LayerNorm without scale and shift: the linear layer behind it has them. NVIDIA's checkpoints agree.

    Args:
        hidden_size: size D of the tokens.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=1e-6, elementwise_affine=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (..., D) to tokens of mean 0 and variance 1."""
        if is_plain_float32(tokens) and torch.is_grad_enabled():
            return NormalizeTokens.apply(tokens, self.eps)
        return super().forward(tokens)


class LinearOfGELU(torch.autograd.Function):
    """A linear layer behind a tanh-approximated GELU, for a CPU in float32; keeps the GELU's input alone.

    With z = x * (a + b * x^2), where a = 2 * sqrt(2 / pi) and b = 0.044715 * a, that GELU is x * sigmoid(z): torch's
    kernel for the sigmoid is several times as fast as its tanh. The backward pass computes the output of the GELU
    anew, which is four times as wide as the tokens. Both go through parts that fit the cache of a core.
    """

    LINEAR = 2 * math.sqrt(2 / math.pi)  # a
    CUBIC = 0.044715 * LINEAR  # b
    PART = 2**17  # numbers of x

    @classmethod
    def split(cls, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Parts of contiguous tensors of one shape, in step."""
        return zip(*(tensor.view(-1).split(cls.PART) for tensor in tensors), strict=True)

    @classmethod
    def sigmoid(cls, x: torch.Tensor) -> torch.Tensor:
        """sigmoid(x * (a + b * x^2)), in the shape of `x`."""
        return torch.addcmul(x.new_tensor(cls.LINEAR), x, x, value=cls.CUBIC).mul_(x).sigmoid_()

    @classmethod
    def activate(cls, x: torch.Tensor) -> torch.Tensor:
        """The GELU of a contiguous tensor."""
        activated = torch.empty_like(x)
        for x_part, part in cls.split(x, activated):
            torch.mul(cls.sigmoid(x_part), x_part, out=part)
        return activated

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Maps contiguous `x` of shape (..., K) to (..., D) with a weight of shape (D, K)."""
        ctx.save_for_backward(x, weight)
        return F.linear(LinearOfGELU.activate(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of `x`, weight and bias."""
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (number of tokens, D)
        activated, grad_x = torch.empty_like(x), grad @ weight
        linear = x.new_tensor(LinearOfGELU.LINEAR)
        for x_part, activated_part, grad_part in LinearOfGELU.split(x, activated, grad_x):
            sigmoid = LinearOfGELU.sigmoid(x_part)
            torch.mul(x_part, sigmoid, out=activated_part)
            # The slope: sigmoid + x * (a + 3 * b * x^2) * sigmoid * (1 - sigmoid)
            slope = torch.addcmul(linear, x_part, x_part, value=3 * LinearOfGELU.CUBIC).mul_(x_part)
            torch.ops.aten.sigmoid_backward.grad_input(slope, sigmoid, grad_input=slope)
            grad_part.mul_(slope.add_(sigmoid))
        return grad_x, rows.T @ activated.flatten(0, -2), rows.sum(0)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of one kind and nothing else: no adapter, and no hook, as offloaded weights have one."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


class DropTokens(torch.autograd.Function):
    """Dropout for a CPU in float32: 16 random bits decide on a number, and one byte of each is kept for the gradient.

    torch's own draws a random number of full length for each and keeps its mask in float32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, probability: float) -> torch.Tensor:
        """Sets numbers of `x` to 0 and scales the rest so that the mean stays; the probability in steps of 2^-16."""
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
    """Dropout on tokens."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens of any shape to tokens of the same."""
        if self.training and self.p > 0 and is_plain_float32(tokens):
            return DropTokens.apply(tokens, self.p)
        return super().forward(tokens)


class ConvOfGroupNorm(torch.autograd.Function):
    """GroupNorm, SiLU and a 3x3 convolution, for a CPU in float32; keeps the input alone.

    The backward pass normalizes it and applies the SiLU anew, which is little work beside the convolution.
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
        """Gradients of `x` and of both modules' weights and biases."""
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        normalized = torch.native_group_norm(x, norm_weight, norm_bias, *ctx.sizes, ctx.eps)[0]
        stride, padding, dilation, output_padding, groups = (1, 1), (1, 1), (1, 1), (0, 0), 1
        layer = ((len(weight),), stride, padding, dilation, False, output_padding, groups)
        wanted = [True, True, True]
        grad, *grads_of_conv = torch.ops.aten.convolution_backward(grad, F.silu(normalized), weight, *layer, wanted)
        grad = torch.ops.aten.silu_backward(grad, normalized)
        grad, *grads_of_norm = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, norm_weight, *ctx.sizes, wanted
        )
        return grad, *grads_of_norm, None, None, *grads_of_conv


class DiffiTMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    Args:
        hidden_size: size D of the tokens.
        mlp_ratio: hidden width as a multiple of D.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B, N, D) to tokens of shape (B, N, D)."""
        hidden_states = self.fc1(hidden_states)  # (B, N, mlp_ratio * D)
        if is_plain_float32(hidden_states) and hidden_states.is_contiguous():
            if not torch.is_grad_enabled():
                return self.fc2(LinearOfGELU.activate(hidden_states))
            if is_plain(self.fc2, nn.Linear):
                return LinearOfGELU.apply(hidden_states, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(hidden_states))


class DiffiTBlock(nn.Module):
    """DiffiT transformer block: TMSA and MLP, each behind a LayerNorm. DiffiT v3, Eq. 7-8.

    Args:
        hidden_size: size D of the tokens.
        time_embed_dim: size T of the time token.
        num_attention_heads: heads h.
        attention_head_dim: size d of a head.
        window: height and width of a window in tokens.
        mlp_ratio: width of the MLP as a multiple of D.
        dropout: probability in [0, 1) on the output of each branch. Not in the paper: follows ViT.
    """

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        window: tuple[int, int],
        mlp_ratio: float,
        dropout: float,
    ):
        super().__init__()
        self.norm1 = TokenNorm(hidden_size)
        self.attn = TimeDependentSelfAttention(
            hidden_size, time_embed_dim, num_attention_heads, attention_head_dim, window
        )
        self.norm2 = TokenNorm(hidden_size)
        self.mlp = DiffiTMLP(hidden_size, mlp_ratio)
        self.dropout = Dropout16(dropout)

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B * G, N, D) and time tokens of shape (B, T) to tokens of shape (B * G, N, D)."""
        hidden_states = hidden_states + self.dropout(self.attn(self.norm1(hidden_states), time_token))  # Eq. 7
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))  # Eq. 8


class DiffiTResBlock(nn.Module):
    """DiffiT residual block: one convolution, then a DiffiT block on windows. DiffiT v3, Eq. 9-10.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, the size D of the tokens.
        time_embed_dim: size T of the time token.
        num_attention_heads: heads h.
        attention_head_dim: size d of a head.
        window: height and width of a window.
        mlp_ratio: width of the MLP as a multiple of `out_channels`.
        dropout: probability in [0, 1).
        norm_num_groups: groups of the GroupNorm; divides `in_channels`.
        norm_eps: epsilon of the GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_embed_dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        window: tuple[int, int],
        mlp_ratio: float,
        dropout: float,
        norm_num_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        self.window = window
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.block = DiffiTBlock(
            out_channels, time_embed_dim, num_attention_heads, attention_head_dim, window, mlp_ratio, dropout
        )
        # Not in the paper: a 1x1 convolution where the widths of the two ends differ, as in DDPM.
        same_width = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C_in, H, W) and time tokens of shape (B, T) to one of (B, C_out, H, W)."""
        height, width = hidden_states.shape[-2:]
        residual = self.conv_shortcut(hidden_states)  # (B, C_out, H, W)
        hidden_states = self.normalize_and_convolve(hidden_states)  # (B, C_out, H, W), Eq. 9
        tokens = self.block(partition_windows(hidden_states, self.window), time_token)  # (B * G, N, D)
        # The residual comes first because its layout in memory is the sum's.
        return residual + merge_windows(tokens, self.window, height, width)  # (B, C_out, H, W), Eq. 10

    def normalize_and_convolve(self, feature_map: torch.Tensor) -> torch.Tensor:
        """GroupNorm, SiLU and convolution: shape (B, C_in, H, W) to (B, C_out, H, W)."""
        norm, conv = self.norm, self.conv
        has_fast_path = is_plain(norm, nn.GroupNorm) and is_plain(conv, nn.Conv2d) and is_plain_float32(feature_map)
        if has_fast_path and torch.is_grad_enabled():
            if not feature_map.is_contiguous(memory_format=torch.channels_last):
                feature_map = feature_map.contiguous()
            affine = (norm.weight, norm.bias, norm.num_groups, norm.eps)
            return ConvOfGroupNorm.apply(feature_map, *affine, conv.weight, conv.bias)
        return conv(F.silu(norm(feature_map)))


class DiffiTStage(nn.Module):
    """The DiffiT ResBlocks at one resolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_layers: number of ResBlocks.
        **block_kwargs: what every `DiffiTResBlock` takes besides its channels.
    """

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, **block_kwargs):
        super().__init__()
        self.gradient_checkpointing = False
        self.resblocks = nn.ModuleList(
            DiffiTResBlock(in_channels if i == 0 else out_channels, out_channels, **block_kwargs)
            for i in range(num_layers)
        )

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C_in, H, W) and time tokens of shape (B, T) to one of (B, C_out, H, W)."""
        for resblock in self.resblocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(resblock, hidden_states, time_token)
            else:
                hidden_states = resblock(hidden_states, time_token)
        return hidden_states


# ---------------------------------------------------------------------------------------------------------------------
# What both networks share


class DiffiTModelMixin(ModelMixin, ConfigMixin, AttentionMixin):
    """Labels and timesteps, initialisation and saving; a network adds `class_embedding` (an embedding, or None)."""

    @property
    def null_label(self) -> int | None:
        """Index of the null class, which is the number of classes; None for an unconditional network."""
        return None if self.class_embedding is None else self.class_embedding.num_embeddings - 1

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as in NVIDIA's latent model; the paper is silent
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TimeDependentSelfAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)  # as in Swin
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)

    @contextlib.contextmanager
    @torch.no_grad()
    def cache_for_sampling(self) -> Iterator[None]:
        """While inside, keeps what the steps of sampling share; the weights must not change meanwhile.

        It is kept for this thread alone, so several threads may sample with one network. It is the relative position
        bias of each attention, and the weights of all projections of the time token side by side, so that a step makes
        one product of them. Training makes one for each block: to lay the weights side by side at every step keeps
        them and their gradients twice, and took 2.2 (S/2), 1.4 (CIFAR-10) and 1.0 (emoji32) times as long, forward and
        backward, on two CPU cores.
        """
        attentions = [module for module in self.modules() if isinstance(module, TimeDependentSelfAttention)]
        projections = [attention.qkv_temb for attention in attentions]
        devices = {parameter.device for parameter in self.parameters()}
        cache = dict(_sampling_cache.get() or {})  # of another network, as with autoguidance
        # Adapters and offloaded weights, which are not there before their module runs, keep to the plain way.
        if len(devices) == 1 and all(is_plain(projection, nn.Linear) for projection in projections):
            cache |= {(attention, "bias"): attention.relative_position_bias() for attention in attentions}
            cache[self, "time_weights"] = tuple(
                torch.cat([getattr(projection, name) for projection in projections]) for name in ("weight", "bias")
            )
        token = _sampling_cache.set(cache)
        try:
            yield
        finally:
            _sampling_cache.reset(token)

    def _project_time(self, time_token: torch.Tensor) -> None:
        """Inside `cache_for_sampling`, gives each attention its projection of time tokens of shape (B, T)."""
        time_weights = cached_while_sampling(self, "time_weights")
        if time_weights is None:
            return
        attentions = [module for module in self.modules() if isinstance(module, TimeDependentSelfAttention)]
        projected = F.linear(time_token, *time_weights)  # (B, sum of 3 * h * d)
        parts = projected.split([attention.qkv_temb.out_features for attention in attentions], dim=-1)
        for attention, part in zip(attentions, parts, strict=True):
            _sampling_cache.get()[attention, "temporal_qkv"] = part  # (B, 3 * h * d)

    def _one_per_image(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Checks timesteps and labels and gives each image its own.

        Args:
            sample: images or latents, shape (B, C, H, W).
            timestep: one for all or one per image; a number, or a tensor of shape () or (1,) or (B,).
            class_labels: integers of shape (B,); None means the null class for all.

        Returns:
            Timesteps of shape (B,), and labels of shape (B,), or None for an unconditional network.

        Raises:
            ValueError: if timesteps are not one or B, if labels are given to an unconditional network or are out of
                range, not integers or not B.
        """
        batch = sample.shape[0]
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # (1) or (B)
        if timesteps.shape[0] not in (1, batch):
            raise ValueError(f"`timestep` must be one or one per image ({batch}), got {timesteps.shape[0]}")
        timesteps = timesteps.expand(batch)  # (B)

        null_label = self.null_label
        if class_labels is None:
            if null_label is not None:
                class_labels = torch.full((batch,), null_label, device=sample.device)  # (B)
            return timesteps, class_labels
        if null_label is None:
            raise ValueError("`class_labels` were given to an unconditional network")
        if class_labels.dtype not in (torch.int64, torch.int32) or class_labels.shape != (batch,):
            raise ValueError(
                f"`class_labels` must be integers of shape ({batch},), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}"
            )
        # Looking at labels on an accelerator stalls it, so there it is done at inference only.
        if (class_labels.device.type == "cpu" or not self.training) and not torch.compiler.is_compiling():
            if class_labels.min() < 0 or class_labels.max() > null_label:
                raise ValueError(
                    f"`class_labels` must be in [0, {null_label}] ({null_label} is the null class), "
                    f"got {class_labels.min().item()} to {class_labels.max().item()}"
                )
        return timesteps, class_labels

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """As in diffusers, without its warning about `auto_map`, which only `AutoModel` reads."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in diffusers, and puts this file beside the weights, so that the folder loads anywhere.

        The arguments are spelled out because pipelines look for them by name.
        """
        target = Path(save_directory, "diffit_model.py")
        if is_main_process and target.resolve() != Path(__file__).resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, target)  # first, because `push_to_hub=True` uploads the folder as it is then
        super().save_pretrained(
            str(save_directory),
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Image-space network


class DiffiTUNet2DModel(DiffiTModelMixin):
    """The U-shaped DiffiT for images (section 3.2 and appendices H.1, I.1), with the interface of `UNet2DModel`.

    Encoder, bottleneck and mirrored decoder, made of DiffiT ResBlocks; a convolution between two resolutions; a skip
    at each resolution, from what enters the down-sampler to what leaves the up-sampler opposite. Time enters only
    through the time token.

    Args:
        sample_size: height and width of the images in pixels, one int if square. Pipelines read it; with
            `window_size=None` it fixes the size of the input.
        in_channels: channels of the input.
        out_channels: channels of the output.
        flip_sin_to_cos: cosines before sines in the timestep embedding.
        freq_shift: shift of the frequencies of the timestep embedding.
        time_embedding_dim: size T of the time token; None means 4 * `block_out_channels[0]`.
        block_out_channels: channels of each resolution, from the full one to the bottleneck, each half the size of
            the one before.
        layers_per_block: ResBlocks per resolution, one int for all or one for each. The decoder mirrors them.
        window_size: side of the attention windows, the same at every resolution; None means global attention.
        num_attention_heads: heads, one int for all resolutions or one for each. Not in the paper; None means
            channels / `attention_head_dim`, or 4 if that is None too.
        attention_head_dim: size of a head; None means channels / `num_attention_heads`. With both given, the width
            of the attention need not equal the channels.
        mlp_ratio: width of the MLPs as a multiple of the channels. Not in the paper: follows ViT.
        dropout: probability in [0, 1) on the output of each attention and MLP.
        norm_num_groups: groups of the GroupNorms; divides every channel width. Not in the paper: follows DDPM.
        norm_eps: epsilon of the GroupNorms.
        skip_merge: how a skip joins the decoder, `"concat"` or `"add"`. Not in the paper.
        zero_init_output: start with an output of zero. Not in the paper: follows DDPM.
        num_class_embeds: number of classes, or None for an unconditional network. One more row, with the index
            `num_class_embeds`, is the null class for classifier-free guidance.
        num_augment_labels: number A of labels that tell what augmentation did to an image, or None for a network that
            takes none. EDM (arXiv 2206.00364, appendix F.2), which the paper follows, has nine.

    Raises:
        ValueError: if the arguments do not fit each other; the message names them.
    """

    __module__ = "diffit_model"

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiffiTResBlock"]
    _repeated_blocks = ["DiffiTResBlock"]
    _skip_layerwise_casting_patterns = ["conv_in", "time_embedding", "class_embedding", "augment_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embedding_dim: int | None = None,
        block_out_channels: tuple[int, ...] = (128, 256, 256),
        layers_per_block: int | tuple[int, ...] = 2,
        window_size: int | None = 4,
        num_attention_heads: int | tuple[int, ...] | None = None,
        attention_head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        skip_merge: str = "concat",
        zero_init_output: bool = True,
        num_class_embeds: int | None = None,
        num_augment_labels: int | None = None,
    ):
        super().__init__()
        self._check_config()
        num_stages = len(block_out_channels)
        layers = _one_per_stage("layers_per_block", layers_per_block, num_stages)
        heads = _attention_heads(num_attention_heads, attention_head_dim, block_out_channels)
        windows = _stage_windows(window_size, sample_size, num_stages)
        time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]

        # tokenizer
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)

        # time token
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_embed_dim, act_fn="silu")
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + 1, time_embed_dim)
        self.augment_embedding = None
        if num_augment_labels is not None:  # without a bias, so that labels of zero add nothing
            self.augment_embedding = nn.Linear(num_augment_labels, time_embed_dim, bias=False)

        def build_stage(index: int, in_width: int) -> DiffiTStage:
            width = block_out_channels[index]
            return DiffiTStage(
                in_width,
                width,
                layers[index],
                time_embed_dim=time_embed_dim,
                num_attention_heads=heads[index],
                attention_head_dim=attention_head_dim or width // heads[index],
                window=windows[index],
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                norm_num_groups=norm_num_groups,
                norm_eps=norm_eps,
            )

        # encoder, bottleneck, decoder
        self.down_blocks = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        for i in range(num_stages - 1):
            width, next_width = block_out_channels[i : i + 2]
            self.down_blocks.append(build_stage(i, width))
            self.downsamplers.append(nn.Conv2d(width, next_width, kernel_size=3, stride=2, padding=1))
        self.mid_block = build_stage(num_stages - 1, block_out_channels[-1])
        self.upsamplers = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(num_stages - 1)):
            width, previous_width = block_out_channels[i : i + 2]
            self.upsamplers.append(Upsample2D(previous_width, use_conv=True, out_channels=width))
            self.up_blocks.append(build_stage(i, 2 * width if skip_merge == "concat" else width))

        # head
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1)

        self._initialize_weights()

    def _check_config(self) -> None:
        config = self.config
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            if config[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {config[name]}")
        for name in ("attention_head_dim", "time_embedding_dim", "num_class_embeds", "num_augment_labels"):
            if config[name] is not None and config[name] < 1:
                raise ValueError(f"`{name}` must be at least 1 or None, got {config[name]}")
        if not config.block_out_channels or min(config.block_out_channels) < 1:
            raise ValueError(
                f"`block_out_channels` must be positive, one per resolution, got {config.block_out_channels}"
            )
        if config.sample_size is not None and min(_height_and_width(config.sample_size)) < 1:
            raise ValueError(f"`sample_size` must be positive, got {config.sample_size}")
        if min(config.block_out_channels) * config.mlp_ratio < 1:
            raise ValueError(f"`mlp_ratio` {config.mlp_ratio} leaves no hidden channel")
        for width in config.block_out_channels:
            if width % config.norm_num_groups != 0:
                raise ValueError(
                    f"`norm_num_groups` {config.norm_num_groups} must divide every width of `block_out_channels` "
                    f"{tuple(config.block_out_channels)}"
                )
        if not 0 <= config.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {config.dropout}")
        if config.skip_merge not in ("concat", "add"):
            raise ValueError(f"`skip_merge` must be 'concat' or 'add', got {config.skip_merge!r}")

    def _initialize_weights(self) -> None:
        super()._initialize_weights()
        if self.config.zero_init_output:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError that names the multiple H and W must be, if the network cannot divide them."""
        if self.config.window_size is None:
            expected = _height_and_width(self.config.sample_size)
            if (height, width) != expected:
                raise ValueError(
                    f"the relative bias of global attention (`window_size=None`) ties this network to images of "
                    f"{expected[0]} x {expected[1]}, got {height} x {width}"
                )
            return
        num_stages = len(self.config.block_out_channels)
        multiple = 2 ** (num_stages - 1) * self.config.window_size
        if height % multiple or width % multiple:
            raise ValueError(
                f"height and width must be multiples of {multiple} ({num_stages} resolutions, windows of "
                f"{self.config.window_size}), got {height} x {width}"
            )

    def _checked_augment_labels(
        self, sample: torch.Tensor, augment_labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Labels of augmentation in the dtype of the images, shape (B, A); None for a network that takes none."""
        num_labels = self.config.num_augment_labels
        if num_labels is None:
            if augment_labels is not None:
                raise ValueError("`augment_labels` were given to a network without `num_augment_labels`")
            return None
        shape = (sample.shape[0], num_labels)
        if augment_labels is None:
            return sample.new_zeros(shape)  # through the layer too: under DDP every parameter must be used
        if augment_labels.shape != shape:
            raise ValueError(f"`augment_labels` must have the shape {shape}, got {tuple(augment_labels.shape)}")
        return augment_labels.to(sample.dtype)

    @staticmethod
    def choose_layout(feature_map: torch.Tensor) -> torch.Tensor:
        """On a CPU puts channels last, which makes windows of tokens cheap to cut and to put together.

        Not on a GPU, whose GroupNorm would undo it; and not where the feature map wants no gradient, while others do:
        there the backward pass of a CPU's GroupNorm crashes (torch 2.13).
        """
        if feature_map.device.type == "cpu" and (feature_map.requires_grad or not torch.is_grad_enabled()):
            return feature_map.contiguous(memory_format=torch.channels_last)
        return feature_map

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        augment_labels: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts what the network was trained for (noise, image or velocity) from noisy images.

        Args:
            sample: noisy images, about unit variance; shape (B, in_channels, H, W).
            timestep: timestep in [0, number of training timesteps), integer or fractional, or ln(sigma) / 4 of an EDM
                model; one for all or one per image; a number, or a tensor of shape () or (1,) or (B,).
            class_labels: classes in [0, num_class_embeds], the last being the null class; integers of shape (B,).
                None means the null class for all.
            return_dict: return a `UNet2DOutput` rather than a tuple.
            augment_labels: what augmentation did to each image, zero where it did nothing; floats of shape
                (B, num_augment_labels). None means zeros, as in sampling.

        Returns:
            `UNet2DOutput` whose `sample`, or a tuple whose first entry, has shape (B, out_channels, H, W).

        Raises:
            ValueError: if the network cannot divide H x W (the message names the multiple that it must be), if labels
                are given to an unconditional network or are out of range, if timesteps are not one or B, or if
                `augment_labels` are given to a network without or are not of that shape.
        """
        self.check_size(*sample.shape[-2:])
        timesteps, class_labels = self._one_per_image(sample, timestep, class_labels)  # (B), (B)
        augment_labels = self._checked_augment_labels(sample, augment_labels)  # (B, A)

        # 1. time token
        time_token = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (B, T)
        if self.class_embedding is not None:
            time_token = time_token + self.class_embedding(class_labels)  # (B, T)
        if self.augment_embedding is not None:
            time_token = time_token + self.augment_embedding(augment_labels)  # (B, T)
        self._project_time(time_token)

        # 2. tokenizer
        hidden_states = self.choose_layout(self.conv_in(sample))  # (B, C, H, W)

        # 3. encoder
        skips = []
        for stage, downsampler in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden_states = stage(hidden_states, time_token)  # (B, C, H, W)
            skips.append(hidden_states)
            hidden_states = downsampler(hidden_states)  # (B, C', H/2, W/2)

        # 4. bottleneck
        hidden_states = self.mid_block(hidden_states, time_token)  # (B, C, H, W)

        # 5. decoder
        for upsampler, stage in zip(self.upsamplers, self.up_blocks, strict=True):
            hidden_states = upsampler(hidden_states)  # (B, C', 2H, 2W)
            skip = skips.pop().to(hidden_states.device)  # elsewhere under a `device_map` over several devices
            if self.config.skip_merge == "concat":
                hidden_states = torch.cat([hidden_states, skip], dim=1)  # (B, 2C, H, W)
            else:
                hidden_states = hidden_states + skip  # (B, C, H, W)
            hidden_states = stage(hidden_states, time_token)  # (B, C, H, W)

        # 6. head: GroupNorm and convolution, without an activation, as in the paper
        output = self.conv_out(self.conv_norm_out(hidden_states)).contiguous()  # (B, out_channels, H, W)

        return UNet2DOutput(sample=output) if return_dict else (output,)


DiffiTUNet2DModel.register_for_auto_class("AutoModel")


def _one_per_stage(name: str, value: int | tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    values = (value,) * num_stages if isinstance(value, int) else tuple(value)
    if len(values) != num_stages or min(values) < 1:
        raise ValueError(f"`{name}` must be one positive int or one per resolution ({num_stages}), got {value}")
    return values


def _attention_heads(
    num_attention_heads: int | tuple[int, ...] | None, attention_head_dim: int | None, widths: tuple[int, ...]
) -> tuple[int, ...]:
    if num_attention_heads is not None or attention_head_dim is None:
        heads = _one_per_stage(
            "num_attention_heads", 4 if num_attention_heads is None else num_attention_heads, len(widths)
        )
        if attention_head_dim is None and any(width % n for width, n in zip(widths, heads, strict=True)):
            raise ValueError(
                f"`num_attention_heads` {heads} must divide `block_out_channels` {tuple(widths)}, "
                "or `attention_head_dim` must be given"
            )
        return heads
    if any(width % attention_head_dim for width in widths):
        raise ValueError(
            f"`attention_head_dim` {attention_head_dim} must divide `block_out_channels` {tuple(widths)}, "
            "or `num_attention_heads` must be given"
        )
    return tuple(width // attention_head_dim for width in widths)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _stage_windows(
    window_size: int | None, sample_size: int | tuple[int, int] | None, num_stages: int
) -> list[tuple[int, int]]:
    if window_size is not None:
        if window_size < 1:
            raise ValueError(f"`window_size` must be at least 1, or None for global attention, got {window_size}")
        return [(window_size, window_size)] * num_stages
    if sample_size is None:
        raise ValueError("global attention (`window_size=None`) needs `sample_size`")
    height, width = _height_and_width(sample_size)
    multiple = 2 ** (num_stages - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"`sample_size` must be a multiple of {multiple} ({num_stages} resolutions), got {sample_size}"
        )
    return [(height // 2**i, width // 2**i) for i in range(num_stages)]


# ---------------------------------------------------------------------------------------------------------------------
# Latent network


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed sines and cosines of the place of each token, as in DiT: of its column, then of its row.

    Args:
        hidden_size: size D of the tokens, a multiple of 4.
        grid: height and width of the token grid.

    Returns:
        Numbers in [-1, 1], float32, shape (1, N, D).
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")  # (H/p, W/p)
    places = torch.stack([columns, rows]).float()  # (2, H/p, W/p)
    return get_2d_sincos_pos_embed_from_grid(hidden_size, places, output_type="pt").float()[None]


class DiffiTTransformer2DModel(DiffiTModelMixin):
    """The isotropic DiffiT for latents (section 3.3), with the interface of `DiTTransformer2DModel`.

    Patches, DiffiT blocks with global attention, patches again. Timestep and class enter only through the time token.
    The defaults are the paper's network for ImageNet at 256 x 256 pixels, but for its `out_channels` of 8.

    Args:
        num_attention_heads: heads h.
        attention_head_dim: size d of a head; the size D of the tokens and of the time token is h * d, a multiple of 4.
        in_channels: channels of the latents.
        out_channels: channels of the output; None means `in_channels`. Twice `in_channels` for a learned variance.
        num_layers: DiffiT blocks. The paper says 30; 28 gives its number of parameters.
        dropout: probability in [0, 1) on the output of each attention and MLP.
        sample_size: height and width of the latents, one int if square; multiples of `patch_size`. The relative
            position bias of global attention fixes it.
        patch_size: height and width of a patch.
        mlp_ratio: width of the MLPs as a multiple of D.
        num_embeds_ada_norm: number of classes, or None for an unconditional network; the name is diffusers'. One more
            row, with the index `num_embeds_ada_norm`, is the null class for classifier-free guidance.

    Raises:
        ValueError: if the arguments do not fit each other; the message names them.
    """

    __module__ = "diffit_model"

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiffiTBlock"]
    _repeated_blocks = ["DiffiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "time_embedding", "class_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        num_embeds_ada_norm: int | None = 1000,
    ):
        super().__init__()
        if out_channels is None:
            out_channels = in_channels
            self.register_to_config(out_channels=out_channels)  # `DiTPipeline` reads it as a number
        self._check_config()
        hidden_size = num_attention_heads * attention_head_dim
        height, width = _height_and_width(sample_size)
        self.token_grid = (height // patch_size, width // patch_size)
        self.gradient_checkpointing = False

        # tokenizer
        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        # Not a parameter, yet in the state dict: a checkpoint may hold other positions, if only in the last bit.
        self.register_buffer("position_embedding", sincos_position_embedding(hidden_size, self.token_grid))

        # time token
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)  # width of NVIDIA's checkpoints
        self.time_embedding = TimestepEmbedding(256, hidden_size, act_fn="silu")
        self.class_embedding = None
        if num_embeds_ada_norm is not None:
            self.class_embedding = nn.Embedding(num_embeds_ada_norm + 1, hidden_size)

        # encoder
        self.blocks = nn.ModuleList(
            DiffiTBlock(
                hidden_size,
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                window=self.token_grid,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )

        # head
        self.norm_out = TokenNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * out_channels)

        self._initialize_weights()

    def _check_config(self) -> None:
        config = self.config
        sizes = "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "patch_size"
        for name in sizes:
            if config[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {config[name]}")
        hidden_size = config.num_attention_heads * config.attention_head_dim
        if hidden_size % 4:
            raise ValueError(
                f"`num_attention_heads` {config.num_attention_heads} times `attention_head_dim` "
                f"{config.attention_head_dim} must be a multiple of 4, for the sines and cosines of the positions"
            )
        if config.sample_size is None or any(
            side < 1 or side % config.patch_size for side in _height_and_width(config.sample_size)
        ):
            raise ValueError(
                f"`sample_size` must be positive multiples of `patch_size` {config.patch_size}, "
                f"got {config.sample_size}"
            )
        if hidden_size * config.mlp_ratio < 1:
            raise ValueError(f"`mlp_ratio` {config.mlp_ratio} leaves no hidden channel")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {config.dropout}")
        if config.num_embeds_ada_norm is not None and config.num_embeds_ada_norm < 1:
            raise ValueError(f"`num_embeds_ada_norm` must be at least 1 or None, got {config.num_embeds_ada_norm}")

    def _initialize_weights(self) -> None:
        super()._initialize_weights()
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(len(self.patch_embedding.weight), -1))  # as a linear
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)  # nothing else is zero, as in NVIDIA's model

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError unless latents of H x W are those that the network was built for."""
        expected = _height_and_width(self.config.sample_size)
        if (height, width) != expected:
            raise ValueError(
                f"the relative bias of global attention ties this network to latents of {expected[0]} x "
                f"{expected[1]} (`sample_size`), got {height} x {width}"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts what the network was trained for (noise, and the variance if learned) from noisy latents.

        Args:
            hidden_states: noisy latents, about unit variance; shape (B, in_channels, H, W).
            timestep: timestep in [0, number of training timesteps), integer or fractional, one for all or one per
                image; a number, or a tensor of shape () or (1,) or (B,).
            class_labels: classes in [0, num_embeds_ada_norm], the last being the null class; integers of shape (B,).
                None means the null class for all.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            `Transformer2DModelOutput` whose `sample`, or a tuple whose first entry, has shape (B, out_channels, H, W).

        Raises:
            ValueError: if H x W is not the network's `sample_size`, if labels are given to an unconditional network
                or are out of range, or if timesteps are not one or B.
        """
        height, width = hidden_states.shape[-2:]
        self.check_size(height, width)
        timesteps, class_labels = self._one_per_image(hidden_states, timestep, class_labels)  # (B), (B)
        dtype = hidden_states.dtype

        # 1. time token
        time_token = self.time_embedding(self.time_proj(timesteps).to(dtype))  # (B, T)
        if self.class_embedding is not None:
            time_token = time_token + self.class_embedding(class_labels)  # (B, T)
        self._project_time(time_token)

        # 2. tokenizer
        hidden_states = self.patch_embedding(hidden_states)  # (B, D, H/p, W/p)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, N, D)
        # In the dtype of the input, so that under autocast the sums of all blocks stay in float32.
        hidden_states = hidden_states + self.position_embedding.to(dtype)  # (B, N, D)

        # 3. encoder
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, time_token)  # (B, N, D)
            else:
                hidden_states = block(hidden_states, time_token)  # (B, N, D)

        # 4. head: LayerNorm, Swish and linear layer
        hidden_states = self.proj_out(F.silu(self.norm_out(hidden_states)))  # (B, N, p * p * out_channels)
        patch = (self.config.patch_size, self.config.patch_size)
        patches = hidden_states.reshape(-1, math.prod(patch), self.config.out_channels)  # (B * N, p * p, out_channels)
        output = merge_windows(patches, patch, height, width).contiguous()  # (B, out_channels, H, W)

        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


DiffiTTransformer2DModel.register_for_auto_class("AutoModel")


# ---------------------------------------------------------------------------------------------------------------------
# Weights for another resolution or other classes


def resize_grid(rows: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """Interpolates a grid of vectors, bicubic as Swin's bias tables; the centre stays the centre.

    Args:
        rows: the vectors row by row, any float dtype; shape (height * width, K).
        size: height and width of the grid.
        new_size: height and width of the new grid.

    Returns:
        Vectors in the dtype of `rows`, shape (new height * new width, K).
    """
    if size == new_size:
        return rows
    grid = rows.double().T.reshape(1, -1, *size)  # (1, K, height, width)
    grid = F.interpolate(grid, size=new_size, mode="bicubic")  # (1, K, new height, new width)
    return grid.flatten(2)[0].T.contiguous().to(rows.dtype)


def adapt_weights(
    source: ModelMixin, target: ModelMixin, reset_class_embeddings: bool = False
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Makes the weights of one network fit another of other resolution or classes, to start a fine-tuning from.

    Relative position bias tables and positions are interpolated. With another number of classes, and where asked for,
    class rows start anew as `target` has them. The null class never changes what the network predicts: its row is
    kept, becomes a row of zeros where `source` had no classes, and a part of the time embedding where `target` has
    none. Labels of augmentation are dropped, or start with weights of zero, which change no prediction either.

    Args:
        source: network with the weights; it stays as it is.
        target: network that is to load them, initialised; it stays as it is.
        reset_class_embeddings: let class rows start anew although there are as many as before.

    Returns:
        A state dict for `target`, and what was changed, in words, one entry for each kind of change.

    Raises:
        ValueError: lists the weights that do not fit `target`.
    """
    weights, wanted = source.state_dict(), target.state_dict()
    changes = []

    # 1. resolution
    resized = {}
    for name in [name for name in weights if name in wanted]:
        module_name, _, weight_name = name.rpartition(".")
        if weight_name == "relative_position_bias_table":
            grids = [model.get_submodule(module_name).window for model in (source, target)]
            sizes = [(2 * height - 1, 2 * width - 1) for height, width in grids]
            weights[name] = resize_grid(weights[name], *sizes)
        elif name == "position_embedding":
            grids = [model.token_grid for model in (source, target)]
            weights[name] = resize_grid(weights[name][0], *grids)[None]
        else:
            continue
        if grids[0] != grids[1]:
            resized.setdefault((weight_name, *grids), []).append(name)
    for (weight_name, old, new), names in resized.items():
        changes.append(
            f"{len(names)} x {weight_name} interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} tokens"
        )

    # 2. classes
    name = "class_embedding.weight"
    rows, new_rows = weights.get(name), wanted.get(name)
    if rows is not None and new_rows is None:
        del weights[name]
        bias = "time_embedding.linear_2.bias"
        weights[bias] = weights[bias] + rows[-1]
        changes.append("class embeddings dropped, the null class became part of the time embedding")
    elif rows is None and new_rows is not None:
        weights[name] = torch.cat([new_rows[:-1], torch.zeros_like(new_rows[-1:])])
        changes.append(f"{len(new_rows) - 1} class embeddings start anew, the null class is zero")
    elif rows is not None and (reset_class_embeddings or len(rows) != len(new_rows)):
        weights[name] = torch.cat([new_rows[:-1], rows[-1:]])
        changes.append(f"{len(new_rows) - 1} class embeddings start anew, the null class is kept")

    # 3. augmentation: labels of zero, which sampling has, add nothing
    name = "augment_embedding.weight"
    if name in weights and name not in wanted:
        del weights[name]
        changes.append("the labels of augmentation dropped")
    elif name in wanted and name not in weights:
        weights[name] = torch.zeros_like(wanted[name])
        changes.append("the labels of augmentation start at zero")

    # 4. what is left must fit
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, wanted)]
    misfits = [
        f"{name} (has {shapes[0].get(name, 'nothing')}, needs {shapes[1].get(name, 'nothing')})"
        for name in sorted(shapes[0] | shapes[1])
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if misfits:
        raise ValueError(f"{len(misfits)} weights do not fit the network: {', '.join(misfits[:8])}")
    return weights, changes


# ---------------------------------------------------------------------------------------------------------------------
# What a saved folder or a config file holds

MODEL_CLASSES = {
    "DiffiTUNet2DModel": DiffiTUNet2DModel,
    "DiffiTTransformer2DModel": DiffiTTransformer2DModel,
    "UNet2DModel": UNet2DModel,
}


def model_class(config: dict) -> type[ModelMixin]:
    """The class that a `config.json` was written for.

    Args:
        config: contents of a `config.json`; without `_class_name` it means `DiffiTUNet2DModel`.

    Raises:
        ValueError: if `_class_name` is none of `MODEL_CLASSES`.
    """
    name = config.get("_class_name", "DiffiTUNet2DModel")
    if name not in MODEL_CLASSES:
        raise ValueError(f"`_class_name` must be one of {', '.join(MODEL_CLASSES)}, got {name!r}")
    return MODEL_CLASSES[name]


def choose_attention_backend(model: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What `auto` means: xformers where its operators are there and take this model's attention, otherwise native.

    Args:
        model: a network with DiffiT attention, or any other module.
        device: where it will run.
        dtype: float type of queries, keys and values.

    Returns:
        The backend's name, `"xformers"` or `"native"`, and the reason in words.
    """
    if device.type != "cuda":
        return "native", f"xformers needs CUDA, the device is {device.type}"
    attentions = [module for module in model.modules() if isinstance(module, TimeDependentSelfAttention)]
    if not attentions:
        return "native", "the model has no DiffiT attention"
    for attention in attentions:
        shape = (1, math.prod(attention.window), attention.num_attention_heads, attention.attention_head_dim)
        probe = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
        bias = torch.empty(1, shape[2], shape[1], shape[1], device=device, dtype=dtype, requires_grad=True)
        reasons = xformers_unsupported_reasons(probe, probe, probe, align_bias_for_xformers(bias, 1))
        if reasons:
            return "native", "; ".join(reasons)
    return "xformers", "its operators take this model's attention"


def set_attention_backend(model: ModelMixin, backend: str) -> None:
    """Sets the backend of this model alone: diffusers' method of that name also changes the whole process's default.

    Args:
        model: its attention modules take the backend; `UNet2DModel` knows only `native` and `xformers`.
        backend: a name of diffusers' dispatcher.

    Raises:
        ValueError: if the model has no such backend.
    """
    if isinstance(model, UNet2DModel):
        if backend not in ("native", "xformers"):
            raise ValueError(f"UNet2DModel has the attention backends native and xformers, not {backend!r}")
        if backend == "xformers":
            model.enable_xformers_memory_efficient_attention()
        return
    for module in model.modules():
        if isinstance(module, TimeDependentSelfAttention):
            module.set_attention_backend(backend)
