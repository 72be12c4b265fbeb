"""Sampling: the pipeline and the script."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    HeunDiscreteScheduler,
    KarrasVeScheduler,
    ModelMixin,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file, save_file

import diffit.sampling
import sample_diffit
from diffit import sampling_config
from diffit.errors import RunError, UserError
from diffit.networks import MODEL_CLASSES, model_class
from diffit.run_dir import MARK
from diffit.sampling import load_guidance_model, load_pipeline, load_sampler, parse_class_labels, sample_seeds
from diffit.sampling_config import GuidanceConfig, SamplingConfig
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import (
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    SCHEDULERS,
    DiffiTPipeline,
    NonFiniteImagesError,
    image_grid,
    null_label,
)
from helpers import (
    ROOT,
    TINY_CONFIG,
    generators,
    mentions,
    open_pipeline,
    quiet,
    sample,
    tiny_dit,
    tiny_unet,
    tiny_vae,
)

NAMES = {"0": "red", "1": "green", "2": "7"}
REQUIRED = {  # flags that each script must have
    "sample_diffit.py": ["--model_path=m", "--output_dir=o"],
    "eval_diffit.py": ["--model_path=m", "--reference=r"],
}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conditional")
    DiffiTPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(), id2label=NAMES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unconditional")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


# --- the pipeline


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_samples_images(scheduler, conditional):
    pipeline = open_pipeline(conditional, scheduler=scheduler)
    images = pipeline(
        class_labels=[0, 1], num_inference_steps=6, guidance_scale=2.0, generator=generators([1, 2]), output_type="pt"
    ).images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


@pytest.mark.parametrize(
    ("betas", "steps", "needed"), [("squaredcos_cap_v2", 20, 40), ("squaredcos_cap_v2", 38, 39), ("linear", 5, None)]
)
def test_heun_whose_first_step_overshoots_warns_with_the_steps_that_do_not(betas, steps, needed, recwarn):
    """On the exact denoiser of two modes at +-0.8, the steps of the warning miss neither, the others do."""
    base = DDPMScheduler(beta_schedule=betas, prediction_type="v_prediction")
    pipeline = quiet(DiffiTPipeline(TwoModes(base.alphas_cumprod), HeunDiscreteScheduler.from_config(base.config)))

    def missed(steps: int) -> float:
        images = pipeline(
            batch_size=64, num_inference_steps=steps, generator=generators(range(64)), output_type="latent"
        ).images
        return ((images.abs() - 0.8).abs() > 0.4).float().mean().item()

    share = missed(steps)
    warned = [str(warning.message) for warning in recwarn if "HeunDiscrete" in str(warning.message)]
    if needed is None:
        assert warned == []
        return
    assert len(warned) == 1 and mentions("heun", f"num_inference_steps {steps}", needed, "unipc").search(warned[0])
    assert missed(needed) < 0.01 and (steps > 30 or share > 0.3)
    assert len([warning for warning in recwarn if "HeunDiscrete" in str(warning.message)]) == 1


class TwoModes(ModelMixin, ConfigMixin):
    """Predicts the velocity of images whose pixels are +-0.8 with a standard deviation of 0.1, exactly."""

    @register_to_config
    def __init__(
        self, alphas_cumprod: torch.Tensor, in_channels: int = 1, out_channels: int = 1, sample_size: int = 8
    ):
        super().__init__()
        self.alphas_cumprod, self.unused = alphas_cumprod, torch.nn.Parameter(torch.zeros(()))
        self.register_to_config(alphas_cumprod=None, num_class_embeds=None)

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: None) -> UNet2DOutput:
        whole = timesteps[0].floor().long()
        pair = self.alphas_cumprod[whole : whole + 2]
        alpha = torch.lerp(pair[0], pair[-1], timesteps[0].float() - whole)
        modes = torch.tensor([-0.8, 0.8]).reshape(2, 1, 1, 1, 1)
        variance = alpha * 0.01 + 1 - alpha
        residuals = sample - alpha.sqrt() * modes  # (2, B, C, H, W)
        weights = (-residuals.square() / (2 * variance)).softmax(dim=0)
        clean = (weights * (modes + alpha.sqrt() * 0.01 / variance * residuals)).sum(dim=0)
        noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return UNet2DOutput(sample=alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)


def test_pipeline_equals_a_plain_ddim_loop(conditional):
    """DDIM (eta 0) with guidance, written out: x_0 from epsilon, then the step to the previous timestep."""
    pipeline = open_pipeline(conditional)
    images = pipeline(
        class_labels=["green"], num_inference_steps=5, guidance_scale=3.0, generator=generators([4]), output_type="pt"
    ).images
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for t in (800, 600, 400, 200, 0):
        with torch.no_grad():
            conditional_eps = pipeline.unet(x, t, torch.tensor([1])).sample
            null_eps = pipeline.unet(x, t, torch.tensor([3])).sample
        eps = null_eps + 3 * (conditional_eps - null_eps)
        a, previous = alphas[t], alphas[t - 200] if t > 0 else alphas[0]
        x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()  # of the clipped image
        previous = previous if t > 0 else torch.tensor(1.0)  # set_alpha_to_one
        x = previous.sqrt() * x_0 + (1 - previous).sqrt() * eps
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_guidance_of_one_takes_a_single_pass(conditional):
    pipeline = open_pipeline(conditional)
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape[0]))
    pipeline(class_labels=[0, 1], num_inference_steps=2, guidance_scale=1.0)
    pipeline(class_labels=[0, 1], num_inference_steps=2, guidance_scale=1.5)
    assert batches == [2, 2, 4, 4]


def test_labels_are_numbers_or_names(conditional):
    pipeline = open_pipeline(conditional)
    assert pipeline.label_ids(["red", 1, "1", "green"]) == [0, 1, 1, 1]
    assert pipeline.label_ids("7") == [2]  # a name that looks like a number is a name
    assert pipeline.label_ids(torch.tensor([2, 0])) == [2, 0]


def test_numbers_that_are_names_have_one_meaning_as_text_and_as_number(tmp_path):
    """Classes 1, 2, 3: a 0 is no class, although an index 0 exists; tensors hold indices."""
    id2label = {str(index): str(index + 1) for index in range(3)}
    pipeline = DiffiTPipeline(tiny_unet(num_class_embeds=3), DDIMScheduler(), id2label)
    expected = [0, 1, 2]
    for labels in ([1, 2, 3], ["1", "2", "3"], range(1, 4), np.arange(1, 4), torch.arange(3)):
        assert pipeline.label_ids(labels) == expected
    assert parse_class_labels(pipeline, "1,2,3") == parse_class_labels(pipeline, "all") == expected
    for labels in ([0], ["0"], np.array([0]), "4"):
        with pytest.raises(ValueError, match="1, 2, 3"):
            pipeline.label_ids(labels)
    with pytest.raises(ValueError, match=mentions("--class_labels 0,1,2", "1, 2, 3")):
        parse_class_labels(pipeline, "0,1,2")
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipeline.label_ids([])
    sampling = SamplingConfig(num_inference_steps=2)
    (drawn,) = sample_seeds(quiet(pipeline), [0], [2], sampling, batch_size=1)  # class indices, as everywhere inside
    images = pipeline("3", generator=generators([0]), num_inference_steps=2, output_type="np").images
    assert np.array_equal(drawn, (images * 255).round().astype(np.uint8))


@pytest.mark.parametrize("label", ["purple", 3, -1, "3", 0.5])
def test_unknown_label_is_refused(label, conditional):
    with pytest.raises(ValueError, match="red, green, 7"):
        open_pipeline(conditional)(class_labels=label, num_inference_steps=1)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"guidance_scale": 2.0}, "class_labels"),
        ({"class_labels": [0, 1], "batch_size": 3}, "3 images"),
        ({"batch_size": 2, "generator": generators([0])}, "generators"),
        ({"batch_size": 2, "generator": tuple(generators([0, 1]))}, "generator must be"),
        ({"generator": 3}, "generator must be .* got 3"),
        ({"generator": [3]}, "generator must be"),
        ({"guidance_scale": "2"}, "guidance_scale .* '2'"),
        ({"guidance_scale": None}, "guidance_scale .* None"),
        ({"eta": None}, "eta .* None"),
        ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval"),
        ({"guidance_interval": None}, "guidance_interval .* None"),
        ({"guidance_interval": ("a", "b")}, "guidance_interval"),
        ({"guidance_model": "outputs/weak", "guidance_scale": 2}, "guidance_model .* 'outputs/weak'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, words, conditional):
    with pytest.raises(ValueError, match=words):
        open_pipeline(conditional)(num_inference_steps=1, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (RePaintScheduler, ["original_image, mask"]),
        (KarrasVeScheduler, ["sample_hat"]),
        (ScoreSdeVeScheduler, []),
        (DDIMInverseScheduler, []),
    ],
)
def test_schedulers_that_do_not_sample_are_refused(scheduler, words, conditional):
    pipeline = open_pipeline(conditional)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=mentions(scheduler.__name__, "not for sampling", *words)):
        pipeline(class_labels=[0], num_inference_steps=2)


def test_noise_levels_of_another_model_are_not_called_equal(conditional):
    """CogVideoX shifts the noise levels of the same betas."""
    pipeline = open_pipeline(conditional)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=mentions("CogVideoXDDIMScheduler", "other noise levels")):
        pipeline(class_labels=[0], num_inference_steps=2)


@pytest.mark.parametrize("id2label", [["red", "green"], {"x": "red"}, {"0": 5}])
@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_names_of_classes_that_are_none_are_refused(id2label, as_checkpoint, conditional, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(conditional, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": id2label}))
    if as_checkpoint:  # whose run has the names
        checkpoint = folder / "checkpoint-1"
        shutil.copytree(folder / "unet", checkpoint / "unet")
        shutil.copytree(folder / "scheduler", checkpoint / "scheduler")
        (checkpoint / "state.json").write_text("{}")
        folder = checkpoint
    with pytest.raises(UserError, match=mentions(f"--model_path {folder}", "id2label")):
        sample(folder, tmp_path / "out", "--class_labels=0")


@pytest.mark.parametrize(
    ("config", "word"), [("{}", "_class_name"), ('{"_class_name": "DDIMScheduler", "prediction_type": "x"}', "'x'")]
)
def test_scheduler_config_that_says_nothing_is_refused(config, word, conditional, tmp_path):
    """Defaults would be guesses: images of another objective look like those of a bad model."""
    shutil.copytree(conditional, tmp_path / "model")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(config)
    with pytest.raises(UserError, match=mentions(tmp_path / "model", word)):
        sample(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_file_as_a_model_is_refused(conditional, tmp_path):
    with pytest.raises(UserError, match=mentions(f"--model_path {conditional / 'model_index.json'}", "folder")):
        sample(conditional / "model_index.json", tmp_path / "out")


def test_attention_backend_that_a_network_lacks_is_refused(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = UNet2DModel(8, 3, 3, block_out_channels=(8,), norm_num_groups=4, **blocks)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=mentions("--attention_backend flex", "UNet2DModel")):
        sample(tmp_path / "model", tmp_path / "out", "--attention_backend=flex")


def test_two_samplings_at_once_list_the_images_of_both(conditional, tmp_path, monkeypatch):
    """Otherwise an evaluation of the folder would see half of them. The second begins before the first has images."""
    sample_first = sample_diffit.sample_images

    def overtaken(*arguments, **keywords) -> None:
        monkeypatch.setattr(sample_diffit, "sample_images", sample_first)
        sample(conditional, tmp_path, "--seeds=2-3", "--num_inference_steps=1")
        sample_first(*arguments, **keywords)

    monkeypatch.setattr(sample_diffit, "sample_images", overtaken)
    sample(conditional, tmp_path, "--seeds=0-1", "--num_inference_steps=1")
    rows = json.loads((tmp_path / "samples.json").read_text())["images"]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2, 3]
    sample(conditional, tmp_path, "--seeds=0-5", "--num_inference_steps=1")  # our own change is no edit of the user's


def test_scripts_check_exports_of_diffusers_own_pipeline(unconditional, tmp_path):
    """diffusers' DDPMPipeline itself would write the images as black ones."""
    shutil.copytree(unconditional, tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"] * math.nan}, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=mentions("seeds 0, 1", "weights of DiffiTUNet2DModel are not finite")):
        sample(tmp_path / "model", tmp_path / "out", "--seeds=0-1", "--num_inference_steps=2")
    assert not list((tmp_path / "out").glob("*.png"))


def test_labels_on_an_unconditional_model_are_refused(unconditional):
    with pytest.raises(ValueError, match="unconditional"):
        open_pipeline(unconditional)(class_labels=[0], num_inference_steps=1)


def test_no_label_means_the_null_class(conditional):
    pipeline = open_pipeline(conditional)
    images = pipeline(batch_size=1, num_inference_steps=1, generator=generators([0]), output_type="pt").images
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = pipeline.unet(x, 0, torch.tensor([3])).sample.detach()
    a = pipeline.scheduler.alphas_cumprod[0]
    x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(images, x_0 / 2 + 0.5, rtol=0, atol=1e-4)


def test_size_and_output_types(unconditional):
    pipeline = open_pipeline(unconditional)
    array = pipeline(batch_size=2, num_inference_steps=1, height=16, width=8, output_type="np").images
    assert array.shape == (2, 16, 8, 3)
    image = pipeline(num_inference_steps=1, return_dict=False)[0][0]
    assert image.size == (8, 8)


def test_image_grid_places_images_row_by_row():
    images = [PIL.Image.new("RGB", (4, 8), color) for color in ("red", "green", "blue")]
    grid = image_grid(images)
    assert grid.size == (2 * 34, 2 * 66)  # 4 x 8 enlarged eight times, with borders
    assert [grid.getpixel(xy) for xy in ((17, 33), (51, 33), (17, 99))] == [
        (255, 0, 0), (0, 128, 0), (0, 0, 255)
    ]  # fmt: skip
    assert grid.getpixel((51, 99)) == grid.getpixel((0, 0)) == (128, 128, 128)
    assert image_grid([PIL.Image.new("L", (64, 64))] * 5, columns=2, rows=1).size == (132, 66)


def spoil(folder: Path) -> None:
    """Makes a weight of the network NaN, as a training that diverged leaves it."""
    (file,) = folder.glob("unet/*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def test_images_that_are_not_finite_are_refused_by_seed(conditional):
    """Those alone: of three images the second, whose noise overflows the network."""
    pipeline = open_pipeline(conditional)

    def overflow(module, inputs, output):
        output.sample[1] = float("nan")

    pipeline.unet.register_forward_hook(overflow)
    settings = {"num_inference_steps": 2, "class_labels": torch.tensor([0, 1, 2])}
    for output_type in ("pil", "np", "pt", "latent"):
        with pytest.raises(NonFiniteImagesError, match=mentions("seeds 71 have")):
            pipeline(**settings, generator=generators([70, 71, 72]), output_type=output_type)
    with pytest.raises(ValueError, match=mentions("batch positions 1 have")):
        pipeline(**settings)


def test_decoded_images_that_are_not_finite_are_refused():
    """The VAE overflows, not the denoising; clipping to [0, 1] must not hide it."""
    vae = tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("inf"))
    pipeline = quiet(DiffiTPipeline(None, DDIMScheduler(clip_sample=False), transformer=tiny_dit(), vae=vae))
    settings = {"class_labels": 1, "num_inference_steps": 2, "generator": generators([9])}
    with pytest.raises(NonFiniteImagesError, match=mentions(9)):
        pipeline(**settings, output_type="pt")
    assert pipeline(**settings, output_type="latent").images.isfinite().all()


def test_script_writes_no_image_that_is_not_finite(conditional, tmp_path):
    shutil.copytree(conditional, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(RunError, match=mentions("seeds 3, 4, 5 have")):  # not the padding of the batch
        sample(tmp_path / "model", tmp_path / "out", "--seeds=3-5", "--batch_size=4")
    assert not list((tmp_path / "out").glob("*.png"))


# --- latent models


def any_class(config: dict) -> type[ModelMixin]:
    """Also diffusers' own DiT, which is not one of the project's networks."""
    return DiTTransformer2DModel if config["_class_name"] == "DiTTransformer2DModel" else model_class(config)


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    """A folder as `DiTPipeline` has it, with the names of five of 1,000 classes."""
    folder = tmp_path_factory.mktemp("latent")
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(tiny_dit(num_embeds_ada_norm=1000), tiny_vae(), scheduler).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = {"0": "tench, Tinca tinca", "134": "crane", "517": "crane", "638": "maillot", "639": "maillot, tank suit"}
    index["id2label"] = names
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load_latent(folder: Path, **kwargs) -> DiffiTPipeline:
    return quiet(DiffiTPipeline.from_folder(str(folder), any_class, **kwargs))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_equal_those_of_diffusers_own_dit_pipeline(guidance_scale, latent):
    theirs = quiet(DiTPipeline.from_pretrained(latent))
    assert type(theirs) is DiTPipeline
    settings = {"class_labels": [3, 517], "guidance_scale": guidance_scale, "num_inference_steps": 10}
    expected = theirs(**settings, generator=generators([5, 6]), output_type="pt").images
    images = load_latent(latent)(**settings, generator=generators([5, 6]), output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and images.std() > 0.01
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_learned_variance_is_sampled_as_in_improved_ddpm(latent):
    """Ancestral sampling in float64, from arXiv 2102.09672: betas of the respaced chain, variance by Eq. 15."""
    pipeline = load_latent(latent, scheduler="ddpm")
    latents = pipeline(7, num_inference_steps=20, generator=generators([3]), output_type="latent").images
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator).double()
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    timesteps = [round(i * 999 / 19) for i in range(20)]
    network = pipeline.transformer.double()
    for i in reversed(range(20)):
        a, previous = alphas[timesteps[i]], alphas[timesteps[i - 1]] if i > 0 else torch.tensor(1.0).double()
        beta = 1 - a / previous
        with torch.no_grad():
            eps, v = network(x, torch.tensor([timesteps[i]]), torch.tensor([7])).sample.chunk(2, dim=1)
        x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        mean = previous.sqrt() * beta / (1 - a) * x_0 + (1 - beta).sqrt() * (1 - previous) / (1 - a) * x
        x = mean
        if i > 0:
            smallest = (1 - previous) / (1 - a) * beta
            log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * smallest.log()
            x = mean + (log_variance / 2).exp() * torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(latents.double(), x, rtol=1e-4, atol=1e-4)


def test_250_ancestral_steps_are_spaced_as_published(latent):
    """Evenly from timestep 0 to 999: a fractional stride of 999/249, rounded."""
    scheduler = load_latent(latent, scheduler="ddpm").scheduler
    scheduler.set_timesteps(250)
    assert scheduler.timesteps.tolist() == [round(i * 999 / 249) for i in reversed(range(250))]


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_samples_latents_without_clipping(scheduler, tmp_path):
    """From a folder whose scheduler clips and has learned variance; the DPM solvers then cut channels off."""
    saved = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    DiffiTPipeline(None, saved, transformer=tiny_dit(), vae=tiny_vae()).save_pretrained(tmp_path)
    pipeline = load_latent(tmp_path, scheduler=scheduler)
    latents = pipeline(
        [1, 2], num_inference_steps=6, guidance_scale=2.0, generator=generators([1, 2]), output_type="latent"
    ).images
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all() and latents.abs().max() > 1.5


def test_latents_are_scaled_and_shifted_before_they_are_decoded():
    vae = tiny_vae(scaling_factor=0.5, shift_factor=0.3)
    pipeline = quiet(DiffiTPipeline(None, DDIMScheduler(clip_sample=False), transformer=tiny_dit(), vae=vae))
    settings = {"class_labels": 1, "num_inference_steps": 2}
    latents = pipeline(**settings, generator=generators([0]), output_type="latent").images
    images = pipeline(**settings, generator=generators([0]), output_type="pt").images
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + 0.3).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_size_of_a_latent_model_is_in_pixels():
    """DiT itself samples square images only."""
    pipeline = quiet(DiffiTPipeline(None, DDIMScheduler(), transformer=tiny_dit(sample_size=4), vae=tiny_vae()))
    assert pipeline([1], num_inference_steps=1).images[0].size == (8, 8)
    assert pipeline([1], num_inference_steps=1, height=12, width=12).images[0].size == (12, 12)
    with pytest.raises(ValueError, match="multiples of 2, got 7"):
        pipeline([1], num_inference_steps=1, height=8, width=7)


def test_latent_model_without_vae_gives_latents_only():
    pipeline = quiet(DiffiTPipeline(None, DDIMScheduler(), transformer=tiny_dit()))
    assert pipeline(num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="need a vae"):
        pipeline(num_inference_steps=1)


def test_low_precision_denoises_and_decodes_in_float32(latent):
    pipeline = load_latent(latent, dtype=torch.bfloat16)
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    settings = {"class_labels": 1, "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
    images = pipeline(**settings, generator=generators([0])).images
    expected = load_latent(latent)(**settings, generator=generators([0])).images
    torch.testing.assert_close(images, expected, rtol=0, atol=0.05)


def test_every_name_of_a_class_is_accepted(latent):
    pipeline = load_latent(latent)
    assert pipeline.label_ids(["Tinca tinca", "tench, Tinca tinca", "tank suit", "999"]) == [0, 0, 639, 999]
    assert pipeline.label_ids("maillot") == [638]  # a whole name before a part of one
    with pytest.raises(ValueError, match=r"'crane' is the name of the classes \[134, 517\]"):
        pipeline.label_ids("crane")


def test_pipeline_has_one_network():
    for networks in ({"unet": None}, {"unet": tiny_unet(), "transformer": tiny_dit()}):
        with pytest.raises(ValueError, match="either unet or transformer"):
            DiffiTPipeline(scheduler=DDIMScheduler(), **networks)


@pytest.mark.parametrize("folder", ["latent", "unconditional"])
def test_pipeline_class_loads_folders_of_diffusers(folder, request):
    folder = request.getfixturevalue(folder)
    own_file = str(ROOT / "diffit_pipeline.py")
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=own_file, trust_remote_code=True)
    assert type(pipeline).__name__ == "DiffiTPipeline"
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    images = quiet(pipeline)(**settings, generator=generators([0])).images
    expected = load_latent(folder, scheduler="ddim" if pipeline.unet is None else "ddpm")
    assert torch.equal(images, expected(**settings, generator=generators([0])).images)


def test_saved_folder_names_the_components_it_has(conditional, latent, tmp_path):
    load_latent(latent).save_pretrained(tmp_path)
    for folder, components in ((conditional, {"unet"}), (tmp_path, {"transformer", "vae"})):
        index = json.loads((folder / "model_index.json").read_text())
        assert {key for key in index if not key.startswith("_")} == components | {"scheduler", "id2label"}
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True))
    settings = {"class_labels": "tench", "num_inference_steps": 2, "output_type": "pt"}
    images = again(**settings, generator=generators([0])).images
    assert torch.equal(images, load_latent(latent)(**settings, generator=generators([0])).images)


