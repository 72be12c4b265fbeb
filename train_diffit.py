# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains a DiffiT (or diffusers' UNet2DModel) on images, on one process or many.

    python train_diffit.py --config configs/train/quickstart.yaml
    accelerate launch train_diffit.py --config configs/train/emoji32.yaml --output_dir outputs/emoji32
    torchrun --nproc_per_node 4 train_diffit.py --config configs/train/emoji32.yaml --global_batch_size 256

A config file is a list of flags; the command line overrides it, and it overrides the defaults. `--dry_run` checks
everything and exits. All randomness is a function of the seed and the position in the data stream (see
`diffit/stream.py`), so a run resumes exactly.
"""

from diffit.config import parse_args
from diffit.launcher import follow_launcher

if __name__ == "__main__":
    # Before the slow imports, since the launcher may die during them, and a bad flag should be refused at once.
    follow_launcher()
    CONFIG = parse_args(description=__doc__)

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from diffit.batches import BatchPreparer, build_batches, open_tables, with_checked_latents
from diffit.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    open_run_dir,
    prepare_output_dir,
    save_checkpoint,
)
from diffit.command_line import run_script
from diffit.config import (
    EmaConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    args_to_config,
)
from diffit.errors import RunError
from diffit.export import RunFacts, pipeline_name, push_to_hub
from diffit.latents import vae_description
from diffit.launcher import EXIT_STOPPED
from diffit.lock import OutputDirLock
from diffit.logs import PROJECT, Meter, log_training
from diffit.losses import denoising_losses, nan_if_non_finite
from diffit.networks import (
    Networks,
    build_networks,
    read_model_config,
    vae_on_meta,
)
from diffit.optimization import (
    NonFiniteGuard,
    TrainingState,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    finish_step,
    seed_dropout,
)
from diffit.packing import Batch
from diffit.plan import (
    DataFacts,
    Plan,
    describe_data,
    describe_run,
    describe_vae,
    make_plan,
    plan_batch,
    plan_formulation,
    print_dry_run,
)
from diffit.pretrained import read_pretrained_scheduler
from diffit.processes import (
    StopRequest,
    build_accelerator,
    check_agreement,
    count_workers,
    is_restarted,
    join_processes,
    on_all_processes,
    run_on_main_and_broadcast,
)
from diffit.run_dir import CODE_FOLDER, OutputFolder, file_digest, files_below
from diffit.sharding import check_sharding, prepare, whole
from diffit.validation import Validation, build_evaluator, build_extractor, build_guidance_model, validate_and_export
from diffit_pipeline import null_label

logger = get_logger("train_diffit", log_level="INFO")


@dataclass(frozen=True)
class Run:
    """Shared by the stages of a training.

    Attributes:
        accelerator: this process and its device among all processes.
        stop: says when the processes must stop.
        lock: proves that this run owns the folder.
        folder: --output_dir, with its list of the files that are ours.
        checkpoint: the checkpoint to resume from, or None.
        plan: everything derived from the config, the data and the processes.
        flags: the run's flags in the form of a config file.
    """

    accelerator: Accelerator
    stop: StopRequest
    lock: OutputDirLock
    folder: OutputFolder
    checkpoint: Path | None
    plan: Plan
    flags: dict[str, Any]


def main(config: TrainConfig) -> None:
    """Runs a training from joining the processes to the upload."""
    set_up_logging()
    with contextlib.ExitStack() as resources, out_of_memory_errors():
        # 1. the processes, and everything that follows from the flags alone
        stop = resources.enter_context(contextlib.closing(StopRequest(config.batch.max_train_time)))
        asked = resume_after_restart(config.run)
        network = read_model_config(config.model)
        join_processes(config.precision)
        accelerator = build_accelerator(config.precision, asked)
        check_sharding(accelerator, config.optimizer.optimizer, config.model.compile, config.model.attention_backend)
        batch = plan_batch(config.batch, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = batch.accumulation
        vae = vae_on_meta(config.model.vae_model_name_or_path)
        pretrained = read_pretrained_scheduler(config.model.pretrained_model_name_or_path)
        formulation = plan_formulation(config.diffusion, config.model, config.validation, pretrained)
        check_agreement(accelerator, launch_fingerprint(args_to_config(config), network))

        # 2. the folder
        lock = OutputDirLock(asked.output_dir)
        if not asked.dry_run:
            take_folder(accelerator, lock, resources)
        folder = run_on_main_and_broadcast(accelerator, open_run_dir, asked, *config.folders_read())
        checkpoint = run_on_main_and_broadcast(accelerator, find_checkpoint, asked)

        # 3. the data, and the plan
        table, held_out = on_all_processes(accelerator, open_tables, config.data, config.validation)
        data = on_all_processes(accelerator, describe_data, table, vae, config.data.num_channels)
        workers = count_workers(config.data.dataloader_num_workers)
        plan = make_plan(config, network, batch, formulation, data, describe_vae(vae), workers)
        run = Run(accelerator, stop, lock, folder, checkpoint, plan, args_to_config(config, plan.resolved_flags()))
        check_agreement(accelerator, plan.agreement(data))
        if asked.dry_run:
            return print_dry_run(accelerator, run.flags, plan, table, held_out)

        # 4. the networks and the training state, new or resumed
        networks = build_networks(accelerator, plan.model_config, config.model, table, config.batch.seed)
        guide = build_guidance_model(accelerator, config.validation.guidance.model, networks.model, plan.formulation)
        compared = table if held_out is None else held_out
        extractor = build_extractor(accelerator, config.metrics, compared)
        state = build_state(run, networks, config.optimizer, config.schedule, config.ema, data)
        prepare_output_dir(accelerator, asked, folder, state.global_step)
        evaluator = build_evaluator(accelerator, extractor, compared, plan, config.metrics, asked)
        name = pipeline_name(config.hub.hub_model_id, asked.output_dir)
        facts = RunFacts(name, data.source, run.flags, plan, config.ema, config.metrics)
        asks = (config.validation, config.metrics, config.data)
        validation = Validation(plan, *asks, state, networks.vae, guide, held_out, evaluator, facts, folder, stop)

        # 5. train and finish
        batches = build_batches(table, plan, config.data, config.batch.seed, state.position, accelerator)
        batches = with_checked_latents(batches, networks.vae, accelerator.device)
        rates = (config.diffusion.label_dropout, config.data.augmentation_probability)
        null = null_label(networks.model)
        preparer = BatchPreparer(plan.formulation, accelerator.device, networks.vae, null, *rates)
        start_trackers(run, asked, state.global_step)
        logger.info(describe_run(plan, state.model, table, 0 if held_out is None else len(held_out)))
        validated = train(run, state, batches, preparer, validation, config.optimizer, config.batch.seed)
        finish(run, state, validated)
        if config.hub.push_to_hub and accelerator.is_main_process:  # the process group has ended: nobody waits
            push_to_hub(config.hub, folder)


def set_up_logging() -> None:
    """Logs with time and level, and without a line for every request to the hub."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for name in ("httpx", "httpx2"):  # used by older and newer versions of huggingface_hub
        logging.getLogger(name).setLevel(logging.WARNING)


