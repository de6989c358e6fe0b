"""The gated delta rule in chunks: transformers' numbers, and work that grows with the length alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling  # noqa: E402

from shardxform.tuning import linear_attention as module  # noqa: E402
from shardxform.tuning.delta_rule import computes_the_same, gated_delta_rule  # noqa: E402
from shardxform.tuning.linear_attention import one_by_one  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

RULE = modeling.torch_chunk_gated_delta_rule


def inputs(positions: int, samples: int = 2, dtype: Any = torch.float32) -> dict[str, Any]:
    random = torch.Generator().manual_seed(positions)
    query, key = (torch.randn(samples, positions, 2, 16, generator=random).to(dtype) for _ in range(2))
    value = torch.randn(samples, positions, 6, 8, generator=random).to(dtype)
    g, beta = -torch.rand(samples, positions, 6, generator=random), torch.rand(samples, positions, 6, generator=random)
    named = {"query": query, "key": key / 4, "value": value, "g": g, "beta": beta.to(dtype)}
    return {name: tensor.requires_grad_() for name, tensor in named.items()}


def run(rule: Callable[..., Any], tensors: dict[str, Any], norm: bool = True) -> Any:
    named = dict(tensors)
    positional = [named.pop(name) for name in ("query", "key", "value")]
    out, state = rule(*positional, **named, initial_state=None, use_qk_l2norm_in_kernel=norm, cu_seqlens=None)
    assert state is None
    return out


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 63, 64, 65, 200])
def test_outputs_and_gradients_are_those_of_transformers(positions: int, dtype: Any, norm: bool) -> None:
    ours = inputs(positions, dtype=dtype)
    theirs = {name: tensor.detach().float().requires_grad_() for name, tensor in ours.items()}
    expected, found = run(RULE, theirs, norm), run(gated_delta_rule, ours, norm)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype))
    arriving = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found.backward(arriving)
    expected.backward(arriving.float())
    for name, tensor in ours.items():
        assert tensor.grad.dtype == tensor.dtype
        scale = theirs[name].grad.abs().max().clamp(min=1)
        one, other = (x.grad.float() / scale for x in (tensor, theirs[name]))
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if tensor.dtype == torch.float32 else {"rtol": 0.005, "atol": 1e-5}
        torch.testing.assert_close(one, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("value", ["beta", "g"])
@pytest.mark.parametrize("extreme", [0.0, -200.0])
def test_gradients_are_those_of_transformers_at_extremes(value: str, extreme: float) -> None:
    """Betas of nothing, decays of nothing, and decays to nothing."""
    ours = inputs(130)
    with torch.no_grad():
        ours[value][:, 5:90] = extreme if value == "g" else 0.0
    theirs = {name: tensor.detach().clone().requires_grad_() for name, tensor in ours.items()}
    for rule, tensors in ((RULE, theirs), (gated_delta_rule, ours)):
        run(rule, tensors).square().sum().backward()
    for name, tensor in ours.items():
        scale = theirs[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(tensor.grad / scale, theirs[name].grad / scale, rtol=1e-4, atol=1e-5)


class _Written(TorchDispatchMode):
    """Counts elements of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


def written(rule: Callable[..., Any], positions: int) -> int:
    with _Written() as mode:
        run(rule, inputs(positions)).sum().backward()
    return mode.elements


def test_work_grows_with_the_length_and_not_with_its_square() -> None:
    assert written(gated_delta_rule, 2048) < 8.5 * written(gated_delta_rule, 256)
    assert written(RULE, 2048) > 16 * written(RULE, 256)


def test_a_rule_of_other_numbers_is_told_apart() -> None:
    def other(*args: Any, **kwargs: Any) -> tuple[Any, None]:
        return RULE(*args, **kwargs)[0] * 1.001, None

    def unnormed(*args: Any, **kwargs: Any) -> tuple[Any, None]:
        return RULE(*args, **{**kwargs, "use_qk_l2norm_in_kernel": False})[0], None

    def as_many_heads(query: Any, key: Any, value: Any, **kwargs: Any) -> tuple[Any, None]:
        return RULE(query, key, value + 0 * key[..., :1], **kwargs)[0], None

    def unnamed(query: Any, key: Any, value: Any, decay: Any, beta: Any) -> Any:
        return RULE(query, key, value, decay, beta)

    assert computes_the_same(RULE)
    assert not computes_the_same(as_many_heads)
    assert not computes_the_same(unnamed)
    assert not computes_the_same(other)
    assert not computes_the_same(unnormed)


def test_windows_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, apart = inputs(130), inputs(130)
    monkeypatch.setattr(module, "_HEADS_BYTES", 1)
    calls: list[int] = []

    def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return gated_delta_rule(query, *args, **kwargs)

    expected, found = run(RULE, whole), run(one_by_one(counted, Workers(1)), apart)
    assert calls == [1, 1, 1, 1]  # two samples of two key heads, each with its three value heads
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        out.square().sum().backward()
    for name, tensor in apart.items():
        torch.testing.assert_close(tensor.grad, whole[name].grad)
