"""A pretend accelerator: what a CUDA run would trip over, found on a machine that has none.

Tensors on `pretend:0` compute on the CPU, so numbers must be those of a CPU run; but they say that they live elsewhere,
and they are as unforgiving as a GPU's, or a little more:

- an operation takes tensors of one device; only numbers (0-dim) and indices *into* a device tensor may be the host's;
- nothing in place or `out=` crosses devices, and an `out=` of another size is an error rather than a resize;
- memory that was never written is full of NaN, as a caching allocator's may be;
- grouped products want int32 ends, one layout, and rows of whole 16 bytes; groups without a row come back as garbage,
  which is what torch gives on some GPUs (pytorch issue 172439);
- generators belong to a device, copies to the host may not be asynchronous, unsigned integers of 16 bits and more are
  moved and viewed, not computed with;
- where only deterministic algorithms are allowed, a cumulative sum of floats is refused.

Built on torch's support for backends written in Python (`_setup_privateuseone_for_python_backend`, experimental). It
is registered once a process, which does not show until a tensor names it; within `there()`, `torch.tensor` and its like
make tensors there too. It says nothing of speed, of kernels' own limits, or of their last bits. An error in a backward
pass, which runs on a thread of the device, ends the process (torch's guard of Python devices knows no streams), so it
is told on stderr before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend:0"
_CPU = torch.device("cpu")
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_SYNCHRONIZES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal"}
_MAKERS = (
    "tensor",
    "as_tensor",
    "asarray",
    "arange",
    "eye",
    "linspace",
    "randperm",
)  # C++ makes these in ways of its own
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
_ADDED_UP = {"aten::cumsum", "aten::cumsum_", "aten::cumprod"}


@dataclass
class Counts:
    """What happened since the last `there()`: waits for the device, bytes sent to it, and held there."""

    waits: int = 0
    sent: int = 0
    held: int = 0
    peak: int = 0
    storages: dict[int, int] = field(default_factory=dict)  # address -> tensors on it

    def took(self, tensor: PretendTensor) -> None:
        storage = tensor.elem.untyped_storage()
        key, nbytes = storage.data_ptr(), storage.nbytes()
        self.storages[key] = self.storages.get(key, 0) + 1
        if self.storages[key] == 1:
            self.held += nbytes
            self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self.gave, key, nbytes).atexit = False

    def gave(self, key: int, nbytes: int) -> None:
        self.storages[key] -= 1
        if not self.storages[key]:
            del self.storages[key]
            self.held -= nbytes


class PretendTensor(torch.Tensor):
    """A tensor that says it is elsewhere; `elem` is where it is."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls: type[PretendTensor], elem: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device(NAME),
        )
        made.elem = elem
        if _watched is not None:
            _watched.took(made)
        return made

    def tolist(self) -> Any:
        if _watched is not None:
            _watched.waits += 1
        return self.elem.tolist()

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_kwargs: Any) -> str:
        return f"{NAME}: {self.elem!r}"

    __array__ = numpy
    __dlpack__ = numpy
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Module:
    """What torch asks of `torch.pretend`."""

    def __init__(self) -> None:
        self.random = torch.Generator()

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.random.manual_seed((seed + 1) % (1 << 63))  # not the numbers that the same seed gives on the host

    manual_seed = manual_seed_all

    def synchronize(self, _device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_module = _Module()
_watched: Counts | None = None
_library: Any = None


def register() -> torch.device:
    """Make the device known to this process, once."""
    global _library
    if _library is None:
        _setup_privateuseone_for_python_backend("pretend", backend_module=_module)
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda op, *args, **kwargs: _dispatch(op, args, kwargs), "PrivateUse1")
    return torch.device(NAME)


@contextlib.contextmanager
def there() -> Iterator[Counts]:
    """Let `torch.tensor` and its like make tensors there, whose makers do not come by; count what happens."""
    global _watched
    register()
    before = _watched, {name: getattr(torch, name) for name in _MAKERS}
    _watched = Counts()
    for name, maker in before[1].items():
        setattr(torch, name, _also_there(maker))
    try:
        yield _watched
    finally:
        _watched = before[0]
        for name, maker in before[1].items():
            setattr(torch, name, maker)


def _of_context() -> torch.device | None:
    """The device of the innermost `with torch.device(...)`."""
    modes = (mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext))
    return next((mode.device for mode in modes), None)


def _also_there(maker: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(maker)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        # Of a device's context, whose list of makers torch draws up once: these may be on it or not.
        if not _is_there(_of_context() if device is None else device):
            return maker(*args, device=device, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        return maker(*args, device="cpu", **kwargs).to(NAME).requires_grad_(grad)

    return make


# -- one operation ----------------------------------------------------------------------------------------------------


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return _compute(func, args, kwargs)
    except Exception:
        if threading.current_thread() is not threading.main_thread():
            traceback.print_stack()
            traceback.print_exc()
        raise


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.name().partition(".")[0]
    tensors = [t for t in _leaves_of((*args, *kwargs.values())) if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, PretendTensor)]
    _refuse(func, name, args, kwargs, here, tensors)
    if _watched is not None and (name in _SYNCHRONIZES or _leaves(name, args, kwargs, here)):
        _watched.waits += 1
    if name == "aten::copy_":
        if _watched is not None and isinstance(args[0], PretendTensor) and not isinstance(args[1], PretendTensor):
            _watched.sent += args[0].nbytes
        _bare(args[0]).copy_(_bare(args[1]))
        return args[0]
    bare_args, bare_kwargs = _mapped(_bare, args), {key: _mapped(_bare, value) for key, value in kwargs.items()}
    if "generator" in _writes(func)[1] and (here or _is_there(kwargs.get("device"))):
        bare_kwargs["generator"] = _module.random
    out = func(*bare_args, **bare_kwargs)
    _refuse_resized(name, here)
    if name == "aten::_to_copy":
        to = kwargs.get("device")
        return PretendTensor(out) if to is None or _is_there(to) else out
    if not here and not _is_there(kwargs.get("device")):
        return out
    if name in _EMPTY and out.dtype != torch.bool:
        out.fill_(float("nan") if out.is_floating_point() else 85)
    if name == "aten::_grouped_mm":
        _spoil_empty_groups(out, *bare_args[:2], bare_args[2] if len(bare_args) > 2 else bare_kwargs["offs"])
    back = {id(t.elem): t for t in here}
    return _mapped(lambda x: back[id(x)] if id(x) in back else _wrapped(x), out)


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """What is given to an operation or comes of it, nested as torch nests it, with every leaf changed."""
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(change, each) for each in x])
    return change(x)


