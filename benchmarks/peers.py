"""One rank of many on one device: memory, time and traffic of a training step, ours and those of `baselines/`.

    python benchmarks/peers.py [--model llama-1b] [--world 8] [--lengths 131072,524288] [--device cuda] [--layers 2,4,6]
        [--methods ...] [--policies auto,full] [--memory 80GB] [--host-memory 96GiB] [--longest] [--json [FILE]]

The program is the first rank's, with torch's `fake` process group: real kernels, real memory, nothing is sent. What would be sent
is counted, and priced by a link model that is not part of any measured time. `README.md` beside this file explains every field.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from baselines import BASELINES, make_baseline  # noqa: E402
from machine import machine  # noqa: E402
from models import SHAPES, batch_of, decoder  # noqa: E402
from one_rank import fake_ranks, prepare_step  # noqa: E402

from lightning_autosp.compiler.backend import resolve_backend  # noqa: E402
from lightning_autosp.memory.devices import device_of, format_bytes, parse_bytes  # noqa: E402
from lightning_autosp.memory.estimate import MemoryEstimate, States, optimizer_memory  # noqa: E402
from lightning_autosp.memory.meter import LiveBytes  # noqa: E402
from lightning_autosp.memory.partition import MemoryOptions  # noqa: E402
from lightning_autosp.mesh import ParallelMesh  # noqa: E402

Row = dict[str, Any]

OURS, OURS_WITH_HOST = "autosp", "autosp, values on the host"
METHODS = (OURS, OURS_WITH_HOST, *BASELINES)
NODE_SIZE = 8
FLOPS = "6 * S * (parameters of products) + 6 * layers * S**2 * heads * head_dim: causal attention is half of all scores"


class FollowedBytes(LiveBytes):
    """Also follows storages whose size changes, as those of whole parameters do under FSDP2."""

    def __init__(self, known: Any = ()) -> None:
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, Any] = {}
        super().__init__(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._follow()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._follow()
        return out

    def _watch(self, tensor: Tensor, *, counted: bool, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        new = storage._cdata not in self._seen
        super()._watch(tensor, counted=counted, on_host=on_host)
        if new and counted and not on_host:
            self._sizes[storage._cdata] = storage.nbytes()
            self._storages[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)

    def _follow(self) -> None:
        for key, size in self._sizes.items():
            now = torch.UntypedStorage._new_with_weak_ptr(self._storages[key].cdata)
            if now is not None and now.nbytes() != size:
                self._add(now.nbytes() - size, False)
                self._sizes[key] = now.nbytes()
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int, on_host: bool) -> None:
        super()._free(key, self._sizes.pop(key, size), on_host)
        self._storages.pop(key, None)


class Wire(TorchDispatchMode):
    """Counts collectives and the bytes handed to them while operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            self.handed[name] += args[0].nbytes
        elif func.namespace == "c10d":
            given = args[1] if "base" in name else args[0]  # those take their output first
            self.handed[name] += sum(one.nbytes for one in pytree.tree_leaves(given) if isinstance(one, Tensor))
        return func(*args, **(kwargs or {}))


def sent_bytes(name: str, handed: int, world: int) -> float:
    """Return what a rank sends for the bytes it hands to a collective, rings taken for gathers and reductions."""
    if name.startswith("within "):  # counted as sent
        return handed
    word = name.replace("_", "")
    for start, factor in (
        ("allgather", world - 1),
        ("reducescatter", (world - 1) / world),
        ("allreduce", 2 * (world - 1) / world),
        ("alltoall", (world - 1) / world),
    ):
        if word.startswith(start):
            return handed * factor
    raise ValueError(f"what the collective {name!r} sends is not known")


def wire_seconds(sent: float, world: int, nvlink: float, network: float) -> float:
    """Return what sending takes: all ranks alike as receivers, the links within a node and beyond it at the same time."""
    beyond = max(0, world - NODE_SIZE) / max(1, world - 1)
    return max(sent * (1 - beyond) / nvlink, sent * beyond / network)


