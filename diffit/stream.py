# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The endless stream of positions that training reads, and the tensors at each position.

Randomness is a function of the position in the stream, not a state. With n images in the table, position p holds image
`permutation(seed, p // n)[p % n]`, and every other random number for p comes from a generator seeded by (seed, p).
Data-loader workers therefore hold no state, and a run resumes from one integer.

Shapes: B batch, C channels, H/W height/width in pixels, n images in the table."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from diffit.augment import NUM_AUGMENT_NUMBERS, sample_augmentation
from diffit.decode import decode_cropped
from diffit.decoded_images import DecodedImages
from diffit.errors import BadImageError, UserError
from diffit.packing import Batch
from diffit.sources import ImageTable, Table, detect_num_channels

# Independent streams of random numbers for the same (seed, position).
PERMUTATION, AUGMENTATION, DIFFUSION = range(3)


def position_generator(seed: int, position: int, stream: int) -> np.random.Generator:
    """A generator that depends on (seed, position) only: numpy's counter-based Philox, the same on every machine.

    Args:
        seed: integer in [0, 2**64).
        position: integer in [0, 2**64).
        stream: `PERMUTATION`, `AUGMENTATION` or `DIFFUSION`, which are independent of each other.
    """
    key = np.array([seed, position], np.uint64)  # of a list with one number above 2**63 numpy makes floats
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


