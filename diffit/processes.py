# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The processes of a run, on one machine or many: launchers, joining, broadcasting, agreement and stop signals.

Nothing here synchronizes with the accelerator's device.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore

from diffit.config import RunConfig
from diffit.device_config import DeviceConfig, PrecisionConfig
from diffit.devices import (
    refuse_unsupported_answers,
    refuse_xla,
    set_precision,
    set_up_device,
    use_cpu,
    warn_about_bfloat16,
)
from diffit.errors import RunError, UserError, message_of
from diffit.launcher import EXIT_STOPPED, find_launcher, launcher_is_gone

logger = logging.getLogger(__name__)

START_TIMEOUT = timedelta(minutes=5)  # for all processes to start: imports may be slow on some machines
TIMEOUT = timedelta(hours=6)  # for collectives: another process may be reading millions of files
MAX_WORKERS = 8  # data-loader workers per process, unless more are asked for
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def join_slurm_step() -> None:
    """Makes `srun python train_diffit.py` one run by translating SLURM's environment variables into torch's.

    Does nothing under a launcher, which has set RANK, or in a step with a single task. The tasks meet on the first
    node of the step unless MASTER_ADDR and MASTER_PORT are exported.

    Raises:
        UserError: if WORLD_SIZE contradicts SLURM, or the first node cannot be determined.
    """
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks == "1" or "RANK" in os.environ:
        return
    if os.environ.setdefault("WORLD_SIZE", num_tasks) != num_tasks:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but srun started {num_tasks} tasks")
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        try:
            listed = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot determine the first node of {nodes}: {error}; export it as MASTER_ADDR") from None
        os.environ["MASTER_ADDR"] = listed.split()[0]
    # Steps that share a node need different ports, below the range from which Linux assigns ports automatically.
    step = 10 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + step % 10000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    # With --gpus-per-task each process sees only its own GPU, as number 0.
    os.environ["LOCAL_RANK"] = "0" if torch.accelerator.device_count() == 1 else os.environ["SLURM_LOCALID"]


def join_processes(asked: DeviceConfig | None = None, timeout: timedelta = TIMEOUT) -> PartialState:
    """Joins all processes of this launch into one process group, and sets up the device of each.

    Every script must call this before it builds an `Accelerator`, which then uses this state.

    Args:
        asked: the flags of the device; default: theirs.
        timeout: time-out of collectives. Waiting for processes to start has the shorter `START_TIMEOUT`.

    Raises:
        UserError: if a GPU cannot be used, or an answer of `accelerate config` is not supported.
        RunError: names the processes that did not start.
    """
    asked = asked or DeviceConfig()
    join_slurm_step()
    refuse_unsupported_answers()
    cpu = use_cpu(asked)
    store = meet()  # kept until the process group has its own store, since the main process may host this one
    if store is not None:
        device = "cpu" if cpu else torch.accelerator.current_accelerator().type
        check_devices(store, device, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    # Without `cpu`, each of several CPU processes would believe that it is the only one.
    if cpu:
        with gloo_errors():
            state = PartialState(cpu=True, timeout=START_TIMEOUT)
        set_gloo_timeout(None, timeout)
    else:
        state = PartialState(timeout=timeout)
    del store
    refuse_xla(state.distributed_type)
    set_up_device(state.device, asked, state.num_processes)
    return state


def build_accelerator(precision: PrecisionConfig, run: RunConfig) -> Accelerator:
    """Builds the `Accelerator` with the run's precision and trackers, after `join_processes`.

    Raises:
        UserError: if the launcher's processes do not see each other, or fp16 is requested on a CPU.
    """
    device = PartialState().device
    if precision.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError(
            "--mixed_precision fp16 is not supported on CPUs (accelerate would train in fp32): use bf16 or no"
        )
    if precision.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    logging_dir = str(Path(run.output_dir, run.logging_dir))
    # torch 2.13 calls it `forward_sync_buffers`, which earlier versions do not know.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=device.type == "cpu",  # as in `join_processes`
        mixed_precision=precision.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=logging_dir),
        # The buffers are constants, and each step would broadcast them; views save a second copy of the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    check_launch(accelerator)
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":  # from accelerate's own config
        raise UserError("mixed precision fp16 is not supported on CPUs: give --mixed_precision bf16 or no")
    set_precision(precision)
    warn_about_bfloat16(device, accelerator.mixed_precision == "bf16", "--mixed_precision fp16")
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuses a launch whose processes do not see each other.

    Raises:
        UserError: names the expected and the actual number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes (WORLD_SIZE), but accelerate sees "
            f"{accelerator.num_processes}; see the launch commands in README.md"
        )
    if is_alone_of_several():
        raise UserError(
            "accelerate launch has started only one process, regardless of --num_processes, as it does with --cpu and "
            "on machines with fewer than two GPUs: use --config_file configs/accelerate/cpu_multi_process.yaml, or "
            "--num_processes 1"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch/pytorch issue 135712
        logger.warning("torchrun --max_restarts may fail unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is exported")


def is_alone_of_several() -> bool:
    """Whether `accelerate launch` was asked for several processes, but has started this one only.

    It then sets MASTER_ADDR and MASTER_PORT, but no rank. The user may have exported these for other runs: what the
    launcher itself was given says nothing.
    """
    if "ACCELERATE_USE_CPU" not in os.environ or "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return False
    launcher, given = find_launcher(), {}
    if launcher is not None:
        with contextlib.suppress(psutil.Error):
            given = launcher.environ()
    return any(os.environ.get(name) != given.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))


