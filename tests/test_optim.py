"""Muon and AdamW as one optimizer."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from diffit.optimization import ITERATIONS, A, B, C, MuonAdamW, muon_parameters, orthogonalize
from diffit_model import DiffiTUNet2DModel
from helpers import TINY_CONFIG

ADAMW = {"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}


def build(matrices, others, lr=0.01, ratio=3.0):
    return MuonAdamW(matrices, others, lr=lr, muon_lr_ratio=ratio, **ADAMW)


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 4), (4, 6), (6, 4), (5,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(tensors, seed):
    for tensor, gradient in zip(tensors, parameters(seed), strict=True):
        tensor.grad = gradient.detach().to(tensor.dtype)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 5, 3), (3, 4, 4)])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / matrices.norm(dim=(-2, -1))[:, None]
    for _ in range(ITERATIONS):
        s = A * s + B * s**3 + C * s**5
    torch.testing.assert_close(orthogonalize(matrices), u @ torch.diag_embed(s) @ vh, rtol=0, atol=1e-10)


def test_steps_are_those_of_torch_muon_and_adamw():
    """torch's Muon computes in bfloat16, whose rounding depends on the CPU; here it is kept from that."""
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer = build(ours[:3], ours[3:])
    muon = torch.optim.Muon(theirs[:3], lr=0.03, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=0.01, fused=True, **ADAMW)
    for seed in range(1, 6):
        for tensors in (ours, theirs):
            set_gradients(tensors, seed)
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for each in (optimizer, muon, adamw):
                each.step()
        assert torch.equal(ours[3], theirs[3])
        torch.testing.assert_close(ours[:3], theirs[:3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_step_with_found_inf_changes_nothing(value):
    tensors, others = parameters(), parameters()
    optimizer, untouched = build(tensors[:3], tensors[3:]), build(others[:3], others[3:])
    for seed in (1, 2):
        for each, theirs in ((optimizer, tensors), (untouched, others)):
            set_gradients(theirs, seed)
            each.step()
        if seed == 1:
            for tensor in tensors:
                tensor.grad.fill_(value)
            before = [x.detach().clone() for x in tensors]
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            assert all(map(torch.equal, tensors, before))
            optimizer.found_inf = torch.tensor(0.0)
    assert all(map(torch.equal, tensors, others))


def test_gradients_are_unscaled():
    tensors, others = parameters(), parameters()
    optimizer, plain = build(tensors[:3], tensors[3:]), build(others[:3], others[3:])
    set_gradients(tensors, 1)
    set_gradients(others, 1)
    for tensor in tensors:
        tensor.grad.mul_(1024)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    plain.step()
    for x, y in zip(tensors, others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_state_goes_on_exactly():
    tensors = parameters()
    optimizer = build(tensors[:3], tensors[3:])
    set_gradients(tensors, 1)
    optimizer.step()
    copies = [nn.Parameter(x.detach().clone()) for x in tensors]
    other = build(copies[:3], copies[3:], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, theirs in ((optimizer, tensors), (other, copies)):
        set_gradients(theirs, 2)
        each.step()
    assert all(map(torch.equal, tensors, copies))


def test_matrices_are_the_linear_layers_of_the_blocks():
    unet = DiffiTUNet2DModel(**TINY_CONFIG)
    chosen = set(map(id, muon_parameters(unet)))
    names = {name for name, parameter in unet.named_parameters() if id(parameter) in chosen}
    ends = {name.split(".block.")[1] for name in names}
    assert ends == {f"{x}.weight" for x in ("attn.qkv", "attn.qkv_temb", "attn.proj", "mlp.fc1", "mlp.fc2")}


def test_network_without_matrices_is_refused():
    with pytest.raises(ValueError, match="Muon is for the matrices of blocks"):
        build([], [nn.Parameter(torch.zeros(2))])
