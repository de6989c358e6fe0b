"""The gated delta rule sample by sample: the same numbers, and a fraction of what is kept for the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling  # noqa: E402

from shardxform.tuning import linear_attention as module  # noqa: E402
from shardxform.tuning.linear_attention import one_by_one  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

RULE = modeling.torch_chunk_gated_delta_rule
SAMPLES, TOKENS, HEADS, WIDTH = 4, 96, 2, 16
WORKERS = Workers(2)


def inputs() -> list[Any]:
    random = torch.Generator().manual_seed(5)
    wide = [torch.randn(SAMPLES, TOKENS, HEADS, WIDTH, generator=random) for _ in range(3)]
    narrow = [torch.randn(SAMPLES, TOKENS, HEADS, generator=random) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (*wide, *narrow)]


def run(rule: Callable[..., Any], tensors: list[Any]) -> Any:
    q, k, v, g, beta = tensors
    out, state = rule(q, k, v, g=-g.exp(), beta=beta.sigmoid(), initial_state=None, use_qk_l2norm_in_kernel=True)
    assert state is None
    return out


def test_outputs_and_gradients_are_those_of_the_whole_batch() -> None:
    whole, apart = inputs(), inputs()
    expected, found = run(RULE, whole), run(one_by_one(RULE, WORKERS), apart)
    torch.testing.assert_close(found, expected)
    for out in (expected, found):
        out.square().sum().backward()
    for one, other in zip(apart, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_without_gradients_the_outputs_are_the_same_too() -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(one_by_one(RULE, WORKERS), inputs()), run(RULE, inputs()))
    constant = [tensor.detach() for tensor in inputs()]  # as where healing moves nothing before the rule
    torch.testing.assert_close(run(one_by_one(RULE, WORKERS), constant), run(RULE, constant))


def kept_bytes(call: Callable[[], object]) -> int:
    """What autograd holds after a call, each piece of memory counted once."""
    kept: list[Any] = []

    def keep(tensor: Any) -> Any:
        kept.append(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def test_only_the_inputs_are_kept_until_the_gradient_arrives() -> None:
    tensors = inputs()
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert kept_bytes(lambda: run(one_by_one(RULE, WORKERS), tensors)) <= 2 * nbytes
    assert kept_bytes(lambda: run(RULE, tensors)) > 5 * nbytes


def test_a_rule_that_carries_a_state_is_called_as_it_is() -> None:
    calls: list[int] = []

    def rule(q: Any, **_: object) -> tuple[Any, Any]:
        calls.append(len(q))
        return q, q

    one_by_one(rule, WORKERS)(inputs()[0], output_final_state=True)
    assert calls == [SAMPLES]


@pytest.mark.parametrize("samples", [1, 4])
def test_the_number_of_threads_changes_no_bit(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEADS_BYTES", 1)
    found = []
    for threads in (1, 3):
        tensors = [tensor.detach()[:samples].requires_grad_() for tensor in inputs()]
        tensors[1].requires_grad_(False)
        with Workers(threads) as workers:
            out = run(one_by_one(RULE, workers), tensors)
            out.square().sum().backward()
        assert tensors[1].grad is None
        found.append([out, *(tensor.grad for tensor in tensors if tensor.requires_grad)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_threads_work_on_different_parts_and_errors_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEADS_BYTES", 1)
    together = threading.Barrier(2, timeout=30)

    def rule(*tensors: Any, **named: Any) -> Any:
        together.wait()
        return RULE(*tensors, **named)

    with Workers(2) as workers:
        out = run(one_by_one(rule, workers), inputs())
        out.sum().backward()  # forgotten parts are made again, two at a time as well
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            run(one_by_one(lambda *_, **__: (1 / 0, None), workers), inputs())


@pytest.mark.parametrize(
    ("positions", "cpu", "device"), [(1, 1, 1), (32, 1, 1), (33, 2, 1), (65, 4, 1), (512, 16, 1), (9000, 16, 4)]
)
def test_windows_are_as_many_as_memory_asks_for_and_divide_the_key_heads(positions: int, cpu: int, device: int) -> None:
    for where, expected in (("cpu", cpu), ("meta", device)):
        key_BTGD, value_BTVW = (torch.empty(8, positions, heads, 128, device=where) for heads in (16, 32))
        assert module._windows(key_BTGD, value_BTVW) == expected
