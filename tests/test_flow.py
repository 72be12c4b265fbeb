"""Rectified flow: closed forms on a Gaussian, the shift, the time that the network sees, and whole runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from diffit.diffusion_config import DiffusionConfig
from diffit.errors import UserError
from diffit.formulations import EDM, RectifiedFlow, choose_formulation, differences, formulation_flags, formulation_of
from diffit_pipeline import DiffiTPipeline
from helpers import (
    STATES,
    assert_same_files,
    evaluate_folder,
    generators,
    mentions,
    open_pipeline,
    quiet,
    sample,
    tiny_unet,
    tiny_vae,
    train,
)

MEAN, VARIANCE = 0.4, 0.09  # of the images in the closed forms


def optimal_image(noisy: torch.Tensor, fraction: torch.Tensor | float) -> torch.Tensor:
    """E[x | x_t] of images whose values are independent and normal."""
    gain = (1 - fraction) * VARIANCE / ((1 - fraction) ** 2 * VARIANCE + fraction**2)
    return MEAN + gain * (noisy - (1 - fraction) * MEAN)


class Optimal(torch.nn.Module):
    """A network that predicts the velocity, or the image, of the Gaussian; records the times that it is given."""

    def __init__(self, prediction_type: str):
        super().__init__()
        self.config = tiny_unet().config
        self.prediction_type, self.timesteps = prediction_type, []
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, noisy, timesteps, class_labels=None):
        self.timesteps.append(timesteps.tolist())
        fraction = (timesteps.double() / 1000)[:, None, None, None]
        image = optimal_image(noisy.double(), fraction)
        prediction = image if self.prediction_type == "sample" else (noisy.double() - image) / fraction
        return type("Output", (), {"sample": prediction.float()})


def optimal_pipeline(prediction_type: str, shift: float, heun: bool) -> DiffiTPipeline:
    pipeline = quiet(
        DiffiTPipeline(tiny_unet(), RectifiedFlow(prediction_type, flow_shift=shift).scheduler, heun=heun)
    )
    pipeline.unet = Optimal(prediction_type)
    return pipeline


# --- closed forms


@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
def test_linear_model_learns_the_optimal_velocity(prediction_type):
    """At each fraction of noise the best affine prediction is the closed form; the loss is quadratic, so solve it."""
    formulation = RectifiedFlow(prediction_type, flow_shift=1.0)
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + VARIANCE**0.5 * torch.randn(200_000, 1, 1, 1, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    for fraction in (0.05, 0.3, 0.7, 0.95):
        levels = torch.full((len(clean),), fraction)
        noisy, _ = formulation.network_inputs(clean, noise, levels)
        weights = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

        def loss(noisy=noisy, levels=levels, weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            prediction = weights[0] * noisy + weights[1]
            value = formulation.losses(prediction, clean, noise, levels).mean()
            value.backward()
            return value

        optimizer.step(loss)
        points = torch.tensor([-1.0, 0.0, 1.0])
        image = optimal_image(points, fraction)
        expected = image if prediction_type == "sample" else (points - image) / fraction
        torch.testing.assert_close(weights[0] * points + weights[1], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
@pytest.mark.parametrize(("heun", "steps"), [(False, 800), (True, 160)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_follows_the_exact_path(prediction_type, heun, steps, shift):
    """The optimal flow of a Gaussian takes noise e to MEAN + std * e: mean, covariance and each image are known."""
    pipeline = optimal_pipeline(prediction_type, shift, heun)
    noise = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in generators(range(4))])
    errors = []
    for count in (steps // 2, steps):
        arguments = {"batch_size": 4, "num_inference_steps": count, "output_type": "latent"}
        images = pipeline(**arguments, generator=generators(range(4))).images
        errors.append((images - (MEAN + VARIANCE**0.5 * noise)).abs().max().item())
    assert errors[1] < 0.016 and errors[1] < 0.6 * errors[0], errors  # of values with a standard deviation of 0.3


def test_euler_steps_of_the_pipeline_are_those_of_its_definition():
    pipeline = optimal_pipeline("flow", 3.0, heun=False)
    images = pipeline(num_inference_steps=5, generator=generators([0]), output_type="latent", return_dict=False)[0]
    state = torch.randn(images.shape[1:], generator=generators([0])[0])[None].double()
    fractions = [3 * t / (1 + 2 * t) for t in (1, 0.8, 0.6, 0.4, 0.2, 0)]
    for fraction, following in zip(fractions, fractions[1:], strict=False):
        velocity = (state - optimal_image(state, fraction)) / fraction
        state = state + (following - fraction) * velocity
    torch.testing.assert_close(images.double(), state, rtol=0, atol=1e-5)


# --- traps


@pytest.mark.parametrize("heun", [False, True])
def test_network_sees_the_same_time_in_training_and_sampling(heun):
    """1000 t, with 1000 at pure noise; with another sign or scale, sampling would ask what was never trained."""
    pipeline = optimal_pipeline("flow", 2.0, heun)
    pipeline(num_inference_steps=4, generator=generators([0]))
    sampled = [step[0] for step in pipeline.unet.timesteps]
    levels = torch.tensor([2 * t / (1 + t) for t in (1, 0.75, 0.5, 0.25)])
    noisy, timesteps = RectifiedFlow(flow_shift=2.0).network_inputs(
        torch.zeros(4, 1, 1, 1), torch.ones(4, 1, 1, 1), levels
    )
    assert timesteps[0] == 1000 and noisy.flatten().tolist() == pytest.approx(levels.tolist())
    assert sorted(set(sampled), reverse=True) == pytest.approx(timesteps.tolist(), rel=1e-6)


def test_shift_is_applied_once_in_training_and_sampling():
    """Both are `s t / (1 + (s - 1) t)` of unshifted fractions: the median of training and the steps of the sampler."""
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for sampling in ("logit_normal", "uniform"):
        plain = RectifiedFlow(timestep_sampling=sampling, flow_shift=1.0).noise_levels(uniform).double()
        shifted = RectifiedFlow(timestep_sampling=sampling, flow_shift=3.0).noise_levels(uniform).double()
        torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=0, atol=1e-6)
        assert plain.median() == pytest.approx(0.5, abs=1e-3) and shifted.median() == pytest.approx(0.75, abs=1e-3)
    pipeline = optimal_pipeline("flow", 3.0, heun=False)
    pipeline(num_inference_steps=10, generator=generators([0]))
    plain = torch.linspace(1, 0.1, 10)
    expected = torch.cat([3 * plain / (1 + 2 * plain), torch.zeros(1)])
    torch.testing.assert_close(pipeline.scheduler.sigmas, expected, rtol=0, atol=1e-6)


def test_logit_normal_fractions_have_the_mean_and_deviation_asked_for():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logits = RectifiedFlow(logit_mean=-0.8, logit_std=0.7, flow_shift=1.0).noise_levels(uniform).double().logit()
    assert logits.mean() == pytest.approx(-0.8, abs=2e-3) and logits.std() == pytest.approx(0.7, abs=5e-3)
    ends = RectifiedFlow(flow_shift=4.0).noise_levels(torch.tensor([0.0, 1 - 2**-24]))
    assert 0 < ends[0] < ends[1] <= 1


def test_loss_of_a_predicted_image_is_that_of_its_velocity():
    torch.manual_seed(0)
    clean, noise, error = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    levels = torch.tensor([0.05, 0.2, 0.5, 0.9, 1.0])
    fraction = levels[:, None, None, None]
    image = clean + error
    velocity = ((1 - fraction) * clean + fraction * noise - image) / fraction
    of_image = RectifiedFlow("sample").losses(image, clean, noise, levels)
    of_velocity = RectifiedFlow("flow").losses(velocity, clean, noise, levels)
    torch.testing.assert_close(of_image.double(), of_velocity.double(), rtol=1e-4, atol=0)
    near = RectifiedFlow("sample").losses(image, clean, noise, torch.full((5,), 1e-7))
    torch.testing.assert_close(near.double(), error.square().mean((1, 2, 3)) / 0.05**2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("size", "shift"), [((3, 32, 32), 1.0), ((4, 32, 32), 1.0), ((3, 64, 64), 3**0.5), ((4, 64, 64), 2.0)]
)
def test_default_shift_follows_the_size_of_the_input(size, shift):
    assert RectifiedFlow().for_input(*size).flow_shift == pytest.approx(shift)
    assert RectifiedFlow(flow_shift=1.5).for_input(*size).flow_shift == 1.5


# --- flags and pretrained schedulers


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"formulation": "flow", "prediction_type": "epsilon"}, ("--prediction_type", "epsilon", "ddpm")),
        ({"formulation": "flow", "snr_gamma": 5.0}, ("--snr_gamma", "ddpm", "flow")),
        ({"prediction_type": "flow"}, ("--prediction_type", "flow", "ddpm")),
        ({"flow_shift": 2.0}, ("--flow_shift", "flow", "ddpm")),
        (
            {"formulation": "flow", "timestep_sampling": "uniform", "logit_mean": 0.5},
            ("--logit_mean", 0.5, "--timestep_sampling", "uniform"),
        ),
    ],
)
def test_flags_without_effect_are_refused(flags, words):
    with pytest.raises(UserError, match=mentions(*words)):
        choose_formulation(DiffusionConfig(**flags), {}, False)


@pytest.mark.parametrize("formulation", [RectifiedFlow(timestep_sampling="uniform"), RectifiedFlow("sample"), EDM()])
def test_flags_as_saved_with_a_run_give_its_formulation(formulation):
    formulation = formulation.for_input(3, 64, 64)
    assert choose_formulation(DiffusionConfig(**formulation_flags(formulation)), {}, False) == formulation


def test_message_about_a_pretrained_target_offers_those_of_the_formulation():
    config = json.loads(RectifiedFlow().for_input(3, 8, 8).scheduler.to_json_string()) | {"prediction_type": "epsilon"}
    with pytest.raises(ValueError, match=mentions("epsilon", "flow, sample", "--prediction_type")) as error:
        choose_formulation(DiffusionConfig(), config, False)
    assert "v_prediction" not in str(error.value)


def test_folder_of_a_flow_with_another_target_is_refused(tmp_path):
    optimal = DiffiTPipeline(tiny_unet(), RectifiedFlow(flow_shift=1.0).scheduler)
    optimal.save_pretrained(tmp_path)
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match=mentions("prediction_type", "epsilon", tmp_path)):
        open_pipeline(tmp_path)


def test_fine_tuning_takes_over_the_flow_of_the_weights():
    config = json.loads(RectifiedFlow("sample", flow_shift=2.5).scheduler.to_json_string())
    formulation = choose_formulation(DiffusionConfig(), config, False)
    assert (formulation.prediction_type, formulation.flow_shift) == ("sample", 2.5)
    assert differences(formulation, config) == {}
    other = choose_formulation(DiffusionConfig(flow_shift=1.0), config, False)
    assert differences(other, config) == {"flow_shift": (2.5, 1.0)}
    scaled = config | {"num_train_timesteps": 500}  # the time that the network sees
    assert choose_formulation(DiffusionConfig(), scaled, False).scheduler.config.num_train_timesteps == 500
    with pytest.raises(ValueError, match=mentions("use_dynamic_shifting", True)):
        choose_formulation(DiffusionConfig(), config | {"use_dynamic_shifting": True}, False)


def test_saved_scheduler_says_what_the_network_predicts(tmp_path):
    for prediction_type in ("flow", "sample"):
        saved = RectifiedFlow(prediction_type, flow_shift=2.0).scheduler
        saved.save_pretrained(tmp_path)
        loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
        formulation = formulation_of(loaded)
        assert (formulation.prediction_type, formulation.flow_shift) == (prediction_type, 2.0)


# --- the pipeline's scheduler


def test_scheduler_for_other_models_is_refused():
    pipeline = optimal_pipeline("sample", 2.0, heun=False)
    config = pipeline.scheduler.config
    for scheduler, words in (
        (DDPMScheduler(), ("DDPMScheduler", "rectified flow", "FlowMatchEulerDiscreteScheduler")),
        (FlowMatchEulerDiscreteScheduler.from_config(config, shift=1.0), ("shift", 1.0, 2.0)),
        (FlowMatchEulerDiscreteScheduler(shift=2.0), ("prediction_type", None, "sample")),
        (FlowMatchEulerDiscreteScheduler.from_config(config, num_train_timesteps=100), ("num_train_timesteps", 100)),
        (FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True), ("FlowMatchEulerDiscreteScheduler",)),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=mentions(*words)):
            pipeline(num_inference_steps=2)
    ddpm = quiet(DiffiTPipeline(tiny_unet(), DDPMScheduler()))
    ddpm.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=mentions("FlowMatchEulerDiscreteScheduler", "DDPM")):
        ddpm(num_inference_steps=2)


@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
def test_diffusers_heun_scheduler_samples_the_same_images(prediction_type):
    ours = optimal_pipeline(prediction_type, 1.0, heun=True)
    theirs = optimal_pipeline(prediction_type, 1.0, heun=False)
    theirs.scheduler = FlowMatchHeunDiscreteScheduler.from_config(theirs.scheduler.config)
    arguments = {"num_inference_steps": 60, "output_type": "np", "return_dict": False}
    images = [pipeline(generator=generators([0]), **arguments)[0] for pipeline in (ours, theirs)]
    np.testing.assert_allclose(*images, rtol=0, atol=4e-3)  # their last step is shorter


def test_guidance_of_images_equals_guidance_of_velocities():
    """The conversion is affine, so that a guided image gives the guided velocity."""
    network = tiny_unet(num_class_embeds=2)
    arguments = {"class_labels": [0, 1], "guidance_scale": 2.5, "num_inference_steps": 3, "output_type": "latent"}
    of_image = quiet(DiffiTPipeline(network, RectifiedFlow("sample", flow_shift=1.0).scheduler, heun=False))
    image = of_image(**arguments, generator=generators([0, 1])).images

    class Velocity(torch.nn.Module):
        config, dtype, device = network.config, torch.float32, torch.device("cpu")

        def forward(self, noisy, timesteps, class_labels):
            predicted = network(noisy, timesteps, class_labels=class_labels).sample
            return type("Output", (), {"sample": (noisy - predicted) / (timesteps / 1000)[:, None, None, None]})

    of_velocity = quiet(DiffiTPipeline(network, RectifiedFlow("flow", flow_shift=1.0).scheduler, heun=False))
    of_velocity.unet = Velocity()
    velocity = of_velocity(**arguments, generator=generators([0, 1])).images
    torch.testing.assert_close(image, velocity, rtol=0, atol=1e-4)


# --- whole runs


UNET = {"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1}
UNET |= {"norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}


@pytest.fixture(scope="module")
def unet_config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "unet.json"
    file.write_text(json.dumps(UNET))
    return file


@pytest.mark.parametrize("kind", ["diffit", "unet", "latents"])
def test_flow_is_trained_saved_resumed_sampled_and_evaluated(kind, base_args, unet_config, tmp_path, image_folder):
    flags = [*base_args, "--formulation=flow", "--prediction_type=sample", "--checkpointing_steps=2"]
    if kind == "unet":
        flags.append(f"--model_config={unet_config}")
    if kind == "latents":
        flags += latent_flags(tmp_path)
    folder, again = tmp_path / "run", tmp_path / "again"
    flags += ["--validation_fraction=0.25", "--learning_rate=1e-2"]
    train([*flags, f"--output_dir={folder}"])
    train([*flags, f"--output_dir={again}", "--max_train_steps=2"])
    train([*flags, f"--output_dir={again}", "--resume_from_checkpoint=latest"])
    part = "transformer" if kind == "latents" else "unet"
    states = [name.replace("unet", part) for name in STATES]
    assert_same_files(folder / "checkpoint-4", again / "checkpoint-4", states)

    args = yaml.safe_load((folder / "training_args.yaml").read_text())
    assert (args["formulation"], args["prediction_type"], args["flow_shift"]) == ("flow", "sample", 1.0)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler" and config["prediction_type"] == "sample"

    heun = sample(folder, tmp_path / "heun", "--seeds=0-3", "--class_labels=all", "--guidance_scale=1.5")
    euler = sample(folder, tmp_path / "euler", "--seeds=0-3", "--class_labels=all", "--scheduler=flow_euler")
    assert len(heun) == len(euler) == 4 and any((heun[name] != euler[name]).any() for name in heun)
    weak = ("--scheduler=flow_euler", "--guidance_scale=2", f"--guidance_model={again}", "--class_labels=all")
    same = sample(folder, tmp_path / "auto", "--seeds=0-3", *weak)  # guided by itself, nothing changes
    assert all(np.abs(same[name].astype(int) - euler[name]).max() <= 1 for name in euler)
    result = evaluate_folder([f"--model_path={folder}", f"--reference={image_folder}"], tmp_path)
    assert math.isfinite(result["frechet_distance"]["value"])


def latent_flags(tmp_path: Path) -> list[str]:
    tiny_vae(latent_channels=2, scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    network = {"_class_name": "DiffiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8}
    network |= {"num_layers": 2, "patch_size": 2, "in_channels": 2, "out_channels": 2, "sample_size": 4}
    (tmp_path / "transformer.json").write_text(json.dumps(network))
    return [f"--model_config={tmp_path / 'transformer.json'}", f"--vae_model_name_or_path={tmp_path / 'vae'}"]
