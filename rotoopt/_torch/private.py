"""All private names of torch that this package uses, each with the public alternative that was tried.

Not here: methods that torch asks modules to override (``_apply``, ``_load_from_state_dict``, ``_save_to_state_dict``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

# Tensors nested in lists, tuples and dicts. There is no public function; torch.utils.pytree needs another package.
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_unflatten as tree_unflatten

ENGINE_FILE = torch.autograd.graph.__file__
ASSIGNMENT = "torch::autograd::CopySlices"  # the operation of x[part] = y in a graph, and of x[part].add_(y)
LARGEST_PROBE = 1 << 22  # entries
Function = TypeVar("Function", bound=Callable[..., Any])
Step = Callable[..., float | None]


def register_first_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor]) -> None:
    """Register ``hook`` before the existing hooks of ``tensor``, which then receive what it returns.

    ``Tensor.register_hook`` appends. A separate node after the tensor would be a public way, but would hide the tensor
    from everything that searches the graph for the inputs of the heads.
    """
    handle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    hooks = tensor._backward_hooks
    assert hooks is not None
    # Autograd uses the order of insertion, not that of an OrderedDict.
    others = [(key, hooks.pop(key)) for key in list(hooks) if key != handle.id]
    hooks.update(others)


def make_hook_tables(optimizer: Optimizer) -> None:
    """Give ``optimizer`` the tables that its ``register_*_hook`` methods fill.

    The public way is ``Optimizer.__init__``, which would also create a second list of parameter groups and a second,
    empty state, hiding those of the wrapped optimizer.
    """
    Optimizer.__setstate__(optimizer, {})


def mark_as_hooked(step: Function) -> Function:
    """Prevent torch from wrapping ``step`` to run the step hooks, which :func:`run_step_hooks` does.

    Otherwise global hooks would run twice per step: for the wrapper and for the wrapped optimizer.
    """
    step.hooked = True  # type: ignore[attr-defined]
    return step


def run_step_hooks(optimizer: Optimizer, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Call ``step(optimizer, *args, **kwargs)`` between the step hooks of ``optimizer``. No public name lists them."""
    args = (optimizer, *args)
    for pre_hook in optimizer._optimizer_step_pre_hooks.values():
        replaced = pre_hook(optimizer, args, kwargs)
        if replaced is None:
            continue
        if not isinstance(replaced, tuple) or len(replaced) != 2:
            raise TypeError(
                f"A step pre-hook must return None or a tuple (args, kwargs), got {replaced!r} from {pre_hook}."
            )
        args, kwargs = replaced
    result = step(*args, **kwargs)
    for post_hook in optimizer._optimizer_step_post_hooks.values():
        post_hook(optimizer, args, kwargs)
    return result


def run_state_dict_hooks(optimizer: Optimizer, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return ``save()``, called between the state-dict hooks of ``optimizer``.

    The public way, ``super().state_dict()``, would omit additions of the wrapped optimizer in its own ``state_dict``.
    """
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    state_dict = save()
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        state_dict = post_hook(optimizer, state_dict) or state_dict
    return state_dict


def run_load_state_dict_hooks(
    optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]
) -> None:
    """Call ``load(state_dict)`` between the load hooks of ``optimizer``; see :func:`run_state_dict_hooks`."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    load(state_dict)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward pre-hooks of ``module``. They can be added and removed publicly, but not listed."""
    return list(module._forward_pre_hooks.values())


FORWARDS = {"forward", "_conv_forward"}
TORCH_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


def is_observed(modules: Iterable[nn.Module], own: Sequence[Callable[..., Any]]) -> bool:
    """Whether anything but the hooks ``own`` sees the inputs of ``modules``.

    That is another hook, a compiled graph, or a method ``forward`` other than torch's, of one module alone, as added by
    Accelerate, or of its class.
    """
    return torch.nn.modules.module._has_any_global_hook() or any(  # type: ignore[no-untyped-call]
        module._compiled_call_impl is not None
        or not FORWARDS.isdisjoint(module.__dict__)
        or type(module).forward is not TORCH_FORWARDS.get(type(module))
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(hook not in own for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))
        for module in modules
    )


