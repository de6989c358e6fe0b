"""Accuracy on tasks: lm-evaluation-harness with a checkpoint that is run block by block as its model.

The harness makes the requests and judges the answers; here all requests of a kind go through the blocks in one pass
over the weights, so what fits into no memory, or a pruning that nobody wrote yet, is measured like anything else.
Requests are pairs of a context and a continuation, of which the log-likelihood is wanted. Text that the model is to
write itself takes a pass over all weights for every token: tasks that ask for it are refused.
"""

# N: requests, T: tokens, n: tokens of a continuation, V: vocabulary.

from __future__ import annotations

import abc
import contextlib
import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lm_eval import __version__ as harness_version
from lm_eval import evaluator
from lm_eval.api import model as harness_model
from lm_eval.api import task as harness_task
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from shardxform.base import interrupts
from shardxform.base.strict_json import dumps
from shardxform.calibration import Windows
from shardxform.calibration.tokens import Tokenizer, load_tokenizer
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, Interrupted, PlanError
from shardxform.evaluation.evaluate import EvaluateOptions
from shardxform.forward.passes import Batch, Pass, batches, pass_inputs, run_pass, tokens_of_pass
from shardxform.forward.runtime import on_device
from shardxform.forward.skeleton import OutputHead, Skeleton
from shardxform.forward.weights import Observer, Weights
from shardxform.forward.work import HiddenReader, WorkDir, refuse_inside

__all__ = ["TaskOptions", "TaskSize", "accuracy", "size_of_tasks"]

_CHAIN: Final = "tasks"
_TESTED: Final = "tested"
_REFERENCE: Final = "reference"
_LENGTHS: Final = ("n_positions", "max_position_embeddings", "n_ctx")  # keys of configs, in the harness's order
_DEFAULT_LENGTH: Final = 2048
_NO_LENGTH: Final = 1 << 60  # what a tokenizer says that knows none is beyond it

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""A request: its texts, the tokens of its context, the tokens of its continuation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Which tasks, and how much of them.

    Attributes:
        names: tasks or groups of the harness, or of `files`.
        limit: documents of each task; None for all.
        shots: examples put before each document; None for what the task says.
        files: directory of task files beside the harness's own.

    """

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    files: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSize:
    """What tasks ask for: requests, those that differ, their tokens, and passes over the weights."""

    requests: int
    distinct: int
    tokens: int
    passes: int


def accuracy(
    checkpoint: Checkpoint,
    tasks: TaskOptions,
    options: EvaluateOptions,
    against: Checkpoint | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on tasks, and its reference if one is given; goes on where an earlier run stopped.

    Args:
        checkpoint: what is measured.
        tasks: which, and how much of them.
        options: how it is computed.
        against: a reference.
        tokenizer: folder of the checkpoint's tokenizer, where that does not lie beside it.

    Returns:
        plain data: for each task its metrics with their standard errors, version, shots and documents; and the harness.
        With a reference also its value, and the standard error of the difference, from those of the documents.

    Raises:
        PlanError: no such task, or one that has the model write text.
        FamilyError, SchemeError, CheckpointError: the checkpoint cannot be run.
        OutputError: the work directory is foreign, in the checkpoint, in use, or on too small a disk.
        ExecutionError: the model gives no finite numbers, or the disk failed.
        Interrupted: every finished block is durable; the same call goes on.

    """
    refuse_inside(options.work, [checkpoint.root, *([against.root] if against else [])])
    models = {_TESTED: _BlockModel(checkpoint, tokenizer or checkpoint.root, options, _TESTED)}
    if against is not None:
        models[_REFERENCE] = _BlockModel(against, against.root, options, _REFERENCE)
    found = {name: _run(model, tasks) for name, model in models.items()}
    for model in models.values():
        model.remove_work()
    return _facts(found, tasks)


def size_of_tasks(checkpoint: Checkpoint, tasks: TaskOptions, tokenizer: Path | None = None) -> TaskSize:
    """Find what tasks would take, without running the model; `tokenizer` as for `accuracy`.

    Raises:
        PlanError: as `accuracy`.
        CheckpointError: the tokenizer does not fit.

    """
    model = _Counting(checkpoint, tokenizer or checkpoint.root)
    _run(model, tasks)
    return TaskSize(
        requests=model.requests,
        distinct=sum(len(windows.ids_NT) for windows in model.windows),
        tokens=sum(map(tokens_of_pass, model.windows)),
        passes=len(model.windows),
    )


