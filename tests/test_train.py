"""The training script: flags, loss, resume, what it writes."""

import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import ROOT, TINY_CONFIG, plain_loop, relative_differences, run, start, train
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import SchedulerType
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import train_diffit
from diffit.batches import batch_labels
from diffit.checkpoint import file_digest, save_checkpoint, verify_checkpoint
from diffit.config import build_parser
from diffit.decode import normalize_pixels
from diffit.formulations import build_noise_levels, compute_loss
from diffit.networks import set_up_model
from diffit.optimization import build_lr_scheduler
from diffit.plan import build_tables, resolve_diffusion, resolve_duration
from diffit.run_dir import OutputFolder, list_checkpoints
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream, split_table
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline

QUICKSTART = ["--config", str(ROOT / "configs/train/quickstart.yaml")]


def refusal(arguments: list[str], capsys) -> str:
    """What the parser says about wrong arguments."""
    with pytest.raises(SystemExit) as error:
        train_diffit.parse_args(arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


def logged(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "logs" / "train_diffit"), size_guidance={"scalars": 0})
    return events.Reload()


def losses(run_dir: Path) -> list[float]:
    return [event.value for event in logged(run_dir).Scalars("train/loss")]


def assert_same_files(first: Path, second: Path, names: list[str]) -> None:
    """Bitwise equal tensors in files of two checkpoints."""
    for name in names:
        if name.endswith(".pt"):
            a, b = (torch.load(path / name, weights_only=True) for path in (first, second))
            a, b = ({(i, k): v for i, s in x["state"].items() for k, v in s.items()} for x in (a, b))
        else:
            a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys() and len(a) > 0
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"


STATES = [f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "unet_ema")] + ["optimizer.pt"]


# --- flags


def test_misspelt_flag_is_named(capsys):
    assert "--learning_rat" in refusal([*QUICKSTART, "--learning_rat", "1"], capsys)


def test_misspelt_flag_is_refused_before_data_or_models_are_touched(tmp_path):
    absent = [f"--{name}={tmp_path}/absent" for name in ("model_config", "train_data_dir")]
    flags = [*absent, "--max_train_steps=1", f"--output_dir={tmp_path}/run", "--learning_rat=1"]
    process = start(["train_diffit.py", *flags])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "unrecognized arguments: --learning_rat=1" in output
    assert not list(tmp_path.iterdir())


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
def test_wrong_config_file_is_refused(line, words, tmp_path, capsys):
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
        (["--mixed_precision=fp16"], ["--mixed_precision fp16", "bf16"]),
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
def test_wrong_command_line_is_refused(arguments, words, capsys):
    message = refusal([*QUICKSTART, *arguments], capsys)
    assert all(word in message for word in words), message


def test_order_is_defaults_config_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model_config: a.json\ntrain_data_dir: b\nmax_train_steps: 5\nlearning_rate: 1e-5\nuse_ema: false\n"
        "model_kwargs:\n  dropout: 0.1\n  block_out_channels: [8, 16]\n"
    )
    args = train_diffit.parse_args(["--config", str(file), "--max_train_steps=7", "--model_kwargs", "dropout=0.2"])
    assert (args.max_train_steps, args.learning_rate, args.use_ema, args.adam_beta1) == (7, 1e-5, False, 0.9)
    assert args.model_kwargs == ["dropout=0.1", "block_out_channels=[8, 16]", "dropout=0.2"]


def test_alternative_on_the_command_line_replaces_that_of_the_config(tmp_path):
    args = train_diffit.parse_args(
        [*QUICKSTART, "--train_data_dir=mine", "--pretrained_model_name_or_path=a", "--global_batch_size=128"]
    )
    assert (args.train_data_dir, args.train_data_file) == ("mine", None)
    assert (args.pretrained_model_name_or_path, args.model_config) == ("a", None)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(["--num_train_epochs=2.5"], 15), (["--max_train_kimg=0.03"], 8), (["--max_train_steps=3"], 3)],
)
def test_duration_becomes_steps(duration, steps):
    base = ["--model_config=a.json", "--train_data_dir=b"]
    args = train_diffit.parse_args(base + duration)
    args.global_batch_size = 4
    resolve_duration(args, num_images=24)
    assert args.max_train_steps == steps


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("window=4", ["'window'", "did you mean"]),
        ("window_size=0", ["window_size"]),
        ("norm_num_groups=3", ["norm_num"]),
        ("dropout=high", ["dropout", "'high'"]),
        ("block_out_channels=8", ["block_out_channels", "8"]),
        ("layers_per_block=1.5", ["layers_per_block", "1.5"]),
        ("mlp_ratio=true", ["mlp_ratio", "True"]),
    ],
)
def test_wrong_model_kwargs_are_refused(pair, words, train_args):
    with pytest.raises(ValueError) as error:
        train([*train_args, "--model_kwargs", pair])
    assert all(word in str(error.value) for word in words)


