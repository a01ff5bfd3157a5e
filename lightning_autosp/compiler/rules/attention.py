"""Attention: `F.scaled_dot_product_attention` over a sharded sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp.attention.masks import prove_mask
from lightning_autosp.attention.ulysses import ulysses_attention
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound

__all__ = ["RULES"]

aten = torch.ops.aten


def attention(facts: Facts, node: fx.Node) -> Sharding | None:
    given = bound(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    layout = facts.layout(query)
    rows = len(facts.shape(query)) - 2
    if layout is None or layout.dim != rows or layout.merged:
        return None
    if not (facts.has_sequence(key) or facts.has_sequence(value)):
        return _over_fixed_keys(facts, node, given, layout)
    key_layout = facts.layout(key)
    if key_layout is None or key_layout.dim != rows or facts.shape(key)[:-3] != facts.shape(query)[:-3]:
        return None
    value_layout = facts.fit(value, rows, key_layout)
    if value_layout is None or facts.shape(value)[:-3] != facts.shape(query)[:-3]:
        return None
    needs = {query: layout, key: key_layout, value: value_layout}
    if len(needs) < 3 and key_layout != layout:
        return None  # one tensor in two roles with two layouts
    is_causal, said = given["is_causal"], ""
    if mask is not None:
        proof = prove_mask(mask, facts.captured)
        square = facts.shape(query)[-2] == facts.shape(key)[-2]
        if proof.kind == "full" or (proof.kind == "causal" and square):
            is_causal, mask = proof.kind == "causal", None
            said = proof.text + (", dropped for the kernel's own flag" if is_causal else ", dropped")
        else:
            said = f"{proof.text}, kept whole"

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        parts = [em.get(x, needs[x]) for x in (query, key, value)]
        options = (given["dropout_p"], is_causal, em.value(given["scale"]), given["enable_gqa"])
        lengths = (em.lengths(layout), em.lengths(key_layout))
        whole_mask = None if mask is None else em.get(mask, None)
        return em.call(ulysses_attention, (*parts, whole_mask, *options, *lengths, em.group))

    # A mask that was dropped is no longer an input, so nothing computes it unless something else asks.
    dropped = () if mask is not None or given["attn_mask"] is None else (given["attn_mask"],)
    return Sharding(needs, layout, emit, kind="attention", note="ulysses", mask=said, unused=dropped)


def _over_fixed_keys(facts: Facts, node: fx.Node, given: dict[str, Any], layout: Layout) -> Sharding | None:
    """Keys without a sequence dimension (a fixed memory): every query is on its own."""
    query, mask = given["query"], given["attn_mask"]
    if given["is_causal"]:
        return None
    needs = {query: layout}
    if mask is not None and facts.has_sequence(mask):
        shape = facts.shape(mask)
        if len(shape) < 2 or facts.sequence_dims(mask) != [len(shape) - 2]:
            return None
        fitted = facts.fit(mask, len(shape) - 2, layout)
        if fitted is None:
            return None
        needs[mask] = fitted
    return Sharding(needs, layout, kind="attention", note="local queries over fixed keys")


RULES: dict[Any, Rule] = {aten.scaled_dot_product_attention.default: attention}
