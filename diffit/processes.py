# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Processes that work together, on one machine or many: how they meet, what they must agree on, when they stop.

Used by the scripts that run on several processes. Nothing here synchronizes with the accelerator's device."""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, parse_flag_from_env
from torch.distributed import PrefixStore, TCPStore

from diffit.config import PrecisionConfig, RunConfig
from diffit.errors import RunError, UserError, message_of
from diffit.launcher import EXIT_STOPPED, launcher_is_gone

logger = logging.getLogger(__name__)

START_TIMEOUT = timedelta(minutes=5)  # for processes that start together, whose imports may be slow on some machines
TIMEOUT = timedelta(hours=6)  # for waiting on other processes, of which one may be reading millions of files
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def join_slurm_step() -> None:
    """Makes `srun python train_diffit.py` one run: SLURM's variables become those that torch reads.

    Nothing is done under a launcher, which has set RANK, nor in a batch script or an interactive shell, which are one
    task at most. The tasks meet on the first node of the step, unless MASTER_ADDR and MASTER_PORT are exported.

    Raises:
        ValueError: if WORLD_SIZE is another number, or the first node cannot be found out.
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
            raise UserError(f"cannot tell the first node of {nodes}: {error}; export it as MASTER_ADDR") from None
        os.environ["MASTER_ADDR"] = listed.split()[0]
    # Steps that share a node need ports of their own, below those that Linux gives out by itself.
    step = 10 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + step % 10000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    # With --gpus-per-task a process sees one GPU, which is number 0 to it.
    os.environ["LOCAL_RANK"] = "0" if torch.accelerator.device_count() == 1 else os.environ["SLURM_LOCALID"]


def join_processes(timeout: timedelta = TIMEOUT) -> PartialState:
    """Joins this process and the others of its launch, if there are any, into one process group.

    To be called by every script before it builds an `Accelerator`, which then takes this state.

    Args:
        timeout: for collectives. Only the wait for processes that never come has the shorter `START_TIMEOUT`.

    Raises:
        RunError: names the processes that did not come.
    """
    join_slurm_step()
    store = meet()  # kept until the group has a store of its own: the main process may host it
    # Without `cpu`, several processes on CPUs all believe that they are the only one.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timeout)
    del store
    return state


def build_accelerator(precision: PrecisionConfig, run: RunConfig) -> Accelerator:
    """Sets up precision, trackers and this process's part of the launch, which `join_processes` has joined.

    Raises:
        UserError: if the launcher's processes do not see each other, or fp16 is asked for on a CPU.
    """
    if precision.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UserError(
            "--mixed_precision fp16 does not exist on a CPU (accelerate would train in fp32): use bf16 or no"
        )
    if precision.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if precision.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    logging_dir = str(Path(run.output_dir, run.logging_dir))
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # as `join_processes` has said already
        mixed_precision=precision.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=logging_dir),
    )
    check_launch(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # from accelerate's own config
        raise UserError("mixed precision fp16 does not exist on a CPU: give --mixed_precision bf16 or no")
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuses a launch whose processes do not see each other.

    Raises:
        UserError: says what the launcher was asked for and what there is.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes (WORLD_SIZE), but this one sees "
            f"{accelerator.num_processes}; see the launch commands in README.md"
        )
    # Where more than one process was asked for, `accelerate launch --cpu` sets the address and starts one.
    alone = accelerator.num_processes == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True"
    if alone and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process only, whatever --num_processes is: use "
            "--config_file configs/accelerate/cpu_multi_process.yaml"
        )
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch/pytorch issue 135712
        logger.warning("--max_restarts of torchrun may fail unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is exported")


def _did_not_meet(message: str) -> RunError:
    error = RunError(message)
    error.raised_in = "process"  # the others may not be there to tell
    return error


def meet(timeout: timedelta = START_TIMEOUT) -> TCPStore | None:
    """Waits until all processes have started; None if this one is alone.

    torch has one time-out both for the wait for processes that never come and for collectives, and with NCCL it finds
    only in the first collective that one is missing. So the processes look for each other here first.

    Raises:
        RunError: names the processes that did not come.
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
            wait_for_workers=False,  # torch could not say which are missing
            multi_tenant=True,  # the process group will use the same port
            use_libuv=os.environ.get("USE_LIBUV", "0" if sys.platform == "win32" else "1") == "1",
        )
    except RuntimeError as error:
        if rank == 0 and not hosted_by_launcher:
            raise _did_not_meet(f"{me}: cannot listen at {host}:{port}: {error}") from None
        awaited = "the launcher" if hosted_by_launcher else "process 0"
        raise _did_not_meet(f"{me}: {awaited} did not answer at {host}:{port} for {minutes}: {error}") from None
    started = PrefixStore("diffit-started", store)
    keys = [str(index) for index in range(world_size)]
    try:
        started.set(str(rank), "")
        if rank == 0:  # one process asks for each of the others, so that thousands can start
            started.wait(keys, timeout)
            started.set("all", "")
        started.wait(["all"], timeout)
    except RuntimeError as error:
        try:
            missing = [key for key in keys if not started.check([key])] or ["0"]  # which says that all are there
            problem = f"waited {minutes} for process {', '.join(missing)}, which did not start"
        except RuntimeError:
            problem = f"the store at {host}:{port}, where the processes meet, is gone: {error}"
        raise _did_not_meet(f"{me}: {problem}") from None
    return store


def raise_in_all(kind: type[UserError] | type[RunError], message: str, cause: BaseException | None = None) -> NoReturn:
    """Raises an error that all processes of the run raise alike, so that it is printed once."""
    error = kind(message)
    error.raised_in = "run"
    raise error from cause


