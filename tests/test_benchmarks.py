"""What the benchmarks compute from their figures."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import diffit_model  # noqa: E402
import gpu  # noqa: E402
import loop  # noqa: E402
import quality  # noqa: E402
import quality_report  # noqa: E402
from train_diffit import training_flops_per_image  # noqa: E402


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
    """What `gpu.main` sets is put back."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


TINY_GPU = ["--device", "cpu", "--tiny", "--output"]


def test_gpu_benchmark_runs_and_finds_nothing_wrong(tmp_path, recompile_limit):
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert text.endswith("Nothing is wrong.\n") and "WRONG" not in text
    assert text.count("## ") == 6 and "these figures are of no GPU" in text


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

    def tables_get_half_their_gradient(self, query, key, value, bias, **kwargs):
        if self.backend != "_native_math":  # the definition stays right
            bias = (bias + bias.detach()) / 2
        return right(self, query, key, value, bias, **kwargs)

    monkeypatch.setattr(diffit_model.DiffiTAttnProcessor, "__call__", tables_get_half_their_gradient)
    assert gpu.main([*TINY_GPU, str(tmp_path / "gpu.md"), "--sections", "backends"]) == 1
    assert "relative_position_bias_table | **WRONG**" in (tmp_path / "gpu.md").read_text()


def test_gpu_benchmark_without_cuda_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_gpu_benchmark_halves_a_batch_that_does_not_fit(monkeypatch):
    class Training(gpu.Training):
        def __call__(self):
            if self.args.global_batch_size > 1:
                raise torch.OutOfMemoryError
            return super().__call__()

    monkeypatch.setattr(gpu, "Training", Training)
    case = gpu.read_cases(tiny=True)[1]
    assert gpu.build_training(case, "native", False, torch.device("cpu")).args.global_batch_size == 1
