"""GLM-5: blocks that take the selection of the block before, windows that are too long for it, and the MTP layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import read_checkpoint, write_checkpoint
from click.testing import CliRunner
from texts import few

torch = pytest.importorskip("torch")

import any_moe  # noqa: E402
from test_every_family import FLOAT32, IDS, hooked  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import FamilyError  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.model.layout import layout_of, refuse_longer  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import ViewOptions  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

TYPES = ["full", "full", "shared"]
MTP = "model.layers.3."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, and after them an MTP layer of the tensors of the second, its own four beside them."""
    over: dict[str, Any] = {"layers": 3, "indexer_types": TYPES, "index_topk": 24}
    root = any_moe.save(any_moe.build("glm_moe_dsa", **over), tmp_path_factory.mktemp("dsa") / "blocks")
    tensors, config = read_checkpoint(root), json.loads((root / "config.json").read_text())
    block = "model.layers.1."
    tensors |= {MTP + name.removeprefix(block): value for name, value in tensors.items() if name.startswith(block)}
    generator = torch.Generator().manual_seed(7)
    for name, shape in (("enorm", (64,)), ("hnorm", (64,)), ("shared_head.norm", (64,)), ("eh_proj", (64, 128))):
        values = torch.randn(shape, generator=generator) / 8 + (1 if len(shape) == 1 else 0)
        tensors[f"{MTP}{name}.weight"] = raw_of(values)
    files = {"tokenizer.json": (root / "tokenizer.json").read_text()}
    return write_checkpoint(root.with_name("whole"), tensors, {**config, "num_nextn_predict_layers": 1}, files=files)


def raw_of(values: Any) -> Any:
    from build import raw

    return raw(values.bfloat16())


def test_the_mtp_layer_is_scored_as_a_model_of_one_block(source: Path, tmp_path: Path) -> None:
    windows = Windows(ids_NT=IDS.numpy().astype(np.int32), fingerprint="x", provenance={"data": "random"}, notes=())
    found = score(Checkpoint.open(source), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    model = loaded_anyway(source)
    one = any_moe.build("glm_moe_dsa", layers=1, indexer_types=["full"], mlp_layer_types=["sparse"])
    one.model.layers[0].load_state_dict(model.model.layers[1].state_dict())
    tensors = {name: torch.tensor(value.float32()) for name, value in read_checkpoint(source).items()}

    def norm(name: str, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors[f"{MTP}{name}.weight"]

    with torch.no_grad():
        hidden = model.model(input_ids=IDS).last_hidden_state[:, :-1]
        both = torch.cat((norm("enorm", model.model.embed_tokens(IDS[:, 1:])), norm("hnorm", hidden)), dim=-1)
        (wanted,) = hooked(one, inputs_embeds=both @ tensors[f"{MTP}eh_proj.weight"].T)
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found.mtp_layers[0], name), values, rtol=1e-4)


def loaded_anyway(root: Path) -> Any:
    """The model less its MTP layer, which transformers has no code for."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_the_mtp_layer_is_pruned_by_a_list_of_its_own_or_dropped(mtp: str, source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    lists: dict[str, Any] = {"mtp_keep": {0: (1, 2, 5)}} if mtp == "keep" else {}
    manifest = Manifest(keep={1: (0, 2, 4), 2: (3, 4, 5)}, **lists)
    run(plan_prune(checkpoint, manifest, ViewOptions(mtp=mtp)), tmp_path / "out")
    report = verify(tmp_path / "out", source=checkpoint, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)
    ours, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (1 if mtp == "keep" else 0)
    name = f"{MTP}mlp.experts.{{}}.up_proj.weight"
    assert (name.format(2) in ours) == (mtp == "keep")
    assert mtp == "drop" or ours[name.format(2)] == theirs[name.format(5)]


LONG = "index_topk is 24, and of longer windows a token attends to a selection, which is not run: expected"


@pytest.mark.parametrize("command", ["score", "evaluate", "tune", "heal"])
def test_windows_longer_than_the_selection_are_refused_in_a_line(command: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text(
        json.dumps(
            {"format": "shardxform.keep", "version": 1, "keep": {"1": [0, 1], "2": [0, 1]}, "mtp_keep": {"0": [0, 1]}}
        )
    )
    out = str(tmp_path / "out")
    arguments = {
        "score": ["score", str(source), "-o", out],
        "evaluate": ["evaluate", str(source)],
        "tune": ["quantize", str(source), out, "--group-size", "32", "--method", "auto-round"],
        "heal": ["prune", str(source), out, "-m", str(tmp_path / "keep.json"), "--heal", "all"],
    }[command]
    data = ["--data", str(few("calib.jsonl")), "--samples", "4"]
    for length, ends in (("25", 1), ("24", 0)):
        if ends == 0 and command != "score":
            continue
        result = CliRunner().invoke(main, [*arguments, *data, "--seqlen", length])
        assert result.exit_code == ends, result.output
        said = [line for line in result.output.splitlines() if line]
        if ends:
            assert len(said) == 1, said
            assert f"{source}/config.json: {LONG} --seqlen of at most 24, found 25" in said[0]
            assert not Path(out).exists()


def test_a_caller_of_the_library_is_refused_too(source: Path, tmp_path: Path) -> None:
    ids = np.zeros((1, 25), np.int32)
    windows = Windows(ids_NT=ids, fingerprint="x", provenance={"data": "zeros"}, notes=())
    with pytest.raises(FamilyError, match="index_topk is 24"):
        score(Checkpoint.open(source), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("said", [{}, {"index_topk": 1024}])
def test_every_family_whose_indexer_would_select_is_refused(kind: str, said: dict[str, int]) -> None:
    config = {"model_type": kind, "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2, **said}
    layout, most = layout_of(config, []), said.get("index_topk", 2048)
    refuse_longer(layout, most)
    with pytest.raises(FamilyError, match=f"index_topk is {most}, .* of at most {most}, found {most + 1}"):
        refuse_longer(layout, most + 1)


PATTERNS = [
    ({"indexer_types": TYPES}, [0, 1]),
    ({"index_topk_pattern": "FSF"}, [0, 2]),
    ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [0, 2]),
    ({}, [0, 1, 2]),
]


@pytest.mark.parametrize(("keys", "full"), PATTERNS)
def test_the_blocks_that_select_are_those_of_transformers(keys: dict[str, Any], full: list[int]) -> None:
    from transformers import GlmMoeDsaConfig

    config = {"model_type": "glm_moe_dsa", "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2}
    layout = layout_of({**config, **keys}, [])
    found = [layer for layer in range(3) if layout.family.holds("indexer", layout.text, layer)]
    theirs = GlmMoeDsaConfig(**config, **keys).indexer_types
    assert found == full == [layer for layer, kind in enumerate(theirs) if kind == "full"]
