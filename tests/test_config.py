"""Flags, their YAML files, and the rules that need neither data nor models."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from diffusers.optimization import SchedulerType

from diffit import formulations
from diffit.command_line import flag_fields
from diffit.config import (
    LR_SCHEDULES,
    TrainConfig,
    args_to_config,
    build_parser,
    parse_args,
)
from diffit.diffusion_config import FORMULATIONS
from helpers import ROOT, mentions, refusal

QUICKSTART = ["--config", str(ROOT / "configs/train/quickstart.yaml")]


# --- flags


def test_misspelt_flag_is_named(capsys):
    assert "--learning_rat" in refusal([*QUICKSTART, "--learning_rat", "1"], capsys)


def test_abbreviated_flag_is_refused(capsys):
    assert "--learning" in refusal([*QUICKSTART, "--learning", "1"], capsys)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rat: 1e-4", ["'learning_rat'", "did you mean 'learning_rate'"]),
        ("learning_rate: fast", ["--learning_rate", "'fast'"]),
        ("prediction_type: noise", ["--prediction_type", "noise"]),
        ("center_crop: no", ["center_crop", "true or false"]),
        ("train_batch_size: 0", ["--train_batch_size", "0"]),
        ("train_batch_size: [1, 2]", ["train_batch_size", "one value"]),
        ("model_kwargs: 3", ["model_kwargs", "mapping"]),
        ("- a", ["flag: value"]),
        ("seed: 1\nseed: 2", ["seed", "twice"]),
        ("output_dir: null", ["output_dir", "one value"]),
        ("model_kwargs: {dropout: [[1], [2]]}", ["model_kwargs", "dropout"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_invalid_config_file_is_refused(line, words, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(line + "\n")
    message = refusal(["--config", str(file)], capsys)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max_train_steps=10", "--num_train_epochs=1"], ["--max_train_steps", "--num_train_epochs"]),
        (["--num_train_epochs=1"], ["--max_train_steps", "--num_train_epochs"]),  # the file has the other one
        (["--train_data_dir=a", "--dataset_name=b"], ["--train_data_dir", "--dataset_name"]),
        (["--global_batch_size=8", "--gradient_accumulation_steps=2"], ["--global_batch_size"]),
        (["--label_dropout=1.5"], ["--label_dropout", "1.5"]),
        (["--resolution=0x8"], ["--resolution", "0x8"]),
        (["--lr_scheduler=piecewise_constant"], ["--lr_step_rules"]),
        (["--overwrite_output_dir", "--resume_from_checkpoint=latest"], ["--overwrite_output_dir"]),
        (["--validation_split=test"], ["--validation_split", "--dataset_name"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--logging_dir=.."], ["--logging_dir"]),
        (["--logging_dir=."], ["--logging_dir"]),
        (["--logging_dir=/tmp"], ["--logging_dir"]),
        (["--learning_rate=inf"], ["--learning_rate"]),
        (["--learning_rate=nan"], ["--learning_rate"]),
        (["--adam_beta1=1"], ["--adam_beta1"]),
    ],
)
def test_invalid_command_line_is_refused(arguments, words, capsys):
    message = refusal([*QUICKSTART, *arguments], capsys)
    assert all(word in message for word in words), message


def test_command_line_overrides_config_overrides_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model_config: a.json\ntrain_data_dir: b\nmax_train_steps: 5\nlearning_rate: 1e-5\nuse_ema: false\n"
        "model_kwargs:\n  dropout: 0.1\n  block_out_channels: [8, 16]\n"
    )
    config = parse_args(["--config", str(file), "--max_train_steps=7", "--model_kwargs", "dropout=0.2"])
    assert (config.batch.max_train_steps, config.optimizer.learning_rate) == (7, 1e-5)
    assert (config.ema.use_ema, config.optimizer.adam_beta1) == (False, 0.9)
    assert config.model.model_kwargs == ("dropout=0.1", "block_out_channels=[8, 16]", "dropout=0.2")


def test_alternative_on_the_command_line_replaces_the_configs(tmp_path):
    config = parse_args(
        [*QUICKSTART, "--train_data_dir=mine", "--pretrained_model_name_or_path=a", "--global_batch_size=128"]
    )
    assert (config.data.source.train_data_dir, config.data.source.train_data_file) == ("mine", None)
    assert (config.model.pretrained_model_name_or_path, config.model.model_config) == ("a", None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_scheduler=warmup_stable_decay"], ["--lr_scheduler warmup_stable_decay", "--lr_decay_steps"]),
        (["--lr_decay_steps=2"], ["--lr_scheduler warmup_stable_decay", "--lr_decay_steps"]),
        (["--lr_warmup_kimg=1"], ["--lr_warmup_steps", "--lr_warmup_kimg"]),
        (["--ema_half_life_kimg", "1", "1"], ["--ema_half_life_kimg", "[1.0, 1.0]"]),
        (["--ema_half_life_kimg", "1", "--no-use_ema"], ["--ema_half_life_kimg", "--use_ema"]),
        (["--eval_steps=1", "--on_bad_image=skip"], ["--eval_steps", "--on_bad_image error"]),
    ],
)
def test_contradictory_flags_are_refused(flags, words, train_args, capsys):
    assert mentions(*words).search(refusal([*train_args, *flags], capsys))


def test_augmentation_of_latents_is_refused(train_args, capsys):
    flags = ["--augmentation_probability=0.1", "--vae_model_name_or_path=x"]
    assert "--augmentation_probability" in refusal([*train_args, *flags], capsys)


# --- all configs


def test_every_flag_has_help_with_its_default():
    for action in build_parser()._actions:
        assert action.help, action.dest
        if action.default not in (None, False) and action.dest != "help":
            assert "(default: " in action.help, action.dest


def test_repeated_choices_match_the_libraries():
    """The libraries are slow to import, so `config.py` repeats their names."""
    assert LR_SCHEDULES == (*(schedule.value for schedule in SchedulerType), "warmup_stable_decay")
    assert set(FORMULATIONS) == set(formulations.FORMULATIONS)


def test_help_and_refused_flags_need_no_slow_imports():
    for flags, code in ((["--help"], 0), (["--learning_rat=1"], 2)):
        command = [sys.executable, "-X", "importtime", "train_diffit.py", *flags]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == code
        imported = set(re.findall(r"\| +(\w+)$", process.stderr, re.MULTILINE))
        assert "yaml" in imported and not imported & {"torch", "numpy", "accelerate", "diffusers"}


def test_saved_flags_can_be_given_as_config(tmp_path):
    flags = ["--model_kwargs", "dropout=0.1", "block_out_channels=[8, 16]", "--resolution=8x16", "--random_flip"]
    flags += ["--ema_half_life_kimg", "1", "2.5", "--hub_token=secret", "--dry_run", "--no-deterministic"]
    config = parse_args(["--model_config=a", "--train_data_dir=b", "--num_train_epochs=2", *flags])
    saved = args_to_config(config)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(saved))
    again = parse_args(["--config", str(tmp_path / "args.yaml")])
    assert "secret" not in str(saved) and args_to_config(again) == saved
    start_only = {"hub": config.hub, "run": config.run}
    model = dataclasses.replace(again.model, model_kwargs=config.model.model_kwargs)  # sorted in YAML
    assert dataclasses.replace(again, model=model, **start_only) == config


def test_configs_are_frozen():
    config = parse_args(["--model_config=a", "--train_data_dir=b", "--max_train_steps=1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch.seed = 1


def test_flag_names_are_unique():
    names = [name for name, _ in flag_fields(TrainConfig)]
    assert len(names) == len(set(names)) > 90
