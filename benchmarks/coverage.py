"""Measure which Hugging Face architectures are one graph, exact and sharded, and write `docs/coverage.md`.

    python benchmarks/coverage.py [--only llama,bert] [--family moe] [--implementations sdpa,eager] [--jobs 2] [--verbose]

Every row of the table is one tiny model (`benchmarks/zoo.py`) with one attention implementation, measured in a process of its own:
its training loss is computed in float64 on one device and on several ranks, and loss and gradients are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.zoo import FAMILIES, ZOO, Entry, Example, NotApplicableError, widen_casts  # noqa: E402

TOLERANCES = {"float64": (1e-10, 1e-9), "float32": (1e-6, 1e-5)}
"""Relative errors allowed for the loss and for the norm of each gradient, by the narrowest type the model computes in."""
FLOOR = 1e-4
"""Errors of gradients are relative to the gradient's norm, or to this share of the model's largest norm if that is more: some
are zero but for rounding (of the bias of a key projection, or of a convolution before a batch norm)."""
MARK = "coverage row: "
COMPARED = ("exact", "not exact")

Row = dict[str, Any]


# One row, in a process of its own


def child(name: str, implementation: str, num_ranks: int, *, as_is: bool) -> None:
    """Measure one row and print it for the parent process."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if not as_is:
        widen_casts()
    entry, start = ZOO[name], time.perf_counter()
    try:
        row = compare(entry.build(implementation), num_ranks)
    except NotApplicableError as error:
        row = {"status": "not applicable", "reason": str(error)}
    print(MARK + json.dumps({**row, "seconds": time.perf_counter() - start}))


def compare(example: Example, num_ranks: int) -> Row:
    """Compare a module on several ranks with the same module on one device: in pieces if Python cuts it."""
    import torch

    from lightning_autosp.compiler.report import StrictModeError

    module = example.module
    before = copy.deepcopy(module)
    want = module(*example.inputs)
    want.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    example = replace(example, module=before)
    why: Row = {}
    try:
        try:
            losses, by_rank, found = simulate(replace(example, module=copy.deepcopy(before)), num_ranks)
        except StrictModeError as error:  # not one graph
            why = failure(error.__cause__ or error)
            if why["status"] != "cut":
                return why
            torch._dynamo.reset()
            losses, by_rank, found = run_pieces(example, num_ranks)
            found["cut"] = {key: why[key] for key in ("reason", "where")}
    except Exception as error:  # noqa: BLE001 -- whatever it is becomes the row
        row = failure(error)
        if why and not compiles(example):
            row["reason"] = "torch.compile fails on one device, too: " + why["reason"]
        return row

    loss_error = max(abs(loss - want.item()) / max(abs(want.item()), 1e-300) for loss in losses)
    floor = FLOOR * max((g.norm().item() for g in gradients.values() if g is not None), default=0.0)
    errors = {name: max(distance(of_rank[name], gradient, floor) for of_rank in by_rank) for name, gradient in gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    loss_limit, limit = TOLERANCES[found["precision"]]
    return {
        "status": "exact" if loss_error <= loss_limit and errors[worst] <= limit else "not exact",
        "loss_error": loss_error,
        "gradient_error": errors[worst],
        "worst_parameter": worst,
        "wrong_parameters": [name for name, error in errors.items() if error > limit],
        "num_parameters": len(errors),
        **found,
    }


def compiles(example: Example) -> bool:
    """Whether a module runs on one device under `torch.compile`, in as many pieces as it takes."""
    import torch

    torch._dynamo.reset()
    try:
        torch.compile(copy.deepcopy(example.module), backend="eager")(*example.inputs)
    except Exception:  # noqa: BLE001 -- asked is whether
        return False
    return True


Ranks = tuple[list[float], list[dict[str, "Tensor | None"]], Row]
"""Every rank's loss, every rank's gradients, and what became of the graphs."""


def simulate(example: Example, num_ranks: int) -> Ranks:
    """Run a module on simulated ranks, as one graph."""
    from lightning_autosp.check import Simulation
    from lightning_autosp.compiler.report import Report
    from lightning_autosp.step import CompiledStep

    simulation = Simulation(example.module, num_ranks, sharded=False)
    compiler = replace(simulation.compiler(Report(), "forward"), strict=True)
    step: Any = CompiledStep(example.module, "forward", compiler, simulation.parameters[0], example.sequence_dim)
    loss = step(*example.inputs)
    run = simulation.last
    assert run is not None
    losses = run.everywhere(loss)
    simulation.backward(losses)
    return [one.item() for one in losses], simulation.gradients(), found_in([run.report], [run.step.captured])


def run_pieces(example: Example, num_ranks: int) -> Ranks:
    """Run a module in pieces: on processes, for what Dynamo does about what it cannot trace is a process's matter."""
    import torch
    from torch.multiprocessing import start_processes

    with tempfile.TemporaryDirectory() as folder:
        start_processes(run_rank, (example, num_ranks, folder), nprocs=num_ranks, start_method="fork")
        ranks = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(num_ranks)]
    return [rank["loss"] for rank in ranks], [rank["gradients"] for rank in ranks], ranks[0]["found"]


