# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Distances and scores between sets of features: Frechet and kernel distance, precision, recall, Inception score.

torchmetrics has three of these, and the tests compare with it. It is not used here because its Frechet distance takes
the square roots of the eigenvalues of a non-symmetric matrix (with fewer images than features it was off by 2e-8 of
the trace, and four times slower), its kernel distance and Inception score draw from the global random number
generator, and it has neither precision and recall nor distances to saved statistics.
"""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
import torch

from diffit.errors import UserError
from diffit.eval_config import METRICS

NUM_NEIGHBORS = 3  # neighbors that span the manifold of precision and recall, as in arXiv 1904.06991
INCEPTION_SPLITS = 10  # as in arXiv 1606.03498
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")  # of all other metrics, lower values are better
MIN_IMAGES = 10_000  # below, values are not comparable with published ones
CHUNK_ROWS = 2048  # of a distance or kernel matrix that are in memory at once
CHUNK_COLUMNS = 10_000  # of a kernel matrix; a block takes 164 MB
MAX_KERNEL_REFERENCE = 10_000  # reference images of the kernel distance, whose time grows with their square

# How each metric is computed, for the results file.
METRIC_SETTINGS = {
    "frechet_distance": {"covariance": "unbiased", "dtype": "float64"},
    "kernel_distance": {
        **{"kernel": "(x . y / F + 1)^3", "estimator": "unbiased, all pairs", "dtype": "float64"},
        "max_reference": MAX_KERNEL_REFERENCE,
    },
    "inception_score": {"splits": INCEPTION_SPLITS, "dtype": "float64"},
    "precision": {"neighbours": NUM_NEIGHBORS, "dtype": "float64"},
    "recall": {"neighbours": NUM_NEIGHBORS, "dtype": "float64"},
}


class FeatureSet:
    """Features of images, or a mean and covariance, or both. Quantities that metrics share are computed once.

    Args:
        features: shape (N, F); converted to float64, on the device where they are.
        mean: shape (F), instead of that of the features.
        covariance: shape (F, F), instead of that of the features.
    """

    def __init__(
        self,
        features: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        covariance: torch.Tensor | None = None,
    ):
        self.features = None if features is None else features.double()
        self.has_own_statistics = mean is not None  # of other images than those of the features, usually of more
        if self.has_own_statistics:
            self.mean, self.covariance = mean.double(), covariance.double()

    def __len__(self) -> int:
        return 0 if self.features is None else len(self.features)

    @property
    def device(self) -> torch.device:
        """Where the metrics are computed; sets that are compared must share it."""
        return (self.mean if self.features is None else self.features).device

    def subset(self, indices: torch.Tensor) -> "FeatureSet":
        """The features of the images with these indices."""
        return FeatureSet(self.features[indices])

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        """Shape (F)."""
        return self.features.mean(dim=0)

    @functools.cached_property
    def covariance(self) -> torch.Tensor:
        """Unbiased, shape (F, F)."""
        centered = self.features - self.mean
        return centered.T @ centered / (len(self) - 1)

    @functools.cached_property
    def covariance_factor(self) -> torch.Tensor:
        """A with A^T A = covariance and the fewest rows; shape (R, F), R <= min(N, F)."""
        if not self.has_own_statistics and len(self) <= self.features.shape[1]:
            return (self.features - self.mean) / (len(self) - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T

    @functools.cached_property
    def kernel_reference(self) -> "FeatureSet":
        """These images, or `MAX_KERNEL_REFERENCE` of them, for the kernel distance to them.

        It stays unbiased, and its variance is that of the evaluated images if they are fewer. The random choice is the
        same at every call.
        """
        if len(self) <= MAX_KERNEL_REFERENCE:
            return self
        return self.subset(shuffled_parts(len(self), 1)[0][:MAX_KERNEL_REFERENCE])

    @functools.cached_property
    def kernel_mean(self) -> torch.Tensor:
        """Mean of the polynomial kernel over all pairs of distinct images; a scalar."""
        num_images = len(self)
        trace = ((self.features.square().sum(dim=1) / self.features.shape[1] + 1) ** 3).sum()
        return (kernel_sum(self.features, self.features) - trace) / (num_images * (num_images - 1))

    @functools.cached_property
    def radii(self) -> torch.Tensor:
        """Distance of each image to its neighbor number `NUM_NEIGHBORS`; shape (N)."""
        distances, _ = nearest(self.features, self.features, NUM_NEIGHBORS + 1)  # the first is the image itself
        return distances[:, -1]


def metrics_device(device: torch.device, num_values: int = 0) -> torch.device:
    """The device that computes metrics: this one, or the CPU.

    The CPU replaces Apple's GPUs, which have no float64, and a GPU without memory for three copies of the features.

    Args:
        device: of this process.
        num_values: number of values of the features that would be moved there.
    """
    if device.type == "mps":
        return torch.device("cpu")
    if device.type == "cuda" and num_values > 0:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if 3 * 8 * num_values > free:
            return torch.device("cpu")
    return device


def training_reference(features: np.ndarray, metrics: Iterable[str], device: torch.device) -> FeatureSet:
    """The reference of metrics during training, which keeps on the device only what they need.

    That is all features (8 F bytes for each image) for precision and recall, or of a small set. Otherwise it is the
    mean and covariance of all features, computed in parts, and those that `kernel_reference` takes.

    Args:
        features: float32, shape (N, F); may be mapped from a file.
        metrics: any of `METRICS` but `inception_score`.
        device: of this process; see `metrics_device`.
    """
    if len(features) <= MAX_KERNEL_REFERENCE or {"precision", "recall"} & set(metrics):
        return FeatureSet(torch.from_numpy(np.array(features)).to(metrics_device(device, features.size)))
    device = metrics_device(device)

    def parts() -> Iterable[torch.Tensor]:
        for start in range(0, len(features), MAX_KERNEL_REFERENCE):
            part = np.array(features[start : start + MAX_KERNEL_REFERENCE])
            yield torch.from_numpy(part).to(device).double()

    mean = sum(part.sum(dim=0) for part in parts()) / len(features)
    covariance = sum((part - mean).T @ (part - mean) for part in parts()) / (len(features) - 1)
    chosen = shuffled_parts(len(features), 1)[0][:MAX_KERNEL_REFERENCE].numpy()
    return FeatureSet(torch.from_numpy(features[chosen]).to(device), mean, covariance)


def frechet_distance(images: FeatureSet, reference: FeatureSet) -> float:
    """Frechet distance of the Gaussians with these means and covariances (FID, arXiv 1706.08500, Eq. 6).

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. With S1 = A^T A and S2 = B^T B, the trace of the root is the sum of
    the singular values of A B^T. No matrix square root is needed, so singular covariances are exact as well.
    """
    product = images.covariance_factor @ reference.covariance_factor.T
    traces = images.covariance_factor.square().sum() + reference.covariance_factor.square().sum()
    distance = (images.mean - reference.mean).square().sum() + traces - 2 * torch.linalg.svdvals(product).sum()
    return distance.item()


def kernel_sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sum of KID's kernel `(x . y / F + 1)^3` over all pairs of rows of features (N, F) and (M, F)."""
    num_features = first.shape[1]
    blocks = itertools.product(first.split(CHUNK_ROWS), second.split(CHUNK_COLUMNS))
    return sum((rows @ columns.T).div_(num_features).add_(1).pow_(3).sum() for rows, columns in blocks)