# --- the script


def test_files_have_the_names_of_seed_and_class(conditional, tmp_path):
    images = sample(conditional, tmp_path, "--seeds=7,9-10", "--class_labels=7,red", "--grid=2x1", "--save_npz")
    names = ["class_000_seed_00000009.png", "class_002_seed_00000007.png", "class_002_seed_00000010.png"]
    assert sorted(images) == names
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 34, 34)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [2, 0, 2]
        assert (arrays["arr_0"][0] == images[names[1]]).all()
    summary = json.loads((tmp_path / "samples.json").read_text())
    assert summary["images"][0] == {"file": names[1], "seed": 7, "class": 2, "class_name": "7"}
    assert summary["arguments"]["num_inference_steps"] == 3


def test_images_per_class_take_a_seed_each(conditional, tmp_path):
    images = sample(conditional, tmp_path, "--class_labels=all", "--num_images_per_class=2")
    assert sorted(images) == [f"class_{i // 2:03d}_seed_{i:08d}.png" for i in range(6)]
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 34, 3 * 34)  # a row for each class


def test_unconditional_folder_is_sampled(unconditional, tmp_path):
    images = sample(unconditional, tmp_path, "--seeds=0-2", "--scheduler=dpmsolver++")
    assert sorted(images) == [f"seed_{i:08d}.png" for i in range(3)]


