# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The image-space network: attention against the equations, backends, integration with diffusers, and errors."""

import copy
import functools
import inspect
import logging
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffit_model
from diffit.networks import model_class, why_not_xformers
from diffit_model import (
    DiffiTBlock,
    DiffiTMLP,
    DiffiTResBlock,
    DiffiTStage,
    DiffiTUNet2DModel,
    TimeDependentSelfAttention,
    Upsampler,
    add_windows,
    align_bias_for_xformers,
    flex_attention_with_table,
    merge_windows,
    partition_windows,
    plain_attention,
    relative_position_index,
    xformers_unsupported_reasons,
)
from diffit_pipeline import SCHEDULERS

EXACT = {"rtol": 0, "atol": 0}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}

TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "window_size": 2,
    "num_attention_heads": 2,
    "norm_num_groups": 8,
    "zero_init_output": False,
}
NINE_TOKENS = {"window_size": 3, "sample_size": 6}  # 9 is not a multiple of 8, which kernels require or prefer


def build_unet(**overrides) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    return DiffiTUNet2DModel(**{**TINY, **overrides}).eval()


def noise_like_input(unet: nn.Module, batch: int = 2) -> torch.Tensor:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, unet.config.in_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(unet: nn.Module, timestep=10, **kwargs) -> torch.Tensor:
    return unet(noise_like_input(unet), timestep, **kwargs).sample