class PositionGenerator:
    """`position_generator` for many positions: moving one generator takes a tenth of the time of building another.

    Args:
        seed: see `position_generator`.
    """

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=np.array([seed, 0], np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._start = self._philox.state

    def at(self, position: int, stream: int) -> np.random.Generator:
        """The generator of a position, valid until the next call."""
        self._start["state"]["key"][1] = position
        self._start["state"]["counter"][3] = stream
        self._philox.state = self._start
        return self._generator


class PositionStream:
    """Maps stream positions to images, epoch after epoch, with a new permutation in each epoch.

    Args:
        num_images: number of images n in the table.
        seed: seed of the permutations, in [0, 2**64).
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images = num_images
        self.seed = seed
        self._epoch, self._permutation = None, None

    def index(self, position: int) -> int:
        """Index in [0, n) of the image at `position`: `permutation(seed, position // n)[position % n]`."""
        epoch, offset = divmod(position, self.num_images)
        if epoch != self._epoch:
            self._permutation = position_generator(self.seed, epoch, PERMUTATION).permutation(self.num_images)
            self._epoch = epoch
        return int(self._permutation[offset])


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless micro-batches of (position, index) for one process. It shards the stream itself.

    Together, the processes' micro-batches cover the next `num_processes * batch_size` positions. An optimizer step
    therefore covers the same positions for any split between processes and gradient accumulation.

    Args:
        stream: order of the images.
        batch_size: images per micro-batch and process (B).
        start_position: first position to read.
        num_processes: number of processes.
        process_index: index of this process, in [0, num_processes).
    """

    def __init__(
        self,
        stream: PositionStream,
        batch_size: int,
        start_position: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.stream = stream
        self.batch_size = batch_size
        self.start_position = start_position
        self.num_processes = num_processes
        self.process_index = process_index

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start_position + self.process_index * self.batch_size
        while True:
            yield [(p, self.stream.index(p)) for p in range(first, first + self.batch_size)]
            first += self.num_processes * self.batch_size


def split_table(table: Table, validation_fraction: float) -> tuple[Table, Table]:
    """Splits off a validation set that is the same for every seed, so that runs can be compared.

    Args:
        table: all images.
        validation_fraction: held-out fraction in (0, 1); at least one image is held out.

    Returns:
        Training and validation images.

    Raises:
        UserError: names --validation_fraction, if no image is left for training.
    """
    order = PositionStream(len(table), seed=0)
    num_validation = max(1, round(len(table) * validation_fraction))
    if num_validation >= len(table):
        raise UserError(f"--validation_fraction {validation_fraction} leaves none of {len(table)} images for training")
    held_out = {order.index(position) for position in range(num_validation)}
    training = [index for index in range(len(table)) if index not in held_out]
    return table.select(training), table.select(sorted(held_out))


class StreamDataset(torch.utils.data.Dataset, ABC):
    """Everything that training needs at a position of the stream: an image, its label, and their random numbers.

    A data loader asks for whole batches (`__getitems__`), which are built in place, so that it has nothing to collate.

    Args:
        table: reader of the images.
        stream: order of the images; determines the replacement of a bad image.
        random_flip: mirror each image horizontally with probability 1/2.
        on_bad_image: `"error"` raises; `"skip"` takes the next readable image of the permutation and reports the bad
            one's name.
        latent_shape: shape (c, h, w) of the latents to train on; None for pixel-space training.
        augment: draw the random numbers of `diffit.augment`.
    """

    image_name: str  # of the image in a batch

    def __init__(
        self,
        table: Table,
        stream: PositionStream,
        random_flip: bool,
        on_bad_image: str,
        latent_shape: tuple[int, int, int] | None,
        augment: bool = False,
    ):
        self.table = table
        self.stream = stream
        self.random_flip = random_flip
        self.on_bad_image = on_bad_image
        self.latent_shape = latent_shape
        self.augment = augment
        self._generator = PositionGenerator(stream.seed)

    def __getitem__(self, position_and_index: tuple[int, int]) -> dict:
        """The tensors of one position, without the leading B, and `bad_images`. See `__getitems__`."""
        batch = self.__getitems__([position_and_index])
        return {name: tensor[0] for name, tensor in batch.tensors().items()} | {"bad_images": batch.bad_images}

    def __getitems__(self, positions_and_indices: list[tuple[int, int]]) -> Batch:
        """Builds a micro-batch; what it holds for a position depends on (seed, position) only.

        Returns:
            A batch of

            - `position`: int64, shape (B);
            - the image under the name that the subclass documents;
            - `class_labels`: int64, shape (B); absent if the data have no labels;
            - `noise`: standard normal, float32, shape (B, ...) of the pixels or latents that are trained on;
            - `time_uniform`, `dropout_uniform`: float32 in [0, 1), mapped to the timestep and to label dropout; (B);
            - `posterior_noise`: like `noise`; only for latents, see `sample_latents`;
            - `augmentation`: only if `augment` is set, see `diffit.augment`.

        Raises:
            BadImageError: names the file, unless bad images are skipped.
        """
        images, indices, bad_images = [], [], []
        augmentation = np.empty((len(positions_and_indices), NUM_AUGMENT_NUMBERS), np.float32)
        for number, (position, index) in enumerate(positions_and_indices):
            rng = self._generator.at(position, AUGMENTATION)
            flip, *crop_position = rng.random(3)
            if self.augment:
                augmentation[number] = sample_augmentation(rng)
            flip = self.random_flip and flip < 0.5
            image, index, skipped = self._load_or_skip(position, index, flip, tuple(crop_position))
            images.append(image)
            indices.append(index)
            bad_images += skipped
        batch = Batch.allocate(self._contents(images), bad_images)
        tensors = {name: tensor.numpy() for name, tensor in batch.tensors().items()}
        for target, image in zip(tensors[self.image_name], images, strict=True):
            target[:] = image
        self._fill_noise(tensors, [position for position, _ in positions_and_indices])
        if self.augment:
            tensors["augmentation"][:] = augmentation
        if "class_labels" in tensors:
            tensors["class_labels"][:] = self.table.labels[self.table.indices[indices]]
        return batch

    def _load_or_skip(
        self, position: int, index: int, flip: bool, crop_position: tuple[float, float]
    ) -> tuple[np.ndarray, int, list[str]]:
        """Reads the image at a position; returns it, its index, and messages about the images skipped before it."""
        bad_images = []
        while True:
            try:
                return self._load(index, flip, crop_position), index, bad_images
            except BadImageError as error:
                if self.on_bad_image != "skip":
                    raise
                bad_images.append(str(error))
                num_images = len(self.table)
                if len(bad_images) == num_images:
                    raise BadImageError(f"no readable image in {self.table.source}; last error: {error}") from error
                epoch_start = position - position % num_images
                index = self.stream.index(epoch_start + (position + len(bad_images)) % num_images)

    def _contents(self, images: list[np.ndarray]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor in a batch of these images."""
        size = (len(images),)
        noise = (torch.float32, size + (self.latent_shape or images[0].shape))
        # 8-bit and 16-bit images may share a batch.
        dtype = torch.uint8 if all(image.dtype == np.uint8 for image in images) else torch.float32
        contents = {"position": (torch.int64, size), self.image_name: (dtype, size + images[0].shape)}
        if self.augment:
            contents["augmentation"] = (torch.float32, (*size, NUM_AUGMENT_NUMBERS))
        contents |= {"time_uniform": (torch.float32, size), "dropout_uniform": (torch.float32, size), "noise": noise}
        if self.latent_shape is not None:
            contents["posterior_noise"] = noise
        if self.table.class_names is not None:
            contents["class_labels"] = (torch.int64, size)
        return contents

    def _fill_noise(self, tensors: dict[str, np.ndarray], positions: list[int]) -> None:
        """Draws what the diffusion needs at each position, straight into the batch."""
        tensors["position"][:] = positions
        for number, position in enumerate(positions):
            rng = self._generator.at(position, DIFFUSION)
            tensors["time_uniform"][number] = rng.random(dtype=np.float32)
            tensors["dropout_uniform"][number] = rng.random(dtype=np.float32)
            for name in ("noise", "posterior_noise"):
                if name in tensors:
                    rng.standard_normal(dtype=np.float32, out=tensors[name][number])

    @abstractmethod
    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> np.ndarray:
        """Reads an image. The array must not change until the batch is built.

        Args:
            index: index of the image in the table.
            flip: mirror the image horizontally.
            crop_position: position of the crop from top (0) to bottom (1) and from left (0) to right (1).

        Raises:
            BadImageError: if the image cannot be read.
        """


class ImageDataset(StreamDataset):
    """Images as `pixel_values`, shape (C, H, W): grey levels for `normalize_pixels`.

    Args:
        table: reader of the images.
        stream: order of the images; determines the replacement of a bad image.
        resolution: height H and width W in pixels.
        num_channels: channels C; None infers them from a sample of the images, and a color image among grayscale
            ones is then an error.
        center_crop: crop the center rather than a random position.
        random_flip: mirror each image horizontally with probability 1/2.
        on_bad_image: `"error"` raises; `"skip"` takes the next readable image of the permutation and reports the bad
            one's name.
        latent_shape: shape (c, h, w) of the latents to train on; None for pixel-space training.
        augment: draw the random numbers of `diffit.augment`, which transforms the images on the device.

    Attributes:
        decoded: images of shape (C, H, W) that stay decoded, by index in the table; None decodes each one every time.
    """

    image_name = "pixel_values"

    def __init__(
        self,
        table: ImageTable,
        stream: PositionStream,
        resolution: tuple[int, int],
        num_channels: int | None = None,
        center_crop: bool = False,
        random_flip: bool = False,
        on_bad_image: str = "error",
        latent_shape: tuple[int, int, int] | None = None,
        augment: bool = False,
    ):
        super().__init__(table, stream, random_flip, on_bad_image, latent_shape, augment)
        self.resolution = resolution
        self.keep_colour = num_channels is None
        self.num_channels = num_channels or detect_num_channels(table)
        self.center_crop = center_crop
        self.decoded: DecodedImages | None = None

    def _load(self, index: int, flip: bool, crop_position: tuple[float, float]) -> np.ndarray:
        pixels = None if self.decoded is None else self.decoded.get(index)
        if pixels is None:
            pixels = self._decode(index, crop_position)
        return pixels[..., ::-1] if flip else pixels

    def _decode(self, index: int, crop_position: tuple[float, float]) -> np.ndarray:
        """Decodes an image, and keeps it unless its next crop may be another or it has more than 8 bits."""
        pixels, is_cropped = decode_cropped(
            *self.table.read(index),
            self.resolution,
            self.num_channels,
            (0.5, 0.5) if self.center_crop else crop_position,
            keep_colour=self.keep_colour,
        )
        pixels = pixels.numpy()
        if self.decoded is not None and pixels.dtype == np.uint8 and (self.center_crop or not is_cropped):
            self.decoded.put(index, pixels)
        return pixels
