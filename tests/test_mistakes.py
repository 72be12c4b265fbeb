"""A user's mistake ends every script with one line and exit code 2; a bug keeps its traceback."""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import convert_nvidia_checkpoint
import eval_diffit
import prepare_latents
import sample_diffit
import train_diffit
import train_vae
from diffit.command_line import Parser, path_type, run_script
from diffit.config import parse_args
from diffit.errors import RunError, UserError, message_of
from diffit_model import DiffiTUNet2DModel
from helpers import ROOT, TINY_CONFIG, mentions, run, tiny_vae, torchrun, train
from warm_start import WarmProcess

SCRIPTS = {
    "train": train_diffit,
    "sample": sample_diffit,
    "eval": eval_diffit,
    "latents": prepare_latents,
    "vae": train_vae,
    "convert": convert_nvidia_checkpoint,
}


def mistake(script: str, arguments: list[str], capsys) -> str:
    """Runs a script in this process; returns the single line with which it ends."""
    module = SCRIPTS[script]
    with pytest.raises(SystemExit) as end:
        run_script(module.main, module.parse_args(arguments))
    printed = capsys.readouterr().err
    lines = [line for line in printed.split("\n") if "error: " in line]
    assert end.value.code == 2, printed
    assert len(lines) == 1 and "Traceback" not in printed, printed
    assert printed.endswith(lines[0] + "\n")
    return lines[0].split("error: ", 1)[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models, good and bad images, and files of the wrong kind."""
    root = tmp_path_factory.mktemp("mistakes")
    DDPMPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(root / "model")
    tiny_vae().save_pretrained(root / "vae")
    (root / "bad").mkdir()
    for number in range(24):
        PIL.Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / "bad" / f"{number}.png")
    (root / "bad" / "3.png").write_text("no image")
    for name, part in (("half", "unet"), ("half_vae", "")):
        shutil.copytree(root / {"half": "model", "half_vae": "vae"}[name], root / name)
        weights = root / name / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        save_file(dict(list(tensors.items())[1:]), weights)
    shutil.copytree(root / "model", root / "truncated")
    weights = root / "truncated" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    shutil.copytree(root / "model", root / "other")
    (root / "other" / "unet" / "config.json").write_text("[]")
    (root / "empty").mkdir()
    (root / "file.txt").write_text("text")
    (root / "list.yaml").write_text("- max_train_steps\n")
    (root / "broken.yaml").write_text("a: [\n")
    (root / "broken.json").write_text('{"sample_size": 8,')
    (root / "list.json").write_text("[1, 2]")
    (root / "typo.json").write_text(json.dumps(TINY_CONFIG | {"windowsize": 4}))
    (root / "odd.json").write_text(json.dumps(TINY_CONFIG | {"num_attention_heads": 3}))
    (root / "broken.parquet").write_text("PAR1")
    (root / "weights.safetensors").write_text("no tensors")
    (root / "broken.npz").write_bytes(b"PK")
    return {path.name: path for path in root.iterdir()}


TRAIN = [
    (["--train_data_dir={absent}"], ["--train_data_dir", "absent"]),
    (["--train_data_dir={empty}"], ["--train_data_dir", "empty"]),
    (["--train_data_dir=$HOME/images"], ["--train_data_dir", "$HOME/images"]),
    (["--train_data_dir="], ["--train_data_dir", "empty"]),
    (["--train_data_dir={bad}", "--no-class_conditional", "--max_train_steps=6"], ["3.png"]),
    (["--train_data_dir={file.txt}"], ["--train_data_dir", "file.txt"]),
    (["--config={absent}"], ["--config", "absent"]),
    (["--config={broken.yaml}"], ["--config", "broken.yaml"]),
    (["--config={list.yaml}"], ["--config", "list.yaml"]),
    (["--model_config={absent}.json"], ["--model_config", "absent.json"]),
    (["--model_config={broken.json}"], ["--model_config", "broken.json"]),
    (["--model_config={list.json}"], ["--model_config", "list.json"]),
    (["--model_config={typo.json}"], ["--model_config", "windowsize", "window_size"]),
    (["--model_config={odd.json}"], ["--model_config", "3"]),
    (["--model_kwargs", "window_size=[]"], ["--model_kwargs", "window_size"]),
    (["--resolution=9"], ["--resolution", "9x9"]),
    (["--resolution=8x0"], ["--resolution", "8x0"]),
    (["--max_train_steps=many"], ["--max_train_steps", "many"]),
    (["--learning_rat=1"], ["--learning_rat"]),
    (["--lr_scheduler=piecewise_constant", "--lr_step_rules=foo"], ["--lr_step_rules", "foo"]),
    (["--resume_from_checkpoint={empty}"], ["--resume_from_checkpoint", "empty"]),
    (["--output_dir={file.txt}"], ["--output_dir", "file.txt"]),
    (["--logging_dir=~/logs"], ["--logging_dir"]),
    (["--vae_model_name_or_path={model}"], ["--vae_model_name_or_path", "model"]),
    (
        ["--validation_guidance_model={empty}", "--validation_guidance_scale=2"],
        ["--validation_guidance_model", "empty"],
    ),
    (["--eval_steps=1", "--feature_extractor=nothing"], ["--feature_extractor", "nothing"]),
    (["--global_batch_size=6"], ["--global_batch_size", "6"]),
    (["--vae_model_name_or_path={half_vae}"], ["--vae_model_name_or_path", "half_vae", "missing"]),
]
FINE_TUNING = [
    ("half", ["conv_in.bias"]),
    ("truncated", ["safetensors"]),
    ("other", ["config.json"]),
    ("vae", ["AutoencoderKL"]),
    ("empty", []),
]


def fill_in(arguments: list[str], folders: dict[str, Path]) -> list[str]:
    for name, path in (folders | {"absent": folders["model"].parent / "absent"}).items():
        arguments = [argument.replace("{" + name + "}", str(path)) for argument in arguments]
    return arguments


@pytest.mark.parametrize(("arguments", "words"), TRAIN, ids=lambda value: " ".join(value))
def test_mistakes_in_training(arguments, words, folders, train_args, capsys):
    line = mistake("train", [*train_args, *fill_in(arguments, folders)], capsys)
    assert mentions(*words).search(line), line


@pytest.mark.parametrize(("source", "words"), FINE_TUNING)
def test_mistakes_in_fine_tuning(source, words, folders, train_args, capsys):
    flags = [flag for flag in train_args if not flag.startswith(("--model_config", "--class_conditional"))]
    flag = "--pretrained_model_name_or_path"
    line = mistake("train", [*flags, f"{flag}={folders[source]}"], capsys)
    assert mentions(flag, source, *words).search(line), line


SAMPLING = ["--model_path={model}", "--output_dir={out}", "--seeds=0", "--num_inference_steps=2"]
JUDGING = ["--images={bad}", "--reference={bad}", "--feature_extractor=efficientnet_lite0", "--work_dir={out}"]
OTHERS = [
    ("sample", [*SAMPLING, "--model_path={absent}"], ["--model_path", "absent"]),
    ("sample", [*SAMPLING, "--model_path={empty}"], ["--model_path", "empty"]),
    ("sample", [*SAMPLING, "--model_path={half}"], ["--model_path", "half", "missing"]),
    ("sample", [*SAMPLING, "--model_path={truncated}"], ["--model_path", "truncated"]),
    ("sample", [*SAMPLING, "--model_path={other}"], ["--model_path", "other"]),
    ("sample", [*SAMPLING, "--guidance_scale=2", "--guidance_model={half}"], ["--guidance_model", "half"]),
    ("sample", [*SAMPLING, "--output_dir={file.txt}/below"], ["--output_dir", "file.txt"]),
    ("sample", [*SAMPLING, "--class_labels=cat"], ["--class_labels", "cat"]),
    ("sample", [*SAMPLING, "--seeds=5-1"], ["--seeds", "5-1"]),
    ("sample", [*SAMPLING, "--scheduler=edm_heun"], ["--scheduler", "edm_heun"]),
    ("sample", [*SAMPLING, "--vae={vae}"], ["--vae"]),
    ("sample", [*SAMPLING, "--output_dir={file.txt}"], ["--output_dir", "file.txt"]),
    ("eval", JUDGING, ["3.png"]),
    ("eval", [*JUDGING, "--images={absent}"], ["--images", "absent"]),
    ("eval", [*JUDGING, "--images={weights.safetensors}"], ["--images", "weights.safetensors"]),
    ("eval", [*JUDGING, "--work_dir={file.txt}"], ["--work_dir", "file.txt"]),
    ("eval", ["--model_path={absent}", *JUDGING[1:]], ["--model_path", "absent"]),
    ("eval", ["--model_path={half}", *JUDGING[1:]], ["--model_path", "half", "missing"]),
    ("eval", ["--model_path={model}", *JUDGING[1:], "--eta=5"], ["--eta", "5.0"]),
    ("eval", ["--model_path={model}", *JUDGING[1:], "--guidance_scale=nan"], ["--guidance_scale", "nan"]),
    ("eval", ["--model_path={model}", *JUDGING[1:], "--num_inference_steps=5000"], ["--num_inference_steps", "5000"]),
    ("eval", [*JUDGING, "--reference={broken.npz}"], ["--reference", "broken.npz"]),
    ("eval", [*JUDGING, "--output={file.txt}/r.json"], ["--output", "file.txt"]),
    ("eval", [*JUDGING, "--plots={file.txt}"], ["--plots", "file.txt"]),
    ("vae", ["--train_data_dir={bad}", "--output_dir={file.txt}/x"], ["--output_dir", "file.txt"]),
    ("convert", ["--to_nvidia", "--checkpoint={model}/unet", "--output_dir={out}"], ["--checkpoint"]),
    ("latents", ["--train_data_dir={bad}", "--resolution=9"], ["--resolution", "9x9"]),
    ("latents", ["--train_data_dir={absent}", "--resolution=8"], ["--train_data_dir", "absent"]),
    ("latents", ["--train_data_file={broken.parquet}", "--resolution=8"], ["broken.parquet"]),
    ("latents", ["--train_data_dir={bad}", "--resolution=8"], ["3.png"]),
    ("vae", ["--train_data_dir={absent}", "--output_dir={out}"], ["--train_data_dir", "absent"]),
    ("vae", ["--train_data_dir={bad}", "--output_dir={out}", "--resolution=9"], ["--resolution 9", "8"]),
    ("vae", ["--train_data_dir={bad}", "--output_dir={out}", "--kl_weight=nan"], ["--kl_weight", "nan"]),
    ("vae", ["--train_data_dir={bad}", "--output_dir={out}", "--learning_rate=-1"], ["--learning_rate", "-1.0"]),
    ("latents", ["--train_data_dir={bad}", "--resolution=8", "--dataloader_num_workers=-1"], ["_workers", "-1"]),
    ("convert", ["--checkpoint={absent}.pt", "--output_dir={out}"], ["--checkpoint", "absent.pt"]),
    ("convert", ["--checkpoint={weights.safetensors}", "--output_dir={out}"], ["--checkpoint", "weights.safetensors"]),
    ("convert", ["--checkpoint={file.txt}", "--output_dir={bad}"], ["--output_dir", "bad"]),
]


@pytest.mark.parametrize(("script", "arguments", "words"), OTHERS, ids=lambda value: str(value)[:60])
def test_mistakes_in_the_other_scripts(script, arguments, words, folders, tmp_path, capsys):
    if script == "latents":
        arguments = ["--vae_model_name_or_path={vae}", "--output_dir={out}", *arguments]
    line = mistake(script, fill_in(arguments, folders | {"out": tmp_path / "out"}), capsys)
    assert mentions(*words).search(line), line


def test_refused_resume_is_one_line(train_args, capsys):
    train([*train_args, "--max_train_steps=1"])
    for flag, value in (("--learning_rate", "0.5"), ("--seed", "7")):
        arguments = [*train_args, "--max_train_steps=2", "--resume_from_checkpoint=latest", f"{flag}={value}"]
        assert flag in mistake("train", arguments, capsys)


# --- paths


def test_paths_expand_the_home_folder_and_refuse_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert path_type("~/runs/a") == "/somewhere/runs/a"
    assert path_type("stabilityai/sd-vae-ft-ema") == "stabilityai/sd-vae-ft-ema"
    for text in ("$HOME/a", "", "~nobody-of-this-name/a"):
        with pytest.raises(argparse.ArgumentTypeError):
            path_type(text)


def test_config_file_and_command_line_expand_the_home_folder(train_args, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/runs/a\n")
    flags = [flag for flag in train_args if not flag.startswith("--output_dir")]
    assert parse_args([*flags, "--config=~/c.yaml"]).run.output_dir == f"{tmp_path}/runs/a"
    assert parse_args([*flags, "--output_dir=~/b"]).run.output_dir == f"{tmp_path}/b"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_path_flag_of_every_script_has_that_type(script, monkeypatch):
    class Stop(Exception):
        pass

    def stop(parser, *arguments):
        raise Stop(parser)

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(Stop) as stopped:
        SCRIPTS[script].parse_args([])
    endings = "dir path file folder vae reference output plots config checkpoint".split()
    paths = [
        action
        for action in stopped.value.args[0]._actions
        if action.option_strings
        and (
            action.dest.split("_")[-1] in endings
            or action.dest.endswith(("or_path", "guidance_model"))
            or action.dest in ("images", "training_images")
        )
        and action.nargs != 0
    ]
    assert len(paths) >= 2 and [action.dest for action in paths if action.type is not path_type] == []


# --- how it ends


def test_traceback_is_shown_with_debug_and_for_bugs():
    def fail(error):
        raise error

    for error, debug in ((UserError("mine"), True), (ValueError("a bug"), False), (RuntimeError("a bug"), False)):
        with pytest.raises(type(error), match=str(error)):
            run_script(lambda args, error=error: fail(error), argparse.Namespace(debug=debug))


def test_run_error_is_one_line_with_another_exit_code(capsys):
    def fail(args):
        raise RunError("the disk\nis full")

    with pytest.raises(SystemExit) as end:
        run_script(fail, argparse.Namespace(debug=False))
    assert end.value.code == 1 and capsys.readouterr().err.endswith("error: the disk is full\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a/model.py", None, "out/unet"),
        OSError(errno.EROFS, "Read-only file system", "out/unet"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28), out/unet"),
    ],
    ids=["full", "read-only", "safetensors"],
)
def test_full_disk_is_one_line_in_every_script(error, capsys):
    def fail(args):
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(fail, argparse.Namespace(debug=False))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(lines) == 1 and mentions("disk", "out/unet").search(lines[0])


def test_message_from_a_worker_is_that_of_the_error():
    text = "Caught BadImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  a\n"
    assert message_of(UserError("plain")) == "plain"
    assert message_of(type("BadImageError", (UserError,), {})(f"{text}x.BadImageError: bad: a.png\n")) == "bad: a.png"


def test_bad_image_in_a_worker_is_one_line(base_args, folders, tmp_path):
    flags = [*base_args, f"--train_data_dir={folders['bad']}", "--no-class_conditional", f"--output_dir={tmp_path}/r"]
    process = WarmProcess(["train_diffit.py", *flags, "--dataloader_num_workers=2", "--max_train_steps=12"])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert "Traceback" not in output and output.count("error: ") == 1 and "3.png" in output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rat=1"], "--learning_rat"),
        (
            ["--train_data_dir={bad}", "--max_train_steps=12", "--no-class_conditional", "--dataloader_num_workers=1"],
            "3.png",
        ),
    ],
    ids=["flag", "image"],
)
def test_each_mistake_is_told_once_by_several_processes(flags, words, base_args, folders, tmp_path):
    command = [*torchrun(), "train_diffit.py", *base_args]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.run(
        [sys.executable, *command, f"--output_dir={tmp_path}/r", "--train_batch_size=1", *fill_in(flags, folders)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    told = [line for line in process.stderr.split("\n") if "train_diffit.py: error: " in line]
    assert len(told) == 1 and words in told[0], process.stderr
    assert process.stderr.count("Traceback") == 1 and "ChildFailedError" in process.stderr  # the launcher's own report


def test_importing_xformers_says_nothing_with_cuda_either():
    pytest.importorskip("xformers")
    code = "import torch; torch.cuda.is_available = lambda: True; import xformers"
    loud, quiet = (
        subprocess.run([sys.executable, "-c", before + code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        for before in ("", "import diffit; ")
    )
    assert loud.returncode == quiet.returncode == 0, loud.stderr + quiet.stderr
    if "xformers" not in loud.stderr.lower():
        pytest.skip("this xformers was built for this torch, so it has nothing to say")
    assert "xformers" not in quiet.stderr.lower() and "triton" not in quiet.stderr.lower()


def test_first_screen_says_nothing_of_xformers(base_args, tmp_path):
    output = run(["train_diffit.py", *base_args, f"--output_dir={tmp_path}/r", "--dry_run"], CUDA_VISIBLE_DEVICES="")
    assert "xformers" not in output.lower().replace("attention_backend", "")
