"""Training in latents: the learned variance, checkpoints and folders, and fine-tuning from converted weights."""

import json
import math
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import convert_nvidia_checkpoint
import prepare_latents
from diffit.decode import normalize_pixels
from diffit.formulations import DDPM
from diffit.learned_variance import variance_bound
from diffit.networks import model_class
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream
from diffit_model import DiffiTTransformer2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import (
    NO_WORKERS,
    ROOT,
    TINY_TRANSFORMER,
    assert_same_files,
    batch_at,
    evaluate_folder,
    losses,
    mentions,
    nvidia_tensors,
    run,
    sample,
    tiny_vae,
    train,
)

PARTS = [f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("transformer", "transformer_ema")]


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory) -> Path:
    """From 8 x 8 color images to 4 x 4 latents of two channels."""
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae(latent_channels=2, scaling_factor=0.7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def transformer_config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "transformer.json"
    file.write_text(json.dumps(TINY_TRANSFORMER))
    return file


EPSILON = ["--prediction_type=epsilon", "--beta_schedule=linear"]  # which a learned variance needs


@pytest.fixture
def latent_args(base_args, transformer_config, vae_dir, tmp_path) -> list[str]:
    flags = [f"--model_config={transformer_config}", f"--vae_model_name_or_path={vae_dir}"]
    return [*base_args, *flags, *EPSILON, f"--output_dir={tmp_path / 'run'}"]


# --- the learned variance


@pytest.fixture
def bound_inputs() -> dict[str, torch.Tensor]:
    """Two images in float64, one of which reaches both ends of the range."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 4)
    clean = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    clean[1, 0] = 1.0
    clean[1, 1] = -1.0
    draw = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in ("noise", "error")}
    variance = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return {"clean": clean, "variance": variance, **draw}


def coefficients(t: int) -> tuple[float, float, float, float]:
    """beta_t, alpha-bar_t, alpha-bar_{t-1} and the variance of q(x_{t-1} | x_t, x_0), of linear betas."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32).double()
    bars = torch.cumprod(1 - betas, 0).tolist()
    before = bars[t - 1] if t > 0 else 1.0
    beta = betas[t].item()
    return beta, bars[t], before, beta * (1 - before) / (1 - bars[t])


def network_gaussian(t: int, clean, noise, error, variance) -> Normal:
    """p(x_{t-1} | x_t) of improved DDPM for a network that predicts `noise + error` and `variance`."""
    beta, bar, before, posterior = coefficients(t)
    noisy = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
    clean_pred = (noisy - math.sqrt(1 - bar) * (noise + error)) / math.sqrt(bar)
    mean = beta * math.sqrt(before) / (1 - bar) * clean_pred
    mean = mean + (1 - before) * math.sqrt(1 - beta) / (1 - bar) * noisy
    lowest = math.log(coefficients(max(t, 1))[3])
    log_variance = (variance + 1) / 2 * math.log(beta) + (1 - variance) / 2 * lowest
    return Normal(mean, torch.exp(0.5 * log_variance))


@pytest.mark.parametrize("t", [1, 2, 17, 500, 999])
def test_variance_bound_is_the_divergence_of_two_gaussians(t, bound_inputs):
    inputs = {name: bound_inputs[name] for name in ("clean", "noise", "error", "variance")}
    beta, bar, before, posterior = coefficients(t)
    noisy = math.sqrt(bar) * inputs["clean"] + math.sqrt(1 - bar) * inputs["noise"]
    true_mean = beta * math.sqrt(before) / (1 - bar) * inputs["clean"]
    true_mean = true_mean + (1 - before) * math.sqrt(1 - beta) / (1 - bar) * noisy
    divergence = kl_divergence(Normal(true_mean, math.sqrt(posterior)), network_gaussian(t, **inputs))
    expected = divergence.mean(dim=(1, 2, 3)) / math.log(2)
    got = variance_bound(inputs["error"], inputs["variance"], DDPMScheduler(), inputs["clean"], torch.full((2,), t))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)


