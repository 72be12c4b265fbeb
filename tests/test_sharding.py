"""FSDP2 over gloo on CPUs (see `sharded_ranks.py`): the numbers and the files of an unsharded training."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from diffit.errors import UserError
from diffit.launcher import EXIT_STOPPED
from diffit.sharding import check_sharding
from helpers import (
    STATES,
    TINY_TRANSFORMER,
    assert_same_files,
    logged,
    losses,
    mentions,
    relative_differences,
    tiny_vae,
    train,
    wait_for_file,
)
from sharded_ranks import config_answers
from warm_start import run_ranks, start_ranks

REPLICATED = ["ACCELERATE_USE_FSDP=false"]
# The held-out loss is that of one batch, so the second process has none. The gradients are clipped in every step.
FLAGS = ["--max_train_steps=20", "--checkpointing_steps=10", "--max_grad_norm=0.1", "--global_batch_size=8"]
FLAGS += ["--validation_fraction=0.3", "--validation_loss_images=3", "--validation_steps=10"]


def commands(arguments: list[str], folder: Path, *flags: str, answers: list[str] = (), ranks: int = 2) -> list:
    """The command of each process of a training in a folder."""
    return [["tests/sharded_ranks.py", *answers, "--", *arguments, f"--output_dir={folder}", *flags]] * ranks


def train_ranks(*arguments, **options) -> str:
    """Runs such a training to its end and returns what it printed."""
    codes, output = run_ranks(*commands(*arguments, **options))
    assert set(codes) == {0}, output
    return output


def shards(output: str) -> dict[str, list[float]]:
    """The share of each part of the training state in each process."""
    found = {}
    for name, share in re.findall(r"shard of (\w+): (\S+)", output):
        found.setdefault(name, []).append(float(share))
    return found


def assert_sharded(found: dict[str, list[float]], *parts: str) -> None:
    """Each of two processes holds half of each part, but for the padding of odd sizes."""
    assert set(found) == set(parts)
    for shares in found.values():
        assert len(shares) == 2 and 0.45 < min(shares) and max(shares) < 0.55


def values(run_dir: Path, tag: str) -> list[float]:
    return [event.value for event in logged(run_dir).Scalars(tag)]


@dataclass
class Runs:
    """The same training on two processes, sharded and replicated (DDP). The fourth step of each is not finite."""

    sharded: Path
    replicated: Path
    output: str


@pytest.fixture(scope="module")
def runs(base_args, tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    spoilt = ["SPOILT=3"]
    output = train_ranks(base_args, root / "sharded", *FLAGS, answers=spoilt)
    replicated = train_ranks(base_args, root / "replicated", *FLAGS, answers=[*spoilt, *REPLICATED])
    assert set(sum(shards(replicated).values(), [])) == {1.0}
    return Runs(root / "sharded", root / "replicated", output)


def test_weights_optimizer_and_averages_are_sharded(runs):
    assert_sharded(shards(runs.output), "weights", "optimizer", "ema")


def test_sharded_training_has_the_losses_of_a_replicated_one(runs):
    for tag, steps in (("train/loss", 20), ("train/grad_norm", 20), ("validation/loss", 2)):
        sharded, replicated = (values(folder, tag) for folder in (runs.sharded, runs.replicated))
        assert len(sharded) == len(replicated) == steps
        np.testing.assert_allclose(sharded, replicated, rtol=0, atol=1e-5)
    assert min(values(runs.sharded, "train/grad_norm")) > 0.1  # so all were clipped


def test_non_finite_step_of_one_process_is_skipped_in_all(runs):
    assert mentions("step 4", "positions", 24, 31).search(runs.output)
    numbers = [json.loads((run / "checkpoint-20/state.json").read_text()) for run in (runs.sharded, runs.replicated)]
    assert numbers[0] == numbers[1]
    assert (numbers[0]["bad_steps"], numbers[0]["position"]) == (1, 21 * 8)


def relative_files(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {file.as_posix() for file in files if file.parts[0] != "logs"}


def test_files_are_those_of_an_unsharded_training(runs):
    assert relative_files(runs.sharded) == relative_files(runs.replicated)
    for name in relative_files(runs.sharded):
        sharded, replicated = runs.sharded / name, runs.replicated / name
        if name.endswith(".safetensors"):
            weights, expected = load_file(sharded), load_file(replicated)
            assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {
                k: (v.shape, v.dtype) for k, v in expected.items()
            }
            assert max(relative_differences(weights, expected).values()) < 1e-3
        elif name.endswith("optimizer.pt"):
            state, expected = (torch.load(file, weights_only=True) for file in (sharded, replicated))
            assert state["param_groups"] == expected["param_groups"]
            torch.testing.assert_close(state["state"], expected["state"], rtol=1e-3, atol=1e-6)
        elif name.endswith(".png"):
            pixels = [np.asarray(PIL.Image.open(file)).astype(int) for file in (sharded, replicated)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1
        elif name.endswith(("config.json", "index.json", "state.json", ".py")):
            assert sharded.read_bytes() == replicated.read_bytes(), name


def test_sharded_checkpoint_resumes_unsharded(runs, base_args, tmp_path):
    folder = tmp_path / "unsharded"
    checkpoint = runs.sharded / "checkpoint-10"
    train([*base_args, *FLAGS, f"--output_dir={folder}", f"--resume_from_checkpoint={checkpoint}"])
    np.testing.assert_allclose(losses(folder), losses(runs.sharded)[10:], rtol=0, atol=1e-5)
    for name in STATES[:2]:
        weights, expected = (load_file(run / "checkpoint-20" / name) for run in (folder, runs.sharded))
        assert max(relative_differences(weights, expected).values()) < 1e-3


def test_sharded_training_in_bf16_has_the_losses_of_an_unsharded_one(base_args, tmp_path):
    flags = ["--mixed_precision=bf16", "--global_batch_size=8", "--max_train_steps=3"]
    output = train_ranks(base_args, tmp_path / "sharded", *flags, "--gradient_checkpointing")
    assert_sharded(shards(output), "weights", "optimizer", "ema")
    train([*base_args, *flags, f"--output_dir={tmp_path / 'unsharded'}"])
    np.testing.assert_allclose(losses(tmp_path / "sharded"), losses(tmp_path / "unsharded"), rtol=1e-3)
    weights = load_file(tmp_path / "sharded/checkpoint-3" / STATES[0])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_unsharded_checkpoint_resumes_sharded(runs, base_args, tmp_path):
    folder = tmp_path / "sharded"
    checkpoint = runs.replicated / "checkpoint-10"
    train_ranks(base_args, folder, *FLAGS, f"--resume_from_checkpoint={checkpoint}")
    np.testing.assert_allclose(losses(folder), losses(runs.replicated)[10:], rtol=0, atol=1e-5)
    for name in STATES[:2]:
        weights, expected = (load_file(run / "checkpoint-20" / name) for run in (folder, runs.replicated))
        assert max(relative_differences(weights, expected).values()) < 1e-3


def test_killed_sharded_run_resumes_bitwise(runs, base_args, tmp_path):
    folder = tmp_path / "killed"
    slow = ["--validation_inference_steps=1000"]  # time to kill it after the checkpoint
    processes = start_ranks(*commands(base_args, folder, *FLAGS, *slow, answers=["SPOILT=3"]))
    wait_for_file(folder / "checkpoint-10", processes[0])
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (folder / "checkpoint-20").exists()
    output = train_ranks(base_args, folder, *FLAGS, "--resume_from_checkpoint=latest")
    assert_sharded(shards(output), "weights", "optimizer", "moments", "ema")
    assert_same_files(runs.sharded / "checkpoint-20", folder / "checkpoint-20", STATES)
    states = [json.loads((run / "checkpoint-20/state.json").read_text()) for run in (runs.sharded, folder)]
    assert states[0] == states[1]


@pytest.mark.slow
def test_last_validation_that_is_repeated_is_the_same(runs, base_args, tmp_path):
    """The network is gathered before it has run forward for the first time."""
    folder = tmp_path / "run"
    checkpoint = runs.sharded / "checkpoint-20"
    train_ranks(base_args, folder, *FLAGS, f"--resume_from_checkpoint={checkpoint}")
    for name in ("sample_grid.png", "unet/config.json", STATES[0]):
        assert (folder / name).read_bytes() == (runs.sharded / name).read_bytes(), name
    assert values(folder, "validation/loss") == values(runs.sharded, "validation/loss")[1:]


@pytest.mark.slow
def test_stop_of_one_process_in_a_validation_stops_all(base_args, tmp_path):
    folder = tmp_path / "run"
    slow = ["--validation_inference_steps=1000"]
    processes = start_ranks(*commands(base_args, folder, *FLAGS, *slow))
    wait_for_file(folder / "checkpoint-10", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_STOPPED] * 2, outputs
    assert list(folder.glob("checkpoint-*"))


UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 4,
}
EDM = ["--formulation=edm", "--augmentation_probability=0.1"]
LATENTS = ["--vae_model_name_or_path=vae", "--prediction_type=epsilon", "--beta_schedule=linear"]
TRAININGS = {
    "bf16 with accumulation": ["--mixed_precision=bf16", "--gradient_accumulation_steps=2"],
    "bf16 with checkpointing": ["--mixed_precision=bf16", "--gradient_checkpointing"],
    "EDM with half-lives": [*EDM, "--ema_half_life_kimg", "0.02", "0.1"],
    "metrics": ["--eval_steps=3", "--feature_extractor=helpers:mean_colours", "--eval_num_images=8"],
    "UNet2DModel": ["--gradient_checkpointing", "--no-use_ema", "--model_config=unet.json"],
    "latents": ["--model_config=transformer.json", *LATENTS],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_training_has_the_same_numbers_sharded_over_three_processes(name, base_args, tmp_path):
    """The shards are of different sizes, and some are empty."""
    for file, config in (("unet.json", UNET), ("transformer.json", TINY_TRANSFORMER)):
        (tmp_path / file).write_text(json.dumps(config))
    tiny_vae(latent_channels=2).save_pretrained(tmp_path / "vae")
    flags = [re.sub(r"=(\w+\.json|vae)$", rf"={tmp_path}/\1", flag) for flag in TRAININGS[name]]
    flags += ["--max_train_steps=6", "--checkpointing_steps=3", "--validation_fraction=0.3", "--validation_steps=3"]
    folders = [tmp_path / "sharded", tmp_path / "replicated"]
    for folder, answers in zip(folders, ([], REPLICATED), strict=True):
        train_ranks(base_args, folder, *flags, answers=answers, ranks=3)
    scalars = set(logged(folders[0]).Tags()["scalars"])
    assert scalars == set(logged(folders[1]).Tags()["scalars"])
    compared = {tag for tag in scalars if tag.startswith(("train/loss", "train/grad_norm", "validation/", "eval/"))}
    assert len(compared) > 3
    for tag in compared:
        sharded, replicated = (values(folder, tag) for folder in folders)
        np.testing.assert_allclose(sharded, replicated, rtol=1e-4, atol=1e-5, err_msg=tag)
    assert relative_files(folders[0]) == relative_files(folders[1])
    for file in folders[0].rglob("*.safetensors"):
        weights, expected = load_file(file), load_file(folders[1] / file.relative_to(folders[0]))
        assert max(relative_differences(weights, expected).values()) < 1e-3


# --- refusals


def accelerator_of(answers: dict[str, str], monkeypatch, **settings) -> SimpleNamespace:
    """What `check_sharding` asks an accelerator with FSDP about, by accelerate's own reading of the answers."""
    for name, value in (config_answers() | answers).items():
        monkeypatch.setenv(name, value)
    state = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        fsdp_plugin=FullyShardedDataParallelPlugin(),
        dynamo_plugin=SimpleNamespace(backend=DynamoBackend(settings.pop("dynamo", "NO"))),
    )
    return SimpleNamespace(**{"state": state, "mixed_precision": "bf16", "parallelism_config": None} | settings)


