"""The project's scripts on the fake GPU: each function runs one and returns the counts of its phases."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL

import prepare_latents
import train_diffit
import train_vae
from benchmarks.fake_gpu import ROOT
from benchmarks.fake_gpu.trace import Counts, Trace
from diffit import networks, validation
from diffit.config import parse_args
from diffit.devices import DeviceConfig, set_up_device
from diffit.latents import LATENTS_METADATA, latent_features, latent_shard_names
from diffit.networks import model_class, set_attention_backend
from diffit.source_config import SourceConfig
from diffit.vae_config import VaeConfig
from diffit_pipeline import EDM_SCHEDULERS, SCHEDULERS, DiffiTPipeline, component_name, null_label

SD_VAE = {  # config of stabilityai/sd-vae-ft-ema
    "_class_name": "AutoencoderKL",
    **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32},
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    **{"block_out_channels": [128, 256, 512, 512], "sample_size": 256, "scaling_factor": 0.18215},
}
SOURCES = ("train_data_dir", "train_data_file", "dataset_name", "latents_dir", "vae_model_name_or_path")
VAE_DIGEST = {"encoder_digest": "none", "scaling_factor": 0.18215, "shift_factor": 0.0}
NUM_ROWS = 8  # images of a generated data set, which training reads again and again


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_images(folder: Path, size: tuple[int, int], number: int = NUM_ROWS) -> list[str]:
    """Writes a folder of random color images in two classes; the flag that names it."""
    rng = np.random.default_rng(0)
    for index in range(number):
        file = folder / f"class_{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file)
    return [f"--train_data_dir={folder}"]


def write_vae(folder: Path, config: dict) -> list[str]:
    """Writes the config of a VAE, whose weights are never read; the flag that names it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return [f"--vae_model_name_or_path={folder}"]