def test_variance_bound_at_the_first_timestep_is_the_images_nll(bound_inputs):
    """Bins extend 1/255 to both sides, and to infinity at -1 and 1."""
    inputs = {name: bound_inputs[name] for name in ("clean", "noise", "error", "variance")}
    inputs["error"] = 0.1 * inputs["error"]
    gaussian = network_gaussian(0, **inputs)
    above = torch.where(inputs["clean"] >= 1, 1.0, gaussian.cdf(inputs["clean"] + 1 / 255))
    below = torch.where(inputs["clean"] <= -1, 0.0, gaussian.cdf(inputs["clean"] - 1 / 255))
    expected = -torch.log2((above - below).clamp(min=1e-12)).mean(dim=(1, 2, 3))
    got = variance_bound(
        inputs["error"], inputs["variance"], DDPMScheduler(), inputs["clean"], torch.zeros(2, dtype=torch.long)
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_bound_is_added_to_the_loss_and_trains_the_variance_alone(bound_inputs):
    formulation, timesteps = DDPM("epsilon", "linear"), torch.tensor([0, 400])
    clean, noise = (bound_inputs[name].float() for name in ("clean", "noise"))
    model_pred = torch.cat([noise + bound_inputs["error"], bound_inputs["variance"]], dim=1).float().requires_grad_()
    loss = formulation.losses(model_pred, clean, noise, timesteps)
    error, variance = model_pred.detach()[:, :3] - noise, model_pred.detach()[:, 3:]
    bound = variance_bound(error, variance, formulation.scheduler, clean, timesteps)
    torch.testing.assert_close(loss, error.square().mean(dim=(1, 2, 3)) + bound)
    loss.sum().backward()
    torch.testing.assert_close(model_pred.grad[:, :3], 2 * error / error[0].numel())  # of the squared error alone
    assert model_pred.grad[:, 3:].abs().min() > 0


# --- training


def test_latent_run_is_saved_resumed_and_sampled(latent_args, vae_dir, tmp_path):
    flags = ["--max_train_steps=4", "--checkpointing_steps=2", "--validation_fraction=0.25", "--random_flip"]
    guidance = ["--validation_guidance_scale=2", "--validation_guidance_schedule=power_cosine"]
    guidance += ["--validation_guidance_interval", "0.1", "0.9", "--validation_guidance_channels=1"]
    train([*latent_args, *flags, *guidance])
    here = tmp_path / "run"
    other = [*latent_args, *flags, *guidance, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=2"])
    train([*other, "--resume_from_checkpoint=latest", "--dataloader_num_workers=1"])
    assert_same_files(here / "checkpoint-4", tmp_path / "other/checkpoint-4", [*PARTS, "optimizer.pt"])

    pipe = DiffiTPipeline.from_folder(str(here), model_class, "ddpm")
    assert type(pipe.transformer) is DiffiTTransformer2DModel
    assert pipe.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(pipe.vae.state_dict(), AutoencoderKL.from_pretrained(vae_dir).state_dict())
    script = (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(here)!r}, trust_remote_code=True)\n"
        "assert type(pipe).__name__ == 'DiffiTPipeline', type(pipe)\n"
        "images = pipe(class_labels=['red', 'blue'], guidance_scale=2.0, num_inference_steps=2).images\n"
        "assert images[1].size == (8, 8)\n"
    )
    run(["-c", script], cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))


def test_previews_and_samples_are_decoded_one_by_one(latent_args, tmp_path, monkeypatch):
    """Decoding a batch at once would take more memory than training: 12 GiB for 16 images of 512 pixels."""
    decoded, encoded = [], []
    decode, encode = AutoencoderKL.decode, AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z, *args: decoded.append(len(z)) or decode(vae, z, *args))
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x, *args: encoded.append(len(x)) or encode(vae, x, *args))
    train([*latent_args, "--max_train_steps=1", "--num_validation_images=6", "--train_batch_size=3"])
    assert decoded == [1] * 6 and set(encoded) == {3}
    sample(tmp_path / "run", tmp_path / "samples", "--seeds=0-3", "--batch_size=4")
    assert decoded == [1] * 10


