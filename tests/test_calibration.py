"""Windows of token ids: literals, the laws of packing, the reference's choice of documents, and hostile inputs.

The tokenizer of most tests gives every byte its value as id, so that the windows expected can be written down.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from shardxform.calibration import DataOptions, Windows, documents, load_windows, readers, tokens
from shardxform.calibration.documents import cut
from shardxform.calibration.windows import with_extra
from shardxform.errors import CheckpointError, PlanError

ROOT = Path(__file__).resolve().parents[1]
END, BEGIN = 256, 257
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def byte_tokenizer(root: Path, begin: bool = False, **config: Any) -> Path:
    """Write config.json and a tokenizer whose ids are the bytes of the text, 256 for its end, 257 for a begin."""
    root.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    backend = Backend(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<begin>"])
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<begin> $A", pair="<begin> $A $B", special_tokens=[("<begin>", BEGIN)]
        )
    backend.save(str(root / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "TokenizersBackend", "eos_token": "<end>", "bos_token": "<begin>"}
    (root / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (root / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "vocab_size": 258} | config))
    return root


@pytest.fixture(scope="session")
def bytes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def text_of(windows: Windows) -> list[str]:
    """Windows of a byte tokenizer as text, `|` for the end of a document and `^` for its begin."""
    names = {END: "|", BEGIN: "^"}
    return ["".join(names.get(token) or chr(token) for token in row) for row in windows.ids_NT.tolist()]


def load(root: Path, data: Path, **options: Any) -> Windows:
    return load_windows(root, DataOptions(data=str(data), **options))


# -- packing -------------------------------------------------------------------------------------------------------


def test_documents_are_joined_with_the_end_token_and_cut_from_the_start(bytes_root: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", ["abc", "", "defghi", "jk"])
    windows = load(bytes_root, data, samples=9, seqlen=4)
    assert text_of(windows) == ["abc|", "|def", "ghi|"]  # jk| does not fill one
    assert windows.ids_NT.dtype == np.int32
    assert windows.notes == (f"asked for 9 windows of 4 tokens, {data} gives 3",)
    assert windows.provenance | {"sha256": "", "tokenizer": "", "tokenizer_sha256": ""} == {
        "data": "d.jsonl",
        "files": ["d.jsonl"],
        "sha256": "",
        "samples_asked": 9,
        "samples": 3,
        "seqlen": 4,
        "seed": 42,
        "pack": True,
        "chat_template": False,
        "text_key": "text",
        "documents": 3,
        "tokens": 12,
        "tokenizer": "",
        "tokenizer_sha256": "",
    }
    assert text_of(load(bytes_root, data, samples=2, seqlen=4)) == ["abc|", "|def"]
    assert load(bytes_root, data, samples=3, seqlen=4).notes == ()
    assert load(bytes_root, data, samples=3, seqlen=4, seed=7).fingerprint == windows.fingerprint


@pytest.mark.oracle
def test_held_out_windows_are_those_of_the_quality_benchmark(small_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = small_moe / "text" / "heldout.jsonl"
    windows = load(small_moe, heldout, samples=64, seqlen=256)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_quality", ROOT / "benchmarks" / "bench_quality.py")
    assert spec
    assert spec.loader
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_quality", bench)  # where dataclasses look their module up
    spec.loader.exec_module(bench)
    assert np.array_equal(windows.ids_NT, bench.windows(small_moe, heldout, 64, 256).numpy())
    assert windows.fingerprint == "e305dd09a1f67dfb9be325c122360115db450d05d6088012d8b38e73df05cc04"
    assert windows.provenance["sha256"] == "2b50fe1194632cf3e678434bcf6f8fbcf64317953a629175bc36fc757993b2fc"
    assert windows.notes == ()


def test_windows_are_made_of_pieces_of_those_that_teach(bytes_root: Path) -> None:
    ids_NT = np.arange(4 * 200, dtype=np.int32).reshape(4, 200) % 100  # a run is known by its steps of one
    ids_NT[2] = 150
    windows = Windows(ids_NT=ids_NT, fingerprint="f", provenance={"data": "d"}, notes=())
    more = with_extra(windows, 30, [0, 1, 3], bytes_root, 42)
    assert (more.ids_NT.shape, more.ids_NT.dtype, more.provenance) == ((34, 200), np.int32, {"data": "d"})
    assert (more.ids_NT[:4] == ids_NT).all()
    extra_NT = more.ids_NT[4:]
    backend = Backend.from_file(str(bytes_root / "tokenizer.json"))
    special = {backend.token_to_id(token.content) for token in backend.get_added_tokens_decoder().values()}
    assert special
    assert not special & set(extra_NT.ravel().tolist())
    assert (extra_NT == 150).mean() < 0.02  # as one of all tokens; a quarter of the text is of them
    at_N, from_N = np.nonzero(extra_NT < 100)
    offset_N = (extra_NT[at_N, from_N] - from_N) % 100
    run = np.flatnonzero((np.diff(offset_N) == 0) & (np.diff(at_N) == 0) & (np.diff(from_N) == 1)).size
    assert 0.12 < run / extra_NT.size < 0.25  # neighbours both stand by chance of a quarter, and not where pieces meet
    same, other, seed = (with_extra(windows, n, [0, 1, 3], bytes_root, s) for n, s in ((30, 42), (29, 42), (30, 43)))
    assert same.fingerprint == more.fingerprint
    assert len({windows.fingerprint, more.fingerprint, other.fingerprint, seed.fingerprint}) == 4


def reference(texts: Sequence[str], samples: int, seqlen: int) -> list[list[int]]:
    ids = [token for text in texts for token in [*text.encode(), END]]
    return [ids[at : at + seqlen] for at in range(0, len(ids) - seqlen + 1, seqlen)][:samples]


DOCUMENTS = st.lists(st.text(st.sampled_from("ab \n\t\ré中🙂"), max_size=40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    texts=DOCUMENTS,
    cuts=st.sets(st.integers(1, 11), max_size=3),
    samples=st.integers(1, 6),
    seqlen=st.integers(2, 30),
    piece=st.sampled_from([1, 2, 5, 1 << 18]),
    batch=st.sampled_from([1, 7, 1 << 19]),
)
def test_windows_do_not_depend_on_files_pieces_or_batches(
    bytes_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    cuts: set[int],
    samples: int,
    seqlen: int,
    piece: int,
    batch: int,
) -> None:
    expected = reference(texts, samples, seqlen)
    folder = tmp_path_factory.mktemp("split")
    edges = [0, *sorted(at for at in cuts if at < len(texts)), len(texts)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        jsonl(folder / f"{number}.jsonl", texts[start:stop])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE", piece)
        patch.setattr(tokens, "_BATCH_CHARACTERS", batch)
        if not expected:
            with pytest.raises(PlanError, match=r"expected at least one window|found no (text|document)"):
                load(bytes_root, folder, samples=samples, seqlen=seqlen)
            return
        windows = load(bytes_root, folder, samples=samples, seqlen=seqlen)
    assert windows.ids_NT.tolist() == expected
    used = len(expected) * seqlen
    starts = np.cumsum([0, *(len(text.encode()) + 1 for text in texts)])[:-1]
    assert windows.provenance["documents"] == int((starts < used).sum())


def test_data_are_read_no_further_than_needed(bytes_root: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", ["abcd"] * 300)
    data.write_bytes(data.read_bytes() + b"not JSON\n")
    assert load(bytes_root, data, samples=4, seqlen=5).provenance["documents"] == 4
    with pytest.raises(PlanError, match=r"d\.jsonl:301: not JSON"):
        load(bytes_root, data, samples=301, seqlen=5)


# -- pieces --------------------------------------------------------------------------------------------------------


@given(
    text=st.text(st.sampled_from("ab \n\r"), max_size=80),
    edges=st.sets(st.integers(1, 79), max_size=6),
    piece=st.integers(1, 9),
)
def test_where_a_text_is_cut_does_not_depend_on_how_it_is_read(text: str, edges: set[int], piece: int) -> None:
    at = [0, *sorted(edges), 80]
    runs = [text[a:b] for a, b in itertools.pairwise(at)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE", piece)
        whole, parts = list(cut([text])), list(cut(runs))
    assert whole == parts
    assert "".join(part for part, _ in whole) == text
    assert [last for _, last in whole] == [False] * (len(whole) - 1) + [True]
    assert all(len(part) <= 2 * piece for part, _ in whole)


def test_the_tokens_of_pieces_are_those_of_the_whole_text(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (small_moe / "text" / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)[:200_000]
    path = tmp_path / "all.txt"
    path.write_text(text, encoding="utf-8", newline="")
    whole = load(small_moe, path, samples=1 << 20, seqlen=2)
    monkeypatch.setattr(documents, "PASSAGE", 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_RUN_BYTES", 777)
        cut_up = load(small_moe, path, samples=1 << 20, seqlen=2)
    assert whole.fingerprint == cut_up.fingerprint
    assert whole.provenance["tokens"] > 50_000


# -- one document a window -----------------------------------------------------------------------------------------


def sampled(texts: Sequence[str], samples: int, seqlen: int, seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(texts))
    heads = (texts[at][:seqlen] for at in order)
    return [head for head in heads if len(head) == seqlen and head.count(head[-1]) <= max(seqlen // 2, 1)][:samples]


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("abcdef"), max_size=9), min_size=1, max_size=60),
    samples=st.integers(1, 5),
    seed=st.integers(0, 1 << 40),
    piece=st.sampled_from([1, 1 << 18]),
    split=st.integers(0, 60),
)
def test_documents_are_taken_in_the_order_of_the_seed(
    bytes_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    samples: int,
    seed: int,
    piece: int,
    split: int,
) -> None:
    folder = tmp_path_factory.mktemp("sampled")
    for name, some in (("1.jsonl", texts[:split]), ("2.jsonl", texts[split:])):
        jsonl(folder / name, some)
    expected = sampled(texts, samples, 4, seed)
    options = {"samples": samples, "seqlen": 4, "seed": seed, "pack": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE", piece)
        if not expected:
            with pytest.raises(PlanError, match=r"expected at least one document of 4 tokens|found no (text|document)"):
                load(bytes_root, folder, **options)
            return
        windows = load(bytes_root, folder, **options)
    assert text_of(windows) == expected
    assert windows.notes == (
        ()
        if len(expected) == samples
        else (f"asked for {samples} windows of 4 tokens, {folder} gives {len(expected)}",)
    )
    assert windows.provenance["files"] == ["1.jsonl", "2.jsonl"]
    assert windows.provenance["documents"] == len(expected)


@pytest.mark.parametrize("rank", [0, 3, 4, 7, 8, 15, 16, 19])
def test_the_only_document_that_is_long_enough_is_found(bytes_root: Path, tmp_path: Path, rank: int) -> None:
    order = np.random.default_rng(42).permutation(20)
    texts = ["abcd" if at == order[rank] else "abc" for at in range(20)]
    data = jsonl(tmp_path / "d.jsonl", texts)
    assert text_of(load(bytes_root, data, samples=1, seqlen=4, pack=False)) == ["abcd"]


def test_a_document_begins_with_the_token_that_the_tokenizer_puts_there(tmp_path: Path) -> None:
    root = byte_tokenizer(tmp_path / "model", begin=True)
    data = jsonl(tmp_path / "d.jsonl", ["abcdef"])
    assert text_of(load(root, data, samples=1, seqlen=4, pack=False)) == ["^abc"]
    assert text_of(load(root, data, samples=1, seqlen=4)) == ["abcd"]


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [42, 7])
def test_the_reference_takes_the_same_documents(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    import datasets
    from auto_round.calib_dataset import get_dataset
    from transformers import AutoTokenizer

    lines = (small_moe / "text" / "calib.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line)["text"] for line in lines]
    texts = [text[at : at + 1500] for text in whole for at in range(0, len(text), 1500)] + ["-" * 9000, "- " * 9000]
    ours = load(small_moe, jsonl(tmp_path / "d.jsonl", texts), samples=40, seqlen=256, seed=seed, pack=False)
    table = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    tokenizer = AutoTokenizer.from_pretrained(small_moe)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = get_dataset(tokenizer, 256, "NeelNanda/pile-10k", seed=seed, nsamples=40)
    assert ours.ids_NT.tolist() == [row["input_ids"][:256].tolist() for row in theirs]
    assert len(ours.ids_NT) == 40


# -- files ---------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, list[Any]], rows: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def test_every_kind_of_file_gives_the_same_documents(bytes_root: Path, tmp_path: Path) -> None:
    texts = ["one", "two", "three", "vier\r\n\nfünf", "six"]
    lines = [json.dumps({"id": 1, "text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "b.json").write_text("\n".join(lines))
    (tmp_path / "c.json").write_text("  [" + ",\n".join(lines) + "]\n")
    (tmp_path / "d.JSONL").write_text("\r\n".join(lines) + "\r\n")
    parquet(tmp_path / "e.parquet", {"id": [1] * 5, "text": texts})
    folder = tmp_path / "f"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.{'md' if number % 2 else 'txt'}").write_text(text, encoding="utf-8-sig", newline="")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "deeper.txt").mkdir()
    for options in ({"seqlen": 10, "samples": 9}, {"seqlen": 4, "samples": 2, "pack": False}):
        found = {path.name: load(bytes_root, path, **options) for path in sorted(tmp_path.iterdir())}
        assert len(found) == 6
        assert len({windows.fingerprint for windows in found.values()}) == 1, text_of(found["a.jsonl"])
    assert found["f"].provenance["files"] == ["0.txt", "1.md", "2.txt", "3.md", "4.txt"]


def test_the_digest_covers_the_files_that_were_used(bytes_root: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [name * 9])
    before = load(bytes_root, tmp_path, samples=1, seqlen=12)
    assert before.provenance["files"] == ["a.jsonl", "b.jsonl"]
    jsonl(tmp_path / "c.jsonl", ["other"])
    assert load(bytes_root, tmp_path, samples=1, seqlen=12).provenance == before.provenance
    jsonl(tmp_path / "b.jsonl", ["b" * 9, "more"])
    after = load(bytes_root, tmp_path, samples=1, seqlen=12)
    assert after.fingerprint == before.fingerprint
    assert after.provenance["sha256"] != before.provenance["sha256"]
    assert str(tmp_path) not in json.dumps(after.provenance)


@pytest.mark.parametrize(
    ("record", "key", "found"),
    [
        ({"text": "aaa", "content": "bbb"}, "", "aaa|"),
        ({"content": "bbb", "messages": []}, "", "bbb|"),
        ({"body": "ccc", "text": "aaa"}, "body", "ccc|"),
    ],
)
def test_the_field_of_the_documents(
    bytes_root: Path, tmp_path: Path, record: dict[str, Any], key: str, found: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record))
    assert text_of(load(bytes_root, path, samples=1, seqlen=4, text_key=key)) == [found]
    table = parquet(tmp_path / "d.parquet", {name: [value] for name, value in record.items()})
    assert text_of(load(bytes_root, table, samples=1, seqlen=4, text_key=key)) == [found]


# -- conversations -------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_conversations_are_rendered_with_the_chat_template(tmp_path: Path) -> None:
    root = byte_tokenizer(tmp_path / "model", begin=True)
    (root / "chat_template.jinja").write_text("<begin>" + TEMPLATE)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "", "conversations": TURNS}))
    windows = load(root, path, samples=1, seqlen=23, chat_template=True)
    assert text_of(windows) == ["^<user>hi<assistant>yo|"]
    alone = load(root, path, samples=1, seqlen=22, chat_template=True, pack=False)
    assert text_of(alone) == ["^<user>hi<assistant>yo"]
    table = parquet(tmp_path / "d.parquet", {"messages": [TURNS]})
    assert load(root, table, samples=1, seqlen=22, chat_template=True, pack=False).fingerprint == alone.fingerprint


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": TURNS}, "", "model: expected a tokenizer with a chat template, found none"),
        ({"messages": TURNS}, "{{ raise_exception('no users') }}", "d.jsonl:1: the chat template refuses it: no users"),
        ({"messages": TURNS}, "{{ x.y.z }}", "d.jsonl:1: the chat template refuses it: 'x' is undefined"),
        ({"messages": []}, TEMPLATE, "d.jsonl:1: messages: expected a list of messages, found an empty list"),
        ({"messages": "hi"}, TEMPLATE, "d.jsonl:1: messages: expected a list of messages, found str"),
        (
            {"messages": [{"role": "user"}]},
            TEMPLATE,
            "d.jsonl:1: message 1: expected 'content' or 'tool_calls', found 'role'",
        ),
        ({"messages": [*TURNS, None]}, TEMPLATE, "d.jsonl:1: message 3: expected an object, found null"),
        ({"messages": TURNS, "conversations": TURNS}, TEMPLATE, "found both 'messages' and 'conversations'"),
        ({"text": "hi"}, TEMPLATE, "expected a field 'messages', 'conversations' or 'conversation', found 'text'"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, record: Any, template: str, message: str) -> None:
    root = byte_tokenizer(tmp_path / "model")
    if template:
        (root / "chat_template.jinja").write_text(template)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(PlanError) as caught:
        load(root, path, samples=1, seqlen=4, chat_template=True)
    assert message in str(caught.value)


# -- sources -------------------------------------------------------------------------------------------------------


def sourced(path: Path, documents: Iterable[tuple[str, str]]) -> Path:
    records = [{"text": text, "source": source} for source, text in documents]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


MIXED = [("b", "uvw"), ("a", "1234"), ("c", "!"), ("a", "567"), ("b", "xyzxyz"), ("a", "89")]


def test_sources_are_kept_apart_in_the_order_of_their_names(bytes_root: Path, tmp_path: Path) -> None:
    data = sourced(tmp_path / "d.jsonl", MIXED)
    windows = load(bytes_root, data, samples=3, seqlen=4, by_source=True)
    assert text_of(windows) == ["1234", "|567", "|89|", "uvw|", "xyzx"]
    assert windows.rows == (("a", range(3)), ("b", range(3, 5)))
    assert windows.notes == (
        f"source 'b': asked for 3 windows of 4 tokens, {data} gives 2",
        "source 'c': expected at least one window of 4 tokens, found 2 tokens in 1 document; it is left out",
    )
    assert windows.provenance["by_source"] == {"a": 3, "b": 2}
    assert "sources" not in windows.provenance
    assert [windows.provenance[key] for key in ("samples_asked", "samples", "tokens", "documents")] == [3, 5, 20, 5]


def test_documents_of_some_sources_alone(bytes_root: Path, tmp_path: Path) -> None:
    data = sourced(tmp_path / "d.jsonl", MIXED)
    windows = load(bytes_root, data, samples=3, seqlen=4, sources=("c", "b"))
    assert text_of(windows) == ["uvw|", "!|xy", "zxyz"]  # joined, in the order of the data
    assert windows.rows == ()
    assert windows.provenance["sources"] == ["b", "c"]
    assert "by_source" not in windows.provenance
    other = load(bytes_root, data, samples=3, seqlen=4, sources=("b", "c", "b"))
    assert (other.fingerprint, other.provenance) == (windows.fingerprint, windows.provenance)


def test_the_fingerprint_says_which_sources_there_were(bytes_root: Path, tmp_path: Path) -> None:
    data = sourced(tmp_path / "d.jsonl", [("a", "abc"), ("a", "def")])
    asked: list[dict[str, Any]] = [{}, {"sources": ("a",)}, {"by_source": True}, {"by_source": True, "sources": ("a",)}]
    found = [load(bytes_root, data, samples=2, seqlen=4, **options) for options in asked]
    assert [text_of(windows) for windows in found] == [["abc|", "def|"]] * 4
    assert len({windows.fingerprint for windows in found}) == 4
    assert list(found[0].provenance) == list(found[1].provenance)[:-1]
    assert found[0].fingerprint == "3c6108fc4e5c89154622f8598022c9a02b5abe53dccd89ac764f62440952c6fd"


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.sampled_from("abc"), st.text(st.sampled_from("xy \né"), max_size=15)), min_size=1, max_size=25
    ),
    split=st.integers(0, 25),
    samples=st.integers(1, 4),
    seqlen=st.integers(2, 12),
    pack=st.booleans(),
    batch=st.sampled_from([1, 1 << 19]),
    piece=st.sampled_from([2, 1 << 18]),
)
def test_windows_of_a_source_are_those_of_data_without_the_others(
    bytes_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[str, str]],
    split: int,
    samples: int,
    seqlen: int,
    pack: bool,
    batch: int,
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    sourced(folder / "1.jsonl", documents[:split])
    sourced(folder / "2.jsonl", documents[split:])
    options = {"samples": samples, "seqlen": seqlen, "pack": pack}

    def of(where: Path, **more: Any) -> Windows | None:
        try:
            return load(bytes_root, where, **options, **more)
        except PlanError as e:
            if not re.search("expected at least one|found no (text|document)", str(e)):
                raise
            return None

    names = {source for source, _ in documents}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BATCH_CHARACTERS", batch)
        patch.setattr("shardxform.calibration.documents.PASSAGE", piece)
        alone = {
            name: of(jsonl(folder.parent / f"{folder.name}-{name}.jsonl", [t for s, t in documents if s == name]))
            for name in names
        }
        chosen = {name: of(folder, sources=(name,)) for name in names}
        apart = of(folder, by_source=True)
    expected = {name: windows.ids_NT.tolist() for name, windows in alone.items() if windows}
    assert {name: windows.ids_NT.tolist() for name, windows in chosen.items() if windows} == expected
    assert {name: apart.ids_NT[rows].tolist() for name, rows in apart.rows} == expected if apart else not expected
    if apart:
        assert [name for name, _ in apart.rows] == sorted(expected)


def test_named_sources_are_read_no_further_than_needed(bytes_root: Path, tmp_path: Path) -> None:
    data = sourced(tmp_path / "d.jsonl", [("a", "abc")] * 300 + [("b", "ghi")] * 300)
    data.write_bytes(data.read_bytes() + b"not JSON\n")
    windows = load(bytes_root, data, samples=1, seqlen=4, by_source=True, sources=("a", "b"))
    assert text_of(windows) == ["abc|", "ghi|"]
    assert text_of(load(bytes_root, data, samples=1, seqlen=4, sources=("a", "b"))) == ["abc|"]
    with pytest.raises(PlanError, match=r"d\.jsonl:601: not JSON"):  # is there one more source?
        load(bytes_root, data, samples=1, seqlen=4, by_source=True)


def test_conversations_of_other_sources_are_not_rendered(tmp_path: Path) -> None:
    root = byte_tokenizer(tmp_path / "model")
    (root / "chat_template.jinja").write_text(TEMPLATE)
    records = [{"source": "b", "messages": "none"}, {"source": "a", "messages": [{"role": "u", "content": "hi"}]}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    for pack in (True, False):
        windows = load(root, path, samples=1, seqlen=5, chat_template=True, sources=("a",), pack=pack)
        assert text_of(windows) == ["<u>hi"]


def test_tables_and_arrays_have_sources_too(bytes_root: Path, tmp_path: Path) -> None:
    lines = sourced(tmp_path / "d.jsonl", MIXED)
    columns = {"source": [source for source, _ in MIXED], "text": [text for _, text in MIXED]}
    table = parquet(tmp_path / "d.parquet", columns)
    array = tmp_path / "d.json"
    array.write_text("[" + ",".join(lines.read_text().splitlines()) + "]")
    for options in ({"by_source": True}, {"sources": ("a",), "pack": False, "seqlen": 3}):
        found = [load(bytes_root, path, **{"samples": 2, "seqlen": 4} | options) for path in (lines, table, array)]
        assert len({windows.fingerprint for windows in found}) == 1


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("d.jsonl", '{"text": "abcd"}', {}, "d.jsonl:1: expected a field 'source', found 'text'"),
        ("d.jsonl", '{"text": "abcd", "source": null}', {}, "d.jsonl:1: source: expected a string, found NoneType"),
        ("d.jsonl", '{"text": "abcd", "source": ""}', {}, "source: expected a name of 1 to 100 characters"),
        ("d.jsonl", '{"text": "abcd", "source": "\\u001b[2J"}', {}, "that can be shown, found '\\x1b[2J'"),
        ("d.jsonl", '{"text": "abcd", "source": "a "}', {}, "source: expected a name of 1 to 100 characters"),
        ("d.txt", "abcd", {}, "d.txt: expected records with a field 'source', found plain text"),
        (
            "d.jsonl",
            '{"text": "abcd", "source": "a"}\n{"text": "abcd", "source": "b"}',
            {"sources": ("A", "a")},
            "d.jsonl: expected documents of source 'A', found 'a', 'b'",
        ),
        (
            "d.jsonl",
            '{"text": "abcd", "source": "a"}\n{"text": "ab", "source": "b"}',
            {"sources": ("a", "b")},
            "d.jsonl: source 'b': expected at least one ",
        ),
        (
            "d.jsonl",
            "\n".join(json.dumps({"text": "abcd", "source": str(n)}) for n in range(101)),
            {},
            "d.jsonl: expected at most 100 sources to keep apart, found more: name some",
        ),
    ],
)
def test_data_whose_sources_are_not_known_are_refused(
    bytes_root: Path, tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str, pack: bool
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PlanError) as caught:
        load(bytes_root, path, samples=1, seqlen=4, by_source=True, pack=pack, **options)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_tables_without_sources_are_refused(bytes_root: Path, tmp_path: Path) -> None:
    table = parquet(tmp_path / "d.parquet", {"text": ["abcd"]})
    with pytest.raises(PlanError, match=r"d\.parquet: expected one column 'source', found 'text'"):
        load(bytes_root, table, samples=1, seqlen=4, sources=("a",))


def test_windows_of_all_sources_together_are_bounded(
    bytes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sourced(tmp_path / "d.jsonl", [("a", "abcdefg"), ("b", "abcdefg")])
    monkeypatch.setattr("shardxform.calibration.windows.MAX_TOKENS", 16)
    assert len(load(bytes_root, data, samples=2, seqlen=4, by_source=True).ids_NT) == 4
    monkeypatch.setattr("shardxform.calibration.windows.MAX_TOKENS", 15)
    with pytest.raises(PlanError, match="expected at most 15 tokens of all sources: ask for fewer windows"):
        load(bytes_root, data, samples=2, seqlen=4, by_source=True)


# -- hostile data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl: found no document"),
        ("d.txt", b"", "d.txt: found no text in 1 document"),
        ("d.jsonl", b'{"text": ""}\n{"text": ""}', "d.jsonl: found no text in 2 documents"),
        (
            "d.jsonl",
            b'{"text": "a"}',
            "expected at least one window of 4 tokens, found 2 tokens in 1 document; give more text, or ask for less:"
            " `seqlen` 2",
        ),
        ("d.jsonl", b'{"text": "a"}\n{"text": "b"\n', "d.jsonl:2: not JSON: "),
        ("d.jsonl", b'{"text": "a"}\n\n["b"]\n', "d.jsonl:3: expected an object, found list"),
        ("d.jsonl", b'{"text": "a"}\n{"txt": "b"}', "d.jsonl:2: expected a field 'text', found 'txt'"),
        ("d.jsonl", b'{"text": null}', "d.jsonl:1: text: expected a string, found null"),
        ("d.jsonl", b'{"text": ["a"]}', "d.jsonl:1: text: expected a string, found list"),
        ("d.jsonl", b'{"text": "\xff"}', "d.jsonl:1: not UTF-8 at byte 10"),
        ("d.jsonl", b'{"text": "\\ud800"}', "d.jsonl:1: '\\ud800' holds half a surrogate pair"),
        ("d.jsonl", b'{"text": "a", "text": "b"}', "d.jsonl:1: duplicate key 'text'"),
        ("d.jsonl", b'{"text": ' + b"[" * 100_000, "d.jsonl:1: nested too deeply"),
        ("d.jsonl", b"{}", "d.jsonl:1: expected a field 'text' or 'content', found none"),
        (
            "d.jsonl",
            b'\n{"body": "a", "id": 1}',
            "d.jsonl:2: expected a field 'text' or 'content', found 'body', 'id'; `text_key` names another",
        ),
        ("d.jsonl", b'{"messages": []}', "found 'messages'; conversations need the chat template"),
        ("d.jsonl", b'{"text": "' + b"a" * 2000 + b'"}', "d.jsonl:1: expected a line of at most 64 MiB"),
        ("d.json", b"[" + b" " * 2000 + b"]", "d.json: expected a JSON array of at most 64 MiB"),
        ("d.json", b'[{"text": "a"}', "d.json: expected an array of records: not JSON"),
        ("d.json", b'[{"text": "a"}, 3]', "d.json: record 2: expected an object, found int"),
        ("d.json", b'[1], "more": [2]', "d.json: expected an array of records, found something after it"),
        ("d.txt", b"abc\xff", "d.txt: expected UTF-8, found another byte at 3"),
        ("d.txt", b"abc\xe4\xb8", "d.txt: expected UTF-8, found another byte at 3"),
        ("d.parquet", b"PAR1 no", "d.parquet: not readable as parquet: "),
        ("d.parquet", b"", "d.parquet: not readable as parquet: "),
        ("d.csv", b"a,b", "d.csv: expected a file whose name ends in one of .jsonl"),
    ],
)
@pytest.mark.parametrize("pack", [True, False])
def test_malformed_data_are_refused_with_their_place(
    bytes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    message: str,
    pack: bool,
) -> None:
    if len(content) < 100_000:
        monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        load(bytes_root, path, samples=9, seqlen=4, pack=pack)
    if not pack and "one window" in message:
        message = "expected at least one document of 4 tokens, found "
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1, 2]}, "d.parquet: row 1: text: expected a string, found int"),
        ({"text": ["a", None]}, "d.parquet: row 2: text: expected a string, found null"),
        ({"x": ["a"]}, "d.parquet: expected a field 'text' or 'content', found 'x'"),
    ],
)
def test_malformed_tables_are_refused_with_their_place(
    bytes_root: Path, tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        load(bytes_root, parquet(tmp_path / "d.parquet", columns), samples=9, seqlen=4)
    assert message in str(caught.value)


def test_parquet_without_its_reader_is_refused(
    bytes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "d.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PlanError, match="reading parquet needs pyarrow: pip install pyarrow"):
        load(bytes_root, path, samples=1, seqlen=4)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "d.jsonl")
    return folder / "d.jsonl"


def empty(folder: Path) -> Path:
    (folder / "d").mkdir()
    return folder / "d"


def second_table(folder: Path) -> Path:
    parquet(folder / "1.parquet", {"text": ["a"]})
    parquet(folder / "2.parquet", {"body": ["a"]})
    return folder


def plain(folder: Path) -> Path:
    (folder / "d.txt").write_text("words")
    return folder / "d.txt"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (fifo, {}, "d.jsonl: expected a regular file"),
        (empty, {}, "expected .jsonl, .json-lines, .ndjson, .json, .parquet, .txt, .md files in it, found none"),
        (lambda folder: folder / "absent.jsonl", {}, "absent.jsonl: no such file or directory, and no name of"),
        (lambda folder: folder / ("x" * 5000), {}, "no such file or directory, and no name of"),
        (second_table, {}, "2.parquet: expected one column 'text', found 'body'"),
        (plain, {"text_key": "body"}, "d.txt: expected a field 'body', found nothing that has fields"),
        (plain, {"chat_template": True}, "d.txt: expected conversations, for the chat template, found plain text"),
    ],
)
def test_data_that_cannot_be_read_are_refused(
    bytes_root: Path, tmp_path: Path, make: Callable[[Path], Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        load(bytes_root, make(tmp_path), samples=1, seqlen=4, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "`data`: expected a path or the name of a hub data set, found an empty one"),
        ({"samples": 0}, "`samples`: expected at least 1, found 0"),
        ({"seqlen": 1}, "`seqlen`: expected at least 2, found 1"),
        ({"seed": -1}, "`seed`: expected at least 0, found -1"),
        ({"samples": 1 << 20, "seqlen": 2048}, "`samples`: expected at most 1,073,741,824 tokens in all windows"),
        ({"sources": ("a", "")}, "`sources`: expected a name of 1 to 100 characters that can be shown, found ''"),
        ({"sources": tuple(map(str, range(101)))}, "`sources`: expected at most 100, found 101"),
    ],
)
def test_options_that_no_data_satisfy_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        DataOptions(**({"data": "d.jsonl"} | options))
    assert message in str(caught.value)


# -- the checkpoint's tokenizer ------------------------------------------------------------------------------------


def needs_code(root: Path) -> None:
    (root / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (root / "own.py").write_text("raise SystemExit('this must not run')\nclass Own: pass\n")
    (root / "config.json").write_text(json.dumps({"model_type": "own", "vocab_size": 258}))


def no_end(root: Path) -> None:
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "tokenizer.json").unlink(), ": expected a tokenizer, such as tokenizer.json, found none"),
        (lambda root: (root / "tokenizer.json").write_text("{"), ": its tokenizer cannot be loaded: "),
        (lambda root: (root / "tokenizer.json").write_text("[]"), ": its tokenizer cannot be loaded: "),
        (lambda root: (root / "config.json").unlink(), "config.json: No such file or directory"),
        (lambda root: (root / "config.json").write_text("[]"), "config.json: expected an object, found list"),
        (lambda root: (root / "config.json").write_text("{}"), "config.json: expected a vocab_size of at most 2^31"),
        (needs_code, ": its tokenizer is code in the checkpoint, which is not run"),
        (no_end, ": expected an end-of-text token of the tokenizer or in config.json, found none"),
        (
            lambda root: byte_tokenizer(root, vocab_size=256),
            ": the end-of-text token has id 256, but vocab_size is 256",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    root = byte_tokenizer(tmp_path / "model")
    spoil(root)
    with pytest.raises(CheckpointError) as caught:
        load(root, jsonl(tmp_path / "d.jsonl", ["abcd"]), samples=1, seqlen=4)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        load(tmp_path / "absent", jsonl(tmp_path / "d.jsonl", ["abcd"]), samples=1, seqlen=4)


def test_the_end_token_and_the_vocabulary_are_found_where_configs_have_them(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", ["abc"])
    root = byte_tokenizer(tmp_path / "model", eos_token_id=[65, 66])
    no_end(root)
    assert text_of(load(root, data, samples=1, seqlen=4)) == ["abcA"]
    (root / "config.json").write_text('{"model_type": "qwen3_moe", "text_config": {"vocab_size": 258}}')
    (root / "generation_config.json").write_text('{"eos_token_id": 67}')
    assert text_of(load(root, data, samples=1, seqlen=4)) == ["abcC"]


def test_ids_beyond_the_embeddings_are_refused(tmp_path: Path) -> None:
    root = byte_tokenizer(tmp_path / "model", vocab_size=100, eos_token_id=10)
    no_end(root)
    assert text_of(load(root, jsonl(tmp_path / "a.jsonl", ["abc"]), samples=1, seqlen=4)) == ["abc\n"]
    with pytest.raises(CheckpointError, match=r"the tokenizer gives id 100, but vocab_size in config\.json is 100"):
        load(root, jsonl(tmp_path / "b.jsonl", ["abd"]), samples=1, seqlen=4)


def test_options_are_imported_without_numpy_or_transformers() -> None:
    code = "import sys, shardxform.calibration as c; c.DataOptions; print({'numpy', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_help_and_documentation_list_the_same_kinds_of_files() -> None:
    from shardxform.cli.score import score_command

    told = next(option.help for option in score_command.params if option.name == "data")
    described = (ROOT / "docs" / "scoring.md").read_text().split("`--data` is ")[1].partition("file")[0]
    listed = re.findall(r"\.[a-z]+\b", told.partition("file")[0])
    assert listed == re.findall(r"\.[a-z]+\b", described) == [".jsonl", ".json", ".txt", ".md", ".parquet"]
    assert set(listed) <= set(readers.KINDS)
