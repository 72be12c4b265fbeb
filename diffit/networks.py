# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Networks and VAEs: checking their configs, building them, adapting saved weights, placing them on a device."""

import difflib
import inspect
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import ModelMixin, UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffit.config import ModelConfig
from diffit.cpu_kernels import kernelize
from diffit.errors import UserError, check_finite_weights, load_model, user_errors
from diffit.latents import CHANNEL_STATISTICS, LatentTable, load_vae, read_vae_config, vae_description
from diffit.pretrained import (
    FLAG,
    check_weights,
    has_vae,
    network_subfolder,
    pipeline_folder,
    read_class_names,
)
from diffit.processes import on_all_processes
from diffit.sharding import shard, wants_sharding
from diffit.sources import Table
from diffit.weight_copies import WeightCopies
from diffit_model import (
    DiffiTTransformer2DModel,
    DiffiTUNet2DModel,
    TimeDependentSelfAttention,
    align_bias_for_xformers,
    xformers_unsupported_reasons,
)
from diffit_pipeline import AUTOENCODERS, Autoencoder, latent_scaling

logger = get_logger(__name__, log_level="INFO")

AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def read_model_config(asked: ModelConfig) -> dict[str, Any]:
    """Reads the model config, applies --model_kwargs and checks both against the network's constructor.

    Raises:
        UserError: names the file or flag and the field.
    """
    flag = "--model_config" if asked.model_config else "--pretrained_model_name_or_path"
    path = asked.model_config or asked.pretrained_model_name_or_path
    if asked.model_config is None and Path(path).is_file():
        raise UserError(f"{flag} {path} is a file: give the folder that save_pretrained wrote")
    config = read_config_json(flag, path)
    with user_errors(f"{flag} {path}", Exception):
        parameters = inspect.signature(model_class(config).__init__).parameters
    overrides = model_overrides(asked)
    for source, values in ((f"{flag} {path}", config), ("--model_kwargs", overrides)):
        for key, value in values.items():
            if key.startswith("_") or key == "auto_map":
                continue
            if key not in parameters:
                similar = difflib.get_close_matches(key, parameters, n=1)
                hint = f", did you mean {similar[0]!r}?" if similar else ""
                raise UserError(f"{source}: {model_class(config).__name__} has no argument {key!r}{hint}")
            annotation = parameters[key].annotation
            if not fits(value, annotation):
                raise UserError(f"{source}: {key} must be {annotation}, got {value!r}")
    return config | overrides