def test_prepared_latents_train_like_those_encoded_on_the_way(latent_args, converted, image_folder, vae_dir, tmp_path):
    """From converted weights: the output of a new network is zero, and Adam would amplify the rounding of latents."""
    latent_args = [flag for flag in latent_args if not flag.startswith("--model_config")]
    flags = ["--max_train_steps=6", "--center_crop", "--random_flip", "--num_channels=3"]
    flags += [f"--pretrained_model_name_or_path={converted}"]
    train([*latent_args, *flags])
    prepared = tmp_path / "latents"
    source = [f"--train_data_dir={image_folder}", "--resolution=8", f"--output_dir={prepared}", NO_WORKERS]
    prepare_latents.main(prepare_latents.parse_args([f"--vae_model_name_or_path={vae_dir}", *source]))
    without = [flag for flag in latent_args if not flag.startswith("--train_data_dir")]
    other = [*without, *flags, f"--latents_dir={prepared}", f"--output_dir={tmp_path / 'other'}"]
    train(other)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "other"), rel=1e-5)
    again = [*other, "--overwrite_output_dir"]
    with pytest.raises(ValueError, match=mentions("--resolution", "16", "8", prepared)):
        train([*again, "--resolution=16"])
    config = dict(AutoencoderKL.load_config(vae_dir)) | {"scaling_factor": 0.5}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "other_vae")
    with pytest.raises(
        ValueError, match=mentions(f"--latents_dir {prepared}", "encoder_digest", tmp_path / "other_vae")
    ):
        train([*again, f"--vae_model_name_or_path={tmp_path / 'other_vae'}"])


def test_training_applies_the_mean_and_std_of_the_vae_and_reports_an_unusual_scale(latent_args, tmp_path, caplog):
    """The same latents by `scaling_factor` and `shift_factor`, and by a mean and a deviation of each channel."""
    settings = {
        "factor": {"scaling_factor": 40.0, "shift_factor": 0.05},
        "statistics": {"scaling_factor": 20.0, "latents_mean": (0.05, 0.05), "latents_std": (0.5, 0.5)},
    }
    for name, config in settings.items():
        tiny_vae(latent_channels=2, **config).save_pretrained(tmp_path / f"vae_{name}")
        flags = [f"--vae_model_name_or_path={tmp_path / f'vae_{name}'}", f"--output_dir={tmp_path / name}"]
        train([*latent_args, *flags, "--max_train_steps=2"])
        reported = [record.message for record in caplog.records if "standard deviation" in record.message]
        assert len(reported) == 1 and f"vae_{name}" in reported[0]
        caplog.clear()
    assert losses(tmp_path / "factor") == pytest.approx(losses(tmp_path / "statistics"), rel=1e-5)
    grids = [(tmp_path / name / "sample_grid.png").read_bytes() for name in settings]
    assert grids[0] == grids[1]


def test_latent_folder_and_its_checkpoints_are_evaluated(latent_args, image_folder, tmp_path):
    train([*latent_args, "--max_train_steps=2"])
    arguments = [f"--reference={image_folder}", f"--model_path={tmp_path / 'run'}", "--all_checkpoints"]
    assert "checkpoint-2" in json.dumps(evaluate_folder(arguments, tmp_path))


def test_model_of_another_target_has_no_place_in_nvidias_layout(latent_args, tmp_path):
    train([*latent_args, "--max_train_steps=1", "--prediction_type=v_prediction", "--model_kwargs", "out_channels=2"])
    arguments = ["--to_nvidia", f"--checkpoint={tmp_path / 'run'}", f"--output_dir={tmp_path / 'back'}"]
    with pytest.raises(ValueError, match=mentions("--to_nvidia", "prediction_type", "v_prediction")):
        convert_nvidia_checkpoint.main(convert_nvidia_checkpoint.parse_args(arguments))
    assert not (tmp_path / "back").exists()


def test_transformer_without_a_vae_is_refused(base_args, transformer_config, tmp_path):
    with pytest.raises(ValueError, match=mentions("transformer", "--vae_model_name_or_path")):
        train([*base_args, f"--model_config={transformer_config}", f"--output_dir={tmp_path / 'run'}"])


def test_unconditional_latent_run_is_saved(latent_args, tmp_path):
    train([*latent_args, "--no-class_conditional", "--max_train_steps=1"])
    images = DiffiTPipeline.from_folder(str(tmp_path / "run"), model_class)(num_inference_steps=2).images
    assert images[0].size == (8, 8)


