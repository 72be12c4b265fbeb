"""Formulations: noise levels, network inputs and losses of DDPM and EDM against formulas and values by hand."""

import json
import math

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, EDMEulerScheduler

from diffit.diffusion_config import DiffusionConfig
from diffit.errors import UserError
from diffit.formulations import DDPM, EDM, FORMULATIONS, choose_formulation, differences
from diffit.networks import model_class
from diffit.scheduler_configs import complete_scheduler_config
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import STATES, TINY_CONFIG, assert_same_files, evaluate_folder, mentions, train

# --- DDPM


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_loss_equals_its_formula(prediction_type, snr_gamma):
    torch.manual_seed(0)
    formulation = DDPM(prediction_type, "linear", snr_gamma=snr_gamma)
    scheduler = formulation.scheduler
    clean, noise, prediction = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64).unbind()
    timesteps = torch.tensor([0, 10, 500, 999])
    loss = formulation.losses(prediction, clean, noise, timesteps)
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
    timesteps = DDPM().noise_levels(uniform)
    assert timesteps.bincount(minlength=1000).tolist() == [4] * 1000


# --- which one


def test_flags_override_pretrained_scheduler_overrides_defaults():
    pretrained = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "num_train_timesteps": 500}
    assert choose_formulation(DiffusionConfig(), {}, False) == DDPM(snr_gamma=5.0)
    asked = DiffusionConfig(beta_schedule="linear", num_train_timesteps=200)
    assert choose_formulation(asked, pretrained, True) == DDPM("epsilon", "linear", 200, in_latents=True)
    edm = pretrained | {"_class_name": "EDMEulerScheduler"}
    assert choose_formulation(DiffusionConfig(sigma_std=2.0), edm, False) == EDM(-1.2, 2.0)
    # What the scheduler of another formulation says has no meaning in this one.
    assert choose_formulation(DiffusionConfig(formulation="ddpm"), edm, False) == DDPM(snr_gamma=5.0)


def test_min_snr_weights_are_off_on_request_and_for_epsilon():
    assert choose_formulation(DiffusionConfig(snr_gamma=0.0), {}, False).snr_gamma == 0
    assert choose_formulation(DiffusionConfig(prediction_type="epsilon"), {}, False).snr_gamma is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sigma_std": 1.0}, "--sigma_std .* --formulation edm"),
        ({"formulation": "edm", "prediction_type": "epsilon"}, "--prediction_type .* --formulation ddpm"),
        ({"formulation": "edm", "snr_gamma": 5.0}, "--snr_gamma .* --formulation ddpm"),
    ],
)
def test_flag_of_another_formulation_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        choose_formulation(DiffusionConfig(**flags), {}, False)


# --- the noise schedule of pretrained weights


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear", "beta_end": 0.015, "num_train_timesteps": 100},
        {"beta_schedule": "scaled_linear", **ZERO_SNR},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
    ],
    ids=["scaled", "linear", "zero_snr", "trained"],
)
def test_noise_schedule_of_the_weights_is_taken_over_whole(settings):
    source = DDPMScheduler(**settings)
    config = json.loads(source.to_json_string())
    formulation = choose_formulation(DiffusionConfig(), config, False)
    assert torch.equal(formulation.scheduler.alphas_cumprod, source.alphas_cumprod)
    assert not differences(formulation, config)
    assert hash(formulation) == hash(choose_formulation(DiffusionConfig(), config, False))
    losses = formulation.losses(*torch.ones(3, 1, 1, 2, 2), torch.tensor([source.config.num_train_timesteps - 1]))
    assert losses.isfinite().all()


