"""Where values that lie on the host between forward and backward are copied, and how long that keeps the device waiting.

A value's copy starts behind the operator that makes it and is waited for behind its last use in forward, where its memory on the
device is given back. It comes back as late as the link allows on the roofline, and is waited for before its first use in backward.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from lightning_autosp.memory.costs import Roofline
from lightning_autosp.memory.joint import Joint, Operator, Schedule, Transfer

__all__ = ["move_to_host", "movable"]

SMALLEST = 2**20
"""Values of fewer bytes are not worth two copies."""

MARGIN = 2.0
"""Copies from the host start so many times their length ahead: neither link nor kernels are as fast as the roofline."""

AHEAD = 2
"""Values that are being copied from the host at most, besides those that backward uses."""


def movable(schedule: Schedule) -> list[fx.Node]:
    """Return which of the values kept for backward may lie on the host, in the order they are made.

    Not inputs, what forward returns, small ones, and those that share their memory or fill only a part of it.
    """
    joint = schedule.joint
    made = joint.memory.made
    held = joint.resident | {key for node in joint.outputs for key in made[node]}
    owners = Counter(key for node in schedule.saved for key in made[node])
    return [
        node
        for node in sorted(schedule.saved, key=joint.position.__getitem__)
        if _fills_its_storage(node.meta.get("val")) and all(owners[key] == 1 and key not in held for key in made[node])
    ]


def _fills_its_storage(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and SMALLEST <= value.nbytes == value.untyped_storage().nbytes()
        and value.storage_offset() == 0
        and _has_no_gaps(value)
    )


def _has_no_gaps(value: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def move_to_host(schedule: Schedule, values: Sequence[fx.Node], roofline: Roofline) -> Schedule:
    """Return the schedule in which some of the values kept for backward lie on the host in between.

    Args:
        schedule: In which none does.
        values: Of `movable`, in its order.
        roofline: Says how long copies and operators take.
    """
    if not values:
        return schedule
    joint = schedule.joint
    forward, stall = _forward(joint, schedule.forward, values, roofline)
    backward, wait = _backward(joint, schedule.backward, values, roofline)
    return replace(schedule, forward=forward, backward=backward, offloaded=frozenset(values), stalled=stall + wait)


def _seconds(joint: Joint, order: Sequence[Operator], roofline: Roofline) -> list[float]:
    """Return when each operator begins, and when the last ends, if none waits for a copy."""
    return list(itertools.accumulate((roofline.seconds(joint.cost(node)) for node in order), initial=0.0))


def _forward(
    joint: Joint, order: Sequence[Operator], values: Sequence[fx.Node], roofline: Roofline
) -> tuple[list[Operator], float]:
    position = {node: index for index, node in enumerate(order)}
    last = _uses(joint, order, values, first=False)
    starts = {position[value]: Transfer(value, "offload") for value in values}
    waits: dict[int, list[Transfer]] = {}
    for value in values:
        waits.setdefault(last[value], []).append(Transfer(value, "offloaded"))
    out: list[Operator] = []
    for index, node in enumerate(order):
        out.append(node)
        if index in starts:
            out.append(starts[index])
        out += waits.get(index, ())
    return out, _stalls(joint, out, roofline)


def _backward(
    joint: Joint, order: Sequence[Operator], values: Sequence[fx.Node], roofline: Roofline
) -> tuple[list[Operator], float]:
    begins = _seconds(joint, order, roofline)
    first = _uses(joint, order, values, first=True)
    wanted = sorted(values, key=first.__getitem__)
    starts: dict[int, list[Transfer]] = {}
    waits: dict[int, list[Transfer]] = {}
    deadline = float("inf")
    latest = len(order)
    for index in reversed(range(len(wanted))):
        value = wanted[index]
        deadline = min(deadline, begins[first[value]]) - MARGIN * _bytes(joint, value) / roofline.host
        earliest = first[wanted[index - AHEAD]] if index >= AHEAD else 0
        start = max(bisect.bisect_right(begins, deadline, 0, first[value] + 1) - 1, earliest)
        latest = min(latest, start)  # copies come in the order they are used
        starts.setdefault(latest, []).insert(0, Transfer(value, "fetch"))
        waits.setdefault(first[value], []).insert(0, Transfer(value, "fetched"))
    out: list[Operator] = []
    for index, node in enumerate(order):
        out += (*starts.get(index, ()), *waits.get(index, ()), node)
    return out, _stalls(joint, out, roofline)


def _uses(joint: Joint, order: Sequence[Operator], values: Sequence[fx.Node], *, first: bool) -> dict[fx.Node, int]:
    """Return the place of the first or the last operator that uses a value's memory."""
    used = joint.memory.used
    owner = {key: value for value in values for key in joint.memory.made[value]}
    found: dict[fx.Node, int] = {}
    for index, node in enumerate(order):
        for key in used[node]:
            if key in owner and (not first or owner[key] not in found):
                found[owner[key]] = index
    return found


def _bytes(joint: Joint, value: fx.Node) -> int:
    return sum(joint.memory.made[value].values())


def _stalls(joint: Joint, order: Sequence[Operator], roofline: Roofline) -> float:
    """Return how long operators wait for copies, which run one after another beside them."""
    now = link = waited = 0.0
    ends: dict[fx.Node, float] = {}
    for node in order:
        if not isinstance(node, Transfer):
            now += roofline.seconds(joint.cost(node))
        elif node.starts:
            link = ends[node.value] = max(now, link) + _bytes(joint, node.value) / roofline.host
        else:
            waited += max(0.0, ends[node.value] - now)
            now = max(now, ends[node.value])
    return waited