def test_scientific_numbers_of_model_kwargs_are_numbers(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1", "--model_kwargs", "norm_eps=1e-6", "time_embedding_dim=24"])
    config = json.loads((tmp_path / "run/unet/config.json").read_text())
    assert (config["norm_eps"], config["time_embedding_dim"]) == (1e-6, 24)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_config=nowhere.json"], "--model_config nowhere.json"),
        (["--model_config=no/where"], "--model_config no/where"),
        (["--num_train_timesteps=20", "--validation_inference_steps=50"], "--validation_inference_steps 50"),
        (["--lr_scheduler=polynomial", "--lr_warmup_steps=4"], "--lr_warmup_steps 4"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(flags, words, train_args, tmp_path):
    with pytest.raises(ValueError, match=words):
        train([*train_args, *flags])
    assert not (tmp_path / "run").exists()


def test_validation_classes_are_matched_by_name(train_args, image_folder, tmp_path):
    """A split that lacks a class must not number its classes anew."""
    from datasets import Dataset

    from diffit.sources import load_image_table

    table = load_image_table(train_data_dir=str(image_folder))
    rows = [{"image": {"bytes": table.read(i)[1]}, "kind": table.class_names[table.label(i)]} for i in range(24)]
    training = Dataset.from_list(rows)
    held_out = Dataset.from_list([row for row in rows if row["kind"] != "blue"])
    (tmp_path / "data").mkdir()
    for name, split in (("train", training), ("validation", held_out)):
        split.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    arguments = [flag for flag in train_args if not flag.startswith("--train_data_dir")]
    arguments += [f"--dataset_name={tmp_path / 'data'}", "--image_column=image", "--label_column=kind"]
    args = train_diffit.parse_args([*arguments, "--validation_split=validation"])
    table, validation = build_tables(args)
    assert table.class_names == validation.class_names == ("blue", "green", "red")
    assert sorted(set(validation.labels)) == [1, 2]


def test_global_batch_that_does_not_divide_is_refused(train_args):
    with pytest.raises(ValueError, match="--global_batch_size 10"):
        train([*train_args, "--global_batch_size=10"])


def test_world_size_without_a_launcher_is_refused(train_args, monkeypatch):
    # accelerate would take one process for the only one: rank 0 of 1, twice.
    monkeypatch.setattr("diffit.processes.PartialState", lambda **kwargs: PartialState(cpu=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        train(train_args)


def test_labels_that_are_missing_are_refused(train_args, image_folder):
    with pytest.raises(ValueError, match="--class_conditional"):
        train([*train_args, f"--train_data_dir={image_folder / 'red'}"])


def test_channels_that_differ_from_the_config_are_refused(train_args):
    with pytest.raises(ValueError, match="--num_channels 1"):
        train([*train_args, "--model_kwargs", "in_channels=1"])


def test_dry_run_prints_sizes_and_writes_nothing(train_args, capsys, tmp_path):
    train([*train_args, "--dry_run"])
    printed = yaml.safe_load(capsys.readouterr().out)
    model = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3)
    assert printed["parameters"] == sum(p.numel() for p in model.parameters())
    assert printed["training_flops_per_image"] > 6 * 64 * 8 * 8 * 9  # more than one convolution
    assert (printed["learning_rate"], printed["global_batch_size"]) == (1e-3, 4)
    assert not (tmp_path / "run").exists()


def test_resolution_that_the_network_cannot_divide_is_refused(train_args):
    with pytest.raises(ValueError, match="--resolution 12x8: .* multiples of 8"):
        train([*train_args, "--resolution=12x8"])


def test_fp16_of_the_launcher_is_refused_on_a_cpu(train_args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16"):
        train(train_args)


# --- loss


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_loss_equals_its_formula(prediction_type, snr_gamma):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise, prediction = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64).unbind()
    timesteps = torch.tensor([0, 10, 500, 999])
    loss = compute_loss(prediction, scheduler, clean, noise, timesteps, snr_gamma)
    for i, t in enumerate(timesteps):
        a = scheduler.alphas_cumprod[t].double()
        target = {
            "epsilon": noise[i],
            "sample": clean[i],
            "v_prediction": a.sqrt() * noise[i] - (1 - a).sqrt() * clean[i],
        }
        snr = a / (1 - a)
        cap = snr if snr_gamma is None else min(snr, torch.tensor(snr_gamma))
        weight = {"epsilon": cap / snr, "sample": cap, "v_prediction": cap / (snr + 1)}[prediction_type]
        weight = 1.0 if snr_gamma is None else weight
        expected = weight * (prediction[i] - target[prediction_type]).pow(2).mean()
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-4, atol=1e-6)


def test_timesteps_cover_the_range_evenly():
    uniform = (torch.arange(4000) + 0.5) / 4000
    timesteps = build_noise_levels(uniform, DDPMScheduler())
    assert timesteps.bincount(minlength=1000).tolist() == [4] * 1000


def test_label_dropout_takes_the_null_class():
    batch = {"class_labels": torch.tensor([1, 2, 3]), "dropout_uniform": torch.tensor([0.05, 0.5, 0.09])}
    assert batch_labels(batch, 0.1, null=7).tolist() == [7, 2, 7]
    assert batch_labels(batch, 0.1, null=None) is None


# --- a run equals a plain loop, and what it writes


def test_training_equals_a_plain_loop(train_args, image_folder, tmp_path):
    """A loop without accelerate, data loader or our loss: a wrong gradient average cannot hide."""
    train([*train_args, "--global_batch_size=8", "--max_train_steps=3", "--label_dropout=0.3", "--num_channels=3"])
    model, expected = plain_loop(image_folder, [0, 8, 16], 8, label_dropout=0.3)
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)
    trained = load_file(tmp_path / "run/checkpoint-3/unet/diffusion_pytorch_model.safetensors")
    differences = relative_differences(trained, dict(model.named_parameters()))
    assert max(differences.values()) < 1e-5, differences


class ReadCounter(TorchDispatchMode):
    """Counts what makes the host wait for a device: tensors read as numbers, and sizes that depend on values."""

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waits
        return function(*args, **(kwargs or {}))


def test_loop_waits_for_no_device_between_logs(train_args):
    """Each step reads two numbers that lie on the host: its position, and whether the step before was taken."""
    counts = []
    for num_steps in (2, 6):  # one log each, at the end
        flags = [f"--max_train_steps={num_steps}", "--logging_steps=100", "--overwrite_output_dir"]
        with ReadCounter() as counter:
            train([*train_args, "--no-class_conditional", *flags])
        counts.append(counter.count)
    assert counts[1] - counts[0] == 4 * 2


@pytest.fixture(scope="module")
def finished_run(base_args, tmp_path_factory) -> Path:
    """A class-conditional run with everything on, and what it left."""
    run_dir = tmp_path_factory.mktemp("finished")
    train(
        [
            *base_args,
            f"--output_dir={run_dir}",
            "--max_train_steps=6",
            "--lr_warmup_steps=0",
            "--checkpointing_steps=2",
            "--checkpoints_total_limit=2",
            "--validation_steps=3",
            "--validation_fraction=0.25",
            "--num_validation_images=6",
            "--validation_inference_steps=2",
            "--validation_guidance_scale=1.5",
            "--logging_steps=2",
            "--hub_token=hf_secret",
        ]
    )
    return run_dir


def test_folder_has_the_layout_of_diffusers(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"model_index.json", "unet", "scheduler", "README.md", "training_args.yaml", "sample_grid.png"} <= names
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}
    assert not [name for name in names if name.startswith("tmp")]


