"""Values that cross a graph break: this rank's part, seen by Python as the whole tensor.

A step that Python cuts in pieces hands values from one compiled piece to the next. A value that was computed as a part is handed on
as a `PartTensor`: shape, dtype and autograd of the whole, memory of the part.

    piece 1 -> part -> PartTensor -> (Python) -> PartTensor -> part -> piece 2      nothing is communicated
                                        |
                                        any operator, `tolist`, `print`, ...        the parts are gathered, once

Dynamo traces it as the plain tensor it stands for, and the next piece's program takes the part. Once gathered, the whole is what
counts (Python may have changed it), and gradients flow through it: its backward sums and cuts them, as a gather's does.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autosp import _compat
from lightning_autosp.collectives import Group, all_reduce_sum, reduce_scatter_sequence
from lightning_autosp.compiler.emit import gather_layout, slice_layout
from lightning_autosp.compiler.layout import Layout, Span
from lightning_autosp.compiler.report import Crossing
from lightning_autosp.lines import is_users

__all__ = ["EagerMarks", "PartTensor", "Placement", "placement_of"]


class Placement(NamedTuple):
    """A layout in numbers, without the size of what it cuts: see `layout.Layout` and `layout.Span`."""

    dim: int
    outer: int
    inner: int
    begin: int
    end: int

    def layout(self, size: sympy.Expr) -> Layout:
        """Return the layout of a tensor whose dimension `dim` has this size."""
        base = sympy.expand(size / (self.outer * self.inner)) + self.begin - self.end
        return Layout(self.dim, Span(base, self.begin, self.end), sympy.Integer(self.outer), sympy.Integer(self.inner))

    def lengths(self, size: int, group: Group) -> tuple[int, ...]:
        """Return every rank's number of positions in a dimension of this size."""
        span = self.layout(sympy.Integer(size)).span
        return tuple(stop - start for start, stop in span.bounds(int(span.base), group.size))


def _of_the_whole(name: str) -> Any:
    @torch.compiler.disable
    def method(self: PartTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.whole(name), name)(*args, **kwargs)

    return method


class PartTensor(Tensor):
    """A whole tensor of which this rank holds its part, until something but a compiled piece needs more."""

    placement: Placement | None
    """How the part is cut; `None` once the whole has been made."""
    _part: Tensor
    _whole: Tensor  # from then on, without autograd
    _group: Group
    _crossing: Crossing
    _aliased: bool
    _taken: bool  # whether a compiled piece has used the part
    _averages: bool  # whether hooks of this tensor are given the mean over the ranks
    _entered: Any  # what `grad_fn` is until an update in place
    _anchor: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(
        part: Tensor, shape: tuple[int, ...], placement: Placement, group: Group, crossing: Crossing, *, aliased: bool
    ) -> PartTensor:
        """Return the tensor of this global shape of which every rank of a group holds a part.

        Args:
            part: This rank's part.
            shape: Of the whole.
            placement: How the whole is cut.
            group: The sequence group.
            crossing: Told when the whole is made.
            aliased: Whether on one device another tensor shares its memory.
        """
        tensor: Any = _Enter.apply(part, shape, placement, group)
        tensor.placement, tensor._part, tensor._group, tensor._crossing = placement, part, group, crossing
        tensor._aliased, tensor._taken, tensor._averages, tensor._entered = aliased, False, False, tensor.grad_fn
        return tensor

    def for_piece(self) -> Tensor:
        """Return this rank's part, with autograd to what computed it; the whole if it has been made."""
        if self.placement is None:
            return self.whole("")
        self._taken = True
        return self._part

    @torch.compiler.disable
    def whole(self, reader: str) -> Tensor:
        """Return the whole as a plain tensor that shares this one's memory and autograd. Gathers if nobody did.

        Args:
            reader: What wants it, for the report.
        """
        self.make_whole(reader)
        plain: Tensor = _Leave.apply(self)
        return plain

    def refuse_update(self, what: str) -> None:
        """Raise if an update in place would have to reach other tensors."""
        if self._aliased:
            raise RuntimeError(
                f"{what} at {_line_of_the_user()} changes a tensor of shape {tuple(self.shape)} in place that shares its memory "
                f"with another one. Computed in parts, they are separate behind a graph break. Use the operator that returns a "
                f"new tensor, or clone() one of the two."
            )

    @torch.compiler.disable
    def make_whole(self, reader: str) -> Tensor:
        """Make the whole if it is not there, and return it without autograd. A collective."""
        if self.placement is not None:
            dim, outer, inner, *_ = self.placement
            with torch.no_grad():
                lengths = self.placement.lengths(self.shape[dim], self._group)
                self._whole = gather_layout(self._part.detach(), dim, outer, inner, lengths, self._group)
            self._crossing.add_gather(f"{reader} at {_line_of_the_user()}")
            self.placement = None
        return self._whole

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wrappers: dict[int, PartTensor] = {}

        def unwrap(tensor: PartTensor) -> Tensor:
            whole = tensor.make_whole(str(func))
            wrappers[id(whole)] = tensor
            return whole

        unwrapped: Any = pytree.tree_map_only(PartTensor, unwrap, (args, kwargs or {}))
        updated = [wrappers[id(one)] for one in _updated(func, *unwrapped) if id(one) in wrappers]
        for tensor in updated:
            tensor.refuse_update(str(func))
        result = func(*unwrapped[0], **unwrapped[1])
        for tensor in updated:
            tensor._refuse_new_shape(func)
        # In-place operators return what they were given.
        return pytree.tree_map_only(Tensor, lambda tensor: wrappers.get(id(tensor), tensor), result)

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return super().data

    @data.setter
    @torch.compiler.disable
    def data(self, value: Tensor) -> None:
        self.refuse_update("an assignment to .data")
        self.make_whole("an assignment to .data")
        self._whole = value.make_whole("an assignment to .data") if isinstance(value, PartTensor) else value.data
        self._refuse_new_shape("an assignment to .data")

    def _refuse_new_shape(self, func: Any) -> None:
        if self._whole.shape != self.shape or self._whole.stride() != self.stride():
            raise RuntimeError(
                f"{func} at {_line_of_the_user()} changes the shape of a tensor in place, between two compiled pieces of a step: "
                f"{tuple(self.shape)} to {tuple(self._whole.shape)}. Use the operator that returns a new tensor."
            )

    # Dynamo asks how to trace it: as a plain tensor of its shape. The anchor carries dtype, device and the fake mode there.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_anchor"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, shape: Any, stride: Any) -> Tensor:
        return inner["_anchor"].new_empty_strided(shape, stride)

    # What reads memory or autograd past the dispatcher.

    numpy = _of_the_whole("numpy")
    tolist = _of_the_whole("tolist")
    data_ptr = _of_the_whole("data_ptr")
    __array__ = _of_the_whole("__array__")
    __dlpack__ = _of_the_whole("__dlpack__")
    __reduce_ex__ = _of_the_whole("__reduce_ex__")
    __repr__ = _of_the_whole("__repr__")

    @torch.compiler.disable
    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.whole("copy.deepcopy"), memo)

    @torch.compiler.disable
    def register_hook(self, hook: Any) -> Any:
        if self.grad_fn is not self._entered:
            self._average_gradient("register_hook")
            return super().register_hook(hook)

        # Gradients of compiled pieces reach the part, and so do those of the whole.
        entered: Any = self._entered
        dim, outer, inner, *_ = entered.placement
        lengths, ranks = entered.placement.lengths(self.shape[dim], self._group), self._group.size
        start = sum(lengths[: self._group.rank])

        def on_part(gradient: Tensor) -> Tensor | None:
            new = hook(gather_layout(gradient, dim, outer, inner, lengths, self._group) / ranks)
            return None if new is None else slice_layout(new, dim, outer, inner, start, start + lengths[self._group.rank]) * ranks

        return self._part.register_hook(on_part)

    @torch.compiler.disable
    def retain_grad(self) -> None:
        self._average_gradient("retain_grad")
        super().retain_grad()

    def _average_gradient(self, reader: str) -> None:
        """Let hooks see what they would on one device: the mean of what the ranks' own losses give."""
        if self._taken:
            raise RuntimeError(
                f"{reader} at {_line_of_the_user()}: a tensor of shape {tuple(self.shape)} that crossed a graph break has been "
                f"used by a compiled piece of the step. Call it before the first use."
            )
        self.make_whole(reader)
        if not self._averages:
            self._averages = True
            super().register_hook(lambda gradient: all_reduce_sum(gradient, self._group) / self._group.size)


