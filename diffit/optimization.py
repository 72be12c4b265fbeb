# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Optimizers, learning-rate schedules, weight averages, and the guard against non-finite steps."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from diffit.config import EmaConfig, OptimizerConfig, ScheduleConfig
from diffit.errors import RunError
from diffit.processes import raise_in_all
from diffit.run_dir import list_checkpoints
from diffit.sharding import (
    exchange_contents,
    gather,
    gather_model,
    gather_optimizer,
    gathered,
    is_sharded,
    local,
)
from diffit.stream import position_generator

logger = get_logger(__name__, log_level="INFO")

# Muon's quintic polynomial (Jordan et al. 2024): p(s) = A * s + B * s^3 + C * s^5.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95
DROPOUT = 3  # the stream of `position_generator` that seeds the network's dropout
MANY_MUON_WEIGHTS = 100_000_000  # DiffiT-XL/2 has 500 million: 15 TFLOP per step and process


def muon_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon optimizes: those of linear layers inside blocks.

    Embeddings, convolutions, bias tables and the last layer are left to AdamW.
    """
    modules = model.named_modules()
    return [module.weight for name, module in modules if isinstance(module, nn.Linear) and "block" in name]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximately orthogonalizes matrices with Muon's Newton-Schulz iteration.

    Args:
        matrices: shape (n, rows, columns).

    Returns:
        Matrices with the same singular vectors, whose singular values s become p(p(p(p(p(s / norm))))), roughly in
        [0.7, 1.2] unless s is tiny; shape (n, rows, columns). They are bfloat16 on CUDA, and otherwise have the dtype
        of `matrices`, because bfloat16 is slow on CPUs.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # (n, r, c) with r <= c
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices, and fused AdamW for all other parameters.

    The update is that of `torch.optim.Muon` with `match_rms_adamw`, which always multiplies in bfloat16 and cannot
    skip a step without a synchronization with the host. This class batches matrices of the same shape, and respects
    `found_inf` and `grad_scale` as fused AdamW does.

    Args:
        matrices: two-dimensional parameters, for Muon.
        others: all other parameters, for AdamW.
        lr: AdamW's learning rate.
        muon_lr_ratio: Muon's learning rate as a multiple of `lr`; at 1 its updates are about as large as AdamW's.
        betas: AdamW's decay rates.
        weight_decay: decoupled weight decay of all parameters, each at its own learning rate.
        eps: constant added to AdamW's denominator.

    Raises:
        ValueError: if there are no matrices.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler checks this attribute

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        muon_lr_ratio: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
    ):
        matrices, others = list(matrices), list(others)
        if not matrices:
            raise ValueError("Muon needs linear layers inside blocks, and this network has none")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)
        groups = [{"params": others}, {"params": matrices, "lr": lr * muon_lr_ratio}]
        super().__init__(groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates all parameters that have a gradient, and returns the closure's loss."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self.adamw.param_groups, self.adamw.state = self.param_groups[:1], self.state  # load_state_dict replaces them
        self.adamw.found_inf, self.adamw.grad_scale = found_inf, grad_scale
        loss = self.adamw.step(closure)

        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in self.param_groups[1]["params"]:
            if parameter.grad is not None:
                by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
        for parameters in by_shape.values():
            self._step_matrices(parameters, found_inf, grad_scale)
        return loss

    def _step_matrices(
        self, parameters: list[nn.Parameter], found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None
    ) -> None:
        """Updates n parameters that share one shape (rows, columns)."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        momentum = torch.stack(buffers)  # (n, rows, columns)
        grad = torch.stack([parameter.grad for parameter in parameters])  # (n, rows, columns)
        if grad_scale is not None:
            grad = grad / grad_scale
        if found_inf is not None:  # a skipped step must not change the momentum: lerp(m, m) is exactly m
            grad = torch.where(found_inf.bool(), momentum, grad)
        momentum = momentum.lerp(grad, 1 - MOMENTUM)
        update = orthogonalize(grad.lerp(momentum, MOMENTUM)).to(grad.dtype)  # Nesterov momentum

        lr, decay = self.param_groups[1]["lr"], self.param_groups[1]["weight_decay"]
        size = 0.2 * max(update.shape[-2:]) ** 0.5  # matches the RMS of AdamW's updates (arXiv 2502.16982)
        change = lr * size * update
        if decay:
            change = change + lr * decay * torch.stack(parameters)
        if found_inf is not None:
            change = change * (1 - found_inf)
        torch._foreach_copy_(buffers, list(momentum))
        torch._foreach_sub_(parameters, list(change))