def read_config_json(flag: str, path: str) -> dict[str, Any]:
    """Reads a network's config from a JSON file, a saved folder or the hub.

    Args:
        flag: flag with this path, for messages.
        path: path of the file or folder, or hub name.

    Raises:
        UserError: names the flag and the path if there is no valid config.
    """
    subfolder = None
    try:
        if Path(path).suffix == ".json":
            config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if not isinstance(config, dict):
                raise UserError(f"{flag} {path}: expected a JSON object, got {type(config).__name__}")
        else:
            subfolder = network_subfolder(path)
            config = UNet2DModel.load_config(path, subfolder=subfolder)  # works for any model class
            if not isinstance(config, dict):
                raise UserError(f"{flag} {path}: its config.json must contain a JSON object")
        return dict(config)
    except json.JSONDecodeError as error:
        raise UserError(f"{flag} {path} is not valid JSON: {error}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        place = f"{flag} {path}" if subfolder is None else f"{flag} {path}, {subfolder}"
        raise UserError(f"{place}: no such config on this machine or on the hub: {error}") from error


def model_overrides(asked: ModelConfig) -> dict[str, Any]:
    """The fields of the model config that --model_kwargs overrides."""
    pairs = [pair.split("=", 1) for pair in asked.model_kwargs or ()]
    return {key: config_value(text) for key, text in pairs}


def config_value(text: str):
    """Parses a value of --model_kwargs: YAML, plus numbers such as 1e-6, which PyYAML reads as strings."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--model_kwargs: {text!r} is not a plain YAML value: {error}") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def fits(value, annotation) -> bool:
    """Whether a value from JSON or YAML matches a type annotation; lists match tuples, and ints match floats."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        item_type = typing.get_args(annotation)[0]
        return isinstance(value, list | tuple) and all(fits(item, item_type) for item in value)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is type(None):
        return value is None
    return isinstance(value, int | float if annotation is float else annotation)


def vae_on_meta(path: str | None) -> Autoencoder | None:
    """The VAE of --vae_model_name_or_path on the meta device, without weights; None without a path.

    Raises:
        UserError: if there is no such VAE, or its scaling is not known.
    """
    if path is None:
        return None
    config = read_vae_config(path)
    with torch.device("meta"), user_errors(f"--vae_model_name_or_path {path}", Exception):
        vae = AUTOENCODERS[config["_class_name"]].from_config(config)
    with user_errors(f"--vae_model_name_or_path {path}", ValueError):
        latent_scaling(vae)
    return vae


def build_vae(path: str | None, table: Table, device: torch.device) -> Autoencoder | None:
    """Loads the frozen VAE of --vae_model_name_or_path in float32; None without a path.

    Raises:
        UserError: if its weights cannot be read, or prepared latents were encoded by another VAE.
    """
    if path is None:
        return None
    vae = load_vae(path)
    if isinstance(table, LatentTable):
        description = vae_description(vae)
        for key in dict.fromkeys([*description, *CHANNEL_STATISTICS, "vae_class"]):
            then, now = (values.get(key) for values in (table.metadata, description))
            if then != now:
                raise UserError(
                    f"--latents_dir {table.source} was encoded by a VAE with {key} {then}, but {path} has {now}"
                )
    return vae.to(device)


@dataclass(frozen=True)
class Networks:
    """The networks on the device: the trained model and, in latent space, the frozen VAE."""

    model: ModelMixin
    vae: Autoencoder | None


def build_networks(
    accelerator: Accelerator, model_config: dict[str, Any], asked: ModelConfig, table: Table, seed: int
) -> Networks:
    """Builds or loads the networks, moves them to the device and shards the model if asked to.

    Must be called by all processes.

    Args:
        accelerator: this process and its device.
        model_config: the network's complete config.
        asked: the flags of the network and the VAE.
        table: the training data; prepared latents record the VAE that encoded them.
        seed: seed of the initial weights.
    """
    torch.manual_seed(seed)
    pretrained = (asked.pretrained_model_name_or_path, asked.reset_class_embeddings, table.class_names)
    model = on_all_processes(accelerator, build_model, model_config, *pretrained)
    # Copies of all weights in low precision would undo the sharding.
    precision = "no" if wants_sharding(accelerator) else accelerator.mixed_precision
    set_up_model(model, asked, accelerator.device, precision)
    shard(accelerator, model)
    vae = on_all_processes(accelerator, build_vae, asked.vae_model_name_or_path, table, accelerator.device)
    if asked.pretrained_model_name_or_path is not None and accelerator.is_main_process:
        warn_of_other_latents(asked.pretrained_model_name_or_path, vae)
    return Networks(model, vae)


def warn_of_other_latents(pretrained: str, vae: Autoencoder | None) -> None:
    """Logs a warning if pretrained weights denoise other latents than those of this training, or pixels.

    Args:
        pretrained: path of the weights.
        vae: the VAE of this training, or None in pixel space.
    """
    pipeline = pipeline_folder(pretrained)
    if pipeline is None:
        return
    try:
        in_latents = has_vae(pipeline)
    except UserError:  # a network on the hub that belongs to no pipeline, or a damaged index
        return
    try:
        theirs = load_vae(pipeline, FLAG, subfolder="vae") if in_latents else None
    except UserError as error:
        logger.warning(f"the VAE that {pretrained} was trained with is not known: {error}")
        return
    spaces = ["pixel space" if each is None else "latent space" for each in (theirs, vae)]
    if spaces[0] != spaces[1]:
        logger.warning(f"{pretrained} was trained in {spaces[0]}, but this run trains in {spaces[1]}")
    if theirs is None or vae is None:
        return
    then, now = vae_description(theirs), vae_description(vae)
    for key in then | now:
        if then.get(key) != now.get(key):
            logger.warning(
                f"{pretrained} was trained in the latents of a VAE with {key} {then.get(key)}, but "
                f"--vae_model_name_or_path {vae.config.get('_name_or_path')} has {now.get(key)}"
            )


def build_model(
    config: dict,
    pretrained: str | None = None,
    reset_class_embeddings: bool | None = None,
    class_names: tuple[str, ...] | None = None,
) -> ModelMixin:
    """Builds a network with new or pretrained weights.

    Pretrained weights are adapted to another resolution or other classes (see `adapt_weights`). Changes are logged,
    and so is which weights of a pipeline or checkpoint they are (see `network_subfolder`).

    Args:
        config: the network's complete config.
        pretrained: folder or hub name of pretrained weights, or None.
        reset_class_embeddings: whether to re-initialize the embeddings of as many classes; None means if their names
            differ.
        class_names: of the training data, or None.

    Raises:
        UserError: if there are no safetensors weights, or some of them are damaged or do not fit the network.
    """
    model = model_class(config).from_config(config)
    if pretrained is None:
        return model
    subfolder = network_subfolder(pretrained)
    name = pretrained if subfolder is None else f"{pretrained}, {subfolder}"
    check_weights(f"--pretrained_model_name_or_path {name}", Path(pretrained, subfolder or "").absolute())
    source = load_model(
        f"--pretrained_model_name_or_path {name}: cannot read safetensors weights (.bin and .pt are not read)",
        *(model_class(config).from_pretrained, pretrained),
        subfolder=subfolder,
        use_safetensors=True,
    )
    check_finite_weights(f"--pretrained_model_name_or_path {name}", source)
    with user_errors(f"--pretrained_model_name_or_path {pretrained}", ValueError):
        names = (read_class_names(pretrained), class_names) if reset_class_embeddings is None else None
        weights, changes = adapt_weights(source, model, bool(reset_class_embeddings), names)
    logger.info(f"initial weights: {name}")
    for change in changes:
        logger.warning(f"{pretrained}: {change}")
    model.load_state_dict(weights)
    return model


def sample_shape(config: dict) -> tuple[int, int, int]:
    """Channels, height and width (in pixels or latents) of a network's input, from its complete config."""
    size = config["sample_size"]
    return (config["in_channels"], *([size, size] if isinstance(size, int) else size))


def training_flops_per_image(config: dict) -> int:
    """Counts the FLOPs (multiplications and additions) of training on one image, on the meta device.

    The backward pass is counted as twice the forward pass.
    """
    with torch.device("meta"):
        model = model_class(config).from_config(config).eval()
        sample = torch.empty(1, *sample_shape(config))
        timestep = torch.zeros(1)
        # UNet2DModel requires labels, while our networks read None as the null class.
        needs_labels = isinstance(model, UNet2DModel) and config["num_class_embeds"] is not None
        labels = torch.zeros(1, dtype=torch.long) if needs_labels else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample, timestep, class_labels=labels)
    return 3 * counter.get_total_flops()


