"""The checks of `benchmarks/gpu.py`: attention backends, CUDA graphs, float16. The report lists wrong values."""

import copy
import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from diffit.config import OptimizerConfig
from diffit.diffusion_config import DiffusionConfig
from diffit.formulations import Formulation, choose_formulation
from diffit.losses import NoisyBatch, denoising_losses
from diffit.networks import model_class, sample_shape, set_attention_backend, why_not_xformers
from diffit.optimization import build_optimizer
from diffit_model import MAX_WINDOWS, TimeDependentSelfAttention

ROOT = Path(__file__).parents[1]
BACKENDS = ("native", "xformers", "flex")
# Tolerated deviation from float64, as a fraction of the largest value of the tensor.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
INPUT_SCALES = (1, 16, 256, 4096)  # of unit noise, for the range of float16


@dataclass(frozen=True)
class Geometry:
    """The sizes of one attention: window in tokens, number and size of heads, number of windows."""

    window: tuple[int, int]
    heads: int
    head_dim: int
    num_windows: int

    def __str__(self) -> str:
        height, width = self.window
        return f"{self.num_windows} windows of {height} x {width}, {self.heads} heads of {self.head_dim}"


GEOMETRIES = [
    Geometry((4, 4), 4, 32, 64),  # CIFAR-10
    Geometry((8, 8), 4, 64, 32),  # FFHQ-64
    Geometry((16, 16), 16, 72, 2),  # XL/2 at 256 pixels
    Geometry((32, 32), 16, 72, 2),  # XL/2 at 512 pixels
    Geometry((4, 4), 3, 24, 8),
    Geometry((5, 3), 2, 40, 6),  # number of tokens not a multiple of 8
    Geometry((4, 4), 1, 16, 70_000),  # more windows than CUDA's grids have rows
]
TINY_GEOMETRIES = [Geometry((4, 4), 2, 24, 4), Geometry((5, 3), 1, 8, 2)]


@dataclass(frozen=True)
class Case:
    """A network to train: its config, and the batch size to try first, which is halved until it fits."""

    name: str
    config: dict
    batch_size: int
    formulation: str


def read_cases(tiny: bool) -> list[Case]:
    def read(name: str, **more) -> dict:
        return json.loads((ROOT / f"configs/model/{name}.json").read_text()) | more

    pixels = {"in_channels": 3, "out_channels": 3, "num_class_embeds": None}
    if tiny:
        transformer = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4}
        latents = read("diffit_s_2", in_channels=4, out_channels=8, num_embeds_ada_norm=10, **transformer)
        unet = read("digits8", block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, **pixels)
        return [Case("tiny latents", latents, 4, "ddpm"), Case("tiny pixels", unet, 4, "edm")]
    return [
        Case("XL/2, 256 px", read("diffit_xl_2", in_channels=4, out_channels=8, num_embeds_ada_norm=1000), 64, "ddpm"),
        Case("CIFAR-10 (I.1)", read("cifar10", **pixels), 512, "edm"),
        Case("FFHQ-64 (I.1)", read("ffhq64", **pixels), 256, "edm"),
    ]


class Report:
    """A Markdown report, and the list of wrong values."""

    def __init__(self):
        self.lines: list[str] = []
        self.wrong: list[str] = []

    def table(self, title: str, note: str, head: list[str]) -> Callable[..., None]:
        """Starts a table, and returns a function that adds a row to it."""
        self.add("", f"## {title}", "", note, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}")
        return lambda *row: self.add(f"| {' | '.join(map(str, row))} |")

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            self.lines.append(line)

    def verdict(self, right: bool, what: str) -> str:
        """Returns `ok` or `WRONG`, and records the latter."""
        if not right:
            self.wrong.append(what)
        return "ok" if right else "**WRONG**"


def reason(error: Exception) -> str:
    """An exception as one line for a cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].replace("|", "/")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> None:
    """Frees memory, including the graphs of torch.compile, which count towards its limit for each function."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Are the backends right?


