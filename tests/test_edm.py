"""EDM models: preconditioning, Heun's method on a problem with a known solution, and sampling of saved folders."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import sample_diffit
from diffit.errors import UserError
from diffit_pipeline import EDM_SCHEDULERS, SCHEDULERS, DiffiTPipeline, choose_scheduler, edm_heun, edm_time
from helpers import count_batches, generators, mentions, open_pipeline, quiet, sample, tiny_unet

MEAN = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, -0.1], [0.0, -0.1, 0.1]], dtype=torch.float64)


def gaussian_denoiser(sample: torch.Tensor, sigma: float) -> torch.Tensor:
    """D(x; sigma) of data from N(MEAN, COVARIANCE); shape (B, 3)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64))
    return MEAN + (sample - MEAN) @ gain.T


def exact_solution(sample: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability flow takes noisy samples of a noise level; shape (B, 3)."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    shrink = vectors @ torch.diag((values / (values + sigma**2)).sqrt()) @ vectors.T
    return MEAN + (sample - MEAN) @ shrink.T


def karras_sigmas(num_steps: int, sigma_min: float = 0.002) -> list[float]:
    """EDM Eq. 5 with rho = 7, and 0."""
    low, high = sigma_min ** (1 / 7), 80 ** (1 / 7)
    return [(high + i / (num_steps - 1) * (low - high)) ** 7 for i in range(num_steps)] + [0.0]


def standard_normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def edm_pipeline(**config) -> DiffiTPipeline:
    return quiet(DiffiTPipeline(tiny_unet(**config), EDMEulerScheduler()))


@pytest.fixture(scope="module")
def edm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edm")
    edm_pipeline(num_class_embeds=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ddpm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    DiffiTPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler()).save_pretrained(folder)
    return folder


# --- preconditioning: training and sampling take it from diffusers' scheduler


def preconditioning(sigma: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, ...]:
    """c_skip, c_out, c_in and c_noise: what the scheduler makes of images and network outputs that are 0 or 1."""
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    ones, zeros = torch.ones_like(sigma), torch.zeros_like(sigma)
    c_skip, c_out = (scheduler.precondition_outputs(*images, sigma) for images in ((ones, zeros), (zeros, ones)))
    return c_skip, c_out, scheduler.precondition_inputs(ones, sigma), scheduler.precondition_noise(sigma)


def test_preconditioning_equals_values_by_hand():
    """sigma_data 0.5: sigma 0.5 gives sigma^2 + sigma_data^2 = 0.5, sigma 1.2 gives 1.69 = 1.3^2."""
    c_skip, c_out, c_in, c_noise = preconditioning(torch.tensor([0.5, 1.2]), 0.5)
    torch.testing.assert_close(c_skip, torch.tensor([0.5, 0.25 / 1.69]), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out, torch.tensor([0.35355339, 0.6 / 1.3]), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_in, torch.tensor([1.41421356, 1 / 1.3]), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_noise, torch.tensor([-0.17328680, 0.04558039]), rtol=1e-6, atol=0)


def test_preconditioning_equals_table_1_of_edm():
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, 0.7)
    total = 0.7**2 + sigma**2
    torch.testing.assert_close(c_skip, 0.7**2 / total, rtol=1e-12, atol=0)
    torch.testing.assert_close(c_out, 0.7 * sigma / total.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_in, 1 / total.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_noise, sigma.log() / 4, rtol=1e-12, atol=0)


def test_preconditioning_keeps_input_and_target_at_unit_variance():
    """Var(c_in x) = 1, and the target of F, (y - c_skip x) / c_out, has variance 1 (EDM appendix B.6)."""
    sigma = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64)
    c_skip, c_out, c_in, _ = preconditioning(sigma, 0.5)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(c_in**2 * (0.25 + sigma**2), ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2, ones, rtol=1e-9, atol=0)


def test_heun_steps_are_evenly_spaced_in_time():
    times = [edm_time(sigma, 0.002, 80.0, 7.0) for sigma in karras_sigmas(5)]
    assert times == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0], abs=1e-12)
    assert edm_time(90.0, 0.002, 80.0, 7.0) == 1  # churn goes beyond the highest


# --- Heun's method


