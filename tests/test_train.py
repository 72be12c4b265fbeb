"""The training script: flags, a run against a plain loop, its output, and fine-tuning."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train_diffit
from diffit.batches import batch_labels, open_tables
from diffit.config import parse_args
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import TINY_CONFIG, logged, losses, mentions, plain_loop, relative_differences, run, train

# --- what is refused, and what is printed, before the training


def test_validation_classes_are_matched_by_name(train_args, image_folder, tmp_path):
    """A split that lacks a class must not renumber its classes."""
    from datasets import Dataset

    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    rows = [{"image": {"bytes": table.read(i)[1]}, "kind": table.class_names[table.label(i)]} for i in range(24)]
    training = Dataset.from_list(rows)
    held_out = Dataset.from_list([row for row in rows if row["kind"] != "blue"])
    (tmp_path / "data").mkdir()
    for name, split in (("train", training), ("validation", held_out)):
        split.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    arguments = [flag for flag in train_args if not flag.startswith("--train_data_dir")]
    arguments += [f"--dataset_name={tmp_path / 'data'}", "--image_column=image", "--label_column=kind"]
    config = parse_args([*arguments, "--validation_split=validation"])
    table, validation = open_tables(config.data, config.validation)
    assert table.class_names == validation.class_names == ("blue", "green", "red")
    assert sorted(set(validation.labels)) == [1, 2]


def test_world_size_without_a_launcher_is_refused(train_args, monkeypatch):
    # accelerate would take one process for the only one: rank 0 of 1, twice.
    monkeypatch.setattr("diffit.processes.PartialState", lambda **kwargs: PartialState(cpu=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        train(train_args)


def test_dry_run_prints_sizes_and_writes_nothing(train_args, capsys, caplog, tmp_path):
    train([*train_args, "--dry_run"])
    printed = yaml.safe_load(capsys.readouterr().out)
    model = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3)
    assert printed["parameters"] == sum(p.numel() for p in model.parameters())
    assert printed["training_flops_per_image"] > 6 * 64 * 8 * 8 * 9  # more than one convolution
    assert (printed["learning_rate"], printed["global_batch_size"]) == (1e-3, 4)
    assert printed["dataloader_num_workers"] == printed["dataloader_num_workers_resolved"] == 0
    assert not (tmp_path / "run").exists()
    assert mentions("24 images", "4 x 1 processes x 1").search(caplog.text)


def test_dry_run_shows_the_workers_that_the_machine_allows(train_args, capsys, caplog, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3, 4})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    arguments = [flag for flag in train_args if not flag.startswith("--dataloader_num_workers")]
    train_diffit.main(parse_args([*arguments, "--dry_run"]))
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["dataloader_num_workers_resolved"] == 5 and "dataloader_num_workers" not in printed
    assert mentions("5 data-loader workers").search(caplog.text)


def test_fp16_is_refused_on_a_cpu(train_args):
    with pytest.raises(ValueError, match="--mixed_precision fp16 .* bf16"):
        train([*train_args, "--mixed_precision=fp16"])


def test_fp16_of_the_launcher_is_refused_on_a_cpu(train_args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16"):
        train(train_args)


# --- batches


def test_label_dropout_takes_the_null_class():
    batch = {"class_labels": torch.tensor([1, 2, 3]), "dropout_uniform": torch.tensor([0.05, 0.5, 0.09])}
    assert batch_labels(batch, 0.1, null=7).tolist() == [7, 2, 7]


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
    """Counts host-device synchronizations: tensors read as numbers, and sizes that depend on values."""

    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waits
        return function(*args, **(kwargs or {}))


def test_loop_never_waits_for_the_device_between_logs(train_args):
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
    """The folder of a class-conditional run with all features on."""
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


def test_model_card_describes_data_training_and_usage(finished_run):
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


def test_class_conditional_folder_loads_without_this_repository(finished_run, tmp_path):
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


def test_unet2d_model_trains_with_the_same_flags(train_args, tmp_path):
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


def test_bad_image_is_named_or_skipped(train_args, image_folder, tmp_path, caplog):
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    arguments = [*train_args, f"--train_data_dir={folder}", "--max_train_steps=7"]
    with pytest.raises(ValueError, match="broken.png"):
        train(arguments)
    train([*arguments, "--on_bad_image=skip", "--overwrite_output_dir"])
    assert "broken.png" in caplog.text
    assert logged(tmp_path / "run").Scalars("train/bad_images")[-1].value == 1


def test_out_of_memory_names_flags_that_reduce_memory():
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


def test_overwriting_deletes_only_what_a_run_wrote(train_args, tmp_path):
    train([*train_args, "--max_train_steps=1"])
    for name in ("logs/other_run/events", "notes.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("keep")
    train([*train_args, "--max_train_steps=2", "--overwrite_output_dir"])
    assert (tmp_path / "run/logs/other_run/events").is_file() and (tmp_path / "run/notes.txt").is_file()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}


# --- fine-tuning


def test_finetuning_reinitializes_only_class_embeddings(finished_run, train_args, image_folder, tmp_path, caplog):
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
