"""Checks and measurements that need CUDA: correctness of the attention backends, and training throughput.

    python -m benchmarks.gpu            # everything; most of the time is compilation
    python -m benchmarks.gpu --quick    # networks uncompiled, without float16
    python -m benchmarks.gpu --device cpu --tiny    # runs the same code without a GPU; its figures mean nothing

Writes `benchmarks/results/gpu.md`. Ends with 1 if a number is wrong, with 2 if there is no CUDA device.
"""

import argparse
import contextlib
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu_checks import (
    BACKENDS,
    GEOMETRIES,
    TINY_GEOMETRIES,
    TOLERANCES,
    Case,
    Report,
    autocast,
    check_backends,
    check_graphs,
    check_overflow,
    check_range,
    free_memory,
    read_cases,
    reason,
    why_not,
)
from benchmarks.gpu_inference import check_inference, inference_geometries
from diffit.batches import BatchPreparer
from diffit.config import EmaConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from diffit.device_config import DeviceConfig
from diffit.devices import set_up_device
from diffit.diffusion_config import DiffusionConfig
from diffit.formulations import choose_formulation
from diffit.logs import LossBins, peak_memory
from diffit.losses import denoising_losses, nan_if_non_finite
from diffit.networks import model_class, sample_shape, set_up_model, training_flops_per_image
from diffit.optimization import (
    NonFiniteGuard,
    TrainingState,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    finish_step,
)
from diffit.packing import Batch

ROOT = Path(__file__).parents[1]
PEAKS = {  # dense FLOP/s in bf16, of NVIDIA's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
SECTIONS = ("backends", "training", "synchronization", "fp16", "graphs")


# ---------------------------------------------------------------------------------------------------------------------
# 1. How fast is a training step?


class Training:
    """A network with everything that `train_diffit.py` builds around it. A call runs a step on random images."""

    def __init__(self, case: Case, backend: str, compiled: bool, batch_size: int, device: torch.device):
        prediction_type = "epsilon" if case.formulation == "ddpm" else None
        asked = DiffusionConfig(formulation=case.formulation, prediction_type=prediction_type)
        self.formulation = choose_formulation(asked, pretrained={}, in_latents=False)
        self.device, self.dtype, self.batch_size = device, torch.bfloat16, batch_size
        torch.manual_seed(0)
        model = model_class(case.config).from_config(case.config).train()
        asked = ModelConfig(model_config=case.name, attention_backend=backend, compile=compiled)
        set_up_model(model, asked, device, mixed_precision="bf16")
        optimizer = build_optimizer(OptimizerConfig(), model)
        emas = build_ema(EmaConfig(), model, batch_size)
        scheduler = build_lr_scheduler(ScheduleConfig(), optimizer, max_train_steps=10**6, warmup_steps=1)
        self.state = TrainingState(model, emas, optimizer, scheduler, num_images=batch_size, data_digest="")
        self.guard = NonFiniteGuard(optimizer)
        self.losses = LossBins(device)
        self.prepare_batch = BatchPreparer(
            self.formulation, device, null=model.null_label, label_dropout=DiffusionConfig.label_dropout
        )
        images = (batch_size, *sample_shape(case.config))
        batch = {name: torch.randn(images) for name in ("pixel_values", "noise")}
        batch |= {name: torch.rand(batch_size) for name in ("time_uniform", "dropout_uniform")}
        batch["position"] = torch.arange(batch_size)
        batch["class_labels"] = torch.randint(0, model.null_label or 1, (batch_size,))
        self.batch = Batch.pack(batch)
        if device.type == "cuda":
            self.batch = self.batch.pin_memory()

    def __call__(self) -> torch.Tensor:
        """Runs one optimizer step in the order of the script, and returns the loss, shape ()."""
        state = self.state
        noisy = self.prepare_batch(self.batch)
        with autocast(self.device, self.dtype):
            losses = denoising_losses(state.model, self.formulation, noisy)
        nan_if_non_finite(losses).mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), OptimizerConfig.max_grad_norm)
        finish_step(state, self.guard)
        self.guard.watch(grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        self.losses.add(losses, noisy.level_bins)
        state.position += self.batch_size
        return losses.detach().mean()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int, rounds: int = 5) -> float:
    """The median over rounds of the mean seconds per call."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the practical peak of the device."""
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    a @ b
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats=20)


def build_training(case: Case, backend: str, compiled: bool, device: torch.device) -> Training:
    """A warmed-up trainer whose batch size is that of the case, halved until it fits in memory."""
    batch_size = case.batch_size
    while True:
        try:
            training = Training(case, backend, compiled, batch_size, device)
            for _ in range(3):
                training()
            return training
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        training, batch_size = None, batch_size // 2
        free_memory(device)


