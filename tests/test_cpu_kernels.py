# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernels: their numbers, where they fall back to the reference layers, and which scripts use them."""

import copy
import pickle
from unittest import mock

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sample_diffit
from diffit import cpu_kernels
from diffit.config import ModelConfig
from diffit.cpu_kernels import Dropout16, GELULinear, GroupNormSiLUConv, NormalizeTokens, kernelize
from diffit.formulations import DDPM
from diffit.networks import set_up_model
from diffit.sampling import load_sampler
from diffit.sampling_config import SamplingConfig
from diffit.validation import build_guidance_model
from diffit_model import (
    DiffiTBlock,
    DiffiTMLP,
    DiffiTResBlock,
    DiffiTTransformer2DModel,
    DiffiTUNet2DModel,
    TimeDependentSelfAttention,
    TokenNorm,
)
from diffit_pipeline import DiffiTPipeline

EXACT = {"rtol": 0, "atol": 0}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}

RESBLOCK = {
    "time_embed_dim": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "window": (2, 3),
    "mlp_ratio": 2.0,
    "dropout": 0.0,
    "norm_num_groups": 4,
    "norm_eps": 1e-5,
}


def build_unet(**overrides) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    config = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "window_size": 2}
    config |= {"num_attention_heads": 2, "norm_num_groups": 8, "num_class_embeds": 3, "zero_init_output": False}
    return DiffiTUNet2DModel(**config | overrides).eval()


def build_transformer(**overrides) -> DiffiTTransformer2DModel:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    model = DiffiTTransformer2DModel(**config | {"num_embeds_ada_norm": 3} | overrides).eval()
    nn.init.xavier_uniform_(model.proj_out.weight)
    return model


BUILDERS = pytest.mark.parametrize("build", [build_unet, build_transformer], ids=["unet", "transformer"])


def predict(model: nn.Module) -> torch.Tensor:
    sample = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(sample, torch.tensor([3, 700]), class_labels=torch.tensor([0, 3])).sample


def output_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    output = predict(model)
    output.square().sum().backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def kernels(model: nn.Module) -> list[str]:
    """Names of the modules that are kernels, and of the attentions whose processor is one."""
    classes = {name: type(getattr(module, "processor", module)) for name, module in model.named_modules()}
    return [name for name, kind in classes.items() if kind.__module__ == cpu_kernels.__name__]


# ---------------------------------------------------------------------------------------------------------------------
# Each kernel against the layers it replaces


@pytest.mark.parametrize("chunk", [7, 2**17])
def test_gelu_linear_equals_the_two_layers_in_value_and_gradient(chunk, monkeypatch):
    monkeypatch.setattr(GELULinear, "CHUNK", chunk)
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 8, dtype=torch.float64)).requires_grad_()
    linear = nn.Linear(8, 3).double()
    expected = linear(nn.functional.gelu(x, approximate="tanh"))
    output = GELULinear.apply(x, linear.weight, linear.bias)
    torch.testing.assert_close(output, expected, **FLOAT64)
    leaves = (x, linear.weight, linear.bias)
    gradients = [torch.autograd.grad(value.square().sum(), leaves) for value in (output, expected)]
    torch.testing.assert_close(*gradients, **FLOAT64)