@pytest.mark.parametrize("flags", [["--eta=1"], ["--scheduler=ddpm"], ["--scheduler=euler_ancestral"]])
def test_image_of_a_seed_depends_on_the_seed_alone(flags, unconditional, tmp_path):
    """Samplers with noise at each step: bitwise at one batch size, within 1/255 across batch sizes."""
    first = sample(unconditional, tmp_path / "a", "--seeds=0-4", "--batch_size=3", *flags)
    other_place = sample(unconditional, tmp_path / "b", "--seeds=9,4,2,0", "--batch_size=3", *flags)
    other_batch = sample(unconditional, tmp_path / "c", "--seeds=0-4", "--batch_size=5", *flags)
    for name in other_place.keys() & first.keys():
        assert (first[name] == other_place[name]).all()
    for name in first:
        assert np.abs(first[name].astype(int) - other_batch[name]).max() <= 1
    assert not (first["seed_00000000.png"] == first["seed_00000001.png"]).all()


def test_interrupted_sampling_resumes_and_keeps_existing_images(unconditional, tmp_path):
    whole = sample(unconditional, tmp_path / "whole", "--seeds=0-4", "--batch_size=2")
    sample(unconditional, tmp_path / "part", "--seeds=0-4", "--batch_size=2")
    kept = tmp_path / "part/seed_00000003.png"
    (tmp_path / "part/seed_00000001.png").unlink()
    before = kept.stat().st_mtime_ns
    again = sample(unconditional, tmp_path / "part", "--seeds=0-4", "--batch_size=2")
    assert kept.stat().st_mtime_ns == before
    assert all((whole[name] == again[name]).all() for name in whole)


