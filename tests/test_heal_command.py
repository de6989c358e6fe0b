"""`prune --heal` and `quantize --heal` end to end: what changes, the record, kills, rounding, verify, refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, forget_digests, read_checkpoint, shard_bytes, tiny, write_checkpoint
from click.testing import CliRunner, Result
from faults import killed_after
from smaller import BLOCKS, ROUTED, smaller
from strategies import by_night, picked
from test_calibration import byte_tokenizer
from test_forward import fuse_experts
from test_tuning_session import block_outputs
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardxform.ask.recipe import HEALED  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL_MOE = smaller()
TEXT = few("calib.jsonl")
KEEP = list(range(0, ROUTED, 2))
LAYERS = list(range(BLOCKS))
SAMPLES, SEQLEN, SEED = 6, 64, 42
DATA = ("--data", str(TEXT), "--samples", str(SAMPLES), "--seqlen", str(SEQLEN), "--dtype", "float32")
HEAL = ("--heal", "all", "--heal-iters", "6", "--heal-lr", "0.005", "--batch-size", "3", *DATA)
AUTO = ("--heal", "--heal-iters", "4", "--batch-size", "2", *DATA)
JUDGES = np.sort(np.random.Generator(np.random.PCG64([SEED, 7])).permutation(SAMPLES)[:1])
EXPERTS = (".mlp.experts.", ".mlp.gate.", ".mlp.shared_expert.", ".mlp.shared_experts.", ".mlp.shared_expert_gate.")
BEFORE = ".post_attention_layernorm."
PARTS: dict[str, Callable[[str], bool]] = {
    "router": lambda name: ".mlp.gate." in name,
    "shared": lambda name: BEFORE in name or any(part in name for part in (EXPERTS[1], *EXPERTS[2:])),
    "experts": lambda name: EXPERTS[0] in name,
    "moe": lambda name: BEFORE in name or any(part in name for part in EXPERTS),
    "all": lambda name: ".layers." in name,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def keep_file(folder: Path, keep: list[int], layers: list[int], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    value = {"format": "shardxform.keep", "version": 1, "keep": {str(layer): keep for layer in layers}, **more}
    (folder / "keep.json").write_text(json.dumps(value))
    return folder / "keep.json"


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(keep_file(tmp_path_factory.mktemp("keep"), KEEP, LAYERS))


def call(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(args), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def made(folder: Path, command: str, keep: str, *more: str, source: Path = SMALL_MOE) -> Path:
    """An output on the small trained checkpoint, made with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    call(command, str(source), str(folder / "out"), "-m", keep, "-q", *more)
    torch.set_num_threads(before)
    return folder / "out"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, keep: str) -> Path:
    return made(tmp_path_factory.mktemp("plain"), "prune", keep)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory, keep: str) -> Path:
    """One uninterrupted run: the whole block."""
    return made(tmp_path_factory.mktemp("healed"), "prune", keep, *HEAL)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, keep: str) -> Path:
    """Pruned, healed, and rounded to nearest."""
    return made(tmp_path_factory.mktemp("rounded"), "quantize", keep, *HEAL)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, keep: str) -> Path:
    """Pruned, healed, and its rounding tuned."""
    more = ("--method", "auto-round", "--iters", "3")
    return made(tmp_path_factory.mktemp("tuned"), "quantize", keep, *HEAL, *more)


def record_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "shardxform.json").read_text())
    return found


def blocks_of(root: Path) -> dict[int, dict[str, Any]]:
    return {block["layer"]: block for block in record_of(root)["facts"]["blocks"]}


def bytes_of(root: Path) -> dict[str, Any]:
    """Every file of an output."""
    return {path.name: path.read_bytes() for path in root.iterdir()}


def differing(one: Path, other: Path) -> set[str]:
    """Names of tensors with other bytes; everything else must be the same, but for the record."""
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert list(ours) == list(theirs)
    assert all((ours[n].dtype, ours[n].shape) == (theirs[n].dtype, theirs[n].shape) for n in ours)
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        if not name.endswith(".safetensors") and name != "shardxform.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return {name for name in ours if ours[name].data != theirs[name].data}


# -- what changes -----------------------------------------------------------------------------------------------------


def test_without_a_step_it_is_plain_pruning_byte_for_byte(plain: Path, keep: str, tmp_path: Path) -> None:
    out = made(tmp_path, "prune", keep, "--heal", "--heal-iters", "0")
    assert bytes_of(out) == bytes_of(plain)
    zero = made(tmp_path / "zero", "quantize", keep, "--heal", "--heal-iters", "0")
    assert bytes_of(zero) == bytes_of(made(tmp_path / "without", "quantize", keep))


