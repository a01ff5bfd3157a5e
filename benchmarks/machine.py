"""What a benchmark ran on."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path

import torch

__all__ = ["machine"]


def machine() -> dict[str, str]:
    """Return what results are to be read with: releases, the processor and the day."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