def output_and_gradients(unet: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    unet.zero_grad()
    output = unet(noise_like_input(unet), torch.tensor([3, 700])).sample
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def attentions(unet: nn.Module) -> list[TimeDependentSelfAttention]:
    return [module for module in unet.modules() if isinstance(module, TimeDependentSelfAttention)]


@pytest.fixture
def contract():
    pytest.importorskip("xformers.ops")
    import xformers_contract

    return xformers_contract


# ---------------------------------------------------------------------------------------------------------------------
# TMSA against Eq. 3-6 as they are printed


def reference_bias(attention: TimeDependentSelfAttention) -> torch.Tensor:
    """Bias (h, N, N): entry (i, j) is the table's row for the offset between tokens i and j, as in Swin."""
    height, width = attention.window
    tokens = [(row, column) for row in range(height) for column in range(width)]
    index = [
        [(row - r + height - 1) * (2 * width - 1) + (column - c + width - 1) for r, c in tokens]
        for row, column in tokens
    ]
    return attention.relative_position_bias_table[torch.tensor(index)].permute(2, 0, 1)


def reference_tmsa(attention: TimeDependentSelfAttention, x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Eq. 3-6 written out; x_s (B * G, N, D), x_t (B, T), in the paper's letters."""
    x_t = x_t.repeat_interleave(len(x_s) // len(x_t), dim=0)[:, None]  # (B * G, 1, T)
    projections = zip(
        attention.qkv.weight.chunk(3),
        attention.qkv.bias.chunk(3),
        attention.qkv_temb.weight.chunk(3),
        attention.qkv_temb.bias.chunk(3),
        strict=True,
    )
    heads = (attention.num_attention_heads, attention.attention_head_dim)
    q, k, v = (
        (x_s @ w_s.T + b_s + x_t @ w_t.T + b_t).unflatten(-1, heads)  # (B * G, N, h, d)
        for w_s, b_s, w_t, b_t in projections
    )
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(heads[1]) + reference_bias(attention)
    attended = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v).flatten(2)  # (B * G, N, h * d)
    return attended @ attention.proj.weight.T + attention.proj.bias


def build_attention(hidden_size=8, heads=2, head_dim=4, window=(3, 3)) -> TimeDependentSelfAttention:
    torch.manual_seed(0)
    attention = TimeDependentSelfAttention(hidden_size, 6, heads, head_dim, window).double()
    nn.init.normal_(attention.relative_position_bias_table)
    return attention


def attention_inputs(hidden_size=8, window=(3, 3), batch=2, windows=2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch * windows, math.prod(window), hidden_size, generator=generator, dtype=torch.float64)
    return tokens.requires_grad_(), torch.randn(batch, 6, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize(
    "window, windows, hidden_size, heads, head_dim",
    [
        pytest.param((4, 4), 4, 8, 2, 4, id="local"),
        pytest.param((8, 8), 1, 8, 2, 4, id="global"),
        pytest.param((3, 3), 2, 8, 2, 4, id="9_tokens"),
        pytest.param((5, 3), 3, 8, 4, 2, id="15_tokens_tall"),
        pytest.param((2, 4), 2, 8, 1, 8, id="wide_window_one_head"),
        pytest.param((3, 3), 2, 8, 3, 5, id="attention_wider_than_tokens"),
        pytest.param((2, 2), 2, 12, 2, 3, id="attention_narrower_than_tokens"),
        pytest.param((1, 1), 3, 8, 2, 4, id="one_token"),
    ],
)
def test_tmsa_fast_path_equals_the_equations(window, windows, hidden_size, heads, head_dim, backend):
    attention = build_attention(hidden_size, heads, head_dim, window)
    attention.set_attention_backend(backend)
    inputs = attention_inputs(hidden_size, window, windows=windows)
    output, expected = attention(*inputs), reference_tmsa(attention, *inputs)
    torch.testing.assert_close(output, expected, **FLOAT64)

    leaves = dict(attention.named_parameters()) | {"spatial_tokens": inputs[0], "time_token": inputs[1]}
    loss_weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((output * loss_weights).sum(), list(leaves.values()))
    expected_gradients = torch.autograd.grad((expected * loss_weights).sum(), list(leaves.values()))
    torch.testing.assert_close(
        dict(zip(leaves, gradients, strict=True)), dict(zip(leaves, expected_gradients, strict=True)), **FLOAT64
    )


def test_temporal_key_leaves_the_equations_unchanged():
    attention, inputs = build_attention(), attention_inputs()
    expected = reference_tmsa(attention, *inputs)
    with torch.no_grad():
        attention.qkv_temb.weight.chunk(3)[1].normal_(std=3)
        attention.qkv_temb.bias.chunk(3)[1].normal_(std=3)
    torch.testing.assert_close(reference_tmsa(attention, *inputs), expected, **FLOAT64)


def test_temporal_value_passes_through_the_equations_unchanged():
    attention, inputs = build_attention(), attention_inputs()
    with_value = reference_tmsa(attention, *inputs)
    temporal_value = attention.qkv_temb(inputs[1]).chunk(3, dim=-1)[2] @ attention.proj.weight.T  # (B, D)
    with torch.no_grad():
        attention.qkv_temb.weight.chunk(3)[2].zero_()
        attention.qkv_temb.bias.chunk(3)[2].zero_()
    without_value = reference_tmsa(attention, *inputs).unflatten(0, (2, -1))  # (B, G, N, D)
    expected = (without_value + temporal_value[:, None, None]).flatten(0, 1)
    torch.testing.assert_close(with_value, expected, **FLOAT64)


@pytest.mark.parametrize(
    "num_windows, num_tokens, message", [(2, 8, "3 x 3 .* 8 tokens"), (3, 9, r"windows \(3\) .* images \(2\)")]
)
def test_tmsa_with_misfitting_tokens_raises(num_windows, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        build_attention()(torch.zeros(num_windows, num_tokens, 8).double(), torch.zeros(2, 6).double())


# ---------------------------------------------------------------------------------------------------------------------
# Memory layout, and the cache for sampling


def test_frozen_tokenizer_trains_the_rest():
    # The backward pass of torch 2.13's GroupNorm crashes on channels-last input that requires no gradient.
    unet = build_unet()
    _, expected = output_and_gradients(unet)
    unet.conv_in.requires_grad_(False)
    _, gradients = output_and_gradients(unet)
    expected = {name: value for name, value in expected.items() if not name.startswith("conv_in")}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-4)


def test_cache_for_sampling_changes_no_prediction_and_leaves_nothing():
    unet = build_unet(num_class_embeds=3)
    labels = torch.tensor([0, 3])
    expected = [predict(unet, timestep, class_labels=labels) for timestep in (10, 900)]
    with unet.cache_for_sampling():
        with mock.patch.object(TimeDependentSelfAttention, "relative_position_bias", side_effect=AssertionError):
            cached = [predict(unet, timestep, class_labels=labels) for timestep in (10, 900)]
    torch.testing.assert_close(cached, expected, **FLOAT32)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    fresh = build_unet(num_class_embeds=3)
    fresh.load_state_dict(unet.state_dict())
    torch.testing.assert_close(predict(unet, class_labels=labels), predict(fresh, class_labels=labels), **EXACT)


def test_cache_for_sampling_is_left_after_an_error():
    unet = build_unet()
    with pytest.raises(RuntimeError), unet.cache_for_sampling():
        raise RuntimeError
    assert diffit_model._sampling_cache.get() is None


def test_threads_that_share_a_network_get_their_own_predictions():
    """Each thread waits before its first attention until the other has projected its own time tokens."""
    unet = build_unet()
    timesteps = (10, 900)
    expected = [predict(unet, timestep) for timestep in timesteps]
    together = threading.Barrier(2)

    def wait(*_) -> None:
        together.wait(30)

    attentions(unet)[0].register_forward_pre_hook(wait)

    def draw(timestep: int) -> torch.Tensor:
        with unet.cache_for_sampling():
            return predict(unet, timestep)

    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(draw, timesteps))
    torch.testing.assert_close(drawn, expected, **FLOAT32)


def test_cache_for_sampling_works_with_compiled_blocks():
    unet = build_unet()
    expected = [predict(unet, timestep) for timestep in (10, 900)]
    unet.compile_repeated_blocks(backend="eager")
    before = predict(unet, 10)
    with unet.cache_for_sampling():
        cached = [predict(unet, timestep) for timestep in (10, 900)]
    torch.testing.assert_close([before, *cached, predict(unet, 900)], [expected[0], *expected, expected[1]], **FLOAT32)


def test_cache_for_sampling_keeps_adapters_of_the_time_projection():
    unet = build_unet()
    calls = []
    attentions(unet)[0].qkv_temb.register_forward_hook(lambda *_: calls.append(1))
    with unet.cache_for_sampling():
        predict(unet)
    assert calls == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Attention backends


@pytest.mark.parametrize("config", [{}, NINE_TOKENS, {"window_size": None}], ids=["4_tokens", "9_tokens", "global"])
@pytest.mark.parametrize("backend", ["native", "flex"])
def test_backend_equals_plain_attention(backend, config):
    unet = build_unet(**config)
    unet.set_attention_backend("_native_math")
    expected = predict(unet)
    unet.set_attention_backend(backend)
    torch.testing.assert_close(predict(unet), expected, **FLOAT32)


@pytest.mark.parametrize("config", [{}, NINE_TOKENS], ids=["4_tokens", "9_tokens"])
def test_native_backend_gradients_equal_plain_attention(config):
    unet = build_unet(**config)
    unet.set_attention_backend("_native_math")
    _, expected = output_and_gradients(unet)
    unet.set_attention_backend("native")
    _, gradients = output_and_gradients(unet)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-4)  # gradients are as large as 100


def flex_inputs(window, head_dim, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Query, key and value in one tensor of shape (B, N, 3, h, d), and a table of float32."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, math.prod(window), 3, 2, head_dim, generator=generator).to(dtype)
    return qkv, torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 2, generator=generator)


def flex_and_plain(qkv, table, window, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    bias = table[relative_position_index(window)].permute(2, 0, 1)[None]
    query, key, value = qkv.unbind(2)
    expected = plain_attention(query if scale is None else query * scale * query.shape[-1] ** 0.5, key, value, bias)
    return flex_attention_with_table(query, key, value, table, window, scale), expected


@pytest.mark.parametrize("head_dim", [6, 24, 72])
@pytest.mark.parametrize("window", [(4, 4), (3, 3), (5, 3), (2, 4), (1, 1)], ids=str)
def test_flex_attention_with_table_equals_plain_attention(window, head_dim):
    torch.testing.assert_close(*flex_and_plain(*flex_inputs(window, head_dim), window), **FLOAT32)


def test_flex_attention_with_table_takes_a_scale():
    torch.testing.assert_close(*flex_and_plain(*flex_inputs((3, 3), 8), (3, 3), scale=1.5), **FLOAT32)


def test_flex_attention_with_table_takes_windows_in_parts():
    qkv, table = flex_inputs((3, 3), 8)
    with mock.patch.object(diffit_model, "MAX_WINDOWS", 2):
        torch.testing.assert_close(*flex_and_plain(qkv, table, (3, 3)), **FLOAT32)


@pytest.mark.parametrize("head_dim", [6, 24])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_flex_attention_with_table_gradients_equal_plain_attention(dtype, tolerance, head_dim):
    qkv, table = flex_inputs((3, 4), head_dim, dtype)
    leaves = [qkv.requires_grad_(), table.requires_grad_()]
    # torch refuses to train with flex on a CPU, although its eager implementation can.
    with mock.patch("torch.nn.attention.flex_attention._validate_device"):
        output, expected = flex_and_plain(*leaves, (3, 4))
        gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert output.dtype == dtype and gradients[1].dtype == torch.float32
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for actual, wanted in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # it rejects meta tensors
def test_compiled_flex_serves_any_number_of_windows():
    counter = CompileCounterWithBackend("aot_eager")
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=counter)):
        compiled = diffit_model.compiled_flex_attention.__wrapped__()
    with mock.patch.object(diffit_model, "compiled_flex_attention", lambda: compiled):
        for num_windows in (5, 3, 4):
            qkv, table = (x.to("meta").requires_grad_() for x in flex_inputs((3, 3), 16))
            output = flex_attention_with_table(*qkv[:num_windows].unbind(2), table, (3, 3))
            assert output.shape == (num_windows, 9, 2, 16)
            gradients = torch.autograd.grad(output.sum(), (qkv, table))
            assert [x.shape for x in gradients] == [qkv.shape, table.shape]
    assert counter.frame_count == 1