def why_not(
    backend: str,
    model: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool = True,
    num_windows: int = 1,
) -> str | None:
    """The reason why a backend cannot run a model here (for xformers: why our processor falls back), or None."""
    if backend == "flex" and device.type == "cpu" and gradients:
        return "has no backward pass on a CPU"
    if backend == "flex" and device.type == "cuda" and not has_triton():
        return "torch finds no Triton that works here"
    if backend != "xformers":
        return None
    if num_windows > MAX_WINDOWS:
        return f"takes {MAX_WINDOWS} windows at most"
    return why_not_xformers(model, device, dtype)


def outputs_and_gradients(
    attention: TimeDependentSelfAttention, inputs: list[torch.Tensor], weights: torch.Tensor, gradients: bool = True
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of its weighted sum with respect to tokens, time tokens and all parameters."""
    inputs = [x.detach().requires_grad_(gradients) for x in inputs]
    if not gradients:
        with torch.no_grad():
            return {"output": attention(*inputs)}
    output = attention(*inputs)
    leaves = {"tokens": inputs[0], "time tokens": inputs[1]} | dict(attention.named_parameters())
    sums = torch.autograd.grad((output.to(weights.dtype) * weights).sum(), list(leaves.values()))
    return {"output": output.detach()} | dict(zip(leaves, sums, strict=True))


def deviations(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest deviation of each tensor, as a fraction of its largest value."""
    return {
        name: ((tensor.double() - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, tensor in actual.items()
    }


def check_backends(
    report: Report, device: torch.device, geometries: list[Geometry], dtypes: list[torch.dtype]
) -> None:
    """Compares each backend in each dtype with the plain definition in float64."""
    tolerances = ", ".join(f"{dtype_name(dtype)} {TOLERANCES[dtype]:g}" for dtype in dtypes)
    row = report.table(
        "Attention against its definition",
        "One attention layer, its weights in float32 and its inputs under autocast as in training, against the plain "
        "definition in float64: the largest deviation of the output, and of the gradients of tokens, time tokens and "
        f"all parameters, as a share of the tensor's largest value. Tolerances: {tolerances}.",
        ["attention", "dtype", "backend", "output", "gradients", "worst gradient", "verdict"],
    )
    for geometry in geometries:
        torch.manual_seed(0)
        width, batch = geometry.heads * geometry.head_dim, 2
        attention = TimeDependentSelfAttention(width, 64, geometry.heads, geometry.head_dim, geometry.window)
        torch.nn.init.normal_(attention.relative_position_bias_table)
        attention.to(device)
        shape = (geometry.num_windows, math.prod(geometry.window), width)
        inputs = [torch.randn(shape, device=device), torch.randn(batch, 64, device=device)]
        weights = torch.randn(shape, device=device)
        reference = copy.deepcopy(attention).double()
        set_attention_backend(reference, "_native_math")
        expected = outputs_and_gradients(reference, [x.double() for x in inputs], weights.double())
        for dtype in dtypes:
            for backend in BACKENDS:
                names = [str(geometry), dtype_name(dtype), f"`{backend}`"]
                has_gradients = backend != "flex" or device.type != "cpu"  # torch has none there
                problem = why_not(backend, attention, device, dtype, has_gradients, geometry.num_windows)
                if problem is not None:
                    row(*names, "", "", "", f"not run: {problem}")
                    continue
                set_attention_backend(attention, backend)
                try:
                    with autocast(device, dtype):
                        actual = outputs_and_gradients(attention, inputs, weights, has_gradients)
                except Exception as error:
                    row(*names, "", "", "", f"{report.verdict(False, ', '.join(names))}: {reason(error)}")
                    continue
                found = deviations(actual, expected)
                output = found.pop("output")
                worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]), default="none on a CPU")
                right = all(deviation <= TOLERANCES[dtype] for deviation in (output, *found.values()))  # NaN is not
                row(
                    *names,
                    f"{output:.1e}",
                    f"{found.get(worst, 0):.1e}",
                    worst,
                    report.verdict(right, ", ".join(names)),
                )
            free_memory(device)


