"""The plain networks that the speed benchmark compares with: literal implementations of the paper's equations.

`by_the_letter` turns a network of `diffit_model.py` in place into one that computes Eq. 3-6 as printed: it adds all
three temporal terms, scales the scores, and gathers the bias from its table by indexing; each operation is PyTorch's
own, in its default memory layout. For the latent network this is NVIDIA's released model, operation by operation.
Parameters keep their names.
"""

import contextlib

import torch
from torch import nn

from diffit_model import DiffiTTransformer2DModel, DiffiTUNet2DModel, TimeDependentSelfAttention


class PlainAttention(TimeDependentSelfAttention):
    """TMSA, Eq. 3-6; the bias is gathered once for the batch and broadcast."""

    def plain_bias(self, num_windows: int) -> torch.Tensor:
        """The bias, shape (1, h, N, N)."""
        num_tokens = len(self.relative_positions.index)
        bias = self.relative_position_bias_table[self.relative_positions.index.flatten()]  # (N * N, h)
        return bias.view(num_tokens, num_tokens, -1).permute(2, 0, 1).contiguous()[None]

    def forward(self, spatial_tokens: torch.Tensor, time_token: torch.Tensor) -> torch.Tensor:
        """Maps tokens of shape (B * G, N, D) and time tokens of shape (B, T) to tokens of shape (B * G, N, D)."""
        num_windows, num_tokens, _ = spatial_tokens.shape
        temporal = self.qkv_temb(time_token)  # (B, 3 * h * d)
        temporal = temporal.repeat_interleave(num_windows // len(time_token), dim=0)[:, None]  # (B * G, 1, 3 * h * d)
        qkv = self.qkv(spatial_tokens) + temporal  # (B * G, N, 3 * h * d)
        qkv = qkv.reshape(num_windows, num_tokens, 3, self.num_attention_heads, self.attention_head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B * G, h, N, d)
        scores = (query * self.attention_head_dim**-0.5) @ key.transpose(-2, -1)  # (B * G, h, N, N)
        attended = (scores + self.plain_bias(num_windows)).softmax(dim=-1) @ value  # (B * G, h, N, d)
        return self.proj(attended.transpose(1, 2).reshape(num_windows, num_tokens, -1))  # (B * G, N, D)


class PlainWindowAttention(PlainAttention):
    """Like `PlainAttention`, but the bias is gathered for each window."""

    def plain_bias(self, num_windows: int) -> torch.Tensor:
        """The biases, shape (B * G, h, N, N)."""
        index = self.relative_positions.index.expand(num_windows, -1, -1)  # (B * G, N, N)
        return self.relative_position_bias_table[index].permute(0, 3, 1, 2)


class PlainUNet(DiffiTUNet2DModel):
    """Without channels last and without caches."""

    choose_layout = staticmethod(lambda feature_map: feature_map)
    cache_for_sampling = contextlib.nullcontext


class PlainTransformer(DiffiTTransformer2DModel):
    """Without caches."""

    cache_for_sampling = contextlib.nullcontext


def by_the_letter(model: nn.Module, bias_per_window: bool = False) -> nn.Module:
    """Turns a network into its plain counterpart, in place, and returns it.

    Args:
        model: a network of `diffit_model.py`, without CPU kernels.
        bias_per_window: gather the bias for each window rather than once for the batch.
    """
    plain = {
        TimeDependentSelfAttention: PlainWindowAttention if bias_per_window else PlainAttention,
        DiffiTUNet2DModel: PlainUNet,
        DiffiTTransformer2DModel: PlainTransformer,
    }
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    return model
