# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""From models and images to features: samples models for an evaluation, and keeps samples and features on disk."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from diffusers import DDPMScheduler, ModelMixin
from tqdm.auto import tqdm

from diffit.devices import tf32_settings
from diffit.errors import UserError, user_errors
from diffit.eval_config import DEFAULT_NUM_IMAGES, EvaluatedConfig, PlotsConfig, SweepPoint
from diffit.features import FeatureExtractor, extract_features, fill_array, settings_folder, weights_digest
from diffit.formulations import FORMULATIONS
from diffit.image_sets import ArrayImages, EvaluatedSet, ImageSet, check_resolution
from diffit.processes import on_all_processes
from diffit.run_dir import list_checkpoints
from diffit.sampling import (
    check_sampling,
    check_steps,
    load_pipeline,
    load_sampler,
    parse_class_labels,
    resolve_scheduler,
    sample_seeds,
)
from diffit.sampling_config import SamplingConfig
from diffit.sources import ImageTable
from diffit.stream import PositionStream
from diffit_pipeline import SAMPLERS, DiffiTPipeline, choose_scheduler, null_label, trained_with


@dataclass(frozen=True)
class Evaluation:
    """Samples models and extracts features, reusing earlier results. Its methods must be called by all processes.

    Attributes:
        processes: the processes and the device.
        work_dir: where samples and features are kept; all processes see it.
        extractors: the feature extractor and, for the Inception score, one that gives class probabilities.
        batch_size: images per forward pass and process.
        num_workers: processes that decode images, per process.
        resolution: height and width of all images; None: those of the evaluated images.
    """

    processes: PartialState
    work_dir: str
    extractors: list[FeatureExtractor]
    batch_size: int
    num_workers: int
    resolution: tuple[int, int] | None = None

    def measure(self, images: ImageSet, **description) -> EvaluatedSet:
        """Extracts features, and class probabilities for the Inception score.

        Args:
            images: the images.
            description: further fields of `EvaluatedSet`.
        """
        arrays = [
            extract_features(
                self.processes,
                self.work_dir,
                images.images,
                images.settings,
                extractor,
                self.batch_size,
                self.num_workers,
            )
            for extractor in self.extractors
        ]
        probabilities = arrays[1] if len(arrays) > 1 else None
        return EvaluatedSet(images=images, features=arrays[0], probabilities=probabilities, **description)

    def measure_model(
        self, model_path: str, sampling: SamplingConfig, evaluated: EvaluatedConfig, table: ImageTable | None
    ) -> EvaluatedSet:
        """Samples a model and measures the samples.

        Args:
            model_path: pipeline folder, checkpoint or hub name.
            sampling: the settings as requested.
            evaluated: weights, classes and number of images.
            table: the reference, for its classes; None if it is not a table.
        """
        sampling = on_all_processes(self.processes, resolve_scheduler, sampling, model_path)
        pipeline, guidance_model = on_all_processes(
            self.processes, load_sampler, model_path, sampling, self.processes.device, evaluated.weights
        )
        check_resolution(f"--model_path {model_path}", pipeline.image_size, self.resolution)
        num_images = evaluated.num_images or DEFAULT_NUM_IMAGES
        classes = list_classes(pipeline, evaluated.class_labels, num_images, table)
        images = self._sample(pipeline, guidance_model, sampling, num_images, classes)
        pipeline.scheduler.set_timesteps(sampling.num_inference_steps)
        num_timesteps = len(pipeline.scheduler.timesteps)  # `heun` takes two at each step but the last
        return self.measure(
            images,
            name=model_path,
            kimg=checkpoint_kimg(model_path),
            scheduler=sampling.scheduler,
            nfe=2 * num_timesteps - 1 if sampling.scheduler.endswith("_heun") else num_timesteps,
        )

    def _sample(
        self,
        pipeline: DiffiTPipeline,
        guidance_model: ModelMixin | None,
        sampling: SamplingConfig,
        num_images: int,
        classes: list[int] | None,
    ) -> ImageSet:
        """Samples the seeds 0, 1, 2, ..., or reads the samples from `work_dir`."""
        settings = sampling.image_settings() | {
            "weights_sha256": weights_digest(pipeline.network),
            "vae_sha256": None if pipeline.vae is None else weights_digest(pipeline.vae),
            "scheduler": json.loads(pipeline.scheduler.to_json_string()),
            "heun": pipeline.heun,
            "num_images": num_images,
            "classes_sha256": hashlib.sha256(str(classes).encode()).hexdigest(),
        }
        # Settings of later versions are left out where they have no effect, so that earlier samples are found.
        if sampling.s_churn == 0:
            settings = {key: value for key, value in settings.items() if not key.startswith("s_")}
        settings |= tf32_settings(self.processes.device)
        if guidance_model is not None:
            settings["guidance_model_sha256"] = weights_digest(guidance_model)

        def compute(ranges: list[range]) -> Iterator[np.ndarray]:
            for seeds in tqdm(ranges, desc="sampling", disable=not self.processes.is_main_process or not ranges):
                labels = None if classes is None else [classes[seed] for seed in seeds]
                batches = sample_seeds(pipeline, seeds, labels, sampling, self.batch_size, guidance_model)
                yield next(batches).transpose(0, 3, 1, 2)  # (B, C, H, W)

        folder = settings_folder(self.work_dir, "samples", settings)
        array = fill_array(self.processes, folder, settings, num_images, self.batch_size, compute)
        return ImageSet(ArrayImages(array), settings)


