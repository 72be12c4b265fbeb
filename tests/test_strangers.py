"""Untrusted input: refused with its name, never executed, never read or written outside. Secrets are never shown."""

import base64
import http.server
import io
import json
import os
import re
import shutil
import struct
import threading
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import psutil
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from diffit.checkpoint import file_digest
from diffit.config import HubConfig, parse_args
from diffit.decode import decode_pixels
from diffit.errors import BadImageError
from diffit.export import push_to_hub
from diffit.listing import MAX_FILE_BYTES
from diffit.run_dir import PIPELINE_FILES, OutputFolder
from diffit.source_config import SourceConfig
from diffit.sources import ImageTable, load_image_table
from diffit_model import DiffiTUNet2DModel
from helpers import (
    TINY_CONFIG,
    constant,
    decode,
    encode,
    encode_npy,
    item_at,
    levels,
    load_table,
    make_dataset,
    mentions,
    noise_image,
    sample,
    start,
    torchrun,
    train,
    write_files,
)

TOKEN = "hf_aVerySecretTokenOf34Characters0000"


# ---------------------------------------------------------------------------------------------------------------------
# Names that lead outside


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "a/..", "/etc/x.png", "..\\x.png", "a\\x.png", "C:/x.png", "c:x.png"]
)
def test_zip_entry_that_leads_outside_is_refused(name, tmp_path):
    archive = write_files(tmp_path / "z.zip", {"a.png": 0, name: 1})
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {archive}", repr(name))):
        load_table(archive)


def test_zip_entry_with_dots_in_its_name_is_read(tmp_path):
    assert len(load_table(write_files(tmp_path / "z.zip", {"a..b/1...png": 0, "12:30.png": 1}))) == 2


