"""Outputs made from our own outputs: their records tell of every step, their cards of how to make them again."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import write_json
from click.testing import CliRunner
from test_card import again, evaluation, shardxform
from test_prune import manifest_of
from test_quantize import make

from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.base.file_system import read_given
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import Identity, identify
from shardxform.checkpoint.record import Record, read_record
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ManifestError, PlanError
from shardxform.evaluation.routing import kept_ids
from shardxform.publish.card import CardOptions, gather, render
from shardxform.verification import verify

RUN = {"data": "calib.jsonl", "sha256": "ab" * 32, "samples": 3, "seqlen": 5, "tokens": 15}
WHY = {"criterion": "reap", "provenance": {"tokens": 15, "runs": [RUN], "secret": "of no card"}}


def prune(source: Path, out: Path, count: int, first: int = 0, *options: object) -> Path:
    """Keep `count` experts of every layer, from number `first` on, for a reason."""
    manifest = manifest_of(source).to_dict()
    manifest |= {"keep": {layer: list(range(first, first + count)) for layer in manifest["keep"]}, **WHY}
    write_json(out.with_name(f"{out.name}-keep.json"), manifest)
    shardxform("prune", source, out, "-m", out.with_name(f"{out.name}-keep.json"), "-q", *options)
    return out


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A source, what is left of it, that in 4 bits, and that in another format; read-only."""
    root = tmp_path_factory.mktemp("chain")
    source, pruned, rounded, converted = (root / name for name in ("source", "pruned", "rounded", "converted"))
    make(source)
    prune(source, pruned, 4, 2)
    shardxform("quantize", pruned, rounded, "--group-size", 32, "-q")
    shardxform("convert", rounded, converted, "--to", "gptq", "-q")
    return [source, pruned, rounded, converted]


@pytest.fixture
def pruned(chain: list[Path], tmp_path: Path) -> Path:
    """A copy of the first output, which a test may change."""
    return Path(shutil.copytree(chain[1], tmp_path / "pruned"))


def record_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "shardxform.json").read_text()))