def test_heun_converges_at_second_order():
    """The error falls by four where steps double; the last step, which ends at 0, is kept too short to matter."""
    noise = 80 * standard_normal(8)
    expected = exact_solution(noise, 80)
    numbers = torch.tensor([32.0, 64.0, 128.0, 256.0], dtype=torch.float64)
    errors = torch.stack(
        [
            (edm_heun(gaussian_denoiser, noise, karras_sigmas(int(n), sigma_min=1e-4)) - expected).norm()
            for n in numbers
        ]
    )
    slopes = -(errors[1:] / errors[:-1]).log() / (numbers[1:] / numbers[:-1]).log()
    assert ((1.85 < slopes) & (slopes < 2.15)).all(), slopes


def test_heun_reaches_the_exact_mean_and_covariance():
    """With this denoiser the method is an affine map: mean and covariance follow from it without sampling."""
    points = torch.cat([torch.zeros(1, 3), 80 * torch.eye(3)]).double()
    results = edm_heun(gaussian_denoiser, points, karras_sigmas(256))
    mean, matrix = results[0], (results[1:] - results[0]).T
    covariance = matrix @ matrix.T
    exact = exact_solution(points, 80)
    exact_matrix = (exact[1:] - exact[0]).T
    torch.testing.assert_close(mean, exact[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(covariance, exact_matrix @ exact_matrix.T, rtol=0, atol=2e-4)
    # What pure noise of the highest level leads to is the data's distribution but for a hundredth.
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=2e-3)


def test_heun_without_a_correction_ends_at_the_denoised_image():
    """One step: 2N - 1 = 1 evaluation, x + (0 - sigma) (x - D) / sigma = D."""
    noise = 80 * standard_normal(2)
    result = edm_heun(gaussian_denoiser, noise, [80.0, 0.0])
    torch.testing.assert_close(result, gaussian_denoiser(noise, 80.0), rtol=0, atol=1e-10)


def test_one_step_of_heun_equals_the_trapezoid_written_out():
    noise = 80 * standard_normal(2)
    result = edm_heun(gaussian_denoiser, noise, [80.0, 30.0])
    slope = (noise - gaussian_denoiser(noise, 80.0)) / 80
    euler = noise - 50 * slope
    slope_there = (euler - gaussian_denoiser(euler, 30.0)) / 30
    torch.testing.assert_close(result, noise - 25 * (slope + slope_there), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_heun_evaluates_2n_minus_1_times_in_float64(num_steps):
    seen = []

    def denoise(sample: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append((sample.dtype, sigma))
        return torch.zeros_like(sample)

    sigmas = karras_sigmas(18)[:num_steps] + [0.0]
    edm_heun(denoise, torch.ones(1, 3), sigmas)
    assert len(seen) == 2 * num_steps - 1
    assert {dtype for dtype, _ in seen} == {torch.float64}
    assert [sigma for _, sigma in seen] == [sigmas[0], *(sigma for sigma in sigmas[1:-1] for _ in range(2))]


@pytest.mark.parametrize("s_churn", [20.0, 80.0])
def test_churn_draws_from_the_exact_distribution(s_churn):
    """Other samples than without churn, of the same mean and covariance: of 40,000, within 5 standard errors."""
    noise = 80 * standard_normal(40_000)
    generator = torch.Generator().manual_seed(1)
    results = edm_heun(gaussian_denoiser, noise, karras_sigmas(256), s_churn=s_churn, generator=generator)
    assert (results - exact_solution(noise, 80.0)).norm(dim=1).median() > 0.3
    variances = COVARIANCE.diagonal()
    assert ((results.mean(0) - MEAN).abs() < 5 * (variances / 40_000).sqrt()).all()
    errors = (results.T.cov() - COVARIANCE).abs()
    assert (errors < 5 * ((variances[:, None] * variances + COVARIANCE**2) / 40_000).sqrt()).all(), errors


def test_stronger_noise_of_churn_widens_the_distribution():
    noise = 80 * standard_normal(4_000)
    settings = {"s_churn": 40.0, "generator": torch.Generator().manual_seed(1)}
    results = edm_heun(gaussian_denoiser, noise, karras_sigmas(80), s_noise=1.05, **settings)
    assert (results.var(0) > 1.1 * COVARIANCE.diagonal()).all()


def test_churn_raises_sigma_as_in_algorithm_2():
    """gamma = min(S_churn / N, sqrt(2) - 1) between S_tmin and S_tmax, 0 elsewhere."""
    sigmas = [80.0, 10.0, 1.0, 0.1, 0.0]
    for s_churn, gamma in ((0.8, 0.2), (100.0, math.sqrt(2) - 1)):
        seen = []

        def denoise(sample: torch.Tensor, sigma: float, seen: list[float] = seen) -> torch.Tensor:
            seen.append(sigma)
            return torch.zeros_like(sample)

        edm_heun(denoise, torch.ones(1, 3), sigmas, s_churn=s_churn, s_tmin=1.0, s_tmax=10.0)
        expected = [80.0, 10.0, 10.0 * (1 + gamma), 1.0, 1 + gamma, 0.1, 0.1]
        assert seen == pytest.approx(expected, rel=1e-12)


def test_churn_outside_its_noise_levels_is_deterministic():
    noise, sigmas = 80 * standard_normal(2), karras_sigmas(18)
    result = edm_heun(gaussian_denoiser, noise, sigmas, s_churn=40.0, s_tmin=100.0)
    assert result.equal(edm_heun(gaussian_denoiser, noise, sigmas))


def test_churn_of_an_image_depends_on_its_own_generator():
    noise, sigmas = 80 * standard_normal(3), karras_sigmas(6)
    together = edm_heun(gaussian_denoiser, noise, sigmas, s_churn=40.0, generator=generators([5, 6, 7]))
    alone = edm_heun(gaussian_denoiser, noise[1:2], sigmas, s_churn=40.0, generator=generators([6]))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-10)


# --- the pipeline


@pytest.mark.parametrize("heun", [True, False])
def test_network_of_zeros_denoises_by_c_skip(heun):
    """F = 0 leaves D = c_skip x, the denoiser of N(0, sigma_data^2): the flow shrinks noise to that."""
    unet = tiny_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipeline = quiet(DiffiTPipeline(unet, EDMEulerScheduler(), heun=heun))
    images = pipeline(batch_size=2, num_inference_steps=200, generator=generators([0, 1]), output_type="latent").images
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators([0, 1])])
    expected = 80 * noise * math.sqrt(0.25 / (0.25 + 80**2))
    error = (images - expected).abs().max()
    assert error < (1e-3 if heun else 0.1) and (heun or error > 1e-3)