# ---------------------------------------------------------------------------------------------------------------------
# 2. CUDA graphs


class Graph:
    """A function of a dictionary of tensors, captured as a CUDA graph; without CUDA, the function itself.

    Args:
        function: maps named tensors to named tensors, without side effects.
        example: inputs with the right shapes.
    """

    def __init__(self, function: Callable[[dict], dict], example: dict[str, torch.Tensor]):
        self.function, self.inputs, self.graph = function, {k: x.clone() for k, x in example.items()}, None
        if all(x.device.type != "cuda" for x in example.values()):
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen and compiled outside of the capture
            for _ in range(3):
                function(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(self.inputs)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        if self.graph is None:
            return self.function(self.inputs)
        self.graph.replay()
        return self.outputs


def graph_inputs(case: Case, device: torch.device, seed: int, batch_size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch_size, *sample_shape(case.config), generator=generator)
    timesteps = torch.randint(0, 1000, (batch_size,), generator=generator).float()
    return {"sample": sample.to(device), "timesteps": timesteps.to(device)}


def graph_functions(model: torch.nn.Module, device: torch.device) -> dict[str, Callable[[dict], dict]]:
    """The functions to capture: forward; forward and backward in training mode; forward with class labels."""

    def predict(inputs: dict, **conditions) -> torch.Tensor:
        # Autocast's cache of 16-bit weights is disabled, because it would outlive the capture.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return model(inputs["sample"], inputs["timesteps"], **conditions).sample

    @torch.no_grad()
    def forward(inputs: dict) -> dict:
        model.eval()
        return {"output": predict(inputs)}

    @torch.no_grad()
    def forward_with_labels(inputs: dict) -> dict:
        model.eval()
        return {"output": predict(inputs, class_labels=inputs["timesteps"].long() % model.null_label)}

    def forward_and_backward(inputs: dict) -> dict:
        model.train()
        output = predict(inputs)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(output.float().square().mean(), parameters)
        return {"output": output.detach()} | dict(zip(names, gradients, strict=True))

    functions = {"forward": forward, "forward and backward": forward_and_backward}
    # Last, because labels are checked on the host, which is not allowed during a capture.
    return functions if model.null_label is None else functions | {"forward with class labels": forward_with_labels}


def check_graphs(report: Report, device: torch.device, cases: list[Case]) -> None:
    """Captures graphs, and compares a replay on new inputs with eager execution."""
    tolerance = TOLERANCES[torch.bfloat16]
    row = report.table(
        "CUDA graphs",
        "Captured under bf16 autocast, replayed on other inputs and compared with eager: the largest deviation of a "
        f"tensor as a share of its largest value; tolerance {tolerance:g}, because some kernels add in any order. "
        "What cannot be captured says why.",
        ["network", "backend", "part", "largest deviation", "verdict"],
    )
    for case in cases:
        for backend in BACKENDS:
            free_memory(device)
            torch.manual_seed(0)
            model = model_class(case.config).from_config(case.config)
            for parameter in model.parameters():  # an output of zero proves nothing
                torch.nn.init.normal_(parameter, std=0.02)
            model.to(device)
            if why_not(backend, model, device, torch.bfloat16) is not None:
                continue
            set_attention_backend(model, backend)
            for part, function in graph_functions(model, device).items():
                names = [case.name, f"`{backend}`", part]
                try:
                    graph = Graph(function, graph_inputs(case, device, seed=0))
                    other = graph_inputs(case, device, seed=1)
                    replayed = {name: x.clone() for name, x in graph(other).items()}
                    found = deviations(replayed, {name: x.double() for name, x in function(other).items()})
                except Exception as error:
                    cause = error.__context__ or error  # the end of a capture that failed raises once more
                    row(*names, "", f"not captured: {reason(cause)}")
                    continue
                right = all(deviation <= tolerance for deviation in found.values())
                row(*names, f"{max(found.values()):.1e}", report.verdict(right, f"graph of {', '.join(names)}"))


# ---------------------------------------------------------------------------------------------------------------------
# 3. float16


def noisy_batch(case: Case, formulation: Formulation, device: torch.device, seed: int) -> NoisyBatch:
    """Two random images, as training gives them to `denoising_losses`, at the middle one of three noise levels."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 2, *sample_shape(case.config), generator=generator).to(device).unbind()
    levels = torch.full((2,), formulation.level_grid(3)[1], device=device)
    return NoisyBatch(formulation.network_inputs(clean, noise, levels), clean, noise, levels, {"class_labels": None})


def check_overflow(report: Report, device: torch.device, case: Case) -> None:
    """Checks that a step that overflows is skipped and halves the scale, and that the next step is taken."""
    row = report.table(
        "An overflowing step in fp16",
        f"{case.name}, trained with torch's GradScaler as accelerate uses it; the loss of the second step is made "
        "infinite.",
        ["step", "scale before", "scale after", "weights", "verdict"],
    )
    asked = OptimizerConfig()
    torch.manual_seed(0)
    model = model_class(case.config).from_config(case.config).train().to(device)
    set_attention_backend(model, "native")
    optimizer = build_optimizer(asked, model)
    formulation = choose_formulation(DiffusionConfig(formulation=case.formulation), pretrained={}, in_latents=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step, factor in enumerate((1.0, math.inf, 1.0), start=1):
        noisy, scale = noisy_batch(case, formulation, device, seed=step), scaler.get_scale()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with autocast(device, torch.float16):
            loss = denoising_losses(model, formulation, noisy).mean() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), asked.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        finite = all(parameter.isfinite().all() for parameter in model.parameters())
        overflow = math.isinf(factor)
        right = finite and changed != overflow and scaler.get_scale() == (scale / 2 if overflow else scale)
        verdict = report.verdict(right, f"fp16 step {step}")
        row(step, f"{scale:g}", f"{scaler.get_scale():g}", "changed" if changed else "unchanged", verdict)


def first_overflow(model: torch.nn.Module, inputs: dict, scale: float, device: torch.device) -> str | None:
    """Name of the first module with a non-finite output, or None."""
    bad: list[str] = []

    def look(name: str) -> Callable:
        def hook(module, args, output):
            tensor = output if isinstance(output, torch.Tensor) else None
            if tensor is not None and not bad and not tensor.isfinite().all():
                bad.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    with torch.no_grad(), autocast(device, torch.float16):
        model(scale * inputs["sample"], inputs["timesteps"])
    for hook in hooks:
        hook.remove()
    return bad[0] if bad else None


def check_range(report: Report, device: torch.device, cases: list[Case]) -> None:
    """Reports where activations leave the range of float16 as the input grows."""
    row = report.table(
        "Range of activations in fp16",
        "Networks as they are initialized, under autocast, on noise of this deviation; training feeds them about 1, "
        "which must stay finite. A trained network may be elsewhere.",
        ["network", *(f"deviation {scale}" for scale in INPUT_SCALES), "verdict"],
    )
    for case in cases:
        free_memory(device)
        torch.manual_seed(0)
        model = model_class(case.config).from_config(case.config).eval().to(device)
        set_attention_backend(model, "native")
        inputs = graph_inputs(case, device, seed=0)
        found = [first_overflow(model, inputs, scale, device) for scale in INPUT_SCALES]
        cells = ["finite" if name is None else f"overflow in `{name}`" for name in found]
        row(case.name, *cells, report.verdict(found[0] is None, f"range of {case.name}"))