def _leaves_of(values: Iterable[Any]) -> Iterator[Any]:
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from _leaves_of(x)
        else:
            yield x


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "pretend"


def _bare(x: Any) -> Any:
    if isinstance(x, PretendTensor):
        return x.elem
    return _CPU if isinstance(x, torch.device) and x.type == "pretend" else x


def _wrapped(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor) else x


def _leaves(name: str, args: Any, kwargs: dict[str, Any], here: list[PretendTensor]) -> bool:
    """Whether a copy goes from the device to the host, which waits for all that is under way."""
    if name == "aten::_to_copy":
        return bool(here) and kwargs.get("device") is not None and not _is_there(kwargs["device"])
    return name == "aten::copy_" and bool(here) and not isinstance(args[0], PretendTensor)


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions of the arguments that an operation writes to, and the names of all."""
    arguments = func._schema.arguments
    written = [at for at, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]
    return tuple(written), tuple(each.name for each in arguments)


# -- what a GPU refuses -----------------------------------------------------------------------------------------------


def _refuse(func: Any, name: str, args: Any, kwargs: Any, here: list[PretendTensor], tensors: list[Any]) -> None:
    generator = kwargs.get("generator")
    if generator is not None and (here or _is_there(kwargs.get("device"))):
        raise RuntimeError(f"Expected a 'pretend' device type for generator but found '{generator.device.type}'")
    if not here:
        return
    if name in _COPIES:
        if kwargs.get("non_blocking") and _leaves(name, args, kwargs, here):
            raise RuntimeError(f"{name}: a copy to the host with non_blocking is read before it arrives")
        return
    _refuse_types(func, name, here)
    asked = [args[0], *args[2:]] if name in _INDEXED else [*args, *kwargs.values()]
    numbers = {id(t) for t in tensors if t.dim() == 0}
    there = [t for t in _leaves_of(asked) if isinstance(t, torch.Tensor) and not isinstance(t, PretendTensor)]
    written, names = _writes(func)
    targets = [args[at] if at < len(args) else kwargs.get(names[at]) for at in written]
    crossed = [t for t in targets if isinstance(t, torch.Tensor) and not isinstance(t, PretendTensor)]
    if crossed or any(id(t) not in numbers for t in there) or (there and name in _INDEXED and there[0] is args[0]):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {NAME} and cpu")
    if name == "aten::_grouped_mm":
        for matrix in args[:2]:
            _refuse_layout(matrix)
        if (args[2] if len(args) > 2 else kwargs["offs"]).dtype != torch.int32:
            raise RuntimeError("Offsets have to be int32")


def _refuse_types(func: Any, name: str, here: list[PretendTensor]) -> None:
    moves = any(return_.alias_info is not None for return_ in func._schema.returns) or name in _EMPTY
    if not moves and name != "aten::clone" and any(t.dtype in _UNSIGNED for t in here):
        raise RuntimeError(f'"{name}" not implemented for unsigned integers of 16 bits and more')
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and name in _ADDED_UP and here[0].dtype.is_floating_point:
        raise RuntimeError(f"{name} does not have a deterministic implementation")


def _refuse_layout(matrix: torch.Tensor) -> None:
    """As torch's `check_valid_strides_and_return_transposed` has it on a device."""
    rows, columns = matrix.shape[-2:]
    down, across = matrix.stride()[-2:]
    if down == 1 and across >= max(1, rows):
        stride = across
    elif across == 1 and down >= max(1, columns):
        stride = down
    else:
        raise RuntimeError(f"Invalid strides/sizes, got {matrix.stride()} for strides and {matrix.shape} for sizes")
    elem: torch.Tensor = matrix.elem  # type: ignore[attr-defined]
    if elem.data_ptr() % 16:
        raise RuntimeError("expected data_ptr to be aligned to 16 bytes")
    if stride * matrix.element_size() % 16:
        raise RuntimeError("strides should be multiple of 16 bytes")


def _refuse_resized(name: str, here: list[PretendTensor]) -> None:
    for tensor in here:
        if tensor.elem.size() != tensor.size():
            raise RuntimeError(f"{name}: out= of shape {list(tensor.size())}, expected {list(tensor.elem.size())}")


def _spoil_empty_groups(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> None:
    bounds = [0, *ends.tolist()]
    if a.dim() == b.dim() == 2:
        for group, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if start == stop:
                out[group] = 7.0
    elif a.dim() == 2:
        out[bounds[-1] :] = float("nan")
