# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Distances and scores between sets of features: Frechet and kernel distance, precision, recall, Inception score."""

import functools
from collections.abc import Iterable

import numpy as np
import torch

from diffit.errors import UserError

METRICS = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
NEAREST = 3  # neighbours that span the manifold of precision and recall, as in arXiv 1904.06991
INCEPTION_SPLITS = 10  # of the Inception score, as in arXiv 1606.03498
FEWEST_IMAGES = 10_000  # below, figures are not comparable with published ones
ROWS_AT_ONCE = 2048  # of a matrix of distances or kernels


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
