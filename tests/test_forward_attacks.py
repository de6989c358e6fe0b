"""Attacks on score and evaluate: weights that are no numbers, lying configs, failing disks, paths in the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import KINDS, Raw, bf16, tiny, write_checkpoint
from click.testing import CliRunner, Result
from faults import Crashing, Failing

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.base.file_system import FileSystem  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import CheckpointError, ExecutionError, Interrupted, OutputError, ResumeError, ShardxformError  # noqa: E402
from shardxform.evaluation.evaluate import EvaluateOptions, Evaluation, evaluate  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.experts import Saliency, scoring  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.formats.scheme import Scheme  # noqa: E402
from shardxform.forward import work as work_module  # noqa: E402
from shardxform.forward.passes import estimate  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.forward.work import WorkDir  # noqa: E402
from shardxform.plan.convert import Target, plan_convert  # noqa: E402
from shardxform.plan.quantize import plan_quantize  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
Tensors = dict[str, Raw]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)


def windows_of(config: dict[str, Any], count: int = 2, length: int = 12) -> Windows:
    vocab = config.get("text_config", config)["vocab_size"]
    ids = np.random.default_rng(0).integers(1, vocab, (count, length)).astype(np.int32)
    return Windows(ids_NT=ids, fingerprint="f", provenance={}, notes=())


def run_score(path: Path, config: dict[str, Any], work: Path) -> Saliency:
    return score(Checkpoint.open(path), windows_of(config), ScoreOptions(precision=FLOAT32, work=work))


def run_evaluate(path: Path, config: dict[str, Any], work: Path, precision: Precision = FLOAT32) -> Evaluation:
    return evaluate(Checkpoint.open(path), windows_of(config), EvaluateOptions(precision=precision, work=work))


def spoiled(tensor: Raw, value: float) -> Raw:
    """The tensor with its first row, or element, replaced."""
    values = tensor.float32().copy()
    values[0] = value
    return bf16(values) if tensor.dtype == "BF16" else Raw("F32", tensor.shape, values.tobytes())


# -- weights that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.2.self_attn.k_norm.weight"),  # attention would make zeros of its NaN
        ("qwen3_moe", "model.layers.2.mlp.experts.1.down_proj.weight"),
        ("qwen3_6_moe", "mtp.layers.0.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_tensor_that_holds_no_numbers_is_named(tmp_path: Path, kind: str, name: str, value: float) -> None:
    config, tensors = tiny(kind)
    tensors[name] = spoiled(tensors[name], value)
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with pytest.raises(ExecutionError, match=rf"'{name}' holds NaN or infinity"):
        run_score(path, config, tmp_path / "w")


def test_weights_whose_sum_overflows_are_numbers_all_the_same(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    name = "model.norm.weight"
    tensors[name] = bf16(np.full(tensors[name].shape, 3e38, np.float32))
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with Weights(Checkpoint.open(path), FLOAT32) as weights:
        assert weights.tensor(name).isfinite().all()


def test_a_head_without_numbers_is_named(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    path = write_checkpoint(
        tmp_path / "x", {**tensors, "lm_head.weight": spoiled(tensors["lm_head.weight"], 0)}, config
    )
    assert np.isfinite(run_evaluate(path, config, tmp_path / "w").perplexity)
    head = bf16(tensors["lm_head.weight"].float32() * np.float32(1e37))
    norm = bf16(tensors["model.norm.weight"].float32() * np.float32(1e3))
    path = write_checkpoint(tmp_path / "y", {**tensors, "lm_head.weight": head, "model.norm.weight": norm}, config)
    with pytest.raises(ExecutionError, match=r"output head: 'loss tested' is (nan|inf) in window 0"):
        run_evaluate(path, config, tmp_path / "w2")


@pytest.mark.parametrize("run_it", [run_score, run_evaluate])
def test_a_model_that_overflows_is_told_by_its_block(tmp_path: Path, run_it: Callable[..., object]) -> None:
    config, tensors = tiny("qwen3_moe")
    for name in tensors:
        if name.startswith("model.layers.1.mlp.experts"):
            tensors[name] = bf16(tensors[name].float32() * np.float32(1e30))
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with pytest.raises(ExecutionError, match=r"block 1: what leaves it is not finite at position \d+ of window 0"):
        run_it(path, config, tmp_path / "w")


def test_norms_that_overflow_are_told_though_the_block_does_not(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    for name in tensors:
        if name.startswith("model.layers.1.mlp.experts") and "down_proj" in name:
            tensors[name] = bf16(tensors[name].float32() * np.float32(1e30))
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with pytest.raises(ExecutionError, match=r"block 1: 'reap' of expert \d is inf"):
        run_score(path, config, tmp_path / "w")


def test_figures_that_are_not_finite_are_never_recorded(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", {}) as work:
        with pytest.raises(ExecutionError, match="head 0: what it gave is not finite"):
            work.record("head 0", {"loss": [float("nan")]})
        assert not work.steps
    assert json.loads((tmp_path / "w" / "progress.json").read_text())["steps"] == {}


def test_a_model_of_zeros_is_no_error(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    zeros = {name: Raw(t.dtype, t.shape, bytes(len(t.data))) for name, t in tensors.items()}
    paths = [write_checkpoint(tmp_path / name, each, config) for name, each in (("zero", zeros), ("some", tensors))]
    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "w")
    zero, some = map(Checkpoint.open, paths)
    for tested, error in ((zero, 0.0), (some, np.inf)):
        found = evaluate(tested, windows_of(config), options, zero).against
        assert found is not None
        assert found.block_errors == (error,) * 3


# -- configs and tensors that lie -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen3_moe", {"hidden_size": "16"}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "magic"}}),
        ("qwen3_moe", {"layer_types": ["full_attention"]}),
        ("qwen3_moe", {"num_attention_heads": 10**15}),
        ("qwen3_5_moe_text", {"num_hidden_layers": 3}),
        ("qwen3_5_moe_text", {"layer_types": ["full_attention"] * 5}),
        ("qwen3_5_moe_text", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 3}}),
        ("deepseek_v3", {"num_key_value_heads": 1}),
        ("deepseek_v3", {"n_group": None}),
        ("deepseek_v3", {"rope_theta": 0}),
        ("deepseek_v3", {"routed_scaling_factor": 1e308}),
        ("deepseek_v3", {"model_type": "qwen3_moe"}),
    ],
)
def test_a_config_that_lies_is_refused_in_a_line(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    config, tensors = tiny(kind)
    path = write_checkpoint(tmp_path / "x", tensors, {**config, **change})
    with pytest.raises(ShardxformError) as caught:
        run_evaluate(path, config, tmp_path / "w")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_what_a_config_says_besides_the_model_changes_nothing(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    besides = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_router_logits": True,
        "pad_token_id": 10**9,
        "torch_dtype": "float99",
        "_attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    }
    plain = run_evaluate(write_checkpoint(tmp_path / "x", tensors, config), config, tmp_path / "w")
    odd = write_checkpoint(tmp_path / "y", tensors, {**config, **besides})
    assert run_evaluate(odd, config, tmp_path / "w") == plain


def cut_in_half(tensor: Raw) -> Raw:
    return Raw(tensor.dtype, (tensor.shape[0] // 2, *tensor.shape[1:]), tensor.data[: len(tensor.data) // 2])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.2.self_attn.q_norm.weight",
    ],
)
def test_misshapen_and_missing_tensors_are_named_before_anything_is_run(tmp_path: Path, name: str) -> None:
    config, tensors = tiny("qwen3_moe")
    for number, tensor in enumerate((cut_in_half(tensors[name]), None)):
        each = {**tensors, name: tensor} if tensor else {n: t for n, t in tensors.items() if n != name}
        path = write_checkpoint(tmp_path / f"{number}", each, config)
        with pytest.raises(CheckpointError, match=rf"'{name}'|block 2: 5 of 6 tensors of experts' down_proj"):
            run_evaluate(path, config, tmp_path / "w")
        assert not (tmp_path / "w").exists()


def test_experts_that_are_not_there_or_have_other_numbers_are_refused(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    none = {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n}
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.experts\.gate_up_proj' is missing"):
        run_score(write_checkpoint(tmp_path / "none", none, config), config, tmp_path / "w")
    beyond = {n.replace("experts.3.", "experts.99."): t for n, t in tensors.items()}
    with pytest.raises(CheckpointError, match="5 of 6 tensors of experts' gate_proj"):
        run_score(write_checkpoint(tmp_path / "beyond", beyond, config), config, tmp_path / "w")


def test_a_misshapen_mtp_layer_is_found_before_the_blocks_are_run(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_6_moe")
    tensors["mtp.fc.weight"] = cut_in_half(tensors["mtp.fc.weight"])
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with pytest.raises(CheckpointError, match=r"'mtp\.fc\.weight': shape"):
        run_score(path, config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert np.isfinite(run_evaluate(path, config, tmp_path / "w").perplexity)  # which does not run it


def test_windows_of_two_tokens_are_enough_for_an_mtp_layer(tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3")
    path = write_checkpoint(tmp_path / "x", tensors, config)
    options = ScoreOptions(precision=FLOAT32, work=tmp_path / "w")
    found = score(Checkpoint.open(path), windows_of(config, length=2), options)
    assert found.mtp_layers[0].count_E.sum() == 2 * found.model["num_experts_per_tok"]


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe"])
def test_tied_embeddings_are_the_head_whatever_else_is_stored(tmp_path: Path, kind: str) -> None:
    config, tensors = tiny(kind, tie_word_embeddings=True)
    config["tie_word_embeddings"] = True
    stem = "model.language_model" if kind == "qwen3_5_moe" else "model"
    untied = {**config, "tie_word_embeddings": False}
    if "text_config" in config:
        untied["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    same = {**tensors, "lm_head.weight": tensors[f"{stem}.embed_tokens.weight"]}
    tied = run_evaluate(write_checkpoint(tmp_path / "tied", tensors, config), config, tmp_path / "w")
    assert run_evaluate(write_checkpoint(tmp_path / "two", same, untied), config, tmp_path / "w") == tied


# -- quantized checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "over"),
    [
        ("W8A16", {"format": "auto-round", "quantize": ("lm_head",)}),
        ("W8A16", {"format": "compressed-tensors"}),
        ("W4A16", {"format": "gptq", "expert_names": "fused-indexed", "g_idx": True}),
    ],
)
def test_every_quantized_form_runs_as_its_values(
    small_moe: Path, tmp_path: Path, preset: str, over: dict[str, Any]
) -> None:
    """In bfloat16 to the bit: as the bfloat16 checkpoint that `convert` makes of it."""
    scheme = replace(Scheme.preset(preset), **over)
    run(plan_quantize(Checkpoint.open(small_moe), scheme), tmp_path / "q")
    run(plan_convert(Checkpoint.open(tmp_path / "q"), Target(format="bf16")), tmp_path / "plain")
    config = json.loads((small_moe / "config.json").read_text())
    bfloat16 = Precision(torch.device("cpu"), torch.bfloat16)
    found, wanted = (run_evaluate(tmp_path / name, config, tmp_path / "w", bfloat16) for name in ("q", "plain"))
    assert found == wanted


def test_a_quantized_source_that_is_cut_while_it_is_read_is_told(small_moe: Path, tmp_path: Path) -> None:
    run(plan_quantize(Checkpoint.open(small_moe), Scheme.preset("W4A16")), tmp_path / "q")
    checkpoint = Checkpoint.open(tmp_path / "q")
    with Weights(checkpoint, FLOAT32) as weights:
        os.truncate(tmp_path / "q" / checkpoint.shards[0].name, checkpoint.shards[0].data_start)
        with pytest.raises(ExecutionError, match="truncated while it was read"):
            weights.expert("block", 0, 0)


# -- disks that fail --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_mtp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config, tensors = tiny("deepseek_v3")
    return write_checkpoint(tmp_path_factory.mktemp("d") / "x", tensors, config), config


def effects_of(job: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    counting = Failing(0)
    with monkeypatch.context() as patch:
        patch.setattr(work_module, "FileSystem", lambda: counting)
        job()
    return counting.effects


def test_a_full_disk_anywhere_is_told_and_gone_on_from(
    tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tiny_mtp
    whole = run_score(path, config, tmp_path / "whole").to_bytes()
    effects = effects_of(lambda: run_score(path, config, tmp_path / "count"), monkeypatch)
    assert effects > 40
    for k in range(1, effects + 1, 7):
        with monkeypatch.context() as patch:
            failing = Failing(k, errno.ENOSPC)
            patch.setattr(work_module, "FileSystem", lambda failing=failing: failing)
            with pytest.raises((ExecutionError, OutputError), match="No space left"):
                run_score(path, config, tmp_path / f"{k}")
        assert run_score(path, config, tmp_path / f"{k}").to_bytes() == whole


def crash(path: Path, config: dict[str, Any], work: Path, k: int) -> None:
    crashing = Crashing(k)
    setattr(work_module, "FileSystem", lambda: crashing)  # noqa: B010
    torch.set_num_threads(1)
    run_score(path, config, work)


def test_killed_at_any_effect_with_unsynced_bytes_lost_it_ends_with_the_same_bytes(
    tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tiny_mtp
    whole = run_score(path, config, tmp_path / "whole").to_bytes()
    effects = effects_of(lambda: run_score(path, config, tmp_path / "count"), monkeypatch)
    fork = multiprocessing.get_context("fork")
    for k in range(2, effects + 1, 9):
        child = fork.Process(target=crash, args=(path, config, tmp_path / f"{k}", k))
        child.start()
        child.join()
        assert child.exitcode == 9
        assert run_score(path, config, tmp_path / f"{k}").to_bytes() == whole


def test_a_damaged_or_missing_state_is_refused(tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, config = tiny_mtp
    options = ScoreOptions(precision=FLOAT32, work=tmp_path / "w", on_progress=stop_at(2))
    with pytest.raises(Interrupted):
        score(Checkpoint.open(path), windows_of(config), options)
    (hidden,) = (tmp_path / "w").glob("*.hidden")
    whole = hidden.read_bytes()
    hidden.write_bytes(whole[:-1])
    with pytest.raises(ExecutionError, match="damaged; remove"):
        run_score(path, config, tmp_path / "w")
    hidden.unlink()
    with pytest.raises(ExecutionError, match="missing; remove"):
        run_score(path, config, tmp_path / "w")
    record = json.loads((tmp_path / "w" / "progress.json").read_text())
    (tmp_path / "w" / "progress.json").write_text(json.dumps({**record, "steps": {"block 0": 3}}))
    with pytest.raises(ResumeError, match="not a record"):
        run_score(path, config, tmp_path / "w")


def stop_at(count: int) -> Callable[[object], None]:
    seen: list[object] = []

    def stop(progress: object) -> None:
        seen.append(progress)
        if len(seen) == count:
            raise KeyboardInterrupt

    return stop


def test_an_interrupt_amid_the_embeddings_is_one_line(
    tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tiny_mtp

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "rows", interrupted)
        with pytest.raises(Interrupted, match="0 of 3 blocks are safe"):
            run_score(path, config, tmp_path / "w")
    assert run_score(path, config, tmp_path / "w").to_bytes() == run_score(path, config, tmp_path / "v").to_bytes()


def test_other_options_are_refused_rather_than_mixed(tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, config = tiny_mtp
    run_score(path, config, tmp_path / "w")
    source, work = Checkpoint.open(path), tmp_path / "w"
    before = (work / "progress.json").read_bytes()
    with pytest.raises(ResumeError):
        score(source, windows_of(config), ScoreOptions(precision=replace(FLOAT32, dtype=torch.bfloat16), work=work))
    with pytest.raises(ResumeError):
        evaluate(source, windows_of(config), EvaluateOptions(precision=FLOAT32, work=work))
    with pytest.raises(ResumeError):
        score(source, replace(windows_of(config), fingerprint="g"), ScoreOptions(precision=FLOAT32, work=work))
    assert (work / "progress.json").read_bytes() == before


def test_a_work_directory_that_refuses_lets_go_of_its_lock(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", {"a": 1}):
        pass
    refused = WorkDir(tmp_path / "w", {"a": 2})
    with pytest.raises(ResumeError):
        refused.__enter__()
    with WorkDir(tmp_path / "w", {"a": 1}):  # while `refused` is still there
        pass


def test_a_work_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        WorkDir(tmp_path / "file" / "w", {}).__enter__()


# -- paths in the way -------------------------------------------------------------------------------------------------


def test_nothing_is_ever_written_into_a_checkpoint(tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, config = tiny_mtp
    before = sorted(path.rglob("*"))
    (tmp_path / "link").symlink_to(path)
    for work in (path, path / "w", path / "a" / "b", tmp_path / "link" / "w"):
        with pytest.raises(OutputError, match="lies in the checkpoint"):
            run_score(path, config, work)
        with pytest.raises(OutputError, match="lies in the checkpoint"):
            run_evaluate(path, config, work)
    assert sorted(path.rglob("*")) == before


def test_free_space_is_that_of_the_work_directory(
    tiny_mtp: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tiny_mtp
    asked: list[Path] = []

    def free_bytes(_self: FileSystem, where: Path) -> int:
        asked.append(where)
        return 1

    monkeypatch.setattr(FileSystem, "free_bytes", free_bytes)
    estimate({"scored": Checkpoint.open(path)}, windows_of(config), FLOAT32, tmp_path / "w")
    assert asked == [tmp_path / "w"]


def cli(small_moe: Path, verb: str, *args: object) -> Result:
    data = ["--data", str(small_moe / "text/heldout.jsonl"), "--samples", "1", "--seqlen", "16"]
    return CliRunner().invoke(main, [verb, str(small_moe), "-q", *data, *map(str, args)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "."], "found a directory"),
        (["-o", ""], "found a directory"),
        (["-o", "missing/s.safetensors"], "no directory missing"),
        (["-o", "s", "--work", "s"], "in the way of the work directory"),
        (["-o", "s", "--work", "s/w"], "in the way of the work directory"),
        (["-o", "full/s", "--work", "full"], "in the way of the work directory"),
        (["-o", "s", "--device", "meta"], "--device meta: "),
    ],
)
def test_places_and_devices_that_cannot_work_are_refused_first(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    result = cli(small_moe, "score", *args)
    assert result.exit_code == 1
    assert result.output.startswith("shardxform: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "full"]


def test_a_result_does_not_go_into_the_checkpoint(small_moe: Path, tmp_path: Path) -> None:
    inside = small_moe / "s.safetensors"
    result = cli(small_moe, "score", "-o", inside, "--work", tmp_path / "w")
    assert "lies in the checkpoint" in result.output
    plot = cli(small_moe, "evaluate", "--against", small_moe, "--plot", small_moe / "p.png", "--work", tmp_path / "w")
    assert "lies in the checkpoint" in plot.output
    assert not inside.exists()


def test_what_a_kill_left_behind_a_result_is_removed(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "s", tmp_path / "s.work"
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "remove_work", lambda *_: None)  # killed when the result was safe
        assert cli(small_moe, "score", "-o", out).exit_code == 0
    assert list(work.glob("scored-*.hidden"))
    assert cli(small_moe, "score", "-o", out).exit_code == 0
    assert not work.exists()
    with WorkDir(work, {"of": "another run"}):
        pass
    assert cli(small_moe, "score", "-o", out).exit_code == 0
    assert work.exists()


def test_a_single_window_gives_json_that_is_json(small_moe: Path, tmp_path: Path) -> None:
    result = cli(small_moe, "evaluate", "--against", small_moe, "--json", "--work", tmp_path / "w")
    facts = json.loads(result.stdout, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert facts["against"]["kl_standard_error"] is None
    text = cli(small_moe, "evaluate", "--against", small_moe, "--work", tmp_path / "w").stdout
    assert "KL divergence  0.000000 nats" in text


def test_a_picture_that_cannot_be_drawn_is_refused_first(small_moe: Path, tmp_path: Path) -> None:
    for plot in (tmp_path / "p.jpg", tmp_path / "missing" / "p.png", tmp_path):
        result = cli(small_moe, "evaluate", "--against", small_moe, "--plot", plot, "--work", tmp_path / "w")
        assert result.exit_code == 1
        assert str(plot) in result.output
        assert "perplexity" not in result.output


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_passes_its_own_check(tiny_checkpoints: dict[str, Path], kind: str) -> None:
    with Weights(Checkpoint.open(tiny_checkpoints[kind]), FLOAT32) as weights:
        weights.check(range(weights.layout.mtp_layers))
