# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Latents: `prepare_latents.py`, `diffit/latents.py`, and `train_vae.py`.

The VAEs are tiny real ones: 24 color images of 8 x 8 pixels become latents of 4 x 4 x 4. Where no tolerance stands,
equality is exact.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import prepare_latents
import train_vae
from diffit.decode import decode_image, normalize_pixels
from diffit.errors import BadImageError
from diffit.latents import (
    LatentDataset,
    LatentTable,
    encode_moments,
    load_latent_table,
    load_vae,
    sample_latents,
    vae_description,
    vae_latent_shape,
    warn_of_scale,
)
from diffit.networks import vae_on_meta
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import DIFFUSION, ImageDataset, PositionStream, position_generator, split_table
from diffit_pipeline import DiffiTPipeline, latent_scaling
from helpers import (
    NO_WORKERS,
    ROOT,
    batch_at,
    encode,
    mentions,
    noise_image,
    tiny_dit,
    tiny_vae,
    write_files,
)
from warm_start import WarmProcess, run_ranks

NUM_IMAGES = 24
SHARDS = [f"train-0000{number}-of-00003.parquet" for number in range(3)]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def shifted_vae(channels: int = 3, **config) -> AutoencoderKL:
    """A VAE with a scaling and a shift factor, for images with the given number of channels."""
    defaults = {"in_channels": channels, "out_channels": channels, "scaling_factor": 0.5, "shift_factor": 0.25}
    return tiny_vae(**(defaults | config))


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    shifted_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_flags(vae_dir, image_folder) -> list[str]:
    """Flags that write three shards in a second, without --output_dir; later flags override them."""
    return [
        f"--vae_model_name_or_path={vae_dir}",
        f"--train_data_dir={image_folder}",
        "--resolution=8",
        "--images_per_shard=10",
        "--batch_size=4",
        NO_WORKERS,
    ]


@pytest.fixture(scope="module")
def prepared_dir(base_flags, tmp_path_factory) -> Path:
    """Latents of all images of `image_folder` and their mirror images. Tests must not modify them."""
    return prepare(base_flags, tmp_path_factory.mktemp("latents") / "prepared")


def prepare(flags: list[str], output_dir: Path) -> Path:
    """Runs the script in this process."""
    prepare_latents.main(prepare_latents.parse_args([*flags, f"--output_dir={output_dir}"]))
    return output_dir


def open_latents(folder: Path) -> LatentTable:
    return load_latent_table(str(folder), cache_dir=str(folder.parent / "cache"))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "data").iterdir())}


def datasets_of_both_kinds(
    image_folder: Path, latents_dir: Path, random_flip: bool, on_bad_image: str = "error"
) -> tuple[ImageDataset, LatentDataset]:
    """Two data sets for the same training: one encodes on the fly, one reads prepared latents."""
    images = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    stream = PositionStream(len(images), seed=5)
    common = {"random_flip": random_flip, "on_bad_image": on_bad_image}
    on_the_fly = ImageDataset(images, stream, (8, 8), 3, center_crop=True, latent_shape=(4, 4, 4), **common)
    return on_the_fly, LatentDataset(open_latents(latents_dir), stream, **common)


def read_batch(dataset: ImageDataset | LatentDataset, positions: range) -> dict:
    batch = batch_at(dataset, positions)
    return batch.tensors() | {"bad_images": batch.bad_images}


# ---------------------------------------------------------------------------------------------------------------------
# The VAE