def test_folder_with_other_settings_is_refused(unconditional, tmp_path):
    sample(unconditional, tmp_path, "--seeds=0")
    with pytest.raises(ValueError, match="--scheduler ddim, now ddpm"):
        sample(unconditional, tmp_path, "--seeds=1", "--scheduler=ddpm")


@pytest.mark.parametrize(
    ("plain", "flags", "setting"),
    [
        ([], ["--guidance_schedule=power_cosine"], "--guidance_schedule constant, now power_cosine"),
        (["--guidance_schedule=power_cosine"], ["--guidance_power=2"], "--guidance_power 4.0, now 2.0"),
        ([], ["--guidance_interval", "0.2", "0.8"], r"--guidance_interval \[0.0, 1.0\], now \[0.2, 0.8\]"),
        ([], ["--guidance_channels=1"], "--guidance_channels None, now 1"),
    ],
)
def test_guidance_flags_change_images_and_are_settings(plain, flags, setting, conditional, tmp_path):
    plain = ["--seeds=0", "--class_labels=1", "--guidance_scale=6", *plain]
    before = sample(conditional, tmp_path / "plain", *plain)
    after = sample(conditional, tmp_path / "guided", *plain, *flags)
    assert not (before["class_001_seed_00000000.png"] == after["class_001_seed_00000000.png"]).all()
    with pytest.raises(ValueError, match=setting):
        sample(conditional, tmp_path / "plain", *plain, *flags)


