# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""NVIDIA's layout through the converter: against formulas, there and back, and in diffusers' pipeline."""

import filecmp
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file

from convert_nvidia_checkpoint import main, nvidia_names, parse_args
from diffit.errors import UserError
from diffit.networks import adapt_weights, model_class
from diffit_model import DiffiTTransformer2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import NVIDIA_SIZES, ROOT, mentions, nvidia_tensors, run, tiny_vae

EXACT = {"rtol": 0, "atol": 0}
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}

CASES = {
    "28_blocks": {"depth": 28, "width": 32, "heads": 4, "mlp": 128},
    "fewer_classes": {"classes": 10, "in_channels": 3, "out_channels": 3},
    "pixels_as_patches": {"patch": 1, "side": 5, "heads": 3, "in_channels": 1, "out_channels": 2},
    "large_patches": {"patch": 4, "side": 3, "mlp": 60},
    "one_block_narrow_heads": {"depth": 1, "width": 16, "heads": 16, "side": 1, "mlp": 64},
}


def reference(
    tensors: dict[str, torch.Tensor], latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The latent model, section 3.3, on tensors in NVIDIA's layout, with nothing of Eq. 3-6 left out.

    Latents (B, C, H, W), timesteps (B), labels (B) to (B, out_channels, H, W), all in the dtype of the tensors.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", x, tensors[f"{name}.weight"]) + tensors[f"{name}.bias"]

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def swish(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + (-x).exp())

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    patch_weight = tensors["x_embedder.proj.weight"]
    width, _, patch, _ = patch_weight.shape
    height_in_patches, width_in_patches = (side // patch for side in latents.shape[-2:])

    # tokens, row by row, and where they are
    x = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, rows, p, columns, p)
    x = torch.einsum("bcrysx,dcyx->brsd", x, patch_weight) + tensors["x_embedder.proj.bias"]
    x = x.flatten(1, 2) + tensors["pos_embed"]  # (B, N, D)

    # time token: sinusoids in float32, cosines first
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = timesteps.float()[:, None] * frequencies  # (B, 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)  # (B, 256)
    time_token = linear(swish(linear(sinusoids, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    time_token = time_token + tensors["y_embedder.embedding_table.weight"][labels]  # (B, D)

    depth = sum(name.endswith("mlp.fc1.weight") for name in tensors)
    for block in (f"blocks.{i}" for i in range(depth)):
        table = tensors[f"{block}.attn.relative_position_bias_table"]
        heads = table.shape[1]
        qkv = linear(layer_norm(x), f"{block}.attn.qkv")  # (B, N, 3 D)
        qkv = qkv + linear(time_token, f"{block}.attn.qkv_temb")[:, None]  # Eq. 3-5
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # 3 x (B, N, h, d)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width / heads)
        logits = logits + table[tensors[f"{block}.attn.relative_position_index"]].permute(2, 0, 1)  # Eq. 6
        attended = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj")  # Eq. 7
        x = x + linear(gelu(linear(layer_norm(x), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")  # Eq. 8

    x = linear(swish(layer_norm(x)), "final_layer.linear")  # (B, N, p * p * out_channels)
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height_in_patches, width_in_patches))
    return torch.einsum("brsyxc->bcrysx", x).flatten(4).flatten(2, 3)


def inputs_of(tensors: dict[str, torch.Tensor], batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps over the whole range, and labels, the first of which is the null class."""
    side = math.isqrt(tensors["pos_embed"].shape[1]) * tensors["x_embedder.proj.weight"].shape[-1]
    generator = torch.Generator().manual_seed(1)
    shape = (batch, tensors["x_embedder.proj.weight"].shape[1], side, side)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64).to(tensors["pos_embed"].dtype)
    null = len(tensors["y_embedder.embedding_table.weight"]) - 1
    return latents, torch.linspace(0, 999, batch).long(), torch.linspace(null, 0, batch).long()


def convert(tensors: dict[str, torch.Tensor], tmp_path, *flags: str):
    """Runs the converter on these tensors and returns the folder it wrote."""
    save_file(tensors, tmp_path / "diffit.safetensors")
    folder = tmp_path / "converted"
    main(parse_args([f"--checkpoint={tmp_path / 'diffit.safetensors'}", f"--output_dir={folder}", *flags]))
    return folder


def convert_back(folder, tmp_path) -> dict[str, torch.Tensor]:
    main(parse_args(["--to_nvidia", f"--checkpoint={folder}", f"--output_dir={tmp_path / 'back'}"]))
    return load_file(tmp_path / "back" / "diffit.safetensors")


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> DiffiTTransformer2DModel:
    return DiffiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_converted_network_equals_the_formulas(tmp_path, case, dtype):
    tensors = nvidia_tensors(dtype, **CASES[case])
    model = load_transformer(convert(tensors, tmp_path), dtype)
    inputs = inputs_of(tensors)
    expected = reference(tensors, *inputs)
    assert expected.std() > 0.3
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["pos_embed", "y_embedder.embedding_table.weight", "blocks.1.attn.qkv_temb.weight"])
def test_reference_notices_a_changed_tensor(name):
    tensors = nvidia_tensors()
    inputs = inputs_of(tensors)
    expected = reference(tensors, *inputs)
    assert (reference(tensors | {name: tensors[name].roll(1, 0) * 1.01}, *inputs) - expected).abs().max() > 1e-3


def test_28_blocks_have_the_346_keys_of_the_released_files():
    tensors = nvidia_tensors(**CASES["28_blocks"])
    assert len(tensors) == 346
    assert set(nvidia_names(28)) == tensors.keys()


@pytest.mark.parametrize("case", CASES)
def test_every_size_is_inferred_from_the_shapes(tmp_path, case):
    c = NVIDIA_SIZES | CASES[case]
    config = json.loads((convert(nvidia_tensors(**CASES[case]), tmp_path) / "transformer/config.json").read_text())
    expected = {
        "num_attention_heads": c["heads"],
        "attention_head_dim": c["width"] // c["heads"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "num_layers": c["depth"],
        "sample_size": c["side"] * c["patch"],
        "patch_size": c["patch"],
        "mlp_ratio": c["mlp"] / c["width"],
        "num_embeds_ada_norm": c["classes"],
    }
    assert expected.items() <= config.items()


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_conversion_there_and_back_is_bitwise(tmp_path, dtype):
    tensors = nvidia_tensors(dtype)
    back = convert_back(convert(tensors, tmp_path), tmp_path)
    assert back.keys() == tensors.keys()
    torch.testing.assert_close(back, tensors, **EXACT)


def test_trained_network_converts_back_and_forth(tmp_path):
    torch.manual_seed(0)
    model = DiffiTTransformer2DModel(2, 8, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    model.save_pretrained(tmp_path / "trained")
    weights = load_transformer(convert(convert_back(tmp_path / "trained", tmp_path), tmp_path)).state_dict()
    torch.testing.assert_close(weights, model.state_dict(), **EXACT)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"num_embeds_ada_norm": None}, [1, "y_embedder.embedding_table.weight"]),
        ({"sample_size": (8, 4)}, [21, 8]),
    ],
    ids=["unconditional", "not_square"],
)
def test_network_that_nvidias_layout_cannot_express_raises(tmp_path, overrides, words):
    config = {"num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 10} | overrides
    DiffiTTransformer2DModel(2, 8, **config).save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=mentions(*words)):
        convert_back(tmp_path / "trained", tmp_path)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("inside", ["", "transformer"], ids=["pipeline", "network"])
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction"},
        {"beta_start": 0.0015},
        {"beta_end": 0.0195},
        {"num_train_timesteps": 100},
        {"rescale_betas_zero_snr": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_objective_or_noise_schedule_is_refused_whichever_folder_is_given(tmp_path, settings, inside):
    network = DiffiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
    scheduler = DDIMScheduler(clip_sample=False, **settings)
    DiffiTPipeline(None, scheduler, transformer=network).save_pretrained(tmp_path / "model")
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=mentions("--to_nvidia", f"{name} {value}")):
        convert_back(tmp_path / "model" / inside, tmp_path)
    assert not (tmp_path / "back").exists()


def test_checkpoint_gives_its_first_average_which_is_said(tmp_path, capsys):
    """As in sampling, evaluation and fine-tuning. The folder of a network inside it gives that network."""
    checkpoint = tmp_path / "checkpoint-5"
    config = {"num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 3}
    names = ("transformer", "transformer_ema_0002kimg", "transformer_ema_0001kimg")
    models = {name: DiffiTTransformer2DModel(2, 8, **config) for name in names}
    for name, model in models.items():
        model.save_pretrained(checkpoint / name)
    (checkpoint / "state.json").write_text("{}")
    DDIMScheduler().save_pretrained(checkpoint / "scheduler")
    for folder, name in ((checkpoint, "transformer_ema_0001kimg"), (checkpoint / "transformer", "transformer")):
        weights = convert_back(folder, tmp_path)
        torch.testing.assert_close(weights["pos_embed"], models[name].position_embedding.detach(), **EXACT)
        assert mentions(f"{checkpoint / name}/diffusion_pytorch_model.safetensors").search(capsys.readouterr().out)
        shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize(
    ("file", "contents", "inside", "words"),
    [
        ("model_index.json", "[]", "transformer", ["model_index.json"]),
        ("model_index.json", "{", "transformer", ["model_index.json"]),
        ("scheduler/scheduler_config.json", "[1]", "", ["scheduler_config.json"]),
        ("transformer/diffusion_pytorch_model.safetensors", "x", "", ["diffusion_pytorch_model.safetensors"]),
        ("transformer/diffusion_pytorch_model.safetensors", None, "", ["diffusion_pytorch_model.safetensors"]),
    ],
)
def test_damaged_folder_is_named(tmp_path, file, contents, inside, words):
    network = DiffiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
    DiffiTPipeline(None, DDIMScheduler(), transformer=network).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).unlink() if contents is None else (tmp_path / "model" / file).write_text(contents)
    with pytest.raises(UserError, match=mentions("--checkpoint", *words)):
        convert_back(tmp_path / "model" / inside, tmp_path)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "change", [{"position_embedding": torch.ones(3)}, {"proj_out.bias": torch.full((32,), math.nan)}]
)
def test_weights_of_no_use_are_not_converted_back(tmp_path, change):
    network = DiffiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
    network.save_pretrained(tmp_path / "trained")
    save_file(network.state_dict() | change, tmp_path / "trained/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=mentions(f"--checkpoint {tmp_path / 'trained'}")):
        convert_back(tmp_path / "trained", tmp_path)
    assert not (tmp_path / "back").exists()


def test_checkpoint_of_another_objective_is_refused(tmp_path):
    network = DiffiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
    network.save_pretrained(tmp_path / "checkpoint-5" / "transformer_ema")
    (tmp_path / "checkpoint-5" / "state.json").write_text("{}")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "checkpoint-5" / "scheduler")
    with pytest.raises(UserError, match=mentions("--to_nvidia", "prediction_type v_prediction")):
        convert_back(tmp_path / "checkpoint-5", tmp_path)


def test_folder_without_a_scheduler_is_converted_and_that_is_said(tmp_path, capsys):
    network = DiffiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=3)
    network.save_pretrained(tmp_path / "trained")
    convert_back(tmp_path / "trained", tmp_path)
    assert mentions(f"--checkpoint {tmp_path / 'trained'}", "scheduler", "epsilon").search(capsys.readouterr().out)


def test_pt_file_converts_like_safetensors(tmp_path):
    tensors = nvidia_tensors()
    torch.save(tensors, tmp_path / "diffit.pt")
    main(parse_args([f"--checkpoint={tmp_path / 'diffit.pt'}", f"--output_dir={tmp_path / 'from_pt'}"]))
    expected = load_transformer(convert(tensors, tmp_path)).state_dict()
    torch.testing.assert_close(load_transformer(tmp_path / "from_pt").state_dict(), expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' own pipeline


def plain_ddim_images(
    tensors: dict[str, torch.Tensor],
    vae: AutoencoderKL,
    labels: list[int],
    guidance_scale: float,
    num_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """What `DiTPipeline` should give, written from the formulas: images in [0, 1], shape (B, 3, H, W)."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    latents = torch.randn(inputs_of(tensors, len(labels))[0].shape, generator=generator)
    labels, null = torch.tensor(labels), torch.full((len(labels),), 1000)
    for timestep in range(1000 - 1000 // num_steps, -1, -1000 // num_steps):
        timesteps = torch.full((len(labels),), timestep)
        noise = reference(tensors, latents, timesteps, labels)[:, :4]
        if guidance_scale > 1:
            unconditional = reference(tensors, latents, timesteps, null)[:, :4]
            noise = unconditional + guidance_scale * (noise - unconditional)
        alpha = alphas[timestep]
        next_alpha = alphas[timestep - 1000 // num_steps] if timestep > 0 else torch.tensor(1.0)
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        latents = next_alpha.sqrt() * clean + (1 - next_alpha).sqrt() * noise
    images = vae.decode(latents / vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["unguided", "guided"])
@torch.no_grad()
def test_dit_pipeline_samples_the_images_of_the_formulas(tmp_path, guidance_scale):
    tensors, vae = nvidia_tensors(), tiny_vae()
    tensors["final_layer.linear.weight"] *= 0.2  # noise of about unit variance, as a trained network has it
    vae.save_pretrained(tmp_path / "tiny_vae")
    folder = convert(tensors, tmp_path, f"--vae={tmp_path / 'tiny_vae'}")
    pipe = DiTPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe) is DiTPipeline and type(pipe.scheduler) is DDIMScheduler
    pipe.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 4}
    labels = [1, 999, 207]
    images = pipe(labels, **settings, generator=torch.Generator().manual_seed(3), output_type="pt").images
    expected = plain_ddim_images(tensors, vae, labels, guidance_scale, 4, torch.Generator().manual_seed(3))
    assert images.shape == (3, 3, 16, 16) and images.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)

    ours = DiffiTPipeline.from_folder(str(folder), model_class)
    ours.set_progress_bar_config(disable=True)
    images = ours(labels, **settings, generator=torch.Generator().manual_seed(3), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_folder_without_a_vae_loads_in_a_new_process_with_one(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "tiny_vae")
    folder = convert(nvidia_tensors(), tmp_path)
    assert not (folder / "vae").exists()
    code = f"""
from diffusers import AutoencoderKL, DiTPipeline
vae = AutoencoderKL.from_pretrained({str(tmp_path / "tiny_vae")!r})
pipe = DiTPipeline.from_pretrained({str(folder)!r}, vae=vae, trust_remote_code=True)
assert type(pipe) is DiTPipeline, type(pipe)
assert pipe.transformer.num_parameters() > 0 and pipe.vae is vae
print("size", pipe([5], num_inference_steps=2).images[0].size)
"""
    assert "size (16, 16)" in run(["-c", code], cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))


def test_schedule_is_that_of_the_paper(tmp_path):
    scheduler = DDIMScheduler.from_pretrained(convert(nvidia_tensors(), tmp_path), subfolder="scheduler")
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-5, atol=0)
    assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning from converted weights


def test_other_classes_leave_the_prediction_of_the_null_class(tmp_path):
    source = load_transformer(convert(nvidia_tensors(), tmp_path))
    torch.manual_seed(4)
    target = DiffiTTransformer2DModel.from_config(source.config, num_embeds_ada_norm=10).eval()
    weights, changes = adapt_weights(source, target)
    target.load_state_dict(weights)
    assert changes == ["10 class embeddings re-initialized, null class kept"]
    latents, timesteps, _ = inputs_of(nvidia_tensors())
    with torch.no_grad():
        predictions = [
            model(latents, timesteps, torch.full((3,), null)).sample for model, null in ((source, 1000), (target, 10))
        ]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


TABLE, INDEX = "blocks.0.attn.relative_position_bias_table", "blocks.0.attn.relative_position_index"
REFUSED = {
    "missing": (
        {"pos_embed": None, "blocks.1.attn.proj.bias": None},
        [2, "pos_embed, blocks.1.attn.proj.bias", 0],
    ),
    "unknown": (
        {"blocks.0.attn.norm.weight": torch.ones(1), "other": torch.ones(1)},
        [0, 2, "blocks.0.attn.norm.weight, other"],
    ),
    "gap_in_blocks": ({"blocks.3.mlp.fc1.bias": torch.ones(96)}, [23, "(blocks.2."]),
    "empty": (dict.fromkeys(nvidia_tensors()), [22, "pos_embed"]),
    "misfitting_shapes": (
        {"blocks.1.mlp.fc1.bias": torch.ones(95), "t_embedder.mlp.0.weight": torch.ones(24, 128)},
        ["blocks.1.mlp.fc1.bias", "(95,)", "(96,)"],
    ),
    "another_number_of_dimensions": ({"x_embedder.proj.weight": torch.ones(24, 16)}, ["x_embedder.proj.weight", 4]),
    "table_of_another_grid": ({TABLE: torch.ones(25, 2)}, [25, 16]),
    "table_of_no_square_grid": ({TABLE: torch.ones(48, 2)}, [48]),
    "heads_that_do_not_divide": ({TABLE: torch.ones(49, 7)}, [24, 7]),
    "index_of_another_order": (
        {"blocks.1.attn.relative_position_index": torch.arange(16)[None] - torch.arange(16)[:, None] + 24},
        ["blocks.1.attn.relative_position_index", "4 x 4"],
    ),
    "no_elements": ({TABLE: torch.ones(49, 0)}, [TABLE, "(49, 0)"]),
    "patches_of_no_pixels": ({"x_embedder.proj.weight": torch.ones(24, 4, 0, 0)}, ["x_embedder.proj.weight"]),
    "integers": (
        {name: tensor.to(torch.int8) for name, tensor in nvidia_tensors().items() if "index" not in name},
        ["torch.int8", "29 more"],
    ),
    "index_of_another_dtype": ({INDEX: nvidia_tensors()[INDEX].int()}, [INDEX, "torch.int32", "torch.int64"]),
    "nan": ({TABLE: torch.full((49, 2), math.nan)}, [TABLE, "NaN"]),
    "infinite": ({"pos_embed": torch.full((1, 16, 24), -math.inf)}, ["pos_embed", "infinite"]),
    "far_block": ({"blocks.9999.x": torch.ones(1)}, [12 * 9998, 1, "blocks.9999.x"]),
    "block_beyond_any_network": ({f"blocks.{5000 * '1'}.x": torch.ones(1)}, [0, 1, "blocks." + 93 * "1"]),
    "more_tokens_than_the_index_has": (  # the index of a grid this large would take 34 GB
        {
            "pos_embed": torch.ones(1, 2**16, 1),
            **{f"blocks.{i}.attn.relative_position_bias_table": torch.ones(511**2, 2) for i in range(2)},
        },
        ["relative_position_index", "256 x 256"],
    ),
    "no_channels": (
        {"final_layer.linear.weight": torch.ones(1, 24), "final_layer.linear.bias": torch.ones(1)},
        ["out_channels", 0],
    ),
    "no_classes": ({"y_embedder.embedding_table.weight": torch.ones(1, 24)}, ["num_embeds_ada_norm"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_checkpoint_is_one_short_line_and_writes_nothing(tmp_path, case):
    changes, words = REFUSED[case]
    tensors = nvidia_tensors() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(UserError, match=mentions(f"--checkpoint {tmp_path / 'diffit.safetensors'}", *words)) as error:
        convert(tensors, tmp_path)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    assert not (tmp_path / "converted").exists()


class Opener:
    """Unpickled without care, this would open a file."""

    def __reduce__(self):
        return open, ("/dev/null",)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"weight": Opener()}, ["diffit.pt", "UnpicklingError"]),
        ({"model": {"weight": torch.ones(1)}, "ema": {}}, ["diffit.pt", "model, ema"]),
        ([torch.ones(1)], ["diffit.pt", "list"]),
    ],
    ids=["code", "nested", "list"],
)
def test_pt_file_with_more_than_tensors_raises(tmp_path, content, words):
    torch.save(content, tmp_path / "diffit.pt")
    with pytest.raises(ValueError, match=mentions(*words)):
        main(parse_args([f"--checkpoint={tmp_path / 'diffit.pt'}", f"--output_dir={tmp_path / 'converted'}"]))


@pytest.mark.parametrize("suffix, save", [("safetensors", save_file), ("pt", torch.save)])
@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "half"])
def test_damaged_file_raises_with_its_name(tmp_path, suffix, save, share):
    file = tmp_path / f"diffit.{suffix}"
    save(nvidia_tensors(), file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=mentions(f"--checkpoint {file}")):
        main(parse_args([f"--checkpoint={file}", f"--output_dir={tmp_path / 'converted'}"]))


@pytest.mark.parametrize("flags", [[], ["--to_nvidia"]], ids=["from_nvidia", "to_nvidia"])
def test_missing_checkpoint_raises_with_its_name(tmp_path, flags):
    with pytest.raises(ValueError, match=mentions(f"--checkpoint {tmp_path / 'none.safetensors'}")):
        main(parse_args([f"--checkpoint={tmp_path / 'none.safetensors'}", f"--output_dir={tmp_path / 'out'}", *flags]))


def test_checkpoint_of_another_kind_raises(tmp_path):
    (tmp_path / "diffit.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=mentions("diffit.bin", ".safetensors", ".pt")):
        main(parse_args([f"--checkpoint={tmp_path / 'diffit.bin'}", f"--output_dir={tmp_path / 'out'}"]))


def test_vae_of_other_latents_raises_and_writes_nothing(tmp_path):
    tiny_vae(latent_channels=3).save_pretrained(tmp_path / "tiny_vae")
    with pytest.raises(ValueError, match=mentions("--vae", 3, 4)):
        convert(nvidia_tensors(), tmp_path, f"--vae={tmp_path / 'tiny_vae'}")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("config", [{"shift_factor": 0.1}, {"latents_std": (2.0,) * 4}])
def test_vae_whose_scaling_diffusers_pipeline_ignores_raises(config, tmp_path):
    tiny_vae(**config).save_pretrained(tmp_path / "tiny_vae")
    with pytest.raises(ValueError, match=mentions(f"--vae {tmp_path / 'tiny_vae'}", "DiTPipeline")):
        convert(nvidia_tensors(), tmp_path, f"--vae={tmp_path / 'tiny_vae'}")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--to_nvidia", "--vae=x", "--output_dir=out"], "--vae"),
        (["--output_dir=."], "--output_dir ."),
    ],
    ids=["vae_to_nvidia", "full_folder"],
)
def test_bad_flags_are_refused_with_their_name(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit):
        parse_args(["--checkpoint=diffit.safetensors", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "words"), [(["--help"], 0, ["--to_nvidia"]), (["--to_nvidia", "--vae=x"], 2, ["--vae"])]
)
def test_flags_are_answered_before_the_slow_imports_in_any_folder(flags, code, words, tmp_path):
    script = [str(ROOT / "convert_nvidia_checkpoint.py"), "--checkpoint=a", "--output_dir=b"]
    command = [sys.executable, "-X", "importtime", *script, *flags]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    imported = set(re.findall(r"\| +(\w+)$", process.stderr, re.MULTILINE))
    assert process.returncode == code and "argparse" in imported
    assert not imported & {"torch", "numpy", "safetensors", "diffusers", "diffit_model"}
    assert mentions(*words).search(process.stdout if code == 0 else process.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# At full size


@pytest.mark.slow
def test_conversion_of_the_561_million_parameters_takes_less_than_3_gb(tmp_path):
    save_file(
        nvidia_tensors(depth=28, width=1152, heads=16, side=16, mlp=4608),
        checkpoint := tmp_path / "diffit.safetensors",
    )
    code = """
import re, sys
from pathlib import Path
from convert_nvidia_checkpoint import main, parse_args
def peak():  # of this process alone, in bytes; getrusage has also that of the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
main(parse_args(sys.argv[1:]))
print("above the imports:", peak() - before)
"""
    there = ["-c", code, f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'converted'}"]
    back = ["-c", code, "--to_nvidia", f"--checkpoint={tmp_path / 'converted'}", f"--output_dir={tmp_path / 'back'}"]
    for command in (there, back):
        output = run(command)
        assert int(output.rsplit(maxsplit=1)[-1]) < 3e9, output
    assert filecmp.cmp(checkpoint, tmp_path / "back/diffit.safetensors", shallow=False)
    shutil.rmtree(tmp_path)  # 7 GB, which pytest would keep