def test_pipeline_folder_holds_the_ema_weights(finished_run):
    name = "diffusion_pytorch_model.safetensors"
    final = load_file(finished_run / "unet" / name)
    ema, raw = (load_file(finished_run / "checkpoint-6" / folder / name) for folder in ("unet_ema", "unet"))
    assert all(torch.equal(final[key], ema[key]) for key in final)
    assert any(not torch.equal(ema[key], raw[key]) for key in raw)


def test_tensorboard_has_all_numbers(finished_run):
    events = logged(finished_run)
    tags = events.Tags()
    expected = ["loss", "grad_norm", "learning_rate", "ema_decay", "images_per_second", "peak_memory_gib", "kimg"]
    assert {f"train/{name}" for name in expected} <= set(tags["scalars"])
    assert {f"validation/loss_quartile_{i}" for i in (1, 2, 3, 4)} <= set(tags["scalars"])
    assert any(tag.startswith("train/loss_quartile_") for tag in tags["scalars"])
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(1e-3)


def test_previews_are_written_as_png(finished_run):
    assert sorted(path.name for path in (finished_run / "previews").iterdir()) == [
        "step_00000003.png",
        "step_00000006.png",
    ]
    assert PIL.Image.open(finished_run / "previews/step_00000006.png").size == (
        3 * 34,
        2 * 34,
    )  # enlarged, with a border