def write_paths(path: Path, names: list[str]) -> Path:
    """A parquet file whose images are paths without bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": None, "path": name} for name in names]}
    table = Dataset.from_dict(rows, features=Features({"image": Image()})).data.table
    pyarrow.parquet.write_table(table, path)  # `Dataset.to_parquet` would read the files
    return path


@pytest.mark.parametrize("flag", ["train_data_file", "train_data_dir", "dataset_name"])
def test_path_in_a_parquet_that_leads_outside_is_refused(flag, tmp_path):
    write_files(tmp_path, {"outside.png": 0})
    (tmp_path / "data").mkdir()
    # Not by an ending of images: `--train_data_dir` would find the link itself.
    (tmp_path / "data/link.dat").symlink_to(tmp_path / "outside.png")
    names = [str(tmp_path / "outside.png"), "../outside.png", "link.dat", "https://127.0.0.1:9/a.png", "file:///etc/a"]
    file = write_paths(tmp_path / "data/train.parquet", names)
    if flag == "train_data_dir":
        (tmp_path / "data/link.dat").unlink()
    source = file if flag == "train_data_file" else file.parent
    table = load_image_table(SourceConfig(**{flag: str(source)}, cache_dir=str(tmp_path / "cache")))
    for row, name in enumerate(names):
        if name == "link.dat" and flag == "train_data_dir":
            continue
        with pytest.raises(BadImageError, match=mentions(f"row {row}", name, f"in {tmp_path / 'data'}")):
            table.read(row)


def test_path_in_a_parquet_below_its_folder_is_read(tmp_path):
    write_files(tmp_path, {"data/images/1.png": 1})
    file = write_paths(tmp_path / "data/a.parquet", ["images/1.png", str(tmp_path / "data/images/1.png")])
    assert [data for _, data in map(load_table(file).read, (0, 1))] == [constant("L", 1)] * 2


def test_zip_of_a_dataset_name_is_read(tmp_path):
    (tmp_path / "hub").mkdir()
    write_files(tmp_path / "hub/train.zip", {"1.png": 1, "2.png": 2})
    table = load_image_table(SourceConfig(dataset_name=str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache")))
    assert sorted(table.read(i)[1] for i in range(2)) == sorted(constant("L", level) for level in (1, 2))


@pytest.mark.parametrize("container", ["folder", "archive.zip"])
@pytest.mark.parametrize("name", ["../outside.png", "{outside}", "gone.png", "a/../a.png"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dataset.json", '{{"labels": [["a.png", 0], ["{name}", 1]]}}'),
        ("metadata.jsonl", '{{"file_name": "{name}", "label": 0}}'),
    ],
)
def test_list_that_names_a_file_outside_or_missing_is_refused(file, text, name, container, tmp_path):
    outside = write_files(tmp_path, {"outside.png": 0}) / "outside.png"
    name = name.format(outside=outside)
    root = write_files(tmp_path / container, {"a.png": 0, file: text.format(name=name)})
    with pytest.raises(ValueError, match=mentions(f"{file} in {root}", repr(name))):
        load_table(root)


# ---------------------------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("name", ["b/link.png", "link", "labels.parquet"])
def test_link_out_of_the_folder_is_refused(name, tmp_path):
    root = write_files(tmp_path / "data", {"a/1.png": 1, "b/2.png": 2})
    target = write_files(tmp_path, {"elsewhere/3.png": 3}) / ("elsewhere" if name == "link" else "elsewhere/3.png")
    (root / name).symlink_to(target)
    with pytest.raises(
        ValueError, match=mentions("--train_data_dir", root / name, target, "--follow_links", "cp -rL")
    ):
        load_table(root)


def test_link_to_nowhere_is_refused(tmp_path):
    root = write_files(tmp_path / "data", {"1.png": 1})
    (root / "link.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=mentions("--train_data_dir", root / "link.png", "gone.png")):
        load_table(root)


def test_link_to_itself_is_named(tmp_path):
    root = write_files(tmp_path / "data", {"1.png": 1})
    (root / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", root / "loop.png")):
        load_table(root)


@pytest.mark.parametrize("flag", ["train_data_dir", "train_data_file", "dataset_name"])
def test_source_that_the_system_refuses_is_named(flag):
    name = "x" * 300  # longer than a name may be; the same happens where a permission is missing
    with pytest.raises(ValueError, match=mentions(f"--{flag}", name)):
        load_image_table(SourceConfig(**{flag: name}))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read, even by root")
@pytest.mark.parametrize("name", ["metadata.jsonl", "dataset.json", "2.png"])
def test_file_that_cannot_be_read_is_named(name, tmp_path):
    root = write_files(tmp_path / "data", {"1.png": 1})
    (root / name).symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=mentions(root, "Errno 5")):
        load_table(root, follow_links=True).read(1)


def test_parquet_in_a_folder_whose_name_is_a_url_for_datasets_says_what_helps(tmp_path):
    file = write_paths(tmp_path / "a::b/1.parquet", ["1.png"])
    with pytest.raises(ValueError, match=mentions(file, "::", "rename")):
        load_table(file)


def test_message_about_many_parquet_files_names_some(tmp_path):
    for number in range(40):
        write_paths(tmp_path / f"f/{number:02d}.parquet", ["1.png"])
    pyarrow.parquet.write_table(pyarrow.table({"image": [1.5]}), tmp_path / "f/20.parquet")  # another type
    with pytest.raises(ValueError, match=mentions(tmp_path / "f/00.parquet", "35 others")) as error:
        load_table(tmp_path / "f", image_column="image")
    assert "06.parquet" not in str(error.value)


def test_name_of_a_bad_image_stays_on_its_line_and_off_the_terminal(tmp_path):
    root = write_files(tmp_path / "f", {"a\nERROR \x1b[31mb \u00e9.png": b"x"})
    name, data = load_table(root).read(0)
    assert name == rf"{root}/a\nERROR \x1b[31mb \u00e9.png".replace(r"\u00e9", "\u00e9")
    with pytest.raises(BadImageError, match=re.escape(name)):
        decode_pixels(name, data, (4, 4), 3)


def names_below(root: Path, table: ImageTable) -> list[str]:
    return [Path(table.read(i)[0]).relative_to(root).as_posix() for i in range(len(table))]


def test_links_that_stay_in_the_folder_are_read_under_their_own_name(tmp_path, caplog):
    root = write_files(tmp_path / "data", {"a/1.png": 1, ".store/3.png": 3})
    (root / "b").mkdir()
    (root / "b/link.png").symlink_to("../a/1.png")
    (root / "c").symlink_to(".store")  # its files are hidden where they are
    (root / "d").symlink_to("a")
    (tmp_path / "root").symlink_to(root)
    table = load_table(tmp_path / "root")
    assert names_below(tmp_path / "root", table) == ["a/1.png", "b/link.png", "c/3.png", "d/1.png"]
    assert table.class_names == ("a", "b", "c", "d")
    assert mentions("left out", "hidden folders: 1 (.store)").search(caplog.text)


def test_links_in_circles_end_and_are_counted(tmp_path, caplog):
    root = write_files(tmp_path / "data", {"a/1.png": 1, "b/2.png": 2})
    (root / "a/circle").symlink_to("..")
    (root / "a/b").symlink_to("../b")
    (root / "b/a").symlink_to("../a")
    assert names_below(root, load_table(root)) == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]
    assert mentions("left out links to a folder that holds them: 4", "a/circle").search(caplog.text)


def test_links_cannot_multiply_a_folder_without_end(tmp_path):
    root = write_files(tmp_path / "data", {f"{name}/x.png": 1 for name in "abcdefgh"})
    for folder in "abcdefgh":
        for target in set("abcdefgh") - {folder}:
            (root / folder / f"to_{target}").symlink_to(f"../{target}")
    with pytest.raises(ValueError, match=mentions(f"--train_data_dir {root}", 16)):
        load_table(root)


def test_links_out_of_the_folder_are_followed_if_asked(tmp_path):
    root = write_files(tmp_path / "farm", {"a/1.png": 1})
    write_files(tmp_path, {"store/2.png": 2, "store/b/3.png": 3})
    (root / "a/two.png").symlink_to(tmp_path / "store/2.png")
    (root / "b").symlink_to(tmp_path / "store/b")
    table = load_table(root, follow_links=True)
    assert names_below(root, table) == ["a/1.png", "a/two.png", "b/3.png"] and table.class_names == ("a", "b")
    assert [table.read(i)[1] for i in range(3)] == [constant("L", level) for level in (1, 2, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Bombs


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def patched(data: bytes, offset: int, fields: str, *values: int) -> bytes:
    """The bytes with numbers written over those at an offset."""
    return data[:offset] + struct.pack(fields, *values) + data[offset + struct.calcsize(fields) :]


def huge_files() -> dict[str, bytes]:
    """A tiny file of each format whose header promises 108 million pixels, 12,000 x 9,000."""
    width, height = 12000, 9000
    files = {kind: constant("RGB", (1, 2, 3), kind) for kind in ("PNG", "GIF", "BMP", "JPEG", "TIFF", "PPM")}
    header = png_chunk(b"IHDR", struct.pack(">II", width, height) + files["PNG"][24:29])
    files["PNG"] = files["PNG"][:8] + header + files["PNG"][33:]
    files["GIF"] = patched(files["GIF"], 6, "<HH", width, height)
    files["BMP"] = patched(files["BMP"], 18, "<ii", width, height)
    files["JPEG"] = patched(files["JPEG"], files["JPEG"].index(b"\xff\xc0") + 5, ">HH", height, width)
    for tag, value in ((256, width), (257, height)):
        entry = files["TIFF"].index(struct.pack("<HHI", tag, 4, 1))
        files["TIFF"] = patched(files["TIFF"], entry + 8, "<I", value)
    files["PPM"] = files["PPM"].replace(b"4 4", b"%d %d" % (width, height))
    lossless = constant("RGB", (1, 2, 3), "WEBP", lossless=True)
    files["WEBP"] = patched(lossless, lossless.index(b"VP8L") + 9, "<I", (width - 1) | (height - 1) << 14)
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)})
    files["NPY"] = array.getvalue() + bytes(48)
    return files


HUGE = huge_files()


@pytest.mark.parametrize("kind", HUGE)
def test_image_of_100_megapixels_is_refused_before_decoding(kind):
    with pytest.raises(BadImageError, match=mentions("12000 x 9000", "67,108,864", "-resize", "some.file")):
        decode(HUGE[kind], (8, 8))


def test_photo_of_50_megapixels_is_read():
    pixels = decode(encode(PIL.Image.new("L", (8192, 6144), 7)), (2, 2), 1)
    np.testing.assert_allclose(levels(pixels), 7, atol=1e-3)


def test_huge_image_can_be_skipped(tmp_path):
    root = write_files(tmp_path / "f", {"a.png": 0, "b.png": HUGE["PNG"]})
    dataset = make_dataset(root, on_bad_image="skip", num_channels=1)
    messages = [message for position in (0, 1) for message in item_at(dataset, position)["bad_images"]]
    assert len(messages) == 1 and "b.png" in messages[0]


@pytest.mark.parametrize(
    ("kind", "start", "before"),
    [
        (b"zTXt", b"k\0\0", b"IDAT"),
        (b"zTXt", b"k\0\0", b"IEND"),
        (b"iTXt", b"k\0\1\0\0\0", b"IDAT"),
        (b"iTXt", b"k\0\1\0\0\0", b"IEND"),
        (b"iCCP", b"k\0\0", b"IDAT"),
    ],
)
def test_compressed_bomb_in_a_png_is_refused(kind, start, before):
    png = encode(noise_image(0, 8, 8, 3))
    bomb = png_chunk(kind, start + zlib.compress(bytes(50_000_000), 9))
    place = png.index(before) - 4
    tracemalloc.start()
    with pytest.raises(BadImageError, match=mentions("image some.file")):
        decode(png[:place] + bomb + png[place:], (8, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def array_file(shape: tuple[int, ...]) -> bytes:
    """16 bytes of pixels behind a header that promises another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize("shape", [(8000, 8000), (4, 4, 10**15), (4, 5), (3, 5)])
