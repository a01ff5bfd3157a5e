"""`torch.vmap` in a step, as the batched operators it stands for.

Dynamo records a vmap as calls that open a level, batch and unbatch tensors, and close it. They mean something only while they run
under functorch, so what lies between is traced once on its own, down to ATen, and takes the place of the calls.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from lightning_autosp import _compat

__all__ = ["inline_vmaps"]


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
    mapping: dict[fx.Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(segment[0]):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results = fx.map_arg(node.args[0], mapping.__getitem__)
                break
            if node.op == "get_attr":
                name = f"{segment[0].name}_{node.target}"
                setattr(gm, name, getattr(traced, node.target))
                mapping[node] = gm.graph.get_attr(name)
            else:
                mapping[node] = gm.graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = {"example_value": node.meta.get("val"), **({"stack_trace": trace} if trace else {})}
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(result)
    for node in reversed(segment):
        gm.graph.erase_node(node)
