# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains a DiffiT (or diffusers' UNet2DModel) on images, on one process or many.

    python train_diffit.py --config configs/train/quickstart.yaml
    accelerate launch train_diffit.py --config configs/train/emoji32.yaml --output_dir outputs/emoji32
    torchrun --nproc_per_node 4 train_diffit.py --config configs/train/emoji32.yaml --global_batch_size 256

A config file is a list of flags: defaults < --config < command line. `--dry_run` checks everything and stops.
Randomness is a function of the position in the data stream (see `diffit/stream.py`), so a run resumes exactly.
"""

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports: the launcher may die meanwhile

import argparse
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from diffit.batches import LEVEL_BINS, build_batches, prepare_batch, report_bad_images
from diffit.checkpoint import find_checkpoint, load_checkpoint, open_run_dir, prepare_output_dir, save_checkpoint
from diffit.command_line import run_script
from diffit.config import args_to_config, parse_args
from diffit.errors import RunError
from diffit.export import push_to_hub
from diffit.formulations import build_noise_scheduler, compute_loss, nan_if_non_finite
from diffit.latents import vae_description
from diffit.launcher import EXIT_STOPPED
from diffit.lock import OutputDirLock
from diffit.logs import PROJECT, add_to_bins, is_due, log_metrics
from diffit.networks import build_guidance_model, build_model, build_vae, read_model_config, set_up_model, vae_on_meta
from diffit.optimization import (
    NonFiniteGuard,
    TrainingState,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    finish_step,
    seed_dropout,
)
from diffit.plan import (
    build_accelerator,
    build_tables,
    describe_run,
    launch_fingerprint,
    print_dry_run,
    resolve_diffusion,
    resolve_duration,
    resolve_model_config,
)
from diffit.processes import (
    StopRequest,
    check_agreement,
    is_restarted,
    join_processes,
    on_all_processes,
    run_on_main_and_broadcast,
)
from diffit.run_dir import files_below
from diffit.validation import build_evaluator, build_extractor, validate_and_export
from diffit_pipeline import null_label

logger = get_logger("train_diffit", log_level="INFO")


def main(args: argparse.Namespace) -> None:
    """Takes possession of --output_dir and trains."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for name in ("httpx", "httpx2"):  # of older and newer versions of huggingface_hub
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.ExitStack() as resources, out_of_memory_errors():
        stop = StopRequest(args.max_train_time)
        resources.callback(stop.close)
        resume_after_restart(args)
        config = read_model_config(args)
        join_processes()
        accelerator = build_accelerator(args)
        resolve_diffusion(args)
        check_agreement(accelerator, launch_fingerprint(args, config))
        lock = OutputDirLock(args.output_dir)
        if not args.dry_run:
            resources.push(lock)  # first, because a signal may come while it is taken
            token = run_on_main_and_broadcast(accelerator, lock.__enter__)
            on_all_processes(accelerator, lock.check_visible, token)
        train(accelerator, args, config, lock, stop)


def resume_after_restart(args: argparse.Namespace) -> None:
    """Where torchrun or SLURM starts the same command again, it is to go on, not to begin anew."""
    if is_restarted() and (args.overwrite_output_dir or args.resume_from_checkpoint != "latest"):
        args.overwrite_output_dir, args.resume_from_checkpoint = False, "latest"
        print("restarted: going on as with --resume_from_checkpoint latest", file=sys.stderr)