def test_compiled_flex_trains_under_gradient_checkpointing():
    """torch's eager implementation gives wrong gradients there, so the compiled kernel must never fall back to it."""
    unet = build_unet(**NINE_TOKENS)
    unet.set_attention_backend("_native_math")
    expected = output_and_gradients(unet)
    unet.set_attention_backend("flex")
    unet.enable_gradient_checkpointing()
    compiled = torch.compile(diffit_model.flex_attention, dynamic=False, fullgraph=True, backend="aot_eager")
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None),
        mock.patch.object(diffit_model, "flex_attention", compiled),
    ):
        actual = output_and_gradients(unet)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_flex_never_makes_a_bias_of_all_pairs():
    unet = build_unet()
    unet.set_attention_backend("flex")
    with mock.patch.object(TimeDependentSelfAttention, "relative_position_bias", side_effect=AssertionError):
        predict(unet)


def test_plain_attention_without_bias_equals_sdpa():
    query, key, value = torch.randn(3, 2, 9, 2, 4).unbind()
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    torch.testing.assert_close(plain_attention(query, key, value), expected.transpose(1, 2), **FLOAT32)


def test_process_wide_default_backend_is_followed():
    unet = build_unet()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)
    with mock.patch.object(diffit_model, "plain_attention", wraps=plain_attention) as plain:
        predict(unet)
    assert plain.call_count == len(attentions(unet))


def kernel_inputs(num_tokens: int, dtype: torch.dtype, head_dim: int = 8) -> list[torch.Tensor]:
    """Query, key, value as TMSA cuts them out of one tensor, and a bias of fp32 cast as the processor does."""
    qkv = torch.randn(4, num_tokens, 3, 2, head_dim, dtype=dtype, requires_grad=torch.is_grad_enabled())
    bias = torch.randn(1, 2, num_tokens, num_tokens, requires_grad=torch.is_grad_enabled())
    return [*qkv.unbind(2), bias.to(dtype)]


@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("num_tokens", [9, 16, 49, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_aligned_bias_is_taken_by_xformers(contract, dtype, num_tokens, requires_grad):
    with torch.set_grad_enabled(requires_grad), contract.spoofed_cuda():
        *qkv, bias = kernel_inputs(num_tokens, dtype)
        aligned = align_bias_for_xformers(bias, batch_size=4)
        torch.testing.assert_close(aligned, bias.expand(4, -1, -1, -1), **EXACT)
        assert xformers_unsupported_reasons(*qkv, aligned) == []
        operators = contract.chosen_operators(*qkv, aligned)
    assert operators == ("cutlassF-pt", "cutlassB-pt" if requires_grad else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_bias_is_refused_by_xformers(contract, dtype):
    *qkv, bias = kernel_inputs(9, dtype)
    with contract.spoofed_cuda(), pytest.raises(NotImplementedError, match=r"attn_bias\.stride\(-2\)"):
        contract.chosen_operators(*qkv, bias.expand(4, -1, -1, -1))


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 6), (torch.bfloat16, 4), (torch.float16, 12)])
def test_misfitting_head_dim_is_a_reason_against_xformers(contract, dtype, head_dim):
    *qkv, bias = kernel_inputs(16, dtype, head_dim)
    with contract.spoofed_cuda():
        reasons = xformers_unsupported_reasons(*qkv, align_bias_for_xformers(bias, 4))
    assert any(re.match(r"query\.shape\[-1\] % \d != 0", reason) for reason in reasons)


@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
def test_backward_operator_is_asked_in_training_only(contract, requires_grad):
    with contract.spoofed_cuda(), torch.set_grad_enabled(requires_grad):
        *qkv, bias = kernel_inputs(16, torch.float32)
        with mock.patch("xformers.ops.fmha.cutlass.BwOp.SUPPORTED_DTYPES", set()):
            reasons = xformers_unsupported_reasons(*qkv, align_bias_for_xformers(bias, 4))
    assert len(reasons) == requires_grad


def test_bias_alone_requiring_grad_is_a_reason_against_xformers(contract):
    *qkv, bias = kernel_inputs(16, torch.float32)
    with contract.spoofed_cuda():
        reasons = xformers_unsupported_reasons(*(x.detach() for x in qkv), align_bias_for_xformers(bias, 4))
    assert reasons == ["only the bias requires grad"]


def test_newer_gpu_is_a_reason_against_xformers(contract):
    *qkv, bias = kernel_inputs(16, torch.float32)
    with contract.spoofed_cuda(capability=(10, 0)):
        reasons = xformers_unsupported_reasons(*qkv, align_bias_for_xformers(bias, 4))
    assert reasons and all("too new" in reason for reason in reasons)