@contextmanager
def without_forward_pre_hooks(module: nn.Module, kind: type[Any]) -> Iterator[None]:
    """Disable the forward pre-hooks of class ``kind`` on ``module`` temporarily.

    Removing and registering them again, the public way, would invalidate the user's handles.
    """
    hooks = module._forward_pre_hooks
    module._forward_pre_hooks = type(hooks)((key, hook) for key, hook in hooks.items() if not isinstance(hook, kind))
    try:
        yield
    finally:
        module._forward_pre_hooks = hooks


def own_parameters(module: nn.Module) -> list[nn.Parameter | None]:
    """Return the parameters of ``module`` itself; none if its ``__init__`` has not run yet.

    The public ``module.parameters(recurse=False)`` raises an error in that case.
    """
    return list(vars(module).get("_parameters", {}).values())


def named_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter ``name`` of ``module`` itself, without computing it if it is parametrized by now."""
    found: Tensor | None = vars(module).get("_parameters", {}).get(name)  # scripted modules keep them elsewhere
    return found


def default_store() -> Any:
    """Return the store that the processes of the default group share. The public way: every user passes one."""
    return dist.distributed_c10d._get_default_store()


def backward_pass_id() -> int:
    """Return the number of the current backward pass, -1 outside of one.

    Public hooks do not indicate the beginning or the end of a backward pass that the user calls.
    """
    return torch._C._current_graph_task_id()


def running_roots() -> list[Tensor]:
    """Return the tensors that the current backward pass started from; none if they cannot be found.

    They are in a frame of ``torch.autograd``, in the thread that waits for the pass. There is no public name or hook.
    """
    frame = _running_frame()
    return [] if frame is None else list(frame.f_locals["t_outputs"])


def running_inputs() -> list[Any]:
    """Return what ``torch.autograd.grad`` returns gradients of; none in a pass that adds to ``.grad``, or if unknown.

    See :func:`running_roots`.
    """
    frame = _running_frame()
    if frame is None or frame.f_locals["kwargs"].get("accumulate_grad", True):
        return []
    return list(frame.f_locals["args"][3])


def _running_frame() -> FrameType | None:
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name == "_engine_run_backward" and caller.f_code.co_filename == ENGINE_FILE:
                return caller
            caller = caller.f_back
    return None


def output_shapes(node: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs of an operation in a graph. There is no public name for them."""
    return [tuple(each.shape) for each in getattr(node, "_input_metadata", ())]


def num_outputs(node: Any) -> int:
    """Return the number of outputs of an operation in a graph; see :func:`output_shapes`."""
    return len(getattr(node, "_input_metadata", ()))


def is_on_host(node: Any) -> bool:
    """Whether the outputs of an operation in a graph are on the CPU; see :func:`output_shapes`."""
    return all(each.device.type == "cpu" for each in getattr(node, "_input_metadata", ()))


def saved(node: Any, name: str) -> Any:
    """Return an argument of an operation in a graph, as the dimension of a sum.

    There is no public name for it.

    Returns:
        None if it has none of that name, or a backward pass has freed it.
    """
    try:
        value = getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None
    return tuple(map(_signed, value)) if isinstance(value, tuple) else _signed(value)


def _signed(value: Any) -> Any:
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


@torch.no_grad()
def kept_by_assignment(node: Any) -> Tensor | None:
    """Return which entries of x remain after ``x[part] = y``, given its operation in a graph. Bool, shape of x.

    There is no public name for it; only the gradients of the operation show it.

    Returns:
        None if it is unknown: entries were changed, not replaced; x has no gradient; or after a backward pass.
    """
    of_x = node._input_metadata[0]
    try:
        grads = node(torch.ones(of_x.shape, dtype=of_x.dtype, device=of_x.device))
    except RuntimeError:
        return None
    kept, *written = (grads,) if isinstance(grads, Tensor) else grads
    if kept is None:
        return None
    remains, replaced = kept == 1, kept == 0
    written = [each.double().sum() for each in written if each is not None]  # none for x[part] = 0
    is_known = bool((remains | replaced).all()) and (not written or sum(written) == replaced.sum())
    return remains if is_known else None


