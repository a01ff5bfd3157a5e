"""Every private name of torch the package leans on, in one place.

Checked against torch 2.13.0. Each entry says what it is for; when a release moves one, this file is where it is mended.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch

# The pieces a partitioner is made of: equal operators run once, torch's own choice, and the two graphs for any choice.
from torch._functorch import config as _functorch_config
from torch._functorch._aot_autograd.functional_utils import from_fun as _from_fun

# Functionalisation as torch.export traces with it.
from torch._functorch._aot_autograd.functional_utils import has_data_mutation, to_fun
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import _extract_fwd_bwd_modules
from torch._functorch.partitioners import min_cut_rematerialization_partition as min_cut_partition

# What Dynamo records where a vmap opens and closes a level.
from torch._functorch.predispatch import _vmap_decrement_nesting as VMAP_CLOSES
from torch._functorch.predispatch import _vmap_increment_nesting as VMAP_OPENS
from torch._subclasses.functional_tensor import FunctionalTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode as _FunctionalTensorMode
from torch.distributed.device_mesh import DeviceMesh

# Tie a fake tensor that no traced operator produced to a node of the graph being traced (opaque higher-order operators).
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, track_tensor_tree

# An operator's description needs the value of a size that depends on data.
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

# What sizes are made of.
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils.checkpoint import CheckpointPolicy

# Documented as what tells `default_collate` of further types, under this name.
from torch.utils.data._utils.collate import default_collate_fn_map

try:
    from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen
except ImportError:  # before torch 2.12
    BoxedCodeGen = None  # type: ignore[assignment, misc]

# The class is given out as `torch.compile`'s, but has no public place.
DynamicInt: Any = getattr(torch.fx.experimental.sym_node, "DynamicInt", None)

__all__ = [
    "DYNAMO_IGNORES_MODES",
    "FloorDiv",
    "FunctionalTensorMode",
    "GuardOnDataDependentSymNode",
    "Max",
    "Min",
    "VMAP_CLOSES",
    "VMAP_OPENS",
    "autograd_inside_operator",
    "boxed",
    "current_tracer",
    "default_collate_fn_map",
    "dynamic_dims",
    "example_of",
    "extract_forward_and_backward",
    "first_sizes",
    "forbid_reading",
    "from_fun",
    "has_data_mutation",
    "has_known_elements",
    "is_traced",
    "is_updated",
    "make_fx",
    "max_pool1d",
    "mark_dynamic",
    "marked_for_now",
    "mesh_without_group",
    "min_cut",
    "min_cut_partition",
    "node_of",
    "partitioner",
    "shape_replacements",
    "size_guards",
    "symbolic",
    "symbols_at_first",
    "to_fun",
    "track_tensor_tree",
    "without_duplicates",
    "without_top_mode",
]


DYNAMO_IGNORES_MODES = hasattr(TorchDispatchMode, "ignore_compile_internals")
"""Whether a dispatch mode can let Dynamo compile what runs under it. Older versions leave all of it to eager code."""


class FunctionalTensorMode(_FunctionalTensorMode):
    """Functionalisation that keeps composite operators whole, and lets what a dropout returns be updated in place."""

    def __init__(self) -> None:
        super().__init__(pre_dispatch=True, export=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is not torch.ops.aten.dropout.default or not isinstance(result, FunctionalTensor):
            return result
        # The operator may return its input, so torch refuses to update what it returns. Here it is known which it does.
        tensor, probability, training = args
        if not training or probability == 0 or tensor.numel() == 0:
            return tensor
        with self:
            return to_fun(from_fun(result))


def from_fun(tensor: Any) -> Any:
    """Return what a functional tensor wraps, its pending updates applied."""
    return _from_fun(tensor)


def max_pool1d(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> torch.Tensor:
    """`aten.max_pool1d` in two dimensions; see there."""
    sizes = ([1, *kernel_size], [1, *(stride or kernel_size)], [0, *padding], [1, *dilation])
    wide: torch.Tensor = torch.ops.aten.max_pool2d.default(x.unsqueeze(-2), *sizes, ceil_mode)
    return wide.squeeze(-2)


# PyTorch's own kernel reads sizes as integers, which fixes the length that Dynamo traces it with.
if torch._C.DispatchKey.CompositeImplicitAutograd not in torch.ops.aten.max_pool1d.default.py_kernels:
    torch.ops.aten.max_pool1d.default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(max_pool1d)


def node_of(value: Any, tracer: Any) -> Any:
    """Return the node a traced tensor or symbolic number comes from."""
    slot: Any = get_proxy_slot(value, tracer)
    return slot.proxy.node if isinstance(value, torch.Tensor) else slot.force().node


def is_updated(tensor: Any) -> bool:
    """Return whether a traced tensor, or anything that shares its memory, was updated in place; `True` if that is not known."""
    if not isinstance(tensor, FunctionalTensor):
        return True
    flags = (
        torch._functionalize_has_data_mutation,  # type: ignore[attr-defined]
        torch._functionalize_has_metadata_mutation,  # type: ignore[attr-defined]
        torch._functionalize_was_storage_changed,  # type: ignore[attr-defined]
    )
    return any(flag(tensor.elem) for flag in flags)


def is_traced(tensor: torch.Tensor, tracer: Any) -> bool:
    """Return whether a node of the graph being traced stands for the tensor."""
    return get_proxy_slot(tensor, tracer, None) is not None


def has_known_elements(tensor: torch.Tensor) -> bool:
    """Return whether a trace holds the tensor's elements, not only its description."""
    slot = get_proxy_slot(tensor, current_tracer(), None)
    return slot is not None and slot.constant is not None