def model_flops(config: Any, module: Any, length: int) -> float:
    """Return the floating-point operations of a step on one sequence; see `FLOPS`."""
    products = sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and "embed_tokens" not in n)
    if config.tie_word_embeddings:
        products += config.vocab_size * config.hidden_size
    scores = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * length * products + 6.0 * length**2 * scores


@dataclass
class Running:
    """A method that is ready: its step runs forward and backward and gives this rank's loss."""

    step: Callable[[dict[str, Tensor]], Tensor]
    optimizer: torch.optim.Optimizer
    meter: LiveBytes | None
    estimate: Callable[[], MemoryEstimate | None]
    handed: Callable[[dict[str, Tensor]], dict[str, int]]


def _part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def prepare(asked: argparse.Namespace, method: str, policy: str, module: Any, batch: Any, mesh: ParallelMesh) -> Running:
    """Return a method's step for a module that is changed."""
    backend = resolve_backend(asked.backend, torch.device(asked.device))
    if method in BASELINES:
        torch._dynamo.reset()
        step, owner = make_baseline(BASELINES[method], module.model, mesh.flat, backend)
        owned = [_part(parameter.detach()) for parameter in owner.parameters()]
        counts = asked.device == "cpu" and not (BASELINES[method].compiled and backend == "inductor")
        meter = FollowedBytes([*owned, *batch.values(), *owner.buffers()]) if counts else None

        def metered(batch: dict[str, Tensor]) -> Tensor:
            if meter is None:
                return step(batch)
            with meter:
                return step(batch)

        return Running(metered, _adamw(owner, asked), meter, lambda: None, lambda batch: _watched(step, batch))
    device = device_of(torch.device(asked.device))
    host = asked.host_limit if method == OURS_WITH_HOST else 0

    def states() -> States:
        held = prepared.parameters.largest_parts()
        by_id = {id(parameter): held[name] for name, parameter in prepared.parameters.owned.items()}
        state, transient = optimizer_memory(running.optimizer, lambda parameter: by_id[id(parameter)])
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        return States(sum(part.nbytes for part in held.values()) + buffers, 0, state, transient)

    options = MemoryOptions(policy, asked.limit, False, device.roofline, device.overhead, host, states, fused=backend == "inductor")
    prepared = prepare_step(module, batch, mesh, options, backend=backend)

    def ours(batch: dict[str, Tensor]) -> Tensor:
        loss = prepared.step(batch, 0)
        loss.backward()
        return loss.detach()

    def handed(batch: dict[str, Tensor]) -> dict[str, int]:
        return {name: size for name, (_, size) in prepared.report.steps[-1].collectives.items()}

    counted = None if backend == "inductor" else prepared.meter
    running = Running(ours, _adamw(module, asked), counted, lambda: prepared.report.steps[-1].memory, handed)
    return running


def _adamw(module: Any, asked: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=asked.device == "cuda")


def _watched(step: Callable[[Any], Tensor], batch: dict[str, Tensor]) -> dict[str, int]:
    with Wire() as wire:
        step(batch)
    return dict(wire.handed)


