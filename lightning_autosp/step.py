"""Compiling a module's steps: one graph a step, logging deferred until it has returned."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_autosp import _compat
from lightning_autosp.batches import Found, SequenceDim, call_tensors, sequences
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.capture import Captured
from lightning_autosp.compiler.crossing import EagerMarks, PartTensor
from lightning_autosp.compiler.locate import Locator, Place
from lightning_autosp.compiler.report import GraphBreak, StrictModeError
from lightning_autosp.compiler.scalars import NeedsBreakError
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.lines import frames_in
from lightning_autosp.metrics import is_by_position, update_by_position
from lightning_autosp.parameters import ModuleParameters

__all__ = ["CANNOT_TRACE", "CompiledStep", "compile_step", "mark_sequence", "symbolic_block_masks"]

CANNOT_TRACE = (TorchDynamoException, _compat.GuardOnDataDependentSymNode)
"""What Dynamo raises; the second for `x.split(sizes.tolist())` of as many sizes as data say."""

_NO_MEMORY = (
    "{kind}: a function that is no PyTorch operator reads the memory of a tensor that is held in parts between two compiled pieces "
    "of the step. Make it an operator (torch.library.custom_op), or hand it x.clone() instead of x."
)


_FEW = 15
"""Positions, which other dimensions have as often (the three numbers of an image's grid)."""


def mark_sequence(tensors: Sequence[Found], sequence_dim: SequenceDim) -> list[int]:
    """Give the sequence dimension of every tensor a symbol, and other dimensions of that length (an attention mask's) one each.

    Returns:
        The lengths that tell a sequence from other dimensions: the longest, and others of more than a few positions.
    """
    found = [(one.tensor, dim) for one, dim in sequences(tensors, sequence_dim)]
    length = max((tensor.shape[dim] for tensor, dim in found), default=0)
    for tensor, dim in found:
        batch_dim = 1 if dim == 0 else 0
        for other, size in enumerate(tensor.shape):
            if other == dim or (other != batch_dim and size == length):
                _compat.mark_dynamic(tensor, other)
    return [length, *(size for tensor, dim in found if _FEW < (size := tensor.shape[dim]) < length)]


@contextlib.contextmanager
def symbolic_block_masks(module: torch.nn.Module, batch: Any) -> Iterator[None]:
    """Let the lengths in block masks be symbols: Dynamo would fix them, and the sequence's with them.

    Args:
        module: Whose attributes, and what lists and dicts in them hold, are searched for block masks.
        batch: Any collection, searched too.
    """
    found = pytree.tree_leaves(batch, is_leaf=lambda value: isinstance(value, BlockMask))
    for value in (value for one in module.modules() for value in vars(one).values()):
        found += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
    masks = {id(mask): mask for mask in found if isinstance(mask, BlockMask)}
    lengths = [mask.seq_lengths for mask in masks.values()]
    try:
        for mask in masks.values():
            mask.seq_lengths = tuple(map(_compat.symbolic, mask.seq_lengths))  # type: ignore[assignment]
        yield
    finally:
        for mask, before in zip(masks.values(), lengths, strict=True):
            mask.seq_lengths = before


_Choice = Callable[[Tensor, int], bool]
"""Of dimensions of the module's tensors."""

_Numbers = list[tuple[Any, str]]
"""Attributes of submodules, and of what they are configured by, that are numbers, or lists or tuples of them."""


class _CaptureAgainError(Exception):
    """A captured graph is refused: sizes of the module are to be symbols.

    Attributes:
        chosen: Accepts the dimensions of the module's tensors that are meant.
        numbers: What is meant besides.
    """

    def __init__(self, chosen: _Choice, numbers: _Numbers) -> None:
        super().__init__("the step is captured again")
        self.chosen, self.numbers = chosen, numbers


def _dims(module: torch.nn.Module, chosen: _Choice) -> dict[Tensor, list[int]]:
    """Return the chosen dimensions of the module's parameters and buffers."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if type(tensor) in (Tensor, torch.nn.Parameter)]
    found = {tensor: [dim for dim in range(tensor.ndim) if chosen(tensor, dim)] for tensor in tensors}
    return {tensor: dims for tensor, dims in found.items() if dims}


def _numbers(module: torch.nn.Module, sizes: set[int]) -> tuple[_Numbers, set[int]]:
    """Return the attributes of submodules and their `config` that name one of these sizes (`self.image_size`), and what they are.

    Where none does, those that name the largest part of one (`self.config.max_source_positions * 2`).
    """
    owners = {id(one): one for submodule in module.modules() for one in (submodule, getattr(submodule, "config", None))}
    numbers = [
        (owner, name, {one for one in (value if type(value) in (list, tuple) else [value]) if type(one) is int})
        for owner in owners.values()
        for name, value in getattr(owner, "__dict__", {}).items()
    ]
    known = {number for *_, found in numbers for number in found}
    parts = [[part for part in range(size // 2, 1, -1) if part in known and size % part == 0] for size in sizes]
    meant = sizes & known or {largest for largest, *_ in filter(None, parts)}
    return [(owner, name) for owner, name, found in numbers if found & meant], meant


@contextlib.contextmanager
def _symbolic_numbers(chosen: _Numbers) -> Iterator[None]:
    """Let Dynamo take numbers that a module keeps for symbols: comparing one with the sequence's length makes the two the same."""

    def symbolic(value: Any) -> Any:
        return _compat.symbolic(value) if type(value) is int else value

    before = [(owner, name, vars(owner).get(name)) for owner, name in chosen]
    after = [type(old)(map(symbolic, old)) if isinstance(old, (list, tuple)) else symbolic(old) for _, _, old in before]
    for (owner, name, _), new in zip(before, after, strict=True):
        owner.__dict__[name] = new
    try:
        yield
    finally:
        for (owner, name, old), new in zip(before, after, strict=True):
            if vars(owner).get(name) is new:
                owner.__dict__[name] = old


_MESSAGES = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")


def compile_step(step: Callable[..., Any], backend: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """Return `step` compiled, not cut where it only says something.

    What it tells a `logging.Logger` is dropped, for Dynamo has no later moment for it; `warnings.warn` is called when the graph
    has returned.
    """
    # By prefix: libraries give the class more of them (`warning_once`).
    dropped = {method for name, method in vars(logging.Logger).items() if name.startswith(_MESSAGES)}
    dropped |= {getattr(logging, name) for name in logging.__all__ if name.startswith(_MESSAGES)}
    config = torch._dynamo.config
    said = config.patch(
        ignore_logger_methods=config.ignore_logger_methods | dropped,
        reorderable_logging_functions=config.reorderable_logging_functions | {warnings.warn},
    )
    compiled: Callable[..., Any] = said(torch.compile(step, backend=backend, fullgraph=fullgraph))
    return compiled


class CompiledStep:
    """One `*_step` method of a module, compiled.

    The step is first compiled as a single graph. If that is impossible (Python looks at data), it is compiled in pieces around the
    break, with parameters made whole before the step; if it keeps changing, it runs uncompiled. Each gives the one-device answer;
    the report says which and why.
    """

    def __init__(
        self,
        module: LightningModule,
        kind: str,
        compiler: Compiler,
        parameters: ModuleParameters,
        sequence_dim: SequenceDim,
        all_come: Callable[[], bool] = lambda: True,
        *,
        whole_metrics: bool = False,
    ) -> None:
        """Compile nothing yet.

        Args:
            module: Whose step it is.
            kind: The method's name.
            compiler: Of what is captured.
            parameters: The module's.
            sequence_dim: Of batch tensors.
            all_come: Whether all ranks come to the same place, which they have to before any of them leaves the single graph.
            whole_metrics: Whether metrics that could do with this rank's positions are given the whole too.
        """
        self.module, self.kind, self.parameters, self.sequence_dim = module, kind, parameters, sequence_dim
        self._all_come = all_come
        self._deferred = _Deferred(module, None if whole_metrics or compiler.group.size == 1 else compiler.group)
        self.compiler = replace(
            compiler,
            kind=kind,
            parameters=parameters,
            inspect=self._refuse_fixed_length,
            keep_parts=self._deferred.takes_parts,
        )
        self._mode = "whole"
        self._chosen: _Choice | None = None
        """Which sizes of the module's tensors are symbols when the step is captured."""
        self.numbers: _Numbers = []
        """What else of the module is a symbol then."""
        self._run = compile_step(self._user_step(), self.compiler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lengths = mark_sequence(call_tensors(args, kwargs), self.sequence_dim)
        while True:
            self.compiler.report.last[self.kind] = []
            values = self.parameters.standing_in() if self._mode == "whole" else self.parameters.whole()
            try:
                masks = contextlib.nullcontext() if self._mode == "eager" else symbolic_block_masks(self.module, (args, kwargs))
                marks = EagerMarks(lengths) if self._mode == "pieces" and _compat.DYNAMO_IGNORES_MODES else contextlib.nullcontext()
                with values, self._deferred.recording(one_graph=self._mode == "whole"), marks, masks, self._symbolic_sizes():
                    result = self._run(*args, **kwargs)
                break
            except StrictModeError:
                raise
            except FailOnRecompileLimitHit as error:
                self._change("eager", "the step keeps changing (a Python number that differs every time?)", error)
            except CANNOT_TRACE as error:
                cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
                if isinstance(cause, _CaptureAgainError):
                    self._capture_again(cause.chosen, cause.numbers)
                    continue
                if self._mode != "whole" or not isinstance(cause, (NeedsBreakError, *CANNOT_TRACE)):
                    raise
                if self._chosen is not None:
                    self._capture_again(None, [])
                    continue
                self._change("pieces", _headline(cause), error)
            except RuntimeError as error:
                if self._mode == "pieces" and "data pointer" in str(error):
                    raise RuntimeError(_NO_MEMORY.format(kind=self.kind)) from error
                raise
        self._deferred.replay(self._finished)
        if self._mode == "pieces":
            self._finish_attributes()
        return self._deferred.resolved(self._finished(result))

    @property
    def is_one_graph(self) -> bool:
        """Whether it is, as far as it has run."""
        return self._mode == "whole"

    def repeat(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step once more, where what it logs has been logged already."""
        self._deferred.silent = True
        try:
            return self(*args, **kwargs)
        finally:
            self._deferred.silent = False

    def locate(self, *args: Any, nan: bool, **kwargs: Any) -> Place | None:
        """Run the step once more to find where the first value that is no number arises on this rank. All ranks have to call it.

        Args:
            args: The step's.
            nan: Whether that is NaN; else an infinite one.
            kwargs: The step's.
        """
        locator = self.compiler.locator = Locator(nan=nan)
        try:
            self.repeat(*args, **kwargs)
        finally:
            self.compiler.locator = None
        return locator.first

    def _refuse_fixed_length(self, captured: Captured) -> None:
        """Have a step captured again if it fixes the sequence's length to a size of the module.

        A table of positions that is added whole, `x + self.pos`, would fix it, and so would a comparison with a number that the
        module keeps; with a symbol of its own, the sum or the comparison makes the two the same. That is no default: a layer's
        width that happens to be the sequence's length would get a symbol too.
        """
        ranks = self.compiler.group.size
        # Where a sequence is followed, a dimension that is fixed by itself is another, only as long: of features.
        fixed = [one for one in captured.fixed if not (one.alone and captured.symbols)]
        sizes = {one.size for one in fixed if one.size >= ranks > 1}

        # Numbers are compared with sizes of the batch, and are not all sizes.
        numbers, parts = _numbers(self.module, {one.size for one in fixed if one.alone and one.size in sizes})
        sizes |= {part for part in parts if part >= ranks}

        def chosen(tensor: Tensor, dim: int) -> bool:
            return tensor.shape[dim] in sizes

        if numbers or (sizes and _dims(self.module, chosen)):
            raise _CaptureAgainError(chosen, numbers)

    def _refuse_other_symbols(self, captured: Captured) -> None:
        """Have a step captured once more if a size of the module that has nothing to do with the sequence stayed a symbol."""
        self.compiler.inspect = None
        following = captured.following
        if captured.loose:
            raise _CaptureAgainError(lambda tensor, dim: (id(tensor), dim) in following, self.numbers)

    def _capture_again(self, chosen: _Choice | None, numbers: _Numbers) -> None:
        inspect = self._refuse_other_symbols if self._chosen is None and chosen is not None else None
        self._chosen, self.numbers, self.compiler = chosen, numbers, replace(self.compiler, inspect=inspect)
        self._run = compile_step(self._user_step(), self.compiler)
        if chosen is not None:
            config = torch._dynamo.config
            self._run = config.patch(force_parameter_static_shapes=False, force_nn_module_property_static_shapes=False)(self._run)

    @contextlib.contextmanager
    def _symbolic_sizes(self) -> Iterator[None]:
        marks = {} if self._chosen is None else _dims(self.module, self._chosen)
        self.compiler.own.update(map(id, marks))
        try:
            with _compat.marked_for_now(marks), _symbolic_numbers(self.numbers):
                yield
        finally:
            self.compiler.own.clear()

    def _finished(self, tree: Any) -> Any:
        """Return what the step returned or logged, whole: nobody outside expects that reading it is a collective."""
        tree = self.parameters.without_stand_ins(tree)
        if not (self._mode == "pieces" or self.compiler.keep_parts):
            return tree
        return apply_to_collection(tree, PartTensor, lambda value: value.whole("the end of the step"), allow_frozen=True)

    def _finish_attributes(self) -> None:
        """Make whole what the step left in the module."""
        for submodule in self.module.modules():
            for values in (submodule.__dict__, submodule._buffers):
                for name, value in values.items():
                    if any(isinstance(leaf, PartTensor) for leaf in pytree.tree_leaves(value)):
                        values[name] = self._finished(value)

    def _user_step(self) -> Callable[..., Any]:
        module, kind = self.module, self.kind

        def step(*args: Any, **kwargs: Any) -> Any:
            return getattr(module, kind)(*args, **kwargs)

        return step

    def _change(self, mode: str, reason: str, error: BaseException) -> None:
        where = _user_location(str(error))
        if self.compiler.strict:
            raise StrictModeError(f"strict=True: {self.kind} is not one graph. At {where}: {reason}") from error
        if not self._all_come():
            raise RuntimeError(
                f"{self.kind} goes another way on this rank than on others. At {where}: {reason}. All ranks of a job take the same "
                f"steps together: code must not depend on the rank, nor raise on one only."
            ) from error
        self.compiler.report.breaks.append(GraphBreak(where, f"{self.kind}: {reason}"))
        self._mode, self._chosen, self.numbers = mode, None, []
        if mode == "eager":
            self.compiler.report.notes.append(f"{self.kind} runs uncompiled and unsharded: right, but slow and large")
            self._run = self._user_step()
        else:
            compiler = replace(self.compiler, parameters=None, pieces=True, keep_parts=True, inspect=None)
            pieces = compile_step(self._user_step(), compiler, fullgraph=False)
            # A piece that cannot be traced runs as it is: right, because parameters are whole and values from other pieces make
            # themselves whole. Starting the step again instead would repeat what earlier pieces did.
            self._run = torch._dynamo.config.patch(suppress_errors=True)(pieces)


def _user_location(message: str) -> str:
    frames = [f"{file}:{line}" for file, line in frames_in(message) if "/lightning_autosp/step.py" not in file]
    own = [frame for frame in frames if "/site-packages/" not in frame]
    return (own or frames or ["<unknown>"])[-1]


def _headline(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "data-dependent" in str(error):
        return "Python decides on a tensor's value"
    raised = next((line for line in lines if line.startswith("Developer debug context: raised exception")), None)
    if raised is not None:  # the user's own
        return raised.removeprefix("Developer debug context: ")
    explanation = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation:")), "")
    return " ".join([*lines[:1], explanation]).strip()


class _Later:
    """What a metric's `forward` will have returned. The step can log and return it; whatever else it does with it cuts the step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getattr__(self, name: str) -> Any:
        _needs_value()


def _needs_value(*args: Any, **kwargs: Any) -> NoReturn:
    torch._dynamo.graph_break(
        msg="a metric's value is wanted inside the step; metric.update(), self.log(metric), and logging or returning what "
        "metric(...) gives need no cut"
    )
    raise AssertionError("not reached where a step is one graph")


# Looked up on the class, where Python does not ask `__getattr__`.
_ARITHMETIC = "add sub mul truediv pow radd rsub rmul rtruediv rpow neg abs"
for _name in f"{_ARITHMETIC} float int bool lt le eq ne gt ge len iter getitem contains format str".split():
    setattr(_Later, f"__{_name}__", _needs_value)


class _Deferred:
    """Calls that would break a graph (`self.log`, metrics), queued while it runs and made when it has returned."""

    def __init__(self, module: LightningModule, group: Group | None) -> None:
        self._module, self._group = module, group
        self._metrics = [metric for metric in module.modules() if isinstance(metric, (Metric, MetricCollection))]
        self.takes_parts = group is not None and any(map(is_by_position, self._metrics))
        """Whether a metric is updated with this rank's positions."""
        self._queue: list[tuple[Any, ...]] = []
        self.silent = False
        """Whether recorded calls are dropped instead of made."""
        self._returned: dict[int, Any] = {}
        """What calls returned, by their number in the queue; of the step before where they are dropped."""
        queue = self._queue  # Dynamo replays appends to a list it reached through a closure

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            queue.append(("log", name, value, args, kwargs))

        def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
            queue.append(("log_dict", dict(dictionary) if isinstance(dictionary, dict) else dictionary, args, kwargs))

        def uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compiler.disable(method)

        self._logging: list[tuple[Any, str, Any]] = [(module, "log", log), (module, "log_dict", log_dict)]
        self._queued: list[tuple[Any, str, Any]] = []
        self._direct: list[tuple[Any, str, Any]] = []
        for index, metric in enumerate(self._metrics):
            self._queued += [(metric, "update", self._updater(index)), (metric, "forward", self._caller(index))]
            # These return what the queued updates would have changed: the step has to be cut there.
            self._queued += [(metric, name, _needs_value) for name in ("compute", "reset")]
            self._direct.append((metric, "update", uncompiled(self._direct_updater(metric, metric.update))))
            for name in ("forward", "compute", "reset"):
                self._direct.append((metric, name, uncompiled(getattr(metric, name))))

    def _direct_updater(self, metric: Any, update: Callable[..., None]) -> Callable[..., None]:
        def direct(*args: Any, **kwargs: Any) -> None:
            if not self._updated_by_position(metric, update, args, kwargs):
                update(*args, **kwargs)

        return direct

    def _updated_by_position(self, metric: Any, update: Callable[..., None], args: Any, kwargs: Any) -> bool:
        if self._group is None or not is_by_position(metric):
            return False
        return update_by_position(metric, update, args, kwargs, self._group)

    def _updater(self, index: int) -> Callable[..., None]:
        queue = self._queue

        def update(*args: Any, **kwargs: Any) -> None:
            queue.append(("update", index, args, kwargs))

        return update

    def _caller(self, index: int) -> Callable[..., _Later]:
        queue = self._queue

        def forward(*args: Any, **kwargs: Any) -> _Later:
            later = _Later(len(queue))
            queue.append(("call", index, args, kwargs))
            return later

        return forward

    @contextlib.contextmanager
    def recording(self, *, one_graph: bool) -> Iterator[None]:
        """Put recorders in the place of the methods; nothing of them stays.

        Args:
            one_graph: Whether the step is one graph. Otherwise metrics run between its pieces, uncompiled and in time.
        """
        self._queue.clear()
        replacements = self._logging + (self._queued if one_graph else self._direct)
        missing = object()
        before = [(owner, name, owner.__dict__.get(name, missing)) for owner, name, _ in replacements]
        for owner, name, recorder in replacements:
            owner.__dict__[name] = recorder
        try:
            yield
        finally:
            for owner, name, value in before:
                if value is missing:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = value

    def replay(self, finish: Callable[[Any], Any]) -> None:
        """Make the recorded calls, in order, `finish` applied to their arguments."""
        calls = [] if self.silent else self._queue[:]
        self._queue.clear()
        for number, recorded in enumerate(calls):
            call = self.resolved(recorded)
            if call[0] == "update":
                metric = self._metrics[call[1]]
                if self._updated_by_position(metric, metric.update, *call[2:]):
                    continue
            what, *rest = finish(call)
            if what == "log":
                name, value, args, kwargs = rest
                self._module.log(name, value, *args, **kwargs)
            elif what == "log_dict":
                dictionary, args, kwargs = rest
                self._module.log_dict(dictionary, *args, **kwargs)
            else:
                index, args, kwargs = rest
                metric = self._metrics[index]
                self._returned[number] = metric.update(*args, **kwargs) if what == "update" else metric(*args, **kwargs)

    def resolved(self, tree: Any) -> Any:
        """Return a tree with what metrics returned in the place of what stands for it."""
        return apply_to_collection(tree, _Later, lambda later: self._returned[later.number], allow_frozen=True)