def train(
    accelerator: Accelerator, args: argparse.Namespace, config_asked: dict, lock: OutputDirLock, stop: StopRequest
) -> None:
    """Sets up, resumes, trains and saves.

    Args:
        config_asked: of the model, see `read_model_config`.
        lock: proves that --output_dir is ours.
        stop: not begun yet.
    """
    # 1. set up
    run_dir = run_on_main_and_broadcast(accelerator, open_run_dir, args)
    resume_flags = (args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    checkpoint = run_on_main_and_broadcast(accelerator, find_checkpoint, *resume_flags)
    table, validation_table = on_all_processes(accelerator, build_tables, args)
    config = on_all_processes(accelerator, lambda: resolve_model_config(args, config_asked, table, vae_on_meta(args)))
    resolve_duration(args, len(table))
    digest = table.digest()
    check_agreement(accelerator, {"the training data": digest, "the model config": config})
    if args.dry_run:
        print_dry_run(accelerator, args, config, table, validation_table)
        return
    torch.manual_seed(args.seed)
    model_source = (args.pretrained_model_name_or_path, args.reset_class_embeddings)
    raw_model = on_all_processes(accelerator, build_model, config, *model_source)
    set_up_model(accelerator, args, raw_model)
    vae = on_all_processes(accelerator, build_vae, args, table, accelerator.device)
    guidance_model = on_all_processes(accelerator, build_guidance_model, args, raw_model, accelerator.device)
    if vae is not None:  # by which the same images are other data
        digest += f" {vae_description(vae)}"
    compared_with = table if validation_table is None else validation_table
    extractor = build_extractor(accelerator, args, compared_with)
    noise_scheduler = build_noise_scheduler(args)
    raw_optimizer = build_optimizer(args, raw_model)
    lr_scheduler = build_lr_scheduler(args, raw_optimizer)
    state = TrainingState(raw_model, build_ema(args, raw_model), raw_optimizer, lr_scheduler, len(table), digest)

    # 2. resume
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, args_to_config(args), state)
    prepare_output_dir(accelerator, args, run_dir, state.global_step)
    evaluator = build_evaluator(accelerator, args, extractor, compared_with)
    model, optimizer = accelerator.prepare(raw_model, raw_optimizer)
    batches = build_batches(accelerator, args, table, config, state.position)
    arguments = args_to_config(args)
    logs = Path(args.output_dir, args.logging_dir, PROJECT)
    earlier_logs = set(files_below(logs))
    accelerator.init_trackers(
        PROJECT,
        config=None if checkpoint else {k: v if isinstance(v, int | float) else str(v) for k, v in arguments.items()},
        init_kwargs={"tensorboard": {"purge_step": state.global_step + 1}},
    )
    if accelerator.is_main_process:
        new_logs = set(files_below(logs)) - earlier_logs
        run_dir.announce(log.relative_to(args.output_dir).as_posix() for log in new_logs)
    describe_run(accelerator, args, raw_model, table, validation_table)
    stop.begin()
    validate = functools.partial(
        validate_and_export,
        *(
            accelerator,
            args,
            state,
            vae,
            guidance_model,
            noise_scheduler,
            table,
            validation_table,
            evaluator,
            run_dir,
            stop,
        ),
    )
    validated = True
    if state.global_step >= args.max_train_steps:
        logger.info(f"nothing left to train: {checkpoint} is at step {state.global_step} of {args.max_train_steps}")
        # It may have been cut off.
        validated = validate()

    # 3. train
    null = null_label(raw_model)
    bins = torch.zeros(2, LEVEL_BINS, device=accelerator.device)  # losses since the last log, by noise level
    bad_images: set[str] = set()
    guard = NonFiniteGuard(raw_optimizer)
    validation_periods = [every for every in (args.validation_steps, args.eval_steps) if every is not None]
    periods = (args.logging_steps, args.checkpointing_steps, *validation_periods)
    progress = tqdm(total=args.max_train_steps, initial=state.global_step, disable=not accelerator.is_main_process)
    log_position, log_time = state.position, time.perf_counter()
    model.train()
    while state.global_step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            report_bad_images(batch["bad_images"], bad_images)
            noisy = prepare_batch(batch, args, noise_scheduler, args.label_dropout, null, vae, accelerator.device)
            seed_dropout(args.seed, int(batch["position"][0]))
            with accelerator.accumulate(model):
                model_pred = model(*noisy.network_inputs, **noisy.conditions).sample
                loss = compute_loss(
                    model_pred, noise_scheduler, noisy.clean_images, noisy.noise, noisy.levels, args.snr_gamma or None
                )
                accelerator.backward(nan_if_non_finite(loss).mean())
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    finish_step(args, state, guard)  # the step before, if the host did not wait for it
                    guard.watch(grad_norm)
                    lr = lr_scheduler.get_last_lr()[0]
                optimizer.step()
                optimizer.zero_grad()
            add_to_bins(bins, loss, noisy.level_bins)
        state.position += args.global_batch_size
        stopping = stop.agreed()
        if not stopping and not any(is_due(state.global_step + 1, every, args.max_train_steps) for every in periods):
            continue
        if not finish_step(args, state, guard):
            continue
        if is_due(state.global_step, args.logging_steps, args.max_train_steps):
            images_per_second = (state.position - log_position) / (time.perf_counter() - log_time)
            log_metrics(accelerator, progress, state, bins, grad_norm, lr, images_per_second, len(bad_images))
            bins.zero_()
            log_position, log_time = state.position, time.perf_counter()
        paused = time.perf_counter()
        finished = state.global_step == args.max_train_steps
        if stopping or is_due(state.global_step, args.checkpointing_steps, args.max_train_steps):
            save_checkpoint(
                accelerator, lock, run_dir, arguments, state, noise_scheduler, args.checkpoints_total_limit
            )
        if stopping and not finished:
            break
        if any(is_due(state.global_step, every, args.max_train_steps) for every in validation_periods):
            validated = validate()
        log_time += time.perf_counter() - paused  # images/s is of training alone

    # 4. finish
    progress.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # a launcher may end the main process when the first of the others has ended
    stop.close()
    if state.global_step < args.max_train_steps or not validated:
        logger.info(f"stopped at step {state.global_step}; go on with --resume_from_checkpoint latest")
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    if accelerator.is_main_process:
        logger.info(f"the trained pipeline is {args.output_dir}")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:  # the other processes are free: the group has ended
        push_to_hub(args, run_dir)


@contextlib.contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Says which flags help where memory runs out in the `with` block.

    Raises:
        RunError: in place of the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explanation = explain_out_of_memory(error)
        if explanation is None:
            raise
        failure = RunError(explanation)
        failure.raised_in = "process"
        raise failure from error


def explain_out_of_memory(error: Exception) -> str | None:
    """A message naming the flags that help, if an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory: {error}. What helps: a smaller --train_batch_size (with --global_batch_size the training "
            "stays the same), --gradient_checkpointing, --mixed_precision bf16, a smaller --resolution"
        )
    return None


if __name__ == "__main__":
    run_script(main, parse_args())
