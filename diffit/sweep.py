# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sweeps of eval_diffit.py: a model measured with every combination of guidance scale, average and sampling steps.

The best average and guidance scale depend on each other and on the length of the training, so they are chosen
together.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from diffit.eval_config import SweepPoint
from diffit.image_sets import EvaluatedSet
from diffit.metrics import HIGHER_IS_BETTER
from diffit.plots import AXIS_LABELS, new_figure

# A set of samples, its metrics (see `diffit.metrics.compute_metrics`), and the combination that it was sampled with.
Measured = tuple[EvaluatedSet, dict[str, dict], SweepPoint]


def swept_values(sweep: tuple[SweepPoint, ...]) -> dict[str, list]:
    """The values of the flags that a sweep combines."""
    names = sweep[0].settings if sweep else ()
    return {name: _distinct(point.settings[name] for point in sweep) for name in names}


def best_of(measured: list[Measured]) -> Measured:
    """The combination with the best value of the first metric."""
    metric = next(iter(measured[0][1]))
    sign = -1 if metric in HIGHER_IS_BETTER else 1

    def score(one: Measured) -> float:
        value = sign * one[1][metric]["value"]
        return math.inf if math.isnan(value) else value

    return min(measured, key=score)


def row(images: EvaluatedSet, point: SweepPoint) -> dict[str, object]:
    """The settings of a combination, for a table; `nfe` counts network evaluations per image without guidance."""
    return {"name": images.name} | point.settings | {"nfe": images.nfe}


def format_sweep(measured: list[Measured]) -> str:
    """A table of all combinations for the screen; the best is marked."""
    metrics = list(measured[0][1])
    names = list(row(measured[0][0], measured[0][2]))
    lines, best = [[*names, *metrics, ""]], best_of(measured)
    for one in measured:
        images, result, point = one
        values = [f"{result[metric]['value']:.6g}" for metric in metrics]
        mark = f"<- best {metrics[0]}" if one is best else ""
        lines.append([*map(str, row(images, point).values()), *values, mark])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def sweep_results(measured: list[Measured]) -> dict[str, object]:
    """The contents of --output: the rows in order, and the best of them."""
    rows = [row(images, point) | {"kimg": images.kimg} | result for images, result, point in measured]
    images, _, point = best_of(measured)
    return {"sweep": rows, "best": row(images, point)}


def plot_sweep(folder: Path, measured: list[Measured]) -> None:
    """Writes a heat map of the first metric: two of the swept settings along the axes, a panel for the rest.

    Args:
        folder: for `sweep.png`.
        measured: all combinations.
    """
    metric, points = next(iter(measured[0][1])), [point.settings for *_, point in measured]
    names = sorted(points[0], key=lambda name: -len({settings[name] for settings in points}))
    x_name, y_name = (*names, None)[:2]
    panels: dict[str, list[Measured]] = {}
    for one in measured:
        rest = [f"{name} {one[2].settings[name]}" for name in names[2:]]
        panels.setdefault(", ".join([Path(one[0].name).name, *rest]), []).append(one)
    figure, axes = new_figure(1, len(panels))
    values = [one[1][metric]["value"] for one in measured]
    limits = {"vmin": min(values), "vmax": max(values)}
    best = best_of(measured)
    for (title, part), panel in zip(panels.items(), axes.flat, strict=True):
        columns = _distinct(one[2].settings[x_name] for one in part)
        rows = _distinct(one[2].settings.get(y_name) for one in part)
        grid = [[float("nan")] * len(columns) for _ in rows]
        for one in part:
            settings, value = one[2].settings, one[1][metric]["value"]
            i, j = rows.index(settings.get(y_name)), columns.index(settings[x_name])
            grid[i][j] = value
            weight = "bold" if one is best else "normal"
            text = f"{value:.4g}" + ("\nbest" if one is best else "")
            panel.text(j, i, text, ha="center", va="center", weight=weight, backgroundcolor="white", fontsize=8)
        image = panel.imshow(grid, aspect="auto", cmap="viridis", **limits)
        panel.set(title=title, xlabel=x_name, xticks=range(len(columns)), xticklabels=columns)
        panel.set(ylabel=y_name or "", yticks=range(len(rows)), yticklabels=rows if y_name else [""])
    figure.colorbar(image, ax=axes, label=AXIS_LABELS[metric])
    figure.savefig(folder / "sweep.png")


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))
