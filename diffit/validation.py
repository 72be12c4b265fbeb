# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Validation during training: held-out loss, metrics, previews, and the choice of the best average."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers import ModelMixin

from diffit.batches import BatchPreparer, build_dataset, load_batches
from diffit.config import DataConfig, MetricsConfig, RunConfig, ValidationConfig
from diffit.cpu_kernels import kernelize
from diffit.errors import UserError
from diffit.export import RunFacts, build_pipeline, save_pipeline
from diffit.features import FeatureExtractor, TableImages, extract_features, load_extractor
from diffit.formulations import Formulation
from diffit.logs import LossBins
from diffit.losses import denoising_losses
from diffit.metrics import (
    HIGHER_IS_BETTER,
    MAX_KERNEL_REFERENCE,
    NUM_NEIGHBORS,
    FeatureSet,
    metric_values,
    training_reference,
)
from diffit.optimization import TrainingState, ema_weights, gather_state
from diffit.plan import Plan
from diffit.processes import StopRequest, on_all_processes
from diffit.run_dir import OutputFolder
from diffit.sampling import NonFiniteSamplesError, load_guidance_model, sample_seeds
from diffit.sampling_config import GuidanceConfig, SamplingConfig
from diffit.sources import Table, detect_num_channels
from diffit.stream import PositionStream
from diffit_pipeline import Autoencoder, image_grid, null_label, to_displayable

logger = get_logger(__name__, log_level="INFO")


@dataclass
class Evaluator:
    """Everything that metrics of samples are computed with.

    Attributes:
        extractor: the feature extractor.
        num_reference: number of held-out images, or of training images if none are held out.
        reference: their features, in the main process; None in the others.
    """

    extractor: FeatureExtractor
    num_reference: int
    reference: FeatureSet | None


def build_guidance_model(
    accelerator: Accelerator, path: str | None, model: ModelMixin, formulation: Formulation
) -> ModelMixin | None:
    """Loads the weaker model of --validation_guidance_model onto the device; None without that flag.

    Args:
        accelerator: this process and its device.
        path: folder or hub name of the weaker model's pipeline, or None.
        model: the network that it guides.
        formulation: the training formulation, which must be the weaker model's as well.

    Raises:
        UserError: if there is no such model, or it was trained for another task.
    """
    arguments = (path, model, formulation.scheduler.config, torch.float32, "--validation_guidance_model")
    guidance_model = on_all_processes(accelerator, load_guidance_model, *arguments)
    return None if guidance_model is None else kernelize(guidance_model.to(accelerator.device))


def build_extractor(accelerator: Accelerator, asked: MetricsConfig, source: Table) -> FeatureExtractor | None:
    """Loads the feature extractor for --eval_steps; None without that flag.

    Raises:
        UserError: if it cannot be loaded, or there are too few images to compare with.
    """
    if asked.eval_steps is None:
        return None
    if len(source) <= NUM_NEIGHBORS:
        raise UserError(f"--eval_steps needs at least {NUM_NEIGHBORS + 1} images to compare with, got {len(source)}")
    load = functools.partial(load_extractor, asked.feature_extractor, accelerator.device)
    return on_all_processes(accelerator, load, asked.feature_model, asked.inception_path)


def build_evaluator(
    accelerator: Accelerator,
    extractor: FeatureExtractor | None,
    source: Table,
    plan: Plan,
    metrics: MetricsConfig,
    run: RunConfig,
) -> Evaluator | None:
    """Computes the features of the real images, or reads those that an earlier run has cached in --output_dir.

    Args:
        accelerator: distributes the work over the processes.
        extractor: see `build_extractor`; None for no metrics.
        source: images to compare with.
        plan: resolution and channels of the images, and the number of workers.
        metrics: which ones are computed.
        run: the run's folder.
    """
    if extractor is None:
        return None
    num_channels = plan.num_channels or detect_num_channels(source)
    features = extract_features(
        accelerator,
        Path(run.output_dir, "eval"),
        TableImages(source, plan.resolution, num_channels),
        {"data": source.data_digest(), "resolution": list(plan.resolution), "channels": num_channels},
        extractor,
        num_workers=plan.num_workers,
    )
    reference = None
    if accelerator.is_main_process:
        reference = training_reference(features, metrics.eval_metrics, accelerator.device)
    if "kernel_distance" in metrics.eval_metrics and len(features) > MAX_KERNEL_REFERENCE:
        logger.info(
            f"kernel_distance compares with {MAX_KERNEL_REFERENCE:,} of {len(features):,} reference images, a fixed "
            "random choice: it stays unbiased"
        )
    return Evaluator(extractor, len(features), reference)


