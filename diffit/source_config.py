# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags that say where images come from: the same in train_diffit.py, prepare_latents.py and train_vae.py.

`diffit.sources` reads what they name. The scripts parse their flags before their slow imports, so nothing slow is
imported here.
"""

from dataclasses import dataclass

from diffit.command_line import flag, path_type

SOURCES = ("dataset_name", "train_data_dir", "train_data_file")


@dataclass(frozen=True)
class SourceConfig:
    """A source of images, for which one of `SOURCES` is set, and what to read there."""

    dataset_name: str | None = flag(
        None, "hub name, or local path for datasets.load_dataset (default: none)", type=path_type
    )
    train_data_dir: str | None = flag(
        None,
        "folder or zip of images; dataset.json, metadata.jsonl and parquet files are read, too (default: none)",
        type=path_type,
    )
    train_data_file: str | None = flag(None, "parquet file of images (default: none)", type=path_type)
    follow_links: bool = flag(False, "in --train_data_dir, also follow links that lead out of the folder")
    skip_other_formats: bool = flag(
        False, "in --train_data_dir, leave out images in formats that are not read (.heic, .jp2, camera raw, ...)"
    )
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name (default: its only one)")
    dataset_split: str = flag("train", "split of --dataset_name")
    image_column: str | None = flag(None, "column of the images (default: the only one of type Image)")
    label_column: str | None = flag(None, "column of the labels (default: the only one of type ClassLabel)")
    cache_dir: str | None = flag(
        None, "cache folder of datasets.load_dataset (default: the datasets library's)", type=path_type
    )
