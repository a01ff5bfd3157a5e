"""Real gloo ranks, started once and kept: each takes jobs, joins the process group of a job and leaves it again."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 300


class JobError(Exception):
    """What a rank's job raised: `kind` is the exception's class name."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}\n{trace}")
        self.rank, self.kind, self.message = rank, kind, message


class Pool:
    """`run(function, world_size, *args)` calls a module-level function on ranks that form one torchrun-like world."""

    def __init__(self) -> None:
        self._workers: list[Any] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Return every rank's result; raise the first rank's error."""
        outcomes = self.outcomes(function, world_size, *args, **kwargs)
        for outcome in outcomes:
            if isinstance(outcome, JobError):
                raise outcome
        return outcomes

    def outcomes(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Return every rank's result or `JobError`."""
        self._start(world_size)
        port = free_port()
        for rank in range(world_size):
            self._workers[rank][1].send((function, rank, world_size, port, args, kwargs))
        outcomes = []
        for rank in range(world_size):
            process, connection = self._workers[rank]
            if not connection.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {function.__name__} did not answer in {TIMEOUT_S} s")
            try:
                outcomes.append(connection.recv())
            except EOFError as error:
                process.join()
                self.close()  # the next job gets new ranks
                raise RuntimeError(f"rank {rank} of {function.__name__} died with exit code {process.exitcode}") from error
        if any(isinstance(outcome, JobError) for outcome in outcomes):
            self.close()  # a rank that raised may have left a collective half done
        return outcomes

    def _start(self, num_ranks: int) -> None:
        context = _forks()
        for _ in range(num_ranks - len(self._workers)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()


def _forks() -> Any:
    """Return a context whose processes are forked from one that has imported what takes long, and started nothing."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["jobs", "torch._inductor.compile_fx", "torch.testing"])
    # Imports happen before the server is told of pytest's path.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
    return context


def ended(function: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[tuple[int | None, float]]:
    """Call a function on ranks of their own, that end with it.

    Returns:
        The exit code of every rank, `None` for one that had to be killed, and the seconds it took.
    """
    context, port, start = _forks(), free_port(), time.monotonic()
    processes = [
        context.Process(target=_call, args=(function, _environment(rank, world_size, port), args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: list[tuple[int | None, float]] = []
    for process in processes:
        process.join(max(0.0, start + timeout - time.monotonic()))
        outcomes.append((process.exitcode, time.monotonic() - start))
        if process.exitcode is None:
            process.kill()
    return outcomes


def _call(function: Callable[..., Any], environment: dict[str, str], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*args)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return torchrun's variables."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(connection: Any) -> None:
    import faulthandler
    import logging
    import warnings

    faulthandler.enable()  # a rank that crashes says where, on the stderr it shares with pytest
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    while True:
        function, rank, world_size, port, args, kwargs = connection.recv()
        os.environ.update(_environment(rank, world_size, port))
        try:
            outcome: Any = function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 -- sent to the test
            outcome = JobError(rank, type(error).__name__, str(error), traceback.format_exc())
            outcome = _Sent(outcome)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch._dynamo.reset()
        connection.send(outcome)


class _Sent:
    """Pickles as a `JobError` with all its arguments."""

    def __init__(self, error: JobError) -> None:
        self.args = (error.rank, error.kind, error.message, str(error))

    def __reduce__(self) -> Any:
        return JobError, self.args
