"""What the README shows, copied into an empty folder with only the package installed, by every way to start processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pool import free_port
from test_cli import installed

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.dist


def shown(name: str) -> str:
    """Return the README's block whose first line is a comment with this name."""
    (block,) = re.findall(rf"```\w+\n(# {re.escape(name)}\n.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "train.py").write_text(shown("train.py"))
    return folder


def run(folder: Path, *commands: list[str], variables: list[dict[str, str]] | None = None) -> list[str]:
    """Run commands at once, in a folder, and return what each printed."""
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(variables[index] if variables else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed


def test_script(folder: Path) -> None:
    (printed,) = run(folder, [sys.executable, "train.py"])
    assert "sharded over 2 ranks" in " ".join(printed.split())
    assert re.search(r"^loss \d\.\d{4}$", printed, flags=re.MULTILINE)


def test_configuration(folder: Path, tmp_path: Path) -> None:
    (folder / "config.yaml").write_text(shown("config.yaml"))
    (printed,) = run(folder, [sys.executable, str(installed(tmp_path)), "fit", "--config", "config.yaml"])
    assert "sharded over 2 ranks" in " ".join(printed.split())


def test_torchrun(folder: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "train.py"]
    (printed,) = run(folder, [sys.executable, *command])
    assert len(re.findall(r"^loss \d\.\d{4}$", printed, flags=re.MULTILINE)) == 2


def test_slurm(folder: Path) -> None:
    """As two tasks of `srun` find it."""
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    printed = run(folder, *[[sys.executable, "train.py"]] * 2, variables=tasks)
    losses = [re.findall(r"^loss (\d\.\d{4})$", text, flags=re.MULTILINE) for text in printed]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


def test_notebook(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert re.search(r"^loss [1-5]\.\d{3} in 2 processes$", printed, flags=re.MULTILINE), printed[-3000:]
