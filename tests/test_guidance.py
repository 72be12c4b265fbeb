"""Guidance: its weights, its effect on a prediction, and its cost."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel

import diffit_pipeline
from diffit.command_line import from_flags, to_flags
from diffit.sampling_config import GUIDANCE_SCHEDULES, GuidanceConfig
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import SCHEDULERS, DiffiTPipeline, guidance_weight
from helpers import count_batches, generators, mentions, quiet, tiny_dit, tiny_unet

TIMESTEPS = range(950, -1, -50)  # of 20 steps of DDIM


class RecordingScheduler(DDIMScheduler):
    """DDIM that records its inputs: (timestep, sample, prediction)."""

    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None):
        self.seen.append((timestep, sample, model_output))
        return super().step(model_output, timestep, sample, eta, use_clipped_model_output, generator)


def recording_pipeline(network: torch.nn.Module) -> DiffiTPipeline:
    latent = isinstance(network, DiTTransformer2DModel)
    scheduler = RecordingScheduler(clip_sample=False)
    scheduler.seen = []
    models = {"unet": None, "transformer": network} if latent else {"unet": network}
    return quiet(DiffiTPipeline(scheduler=scheduler, **models))


def weak_unet(**kwargs) -> DiffiTUNet2DModel:
    """A network with the interface of `tiny_unet` and other weights."""
    unet = tiny_unet(**kwargs)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.8)
    return unet


# --- weights


def test_power_cosine_weight_equals_the_formula_at_20_timesteps():
    """The published guidance schedule: w(t) = 1 + (s - 1) * (1 - cos(pi * (1 - t/1000)^4)) / 2, s = 4.4."""
    for t in TIMESTEPS:
        expected = 1 + 3.4 * math.sin(math.pi / 2 * ((1000 - t) / 1000) ** 4) ** 2  # (1 - cos 2x) / 2 = sin^2 x
        assert guidance_weight(t, 1000, 4.4, "power_cosine") == pytest.approx(expected, rel=1e-12)
    assert guidance_weight(500, 1000, 4.4, "power_cosine") == pytest.approx(1.032665, abs=1e-6)
    assert guidance_weight(0, 1000, 4.4, "power_cosine") == pytest.approx(4.4)
    assert guidance_weight(250, 500, 3.0, "power_cosine", power=1.0) == pytest.approx(2.0)


@pytest.mark.parametrize(("schedule", "inside"), [("constant", 1.5), ("power_cosine", None)])
def test_interval_guides_its_timesteps_and_no_others(schedule, inside):
    for t in TIMESTEPS:
        weight = guidance_weight(t, 1000, 1.5, schedule, interval=(0.2, 0.8))
        expected = guidance_weight(t, 1000, 1.5, schedule) if inside is None else inside
        assert weight == (expected if 200 <= t <= 800 else 1)


def test_weight_takes_fractional_timesteps():
    assert guidance_weight(800.5, 1000, 2.0, interval=(0.2, 0.8)) == 1
    assert guidance_weight(799.5, 1000, 2.0, interval=(0.2, 0.8)) == 2
    assert guidance_weight(0.5, 2, 3.0, "power_cosine", power=0.5) == pytest.approx(
        1 + 1 - math.cos(math.pi * math.sqrt(0.75))
    )


# --- predictions


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, lambda t: 3.0),
        ({"guidance_schedule": "power_cosine"}, lambda t: 1 + 1 - math.cos(math.pi * (1 - t / 1000) ** 4)),
        (
            {"guidance_schedule": "power_cosine", "guidance_power": 2},
            lambda t: 1 + 1 - math.cos(math.pi * (1 - t / 1000) ** 2),
        ),
        ({"guidance_interval": (0.2, 0.8)}, lambda t: 3.0 if 200 <= t <= 800 else 1.0),
    ],
)
def test_guided_prediction_equals_the_formula_at_20_timesteps(settings, weight):
    unet = tiny_unet(num_class_embeds=3).double()  # guidance amplifies rounding, which changes with the batch size
    pipeline = recording_pipeline(unet)
    pipeline([0, 2], num_inference_steps=20, guidance_scale=3.0, generator=generators([0, 1]), **settings)
    assert [int(timestep) for timestep, _, _ in pipeline.scheduler.seen] == list(TIMESTEPS)
    for timestep, sample, prediction in pipeline.scheduler.seen:
        with torch.no_grad():
            conditional = unet(sample.double(), timestep, torch.tensor([0, 2])).sample
            unconditional = unet(sample.double(), timestep, torch.tensor([3, 3])).sample
        expected = unconditional + weight(int(timestep)) * (conditional - unconditional)
        torch.testing.assert_close(prediction, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "labels"), [(3, [0, 2]), (3, None), (None, None)])
def test_autoguidance_moves_away_from_the_weaker_model(num_classes, labels):
    """Both models see the same class; without one, the null class, or none for unconditional models."""
    strong, weak = tiny_unet(num_class_embeds=num_classes), weak_unet(num_class_embeds=num_classes)
    pipeline = recording_pipeline(strong)
    pipeline(
        labels,
        batch_size=2,
        num_inference_steps=20,
        guidance_scale=1.7,
        guidance_interval=(0, 0.6),
        guidance_model=weak,
        generator=generators([0, 1]),
    )
    seen_labels = torch.tensor(labels or [3, 3]) if num_classes else None
    for timestep, sample, prediction in pipeline.scheduler.seen:
        with torch.no_grad():
            good, bad = (network(sample, timestep, seen_labels).sample for network in (strong, weak))
        assert (good - bad).abs().max() > 1e-3
        expected = bad + 1.7 * (good - bad) if timestep <= 600 else good
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


def test_guidance_channels_leave_the_others_conditional():
    """The quirk of the published numbers: 3 of 4 latent channels."""
    transformer = tiny_dit()
    pipeline = recording_pipeline(transformer)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    pipeline([5], guidance_channels=3, generator=generators([0]), **settings)
    for timestep, sample, prediction in pipeline.scheduler.seen:
        with torch.no_grad():
            conditional = transformer(sample, timestep[None], torch.tensor([5])).sample
            unconditional = transformer(sample, timestep[None], torch.tensor([10])).sample
        expected = conditional[:, :4].clone()
        expected[:, :3] = unconditional[:, :3] + 2 * (conditional - unconditional)[:, :3]
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


def test_variance_is_that_of_the_conditional_pass():
    transformer = tiny_dit()
    pipeline = quiet(DiffiTPipeline(None, DDPMScheduler(), transformer=transformer))
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        prediction = pipeline._predict(sample, torch.tensor(300), labels, 2.0, None, None)
        conditional = transformer(sample, torch.tensor([300, 300]), labels).sample
    torch.testing.assert_close(prediction[:, 4:], conditional[:, 4:], rtol=0, atol=1e-5)
    assert (prediction[:, :4] - conditional[:, :4]).abs().max() > 1e-3


# --- what it costs


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({}, lambda t: True),
        ({"guidance_interval": (0.2, 0.8)}, lambda t: 200 <= t <= 800),
        ({"guidance_schedule": "power_cosine"}, lambda t: True),
        ({"guidance_schedule": "power_cosine", "guidance_interval": (0, 0.5)}, lambda t: t <= 500),
    ],
)
def test_guided_steps_double_the_batch_and_others_do_not(settings, guided):
    unet = tiny_unet(num_class_embeds=3)
    batches = count_batches(unet)
    recording_pipeline(unet)([0, 2], num_inference_steps=20, guidance_scale=3.0, **settings)
    assert batches == [4 if guided(t) else 2 for t in TIMESTEPS]


def test_power_cosine_takes_a_single_pass_where_its_weight_is_one():
    """At the last training timesteps the cosine of a tiny number rounds to 1."""
    unet = tiny_unet(num_class_embeds=3)
    batches = count_batches(unet)
    pipeline = quiet(DiffiTPipeline(unet, DDIMScheduler(timestep_spacing="trailing")))
    pipeline([0, 2], num_inference_steps=2, guidance_scale=3.0, guidance_schedule="power_cosine")
    assert pipeline.scheduler.timesteps.tolist() == [999, 499] and batches == [2, 4]


def test_autoguidance_takes_one_pass_of_each_model():
    strong, weak = tiny_unet(), weak_unet()
    strong_batches, weak_batches = count_batches(strong), count_batches(weak)
    pipeline = recording_pipeline(strong)
    settings = {"batch_size": 2, "num_inference_steps": 20, "guidance_model": weak}
    pipeline(guidance_scale=2.0, guidance_interval=(0.2, 0.8), **settings)
    assert strong_batches == [2] * 20
    assert weak_batches == [2] * sum(200 <= t <= 800 for t in TIMESTEPS)
    weak_batches.clear()
    pipeline(guidance_scale=1.0, **settings)
    assert weak_batches == []


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_is_guided_within_the_interval(scheduler):
    """Including schedulers with fractional timesteps, and those that evaluate a timestep twice."""
    unet = tiny_unet(num_class_embeds=3)
    batches = count_batches(unet)
    pipeline = quiet(DiffiTPipeline(unet, SCHEDULERS[scheduler].from_config(DDPMScheduler().config)))
    pipeline([0, 2], num_inference_steps=9, guidance_scale=3.0, guidance_interval=(0.2, 0.8))
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert batches == [4 if 200 <= t <= 800 else 2 for t in timesteps]
    assert {2, 4} == set(batches)


# --- errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 needs class_labels or a guidance_model"),
        ({"class_labels": 1, "guidance_schedule": "cosine"}, "guidance_schedule .* 'cosine'"),
        ({"class_labels": 1, "guidance_channels": 4}, "guidance_channels must be 1 to 3.* got 4"),
        ({"class_labels": 1, "guidance_channels": 0}, "guidance_channels must be 1 to 3.* got 0"),
    ],
)
def test_guidance_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        recording_pipeline(tiny_unet(num_class_embeds=3))(num_inference_steps=1, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_inference_steps": 0}, ["num_inference_steps", 0]),
        ({"num_inference_steps": -1}, ["num_inference_steps", -1]),
        ({"num_inference_steps": 2.0}, ["num_inference_steps", 2.0]),
        ({"num_inference_steps": 1001}, ["num_inference_steps", 1001, 1000]),
        ({"batch_size": 0}, ["batch_size", 0]),
        ({"height": 0}, ["height", 0]),
        ({"width": -8}, ["width", -8]),
        ({"eta": 5.0}, ["eta", 5.0]),
        ({"eta": math.nan}, ["eta", "nan"]),
        ({"guidance_scale": math.nan}, ["guidance_scale", "nan"]),
        ({"guidance_scale": math.inf}, ["guidance_scale", "inf"]),
        ({"guidance_scale": -1.0}, ["guidance_scale", -1.0]),
        ({"guidance_power": 0.0}, ["guidance_power", 0.0]),
        ({"guidance_power": math.nan}, ["guidance_power", "nan"]),
        ({"guidance_schedule": "linear"}, ["guidance_schedule", "'linear'", "power_cosine"]),
        ({"guidance_interval": (0.8, 0.2)}, ["guidance_interval", "(0.8, 0.2)"]),
        ({"guidance_interval": (0.2, math.nan)}, ["guidance_interval", "nan"]),
        ({"s_churn": math.nan}, ["s_churn", "nan"]),
        ({"s_churn": -1.0}, ["s_churn", -1.0]),
        ({"s_churn": 1.0}, ["s_churn", 1.0, "EDMEulerScheduler"]),
        ({"s_tmin": 3.0, "s_tmax": 2.0}, ["s_tmin", 3.0, "s_tmax", 2.0]),
        ({"s_noise": 0.0}, ["s_noise", 0.0]),
        ({"output_type": "PIL"}, ["output_type", "'PIL'", "pil, np, pt, latent"]),
        ({"output_type": "numpy"}, ["output_type", "'numpy'"]),
        ({"class_labels": []}, ["class_labels"]),
    ],
)
def test_arguments_out_of_range_are_refused(settings, words):
    pipeline = recording_pipeline(tiny_unet(num_class_embeds=3))
    with pytest.raises(ValueError, match=mentions(*words)):
        pipeline(**{"class_labels": [1], "num_inference_steps": 2} | settings)
    assert not pipeline.scheduler.seen


def test_eta_of_a_scheduler_that_has_none_is_refused():
    pipeline = quiet(DiffiTPipeline(tiny_unet(), DDPMScheduler()))
    with pytest.raises(ValueError, match=mentions("eta", 0.5, "DDPMScheduler", "DDIMScheduler")):
        pipeline(num_inference_steps=2, eta=0.5)


@pytest.mark.parametrize(
    ("config", "words"), [({"in_channels": 4}, "4 input channels"), ({"num_class_embeds": 2}, "2 classes")]
)
def test_guidance_model_of_another_kind_is_refused(config, words):
    guidance_model = tiny_unet(**{"num_class_embeds": 3} | config)
    with pytest.raises(ValueError, match=words):
        recording_pipeline(tiny_unet(num_class_embeds=3))(guidance_scale=2.0, guidance_model=guidance_model)


REFUSED = [
    ({"scale": -1.0}, "--{}scale .*-1"),
    ({"scale": math.nan}, "--{}scale .*nan"),
    ({"scale": math.inf}, "--{}scale .*inf"),
    ({"scale": 2.0, "schedule": "cosine"}, "--{}schedule .*constant, power_cosine.*'cosine'"),
    ({"schedule": "power_cosine"}, "--{}schedule .*--{}scale"),
    ({"interval": (0.2, 0.8)}, "--{}interval .*--{}scale"),
    ({"channels": 3}, "--{}channels .*--{}scale"),
    ({"model": "weak"}, "--{}model .*--{}scale"),
    ({"scale": 2.0, "power": 3.0}, "--{}power 3.0 .*--{}schedule power_cosine.* constant"),
    ({"scale": 2.0, "schedule": "power_cosine", "power": 0.0}, "--{}power .*0.0"),
    ({"scale": 2.0, "interval": (0.8, 0.2)}, "--{}interval .*0.8 0.2"),
    ({"scale": 2.0, "interval": (0.5, 1.5)}, "--{}interval .*0.5 1.5"),
    ({"scale": 2.0, "interval": (math.nan, 1.0)}, "--{}interval .*nan 1.0"),
    ({"scale": 2.0, "channels": 0}, "--{}channels .*0"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
@pytest.mark.parametrize("prefix", ["", "guidance_", "validation_guidance_"])
def test_guidance_config_names_the_flag_that_it_refuses(settings, words, prefix):
    values = {prefix + name: value for name, value in (to_flags(GuidanceConfig()) | settings).items()}
    with pytest.raises(ValueError, match=words.replace("{}", prefix)):
        from_flags(GuidanceConfig, values, prefix)


def test_guidance_config_knows_the_schedules_of_the_pipeline():
    assert GUIDANCE_SCHEDULES == diffit_pipeline.GUIDANCE_SCHEDULES