def measure_training(report: Report, device: torch.device, cases: list[Case], modes: list[bool], steps: int) -> None:
    """Reports images/s, peak memory and fraction of the practical peak of each network, backend and mode."""
    reached = matmul_flops(device, torch.bfloat16)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sheet = next((peak for key, peak in PEAKS.items() if key in name), None)
    row = report.table(
        "Training step",
        "bf16 autocast; diffusion, forward, backward, clipping, fused AdamW, average. MFU: FLOPs of the network, "
        f"backward counted as twice forward, over those of a matrix product of bf16 here ({reached / 1e12:.1f} "
        f"TFLOP/s); in brackets over the data sheet ({'not known' if sheet is None else f'{sheet / 1e12:.0f}'}).",
        ["network", "backend", "compiled", "images a step", "images/s", "peak memory, GiB", "MFU", "loss finite"],
    )
    for case in cases:
        flops = training_flops_per_image(case.config)
        with torch.device("meta"):
            outline = model_class(case.config).from_config(case.config)
        for backend in BACKENDS:
            for compiled in modes:
                names = [case.name, f"`{backend}`", "blocks" if compiled else "no"]
                problem = why_not(backend, outline, device, torch.bfloat16)
                if problem is not None:
                    row(*names, "", "", "", "", f"not run: {problem}")
                    continue
                free_memory(device)
                try:
                    training = build_training(case, backend, compiled, device)
                    seconds = seconds_of(training, device, steps)
                except Exception as error:
                    verdict = report.verdict(False, f"training of {', '.join(names)}")
                    row(*names, "", "", "", "", f"{verdict}: {reason(error)}")
                    continue
                finite = report.verdict(math.isfinite(training().item()), f"loss of {', '.join(names)}")
                images = training.batch_size / seconds
                share = f"{images * flops / reached:.0%}" + (f" ({images * flops / sheet:.0%})" if sheet else "")
                memory = peak_memory(device) / 2**30
                row(*names, training.batch_size, f"{images:.1f}", f"{memory:.2f}", share, finite)
                training = None


# ---------------------------------------------------------------------------------------------------------------------
# 2. Does the host wait for the device between logs?


@contextlib.contextmanager
def forbidden_synchronization(device: torch.device) -> Iterator[None]:
    """Turns every host-device synchronization into an exception, except waiting for an event."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_synchronization(report: Report, device: torch.device, cases: list[Case]) -> None:
    """Trains for some steps with a NonFiniteGuard while synchronization is an error."""
    row = report.table(
        "Synchronisation",
        "Three steps with `torch.cuda.set_sync_debug_mode('error')`, with the guard against non-finite steps, whose "
        "outcome the host asks for one step late, by an event.",
        ["network", "verdict"],
    )
    for case in cases:
        free_memory(device)
        training = build_training(case, "native", False, device)
        try:
            with forbidden_synchronization(device):
                for _ in range(3):
                    training()
        except RuntimeError as error:
            row(case.name, f"{report.verdict(False, f'{case.name} synchronizes')}: {reason(error)}")
        else:
            row(case.name, "ok" if device.type == "cuda" else "not watched: needs CUDA")
        training = None


# ---------------------------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device, argv: list[str]) -> list[str]:
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "triton", "xformers", "diffusers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    name = f"{platform.machine()} CPU: these figures are of no GPU"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
        name = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    return [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu{''.join(f' {shlex.quote(x)}' for x in argv)}`",
        "",
        f"{name}; " + ", ".join(versions) + ".",
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs all checks and measurements, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="only fp32 and bf16, and no compilation except flex")
    parser.add_argument("--tiny", action="store_true", help="use tiny networks, to test this script")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--output", type=Path, help="report to write (default: benchmarks/results/gpu.md; none on a CPU)"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    set_up_device(device, DeviceConfig())  # as the scripts do
    torch._dynamo.config.recompile_limit = 64
    cases, report = read_cases(args.tiny), Report()
    report.add(*describe_machine(device, argv))
    if "backends" in args.sections:
        geometries = TINY_GEOMETRIES if args.tiny else GEOMETRIES
        dtypes = [torch.float32, torch.bfloat16] if args.quick else list(TOLERANCES)
        check_backends(report, device, geometries, dtypes)
        check_inference(report, device, geometries if args.tiny else inference_geometries(), dtypes)
    if "training" in args.sections:
        compiled = [False] if args.quick or args.tiny else [False, True]
        measure_training(report, device, cases, compiled, steps=2 if args.tiny else 10)
    if "synchronization" in args.sections:
        check_synchronization(report, device, cases)
    if "fp16" in args.sections:
        check_overflow(report, device, cases[1])
        check_range(report, device, cases)
    if "graphs" in args.sections:  # last, because a capture that fails may leave CUDA in disorder
        check_graphs(report, device, cases)
    report.add("", "Nothing is wrong." if not report.wrong else f"**Wrong: {'; '.join(report.wrong)}.**")
    output = args.output or (ROOT / "benchmarks/results/gpu.md" if device.type == "cuda" else None)
    if output is not None:
        output.write_text("\n".join(report.lines) + "\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
