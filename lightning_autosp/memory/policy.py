"""Which values forward keeps for backward.

- "none": PyTorch's own choice, the least bytes among those that cost no matrix product (its min-cut).
- "attention": attention's results, their log-sum-exp, what collectives brought, and a narrow cut of the graph before each.
- "full": the cuts alone.
- "full/2", "full/3", "full/4", which "auto" tries where "full" does not fit: of the cuts, counted from the last, every second and
  so on. No more is computed again, but of more layers at a time.
- "nested/2", "nested/3", "nested/4", which it tries then: the same cuts, and backward first makes those between two of them, and
  the inside of a layer once more where the layer is differentiated. It has that of one layer at a time, as with "full".
- "offload": the cuts alone, on the host (`memory.offload`).
- "auto": the least time computing again and waiting for the host, among all of these and mixtures of them, whose simulated peak
  fits a limit. What is kept is moved to the host, the first made first, only as far as the peak does not fit otherwise.

A cut is a place between two operators; keeping what is alive there, everything behind it can be computed again without what
stands before it. Transformers are narrowest where a residual stream is all that is alive.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from lightning_autosp.memory.costs import Roofline, is_attention, is_collective, is_view
from lightning_autosp.memory.joint import Joint, Schedule, is_random, tensors_of, unit
from lightning_autosp.memory.offload import movable, move_to_host

__all__ = ["CheckpointPolicy", "Choice", "Limits", "Recomputation", "choose", "evaluate", "keep_for", "place"]

CheckpointPolicy = Literal["auto", "none", "attention", "full", "offload"]

PATIENCE = (3, 1)
"""How long cheap values wait for their next use, where a choice does not fit if they wait for ever; tried in this order."""

EXHAUSTIVE = 10
"""So many candidates are all tried in every combination."""

SPARSER = ("full/2", "full/3", "full/4", "nested/2", "nested/3", "nested/4")

LEAST = "least"
"""In place of a policy: the first that fits of "full" and `SPARSER`, or what takes least."""


MIXTURE, NESTED_MIXTURE = "mixture", "nested mixture"
"""What "auto" finds between the named policies; the second begins with a nested one."""


@dataclass
class Choice:
    """What is kept, and what that takes.

    Attributes:
        policy: Its name; `MIXTURE` or `NESTED_MIXTURE` if "auto" found something between the named ones.
        schedule: What runs.
        peak: Bytes at once on the device, without parameters, inputs and optimizer.
        seconds: Computing again and waiting for copies to the host and back, on the roofline.
        fits: Whether the peak is within the limit, and what lies on the host within its own.
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
    """Return the operators that a policy other than "none" keeps."""
    kept = must_keep(joint) | cuts(joint, int(policy.partition("/")[2] or 1))
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
    attention = [node for node in order if is_attention(node)]
    # Chunks of heads, which do not read each other, stand behind one cut.
    found = attention[:1] + [node for before, node in itertools.pairwise(attention) if _follows(joint, node, before)]
    if found:
        behind = order[order.index(attention[-1]) + 1 :]
        # What takes most behind the last (logits and their loss) is differentiated first, before the last layer is made again.
        return [*found, *sorted(behind, key=lambda node: _bytes_at(joint, node))[-1:]]
    products = [node for node in order if joint.cost(node).flops > 0]
    stride = max(1, round(len(products) ** 0.5))
    return products[::stride]


def _follows(joint: Joint, node: fx.Node, before: fx.Node) -> bool:
    """Whether a value is computed from one before it."""
    pending, seen = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is before:
                return True
            if source not in seen and joint.position[source] > joint.position[before]:
                seen.add(source)
                pending.append(source)
    return False


def _bytes_at(joint: Joint, node: fx.Node) -> int:
    return joint.memory.workspace[node] + sum(joint.memory.made[node].values())


