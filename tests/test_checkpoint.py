"""Checkpoints: requirements for resuming, damaged files, and failing disks."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from diffit.checkpoint import file_digest, verify_checkpoint
from diffit.lock import OutputDirLock
from diffit.run_dir import OutputFolder, list_checkpoints
from helpers import STATES, assert_same_files, logged, mentions, train, wait_for_file
from warm_start import WarmProcess


@pytest.fixture(scope="module")
def finished_run(base_args, tmp_path_factory) -> Path:
    """A run of 4 steps with two checkpoints. Tests must not modify it."""
    run_dir = tmp_path_factory.mktemp("finished")
    train([*base_args, f"--output_dir={run_dir}", "--checkpointing_steps=2"])
    return run_dir


@pytest.fixture
def two_checkpoints(finished_run, train_args, tmp_path) -> tuple[list[str], Path]:
    """Flags that resume a copy of that run."""
    shutil.copytree(finished_run, tmp_path / "run")
    return [*train_args, "--checkpointing_steps=2", "--resume_from_checkpoint=latest"], tmp_path / "run"


# --- resume


def test_used_output_dir_is_refused_without_a_flag(finished_run, train_args):
    with pytest.raises(ValueError, match=mentions("--overwrite_output_dir", finished_run)):
        train([*train_args, f"--output_dir={finished_run}"])


def test_latest_in_an_empty_folder_starts_from_scratch(train_args, tmp_path):
    train([*train_args, "--resume_from_checkpoint=latest", "--max_train_steps=1"])
    assert (tmp_path / "run/checkpoint-1").is_dir()


def test_path_that_is_not_a_checkpoint_is_refused(train_args, tmp_path):
    with pytest.raises(ValueError, match=mentions("--resume_from_checkpoint", tmp_path)):
        train([*train_args, f"--resume_from_checkpoint={tmp_path}"])


def test_resuming_with_another_seed_batch_or_data_is_refused(train_args, image_folder):
    train([*train_args, "--max_train_steps=1"])
    with pytest.raises(ValueError, match=mentions("--seed", 0, 1)):
        train([*train_args, "--resume_from_checkpoint=latest", "--seed=1"])
    with pytest.raises(ValueError, match=mentions("--global_batch_size", 4, 8)):
        train([*train_args, "--resume_from_checkpoint=latest", "--global_batch_size=8"])
    with pytest.raises(ValueError, match=mentions("--learning_rate", 0.001, 0.005)):
        train([*train_args, "--resume_from_checkpoint=latest", "--learning_rate=5e-3"])
    with pytest.raises(ValueError, match=mentions("--use_ema", True, False)):
        train([*train_args, "--resume_from_checkpoint=latest", "--no-use_ema"])
    with pytest.raises(ValueError, match=mentions("--optimizer", "adamw", "muon")):
        train([*train_args, "--resume_from_checkpoint=latest", "--optimizer=muon"])
    with pytest.raises(ValueError, match=mentions("checkpoint-1", "layers_per_block", 1, 2)):
        train([*train_args, "--resume_from_checkpoint=latest", "--model_kwargs", "layers_per_block=2"])
    with pytest.raises(ValueError, match=mentions("checkpoint-1", 24, 18)):
        train([*train_args, "--resume_from_checkpoint=latest", "--validation_fraction=0.25"])


def test_resuming_with_other_images_or_another_network_is_refused(train_args, image_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    arguments = [*train_args, f"--train_data_dir={folder}"]
    train([*arguments, "--max_train_steps=1"])
    with pytest.raises(ValueError, match=mentions("checkpoint-1", "dropout", 0.0, 0.5)):
        train([*arguments, "--resume_from_checkpoint=latest", "--model_kwargs", "dropout=0.5"])
    (folder / "red/0.png").write_bytes((folder / "blue/0.png").read_bytes())
    with pytest.raises(ValueError, match=mentions("checkpoint-1", "images")):
        train([*arguments, "--resume_from_checkpoint=latest"])


def test_checkpoint_without_a_newer_flag_resumes_with_its_default(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    checkpoint = tmp_path / "run/checkpoint-1"
    file, manifest = checkpoint / "training_args.yaml", checkpoint / "manifest.json"
    flags = yaml.safe_load(file.read_text())
    del flags["optimizer"], flags["muon_lr_ratio"]
    file.write_text(yaml.safe_dump(flags))
    digests = json.loads(manifest.read_text()) | {file.name: file_digest(file)}
    manifest.write_text(json.dumps(digests))
    arguments = [*train_args, "--resume_from_checkpoint=latest", "--max_train_steps=2"]
    with pytest.raises(ValueError, match=mentions("checkpoint-1", "--optimizer", "adamw", "muon")):
        train([*arguments, "--optimizer=muon"])
    train([*arguments, "--muon_lr_ratio=2"])  # which says nothing to AdamW
    assert (tmp_path / "run/checkpoint-2").is_dir()


@pytest.mark.parametrize(("accumulation", "optimizer"), [(1, "adamw"), (2, "adamw"), (2, "muon")])
def test_killed_and_resumed_run_equals_the_uninterrupted_one_bitwise(accumulation, optimizer, train_args, tmp_path):
    """24 images and 4 x accumulation per step: the checkpoint lies in the second epoch. Dropout is on."""
    saved, steps = {1: (8, 16), 2: (4, 8)}[accumulation]
    arguments = [
        *train_args,
        f"--gradient_accumulation_steps={accumulation}",
        f"--max_train_steps={steps}",
        f"--checkpointing_steps={saved}",
        "--random_flip",
        "--lr_scheduler=cosine",
        f"--optimizer={optimizer}",
        "--model_kwargs",
        "dropout=0.2",
    ]
    train([*arguments, f"--output_dir={tmp_path / 'whole'}"])
    whole = tmp_path / "whole" / f"checkpoint-{steps}"

    killed = tmp_path / "killed"
    # A long validation right after the checkpoint gives the time to kill it in the middle of the run.
    slow = [f"--validation_steps={saved}", "--validation_inference_steps=1000", "--dataloader_num_workers=2"]
    process = WarmProcess(["train_diffit.py", *arguments, f"--output_dir={killed}", *slow])
    wait_for_file(killed / f"checkpoint-{saved}", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / f"checkpoint-{steps}").exists()

    for workers in (0, 2):
        resumed = tmp_path / f"resumed-{workers}"
        shutil.copytree(killed, resumed)
        train(
            [
                *arguments,
                f"--output_dir={resumed}",
                "--resume_from_checkpoint=latest",
                f"--dataloader_num_workers={workers}",
            ]
        )
        assert_same_files(whole, resumed / f"checkpoint-{steps}", STATES)
        assert json.loads((whole / "state.json").read_text()) == json.loads(
            (resumed / f"checkpoint-{steps}" / "state.json").read_text()
        )


def test_tensorboard_steps_after_the_checkpoint_are_purged(train_args, tmp_path):
    train([*train_args, "--max_train_steps=4", "--checkpointing_steps=2"])
    checkpoint = tmp_path / "run/checkpoint-2"
    train([*train_args, f"--resume_from_checkpoint={checkpoint}", "--max_train_steps=4"])
    steps = [event.step for event in logged(tmp_path / "run").Scalars("train/loss")]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("flags", [["--resume_from_checkpoint=checkpoint-2"], ["--resume_from_checkpoint=latest"]])
def test_checkpoint_is_found_by_its_name_in_the_output_folder(flags, two_checkpoints, caplog):
    arguments, run_dir = two_checkpoints
    train([*arguments, *flags, "--max_train_steps=4"])
    expected = "checkpoint-2" if "checkpoint-2" in flags[0] else "checkpoint-4"
    assert mentions(run_dir / expected, f"step {expected[-1]}").search(caplog.text)
    for name, path in (("checkpoint-9", run_dir / "checkpoint-9"), (str(run_dir), run_dir), ("last", "last")):
        words = mentions(f"--resume_from_checkpoint {path}", "checkpoint-4, checkpoint-2")
        with pytest.raises(ValueError, match=words):
            train([*arguments, f"--resume_from_checkpoint={name}"])


def test_fewer_steps_than_the_checkpoint_has_are_refused(two_checkpoints):
    arguments, run_dir = two_checkpoints
    before = (run_dir / "README.md").read_text()
    with pytest.raises(ValueError, match=mentions(run_dir / "checkpoint-4", "step 4", "3 steps", "--max_train_steps")):
        train([*arguments, "--max_train_steps=3"])
    assert (run_dir / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("steps", "words"), [(8, ["goes back up", 0, "0.00075", "8 steps"]), (4, None)], ids=["longer", "the_same"]
)
def test_learning_rate_that_goes_back_up_is_reported_with_both_rates(steps, words, train_args, caplog):
    """Cosine over 4 steps with 2 of warm-up has ended at 0; over 8 steps it is at (1 + cos(pi / 3)) / 2 = 0.75."""
    train([*train_args, "--lr_scheduler=cosine"])
    train([*train_args, "--lr_scheduler=cosine", f"--max_train_steps={steps}", "--resume_from_checkpoint=latest"])
    found = mentions("checkpoint-4", *(words or ["learning rate"])).search(caplog.text)
    assert bool(found) is (words is not None)


def test_noise_schedule_that_has_changed_at_its_source_is_refused_at_a_resume(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1", f"--output_dir={tmp_path / 'source'}"])
    arguments = [flag for flag in train_args if not flag.startswith("--model_config")]
    arguments += [f"--pretrained_model_name_or_path={tmp_path / 'source'}", "--beta_schedule=linear"]
    file = tmp_path / "source/scheduler/scheduler_config.json"
    config = json.loads(file.read_text()) | {"beta_schedule": "linear"}
    file.write_text(json.dumps(config))
    train([*arguments, "--max_train_steps=1"])
    file.write_text(json.dumps(config | {"beta_end": 0.015}))
    with pytest.raises(ValueError, match=mentions("checkpoint-1", "beta_end", 0.02, 0.015)):
        train([*arguments, "--resume_from_checkpoint=latest"])


def test_limit_of_checkpoints_holds_for_those_set_aside_too(two_checkpoints):
    arguments, run_dir = two_checkpoints
    folders = [run_dir / f"superseded-2020010{day}-000000-checkpoint-4" for day in (1, 2, 3)]
    for folder in folders:
        shutil.copytree(run_dir / "checkpoint-4", folder)
    (run_dir / "superseded-mine-checkpoint-4").mkdir()  # a folder of the user's
    train([*arguments, "--checkpoints_total_limit=2", "--max_train_steps=6"])
    assert [folder.exists() for folder in folders] == [False, True, True]
    assert (run_dir / "superseded-mine-checkpoint-4").is_dir()
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-4", "checkpoint-6"]


# --- damage


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_latest_skips_a_damaged_checkpoint_with_a_warning(damage, two_checkpoints, caplog):
    arguments, run_dir = two_checkpoints
    file = run_dir / "checkpoint-4" / ("manifest.json" if damage == "manifest" else "optimizer.pt")
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=mentions(file.name)):
        train([*arguments, f"--resume_from_checkpoint={run_dir / 'checkpoint-4'}"])
    train([*arguments, "--max_train_steps=5"])
    assert mentions(run_dir / "checkpoint-4", file.name).search(caplog.text)
    assert mentions(run_dir / "checkpoint-2", "step 2").search(caplog.text)
    assert verify_checkpoint(run_dir / "checkpoint-5") is None


def test_incomplete_manifest_counts_as_damage(two_checkpoints):
    arguments, run_dir = two_checkpoints
    (run_dir / "checkpoint-4/manifest.json").write_text("{}")
    assert mentions("manifest.json", "optimizer.pt").search(verify_checkpoint(run_dir / "checkpoint-4"))


def test_only_damaged_checkpoints_are_an_error_and_are_kept(two_checkpoints):
    arguments, run_dir = two_checkpoints
    for step in (2, 4):
        (run_dir / f"checkpoint-{step}" / "state.json").unlink()
    with pytest.raises(ValueError, match=mentions("--resume_from_checkpoint latest", run_dir)):
        train(arguments)
    assert (run_dir / "checkpoint-2/optimizer.pt").is_file()


def test_pruning_keeps_the_new_checkpoint_beside_a_damaged_one(two_checkpoints):
    arguments, run_dir = two_checkpoints
    (run_dir / "checkpoint-4/optimizer.pt").write_bytes(b"")
    train([*arguments, "--checkpoints_total_limit=1", "--max_train_steps=3"])
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3", "checkpoint-4"]
    assert verify_checkpoint(run_dir / "checkpoint-3") is None


def test_resuming_from_an_earlier_checkpoint_renames_later_ones(two_checkpoints, caplog):
    """Otherwise `latest` would select the abandoned branch, and pruning would delete the new one."""
    arguments, run_dir = two_checkpoints
    flags = ["--checkpoints_total_limit=1", "--max_train_steps=3"]
    train([*arguments, f"--resume_from_checkpoint={run_dir / 'checkpoint-2'}", *flags])
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3"]
    (aside,) = run_dir.glob("superseded-*-checkpoint-4")
    assert mentions(run_dir / "checkpoint-4", aside.name).search(caplog.text)


def test_finished_run_repeats_an_interrupted_export(two_checkpoints):
    arguments, run_dir = two_checkpoints
    shutil.rmtree(run_dir / "unet")
    (run_dir / "model_index.json").unlink()
    train(arguments)
    assert (run_dir / "model_index.json").is_file() and (run_dir / "unet/config.json").is_file()


def test_unfinished_checkpoint_of_a_killed_run_is_ignored_and_removed(two_checkpoints):
    arguments, run_dir = two_checkpoints
    OutputFolder(run_dir, "train_diffit.py").announce(["tmp-checkpoint-6/"])
    (run_dir / "tmp-checkpoint-6").mkdir()
    train([*arguments, "--max_train_steps=5"])
    assert not (run_dir / "tmp-checkpoint-6").exists()


# --- the disk


def test_full_disk_keeps_the_previous_checkpoint_and_is_reported(train_args, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here (it needs root)")
    try:
        with pytest.raises(RuntimeError, match=mentions(disk)) as error:
            train([*train_args, f"--output_dir={disk}", "--checkpointing_steps=1", "--max_train_steps=20"])
        failed, last = (int(number) for number in re.findall(r"checkpoint-(\d+)", str(error.value)))
        assert failed == last + 1 and (disk / f"checkpoint-{last}").is_dir()
        assert not list(disk.glob("tmp-*"))
        assert all(verify_checkpoint(path) is None for path in list_checkpoints(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lost_permission_keeps_the_previous_checkpoint_and_is_reported(train_args, tmp_path, monkeypatch):
    """The disk becomes read-only after the first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("a separate disk cannot be mounted here (it needs root)")
    original = OutputDirLock.check_owned

    def check_and_lose(lock: OutputDirLock) -> None:
        original(lock)
        if (disk / "checkpoint-1").exists():
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    monkeypatch.setattr(OutputDirLock, "check_owned", check_and_lose)
    try:
        flags = [f"--output_dir={disk}", "--checkpointing_steps=1", "--report_to=none"]
        with pytest.raises(RuntimeError, match=mentions(disk, "checkpoint-2", "checkpoint-1", "Read-only")):
            train([*train_args, *flags])
        assert verify_checkpoint(disk / "checkpoint-1") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_failed_pruning_does_not_stop_training(train_args, tmp_path, caplog):
    """A link to another disk is not deleted."""
    train([*train_args, "--max_train_steps=2"])
    (tmp_path / "run/checkpoint-2").rename(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-2").symlink_to(tmp_path / "elsewhere")
    train([*train_args, "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"])
    assert mentions("--checkpoints_total_limit", tmp_path / "run/checkpoint-2").search(caplog.text)
    assert verify_checkpoint(tmp_path / "run/checkpoint-4") is None


def test_folders_that_cannot_be_synced_do_not_stop_training(train_args, tmp_path, monkeypatch):
    """Some network file systems behave like this."""
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    train([*train_args, "--max_train_steps=1"])
    assert verify_checkpoint(tmp_path / "run/checkpoint-1") is None