def rewrite(out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change a record, and give it the checksum of one that was written so."""
    record = record_of(out)
    edit(record)
    (out / "shardxform.json").write_bytes(Record.parse(record).to_bytes())
    return out


# -- the record --------------------------------------------------------------------------------------------------------


def test_a_record_tells_of_every_step_and_what_each_was_made_from(chain: list[Path]) -> None:
    *before, last = chain
    steps = record_of(last)["inputs"]["history"]["steps"]
    assert [step["command"] for step in steps] == ["prune", "quantize"]
    for step, source in zip(steps, before, strict=False):
        assert Identity.from_dict(step["source"]) == Identity.from_dict(identify(Checkpoint.open(source)).to_dict())
    for step, out in zip(steps, chain[1:], strict=False):
        recorded = record_of(out)["inputs"]
        assert {key: step.get(key, {}) for key in ("options", "manifest", "scheme")} == {
            key: recorded.get(key, {}) for key in ("options", "manifest", "scheme")
        }
    assert steps[0]["summary"]["chosen"] == {"criterion": "reap", "tokens": 15, "runs": [RUN]}
    assert "history" not in record_of(chain[1])["inputs"]
    assert "history" not in json.dumps(steps)


def test_the_same_command_finds_it_complete_and_another_history_is_refused(chain: list[Path], pruned: Path) -> None:
    out = pruned.with_name("again")
    shardxform("quantize", pruned, out, "--group-size", 32, "-q")
    assert record_of(out) == record_of(chain[2])
    assert "already complete" in shardxform("quantize", pruned, out, "--group-size", 32, "-q").output
    rewrite(pruned, lambda record: record["inputs"]["options"].update(mtp="drop"))
    result = CliRunner().invoke(main, ["quantize", str(pruned), str(out), "--group-size", "32", "-q"])
    assert "made from other inputs: `history.steps`" in str(result.exception) or "history.steps" in result.output


def test_what_healing_and_tuning_found_is_carried_on(pruned: Path) -> None:
    healed = {"pruned_error": 0.5, "healed_error": 0.25, "ratio_standard_error": 0.01, "what": "all", "lr": 0.02}
    block = {"layer": 1, "healed": {**healed, "iters": 30, "tried": []}, "seconds": 3.0}
    recipe = {
        "data": {"data": "c.jsonl", "sha256": "cd" * 32},
        "heal": {"what": "auto", "batch_size": 8, "seconds": 60},
    }

    def edit(record: dict[str, Any]) -> None:
        record["inputs"]["recipe"] = recipe
        record["facts"] = {"blocks": [block]}

    rewrite(pruned, edit)
    rounded, out = pruned.with_name("rounded"), pruned.with_name("out")
    shardxform("quantize", pruned, rounded, "--group-size", 32, "-q")
    shardxform("convert", rounded, out, "--to", "compressed-tensors", "-q")
    for each in (rounded, out):
        (told,) = record_of(each)["inputs"]["history"]["steps"][0]["facts"]["blocks"]
        assert told == {key: value for key, value in block.items() if key != "seconds"}
        text = render(gather(each))
        assert "| 1 | 5.000e-01 | 2.500e-01 | 50.0% ± 1.0% | all | 30 |" in text
        assert "steps per block: 30 to 30, each of 8 windows, as 60 s allowed" in text
        assert "--heal-iters 30" in text


def test_conversions_on_the_way_are_told_too(chain: list[Path], tmp_path: Path) -> None:
    shardxform("convert", chain[3], tmp_path / "out", "--to", "bf16", "-q")
    facts = gather(tmp_path / "out")
    assert [step.command for step in facts.steps] == ["prune", "quantize", "convert", "convert"]
    assert (facts.quantization, facts.dequantized) == (None, "bfloat16")
    text = render(facts)
    assert "3. `convert`: written as gptq; " in text
    assert "Quantized weights were turned back into bfloat16 after that." in text
    shardxform("prune", tmp_path / "out", tmp_path / "last", "--mtp", "drop", "-q")
    assert gather(tmp_path / "last").dequantized == "bfloat16"


def test_a_source_of_others_gives_no_history_and_no_claim(chain: list[Path], tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(chain[2], tmp_path / "foreign"))
    (foreign / "shardxform.json").unlink()
    shardxform("convert", foreign, tmp_path / "out", "--to", "gptq", "-q")
    assert "history" not in record_of(tmp_path / "out")["inputs"]
    text = render(gather(tmp_path / "out"))
    assert "## Steps" not in text
    assert "- format: gptq" in text
    assert "rounding" not in text  # that its integers came about by rounding to nearest nobody said


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_tells_the_whole_way(chain: list[Path]) -> None:
    facts = gather(chain[-1])
    text = render(facts)
    assert (facts.experts.before, facts.experts.after) == (8, 4)
    assert facts.nbytes.before == Checkpoint.open(chain[0]).nbytes
    assert facts.parameters is not None
    assert facts.parameters.before == gather(chain[1]).parameters.before  # type: ignore[union-attr]
    assert re.search(r"^1\. `prune`: 4 of 8 routed experts kept in every MoE layer; MTP layers dropped; ", text, re.M)
    assert re.search(r"^2\. `quantize`: weights rounded to 4 bits in the auto-round format; ", text, re.M)
    assert re.search(r"^3\. `convert`: written as gptq; .* of tensors became ", text, re.M)
    assert "- experts ranked by: `reap`" in text
    assert "- calibration text: `calib.jsonl`, 3 windows of 5 tokens" in text
    assert "under `inputs.history.steps[0].manifest`" in text
    assert "under `inputs.history.steps[0].source`" in text
    assert text.count("## Pruning") == text.count("## Quantization") == 1
    assert "of no card" not in text
    assert "secret" not in (chain[1] / "shardxform.json").read_text()


def test_the_card_says_which_of_the_sources_was_the_reference(chain: list[Path], tmp_path: Path) -> None:
    for number, told in enumerate(("the checkpoint that the first step began with", "what step 1 gave")):
        path = evaluation(tmp_path, name=f"{number}.json", of=chain[-1], against=chain[number])
        text = render(gather(chain[-1], CardOptions(evaluations=[path])))
        assert f"The reference is {told}, on the same windows." in text


def test_the_commands_make_it_again_from_the_first_source(chain: list[Path], tmp_path: Path) -> None:
    out = tmp_path / chain[-1].name
    out.mkdir()
    shutil.copy(chain[-1] / "shardxform.json", tmp_path / "record")
    for args in gather(chain[-1]).commands:
        places = {"SRC": chain[0], "shardxform.json": tmp_path / "record", out.name: out}
        shardxform(*(places.get(arg, tmp_path / arg if arg.startswith(out.name) else arg) for arg in args[1:]), "-q")
    for path in chain[-1].iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_two_prunings_are_told_apart(chain: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(chain[0], tmp_path / "out-step-1", 6, 1)
    prune(tmp_path / "out-step-1", out, 4, 2)
    assert [args[1:3] for args in gather(out).commands] == [
        ("manifest", "convert"),
        ("prune", "SRC"),
        ("manifest", "convert"),
        ("prune", "out-step-1"),
    ]
    results = again(out, chain[0])
    assert all("already complete, made from the same inputs" in result.output for result in results[1::2])
    assert [line for line in render(gather(out)).splitlines() if line.startswith("Step ")] == [
        "Step 1, `prune`:",
        "Step 2, `prune`:",
    ]
    with pytest.raises(ManifestError, match=r"pruned in steps 1 and 2, each by its own lists; `step` takes one out"):
        Manifest.load(out / "shardxform.json")
    assert Manifest.load(out / "shardxform.json", step=1).keep[0] == (1, 2, 3, 4, 5, 6)
    with pytest.raises(ManifestError, match="step 3: there is none of that number that prunes"):
        Manifest.load(out / "shardxform.json", step=3)
    with pytest.raises(ManifestError, match="only the record of an output has steps"):
        Manifest.load(tmp_path / "out-keep.json", step=1)
    for keep in ("out-keep.json", "out-step-1-keep.json"):
        assert shardxform("card", out, "-m", tmp_path / keep, "--json").exit_code == 0
    assert kept_ids(Checkpoint.open(out), Checkpoint.open(chain[0])) == dict.fromkeys(range(4), (3, 4, 5, 6))
    assert kept_ids(Checkpoint.open(out), Checkpoint.open(tmp_path / "out-step-1")) == dict.fromkeys(
        range(4), (2, 3, 4, 5)
    )
    with pytest.raises(CheckpointError, match=r"in 2 steps \(prune, prune\), which are not proved at once"):
        verify(out, source=chain[0])


def test_a_record_of_an_earlier_version_is_read(chain: list[Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(chain[3], tmp_path / "converted"))

    def edit(record: dict[str, Any]) -> None:
        made = record["inputs"].pop("history")["steps"][0]
        scheme = record_of(chain[2])["inputs"]["scheme"]
        kept = ("manifest", "options", "source", "summary")
        record["inputs"]["origin"] = {**{key: made[key] for key in kept}, "scheme": scheme}

    rewrite(out, edit)
    facts = gather(out)
    assert [step.command for step in facts.steps] == ["quantize", "convert"]
    assert "under `inputs.origin.manifest`" in render(facts)
    assert verify(out, source=chain[0]).values_compared == verify(out).tensors
    shardxform("convert", out, tmp_path / "next", "--to", "auto-round", "-q")
    assert [step.command for step in gather(tmp_path / "next").steps] == ["quantize", "convert", "convert"]


# -- what is not believed ----------------------------------------------------------------------------------------------


def plan_note(source: Path, out: Path) -> str:
    result = CliRunner().invoke(main, ["quantize", str(source), str(out), "--group-size", "32", "--dry-run"])
    assert result.exit_code == 0, result.output
    found = re.search(r"note: (shardxform\.json is not believed: .*)", result.output)
    return found[1] if found else ""


def test_a_record_of_something_else_is_not_believed_and_that_is_said(pruned: Path, tmp_path: Path) -> None:
    out, record = tmp_path / "out", (pruned / "shardxform.json").read_bytes()
    assert plan_note(pruned, out) == ""
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda r: r["shards"].update({next(iter(r["shards"])): [5, 1, "x"]}), "holds other tensors than it says"),
        (
            lambda r: r.update(shards={"other.safetensors": [5, 1, "x"]}),
            "it is of other files, other.safetensors among",
        ),
        (lambda r: r["files"].update({"config.json": "ab"}), "config.json was changed since"),
        (lambda r: r.update(inputs={**r["inputs"], "command": "rm"}), "inputs.command: expected one of prune, "),
        (lambda r: r["inputs"].update(history=5), "inputs.history.version: expected 1; a later shardxform reads it"),
    ]
    for edit, told in changes:
        (pruned / "shardxform.json").write_bytes(record)
        note = plan_note(rewrite(pruned, edit), out)
        assert told in note
        assert note.endswith("; how the source was made is not carried on")
    for data, told in (
        (record.replace(b'"auto"', b'"drop"'), "its checksum differs"),
        (b"{", "not JSON"),
        (b"", "not JS"),
    ):
        (pruned / "shardxform.json").write_bytes(data)
        assert told in plan_note(pruned, out)
    shardxform("quantize", pruned, out, "--group-size", 32, "-q")
    assert "history" not in record_of(out)["inputs"]
    assert [step.command for step in gather(out).steps] == ["quantize"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("tokenizer.json", "{ }", "tokenizer.json was changed since"),
        ("tokenizer.json", None, "tokenizer.json was removed since"),
        ("chat_template.jinja", "{{ messages }}", "chat_template.jinja was added since"),
        ("README.md", "of mine", ""),
    ],
)
def test_a_tokenizer_that_was_changed_since_is_not_what_commands_make_again(
    name: str, text: str | None, told: str, pruned: Path, tmp_path: Path
) -> None:
    if text is None:
        (pruned / name).unlink()
    else:
        (pruned / name).write_text(text)
    note = plan_note(pruned, tmp_path / "out")
    assert (told in note) if told else (note == "")


def test_a_record_that_is_no_file_is_not_opened(pruned: Path) -> None:
    (pruned / "shardxform.json").rename(pruned / "elsewhere")
    (pruned / "shardxform.json").symlink_to("elsewhere")  # as in the caches of hubs
    assert len(past_of(Checkpoint.open(pruned)).steps) == 1
    (pruned / "shardxform.json").unlink()
    os.mkfifo(pruned / "shardxform.json")
    assert "expected a file" in past_of(Checkpoint.open(pruned)).note


def test_values_that_are_not_the_records_are_refused_before_anything_is_written(pruned: Path, tmp_path: Path) -> None:
    shard = max(pruned.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    result = CliRunner().invoke(main, ["quantize", str(pruned), str(tmp_path / "out"), "--group-size", "32", "-q"])
    assert result.exit_code == 1
    assert re.search(r"tensor '.*' is not as its shardxform\.json has it: damaged, or changed since", result.output)
    assert not (tmp_path / "out").exists()
    (pruned / "shardxform.json").unlink()
    shardxform("quantize", pruned, tmp_path / "out", "--group-size", 32, "-q")


def test_one_of_each_kind_of_larger_tensors_is_read_whole(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in checkpoints whose small tensors are but a part of them."""
    monkeypatch.setattr("shardxform.checkpoint.identity._WHOLE", 4096)
    source = Checkpoint.open(pruned)
    past, identity = past_of(source), identify(source)
    past.refuse_other(source.root, source.shards, identity, "it")
    record = read_record(pruned / "shardxform.json")
    assert record is not None
    name = next(name for name in source.tensors if "gate_up_proj" in name)
    assert past.digests[name] == (record.digests or {})[name]
    other = type(past)(steps=past.steps, digests={**past.digests, name: "00" * 16})
    with pytest.raises(CheckpointError, match=f"it: tensor '{re.escape(name)}' is not as"):
        other.refuse_other(source.root, source.shards, identity, "it")


NEST: Any = []
for _ in range(40):
    NEST = [NEST]
EVIL = "\x1b[31m\u202e`|<script>\n# heading"


@pytest.mark.parametrize(
    "steps",
    [
        [],
        5,
        [5],
        [{}],
        [{"command": ["prune"]}],
        [{"command": "prune"}] * 33,
        [{"command": "prune", "options": {"x": NEST}}],
        [{"command": "prune", "manifest": {"keep": "x" * (1 << 22) + "x"}}],
        [{"command": "prune", "facts": {"blocks": [{"layer": 0}] * 5000}}],
    ],
)
def test_a_history_that_is_none_or_too_much_is_refused_in_one_line(
    steps: Any, chain: list[Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(chain[2], tmp_path / "out"))
    rewrite(out, lambda record: record["inputs"].update(history={"version": 1, "steps": steps}))
    result = CliRunner().invoke(main, ["card", str(out)])
    assert result.exit_code == 1
    assert re.fullmatch(r"shardxform: .*shardxform\.json: inputs\.history\..*\n", result.output)
    assert len(result.output) < 200 + len(str(out))
    assert past_of(Checkpoint.open(out)).note.startswith("shardxform.json is not believed: inputs.history.")
    assert shardxform("inspect", out).exit_code == 0
    verify(out, source=chain[1])


def test_what_a_stranger_wrote_into_a_history_is_shown_as_text(chain: list[Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(chain[2], tmp_path / "out"))

    def edit(record: dict[str, Any]) -> None:
        (step,) = record["inputs"]["history"]["steps"]
        step["options"] = {"mtp": EVIL, "text_only": EVIL}
        step["scheme"] = {"format": EVIL, "method": EVIL, "keep_16bit": [EVIL], "grid": {"bits": EVIL}}
        step["recipe"] = {"data": {"data": EVIL, "sha256": EVIL}, "heal": {"what": EVIL, "iters": EVIL}}
        step["summary"] = {"chosen": {"criterion": EVIL, "runs": [{"data": EVIL}]}, "dropped": {EVIL: 1}}
        step["facts"] = {"blocks": [{"layer": 0, "healed": {"what": "a|<b>", "pruned_error": 1, "healed_error": 1}}]}
        step["made_by"] = {"shardxform": EVIL, "torch": "1 <b>"}
        step["target"], step["family"] = {"format": EVIL}, {EVIL: EVIL}
        step["source"]["repository"] = EVIL

    rewrite(out, edit)
    for text in (render(gather(out)), shardxform("inspect", out).output, shardxform("card", out).output):
        assert not {"\x1b", "\u202e"} & {*text}
        assert "<script>" not in re.sub(r"\$'[^\n]*'", "", text)
        assert "<b>" not in text.replace("`a'<b>`", "")
        assert "\n# heading" not in text


# -- what verify and inspect say ---------------------------------------------------------------------------------------


def test_verify_proves_it_against_every_source_on_the_way(chain: list[Path]) -> None:
    for number, out in enumerate(chain[1:], 1):
        for source in chain[:number]:
            report = verify(out, source=source)
            assert report.sound
            assert {warning.code for warning in report.warnings} <= {"preprocessor"}
            assert report.values_compared == report.tensors
    with pytest.raises(PlanError, match=r"in several steps \(prune, quantize\), which the second opinion does not"):
        verify(chain[2], source=chain[0], independent=True)
    assert verify(chain[3], source=chain[1], independent=True).sound


def test_what_was_pruned_of_integers_and_converted_is_proved_against_them(chain: list[Path], tmp_path: Path) -> None:
    prune(chain[2], tmp_path / "fewer", 2, 1)
    shardxform("convert", tmp_path / "fewer", tmp_path / "out", "--to", "compressed-tensors", "-q")
    for source in (chain[2], tmp_path / "fewer"):
        report = verify(tmp_path / "out", source=source)
        assert report.sound
        assert report.values_compared == report.tensors
    with pytest.raises(PlanError, match=r"in several steps \(prune\), which the second opinion does not derive"):
        verify(tmp_path / "out", source=chain[2], independent=True)
    with pytest.raises(CheckpointError, match="which are not proved at once"):
        verify(tmp_path / "out", source=chain[0])


def test_a_changed_value_is_found_by_way_of_others(chain: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(chain[0], tmp_path / "source"))
    (place,) = Checkpoint.open(source).tensors["model.language_model.embed_tokens.weight"].ranges
    with (source / place.file).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x01\x02")
    assert not verify(chain[3], source=source).sound


def test_inspect_tells_how_it_was_made(chain: list[Path]) -> None:
    lines = shardxform("inspect", chain[-1]).output.splitlines()
    at = next(number for number, line in enumerate(lines) if "made by" in line)
    for line, end in zip(lines[at : at + 3], ("MTP layers dropped", "auto-round format", "as gptq"), strict=True):
        assert line.endswith(end)
    told = json.loads(shardxform("inspect", chain[-1], "--json").output)["made"]
    assert [step["command"] for step in told] == ["prune", "quantize", "convert"]
    assert "made by" not in shardxform("inspect", chain[0]).output


# -- why experts stay --------------------------------------------------------------------------------------------------


def test_of_a_manifest_only_what_a_card_shows_is_recorded() -> None:
    keep = {0: (0, 1)}
    assert chosen_by(None) == chosen_by(Manifest(keep=keep)) == {}
    odd = {
        "tokens": -1,
        "runs": [5, {"data": "\x1b"}, {"data": "d" * 999}] + [RUN] * 50,
        "layers": {"saliency_kept": ["x"]},
    }
    found = chosen_by(Manifest(keep=keep, criterion="reap", provenance=odd))["chosen"]
    assert found.keys() == {"criterion", "runs"}
    assert found["runs"][0] == {"data": "d" * 200}
    assert len(found["runs"]) < 16


# -- pipes of a shell --------------------------------------------------------------------------------------------------


def piped(data: bytes) -> str:
    """What `<(…)` gives: the name of a pipe that somebody writes to."""
    read, write = os.pipe()

    def fill() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(data)

    threading.Thread(target=fill, daemon=True).start()
    return f"/dev/fd/{read}"


def test_a_manifest_is_read_from_a_pipe_once_however_often_it_is_asked_for(chain: list[Path], tmp_path: Path) -> None:
    keep = (chain[1].parent / "pruned-keep.json").read_bytes()
    name = piped(keep)
    assert [read_given(name, 1 << 20) for _ in range(2)] == [keep, keep]
    shardxform("prune", chain[0], tmp_path / "out", "-m", piped(keep), "-q")
    assert record_of(tmp_path / "out") == record_of(chain[1])
    assert "already complete" in shardxform("prune", chain[0], tmp_path / "out", "-m", piped(keep), "-q").output
    shardxform("verify", tmp_path / "out", "--source", chain[0], "-m", piped(keep), "--independent", "-q")


def test_what_may_never_end_is_not_read(tmp_path: Path) -> None:
    assert read_given(piped(b"x" * 5000), 100) == b"x" * 101
    os.mkfifo(tmp_path / "keep.json")
    for path, told in ((tmp_path / "keep.json", "found a named pipe"), (Path("/dev/null"), "expected a file")):
        with pytest.raises(ManifestError, match=told):
            Manifest.load(path)
    with pytest.raises(ManifestError, match="not JSON"):
        Manifest.load(piped(b""))