def test_folder_from_before_a_flag_existed_resumes(unconditional, tmp_path):
    sample(unconditional, tmp_path, "--seeds=0")
    summary = json.loads((tmp_path / "samples.json").read_text())
    for name in ("guidance_schedule", "guidance_power", "guidance_interval", "vae_sha256"):
        del summary["arguments"][name]
    (tmp_path / "samples.json").write_text(json.dumps(summary))
    (tmp_path / MARK).unlink()  # there were no marks then either
    assert len(sample(unconditional, tmp_path, "--seeds=0-1")) == 2


def test_autoguidance_of_an_unconditional_folder(unconditional, tmp_path):
    torch.manual_seed(3)
    weak = DiffiTUNet2DModel(**TINY_CONFIG, zero_init_output=False)
    DDPMPipeline(weak, DDPMScheduler()).save_pretrained(tmp_path / "weak")
    plain = sample(unconditional, tmp_path / "plain", "--seeds=0")
    flags = ["--seeds=0", "--guidance_scale=3", f"--guidance_model={tmp_path / 'weak'}"]
    guided = sample(unconditional, tmp_path / "guided", *flags)
    assert not (plain["seed_00000000.png"] == guided["seed_00000000.png"]).all()
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "weak")
    with pytest.raises(ValueError, match="--guidance_model_sha256"):
        sample(unconditional, tmp_path / "guided", *flags)