@torch.no_grad()
def places_of_entries(node: Any) -> list[Tensor] | None:
    """Return where an operation that moves entries puts those of each input: indices of its output, flattened.

    Only its gradients show it, as in :func:`kept_by_assignment`. An entry that is not in the output has the index -1.

    Returns:
        None if entries are not moved one by one, an input cannot represent the indices or has no gradient, or after a
        backward pass.
    """
    of_output = node._input_metadata[0]
    size = torch.Size(of_output.shape)
    numbers = torch.arange(1, size.numel() + 1, dtype=torch.float64, device=of_output.device)
    try:
        grads = node(numbers.reshape(size))
    except RuntimeError:
        return None
    grads = [grads] if isinstance(grads, Tensor) else list(grads)
    if any(grad is None for grad in grads):
        return None
    places = [(grad.flatten().double() - 1).long() for grad in grads]
    is_exact = all(torch.equal(grad.flatten(), each + 1) for grad, each in zip(grads, places, strict=True))
    index = torch.cat(places)
    each_once = torch.equal(torch.bincount(index[index >= 0], minlength=len(numbers)), torch.ones_like(numbers).long())
    return places if is_exact and each_once else None


@torch.no_grad()
def entries_of_change(node: Any) -> tuple[Tensor, Tensor] | None:
    """Return what ``x[part].mul_(c)``, ``x[part].add_(y)`` and the like leave of x, and where they put y.

    Only the gradients of the operation show it, as in :func:`kept_by_assignment`.

    Returns:
        Whether each entry of x has a gradient, and the indices of the entries that those of y change, flattened, -1 for
        none. None if entries are combined, there are more inputs, x is large, or after a backward pass.
    """
    output = node._input_metadata[0]
    size = torch.Size(output.shape)
    if size.numel() > LARGEST_PROBE:
        return None
    numbers = torch.arange(1, size.numel() + 1, dtype=torch.float64, device=output.device)
    probes = [torch.ones_like(numbers), numbers, *[1 + (numbers * each) % 1 for each in (2**0.5, 3**0.5)]]
    try:
        found = [node(probe.reshape(size)) for probe in probes]
    except RuntimeError:
        return None
    grads = zip(*[[each] if isinstance(each, Tensor) else each for each in found], strict=True)
    none = torch.full_like(numbers, -1).long()
    places = [none if each[0] is None else _only_places(each, probes) for each in grads]
    known = [each for each in places if each is not None]
    others = [each for each in known[1:] if each is not none]
    if len(known) < len(places) or len(others) > 1:
        return None
    of_x, index = known[0], [*others, none][0]
    remains, changed = of_x >= 0, index[index >= 0]
    if len(set(changed.tolist())) < len(changed) or not torch.equal(of_x[remains], remains.nonzero()[:, 0]):
        return None
    return remains, index


def _only_places(grads: Sequence[Tensor], probes: Sequence[Tensor]) -> Tensor | None:
    """Return which entry of the output each entry of an input changes, -1 if none; None if one changes several.

    Args:
        grads: The gradients of the input for those of the output in ``probes``.
        probes: One everywhere; 1, 2, 3, ...; and irregular numbers.
    """
    factors, numbers, *others = [each.flatten().double() for each in grads]
    is_none = torch.stack([factors, numbers, *others]).eq(0).all(0)
    index = torch.where(is_none, 0.0, numbers / factors - 1).round().nan_to_num().long().clamp(0, len(probes[0]) - 1)
    is_one = [
        torch.isclose(grad, factors * probe[index]) for grad, probe in zip((numbers, *others), probes[1:], strict=True)
    ]
    is_known = is_none | (torch.stack(is_one).all(0) & (factors != 0))
    return index.masked_fill(is_none, -1) if bool(is_known.all()) else None


def is_transformed() -> bool:
    """Whether a model is being exported, traced or transformed by ``torch.func`` rather than trained.

    Only ``torch.func`` has no public name for it.
    """
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return exported or torch._C._are_functorch_transforms_active()


def not_compiled(function: Function) -> Function:
    """Exclude ``function`` from ``torch.compile``.

    The public ``torch.compiler.disable`` imports ``torch._dynamo`` when it decorates, which doubles the import time of
    torch; this one imports it in the first call.
    """
    decorated: Function = torch._disable_dynamo(function)  # type: ignore[attr-defined, assignment]
    return decorated


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside of ``torch.compile(module)``, None for any other. There is no public name for it."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def without_compiled_prefixes(name: str) -> str:
    """Return the name of a parameter without the prefixes of ``torch.compile(module)``."""
    return name.replace("_orig_mod.", "")


def version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was changed in place. Comparing values instead would synchronize."""
    return tensor._version
