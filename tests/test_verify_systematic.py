"""`verify` sees errors that are near enough code by code and wrong all together, with a record and without."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, tiny, write_checkpoint
from test_quantize import KIND_SIZES
from test_verify_quantized import SIDECARS, convert, edit_json, quantize, sound

from shardxform.ask.recipe import Reach, Recipe
from shardxform.base.constants import CLIP_RANGE
from shardxform.formats import rounding
from shardxform.formats.packing import code_sum
from shardxform.formats.scheme import Grid, Scheme
from shardxform.verification import VerifyReport, independent, parts, systematic, verify

KIND = "qwen3_moe"
LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.3"
OTHER = f"{LAYER}.mlp.experts.4"
FORMATS = ("auto-round", "gptq", "compressed-tensors")
SIZES = {**KIND_SIZES[KIND], "hidden_size": 128, "moe_intermediate_size": 128}


def make(root: Path, new: Callable[[str, Raw], Raw] = lambda _, raw: raw) -> Path:
    config, tensors = tiny(KIND, **SIZES)
    return write_checkpoint(root, {name: new(name, raw) for name, raw in tensors.items()}, config, files=SIDECARS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "source")


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Plainly rounded outputs by format and bits; never changed."""
    root = tmp_path_factory.mktemp("outputs")
    return {
        (format_, bits): quantize(
            source,
            root / f"{format_}-{bits}",
            Scheme(grid=Grid(bits=bits, group_size=32 if bits == 4 else 128), format=format_),
            pruned=False,
        )
        for format_, bits in product(FORMATS, (4, 8))
    }


# -- what a weight is stored as, spelled out a second time ---------------------------------------------------------


