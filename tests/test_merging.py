"""`--merge`: pruned experts merged into those that stay, as REAM does; alone, before healing, before rounding."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import read_checkpoint
from faults import kill_when_there
from smaller import smaller
from strategies import by_night
from test_heal_command import DATA, JUDGES, LAYERS, SAMPLES, SEQLEN, bytes_of, call, differing, keep_file
from test_heal_command import made as made_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from shardxform.ask.recipe import Heal  # noqa: E402
from shardxform.base.file_system import FileSystem  # noqa: E402
from shardxform.errors import SchemeError  # noqa: E402
from shardxform.plan.steps import BlockSize  # noqa: E402
from shardxform.tuning import healer, merging, session  # noqa: E402
from shardxform.tuning.heal import HealResult  # noqa: E402
from shardxform.tuning.merging import aligned, groups_of  # noqa: E402
from shardxform.tuning.samples import Judged  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL_MOE = smaller(experts=16, top=4)
FEW = list(range(4))
MERGE = ("--merge", *DATA)
SHAPES = ((4096, 14336), (7168, 2048), (2048, 512), (128, 64))  # Mixtral, DeepSeek-V3, Qwen3.5-35B-A3B, small-moe
SHORT = ("--heal", "all", "--heal-iters", "2", "--heal-lr", "0.002", "--batch-size", "2")


def made(folder: Path, command: str, keep: str, *more: str) -> Path:
    return made_of(folder, command, keep, *more, source=SMALL_MOE)


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(keep_file(tmp_path_factory.mktemp("keep"), FEW, LAYERS))


@pytest.fixture(scope="module")
def plain(keep: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain"), "prune", keep)


@pytest.fixture(scope="module")
def merged(keep: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("merged"), "prune", keep, *MERGE)


@pytest.fixture(scope="module")
def healed(keep: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("healed"), "prune", keep, "--merge", *SHORT, *DATA)


# -- groups and channels ----------------------------------------------------------------------------------------------


def test_the_most_salient_takes_those_most_like_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "LARGEST_GROUP", 3)
    alike_KG = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.95, 0.2, 0.9, 0.3]])
    worth_E = torch.tensor([1.0, 0, 5.0, 0, 0, 0])
    keep, gone = (0, 2), (1, 3, 4, 5)
    assert groups_of(alike_KG, worth_E, keep, gone, 6) == {2: [1, 4], 0: [3, 5]}
    other_E = torch.tensor([7.0, 0, 5.0, 0, 0, 0])
    assert groups_of(alike_KG, other_E, keep, gone, 6) == {0: [1, 3], 2: [4, 5]}
    assert groups_of(alike_KG.flip(0), worth_E, keep, gone, 6) == {2: [1, 3], 0: [4, 5]}
    assert groups_of(alike_KG, worth_E, keep, gone, 2) == {0: [1], 2: [3]}  # of the own set alone


def test_channels_are_found_again_in_another_order() -> None:
    random = torch.Generator().manual_seed(0)
    weights_JW, inner_RJ = torch.randn(12, 30, generator=random), torch.randn(50, 12, generator=random)
    order = torch.randperm(12, generator=random)
    found = aligned(weights_JW, inner_RJ, weights_JW[order], inner_RJ[:, order])
    assert torch.equal(order[found], torch.arange(12))
    some = torch.tensor([3, 1, 7])  # of a narrower one, some of another's
    assert torch.equal(order[aligned(weights_JW[some], inner_RJ[:, some], weights_JW[order], inner_RJ[:, order])], some)


def test_the_first_block_is_merged_as_a_program_apart_does(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench_merging` computes with transformers' own modules; what enters the first block is the same in both."""
    import bench_merging

    stacks: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = healer.BlockHealer.begin_merged

    def look(self: Any, merged: Any, *rest: Any) -> None:
        stacks.append(tuple(torch.zeros(file.shape) for file in (merged.gate_up, merged.down)))  # type: ignore[arg-type]
        merged.into(*stacks[-1], 1.0)
        real(self, merged, *rest)

    monkeypatch.setattr(healer.BlockHealer, "begin_merged", look)
    ids: list[Any] = []
    monkeypatch.setattr(bench_merging, "load_windows", lambda *_: ids[0])
    from shardxform.calibration import Windows

    def tuner(self: Any, view: Any, windows: Any, *rest: Any) -> None:
        learned = [n for n in range(len(windows.ids_NT)) if n not in JUDGES]
        ids.append(Windows(ids_NT=windows.ids_NT[learned], fingerprint="", provenance={}, notes=()))
        begin(self, view, windows, *rest)

    begin = session.Tuner.__init__
    monkeypatch.setattr(session.Tuner, "__init__", tuner)
    call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", *MERGE)
    monkeypatch.setattr(bench_merging, "TOKENS", ids[0].ids_NT.size)
    theirs = bench_merging.merge(SMALL_MOE, Path(keep), bench_merging.WAYS["ream"], 0)[0]
    for ours, wanted in zip(stacks[0], theirs, strict=True):
        assert float((ours - wanted.bfloat16().float()).abs().max()) < 1e-3
    unmerged = read_checkpoint(SMALL_MOE)["model.layers.0.mlp.experts.down_proj"].array()[FEW]
    assert float(np.abs(stacks[0][1].numpy() - unmerged).max()) > 0.05