def test_sample_latents_equals_the_distribution_of_diffusers():
    """Log-variances beyond [-30, 20] are clamped in both."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(2, 8, 3, 5, generator=generator)
    moments[:, 4:] *= 30  # log-variances
    distribution = DiagonalGaussianDistribution(moments)
    expected = distribution.sample(generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    assert moments[:, 4:].min() < -30 and moments[:, 4:].max() > 20
    torch.testing.assert_close(sample_latents(moments, noise, 1.0), expected, rtol=0, atol=0)


def test_sample_latents_is_undone_as_a_pipeline_does_before_decoding():
    """In a pipeline: latents / scaling_factor + shift_factor. Tolerance: rounding of float32."""
    moments = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, torch.zeros(2, 4, 3, 5), scaling_factor=0.18215, shift_factor=0.1)
    torch.testing.assert_close(latents / 0.18215 + 0.1, moments[:, :4], rtol=0, atol=1e-6)


def test_encoded_moments_are_those_of_the_posterior(vae_dir):
    vae = load_vae(str(vae_dir))
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(images).latent_dist
    moments = encode_moments(vae, images)
    assert moments.shape == (2, *(8, 4, 6)) and not moments.requires_grad
    torch.testing.assert_close(moments[:, :4], posterior.mean, rtol=0, atol=0)
    torch.testing.assert_close(moments[:, 4:], posterior.logvar, rtol=0, atol=0)


def test_latent_shape_is_that_of_the_encoder(vae_dir):
    vae = load_vae(str(vae_dir))
    assert vae_latent_shape(vae, (8, 12)) == tuple(vae.encode(torch.zeros(1, 3, 8, 12)).latent_dist.mean.shape[1:])


def test_resolution_that_the_vae_cannot_divide_is_refused(vae_dir):
    with pytest.raises(ValueError, match=mentions("--resolution 8x13", 2)):
        vae_latent_shape(load_vae(str(vae_dir)), (8, 13))


def test_folder_without_a_vae_is_refused(tmp_path):
    with pytest.raises(ValueError, match=mentions(f"--vae_model_name_or_path {tmp_path}")):
        load_vae(str(tmp_path))


def test_description_depends_on_the_encoder_and_not_on_the_decoder():
    vae = shifted_vae()
    description = vae_description(vae)
    assert (description["scaling_factor"], description["shift_factor"]) == (0.5, 0.25)
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    assert vae_description(vae) == description
    vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-6
    assert vae_description(vae)["encoder_digest"] != description["encoder_digest"]


def test_description_of_a_vae_without_shift_has_the_shift_zero():
    assert vae_description(shifted_vae(shift_factor=None))["shift_factor"] == 0.0


STATISTICS = {"latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (2.0, 0.5, 1.0, 4.0), "shift_factor": None}


def test_mean_and_std_of_a_vae_are_applied_per_channel_and_undone_before_decoding(tmp_path):
    """As in diffusers' Stable Diffusion XL: (z - mean) * scaling_factor / std, and back."""
    vae = shifted_vae(**STATISTICS)
    moments = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, torch.zeros(2, 4, 4, 4), *latent_scaling(vae))
    mean, std = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (moments[:, :4] - mean) * 0.5 / std)

    transformer = tiny_dit(num_embeds_ada_norm=3)
    pipeline = DiffiTPipeline(None, DDIMScheduler(), transformer=transformer, vae=vae)
    with torch.no_grad():
        images = vae.decode(moments[:, :4]).sample
        torch.testing.assert_close(pipeline._decode(latents), images / 2 + 0.5, rtol=1e-5, atol=1e-5)


def test_mean_and_std_of_a_vae_are_part_of_its_description():
    description = vae_description(shifted_vae(**STATISTICS))
    assert description["latents_mean"] == [0.1, -0.2, 0.3, 0.0] and description["latents_std"] == [2.0, 0.5, 1.0, 4.0]
    assert vae_description(shifted_vae()).keys() == {"encoder_digest", "scaling_factor", "shift_factor"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"latents_mean": (0.1,)}, ["latents_mean", 1, 4]),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, ["latents_std"]),
        ({"latents_mean": (0.1,) * 4}, ["latents_mean", "shift_factor 0.25"]),
        ({"latents_mean": 0.1}, ["latents_mean", 0.1]),
        ({"latents_mean": ("a",) * 4, "shift_factor": None}, ["latents_mean", "'a'"]),
        ({"latents_std": (1.0, math.nan, 1.0, 1.0)}, ["latents_std", "nan"]),
        ({"scaling_factor": 0.0}, ["scaling_factor", "0.0"]),
        ({"scaling_factor": "0.18"}, ["scaling_factor", "'0.18'"]),
        ({"scaling_factor": None}, ["scaling_factor", None]),
        ({"shift_factor": math.inf}, ["shift_factor", "inf"]),
    ],
)
def test_scaling_that_contradicts_itself_is_refused(config, words, tmp_path):
    shifted_vae(**config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=mentions(f"--vae_model_name_or_path {tmp_path}", *words)):
        load_vae(str(tmp_path))
    with pytest.raises(ValueError, match=mentions("--vae_model_name_or_path", *words)):
        vae_on_meta(str(tmp_path))


