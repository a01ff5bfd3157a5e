"""When one rank fails, all end, and all say which one it was, and why.

Ranks meet in the key-value store of `torch.distributed`, for a rank that failed cannot take part in collectives. A rank that raises
says so there, and asks the others. In each of them a thread answers where the rank is; a rank in a collective that fails, or that
nobody else came to for as long as its process group waits, asks likewise. From the answers follows who is to blame: a rank that
raised; else one that does not answer, for its process is gone; else one that is elsewhere. A rank whose main thread has not ended
some time after the question is ended by its thread.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_autosp import _compat
from lightning_autosp.batches import Found, SequenceDim, found_tensors, named_dim, sequences
from lightning_autosp.compiler.locate import Place
from lightning_autosp.cuts import even_cuts
from lightning_autosp.lines import frames_in, is_users

__all__ = ["ANSWER", "GRACE", "MEET", "POLL", "Watch", "described", "not_finite", "waited_in_vain"]

POLL = 0.5
"""Seconds between two looks at the store."""

ANSWER = 5.0
"""Seconds that a rank has to answer; ranks that wait in the same collective give up within less."""

GRACE = 30.0
"""Seconds that a rank has to end by itself when another has failed."""

MEET = 60.0
"""Seconds that a rank waits for others to be where it is: all are there at nearly the same time, or some never."""

_COLLECTIVE = ("gloo/transport", "Application timeout caused pair closure", "NCCL")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


@dataclass(frozen=True)
class State:
    """What a rank says of itself.

    Attributes:
        kind: "failed": it raised an error. "waited": a collective that it was in failed. "running": it has been asked, and
            "told": it knows who is to blame. "finished".
        when: What the Trainer was doing.
        text: The error, or where the rank is.
    """

    kind: str
    when: str
    text: str


class Watch:
    """One rank's part. It lasts from when process groups exist until the Trainer is done with them."""

    def __init__(self, rank: int, num_ranks: int, when: Callable[[], str]) -> None:
        """Start the thread.

        Args:
            rank: This process.
            num_ranks: Of all processes.
            when: Returns what the Trainer is doing.
        """
        self._rank, self._num_ranks, self._when = rank, num_ranks, when
        self._store = _compat.own_store()
        self._prefix = f"autosp/watch/{self._store.add(f'autosp/watches/{rank}', 1)}"
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._failed = False
        self._meetings = 0
        self._verdict = ""
        self._thread = threading.Thread(target=self._watch, name="autosp-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread: this rank is done."""
        if not self._failed:
            self._say("finished", "")
        self._closed.set()
        self._thread.join()

    def fail(self, error: BaseException) -> bool:
        """Tell the others that this rank fails, and wait a moment for their answers.

        An error of a collective gets a message that says which rank is to blame.

        Returns:
            Whether all ranks failed by themselves, so that they can still do something together.
        """
        if not self._failed:
            self._failed = True
            in_vain = waited_in_vain(error)
            self._say("waited" if in_vain else "failed", _described(error))
            self._verdict = self._decided()
            if in_vain:
                (first, *_) = str(error).splitlines() or [""]
                error.args = (f"{self._verdict}\nRank {self._rank} waited for it, and ends. ({first})",)
        return {state.kind for state in self._states().values()} == {"failed"} and len(self._states()) == self._num_ranks

    def all_come(self) -> bool:
        """Wait until every rank has called this as often as this one; whether all do."""
        self._meetings += 1
        keys = [f"{self._prefix}/meeting/{self._meetings}/{rank}" for rank in range(self._num_ranks)]
        try:
            self._store.set(keys[self._rank], "")
            until = time.monotonic() + MEET
            while not self._store.check(keys):
                if time.monotonic() > until:
                    return False
                time.sleep(0.05)
        except RuntimeError:
            return False
        return True

    @property
    def verdict(self) -> str:
        """What ended the job."""
        return self._verdict

    # What is in the store. Where the process that holds it is gone, there is nothing to be found there.

    def _say(self, kind: str, text: str) -> None:
        try:
            self._store.set(f"{self._prefix}/{self._rank}", json.dumps([kind, self._when(), text]))
        except RuntimeError:
            return

    def _states(self) -> dict[int, State]:
        try:
            keys = {rank: f"{self._prefix}/{rank}" for rank in range(self._num_ranks)}
            return {rank: State(*json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])}
        except RuntimeError:
            return {}

    def _decided(self) -> str:
        """Ask all ranks and return who is to blame, the same on all that can still be told."""
        try:
            self._store.set(f"{self._prefix}/asked", "")
            until = time.monotonic() + ANSWER
            while time.monotonic() < until:
                states = self._states()
                kinds = {state.kind for state in states.values()}
                if len(states) == self._num_ranks and ("failed" in kinds or "running" not in kinds):
                    break
                time.sleep(0.05)
            verdict = _blamed(self._states(), self._num_ranks)
            found: bytes = self._store.compare_set(f"{self._prefix}/verdict", "", verdict)
            until = time.monotonic() + ANSWER
            # This process may hold the store: those that are to read the verdict need it for a moment.
            while time.monotonic() < until and any(state.kind == "running" for state in self._states().values()):
                time.sleep(0.05)
            return found.decode()
        except RuntimeError:
            return "Rank 0 has ended without a word (killed, or crashed): the key-value store that it holds does not answer."

    # The thread.

    def _watch(self) -> None:
        try:
            while not self._store.check([f"{self._prefix}/asked"]):
                if self._closed.wait(POLL):
                    return
        except RuntimeError:  # the process that holds the store is gone: collectives fail by themselves
            return
        if not self._failed:
            self._say("running", self._place())
        until, told = time.monotonic() + ANSWER + GRACE, False
        while not self._closed.wait(POLL):
            if self._failed:  # on its way out
                return
            if not told and (verdict := self._read_verdict()):
                told = True
                self._say("told", "")
                _print(f"{verdict} This is rank {self._rank}, which ends.")
            if time.monotonic() > until:
                _print(f"Rank {self._rank} has not ended by itself, and is ended; it was at {self._place()}.")
                os._exit(1)

    def _read_verdict(self) -> str:
        try:
            key = f"{self._prefix}/verdict"
            return self._store.get(key).decode() if self._store.check([key]) else ""
        except RuntimeError:
            return "Another rank has failed, and the key-value store with what it said is gone."

    def _place(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._main)
        return _innermost(_frames(traceback.extract_stack(frame)))