def test_heun_of_the_pipeline_equals_a_plain_loop():
    pipeline = edm_pipeline(num_class_embeds=3)
    images = pipeline(["1"], num_inference_steps=4, generator=generators([3]), output_type="latent").images
    sigmas = karras_sigmas(4)
    x = 80 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()

    def derivative(x: torch.Tensor, sigma: float) -> torch.Tensor:
        total = sigma**2 + 0.25
        with torch.no_grad():
            output = pipeline.unet((x / math.sqrt(total)).float(), math.log(sigma) / 4, torch.tensor([1])).sample
        denoised = 0.25 / total * x + 0.5 * sigma / math.sqrt(total) * output
        return (x - denoised) / sigma

    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        d = derivative(x, sigma)
        euler = x + (following - sigma) * d
        x = x + (following - sigma) * (d + derivative(euler, following)) / 2 if following else euler
    torch.testing.assert_close(images, x.float(), rtol=0, atol=1e-4)


def test_solvers_of_diffusers_agree_with_heun_at_many_steps():
    """All follow the same flow; Euler most slowly."""
    pipeline = edm_pipeline()
    settings = {"output_type": "latent", "batch_size": 2}
    expected = pipeline(num_inference_steps=100, generator=generators([0, 1]), **settings).images
    pipeline.heun = False
    euler = pipeline(num_inference_steps=100, generator=generators([0, 1]), **settings).images
    pipeline.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    solver = pipeline(num_inference_steps=100, generator=generators([0, 1]), **settings).images
    torch.testing.assert_close(euler, expected, rtol=0, atol=0.06)
    torch.testing.assert_close(solver, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("name", "passes"), [("edm_heun", 9), ("edm_euler", 5), ("edm_dpmsolver++", 5), (None, 9)])
