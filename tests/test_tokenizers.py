"""Autoencoders of other classes than `AutoencoderKL`: their latents, scaling and patches, and whole trainings."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderTiny, DDIMScheduler, Flux2Pipeline, ModelMixin

import prepare_latents
from diffit.errors import UserError
from diffit.latents import encode_moments, load_vae, sample_latents, vae_description
from diffit_model import DiffiTTransformer2DModel
from diffit_pipeline import DiffiTPipeline, decode_latents, latent_channels, latent_scaling, pixels_per_latent
from helpers import STATES, assert_same_files, generators, mentions, open_pipeline, quiet, sample, train


def tiny_flux2() -> AutoencoderKLFlux2:
    """Halves height and width, then folds patches of 2 x 2; its batch norm has statistics of their own."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKLFlux2(**blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2, sample_size=8)
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 8))
    return vae.eval()


def tiny_dc() -> AutoencoderDC:
    """Halves height and width; deterministic."""
    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (4, 8)}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    return AutoencoderDC(latent_channels=2, **sizes, **layers, **scales, scaling_factor=0.4).eval()


KINDS = {"flux2": tiny_flux2, "dc": tiny_dc}


@pytest.fixture(params=KINDS, scope="module")
def vae(request) -> ModelMixin:
    return KINDS[request.param]()


def images(count: int = 2, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_sizes_follow_from_the_class():
    assert (latent_channels(tiny_flux2()), pixels_per_latent(tiny_flux2())) == (8, 4)
    assert (latent_channels(tiny_dc()), pixels_per_latent(tiny_dc())) == (2, 2)


def test_flux2_latents_are_those_of_its_pipeline():
    vae = tiny_flux2()
    moments = encode_moments(vae, images())
    latents = sample_latents(moments, torch.zeros(2, 8, 2, 2), *latent_scaling(vae))
    folded = Flux2Pipeline._patchify_latents(vae.encode(images()).latent_dist.mode())
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    expected = (folded - vae.bn.running_mean.view(1, -1, 1, 1)) / std
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    # The log-variance belongs to the same latent as the mean.
    noise = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(2))
    sampled = sample_latents(moments, noise, *latent_scaling(vae))
    spread = Flux2Pipeline._patchify_latents(vae.encode(images()).latent_dist.std)
    torch.testing.assert_close(sampled, expected + spread * noise / std, rtol=1e-5, atol=1e-6)


def test_dc_latents_are_scaled_and_deterministic():
    vae = tiny_dc()
    moments = encode_moments(vae, images())
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = vae.encode(images()).latent * 0.4
    for posterior_noise in (noise, 0 * noise):
        latents = sample_latents(moments, posterior_noise, *latent_scaling(vae))
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_decoding_undoes_scaling_and_patches(vae):
    encoded = vae.encode(images())
    raw = encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode()
    moments = encode_moments(vae, images())
    latents = sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]), *latent_scaling(vae))
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_saved_pipeline_decodes_with_its_autoencoder(vae, tmp_path):
    sizes = {"in_channels": latent_channels(vae), "out_channels": latent_channels(vae), "sample_size": 4}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 10}
    torch.manual_seed(0)
    network = DiffiTTransformer2DModel(**sizes, **heads, patch_size=2).eval()
    arguments = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "pt"}
    pipeline = quiet(DiffiTPipeline(None, DDIMScheduler(), transformer=network, vae=vae))
    expected = pipeline(**arguments, generator=generators([0, 1])).images
    assert expected.shape == (2, 3, 4 * pixels_per_latent(vae), 4 * pixels_per_latent(vae))
    pipeline.save_pretrained(tmp_path)
    loaded = open_pipeline(tmp_path, scheduler="ddim")
    assert type(loaded.vae) is type(vae)
    loaded.scheduler = pipeline.scheduler
    loaded._trained_with = pipeline.scheduler
    torch.testing.assert_close(loaded(**arguments, generator=generators([0, 1])).images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_latents_train_and_resume_like_those_encoded_on_the_way(kind, base_args, image_folder, tmp_path):
    vae = KINDS[kind]()
    vae.save_pretrained(tmp_path / "vae")
    channels = latent_channels(vae)
    network = {"_class_name": "DiffiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8}
    network |= {"num_layers": 1, "patch_size": 1, "in_channels": channels, "out_channels": channels}
    (tmp_path / "network.json").write_text(json.dumps(network | {"sample_size": 8 // pixels_per_latent(vae)}))
    flags = [*base_args, f"--model_config={tmp_path / 'network.json'}", "--checkpointing_steps=2"]
    flags.append(f"--vae_model_name_or_path={tmp_path / 'vae'}")
    train([*flags, f"--output_dir={tmp_path / 'encoded'}"])

    prepared = [f"--vae_model_name_or_path={tmp_path / 'vae'}", f"--output_dir={tmp_path / 'latents'}"]
    source = [f"--train_data_dir={image_folder}", "--resolution=8", "--batch_size=4"]
    prepare_latents.main(prepare_latents.parse_args([*prepared, *source]))
    flags = [flag for flag in flags if not flag.startswith("--train_data_dir")]
    flags += [f"--latents_dir={tmp_path / 'latents'}", "--center_crop"]
    run = tmp_path / "prepared"
    train([*flags, f"--output_dir={run}", "--max_train_steps=2"])
    train([*flags, f"--output_dir={run}", "--resume_from_checkpoint=latest"])
    whole = tmp_path / "whole"
    train([*flags, f"--output_dir={whole}"])
    assert_same_files(
        run / "checkpoint-4", whole / "checkpoint-4", [name.replace("unet", "transformer") for name in STATES]
    )
    assert len(sample(run, tmp_path / "samples", "--seeds=0-2", "--class_labels=all")) == 3
    other = tiny_flux2() if kind == "dc" else tiny_dc()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError):
        train([*flags, f"--vae_model_name_or_path={tmp_path / 'other'}", f"--output_dir={tmp_path / 'refused'}"])


def test_description_changes_with_the_statistics_of_the_batch_norm():
    vae = tiny_flux2()
    before = vae_description(vae)
    vae.bn.running_mean += 1
    assert vae_description(vae)["encoder_digest"] != before["encoder_digest"]
    assert before["vae_class"] == "AutoencoderKLFlux2"


def test_other_autoencoders_are_refused_by_name(tmp_path: Path):
    AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions("AutoencoderTiny", "AutoencoderDC", tmp_path)):
        load_vae(str(tmp_path))