def _run(model: TemplateLM, tasks: TaskOptions) -> Mapping[str, Any]:
    """Have the harness ask and judge."""
    manager = _manager(tasks)
    with _without_bars():
        found = evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks.names),
            num_fewshot=tasks.shots,
            limit=tasks.limit,
            task_manager=manager,
            log_samples=True,
            verbosity="ERROR",
        )
    assert found is not None
    return dict(found)


def _manager(tasks: TaskOptions) -> Any:  # noqa: ANN401
    """The harness's list of tasks; its own take seconds to list, and only what is named is wanted.

    Raises:
        PlanError: one is in no list.

    """
    if tasks.files:
        manager = TaskManager(include_path=str(tasks.files), include_defaults=False)
        if all(name in manager.all_tasks for name in tasks.names):
            return manager
    manager = TaskManager(include_path=str(tasks.files) if tasks.files else None)
    if unknown := [name for name in tasks.names if name not in manager.all_tasks]:
        raise PlanError(f"`tasks`: {unknown[0]!r} is no task of lm-evaluation-harness {harness_version}")
    return manager


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the harness from drawing bars of its own: it has no switch for those of making requests."""
    modules = (harness_task, harness_model)
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = lambda each, **_: each
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


# -- figures ----------------------------------------------------------------------------------------------------------


def _facts(found: Mapping[str, Mapping[str, Any]], tasks: TaskOptions) -> dict[str, Any]:
    tested, reference = found[_TESTED], found.get(_REFERENCE)
    out: dict[str, Any] = {}
    for name, metrics in tested["results"].items():
        other = dict(_metrics(reference["results"][name])) if reference else {}
        out[name] = {
            "metrics": {
                metric: {**each, **_compared(metric, other, _samples(tested, name), _samples(reference, name))}
                for metric, each in _metrics(metrics)
            },
            "version": tested["versions"].get(name),
            "shots": tested["n-shot"].get(name),
            "documents": tested["n-samples"].get(name, {}).get("effective"),
        }
    return {"harness": f"lm-evaluation-harness {harness_version}", "limit": tasks.limit, "results": out}


def _metrics(found: Mapping[str, object]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Metric -> value and standard error, under the names `acc`, or `acc, filter` where answers were filtered."""
    for key, value in found.items():
        metric, _, chain = key.partition(",")
        if not isinstance(value, int | float) or not chain or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{chain}")
        known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        yield (metric if chain == "none" else f"{metric}, {chain}"), {"value": float(value), "standard_error": known}


def _samples(found: Mapping[str, Any] | None, task: str) -> list[Mapping[str, Any]]:
    """What the harness keeps of every document of a task; nothing of a group."""
    return found.get("samples", {}).get(task, []) if found else []