def run_rank(rank: int, example: Example, num_ranks: int, folder: str) -> None:
    """Run one of the processes and leave its results in a folder."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_autosp.check import RememberingCompiler
    from lightning_autosp.collectives import Group
    from lightning_autosp.compiler.report import Report
    from lightning_autosp.parameters import ModuleParameters
    from lightning_autosp.step import CompiledStep

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    mesh = init_device_mesh("cpu", (num_ranks,))
    group, report = Group(mesh.get_group().group_name, num_ranks, rank), Report()
    compiler = RememberingCompiler(mesh, group, "aot_eager", report, "forward", rank_seed=rank)
    parameters = ModuleParameters(example.module, mesh, group, sharded=False)
    step: Any = CompiledStep(example.module, "forward", compiler, parameters, example.sequence_dim)
    loss = step(*example.inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in example.module.named_parameters()}
    found = {"num_pieces": len(report.steps), **found_in(report.steps, compiler.graphs)}
    torch.save({"loss": loss.item(), "gradients": gradients, "found": found}, f"{folder}/{rank}")
    dist.destroy_process_group()


def found_in(reports: list[Any], graphs: list[Any]) -> Row:
    """Return what became of the graphs, as plain data."""
    by_python = [what for report in reports for crossing in report.crossings for what in crossing.gathers]
    return {
        "precision": "float32" if any(narrowest(captured) == "float32" for captured in graphs) else "float64",
        "num_sharded": sum(report.num_local + report.num_reductions for report in reports),
        "num_data": sum(report.num_data for report in reports),
        "gathered": [fallback(one) for report in reports for one in report.gathered]
        + [{"name": "Python", "where": shortened(what), "source": "", "reason": "wanted at a cut"} for what in by_python],
        "in_full": [fallback(one) for report in reports for one in report.in_full],
        "attention": [
            {"method": call.method, "mask": call.mask, "where": shortened(call.where)}
            for report in reports
            for call in report.attention
        ],
    }


def distance(got: Tensor | None, want: Tensor | None, floor: float) -> float:
    """Return the norm of a gradient's error, relative to the gradient's or to `floor`; no gradient is a gradient of zero."""
    if got is None or want is None:
        there = want if got is None else got
        return 0.0 if there is None else there.norm().item() / max(floor, 1e-300)
    error = (got - want).norm().item() / max(want.norm().item(), floor, 1e-300)
    return error if error == error else float("inf")


def narrowest(captured: Any) -> str:
    """Return "float32" if anything that was computed from a parameter is narrower than float64."""
    import torch

    trained = set(captured.trainable)
    for node in captured.graph.nodes:
        if any(source in trained for source in node.all_input_nodes):
            trained.add(node)
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return "float32"
    return "float64"


def fallback(one: Any) -> dict[str, str]:
    name = re.sub(r"<built-in function (\w+)>", r"\1", one.name)
    return {"name": name, "where": shortened(one.where), "source": one.source, "reason": shortened(one.reason)}


def shortened(text: str) -> str:
    """Return a text with paths relative to the packages they are in."""
    return re.sub(r"[^\s'\"]*/site-packages/", "", text).replace(f"{ROOT}/", "")


def failure(error: BaseException) -> Row:
    """Return the row of a step that was not lowered: its graph is cut, and the strategy would run the pieces, or it is an error."""
    from torch._dynamo.exc import BackendCompilerFailed

    from lightning_autosp.compiler.scalars import NeedsBreakError
    from lightning_autosp.step import CANNOT_TRACE

    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    cut = isinstance(cause, (NeedsBreakError, *CANNOT_TRACE))
    text = shortened(str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]

    def said(heading: str) -> str:
        return next((line.removeprefix(heading).strip() for line in lines if line.startswith(heading)), "")

    headline = lines[0] if lines else ""
    if not cut or isinstance(cause, NeedsBreakError):
        headline = f"{type(cause).__name__}: {shortened(str(cause)).strip().partition(chr(10))[0]}"
    frames = re.findall(r'File "(transformers/[^"]+)", line (\d+)', text)
    return {
        "status": "cut" if cut else "error",
        "reason": f"{headline} {said('Explanation:')}".strip()[:400],
        "context": said("Developer debug context:")[:300],
        "where": ":".join(frames[-1]) if frames else raised_at(cause),
        "text": text[-6000:],
    }


def raised_at(error: BaseException) -> str:
    """Return the innermost line of this project that an error came through."""
    place, frame = "", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "/lightning_autosp/" in file or not place:
            place = shortened(f"{file}:{frame.tb_lineno}")
        frame = frame.tb_next
    return place


# All rows


def measure(entry: Entry, implementation: str, options: argparse.Namespace) -> Row:
    """Measure one row in a process of its own."""
    command = [sys.executable, __file__, "--row", entry.name, implementation, "--num-ranks", str(options.num_ranks)]
    command += ["--as-is"] if options.as_is else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    row: Row = {"name": entry.name, "family": entry.family, "implementation": implementation, "note": entry.note}
    row |= {"status": "error", "where": "", "reason": f"no answer in {options.timeout:g} s"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "seconds": options.timeout}
    answer = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if answer is not None:
        return row | json.loads(answer.removeprefix(MARK))
    text = shortened(done.stderr).strip() or f"exit status {done.returncode}"
    return {**row, "reason": text.splitlines()[-1][:400], "text": text[-6000:], "seconds": time.perf_counter() - start}


def unsharded(row: Row) -> bool:
    """Whether a step was compared of which nothing is sharded."""
    if row["status"] not in COMPARED:
        return False
    return row["num_sharded"] == 0 or ("cut" not in row and any(one["name"] == "the whole step" for one in row["in_full"]))


def grouped(texts: Iterable[str]) -> list[str]:
    """Return every text once, with how often it occurs."""
    return [f"{count} x {text}" if count > 1 else text for text, count in Counter(texts).items()]


def details(row: Row) -> list[str]:
    """Return a line for every operator that is gathered or computed in full."""
    if row["status"] not in COMPARED:
        return []
    if unsharded(row):
        first = row["in_full"][0] if row["in_full"] else {"where": "", "reason": "nothing in the step has the sequence"}
        return [f"nothing is sharded, {len(row['in_full'])} in full: {first['reason']} ({first['where']})"]
    lines = [f"gathered: `{one['name']}` at {one['where']}, {one['reason']}" for one in row["gathered"]]
    lines += [f"in full: `{one['name']}` at {one['where']}: `{one['source']}`" for one in row["in_full"]]
    return grouped(lines)


def headline(row: Row) -> str:
    """Return one line for a terminal."""
    start = f"{row['name']:<32} {row['implementation']:<6} {row['status']:<14}"
    start += f" {row['num_pieces']} pieces," if "cut" in row else ""
    if row["status"] not in COMPARED:
        return f"{start} {row['reason'][:150]} {row.get('where', '')}"
    counts = f"{row['num_sharded']} sharded, {len(row['gathered'])} gathered, {len(row['in_full'])} in full"
    errors = f"loss {row['loss_error']:.1e}, gradients {row['gradient_error']:.1e} ({row['precision']})"
    return f"{start} {errors}, {counts}, {len(row['attention'])} attention, {row['seconds']:.0f} s"


def fallbacks(rows: list[Row], key: str) -> list[tuple[str, int, int, str]]:
    """Return `(operator, number of rows, occurrences, rows)`, most rows first."""
    counts: Counter[str] = Counter()
    users: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["status"] in COMPARED and not unsharded(row):
            for one in row[key]:
                counts[one["name"]] += 1
                implementations = users[one["name"]][row["name"]]
                if row["implementation"] not in implementations:
                    implementations.append(row["implementation"])
    table = []
    for name, count in counts.items():
        where = [model if found == ["none"] else f"{model} {'/'.join(found)}" for model, found in users[name].items()]
        table.append((name, sum(len(found) for found in users[name].values()), count, ", ".join(where)))
    return sorted(table, key=lambda one: (-one[1], -one[2], one[0]))


# The page


def table(head: list[str], rows: Iterable[Iterable[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *map(line, rows)]


def summary(rows: list[Row]) -> list[str]:
    """Return the table of counts by family."""
    lines = []
    for family in (*FAMILIES, "all"):
        own = [row for row in rows if family in (row["family"], "all")]
        if not own:
            continue
        exact = [row for row in own if row["status"] == "exact"]
        clean = [row for row in exact if not row["in_full"] and not row["gathered"]]
        counts = Counter(row["status"] for row in own)
        lines.append(
            [family, len({row["name"] for row in own}), len(own), len(exact), len(clean), sum(map(unsharded, exact))]
            + [sum("cut" in row for row in own), counts["not exact"], counts["error"]]
        )
    head = ["family", "architectures", "rows", "exact", "nothing gathered or in full", "nothing sharded", "in pieces"]
    return table([*head, "not exact", "error"], lines)


def line_of(row: Row) -> list[object]:
    """Return a row of the table of architectures."""
    start = [row["name"], row["family"], row["implementation"]]
    end = [f"{row['seconds']:.0f}", row["note"]]
    if row["status"] not in COMPARED:
        return [*start, "**error**", *[""] * 6, *end]
    result = "exact" if row["status"] == "exact" else "**not exact**"
    result += " (float32)" if row["precision"] == "float32" else ""
    result += f", in {row['num_pieces']} pieces" if "cut" in row else ""
    result += ", nothing sharded" if unsharded(row) else ""
    errors = [f"{row['loss_error']:.0e}", f"{row['gradient_error']:.0e}"]
    calls = grouped(call["method"] + (f", {call['mask']}" if call["mask"] else "") for call in row["attention"])
    return [*start, result, *errors, row["num_sharded"], len(row["gathered"]), len(row["in_full"]), "; ".join(calls), *end]


def document(rows: list[Row], options: argparse.Namespace, missing: list[tuple[str, str]]) -> str:
    """Return the page; `missing` are the rows it lacks."""
    import torch
    import transformers

    (loss, gradient), (narrow_loss, narrow_gradient) = TOLERANCES["float64"], TOLERANCES["float32"]
    widened = f"""