# Devices on which torch's fused optimizers skip a step where `found_inf` is set. On Apple's GPUs they did not until
# pytorch/pytorch pull request 186360. Networks on the meta device compute nothing.
OBEYING_DEVICES = ("cpu", "cuda", "meta")


def obeys_found_inf(optimizer_class: type[torch.optim.AdamW], device: torch.device) -> bool:
    """Whether the fused optimizer skips a step where `found_inf` is set, tried on one number.

    Args:
        optimizer_class: torch's AdamW.
        device: of the number. The host waits for it.
    """
    parameter = nn.Parameter(torch.ones(1, device=device))
    optimizer = optimizer_class([parameter], lr=0.5, fused=True)
    parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    return parameter.item() == 1


def skip_by_restoring(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer that ignores `found_inf` skip such steps: it takes them, and gets its old values back.

    The device chooses, without a synchronization. During a step, weights and moments are in memory twice. This relies
    on moments that begin at zero.

    Args:
        optimizer: modified in place.
    """
    before: dict[int, torch.Tensor] = {}  # by the id of the tensor

    def tensors() -> Iterator[torch.Tensor]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, torch.Tensor))

    @torch.no_grad()
    def remember(*_) -> None:
        before.update({id(tensor): tensor.clone() for tensor in tensors()})

    @torch.no_grad()
    def restore(*_) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not before:
            return
        for tensor in tensors():
            old = before.get(id(tensor))
            is_bad = found_inf.to(tensor.device).bool()
            tensor.copy_(torch.where(is_bad, torch.zeros_like(tensor) if old is None else old, tensor))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)


def build_optimizer(asked: OptimizerConfig, model: ModelMixin) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW. Both can skip a step without a synchronization with the host.

    Where torch's fused AdamW ignores `found_inf`, which is tried once, a warning is logged (see `skip_by_restoring`).
    """
    optimizer = _build_optimizer(asked, model)
    device = next(model.parameters()).device
    if device.type not in OBEYING_DEVICES and not obeys_found_inf(torch.optim.AdamW, device):
        logger.warning(
            f"the fused AdamW of torch {torch.__version__} does not skip non-finite steps on the device "
            f"{device.type}: they are undone, which takes memory for another copy of the weights and moments"
        )
        skip_by_restoring(optimizer)
    return optimizer


def _build_optimizer(asked: OptimizerConfig, model: ModelMixin) -> torch.optim.Optimizer:
    settings = {
        "lr": asked.learning_rate,
        "betas": (asked.adam_beta1, asked.adam_beta2),
        "weight_decay": asked.adam_weight_decay,
        "eps": asked.adam_epsilon,
    }
    if asked.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    matrices = muon_parameters(model)
    num_weights = sum(matrix.numel() for matrix in matrices)
    if num_weights > MANY_MUON_WEIGHTS:
        logger.warning(
            f"--optimizer muon is for small networks: each process orthogonalizes all {num_weights:,} weights of the "
            "matrices in each step, which may take as long as the rest of the step. Try --optimizer adamw"
        )
    are_matrices = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in are_matrices]
    return MuonAdamW(matrices, others, muon_lr_ratio=asked.muon_lr_ratio, **settings)


def build_lr_scheduler(
    asked: ScheduleConfig,
    optimizer: torch.optim.Optimizer,
    max_train_steps: int,
    warmup_steps: int,
    decay_steps: int | None = None,
) -> LambdaLR:
    """The learning-rate schedule. Do not pass it to `accelerator.prepare`, which would step it once per process.

    Args:
        asked: the flags of the schedule.
        optimizer: its learning rates are scaled by the schedule.
        max_train_steps: length of the training in optimizer steps.
        warmup_steps: length of the warm-up in optimizer steps.
        decay_steps: length of the final decay in optimizer steps (`warmup_stable_decay` only).
    """
    if asked.lr_scheduler == "warmup_stable_decay":
        return get_wsd_schedule(optimizer, warmup_steps, decay_steps, max_train_steps, decay_type="linear")
    return get_scheduler(
        asked.lr_scheduler,
        optimizer,
        step_rules=asked.lr_step_rules,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=asked.lr_num_cycles,
        power=asked.lr_power,
    )


