# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the host must not wait for: numbers from the device. On the `meta` device, reading a number raises an error."""

from unittest import mock

import pytest
import torch
from diffusers import DDPMScheduler

import diffit_pipeline
from diffit.batches import batch_labels
from diffit.losses import nan_if_non_finite
from diffit.optimization import NonFiniteGuard
from diffit_pipeline import EDM_SCHEDULERS, SCHEDULERS, DiffiTPipeline
from helpers import generators, quiet, tiny_unet

META = torch.device("meta")


@pytest.mark.parametrize("name", [*SCHEDULERS, *EDM_SCHEDULERS])
def test_sampling_with_classes_reads_nothing_from_the_device(name):
    is_edm = name in EDM_SCHEDULERS
    settings = {"sigma_data": 0.5} if is_edm else {**DDPMScheduler(beta_schedule="squaredcos_cap_v2").config}
    network = tiny_unet(num_class_embeds=3).to(META)
    scheduler = (SCHEDULERS | EDM_SCHEDULERS)[name].from_config(settings)
    pipeline = quiet(DiffiTPipeline(network, scheduler, heun=name == "edm_heun"))
    timesteps = []
    network.register_forward_pre_hook(lambda module, inputs: timesteps.append(inputs[1]))
    at_the_end = mock.patch.object(diffit_pipeline, "check_finite")  # once, of the images
    with at_the_end, mock.patch.object(DiffiTPipeline, "_execution_device", META):
        images = pipeline(
            class_labels=[0, 1, 2],
            num_inference_steps=4,
            guidance_scale=1.5,
            generator=generators([0, 1, 2]),
            output_type="latent",
        ).images
    assert images.shape == (3, 3, 8, 8) and images.device == META
    assert len(timesteps) >= 4 and {(each.device, each.shape) for each in timesteps} == {(META, (6,))}
    assert scheduler.timesteps.device.type == "cpu"


@pytest.mark.parametrize("training", [False, True])
def test_network_does_not_read_labels_from_the_device(training):
    network = tiny_unet(num_class_embeds=3).to(META).train(training)
    sample, labels = torch.empty(2, 3, 8, 8, device=META), torch.empty(2, dtype=torch.long, device=META)
    assert network(sample, 10, class_labels=labels).sample.shape == sample.shape


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_labels_of_a_batch_are_checked_on_the_host(labels):
    batch = {"class_labels": torch.tensor(labels), "dropout_uniform": torch.tensor([0.5, 0.0])}
    with pytest.raises(ValueError, match=rf"\[0, 3\).* {min(labels)} to {max(labels)}"):
        batch_labels(batch, 0.1, null=3)
    batch["class_labels"] = torch.tensor([0, 2])
    assert batch_labels(batch, 0.1, null=3).tolist() == [0, 3]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -1.5, 3e38])
def test_non_finite_numbers_are_found_on_the_device(value):
    losses = torch.tensor([value, 1.0], requires_grad=True)
    result = nan_if_non_finite(losses)
    result.sum().backward()
    finite = torch.tensor(value).isfinite().item()
    assert torch.equal(result[1], losses[1]) and losses.grad[1] == 1
    assert (torch.equal(result[0], losses[0]) and losses.grad[0] == 1) if finite else losses.grad[0].isnan()

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = NonFiniteGuard(optimizer)
    guard.watch(torch.tensor(value))
    assert optimizer.found_inf.item() == (not finite) and guard.outcome() == finite
