# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Low-precision copies of the weights for training under autocast, in one launch instead of two for each weight.

Autocast converts each weight in each forward pass, and each gradient in each backward pass: on a GPU a quarter of all
the kernels that a step launches. Here one foreach copy converts all weights, and one for each block the gradients. The
parameters, their gradients and everything that works on them (optimizer, clipping, averages, checkpoints, DDP) stay in
float32, and the numbers are those of autocast, bit for bit.
"""

import itertools

import torch
from diffusers import ModelMixin
from torch import nn

# The layers that compute in low precision under autocast. Embeddings and bias tables stay in float32, because their
# gradients are sums over many entries.
LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm)


class UseCopies(torch.autograd.Function):
    """Returns the copies of some weights, and gives their gradients to the weights in float32."""

    @staticmethod
    def forward(ctx, copies: list[torch.Tensor], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns tensors that share memory with `copies`; `weights` are the float32 originals, in the same order."""
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the weights; None for a weight that was not used."""
        given = [grad for grad in grads if grad is not None]
        converted = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if given:
            torch._foreach_copy_(converted, given)
        remaining = iter(converted)
        return None, *(None if grad is None else next(remaining) for grad in grads)


class WeightCopies:
    """Replaces a network's weights by low-precision copies during each forward pass of the training.

    Each repeated block uses its own copies, so its gradients are ready as soon as its backward pass is, and DDP
    reduces them while the backward pass continues. Validation and sampling, in evaluation mode or without gradients,
    are left to autocast.

    Args:
        model: a network with `_repeated_blocks`, with its weights in float32; hooks are added to it.
        dtype: autocast's dtype.
    """

    def __init__(self, model: ModelMixin, dtype: torch.dtype):
        blocks = [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
        inside = set(itertools.chain.from_iterable(block.modules() for block in blocks))
        outside = [module for module in model.modules() if module not in inside]
        self.model, self.dtype = model, dtype
        self.places = {model: find_weights(outside)} | {block: find_weights(block.modules()) for block in blocks}
        self.copies: dict[nn.Module, list[torch.Tensor]] = {}
        self.weights: dict[nn.Module, list[nn.Parameter]] = {}  # of the modules that are running
        for module in self.places:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, inputs: tuple) -> None:
        if not module.training or not torch.is_grad_enabled():
            self.copies.clear()  # leaves their memory to previews and evaluation
            return
        if module is self.model:
            self._refresh()
        weights = self._find(module)
        copies = UseCopies.apply(self.copies[module], *weights)
        self.weights[module] = weights
        for (layer, name), copy in zip(self.places[module], copies, strict=True):
            layer._parameters[name] = copy

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        for (layer, name), weight in zip(self.places[module], self.weights.pop(module, ()), strict=False):
            layer._parameters[name] = weight

    def _find(self, module: nn.Module) -> list[nn.Parameter]:
        return [layer._parameters[name] for layer, name in self.places[module]]

    def _refresh(self) -> None:
        """Copies all weights, unless they have accumulated gradients: then they are those of the last micro-batch."""
        weights = {module: self._find(module) for module in self.places}
        is_new = not self.copies
        if is_new:
            self.copies = {
                module: [torch.empty_like(weight, dtype=self.dtype, requires_grad=False) for weight in found]
                for module, found in weights.items()
            }
        originals = list(itertools.chain.from_iterable(weights.values()))
        if not is_new and all(weight.grad is not None for weight in originals):
            return
        with torch.no_grad():
            torch._foreach_copy_(list(itertools.chain.from_iterable(self.copies.values())), originals)


def find_weights(modules) -> list[tuple[nn.Module, str]]:
    """The trained parameters of the modules that are in `LAYERS`, each as a module and the parameter's name in it."""
    return [
        (module, name)
        for module in modules
        if isinstance(module, LAYERS)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
