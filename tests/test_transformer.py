# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The latent network: sizes, integration with diffusers, errors, weights for other resolutions and other classes.

`test_convert.py` compares it with the formulas of the paper, `test_model.py` tests its attention.
"""

import copy
import inspect
import json
import math
import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import diffit_model
from diffit.networks import adapt_weights, model_class, resize_grid, set_attention_backend
from diffit_model import DiffiTTransformer2DModel, DiffiTUNet2DModel, sincos_position_embedding
from helpers import ROOT

EXACT = {"rtol": 0, "atol": 0}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 3,
}
SIZES = {"s": 27.3, "b": 108.0, "l": 380.5, "xl": 561.0}  # million parameters


def build_transformer(seed: int = 0, **overrides) -> DiffiTTransformer2DModel:
    """A network whose output is not zero, unlike that of a newly initialized one."""
    torch.manual_seed(seed)
    model = DiffiTTransformer2DModel(**{**TINY, **overrides}).eval()
    nn.init.xavier_uniform_(model.proj_out.weight)
    return model


def latents_for(model: nn.Module, batch: int = 2) -> torch.Tensor:
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, model.config.in_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model: nn.Module, timestep=10, **kwargs) -> torch.Tensor:
    return model(latents_for(model), timestep, **kwargs).sample


def output_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(latents_for(model), torch.tensor([3, 700])).sample
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def on_meta(size: str) -> DiffiTTransformer2DModel:
    config = json.loads(Path(ROOT, f"configs/model/diffit_{size}_2.json").read_text())
    with torch.device("meta"):
        return model_class(config).from_config(config).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, initialization, positions


@pytest.mark.parametrize("size", SIZES)
def test_included_config_has_the_stated_number_of_parameters(size):
    assert round(on_meta(size).num_parameters() / 1e6, 1) == SIZES[size]


def test_xl_2_has_the_multiplications_that_the_paper_counts():
    """114 G: all linear layers at 256 x 256 pixels, without the two products inside each attention."""
    model = on_meta("xl")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 4, 32, 32, device="meta"), torch.zeros(1, device="meta"))
    flops = counter.get_flop_counts()["Global"]
    in_attention = flops.pop(torch.ops.aten.bmm)
    assert round(sum(flops.values()) / 2e9) == 114
    assert in_attention == 28 * 2 * (2 * 256 * 256 * 1152)


def test_new_network_predicts_zero():
    torch.manual_seed(0)
    torch.testing.assert_close(predict(DiffiTTransformer2DModel(**TINY)), torch.zeros(2, 8, 8, 8), **EXACT)


def test_new_weights_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    model = DiffiTTransformer2DModel(4, 32, num_layers=1)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    xavier = {"patch_embedding.weight": (16, 128)}  # fan-in and fan-out as of a linear layer
    xavier |= {f"blocks.0.attn.{name}.weight": (128, 384) for name in ("qkv", "qkv_temb")}
    xavier |= {"blocks.0.attn.proj.weight": (128, 128)}
    xavier |= {f"blocks.0.mlp.{name}.weight": (128, 512) for name in ("fc1", "fc2")}
    normal = ("class_embedding", "time_embedding.linear_1", "time_embedding.linear_2")
    expected = {name: math.sqrt(2 / sum(sizes)) for name, sizes in xavier.items()}
    expected |= {f"{name}.weight": 0.02 for name in normal}
    expected |= {"blocks.0.attn.relative_position_bias_table": 0.02, "proj_out.weight": 0.0}
    assert std == pytest.approx(expected, rel=0.05)
    assert not [name for name, parameter in model.named_parameters() if parameter.ndim == 1 and parameter.any()]


def test_positions_are_sines_and_cosines_of_column_and_row():
    positions = sincos_position_embedding(16, (3, 5))
    assert positions.shape == (1, 15, 16) and positions.dtype == torch.float32
    row, column = 2, 4
    expected = [f(place / 10000 ** (i / 4)) for place in (column, row) for f in (math.sin, math.cos) for i in range(4)]
    torch.testing.assert_close(positions[0, row * 5 + column], torch.tensor(expected), rtol=0, atol=1e-6)


def test_positions_are_in_the_state_dict_and_not_trained():
    model = build_transformer()
    assert "position_embedding" in model.state_dict()
    assert "position_embedding" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": (4, 12)},
        {"sample_size": (12, 4), "patch_size": 4},
        {"patch_size": 1, "sample_size": 3},
        {"in_channels": 1, "out_channels": 2},
        {"mlp_ratio": 1.5, "dropout": 0.1},
        {"num_embeds_ada_norm": None},
    ],
    ids=str,
)
def test_option_gives_the_stated_shape(config):
    model = build_transformer(**config)
    shape = latents_for(model).shape
    output = predict(model)
    assert output.shape == (2, model.config.out_channels, *shape[2:]) and output.isfinite().all()


def test_latents_that_are_not_square_are_read_row_by_row():
    """With the attention and MLP switched off, an image's patch depends on that patch alone."""
    model = build_transformer(sample_size=(4, 12))
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    latents, changed = latents_for(model), latents_for(model)
    changed[:, :, 2:4, 6:8] += 1
    with torch.no_grad():
        difference = (model(changed, 10).sample - model(latents, 10).sample).abs().amax((0, 1)) > 1e-6
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert difference.equal(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Used in place of DiTTransformer2DModel


def test_forward_arguments_are_those_of_dit():
    ours, theirs = (
        list(inspect.signature(c.forward).parameters)
        for c in (DiffiTTransformer2DModel, diffusers.DiTTransformer2DModel)
    )
    assert ours == [name for name in theirs if name != "cross_attention_kwargs"]


def test_shared_arguments_are_those_of_dit():
    ours, theirs = (
        inspect.signature(c.__init__).parameters for c in (DiffiTTransformer2DModel, diffusers.DiTTransformer2DModel)
    )
    assert ours.keys() - theirs.keys() == {"mlp_ratio"}
    for name in ours.keys() & theirs.keys() - {"self"}:
        assert ours[name].default == theirs[name].default, name


def test_out_channels_default_to_in_channels_as_a_number():
    model = build_transformer(out_channels=None)
    assert model.config.out_channels == 4  # `DiTPipeline` does arithmetic with it
    assert predict(model).shape == (2, 4, 8, 8)


def test_timestep_forms_agree():
    model = build_transformer()
    expected = predict(model, 10)
    for timestep in (10.0, torch.tensor(10), torch.tensor([10]), torch.tensor([10, 10]), torch.tensor([10.0, 10.0])):
        torch.testing.assert_close(predict(model, timestep), expected, **EXACT)


def test_timesteps_and_labels_are_each_images_own():
    model = build_transformer()
    both = predict(model, torch.tensor([10, 700]), class_labels=torch.tensor([0, 2]))
    first = predict(model, 10, class_labels=torch.tensor([0, 0]))[0]
    second = predict(model, 700, class_labels=torch.tensor([2, 2]))[1]
    torch.testing.assert_close(both, torch.stack([first, second]), **FLOAT32)
    assert (both[1] - predict(model, 700, class_labels=torch.tensor([0, 0]))[1]).abs().max() > 1e-4


def test_no_labels_mean_the_null_class():
    model = build_transformer()
    assert model.null_label == 3
    torch.testing.assert_close(predict(model), predict(model, class_labels=torch.tensor([3, 3])), **EXACT)


def test_return_dict_false_gives_a_tuple():
    model = build_transformer()
    with torch.no_grad():
        (output,) = model(latents_for(model), 10, return_dict=False)
    torch.testing.assert_close(output, predict(model), **EXACT)


def test_model_class_finds_the_network():
    assert model_class({"_class_name": "DiffiTTransformer2DModel"}) is DiffiTTransformer2DModel


# ---------------------------------------------------------------------------------------------------------------------
# Integration with diffusers


@pytest.mark.parametrize("config", [{}, {"sample_size": (8, 4), "num_embeds_ada_norm": None}], ids=str)
def test_saved_and_loaded_network_gives_the_same_output(tmp_path, config):
    model = build_transformer(**config)
    nn.init.normal_(model.position_embedding)  # the positions of a checkpoint may differ from ours
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(predict(DiffiTTransformer2DModel.from_pretrained(tmp_path)), predict(model), **EXACT)
    assert (tmp_path / "diffit_model.py").read_bytes() == Path(diffit_model.__file__).read_bytes()


def test_auto_model_loads_a_saved_folder(tmp_path):
    model = build_transformer()
    model.save_pretrained(tmp_path)
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(loaded).__name__ == "DiffiTTransformer2DModel"
    torch.testing.assert_close(predict(loaded), predict(model), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_network_in_half_precision_is_close_to_float32(tmp_path, dtype):
    model = build_transformer()
    model.save_pretrained(tmp_path)
    loaded = DiffiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    with torch.no_grad():
        output = loaded(latents_for(model).to(dtype), 10).sample
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), predict(model), rtol=0, atol=0.05)


