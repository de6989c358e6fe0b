"""A connection to a Ray cluster: one of this machine alone, or one that is running. Owns it, and closes it.

Everything that can be wrong with it is said on one line. Ray is imported here, and only when a session is opened.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from shardxform.cluster.worker import with_families
from shardxform.errors import ExecutionError, PlanError
from shardxform.model.families import in_use
from shardxform.model.family_files import carried

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["LOCAL", "Needs", "Session", "check_address"]

LOCAL: Final = "local"
_RUNNING: Final = "auto"
_ADDRESS: Final = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_REACHED_WITHIN: Final = 10.0  # seconds
_OBJECTS: Final = 128 << 20  # bytes of Ray's object store: steps and their facts are small
_TRIES: Final = 8  # workers and machines that may die under one task
_GRAIN: Final = 64 << 20  # memory is asked for in multiples of it: Ray keeps workers apart by what they asked for
_LOOK_AGAIN: Final = 5.0  # seconds after which the machines are counted anew
_NO_HANDLER: Final = "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"
_UNIMPORTED: Final = "failed to import on the worker"  # what Ray says of a function whose module a worker lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one task is promised by the machine it runs on; memory in bytes."""

    memory: int
    gpus: int = 0
    cpus: int = 1

    def options(self) -> dict[str, Any]:
        """The same as Ray's options."""
        memory = math.ceil(self.memory / _GRAIN) * _GRAIN
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": memory}

    def fit(self, has: Mapping[str, float]) -> int:
        """How many of such tasks a machine with these resources holds."""
        wanted = self.options()
        pairs = (("CPU", "num_cpus"), ("GPU", "num_gpus"), ("memory", "memory"))
        return min(int(has.get(theirs, 0) // wanted[ours]) for theirs, ours in pairs if wanted[ours])


def check_address(text: str) -> str:
    """Return the address of a cluster as it was given.

    Raises:
        PlanError: no address.

    """
    if text in (LOCAL, _RUNNING) or _ADDRESS.fullmatch(text):
        return text
    raise PlanError(f"`ray`: expected HOST:PORT, {_RUNNING} or nothing, found {text!r}")


class Session:
    """A connection; use as a context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._ray: Any = None
        self._refs: dict[Future[Any], Any] = {}
        self._functions: dict[Callable[..., Any], Any] = {}
        self._nodes: list[Mapping[str, float]] = []
        self._looked = -math.inf

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def open(self) -> None:
        """Connect, or start a cluster of this machine.

        Raises:
            PlanError: ray is not installed.
            ExecutionError: no cluster answers there, or none could be started; or this process has a connection, whose
                end would end the work of others.

        """
        if self._ray is not None:
            return
        if find_spec("ray") is None:
            raise PlanError("`ray` needs ray: pip install 'shardxform[ray]'")
        _refuse_silent(self.address)
        os.environ.setdefault(_NO_HANDLER, "1")  # of its core, which prints a stack; looked at when it is imported
        import ray

        # What befalls workers would be printed to stdout, amid the result; there is no public switch.
        private: Any = ray
        with contextlib.suppress(AttributeError):
            private._private.worker._worker_logs_enabled = False
        if ray.is_initialized():
            raise ExecutionError("`ray`: this process is connected to Ray already: run ray.shutdown() first")
        self._init(ray)
        self._ray = ray

    def _init(self, ray: Any) -> None:  # noqa: ANN401
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address == LOCAL:
            options |= {"include_dashboard": False, "object_store_memory": _OBJECTS}
        try:
            with _own_signals(ray):
                ray.init(self.address, **options)
        except Exception as e:  # whatever it is: no address, no right, another version of Ray or of Python
            if self.address == LOCAL:
                raise ExecutionError(f"`ray`: cannot start Ray here: {_first_line(e)}") from e
            raise ExecutionError(
                f"`ray`: no Ray cluster answers at {self.address}, or it wants a token (RAY_AUTH_MODE=token):"
                f" {_first_line(e)}"
            ) from e

    # -- machines -----------------------------------------------------------------------------------------------

    def slots(self, needs: Needs) -> int:
        """How many such tasks run at once, as things are."""
        return sum(needs.fit(node) for node in self._machines())

    def refuse_too_large(self, needs: Needs) -> None:
        """Refuse a task that would wait for ever.

        Raises:
            ExecutionError: says what it needs and what there is.

        """
        if self.slots(needs):
            return
        nodes = self._machines()
        largest = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in ("CPU", "GPU", "memory")}
        raise ExecutionError(
            f"`ray`: a step takes {_show(needs.cpus, needs.gpus, needs.memory)}; of {len(nodes)} machines no one has"
            f" that, the most there is are {_show(largest['CPU'], largest['GPU'], largest['memory'])}"
        )

    def _machines(self) -> list[Mapping[str, float]]:
        """Resources of the machines that are alive; counted anew every few seconds, since they come and go."""
        if time.monotonic() - self._looked > _LOOK_AGAIN:
            self._nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()
        return self._nodes

    # -- tasks --------------------------------------------------------------------------------------------------

    def put(self, value: bytes) -> Any:  # noqa: ANN401
        """Give the cluster what many tasks take: a reference that stands for it among their arguments."""
        return self._ray.put(value)

    def submit(self, function: Callable[..., object], needs: Needs, *args: object) -> Any:  # noqa: ANN401
        """Have a `worker.reporting` function of a `wanted` run: a reference, which may be an argument of other tasks.

        It is run again when the worker or its machine dies, and never for an error of its own.
        """
        if families := carried(in_use()):
            function, args = with_families, (families, function, *args)
        if function not in self._functions:
            self._functions[function] = self._ray.remote(function)
        options = {**needs.options(), "max_retries": _TRIES, "retry_exceptions": False}
        return self._functions[function].options(**options).remote(*args)

    def future(self, ref: ObjectRef[object]) -> Future[Any]:
        """The result of what was submitted, or its error, or what befell the worker as an `ExecutionError`."""
        future: Future[Any] = Future()
        self._refs[future] = ref
        ref.future().add_done_callback(partial(self._settle, future))
        return future

    def stop(self) -> None:
        """Give up everything that is not done, and disconnect: futures fail, and the cluster ends their workers.

        `ray.cancel` is not used: when a task ends just then, it aborts this process (ray-project/ray#54738; seen in
        2.60).
        """
        for future in list(self._refs):
            with contextlib.suppress(InvalidStateError):  # done meanwhile
                future.set_exception(ExecutionError("stopped"))
        if self._ray is not None and self._ray.is_initialized():
            self._ray.shutdown()

    def _settle(self, future: Future[Any], theirs: Future[Any]) -> None:
        error = theirs.exception()
        with contextlib.suppress(InvalidStateError):  # given up meanwhile
            if error is not None:
                future.set_exception(self._told(error))
            else:
                value, error = theirs.result()
                future.set_exception(error) if error is not None else future.set_result(value)
        self._refs.pop(future, None)

    def _told(self, error: BaseException) -> BaseException:
        """What befell a worker, or one that a task came after, on one line; an error in the program stays as it is."""
        task_error: type[Exception] = self._ray.exceptions.RayTaskError
        theirs: type[Exception] = self._ray.exceptions.RayError
        cause = getattr(error, "cause", None)
        if isinstance(error, task_error) and not isinstance(cause, theirs):
            if _UNIMPORTED in str(error):
                return ExecutionError(
                    "`ray`: a worker has no shardxform, or another: install the same on every machine"
                )
            return error
        return ExecutionError(
            f"`ray`: a worker failed for good, after {_TRIES} more tries: {type(cause or error).__name__}:"
            f" {_first_line(cause or error)}; run the same command again to go on"
        )


def _show(cpus: float, gpus: float, memory: float) -> str:
    graphics = f", {gpus:g} GPU" if gpus else ""
    return f"{cpus:g} CPU{graphics} and {memory / 1e9:.2f} GB"


def _refuse_silent(address: str) -> None:
    """Refuse an address where nothing listens: Ray would try for a minute.

    Raises:
        ExecutionError: names it.

    """
    if (found := _ADDRESS.fullmatch(address)) is None:
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), _REACHED_WITHIN).close()
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ExecutionError(f"`ray`: no Ray cluster answers at {address}: {reason}") from e


@contextlib.contextmanager
def _own_signals(ray: object) -> Iterator[None]:
    """Keep what SIGTERM does here, in which Ray would have it raise SystemExit; there is no public switch."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, setter = signal.getsignal(signal.SIGTERM), "set_sigterm_handler"
    utils: Any = getattr(getattr(ray, "_private", None), "utils", None)
    theirs = getattr(utils, setter, None)
    if theirs:
        setattr(utils, setter, lambda _handler: None)
    try:
        yield
    finally:
        if theirs:
            setattr(utils, setter, theirs)
        signal.signal(signal.SIGTERM, before)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
