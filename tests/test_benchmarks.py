"""Computations of the benchmarks on their results, and short runs of them."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

import diffit_model
from benchmarks import gpu, gpu_checks, gpu_inference, loop, quality, quality_report, same_numbers
from benchmarks.gpu_inference import inference_geometries
from diffit.losses import denoising_losses
from diffit.networks import training_flops_per_image
from helpers import ROOT


def test_cost_to_reach_is_straight_in_logarithms():
    points = [(10, 100.0), (40, 25.0), (80, 20.0)]
    assert quality_report.cost_to_reach(points, 50) == pytest.approx(20)
    assert quality_report.cost_to_reach(points, 20) == pytest.approx(80)
    assert quality_report.cost_to_reach(points, 200) == 10
    assert quality_report.cost_to_reach(points, 19) is None


def test_saving_is_read_at_the_other_sides_last_distance_or_at_ours():
    falling = [(10, 100.0), (40, 25.0)]
    assert quality_report.saving(falling, [(10, 100.0), (60, 50.0)])[0] == pytest.approx(60 / 20)
    times, where = quality_report.saving([(10, 100.0), (60, 50.0)], falling)
    assert times == pytest.approx(20 / 60) and "not reached" in where


def test_both_networks_of_a_task_have_the_same_flops():
    for task in quality.TASKS.values():
        ours, theirs = (training_flops_per_image(config) for config in task.networks.values())
        assert ours == pytest.approx(theirs, rel=0.05)


def test_curve_is_of_the_first_weights_of_a_side():
    rows = [
        {"task": "t", "side": "s", "weights": weights, "kimg": kimg, "seed": seed, "m": {"value": kimg + seed + extra}}
        for seed in (0, 2)
        for weights, extra in (("ema", 0), ("raw", 100))
        for kimg in (10, 20)
    ]
    points = quality_report.curve(rows, "t", "s", "m")
    assert [point[:2] for point in points] == [(10, 11), (20, 21)]
    assert points[0][2] == pytest.approx(2**0.5)


def test_ratio_of_two_loops_is_taken_pair_by_pair():
    """The second pair came while the machine was twice as slow; the second number of a turn is memory."""
    seconds, ratios = loop.seconds_and_ratios([[(1.1, 9), (2.0, 9), (1.0, 9)], [(1.0, 9), (2.0, 9), (1.25, 9)]])
    assert seconds == [1.1, 1.25]
    assert ratios == pytest.approx([0.8, 1.0, 1.1])


@pytest.fixture
def recompile_limit():
    """Restores the settings that `gpu.main` changes."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


TINY_GPU = ["--device", "cpu", "--tiny", "--output"]


def test_gpu_benchmark_runs_and_finds_nothing_wrong(tmp_path, recompile_limit):
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text.endswith("Nothing is wrong.\n") and "WRONG" not in text
    assert text.count("## ") == 7 and "these figures are of no GPU" in text


def test_gpu_benchmark_fails_on_a_wrong_value(tmp_path, recompile_limit, monkeypatch):
    right = diffit_model.flex_attention_with_table
    monkeypatch.setattr(
        diffit_model, "flex_attention_with_table", lambda *args, **kwargs: 1.1 * right(*args, **kwargs)
    )
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md"), "--sections", "backends"]) == 1
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if "WRONG" in row] == [row for row in rows if "`flex`" in row]


def test_gpu_benchmark_fails_on_a_wrong_gradient(tmp_path, recompile_limit, monkeypatch):
    right = diffit_model.DiffiTAttnProcessor.__call__

    def tables_get_half_their_gradient(self, query, key, value, bias, scale):
        if self.backend != "_native_math":  # the definition stays right
            bias = (bias + bias.detach()) / 2
        return right(self, query, key, value, bias, scale)

    monkeypatch.setattr(diffit_model.DiffiTAttnProcessor, "__call__", tables_get_half_their_gradient)
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md"), "--sections", "backends"]) == 1
    assert "relative_position_bias_table | **WRONG**" in (tmp_path / "gpu.md").read_text()


def test_gpu_benchmark_compares_inference_at_every_head_count():
    found = {(math.prod(each.window), each.heads, each.head_dim) for each in inference_geometries()}
    assert {(tokens, *heads) for tokens in (16, 64, 256, 1024) for heads in ((4, 32), (16, 72))} <= found
    configs = [json.loads(file.read_text()) for file in (ROOT / "configs/model").glob("*.json")]
    heads = [config["num_attention_heads"] for config in configs if "num_attention_heads" in config]
    assert len(heads) > 5
    assert {number for each in heads for number in (each if isinstance(each, list) else [each])} <= {
        heads for _, heads, _ in found
    }