def test_token_is_written_nowhere(finished_run):
    files = [path for path in finished_run.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_model_card_says_what_and_how(finished_run):
    card = (finished_run / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "diffusers" and "diffit" in header["tags"]
    for words in ("18 images", "blue, green, red", "trust_remote_code=True", "sample_grid.png", "6 of 6"):
        assert words in card


def test_saved_arguments_are_a_config_of_the_same_run(train_args, tmp_path):
    flags = ["--num_train_epochs=0.5", "--global_batch_size=8", "--resolution=8x8", "--model_kwargs"]
    kept = [flag for flag in train_args if not flag.startswith("--max_train_steps")]
    train([*kept, *flags, "dropout=0.1", "layers_per_block=[1, 2]"])
    first = yaml.safe_load((tmp_path / "run/training_args.yaml").read_text())
    again = ["--config", str(tmp_path / "run/training_args.yaml"), f"--output_dir={tmp_path / 'again'}"]
    train(again)
    second = yaml.safe_load((tmp_path / "again/training_args.yaml").read_text())
    assert first | {"output_dir": 0} == second | {"output_dir": 0}
    assert first["model_kwargs"] == {"dropout": 0.1, "layers_per_block": [1, 2]}
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_class_conditional_folder_loads_as_our_pipeline_without_this_repository(finished_run, tmp_path):
    script = (
        "import sys\n"
        "from diffusers import AutoModel, DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(finished_run)!r}, trust_remote_code=True)\n"
        "assert type(pipe).__name__ == 'DiffiTPipeline', type(pipe)\n"
        "images = pipe(class_labels=['red', 2], num_inference_steps=2, guidance_scale=2.0).images\n"
        "assert images[0].size == (8, 8)\n"
        f"pipe.save_pretrained({str(tmp_path / 'again')!r})\n"
        f"again = DiffusionPipeline.from_pretrained({str(tmp_path / 'again')!r}, trust_remote_code=True)\n"
        "assert type(again).__name__ == 'DiffiTPipeline'\n"
        "assert again.label_ids('red') == pipe.label_ids('red') == [2]\n"
        f"unet = AutoModel.from_pretrained({str(finished_run / 'unet')!r}, trust_remote_code=True)\n"
        "assert type(unet).__name__ == 'DiffiTUNet2DModel'\n"
        f"DiffusionPipeline.from_pretrained({str(finished_run)!r}, unet=unet, trust_remote_code=True)\n"
        "assert 'train_diffit' not in sys.modules\n"
    )
    run(["-c", script], cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))


def test_unconditional_folder_loads_as_a_plain_ddpm_pipeline(train_args, tmp_path):
    train([*train_args, "--no-class_conditional", "--max_train_steps=2"])
    script = (
        "from diffusers import DDPMPipeline, DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'run')!r}, trust_remote_code=True)\n"
        "assert type(pipe) is DDPMPipeline, type(pipe)\n"
        "assert pipe(batch_size=2, num_inference_steps=2).images[1].size == (8, 8)\n"
    )
    run(["-c", script], cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert type(DDPMPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True)) is DDPMPipeline


def test_peer_trains_under_the_same_recipe(train_args, tmp_path):
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    file = tmp_path / "peer.json"
    file.write_text(json.dumps(config))
    train([*train_args, f"--model_config={file}", "--max_train_steps=2", "--validation_guidance_scale=2"])
    pipe = DiffiTPipeline.from_folder(str(tmp_path / "run"), lambda config: getattr(diffusers, config["_class_name"]))
    assert type(pipe.unet) is UNet2DModel
    assert pipe.unet.config.num_class_embeds == 4  # three classes and the null class


def test_validation_loss_is_the_same_each_time(train_args, tmp_path):
    """Fixed images, timesteps and noise: with a learning rate of 0 nothing moves."""
    train([*train_args, "--learning_rate=0", "--validation_steps=2", "--validation_fraction=0.25"])
    values = [event.value for event in logged(tmp_path / "run").Scalars("validation/loss")]
    assert len(values) == 2 and values[0] == values[1]


@pytest.mark.parametrize("gamma", [0, 5])
def test_validation_loss_has_the_weights_of_the_training_loss(gamma, train_args, image_folder, tmp_path):
    """A network that predicts 0 has the loss w * v^2, with the min-SNR weight w of the training."""
    flags = ["--max_train_steps=1", "--learning_rate=0", "--validation_fraction=0.25", f"--snr_gamma={gamma}"]
    flags += ["--model_kwargs", "zero_init_output=true"]
    train([*train_args, *flags])
    _, held_out = split_table(load_image_table(train_data_dir=str(image_folder)), 0.25)
    dataset = ImageDataset(held_out, PositionStream(6, seed=0), (8, 8), 3, center_crop=True)
    items = [dataset[(p, dataset.stream.index(p))] for p in range(6)]
    clean = normalize_pixels(torch.stack([item["pixel_values"] for item in items]))
    noise = torch.stack([item["noise"] for item in items])
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    timesteps = ((torch.arange(6) + 0.5) / 6 * 1000).long()
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / (snr + 1) if gamma else torch.ones(6)
    velocities = scheduler.get_velocity(clean, noise, timesteps).square().mean(dim=(1, 2, 3))
    logged_loss = logged(tmp_path / "run").Scalars("validation/loss")[0].value
    assert logged_loss == pytest.approx((weights * velocities).mean().item(), rel=1e-5)


def test_bad_image_stops_training_by_name_or_is_skipped(train_args, image_folder, tmp_path, caplog):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    arguments = [*train_args, f"--train_data_dir={folder}", "--max_train_steps=7"]
    with pytest.raises(ValueError, match="broken.png"):
        train(arguments)
    train([*arguments, "--on_bad_image=skip", "--overwrite_output_dir"])
    assert "broken.png" in caplog.text
    assert logged(tmp_path / "run").Scalars("train/bad_images")[-1].value == 1


def test_out_of_memory_names_the_flags_that_help():
    message = train_diffit.explain_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert "--train_batch_size" in message and "--gradient_checkpointing" in message
    assert train_diffit.explain_out_of_memory(ValueError("something else")) is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision=bf16", "--gradient_checkpointing"],
        ["--prediction_type=epsilon", "--beta_schedule=linear", "--snr_gamma=5"],
        ["--snr_gamma=0"],
        ["--no-use_ema", "--deterministic", "--allow_tf32", "--lr_scheduler=cosine"],
        ["--resolution=8x16", "--center_crop", "--random_flip", "--num_channels=1", "--report_to=none"],
    ],
)
def test_flags_train_to_a_finite_loss(flags, train_args, tmp_path):
    train([*train_args, "--max_train_steps=2", *flags])
    weights = load_file(tmp_path / "run/unet/diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture(autouse=True)
def deterministic_off():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_lr_schedule_steps_once_per_update(name):
    arguments = ["--model_config=a", "--train_data_dir=b", "--max_train_steps=10", f"--lr_scheduler={name}"]
    args = train_diffit.parse_args([*arguments, "--lr_warmup_steps=2", "--lr_step_rules=1:5,0.1"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert max(rates) == 1.0
    assert (
        rates[9]
        == {
            "constant": 1.0,
            "constant_with_warmup": 1.0,
            "piecewise_constant": pytest.approx(0.1),
            "linear": pytest.approx(1 / 8),
            "polynomial": pytest.approx(1 / 8, abs=1e-5),
            "cosine": pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8))),
            "cosine_with_restarts": pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8))),
        }[name]
    )


