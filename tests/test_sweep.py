"""Sweeps: all combinations of guidance scale, average and steps, each equal to a separate evaluation."""

import json
import math
from pathlib import Path

import PIL.Image
import pytest

import diffit.evaluation
import eval_diffit
from diffit.errors import UserError
from diffit.eval_config import parse_args
from diffit.sweep import best_of
from helpers import evaluate_folder, mentions, train


@pytest.fixture(scope="module")
def checkpoint(base_args, tmp_path_factory) -> Path:
    """A checkpoint with two averages."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    train([*base_args, f"--output_dir={folder}", "--ema_half_life_kimg", "0.001", "1", "--ema_ramp_up=1"])
    return folder / "checkpoint-4"


@pytest.fixture(scope="module")
def averages(checkpoint) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("unet_ema*"))


def sweep(checkpoint: Path, images: Path, folder: Path, *flags: str) -> dict:
    """The results of a sweep; the images and features are kept below `folder`."""
    arguments = [f"--model_path={checkpoint}", f"--reference={images}", *flags]
    arguments += ["--feature_extractor=helpers:mean_colours", "--num_images=24", f"--work_dir={folder / 'work'}"]
    arguments += [f"--output={folder / 'sweep.json'}", "--metrics", "frechet_distance", "kernel_distance"]
    eval_diffit.main(parse_args(arguments))
    return json.loads((folder / "sweep.json").read_text())


def test_each_combination_equals_an_evaluation_of_its_own(checkpoint, averages, image_folder, tmp_path, capsys):
    flags = ["--guidance_scale", "1", "3", "--num_inference_steps", "2", "4", "--weights", *averages]
    flags += ["--guidance_interval", "0", "0.9"]  # has no effect, and is not refused, at a scale of 1
    results = sweep(checkpoint, image_folder, tmp_path, *flags, f"--plots={tmp_path / 'plots'}")
    rows = results["sweep"]
    assert len({(row["guidance_scale"], row["num_inference_steps"], row["weights"]) for row in rows}) == 8
    for row in (rows[0], rows[3], rows[-1]):
        alone = [f"--model_path={checkpoint}", f"--reference={image_folder}", f"--weights={row['weights']}"]
        if row["guidance_scale"] != 1:
            alone += [f"--guidance_scale={row['guidance_scale']}", "--guidance_interval", "0", "0.9"]
        (tmp_path / row["weights"]).mkdir(exist_ok=True)
        # `evaluate_folder` takes two steps unless a later flag says otherwise.
        if row["num_inference_steps"] == 2:
            value = evaluate_folder(alone, tmp_path / row["weights"])["frechet_distance"]["value"]
            assert value == row["frechet_distance"]["value"]
    values = [row["frechet_distance"]["value"] for row in rows]
    assert len(set(values)) == 8
    best = rows[values.index(min(values))]
    assert results["best"] == {name: best[name] for name in ("name", *parse_args_names(flags), "nfe")}
    assert results["settings"]["arguments"]["guidance_scale"] == [1, 3]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "<- best" in line]
    assert f"{min(values):.6g}" in line and best["weights"] in line
    assert PIL.Image.open(tmp_path / "plots" / "sweep.png").width > 300


def parse_args_names(flags: list[str]) -> list[str]:
    """The swept flags, in the order of the results."""
    config = parse_args(["--model_path=m", "--reference=r", *flags])
    return list(config.sweep[0].settings)


def test_interrupted_sweep_samples_only_what_is_missing(checkpoint, image_folder, tmp_path, monkeypatch):
    sampled = []
    original = diffit.evaluation.sample_seeds
    monkeypatch.setattr(
        diffit.evaluation,
        "sample_seeds",
        lambda *args, **kwargs: sampled.append(args[3].guidance.scale) or original(*args, **kwargs),
    )
    first = sweep(checkpoint, image_folder, tmp_path, "--guidance_scale", "1", "2", "--num_inference_steps=2")
    assert set(sampled) == {1, 2}
    sampled.clear()
    second = sweep(checkpoint, image_folder, tmp_path, "--guidance_scale", "1", "2", "3", "--num_inference_steps=2")
    assert set(sampled) == {3}
    assert second["sweep"][:2] == first["sweep"]


def test_point_that_cannot_be_sampled_is_refused_before_anything_is(checkpoint, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(diffit.evaluation, "sample_seeds", lambda *args, **kwargs: pytest.fail("was sampled"))
    with pytest.raises(UserError, match=mentions("--num_inference_steps", 2000)):
        sweep(checkpoint, image_folder, tmp_path, "--num_inference_steps", "2", "2000")


def test_the_best_is_the_highest_precision_and_the_lowest_distance():
    def measured(value):
        return (None, {"precision": {"value": value}}, None)

    assert best_of([measured(0.2), measured(0.7), measured(0.5)])[1]["precision"]["value"] == 0.7
    distances = [(None, {"frechet_distance": {"value": value}}, None) for value in (4.0, 3.0, 5.0)]
    assert best_of(distances) is distances[1]
    assert best_of([measured(math.nan), measured(0.1)])[1]["precision"]["value"] == 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance_scale", "1", "2", "1"], ["--guidance_scale", "1.0 2.0 1.0"]),
        (["--guidance_scale", "1", "-2"], ["--guidance_scale", -2.0]),
        (["--num_inference_steps", "2", "4", "--plots=p", "--plot_steps", "3"], ["--plot_steps", 3]),
    ],
)
def test_sweep_that_means_nothing_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model_path=m", "--reference=r", *flags])
    assert mentions(*words).search(capsys.readouterr().err.replace("\n", " "))


def test_one_value_is_no_sweep():
    config = parse_args(["--model_path=m", "--reference=r", "--guidance_scale", "2", "--weights", "unet"])
    assert config.sweep == () and config.sampling.guidance.scale == 2 and config.evaluated.weights == "unet"