def resume_after_restart(asked: RunConfig) -> RunConfig:
    """Changes the flags to resume the run if torchrun or SLURM has restarted this command."""
    if is_restarted() and (asked.overwrite_output_dir or asked.resume_from_checkpoint != "latest"):
        print("restarted: resuming as with --resume_from_checkpoint latest", file=sys.stderr)
        return replace(asked, overwrite_output_dir=False, resume_from_checkpoint="latest")
    return asked


def take_folder(accelerator: Accelerator, lock: OutputDirLock, resources: contextlib.ExitStack) -> None:
    """Locks --output_dir for this run, and checks that all processes see the same folder."""
    resources.push(lock)  # before taking it, because a signal may arrive in between
    token = run_on_main_and_broadcast(accelerator, lock.__enter__)
    on_all_processes(accelerator, lock.check_visible, token)


def launch_fingerprint(flags: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Any]:
    """The flags, model config, torch version and code, which must be the same in all processes.

    The paths of the data may differ between machines; the data itself is compared later.
    """
    places = {"train_data_dir", "train_data_file", "latents_dir", "cache_dir"}
    flags = {f"--{name}": value for name, value in flags.items() if name not in places}
    files = sorted([*CODE_FOLDER.glob("*.py"), *CODE_FOLDER.glob("diffit/**/*.py")])
    code = {str(file.relative_to(CODE_FOLDER)): file_digest(file)["sha256"][:8] for file in files}
    return flags | {"the model config": model_config, "torch": torch.__version__, "the code": code}


def build_state(
    run: Run,
    networks: Networks,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    ema: EmaConfig,
    data: DataFacts,
) -> TrainingState:
    """Builds everything that changes during training, and loads it from the run's checkpoint if there is one."""
    plan, model = run.plan, networks.model
    raw_optimizer = build_optimizer(optimizer, model)
    lr_scheduler = build_lr_scheduler(
        schedule, raw_optimizer, plan.max_train_steps, plan.warmup_steps, plan.decay_steps
    )
    averages = build_ema(ema, model, plan.batch.total)
    digest = data.digest
    if networks.vae is not None:  # another VAE turns the same images into different data
        digest += f" {vae_description(networks.vae)}"
    state = TrainingState(model, averages, raw_optimizer, lr_scheduler, data.num_images, digest)
    if run.checkpoint is not None:
        load_checkpoint(run.checkpoint, run.accelerator, run.flags, state, plan)
    return state


def start_trackers(run: Run, asked: RunConfig, global_step: int) -> None:
    """Starts the trackers; TensorBoard purges the logs of steps that a resumed run will repeat."""
    accelerator, flags = run.accelerator, run.flags
    logs = Path(asked.output_dir, asked.logging_dir, PROJECT)
    earlier_logs = set(files_below(logs))
    flags = {name: value if isinstance(value, int | float) else str(value) for name, value in flags.items()}
    accelerator.init_trackers(
        PROJECT,
        config=None if run.checkpoint else flags,
        init_kwargs={"tensorboard": {"purge_step": global_step + 1}},
    )
    if accelerator.is_main_process:
        new_logs = set(files_below(logs)) - earlier_logs
        run.folder.announce(log.relative_to(asked.output_dir).as_posix() for log in new_logs)


