"""Decoding of strangers' image files: each is read correctly, or refused with its name."""

import struct

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from diffit.decode import decode_pixels, image_size
from diffit.errors import BadImageError
from diffit.features import TableImages
from diffit.stream import StreamBatchSampler, collate
from helpers import constant, encode, load_table, make_dataset, mentions, noise_image, write_files
from prepare_latents import CenterCrops

# ---------------------------------------------------------------------------------------------------------------------
# EXIF


def exif_field(tag: int, kind: int, value: bytes, count: int = 1) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value


UNEXPECTED_FIELDS = {  # what Pillow fails to write again
    "resolution_unit_as_byte": exif_field(0x0128, 1, b"\2\0\0\0"),
    "x_resolution_as_text": exif_field(0x011A, 2, b"72\0\0", 3),
    "make_as_number": exif_field(0x010F, 3, b"\7\0\0\0"),
    "negative_positioning": exif_field(0x0213, 9, b"\xff\xff\xff\xff"),
}
STRIPES = np.repeat(np.array([[250, 10], [120, 60]], np.uint8), 8, axis=0).repeat(8, axis=1)  # 16 x 16, in quarters


def photo(orientation: int, *fields: bytes) -> bytes:
    """A JPEG of 16 x 24 pixels with these EXIF fields: `STRIPES`, and white at the right."""
    fields = sorted(
        [exif_field(0x0112, 3, struct.pack("<HH", orientation, 0)), *fields], key=lambda field: field[1::-1]
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + b"".join(fields) + bytes(4)
    pixels = np.concatenate([STRIPES, np.full((16, 8), 255, np.uint8)], axis=1)
    return encode(pixels, "JPEG", quality=100, exif=exif)


TURNED = {  # orientation: what a viewer shows of rows of pixels
    1: lambda rows: rows,
    2: np.fliplr,
    3: lambda rows: np.rot90(rows, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda rows: np.rot90(rows, -1),
    7: lambda rows: np.rot90(rows, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("field", UNEXPECTED_FIELDS)
def test_photo_with_an_unexpected_exif_field_is_turned(field, orientation):
    data = photo(orientation, UNEXPECTED_FIELDS[field])
    rows = np.concatenate([STRIPES, np.full((16, 8), 255, np.uint8)], axis=1)
    expected = TURNED[orientation](rows)
    assert image_size("a.jpg", data) == expected.shape
    pixels = decode_pixels("a.jpg", data, expected.shape, 1)[0]
    np.testing.assert_allclose(pixels.numpy().astype(int), expected, atol=3)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_is_turned_once(orientation, dtype):
    rows = noise_image(0, 8, 12)
    data = encode(rows.astype(dtype) * (np.iinfo(dtype).max // 255), "TIFF", tiffinfo={274: orientation})
    expected = TURNED[orientation](rows)
    assert image_size("a.tif", data) == expected.shape
    torch.testing.assert_close(
        decode_pixels("a.tif", data, expected.shape, 1)[0].float(),
        torch.from_numpy(expected.astype(np.float32)),
        atol=1e-3,
        rtol=0,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Whatever a decoder raises names the file


@pytest.mark.parametrize("error", [struct.error, TypeError, AttributeError, KeyError, IndexError, MemoryError])
def test_any_exception_of_a_decoder_names_the_file(monkeypatch, error):
    def fail(image):
        raise error("the decoder's words")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", fail)
        with pytest.raises(BadImageError, match=mentions("a.jpg", "the decoder's words")):
            decode_pixels("a.jpg", photo(6), (4, 4), 3)
    monkeypatch.setattr(PIL.Image.Image, "getexif", fail)
    for read in (lambda data: decode_pixels("a.jpg", data, (4, 4), 3), lambda data: image_size("a.jpg", data)):
        with pytest.raises(BadImageError, match=mentions("a.jpg")):
            read(photo(6))


def test_image_size_of_a_truncated_png_names_the_file():
    with pytest.raises(BadImageError, match=mentions("b.png")):
        image_size("b.png", encode(noise_image(0, 32, 32, 3))[:900])


READERS = {  # a loader of batches of a table, with one worker
    "training": lambda root: DataLoader(
        (dataset := make_dataset(root, num_channels=3)),
        batch_sampler=StreamBatchSampler(dataset.stream, 2),
        num_workers=1,
        collate_fn=collate,
    ),
    "evaluation": lambda root: DataLoader(TableImages(load_table(root), (4, 4), 3), batch_size=2, num_workers=1),
    "latents": lambda root: DataLoader(
        CenterCrops(load_table(root), (4, 4), 3, "error"), sampler=range(2), batch_size=2, num_workers=1
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_bad_image_in_a_worker_is_one_short_line(tmp_path, reader):
    truncated = encode(noise_image(0, 32, 32, 3))[:900]
    root = write_files(tmp_path / "f", {"a.png": constant("RGB", 7), "b.png": truncated})
    with pytest.raises(BadImageError, match=mentions("b.png")) as raised:
        next(iter(READERS[reader](root)))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200 + len(str(root))