def test_pipeline_in_place_of_its_vae_is_refused_with_the_folder_to_give(vae_dir, tmp_path):
    transformer = tiny_dit(num_embeds_ada_norm=3)
    vae = load_vae(str(vae_dir))
    DiffiTPipeline(None, DDIMScheduler(), transformer=transformer, vae=vae).save_pretrained(tmp_path)
    for load in (load_vae, vae_on_meta):
        with pytest.raises(ValueError, match=mentions(f"--vae_model_name_or_path {tmp_path}", tmp_path / "vae")):
            load(str(tmp_path))
        with pytest.raises(ValueError, match=mentions("--vae_model_name_or_path", vae_dir / "config.json", "file")):
            load(str(vae_dir / "config.json"))


@pytest.mark.parametrize("config", ["[]", "{}", '{"_class_name": "AutoencoderKL", "down_block_types": ["Unknown"]}'])
def test_vae_config_that_makes_no_vae_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=mentions(f"--vae_model_name_or_path {tmp_path}")):
        vae_on_meta(str(tmp_path))


def test_vae_with_weights_that_are_not_finite_is_refused(tmp_path):
    vae = shifted_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = torch.inf
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=mentions(f"--vae_model_name_or_path {tmp_path}", 1, "quant_conv.bias")):
        load_vae(str(tmp_path))


def test_autoencoder_of_another_class_is_refused_with_its_name(tmp_path):
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae.save_pretrained(tmp_path / "vae")
    for load in (load_vae, vae_on_meta):
        with pytest.raises(ValueError, match=mentions(tmp_path / "vae", "AutoencoderTiny", "AutoencoderKL")):
            load(str(tmp_path / "vae"))
    with pytest.raises(ValueError, match=mentions("AutoencoderTiny", "AutoencoderKL")):
        DiffiTPipeline(None, DDIMScheduler(), transformer=tiny_dit(), vae=vae)
    DiffiTPipeline(None, DDIMScheduler(), transformer=tiny_dit()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=mentions(tmp_path, "AutoencoderTiny")):
        DiffiTPipeline.from_folder(str(tmp_path), lambda config: DiTTransformer2DModel)


@pytest.mark.parametrize(("std", "warned"), [(0.45, True), (0.55, False), (1.9, False), (2.1, True)])
def test_latents_whose_scale_is_unusual_are_reported_with_the_number(std, warned, caplog):
    PartialState()  # for the log
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    warn_of_scale(latents / latents.std() * std, shifted_vae())
    assert bool(mentions(f"{std:.3g}", "scaling_factor").search(caplog.text)) is warned


def test_preparing_reports_the_scale_of_the_first_batch(base_flags, tmp_path, caplog):
    shifted_vae(scaling_factor=1000.0).save_pretrained(tmp_path / "vae")
    prepare([*base_flags, f"--vae_model_name_or_path={tmp_path / 'vae'}"], tmp_path / "latents")
    warnings = [record for record in caplog.records if "standard deviation" in record.message]
    assert len(warnings) == 1 and str(tmp_path / "vae") in warnings[0].message


# ---------------------------------------------------------------------------------------------------------------------
# The stream