def test_guidance_model_of_another_task_is_refused(unconditional, conditional, tmp_path):
    flags = ["--guidance_scale=2", "--guidance_model"]
    with pytest.raises(ValueError, match="--guidance_model .* has 3 classes"):
        sample(unconditional, tmp_path, *flags, str(conditional))
    with pytest.raises(ValueError, match="--guidance_model nowhere"):
        sample(unconditional, tmp_path, *flags, "nowhere")
    DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="prediction_type sample"):
        sample(unconditional, tmp_path, *flags, str(tmp_path / "other"))


def test_latent_folder_is_sampled(latent, tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_CLASSES, "DiTTransformer2DModel", DiTTransformer2DModel)
    flags = ["--seeds=0-2", "--class_labels=0,Tinca tinca,7", "--guidance_scale=2", "--guidance_channels=3"]
    images = sample(latent, tmp_path / "out", *flags, "--scheduler=ddpm", "--batch_size=2")
    assert sorted(images) == [f"class_{label:03d}_seed_{seed:08d}.png" for label, seed in ((0, 0), (0, 1), (7, 2))]
    assert images["class_000_seed_00000000.png"].shape == (16, 16, 3)


def test_vae_of_a_latent_folder_without_one(latent, conditional, tmp_path, monkeypatch):
    monkeypatch.setitem(MODEL_CLASSES, "DiTTransformer2DModel", DiTTransformer2DModel)
    scheduler = DDIMScheduler(clip_sample=False)
    DiffiTPipeline(None, scheduler, transformer=tiny_dit()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--vae must name one"):
        sample(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ValueError, match="--vae nowhere"):
        sample(tmp_path / "model", tmp_path / "out", "--vae=nowhere")
    with pytest.raises(ValueError, match="--vae is for latent-space models"):
        sample(conditional, tmp_path / "out", f"--vae={latent / 'vae'}")
    images = sample(tmp_path / "model", tmp_path / "out", f"--vae={latent / 'vae'}", "--seeds=0")
    assert images["seed_00000000.png"].shape == (16, 16, 3)
    other = tiny_vae()
    torch.nn.init.ones_(other.decoder.conv_out.bias)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="--vae_sha256"):
        sample(tmp_path / "model", tmp_path / "out", f"--vae={tmp_path / 'vae'}", "--seeds=0")


def test_folder_with_images_of_other_weights_is_refused(unconditional, tmp_path):
    """A path may contain a model that has been trained further in the meantime."""
    sample(unconditional, tmp_path / "out", "--seeds=0")
    unet = tiny_unet()
    torch.nn.init.ones_(unet.conv_out.bias)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "trained_further")
    with pytest.raises(ValueError, match="--weights_sha256"):
        sample(tmp_path / "trained_further", tmp_path / "out", "--seeds=1")