def test_array_whose_header_lies_is_refused(shape):
    with pytest.raises(BadImageError, match=mentions(shape, "some.file")):
        decode(array_file(shape), (4, 4), 1)


@pytest.mark.parametrize("shape", [(10**9, 0), (-1, 4), (16,)])
def test_array_without_height_and_width_is_refused(shape):
    with pytest.raises(BadImageError, match=mentions("H x W x C", "some.file")):
        decode(array_file(shape), (4, 4), 1)


def test_array_in_fortran_order_is_read():
    array = noise_image(0, 4, 6, 5)
    pixels = levels(decode(encode_npy(np.asfortranarray(array)), (4, 6), 5))
    np.testing.assert_allclose(pixels, array, atol=1e-4)


def test_zip_entry_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffit.listing.MAX_FILE_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_001))
        archive.writestr("fine.png", bytes(100_000))
    table = load_table(tmp_path / "z.zip")
    with pytest.raises(BadImageError, match=mentions("bomb.png", "z.zip", "100,001", "100,000")):
        table.read(0)
    assert len(table.read(1)[1]) == 100_000


def test_zip_entry_that_holds_more_than_it_states_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(100_000_000))
    data = (tmp_path / "z.zip").read_bytes()
    (tmp_path / "z.zip").write_bytes(data.replace(struct.pack("<I", 100_000_000), struct.pack("<I", 1000)))
    table = load_table(tmp_path / "z.zip")
    tracemalloc.start()
    with pytest.raises(BadImageError, match=mentions("bomb.png", "z.zip")):
        table.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_zip_entry_that_cannot_be_unpacked_bit_by_bit_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", constant("L", 0))
    with pytest.raises(BadImageError, match=mentions("a.png", "z.zip", 12)):
        load_table(tmp_path / "z.zip").read(0)


