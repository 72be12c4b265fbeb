"""Writes benchmarks/results/quality.md and its plots from the results of `benchmarks/quality.py` in that folder.

What only who made them knows is taken from benchmarks/results/quality_notes.md.

python -m benchmarks.quality_report
"""

import itertools
import json
import math
import os
import platform
import statistics

import diffusers
import torch

from benchmarks.quality import PEER, RAMP_UP, RESULTS, SEEDS, SIDES, STEPS, TASKS, TUNING_IMAGES, tuned
from diffit.plots import AXIS_LABELS, new_figure

TARGETS = {"flops": 1.3, "minutes": 3.0}
QUESTIONS = (  # question, our side, the other side, unit of the cost
    ("a. architecture: DiffiT against `UNet2DModel`, same recipe with AdamW", "DiffiT", "U-Net", "flops"),
    ("b. product: DiffiT with Muon against `train_unconditional.py`", "DiffiT, Muon", PEER, "minutes"),
    ("b. with AdamW in place of Muon", "DiffiT", PEER, "minutes"),
)


def read_rows(name: str) -> list[dict]:
    """Reads results from benchmarks/results."""
    return json.loads((RESULTS / name).read_text())


def curve(rows: list[dict], task: str, side: str, metric: str) -> list[tuple[float, float, float]]:
    """The curve of a side's first weights: thousands of images, mean and standard deviation over the seeds."""
    rows = [row for row in rows if (row["task"], row["side"]) == (task, side)]
    rows = [row for row in rows if row["weights"] == rows[0]["weights"]]
    points = []
    for kimg in sorted({row["kimg"] for row in rows}):
        values = [row[metric]["value"] for row in rows if row["kimg"] == kimg]
        points.append((kimg, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return points


def cost_to_reach(points: list[tuple[float, float]], value: float) -> float | None:
    """The cost at which a falling curve reaches a value, by log-log interpolation; None if it never does.

    Args:
        points: (cost, value) pairs, sorted by cost.
        value: the value to reach.
    """
    if points[0][1] <= value:
        return points[0][0]
    for (cost, above), (next_cost, below) in itertools.pairwise(points):
        if below <= value:
            share = math.log(above / value) / math.log(above / below)
            return cost * (next_cost / cost) ** share
    return None


def saving(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[float, str]:
    """The factor by which our side is cheaper, and the value at which: their last one, or ours if it is worse.

    If our first budget already reaches that value, the factor is a lower bound.
    """
    reached = cost_to_reach(ours, theirs[-1][1])
    if reached is not None:
        at_least = ", at least" if ours[0][1] <= theirs[-1][1] else ""
        return theirs[-1][0] / reached, f"at its last distance{at_least}"
    reached = cost_to_reach(theirs, ours[-1][1])
    return reached / ours[-1][0], "at DiffiT's last distance: the other's was not reached"


def report() -> None:
    """Writes quality.md and its plots from the results in benchmarks/results."""
    rows, speed = read_rows("quality.json"), read_rows("quality_speed.json")
    speed = {(row["task"], row["side"]): row for row in speed}
    lines = ["# Is DiffiT worth it?", "", *protocol(), "", "## Sides", ""]
    lines += [
        "| task | side | parameters | training MFLOPs per image | images/s on one core | learning rate | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, side), row in speed.items():
        best = tuned(side, task)
        lines.append(
            f"| {task} | {side} | {row['parameters']:,} | {row['flops_per_image'] / 1e6:.1f} "
            f"| {1 / row['seconds_per_image']:.0f} | {best['learning_rate']:g} | {weights_text(best)} |"
        )
    lines += [
        "",
        "## Targets",
        "",
        "| task | question | cost of DiffiT (lowest and highest of the seeds) | target | met |",
        "|---|---|---|---|---|",
    ]
    for task in TASKS:
        for question, side, other, unit in QUESTIONS:
            found = []  # of the means, and of each seed
            for seeds in (SEEDS, *((seed,) for seed in SEEDS)):
                of_seeds = [row for row in rows if row["seed"] in seeds]
                costs = []
                for name in (side, other):
                    of = speed[task, name]
                    per_kimg = of["flops_per_image"] if unit == "flops" else of["seconds_per_image"]
                    costs.append([(x * per_kimg, y) for x, y, _ in curve(of_seeds, task, name, "frechet_distance")])
                found.append(saving(*costs))
            (times, where), each = found[0], [times for times, _ in found[1:]]
            target = TARGETS[unit]
            met = "yes" if min(each) >= target else "not with each seed" if times >= target else "**no**"
            times_text = f"{times:.2f} times fewer {unit} ({min(each):.2f} to {max(each):.2f})"
            lines.append(f"| {task} | {question} | {times_text}, {where} | {target} | {met} |")
    for task in TASKS:
        lines += ["", f"## {task}", "", f"![curves](quality_{task}.png)", ""]
        lines += [f"![samples](quality_samples_{task}.png)", ""]
        lines.append(f"*Held-out real images, then samples of {', '.join(SIDES)} with the same seeds.*")
        lines += ["", "| side | thousands of images | TFLOPs | minutes | Frechet distance | kernel distance x 1000 |"]
        lines.append("|---|---|---|---|---|---|")
        for side in SIDES:
            of = speed[task, side]
            kernel = curve(rows, task, side, "kernel_distance")
            for (kimg, mean, spread), (_, k_mean, k_spread) in zip(
                curve(rows, task, side, "frechet_distance"), kernel, strict=True
            ):
                lines.append(
                    f"| {side} | {kimg} | {kimg * of['flops_per_image'] / 1e9:.1f} "
                    f"| {kimg * 1000 * of['seconds_per_image'] / 60:.1f} | {mean:.2f} ± {spread:.2f} "
                    f"| {1000 * k_mean:.2f} ± {1000 * k_spread:.2f} |"
                )
        others = [row for row in rows if row["task"] == task and row["side"] == PEER]
        others = [row for row in others if row["weights"] != others[0]["weights"]]
        values = [row["frechet_distance"]["value"] for row in others]
        lines += ["", f"Final result of {PEER} with its other weights ({others[0]['weights']}): "]
        lines[-1] += f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}. "
        lines[-1] += "Real-vs-real baseline, half of the held-out images against the other: "
        lines[-1] += f"{rows_floor(rows, task):.2f}."
        draw_curves(task, rows, speed)
    lines += ["", *sampling_section(), "", *tuning_section()]
    (RESULTS / "quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def protocol() -> list[str]:
    """The report's section on the method."""
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return [
        f"`make benchmark-quality` on {os.cpu_count()} CPU cores ({platform.machine()}), Python "
        f"{platform.python_version()}, {versions}, float32, one core per training.",
        "",
        "Unconditional, no guidance, no flips. A fifth of the images is held out as the reference, except exact "
        f"duplicates of training images. Metrics use 1,000 samples with {STEPS} DDIM steps and `efficientnet_lite0`; "
        "mean and standard deviation over three seeds. FLOPs are those of the network, forward and backward. Minutes "
        "are the number of images times the measured seconds per image of a training step (network, optimizer and EMA "
        "on preloaded images), with all sides measured alternately in one process. The cost to reach a distance is "
        "read off the curve of means, interpolated log-log between the budgets.",
        "",
        "Every side uses its best learning rate and EMA, tuned with a separate seed on the same held-out images (see "
        "the last section; the peer's sweep includes its default). "
        f"{PEER} keeps its formulation, Adam settings, cosine schedule and 500 steps of warm-up (a third of that in "
        "the shorter tuning runs).",
        "",
        (RESULTS / "quality_notes.md").read_text().strip(),
    ]


def weights_text(best: dict) -> str:
    """Describes the weights of a side that are evaluated."""
    if isinstance(best["weights"], str):
        return {"raw": "last", "ema": "its average"}[best["weights"]]
    return f"average, half-life {min(best['weights'] / best['kimg'], RAMP_UP):.1%} of the images seen"


def rows_floor(rows: list[dict], task: str) -> float:
    """The Frechet distance between the two halves of the reference."""
    return next(row["frechet_distance"]["floor"] for row in rows if row["task"] == task)


def draw_curves(task: str, rows: list[dict], speed: dict) -> None:
    """Plots both distances against FLOPs and minutes."""
    figure, panels = new_figure(2, 2, (5, 3.6))
    for axes_row, metric in zip(panels, ("frechet_distance", "kernel_distance"), strict=True):
        for axes, (label, key, factor) in zip(
            axes_row,
            (("training TFLOPs", "flops_per_image", 1e-9), ("minutes on one core", "seconds_per_image", 1000 / 60)),
            strict=True,
        ):
            for side in SIDES:
                x, y, spread = zip(*curve(rows, task, side, metric), strict=True)
                x = [kimg * speed[task, side][key] * factor for kimg in x]
                axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=side)
            axes.set(xlabel=label, ylabel=AXIS_LABELS[metric], xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
    figure.savefig(RESULTS / f"quality_{task}.png")


def sampling_section() -> list[str]:
    """Plots the Frechet distance over NFE, one line per scheduler, and over the guidance scale."""
    lines = ["## Sampling", "", f"Frechet distance of the first seed, {TUNING_IMAGES} samples."]
    rows = read_rows("quality_more.json")
    by_steps = [row for row in rows if row["what"] == "steps"]
    for task, side in dict.fromkeys((row["task"], row["side"]) for row in by_steps):
        of_model = [row for row in by_steps if (row["task"], row["side"]) == (task, side)]
        evaluations = sorted({row["evaluations"] for row in of_model})
        lines += ["", f"| {task}, {side}: NFE | {' | '.join(map(str, evaluations))} |"]
        lines.append("|---" * (len(evaluations) + 1) + "|")
        for scheduler in dict.fromkeys(row["scheduler"] for row in of_model):
            cells = {
                row["evaluations"]: f"{row['frechet_distance']['value']:.1f}"
                for row in of_model
                if row["scheduler"] == scheduler
            }
            lines.append(f"| {scheduler} | {' | '.join(cells.get(number, '') for number in evaluations)} |")
    guided = [row for row in rows if row["what"] == "guidance"]
    if not guided:
        return lines
    scales, values = zip(*((row["guidance_scale"], row["frechet_distance"]["value"]) for row in guided), strict=True)
    lines += ["", "Guidance, in addition to the main results: the same training with class labels.", ""]
    lines += [
        f"| {guided[0]['task']}: guidance scale | {' | '.join(map(str, scales))} |",
        "|---" * (len(scales) + 1) + "|",
    ]
    lines.append(f"| {STEPS} steps of DDIM | {' | '.join(f'{value:.1f}' for value in values)} |")
    return lines


def tuning_section() -> list[str]:
    """The report's section on everything that was tried, including negative results."""
    lines = [
        "## Tuning",
        "",
        f"`make benchmark-quality-tuning`: one seed, {TUNING_IMAGES} samples; Frechet distance of each EMA. "
        "Muon is used for the matrices of the blocks, at three times AdamW's learning rate unless another is given.",
    ]
    rows = read_rows("quality_tuning.json") + read_rows("quality_tried.json")
    for task in TASKS:
        lines += [
            "",
            f"| {task}, {TASKS[task].tuning_budget} kimg | learning rate | Frechet distance |",
            "|---|---|---|",
        ]
        groups: dict[tuple, list[str]] = {}
        for row in rows:
            if row["task"] == task:
                weights = row["weights"] if isinstance(row["weights"], str) else f"{row['weights']:g} kimg"
                cell = f"{row['frechet_distance']['value']:.1f} ({weights})"
                groups.setdefault((row["side"], row["learning_rate"]), []).append(cell)
        lines += [f"| {side} | {rate:g} | {', '.join(cells)} |" for (side, rate), cells in groups.items()]
    return lines


if __name__ == "__main__":
    report()
