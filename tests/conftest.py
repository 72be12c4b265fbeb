"""Fixtures: a tiny real network, a folder of generated images, and the flags of a training on them."""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

# Nothing is downloaded, and nothing outside the test's own folders is read or written. Set before HF libraries load.
_CACHE = Path(os.environ.get("TMPDIR", "/tmp"), f"diffit-tests-{os.getpid()}")
os.environ |= {
    "HF_HOME": str(_CACHE / "hf"),
    "HF_MODULES_CACHE": str(_CACHE / "modules"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Networks this small are slower on several threads. Several that spin while they wait take minutes instead of seconds
# where others use the cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_sessionfinish() -> None:
    import shutil

    from warm_start import WarmProcess

    for process in WarmProcess.started:  # what a failed test has left; Python would wait for it
        if process.poll() is None:
            process.kill()
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_process_state():
    """Resets the process-wide state of accelerate and diffusers, so that no test sees that of another."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture(scope="session")
def tiny_model_config(tmp_path_factory) -> Path:
    from helpers import TINY_TRAINED_CONFIG  # not earlier: see above

    file = tmp_path_factory.mktemp("config") / "tiny.json"
    file.write_text(json.dumps(TINY_TRAINED_CONFIG))
    return file


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 color images of 8 x 8 pixels in the classes `blue`, `green` and `red`."""
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
    """Flags of a training that takes a second, without --output_dir; later flags override them."""
    from helpers import NO_WORKERS

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
        NO_WORKERS,
    ]


@pytest.fixture
def train_args(base_args, tmp_path) -> list[str]:
    return [*base_args, f"--output_dir={tmp_path / 'run'}"]