def test_overwriting_deletes_only_what_a_run_wrote(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    for name in ("logs/other_run/events", "notes.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("keep")
    train([*train_args, "--max_train_steps=2", "--overwrite_output_dir"])
    assert (tmp_path / "run/logs/other_run/events").is_file() and (tmp_path / "run/notes.txt").is_file()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}


def test_bad_validation_image_is_reported(train_args, image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "data")
    for file in (tmp_path / "data").rglob("[01].png"):
        file.write_bytes(b"no image")
    arguments = [*train_args, f"--train_data_dir={tmp_path / 'data'}", "--on_bad_image=skip", "--num_channels=3"]
    train([*arguments, "--validation_fraction=0.8", "--max_train_steps=1"])
    held_out = build_tables(train_diffit.parse_args([*arguments, "--validation_fraction=0.8"]))[1]
    bad = [held_out.read(i)[0] for i in range(len(held_out)) if held_out.read(i)[1] == b"no image"]
    assert bad and all(name in caplog.text for name in bad)


# --- fine-tuning


def test_finetuning_takes_over_what_the_weights_predict(train_args, tmp_path, caplog):
    flags = ["--prediction_type=epsilon", "--beta_schedule=linear", "--num_train_timesteps=500"]
    train([*train_args, *flags, "--max_train_steps=1"])
    arguments = [flag for flag in train_args if not flag.startswith(("--model_config", "--max_train_steps"))]
    for source in ("run", "run/unet", "run/checkpoint-1", "run/checkpoint-1/unet_ema"):
        path = f"--pretrained_model_name_or_path={tmp_path / source}"
        args = train_diffit.parse_args([*arguments, "--max_train_steps=1", path])
        resolve_diffusion(args)
        resolved = (args.prediction_type, args.beta_schedule, args.num_train_timesteps)
        assert resolved == ("epsilon", "linear", 500) and args.snr_gamma is None
    args = train_diffit.parse_args([*arguments, "--max_train_steps=1", path, "--prediction_type=v_prediction"])
    resolve_diffusion(args)
    assert args.prediction_type == "v_prediction" and "was trained with --prediction_type epsilon" in caplog.text


def test_finetuning_keeps_weights_and_renews_class_rows_only(finished_run, train_args, image_folder, tmp_path, caplog):
    folder = tmp_path / "two_classes"
    for name in ("red", "green"):
        shutil.copytree(image_folder / name, folder / name)
    arguments = [argument for argument in train_args if not argument.startswith("--model_config")]
    train(
        [
            *arguments,
            f"--pretrained_model_name_or_path={finished_run}",
            f"--train_data_dir={folder}",
            "--learning_rate=0",
            "--max_train_steps=1",
        ]
    )
    assert "2 class embeddings re-initialized, null class kept" in caplog.text
    name = "diffusion_pytorch_model.safetensors"
    old, new = load_file(finished_run / "unet" / name), load_file(tmp_path / "run/unet" / name)
    rows = "class_embedding.weight"
    assert all(torch.equal(old[key], new[key]) for key in old if key != rows)
    assert new[rows].shape[0] == 3 and torch.equal(new[rows][2], old[rows][3])  # the null row stays


def test_finetuning_with_weights_that_do_not_fit_lists_them(finished_run, train_args):
    arguments = [argument for argument in train_args if not argument.startswith("--model_config")]
    with pytest.raises(ValueError, match="conv_in.weight"):
        train(
            [
                *arguments,
                f"--pretrained_model_name_or_path={finished_run}",
                "--num_channels=1",
                "--model_kwargs",
                "in_channels=1",
                "out_channels=1",
            ]
        )


# --- resume


def test_used_output_dir_is_refused_without_a_flag(finished_run, train_args):
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        train([*train_args, f"--output_dir={finished_run}"])


def test_latest_on_an_empty_folder_starts_afresh(train_args, tmp_path):
    train([*train_args, "--resume_from_checkpoint=latest", "--max_train_steps=1"])
    assert (tmp_path / "run/checkpoint-1").is_dir()


def test_path_that_is_no_checkpoint_is_refused(train_args, tmp_path):
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        train([*train_args, f"--resume_from_checkpoint={tmp_path}"])


def test_other_seed_batch_or_data_at_resume_is_refused(train_args, image_folder):
    train([*train_args, "--max_train_steps=1"])
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        train([*train_args, "--resume_from_checkpoint=latest", "--seed=1"])
    with pytest.raises(ValueError, match="--global_batch_size 4, not 8"):
        train([*train_args, "--resume_from_checkpoint=latest", "--global_batch_size=8"])
    with pytest.raises(ValueError, match="--learning_rate 0.001, not 0.005"):
        train([*train_args, "--resume_from_checkpoint=latest", "--learning_rate=5e-3"])
    with pytest.raises(ValueError, match="--use_ema True, not False"):
        train([*train_args, "--resume_from_checkpoint=latest", "--no-use_ema"])
    with pytest.raises(ValueError, match="--optimizer adamw, not muon"):
        train([*train_args, "--resume_from_checkpoint=latest", "--optimizer=muon"])
    with pytest.raises(ValueError, match="a network whose layers_per_block is 1, not 2"):
        train([*train_args, "--resume_from_checkpoint=latest", "--model_kwargs", "layers_per_block=2"])
    with pytest.raises(ValueError, match="24 images, the data has 18"):
        train([*train_args, "--resume_from_checkpoint=latest", "--validation_fraction=0.25"])


@pytest.mark.parametrize(("accumulation", "optimizer"), [(1, "adamw"), (2, "adamw"), (2, "muon")])
def test_killed_and_resumed_run_is_bitwise_the_uninterrupted_one(accumulation, optimizer, train_args, tmp_path):
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
    process = start(["train_diffit.py", *arguments, f"--output_dir={killed}", *slow])
    while not (killed / f"checkpoint-{saved}").is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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


@pytest.fixture
def two_checkpoints(train_args, tmp_path) -> tuple[list[str], Path]:
    arguments = [*train_args, "--checkpointing_steps=2", "--resume_from_checkpoint=latest"]
    train(arguments)
    return arguments, tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_latest_passes_over_a_damaged_checkpoint_and_says_so(damage, two_checkpoints, caplog):
    arguments, run_dir = two_checkpoints
    file = run_dir / "checkpoint-4" / ("manifest.json" if damage == "manifest" else "optimizer.pt")
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=file.name):
        train([*arguments, f"--resume_from_checkpoint={run_dir / 'checkpoint-4'}"])
    train([*arguments, "--max_train_steps=5"])
    assert "passing over" in caplog.text and file.name in caplog.text
    assert "resumed from" in caplog.text and "at step 2" in caplog.text
    assert verify_checkpoint(run_dir / "checkpoint-5") is None