def current_tracer() -> Any:
    """Return the tracer of the `make_fx` in progress."""
    mode = get_proxy_mode()
    assert mode is not None, "no trace in progress"
    return mode.tracer


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Ask Dynamo for a symbol for this dimension, without an error should the user's code fix its size."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def symbolic(number: int) -> int:
    """Return the same number, which Dynamo takes for a symbol wherever it stands."""
    return DynamicInt(int(number)) if DynamicInt is not None else number


def dynamic_dims(tensor: torch.Tensor) -> set[int]:
    """Return the dimensions that `mark_dynamic` marked."""
    return set(getattr(tensor, "_dynamo_weak_dynamic_indices", ()))


@contextmanager
def marked_for_now(dims: Mapping[torch.Tensor, Iterable[int]]) -> Iterator[None]:
    """Ask Dynamo for symbols for these dimensions, for a while. Compiled code stays valid when the marks are gone."""
    name = "_dynamo_weak_dynamic_indices"
    before = {tensor: getattr(tensor, name, None) for tensor in dims}
    try:
        for tensor, marked in dims.items():
            setattr(tensor, name, {*(before[tensor] or ()), *marked})
        yield
    finally:
        for tensor, indices in before.items():
            if indices is None:
                delattr(tensor, name)
            else:
                setattr(tensor, name, indices)