def test_settings_of_a_run_without_images_do_not_bind(unconditional, tmp_path):
    sample(unconditional, tmp_path, "--seeds=0")
    (tmp_path / "seed_00000000.png").unlink()
    assert len(sample(unconditional, tmp_path, "--seeds=0", "--scheduler=ddpm")) == 1


def test_more_images_than_open_files_are_sampled(unconditional, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 50, limits[1]))
    try:
        assert len(sample(unconditional, tmp_path, "--seeds=0-149", "--num_inference_steps=1", "--save_npz")) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_images_of_other_channels_are_arrays(tmp_path):
    DDPMPipeline(tiny_unet(in_channels=5, out_channels=5), DDPMScheduler()).save_pretrained(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out", "--seeds=0-1")
    assert np.load(tmp_path / "out/seed_00000001.npy").shape == (8, 8, 5)
    with pytest.raises(ValueError, match="5 channels"):
        open_pipeline(tmp_path / "model")(num_inference_steps=1)


def test_null_class_of_a_compiled_network_is_that_of_the_network():
    """`UNet2DModel` has its null class among its embeddings, ours one more."""
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    theirs = UNet2DModel(sample_size=8, num_class_embeds=4, **shape, **blocks)
    for network in (theirs, tiny_unet(num_class_embeds=3)):
        assert null_label(network) == null_label(torch.compile(network)) == 3


@pytest.mark.parametrize("grid", ["100000x100000", "1x100000000"])
def test_grid_that_no_memory_holds_is_refused_before_sampling(grid, unconditional, tmp_path):
    with pytest.raises(ValueError, match=mentions("--grid", grid)):
        sample(unconditional, tmp_path / "out", "--seeds=0", f"--grid={grid}")
    assert not (tmp_path / "out").exists()


def test_more_images_than_memory_holds_are_refused(conditional, tmp_path):
    with pytest.raises(ValueError, match=mentions("--num_images_per_class", 4_000_000, "3 classes", "10,000,000")):
        sample(conditional, tmp_path, "--class_labels=all", "--num_images_per_class=4000000")


def test_default_grid_of_many_images_per_class_has_the_images_that_there_are(conditional, tmp_path, monkeypatch):
    """A row for a class, unless it is longer than the whole grid may be."""
    monkeypatch.setattr(sample_diffit, "MAX_GRID_IMAGES", 4)
    sample(conditional, tmp_path, "--class_labels=0", "--num_images_per_class=9", "--num_inference_steps=1")
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 34, 2 * 34)


def test_pipeline_saves_variants_and_shards(conditional, tmp_path):
    pipeline = open_pipeline(conditional)
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    loaded = DiffiTPipeline.from_pretrained(tmp_path, variant="fp16", trust_remote_code=True)
    weights = loaded.unet.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_path=nowhere"], "--model_path nowhere"),
        (["--num_inference_steps=2000"], "--num_inference_steps 2000"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, words, unconditional, tmp_path):
    with pytest.raises(ValueError, match=words):
        sample(unconditional, tmp_path, *flags)


def test_too_few_seeds_are_refused(conditional, tmp_path):
    with pytest.raises(ValueError, match="--seeds gives 2"):
        sample(conditional, tmp_path, "--seeds=0-1", "--class_labels=0,1", "--num_images_per_class=2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds=5-3"], "'5-3'"),
        (["--seeds=a"], "'a'"),
        (["--seeds=1,0-9999999999"], "more than 10,000,000 seeds in '1,0-9999999999'"),
        (["--grid=8"], "--grid"),
        (["--eta=2"], "--eta"),
        (["--seeds=18446744073709551616"], "'18446744073709551616'"),
        (["--guidance_scale=nan", "--class_labels=1"], "--guidance_scale"),
        (["--eta=0.5", "--scheduler=ddpm"], "--scheduler"),
        (["--guidance_scale=2"], "--class_labels"),
        (["--guidance=2"], "--guidance"),
        (
            ["--guidance_schedule=power_cosine", "--class_labels=1"],
            "--guidance_schedule has no effect",
        ),
        (["--guidance_scale=2", "--class_labels=1", "--guidance_power=3"], "--guidance_power"),
        (["--guidance_scale=2", "--class_labels=1", "--guidance_interval", "0.8", "0.2"], "0.8 0.2"),
        (["--guidance_scale=2", "--class_labels=1", "--guidance_channels=0"], "--guidance_channels"),
    ],
)
def test_wrong_flags_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        sample_diffit.parse_args(["--model_path=a", "--output_dir=b", *flags])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eta": 2.0}, "--eta .*2.0"),
        ({"eta": float("nan")}, "--eta .*nan"),
        ({"eta": 0.5, "scheduler": "ddpm"}, "--eta 0.5 .*--scheduler ddim.* ddpm"),
        ({"s_churn": -1.0}, "--s_churn .*-1.0"),
        ({"s_churn": 1.0, "scheduler": "ddim"}, "--s_churn 1.0 .*--scheduler edm_heun.* ddim"),
        ({"s_tmin": 1.0}, "--s_tmin .*--s_churn"),
        ({"s_tmax": 1.0}, "--s_tmax .*--s_churn"),
        ({"s_noise": 2.0}, "--s_noise .*--s_churn"),
        ({"s_churn": 1.0, "s_tmin": 3.0, "s_tmax": 2.0}, "--s_tmin .*--s_tmax.* 3.0 and 2.0"),
        ({"s_churn": 1.0, "s_noise": 0.0}, "--s_noise .*0.0"),
    ],
)
def test_sampling_settings_are_refused_without_a_model(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**settings)