def set_up_model(model: ModelMixin, asked: ModelConfig, device: torch.device, mixed_precision: str = "no") -> None:
    """Moves a network to its device, and sets up attention, gradient checkpointing, compilation and CPU kernels.

    Args:
        model: the network; modified in place.
        asked: the flags of the network.
        device: device to train on.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`: the autocast for which copies of the weights in low precision
            are kept (see `WeightCopies`).

    Raises:
        UserError: if the attention backend cannot train on the device.
    """
    model.to(device)
    backend = asked.attention_backend
    if backend == "xformers" and device.type != "cuda":
        raise UserError(f"--attention_backend xformers needs CUDA, but the device is {device.type}")
    if backend == "xformers" and asked.compile:
        logger.warning("--compile: --attention_backend xformers cannot be compiled, so each attention runs eagerly")
    if backend == "flex" and device.type in ("cpu", "mps"):
        raise UserError(
            f"--attention_backend flex cannot train on the device {device.type}, where it has no backward pass: use "
            "native"
        )
    set_attention_backend(model, backend)
    if asked.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if asked.compile or backend == "flex":
        # One variant per resolution, width and mode (training, validation); torch's default limit is 8 variants.
        torch._dynamo.config.recompile_limit = 64
    if asked.compile:  # in place, which keeps the names of the weights
        # With static shapes: otherwise the second resolution would recompile a block for symbolic ones.
        model.compile_repeated_blocks(dynamic=False) if model._repeated_blocks else model.compile()
    elif mixed_precision in AUTOCAST_DTYPES and model._repeated_blocks:  # compiled blocks fuse the conversions
        WeightCopies(model, AUTOCAST_DTYPES[mixed_precision])
    kernelize(model)


# ---------------------------------------------------------------------------------------------------------------------
# Network classes and attention backends

MODEL_CLASSES = {
    "DiffiTUNet2DModel": DiffiTUNet2DModel,
    "DiffiTTransformer2DModel": DiffiTTransformer2DModel,
    "UNet2DModel": UNet2DModel,
}


def model_class(config: dict) -> type[ModelMixin]:
    """The class of the network that a config describes.

    Args:
        config: contents of a `config.json`; the default of `_class_name` is `DiffiTUNet2DModel`.

    Raises:
        ValueError: if `_class_name` is not in `MODEL_CLASSES`.
    """
    name = config.get("_class_name", "DiffiTUNet2DModel")
    if not isinstance(name, str) or name not in MODEL_CLASSES:
        raise ValueError(f"`_class_name` must be one of {', '.join(MODEL_CLASSES)}, got {name!r}")
    return MODEL_CLASSES[name]