def test_preview_takes_a_weaker_model(latent_args, tmp_path):
    train([*latent_args, "--max_train_steps=1", "--learning_rate=0.1", f"--output_dir={tmp_path / 'weak'}"])
    flags = [f"--validation_guidance_model={tmp_path / 'weak'}", "--validation_guidance_scale=3"]
    grids = {}
    for name, extra in {"guided": flags, "plain": []}.items():
        arguments = ["--max_train_steps=2", "--lr_warmup_steps=0", f"--output_dir={tmp_path / name}", *extra]
        train([*latent_args, *arguments])
        grids[name] = (tmp_path / name / "sample_grid.png").read_bytes()
    assert grids["guided"] != grids["plain"]
    with pytest.raises(ValueError, match=mentions("--validation_guidance_model", tmp_path / "weak", 3)):
        train([*latent_args, *flags, "--no-class_conditional", f"--output_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resolution=9"], ["--resolution 9x9", 2]),
        (["--resolution=8x12", "--model_kwargs", "patch_size=4"], ["patch_size"]),
        (["--num_channels=1"], ["--num_channels 1", 3]),
        (["--model_kwargs", "in_channels=4"], ["in_channels 4", 2]),
        (["--model_kwargs", "out_channels=3"], ["out_channels 3"]),
        (["--vae_model_name_or_path=no/where"], ["--vae_model_name_or_path no/where"]),
        (
            ["--validation_guidance_model=no/where", "--validation_guidance_scale=2"],
            ["--validation_guidance_model no/where"],
        ),
    ],
)
def test_latent_settings_that_cannot_work_are_refused(flags, words, latent_args):
    with pytest.raises(ValueError, match=mentions(*words)):
        train([*latent_args, *flags])


def test_learned_variance_of_another_target_is_refused(latent_args):
    latent_args = [flag for flag in latent_args if flag not in EPSILON]
    for flags in (["--prediction_type=v_prediction"], ["--formulation=edm"]):
        with pytest.raises(
            ValueError, match=mentions("out_channels 4", "--formulation ddpm", "--prediction_type epsilon")
        ):
            train([*latent_args, *flags])


def test_edm_in_latents_takes_them_for_unit_variance(latent_args, tmp_path):
    latent_args = [flag for flag in latent_args if flag not in EPSILON]
    train([*latent_args, "--formulation=edm", "--max_train_steps=1", "--model_kwargs", "out_channels=2"])
    config = json.loads((tmp_path / "run/scheduler/scheduler_config.json").read_text())
    assert config["sigma_data"] == 1.0
    pipe = DiffiTPipeline.from_folder(str(tmp_path / "run"), model_class)
    assert pipe(class_labels=["red"], num_inference_steps=2).images[0].size == (8, 8)


def test_vae_may_move_but_not_change_at_a_resume(latent_args, vae_dir, tmp_path):
    train([*latent_args, "--max_train_steps=1"])
    again = [*latent_args, "--resume_from_checkpoint=latest", "--max_train_steps=2"]
    shutil.copytree(vae_dir, tmp_path / "moved")
    train([*again, f"--vae_model_name_or_path={tmp_path / 'moved'}"])
    config = dict(AutoencoderKL.load_config(vae_dir))
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "retrained")
    with pytest.raises(ValueError, match=mentions("checkpoint-2", "images", "VAE")):
        train([*again, "--max_train_steps=3", f"--vae_model_name_or_path={tmp_path / 'retrained'}"])


def test_dry_run_reads_no_weights(latent_args, transformer_config, vae_dir, tmp_path, capsys):
    outline = tmp_path / "outline"
    outline.mkdir()
    (outline / "config.json").write_text((vae_dir / "config.json").read_text())
    train([*latent_args, f"--vae_model_name_or_path={outline}", "--dry_run"])
    assert '"num_embeds_ada_norm": 3' in capsys.readouterr().out


DRY_RUN = """
import sys
from pathlib import Path
import train_diffit
from diffit.config import parse_args

def memory(kind):  # MiB
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024

imported = memory("VmRSS")
train_diffit.main(parse_args(sys.argv[1:]))
print("MiB above the imports:", memory("VmHWM") - imported)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_dry_run_of_the_largest_network_needs_no_memory_for_weights(tmp_path):
    """561 million of them would be 2,140 MiB."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (256, 256)).save(tmp_path / "images" / name / "0.png")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = {"_class_name": "AutoencoderKL", **blocks, "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps(vae))
    flags = [f"--train_data_dir={tmp_path}/images", f"--vae_model_name_or_path={tmp_path}/vae", "--dry_run"]
    output = run(["-c", DRY_RUN, "--config", "configs/train/imagenet256.yaml", *flags])
    assert float(output.split("MiB above the imports:")[1]) < 300
    assert int(output.split("parameters: ")[1].split()[0]) > 500_000_000