def test_latent_training_does_not_change_pixel_space_numbers(image_folder):
    """Without `latent_shape` only time, dropout and noise of the image's shape are sampled."""
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    stream = PositionStream(NUM_IMAGES, seed=5)
    item = ImageDataset(table, stream, (8, 8), 3)[(7, 0)]
    rng = position_generator(5, 7, DIFFUSION)
    assert item["time_uniform"] == rng.random(dtype=np.float32)
    assert item["dropout_uniform"] == rng.random(dtype=np.float32)
    np.testing.assert_array_equal(item["noise"], rng.standard_normal((3, 8, 8), dtype=np.float32))
    assert "posterior_noise" not in item

    in_latents = ImageDataset(table, stream, (8, 8), 3, latent_shape=(4, 4, 4))[(7, 0)]
    for name in ("time_uniform", "dropout_uniform", "pixel_values"):
        torch.testing.assert_close(in_latents[name], item[name], rtol=0, atol=0)


def test_noise_and_posterior_noise_are_independent_latents(image_folder):
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    item = ImageDataset(table, PositionStream(NUM_IMAGES, seed=5), (8, 8), 3, latent_shape=(4, 2, 6))[(7, 0)]
    assert item["noise"].shape == item["posterior_noise"].shape == (4, 2, 6)
    assert not torch.equal(item["noise"], item["posterior_noise"])


