"""Token files from text: what is in them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_autosp.__main__ import main
from lightning_autosp.data import TokenDataset, WriteError, documents_path, find_documents, write_tokens


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def corpus(folder: Path, num: int = 10) -> list[Path]:
    """Lines of JSON, one of them empty, and a plain text."""
    lines = folder / "lines.jsonl"
    lines.write_text("\n".join([*(json.dumps({"text": "é" * number + "."}) for number in range(num)), "", ""]), encoding="utf-8")
    plain = folder / "plain.txt"
    plain.write_text("one\ntwo", encoding="utf-8")
    return [lines, plain]


def expected(num: int = 10, end: int | None = None) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    starts = []
    for text in [*("é" * number + "." for number in range(num)), "one\ntwo"]:
        starts.append(len(tokens))
        tokens += [*letters(text), *([end] if end is not None else [])]
    return tokens, starts


def written(output: Path) -> tuple[list[int], list[int]]:
    return np.load(output).tolist(), np.load(documents_path(output)).tolist()


@pytest.mark.parametrize("end", [None, 7])
def test_written(tmp_path: Path, end: int | None) -> None:
    output = tmp_path / "deep" / "corpus.npy"
    number = write_tokens(corpus(tmp_path), output, letters, dtype="uint16", end_of_document=end, progress=False)
    assert written(output) == expected(end=end)
    assert number == len(expected(end=end)[0])
    assert np.load(output, mmap_mode="r").dtype == np.uint16
    assert sorted(file.name for file in output.parent.iterdir()) == ["corpus.documents.npy", "corpus.npy"]
    data = TokenDataset(output, 6, documents=True)
    assert data[0]["position_ids"].tolist()[0] == 0
    assert data[1]["tokens"].tolist() == expected(end=end)[0][6:13]


def test_what_tokenizers_give(tmp_path: Path) -> None:
    class Encoding:
        def __init__(self, ids: Any) -> None:
            self.input_ids = ids

    for number, wrap in enumerate([np.array, torch.tensor, Encoding, lambda ids: {"input_ids": ids}]):
        output = tmp_path / f"{number}.npy"
        write_tokens(corpus(tmp_path), output, lambda text, wrap=wrap: wrap(letters(text)), progress=False)
        assert written(output) == expected()


@pytest.mark.parametrize("at", [0, 1, 5, 9, 10])
def test_killed_and_started_again(tmp_path: Path, at: int) -> None:
    """A run that is killed leaves no output; the next one tokenizes what was not saved, and writes the same."""
    files, output = corpus(tmp_path), tmp_path / "corpus.npy"
    child = os.fork()
    if child == 0:
        seen: list[str] = []

        def kills(text: str) -> list[int]:
            seen.append(text)
            if len(seen) > at:
                os._exit(9)
            return letters(text)

        write_tokens(files, output, kills, progress=False, save_every=2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not output.exists()
    assert not documents_path(output).exists()
    again: list[str] = []
    write_tokens(files, output, lambda text: again.append(text) or letters(text), progress=False)
    assert len(again) == 11 - at // 2 * 2
    assert written(output) == expected()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("step", range(4))
def test_killed_while_finishing(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents come into place before tokens; whatever is missing is made up for."""
    files, output = corpus(tmp_path), tmp_path / "corpus.npy"
    real, moved = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if len(moved) == step:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(files, output, letters, progress=False)
    monkeypatch.undo()
    assert not output.exists()
    write_tokens(files, output, letters, progress=False)
    assert written(output) == expected()


def test_refusals(tmp_path: Path) -> None:
    files, output = corpus(tmp_path), tmp_path / "corpus.npy"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(WriteError, match=message):
            write_tokens(**{"sources": files, "output": output, "tokenize": letters, "progress": False, **options})

    refused("named \\*.npy", output=tmp_path / "corpus.bin")
    refused("no such file: .*nothing.txt", sources=[tmp_path / "nothing.txt"])
    refused("dtype='float32' is no integer type", dtype="float32")
    refused("lines.jsonl, the line at byte 14: tokens from 46 to 233 do not fit dtype 'int8'", dtype="int8")
    refused("an interrupted run had other dtype", dtype="uint8")
    refused("the tokenizer gave float64 of shape \\(1,\\)", tokenize=lambda text: [0.5], overwrite=True)
    refused("no text under 'body'; its keys are 'text'", text_key="body", overwrite=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text"')
    refused("the line at byte 14: this is no JSON", sources=[bad], overwrite=True)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    refused("this is no UTF-8 text", sources=[tmp_path / "latin.txt"], overwrite=True)
    refused("hold no token", tokenize=lambda text: [], overwrite=True)
    write_tokens(files, output, letters, progress=False, overwrite=True)
    refused("exists already")


def test_documents_from_a_token_that_ends_them(tmp_path: Path) -> None:
    output = tmp_path / "corpus.npy"
    write_tokens(corpus(tmp_path), output, letters, end_of_document=7, progress=False)
    starts = documents_path(output)
    starts.unlink()
    assert find_documents(output, 7) == 11
    assert np.load(starts).tolist() == expected(end=7)[1]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "corpus.npy"
    command = ["tokens", str(output), *map(str, corpus(tmp_path)), "--tokenizer", f"{__file__}:letters", "--dtype", "uint16"]
    assert main(command) == 0
    assert f"{len(expected()[0])} tokens" in capsys.readouterr().out
    assert written(output) == expected()
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:-3], "nothing.here:letters", "--overwrite"]) == 2
    assert "cannot be imported" in capsys.readouterr().err
