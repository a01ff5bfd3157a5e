"""Which values forward keeps for backward.

- "none": PyTorch's own choice, the least bytes among those that cost no matrix product (its min-cut).
- "attention": attention's results, their log-sum-exp, what collectives brought, and a narrow cut of the graph before each.
- "full": the cuts alone.
- "auto": the least time computing again, among all of these and mixtures of them, whose simulated peak fits a limit.

A cut is a place between two operators; keeping what is alive there, everything behind it can be computed again without what
stands before it. Transformers are narrowest where a residual stream is all that is alive.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from lightning_autosp.memory.costs import Roofline, is_attention, is_collective, is_view
from lightning_autosp.memory.joint import Joint, Schedule, is_random, tensors_of, unit

__all__ = ["CheckpointPolicy", "Choice", "Recomputation", "choose", "evaluate", "keep_for"]

CheckpointPolicy = Literal["auto", "none", "attention", "full"]

PATIENCE = (3, 1)
"""How long cheap values wait for their next use, where a choice does not fit if they wait for ever; tried in this order."""

EXHAUSTIVE = 10
"""So many candidates are all tried in every combination."""


@dataclass
class Choice:
    """What is kept, and what that takes.

    Attributes:
        policy: Its name; "mixture" if "auto" found something between the named ones.
        schedule: What runs.
        peak: Bytes at once, without parameters, inputs and optimizer.
        seconds: Computing again and moving to the host and back, on the roofline.
        fits: Whether the peak is within the limit.
        kept: The operators whose results are kept.
        patience: Of `Schedule.refreshed`; 0 if the schedule is not refreshed.
    """

    policy: str
    schedule: Schedule
    peak: int
    seconds: float
    fits: bool
    kept: set[fx.Node] = field(default_factory=set)
    patience: int = 0


def must_keep(joint: Joint) -> set[fx.Node]:
    """Return operators that are never run twice: random ones, and collectives on data, which take all ranks for a few numbers."""
    kept = set()
    for node in joint.nodes:
        if node in joint.backward or node.op == "placeholder":
            continue
        if is_random(node) or (is_collective(node) and node in joint.of_data):
            kept.add(node)
    return kept | _waits(kept)


def keep_for(joint: Joint, policy: str) -> set[fx.Node]:
    """Return the operators that "full" or "attention" keeps."""
    kept = must_keep(joint) | cuts(joint)
    if policy == "attention":
        found = {node for node in joint.nodes if joint.is_activation(node) and (is_attention(node) or is_collective(node))}
        kept |= found | _waits(found)
    return kept


def _waits(collectives: Iterable[fx.Node]) -> set[fx.Node]:
    """Return where the results of collectives are waited for: the values that others use."""
    return {user for node in collectives if is_collective(node) for user in node.users if is_collective(user)}


def anchors(joint: Joint, order: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the operators that cuts stand before: attention and the loss; without any, where matrix products divide evenly.

    Args:
        joint: The graph.
        order: What computes activations in forward.
    """
    found = [node for node in order if is_attention(node)]
    if found:
        behind = order[order.index(found[-1]) + 1 :]
        # What takes most behind the last (logits and their loss) is differentiated first, before the last layer is made again.
        return [*found, *sorted(behind, key=lambda node: _bytes_at(joint, node))[-1:]]
    products = [node for node in order if joint.cost(node).flops > 0]
    stride = max(1, round(len(products) ** 0.5))
    return products[::stride]


def _bytes_at(joint: Joint, node: fx.Node) -> int:
    return joint.memory.workspace[node] + sum(joint.memory.made[node].values())


def cuts(joint: Joint) -> set[fx.Node]:
    """Return the operators whose results are alive at the narrowest place before each anchor."""
    order = [node for node in joint.nodes if node in joint.forward and joint.is_activation(node)]
    position = {node: index for index, node in enumerate(order)}
    last: dict[int, int] = {}
    made = [joint.memory.made[node] for node in order]
    for index, node in enumerate(order):
        for key in made[index]:
            last[key] = max(last.get(key, index), index)
        for source in node.all_input_nodes:
            for key in joint.memory.made[source]:
                if key in last:
                    last[key] = index
    owner: dict[int, fx.Node] = {}
    alive: dict[int, int] = {}
    widths: list[int] = []
    for index, node in enumerate(order):
        for key, size in made[index].items():
            if key not in owner:
                owner[key] = node
                alive[key] = size
        alive = {key: size for key, size in alive.items() if last[key] > index}
        widths.append(sum(alive.values()))
    kept: set[fx.Node] = set()
    start = 0
    for anchor in anchors(joint, order):
        stop = position[anchor]
        places = range(start, stop)
        if places:
            # The last of equally narrow places: what lies between it and the anchor is what backward needs first.
            best = min(places, key=lambda index: (widths[index] or float("inf"), -index))
            if widths[best]:
                kept |= {unit(owner[key]) for key in owner if position[owner[key]] <= best < last[key]}
        start = stop
    return kept


