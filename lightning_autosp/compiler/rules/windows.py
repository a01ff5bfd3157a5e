"""Convolutions, pooling and other operators whose output positions are each computed from a window of input positions.

Output positions `[start, stop)` need one range of input positions, which may reach over the ends (padding) and into the parts of
any number of neighbours. Every rank fetches the range that its own output positions need, with the padding written out, and runs
the operator on it without any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.partial import finish_partial
from lightning_autosp.exchange import fetch

__all__ = ["RULES", "fetch_window"]

aten = torch.ops.aten

Reach = Callable[[int, int], tuple[int, int]]
"""`reach(start, stop)`: the input positions that output positions `[start, stop)` need. Some may lie outside of the input."""


def fetch_window(em: Emitter, source: fx.Node, layout: Layout, reach: Reach, out: Layout, fill: float = 0.0) -> fx.Node:
    """Give this rank the input positions that its output positions need, `fill` where the input has none.

    Args:
        em: The emitter.
        source: The input.
        layout: Its layout, without outer factor.
        reach: Which positions are needed.
        out: The layout of the output.
        fill: The value of positions before the first and behind the last.
    """
    size, bounds, value = em.integer(layout.size), em.cuts(layout), em.get(source, layout)
    ranges = [reach(start, stop) for start, stop in em.cuts(out)]
    held = [(min(max(start, 0), size), min(max(stop, 0), size)) for start, stop in ranges]
    if tuple(held) != bounds:
        wanted = tuple(((start, stop, 1),) for start, stop in held)
        value = em.call(fetch, (value, layout.dim, bounds, wanted, em.group))
    (start, stop), (first, last) = ranges[em.group.rank], held[em.group.rank]
    before = min(max(-start, 0), stop - start)
    behind = stop - start - before - (last - first)
    if before or behind:
        widths = [0, 0] * (len(em.facts.shape(source)) - 1 - layout.dim) + [before, behind]
        value = em.call(aten.constant_pad_nd.default, (value, widths, fill))
    return value


def _call(em: Emitter, node: fx.Node, value: fx.Node, **replaced: Any) -> fx.Node:
    """Call the node's operator on another first argument, some other arguments replaced."""
    given = bound(node) | replaced
    names = [argument.name for argument in node.target._schema.arguments][1:]  # type: ignore[union-attr]
    return em.call(node.target, (value, *(em.value(given[name]) for name in names)))


def _windows(
    facts: Facts,
    node: fx.Node,
    layout: Layout,
    length: int,
    step: int,
    before: int = 0,
    fill: float = 0.0,
    crop: int = 0,
    padding: list[int] | None = None,
    dim: int | None = None,
) -> Sharding | None:
    """Output position `i` is computed from input positions `[i * step - before, i * step - before + length)`.

    Args:
        facts: What is known of the graph.
        node: The operator; its first argument is the input.
        layout: The layout of the input.
        length: Positions in a window.
        step: Input positions from one window to the next.
        before: Input positions of the first window that lie before the first.
        fill: Their value.
        crop: Output positions to leave out at either end, of an operator that cannot be told to do without padding.
        padding: What the operator is given for padding instead.
        dim: The dimension of the output positions, if it is another than that of the input's.
    """
    source: Any = node.args[0]
    layout_out = layout if dim is None else layout.at(dim)
    out = facts.resized(layout_out, facts.shape(node)[layout_out.dim])
    if out is None or layout.outer != 1:
        return None

    def reach(start: int, stop: int) -> tuple[int, int]:
        return start * step - before, (stop - 1) * step - before + length

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        replaced = {} if padding is None else {"padding": padding}
        value = _call(em, n, fetch_window(em, source, layout, reach, out, fill), **replaced)
        start, stop = em.cuts(out)[em.group.rank]
        return em.call(aten.slice.Tensor, (value, out.dim, crop, crop + stop - start)) if crop else value

    return Sharding({source: layout}, out, emit, kind="exchange")