def test_too_many_windows_are_a_reason_against_xformers(contract):
    *qkv, bias = kernel_inputs(16, torch.float32)
    with contract.spoofed_cuda(), mock.patch.object(diffit_model, "MAX_WINDOWS", 3):
        (reason,) = xformers_unsupported_reasons(*qkv, align_bias_for_xformers(bias, 4))
    assert re.search("4 windows .* 3", reason)


def test_missing_xformers_is_a_reason_against_xformers():
    *qkv, bias = kernel_inputs(16, torch.float32)
    with mock.patch.dict("sys.modules", {"xformers.ops.fmha": None}):
        (reason,) = xformers_unsupported_reasons(*qkv, align_bias_for_xformers(bias, 4))
    assert reason.startswith("xformers cannot be imported")


@pytest.mark.parametrize(
    "config", [{}, NINE_TOKENS, {"window_size": None}, {"attention_head_dim": 12}], ids=lambda config: str(config)
)
def test_xformers_equals_native_in_value_and_gradient(contract, config):
    unet = build_unet(**config)
    expected, expected_gradients = output_and_gradients(unet)
    unet.set_attention_backend("xformers")
    with contract.spoofed_cuda() as kernel:
        output, gradients = output_and_gradients(unet)
    assert kernel.call_count == len(attentions(unet))
    torch.testing.assert_close(output, expected, **FLOAT32)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-4)  # gradients are as large as 100
    assert gradients["mid_block.resblocks.0.block.attn.relative_position_bias_table"].abs().max() > 1e-4


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16_weights", "bf16_autocast"])
def test_xformers_takes_the_network_in_bf16(contract, autocast):
    unet = build_unet(**NINE_TOKENS) if autocast else build_unet(**NINE_TOKENS).bfloat16()
    unet.set_attention_backend("xformers")
    sample = noise_like_input(unet).to(unet.dtype)
    with contract.spoofed_cuda() as kernel, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unet(sample, 10).sample.float().sum().backward()
    assert {call.args[0].dtype for call in kernel.call_args_list} == {torch.bfloat16}
    assert kernel.call_count == len(attentions(unet))


def test_xformers_trains_bias_tables_alone(contract):
    # The first attention's query, key and value need no gradient then, and xformers would drop that of the bias.
    unet = build_unet()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.endswith("relative_position_bias_table"))
    _, expected = output_and_gradients(unet)
    unet.set_attention_backend("xformers")
    with contract.spoofed_cuda() as kernel:
        _, gradients = output_and_gradients(unet)
    assert kernel.call_count == len(attentions(unet)) - 1
    torch.testing.assert_close(gradients, expected, **FLOAT32)


def test_xformers_on_a_newer_gpu_falls_back_to_native_and_warns_once(contract, caplog):
    unet = build_unet()
    expected = predict(unet)
    unet.set_attention_backend("xformers")
    with contract.spoofed_cuda(capability=(10, 0)) as kernel, caplog.at_level(logging.WARNING):
        outputs = [predict(unet) for _ in range(2)]
    assert kernel.call_count == 0
    torch.testing.assert_close(outputs, [expected, expected], **EXACT)
    assert len([record for record in caplog.records if "too new" in record.message]) == 1


def test_xformers_is_asked_once_about_each_attention_and_batch_size(contract):
    unet = build_unet()
    unet.set_attention_backend("xformers")
    asked = mock.patch.object(diffit_model, "xformers_unsupported_reasons", wraps=xformers_unsupported_reasons)
    with contract.spoofed_cuda() as kernel, asked as ask:
        for batch_sizes, expected in (((2, 2, 2), 1), ((3, 2), 2)):
            for batch_size in batch_sizes:
                with torch.no_grad():
                    unet(torch.zeros(batch_size, 3, 16, 16), 10)
            assert ask.call_count == expected * len(attentions(unet))
        assert kernel.call_count == 5 * len(attentions(unet))
        predict(unet)  # with gradients, which is another question
        assert ask.call_count > 2 * len(attentions(unet))


def test_xformers_on_cpu_falls_back_to_native(contract):
    unet = build_unet()
    expected = predict(unet)
    unet.set_attention_backend("xformers")
    torch.testing.assert_close(predict(unet), expected, **EXACT)


def test_xformers_fallback_works_without_transformers(contract, monkeypatch):
    monkeypatch.delattr(logging.Logger, "warning_once", raising=False)  # transformers adds it to the standard library
    unet = build_unet()
    unet.set_attention_backend("xformers")
    assert predict(unet).isfinite().all()


def test_enable_xformers_without_cuda_raises(contract):
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        with pytest.raises(ValueError, match="needs a CUDA device"):
            build_unet().enable_xformers_memory_efficient_attention()


def test_enable_xformers_sets_every_attention(contract):
    from xformers.ops import MemoryEfficientAttentionCutlassOp

    unet = build_unet()
    with mock.patch.object(torch.cuda, "is_available", return_value=True), contract.spoofed_cuda() as kernel:
        unet.enable_xformers_memory_efficient_attention(attention_op=MemoryEfficientAttentionCutlassOp)
        predict(unet)
    chosen = [call.kwargs["op"] for call in kernel.call_args_list]
    assert chosen == [MemoryEfficientAttentionCutlassOp] * len(attentions(unet))


def test_xformers_operator_without_bias_falls_back_to_native(contract):
    """Flash kernels, the example in diffusers' own documentation, take no tensor bias."""
    from xformers.ops import MemoryEfficientAttentionFlashAttentionOp

    unet = build_unet()
    expected = predict(unet)
    with mock.patch.object(torch.cuda, "is_available", return_value=True), contract.spoofed_cuda() as kernel:
        unet.enable_xformers_memory_efficient_attention(attention_op=MemoryEfficientAttentionFlashAttentionOp)
        torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-6)
    assert kernel.call_count == 0


def test_disable_xformers_sets_native_against_the_process_wide_default(contract):
    unet = build_unet()
    unet.set_attention_backend("xformers")
    unet.disable_xformers_memory_efficient_attention()
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.XFORMERS
    with contract.spoofed_cuda() as kernel:
        predict(unet)
    assert kernel.call_count == 0