class _Enter(torch.autograd.Function):
    """Part to `PartTensor`; the gradient of the whole is summed over the ranks and cut."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shape: tuple[int, ...], placement: Placement, group: Group) -> Tensor:
        ctx.placement, ctx.group = placement, group
        strides = torch.empty(shape, device="meta").stride()
        tensor: Any = Tensor._make_wrapper_subclass(PartTensor, shape, strides, dtype=part.dtype, device=part.device)  # type: ignore[attr-defined]
        _compat.forbid_reading(tensor)
        tensor._anchor = part.new_empty(0)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, outer, inner, *_ = ctx.placement
        lengths = ctx.placement.lengths(grad.shape[dim], ctx.group)
        split = grad.unflatten(dim, (outer, -1, inner))
        return reduce_scatter_sequence(split, dim + 1, lengths, ctx.group).flatten(dim, dim + 2), None, None, None


class _Leave(torch.autograd.Function):
    """A gathered `PartTensor` to a plain tensor on the same memory."""

    @staticmethod
    def forward(ctx: Any, tensor: PartTensor) -> Tensor:
        return tensor._whole.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class EagerMarks(TorchDispatchMode):
    """While it is on, dimensions as long as a sequence get a symbol in what eager code computes, for the piece that takes it.

    Dynamo leaves whole functions to eager code when it cannot cut them, those with a loop around the break above all.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        super().__init__()
        self._lengths = {length + added for length in lengths for added in (-1, 0, 1)}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo compile what runs under this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, PartTensor) for one in types):  # it comes back with plain ones
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            self.mark(result)
        return result

    def mark(self, values: Any) -> None:
        """Mark the tensors among values."""
        for tensor in pytree.tree_leaves(values):
            if type(tensor) is Tensor and not tensor.is_nested:
                for dim, size in enumerate(tensor.shape):
                    if size in self._lengths:
                        _compat.mark_dynamic(tensor, dim)


def placement_of(value: Any) -> Placement | None:
    """Return how a piece's input is cut; `None` for what is whole."""
    return value.placement if isinstance(value, PartTensor) else None


def _updated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Return the arguments that an operator updates in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from pytree.tree_leaves(value)


def _line_of_the_user() -> str:
    frame = sys._getframe()
    while frame.f_back is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
