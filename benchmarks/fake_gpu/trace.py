"""Counts what runs on the fake GPU, phase by phase."""

import gc
import sys
import weakref
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.fake_gpu import ROOT, device

# Operators that launch no kernel: views, and allocations.
VIEWS = set(
    "alias as_strided chunk detach diagonal expand lift_fresh permute select slice split split_with_sizes squeeze t "
    "transpose unbind unfold unsafe_split unsqueeze view view_as_complex view_as_real _reshape_alias "
    "_unsafe_view".split()
)
ALLOCATIONS = set("empty empty_like empty_strided new_empty new_empty_strided resize_ set_ set_data".split())
SYNCHRONIZING = set(
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim _linalg_eigh _linalg_svd".split()
)
FREE = VIEWS | ALLOCATIONS
INDEXING = set("index index_put index_put_ _index_put_impl_".split())
EMPTY = {f"aten::{name}" for name in ALLOCATIONS}
SMALL = 2048  # elements of a tensor whose values are known
BLOCK = 512  # bytes; torch's allocator rounds sizes up to multiples of this
PAGEABLE = 2**16  # bytes; CUDA stages smaller copies out of pageable memory at once


@dataclass
class Counts:
    """What one phase did on the device, such as an optimizer step.

    Attributes:
        operators: number of calls of each operator that launches kernels.
        casts: number of those that only convert to another dtype.
        bytes: that the operators read and wrote, each tensor once a call.
        synchronizations: places where the host waits for all the work before, and how often.
        event_waits: number of waits for an event, which may be recorded long before.
        copies: number of asynchronous copies between host and device, by direction and place.
        pageable: places with large asynchronous copies out of memory that is not pinned: these are not asynchronous.
        attention: number of calls of each attention kernel.
        start: live bytes on the device at the beginning.
        peak: the most live bytes.
    """

    operators: Counter = field(default_factory=Counter)
    casts: int = 0
    bytes: int = 0
    synchronizations: Counter = field(default_factory=Counter)
    event_waits: int = 0
    copies: Counter = field(default_factory=Counter)
    pageable: Counter = field(default_factory=Counter)
    attention: Counter = field(default_factory=Counter)
    start: int = 0
    peak: int = 0

    @property
    def num_operators(self) -> int:
        return sum(self.operators.values())

    @property
    def num_synchronizations(self) -> int:
        return sum(self.synchronizations.values())


