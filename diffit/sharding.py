# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sharding of the training state by FSDP2, as the answers to `accelerate config` ask for it.

Each process holds its shard (a `DTensor`) of every weight, gradient, optimizer state and average. Around each block,
the weights of that block are gathered, used and freed. Everything else stays what it is without sharding:

- Files hold whole tensors: they are gathered in the main process's memory, and each process takes its shard of what it
  reads. So a checkpoint resumes on any number of processes, sharded or not.
- Previews, held-out loss and metrics: each process holds the whole network meanwhile and proceeds at its own pace, so
  numbers of batches and stop requests may differ between processes. The network must fit on each device once, without
  gradients, as it must to be sampled after training.
- bf16 is autocast, as without sharding, rather than FSDP's mixed-precision policy: norms, embeddings and the residual
  stream keep their precision, and FSDP's policy would round the noise levels that the network is given as well. The
  price: weights are gathered in float32, and autocast's copies live until backward without --gradient_checkpointing.

Every function but those of the last section also takes unsharded networks and tensors, and then does nothing, so its
callers need not ask.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend, convert_outputs_to_fp32, fsdp2_prepare_model
from diffusers import ModelMixin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from diffit.errors import UserError

logger = get_logger(__name__, log_level="INFO")

EXAMPLE = "see configs/accelerate/fsdp2.yaml"
# diffusers' `UNet2DModel` does not say which of its modules are to be sharded as one.
UNITS = ["ResnetBlock2D", "Attention"]


def wants_sharding(accelerator: Accelerator) -> bool:
    """Whether the answers to `accelerate config` ask for FSDP, and accelerate follows them."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, optimizer: str, compiles: bool, attention_backend: str) -> None:
    """Refuses answers to `accelerate config` and flags that sharding does not support.

    Args:
        accelerator: this run's accelerator.
        optimizer: --optimizer.
        compiles: --compile.
        attention_backend: --attention_backend.

    Raises:
        UserError: names the answer or the flag.
    """
    state = accelerator.state
    if state.distributed_type != DistributedType.FSDP:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # which accelerate ignores in silence
            raise UserError(
                f"the answers to accelerate config ask for FSDP, which needs several GPUs: this run has "
                f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
            )
        return
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_version {plugin.fsdp_version} is not supported: answer 2 ({EXAMPLE})")
    wants_transformer_wrap = plugin.auto_wrap_policy is transformer_auto_wrap_policy
    unsupported = {
        "fsdp_reshard_after_forward: false": not plugin.reshard_after_forward,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_auto_wrap_policy other than TRANSFORMER_BASED_WRAP": not wants_transformer_wrap,
        "fsdp_transformer_layer_cls_to_wrap (the network says it itself)": plugin.transformer_cls_names_to_wrap,
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: true (give --gradient_checkpointing)": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules,
        "parallelism_config": accelerator.parallelism_config,
        "dynamo_config": state.dynamo_plugin.backend != DynamoBackend.NO,
    }
    for answer, is_given in unsupported.items():
        if is_given:
            raise UserError(f"accelerate config: {answer} is not supported ({EXAMPLE})")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {accelerator.mixed_precision} is not supported with FSDP: use bf16")
    if optimizer != "adamw":
        raise UserError(f"--optimizer {optimizer} needs whole matrices, which FSDP shards: use --optimizer adamw")
    if compiles or attention_backend == "flex":
        flag = "--compile" if compiles else "--attention_backend flex, which is compiled,"
        raise UserError(f"{flag} is not supported with FSDP")


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def unit_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together, without the network itself, whose unit is all the rest."""
    names = getattr(model, "_no_split_modules", None) or UNITS
    # A class that replaces a reference layer (see `diffit.cpu_kernels`) counts as that layer.
    return [module for module in model.modules() if any(base.__name__ in names for base in type(module).__mro__)]