def test_the_whole_block_changes_and_nothing_outside(healed: Path, plain: Path) -> None:
    assert all(block["healed"]["what"] == "all" for block in blocks_of(healed).values())
    changed = differing(healed, plain)
    inside = {name for name in read_checkpoint(plain) if PARTS["all"](name)}
    assert changed <= inside
    assert {name for name in inside if "norm" not in name and not name.endswith(("A_log", "dt_bias"))} <= changed


@pytest.mark.parametrize("what", ["router", "shared", "moe"])
def test_only_what_was_asked_for_changes(what: str, plain: Path, keep: str, tmp_path: Path) -> None:
    lr = "0.02" if what == "router" else "0.005"  # by smaller steps, few of them, a router alone need not gain anything
    more = ("--heal", what, "--heal-iters", "3", "--heal-lr", lr, "--batch-size", "3", *DATA)
    out = made(tmp_path, "prune", keep, *more)
    assert all(block["healed"]["what"] == what for block in blocks_of(out).values())
    changed = differing(out, plain)
    assert changed <= {name for name in read_checkpoint(plain) if PARTS[what](name)}
    for layer in LAYERS:
        assert {name for name in changed if f".layers.{layer}." in name and ".mlp.gate." in name}
        inside = {name for name in changed if f".layers.{layer}.mlp.experts." in name}
        assert len(inside) == (2 if what == "moe" else 0)
        assert bool([name for name in changed if f".layers.{layer}.mlp.shared_expert." in name]) == (what != "router")
    report = verify(out, source=SMALL_MOE)
    assert report.sound, report.problems
    assert report.tensors_healed == sum(PARTS[what](name) for name in read_checkpoint(plain))


def test_windows_made_of_pieces_teach_and_never_judge(healed: Path, keep: str, tmp_path: Path) -> None:
    none = made(tmp_path / "none", "prune", keep, *HEAL, "--heal-extra", "0")
    assert not differing(none, healed)
    out = made(tmp_path, "prune", keep, *HEAL, "--heal-extra", "9")
    assert differing(out, healed)
    recipe = json.loads((out / "shardxform.json").read_text())["inputs"]["recipe"]
    assert (recipe["samples"], recipe["heal"]["extra"]) == (SAMPLES, 9)
    ours, theirs = blocks_of(out), blocks_of(healed)
    assert ours[0]["judged_on"] == theirs[0]["judged_on"] == {"windows": 1, "tokens": SEQLEN - 1, "held_out": True}
    assert ours[0]["healed"]["pruned_error"] == theirs[0]["healed"]["pruned_error"]  # of the same windows of the text
    assert "extra" not in json.loads((healed / "shardxform.json").read_text())["inputs"]["recipe"]["heal"]
    assert verify(out, source=SMALL_MOE).sound
    refused = call("prune", str(SMALL_MOE), str(tmp_path / "x"), "-m", keep, "--heal-extra", "3", code=1)
    assert "--heal-extra is for --heal" in refused.output


