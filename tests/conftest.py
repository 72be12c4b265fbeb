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
}
# Networks this small are slower on several threads. Several that spin while they wait take minutes instead of seconds
# where others use the cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TINY_CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "window_size": 4,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
}
# With an output of zero at the start the first gradients vanish, and Adam amplifies their rounding, which depends on
# the CPU. So tests that compare trained networks need other weights there.
TINY_TRAINED_CONFIG = TINY_CONFIG | {"zero_init_output": False}


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
    file.write_text(json.dumps(TINY_TRAINED_CONFIG))
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


def run(command: list[str], cwd: Path = ROOT, timeout: float = 300, **environment: str) -> str:
    """Runs a command with this Python to its end and returns what it printed; it must succeed."""
    process = start(command, cwd, **environment)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def plain_loop(
    image_folder: Path,
    starts: list[int],
    batch_size: int,
    label_dropout: float = 0.1,
    random_flip: bool = False,
    **config,
) -> tuple:
    """The training of `base_args` written out: no accelerate, no data loader, no loss or step of ours.

    Args:
        image_folder: with its three classes.
        starts: first position of the stream in each optimizer step.
        batch_size: images of an optimizer step.
        label_dropout: share of the labels that becomes the null class.
        random_flip: mirror half of the images.
        config: on top of `TINY_TRAINED_CONFIG`.

    Returns:
        The network, whose `grad` is that of the last step, and the loss of each step.
    """
    import torch

    from diffit.decode import normalize_pixels
    from diffit.sources import load_image_table
    from diffit.stream import ImageDataset, PositionStream
    from diffit_model import DiffiTUNet2DModel

    torch.manual_seed(0)
    model = DiffiTUNet2DModel(**(TINY_TRAINED_CONFIG | config), num_class_embeds=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    times = (torch.linspace(0, 1, 1001, dtype=torch.float64) + 0.008) / 1.008
    signal = (times * torch.pi / 2).cos().square()  # cosine betas
    alphas = torch.cumprod(1 - (1 - signal[1:] / signal[:-1]).clamp(max=0.999), 0).float()
    table = load_image_table(train_data_dir=str(image_folder))
    dataset = ImageDataset(table, PositionStream(24, seed=0), (8, 8), 3, random_flip=random_flip)
    losses = []
    for step, start in enumerate(starts):
        items = [dataset[(p, dataset.stream.index(p))] for p in range(start, start + batch_size)]
        clean, noise = (torch.stack([item[key] for item in items]) for key in ("pixel_values", "noise"))
        clean = normalize_pixels(clean)
        t = torch.tensor([int(item["time_uniform"] * 1000) for item in items])
        labels = torch.tensor(
            [3 if item["dropout_uniform"] < label_dropout else item["class_labels"] for item in items]
        )
        a = alphas[t].reshape(-1, 1, 1, 1)
        prediction = model(a.sqrt() * clean + (1 - a).sqrt() * noise, t, labels).sample
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        snr = a / (1 - a)
        loss = (snr.clamp(max=5) / (snr + 1) * (prediction - velocity).pow(2)).mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def relative_differences(weights: dict, expected: dict) -> dict[str, float]:
    """|difference| / |expected| (norms) of each tensor, without the key bias and the `k_t` rows.

    These have no gradient in truth: under Adam they move by amplified rounding.
    """
    import torch

    differences = {}
    for name in expected:
        a, b = weights[name], expected[name]
        if ".qkv" in name and ("qkv_temb" in name or name.endswith("bias")):
            query, _, value = b.chunk(3)
            b = torch.cat([query, value])
            query, _, value = a.chunk(3)
            a = torch.cat([query, value])
        differences[name] = ((a - b).norm() / b.norm()).item()
    return differences
