"""The peer in two benchmarks: the training step of diffusers' `train_unconditional.py`, with its defaults.

After `examples/unconditional_image_generation/train_unconditional.py` of diffusers 0.36 (Apache-2.0), without its
arguments, previews, checkpoints and hub: linear betas, epsilon prediction, AdamW with its settings, a cosine schedule
after 500 steps of warm-up, and an EMA with its own warm-up.
"""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from tqdm.auto import tqdm


def train_unconditional(
    model: UNet2DModel,
    loader: Iterable[torch.Tensor],
    *,
    num_steps: int,
    learning_rate: float = 1e-4,
    lr_warmup_steps: int = 500,
    use_ema: bool = False,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, torch.nn.Module, EMAModel | None], None] | None = None,
) -> EMAModel | None:
    """Trains a network in place.

    Args:
        model: unconditional network, called with images and timesteps.
        loader: batches of images in [-1, 1], shape (B, C, H, W); repeated as often as necessary.
        num_steps: length of the training in optimizer steps.
        learning_rate: peak learning rate.
        lr_warmup_steps: length of the warm-up in optimizer steps.
        use_ema: whether to keep an average; off by default, as in diffusers' script.
        accelerator: holds the trackers to log to; None means a new one without trackers.
        on_step: called after each step with its number (from 1), the network and the average.

    Returns:
        The average, or None.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=num_steps)
    ema_model = None
    if use_ema:
        ema_model = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    if ema_model is not None:
        ema_model.to(accelerator.device)

    global_step = 0
    progress_bar = tqdm(total=num_steps, disable=not accelerator.is_local_main_process)
    model.train()
    while global_step < num_steps:
        for clean_images in loader:
            noise = torch.randn(clean_images.shape, dtype=torch.float32, device=clean_images.device)
            timesteps = torch.randint(0, 1000, (clean_images.shape[0],), device=clean_images.device).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy_images, timesteps).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if ema_model is not None:
                ema_model.step(model.parameters())
            global_step += 1
            progress_bar.update(1)
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": global_step}
            if ema_model is not None:
                logs["ema_decay"] = ema_model.cur_decay_value
            progress_bar.set_postfix(**logs)
            accelerator.log(logs, step=global_step)
            if on_step is not None:
                on_step(global_step, accelerator.unwrap_model(model), ema_model)
            if global_step == num_steps:
                break
    progress_bar.close()
    return ema_model
