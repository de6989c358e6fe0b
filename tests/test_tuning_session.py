"""`quantize --method auto-round` end to end: both chains, resuming, parts that merge, three formats, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from faults import kill_when_there, killed_after
from smaller import ROUTED, smaller
from strategies import picked
from test_forward import fuse_experts
from test_verify_independent import found as second_opinion
from texts import few

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.cli import main  # noqa: E402
from shardxform.forward.passes import batches  # noqa: E402

pytestmark = pytest.mark.oracle

DATA = ("--samples", "4", "--seqlen", "64", "--iters", "3", "--batch-size", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def small_moe() -> Path:
    """Three blocks: one can be done, one in work, and one to come."""
    return smaller(blocks=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    text = str(few("calib.jsonl"))
    return ["quantize", str(source), str(out), "--method", "auto-round", "--data", text, *DATA, "-q", *more]


WEIGHTS = 54 - 3 * 2 + 3 * ROUTED * 3  # of the small model, its fused experts one by one


def tune(source: Path, out: Path, *more: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments(source, out, *more), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file of an output."""
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture(scope="module")
def tuned(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run on the small trained checkpoint."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tuned") / "out"
    tune(small_moe, out)
    torch.set_num_threads(before)
    return out


def test_the_output_says_how_it_was_made(small_moe: Path, tuned: Path) -> None:
    record = json.loads((tuned / "shardxform.json").read_text())
    assert record["inputs"]["scheme"]["method"] == "auto-round"
    assert record["inputs"]["recipe"]["iters"] == 3
    assert record["inputs"]["recipe"]["data"]["data"] == "calib.jsonl"
    blocks = record["facts"]["blocks"]
    assert [block["layer"] for block in blocks] == [0, 1, 2]
    assert all(0 < block["tuned_error"] <= block["rtn_error"] for block in blocks)
    config = json.loads((tuned / "config.json").read_text())
    assert config["quantization_config"]["iters"] == 3
    assert not (tuned / ".shardxform").exists()
    command = ["verify", str(tuned), "--source", str(small_moe), "--independent", "-q", "--json"]
    verify = CliRunner().invoke(main, command)
    assert verify.exit_code == 0, verify.output
    assert json.loads(verify.stdout)["rederived"] == WEIGHTS


def test_the_recorded_errors_are_those_of_what_was_written(small_moe: Path, tuned: Path) -> None:
    """The chains by hand: 16-bit and quantized model loaded whole, block by block, on the same windows."""
    from safetensors.torch import load_file, save_file

    from shardxform.calibration import DataOptions, load_windows

    windows = load_windows(small_moe, DataOptions(data=str(few("calib.jsonl")), samples=4, seqlen=64))
    tensors = load_file(tuned / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in tensors:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            codes = torch.stack([(tensors[name] >> (4 * k)) & 15 for k in range(8)], dim=1).reshape(
                -1, tensors[name].shape[1]
            )
            scales = tensors[f"{stem}.scales"].float().repeat_interleave(128, dim=0)
            plain[f"{stem}.weight"] = ((codes - 8) * scales).T.contiguous()
    fuse_experts(plain, layers=3, experts=ROUTED)
    folder = tuned.parent / "plain"
    folder.mkdir()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(small_moe / "config.json", folder)
    judge = np.random.Generator(np.random.PCG64([42, 7])).permutation(4)[:1]  # the window that was not tuned on
    outputs = [block_outputs(path, windows.ids_NT[judge]) for path in (folder, small_moe)]
    record = json.loads((tuned / "shardxform.json").read_text())
    for block, ours, theirs in zip(record["facts"]["blocks"], *outputs, strict=True):
        ours, theirs = ours[:, :-1].double(), theirs[:, :-1].double()  # the last position is left out
        errors_NT = (ours - theirs).square().mean(-1) / theirs.square().mean(-1)
        assert block["tuned_error"] == pytest.approx(float(errors_NT.mean()), rel=1e-3)
        assert block["judged_on"] == {"windows": 1, "tokens": 63, "held_out": True}


@torch.no_grad()
def block_outputs(path: Path, ids_NT: Any) -> list[Any]:
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, out: found.append(out))
    model(input_ids=torch.from_numpy(ids_NT).long())
    return found


def test_the_same_command_finds_it_complete(small_moe: Path, tuned: Path) -> None:
    before = bytes_of(tuned)
    told = tune(small_moe, tuned).output
    assert "already complete" in told
    assert [line.split()[0] for line in told.splitlines() if "%" in line] == ["0", "1", "2"]
    assert bytes_of(tuned) == before
    refused = tune(small_moe, tuned, "--iters", "4", code=1)
    assert "--iters: was 3, now 4" in refused.output


