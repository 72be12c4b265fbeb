"""The promise of the README: `make quickstart` draws digits that can be read."""

import shlex
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, run

SVC = pytest.importorskip("sklearn.svm").SVC


def quickstart_commands(output_dir: str) -> list[list[str]]:
    """The Python commands of the Makefile's recipe, for another output folder."""
    make = ["make", "--dry-run", "quickstart", f"QUICKSTART={output_dir}"]
    text = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if ".py " in line]
    return [line[1:] for line in lines]


def test_quickstart_trains_and_samples():
    scripts = [command[0] for command in quickstart_commands("somewhere")]
    assert scripts == ["train_diffit.py", "sample_diffit.py"]


@pytest.mark.slow
def test_quickstart_digits_are_read_as_the_class_asked_for(tmp_path):
    """Under 6 minutes on two cores; 90 of 100 digits right; at least half of the real spread of the pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    real, labels = (digits.images * (255 / 16)).round().reshape(-1, 64) / 255, digits.target
    split = train_test_split(real, labels, test_size=0.25, random_state=0, stratify=labels)
    classifier = SVC(gamma=0.256, C=10).fit(split[0], split[2])
    assert classifier.score(split[1], split[3]) >= 0.97

    started = time.perf_counter()
    for command in quickstart_commands(str(tmp_path / "quickstart")):
        run(command)
    seconds = time.perf_counter() - started

    files = sorted((tmp_path / "quickstart/samples").glob("class_*.png"))
    asked = np.array([int(file.name.split("_")[1]) for file in files])
    drawn = np.stack([np.asarray(PIL.Image.open(file)) for file in files]).reshape(-1, 64) / 255
    assert np.bincount(asked).tolist() == [10] * 10
    right = int((classifier.predict(drawn) == asked).sum())
    spread = [drawn[asked == c].std(0).mean() / real[labels == c].std(0).mean() for c in range(10)]
    print(f"{right} of 100 right, least spread {min(spread):.2f}, {seconds:.0f} s, {sys.version.split()[0]}")
    assert right >= 90
    assert min(spread) >= 0.5
    assert seconds < 360
