# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Frechet distance (FID, FD-DINOv2), KID, precision, recall and Inception score of images or of a model; and plots.

    python eval_diffit.py --images outputs/samples --reference data/images --feature_extractor inception
    accelerate launch eval_diffit.py --model_path outputs/emoji32 --reference data/noto_emoji_32.parquet \\
        --feature_extractor efficientnet_lite0 --num_images 1000 --output metrics.json --plots outputs/plots

Images that are drawn, features and reference statistics are kept in `--work_dir`: a stopped run goes on, and the same
reference is not measured twice.
"""

from diffit.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the slow imports: the launcher may die meanwhile

import argparse
import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, UNet2DModel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from diffit.command_line import Parser, path_type, positive_int, resolution_type, run_script
from diffit.cpu_kernels import kernelize
from diffit.decode import image_size
from diffit.errors import UserError, load_model, user_errors
from diffit.features import (
    EXTRACTORS,
    FeatureExtractor,
    TableImages,
    extract_features,
    fill_array,
    load_extractor,
    settings_folder,
    weights_digest,
)
from diffit.formulations import FORMULATIONS, Formulation, NoisyBatch, denoising_losses, formulation_name
from diffit.metrics import (
    FEWEST_IMAGES,
    INCEPTION_SPLITS,
    METRICS,
    NEAREST,
    FeatureSet,
    compare,
    compare_classes,
    nearest,
    shuffled_parts,
)
from diffit.networks import choose_attention_backend, model_class, set_attention_backend
from diffit.processes import join_processes, on_all_processes, run_on_main_and_broadcast
from diffit.run_dir import OutputFolder
from diffit.sampling import check_sampling_flags
from diffit.sources import ImageTable, detect_num_channels, listed_samples, load_image_table
from diffit.stream import PositionStream
from diffit_pipeline import (
    EDM_SCHEDULERS,
    GUIDANCE_SCHEDULES,
    SCHEDULERS,
    DiffiTPipeline,
    choose_scheduler,
    null_label,
    to_displayable,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_NUM_IMAGES = 50_000
GUIDANCE_ARGUMENTS = (
    "guidance_scale",
    "guidance_schedule",
    "guidance_power",
    "guidance_interval",
    "guidance_channels",
)
# Of the plots.
PLOTS = (
    *("metrics_by_kimg.png", "metrics_by_steps.png", "neighbours.png", "neighbour_distances.png"),
    "loss_by_timestep.png",
)
SHOWN_NEIGHBOURS = 8
LOSS_LEVELS = 20
LOSS_IMAGES = 256
SET_SIZES = ("images", "reference")  # keys of `counts`
METRIC_SETTINGS = {
    "frechet_distance": {"covariance": "unbiased", "dtype": "float64"},
    "kernel_distance": {"kernel": "(x . y / F + 1)^3", "estimator": "unbiased, all pairs", "dtype": "float64"},
    "inception_score": {"splits": INCEPTION_SPLITS, "dtype": "float64"},
    "precision": {"neighbours": NEAREST, "dtype": "float64"},
    "recall": {"neighbours": NEAREST, "dtype": "float64"},
}
AXIS_LABELS = {
    "frechet_distance": "Frechet distance (lower is better)",
    "kernel_distance": "kernel distance (lower is better)",
    "inception_score": "Inception score (higher is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what is judged (one of the two)").add_argument
    add(
        "--images",
        type=path_type,
        help="folder or zip of images, parquet, data set of the hub, or npz of the ADM evaluators",
    )
    add(
        "--model_path",
        action="append",
        type=path_type,
        help="folder that training wrote, one of its checkpoint-N, or hub name; may be given several times",
    )

    add = parser.add_argument_group("against what").add_argument
    add(
        "--reference",
        required=True,
        type=path_type,
        help="real images: folder, zip, parquet, data set of the hub or npz; or npz of statistics with mu and sigma",
    )
    add("--dataset_split", default="train", help="of data sets of the hub")
    add("--image_column", help="of parquet and data sets; default: the only one of images")
    add(
        "--resolution",
        type=resolution_type,
        help="side in pixels, or HxW, to which images are cropped and resized as in training; default: that of the "
        "judged images, which must all have it",
    )

    add = parser.add_argument_group("how").add_argument
    add("--metrics", nargs="+", choices=METRICS, default=["frechet_distance", "kernel_distance"])
    add(
        "--feature_extractor",
        default="inception",
        help=f"{', '.join(EXTRACTORS)}, or module:function, which takes uint8 images (B, 3, H, W) to features (B, F)",
    )
    add("--feature_model", type=path_type, help="folder or hub name of the network for dinov2 and clip")
    add("--inception_path", type=path_type, help="TorchScript file of the Inception network; default: download")
    add("--num_subsets", type=positive_int, default=5, help="disjoint parts of the images that give the spread")
    add("--num_images", type=positive_int, help=f"default: all of --images, {DEFAULT_NUM_IMAGES} of a model")
    add("--batch_size", type=positive_int, default=64, help="images at once in each process")
    add("--dataloader_num_workers", type=int, default=0, help="processes that decode images, for each process")

    add = parser.add_argument_group("sampling from --model_path").add_argument
    add("--all_checkpoints", action="store_true", help="also every checkpoint-N in the folders of --model_path")
    add("--weights", help="folder in a checkpoint; default: its (first) average, such as unet_ema")
    add("--scheduler", choices=sorted(SCHEDULERS | EDM_SCHEDULERS), help="default: ddim, for EDM models edm_heun")
    add("--num_inference_steps", type=positive_int, default=50)
    add("--eta", type=float, default=0.0, help="of DDIM: 0 deterministic, 1 as much noise as DDPM")
    add(
        "--class_labels",
        default="all",
        help="numbers or names, separated by commas, or `all`, that take turns; `reference`: as often as in the "
        "reference. Of class-conditional models",
    )
    add("--guidance_scale", type=float, default=1.0, help="1 = off")
    add("--guidance_schedule", choices=GUIDANCE_SCHEDULES, default="constant")
    add("--guidance_power", type=float, default=4.0, help="of --guidance_schedule power_cosine")
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="timesteps that are guided, as fractions of the training timesteps, 1 being noise",
    )
    add("--guidance_channels", type=positive_int, help="guide only the first so many; default: all")
    add("--vae", type=path_type, help="folder of the AutoencoderKL, or hub name, for a latent model without vae/")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="of the sampled network")

    add = parser.add_argument_group("where to").add_argument
    add("--output", type=path_type, help="JSON file for the results")
    add("--work_dir", type=path_type, default="outputs/evaluation", help="what is kept: samples, features, statistics")
    add("--plots", type=path_type, help="folder for pictures; more than a --model_path gives the metrics by kimg")
    add("--plot_steps", type=positive_int, nargs="+", help="also the metrics by sampling steps, at these numbers")
    add(
        "--plot_schedulers",
        nargs="+",
        choices=sorted(SCHEDULERS | EDM_SCHEDULERS),
        help="default: ddim dpmsolver++ unipc, for EDM models all of theirs",
    )
    add(
        "--training_images",
        type=path_type,
        help="where --plots looks for neighbours of the samples; default: --reference",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked before anything is loaded."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.images is None) == (args.model_path is None):
        parser.error("give one of --images and --model_path")
    if "inception_score" in args.metrics and args.feature_extractor != "inception":
        parser.error(f"--metrics inception_score needs --feature_extractor inception, got {args.feature_extractor}")
    for flag, extractors in (("feature_model", ("dinov2", "clip")), ("inception_path", ("inception",))):
        if getattr(args, flag) is not None and args.feature_extractor not in extractors:
            parser.error(
                f"--{flag} is of --feature_extractor {' and '.join(extractors)}, got {args.feature_extractor}"
            )
    if args.num_subsets < 2:
        parser.error(f"--num_subsets must be 2 at least, for there to be a spread, got {args.num_subsets}")
    if args.plot_steps and (args.plots is None or args.model_path is None):
        parser.error("--plot_steps needs --plots and --model_path")
    if args.training_images is not None and args.plots is None:
        parser.error("--training_images needs --plots")
    if args.dataloader_num_workers < 0:
        parser.error(f"--dataloader_num_workers must be 0 or more, got {args.dataloader_num_workers}")
    check_sampling_flags(parser, args, can_guide=args.model_path is not None)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class ImageSource:
    """Images that exist, in a table or in an array.

    Attributes:
        name: what the user named.
        table: not decoded; or None.
        array: uint8, shape (N, C, H, W); or None.
        statistics: mean and covariance of features that an npz holds, and what it says of its extractor; or None.
        digest: of the images.
    """

    name: str
    table: ImageTable | None = None
    array: np.ndarray | None = None
    statistics: dict | None = None
    digest: str = ""


@dataclass(frozen=True)
class ImageSet:
    """Images as features are taken of them.

    Attributes:
        images: gives uint8 of shape (C, H, W) by index.
        settings: what they depend on.
    """

    images: Dataset
    settings: dict = field(default_factory=dict)


class ArrayImages(Dataset):
    """Images of an array of shape (N, C, H, W), uint8, as a data set."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[index]))