def _listed(value: Any, dims: int) -> list[int]:
    """Return one number for each dimension; a single one is meant for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _without(values: list[int], axis: int) -> list[int]:
    return [0 if index == axis else value for index, value in enumerate(values)]


def convolution(facts: Facts, node: fx.Node) -> Sharding | None:
    """DTensor is not asked: it exchanges borders itself, out of sight of what counts its communication."""
    given = bound(node)
    source, weight = given["input"], given["weight"]
    layout, shape, kernels = facts.layout(source), facts.shape(source), facts.shape(weight)[2:]
    if layout is None or any(facts.has_sequence(x) for x in (weight, given["bias"]) if x is not None):
        return None
    dims = len(kernels)
    axis = layout.dim - len(shape) + dims
    if axis < 0:
        return Sharding({source: layout}, layout) if len(shape) == dims + 2 and layout.dim == 0 else None
    names = [name for name in ("stride", "padding", "output_padding", "dilation") if not isinstance(given.get(name, ""), str)]
    numbers = {name: _listed(given[name], dims) for name in names}
    if not kernels[axis].is_Integer or not all(isinstance(x, int) for values in numbers.values() for x in values):
        return None
    step, extent = numbers["stride"][axis], numbers["dilation"][axis] * (int(kernels[axis]) - 1)
    if given.get("transposed", "output_padding" in given):
        return _transposed(facts, node, layout, axis, numbers, extent)
    if given["padding"] == "valid":
        return _windows(facts, node, layout, extent + 1, step)
    if given["padding"] == "same":
        return _windows(facts, node, layout, extent + 1, 1, extent // 2, crop=extent // 2)
    padding = numbers["padding"]
    return _windows(facts, node, layout, extent + 1, step, padding[axis], padding=_without(padding, axis))


def _transposed(
    facts: Facts, node: fx.Node, layout: Layout, axis: int, numbers: dict[str, list[int]], extent: int
) -> Sharding | None:
    """Input position `i` adds to output positions `i * step - cut + [0, extent]`."""
    source: Any = node.args[0]
    out = facts.resized(layout, facts.shape(node)[layout.dim])
    if out is None or layout.outer != 1:
        return None
    step, cut = numbers["stride"][axis], numbers["padding"][axis]
    without = {name: _without(numbers[name], axis) for name in ("padding", "output_padding")}

    def reach(start: int, stop: int) -> tuple[int, int]:
        # The result has to cover `start` and `stop` even where no input position adds anything: in gaps, and behind the last.
        return min(-((extent - start - cut) // step), (start + cut) // step), (stop - 1 + cut) // step + 2

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        value = _call(em, n, fetch_window(em, source, layout, reach, out), **without)
        start, stop = em.cuts(out)[em.group.rank]
        first = start + cut - reach(start, stop)[0] * step
        return em.call(aten.slice.Tensor, (value, out.dim, first, first + stop - start))

    return Sharding({source: layout}, out, emit, kind="exchange")


def pooling(dims: int, fill: float) -> Rule:
    """Make the rule for pooling over the last `dims` dimensions; `fill` stands for padding."""

    def rule(facts: Facts, node: fx.Node) -> Sharding | None:
        source: Any = node.args[0]
        layout = facts.layout(source)
        if layout is None:
            return None
        axis = layout.dim - len(facts.shape(source)) + dims
        if axis < 0:
            return Sharding({source: layout}, layout)
        given = bound(node)
        kernel, padding = _listed(given["kernel_size"], dims), _listed(given["padding"], dims)
        stride = _listed(given["stride"] or kernel, dims)
        extent = _listed(given.get("dilation", 1), dims)[axis] * (kernel[axis] - 1)
        counted = given.get("count_include_pad", True) and source.meta["val"].is_floating_point()
        if given["ceil_mode"] or (padding[axis] and not counted):
            return None
        before = padding[axis]
        return _windows(facts, node, layout, extent + 1, stride[axis], before, fill, padding=_without(padding, axis))

    return rule


def columns(facts: Facts, node: fx.Node) -> Sharding | None:
    """`F.unfold`: the windows of an image behind each other, of an image of one row or column only."""
    given, source = bound(node), node.args[0]
    assert isinstance(source, fx.Node)
    layout, shape = facts.layout(source), facts.shape(source)
    axis = None if layout is None else layout.dim - len(shape) + 2
    if layout is None or axis is None or len(shape) != 4:
        return None
    if axis < 0:
        return Sharding({source: layout}, layout) if layout.dim == 0 else None
    kernel, dilation, padding, step = (_listed(given[name], 2) for name in ("kernel_size", "dilation", "padding", "stride"))
    other = 1 - axis
    if shape[2 + other] + 2 * padding[other] != dilation[other] * (kernel[other] - 1) + 1:
        return None  # more than one window side by side
    extent = dilation[axis] * (kernel[axis] - 1)
    return _windows(facts, node, layout, extent + 1, step[axis], padding[axis], padding=_without(padding, axis), dim=2)


def mean_of_all(facts: Facts, node: fx.Node) -> Sharding | None:
    """`adaptive_avg_pool1d` to one position."""
    source: Any = node.args[0]
    layout = facts.layout(source)
    if layout is None:
        return None
    if layout.dim != len(facts.shape(source)) - 1:
        return Sharding({source: layout}, layout)
    return finish_partial(facts, node, {source: layout}, layout, "avg") if list(bound(node)["output_size"]) == [1] else None


def sliding(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.unfold(dim, size, step)`: the windows themselves."""
    source, dim, size, step = node.args
    assert isinstance(source, fx.Node)
    layout = facts.layout(source)
    if layout is None:
        return None
    if dim % len(facts.shape(source)) != layout.dim:  # type: ignore[operator]
        return Sharding({source: layout}, layout)
    return _windows(facts, node, layout, size, step)  # type: ignore[arg-type]


def difference(facts: Facts, node: fx.Node) -> Sharding | None:
    source: Any = node.args[0]
    layout, given = facts.layout(source), bound(node)
    if layout is None or given["prepend"] is not None or given["append"] is not None:
        return None
    if given["dim"] % len(facts.shape(source)) != layout.dim:
        return Sharding({source: layout}, layout)
    return _windows(facts, node, layout, given["n"] + 1, 1)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        [
            aten.conv1d.default,
            aten.conv1d.padding,
            aten.conv2d.default,
            aten.conv2d.padding,
            aten.conv3d.default,
            aten.conv3d.padding,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
            aten.convolution.default,
        ],
        convolution,
    ),
    aten.avg_pool1d.default: pooling(1, 0.0),
    aten.avg_pool2d.default: pooling(2, 0.0),
    aten.max_pool2d.default: pooling(2, float("-inf")),
    aten.adaptive_avg_pool1d.default: mean_of_all,
    aten.im2col.default: columns,
    aten.unfold.default: sliding,
    aten.diff.default: difference,
}
