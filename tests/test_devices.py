"""The device: a GPU that cannot be used, answers of `accelerate config`, TensorFloat-32, attention kernels."""

import ast
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import DDPMScheduler

import eval_diffit
import prepare_latents
import sample_diffit
import train_vae
from diffit import devices
from diffit.config import args_to_config, parse_args
from diffit.device_config import DeviceConfig
from diffit.devices import (
    check_architecture,
    describe_device,
    refuse_unsupported_answers,
    refuse_xla,
    runs_on,
    set_precision,
    set_up_device,
    tf32_settings,
    use_cpu,
    warn_about_bfloat16,
)
from diffit.errors import UserError
from diffit.features import FeatureExtractor, extract_features
from diffit.run_dir import OutputFolder
from diffit_model import DiffiTUNet2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import LAUNCH, ROOT, TINY_CONFIG, mentions, refusal, sample, start, torchrun, train

SCRIPTS = ("train_diffit", "sample_diffit", "eval_diffit", "prepare_latents", "train_vae")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cuda_build(monkeypatch, tmp_path):
    """A CUDA build of torch on a machine without a GPU: what PyPI installs on a laptop. Returns its /dev."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("No CUDA GPUs are available")))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(devices, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    (tmp_path / "nvidiactl").touch()  # also present where no GPU was passed on
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """A usable NVIDIA GPU, as far as torch's answers go: an H100 until a test changes `capability`."""
    answers = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: answers.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: answers)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (answers.major, answers.minor))
    architectures = [
        "sm_75",
        "sm_80",
        "sm_86",
        "sm_90",
        "sm_100",
        "sm_120",
    ]  # of the wheel of torch 2.13 for CUDA 13.0
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    return answers


# --- a GPU that cannot be used


def test_cuda_build_without_signs_of_a_gpu_computes_on_the_cpu(cuda_build, monkeypatch):
    assert use_cpu(DeviceConfig())
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert use_cpu(DeviceConfig())


def test_driver_that_is_too_old_is_told_with_its_version(cuda_build, monkeypatch):
    (cuda_build / "nvidia0").touch()
    (cuda_build / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    too_old = "The NVIDIA driver on your system is too old (found version 12020)."
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(too_old)))
    expected = mentions(cuda_build / "nvidia0", "too old", "12020", "13.0", "535.104.05", "--cpu")
    with pytest.raises(UserError, match=expected):
        use_cpu(DeviceConfig())