def open_source(flag: str, name: str, args: argparse.Namespace) -> ImageSource:
    """Finds images, or statistics.

    Raises:
        ValueError: names the flag and what is wrong with what it names.
    """
    path = Path(name)
    if path.suffix == ".npz":
        return open_npz(flag, path)
    columns = {"image_column": args.image_column}
    try:
        if path.suffix == ".parquet":
            table = load_image_table(train_data_file=name, **columns)
        elif path.is_file() or (path.is_dir() and args.image_column is None):
            table = load_image_table(train_data_dir=name)
        else:
            table = load_image_table(dataset_name=name, dataset_split=args.dataset_split, **columns)
    except (UserError, OSError) as error:
        raise UserError(f"{flag} {name}: {error}") from error
    if listed := listed_samples(path):
        files = [Path(image["path"]).name for image in table.rows["image"]]
        table = table.select([index for index, file in enumerate(files) if file in listed])
        if len(table) < len(listed):
            raise UserError(f"{flag} {name}: {len(listed) - len(table)} images of its samples.json are missing")
    return ImageSource(name, table=table, digest=table.digest(len(table)))


def open_npz(flag: str, path: Path) -> ImageSource:
    """Images (`arr_0`, as the ADM evaluators have them) or statistics (`mu` and `sigma`, as EDM writes them)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" in file and "sigma" in file:
                extractor = json.loads(str(file["extractor"])) if "extractor" in file else None
                return ImageSource(
                    str(path), statistics={"mu": file["mu"], "sigma": file["sigma"], "extractor": extractor}
                )
            if "arr_0" not in file:
                raise UserError(
                    f"{flag} {path}: it has neither images (arr_0) nor statistics (mu, sigma) but {file.files}"
                )
            pixels = file["arr_0"]
    except UserError:
        raise
    except Exception as error:  # of numpy, of zip, of JSON; numpy's own message may advise to trust the file
        raise UserError(f"{flag} {path}: damaged, or no npz file of plain arrays ({type(error).__name__})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.size == 0:
        raise UserError(f"{flag} {path}: arr_0 must be uint8 of shape (N, H, W, C), got {pixels.dtype} {pixels.shape}")
    digest = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]
    return ImageSource(str(path), array=pixels.transpose(0, 3, 1, 2), digest=digest)


def natural_shape(flag: str, source: ImageSource, resolution: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of images, which must all have one size unless there is a `resolution`."""
    if source.array is not None:
        return source.array.shape[1:]
    table = source.table
    if resolution is not None:
        return detect_num_channels(table), *resolution
    first = image_size(*table.read(0))
    for index in range(1, len(table)):
        name, data = table.read(index)
        if image_size(name, data) != first:
            raise UserError(
                f"{flag} {source.name}: images of different sizes ({first[0]} x {first[1]} and, in {name}, "
                f"{' x '.join(map(str, image_size(name, data)))}): --resolution must say to which one they are brought"
            )
    return detect_num_channels(table), *first