def _compared(
    metric: str,
    other: Mapping[str, Mapping[str, float | None]],
    tested: Sequence[Mapping[str, object]],
    reference: Sequence[Mapping[str, object]],
) -> dict[str, float | None]:
    """The reference's value, and the mean difference over the documents, which vary together, with its error."""
    if metric not in other:
        return {}
    key = metric.partition(", ")[0]
    pairs = [(mine.get(key), its.get(key)) for mine, its in zip(tested, reference, strict=False)]
    differences = [float(a) - float(b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    error = None
    if len(differences) == len(tested) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {"reference": other[metric]["value"], "difference_standard_error": error}


# -- the model as the harness sees it ---------------------------------------------------------------------------------


class _Asked(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Texts as tokens, as the harness's own model of transformers has them; requests answered all at once."""

    backend = "causal"

    def __init__(self, checkpoint: Checkpoint, tokenizer: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self._tokenizer: Tokenizer = load_tokenizer(tokenizer)
        self.tokenizer = self._tokenizer.inner

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        return self.checkpoint.where.replace("/", "__")

    @property
    def max_length(self) -> int:
        config = self.checkpoint.config.get("text_config") or self.checkpoint.config
        if found := [config[key] for key in _LENGTHS if isinstance(config.get(key), int)]:
            return int(found[0])
        most = getattr(self.tokenizer, "model_max_length", None)
        return int(most) if isinstance(most, int) and most < _NO_LENGTH else _DEFAULT_LENGTH

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            how = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **how))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Whole texts, cut into windows of which every token is told once."""
        pieces: list[Encoded] = []
        counts: list[int] = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(("", ""), *make_disjoint_window(each)) for each in cut]
            pieces += found
            counts.append(len(found))
        told = iter(self._answers(pieces, "rolling"))
        return [math.fsum(next(told)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[object], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        name = getattr(requests[0], "task_name", None) if requests else None
        raise PlanError(
            f"`tasks`: {name or 'one of them'} has the model write text, which takes a pass over all weights for every"
            " token; choose tasks that compare answers"
        )

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: object) -> list[tuple[float, bool]]:
        return self._answers(requests, "pairs")

    @abc.abstractmethod
    def _answers(self, requests: Sequence[Encoded], kind: str) -> list[tuple[float, bool]]:
        """What is asked of each request: its log-likelihood, and whether its tokens are the likeliest."""

    def _gathered(self, requests: Sequence[Encoded]) -> _Gathered:
        return _gather(requests, self.max_length, self._tokenizer.sha256)


class _Counting(_Asked):
    """Counts what it is asked, and answers anything."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Path) -> None:
        super().__init__(checkpoint, tokenizer)
        self.requests = 0
        self.windows: list[Windows] = []

    def _answers(self, requests: Sequence[Encoded], kind: str) -> list[tuple[float, bool]]:  # noqa: ARG002
        self.requests += len(requests)
        if requests:
            self.windows.append(self._gathered(requests).windows)
        return [(-1.0, False)] * len(requests)


class _BlockModel(_Asked):
    """A checkpoint, run block by block over all requests of a kind."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Path, options: EvaluateOptions, name: str) -> None:
        super().__init__(checkpoint, tokenizer)
        self._options = options
        self._name = name
        self._done: list[tuple[Path, dict[str, Any]]] = []

    def remove_work(self) -> None:
        """Remove the hidden states and answers of all kinds, when the result is known."""
        for place, inputs in self._done:
            with WorkDir(place, inputs) as work:
                work.remove()
        with contextlib.suppress(OSError):  # another's, or the other model's
            self._options.work.rmdir()

    def _answers(self, requests: Sequence[Encoded], kind: str) -> list[tuple[float, bool]]:
        if not requests:
            return []
        asked = self._gathered(requests)
        options = self._options
        place = options.work / f"{self._name}-{kind}"
        options.work.mkdir(exist_ok=True)
        inputs = pass_inputs("tasks", {_CHAIN: self.checkpoint}, asked.windows, options.precision)
        self._done.append((place, inputs))
        with on_device(options.precision.device), Weights(self.checkpoint, options.precision) as weights:
            skeleton = Skeleton(weights)
            skeleton.refuse_longer(asked.windows)
            weights.check()
            with WorkDir(place, inputs) as work:
                job = Pass(asked.windows, {_CHAIN: skeleton}, work, options.on_progress, tokens_of_pass(asked.windows))
                run_pass(job, _Blind())
                told = _run_head(job, skeleton, asked)
        return [told[at] for at in asked.where]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Requests as rows of tokens, each once, long ones first.

    Attributes:
        windows: their tokens but for the last, which only is predicted.
        wanted: of each row what is asked: pairs of first position that predicts, and the tokens it must predict.
        where: of each request its row, and which of what is asked of that.

    """

    windows: Windows
    wanted: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    where: tuple[tuple[int, int], ...] = field(repr=False)


def _gather(requests: Sequence[Encoded], most: int, tokenizer: str) -> _Gathered:
    """Cut requests to what the model can read, and put together those that read the same."""
    rows: dict[tuple[int, ...], dict[tuple[int, tuple[int, ...]], None]] = {}
    places: list[tuple[tuple[int, ...], tuple[int, tuple[int, ...]]]] = []
    for _, context, continuation in requests:
        read = tuple((context + continuation)[-(most + 1) :][:-1])
        asked = (len(read) - len(continuation), tuple(continuation))
        if not continuation or asked[0] < 0:
            raise PlanError(f"`tasks`: a continuation of {len(continuation)} tokens; the model reads {most} at a time")
        rows.setdefault(read, {})[asked] = None
        places.append((read, asked))
    order = sorted(rows, key=lambda read: (-len(read), read))
    number = {read: at for at, read in enumerate(order)}
    which = {read: {asked: at for at, asked in enumerate(found)} for read, found in rows.items()}
    ids_NT = np.zeros((len(order), max(map(len, order))), np.int32)
    for at, read in enumerate(order):
        ids_NT[at, : len(read)] = read
    wanted = tuple(tuple(rows[read]) for read in order)
    return _Gathered(
        windows=Windows(
            ids_NT=ids_NT,
            fingerprint=_fingerprint(ids_NT, wanted),
            provenance={"tokenizer": tokenizer},
            notes=(),
            lengths=tuple(map(len, order)),
        ),
        wanted=wanted,
        where=tuple((number[read], which[read][asked]) for read, asked in places),
    )


def _fingerprint(ids_NT: NDArray[np.int32], wanted: object) -> str:
    digest = hashlib.sha256(dumps([ids_NT.shape, wanted]).encode())
    digest.update(ids_NT.astype("<i4").tobytes())
    return digest.hexdigest()


class _Blind:
    """A visitor that looks at nothing."""

    def begin(self, layer: int) -> None: ...

    def after(self, hidden: Mapping[str, torch.Tensor]) -> None: ...

    def observer(self, chain: str) -> Observer | None:  # noqa: ARG002
        return None

    def facts(self) -> dict[str, float]:
        return {}


# -- the output head ---------------------------------------------------------------------------------------------------


def _run_head(job: Pass, skeleton: Skeleton, asked: _Gathered) -> dict[tuple[int, int], tuple[float, bool]]:
    """What is asked of every row: the log-likelihood, and whether each token is the likeliest; batch by batch."""
    steps = {f"head {batch.start}": batch for batch in batches(job.windows)}
    try:
        with interrupts.deferred(), torch.no_grad(), contextlib.ExitStack() as stack:
            if any(name not in job.work.steps for name in steps):
                head = stack.enter_context(skeleton.head(None))
                reader = stack.enter_context(job.hidden(_CHAIN, job.num_blocks).reading())
            for name, batch in steps.items():
                resumed = name in job.work.steps
                if not resumed:
                    job.work.record(name, {"told": _told(batch, head, reader, asked)})
                job.progressed(batch.ids_BT.numel(), resumed=resumed)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"stopped: all {job.num_blocks} blocks are safe in {job.work.root}; run the same command again to go on"
        ) from e
    out: dict[tuple[int, int], tuple[float, bool]] = {}
    for name in steps:
        for row, at, likelihood, likeliest in job.work.steps[name]["told"]:
            out[int(row), int(at)] = (float(likelihood), bool(likeliest))
    return out


def _told(batch: Batch, head: OutputHead, reader: HiddenReader, asked: _Gathered) -> list[list[float | bool]]:
    out: list[list[float | bool]] = []
    for row in range(batch.start, batch.stop):
        interrupts.check()
        length = asked.windows.lengths[row]
        first = min(at for at, _ in asked.wanted[row])
        hidden_TH = reader.rows(row, row + 1, length)[0]
        logp_nV = head.logits(hidden_TH[first:]).float().log_softmax(-1)
        for number, (at, tokens) in enumerate(asked.wanted[row]):
            part_nV = logp_nV[at - first :]
            tokens_n = torch.tensor(tokens, device=part_nV.device)
            likelihood = float(part_nV.gather(-1, tokens_n[:, None]).sum())
            if not math.isfinite(likelihood):
                raise ExecutionError(f"output head: the log-likelihood of request {row} is {likelihood}")
            out.append([row, number, likelihood, bool((part_nV.argmax(-1) == tokens_n).all())])
    return out