def test_bfloat16_autocast_sums_in_float32_and_trains():
    model = build_transformer().train()
    sums = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: sums.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = output_and_gradients(model)
    assert sums == [torch.float32] and output.isfinite().all()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("backend", ["native", "flex"])
@pytest.mark.parametrize("sample_size", [8, (4, 12)], ids=["16_tokens", "12_tokens"])
def test_backend_equals_plain_attention(backend, sample_size):
    model = build_transformer(sample_size=sample_size)
    set_attention_backend(model, "_native_math")
    expected = predict(model)
    set_attention_backend(model, backend)
    torch.testing.assert_close(predict(model), expected, **FLOAT32)


def test_xformers_equals_native_in_value_and_gradient():
    pytest.importorskip("xformers.ops")
    import xformers_contract

    model = build_transformer(sample_size=(4, 12))
    expected = output_and_gradients(model)
    set_attention_backend(model, "xformers")
    with xformers_contract.spoofed_cuda() as kernel:
        torch.testing.assert_close(output_and_gradients(model), expected, rtol=1e-5, atol=1e-4)
    assert kernel.call_count == len(model.blocks)


def test_automatic_attention_backend_is_native():
    model = build_transformer()
    set_attention_backend(model, "xformers")
    set_attention_backend(model, "auto")
    assert {block.attn.processor.backend for block in model.blocks} == {"native"}