@pytest.mark.parametrize("random_flip", [False, True])
def test_prepared_latents_train_like_those_encoded_on_the_fly(image_folder, prepared_dir, vae_dir, random_flip):
    """Two epochs: equal random numbers; latents equal to 1e-5, since another batch size sums in another order."""
    on_the_fly, prepared = datasets_of_both_kinds(image_folder, prepared_dir, random_flip)
    vae = load_vae(str(vae_dir))
    expected, batch = (read_batch(dataset, range(2 * NUM_IMAGES)) for dataset in (on_the_fly, prepared))
    assert batch.keys() - expected.keys() == {"moments"} and expected.keys() - batch.keys() == {"pixel_values"}
    for name in ("position", "class_labels", "noise", "time_uniform", "dropout_uniform", "posterior_noise"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    moments = encode_moments(vae, normalize_pixels(expected["pixel_values"]))
    torch.testing.assert_close(batch["moments"], moments, rtol=0, atol=1e-5)
    factors = (vae.config.scaling_factor, vae.config.shift_factor)
    torch.testing.assert_close(
        sample_latents(batch["moments"], batch["posterior_noise"], *factors),
        sample_latents(moments, expected["posterior_noise"], *factors),
        rtol=0,
        atol=1e-5,
    )


def test_random_flip_uses_the_moments_of_the_mirrored_image(image_folder, prepared_dir):
    on_the_fly, prepared = datasets_of_both_kinds(image_folder, prepared_dir, random_flip=True)
    flips = []
    for position in range(NUM_IMAGES):
        index = prepared.stream.index(position)
        plain = decode_image(*on_the_fly.table.read(index), (8, 8), 3)
        pixels = normalize_pixels(on_the_fly[(position, index)]["pixel_values"])
        flips.append(torch.equal(pixels, plain.flip(-1)))
        expected = prepared.table.read(index, mirrored=flips[-1])
        torch.testing.assert_close(prepared[(position, index)]["moments"], expected, rtol=0, atol=0)
    assert 0 < sum(flips) < NUM_IMAGES


def test_random_flip_without_mirror_images_is_refused(base_flags, tmp_path):
    table = open_latents(prepare([*base_flags, "--no-mirror"], tmp_path / "latents"))
    assert "mirrored_moments" not in table.rows.features
    with pytest.raises(ValueError, match=mentions("--random_flip", tmp_path / "latents", "--no-mirror")):
        LatentDataset(table, PositionStream(NUM_IMAGES, seed=5), random_flip=True)


def test_held_out_images_are_the_same_with_and_without_prepared_latents(image_folder, prepared_dir):
    images, latents = load_image_table(SourceConfig(train_data_dir=str(image_folder))), open_latents(prepared_dir)
    for of_images, of_latents in zip(split_table(images, 0.25), split_table(latents, 0.25), strict=True):
        np.testing.assert_array_equal(of_latents.indices, of_images.indices)
        assert [of_latents.label(i) for i in range(len(of_latents))] == [
            of_images.label(i) for i in range(len(of_images))
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Preparing


def test_rows_are_the_encoded_images_and_their_mirror_images_in_order(image_folder, prepared_dir, vae_dir):
    """Also across shards. Tolerance 1e-5, since another batch size sums in another order."""
    images, latents = load_image_table(SourceConfig(train_data_dir=str(image_folder))), open_latents(prepared_dir)
    pixels = torch.stack([decode_image(*images.read(index), (8, 8), 3) for index in range(NUM_IMAGES)])
    vae = load_vae(str(vae_dir))
    for mirrored in (False, True):
        expected = encode_moments(vae, pixels.flip(-1) if mirrored else pixels)
        got = torch.stack([latents.read(index, mirrored) for index in range(NUM_IMAGES)])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert latents.class_names == images.class_names == ("blue", "green", "red")
    assert [latents.label(i) for i in range(NUM_IMAGES)] == [images.label(i) for i in range(NUM_IMAGES)]


def test_datasets_reads_the_folder(prepared_dir, tmp_path):
    rows = load_dataset(str(prepared_dir), split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == NUM_IMAGES
    assert rows.features["moments"].shape == rows.features["mirrored_moments"].shape == (8, 4, 4)
    assert rows.features["label"].names == ["blue", "green", "red"]


def test_folder_holds_the_shards_and_the_metadata_and_nothing_else(prepared_dir, image_folder, vae_dir):
    files = sorted(path.name for path in prepared_dir.rglob("*") if path.is_file())
    assert files == [".diffit.json", "latents.json", *SHARDS]
    metadata = json.loads((prepared_dir / "latents.json").read_text())
    assert metadata == vae_description(load_vae(str(vae_dir))) | {
        "vae": str(vae_dir),
        "resolution": [8, 8],
        "latent_shape": [4, 4, 4],
        "mirrored": True,
        "source": str(image_folder),
        "num_images": NUM_IMAGES,
        "data_digest": load_image_table(SourceConfig(train_data_dir=str(image_folder))).data_digest(),
        "images_per_shard": 10,
        "allow_tf32": False,
    }


def test_images_without_labels_give_latents_without(base_flags, image_folder, tmp_path):
    table = open_latents(prepare([*base_flags, f"--train_data_dir={image_folder / 'red'}"], tmp_path / "latents"))
    assert table.class_names is None and len(table) == 8
    assert "class_labels" not in LatentDataset(table, PositionStream(8, seed=0))[(0, 0)]


def test_grayscale_vae_and_images_that_are_not_square(base_flags, tmp_path):
    shifted_vae(channels=1).save_pretrained(tmp_path / "vae")
    flags = [*base_flags, f"--vae_model_name_or_path={tmp_path / 'vae'}", "--resolution=4x8"]
    assert open_latents(prepare(flags, tmp_path / "latents")).read(0).shape == (8, 2, 4)


def test_two_processes_prepare_the_same_bytes_as_one(base_flags, prepared_dir, tmp_path):
    output_dir = tmp_path / "latents"
    command = ["prepare_latents.py", *base_flags, f"--output_dir={output_dir}"]
    codes, output = run_ranks(command, command)
    assert codes == [0, 0], output
    assert mentions("24 images", "3 shards", "3", output_dir).search(output)
    assert shard_bytes(output_dir) == shard_bytes(prepared_dir)
    assert (output_dir / "latents.json").read_text() == (prepared_dir / "latents.json").read_text()


def test_killed_run_goes_on_where_it_was_killed(tmp_path):
    """After a SIGKILL complete shards are kept, and the result is that of an undisturbed run."""
    shifted_vae(channels=1).save_pretrained(tmp_path / "vae")
    flags = [f"--vae_model_name_or_path={tmp_path / 'vae'}", f"--train_data_file={ROOT / 'data/digits.parquet'}"]
    flags += ["--resolution=8", "--images_per_shard=20", "--no-mirror", f"--cache_dir={tmp_path / 'cache'}"]
    killed = tmp_path / "killed"
    process = WarmProcess(["prepare_latents.py", *flags, f"--output_dir={killed}"])
    deadline = time.monotonic() + 60
    while not list(killed.glob("data/train-00002-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = {file: file.stat().st_mtime_ns for file in killed.glob("data/train-*")}
    assert 3 <= len(kept) < 90
    with pytest.raises(ValueError, match=mentions(f"--latents_dir {killed}", 90 - len(kept), 90, "data/train-")):
        open_latents(killed)

    prepare(flags, killed)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert shard_bytes(killed) == shard_bytes(prepare(flags, tmp_path / "whole"))


def test_unfinished_shard_of_a_killed_run_is_overwritten(base_flags, prepared_dir, tmp_path):
    output_dir = tmp_path / "latents"
    shutil.copytree(prepared_dir, output_dir)
    (output_dir / "data" / SHARDS[1]).rename(output_dir / "data" / f".{SHARDS[1]}.tmp")
    prepare(base_flags, output_dir)
    assert shard_bytes(output_dir) == shard_bytes(prepared_dir)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resolution=4x8"], ["resolution", "[8, 8]", "[4, 8]", "latent_shape", "[4, 4, 4]"]),
        (["--no-mirror"], ["mirrored", True, False]),
        (["--images_per_shard=12"], ["images_per_shard", 10, 12]),
        (["--train_data_dir={image_folder}/red"], ["num_images", 24, 8, "data_digest"]),
        (["--vae_model_name_or_path={other_vae}"], ["encoder_digest", "scaling_factor", 0.5, 0.7]),
    ],
)
def test_other_flags_for_the_same_folder_are_refused(flags, words, base_flags, prepared_dir, image_folder, tmp_path):
    other = shifted_vae(scaling_factor=0.7)
    torch.nn.init.zeros_(other.encoder.conv_in.weight)
    other.save_pretrained(tmp_path / "vae")
    flags = [flag.format(image_folder=image_folder, other_vae=tmp_path / "vae") for flag in flags]
    before = shard_bytes(prepared_dir)
    with pytest.raises(ValueError, match=mentions(f"--output_dir {prepared_dir}", *words)):
        prepare([*base_flags, *flags], prepared_dir)
    assert shard_bytes(prepared_dir) == before


def test_data_and_vae_may_have_moved_between_runs(base_flags, prepared_dir, image_folder, vae_dir, tmp_path):
    for name, folder in {"latents": prepared_dir, "vae": vae_dir, "images": image_folder}.items():
        shutil.copytree(folder, tmp_path / name)
    moved = [f"--train_data_dir={tmp_path / 'images'}", f"--vae_model_name_or_path={tmp_path / 'vae'}"]
    prepare([*base_flags, *moved], tmp_path / "latents")


@pytest.mark.parametrize("flag", ["--batch_size=0", "--images_per_shard=-1", "--resolution=0"])
def test_numbers_that_make_no_sense_are_refused(flag, base_flags, capsys):
    with pytest.raises(SystemExit):
        prepare_latents.parse_args([*base_flags, "--output_dir=nowhere", flag])
    assert flag.split("=")[0] in capsys.readouterr().err


REQUIRED = {
    "prepare_latents.py": ["--vae_model_name_or_path=a", "--output_dir=b", "--resolution=8", "--train_data_dir=c"],
    "train_vae.py": ["--output_dir=b", "--train_data_dir=c"],
}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--help"], 0, ["--cache_dir"]),
        (["--resolution=0"], 2, ["--resolution", "0"]),
        (["--dataset_name=d"], 2, ["--dataset_name d", "--train_data_dir c"]),
    ],
)
@pytest.mark.parametrize("script", REQUIRED)
def test_flags_are_answered_before_the_slow_imports_in_any_folder(script, flags, code, words, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *REQUIRED[script], *flags]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    imported = set(re.findall(r"\| +(\w+)$", process.stderr, re.MULTILINE))
    assert process.returncode == code and "argparse" in imported
    assert not imported & {"torch", "numpy", "accelerate", "datasets", "diffusers"}
    assert mentions(*words).search(process.stdout if code == 0 else process.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=mentions(f"--latents_dir {tmp_path}", "latents.json")):
        open_latents(tmp_path)


def test_damaged_shard_is_refused(prepared_dir, tmp_path):
    shutil.copytree(prepared_dir, tmp_path / "latents")
    file = tmp_path / "latents/data" / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=mentions(file.name)):
        open_latents(tmp_path / "latents")


