"""The scripts on a GPU that is not there (see `benchmarks/fake_gpu`): devices, dtypes, waits, operators, memory."""

import json
import math
import traceback
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import diffit.batches
import diffit.logs
import diffit_model
import eval_diffit
import sample_diffit
import train_diffit
from benchmarks import counts, fake_gpu, gpu, gpu_checks
from benchmarks.fake_gpu import device, scripts
from benchmarks.fake_gpu.trace import Counts, Trace
from diffit_model import DiffiTResBlock
from diffit_pipeline import EDM_SCHEDULERS, SCHEDULERS, DiffiTPipeline
from helpers import TINY_CONFIG, TINY_TRANSFORMER, tiny_unet, tiny_vae

REASON = fake_gpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_it_says_why_there_is_no_fake_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in fake_gpu.why_not()
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    monkeypatch.setattr(fake_gpu, "_torch_folder", lambda: str(tmp_path))
    assert "cuda 13.0" in fake_gpu.why_not()


MARGIN = 1.02  # of what was measured
# Of a shipped config's step that logs: operators, casts, GB read and written, live GiB; and of its preview: live GiB.
# When a change lowers them, the test prints the new line.
BUDGETS = {
    "cifar10": (823, 40, 19.25, 2.67, 0.53),
    "cifar10_l4": (1433, 70, 36.9, 5.04, 0.75),
    "emoji32": (560, 4, 6.59, 0.89, 0.28),
    "ffhq64": (949, 46, 29.37, 4.04, 0.91),
    "ffhq64_l4": (1919, 94, 77.59, 10.31, 1.28),
    "imagenet256": (1712, 321, 123.1, 19.78, 10.53),
    "imagenet512": (2160, 433, 302.64, 12.81, 12.69),
    "latent_digits": (374, 3, 0.79, 0.14, 0.07),
    "quickstart": (328, 4, 0.62, 0.1, 0.05),
}
SLOW = ("cifar10_l4", "ffhq64", "ffhq64_l4", "imagenet512")  # another one has the same blocks


# ---------------------------------------------------------------------------------------------------------------------
# Counting itself


def known_program() -> dict[str, Counts]:
    trace = Trace()
    with trace:
        x = torch.zeros(4096, device="cuda")  # 16 KiB, stays
        trace.begin("add")
        y = x + 1
        del y
        trace.begin("cast")
        half = x.half()
        del half
        trace.begin("view")
        x.view(64, 64).t()
        trace.begin("wait")
        x.sum().item()
        trace.begin("copies")
        pinned = torch.ones(2**16).pin_memory()
        pinned.to("cuda", non_blocking=True)
        torch.ones(2**16).to("cuda", non_blocking=True)
        torch.ones(2**16).to("cuda")
        x.to("cpu", non_blocking=True)
        trace.begin("indices")
        x[torch.tensor([1, 2])]
        x[torch.tensor([1, 2], device="cuda")]
        trace.begin("values")
        assert torch.tensor([3, 5], device="cuda").add(1).tolist() == [4, 6]
        assert x.isfinite().all() and not (~x.isfinite()).any()
        trace.begin("backward")
        w = torch.zeros(64, 64, device="cuda", requires_grad=True)
        torch.nn.functional.silu(x.view(64, 64) @ w).sum().backward()
        assert w.grad.device.type == "cuda" and w.grad.shape == w.shape
        w.grad = None
        trace.begin("forward")
        loss = (x.view(64, 64) @ w).exp().sum()
        trace.begin("saved for backward")
        del loss
    return trace.phases


def test_counts_of_a_known_program():
    phases = fake_gpu.run(known_program)
    add, cast, view = (phases[name] for name in ("add", "cast", "view"))
    assert (add.operators, add.casts, add.bytes) == ({"add": 1}, 0, 2 * 16384)
    assert (add.start, add.peak) == (16384, 2 * 16384)
    assert (cast.operators, cast.casts, cast.bytes, cast.peak) == ({"_to_copy": 1}, 1, 16384 + 8192, 16384 + 8192)
    assert (view.operators, view.bytes, view.peak) == ({}, 0, 16384)
    assert [key.split(":")[0] for key in phases["wait"].synchronizations] == ["local_scalar_dense"]
    copies = phases["copies"]
    assert sum(copies.copies.values()) == 3 and sum(copies.pageable.values()) == 1  # the one that is not pinned
    assert copies.num_synchronizations == 1 and copies.num_operators == 0
    assert sorted(key.split(":")[0] for key in phases["indices"].synchronizations) == ["index", "to the device"]
    assert phases["values"].num_synchronizations == 4  # to the device, to the host, and two bools
    backward = phases["backward"].operators
    assert backward["silu_backward"] == 1 and backward["mm"] == 2
    # x, w, the exponentials, which autograd keeps, and the sum; not the product, which it does not need
    assert phases["forward"].peak == 4 * 16384 and phases["saved for backward"].start == 3 * 16384 + 512


