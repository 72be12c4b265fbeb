"""Time and memory of training steps and sampling: against plain networks, and as a fraction of the machine's peak.

    python -m benchmarks.speed

In each case the sides take turns in one process; the reported ratio is the median over the pairs. Peak memory is
measured in a separate process per side. The plain networks are in `benchmarks/plain_models.py`. Writes
`benchmarks/results/speed.md`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import psutil
import torch
from diffusers import DDIMScheduler
from torch.profiler import profile
from torch.utils.benchmark import Timer

from benchmarks.loop import GIVE_BACK, KEEP
from benchmarks.plain_models import by_the_letter
from diffit.cpu_kernels import kernelize
from diffit.networks import model_class, sample_shape, training_flops_per_image
from diffit.optimization import HalfLifeEMA
from diffit_pipeline import DiffiTPipeline

ROOT = Path(__file__).parents[1]
MATRIX = 2048
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward")
SAMPLING_STEPS = 2  # timed out of 50, because all steps cost the same
# Case: config, its fields that depend on the data, images per batch, whether the plain side gathers a bias per window.
CASES = {
    "latent S/2": ("diffit_s_2", {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}, 16, False),
    "CIFAR-10 I.1": ("cifar10", {"in_channels": 3, "out_channels": 3, "num_class_embeds": None}, 32, True),
    "emoji32": ("emoji32", {"in_channels": 3, "out_channels": 3, "num_class_embeds": None}, 16, True),
}
SAMPLED = {"in_channels": 3, "out_channels": 3, "num_class_embeds": 10}
SIDES = {  # the first is the baseline of the others
    "latent S/2": ("plain", "ours", "ours, gradient checkpointing"),
    "CIFAR-10 I.1": ("plain", "ours"),
    "sampling": ("plain", "ours"),
}
# Targets for the ratios of time and memory to the plain side, by case and side.
TARGETS = {
    ("latent S/2", "ours"): (0.95, 0.85),
    ("latent S/2", "ours, gradient checkpointing"): (1.35, 0.45),
    ("CIFAR-10 I.1", "ours"): (0.85, 0.70),
    ("sampling", "ours"): (0.80, None),
}


def read_config(name: str, data_fields: dict) -> dict:
    """A config of configs/model, completed with the fields that depend on the data."""
    return json.loads((ROOT / f"configs/model/{name}.json").read_text()) | data_fields


def build_model(config: dict, side: str, bias_per_window: bool) -> torch.nn.Module:
    """The network of a side, with the same weights on every side."""
    torch.manual_seed(0)
    model = model_class(config).from_config(config)
    if side.startswith("plain"):
        by_the_letter(model, bias_per_window)
    else:
        kernelize(model)
    if side.endswith("gradient checkpointing"):
        model.enable_gradient_checkpointing()
    return model


def training_step(case: str, side: str) -> Callable[[], None]:
    """A training step of a side: forward, backward, AdamW and weight average."""
    name, data_fields, batch_size, bias_per_window = CASES[case]
    config = read_config(name, data_fields)
    model = build_model(config, side, bias_per_window)
    sample = torch.randn(batch_size, *sample_shape(config))
    timesteps = torch.randint(0, 1000, (batch_size,))
    plain = side.startswith("plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=None if plain else True)
    if plain:
        average = [parameter.detach().clone() for parameter in model.parameters()]
    else:
        ema_model = HalfLifeEMA(model.parameters(), half_life=1e4, ramp_up=0.05, batch_size=batch_size)

    def step() -> None:
        model(sample, timesteps).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if plain:
            with torch.no_grad():
                for mean, parameter in zip(average, model.parameters(), strict=True):
                    mean.mul_(0.9999).add_(parameter, alpha=0.0001)
        else:
            ema_model.step(model.parameters())

    return step


def sampling(side: str) -> Callable[[], None]:
    """The first of 50 DDIM steps with classifier-free guidance, for 16 images of the CIFAR-10 network."""
    model = build_model(read_config("cifar10", SAMPLED), side, bias_per_window=True).eval()
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    pipeline = DiffiTPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    set_timesteps = scheduler.set_timesteps

    def first_timesteps(*args, **kwargs) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[:SAMPLING_STEPS]

    scheduler.set_timesteps = first_timesteps
    labels = [i % 10 for i in range(16)]
    return lambda: pipeline(labels, num_inference_steps=50, guidance_scale=2.0, output_type="latent")


def build(case: str, side: str) -> Callable[[], None]:
    """The function that is timed."""
    return sampling(side) if case == "sampling" else training_step(case, side)


def time_in_turn(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each function, over rounds in which each takes one turn."""
    threads = torch.get_num_threads()
    timers = {name: Timer("work()", globals={"work": work}, num_threads=threads) for name, work in works.items()}
    for timer in timers.values():
        timer.timeit(1)  # warm up
    seconds = {name: [] for name in works}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(1).mean)
    return seconds


def peak_memory(case: str, side: str) -> float:
    """Peak memory of three steps in a separate process, in bytes, not counting its libraries.

    On Linux a process inherits the peak of its parent, so call this before the parent has allocated anything large.
    """
    command = [sys.executable, "-m", "benchmarks.speed", "--memory_of", case, side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | GIVE_BACK)
    return float(done.stdout.split()[-1])