def test_folder_is_sampled_by_each_edm_scheduler(name, passes, edm_folder):
    pipeline = open_pipeline(edm_folder, scheduler=name)
    batches = count_batches(pipeline.unet)
    images = pipeline([0, 1], num_inference_steps=5, generator=generators([0, 1]), output_type="pt").images
    assert batches == [2] * passes
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all() and images.std() > 0.01


def test_saved_folder_is_sampled_without_a_flag(edm_folder):
    pipeline = quiet(DiffusionPipeline.from_pretrained(edm_folder, trust_remote_code=True))
    assert type(pipeline).__name__ == "DiffiTPipeline" and type(pipeline.scheduler) is EDMEulerScheduler
    images = pipeline([2], num_inference_steps=3, generator=generators([0]), output_type="pt").images
    expected = open_pipeline(edm_folder)(
        [2], num_inference_steps=3, generator=generators([0]), output_type="pt"
    ).images
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


def test_euler_without_the_correction_is_saved(edm_folder, tmp_path):
    """However it was set; the folder samples as the pipeline did."""
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    built = quiet(DiffiTPipeline(tiny_unet(num_class_embeds=3), EDMEulerScheduler(), heun=False))
    changed = open_pipeline(edm_folder)
    changed.heun = False
    for name, pipeline in (("built", built), ("changed", changed)):
        expected = pipeline([2], generator=generators([0]), **settings).images
        pipeline.save_pretrained(tmp_path / name)
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / name, trust_remote_code=True))
        images = loaded([2], generator=generators([0]), **settings).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        loaded.heun = True
        assert (loaded([2], generator=generators([0]), **settings).images - images).abs().max() > 1e-3
    assert "heun" not in (edm_folder / "model_index.json").read_text() and open_pipeline(edm_folder).heun is True


def test_scheduler_of_the_other_formulation_is_refused(edm_folder, ddpm_folder):
    with pytest.raises(ValueError, match=mentions("edm_dpmsolver++", "edm_euler, edm_heun", edm_folder, "'ddim'")):
        open_pipeline(edm_folder, scheduler="ddim")
    with pytest.raises(ValueError, match=mentions("ddim", "ddpm", ddpm_folder, "'edm_heun'")):
        open_pipeline(ddpm_folder, scheduler="edm_heun")
    assert [choose_scheduler(str(folder)) for folder in (edm_folder, ddpm_folder)] == ["edm_heun", "ddim"]


@pytest.mark.parametrize("from_folder", [True, False])  # a scheduler built in Python keeps fewer settings
@pytest.mark.parametrize(("model", "name", "helps"), [("edm", "ddim", "EDMEuler"), ("ddpm", "edm_heun", "DDIM")])
def test_call_refuses_the_scheduler_of_the_other_formulation(model, name, helps, from_folder, request):
    pipeline = open_pipeline(request.getfixturevalue(f"{model}_folder"))
    scheduler_class = (SCHEDULERS | EDM_SCHEDULERS)[name]
    config = pipeline.scheduler.config if from_folder else {}
    pipeline.scheduler = scheduler_class.from_config(config)
    words = mentions(scheduler_class.__name__, model.upper(), f"{helps}Scheduler")
    with pytest.raises(ValueError, match=words):
        pipeline([0], num_inference_steps=2)


def test_folder_loaded_with_the_scheduler_of_the_other_formulation_is_refused(ddpm_folder, tmp_path):
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(ddpm_folder, scheduler=scheduler, trust_remote_code=True)
    with pytest.raises(ValueError, match=mentions("EDMEulerScheduler", "DDPM")):
        pipeline([0], num_inference_steps=2)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_flow_matching_schedulers_are_refused(scheduler, edm_folder, ddpm_folder):
    for folder in (edm_folder, ddpm_folder):
        pipeline = open_pipeline(folder)
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=mentions(type(scheduler).__name__, "flow matching")):
            pipeline([0], num_inference_steps=2)


