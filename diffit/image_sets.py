# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sets of images to evaluate or to compare with, from folders, zips, parquet files, hub datasets and npz files.

Shapes: N images, C channels, H/W height/width, F features.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Subset

from diffit.decode import image_size
from diffit.errors import BadImageError, UserError
from diffit.eval_config import ReferenceConfig
from diffit.features import FeatureExtractor, TableImages
from diffit.listing import listed_samples
from diffit.metrics import FeatureSet
from diffit.source_config import SOURCES, SourceConfig
from diffit.sources import ImageTable, load_image_table

# Flags that choose what is read, by the kind of source.
READ_WITH = {
    "folder": ("follow_links", "skip_other_formats"),
    "zip": ("skip_other_formats",),
    "parquet file": ("image_column",),
    "hub dataset": ("image_column", "dataset_split"),
}


@dataclass(frozen=True)
class ImageSource:
    """Existing images, in a table or an array, or the statistics of some; npz files of ADM have both.

    Attributes:
        flag: that names them, for messages.
        name: its value.
        table: images that are not decoded yet; or None.
        array: uint8, shape (N, C, H, W); or None.
        statistics: `mu` (F) and `sigma` (F, F) of features, and the `extractor` that they are of, None if the file
            does not say; or None.
        digest: identifies the images; that of a table is added by `identify`.
        reader: names of the flags in `READ_WITH` that chose what was read.
    """

    flag: str
    name: str
    table: ImageTable | None = None
    array: np.ndarray | None = None
    statistics: dict | None = None
    digest: str = ""
    reader: tuple[str, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether there are images, not only statistics."""
        return self.table is not None or self.array is not None

    @property
    def num_images(self) -> int:
        """Number of images; 0 for statistics alone."""
        return len(self.table if self.table is not None else self.array) if self.has_images else 0


@dataclass(frozen=True)
class ImageSet:
    """Images of one shape.

    Attributes:
        images: gives uint8 of shape (C, H, W) by index.
        settings: all that the images depend on, as JSON values.
    """

    images: Dataset
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluatedSet:
    """Images and their features; the arrays are mapped from files.

    Attributes:
        name: path or name that the user gave for the images or the model.
        images: see `ImageSet`.
        features: float32, shape (N, F).
        probabilities: classes of the Inception network, shape (N, 1008); None unless the Inception score is asked for.
        kimg: thousands of images seen in training, if this is the sample of a checkpoint.
        scheduler: name of the sampler; None if the images were not sampled here.
        nfe: number of function evaluations (forward passes) per image, without those of guidance; None likewise.
    """

    name: str
    images: ImageSet
    features: np.ndarray
    probabilities: np.ndarray | None = None
    kimg: float | None = None
    scheduler: str | None = None
    nfe: int | None = None

    def feature_set(self, device: torch.device) -> FeatureSet:
        """The features for the metrics, on a device (see `metrics_device`)."""
        return FeatureSet(torch.from_numpy(np.array(self.features)).to(device))


class ArrayImages(Dataset):
    """A dataset of the images of a uint8 array of shape (N, C, H, W); grayscale is repeated to three channels."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = torch.from_numpy(np.array(self.array[index]))
        return image.expand(3, -1, -1) if len(image) == 1 else image


def open_source(flag: str, name: str, asked: ReferenceConfig) -> ImageSource:
    """Finds images or statistics.

    Args:
        flag: for messages.
        name: its value: folder, zip, parquet file, npz, or hub dataset.
        asked: how images are read. A folder or zip of files has no columns.

    Raises:
        UserError: names the flag and its value.
    """
    path = Path(name)
    if path.suffix.lower() == ".npz":
        return _open_npz(flag, path)
    column, files = asked.image_column, {name: getattr(asked, name) for name in READ_WITH["folder"]}
    if path.suffix.lower() == ".parquet":
        kind, source = "parquet file", SourceConfig(train_data_file=name, image_column=column)
    elif path.is_file() or (path.is_dir() and (column is None or not any(path.rglob("*.parquet")))):
        kind, source = "zip" if path.is_file() else "folder", SourceConfig(train_data_dir=name, **files)
    else:
        kind = "hub dataset"
        source = SourceConfig(dataset_name=name, dataset_split=asked.dataset_split, image_column=column)
    try:
        table = load_image_table(source, need_labels=False)
    except (UserError, OSError) as error:
        # The message names the flags of training.
        message = re.sub(rf"--({'|'.join(SOURCES)})\b", flag, str(error)).replace("by --cache_dir or by", "by")
        raise UserError(message if message.startswith(flag) else f"{flag} {name}: {message}") from error
    if listed := listed_samples(path):  # sample_diffit.py puts a grid next to the samples
        files = [Path(image["path"]).name for image in table.rows["image"]]
        table = table.select([index for index, file in enumerate(files) if file in listed])
        if len(table) < len(listed):
            raise UserError(f"{flag} {name}: {len(listed) - len(table)} images of its samples.json are missing")
    return ImageSource(flag, name, table=table, reader=READ_WITH[kind])


def identify(processes: PartialState, source: ImageSource) -> ImageSource:
    """Adds the `digest` of all images to a source with a table. Must be called by all processes.

    Each process reads its share, because reading all of ImageNet from a network disk may take hours.

    Args:
        processes: may be an `Accelerator`.
        source: as `open_source` returned it in each process.
    """
    table = source.table
    if table is None:
        return source
    mine = []
    for index in range(processes.process_index, len(table), processes.num_processes):
        content = b""
        with contextlib.suppress(BadImageError):  # feature extraction will report it
            content = table.content(index)
        mine.append(hashlib.sha256(content).digest())
    digests = np.empty((len(table), 32), np.uint8)
    for rank, share in enumerate(gather_object([b"".join(mine)])):
        digests[rank :: processes.num_processes] = np.frombuffer(share, np.uint8).reshape(-1, 32)
    digest = hashlib.sha256(table.header())
    digest.update(digests.tobytes())
    return dataclasses.replace(source, digest=digest.hexdigest()[:16])


def _open_npz(flag: str, path: Path) -> ImageSource:
    """Images (`arr_0`, as in the ADM evaluation suite), statistics (`mu` and `sigma`, as written by EDM), or both."""
    pixels = statistics = None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            if "mu" in file and "sigma" in file:
                extractor = json.loads(str(file["extractor"])) if "extractor" in file else None
                statistics = {"mu": file["mu"], "sigma": file["sigma"], "extractor": extractor}
            if "arr_0" in file:
                pixels = file["arr_0"]
    except Exception as error:  # of numpy, zip or JSON; numpy's own message may advise to trust the file
        raise UserError(f"{flag} {path}: damaged, or not an npz of plain arrays ({type(error).__name__})") from error
    if statistics is not None:
        check_statistics(f"{flag} {path}", statistics["mu"], statistics["sigma"])
    if pixels is None:
        if statistics is None:
            raise UserError(f"{flag} {path}: expected images (arr_0) or statistics (mu, sigma), but it has {names}")
        if flag != "--reference":
            raise UserError(f"{flag} {path} holds statistics, not images: only --reference takes them")
        return ImageSource(flag, str(path), statistics=statistics)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.size == 0 or pixels.shape[-1] not in (1, 3):
        order = "; its channels come first, transpose them" if pixels.ndim == 4 and pixels.shape[1] in (1, 3) else ""
        raise UserError(
            f"{flag} {path}: arr_0 must be uint8 of shape (N, H, W, C) with 1 or 3 channels, got {pixels.dtype} "
            f"{pixels.shape}{order}"
        )
    digest = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]
    return ImageSource(flag, str(path), array=pixels.transpose(0, 3, 1, 2), statistics=statistics, digest=digest)