# ---------------------------------------------------------------------------------------------------------------------
# Training

NARROW = TINY_CONFIG | {"block_out_channels": [8]}
PIXELS = NARROW | {"in_channels": 3, "out_channels": 3}
UNET = {
    **{"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"norm_num_groups": 4, "attention_head_dim": 8},
}
SMALL_VAE = dict(tiny_vae(latent_channels=2).config) | {"_class_name": "AutoencoderKL", "scaling_factor": 0.7}
LEARNED = ["--prediction_type=epsilon", "--beta_schedule=linear"]
MATRIX = {
    "EDM, augmented, bf16": (
        NARROW,
        ["--formulation=edm", "--augmentation_probability=0.2", "--mixed_precision=bf16"],
    ),
    "DDPM, classes, accumulated, checkpointed, fp16": (
        NARROW,
        [
            "--class_conditional",
            "--gradient_accumulation_steps=2",
            "--gradient_checkpointing",
            "--mixed_precision=fp16",
        ],
    ),
    "Muon, bf16": (NARROW, ["--optimizer=muon", "--mixed_precision=bf16"]),
    "latents by a VAE, learned variance": (TINY_TRANSFORMER, ["--class_conditional", *LEARNED, "VAE"]),
    "UNet2DModel, fp16": (UNET, ["--class_conditional", "--mixed_precision=fp16"]),
    "deterministic, TF32": (NARROW, ["--deterministic", "--allow_tf32"]),
    "metrics, held-out loss": (
        NARROW,
        [
            "--validation_fraction=0.5",
            "--eval_steps=3",
            "--feature_extractor=helpers:mean_colours",
            "--eval_num_images=8",
        ],
    ),
}


def train_tiny(config: dict, flags: list[str], folder: Path, prepare=None) -> dict[str, Counts]:
    """Trains three steps, of which the last one logs, on 8 x 8 pixels."""
    (folder / "model.json").write_text(json.dumps(config))
    data = scripts.write_images(folder / "images", (8, 8))
    if "VAE" in flags:
        flags = [flag for flag in flags if flag != "VAE"] + scripts.write_vae(folder / "vae", SMALL_VAE)
    fixed = [f"--model_config={folder / 'model.json'}", f"--output_dir={folder / 'run'}", "--train_batch_size=4"]
    fixed += [
        "--max_train_steps=3",
        "--logging_steps=3",
        "--num_validation_images=2",
        "--validation_inference_steps=2",
    ]
    return scripts.train([*fixed, *data, *flags], prepare)


def assert_never_waits(phases: dict[str, Counts]) -> None:
    """The second step waits for nothing but an event of the first one, and copies nothing but batches and a flag."""
    step = phases["step 2"]
    assert step.synchronizations == {} and step.event_waits == 1 and step.pageable == {}
    assert sum(key.startswith("to the host") for key in step.copies) == 1  # whether the step before was finite


def assert_logging_waits_only(step: Counts) -> None:
    """A step that logs waits for its own end, and reads the losses and the norm of the gradient."""
    assert {key.split(":")[1].strip() for key in step.synchronizations} == {"diffit/logs.py"}
    assert step.num_synchronizations <= 2 and step.event_waits == 2 and step.pageable == {}


def train_matrix(folder: Path) -> dict[str, dict[str, Counts] | str]:
    """Counts of each training of the matrix, or its traceback; in one process, which knows most operators by then."""
    results = {}
    for index, (name, (config, flags)) in enumerate(MATRIX.items()):
        try:
            (folder / f"{index}").mkdir()
            results[name] = train_tiny(config, flags, folder / f"{index}")
        except BaseException:
            results[name] = traceback.format_exc()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return results


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> dict[str, dict[str, Counts] | str]:
    return fake_gpu.run(train_matrix, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("name", MATRIX)
def test_a_training_runs_on_the_device_and_does_not_wait_for_it(name, matrix):
    phases = matrix[name]
    assert not isinstance(phases, str), phases
    assert_never_waits(phases)
    assert_logging_waits_only(phases["step 3"])
    assert phases["preview"].num_operators > 0 and phases["step 2"].operators["_fused_adamw_"] >= 1


def test_xformers_attention_trains_on_the_device(tmp_path):
    pytest.importorskip("xformers")
    config = NARROW | {"block_out_channels": [16]}  # heads of 8 channels
    flags = ["--mixed_precision=bf16", "--attention_backend=xformers"]
    phases = fake_gpu.run(train_tiny, config, flags, tmp_path, device.enable_xformers)
    assert_never_waits(phases)
    step = phases["step 2"]
    names = ("_efficient_attention_forward", "_efficient_attention_backward")
    assert step.operators[names[0]] == step.operators[names[1]] > 0 and not step.attention


def within_budget(name: str, phases: dict[str, Counts]) -> dict[str, bool]:
    """What of a shipped config stays within its budget."""
    step, preview = phases["step 2"], phases["preview"]  # the second step is the last one
    measured = (step.num_operators, step.casts, step.bytes / 1e9, step.peak / 2**30, preview.peak / 2**30)
    kinds = ("operators", "casts", "GB", "live GiB", "live GiB of the preview")
    print(f'"{name}": {tuple(round(number, 2) for number in measured)}')
    return {
        kind: number <= math.ceil(MARGIN * 100 * budget) / 100
        for kind, number, budget in zip(kinds, measured, BUDGETS[name], strict=True)
    }


def test_every_shipped_config_has_a_budget():
    assert list(BUDGETS) == counts.CONFIGS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BUDGETS]
)
def test_a_shipped_config_stays_within_its_budget(name):
    phases = fake_gpu.run(scripts.train_shipped, name, 2)
    assert_logging_waits_only(phases["step 2"])
    assert (
        phases["preview"].attention.keys() == phases["step 2"].attention.keys()
    )  # samples use the kernel of training
    assert within_budget(name, phases) == dict.fromkeys(within_budget(name, phases), True)