Most models cast to float32 in norms, softmax or the loss, whatever their own type, which would hide what these limits are to
show: while Transformers is imported, `torch.float32` is read as `torch.float64` and `.float()` as `.double()`. Models that
compute in float32 nevertheless are held to {narrow_loss:g} and {narrow_gradient:g}, and the table says *float32*.
"""
    text = f"""# Coverage of Hugging Face architectures

Generated by `python benchmarks/coverage.py` with torch {torch.__version__}, transformers {transformers.__version__} and
Python {platform.python_version()}, on CPU. Do not edit.

Each row is a tiny model built from a configuration (`benchmarks/zoo.py`: mostly two layers, random weights, nothing
downloaded), with its training loss and the gradient of every parameter computed on one device and on {options.num_ranks}
ranks (simulated, or processes where the step is in pieces), in float64. It is *exact* if the loss is within {loss:g} relative and
the norm of every gradient's error within {gradient:g} of the gradient's norm (or of {FLOOR:g} of the model's largest, where that is
more: some gradients are zero but for rounding).
{"" if options.as_is else widened}
*Sharded* counts operators that run on a rank's part of the sequence, *gathered* values that are made whole for an operator
that wants them so, *in full* operators that every rank runs on the whole sequence. Where Python looks at data or does what
cannot be captured, a step is *in pieces*, as the strategy runs it: what Python gathers between them counts as gathered. In an
*error* row the compiler itself fails. Attention implementations that an architecture does not have are left out; *none* is a model
without attention.