def test_container_without_the_devices_is_told(cuda_build, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    expected = mentions(
        "CUDA_VISIBLE_DEVICES=0,1", "No CUDA GPUs are available", "/dev/nvidia0", "--gpus all", "--cpu"
    )
    with pytest.raises(UserError, match=expected):
        use_cpu(DeviceConfig())


def test_container_without_the_driver_is_told(cuda_build):
    (cuda_build / "nvidia3").touch()
    with pytest.raises(UserError, match=mentions(cuda_build / "nvidia3", cuda_build / "version", "--cpu")):
        use_cpu(DeviceConfig())


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_told(hidden, cuda_build, monkeypatch):
    (cuda_build / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(UserError, match=mentions(f"CUDA_VISIBLE_DEVICES={hidden!r}", "--cpu")):
        use_cpu(DeviceConfig())


def test_multi_gpu_config_without_a_gpu_is_refused(cuda_build, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=mentions("multi-GPU", "bf16", "accelerate", "--cpu")):
        use_cpu(DeviceConfig())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # configs/accelerate/cpu_multi_process.yaml
    assert use_cpu(DeviceConfig())


def test_cpu_build_for_which_gpus_were_given_is_refused(cuda_build, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=mentions("CUDA_VISIBLE_DEVICES=0", torch.__version__, "without CUDA")):
        use_cpu(DeviceConfig())


def test_cpu_build_beside_a_gpu_warns(cuda_build, monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", None)
    (cuda_build / "nvidia0").touch()
    assert use_cpu(DeviceConfig())
    assert mentions("CPU", cuda_build / "nvidia0", torch.__version__).search(caplog.text)


def test_cpu_that_was_asked_for_is_taken(cuda_build, monkeypatch):
    (cuda_build / "nvidia0").touch()
    assert use_cpu(DeviceConfig(cpu=True))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # of `accelerate launch --cpu`
    assert use_cpu(DeviceConfig())


def test_usable_gpu_is_taken_unless_the_cpu_is_asked_for(gpu):
    assert not use_cpu(DeviceConfig())
    assert use_cpu(DeviceConfig(cpu=True))


@pytest.mark.parametrize(
    ("architecture", "capability", "expected"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),  # L4
        ("sm_86", (8, 0), False),
        ("sm_75", (8, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_100", (12, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_120f", (12, 1), True),
        ("compute_70", (12, 0), True),
        ("compute_90", (8, 0), False),
        ("gfx90a", (9, 0), False),
    ],
)
def test_kernels_run_on_the_architectures_that_nvidia_says(architecture, capability, expected):
    assert runs_on(architecture, capability) is expected


def test_gpu_without_kernels_is_refused_before_its_first_operation(gpu, monkeypatch):
    gpu.name, gpu.major, gpu.minor = "Tesla V100", 7, 0
    with pytest.raises(UserError, match=mentions("Tesla V100", "7.0", "sm_75", "--cpu")):
        use_cpu(DeviceConfig())
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "compute_90"])
    check_architecture(0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_a_gpu_that_cannot_be_used(script, train_args, cpu_commands):
    process = start(cpu_commands[script], CUDA_VISIBLE_DEVICES="0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    lines = [line for line in output.splitlines() if f"{script}.py: error: " in line]
    assert len(lines) == 1 and mentions("CUDA_VISIBLE_DEVICES=0", "--cpu").search(lines[0])
    assert "Traceback" not in output


@pytest.fixture
def cpu_commands(train_args, tmp_path) -> dict[str, list[str]]:
    """A command of each script, whose flags are valid; the models need not exist."""
    data = next(flag for flag in train_args if flag.startswith("--train_data_"))
    model, output = f"--model_path={tmp_path}/model", f"--output_dir={tmp_path}/output"
    return {
        "train_diffit": ["train_diffit.py", *train_args],
        "sample_diffit": ["sample_diffit.py", model, output],
        "eval_diffit": ["eval_diffit.py", model, f"--reference={tmp_path}"],
        "prepare_latents": ["prepare_latents.py", "--vae_model_name_or_path=vae", "--resolution=8", output, data],
        "train_vae": ["train_vae.py", output, data],
    }


def test_processes_refuse_it_once(train_args):
    process = start([*torchrun(), "train_diffit.py", *train_args], CUDA_VISIBLE_DEVICES="0,1", OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=120)
    assert output.count("train_diffit.py: error: ") == 1 and mentions("CUDA_VISIBLE_DEVICES=0,1").search(output)


def test_multi_gpu_config_is_refused_on_a_machine_without(train_args):
    config = "--config_file=configs/accelerate/multi_gpu.yaml"
    process = start([*LAUNCH, config, "--num_processes=2", "train_diffit.py", *train_args], OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("train_diffit.py: error: ") == 1 and mentions("bf16", "--cpu").search(output)


def test_flag_trains_on_the_cpu_and_is_not_saved_with_the_run(train_args, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train([*train_args, "--cpu", "--max_train_steps=1"])
    assert mentions("device", "cpu", torch.__version__).search(caplog.text)
    assert "cpu:" not in (tmp_path / "run/training_args.yaml").read_text()
    assert "cpu" not in args_to_config(parse_args([*train_args, "--cpu"]))


def test_only_one_place_joins_processes_and_asks_for_a_gpu():
    """A script with a `PartialState` of its own would keep NCCL's time-out of ten minutes, and silently fall back."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("diffit/*.py")]
    assert len(files) > 40
    joined, asked = [], []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                joined += [file.name] * (name == "PartialState" and bool(node.keywords or node.args))
                asked += [file.name] * (name in ("torch.accelerator.is_available", "torch.cuda.is_available"))
    assert set(joined) == {"processes.py"}
    assert set(asked) <= {"__init__.py", "devices.py", "diffit_model.py"}


# --- answers of `accelerate config`


@pytest.mark.parametrize(
    ("variable", "value", "question"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism config"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "compute environment"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision"),
    ],
)
def test_unsupported_answer_names_its_question(variable, value, question, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=mentions(f"{variable}={value}", question, "accelerate config")):
        refuse_unsupported_answers()
    monkeypatch.setenv(variable, "false" if value == "true" else "bf16")
    refuse_unsupported_answers()


def test_questions_are_those_of_the_installed_accelerate():
    folder = Path(accelerate.__file__).parent / "commands/config"
    asked = (folder / "cluster.py").read_text() + (folder / "config.py").read_text()
    questions = [*devices.UNSUPPORTED_ANSWERS.values(), "Do you want to use FullyShardedDataParallel?"]
    questions += ["Which type of machine are you using?", "Do you wish to use mixed precision?"]
    assert [question for question in questions if question not in asked] == []


def test_tpus_are_refused():
    with pytest.raises(UserError, match=mentions("TPUs", "torch_xla", "accelerate config")):
        refuse_xla("DistributedType.XLA")
    refuse_xla("DistributedType.MULTI_GPU")


def test_deepspeed_answer_ends_the_script_in_one_line(cpu_commands):
    process = start(cpu_commands["sample_diffit"], ACCELERATE_USE_DEEPSPEED="true", LOCAL_RANK="0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output
    assert mentions("DeepSpeed", "accelerate config").search(output)


# --- how it computes


@pytest.fixture
def torch_flags():
    """Restores torch's global settings."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_flag_is_that_of_products_and_convolutions(allowed, torch_flags):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not allowed
    set_precision(DeviceConfig(allow_tf32=allowed))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)


def test_tf32_stays_off_where_accelerate_would_allow_it(train_args, monkeypatch, torch_flags):
    """`Accelerator` allows it if accelerate's config asks for torch.compile; cuDNN allows it by default."""
    seen = []

    def build(*arguments, **keywords):
        accelerator = Accelerator(*arguments, **keywords)
        torch.backends.cuda.matmul.allow_tf32 = True
        return accelerator

    monkeypatch.setattr("diffit.processes.Accelerator", build)

    def look(*arguments):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        raise InterruptedError

    monkeypatch.setattr("train_diffit.plan_batch", look)
    for flags in ([], ["--no-allow_tf32"], ["--allow_tf32"]):
        with pytest.raises(InterruptedError):
            train([*train_args, *flags])
    assert seen == [(False, False), (False, False), (True, True)]


def test_results_on_disk_tell_tf32_apart_only_where_it_matters(torch_flags):
    torch.backends.cuda.matmul.allow_tf32 = True
    assert tf32_settings(CUDA) == {"allow_tf32": True} and tf32_settings(torch.device("cpu")) == {}
    torch.backends.cuda.matmul.allow_tf32 = False
    assert tf32_settings(CUDA) == {}  # so that results of earlier versions are found


def test_samples_with_tf32_do_not_join_those_without(tmp_path, monkeypatch):
    DiffiTPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(tmp_path / "model")
    output = tmp_path / "samples"
    sample(tmp_path / "model", output, "--seeds=0")
    summary = json.loads((output / "samples.json").read_text())
    assert summary["arguments"].pop("allow_tf32") is False
    (output / "samples.json").write_text(json.dumps(summary))  # as an earlier version wrote it
    OutputFolder(output, "sample_diffit.py").record(["samples.json"])
    sample(tmp_path / "model", output, "--seeds=0-1")
    monkeypatch.setattr("sample_diffit.tf32_settings", lambda device: {"allow_tf32": True})
    with pytest.raises(UserError, match=mentions(f"--output_dir {output}", "--allow_tf32 False", True)):
        sample(tmp_path / "model", output, "--seeds=0-2")


def test_latents_with_tf32_do_not_join_those_without(tmp_path):
    metadata = {"num_images": 3, "images_per_shard": 2}
    prepare_latents.check_metadata(tmp_path / "latents", metadata)  # an earlier version
    prepare_latents.check_metadata(tmp_path / "latents", metadata | {"allow_tf32": False})
    with pytest.raises(UserError, match=mentions(f"--output_dir {tmp_path / 'latents'}", "allow_tf32", False, True)):
        prepare_latents.check_metadata(tmp_path / "latents", metadata | {"allow_tf32": True})


def test_features_with_tf32_are_kept_apart(tmp_path, monkeypatch):
    images = [torch.full((3, 2, 2), index, dtype=torch.uint8) for index in range(4)]
    extractor = FeatureExtractor("own", lambda batch: batch.flatten(1).float())
    for answer in ({}, {}, {"allow_tf32": True}):
        monkeypatch.setattr("diffit.features.tf32_settings", lambda device, answer=answer: answer)
        extract_features(PartialState(cpu=True), tmp_path, images, {"digest": "a"}, extractor)
    assert len(list(tmp_path.glob("features-*"))) == 2


@pytest.mark.parametrize("module", [parse_args, sample_diffit, eval_diffit, prepare_latents, train_vae])
def test_every_script_has_the_flags_of_the_device(module, cpu_commands):
    parse = module if callable(module) else module.parse_args
    name = "train_diffit" if callable(module) else module.__name__
    for flags, expected in (([], (False, False)), (["--cpu", "--allow_tf32"], (True, True))):
        config = parse([*cpu_commands[name][1:], *flags])
        asked = config.precision if name == "train_diffit" else config.device
        assert (asked.cpu, asked.allow_tf32) == expected


def test_cudnn_attention_is_kept_out(torch_flags, caplog):
    caplog.set_level(logging.INFO)
    torch.backends.cuda.enable_cudnn_sdp(True)
    set_up_device(torch.device("cpu"), DeviceConfig())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_sets_up_its_device(script, cpu_commands, tmp_path):
    """In the script's own process, which ends at the first thing that is missing, or when it is done."""
    flags = cpu_commands[script][1:]
    code = f"import runpy, sys, torch, atexit; sys.argv = {[f'{script}.py', *flags]!r}\n"
    code += "atexit.register(lambda: print('cudnn', torch.backends.cuda.cudnn_sdp_enabled(), 'tf32', "
    code += "torch.backends.cudnn.allow_tf32))\n"
    code += f"runpy.run_path({script + '.py'!r}, run_name='__main__')"
    extra = {"train_vae": ["--max_train_steps=1"]}.get(script, [])
    code = code.replace("]\n", f", *{extra!r}]\n", 1) if extra else code
    process = start(["-c", code], OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=120)
    assert "cudnn False tf32 False" in output, output
    assert mentions("device", "cpu", torch.__version__).search(output)


def test_gpu_is_described_with_name_capability_and_memory(gpu):
    assert mentions("cuda:0", "NVIDIA H100", "9.0", "80.0 GiB", torch.__version__).search(describe_device(CUDA))


def test_bfloat16_before_ampere_warns_and_advises_fp16(gpu, caplog):
    warn_about_bfloat16(CUDA, True, "--mixed_precision fp16")
    assert caplog.text == ""
    gpu.name, gpu.major, gpu.minor = "Tesla T4", 7, 5
    warn_about_bfloat16(CUDA, False, "--mixed_precision fp16")
    assert caplog.text == ""
    warn_about_bfloat16(CUDA, True, "--mixed_precision fp16")
    assert mentions("Tesla T4", "7.5", "--mixed_precision fp16").search(caplog.text)


def test_flex_does_not_go_with_deterministic(train_args, capsys):
    message = refusal([*train_args, "--deterministic", "--attention_backend=flex"], capsys)
    assert mentions("--deterministic", "--attention_backend flex").search(message)
    parse_args([*train_args, "--deterministic", "--attention_backend=native"])


def test_readme_and_scripts_name_what_a_gpu_needs():
    readme = " ".join((ROOT / "README.md").read_text().split())
    section = readme.split("## On a GPU")[1].split(" ## ")[0]
    for word in ("driver", "580", "--cpu", "--allow_tf32", "TensorFloat-32", "--deterministic", "flex"):
        assert word in section, word
    for file in ("README.md", "configs/slurm/train.sbatch", "configs/slurm/train_preemptible.sbatch"):
        assert "GLOO_SOCKET_IFNAME" in (ROOT / file).read_text()
