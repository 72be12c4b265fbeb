# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""DiffiT, the Diffusion Vision Transformer (Hatamizadeh et al., ECCV 2024, arXiv 2312.02139v3), for diffusers.

`DiffiTUNet2DModel` is the paper's image-space network, a U-shaped transformer with the interface of diffusers'
`UNet2DModel`; `DiffiTTransformer2DModel` is the latent-space network, with the interface of `DiTTransformer2DModel`.
Equation numbers are those of version 3 of the paper. Where the paper is silent, a comment says what we do instead.

This file is copied into every saved folder and loaded from there as remote code, so it stands alone: it imports torch
and diffusers, and xformers only if that attention backend is selected. On a CPU the scripts put faster versions of
some layers in place (`diffit/cpu_kernels.py`); after changing a layer here, change its version there.

Shapes: B batch, C channels, H/W height/width (pixels or latents), G windows per image (1 = global attention),
N tokens in a window, D hidden size, T size of the time token, A augmentation labels, h attention heads, d size of a
head, p height and width of a patch.
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

# Remote code is loaded under another module name. Registering a fixed one keeps `model_index.json`, `auto_map` and
# pickles valid wherever the file was loaded from.
sys.modules.setdefault("diffit_model", sys.modules[__name__])

logger = logging.get_logger(__name__)

# State of one sampling call in one thread, keyed by module and name, because threads may share a module.
_sampling_cache: ContextVar[dict | None] = ContextVar("diffit_sampling_cache", default=None)


def cached_while_sampling(module: nn.Module, name: str):
    """Returns the entry that `cache_for_sampling` holds for a module in this thread.

    Returns None outside of `cache_for_sampling`, and while torch.compile is tracing.
    """
    if torch.compiler.is_compiling():
        return None
    cache = _sampling_cache.get()
    return None if cache is None else cache.get((module, name))


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly `kind`, with no adapter and no hooks (offloading installs hooks)."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked


# ---------------------------------------------------------------------------------------------------------------------
# Windows and positions


