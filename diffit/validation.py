# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is measured while a training runs: held-out loss, metrics, previews, and which average is the best."""

import argparse
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDIMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ModelMixin
from torch.utils.data import DataLoader

from diffit.batches import LEVEL_BINS, build_dataset, prepare_batch, report_bad_images
from diffit.errors import UserError
from diffit.export import build_pipeline, save_pipeline
from diffit.features import FeatureExtractor, TableImages, extract_features, load_extractor
from diffit.formulations import NoiseScheduler, compute_loss
from diffit.logs import add_to_bins, bin_means, is_due
from diffit.metrics import NEAREST, FeatureSet, metric_values
from diffit.optimization import TrainingState, ema_weights
from diffit.processes import StopRequest, ignore_stop_signals, on_all_processes
from diffit.run_dir import OutputFolder
from diffit.sources import Table, detect_num_channels
from diffit.stream import PositionStream, collate
from diffit_pipeline import image_grid, null_label, to_displayable

logger = get_logger(__name__, log_level="INFO")


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ModelMixin,
    vae: AutoencoderKL | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Loss on held-out images at fixed noise and evenly spread timesteps, in all and by quartile of the noise levels.

    It has the weights of the training loss (--snr_gamma), so the two curves are the same quantity. None if a stop was
    asked for in the middle.
    """
    stream = PositionStream(len(table), seed=0)
    num_channels = model.config.in_channels if vae is None else vae.config.in_channels
    dataset = build_dataset(args, table, stream, model.config, num_channels, center_crop=True, random_flip=False)
    num_positions = min(len(table), args.validation_loss_images)
    positions = [(p, stream.index(p)) for p in range(num_positions)]
    batches = [positions[i : i + args.train_batch_size] for i in range(0, num_positions, args.train_batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    bins = torch.zeros(2, LEVEL_BINS, device=accelerator.device)
    bad_images: set[str] = set()
    for batch in DataLoader(
        dataset,
        batch_sampler=mine,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
    ):
        report_bad_images(batch["bad_images"], bad_images)
        batch["time_uniform"] = (batch["position"] + 0.5) / num_positions
        noisy = prepare_batch(batch, args, noise_scheduler, 0.0, null_label(model), vae, accelerator.device)
        model_pred = model(*noisy.network_inputs, **noisy.conditions).sample
        loss = compute_loss(
            model_pred, noise_scheduler, noisy.clean_images, noisy.noise, noisy.levels, args.snr_gamma or None
        )
        add_to_bins(bins, loss, noisy.level_bins)
        if stop.is_wanted():
            break
    return None if stop.is_wanted_anywhere() else bin_means(accelerator, bins, "validation/loss")


@torch.no_grad()
def sample_shard(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: ModelMixin,
    vae: AutoencoderKL | None,
    guidance_model: ModelMixin | None,
    noise_scheduler: NoiseScheduler,
    num_images: int,
    stop: StopRequest,
) -> torch.Tensor | None:
    """This process's part of the images of the seeds 0, 1, 2, ..., class after class. To be called by all processes.

    Returns:
        uint8, shape (B, C, H, W), of the same B in all processes: gathered, the first `num_images` are those asked
        for. None if a stop was asked for in the middle.
    """
    is_edm = isinstance(noise_scheduler, EDMEulerScheduler)
    sampler = EDMDPMSolverMultistepScheduler if is_edm else DDIMScheduler
    pipeline = build_pipeline(model, vae, sampler.from_config(noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    share = math.ceil(num_images / accelerator.num_processes)
    seeds = [min(accelerator.process_index * share + i, num_images - 1) for i in range(share)]
    null = null_label(model)
    images = []
    for i in range(0, share, args.train_batch_size):
        if stop.is_wanted():
            break
        chunk = seeds[i : i + args.train_batch_size]
        drawn = pipeline(
            class_labels=None if null is None else [seed % null for seed in chunk],
            batch_size=len(chunk),
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=1.0 if null is None and guidance_model is None else args.validation_guidance_scale,
            guidance_schedule=args.validation_guidance_schedule,
            guidance_power=args.validation_guidance_power,
            guidance_interval=args.validation_guidance_interval,
            guidance_channels=args.validation_guidance_channels,
            guidance_model=guidance_model,
            generator=[torch.Generator().manual_seed(seed) for seed in chunk],
            output_type="pt",
        ).images
        images.append((drawn * 255).round().byte().to(accelerator.device))
    return None if stop.is_wanted_anywhere() else torch.cat(images)


@dataclass
class Evaluator:
    """What the samples are compared by and with.

    Attributes:
        extractor: images to features.
        reference: features of the held-out images, or of the training images where none are held out.
    """

    extractor: FeatureExtractor
    reference: FeatureSet


def build_extractor(accelerator: Accelerator, args: argparse.Namespace, source: Table) -> FeatureExtractor | None:
    """Of --feature_extractor, for --eval_steps; None without it.

    Raises:
        ValueError: if it cannot be loaded, or there are too few images to compare with.
    """
    if args.eval_steps is None:
        return None
    if len(source) <= NEAREST:
        raise UserError(f"--eval_steps compares with {len(source)} images, {NEAREST + 1} are needed at least")
    load = functools.partial(load_extractor, args.feature_extractor, accelerator.device)
    return on_all_processes(accelerator, load, args.feature_model, args.inception_path)


def build_evaluator(
    accelerator: Accelerator, args: argparse.Namespace, extractor: FeatureExtractor | None, source: Table
) -> Evaluator | None:
    """For --eval_steps; None without it. The features of the real images are kept in --output_dir.

    Args:
        extractor: see `build_extractor`.
        source: images to compare with.
    """
    if extractor is None:
        return None
    num_channels = args.num_channels or detect_num_channels(source)
    features = extract_features(
        accelerator,
        Path(args.output_dir, "eval"),
        TableImages(source, args.resolution, num_channels),
        {"data": source.digest(), "resolution": list(args.resolution), "channels": num_channels},
        extractor,
        num_workers=args.dataloader_num_workers,
    )
    return Evaluator(extractor, FeatureSet(torch.from_numpy(np.array(features))))


def evaluate(
    accelerator: Accelerator, args: argparse.Namespace, evaluator: Evaluator, pixels: torch.Tensor
) -> dict[str, float]:
    """Metrics of the samples that all processes have drawn (see `sample_shard`); empty but in the main process."""
    features = torch.cat([evaluator.extractor(batch) for batch in pixels.split(64)])  # (B, F)
    features = accelerator.gather(features)[: args.eval_num_images].cpu()
    if not accelerator.is_main_process:
        return {}
    values = metric_values(args.eval_metrics, FeatureSet(features), evaluator.reference)
    return {f"eval/{name}": value for name, value in values.items()}


def validate_and_export(
    accelerator: Accelerator,
    args: argparse.Namespace,
    state: TrainingState,
    vae: AutoencoderKL | None,
    guidance_model: ModelMixin | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    validation_table: Table | None,
    evaluator: Evaluator | None,
    run_dir: OutputFolder,
    stop: StopRequest,
) -> bool:
    """Held-out loss, metrics if they are due, and preview grid of each average, and the pipeline folder of the best.

    To be called by all processes.

    Returns:
        False if it was given up because a stop was asked for.
    """
    model = state.model.eval()
    draw = functools.partial(sample_shard, accelerator, args, model, vae, guidance_model, noise_scheduler)
    if evaluator is not None and not is_due(state.global_step, args.eval_steps, args.max_train_steps):
        evaluator = None
    results = {}  # by the name of the average: losses and metrics, and the preview
    averages = state.ema_models or {"": None}
    for name, ema_model in averages.items():
        with ema_weights(ema_model, model):
            values, pixels = {}, None
            if validation_table is not None:
                values = validation_loss(accelerator, args, model, vae, noise_scheduler, validation_table, stop)
            if values is not None and evaluator is not None:
                pixels = draw(args.eval_num_images, stop)
                values = None if pixels is None else values | evaluate(accelerator, args, evaluator, pixels)
            if values is not None:
                pixels = draw(args.num_validation_images, stop)
        if values is None or pixels is None:
            logger.info(f"gave up the validation of step {state.global_step}, because a stop was asked for")
            break
        pixels = accelerator.gather(pixels)[: args.num_validation_images].cpu().permute(0, 2, 3, 1).numpy()
        results[name] = values, image_grid([to_displayable(image) for image in pixels])
    finished = len(results) == len(averages)
    if finished and accelerator.is_main_process:
        for name, (values, grid) in results.items():
            suffix = f"_{name}" if len(results) > 1 else ""
            accelerator.log({f"{key}{suffix}": value for key, value in values.items()}, step=state.global_step)
            preview = f"previews/step_{state.global_step:08d}{suffix}.png"
            if not run_dir.write(preview, grid.save):
                logger.warning(f"{preview} in {run_dir.folder} is not of this run: left as it is")
            stacked = np.asarray(grid.convert("RGB"))[None]
            for tracker in accelerator.trackers:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"samples{suffix}": stacked}, step=state.global_step, **options)
        best = min(results, key=lambda name: selection_score(args, results[name][0]))  # or the first
        save = functools.partial(
            save_pipeline, args, state, vae, noise_scheduler, table, best, *results[best], run_dir
        )
        with ema_weights(averages[best], model):
            save()
            if evaluator is not None:
                record_file = Path(args.output_dir, "eval", "best.json")
                record = best_record(args, evaluator, state.global_step, results[best][0])
                if is_best_so_far(args, record_file, record):
                    save("best")
                    text = json.dumps(record, indent=2) + "\n"
                    run_dir.write("eval/best.json", lambda file: file.write_text(text))
    model.train()
    accelerator.wait_for_everyone()
    return finished


def selection_score(args: argparse.Namespace, values: dict[str, float]) -> float:
    """What the best average has least of: by the first of --eval_metrics, else by the held-out loss."""
    metric = args.eval_metrics[0]
    sign = -1 if metric in ("precision", "recall") else 1
    return sign * values[f"eval/{metric}"] if f"eval/{metric}" in values else values.get("validation/loss", 0.0)


def best_record(args: argparse.Namespace, evaluator: Evaluator, global_step: int, values: dict[str, float]) -> dict:
    """What is kept of the best metrics, and what they were measured with, without which they mean nothing."""
    measured_with = {
        **evaluator.extractor.settings,
        "extractor": evaluator.extractor.name,
        "metric": args.eval_metrics[0],
        "images": args.eval_num_images,
        "reference_images": len(evaluator.reference),
    }
    return {"global_step": global_step, "values": values, "measured_with": measured_with}


def is_best_so_far(args: argparse.Namespace, file: Path, record: dict) -> bool:
    """Whether metrics are better than those of the file; those measured otherwise, or of later steps, do not count."""
    if not file.is_file():
        return True
    earlier = json.loads(file.read_text())
    comparable = earlier["measured_with"] == record["measured_with"]
    if not comparable or earlier["global_step"] >= record["global_step"]:
        return True
    return selection_score(args, record["values"]) < selection_score(args, earlier["values"])
