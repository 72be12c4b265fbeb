# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Decodes the bytes of an image file into cropped and resized pixels.

Shapes: C channels, H/W height/width in pixels.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.features
import PIL.Image
import torch

from diffit.colour_profiles import to_srgb
from diffit.errors import BadImageError, global_rank, message_of
from diffit.image_formats import check_levels, grey_levels, orientation, upright, upright_size

logger = logging.getLogger(__name__)

# Pillow tries no other format, whatever the file is called: for an EPS it would start Ghostscript.
PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PILLOW_FORMATS += ("AVIF",) if PIL.features.check("avif") else ()
MIN_OVERSAMPLING = 2.5  # pixels of a JPEG decoded at a reduced size per pixel of the result, along each axis
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_IMAGE_PIXELS = 8192 * 8192  # 67 megapixels: a 50-megapixel photo is read, a 100-megapixel one is refused


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises in the `with` block into a `BadImageError` that names the image.

    A decoder of damaged files may raise anything (`struct.error`, `TypeError`, `AttributeError`, ...), so a list of
    exceptions would never be complete.
    """
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"cannot decode image {name}: {message_of(error)}") from error


def _open_image(name: str, data: bytes) -> PIL.Image.Image | np.ndarray:
    """Opens an image of at most `MAX_IMAGE_PIXELS` without decoding its pixels."""
    if not data:
        raise BadImageError(f"image is empty (0 bytes): {name}")
    if data[:6] == b"\x93NUMPY":
        return _open_array(name, data)
    with _naming(name):
        try:
            with warnings.catch_warnings(
                category=PIL.Image.DecompressionBombWarning, action="ignore"
            ):  # our own limit is lower
                image = PIL.Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
        except PIL.UnidentifiedImageError as error:
            if data[:4] in (b"II*\0", b"MM\0*"):
                raise BadImageError(
                    "damaged TIFF, or one of a kind that Pillow does not read; for the latter, `magick FILE -depth 16 "
                    f"FILE.png` may help: {name}"
                ) from error
            if data.startswith(LFS_POINTER):
                raise BadImageError(f"pointer of Git LFS, not an image; `git lfs pull` fetches it: {name}") from error
            raise BadImageError(f"damaged, or not an image in {', '.join(PILLOW_FORMATS)}: {name}") from error
        except PIL.Image.DecompressionBombError as error:
            raise _too_large(name, f"more than {2 * PIL.Image.MAX_IMAGE_PIXELS:,} pixels") from error
        check_levels(image, data, name)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{image.width} x {image.height} pixels")
    return image


def _open_array(name: str, data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy parses the header as a Python literal, which may raise anything
        raise BadImageError(f"cannot decode array {name}: {error}") from error
    if dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImageError(
            f"array must be uint8 or uint16 and of shape H x W or H x W x C, got {dtype} of shape {shape}: {name}"
        )
    if shape[0] * shape[1] > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{shape[1]} x {shape[0]} pixels")
    # Not `np.load`, which would allocate whatever the header promises.
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise BadImageError(f"cannot decode array: its header says {shape}, which is not the size of the file: {name}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")


def _too_large(name: str, size: str) -> BadImageError:
    return BadImageError(
        f"image of {size}, more than the {MAX_IMAGE_PIXELS:,} allowed; shrink it first, for example with "
        f"ImageMagick's `mogrify -resize 4096x4096 FILE`: {name}"
    )


def _has_transparency(image: PIL.Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _natural_channels(image: PIL.Image.Image | np.ndarray, name: str, max_channels: int = 4) -> int:
    """Number of channels before any conversion. Transparency does not count, because it is composed on white.

    Raises:
        BadImageError: for an array with more than `max_channels`, which are more likely its width.
    """
    if isinstance(image, np.ndarray):
        num_channels = 1 if image.ndim == 2 else image.shape[-1]
        if num_channels > max_channels:
            raise BadImageError(
                f"array of shape {image.shape}, which is read as H x W x C: {_order(image)}--num_channels "
                f"{num_channels} must confirm that it has that many channels: {name}"
            )
        return num_channels
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _order(array: np.ndarray) -> str:
    """What to do with an array that seems to have its channels first; empty for others."""
    if array.ndim != 3 or array.shape[0] > 4 or array.shape[-1] <= 4:
        return ""
    return "it seems to be C x H x W, then save `array.transpose(1, 2, 0)`; else "


def _planes(image: PIL.Image.Image | np.ndarray, name: str, num_channels: int) -> list[PIL.Image.Image]:
    """Splits or converts an image into PIL images in [0, 255] that together have `num_channels` channels."""
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[-1] not in (1, num_channels):
            raise BadImageError(
                f"array of shape {image.shape}, which is read as H x W x C: {_order(image)}it does not have the "
                f"{num_channels} channels of --num_channels, or of the VAE: {name}"
            )
        image = image.reshape(*image.shape[:2], -1).astype(np.float32) * (255 / np.iinfo(image.dtype).max)
        planes = [PIL.Image.fromarray(image[..., c]) for c in range(image.shape[-1])]
        planes = planes * num_channels if len(planes) == 1 else planes
    elif image.mode.startswith("I"):
        levels, transparent = grey_levels(image, name)
        if transparent is not None and num_channels != 4:
            levels = np.where(transparent, np.float32(255), levels)
        planes = [PIL.Image.fromarray(levels)] * min(num_channels, 3)
        if num_channels == 4:
            alpha = np.full_like(levels, 255) if transparent is None else np.where(transparent, 0, np.float32(255))
            planes.append(PIL.Image.fromarray(alpha))
    else:
        image = upright(image)
        image = image.convert("LA") if image.mode == "La" else image  # Pillow converts it to no other mode
        image = to_srgb(image)
        if num_channels == 4:
            return [image.convert("RGBA")]
        if _has_transparency(image):
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        mode = "L" if num_channels == 1 else "RGB"
        planes = [image if image.mode == mode else image.convert(mode)]
    if sum(len(plane.getbands()) for plane in planes) != num_channels:
        raise BadImageError(
            f"image does not have the {num_channels} channels of --num_channels, or of the VAE: {name}"
        )
    return planes


def _reduce(image: PIL.Image.Image | np.ndarray, resolution: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """Has a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, which leaves out work that resizing would undo.

    The reduced image is still at least 2.5 times as large as the result, so that the result differs from that of the
    full size by less than 1/255 on average (see `tests/test_decode.py`). Sides must be multiples of the divisor,
    because a pixel that the image only fills in part would weigh too much at its edge; half a pixel matters too little
    to see, unless a turn brings it to the front.

    Returns:
        The divisor, and the full width and height after EXIF rotation, or None if the divisor is 1.
    """
    unreduced = (1, None)
    if isinstance(image, np.ndarray) or image.format not in ("JPEG", "MPO"):
        return unreduced
    if min(image.size) < 2 * MIN_OVERSAMPLING * min(resolution):  # saves reading the EXIF block
        return unreduced
    full_size = upright_size(image)
    scale = min(full_size[0] / resolution[1], full_size[1] / resolution[0])
    for divisor in (8, 4, 2):
        fits = not any(side % divisor for side in image.size) or (divisor == 2 and orientation(image) == 1)
        if fits and scale >= divisor * MIN_OVERSAMPLING:
            if image.draft(None, tuple(side // divisor for side in image.size)) is None:
                break
            return image.decoderconfig[0], full_size
    return unreduced


def decode_cropped(
    name: str,
    data: bytes,
    resolution: tuple[int, int],
    num_channels: int,
    crop_position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    keep_colour: bool = False,
) -> tuple[torch.Tensor, bool]:
    """Decodes one image, crops it to the aspect ratio of `resolution`, resizes it (antialiased Lanczos) and flips it.

    Transparency is composed on white unless `num_channels` is 4. EXIF rotation is applied. An animation yields its
    first frame. Colours are converted to sRGB where an 8-bit image has another ICC profile (see `to_srgb`); gamma and
    chromaticities that a PNG states otherwise are ignored. Grey images of 9 to 16 bits are scaled to [0, 255] without
    rounding; of 16-bit colors the upper eight bits are used. A JPEG at least five times as large as the result is
    decoded at a reduced size (see `_reduce`).

    Args:
        name: name of the image in error messages.
        data: bytes of a file in one of `PILLOW_FORMATS`, or of a uint8 or uint16 `.npy` with any number of channels.
        resolution: height H and width W of the result, in pixels.
        num_channels: channels C of the result.
        crop_position: position of the crop from top (0) to bottom (1) and from left (0) to right (1).
        flip: mirror the image horizontally.
        keep_colour: refuse an image with more channels than `num_channels` rather than drop its colors.

    Returns:
        Grey levels in [0, 255], shape (C, H, W), for `normalize_pixels`: uint8, or float32 for 16-bit images and for
        arrays. And whether something was cropped, so that another `crop_position` gives another result.

    Raises:
        BadImageError: if the file is empty, truncated, not an image, in an unusable mode, or larger than
            `MAX_IMAGE_PIXELS`; the message names the image.
    """
    height, width = resolution
    image = _open_image(name, data)
    if keep_colour and _natural_channels(image, name) > num_channels:
        raise BadImageError(
            f"image has colors, but --num_channels {num_channels} was inferred from grayscale samples; "
            f"give the flag to convert it: {name}"
        )
    with _naming(name):
        reduced_by, full_size = _reduce(image, resolution)
        planes = _planes(image, name, num_channels)
    image_width, image_height = full_size or planes[0].size
    scale = min(image_height / height, image_width / width)
    top = max(0.0, image_height - height * scale) * crop_position[0]  # rounding can make the margin negative
    left = max(0.0, image_width - width * scale) * crop_position[1]
    box = (left, top, min(left + width * scale, image_width), min(top + height * scale, image_height))
    if reduced_by > 1:
        ends = planes[0].size * 2
        box = tuple(min(edge / reduced_by, end) for edge, end in zip(box, ends, strict=True))
    if (image_width, image_height) != (width, height):
        planes = [plane.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box) for plane in planes]
    if flip:
        planes = [plane.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for plane in planes]
    pixels = np.stack([np.asarray(band) for plane in planes for band in plane.split()])  # (C, H, W)
    if pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 255)  # Lanczos overshoots, and only 8-bit images are clipped by Pillow
    return torch.from_numpy(pixels), image_height > height * scale or image_width > width * scale


def decode_pixels(*args, **kwargs) -> torch.Tensor:
    """The pixels of `decode_cropped`, which has the same arguments; shape (C, H, W)."""
    return decode_cropped(*args, **kwargs)[0]


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Maps the grey levels of `decode_pixels` to float32 in [-1, 1].

    This runs on the device, so that workers send one byte per value rather than four.

    Args:
        pixels: levels in [0, 255], uint8 or float32; any shape.

    Returns:
        Same shape, float32.
    """
    # The divisor is a tensor because CUDA multiplies by the reciprocal of a number, which changes the last bit.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32, copy=True).div_(half).sub_(1)


