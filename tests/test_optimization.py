"""Muon and AdamW as one optimizer, learning-rate schedules, averages of the weights, and the guard."""

import copy
import logging
import math
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from diffusers.optimization import SchedulerType
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from diffit.config import EmaConfig, OptimizerConfig, ScheduleConfig
from diffit.optimization import (
    ITERATIONS,
    A,
    B,
    C,
    HalfLifeEMA,
    InPlaceEMA,
    MuonAdamW,
    NonFiniteGuard,
    TrainingState,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    ema_weights,
    finish_step,
    muon_parameters,
    obeys_found_inf,
    orthogonalize,
)
from diffit_model import DiffiTUNet2DModel
from helpers import TINY_CONFIG, assert_same_files, logged, mentions, train

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


def test_muon_without_weight_decay_copies_no_weights():
    tensors = parameters()
    optimizer = MuonAdamW(tensors[:3], tensors[3:], lr=0.01, muon_lr_ratio=1.0, **ADAMW | {"weight_decay": 0.0})
    set_gradients(tensors, 1)
    stacked = []

    def stack(tensors, *arguments):
        stacked.extend(tensors)
        return real(tensors, *arguments)

    real = torch.stack
    with mock.patch.object(torch, "stack", stack):
        optimizer.step()
    assert stacked and not any(isinstance(tensor, nn.Parameter) for tensor in stacked)


@pytest.mark.parametrize("rows, warns", [(100, False), (9_000, True)])
def test_muon_says_that_it_is_for_small_networks(rows, warns, caplog):
    PartialState()  # for accelerate's logger
    with torch.device("meta"):
        model = nn.ModuleDict({"block": nn.Linear(rows, 12_000), "head": nn.Linear(1, 1)})
    with caplog.at_level(logging.WARNING):
        build_optimizer(OptimizerConfig(optimizer="muon"), model)
    assert bool(mentions("--optimizer muon", f"{rows * 12_000:,}").search(caplog.text)) == warns


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


def test_loaded_optimizer_state_continues_bitwise():
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
    with pytest.raises(ValueError, match=mentions("Muon")):
        build([], [nn.Parameter(torch.zeros(2))])


# --- schedules


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_lr_schedule_steps_once_per_update(name):
    asked = ScheduleConfig(lr_scheduler=name, lr_step_rules="1:5,0.1")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(asked, optimizer, max_train_steps=10, warmup_steps=2)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert max(rates) == 1.0
    assert (
        rates[9]
        == {
            "constant": 1.0,
            "constant_with_warmup": 1.0,
            "piecewise_constant": pytest.approx(0.1),
            "linear": pytest.approx(1 / 8),
            "polynomial": pytest.approx(1 / 8, abs=1e-5),
            "cosine": pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8))),
            "cosine_with_restarts": pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8))),
        }[name]
    )


def test_warmup_stable_decay_in_images(train_args, tmp_path):
    flags = ["--lr_scheduler=warmup_stable_decay", "--lr_warmup_kimg=0.008", "--lr_decay_kimg=0.016"]
    arguments = [argument for argument in train_args if not argument.startswith("--lr_warmup")]
    train([*arguments, *flags, "--max_train_steps=10", "--learning_rate=1"])
    rates = [event.value for event in logged(tmp_path / "run").Scalars("train/learning_rate")]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


# --- averages


