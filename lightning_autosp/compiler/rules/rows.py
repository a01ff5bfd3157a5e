"""Regions that compute every position by itself (`rowwise.py`): each rank its own, in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from lightning_autosp.attention.tiles import run_tiles
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.regions import RowRegion
from lightning_autosp.compiler.rule import Facts, Sharding
from lightning_autosp.compiler.tiling import needs_of, seed, write_tile

__all__ = ["emit_rows", "rows"]


def rows(facts: Facts, node: fx.Node) -> Sharding | None:
    """A region of rows: parts of its inputs' rows give parts of its results'."""
    target = node.target
    assert isinstance(target, RowRegion)
    wanted = target.rows
    if not wanted[0].span.base.free_symbols & facts.symbols:
        return None
    needs = needs_of(facts, node, *wanted)
    if needs is None:
        return None
    like = next((own for source in needs if (own := _given(facts, source, needs[source])) is not None), None)
    if like is not None:
        needs = {source: _cut_like(layout, like) for source, layout in needs.items()}
        wanted = tuple(_cut_like(layout, like) for layout in wanted)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        return _emit(em, n, wanted, needs)

    return Sharding(needs, wanted, emit, note="in tiles")


def _given(facts: Facts, source: fx.Node, layout: Layout) -> Layout | None:
    """Return how an input of the model is cut already, if it is along the same rows."""
    own = facts.layout(source)
    if own is None or own.routed or layout.merged or source not in facts.trained:
        return None
    return own if own.dim == layout.dim and own.size == layout.size else None


def _cut_like(layout: Layout, own: Layout) -> Layout:
    """Cut rows into the same parts as those of an input, which may themselves be several dimensions in one."""
    return replace(layout, span=own.span, outer=layout.outer * own.outer, inner=layout.inner * own.inner)


def emit_rows(em: Emitter, node: fx.Node) -> fx.Node:
    """Compute a region of rows from whole inputs."""
    return _emit(em, node, None, {})


def _emit(em: Emitter, node: fx.Node, parts: tuple[Layout, ...] | None, needs: Mapping[fx.Node, Layout]) -> fx.Node:
    target = node.target
    assert isinstance(target, RowRegion)
    exits, wanted = target.exits, [(layout,) for layout in target.rows]
    if parts is None:
        num_rows = em.integer(target.rows[0].span.length)
        shapes = [[em.integer(size) for size in em.facts.shape(one)] for one in exits]
    else:
        around = [em.integer(layout.outer * layout.inner) for layout in (parts[0], target.rows[0])]
        num_rows = max(em.lengths(parts[0])) * around[0] // around[1]
        shapes = [em.local_shape(one, part) for one, part in zip(exits, parts, strict=True)]
    program, inputs = write_tile(em, target, wanted, shapes, num_rows, tile_rows=target.tile_rows)
    em.tile_programs[node] = program
    values = (em.get(node.args[index], needs.get(node.args[index])) for index, _ in inputs)  # type: ignore[arg-type]
    return em.call(run_tiles, (program.handle, *seed(em, program), *values))