def shared_by_tokens(path: Path) -> float:
    """Of the experts of a token in the first block, the share that any token has too, on the mean, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[Any] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _module, _args, out: seen.append(out[-1]))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows()[JUDGES]).long())
    (chosen_TK,) = seen
    same_TT = (chosen_TK[:, None, :, None] == chosen_TK[None, :, None, :]).sum((-1, -2))
    return float(same_TT.double().mean()) / chosen_TK.shape[1]


def test_what_is_chosen_differs_and_the_rest_of_a_block_is_as_pruned(plain: Path, keep: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = call("prune", str(SMALL_MOE), str(out), "-m", keep, *AUTO).output
    done, total = re.findall(r"prune: ([\d,]+) of ([\d,]+) tokens", shown)[-1]
    assert done == total  # though fewer steps were tried than may be
    changed = differing(out, plain)
    sizes = {name: math.prod(tensor.shape) for name, tensor in read_checkpoint(plain).items()}
    for layer, block in blocks_of(out).items():
        what, tried = block["healed"]["what"], block["healed"]["tried"]
        assert [trial["what"] for trial in tried] in ([], ["all"] * 2, ["all", "all", "shared"])
        steps = []
        reach = shared_by_tokens(plain) if layer == 0 else 1 / 2  # of the others, nothing was healed before the first
        for of, reached in (("all", reach), ("shared", 1)):
            weights = sum(size for name, size in sizes.items() if f".layers.{layer}." in name and PARTS[of](name))
            steps.append(min(0.16, 3.0 * ((SAMPLES - 1) * SEQLEN * reached / weights / 4) ** 0.5))
        done = [trial["lr"] for trial in tried] or [block["healed"]["lr"]]
        wanted = [steps[0], steps[0] / 4, steps[1]][: len(done)]
        assert done == pytest.approx(wanted, rel=1e-6 if layer == 0 else 0.4)
        assert layer == 0 or all(step >= least for step, least in zip(done, wanted, strict=True))
        assert (what, block["healed"]["lr"]) in ((what, done[-1]), (None, 0.0))
        mine = {name for name in changed if f".layers.{layer}." in name}
        assert mine <= {name for name in mine if what and PARTS[what](name)}
        assert bool(mine) == (what is not None)
    assert verify(out, source=SMALL_MOE).sound


def test_steps_that_ruin_it_leave_every_byte_as_pruned(plain: Path, keep: str, tmp_path: Path) -> None:
    more = ("--heal", "all", "--heal-iters", "3", "--heal-lr", "1", *DATA)
    result = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", *more)
    assert result.output.count("as pruned") == BLOCKS
    assert not differing(tmp_path / "out", plain)
    report = verify(tmp_path / "out", source=SMALL_MOE)
    assert report.sound
    assert (report.tensors_healed, report.tensors_compared) == (0, report.tensors)


# -- other families ---------------------------------------------------------------------------------------------------

FAMILIES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("qwen3_moe", {}, ()),
    ("qwen3_moe", {"experts": "fused", "dtype": "F32"}, ()),
    ("qwen3_moe_mixed", {"dtype": "F16"}, ()),
    ("qwen3_5_moe_text", {"experts": "per-expert"}, ()),
    ("qwen3_5_moe", {}, ("--text-only",)),
    ("qwen3_6_moe", {}, ()),
    ("deepseek_v3", {}, ()),
    ("deepseek_v3", {"experts": "fused", "mtp": "fused"}, ("--mtp", "drop")),
]


def tiny_source(root: Path, kind: str, settings: dict[str, Any]) -> tuple[Path, Path]:
    """A checkpoint of random weights with a tokenizer, and a manifest that keeps half of its experts."""
    config, tensors = tiny(kind, vocab_size=258, **settings)
    texts = byte_tokenizer(root / "tokenizer")
    files = {name: (texts / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    source = write_checkpoint(root / "src", tensors, config, shards=2, files=files)
    blocks = config.get("text_config", config)["num_hidden_layers"]
    prefix = "model.language_model.layers" if "text_config" in config else "model.layers"
    layers = [layer for layer in range(blocks) if f"{prefix}.{layer}.mlp.gate.weight" in tensors]
    kept = [0, 3, 5] if kind.startswith("qwen3_moe") else [0, 2, 5, 7]
    predicts = any(".eh_proj." in name or name.startswith("mtp.") for name in tensors)
    return source, keep_file(root, kept, layers, **({"mtp_keep": {"0": kept}} if predicts else {}))


@pytest.mark.parametrize(
    ("kind", "settings", "options"), picked(FAMILIES, 2), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_family_keeps_its_names_and_changes_only_pruned_blocks(
    tmp_path: Path, kind: str, settings: dict[str, Any], options: tuple[str, ...]
) -> None:
    source, manifest = tiny_source(tmp_path, kind, settings)
    data = ("--data", str(TEXT), "--samples", "8", "--seqlen", "24", "--batch-size", "4", "--dtype", "float32")
    for name, more in (("plain", ()), ("out", ("--heal", "all", "--heal-iters", "6", "--heal-lr", "0.01", *data))):
        call("prune", str(source), str(tmp_path / name), "-m", str(manifest), "-q", *options, *more)
    changed = differing(tmp_path / "out", tmp_path / "plain")
    layers = json.loads(manifest.read_text())["keep"]
    blocks = blocks_of(tmp_path / "out")
    assert sorted(blocks) == sorted(map(int, layers))
    better = {layer for layer, block in blocks.items() if block["healed"]["what"] == "all"}
    assert better
    stems = ("model.layers.", "model.language_model.layers.")
    inside = {
        n for n in read_checkpoint(tmp_path / "plain") if n.startswith(tuple(f"{s}{b}." for s in stems for b in better))
    }
    assert changed <= inside
    # Some are no parameters, some round back to what they were, and some experts are reached by no token.
    spared = ("norm", "A_log", "dt_bias", "e_score_correction_bias", ".experts.")
    assert {name for name in inside if not any(word in name for word in spared)} <= changed
    assert all([n for n in changed if f".layers.{layer}.mlp.experts." in n] for layer in better)
    report = verify(tmp_path / "out", source=source)
    assert report.sound, report.problems
    assert report.tensors_healed == len(inside)
    assert report.tensors_compared == report.tensors - len(inside)


def test_fused_or_one_by_one_experts_heal_alike(tmp_path: Path) -> None:
    found = []
    for spelling in ("fused", "per-expert"):
        config, tensors = tiny("qwen3_moe", vocab_size=258)
        if spelling == "fused":
            as_torch = {
                n: torch.frombuffer(bytearray(t.data), dtype=torch.bfloat16).view(t.shape) for n, t in tensors.items()
            }
            fuse_experts(as_torch, layers=3, experts=6)
            tensors = dict(as_torch)  # type: ignore[arg-type]
        texts = byte_tokenizer(tmp_path / "tokenizer")
        files = {name: (texts / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
        source = write_checkpoint(tmp_path / spelling / "src", tensors, config, files=files)
        manifest = keep_file(tmp_path / spelling, [0, 3, 5], [0, 1, 2])
        more = ("--heal", "--heal-iters", "4", "--data", str(TEXT), "--samples", "8", "--seqlen", "24", "-q")
        call("prune", str(source), str(tmp_path / spelling / "out"), "-m", str(manifest), *more)
        out = {
            n: torch.frombuffer(bytearray(t.data), dtype=torch.bfloat16).view(t.shape)
            for n, t in read_checkpoint(tmp_path / spelling / "out").items()
        }
        if spelling == "per-expert":
            fuse_experts(out, layers=3, experts=3)
        found.append((out, [block["healed"] for block in blocks_of(tmp_path / spelling / "out").values()]))
    (one, first), (other, second) = found
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first == second


# -- the record -------------------------------------------------------------------------------------------------------


def relative(ours: Any, theirs: Any) -> float:
    """Mean over windows and positions, but for the last one, of the squared error relative to the token."""
    ours, theirs = ours[:, :-1].double(), theirs[:, :-1].double()
    return float(((ours - theirs).square().mean(-1) / theirs.square().mean(-1)).mean())


def windows() -> Any:
    from shardxform.calibration import DataOptions, load_windows

    return load_windows(SMALL_MOE, DataOptions(data=str(TEXT), samples=SAMPLES, seqlen=SEQLEN)).ids_NT


def test_the_recorded_errors_are_those_of_what_was_written(healed: Path, plain: Path) -> None:
    """The chains by hand: the original and the healed model loaded whole, on the held-out windows."""
    ids_NT = windows()[JUDGES]
    ours, theirs, pruned = (block_outputs(path, ids_NT) for path in (healed, SMALL_MOE, plain))
    blocks = blocks_of(healed)
    for layer in LAYERS:
        fact = blocks[layer]["healed"]
        assert fact["healed_error"] == pytest.approx(relative(ours[layer], theirs[layer]), rel=1e-3)
        assert fact["healed_error"] < fact["pruned_error"]
    assert blocks[0]["healed"]["pruned_error"] == pytest.approx(relative(pruned[0], theirs[0]), rel=1e-3)


def test_after_rounding_the_errors_are_still_against_the_original(tuned: Path) -> None:
    """The blocks of the quantized pruned model answer for those of the model before pruning."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(tuned / "model.safetensors")
    dense = {name: t for name, t in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in tensors:
        if name.endswith(".qweight"):
            stem, words = name.removesuffix(".qweight"), tensors[name]
            codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], dim=1).reshape(-1, words.shape[1])
            scales = tensors[f"{stem}.scales"].float().repeat_interleave(128, dim=0)
            dense[f"{stem}.weight"] = ((codes - 8) * scales).T.contiguous()
    fuse_experts(dense, layers=BLOCKS, experts=len(KEEP))
    folder = tuned.parent / "dense"
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = (block_outputs(path, windows()[JUDGES]) for path in (folder, SMALL_MOE))
    for layer, block in blocks_of(tuned).items():
        assert block["tuned_error"] == pytest.approx(relative(ours[layer], theirs[layer]), rel=1e-3)
        assert block["tuned_error"] <= block["rtn_error"]