def test_script_refuses_a_flow_matching_folder(ddpm_folder, tmp_path):
    shutil.copytree(ddpm_folder, tmp_path / "flow")
    FlowMatchLCMScheduler().save_pretrained(tmp_path / "flow/scheduler")
    with pytest.raises(UserError, match=mentions(tmp_path / "flow", "FlowMatchLCMScheduler")):
        sample(tmp_path / "flow", tmp_path / "out", "--seeds=0")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prediction_type": "v_prediction"}, ["prediction_type", "v_prediction", "epsilon"]),
        ({"beta_schedule": "squaredcos_cap_v2"}, ["squaredcos_cap_v2", "linear"]),
        ({"beta_end": 0.012}, ["linear", 0.012, 0.02]),
        ({"num_train_timesteps": 500}, [500, 1000]),
    ],
)
def test_scheduler_of_another_noise_schedule_is_refused(settings, words, ddpm_folder):
    pipeline = open_pipeline(ddpm_folder)
    pipeline.scheduler = DDIMScheduler(**settings)
    with pytest.raises(ValueError, match=mentions(*words, "from_pretrained")):
        pipeline([0], num_inference_steps=2)


def test_schedulers_of_the_model_s_own_settings_are_taken(ddpm_folder):
    """Also one with zero terminal SNR, whose noise schedule hardly differs."""
    settings = {"num_inference_steps": 4, "output_type": "pt"}
    expected = open_pipeline(ddpm_folder, scheduler="heun")([0], generator=generators([0]), **settings).images
    pipeline = open_pipeline(ddpm_folder)
    pipeline.scheduler = SCHEDULERS["heun"].from_config(pipeline.scheduler.config)
    torch.testing.assert_close(pipeline([0], generator=generators([0]), **settings).images, expected, rtol=0, atol=0)
    pipeline.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="leading")
    assert pipeline([0], generator=generators([0]), **settings).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("scheduler", sorted(EDM_SCHEDULERS))
@pytest.mark.parametrize("schedule", ["constant", "power_cosine"])
def test_interval_guides_the_places_among_the_sigmas(scheduler, schedule, edm_folder):
    """5 steps pass the times 1, 0.75, 0.5, 0.25 and 0; Heun evaluates all but the first twice."""
    pipeline = open_pipeline(edm_folder, scheduler=scheduler)
    batches = count_batches(pipeline.unet)
    pipeline(
        [0, 1], num_inference_steps=5, guidance_scale=3.0, guidance_interval=(0.2, 0.8), guidance_schedule=schedule
    )
    single = [2, 4, 4, 4, 2]
    assert batches == ([2, 4, 4, 4, 4, 4, 4, 2, 2] if scheduler == "edm_heun" else single)


def test_guidance_of_edm_models_equals_that_of_the_denoisers(edm_folder):
    """One Heun step is D: so guided images are D(null) + w (D(class) - D(null))."""
    pipeline = open_pipeline(edm_folder)
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    draws = [
        pipeline(label, generator=generators([0]), guidance_scale=scale, **settings).images
        for label, scale in (([1], 1.0), (None, 1.0), ([1], 2.5))
    ]
    conditional_image, null_image, guided = draws
    assert (conditional_image - null_image).abs().max() > 1e-3
    expected = null_image + 2.5 * (conditional_image - null_image)
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)


def test_churn_of_the_pipeline_is_renewed_noise(edm_folder):
    pipeline = open_pipeline(edm_folder)

    def draw(**churn) -> torch.Tensor:
        settings = {"num_inference_steps": 6, "output_type": "latent"} | churn
        return pipeline([0, 1], generator=generators([0, 1]), **settings).images

    churned = draw(s_churn=4.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.003)
    assert (churned - draw()).abs().mean() > 0.01
    assert churned.equal(draw(s_churn=4.0, s_tmin=0.1, s_tmax=10.0, s_noise=1.003))
    for other in ({"s_churn": 2.0}, {"s_tmin": 2.0}, {"s_tmax": 1.0}, {"s_noise": 1.1}):
        settings = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003} | other
        assert not churned.equal(draw(**settings)), other


@pytest.mark.parametrize("name", ["edm_euler", "edm_dpmsolver++"])
def test_churn_needs_heun(name, edm_folder):
    with pytest.raises(ValueError, match=mentions("s_churn", 1.0, "heun=True")):
        open_pipeline(edm_folder, scheduler=name)([0], s_churn=1.0)


