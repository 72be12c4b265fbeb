"""Speed of the forward and backward pass of the included networks, as a share of what the machine can do.

    python benchmarks/training_step.py

The limit is a large float32 matrix product in the same process, alternating with the networks. Writes a table to
`benchmarks/results/training_step.md`.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import diffusers
import torch
from torch.utils.benchmark import Timer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from diffit_model import model_class  # noqa: E402
from train_diffit import training_flops_per_image  # noqa: E402

CASES = {"digits8": 64, "emoji32": 16, "cifar10": 8}  # network: images per step
MATRIX = 2048


def build_step(name: str, batch_size: int) -> tuple[Timer, float]:
    """A timer of one forward and backward pass, and its FLOPs."""
    config = json.loads((ROOT / f"configs/model/{name}.json").read_text())
    config |= {"in_channels": 3, "out_channels": 3, "num_class_embeds": None}
    torch.manual_seed(0)
    model = model_class(config).from_config(config)
    sample = torch.randn(batch_size, 3, config["sample_size"], config["sample_size"])
    timesteps = torch.randint(0, 1000, (batch_size,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(sample, timesteps).sample.square().mean().backward()

    return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads()), (
        batch_size * training_flops_per_image(config)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="times that every case takes its turn")
    args = parser.parse_args()

    a, b = torch.randn(2, MATRIX, MATRIX).unbind()
    limit = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    cases = {name: build_step(name, batch_size) for name, batch_size in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*cases, "limit")}
    for name in seconds:  # warm up
        (limit if name == "limit" else cases[name][0]).timeit(1)
    for _ in range(args.rounds):
        for name, times in seconds.items():
            times.append((limit if name == "limit" else cases[name][0]).timeit(3).median)

    peak = 2 * MATRIX**3 / statistics.median(seconds["limit"])
    lines = [
        "# Forward and backward pass",
        "",
        f"`python benchmarks/training_step.py`, median of {args.rounds} rounds, float32, eager. "
        f"{torch.get_num_threads()} threads, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}. "
        f"Limit (matrix product of {MATRIX}): {peak / 1e9:.0f} GFLOP/s.",
        "",
        "| network | images per step | GFLOP per image | images/s | GFLOP/s | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, flops) in cases.items():
        median = statistics.median(seconds[name])
        lines.append(
            f"| `{name}` | {CASES[name]} | {flops / CASES[name] / 1e9:.2f} | {CASES[name] / median:.1f} "
            f"| {flops / median / 1e9:.0f} | {flops / median / peak:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks/results/training_step.md").write_text(text)


if __name__ == "__main__":
    main()