def decode_image(*args, **kwargs) -> torch.Tensor:
    """Decodes an image with `decode_pixels` (same arguments) into float32 in [-1, 1], shape (C, H, W)."""
    return normalize_pixels(decode_pixels(*args, **kwargs))


def image_size(name: str, data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the decoded image, that is, with its EXIF rotation applied.

    Args:
        name: name of the image in error messages.
        data: bytes of the file.

    Raises:
        BadImageError: if the file cannot be opened as an image, or is a truncated PNG.
    """
    image = _open_image(name, data)
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    with _naming(name):
        width, height = upright_size(image)
    return height, width


def warn_about_narrow_levels(table, num_images: int = 64) -> None:
    """Warns if 16-bit images use less than a sixteenth of their range, as 10-bit numbers in files of 16 bits do.

    Args:
        table: a `diffit.sources.ImageTable`.
        num_images: how many evenly spaced images are opened. At most eight of 16 bits are decoded.
    """
    ranges = []
    for index in np.linspace(0, len(table) - 1, min(num_images, len(table))).astype(int):
        with contextlib.suppress(BadImageError):  # whoever reads it next reports it
            name, data = table.read(int(index))
            image = _open_image(name, data)
            with _naming(name):
                if isinstance(image, np.ndarray) and image.dtype == np.uint16:
                    ranges.append((image.min() / 65535, image.max() / 65535))
                elif not isinstance(image, np.ndarray) and image.mode.startswith("I"):
                    levels, _ = grey_levels(image, name)
                    ranges.append((levels.min() / 255, levels.max() / 255))
        if len(ranges) == 8:
            break
    low, high = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=1)
    if high - low < 1 / 16 and global_rank() == 0:
        logger.warning(
            f"{table.source}: the {len(ranges)} images of 16 bits looked at use {high - low:.1%} of the range from "
            "black to white. If their numbers have 10 or 12 bits, multiply them by 64 or 16, or the images stay flat"
        )
