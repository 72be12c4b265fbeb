# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frechet distance (FID, FD-DINOv2), KID, precision, recall and Inception score of images or of a model; and plots.

    python eval_diffit.py --images outputs/samples --reference data/images --feature_extractor inception
    accelerate launch eval_diffit.py --model_path outputs/emoji32 --reference data/noto_emoji_32.parquet \\
        --feature_extractor efficientnet_lite0 --num_images 1000 --output metrics.json --plots outputs/plots

Samples, features and reference statistics are kept in `--work_dir`: an interrupted run can be resumed, and a reference
is measured only once.
"""

from diffit.eval_config import EvalConfig, EvalMetricsConfig, EvaluatedConfig, ReferenceConfig, parse_args
from diffit.launcher import follow_launcher

if __name__ == "__main__":
    # Before the slow imports: the launcher may die meanwhile, and a refused flag is answered at once.
    follow_launcher()
    config = parse_args(description=__doc__)

import contextlib
import dataclasses
import itertools
import json
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState

from diffit.command_line import run_script, to_flags
from diffit.devices import warn_about_bfloat16
from diffit.errors import UserError, user_errors
from diffit.evaluation import Evaluation, measure_by_steps, measure_models
from diffit.features import FeatureExtractor, TableImages, load_extractor
from diffit.formulations import formulation_of
from diffit.image_sets import (
    READ_WITH,
    EvaluatedSet,
    ImageSource,
    identify,
    image_set,
    load_statistics,
    natural_size,
    open_source,
    save_statistics,
)
from diffit.losses import NoisyBatch, denoising_losses
from diffit.metrics import MIN_IMAGES, FeatureSet, compute_metrics, images_needed, metrics_device
from diffit.plots import PLOTS, plot_losses, plot_models, plot_neighbors
from diffit.processes import count_workers, join_processes, on_all_processes, run_on_main_and_broadcast
from diffit.run_dir import OutputFolder
from diffit.sampling import load_sampler
from diffit.sampling_config import GuidanceConfig, SamplingConfig
from diffit.sweep import Measured, best_of, format_sweep, plot_sweep, sweep_results, swept_values
from diffit_pipeline import DiffiTPipeline, null_label

SCRIPT = "eval_diffit.py"  # in the marks of output folders
NUM_LOSS_LEVELS = 20  # noise levels of loss_by_timestep.png
NUM_LOSS_IMAGES = 256  # images of each


@torch.no_grad()
def loss_by_level(
    pipeline: DiffiTPipeline, source: ImageSource, size: tuple[int, int], batch_size: int
) -> tuple[list[float], list[float]]:
    """Loss of a pixel-space model by noise level, from the least noise to the most.

    Args:
        pipeline: on the device.
        source: the first `NUM_LOSS_IMAGES` are taken, with the same noise at each level.
        size: height and width, to which files are resized.
        batch_size: images per forward pass.

    Returns:
        Noise levels and losses of the model's formulation.
    """
    network, device = pipeline.network, pipeline.device
    formulation = formulation_of(pipeline.scheduler)
    levels = formulation.level_grid(NUM_LOSS_LEVELS)
    if source.table is not None:  # with the channels of the model, not those of the feature extractors
        images = TableImages(source.table, size, network.config.in_channels)
    else:
        images = torch.from_numpy(source.array[:NUM_LOSS_IMAGES].copy())
    num_images = min(NUM_LOSS_IMAGES, len(images))
    null = null_label(network)
    labels = None if null is None else torch.full((num_images,), null)
    if labels is not None and source.table is not None and source.table.class_names is not None:
        labels = torch.tensor([source.table.label(index) for index in range(num_images)])
    clean = torch.stack([images[i] for i in range(num_images)]) / 127.5 - 1  # (N, C, H, W)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for level in levels:
        parts = []
        for start in range(0, num_images, batch_size):
            part = slice(start, start + batch_size)
            clean_images, part_noise = clean[part].to(device), noise[part].to(device)
            part_levels = torch.full((len(clean_images),), level, device=device)
            noisy_images, timesteps = formulation.network_inputs(clean_images, part_noise, part_levels)
            inputs = (noisy_images.to(network.dtype), timesteps)
            conditions = {"class_labels": None if labels is None else labels[part].to(device)}
            batch = NoisyBatch(inputs, clean_images, part_noise, part_levels, conditions)
            parts.append(denoising_losses(network, formulation, batch))
        losses.append(torch.cat(parts).mean().item())
    return levels, losses


def measure_images(
    evaluation: Evaluation, source: ImageSource, size: tuple[int, int], evaluated: EvaluatedConfig
) -> EvaluatedSet:
    """Measures --images; prints a warning if there are fewer than --num_images."""
    images = evaluation.measure(image_set(source, size, evaluated.num_images), name=evaluated.images)
    asked, found = evaluated.num_images, len(images.features)
    if asked is not None and found < asked and evaluation.processes.is_main_process:
        print(f"Warning: --num_images {asked}, but --images {evaluated.images} has {found} images only")
    return images


def load_for_losses(
    names: Iterable[str], sampling: SamplingConfig, device: torch.device, weights: str | None
) -> Iterator[tuple[str, DiffiTPipeline]]:
    """Loads models one after the other, each with its path; without guidance, which has no part in their losses."""
    plain = dataclasses.replace(sampling, scheduler=None, guidance=GuidanceConfig())
    for name in names:
        yield name, load_sampler(name, plain, device, weights)[0]


def loss_curves(
    pipelines: Iterable[tuple[str, DiffiTPipeline]], source: ImageSource, size: tuple[int, int], batch_size: int
) -> tuple[list[tuple[str, list[float], list[float]]], dict[str, str]]:
    """Loss by noise level of the pixel-space models that have the formulation of the first one.

    Args:
        pipelines: models with their paths, on the device.
        source: see `loss_by_level`.
        size: see `loss_by_level`.
        batch_size: images per forward pass.

    Returns:
        Arguments for `diffit.plots.plot_losses`: name, noise levels and losses of each model, and the axes.
    """
    first, curves = None, []
    for path, pipeline in pipelines:
        formulation = formulation_of(pipeline.scheduler)
        first = first or formulation
        if pipeline.transformer is not None or type(formulation) is not type(first):
            print(f"no loss by timestep of {path}: it is in latent space, or of another formulation than the first")
            continue
        channels = pipeline.network.config.in_channels
        if source.array is not None and source.array.shape[1] != channels:
            print(f"no loss by timestep of {path}: it has {channels} channels, {source.name} {source.array.shape[1]}")
            continue
        curves.append((Path(path).name, *loss_by_level(pipeline, source, size, batch_size)))
    return curves, first.axes()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def format_table(name: str, result: dict[str, dict]) -> str:
    """A table of metrics for the screen."""
    lines = [name, f"  {'metric':<18} {'value':>12} {'std':>12} {'real vs real':>12} {'images':>8} {'reference':>10}"]
    for metric, row in result.items():
        real_vs_real = "" if row["floor"] is None else f"{row['floor']:.6g}"
        counts = row["counts"]
        lines.append(
            f"  {metric:<18} {row['value']:>12.6g} {row['spread']:>12.3g} {real_vs_real:>12} {counts['images']:>8} "
            f"{counts['reference'] or '':>10}"
        )
    return "\n".join(lines)


def print_results(evaluated: list[tuple[EvaluatedSet, dict]], sweep: list[Measured]) -> None:
    """Prints a table of a sweep, or one for each set of images; and a warning if there are too few of them."""
    if sweep:
        print(format_sweep(sweep))
    for images, result in evaluated if not sweep else ():
        print(format_table(images.name, result))
    counts = [row["counts"] for row in evaluated[0][1].values()]
    num_images = min(n for row in counts for n in (row["images"], row["reference"]) if n is not None)
    if num_images < MIN_IMAGES:
        print(
            f"Warning: {num_images} images are few. Below {MIN_IMAGES}, compare values only with those of the same "
            "numbers of images: with more images the Frechet distance falls and recall rises."
        )


def write_results(
    output: str,
    evaluated: list[tuple[EvaluatedSet, dict]],
    by_steps: list[tuple[EvaluatedSet, dict]],
    sweep: list[Measured],
    settings: dict,
) -> None:
    """Writes the file of --output: the metrics of the only set of images, or a list `models`; and `by_steps`.

    Of a sweep, it has a list `sweep` with settings and metrics of each combination, and the settings of the `best`.

    Raises:
        UserError: if another program changed the file since the start.
    """
    rows = [{"name": images.name, "kimg": images.kimg} | result for images, result in evaluated]
    contents = sweep_results(sweep) if sweep else rows[0] if len(rows) == 1 else {"models": rows}
    if by_steps:
        contents["by_steps"] = [
            {"name": images.name, "scheduler": images.scheduler, "evaluations": images.nfe} | result
            for images, result in by_steps
        ]
    text = json.dumps(contents | {"settings": settings}, indent=1) + "\n"
    folder, name = output_folder(output)
    if not folder.write(name, lambda file: file.write_text(text)):
        raise UserError(f"--output {output} was changed by another program meanwhile, and is left as it is")


def describe(extractor: FeatureExtractor, size: tuple[int, int], arguments: dict) -> dict:
    """All that the metrics depend on besides the images, such as their size, which is the same on both sides."""
    packages = ("diffusers", "transformers", "numpy", "pillow")
    return {
        "feature_extractor": extractor.name,
        **extractor.settings,
        "channels_height_width": [3, *size],  # also of grayscale images
        "reference": arguments["reference"],
        "arguments": arguments,
        # torch.__version__ names the build, such as +cu130; the version of the package may not.
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in packages},
    }


def output_folder(output: str) -> tuple[OutputFolder, str]:
    """The folder of --output, with the mark of our files in it, and the name of the file."""
    file = Path(output)
    folder = OutputFolder(file.parent, SCRIPT, "--output")
    if not folder.files and file.is_file():  # results of a version that left no marks
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if {"feature_extractor", "arguments", "versions"} <= set(json.loads(file.read_text())["settings"]):
                folder.files = {file.name: None}
    return folder, file.name


def check_outputs(output: str | None, plots: str | None, work_dir: str) -> None:
    """Creates the output folders, and refuses to overwrite files that are not ours, before anything slow.

    Raises:
        UserError: if the file of --output is not one of results, or --plots has foreign files of our names.
    """
    if output is not None:
        folder, name = output_folder(output)
        folder.check_free([name])
        with user_errors(f"--output {output}", OSError):
            folder.folder.mkdir(parents=True, exist_ok=True)
    if plots is not None:
        folder = OutputFolder(plots, SCRIPT, "--plots")
        folder.check_free(PLOTS)
        folder.create()
    OutputFolder(work_dir, SCRIPT, "--work_dir").create()


# ---------------------------------------------------------------------------------------------------------------------
# Main


def open_sources(processes: PartialState, config: EvalConfig) -> tuple[ImageSource | None, ...]:
    """The images, or statistics, of --reference, --training_images and --images; None for a flag that is not given.

    Raises:
        UserError: names the flag that cannot be read, or has no effect on what is read.
    """
    names = (
        ("--reference", config.reference.reference),
        ("--training_images", config.plots.training_images),
        ("--images", config.evaluated.images),
    )
    asked, sources = config.reference, []
    for flag, name in names:
        sources.append(None if name is None else on_all_processes(processes, open_source, flag, name, asked))
    read = [source for source in sources if source is not None]
    for flag in sorted(set().union(*READ_WITH.values())):
        value, kinds = getattr(asked, flag), [kind for kind, flags in READ_WITH.items() if flag in flags]
        if value != getattr(ReferenceConfig, flag) and not any(flag in source.reader for source in read):
            given = ", ".join(f"{source.flag} {source.name}" for source in read)
            shown = f"--{flag}" if value is True else f"--{flag} {value}"
            raise UserError(f"{shown} has no effect: none of {given} is a {' or '.join(kinds)}")
    needs_images = config.plots.plots is not None and config.plots.training_images is None
    check_reference(sources[0], config.metrics.metrics, needs_images)
    return tuple(None if source is None else identify(processes, source) for source in sources)


def check_numbers(config: EvalConfig, reference: ImageSource, given: ImageSource | None) -> None:
    """Refuses sets of too few images before anything is sampled or measured.

    Args:
        config: the request.
        reference: the real images, or statistics.
        given: the images of --images; None for --model_path.

    Raises:
        UserError: names the flag and the number.
    """
    metrics, asked = config.metrics.metrics, config.evaluated.num_images
    counts = [(f"--num_images {asked}", asked, metrics)] if asked is not None else []
    counts += [(f"--images {given.name}", given.num_images, metrics)] if given is not None else []
    of_features = [name for name in metrics if name != "inception_score"]
    if reference.has_images and of_features:
        counts.append((f"--reference {reference.name}", reference.num_images, of_features))
    for what, number, names in counts:
        needed = images_needed(names, config.metrics.num_subsets)
        if number < needed:
            raise UserError(
                f"{what}: {number} images are too few: --metrics {' '.join(names)} with --num_subsets "
                f"{config.metrics.num_subsets} needs at least {needed}"
            )


def check_reference(source: ImageSource, metrics: tuple[str, ...], needs_images: bool) -> None:
    """Refuses statistics where images are needed.

    Args:
        source: the reference.
        metrics: the metrics asked for.
        needs_images: whether plots look for neighbors in the reference.

    Raises:
        UserError: names the flags that need images.
    """
    if not source.has_images and (metrics != ("frechet_distance",) or needs_images):
        raise UserError(
            f"--reference {source.name} holds statistics, not images: they give only --metrics frechet_distance, and "
            "--plots needs --training_images in addition"
        )


def load_extractors(processes: PartialState, config: EvalMetricsConfig) -> list[FeatureExtractor]:
    """The feature extractor and, for the Inception score, a second one that gives class probabilities."""
    arguments = (config.feature_extractor, processes.device, config.feature_model, config.inception_path)
    extractors = [on_all_processes(processes, load_extractor, *arguments)]
    if "inception_score" in config.metrics:
        extractors.append(load_extractor(*arguments, probabilities=True))
    return extractors


def real_features(
    source: ImageSource, reference: EvaluatedSet | None, evaluation: Evaluation, num_features: int
) -> FeatureSet:
    """The features of the reference, with the statistics that it holds for the Frechet distance if they fit.

    The statistics of a reference without any are saved next to its features.
    """
    extractor = evaluation.extractors[0]
    if reference is None:
        return load_statistics(source, extractor, num_features)
    features = reference.feature_set(metrics_device(evaluation.processes.device, reference.features.size))
    if source.statistics is not None:
        try:
            statistics = load_statistics(source, extractor, num_features)
        except UserError as error:
            print(f"Warning: {error}: all metrics are computed with its {len(features)} images")
            return features
        print(f"Frechet distances are to the statistics in {source.name}, other metrics to its {len(features)} images")
        mean, covariance = (values.to(features.device) for values in (statistics.mean, statistics.covariance))
        return FeatureSet(features.features, mean, covariance)
    file = Path(reference.features.filename).with_name("statistics.npz")
    save_statistics(file, features, extractor)
    print(f"statistics of the reference, which --reference takes too: {file}")
    return features


def compare_sets(
    config: EvalMetricsConfig, sets: list[EvaluatedSet], real: FeatureSet, reference: EvaluatedSet | None
) -> list[tuple[EvaluatedSet, dict]]:
    """The metrics of each set; see `diffit.metrics.compute_metrics`."""
    results = []
    for images in sets:
        features = images.feature_set(real.device)
        probabilities = (images.probabilities, None if reference is None else reference.probabilities)
        results.append((images, compute_metrics(config.metrics, features, real, *probabilities, config.num_subsets)))
    return results


def main(config: EvalConfig) -> None:
    """All processes sample and extract features; then the main process alone compares, prints, writes and plots."""
    processes = join_processes(config.device)
    warn_about_bfloat16(processes.device, config.sampling.dtype == "bf16", "--dtype fp16")
    evaluated, metrics, plots, output = config.evaluated, config.metrics, config.plots, config.output
    run_on_main_and_broadcast(processes, check_outputs, output.output, plots.plots, output.work_dir)

    # 1. inputs
    source, training_source, given = open_sources(processes, config)
    check_numbers(config, source, given)
    extractors = load_extractors(processes, metrics)
    sizes = (output.batch_size, count_workers(output.dataloader_num_workers), config.reference.resolution)
    evaluation = Evaluation(processes, output.work_dir, extractors, *sizes)

    # 2. samples and features, by all processes
    step_sets = []
    if evaluated.images is not None:
        size = config.reference.resolution or on_all_processes(processes, natural_size, given)
        sets = [measure_images(evaluation, given, size, evaluated)]
    else:
        sets = measure_models(evaluation, evaluated, config.sampling, plots, source.table, config.sweep)
        step_sets = measure_by_steps(evaluation, sets[-1], evaluated, config.sampling, plots, source.table)
        size = sets[0].images.images[0].shape[1:]
    reference = training = None
    if source.has_images:
        reference = training = evaluation.measure(image_set(source, size), name=source.name)
    if training_source is not None:
        features_only = dataclasses.replace(evaluation, extractors=extractors[:1])
        training = features_only.measure(image_set(training_source, size), name=training_source.name)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    if not processes.is_main_process:
        return

    # 3. metrics
    real = real_features(source, reference, evaluation, sets[0].features.shape[1])
    results, step_results = (compare_sets(metrics, group, real, reference) for group in (sets, step_sets))
    sweep = [(*one, point) for one, point in zip(results, itertools.cycle(config.sweep), strict=False)]
    print_results(results, sweep)
    if output.output is not None:
        arguments = to_flags(config) | swept_values(config.sweep)
        write_results(output.output, results, step_results, sweep, describe(extractors[0], size, arguments))

    # 4. plots
    if plots.plots is not None:
        folder = OutputFolder(plots.plots, SCRIPT, "--plots")
        folder.announce(PLOTS)
        if sweep:
            plot_sweep(folder.folder, sweep)
        else:
            plot_models(folder.folder, results, step_results)
        shown, weights = (best_of(sweep)[0], best_of(sweep)[2].evaluated.weights) if sweep else (sets[-1], None)
        held_out = None if training_source is None else reference
        plot_neighbors(folder.folder, shown, training, held_out, metrics.feature_extractor, output.batch_size)
        if evaluated.model_path is not None:
            names = dict.fromkeys(images.name for images in sets)
            pipelines = load_for_losses(names, config.sampling, processes.device, weights or evaluated.weights)
            curves = loss_curves(pipelines, training_source or source, size, output.batch_size)
            plot_losses(folder.folder / "loss_by_timestep.png", *curves)
        folder.record(PLOTS)


if __name__ == "__main__":
    run_script(main, config)
