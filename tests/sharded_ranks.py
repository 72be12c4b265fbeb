"""Runs train_diffit.py by accelerate's own FSDP path, on CPUs over gloo.

    python tests/sharded_ranks.py ANSWER=VALUE ... -- FLAGS        RANK, WORLD_SIZE, ... as from a launcher

accelerate ignores FSDP unless the processes have GPUs, so this replaces what it asks about devices, and nothing else.
The answers to `accelerate config` are those of configs/accelerate/fsdp2.yaml but for the given ones; with
`ACCELERATE_USE_FSDP=false` the processes run DDP. `SPOILT=N` is a NaN in the second process at its Nth forward pass.
"""

import os
import sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

import train_diffit
from diffit.command_line import run_script
from diffit.config import parse_args
from diffit.optimization import TrainingState
from diffit_model import DiffiTUNet2DModel

CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"


def config_answers() -> dict[str, str]:
    """The environment variables by which `accelerate launch` passes the answers of the config on."""
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIG), "train_diffit.py"])
    )
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def take_cpus_for_gpus() -> None:
    cpu, state = torch.device("cpu"), accelerate.state.PartialState
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *arguments, **options: cpu
    state._prepare_backend = lambda self, *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", cpu)
    state.default_device = property(lambda self: cpu)


def report_shards(state: TrainingState) -> TrainingState:
    """Prints this process's share of the memory of weights, optimizer and averages."""
    parts = {
        "weights": list(state.model.parameters()),
        "optimizer": [parameter for group in state.optimizer.param_groups for parameter in group["params"]],
    }
    if state.optimizer.state:  # of a resumed run
        moments = [values[name] for values in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        parts["moments"] = moments
    for name, average in state.ema_models.items():
        parts[name] = average.shadow_params
    for name, tensors in parts.items():
        held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        share = sum(storages.values()) / sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        print(f"shard of {name}: {share:.2f}", flush=True)
    return state


def spoil(call: int) -> None:
    original, calls = DiffiTUNet2DModel.forward, iter(range(10**6))

    def spoilt(model, *arguments, **options):
        output = original(model, *arguments, **options)
        if model.training and os.environ["RANK"] == "1" and next(calls) == call:
            output.sample = output.sample * float("nan")
        return output

    DiffiTUNet2DModel.forward = spoilt


if __name__ == "__main__":
    divider = sys.argv.index("--")
    answers = dict(answer.split("=", 1) for answer in sys.argv[1:divider])
    config = parse_args(sys.argv[divider + 1 :])
    if "SPOILT" in answers:
        spoil(int(answers.pop("SPOILT")))
    os.environ |= config_answers() | {"ACCELERATE_MIXED_PRECISION": "no"} | answers
    if os.environ["ACCELERATE_USE_FSDP"] == "true":
        take_cpus_for_gpus()
    build_state = train_diffit.build_state
    train_diffit.build_state = lambda *arguments: report_shards(build_state(*arguments))
    run_script(train_diffit.main, config)