def partition_windows(feature_map: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Splits a feature map into non-overlapping windows of tokens (local attention, section 3.2).

    Args:
        feature_map: shape (B, C, H, W).
        window: height and width of a window; they divide H and W.

    Returns:
        Tokens, shape (B * G, N, C) with N = window height * window width; the windows of an image are consecutive.
    """
    batch, channels, height, width = feature_map.shape
    rows, columns = height // window[0], width // window[1]
    feature_map = feature_map.reshape(batch, channels, rows, window[0], columns, window[1])
    return feature_map.permute(0, 2, 4, 3, 5, 1).reshape(batch * rows * columns, window[0] * window[1], channels)


def add_windows(feature_map: torch.Tensor, tokens: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """`feature_map + merge_windows(tokens)` in one pass, without merging the windows first.

    Args:
        feature_map: shape (B, C, H, W), in any memory layout.
        tokens: shape (B * G, N, C); the windows of an image are consecutive.
        window: height and width of a window; they divide H and W.

    Returns:
        Feature map, shape (B, C, H, W), in the memory layout of `feature_map`.
    """
    batch, channels, height, width = feature_map.shape
    rows, columns = height // window[0], width // window[1]
    tokens = tokens.reshape(batch, rows, columns, *window, channels).permute(0, 5, 1, 3, 2, 4)
    feature_map = feature_map.view(batch, channels, rows, window[0], columns, window[1])
    return (feature_map + tokens).reshape(batch, channels, height, width)  # the first term determines the layout


def merge_windows(tokens: torch.Tensor, window: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Merges windows of tokens into a feature map: the inverse of `partition_windows`.

    Args:
        tokens: shape (B * G, N, C).
        window: height and width of a window; they divide `height` and `width`.
        height, width: size of the feature map.

    Returns:
        Feature map, shape (B, C, H, W), channels last in memory like the tokens.
    """
    rows, columns = height // window[0], width // window[1]
    tokens = tokens.reshape(-1, rows, columns, *window, tokens.shape[-1])
    return tokens.transpose(2, 3).reshape(-1, height, width, tokens.shape[-1]).permute(0, 3, 1, 2)


def relative_position_index(window: tuple[int, int]) -> torch.Tensor:
    """Row of the relative position bias table for each pair of tokens in a window, indexed as in Swin.

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


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed sine-cosine position embedding, as in DiT: first the column of each token, then its row.

    Args:
        hidden_size: hidden size D, a multiple of 4.
        grid: height and width of the token grid.

    Returns:
        Numbers in [-1, 1], float32, shape (1, N, D).
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")  # (H/p, W/p)
    positions = torch.stack([columns, rows]).float()  # (2, H/p, W/p)
    return get_2d_sincos_pos_embed_from_grid(hidden_size, positions, output_type="pt").float()[None]


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
        query, key, value: shape (B, N, h, d) each.
        bias: relative position bias, shape (1 or B, h, N, N), or None.
        scale: factor on Q K^T; None means 1 / sqrt(d).

    Returns:
        softmax(scale * Q K^T + B) V, shape (B, N, h, d).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
    scores = scale * (query @ key.transpose(-1, -2))  # (B, h, N, N)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2)  # (B, N, h, d)


def align_bias_for_xformers(bias: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Lays out a bias as xformers' kernels require: one per batch entry, with a row stride that is a multiple of 8.

    Args:
        bias: in the dtype of the query (casting afterwards would lose the alignment), shape (1, h, N, N).
        batch_size: number of windows B.

    Returns:
        The same values, shape (B, h, N, N); a view, so the B copies take no memory.
    """
    num_tokens = bias.shape[-1]
    bias = F.pad(bias, (0, -num_tokens % 8))  # (1, h, N, N rounded up to 8)
    return bias.expand(batch_size, -1, -1, -1)[..., :num_tokens]


# CUDA limit on grid dimension y (one block row per window).
MAX_WINDOWS = 65_535


@functools.cache
def compiled_flex_attention() -> Callable:
    """FlexAttention compiled with static shapes except for the (dynamic) number of windows.

    `fullgraph=True`, because past the recompile limit torch silently falls back to eager, which gives wrong gradients
    under gradient checkpointing (torch 2.13).
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
    """The backend `flex`: its kernel reads the relative position bias from the table, so no N x N tensor exists.

    The gradient of the table is accumulated with atomic additions, so its last bits vary from run to run. On a CPU,
    FlexAttention has no backward pass and materializes the scores.

    Args:
        query, key, value: shape (B, N, h, d) each.
        table: one row per offset between two tokens, as in `relative_position_index`; any float dtype, shape
            ((2 * height - 1) * (2 * width - 1), h).
        window: height and width of a window of N tokens.
        scale: factor on Q K^T; None means 1 / sqrt(d).

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
    if head_dim < 16:  # the kernel's minimum; padding with zeros leaves every product unchanged
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
    """Asks the installed xformers whether its operators support this attention, forward and (if needed) backward.

    Args:
        query, key, value: shape (B, N, h, d) each.
        bias: shape (B, h, N, N) or None.
        attention_op: forward and backward operator; None means cutlass, the only ones that take a bias.

    Returns:
        One reason per violated requirement, as xformers words it; empty if the kernels can run.
    """
    try:
        from xformers.ops.fmha import Inputs, cutlass
    except ImportError as error:
        return [f"xformers cannot be imported: {error}"]
    inputs = Inputs(query, key, value, bias)
    inputs.validate_inputs()
    forward_op, backward_op = attention_op or (cutlass.FwOp, cutlass.BwOp)
    reasons = forward_op.not_supported_reasons(inputs)
    if query.shape[0] > MAX_WINDOWS:  # xformers would launch a kernel that CUDA rejects (xformers issue 845)
        reasons.append(f"{query.shape[0]} windows exceed the limit of {MAX_WINDOWS}")
    if any(x.requires_grad for x in (query, key, value)):
        reasons += backward_op.not_supported_reasons(inputs)
    elif bias is not None and bias.requires_grad:
        # xformers checks only query, key and value, and would silently leave the bias without a gradient.
        reasons.append("only the bias requires grad")
    return list(dict.fromkeys(reasons))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


class DiffiTAttnProcessor:
    """Attention core, softmax(Q K^T / sqrt(d) + B) V, dispatched by diffusers' backend names.

    `set_attention_backend` sets `_attention_backend`; None means diffusers' process-wide default. Backends: `native`
    (PyTorch's SDPA), `_native_math` (`plain_attention`), `xformers`, and any other backend of diffusers' dispatcher
    whose kernel takes a bias. `flex` is handled by the attention module, see `flex_attention_with_table`.
    """

    def __init__(self):
        self._attention_backend = None
        self._parallel_config = None  # read by diffusers' set_attention_backend
        self.attention_op = None  # (forward, backward) operators of xformers; None lets xformers choose
        self._xformers_reasons = {}  # why xformers does not support an attention, by everything that it may depend on

    @property
    def backend(self) -> str:
        """The backend in use: the one that was set, or diffusers' process-wide default."""
        return self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]

    def _reasons_against_xformers(self, *tensors: torch.Tensor | None) -> list[str]:
        """As `xformers_unsupported_reasons`, but asks xformers only once about tensors of the same description."""
        described = [x if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors]
        key = (*described, self.attention_op)
        if key not in self._xformers_reasons:
            self._xformers_reasons[key] = xformers_unsupported_reasons(*tensors, self.attention_op)
        return self._xformers_reasons[key]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attends. Arguments as in `plain_attention`, with a bias of shape (1, h, N, N) in any float dtype."""
        backend = self.backend
        if backend == AttentionBackendName._NATIVE_MATH:
            return plain_attention(query, key, value, bias, scale)
        if bias is not None:
            bias = bias.to(query.dtype)
        if backend == AttentionBackendName.XFORMERS:
            aligned_bias = None if bias is None else align_bias_for_xformers(bias, query.shape[0])
            reasons = self._reasons_against_xformers(query, key, value, aligned_bias)
            if not reasons:
                import xformers.ops

                options = {"scale": scale, "op": self.attention_op}
                return xformers.ops.memory_efficient_attention(query, key, value, aligned_bias, **options)
            if not torch.compiler.is_compiling():
                _warn_once(f"xformers does not support this attention, using `native` (SDPA): {'; '.join(reasons)}")
            backend = AttentionBackendName.NATIVE
        return dispatch_attention_fn(query, key, value, attn_mask=bias, scale=scale, backend=backend)


# ---------------------------------------------------------------------------------------------------------------------
# Layers of a block


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Disables autocast inside a `with` block: for layers whose kernels accumulate in float32 in any case.

    Autocast would convert their input and output to float32 as well, two more passes over the activations.
    """
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class ChannelNorm(nn.GroupNorm):
    """GroupNorm in the dtype of its input, also under autocast."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C, H, W) to one of the same shape, normalized in groups of channels."""
        dtype = feature_map.dtype
        with without_autocast(feature_map.device.type):
            return F.group_norm(feature_map, self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class Upsampler(Upsample2D):
    """Doubles height and width by repetition, followed by a 3x3 convolution, in the dtype of the input.

    Args:
        in_channels, out_channels: channels of the input and of the output.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, use_conv=True, out_channels=out_channels)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C_in, H, W) to one of shape (B, C_out, 2H, 2W)."""
        if len(feature_map) >= 64 or feature_map.numel() > 2**30:  # too large for torch's channels-last kernel
            feature_map = feature_map.contiguous()
        with without_autocast(feature_map.device.type):
            feature_map = F.interpolate(feature_map, scale_factor=2.0, mode="nearest")  # (B, C_in, 2H, 2W)
        return self.conv(feature_map)  # (B, C_out, 2H, 2W)


class TokenNorm(nn.LayerNorm):
    """LayerNorm with `elementwise_affine=False`, as in NVIDIA's checkpoints; the next linear layer absorbs the affine.

    It works in the dtype of its input, also under autocast.

    Args:
        hidden_size: hidden size D.
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, eps=1e-6, elementwise_affine=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (..., D) to tokens of mean 0 and variance 1."""
        with without_autocast(tokens.device.type):
            return super().forward(tokens)


class DiffiTMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    Args:
        hidden_size: hidden size D.
        mlp_ratio: width of the layer between, as a multiple of D.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B, N, D) to tokens of shape (B, N, D)."""
        hidden_states = self.act(self.fc1(hidden_states))  # (B, N, mlp_ratio * D)
        return self.fc2(hidden_states)  # (B, N, D)


# ---------------------------------------------------------------------------------------------------------------------
# Time-dependent multi-head self-attention


class RelativePositions(nn.Module):
    """Holds `relative_position_index(window)`, so that all attentions with the same window can share one table.

    Args:
        window: height and width of a window.
    """

    def __init__(self, window: tuple[int, int]):
        super().__init__()
        self.register_buffer("index", relative_position_index(window), persistent=False)  # derived


class TimeDependentSelfAttention(nn.Module, AttentionModuleMixin):
    """Time-dependent multi-head self-attention (TMSA) with relative position bias, DiffiT v3 Eq. 3-6.

    Queries, keys and values are linear in the image tokens and in the time token. With one time token per image this
    is equivalent to shifting the queries by `q_t`, attending, and shifting the output by `v_t`: `k_t` adds the same
    number to all logits of a query, which the softmax cancels, and `v_t` passes through the attention unchanged
    because its rows sum to 1. The weights of all three stay in the state dict, as in the paper and in NVIDIA's
    checkpoints.

    Args:
        hidden_size: hidden size D.
        time_embed_dim: size T of the time token.
        num_attention_heads: heads h.
        attention_head_dim: size d of a head; h * d may differ from D.
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
        self.relative_positions = RelativePositions(window)  # a network replaces it by a shared one
        self.set_processor(DiffiTAttnProcessor())

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: tuple | None = None) -> None:
        """Called on each attention by diffusers' `enable_` and `disable_xformers_memory_efficient_attention`.

        Disabling selects `native` rather than the process-wide default, which may itself be xformers.

        Raises:
            ModuleNotFoundError: if xformers is not installed.
            ValueError: if no CUDA device is available.
        """
        if valid and not is_xformers_available():
            raise ModuleNotFoundError("xformers is not installed: `pip install xformers`", name="xformers")
        if valid and not torch.cuda.is_available():
            raise ValueError("xformers' memory-efficient attention needs a CUDA device, and none is available")
        self.processor.attention_op = attention_op if valid else None
        self.set_attention_backend("xformers" if valid else "native")

    def relative_position_bias(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The bias B of Eq. 6, shape (1, h, N, N), contiguous; it does not depend on time.

        Args:
            dtype: of the bias; None means that of the table, in which its gradient is summed in any case.
        """
        table = self.relative_position_bias_table
        index = self.relative_positions.index.to(table.device)  # a `device_map` may put the shared index elsewhere
        # As an embedding, whose gradient is summed faster than that of indexing.
        bias = F.embedding(index, table).permute(2, 0, 1)  # (h, N, N)
        # The conversion and the copy are one pass; `to` ignores the memory format if the dtype is the same.
        bias = bias.to(dtype or table.dtype, memory_format=torch.contiguous_format).contiguous()
        return bias[None]  # (1, h, N, N)

    def forward(self, spatial_tokens: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Attends within each window.

        Args:
            spatial_tokens: image tokens, `x_s` in the paper; the windows of an image are consecutive, shape
                (B * G, N, D).
            time_token: embedding of the timestep (and class), `x_t` in the paper; shape (B, T).

        Returns:
            Attended tokens, shape (B * G, N, D), same dtype as `spatial_tokens`.

        Raises:
            ValueError: if N is not the number of tokens in a window, or B * G is not a multiple of B.
        """
        num_windows, num_tokens, _ = spatial_tokens.shape
        batch = time_token.shape[0]
        if num_tokens != self.window[0] * self.window[1]:
            raise ValueError(
                f"expected windows of {self.window[0]} x {self.window[1]} tokens, got {num_tokens} tokens"
            )
        if num_windows % batch != 0:
            raise ValueError(f"the number of windows ({num_windows}) must be a multiple of that of images ({batch})")
        heads = (self.num_attention_heads, self.attention_head_dim)

        # DiffiT v3, Eq. 3-5, without k_t
        spatial_qkv = self.qkv(spatial_tokens).reshape(batch, -1, num_tokens, 3, *heads)  # (B, G, N, 3, h, d)
        query, key, value = spatial_qkv.unbind(3)  # 3 x (B, G, N, h, d)
        cached = cached_while_sampling(self, "temporal_qkv")
        temporal_qkv = self.qkv_temb(time_token) if cached is None else cached  # (B, 3 * h * d)
        temporal_qkv = temporal_qkv.reshape(batch, 1, 1, 3, *heads)  # (B, 1, 1, 3, h, d)
        query_shift, _, value_shift = temporal_qkv.unbind(3)  # 3 x (B, 1, 1, h, d)
        scale = self.attention_head_dim**-0.5
        if query.device.type == "cpu":  # shift and scale in one pass; the kernels of accelerators scale at no cost
            query, scale = torch.add(scale * query_shift, query, alpha=scale), 1.0  # (B, G, N, h, d)
        else:
            query = query + query_shift  # (B, G, N, h, d)

        # DiffiT v3, Eq. 6
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (B * G, N, h, d)
        if self.processor.backend == AttentionBackendName.FLEX:
            table = self.relative_position_bias_table
            hidden_states = flex_attention_with_table(query, key, value, table, self.window, scale)
        else:
            cached = cached_while_sampling(self, "bias")
            bias = self.relative_position_bias(query.dtype) if cached is None else cached  # (1, h, N, N)
            hidden_states = self.processor(query, key, value, bias, scale)  # (B * G, N, h, d)
        hidden_states = hidden_states.unflatten(0, (batch, -1)) + value_shift  # (B, G, N, h, d)
        return self.proj(hidden_states.reshape(num_windows, num_tokens, -1))  # (B * G, N, D)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class DiffiTBlock(nn.Module):
    """DiffiT transformer block: TMSA and MLP, each after a LayerNorm. DiffiT v3, Eq. 7-8.

    Args:
        hidden_size, time_embed_dim, num_attention_heads, attention_head_dim, window: see `TimeDependentSelfAttention`.
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
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B * G, N, D) and time tokens of shape (B, T) to tokens of shape (B * G, N, D)."""
        hidden_states = hidden_states + self.dropout(self.attn(self.norm1(hidden_states), time_token))  # Eq. 7
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))  # Eq. 8