def test_going_back_moves_later_checkpoints_aside(two_checkpoints, caplog):
    """Or `latest` would mean the branch that was left, and pruning would delete the new one."""
    arguments, run_dir = two_checkpoints
    flags = ["--checkpoints_total_limit=1", "--max_train_steps=3"]
    train([*arguments, f"--resume_from_checkpoint={run_dir / 'checkpoint-2'}", *flags])
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3"]
    assert len(list(run_dir.glob("superseded-*-checkpoint-4"))) == 1 and "checkpoint-4 is now" in caplog.text


def test_pruning_never_prefers_a_damaged_checkpoint_to_the_new_one(two_checkpoints):
    arguments, run_dir = two_checkpoints
    (run_dir / "checkpoint-4/optimizer.pt").write_bytes(b"")
    train([*arguments, "--checkpoints_total_limit=1", "--max_train_steps=3"])
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3", "checkpoint-4"]
    assert verify_checkpoint(run_dir / "checkpoint-3") is None


def test_finished_run_writes_a_pipeline_that_was_cut_off(two_checkpoints):
    arguments, run_dir = two_checkpoints
    shutil.rmtree(run_dir / "unet")
    (run_dir / "model_index.json").unlink()
    train(arguments)
    assert (run_dir / "model_index.json").is_file() and (run_dir / "unet/config.json").is_file()