def test_why_not_xformers_names_the_device():
    assert "cpu" in why_not_xformers(build_unet(), torch.device("cpu"), torch.float32)


def test_why_not_xformers_without_diffit_attention():
    assert "no DiffiT attention" in why_not_xformers(nn.Linear(1, 1), torch.device("cuda"), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Integration with diffusers


@pytest.mark.parametrize(
    "save_kwargs, load_kwargs",
    [({}, {}), ({"max_shard_size": "60KB"}, {}), ({"variant": "fp16"}, {"variant": "fp16"})],
    ids=["plain", "sharded", "variant"],
)
def test_saved_and_loaded_network_gives_the_same_output(tmp_path, save_kwargs, load_kwargs):
    unet = build_unet(num_class_embeds=3, layers_per_block=(1, 2), window_size=None, sample_size=(8, 4))
    unet.save_pretrained(tmp_path, **save_kwargs)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == ("max_shard_size" in save_kwargs)
    assert all(("fp16" in file.name) == ("variant" in save_kwargs) for file in files)
    loaded = DiffiTUNet2DModel.from_pretrained(tmp_path, **load_kwargs)
    torch.testing.assert_close(predict(loaded), predict(unet), **EXACT)


def test_load_in_bfloat16_gives_bfloat16_weights(tmp_path):
    build_unet().save_pretrained(tmp_path)
    loaded = DiffiTUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(noise_like_input(loaded).bfloat16(), 10).sample.dtype == torch.bfloat16


def test_saved_folder_holds_this_file_and_no_pickle(tmp_path):
    build_unet().save_pretrained(tmp_path)
    assert (tmp_path / "diffit_model.py").read_bytes() == Path(diffit_model.__file__).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "diffit_model.py",
        "diffusion_pytorch_model.safetensors",
    }


def test_upload_while_saving_holds_this_file(tmp_path):
    hub, uploaded = "diffusers.models.modeling_utils", []
    with (
        mock.patch(f"{hub}.create_repo"),
        mock.patch(f"{hub}.load_or_create_model_card"),
        mock.patch(f"{hub}.populate_model_card"),
        mock.patch.object(DiffiTUNet2DModel, "_upload_folder", lambda *_, **__: uploaded.extend(os.listdir(tmp_path))),
    ):
        build_unet().save_pretrained(str(tmp_path), push_to_hub=True, repo_id="user/model")
    assert "config.json" in uploaded
    assert "diffit_model.py" in uploaded


def test_resaving_a_loaded_network_gives_the_same_files(tmp_path):
    build_unet().save_pretrained(tmp_path / "first")
    DiffiTUNet2DModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("diffusion_pytorch_model.safetensors", "diffit_model.py"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_deepcopy_shares_neither_weights_nor_backend():
    unet = build_unet()
    clone, expected = copy.deepcopy(unet), predict(unet)
    torch.testing.assert_close(predict(clone), expected, **EXACT)
    attentions(clone)[0].set_attention_backend("flex")
    nn.init.zeros_(clone.conv_out.weight)
    assert attentions(unet)[0].processor._attention_backend is None
    torch.testing.assert_close(predict(unet), expected, **EXACT)


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    unet = build_unet(dropout=0.3, layers_per_block=2).train()
    calls = []
    unet.mid_block.resblocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected, expected_gradients = output_and_gradients(unet)
    assert len(calls) == 1

    unet.enable_gradient_checkpointing()
    torch.manual_seed(0)
    output, gradients = output_and_gradients(unet)
    assert len(calls) == 3  # forward, and again in backward
    torch.testing.assert_close((output, gradients), (expected, expected_gradients), **EXACT)


def test_compiled_blocks_give_the_same_output():
    unet = build_unet(block_out_channels=(16,), num_attention_heads=2, layers_per_block=2)
    expected = predict(unet)
    compiler = CompileCounterWithBackend("aot_eager")
    unet.compile_repeated_blocks(backend=compiler, fullgraph=True)
    torch.testing.assert_close(predict(unet), expected, **FLOAT32)
    assert compiler.frame_count >= 1


def test_blocks_offloaded_to_disk_give_the_same_output(tmp_path):
    unet = build_unet()
    unet.save_pretrained(tmp_path / "model")
    device_map = {name: "disk" if "block" in name else "cpu" for name, _ in unet.named_children()}
    loaded = DiffiTUNet2DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in loaded.mid_block.parameters()} == {"meta"}
    torch.testing.assert_close(predict(loaded), predict(unet), **EXACT)


def test_automatic_device_map_splits_no_block(tmp_path):
    unet = build_unet(layers_per_block=3)
    unet.save_pretrained(tmp_path / "model")
    loaded = DiffiTUNet2DModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "300KB"}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in loaded.hf_device_map if re.search(r"resblocks\.\d+\.", name)]
    torch.testing.assert_close(predict(loaded), predict(unet), **EXACT)


