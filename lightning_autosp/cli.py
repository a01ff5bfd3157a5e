"""The package's commands: `autosp COMMAND`, or `python -m lightning_autosp COMMAND`.

`fit`, `validate`, `test` and `predict` are LightningCLI's, with the strategy's names registered; the others are this package's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from typing_extensions import override

from lightning_autosp.check import CheckError, check_target
from lightning_autosp.data.write import WriteError, write_tokens
from lightning_autosp.explain import explain_target
from lightning_autosp.memory.devices import DEVICES
from lightning_autosp.memory.policy import CheckpointPolicy
from lightning_autosp.plan import plan_target
from lightning_autosp.targets import TargetError, named_object

__all__ = ["TRAINER_COMMANDS", "command_parser", "main"]

TRAINER_COMMANDS = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "write or return what predict_step gives",
}
"""LightningCLI's commands, and what they do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: Without the program's name. Default: the process's arguments.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in TRAINER_COMMANDS:
        return _train(arguments)
    options = vars(command_parser().parse_args(arguments))
    return options.pop("run")(**options)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; LightningCLI's have one of their own."""
    parser = argparse.ArgumentParser(prog="autosp", description="Sequence parallelism for Lightning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, what in TRAINER_COMMANDS.items():
        commands.add_parser(command, help=f"{what}, from a LightningCLI configuration (--config file.yaml)")
    _add_check(commands)
    _add_plan(commands)
    _add_explain(commands)
    _add_tokens(commands)
    return parser


class _SaveConfig(SaveConfigCallback):
    """Keeps the configuration with the logs. Without a logger, its place would be the working directory, beside the user's own."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def _train(arguments: list[str]) -> int:
    """Run one of the Trainer's commands. Classes that the configuration names may be in files of the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        LightningCLI(
            save_config_callback=_SaveConfig,
            trainer_defaults={"strategy": "autosp"},
            parser_kwargs={"prog": "autosp"},
            args=arguments,
        )
    except ModuleNotFoundError as error:
        if "jsonargparse" not in str(error):
            raise
        text = f"autosp {arguments[0]} needs jsonargparse, which is not installed: pip install 'lightning-autosp[cli]'"
        print(f"error: {text}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _sequence_dim(text: str) -> int | dict[str, int]:
    if "=" not in text:
        return int(text)
    return {name.strip(): int(dim) for name, dim in (one.split("=") for one in text.split(","))}


def _target_arguments(*, required: bool = True) -> argparse.ArgumentParser:
    """Return what every command says of the module and the batch it is about."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs=None if required else "?",
        help="package.module:Name or path/to/file.py:Name (a module class, or a function that returns a module), or a LightningCLI "
        "configuration (file.yaml)",
    )
    parser.add_argument("--step", metavar="METHOD", help="the method (default: training_step, else the call itself)")
    parser.add_argument("--config", metavar="FILE", help="LightningCLI configuration with the arguments of the classes named")
    parser.add_argument(
        "--batch", metavar="NAME", help="where the batch is from: a function or LightningDataModule, named like TARGET"
    )
    parser.add_argument(
        "--sequence-dim",
        type=_sequence_dim,
        metavar="D",
        help="the dimension of batch tensors that is the sequence, or of each by its key, as ids=1,frames=2 (default: 1)",
    )
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the (last) result as JSON")


def _report_error(error: Exception, verdict: str, *, as_json: bool) -> int:
    """Print why a command found nothing, and return its exit code."""
    if as_json:
        print(json.dumps({verdict: False, "exit_code": 2, "error": str(error)}))  # noqa: T201
    else:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return 2


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        parents=[_target_arguments()],
        help="compare a module's step on simulated ranks with one device",
        description="Compare a module's step, lowered on simulated ranks, with one device: outputs, logged values, gradients, and "
        "what changes when a token does. Exit codes: 0 equal, 1 different, 2 could not be checked.",
    )
    _add_json(parser)
    parser.add_argument("--ranks", dest="num_ranks", type=int, metavar="P", help="ranks that share the sequence (default: 2)")
    parser.add_argument("--length", type=int, metavar="N", help="use the first N positions of the batch's sequences")
    parser.add_argument("--rtol", type=float, help="what relative norms may differ by (default: by precision)")
    parser.add_argument("--strict", action="store_true", help="count what runs in full, and a step in pieces, as differences")
    parser.set_defaults(run=_check)


def _check(*, as_json: bool, **options: object) -> int:
    try:
        result = check_target(**options)  # type: ignore[arg-type]
    except CheckError as error:
        return _report_error(error, "ok", as_json=as_json)
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)  # noqa: T201
    return result.exit_code


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        parents=[_target_arguments()],
        help="predict what a step takes on devices that are not there",
        description="Predict memory and time of a module's step for a number of ranks and a kind of device, on this machine's CPU "
        "and without allocating parameters. Exit codes: 0 fits, 1 does not fit, 2 could not be planned.",
    )
    _add_json(parser)
    parser.add_argument("--world", type=int, required=True, metavar="P", help="ranks that share each sequence")
    _add_device(parser)
    parser.add_argument("--max-length", dest="longest", action="store_true", help="also find the longest sequence that fits")
    parser.add_argument("--save", metavar="FILE", help="write the (last) plan, for AutoSPStrategy(plan=FILE)")
    parser.set_defaults(run=_plan)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="KIND", help=f"one of {', '.join(DEVICES)} (default: h100)")
    parser.add_argument("--device-memory", metavar="BYTES", help="what a rank may take, as 80GiB (default: the device's)")
    parser.add_argument("--host-memory", metavar="BYTES", help="what a rank may keep on its host, as 96GiB (default: nothing)")
    parser.add_argument("--length", type=int, metavar="N", help="positions of the longest sequence (default: the batch's)")
    parser.add_argument("--precision", help="the Trainer's: 32-true, bf16-true, bf16-mixed, ... (default: the configuration's)")
    parser.add_argument(
        "--state-bytes", type=int, metavar="N", help="optimizer state for each parameter (default: what the optimizer makes)"
    )
    parser.add_argument(
        "--backend", choices=("inductor", "aot_eager"), default="inductor", help="what training compiles with (default: inductor)"
    )


def _plan(*, as_json: bool, save: str | None, **options: object) -> int:
    try:
        plans = plan_target(**options)  # type: ignore[arg-type]
        if save is not None:
            plans[-1].save(save)
    except (TargetError, ValueError, OSError) as error:
        return _report_error(error, "fits", as_json=as_json)
    print(json.dumps(plans[-1].to_dict(), indent=2) if as_json else "\n\n".join(map(str, plans)))  # noqa: T201
    return 0 if plans[-1].best[1].fits else 1


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "explain",
        parents=[_target_arguments(required=False)],
        help="show what runs on each rank, and the memory it takes",
        description="Show what becomes of a module's step: regions of the graph, collectives, attention calls, checkpoint policies "
        "and memory over time, predicted as by plan. Exit codes: 0 shown, 2 could not be shown.",
    )
    parser.add_argument(
        "--world", type=int, metavar="P", help="ranks that share each sequence (default: the configuration's, else 2)"
    )
    _add_device(parser)
    policies = get_args(CheckpointPolicy)
    parser.add_argument("--policy", choices=policies, help="the checkpoint policy to show (default: the fastest that fits)")
    parser.add_argument("--json", dest="json_path", metavar="FILE", help="also write it as JSON")
    parser.add_argument("--html", dest="html_path", metavar="FILE", help="also write it as one HTML page")
    parser.set_defaults(run=_explain)


def _explain(*, target: str | None, config: str | None, json_path: str | None, html_path: str | None, **options: Any) -> int:
    if target is None:
        target, config = config, None
    try:
        if target is None:
            raise TargetError("Nothing is named. Use --config file.yaml, or package.module:Name.")
        found = explain_target(target, config=config, **options)
        found.save(json_path=json_path, html_path=html_path)
    except (TargetError, ValueError, OSError) as error:
        return _report_error(error, "shown", as_json=False)
    found.print()
    return 0


def _add_tokens(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tokens",
        help="write a token file from text or JSONL",
        description="Write the tokens of documents, and where each starts, for lightning_autosp.data.TokenDataset. The same "
        "command goes on after an interruption. Exit codes: 0 written, 2 could not be written.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the token file (file.npy)")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a .jsonl file, each line of which is a document, or a file that is one"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="package.module:name or path/to/file.py:name: something that is called with a text and gives its tokens",
    )
    parser.add_argument("--dtype", default="uint32", help="of the tokens written (default: uint32)")
    parser.add_argument("--end-of-document", type=int, metavar="ID", help="a token to write after each document")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where a line of JSONL has its text (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="start from the beginning, whatever is there")
    parser.add_argument("--quiet", dest="progress", action="store_false", help="show no bar")
    parser.set_defaults(run=_tokens)


def _tokens(*, output: str, sources: list[str], tokenizer: str, **options: Any) -> int:
    try:
        number = write_tokens(sources, output, named_object(tokenizer), **options)
    except (TargetError, WriteError) as error:
        return _report_error(error, "written", as_json=False)
    print(f"{output}: {number} tokens")  # noqa: T201
    return 0