def test_only_damaged_checkpoints_are_an_error_and_stay(two_checkpoints):
    arguments, run_dir = two_checkpoints
    for step in (2, 4):
        (run_dir / f"checkpoint-{step}" / "state.json").unlink()
    with pytest.raises(ValueError, match="all checkpoints .* are damaged"):
        train(arguments)
    assert (run_dir / "checkpoint-2/optimizer.pt").is_file()


def test_unfinished_checkpoint_of_a_killed_run_is_ignored_and_removed(two_checkpoints):
    arguments, run_dir = two_checkpoints
    OutputFolder(run_dir, "train_diffit.py").announce(["tmp-checkpoint-6/"])
    (run_dir / "tmp-checkpoint-6").mkdir()
    train([*arguments, "--max_train_steps=5"])
    assert not (run_dir / "tmp-checkpoint-6").exists()


def test_full_disk_keeps_the_checkpoint_before_and_says_so(train_args, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here (it needs root)")
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-\d+ could not be written .* the last one there is check"):
            train([*train_args, f"--output_dir={disk}", "--checkpointing_steps=1", "--max_train_steps=20"])
        assert not list(disk.glob("tmp-*"))
        assert all(verify_checkpoint(path) is None for path in list_checkpoints(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lost_permission_keeps_the_checkpoint_before_and_says_so(train_args, tmp_path, monkeypatch):
    """The disk becomes read-only after the first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("a disk of its own cannot be mounted here (it needs root)")
    original = save_checkpoint

    def save_once(*arguments):
        original(*arguments)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    monkeypatch.setattr(train_diffit, "save_checkpoint", save_once)
    monkeypatch.setattr(train_diffit, "log_metrics", lambda *arguments: None)  # TensorBoard holds a file open
    try:
        flags = [f"--output_dir={disk}", "--checkpointing_steps=1", "--report_to=none"]
        with pytest.raises(RuntimeError, match="checkpoint-2 could not be written .*ead-only.* there is checkpoint-1"):
            train([*train_args, *flags])
        assert verify_checkpoint(disk / "checkpoint-1") is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_checkpoint_that_cannot_be_pruned_is_no_reason_to_stop(train_args, tmp_path, caplog):
    """A link to another disk is not deleted."""
    train([*train_args, "--max_train_steps=2"])
    (tmp_path / "run/checkpoint-2").rename(tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-2").symlink_to(tmp_path / "elsewhere")
    train([*train_args, "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"])
    assert "cannot delete" in caplog.text and "checkpoint-2" in caplog.text
    assert verify_checkpoint(tmp_path / "run/checkpoint-4") is None


def test_folders_that_cannot_be_synchronised_are_no_reason_to_stop(train_args, tmp_path, monkeypatch):
    """As on some network file systems."""
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    train([*train_args, "--max_train_steps=1"])
    assert verify_checkpoint(tmp_path / "run/checkpoint-1") is None


def test_other_images_or_another_network_are_refused_at_a_resume(train_args, image_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    arguments = [*train_args, f"--train_data_dir={folder}"]
    train([*arguments, "--max_train_steps=1"])
    with pytest.raises(ValueError, match="dropout is 0.0, not 0.5"):
        train([*arguments, "--resume_from_checkpoint=latest", "--model_kwargs", "dropout=0.5"])
    (folder / "red/0.png").write_bytes((folder / "blue/0.png").read_bytes())
    with pytest.raises(ValueError, match="was trained on other images"):
        train([*arguments, "--resume_from_checkpoint=latest"])


def test_checkpoint_from_before_a_flag_resumes_with_what_was_meant_then(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    checkpoint = tmp_path / "run/checkpoint-1"
    file, manifest = checkpoint / "training_args.yaml", checkpoint / "manifest.json"
    flags = yaml.safe_load(file.read_text())
    del flags["optimizer"], flags["muon_lr_ratio"]
    file.write_text(yaml.safe_dump(flags))
    digests = json.loads(manifest.read_text()) | {file.name: file_digest(file)}
    manifest.write_text(json.dumps(digests))
    arguments = [*train_args, "--resume_from_checkpoint=latest", "--max_train_steps=2"]
    with pytest.raises(ValueError, match="was trained with --optimizer adamw, not muon"):
        train([*arguments, "--optimizer=muon"])
    train([*arguments, "--muon_lr_ratio=2"])  # which says nothing to AdamW
    assert (tmp_path / "run/checkpoint-2").is_dir()


def test_manifest_that_names_too_little_is_damage(two_checkpoints):
    arguments, run_dir = two_checkpoints
    (run_dir / "checkpoint-4/manifest.json").write_text("{}")
    assert "does not name optimizer.pt" in verify_checkpoint(run_dir / "checkpoint-4")


def test_tensorboard_steps_after_the_checkpoint_are_purged(train_args, tmp_path):
    train([*train_args, "--max_train_steps=4", "--checkpointing_steps=2"])
    checkpoint = tmp_path / "run/checkpoint-2"
    train([*train_args, f"--resume_from_checkpoint={checkpoint}", "--max_train_steps=4"])
    steps = [event.step for event in logged(tmp_path / "run").Scalars("train/loss")]
    assert steps == [1, 2, 3, 4]


def test_flex_where_it_cannot_train_is_refused():
    args = build_parser().parse_args(["--attention_backend", "flex"])
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    with pytest.raises(ValueError, match="--attention_backend flex cannot train on the device cpu.*use native"):
        set_up_model(accelerator, args, torch.nn.Linear(1, 1))