def why_not_xformers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why xformers' operators cannot run all attentions of a model, forward and backward, or None.

    Args:
        model: a network with DiffiT attention, or any other module.
        device: the device it will run on.
        dtype: float type of queries, keys and values.
    """
    if device.type != "cuda":
        return f"xformers needs CUDA, but the device is {device.type}"
    attentions = [module for module in model.modules() if isinstance(module, TimeDependentSelfAttention)]
    if not attentions:
        return "the model has no DiffiT attention"
    shapes = {(1, math.prod(each.window), each.num_attention_heads, each.attention_head_dim) for each in attentions}
    for shape in sorted(shapes):
        probe = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
        bias = torch.empty(1, shape[2], shape[1], shape[1], device=device, dtype=dtype, requires_grad=True)
        reasons = xformers_unsupported_reasons(probe, probe, probe, align_bias_for_xformers(bias, 1))
        if reasons:
            return "; ".join(reasons)
    return None


def set_attention_backend(model: ModelMixin, backend: str) -> None:
    """Sets the backend of this model only: diffusers' method of the same name also changes the process-wide default.

    Args:
        model: network whose attention modules get the backend; `UNet2DModel` supports only `native` and `xformers`.
        backend: a backend of diffusers' dispatcher, or `auto`, which means `native`: on CUDA, xformers' only operators
            that take a bias are the kernel of torch's memory-efficient SDPA, with more work for the host.

    Raises:
        ValueError: if the model does not support the backend.
    """
    backend = "native" if backend == "auto" else backend
    if isinstance(model, UNet2DModel):
        if backend not in ("native", "xformers"):
            raise ValueError(f"UNet2DModel supports the attention backends native and xformers, got {backend!r}")
        if backend == "xformers":
            model.enable_xformers_memory_efficient_attention()
        return
    for module in model.modules():
        if isinstance(module, TimeDependentSelfAttention):
            module.set_attention_backend(backend)


# ---------------------------------------------------------------------------------------------------------------------
# Weights for another resolution or other classes


def adapt_weights(
    source: ModelMixin,
    target: ModelMixin,
    reset_class_embeddings: bool = False,
    class_names: tuple[tuple[str, ...] | None, tuple[str, ...] | None] | None = None,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Adapts a network's weights to another resolution or other classes, for fine-tuning.

    Relative position bias tables and position embeddings are interpolated. Class embeddings are re-initialized if the
    number of classes differs, or on request. The null class keeps its prediction: its embedding is copied, set to zero
    if `source` has no classes, or folded into the time embedding if `target` has none. The embedding of augmentation
    labels and the output channels of a learned variance are dropped, or added with weights of zero; neither changes
    what is predicted besides.

    Args:
        source: network with the weights; not modified.
        target: initialized network that will load them; not modified.
        reset_class_embeddings: re-initialize the class embeddings even if the number of classes is unchanged.
        class_names: of `source` and of `target`, each None if unknown. As many but other classes are re-initialized,
            the same classes in another order are reordered. None compares no names.

    Returns:
        A state dict for `target`, and a description of each kind of change.

    Raises:
        ValueError: lists the weights that do not fit `target`.
    """
    weights, target_weights = source.state_dict(), target.state_dict()
    changes = _interpolate_positions(source, target, weights)
    changes += _adapt_class_embeddings(weights, target_weights, reset_class_embeddings, class_names)
    changes += _adapt_learned_variance(source, target, weights)

    name = "augment_embedding.weight"
    if name in weights and name not in target_weights:
        del weights[name]
        changes.append("augmentation labels dropped")
    elif name in target_weights and name not in weights:
        weights[name] = torch.zeros_like(target_weights[name])
        changes.append("augmentation labels added with weights of zero")

    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, target_weights)
    )
    misfits = [
        f"{name} (has {ours.get(name, 'nothing')}, needs {theirs.get(name, 'nothing')})"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]
    if misfits:
        raise ValueError(f"{len(misfits)} weights do not fit the network: {', '.join(misfits[:8])}")
    return weights, changes


def _interpolate_positions(source: ModelMixin, target: ModelMixin, weights: dict[str, torch.Tensor]) -> list[str]:
    """Resizes bias tables and position embeddings in `weights` to the grids of `target`; describes each change."""
    resized = {}
    target_names = target.state_dict().keys()
    for name in [name for name in weights if name in target_names]:
        module_name, _, weight_name = name.rpartition(".")
        if weight_name == "relative_position_bias_table":
            grids = [model.get_submodule(module_name).window for model in (source, target)]
            sizes = [(2 * height - 1, 2 * width - 1) for height, width in grids]
            weights[name] = resize_grid(weights[name], *sizes)
        elif name == "position_embedding":
            grids = [model.token_grid for model in (source, target)]
            weights[name] = resize_grid(weights[name][0], *grids)[None]
        else:
            continue
        if grids[0] != grids[1]:
            resized.setdefault((weight_name, *grids), []).append(name)
    return [
        f"{len(names)} x {weight_name} interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} tokens"
        for (weight_name, old, new), names in resized.items()
    ]