def cuts(joint: Joint, every: int = 1) -> set[fx.Node]:
    """Return the operators whose results are alive at the narrowest place before each anchor, or before the last and every n-th."""
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
    found = anchors(joint, order)
    for index, anchor in enumerate(found, start=1):
        stop = position[anchor]
        places = range(start, stop)
        if places and (len(found) - index) % every == 0:
            # The last of equally narrow places: what lies between it and the anchor is what backward needs first.
            best = min(places, key=lambda index: (widths[index] or float("inf"), -index))
            if widths[best]:
                kept |= {unit(owner[key]) for key in owner if position[owner[key]] <= best < last[key]}
        start = stop
    return kept


class Recomputation:
    """What is computed again for a choice, and how long it takes, without a schedule."""

    def __init__(self, joint: Joint, roofline: Roofline) -> None:
        self.joint, self.roofline = joint, roofline
        schedule = joint.schedule(set())
        self._seconds = {node: roofline.seconds(joint.cost(node)) for node in schedule.recomputed}
        self._inputs = {node: node.all_input_nodes for node in self._seconds}
        wanted = (source for node in schedule.backward if node in joint.backward for source in node.all_input_nodes)
        self._frontier = list(dict.fromkeys(source for source in wanted if source in self._seconds))

    @functools.cached_property
    def cuts(self) -> set[fx.Node]:
        """All cuts: what a nested policy that does not keep one makes first."""
        return cuts(self.joint)

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


@dataclass(frozen=True)
class Limits:
    """What a choice may take.

    Attributes:
        device: Bytes that forward and backward may take at once, without parameters, inputs and optimizer; `None`: any.
        host: Bytes that may lie on the host between forward and backward; `None`: any.
    """

    device: int | None
    host: int | None = 0


def place(
    joint: Joint,
    policy: str,
    kept: set[fx.Node],
    patience: int,
    on_host: Callable[[fx.Node], bool],
    again: Recomputation,
    limits: Limits,
) -> Choice:
    """Return the choice of what is kept, for how long cheap values wait, and which values that may be are on the host."""
    schedule = joint.schedule(kept, again.cuts if policy.startswith("nested") else set())
    schedule = schedule.refreshed(patience) if patience else schedule
    values = [value for value in movable(schedule) if on_host(value)]
    return _moved(Choice(policy, schedule, 0, 0.0, False, kept, patience), values, again, limits)


def _moved(choice: Choice, values: Sequence[fx.Node], again: Recomputation, limits: Limits) -> Choice:
    """Return the choice, in which nothing is moved, with some values moved to the host."""
    schedule = move_to_host(choice.schedule, values, again.roofline)
    peak = max(one.bytes for one in schedule.peaks())
    host = sum(schedule.host_storages().values())
    fits = (limits.device is None or peak <= limits.device) and (limits.host is None or host <= limits.host)
    seconds = again.of(choice.schedule) + schedule.stalled
    return replace(choice, schedule=schedule, peak=peak, seconds=seconds, fits=fits)


def evaluate(joint: Joint, policy: str, kept: set[fx.Node], again: Recomputation, limits: Limits) -> Choice:
    """Return what keeping these operators' results takes, in the fastest way that fits, or else the smallest."""
    best: Choice | None = None
    for patience in (0, *PATIENCE):
        one = place(joint, policy, kept, patience, lambda _: policy == "offload", again, limits)
        if policy != "offload" and not one.fits and limits.host != 0:
            one = _move_least(one, again, limits)
        best = one if best is None else min(best, one, key=_rank)
        if best.fits and not best.schedule.stalled:  # to compute cheap values once more takes time
            break
    assert best is not None
    return best


def _rank(choice: Choice) -> tuple[bool, float]:
    """What fits comes first, by its time; what does not, by its peak."""
    return not choice.fits, choice.seconds if choice.fits else choice.peak