def write_latents(folder: Path, shape: tuple[int, int, int], resolution: int, num_classes: int) -> list[str]:
    """Writes prepared latents, mirrored and with classes; the flag that names them."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    moments = rng.standard_normal((NUM_ROWS, 2 * shape[0], *shape[1:]), dtype=np.float32)
    columns = {"moments": moments, "mirrored_moments": moments[..., ::-1].copy(), "bad_image": [None] * NUM_ROWS}
    columns["label"] = [index % num_classes for index in range(NUM_ROWS)]
    features = latent_features(shape, True, tuple(f"class {index:04d}" for index in range(num_classes)))
    prepare_latents.write_shard(folder / latent_shard_names(NUM_ROWS, NUM_ROWS)[0], columns, features)
    metadata = {"latent_shape": list(shape), "resolution": [resolution] * 2, "mirrored": True, "num_images": NUM_ROWS}
    metadata |= VAE_DIGEST | {"data_digest": "none", "images_per_shard": NUM_ROWS, "source": "generated"}
    (folder / LATENTS_METADATA).write_text(json.dumps(metadata))
    return [f"--latents_dir={folder}"]


def shipped_flags(config: Path, folder: Path, *flags: str) -> list[str]:
    """Flags of a training by a shipped config, on generated data of its shape where the data are not shipped, too.

    Args:
        config: a file of `configs/train`.
        folder: a new folder, for data and output.
        flags: further flags.
    """
    asked = yaml.safe_load(config.read_text())
    model = json.loads((ROOT / asked["model_config"]).read_text())
    data = [f"--train_data_file={ROOT / asked['train_data_file']}"] if "train_data_file" in asked else []
    if "vae_model_name_or_path" in asked:
        size, resolution = model["sample_size"], asked.get("resolution")
        if "imagenet" in config.name:
            vae, size, classes = SD_VAE, resolution // 8, 1000
        else:
            vae, classes = (
                dict(
                    train_vae.build_vae(
                        VaeConfig(output_dir="", source=SourceConfig(train_data_dir="images")), 1
                    ).config
                ),
                10,
            )
            resolution = 32
        data = write_vae(folder / "vae", vae | {"scaling_factor": 0.18215, "_class_name": "AutoencoderKL"})
        data += write_latents(folder / "latents", (4, size, size), resolution, classes)
    elif not data:
        data = write_images(folder / "images", (model["sample_size"],) * 2)
    kept = {name: value for name, value in asked.items() if name not in SOURCES}
    kept["model_config"] = str(ROOT / asked["model_config"])
    kept["global_batch_size"] = asked["train_batch_size"]  # the steps of one of its processes
    (folder / "config.yaml").write_text(yaml.safe_dump(kept))
    return [f"--config={folder / 'config.yaml'}", *data, f"--output_dir={folder / 'run'}", *flags]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(flags: list[str], prepare: Callable | None = None) -> dict[str, Counts]:
    """Runs `train_diffit.main`, and returns the counts of its phases.

    These are "setup", "step 1", "step 2", ..., and after the last step "checkpoint", "validation" and, in it, the
    sampling: "preview". What follows a step without a wait, such as its EMA, belongs to the next one, as on a GPU.
    Neither checkpoints nor pipelines are written, because a file needs numbers.

    Args:
        flags: of `train_diffit.py`. `--dataloader_num_workers 0` is added.
        prepare: called first, to switch something on, or to break it: tests of the tests.
    """
    trace = Trace()
    with contextlib.ExitStack() as patches:
        for owner, name, replacement in (
            (train_diffit, "build_batches", functools.partial(_watch_batches, trace, train_diffit.build_batches)),
            (train_diffit, "save_checkpoint", lambda *args: trace.begin("checkpoint")),
            (train_diffit, "validate_and_export", _phase(trace, "validation", train_diffit.validate_and_export)),
            (train_diffit, "vae_description", lambda vae: VAE_DIGEST),
            (validation, "sample_shard", _phase(trace, "preview", validation.sample_shard)),
            (validation, "save_pipeline", lambda *args: None),
            (networks, "vae_description", lambda vae: VAE_DIGEST),
            (networks, "load_vae", _load_vae),
            (networks, "build_model", _on_device(networks.build_model)),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        if prepare is not None:
            prepare()
        config = parse_args([*flags, "--dataloader_num_workers=0", "--report_to=none"])
        patches.enter_context(trace)
        train_diffit.main(config)
    return trace.phases


def train_shipped(name: str, num_steps: int = 3, prepare: Callable | None = None) -> dict[str, Counts]:
    """Trains some steps by a shipped config: only the last one logs, and the sampler of its preview takes one step.

    Args:
        name: of a file in `configs/train`, without `.yaml`.
        num_steps: optimizer steps. The first one is not like the others, because it allocates the optimizer's state.
        prepare: see `train`.
    """
    periods = ("max_train_steps", "logging_steps", "checkpointing_steps", "validation_steps")
    short = [f"--{name}={num_steps}" for name in periods] + ["--lr_warmup_steps=0", "--validation_inference_steps=1"]
    with tempfile.TemporaryDirectory(prefix="diffit-fake-gpu-") as folder:
        return train(shipped_flags(ROOT / f"configs/train/{name}.yaml", Path(folder), *short), prepare)


def _watch_batches(trace: Trace, build_batches: Callable, *arguments) -> Iterator[dict]:
    """The same micro-batches; the first one of a step begins its phase."""
    accelerator = next(argument for argument in arguments if isinstance(argument, Accelerator))
    for index, batch in enumerate(build_batches(*arguments)):
        if index % accelerator.gradient_accumulation_steps == 0:
            trace.begin(f"step {index // accelerator.gradient_accumulation_steps + 1}")
        yield batch


def _phase(trace: Trace, name: str, function: Callable) -> Callable:
    """The function, in a phase of its own."""

    def wrapped(*args, **kwargs):
        before = next(key for key, counts in trace.phases.items() if counts is trace.now)
        trace.begin(name)
        try:
            return function(*args, **kwargs)
        finally:
            trace.begin(before)

    return wrapped


def _on_device(function: Callable) -> Callable:
    """The function, whose new tensors are on the fake device: initial weights of large networks take long on a CPU."""

    def wrapped(*args, **kwargs):
        with torch.device("cuda"):
            return function(*args, **kwargs)

    return wrapped


@_on_device
def _load_vae(path: str, flag: str = "") -> AutoencoderKL:
    return AutoencoderKL.from_config(AutoencoderKL.load_config(path)).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_shipped(name: str, more: dict, *arguments) -> Counts:
    """Samples by a network of `configs/model`; `more` are fields on top. For the other arguments see `sample`."""
    return sample(json.loads((ROOT / f"configs/model/{name}.json").read_text()) | more, *arguments)


def sample(config: dict, scheduler: str, batch_size: int, num_steps: int, options: dict | None = None) -> Counts:
    """Samples a batch with a pipeline, with classes if the network has them, and returns the counts.

    Args:
        config: the network's complete config.
        scheduler: a name in `SCHEDULERS` or `EDM_SCHEDULERS`.
        batch_size: images.
        num_steps: steps of the scheduler.
        options: arguments of the call, such as `guidance_scale`; and `dtype` of the weights, by its name.
    """
    options = dict(options or {})
    dtype = getattr(torch, options.pop("dtype", "float32"))
    trace = Trace()
    with trace, torch.device("cuda"):
        set_up_device(torch.device("cuda"), DeviceConfig())  # as the scripts do
        model = model_class(config).from_config(config).to(dtype).eval()
    with trace:
        set_attention_backend(model, "native")
        component = component_name(model)
        pipeline = DiffiTPipeline(
            scheduler=(SCHEDULERS | EDM_SCHEDULERS)[scheduler](),
            heun=scheduler == "edm_heun",
            **{"unet": None, component: model},
        )
        pipeline.set_progress_bar_config(disable=True)
        num_classes = null_label(model)
        labels = None if num_classes is None else [index % num_classes for index in range(batch_size)]
        trace.begin("sampling")
        pipeline(
            class_labels=labels,
            batch_size=batch_size,
            num_inference_steps=num_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch_size)],
            output_type="latent" if component == "transformer" else "np",
            **options,
        )
    return trace.phases["sampling"]


def decode(config: dict, batch_size: int, resolution: int, sliced: bool) -> Counts:
    """Decodes a batch of latents by a VAE, in float32.

    Args:
        config: the VAE's.
        batch_size: images.
        resolution: height and width in pixels.
        sliced: an image at a time, as sampling does.
    """
    trace = Trace()
    with trace, torch.device("cuda"), torch.no_grad():
        vae = AutoencoderKL.from_config(config).eval()
        if sliced:
            vae.enable_slicing()
        side = resolution // 2 ** (len(config["block_out_channels"]) - 1)
        latents = torch.randn(batch_size, config["latent_channels"], side, side)
        trace.begin("decoding")
        vae.decode(latents)
    return trace.phases["decoding"]