class Recomputation:
    """What is computed again for a choice, and how long it takes, without a schedule."""

    def __init__(self, joint: Joint, roofline: Roofline) -> None:
        schedule = joint.schedule(set())
        self._seconds = {node: roofline.seconds(joint.cost(node)) for node in schedule.recomputed}
        self._inputs = {node: node.all_input_nodes for node in self._seconds}
        wanted = (source for node in schedule.backward if node in joint.backward for source in node.all_input_nodes)
        self._frontier = list(dict.fromkeys(source for source in wanted if source in self._seconds))

    def nodes(self, kept: set[fx.Node]) -> set[fx.Node]:
        """Return what runs again."""
        again: set[fx.Node] = set()
        pending = list(self._frontier)
        while pending:
            node = pending.pop()
            if node in again or node not in self._seconds or unit(node) in kept:
                continue
            again.add(node)
            pending += self._inputs[node]
        return again

    def seconds(self, kept: set[fx.Node]) -> float:
        # In order, so that every rank adds up the same number.
        again = self.nodes(kept)
        return sum(seconds for node, seconds in self._seconds.items() if node in again)

    def of(self, schedule: Schedule) -> float:
        """Return the time a schedule spends on computing again."""
        return sum(self._seconds.get(node, 0.0) for node in schedule.recomputed)


def evaluate(joint: Joint, policy: str, kept: set[fx.Node], again: Recomputation, limit: int | None) -> Choice:
    schedule = joint.schedule(kept)
    peak = max(one.bytes for one in schedule.peaks())
    if limit is None or peak <= limit:
        return Choice(policy, schedule, peak, again.seconds(kept), True, kept=kept)
    best = Choice(policy, schedule, peak, again.seconds(kept), False, kept=kept)
    for patience in PATIENCE:
        fresh = schedule.refreshed(patience)
        peak = max(one.bytes for one in fresh.peaks())
        if peak < best.peak:
            best = Choice(policy, fresh, peak, again.of(fresh), peak <= limit, kept=kept, patience=patience)
        if best.fits:
            break
    return best


def choose(
    joint: Joint, policy: str, roofline: Roofline, limit: int | None, default: set[fx.Node], *, mixtures: bool = True
) -> Choice:
    """Choose what is kept.

    Args:
        joint: The graph.
        policy: A `CheckpointPolicy`.
        roofline: What time is estimated by.
        limit: Bytes that forward and backward may take at once, without parameters, inputs and optimizer; `None`: any.
        default: What PyTorch's partitioner would keep.
        mixtures: Whether "auto" may find something between the named policies.

    Returns:
        The choice; of "auto" the fastest that fits, or the smallest there is if none does (`fits` is then false).
    """
    again = Recomputation(joint, roofline)
    if policy != "auto":
        kept = default if policy == "none" else keep_for(joint, policy)
        return evaluate(joint, policy, kept, again, limit)
    tried = [evaluate(joint, "none", default, again, limit)]
    if tried[0].fits:
        return tried[0]
    full = evaluate(joint, "full", keep_for(joint, "full"), again, limit)
    tried += [full, evaluate(joint, "attention", keep_for(joint, "attention"), again, limit)]
    if full.fits and mixtures:
        tried.append(_grow(joint, full, again, limit))
    fitting = [one for one in tried if one.fits]
    return min(fitting, key=lambda one: (one.seconds, one.peak)) if fitting else min(tried, key=lambda one: one.peak)


def candidates(joint: Joint, again: Recomputation, kept: set[fx.Node]) -> list[fx.Node]:
    """Return the operators that keeping would spare, in order."""
    spared = again.nodes(kept)
    return [
        node
        for node in joint.nodes
        if node in spared and joint.is_activation(node) and not is_view(node) and joint.memory.bytes_made(node)
    ]


def _grow(joint: Joint, start: Choice, again: Recomputation, limit: int | None) -> Choice:
    """Keep more and more beyond the smallest choice, what saves most time a byte first, as long as it fits."""
    found = candidates(joint, again, start.kept)
    if len(found) <= EXHAUSTIVE:
        return _every_subset(joint, start, found, again, limit)
    best = start
    groups = _alike(joint, start.kept, found)
    while groups:
        now = again.seconds(best.kept)
        spared = again.nodes(best.kept)
        worth: list[tuple[float, int]] = []
        for index, group in enumerate(groups):
            left = [node for node in group if node in spared]
            size = sum(joint.memory.bytes_made(node) for node in left)
            if left:
                worth.append(((now - again.seconds(best.kept | set(left))) / size, -index))
        if not worth or max(worth)[0] <= 0:
            break
        group = groups.pop(-max(worth)[1])
        # As many as fit, those of the last layers first: they are freed first.
        low, high = 0, len(group)
        while low < high:
            middle = (low + high + 1) // 2
            one = evaluate(joint, "mixture", best.kept | set(group[:middle]), again, limit)
            if one.fits:
                low, kept = middle, one
            else:
                high = middle - 1
        if low and kept.seconds < best.seconds:
            best = kept
    return best


def _alike(joint: Joint, cut: set[fx.Node], found: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Group operators that do the same in layer after layer, each group from the last layer to the first."""
    bounds = sorted(joint.position[node] for node in cut)
    counts: Counter[tuple[object, ...]] = Counter()
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in found:
        layer = bisect.bisect(bounds, joint.position[node])
        shapes = tuple((tuple(value.shape), value.dtype) for value in tensors_of(node))
        place = (layer, str(node.target), shapes)
        counts[place] += 1
        groups.setdefault((*place[1:], counts[place]), []).insert(0, node)
    return list(groups.values())


def _every_subset(joint: Joint, start: Choice, found: Sequence[fx.Node], again: Recomputation, limit: int | None) -> Choice:
    best = start
    for size in range(1, len(found) + 1):
        for subset in itertools.combinations(found, size):
            one = evaluate(joint, "mixture", start.kept | set(subset), again, limit)
            if one.fits and (one.seconds, one.peak) < (best.seconds, best.peak):
                best = one
    return best
