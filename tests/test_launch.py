"""The scripts under the launchers, and the configs under the loaders that will read them."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DDPMPipeline, DDPMScheduler

import sample_diffit
from diffit import sampling_config
from diffit.config import build_parser, parse_args
from diffit.networks import model_class, read_model_config
from diffit_model import DiffiTModelMixin, DiffiTUNet2DModel
from helpers import LAUNCH, ROOT, TINY_CONFIG, losses, mentions, readme_commands, run, start, torchrun, train
from warm_start import run_ranks

ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_accelerate_config_loads_with_its_own_loader(file):
    config = load_config_from_file(str(file))
    processes = {"cpu": 1, "cpu_multi_process": 2, "single_gpu": 1, "multi_gpu": 4, "multi_node": 16, "fsdp2": 4}
    assert config.num_processes == processes[file.stem]
    kinds = {"cpu": "NO", "single_gpu": "NO", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(file.stem, "MULTI_GPU")
    assert config.num_machines == (2 if file.stem == "multi_node" else 1)
    assert config.mixed_precision == ("no" if "cpu" in file.stem else "bf16")


def test_one_process_under_accelerate_launch_equals_plain_python(train_args, tmp_path):
    """A run in this process, and one under `accelerate launch` with configs/accelerate/cpu.yaml."""
    train([*train_args, f"--output_dir={tmp_path / 'plain'}"])
    config = str(ROOT / "configs/accelerate/cpu.yaml")
    run([*LAUNCH, "--config_file", config, "train_diffit.py", *train_args, f"--output_dir={tmp_path / 'launched'}"])
    assert losses(tmp_path / "plain") == losses(tmp_path / "launched")


def test_two_processes_know_that_they_are_two_and_train_the_same(train_args, tmp_path):
    """One global batch on 1 process, and on 2 under configs/accelerate/cpu_multi_process.yaml and torchrun."""
    arguments = [*train_args, "--global_batch_size=8", "--validation_fraction=0.25", "--checkpointing_steps=2"]
    train([*arguments, f"--output_dir={tmp_path / 'one'}"])
    config = str(ROOT / "configs/accelerate/cpu_multi_process.yaml")
    launchers = {
        "accelerate": [*LAUNCH, "--config_file", config],
        "torchrun": torchrun(),
    }
    for name, launcher in launchers.items():
        two = tmp_path / name
        output = run([*launcher, "train_diffit.py", *arguments, f"--output_dir={two}"])
        assert mentions("4 x 2 processes x 1").search(output)
        np.testing.assert_allclose(losses(two), losses(tmp_path / "one"), rtol=1e-4)
        previews = [
            np.asarray(PIL.Image.open(path / "sample_grid.png")).astype(int) for path in (two, tmp_path / "one")
        ]
        assert np.abs(previews[0] - previews[1]).max() <= 3  # four steps of training in between
        assert {path.name for path in two.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_two_processes_share_the_seeds(tmp_path):
    torch.manual_seed(0)
    unet = DiffiTUNet2DModel(**TINY_CONFIG, zero_init_output=False)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    flags = [f"--model_path={tmp_path / 'model'}", "--seeds=0-6", "--num_inference_steps=2", "--batch_size=2"]
    sample_diffit.main(sample_diffit.parse_args([*flags, f"--output_dir={tmp_path / 'one'}"]))
    command = ["sample_diffit.py", *flags, f"--output_dir={tmp_path / 'two'}"]
    codes, output = run_ranks(command, command)
    assert codes == [0, 0], output
    names = sorted(path.name for path in (tmp_path / "one").glob("seed_*.png"))
    assert names == sorted(path.name for path in (tmp_path / "two").glob("seed_*.png")) and len(names) == 7
    for name in [*names, "grid.png"]:
        one, two = (np.asarray(PIL.Image.open(tmp_path / run / name)).astype(int) for run in ("one", "two"))
        assert np.abs(one - two).max() <= 1


def test_misspelt_flag_is_refused_before_data_and_models_are_read(tmp_path):
    absent = [f"--{name}={tmp_path}/absent" for name in ("model_config", "train_data_dir")]
    flags = [*absent, "--max_train_steps=1", f"--output_dir={tmp_path}/run", "--learning_rat=1"]
    process = start(["train_diffit.py", *flags])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and mentions("--learning_rat").search(output) and "Traceback" not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda file: file.stem)
def test_train_config_is_accepted_and_documented(file):
    config = read_model_config(parse_args(["--config", str(file)]).model)
    assert issubclass(model_class(config), DiffiTModelMixin)
    header = file.read_text().split("\nmodel_config")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for words in ("Recipe:", "Hardware:", "Batch:", "train_diffit.py --config configs/train/"):
        assert words in header, words


PAPER_SIZES = {"cifar10": (15, 16), "cifar10_l4": (28, 29), "ffhq64": (22, 24), "ffhq64_l4": (43, 45)}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_size_config_has_the_papers_parameters(name):
    config = json.loads((ROOT / f"configs/model/{name}.json").read_text())
    with torch.device("meta"):
        model = DiffiTUNet2DModel.from_config(config)
    low, high = PAPER_SIZES[name]
    assert low <= sum(parameter.numel() for parameter in model.parameters()) / 1e6 <= high


@pytest.mark.parametrize("arguments", readme_commands("train_diffit.py"), ids=" ".join)
def test_train_command_of_the_readme_is_accepted(arguments):
    parse_args(arguments)


@pytest.mark.parametrize("arguments", readme_commands("sample_diffit.py"), ids=" ".join)
def test_sample_command_of_the_readme_is_accepted(arguments):
    sample_diffit.parse_args(arguments)


def test_flags_in_the_tables_of_the_readme_exist():
    parsers = (build_parser(), sampling_config.build_parser())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--multi_gpu", "--num_processes", "--nproc_per_node"}  # of the launchers
    rows = re.findall(r"^\| `--.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    ours = {flag for row in rows for flag in re.findall(r"--[\w-]+", row.split("|")[2])}
    same = {flag for row in rows if "the same" in row for flag in re.findall(r"--[\w-]+(?!\*)\b", row.split("|")[1])}
    assert len(rows) > 30
    assert (ours | same) - {"--adam_"} <= known