def _did_not_meet(message: str) -> RunError:
    error = RunError(message)
    error.raised_in = "process"  # every process reports it, since others may not exist
    return error


def meet(timeout: timedelta = START_TIMEOUT) -> TCPStore | None:
    """Waits until all processes of this launch have started.

    torch has a single time-out for starting and for collectives, and NCCL notices a missing process only in the first
    collective. Therefore the processes wait for each other here first.

    Args:
        timeout: time-out of this wait.

    Returns:
        The store in which the processes met, or None if there is only one process.

    Raises:
        RunError: names the processes that did not start.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    minutes = f"{timeout.total_seconds() / 60:g} minutes"
    me = f"process {rank} of {world_size} on {socket.gethostname()}"
    try:
        store = TCPStore(
            *(host, port, world_size),
            is_master=rank == 0 and not hosted_by_launcher,
            timeout=timeout,
            wait_for_workers=False,  # torch's own wait would not say which ones are missing
            multi_tenant=True,  # the process group will share the port
            use_libuv=os.environ.get("USE_LIBUV", "0" if sys.platform == "win32" else "1") == "1",
        )
    except RuntimeError as error:
        if rank == 0 and not hosted_by_launcher:
            raise _did_not_meet(f"{me}: cannot listen at {host}:{port}: {error}") from None
        awaited = "the launcher" if hosted_by_launcher else "process 0"
        raise _did_not_meet(f"{me}: no answer from {awaited} at {host}:{port} for {minutes}: {error}") from None
    started = PrefixStore("diffit-started", store)
    keys = [str(index) for index in range(world_size)]
    try:
        started.set(str(rank), "")
        if rank == 0:  # only one process checks all keys, which scales to thousands of processes
            started.wait(keys, timeout)
            started.set("all", "")
        started.wait(["all"], timeout)
    except RuntimeError as error:
        try:
            missing = [key for key in keys if not started.check([key])] or ["0"]  # process 0 did not set "all"
            problem = f"waited {minutes} for process {', '.join(missing)}, which did not start"
        except RuntimeError:
            problem = f"lost the connection to the store at {host}:{port}, through which processes meet: {error}"
        raise _did_not_meet(f"{me}: {problem}") from None
    return store


def check_devices(store: Store, device: str, rank: int, world_size: int) -> None:
    """Refuses processes that would compute on different kinds of devices. Must be called by all processes.

    They would choose different backends and wait for each other in vain, so this comes before the process group.

    Args:
        store: in which the processes have met.
        device: kind of this process's device, such as `cuda` or `cpu`.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: in all processes, names the first one with another device than process 0, and its machine.
    """
    answers = PrefixStore("diffit-devices", store)
    answers.set(str(rank), f"{device} on {socket.gethostname()}")
    if rank == 0:
        found = [answers.get(str(index)).decode() for index in range(world_size)]
        other = next((index for index, answer in enumerate(found) if answer.split()[0] != device), None)
        refusal = "" if other is None else f"process {other} would compute on {found[other]}, process 0 on {found[0]}"
        answers.set("refusal", refusal)
    refusal = answers.get("refusal").decode()
    if refusal:
        answers.set(f"read by {rank}", "")
        if rank == 0:  # it may host the store
            answers.wait([f"read by {index}" for index in range(world_size)], START_TIMEOUT)
        raise_in_all(UserError, f"{refusal}: give --cpu to all of them, or none")


@contextlib.contextmanager
def gloo_errors() -> Iterator[None]:
    """Says what helps if gloo cannot connect the processes in the `with` block.

    gloo uses the network interface to which the machine's own name resolves. In containers and on Debian that may be
    the loopback, where no other machine answers. NCCL finds its interfaces by itself.

    Raises:
        RunError: names GLOO_SOCKET_IFNAME.
    """
    try:
        yield
    except RuntimeError as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        raise _did_not_meet(
            f"{socket.gethostname()}: gloo cannot connect the processes on the network interface "
            f"{interface or 'of the name of this machine'}: {message_of(error)}. Export GLOO_SOCKET_IFNAME="
            f"INTERFACE with the one on which this machine reaches the others, as listed by `ip -brief address`"
        ) from error


def set_gloo_timeout(group: ProcessGroup | None, timeout: timedelta) -> None:
    """Sets the time-out of a gloo group's collectives, which was that of its connecting until now.

    Args:
        group: the group, or None for the default one, if there is any.
        timeout: for each collective from now on.
    """
    if torch.distributed.is_initialized():
        (group or torch.distributed.group.WORLD).set_timeout(timeout)


def raise_in_all(kind: type[UserError] | type[RunError], message: str, cause: BaseException | None = None) -> NoReturn:
    """Raises an error that all processes of the run raise, so that only one of them prints it."""
    error = kind(message)
    error.raised_in = "run"
    raise error from cause


def run_on_main_and_broadcast(accelerator: Accelerator, function: Callable, *arguments):
    """Runs a function in the main process and broadcasts its result. Must be called by all processes.

    Raises:
        UserError: in all processes, if the function raised one.
        RunError: in the other processes, if the function raised another error, which the main process re-raises.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = function(*arguments)
        except Exception as error:
            failure = error
    outcome = [result, None if failure is None else (isinstance(failure, UserError), message_of(failure))]
    broadcast_object_list(outcome)
    if outcome[1] is None:
        return outcome[0]
    is_user_error, message = outcome[1]
    if is_user_error:
        raise_in_all(UserError, message, failure)
    if failure is not None:
        raise failure
    raise_in_all(RunError, f"process 0 failed: {message}")


