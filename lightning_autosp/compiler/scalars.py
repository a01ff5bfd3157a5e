"""Python numbers that are known only while the graph runs, as tensors.

A Python float that changes from step to step (an annealed loss weight) reaches the graph as a tensor and `.item()`; so do
`loss.item()` in a log and what `torch._check` is told of a tensor. Sizes become constants when a program is specialised, these
numbers cannot: they stay tensors without dimensions.

    item(t) -> mul(item, 2.0) -> mul.Tensor(x, number)      becomes      detach(t) -> mul(t, 2.0) -> mul.Tensor(x, t)
    item(t) -> ge(item, 1) -> _assert_scalar(ge)            becomes      detach(t) -> ge(t, 1) -> _assert_async(ge)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp.lines import frames

__all__ = ["NeedsBreakError", "keep_numbers_as_tensors"]

aten = torch.ops.aten
_SAME = [operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.and_, operator.or_]
_SAME += [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
_ON_TENSORS: dict[Any, Any] = {
    **{function: function for function in _SAME},
    torch.sym_not: torch.logical_not,
    torch.sym_ite: torch.where,
    torch.sym_float: torch.Tensor.double,
}
"""What computes on tensors what a function computes on numbers."""
_OWN = "/lightning_autosp/step.py"
_WIDE = {torch.SymFloat: torch.float64, torch.SymInt: torch.int64, torch.SymBool: torch.bool}


class NeedsBreakError(Exception):
    """The step cannot be one graph, though Dynamo could trace it as one: Python needs the value of a tensor."""


def keep_numbers_as_tensors(graph: fx.Graph) -> None:
    """Rewrite a captured graph so that no node holds a number read from a tensor.

    Raises:
        NeedsBreakError: If such a number is used as anything but a number in arithmetic (a size, an index).
    """
    tensors: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (aten.item.default, aten._local_scalar_dense.default):
            tensors[node] = _read(graph, node)
        elif node.target is aten._assert_async.default:  # without a message it counts as dead code
            _claim(node, node.args[0])
        elif any(source in tensors for source in node.all_input_nodes):
            with graph.inserting_before(node):
                _replace(graph, node, tensors)
    for node in reversed(list(tensors)):
        graph.erase_node(node)


def _read(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        return _cast(graph, graph.call_function(aten.detach.default, node.args), node, _WIDE[type(node.meta["val"])])


def _cast(graph: fx.Graph, value: fx.Node, like: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Add a cast; `like` gives the source line, its device the first tensor's behind it."""
    source = value if "val" in value.meta else value.all_input_nodes[0]
    value.meta = {**like.meta, "val": source.meta["val"]}
    cast = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    with source.meta["val"].fake_mode:
        cast.meta = {**like.meta, "val": source.meta["val"].to(dtype)}
    return cast


def _replace(graph: fx.Graph, node: fx.Node, tensors: dict[fx.Node, fx.Node]) -> None:
    known = node.meta.get("val")
    if node.op == "output":
        raise NeedsBreakError("the step returns a tensor's value as a Python number")
    if node.target is aten._assert_scalar.default:
        _claim(node, tensors[node.args[0]])  # type: ignore[index]
        return
    if not isinstance(known, Tensor):
        if node.target not in _ON_TENSORS or type(known) not in _WIDE:
            raise NeedsBreakError(f"Python needs a tensor's value for {node.target}\n{node.stack_trace or ''}")
        args: Any = fx.map_arg(node.args, lambda source: tensors.get(source, source))
        result = graph.call_function(_ON_TENSORS[node.target], args)
        first = next(source for source in node.all_input_nodes if source in tensors)
        result.meta = {**node.meta, "val": tensors[first].meta["val"]}
        tensors[node] = _cast(graph, result, node, _WIDE[type(known)])
        return
    if node.target is aten.scalar_tensor.default:
        node.replace_all_uses_with(_cast(graph, tensors[node.all_input_nodes[0]], node, known.dtype))
        graph.erase_node(node)
        return
    overload = getattr(getattr(node.target, "overloadpacket", None), "Tensor", None)
    if overload is None or node.kwargs or len(node.args) != 2:
        raise NeedsBreakError(f"{node.target} needs a tensor's value as a Python number\n{node.stack_trace or ''}")
    # A Python number does not change the dtype of what it meets; a tensor of the result's dtype does not either.
    dtype = known.dtype if known.dtype not in (torch.bfloat16, torch.float16) or known.ndim == 0 else torch.float32
    node.target = overload
    node.args = tuple(
        _cast(graph, tensors[arg], node, dtype) if isinstance(arg, fx.Node) and arg in tensors else arg for arg in node.args
    )


def _claim(node: fx.Node, condition: Any) -> None:
    """Make a node the assertion that a tensor holds true. Inductor puts what it says into C++ as it is."""
    places = [f"{file}:{line}" for file, line in frames(node) if not file.endswith(_OWN)]
    said = "A check of a tensor's values failed, at " + ", called at ".join(reversed(places[-3:] or ["<unknown>"]))
    node.target, node.args = aten._assert_async.msg, (condition, said)