def measure(asked: argparse.Namespace, method: str, policy: str, length: int, layers: int, repeats: int) -> Row:
    """Return the row of a method at one length. What cannot run says why."""
    one_device = method in BASELINES and BASELINES[method].shares == "nothing"
    world = 1 if one_device else asked.world
    row: Row = {"model": asked.model, "layers": layers, "world": world, "length": length, "method": method, "policy": policy}
    try:
        with fake_ranks(world, asked.device) as mesh:
            return {**row, **_measured(asked, method, policy, length, layers, repeats, world, mesh)}
    except Exception as error:  # noqa: BLE001  (a row says why it is empty)
        return {**row, "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        gc.collect()
        if asked.device == "cuda":
            torch.cuda.empty_cache()


def _measured(
    asked: argparse.Namespace, method: str, policy: str, length: int, layers: int, repeats: int, world: int, mesh: ParallelMesh
) -> Row:
    cuda = asked.device == "cuda"
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, asked.dtype))
    try:
        with torch.device(asked.device):
            module = decoder(asked.model, num_hidden_layers=layers)
    finally:
        torch.set_default_dtype(default)
    flops = model_flops(module.model.config, module, length)
    batch = {name: tensor.to(asked.device) for name, tensor in batch_of(length).items()}
    running = prepare(asked, method, policy, module, batch, mesh)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def once() -> float:
        start = time.perf_counter()
        running.step(batch)
        running.optimizer.step()
        running.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    once()
    seconds = [once() for _ in range(repeats)]
    median = statistics.median(seconds)
    groups = running.optimizer.param_groups
    held = [_part(p.detach()) for group in groups for p in group["params"]]
    held += [_part(one) for state in running.optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    estimate, meter = running.estimate(), running.meter
    peak = host = None
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    elif meter is not None:
        peak = meter.peak + sum(one.nbytes for one in [*held, *batch.values(), *module.buffers()])
        host = meter.host_peak
    found: Row = {
        "predicted_peak_bytes": estimate and estimate.peak,
        "measured_peak_bytes": peak,
        "predicted_host_bytes": estimate and estimate.host,
        "measured_host_bytes": host,
        "categories": estimate and estimate.categories,
        "step_seconds": median,
        "all_step_seconds": seconds,
        "compile_seconds": max(0.0, first - median),
        "tokens_per_second_per_rank": length / world / median,
        "model_flops": flops,
        "mfu": flops / world / median / device_of(torch.device("cuda")).roofline.flops if cuda else None,
    }
    if meter is not None or not (method in BASELINES and BASELINES[method].compiled):  # else Inductor's code is not seen
        handed = running.handed(batch)
        sent = sum(sent_bytes(name, size, world) for name, size in handed.items())
        found["wire_bytes"] = sent
        found["wire_seconds_modelled"] = wire_seconds(sent, world, asked.nvlink * 1e9, asked.network * 1e9)
    return found


def longest(asked: argparse.Namespace, method: str, policy: str, layers: int) -> Row:
    """Return the longest length, to a sixteenth, at which a step takes no more than the limits."""
    unit = asked.world * 16
    fits: Row | None = None
    low, high, length = 0, 0, max(unit, asked.lengths[0] // unit * unit)
    why = ""
    while not high or high - low > max(unit, low // 16):
        row = measure(asked, method, policy, length, layers, repeats=1)
        peak = row.get("measured_peak_bytes")
        host = row.get("measured_host_bytes") or 0
        if peak is not None and peak <= asked.limit and host <= asked.host_limit:
            fits, low = row, length
        else:
            high, why = length, row.get("why", f"{peak} bytes, {host} on the host")
        length = (low * 2 if not high else (low + high) // 2) // unit * unit
        if length in (0, low, high):
            break
    keys = ("model", "layers", "world", "method", "policy")
    sizes = ("measured_peak_bytes", "measured_host_bytes", "predicted_peak_bytes", "predicted_host_bytes")
    described = fits or row
    return {
        **{key: described[key] for key in keys},
        "limit_bytes": asked.limit,
        "host_limit_bytes": asked.host_limit if "host" in method else 0,
        "longest": low or None,
        **{size: (fits or {}).get(size) for size in sizes},
        "next": why,
    }


def extrapolated(rows: list[Row], layers: int) -> list[Row]:
    """Return time and memory of all layers from the first two depths measured, and how far off that is at the last."""
    found = []
    keys = ("method", "policy", "length")
    ordered = sorted(rows, key=lambda row: [str(row[key]) for key in keys])
    for key, group in itertools.groupby(ordered, key=lambda row: tuple(row[key] for key in keys)):
        depths = sorted((row for row in group if "why" not in row), key=lambda row: row["layers"])
        for field in ("step_seconds", "measured_peak_bytes"):
            known = [(row["layers"], row[field]) for row in depths if row[field] is not None]
            if len(known) < 3:
                continue
            (a, at_a), (b, at_b), (c, at_c) = known[0], known[1], known[-1]
            slope = (at_b - at_a) / (b - a)
            line = dict(zip(keys, key, strict=True))
            check = {"layers": c, "measured": at_c, "extrapolated": at_a + slope * (c - a)}
            found.append(
                {**line, "field": field, "from": [a, b], "layers": layers, "value": at_a + slope * (layers - a), "check": check}
            )
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _say(row: Row) -> None:
    head = f"{row['method']:<34} {row['policy']:<5} {row['layers']:>3} layers"
    if "longest" in row:
        print(f"{head}  longest {row['longest']}, then {row['next']}", flush=True)
    elif "why" in row:
        print(f"{head} {row['length']:>8}  not run: {row['why']}", flush=True)
    else:
        sizes = [row[key] for key in ("predicted_peak_bytes", "measured_peak_bytes", "measured_host_bytes", "wire_bytes")]
        predicted, peak, host, wire = ("-" if size is None else format_bytes(size) for size in sizes)
        text = f"peak {peak} (predicted {predicted}), host {host}, wire {wire}"
        print(f"{head} {row['length']:>8}  {row['step_seconds']:.3f} s  {text}", flush=True)


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Return everything asked for, as plain data."""
    full = SHAPES[asked.model][2]["num_hidden_layers"]
    depths = asked.layers or [full]
    pairs = [
        (method, policy) for method in asked.methods for policy in (asked.policies if method in (OURS, OURS_WITH_HOST) else [""])
    ]
    rows: list[Row] = []
    for layers, (method, policy) in itertools.product(depths, pairs):
        for length in [] if asked.longest else asked.lengths:
            rows.append(measure(asked, method, policy, length, layers, asked.repeats))
            rows[-1].setdefault("wire_bytes", None)
            _say(rows[-1])
        if asked.longest:
            rows.append(longest(asked, method, policy, layers))
            _say(rows[-1])
    device = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    links = {"nvlink_gb_per_s": asked.nvlink, "network_gb_per_s": asked.network, "node_size": NODE_SIZE}
    found = {**machine(), "commit": _commit(), "device": device, "dtype": asked.dtype, "backend": asked.backend}
    found |= {"note": asked.note, "flops_formula": FLOPS, "links": links, "rows": rows}
    if not asked.longest and len(depths) > 2:
        found["extrapolation"] = extrapolated(rows, full)
    return found


def main() -> None:
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description="One rank of many on one device, ours and baselines.")
    parser.add_argument("--model", choices=SHAPES, default="toy")
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument(
        "--lengths", type=numbers, default="1024", help="positions of the whole sequence; --longest starts at the first"
    )
    parser.add_argument(
        "--layers", type=numbers, default=[], help="depths; of three, the first two are extrapolated, the last checks"
    )
    parser.add_argument("--methods", type=lambda text: text.split(";"), default=list(METHODS), help="names, ; between them")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["auto"], help="of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--backend", choices=("auto", "inductor", "aot_eager"), default="auto")
    parser.add_argument("--memory", help="bytes a rank may take, as 80GB; default: the device's")
    parser.add_argument("--host-memory", default="96GiB", help="bytes a rank may keep on its host, where a method keeps any")
    parser.add_argument("--longest", action="store_true", help="find the longest length within the limits")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after two that are not")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s each way within a node of eight")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s each way beyond it")
    parser.add_argument("--note", default="", help="to be read with the results")
    parser.add_argument(
        "--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"write the numbers (default: {RESULTS.name})"
    )
    asked = parser.parse_args()
    unknown = sorted(set(asked.methods) - set(METHODS))
    if unknown:
        parser.error(f"--methods: {unknown} are not known. Use some of {'; '.join(METHODS)}")
    warnings.filterwarnings("ignore")
    asked.dtype = asked.dtype or ("bfloat16" if asked.device == "cuda" else "float32")
    device = device_of(torch.device(asked.device))
    asked.limit = device.memory if asked.memory is None else parse_bytes(asked.memory, "--memory")
    asked.host_limit = parse_bytes(asked.host_memory, "--host-memory")
    if asked.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.limit / device.memory))
    else:
        torch.set_num_threads(1)
    found = run(asked)
    if asked.json:
        Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