def test_normalized_tokens_equal_layer_norm_in_value_and_gradient():
    torch.manual_seed(0)
    tokens = (2 + 3 * torch.randn(2, 5, 8, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = nn.functional.layer_norm(tokens, (8,), eps=1e-6)
    output = NormalizeTokens.apply(tokens, 1e-6)
    torch.testing.assert_close(output, expected, **FLOAT64)
    gradients = [torch.autograd.grad((value * weights).sum(), tokens) for value in (output, expected)]
    torch.testing.assert_close(*gradients, **FLOAT64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_silu_conv_equals_the_layers_in_value_and_gradient(layout):
    torch.manual_seed(0)
    x = (2 + 3 * torch.randn(2, 4, 5, 3, dtype=torch.float64)).to(memory_format=layout).requires_grad_()
    norm, conv = nn.GroupNorm(2, 4).double(), nn.Conv2d(4, 6, 3, padding=1).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = conv(nn.functional.silu(norm(x)))
    output = GroupNormSiLUConv.apply(x, norm.weight, norm.bias, 2, norm.eps, conv.weight, conv.bias)
    torch.testing.assert_close(output, expected, **FLOAT64)
    leaves = (x, *norm.parameters(), *conv.parameters())
    gradients = [torch.autograd.grad(value.square().sum(), leaves) for value in (output, expected)]
    torch.testing.assert_close(*gradients, **FLOAT64)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_its_fraction_and_keeps_the_mean(probability):
    torch.manual_seed(0)
    tokens = torch.ones(7, 1429, 3, requires_grad=True)  # the number of elements is not a multiple of 4
    dropped = Dropout16(probability)(tokens)
    is_kept = dropped != 0
    deviation = (probability * (1 - probability) / tokens.numel()) ** 0.5
    assert abs(is_kept.float().mean().item() - (1 - probability)) < 4 * deviation
    torch.testing.assert_close(
        dropped[is_kept], torch.full_like(dropped[is_kept], 1 / (1 - probability)), rtol=1e-4, atol=0
    )
    (gradient,) = torch.autograd.grad(dropped.sum(), tokens)
    torch.testing.assert_close(gradient, dropped.detach())
    neighbors = [is_kept.flatten()[i::4].float() for i in range(4)]  # four share a random word
    pairs = torch.corrcoef(torch.stack([x[: tokens.numel() // 4] for x in neighbors]))
    assert (pairs - torch.eye(4)).abs().max() < 4 / (tokens.numel() / 4) ** 0.5


@BUILDERS
def test_kernelized_network_equals_the_reference_in_value_and_gradient(build):
    reference, model = build(), kernelize(build())
    assert kernels(model) and not kernels(reference)
    output, gradients = output_and_gradients(model)
    expected, expected_gradients = output_and_gradients(reference)
    torch.testing.assert_close(output, expected, **FLOAT32)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-4)  # gradients are as large as 100
    with torch.no_grad():
        torch.testing.assert_close(predict(model), predict(reference), **FLOAT32)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved for backward


def test_resblock_saves_one_feature_map_before_its_convolution():
    sizes = []
    for resblock in (DiffiTResBlock(4, 8, **RESBLOCK), kernelize(DiffiTResBlock(4, 8, **RESBLOCK))):
        saved = {}  # by address, because the 1x1 convolution of the shortcut saves the input too
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.__setitem__(x.data_ptr(), x) or x, lambda x: x
        ):
            resblock(torch.randn(2, 4, 6, 6), torch.randn(2, 6))
        sizes.append([x.shape for x in saved.values()].count((2, 4, 6, 6)))
    assert sizes == [3, 1]


def test_dropout_saves_a_byte_per_element_and_obeys_the_seed():
    dropout, tokens = Dropout16(0.3), torch.randn(2, 5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        torch.manual_seed(3)
        first = dropout(tokens)
    assert [x.nbytes for x in saved] == [tokens.numel()]
    assert not torch.equal(dropout(tokens), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(tokens), first)
    assert dropout.eval()(tokens) is tokens


def test_norm_and_linear_layer_save_one_copy_of_the_tokens():
    norm, linear = kernelize(TokenNorm(8)), nn.Linear(8, 3)
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add((x.data_ptr(), x.numel())) or x, lambda x: x):
        linear(norm(tokens))
    assert [size for _, size in saved].count(tokens.numel()) == 1


def test_mlp_does_not_save_the_output_of_its_gelu():
    mlp = kernelize(DiffiTMLP(8, 4.0))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        mlp(torch.randn(2, 5, 8))
    assert saved.count((2, 5, 32)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Fallbacks


@pytest.mark.parametrize("kind", ["hook", "adapter", "autocast", "float64", "no gradient"])
def test_resblock_falls_back_to_the_reference(kind):
    torch.manual_seed(0)
    reference = DiffiTResBlock(4, 8, **RESBLOCK)
    x, time_token = torch.randn(2, 4, 6, 6), torch.randn(2, 6)
    expected = reference(x, time_token)
    resblock = kernelize(copy.deepcopy(reference))
    calls = []
    if kind == "hook":
        resblock.conv.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "adapter":
        resblock.conv = nn.Sequential(resblock.conv)
    elif kind == "float64":
        resblock, x, time_token, expected = (value.double() for value in (resblock, x, time_token, expected))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        with (
            mock.patch.object(GroupNormSiLUConv, "apply", side_effect=AssertionError),
            torch.set_grad_enabled(kind != "no gradient"),
        ):
            output = resblock(x, time_token)
    tolerance = {"rtol": 0, "atol": 0.05} if kind == "autocast" else FLOAT32
    torch.testing.assert_close(output.to(expected.dtype), expected, **tolerance)
    assert len(calls) == (kind == "hook")


@pytest.mark.parametrize("kind", ["hook", "adapter", "autocast", "float64"])
def test_mlp_falls_back_to_the_reference(kind):
    torch.manual_seed(0)
    mlp = kernelize(DiffiTMLP(8, 4.0))
    x = torch.randn(2, 5, 8)
    expected = mlp.fc2(mlp.act(mlp.fc1(x)))
    calls = []
    if kind == "hook":
        mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "adapter":
        mlp.fc2 = nn.Sequential(mlp.fc2)
    elif kind == "float64":
        mlp, x, expected = mlp.double(), x.double(), expected.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        with mock.patch.object(GELULinear, "apply", side_effect=AssertionError):
            output = mlp(x)
    tolerance = {"rtol": 0, "atol": 0.02} if kind == "autocast" else FLOAT32
    torch.testing.assert_close(output.to(expected.dtype), expected, **tolerance)
    assert len(calls) == (kind == "hook")


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16_weights", "bf16_autocast"])
@BUILDERS
def test_kernelized_network_in_bfloat16_equals_the_reference_bitwise(build, autocast):
    outputs = []
    for model in (build(dropout=0.3), kernelize(build(dropout=0.3))):
        model = model.train() if autocast else model.train().bfloat16()
        sample = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)  # for dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(model(sample.to(model.dtype), 10).sample)
    torch.testing.assert_close(*outputs, **EXACT)


def test_trained_bias_takes_the_kernel_of_the_backend_native_only():
    attention = kernelize(TimeDependentSelfAttention(8, 6, 2, 4, (3, 3)))
    tokens, time_token = torch.randn(4, 9, 8), torch.randn(2, 6)
    with mock.patch.object(
        cpu_kernels, "attention_with_trained_bias", wraps=cpu_kernels.attention_with_trained_bias
    ) as kernel:
        attention.set_attention_backend("native")
        attention(tokens, time_token)
        assert kernel.call_count == 1
        attention.set_attention_backend("_native_math")
        attention(tokens, time_token)
        attention.set_attention_backend("native")
        with torch.no_grad():
            attention(tokens, time_token)
        attention.relative_position_bias_table.requires_grad_(False)
        attention(tokens, time_token)
    assert kernel.call_count == 1


@BUILDERS
def test_compiled_blocks_take_the_reference_layers(build):
    """In the order of `set_up_model`: diffusers finds the blocks to compile by the names of their classes."""
    reference, model = build(), build()
    compiler = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(backend=compiler)
    kernelize(model)
    with mock.patch.object(GELULinear, "apply", side_effect=AssertionError):
        output, gradients = output_and_gradients(model)
    expected, expected_gradients = output_and_gradients(reference)
    assert compiler.frame_count >= 1
    torch.testing.assert_close(output, expected, **FLOAT32)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What stays as it was


@BUILDERS
def test_kernelized_network_is_saved_like_the_reference(build, tmp_path):
    reference, model = build(), kernelize(build())
    assert list(model.state_dict()) == list(reference.state_dict())
    reference.save_pretrained(tmp_path / "reference")
    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "reference").iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "model").iterdir())) == 3
    code = (tmp_path / "model/diffit_model.py").read_text()
    assert "autograd.Function" not in code and "import diffit." not in code and "from diffit." not in code
    assert not kernels(type(model).from_pretrained(tmp_path / "model"))


@BUILDERS
def test_kernelized_network_is_copied_and_pickled_with_its_kernels(build):
    model = kernelize(build())
    expected = output_and_gradients(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kernels(clone) == kernels(model)
        torch.testing.assert_close(output_and_gradients(clone), expected, **EXACT)
    kernelize(model)  # twice is as good as once
    torch.testing.assert_close(output_and_gradients(model), expected, **EXACT)


@BUILDERS
def test_gradient_checkpointing_with_kernels_changes_nothing(build):
    model = kernelize(build(dropout=0.3)).train()
    expected = output_and_gradients(model)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(output_and_gradients(model), expected, **EXACT)


def test_every_layer_of_a_network_that_has_a_kernel_gets_it():
    unet, transformer = kernelize(build_unet()), kernelize(build_transformer())
    blocks = [name for name, module in unet.named_modules() if isinstance(module, DiffiTBlock)]
    expected = {f"{name}.{part}" for name in blocks for part in ("norm1", "attn", "norm2", "mlp", "dropout")}
    assert set(kernels(unet)) == expected | {name.removesuffix(".block") for name in blocks}
    expected = {f"blocks.{i}.{part}" for i in range(2) for part in ("norm1", "attn", "norm2", "mlp", "dropout")}
    assert set(kernels(transformer)) == expected | {"norm_out"}


def test_other_networks_and_layers_stay_as_they_are():
    class OwnMLP(DiffiTMLP):
        """A user's layer, whose forward must be the one that runs."""

    theirs = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], norm_num_groups=4
    )
    theirs = nn.ModuleList([theirs, nn.Dropout(0.1), nn.LayerNorm(4), OwnMLP(8, 2.0)])
    before = [type(module) for module in theirs.modules()]
    assert kernelize(theirs) is theirs
    assert [type(module) for module in theirs.modules()] == before


