"""A GPU that is not there: the project's own code runs on CUDA tensors without data, and every operator is counted.

`stub.cpp` makes a CPU build of torch accept CUDA tensors under `FakeTensorMode`, forward and backward. This shows
devices, dtypes, shapes, memory layouts, operators, bytes, live memory, copies and host synchronizations. It shows
neither kernels nor numbers: values read back from the device are zero, and finite.

    counts = fake_gpu.run(function, *arguments)   # in a separate process, where `function` finds a CUDA device

`trace.py` counts, `device.py` stands in for the driver, and `scripts.py` has the functions to run. This file must not
import torch, because the stub has to be loaded first.
"""

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffit  # noqa: F401 (before diffusers, see there)

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub.cpp")


def why_not() -> str | None:
    """The reason why there can be no fake GPU here, or None."""
    if sys.platform != "linux":
        return f"the fake GPU needs Linux, this is {sys.platform}"
    build = Path(_torch_folder(), "version.py").read_text()
    if other := re.search(r"^(cuda|hip|xpu)\b.*= '(.*)'$", build, re.MULTILINE):
        return f"the fake GPU needs a CPU build of torch, but this one is for {other[1]} {other[2]}"
    if compiler() is None:
        return "the fake GPU needs a C++ compiler: neither $CXX nor c++, g++ or clang++ is on the PATH"
    return None


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, filter(None, names))), None)


def _torch_folder() -> str:
    return importlib.util.find_spec("torch").submodule_search_locations[0]


def load_stub() -> None:
    """Compiles the stub (2 seconds) and loads it, before torch is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the stub of the fake GPU")
    folder = _torch_folder()
    with tempfile.TemporaryDirectory(prefix="diffit-fake-gpu-") as build:
        library = f"{build}/stub.so"
        options = ["-w", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{folder}/include"]
        links = [f"-L{folder}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{folder}/lib"]
        built = subprocess.run(
            [compiler(), *options, str(STUB), "-o", library, *links], capture_output=True, text=True
        )
        if built.returncode:
            raise RuntimeError(f"{STUB} does not compile with torch {folder}:\n{built.stderr}")
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def run(function: Callable, *arguments) -> Any:
    """Calls a function on the fake GPU, in a forked process whose imports are done, and returns its result.

    Args:
        function: a function of a module, which the process finds by name.
        arguments: its arguments; they and the result are pickled.

    Raises:
        RuntimeError: with the traceback and the output of the function, if it fails.
    """
    connection, _ = _start_server()
    connection.send((function, arguments))
    result, failure = connection.recv()
    if failure is not None:
        raise RuntimeError(f"{function.__name__} failed on the fake GPU\n{failure}")
    return result


@functools.cache
def _start_server() -> tuple[Connection, subprocess.Popen]:
    """Starts the process that has done the imports; it ends with this one.

    Not by multiprocessing, which would first import this program's main module, and torch with it.
    """
    ours, theirs = multiprocessing.Pipe()
    program = f"from benchmarks.fake_gpu import _serve; _serve({theirs.fileno()})"
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program]  # -P: the project of this file, whatever the current folder is
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    return ours, process


def _serve(handle: int) -> None:
    """Forks a process for each call, until the other side is gone."""
    connection = Connection(handle)
    load_stub()
    import benchmarks.fake_gpu.scripts  # noqa: F401 (with all that the scripts import)
    from benchmarks.fake_gpu import device

    device.install()
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        connection.send(_answer(*call))


def _answer(function: Callable, arguments: tuple) -> tuple[Any, str | None]:
    """Calls the function in a forked process; its result, or the traceback and the output."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryFile("w+") as log:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_call, args=(sender, log.fileno(), function, arguments))
        process.start()
        sender.close()
        try:
            result, failure = receiver.recv()
        except EOFError:
            result, failure = None, "the process died"
        process.join()
        if failure is not None:
            log.seek(0)
            failure += f"\n--- its output\n{log.read()[-20_000:]}"
    return result, failure


def _call(sender: Connection, log: int, function: Callable, arguments: tuple) -> None:
    """In the forked process."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