def test_another_beta_schedule_leaves_the_numbers_of_the_weights_behind_and_says_so():
    config = dict(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config)
    formulation = choose_formulation(DiffusionConfig(beta_schedule="linear"), config, False)
    assert torch.equal(formulation.scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    expected = {"beta_schedule": ("scaled_linear", "linear"), "beta_start": (0.00085, 1e-4), "beta_end": (0.012, 0.02)}
    assert differences(formulation, config) == expected


def test_settings_that_a_scheduler_leaves_out_are_the_defaults_of_its_class():
    config = complete_scheduler_config({"_class_name": "LCMScheduler", "beta_end": 0.013})
    formulation = choose_formulation(DiffusionConfig(), config, False)
    assert (formulation.prediction_type, formulation.beta_schedule) == ("epsilon", "scaled_linear")
    assert dict(formulation.inherited) == {"beta_start": 0.00085, "beta_end": 0.013}


def test_sigmas_of_the_weights_are_taken_over():
    config = json.loads(EDMEulerScheduler(sigma_data=0.7, sigma_max=50.0).to_json_string())
    scheduler = choose_formulation(DiffusionConfig(), config, False).scheduler
    assert (scheduler.config.sigma_data, scheduler.config.sigma_max) == (0.7, 50.0)
    assert choose_formulation(DiffusionConfig(), json.loads(EDM().scheduler.to_json_string()), False) == EDM()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "laplace"}, ["beta_schedule", "laplace", "--beta_schedule"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type", "flow_prediction", "--prediction_type"]),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "epsilon", "--prediction_type v_prediction"]),
        ({"trained_betas": [0.1] * 10}, [10, "trained_betas", "--num_train_timesteps 1000"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, ["use_flow_sigmas"]),
        ({"_class_name": "FlowMatchLCMScheduler"}, ["FlowMatchLCMScheduler", "--formulation"]),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, ["v_prediction"]),
    ],
)
def test_noise_schedule_that_cannot_be_trained_is_refused(config, words):
    with pytest.raises(ValueError, match=mentions(*words)):
        choose_formulation(DiffusionConfig(), complete_scheduler_config(config), False)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"_class_name": "FlowMatchLCMScheduler"},
        {"_class_name": "ScoreSdeVeScheduler"},
    ],
    ids=lambda config: config["_class_name"],
)
def test_weights_of_a_foreign_formulation_train_if_asked_for_and_that_is_said(config):
    config = complete_scheduler_config(config)
    with pytest.raises(ValueError, match=mentions(config["_class_name"], "--formulation")):
        choose_formulation(DiffusionConfig(), config, False)
    for name, kind in FORMULATIONS.items():
        formulation = choose_formulation(DiffusionConfig(formulation=name), config, False)
        assert type(formulation) is kind and not formulation.inherited
        ((theirs, ours),) = differences(formulation, config).values()
        assert theirs.startswith(config["_class_name"]) and ours == name


# --- EDM


def test_sigmas_are_log_normal():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logs = EDM().noise_levels(uniform).double().log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-4) and logs.std().item() == pytest.approx(1.2, rel=1e-3)
    assert EDM().noise_levels(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_edm_inputs_and_loss_equal_hand_computed_values():
    """One pixel: image 0.4, noise 2, sigma 0.5, F = 0.3."""
    clean, noise, sigma = torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.5])
    noisy, time = EDM().network_inputs(clean, noise, sigma)
    assert noisy.item() == pytest.approx(1.4 / math.sqrt(0.5), rel=1e-6)  # c_in = 1 / sqrt(0.25 + 0.25)
    assert time.item() == pytest.approx(math.log(0.5) / 4, rel=1e-6)
    loss = EDM().losses(torch.full((1, 1, 1, 1), 0.3), clean, noise, sigma)
    denoised = 0.5 * 1.4 + 0.25 / math.sqrt(0.5) * 0.3  # c_skip = 0.25 / 0.5, c_out = 0.25 / sqrt(0.5)
    assert loss.item() == pytest.approx(0.5 / 0.0625 * (denoised - 0.4) ** 2, rel=1e-5)


def test_network_with_zero_output_has_a_loss_of_one():
    """c_skip * x is the best linear guess for images of standard deviation 0.5: its weighted error is 1."""
    torch.manual_seed(0)
    model = DiffiTUNet2DModel(**TINY_CONFIG)
    clean = 0.5 * torch.randn(4000, 3, 8, 8)
    noise, uniform = torch.randn_like(clean), torch.rand(4000)
    sigma = EDM().noise_levels(uniform)
    noisy, time = EDM().network_inputs(clean, noise, sigma)
    with torch.no_grad():
        model_pred = model(noisy[:8], time[:8]).sample
    assert model_pred.abs().max() == 0
    x = clean + sigma[:, None, None, None] * noise
    skip = 0.25 / (sigma**2 + 0.25)
    denoised = EDM().scheduler.precondition_outputs(x[:8], model_pred, sigma[:8, None, None, None])
    torch.testing.assert_close(denoised, skip[:8, None, None, None] * x[:8])
    loss = EDM().losses(torch.zeros_like(clean), clean, noise, sigma)
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