def kernel_distance(images: FeatureSet, reference: FeatureSet) -> float:
    """Unbiased squared maximum mean discrepancy under a polynomial kernel (KID, arXiv 1801.01401), over all pairs.

    The paper averages over random subsets of 1,000 images. Both estimators are unbiased, so they have the same
    expectation, but all pairs have the lower variance and need no random numbers. A large reference is cut to a fixed
    part (see `FeatureSet.kernel_reference`).
    """
    reference = reference.kernel_reference
    across = kernel_sum(images.features, reference.features) / (len(images) * len(reference))
    return (images.kernel_mean + reference.kernel_mean - 2 * across).item()


def nearest(queries: torch.Tensor, points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest points of each query, nearest first.

    Args:
        queries: shape (N, F).
        points: shape (M, F).
        count: number of neighbors K, at most M.

    Returns:
        Distances and indices of the points, both of shape (N, K).
    """
    found = [torch.cdist(rows, points).topk(count, largest=False) for rows in queries.split(CHUNK_ROWS)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def fraction_within(queries: torch.Tensor, points: torch.Tensor, radii: torch.Tensor) -> float:
    """Fraction of the queries (N, F) that lie within the radius (M) of at least one of the points (M, F)."""
    inside = [(torch.cdist(rows, points) <= radii).any(dim=1) for rows in queries.split(CHUNK_ROWS)]
    return torch.cat(inside).double().mean().item()


def precision_recall(images: FeatureSet, reference: FeatureSet) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, Eq. 1-2), with balls that reach neighbor `NUM_NEIGHBORS`.

    Returns:
        The fraction of images on the manifold of the reference, and the fraction of the reference on that of the
        images; both in [0, 1].
    """
    precision = fraction_within(images.features, reference.features, reference.radii)
    return precision, fraction_within(reference.features, images.features, images.radii)


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean KL divergence of each image's class probabilities from their mean (arXiv 1606.03498).

    Args:
        probabilities: shape (N, classes).
    """
    probabilities = probabilities.double()
    marginal = probabilities.mean(dim=0)
    divergence = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, marginal)
    return divergence.sum(dim=1).mean().exp().item()


def metric_values(metrics: Iterable[str], images: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """Values of metrics that compare features, that is, of all but the Inception score."""
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
    """Indices of disjoint random parts whose sizes differ by at most one; the same at every call."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return list(order.tensor_split(num_parts))


def images_needed(metrics: Iterable[str], num_subsets: int) -> int:
    """The lowest number of images for these metrics: each subset must have enough of them for its own value."""
    return max(
        2 * INCEPTION_SPLITS if name == "inception_score" else num_subsets * (NUM_NEIGHBORS + 1) for name in metrics
    )


def compare(
    metrics: Iterable[str], images: FeatureSet, reference: FeatureSet, num_subsets: int = 5
) -> dict[str, dict]:
    """Computes metrics that compare features, with their standard deviation and the value that real images get.

    Args:
        metrics: any of `METRICS` but `inception_score`.
        images: the evaluated images.
        reference: real images; mean and covariance suffice for the Frechet distance.
        num_subsets: disjoint subsets of the images, each compared with the whole reference.

    Returns:
        For each metric:
        `value`, of all images;
        `spread`, the standard deviation over the subsets (the standard error of the value is smaller, by about the
        square root of their number);
        `subset_mean` (Frechet distance and recall depend on the number of images);
        `floor`, the real-vs-real baseline: one half of the reference, cut to the number of images, against the other
        half (as that is fewer images, a Frechet distance can lie below it); None without reference images;
        `counts`, the numbers of images in all of these; the kernel distance takes at most `MAX_KERNEL_REFERENCE`
        reference images.

    Raises:
        UserError: if there are too few images, or a metric needs images where the reference has statistics only.
    """
    metrics = [name for name in METRICS if name in metrics]
    needed = images_needed(metrics, num_subsets)
    for name, number in (("images", len(images)), ("reference images", len(reference))):
        only_statistics = (
            name == "reference images" and metrics == ["frechet_distance"] and reference.has_own_statistics
        )
        if number < needed and not only_statistics:
            verb = "needs" if len(metrics) == 1 else "need"
            raise UserError(f"{number} {name}, but {' and '.join(metrics)} {verb} at least {needed}")
    values = metric_values(metrics, images, reference)
    subsets = [images.subset(part) for part in shuffled_parts(len(images), num_subsets)]
    by_subset = [metric_values(metrics, subset, reference) for subset in subsets]
    counts = {
        "images": len(images),
        "reference": len(reference) or None,
        "subsets": num_subsets,
        "images_per_subset": len(images) // num_subsets,
    }
    real_vs_real = dict.fromkeys(metrics)
    if len(reference) >= needed:
        half, other_half = shuffled_parts(len(reference), 2)
        half = half[: len(images)]
        real_vs_real = metric_values(metrics, reference.subset(half), reference.subset(other_half))
        counts |= {"floor_images": len(half), "floor_reference": len(other_half)}
    # Of how many images the statistics are, nobody knows.
    other_counts = {"frechet_distance": {"reference": None}} if reference.has_own_statistics else {}
    references = {name: number for name, number in counts.items() if name.endswith("reference") and number}
    other_counts["kernel_distance"] = {name: min(n, MAX_KERNEL_REFERENCE) for name, n in references.items()}
    result = {}
    for name in metrics:
        of_subsets = [subset[name] for subset in by_subset]
        result[name] = summarize(values[name], of_subsets, real_vs_real[name], counts | other_counts.get(name, {}))
    return result


def compare_classes(probabilities: torch.Tensor, reference_probabilities: torch.Tensor | None) -> dict:
    """Computes the Inception score, in the form of `compare`; its value is the mean over `INCEPTION_SPLITS` subsets.

    Args:
        probabilities: class probabilities of the images, by the Inception network; shape (N, classes).
        reference_probabilities: class probabilities of N real images, whose score is the `floor`; or None.

    Raises:
        UserError: if there are fewer than two images per subset.
    """
    needed = images_needed(["inception_score"], INCEPTION_SPLITS)
    if len(probabilities) < needed:
        raise UserError(f"{len(probabilities)} images, but inception_score needs at least {needed}")

    def scores(values: torch.Tensor) -> list[float]:
        return [inception_score(values[part]) for part in shuffled_parts(len(values), INCEPTION_SPLITS)]

    by_subset = scores(probabilities)
    counts = {
        "images": len(probabilities),
        "reference": None if reference_probabilities is None else len(reference_probabilities),
        "subsets": INCEPTION_SPLITS,
        "images_per_subset": len(probabilities) // INCEPTION_SPLITS,
    }
    real_vs_real = None if reference_probabilities is None else float(np.mean(scores(reference_probabilities)))
    return summarize(float(np.mean(by_subset)), by_subset, real_vs_real, counts)


def summarize(value: float, by_subset: list[float], real_vs_real: float | None, counts: dict) -> dict:
    """One metric in the form of the results file; see `compare`."""
    return {
        "value": value,
        "spread": float(np.std(by_subset, ddof=1)),
        "subset_mean": float(np.mean(by_subset)),
        "floor": real_vs_real,
        "counts": counts,
    }


def compute_metrics(
    metrics: Iterable[str],
    features: FeatureSet,
    reference: FeatureSet,
    probabilities: np.ndarray | None = None,
    reference_probabilities: np.ndarray | None = None,
    num_subsets: int = 5,
) -> dict[str, dict]:
    """Computes any of `METRICS` for a set of images, each with the settings that it was computed with.

    Args:
        metrics: any of `METRICS`, in the order of the result.
        features: features of the evaluated images.
        reference: features of real images.
        probabilities: for `inception_score`: class probabilities of the images, shape (N, classes).
        reference_probabilities: for `inception_score`: class probabilities of the real images, of which N are taken.
        num_subsets: see `compare`.

    Returns:
        See `compare`.

    Raises:
        UserError: see `compare` and `compare_classes`.
    """
    names = [name for name in metrics if name != "inception_score"]
    result = compare(names, features, reference, num_subsets) if names else {}
    if "inception_score" in metrics:
        if reference_probabilities is not None:
            order = shuffled_parts(len(reference_probabilities), 1)[0][: len(probabilities)]
            reference_probabilities = torch.from_numpy(np.array(reference_probabilities))[order]
        result["inception_score"] = compare_classes(torch.from_numpy(np.array(probabilities)), reference_probabilities)
    return {name: result[name] | {"settings": METRIC_SETTINGS[name]} for name in metrics}
