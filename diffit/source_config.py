# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags of image sources, shared by train_diffit.py, prepare_latents.py, train_vae.py and eval_diffit.py.

`diffit.sources` reads the images. The scripts parse their flags before their slow imports, so nothing slow is imported
here.
"""

from dataclasses import dataclass

from diffit.command_line import flag, path_type

SOURCES = ("dataset_name", "train_data_dir", "train_data_file")


@dataclass(frozen=True)
class FolderConfig:
    """Which files in folders of images are read."""

    follow_links: bool = flag(False, "in a folder of images, also follow links that lead out of the folder")
    skip_other_formats: bool = flag(
        False,
        "in a folder or zip of images, leave out images in formats that are not read (.heic, .jp2, camera raw, ...)",
    )


@dataclass(frozen=True)
class SourceConfig(FolderConfig):
    """A source of images: one of `SOURCES`, and the split and columns to read."""

    dataset_name: str | None = flag(
        None, "data set on the hub, or a local path that datasets.load_dataset accepts (default: none)", type=path_type
    )
    train_data_dir: str | None = flag(
        None,
        "folder or zip of images; labels come from subfolders, dataset.json or metadata.jsonl; parquet files are "
        "read as well (default: none)",
        type=path_type,
    )
    train_data_file: str | None = flag(None, "parquet file of images (default: none)", type=path_type)
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name (default: its only one)")
    dataset_split: str = flag("train", "split of --dataset_name")
    image_column: str | None = flag(None, "column that holds the images (default: the only one of type Image)")
    label_column: str | None = flag(
        None, "column that holds the class labels (default: the only one of type ClassLabel)"
    )
    cache_dir: str | None = flag(
        None, "cache folder for datasets.load_dataset (default: that of the datasets library)", type=path_type
    )
