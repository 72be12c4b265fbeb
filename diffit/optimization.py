# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Optimizers, learning-rate schedules, averages of the weights, and steps that go wrong."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from diffit.config import EmaConfig, OptimizerConfig, ScheduleConfig
from diffit.errors import RunError
from diffit.processes import raise_in_all
from diffit.run_dir import list_checkpoints
from diffit.stream import position_generator

logger = get_logger(__name__, log_level="INFO")

# The quintic polynomial of Muon (Jordan et al. 2024): p(s) = A * s + B * s^3 + C * s^5.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95


def muon_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers within blocks: no embedding, no convolution, no bias table, no last layer."""
    modules = model.named_modules()
    return [module.weight for name, module in modules if isinstance(module, nn.Linear) and "block" in name]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Brings the singular values of matrices near 1, by the Newton-Schulz iteration of Muon.

    Args:
        matrices: shape (n, rows, columns).

    Returns:
        The same singular vectors, with values p(p(p(p(p(s / norm))))), roughly in [0.7, 1.2] unless s is tiny; in
        bfloat16 on CUDA, else in the dtype of `matrices`: CPUs multiply few numbers a second in bfloat16.
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
    """Muon on matrices and fused AdamW on the rest.

    torch's own Muon always multiplies in bfloat16 and cannot leave a step out without asking the host; this one is
    the same update (its `match_rms_adamw`), with matrices of one shape in one product, and obeys `found_inf` and
    `grad_scale` as the fused AdamW does.

    Args:
        matrices: parameters of two dimensions.
        others: all other parameters.
        lr: of AdamW.
        muon_lr_ratio: learning rate of Muon as a multiple of `lr`; at 1 its updates have AdamW's usual size.
        betas: of AdamW.
        weight_decay: decoupled, of all; each parameter decays at its own learning rate.
        eps: of AdamW.

    Raises:
        ValueError: if there are no matrices.
    """

    _step_supports_amp_scaling = True  # what torch's GradScaler asks for

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
            raise ValueError("Muon is for the matrices of blocks, and this network has none")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)
        groups = [{"params": others}, {"params": matrices, "lr": lr * muon_lr_ratio}]
        super().__init__(groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates all parameters that have a gradient; returns what the closure does."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self.adamw.param_groups, self.adamw.state = self.param_groups[:1], self.state  # loading a state renews them
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
        """Updates n parameters of one shape (rows, columns)."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        momentum = torch.stack(buffers)  # (n, rows, columns)
        grad = torch.stack([parameter.grad for parameter in parameters])  # (n, rows, columns)
        if grad_scale is not None:
            grad = grad / grad_scale
        if found_inf is not None:  # what is between momentum and momentum is the momentum, to the last bit
            grad = torch.where(found_inf.bool(), momentum, grad)
        momentum = momentum.lerp(grad, 1 - MOMENTUM)
        update = orthogonalize(grad.lerp(momentum, MOMENTUM)).to(grad.dtype)  # with Nesterov's momentum

        lr, decay = self.param_groups[1]["lr"], self.param_groups[1]["weight_decay"]
        size = 0.2 * max(update.shape[-2:]) ** 0.5  # the root mean square of AdamW's updates (arXiv 2502.16982)
        change = lr * size * update + lr * decay * torch.stack(list(parameters))
        if found_inf is not None:
            change = change * (1 - found_inf)
        torch._foreach_copy_(buffers, list(momentum))
        torch._foreach_sub_(parameters, list(change))


DROPOUT = 3  # stream of `position_generator` that seeds dropout inside the network


def build_optimizer(asked: OptimizerConfig, model: ModelMixin) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for some of them; both can skip a step without asking the host."""
    settings = {
        "lr": asked.learning_rate,
        "betas": (asked.adam_beta1, asked.adam_beta2),
        "weight_decay": asked.adam_weight_decay,
        "eps": asked.adam_epsilon,
    }
    if asked.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **settings)
    matrices = muon_parameters(model)
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
    """The learning rate over optimizer steps. It stays unprepared: accelerate would step it once per process.

    Args:
        asked: which schedule.
        optimizer: gets the learning rate.
        max_train_steps, warmup_steps, decay_steps: see `Plan`.
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
    """diffusers' average, updated in place: its own step makes a second copy of all weights for a moment."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes in the weights after an optimizer step."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        # A parameter that is not trained stays what it was: there the average and the weight are equal.
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


class HalfLifeEMA(InPlaceEMA):
    """EMA whose memory is counted in images, so that it does not depend on the batch (EDM, appendix F.1).

    Args:
        parameters: of the network, float32.
        half_life: images after which a weight counts half.
        ramp_up: the half-life is at most this share of the images seen so far.
        batch_size: images of an optimizer step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], half_life: float, ramp_up: float, batch_size: int):
        super().__init__(parameters)
        self.half_life, self.ramp_up, self.batch_size = half_life, ramp_up, batch_size

    def get_decay(self, optimization_step: int) -> float:
        """What the average keeps of itself at an optimizer step, from 1 up; in [0, 1)."""
        half_life = min(self.half_life, self.ramp_up * optimization_step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life) if half_life > 0 else 0.0


