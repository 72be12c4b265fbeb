"""Attention without gradients, as in sampling and evaluation, against its definition: a check of `benchmarks/gpu.py`.

torch may choose another kernel there than in training: cuDNN's, which has no gradient of the bias. The scripts forbid
it (see `diffit.devices.set_up_device`), so a fault of it is reported but does not count.
"""

import copy
import itertools
import json
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_checks import (
    ROOT,
    TOLERANCES,
    Geometry,
    Report,
    autocast,
    deviations,
    dtype_name,
    free_memory,
    outputs_and_gradients,
    reason,
)
from diffit.networks import model_class, set_attention_backend
from diffit_model import TimeDependentSelfAttention

NUM_WINDOWS = 8
CHANNELS = {"in_channels": 3, "out_channels": 3}  # where a config leaves them to the data


def inference_geometries() -> list[Geometry]:
    """16, 64, 256 and 1,024 tokens with 4 and 16 heads, and all attentions of the configs in `configs/model/`."""
    found = {(side, side): {(4, 32), (16, 72)} for side in (4, 8, 16, 32)}
    for file in sorted((ROOT / "configs/model").glob("*.json")):
        config = json.loads(file.read_text())
        config |= {name: channels for name, channels in CHANNELS.items() if config.get(name) is None}
        with torch.device("meta"):
            model = model_class(config).from_config(config)
        for module in model.modules():
            if isinstance(module, TimeDependentSelfAttention):
                heads = (module.num_attention_heads, module.attention_head_dim)
                found.setdefault(module.window, set()).add(heads)
    return [Geometry(window, *heads, NUM_WINDOWS) for window in sorted(found) for heads in sorted(found[window])]


def check_inference(
    report: Report, device: torch.device, geometries: list[Geometry], dtypes: list[torch.dtype]
) -> None:
    """Compares the kernel of the scripts, and cuDNN's, with the plain definition in float64."""
    row = report.table(
        "Attention without gradients",
        "As in sampling and evaluation: the largest deviation of the output from the plain definition in float64, as "
        "a share of its largest value, with the tolerances above. The scripts forbid cuDNN's kernel.",
        ["attention", "dtype", "kernel", "output", "verdict"],
    )
    for geometry, dtype in itertools.product(geometries, dtypes):
        attention, inputs = build_attention(geometry, device)
        reference = copy.deepcopy(attention).double()
        set_attention_backend(reference, "_native_math")
        expected = run_without_gradients(reference, [x.double() for x in inputs])
        set_attention_backend(attention, "native")

        def run(attention=attention, inputs=inputs, dtype=dtype) -> dict[str, torch.Tensor]:
            with autocast(device, dtype):
                return run_without_gradients(attention, inputs)

        def run_with_cudnn(run: Callable = run) -> dict[str, torch.Tensor]:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return run()

        for kernel, function in (("as in the scripts", run), ("cuDNN", run_with_cudnn)):
            names = [str(geometry), dtype_name(dtype), kernel]
            try:
                found = deviations(function(), expected)["output"]
            except Exception as error:
                is_ours = kernel != "cuDNN"
                verdict = report.verdict(False, ", ".join(names)) if is_ours else "not run"
                row(*names, "", f"{verdict}: {reason(error)}")
                continue
            right = found <= TOLERANCES[dtype]  # NaN is not
            row(*names, f"{found:.1e}", kernel_verdict(report, right, names))
        free_memory(device)


def kernel_verdict(report: Report, right: bool, names: list[str]) -> str:
    """The verdict on a kernel; cuDNN's is not counted, as the scripts do not use it."""
    if names[-1] == "cuDNN":
        return "ok" if right else "wrong, but not used"
    return report.verdict(right, f"inference of {', '.join(names)}")


def build_attention(geometry: Geometry, device: torch.device) -> tuple[TimeDependentSelfAttention, list[torch.Tensor]]:
    """An attention layer with a random bias table, and its tokens and time tokens."""
    torch.manual_seed(0)
    height, width = geometry.window
    channels = geometry.heads * geometry.head_dim
    attention = TimeDependentSelfAttention(channels, 64, geometry.heads, geometry.head_dim, geometry.window)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    shape = (geometry.num_windows, height * width, channels)
    inputs = [torch.randn(shape, device=device), torch.randn(2, 64, device=device)]
    return attention.to(device), inputs


def run_without_gradients(
    attention: TimeDependentSelfAttention, inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The output of a layer as inference computes it."""
    return outputs_and_gradients(attention, inputs, torch.empty(0), gradients=False)
