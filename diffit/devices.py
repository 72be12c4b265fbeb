# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The device: refusing a GPU that cannot be used, answers of `accelerate config`, and how float32 is computed.

Without this, a GPU whose driver is too old or that a container does not pass on would silently be replaced by the CPU.
"""

import logging
import os
import re
import sys
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from diffit.device_config import DeviceConfig
from diffit.errors import UserError, global_rank, local_rank, message_of

logger = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
NVIDIA_DEVICES = Path("/dev")
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; earlier GPUs emulate bfloat16
# Environment variables by which `accelerate launch` passes on answers that no script supports.
UNSUPPORTED_ANSWERS = {
    "ACCELERATE_USE_DEEPSPEED": "Do you want to use DeepSpeed?",
    "ACCELERATE_USE_MEGATRON_LM": "Do you want to use Megatron-LM ?",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Do you want to use the parallelism config?",
    "ACCELERATE_USE_SAGEMAKER": "In which compute environment are you running?",
}


# ---------------------------------------------------------------------------------------------------------------------
# Answers of `accelerate config`


def refuse_unsupported_answers() -> None:
    """Refuses answers of `accelerate config` with which a training would fail later, or compute something else.

    Answers about FSDP are for `diffit.sharding`.

    Raises:
        UserError: names the question.
    """
    for variable, question in UNSUPPORTED_ANSWERS.items():
        if parse_flag_from_env(variable):
            answer = "This machine" if "environment" in question else "no"
            raise UserError(_unsupported(variable, "true", question, answer))
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp8":
        question = "Do you wish to use mixed precision?"
        raise UserError(_unsupported("ACCELERATE_MIXED_PRECISION", "fp8", question, "bf16, fp16 or no"))


def _unsupported(variable: str, value: str, question: str, answer: str) -> str:
    return f'the answer to "{question}" of `accelerate config` ({variable}={value}) is not supported: answer {answer}'


def refuse_xla(distributed_type: str) -> None:
    """Refuses TPUs, which accelerate selects wherever torch_xla is installed.

    Args:
        distributed_type: `PartialState().distributed_type`.

    Raises:
        UserError: names the question of `accelerate config`.
    """
    if str(distributed_type).rpartition(".")[2] == "XLA":
        raise UserError(
            'TPUs ("Which type of machine are you using?" of `accelerate config`) are not supported: choose another '
            "machine, or uninstall torch_xla"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A GPU that cannot be used


def use_cpu(asked: DeviceConfig) -> bool:
    """Whether to compute on the CPU: because of --cpu (or accelerate's own flag), or because there is no GPU.

    Raises:
        UserError: if there are signs of a GPU, or one that this build of torch has no kernels for; says why it cannot
            be used.
    """
    if asked.cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    if torch.accelerator.is_available():
        check_architecture(local_rank())
        return False
    signs = signs_of_gpu()
    if signs:
        raise UserError(
            f"there are signs of a GPU ({', '.join(signs)}), but {why_unusable()}. Give --cpu to compute on the CPU"
        )
    if nvidia_devices() and not _is_gpu_build():
        logger.warning(
            f"computing on the CPU: this machine has a GPU ({nvidia_devices()[0]}), but torch {torch.__version__} is "
            "a build without CUDA"
        )
    return True


def nvidia_devices() -> list[str]:
    """The device files of NVIDIA's GPUs on this machine, or in this container, such as `/dev/nvidia0`."""
    files = NVIDIA_DEVICES.glob("nvidia*")
    return sorted(str(file) for file in files if re.fullmatch(r"nvidia\d+", file.name))


def signs_of_gpu() -> list[str]:
    """What says that this process should compute on a GPU.

    torch's CUDA build is none: it is the default on CPU-only machines, too. Nor is a device that torch's build cannot
    use, because installing a CPU build is a decision.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    signs = nvidia_devices() if _is_gpu_build() else []
    if visible.strip() not in ("", "-1", "NoDevFiles"):  # SLURM writes the last one into jobs without GPUs
        signs.append(f"CUDA_VISIBLE_DEVICES={visible}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if "LOCAL_RANK" in os.environ and precision in ("bf16", "fp16"):  # of several processes without CPU
        signs.append(f"multi-GPU training in {precision} in accelerate's config")
    return signs


def _is_gpu_build() -> bool:
    return torch.version.cuda is not None or torch.version.hip is not None


def why_unusable() -> str:
    """Why torch finds no GPU: its build, a hidden device, or what its initialization of CUDA says."""
    build = f"torch {torch.__version__}"
    if not _is_gpu_build():
        return f"{build} is a build without CUDA: install one with it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: unset it"
    try:
        torch.cuda.init()
        reason = f"CUDA finds {torch.cuda.device_count()} devices"
    except (RuntimeError, AssertionError) as error:  # torch names the version of a driver that is too old
        reason = message_of(error).rstrip(".")
    facts = [reason, f"{build} needs a driver for CUDA {torch.version.cuda}"]
    if not nvidia_devices():
        facts.append("there is no /dev/nvidia0: a container must be started with its GPUs (docker run --gpus all)")
    elif NVIDIA_DRIVER.is_file():
        version = re.search(r"\d+\.\d+(\.\d+)?", NVIDIA_DRIVER.read_text(errors="replace"))
        facts.append(f"the driver is {version[0] if version else 'of an unknown version'}")
    else:
        facts.append(f"{NVIDIA_DRIVER} does not exist: the driver is not loaded, or not passed on to this container")
    return "; ".join(facts)


def check_architecture(index: int) -> None:
    """Refuses an NVIDIA GPU for which this build of torch has no kernels; its first operation would fail.

    Args:
        index: number of the GPU on this machine.

    Raises:
        UserError: names the GPU, its compute capability and the architectures of the build.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return
    index = index if index < torch.cuda.device_count() else 0  # each process may see its own GPU only
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if architectures and not any(runs_on(architecture, capability) for architecture in architectures):
        raise UserError(
            f"the GPU {torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, but "
            f"torch {torch.__version__} has kernels for {', '.join(architectures)} only: install another build of "
            "torch. Give --cpu to compute on the CPU"
        )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether kernels run on a GPU.

    Args:
        architecture: `sm_XY`, machine code, which runs on GPUs of the same major and at least this minor version (with
            a suffix, such as `sm_90a`, on this version only); or `compute_XY`, which the driver compiles for any later
            GPU.
        capability: major and minor version of the GPU's compute capability.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if match is None:
        return False
    kind, version, suffix = match[1], (int(match[2]), int(match[3])), match[4]
    if suffix == "a":
        return version == capability
    return version <= capability and (kind == "compute" or version[0] == capability[0])


# ---------------------------------------------------------------------------------------------------------------------
# Setting it up


def set_up_device(device: torch.device, asked: DeviceConfig, num_processes: int = 1) -> None:
    """Fixes how the device computes, and logs what it is.

    Args:
        device: of this process.
        asked: the flags.
        num_processes: number of processes of the run, for the log.
    """
    set_precision(asked)
    # cuDNN's attention serves only passes without a gradient of the bias. Sampling would use another kernel than
    # training, with open faults in torch 2.11 to 2.13: pytorch/pytorch issues 193893 and 196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if global_rank() == 0:
        announce(describe_device(device) + (f", {num_processes} processes" if num_processes > 1 else ""))


def set_precision(asked: DeviceConfig) -> None:
    """Allows or forbids TensorFloat-32 in float32 matrix products and convolutions.

    cuDNN's own default allows it. Building an `Accelerator` with torch.compile allows it in matrix products, so this
    must be called afterwards.
    """
    torch.backends.cuda.matmul.allow_tf32 = asked.allow_tf32
    torch.backends.cudnn.allow_tf32 = asked.allow_tf32


def tf32_settings(device: torch.device) -> dict[str, bool]:
    """What results depend on, for results kept on disk: `allow_tf32` where it has an effect, otherwise nothing."""
    return {"allow_tf32": True} if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else {}


def announce(text: str) -> None:
    """Logs a line; scripts without a log print it."""
    if logger.hasHandlers() and logger.isEnabledFor(logging.INFO):
        logger.info(text)
    else:
        print(text, file=sys.stderr)


def describe_device(device: torch.device) -> str:
    """One line: name, compute capability and memory of a GPU, or the number of threads of a CPU; version of torch."""
    build = f"torch {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        version = f"compute capability {properties.major}.{properties.minor}"
        return f"device: {device}, {properties.name}, {version}, {memory}, {build}"
    if device.type == "cpu":
        return f"device: cpu, {torch.get_num_threads()} threads, {build}"
    return f"device: {device}, {build}"


def warn_about_bfloat16(device: torch.device, is_used: bool, flag: str) -> None:
    """Warns of bfloat16 on GPUs that only emulate it. accelerate and torch accept it there.

    Args:
        device: of this process.
        is_used: whether the network computes in bfloat16.
        flag: with its value that avoids it, for the message.
    """
    if not is_used or device.type != "cuda" or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < BFLOAT16_CAPABILITY and global_rank() == 0:
        logger.warning(
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) emulates "
            f"bfloat16, and attention falls back to a slow kernel: give {flag}"
        )