def build_ema(asked: EmaConfig, model: ModelMixin, batch_size: int) -> dict[str, InPlaceEMA]:
    """Averages of the float32 parameters, by the suffix of their folder's name.

    Either one average, whose decay warms up as 1 - (1 + step / inv_gamma) ** -power, or one for each half-life.

    Args:
        asked: which averages.
        model: the network.
        batch_size: images per optimizer step.
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
    """All that changes while training, and so all that a checkpoint holds.

    Attributes:
        model: the network itself, not what accelerate wraps around it.
        ema_models: its averaged weights by the end of their folder's name: `ema`, or `ema_2kimg` for a half-life.
        optimizer: likewise unwrapped.
        lr_scheduler: steps once per optimizer step.
        num_images: in the training data, which fixes what a position means.
        data_digest: of the training data, and of the VAE that encodes them.
        global_step: successful optimizer steps.
        position: first position of the stream that has not been trained on.
        bad_steps: left out so far because the loss or the gradient was not finite; their positions are passed by.
        bad_steps_in_a_row: of these, since the last successful step.
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


@contextlib.contextmanager
def ema_weights(ema_model: EMAModel | None, model: ModelMixin) -> Iterator[None]:
    """Puts the EMA weights into the network for the duration of a `with` block; without EMA it does nothing.

    Network and average swap their tensors, so nothing is copied. The average is not to be used meanwhile.
    """
    exchange_weights(ema_model, model)
    try:
        yield
    finally:
        exchange_weights(ema_model, model)


def exchange_weights(ema_model: EMAModel | None, model: ModelMixin) -> None:
    """Gives the network the tensors of the average, and the average those of the network."""
    if ema_model is not None:
        for parameter, average in zip(model.parameters(), ema_model.shadow_params, strict=True):
            parameter.data, average.data = average.data, parameter.data


class NonFiniteGuard:
    """Skips optimizer steps whose gradient is non-finite, without waiting for the device.

    The device skips the update by itself. The host asks for the outcome once the gradient of the next step is being
    computed, so the device always has work.

    Args:
        optimizer: one that obeys `found_inf`, as torch's fused ones and `MuonAdamW` do; under fp16 the gradient
            scaler sets that itself.
        max_bad_steps: consecutive steps that may be skipped before training ends.
        batch_size: images per optimizer step, for messages.
        output_dir: folder of the run, for messages.

    Raises:
        TypeError: if the optimizer does not say that it obeys, since it would take the step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_bad_steps: int = 20, batch_size: int = 1, output_dir: str = "."
    ):
        # Set by torch's fused optimizers; the same attribute tells torch's GradScaler.
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                f"{type(optimizer).__name__} does not obey found_inf, so it would take steps whose gradient is not "
                "finite: use a fused optimizer"
            )
        self.optimizer = optimizer
        self.max_bad_steps, self.batch_size, self.output_dir = max_bad_steps, batch_size, output_dir
        self.is_bad, self.arrived = None, None

    def watch(self, grad_norm: torch.Tensor) -> None:
        """To be called before each `optimizer.step()` with the norm of its gradient, shape ()."""
        is_bad = ~grad_norm.isfinite()
        self.optimizer.found_inf = is_bad.float()
        self.is_bad = is_bad.to("cpu", non_blocking=is_bad.device.type == "cuda")
        if is_bad.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def outcome(self) -> bool | None:
        """Whether the step that was watched last was taken; None if there is none, or it was asked for already."""
        if self.is_bad is None:
            return None
        if self.arrived is not None:
            self.arrived.synchronize()
        taken = not self.is_bad.item()
        self.is_bad = None
        return taken


def finish_step(state: TrainingState, guard: NonFiniteGuard) -> bool:
    """Advances the learning-rate schedule, the averages and the step count, or counts a skipped step.

    Returns:
        Whether there was an unfinished step and it was taken.

    Raises:
        RunError: after --max_bad_steps skipped steps in a row; weights and checkpoints stay as they were before.
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
    raise_in_all(
        RunError,
        f"{message}: {state.bad_steps_in_a_row} in a row (--max_bad_steps). The last checkpoint is "
        f"{checkpoints[-1] if checkpoints else 'none'}: resume from it with --mixed_precision bf16 or no, or "
        "fine-tune from it (--pretrained_model_name_or_path) with a lower --learning_rate",
    )


def seed_dropout(seed: int, position: int) -> None:
    """Makes dropout in the network a function of the seed and the first position of the micro-batch."""
    torch.manual_seed(int(position_generator(seed, position, DROPOUT).integers(2**63)))