@dataclass(frozen=True)
class Validation:
    """Everything that a run's validations need.

    Attributes:
        plan: the run's plan.
        asked: the flags of validation.
        metrics: the flags of metrics.
        data: the flags of the training data.
        state: the training state.
        vae: a latent-space model's VAE, or None.
        guidance_model: a weaker model that guides the previews, or None.
        held_out: images for the held-out loss, or None.
        evaluator: computes the metrics, or None.
        facts: facts about the run for the exported folder.
        run_dir: the run's folder.
        stop: stop requests, which end a validation early.
    """

    plan: Plan
    asked: ValidationConfig
    metrics: MetricsConfig
    data: DataConfig
    state: TrainingState
    vae: Autoencoder | None
    guidance_model: ModelMixin | None
    held_out: Table | None
    evaluator: Evaluator | None
    facts: RunFacts
    run_dir: OutputFolder
    stop: StopRequest


def validate_and_export(accelerator: Accelerator, validation: Validation, with_metrics: bool) -> bool:
    """Validates each average, and exports the best one as the pipeline folder. Must be called by all processes.

    Args:
        accelerator: distributes the work over the processes.
        validation: see `Validation`.
        with_metrics: whether to compute --eval_metrics, in addition to the held-out loss and the preview grid.

    Returns:
        False if it was interrupted by a stop request, otherwise True.
    """
    state = validation.state
    model = state.model.eval()
    results = {}  # average -> (losses and metrics, preview grid or None)
    averages = state.ema_models or {"": None}
    for name, ema_model in averages.items():
        with ema_weights(ema_model, model):
            result = validate_weights(accelerator, validation, with_metrics, name)
        if result is None:
            logger.info(f"interrupted the validation of step {state.global_step}: a stop was requested")
            break
        results[name] = result
    finished = len(results) == len(averages)
    whole = None
    if finished:
        whole = gather_state(state, keep=accelerator.is_main_process, with_optimizer=False)
    if finished and accelerator.is_main_process:
        log_results(accelerator, results, state.global_step, validation.run_dir)
        best = best_average(validation.metrics.eval_metrics[0], results)
        with ema_weights(whole.ema_models.get(best), whole.model):
            export(dataclasses.replace(validation, state=whole), best, *results[best])
    model.train()
    accelerator.wait_for_everyone()
    return finished


def validate_weights(
    accelerator: Accelerator, validation: Validation, with_metrics: bool, average: str
) -> tuple[dict[str, float], PIL.Image.Image | None] | None:
    """Held-out loss, metrics and preview grid of the network's current weights; None if a stop was requested.

    If values overflow in sampling, a warning is logged and the preview is left out, and so are the metrics if it was
    their samples that overflowed: early in a training, or with strong guidance, the run may well recover.

    Args:
        accelerator: distributes the work over the processes.
        validation: see `Validation`.
        with_metrics: whether to compute --eval_metrics.
        average: name of the average whose weights the network currently holds, or "" without EMA.

    Raises:
        NonFiniteSamplesError: if the weights themselves are not finite.
    """
    values = {}
    if validation.held_out is not None:
        values = validation_loss(accelerator, validation)
        if values is None:
            return None
    asked, skipped = validation.asked, "metrics and preview"
    try:
        if with_metrics:
            pixels = sample_shard(accelerator, validation, validation.metrics.eval_num_images)
            if pixels is None:
                return None
            values |= evaluate(accelerator, validation.metrics, validation.evaluator, pixels)
        skipped = "preview"
        pixels = sample_shard(accelerator, validation, asked.num_validation_images)
        if pixels is None:
            return None
    except NonFiniteSamplesError as error:
        if not error.weights_are_finite:
            raise
        weights = f"{average} at step" if average else "step"
        guided = "" if asked.guidance.scale == 1 else f" or --validation_guidance_scale {asked.guidance.scale:g}"
        logger.warning(
            f"skipped the {skipped} of {weights} {validation.state.global_step}: {error}; if this happens again, "
            f"lower --learning_rate{guided}"
        )
        return values, None
    images = accelerator.gather(pixels)[: asked.num_validation_images].cpu().permute(0, 2, 3, 1).numpy()
    return values, image_grid([to_displayable(image) for image in images])


