"""Which lines of code a graph's operators come from."""

from __future__ import annotations

import linecache
import re

from torch import fx

__all__ = ["frames", "frames_in", "is_users", "source", "user_line"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_NOT_THE_USERS = ("/torch/", "/lightning/", "/lightning_autosp/", "/torchmetrics/")


def is_users(file: str) -> bool:
    """Whether a file is neither torch's nor Lightning's."""
    return not any(part in file for part in _NOT_THE_USERS)


def frames_in(text: str) -> list[tuple[str, int]]:
    """Return the `(file, line)` that a stack trace names, in its order."""
    return [(m["file"], int(m["line"])) for m in _FRAME.finditer(text)]


def frames(node: fx.Node) -> list[tuple[str, int]]:
    """Return the `(file, line)` that led to an operator, the innermost last."""
    return frames_in(node.meta.get("stack_trace") or "")


def user_line(node: fx.Node) -> str:
    """Return `file:line` of the innermost frame that is neither torch's nor Lightning's."""
    found = frames(node)
    own = [frame for frame in found if is_users(frame[0])]
    chosen = (own or found or [("<unknown>", 0)])[-1]
    return f"{chosen[0]}:{chosen[1]}"


def source(where: str) -> str:
    """Return the text of a `file:line`."""
    file, _, line = where.rpartition(":")
    return linecache.getline(file, int(line)).strip()
