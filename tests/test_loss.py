"""The EDM formulation against hand-computed values; averages by images; the schedule with a stable part."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY_CONFIG, run, train
from diffusers import EDMEulerScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from test_train import STATES, assert_same_files, logged, refusal

import eval_diffit
from diffit.formulations import build_network_inputs, build_noise_levels, compute_loss
from diffit.networks import model_class
from diffit.optimization import HalfLifeEMA, InPlaceEMA, ema_weights
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline


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


def test_flag_of_the_other_formulation_is_refused(train_args):
    with pytest.raises(ValueError, match="--sigma_std are of --formulation edm"):
        train([*train_args, "--sigma_std=1"])
    with pytest.raises(ValueError, match="--prediction_type is of --formulation ddpm"):
        train([*train_args, "--formulation=edm", "--prediction_type=epsilon"])


# --- averages


def weights_and_averages(num_steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The end of a random walk, and the averages of ours and of diffusers; one parameter is not trained."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 32)) for _ in range(3)]
    parameters[1].requires_grad_(False)
    options = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    ours = InPlaceEMA(parameters, **options)
    theirs = EMAModel(parameters, **options)
    for _ in range(num_steps):
        for parameter in parameters[::2]:
            parameter.data += 0.1 * torch.randn_like(parameter)
        ours.step(parameters)
        theirs.step(parameters)
        assert ours.cur_decay_value == theirs.cur_decay_value
    return [parameter.detach() for parameter in parameters], ours.shadow_params, theirs.shadow_params


@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_average_in_place_is_that_of_diffusers(num_steps):
    weights, ours, theirs = weights_and_averages(num_steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[1], weights[1])
    assert num_steps > 1 or all(map(torch.equal, ours, weights))  # the first step takes the weights


def test_average_is_updated_without_a_second_copy():
    parameters = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(8)]
    allocated = {}
    for ema in (InPlaceEMA(parameters), EMAModel(parameters, foreach=True)):
        with torch.profiler.profile(profile_memory=True) as profiler:
            ema.step(parameters)
        allocated[type(ema)] = max(event.self_cpu_memory_usage for event in profiler.events())
    assert allocated[EMAModel] >= 4000  # what is measured is there to be found
    assert allocated[InPlaceEMA] < 100


def test_average_is_put_into_the_network_and_back_without_a_copy():
    model = torch.nn.Linear(4, 4)
    ema = InPlaceEMA(model.parameters())
    with torch.no_grad():
        model.weight.fill_(2.0)
    weight, average = model.weight.data_ptr(), ema.shadow_params[0].data_ptr()
    with pytest.raises(RuntimeError, match="in the middle"), ema_weights(ema, model):
        assert (model.weight.data_ptr(), ema.shadow_params[0].data_ptr()) == (average, weight)
        raise RuntimeError("in the middle")
    assert (model.weight.data_ptr(), ema.shadow_params[0].data_ptr()) == (weight, average)
    assert (model.weight == 2).all() and model.weight.requires_grad


def test_average_counts_half_after_its_half_life():
    """A weight that jumps from 0 to 1 after the ramp-up: half of it after half_life images, 3/4 after twice that."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = HalfLifeEMA([parameter], half_life=800, ramp_up=0.5, batch_size=8)
    for _ in range(1000):
        ema.step([parameter])
    parameter.data.fill_(1.0)
    for expected in (0.5, 0.75):
        for _ in range(100):
            ema.step([parameter])
        assert ema.shadow_params[0].item() == pytest.approx(expected, rel=1e-9)


def test_half_life_ramps_up_with_the_images_seen():
    ema = HalfLifeEMA([torch.nn.Parameter(torch.zeros(1))], half_life=1e6, ramp_up=0.05, batch_size=64)
    for step in (1, 10, 1000):
        assert ema.get_decay(step) == pytest.approx(0.5 ** (64 / (0.05 * 64 * step)))
    assert ema.get_decay(10**9) == pytest.approx(0.5 ** (64 / 1e6))


