"""Formulations: noise levels, network inputs and losses of DDPM and EDM against formulas and values by hand."""

import json
import math

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, EDMEulerScheduler

from diffit.formulations import build_network_inputs, build_noise_levels, compute_loss
from diffit.networks import model_class
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import STATES, TINY_CONFIG, assert_same_files, evaluate_folder, train

# --- DDPM


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_loss_equals_its_formula(prediction_type, snr_gamma):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise, prediction = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64).unbind()
    timesteps = torch.tensor([0, 10, 500, 999])
    loss = compute_loss(prediction, scheduler, clean, noise, timesteps, snr_gamma)
    for i, t in enumerate(timesteps):
        a = scheduler.alphas_cumprod[t].double()
        target = {
            "epsilon": noise[i],
            "sample": clean[i],
            "v_prediction": a.sqrt() * noise[i] - (1 - a).sqrt() * clean[i],
        }
        snr = a / (1 - a)
        cap = snr if snr_gamma is None else min(snr, torch.tensor(snr_gamma))
        weight = {"epsilon": cap / snr, "sample": cap, "v_prediction": cap / (snr + 1)}[prediction_type]
        weight = 1.0 if snr_gamma is None else weight
        expected = weight * (prediction[i] - target[prediction_type]).pow(2).mean()
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-4, atol=1e-6)


def test_timesteps_cover_the_range_evenly():
    uniform = (torch.arange(4000) + 0.5) / 4000
    timesteps = build_noise_levels(uniform, DDPMScheduler())
    assert timesteps.bincount(minlength=1000).tolist() == [4] * 1000


# --- EDM


@pytest.fixture
def edm() -> EDMEulerScheduler:
    return EDMEulerScheduler(sigma_data=0.5)


def test_sigmas_are_log_normal(edm):
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logs = build_noise_levels(uniform, edm, -1.2, 1.2).double().log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-4) and logs.std().item() == pytest.approx(1.2, rel=1e-3)
    assert build_noise_levels(torch.tensor([0.0, 1 - 2**-24]), edm).isfinite().all()


def test_edm_inputs_and_loss_equal_hand_computed_values(edm):
    """One pixel: image 0.4, noise 2, sigma 0.5, F = 0.3."""
    clean, noise, sigma = torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.5])
    noisy, time = build_network_inputs(clean, noise, sigma, edm)
    assert noisy.item() == pytest.approx(1.4 / math.sqrt(0.5), rel=1e-6)  # c_in = 1 / sqrt(0.25 + 0.25)
    assert time.item() == pytest.approx(math.log(0.5) / 4, rel=1e-6)
    loss = compute_loss(torch.full((1, 1, 1, 1), 0.3), edm, clean, noise, sigma)
    denoised = 0.5 * 1.4 + 0.25 / math.sqrt(0.5) * 0.3  # c_skip = 0.25 / 0.5, c_out = 0.25 / sqrt(0.5)
    assert loss.item() == pytest.approx(0.5 / 0.0625 * (denoised - 0.4) ** 2, rel=1e-5)


def test_network_of_zero_output_denoises_by_the_skip_and_has_a_loss_of_one(edm):
    """c_skip * x is the best linear guess for images of standard deviation 0.5: its weighted error is 1."""
    torch.manual_seed(0)
    model = DiffiTUNet2DModel(**TINY_CONFIG)
    clean = 0.5 * torch.randn(4000, 3, 8, 8)
    noise, uniform = torch.randn_like(clean), torch.rand(4000)
    sigma = build_noise_levels(uniform, edm)
    noisy, time = build_network_inputs(clean, noise, sigma, edm)
    with torch.no_grad():
        model_pred = model(noisy[:8], time[:8]).sample
    assert model_pred.abs().max() == 0
    x = clean + sigma[:, None, None, None] * noise
    skip = 0.25 / (sigma**2 + 0.25)
    denoised = edm.precondition_outputs(x[:8], model_pred, sigma[:8, None, None, None])
    torch.testing.assert_close(denoised, skip[:8, None, None, None] * x[:8])
    loss = compute_loss(torch.zeros_like(clean), edm, clean, noise, sigma)
    assert loss.mean().item() == pytest.approx(1.0, rel=0.01)


def test_edm_run_is_saved_resumed_and_sampled_with_no_flag(train_args, tmp_path):
    flags = ["--formulation=edm", "--max_train_steps=4", "--checkpointing_steps=2", "--validation_fraction=0.25"]
    train([*train_args, *flags])
    other = [*train_args, *flags, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=2"])
    train([*other, "--resume_from_checkpoint=latest"])
    assert_same_files(tmp_path / "run/checkpoint-4", tmp_path / "other/checkpoint-4", STATES)
    config = json.loads((tmp_path / "run/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "EDMEulerScheduler" and config["sigma_data"] == 0.5
    pipe = DiffiTPipeline.from_folder(str(tmp_path / "run"), model_class)
    assert pipe(class_labels=["red"], num_inference_steps=3, output_type="pt").images.isfinite().all()
    again = [*(a for a in train_args if not a.startswith("--model_config")), "--max_train_steps=1"]
    train([*again, f"--pretrained_model_name_or_path={tmp_path / 'run'}", f"--output_dir={tmp_path / 'tuned'}"])
    assert yaml.safe_load((tmp_path / "tuned/training_args.yaml").read_text())["formulation"] == "edm"


def test_edm_folder_and_its_checkpoints_are_evaluated_with_no_flag(train_args, image_folder, tmp_path):
    train([*train_args, "--formulation=edm", "--max_train_steps=2"])
    reference = [f"--reference={image_folder}", f"--model_path={tmp_path / 'run'}"]
    heun = json.dumps(evaluate_folder([*reference, "--all_checkpoints"], tmp_path)["models"])
    euler = json.dumps(evaluate_folder([*reference, "--all_checkpoints", "--scheduler=edm_euler"], tmp_path)["models"])
    assert "checkpoint-2" in heun and heun != euler  # the samples of one are not taken for those of the other
