"""A tiny real network, a folder of generated images, and the scripts run as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

ROOT = Path(__file__).parents[1]

# Nothing is downloaded, and nothing outside the test's own folders is read or written. Set before HF libraries load.
_CACHE = Path(os.environ.get("TMPDIR", "/tmp"), f"diffit-tests-{os.getpid()}")
os.environ |= {
    "HF_HOME": str(_CACHE / "hf"),
    "HF_MODULES_CACHE": str(_CACHE / "modules"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Networks this small are slower on several threads, and far slower where others use the cores too.
    "OMP_NUM_THREADS": "1",
}

TINY_CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "window_size": 4,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
}


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_process_state():
    """accelerate and diffusers keep process-wide state; a test must not see that of another."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture(scope="session")
def tiny_model_config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.json"
    file.write_text(json.dumps(TINY_CONFIG))
    return file


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 colour images of 8 x 8 pixels in the classes `blue`, `green` and `red`."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 100, (8, 8, 3))
            pixels[..., channel] += 150
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def base_args(tiny_model_config, image_folder) -> list[str]:
    """Flags of a training that takes a second, but for --output_dir; later flags win."""
    return [
        f"--model_config={tiny_model_config}",
        f"--train_data_dir={image_folder}",
        "--class_conditional",
        "--train_batch_size=4",
        "--max_train_steps=4",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=2",
        "--logging_steps=1",
        "--num_validation_images=3",
        "--validation_inference_steps=2",
    ]


@pytest.fixture
def train_args(base_args, tmp_path) -> list[str]:
    return [*base_args, f"--output_dir={tmp_path / 'run'}"]


def train(arguments: list[str]) -> None:
    """Runs the training script in this process."""
    import train_diffit

    train_diffit.main(train_diffit.parse_args(arguments))


def start(command: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """Starts a command with this Python, its output readable."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """Runs a command with this Python to its end and returns what it printed; it must succeed."""
    process = start(command, cwd, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output
