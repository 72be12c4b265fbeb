# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the numbers in an image file mean: orientation, levels of 9 to 16 bits, transparency.

Pillow's mode says how the numbers are kept, not what they mean: a TIFF of 12 bits, one of 16 bits and one in which 0
is white have the same mode. So we ask the file. What cannot be read correctly is refused.

Shapes: H/W height/width in pixels.
"""

import numpy as np
import PIL.Image

from diffit.errors import BadImageError

ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def orientation(image: PIL.Image.Image) -> int:
    # Pillow turns a TIFF itself: its size when it is opened, its pixels when they are decoded.
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an opened image after `upright`.

    Decodes a PNG, whose EXIF may follow its pixels.
    """
    turned = orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an opened image and turns its pixels as its EXIF orientation says.

    Not `ImageOps.exif_transpose`, which also rewrites the EXIF block, and fails on fields of an unexpected type.
    """
    image.load()
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def check_levels(image: PIL.Image.Image, data: bytes, name: str) -> None:
    """Refuses pixels that Pillow opens but does not decode correctly, and corrects transparency that it misreads.

    Args:
        image: opened, not decoded yet.
        data: bytes of its file.
        name: name of the image in error messages.

    Raises:
        BadImageError: for a TIFF of signed, 32-bit or floating-point numbers, or of more than 8 bits in planes, and
            for a 16-bit color PNG with a transparent color.
    """
    if image.mode == "F":
        raise BadImageError(f"floating-point image, whose range is unknown: {name}")
    if image.format == "TIFF":
        bits, planar, kinds = (image.tag_v2.get(tag, default) for tag, default in TIFF_LAYOUT.items())
        if max(kinds) > 1:
            raise BadImageError(f"TIFF of signed numbers, whose range is unknown; convert it to unsigned ones: {name}")
        if image.mode.startswith("I") and max(bits) > 16:
            raise BadImageError(f"TIFF of {max(bits)} bits, whose range is unknown; convert it to 16 bits: {name}")
        if planar == 2 and len(image.getbands()) > 1 and max(bits) > 8:
            raise BadImageError(f"TIFF of {max(bits)} bits in planes; save it with interleaved channels: {name}")
    if image.format == "PNG":
        _correct_png_transparency(image, data[24], name)


TIFF_LAYOUT = {258: (1,), 284: 1, 339: (1,)}  # default of BitsPerSample, PlanarConfiguration, SampleFormat


def _correct_png_transparency(image: PIL.Image.Image, bits: int, name: str) -> None:
    level = image.info.get("transparency")  # of the tRNS chunk, on the scale of the file's bits
    if isinstance(level, tuple) and bits == 16:  # Pillow cuts the pixels to 8 bits, but not this color
        raise BadImageError(f"16-bit color PNG with a transparent color; give it an alpha channel: {name}")
    if isinstance(level, int) and image.mode == "L":  # Pillow widens the pixels to 8 bits, but not this level
        top = 2**bits - 1
        image.info["transparency"] = (level & top) * (255 // top)


def grey_levels(image: PIL.Image.Image, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes a grey image of 9 to 16 bits, which Pillow's `convert` would cut to 8.

    Args:
        image: opened by Pillow, checked by `check_levels`, of a mode that begins with I.
        name: name of the image in error messages.

    Returns:
        Levels in [0, 255], where 0 is black, not rounded; shape (H, W), float32. And which pixels are transparent,
        shape (H, W), bool; None if the file names no transparent level.

    Raises:
        BadImageError: if a level lies outside of the range of the file's bits.
    """
    top, white_is_zero = 65535, False
    if image.format == "TIFF":
        top = 2 ** max(image.tag_v2.get(258)) - 1
        white_is_zero = image.tag_v2.get(262) == 0
    values = np.asarray(upright(image)).astype(np.float32)
    if values.min() < 0 or values.max() > top:
        raise BadImageError(f"integer image with values outside [0, {top}]: {name}")
    level = image.info.get("transparency")
    transparent = values == level if isinstance(level, int) else None
    return (top - values if white_is_zero else values) * np.float32(255 / top), transparent
