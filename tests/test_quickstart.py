"""The README's promise: `make quickstart` samples legible digits."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from helpers import ROOT, run

SVC = pytest.importorskip("sklearn.svm").SVC


# Target of the Makefile: the variable of its folder, its scripts, pixels of its digits.
TARGETS = {
    "quickstart": ("QUICKSTART", ["train_diffit.py", "sample_diffit.py"]),
    "latent-quickstart": (
        "LATENT",
        ["train_vae.py", "prepare_latents.py", "train_diffit.py", "sample_diffit.py"],
    ),
}


def make_commands(target: str, output_dir: str) -> list[list[str]]:
    """The Python commands of a recipe of the Makefile, for another output folder."""
    make = ["make", "--dry-run", target, f"{TARGETS[target][0]}={output_dir}"]
    text = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if ".py " in line]
    return [line[1:] for line in lines]


def run_and_read(target: str, output_dir: Path) -> tuple[int, float, float]:
    """Runs a recipe and classifies its digits with a classifier trained on real ones.

    Returns:
        Digits of 100 that are read as the class asked for; the least spread of the pixels of a class, as a share of
        the real spread; seconds.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    real, labels = (digits.images * (255 / 16)).round().reshape(-1, 64) / 255, digits.target
    split = train_test_split(real, labels, test_size=0.25, random_state=0, stratify=labels)
    classifier = SVC(gamma=0.256, C=10).fit(split[0], split[2])
    assert classifier.score(split[1], split[3]) >= 0.97

    started = time.perf_counter()
    for command in make_commands(target, str(output_dir)):
        run(command, timeout=1800)
    seconds = time.perf_counter() - started

    files = sorted((output_dir / "samples").glob("class_*.png"))
    asked = np.array([int(file.name.split("_")[1]) for file in files])
    images = [PIL.Image.open(file).convert("L").resize((8, 8), PIL.Image.Resampling.BOX) for file in files]
    drawn = np.stack([np.asarray(image) for image in images]).reshape(-1, 64) / 255
    assert np.bincount(asked).tolist() == [10] * 10
    right = int((classifier.predict(drawn) == asked).sum())
    spread = min(drawn[asked == c].std(0).mean() / real[labels == c].std(0).mean() for c in range(10))
    print(f"{target}: {right} of 100 right, least spread {spread:.2f}, {seconds:.0f} s, {sys.version.split()[0]}")
    return right, spread, seconds


@pytest.mark.parametrize("target", TARGETS)
def test_quickstart_commands_of_the_makefile_are_complete(target):
    assert [command[0] for command in make_commands(target, "somewhere")] == TARGETS[target][1]


@pytest.mark.slow
def test_quickstart_digits_are_classified_as_requested(tmp_path):
    """Under 6 minutes on two cores; 90 of 100 digits right; at least half of the real spread of the pixels."""
    right, spread, seconds = run_and_read("quickstart", tmp_path / "quickstart")
    assert right >= 90
    assert spread >= 0.5
    assert seconds < 360


@pytest.mark.slow
def test_latent_digits_are_classified_as_requested(tmp_path):
    """Under 20 minutes on two cores, the VAE included; 80 of 100 digits right."""
    right, spread, seconds = run_and_read("latent-quickstart", tmp_path / "latent")
    assert right >= 80
    assert spread >= 0.3
    assert seconds < 1200