@pytest.mark.parametrize("change", [{"num_images": 25}, {"latent_shape": [4, 4, 5]}, {"mirrored": False}])
def test_shards_that_are_not_what_the_metadata_says_are_refused(change, prepared_dir, tmp_path):
    shutil.copytree(prepared_dir, tmp_path / "latents")
    file = tmp_path / "latents/latents.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=mentions(f"--latents_dir {tmp_path / 'latents'}", "24 rows", "latents.json")):
        open_latents(tmp_path / "latents")


@pytest.mark.parametrize("change", [{"num_images": "24"}, {"latent_shape": None}])
def test_metadata_of_another_kind_is_refused(change, prepared_dir, tmp_path):
    shutil.copytree(prepared_dir, tmp_path / "latents")
    file = tmp_path / "latents/latents.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=mentions("latents.json", *change, *change.values())):
        open_latents(tmp_path / "latents")


def test_digest_tells_latents_apart(prepared_dir, base_flags, image_folder, tmp_path):
    table = open_latents(prepared_dir)
    assert table.digest() == open_latents(prepared_dir).digest()
    shutil.copytree(image_folder, tmp_path / "images")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images/blue/0.png")
    other = prepare([*base_flags, f"--train_data_dir={tmp_path / 'images'}"], tmp_path / "latents")
    assert open_latents(other).digest() != table.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Bad images


