"""The whole way in one command: what it gives equals the separate commands', however often it is stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner, Result
from faults import Counting, Failing, die_at_effect, forked, kill_when_there
from smaller import smaller
from strategies import picked
from test_quantize import KIND_SIZES
from test_verify_independent import found as second_opinion
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardxform.__main__ import entry  # noqa: E402
from shardxform.base.progress import Progress  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.compress import (  # noqa: E402
    CompressOptions,
    Outcome,
    Prepared,
    Pruning,
    Request,
    compress,
    forecast,
    plan_compress,
)
from shardxform.compress.folder import ResultsFolder, read_stages  # noqa: E402
from shardxform.compress.request import weights_of  # noqa: E402
from shardxform.errors import ExecutionError, Interrupted, OutputError, PlanError, ResumeError  # noqa: E402
from shardxform.formats.scheme import Grid, Scheme  # noqa: E402
from shardxform.forward.weights import Precision  # noqa: E402
from shardxform.tuning import session  # noqa: E402

pytestmark = pytest.mark.oracle

STAGES = ("score", "select", "quantize", "verify", "evaluate", "card")
RESULTS = {"compress.json", "evaluation.json", "keep.json", "lock", "saliency.safetensors"}


@pytest.fixture(scope="session")
def small_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smaller checkpoint with a few texts: all that are given are read and tokenized in every command."""
    copy = tmp_path_factory.mktemp("small") / "small-moe"
    shutil.copytree(smaller(), copy)
    (copy / "text").mkdir()
    for name in ("calib.jsonl", "heldout.jsonl"):
        shutil.copyfile(few(name), copy / "text" / name)
    return copy


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(source: Path, *more: str, evaluated: bool = True) -> list[str]:
    text = ["--data", str(source / "text/calib.jsonl"), "--samples", "4", "--seqlen", "64"]
    tuned = ["--iters", "2"]
    held_out = ["--eval-data", str(source / "text/heldout.jsonl"), "--eval-samples", "2", "--eval-seqlen", "64"]
    return ["--keep", "4", *text, *tuned, *(held_out if evaluated else []), *more]


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def request_of(source: Path, out: Path, *more: str) -> Request:
    """What the command line asks of the library."""
    found: list[Request] = []

    def stop(request: Request, **_: Any) -> Prepared:
        found.append(request)
        raise Interrupted("that is all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardxform.compress.request.plan_compress", stop)
        invoke("compress", source, out, *arguments(source), *more)
    return found[0]


def done(*args: str | Path) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str | Path) -> str:
    result = invoke(*args)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return result.output


