# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Low-precision copies of the weights: the numbers of autocast with fewer launches, and float32 wherever it counts."""

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffit_model
from diffit.config import ModelConfig, OptimizerConfig
from diffit.networks import set_up_model
from diffit.optimization import InPlaceEMA, build_optimizer, ema_weights
from diffit.weight_copies import WeightCopies
from diffit_model import DiffiTTransformer2DModel, DiffiTUNet2DModel
from helpers import ROOT, TINY_TRAINED_CONFIG, run, torchrun

CPU = torch.device("cpu")


def build(kind: str = "unet", copies: bool = True, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    if kind == "unet":
        model = DiffiTUNet2DModel(**TINY_TRAINED_CONFIG | {"dropout": 0.1} | kwargs)
    else:
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
        model = DiffiTTransformer2DModel(in_channels=3, num_embeds_ada_norm=4, **sizes)
        nn.init.normal_(model.proj_out.weight, std=0.1)
    if copies:
        WeightCopies(model, torch.bfloat16)
    return model.train()


def losses(model: nn.Module, seed: int, dtype: torch.dtype | None = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images, target = torch.randn(2, 4, 3, 8, 8, generator=generator)
    torch.manual_seed(seed)  # dropout
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(images, torch.rand(4, generator=generator)).sample
    return (output.float() - target).square().mean()


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        loss = losses(model.eval(), seed=99)
    model.train()
    return loss


def train(model: nn.Module, optimizer: str = "adamw", steps: int = 3, accumulation: int = 2) -> list[torch.Tensor]:
    """The weights after some steps, and after each the losses; validates with an average before the last step."""
    optimizer = build_optimizer(OptimizerConfig(optimizer=optimizer, learning_rate=1e-2), model)
    average, seen = InPlaceEMA(model.parameters(), decay=0.5), []
    for step in range(steps):
        for part in range(accumulation):
            loss = losses(model, seed=10 * step + part)
            loss.backward()
            seen.append(loss.detach())
            if step == 1 and part == 0:  # between micro-batches, so that there are gradients
                seen.append(evaluate(model))
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        if step == steps - 2:
            with ema_weights(average, model):
                seen.append(evaluate(model))
    return [*seen, *(parameter.detach().clone() for parameter in model.parameters())]


class Launches(TorchDispatchMode):
    """Counts the operators that run inside a `with` block."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_training_is_that_of_autocast_bit_for_bit(kind, optimizer, checkpointing):
    """Fused AdamW does not raise the version of the weights that it changes, so copies must not depend on that."""
    results = []
    for copies in (False, True):
        model = build(kind, copies)
        if checkpointing:
            model.enable_gradient_checkpointing()
        results.append(train(model, optimizer))
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


def test_float16_gradients_overflow_as_under_autocast():
    grads = []
    for copies in (False, True):
        model = build(copies=False)
        if copies:
            WeightCopies(model, torch.float16)
        (losses(model, seed=0, dtype=torch.float16) * 2.0**24).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert not all(grad.isfinite().all() for grad in grads[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


def test_weights_are_converted_once_a_step():
    """Under autocast each micro-batch converts each weight, and its gradient."""
    model, plain = build(), build(copies=False)
    losses(model, seed=0)  # allocates
    counts = {}
    for name, network in (("copies", model), ("autocast", plain)):
        with Launches() as launches:
            for seed in (1, 2, 3):
                losses(network, seed).backward()
        counts[name] = launches.counts
    units = 1 + len(network_blocks(model))
    assert counts["copies"]["_foreach_copy_"] == 1 + 3 * units
    kept = ("relative_position_bias_table", "class_embedding.weight")
    converted = [name for name, _ in model.named_parameters() if not name.endswith(kept)]
    assert counts["autocast"]["_to_copy"] - counts["copies"]["_to_copy"] == 3 * 2 * len(converted)


def network_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]


def test_parameters_and_gradients_stay_in_float32():
    model = build()
    before = list(model.parameters())
    losses(model, seed=0).backward()
    after = list(model.parameters())
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert {parameter.dtype for parameter in after} | {parameter.grad.dtype for parameter in after} == {torch.float32}


def test_evaluation_leaves_no_copies_in_memory():
    torch.manual_seed(0)
    model = DiffiTUNet2DModel(**TINY_TRAINED_CONFIG).train()
    copies = WeightCopies(model, torch.bfloat16)
    losses(model, seed=0).backward()
    assert sum(copy.numel() for each in copies.copies.values() for copy in each) > 0.9 * model.num_parameters()
    evaluate(model)
    assert not copies.copies


def test_parameters_return_after_an_error():
    model = build()
    expected = dict(model.named_parameters())
    block = network_blocks(model)[-1].block
    with mock.patch.object(block.mlp, "forward", side_effect=RuntimeError("out of memory")):
        with pytest.raises(RuntimeError, match="out of memory"):
            losses(model, seed=0)
    assert all(parameter is expected[name] for name, parameter in model.named_parameters())


def test_copy_of_a_network_has_its_own_copies():
    model = build()
    losses(model, seed=0).backward()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
            parameter.grad = None
    expected = losses(build(), seed=1)
    for parameter in clone.parameters():
        parameter.grad = None
    assert losses(model, seed=1) != expected
    assert torch.equal(losses(clone, seed=1), expected)


@pytest.mark.parametrize(
    "mixed_precision, compiled, expected", [("bf16", False, True), ("no", False, False), ("bf16", True, False)]
)
def test_set_up_model_uses_copies_for_eager_training_under_autocast(mixed_precision, compiled, expected):
    model = build(copies=False)
    with mock.patch.object(type(model), "compile_repeated_blocks") as compile_blocks:
        set_up_model(model, ModelConfig(model_config="a", compile=compiled), CPU, mixed_precision)
    assert bool(model._forward_pre_hooks) == expected
    assert compile_blocks.call_args_list == ([mock.call(dynamic=False)] if compiled else [])


def test_bf16_step_is_as_exact_as_with_norms_in_float32():
    """Norms in bf16, whose kernels accumulate in float32, against autocast's own policy and a step in float32."""

    def gradients(dtype: torch.dtype | None) -> torch.Tensor:
        model = build(copies=dtype is not None, block_out_channels=[32, 64], layers_per_block=2)
        losses(model, seed=0, dtype=dtype).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, ours = gradients(None), gradients(torch.bfloat16)
    with (
        mock.patch.object(diffit_model.ChannelNorm, "forward", nn.GroupNorm.forward),
        mock.patch.object(diffit_model.TokenNorm, "forward", nn.LayerNorm.forward),
    ):
        policy = gradients(torch.bfloat16)
    error, expected = ((each - exact).norm() / exact.norm() for each in (ours, policy))
    assert 0.001 < expected < 0.03
    assert error < 1.3 * expected


SCRIPT = """
import os
import sys
import torch
import test_weight_copies as this
from diffit.config import PrecisionConfig, RunConfig
from diffit.processes import build_accelerator, join_processes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

join_processes()
accelerator = build_accelerator(PrecisionConfig(), RunConfig(output_dir=sys.argv[1], report_to="none"))
prepared = accelerator.prepare(torch.nn.Linear(1, 1))
assert not prepared.broadcast_buffers and prepared.gradient_as_bucket_view
results, events = [], []

def reduce(state, bucket):
    events.append("bucket")
    return allreduce_hook(None, bucket)

for copies in (False, True):
    model = this.build(copies=copies)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.01}
    network = torch.nn.parallel.DistributedDataParallel(model, **options)
    network.register_comm_hook(None, reduce)
    model.conv_in.register_full_backward_hook(lambda *arguments: events.append("first layer"))
    for step in range(3):
        events.clear()
        this.losses(network, seed=2 * step + accelerator.process_index).backward()
        optimizer.step()
        optimizer.zero_grad()
    results.append([parameter.detach().clone() for parameter in model.parameters()])
assert all(map(torch.equal, *results))
assert events[: events.index("first layer")].count("bucket") > 1, events
print(f"process {accelerator.process_index} is done\\n", end="", flush=True)
accelerator.wait_for_everyone()
del network, prepared, model, optimizer  # DDP must go before the process group: gloo may abort otherwise (torch 2.13)
accelerator.free_memory()
accelerator.end_training()
os._exit(0)  # without the destructors of the interpreter's end, for the same reason
"""


def test_ddp_gives_the_same_numbers_and_reduces_during_the_backward_pass(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = f"{ROOT}:{ROOT / 'tests'}"
    output = run([*torchrun(), str(script), str(tmp_path / "run")], ACCELERATE_USE_CPU="true", PYTHONPATH=path)
    assert "process 0 is done" in output and "process 1 is done" in output
