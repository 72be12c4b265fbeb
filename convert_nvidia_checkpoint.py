# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Converts NVIDIA's latent DiffiT checkpoints to folders that diffusers loads, and trained models back.

    python convert_nvidia_checkpoint.py --checkpoint diffit_256.safetensors --output_dir diffit-256 \\
        --vae stabilityai/sd-vae-ft-ema
    python convert_nvidia_checkpoint.py --to_nvidia --checkpoint diffit-256 --output_dir back

The folder is a `DiTPipeline`: `transformer/`, a DDIM `scheduler/`, and `vae/` if `--vae` is given.
`DiTPipeline.from_pretrained("diffit-256", trust_remote_code=True)` loads it; if it has no `vae/`, pass `vae=` as well.
In the other direction, `--output_dir` will hold `diffit.safetensors`. Weights are copied bit for bit, and the model
config is inferred from their shapes. XL/2 (561 M parameters, 2.3 GB) takes seconds and 2.3 GB of memory, not counting
the imports.
"""

from diffit.convert_config import ConvertConfig, parse_args

if __name__ == "__main__":
    CONFIG = parse_args(description=__doc__)  # before the slow imports, so that a refused flag is answered at once

import json
import math
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffit.command_line import run_script
from diffit.errors import UserError, user_errors
from diffit.latents import load_vae
from diffit.pretrained import check_weights, model_folder, network_subfolder
from diffit.run_dir import OutputFolder, listed
from diffit.scheduler_configs import complete_scheduler_config
from diffit_model import DiffiTTransformer2DModel, relative_position_index

# Module names in NVIDIA's layout that differ in `DiffiTTransformer2DModel`; names inside the blocks are the same.
OUR_NAMES = {
    "pos_embed": "position_embedding",
    "x_embedder.proj": "patch_embedding",
    "t_embedder.mlp.0": "time_embedding.linear_1",
    "t_embedder.mlp.2": "time_embedding.linear_2",
    "y_embedder.embedding_table": "class_embedding",
    "final_layer.linear": "proj_out",
}
# The objective and the noise schedule of the released weights, which the layout does not record.
NVIDIA_OBJECTIVE = {
    **{"prediction_type": "epsilon", "num_train_timesteps": 1000},
    **{"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = "relative_position_index"  # the only tensor of a block that is not a weight; int64
LINEAR_LAYERS_OF_A_BLOCK = ("attn.qkv", "attn.qkv_temb", "attn.proj", "mlp.fc1", "mlp.fc2")


def rename(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Renames the modules (names without `.weight` or `.bias`) that are in `names`; other tensors keep their names."""
    renamed = {}
    for name, tensor in tensors.items():
        module_name, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups(default="")
        renamed[names.get(module_name, module_name) + suffix] = tensor
    return renamed


def nvidia_names(num_layers: int) -> list[str]:
    """Names of all tensors in NVIDIA's layout for `num_layers` blocks: 346 names for 28 blocks."""
    names = ["pos_embed", "y_embedder.embedding_table.weight"]
    modules = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    for i in range(num_layers):
        names += [f"blocks.{i}.attn.relative_position_{what}" for what in ("bias_table", "index")]
        modules += [f"blocks.{i}.{layer}" for layer in LINEAR_LAYERS_OF_A_BLOCK]
    return names + [f"{module}.{what}" for module in modules for what in ("weight", "bias")]


