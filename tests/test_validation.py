"""Validation during training: the held-out loss, and metrics of generated images."""

import json
import logging
import shutil
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from diffit.batches import open_tables
from diffit.config import MetricsConfig, parse_args
from diffit.decode import normalize_pixels
from diffit.errors import RunError
from diffit.networks import model_class
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream, split_table
from diffit.validation import best_average, build_evaluator
from diffit_pipeline import DiffiTPipeline
from helpers import ROOT, logged, mean_colours, mentions, run, torchrun, train

# --- held-out loss


def test_validation_loss_is_deterministic(train_args, tmp_path):
    """Fixed images, timesteps and noise: with a learning rate of 0 nothing moves."""
    train([*train_args, "--learning_rate=0", "--validation_steps=2", "--validation_fraction=0.25"])
    values = [event.value for event in logged(tmp_path / "run").Scalars("validation/loss")]
    assert len(values) == 2 and values[0] == values[1]


@pytest.mark.parametrize("gamma", [0, 5])
def test_validation_loss_has_the_weights_of_the_training_loss(gamma, train_args, image_folder, tmp_path):
    """A network that predicts 0 has the loss w * v^2, with the min-SNR weight w of the training."""
    flags = ["--max_train_steps=1", "--learning_rate=0", "--validation_fraction=0.25", f"--snr_gamma={gamma}"]
    flags += ["--model_kwargs", "zero_init_output=true"]
    train([*train_args, *flags])
    _, held_out = split_table(load_image_table(SourceConfig(train_data_dir=str(image_folder))), 0.25)
    dataset = ImageDataset(held_out, PositionStream(6, seed=0), (8, 8), 3, center_crop=True)
    items = [dataset[(p, dataset.stream.index(p))] for p in range(6)]
    clean = normalize_pixels(torch.stack([item["pixel_values"] for item in items]))
    noise = torch.stack([item["noise"] for item in items])
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    timesteps = ((torch.arange(6) + 0.5) / 6 * 1000).long()
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / (snr + 1) if gamma else torch.ones(6)
    velocities = scheduler.get_velocity(clean, noise, timesteps).square().mean(dim=(1, 2, 3))
    logged_loss = logged(tmp_path / "run").Scalars("validation/loss")[0].value
    assert logged_loss == pytest.approx((weights * velocities).mean().item(), rel=1e-5)


def test_weights_that_are_not_finite_end_the_training_at_the_preview(train_args, tmp_path):
    """One step so large that the weights themselves overflow."""
    with pytest.raises(RunError, match=mentions("seeds 0, 1, 2 have", "weights of DiffiTUNet2DModel are not finite")):
        train([*train_args, "--max_train_steps=1", "--lr_warmup_steps=0", "--learning_rate=1e38"])
    assert not list((tmp_path / "run").rglob("*.png")) and not (tmp_path / "run/unet").exists()


OVERFLOW = ["--lr_warmup_steps=0", "--learning_rate=1e30", "--max_train_steps=1", "--validation_fraction=0.25"]


@pytest.mark.parametrize(
    "flags", [[], ["--no-use_ema"], ["--feature_extractor=helpers:mean_colours", "--eval_steps=1"]]
)
def test_previews_that_overflow_are_skipped_and_the_training_goes_on(flags, train_args, tmp_path, caplog):
    """One step so large that the forward pass overflows, although the weights are finite."""
    train([*train_args, *OVERFLOW, *flags])
    run_dir = tmp_path / "run"
    what = "metrics and preview" if "--eval_steps=1" in flags else "preview"
    words = (what, "step 1", "seeds 0, 1, 2", "overflow", "float32", "guidance", "--learning_rate")
    assert [mentions(*words).search(record.message) for record in caplog.records if "skipped" in record.message] != []
    assert all(mentions(*words).search(record.message) for record in caplog.records if "skipped" in record.message)
    assert (run_dir / "checkpoint-1").is_dir() and load_weights(run_dir).isfinite().all()
    assert not list(run_dir.rglob("*.png")) and "sample_grid" not in (run_dir / "README.md").read_text()
    assert "validation/loss" in logged(run_dir).Tags()["scalars"]
    assert "eval/frechet_distance" not in logged(run_dir).Tags()["scalars"]


def test_warning_of_a_skipped_preview_names_the_guidance(train_args, caplog):
    train([*train_args, *OVERFLOW, "--validation_guidance_scale=3"])
    assert mentions("skipped", "--learning_rate", "--validation_guidance_scale 3").search(caplog.text)


@pytest.mark.slow
def test_two_processes_skip_a_preview_together(train_args, tmp_path):
    output = run([*torchrun(), "train_diffit.py", *train_args, *OVERFLOW])
    assert len([line for line in output.splitlines() if mentions("skipped", "step 1", "seeds").search(line)]) == 1
    assert (tmp_path / "run/model_index.json").is_file() and not list((tmp_path / "run").rglob("*.png"))


def test_skipped_preview_replaces_that_of_other_weights(train_args, tmp_path):
    """Otherwise `sample_grid.png` would show the samples of other weights than those beside it."""
    rates = ["--lr_scheduler=piecewise_constant", "--lr_step_rules=1:1,1e30"]
    train([*train_args, *OVERFLOW, *rates, "--learning_rate=1", "--max_train_steps=2", "--validation_steps=1"])
    assert [file.name for file in (tmp_path / "run/previews").iterdir()] == ["step_00000001.png"]
    assert not (tmp_path / "run/sample_grid.png").exists()
    assert "sample_grid" not in (tmp_path / "run/README.md").read_text()


