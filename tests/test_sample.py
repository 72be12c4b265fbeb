"""Sampling: the pipeline and the script."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY_CONFIG
from diffusers import DDPMPipeline, DDPMScheduler

import sample_diffit
from diffit_model import DiffiTUNet2DModel, model_class
from diffit_pipeline import SCHEDULERS, DiffiTPipeline, image_grid

NAMES = {"0": "red", "1": "green", "2": "7"}


def tiny_unet(**kwargs) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    return DiffiTUNet2DModel(**TINY_CONFIG, zero_init_output=False, **kwargs).eval()


def quiet(pipeline: DiffiTPipeline) -> DiffiTPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def load(folder: Path, **kwargs) -> DiffiTPipeline:
    return quiet(DiffiTPipeline.from_folder(str(folder), model_class, **kwargs))


def sample(folder: Path, output_dir: Path, *flags: str) -> dict[str, np.ndarray]:
    """Runs the script in this process; the images by file name."""
    arguments = [f"--model_path={folder}", f"--output_dir={output_dir}", "--num_inference_steps=3", *flags]
    sample_diffit.main(sample_diffit.parse_args(arguments))
    return {path.name: np.asarray(PIL.Image.open(path)) for path in output_dir.glob("*seed_*.png")}


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the pipeline


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_draws_images(scheduler, conditional):
    pipeline = load(conditional, scheduler=scheduler)
    images = pipeline(
        class_labels=[0, 1], num_inference_steps=6, guidance_scale=2.0, generator=generators([1, 2]), output_type="pt"
    ).images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01


def test_pipeline_equals_a_plain_ddim_loop(conditional):
    """DDIM (eta 0) with guidance, written out: x_0 from epsilon, then the step to the previous timestep."""
    pipeline = load(conditional)
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
    pipeline = load(conditional)
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape[0]))
    pipeline(class_labels=[0, 1], num_inference_steps=2, guidance_scale=1.0)
    pipeline(class_labels=[0, 1], num_inference_steps=2, guidance_scale=1.5)
    assert batches == [2, 2, 4, 4]


def test_labels_go_by_number_and_name(conditional):
    pipeline = load(conditional)
    assert pipeline.label_ids(["red", 1, "1", "green"]) == [0, 1, 1, 1]
    assert pipeline.label_ids("7") == [2]  # a name that looks like a number is a name
    assert pipeline.label_ids(torch.tensor([2, 0])) == [2, 0]


@pytest.mark.parametrize("label", ["purple", 3, -1, "3", 0.5])
def test_unknown_label_is_refused(label, conditional):
    with pytest.raises(ValueError, match="red, green, 7"):
        load(conditional)(class_labels=label, num_inference_steps=1)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"guidance_scale": 2.0}, "class_labels"),
        ({"class_labels": [0, 1], "batch_size": 3}, "3 images"),
        ({"batch_size": 2, "generator": generators([0])}, "generators"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kwargs, words, conditional):
    with pytest.raises(ValueError, match=words):
        load(conditional)(num_inference_steps=1, **kwargs)


def test_labels_on_an_unconditional_model_are_refused(unconditional):
    with pytest.raises(ValueError, match="unconditional"):
        load(unconditional)(class_labels=[0], num_inference_steps=1)


def test_no_label_means_the_null_class(conditional):
    pipeline = load(conditional)
    images = pipeline(batch_size=1, num_inference_steps=1, generator=generators([0]), output_type="pt").images
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = pipeline.unet(x, 0, torch.tensor([3])).sample.detach()
    a = pipeline.scheduler.alphas_cumprod[0]
    x_0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(images, x_0 / 2 + 0.5, rtol=0, atol=1e-4)


def test_size_and_output_types(unconditional):
    pipeline = load(unconditional)
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
    """Samplers that draw noise at each step. At one batch size bitwise, across batch sizes within 1/255."""
    first = sample(unconditional, tmp_path / "a", "--seeds=0-4", "--batch_size=3", *flags)
    other_place = sample(unconditional, tmp_path / "b", "--seeds=9,4,2,0", "--batch_size=3", *flags)
    other_batch = sample(unconditional, tmp_path / "c", "--seeds=0-4", "--batch_size=5", *flags)
    for name in other_place.keys() & first.keys():
        assert (first[name] == other_place[name]).all()
    for name in first:
        assert np.abs(first[name].astype(int) - other_batch[name]).max() <= 1
    assert not (first["seed_00000000.png"] == first["seed_00000001.png"]).all()


def test_stopped_run_goes_on_and_keeps_what_is_there(unconditional, tmp_path):
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


def test_folder_with_images_of_other_weights_is_refused(unconditional, tmp_path):
    """The same path may hold a model that was trained further."""
    sample(unconditional, tmp_path / "out", "--seeds=0")
    unet = tiny_unet()
    torch.nn.init.ones_(unet.conv_out.bias)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "trained_further")
    with pytest.raises(ValueError, match="--weights_sha256"):
        sample(tmp_path / "trained_further", tmp_path / "out", "--seeds=1")


def test_settings_of_a_run_that_drew_nothing_do_not_bind(unconditional, tmp_path):
    sample(unconditional, tmp_path, "--seeds=0")
    (tmp_path / "seed_00000000.png").unlink()
    assert len(sample(unconditional, tmp_path, "--seeds=0", "--scheduler=ddpm")) == 1


def test_more_images_than_open_files_are_drawn(unconditional, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert len(sample(unconditional, tmp_path, "--seeds=0-149", "--num_inference_steps=1", "--save_npz")) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_images_of_other_channels_are_arrays(tmp_path):
    DDPMPipeline(tiny_unet(in_channels=5, out_channels=5), DDPMScheduler()).save_pretrained(tmp_path / "model")
    sample(tmp_path / "model", tmp_path / "out", "--seeds=0-1")
    assert np.load(tmp_path / "out/seed_00000001.npy").shape == (8, 8, 5)
    with pytest.raises(ValueError, match="5 channels"):
        load(tmp_path / "model")(num_inference_steps=1)


def test_pipeline_saves_variants_and_shards(conditional, tmp_path):
    pipeline = load(conditional)
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
        (["--grid=8"], "--grid"),
        (["--eta=2"], "--eta"),
        (["--seeds=18446744073709551616"], "'18446744073709551616'"),
        (["--guidance_scale=nan", "--class_labels=1"], "--guidance_scale"),
        (["--eta=0.5", "--scheduler=ddpm"], "--scheduler"),
        (["--guidance_scale=2"], "--class_labels"),
        (["--guidance=2"], "--guidance"),
    ],
)
def test_wrong_flags_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        sample_diffit.parse_args(["--model_path=a", "--output_dir=b", *flags])
    assert words in capsys.readouterr().err
