"""`explain`: what it shows is what runs and what is predicted, and its page holds together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import modules
import pytest
import torch
from test_cli import write

from lightning_autosp import AutoSPStrategy
from lightning_autosp.__main__ import main
from lightning_autosp.attention.select import AttentionOptions
from lightning_autosp.compiler.report import Report
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.explain import Explanation, explain
from lightning_autosp.memory.devices import device_kind
from lightning_autosp.memory.partition import MemoryOptions
from lightning_autosp.mesh import SEQUENCE_AXIS
from lightning_autosp.parameters import ModuleParameters
from lightning_autosp.plan import Moments, PlanError, Planner, planner_of
from lightning_autosp.step import CompiledStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from one_rank import fake_ranks

WORLD, LENGTH = 4, 64


def batch() -> dict[str, torch.Tensor]:
    return next(iter(modules.loader(2, LENGTH)))


@pytest.fixture(scope="module")
def planner() -> Planner:
    torch.manual_seed(0)
    module = modules.GPT(layers=2)
    return Planner(
        module, batch(), world=WORLD, device=device_kind("h100"), attention="ulysses", backend="aot_eager", policy="full"
    )


@pytest.fixture(scope="module")
def found(planner: Planner) -> Explanation:
    return explain(planner)


def test_every_policy_reaches_its_peak_and_nothing_above_it(planner: Planner) -> None:
    planner.host_limit = 2**30
    moments: Moments = {}
    plan = planner.at(2**15, moments=moments)  # values of a MiB, which are worth moving
    planner.host_limit = 0
    assert {"none", "attention", "full", "offload", "auto"} <= plan.estimates.keys()
    for name, estimate in plan.estimates.items():
        shown = moments[name]()
        highest = max(shown, key=lambda one: one.bytes)
        assert (highest.bytes, highest.phase) == (estimate.peak, estimate.phase), name
        assert {key: size for key, size in highest.categories.items() if size} == {
            key: size for key, size in estimate.categories.items() if size
        }
        assert sum(one.cost.flops for one in shown if one.again) == estimate.flops_again
    assert any(one.operator.startswith("fetch ") for one in moments["offload"]())


def test_collectives_are_those_that_run(found: Explanation) -> None:
    report = Report()
    with fake_ranks(WORLD) as mesh:
        module = modules.GPT(layers=2)
        parameters = ModuleParameters(module, mesh.flat, mesh.all_ranks(), sharded=True)
        options = MemoryOptions("full", None, False, device_kind("h100").roofline)
        compiler = Compiler(
            mesh=mesh.mesh[SEQUENCE_AXIS],
            group=mesh.sequence(),
            backend="aot_eager",
            report=report,
            kind="training_step",
            attention=AttentionOptions("ulysses"),
            memory=options,
        )
        CompiledStep(module, "training_step", compiler, parameters, 1)(batch(), 0).backward()
    ran = report.steps[-1]
    assert found.report.collectives == ran.collectives
    assert {one.phase for one in found.collectives} == {"forward", "backward"}
    assert len(found.report.attention) == len(ran.attention) == 2
    assert (found.report.num_local, found.report.num_reductions, found.report.num_data) == (
        ran.num_local,
        ran.num_reductions,
        ran.num_data,
    )


def test_regions_hold_every_operator_once(found: Explanation) -> None:
    counts: Counter[str] = Counter()
    for one in found.regions:
        counts[one.form] += one.num_operators
    report = found.report
    expected = {"sharded": report.num_local, "joined": report.num_reductions, "attention": 2, "on data": report.num_data}
    assert counts == expected
    assert all(before.form != behind.form for before, behind in zip(found.regions, found.regions[1:], strict=False))
    assert all(re.fullmatch(r".*modules\.py:\d+(-\d+)?", line) for one in found.regions for line in one.lines)


def test_graphs_are_global_before_and_local_after(found: Explanation) -> None:
    assert re.search(r"i64\[2, s\d+\]\n", found.before)
    assert "# tokens.weight" in found.before
    assert re.search(r"f32\[2, s\d+ - 1, 32\] = aten.embedding", found.before)
    assert f"slice_layout : i64[2, {LENGTH // WORLD}] = slice_layout(" in re.sub(" +", " ", found.after)
    assert "ulysses_attention(" in found.after


def test_text_and_plain_data(found: Explanation) -> None:
    text = str(found)
    assert "GPT.training_step, 4 rank(s) of h100" in text
    assert "2 x ulysses at" in text
    assert "policy full" in text
    assert "(shown)" in text
    assert "forward|backward, from" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert {
        "name",
        "length",
        "world",
        "policy",
        "fits",
        "regions",
        "collectives",
        "attention",
        "policies",
        "memory",
        "graph",
    } <= set(data)
    assert max(sum(one["bytes"].values()) for one in data["memory"]) == data["policies"]["full"]["peak"]


VOID = {"meta", "br", "line", "polygon", "circle", "rect"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and counts them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] += 1
        for name, value in attrs:
            self.counts[f"{tag}#{value}" if name == "id" else f"{tag}.{value}"] += name in ("id", "class")
            if name in ("src", "href", "xlink:href", "srcset") or "url(" in (value or ""):
                self.links.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_is_one_well_formed_file(found: Explanation) -> None:
    page = Page(found.to_html())
    assert not page.links
    assert not page.counts["script"]
    assert page.counts["h2"] == 7
    for picture in ("memory", "policies", "regions"):
        assert page.counts[f"svg#{picture}"] == 1
    held = {name for one in found.moments for name, size in one.categories.items() if size}
    assert {name for name in held if page.counts[f"polygon.{name}"] == 1} == held
    text = " ".join(page.texts)
    for one in found.collectives:
        assert one.where in text
    assert found.before in text
    assert "None" not in text.replace(found.before, "").replace(found.after, "")


def test_page_of_a_step_without_backward_and_with_what_html_reads(planner: Planner) -> None:
    class Odd(modules.GPT):
        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.fft.rfft(self(batch["ids"]).mean(-1), dim=1).abs().mean()  # no rule, and no dimension to cut instead

    Odd.__name__ = "<Odd & co>"
    shown = AutoSPStrategy(sequence_parallel_size=3).explain(Odd(layers=1), batch(), step="validation_step")
    assert shown.report.in_full
    assert {one.phase for one in shown.moments} == {"forward", "backward", "optimizer step"}
    page = Page(shown.to_html())
    assert "<Odd & co>.validation_step" in page.texts
    assert shown.report.in_full[0].name in page.texts
    with torch.no_grad():
        forward = AutoSPStrategy.explain(modules.GPT(layers=1), batch(), step="predict_step")
    assert {one.phase for one in forward.moments} == {"forward"}
    assert max(one.bytes for one in forward.moments) == forward.estimate.peak
    Page(forward.to_html())


def test_unknown_policy(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "policy", "full/9")
    with pytest.raises(PlanError, match="checkpoint policy 'full/9' is not known of this step. There is: auto, none"):
        explain(planner)


class TestCommand:
    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        options = {"sequence_parallel_size": 3, "attention": "gather_kv", "parameter_sharding": "replicate", "memory_limit": "3GiB"}
        options["checkpoint_policy"] = "full"
        strategy = {"class_path": "lightning_autosp.AutoSPStrategy", "init_args": options}
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "user_model", raising=False)
        return write(tmp_path, strategy=strategy)

    def test_writes_both_and_follows_the_configuration(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", "--config", config.name, "--json", "a.json", "--html", "a.html", "--length", "96"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "Model.training_step, 3 rank(s) of h100" in out
        data = json.loads(Path("a.json").read_text())
        assert (data["length"], data["world"], data["policy"], data["limit_bytes"]) == (96, 3, "full", 3 * 2**30)
        Page(Path("a.html").read_text())

    def test_plan_follows_it_too(self, config: Path) -> None:
        """What a configuration said of attention, sharding and memory was not read."""
        planner = planner_of(config.name)
        assert (planner.world, planner.limit, planner.parameters.sharded) == (3, 3 * 2**30, False)
        assert planner.lowered.compiler.attention.method == "gather_kv"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "Nothing is named"),
            (["--config", "config.yaml", "--device", "h9000"], "'h9000' is not known"),
            (["--config", "config.yaml", "--html", "no/such/folder.html"], "No such file"),
        ],
    )
    def test_says_what_is_wrong(self, arguments: list[str], says: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["explain", *arguments]) == 2
        assert says in capsys.readouterr().err


MEASURE = """<script>
const boxes = [...document.querySelectorAll('svg polygon, svg rect')].map(one => one.getBoundingClientRect());
const pictures = [...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect());
document.body.innerHTML = '<pre id="found">' + JSON.stringify({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  drawn: boxes.filter(one => one.width > 0 && one.height > 0).length,
  outside: boxes.filter(one => one.right > innerWidth + 1 || one.left < -1).length,
  pictures: pictures.map(one => [Math.round(one.width), Math.round(one.height)]),
}) + '</pre>';
</script></body>"""


@pytest.mark.parametrize("width", [1200, 500])
def test_page_in_a_browser(found: Explanation, width: int, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no browser is installed")
    page = tmp_path / "page.html"
    page.write_text(found.to_html().replace("</body>", MEASURE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", f"--window-size={width},900"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        pytest.skip(f"{browser} does not start here: {done.stderr[-200:]}")
    (measured,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
    result = json.loads(measured)
    assert result["wide"] <= 0, "the page scrolls sideways"
    assert result["outside"] == 0
    assert result["drawn"] > 300
    assert all(across > 400 and down > 10 for across, down in result["pictures"])
