"""Plans: derived numbers and refusals, tested without data, models or training."""

import dataclasses
import json
import shutil

import pytest
from accelerate import PartialState

from diffit.config import parse_args
from diffit.errors import UserError
from diffit.formulations import DDPM, EDM
from diffit.networks import read_model_config
from diffit.plan import DataFacts, Plan, VaeFacts, describe_data, make_plan, plan_batch, plan_formulation, to_steps
from diffit.pretrained import read_pretrained_scheduler
from helpers import load_table, mentions, tiny_unet, tiny_vae, train

FACTS = DataFacts("the data", 24, "digest", ("blue", "green", "red"), 3)
VAE = VaeFacts(pixels_per_latent=2, image_channels=3, latent_channels=4)


@pytest.fixture
def plan(base_args):
    """A function that plans a training with the given flags; keyword arguments replace facts about the data."""

    def plan(*flags: str, num_processes: int = 1, vae: VaeFacts | None = None, **facts) -> Plan:
        names = {flag.split("=")[0] for flag in flags}
        replaced = {"--pretrained_model_name_or_path": "--model_config", "--latents_dir": "--train_data_dir"}
        replaced |= {"--lr_warmup_kimg": "--lr_warmup_steps", "--lr_scheduler": "--lr_warmup_steps"}
        replaced = [own for flag, own in replaced.items() if flag in names]
        config = parse_args([*(flag for flag in base_args if flag.split("=")[0] not in replaced), *flags])
        batch = plan_batch(config.batch, num_processes)
        pretrained = read_pretrained_scheduler(config.model.pretrained_model_name_or_path)
        formulation = plan_formulation(config.diffusion, config.model, config.validation, pretrained)
        network = read_model_config(config.model)
        return make_plan(config, network, batch, formulation, dataclasses.replace(FACTS, **facts), vae)

    return plan


# --- batch and duration


def test_global_batch_sets_the_accumulation(plan):
    batch = plan("--train_batch_size=4", "--global_batch_size=24", num_processes=3).batch
    assert (batch.per_process, batch.num_processes, batch.accumulation, batch.total) == (4, 3, 2, 24)
    batch = plan("--train_batch_size=4", "--gradient_accumulation_steps=5", num_processes=2).batch
    assert batch.total == 40


def test_global_batch_that_does_not_divide_is_refused(plan):
    with pytest.raises(UserError, match="--global_batch_size 10 .* --train_batch_size 4 x 1 processes"):
        plan("--train_batch_size=4", "--global_batch_size=10")


@pytest.mark.parametrize(
    ("duration", "steps"), [({"epochs": 2.5}, 15), ({"kimg": 0.03}, 8), ({"steps": 3}, 3), ({}, None)]
)
def test_duration_becomes_steps(duration, steps):
    assert to_steps(batch_size=4, num_images=24, **duration) == steps


def test_warmup_and_decay_become_steps(plan):
    config = ["--train_batch_size=4", "--lr_warmup_kimg=0.009", "--lr_scheduler=warmup_stable_decay"]
    result = plan(*config, "--lr_decay_kimg=0.02", "--max_train_steps=8")
    assert (result.max_train_steps, result.warmup_steps, result.decay_steps) == (8, 3, 5)
    assert plan("--lr_scheduler=constant").warmup_steps == 500


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr_scheduler=polynomial", "--lr_warmup_steps=4"], r"--lr_warmup_steps 4 .*\(4 steps\)"),
        (
            ["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=4", "--lr_warmup_steps=1"],
            r"--lr_warmup_steps 1 .* --lr_decay_steps 4 .* \(4 steps\)",
        ),
    ],
)
def test_schedule_longer_than_the_training_is_refused(flags, words, plan):
    with pytest.raises(UserError, match=words):
        plan(*flags)


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--lr_scheduler=cosine", "--max_train_steps=101"], True),
        (["--lr_scheduler=cosine", "--max_train_steps=501"], False),
        (["--lr_scheduler=constant", "--max_train_steps=101"], False),
    ],
)
def test_warmup_longer_than_the_training_is_reported_with_the_rate_that_is_reached(flags, warned, plan, caplog):
    PartialState()  # for the log
    plan(*flags)
    assert bool(mentions("--lr_warmup_steps 500", "101 steps", "0.2").search(caplog.text)) is warned