def test_where_it_goes_on_and_whose_time_it_is_are_said(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.tuning.session import Tuner

    loud = [arg for arg in arguments(small_moe, tmp_path / "out") if arg != "-q"]
    done, tune_block = [], Tuner.tune

    def stopping(self: Any, step: Any, *rest: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(step.layer)
        return tune_block(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "tune", stopping)
        assert CliRunner().invoke(main, loud).exit_code == 130
    result = CliRunner().invoke(main, loud)
    assert result.exit_code == 0, result.output
    assert "quantize: going on with block 2: 1,792 of 2,688 tokens done already\n" in result.stderr
    assert re.search(r"time +[\d.]+ s in this run, [\d.]+ MB from an earlier one\n", result.stdout)


@pytest.mark.parametrize(
    "blocks", [7, [7], [{"layer": "x"}], [{"layer": 0, "seconds": 1, "peak_rss_bytes": 1, "rtn_error": "x"}]]
)
def test_a_record_that_says_odd_things_of_blocks_is_passed_over(
    small_moe: Path, tuned: Path, tmp_path: Path, blocks: Any
) -> None:
    out = Path(shutil.copytree(tuned, tmp_path / "out"))
    record = json.loads((out / "shardxform.json").read_text())
    record["facts"]["blocks"] = blocks
    (out / "shardxform.json").write_text(json.dumps(record))
    assert tune(small_moe, out).stdout == f"{out}: already complete, made from the same inputs; nothing written\n"


@pytest.mark.parametrize("stop_at", picked([4, 11, 1, 7], 4))
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    small_moe: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Stopped at the n-th batch that leaves a block, inside or between blocks, by an error that nobody catches."""
    from shardxform.forward import work

    calls = 0
    put = work.HiddenWriter.put

    def stopping(self: Any, start: int, hidden: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        put(self, start, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(work.HiddenWriter, "put", stopping)
        result = CliRunner().invoke(main, arguments(small_moe, tmp_path / "out"))
    if result.exit_code == 0:
        assert calls < stop_at
    assert result.exit_code in (0, 1, 130)
    tune(small_moe, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tuned)


@pytest.mark.crash
def test_killed_inside_and_between_blocks_the_bytes_are_the_same(small_moe: Path, tuned: Path, tmp_path: Path) -> None:
    """Before the first block; then in the blocks, and between them."""
    from shardxform.execution.journal import Journal
    from shardxform.forward.work import HiddenFile, HiddenWriter

    out = tmp_path / "out"
    begun = out / ".shardxform" / "states-*" / "original-0000.hidden"
    assert kill_when_there(lambda: main(arguments(small_moe, out)), begun)
    assert not (out / "config.json").exists()
    for owner, name, number in ((HiddenWriter, "put", 3), (Journal, "record", 1), (HiddenFile, "remove", 1)):
        assert killed_after(owner, name, number, lambda: main(arguments(small_moe, out)))
        assert not (out / "config.json").exists()
    tune(small_moe, out)
    assert bytes_of(out) == bytes_of(tuned)


def test_lost_hidden_states_are_made_again(small_moe: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped_after(small_moe, out, blocks=2)
    states = sorted(path.name for path in (out / ".shardxform").glob("states-*/*.hidden"))
    assert "tuned-0002.hidden" in states
    for path in (out / ".shardxform").glob("states-*/*.hidden"):
        path.unlink()
    tune(small_moe, out)
    assert bytes_of(out) == bytes_of(tuned)


def stopped_after(source: Path, out: Path, blocks: int, *more: str) -> None:
    """Stop a run in the block after `blocks` finished ones."""
    from shardxform.tuning import session

    seen = 0
    execute = session.Tuner.tune

    def stopping(self: Any, *args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > blocks:
            raise KeyboardInterrupt
        return execute(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Tuner, "tune", stopping)
        result = CliRunner().invoke(main, arguments(source, out, *more))
    assert result.exit_code != 0


# -- independent blocks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run over all of them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tune(small_moe, out, "--inputs", "fp")
    torch.set_num_threads(before)
    return out


def test_parts_tuned_apart_join_to_the_bytes_of_one_run(small_moe: Path, whole: Path, tmp_path: Path) -> None:
    for name, blocks in (("a", "1-2"), ("b", "0")):
        said = tune(small_moe, tmp_path / name, "--inputs", "fp", "--blocks", blocks).output
        assert "left to others" in said
        assert not (tmp_path / name / "config.json").exists()
    join = ("--inputs", "fp", "--join", str(tmp_path / "a"), "--join", str(tmp_path / "b"))
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    tune(small_moe, tmp_path / "joined", *join)
    assert bytes_of(tmp_path / "joined") == bytes_of(whole)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_a_part_alone_can_be_finished_where_it_is(small_moe: Path, whole: Path, tmp_path: Path) -> None:
    tune(small_moe, tmp_path / "part", "--inputs", "fp", "--blocks", "1")
    tune(small_moe, tmp_path / "part", "--inputs", "fp")
    assert bytes_of(tmp_path / "part") == bytes_of(whole)


def test_parts_of_other_inputs_are_refused(small_moe: Path, tmp_path: Path) -> None:
    tune(small_moe, tmp_path / "a", "--inputs", "fp", "--blocks", "0")
    refused = tune(small_moe, tmp_path / "b", "--inputs", "fp", "--join", str(tmp_path / "a"), "--seed", "7", code=1)
    assert "other inputs" in refused.output
    refused = tune(small_moe, tmp_path / "c", "--inputs", "fp", "--join", str(small_moe), code=1)
    assert "expected unfinished work" in refused.output


# -- formats and views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_other_formats_hold_the_same_values(small_moe: Path, tuned: Path, tmp_path: Path, format: str) -> None:  # noqa: A002
    tune(small_moe, tmp_path / "out", "--format", format)
    convert = ["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "auto-round", "-q"]
    result = CliRunner().invoke(main, convert)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert second_opinion(tmp_path / "out", small_moe) == []


def test_pruning_and_tuning_in_one_pass_is_pruning_then_tuning(small_moe: Path, tmp_path: Path) -> None:
    """In 8 bits; `compress` does it in 4."""
    keep = tmp_path / "keep.json"
    ids = list(range(0, ROUTED, 2))
    keep.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": {str(n): ids for n in range(3)}}))
    tune(small_moe, tmp_path / "one", "-m", str(keep), "--scheme", "W8A16")
    result = CliRunner().invoke(main, ["prune", str(small_moe), str(tmp_path / "pruned"), "-m", str(keep), "-q"])
    assert result.exit_code == 0, result.output
    tune(tmp_path / "pruned", tmp_path / "two", "--scheme", "W8A16")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert json.loads((tmp_path / "one" / "shardxform.json").read_text())["inputs"]["scheme"]["grid"]["bits"] == 8
    assert second_opinion(tmp_path / "one", small_moe) == second_opinion(tmp_path / "two", tmp_path / "pruned") == []


def test_a_block_without_a_weight_to_tune_is_passed(small_moe: Path, tmp_path: Path) -> None:
    tune(small_moe, tmp_path / "out", "--keep-16bit", "model.layers.1.*")
    blocks = json.loads((tmp_path / "out" / "shardxform.json").read_text())["facts"]["blocks"]
    assert [block["layer"] for block in blocks] == [0, 2]
    stopped_after(small_moe, tmp_path / "again", 1, "--keep-16bit", "model.layers.1.*")
    tune(small_moe, tmp_path / "again", "--keep-16bit", "model.layers.1.*")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


def test_padding_and_batches_cover_all_windows(small_moe: Path) -> None:
    from shardxform.calibration import DataOptions, load_windows

    windows = load_windows(small_moe, DataOptions(data=str(few("calib.jsonl")), samples=5, seqlen=512))
    assert [(batch.start, batch.stop) for batch in batches(windows)] == [(0, 4), (4, 5)]


# -- a smaller first step ---------------------------------------------------------------------------------------------


def verified(source: Path, out: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", str(out), "--source", str(source), "-q", *more])
    return result.exit_code, result.output


def test_a_smaller_first_step_moves_fewer_codes_and_is_held_to_less(
    small_moe: Path, tuned: Path, tmp_path: Path
) -> None:
    tune(small_moe, tmp_path / "out", "--lr", "0.01")
    record = json.loads((tmp_path / "out" / "shardxform.json").read_text())
    assert record["inputs"]["recipe"]["lr"] == 0.01
    assert record["inputs"]["recipe"]["minmax_lr"] == 0.0025
    assert "lr" not in json.loads((tuned / "shardxform.json").read_text())["inputs"]["recipe"]
    for more in ((), ("--independent",)):
        code, said = verified(small_moe, tmp_path / "out", *more)
        assert code == 0, said
    shutil.copytree(tuned, tmp_path / "farther")
    other = json.loads((tmp_path / "farther" / "shardxform.json").read_text())
    other["inputs"]["recipe"]["lr"] = 0.01
    (tmp_path / "farther" / "shardxform.json").write_text(json.dumps(other))
    assert verified(small_moe, tmp_path / "farther")[0] == 1
    assert verified(small_moe, tmp_path / "farther", "--independent")[0] == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_options_that_would_do_nothing_are_refused(small_moe: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(main, ["quantize", str(small_moe), str(tmp_path / "o"), "--iters", "5"])
    assert result.exit_code == 1
    assert "--iters is for --method auto-round" in result.output
    result = runner.invoke(main, ["quantize", str(small_moe), str(tmp_path / "o"), "--lr", "0.01"])
    assert "--lr is for --method auto-round" in result.output
    assert "needs --inputs fp" in tune(small_moe, tmp_path / "o", "--blocks", "0", code=1).output
    assert "no block 9" in tune(small_moe, tmp_path / "o", "--inputs", "fp", "--blocks", "2-9", code=1).output
    names = tune(small_moe, tmp_path / "o", "--expert-names", "fused-indexed", code=1).output
    assert "--expert-names split" in names
    assert not (tmp_path / "o").exists()


def test_weights_that_are_not_finite_are_refused_naming_the_tensor(small_moe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_moe, copy)
    name = "model.layers.2.mlp.experts.down_proj"
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = bytearray(shard.read_bytes())
    head = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + head])[name]["data_offsets"][0]
    data[8 + head + begin : 8 + head + begin + 2] = b"\xc0\x7f"  # a NaN
    shard.write_bytes(data)
    refused = tune(copy, tmp_path / "out", code=1)
    assert "model.layers.2.mlp.experts.down_proj' holds NaN" in refused.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_expert_of_zeros_is_told_as_of_plain_rounding(small_moe: Path, tmp_path: Path) -> None:
    """What a cut file reads as: the same modules and groups are named, whatever rounds them."""
    copy = tmp_path / "copy"
    shutil.copytree(small_moe, copy)
    name = "model.layers.1.mlp.experts.down_proj"
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    data = bytearray(shard.read_bytes())
    head = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + head])[name]["data_offsets"]
    each = (last - first) // ROUTED
    data[8 + head + first + 3 * each : 8 + head + first + 4 * each] = bytes(each)
    shard.write_bytes(bytes(data))
    said = tune(copy, tmp_path / "out", "--iters", "1", "--samples", "2").output
    CliRunner().invoke(main, ["quantize", str(copy), str(tmp_path / "rtn"), "-q"], catch_exceptions=False)
    ours, plain = (json.loads((tmp_path / out / "shardxform.json").read_text())["facts"] for out in ("out", "rtn"))
    module = "model.layers.1.mlp.experts.3.down_proj"
    assert ours["zero_modules"] == plain["zero_modules"] == [module]
    assert ours["zero_groups"] == plain["zero_groups"] >= 128
    assert f"all zero  {module}: is the source whole?" in said


def test_a_loss_that_is_not_finite_falls_back_loudly(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardxform.tuning import session
    from shardxform.tuning.samples import NonFiniteLoss

    real = session.tune_block

    def failing(block: Any, forward: Any, samples: Any, options: Any) -> Any:
        if samples.block != 1:
            return real(block, forward, samples, options)
        block.settle()
        raise NonFiniteLoss("block 1: expected a finite loss, found nan")

    monkeypatch.setattr(session, "tune_block", failing)
    result = CliRunner().invoke(main, arguments(small_moe, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "WARNING: block 1 is NOT tuned but rounded to nearest" in result.output
    facts = json.loads((tmp_path / "out" / "shardxform.json").read_text())["facts"]
    assert facts["blocks_not_tuned"] == 1
    rtn = ["quantize", str(small_moe), str(tmp_path / "rtn"), "--search", "-q"]
    assert CliRunner().invoke(main, rtn).exit_code == 0
    same = "model.layers.1.mlp.experts.4.up_proj.qweight"
    assert tensor(tmp_path / "out", same) == tensor(tmp_path / "rtn", same)


def tensor(root: Path, name: str) -> bytes:
    data = (root / "model.safetensors").read_bytes()
    head = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + head])[name]["data_offsets"]
    return data[8 + head + begin : 8 + head + end]


def test_too_little_data_is_said(small_moe: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a few words"}) + "\n")
    args = ["quantize", str(small_moe), str(tmp_path / "o"), "--method", "auto-round", "--data", str(short)]
    result = CliRunner().invoke(main, [*args, "--seqlen", "64"])
    assert result.exit_code == 1
    assert "64" in result.output
    assert not (tmp_path / "o").exists()