def _adapt_class_embeddings(
    weights: dict[str, torch.Tensor],
    target_weights: dict[str, torch.Tensor],
    reset: bool,
    names: tuple[tuple[str, ...] | None, tuple[str, ...] | None] | None = None,
) -> list[str]:
    """Replaces class embeddings in `weights` that do not fit, except the last row, which is the null class."""
    name = "class_embedding.weight"
    rows, new_rows = weights.get(name), target_weights.get(name)
    if rows is None and new_rows is None:
        return []
    if new_rows is None:
        del weights[name]
        bias = "time_embedding.linear_2.bias"
        weights[bias] = weights[bias] + rows[-1]
        return ["class embeddings dropped, null class folded into the time embedding"]
    if rows is None:
        weights[name] = torch.cat([new_rows[:-1], torch.zeros_like(new_rows[-1:])])
        return [f"{len(new_rows) - 1} class embeddings initialized, null class set to zero"]
    if reset or len(rows) != len(new_rows):
        weights[name] = torch.cat([new_rows[:-1], rows[-1:]])
        return [f"{len(new_rows) - 1} class embeddings re-initialized, null class kept"]
    return [] if names is None else _match_class_embeddings(weights, new_rows, *names)


def _match_class_embeddings(
    weights: dict[str, torch.Tensor],
    new_rows: torch.Tensor,
    source_names: tuple[str, ...] | None,
    names: tuple[str, ...] | None,
) -> list[str]:
    """Gives each class of the target its embedding in `weights`; re-initializes all of them if the names differ."""
    name, number = "class_embedding.weight", len(new_rows) - 1
    if source_names is None or names is None or len(source_names) != number:
        return [
            f"{number} class embeddings kept in their order, because the names of its classes are unknown; "
            "--reset_class_embeddings re-initializes them"
        ]
    if source_names == names:
        return []
    rows = weights[name]
    if set(source_names) == set(names) and len(set(names)) == number:
        weights[name] = torch.cat([rows[[source_names.index(each) for each in names]], rows[-1:]])
        return [f"{number} class embeddings put into the order of the classes of the data"]
    weights[name] = torch.cat([new_rows[:-1], rows[-1:]])
    theirs, ours = next(pair for pair in zip(source_names, names, strict=True) if pair[0] != pair[1])
    return [
        f"{number} class embeddings re-initialized, null class kept: the data has as many but other classes, such as "
        f"{ours!r} instead of {theirs!r}; --no-reset_class_embeddings keeps them"
    ]


def _adapt_learned_variance(source: ModelMixin, target: ModelMixin, weights: dict[str, torch.Tensor]) -> list[str]:
    """Drops the output channels of a learned variance, or adds them with weights of zero; what is predicted stays."""
    channels, old, new = source.config.in_channels, source.config.out_channels, target.config.out_channels
    if not isinstance(source, DiffiTTransformer2DModel) or {old, new} != {channels, 2 * channels}:
        return []
    for name in ("proj_out.weight", "proj_out.bias"):
        # The output channels are the innermost axis of the rows, see the network's `forward`.
        rows = weights[name].reshape(-1, old, *weights[name].shape[1:])  # (p * p, old channels, ...)
        kept = rows[:, :channels]
        if new > old:
            kept = torch.cat([kept, torch.zeros_like(kept)], dim=1)
        weights[name] = kept.flatten(0, 1).contiguous()  # (p * p * new channels, ...)
    return [f"learned variance {'added with weights of zero' if new > old else 'dropped'}"]


def resize_grid(rows: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """Resizes a grid of vectors with bicubic interpolation, as Swin resizes bias tables; the center is preserved.

    Args:
        rows: vectors in row-major order, any float dtype; shape (height * width, K).
        size: height and width of the grid.
        new_size: height and width of the new grid.

    Returns:
        Vectors in the dtype of `rows`, shape (new height * new width, K).
    """
    if size == new_size:
        return rows
    grid = rows.double().T.reshape(1, -1, *size)  # (1, K, height, width)
    grid = F.interpolate(grid, size=new_size, mode="bicubic")  # (1, K, new height, new width)
    return grid.flatten(2)[0].T.contiguous().to(rows.dtype)