def breaks_the_step() -> None:
    """Reads the loss in each step."""
    real = train_diffit.nan_if_non_finite
    train_diffit.nan_if_non_finite = lambda losses: real(losses) if losses.mean().item() == 0 else None


def copies_and_waits() -> None:
    """Copies batches without `non_blocking`."""
    real = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, non_blocking=False, **kwargs: real(self, *args, **kwargs)


def leaves_losses_on_the_host() -> None:
    diffit.logs.LossBins.__init__ = lambda self, device: setattr(self, "sums", torch.zeros(2, 4))


def mixes_dtypes() -> None:
    """Makes queries float32 under autocast."""
    real = diffit_model.DiffiTAttnProcessor.__call__
    diffit_model.DiffiTAttnProcessor.__call__ = lambda self, query, *rest, **more: real(
        self, query.float(), *rest, **more
    )


@pytest.mark.parametrize("sabotage", [breaks_the_step, copies_and_waits])
def test_a_wait_in_a_step_is_found(sabotage, tmp_path):
    phases = fake_gpu.run(train_tiny, *MATRIX["Muon, bf16"], tmp_path, sabotage)
    with pytest.raises(AssertionError):
        assert_never_waits(phases)
    assert phases["step 2"].num_synchronizations > 0


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (leaves_losses_on_the_host, "same device, but got .self. cpu, .index. cuda:0"),
        (mixes_dtypes, "float32.*bfloat16"),
    ],
    ids=["device", "dtype"],
)
def test_a_wrong_device_or_dtype_is_found(sabotage, message, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        fake_gpu.run(train_tiny, *MATRIX["Muon, bf16"], tmp_path, sabotage)


def wastes() -> None:
    """Converts the input of each block to and fro, keeps a copy of it, and leaves batches in pageable memory."""
    real, kept = DiffiTResBlock.forward, []

    def forward(self, hidden_states, *args):
        kept.append(hidden_states.detach().clone())
        return real(self, hidden_states.double().float(), *args)

    DiffiTResBlock.forward = forward
    real_loader = diffit.batches.DataLoader
    diffit.batches.DataLoader = lambda *args, **kwargs: real_loader(*args, **kwargs | {"pin_memory": False})


def test_a_waste_is_found():
    phases = fake_gpu.run(scripts.train_shipped, "emoji32", 2, wastes)
    assert within_budget("emoji32", phases) == dict.fromkeys(within_budget("emoji32", phases), False)
    assert phases["step 2"].pageable
    with pytest.raises(AssertionError):
        assert_logging_waits_only(phases["step 2"])


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, evaluation, benchmarks

# Waits of the host for each evaluation of a network with classes. DDPM copies the noise of each image's generator.
WAITS = {"ddim": 0, "ddpm": 1, "dpmsolver++": 0, "edm_heun": 0}


def count_waits() -> dict[str, int]:
    """Waits of two further steps while sampling with classes."""
    config = PIXELS | {"num_class_embeds": 3}
    few, many = (
        {name: scripts.sample(config, name, 2, steps).num_synchronizations for name in WAITS} for steps in (2, 4)
    )
    return {name: many[name] - few[name] for name in WAITS}


def test_waits_per_evaluation_while_sampling_with_classes():
    waits = fake_gpu.run(count_waits)
    evaluations = {name: 4 if name == "edm_heun" else 2 for name in WAITS}
    assert {name: waits[name] / evaluations[name] <= WAITS[name] for name in WAITS} == dict.fromkeys(WAITS, True)


def sample_all() -> dict[str, int]:
    """Samples two guided images with each scheduler, pixels in bf16 and some latents in fp16; numbers of operators."""
    latents = TINY_TRANSFORMER | {"num_embeds_ada_norm": 3, "in_channels": 4, "out_channels": 4}
    results = {}
    for name in SCHEDULERS | EDM_SCHEDULERS:
        options = {"dtype": "bfloat16", "guidance_scale": 1.5}
        results[name] = scripts.sample(PIXELS | {"num_class_embeds": 3}, name, 2, 2, options).num_operators
    for name in ("ddpm", "ddim", "edm_heun"):
        options = {"dtype": "float16", "guidance_scale": 1.5}
        results[f"{name} of latents"] = scripts.sample(latents, name, 2, 2, options).num_operators
    return results


def test_all_samplers_run_on_the_device():
    results = fake_gpu.run(sample_all)
    assert len(results) == 3 + len(SCHEDULERS | EDM_SCHEDULERS) and all(number > 100 for number in results.values())


def test_decoding_by_slices_stays_within_its_memory():
    """By GPU.md: a whole batch of 16 images of 512 pixels takes 12 GiB."""
    sliced = fake_gpu.run(scripts.decode, scripts.SD_VAE, 16, 512, True)
    assert sliced.peak / 2**30 < 1.12 * MARGIN
    assert fake_gpu.run(scripts.decode, scripts.SD_VAE, 16, 512, False).peak / 2**30 > 10


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    DiffiTPipeline(tiny_unet(num_class_embeds=3), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def sample_script(flags: list[str]) -> Counts:
    with Trace() as trace:
        sample_diffit.main(sample_diffit.parse_args(flags))
    return trace.phases["setup"]


def test_sample_diffit_runs_on_the_device(saved_pipeline, tmp_path):
    flags = [f"--model_path={saved_pipeline}", f"--output_dir={tmp_path / 'out'}", "--seeds=0-3", "--class_labels=all"]
    done = fake_gpu.run(sample_script, [*flags, "--num_inference_steps=2", "--batch_size=4", "--dtype=bf16"])
    assert len(list((tmp_path / "out").glob("*seed_*.png"))) == 4
    assert done.operators["convolution"] > 10 and done.attention


def evaluate_script(flags: list[str]) -> Counts:
    with Trace() as trace:
        eval_diffit.main(eval_diffit.parse_args(flags))
    return trace.phases["setup"]


def test_eval_diffit_runs_on_the_device(saved_pipeline, tmp_path):
    scripts.write_images(tmp_path / "images", (8, 8), 20)
    flags = [f"--model_path={saved_pipeline}", f"--reference={tmp_path / 'images'}", f"--work_dir={tmp_path / 'work'}"]
    flags += ["--feature_extractor=helpers:mean_colours", "--num_images=20", "--num_inference_steps=2"]
    flags += [f"--output={tmp_path / 'metrics.json'}", f"--plots={tmp_path / 'plots'}"]
    done = fake_gpu.run(evaluate_script, flags)
    assert done.operators["_adaptive_avg_pool2d"] > 0 and (tmp_path / "metrics.json").is_file()


def benchmark(output: Path) -> list[str]:
    """Runs all sections of `benchmarks/gpu.py` but "training", whose steps are those of "synchronization"."""
    gpu.TINY_GEOMETRIES, gpu_checks.INPUT_SCALES = gpu.TINY_GEOMETRIES[:1], (1,)
    gpu_checks.has_triton = lambda: False
    gpu.describe_machine = lambda *args: []
    sections = [name for name in gpu.SECTIONS if name != "training"]
    with Trace():
        gpu.main(["--tiny", "--quick", "--output", str(output), "--sections", *sections])
    return output.read_text().splitlines()


def test_gpu_benchmark_runs_on_the_device(tmp_path):
    """Its verdicts mean nothing here: all numbers are zero. But nothing fails to run."""
    lines = fake_gpu.run(benchmark, tmp_path / "gpu.md")
    assert sum(line.startswith("## ") for line in lines) >= 5
    assert [line for line in lines if "Error" in line] == []