class Opened:
    """The tensors of a checkpoint, read and written in place."""

    def __init__(self, root: Path) -> None:
        self._at: dict[str, tuple[Path, int, str, list[int]]] = {}
        for path in root.glob("*.safetensors"):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, info in header.items():
                self._at[name] = (path, 8 + size + info["data_offsets"][0], info["dtype"], info["shape"])
        declared = json.loads((root / "config.json").read_text()).get("quantization_config", {})
        self.bits = declared.get("bits") or (declared["config_groups"]["group_0"]["weights"]["num_bits"])
        self.rows = declared["quant_method"] == "compressed-tensors"
        self.modules = [n.rpartition(".")[0] for n in self._at if n.endswith((".qweight", ".weight_packed"))]

    def raw(self, name: str) -> Raw:
        path, begin, dtype, shape = self._at[name]
        width = {"BF16": 2, "F16": 2, "I32": 4}[dtype]
        with path.open("rb") as file:
            file.seek(begin)
            return Raw(dtype, tuple(shape), file.read(width * int(np.prod(shape))))

    def put(self, name: str, array: np.ndarray) -> None:
        path, begin, _, shape = self._at[name]
        assert list(array.shape) == shape
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(array.tobytes())

    def names(self, module: str) -> tuple[str, str]:
        """Words and scales of a module."""
        last = ("weight_packed", "weight_scale") if self.rows else ("qweight", "scales")
        return f"{module}.{last[0]}", f"{module}.{last[1]}"

    def codes(self, module: str) -> np.ndarray:
        """Codes [O, I], less the zero point."""
        words = self.raw(self.names(module)[0]).array()
        words = (words if self.rows else words.T).astype(np.int64) & 0xFFFFFFFF
        shifts = np.arange(0, 32, self.bits)
        return ((words[:, :, None] >> shifts) & (2**self.bits - 1)).reshape(len(words), -1) - 2 ** (self.bits - 1)

    def put_codes(self, module: str, codes: np.ndarray) -> None:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        codes = (np.clip(codes, low, high) - low).reshape(len(codes), -1, 32 // self.bits)
        words = (codes << np.arange(0, 32, self.bits)).sum(axis=-1).astype(np.uint32).view(np.int32)
        self.put(self.names(module)[0], words if self.rows else words.T)

    def scales(self, module: str) -> np.ndarray:
        """Scales [O, G]."""
        raw = self.raw(self.names(module)[1])
        values = raw.float32().reshape(raw.shape)
        return values if self.rows else values.T

    def put_scales(self, module: str, scales: np.ndarray) -> None:
        name = self.names(module)[1]
        bits = bf16(scales).array() if self.raw(name).dtype == "BF16" else scales.astype("<f2")
        self.put(name, bits if self.rows else bits.T)


def recode(out: Path, module: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the codes [O, I] of a module."""
    opened = Opened(out)
    opened.put_codes(module, edit(opened.codes(module)))


def rescale(out: Path, module: str, row: int, factor: float) -> None:
    opened = Opened(out)
    scales = opened.scales(module).copy()
    scales[row] *= factor
    opened.put_scales(module, scales)


def exchange(out: Path, one: str, other: str) -> None:
    opened = Opened(out)
    parts = [(opened.names(module), [opened.raw(n).array() for n in opened.names(module)]) for module in (one, other)]
    for (here, _), (_, there) in (parts, parts[::-1]):
        for name, array in zip(here, there, strict=True):
            opened.put(name, array)


def every_code(out: Path) -> None:
    opened = Opened(out)
    for module in opened.modules:
        opened.put_codes(module, opened.codes(module) + 1)


def one_expert(out: Path) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        recode(out, f"{EXPERT}.{projection}", lambda codes: codes + 1)


def one_row(out: Path) -> None:
    recode(out, f"{EXPERT}.down_proj", lambda codes: codes - (np.arange(len(codes)) == 17)[:, None])


def low_bit_flipped(out: Path) -> None:
    recode(out, f"{EXPERT}.down_proj", lambda codes: codes ^ 1)


def gate_and_up(out: Path) -> None:
    exchange(out, f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj")


def two_experts(out: Path) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        exchange(out, f"{EXPERT}.{projection}", f"{OTHER}.{projection}")


def doubled_scale(out: Path) -> None:
    rescale(out, f"{EXPERT}.up_proj", 5, 2.0)


def shifted_rows(out: Path) -> None:
    opened = Opened(out)
    opened.put(f"{LAYER}.mlp.gate.weight", np.roll(opened.raw(f"{LAYER}.mlp.gate.weight").array(), 1, axis=0))


CORRUPTIONS = {
    **{f.__name__: f for f in (every_code, one_expert, one_row, low_bit_flipped)},
    **{f.__name__: f for f in (gate_and_up, two_experts, doubled_scale, shifted_rows)},
}


def forget(out: Path) -> None:
    """No record, as another tool's output."""
    (out / "shardxform.json").unlink()


def claim_tuned(out: Path, iters: int = 200) -> None:
    """The record of a tuned output."""

    def edit(record: dict[str, Any]) -> None:
        record["inputs"]["scheme"]["method"] = "auto-round"
        record["inputs"]["recipe"] = {"iters": iters}

    edit_json(out / "shardxform.json", edit)


@pytest.mark.parametrize("how", CORRUPTIONS)
@pytest.mark.parametrize(("format_", "bits"), [("auto-round", 4), ("gptq", 8), ("compressed-tensors", 4)])
def test_it_is_found_with_every_record_and_without(
    how: str, format_: str, bits: int, source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    out = writable(outputs[format_, bits])
    CORRUPTIONS[how](out)
    assert not verify(out, source=source).sound
    claim_tuned(out)
    tuned = verify(out, source=source)
    forget(out)
    bare = verify(out, source=source)
    wrong = {"gate_and_up": EXPERT, "doubled_scale": f"{EXPERT}.up_proj", "shifted_rows": f"{LAYER}.mlp.gate"}
    for report in (tuned, bare):
        assert report.problems
        where = [p.where for p in report.problems]
        assert all(name.startswith(wrong.get(how, LAYER if how != "every_code" else "model.")) for name in where)
        if how == "every_code":
            assert {name.rpartition(".")[0] for name in where} == set(Opened(out).modules)
        if how in ("one_expert", "one_row", "low_bit_flipped"):
            assert {name.split(".experts.")[1].split(".")[0] for name in where} == {"3"}


# -- what was found, in words and figures --------------------------------------------------------------------------


def test_a_finding_names_row_figure_and_range(source: Path, outputs: Any, writable: Callable[[Path], Path]) -> None:
    out = writable(outputs["auto-round", 4])
    forget(out)
    one_row(out)
    (problem,) = verify(out, source=source).problems
    assert (problem.code, problem.where) == ("systematic", f"{EXPERT}.down_proj.qweight")
    text = "expert 3: 1 of 128 rows are systematically off, row 17 most: 0."
    assert problem.message.startswith(text), problem.message
    assert "of its codes by more than a step, expected at most 0.1" in problem.message
    assert "its mean signed error is -0.9" in problem.message


def test_rounding_down_is_found_by_its_sign_alone(source: Path, outputs: Any, writable: Callable[[Path], Path]) -> None:
    out = writable(outputs["compressed-tensors", 4])
    forget(out)
    module, weight = f"{EXPERT}.gate_proj", read_checkpoint(source)[f"{EXPERT}.gate_proj.weight"].float32()
    scale = np.repeat(Opened(out).scales(module), 32, axis=1)
    recode(out, module, lambda _: np.floor(weight / scale).astype(int))
    (problem,) = verify(out, source=source).problems
    assert problem.code == "systematic"
    assert problem.message.startswith("expert 3: mean signed error -0.4")
    assert problem.message.endswith("codes, expected -0.361 to 0.361")


@pytest.mark.parametrize(("factor", "told"), [(2.0, "2 times"), (0.25, "0.25 times")])
def test_scales_that_no_rounding_takes_are_found_though_codes_fit_them(
    factor: float, told: str, source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    out = writable(outputs["gptq", 4])
    forget(out)
    module, weight = f"{EXPERT}.gate_proj", read_checkpoint(source)[f"{EXPERT}.gate_proj.weight"].float32()
    rescale(out, module, 9, factor)
    scale = np.repeat(Opened(out).scales(module), 32, axis=1)
    recode(out, module, lambda _: np.rint(weight / scale).astype(int))
    found = verify(out, source=source).problems
    assert [(p.code, p.where) for p in found if p.code == "scale-range"] == [("scale-range", f"{module}.scales")]
    problem = next(p for p in found if p.code == "scale-range")
    text = f"expert 3: 4 of 512 scales are none that rounding takes, the first at row 9, group 0: {told} the min/max"
    assert problem.message == f"{text} scale, expected 0.37 to 1.39 times"


@pytest.mark.parametrize("format_", FORMATS)
def test_codes_of_4_bits_that_are_off_by_one_are_found_without_a_source(
    format_: str, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    out = writable(outputs[format_, 4])
    assert sound(verify(out))
    one_expert(out)
    problems = verify(out).problems
    assert {p.code for p in problems} == {"off-centre"}
    assert [p.where for p in problems] == [
        Opened(out).names(f"{EXPERT}.{projection}")[0] for projection in ("down_proj", "gate_proj", "up_proj")
    ]
    assert problems[0].message.startswith("the mean of its codes is +0.7")
    assert problems[0].message.endswith(" from zero, expected -0.833 to 0.583, as if all were off by one")


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_codes(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for size in (4, 8, 12, 1000, 65536, 65540, 300_000):
        data = rng.integers(0, 256, size, dtype="u1")
        full = np.full(size, 255, "u1")
        for each in (data, full):
            codes = each if bits == 8 else np.concatenate([each & 15, each >> 4])
            assert code_sum(each, bits) == codes.sum(dtype="i8")


# -- no false alarms -----------------------------------------------------------------------------------------------


def unrecorded(out: Path, source: Path) -> VerifyReport:
    forget(out)
    return verify(out, source=source)


@pytest.mark.parametrize("how", ["search", "fp16", "row", "plain"])
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_and_searched_outputs_are_sound_without_a_record(
    how: str, bits: Any, source: Path, tmp_path: Path
) -> None:
    grids = {
        "plain": Grid(bits=bits),
        "search": Grid(bits=bits, group_size=32, search=True),
        "fp16": Grid(bits=bits, group_size=64, scale_grid="fp16"),
        "row": Grid(bits=bits, group_size=-1),
    }
    out = quantize(source, tmp_path / "out", Scheme(grid=grids[how], format="gptq"), pruned=False)
    assert sound(unrecorded(out, source))
    converted = convert(out, tmp_path / "converted", format="compressed-tensors")
    assert sound(unrecorded(converted, source))


def odd_weights(name: str, raw: Raw) -> Raw:
    """Rows of zeros, of one value, of two, outliers, and weights too small for a scale."""
    if not name.endswith("_proj.weight"):
        return raw
    values = raw.float32().copy()
    values[0] = 0
    values[1] = 0.3
    values[2] = np.where(np.arange(values.shape[1]) % 2, 0.35, -1.0)
    values[3, ::32] = 50
    values[4] *= 1e-9
    values[5, ::2] = 0
    values[6] = np.rint(values[6] * 64) / 64
    return bf16(values)


@pytest.mark.parametrize("format_", FORMATS)
def test_odd_weights_are_no_systematic_error(format_: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source", odd_weights)
    for bits, size in ((4, 32), (8, -1)):
        out = quantize(
            source, tmp_path / f"{bits}", Scheme(grid=Grid(bits=bits, group_size=size), format=format_), pruned=False
        )
        assert not unrecorded(out, source).problems


def tuned(out: Path, source: Path, seed: int, offset: float, clips: Sequence[float] = (0.98, 1.0, 1.2)) -> None:
    """What steps may end with at worst: offsets at their limit, of one sign in a row, and clips at both ends."""
    rng = np.random.default_rng(seed)
    weights, opened = read_checkpoint(source), Opened(out)
    for module in opened.modules:
        weight, start = weights[f"{module}.weight"].float32(), opened.scales(module)
        scales = bf16((start * rng.choice(clips, start.shape)).astype("f4")).float32().reshape(start.shape)
        opened.put_scales(module, scales)
        ratio = weight / np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
        opened.put_codes(module, np.rint(ratio + offset * rng.choice([-1, 1], (len(weight), 1))).astype(int))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_worst_that_tuning_may_do_is_no_systematic_error(
    format_: str, bits: int, source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    out = writable(outputs[format_, bits])
    tuned(out, source, bits, 0.5 + 1 / 400)
    claim_tuned(out)
    assert sound(verify(out, source=source))
    (out / "shardxform.json").unlink()
    assert not verify(out, source=source).problems


@pytest.mark.parametrize("clips", [(0.2505,), (0.2505, 0.5, 1.0), (0.2505, 1.2)])
@pytest.mark.parametrize("format_", ["auto-round", "compressed-tensors"])
def test_what_narrow_scales_clip_is_no_systematic_error(
    format_: str, clips: tuple[float, ...], source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    """Two steps may take a scale to a quarter: most weights of its group are then beyond the range."""
    out = writable(outputs[format_, 4])
    tuned(out, source, 0, 0.75, clips)
    claim_tuned(out, 2)
    assert sound(verify(out, source=source))


@pytest.mark.parametrize("how", [each for each in CORRUPTIONS if each != "low_bit_flipped"])
@pytest.mark.parametrize("clips", [(1.0,), (0.2505, 0.5, 1.0)])
def test_errors_are_found_beside_what_narrow_scales_clip(
    how: str, clips: tuple[float, ...], source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    """But for low bits that are flipped, which two steps may do."""
    out = writable(outputs["auto-round", 4])
    tuned(out, source, 0, 0.0, clips)
    CORRUPTIONS[how](out)
    claim_tuned(out, 2)
    assert verify(out, source=source).problems


@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_the_size_of_an_error_is_that_within_the_range(clip: float) -> None:
    """With the scales that there are; what is clipped does not count, and groups of zeros neither."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((256, 128)).astype("f4")
    weights[0, :32] = 0
    peaks = np.abs(weights.reshape(256, 4, 32)).max(axis=2)
    scales = np.where(peaks > 0, peaks / 8 * clip, 1).astype("f4")
    ratio = weights / np.repeat(scales, 32, axis=1)
    freedom = parts.freedom_of(Grid(), Reach(0.75, 0.75))
    for offset, told in ((0.75, False), (1.25, True)):
        off = np.rint(ratio + offset * rng.choice([-1, 1], ratio.shape)).clip(-8, 7) - ratio
        inside = np.clip(ratio, -8, 7) - ratio
        sums = systematic.Sums(128, 8)
        sums.add(np.zeros((2, 256), np.int64), peaks, scales)
        squares = [float((np.repeat(scales, 32, axis=1) ** 2 * each**2).sum()) for each in (off, inside)]
        codes, _ = systematic.found_in(sums, squares[0] - squares[1], freedom)
        assert codes.startswith("its error is ") == told == bool(codes), codes


def test_offsets_of_more_than_the_record_allows_are_no_rounding(
    source: Path, outputs: Any, writable: Callable[[Path], Path]
) -> None:
    out = writable(outputs["gptq", 4])
    tuned(out, source, 0, 0.55)
    claim_tuned(out)
    assert {p.code for p in verify(out, source=source).problems} == {"source-error"}
    edit_json(out / "shardxform.json", lambda r: r["inputs"]["recipe"].update(iters=10))  # (1 + 1/10) / 2
    assert sound(verify(out, source=source))


def test_a_caller_may_allow_more(source: Path, outputs: Any, writable: Callable[[Path], Path]) -> None:
    out = writable(outputs["gptq", 4])
    low_bit_flipped(out)
    forget(out)
    assert not verify(out, source=source).sound
    assert not verify(out, source=source, tolerance=1).problems


# -- statistics ----------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_code_that_quantizes() -> None:
    for bits, ends in parts._SEARCHED.items():
        factors = rounding.search_factors(bits)
        assert (min(factors), max(factors)) == ends
    assert float(rounding.SMALLEST_SCALE) == parts._SMALLEST_SCALE
    assert CLIP_RANGE[1] == parts._WIDEST_CLIP
    kernels = pytest.importorskip("shardxform.verification.kernels")
    assert kernels.STEP == systematic.STEP


@pytest.mark.parametrize(("lr", "minmax_lr"), [(None, None), (0.25, None), (None, 0.75), (None, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 20, 50, 200, 1000])
def test_neither_offsets_nor_clips_go_beyond_what_is_allowed(
    steps: int, lr: float | None, minmax_lr: float | None
) -> None:
    from shardxform.tuning.block import TuneOptions, _paces
    from shardxform.tuning.elementwise import LIMIT, ONE

    lr, minmax_lr = lr and lr / steps, minmax_lr and minmax_lr / steps
    recipe = Recipe(windows="", data={}, samples=2, seqlen=2, iters=steps, lr=lr, minmax_lr=minmax_lr)
    paces = list(_paces(TuneOptions(seed=0, iters=steps, lr=lr, minmax_lr=minmax_lr)))
    freedom = parts.freedom_of(Grid(), parts._reach(recipe.facts()))
    assert freedom == parts.freedom_of(Grid(), recipe.reach)
    assert freedom.offset <= (0.25 if lr else 1) * (1 + 1 / steps) / 2 + 2.0**-12 + 1e-9
    assert min(sum(p.offset for p in paces), LIMIT) / ONE <= freedom.offset
    walked = sum(p.clip for p in paces)
    assert 1 - walked >= freedom.narrowest - 1e-6
    assert min(1 + walked, 1.2) <= freedom.widest + 1e-6
    assert freedom.widest <= min(1.2, 1 + walked + 1e-3)
    assert freedom.offset <= 1.0


@pytest.mark.parametrize(
    ("recipe", "reach"),
    [
        ({"iters": 3}, (2 / 3, 2 / 3)),
        ({"iters": 3, "lr": 0.1}, (0.2, 0.2)),
        ({"iters": 3, "lr": 0.1, "minmax_lr": 0.4}, (0.2, 0.8)),
        ({"iters": 3, "minmax_lr": 0.1}, (2 / 3, 0.2)),
        ({"iters": 0}, None),
        ({"iters": True}, None),
        ({"lr": 0.1}, None),
        (None, None),
        *(({"iters": 3, "lr": odd}, (2 / 3, 2 / 3)) for odd in (0.0, -1.0, 2.0, float("nan"), "0.1", None, True)),
        *(({"iters": 3, "minmax_lr": odd}, (2 / 3, 2 / 3)) for odd in (0.0, 2.0, float("nan"), "0.1", True)),
    ],
)
def test_what_a_record_says_of_steps_is_taken_where_it_makes_sense(
    recipe: Any, reach: tuple[float, float] | None
) -> None:
    assert parts._reach(recipe) == (None if reach is None else pytest.approx(reach))


def test_offsets_never_reach_a_whole_scale() -> None:
    """Whatever first step a record has."""
    recipe = {"iters": 200, "lr": 1.0}
    assert parts.freedom_of(Grid(), parts._reach(recipe)).offset == 1.0
    assert independent._offset(recipe) == 1.0
    assert independent._offset({"iters": 200, "lr": 0.001}) == pytest.approx(0.1005)


def test_the_share_that_chance_does_not_reach() -> None:
    """Held against exact tails of the binomial distribution."""

    def tail(p: float, n: int, least: int) -> float:
        return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))

    for p, n in ((0.0025, 64), (0.0025, 512), (0.05, 128), (0.5, 512)):
        most = int(systematic._most(p, n) * n)
        assert tail(p, n, most + 1) < 1.3e-14 < tail(p, n, int(0.8 * most))
    assert systematic._most(0.0, 32) < 0.5  # a row of 32 codes off by one is found
    assert systematic._most(1.0, 32) == 1.0
