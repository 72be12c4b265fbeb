"""What the included trainings cost on 8, 64 and 512 GPUs, by arithmetic: the tables of docs/scaling.md.

    python benchmarks/scaling.py    # writes them between the markers of the document

FLOPs, parameters and bytes are counted from the configs on the meta device. What is assumed of the machines is in
ASSUMED, and printed with the tables. Nothing here was measured on a GPU.
"""

import json
import math
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from diffit_model import model_class  # noqa: E402
from train_diffit import training_flops_per_image  # noqa: E402

DOCUMENT = ROOT / "docs/scaling.md"
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8
# Config: what the data say of its network, and bytes of an image: PNG, or mean and deviation of latents in 16 bits.
RUNS = {
    "cifar10": ({"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "num_augment_labels": 9}, 2_500),
    "cifar10_l4": ({"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "num_augment_labels": 9}, 2_500),
    "ffhq64": ({"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "num_augment_labels": 9}, 8_000),
    "ffhq64_l4": ({"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "num_augment_labels": 9}, 8_000),
    "imagenet256": ({"in_channels": 4, "num_embeds_ada_norm": 1000}, 2 * 8 * 32 * 32),
    "imagenet512": ({"in_channels": 4, "num_embeds_ada_norm": 1000, "sample_size": 64}, 2 * 8 * 64 * 64),
}
ASSUMED = {
    "peak of an H100 in bf16, dense (NVIDIA's data sheet)": (989e12, "989 TFLOP/s"),
    "share of it that is reached (MFU), also with few images on each GPU": (0.35, "35 %"),
    "bandwidth of a GPU inside a node (NVLink 4, one direction)": (450e9, "450 GB/s"),
    "bandwidth of a node to others (eight ports of InfiniBand NDR, which the rings share)": (400e9, "400 GB/s"),
    "writing a checkpoint": (2e9, "2 GB/s"),
    "time between failures of one GPU (Llama 3, arXiv 2407.21783: 419 in 54 days of 16,384)": (
        54 * 24 * 3600 * 16_384 / 419,
        "50,700 hours",
    ),
}
PEAK, MFU, NVLINK, INFINIBAND, DISK, MTBF = (value for value, _ in ASSUMED.values())


def read(name: str) -> dict:
    """Sizes of a training: parameters, FLOPs, images, bytes of its checkpoint.

    Args:
        name: of configs/train.
    """
    flags = yaml.safe_load((ROOT / f"configs/train/{name}.yaml").read_text())
    more, image_bytes = RUNS[name]
    config = json.loads((ROOT / flags["model_config"]).read_text()) | more
    with torch.device("meta"):
        parameters = model_class(config).from_config(config).num_parameters()
    averages = len(flags.get("ema_half_life_kimg", [1]))
    return {
        "name": name,
        "parameters": parameters,
        "flops": training_flops_per_image(config),
        "batch": flags["global_batch_size"],
        "steps": flags["max_train_steps"],
        "image_bytes": image_bytes,
        "checkpoint": 4 * parameters * (1 + 2 + averages),  # weights, Adam's two moments, averages
        "averages": averages,
    }


def step_seconds(run: dict, gpus: int) -> float:
    """Computing of one optimizer step."""
    return run["batch"] * run["flops"] / (gpus * MFU * PEAK)


def all_reduce_seconds(run: dict, gpus: int) -> float:
    """Gradients in float32, by rings: 2 (n - 1) / n times their bytes leave each GPU, or each node."""
    bandwidth = NVLINK if gpus <= GPUS_PER_NODE else INFINIBAND
    return 2 * (gpus - 1) / gpus * 4 * run["parameters"] / bandwidth


def checkpoint_interval(run: dict, gpus: int) -> float:
    """Seconds between checkpoints that lose least, by Young: sqrt(2 x time of saving x time between failures)."""
    return math.sqrt(2 * run["checkpoint"] / DISK * MTBF / gpus)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]


def tables() -> str:
    """All tables, and what is assumed."""
    runs = [read(name) for name in RUNS]
    lines = ["Assumed, not measured:", ""]
    lines += [f"- {what}: {value}" for what, (_, value) in ASSUMED.items()]

    head = ["config", "parameters", "GFLOP for an image", "images", "GPU hours", "checkpoint"]
    rows = []
    for run in runs:
        images = run["batch"] * run["steps"]
        hours = images * run["flops"] / (MFU * PEAK) / 3600
        size = f"{run['checkpoint'] / 1e9:.2f} GB"
        rows.append(
            [f"`{run['name']}`", f"{run['parameters'] / 1e6:.1f} M", f"{run['flops'] / 1e9:.1f}"]
            + [f"{images / 1e6:,.1f} M", f"{hours:,.1f}", size]
        )
    lines += table(head, rows)

    head = [
        "config",
        "GPUs",
        "images on each",
        "step, ms",
        "all-reduce, ms",
        "share",
        "hours",
        "images/s",
        "MB/s a node",
    ]
    rows = []
    for run in runs:
        for gpus in GPUS:
            each = run["batch"] / gpus
            compute, reduce = step_seconds(run, gpus), all_reduce_seconds(run, gpus)
            images = run["batch"] / max(compute, reduce)  # the all-reduce runs beside the backward pass
            node_bytes = images * run["image_bytes"] * GPUS_PER_NODE / gpus
            hours = run["steps"] * max(compute, reduce) / 3600
            rows.append(
                [f"`{run['name']}`", str(gpus), f"{each:g}", f"{1000 * compute:.2f}"]
                + [f"{1000 * reduce:.2f}", f"{reduce / compute:.0%}", f"{hours:,.1f}", f"{images:,.0f}"]
                + [f"{node_bytes / 1e6:.1f}"]
            )
    lines += table(head, rows)

    head = ["config", "saving, s", *(f"best interval on {gpus}" for gpus in GPUS)]
    rows = []
    for run in runs:
        intervals = [f"{checkpoint_interval(run, gpus) / 60:.0f} min" for gpus in GPUS]
        rows.append([f"`{run['name']}`", f"{run['checkpoint'] / DISK:.2f}", *intervals])
    lines += table(head, rows)
    return "\n".join(lines).strip() + "\n"


def document() -> str:
    """docs/scaling.md with the tables as they are now."""
    start, end = "<!-- tables: benchmarks/scaling.py -->\n", "<!-- end of tables -->"
    before, rest = DOCUMENT.read_text().split(start)
    return before + start + tables() + end + rest.split(end)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(tables())