def weights_and_averages(num_steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The end of a random walk, and the averages of ours and of diffusers; one parameter is not trained."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 32)) for _ in range(3)]
    parameters[1].requires_grad_(False)
    options = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    ours = InPlaceEMA(parameters, **options)
    theirs = EMAModel(parameters, **options)
    for _ in range(num_steps):
        for parameter in parameters[::2]:
            parameter.data += 0.1 * torch.randn_like(parameter)
        ours.step(parameters)
        theirs.step(parameters)
        assert ours.cur_decay_value == theirs.cur_decay_value
    return [parameter.detach() for parameter in parameters], ours.shadow_params, theirs.shadow_params


@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_average_in_place_is_that_of_diffusers(num_steps):
    weights, ours, theirs = weights_and_averages(num_steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[1], weights[1])
    assert num_steps > 1 or all(map(torch.equal, ours, weights))  # the first step takes the weights


def test_average_is_updated_without_a_second_copy():
    parameters = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(8)]
    allocated = {}
    for ema in (InPlaceEMA(parameters), EMAModel(parameters, foreach=True)):
        with torch.profiler.profile(profile_memory=True) as profiler:
            ema.step(parameters)
        allocated[type(ema)] = max(event.self_cpu_memory_usage for event in profiler.events())
    assert allocated[EMAModel] >= 4000  # what is measured is there to be found
    assert allocated[InPlaceEMA] < 100


def test_average_is_put_into_the_network_and_back_without_a_copy():
    model = torch.nn.Linear(4, 4)
    ema = InPlaceEMA(model.parameters())
    with torch.no_grad():
        model.weight.fill_(2.0)
    weight, average = model.weight.data_ptr(), ema.shadow_params[0].data_ptr()
    with pytest.raises(RuntimeError, match="in the middle"), ema_weights(ema, model):
        assert (model.weight.data_ptr(), ema.shadow_params[0].data_ptr()) == (average, weight)
        raise RuntimeError("in the middle")
    assert (model.weight.data_ptr(), ema.shadow_params[0].data_ptr()) == (weight, average)
    assert (model.weight == 2).all() and model.weight.requires_grad


