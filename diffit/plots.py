# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Plots of an evaluation: metrics, nearest neighbors of samples, and the loss by noise level."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from diffit.image_sets import EvaluatedSet
from diffit.metrics import nearest
from diffit_pipeline import to_displayable

# Files that these functions write.
PLOTS = (
    *("metrics_by_kimg.png", "metrics_by_steps.png", "neighbours.png", "neighbour_distances.png"),
    *("loss_by_timestep.png", "sweep.png"),
)
NUM_SHOWN_SAMPLES = 8  # rows of neighbours.png
NUM_SHOWN_NEIGHBORS = 3  # of each kind in a row
AXIS_LABELS = {
    "frechet_distance": "Frechet distance (lower is better)",
    "kernel_distance": "kernel distance (lower is better)",
    "inception_score": "Inception score (higher is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
}


def new_figure(rows: int = 1, columns: int = 1, panel_size: tuple[float, float] = (5.5, 4)):
    """A matplotlib figure and its axes, an array of shape (rows, columns); sizes are in inches."""
    from matplotlib.figure import Figure  # slow to import; needs no display, unlike pyplot

    figure = Figure(figsize=(panel_size[0] * columns, panel_size[1] * rows), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_metrics(file: Path, lines: dict[str, list[tuple[float, dict[str, dict]]]], x_label: str) -> None:
    """Plots each metric against a quantity, with standard deviations and the real-vs-real baseline.

    Args:
        file: PNG to write.
        lines: for each name in the legend, points: x, and the metrics there (see `diffit.metrics.compute_metrics`).
        x_label: name of x, with its unit.
    """
    from matplotlib.ticker import LogFormatter

    metrics = list(next(iter(lines.values()))[0][1])
    columns = min(len(metrics), 2)
    figure, panels = new_figure(math.ceil(len(metrics) / columns), columns)
    for axes in panels.flat[len(metrics) :]:
        axes.set_axis_off()
    for metric, axes in zip(metrics, panels.flat, strict=False):
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            values, stds = ([result[metric][key] for _, result in points] for key in ("value", "spread"))
            axes.errorbar([x for x, _ in points], values, yerr=stds, marker="o", capsize=3, label=name)
        real_vs_real = points[0][1][metric]["floor"]
        if real_vs_real is not None:
            axes.axhline(real_vs_real, color="gray", linestyle="--", label="real vs. real images")
        axes.set(xlabel=x_label, ylabel=AXIS_LABELS[metric])
        if metric == "frechet_distance":
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.yaxis.set_major_formatter(LogFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("bars: standard deviation over disjoint subsets of the images", fontsize=9)
    figure.savefig(file)


def plot_models(
    folder: Path, evaluated: list[tuple[EvaluatedSet, dict]], by_steps: list[tuple[EvaluatedSet, dict]]
) -> None:
    """Plots metrics by images seen, a line for each run, and by NFE, a line for each scheduler."""
    runs, schedulers = {}, {}
    for images, result in evaluated:
        if images.kimg is not None:
            runs.setdefault(Path(images.name).parent.name, []).append((images.kimg, result))
    for images, result in by_steps:
        schedulers.setdefault(images.scheduler, []).append((images.nfe, result))
    if any(len(points) > 1 for points in runs.values()):
        plot_metrics(folder / "metrics_by_kimg.png", runs, "thousands of images seen in training")
    if schedulers:
        plot_metrics(folder / "metrics_by_steps.png", schedulers, "NFE (network evaluations per image)")


# ---------------------------------------------------------------------------------------------------------------------
# Has the model memorized its training images?


def plot_neighbors(
    folder: Path,
    samples: EvaluatedSet,
    training: EvaluatedSet,
    held_out: EvaluatedSet | None,
    extractor_name: str,
    batch_size: int,
) -> None:
    """Plots how near samples are to the training images, which shows whether a model has memorized them.

    Writes `neighbour_distances.png`, a histogram of the distances of all samples to their nearest training images, and
    `neighbours.png`, the nearest samples with their neighbors in features and in pixels.

    Args:
        folder: for the PNGs.
        samples: samples of the model.
        training: images that it was trained on.
        held_out: real images that it was not trained on; None: the samples are compared with the distances of the
            training images from each other.
        extractor_name: name of the feature extractor, for the axis.
        batch_size: training images that are read at once.
    """
    sample_features, training_features = (_float64(images) for images in (samples, training))
    distances, indices = nearest(sample_features, training_features, NUM_SHOWN_NEIGHBORS)
    if held_out is None:
        real = nearest(training_features, training_features, 2)[0][:, 1]  # the first neighbor is the image itself
        real_label = "training images from each other"
    else:
        real = nearest(_float64(held_out), training_features, 1)[0][:, 0]
        real_label = "real images of the reference"
    _plot_distances(folder / "neighbour_distances.png", distances[:, 0], real, real_label, extractor_name)

    shown = distances[:, 0].argsort()[:NUM_SHOWN_SAMPLES].tolist()
    images = torch.stack([samples.images.images[i] for i in shown])
    in_pixels = nearest_in_pixels(images, training.images.images, batch_size, NUM_SHOWN_NEIGHBORS)
    rows = []
    for row, sample in enumerate(shown):
        neighbors = indices[sample].tolist() + in_pixels[row].tolist()
        pictures = [images[row], *[training.images.images[i] for i in neighbors]]
        rows.append((f"image {sample}", f"distance {distances[sample, 0]:.3g}", pictures))
    _show_neighbors(folder / "neighbours.png", rows)


def _float64(images: EvaluatedSet) -> torch.Tensor:
    return torch.from_numpy(np.array(images.features)).double()  # (N, F)


def _plot_distances(
    file: Path, distances: torch.Tensor, real: torch.Tensor, real_label: str, extractor_name: str
) -> None:
    """Histograms of the distances of samples (N) and of real images (M) to the nearest training image."""
    limit = real.quantile(0.05)  # not lower: data with duplicates have many distances of 0
    fraction = (distances < limit).double().mean()
    figure, ((axes,),) = new_figure()
    bins = np.linspace(0, max(real.max(), distances.max()).item(), 41)
    for values, label in ((distances, "samples"), (real, real_label)):
        axes.hist(values.numpy(), bins, density=True, alpha=0.6, label=label)
    axes.axvline(limit.item(), color="gray", linestyle="--", label="nearest 5 % of the real images")
    axes.set(xlabel=f"distance to the nearest training image ({extractor_name} features)", ylabel="density")
    axes.set_title(f"{100 * fraction:.1f} % of the samples are nearer than 95 % of the real images", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file)


def _show_neighbors(file: Path, rows: list[tuple[str, str, list[torch.Tensor]]]) -> None:
    """Pictures of samples and of their neighbors: for each a name, its distance, and uint8 images (C, H, W)."""
    titles = ["sample"]
    titles += [f"{kind}\nneighbor {i + 1}" for kind in ("feature", "pixel") for i in range(NUM_SHOWN_NEIGHBORS)]
    figure, panels = new_figure(len(rows), len(titles), panel_size=(1.1, 1.2))
    for row_panels, (name, distance, pictures) in zip(panels, rows, strict=True):
        for axes, picture in zip(row_panels, pictures, strict=True):
            axes.imshow(to_displayable(picture.permute(1, 2, 0).numpy()), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        row_panels[0].set_ylabel(name, fontsize=8)
        row_panels[1].set_xlabel(distance, fontsize=8)
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.savefig(file)


def nearest_in_pixels(images: torch.Tensor, others: Dataset, batch_size: int, count: int) -> torch.Tensor:
    """Finds the images that are nearest in the Euclidean distance of their pixels.

    Args:
        images: uint8, shape (N, C, H, W).
        others: gives uint8 of shape (C, H, W).
        batch_size: images of `others` that are read at once.
        count: number of neighbors K.

    Returns:
        Indices into `others`, shape (N, K), nearest first.
    """
    flat = images.flatten(1).float()
    distances = [torch.cdist(flat, batch.flatten(1).float()) for batch in DataLoader(others, batch_size)]
    return torch.cat(distances, dim=1).topk(count, largest=False).indices


# ---------------------------------------------------------------------------------------------------------------------
# Loss by noise level


def plot_losses(file: Path, curves: list[tuple[str, list[float], list[float]]], settings: dict[str, str]) -> None:
    """Plots the loss by noise level of models of one formulation; writes nothing if there are none.

    Args:
        file: PNG to write.
        curves: for each model its name in the legend, noise levels and losses.
        settings: of the axes (see `Formulation.axes`).
    """
    if not curves:
        return
    figure, ((axes,),) = new_figure()
    for name, levels, losses in curves:
        axes.plot(levels, losses, marker="o", markersize=3, label=name)
    axes.set(yscale="log", **settings)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file)
