# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Atomic, checksummed, pickle-free checkpoints.

A checkpoint is written under a temporary name, the manifest of sizes and checksums last, then synced to disk and
renamed; only then are old ones deleted. docs/reliability.md lists the faults that this survives.
"""

import contextlib
import functools
import json
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import SchedulerMixin
from safetensors.torch import load_file

from diffit.config import FIXED, RunConfig
from diffit.errors import RunError, UserError
from diffit.lock import OutputDirLock
from diffit.logs import PROJECT
from diffit.optimization import TrainingState, ema_weights, gather_state
from diffit.plan import Plan
from diffit.processes import is_restarted, raise_in_all
from diffit.run_dir import (
    MANIFEST,
    RUN_OUTPUTS,
    OutputFolder,
    checkpoint_step,
    file_digest,
    files_below,
    is_checkpoint,
    is_within,
    list_checkpoints,
    listed,
    manifest_files,
    remove_checkpoint,
    remove_empty_folders,
    remove_whole_folder,
)
from diffit.sharding import is_sharded, shard_all, shard_like, shard_optimizer_state
from diffit.sources import is_same_data
from diffit_pipeline import component_name

logger = get_logger(__name__, log_level="INFO")


def verify_checkpoint(path: Path) -> str | None:
    """Checks a checkpoint against its manifest. Returns a description of the damage, or None if it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if absent := sorted({"state.json", "training_args.yaml", "optimizer.pt"} - set(manifest)):
            return f"{MANIFEST} does not list {absent[0]}"
        for name, expected in manifest.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} lists {name!r}, which is outside the checkpoint"
            if not (path / name).is_file():
                return f"{name} is missing"
            if file_digest(path / name) != expected:
                return f"{name} is damaged (size or checksum differs from {MANIFEST})"
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: JSON of another structure
        return f"cannot read {MANIFEST}: {error}"
    return None