def test_layerwise_casting_of_rounded_weights_changes_nothing():
    unet = build_unet(num_class_embeds=3).bfloat16().float()
    expected = predict(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.mid_block.resblocks[0].block.attn.qkv.weight.dtype == torch.bfloat16
    precise = (unet.conv_in, unet.time_embedding.linear_1, unet.class_embedding, unet.conv_norm_out)
    assert {module.weight.dtype for module in precise} == {torch.float32}
    torch.testing.assert_close(predict(unet), expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Used in place of UNet2DModel


def test_timestep_forms_agree():
    unet = build_unet()
    expected = predict(unet, 10)
    for timestep in (10.0, torch.tensor(10), torch.tensor([10]), torch.tensor([10, 10]), torch.tensor([10.0, 10.0])):
        torch.testing.assert_close(predict(unet, timestep), expected, **EXACT)


def test_timesteps_are_each_images_own():
    unet = build_unet()
    expected = torch.stack([predict(unet, 10)[0], predict(unet, 700)[1]])
    torch.testing.assert_close(predict(unet, torch.tensor([10, 700])), expected, **FLOAT32)


def test_fractional_timesteps_are_not_truncated():
    unet = build_unet()
    outputs = [predict(unet, timestep) for timestep in (10, 10.5, 11)]
    assert (outputs[1] - outputs[0]).abs().max() > 1e-4 and (outputs[1] - outputs[2]).abs().max() > 1e-4
    torch.testing.assert_close(predict(unet, torch.tensor([10.5, 10.5])), outputs[1], **EXACT)


def test_return_dict_false_gives_a_tuple():
    unet = build_unet()
    with torch.no_grad():
        (output,) = unet(noise_like_input(unet), 10, return_dict=False)
    torch.testing.assert_close(output, predict(unet), **EXACT)


def test_forward_has_the_signature_of_unet2dmodel():
    ours, theirs = (inspect.signature(c.forward).parameters for c in (DiffiTUNet2DModel, diffusers.UNet2DModel))
    assert list(ours) == [*theirs, "augment_labels"]  # last, so that calls by position stay
    assert [p.default for p in ours.values()] == [*(p.default for p in theirs.values()), None]


def test_shared_arguments_are_those_of_unet2dmodel():
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (DiffiTUNet2DModel, diffusers.UNet2DModel))
    same_default = ["sample_size", "in_channels", "out_channels", "layers_per_block", "norm_num_groups", "norm_eps"]
    same_default += ["dropout", "num_class_embeds", "flip_sin_to_cos", "freq_shift", "time_embedding_dim"]
    for name in same_default:
        assert ours[name].default == theirs[name].default, name
    assert {*same_default, "block_out_channels", "attention_head_dim"} == ours.keys() & theirs.keys() - {"self"}


def test_timestep_embedding_is_that_of_unet2dmodel():
    options = {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24, "norm_num_groups": 8}
    ours = build_unet(block_out_channels=(16,), **options)
    theirs = diffusers.UNet2DModel(
        block_out_channels=(16,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], **options
    )
    theirs.time_embedding.load_state_dict(ours.time_embedding.state_dict())
    timesteps = torch.tensor([0, 10, 999])
    torch.testing.assert_close(
        ours.time_embedding(ours.time_proj(timesteps)), theirs.time_embedding(theirs.time_proj(timesteps)), **FLOAT32
    )


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_diffusers_pipeline_runs_the_network(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    pipeline = getattr(diffusers, f"{name}Pipeline")(unet=build_unet(sample_size=(8, 16)), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, 8, 16, 3) and images.std() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_steps_with_the_network(name):
    unet, scheduler = build_unet(), SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    initial = noise_like_input(unet) * scheduler.init_noise_sigma
    sample = initial
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = unet(scheduler.scale_model_input(sample, timestep), timestep).sample
            sample = scheduler.step(prediction, timestep, sample).prev_sample
    assert sample.shape == initial.shape and sample.isfinite().all() and not sample.equal(initial)


def test_model_class_of_an_unknown_config_raises():
    with pytest.raises(ValueError, match="'AutoencoderKL'"):
        model_class({"_class_name": "AutoencoderKL"})


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, options, and errors


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_any_number_of_channels_is_taken(channels):
    unet = build_unet(in_channels=channels, out_channels=channels + 1)
    assert predict(unet).shape == (2, channels + 1, 8, 8)


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": (8, 16)},
        {"sample_size": (16, 4)},
        {"sample_size": (8, 16), "window_size": None},
        {"sample_size": 6, "window_size": 3},
        {"sample_size": 16, "block_out_channels": (16, 24, 32, 40)},
        {"block_out_channels": (16,)},
        {"layers_per_block": (1, 3)},
        {"skip_merge": "add"},
        {"num_attention_heads": (1, 4)},
        {"num_attention_heads": None},
        {"num_attention_heads": None, "attention_head_dim": 8},
        {"num_attention_heads": 3, "attention_head_dim": 4},
        {"time_embedding_dim": 10, "mlp_ratio": 1.5},
    ],
    ids=lambda config: ",".join(f"{name}={value}" for name, value in config.items()),
)
def test_option_keeps_the_shape(config):
    unet = build_unet(**config)
    output = predict(unet)
    assert output.shape == noise_like_input(unet).shape and output.isfinite().all()


def test_layers_per_block_is_mirrored_by_the_decoder():
    unet = build_unet(sample_size=16, block_out_channels=(16, 24, 32), layers_per_block=(1, 2, 3))
    stages = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    assert [len(stage.resblocks) for stage in stages] == [1, 2, 3, 2, 1]


@pytest.mark.parametrize(
    "heads, head_dim, expected", [(2, None, [(2, 8), (2, 16)]), (None, 8, [(2, 8), (4, 8)]), (3, 4, [(3, 4), (3, 4)])]
)
def test_heads_and_head_dim_set_the_width_of_the_attention(heads, head_dim, expected):
    unet = build_unet(num_attention_heads=heads, attention_head_dim=head_dim)
    modules = [unet.down_blocks[0].resblocks[0].block.attn, unet.mid_block.resblocks[0].block.attn]
    assert [(module.num_attention_heads, module.attention_head_dim) for module in modules] == expected


@pytest.mark.parametrize("height, width", [(6, 8), (8, 2)])
def test_indivisible_size_raises_with_the_multiple(height, width):
    with pytest.raises(ValueError, match=rf"multiples of 4 .* got {height} x {width}"):
        build_unet()(torch.zeros(1, 3, height, width), 10)


