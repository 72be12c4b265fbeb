# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""From noise to images: class-conditional and unconditional sampling with any diffusers scheduler.

Used by the previews of training, by sampling and by evaluation, and copied into saved class-conditional folders, so
that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` gives a `DiffiTPipeline` anywhere. This file
stands alone: torch and diffusers.

Shapes: B images, C channels, H/W height/width.
"""

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    KDPM2DiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "deis": DEISMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "dpmsolver++_singlestep": DPMSolverSinglestepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "kdpm2": KDPM2DiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


def viewable(pixels: np.ndarray) -> PIL.Image.Image:
    """A picture of uint8 of shape (H, W, C): of all channels if they are 1, 3 or 4, else of the first 1 or 3."""
    channels = pixels.shape[-1]
    shown = channels if channels in (1, 3, 4) else (3 if channels > 4 else 1)
    return PIL.Image.fromarray(pixels[..., 0] if shown == 1 else np.ascontiguousarray(pixels[..., :shown]))


def image_grid(images: list[PIL.Image.Image], columns: int | None = None, rows: int | None = None) -> PIL.Image.Image:
    """Puts images of one size side by side, row by row, for looking at.

    Small images are enlarged by a whole factor, to 32 pixels at least, and each has a thin border.

    Args:
        images: of one size and mode; those that find no place are left out.
        columns: default: as many as make the grid almost square.
        rows: default: as many as the images need.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = rows or math.ceil(len(images) / columns)
    factor = math.ceil(32 / min(images[0].size))
    tiles = [
        PIL.ImageOps.expand(
            image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST), 1, "gray"
        )
        for image in images[: columns * rows]
    ]
    blank = PIL.Image.new(tiles[0].mode, tiles[0].size, "gray")
    return make_image_grid(tiles + [blank] * (columns * rows - len(tiles)), rows, columns)


def null_label(unet: torch.nn.Module) -> int | None:
    """Index of the null class for classifier-free guidance, or None for an unconditional network.

    `DiffiTUNet2DModel` has a row more than classes for it. `UNet2DModel` has none by itself: here it is trained with
    one row more, whose index is the last.
    """
    num_class_embeds = unet.config.num_class_embeds
    if num_class_embeds is None:
        return None
    return num_class_embeds - 1 if type(unet).__name__ == "UNet2DModel" else num_class_embeds


class DiffiTPipeline(DiffusionPipeline):
    """Samples images from a `DiffiTUNet2DModel`, or any network with the interface of `UNet2DModel`.

    Args:
        unet: predicts noise, image or velocity.
        scheduler: any diffusers scheduler.
        id2label: name of each class, by its number as a string; None if the classes have no names.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    @classmethod
    def from_folder(
        cls, model_path: str, model_class: Callable[[dict], type], scheduler: str = "ddim", dtype=torch.float32
    ):
        """Loads any pipeline folder that training wrote, conditional or not, without running code that lies in it.

        Args:
            model_path: local folder or hub name with `model_index.json`, `unet/` and `scheduler/`.
            model_class: gives the class of the network for the contents of its `config.json`.
            scheduler: one of `SCHEDULERS`; it keeps the noise schedule and prediction type of the training.
            dtype: of the weights.
        """
        id2label = cls.load_config(model_path).get("id2label")
        unet_class = model_class(UNet2DModel.load_config(model_path, subfolder="unet"))
        unet = unet_class.from_pretrained(model_path, subfolder="unet", torch_dtype=dtype, use_safetensors=True)
        return cls(unet, SCHEDULERS[scheduler].from_pretrained(model_path, subfolder="scheduler"), id2label)

    def label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Numbers of classes that are given by number or by name.

        A string that is the name of a class means that class; otherwise it must be a number.

        Raises:
            ValueError: names the label that does not exist.
        """
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, list | tuple):
            class_labels = [class_labels]
        num_classes = null_label(self.unet)
        if num_classes is None:
            raise ValueError(f"class labels {class_labels} were given, but the model is unconditional")
        numbers = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        ids = []
        for label in class_labels:
            number = numbers.get(label, int(label) if str(label).isdecimal() else None)
            if number is None or not 0 <= number < num_classes:
                known = ", ".join(numbers) if numbers else f"0 to {num_classes - 1}"
                raise ValueError(f"no class {label!r}; classes: {known}")
            ids.append(number)
        return ids

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            class_labels: classes by number or name, one for all images or one for each; None: no class (the null
                class of a conditional network).
            batch_size: number of images B; default: one for each class label, or 1.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance, `uncond + scale * (cond - uncond)`; 1 is off and takes one
                forward pass a step instead of one of the double batch.
            eta: of DDIM, 0 (deterministic) to 1 (as much noise as DDPM); other schedulers ignore it.
            generator: one for all images or one for each. Noise is drawn in float32 on the generator's device; with
                one CPU generator for each image, the noise of an image depends on its generator alone.
            height: in pixels; default: the network's `sample_size`.
            width: in pixels; default: the network's `sample_size`.
            output_type: `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), the latter two in [0, 1].
            return_dict: return an `ImagePipelineOutput` rather than a tuple.

        Raises:
            ValueError: for a class that does not exist, guidance without classes, or numbers that do not fit.
        """
        unet, device = self.unet, self._execution_device
        labels = None
        if class_labels is not None:
            labels = self.label_ids(class_labels)
            batch_size = batch_size or len(labels)
            labels = labels * batch_size if len(labels) == 1 else labels
            if len(labels) != batch_size:
                raise ValueError(f"{len(labels)} class labels were given for {batch_size} images")
            labels = torch.tensor(labels, device=device)  # (B)
        elif guidance_scale != 1:
            raise ValueError(f"guidance_scale {guidance_scale} needs class_labels")
        batch_size = batch_size or 1
        if output_type == "pil" and unet.config.in_channels not in (1, 3, 4):
            raise ValueError(f"no picture has {unet.config.in_channels} channels: give output_type='np' or 'pt'")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators were given for {batch_size} images")
        if labels is None and null_label(unet) is not None:
            labels = torch.full((batch_size,), null_label(unet), device=device)  # (B)

        # 1. noise
        size = unet.config.sample_size
        if size is None and (height is None or width is None):
            raise ValueError("the network has no `sample_size`: give height and width")
        default_height, default_width = (size, size) if isinstance(size, int) or size is None else size
        shape = (batch_size, unet.config.in_channels, height or default_height, width or default_width)
        sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)  # (B, C, H, W)

        # 2. scheduler
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = sample * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"eta": eta} if "eta" in accepted else {}
        if "use_clipped_model_output" in accepted:
            # Where DDIM clips the image, the noise must follow it, or guidance drives the sample out of range.
            step_kwargs["use_clipped_model_output"] = True
        if "generator" in accepted:
            step_kwargs["generator"] = generator

        # 3. denoising
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(sample, timestep).to(unet.dtype)
            prediction = self._predict(model_input, timestep, labels, guidance_scale).float()  # (B, C, H, W)
            sample = self.scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample

        # 4. images
        images = (sample / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        if guidance_scale == 1:
            return self.unet(sample, timestep, class_labels=labels).sample
        labels = torch.cat([labels, torch.full_like(labels, null_label(self.unet))])  # (2B)
        prediction = self.unet(sample.repeat(2, 1, 1, 1), timestep, class_labels=labels).sample  # (2B, C, H, W)
        conditional, unconditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """As in diffusers, and makes the folder load as this class anywhere: its file, and its name in the index."""
        super().save_config(save_directory, **kwargs)
        index_file = Path(save_directory, self.config_name)
        index = json.loads(index_file.read_text())
        index["_class_name"] = ["diffit_pipeline", "DiffiTPipeline"]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        target = Path(save_directory, "diffit_pipeline.py")
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)