def test_every_parameter_receives_a_gradient():
    model = build_transformer()
    _, gradients = output_and_gradients(model)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    model = build_transformer(dropout=0.3).train()
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected = output_and_gradients(model)
    assert len(calls) == 1

    model.enable_gradient_checkpointing()
    torch.manual_seed(0)
    torch.testing.assert_close(output_and_gradients(model), expected, **EXACT)
    assert len(calls) == 3  # forward, and again in backward


def test_compiled_blocks_give_the_same_output():
    model = build_transformer()
    expected = predict(model)
    compiler = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(backend=compiler, fullgraph=True)
    torch.testing.assert_close(predict(model), expected, **FLOAT32)
    assert compiler.frame_count == 1  # one graph for all blocks


def test_automatic_device_map_splits_no_block(tmp_path):
    model = build_transformer(num_layers=6)
    model.save_pretrained(tmp_path / "model")
    loaded = DiffiTTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "80KB"}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in loaded.hf_device_map if re.search(r"blocks\.\d+\.", name)]
    torch.testing.assert_close(predict(loaded), predict(model), **EXACT)


def test_layerwise_casting_keeps_the_ends_precise():
    model = build_transformer()
    expected = predict(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    precise = (model.patch_embedding, model.time_embedding.linear_1, model.class_embedding)
    assert {module.weight.dtype for module in precise} == {torch.float32}
    torch.testing.assert_close(predict(model), expected, rtol=0, atol=0.05)


def test_positions_in_float32_beside_bfloat16_weights_are_taken():
    """Sharding (FSDP) casts parameters and inputs, but not buffers."""
    model = build_transformer()
    positions = model.position_embedding
    model.bfloat16().position_embedding = positions
    assert model(latents_for(model).bfloat16(), 10).sample.dtype == torch.bfloat16


def test_deepcopy_shares_no_weights():
    model = build_transformer()
    clone, expected = copy.deepcopy(model), predict(model)
    nn.init.zeros_(clone.proj_out.weight)
    torch.testing.assert_close(predict(model), expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "name, overrides",
    [
        *((name, {name: 0}) for name in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")),
        *((name, {name: 0}) for name in ("num_layers", "patch_size", "num_embeds_ada_norm", "mlp_ratio")),
        ("attention_head_dim", {"num_attention_heads": 3, "attention_head_dim": 6}),
        ("sample_size", {"sample_size": None}),
        ("sample_size", {"sample_size": 0}),
        ("sample_size", {"sample_size": 7}),
        ("sample_size", {"sample_size": (8, 9)}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_argument_raises_with_its_name(name, overrides):
    with pytest.raises(ValueError, match=f"`{name}`"):
        build_transformer(**overrides)


@pytest.mark.parametrize("height, width", [(16, 16), (4, 16), (7, 8)])
def test_latents_of_another_size_raise(height, width):
    with pytest.raises(ValueError, match=f"8 x 8 .* got {height} x {width}"):
        build_transformer()(torch.zeros(1, 4, height, width), 10)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 4]), r"\[0, 3\].* got 0 to 4"),
        (torch.tensor([0]), r"shape \(2,\)"),
        (torch.tensor([0.0, 1.0]), "must be integers"),
    ],
    ids=["too_large", "too_few", "float"],
)
def test_bad_labels_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        predict(build_transformer(), class_labels=labels)


