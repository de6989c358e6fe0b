"""Tuning whole layers: what is put in place, what the loss sees, which state is kept, and what is stored of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats import packing, rounding
from shardxform.formats.scheme import Grid

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardxform.tuning import block as tuning_block  # noqa: E402
from shardxform.tuning import samples as tuning_samples  # noqa: E402
from shardxform.tuning.block import TunedBlock, TuneOptions, install, tune_block  # noqa: E402  # noqa: E402
from shardxform.tuning.modules import TunedLinear  # noqa: E402
from shardxform.tuning.samples import NonFiniteLoss, Samples, learning_order  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

pytestmark = pytest.mark.oracle

HIDDEN, EXPERTS, SAMPLES, LENGTH = 64, 8, 6, 12
GRID = Grid(group_size=32, search=True)
KINDS = ("linear_attention", "full_attention")
OPTIONS = TuneOptions(seed=3, iters=12, batch_size=4)


def config(kind: str) -> Any:
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    return Qwen3_5MoeTextConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        layer_types=[kind],
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        attn_implementation="eager",
        experts_implementation="eager",
    )


class Layer:
    """A random decoder layer and how to run it."""

    def __init__(self, kind: str = "linear_attention", seed: int = 0) -> None:
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

        torch.manual_seed(seed)
        self.kind, self.config = kind, config(kind)
        self.module = modeling.Qwen3_5MoeDecoderLayer(self.config, 0)
        self.rotary = modeling.Qwen3_5MoeTextRotaryEmbedding(self.config)
        for name, parameter in self.module.named_parameters():
            if "norm" not in name:
                parameter.data.normal_(0, 0.2)
        self.module.to(torch.bfloat16)

    @property
    def names(self) -> list[str]:
        attention = ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"]
        if self.kind == "full_attention":
            attention = [f"self_attn.{x}_proj" for x in "qkvo"]
        return [*attention, *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")), "mlp.experts"]

    def weights(self, names: list[str]) -> dict[str, np.ndarray]:
        """BF16 bits by the names that they will be stored under."""
        out: dict[str, np.ndarray] = {}
        for name in names:
            module = self.module.get_submodule(name)
            if name != "mlp.experts":
                out[name] = bits(module.weight)
                continue
            for e in range(EXPERTS):
                first, second = module.gate_up_proj[e].chunk(2)
                out[f"{name}.{e}.gate_proj"], out[f"{name}.{e}.up_proj"] = bits(first), bits(second)
                out[f"{name}.{e}.down_proj"] = bits(module.down_proj[e])
        return out

    def run(self, hidden_BTH: Any) -> Any:
        positions = torch.arange(hidden_BTH.shape[1])[None]
        mask = None
        if self.kind == "full_attention":
            mask = torch.full((hidden_BTH.shape[1],) * 2, -torch.inf).triu(1)[None, None].to(hidden_BTH.dtype)
        angles = tuple(part.to(hidden_BTH.dtype) for part in self.rotary(hidden_BTH, positions))
        return self.module(hidden_BTH, position_embeddings=angles, attention_mask=mask, position_ids=positions)


def bits(tensor: Any) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint16).numpy().copy()


def samples(layer: Layer, hidden: np.ndarray | None = None) -> Samples:
    """Targets of the 16-bit layer in float32.

    The samples are alike, so that what is learned from some is of use for the one that judges.
    """
    if hidden is None:
        random = np.random.default_rng(0)
        hidden = random.standard_normal((1, LENGTH, HIDDEN), np.float32) + 0.2 * random.standard_normal(
            (SAMPLES, LENGTH, HIDDEN), np.float32
        )
    reference = Layer(layer.kind)
    reference.module.float()
    with torch.no_grad():
        target = reference.run(torch.from_numpy(hidden)).numpy()
    return Samples(block=0, hidden_NTH=hidden, target_NTH=target)


class Watched:
    """Hidden states that remember which samples were read last."""

    def __init__(self, values_NTH: np.ndarray) -> None:
        self.values_NTH, self.shape, self.last = values_NTH, values_NTH.shape, np.empty(0, np.int64)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.last = rows
        return self.values_NTH[rows]


def tuned(
    change: Callable[[Samples], Samples] = lambda s: s,
    *,
    kind: str = "linear_attention",
    options: TuneOptions = OPTIONS,
    threads: int = 1,
    recompute: bool = True,
) -> tuple[TunedBlock, tuning_block.BlockResult, dict[str, np.ndarray]]:
    layer = Layer(kind)
    data = change(samples(layer))
    with Workers(threads) as workers:
        block = install(layer.module, layer.names, GRID, workers, recompute=recompute)
        layer.module.float()
        result = tune_block(block, layer.run, data, options)
        codes = {s.module: np.hstack([s.codes.codes_OI, s.codes.scale_OG]) for s in block.stored()}
    return block, result, codes


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_it_is_the_layer_with_rounded_weights(kind: str) -> None:
    ours, plain = Layer(kind), Layer(kind)
    weights = plain.weights(plain.names)
    hidden = torch.from_numpy(samples(ours).hidden_NTH)
    with Workers(2) as workers, torch.no_grad():
        block = install(ours.module, ours.names, GRID, workers)
        ours.module.float()
        found = ours.run(hidden)
        rounded: dict[str, Any] = {}
        for stored in block.stored():
            words, stats = rounding.quantize(weights[stored.module], "BF16", GRID, layout="row")
            assert stats.ok
            codes = packing.unpack(words.words, 4, "row")
            np.testing.assert_array_equal(stored.codes.codes_OI, codes)
            np.testing.assert_array_equal(stored.codes.scale_OG, words.scales)
            rounded[stored.module] = torch.from_numpy(packing.dequantize(codes, words.scales, 4, 32))
    assert list(rounded) == list(weights)
    plain.module.float()
    with torch.no_grad():
        experts = plain.module.mlp.experts
        for name, value in rounded.items():
            if "experts." not in name:
                plain.module.get_submodule(name).weight.copy_(value)
                continue
            expert, part = int(name.split(".")[2]), name.split(".")[3]
            if part == "down_proj":
                experts.down_proj[expert] = value
            else:
                experts.gate_up_proj[expert, slice(0, 32) if part == "gate_proj" else slice(32, 64)] = value
        torch.testing.assert_close(found, plain.run(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tuning_brings_the_block_nearer_to_the_original(kind: str) -> None:
    block, result, codes = tuned(kind=kind, options=replace(OPTIONS, iters=40))
    assert result.iteration > 0
    assert result.loss < 0.85 * result.start_loss
    assert result.unreached == {"mlp.experts": []}
    assert block.unreached == result.unreached
    layer = Layer(kind)
    start = {
        name: rounding.quantize(w, "BF16", GRID, layout="row")[0] for name, w in layer.weights(layer.names).items()
    }
    moved = [
        not np.array_equal(packing.unpack(w.words, 4, "row"), codes[n][:, : -w.scales.shape[1]])
        for n, w in start.items()
    ]
    assert all(moved)


def test_the_block_is_left_as_it_will_be_stored() -> None:
    """Its output has the loss that is reported, and is that of the stored codes."""
    layer = Layer()
    data = samples(layer)
    judges = np.random.Generator(np.random.PCG64([3, 7])).permutation(SAMPLES)[:1]
    with Workers(1) as workers, torch.no_grad():
        block = install(layer.module, layer.names, GRID, workers)
        layer.module.float()
        result = tune_block(block, layer.run, data, OPTIONS)
        out = layer.run(torch.from_numpy(data.hidden_NTH)).numpy()
    wanted = []
    for n in judges:
        for t in range(LENGTH - 1):
            found, target = out[n, t].astype(float), data.target_NTH[n, t].astype(float)
            wanted.append(np.square(found - target).sum() / np.square(target).sum())
    assert result.loss == pytest.approx(float(np.mean(wanted)), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_code_and_the_seed_does(kind: str) -> None:
    _, first, codes = tuned(kind=kind)
    _, second, again = tuned(kind=kind, threads=3)
    assert same(codes, again)
    assert math.isnan(first.ratio_error)  # of one judge
    assert replace(first, ratio_error=0) == replace(second, ratio_error=0)
    assert not same(codes, tuned(kind=kind, options=replace(OPTIONS, seed=4))[2])


def test_recomputing_the_attention_changes_no_code() -> None:
    assert same(tuned()[2], tuned(recompute=False)[2])


def test_last_positions_do_not_count() -> None:
    def spoil(data: Samples) -> Samples:
        target = data.target_NTH.copy()
        target[:, -1] += 100
        return replace(data, target_NTH=target)

    def spoil_one_more(data: Samples) -> Samples:
        target = data.target_NTH.copy()
        target[:, 0] += 1
        return replace(data, target_NTH=target)

    codes = tuned()[2]
    assert same(codes, tuned(spoil)[2])
    assert not same(codes, tuned(spoil_one_more)[2])


def test_a_token_counts_by_its_error_relative_to_its_size() -> None:
    """A token of a hundred times the size does not drown the others."""
    data = samples(Layer())
    out = torch.from_numpy(data.target_NTH * 1.1)
    rows = np.arange(SAMPLES)
    even = tuning_samples._sum(*tuning_samples._errors(out, data, rows))
    data.target_NTH[0, 0] *= 100
    out[0, 0] *= 100
    assert even == pytest.approx(0.01 * HIDDEN * SAMPLES * (LENGTH - 1), rel=1e-4)
    assert tuning_samples._sum(*tuning_samples._errors(out, data, rows)) == pytest.approx(even, rel=1e-4)


def test_bf16_samples_are_read_from_their_bits() -> None:
    def narrow(data: Samples) -> Samples:
        hidden, target = (bits(torch.from_numpy(a).bfloat16()) for a in (data.hidden_NTH, data.target_NTH))
        return replace(data, hidden_NTH=hidden, target_NTH=target)

    def rounded(data: Samples) -> Samples:
        hidden, target = (torch.from_numpy(a).bfloat16().float().numpy() for a in (data.hidden_NTH, data.target_NTH))
        return replace(data, hidden_NTH=hidden, target_NTH=target)

    assert same(tuned(narrow)[2], tuned(rounded)[2])


def test_if_nothing_is_better_than_the_start_the_start_is_kept() -> None:
    def reached(data: Samples) -> Samples:
        """The target is what the start gives."""
        layer = Layer()
        with Workers(1) as workers, torch.no_grad():
            install(layer.module, layer.names, GRID, workers)
            layer.module.float()
            return replace(data, target_NTH=layer.run(torch.from_numpy(data.hidden_NTH)).numpy())

    _, result, codes = tuned(reached)
    assert result.iteration == 0
    assert result.loss == result.start_loss < 1e-9
    layer = Layer()
    for name, w in layer.weights(layer.names).items():
        expected = rounding.quantize(w, "BF16", GRID, layout="row")[0]
        np.testing.assert_array_equal(
            codes[name], np.hstack([packing.unpack(expected.words, 4, "row"), expected.scales])
        )


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_start() -> None:
    layer = Layer()
    data = samples(layer)
    target = data.target_NTH.copy()
    target[0, 3, 5] = np.nan  # sample 0 is no judge with this seed, so that it is met while tuning
    assert 0 not in np.random.Generator(np.random.PCG64([3, 7])).permutation(SAMPLES)[:1]
    with Workers(1) as workers:
        block = install(layer.module, layer.names, GRID, workers)
        layer.module.float()
        with pytest.raises(NonFiniteLoss, match="block 0: expected a finite loss, found nan"):
            tune_block(block, layer.run, replace(data, target_NTH=target), OPTIONS)
        weights = Layer().weights(layer.names)
        for stored in block.stored():
            expected = rounding.quantize(weights[stored.module], "BF16", GRID, layout="row")[0]
            np.testing.assert_array_equal(stored.codes.codes_OI, packing.unpack(expected.words, 4, "row"))


@pytest.mark.parametrize("reaching", ["none", "judge", "last"])
def test_experts_that_no_token_reaches_are_reported_and_stay_as_they_were(reaching: str) -> None:
    """Nor one that is learned from: windows that judge, and last positions, move nothing."""
    layer = Layer()
    layer.module.mlp.gate.weight.data[5] = 0
    layer.module.mlp.gate.weight.data[5, 0] = -1
    hidden = np.random.default_rng(0).standard_normal((SAMPLES, LENGTH, HIDDEN), np.float32)
    hidden[..., 0] = 40
    if reaching == "judge":
        hidden[np.random.Generator(np.random.PCG64([3, 7])).permutation(SAMPLES)[0], :3, 0] = -40
    if reaching == "last":
        hidden[:, -1, 0] = -40
    with Workers(1) as workers:
        block = install(layer.module, ["mlp.experts"], GRID, workers)
        layer.module.float()
        result = tune_block(block, layer.run, samples(layer, hidden), OPTIONS)
        assert 5 in result.unreached["mlp.experts"]
        assert len(result.unreached["mlp.experts"]) < EXPERTS
        weights = Layer().weights(["mlp.experts"])
        for stored in block.stored():
            expected = rounding.quantize(weights[stored.module], "BF16", GRID, layout="row")[0]
            equal = np.array_equal(stored.codes.codes_OI, packing.unpack(expected.words, 4, "row"))
            assert equal == (int(stored.module.split(".")[2]) in result.unreached["mlp.experts"])


def test_steps_add_up_to_what_the_rates_say() -> None:
    for iters in (1, 7, 50, 200, 1000):
        paces = list(tuning_block._paces(TuneOptions(seed=0, iters=iters)))
        assert len(paces) == iters
        walked = sum(pace.offset for pace in paces) / 2**15
        assert walked == pytest.approx(0.5 * (1 + 1 / iters), abs=2**-13)
        assert all(pace.offset % 4 == 0 and pace.offset >= 0 for pace in paces)
        assert paces[0].clip == pytest.approx(0.25 / iters)
        assert paces[-1].clip == pytest.approx(0.25 / iters**2)


def test_a_first_step_that_is_asked_for_is_the_first() -> None:
    for minmax_lr, first in ((None, 1 / 3200), (1 / 400, 1 / 400)):
        paces = list(tuning_block._paces(TuneOptions(seed=0, iters=200, lr=1 / 800, minmax_lr=minmax_lr)))
        assert paces[0].clip == pytest.approx(first)
        assert sum(pace.offset for pace in paces) / 2**15 == pytest.approx(0.125 * (1 + 1 / 200), abs=2**-13)
        assert sum(pace.clip for pace in paces) == pytest.approx(100 * first * (1 + 1 / 200), rel=1e-5)


def test_every_sample_comes_before_one_comes_again() -> None:
    halves = learning_order(8, 4, np.random.default_rng(0))
    for _ in range(3):
        assert sorted([*next(halves), *next(halves)]) == list(range(8))
    assert len(next(learning_order(3, 8, np.random.default_rng(0)))) == 3


def test_the_layer_needs_no_more_gradients_and_linear_layers_keep_their_bias() -> None:
    layer = torch.nn.Module()
    layer.inner = torch.nn.Linear(32, 32)
    bias = layer.inner.bias.detach().clone()
    with Workers(1) as workers:
        block = install(layer, ["inner"], Grid(group_size=32), workers)
        out = layer.inner(torch.zeros(2, 32))
    assert isinstance(block.modules["inner"], TunedLinear)
    torch.testing.assert_close(out.detach(), bias.expand(2, 32))
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("self_attn.q_proj", "module 'self_attn.q_proj': expected one of the layer's modules"),
        (
            "input_layernorm",
            "module 'input_layernorm': expected a linear layer or stacks of experts .*, found .*RMSNorm",
        ),
        ("mlp", "module 'mlp': expected a linear layer or stacks of experts .*, found Qwen3_5MoeSparseMoeBlock"),
    ],
)
def test_modules_that_cannot_be_tuned_are_refused(name: str, text: str) -> None:
    with Workers(1) as workers, pytest.raises(SchemeError, match=text):
        install(Layer().module, [name], GRID, workers)


def test_weights_that_cannot_be_rounded_are_refused_by_name() -> None:
    layer = Layer()
    layer.module.mlp.experts.down_proj.data[3, 2, 1] = torch.inf
    with (
        Workers(1) as workers,
        pytest.raises(ExecutionError, match=r"mlp\.experts\.down_proj \[8, 64, 32\]: .* row 194"),
    ):
        install(layer.module, layer.names, GRID, workers)


def test_samples_and_options_that_make_no_sense_are_refused() -> None:
    data = samples(Layer())
    with pytest.raises(SchemeError, match=r"found \[6, 12, 64\] and \[6, 11, 64\]"):
        replace(data, target_NTH=data.target_NTH[:, :-1])
    with pytest.raises(SchemeError, match="at least 2 positions"):
        replace(data, hidden_NTH=data.hidden_NTH[:, :1], target_NTH=data.target_NTH[:, :1])
    for name in ("iters", "batch_size"):
        with pytest.raises(SchemeError, match=f"{name}: expected at least 1, found 0"):
            replace(OPTIONS, **{name: 0})
    for name, first in product(("lr", "minmax_lr"), (0.0, 1.5, math.nan)):
        with pytest.raises(SchemeError, match=f"^{name}: expected more than 0 and at most 1, found {first}"):
            replace(OPTIONS, **{name: first})