@pytest.fixture
def damaged_folder(image_folder, tmp_path) -> Path:
    """`image_folder` with a broken image: index 3."""
    folder = tmp_path / "damaged"
    shutil.copytree(image_folder, folder)
    (folder / "blue/3.png").write_bytes(b"\x89PNG damaged")
    return folder


def test_bad_image_is_an_error_that_names_it(base_flags, damaged_folder, tmp_path):
    with pytest.raises(BadImageError, match=mentions("blue/3.png")):
        prepare([*base_flags, f"--train_data_dir={damaged_folder}"], tmp_path / "latents")


def test_skipped_image_has_a_row_that_says_why(base_flags, damaged_folder, prepared_dir, tmp_path):
    """A bad image does not change the other images in its batch."""
    flags = [*base_flags, f"--train_data_dir={damaged_folder}", "--on_bad_image=skip"]
    table = open_latents(prepare(flags, tmp_path / "latents"))
    row = table.rows.with_format("numpy")[3]
    assert np.isnan(row["moments"]).all() and np.isnan(row["mirrored_moments"]).all()
    with pytest.raises(BadImageError, match=mentions(tmp_path / "latents", "blue/3.png")):
        table.read(3)
    undamaged = open_latents(prepared_dir)
    for index in set(range(NUM_IMAGES)) - {3}:
        torch.testing.assert_close(table.read(index), undamaged.read(index), rtol=0, atol=0)


