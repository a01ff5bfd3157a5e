"""How a number of positions or heads is divided."""

from __future__ import annotations

__all__ = ["even_cuts"]


def even_cuts(length: int, parts: int) -> list[int]:
    """Return `parts + 1` cut positions; the parts differ by one position at most, the longer ones first."""
    small, extra = divmod(length, parts)
    return [part * small + min(part, extra) for part in range(parts + 1)]