def image_set(flag: str, source: ImageSource, shape: tuple[int, int, int], num_images: int | None = None) -> ImageSet:
    """The images of a source at a shape (C, H, W); `num_images` of them, drawn at random but always the same.

    Raises:
        ValueError: names the flag if an array has another size, which only files are brought to.
    """
    settings = {"digest": source.digest, "shape": list(shape)}
    if source.array is not None:
        if source.array.shape[2:] != shape[1:]:
            raise UserError(
                f"{flag} {source.name}: its images are {source.array.shape[2]} x {source.array.shape[3]} pixels, "
                f"not {shape[1]} x {shape[2]}: arrays are not resized, give the files"
            )
        images = ArrayImages(source.array)
    else:
        images = TableImages(source.table, shape[1:], shape[0])
    if num_images is not None and num_images < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images = Subset(images, order[:num_images].tolist())
        settings |= {"num_images": num_images}
    return ImageSet(images, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Samples of a model


def expand_checkpoints(args: argparse.Namespace) -> list[str]:
    """The models to judge, with --all_checkpoints those of the checkpoints first, by step."""
    paths = []
    for model_path in args.model_path:
        if args.all_checkpoints:
            found = [path for path in Path(model_path).glob("checkpoint-*") if path.name[11:].isdecimal()]
            if not found:
                raise UserError(f"--all_checkpoints: no checkpoint-N in --model_path {model_path}")
            paths += [str(path) for path in sorted(found, key=lambda path: int(path.name[11:]))]
        if not args.all_checkpoints or Path(model_path, "model_index.json").is_file():
            paths.append(model_path)
    return list(dict.fromkeys(paths))


def is_edm(pipeline: DiffiTPipeline) -> bool:
    """Whether a model has EDM's continuous noise levels in place of timesteps."""
    return isinstance(pipeline.scheduler, tuple(EDM_SCHEDULERS.values()))


def load_pipeline(args: argparse.Namespace, model_path: str, scheduler: str | None) -> DiffiTPipeline:
    """The pipeline of a folder, of a hub name, or of a checkpoint's --weights.

    Raises:
        ValueError: names the flag whose folder is not there.
    """
    vae = None
    if args.vae is not None:
        what = f"--vae {args.vae}: cannot load an AutoencoderKL"
        vae = load_model(what, AutoencoderKL.from_pretrained, args.vae, use_safetensors=True)
    what = f"--model_path {model_path}: cannot load a pipeline"
    if scheduler is not None:
        with user_errors("--scheduler", ValueError), user_errors(what, OSError, TypeError, AttributeError, KeyError):
            choose_scheduler(model_path, scheduler)
    if Path(model_path, "state.json").is_file():
        return load_model(what, load_checkpoint_pipeline, args, model_path, scheduler, vae)
    if args.weights is not None:
        raise UserError(f"--weights is of checkpoints, --model_path {model_path} is a pipeline")
    return load_model(what, DiffiTPipeline.from_folder, model_path, model_class, scheduler, DTYPES[args.dtype], vae)


def load_checkpoint_pipeline(
    args: argparse.Namespace, model_path: str, scheduler: str | None, vae: AutoencoderKL | None
) -> DiffiTPipeline:
    """The pipeline of a checkpoint's --weights, with classes and VAE of the run that it lies in."""
    found = [path.name for part in ("unet", "transformer") for path in sorted(Path(model_path).glob(f"{part}_ema*"))]
    weights = args.weights or next(iter(found), "unet" if Path(model_path, "unet").is_dir() else "transformer")
    network_class = model_class(UNet2DModel.load_config(model_path, subfolder=weights))
    network = network_class.from_pretrained(
        model_path, subfolder=weights, torch_dtype=DTYPES[args.dtype], use_safetensors=True
    )
    run = Path(model_path).parent  # with the trained pipeline, which names the classes and holds the VAE
    if vae is None and (run / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(run, subfolder="vae", use_safetensors=True)
    pipeline = DiffiTPipeline.from_folder(model_path, model_class, scheduler, vae=vae, network=network)
    index = run / "model_index.json"
    id2label = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    pipeline.register_to_config(id2label=id2label)
    return pipeline


def checkpoint_kimg(model_path: str) -> float | None:
    """Thousands of images that a checkpoint has seen in training; None if it is no checkpoint."""
    file = Path(model_path, "state.json")
    with user_errors(f"--model_path {model_path}: {file.name} is damaged", ValueError, TypeError, KeyError):
        return json.loads(file.read_text())["position"] / 1000 if file.is_file() else None


def list_classes(args: argparse.Namespace, pipeline: DiffiTPipeline, table: ImageTable | None) -> list[int] | None:
    """The class of each image, by its seed from 0 on; None for an unconditional model.

    Raises:
        ValueError: if classes do not exist, or the reference has none.
    """
    num_images = args.num_images or DEFAULT_NUM_IMAGES
    if null_label(pipeline.network) is None:
        if args.class_labels != build_parser().get_default("class_labels"):
            raise UserError(f"--class_labels {args.class_labels}: the model is unconditional")
        return None
    if args.class_labels == "reference":
        if table is None or table.class_names is None:
            raise UserError("--class_labels reference: the reference has no labels")
        stream = PositionStream(len(table), seed=0)
        numbers = [table.label(stream.index(i)) for i in range(num_images)]
        labels = [table.class_names[number] if pipeline.config.id2label else number for number in numbers]
        with user_errors("--class_labels reference", ValueError):
            return pipeline.label_ids(labels)
    if args.class_labels == "all":
        labels = list(range(null_label(pipeline.network)))
    else:
        with user_errors(f"--class_labels {args.class_labels}", ValueError):
            labels = pipeline.label_ids([label.strip() for label in args.class_labels.split(",")])
    return [labels[i % len(labels)] for i in range(num_images)]


def draw_samples(
    args: argparse.Namespace,
    state: PartialState,
    pipeline: DiffiTPipeline,
    num_inference_steps: int,
    table: ImageTable | None,
) -> ImageSet:
    """Images of the seeds 0, 1, 2, ..., drawn by all processes together, or those that are there already."""
    batch_size, num_images = args.batch_size, args.num_images or DEFAULT_NUM_IMAGES
    most = pipeline.scheduler.config.num_train_timesteps
    if not is_edm(pipeline) and num_inference_steps > most:
        raise UserError(f"--num_inference_steps {num_inference_steps} are more than the {most} timesteps of the model")
    with user_errors("--guidance_channels", ValueError):
        pipeline.check_guidance(args.guidance_channels, None)
    classes = list_classes(args, pipeline, table)
    guidance = {name: getattr(args, name) for name in GUIDANCE_ARGUMENTS}
    settings = guidance | {
        "weights_sha256": weights_digest(pipeline.network),
        "vae_sha256": None if pipeline.vae is None else weights_digest(pipeline.vae),
        "scheduler": json.loads(pipeline.scheduler.to_json_string()),
        "heun": pipeline.heun,
        "num_inference_steps": num_inference_steps,
        "eta": args.eta,
        "dtype": args.dtype,
        "num_images": num_images,
        "classes_sha256": hashlib.sha256(str(classes).encode()).hexdigest(),
    }

    def compute(ranges: list[range]) -> Iterator[np.ndarray]:
        for seeds in tqdm(ranges, desc="sampling", disable=not state.is_main_process or not ranges):
            padded = [*seeds] + [seeds[-1]] * (batch_size - len(seeds))  # an image depends on the size of its batch
            images = pipeline(
                class_labels=None if classes is None else [classes[seed] for seed in padded],
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                eta=args.eta,
                generator=[torch.Generator().manual_seed(seed) for seed in padded],
                output_type="np",
                **guidance,
            ).images
            yield (images[: len(seeds)] * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)  # (B, C, H, W)

    folder = settings_folder(args.work_dir, "samples", settings)
    return ImageSet(ArrayImages(fill_array(state, folder, settings, num_images, batch_size, compute)), settings)


def set_up(state: PartialState, pipeline: DiffiTPipeline) -> DiffiTPipeline:
    """Moves a pipeline to the device, chooses its attention backend and puts CPU kernels in place."""
    pipeline.to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.vae is not None:
        pipeline.vae.enable_slicing()  # decoding a whole batch at once takes more memory than denoising it
    backend, _ = choose_attention_backend(pipeline.network, state.device, pipeline.network.dtype)
    set_attention_backend(pipeline.network, backend)
    kernelize(pipeline.network)
    return pipeline


# ---------------------------------------------------------------------------------------------------------------------
# Features and figures


@dataclass(frozen=True)
class Measured:
    """Features of one set of images, as arrays that are mapped from files.

    Attributes:
        name: what the user called the images or the model.
        images: of which the features are.
        features: float32, shape (N, F).
        probabilities: of the Inception network's classes, shape (N, 1008), if the Inception score is wanted.
        kimg: thousands of images that the model has seen, if it is a checkpoint.
        scheduler: that drew the images; None if they were given.
        evaluations: of the network, that each image took.
    """

    name: str
    images: ImageSet
    features: np.ndarray
    probabilities: np.ndarray | None = None
    kimg: float | None = None
    scheduler: str | None = None
    evaluations: int | None = None


def measure(
    args: argparse.Namespace, state: PartialState, extractors: list[FeatureExtractor], images: ImageSet, **description
) -> Measured:
    """Takes features, and probabilities if there is an extractor for them. To be called by all processes."""
    arrays = [
        extract_features(
            state,
            args.work_dir,
            images.images,
            images.settings,
            extractor,
            args.batch_size,
            args.dataloader_num_workers,
        )
        for extractor in extractors
    ]
    return Measured(images=images, features=arrays[0], probabilities=arrays[1] if arrays[1:] else None, **description)


def feature_set(features: np.ndarray, device: torch.device) -> FeatureSet:
    """Features for the metrics, which are in float64: Apple's devices do not have it."""
    return FeatureSet(torch.from_numpy(np.array(features)).to("cpu" if device.type == "mps" else device))


def reference_statistics(source: ImageSource, extractor: FeatureExtractor, num_features: int) -> FeatureSet:
    """The mean and covariance of a file.

    Raises:
        ValueError: if they are of another feature extractor.
    """
    mu, sigma, of = (source.statistics[key] for key in ("mu", "sigma", "extractor"))
    ours = {"name": extractor.name} | extractor.settings
    if mu.shape != (num_features,) or sigma.shape != (num_features, num_features) or of not in (None, ours):
        made = f"{len(mu)} features" if of is None else of
        raise UserError(
            f"--reference {source.name} was made with another feature extractor ({made}) than this one "
            f"({num_features} features, {ours})"
        )
    return FeatureSet(mean=torch.from_numpy(mu), covariance=torch.from_numpy(sigma))


def save_statistics(file: Path, features: FeatureSet, extractor: FeatureExtractor) -> None:
    """Writes mean and covariance as EDM does (`mu`, `sigma`), and what they are of; nothing is pickled."""
    of = json.dumps({"name": extractor.name} | extractor.settings)
    np.savez(file, mu=features.mean.cpu().numpy(), sigma=features.covariance.cpu().numpy(), extractor=np.array(of))


def measure_model(
    args: argparse.Namespace,
    state: PartialState,
    extractors: list[FeatureExtractor],
    reference: ImageSource,
    model_path: str,
    scheduler: str | None,
    num_inference_steps: int,
) -> Measured:
    """Draws samples and takes their features. To be called by all processes."""
    pipeline = set_up(state, on_all_processes(state, load_pipeline, args, model_path, scheduler))
    images = draw_samples(args, state, pipeline, num_inference_steps, reference.table)
    pipeline.scheduler.set_timesteps(num_inference_steps)
    evaluations = len(pipeline.scheduler.timesteps)  # `heun` takes two at each step but the last
    scheduler = scheduler or ("edm_heun" if is_edm(pipeline) else "ddim")
    return measure(
        args,
        state,
        extractors,
        images,
        name=model_path,
        kimg=checkpoint_kimg(model_path),
        scheduler=scheduler,
        evaluations=2 * evaluations - 1 if scheduler == "edm_heun" else evaluations,
    )


def judge(
    args: argparse.Namespace, measured: Measured, reference: FeatureSet, reference_probabilities: np.ndarray | None
) -> dict[str, dict]:
    """The metrics of --metrics for one set of images; see `diffit.metrics.compare`."""
    device = reference.mean.device
    names = [name for name in args.metrics if name != "inception_score"]
    result = compare(names, feature_set(measured.features, device), reference, args.num_subsets) if names else {}
    if measured.probabilities is not None:
        probabilities = torch.from_numpy(np.array(measured.probabilities))
        if reference_probabilities is not None:
            order = shuffled_parts(len(reference_probabilities), 1)[0][: len(probabilities)]
            reference_probabilities = torch.from_numpy(np.array(reference_probabilities))[order]
        result["inception_score"] = compare_classes(probabilities, reference_probabilities)
    return {name: result[name] | {"settings": METRIC_SETTINGS[name]} for name in args.metrics}


def describe(args: argparse.Namespace, extractor: FeatureExtractor, shape: tuple[int, int, int]) -> dict:
    """What the figures depend on beside the images."""
    packages = ("diffusers", "transformers", "numpy", "pillow")
    arguments = {key: value for key, value in vars(args).items() if key != "debug"}
    return {
        "feature_extractor": extractor.name,
        **extractor.settings,
        "channels_height_width": list(shape),
        "reference": args.reference,
        "arguments": arguments,
        # torch's own spelling names the build, too, such as +cu130; that of its package may not.
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in packages},
    }


def table_text(name: str, result: dict[str, dict]) -> str:
    """A table for the screen."""
    lines = [name, f"  {'metric':<18} {'value':>12} {'spread':>12} {'floor':>12} {'images':>8} {'reference':>10}"]
    for metric, row in result.items():
        floor = "" if row["floor"] is None else f"{row['floor']:.6g}"
        counts = row["counts"]
        lines.append(
            f"  {metric:<18} {row['value']:>12.6g} {row['spread']:>12.3g} {floor:>12} {counts['images']:>8} "
            f"{counts['reference'] or '':>10}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def new_figure(rows: int = 1, columns: int = 1, panel_size: tuple[float, float] = (5.5, 4)):
    """A matplotlib figure and its axes, an array of shape (rows, columns); sizes in inches."""
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no screen

    figure = Figure(figsize=(panel_size[0] * columns, panel_size[1] * rows), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_metrics(file: Path, lines: dict[str, list[tuple[float, dict[str, dict]]]], x_label: str) -> None:
    """Each metric against something, with its spread and its floor.

    Args:
        file: PNG.
        lines: for each name in the legend, x and the metrics there.
        x_label: what x is, with its unit.
    """
    from matplotlib.ticker import LogFormatter

    metrics = list(next(iter(lines.values()))[0][1])
    columns = min(len(metrics), 2)
    figure, panels = new_figure(math.ceil(len(metrics) / columns), columns)
    for axes in panels.flat[len(metrics) :]:
        axes.set_axis_off()
    for metric, axes in zip(metrics, panels.flat, strict=False):
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            values, spreads = ([result[metric][key] for _, result in points] for key in ("value", "spread"))
            axes.errorbar([x for x, _ in points], values, yerr=spreads, marker="o", capsize=3, label=name)
        floor = points[0][1][metric]["floor"]
        if floor is not None:
            axes.axhline(floor, color="gray", linestyle="--", label="real images")
        axes.set(xlabel=x_label, ylabel=AXIS_LABELS[metric])
        if metric == "frechet_distance":
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.yaxis.set_major_formatter(LogFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("bars: standard deviation over disjoint subsets of the images", fontsize=9)
    figure.savefig(file)


def nearest_in_pixels(images: torch.Tensor, others: Dataset, batch_size: int, count: int) -> torch.Tensor:
    """Indices of the other images that are nearest in mean squared difference of the pixels.

    Args:
        images: uint8, shape (N, C, H, W).
        others: gives uint8 of shape (C, H, W).
        batch_size: of those that are read at once.
        count: how many for each image.

    Returns:
        Shape (N, count), nearest first.
    """
    flat = images.flatten(1).float()
    parts = [torch.cdist(flat, batch.flatten(1).float()) for batch in DataLoader(others, batch_size)]
    return torch.cat(parts, dim=1).topk(count, largest=False).indices


def plot_neighbours(
    folder: Path, args: argparse.Namespace, samples: Measured, training: Measured, reference: Measured | None
) -> None:
    """Is the training set memorised? Nearest training images of the samples, and how near they are.

    `neighbours.png` shows the samples that are nearest to a training image, with the nearest in features and in
    pixels. `neighbour_distances.png` has the distances of all samples, and those of real images that were not trained
    on or, if there are none, of the training images from each other.

    Args:
        folder: for the PNGs.
        args: of the command line.
        samples: of the model.
        training: images that it was trained on.
        reference: real images that it was not trained on; None if the training images are the reference.
    """
    ours, theirs = (torch.from_numpy(np.array(part.features)).double() for part in (samples, training))
    distances, indices = nearest(ours, theirs, 3)
    if reference is None:
        real = nearest(theirs, theirs, 2)[0][:, 1]  # each image is its own nearest
        real_label = "training images from each other"
    else:
        real = nearest(torch.from_numpy(np.array(reference.features)).double(), theirs, 1)[0][:, 0]
        real_label = "real images of the reference"
    limit = real.quantile(0.05)  # not less: data with duplicates have many distances of 0
    share = (distances[:, 0] < limit).double().mean()

    figure, ((axes,),) = new_figure()
    bins = np.linspace(0, max(real.max(), distances[:, 0].max()).item(), 41)
    for values, label in ((distances[:, 0], "samples"), (real, real_label)):
        axes.hist(values.numpy(), bins, density=True, alpha=0.6, label=label)
    axes.axvline(limit.item(), color="gray", linestyle="--", label="nearest 5 % of the real images")
    axes.set(xlabel=f"distance to the nearest training image ({args.feature_extractor} features)", ylabel="density")
    axes.set_title(f"{100 * share:.1f} % of the samples are nearer than 95 % of the real images", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(folder / "neighbour_distances.png")

    shown = distances[:, 0].argsort()[:SHOWN_NEIGHBOURS]
    images = torch.stack([samples.images.images[i] for i in shown.tolist()])
    in_pixels = nearest_in_pixels(images, training.images.images, args.batch_size, 3)
    figure, panels = new_figure(len(shown), 7, panel_size=(1.1, 1.2))
    titles = ["sample", *[f"feature\nneighbour {i}" for i in (1, 2, 3)], *[f"pixel\nneighbour {i}" for i in (1, 2, 3)]]
    for row, sample in enumerate(shown.tolist()):
        neighbours = indices[sample].tolist() + in_pixels[row].tolist()
        pictures = [images[row], *[training.images.images[i] for i in neighbours]]
        for axes, picture in zip(panels[row], pictures, strict=True):
            axes.imshow(to_displayable(picture.permute(1, 2, 0).numpy()), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        panels[row][0].set_ylabel(f"image {sample}", fontsize=8)
        panels[row][1].set_xlabel(f"distance {distances[sample, 0]:.3g}", fontsize=8)
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.savefig(folder / "neighbours.png")


@torch.no_grad()
def loss_by_level(
    args: argparse.Namespace, pipeline: DiffiTPipeline, source: ImageSource, images: ImageSet
) -> tuple[list[float], list[float]]:
    """Loss of a model of pixels at levels of noise: timesteps from 0 to the last, or EDM's sigma from least to most.

    Args:
        args: of the command line.
        pipeline: on the device.
        source: of the images; says their classes.
        images: all of that source; the first `LOSS_IMAGES` are taken, with the same noise at each level.

    Returns:
        Levels and losses: the mean squared error of what the network predicts, for EDM with its weight.
    """
    network, device = pipeline.network, pipeline.device
    formulation = formulation_of(pipeline)
    levels = formulation.level_grid(LOSS_LEVELS)
    num_images = min(LOSS_IMAGES, len(images.images))
    null = null_label(network)
    labels = None if null is None else torch.full((num_images,), null)
    if labels is not None and source.table is not None and source.table.class_names is not None:
        labels = torch.tensor([source.table.label(index) for index in range(num_images)])
    clean = torch.stack([images.images[i] for i in range(num_images)]) / 127.5 - 1  # (N, C, H, W)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for level in levels:
        parts = []
        for start in range(0, num_images, args.batch_size):
            part = slice(start, start + args.batch_size)
            x, e = clean[part].to(device), noise[part].to(device)
            of_images = torch.full((len(x),), level, device=device)
            noisy, timestep = formulation.network_inputs(x, e, of_images)
            conditions = {"class_labels": None if labels is None else labels[part].to(device)}
            batch = NoisyBatch((noisy.to(network.dtype), timestep), x, e, of_images, conditions)
            parts.append(denoising_losses(network, formulation, batch))
        losses.append(torch.cat(parts).mean().item())
    return levels, losses


def formulation_of(pipeline: DiffiTPipeline) -> Formulation:
    """The formulation that a pipeline was trained in."""
    config = pipeline.scheduler.config | {"_class_name": type(pipeline.scheduler).__name__}
    return FORMULATIONS[formulation_name(config)].from_scheduler_config(config)


def plot_losses(
    folder: Path,
    args: argparse.Namespace,
    state: PartialState,
    model_paths: list[str],
    source: ImageSource,
    images: ImageSet,
) -> None:
    """Loss by timestep or sigma, a line for each model of the first one's formulation; see `loss_by_level`."""
    figure, ((axes,),) = new_figure()
    first = None
    for model_path in model_paths:
        pipeline = set_up(state, load_pipeline(args, model_path, None))
        first = first or pipeline
        if pipeline.transformer is not None or is_edm(pipeline) != is_edm(first):
            print(f"no loss by timestep of {model_path}: it is of latents, or the first has another formulation")
            continue
        levels, losses = loss_by_level(args, pipeline, source, images)
        axes.plot(levels, losses, marker="o", markersize=3, label=Path(model_path).name)
    if not axes.lines:
        return
    axes.set(**formulation_of(first).axes())
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(folder / "loss_by_timestep.png")


# ---------------------------------------------------------------------------------------------------------------------
# Main


def open_sources(args: argparse.Namespace, state: PartialState) -> tuple[ImageSource, ImageSource | None]:
    """The reference and the training images, if they are others.

    Raises:
        ValueError: if the reference does not suffice for what is asked.
    """
    reference = on_all_processes(state, open_source, "--reference", args.reference, args)
    training = None
    if args.training_images is not None:
        training = on_all_processes(state, open_source, "--training_images", args.training_images, args)
    if reference.statistics is not None and (args.metrics != ["frechet_distance"] or (args.plots and not training)):
        raise UserError(
            f"--reference {args.reference} holds statistics, not images: they give no metric but --metrics "
            "frechet_distance, and --plots needs --training_images beside them"
        )
    return reference, training


def measure_all(
    args: argparse.Namespace, state: PartialState, extractors: list[FeatureExtractor], reference: ImageSource
) -> tuple[list[Measured], list[Measured]]:
    """Features of what is judged, and of the samples for --plot_steps. To be called by all processes."""
    if args.images is not None:
        given = on_all_processes(state, open_source, "--images", args.images, args)
        shape = on_all_processes(state, natural_shape, "--images", given, args.resolution)
        images = image_set("--images", given, shape, args.num_images)
        return [measure(args, state, extractors, images, name=args.images)], []
    paths = expand_checkpoints(args)
    common = (args, state, extractors, reference)
    judged = [measure_model(*common, path, args.scheduler, args.num_inference_steps) for path in paths]
    shapes = {tuple(measured.images.images[0].shape) for measured in judged}
    if len(shapes) > 1:
        raise UserError(f"the models of --model_path draw images of different shapes (C, H, W): {sorted(shapes)}")
    default = ("ddim", "dpmsolver++", "unipc") if judged[-1].scheduler in SCHEDULERS else tuple(EDM_SCHEDULERS)
    by_steps = [
        measure_model(*common, paths[-1], scheduler, steps)
        for scheduler in args.plot_schedulers or default
        for steps in args.plot_steps or ()
    ]
    return judged, by_steps


def write_results(
    args: argparse.Namespace,
    judged: list[Measured],
    results: list[dict],
    by_steps: list[tuple[Measured, dict]],
    settings: dict,
) -> None:
    """Prints the tables, and writes --output: the metrics of the only model, or a list `models`; and `by_steps`."""
    for measured, result in zip(judged, results, strict=True):
        print(table_text(measured.name, result))
    counts = [number for row in results[0].values() for key, number in row["counts"].items() if key in SET_SIZES]
    fewest = min(number for number in counts if number is not None)
    if fewest < FEWEST_IMAGES:
        print(
            f"Warning: {fewest} images are few. Below {FEWEST_IMAGES}, compare figures only with those of the same "
            "numbers of images: the Frechet distance falls, and recall rises, with more."
        )
    if args.output is not None:
        rows = [
            {"name": measured.name, "kimg": measured.kimg} | result
            for measured, result in zip(judged, results, strict=True)
        ]
        written = rows[0] if len(rows) == 1 else {"models": rows}
        if by_steps:
            written = written | {
                "by_steps": [
                    {"name": measured.name, "scheduler": measured.scheduler, "evaluations": measured.evaluations}
                    | result
                    for measured, result in by_steps
                ]
            }
        text = json.dumps(written | {"settings": settings}, indent=1) + "\n"
        folder, name = output_folder(args)
        if not folder.write(name, lambda file: file.write_text(text)):
            raise UserError(f"--output {args.output} was changed by someone else meanwhile, and is left as it is")


def output_folder(args: argparse.Namespace) -> tuple[OutputFolder, str]:
    """The folder of --output, with the mark of what in it is ours, and the name of the file."""
    file = Path(args.output)
    folder = OutputFolder(file.parent, "eval_diffit.py", "--output")
    if not folder.files and file.is_file():  # results of a version that left no marks
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if {"feature_extractor", "arguments", "versions"} <= set(json.loads(file.read_text())["settings"]):
                folder.files = {file.name: None}
    return folder, file.name


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses to overwrite what is not ours, before anything slow.

    Raises:
        UserError: if the file of --output is not one of results, or --plots has files of our names.
    """
    if args.output is not None:
        folder, name = output_folder(args)
        folder.check_free([name])
        with user_errors(f"--output {args.output}", OSError):
            folder.folder.mkdir(parents=True, exist_ok=True)
    if args.plots is not None:
        folder = OutputFolder(args.plots, "eval_diffit.py", "--plots")
        folder.check_free(PLOTS)
        folder.create()
    OutputFolder(args.work_dir, "eval_diffit.py", "--work_dir").create()


def main(args: argparse.Namespace) -> None:
    """All processes draw and take features together; then the main process alone computes, prints and writes."""
    state = join_processes()
    run_on_main_and_broadcast(state, check_outputs, args)
    source, training_source = open_sources(args, state)
    which = (args.feature_extractor, state.device, args.feature_model, args.inception_path)
    extractors = [on_all_processes(state, load_extractor, *which)]
    if "inception_score" in args.metrics:
        extractors.append(load_extractor(*which, probabilities=True))

    # 1. features, by all processes
    judged, by_steps = measure_all(args, state, extractors, source)
    channels, *size = judged[0].images.images[0].shape
    shape = (channels, *(args.resolution or size))
    reference = training = None
    if source.statistics is None:
        images = image_set("--reference", source, shape)
        reference = training = measure(args, state, extractors, images, name=args.reference)
    if training_source is not None:
        images = image_set("--training_images", training_source, shape)
        training = measure(args, state, extractors[:1], images, name=args.training_images)
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return

    # 2. figures
    if reference is None:
        features = reference_statistics(source, extractors[0], judged[0].features.shape[1])
    else:
        features = feature_set(reference.features, state.device)
        file = Path(reference.features.filename).with_name("statistics.npz")
        save_statistics(file, features, extractors[0])
        print(f"statistics of the reference, which --reference takes too: {file}")
    probabilities = None if reference is None else reference.probabilities
    results = [judge(args, measured, features, probabilities) for measured in judged]
    by_steps = [(measured, judge(args, measured, features, probabilities)) for measured in by_steps]
    write_results(args, judged, results, by_steps, describe(args, extractors[0], shape))

    # 3. pictures
    if args.plots is None:
        return
    folder = Path(args.plots)
    plots = OutputFolder(folder, "eval_diffit.py", "--plots")
    plots.announce(PLOTS)
    by_kimg = {}  # a line for each run
    for row, result in zip(judged, results, strict=True):
        if row.kimg is not None:
            by_kimg.setdefault(Path(row.name).parent.name, []).append((row.kimg, result))
    if any(len(points) > 1 for points in by_kimg.values()):
        plot_metrics(folder / "metrics_by_kimg.png", by_kimg, "thousands of images seen in training")
    lines = {}
    for measured, result in by_steps:
        lines.setdefault(measured.scheduler, []).append((measured.evaluations, result))
    if lines:
        plot_metrics(folder / "metrics_by_steps.png", lines, "evaluations of the network for each image")
    plot_neighbours(folder, args, judged[-1], training, reference if training_source else None)
    if args.model_path is not None:
        names = [measured.name for measured in judged]
        plot_losses(folder, args, state, names, training_source or source, training.images)
    plots.record(PLOTS)


if __name__ == "__main__":
    run_script(main, parse_args())