def test_global_attention_at_another_size_raises():
    with pytest.raises(ValueError, match="8 x 8, got 16 x 16"):
        build_unet(window_size=None)(torch.zeros(1, 3, 16, 16), 10)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("in_channels", {"in_channels": 0}),
        ("out_channels", {"out_channels": 0}),
        ("layers_per_block", {"layers_per_block": 0}),
        ("layers_per_block", {"layers_per_block": (1, 1, 1)}),
        ("layers_per_block", {"layers_per_block": (1, 0)}),
        ("num_attention_heads", {"num_attention_heads": 3}),
        ("num_attention_heads", {"num_attention_heads": (2,)}),
        ("num_attention_heads", {"num_attention_heads": -2}),
        ("attention_head_dim", {"num_attention_heads": None, "attention_head_dim": 5}),
        ("window_size", {"window_size": 0}),
        ("sample_size", {"window_size": None, "sample_size": None}),
        ("sample_size", {"window_size": None, "sample_size": (8, 9)}),
        ("norm_num_groups", {"norm_num_groups": 5}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
        ("skip_merge", {"skip_merge": "mean"}),
        ("num_class_embeds", {"num_class_embeds": 0}),
        ("num_augment_labels", {"num_augment_labels": 0}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("attention_head_dim", {"attention_head_dim": 0}),
        ("attention_head_dim", {"num_attention_heads": None, "attention_head_dim": 0}),
        ("block_out_channels", {"block_out_channels": ()}),
        ("block_out_channels", {"block_out_channels": (16, 0)}),
        ("norm_num_groups", {"norm_num_groups": 0}),
        ("time_embedding_dim", {"time_embedding_dim": 0}),
        ("mlp_ratio", {"mlp_ratio": 0}),
        ("sample_size", {"window_size": None, "sample_size": 0}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_argument_raises_with_its_name(name, overrides):
    with pytest.raises(ValueError, match=f"`{name}`"):
        build_unet(**overrides)


def test_no_labels_mean_the_null_class():
    unet = build_unet(num_class_embeds=3)
    torch.testing.assert_close(predict(unet), predict(unet, class_labels=torch.tensor([3, 3])), **EXACT)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels_change_their_own_image_only(dtype):
    unet = build_unet(num_class_embeds=3)
    output, other = (predict(unet, class_labels=torch.tensor(labels, dtype=dtype)) for labels in ([0, 1], [0, 2]))
    torch.testing.assert_close(output[0], other[0], **EXACT)
    assert (output[1] - other[1]).abs().max() > 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 4]), r"\[0, 3\].* got 0 to 4"),
        (torch.tensor([-1, 0]), r"\[0, 3\].* got -1 to 0"),
        (torch.tensor([0]), r"shape \(2,\)"),
        (torch.tensor([[0], [1]]), r"shape \(2,\)"),
        (torch.tensor([0.0, 1.0]), "must be integers"),
    ],
    ids=["too_large", "negative", "too_few", "two_dimensional", "float"],
)
def test_bad_labels_raise(labels, message, training):
    with pytest.raises(ValueError, match=message):
        predict(build_unet(num_class_embeds=3).train(training), class_labels=labels)


def test_labels_to_an_unconditional_network_raise():
    with pytest.raises(ValueError, match="unconditional"):
        predict(build_unet(), class_labels=torch.tensor([0, 1]))


def test_no_augment_labels_mean_zeros_and_add_nothing():
    unet, plain = build_unet(num_augment_labels=9), build_unet()
    weights = unet.state_dict()
    assert weights.pop("augment_embedding.weight").shape == (64, 9)  # (T, A)
    plain.load_state_dict(weights)
    torch.testing.assert_close(predict(unet), predict(plain), **EXACT)
    torch.testing.assert_close(predict(unet, augment_labels=torch.zeros(2, 9)), predict(plain), **EXACT)


@pytest.mark.parametrize("label", [0, 8])
def test_augment_labels_change_their_own_image_only(label):
    unet = build_unet(num_augment_labels=9)
    labels = torch.zeros(2, 9)
    labels[1, label] = 0.5
    change = (predict(unet, augment_labels=labels) - predict(unet)).abs().amax((1, 2, 3))
    assert change[0] < 1e-6 and change[1] > 1e-3


def test_augment_labels_are_a_linear_map_in_the_time_token():
    """Their contribution can be moved to the bias of the time embedding."""
    unet = build_unet(num_augment_labels=2)
    labels = torch.tensor([[0.3, -2.0], [0.3, -2.0]])
    expected = predict(unet, augment_labels=labels)
    with torch.no_grad():
        unet.time_embedding.linear_2.bias += unet.augment_embedding.weight @ labels[0]
    torch.testing.assert_close(predict(unet), expected, **FLOAT32)


def test_augment_embedding_receives_a_gradient_of_zero_without_labels():
    """Under DDP an unused parameter is an error."""
    unet = build_unet(num_augment_labels=2)
    unet(noise_like_input(unet), 10).sample.sum().backward()
    torch.testing.assert_close(unet.augment_embedding.weight.grad, torch.zeros(64, 2), **EXACT)


@pytest.mark.parametrize(
    "num_augment_labels, shape, message",
    [
        (None, (2, 9), "`num_augment_labels`"),
        (9, (2, 8), r"shape \(2, 9\), got \(2, 8\)"),
        (9, (1, 9), r"shape \(2, 9\), got \(1, 9\)"),
    ],
)
def test_bad_augment_labels_raise(num_augment_labels, shape, message):
    with pytest.raises(ValueError, match=message):
        predict(build_unet(num_augment_labels=num_augment_labels), augment_labels=torch.zeros(shape))


@pytest.mark.parametrize(
    "widths, layers, window, low, high",
    [
        pytest.param((128, 256, 256), 2, 4, 15, 16, id="cifar10_appendix_I1"),
        pytest.param((128, 256, 256), 4, 4, 28, 29, id="cifar10_appendix_H1"),
        pytest.param((128, 256, 256, 256), (1, 2, 2, 2), 8, 22, 24, id="ffhq64_appendix_I1"),
        pytest.param((128, 256, 256, 256), 4, 8, 43, 45, id="ffhq64_appendix_H1"),
    ],
)
def test_number_of_parameters_is_that_of_the_paper(widths, layers, window, low, high):
    with torch.device("meta"):
        unet = DiffiTUNet2DModel(block_out_channels=widths, layers_per_block=layers, window_size=window)
    assert low <= unet.num_parameters() / 1e6 <= high
    assert unet.time_embedding.linear_2.out_features == 512


# ---------------------------------------------------------------------------------------------------------------------
# Shapes stated in docstrings, and properties that training relies on

BLOCK = {"time_embed_dim": 6, "num_attention_heads": 2, "attention_head_dim": 4, "window": (2, 3), "mlp_ratio": 2.0}
RESBLOCK = {**BLOCK, "dropout": 0.0, "norm_num_groups": 4, "norm_eps": 1e-5}


def test_windows_are_cut_row_by_row():
    feature_map = torch.randn(2, 5, 4, 9)
    tokens = partition_windows(feature_map, (2, 3))
    assert tokens.shape == (2 * 6, 6, 5)
    for image, row, column in ((0, 0, 1), (1, 1, 2)):
        window = feature_map[image, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]  # (C, 2, 3)
        torch.testing.assert_close(tokens[6 * image + 3 * row + column], window.flatten(1).T, **EXACT)