## Summary
"""
    head = ["architecture", "family", "attention", "result", "loss error", "worst gradient error", "sharded", "gathered", "in full"]
    head += ["attention calls and what became of their masks", "s", "note"]
    if missing:
        counts = Counter(implementation for _, implementation in missing)
        text += "\nNot measured this time: " + ", ".join(f"{n} rows of {name} attention" for name, n in counts.items()) + ".\n"
    lines = [text, *summary(rows), "", "## Architectures", "", *table(head, map(line_of, rows)), ""]
    for heading, whys in {
        "Errors": [(row, row) for row in rows if row["status"] not in COMPARED],
        "In pieces, because": [(row, row["cut"]) for row in rows if "cut" in row],
    }.items():
        if whys:
            lines += [f"## {heading}", ""]
            lines += [f"- {row['name']}, {row['implementation']}: {why['reason']} ({why['where']})" for row, why in whys]
            lines += [""]
    for key, title in (("in_full", "In full, by operator"), ("gathered", "Gathered, by operator")):
        counts = fallbacks(rows, key)
        if counts:
            lines += [f"## {title}", "", "Without the rows of which nothing is sharded.", ""]
            lines += [*table(["operator", "rows", "occurrences", "where"], ((f"`{one[0]}`", *one[1:]) for one in counts)), ""]
    lines += ["## What is gathered or in full, by model", ""]
    for row in rows:
        own = details(row)
        if own:
            lines += [f"### {row['name']}, {row['implementation']}", "", *(f"- {line}" for line in own), ""]
    return "\n".join(lines).rstrip() + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of architectures, with commas between them")
    parser.add_argument("--family", default="", help=f"families, with commas between them: {', '.join(FAMILIES)}")
    parser.add_argument("--implementations", default="sdpa,eager,none", help="of attention; none: models without attention")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at once")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a row may take")
    parser.add_argument("--as-is", action="store_true", help="leave the models' casts to float32 as they are")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--update", action="store_true", help="keep the rows in the file of --json that are not measured now")
    parser.add_argument("--markdown", type=Path, help="where to write the page; by default docs/coverage.md, if no row is missing")
    parser.add_argument("--verbose", action="store_true", help="list what is gathered or in full, with its line")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.row:
        child(*options.row, options.num_ranks, as_is=options.as_is)
        return 0
    only, families = ({part for part in text.split(",") if part} for text in (options.only, options.family))
    unknown = (only - ZOO.keys()) | (families - set(FAMILIES))
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}. Architectures: {', '.join(ZOO)}. Families: {', '.join(FAMILIES)}")
    everything = [(entry.name, implementation) for entry in ZOO.values() for implementation in entry.implementations]
    chosen = [
        (ZOO[name], implementation)
        for name, implementation in everything
        if name in (only or ZOO)
        and ZOO[name].family in (families or FAMILIES)
        and implementation in options.implementations.split(",")
    ]
    rows: dict[tuple[str, str], Row] = {}
    if options.update and options.json and options.json.exists():
        rows = {(row["name"], row["implementation"]): row for row in json.loads(options.json.read_text())}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda one: measure(*one, options), chosen):
            rows[row["name"], row["implementation"]] = row
            print(headline(row), flush=True)
            if options.verbose:
                print("".join(f"    {line}\n" for line in details(row)), end="", flush=True)
            if options.json:
                options.json.write_text(json.dumps(list(rows.values()), indent=1))
    missing = [key for key in everything if key not in rows]
    ordered = [rows[key] for key in everything if key in rows and rows[key]["status"] != "not applicable"]
    print("\n".join(summary(ordered)))
    page = options.markdown or (ROOT / "docs" / "coverage.md" if not missing else None)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(document(ordered, options, missing))
        print(f"wrote {page}")
    return int(any(row["status"] in ("not exact", "error") for row in ordered))


if __name__ == "__main__":
    sys.exit(main())
