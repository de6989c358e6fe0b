"""Types of tensors in a file, against what llama-quantize of llama.cpp at commit 0c1e57098 made of files of zeros."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.mixes import KINDS, MixFacts, mixed

Shapes = dict[str, tuple[int, ...]]


def shapes(
    arch: str, blocks: int, experts: int, hidden: int = 256, inner: int = 256, tied: bool = False, dense: int = 0
) -> Shapes:
    """What a file has, by llama.cpp's names: the slowest dimension first."""
    found: Shapes = {"token_embd.weight": (64, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        found["output.weight"] = (64, hidden)
    for block in range(blocks):
        for name, shape in block_shapes(arch, block, experts if block >= dense else 0, hidden, inner):
            found[f"blk.{block}.{name}"] = shape
    return found


def block_shapes(arch: str, block: int, experts: int, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm.weight", (hidden,)
    if arch == "qwen35moe" and (block + 1) % 4:
        yield from (("attn_qkv.weight", (512, hidden)), ("attn_gate.weight", (256, hidden)), ("ssm_a", (4,)))
        yield from (("ssm_alpha.weight", (4, hidden)), ("ssm_beta.weight", (4, hidden)), ("ssm_dt.bias", (4,)))
        yield from (("ssm_conv1d.weight", (512, 4)), ("ssm_norm.weight", (64,)), ("ssm_out.weight", (hidden, 256)))
    elif arch == "deepseek2":
        yield from (("attn_q_a.weight", (128, hidden)), ("attn_q_b.weight", (384, 128)))
        yield from (("attn_kv_a_mqa.weight", (288, hidden)), ("attn_k_b.weight", (4, 256, 64)))
        yield from (("attn_v_b.weight", (4, 64, 256)), ("attn_output.weight", (hidden, 256)))
    else:
        yield from (("attn_q.weight", (256, hidden)), ("attn_k.weight", (128, hidden)))
        yield from (("attn_v.weight", (128, hidden)), ("attn_output.weight", (hidden, 256)))
    if not experts:
        yield from (("ffn_gate.weight", (inner, hidden)), ("ffn_up.weight", (inner, hidden)))
        yield "ffn_down.weight", (hidden, inner)
        return
    yield "ffn_gate_inp.weight", (experts, hidden)
    yield from ((f"ffn_{name}_exps.weight", (experts, inner, hidden)) for name in ("gate", "up"))
    yield "ffn_down_exps.weight", (experts, hidden, inner)
    if arch != "qwen3moe":
        yield from ((f"ffn_{name}_shexp.weight", (inner, hidden)) for name in ("gate", "up"))
        yield "ffn_down_shexp.weight", (hidden, inner)
    if arch == "qwen35moe":
        yield "ffn_gate_inp_shexp.weight", (hidden,)


MODELS: dict[str, tuple[Shapes, MixFacts]] = {
    "hybrid": (
        shapes("qwen35moe", 12, 16),
        MixFacts(architecture="qwen35moe", blocks=12, experts=16, shared_heads=2),
    ),
    "eight": (shapes("qwen35moe", 9, 8), MixFacts(architecture="qwen35moe", blocks=9, experts=8, shared_heads=2)),
    "tied": (
        shapes("qwen3moe", 17, 16, tied=True),
        MixFacts(architecture="qwen3moe", blocks=17, experts=16, shared_heads=2),
    ),
    "narrow": (
        shapes("qwen3moe", 8, 16, hidden=192, inner=80),
        MixFacts(architecture="qwen3moe", blocks=8, experts=16, shared_heads=2),
    ),
    "latent": (
        shapes("deepseek2", 16, 16, dense=3),
        MixFacts(architecture="deepseek2", blocks=16, experts=16, shared_heads=4),
    ),
}

# Last parts of names, with the blocks where it is not all that have it; what is not listed stayed F32.
CHOSEN = {
    ("hybrid", "Q4_K_M"): """
    Q4_K: attn_gate attn_k attn_output attn_q attn_qkv:1-2,4-5,8 attn_v:7 ffn_down_exps:1-2,4-5,7-8
        ffn_down_shexp:1-2,4-5,7-8 ffn_gate_exps ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta
        ssm_out token_embd
    Q6_K: attn_qkv:0,6,9-10 attn_v:3,11 ffn_down_exps:0,3,6,9-11 ffn_down_shexp:0,3,6,9-11 output
    """,
    ("hybrid", "Q5_K_M"): """
    Q5_K: attn_gate attn_k attn_output attn_q attn_qkv:1-2,4-5,8 attn_v:7 ffn_down_exps:1-2,4-5,7-8
        ffn_down_shexp:1-2,4-5,7-8 ffn_gate_exps ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta
        ssm_out token_embd
    Q6_K: attn_qkv:0,6,9-10 attn_v:3,11 ffn_down_exps:0,3,6,9-11 ffn_down_shexp:0,3,6,9-11 output
    """,
    ("hybrid", "Q4_K_S"): """
    Q4_K: attn_gate attn_k attn_output attn_q attn_qkv:4-6,8-10 attn_v:7,11 ffn_down_exps:1-11
        ffn_down_shexp:1-11 ffn_gate_exps ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta ssm_out
        token_embd
    Q5_K: attn_qkv:0-2 attn_v:3 ffn_down_exps:0 ffn_down_shexp:0
    Q6_K: output
    """,
    ("hybrid", "IQ4_NL"): """
    IQ4_NL: attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down_exps:1-11 ffn_down_shexp:1-11
        ffn_gate_exps ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q5_K: ffn_down_exps:0 ffn_down_shexp:0
    Q6_K: output
    """,
    ("hybrid", "MXFP4_MOE"): """
    MXFP4: ffn_down_exps ffn_gate_exps ffn_up_exps
    Q8_0: attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down_shexp ffn_gate_shexp ffn_up_shexp output
        ssm_alpha ssm_beta ssm_out token_embd
    """,
    ("hybrid", "Q4_0"): """
    Q4_0: attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down_exps ffn_down_shexp ffn_gate_exps
        ffn_gate_shexp ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q6_K: output
    """,
    ("hybrid", "F16"): """
    F16: attn_gate attn_k attn_output attn_q attn_qkv attn_v ffn_down_exps ffn_down_shexp ffn_gate_exps
        ffn_gate_shexp ffn_up_exps ffn_up_shexp output ssm_alpha ssm_beta ssm_out token_embd
    """,
    ("eight", "Q4_K_M"): """
    Q4_K: attn_gate attn_q ffn_down_exps:1-2,4-5 ffn_down_shexp:1-2,4-5 ffn_gate_exps ffn_gate_shexp ffn_up_exps
        ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q5_K: attn_output
    Q6_K: ffn_down_exps:0,3,6-8 ffn_down_shexp:0,3,6-8 output
    Q8_0: attn_k attn_qkv attn_v
    """,
    ("eight", "Q5_K_M"): """
    Q5_K: attn_gate attn_output attn_q ffn_down_exps:1-2,4-5 ffn_down_shexp:1-2,4-5 ffn_gate_exps ffn_gate_shexp
        ffn_up_exps ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q6_K: ffn_down_exps:0,3,6-8 ffn_down_shexp:0,3,6-8 output
    Q8_0: attn_k attn_qkv attn_v
    """,
    ("eight", "Q4_K_S"): """
    Q4_K: attn_gate attn_q ffn_down_exps:1-8 ffn_down_shexp:1-8 ffn_gate_exps ffn_gate_shexp ffn_up_exps
        ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q5_K: attn_output ffn_down_exps:0 ffn_down_shexp:0
    Q6_K: output
    Q8_0: attn_k attn_qkv attn_v
    """,
    ("eight", "IQ4_NL"): """
    IQ4_NL: attn_gate attn_q ffn_down_exps:1-8 ffn_down_shexp:1-8 ffn_gate_exps ffn_gate_shexp ffn_up_exps
        ffn_up_shexp ssm_alpha ssm_beta ssm_out token_embd
    Q5_K: attn_output ffn_down_exps:0 ffn_down_shexp:0
    Q6_K: output
    Q8_0: attn_k attn_qkv attn_v
    """,
    ("tied", "Q4_K_M"): """
    Q4_K: attn_k attn_output attn_q attn_v:2-3,5-6,8-9,11-12 ffn_down_exps:2-3,5-6,8-9,11-12 ffn_gate_exps
        ffn_up_exps
    Q6_K: attn_v:0-1,4,7,10,13-16 ffn_down_exps:0-1,4,7,10,13-16 token_embd
    """,
    ("tied", "Q5_K_M"): """
    Q5_K: attn_k attn_output attn_q attn_v:2-3,5-6,8-9,11-12 ffn_down_exps:2-3,5-6,8-9,11-12 ffn_gate_exps
        ffn_up_exps
    Q6_K: attn_v:0-1,4,7,10,13-16 ffn_down_exps:0-1,4,7,10,13-16 token_embd
    """,
    ("tied", "Q8_0"): """
    Q8_0: attn_k attn_output attn_q attn_v ffn_down_exps ffn_gate_exps ffn_up_exps token_embd
    """,
    ("narrow", "Q4_K_M"): """
    F16: ffn_down_exps
    Q4_K: attn_output
    Q5_0: attn_k attn_q attn_v:1-2,4-5 ffn_gate_exps ffn_up_exps token_embd
    Q8_0: attn_v:0,3,6-7 output
    """,
    ("narrow", "Q5_K_M"): """
    F16: ffn_down_exps
    Q5_1: attn_k attn_q attn_v:1-2,4-5 ffn_gate_exps ffn_up_exps token_embd
    Q5_K: attn_output
    Q8_0: attn_v:0,3,6-7 output
    """,
    ("narrow", "Q6_K"): """
    F16: ffn_down_exps
    Q6_K: attn_output
    Q8_0: attn_k attn_q attn_v ffn_gate_exps ffn_up_exps output token_embd
    """,
    ("latent", "Q4_K_M"): """
    Q4_K: attn_kv_a_mqa attn_output attn_q_a attn_v_b ffn_down:2 ffn_down_exps:3,5-6,8-9,11-12
        ffn_down_shexp:3,5-6,8-9,11-12 ffn_gate ffn_gate_exps ffn_gate_shexp ffn_up ffn_up_exps ffn_up_shexp
        token_embd
    Q5_0: attn_k_b attn_q_b
    Q6_K: ffn_down:0-1 ffn_down_exps:4,7,10,13-15 ffn_down_shexp:4,7,10,13-15 output
    """,
    ("latent", "Q5_K_M"): """
    Q5_1: attn_k_b attn_q_b
    Q5_K: attn_kv_a_mqa attn_output attn_q_a attn_v_b ffn_down:2 ffn_down_exps:3,5-6,8-9,11-12
        ffn_down_shexp:3,5-6,8-9,11-12 ffn_gate ffn_gate_exps ffn_gate_shexp ffn_up ffn_up_exps ffn_up_shexp
        token_embd
    Q6_K: ffn_down:0-1 ffn_down_exps:4,7,10,13-15 ffn_down_shexp:4,7,10,13-15 output
    """,
}


def listed(text: str, found: Shapes) -> dict[str, str]:
    """Types by the names that a listing means."""
    out: dict[str, str] = {}
    type_name = ""
    for word in text.split():
        if word.endswith(":"):
            type_name = word[:-1]
            continue
        last, _, blocks = word.partition(":")
        for name in found:
            match = re.fullmatch(rf"(?:blk\.(\d+)\.)?{last}\.weight", name)
            if match and (not blocks or int(match[1]) in numbers(blocks)):
                assert name not in out
                out[name] = type_name
    return out


def numbers(text: str) -> set[int]:
    ends = (part.split("-") for part in text.split(","))
    return {number for first, *last in ends for number in range(int(first), int((last or [first])[0]) + 1)}


@pytest.mark.parametrize(("model", "kind"), CHOSEN)
def test_types_are_those_that_llama_quantize_chose(model: str, kind: str) -> None:
    found, facts = MODELS[model]
    wanted = listed(CHOSEN[model, kind], found)
    assert len(wanted) > 20
    assert mixed(kind, found, facts) == wanted
    assert mixed(kind, dict(reversed(found.items())), facts) == wanted  # whatever the order in which they are given


def test_heads_that_share_a_value_get_more_in_iq4_nl() -> None:
    found, facts = MODELS["tied"]
    chosen = mixed("IQ4_NL", found, MixFacts(architecture="qwen3moe", blocks=17, experts=16, shared_heads=4))
    assert {chosen[f"blk.{block}.attn_v.weight"] for block in range(17)} == {"Q5_K"}
    assert mixed("IQ4_NL", found, facts)["blk.5.attn_v.weight"] == "IQ4_NL"


def test_numbers_of_kinds_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for name, kind in KINDS.items():
        known = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
        if hasattr(gguf.LlamaFileType, known):
            assert gguf.LlamaFileType[known] == kind.number


def test_what_is_not_known_is_refused() -> None:
    found, facts = MODELS["tied"]
    with pytest.raises(SchemeError, match=r"expected one of F32, F16, Q4_0, .* found 'Q3_K_M'"):
        mixed("Q3_K_M", found, facts)
    other = MixFacts(architecture="falcon", blocks=17, experts=0, shared_heads=1)
    with pytest.raises(SchemeError, match="Q4_K_M: llama-quantize has rules of its own for falcon"):
        mixed("Q4_K_M", found, other)
    assert set(mixed("F16", found, other).values()) == {"F16"}