@pytest.mark.parametrize("window", [(2, 3), (4, 3), (2, 9), (4, 9), (1, 1)])
def test_merge_windows_is_the_inverse_of_partition_windows(window):
    feature_map = torch.randn(2, 5, 4, 9)
    merged = merge_windows(partition_windows(feature_map, window), window, 4, 9)
    torch.testing.assert_close(merged, feature_map, **EXACT)


@pytest.mark.parametrize("window", [(2, 3), (4, 9), (2, 9)])
def test_merge_windows_gives_channels_last(window):
    tokens = partition_windows(torch.randn(2, 5, 4, 9), window).contiguous()
    assert merge_windows(tokens, window, 4, 9).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("window", [(2, 3), (4, 9), (1, 1)])
def test_add_windows_adds_merged_windows_in_the_layout_of_the_feature_map(window, layout):
    torch.manual_seed(0)
    feature_map, other = torch.randn(2, 2, 5, 4, 9)
    feature_map = feature_map.contiguous(memory_format=layout)
    total = add_windows(feature_map, partition_windows(other, window), window)
    torch.testing.assert_close(total, feature_map + other, **EXACT)
    assert total.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("window_size, expected", [(4, 1), (None, 2)])
def test_attentions_of_equal_windows_share_one_table_of_positions(window_size, expected):
    unet = build_unet(window_size=window_size, sample_size=16)
    for network in (unet, copy.deepcopy(unet), unet.to(torch.float64)):
        tables = {id(attention.relative_positions.index) for attention in attentions(network)}
        assert len(tables) == len(list(network.buffers())) == expected
    windows = [attention.window for attention in attentions(unet)]
    assert [len(attention.relative_positions.index) for attention in attentions(unet)] == [h * w for h, w in windows]
    assert not [name for name in unet.state_dict() if "relative_positions" in name]


def test_relative_position_bias_is_converted_after_the_sum_of_its_gradient():
    """A gradient summed in bfloat16 would stop growing at 256."""
    attention = attentions(build_unet())[0]
    bias = attention.relative_position_bias(torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.is_contiguous()
    expected = attention.relative_position_bias().bfloat16()
    torch.testing.assert_close(bias, expected, **EXACT)
    bias.backward(torch.full_like(bias, 1.0 + 2**-7))
    counts = torch.bincount(attention.relative_positions.index.flatten())
    exact = counts[:, None].expand_as(attention.relative_position_bias_table) * (1.0 + 2**-7)
    torch.testing.assert_close(attention.relative_position_bias_table.grad, exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_upsampling_keep_their_dtype_under_autocast(dtype):
    """GroupNorm and LayerNorm accumulate in float32 in any case; autocast would store it, too."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    norm, token_norm, upsampler = diffit_model.ChannelNorm(2, 8), diffit_model.TokenNorm(4), Upsampler(8, 8)
    nn.init.normal_(norm.weight)
    with torch.autocast("cpu", dtype):
        outputs = norm(x), token_norm(x), upsampler(x)
    assert [output.dtype for output in outputs] == 3 * [dtype]
    exact = nn.functional.group_norm(x.float(), 2, norm.weight.to(dtype).float(), norm.bias), token_norm(x.float())
    torch.testing.assert_close(outputs[:2], tuple(each.to(dtype) for each in exact), rtol=2**-7, atol=2**-7)
    expected = upsampler.conv.to(dtype)(x.repeat_interleave(2, -1).repeat_interleave(2, -2))
    torch.testing.assert_close(outputs[2], expected, rtol=2**-6, atol=2**-6)


def test_relative_position_index_has_the_stated_shape_and_range():
    index = relative_position_index((2, 3))
    assert index.shape == (6, 6)
    assert (index.min(), index.max(), len(index.unique())) == (0, 14, 15)


def test_attention_keeps_shape_and_dtype():
    attention = TimeDependentSelfAttention(8, 6, 2, 4, (2, 3)).bfloat16()
    output = attention(torch.randn(4, 6, 8).bfloat16(), torch.randn(2, 6).bfloat16())
    assert output.shape == (4, 6, 8) and output.dtype == torch.bfloat16
    assert attention.relative_position_bias().shape == (1, 2, 6, 6)
    assert attention.relative_position_bias().is_contiguous()


@pytest.mark.parametrize(
    "module, shapes, expected",
    [
        (DiffiTMLP(8, 2.5), [(4, 6, 8)], (4, 6, 8)),
        (DiffiTBlock(8, **BLOCK, dropout=0.0), [(4, 6, 8), (2, 6)], (4, 6, 8)),
        (DiffiTResBlock(8, 8, **RESBLOCK), [(2, 8, 4, 9), (2, 6)], (2, 8, 4, 9)),
        (DiffiTResBlock(8, 12, **RESBLOCK), [(2, 8, 4, 9), (2, 6)], (2, 12, 4, 9)),
        (DiffiTStage(8, 12, 2, **RESBLOCK), [(2, 8, 4, 9), (2, 6)], (2, 12, 4, 9)),
    ],
    ids=["mlp", "block", "resblock", "wider_resblock", "stage"],
)
def test_module_gives_the_stated_shape(module, shapes, expected):
    assert module(*(torch.randn(shape) for shape in shapes)).shape == expected


def test_evaluation_is_deterministic_and_dropout_acts_in_training():
    unet = build_unet(dropout=0.5)
    torch.testing.assert_close(predict(unet), predict(unet), **EXACT)
    unet.train()
    assert not predict(unet).equal(predict(unet))


def test_zero_init_output_starts_at_zero():
    torch.testing.assert_close(predict(build_unet(zero_init_output=True)), torch.zeros(2, 3, 8, 8), **EXACT)


@pytest.mark.parametrize(
    "config", [{}, {"num_class_embeds": 3}, {"skip_merge": "add"}], ids=lambda config: str(config)
)
def test_every_parameter_receives_a_gradient(config):
    unet = build_unet(**config)
    _, gradients = output_and_gradients(unet)
    assert gradients.keys() == dict(unet.named_parameters()).keys()
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


def test_bfloat16_autocast_trains_with_finite_gradients():
    unet = build_unet(**NINE_TOKENS).train()
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = output_and_gradients(unet)
    assert output.isfinite().all()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