def sync_to_disk(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to disk.

    Windows and some file systems cannot sync folders; errors are ignored there, and the system writes a rename to disk
    in its own time.
    """
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_checkpoint(
    folder: Path, accelerator: Accelerator, flags: dict, state: TrainingState, noise_scheduler: SchedulerMixin
) -> None:
    """Writes everything that a resumed run needs into a new folder, the manifest last."""
    shutil.rmtree(folder, ignore_errors=True)
    part = component_name(state.model)
    state.model.save_pretrained(folder / part)
    for name, ema_model in state.ema_models.items():
        with ema_weights(ema_model, state.model):
            state.model.save_pretrained(folder / f"{part}_{name}")
    noise_scheduler.save_pretrained(folder / "scheduler")  # so that one can fine-tune from here
    torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
    numbers = {
        "global_step": state.global_step,
        "position": state.position,
        "bad_steps": state.bad_steps,
        "bad_steps_in_a_row": state.bad_steps_in_a_row,
        "num_images": state.num_images,
        "data_digest": state.data_digest,
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "ema_steps": {name: ema_model.optimization_step for name, ema_model in state.ema_models.items()},
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }
    (folder / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (folder / "training_args.yaml").write_text(yaml.safe_dump(flags))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*files, folder / MANIFEST, *(path for path in folder.iterdir() if path.is_dir()), folder):
        sync_to_disk(path)


def save_checkpoint(
    accelerator: Accelerator,
    lock: OutputDirLock,
    run_dir: OutputFolder,
    flags: dict,
    state: TrainingState,
    noise_scheduler: SchedulerMixin,
) -> None:
    """Writes `checkpoint-N`, then deletes old ones. Must be called by all processes.

    It is written under a temporary name and renamed at the end, so a `checkpoint-N` is complete or does not exist.
    Only the main process writes and deletes, and only while it owns the folder.

    Args:
        accelerator: this process among all processes.
        lock: the lock on the run's folder.
        run_dir: the run's folder, with its list of the files that are ours.
        flags: the run's flags in the form of a config file; saved, and compared when resuming. All checkpoints are
            kept unless they contain `checkpoints_total_limit`.
        state: the state to save.
        noise_scheduler: saved as well, so that a checkpoint can be sampled and fine-tuned from.

    Raises:
        RunError: in all processes, if it could not be written; earlier checkpoints are kept.
    """
    accelerator.wait_for_everyone()
    state = gather_state(state, keep=accelerator.is_main_process)
    failed = torch.zeros(1, device=accelerator.device)
    reason = "see the main process"
    if accelerator.is_main_process:
        target = lock.folder / f"checkpoint-{state.global_step}"
        temporary = target.with_name(f"tmp-{target.name}")
        try:
            lock.check_owned()
            run_dir.announce([f"{temporary.name}/"])
            write_checkpoint(temporary, accelerator, flags, state, noise_scheduler)
            if target.exists() and is_ours(target, run_dir):  # a damaged checkpoint from the same step
                set_aside(target)
            put_in_place(temporary, target)
            sync_to_disk(target.parent)
            run_dir.forget([f"{temporary.name}/"])
            run_dir.record(f"{target.name}/{name}" for name in [*manifest_files(target), MANIFEST])
        except Exception as error:  # a full disk can raise OSError, SafetensorError or RuntimeError
            reason = str(error)
            failed += 1
            shutil.rmtree(temporary, ignore_errors=True)
    if accelerator.reduce(failed, "sum").item() > 0:
        left = list_checkpoints(lock.folder)
        raise_in_all(
            RunError,
            f"checkpoint-{state.global_step} could not be written to {lock.folder} ({reason}); "
            f"the last checkpoint is {left[-1].name if left else 'none'}",
        )
    logger.info(f"saved checkpoint-{state.global_step}")
    if accelerator.is_main_process and "checkpoints_total_limit" in flags:
        prune_checkpoints(run_dir, state.global_step, flags["checkpoints_total_limit"])


def prune_checkpoints(run_dir: OutputFolder, global_step: int, total_limit: int) -> None:
    """Deletes a run's oldest checkpoints so that `total_limit` remain, and as many that were set aside."""
    # A damaged checkpoint that was skipped when resuming may have a higher number: it is kept and not counted.
    ours = [path for path in list_checkpoints(run_dir.folder) if is_ours(path, run_dir) or path.is_symlink()]
    kept = [path for path in ours if checkpoint_step(path) <= global_step]
    aside = sorted(path for path in run_dir.folder.glob("superseded-*-checkpoint-*") if is_checkpoint(path))
    for old in [*kept[:-total_limit], *aside[:-total_limit]]:
        try:
            remove_checkpoint(old)
            run_dir.forget(name for name in run_dir.files if name.startswith(f"{old.name}/"))
        except OSError as error:
            logger.warning(f"cannot delete {old} (--checkpoints_total_limit): {error}")


def is_ours(checkpoint: Path, run_dir: OutputFolder) -> bool:
    """Whether a folder `checkpoint-N` is ours, by its manifest or, if that is damaged, by the list in `run_dir`."""
    return is_checkpoint(checkpoint) or any(name.startswith(f"{checkpoint.name}/") for name in run_dir.files)


def put_in_place(temporary: Path, target: Path) -> None:
    """Renames a finished temporary folder, or moves its files one by one if `target` exists with files of the user's.

    The manifest is moved last, so that even then the checkpoint is complete or does not exist.

    Raises:
        OSError: if a file of the user's has the name of one of ours.
    """
    if not target.exists():
        temporary.rename(target)
        return
    for file in sorted(files_below(temporary), key=lambda file: file.name == MANIFEST):
        place = target / file.relative_to(temporary)
        if os.path.lexists(place):
            raise OSError(f"{place} is in the way and was not written by this run")
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
        sync_to_disk(place.parent)
    remove_empty_folders(temporary)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that the run has superseded, so that it is never resumed from, and logs its new name."""
    aside = checkpoint.with_name(f"superseded-{time.strftime('%Y%m%d-%H%M%S')}-{checkpoint.name}")
    checkpoint.rename(aside)
    logger.warning(f"renamed {checkpoint} to {aside.name}")
    return aside


def find_checkpoint(run: RunConfig) -> Path | None:
    """Finds the checkpoint that --resume_from_checkpoint selects; None means to start from scratch.

    `checkpoint-N` is the one in --output_dir, `latest` the newest complete one there. Damaged ones are logged, skipped
    and kept.

    Raises:
        UserError: if the given checkpoint does not exist or is damaged, if all checkpoints are damaged, or if
            --output_dir already contains checkpoints and no flag says what to do with them.
    """
    existing = list_checkpoints(run.output_dir)
    if run.resume_from_checkpoint is None:
        if existing and not run.overwrite_output_dir:
            raise UserError(
                f"--output_dir {run.output_dir} already contains checkpoints up to {existing[-1].name}: give "
                "--resume_from_checkpoint latest to resume, or --overwrite_output_dir to delete them"
            )
        return None
    if run.resume_from_checkpoint != "latest":
        path = Path(run.resume_from_checkpoint)
        if re.fullmatch(r"checkpoint-\d+", str(path)) and (Path(run.output_dir, path).exists() or not path.exists()):
            path = Path(run.output_dir, path)  # as in diffusers' training scripts
        if not is_checkpoint(path):
            found = listed([each.name for each in reversed(existing)]) or "none"
            raise UserError(
                f"--resume_from_checkpoint {path} is not a checkpoint (no {MANIFEST} of ours); those in --output_dir "
                f"{run.output_dir}: {found}"
            )
        if problem := verify_checkpoint(path):
            raise UserError(f"--resume_from_checkpoint {path}: {problem}")
        return path
    for path in reversed(existing):
        problem = verify_checkpoint(path)
        if problem is None:
            return path
        logger.warning(f"skipping {path}: {problem}")
    if existing:
        raise UserError(f"--resume_from_checkpoint latest: all checkpoints in {run.output_dir} are damaged")
    logger.info(f"no checkpoint in {run.output_dir}: starting from scratch")
    return None


def check_same_run(path: Path, earlier: dict, flags: dict) -> None:
    """Refuses to resume with other values of the flags that are marked `fixed` in `diffit.config`.

    Args:
        path: the checkpoint, for messages.
        earlier: flags of the run that wrote it. A missing flag did not exist yet, and counts as its default.
        flags: flags of the run that resumes it.

    Raises:
        UserError: names the first flag that differs, with both values.
    """
    for name, field in FIXED.items():
        then, now = (values.get(name, field.default) for values in (earlier, flags))
        if field.metadata["fixed_if"] is not None:
            condition, value = field.metadata["fixed_if"]
            if value not in (values.get(condition, FIXED[condition].default) for values in (earlier, flags)):
                continue
        if then != now:
            raise UserError(
                f"{path} was trained with --{name} {then}, not {now}: a resumed run must keep its settings; to change "
                "them, fine-tune from its weights with --pretrained_model_name_or_path"
            )


def load_checkpoint(path: Path, accelerator: Accelerator, flags: dict, state: TrainingState, plan: Plan) -> None:
    """Restores a checkpoint written by `save_checkpoint`. Must be called by all processes.

    Args:
        path: the checkpoint.
        accelerator: its gradient scaler is restored as well.
        flags: flags of the run that resumes.
        state: a new run's state, which is overwritten.
        plan: plan of the run that resumes.

    Raises:
        UserError: if the checkpoint was trained with other settings, data or another network, or for more steps than
            the plan has, or if one of its files is damaged or contains code.
    """
    numbers = read_data(path / "state.json", lambda file: json.loads(file.read_text()))
    earlier = read_data(path / "training_args.yaml", lambda file: yaml.safe_load(file.read_text()))
    # Processes that keep only their shards need not hold the whole file each.
    read_tensors = functools.partial(torch.load, map_location="cpu", weights_only=True, mmap=is_sharded(state.model))
    optimizer_state = read_data(path / "optimizer.pt", read_tensors)
    check_same_run(path, earlier, flags)
    check_noise_schedule(path, plan)
    if numbers["global_step"] > plan.max_train_steps:
        raise UserError(
            f"{path} is at step {numbers['global_step']}, after the end of a training of {plan.max_train_steps} steps "
            "(--max_train_steps, --num_train_epochs or --max_train_kimg): give it more steps, or resume from an "
            "earlier checkpoint"
        )
    if numbers["num_images"] != state.num_images:
        raise UserError(f"{path} was trained on {numbers['num_images']} images, but the data has {state.num_images}")
    if not is_same_data(numbers["data_digest"], state.data_digest):
        raise UserError(f"{path} was trained on different images or labels, or with a different VAE")
    load_network_weights(path, state, numbers["ema_steps"])
    state.optimizer.load_state_dict(shard_optimizer_state(optimizer_state, state.optimizer))
    state.lr_scheduler.load_state_dict(numbers["lr_scheduler"])
    if numbers["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(numbers["scaler"])
    for name in ("global_step", "position", "bad_steps", "bad_steps_in_a_row"):
        setattr(state, name, numbers[name])
    logger.info(f"resumed from {path} at step {state.global_step}")
    warn_of_rate(path, state, plan)


def check_noise_schedule(path: Path, plan: Plan) -> None:
    """Refuses a noise schedule other than the checkpoint's, in the settings that have no flag to compare.

    Raises:
        UserError: names the setting, with both values.
    """
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():  # older versions saved none
        return
    then = read_data(file, lambda file: json.loads(file.read_text()))
    now = json.loads(plan.formulation.scheduler.to_json_string())
    for name in plan.formulation.without_flag:
        if name in then and then[name] != now[name]:
            raise UserError(
                f"{path} was trained with {name} {then[name]}, not {now[name]}: the noise schedule of "
                "--pretrained_model_name_or_path has changed since"
            )


def warn_of_rate(path: Path, state: TrainingState, plan: Plan) -> None:
    """Logs a warning if the learning rate jumps, since a schedule depends on the length of the training."""
    schedule = state.lr_scheduler
    before = schedule.get_last_lr()[0]
    after = schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
    if not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-12 * schedule.base_lrs[0]):
        direction = "goes back up" if after > before else "drops"
        logger.warning(
            f"{path}: the learning rate {direction} from {before:.3g} to {after:.3g}, because --lr_scheduler depends "
            f"on the length of the training, which is {plan.max_train_steps} steps now"
        )


def load_network_weights(path: Path, state: TrainingState, ema_steps: dict[str, int]) -> None:
    """Restores the network and its averages.

    Args:
        path: the checkpoint.
        state: receives the weights.
        ema_steps: number of optimizer steps in each average.

    Raises:
        UserError: if the weights belong to another network.
    """
    part = component_name(state.model)
    config = read_data(path / part / "config.json", lambda file: json.loads(file.read_text()))
    for key, value in json.loads(state.model.to_json_string()).items():
        if not key.startswith("_") and key != "auto_map" and config.get(key) != value:
            raise UserError(f"{path} contains a network with {key} {config.get(key)}, not {value}")
    weights, wanted = load_weights(path / part), state.model.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in wanted.items()}:
        raise UserError(f"{path} contains a different network than --model_config and --model_kwargs describe")
    state.model.load_state_dict(shard_all(weights, wanted))
    for ema_name, ema_model in state.ema_models.items():
        weights = load_weights(path / f"{part}_{ema_name}")
        with torch.no_grad():
            for (name, _), shadow in zip(state.model.named_parameters(), ema_model.shadow_params, strict=True):
                shadow.copy_(shard_like(weights[name], shadow))
        ema_model.optimization_step = ema_steps[ema_name]


def read_data(file: Path, reader: Callable[[Path], dict]) -> dict:
    """Reads a mapping from a file of a checkpoint.

    Args:
        file: the file.
        reader: reads the file without running code in it.

    Raises:
        UserError: names the file if it is damaged, contains code, or is not a mapping.
    """
    try:
        data = reader(file)
    except (pickle.UnpicklingError, yaml.YAMLError, RuntimeError, ValueError, EOFError, OSError) as error:
        # PyTorch's own message suggests to load it with `weights_only=False`, which would run the code.
        raise UserError(
            f"{file} is damaged or contains code, which is never run ({type(error).__name__}): delete the checkpoint, "
            "and resume only from checkpoints of people you trust"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a mapping, got {type(data).__name__}")
    return data


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder's safetensors files, which may be one file or several shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def open_run_dir(run: RunConfig, models: dict[str, str | None], dataset_name: str | None) -> OutputFolder:
    """Opens the run's folder, after checking that the run will not overwrite files of the user's.

    Must be called before anything is written.

    Args:
        run: the flags of the folder.
        models: maps flags to the folders or hub names of the models that the run reads.
        dataset_name: folder or hub name of a data set, or None. Every file in such a folder is read as data.

    Raises:
        UserError: if --output_dir is the folder of this code, or contains a model that this run reads, files of the
            user's with names that we use, or a trained pipeline that no flag allows us to replace.
    """
    folder = f"--output_dir {run.output_dir}"
    run_dir = OutputFolder(run.output_dir, "train_diffit.py")
    run_dir.refuse_code_folder()
    for flag, model in models.items():
        if model is not None and Path(model).exists() and is_within(model, run.output_dir):
            raise UserError(f"{folder} contains {flag} {model}, which training would overwrite: choose another folder")
    if dataset_name is not None and Path(dataset_name).is_dir() and is_within(run.output_dir, dataset_name):
        raise UserError(
            f"{folder} is inside --dataset_name {dataset_name}, so this run's previews would be read as data: choose "
            "another folder, or give the images as --train_data_dir, which ignores previews"
        )
    checkpoints = list_checkpoints(run.output_dir)
    # A run that was killed at the end of deleting a checkpoint leaves empty folders, which are nobody's.
    foreign = [path.name for path in checkpoints if not is_ours(path, run_dir) and any(files_below(path))]
    if foreign:
        raise UserError(
            f"{folder} contains {foreign[0]}, which this script did not write: move it, or choose another folder"
        )
    links = [path.name for path in checkpoints if path.is_symlink()]
    if links and run.overwrite_output_dir:
        raise UserError(f"{folder}: {links[0]} is a link, which --overwrite_output_dir does not delete: move it away")
    run_dir.check_free([*RUN_OUTPUTS, f"{run.logging_dir}/{PROJECT}/hparams.yml"])
    if Path(run.output_dir, "model_index.json").is_file() and not checkpoints and not is_restarted():
        if not run.overwrite_output_dir and run.resume_from_checkpoint in (None, "latest"):
            raise UserError(
                f"{folder} contains a trained pipeline but no checkpoint to resume from: give --overwrite_output_dir "
                "to replace it, or choose another folder"
            )
    return run_dir


def prepare_output_dir(accelerator: Accelerator, run: RunConfig, run_dir: OutputFolder, global_step: int) -> None:
    """Deletes temporary files and, with --overwrite_output_dir, earlier checkpoints, previews, metrics and logs.

    If a run resumes from an earlier checkpoint, later ones are renamed, since `latest` would select them.
    """
    if accelerator.is_main_process:
        output_dir = Path(run.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        # Files of a run that was killed while it wrote them.
        run_dir.remove([name for name in run_dir.files if name.startswith("tmp-")])
        if run.overwrite_output_dir:
            for old in list_checkpoints(output_dir):
                remove_checkpoint(old)
            earlier = ("previews/", "best/", "eval/", "checkpoint-", f"{run.logging_dir}/")
            run_dir.remove([name for name in run_dir.files if name.startswith(earlier)])
            for features in output_dir.glob("eval/features-*"):
                remove_whole_folder(features)
            for name in ("eval", run.logging_dir):
                remove_empty_folders(output_dir / name)
        for empty in list_checkpoints(output_dir):
            if not any(files_below(empty)):
                remove_empty_folders(empty)
        for later in list_checkpoints(output_dir):
            if checkpoint_step(later) > global_step and verify_checkpoint(later) is None:
                logger.warning(f"resuming from step {global_step}, before {later.name}")
                set_aside(later)
    accelerator.wait_for_everyone()