@torch.no_grad()
def validation_loss(accelerator: Accelerator, validation: Validation) -> dict[str, float] | None:
    """Loss on the held-out images, overall and per quartile of the noise level; None if a stop was requested.

    The noise is fixed and the noise levels are evenly spaced. Images are weighted as in the training loss, so that the
    two curves show the same quantity.
    """
    plan, table, model = validation.plan, validation.held_out, validation.state.model
    if validation.vae is None:  # convert every image to the network's channels
        plan = dataclasses.replace(plan, num_channels=model.config.in_channels)
    data = dataclasses.replace(validation.data, center_crop=True, random_flip=False, augmentation_probability=0.0)
    stream = PositionStream(len(table), seed=0)
    num_positions = min(len(table), validation.asked.validation_loss_images)
    positions = [(p, stream.index(p)) for p in range(num_positions)]
    size = plan.batch.per_process
    batches = [positions[i : i + size] for i in range(0, num_positions, size)]
    prepare = BatchPreparer(plan.formulation, accelerator.device, validation.vae, null_label(model))
    losses = LossBins(accelerator.device)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in load_batches(build_dataset(table, stream, plan, data), mine, plan.num_workers):
        batch["time_uniform"].copy_((batch["position"] + 0.5) / num_positions)
        noisy = prepare(batch)
        losses.add(denoising_losses(model, plan.formulation, noisy), noisy.level_bins)
        if validation.stop.is_wanted():
            break
    return None if validation.stop.is_wanted_anywhere() else losses.means(accelerator, "validation/loss")


@torch.no_grad()
def sample_shard(accelerator: Accelerator, validation: Validation, num_images: int) -> torch.Tensor | None:
    """Samples this process's shard of the seeds 0, 1, 2, ..., cycling through the classes.

    Must be called by all processes.

    Returns:
        uint8, shape (B, C, H, W), with the same B in all processes; after gathering, the first `num_images` are the
        requested samples. None if a stop was requested.

    Raises:
        NonFiniteSamplesError: in all processes, if images have NaN or infinite values in any of them.
    """
    model, guidance_model = validation.state.model, validation.guidance_model
    pipeline = build_pipeline(model, validation.vae, validation.plan.formulation.preview_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.heun = False  # one forward pass per step, whatever the formulation
    shard = math.ceil(num_images / accelerator.num_processes)
    seeds = [min(accelerator.process_index * shard + i, num_images - 1) for i in range(shard)]
    null = null_label(model)
    labels = None if null is None else [seed % null for seed in seeds]
    can_guide = null is not None or guidance_model is not None
    guidance = validation.asked.guidance if can_guide else GuidanceConfig()
    sampling = SamplingConfig(num_inference_steps=validation.asked.validation_inference_steps, guidance=guidance)
    size = validation.plan.batch.per_process
    images, failures = [], []
    try:
        for batch in sample_seeds(pipeline, seeds, labels, sampling, size, guidance_model, pad=False):
            images.append(torch.from_numpy(batch).permute(0, 3, 1, 2))
            if validation.stop.is_wanted():
                break
    except NonFiniteSamplesError as error:
        failures.append((str(error), error.weights_are_finite))
    if failures := gather_object(failures):
        failure = NonFiniteSamplesError(failures[0][0], all(are_finite for _, are_finite in failures))
        failure.raised_in = "run"
        raise failure
    if validation.stop.is_wanted_anywhere():
        return None
    return torch.cat(images).contiguous().to(accelerator.device)


def evaluate(
    accelerator: Accelerator, asked: MetricsConfig, evaluator: Evaluator, pixels: torch.Tensor
) -> dict[str, float]:
    """Metrics of all processes' samples (see `sample_shard`) in the main process; an empty dict in the others."""
    features = torch.cat([evaluator.extractor(batch) for batch in pixels.split(64)])  # (B, F)
    features = accelerator.gather(features)[: asked.eval_num_images]
    if not accelerator.is_main_process:
        return {}
    features = FeatureSet(features.to(evaluator.reference.device))
    values = metric_values(asked.eval_metrics, features, evaluator.reference)
    return {f"eval/{name}": value for name, value in values.items()}


def log_results(
    accelerator: Accelerator,
    results: dict[str, tuple[dict[str, float], PIL.Image.Image | None]],
    global_step: int,
    run_dir: OutputFolder,
) -> None:
    """Sends each average's losses, metrics and preview to the trackers, and writes the previews into `previews/`."""
    for name, (values, grid) in results.items():
        suffix = f"_{name}" if len(results) > 1 else ""
        accelerator.log({f"{key}{suffix}": value for key, value in values.items()}, step=global_step)
        if grid is None:
            continue
        preview = f"previews/step_{global_step:08d}{suffix}.png"
        if not run_dir.write(preview, grid.save):
            logger.warning(f"{preview} in {run_dir.folder} was not written by this run: not overwritten")
        stacked = np.asarray(grid.convert("RGB"))[None]
        for tracker in accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"samples{suffix}": stacked}, step=global_step, **options)