def test_weight_of_a_step_halves_after_the_half_life():
    """A weight that jumps from 0 to 1 after the ramp-up: half of it after half_life images, 3/4 after twice that."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = HalfLifeEMA([parameter], half_life=800, ramp_up=0.5, batch_size=8)
    for _ in range(1000):
        ema.step([parameter])
    parameter.data.fill_(1.0)
    for expected in (0.5, 0.75):
        for _ in range(100):
            ema.step([parameter])
        assert ema.shadow_params[0].item() == pytest.approx(expected, rel=1e-9)


def test_half_life_ramps_up_with_the_images_seen():
    ema = HalfLifeEMA([torch.nn.Parameter(torch.zeros(1))], half_life=1e6, ramp_up=0.05, batch_size=64)
    for step in (1, 10, 1000):
        assert ema.get_decay(step) == pytest.approx(0.5 ** (64 / (0.05 * 64 * step)))
    assert ema.get_decay(10**9) == pytest.approx(0.5 ** (64 / 1e6))


def test_several_widths_are_saved_previewed_and_the_best_is_named(train_args, tmp_path):
    flags = ["--ema_half_life_kimg", "0.004", "0.02", "--ema_ramp_up=1", "--validation_fraction=0.25"]
    flags += ["--max_train_steps=12", "--checkpointing_steps=6", "--validation_steps=6", "--learning_rate=1e-2"]
    train([*train_args, *flags])
    run_dir = tmp_path / "run"
    names = ("ema_0.004kimg", "ema_0.02kimg")
    scalars = {name: [e.value for e in logged(run_dir).Scalars(f"validation/loss_{name}")][-1] for name in names}
    best = min(names, key=scalars.get)
    half_life = best.removeprefix("ema_").removesuffix("kimg")
    assert f"half-life of {half_life} kimg" in (run_dir / "README.md").read_text()
    file = "diffusion_pytorch_model.safetensors"
    weights = {name: load_file(run_dir / f"checkpoint-12/unet_{name}" / file) for name in names}
    saved = load_file(run_dir / "unet" / file)
    assert all(torch.equal(saved[key], weights[best][key]) for key in saved)
    assert any(not torch.equal(weights[names[0]][key], weights[names[1]][key]) for key in saved)
    assert len(list((run_dir / "previews").glob("step_00000012_ema_*.png"))) == 2

    other = [*train_args, *flags, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=6"])
    train([*other, "--resume_from_checkpoint=latest"])
    parts = [f"unet_{name}/{file}" for name in names]
    assert_same_files(run_dir / "checkpoint-12", tmp_path / "other/checkpoint-12", parts)


# --- the guard against steps that are not finite


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_fp16_overflow_moves_neither_schedule_nor_ema(kind):
    """torch's gradient scaler on the CPU, with a scale under which the gradient overflows once."""
    PartialState(cpu=True)  # for the logs
    model = DiffiTUNet2DModel(**TINY_CONFIG)
    optimizer = build_optimizer(OptimizerConfig(optimizer=kind, learning_rate=1e-3), model)
    averages = build_ema(EmaConfig(), model, batch_size=4)
    schedule = build_lr_scheduler(ScheduleConfig(), optimizer, max_train_steps=4, warmup_steps=0)
    state = TrainingState(model, averages, optimizer, schedule, 24, "digest")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    guard = NonFiniteGuard(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outcomes = []
    for _ in range(2):
        loss = model(torch.ones(1, 3, 8, 8), 5).sample.add(1e3).pow(2).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        guard.watch(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update(2.0**10)
        outcomes.append(finish_step(state, guard))
        counts = (state.global_step, state.lr_scheduler.last_epoch, state.ema_models["ema"].optimization_step)
        assert counts == (len(outcomes) - 1,) * 3
        if len(outcomes) == 1:
            assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        optimizer.zero_grad()
    assert outcomes == [False, True]


class IgnoringAdamW(torch.optim.AdamW):
    """Ignores `found_inf`, as torch's fused AdamW does on Apple's GPUs."""

    def step(self, closure=None):
        found_inf, self.found_inf = getattr(self, "found_inf", None), None
        loss = super().step(closure)
        self.found_inf = found_inf
        return loss


def test_fused_optimizer_is_asked_whether_it_skips():
    assert obeys_found_inf(torch.optim.AdamW, torch.device("cpu"))
    assert not obeys_found_inf(IgnoringAdamW, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("first_bad", [0, 1])  # a state that does not exist yet; one that does
def test_steps_of_an_optimizer_that_ignores_found_inf_are_undone(kind, first_bad, monkeypatch, caplog):
    """Weights and moments after two good steps are bitwise those without the bad one, as where torch skips it."""
    PartialState(cpu=True)  # for the logs
    asked = OptimizerConfig(optimizer=kind, learning_rate=1e-2, adam_weight_decay=0.1)
    models = [DiffiTUNet2DModel(**TINY_CONFIG) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(asked, models[0])]
    assert caplog.text == ""
    monkeypatch.setattr("torch.optim.AdamW", IgnoringAdamW)
    monkeypatch.setattr("diffit.optimization.OBEYING_DEVICES", ())  # as if "cpu" were "mps"
    optimizers.append(build_optimizer(asked, models[1]))
    assert mentions("cpu", "AdamW", torch.__version__).search(caplog.text)
    for side, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        guard, taken = NonFiniteGuard(optimizer), []
        for step in range(3):
            is_bad = step == first_bad
            if is_bad and side == 0:
                continue
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (1 + index % 3) * (1 + (step > first_bad)))
                parameter.grad.fill_(torch.nan) if is_bad else None
            guard.watch(torch.tensor(torch.nan if is_bad else 1.0))
            optimizer.step()
            taken.append(guard.outcome())
        assert taken == ([True, True] if side == 0 else [step != first_bad for step in range(3)])
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
        states = [optimizer.state[parameter] for optimizer, parameter in zip(optimizers, (first, second), strict=True)]
        assert states[0].keys() == states[1].keys() and states[0]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_optimizer_that_ignores_found_inf_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    NonFiniteGuard(torch.optim.AdamW([parameter], fused=True))
    for optimizer in (torch.optim.AdamW([parameter], foreach=True), torch.optim.SGD([parameter])):
        with pytest.raises(TypeError, match=mentions(type(optimizer).__name__, "found_inf")):
            NonFiniteGuard(optimizer)