def test_file_that_is_too_large_is_refused(tmp_path):
    root = write_files(tmp_path / "f", {"a.png": 0})
    os.truncate(root / "a.png", MAX_FILE_BYTES + 1)  # a hole: it takes no space
    with pytest.raises(BadImageError, match=mentions("a.png", "536,870,913")):
        load_table(root).read(0)


def test_postscript_is_never_opened():
    """Pillow would start Ghostscript for it."""
    with pytest.raises(BadImageError, match=mentions("PNG", "some.file")):
        decode(encode(PIL.Image.new("RGB", (4, 4)), "EPS"), (4, 4))


@pytest.mark.parametrize("label", [10**12, 10**30])
def test_label_that_implies_countless_classes_is_refused(label, tmp_path):
    root = write_files(tmp_path / "f", {"a.png": 0, "dataset.json": json.dumps({"labels": [["a.png", label]]})})
    with pytest.raises(ValueError, match=mentions(root, 99999, label)):
        load_table(root)


def test_deeply_nested_json_is_refused(tmp_path):
    root = write_files(tmp_path / "f", {"a.png": 0, "dataset.json": "[" * 100_000})
    with pytest.raises(ValueError, match=mentions(f"dataset.json in {root}", "JSON")):
        load_table(root)


# ---------------------------------------------------------------------------------------------------------------------
# Code in files