def test_the_record_says_how_and_the_same_command_finds_it_complete(healed: Path, keep: str) -> None:
    record = record_of(healed)
    assert record["inputs"]["recipe"]["heal"] == {"what": "all", "iters": 6, "lr": 0.005, "batch_size": 3}
    assert record["inputs"]["recipe"]["data"]["data"] == "calib.jsonl"
    before = bytes_of(healed)
    again = call("prune", str(SMALL_MOE), str(healed), "-m", keep, "-q", *HEAL)
    assert "already complete" in again.output
    other = call("prune", str(SMALL_MOE), str(healed), "-m", keep, "-q", *HEAL, "--heal-iters", "7", code=1)
    assert "--heal-iters: was 6, now 7" in other.output
    assert call("prune", str(SMALL_MOE), str(healed), "-m", keep, "-q", code=1)
    assert bytes_of(healed) == before


def test_a_report_for_machines_has_every_block(keep: str, tmp_path: Path) -> None:
    dry = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "--dry-run", "--json", "-q", *HEAL)
    assert json.loads(dry.stdout)["summary"]["healed"] == sum(PARTS["all"](n) for n in read_checkpoint(SMALL_MOE))
    assert json.loads(dry.stdout)["work_bytes"] == 4 * SAMPLES * SEQLEN * 128 * 4  # two chains, two states of each
    assert not (tmp_path / "out").exists()
    found = json.loads(call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "--json", "-q", *HEAL).stdout)
    assert found["fingerprint"] == json.loads(dry.stdout)["fingerprint"]
    assert [block["layer"] for block in found["report"]["facts"]["blocks"]] == LAYERS


