"""Estimates the cost of the included trainings on 8, 64 and 512 GPUs, and writes the tables of docs/scaling.md.

    python -m benchmarks.scaling    # writes them between the markers of the document

FLOPs, parameters and bytes are counted from the configs on the meta device. The assumptions about the machines are in
ASSUMED, and are printed with the tables. Nothing here was measured on a GPU.
"""

import json
import math
from pathlib import Path

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from diffit.networks import model_class, sample_shape, training_flops_per_image

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/scaling.md"
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8

BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at once
OF_PIXELS = {"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "num_augment_labels": 9}
OF_LATENTS = {"in_channels": 4, "num_embeds_ada_norm": 1000}
# Config name -> fields of the model config that depend on the data, bytes read per image (a PNG, or the latents' mean
# and standard deviation in float32), images/s of one worker (from benchmarks/results/data_path.md).
RUNS = {
    "cifar10": (OF_PIXELS, 2_500, 2_258),
    "cifar10_l4": (OF_PIXELS, 2_500, 2_258),
    "ffhq64": (OF_PIXELS, 8_000, 896),
    "ffhq64_l4": (OF_PIXELS, 8_000, 896),
    "imagenet256": (OF_LATENTS, 4 * 8 * 32 * 32, 1_009),
    "imagenet512": (OF_LATENTS | {"sample_size": 64}, 4 * 8 * 64 * 64, 1_070),
}
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")
ASSUMED = {
    "peak of an H100 in bf16, dense (NVIDIA's data sheet)": (989e12, "989 TFLOP/s"),
    "fraction of it that the latent-space networks reach (MFU)": (0.35, "35 %"),
    "fraction of it that the pixel-space networks reach (128 to 256 channels, norms, small windows)": (0.15, "15 %"),
    "launching an operator from Python, eager": (8e-6, "8 µs"),
    "factor on operators due to autocast's casts (counted without a GPU: CIFAR-10 1.05, XL/2 1.23)": (1.2, "1.2"),
    "memory bandwidth of a GPU, for optimizer and EMA (80 % of 3.35 TB/s)": (2.7e12, "2.7 TB/s"),
    "bandwidth of a GPU within a node (NVLink 4, one direction)": (450e9, "450 GB/s"),
    "bandwidth of a node to other nodes (eight InfiniBand NDR ports, shared by the rings)": (400e9, "400 GB/s"),
    "latency of one exchange; an all-reduce over n GPUs takes 2 log2(n) of them per 25 MiB": (10e-6, "10 µs"),
    "writing a checkpoint and reading it back for its checksums": (0.7e9, "0.7 GB/s"),
    "time between failures of one GPU (Llama 3, arXiv 2407.21783: 419 in 54 days of 16,384)": (
        54 * 24 * 3600 * 16_384 / 419,
        "50,700 hours",
    ),
}
PEAK, LATENT_MFU, PIXEL_MFU, START, CASTS, MEMORY, NVLINK, INFINIBAND, DELAY, DISK, MTBF = (
    value for value, _ in ASSUMED.values()
)


class CountKernels(TorchDispatchMode):
    """Counts the operators that launch a GPU kernel: all except views and allocations."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not (func.is_view or func.overloadpacket.__name__ in NO_KERNEL)
        return func(*args, **(kwargs or {}))


def read(name: str) -> dict:
    """The sizes of a training: parameters, FLOPs, operators, images, bytes per checkpoint.

    Args:
        name: file name in configs/train, without `.yaml`.
    """
    flags = yaml.safe_load((ROOT / f"configs/train/{name}.yaml").read_text())
    of_data, image_bytes, worker_speed = RUNS[name]
    config = json.loads((ROOT / flags["model_config"]).read_text()) | of_data
    with torch.device("meta"):
        model = model_class(config).from_config(config)
        inputs = torch.empty(1, *sample_shape(config)), torch.zeros(1)
    with CountKernels() as counter:
        model(*inputs).sample.sum().backward()
    again = 4 / 3 if flags.get("gradient_checkpointing") else 1  # the forward pass, once more
    averages = len(flags.get("ema_half_life_kimg", [1]))
    parameters = model.num_parameters()
    return {
        "name": name,
        "parameters": parameters,
        "flops": training_flops_per_image(config),
        "again": again,
        "kernels": round(CASTS * again * counter.number),
        "mfu": PIXEL_MFU if of_data is OF_PIXELS else LATENT_MFU,
        "batch": flags["global_batch_size"],
        "most": flags["train_batch_size"],  # images on a GPU at once
        "steps": flags["max_train_steps"],
        "image_bytes": image_bytes,
        "worker_speed": worker_speed,
        "averages": averages,
        "checkpoint": 4 * parameters * (1 + 2 + averages),  # weights, Adam's two moments, averages
    }


def compute_seconds(run: dict, gpus: int) -> float:
    """Seconds of forward and backward per optimizer step: arithmetic, or kernel launches if they take longer."""
    each = run["batch"] / gpus
    passes = math.ceil(each / run["most"])
    return max(each * run["again"] * run["flops"] / (run["mfu"] * PEAK), passes * run["kernels"] * START)


def update_seconds(run: dict) -> float:
    """Seconds of clipping, Adam and averages, from the float32 memory that they read and write."""
    clip, adam, average = 3, 7, 3  # numbers per parameter
    return 4 * run["parameters"] * (clip + adam + average * run["averages"]) / MEMORY


def all_reduce_bytes(run: dict, gpus: int) -> float:
    """Bytes that each GPU sends in a ring all-reduce of the float32 gradients."""
    return 2 * (gpus - 1) / gpus * 4 * run["parameters"]


def all_reduce_seconds(run: dict, gpus: int) -> float:
    """Seconds of the all-reduce: bandwidth plus latency of the exchanges."""
    bandwidth = NVLINK if gpus <= GPUS_PER_NODE else INFINIBAND
    buckets = math.ceil(4 * run["parameters"] / BUCKET)
    return all_reduce_bytes(run, gpus) / bandwidth + buckets * 2 * math.log2(gpus) * DELAY


def step_seconds(run: dict, gpus: int) -> float:
    """Seconds per optimizer step. Only the backward pass (2/3) of the last micro-batch hides the all-reduce."""
    compute = compute_seconds(run, gpus)
    backward = 2 / 3 * compute / math.ceil(run["batch"] / gpus / run["most"])
    return compute - backward + max(backward, all_reduce_seconds(run, gpus)) + update_seconds(run)


def checkpoint_interval(run: dict, gpus: int) -> float:
    """Young's optimal checkpoint interval in seconds: sqrt(2 x time of a checkpoint x time between failures)."""
    return math.sqrt(2 * run["checkpoint"] / DISK * MTBF / gpus)


def duration(hours: float) -> str:
    """Formats a number for people."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def tables() -> str:
    """All tables and the assumptions."""
    runs = [read(name) for name in RUNS]
    lines = ["Assumed, not measured:", ""]
    lines += [f"- {what}: {value}" for what, (_, value) in ASSUMED.items()]

    head = ["config", "parameters", "GFLOP per image", "operators per step", "images", "GPU hours on 8"]
    rows = []
    for run in runs:
        hours = 8 * run["steps"] * step_seconds(run, 8) / 3600
        images = f"{run['batch'] * run['steps'] / 1e6:,.1f} M"
        rows.append(
            [f"`{run['name']}`", f"{run['parameters'] / 1e6:.1f} M", f"{run['flops'] / 1e9:,.1f}"]
            + [f"{run['kernels']:,}", images, f"{hours:,.0f}"]
        )
    lines += table(head, rows)

    head = ["config", "GPUs", "images per GPU", "passes, ms", "sent per GPU", "all-reduce, ms", "update, ms"]
    head += ["step, ms", "MFU", "total", "images/s", "MB/s per node", "workers per GPU"]
    rows, too_many = [], []
    for run in runs:
        for gpus in GPUS:
            each = run["batch"] / gpus
            if each < 1:
                too_many.append(f"`{run['name']}` on {gpus}")
                continue
            step = step_seconds(run, gpus)
            images = run["batch"] / step
            rows.append(
                [f"`{run['name']}`", str(gpus), f"{each:g}", f"{1000 * compute_seconds(run, gpus):.1f}"]
                + [f"{all_reduce_bytes(run, gpus) / 1e6:,.0f} MB", f"{1000 * all_reduce_seconds(run, gpus):.1f}"]
                + [f"{1000 * update_seconds(run):.1f}", f"{1000 * step:.1f}"]
                + [f"{images * run['flops'] / (gpus * PEAK):.1%}", duration(run["steps"] * step / 3600)]
                + [f"{images:,.0f}", f"{images * run['image_bytes'] * GPUS_PER_NODE / gpus / 1e6:.1f}"]
                + [f"{images / gpus / run['worker_speed']:.1f}"]
            )
    lines += table(head, rows)
    lines.append(f"Less than one image per GPU, which is refused: {', '.join(too_many)}.")

    head = ["config", "checkpoint", "saving, s", *(f"best interval on {gpus}" for gpus in GPUS)]
    rows = []
    for run in runs:
        intervals = [f"{checkpoint_interval(run, gpus) / 60:.0f} min" for gpus in GPUS]
        size = f"{run['checkpoint'] / 1e9:.2f} GB"
        rows.append([f"`{run['name']}`", size, f"{run['checkpoint'] / DISK:.2f}", *intervals])
    lines += table(head, rows)
    return "\n".join(lines).strip() + "\n"


def document() -> str:
    """The text of docs/scaling.md with up-to-date tables."""
    start, end = "<!-- tables: benchmarks/scaling.py -->\n", "<!-- end of tables -->"
    before, rest = DOCUMENT.read_text().split(start)
    return before + start + tables() + end + rest.split(end)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(tables())
