"""Saliency files: the value, its bytes, adding up, and what strangers may put in a file; `saliency` as a command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import header_bytes
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import mutations

from shardxform.base.file_system import write_new
from shardxform.cli.saliency import saliency_command
from shardxform.errors import CheckpointError, OutputError, PlanError, ShardxformError
from shardxform.experts import ExpertStats, Saliency
from shardxform.experts.statistics import KEY

MODEL = {
    "model_type": "qwen3_moe",
    "num_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_groups": 1,
    "source_fingerprint": "ab12",
}
RUN = {"data": "calib.jsonl", "seed": 0}


def stats(count: list[int], reap: list[float] | None = None, peak: list[float] | None = None) -> ExpertStats:
    """Statistics of one layer; what is not given follows from the counts."""
    count_E = np.array(count, np.int64)
    given = [count_E * 1.5 if values is None else np.array(values, np.float64) for values in (reap, peak)]
    return ExpertStats(count_E=count_E, reap_E=given[0], ean_E=count_E * 3.0, gate_E=count_E * 0.5, peak_E=given[1])


def saliency(**changes: Any) -> Saliency:
    """Layers 0 and 2 of 3, one MTP layer, 10 tokens."""
    parts: dict[str, Any] = {
        "model": MODEL,
        "layers": {2: stats([5, 5, 5, 5]), 0: stats([10, 0, 4, 6])},
        "mtp_layers": {0: stats([1, 2, 3, 4])},
        "tokens": 10,
        "runs": (RUN,),
    }
    return Saliency(**(parts | changes))


def same(one: Saliency, other: Saliency) -> bool:
    return one.to_bytes() == other.to_bytes()


# -- bytes --------------------------------------------------------------------------------------------------------


def test_a_file_is_exactly_these_bytes() -> None:
    one = saliency(model={**MODEL, "num_experts": 1, "num_experts_per_tok": 1}, layers={1: stats([7])}, mtp_layers={})
    model = (
        '{\\"model_type\\":\\"qwen3_moe\\",\\"num_layers\\":3,\\"num_experts\\":1,\\"num_experts_per_tok\\":1,'
        '\\"num_groups\\":1,\\"source_fingerprint\\":\\"ab12\\"}'
    )
    text = (
        '{"__metadata__":{"shardxform.saliency":"{\\"version\\":2,\\"model\\":' + model + ',\\"tokens\\":10,'
        '\\"runs\\":[{\\"data\\":\\"calib.jsonl\\",\\"seed\\":0}]}"},'
        '"layers.1.count":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        '"layers.1.ean":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},'
        '"layers.1.gate":{"dtype":"F64","shape":[1],"data_offsets":[16,24]},'
        '"layers.1.peak":{"dtype":"F64","shape":[1],"data_offsets":[24,32]},'
        '"layers.1.reap":{"dtype":"F64","shape":[1],"data_offsets":[32,40]}}'
    ).encode()
    text += b" " * (-len(text) % 8)
    data = np.array([7], "<i8").tobytes() + np.array([21, 3.5, 10.5, 10.5], "<f8").tobytes()
    assert one.to_bytes() == len(text).to_bytes(8, "little") + text + data


def test_the_reference_library_reads_and_writes_the_same(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save

    one = saliency()
    one.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(metadata) == {KEY}
    assert json.loads(metadata[KEY]) == {"version": 2, "model": MODEL, "tokens": 10, "runs": [RUN]}
    assert tensors["layers.0.count"].tolist() == [10, 0, 4, 6]
    assert tensors["mtp_layers.0.peak"].tolist() == [1.5, 3, 4.5, 6]
    assert save(tensors, metadata) == one.to_bytes()


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    one = saliency()
    one.save(tmp_path / "s")
    read = Saliency.load(tmp_path / "s")
    assert same(read, one)
    assert (list(read.layers), list(read.mtp_layers), read.tokens, read.runs) == ([0, 2], [0], 10, (RUN,))
    assert read.layers[2].count_E.dtype == np.int64
    assert read.layers[2].peak_E.dtype == np.float64


# -- saving -------------------------------------------------------------------------------------------------------


def test_saving_again_changes_nothing_and_leaves_no_other_file(tmp_path: Path) -> None:
    saliency().save(tmp_path / "s")
    before = (tmp_path / "s").stat()
    saliency().save(tmp_path / "s")
    after = (tmp_path / "s").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("content", [b"", b"a stranger's", saliency(tokens=11).to_bytes()])
def test_nothing_is_overwritten(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(OutputError, match=r"s: another file is there, and nothing is overwritten"):
        saliency().save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == content


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    (tmp_path / "s").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="something that is no file is there"):
        saliency().save(tmp_path / "s")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_appears_while_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    link = os.link

    def late(source: Path, target: Path) -> None:
        target.write_bytes(b"first")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputError, match="another file is there"):
        write_new(tmp_path / "s", b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"first")]


def test_a_file_system_without_links_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def refuse(*_: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_new(tmp_path / "s", b"data")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"data")]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone/s: no such directory: .*gone$"):
        saliency().save(tmp_path / "gone" / "s")


def test_what_has_no_json_form_is_refused_before_writing(tmp_path: Path) -> None:
    for run in ({"x": float("nan")}, {"x": {1, 2}}, {"path": "\udcff"}):
        with pytest.raises(CheckpointError, match="plain JSON"):
            saliency(runs=(run,)).save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


# -- adding up ----------------------------------------------------------------------------------------------------


def test_statistics_add_up() -> None:
    total = stats([1, 0], [2.0, 0.0], [7.0, 0.0]).added(stats([2, 3], [0.5, 1.5], [5.0, 9.0]))
    assert total.count_E.tolist() == [3, 3]
    assert total.reap_E.tolist() == [2.5, 1.5]
    assert total.ean_E.tolist() == [9.0, 9.0]
    assert total.gate_E.tolist() == [1.5, 1.5]
    assert total.peak_E.tolist() == [7.0, 9.0]


def test_layers_of_other_sizes_do_not_add_up() -> None:
    with pytest.raises(PlanError, match="expected statistics of 4 experts, found 1"):
        stats([1, 1, 1, 1]).added(stats([1]))


layers = st.lists(st.integers(0, 5), min_size=4, max_size=4).map(stats)
saliencies = st.builds(
    lambda first, second, mtp, seed: saliency(
        layers={0: first, 2: second}, mtp_layers={0: mtp}, runs=({"seed": seed},)
    ),
    layers,
    layers,
    layers,
    st.integers(0, 99),
)


@given(saliencies, saliencies, saliencies)
def test_adding_is_associative_and_but_for_the_runs_commutative(a: Saliency, b: Saliency, c: Saliency) -> None:
    total = a.added(b).added(c)
    assert same(total, a.added(b.added(c)))  # the numbers are small multiples of a half: sums are exact
    turned = c.added(b).added(a)
    assert turned.runs == total.runs[::-1]
    assert same(total, Saliency(**{name: getattr(turned, name) for name in PARTS}, runs=total.runs))
    assert total.tokens == 30
    assert total.layers[2].count_E.tolist() == [
        sum(x) for x in zip(*(s.layers[2].count_E for s in (a, b, c)), strict=True)
    ]


PARTS = ("model", "layers", "mtp_layers", "tokens")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": MODEL | {"model_type": "deepseek_v3", "num_layers": 9}},
            "b: model.model_type: 'deepseek_v3', not",
        ),
        ({"model": MODEL | {"num_experts_per_tok": 3}}, "b: model.num_experts_per_tok: 3, not 2"),
        ({"model": MODEL | {"source_fingerprint": "cd"}}, "b: model.source_fingerprint: 'cd', not 'ab12', as a has it"),
        ({"model": MODEL | {"dtype": "bf16"}}, "b: model.dtype: 'bf16', not None, as a has it"),
        ({"mtp_layers": {}}, "b: mtp_layers.0: missing here, but the other file has it"),
        ({"layers": {0: stats([1, 1, 1, 1]), 1: stats([1, 1, 1, 1]), 2: stats([1, 1, 1, 1])}}, "a: layers.1: missing"),
    ],
)
def test_other_checkpoints_are_refused_by_the_first_difference(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        saliency(where="a").added(saliency(where="b", **changes))


# -- what strangers write -----------------------------------------------------------------------------------------


def broken(**changes: Any) -> Mapping[int, ExpertStats]:
    parts = {f"{name}_E": array for name, array in stats([10, 0, 4, 6]).arrays().items()}
    return {0: ExpertStats(**(parts | changes))}


F = np.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": broken(reap_E=np.array([1, 0, np.nan, 1]))}, r"layers\.0\.reap\[2\]: expected a number from 0"),
        ({"layers": broken(ean_E=np.array([1, 0, 1, np.inf]))}, r"layers\.0\.ean\[3\]: .*found inf"),
        ({"layers": broken(ean_E=np.array([1, 0, 1, 1e300]))}, r"layers\.0\.ean\[3\]: .*found 1e\+300"),
        ({"layers": broken(gate_E=np.array([-1.0, 0, 1, 1]))}, r"layers\.0\.gate\[0\]: .*found -1\.0"),
        ({"layers": broken(peak_E=np.array([1.0, 1, 1, 1]))}, r"layers\.0\.peak\[1\]: 1\.0, but no token reached"),
        ({"layers": broken(count_E=np.array([11, 0, 4, 5]))}, r"layers\.0\.count\[0\]: expected a number from 0 to 10"),
        (
            {"layers": broken(count_E=np.array([10, 0, 10, 6]))},
            "layers.0.count: 26 routed in all, but 10 tokens go to 2",
        ),
        (
            {"layers": broken(count_E=np.array([1.0, 1, 1, 1]))},
            r"layers\.0\.count: expected int64 \[4\], found float64",
        ),
        ({"layers": broken(reap_E=np.zeros(5))}, r"layers\.0\.reap: expected float64 \[4\], found float64 \[5\]"),
        ({"layers": broken(reap_E=[0, 0, 0, 0])}, r"layers\.0\.reap: expected float64 \[4\], found \[0, 0, 0, 0\]"),
        ({"layers": {}}, "expected statistics of at least one layer"),
        ({"layers": {3: stats([1, 1, 1, 1])}}, r"layers\.3: expected layers 0\.\.2"),
        ({"tokens": -1}, "tokens: expected a count, found -1"),
        ({"tokens": True}, "tokens: expected a count, found True"),
        ({"tokens": 10**30}, "tokens: expected a count"),
        ({"runs": ("x",)}, r"runs\[0\]: expected an object, found 'x'"),
        ({"model": None}, "model: expected an object, found None"),
        ({"model": MODEL | {"num_layers": 0}}, "model.num_layers: expected a count, found 0"),
        ({"model": MODEL | {"num_experts": "4"}}, "model.num_experts: expected a count, found '4'"),
        ({"model": MODEL | {"num_groups": 3}}, "model: 4 experts in 3 router groups"),
        ({"model": MODEL | {"num_experts_per_tok": 5}}, "5 per token: they do not fit"),
        ({"model": MODEL | {"model_type": "\x1b[2J"}}, r"model.model_type: expected a short text, found '\\x1b\[2J'"),
        ({"model": MODEL | {"source_fingerprint": 7}}, "model.source_fingerprint: expected a short text, found 7"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        saliency(**changes)


def file_of(record: object, tensors: Mapping[str, tuple[str, int]] | None = None, key: str = KEY) -> bytes:
    """A safetensors file of zeros: name -> dtype and length."""
    tensors = tensors or {f"layers.0.{n}": ("I64" if n == "count" else "F64", 4) for n in stats([0]).arrays()}
    header: dict[str, Any] = {"__metadata__": {key: record if isinstance(record, str) else json.dumps(record)}}
    at = 0
    for name, (dtype, length) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [at, at + 8 * length]}
        at += 8 * length
    return header_bytes(header) + bytes(at)


RECORD = {"version": 2, "model": MODEL, "tokens": 10, "runs": [RUN]}
NAMES = {f"layers.0.{name}": ("I64" if name == "count" else "F64", 4) for name in ("count", "reap", "ean", "gate")}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "s: 0 bytes, too short for a safetensors header"),
        (file_of(RECORD)[:-1], "s: truncated"),
        (file_of(RECORD, key="format"), r"s: not a saliency file: .* found \['format'\]"),
        (file_of("{"), "s: metadata 'shardxform.saliency' is not JSON"),
        (file_of(RECORD | {"version": 3}), "s: version: expected one to 2, found 3"),
        (file_of(RECORD | {"version": True}), "s: version: expected one to 2, found True"),
        (file_of(RECORD | {"more": 1}), "s: expected the record version, model, tokens, runs"),
        (file_of(RECORD | {"runs": {}}), "s: runs: expected a list, found {}"),
        (file_of(RECORD | {"runs": [1]}), r"s: runs\[0\]: expected an object"),
        (file_of(RECORD | {"model": 3}), "s: model: expected an object, found 3"),
        (
            file_of(RECORD, NAMES | {"layers.1.peak": ("F64", 4)}),
            "s: tensor 'layers.0.peak' is missing",
        ),
        (file_of(RECORD, {"layers.00.peak": ("F64", 4)}), "s: tensor 'layers.00.peak': expected a name such as"),
        (file_of(RECORD, {"model.norm": ("F64", 4)}), "s: tensor 'model.norm': expected a name such as"),
        (
            file_of(RECORD, {"layers.0.peak": ("I64", 4)}),
            r"s: tensor 'layers.0.peak': expected F64 \[experts\], found I64",
        ),
        (file_of(RECORD, NAMES | {"layers.0.peak": ("F64", 9)}), r"s: layers.0.peak: expected float64 \[4\]"),
    ],
)
def test_files_that_are_none_of_ours_are_refused(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Saliency.load("s")


def test_the_file_that_the_refused_ones_differ_from_is_fine(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(file_of(RECORD))
    assert Saliency.load(tmp_path / "s").layers[0].count_E.tolist() == [0, 0, 0, 0]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found something that is no file"):
        Saliency.load(tmp_path)
    with pytest.raises(CheckpointError, match="gone: No such file or directory"):
        Saliency.load(tmp_path / "gone")
    with (tmp_path / "shard").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(CheckpointError, match="5000000000 bytes; a saliency file has at most"):
        Saliency.load(tmp_path / "shard")


@given(mutations(saliency().to_bytes()))
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("damaged") / "s"
    path.write_bytes(data)
    try:
        read = Saliency.load(path)
    except ShardxformError:
        return
    assert same(read, Saliency(**{name: getattr(read, name) for name in (*PARTS, "runs")}))


# -- the command --------------------------------------------------------------------------------------------------


def test_saliency_show(tmp_path: Path) -> None:
    saliency().save(tmp_path / "s")
    result = CliRunner().invoke(saliency_command, ["show", str(tmp_path / "s")], catch_exceptions=False)
    assert result.stdout.splitlines()[1:] == [
        "  model          qwen3_moe, 3 layers, top-2",
        "  source         ab12",
        "  tokens         10 in 1 run",
        "  run 1          data calib.jsonl, seed 0",
        "  criteria       reap, reap-sum, ean, ean-sum, frequency, gate-sum, peak",
        "  super experts  layer 0: 0",
        "  layer  reached  tokens, least  mean  most  largest peak",
        "  0       3 of 4              0     5    10            15",
        "  2       4 of 4              5     5     5           7.5",
        "  MTP 0   4 of 4              1     2     4             6",
    ]
    shown = json.loads(CliRunner().invoke(saliency_command, ["show", str(tmp_path / "s"), "--json"]).stdout)
    assert (shown["model"], shown["tokens"], shown["runs"]) == (MODEL, 10, [RUN])
    assert shown["super_experts"] == {"0": [0]}
    assert shown["layers"]["0"]["reached"] == 3
    assert shown["mtp_layers"]["0"]["mean_tokens"] == 2.5


def test_what_is_not_known_is_not_shown(tmp_path: Path) -> None:
    known = {0: ExpertStats(spread_E=np.array([1.0, 2.0, 3.0, 4.0]))}
    saliency(layers=known, mtp_layers={}, tokens=0).save(tmp_path / "s")
    result = CliRunner().invoke(saliency_command, ["show", str(tmp_path / "s")], catch_exceptions=False)
    lines = result.stdout.splitlines()
    assert lines[5:7] == ["  criteria       aimer", "  super experts  not known"]
    assert lines[-1].split() == ["0", "-", "-", "-", "-", "-"]


def test_layers_know_the_same_and_what_both_know_is_added() -> None:
    one, peak = stats([5, 5, 5, 5]), ExpertStats(peak_E=np.array([1.0, 1, 1, 1]))
    with pytest.raises(CheckpointError, match=r"saliency: layers\.1\.count: expected it, as other layers have it"):
        saliency(layers={0: one, 1: peak}, mtp_layers={})
    assert one.added(peak).arrays().keys() == {"peak"}
    weights = ExpertStats(spread_E=np.array([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(PlanError, match="no statistic in common that adds up"):
        weights.added(weights)


def test_a_run_is_shown_whole_and_its_digests_short(tmp_path: Path) -> None:
    run = {"tool": "t 1", "data": "a.txt", "files": ["a.txt"], "sha256": "ab" * 32, "pack": False, "more": "x" * 70}
    saliency(runs=(run, {"data": "d", "files": ["b", "c"]}, {str(key): "y" * 60 for key in range(50)})).save(
        tmp_path / "s"
    )
    shown = (
        CliRunner().invoke(saliency_command, ["show", str(tmp_path / "s")], catch_exceptions=False).stdout.splitlines()
    )
    assert shown[4:7] == [
        "  run 1          tool t 1, data a.txt, sha256 abababababab, pack no",
        f"                 more {'x' * 70}",
        "  run 2          data d, files b, c",
    ]
    assert shown[7:16].count(f"                 {'...'}") == 1


def test_what_a_run_says_of_itself_cannot_move_the_cursor(tmp_path: Path) -> None:
    saliency(runs=({"data": "\x1b[2J" + "x" * 300},)).save(tmp_path / "s")
    result = CliRunner().invoke(saliency_command, ["show", str(tmp_path / "s")], catch_exceptions=False)
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) < 130


def test_saliency_add(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in "abc"]
    for seed, part in enumerate(parts):
        saliency(runs=({"seed": seed},)).save(part)
    out = tmp_path / "out"
    result = CliRunner().invoke(saliency_command, ["add", *map(str, parts), "-o", str(out)], catch_exceptions=False)
    assert (result.stdout, result.stderr) == (f"{out}: 30 tokens in 3 runs, 4 experts in each of 2 layers\n", "")
    total = Saliency.load(out)
    assert total.layers[0].count_E.tolist() == [30, 0, 12, 18]
    assert [run["seed"] for run in total.runs] == [0, 1, 2]


def test_adding_the_same_run_twice_is_said(tmp_path: Path) -> None:
    saliency().save(tmp_path / "a")
    arguments = ["add", str(tmp_path / "a"), str(tmp_path / "a"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(saliency_command, arguments, catch_exceptions=False)
    assert result.stderr == "note: 1 run with the provenance of another: the same data may count twice\n"


def test_adding_needs_two_of_the_same_checkpoint(tmp_path: Path) -> None:
    saliency().save(tmp_path / "a")
    saliency(model=MODEL | {"source_fingerprint": "cd"}).save(tmp_path / "b")
    files = [str(tmp_path / name) for name in ("a", "b", "out")]
    assert CliRunner().invoke(saliency_command, ["add", files[0], "-o", files[2]]).exit_code == 2
    result = CliRunner().invoke(saliency_command, ["add", *files[:2], "-o", files[2]])
    assert isinstance(result.exception, PlanError)
    assert str(result.exception).startswith(
        f"{files[1]}: model.source_fingerprint: 'cd', not 'ab12', as {files[0]} has it"
    )
    assert not (tmp_path / "out").exists()