# -- the command ------------------------------------------------------------------------------------------------------


def test_routed_experts_alone_are_changed_and_only_where_that_is_better(merged: Path, plain: Path) -> None:
    changed = differing(merged, plain)
    blocks = [block["healed"] for block in blocks_of(merged)]
    layers = [at for at, block in enumerate(blocks) if block["merged"]]
    assert layers
    assert changed == {
        f"model.layers.{at}.mlp.experts.{kind}" for at in layers for kind in ("gate_up_proj", "down_proj")
    }
    for block in blocks:
        assert block["what"] is None
        assert block["merged"] in (0, *merging_shares())
        better = block["merged_error"] < block["pruned_error"]
        assert better == (block["merged"] > 0)
        assert block["healed_error"] == (block["merged_error"] if better else block["pruned_error"])
    report = verify(merged, source=SMALL_MOE)
    assert report.sound, report.problems
    assert report.tensors_healed == 2 * len(layers)
    assert verify(merged, source=SMALL_MOE, independent=True).sound


def blocks_of(out: Path) -> list[Any]:
    found: list[Any] = json.loads((out / "shardxform.json").read_text())["facts"]["blocks"]
    return sorted(found, key=lambda block: int(block["layer"]))


def merging_shares() -> tuple[float, ...]:
    from shardxform.base.constants import MERGED_SHARES

    return MERGED_SHARES


def test_it_is_the_start_of_healing(healed: Path, merged: Path) -> None:
    ours, theirs = blocks_of(healed), blocks_of(merged)
    assert ours[0]["healed"]["merged"] == theirs[0]["healed"]["merged"]
    assert ours[0]["healed"]["pruned_error"] == theirs[0]["healed"]["pruned_error"]
    for block in ours:
        told = block["healed"]
        assert told["what"] == "all"
        assert told["healed_error"] < min(told["pruned_error"], told["merged_error"])
    report = verify(healed, source=SMALL_MOE)
    assert report.sound, report.problems
    assert report.values_near > 0  # what is not of the experts is within the steps