def shard(accelerator: Accelerator, model: ModelMixin) -> None:
    """Shards the network in place if the run is sharded; build optimizer and averages of its weights afterwards.

    Args:
        accelerator: this run's accelerator, which `check_sharding` has accepted.
        model: the network, the same in all processes, on the device.
    """
    if not wants_sharding(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted({type(module).__name__ for module in unit_modules(model)})
    plugin.mixed_precision_policy = None  # accelerate has set one for bf16; autocast takes its place
    if accelerator.mixed_precision == "bf16":  # as accelerate does for DDP
        # Without its cache, which would hold the whole network in bf16 until the end of the forward pass.
        autocast = torch.autocast(accelerator.device.type, dtype=torch.bfloat16, cache_enabled=False)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    name = type(model).__name__
    fsdp2_prepare_model(accelerator, model)
    type(model).__name__ = name  # FSDP's own class of the network adds a prefix to the name, which others look at
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    logger.info(f"sharded by FSDP2: {units} units over {accelerator.num_processes} processes")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has sharded the network."""
    return isinstance(model, FSDPModule)


def prepare(
    accelerator: Accelerator, model: ModelMixin, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """accelerate's wrappers of network and optimizer; a sharded network has none and is returned as it is."""
    if is_sharded(model):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every process holds the whole network for the duration of a `with` block, and may use it without the others.

    All processes must enter it; gradients must not be computed inside, nor weights changed.
    """
    if not is_sharded(model):
        yield
        return
    units = [module for module in unit_modules(model) if isinstance(module, FSDPModule)]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:  # the others keep their weights after a forward pass anyway
        unit.set_reshard_after_forward(False, recurse=False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shards, detached, in the memory of the tensors."""
    return [tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, in all processes, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """The tensor, or this process's shard of it if `example`, of the same shape, is sharded. Communicates nothing."""
    if not isinstance(example, DTensor):
        return tensor
    shard = distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
    return shard.clone()  # torch does not promise a copy, and a view would keep the whole tensor on the device


def shard_all(tensors: Mapping[str, torch.Tensor], examples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`shard_like` for the entries of a state dict."""
    return {name: shard_like(tensor, examples[name]) for name, tensor in tensors.items()}


def exchange_contents(first: torch.Tensor, second: torch.Tensor) -> None:
    """Swaps the values of two tensors that are sharded alike.

    Their memory stays where it is, since FSDP gathers from there.
    """
    (first, second) = local([first, second])
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def shard_optimizer_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state dict with whole tensors, as the optimizer of a sharded network loads it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard_values(parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: shard_like(value, parameter) if value.shape == parameter.shape else value  # unlike the step's
            for name, value in values.items()
        }

    state = {index: shard_values(parameters[index], values) for index, values in saved["state"].items()}
    return saved | {"state": state}


# ---------------------------------------------------------------------------------------------------------------------
# Whole states for files


def gather(tensors: Iterable[torch.Tensor], keep: bool) -> list[torch.Tensor]:
    """Whole tensors on the CPU if `keep`, otherwise an empty list. One after another, so that one at a time is whole
    on the device. Must be called by all processes.
    """
    kept = []
    for tensor in tensors:
        tensor = whole(tensor.detach())
        if keep:
            kept.append(tensor.cpu())
    return kept


def gather_model(model: ModelMixin, keep: bool) -> ModelMixin:
    """An unsharded network with the weights of a sharded one, on the CPU if `keep` and otherwise without memory.

    Must be called by all processes.
    """
    network_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        copy = network_class.from_config(model.config)
    weights = model.state_dict()
    values = gather(weights.values(), keep)
    if keep:
        copy.load_state_dict(dict(zip(weights, values, strict=True)), assign=True)
    return copy


def gather_optimizer(optimizer: torch.optim.AdamW, model: ModelMixin, keep: bool) -> torch.optim.AdamW:
    """An optimizer of `model`, an unsharded copy, with the state of a sharded network's if `keep`.

    Must be called by all processes.
    """
    saved = optimizer.state_dict()
    names = [(index, name) for index, values in saved["state"].items() for name in values]
    values = gather((saved["state"][index][name] for index, name in names), keep)
    copy = torch.optim.AdamW(model.parameters(), fused=True)
    if keep:
        state: dict[int, dict[str, Any]] = {index: {} for index in saved["state"]}
        for (index, name), value in zip(names, values, strict=True):
            state[index][name] = value
        copy.load_state_dict(saved | {"state": state})
    return copy