# --- periodic work


def test_work_is_due_periodically_and_after_the_last_step(plan):
    periods = ["--logging_steps=2", "--checkpointing_steps=3", "--validation_steps=4", "--eval_steps=6"]
    due = [plan("--max_train_steps=7", *periods).due_after(step) for step in range(1, 8)]
    names = ("log", "checkpoint", "validation", "metrics")
    steps = {name: [step for step, work in enumerate(due, 1) if getattr(work, name)] for name in names}
    assert steps == {"log": [2, 4, 6, 7], "checkpoint": [3, 6, 7], "validation": [4, 6, 7], "metrics": [6, 7]}
    assert [bool(work) for work in due] == [False, True, True, True, False, True, True]
    assert not any(work.stop for work in due)


def test_stop_saves_a_checkpoint_and_has_no_effect_after_the_last_step(plan):
    result = plan("--max_train_steps=7", "--logging_steps=100")
    due = result.due_after(2, stopping=True)
    assert (due.checkpoint, due.stop, due.validation, due.log, bool(due)) == (True, True, False, False, True)
    last = result.due_after(7, stopping=True)
    assert last.checkpoint and last.validation and not last.stop
    assert not result.due_after(7).metrics  # without --eval_steps


# --- sizes, channels, classes


def test_resolution_is_the_flags_or_the_model_configs(plan):
    assert plan().resolution == (8, 8)
    result = plan("--resolution=16x8")
    assert result.resolution == (16, 8) and result.model_config["sample_size"] == [16, 8]


def test_resolution_not_divisible_by_the_network_is_refused(plan):
    with pytest.raises(UserError, match="--resolution 12x8: .* multiples of 8"):
        plan("--resolution=12x8")


def test_resolution_not_divisible_by_the_vae_is_refused(plan):
    with pytest.raises(UserError, match="--resolution 17x16: .* 2"):
        plan("--resolution=17x16", "--vae_model_name_or_path=vae", vae=VAE)


def test_resolution_of_prepared_latents_is_used(plan):
    flags = ("--vae_model_name_or_path=vae", "--latents_dir=a")
    facts = {"vae": VAE, "prepared_resolution": (16, 16), "num_channels": None}
    result = plan(*flags, **facts)
    assert result.resolution == (16, 16) and result.model_config["sample_size"] == 8
    assert (result.num_channels, result.model_config["in_channels"]) == (3, 4)
    with pytest.raises(UserError, match=r"--resolution \(32, 32\): .*\(16, 16\)"):
        plan(*flags, "--resolution=32", **facts)


@pytest.mark.parametrize(
    ("flags", "facts", "words"),
    [
        (["--model_kwargs", "in_channels=1"], {}, "in_channels 1, .* --num_channels 1"),
        (["--vae_model_name_or_path=vae", "--num_channels=1"], {"vae": VAE}, "--num_channels 1: .* 3"),
        (["--model_kwargs", "num_class_embeds=5"], {}, "num_class_embeds 5, .* 3"),
        (["--class_conditional"], {"class_names": None}, "--class_conditional: the data"),
        (["--num_train_timesteps=20", "--validation_inference_steps=50"], {}, "--validation_inference_steps 50"),
        (
            ["--resolution=8", "--model_kwargs", "sample_size=16"],
            {},
            "--model_kwargs sample_size=16: .* sample_size=8",
        ),
        (
            ["--model_kwargs", "num_augment_labels=4", "--augmentation_probability=0.1"],
            {},
            "=4: .* num_augment_labels=9",
        ),
    ],
)
def test_settings_that_contradict_the_data_are_refused(flags, facts, words, plan):
    with pytest.raises(UserError, match=words):
        plan(*flags, **facts)


def test_model_kwargs_that_fine_tuning_would_ignore_are_refused(plan, tmp_path):
    PartialState()  # for the log
    tiny_unet(num_class_embeds=10).save_pretrained(tmp_path)
    source = f"--pretrained_model_name_or_path={tmp_path}"
    assert plan(source).model_config["num_class_embeds"] == 3
    assert plan(source, "--model_kwargs", "sample_size=[8, 8]", "num_class_embeds=3").model_config["sample_size"] == 8
    with pytest.raises(UserError, match=mentions("--model_kwargs num_class_embeds=10", "num_class_embeds=3")):
        plan(source, "--model_kwargs", "num_class_embeds=10")