def test_network_without_weights_on_a_cpu_stays_as_it_is():
    with torch.device("meta"):
        assert not kernels(kernelize(build_transformer()))


# ---------------------------------------------------------------------------------------------------------------------
# Where the scripts put them


def build_pipeline() -> DiffiTPipeline:
    return DiffiTPipeline(build_unet(), DDIMScheduler())


def test_training_on_a_cpu_uses_the_kernels_also_for_guidance(tmp_path):
    model, formulation = build_unet(), DDPM()
    DiffiTPipeline(build_unet(), formulation.scheduler).save_pretrained(tmp_path)
    set_up_model(model, ModelConfig(model_config="unused.json", attention_backend="native"), torch.device("cpu"))
    guidance_model = build_guidance_model(Accelerator(cpu=True), str(tmp_path), model, formulation)
    assert kernels(model) == kernels(guidance_model) == kernels(kernelize(build_unet()))


def test_evaluation_on_a_cpu_uses_the_kernels(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    pipeline, _ = load_sampler(str(tmp_path), SamplingConfig(scheduler="ddim"), torch.device("cpu"))
    assert kernels(pipeline.network) == kernels(kernelize(build_unet()))


def test_sampling_on_a_cpu_uses_the_kernels_also_for_guidance(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "model")
    calls = []
    for name, flags in (("alone", []), ("guided", [f"--guidance_model={tmp_path / 'model'}", "--guidance_scale=2"])):
        flags = [*flags, f"--output_dir={tmp_path / name}", "--num_inference_steps=2", "--batch_size=2"]
        arguments = [f"--model_path={tmp_path / 'model'}", "--seeds=0-1", *flags]
        with mock.patch.object(GELULinear, "activate", wraps=GELULinear.activate) as kernel:
            sample_diffit.main(sample_diffit.parse_args(arguments))
        calls.append(kernel.call_count)
    blocks = sum(isinstance(module, DiffiTBlock) for module in build_unet().modules())
    assert calls == [2 * blocks, 2 * 2 * blocks]