def on_all_processes(accelerator: Accelerator, function: Callable, *arguments):
    """Runs a function in every process and returns its result; if it fails in one process, all of them raise.

    The main process runs it first, so that the others find its caches filled.

    Raises:
        UserError: in all processes, if the function raised one in any; if it did in several, the first one's. The
            message names the process unless it is the main process.
        RunError: in processes where the function succeeded, if it raised another error in some process.
    """
    result, failure = None, None
    with accelerator.main_process_first():
        try:
            result = function(*arguments)
        except Exception as error:
            failure = error
    place = ""
    if not accelerator.is_main_process:
        place = f"process {accelerator.process_index} on {socket.gethostname()}: "
    reports = gather_object(
        [None if failure is None else (isinstance(failure, UserError), message_of(failure), place)]
    )
    failures = [report for report in reports if report is not None]
    if not failures:
        return result
    for is_user_error, message, where in failures:
        if is_user_error:
            raise_in_all(UserError, where + message, failure)
    if failure is not None:
        raise failure
    _, message, where = failures[0]
    raise_in_all(RunError, f"{where or 'process 0 failed: '}{message}")


def check_agreement(accelerator: Accelerator, values: dict) -> None:
    """Refuses a run unless all processes have the same values as the main process. Must be called by all processes.

    Args:
        accelerator: this process among all processes.
        values: values by a name that the user understands, such as a flag.

    Raises:
        UserError: in all processes, names the values that differ, the process and its machine.
    """
    hosts = gather_object([(socket.gethostname(), values)])
    main_host, expected = hosts[0]
    for index, (host, got) in enumerate(hosts):
        differ = [name for name in expected | got if expected.get(name) != got.get(name)]
        if differ:
            listed = "; ".join(f"{name} is {got.get(name)} instead of {expected.get(name)}" for name in differ)
            raise_in_all(
                UserError,
                f"process {index} on {host} differs from process 0 on {main_host}: {listed}. All processes must have "
                "the same arguments, data and code",
            )


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and a time limit into a stop of all processes at the same step.

    The processes exchange their requests over a CPU process group during the next step, so the agreement costs no
    device time and takes effect one step late. A second SIGINT (Ctrl-C) stops at once, and so does any signal before
    training has begun.

    Python runs signal handlers in the main thread between two Python instructions, and so not while that thread waits
    for other processes in C++. Therefore a separate thread sees every signal as well. It ends the process if it does
    not exit in time before training has begun, or `LAST_SECONDS` after its launcher's death.

    Outside the main thread, as in a notebook or web application that trains in the background, no signal is handled,
    and only the time limit stops the training.

    Args:
        max_train_time: time limit in minutes from now, or None for no limit.
    """

    PATIENCE = 5  # seconds for Python's handler to run, before training has begun
    LEAVING_PATIENCE = 60  # seconds for the process to release the folder after that, on a busy machine
    # Seconds after the launcher's death for one step and a checkpoint. A checkpoint that takes longer is lost; the
    # previous one is not.
    LAST_SECONDS = 600

    def __init__(self, max_train_time: float | None = None):
        self.has_begun = False
        self.is_leaving = False
        self.signalled = False
        self.signal_name: str | None = None
        self.first_signal = math.inf
        self.deadline = math.inf if max_train_time is None else time.monotonic() + 60 * max_train_time
        self.group = None
        self.exchange = None
        self.closed = threading.Event()
        self.sees_signals = threading.current_thread() is threading.main_thread()
        if not self.sees_signals:  # Python allows no other thread to handle signals
            logger.warning(
                "training outside the main thread: signals such as SIGTERM end this process without a checkpoint"
            )
            return
        self.earlier = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        # Python's C-level handler writes the number of each signal here, whatever the main thread is doing.
        self.numbers, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        self.earlier_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        _wakeup_fds.add(self.wakeup.fileno())
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        """Marks the beginning of training: from now on a stop saves a checkpoint. Must be called by all processes."""
        if torch.distributed.is_initialized():
            PartialState().wait_for_everyone()  # so that the short time-out is for connecting alone
            with gloo_errors():
                self.group = torch.distributed.new_group(backend="gloo", timeout=START_TIMEOUT)
            set_gloo_timeout(self.group, TIMEOUT)
        self.has_begun = True

    def _handle(self, number: int, frame) -> None:
        if not self.has_begun:
            self.signalled = True  # in case the exception is swallowed, as it is in a destructor
            if self.is_leaving:  # a second signal must not interrupt the release of the folder
                return
            self.is_leaving = True
            logger.warning("stopped before the training began")
            sys.exit(EXIT_STOPPED)
        now, self.signal_name = time.monotonic(), signal.Signals(number).name
        self.first_signal = min(self.first_signal, now)
        # The terminal sends Ctrl-C to all processes, and the launcher forwards it: within a second it is the same one.
        if number == signal.SIGINT and now - self.first_signal > 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signalled = True

    def _watch(self) -> None:
        while received := self.numbers.recv(4096):  # empty once `close` has shut down the other end
            if not any(number in STOP_SIGNALS for number in received):
                continue
            if launcher_is_gone():
                signal.alarm(self.LAST_SECONDS)  # the kernel's timer works even if a C++ call never returns
            if self.has_begun or self.closed.wait(self.PATIENCE):
                continue
            if self.is_leaving and self.closed.wait(self.LEAVING_PATIENCE):
                continue
            if not self.has_begun:
                # Written to the file descriptor, since the stuck main thread may hold the locks of Python's streams.
                os.write(2, b"stopped before the training began, while waiting for other processes\n")
                os._exit(EXIT_STOPPED)
        self.numbers.close()

    def reason(self) -> str:
        """Why this process stops, for the log: a signal, the time limit or another process."""
        if self.signal_name is not None:
            return f"{self.signal_name}, because the launcher is gone" if launcher_is_gone() else self.signal_name
        return "--max_train_time" if time.monotonic() > self.deadline else "another process was asked to stop"

    def is_wanted(self) -> bool:
        """Whether this process was asked to stop. The other processes may not know yet."""
        return self.signalled or time.monotonic() > self.deadline

    def is_wanted_anywhere(self) -> bool:
        """Whether any process was asked to stop. Must be called by all processes, which wait for each other."""
        if self.group is None:
            return self.is_wanted()
        flag = torch.tensor([int(self.is_wanted())])
        torch.distributed.all_reduce(flag, group=self.group)
        return flag.item() > 0

    def agreed(self) -> bool:
        """Whether all processes must stop now. Must be called by all processes, once after each optimizer step."""
        if self.group is None:
            return self.is_wanted()
        agreed = self._result()
        flag = torch.tensor([int(self.is_wanted())])
        self.exchange = (torch.distributed.all_reduce(flag, group=self.group, async_op=True), flag)
        return agreed

    def _result(self) -> bool:
        if self.exchange is None:
            return False
        work, flag = self.exchange
        work.wait()
        self.exchange = None
        return bool(flag.item() > 0)

    def close(self) -> None:
        """Finishes the last exchange and restores the earlier signal handlers. A second call does nothing."""
        if self.closed.is_set():
            return
        try:
            self._result()
        finally:
            self.closed.set()
            if self.sees_signals:
                self._release_signals()

    def _release_signals(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.earlier_wakeup)
        _wakeup_fds.discard(self.wakeup.fileno())
        self.wakeup.shutdown(socket.SHUT_WR)  # ends the thread; `close` would not while a forked process is alive
        self.wakeup.close()


_wakeup_fds: set[int] = set()  # the file descriptors of this process's open StopRequests


def _keep_signals_to_ourselves() -> None:
    """Keeps a forked process from reporting its signals to its parent, with which it shares the file descriptors."""
    if _wakeup_fds:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_signals_to_ourselves)


def ignore_stop_signals(worker_id: int) -> None:
    """Makes a data-loader worker ignore stop signals, which a terminal or SLURM sends to the whole process group.

    The training process still needs its workers to finish the step. Used as `worker_init_fn`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def count_workers(asked: int | None) -> int:
    """Number of data-loader workers of each process: --dataloader_num_workers, or the CPU cores it may use, at most 8.

    Launchers say how many processes share the cores of a machine. (SLURM gives each its own.)
    """
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_restarted() -> bool:
    """Whether torchrun or SLURM has restarted this command."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("TORCHELASTIC", "SLURM"))