class DiffiTResBlock(nn.Module):
    """DiffiT residual block: one convolution, then a DiffiT block on windows. DiffiT v3, Eq. 9-10.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, the hidden size D.
        time_embed_dim, num_attention_heads, attention_head_dim, window, mlp_ratio, dropout: see `DiffiTBlock`.
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
        self.norm = ChannelNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.block = DiffiTBlock(
            out_channels, time_embed_dim, num_attention_heads, attention_head_dim, window, mlp_ratio, dropout
        )
        # Not in the paper: a 1x1 convolution where input and output differ in width, as in DDPM.
        same_width = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same_width else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps a feature map of shape (B, C_in, H, W) and time tokens of shape (B, T) to one of (B, C_out, H, W)."""
        residual = self.conv_shortcut(hidden_states)  # (B, C_out, H, W)
        hidden_states = self.conv(F.silu(self.norm(hidden_states)))  # (B, C_out, H, W), Eq. 9
        tokens = self.block(partition_windows(hidden_states, self.window), time_token)  # (B * G, N, D)
        return add_windows(residual, tokens, self.window)  # (B, C_out, H, W), Eq. 10


class DiffiTStage(nn.Module):
    """The DiffiT ResBlocks at one resolution.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        num_layers: number of ResBlocks.
        **block_kwargs: the arguments of `DiffiTResBlock` other than its channels.
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
                hidden_states = resblock(hidden_states, time_token)  # (B, C_out, H, W)
        return hidden_states


# ---------------------------------------------------------------------------------------------------------------------
# Code shared by the two networks


class DiffiTModelMixin(ModelMixin, ConfigMixin, AttentionMixin):
    """Labels, timesteps, initialization and saving; a network adds `class_embedding` (an embedding, or None)."""

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

    def _share_relative_positions(self) -> None:
        """Leaves one `RelativePositions` per window size. At 1,024 tokens a window, each takes 8 MB."""
        shared = {}
        for module in self.modules():
            if isinstance(module, TimeDependentSelfAttention):
                module.relative_positions = shared.setdefault(module.window, module.relative_positions)

    @contextlib.contextmanager
    @torch.no_grad()
    def cache_for_sampling(self) -> Iterator[None]:
        """Caches what all sampling steps share; the weights must not change inside the `with` block.

        The cache belongs to the current thread, so several threads may sample with one network. It holds the relative
        position bias of each attention, and the weights of all time-token projections concatenated, so that a step
        computes them as one product. Training computes one product per block: concatenating the weights at each step
        would hold them and their gradients twice, and took 2.2 (S/2), 1.4 (CIFAR-10) and 1.0 (emoji32) times as long,
        forward and backward, on two CPU cores.
        """
        attentions = [module for module in self.modules() if isinstance(module, TimeDependentSelfAttention)]
        projections = [attention.qkv_temb for attention in attentions]
        devices = {parameter.device for parameter in self.parameters()}
        cache = dict(_sampling_cache.get() or {})  # of another network, as with autoguidance
        # Uncached fallback for adapters and offloaded weights, which are materialized only when their module runs.
        if len(devices) == 1 and all(is_exactly(projection, nn.Linear) for projection in projections):
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
        """Inside `cache_for_sampling`, projects time tokens of shape (B, T) for all attentions at once."""
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
        """Validates timesteps and labels and expands them to one per image.

        Args:
            sample: images or latents, shape (B, C, H, W).
            timestep: one for all or one per image; a number, or a tensor of shape () or (1,) or (B,).
            class_labels: integers of shape (B,); None means the null class for all.

        Returns:
            Timesteps of shape (B,), and labels of shape (B,), or None for an unconditional network.

        Raises:
            ValueError: if the number of timesteps is neither 1 nor B, if labels are given to an unconditional network
                or (on a CPU) are out of range, or if they are not integers of shape (B,).
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
        # Reading labels back from an accelerator would stall it. The scripts and the pipeline check them on the host.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            if class_labels.min() < 0 or class_labels.max() > null_label:
                raise ValueError(
                    f"`class_labels` must be in [0, {null_label}] ({null_label} is the null class), "
                    f"got {class_labels.min().item()} to {class_labels.max().item()}"
                )
        return timesteps, class_labels

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """As in diffusers, but without a warning about `auto_map`, which only `AutoModel` reads."""
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
        """As in diffusers, and copies this file next to the weights so that the folder loads anywhere.

        The arguments are spelled out because pipelines inspect the signature.
        """
        target = Path(save_directory, "diffit_model.py")
        if is_main_process and target.resolve() != Path(__file__).resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, target)  # first, because `push_to_hub=True` uploads the folder while saving
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
                "or set `attention_head_dim`"
            )
        return heads
    if any(width % attention_head_dim for width in widths):
        raise ValueError(
            f"`attention_head_dim` {attention_head_dim} must divide `block_out_channels` {tuple(widths)}, "
            "or set `num_attention_heads`"
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
        raise ValueError("global attention (`window_size=None`) requires `sample_size`")
    height, width = _height_and_width(sample_size)
    multiple = 2 ** (num_stages - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"`sample_size` must be a multiple of {multiple} ({num_stages} resolutions), got {sample_size}"
        )
    return [(height // 2**i, width // 2**i) for i in range(num_stages)]


class DiffiTUNet2DModel(DiffiTModelMixin):
    """The U-shaped DiffiT for images (section 3.2 and appendices H.1, I.1), with the interface of `UNet2DModel`.

    An encoder, a bottleneck and a mirrored decoder of DiffiT ResBlocks, with convolutions between resolutions and, at
    each resolution, a skip connection from the input of the downsampler to the output of the matching upsampler. The
    timestep enters only through the time token.

    Args:
        sample_size: height and width of the images in pixels, one int if square. Pipelines read it; with
            `window_size=None` it fixes the input size.
        in_channels, out_channels: channels of the input and of the output.
        flip_sin_to_cos: put cosines before sines in the timestep embedding.
        freq_shift: frequency shift of the timestep embedding.
        time_embedding_dim: size T of the time token; None means 4 * `block_out_channels[0]`.
        block_out_channels: channels at each resolution, from full size to the bottleneck; each halves the last.
        layers_per_block: ResBlocks per resolution, one int for all or one for each. The decoder mirrors them.
        window_size: side of the attention windows, the same at every resolution; None means global attention.
        num_attention_heads: heads, one int for all resolutions or one for each. Not in the paper; None means
            channels / `attention_head_dim`, or 4 if that is None too.
        attention_head_dim: size of a head; None means channels / `num_attention_heads`. If both are given, the
            attention may be wider or narrower than the channels.
        mlp_ratio: width of the MLPs as a multiple of the channels. Not in the paper: follows ViT.
        dropout: probability in [0, 1) on the output of each attention and MLP.
        norm_num_groups: groups of the GroupNorms; divides every channel width. Not in the paper: follows DDPM.
        norm_eps: epsilon of the GroupNorms.
        skip_merge: how a skip connection joins the decoder, `"concat"` or `"add"`. Not in the paper.
        zero_init_output: initialize the output to zero. Not in the paper: follows DDPM.
        num_class_embeds: number of classes, or None for an unconditional network. One additional row, with index
            `num_class_embeds`, is the null class for classifier-free guidance.
        num_augment_labels: number A of labels that describe the augmentation of an image, or None for a network
            without them. EDM (arXiv 2206.00364, appendix F.2), which the paper follows, has nine.

    Raises:
        ValueError: if an argument is out of range or contradicts another; the message names them.
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
        if num_augment_labels is not None:  # without a bias, so that zero labels add nothing
            self.augment_embedding = nn.Linear(num_augment_labels, time_embed_dim, bias=False)

        self._build_stages(layers, heads, windows, time_embed_dim)

        # head
        self.conv_norm_out = ChannelNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1)

        self._initialize_weights()
        self._share_relative_positions()

    def _build_stages(
        self, layers: tuple[int, ...], heads: tuple[int, ...], windows: list[tuple[int, int]], time_embed_dim: int
    ) -> None:
        """Builds encoder, bottleneck and decoder; `layers`, `heads` and `windows` have one entry per resolution."""
        config, widths = self.config, self.config.block_out_channels

        def build_stage(index: int, in_width: int) -> DiffiTStage:
            width = widths[index]
            return DiffiTStage(
                in_width,
                width,
                layers[index],
                time_embed_dim=time_embed_dim,
                num_attention_heads=heads[index],
                attention_head_dim=config.attention_head_dim or width // heads[index],
                window=windows[index],
                mlp_ratio=config.mlp_ratio,
                dropout=config.dropout,
                norm_num_groups=config.norm_num_groups,
                norm_eps=config.norm_eps,
            )

        self.down_blocks = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        for i in range(len(widths) - 1):
            width, next_width = widths[i : i + 2]
            self.down_blocks.append(build_stage(i, width))
            self.downsamplers.append(nn.Conv2d(width, next_width, kernel_size=3, stride=2, padding=1))
        self.mid_block = build_stage(len(widths) - 1, widths[-1])
        self.upsamplers = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(widths) - 1)):
            width, previous_width = widths[i : i + 2]
            self.upsamplers.append(Upsampler(previous_width, width))
            self.up_blocks.append(build_stage(i, 2 * width if config.skip_merge == "concat" else width))

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
            raise ValueError(f"`mlp_ratio` {config.mlp_ratio} is too small: the MLPs would have a width of 0")
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
        """Raises a ValueError that states the required multiple unless the network can process images of H x W."""
        if self.config.window_size is None:
            expected = _height_and_width(self.config.sample_size)
            if (height, width) != expected:
                raise ValueError(
                    f"with global attention (`window_size=None`) the relative position bias fixes the size of images "
                    f"at {expected[0]} x {expected[1]}, got {height} x {width}"
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
        """Augmentation labels in the dtype of the images, shape (B, A); None for a network without them."""
        num_labels = self.config.num_augment_labels
        if num_labels is None:
            if augment_labels is not None:
                raise ValueError("`augment_labels` need a network with `num_augment_labels`, and this one has None")
            return None
        shape = (sample.shape[0], num_labels)
        if augment_labels is None:
            return sample.new_zeros(shape)  # the layer still runs: DDP requires every parameter to be used
        if augment_labels.shape != shape:
            raise ValueError(f"`augment_labels` must have the shape {shape}, got {tuple(augment_labels.shape)}")
        return augment_labels.to(sample.dtype)

    @staticmethod
    def choose_layout(feature_map: torch.Tensor) -> torch.Tensor:
        """Converts to channels last on a CPU, where it makes splitting into windows and merging them cheap.

        Not on a GPU, whose GroupNorm would undo it; and not where gradients are recorded but the feature map requires
        none, because the backward pass of GroupNorm on a CPU then crashes (torch 2.13).
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
        """Predicts the training target (noise, image or velocity) from noisy images.

        Args:
            sample: noisy images, about unit variance; shape (B, in_channels, H, W).
            timestep: in [0, number of training timesteps), integer or fractional, or ln(sigma) / 4 for an EDM model; a
                number, or a tensor of shape () or (1,) for all images, or (B,).
            class_labels: integers in [0, num_class_embeds], shape (B,); None means the last class, the null class.
            return_dict: return a `UNet2DOutput` rather than a tuple.
            augment_labels: floats that describe the augmentation, shape (B, num_augment_labels); None means zeros.

        Returns:
            `UNet2DOutput` whose `sample`, or a tuple whose first entry, has shape (B, out_channels, H, W).

        Raises:
            ValueError: if size, timesteps or labels do not suit the network; the message states what it requires.
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

        # 3. encoder and bottleneck
        skips = []
        for stage, downsampler in zip(self.down_blocks, self.downsamplers, strict=True):
            hidden_states = stage(hidden_states, time_token)  # (B, C, H, W)
            skips.append(hidden_states)
            hidden_states = downsampler(hidden_states)  # (B, C', H/2, W/2)
        hidden_states = self.mid_block(hidden_states, time_token)  # (B, C, H, W)

        # 4. decoder
        for upsampler, stage in zip(self.upsamplers, self.up_blocks, strict=True):
            hidden_states = upsampler(hidden_states)  # (B, C', 2H, 2W)
            skip = skips.pop().to(hidden_states.device)  # a `device_map` may put it on another device
            if self.config.skip_merge == "concat":
                hidden_states = torch.cat([hidden_states, skip], dim=1)  # (B, 2C, H, W)
            else:
                hidden_states = hidden_states + skip  # (B, C, H, W)
            hidden_states = stage(hidden_states, time_token)  # (B, C, H, W)

        # 5. head: GroupNorm and convolution, without an activation, as in the paper
        output = self.conv_out(self.conv_norm_out(hidden_states)).contiguous()  # (B, out_channels, H, W)
        return UNet2DOutput(sample=output) if return_dict else (output,)


DiffiTUNet2DModel.register_for_auto_class("AutoModel")


# ---------------------------------------------------------------------------------------------------------------------
# Latent network


class DiffiTTransformer2DModel(DiffiTModelMixin):
    """The isotropic DiffiT for latents (section 3.3), with the interface of `DiTTransformer2DModel`.

    Patchify, DiffiT blocks with global attention, unpatchify. Timestep and class enter only through the time token.
    The defaults are the paper's network for ImageNet at 256 x 256 pixels, except for its `out_channels` of 8.

    Args:
        num_attention_heads: heads h.
        attention_head_dim: size d of a head; tokens and the time token have the size D = h * d, a multiple of 4.
        in_channels: channels of the latents.
        out_channels: channels of the output; None means `in_channels`. Twice `in_channels` for a learned variance.
        num_layers: DiffiT blocks. The paper says 30, but 28 matches its parameter count.
        dropout: probability in [0, 1) on the output of each attention and MLP.
        sample_size: height and width of the latents, one int if square; multiples of `patch_size`. The relative
            position bias of global attention fixes it.
        patch_size: height and width of a patch.
        mlp_ratio: width of the MLPs as a multiple of D.
        num_embeds_ada_norm: number of classes, or None for an unconditional network; diffusers' name for it. One
            additional row, with index `num_embeds_ada_norm`, is the null class for classifier-free guidance.

    Raises:
        ValueError: if an argument is out of range or contradicts another; the message names them.
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
            self.register_to_config(out_channels=out_channels)  # `DiTPipeline` needs a number
        self._check_config()
        hidden_size = num_attention_heads * attention_head_dim
        height, width = _height_and_width(sample_size)
        self.token_grid = (height // patch_size, width // patch_size)
        self.gradient_checkpointing = False

        # tokenizer
        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        # Not trained, but in the state dict, because the positions of a checkpoint may differ in the last bit.
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
        self._share_relative_positions()

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
                f"{config.attention_head_dim} must be a multiple of 4 for the sine-cosine position embedding"
            )
        if config.sample_size is None or any(
            side < 1 or side % config.patch_size for side in _height_and_width(config.sample_size)
        ):
            raise ValueError(
                f"`sample_size` must be positive multiples of `patch_size` {config.patch_size}, "
                f"got {config.sample_size}"
            )
        if hidden_size * config.mlp_ratio < 1:
            raise ValueError(f"`mlp_ratio` {config.mlp_ratio} is too small: the MLPs would have a width of 0")
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
        nn.init.zeros_(self.proj_out.weight)  # the only weight that starts at zero, as in NVIDIA's model

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError unless H x W is the `sample_size` of the network."""
        expected = _height_and_width(self.config.sample_size)
        if (height, width) != expected:
            raise ValueError(
                f"the relative position bias of global attention fixes the size of latents at {expected[0]} x "
                f"{expected[1]} (`sample_size`), got {height} x {width}"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the training target (noise, and the variance if learned) from noisy latents.

        Args:
            hidden_states: noisy latents, about unit variance; shape (B, in_channels, H, W).
            timestep: in [0, number of training timesteps), integer or fractional; a number, or a tensor of shape () or
                (1,) for all images, or (B,).
            class_labels: integers in [0, num_embeds_ada_norm], shape (B,); None means the last class, the null class.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            `Transformer2DModelOutput` whose `sample`, or a tuple whose first entry, has shape (B, out_channels, H, W).

        Raises:
            ValueError: if size, timesteps or labels do not suit the network; the message states what it requires.
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
        # In the dtype of the input, so that under autocast the residual stream stays in float32.
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
