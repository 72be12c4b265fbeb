"""Helpers shared by several test files: running scripts as a user would, tiny networks, image files, comparisons.

Fixtures are in `conftest.py`, which sets the environment before this file imports HuggingFace's libraries.
"""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_diffit
import sample_diffit
import train_diffit
from diffit.config import parse_args
from diffit.decode import decode_image, normalize_pixels
from diffit.networks import model_class
from diffit.packing import Batch
from diffit.source_config import SourceConfig
from diffit.sources import ImageTable, load_image_table
from diffit.stream import ImageDataset, PositionStream, StreamDataset
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from warm_start import WarmProcess

ROOT = Path(__file__).parents[1]

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

NO_WORKERS = "--dataloader_num_workers=0"  # which take longer to start than a test takes to load its images
TINY_TRANSFORMER = {
    "_class_name": "DiffiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 4,
    "patch_size": 1,
}

LAUNCH = ["-m", "accelerate.commands.launch"]
STATES = [f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "unet_ema")] + ["optimizer.pt"]


# --- the scripts, run as a user would


def torchrun(processes: int = 2) -> list[str]:
    """Arguments that put processes of this machine around a script that follows them."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def train(arguments: list[str]) -> None:
    """Runs the training script in this process, without workers unless told otherwise."""
    train_diffit.main(parse_args([NO_WORKERS, *arguments]))


def sample(folder: Path, output_dir: Path, *flags: str) -> dict[str, np.ndarray]:
    """Runs the sampling script in this process, 3 steps an image unless told otherwise; the images by file name."""
    arguments = [f"--model_path={folder}", f"--output_dir={output_dir}", "--num_inference_steps=3", *flags]
    sample_diffit.main(sample_diffit.parse_args(arguments))
    return {path.name: np.asarray(PIL.Image.open(path)) for path in output_dir.glob("*seed_*.png")}


def evaluate_folder(arguments: list[str], tmp_path: Path) -> dict:
    """The metrics that `eval_diffit.py` writes for the models of `--model_path`."""
    flags = ["--feature_extractor=helpers:mean_colours", "--num_images=24", "--num_inference_steps=2"]
    flags += [f"--work_dir={tmp_path / 'work'}", f"--output={tmp_path / 'metrics.json'}"]
    eval_diffit.main(eval_diffit.parse_args([NO_WORKERS, *arguments, *flags, "--metrics", "frechet_distance"]))
    return json.loads((tmp_path / "metrics.json").read_text())


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """Features for `--feature_extractor helpers:mean_colours`; shape (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def refusal(arguments: list[str], capsys) -> str:
    """The parser's error message for invalid arguments."""
    with pytest.raises(SystemExit) as error:
        parse_args(arguments)
    assert error.value.code == 2
    return capsys.readouterr().err


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


def wait_for_file(path: Path, process: subprocess.Popen | WarmProcess) -> None:
    """Waits until a running command has written a file or folder."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def readme_commands(script: str) -> list[list[str]]:
    """Arguments of a script in the shell commands of README.md."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    lines = [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines()]
    return [line[line.index(script) + 1 :] for line in lines if script in line]


def mentions(*words: object) -> re.Pattern:
    """A pattern for one line of text that holds each of these flags, values and names, in any order.

    Messages are matched by what a user needs in order to act, so that the words around it can improve. `1` is not
    found in `10`, `0.1` or `1.5`, nor `--seed` in `--seeds`.
    """
    patterns = []
    for word in map(str, words):
        start, end = (r"(?<!\w)(?<!\d\.)" if word[0].isalnum() else ""), (r"(?!\w|\.\d)" if word[-1].isalnum() else "")
        patterns.append(f"(?=.*{start}{re.escape(word)}{end})")
    return re.compile("".join(patterns))


# --- what a training leaves


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


def relative_differences(weights: dict, expected: dict) -> dict[str, float]:
    """|difference| / |expected| (norms) of each tensor, without the key bias and the `k_t` rows.

    These have no gradient in truth: under Adam they move by amplified rounding.
    """
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


# --- trainings written out


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
    torch.manual_seed(0)
    model = DiffiTUNet2DModel(**(TINY_TRAINED_CONFIG | config), num_class_embeds=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    times = (torch.linspace(0, 1, 1001, dtype=torch.float64) + 0.008) / 1.008
    signal = (times * torch.pi / 2).cos().square()  # cosine betas
    alphas = torch.cumprod(1 - (1 - signal[1:] / signal[:-1]).clamp(max=0.999), 0).float()
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
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


# --- tiny networks and pipelines


def tiny_unet(**kwargs) -> DiffiTUNet2DModel:
    torch.manual_seed(0)
    return DiffiTUNet2DModel(**TINY_CONFIG, zero_init_output=False, **kwargs).eval()


def tiny_dit(**kwargs) -> DiTTransformer2DModel:
    """A network of latents that predicts noise and variance."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "out_channels": 8, "sample_size": 8}
    return DiTTransformer2DModel(**config | {"num_embeds_ada_norm": 10} | kwargs).eval()


def tiny_vae(**config) -> AutoencoderKL:
    """A VAE with random weights that halves height and width."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{"block_out_channels": (8, 8), "norm_num_groups": 4} | blocks | config).eval()


def quiet(pipeline: DiffiTPipeline) -> DiffiTPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_pipeline(folder: Path, **kwargs) -> DiffiTPipeline:
    return quiet(DiffiTPipeline.from_folder(str(folder), model_class, **kwargs))


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_batches(network: torch.nn.Module) -> list[int]:
    """A list that gets the batch size of each forward pass of the network."""
    batches = []
    network.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape[0]))
    return batches


