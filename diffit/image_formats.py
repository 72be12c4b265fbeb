# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the numbers in an image file mean: orientation, levels of 9 to 16 bits, transparency.

Pillow's mode says how the numbers are kept, not what they mean: a TIFF of 12 bits, one of 16 bits and one in which 0
is white have the same mode. So we ask the file. What cannot be read correctly is refused.

Shapes: H/W height/width in pixels.
"""

import PIL.Image

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


def _orientation(image: PIL.Image.Image) -> int:
    # Pillow turns a TIFF itself: its size when it is opened, its pixels when they are decoded.
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an opened image after `upright`.

    Decodes a PNG, whose EXIF may follow its pixels.
    """
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decodes an opened image and turns its pixels as its EXIF orientation says.

    Not `ImageOps.exif_transpose`, which also rewrites the EXIF block, and fails on fields of an unexpected type.
    """
    image.load()
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)