class Payload:
    """Unpickled with trust, it would create a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that exists after the test if code of a stranger has run."""
    marker = tmp_path / "executed"
    yield marker
    assert not marker.exists()


def test_payload_runs_if_it_is_trusted(tmp_path):
    torch.save(Payload(tmp_path / "executed"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_pickled_array_is_refused(marker):
    array = np.array([[Payload(marker)]], dtype=object)
    with pytest.raises(BadImageError, match=mentions("some.file")):
        decode(encode_npy(array), (4, 4))


@pytest.fixture(scope="module")
def trained(base_args, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained")
    train([*base_args, f"--output_dir={run_dir}", "--max_train_steps=1"])
    return run_dir


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def renew_manifest(checkpoint: Path) -> None:
    """A manifest that is right for whatever lies in the folder now."""
    names = json.loads((checkpoint / "manifest.json").read_text())
    digests = {name: file_digest(checkpoint / name) for name in names}
    (checkpoint / "manifest.json").write_text(json.dumps(digests))


def refused_resume(checkpoint: Path, train_args: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        train([*train_args, f"--resume_from_checkpoint={checkpoint}"])
    return str(error.value)


def test_pickled_code_in_a_checkpoint_is_refused(checkpoint, train_args, marker):
    torch.save({"state": Payload(marker)}, checkpoint / "optimizer.pt")
    renew_manifest(checkpoint)
    message = refused_resume(checkpoint, train_args)
    assert mentions(checkpoint / "optimizer.pt").search(message)
    assert "weights_only" not in message  # PyTorch's message says how to run it


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training_args.yaml", "seed: !!python/object/apply:os.system ['touch {marker}']"),
        ("training_args.yaml", "!!python/object/apply:os.system ['touch {marker}']"),
        ("training_args.yaml", "[1, 2]"),
        ("state.json", "[1, 2]"),
        ("state.json", "{{"),
        ("optimizer.pt", "nothing that PyTorch wrote"),
    ],
)
def test_checkpoint_file_that_is_not_data_is_refused(name, text, checkpoint, train_args, marker):
    (checkpoint / name).write_text(text.format(marker=marker))
    renew_manifest(checkpoint)
    assert str(checkpoint / name) in refused_resume(checkpoint, train_args)


@pytest.mark.parametrize("manifest", ['{{"../outside": {digest}}}', '{{"{outside}": {digest}}}', "[]"])
def test_manifest_that_leads_outside_is_refused(manifest, checkpoint, train_args, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("x")
    digest = json.dumps(file_digest(outside))
    (checkpoint / "manifest.json").write_text(manifest.format(outside=outside, digest=digest))
    message = refused_resume(checkpoint, train_args)
    assert mentions(f"--resume_from_checkpoint {checkpoint}", "manifest.json").search(message)


@pytest.mark.parametrize("line", ["seed: {tag}", "model_kwargs: {{dropout: {tag}}}"])
def test_code_in_a_config_file_is_not_run(line, train_args, tmp_path, capsys, marker):
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    (tmp_path / "a.yaml").write_text(line.format(tag=tag))
    with pytest.raises((SystemExit, ValueError)) as error:
        train([*train_args, "--config", str(tmp_path / "a.yaml")])
    assert line.split(":")[0] in capsys.readouterr().err + str(error.value)


def test_code_in_model_kwargs_is_refused(train_args, marker):
    with pytest.raises(ValueError, match=mentions("--model_kwargs", "!!python/object/apply:os.system")):
        train([*train_args, "--model_kwargs", f"dropout=!!python/object/apply:os.system ['touch {marker}']"])


@pytest.fixture
def pipeline_folder(tmp_path) -> Path:
    DDPMPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("with_code", [True, False])
def test_pickled_weights_are_refused(with_code, pipeline_folder, train_args, tmp_path, marker):
    weights = load_file(pipeline_folder / "unet/diffusion_pytorch_model.safetensors")
    (pipeline_folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    contents = Payload(marker) if with_code else weights
    torch.save(contents, pipeline_folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=mentions(f"--model_path {pipeline_folder}", "safetensors")):
        sample(pipeline_folder, tmp_path / "samples", "--seeds=0", "--num_inference_steps=1")
    arguments = [flag for flag in train_args if not flag.startswith(("--model_config", "--class_conditional"))]
    with pytest.raises(
        ValueError, match=mentions(f"--pretrained_model_name_or_path {pipeline_folder}", "safetensors")
    ):
        train([*arguments, f"--pretrained_model_name_or_path={pipeline_folder}"])


def test_code_next_to_weights_is_not_run(pipeline_folder, train_args, tmp_path, marker):
    """Neither the class that `model_index.json` names nor that of `auto_map`."""
    code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    for folder, file in ((pipeline_folder, "model_index.json"), (pipeline_folder / "unet", "config.json")):
        (folder / "evil.py").write_text(code)
        config = json.loads((folder / file).read_text())
        config |= {"_class_name": ["evil", "Evil"]} if file == "model_index.json" else {}
        config |= {"auto_map": {"AutoModel": "evil.Evil"}, "custom_pipeline": "evil"}
        (folder / file).write_text(json.dumps(config))
    config = json.loads((pipeline_folder / "unet/config.json").read_text())
    del config["custom_pipeline"]  # no argument of the network: training would refuse it
    (pipeline_folder / "unet/config.json").write_text(json.dumps(config))
    sample(pipeline_folder, tmp_path / "samples", "--seeds=0", "--num_inference_steps=1")
    assert (tmp_path / "samples/grid.png").exists()
    arguments = [flag for flag in train_args if not flag.startswith(("--model_config", "--class_conditional"))]
    train([*arguments, f"--pretrained_model_name_or_path={pipeline_folder}", "--max_train_steps=1"])


# ---------------------------------------------------------------------------------------------------------------------
# Secrets


@pytest.mark.parametrize(
    "arguments",
    [["--hub_tokn", TOKEN], [f"--hub_tokn={TOKEN}"], ["--config={file}"], ["--hub_token", f"{TOKEN}\n"]],
    ids=["misspelt", "misspelt_with_equals", "config", "line_break"],
)
def test_token_is_not_in_messages_of_the_parser(arguments, train_args, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f'learning_rate: 1\nhub_token: "{TOKEN}\n')
    with pytest.raises(SystemExit):
        train([*train_args, *(argument.format(file=tmp_path / "a.yaml") for argument in arguments)])
    output = "".join(capsys.readouterr())
    assert "error:" in output and TOKEN not in output


def test_token_of_a_config_file_is_used_and_not_shown_by_a_dry_run(train_args, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"hub_token: {TOKEN}\n")
    arguments = [*train_args, "--config", str(tmp_path / "a.yaml"), "--dry_run"]
    assert parse_args(arguments).hub.hub_token == TOKEN
    train(arguments)
    output = "".join(capsys.readouterr())
    assert "learning_rate" in output and TOKEN not in output and "hub_token" not in output


# ---------------------------------------------------------------------------------------------------------------------
# The hub


class HubStub(http.server.ThreadingHTTPServer):
    """What the real client of the hub asks of it in an upload, on loopback.

    Attributes:
        requests: (method and path, headers, body) of each.
        exists_as: `"public"` or `"private"` if the repository is there already.
        fails: answer commits with an error.
        may_go_on: until it is set, commits wait.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.requests, self.exists_as, self.fails, self.may_go_on = [], None, False, threading.Event()
        self.may_go_on.set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[bytes]:
        """Bodies of the requests to a path."""
        return [body for line, _, body in list(self.requests) if line.endswith(path)]

    def uploaded(self) -> dict[str, bytes]:
        """The contents of the files in all commits, by file name."""
        lines = [json.loads(line) for body in self.asked("/commit/main") for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


class HubRequest(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((f"{self.command} {path}", dict(self.headers), body))
        status, reply = 200, {}
        if path == "/api/repos/create":
            status, reply = 409 if hub.exists_as else 200, {"url": f"{hub.url}/me/digits"}
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            reply = {"files": modes}
        elif path.endswith("/commit/main"):
            hub.may_go_on.wait(60)
            status = 403 if hub.fails else 200
            reply = {"commitUrl": f"{hub.url}/me/digits/commit/1", "commitOid": "1" * 40, "success": True}
        elif path.startswith("/api/models/"):
            private = (hub.exists_as or "private") == "private"
            reply = {"id": "me/digits", "private": private, "sha": "1" * 40, "siblings": []}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *arguments) -> None:
        """Nothing: the test reads `requests`."""


PUSH = ["--push_to_hub", "--hub_model_id=me/digits", "--hub_private_repo", f"--hub_token={TOKEN}"]


@pytest.fixture(scope="module")
def hub():
    with HubStub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def start_upload(hub: HubStub, launcher: list[str], arguments: list[str]):
    return start([*launcher, "train_diffit.py", *arguments, *PUSH], HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")


@pytest.fixture(scope="module")
def pushed(hub, base_args, tmp_path_factory) -> tuple[Path, str]:
    """A run that uploads, with its --output_dir and all that it printed."""
    run_dir = tmp_path_factory.mktemp("pushed")
    write_files(run_dir, {"notes.md": "not for the hub", "photos/README.md": "neither", "photos/unet/me.png": 0})
    arguments = [*base_args, f"--output_dir={run_dir}", "--validation_fraction=0.25", "--max_train_steps=2"]
    process = start_upload(hub, [], arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return run_dir, output


def test_only_the_pipeline_folder_is_uploaded(hub, pushed):
    run_dir, _ = pushed
    uploaded = hub.uploaded()
    assert set(uploaded) == {
        *PIPELINE_FILES,
        *(f"unet/{name}" for name in ("config.json", "diffit_model.py", "diffusion_pytorch_model.safetensors")),
        "scheduler/scheduler_config.json",
    }
    assert all(data == (run_dir / name).read_bytes() for name, data in uploaded.items())


def test_card_of_a_run_that_validates_is_titled_by_the_model(pushed):
    card = (pushed[0] / "README.md").read_text()
    assert "| held-out loss |" in card
    assert re.findall(r"^# .*", card, re.MULTILINE) == ["# me/digits"]
    assert re.findall(r"from_pretrained\(\"(.*?)\"", card) == ["me/digits"]


def test_private_repository_is_requested(hub, pushed):
    assert [json.loads(body)["visibility"] for body in hub.asked("/api/repos/create")][0] == "private"


def test_token_is_in_no_file_no_output_and_no_upload(hub, pushed):
    run_dir, output = pushed
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files} | {path.name.split(".")[0] for path in files}
    assert {"events", ".yaml", ".json", ".pt", ".safetensors", "README"} <= kinds
    assert all(TOKEN.encode() not in path.read_bytes() for path in files)
    assert "Traceback" not in output and TOKEN not in output
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers, _ in hub.requests)
    assert all(TOKEN.encode() not in body for _, _, body in hub.requests)


@pytest.mark.parametrize(("exists_as", "allowed"), [("public", False), ("private", True)])
def test_public_repository_is_not_taken_for_a_private_one(exists_as, allowed, hub, pushed, base_args, monkeypatch):
    """The hub leaves a repository that exists as it is, whatever the client asks for."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "exists_as", exists_as)
    monkeypatch.setattr(hub, "requests", [])
    asked = parse_args([*base_args, f"--output_dir={pushed[0]}", *PUSH]).hub
    run_dir = OutputFolder(pushed[0], "train_diffit.py")
    if allowed:
        push_to_hub(asked, run_dir)
    else:
        with pytest.raises(RuntimeError, match=mentions("--hub_private_repo", "me/digits", "public")):
            push_to_hub(asked, run_dir)
    assert bool(hub.asked("/commit/main")) == allowed


def test_card_of_an_upload_names_the_repository_of_the_user(hub, base_args, tmp_path, monkeypatch):
    """Without --hub_model_id the hub puts the user's name before that of the folder."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "requests", [])
    flags = [*base_args, f"--output_dir={tmp_path / 'digits'}", "--max_train_steps=1"]
    train(flags)
    card = (tmp_path / "digits" / "README.md").read_text()
    assert "\n# digits\n" in card and 'from_pretrained("digits"' in card
    run_dir = OutputFolder(tmp_path / "digits", "train_diffit.py")
    push_to_hub(HubConfig(push_to_hub=True, hub_token=TOKEN), run_dir)
    card = hub.uploaded()["README.md"].decode()
    assert "\n# me/digits\n" in card and 'from_pretrained("me/digits"' in card


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_upload_that_is_slow_and_fails_holds_up_no_other_process(hub, base_args, tmp_path):
    """The commit waits until the other process has ended; then it is refused."""
    hub.fails, num_commits = True, len(hub.asked("/commit/main"))
    hub.may_go_on.clear()
    process = start_upload(hub, torchrun(), [*base_args, f"--output_dir={tmp_path / 'run'}"])
    deadline = time.monotonic() + 60
    while len(hub.asked("/commit/main")) == num_commits and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while process.poll() is None:
        workers = [child for child in psutil.Process(process.pid).children() if is_alive(child)]
        if len(workers) == 1:
            break
        assert time.monotonic() < deadline, "the other process waits for the upload"
        time.sleep(0.02)
    hub.may_go_on.set()
    output, _ = process.communicate(timeout=60)
    hub.fails = False
    assert len(workers) == 1
    assert process.returncode == 1 and TOKEN not in output
    assert mentions(tmp_path / "run", "me/digits").search(output)
    assert f"hf upload --private me/digits {tmp_path / 'run'} ." in output