def test_skipped_image_is_replaced_as_in_training_on_the_fly(base_flags, damaged_folder, tmp_path):
    flags = [*base_flags, f"--train_data_dir={damaged_folder}", "--on_bad_image=skip"]
    latents_dir = prepare(flags, tmp_path / "latents")
    on_the_fly, prepared = datasets_of_both_kinds(damaged_folder, latents_dir, True, on_bad_image="skip")
    positions = range(NUM_IMAGES)
    expected, batch = read_batch(on_the_fly, positions), read_batch(prepared, positions)
    torch.testing.assert_close(batch["class_labels"], expected["class_labels"], rtol=0, atol=0)
    pixels = normalize_pixels(expected["pixel_values"])
    moments = encode_moments(load_vae(flags[0].split("=")[1]), pixels)
    torch.testing.assert_close(batch["moments"], moments, rtol=0, atol=1e-5)
    assert len(batch["bad_images"]) == len(expected["bad_images"]) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_8_and_16_bits_share_a_batch_with_their_own_values(base_flags, vae_dir, tmp_path, workers):
    files = {f"{i}.png": encode(noise_image(i, 8, 8)) for i in range(4)}
    files |= {f"{i}.png": encode(noise_image(i, 8, 8).astype(np.uint16) * 256 + 77) for i in (1, 2)}
    folder = write_files(tmp_path / "images", files)
    flags = [*base_flags, f"--train_data_dir={folder}", f"--dataloader_num_workers={workers}"]
    table, vae = open_latents(prepare(flags, tmp_path / "latents")), load_vae(str(vae_dir))
    for index, name in enumerate(sorted(files)):
        image = decode_image(name, files[name], (8, 8), 3)[None]
        for mirrored, pixels in ((False, image), (True, image.flip(-1))):
            moments = encode_moments(vae, pixels)[0]
            torch.testing.assert_close(table.read(index, mirrored), moments, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A VAE of one's own


def test_trained_vae_loads_in_diffusers_with_unit_variance_latents(image_folder, tmp_path, capsys):
    flags = [f"--train_data_dir={image_folder}", "--resolution=8", "--block_out_channels", "4", "8"]
    flags += ["--max_train_steps=2", "--train_batch_size=8", f"--output_dir={tmp_path}"]
    train_vae.main(train_vae.parse_args(flags))
    assert mentions(tmp_path, "PSNR", "dB").search(capsys.readouterr().out)
    vae = load_vae(str(tmp_path))
    images = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    pixels = torch.stack([decode_image(*images.read(index), (8, 8), 3) for index in range(NUM_IMAGES)])
    moments = encode_moments(vae, pixels)
    noise = torch.randn(NUM_IMAGES, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, noise, vae.config.scaling_factor)
    assert latents.std() == pytest.approx(1, abs=0.05)  # measured on other draws


@pytest.mark.slow
def test_digits_are_still_read_after_encoding_and_decoding(tmp_path):
    """Under 5 minutes on one core; 97 % of 359 digits, most of which the VAE was trained on.

    The classifier, trained on four fifths of the originals, reads the rest after the way through the VAE and back
    to 8 x 8 pixels.
    """
    sklearn_svm = pytest.importorskip("sklearn.svm")
    started = time.process_time()
    output_dir = tmp_path / "vae"
    train_vae.main(
        train_vae.parse_args([f"--train_data_file={ROOT / 'data/digits.parquet'}", f"--output_dir={output_dir}"])
    )
    assert time.process_time() - started < 300

    vae = load_vae(str(output_dir))
    table = load_image_table(
        SourceConfig(train_data_file=str(ROOT / "data/digits.parquet"), cache_dir=str(tmp_path / "cache"))
    )
    training, held_out = split_table(table, 0.2)
    classifier = sklearn_svm.SVC(gamma=0.256, C=10).fit(small_pixels(training), labels_of(training))
    assert classifier.score(small_pixels(held_out), labels_of(held_out)) >= 0.97

    pixels = torch.stack([decode_image(*held_out.read(index), (32, 32), 1) for index in range(len(held_out))])
    noise = torch.randn(len(held_out), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = vae.decode(sample_latents(encode_moments(vae, pixels), noise, 1.0)).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean().log10().item()
    smaller = [PIL.Image.fromarray(image.numpy()).resize((8, 8), PIL.Image.Resampling.BOX) for image in decoded[:, 0]]
    score = classifier.score((np.stack(smaller).reshape(-1, 64) + 1) / 2, labels_of(held_out))
    print(f"{time.process_time() - started:.0f} s, PSNR {psnr:.1f} dB, {score:.3f} of the digits are read")
    assert score >= 0.97
    assert psnr >= 23


def small_pixels(table) -> np.ndarray:
    """Gray levels of the original 8 x 8 digits in [0, 1]; shape (n, 64)."""
    images = [decode_image(*table.read(index), (8, 8), 1) for index in range(len(table))]
    return (torch.stack(images).reshape(-1, 64).numpy() + 1) / 2


def labels_of(table) -> list[int]:
    return [table.label(index) for index in range(len(table))]