def tree(out: Path) -> dict[str, bytes]:
    """Every file of an output and of its results."""
    roots = {"out": out, "results": out.with_name(out.name + ".compress")}
    return {
        f"{name}/{p.relative_to(root)}": p.read_bytes()
        for name, root in roots.items()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def prepared(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A request with its data read; `at` moves it."""
    return plan_compress(request_of(small_moe, tmp_path_factory.mktemp("prepared") / "out"))


def at(prepared: Prepared, out: Path, **changes: Any) -> Prepared:
    return replace(prepared, request=replace(prepared.request, out=out, **changes))


def run(prepared: Prepared, out: Path, **settings: Any) -> Outcome:
    return compress(at(prepared, out), CompressOptions(**settings))


@pytest.fixture(scope="module")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run gives. Read only."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "out"
    run(prepared, out)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished output that a test may change."""
    for suffix in ("", ".compress"):
        shutil.copytree(f"{finished}{suffix}", tmp_path / f"out{suffix}")
    return tmp_path / "out"


# -- what comes of it -------------------------------------------------------------------------------------------------


def test_it_gives_what_the_separate_commands_give(small_moe: Path, finished: Path, tmp_path: Path) -> None:
    calib = ["--data", small_moe / "text/calib.jsonl", "--samples", "4", "--seqlen", "64"]
    done("score", small_moe, "-o", tmp_path / "s", *calib)
    done("select", tmp_path / "s", "--keep", "4", "-o", tmp_path / "keep.json")
    tuned = ["--method", "auto-round", "--iters", "2", *calib]
    done("quantize", small_moe, tmp_path / "out", "-m", tmp_path / "keep.json", *tuned)
    held_out = ["--data", small_moe / "text/heldout.jsonl", "--samples", "2", "--seqlen", "64"]
    work = ["--work", tmp_path / "w"]
    evaluation = json.loads(done("evaluate", tmp_path / "out", "--against", small_moe, *held_out, *work, "--json"))
    files = tree(finished)
    assert files["results/saliency.safetensors"] == (tmp_path / "s").read_bytes()
    assert files["results/keep.json"] == (tmp_path / "keep.json").read_bytes()
    separate = tree(tmp_path / "out")
    assert {name: files[name] for name in separate} == separate
    ours = json.loads(files["results/evaluation.json"])
    assert {key: ours[key] for key in ("perplexity", "windows", "tokens", "data", "against")} == {
        key: evaluation[key] for key in ("perplexity", "windows", "tokens", "data", "against")
    }
    assert {name.removeprefix("results/") for name in files if name.startswith("results/")} == RESULTS
    assert set(files) - set(separate) - {f"results/{name}" for name in RESULTS} == {"out/README.md"}
    assert "`calib.jsonl`" in files["out/README.md"].decode()
    assert second_opinion(finished, small_moe) == []


@pytest.mark.parametrize(
    ("capabilities", "asked", "tuned"),
    [
        ({"avx512_bf16": True}, None, torch.bfloat16),
        ({"amx_bf16": True}, "auto", torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, None, torch.float32),
        ({"avx512_bf16": True}, "float32", torch.float32),
    ],
)
def test_a_cpu_tunes_in_bfloat16_if_it_multiplies_it_and_measures_in_float32(
    monkeypatch: pytest.MonkeyPatch, small_moe: Path, capabilities: dict[str, bool], asked: str | None, tuned: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    more = ["--dtype", asked] if asked else []
    request = request_of(small_moe, Path("out"), *more)
    assert request.precision == Precision(torch.device("cpu"), torch.float32)
    assert request.tuned_in == Precision(torch.device("cpu"), tuned)


def test_a_finished_run_is_found_complete_and_nothing_is_written(small_moe: Path, copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.parent.rglob("*.*")}
    result = invoke("compress", small_moe, copied, *arguments(small_moe))
    assert result.exit_code == 0, result.output
    assert "already complete, made from the same inputs; nothing written" in result.stdout
    assert re.search(r"\n  tuned +squared error [\d.]+% of that of rounding, over 2 blocks\n", result.stdout)
    assert re.search(r"\n  time +[\d.]+ s in this run\n", result.stdout)
    assert [line for line in result.stderr.splitlines() if line.startswith("[")] == [
        f"[{number}/6] {stage}: done already" for number, stage in enumerate(STAGES, 1)
    ]
    assert {path: path.stat().st_mtime_ns for path in copied.parent.rglob("*.*")} == before


def test_without_data_it_quantizes_and_verifies(small_moe: Path, tmp_path: Path) -> None:
    rounded = ["--method", "rtn", "--format", "gptq"]
    unpruned = "experts  all 8 of each layer stay, top-2: nothing is pruned without --keep or --ratio\n"
    assert unpruned in done("compress", small_moe, tmp_path / "out", *rounded, "--dry-run")
    out = json.loads(done("compress", small_moe, tmp_path / "out", *rounded, "--json", "-q"))
    assert out["made"] == ["quantize", "verify", "card"]
    assert "all 8 of each layer: nothing was pruned\n" in done("compress", small_moe, tmp_path / "out", *rounded)
    done("quantize", small_moe, tmp_path / "separate", "--format", "gptq")
    files = {name: data for name, data in tree(tmp_path / "out").items() if name.startswith("out/")}
    assert files.pop("out/README.md")
    assert files == tree(tmp_path / "separate")
    assert second_opinion(tmp_path / "out", small_moe) == []


def test_it_heals_as_quantize_does(small_moe: Path, finished: Path, tmp_path: Path) -> None:
    heal = ["--method", "rtn", "--heal", "shared", "--heal-iters", "2", "--heal-lr", "0.02", "--batch-size", "2"]
    calib = ["--data", small_moe / "text/calib.jsonl", "--samples", "4", "--seqlen", "64"]
    done("compress", small_moe, tmp_path / "out", "--keep", "4", *calib, *heal, "-q")
    keep = finished.with_name("out.compress") / "keep.json"
    done("quantize", small_moe, tmp_path / "separate", "-m", keep, *calib, *heal, "-q")
    shard = "model.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "separate" / shard).read_bytes()
    assert second_opinion(tmp_path / "out", small_moe) == []
    assert "give --keep or --ratio" in refused("compress", small_moe, tmp_path / "o", "--heal", *calib)


def test_a_ratio_is_recorded_as_select_does(small_moe: Path, finished: Path, tmp_path: Path) -> None:
    data = ["--data", small_moe / "text/calib.jsonl", "--samples", "4", "--seqlen", "64"]
    tuned = ["--iters", "2", "-q"]
    done("compress", small_moe, tmp_path / "out", "--ratio", "0.25", "--criterion", "ean", *data, *tuned)
    saliency = finished.with_name("out.compress") / "saliency.safetensors"
    done("select", saliency, "--ratio", "0.25", "--criterion", "ean", "-o", tmp_path / "keep.json")
    assert (tmp_path / "out.compress/keep.json").read_bytes() == (tmp_path / "keep.json").read_bytes()
    assert Checkpoint.open(tmp_path / "out").config["num_experts"] == 6


def test_evaluation_full_verification_and_pictures_can_be_added_later(prepared: Prepared, copied: Path) -> None:
    assert run(prepared, copied, full_verify=True).made == ("verify",)
    assert run(prepared, copied, full_verify=True).made == run(prepared, copied).made == ()
    assert run(prepared, copied, plot=True).made == ("card",)
    for name in ("saliency.png", "evaluation.png"):
        picture = (copied.with_name("out.compress") / name).read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert (copied / name).read_bytes() == picture
    assert run(prepared, copied, plot=True).made == ()
    (copied.with_name("out.compress") / "evaluation.json").unlink()
    assert run(prepared, copied).made == ("evaluate", "card")


def tiny_request(root: Path, kind: str, out: Path, ratio: float = 0.5) -> Request:
    """Rounded to nearest, scored and measured on random tokens; the source has a README of its own."""
    config, tensors = tiny(kind, **KIND_SIZES[kind])
    if not root.exists():
        write_checkpoint(root, tensors, config, shards=3, files={"README.md": "# tiny\n"})
    ids_NT = np.random.default_rng(0).integers(0, 20, (3, 16)).astype(np.int32)
    windows = Windows(
        ids_NT=ids_NT,
        fingerprint="random",
        provenance={"data": "random"},
        notes=(),
    )
    return Request(
        source=Checkpoint.open(root),
        out=out,
        scheme=Scheme(grid=Grid(group_size=32)),
        pruning=Pruning(ratio=ratio),
        score_windows=windows,
        eval_windows=windows,
        precision=Precision(torch.device("cpu"), torch.float32),
    )


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "deepseek_v3"])
def test_every_family_goes_the_whole_way_and_the_forecast_is_right(tmp_path: Path, kind: str) -> None:
    ready = plan_compress(tiny_request(tmp_path / "source", kind, tmp_path / "out"))
    needs = {stage.stage: stage for stage in forecast(ready, CompressOptions())}
    outcome = compress(ready, CompressOptions(full_verify=True))
    assert outcome.made == STAGES
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert needs["quantize"].written_bytes == sum(sizes)
    assert outcome.facts["verify"]["bytes_compared"] > 0


def test_the_card_of_an_output_is_no_obstacle_to_starting_it_over(tmp_path: Path) -> None:
    """It stands in place of the README that was copied, which the record of the output names."""
    source, out = tmp_path / "source", tmp_path / "out"
    compress(plan_compress(tiny_request(source, "qwen3_moe", out)), CompressOptions(plot=True))
    assert "3 of 6 routed experts" in (out / "README.md").read_text()
    other = plan_compress(tiny_request(source, "qwen3_moe", out, ratio=0.2), force=True)
    assert compress(other, CompressOptions(force=True, plot=True)).made == STAGES[1:]
    assert "5 of 6 routed experts" in (out / "README.md").read_text()


# -- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", picked(STAGES, 3))
def test_stopped_before_a_stage_it_goes_on_to_the_same_files(
    prepared: Prepared, finished: Path, tmp_path: Path, stage: str
) -> None:
    def stop(number: int, total: int, name: str, *, done: bool) -> None:  # noqa: ARG001
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=rf"\[{STAGES.index(stage) + 1}/6\] {stage}: .*same command again"):
        compress(at(prepared, tmp_path / "out"), CompressOptions(), on_stage=stop)
    assert run(prepared, tmp_path / "out").made == STAGES[STAGES.index(stage) :]
    assert tree(tmp_path / "out") == tree(finished)


