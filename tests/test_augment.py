"""Non-leaking augmentation: what each transform does, its labels, and how often."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffit.augment import NUM_AUGMENT_LABELS, NUM_AUGMENT_NUMBERS, augment, sample_augmentation
from diffit.networks import model_class
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit.stream import ImageDataset, PositionStream
from helpers import STATES, assert_same_files, mentions, train

# Numbers that, at a probability of 0.5, do nothing, and the entries that let each transform happen.
NOTHING = [0.9] * 8 + [0.7, -0.8, 0.9, -0.6]
OPEN = {"x_flip": 0, "y_flip": 1, "scale": 2, "rotate": 3, "stretch": 5, "move": 7}
VALUES = {"angle": 4, "axis": 6, "log_scale": 8, "log_stretch": 9, "right": 10, "down": 11}


def numbers(*transforms: str, **values: float) -> torch.Tensor:
    """Numbers of one image for these transforms at a probability of 0.5; angles in radians. Shape (1, K)."""
    row = torch.tensor(NOTHING)
    for name in transforms:
        row[OPEN[name]] = 0.1
    for name, value in values.items():
        row[VALUES[name]] = (value / math.pi + 1) / 2 if name in ("angle", "axis") else value
    return row[None]


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([sample_augmentation(rng) for _ in range(count)]))


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6


def turn(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def keys_weight(distance: float) -> float:
    """Of cubic convolution (Keys 1981) with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def plain_warp(image: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """One channel (H, W) under `p -> matrix p + shift` (x, y in pixels from the center), point by point."""
    height, width = image.shape
    inverse = np.linalg.inv(matrix)

    def mirrored(i: int, size: int) -> int:
        return min(i % (2 * size), 2 * size - 1 - i % (2 * size))

    def read(x: float, y: float) -> float:
        column, row = math.floor(x), math.floor(y)
        return sum(
            keys_weight(x - i) * keys_weight(y - j) * image[mirrored(j, height), mirrored(i, width)]
            for i in range(column - 1, column + 3)
            for j in range(row - 1, row + 3)
        )

    result = np.zeros_like(image)
    center = np.array([width, height]) / 2
    for row in range(height):
        for column in range(width):
            for offset in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
                source = inverse @ (np.array([column, row]) + offset - center - shift) + center - 0.5
                result[row, column] += read(*source) / 4
    return result.clip(-1, 1)


def blob(size: tuple[int, int], center: tuple[float, float], covariance: np.ndarray) -> torch.Tensor:
    """A Gaussian of height 1 around (x, y) from the center, on black; shape (1, 1, H, W)."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    points = np.stack([x - width / 2, y - height / 2], -1) - center
    exponent = -0.5 * np.einsum("hwi,ij,hwj->hw", points, np.linalg.inv(covariance), points)
    return torch.from_numpy(2 * np.exp(exponent) - 1).float()[None, None]


# --- what each transform does

SINGLE = [
    (numbers("x_flip"), np.diag([-1, 1]), (0, 0)),
    (numbers("y_flip"), np.diag([1, -1]), (0, 0)),
    (numbers("scale", log_scale=1.5), np.eye(2) * 2**0.3, (0, 0)),
    (numbers("scale", log_scale=-2.0), np.eye(2) * 2**-0.4, (0, 0)),
    (numbers("rotate", angle=math.pi / 2), np.array([[0, -1], [1, 0]]), (0, 0)),  # right becomes down
    (numbers("rotate", angle=-0.7), turn(-0.7), (0, 0)),
    (numbers("stretch", log_stretch=1.0, axis=0.0), np.diag([2**0.2, 2**-0.2]), (0, 0)),
    (numbers("stretch", log_stretch=-1.5, axis=0.6), turn(0.6) @ np.diag([2**-0.3, 2**0.3]) @ turn(-0.6), (0, 0)),
    (numbers("move", right=1.0, down=0.0), np.eye(2), (6, 0)),  # an eighth of 48 pixels
    (numbers("move", right=0.25, down=-1.1), np.eye(2), (1.5, -5.5)),
]


@pytest.mark.parametrize(("row", "matrix", "shift"), SINGLE)
def test_transform_moves_and_shapes_a_blob(row, matrix, shift):
    """A Gaussian stays one, of another mean and covariance; reading 4 points a pixel blurs it a little."""
    center, covariance = np.array([4.0, -3.0]), np.array([[9.0, 3.0], [3.0, 6.0]])
    result, _ = augment(blob((40, 48), center, covariance), row, 0.5)
    expected = blob((40, 48), matrix @ center + shift, matrix @ covariance @ matrix.T)
    torch.testing.assert_close(result, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("angle", [0.0, 2.5])
def test_all_transforms_follow_in_the_stated_order(angle):
    """Against a slow, plain definition, on noise and into the mirrored surroundings."""
    image = noise(1, 2, 7, 10)
    values = {"angle": angle, "axis": -1.0, "log_scale": -1.4, "log_stretch": 1.2, "right": 0.8, "down": -2.3}
    result, _ = augment(image, numbers(*OPEN, **values), 0.5)
    stretch = turn(-1.0) @ np.diag([2**0.24, 2**-0.24]) @ turn(1.0)
    matrix = stretch @ turn(angle) * 2**-0.28 @ np.diag([-1, -1])
    shift = np.array([0.8 * 10, -2.3 * 7]) / 8
    expected = [plain_warp(channel, matrix, shift) for channel in image[0].double().numpy()]
    torch.testing.assert_close(result[0], torch.from_numpy(np.stack(expected)).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("transforms", "axes"), [([], []), (["x_flip"], [3]), (["x_flip", "y_flip"], [2, 3])])
def test_flips_alone_are_bitwise(transforms, axes):
    images = noise(1, 3, 6, 8)
    result, _ = augment(images, numbers(*transforms), 0.5)
    assert result.equal(images.flip(axes))


def test_result_stays_in_range_where_interpolation_overshoots():
    images = noise(64, 3, 8, 8).sign()
    result, labels = augment(images, drawn(64), 1.0)
    assert result.abs().max() == 1 and labels[:, 2].all()


# --- labels


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (numbers(), [0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (numbers("x_flip"), [1, 0, 0, 0, 0, 0, 0, 0, 0]),
        (numbers("y_flip"), [0, 1, 0, 0, 0, 0, 0, 0, 0]),
        (numbers("scale"), [0, 0, 0.7, 0, 0, 0, 0, 0, 0]),
        (numbers("rotate", angle=2.0), [0, 0, 0, math.cos(2) - 1, math.sin(2), 0, 0, 0, 0]),
        (numbers("stretch", axis=-1.0), [0, 0, 0, 0, 0, -0.8 * math.cos(-1), -0.8 * math.sin(-1), 0, 0]),
        (numbers("move"), [0, 0, 0, 0, 0, 0, 0, 0.9, -0.6]),
    ],
)
def test_augment_labels_describe_the_transforms(row, expected):
    _, labels = augment(noise(1, 3, 8, 8), row, 0.5)
    torch.testing.assert_close(labels, torch.tensor([expected], dtype=torch.float32), rtol=0, atol=1e-6)


def test_labels_are_zero_exactly_where_the_image_is_untouched():
    images = noise(256, 1, 8, 8)
    result, labels = augment(images, drawn(256), 0.3)
    untouched = (result == images).flatten(1).all(1)
    assert 10 < untouched.sum() < 100
    assert untouched.equal((labels == 0).all(1))


# --- how often


def test_transforms_happen_in_the_stated_proportions():
    """Of 20,000 images, within 5 standard errors."""
    _, labels = augment(torch.zeros(20_000, 1, 1, 1), drawn(20_000), 0.12)
    shares = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06] + [0.12] * 7)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all(), shares
    assert (labels[:, 3:5] != 0).all(1).equal((labels[:, 3:5] != 0).any(1))


def test_strengths_are_those_of_the_paper():
    """At a probability of 1: standard normal scale, stretch and translation, angles uniform around the circle."""
    _, labels = augment(torch.zeros(20_000, 1, 1, 1), drawn(20_000), 1.0)
    normal = labels[:, [2, 7, 8]]
    assert normal.mean(0).abs().max() < 0.04 and (normal.std(0) - 1).abs().max() < 0.03
    assert (labels[:, 5:7].norm(dim=1).pow(2).mean() - 1).abs() < 0.05
    for cos, sin in ((labels[:, 3] + 1, labels[:, 4]), (labels[:, 5], labels[:, 6])):
        quarters = torch.histc(torch.atan2(sin, cos), 4, -math.pi, math.pi) / 20_000
        assert (quarters - 0.25).abs().max() < 0.015


def test_probability_of_zero_changes_nothing():
    images = noise(64, 3, 8, 8)
    result, labels = augment(images, drawn(64), 0.0)
    assert result.equal(images) and labels.equal(torch.zeros(64, NUM_AUGMENT_LABELS))


# --- a pure function of images and numbers


def test_number_of_random_numbers_is_constant():
    rng = np.random.default_rng(0)
    first, second = sample_augmentation(rng), sample_augmentation(rng)
    assert first.shape == second.shape == (NUM_AUGMENT_NUMBERS,) and first.dtype == np.float32
    assert (first != second).all()


def test_image_is_augmented_alike_in_any_batch():
    images, rows = noise(8, 3, 8, 12), drawn(8)
    kept = images.clone(), rows.clone()
    together, labels = augment(images, rows, 0.8)
    for i in range(8):
        alone, label = augment(images[i : i + 1], rows[i : i + 1], 0.8)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
        assert label[0].equal(labels[i])
    assert images.equal(kept[0]) and rows.equal(kept[1])


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 5, 4, 16)])
def test_any_channels_and_size_keep_shape_and_dtype(shape):
    result, labels = augment(noise(*shape), drawn(3), 1.0)
    assert result.shape == shape and labels.shape == (3, 9)
    assert result.dtype == labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("count", "probability", "words"),
    [(2, 1.5, ["probability", "1.5"]), (2, -0.1, ["probability", "-0.1"]), (3, 0.1, ["(2, 12)", "(3, 12)"])],
)
def test_arguments_out_of_range_are_refused(count, probability, words):
    with pytest.raises(ValueError, match=mentions(*words)):
        augment(noise(2, 3, 8, 8), drawn(count), probability)


# --- in a training


def test_augmentation_does_not_change_other_random_numbers(image_folder):
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    stream = PositionStream(len(table), seed=0)
    plain, augmented = (
        ImageDataset(table, stream, (8, 8), 3, random_flip=True, augment=augment)[(5, stream.index(5))]
        for augment in (False, True)
    )
    assert augmented.pop("augmentation").shape == (12,)
    torch.testing.assert_close(augmented, plain, rtol=0, atol=0)


def test_augmented_run_tells_the_network_and_resumes_bitwise(train_args, tmp_path):
    flags = ["--augmentation_probability=0.5", "--max_train_steps=4", "--checkpointing_steps=2", "--formulation=edm"]
    train([*train_args, *flags])
    other = [*train_args, *flags, f"--output_dir={tmp_path / 'other'}"]
    train([*other, "--max_train_steps=2"])
    train([*other, "--resume_from_checkpoint=latest", "--dataloader_num_workers=1"])
    assert_same_files(tmp_path / "run/checkpoint-4", tmp_path / "other/checkpoint-4", STATES)
    weights = load_file(tmp_path / "run/checkpoint-4" / STATES[0])
    torch.manual_seed(0)
    config = json.loads((tmp_path / "run/unet/config.json").read_text())
    untrained = model_class(config).from_config(config).augment_embedding.weight
    assert config["num_augment_labels"] == 9 and not torch.equal(weights["augment_embedding.weight"], untrained)
    train([*train_args, f"--output_dir={tmp_path / 'plain'}", "--max_train_steps=4", "--formulation=edm"])
    plain = load_file(tmp_path / "plain/checkpoint-4" / STATES[0])
    assert not torch.equal(plain["conv_in.weight"], weights["conv_in.weight"])