def test_labels_to_an_unconditional_network_raise():
    with pytest.raises(ValueError, match="unconditional"):
        predict(build_transformer(num_embeds_ada_norm=None), class_labels=torch.tensor([0, 1]))


def test_wrong_number_of_timesteps_raises():
    with pytest.raises(ValueError, match=r"one per image \(2\), got 3"):
        predict(build_transformer(), torch.tensor([1, 2, 3]))


# ---------------------------------------------------------------------------------------------------------------------
# Weights for another resolution


@pytest.mark.parametrize("size, new_size", [((3, 5), (7, 9)), ((7, 7), (3, 3)), ((2, 3), (4, 2))])
def test_resized_grid_keeps_shape_dtype_and_constants(size, new_size):
    resized = resize_grid(torch.full((math.prod(size), 4), 1.5, dtype=torch.bfloat16), size, new_size)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized, torch.full((math.prod(new_size), 4), 1.5, dtype=torch.bfloat16), **EXACT)


def test_grid_of_the_same_size_stays_bitwise():
    rows = torch.randn(15, 4)
    assert resize_grid(rows, (3, 5), (3, 5)) is rows


def test_resized_grid_has_rows_and_columns_in_their_places():
    """Away from the edges, slopes along rows and columns are preserved, if approximately: bicubic is not exact."""
    down, across = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-10.0, 11), indexing="ij")
    resized = resize_grid(torch.stack([down, across], dim=-1).reshape(-1, 2), (13, 21), (25, 43))
    new_down, new_across = resized.reshape(25, 43, 2).unbind(-1)
    expected_down = torch.arange(-12, 13)[:, None].expand(25, 43) * 13 / 25
    expected_across = torch.arange(-21, 22)[None].expand(25, 43) * 21 / 43
    inside = (slice(5, -5), slice(5, -5))
    torch.testing.assert_close(new_down[inside], expected_down[inside], rtol=0, atol=0.05)
    torch.testing.assert_close(new_across[inside], expected_across[inside], rtol=0, atol=0.05)
    assert (new_down[12, 21], new_across[12, 21]) == (0, 0)