def export(validation: Validation, average: str, values: dict[str, float], grid: PIL.Image.Image | None) -> None:
    """Writes the pipeline folder with the network's current weights, and `best/` if their metrics are the best so far.

    Args:
        validation: see `Validation`.
        average: name of the average whose weights the network currently holds, or "" without EMA.
        values: losses and metrics of these weights.
        grid: preview grid of these weights, or None if they cannot be sampled.
    """
    save = functools.partial(
        save_pipeline, validation.facts, validation.run_dir, validation.state, validation.vae, average, values, grid
    )
    save()
    metric = validation.metrics.eval_metrics[0]
    if f"eval/{metric}" not in values:
        return
    record_file = validation.run_dir.folder / "eval" / "best.json"
    record = best_record(validation.metrics, validation.evaluator, validation.state.global_step, values)
    if is_best_so_far(metric, record_file, record):
        save("best")
        text = json.dumps(record, indent=2) + "\n"
        validation.run_dir.write("eval/best.json", lambda file: file.write_text(text))


def best_average(metric: str, results: dict[str, tuple[dict[str, float], PIL.Image.Image | None]]) -> str:
    """The average with the best score; weights that cannot be sampled come last. Ties: the first one."""
    return min(results, key=lambda name: (results[name][1] is None, selection_score(metric, results[name][0])))


def selection_score(metric: str, values: dict[str, float]) -> float:
    """The model-selection score (lower is better): the metric if it was computed, otherwise the held-out loss."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    score = sign * values[f"eval/{metric}"] if f"eval/{metric}" in values else values.get("validation/loss", 0.0)
    return math.inf if math.isnan(score) else score


def best_record(
    asked: MetricsConfig, evaluator: Evaluator, global_step: int, values: dict[str, float]
) -> dict[str, Any]:
    """The contents of `best.json`: the metrics, and the settings needed to compare them with later ones."""
    measured_with = {
        **evaluator.extractor.settings,
        "extractor": evaluator.extractor.name,
        "metric": asked.eval_metrics[0],
        "images": asked.eval_num_images,
        "reference_images": evaluator.num_reference,
    }
    if asked.eval_metrics[0] == "kernel_distance" and evaluator.num_reference > MAX_KERNEL_REFERENCE:
        measured_with["kernel_reference_images"] = MAX_KERNEL_REFERENCE
    return {"global_step": global_step, "values": values, "measured_with": measured_with}


def is_best_so_far(metric: str, file: Path, record: dict[str, Any]) -> bool:
    """Whether `record` beats the stored one.

    A stored record with other settings, or from a later step (after resuming from an earlier checkpoint), is ignored.
    """
    if not file.is_file():
        return True
    earlier = json.loads(file.read_text())
    comparable = earlier["measured_with"] == record["measured_with"]
    if not comparable or earlier["global_step"] >= record["global_step"]:
        return True
    return selection_score(metric, record["values"]) < selection_score(metric, earlier["values"])
