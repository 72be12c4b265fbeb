"""Stands in for the CUDA driver and for what torch decides by it: device properties, streams, attention kernels."""

import contextlib
import gc
import types
from collections import Counter

import torch
import torch.nn.functional as F
import torch.utils._foreach_utils
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CAPABILITY = (9, 0)
MEMORY = 80 * 2**30
ATTENTION = Counter()  # calls of each kernel
EVENTS = Counter()  # waits of the host: "event" for an event, "device" for all of the device's work

_real_attention = F.scaled_dot_product_attention
_library = torch.library.Library("aten", "IMPL")


class Event:
    """`torch.cuda.Event`: nothing to wait for, but waits are counted."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args) -> None:
        pass

    def wait(self, *args) -> None:
        pass

    def synchronize(self) -> None:
        EVENTS["event"] += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Stream(contextlib.nullcontext):
    """`torch.cuda.Stream`: all work is in order."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def wait_stream(self, *args) -> None:
        pass

    wait_event = record_event = wait_stream

    def synchronize(self) -> None:
        EVENTS["device"] += 1


class Graph:
    """`torch.cuda.CUDAGraph`: the outputs of the capture are the outputs of each replay."""

    def replay(self) -> None:
        pass


def install() -> None:
    """Makes torch report one GPU. Cannot be undone; called once in the server."""
    properties = types.SimpleNamespace(
        name="fake H100", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=132
    )
    cuda = {
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **{"device_count": 1, "current_device": 0, "get_device_capability": CAPABILITY},
        **{"get_device_properties": properties, "get_device_name": properties.name},
        **{"mem_get_info": (MEMORY, MEMORY), "max_memory_allocated": 0, "memory_allocated": 0},
        **{"get_rng_state": torch.zeros(16, dtype=torch.uint8), "get_arch_list": ["sm_90"]},
        **{"current_stream": Stream(), "default_stream": Stream(), "stream": Stream(), "graph": Stream()},
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats")),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state", "set_sync_debug_mode", "ipc_collect")),
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, _constant(value))
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = Event, Stream, Graph
    torch.cuda.synchronize = lambda *args: EVENTS.update(device=1)
    accelerator = {"is_available": True, "device_count": 1, "current_device_index": 0}
    accelerator["current_accelerator"] = torch.device("cuda")
    for name, value in accelerator.items():
        setattr(torch.accelerator, name, _constant(value))
    torch.cuda.amp.common.amp_definitely_not_available = _constant(False)
    F.scaled_dot_product_attention = attention
    FakeTensorMode.avoid_device_init = property(_constant(True))
    torch.autograd.set_multithreading_enabled(False)  # the backward pass, too, is counted in this thread
    torch.nn.Module._apply = _apply
    # The CUDA kernel, where a build without it would take the composition of seven operators.
    _library.impl("silu_backward", torch.library.fallthrough_kernel, "AutogradCUDA")
    torch.utils._foreach_utils._foreach_supported_types.extend([FakeTensor, torch.nn.Parameter])
    torch.utils.checkpoint.get_device_states = _constant(([], []))
    torch.utils.checkpoint.set_device_states = _constant(None)
    gc.collect()
    gc.freeze()  # what is there now need not be looked at by later collections


def enable_xformers() -> None:
    """Makes the installed xformers believe that its kernels for CUDA are there, as torch's own ones are."""
    import xformers.ops.fmha.common
    from torch._meta_registrations import meta__efficient_attention_backward as backward
    from torch._subclasses.fake_impls import register_op_impl
    from xformers.ops.fmha import cutlass

    torch.version.cuda, xformers.ops.fmha.common._built_with_cuda = "13.0", True
    for operator in (cutlass.FwOp, cutlass.BwOp):
        operator.SUPPORTED_ATTN_BIAS_TYPES = (*operator.SUPPORTED_ATTN_BIAS_TYPES, FakeTensor)

    @register_op_impl(torch.ops.aten._efficient_attention_backward.default)
    def without_output(mode, function, *args, **kwargs):
        with mode:  # torch 2.13's function of shapes lacks the argument `out`
            return backward(*args[:5], *args[6:], **kwargs)


def _constant(value):
    return lambda *args, **kwargs: value


def _apply(self: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`: moving to the fake device makes new parameters, since the data of one cannot become fake."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = function(parameter)
        if moved is not parameter and (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
            self._parameters[name] = torch.nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def choose_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The kernel that torch's dispatcher takes on this GPU, by the rules of its `sdp_utils.cpp`."""
    enabled, half = torch.backends.cuda, query.dtype in (torch.float16, torch.bfloat16)
    grad_of_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    width = query.shape[-1]
    if half and enabled.cudnn_sdp_enabled() and not grad_of_mask and width <= 128 and width % 8 == 0:
        return "cudnn"
    if half and enabled.flash_sdp_enabled() and mask is None and width <= 256:
        return "flash"
    return "efficient" if enabled.mem_efficient_sdp_enabled() else "math"


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention`, whose dispatcher a CPU build lacks for CUDA."""
    if query.device.type != "cuda":
        return _real_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if attn_mask is not None and (attn_mask.dtype not in (torch.bool, query.dtype) or not attn_mask.is_cuda):
        raise RuntimeError(f"attention of {query.dtype} with a mask of {attn_mask.dtype} on {attn_mask.device}")
    kernel = choose_kernel(query, key, value, attn_mask)
    ATTENTION[kernel] += 1
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if attn_mask is not None and kernel != "math":
        shape = (*query.shape[:-1], key.shape[-2])
        if kernel == "efficient" and shape[-1] % 16:  # torch pads the rows of the mask to whole vectors
            attn_mask = F.pad(attn_mask, (0, -shape[-1] % 16))[..., : shape[-1]]
        attn_mask = attn_mask.expand(shape)
    ops = torch.ops.aten
    if kernel == "cudnn":
        call, flags = ops._scaled_dot_product_cudnn_attention, (attn_mask, gradients, dropout_p, is_causal, False)
    elif kernel == "flash":
        call, flags = ops._scaled_dot_product_flash_attention, (dropout_p, is_causal, False)
    elif kernel == "efficient":
        call, flags = ops._scaled_dot_product_efficient_attention, (attn_mask, gradients, dropout_p, is_causal)
    else:
        call, flags = ops._scaled_dot_product_attention_math, (attn_mask, dropout_p, is_causal)
    return call(query, key, value, *flags, scale=scale)[0]