def symbols_at_first(size: int | torch.SymInt) -> set[Any]:
    """Return the symbols that a size was made of, whatever is known of them by now."""
    return set(size.node._expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def first_sizes(values: Iterable[Any]) -> dict[Any, int]:
    """Return what the symbols that are sizes of fake tensors were when these were traced, whatever is known of them by now."""
    sizes: Iterable[Any] = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    nodes = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    return {node._expr: int(node.hint) for node in nodes if node._expr.is_Symbol and node.has_hint()}


def example_of(placeholder: torch.fx.Node) -> Any:
    """Return the real value Dynamo saw for a graph input, while its backend runs."""
    arg = placeholder.meta.get("grapharg")
    try:
        return None if arg is None else arg.example
    except (AssertionError, AttributeError):
        return None


def forbid_reading(tensor: torch.Tensor) -> None:
    """Make C++ code that asks for the memory of a tensor that has none fail, instead of reading address 0."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def without_top_mode(kind: type) -> AbstractContextManager[Any]:
    """Leave the innermost dispatch mode for a while, if it is of this kind; gives the mode, else `None`."""
    mode = _get_current_dispatch_mode()
    return _pop_mode_temporarily() if isinstance(mode, kind) else nullcontext()


def shape_replacements(fake_mode: Any) -> dict[Any, Any]:
    """Return the symbol equalities that tracing established (the labels' length is the ids' length)."""
    env = fake_mode.shape_env
    return dict(env.replacements) if env is not None else {}


def size_guards(fake_mode: Any) -> list[tuple[Any, str]]:
    """Return what tracing found true of sizes, which is checked of every input of the graph: `Eq(s//2, (s + 1)//2)`.

    Each comes with the line that asked, `source  # file:line in function`, the start of the path missing; empty if it is not known.
    """
    env = fake_mode.shape_env
    return [(guard.expr, getattr(guard.sloc, "maybe_user_loc", None) or "") for guard in env.guards] if env is not None else []


def mesh_without_group(num_ranks: int) -> DeviceMesh:
    """Return a mesh to ask PyTorch's sharding rules on, as its first rank. No process group is made, none is needed."""
    return DeviceMesh("cpu", list(range(num_ranks)), _init_backend=False, _rank=0)


def sdpa_kernel(
    device: str, dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int], masked: bool, dropout: float, is_causal: bool
) -> str:
    """Return which kernel `scaled_dot_product_attention` takes for a call: PyTorch is asked, with few positions.

    Args:
        device: Its type.
        dtype: Of queries, keys and values.
        heads: Of queries, and of keys and values.
        widths: Of a head of queries, and of values.
        masked: Whether there is a mask.
        dropout: Probability of dropping a weight.
        is_causal: Whether the flag is set.

    Returns:
        `"flash"`, `"efficient"`, `"cuDNN"`, `"math"`, ...; "" if there is no such device here.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        return ""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        shapes = [(1, heads[0], 64, widths[0]), (1, heads[1], 64, widths[0]), (1, heads[1], 64, widths[1])]
        query, key, value = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device) if masked else None
        chosen = torch._fused_sdp_choice(query, key, value, mask, dropout, is_causal, enable_gqa=heads[0] != heads[1])
    names = {"MATH": "math", "FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "efficient", "CUDNN_ATTENTION": "cuDNN"}
    name = torch.nn.attention.SDPBackend(chosen).name
    found = names.get(name, name.lower())
    return f"CPU {found}" if device == "cpu" and found != "math" else found


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Let autograd record within the kernel of a custom operator, which runs below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def without_duplicates(graph: torch.fx.Graph) -> torch.fx.Graph:
    """Return a joint graph that computes nothing twice, as AOTAutograd's own partitioner begins."""
    graph.eliminate_dead_code()
    return fx_graph_cse(graph) if _functorch_config.cse else graph


def min_cut(
    module: torch.fx.GraphModule, inputs: Any, again: set[torch.fx.Node], **options: Any
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Partition a joint graph as torch does by default.

    Args:
        module: Of the joint graph; stays as it is.
        inputs: Passed on.
        again: Nodes that are never kept for backward.
        options: Passed on.
    """
    names = {node.name for node in again}
    module = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in module.graph.nodes:
        if node.name in names:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return min_cut_partition(module, inputs, **options)


def partitioner(partition: Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]]) -> Any:
    """Return a function that divides joint graphs as Inductor's options take it."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partition(CustomPartitionerFn):
        def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
            return partition(gm, joint_inputs, **options)

        def uuid(self) -> str:
            # What follows is cached by the graphs of forward and backward, which say what was chosen.
            return "lightning_autosp"

    return Partition()


def extract_forward_and_backward(
    module: torch.fx.GraphModule, saved: list[torch.fx.Node], num_fwd_outputs: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Return the graphs of forward and backward that hand each other these values, in AOTAutograd's calling convention."""
    return _extract_fwd_bwd_modules(module, saved, saved_sym_nodes=[], num_fwd_outputs=num_fwd_outputs)


def boxed(module: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """Return the module as a function of a list that it empties, so that inputs are freed behind their last use."""
    run: Callable[[list[Any]], Any]
    if BoxedCodeGen is not None:
        module.graph.set_codegen(BoxedCodeGen())
        module.recompile()
        run = module.forward
    else:

        def run(inputs: list[Any]) -> Any:
            return torch.fx.Interpreter(module).boxed_run(inputs)

    @functools.wraps(run)
    def call(inputs: list[Any]) -> Any:
        return run(inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def default_store() -> Any:
    """Return the key-value store that the processes of the default group share."""
    return torch.distributed.distributed_c10d._get_default_store()


def own_store() -> Any:
    """Return that store by a connection of its own: a thread that waits for a key keeps a connection from all others."""
    store = default_store()
    return store.clone() if hasattr(store, "clone") else store


def set_timeout(group: torch.distributed.ProcessGroup, timeout: timedelta) -> None:
    """Limit how long collectives of a group wait: groups of a mesh do not take the default group's limit."""
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


def collectives_started(group: torch.distributed.ProcessGroup) -> int:
    """Return how many collectives this process has started in a group."""
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
