"""The pages: every block of code runs and prints what it is said to, and every message that is quoted is given by the sources."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from lightning_autosp.__main__ import main
from lightning_autosp.cli import command_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = ROOT / "lightning_autosp"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "coverage.md")  # which is written by a benchmark

_FENCE = re.compile(r"^```[ ]?(?P<head>[^\n]*)\n(?P<body>.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_SNIPPET = re.compile(r'^--8<-- "README.md:(\w+)"$', flags=re.MULTILINE)


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: `python`, `yaml`, `bash` or `text`.
        role: "" runs; "output" is what the block before it prints; "cluster" needs one; "said" is an example of a message.
        body: The code.
    """

    language: str
    role: str
    body: str

    @property
    def file(self) -> str:
        """The file that it is, by its first line."""
        found = re.match(r"# ([\w.]+\.(py|yaml))\n", self.body)
        return found[1] if found else ""


def blocks(page: str) -> list[Block]:
    readme = (ROOT / "README.md").read_text()

    def snippet(match: re.Match[str]) -> str:
        (text,) = re.findall(rf"<!-- --8<-- \[start:{match[1]}\] -->\n(.*?)<!-- --8<-- \[end:{match[1]}\]", readme, flags=re.DOTALL)
        return text.rstrip("\n")

    text = _SNIPPET.sub(snippet, (DOCS / page).read_text())
    found = []
    for match in _FENCE.finditer(text):
        words = re.findall(r"[\w-]+", match["head"])
        found.append(Block(words[0], words[1] if len(words) > 1 else "", match["body"]))
    assert text.count("```") == 2 * len(found), "a fence that is not understood"
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that modules are found in; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name == "page" or str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.py").write_text(next(block.body for block in blocks("getting-started.md") if block.file == "train.py"))
    space = vars(sys.modules.setdefault("page", types.ModuleType("page")))  # Dynamo looks modules up by their names
    printed = ""
    for block in blocks(page):
        torch._dynamo.reset()
        if block.file:
            (folder / block.file).write_text(block.body)
            importlib.invalidate_caches()
        if block.language == "python" and not block.file:
            printed = run_python(block.body, space, folder)
        elif block.language == "yaml":
            check_yaml(folder / block.file)
        elif block.language == "bash":
            for line in block.body.splitlines():
                (check_cluster if block.role == "cluster" else run_command)(line)
        elif block.role == "output":
            if str(torch.__version__).partition("+")[0] == pinned("torch"):
                assert printed.strip() == block.body.strip()
        else:
            assert block.file or block.role == "said", block
    capsys.readouterr()


def run_python(code: str, space: dict[str, Any], folder: Path) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "page.py", "exec"), space)
    return output.getvalue().replace(f"{folder}/", "")


@functools.cache
def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return version


def check_yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text())
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", path.name, "--print_config"])
    assert ended.value.code in (0, None)


def run_command(line: str) -> None:
    """Run a command of this package in this process; of others, look whether it names what exists."""
    words = shlex.split(line.partition("#")[0])
    if not words:
        return
    if words[0] == "autosp" and words[1] != "fit":
        assert main(words[1:]) == 0, line
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", line)
        assert "lightning-autosp" in line
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif words[0] in ("python", "autosp"):  # what the README shows runs in `test_new_user.py`
        name = words[-1]
        readme = [
            block.body for block in (Block("", "", body) for body in re.findall(r"```\w+\n(.*?)```", README, flags=re.DOTALL))
        ]
        assert Path(name).read_text() in readme, line
    else:
        pytest.fail(f"a command that is not tested: {line}")


README = (ROOT / "README.md").read_text()

SLURM = {
    "sbatch": {"nodes", "ntasks-per-node", "gres", "cpus-per-task", "signal", "time", "partition", "job-name"},
    "srun": {"kill-on-bad-exit"},
}
"""Options, from SLURM's manual pages."""


def check_cluster(line: str) -> None:
    """Look whether the options of a command that needs a cluster exist."""
    words = shlex.split(line.removeprefix("#SBATCH")) if line.startswith("#SBATCH") else shlex.split(line, comments=True)
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    if line.startswith("#SBATCH"):
        assert set(names) <= SLURM["sbatch"], line
    elif words[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script == "train.py"
    elif words[:1] == ["srun"]:
        command = words.index("autosp")
        assert {word[2:].partition("=")[0] for word in words[:command] if word.startswith("--")} <= SLURM["srun"], line
        assert words[command + 1 : command + 3] == ["fit", "--config"]
        assert Path(words[command + 3]).name == "cluster.yaml"
    else:
        assert not words, line


def test_commands_of_the_readme_exist() -> None:
    """They are about packages that do not."""
    lines = [line for line in README.splitlines() if line.startswith("autosp ") and not line.startswith("autosp fit")]
    assert len(lines) == 3
    for line in lines:
        assert command_parser().parse_args(shlex.split(line, comments=True)[1:]).run, line


# Messages.

_NOT_FOR_USERS = {"_Unknown", "AssertionError", "AttributeError", "IndexError", "NeedsBreakError", "NotImplementedError"}
"""Errors that are caught within the package, or that Python's protocols ask for."""


def literal(node: ast.expr | None) -> str:
    """Return a message with `…` in place of what differs; "" for what is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.IfExp):
        return literal(node.body)
    return ""


@functools.cache
def texts() -> list[str]:
    """Return every text of the sources that is no docstring."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [literal(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in documentation]
    return [text for text in found if " " in text]


_TELLS = {"_print", "_say", "rank_zero_warn", "warn"}
_LISTS = {"notes", "problems", "skipped"}
"""What a report or the result of a check says besides."""


def told() -> list[str]:
    """Return the messages that reach users: of errors, of warnings, and notes of a report."""
    found: list[ast.expr | None] = []
    for path in sorted(SOURCES.rglob("*.py")):
        if path.name == "simulate.py":  # collectives that do not meet: the rule's author sees them
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                found += [] if called(node.exc) in _NOT_FOR_USERS else node.exc.args[:1]
            elif isinstance(node, ast.Call) and (called(node) in _TELLS or (called(node) == "append" and owner(node) in _LISTS)):
                found += node.args[:2]
            elif isinstance(node, ast.Return) and path.name in ("agreement.py", "faults.py"):  # what is wrong, for others to say
                found.append(node.value)
    messages = [literal(one).removeprefix("lightning-autosp: ") for one in found]
    return [message for message in messages if " " in message and len(re.sub(r"[…\W]", "", message)) > 6]


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def owner(call: ast.Call) -> str:
    return getattr(getattr(call.func, "value", None), "attr", getattr(getattr(call.func, "value", None), "id", ""))


def quoted() -> list[str]:
    rows = [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    return [quote for row in rows for cell in row.split(" | ")[:1] for quote in re.findall(r"`([^`]+)`", cell)]


def pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.strip("… ").split("…"))), flags=re.DOTALL)


def test_every_message_that_is_quoted_is_given() -> None:
    assert len(quoted()) > 120
    missing = [quote for quote in quoted() if not any(pattern(quote).search(text) for text in texts())]
    assert not missing


def test_every_message_is_on_the_page() -> None:
    patterns = [pattern(quote) for quote in quoted()]
    missing = [message for message in told() if not any(one.search(message) for one in patterns)]
    assert not missing


# The site.


def test_site_builds_and_has_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), flags=re.MULTILINE):
        assert f'id="{name}"' in reference, name