def natural_size(source: ImageSource) -> tuple[int, int]:
    """Height and width of images, which must be the same for all.

    Raises:
        UserError: names two images whose sizes differ.
    """
    if source.array is not None:
        return source.array.shape[2:]
    table = source.table
    first = image_size(*table.read(0))
    for index in range(1, len(table)):
        name, data = table.read(index)
        size = image_size(name, data)
        if size != first:
            raise UserError(
                f"{source.flag} {source.name}: images of different sizes ({first[0]} x {first[1]} and, in {name}, "
                f"{size[0]} x {size[1]}): --resolution must say to which size they are resized"
            )
    return first


def image_set(source: ImageSource, size: tuple[int, int], num_images: int | None = None) -> ImageSet:
    """The images of a source at a height and width, with three channels.

    Both sides of a comparison have three: with fewer, colors would be dropped on one side, or missed on the other.

    Args:
        source: images, not statistics.
        size: files are decoded, cropped and resized to it as in training.
        num_images: a random subset of that size, always the same one; default: all.

    Raises:
        UserError: if an array has another size: only files are resized.
    """
    if source.array is not None:
        shape = source.array.shape[1:]
        check_resolution(f"{source.flag} {source.name}", shape[1:], size)
        images = ArrayImages(source.array)
    else:
        shape = (3, *size)
        images = TableImages(source.table, size, 3)
    settings = {"digest": source.digest, "shape": list(shape)}
    if num_images is not None and num_images < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = Subset(images, order[:num_images].tolist())
        settings |= {"num_images": num_images}
    return ImageSet(images, settings)


