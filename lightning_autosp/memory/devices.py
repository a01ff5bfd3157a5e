"""Device kinds as data: how much memory they have and how fast they are, from their makers' data sheets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from lightning_autosp.memory.costs import Roofline

__all__ = ["DEVICES", "DeviceKind", "device_kind", "device_of", "format_bytes", "free_host_memory", "limit_bytes", "parse_bytes"]

GB, GiB, TFLOPS = 10**9, 2**30, 10**12


@dataclass(frozen=True)
class DeviceKind:
    """One kind of accelerator.

    Attributes:
        name: What `device_kind` finds it by.
        memory: Bytes on the device.
        roofline: Dense bfloat16 arithmetic, memory, link to other devices (each way), host link (each way), at their peaks.
        overhead: Bytes that are not the program's: context, communication buffers, the allocator's rounding. Not yet calibrated.
        source: Where the numbers are from.
    """

    name: str
    memory: int
    roofline: Roofline
    overhead: int
    source: str


def _kind(name: str, memory: int, tflops: float, bandwidth: float, link: float, host: float, source: str) -> DeviceKind:
    roofline = Roofline(tflops * TFLOPS, bandwidth * GB, link * GB, host * GB)
    return DeviceKind(name, memory, roofline, 2 * GiB, source)


DEVICES: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        _kind("a100-40gb", 40 * GB, 312, 1555, 300, 32, "NVIDIA A100 data sheet, SXM"),
        _kind("a100-80gb", 80 * GB, 312, 2039, 300, 32, "NVIDIA A100 data sheet, SXM"),
        _kind("h100", 80 * GB, 989, 3350, 450, 64, "NVIDIA H100 data sheet, SXM"),
        _kind("h200", 141 * GB, 989, 4800, 450, 64, "NVIDIA H200 data sheet, SXM"),
        _kind("b200", 180 * GB, 2250, 7700, 900, 64, "NVIDIA DGX B200 data sheet, an eighth"),
        _kind("l40s", 48 * GB, 362, 864, 32, 32, "NVIDIA L40S data sheet"),
        _kind("rtx4090", 24 * GB, 165, 1008, 32, 32, "NVIDIA Ada architecture paper"),
        _kind("mi300x", 192 * GB, 1307, 5300, 448, 64, "AMD Instinct MI300X data sheet"),
    )
}

_CPU = Roofline(0.1 * TFLOPS, 20 * GB, 2 * GB, 20 * GB)
"""A few cores of a laptop, processes talking over gloo. What is chosen depends on ratios only."""


def device_kind(name: str) -> DeviceKind:
    """Return a device kind by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    found = DEVICES.get(name.lower().replace(" ", "-"))
    if found is None:
        raise ValueError(f"device {name!r} is not known. Use one of {', '.join(DEVICES)}, or give its memory in bytes.")
    return found


def device_of(device: torch.device) -> DeviceKind:
    """Return what is known of the device at hand."""
    if device.type != "cuda":
        return DeviceKind("cpu", _host_memory(), _CPU, 0, "the operating system")
    properties: Any = torch.cuda.get_device_properties(device)
    words = re.sub(r"[^a-z0-9]", "", properties.name.lower())
    names = [name for name in DEVICES if name.split("-")[0] in words]
    closest = min(names or ["h100"], key=lambda name: abs(DEVICES[name].memory - properties.total_memory))
    kind = DEVICES[closest]
    return DeviceKind(properties.name, properties.total_memory, kind.roofline, kind.overhead, kind.source)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_host_memory() -> int:
    """Return the bytes of host memory that no process holds, or, where the system does not say, all there are."""
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return _host_memory()


_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_bytes(text: str | int, name: str = "memory_limit") -> int:
    """Return a number of bytes: an integer, or text as "80GiB", "96 GB", "512MiB".

    Raises:
        ValueError: If it is none, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"{name}={text!r} is no number of bytes. Use an integer, or text such as '80GiB' or '96 GB'.")
    return int(float(match[1]) * unit)


def limit_bytes(limit: Any, total: int, name: str = "memory_limit") -> int:
    """Return what a limit means on a device: bytes, text, or a fraction of `total`.

    Raises:
        ValueError: If it is none of these, or a fraction outside (0, 1].
    """
    if isinstance(limit, float):
        if not 0 < limit <= 1:
            raise ValueError(f"{name}={limit!r} is not known. A fraction of the device's memory lies between 0 and 1.")
        return int(limit * total)
    return parse_bytes(limit, name)


def format_bytes(size: float) -> str:
    """Return a size as people read it, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