@pytest.mark.parametrize("stage", picked(["quantize", "score", "evaluate"], 3))
def test_stopped_within_a_stage_it_goes_on_to_the_same_files(
    prepared: Prepared, finished: Path, tmp_path: Path, stage: str
) -> None:
    begins, seen = {}, []

    def note(number: int, total: int, name: str, *, done: bool) -> None:  # noqa: ARG001
        begins[name] = len(seen)

    def stop(p: Progress) -> None:
        seen.append(p)
        if stage in begins and len(seen) == begins[stage] + 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=rf"\] {stage}: stopped: .* are safe in .*same command again"):
        compress(at(prepared, tmp_path / "out"), CompressOptions(), on_stage=note, on_progress=stop)
    assert run(prepared, tmp_path / "out").made == STAGES[STAGES.index(stage) :]
    assert tree(tmp_path / "out") == tree(finished)


def test_progress_is_one_over_all_stages(prepared: Prepared, tmp_path: Path) -> None:
    seen: list[Progress] = []
    compress(at(prepared, tmp_path / "out"), CompressOptions(), on_progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {(p.total, p.unit, p.resumed) for p in seen} == {(seen[-1].total, "work", 0)}
    assert seen[-1].done == seen[-1].total == sum(weights_of(prepared).values())
    weights = weights_of(prepared)
    assert min(weights[stage] for stage in ("score", "quantize", "evaluate")) > 0
    assert weights["quantize"] > weights["score"]  # the same windows: two chains, and two steps with backward passes


@pytest.mark.parametrize("missing", ["saliency.safetensors", "keep.json", "evaluation.json"])
def test_a_result_that_is_gone_is_made_again(prepared: Prepared, finished: Path, copied: Path, missing: str) -> None:
    (copied.with_name("out.compress") / missing).unlink()
    assert run(prepared, copied).made
    assert tree(copied) == tree(finished)


def test_an_output_that_is_gone_is_made_again_and_verified_again(
    prepared: Prepared, finished: Path, copied: Path
) -> None:
    shutil.rmtree(copied)
    assert run(prepared, copied).made == STAGES[2:]
    assert tree(copied) == tree(finished)


# -- other inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "stage", "difference", "kept"),
    [
        (["--keep", "2"], "select", "--keep or --ratio: was 4, now 2", "score"),
        (["--criterion", "ean"], "select", "--criterion: was 'reap-sum', now 'ean'", "score"),
        (["--samples", "3"], "score", "--samples: was 4, now 3", ""),
        (["--format", "gptq"], "quantize", "--format: was 'auto-round', now 'gptq'", "score, select"),
        (["--iters", "3"], "quantize", "--iters: was 2, now 3", "score, select"),
        (["--lr", "0.1"], "quantize", "--lr: was None, now 0.1", "score, select"),
        (["--mtp", "drop"], "quantize", "--mtp: was 'auto', now 'drop'", "score, select"),
        (["--group-size", "64"], "quantize", "--group-size: was 128, now 64", "score, select"),
        (["--dtype", "bfloat16"], "score", "--dtype: was 'float32', now 'bfloat16'", ""),
        (["--tune-samples", "2"], "quantize", "--tune-samples or --samples: was 4, now 2", "score, select"),
        (
            ["--eval-samples", "1"],
            "evaluate",
            "--eval-samples: was 2, now 1",
            "score, select, quantize, verify",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_other_inputs_are_refused_and_named(
    small_moe: Path,
    copied: Path,
    finished: Path,
    change: list[str],
    stage: str,
    difference: str,
    kept: str,
    dry: list[str],
) -> None:
    before = tree(copied)
    spared = f"keeps what {kept} gave" if kept else "makes everything again"
    assert refused("compress", small_moe, copied, *arguments(small_moe), *change, *dry) == (
        f"shardxform: {copied}.compress: '{stage}' was made from other inputs: {difference}; name another OUT, or start"
        f" over with --force, which {spared}\n"
    )
    assert tree(copied) == before == tree(finished)


def test_a_text_that_has_changed_is_named(small_moe: Path, copied: Path, tmp_path: Path) -> None:
    text = tmp_path / "calib.jsonl"
    text.write_bytes((small_moe / "text/calib.jsonl").read_bytes() + b'{"text": "more"}\n')
    said = refused("compress", small_moe, copied, *arguments(small_moe), "--data", text)
    assert "'score' was made from other inputs: --data: the text of 'calib.jsonl' has changed since; name" in said


def test_force_starts_over_from_what_changed(small_moe: Path, prepared: Prepared, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    done("compress", small_moe, tmp_path / "fresh/out", *arguments(small_moe), "--keep", "2", "--plots")
    run(prepared, copied, plot=True)
    changed = arguments(small_moe, "--keep", "2", "--force", "--plots", "--json")
    out = json.loads(done("compress", small_moe, copied, *changed))
    assert out["made"] == list(STAGES[1:])
    assert tree(copied) == tree(tmp_path / "fresh/out")


def test_force_starts_over_what_is_unfinished(small_moe: Path, prepared: Prepared, tmp_path: Path) -> None:
    def stop(p: Progress) -> None:
        if p.done >= weights_of(prepared)["score"] // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress(at(prepared, tmp_path / "out"), CompressOptions(), on_progress=stop)
    assert (tmp_path / "out.compress/score.work").is_dir()
    other = arguments(small_moe, "--samples", "3", evaluated=False)
    assert "--samples: was" in refused("compress", small_moe, tmp_path / "out", *other)
    done("compress", small_moe, tmp_path / "out", *other, "--force")
    assert not (tmp_path / "out.compress/score.work").exists()


def test_a_damaged_output_is_refused_and_by_force_made_again(prepared: Prepared, copied: Path, finished: Path) -> None:
    shard = copied / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ResumeError, match=r"model.safetensors: missing or damaged in a finished output"):
        run(prepared, copied)
    shard.unlink()
    run(prepared, copied, force=True)
    assert tree(copied) == tree(finished)


def test_an_output_that_is_not_sound_is_an_error(prepared: Prepared, copied: Path) -> None:
    shard = copied / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x40
    shard.write_bytes(data)
    with pytest.raises(ExecutionError, match=r"not sound: .* see `shardxform verify .*`"):
        run(prepared, copied, full_verify=True)
    with pytest.raises(ExecutionError, match="not sound"):
        run(prepared, copied, full_verify=True)  # it is not taken for verified now


# -- what is not ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saliency.safetensors", "keep.json", "evaluation.json"])
@pytest.mark.parametrize("force", [False, True])
def test_a_result_that_somebody_changed_is_neither_used_nor_removed(
    prepared: Prepared, copied: Path, name: str, force: bool
) -> None:
    path = copied.with_name("out.compress") / name
    path.write_bytes(path.read_bytes() + b" ")
    before = tree(copied)
    with pytest.raises(OutputError, match=rf"{name}: not as compress wrote it; move it away"):
        run(prepared, copied, force=force)
    assert tree(copied) == before


@pytest.mark.parametrize("what", ["notes.txt", "score.work", "keep.json"])
def test_a_directory_of_somebody_else_is_refused(prepared: Prepared, tmp_path: Path, what: str) -> None:
    (tmp_path / "out.compress").mkdir()
    (tmp_path / "out.compress" / what).write_text("mine")
    with pytest.raises(OutputError, match=r"(not shardxform's|not as compress wrote it)"):
        run(prepared, tmp_path / "out")
    assert (tmp_path / "out.compress" / what).read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_link_in_place_of_the_directory_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.compress").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="expected a directory of compress or nothing"):
        run(prepared, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "record",
    [
        b"{",
        b'{"format": "shardxform.compress", "version": 2, "stages": {}}',
        b'{"format": "shardxform.compress", "version": 1, "stages": {"score": 1}}',
        b'{"format": "shardxform.compress", "version": 1, "stages": {"score": {"inputs": {}, "done": 1, "files": {}}}}',
        b'{"format": "shardxform.compress", "version": 1, "stages": {"score": '
        b'{"inputs": {}, "done": true, "files": {"../out/config.json": ""}, "facts": {}}}}',
    ],
)
def test_a_record_that_is_damaged_is_refused(prepared: Prepared, copied: Path, record: bytes) -> None:
    path = copied.with_name("out.compress") / "compress.json"
    path.write_bytes(record)
    with pytest.raises(OutputError, match=r"compress.json: "):
        run(prepared, copied, force=True)
    assert path.read_bytes() == record


def test_two_at_a_time_are_refused(prepared: Prepared, copied: Path) -> None:
    with (
        ResultsFolder(copied.with_name("out.compress")),
        pytest.raises(OutputError, match="another process works here"),
    ):
        run(prepared, copied)


def test_a_card_of_somebody_else_is_left_and_said_so(small_moe: Path, copied: Path) -> None:
    (copied / "README.md").write_text("mine")
    result = invoke("compress", small_moe, copied, *arguments(small_moe), "--plots")
    assert result.exit_code == 0, result.output
    why = "neither the source's nor a card of shardxform's; move it away and run the same command again"
    assert f"no card was written: {copied / 'README.md'}: {why}\n" in result.stderr
    assert re.search(rf"^  results +{re.escape(str(copied))}\.compress$", result.stdout, re.MULTILINE)
    assert (copied / "README.md").read_text() == "mine"
    (copied / "README.md").unlink()
    assert "README.md\n" in invoke("compress", small_moe, copied, *arguments(small_moe), "--plots").stdout
    assert "experts" in (copied / "README.md").read_text()


def card(out: Path, *more: str) -> Result:
    result = CliRunner().invoke(main, ["card", str(out), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_card_reads_what_lies_beside_the_output(copied: Path) -> None:
    written = (copied / "README.md").read_text()
    assert "## Evaluation" in written
    (copied / "README.md").unlink()
    result = card(copied, "--write")
    assert result.stderr == f"note: from {copied}.compress: keep.json, evaluation.json\n"
    assert (copied / "README.md").read_text() == written
    (copied.with_name(f"{copied.name}.compress") / "evaluation.json").write_text("{}")
    result = card(copied)
    assert result.stderr == f"note: from {copied}.compress: keep.json\n"
    assert "## Evaluation" not in result.stdout


@pytest.mark.parametrize("why", ["another", "foreign"])
def test_card_leaves_results_that_are_not_of_the_output(copied: Path, why: str) -> None:
    folder = copied.with_name(f"{copied.name}.compress")
    if why == "another":
        record = json.loads((folder / "compress.json").read_text())
        record["stages"]["quantize"]["facts"]["plan"] = "0" * 64
        (folder / "compress.json").write_text(json.dumps(record))
        said = f"not of {copied} as it is"
    else:
        (folder / "thesis.tex").write_text("")
        said = f"{folder}/thesis.tex: not shardxform's; move it away, or name another OUT"
    result = card(copied)
    assert result.stderr == f"note: not read: {folder}: {said}\n"
    assert "## Evaluation" not in result.stdout


def test_a_place_in_the_source_is_refused(small_moe: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.compress"
    shutil.copytree(small_moe, source)
    before = tree(source)
    assert "only read" in refused("compress", source, tmp_path / "model", "--method", "rtn")
    assert "only read" in refused("compress", source, source / "out", "--method", "rtn")
    assert tree(source) == before


@pytest.mark.parametrize("work", ["model", "model/work", "."])
def test_results_and_output_do_not_lie_in_each_other(work: str, small_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "model"
    said = refused("compress", small_moe, out, "--method", "rtn", "--results", tmp_path / "made" / work)
    assert "cannot lie in OUT" in said
    assert not out.exists()


# -- asked for --------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_every_stage_takes_and_writes_nothing(small_moe: Path, tmp_path: Path) -> None:
    args = ["compress", small_moe, tmp_path / "out", *arguments(small_moe), "--dry-run"]
    text = done(*args)
    assert "8 -> 4 per layer" in text
    assert re.search(r"quantize +to do", text)
    facts = json.loads(done(*args, "--json"))
    assert not list(tmp_path.iterdir())
    assert [stage["stage"] for stage in facts["stages"]] == list(STAGES)
    needs = {stage["stage"]: stage for stage in facts["stages"]}
    assert needs["score"]["tokens"] == 4 * 64 * 2
    assert needs["score"]["work_bytes"] == 2 * 4 * 64 * 128 * 4  # two generations of [N, T, H] in float32
    assert facts["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in facts["stages"])
    done(*args[:-1], "-q")
    assert needs["quantize"]["written_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    again = json.loads(done(*args, "--json"))
    assert {stage["state"] for stage in again["stages"]} == {"done"}
    assert (again["disk_bytes"], again["seconds"]) == (0, 0)
    text = done(*args)
    assert "  to do  nothing: all of it is there, made from these inputs\n" in text
    assert "needed" not in text
    assert "estimate" not in text
    left = {stage["stage"]: stage["state"] for stage in json.loads(done(*args, "--full-verify", "--json"))["stages"]}
    assert [stage for stage, state in left.items() if state != "done"] == ["verify"]
    (tmp_path / "out/README.md").unlink()
    assert re.search(r"card +to do", done(*args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--keep", "4"], "Missing option '--data'"),
        ([], "Missing option '--data'; --method rtn needs no text"),
        (["--keep", "4", "--ratio", "0.5"], "either --keep or --ratio"),
        (["--criterion", "ean"], "--criterion is for choosing experts"),
        (["--protect-super-experts"], "--protect-super-experts is for choosing experts"),
        (["--method", "rtn", "--iters", "2"], "--iters is for --method auto-round"),
        (["--method", "rtn", "--lr", "0.1"], "--lr is for --method auto-round"),
        (["--method", "rtn", "--samples", "2"], "--samples is for choosing experts and tuning"),
        (["--eval-samples", "2"], "--eval-samples is for measuring OUT"),
        (["--method", "rtn", "--plots"], "--plots is for choosing experts and measuring"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    small_moe: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    assert message in refused("compress", small_moe, tmp_path / "out", *args)
    assert not list(tmp_path.iterdir())


def test_too_little_text_to_measure_on_names_the_option_of_that_text(small_moe: Path, tmp_path: Path) -> None:
    little = tmp_path / "little.txt"
    little.write_text("two words")
    said = refused("compress", small_moe, tmp_path / "out", *arguments(small_moe), "--eval-data", little)
    assert re.search(
        r"little\.txt: expected at least one window of 64 tokens, .*; give more text, or .*: --eval-seqlen \d", said
    )


@pytest.mark.parametrize(("keep", "message"), [("10", "but .* has 8"), ("1", "keep at least 2")])
def test_a_count_that_cannot_be_is_refused_before_anything_is_run(
    small_moe: Path, tmp_path: Path, keep: str, message: str
) -> None:
    args = [*arguments(small_moe, evaluated=False), "--keep", keep]
    assert re.search(message, refused("compress", small_moe, tmp_path / "out", *args))
    assert not list(tmp_path.iterdir())


def test_a_request_is_whole_or_refused(prepared: Prepared) -> None:
    request = prepared.request
    for changes in ({"pruning": None}, {"recipe": None}, {"precision": None}):
        with pytest.raises(PlanError, match="found"):
            replace(request, **changes)
    with pytest.raises(PlanError, match="both or neither"):
        Pruning(keep=8, ratio=0.5)
    with pytest.raises(OutputError, match="name of a directory"):
        replace(request, out=Path(".."))


# -- the directory of results -----------------------------------------------------------------------------------------


class Unsynced(Failing):
    """Fails at effect `k`; syncing is counted, but not waited for."""

    def sync(self, fd: int) -> None:  # noqa: ARG002
        self.next_effect()

    def sync_dir(self, path: Path) -> None:  # noqa: ARG002
        self.next_effect()


def write_results(root: Path, fs: Counting) -> None:
    """Two stages, the first of which is made anew with other inputs."""
    for number in (1, 2):
        with ResultsFolder(root, fs) as folder:
            if not (folder.is_done("score") and folder.is_as("score", {"n": number})):
                folder.begin("score", {"n": number})
                folder.put("score", {"saliency.safetensors": b"scored %d" % number}, {"tokens": number})
            if not folder.is_done("select"):
                folder.begin("select", {"n": number})
                folder.put("select", {"keep.json": b"kept %d" % number})


def test_a_fault_at_any_effect_leaves_results_that_can_be_gone_on_with(tmp_path: Path) -> None:
    counting = Unsynced(0)
    write_results(tmp_path / "whole", counting)
    assert counting.effects > 40
    for k in range(1, counting.effects + 1):
        root = tmp_path / f"at-{k}"
        with pytest.raises((ExecutionError, OutputError)):
            write_results(root, Unsynced(k))
        for stage, found in read_stages(root).items():
            for name in found.files:
                assert not (root / name).exists() or name in ("saliency.safetensors", "keep.json"), stage
        write_results(root, Unsynced(0))
        files = {path.name: path.read_bytes() for path in root.iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}, k


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.crash
def test_killed_in_every_stage_it_ends_with_the_same_files(prepared: Prepared, finished: Path, tmp_path: Path) -> None:
    """One run after the other is killed in the stage after the last one's; the first is the command itself."""
    out = tmp_path / "out"
    work = tmp_path / "out.compress" / "score.work"
    args = [str(prepared.request.source.root), str(out), *arguments(prepared.request.source.root)]
    assert kill_when_there(lambda: main(["compress", *args]), work)
    for stage in STAGES:

        def doomed(stage: str = stage) -> None:
            def begin(number: int, total: int, name: str, *, done: bool) -> None:  # noqa: ARG001
                if name == stage:
                    die_at_effect(random.Random(stage).randint(1, 5))

            compress(at(prepared, out), CompressOptions(), on_stage=begin)

        assert forked(doomed) == -signal.SIGKILL, stage
    assert run(prepared, out).made == STAGES[5:]
    assert tree(out) == tree(finished)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_130_and_it_says_how_to_go_on(small_moe: Path, tmp_path: Path, kind: int) -> None:
    """In a child that sends the signal to itself, soon after tuning has begun."""
    args = [str(small_moe), str(tmp_path / "out"), *arguments(small_moe, "--iters", "2000", evaluated=False)]
    said = tmp_path / "said"

    def child() -> None:
        real = session.tune_block

        def tune_block(*given: Any) -> Any:
            threading.Timer(0.1, os.kill, (os.getpid(), kind)).start()
            return real(*given)

        session.tune_block = tune_block
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["shardxform", "compress", *args]
        entry()

    assert forked(child) == 130
    told = said.read_text()
    last = told.splitlines()[-1]
    assert re.search(r"shardxform: \[3/5\] quantize: .*run the same command again to go on", last), told
    assert not (tmp_path / "out/config.json").exists()
