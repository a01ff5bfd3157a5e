"""What Dynamo nests in its graph, inlined: activation checkpoints and `torch.vmap`.

Dynamo records a vmap as calls that open a level, batch and unbatch tensors, and close it. They mean something only while they run
under functorch, so what lies between is traced once on its own, down to ATen, and takes the place of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lightning_autosp import _compat

__all__ = ["inline_checkpoints", "inline_vmaps"]


def inline_checkpoints(gm: fx.GraphModule) -> None:
    """Replace `torch.utils.checkpoint` calls by their bodies, each operator tagged for recomputation."""
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        body = getattr(gm, node.args[0].target)
        inline_checkpoints(body)
        returned = _splice(
            gm, body, node.args[1:], node, lambda inner: {**inner.meta, "recompute": CheckpointPolicy.PREFER_RECOMPUTE}
        )
        for user in list(node.users):  # the operator returns a tuple, so every user picks one of its values
            user.replace_all_uses_with(returned[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def _splice(
    gm: fx.GraphModule, body: fx.GraphModule, inputs: Sequence[Any], before: fx.Node, meta: Callable[[fx.Node], dict[str, Any]]
) -> Any:
    """Copy a body's nodes into a graph and return what stands there for its outputs.

    Args:
        gm: Whose graph; changed in place.
        body: What to copy.
        inputs: What its placeholders stand for.
        before: Where to.
        meta: The metadata of a copy.
    """
    mapping: dict[fx.Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(before):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                break
            if inner.op == "get_attr":
                name = f"{before.name}_{inner.target}".replace(".", "_")
                setattr(gm, name, getattr(body, inner.target))
                mapping[inner] = gm.graph.get_attr(name)
            else:
                mapping[inner] = gm.graph.node_copy(inner, mapping.__getitem__)
            mapping[inner].meta = meta(inner)
    return fx.map_arg(body.graph.output_node().args[0], mapping.__getitem__)


def inline_vmaps(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Replace every vmap in one of Dynamo's graphs by plain operators.

    Args:
        gm: The graph; changed in place.
        fake_mode: That of its example values.
    """
    segments = _segments(gm.graph)
    for segment in segments:
        _inline(gm, segment, fake_mode)
    if segments:
        gm.graph.lint()
        gm.recompile()


def _segments(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes from each outermost level's opening to its closing."""
    segments: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        opens = node.target is _compat.VMAP_OPENS
        if opens and depth == 0:
            segments.append([])
        depth += opens
        if depth:
            segments[-1].append(node)
        depth -= node.target is _compat.VMAP_CLOSES
    return segments


def _inline(gm: fx.GraphModule, segment: list[fx.Node], fake_mode: Any) -> None:
    own = set(segment)
    inputs = list(dict.fromkeys(source for node in segment for source in node.all_input_nodes if source not in own))
    outputs = [node for node in segment if any(user not in own for user in node.users)]
    graph = fx.Graph()
    copies = {source: graph.placeholder(source.name) for source in inputs}
    for node in segment:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    body = fx.GraphModule(gm, graph)
    with fake_mode:
        traced = _compat.make_fx(lambda *args: fx.Interpreter(body).run(*args), tracing_mode="real")(
            *(source.meta["example_value"] for source in inputs)
        )
    trace = next((node.meta["stack_trace"] for node in segment if "stack_trace" in node.meta), None)
    source_line = {"stack_trace": trace} if trace else {}
    results = _splice(gm, traced, inputs, segment[0], lambda inner: {"example_value": inner.meta.get("val"), **source_line})
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result)
    for node in reversed(segment):
        gm.graph.erase_node(node)
