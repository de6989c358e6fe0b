"""Importance matrices of llama.cpp as scores: against sums written out here, and files of strangers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from ggufs import EXPERTS, HIDDEN, LAYERS, USED, WIDTH, Kind, moe_metadata, moe_tensors, quantized, write_gguf

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.gguf import open_gguf
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError
from shardxform.experts.choosing import criteria_of
from shardxform.experts.imatrix import import_imatrix, open_imatrix
from shardxform.experts.statistics import Saliency

TOKENS = 96


def activations(layer: int, experts: int = EXPERTS, width: int = WIDTH, used: int = USED) -> list[np.ndarray]:
    """What enters every expert's down projection, [tokens, width] each: all tokens go to `used` experts."""
    rng = np.random.default_rng(layer)
    chosen = np.array([rng.permutation(experts)[:used] for _ in range(TOKENS)])
    return [rng.standard_normal((int((chosen == e).sum()), width)).astype("f4") for e in range(experts)]


def write_imatrix(
    path: Path, layers: dict[int, list[np.ndarray]], *, kind: str = "imatrix", **tensors: np.ndarray
) -> Path:
    """A file as `llama-imatrix` writes it: sums of squares and counts of every matrix."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # it says of no architecture
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", TOKENS // 3)
    made = {}
    for layer, inner in layers.items():
        for name in ("gate", "up", "down"):
            stem = f"blk.{layer}.ffn_{name}_exps.weight"
            made[f"{stem}.in_sum2"] = np.stack([np.square(a, dtype="f8").sum(0) for a in inner]).astype("f4")
            made[f"{stem}.counts"] = np.array([[len(a)] for a in inner], "f4")
        made[f"blk.{layer}.ffn_gate_inp.weight.in_sum2"] = np.ones((1, HIDDEN), "f4")
        made[f"blk.{layer}.ffn_gate_inp.weight.counts"] = np.array([[TOKENS]], "f4")
    for name, array in (made | tensors).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def imatrix(tmp_path: Path) -> Path:
    return write_imatrix(tmp_path / "imatrix.gguf", {layer: activations(layer) for layer in range(LAYERS)})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())[0]


def call(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def test_counts_and_energies_are_the_experts(imatrix: Path, source: Path) -> None:
    made = import_imatrix(open_imatrix(imatrix), open_gguf(source))
    assert (made.tokens, made.num_experts, list(made.layers)) == (TOKENS, EXPERTS, [0, 1])
    assert criteria_of(made) == ("frequency", "energy")
    for layer, stats in made.layers.items():
        inner = activations(layer)
        assert stats.of("count").tolist() == [len(a) for a in inner]
        wanted = [np.square(a, dtype="f8").sum() for a in inner]
        np.testing.assert_allclose(stats.of("energy"), wanted, rtol=1e-6)
    assert made.runs[0]["datasets"] == ["calibration.txt"]
    assert "does not say which model" in made.runs[0]["unknown"]


@pytest.mark.parametrize("kind", [None, Kind.Q8_0])
def test_the_down_projection_tells_what_comes_out(kind: Kind | None, imatrix: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(moe_tensors())
    tensors = quantized(tensors, kind) if kind else tensors
    (path,) = write_gguf(tmp_path / "w.gguf", moe_metadata(), tensors)
    made = import_imatrix(open_imatrix(imatrix), open_gguf(path), weigh=True)
    for layer, stats in made.layers.items():
        down = tensors[f"blk.{layer}.ffn_down_exps.weight"]
        down_EOI = gguf.quants.dequantize(down[1], down[0]) if kind else down
        for expert, a_nI in enumerate(activations(layer)):
            wanted = (np.square(down_EOI[expert], dtype="f8").sum(0) * np.square(a_nI, dtype="f8").sum(0)).sum()
            assert stats.of("output")[expert] == pytest.approx(wanted, rel=1e-5)


def test_of_channels_that_are_not_correlated_it_is_the_norm_itself(source: Path, tmp_path: Path) -> None:
    """Where one channel is alive in every token, sum ||W a||^2 has no cross terms."""
    layers = {}
    for layer in range(LAYERS):
        inner = activations(layer)
        for a_nI in inner:
            alive = np.arange(len(a_nI)) % WIDTH
            a_nI[np.arange(WIDTH)[None] != alive[:, None]] = 0
        layers[layer] = inner
    made = import_imatrix(open_imatrix(write_imatrix(tmp_path / "i.gguf", layers)), open_gguf(source), weigh=True)
    for layer, inner in layers.items():
        down_EOI = moe_tensors()[f"blk.{layer}.ffn_down_exps.weight"].astype("f8")
        wanted = [np.square(a_nI @ down_OI.T).sum() for a_nI, down_OI in zip(inner, down_EOI, strict=True)]
        np.testing.assert_allclose(made.layers[layer].of("output"), wanted, rtol=1e-5)


def test_a_checkpoint_in_safetensors_is_told_of_as_well(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    path = write_checkpoint(tmp_path / "source", tensors, config)
    experts, width, used = config["num_experts"], config["moe_intermediate_size"], config["num_experts_per_tok"]
    moe = sorted({int(name.split(".")[2]) for name in tensors if "mlp.gate." in name})
    layers = {layer: activations(layer, experts, width, used) for layer in moe}
    file = write_imatrix(tmp_path / "imatrix.gguf", layers)
    made = import_imatrix(open_imatrix(file), Checkpoint.open(path), weigh=True)
    for layer, inner in layers.items():
        assert made.layers[layer].of("count").tolist() == [len(a) for a in inner]
        for expert, a_nI in enumerate(inner):
            down_OI = tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"].float32().astype("f8")
            wanted = (np.square(down_OI).sum(0) * np.square(a_nI, dtype="f8").sum(0)).sum()
            assert made.layers[layer].of("output")[expert] == pytest.approx(wanted, rel=1e-5)


def test_select_and_prune_go_on_from_it(imatrix: Path, source: Path, tmp_path: Path) -> None:
    saliency, keep = tmp_path / "s.safetensors", tmp_path / "keep.json"
    told = call("saliency", "import", imatrix, "--source", source, "-o", saliency, "--weigh", "-q")
    assert "criteria frequency, energy, output-energy" in told
    assert "does not say which model it was made with" in told
    assert "imatrix imatrix.gguf" in call("saliency", "show", saliency)
    call("select", saliency, "--keep", "4", "--criterion", "energy", "-o", keep)
    energies = [[np.square(a, dtype="f8").sum() for a in activations(layer)] for layer in range(LAYERS)]
    best = {layer: tuple(sorted(np.argsort(energies[layer])[::-1][:4].tolist())) for layer in range(LAYERS)}
    assert Manifest.load(keep).keep == best
    call("prune", "-m", keep, source, tmp_path / "out", "-q")
    (other,) = write_gguf(tmp_path / "other.gguf", moe_metadata(), moe_tensors(1))
    assert "chosen on another checkpoint" in call("prune", "-m", keep, other, tmp_path / "no", "-q", code=1)
    assert "only frequency, energy, output-energy" in call(
        "select", saliency, "--keep", "4", "-o", tmp_path / "no.json", code=1
    )
    assert json.loads(call("saliency", "show", saliency, "--json"))["tokens"] == TOKENS
    assert Saliency.load(saliency).added(Saliency.load(saliency)).tokens == 2 * TOKENS


LAYER = {layer: activations(layer) for layer in range(LAYERS)}
NAMES = {what: f"blk.1.ffn_down_exps.weight.{what}" for what in ("in_sum2", "counts")}


@pytest.mark.parametrize(
    ("layers", "tensors", "message"),
    [
        ({0: LAYER[0]}, {}, "no tensor 'blk.1.ffn_down_exps.weight.in_sum2'"),
        (LAYER | {2: LAYER[1]}, {}, "tells of experts in block 2, where"),
        ({0: LAYER[0], 1: LAYER[1][:7]}, {}, r"in_sum2' is F32 \[7, 32\]; expected F32 of 8 experts"),
        (LAYER, {NAMES["counts"]: np.full((8, 1), 0.5, "f4")}, "expected one count below"),
        (LAYER, {NAMES["counts"]: np.full((8, 1), 2.0**24, "f4")}, "expected one count below"),
        (LAYER, {NAMES["counts"]: np.full((8, 1), -1, "f4")}, "finite numbers of at least 0"),
        (LAYER, {NAMES["in_sum2"]: np.full((8, 32), np.nan, "f4")}, "finite numbers of at least 0"),
        (LAYER, {NAMES["counts"]: np.array([[0], *[[25]] * 7], "f4")}, "but no token reached the expert"),
        (LAYER, {NAMES["counts"]: np.full((8, 1), 36, "f4")}, "block 1: 3 experts for each token, but .* has 2"),
        (LAYER, {NAMES["in_sum2"]: np.ones((8, 16), "f4")}, "expected a down projection of 16 columns"),
    ],
)
def test_what_does_not_fit_is_refused(
    layers: dict[int, list[np.ndarray]], tensors: dict[str, np.ndarray], message: str, source: Path, tmp_path: Path
) -> None:
    file = write_imatrix(tmp_path / "imatrix.gguf", layers, **tensors)
    with pytest.raises(CheckpointError, match=message):
        import_imatrix(open_imatrix(file), open_gguf(source), weigh=True)


def test_what_is_no_importance_matrix_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected an importance matrix, found none: no general\.type"):
        open_imatrix(source)
    with pytest.raises(CheckpointError, match=r"general\.type is 'model'"):
        open_imatrix(write_imatrix(tmp_path / "x.gguf", LAYER, kind="model"))
    dense = write_imatrix(tmp_path / "d.gguf", {}, **{"blk.0.ffn_down.weight.counts": np.ones((1, 1), "f4")})
    with pytest.raises(CheckpointError, match="tells of no experts"):
        open_imatrix(dense)
    name = b"blk.0.ffn_down_exps.weight"
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 0.5))
    with pytest.raises(CheckpointError, match="of the older form, which holds means and has lost how many tokens"):
        open_imatrix(tmp_path / "imatrix.dat")
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(CheckpointError, match="expected a GGUF file, found none"):
        open_imatrix(tmp_path / "noise")
    with pytest.raises(CheckpointError, match="No such file"):
        open_imatrix(tmp_path / "absent")