def run_on_main_and_broadcast(accelerator: Accelerator, function: Callable, *arguments):
    """Runs a function in the main process and returns its result in every process.

    Raises:
        UserError: in all processes, if the function raised one.
        RunError: in the other processes, if the function failed otherwise; the main process raises the failure itself.
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

    The main process goes first, so that it fills caches which the others then find.

    Raises:
        UserError: in all processes, if the function raised one somewhere; of several the first process's. It names
            the process where the main process itself did not fail.
        RunError: in a process where the function did not fail, if it failed otherwise in another.
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
    """Compares what must be the same in all processes with the main process's values.

    Args:
        values: by names that mean something to the user, such as flags.

    Raises:
        UserError: in all processes, names what differs, the two values and where.
    """
    hosts = gather_object([(socket.gethostname(), values)])
    main_host, expected = hosts[0]
    for index, (host, got) in enumerate(hosts):
        differ = [name for name in expected | got if expected.get(name) != got.get(name)]
        if differ:
            listed = "; ".join(f"{name} is {expected.get(name)} there, {got.get(name)} here" for name in differ)
            raise_in_all(
                UserError,
                f"process {index} on {host} was not started like process 0 on {main_host}: {listed}. All processes "
                "need the same arguments, data and code",
            )


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and a time limit into one stop that all processes make at the same step.

    The processes exchange their wishes over a CPU process group while the next step is under way, so agreeing costs
    the device nothing and comes one step late. A second SIGINT (Ctrl-C) stops at once, and so does any signal before
    the training has begun.

    Python runs signal handlers in the main thread, and only between two Python instructions: never while that thread
    waits for other processes in C++. So a thread of our own sees each signal, too. It ends a process that does not
    leave in time, and one whose launcher is gone after `LAST_SECONDS` at the latest.

    Args:
        max_train_time: minutes from now on, or None.
    """

    PATIENCE = 5  # seconds that Python's handler gets before the training has begun
    LEAVING_PATIENCE = 60  # and, once it has run, to give the folder back on a busy machine
    # After the launcher's death: for one step and a checkpoint. A larger checkpoint is lost, the one before is not.
    LAST_SECONDS = 600

    def __init__(self, max_train_time: float | None = None):
        self.has_begun = False
        self.is_leaving = False
        self.signalled = False
        self.first_signal = math.inf
        self.deadline = math.inf if max_train_time is None else time.monotonic() + 60 * max_train_time
        self.group = None
        self.exchange = None
        self.closed = threading.Event()
        self.earlier = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        # The C part of Python's handler writes the number of each signal here, whatever the main thread does.
        self.numbers, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        self.earlier_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        _wakeup_fds.add(self.wakeup.fileno())
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        """From now on there is something to save. To be called by all processes."""
        if torch.distributed.is_initialized():
            self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self.has_begun = True

    def _handle(self, number: int, frame) -> None:
        if not self.has_begun:
            self.signalled = True  # in case the exception is swallowed, as in a destructor
            if self.is_leaving:  # a second signal must not interrupt what gives the folder back
                return
            self.is_leaving = True
            logger.warning("stopped before the training began")
            sys.exit(EXIT_STOPPED)
        now = time.monotonic()
        self.first_signal = min(self.first_signal, now)
        # A launcher passes on the Ctrl-C that the terminal has sent already: within a second they are the same one.
        if number == signal.SIGINT and now - self.first_signal > 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.signalled = True

    def _watch(self) -> None:
        while received := self.numbers.recv(4096):  # nothing once `close` has shut the other end
            if not any(number in STOP_SIGNALS for number in received):
                continue
            if launcher_is_gone():
                signal.alarm(self.LAST_SECONDS)  # by the kernel, which no C++ call can hold up
            if self.has_begun or self.closed.wait(self.PATIENCE):
                continue
            if self.is_leaving and self.closed.wait(self.LEAVING_PATIENCE):
                continue
            if not self.has_begun:
                # By file descriptor: the stuck main thread may hold the locks of Python's streams.
                os.write(2, b"stopped before the training began, while waiting for other processes\n")
                os._exit(EXIT_STOPPED)
        self.numbers.close()

    def is_wanted(self) -> bool:
        """Whether this process is to stop; the others may not know of it yet."""
        return self.signalled or time.monotonic() > self.deadline

    def is_wanted_anywhere(self) -> bool:
        """Whether some process is to stop. Waits for the others, so it is for jobs that take long anyway."""
        if self.group is None:
            return self.is_wanted()
        flag = torch.tensor([int(self.is_wanted())])
        torch.distributed.all_reduce(flag, group=self.group)
        return flag.item() > 0

    def agreed(self) -> bool:
        """Whether all processes are to stop now. To be called by all, once after each optimizer step."""
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
        """Ends the last exchange and gives the signals back. The second call does nothing."""
        if self.closed.is_set():
            return
        try:
            self._result()
        finally:
            self.closed.set()
            for number, handler in self.earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.earlier_wakeup)
            _wakeup_fds.discard(self.wakeup.fileno())
            self.wakeup.shutdown(socket.SHUT_WR)  # ends the thread; a close does not while a forked process lives
            self.wakeup.close()


_wakeup_fds: set[int] = set()  # of the living StopRequests of this process


def _keep_signals_to_ourselves() -> None:
    """In a forked process: its signals are not its parent's, with which it shares the file descriptors."""
    if _wakeup_fds:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_signals_to_ourselves)


def ignore_stop_signals(worker_id: int) -> None:
    """For data-loader workers: a signal to the whole process group must not end them before their process is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_restarted() -> bool:
    """Whether torchrun or SLURM has started this command again."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT", 0)) for name in ("TORCHELASTIC", "SLURM"))