class Trace(TorchDispatchMode):
    """While it is entered, CUDA tensors are fake and counted; CPU tensors are real unless they come from the device.

    Attributes:
        phases: the counts of each phase by its name.
    """

    def __init__(self):
        super().__init__()
        self.phases: dict[str, Counts] = {}
        self.live: dict[int, weakref.ref] = {}  # storage -> reference that keeps track of its end
        self.bytes = 0
        self.pinned = weakref.WeakSet()
        self.modes = ExitStack()
        self.begin("setup")

    def __enter__(self):
        self.modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        FakeTensor.numpy = lambda tensor, force=False: to_numpy(tensor)
        FakeTensor.tolist = lambda tensor: to_numpy(tensor.cpu()).tolist()
        torch.cuda.max_memory_allocated = lambda *args: self.now.peak
        return super().__enter__()

    def __exit__(self, *error):
        self.settle()
        super().__exit__(*error)
        self.modes.close()

    def begin(self, phase: str) -> None:
        """Everything from now on belongs to this phase; a phase may be continued."""
        self.settle()
        gc.collect()
        self.now = self.phases.setdefault(phase, Counts(start=self.bytes))
        self.now.peak = max(self.now.peak, self.bytes)

    def settle(self) -> None:
        """Moves what `device` has counted into the current phase."""
        if self.phases:
            self.now.attention += device.ATTENTION
            self.now.event_waits += device.EVENTS["event"]
            if device.EVENTS["device"]:
                self.now.synchronizations["synchronize"] += device.EVENTS["device"]
        device.ATTENTION.clear()
        device.EVENTS.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = kwargs.get("device")
        if name in ("_pin_memory", "is_pinned"):
            return self.pin(name, inputs[0])
        if not any(isinstance(x, FakeTensor) for x in inputs) and torch.device(target or "cpu").type != "cuda":
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        on_device = any(x.device.type == "cuda" for x in inputs)
        if on_device and (name in SYNCHRONIZING or name in INDEXING and _stalls(inputs[1:])):
            self.now.synchronizations[f"{name.removeprefix('_')}: {place()}"] += 1
        if name == "_local_scalar_dense":
            return to_numpy(inputs[0]).item()
        if name == "equal":
            return bool(np.array_equal(*map(to_numpy, inputs)))
        if name == "nonzero":  # the shape of the result depends on values
            rows = np.argwhere(to_numpy(inputs[0]))
            output = torch.empty(rows.shape, dtype=torch.int64, device=inputs[0].device)
            output.value = torch.from_numpy(rows)
            return output
        crosses = name in ("_to_copy", "copy_") and self.copy(name, inputs, args, kwargs)
        outputs = function(*args, **kwargs)
        tensors = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        _follow_values(function, args, kwargs, inputs, tensors)
        if on_device or any(x.device.type == "cuda" for x in tensors):
            self.count(name, inputs, tensors, launches=not crosses and name not in FREE)
        return outputs

    def pin(self, name: str, tensor: torch.Tensor) -> torch.Tensor | bool:
        """`pin_memory` and `is_pinned` of a real tensor; the memory is an ordinary copy."""
        with unset_fake_temporarily():
            if name == "is_pinned":
                return tensor.untyped_storage() in self.pinned
            tensor = tensor.clone()
            self.pinned.add(tensor.untyped_storage())
            return tensor

    def copy(self, name: str, inputs: list[torch.Tensor], args: tuple, kwargs: dict) -> bool:
        """Counts a copy if it is between host and device: asynchronous, or the host waits for all the work before."""
        if name == "copy_":
            target, source = inputs[0].device.type, inputs[-1]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        else:
            source = inputs[0]
            target = torch.device(kwargs.get("device") or source.device).type
            non_blocking = kwargs.get("non_blocking", False)
        if source.device.type == target:
            return False
        direction = "to the device" if target == "cuda" else "to the host"
        where = f"{direction}: {place()}"
        if not non_blocking:
            self.now.synchronizations[where] += 1
            return True
        self.now.copies[where] += 1
        is_large = target == "cuda" and source.nbytes > PAGEABLE
        if is_large and not isinstance(source, FakeTensor) and source.untyped_storage() not in self.pinned:
            self.now.pageable[where] += 1
        return True

    def count(self, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], launches: bool) -> None:
        """Counts an operator on the device if it launches kernels, and the memory that it allocated."""
        now = self.now
        if launches:
            now.operators[name] += 1
            now.bytes += sum(_extent(x) for x in {id(x): x for x in inputs}.values() if x.device.type == "cuda")
            now.bytes += sum(_extent(x) for x in outputs if x.device.type == "cuda")
            now.casts += _is_cast(name, inputs, outputs)
        for tensor in outputs:
            if tensor.device.type == "cuda":
                self.hold(tensor.untyped_storage())
        now.peak = max(now.peak, self.bytes)

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage as live until it is gone."""
        key = storage._cdata
        if key in self.live and self.live[key]() is not None:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def gone(reference: weakref.ref) -> None:
            self.bytes -= size
            if self.live.get(key) is reference:
                del self.live[key]

        self.live[key] = weakref.ref(storage, gone)
        self.bytes += size


def place() -> str:
    """The innermost line of this project on the stack, and in brackets that of the library that it has called."""
    frame, innermost = sys._getframe(2), None
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        spot = f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
        if file.is_relative_to(ROOT) and not {"fake_gpu", "site-packages"} & set(file.parts):
            inside = "" if innermost is None else f" ({innermost})"
            return f"{file.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}{inside}"
        if innermost is None and not {"fake_gpu", "torch"} & set(file.parts):
            innermost = spot
        frame = frame.f_back
    return innermost or "?"


def _extent(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; an expanded one has fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_cast(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    if name in ("_to_copy", "copy_", "_foreach_copy_"):
        source, target = (inputs[0], outputs[0]) if name == "_to_copy" else (inputs[-1], inputs[0])
        return source.dtype != target.dtype and source.device.type == target.device.type == "cuda"
    return False


def _stalls(indices: list[torch.Tensor]) -> bool:
    """Whether indexing waits: for the number of elements of a mask, or for the copy of an index from the host."""
    return any(
        x.dtype in (torch.bool, torch.uint8) or x.device.type == "cpu" and x.dtype in (torch.int32, torch.int64)
        for x in indices
    )


# ---------------------------------------------------------------------------------------------------------------------
# Values
#
# Control flow of the host may depend on what it reads back, such as the noise levels of a scheduler. So small tensors
# carry the values that they would have, as long as these come from the host. All else reads as zero, and is finite.


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values of a tensor on the CPU; None if they are not known."""
    if not isinstance(tensor, FakeTensor):
        return tensor if tensor.device.type == "cpu" else None
    value = getattr(tensor, "value", None)
    return None if value is None or getattr(value.untyped_storage(), "is_stale", False) else value


def to_numpy(tensor: FakeTensor) -> np.ndarray:
    """What the host reads."""
    value = value_of(tensor)
    with unset_fake_temporarily():
        if value is not None:
            return value.detach().numpy().copy()
        dtype = torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype
    return np.full(tuple(tensor.shape), getattr(tensor, "is_finite", False), dtype)


def _follow_values(
    function: torch._ops.OpOverload, args: tuple, kwargs: dict, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> None:
    """Computes the values of small outputs from those of the inputs, or forgets what is overwritten."""
    known = [value_of(x) for x in inputs]
    is_random = torch.Tag.nondeterministic_seeded in function.tags
    is_small = bool(outputs) and all(x.numel() <= SMALL for x in outputs) and function._schema.name not in EMPTY
    if is_small and not is_random and all(x is not None for x in known):
        on_host = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        with unset_fake_temporarily(), suppress(NotImplementedError):  # by an operator that only a GPU has
            values = tree_map_only(torch.Tensor, value_of, (args, kwargs))
            values = tree_leaves(function(*values[0], **values[1] | on_host))
            for output, value in zip(outputs, values, strict=True):
                output.value = value
    elif function._schema.is_mutable:
        for tensor, value in zip(inputs, known, strict=True):
            if isinstance(tensor, FakeTensor) and value is not None:
                value.untyped_storage().is_stale = True
    _follow_finiteness(function.overloadpacket.__name__, args, inputs, outputs)


def _follow_finiteness(name: str, args: tuple, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """Follows whether a bool says that values are finite, as all on this device are."""
    if not outputs or outputs[0].dtype != torch.bool or not inputs:
        return
    finite = getattr(inputs[0], "is_finite", False)
    if name in ("eq", "ne") and inputs[0].dtype.is_floating_point:  # the parts of `isfinite`: x == x, abs(x) != inf
        finite = (args[0] is args[1]) if name == "eq" else args[1] == float("inf")
    elif name in ("bitwise_not", "logical_not"):
        finite = not finite
    elif name in ("mul", "bitwise_and", "logical_and"):
        finite = finite and getattr(inputs[-1], "is_finite", False)
    for output in outputs:
        if isinstance(output, FakeTensor):
            output.is_finite = finite
