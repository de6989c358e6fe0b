"""Accuracy on tasks: the harness's own figures for the same model, run by transformers as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import numpy as np  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from strategies import by_night, picked  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.base.progress import Progress  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import Interrupted, PlanError  # noqa: E402
from shardxform.evaluation.evaluate import EvaluateOptions  # noqa: E402
from shardxform.evaluation.tasks import TaskOptions, accuracy, size_of_tasks  # noqa: E402
from shardxform.forward.weights import Precision  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
KEEP8 = Path(__file__).resolve().parents[1] / "manifests" / "small-moe-keep8.json"

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""
WHOLE = """
task: tiny_whole
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1}}
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: exact_match}}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and their documents; contexts repeat, and some choices are a single token."""
    root = tmp_path_factory.mktemp("tasks")
    texts = ["In the beginning God created", "def read(self, path):", "And the LORD said unto", "", "return self."]
    documents = [
        {
            "text": text,
            "choices": [" the heaven", " a", " Moses, saying", "\n    return None"][: 2 + at % 3],
            "answer": at % 2,
        }
        for at, text in enumerate(texts * 2)
    ]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, text in (("choices", CHOICES), ("whole", WHOLE), ("written", WRITTEN)):
        (root / f"{name}.yaml").write_text(text.format(data=root / "data.jsonl"))
    return root


def asked(files: Path, *names: str, limit: int | None = None) -> TaskOptions:
    return TaskOptions(names=names, files=files, limit=limit)


def wanted(model: Any, tokenizer: Any, files: Path, *names: str) -> dict[str, Any]:
    """What the harness says of a model of transformers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files), include_defaults=False)  # listing its own takes seconds
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = evaluator.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, log_samples=False)
    results: dict[str, Any] = found["results"]
    return results


def test_figures_are_those_of_the_harness_for_the_whole_model(small_moe: Path, files: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(small_moe, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_moe)
    results = wanted(model, tokenizer, files, "tiny_choices", "tiny_whole")
    found = accuracy(
        Checkpoint.open(small_moe),
        asked(files, "tiny_choices", "tiny_whole"),
        EvaluateOptions(precision=FLOAT32, work=tmp_path / "w"),
    )
    choices, whole = (found["results"][name]["metrics"] for name in ("tiny_choices", "tiny_whole"))
    for metric in ("acc", "acc_norm"):
        assert choices[metric]["value"] == results["tiny_choices"][f"{metric},none"]
        assert choices[metric]["standard_error"] == results["tiny_choices"][f"{metric}_stderr,none"]
    expected = results["tiny_whole"]["word_perplexity,none"]
    np.testing.assert_allclose(whole["word_perplexity"]["value"], expected, rtol=1e-5)
    assert found["results"]["tiny_choices"]["version"] == 3
    assert found["results"]["tiny_choices"]["documents"] == 10
    assert not (tmp_path / "w").exists()


def test_a_stopped_run_goes_on_and_finds_the_same(small_moe: Path, files: Path, tmp_path: Path) -> None:
    view = pruned_view(Checkpoint.open(small_moe), Manifest.load(KEEP8)).checkpoint
    tasks = asked(files, "tiny_choices", limit=4)
    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "one")
    whole = accuracy(view, tasks, options)
    assert whole["results"]["tiny_choices"]["documents"] == 4

    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    stopped = EvaluateOptions(precision=FLOAT32, work=tmp_path / "two", on_progress=stop)
    with pytest.raises(Interrupted, match="2 of 4 blocks are safe"):
        accuracy(view, tasks, stopped)
    done = json.loads((tmp_path / "two" / "tested-pairs" / "progress.json").read_bytes())["steps"]
    assert list(done) == ["embeddings", "block 0", "block 1"]
    seen: list[Progress] = []
    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "two", on_progress=seen.append)
    assert accuracy(view, tasks, options) == whole
    assert seen[-1].done == seen[-1].total
    assert seen[-1].resumed == seen[-1].total * 2 // 5


def test_what_tasks_take_is_known_without_the_model(small_moe: Path, files: Path) -> None:
    size = size_of_tasks(Checkpoint.open(small_moe), asked(files, "tiny_choices"))
    assert (size.requests, size.passes) == (3 * (2 + 3 + 4) + 2, 1)
    assert size.distinct == 18  # of 29: what reads the same is read once, whatever it is asked
    assert size.tokens > 0


@pytest.mark.parametrize(
    ("name", "message"),
    picked(  # the harness takes seconds to list all tasks of its own
        [
            ("tiny_written", "tiny_written has the model write text"),
            ("no_such_task", "'no_such_task' is no task of lm-evaluation-harness"),
        ],
        2,
    ),
)
def test_what_cannot_be_measured_is_refused(
    name: str, message: str, small_moe: Path, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        size_of_tasks(Checkpoint.open(small_moe), asked(files, name))
    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "w")
    with pytest.raises(PlanError, match=message):
        accuracy(Checkpoint.open(small_moe), asked(files, name), options)


def test_a_card_tells_of_tasks_and_of_their_reference(small_moe: Path, files: Path, tmp_path: Path) -> None:
    def call(*words: object) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    call("prune", small_moe, tmp_path / "out", "-m", KEEP8, "-q")
    words = ["evaluate", tmp_path / "out", "--against", small_moe, "--tasks", "tiny_choices", "--task-files", files]
    words += ["--work", tmp_path / "w", "--dtype", "float32"]
    told = call(*words, "--json", "--plot", tmp_path / "tasks.png")
    metrics = json.loads(told)["tasks"]["results"]["tiny_choices"]["metrics"]
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "tasks.json").write_text(told)
    card = call("card", tmp_path / "out", "--evaluation", tmp_path / "tasks.json")
    line = next(line for line in card.splitlines() if "`acc_norm`" in line)
    value, reference = metrics["acc_norm"]["value"], metrics["acc_norm"]["reference"]
    error = metrics["acc_norm"]["difference_standard_error"]
    assert f"| `tiny_choices` | 0 | 10 | `acc_norm` | {value:.4f} ±" in line
    assert line.endswith(f"| {reference:.4f} | {value - reference:+.4f} ± {error:.4f} |")
    assert "The reference is the checkpoint that this one was made from" in card
    assert "not benchmarked on tasks" not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", 3, "--data", "x"], "--limit is of tasks: give --tasks"),
        (["--tasks", "a", "--data", "x"], "--data is of text, and --tasks bring their own"),
        (["--tasks", ","], "--tasks: expected names, found none"),
    ],
)
def test_options_that_say_nothing_are_refused(words: list[object], message: str, small_moe: Path) -> None:
    result = CliRunner().invoke(main, ["evaluate", str(small_moe), *map(str, words)])
    assert result.exit_code == 2
    assert message in result.output


@by_night
def test_a_model_in_gguf_is_asked_with_the_tokenizer_of_its_source(
    files: Path, small_moe: Path, tmp_path: Path
) -> None:
    source, out = str(small_moe), str(tmp_path / "out")
    assert CliRunner().invoke(main, ["quantize", source, out, "--format", "gguf", "-q"]).exit_code == 0
    twin = str(tmp_path / "twin")
    assert CliRunner().invoke(main, ["quantize", source, twin, "--group-size", "32", "-q"]).exit_code == 0
    found = []
    for each in (out, twin):
        told = ["--tasks", "tiny_choices", "--task-files", str(files), "--limit", "3", "--json", "-q"]
        result = CliRunner().invoke(
            main, ["evaluate", each, "--against", source, "--work", str(tmp_path / "work"), *told]
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["tasks"]["results"]["tiny_choices"]["metrics"])
    assert found[0] == found[1]