def check_resolution(what: str, size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Refuses arrays and samples of another size than the images that they are compared with.

    Args:
        what: names them in the message.
        size: their height and width in pixels.
        expected: height and width of the comparison; None: theirs.

    Raises:
        UserError: states both sizes.
    """
    if expected is not None and tuple(size) != tuple(expected):
        raise UserError(
            f"{what}: its images are {size[0]} x {size[1]} pixels, not {expected[0]} x {expected[1]}, and only files "
            f"are resized: give --resolution {size[0]}x{size[1]}, or files"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of features: mean and covariance


def check_statistics(what: str, mu: np.ndarray, sigma: np.ndarray) -> None:
    """Refuses arrays that cannot be the mean and covariance of features: their distances would be meaningless.

    Args:
        what: names them in the message.
        mu: the mean, shape (F).
        sigma: the covariance, shape (F, F).

    Raises:
        UserError: says what is wrong.
    """
    if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape) or not {mu.dtype.kind, sigma.dtype.kind} <= {"f"}:
        raise UserError(
            f"{what}: mu must have the shape (F) and sigma (F, F), both floats, got {mu.dtype} {mu.shape} and "
            f"{sigma.dtype} {sigma.shape}"
        )
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise UserError(f"{what}: mu or sigma has NaN or infinite values")
    scale = np.abs(sigma).max(initial=0.0)
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-3 * scale or (np.diag(sigma) < 0).any():
        raise UserError(f"{what}: sigma is not a covariance, it must be symmetric with a diagonal of at least 0")


def save_statistics(file: Path, features: FeatureSet, extractor: FeatureExtractor) -> None:
    """Writes mean and covariance as EDM does (`mu`, `sigma`), and the extractor's settings; nothing is pickled."""
    description = json.dumps({"name": extractor.name} | extractor.settings)
    mu, sigma = (statistic.cpu().numpy() for statistic in (features.mean, features.covariance))
    temporary = file.with_name(f".{uuid.uuid4().hex}.npz")
    np.savez(temporary, mu=mu, sigma=sigma, extractor=np.array(description))
    temporary.replace(file)  # another evaluation may be reading it


def load_statistics(source: ImageSource, extractor: FeatureExtractor, num_features: int) -> FeatureSet:
    """The mean and covariance that a source has, instead of images or besides them.

    Raises:
        UserError: if they were made with another feature extractor.
    """
    mu, sigma, theirs = (source.statistics[key] for key in ("mu", "sigma", "extractor"))
    ours = {"name": extractor.name} | extractor.settings
    fits = mu.shape == (num_features,) and sigma.shape == (num_features, num_features)
    if not fits or theirs not in (None, ours):
        made_with = f"{len(mu)} features" if theirs is None else theirs
        raise UserError(
            f"{source.flag} {source.name} was made with another feature extractor ({made_with}) than this one "
            f"({num_features} features, {ours})"
        )
    return FeatureSet(mean=torch.from_numpy(mu), covariance=torch.from_numpy(sigma))