# A network in NVIDIA's layout; `side` is that of the token grid.
NVIDIA_SIZES = {
    **{"depth": 2, "width": 24, "heads": 2, "side": 4, "patch": 2, "mlp": 96},
    **{"in_channels": 4, "out_channels": 8, "classes": 1000},
}


def nvidia_tensors(dtype: torch.dtype = torch.float32, **overrides) -> dict[str, torch.Tensor]:
    """Random weights in NVIDIA's layout, written from the table of shapes; nothing in them is zero."""
    c = NVIDIA_SIZES | overrides
    width, side, patch = c["width"], c["side"], c["patch"]
    num_tokens = side**2
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    tensors = {
        "pos_embed": random(1, num_tokens, width),
        "y_embedder.embedding_table.weight": random(c["classes"] + 1, width),
    }

    def add_linear(name: str, outputs: int, *inputs: int) -> None:
        tensors[f"{name}.weight"] = random(outputs, *inputs, scale=math.prod(inputs) ** -0.5)
        tensors[f"{name}.bias"] = random(outputs, scale=0.2)

    add_linear("x_embedder.proj", width, c["in_channels"], patch, patch)
    add_linear("t_embedder.mlp.0", width, 256)
    add_linear("t_embedder.mlp.2", width, width)
    add_linear("final_layer.linear", patch**2 * c["out_channels"], width)
    for i in range(c["depth"]):
        attention = f"blocks.{i}.attn"
        tensors[f"{attention}.relative_position_bias_table"] = random((2 * side - 1) ** 2, c["heads"])
        tensors[f"{attention}.relative_position_index"] = torch.tensor(
            [
                [(i // side - j // side + side - 1) * (2 * side - 1) + i % side - j % side + side - 1]
                for i in range(num_tokens)
                for j in range(num_tokens)
            ]
        ).reshape(num_tokens, num_tokens)
        add_linear(f"{attention}.qkv", 3 * width, width)
        add_linear(f"{attention}.qkv_temb", 3 * width, width)
        add_linear(f"{attention}.proj", width, width)
        add_linear(f"blocks.{i}.mlp.fc1", c["mlp"], width)
        add_linear(f"blocks.{i}.mlp.fc2", width, c["mlp"])
    return tensors


# --- image files and data sets


def encode(image: PIL.Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def constant(mode: str, color: int | tuple[int, ...], file_format: str = "PNG", **options) -> bytes:
    """An image file of 4 x 4 equal pixels."""
    return encode(PIL.Image.new(mode, (4, 4), color), file_format, **options)


def noise_image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_files(root: Path, files: dict[str, int | str | bytes]) -> Path:
    """Writes grey images (given as int), texts and bytes into a folder, or into a zip if `root` ends in .zip."""
    for name, data in files.items():
        data = constant("L", data) if isinstance(data, int) else data.encode() if isinstance(data, str) else data
        if root.suffix == ".zip":
            with zipfile.ZipFile(root, "a") as archive:
                archive.writestr(name, data)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    return root


def load_table(source: Path, **options) -> ImageTable:
    """The table of a folder, a zip or a parquet file."""
    flag = "train_data_file" if source.suffix == ".parquet" else "train_data_dir"
    return load_image_table(SourceConfig(**{flag: str(source)}, cache_dir=str(source.parent / "cache"), **options))


def decode(data: bytes, resolution: tuple[int, int], num_channels: int = 3, **options) -> torch.Tensor:
    return decode_image("some.file", data, resolution, num_channels, **options)


def levels(pixels: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> grey levels (H, W, C) in [0, 255]."""
    return ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()


def make_dataset(source: Path, seed: int = 0, resolution: tuple[int, int] = (6, 6), **options) -> ImageDataset:
    table = load_table(source)
    return ImageDataset(table, PositionStream(len(table), seed), resolution, **options)


def item_at(dataset: ImageDataset, position: int) -> dict:
    return dataset[position, dataset.stream.index(position)]


def batch_at(dataset: StreamDataset, positions: Iterable[int]) -> Batch:
    return dataset.__getitems__([(position, dataset.stream.index(position)) for position in positions])