class InPlaceEMA(EMAModel):
    """diffusers' `EMAModel`, updated in place; its own `step` temporarily allocates a second copy of all weights."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Updates the average with the weights after an optimizer step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        # Frozen parameters need no special case: their average equals the weight and stays that way.
        torch._foreach_lerp_(local(self.shadow_params), local(parameters), 1 - self.cur_decay_value)


class HalfLifeEMA(InPlaceEMA):
    """EMA with a half-life in images, which makes it independent of the batch size (EDM, appendix F.1).

    Args:
        parameters: the network's parameters, float32.
        half_life: number of images after which the contribution of a step is halved.
        ramp_up: the half-life is at most this fraction of the images seen so far.
        batch_size: images per optimizer step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], half_life: float, ramp_up: float, batch_size: int):
        super().__init__(parameters)
        self.half_life, self.ramp_up, self.batch_size = half_life, ramp_up, batch_size

    def get_decay(self, optimization_step: int) -> float:
        """The decay, in [0, 1), at an optimizer step, counted from 1."""
        half_life = min(self.half_life, self.ramp_up * optimization_step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0


def build_ema(asked: EmaConfig, model: ModelMixin, batch_size: int) -> dict[str, InPlaceEMA]:
    """Builds the averages of the float32 parameters.

    Either one average, whose decay warms up as 1 - (1 + step / inv_gamma) ** -power, or one for each half-life.

    Args:
        asked: the flags of the averages.
        model: the network.
        batch_size: images per optimizer step.

    Returns:
        Averages by the suffix of their folder's name, such as `ema` or `ema_2kimg`; empty without EMA.
    """
    if not asked.use_ema:
        return {}
    if asked.ema_half_life_kimg is not None:
        half_lives = {f"ema_{kimg:g}kimg": 1000 * kimg for kimg in asked.ema_half_life_kimg}
        options = (asked.ema_ramp_up, batch_size)
        return {name: HalfLifeEMA(model.parameters(), half_life, *options) for name, half_life in half_lives.items()}
    warm_up = {"use_ema_warmup": True, "inv_gamma": asked.ema_inv_gamma, "power": asked.ema_power}
    return {"ema": InPlaceEMA(model.parameters(), decay=asked.ema_max_decay, **warm_up)}


@dataclass
class TrainingState:
    """Everything that changes during training; a checkpoint contains all of it.

    Attributes:
        model: the network, without accelerate's wrapper.
        ema_models: averaged weights by the suffix of their folder's name (see `build_ema`).
        optimizer: the optimizer, without accelerate's wrapper.
        lr_scheduler: the learning-rate schedule, stepped once per optimizer step.
        num_images: number of training images, which determines the image at each position.
        data_digest: checksum of the training data and, in latent space, of the VAE.
        global_step: number of successful optimizer steps.
        position: first position of the stream that has not been consumed.
        bad_steps: number of steps skipped because of a non-finite loss or gradient; their positions are consumed.
        bad_steps_in_a_row: number of skipped steps since the last successful one.
    """

    model: ModelMixin
    ema_models: dict[str, EMAModel]
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    num_images: int
    data_digest: str
    global_step: int = 0
    position: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0


def gather_state(state: TrainingState, keep: bool, with_optimizer: bool = True) -> TrainingState:
    """The state to write to files: the same one, or a copy on the CPU with whole tensors if the network is sharded.

    Must be called by all processes.

    Args:
        state: the training state.
        keep: whether this process writes the files. Otherwise the copy of a sharded state is empty.
        with_optimizer: whether the optimizer's state is gathered as well; otherwise the copy keeps the sharded one.
    """
    if not is_sharded(state.model):
        return state
    model = gather_model(state.model, keep)
    averages = {name: copy.copy(average) for name, average in state.ema_models.items()}
    for average in averages.values():
        average.shadow_params = gather(average.shadow_params, keep)
    optimizer = gather_optimizer(state.optimizer, model, keep) if with_optimizer else state.optimizer
    return dataclasses.replace(state, model=model, ema_models=averages, optimizer=optimizer)


@contextlib.contextmanager
def ema_weights(ema_model: EMAModel | None, model: ModelMixin) -> Iterator[None]:
    """Puts the EMA weights into the network for the duration of a `with` block. Does nothing without EMA.

    The network and the average swap tensors, so nothing is copied, and the average must not be used inside the block.
    With or without EMA, a sharded network is whole inside the block, which all processes must enter.
    """
    exchange_weights(ema_model, model)
    try:
        with gathered(model):
            yield
    finally:
        exchange_weights(ema_model, model)


def exchange_weights(ema_model: EMAModel | None, model: ModelMixin) -> None:
    """Swaps the tensors of the network and the average; those of a sharded network swap their values."""
    if ema_model is not None:
        for parameter, average in zip(model.parameters(), ema_model.shadow_params, strict=True):
            if isinstance(parameter, DTensor):  # FSDP gathers from the memory of the weight
                exchange_contents(parameter, average)
            else:
                parameter.data, average.data = average.data, parameter.data


class NonFiniteGuard:
    """Skips optimizer steps whose gradient is non-finite, without a synchronization before the step.

    The optimizer skips the update on the device. The host reads the outcome while the device computes the gradient of
    the next step, so the device always has work.

    Args:
        optimizer: an optimizer that respects `found_inf`, such as torch's fused ones and `MuonAdamW`. Under fp16 the
            gradient scaler sets `found_inf` itself.
        max_bad_steps: number of consecutive skipped steps after which training ends.
        batch_size: images per optimizer step, for messages.
        output_dir: the run's folder, for messages.

    Raises:
        TypeError: if the optimizer ignores `found_inf`, since it would take non-finite steps.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_bad_steps: int = 20, batch_size: int = 1, output_dir: str = "."
    ):
        # torch's fused optimizers set this attribute, which its GradScaler checks as well.
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"{type(optimizer).__name__} ignores found_inf, so it would take steps with non-finite gradients: use "
                "a fused optimizer"
            )
        self.optimizer = optimizer
        self.max_bad_steps, self.batch_size, self.output_dir = max_bad_steps, batch_size, output_dir
        self.is_bad, self.arrived = None, None

    def watch(self, grad_norm: torch.Tensor) -> None:
        """Must be called before each `optimizer.step()` with the norm of its gradient, shape ()."""
        is_bad = (grad_norm - grad_norm) != 0  # the difference is 0, or NaN; `isfinite` launches five kernels
        self.optimizer.found_inf = is_bad.float()
        self.is_bad = is_bad.to("cpu", non_blocking=is_bad.device.type == "cuda")
        if is_bad.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def outcome(self) -> bool | None:
        """Whether the last watched step was taken; None if there is none or its outcome was returned already."""
        if self.is_bad is None:
            return None
        if self.arrived is not None:
            self.arrived.synchronize()
        taken = not self.is_bad.item()
        self.is_bad = None
        return taken


def finish_step(state: TrainingState, guard: NonFiniteGuard) -> bool:
    """Finishes the last optimizer step: advances schedule, averages and step count, or counts it as skipped.

    Returns:
        True if a step was finished and had been taken; False if it had been skipped or there was none.

    Raises:
        RunError: after --max_bad_steps consecutive skipped steps; weights and checkpoints keep their last good values.
    """
    taken = guard.outcome()
    if taken is None:
        return False
    if taken:
        state.lr_scheduler.step()
        for ema_model in state.ema_models.values():
            ema_model.step(state.model.parameters())
        state.global_step += 1
        state.bad_steps_in_a_row = 0
        return True
    state.bad_steps += 1
    state.bad_steps_in_a_row += 1
    first = state.position - guard.batch_size
    message = (
        f"skipped step {state.global_step + 1}: non-finite loss or gradient (stream positions {first}-"
        f"{state.position - 1}; {state.bad_steps} skipped so far)"
    )
    if state.bad_steps_in_a_row < guard.max_bad_steps:
        logger.warning(message)
        return False
    checkpoints = list_checkpoints(guard.output_dir)
    advice = "there is no checkpoint yet: start again with --mixed_precision bf16 or no, or a lower --learning_rate"
    if checkpoints:
        advice = (
            f"the last checkpoint is {checkpoints[-1]}: resume from it with --mixed_precision bf16 or no, or "
            "fine-tune from it (--pretrained_model_name_or_path) with a lower --learning_rate"
        )
    raise_in_all(RunError, f"{message}: {state.bad_steps_in_a_row} in a row (--max_bad_steps); {advice}")


def seed_dropout(seed: int, position: int) -> None:
    """Makes the network's dropout a function of the seed and the micro-batch's first position."""
    torch.manual_seed(int(position_generator(seed, position, DROPOUT).integers(2**63)))