def test_answers_of_the_shipped_config_are_accepted(monkeypatch):
    check_sharding(accelerator_of({}, monkeypatch), "adamw", compiles=False, attention_backend="native")


REFUSED = {
    "fsdp_reshard_after_forward": "false",
    "fsdp_offload_params": "true",
    "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": "true",
    "fsdp_activation_checkpointing": "true",
    "fsdp_ignored_modules": "conv_in",
}


@pytest.mark.parametrize("answer", REFUSED)
def test_answer_that_sharding_does_not_support_is_named(answer, monkeypatch):
    accelerator = accelerator_of({answer.upper(): REFUSED[answer]}, monkeypatch)
    with pytest.raises(UserError, match=mentions(answer, "configs/accelerate/fsdp2.yaml")):
        check_sharding(accelerator, "adamw", compiles=False, attention_backend="native")


def test_class_names_to_wrap_are_refused(monkeypatch):
    accelerator = accelerator_of({"FSDP_TRANSFORMER_CLS_TO_WRAP": "DiffiTBlock"}, monkeypatch)
    with pytest.raises(UserError, match=mentions("fsdp_transformer_layer_cls_to_wrap")):
        check_sharding(accelerator, "adamw", compiles=False, attention_backend="native")


def test_fsdp1_is_refused(monkeypatch):
    fsdp1 = {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD", "FSDP_SYNC_MODULE_STATES": "false"}
    with pytest.raises(UserError, match=mentions("fsdp_version 1", 2, "configs/accelerate/fsdp2.yaml")):
        check_sharding(accelerator_of(fsdp1, monkeypatch), "adamw", compiles=False, attention_backend="native")


@pytest.mark.parametrize(
    ("words", "flags", "settings"),
    [
        (["--optimizer muon", "adamw"], {"optimizer": "muon"}, {}),
        (["--compile"], {"compiles": True}, {}),
        (["--attention_backend flex"], {"attention_backend": "flex"}, {}),
        (["--mixed_precision fp16", "bf16"], {}, {"mixed_precision": "fp16"}),
        (["dynamo_config"], {}, {"dynamo": "INDUCTOR"}),
        (["parallelism_config"], {}, {"parallelism_config": SimpleNamespace(tp_size=2)}),
    ],
)
def test_setting_that_sharding_does_not_support_is_named(words, flags, settings, monkeypatch):
    flags = {"optimizer": "adamw", "compiles": False, "attention_backend": "native"} | flags
    with pytest.raises(UserError, match=mentions(*words)):
        check_sharding(accelerator_of({}, monkeypatch, **settings), **flags)


def test_fsdp_that_accelerate_would_ignore_is_refused(train_args, monkeypatch):
    for name, value in config_answers().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=mentions("FSDP", "cpu")):
        train(train_args)


def test_muon_is_refused_before_anything_is_written(base_args, tmp_path):
    codes, output = run_ranks(*commands(base_args, tmp_path / "run", "--optimizer=muon"))
    # A slower process may only see that the other one has ended.
    assert 2 in codes and set(codes) <= {1, 2} and not (tmp_path / "run").exists()
    assert [line for line in output.splitlines() if mentions("error", "--optimizer muon").search(line)]
    assert "Traceback" not in output