def _move_least(choice: Choice, again: Recomputation, limits: Limits) -> Choice:
    """Move to the host what was made first, as few values as it takes to fit; all that the host may hold if it does not."""
    schedule = choice.schedule
    values = movable(schedule)
    sizes = itertools.accumulate(sum(schedule.joint.memory.made[value].values()) for value in values)
    most = sum(limits.host is None or size <= limits.host for size in sizes)
    best = min(choice, _moved(choice, values[:most], again, limits), key=lambda one: one.peak)
    low, high = 0, most if best.fits else 0
    while low + 1 < high:
        middle = (low + high) // 2
        one = _moved(choice, values[:middle], again, limits)
        if one.fits:
            best, high = one, middle
        else:
            low = middle
    return best


def choose(
    joint: Joint, policy: str, roofline: Roofline, limits: Limits, default: set[fx.Node], *, mixtures: bool = True
) -> Choice:
    """Choose what is kept.

    Args:
        joint: The graph.
        policy: A `CheckpointPolicy`, or `LEAST`.
        roofline: What time is estimated by.
        limits: What it may take.
        default: What PyTorch's partitioner would keep.
        mixtures: Whether "auto" may find something between the named policies.

    Returns:
        The choice; of "auto" the fastest that fits, or the smallest there is if none does (`fits` is then false).
    """
    again = Recomputation(joint, roofline)
    if policy == LEAST:
        return _least(joint, again, limits)
    if policy != "auto":
        kept = default if policy == "none" else keep_for(joint, policy)
        # What is named is done; only "auto" moves what does not fit.
        return evaluate(joint, policy, kept, again, limits if policy == "offload" else replace(limits, host=0))
    tried = [evaluate(joint, "none", default, again, limits)]
    if tried[0].fits and not tried[0].schedule.offloaded:
        return tried[0]
    least = _least(joint, again, limits)
    tried += [least, evaluate(joint, "attention", keep_for(joint, "attention"), again, limits)]
    if least.fits and mixtures:
        tried.append(_grow(joint, least, again, limits))
    return min(tried, key=lambda one: (*_rank(one), one.peak))


def _least(joint: Joint, again: Recomputation, limits: Limits) -> Choice:
    tried: list[Choice] = []
    for policy in ("full", *SPARSER):
        tried.append(evaluate(joint, policy, keep_for(joint, policy), again, limits))
        if tried[-1].fits:
            break
    return min(tried, key=_rank)


def candidates(joint: Joint, again: Recomputation, kept: set[fx.Node]) -> list[fx.Node]:
    """Return the operators that keeping would spare, in order."""
    spared = again.nodes(kept)
    return [
        node
        for node in joint.nodes
        if node in spared and joint.is_activation(node) and not is_view(node) and joint.memory.bytes_made(node)
    ]


def _grow(joint: Joint, start: Choice, again: Recomputation, limits: Limits) -> Choice:
    """Keep more and more beyond the smallest choice, what saves most time a byte first, as long as it fits."""
    found = candidates(joint, again, start.kept)
    if len(found) <= EXHAUSTIVE:
        return _every_subset(joint, start, found, again, limits)
    best, name = start, _mixture(start)
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
            one = evaluate(joint, name, best.kept | set(group[:middle]), again, limits)
            if one.fits:
                low, kept = middle, one
            else:
                high = middle - 1
        if low and kept.seconds < best.seconds:
            best = kept
    return best


def _mixture(start: Choice) -> str:
    return NESTED_MIXTURE if start.policy.startswith("nested") else MIXTURE


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


def _every_subset(joint: Joint, start: Choice, found: Sequence[fx.Node], again: Recomputation, limits: Limits) -> Choice:
    best = start
    for size in range(1, len(found) + 1):
        for subset in itertools.combinations(found, size):
            one = evaluate(joint, _mixture(start), start.kept | set(subset), again, limits)
            if one.fits and (one.seconds, one.peak) < (best.seconds, best.peak):
                best = one
    return best