def test_gpu_benchmark_fails_on_a_wrong_kernel_of_inference(tmp_path, monkeypatch):
    """Also if gradients are right; a fault of cuDNN's kernel does not count, because the scripts forbid it."""
    right = gpu_inference.run_without_gradients

    def wrong(attention, inputs):
        factor = 1.0 if attention.qkv.weight.dtype == torch.float64 else 1.1
        return {name: factor * tensor for name, tensor in right(attention, inputs).items()}

    monkeypatch.setattr(gpu_inference, "run_without_gradients", wrong)
    monkeypatch.setattr(gpu_inference, "sdpa_kernel", lambda backend: contextlib.nullcontext())  # there is no cuDNN
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md"), "--quick", "--sections", "backends"]) == 1
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("|")]
    assert len([row for row in rows if "WRONG" in row and "as in the scripts" in row]) == 4
    assert len([row for row in rows if "wrong, but not used" in row and "cuDNN" in row]) == 4
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_gpu_benchmark_takes_the_steps_of_the_training(monkeypatch):
    """The loss of every step is that of `denoising_losses`."""
    calls = []
    for module in (gpu, gpu_checks):
        monkeypatch.setattr(module, "denoising_losses", lambda *args: calls.append(1) or denoising_losses(*args))
    case = gpu.read_cases(tiny=True)[1]
    gpu.build_training(case, "native", False, torch.device("cpu"))
    gpu_checks.check_overflow(gpu_checks.Report(), torch.device("cpu"), case)
    assert len(calls) == 6


def test_gpu_benchmark_without_cuda_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_gpu_benchmark_halves_a_batch_that_does_not_fit(monkeypatch):
    class Training(gpu.Training):
        def __call__(self):
            if self.batch_size > 1:
                raise torch.OutOfMemoryError
            return super().__call__()

    monkeypatch.setattr(gpu, "Training", Training)
    case = gpu.read_cases(tiny=True)[1]
    assert gpu.build_training(case, "native", False, torch.device("cpu")).batch_size == 1


def write_run(folder: Path, weight: float = 0.5, pixel: int = 7, **state) -> Path:
    """The short ones among the files of a run that `same_numbers` reads."""
    for part, value in (("unet", 0.25), ("unet_ema", weight)):
        (folder / f"checkpoint-1/{part}").mkdir(parents=True)
        save_file({"w": torch.tensor([1.0, value])}, folder / f"checkpoint-1/{part}/model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.tensor([weight])}}}, folder / "checkpoint-1/optimizer.pt")
    (folder / "checkpoint-1/state.json").write_text(json.dumps({"position": 4} | state))
    (folder / "README.md").write_text(str(folder))  # is not compared
    PIL.Image.fromarray(np.full((2, 2), pixel, np.uint8)).save(folder / "grid.png")
    return folder


def test_same_numbers_tells_files_apart_by_what_they_hold(tmp_path):
    before, same, other = (
        same_numbers.read_tree(write_run(tmp_path / name, **values))
        for name, values in {"a": {}, "b": {}, "c": {"weight": 0.5 + 2**-24, "pixel": 8}}.items()
    )
    assert before.keys() == {"weights", "EMA", "optimizer", "state", "images"}
    assert all(same_numbers.compare(before[kind], same[kind]) == ([], []) for kind in before)
    differences = {kind: same_numbers.compare(before[kind], other[kind])[0] for kind in before}
    assert {kind for kind in before if differences[kind]} == {"EMA", "images", "optimizer"}
    assert differences["EMA"][0].item == "checkpoint-1/unet_ema/model.safetensors:w"
    assert differences["EMA"][0].size == 2**-24 and differences["EMA"][0].text.startswith("1 of 2 values")
    assert differences["images"][0].size == 1


def test_same_numbers_allows_new_fields_but_not_missing_ones(tmp_path):
    before, after = (
        same_numbers.read_tree(write_run(tmp_path / name, **state))["state"]
        for name, state in {"a": {}, "b": {"x": 1}}.items()
    )
    assert same_numbers.compare(before, after) == ([], ["checkpoint-1/state.json:x"])
    assert [d.text for d in same_numbers.compare(after, before)[0]] == ["missing on HEAD"]
    one, two = {"a.safetensors:w": torch.ones(1)}, {"a.safetensors:w": torch.ones(1), "a.safetensors:v": torch.ones(1)}
    assert [d.text for d in same_numbers.compare(one, two)[0]] == ["only on HEAD"]
    assert same_numbers.compare({"x": 1}, {"x": 1.0})[0] and same_numbers.compare({"x": None}, {"x": 0})[0]


def test_same_numbers_reports_what_is_not_allowed(capsys):
    report = same_numbers.Report(["run/losses:*decay*", "run/images"])
    report.add("run/losses", {"decay": 0.5}, {"decay": 0.25})
    assert report.finish(0) == 0
    report.add("run/losses", {"decay": 0.5, "loss": 1.0}, {"decay": 0.25, "loss": 1.5})
    assert report.finish(0) == 1
    allowed, differs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run/losses  ")][:2]
    assert "allowed: decay: 0.5 -> 0.25, abs 0.25, rel 0.5" in allowed and "DIFFERS: loss: 1.0 -> 1.5" in differs


def test_same_numbers_reads_flags_and_commands():
    text = "Docs --old\n\noptions:\n  -h, --help  shows --this\n  --size {a,b-c}\n                --not a flag\n"
    assert set(same_numbers.flags_of(text)) == {"-h", "--help", "--size", "--size a", "--size b-c"}
    readme = (
        "```bash\nlaunch train_diffit.py --a 1 \\\n  --b 2  # why\nsbatch -N 2 configs/slurm/train.sbatch --c\n```\n"
    )
    assert same_numbers.readme_commands(readme) == [
        ("train_diffit.py", ["--a", "1", "--b", "2"]),
        ("train_diffit.py", ["--c"]),
    ]