def test_channels_and_classes_are_those_of_the_data(plan):
    result = plan(num_channels=4)
    assert (result.model_config["in_channels"], result.model_config["out_channels"]) == (4, 4)
    assert result.num_channels is None  # each image as it is
    assert result.class_names == ("blue", "green", "red") and result.model_config["num_class_embeds"] == 3
    assert plan("--no-class_conditional").model_config["num_class_embeds"] is None


@pytest.mark.parametrize(
    ("pair", "words"),
    [("window_size=0", ["window_size"]), ("norm_num_groups=3", ["norm_num"]), ("mlp_ratio=0", ["mlp_ratio"])],
)
def test_values_refused_by_the_network_name_the_flag(pair, words, plan):
    with pytest.raises(UserError) as error:
        plan("--model_kwargs", pair)
    assert all(word in str(error.value) for word in ("--model_config", *words))


def test_classes_without_an_image_are_reported(train_args, image_folder, tmp_path, caplog):
    """Labels 1 to 3 make an empty class 0."""
    names = [f"{name}/{i}.png" for name in ("blue", "green", "red") for i in range(8)]
    shutil.copytree(image_folder, tmp_path / "data")
    labels = [[name, 1 + number // 8] for number, name in enumerate(names)]
    (tmp_path / "data/dataset.json").write_text(json.dumps({"labels": labels}))
    train([*train_args, f"--train_data_dir={tmp_path / 'data'}", "--max_train_steps=1"])
    assert mentions("1 of 4 classes", "'0'").search(caplog.text)


# --- formulation


def test_finetuning_inherits_the_formulation_of_the_weights(plan, train_args, tmp_path, caplog):
    flags = ["--prediction_type=epsilon", "--beta_schedule=linear", "--num_train_timesteps=500"]
    train([*train_args, *flags, "--max_train_steps=1"])
    for source in ("run", "run/unet", "run/checkpoint-1", "run/checkpoint-1/unet_ema"):
        path = f"--pretrained_model_name_or_path={tmp_path / source}"
        assert plan(path).formulation == DDPM("epsilon", "linear", 500)
    assert "was trained with" not in caplog.text
    assert plan(path, "--prediction_type=v_prediction").formulation.prediction_type == "v_prediction"
    assert "was trained with --prediction_type epsilon" in caplog.text


def test_finetuned_pipeline_has_the_betas_of_its_source(train_args, tmp_path, caplog):
    train([*train_args, "--max_train_steps=1"])
    file = tmp_path / "run/scheduler/scheduler_config.json"
    betas = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | betas))
    again = [flag for flag in train_args if not flag.startswith("--model_config")]
    again += [f"--pretrained_model_name_or_path={tmp_path / 'run'}", f"--output_dir={tmp_path / 'tuned'}"]
    train([*again, "--max_train_steps=1"])
    tuned = json.loads((tmp_path / "tuned/scheduler/scheduler_config.json").read_text())
    assert {name: tuned[name] for name in betas} == betas
    assert mentions(tmp_path / "run", "beta_start 0.00085", "beta_end 0.012").search(caplog.text)
    with pytest.raises(
        UserError, match=mentions("--pretrained_model_name_or_path", "epsilon", "rescale_betas_zero_snr")
    ):
        train([*again, "--prediction_type=epsilon", f"--output_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize(("num_channels", "warned"), [(None, True), (1, False)])
def test_colors_that_the_vae_drops_are_reported(num_channels, warned, image_folder, caplog):
    PartialState()  # for the log
    facts = describe_data(load_table(image_folder), tiny_vae(in_channels=1, out_channels=1), num_channels)
    assert facts.num_channels == 1
    assert bool(mentions(image_folder, "VAE (1)", "colors").search(caplog.text)) is warned


def test_resolved_flags_hold_the_derived_values(plan):
    flags = plan("--formulation=edm", "--resolution=16x8", "--lr_warmup_steps=2").resolved_flags()
    assert flags == {
        "formulation": "edm",
        "sigma_mean": EDM.sigma_mean,
        "sigma_std": EDM.sigma_std,
        "resolution": [16, 8],
        "num_channels": None,
        "global_batch_size": 4,
        "lr_warmup_steps": 2,
    }