def not_finite(batch: Any, module: nn.Module, sequence_dim: SequenceDim, num_ranks: int) -> str:
    """Return where a batch or a module has values that are not finite, or has nothing to learn from; "" if nowhere.

    Args:
        batch: Of any form, tensors in it whole.
        module: Of parameters the parts that this rank has are looked at.
        sequence_dim: Of the batch's tensors.
        num_ranks: That share each sequence.
    """
    found = []
    for one in found_tensors(batch):
        name, value = f"the batch{one.place}", one.tensor
        if value.is_floating_point() and not value.isfinite().all():
            number = int((~value.isfinite()).sum())
            place = (~value.isfinite()).nonzero()[0].tolist()
            text = f"{name} has {number} value(s) that are not finite, the first at {place}"
            dim = named_dim(one.names, sequence_dim)
            if dim is not None and value.ndim > dim:
                cuts = even_cuts(value.shape[dim], num_ranks)
                owner = bisect.bisect_right(cuts, place[dim]) - 1
                text += f", position {place[dim]} of the sequence, in the part of sequence rank {owner}"
            found.append(text)
        elif value.dtype == torch.long and value.numel() and bool((value == -100).all()):
            found.append(f"every element of {name} is -100, which losses ignore")
    for name, parameter in module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not local.isfinite().all():
            found.append(f"parameter {name} has values that are not finite")
            break
    return "; ".join(found)


def described(place: Place, rank: int, loss: float, tensors: Iterable[Found], sequence_dim: SequenceDim) -> str:
    """Return for people where a value that is no number arises.

    Args:
        place: Where.
        rank: That found it.
        loss: NaN or infinite.
        tensors: Of the batch; of integers, what stands there is told.
        sequence_dim: Of theirs.
    """
    what = "NaN" if math.isnan(loss) else "infinite value"
    text = f"the first {what} comes from {place.operator}"
    text += "" if place.index is None else f", element {list(place.index)}"
    text += f", on rank {rank}" if place.is_part else ""
    text += "" if place.bounds is None else f" (positions {place.bounds[0]} to {place.bounds[1] - 1})"
    if place.position is None:
        return text
    text += f", position {place.position} of the sequence"
    for one, dim in sequences(tensors, sequence_dim):
        value = one.tensor
        if value.is_floating_point() or value.dtype == torch.bool or not 0 <= place.position < value.shape[dim]:
            continue
        at = value.select(dim, place.position)
        if place.sample is not None and at.ndim and place.sample < at.shape[0]:
            at = at[place.sample]
        text += f", where the batch{one.place} is {at.flatten()[:8].tolist() if at.ndim else at.item()}"
    return text


def waited_in_vain(error: BaseException) -> bool:
    """Whether an error says that a collective failed: then another rank is to blame."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in _COLLECTIVE)
    )


def _blamed(states: dict[int, State], num_ranks: int) -> str:
    """Return which ranks ended the job, and why."""
    failed = {rank: state for rank, state in states.items() if state.kind == "failed"}
    if failed:
        rank = min(failed)
        return f"Rank {rank} failed ({failed[rank].when}): {failed[rank].text}"
    gone = [rank for rank in range(num_ranks) if rank not in states]
    if gone:
        return f"{_ranks(gone)} ended without a word: killed, or crashed."
    for kind, what in {
        "running": "did not come to a collective that others wait in. It is at {text} ({when}).",
        "finished": "has finished, and others have not. Do all ranks have as many batches?",
    }.items():
        for rank, state in states.items():
            if state.kind == kind:
                return f"Rank {rank} {what.format(text=state.text, when=state.when)}"
    places = "; ".join(f"rank {rank} ({state.when}): {state.text}" for rank, state in states.items())
    return f"Ranks waited in different collectives, or the connection between them is gone: {places}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"Rank {shown}" if len(ranks) == 1 else f"Ranks {shown}"


def _described(error: BaseException) -> str:
    """Return an error on one line, with the line of code it is from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message, place = lines[0] if lines else "", _innermost(_frames(traceback.extract_tb(error.__traceback__)))
    if "Original Traceback" in str(error):  # of a worker that loads data
        message, place = f"{message} {lines[-1]}", _innermost(frames_in(str(error)))
    return f"{type(error).__name__}: {message} (at {place})"


def _frames(stack: traceback.StackSummary) -> list[tuple[str, int]]:
    return [(one.filename, one.lineno or 0) for one in stack]


def _innermost(frames: list[tuple[str, int]]) -> str:
    """Return the innermost `file:line` that is a user's; where there is none, the innermost."""
    frames = [frame for frame in frames if not frame[0].startswith("<")]
    own = [frame for frame in frames if is_users(frame[0]) and not frame[0].startswith(_STANDARD_LIBRARY)]
    chosen = (own or frames or [("<unknown>", 0)])[-1]
    return f"{chosen[0]}:{chosen[1]}"


def _print(text: str) -> None:
    sys.stderr.write(f"lightning-autosp: {text}\n")
    sys.stderr.flush()
