"""Decoding of strangers' image files: each is read correctly, or refused with its name."""

import logging
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from torch.utils.data import DataLoader

from diffit.batches import load_batches
from diffit.decode import decode_pixels, image_size
from diffit.errors import BadImageError
from diffit.features import TableImages
from diffit.plan import describe_data
from diffit.sources import detect_num_channels
from diffit.stream import StreamBatchSampler
from helpers import constant, encode, encode_npy, load_table, make_dataset, mentions, noise_image, write_files
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
    "training": lambda root: load_batches(
        (dataset := make_dataset(root, num_channels=3)), StreamBatchSampler(dataset.stream, 2), num_workers=1
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


# ---------------------------------------------------------------------------------------------------------------------
# What the numbers mean


def tiff(
    bits: int,
    photometric: int,
    pixels: bytes,
    *,
    samples: int = 1,
    planar: int = 1,
    kind: int = 1,
    order: str = "<",
    compressed: bool = False,
    extra: int | None = None,
) -> bytes:
    """A TIFF of 8 x 8 pixels in one strip (or one a plane); `kind` is its SampleFormat, `extra` that of its alpha."""
    strips = samples if planar == 2 else 1
    strip = len(pixels) // strips
    data = [pixels[i * strip : (i + 1) * strip] for i in range(strips)]
    data = [zlib.compress(piece) for piece in data] if compressed else data
    entries = {256: ("I", [8]), 257: ("I", [8]), 258: ("H", [bits] * samples), 259: ("H", [8 if compressed else 1])}
    entries |= {262: ("H", [photometric]), 277: ("H", [samples]), 278: ("I", [8]), 284: ("H", [planar])}
    entries |= {279: ("I", [len(piece) for piece in data]), 339: ("H", [kind] * samples)}
    entries |= {} if extra is None else {338: ("H", [extra])}
    end = 8 + 2 + 12 * (len(entries) + 1) + 4 + 2 * 100  # more than the values that do not fit into their entries
    entries[273] = ("I", [end + sum(len(piece) for piece in data[:i]) for i in range(strips)])
    directory, tail, tail_at = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, (letter, values) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(value) > 4:
            value, tail = struct.pack(f"{order}I", tail_at + len(tail)), tail + value
        directory += struct.pack(f"{order}HHI", tag, 3 if letter == "H" else 4, len(values)) + value.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return (start + directory + bytes(4) + tail).ljust(end, b"\0") + b"".join(data)


def png(bits: int, colour: int, row: bytes, transparent: bytes = b"", kind: bytes = b"tRNS") -> bytes:
    """A PNG of 8 equal rows of 8 pixels; `colour` is its colour type."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)), (kind, transparent)]
    chunks += [(b"IDAT", zlib.compress((b"\0" + row) * 8)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
        if body or name != kind
    )


def words(*values: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}{64 * len(values)}H", *(value for value in values for _ in range(64)))


RGB16 = struct.pack("<3H", 65535, 32896, 0) * 64
LEVELS = {  # name: (file, levels of all its pixels when it is decoded to as many channels)
    "tiff_12_bits_white": (tiff(12, 1, b"\xff" * 96), [255]),
    "tiff_12_bits_middle": (tiff(12, 1, b"\x80\x08\x00" * 32), [128 * 4096 / 4095 * 255 / 256]),
    "tiff_12_bits_compressed": (tiff(12, 1, b"\xff" * 96, compressed=True), [255]),
    "tiff_16_bits": (tiff(16, 1, words(32896)), [128]),
    "tiff_16_bits_big_endian": (tiff(16, 1, words(32896, order=">"), order=">"), [128]),
    "tiff_16_bits_white_is_zero": (tiff(16, 0, words(0)), [255]),
    "tiff_16_bits_white_is_zero_dark": (tiff(16, 0, words(65535 - 257)), [1]),
    "tiff_16_bits_white_is_zero_compressed": (tiff(16, 0, words(65535 - 257), compressed=True), [1]),
    "tiff_8_bits_white_is_zero": (tiff(8, 0, bytes([254]) * 64), [1]),
    "tiff_16_bits_interleaved": (tiff(16, 2, RGB16, samples=3), [255, 128, 0]),
    "tiff_16_bits_interleaved_compressed": (tiff(16, 2, RGB16, samples=3, compressed=True), [255, 128, 0]),
    "tiff_8_bits_in_planes": (tiff(8, 2, bytes([9] * 64 + [90] * 64 + [255] * 64), samples=3, planar=2), [9, 90, 255]),
    "tiff_8_bits_in_planes_compressed": (
        tiff(8, 2, bytes([9] * 64 + [90] * 64 + [255] * 64), samples=3, planar=2, compressed=True),
        [9, 90, 255],
    ),
    "tiff_premultiplied_alpha": (tiff(8, 1, bytes([51, 51]) * 64, samples=2, extra=1), [255]),
    "png_2_bits_transparent": (png(2, 0, b"\x55\x55", b"\0\1"), [255]),
    "png_2_bits_not_transparent": (png(2, 0, b"\x55\x55", b"\0\2"), [85]),
    "png_4_bits_transparent": (png(4, 0, b"\x33" * 4, b"\0\3"), [255]),
    "png_4_bits_transparent_kept": (png(4, 0, b"\x33" * 4, b"\0\3"), [51, 51, 51, 0]),
    "png_4_bits_not_transparent": (png(4, 0, b"\x33" * 4, b"\0\x33"), [255]),  # only the lower four bits count
    "png_8_bits_transparent": (png(8, 0, bytes(8), b"\0\0"), [255]),
    "png_16_bits_transparent": (png(16, 0, bytes(16), b"\0\0"), [255]),
    "png_16_bits_transparent_to_3": (png(16, 0, bytes(16), b"\0\0"), [255, 255, 255]),
    "png_16_bits_transparent_kept": (png(16, 0, b"\x80\x80" * 8, b"\x80\x80"), [128, 128, 128, 0]),
    "png_16_bits_not_transparent": (png(16, 0, b"\x80\x80" * 8, b"\x80\x81"), [128]),
    "png_16_bits_not_transparent_kept": (png(16, 0, b"\x80\x80" * 8, b"\x80\x81"), [128, 128, 128, 255]),
    "pgm_10_bits": (b"P5 8 8 1023\n" + words(1023, order=">"), [255]),
    "ppm_10_bits": (b"P6 8 8 1023\n" + words(1023, 1023, 1023, order=">"), [255, 255, 255]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_mean_what_the_file_says(name):
    data, expected = LEVELS[name]
    pixels = decode_pixels(name, data, (8, 8), len(expected)).float()
    expected = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand(pixels.shape)
    torch.testing.assert_close(pixels, expected, atol=0.01, rtol=0)


REFUSED = {  # name: (file, what the message mentions)
    "signed_8.tif": (tiff(8, 1, bytes(64), kind=2), ["signed"]),
    "signed_16.tif": (tiff(16, 1, words(1), kind=2), ["signed"]),
    "unsigned_32.tif": (tiff(32, 1, bytes(256)), [32, "bits"]),
    "planes_16.tif": (tiff(16, 2, words(65535, 32768, 0), samples=3, planar=2), [16, "planes"]),
    "planes_16_deflate.tif": (tiff(16, 2, words(9, 9, 9), samples=3, planar=2, compressed=True), [16, "planes"]),
    "ten_bits.tif": (tiff(10, 1, bytes(80)), ["TIFF", "-depth"]),
    "white_is_zero_big_endian.tif": (tiff(16, 0, words(0), order=">"), ["TIFF", "-depth"]),
    "float.tif": (encode(np.zeros((4, 4), np.float32), "TIFF"), ["floating-point"]),
    "colour_16.png": (png(16, 2, bytes(48), bytes(6)), [16, "transparent", "alpha"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_levels_of_unknown_meaning_are_refused(name):
    data, mentioned = REFUSED[name]
    with pytest.raises(BadImageError, match=mentions(name, *mentioned)):
        decode_pixels(name, data, (8, 8), 3)


NARROW = {  # name of the second file: (the file of an image of 16 bits whose first is 0, whether a warning is right)
    "ten_bits.png": (encode(np.full((8, 8), 1023, np.uint16)), True),
    "almost.png": (encode(np.full((8, 8), 4095, np.uint16)), True),
    "sixteenth.png": (encode(np.full((8, 8), 4096, np.uint16)), False),
    "white_is_zero.tif": (tiff(16, 0, words(1023)), False),  # from black in the first file to almost white
    "ten_bits.npy": (encode_npy(np.full((8, 8, 1), 1023, np.uint16)), True),
    "eight_bits.png": (constant("L", 3), True),  # does not count; the 16-bit image is black
}


@pytest.mark.parametrize("name", NARROW)
def test_little_of_the_range_of_16_bits_is_a_warning(tmp_path, caplog, name):
    data, warned = NARROW[name]
    root = write_files(tmp_path / "f", {"a.png": encode(np.zeros((8, 8), np.uint16)), name: data})
    with caplog.at_level(logging.WARNING):
        describe_data(load_table(root), None, None)
    messages = [record.message for record in caplog.records if "16 bits" in record.message]
    assert len(messages) == warned and all(str(root) in message for message in messages)


def test_dark_image_of_8_bits_is_no_warning(tmp_path, caplog):
    describe_data(load_table(write_files(tmp_path / "f", {"a.png": 0, "b.png": 1})), None, None)
    assert not caplog.records


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def test_array_with_channels_first_is_refused_with_its_order(tmp_path):
    root = write_files(tmp_path / "f", {"a.npy": encode_npy(noise_image(0, 3, 16, 16))})
    with pytest.raises(BadImageError, match=mentions("a.npy", (3, 16, 16), "C x H x W", "--num_channels 16")):
        describe_data(load_table(root), None, None)
    with pytest.raises(BadImageError, match=mentions("a.npy", (3, 16, 16), "C x H x W", "--num_channels")):
        decode_pixels("a.npy", encode_npy(noise_image(0, 3, 16, 16)), (8, 8), 3)


def test_array_of_many_channels_needs_num_channels(tmp_path):
    array = noise_image(0, 12, 16, 5)
    root = write_files(tmp_path / "f", {"a.npy": encode_npy(array)})
    with pytest.raises(BadImageError, match=mentions("a.npy", (12, 16, 5), "--num_channels 5")) as raised:
        describe_data(load_table(root), None, None)
    assert "C x H x W" not in str(raised.value)
    assert describe_data(load_table(root), None, 5).num_channels == 5
    assert detect_num_channels(load_table(root), max_channels=5) == 5  # of a VAE with five
    pixels = decode_pixels("a.npy", encode_npy(array), (12, 16), 5)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), array, atol=1e-3)


def test_array_saved_with_its_channels_last_is_read(tmp_path):
    array = noise_image(0, 3, 12, 16)
    data = encode_npy(array.transpose(1, 2, 0))  # what the message proposes; in memory it is a view
    root = write_files(tmp_path / "f", {"a.npy": data})
    assert describe_data(load_table(root), None, None).num_channels == 3
    np.testing.assert_allclose(decode_pixels("a.npy", data, (12, 16), 3), array, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Colour profiles


DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))  # XYZ of R, G, B
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def icc_profile(gamma: float, primaries: tuple | None) -> bytes:
    """A profile of version 2 with this exponent; without primaries, one of greys."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {b"%cXYZ" % c: b"XYZ " + bytes(4) + fixed(*xyz) for c, xyz in zip(b"rgb", primaries, strict=True)}
        tags |= {b"%cTRC" % c: curve for c in b"rgb"}
    start, directory, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        directory += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    space = b"GRAY" if primaries is None else b"RGB "
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ")
    header = (header.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + directory + body


def in_srgb(levels: tuple[int, ...], gamma: float, primaries: tuple) -> np.ndarray:
    """The same colour in sRGB, by the formulas of the standards."""
    linear = np.linalg.solve(np.array(SRGB).T, np.array(primaries).T @ (np.array(levels) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


P3_PROFILE, GREY_PROFILE = icc_profile(2.2, DISPLAY_P3), icc_profile(1.8, None)
COLOUR = (200, 100, 50)
GREY = in_srgb((100,) * 3, 1.8, SRGB)[:1]
PROFILES = {  # name: (file, levels of its pixels)
    "p3.png": (constant("RGB", COLOUR, icc_profile=P3_PROFILE), in_srgb(COLOUR, 2.2, DISPLAY_P3)),
    "p3.jpg": (constant("RGB", COLOUR, "JPEG", quality=100, icc_profile=P3_PROFILE), in_srgb(COLOUR, 2.2, DISPLAY_P3)),
    "p3.tif": (constant("RGB", COLOUR, "TIFF", icc_profile=P3_PROFILE), in_srgb(COLOUR, 2.2, DISPLAY_P3)),
    "p3.webp": (
        constant("RGB", COLOUR, "WEBP", lossless=True, icc_profile=P3_PROFILE),
        in_srgb(COLOUR, 2.2, DISPLAY_P3),
    ),
    "alpha.png": (
        constant("RGBA", (*COLOUR, 51), icc_profile=P3_PROFILE),
        0.2 * in_srgb(COLOUR, 2.2, DISPLAY_P3) + 0.8 * 255,
    ),
    "alpha_kept.png": (
        constant("RGBA", (*COLOUR, 51), icc_profile=P3_PROFILE),
        [*in_srgb(COLOUR, 2.2, DISPLAY_P3), 51],
    ),
    "grey.png": (constant("L", 100, icc_profile=GREY_PROFILE), GREY),
    "grey_alpha.png": (constant("LA", (100, 51), icc_profile=GREY_PROFILE), 0.2 * GREY + 0.8 * 255),
    "none.png": (constant("RGB", COLOUR), COLOUR),
    "other_kind.png": (constant("L", 100, icc_profile=P3_PROFILE), [100]),
    "damaged.png": (constant("RGB", COLOUR, icc_profile=P3_PROFILE[:300]), COLOUR),
    "garbage.png": (constant("RGB", COLOUR, icc_profile=b"garbage"), COLOUR),
}


@pytest.mark.parametrize("name", PROFILES)
def test_colours_are_converted_to_srgb(name):
    data, expected = PROFILES[name]
    pixels = decode_pixels(name, data, (4, 4), len(expected)).permute(1, 2, 0)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=2)


def test_conversion_moves_the_colour_by_more_than_its_tolerance():
    assert np.abs(in_srgb(COLOUR, 2.2, DISPLAY_P3) - COLOUR).min() > 6 and abs(GREY - 100) > 6


def test_profile_that_is_srgb_changes_nothing():
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    array = noise_image(0, 8, 8, 3)
    pixels = decode_pixels("a.png", encode(array, icc_profile=profile), (8, 8), 3)
    assert torch.equal(pixels, torch.from_numpy(array).permute(2, 0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Mutated files

SEEDS = {  # a file of every format that is read, with all that a decoder looks at
    "BMP": encode(noise_image(0, 16, 24, 3), "BMP"),
    "GIF": encode(PIL.Image.fromarray(noise_image(0, 16, 24)).convert("P"), "GIF", transparency=3),
    "JPEG": photo(6, *UNEXPECTED_FIELDS.values()),
    "JPEG_CMYK": encode(PIL.Image.fromarray(noise_image(0, 16, 24, 4), "CMYK"), "JPEG"),
    "JPEG_profile": encode(noise_image(0, 16, 24, 3), "JPEG", progressive=True, icc_profile=P3_PROFILE),
    "PNG": encode(noise_image(0, 16, 24, 4), icc_profile=P3_PROFILE),
    "PNG_16": png(16, 0, bytes(range(16)), b"\0\1"),
    "PGM": b"P5 8 8 1023\n" + words(700, order=">"),
    "TIFF": encode(noise_image(0, 16, 24, 3), "TIFF", tiffinfo={274: 6}, icc_profile=P3_PROFILE),
    "TIFF_12": tiff(12, 1, bytes(range(96))),
    "TIFF_LZW": encode(noise_image(0, 16, 24, 3), "TIFF", compression="tiff_lzw"),
    "TIFF_white_is_zero": tiff(16, 0, words(700), compressed=True),
    "WEBP": encode(noise_image(0, 16, 24, 4), "WEBP", icc_profile=P3_PROFILE),
    "NPY": encode_npy(noise_image(0, 16, 24, 3)),
}


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with some bytes changed (half of the time in its first 200), cut, removed or doubled."""
    data, place = bytearray(data), int(rng.integers(200 if rng.random() < 0.5 else len(data))) % len(data)
    for _ in range(int(rng.integers(1, 6))):
        data[(place + int(rng.integers(24))) % len(data)] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
    match rng.integers(6):
        case 0:
            del data[place:]
        case 1:
            del data[place : place + int(rng.integers(1, 12))]
        case 2:
            data[place:place] = data[place : place + int(rng.integers(1, 40))]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_file_gives_an_image_or_a_bad_image_with_its_name(kind):
    rng = np.random.default_rng(sorted(SEEDS).index(kind))
    read = refused = 0
    for i in range(2000):
        name, data, num_channels = f"mutation-{i}.file", mutated(SEEDS[kind], rng), int(rng.choice([1, 3, 4]))
        try:
            pixels = decode_pixels(name, data, (6, 8), num_channels, (0.3, 0.8), flip=True)
            assert pixels.shape == (num_channels, 6, 8) and 0 <= pixels.min() and pixels.max() <= 255
            read += 1
        except BadImageError as error:
            assert name in str(error) and "\n" not in str(error), repr(error)
            refused += 1
        try:
            assert min(image_size(name, data)) > 0
        except BadImageError as error:
            assert name in str(error)
    assert read and refused > 50, (read, refused)


# ---------------------------------------------------------------------------------------------------------------------
# Large JPEGs


def pink_image(height: int, width: int, seed: int) -> np.ndarray:
    """Noise whose amplitude falls with frequency as that of photos does, shape (H, W, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectra = rng.standard_normal((3, *frequency.shape, 2)) @ [1, 1j] / frequency
    planes = np.fft.irfft2(spectra[:1] + 0.3 * spectra, (height, width))
    planes *= 50 / planes.std(axis=(1, 2), keepdims=True)
    return (128 + planes).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def photo_like(kind: str, height: int, width: int) -> np.ndarray:
    if kind == "pink":
        return pink_image(height, width, 0)
    photo = pytest.importorskip("sklearn.datasets").load_sample_image(kind)
    return photo[:height, :width]


SIZES = {  # height and width of a JPEG: (height and width of the result, size at which it is decoded)
    (400, 640): [((160, 256), 1), ((80, 128), 2), ((40, 64), 4), ((20, 32), 8), ((40, 30), 4)],
    (399, 637): [((80, 128), 1), ((79, 127), 2), ((20, 32), 2)],
    (404, 636): [((20, 32), 4)],
}


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0, "progressive": True}], ids=str)
@pytest.mark.parametrize("kind", ["pink", "china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", SIZES)
def test_large_jpeg_is_within_one_level_of_its_full_decode(size, kind, options, orientation, monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo_like(kind, *size), "JPEG", exif=exif, **options)
    for resolution, divisor in SIZES[size]:
        if orientation == 6:
            resolution, divisor = resolution[::-1], 1 if any(side % 2 for side in size) else divisor
        used = []
        with monkeypatch.context() as patch:
            original = PIL.JpegImagePlugin.JpegImageFile.load_prepare
            patch.setattr(
                "PIL.JpegImagePlugin.JpegImageFile.load_prepare",
                lambda image, used=used, original=original: (used.append(image.size), original(image)),
            )
            pixels = decode_pixels("a.jpg", data, resolution, 3, (0.5, 1.0)).float()
        assert used == [(-(-size[1] // divisor), -(-size[0] // divisor))]
        with monkeypatch.context() as patch:
            patch.setattr("diffit.decode.MIN_OVERSAMPLING", 1e9)
            full = decode_pixels("a.jpg", data, resolution, 3, (0.5, 1.0)).float()
        difference = (pixels - full).abs().mean().item()
        assert difference < 1 and (difference == 0) == (divisor == 1)