@pytest.mark.parametrize("new_size", [16, (8, 12), 4], ids=str)
def test_weights_for_another_resolution_are_interpolated(new_size):
    source, target = build_transformer(), build_transformer(sample_size=new_size)
    weights, changes = adapt_weights(source, target)
    target.load_state_dict(weights)
    rows, columns = target.token_grid
    assert changes == [
        f"1 x position_embedding interpolated from 4 x 4 to {rows} x {columns} tokens",
        f"2 x relative_position_bias_table interpolated from 4 x 4 to {rows} x {columns} tokens",
    ]
    # The bias of a token on itself is the center of the table and must not change.
    tables = [model.blocks[1].attn.relative_position_bias_table for model in (source, target)]
    torch.testing.assert_close(*(table[len(table) // 2] for table in tables), rtol=0, atol=1e-6)
    untouched = [name for name in weights if "position" not in name]
    assert len(untouched) == len(weights) - 3
    for name in untouched:
        torch.testing.assert_close(weights[name], source.state_dict()[name], **EXACT)


def test_bias_tables_keep_rows_and_columns_apart():
    source, target = build_transformer(), build_transformer(sample_size=(8, 12))
    by_row = torch.arange(7.0)[:, None, None]  # depends on the row offset alone
    with torch.no_grad():
        source.blocks[0].attn.relative_position_bias_table.copy_(by_row.expand(7, 7, 2).flatten(0, 1))
    table = adapt_weights(source, target)[0]["blocks.0.attn.relative_position_bias_table"]
    torch.testing.assert_close(table.reshape(7, 11, 2), by_row.expand(7, 11, 2), **FLOAT32)


def test_positions_of_a_finer_grid_lie_between_those_of_the_coarser():
    source, target = build_transformer(sample_size=16), build_transformer(sample_size=32)
    positions = adapt_weights(source, target)[0]["position_embedding"]
    halfway = (torch.arange(16).float() + 0.5) / 2 - 0.5  # centers of the finer patches in units of the coarser ones
    row = positions.reshape(16, 16, 16)[6, :, 4:8]  # cosines of the column
    expected = torch.cos(halfway[:, None] / 10000 ** (torch.arange(4) / 4))
    torch.testing.assert_close(row[3:-3], expected[3:-3], rtol=0, atol=0.05)


def test_unet_with_global_attention_adapts_to_another_resolution():
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 2, "layers_per_block": 1}
    source, target = (DiffiTUNet2DModel(sample_size=n, window_size=None, **config) for n in (8, 16))
    weights, changes = adapt_weights(source, target)
    target.load_state_dict(weights)
    assert changes == [
        "2 x relative_position_bias_table interpolated from 8 x 8 to 16 x 16 tokens",
        "1 x relative_position_bias_table interpolated from 4 x 4 to 8 x 8 tokens",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Weights for other classes


def build_unet(num_classes: int | None, **kwargs) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 2, "layers_per_block": 1}
    config |= {"in_channels": 4, "out_channels": 8, "num_class_embeds": num_classes, "zero_init_output": False}
    return DiffiTUNet2DModel(8, **config | kwargs).eval()


@pytest.mark.parametrize(
    "build", [build_unet, lambda n: build_transformer(num_embeds_ada_norm=n)], ids=["unet", "transformer"]
)
@pytest.mark.parametrize(
    "old, new, reset, change",
    [
        (3, 3, False, None),
        (3, 5, False, "5 class embeddings re-initialized, null class kept"),
        (3, 3, True, "3 class embeddings re-initialized, null class kept"),
        (None, 3, False, "3 class embeddings initialized, null class set to zero"),
        (3, None, False, "class embeddings dropped, null class folded into the time embedding"),
        (None, None, True, None),
    ],
)
def test_null_class_prediction_does_not_depend_on_the_classes(build, old, new, reset, change):
    source, target = build(old), build(new)
    before = copy.deepcopy(source.state_dict())
    weights, changes = adapt_weights(source, target, reset_class_embeddings=reset)
    assert changes == ([change] if change else [])
    own_rows = target.class_embedding.weight[:-1].detach().clone() if new else None
    target.load_state_dict(weights)
    torch.testing.assert_close(predict(target), predict(source), rtol=0, atol=1e-6)
    torch.testing.assert_close(source.state_dict(), before, **EXACT)
    if new and change:
        torch.testing.assert_close(target.class_embedding.weight[:-1].detach(), own_rows, **EXACT)


@pytest.mark.parametrize(
    "old, new, change", [(9, None, "dropped"), (None, 9, "added with weights of zero"), (9, 9, None)], ids=str
)
def test_adding_or_dropping_augment_labels_keeps_predictions(old, new, change):
    source, target = (build_unet(3, num_augment_labels=number) for number in (old, new))
    weights, changes = adapt_weights(source, target)
    assert changes == ([f"augmentation labels {change}"] if change else [])
    target.load_state_dict(weights)
    torch.testing.assert_close(predict(target), predict(source), **EXACT)


def test_new_class_rows_are_initialized():
    source, target = build_transformer(), build_transformer(seed=1, num_embeds_ada_norm=2000)
    rows = adapt_weights(source, target)[0]["class_embedding.weight"]
    assert rows[:-1].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_layers": 3}, r"blocks\.2\.attn\.proj\.bias \(has nothing, needs \(16,\)\)"),
        ({"in_channels": 3}, r"patch_embedding\.weight \(has \(16, 4, 2, 2\), needs \(16, 3, 2, 2\)\)"),
        ({"out_channels": 12}, r"2 weights do not fit the network: proj_out\.bias"),
        ({"attention_head_dim": 6}, "do not fit the network"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_listed(overrides, message):
    with pytest.raises(ValueError, match=message):
        adapt_weights(build_transformer(), build_transformer(**overrides))