def test_plotted_schedulers_keep_only_the_stochasticity_they_have():
    churn = SamplingConfig(s_churn=2.0, s_tmin=0.1, s_tmax=9.0, s_noise=1.1)
    assert churn.with_scheduler("edm_euler", 3) == SamplingConfig(scheduler="edm_euler", num_inference_steps=3)
    assert churn.with_scheduler("edm_heun", 3).s_tmax == 9.0
    assert SamplingConfig(eta=0.5).with_scheduler("ddim", 3).eta == 0.5
    assert SamplingConfig(eta=0.5).with_scheduler("heun", 3).eta == 0.0


def test_names_in_the_settings_are_those_of_the_code():
    """They are repeated there, because the code is slow to import."""
    assert sampling_config.SCHEDULERS == tuple(sorted(SCHEDULERS | EDM_SCHEDULERS | FLOW_SCHEDULERS))
    assert sampling_config.DTYPES == tuple(sorted(diffit.sampling.DTYPES))


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--eta=7", 2)])
@pytest.mark.parametrize("script", REQUIRED)
def test_flags_are_answered_before_the_slow_imports(script, flag, code):
    command = [sys.executable, "-X", "importtime", str(ROOT / script), *REQUIRED[script], flag]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = set(re.findall(r"\| +(\w+)$", process.stderr, re.MULTILINE))
    assert process.returncode == code and "argparse" in imported
    assert not imported & {"torch", "numpy", "accelerate", "diffusers", "diffit_pipeline", "diffit_model"}
    assert "--eta" in (process.stdout if code == 0 else process.stderr.splitlines()[-1])


# --- for all scripts: the loader and the sampler


def test_last_batch_is_padded_or_not(conditional):
    """Padded, an image is that of its whole batch; else that of a smaller call. Each bitwise."""
    pipeline, seeds, labels = open_pipeline(conditional), [5, 6, 7, 8, 9], [0, 1, 2, 0, 1]
    sampling = SamplingConfig(num_inference_steps=3, guidance=GuidanceConfig(scale=2.0, interval=(0.1, 0.9)))
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.1, 0.9), "output_type": "np"}

    def expected(numbers: list[int]) -> np.ndarray:
        classes = torch.tensor([labels[i] for i in numbers])
        images = pipeline(classes, generator=generators([seeds[i] for i in numbers]), **settings)
        return (images.images * 255).round().astype(np.uint8)

    first, padded = sample_seeds(pipeline, seeds, labels, sampling, batch_size=3)
    assert first.shape == (3, 8, 8, 3) and padded.shape == (2, 8, 8, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, expected([0, 1, 2]))
    np.testing.assert_array_equal(padded, expected([3, 4, 4])[:2])
    _, short = sample_seeds(pipeline, seeds, labels, sampling, batch_size=3, pad=False)
    np.testing.assert_array_equal(short, expected([3, 4]))
    assert list(sample_seeds(pipeline, [], [], sampling, batch_size=3)) == []


def test_guidance_of_an_unconditional_model_needs_a_weaker_one(unconditional):
    guidance = GuidanceConfig(scale=2.0)
    with pytest.raises(ValueError, match="--guidance_scale 2.0 needs --guidance_model"):
        load_pipeline(str(unconditional), SamplingConfig(guidance=guidance))
    guidance = GuidanceConfig(scale=2.0, model=str(unconditional))
    _, guidance_model = load_sampler(str(unconditional), SamplingConfig(guidance=guidance), torch.device("cpu"))
    assert not guidance_model.training and not any(p.requires_grad for p in guidance_model.parameters())


def test_guided_channels_are_those_of_the_model(conditional):
    guidance = GuidanceConfig(scale=2.0, channels=4)
    with pytest.raises(ValueError, match="--guidance_channels.* 4"):
        load_pipeline(str(conditional), SamplingConfig(guidance=guidance))


def test_guidance_model_is_refused_under_the_flag_that_names_it(conditional):
    config = DDPMScheduler(num_train_timesteps=500).config
    with pytest.raises(ValueError, match=f"--validation_guidance_model {conditional} has num_train_timesteps 1000"):
        load_guidance_model(str(conditional), tiny_unet(), config, flag="--validation_guidance_model")


def test_checkpoint_is_sampled_with_its_average(conditional, tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    DDPMScheduler().save_pretrained(checkpoint / "scheduler")
    tiny_unet(num_class_embeds=3).save_pretrained(checkpoint / "unet_ema")
    DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3).save_pretrained(checkpoint / "unet")
    (checkpoint / "state.json").write_text(json.dumps({"position": 16}))
    images = sample(checkpoint, tmp_path / "a", "--seeds=3", "--class_labels=1")
    expected = sample(conditional, tmp_path / "b", "--seeds=3", "--class_labels=1")  # the same weights
    np.testing.assert_array_equal(images["class_001_seed_00000003.png"], expected["class_001_seed_00000003.png"])