def measure_models(
    evaluation: Evaluation,
    evaluated: EvaluatedConfig,
    sampling: SamplingConfig,
    plots: PlotsConfig,
    table: ImageTable | None,
    sweep: tuple[SweepPoint, ...] = (),
) -> list[EvaluatedSet]:
    """Samples and measures the models of --model_path, each with all points of a sweep.

    Raises:
        UserError: if their images have different shapes, or the last one cannot be sampled for the plots as well.
    """
    paths = expand_checkpoints(evaluated.model_path, evaluated.all_checkpoints)
    on_all_processes(evaluation.processes, check_plot_steps, paths[-1], sampling, plots)  # not when all is sampled
    points = [(point.sampling, point.evaluated) for point in sweep] or [(sampling, evaluated)]
    if len(paths) * len(points) > 1:  # a single one is checked as it is loaded
        on_all_processes(evaluation.processes, check_points, paths, points)
    sets = [evaluation.measure_model(path, *point, table) for path in paths for point in points]
    shapes = {tuple(one.images.images[0].shape) for one in sets}
    if len(shapes) > 1:
        raise UserError(f"the models of --model_path sample images of different shapes (C, H, W): {sorted(shapes)}")
    return sets


def check_points(paths: list[str], points: list[tuple[SamplingConfig, EvaluatedConfig]]) -> None:
    """Refuses models, and points of a sweep, that cannot be sampled, before any of them is.

    Raises:
        UserError: names the flag.
    """
    for path in paths:
        pipelines = {}  # by the name of the weights; one at a time is in memory
        for sampling, evaluated in points:
            sampling = resolve_scheduler(sampling, path)
            if evaluated.weights not in pipelines:
                pipelines = {evaluated.weights: load_pipeline(path, sampling, evaluated.weights)}
            check_sampling(pipelines[evaluated.weights], sampling, path)


def plotted_samplings(plots: PlotsConfig, sampling: SamplingConfig, scheduler: str) -> list[SamplingConfig]:
    """The schedulers and steps of --plot_steps, for a model whose other samples are of `scheduler`."""
    default = next(tuple(names) for names in SAMPLERS.values() if scheduler in names)
    schedulers = plots.plot_schedulers or (("ddim", "dpmsolver++", "unipc") if "ddim" in default else default)
    return [sampling.with_scheduler(scheduler, steps) for scheduler in schedulers for steps in plots.plot_steps or ()]


def check_plot_steps(model_path: str, sampling: SamplingConfig, plots: PlotsConfig) -> None:
    """Refuses steps and schedulers of plots that the model does not have.

    Raises:
        UserError: names the flag.
    """
    if plots.plot_steps is None:
        return
    scheduler = resolve_scheduler(sampling, model_path).scheduler
    config = DDPMScheduler.load_config(model_path, subfolder="scheduler")
    for plotted in plotted_samplings(plots, sampling, scheduler):
        with user_errors("--plot_schedulers", ValueError):
            choose_scheduler(model_path, plotted.scheduler)
        formulation = FORMULATIONS[trained_with(config)].from_scheduler_config(config)
        check_steps(plotted.num_inference_steps, formulation, model_path, "--plot_steps")


def measure_by_steps(
    evaluation: Evaluation,
    model: EvaluatedSet,
    evaluated: EvaluatedConfig,
    sampling: SamplingConfig,
    plots: PlotsConfig,
    table: ImageTable | None,
) -> list[EvaluatedSet]:
    """Samples and measures a model, which was measured already, with the schedulers and steps of the plot."""
    return [
        evaluation.measure_model(model.name, plotted, evaluated, table)
        for plotted in plotted_samplings(plots, sampling, model.scheduler)
    ]


def expand_checkpoints(model_paths: tuple[str, ...], all_checkpoints: bool) -> list[str]:
    """The models to evaluate; with `all_checkpoints` also the checkpoints of each run, oldest first.

    Raises:
        UserError: if a run has no checkpoints.
    """
    paths = []
    for model_path in model_paths:
        if all_checkpoints:
            checkpoints = list_checkpoints(model_path)
            if not checkpoints:
                raise UserError(f"--all_checkpoints: --model_path {model_path} has no checkpoint-N")
            paths += [str(path) for path in checkpoints]
        if not all_checkpoints or Path(model_path, "model_index.json").is_file():
            paths.append(model_path)
    return list(dict.fromkeys(paths))


def checkpoint_kimg(model_path: str) -> float | None:
    """Thousands of images that a checkpoint has seen in training; None if this is not a checkpoint."""
    file = Path(model_path, "state.json")
    with user_errors(f"--model_path {model_path}: {file.name} is damaged", ValueError, TypeError, KeyError):
        return json.loads(file.read_text())["position"] / 1000 if file.is_file() else None


def list_classes(
    pipeline: DiffiTPipeline, class_labels: str, num_images: int, table: ImageTable | None
) -> list[int] | None:
    """The class of each sample, by its seed from 0 on; None for an unconditional model.

    Args:
        pipeline: the model.
        class_labels: --class_labels.
        num_images: number of samples.
        table: the reference, for `class_labels="reference"`.

    Raises:
        UserError: if a class does not exist, or the reference has none.
    """
    if null_label(pipeline.network) is None:
        if class_labels != EvaluatedConfig.class_labels:
            raise UserError(f"--class_labels {class_labels}: the model is unconditional")
        return None
    if class_labels != "reference":
        labels = parse_class_labels(pipeline, class_labels)
        return [labels[i % len(labels)] for i in range(num_images)]
    if table is None or table.class_names is None:
        raise UserError("--class_labels reference: the reference has no labels")
    stream = PositionStream(len(table), seed=0)
    numbers = [table.label(stream.index(i)) for i in range(num_images)]
    labels = [table.class_names[number] if pipeline.config.id2label else number for number in numbers]
    with user_errors("--class_labels reference", ValueError):
        return pipeline.label_ids(labels)