def report_memory(case: str, side: str) -> None:
    """Prints the peak memory of this process for `peak_memory` to read."""
    libraries = psutil.Process().memory_info().rss
    work = build(case, side)
    for _ in range(3):
        work()
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries)


def compare(case: str, memory: dict[str, float], rounds: int) -> list[str]:
    """Times the sides of a case; returns rows of the table of ratios, one for each side but the first.

    Args:
        case: a key of `SIDES`.
        memory: peak memory of each side in bytes.
        rounds: number of pairs.
    """
    seconds = time_in_turn({side: build(case, side) for side in memory}, rounds)
    plain, *sides = memory
    rows = []
    for side in sides:
        ratios = [a / b for a, b in zip(seconds[side], seconds[plain], strict=True)]
        ratio, memory_ratio = statistics.median(ratios), memory[side] / memory[plain]
        targets = TARGETS[case, side]
        rows.append(
            f"| {case}, {side} | {statistics.median(seconds[side]):.2f} s / {statistics.median(seconds[plain]):.2f} s "
            f"| **{ratio:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | {mark(ratio, targets[0])} "
            f"| {memory[side] / 2**30:.2f} / {memory[plain] / 2**30:.2f} GiB "
            f"| **{memory_ratio:.2f}** | {mark(memory_ratio, targets[1])} |"
        )
        print(rows[-1], flush=True)
    return rows


def mark(ratio: float, target: float | None) -> str:
    """States whether a ratio meets its target."""
    return "-" if target is None else f"{target}: {'met' if ratio <= target else '**missed**'}"


def fraction_of_limit(case: str, rounds: int) -> str:
    """A row of the table that compares a training step's throughput with that of a matrix product."""
    name, data_fields, batch_size, _ = CASES[case]
    flops = batch_size * training_flops_per_image(read_config(name, data_fields))
    a, b = torch.randn(2, MATRIX, MATRIX).unbind()
    step = training_step(case, "ours")
    seconds = time_in_turn({"limit": lambda: a @ b, "step": step}, rounds)
    peak = 2 * MATRIX**3 / statistics.median(seconds["limit"])
    speed = flops / statistics.median(seconds["step"])
    row = (
        f"| {case} | {batch_size} | {flops / batch_size / 1e9:.2f} | {batch_size * speed / flops:.1f} "
        f"| {speed / 1e9:.0f} | {peak / 1e9:.0f} | **{speed / peak:.2f}** |"
    )
    print(row, flush=True)
    return row


def where_time_goes(work: Callable[[], None]) -> str:
    """The operators' fractions of the time of `work`, first that of products and convolutions, common to all sides."""
    work()  # warm up
    with profile() as profiler:
        work()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key.removeprefix("aten::") in PRODUCTS)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    fractions = (f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in largest)
    return f"**{products / total:.0%}** products and convolutions ({', '.join(fractions)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds per case (default: 5)")
    parser.add_argument("--memory_of", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        report_memory(*args.memory_of)
        return
    if not KEEP.items() <= os.environ.items():  # glibc reads them when it starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEEP)

    memory = {case: {side: peak_memory(case, side) for side in sides} for case, sides in SIDES.items()}
    ratios = [row for case in SIDES for row in compare(case, memory[case], args.rounds)]
    fractions = [fraction_of_limit(case, args.rounds) for case in CASES]
    wheres = [
        f"- {case}, {side}: {where_time_goes(build(case, side))}" for case in SIDES for side in ("plain", "ours")
    ]
    wheres.append(f"- emoji32, ours: {where_time_goes(build('emoji32', 'ours'))}")
    lines = [
        "# Speed and memory",
        "",
        f"`python -m benchmarks.speed`, float32, eager, {args.rounds} alternating pairs in one process; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}.",
        "",
        "A training step is forward, backward, AdamW and EMA. For the latent-space network, *plain* is NVIDIA's model "
        "operation by operation, with torch's default AdamW and an EMA updated parameter by parameter. For the "
        "pixel-space network it is a literal implementation of Eq. 3-6 that gathers the bias for each window. Memory "
        "is the peak of a separate process, without its libraries, with freed blocks returned to the system "
        "immediately; during timing glibc keeps them, on both sides alike. Sampling: 50 DDIM steps with class "
        f"guidance, 16 images, {SAMPLING_STEPS} of the steps timed.",
        "",
        "| work | time: ours / plain | ratio (lowest to highest) | target | memory: ours / plain | ratio | target |",
        "|---|---|---|---|---|---|---|",
        *ratios,
        "",
        f"Compared with a {MATRIX} x {MATRIX} float32 matrix product in the same process:",
        "",
        "| training step | images | GFLOP per image | images/s | GFLOP/s | limit, GFLOP/s | fraction of limit |",
        "|---|---|---|---|---|---|---|",
        *fractions,
        "",
        "Where the time goes (operators by self time, one profiled step). In training, both sides compute the same "
        "products and convolutions. Their fraction of the plain side's time is therefore roughly the lowest possible "
        "ratio, reached if everything else took no time. Likewise, a step's fraction of the limit can rise at most to "
        "its present value divided by its fraction of time spent in products and convolutions:",
        "",
        *wheres,
    ]
    (ROOT / "benchmarks/results/speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