def test_several_widths_are_saved_previewed_and_the_best_is_named(train_args, tmp_path):
    flags = ["--ema_half_life_kimg", "0.004", "0.02", "--ema_ramp_up=1", "--validation_fraction=0.25"]
    flags += ["--max_train_steps=12", "--checkpointing_steps=6", "--validation_steps=6", "--learning_rate=1e-2"]
    train([*train_args, *flags])
    run_dir = tmp_path / "run"
    names = ("ema_0.004kimg", "ema_0.02kimg")
    scalars = {name: [e.value for e in logged(run_dir).Scalars(f"validation/loss_{name}")][-1] for name in names}
    best = min(names, key=scalars.get)
    assert f"`{best}`" in (run_dir / "README.md").read_text()
    file = "diffusion_pytorch_model.safetensors"
    weights = {name: load_file(run_dir / f"checkpoint-12/unet_{name}" / file) for name in names}
    saved = load_file(run_dir / "unet" / file)
    assert all(torch.equal(saved[key], weights[best][key]) for key in saved)
    assert any(not torch.equal(weights[names[0]][key], weights[names[1]][key]) for key in saved)
    assert len(list((run_dir / "previews").glob("step_00000012_ema_*.png"))) == 2

    other = [*train_args, *flags, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=6"])
    train([*other, "--resume_from_checkpoint=latest"])
    parts = [f"unet_{name}/{file}" for name in names]
    assert_same_files(run_dir / "checkpoint-12", tmp_path / "other/checkpoint-12", parts)


# --- schedule


def test_warmup_stable_decay_in_images(train_args, tmp_path):
    flags = ["--lr_scheduler=warmup_stable_decay", "--lr_warmup_kimg=0.008", "--lr_decay_kimg=0.016"]
    arguments = [argument for argument in train_args if not argument.startswith("--lr_warmup")]
    train([*arguments, *flags, "--max_train_steps=10", "--learning_rate=1"])
    rates = [event.value for event in logged(tmp_path / "run").Scalars("train/learning_rate")]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_scheduler=warmup_stable_decay"], "need each other"),
        (["--lr_decay_steps=2"], "need each other"),
        (["--lr_warmup_kimg=1"], "--lr_warmup_steps or --lr_warmup_kimg"),
        (["--ema_half_life_kimg", "1", "1"], "names a width twice"),
        (["--ema_half_life_kimg", "1", "--no-use_ema"], "--ema_half_life_kimg needs --use_ema"),
        (["--eval_steps=1", "--on_bad_image=skip"], "--eval_steps needs images that can be read"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, words, train_args, capsys):
    assert words in refusal([*train_args, *flags], capsys)


def test_schedule_longer_than_the_training_is_refused(train_args):
    with pytest.raises(ValueError, match="are longer than the training"):
        train([*train_args, "--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=4"])


# --- augmentation


def test_augmentation_leaves_all_other_numbers_of_a_position_as_they_are(image_folder):
    table = load_image_table(train_data_dir=str(image_folder))
    stream = PositionStream(len(table), seed=0)
    plain, augmented = (
        ImageDataset(table, stream, (8, 8), 3, random_flip=True, augment=augment)[(5, stream.index(5))]
        for augment in (False, True)
    )
    assert augmented.pop("augmentation").shape == (12,)
    torch.testing.assert_close(augmented, plain, rtol=0, atol=0)


def test_augmented_run_tells_the_network_and_resumes_bitwise(train_args, tmp_path):
    flags = ["--augmentation_probability=0.5", "--max_train_steps=4", "--checkpointing_steps=2", "--formulation=edm"]
    train([*train_args, *flags])
    other = [*train_args, *flags, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=2"])
    train([*other, "--resume_from_checkpoint=latest", "--dataloader_num_workers=1"])
    assert_same_files(tmp_path / "run/checkpoint-4", tmp_path / "other/checkpoint-4", STATES)
    weights = load_file(tmp_path / "run/checkpoint-4" / STATES[0])
    torch.manual_seed(0)
    config = json.loads((tmp_path / "run/unet/config.json").read_text())
    untrained = model_class(config).from_config(config).augment_embedding.weight
    assert config["num_augment_labels"] == 9 and not torch.equal(weights["augment_embedding.weight"], untrained)
    train([*train_args, f"--output_dir={tmp_path / 'plain'}", "--max_train_steps=4", "--formulation=edm"])
    plain = load_file(tmp_path / "plain/checkpoint-4" / STATES[0])
    assert not torch.equal(plain["conv_in.weight"], weights["conv_in.weight"])


def test_augmentation_of_latents_is_refused(train_args, capsys):
    flags = ["--augmentation_probability=0.1", "--vae_model_name_or_path=x"]
    assert "--augmentation_probability is for training in pixels" in refusal([*train_args, *flags], capsys)


# --- metrics while training


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """Features for `--feature_extractor test_loss:mean_colours`; shape (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


EVAL = ["--feature_extractor=test_loss:mean_colours", "--eval_steps=2", "--eval_num_images=18", "--max_train_steps=4"]


def test_metrics_are_logged_and_the_best_is_kept(train_args, tmp_path):
    train([*train_args, *EVAL, "--validation_fraction=0.25", "--eval_metrics", "frechet_distance", "recall"])
    run_dir = tmp_path / "run"
    distances = {event.step: event.value for event in logged(run_dir).Scalars("eval/frechet_distance")}
    assert list(distances) == [2, 4] and all(0 < value < 10 for value in distances.values())
    assert [event.step for event in logged(run_dir).Scalars("eval/recall")] == [2, 4]
    best_step = min(distances, key=distances.get)
    best = json.loads((run_dir / "eval/best.json").read_text())
    assert best["global_step"] == best_step
    assert best["values"]["eval/frechet_distance"] == pytest.approx(distances[best_step])
    card = (run_dir / "best/README.md").read_text()
    assert f"| optimizer steps | {best_step} of 4" in card and "frechet distance" in card
    assert DiffiTPipeline.from_folder(str(run_dir / "best"), model_class)(num_inference_steps=2).images
    train([*train_args, *EVAL, "--overwrite_output_dir"])  # the best of the earlier run is forgotten
    assert json.loads((run_dir / "eval/best.json").read_text())["values"].keys() == {
        "eval/frechet_distance",
        "eval/kernel_distance",
    }


def test_best_of_another_metric_does_not_count(train_args, tmp_path):
    """Recall is at most 1, so a distance would never be better."""
    train([*train_args, *EVAL, "--max_train_steps=2", "--eval_metrics", "recall"])
    train([*train_args, *EVAL, "--resume_from_checkpoint=latest", "--eval_metrics", "frechet_distance"])
    best = json.loads((tmp_path / "run/eval/best.json").read_text())
    assert best["global_step"] == 4 and "| optimizer steps | 4 of 4" in (tmp_path / "run/best/README.md").read_text()


def test_too_few_images_to_compare_with_are_refused_before_anything_is_deleted(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    with pytest.raises(ValueError, match="--eval_steps compares with 2 images"):
        train([*train_args, *EVAL, "--validation_fraction=0.08", "--overwrite_output_dir"])
    assert (tmp_path / "run/checkpoint-1").is_dir()


def test_metric_equals_that_of_the_same_images_drawn_by_hand(train_args, tmp_path):
    from diffit.features import TableImages
    from diffit.metrics import FeatureSet, frechet_distance

    train([*train_args, *EVAL, "--max_train_steps=2"])
    table = load_image_table(train_data_dir=[a for a in train_args if "train_data_dir" in a][0].split("=")[1])
    real = TableImages(table, (8, 8), 3)
    reference = mean_colours(torch.stack([real[i] for i in range(len(table))]))
    pipe = DiffiTPipeline.from_folder(str(tmp_path / "run"), model_class)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, 18, 4):
        seeds = list(range(start, min(start + 4, 18)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        labels = [seed % 3 for seed in seeds]
        drawn.append(pipe(labels, num_inference_steps=2, generator=generators, output_type="pt").images)
    features = mean_colours((torch.cat(drawn) * 255).round().byte())
    expected = frechet_distance(FeatureSet(features), FeatureSet(reference))
    assert logged(tmp_path / "run").Scalars("eval/frechet_distance")[-1].value == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(train_args, tmp_path):
    arguments = [*train_args, *EVAL, "--global_batch_size=8", "--max_train_steps=2"]
    train([*arguments, f"--output_dir={tmp_path / 'one'}"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "train_diffit.py", *arguments, f"--output_dir={tmp_path / 'two'}"]
    run(command, PYTHONPATH=str(ROOT / "tests"))
    one, two = (logged(tmp_path / n).Scalars("eval/frechet_distance")[-1].value for n in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-2)


def evaluate_folder(arguments: list[str], tmp_path: Path) -> dict:
    """What `eval_diffit.py` says of the models of `--model_path`."""
    flags = ["--feature_extractor=test_loss:mean_colours", "--num_images=24", "--num_inference_steps=2"]
    flags += [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'metrics.json'}"]
    eval_diffit.main(eval_diffit.parse_args([*arguments, *flags, "--metrics", "frechet_distance"]))
    return json.loads((tmp_path / "metrics.json").read_text())


def test_edm_folder_and_its_checkpoints_are_evaluated_with_no_flag(train_args, image_folder, tmp_path):
    train([*train_args, "--formulation=edm", "--max_train_steps=2"])
    reference = [f"--reference={image_folder}", f"--model_path={tmp_path / 'run'}"]
    heun = json.dumps(evaluate_folder([*reference, "--all_checkpoints"], tmp_path)["models"])
    euler = json.dumps(evaluate_folder([*reference, "--all_checkpoints", "--scheduler=edm_euler"], tmp_path)["models"])
    assert "checkpoint-2" in heun and heun != euler  # the samples of one are not taken for those of the other