# --- the script


def test_script_samples_an_edm_folder_by_heun(edm_folder, tmp_path):
    default = sample(edm_folder, tmp_path / "default", "--seeds=0-2", "--class_labels=1")
    heun = sample(edm_folder, tmp_path / "heun", "--seeds=0-2", "--class_labels=1", "--scheduler=edm_heun")
    euler = sample(edm_folder, tmp_path / "euler", "--seeds=0-2", "--class_labels=1", "--scheduler=edm_euler")
    assert len(default) == 3
    for name in default:
        assert (default[name] == heun[name]).all() and (default[name] != euler[name]).any()


def test_script_hands_churn_to_the_pipeline(edm_folder, tmp_path):
    flags = ("--s_churn=1.2", "--s_tmin=0.1", "--s_tmax=50", "--s_noise=1.2", "--batch_size=1")
    (drawn,) = sample(edm_folder, tmp_path, "--seeds=5", "--class_labels=1", *flags).values()
    settings = {"s_churn": 1.2, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.2, "num_inference_steps": 3}
    images = open_pipeline(edm_folder)([1], generator=generators([5]), output_type="np", **settings).images
    assert (drawn == (images[0] * 255).round().astype("uint8")).all()


def test_script_refuses_to_mix_images_of_another_churn(edm_folder, tmp_path):
    sample(edm_folder, tmp_path, "--seeds=0-1", "--s_churn=2", "--s_tmax=50")
    sample(edm_folder, tmp_path, "--seeds=0-1", "--s_churn=2", "--s_tmax=50", "--scheduler=edm_heun")
    with pytest.raises(ValueError, match=mentions("--s_tmax", 50.0, 40.0)):
        sample(edm_folder, tmp_path, "--seeds=0-1", "--s_churn=2", "--s_tmax=40")


@pytest.mark.parametrize(
    ("folder", "flags", "words"),
    [
        ("edm_folder", ["--scheduler=ddim"], ["scheduler", "edm_heun", "'ddim'"]),
        ("edm_folder", ["--eta=0.5"], ["--eta", "--scheduler", "ddim", "edm_heun"]),
        ("ddpm_folder", ["--s_churn=1"], ["--s_churn", "--scheduler", "edm_heun", "ddim"]),
        ("ddpm_folder", ["--scheduler=edm_euler"], ["scheduler", "ddim", "'edm_euler'"]),
    ],
)
def test_flags_of_the_other_formulation_are_refused(folder, flags, words, request, tmp_path):
    with pytest.raises(ValueError, match=mentions(*words)):
        sample(request.getfixturevalue(folder), tmp_path, *flags)


def test_guidance_model_of_the_other_formulation_is_refused(edm_folder, ddpm_folder, tmp_path):
    flags = (f"--guidance_model={ddpm_folder}", "--guidance_scale=2")
    with pytest.raises(ValueError, match=mentions("--guidance_model", "beta_schedule", "linear")):
        sample(edm_folder, tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--s_churn=-1"], ["--s_churn", 0, -1.0]),
        (["--s_churn=inf"], ["--s_churn", 0, "inf"]),
        (["--s_churn=1", "--scheduler=edm_euler"], ["--s_churn", "--scheduler", "edm_heun", "edm_euler"]),
        (["--s_tmin=1"], ["--s_tmin", "--s_churn"]),
        (["--s_tmax=1"], ["--s_tmax", "--s_churn"]),
        (["--s_noise=1.1"], ["--s_noise", "--s_churn"]),
        (["--s_churn=1", "--s_tmin=3", "--s_tmax=2"], ["--s_tmin", "--s_tmax", 3.0, 2.0]),
        (["--s_churn=1", "--s_tmin=-1"], ["--s_tmin", "--s_tmax", -1.0, None]),
        (["--s_churn=1", "--s_noise=0"], ["--s_noise", 0, 0.0]),
    ],
)
def test_wrong_churn_flags_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        sample_diffit.parse_args(["--model_path=a", "--output_dir=b", *flags])
    assert mentions(*words).search(capsys.readouterr().err)
