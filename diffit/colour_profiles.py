# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Converts colours to sRGB where a file has another ICC profile: Display P3 of phones, Adobe RGB, CMYK of printers.

Without it the colours of such photos would be paler than they are shown everywhere else.
"""

import functools
import io

import numpy as np
import PIL.Image
from PIL import ImageCms

SAME_LEVELS = 3  # of 255; profiles called sRGB differ by up to this much in how they state its curve


def to_srgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a decoded 8-bit image to sRGB, keeping its transparency; relative colorimetric, black to black.

    Images without a profile, and those whose profile is sRGB (decided by what it does, not by its name), are returned
    as they are, and so are images whose profile is damaged or made for another kind of pixels (an RGB profile in a
    grey image): as in browsers, they count as sRGB.

    Args:
        image: of any mode but those of more than 8 bits, whose profiles are ignored.

    Returns:
        Grey for grey images, else RGB; RGBA or LA where the image has transparency.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    space = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = _transform(profile, space)
    if transform is None:
        return image
    alpha = None
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    converted = ImageCms.applyTransform(image if image.mode == space else image.convert(space), transform)
    if space == "L":
        converted = converted.convert("L")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=16)  # data sets have few profiles, and reading one takes longer than decoding an image
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of pixels of a mode (L, RGB, CMYK) to RGB in sRGB, or None if there is nothing to convert."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImportError:  # a Pillow without LittleCMS: colours would be wrong without a word
        raise
    except Exception:  # the profile is a stranger's file, too
        return None
    if space == "CMYK":
        return transform
    probe = PIL.Image.fromarray(_probe(space))
    converted = np.asarray(ImageCms.applyTransform(probe, transform), int)
    return None if np.abs(converted - np.asarray(probe.convert("RGB"), int)).max() <= SAME_LEVELS else transform


def _probe(space: str) -> np.ndarray:
    """All greys, or a grid of colours: shape (1, 256), or (17, 289, 3)."""
    if space == "L":
        return np.arange(256, dtype=np.uint8)[None]
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(17, 289, 3)
