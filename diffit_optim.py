# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Muon for the matrices of the blocks, and AdamW for all other parameters, as one optimizer."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

# The quintic polynomial of Muon (Jordan et al. 2024): p(s) = A * s + B * s^3 + C * s^5.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MOMENTUM = 0.95


def matrices_of_blocks(model: nn.Module) -> list[nn.Parameter]:
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