def test_a_divergence_is_told_aloud(plain: Path, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardxform.tuning import heal
    from shardxform.tuning.samples import NonFiniteLoss

    real = heal.descend

    def failing(forward: Any, samples: Any, rows: Any, dtype: Any) -> None:
        real(forward, samples, rows, dtype)
        if samples.block == 0:
            raise NonFiniteLoss("block 0: expected a finite loss, found nan")

    monkeypatch.setattr(heal, "descend", failing)
    result = call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", *HEAL)
    assert "WARNING: block 0: healing diverged" in result.output
    assert blocks_of(tmp_path / "out")[0]["healed"] | {"pruned_error": 0, "healed_error": 0} == {
        "pruned_error": 0,
        "healed_error": 0,
        "ratio_standard_error": 0.0,
        "what": None,
        "lr": 0.0,
        "iters": 6,
        "tried": [],
        "diverged": True,
    }
    changed = differing(tmp_path / "out", plain)
    assert {name.split("layers.")[1][0] for name in changed} == {"1"}
    assert verify(tmp_path / "out", source=SMALL_MOE).sound


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_threads_and_jobs_change_no_byte(healed: Path, keep: str, tmp_path: Path) -> None:
    torch.set_num_threads(3)
    call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", "--jobs", "5", *HEAL)
    assert bytes_of(tmp_path / "out") == bytes_of(healed)


@pytest.mark.parametrize("stop_at", [1, 9])
def test_interrupted_while_healing_it_goes_on_to_the_same_bytes(
    healed: Path, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    from shardxform.tuning import heal

    calls, real = 0, heal.descend

    def stopping(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(heal, "descend", stopping)
        stopped = CliRunner().invoke(main, ["prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", *HEAL])
    assert stopped.exit_code not in (0, None)
    assert not (tmp_path / "out" / "config.json").exists()
    call("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "-q", *HEAL)
    assert bytes_of(tmp_path / "out") == bytes_of(healed)


@pytest.mark.crash
@pytest.mark.slow
def test_killed_inside_and_between_blocks_the_bytes_are_the_same(healed: Path, keep: str, tmp_path: Path) -> None:
    from shardxform.execution.journal import Journal
    from shardxform.forward.work import HiddenFile
    from shardxform.tuning import heal

    out = tmp_path / "out"
    command = ["prune", str(SMALL_MOE), str(out), "-m", keep, "-q", *HEAL]
    assert killed_after(Journal, "record", 1, lambda: main(command))  # between blocks
    for owner, name, number in ((HiddenFile, "remove", 1), (heal, "descend", 2)):  # and then inside one
        assert not (out / "config.json").exists()
        assert killed_after(owner, name, number, lambda: main(command))
    call(*command)
    assert bytes_of(out) == bytes_of(healed)


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_what_is_rounded_is_what_was_healed(healed: Path, rounded: Path, tmp_path: Path) -> None:
    """The first block has the same inputs in both commands: there, one after the other is the same. Later ones answer
    for what rounding did before them, too, and differ."""
    call("quantize", str(healed), str(tmp_path / "after"), "-q")
    one, two = read_checkpoint(rounded), read_checkpoint(tmp_path / "after")
    assert list(one) == list(two)
    assert (rounded / "config.json").read_bytes() == (tmp_path / "after" / "config.json").read_bytes()
    apart = {name for name in one if one[name].data != two[name].data}
    assert not [name for name in apart if ".layers.0." in name or ".layers." not in name]
    assert [name for name in apart if ".layers.1." in name]


@by_night
def test_independent_blocks_heal_alike_whoever_does_them(keep: str, tmp_path: Path) -> None:
    more = ("--method", "auto-round", "--iters", "2", "--inputs", "fp", *HEAL)
    whole = made(tmp_path / "whole", "quantize", keep, *more)
    for name, blocks in (("a", "1"), ("b", "0")):
        made(tmp_path / name, "quantize", keep, *more, "--blocks", blocks)
    parts = ("--join", str(tmp_path / "a" / "out"), "--join", str(tmp_path / "b" / "out"))
    assert bytes_of(made(tmp_path / "merged", "quantize", keep, *more, *parts)) == bytes_of(whole)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_other_formats_hold_the_same_values(rounded: Path, keep: str, tmp_path: Path, format: str) -> None:  # noqa: A002
    out = made(tmp_path, "quantize", keep, *HEAL, "--format", format)
    call("convert", str(out), str(tmp_path / "back"), "--to", "auto-round", "-q")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (rounded / "model.safetensors").read_bytes()
    report = verify(tmp_path / "back", source=SMALL_MOE)  # through the record of what was converted
    assert report.sound, report.problems
    assert report.tensors_healed > 0


def test_experts_that_stay_16_bit_are_written_healed(healed: Path, keep: str, tmp_path: Path) -> None:
    out = made(tmp_path, "quantize", keep, *HEAL, "--keep-16bit", "model.layers.0.mlp.experts*")
    ours, theirs = read_checkpoint(out), read_checkpoint(healed)
    stem = "model.layers.0.mlp.experts"
    both, down = theirs[f"{stem}.gate_up_proj"], theirs[f"{stem}.down_proj"]
    gate, up = np.split(both.array(), 2, axis=1)
    for expert in range(len(KEEP)):
        for kind, stack in (("gate", gate), ("up", up), ("down", down.array())):
            found = ours[f"{stem}.{expert}.{kind}_proj.weight"]
            assert found.dtype == "BF16"
            np.testing.assert_array_equal(found.array(), stack[expert])
    report = verify(out, source=SMALL_MOE)
    assert report.sound, report.problems
    assert report.rounding is None  # no weight of a healed block follows from the source


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_says_what_it_cannot_prove(healed: Path, rounded: Path, tuned: Path) -> None:
    said = call("verify", str(healed), "--source", str(SMALL_MOE), "-q").output.splitlines()[-1]
    names = list(read_checkpoint(healed))
    count = sum(map(PARTS["all"], names))
    others = len(names) - count
    assert f"; values of {others} of {len(names)} tensors compared with {SMALL_MOE} ({others} equal" in said
    assert said.endswith(f"; {count} healed, and as near to it as healing leaves them")
    for path in (healed, rounded, tuned):
        call("verify", str(path), "-q")
        report = json.loads(call("verify", str(path), "--source", str(SMALL_MOE), "-q", "--json").stdout)
        assert report["problems"] == []
        assert report["tensors_healed"] > 0
        assert report["bytes_compared"] > 0
        assert report["values_compared"] + report["tensors_healed"] == report["tensors"]


def test_verify_proves_what_was_converted_from_healed_weights(tuned: Path, rounded: Path, tmp_path: Path) -> None:
    """Against the quantized output every value; against the source what neither healing nor tuning changed."""
    for packed in (tuned, rounded):
        out = tmp_path / packed.parent.name
        call("convert", str(packed), str(out), "--to", "bf16", "-q")
        names = list(read_checkpoint(out))
        said = call("verify", str(out), "--source", str(packed), "-q").output.splitlines()
        assert len(said) == 1
        assert f"; values of all {len(names)} tensors compared with {packed} (" in said[0]
        healed, others = len([n for n in names if PARTS["all"](n)]), len([n for n in names if not PARTS["all"](n)])
        last = call("verify", str(out), "--source", str(SMALL_MOE), "-q").output.splitlines()[-1]
        assert f"; values of {others} of {len(names)} tensors compared with {SMALL_MOE} ({others} equal" in last
        assert last.endswith(f"; {healed} healed: only shape, type and finiteness")
        name = "model.layers.1.mlp.experts.down_proj"
        spoil(out, name, lambda bits: bits.__setitem__(3, bits[3] ^ 1))
        assert verify(out, source=SMALL_MOE).sound  # nothing there tells; the last line says so
        (problem,) = verify(out, source=packed).problems
        assert (problem.code, problem.where) == ("source-bytes", name)


def test_verify_of_an_mtp_layer_still_rounds_it_again(tmp_path: Path) -> None:
    """What was not healed is held against the source as ever."""
    wide = {
        "hidden_size": 32,
        "moe_intermediate_size": 32,
        "intermediate_size": 32,
        "v_head_dim": 16,
        "q_lora_rank": 32,
    }
    source, manifest = tiny_source(tmp_path, "deepseek_v3", {**wide, "kv_lora_rank": 32})
    more = ("--heal", "moe", "--heal-iters", "3", "--data", str(TEXT), "--samples", "4", "--seqlen", "16", "-q")
    args = ("quantize", str(source), str(tmp_path / "out"), "-m", str(manifest), "--group-size", "32", *more)
    call(*args, "--heal-lr", "0.01")
    report = verify(tmp_path / "out", source=source)
    assert report.sound, report.problems
    assert report.rounding is not None
    assert report.rounding.exact
    names = [weight.name for weight in report.rounding.by_weight]
    assert any(name.startswith("model.layers.0.mlp.") for name in names)  # the dense block
    assert any(".self_attn." in name for name in names)
    healed = [layer for layer, block in blocks_of(tmp_path / "out").items() if block.get("healed", {}).get("what")]
    assert healed
    assert not [name for name in names if any(f".layers.{layer}.mlp." in name for layer in healed)]


def spoil(root: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Change a bfloat16 tensor of a checkpoint of one shard, as bits; not for its digest to tell."""
    forget_digests(root)
    tensors = read_checkpoint(root)
    bits = tensors[name].array().copy()
    change(bits.reshape(-1))
    tensors[name] = Raw(tensors[name].dtype, tensors[name].shape, bits.tobytes())
    (root / "model.safetensors").write_bytes(shard_bytes(tensors))


@pytest.fixture(scope="module")
def sound(keep: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which the router and the shared experts were healed."""
    more = ("--heal", "shared", "--heal-iters", "2", "--heal-lr", "0.005", *DATA)
    return made(tmp_path_factory.mktemp("sound"), "prune", keep, *more)


@pytest.fixture
def shared(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return forget_digests(shutil.copytree(sound, tmp_path / "shared"))


def test_verify_finds_what_healing_does_not_explain(shared: Path) -> None:
    def first(bits: np.ndarray) -> None:
        bits[0] ^= 1

    spoil(shared, "model.layers.1.mlp.experts.down_proj", first)
    spoil(shared, "model.layers.0.input_layernorm.weight", first)
    spoil(shared, "model.embed_tokens.weight", first)
    found = verify(shared, source=SMALL_MOE)
    assert {(p.code, p.where) for p in found.problems} == {
        ("source-bytes", "model.layers.1.mlp.experts.down_proj"),
        ("source-bytes", "model.layers.0.input_layernorm.weight"),
        ("source-bytes", "model.embed_tokens.weight"),
    }


def test_verify_finds_healed_values_that_are_no_numbers(shared: Path) -> None:
    def no_number(bits: np.ndarray) -> None:
        bits[7] = 0x7FC0

    spoil(shared, "model.layers.1.mlp.gate.weight", no_number)
    found = verify(shared, source=SMALL_MOE)
    assert [(p.code, p.where) for p in found.problems] == [("not-finite", "model.layers.1.mlp.gate.weight")]


@pytest.mark.parametrize(
    "facts", [{}, {"blocks": []}, {"blocks": 3}, {"blocks": [1, {"layer": [0], "healed": {"what": []}}, {}]}]
)
def test_a_record_without_its_facts_excuses_what_may_have_been_healed(shared: Path, facts: object) -> None:
    record = record_of(shared)
    for value, sound in ((record["inputs"]["recipe"]["heal"], True), ({}, True), (None, False), ("all", False)):
        record["inputs"]["recipe"]["heal"] = value
        record["facts"] = facts
        (shared / "shardxform.json").write_text(json.dumps(record))
        assert verify(shared, source=SMALL_MOE).sound == sound


def test_a_block_that_stayed_as_pruned_must_have_its_bytes(shared: Path) -> None:
    record = record_of(shared)
    record["facts"]["blocks"][1]["healed"]["what"] = None
    (shared / "shardxform.json").write_text(json.dumps(record))
    found = verify(shared, source=SMALL_MOE)
    assert {problem.code for problem in found.problems} == {"source-bytes"}
    assert all("layers.1." in problem.where for problem in found.problems)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(out: Path, *args: str, code: int = 1) -> str:
    said = call(args[0], str(SMALL_MOE), str(out), *args[1:], code=code).output
    assert not out.exists()
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_options_that_need_another_are_refused_before_anything_is_written(
    command: str, keep: str, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", (command, "-m", keep)
    assert "--heal-lr is for --heal" in refused(out, *plain, "--heal-lr", "0.01")
    assert "--heal-iters is for --heal" in refused(out, *plain, "--heal-iters", "3")
    assert "--samples is for" in refused(out, *plain, "--samples", "4")
    assert "--batch-size is for" in refused(out, *plain, "--batch-size", "4")
    assert "--dtype is for" in refused(out, *plain, "--dtype", "float32")
    assert "Missing option '--data'" in refused(out, *plain, "--heal", code=2)
    assert "Invalid value for '--heal'" in refused(out, *plain, *DATA, "--heal", "everything", code=2)
    assert "Invalid value for '--heal-lr'" in refused(out, *plain, *DATA, "--heal", "--heal-lr", "0", code=2)
    assert "--heal-lr: expected more than 0" in refused(out, *plain, *DATA, "--heal", "--heal-lr", "nan")
    swallowed = call(command, "--heal", str(SMALL_MOE), str(out), "-m", keep, *DATA, code=2).output
    wanted = "is none of auto, router, shared, experts, moe, all: put --heal after SRC and OUT, or write --heal=auto"
    assert wanted in " ".join(swallowed.split())
    if command == "prune":
        assert "--device is for --heal" in refused(out, *plain, "--device", "cuda:0")


def test_there_must_be_something_to_heal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    every = str(keep_file(tmp_path, list(range(ROUTED)), LAYERS))
    for command in (("prune", "-m", every), ("quantize", "-m", every)):
        assert "nothing is pruned" in refused(out, *command, "--heal", *DATA)
    said = "--heal: nothing is pruned, so there is nothing to heal; give --manifest"
    for command in (("prune", "--mtp", "drop"), ("quantize",)):
        assert refused(out, *command, "--heal", *DATA, code=2).endswith(f"{said}.")
        assert refused(out, *command, "--heal", code=2).endswith(f"{said}, and --data.")
    said = said.replace("--manifest", "--keep or --ratio")
    assert refused(out, "compress", "--heal", *DATA, code=2).endswith(f"{said}.")
    assert "nothing to do" in refused(out, "prune", "--heal", *DATA, code=2)


@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_a_single_window_is_refused(command: str, keep: str, tmp_path: Path) -> None:
    one = (*DATA[:2], "--samples", "1", "--seqlen", "64")
    said = refused(tmp_path / "out", command, "-m", keep, "--heal", *one)
    assert "--heal: expected at least 2 windows, one of them to judge by, found 1; give --samples 2 or more" in said
    two = (*DATA[:2], "--samples", "2", "--seqlen", "64", "--heal-iters", "1", "--heal-lr", "0.001")
    call(command, str(SMALL_MOE), str(tmp_path / "two"), "-m", keep, "-q", "--heal", "router", *two)


def test_weights_that_are_no_numbers_are_an_error_that_names_them(keep: str, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(SMALL_MOE, source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"]["model.layers.1.mlp.gate.weight"]
    data = bytearray(shard.read_bytes())
    head = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + head])["model.layers.1.mlp.gate.weight"]["data_offsets"][0]
    data[8 + head + begin : 8 + head + begin + 2] = b"\xc0\x7f"
    shard.write_bytes(data)
    result = call("prune", str(source), str(tmp_path / "out"), "-m", keep, "-q", *HEAL, code=1)
    assert "tensor 'model.layers.1.mlp.gate.weight' holds NaN or infinity" in result.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_every_kind_of_healing_is_tested() -> None:
    assert PARTS.keys() == HEALED.keys()
