"""Writes `data/digits.parquet`: the handwritten digits of scikit-learn's `load_digits` as grayscale PNGs with labels.

python data/make_digits.py data/digits.parquet
"""

import argparse

if __name__ == "__main__":  # before the slow imports
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", help="parquet file to write (required)")
    OUTPUT = parser.parse_args().output

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits


def main(output: str) -> None:
    """Writes the images and labels to `output`."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 levels, 0 to 16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    images = [PIL.Image.fromarray(image) for image in pixels]
    Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features).to_parquet(output)


if __name__ == "__main__":
    main(OUTPUT)