def test_average_that_can_be_sampled_is_preferred():
    grid = PIL.Image.new("L", (1, 1))
    losses = {
        "wide": (0.3, grid),
        "overflows": (0.1, None),
        "narrow": (0.2, grid),
        "same": (0.2, grid),
        "nan": (nan, grid),
    }
    results = {name: ({"validation/loss": loss}, shown) for name, (loss, shown) in reversed(losses.items())}
    assert best_average("recall", results) == "same"
    assert best_average("recall", {name: results[name] for name in ("nan", "overflows", "wide")}) == "wide"
    assert best_average("recall", {name: results[name] for name in ("overflows", "nan")}) == "nan"


def load_weights(run_dir: Path) -> torch.Tensor:
    """All weights of a run's pipeline, in one vector."""
    weights = load_file(run_dir / "unet/diffusion_pytorch_model.safetensors")
    return torch.cat([weight.flatten().float() for weight in weights.values()])


def test_bad_validation_image_is_reported(train_args, image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "data")
    for file in (tmp_path / "data").rglob("[01].png"):
        file.write_bytes(b"no image")
    arguments = [*train_args, f"--train_data_dir={tmp_path / 'data'}", "--on_bad_image=skip", "--num_channels=3"]
    train([*arguments, "--validation_fraction=0.8", "--max_train_steps=1"])
    config = parse_args([*arguments, "--validation_fraction=0.8"])
    held_out = open_tables(config.data, config.validation)[1]
    bad = [held_out.read(i)[0] for i in range(len(held_out)) if held_out.read(i)[1] == b"no image"]
    assert bad and all(name in caplog.text for name in bad)


# --- metrics


EVAL = ["--feature_extractor=helpers:mean_colours", "--eval_steps=2", "--eval_num_images=18", "--max_train_steps=4"]


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


def test_reference_is_cut_for_the_kernel_distance_and_that_is_said(train_args, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for module in ("metrics", "validation"):
        monkeypatch.setattr(f"diffit.{module}.MAX_KERNEL_REFERENCE", 10)
    train([*train_args, *EVAL, "--eval_metrics", "kernel_distance", "frechet_distance"])
    assert mentions("kernel_distance", 10, 24).search(caplog.text)
    measured_with = json.loads((tmp_path / "run/eval/best.json").read_text())["measured_with"]
    assert (measured_with["reference_images"], measured_with["kernel_reference_images"]) == (24, 10)
    assert all(event.value < 10 for event in logged(tmp_path / "run").Scalars("eval/kernel_distance"))


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_keeps_reference_features(is_main, monkeypatch):
    PartialState(cpu=True)  # for the logs
    features = np.arange(36, dtype=np.float32).reshape(12, 3)
    monkeypatch.setattr("diffit.validation.extract_features", lambda *arguments, **keywords: features)
    accelerator = SimpleNamespace(is_main_process=is_main, device=torch.device("cpu"))
    plan = SimpleNamespace(resolution=(8, 8), num_channels=3, num_workers=0)
    source, run = SimpleNamespace(data_digest=lambda: "a"), SimpleNamespace(output_dir="run")
    evaluator = build_evaluator(accelerator, object(), source, plan, MetricsConfig(), run)
    assert evaluator.num_reference == 12
    assert (evaluator.reference is not None) == is_main
    if is_main:
        assert torch.equal(evaluator.reference.features, torch.from_numpy(features).double())


def test_best_of_another_metric_does_not_count(train_args, tmp_path):
    """Recall is at most 1, so a distance would never be better."""
    train([*train_args, *EVAL, "--max_train_steps=2", "--eval_metrics", "recall"])
    train([*train_args, *EVAL, "--resume_from_checkpoint=latest", "--eval_metrics", "frechet_distance"])
    best = json.loads((tmp_path / "run/eval/best.json").read_text())
    assert best["global_step"] == 4 and "| optimizer steps | 4 of 4" in (tmp_path / "run/best/README.md").read_text()


def test_too_few_reference_images_are_refused_before_any_deletion(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    with pytest.raises(ValueError, match=mentions("--eval_steps", 4, 2)):
        train([*train_args, *EVAL, "--validation_fraction=0.08", "--overwrite_output_dir"])
    assert (tmp_path / "run/checkpoint-1").is_dir()


def test_metric_equals_that_of_separately_sampled_images(train_args, tmp_path):
    from diffit.features import TableImages
    from diffit.metrics import FeatureSet, frechet_distance

    train([*train_args, *EVAL, "--max_train_steps=2"])
    table = load_image_table(
        SourceConfig(train_data_dir=[a for a in train_args if "train_data_dir" in a][0].split("=")[1])
    )
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
def test_two_processes_measure_the_same_as_one(train_args, tmp_path):
    arguments = [*train_args, *EVAL, "--global_batch_size=8", "--max_train_steps=2"]
    train([*arguments, f"--output_dir={tmp_path / 'one'}"])
    command = [*torchrun(), "train_diffit.py", *arguments, f"--output_dir={tmp_path / 'two'}"]
    run(command, PYTHONPATH=str(ROOT / "tests"))
    one, two = (logged(tmp_path / n).Scalars("eval/frechet_distance")[-1].value for n in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-2)
