"""Linear attention of a layer that is tuned: transformers' outputs and gradients, and a fraction of what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from test_one_by_one import kept_bytes  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling  # noqa: E402

from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.tuning import linear_attention as module  # noqa: E402
from shardxform.tuning.delta_rule import gated_delta_rule  # noqa: E402
from shardxform.tuning.linear_attention import frugal_linear_attention, row_by_row, storing_the_input  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

RULE, CONVOLUTION = modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn
WORKERS = Workers(2)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def layer_of(small_moe: Path, dtype: Any = torch.float32) -> Any:
    config = AutoConfig.from_pretrained(small_moe).get_text_config()
    torch.manual_seed(3)
    layer = modeling.Qwen3_5MoeGatedDeltaNet(config, 0).eval().to(dtype)
    return layer.requires_grad_(False)


def hidden_for(layer: Any, samples: int = 4, positions: int = 96) -> Any:
    random = torch.Generator().manual_seed(6)
    hidden_BTH = torch.randn(samples, positions, layer.hidden_size, generator=random)
    return hidden_BTH.to(layer.out_proj.weight.dtype).requires_grad_()


# -- a layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_gradients_are_those_of_transformers_and_little_is_kept(small_moe: Path, dtype: Any) -> None:
    layer = layer_of(small_moe, dtype)
    theirs_BTH, ours_BTH = hidden_for(layer), hidden_for(layer)
    expected, whole = layer(theirs_BTH), kept_bytes(lambda: layer(theirs_BTH))
    with frugal_linear_attention(layer, WORKERS):
        assert modeling.torch_chunk_gated_delta_rule is not RULE
        assert modeling.causal_conv1d_fn is not CONVOLUTION
        assert "forward" in layer.norm.__dict__
        found = layer(ours_BTH, use_cache=False)  # as the model calls it
        assert 3 * kept_bytes(lambda: layer(ours_BTH, use_cache=False)) < whole
        found.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(found, expected)
    scale = theirs_BTH.grad.float().abs().max()
    torch.testing.assert_close(ours_BTH.grad / scale, theirs_BTH.grad / scale, rtol=0, atol=TOLERANCE[dtype])


def test_a_block_that_the_model_calls_goes_through_all_three(small_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(module, "gated_delta_rule", counted("rule", gated_delta_rule))
    for name, function in {"conv": module._Convolution, "norm": module._RowByRow}.items():
        monkeypatch.setattr(function, "backward", staticmethod(counted(name, function.backward)))
    with Weights(Checkpoint.open(small_moe), Precision(torch.device("cpu"), torch.float32)) as weights:
        skeleton = Skeleton(weights)
        hidden_BTH = skeleton.embed(torch.arange(18).view(2, 9)).detach().requires_grad_()
        with skeleton.tunable(0, ()) as block, frugal_linear_attention(block.module, WORKERS):
            block.module.requires_grad_(False)
            block(hidden_BTH).sum().backward()
    assert {"conv", "rule", "norm"} == set(calls)


def test_afterwards_and_after_errors_all_is_as_it_was(small_moe: Path) -> None:
    layer = layer_of(small_moe)
    for error in (False, True):
        with pytest.raises(KeyError) if error else frugal_linear_attention(layer, WORKERS):
            if error:
                with frugal_linear_attention(layer, WORKERS):
                    raise KeyError
        assert modeling.torch_chunk_gated_delta_rule is RULE
        assert modeling.causal_conv1d_fn is CONVOLUTION
        assert "forward" not in layer.norm.__dict__


def test_a_layer_of_other_attention_changes_nothing() -> None:
    with frugal_linear_attention(torch.nn.Linear(2, 2), WORKERS):
        assert modeling.torch_chunk_gated_delta_rule is RULE


def test_the_kernel_of_fla_is_left_alone(monkeypatch: pytest.MonkeyPatch, small_moe: Path) -> None:
    monkeypatch.setattr(module, "find_spec", {"fla": object()}.get)
    with frugal_linear_attention(layer_of(small_moe), WORKERS):
        assert modeling.torch_chunk_gated_delta_rule is RULE


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_layer_is_given_our_rule_only_if_it_agrees(
    factor: float, monkeypatch: pytest.MonkeyPatch, small_moe: Path
) -> None:
    def theirs(*args: Any, **kwargs: Any) -> tuple[Any, None]:
        return RULE(*args, **kwargs)[0] * factor, None

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", theirs)
    layer = layer_of(small_moe)
    expected = layer(hidden_for(layer))
    with frugal_linear_attention(layer, WORKERS):
        used = modeling.torch_chunk_gated_delta_rule.__wrapped__  # type: ignore[attr-defined]
        torch.testing.assert_close(layer(hidden_for(layer)), expected)
    assert used is (gated_delta_rule if factor == 1 else theirs)


# -- the convolution --------------------------------------------------------------------------------------------------


def kernel(channels: int, bias: bool, dtype: Any) -> tuple[Any, Any]:
    random = torch.Generator().manual_seed(channels)
    weight_CK = torch.randn(channels, 4, generator=random).to(dtype)
    return weight_CK, torch.randn(channels, generator=random).to(dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("positions", [1, 2, 3, 4, 50])
def test_the_convolutions_gradient_is_that_of_torch(
    positions: int, dtype: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHANNELS_BYTES", 4 * 50 * 5)  # five channels of 50 positions
    weight_CK, bias_C = kernel(12, bias, dtype)
    random = torch.Generator().manual_seed(positions)
    x_BTC, g_BCT = (torch.randn(2, *size, generator=random).to(dtype) for size in ((positions, 12), (12, positions)))
    gradients = []
    for convolve in (CONVOLUTION, storing_the_input(CONVOLUTION, WORKERS)):
        x_BTC = x_BTC.detach().requires_grad_()
        out_BCT = convolve(x_BTC.transpose(1, 2), weight_CK, bias_C, activation="silu")
        out_BCT.backward(g_BCT)
        gradients.append((out_BCT.detach(), x_BTC.grad))
    (expected, expected_grad), (found, found_grad) = gradients
    assert torch.equal(found, expected)
    scale = expected_grad.abs().max()
    assert found_grad.dtype == dtype
    torch.testing.assert_close(found_grad / scale, expected_grad / scale, rtol=0, atol=TOLERANCE[dtype])


def test_only_the_input_of_the_convolution_is_kept() -> None:
    weight_CK, _ = kernel(12, bias=False, dtype=torch.float32)
    x_BCT = torch.randn(2, 12, 500, requires_grad=True)

    def kept(convolve: Callable[..., Any]) -> int:
        return kept_bytes(lambda: convolve(x_BCT, weight_CK, activation="silu", use_cache=False, seq_idx=None))

    assert kept(storing_the_input(CONVOLUTION, WORKERS)) == (x_BCT.numel() + weight_CK.numel()) * 4
    assert kept(CONVOLUTION) > 1.9 * kept(storing_the_input(CONVOLUTION, WORKERS))


@pytest.mark.parametrize("what", ["no activation", "another", "weight", "bias", "no gradient", "a tensor", "a wish"])
def test_other_convolutions_are_called_as_they_are(what: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def convolve(x: Any, weight: Any, bias: Any, **options: Any) -> Any:
        calls.append((x.requires_grad and torch.is_grad_enabled(), options))
        return CONVOLUTION(x, weight, bias, activation=options["activation"])

    weight_CK, bias_C = kernel(12, bias=True, dtype=torch.float32)
    x_BCT = torch.randn(2, 12, 9, requires_grad=what != "no gradient")
    weight_CK.requires_grad_(what == "weight")
    assert bias_C is not None
    bias_C.requires_grad_(what == "bias")
    activation = {"no activation": None, "another": "gelu"}.get(what, "silu")
    more = {"a tensor": {"seq_idx": torch.zeros(2, 9)}, "a wish": {"return_final_states": True}}.get(what, {})
    storing_the_input(convolve, WORKERS)(x_BCT, weight_CK, bias_C, activation=activation, **more)
    ((wants, options),) = calls
    assert options == {"activation": activation, **more}
    assert wants == (what != "no gradient")  # by autograd itself, not by a function of ours


# -- the norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_the_norm_of_pieces_is_the_norm(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_BYTES", 4 * 16 * 7)  # seven rows
    norm = modeling.Qwen3_5MoeRMSNormGated(16)
    torch.nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(trained)
    random = torch.Generator().manual_seed(1)
    hidden_RW, gate_RW, g_RW = (torch.randn(30, 16, generator=random) for _ in range(3))
    found = []
    for forward in (norm, row_by_row(norm, WORKERS)):
        inputs = [x.detach().requires_grad_() for x in (hidden_RW, gate_RW)]
        wanted = [*inputs, norm.weight] if trained else inputs
        out_RW = forward(*inputs)
        found.append((out_RW, *torch.autograd.grad(out_RW, wanted, g_RW)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(row_by_row(norm, WORKERS)(hidden_RW, gate_RW), norm(hidden_RW, gate_RW))


def test_only_the_inputs_of_the_norm_are_kept() -> None:
    norm = modeling.Qwen3_5MoeRMSNormGated(16).requires_grad_(False)
    inputs = [torch.randn(3000, 16, requires_grad=True) for _ in range(2)]
    assert kept_bytes(lambda: row_by_row(norm, WORKERS)(*inputs)) == 2 * 4 * 3000 * 16
    assert kept_bytes(lambda: norm(*inputs)) > 3 * 4 * 3000 * 16
