"""The keep manifest: our form, the foreign ones, and every way in which one does not fit a checkpoint."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardxform.ask.manifest import Manifest, keep_all
from shardxform.errors import FamilyError, ManifestError
from shardxform.model.layout import Layout, layout_of

SCHEMA = json.loads((Path(__file__).parent.parent / "manifests" / "schema.json").read_text(encoding="utf-8"))
EXAMPLE = (Path(__file__).parent.parent / "manifests" / "README.md").read_text(encoding="utf-8")


def qwen3_5(mtp: bool = True) -> Layout:
    """4 layers of 8 experts, 2 per token, one MTP layer with tensors."""
    text = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mtp_num_hidden_layers": 1,
    }
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
    }
    names = ["model.language_model.layers.0.mlp.gate.weight", "mtp.fc.weight"]
    return layout_of(config, [*names, *(["mtp.layers.0.mlp.gate.weight"] if mtp else [])])


def qwen3(**changes: Any) -> Layout:
    """Layer 1 of 4 is dense; 8 experts, 2 per token; no MTP."""
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    }
    return layout_of(config | changes, ["model.layers.0.mlp.gate.weight"])


def deepseek(**changes: Any) -> Layout:
    """Layer 0 of 3 is dense; 16 experts in 4 groups, 4 per token from 2 groups; the MTP layer is number 3."""
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    }
    return layout_of(
        config | changes, ["model.layers.1.mlp.gate.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
    )


HALF = [0, 2, 3, 7]
KEEP = {str(layer): HALF for layer in range(4)}
OURS = {
    "format": "shardxform.keep",
    "version": 1,
    "model": {"model_type": "qwen3_5_moe", "num_layers": 4, "num_experts": 8},
    "criterion": "reap",
    "ratio": 0.5,
    "provenance": {"seed": 0},
    "keep": KEEP,
    "mtp_keep": {"0": [0, 1, 2, 6]},
}


def ours(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(OURS), **changes}


def ours_of(keep: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": "shardxform.keep", "version": 1, "keep": keep, **more}


def read(value: object, layout: Layout | None = None, **options: Any) -> Manifest:
    return Manifest.from_dict(value, where="keep.json", layout=layout, **options)


def refused(value: object, message: str, layout: Layout | None = None) -> None:
    """Refused in exactly these words, on one line."""
    with pytest.raises(ManifestError, match="^" + re.escape(message) + "$"):
        read(value, layout)


def record(**inputs: Any) -> dict[str, Any]:
    return {"format": "shardxform.provenance", "version": 1, "inputs": inputs, "files": {}}


def test_the_record_of_an_output_has_its_keep_lists() -> None:
    lists = {"keep": KEEP, "mtp_keep": {"0": [0, 1, 2, 6]}}
    for value in (record(command="prune", manifest=lists), record(command="convert", origin={"manifest": lists})):
        manifest = read(value, qwen3_5())
        assert (manifest.keep, manifest.mtp_keep) == (read(OURS).keep, read(OURS).mtp_keep)
    place = "keep.json: inputs.manifest: no keep lists; this output was not pruned"
    refused(record(command="quantize", manifest={}), place)
    refused(record(origin={}), place.replace("inputs.manifest", "inputs.origin.manifest"))
    refused(
        record(manifest={"keep": {"0": [3, 1]}}),
        'keep.json: inputs.manifest.keep["0"][1]: expert 1 after 3, but ids must be ascending; `sort` sorts them',
    )


# -- our form -----------------------------------------------------------------------------------------------------


def test_our_form_is_read_into_its_parts() -> None:
    manifest = read(OURS, qwen3_5())
    assert manifest.keep == {0: (0, 2, 3, 7), 1: (0, 2, 3, 7), 2: (0, 2, 3, 7), 3: (0, 2, 3, 7)}
    assert manifest.mtp_keep == {0: (0, 1, 2, 6)}
    assert (manifest.criterion, manifest.ratio, manifest.num_kept) == ("reap", 0.5, 4)
    assert manifest.model["num_experts"] == 8
    assert manifest.provenance == {"seed": 0}
    assert manifest.where == "keep.json"


def test_our_form_is_written_in_a_fixed_order_with_layers_in_numeric_order() -> None:
    shuffled = {"keep": {str(n): [0, 1] for n in (10, 9, 0)}, **{k: OURS[k] for k in ("ratio", "version", "format")}}
    written = read(shuffled).to_dict()
    assert json.dumps(written) == (
        '{"format": "shardxform.keep", "version": 1, "ratio": 0.5, "keep": {"0": [0, 1], "9": [0, 1], "10": [0, 1]}}'
    )
    assert list(read(OURS).to_dict()) == list(OURS)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.25, 1])
def test_a_ratio_is_a_share(ratio: float) -> None:
    assert read(ours(ratio=ratio)).to_dict()["ratio"] == ratio


def test_what_is_written_is_a_copy() -> None:
    manifest = read(ours(provenance={"data": {"name": "a"}}))
    manifest.to_dict()["provenance"]["data"]["name"] = "b"
    assert manifest.provenance == {"data": {"name": "a"}}


def test_only_format_version_and_keep_are_required() -> None:
    manifest = read(ours_of({"0": [0, 1]}))
    assert (manifest.criterion, manifest.ratio, manifest.mtp_keep, manifest.model) == ("", None, {}, {})
    assert read(ours_of({"0": [0, 1]}, ratio=None)) == manifest


def test_manifests_are_values() -> None:
    one, two = read(OURS), Manifest.from_dict(ours(), where="other.json")
    assert one == two
    assert len({one, two, read(ours(keep={**KEEP, "3": [0, 1, 2, 3]}))}) == 2
    assert one != read(ours(criterion="ean"))


def test_the_constructor_normalises_and_refuses_like_the_reader() -> None:
    manifest = Manifest(keep={1: [0, 1], 0: [2, 3]})  # type: ignore[dict-item]
    assert list(manifest.keep.items()) == [(0, (2, 3)), (1, (0, 1))]
    with pytest.raises(
        ManifestError, match=r'^manifest: keep\["0"\]\[1\]: expert 0 after 1, but ids must be ascending'
    ):
        Manifest(keep={0: (1, 0)})
    with pytest.raises(ManifestError, match="keep: expected layer numbers, found '0'"):
        Manifest(keep={"0": (0, 1)})  # type: ignore[dict-item]


def test_the_example_of_the_readme_is_valid() -> None:
    example = json.loads(EXAMPLE.split("```json\n")[1].split("```")[0])
    jsonschema.validate(example, SCHEMA)
    assert read(example, qwen3_5()).to_dict() == example


# -- files --------------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "keep.json"
    path.write_text(json.dumps(OURS), encoding="utf-8")
    assert Manifest.load(path, qwen3_5()) == read(OURS)
    path.write_text(json.dumps(ours(version=2)), encoding="utf-8")
    with pytest.raises(ManifestError, match="^" + re.escape(f"{path}: version: expected 1, found 2") + "$"):
        Manifest.load(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"keep: 1", "not JSON: Expecting value at line 1 column 1"),
        (b"[1]", "expected an object, found list"),
        (b'{"keep": {"0": [1], "0": [2]}}', "duplicate key '0'"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"keep": {"0": [NaN]}}', "NaN is not JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "keep.json"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=re.escape(f"keep.json: {message}") + "$"):
        Manifest.load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"keep\.json: No such file or directory$"):
        Manifest.load(tmp_path / "keep.json")
    with pytest.raises(ManifestError, match=r": expected a file$"):
        Manifest.load(tmp_path)


def test_a_shard_given_by_mistake_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ManifestError, match=r"which is no keep manifest$"):
        Manifest.load(path)


# -- malformed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object, found []"),
        (ours(format="gguf"), "format: expected \"shardxform.keep\", found 'gguf'"),
        ({"keep": KEEP}, 'format: expected "shardxform.keep", but it is missing'),
        (ours(version=2), "version: expected 1, found 2"),
        (ours(version=True), "version: expected 1, found True"),
        ({"format": "shardxform.keep", "keep": KEEP}, "version: expected 1, but it is missing"),
        ({"format": "shardxform.keep", "version": 1}, "keep: missing"),
        (
            ours(mtp_kep={}),
            "unknown key 'mtp_kep'; the keys are format, version, model, criterion, ratio, provenance, keep, mtp_keep,"
            " width",
        ),
        (ours_of({}), "keep: empty, expected an entry for every layer that has experts"),
        (ours_of([]), "keep: expected an object, found []"),  # type: ignore[arg-type]
        (ours(mtp_keep=[]), "mtp_keep: expected an object, found []"),
        (ours(mtp_keep={"x": [0]}), 'mtp_keep["x"]: expected a layer number as key, such as "12"'),
        (ours(model=[]), "model: expected an object, found []"),
        (ours(model={"model_type": 3}), "model.model_type: expected a text, found 3"),
        (ours(model={"num_layers": "4"}), "model.num_layers: expected a count, found '4'"),
        (ours(model={"num_experts": 0}), "model.num_experts: expected a count, found 0"),
        (ours(model={"num_experts": True}), "model.num_experts: expected a count, found True"),
        (ours(criterion=None), "criterion: expected a text, found None"),
        (ours(provenance="me"), "provenance: expected an object, found 'me'"),
        (ours(ratio="half"), "ratio: expected a number from 0 to 1, found 'half'"),
        (ours(ratio=1.5), "ratio: expected a number from 0 to 1, found 1.5"),
        (ours(ratio=-0.1), "ratio: expected a number from 0 to 1, found -0.1"),
        (ours(ratio=float("nan")), "ratio: expected a number from 0 to 1, found nan"),
        (ours(ratio=True), "ratio: expected a number from 0 to 1, found True"),
        (ours_of({"0": 3}), 'keep["0"]: expected a list of expert ids, found 3'),
        (ours_of({"0": "012"}), "keep[\"0\"]: expected a list of expert ids, found '012'"),
        (ours_of({"0": []}), 'keep["0"]: empty, expected at least one expert id'),
        (ours_of({"0": [0, 1.0]}), 'keep["0"][1]: expected an expert id, found 1.0'),
        (ours_of({"0": [0, True]}), 'keep["0"][1]: expected an expert id, found True'),
        (ours_of({"0": ["1"]}), "keep[\"0\"][0]: expected an expert id, found '1'"),
        (ours_of({"0": [-1]}), 'keep["0"][0]: expected an expert id, found -1'),
        (ours_of({"0": [10**9]}), 'keep["0"][0]: expected an expert id, found 1000000000'),
        (ours_of({"0": [10**9999]}), 'keep["0"][0]: expected an expert id, found a huge int'),
        (ours_of({"0": [1, 2, 1]}), 'keep["0"][2]: expert 1 is listed twice'),
        (
            ours_of({"0": [1, 3, 2]}),
            'keep["0"][2]: expert 2 after 3, but ids must be ascending; `sort` sorts them',
        ),
        (
            ours_of({"0": [0, 1], "1": [0, 1], "2": [0, 1, 2]}),
            'keep["2"]: layer 2 keeps 3 experts, but layer 0 keeps 2; config.json has one expert count for all layers',
        ),
        (
            ours_of({"0": [0, 1]}, mtp_keep={"0": [0]}),
            'mtp_keep["0"]: MTP layer 0 keeps 1 experts, but layer 0 keeps 2;'
            " config.json has one expert count for all layers",
        ),
        (
            ours_of({"0": [0, 9, 10]}, model={"num_experts": 9}),
            'keep["0"][1]: expert 9, but layer 0 has experts 0..8',
        ),
    ],
)
def test_a_malformed_manifest_is_refused_with_the_place(value: object, message: str) -> None:
    refused(value, f"keep.json: {message}")


@pytest.mark.parametrize("key", ["seven", "07", "-1", "+1", " 1", "1_0", "1.0", "", "١", "1" * 10])
def test_a_layer_key_must_be_a_plain_number(key: str) -> None:
    place = json.dumps(key)
    refused(ours_of({key: [0]}), f'keep.json: keep[{place}]: expected a layer number as key, such as "12"')


@pytest.mark.parametrize("value", [{}, {"experts": 3}, {"Keep": KEEP}, {"model.blocks.0": [1]}, {"kept": {"0": [1]}}])
def test_an_unknown_form_is_answered_with_the_list_of_forms(value: object) -> None:
    forms = ["shardxform.keep", "Dorijan10", "oMLX", "0xSero", "llm-compressor", "vLLM profile", "reap-mlx"]
    with pytest.raises(ManifestError, match=r"^keep\.json: expected a keep manifest, ") as caught:
        read(value)
    assert all(form in str(caught.value) for form in forms)


def test_messages_stay_short_and_on_one_line_whatever_the_input() -> None:
    for value in (
        ours_of({"a\n" * 10**6: [0]}),
        ours_of({"0": ["b\n" * 10**6]}),
        ours_of({"0": [[[[[list(range(10**5))]]]]]}),
        ours(**{"k\n" * 10**6: 1}),
        ours(criterion={str(n): n for n in range(10**5)}),
        {"layers\n.layers.0": [0], "x\n" * 10**6: []},
    ):
        with pytest.raises(ManifestError) as caught:
            read(value)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


def test_large_manifests_are_read_in_linear_time() -> None:
    ids = list(range(200_000))
    assert read(ours_of({"0": ids, "1": ids})).num_kept == 200_000
    assert len(read({"version": "1.0", "kept": [[n, 0] for n in range(100_000)]}).keep) == 100_000


# -- against the checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [qwen3_5(), qwen3_5(mtp=False), qwen3(), deepseek()])
def test_keeping_all_fits(layout: Layout) -> None:
    manifest = keep_all(layout)
    manifest.check(layout)
    assert manifest.num_kept == layout.num_experts
    assert read(manifest.to_dict(), layout) == manifest


def test_keeping_all_names_the_layers_that_have_experts() -> None:
    assert list(keep_all(qwen3()).keep) == [0, 2, 3]
    assert (list(keep_all(deepseek()).keep), list(keep_all(deepseek()).mtp_keep)) == ([1, 2], [0])
    assert keep_all(qwen3_5()).mtp_keep == {0: tuple(range(8))}
    assert keep_all(qwen3_5(mtp=False)).mtp_keep == {}
    with pytest.raises(ManifestError, match=r"^keep all: keep: empty"):
        keep_all(qwen3(mlp_only_layers=[0, 1, 2, 3]))


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_5_moe_text"])
def test_a_manifest_for_another_wrapper_of_the_family_fits(name: str) -> None:
    read(ours(model={"model_type": name}), qwen3_5())


def test_a_manifest_without_mtp_layers_fits() -> None:
    read(ours_of(KEEP), qwen3_5())


def fault(layout: Layout, keep: dict[str, Any], message: str, **more: Any) -> Any:
    return pytest.param(layout, ours_of(keep, **more), message, id=message[:60])


@pytest.mark.parametrize(
    ("layout", "value", "message"),
    [
        fault(
            qwen3_5(),
            KEEP,
            "model.model_type: made for 'qwen3_moe', this checkpoint is 'qwen3_5_moe'",
            model={"model_type": "qwen3_moe"},
        ),
        fault(qwen3_5(), KEEP, "model.num_layers: made for 48 layers, this checkpoint has 4", model={"num_layers": 48}),
        fault(
            qwen3_5(),
            KEEP,
            "model.num_experts: made for 128 experts per layer, this checkpoint has 8",
            model={"num_experts": 128},
        ),
        fault(
            qwen3_5(),
            {"0": HALF, "1": HALF, "3": HALF},
            "keep: no entry for layer 2; the model has experts in layers 0..3",
        ),
        fault(
            qwen3_5(),
            {"1": HALF, "3": HALF},
            "keep: no entry for layers 0, 2; the model has experts in layers 0..3",
        ),
        fault(
            qwen3(num_hidden_layers=20, decoder_sparse_step=2, mlp_only_layers=[]),
            {"3": HALF, "5": HALF},
            "keep: no entry for layers 1, 7, 9, 11, 13, 15, 17, 19;"
            " the model has experts in layers 1, 3, 5, 7, 9, 11, 13, 15, ...",
        ),
        fault(
            deepseek(),
            {"1": HALF, "2": HALF, "4": HALF},
            'keep["4"]: there is no layer 4; the model has experts in layers 1..2',
        ),
        fault(
            deepseek(num_hidden_layers=40),
            {"2": HALF, "9": HALF},
            "keep: no entry for layers 1, 3..8, 10..39; the model has experts in layers 1..39",
        ),
        fault(
            qwen3(),
            KEEP,
            'keep["1"]: layer 1 is dense, it has no experts; the model has experts in layers 0, 2..3',
        ),
        fault(
            qwen3_5(),
            {**KEEP, "4": HALF},
            'keep["4"]: there is no layer 4; the model has experts in layers 0..3',
        ),
        fault(
            deepseek(),
            {"1": HALF, "2": HALF, "3": HALF},
            'keep["3"]: there is no layer 3; the model has experts in layers 1..2;'
            ' the MTP layer of that number belongs in mtp_keep["0"]',
        ),
        fault(
            qwen3_5(),
            {**KEEP, "1": [0, 1, 2], "2": [0]},
            'keep["1"]: layer 1 keeps 3 experts, but layer 0 keeps 4; config.json has one expert count for all layers',
        ),
        fault(
            qwen3_5(),
            KEEP,
            'mtp_keep["0"]: MTP layer 0 keeps 3 experts, but layer 0 keeps 4;'
            " config.json has one expert count for all layers",
            mtp_keep={"0": [0, 1, 2]},
        ),
        fault(
            qwen3_5(),
            {layer: [0] for layer in KEEP},
            "keep: 1 experts per layer, but the router picks 2 per token (num_experts_per_tok)",
        ),
        fault(qwen3_5(), {**KEEP, "2": [0, 1, 8, 9]}, 'keep["2"][2]: expert 8, but layer 2 has experts 0..7'),
        fault(
            qwen3_5(),
            KEEP,
            'mtp_keep["0"][3]: expert 8, but MTP layer 0 has experts 0..7',
            mtp_keep={"0": [0, 1, 2, 8]},
        ),
        fault(
            qwen3_5(),
            KEEP,
            'mtp_keep["1"]: there is no MTP layer 1; the model has experts in MTP layers 0',
            mtp_keep={"0": HALF, "1": HALF},
        ),
        fault(
            qwen3_5(),
            KEEP,
            "mtp_keep: no entry for MTP layer 0; the model has experts in MTP layers 0",
            mtp_keep={"1": HALF},
        ),
        fault(
            qwen3_5(mtp=False), KEEP, "mtp_keep: this checkpoint has no MTP layer with experts", mtp_keep={"0": HALF}
        ),
        fault(
            qwen3(mlp_only_layers=[]),
            KEEP,
            "mtp_keep: this checkpoint has no MTP layer with experts",
            mtp_keep={"0": HALF},
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_with_the_place(
    layout: Layout, value: dict[str, Any], message: str
) -> None:
    refused(value, f"keep.json: {message}", layout)


EVEN = [0, 1, 4, 5, 8, 9, 12, 13]  # two of each group of four
UNEVEN = [0, 1, 4, 5, 6, 8, 9, 12]


@pytest.mark.parametrize(
    ("layout", "keep", "mtp_keep", "message"),
    [
        (
            deepseek(),
            {"1": EVEN, "2": UNEVEN},
            {},
            'keep["2"]: keeps 3 experts of router group 1 (4..7), but 2 of group 0;'
            " each of the 4 groups (n_group) must keep equally many",
        ),
        (
            deepseek(),
            {"1": EVEN, "2": EVEN},
            {"0": UNEVEN},
            'mtp_keep["0"]: keeps 3 experts of router group 1 (4..7), but 2 of group 0;'
            " each of the 4 groups (n_group) must keep equally many",
        ),
        (
            deepseek(),
            {"1": [0, 4, 8, 12], "2": [1, 5, 9, 13]},
            {},
            "keep: 1 expert per router group, but the router needs two to score a group",
        ),
        (
            deepseek(topk_group=1),
            {"1": EVEN, "2": EVEN},
            {},
            "keep: 2 experts per router group, but the router picks 4 per token from 1 groups (topk_group);"
            " keep at least 4 per group",
        ),
    ],
)
def test_router_groups_must_stay_usable(layout: Layout, keep: Any, mtp_keep: Any, message: str) -> None:
    refused(ours_of(keep, mtp_keep=mtp_keep), f"keep.json: {message}", layout)


def test_an_equal_cut_of_router_groups_fits() -> None:
    other = [2, 3, 6, 7, 10, 11, 14, 15]
    read(ours_of({"1": EVEN, "2": other}, mtp_keep={"0": other}), deepseek())
    read(ours_of({"1": UNEVEN, "2": UNEVEN}), deepseek(n_group=1))


def test_a_router_without_groups_needs_no_more_than_its_top_k() -> None:
    read(ours_of({"1": [3], "2": [5]}), deepseek(n_group=1, num_experts_per_tok=1))


def test_two_groups_are_groups() -> None:
    refused(
        ours_of({"1": [0, 1, 2, 3, 8, 9], "2": EVEN[:6]}),
        'keep.json: keep["1"]: keeps 2 experts of router group 1 (8..15), but 4 of group 0;'
        " each of the 2 groups (n_group) must keep equally many",
        deepseek(n_group=2),
    )


def test_groups_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(FamilyError, match=r"^config\.json: n_group is 3, which does not divide 16 experts$"):
        read(ours_of({"1": EVEN, "2": EVEN}), deepseek(n_group=3))


def test_the_most_telling_error_comes_first() -> None:
    """Each repair uncovers the next fault: identity, layers, counts, top-k, range."""
    value = ours_of({"0": [9], "1": [0, 9]}, model={"num_layers": 3})
    layout = qwen3_5()
    messages = []
    for repair in (
        lambda: value["model"].update(num_layers=4),
        lambda: value["keep"].update({"2": [9], "3": [9]}),
        lambda: value["keep"].update({"1": [9]}),
        lambda: value.update(keep={layer: [0, 9] for layer in KEEP}),
    ):
        with pytest.raises(ManifestError) as caught:
            read(value, layout)
        messages.append(str(caught.value).removeprefix("keep.json: ").split(":")[0])
        repair()
    with pytest.raises(ManifestError, match=r"expert 9, but layer 0 has experts 0\.\.7"):
        read(value, layout)
    assert messages == ["model.num_layers", "keep", 'keep["1"]', "keep"]


# -- foreign forms ------------------------------------------------------------------------------------------------


def test_dorijan10() -> None:
    value = {"n_expert": 8, "metric": "reap", "source": "calib", "keep": KEEP, "scores": {"0": [0.5]}, "seed": 1}
    manifest = read(value, qwen3_5())
    assert manifest.keep == read(ours_of(KEEP)).keep
    assert manifest.criterion == "reap"
    assert manifest.model == {"num_experts": 8}
    assert manifest.provenance == {
        "source": "calib",
        "seed": 1,
        "not_imported": ["scores"],
        "imported_from": "Dorijan10",
    }


def test_omlx() -> None:
    manifest = read({"1": [0, 1], "0": [2, 3]})
    assert manifest.keep == {0: (2, 3), 1: (0, 1)}
    assert manifest.provenance == {"imported_from": "oMLX"}


def test_0xsero() -> None:
    manifest = read({"3": {"kept": [0, 5], "keep": 2}, "4": {"kept": [1, 2]}})
    assert manifest.keep == {3: (0, 5), 4: (1, 2)}
    assert manifest.provenance == {"imported_from": "0xSero"}


@pytest.mark.parametrize("module", ["mlp", "mlp.gate", "mlp.gate.weight", "block_sparse_moe"])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", ""])
def test_llm_compressor(module: str, prefix: str) -> None:
    paths = {f"{prefix}layers.{layer}.{module}": [layer, 7] for layer in range(4)}
    manifest = read(paths | {"mtp.layers.0.mlp": [1, 2]}, qwen3_5())
    assert manifest.keep == {layer: (layer, 7) for layer in range(4)}
    assert manifest.mtp_keep == {0: (1, 2)}
    assert manifest.provenance == {"imported_from": "llm-compressor"}


def test_llm_compressor_nested_under_retained_experts() -> None:
    manifest = read({"retained_experts": {"model.layers.0.mlp": [0, 1]}, "sparsity": 0.5})
    assert manifest.keep == {0: (0, 1)}
    assert manifest.provenance == {"sparsity": 0.5, "imported_from": "llm-compressor"}


def test_vllm_profile_is_the_complement() -> None:
    gone = [[layer, expert] for layer in (3, 0, 1, 2) for expert in (6, 1, 4, 5)]
    manifest = read({"version": 1, "model": "a-model", "pruned_experts": gone}, qwen3_5())
    assert manifest.keep == dict.fromkeys(range(4), (0, 2, 3, 7))
    assert manifest.mtp_keep == {}
    assert manifest.provenance == {"model": "a-model", "imported_from": "vLLM profile"}


def test_vllm_profile_that_spares_a_layer_keeps_all_of_it() -> None:
    refused(
        {"version": 1, "pruned_experts": [[0, 1], [1, 1], [3, 1]]},
        'keep.json (vLLM profile form): keep["2"]: layer 2 keeps 8 experts, but layer 0 keeps 7;'
        " config.json has one expert count for all layers",
        qwen3_5(),
    )


def test_reap_mlx_sorts_because_pairs_have_no_order() -> None:
    kept = [{"layer": 1, "expert": 7}, {"layer": 0, "expert": 3}, {"layer": 1, "expert": 2}, {"layer": 0, "expert": 1}]
    pruned = [{"layer": 0, "expert": 0, "score": 0.1}]
    manifest = read({"version": "1.0", "kept": kept, "pruned": pruned})
    assert manifest.keep == {0: (1, 3), 1: (2, 7)}
    assert manifest.provenance == {"imported_from": "reap-mlx"}


def test_layers_numbered_after_the_blocks_go_to_the_mtp_layers_of_a_family_that_counts_so() -> None:
    keep = dict.fromkeys((1, 2, 3), EVEN)
    gone = [[layer, expert] for layer in keep for expert in range(16) if expert not in EVEN]
    for value in (
        {str(layer): ids for layer, ids in keep.items()},
        {str(layer): {"kept": ids} for layer, ids in keep.items()},
        {"n_expert": 16, "keep": {str(layer): ids for layer, ids in keep.items()}},
        {f"model.layers.{layer}.mlp": ids for layer, ids in keep.items()},
        {"version": 1, "pruned_experts": gone},
        {"version": "1.0", "kept": [[layer, expert] for layer in keep for expert in EVEN]},
    ):
        manifest = read(value, deepseek())
        assert (manifest.keep, manifest.mtp_keep) == ({1: tuple(EVEN), 2: tuple(EVEN)}, {0: tuple(EVEN)})
    assert list(read({str(layer): EVEN for layer in keep}).keep) == [1, 2, 3]  # nobody can tell without the config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n_expert": "8", "keep": KEEP}, "n_expert: expected a number, found '8'"),
        ({"metric": 3, "keep": KEEP}, "metric: expected a text, found 3"),
        ({"n_expert": 8, "keep": {"x": [0]}}, 'keep["x"]: expected a layer number as key, such as "12"'),
        ({"0": [1, 1]}, '["0"][1]: expert 1 is listed twice'),
        ({"0": [0], "note": "hi"}, '["note"]: expected a layer number as key, such as "12"'),
        ({"0": {"kept": [0, 1], "keep": 3}}, '["0"].keep: 3, but kept lists 2 experts'),
        ({"0": {"kept": [0], "keep": True}}, '["0"].keep: True, but kept lists 1 experts'),
        ({"0": {"keep": 2}}, '["0"].kept: expected a list of expert ids, found None'),
        ({"0": {"kept": [0]}, "1": [0]}, '["1"]: expected an object, found [0]'),
        ({"0": {"kept": [0]}, "x": {"kept": [0]}}, '["x"]: expected a layer number as key, such as "12"'),
        (
            {"model.layers.0.mlp": [0], "lm_head": [0]},
            "[\"lm_head\"]: expected a module path with 'layers.<number>'",
        ),
        (
            {"model.layers.0.mlp": [0], "model.layers.0.mlp.gate": [0]},
            '["model.layers.0.mlp.gate"]: a second module of layer 0',
        ),
        ({"mtp.layers.0.a": [0], "mtp.layers.0.b": [0]}, '["mtp.layers.0.b"]: a second module of MTP layer 0'),
        ({"retained_experts": [1]}, "retained_experts: expected an object, found [1]"),
        (
            {"retained_experts": {"model.layers.1.mlp": [2, 1]}},
            'retained_experts["model.layers.1.mlp"][1]: expert 1 after 2, but ids must be ascending; `sort` sorts them',
        ),
        ({"version": 1, "kept": []}, "version: expected '1.0' in this form, found 1"),
        ({"kept": [[0, 1, 2]]}, "kept[0]: expected a layer and an expert, found [0, 1, 2]"),
        ({"kept": [{"layer": 0}]}, "kept[0]: expected an expert id, found None"),
        ({"kept": [{"layer": True, "expert": 0}]}, "kept[0]: expected a layer number, found True"),
        ({"kept": [[0, 1], [1, 1], [0, 1]]}, "kept[2]: expert 1 of layer 0 is listed twice"),
        ({"kept": [[0, 1], [0, 2]], "pruned": [[0, 0], [0, 2]]}, "pruned[1]: expert 2 of layer 0 is also kept[1]"),
        ({"kept": [[0, 1]], "pruned": 3}, "pruned: expected a list, found 3"),
        (
            {"version": 1, "pruned_experts": [[0, 1]]},
            "pruned_experts: a vLLM profile lists the experts to remove; reading it needs the checkpoint, to know how"
            " many there are",
        ),
    ],
)
def test_a_malformed_foreign_manifest_is_refused_with_the_place(value: object, message: str) -> None:
    refused(value, f"keep.json: {message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"version": 2, "pruned_experts": []}, "version: expected 1 in this form, found 2"),
        ({"version": "1", "pruned_experts": []}, "version: expected 1 in this form, found '1'"),
        ({"pruned_experts": {"0": [1]}}, "pruned_experts: expected a list, found {'0': [1]}"),
        ({"pruned_experts": [[0, 1], [1, 1]]}, "pruned_experts[1]: layer 1 has no experts in this checkpoint"),
        ({"pruned_experts": [[0, 1], [9, 1]]}, "pruned_experts[1]: layer 9 has no experts in this checkpoint"),
        ({"pruned_experts": [[0, 1], [0, 8]]}, "pruned_experts[1]: expert 8, but layer 0 has experts 0..7"),
        ({"pruned_experts": [[2, e] for e in range(8)]}, "pruned_experts: layer 2 would lose all its 8 experts"),
    ],
)
def test_a_malformed_vllm_profile_is_refused_with_the_place(value: object, message: str) -> None:
    refused(value, f"keep.json: {message}", qwen3())


def test_a_foreign_manifest_that_does_not_fit_says_what_it_was_taken_for() -> None:
    refused(
        {"0": HALF},
        "keep.json (oMLX form): keep: no entry for layers 1..3; the model has experts in layers 0..3",
        qwen3_5(),
    )


@pytest.mark.parametrize(
    "value",
    [
        ours_of({"0": [3, 1]}, mtp_keep={"0": [2, 1]}),
        {"n_expert": 4, "keep": {"0": [3, 1]}},
        {"0": [3, 1]},
        {"0": {"kept": [3, 1]}},
        {"model.layers.0.mlp": [3, 1]},
    ],
)
def test_ids_are_sorted_only_when_asked(value: object) -> None:
    with pytest.raises(ManifestError, match="but ids must be ascending"):
        read(value)
    manifest = read(value, sort=True)
    assert manifest.keep == {0: (1, 3)}
    assert manifest.mtp_keep in ({}, {0: (1, 2)})


def test_sorting_does_not_hide_duplicates() -> None:
    with pytest.raises(ManifestError, match=r'keep\["0"\]\[2\]: expert 3 is listed twice'):
        read(ours_of({"0": [3, 1, 3]}), sort=True)


# -- properties ---------------------------------------------------------------------------------------------------

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def keeps(draw: st.DrawFn) -> dict[int, list[int]]:
    """What the four layers of `qwen3_5` may keep."""
    count = draw(st.integers(2, 8))
    ids = st.lists(st.integers(0, 7), min_size=count, max_size=count, unique=True)
    return {layer: sorted(draw(ids)) for layer in range(4)}


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    keep = draw(keeps())
    plain = st.none() | st.integers() | st.text()
    return Manifest(
        keep={layer: tuple(ids) for layer, ids in keep.items()},
        mtp_keep={0: tuple(keep[3])} if draw(st.booleans()) else {},
        model=draw(st.fixed_dictionaries({}, optional={"num_layers": st.just(4), "note": plain})),
        criterion=draw(st.text()),
        ratio=draw(st.none() | st.floats(0, 1)),
        provenance=draw(st.dictionaries(st.text(), plain, max_size=3)),
    )


@SETTINGS
@given(manifests())
def test_writing_and_reading_is_the_identity(manifest: Manifest) -> None:
    written = json.loads(json.dumps(manifest.to_dict()))
    assert Manifest.from_dict(written, layout=qwen3_5()) == manifest
    jsonschema.validate(written, SCHEMA)


@SETTINGS
@given(keeps(), st.randoms())
def test_every_foreign_form_imports_the_same_keep(keep: dict[int, list[int]], random: Any) -> None:
    def shuffled(pairs: list[Any]) -> list[Any]:
        return random.sample(pairs, len(pairs))

    named = {str(layer): ids for layer, ids in shuffled(list(keep.items()))}
    kept = [(layer, expert) for layer, ids in keep.items() for expert in ids]
    gone = [(layer, expert) for layer in keep for expert in range(8) if expert not in keep[layer]]
    paths = {f"model.language_model.layers.{layer}.mlp.gate": ids for layer, ids in named.items()}
    for form, value in {
        "Dorijan10": {"n_expert": 8, "metric": "reap", "source": "x", "keep": named},
        "oMLX": named,
        "0xSero": {layer: {"kept": ids, "keep": len(ids)} for layer, ids in named.items()},
        "llm-compressor": shuffled([paths, {"retained_experts": paths}])[0],
        "vLLM profile": {"version": 1, "pruned_experts": shuffled([list(pair) for pair in gone])},
        "reap-mlx": {
            "version": "1.0",
            "kept": shuffled([{"layer": layer, "expert": expert} for layer, expert in kept]),
            "pruned": shuffled([{"layer": layer, "expert": expert} for layer, expert in gone]),
        },
        "shardxform.json": {"format": "shardxform.provenance", "inputs": {"manifest": {"keep": named}}},
    }.items():
        manifest = Manifest.from_dict(value, layout=qwen3_5())
        assert {layer: list(ids) for layer, ids in manifest.keep.items()} == keep
        assert manifest.provenance["imported_from"] == form


# -- the schema ---------------------------------------------------------------------------------------------------


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("layout", [qwen3_5(), qwen3(), deepseek()])
def test_the_schema_accepts_what_is_written(layout: Layout) -> None:
    jsonschema.validate(keep_all(layout).to_dict(), SCHEMA)
    jsonschema.validate(read(OURS).to_dict(), SCHEMA)


@pytest.mark.parametrize(
    "value",
    [
        {"keep": KEEP},
        {"format": "shardxform.keep", "version": 1},
        ours(format="other"),
        ours(version=2),
        ours(version="1"),
        ours(mtp_kep={}),
        ours_of({}),
        ours_of({"0": []}),
        ours_of({"0": [1, 1]}),
        ours_of({"0": [-1]}),
        ours_of({"0": [True]}),
        ours_of({"0": ["1"]}),
        ours_of({"0": [1.5]}),
        ours_of({"0": [10**9]}),
        ours_of({"07": [1]}),
        ours_of({"x": [1]}),
        ours(mtp_keep={"x": [1]}),
        ours(mtp_keep={"0": [-1]}),
        ours(model=[]),
        ours(model={"num_experts": 0}),
        ours(model={"num_layers": "4"}),
        ours(criterion=3),
        ours(ratio=1.5),
        ours(provenance="me"),
    ],
)
def test_the_schema_and_the_reader_refuse_the_same_faults(value: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, SCHEMA)
    with pytest.raises(ManifestError):
        read(value)