def test_a_weight_that_no_step_explains_is_told_in_a_merged_block(healed: Path, tmp_path: Path) -> None:
    """Experts of a merged block may be anything; its router may not."""
    out = Path(shutil.copytree(healed, tmp_path / "out"))
    record = json.loads((out / "shardxform.json").read_text())
    block = next(block for block in record["facts"]["blocks"] if block["healed"]["merged"])
    shard, name = out / "model.safetensors", f"model.layers.{block['layer']}.mlp.gate.weight"
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    tensors[name][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    assert [each.code for each in verify(out, source=SMALL_MOE).problems if each.code == "healed-reach"]


@pytest.mark.parametrize("more", [(), pytest.param(("--format", "gguf"), marks=by_night)])
def test_it_is_rounded_in_one_pass(keep: str, tmp_path: Path, more: tuple[str, ...]) -> None:
    out = made(tmp_path, "quantize", keep, *MERGE, *more)
    report = verify(out, source=SMALL_MOE)
    assert report.sound, report.problems
    assert any(block["healed"]["merged"] for block in blocks_of(out))


def test_threads_change_no_byte_and_the_work_is_told_expert_by_expert(
    keep: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While experts are merged, and while windows judge them, nothing else is done for a minute at a real shape."""
    told: list[list[int]] = []
    real = session.Tuner.tune

    def tune(self: Any, step: Any, work: Path, target: Any, fs: Any, on_work: Any, stopped: Any) -> Any:
        told.append([])

        def count(tokens: int) -> None:
            told[-1].append(tokens)
            on_work(tokens)

        facts = real(self, step, work, target, fs, count, stopped)
        passes, judged = 2 * SAMPLES * SEQLEN, 5 * SEQLEN
        assert sum(told[-1]) == step.block_tokens == passes + step.merging_tokens + judged
        assert step.merging_tokens == (SAMPLES - 1) * SEQLEN * (16 + 12) // 4
        return facts

    monkeypatch.setattr(session.Tuner, "tune", tune)
    torch.set_num_threads(3)
    shown = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, *MERGE).output
    assert bytes_of(tmp_path / "out") == bytes_of(merged)
    assert [sum(0 < tokens <= 80 for tokens in each) for each in told] == [16 + 12 + 5] * len(LAYERS)
    done, total = re.findall(r"prune: ([\d,]+) of ([\d,]+) tokens", shown)[-1]
    assert done == total


def test_the_disk_that_merged_experts_take_is_asked_for(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie beside the hidden states until their block is done: four experts of a block in 16 bits."""
    command = ("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "--dry-run", "--json", *DATA)
    without, with_them = (json.loads(call(*command, *more).stdout) for more in (("--heal",), ("--merge",)))
    experts = read_checkpoint(SMALL_MOE)["model.layers.0.mlp.experts.gate_up_proj"].array()
    size = experts.nbytes // 16 * 4 * 3 // 2
    assert with_them["work_bytes"] - without["work_bytes"] == size
    needed = with_them["bytes"] + with_them["work_bytes"]
    monkeypatch.setattr(FileSystem, "free_bytes", lambda *_: needed - 1)
    refused = call(*(each for each in command if each not in ("--dry-run", "--json")), "--merge", code=1).output
    assert "more, but only" in refused
    assert not (tmp_path / "out").exists()


@pytest.mark.crash
def test_killed_while_it_merges_the_bytes_are_the_same(keep: str, merged: Path, tmp_path: Path) -> None:
    from shardxform.cli import main

    out = tmp_path / "out"
    command = ["prune", str(SMALL_MOE), str(out), "-m", keep, "-q", *MERGE]
    states = out / ".shardxform" / "states-*"
    assert kill_when_there(lambda: main(command), states / "mergeddown-0000.hidden")
    assert not (out / "config.json").exists()
    call(*command)
    assert bytes_of(out) == bytes_of(merged)
    assert not list(out.rglob("*.hidden"))


def test_the_card_and_the_dry_run_say_it(keep: str, merged: Path, tmp_path: Path) -> None:
    dry = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "--dry-run", *MERGE).output
    assert "merged pruned experts merged into those that stay, where that is better, 6 windows of 64" in " ".join(
        dry.split()
    )
    card = call("card", str(merged)).output
    count = sum(block["healed"]["merged"] > 0 for block in blocks_of(merged))
    assert "Pruned experts were merged into those that stay (REAM, arXiv 2604.04356)" in card
    assert f"{count} of 2 blocks" in card
    assert "--merge" in card
    assert "heal" not in card.lower()
    assert "| block | pruned | merged | ratio | how far |" in card
    assert "What pruned experts knew is lost, but for what of it was merged into others." in card
    assert "healed" not in call("prune", str(SMALL_MOE), str(merged), "-m", keep, *MERGE).output


def test_means_that_are_no_numbers_are_nothing_that_a_record_has() -> None:
    judged = Judged(1, 63, held_out=True)
    result = HealResult(
        start_loss=0.5,
        loss=0.5,
        judged=judged,
        ratio_error=0.0,
        what=None,
        lr=0.0,
        tried=(),
        diverged=False,
        merged_loss=math.inf,
    )
    facts = session._heal_facts(result, 0, merges=True)
    assert (facts["merged"], facts["merged_error"]) == (0.0, None)


def test_as_many_are_aligned_at_once_as_fit() -> None:
    """One takes gigabytes where experts are as wide as Mixtral's: no more memory with more threads."""
    sizes = [BlockSize(nbytes=0, original_nbytes=0, features=0, down=down) for down in SHAPES]
    assert [size.merged_at_once for size in sizes] == [1, 1, 24, 32]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["router", "shared"])
def test_it_is_refused_where_healing_leaves_experts_alone(what: Any) -> None:
    with pytest.raises(SchemeError, match=f"`merge` changes routed experts, but `heal` {what} leaves them"):
        Heal(what=what, merge=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--merge", "--heal-iters", "3", *DATA), "--heal-iters is for --heal"),
        (("--merge", "--ray", "local", *DATA), "--merge: a block is changed by what the one before puts out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keep: str, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    refused = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, *more, code=1).output
    assert said in refused
    assert not (tmp_path / "out").exists()


def test_it_is_refused_where_no_expert_goes(tmp_path: Path) -> None:
    everyone = keep_file(tmp_path, list(range(16)), LAYERS)
    refused = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", str(everyone), *MERGE, code=1).output
    assert "--merge: no expert is pruned, so there is nothing to merge; give a --manifest that keeps fewer" in refused


def test_without_scipy_it_says_what_to_install(keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardxform.cli import inputs

    real = inputs.find_spec
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name == "scipy" else real(name))
    refused = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, *MERGE, code=1).output
    assert "this command needs scipy: pip install 'shardxform[models]'" in refused