# --- fine-tuning from NVIDIA's weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder that the converter wrote from random weights in NVIDIA's layout with 1,000 classes."""
    root = tmp_path_factory.mktemp("nvidia")
    save_file(nvidia_tensors(in_channels=2, out_channels=4, patch=1), root / "diffit.safetensors")
    arguments = ["--checkpoint", str(root / "diffit.safetensors"), "--output_dir", str(root / "converted")]
    convert_nvidia_checkpoint.main(convert_nvidia_checkpoint.parse_args(arguments))
    return root / "converted"


@pytest.fixture
def finetuning_args(converted, vae_dir, tmp_path) -> list[str]:
    """The included digits, 10 classes, from converted weights."""
    return [
        f"--pretrained_model_name_or_path={converted}",
        f"--vae_model_name_or_path={vae_dir}",
        f"--train_data_file={ROOT / 'data/digits.parquet'}",
        "--class_conditional",
        "--train_batch_size=16",
        "--logging_steps=1",
        "--num_validation_images=2",
        "--validation_inference_steps=2",
        "--lr_warmup_steps=0",
        f"--output_dir={tmp_path / 'run'}",
    ]


def test_finetuning_starts_from_the_loss_of_the_converted_model(finetuning_args, converted, vae_dir, tmp_path, caplog):
    """All labels are null, so the re-initialized class embeddings have no effect."""
    train([*finetuning_args, "--label_dropout=1", "--max_train_steps=1"])
    assert mentions("10 class embeddings").search(caplog.text)

    model = DiffiTTransformer2DModel.from_pretrained(converted, subfolder="transformer")
    vae, scheduler = AutoencoderKL.from_pretrained(vae_dir), DDPMScheduler()
    table = load_image_table(SourceConfig(train_data_file=str(ROOT / "data/digits.parquet")))
    stream = PositionStream(len(table), seed=0)
    dataset = ImageDataset(table, stream, (8, 8), 3, latent_shape=(2, 4, 4))
    batch = batch_at(dataset, range(16))
    with torch.no_grad():
        posterior = vae.encode(normalize_pixels(batch["pixel_values"])).latent_dist
        clean = 0.7 * (posterior.mean + posterior.std * batch["posterior_noise"])
        timesteps = (batch["time_uniform"].double() * 1000).long()
        model_pred = model(scheduler.add_noise(clean, batch["noise"], timesteps), timesteps, None).sample
        expected = DDPM("epsilon", "linear").losses(model_pred, clean, batch["noise"], timesteps).mean().item()
    assert losses(tmp_path / "run") == pytest.approx([expected], rel=1e-6)


def test_finetuning_from_converted_weights_lowers_the_loss(finetuning_args, tmp_path):
    train([*finetuning_args, "--max_train_steps=60", "--learning_rate=1e-3"])
    values = losses(tmp_path / "run")
    assert sum(values[-10:]) < 0.5 * sum(values[:10])


def test_class_rows_start_anew_only_if_asked_for(finetuning_args, tmp_path, caplog):
    """From a run with 10 classes to another one with the same classes."""
    train([*finetuning_args, "--max_train_steps=1"])
    again = [*finetuning_args, f"--pretrained_model_name_or_path={tmp_path / 'run'}", "--learning_rate=0"]
    kept = load_file(tmp_path / "run/transformer/diffusion_pytorch_model.safetensors")["class_embedding.weight"]
    for flags, same in ((["--no-reset_class_embeddings"], True), (["--reset_class_embeddings"], False)):
        folder = tmp_path / str(same)
        train([*again, *flags, "--max_train_steps=1", f"--output_dir={folder}"])
        rows = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")["class_embedding.weight"]
        assert torch.equal(rows[:-1], kept[:-1]) is same
        assert torch.equal(rows[-1], kept[-1])


def test_finetuning_at_another_resolution_says_what_it_interpolates(finetuning_args, tmp_path, caplog):
    train([*finetuning_args, "--max_train_steps=1", "--resolution=12"])
    assert mentions("relative_position_bias_table", "4 x 4", "6 x 6").search(caplog.text)
    config = json.loads((tmp_path / "run/transformer/config.json").read_text())
    assert config["sample_size"] == 6