def check_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Checks that the names match NVIDIA's layout, for the number of blocks found, and that the tensors hold weights.

    Raises:
        ValueError: lists the missing and the unknown names, or the tensors that are empty, not finite or no floats.
    """
    # At most four digits: a damaged name must not make the list of what is missing grow without bound.
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,4})\.", name))]
    expected = nvidia_names(max(blocks, default=0) + 1)
    missing = [name for name in expected if name not in tensors]
    unknown = sorted(name[:100] for name in tensors.keys() - set(expected))
    if missing or unknown:
        raise ValueError(
            f"not NVIDIA's layout: {len(missing)} keys are missing ({listed(missing) or 'none'}), "
            f"{len(unknown)} are unknown ({listed(unknown) or 'none'})"
        )

    def is_dense(name: str) -> bool:
        dtypes = (torch.int64,) if name.endswith(INDEX) else WEIGHT_DTYPES
        return tensors[name].dtype in dtypes and tensors[name].layout == torch.strided and not tensors[name].is_meta

    dtypes = ", ".join(map(str, WEIGHT_DTYPES))
    for what, is_valid in (
        ("no elements", lambda name: tensors[name].numel() > 0),
        (f"expected dense tensors of {dtypes}, or of torch.int64 for {INDEX}", is_dense),
        ("NaN or infinite values", lambda name: tensors[name].isfinite().all()),
    ):
        if wrong := [name for name in tensors if not is_valid(name)]:
            first = tensors[wrong[0]]
            raise ValueError(f"{listed(wrong)}: {what}; got {first.dtype} of shape {tuple(first.shape)}")


def infer_config(tensors: dict[str, torch.Tensor]) -> dict:
    """Infers the arguments of `DiffiTTransformer2DModel` from the shapes of the weights.

    Args:
        tensors: weights in NVIDIA's layout, with no name missing.

    Raises:
        ValueError: names the tensors whose shapes contradict each other.
    """

    def shape(name: str, num_dimensions: int) -> torch.Size:
        if tensors[name].ndim != num_dimensions:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {num_dimensions} dimensions")
        return tensors[name].shape

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    num_tokens = shape("pos_embed", 3)[1]
    num_offsets, num_heads = shape("blocks.0.attn.relative_position_bias_table", 2)
    side = (math.isqrt(num_offsets) + 1) // 2  # of the token grid
    if (2 * side - 1) ** 2 != num_offsets or side**2 != num_tokens:
        raise ValueError(
            f"the {num_offsets} rows of relative_position_bias_table do not fit the {num_tokens} tokens of pos_embed: "
            "W x W tokens have (2W - 1)^2 rows"
        )
    if hidden_size % num_heads:
        raise ValueError(f"the width {hidden_size} of x_embedder does not divide into {num_heads} heads")
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden_size // num_heads,
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight", 2)[0] // patch_size**2,
        "num_layers": sum(name.endswith("relative_position_bias_table") for name in tensors),
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden_size,
        "num_embeds_ada_norm": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
    }


def model_from_nvidia(tensors: dict[str, torch.Tensor]) -> DiffiTTransformer2DModel:
    """Builds a network that shares these tensors as its weights.

    Its derived buffers stay on the meta device, so it can be saved but not run.

    Args:
        tensors: weights in NVIDIA's layout.

    Raises:
        ValueError: lists the names, shapes or relative position indices that do not match the layout.
    """
    check_tensors(tensors)
    with torch.device("meta"):
        model = DiffiTTransformer2DModel(**infer_config(tensors))
    weights, index = {}, None
    for name, tensor in rename(tensors, OUR_NAMES).items():
        if not name.endswith(INDEX):
            weights[name] = tensor
            continue
        fits = tuple(tensor.shape) == (math.prod(model.token_grid),) * 2  # asked first: a huge index exhausts memory
        index = relative_position_index(model.token_grid) if fits and index is None else index
        if not fits or not tensor.equal(index):  # would permute rows of the bias tables
            raise ValueError(f"{name} is not the index of a grid of {' x '.join(map(str, model.token_grid))} tokens")
    misfits = [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted.shape)}"
        for name, wanted in model.state_dict().items()
        if weights[name].shape != wanted.shape
    ]
    if misfits:
        raise ValueError(f"{len(misfits)} shapes contradict each other: {listed(misfits)}")
    model.load_state_dict(weights, assign=True)
    return model


def nvidia_from_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts weights to NVIDIA's layout: the inverse of `model_from_nvidia`.

    Args:
        weights: state dict of a class-conditional `DiffiTTransformer2DModel` for square latents.

    Raises:
        ValueError: if NVIDIA's layout cannot represent this network.
    """
    tensors = rename(weights, {ours: theirs for theirs, ours in OUR_NAMES.items()})
    positions = weights.get("position_embedding")
    if positions is None or positions.ndim != 3:
        raise ValueError("these are not the weights of a DiffiTTransformer2DModel")
    side = math.isqrt(positions.shape[1])
    index = relative_position_index((side, side))
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")]:
        tensors[name.replace("bias_table", "index")] = index.clone()  # safetensors refuses tensors that share memory
    model_from_nvidia(tensors)  # for its checks
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Loads tensors by name, memory-mapped.

    Raises:
        UserError: names --checkpoint, if the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"--checkpoint {path} is damaged or not a .safetensors file: {error}") from error


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Loads tensors by name from a `.safetensors` file, or from a `.pt` file that holds nothing but tensors.

    Raises:
        UserError: names --checkpoint, if the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix != ".pt":
        raise UserError(f"--checkpoint {path}: expected a .safetensors or .pt file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message suggests loading the file without `weights_only`
        raise UserError(
            f"--checkpoint {path} is damaged, or holds more than tensors ({type(error).__name__})"
        ) from error
    is_named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_named or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        found = listed(list(map(str, tensors))) if isinstance(tensors, dict) else type(tensors).__name__
        raise UserError(f"--checkpoint {path} must hold a dictionary of tensors, it holds {found}")
    return tensors


def read_trained_folder(path: Path) -> dict[str, torch.Tensor]:
    """Loads the weights of a saved `DiffiTTransformer2DModel`, and prints which they are.

    Args:
        path: folder of the network, of a pipeline that has it in `transformer/`, or of a checkpoint, whose first
            average is taken, as for sampling, evaluation and fine-tuning.

    Raises:
        UserError: names --checkpoint, if the weights are missing or damaged, or --to_nvidia, if they were trained for
            another objective than NVIDIA's.
    """
    if not path.is_dir():
        raise UserError(f"--checkpoint {path}: no such folder")
    file = path / (network_subfolder(str(path)) or "") / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise UserError(f"--checkpoint {path}: {file} is missing")
    check_weights(f"--checkpoint {path}", file.parent.absolute())
    check_objective(path)
    print(f"weights: {file}")
    return read_safetensors(file)


def check_objective(path: Path) -> None:
    """Refuses weights of another objective or noise schedule than NVIDIA's, which its layout cannot record.

    The scheduler is the one in the folder or, for the folder of a network, in the pipeline or checkpoint around it.
    Without one, a line says that nothing was checked.

    Raises:
        UserError: names --to_nvidia and all settings that differ.
    """
    home = model_folder(str(path), "--checkpoint")
    file = Path(home or path, "scheduler", "scheduler_config.json")
    if not file.is_file():
        print(f"--checkpoint {path} has no scheduler: make sure that it was trained with {NVIDIA_OBJECTIVE}")
        return
    with user_errors(f"--checkpoint {path}: {file.name} is damaged", ValueError, TypeError):
        scheduler = complete_scheduler_config(dict(json.loads(file.read_text())))
    expected = NVIDIA_OBJECTIVE | {"trained_betas": None, "rescale_betas_zero_snr": False}
    differ = [
        f"{name} {scheduler.get(name)}" for name, value in expected.items() if scheduler.get(name, value) != value
    ]
    if "beta_schedule" not in scheduler:  # EDM, flow matching
        differ.append("no beta_schedule")
    if differ:
        raise UserError(
            f"--to_nvidia: {path} was trained with {scheduler.get('_class_name')}, {', '.join(differ)}; NVIDIA's "
            f"layout implies {', '.join(f'{name} {value}' for name, value in NVIDIA_OBJECTIVE.items())}"
        )


def main(config: ConvertConfig) -> None:
    """Reads, converts and writes. If anything is wrong, nothing is written."""
    checkpoint, output_dir = Path(config.checkpoint), Path(config.output_dir)
    folder = OutputFolder(output_dir, Path(__file__).name)
    if config.to_nvidia:
        weights = read_trained_folder(checkpoint)
        with user_errors(f"--checkpoint {checkpoint}", ValueError):
            tensors = nvidia_from_weights(weights)
        folder.create()
        save_file(tensors, output_dir / "diffit.safetensors")
        print(f"{len(tensors)} tensors: {output_dir / 'diffit.safetensors'}")
        return

    tensors = read_checkpoint(checkpoint)
    with user_errors(f"--checkpoint {checkpoint}", ValueError):
        model = model_from_nvidia(tensors)
    vae = None
    if config.vae is not None:
        vae = load_vae(config.vae, "--vae")
        if not isinstance(vae, AutoencoderKL):
            raise UserError(
                f"--vae {config.vae} is an {type(vae).__name__}: a DiTPipeline decodes with an AutoencoderKL"
            )
        if vae.config.latent_channels != model.config.in_channels:
            raise UserError(
                f"--vae {config.vae} has {vae.config.latent_channels} latent channels, "
                f"the checkpoint {model.config.in_channels}"
            )
        if any(vae.config[name] for name in ("shift_factor", "latents_mean", "latents_std")):
            raise UserError(
                f"--vae {config.vae} has a shift_factor, latents_mean or latents_std, which diffusers' DiTPipeline "
                "ignores: its images would be wrong"
            )
    # The diffusion process of the training. Clipping is off because latents are not confined to [-1, 1].
    scheduler = DDIMScheduler(**NVIDIA_OBJECTIVE, clip_sample=False)
    pipeline = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)
    folder.create()
    for name, component in pipeline.components.items():
        if component is not None:
            component.save_pretrained(output_dir / name)
    pipeline.save_config(output_dir)
    millions, tokens = model.num_parameters() / 1e6, " x ".join(map(str, model.token_grid))
    print(
        f"{millions:.1f} M parameters, {model.config.num_layers} blocks, {tokens} tokens, {model.null_label} classes: "
        f"{output_dir}"
    )


if __name__ == "__main__":
    run_script(main, CONFIG)