def train(
    run: Run,
    state: TrainingState,
    batches: Iterator[Batch],
    prepare_batch: BatchPreparer,
    validation: Validation,
    asked: OptimizerConfig,
    seed: int,
) -> bool:
    """Trains until the last step or a stop; returns False if a stop interrupted the last validation that was due.

    Args:
        run, state, validation: this training; `state` is updated in place.
        batches: this process's micro-batches, starting at `state.position`.
        prepare_batch: moves a micro-batch to the device and adds the noise.
        asked: the flags of gradient clipping and skipped steps.
        seed: seed of dropout.
    """
    accelerator, plan = run.accelerator, run.plan
    model, optimizer = prepare(accelerator, state.model, state.optimizer)
    guard = NonFiniteGuard(state.optimizer, asked.max_bad_steps, plan.batch.total, run.folder.folder)
    meter = Meter(accelerator.device, state.position)
    progress = tqdm(total=plan.max_train_steps, initial=state.global_step, disable=not accelerator.is_main_process)
    run.stop.begin()
    validated = validate_again(run, state, validation)
    model.train()
    # A step takes the next `global_batch_size` positions of the stream, shared among processes and micro-batches.
    while state.global_step < plan.max_train_steps:
        for _ in range(plan.batch.accumulation):
            noisy = prepare_batch(next(batches))  # VAE, augmentation, label dropout, noise
            seed_dropout(seed, noisy.first_position)  # makes dropout a function of the position, too
            with accelerator.accumulate(model):  # all-reduces gradients in the last micro-batch only
                losses = denoising_losses(model, plan.formulation, noisy)  # (B)
                accelerator.backward(nan_if_non_finite(losses).mean())
                if accelerator.sync_gradients:
                    grad_norm = whole(accelerator.clip_grad_norm_(model.parameters(), asked.max_grad_norm))
                    finish_step(state, guard)  # schedule, EMA and count of the previous step
                    guard.watch(grad_norm)  # the device skips the coming update if the norm is non-finite
                    lr = state.lr_scheduler.get_last_lr()[0]
                optimizer.step()
                optimizer.zero_grad()
            meter.losses.add(losses, noisy.level_bins)  # stays on the device
        state.position += plan.batch.total  # also over skipped steps
        # Unless something is due, the host runs one step ahead of the device and never waits for it.
        due = plan.due_after(state.global_step + 1, stopping=run.stop.agreed())
        if not due or not finish_step(state, guard):  # waits for the device; nothing is due after a skipped step
            continue
        if due.log:
            log_training(accelerator, progress, state, meter, grad_norm, lr, len(prepare_batch.bad_images))
        with meter.paused():  # images/s measures training only
            if due.checkpoint:
                save_checkpoint(accelerator, run.lock, run.folder, run.flags, state, plan.formulation.scheduler)
            if due.stop:
                break
            if due.validation:
                validated = validate_and_export(accelerator, validation, due.metrics)
    progress.close()
    return validated


def validate_again(run: Run, state: TrainingState, validation: Validation) -> bool:
    """If nothing is left to train, repeats the last validation; returns False if a stop interrupts it again."""
    step, last = state.global_step, run.plan.max_train_steps
    if step < last:
        return True
    logger.info(f"nothing left to train: {run.checkpoint} is at step {step} of {last}")
    return validate_and_export(run.accelerator, validation, run.plan.due_after(step).metrics)


def finish(run: Run, state: TrainingState, validated: bool) -> None:
    """Ends the trackers and the process group.

    Raises:
        SystemExit: with `EXIT_STOPPED`, if steps or the last validation are left to do.
    """
    accelerator = run.accelerator
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # a launcher may kill the main process as soon as another process has ended
    run.stop.close()
    accelerator.free_memory()  # DDP must go before the process group: gloo may hang otherwise (torch 2.13)
    if state.global_step < run.plan.max_train_steps or not validated:
        resume = "resume with --resume_from_checkpoint latest"
        logger.info(f"stopped at step {state.global_step}; {resume} (reason: {run.stop.reason()})")
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    if accelerator.is_main_process:
        logger.info(f"the trained pipeline is {run.folder.folder}")
    accelerator.end_training()


@contextlib.contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Names the flags that reduce memory if the `with` block runs out of it.

    Raises:
        RunError: replaces torch's or Python's out-of-memory error.
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
    """Returns a message that names the flags that reduce memory, or None for any other error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory: {error}. To reduce memory, try a smaller --train_batch_size (--global_batch_size keeps "
            "the training the same), --gradient_checkpointing, --mixed_precision bf16, or a smaller --resolution"
        )
    return None


if __name__ == "__main__":
    run_script(main, CONFIG)
