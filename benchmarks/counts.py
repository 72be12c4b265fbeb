"""Counts operators, casts, bytes, host synchronizations and live memory on a GPU that is not there (see `fake_gpu`).

    python -m benchmarks.counts                        # everything; about three minutes on one core
    python -m benchmarks.counts --only cifar10 --output counts.md

Writes a section of `benchmarks/results/counts.md`, named by --label, which replaces an earlier one of that name. Needs
a CPU build of torch and a C++ compiler.
"""

import argparse
import platform
import shlex
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from benchmarks import fake_gpu
from benchmarks.fake_gpu import scripts
from benchmarks.fake_gpu.trace import Counts

CONFIGS = sorted(file.stem for file in (fake_gpu.ROOT / "configs/train").glob("*.yaml"))
PHASES = {"step 2": "a step", "step 3": "a step that logs", "preview": "preview, one sampler step"}
TRAINING_NOTE = """\
One process with its own batch of each config in `configs/train`, through `train_diffit.main`. An operator is a call
that launches kernels on the device, without copies to and from the host; a cast is one of them that only changes the
dtype. GB: read and written by the operators, each tensor once a call. Waits: how often the host waits for all the work
before; the one event, which is recorded a step earlier, is not among them. Live: tensors on the device at the peak,
without what libraries allocate for themselves."""
SAMPLING_NOTE = """\
`DiffiTPipeline` with class labels, 8 images. Per evaluation: the difference between 4 and 2 steps of the sampler,
divided by the further evaluations of the network."""
DECODING_NOTE = "The decoder of `stabilityai/sd-vae-ft-ema` in float32."


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), f"|{'---|' * len(cells)}"]


def numbers(counts: Counts) -> list[str]:
    """Operators, casts, gigabytes, waits and live memory as cells."""
    live = f"{counts.peak / 2**30:.2f}"
    return [counts.num_operators, counts.casts, f"{counts.bytes / 1e9:.1f}", counts.num_synchronizations, live]


def kernels(counts: Counts) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.attention.items())) or "none"


def training_tables(names: list[str]) -> list[str]:
    """A table of steps and previews, and the places where a step that logs, or a preview, waits."""
    lines = ["### Training", "", TRAINING_NOTE, ""]
    lines += head("config", "phase", "operators", "casts", "GB", "waits", "live, GiB", "attention kernels")
    places = {phase: Counter() for phase in PHASES}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        phases = fake_gpu.run(scripts.train_shipped, name)
        for phase, title in PHASES.items():
            lines.append(row(name, title, *numbers(phases[phase]), kernels(phases[phase])))
            places[phase] |= phases[phase].synchronizations
    for phase, title in PHASES.items():
        lines += ["", f"Waits in {title}, the most of any config:", ""]
        lines += [f"- {number} x `{place}`" for place, number in places[phase].most_common()] or ["- none"]
    return lines


def sampling_table() -> list[str]:
    """A table of samplers: per evaluation of the network, and per batch."""
    lines = ["", "### Sampling", "", SAMPLING_NOTE, ""]
    lines += head("network and sampler", "operators", "casts", "GB", "waits", "waits of 4 steps", "attention kernels")
    pixels = {"in_channels": 3, "out_channels": 3}
    for title, name, more, scheduler, call in (
        ("emoji32, DDIM", "emoji32", pixels | {"num_class_embeds": 9}, "ddim", {}),
        ("emoji32, DDPM", "emoji32", pixels | {"num_class_embeds": 9}, "ddpm", {}),
        ("emoji32, DPM-Solver++", "emoji32", pixels | {"num_class_embeds": 9}, "dpmsolver++", {}),
        ("cifar10, EDM Heun", "cifar10", pixels | {"num_class_embeds": 10}, "edm_heun", {}),
        ("XL/2 at 256 px, DDIM, guided, bf16", "diffit_xl_2", {"num_embeds_ada_norm": 1000}, "ddim", {"guided": True}),
    ):
        print(f"{title} ...", file=sys.stderr, flush=True)
        options = {"dtype": "bfloat16", "guidance_scale": 4.0} if call else {}
        few, many = (fake_gpu.run(scripts.sample_shipped, name, more, scheduler, 8, n, options) for n in (2, 4))
        per_step = 2 if scheduler == "edm_heun" else 1
        operators, casts, size, waits = (
            (getattr(many, field) - getattr(few, field)) / (2 * per_step)
            for field in ("num_operators", "casts", "bytes", "num_synchronizations")
        )
        cells = [f"{operators:g}", f"{casts:g}", f"{size / 1e9:.1f}", f"{waits:g}", many.num_synchronizations]
        lines.append(row(title, *cells, kernels(many)))
    return lines


def decoding_table() -> list[str]:
    """A table of the live memory of decoding, a whole batch or an image at a time."""
    lines = ["", "### Decoding", "", DECODING_NOTE, ""]
    lines += head("batch", "at a time", "operators", "live, GiB")
    for batch_size, resolution in ((32, 256), (16, 512)):
        for sliced in (False, True):
            counts = fake_gpu.run(scripts.decode, scripts.SD_VAE, batch_size, resolution, sliced)
            cells = ["an image" if sliced else "all", counts.num_operators, f"{counts.peak / 2**30:.2f}"]
            lines.append(row(f"{batch_size} images, {resolution} px", *cells))
    return lines


def write_section(file: Path, label: str, lines: list[str]) -> None:
    """Writes a section of the report, or replaces it; other sections stay."""
    text = file.read_text() if file.is_file() else "# Counted on a fake GPU\n"
    start, *sections = text.rstrip("\n").split("\n## ")
    kept = {section.split("\n", 1)[0]: section for section in sections}
    kept[label] = "\n".join([label, "", *lines])
    file.write_text("\n## ".join(f"{part.rstrip()}\n" for part in (start, *kept.values())))


def describe(argv: list[str]) -> list[str]:
    """The command, the commit and the versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=fake_gpu.ROOT, capture_output=True, text=True
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "accelerate"))
    command = shlex.join(["python", "-m", "benchmarks.counts", *argv])
    machine = f"{platform.machine()} CPU, no GPU; Python {platform.python_version()}, {versions}"
    return [f"`{command}` at {commit.stdout.strip() or 'no commit'}; {machine}.", ""]


def main(argv: list[str] | None = None) -> int:
    """Counts, prints and writes; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, help="only the training of these configs")
    parser.add_argument("--label", default="now", help="name of the section (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=fake_gpu.ROOT / "benchmarks/results/counts.md")
    args = parser.parse_args(argv)
    if (reason := fake_gpu.why_not()) is not None:
        print(reason, file=sys.stderr)
        return 2
    lines = describe(argv) + training_tables(args.only or CONFIGS)
    if not args.only:
        lines += sampling_table() + decoding_table()
    print("\n".join(lines))
    write_section(args.output, args.label, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
