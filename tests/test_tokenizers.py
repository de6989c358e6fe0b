"""Tokenizers that load and are not the model's: refused, or told of, before anything is run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from shardxform.calibration import DataOptions, Windows, load_windows
from shardxform.calibration.tokens import SAMPLE, load_tokenizer, tokenizer_digest
from shardxform.errors import CheckpointError, PlanError

pytest.importorskip("transformers")

TEXT = "Let me see: 1234 houses, isn't it?\n\n\nAnd none of them mine.\n"


def model(root: Path, backend: Backend, model_type: str = "qwen3_moe", **config: Any) -> Path:
    """Write a tokenizer, and a config.json with as many embeddings as it has tokens."""
    root.mkdir(parents=True, exist_ok=True)
    backend.add_special_tokens(["<end>"])
    backend.save(str(root / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (root / "tokenizer_config.json").write_text(json.dumps(kind | config.pop("tokenizer", {})))
    size = {"vocab_size": backend.get_vocab_size(), "eos_token_id": backend.token_to_id("<end>")}
    (root / "config.json").write_text(json.dumps({"model_type": model_type} | size | config))
    return root


def byte_level(*merges: tuple[str, str], numbers: list[int] | None = None) -> Backend:
    """A tokenizer of bytes and some merges; `numbers` are the ids of the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = numbers or list(range(256))
    vocabulary = dict(zip(letters, ids, strict=True))
    vocabulary |= {one + other: 256 + at for at, (one, other) in enumerate(merges)}
    backend = Backend(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def data(folder: Path, *texts: str) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(root: Path, path: Path, against: Path | None = None, **options: Any) -> Windows:
    asked: dict[str, Any] = {"samples": 1, "seqlen": 16} | options
    return load_windows(root, DataOptions(data=str(path), **asked), against)


# -- ids that are not the model's ----------------------------------------------------------------------------------


def test_a_tokenizer_whose_class_does_not_read_its_files_is_refused(tmp_path: Path) -> None:
    root = model(tmp_path / "m", byte_level(), "qwen3_5_moe_text", tokenizer={"eos_token": "<|endoftext|>"})
    written = json.loads((root / "tokenizer.json").read_text())["model"]
    (root / "tokenizer.json").unlink()
    (root / "vocab.json").write_text(json.dumps(written["vocab"]))
    (root / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError) as caught:
        load(root, data(tmp_path, TEXT))
    said = "m: its tokenizer, read as Qwen3_5Tokenizer, gives no ids for 'The quick brown fox jumps over the lazy '"
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("pack", [True, False])
def test_text_that_gives_no_ids_is_refused(tmp_path: Path, pack: bool) -> None:
    latin = {letter: at for at, letter in enumerate(map(chr, range(32, 127)))}
    root = model(tmp_path / "m", Backend(models.BPE(latin, [])))
    blank = [TEXT, "", " \n", "\u200b\u2060"]
    assert load(root, data(tmp_path, *blank), pack=pack).ids_NT.shape == (1, 16)
    with pytest.raises(CheckpointError, match=r"m: its tokenizer, read as .*, gives no ids for 'мир'"):
        load(root, data(tmp_path, *blank, "мир\n"), pack=pack, samples=9)


def test_a_tokenizer_that_fails_on_text_is_refused(tmp_path: Path) -> None:
    words = model(tmp_path / "words", Backend(models.WordPiece({"a": 0}, unk_token="<none>")))
    lengths = model(tmp_path / "lengths", byte_level(), tokenizer={"model_max_length": [4096]})
    for root in (words, lengths):
        with pytest.raises(CheckpointError, match=r"its tokenizer gives no ids for text: .*; compare tokenizer\.json"):
            load(root, data(tmp_path, TEXT))


def test_letters_that_are_lost_are_told_of(tmp_path: Path) -> None:
    latin = {letter: at for at, letter in enumerate(map(chr, range(32, 127)))}
    root = model(tmp_path / "m", Backend(models.BPE(latin, [])))
    lost = [note for note in load(root, data(tmp_path, "мир: four " * 9)).notes if "letters" in note]
    assert lost == [f"{root}: 43% of the text's letters are lost: its tokenizer leaves them out"]
    assert not load(root, data(tmp_path, TEXT)).notes


def test_text_that_is_unknown_is_told_of(tmp_path: Path) -> None:
    words = {word: at for at, word in enumerate(["[UNK]", "The", "quick", "see", "me"])}
    backend = Backend(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    root = model(tmp_path / "m", backend, tokenizer={"unk_token": "[UNK]"})
    notes = load(root, data(tmp_path, "see me see " * 3 + "them"), seqlen=10).notes
    assert f"{root}: 10% of the text's tokens are '[UNK]', for what is not known" in notes
    assert not any("[UNK]" in note for note in load(root, data(tmp_path, "see me " * 9)).notes)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (257, ""),
        (285, ""),
        (286, "its tokenizer knows 257 tokens, but the model has 286: is it this model's?"),
        (514, "its tokenizer knows 257 tokens, but the model has 514: is it this model's?"),
    ],
)
def test_a_vocabulary_that_is_smaller_than_usual_is_told_of(tmp_path: Path, size: int, told: str) -> None:
    root = model(tmp_path / "m", byte_level(), vocab_size=size)
    assert load(root, data(tmp_path, TEXT)).notes == ((f"{root}: {told}",) if told else ())


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    root = model(tmp_path / "m", byte_level(), vocab_size=516)
    with pytest.raises(CheckpointError, match="m: its tokenizer knows 257 tokens, but the model has 516: a file of it"):
        load(root, data(tmp_path, TEXT))


def test_a_vocabulary_beyond_the_model_is_told_of_and_its_ids_are_refused(tmp_path: Path) -> None:
    root = model(tmp_path / "m", byte_level(("1", "2")), vocab_size=256, eos_token_id=0, tokenizer={"eos_token": None})
    notes = load(root, data(tmp_path, "three hundred and four")).notes
    assert notes == (f"{root}: its tokenizer knows 258 tokens, but the model has 256: text with more is refused",)
    with pytest.raises(CheckpointError, match=r"the tokenizer gives id 256, but vocab_size in config\.json is 256"):
        load(root, data(tmp_path, TEXT))


def test_ids_other_than_those_of_the_file_are_told_of(tmp_path: Path) -> None:
    backend = byte_level(("1", "2"))
    file = tmp_path / "m" / "tokenizer.json"
    windows = load(model(tmp_path / "m", backend, "qwen3_5_moe_text", vocab_size=260), data(tmp_path, TEXT))
    (note,) = windows.notes
    assert note == (
        f"{file}: read as Qwen3_5Tokenizer, it gives other ids than the file says, for 2 of 5 texts looked at, of "
        "the data and of a fixed sample: 16 ('1') instead of 256 ('12') in \"t me see: 1234 houses, isn't i\"; clients "
        "that take the file alone see other text"
    )
    assert load(model(tmp_path / "m", backend), data(tmp_path, TEXT)).notes == ()  # a class that leaves the file alone
    far = load(
        model(tmp_path / "m", backend, "qwen3_5_moe_text", vocab_size=260), data(tmp_path, "none of these is a number")
    )
    assert "for 1 of 5 texts" in far.notes[0]  # of the sample alone


def test_every_client_reads_the_example_alike(small_moe: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(small_moe)
    assert type(loaded).__name__ == "Qwen3_5Tokenizer"
    file = Backend.from_file(str(small_moe / "tokenizer.json"))
    texts = [json.loads(line)["text"] for path in (small_moe / "text").iterdir() for line in path.open()]
    assert len(texts) == 90
    for text in (*texts, *SAMPLE):
        assert loaded(text, add_special_tokens=False)["input_ids"] == file.encode(text, add_special_tokens=False).ids


# -- two models on one text ----------------------------------------------------------------------------------------


def permuted() -> Backend:
    numbers = list(range(256))
    random.Random(1).shuffle(numbers)
    return byte_level(numbers=numbers)


def no_tokenizer(root: Path) -> Path:
    model(root, byte_level())
    (root / "tokenizer.json").unlink()
    return root


def test_a_reference_that_reads_the_same_ids_is_compared(tmp_path: Path) -> None:
    tested, reference = model(tmp_path / "m", byte_level()), model(tmp_path / "r", byte_level())
    (reference / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    path = data(tmp_path, TEXT, TEXT)
    assert load(tested, path, reference).fingerprint == load(tested, path).fingerprint
    assert load(tested, path, reference).notes == ()


@pytest.mark.parametrize("pack", [True, False])
def test_the_first_token_that_two_models_read_otherwise_is_named(tmp_path: Path, pack: bool) -> None:
    tested, reference = model(tmp_path / "m", byte_level(("q", "u"))), model(tmp_path / "r", byte_level(("1", "2")))
    path = data(tmp_path, TEXT.replace("12", "34"), TEXT)
    with pytest.raises(PlanError) as caught:
        load(tested, path, reference, pack=pack, samples=9)
    assert str(caught.value) == (
        f"{reference}: its tokenizer is another than that of {tested}: document 2 of the data, in d.jsonl: token 13 is "
        "256 ('12'), expected 16 ('1'); models are compared on the same ids"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: model(root, permuted()), "document 1 of the data, in d.jsonl: token 1 is "),
        (lambda root: model(root, byte_level(), tokenizer={"eos_token": "a"}), "the end of a text is 64, expected 256"),
    ],
)
def test_other_ids_of_the_reference_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    reference = make(tmp_path / "r")
    with pytest.raises(PlanError) as caught:
        load(model(tmp_path / "m", byte_level()), data(tmp_path, TEXT), reference)
    assert message in str(caught.value)


def test_a_reference_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    reference = no_tokenizer(tmp_path / "r")
    notes = load(model(tmp_path / "m", byte_level()), data(tmp_path, TEXT), reference).notes
    told = "the two models were not found to read text as the same ids"
    assert notes == (f"{told}: {reference}: expected a tokenizer, such as tokenizer.json, found none",)


def test_evaluate_does_not_compare_models_of_different_tokenizers(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.cli import main

    other = shutil.copytree(small_moe, tmp_path / "other", symlinks=True)
    written = json.loads((other / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    moved = [*vocabulary][1:]
    random.Random(1).shuffle(moved)
    written["model"]["vocab"] = {"<|endoftext|>": 0} | {token: at for at, token in enumerate(moved, start=1)}
    (other / "tokenizer.json").write_text(json.dumps(written))
    heldout = small_moe / "text" / "heldout.jsonl"
    asked = ["--data", str(heldout), "--samples", "1", "--seqlen", "16", "--work", str(tmp_path / "w"), "--dry-run"]
    result = CliRunner().invoke(main, ["evaluate", str(other), "--against", str(small_moe), *asked])
    told = str(result.exception) + result.output
    assert result.exit_code != 0
    assert (
        f"{small_moe}: its tokenizer is another than that of {other}: document 1 of the data, in heldout.jsonl: token 1"
        in told
    )
    (other / "tokenizer.json").unlink()
    given = ["evaluate", str(small_moe), "--against", str(other), *asked, "--json"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["notes"][0].endswith(
        "other: expected a tokenizer, such as tokenizer.json, found none"
    )
    assert "note: the two models were not found to read text as the same ids: " in result.stderr


@pytest.mark.parametrize("verb", ["prune", "quantize"])
def test_json_has_every_note_that_is_shown(verb: str, small_moe: Path, tmp_path: Path) -> None:
    from shardxform.cli import main

    source = shutil.copytree(small_moe, tmp_path / "source", symlinks=True)
    written = json.loads((source / "tokenizer.json").read_text())
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    written["added_tokens"].append({"id": size, "content": "<more>", **flags})
    (source / "tokenizer.json").write_text(json.dumps(written))
    (source / "stray.bin").write_bytes(b"x")
    how = {"prune": ["-m", str(manifest_for(source, tmp_path)), "--heal"], "quantize": ["--method", "auto-round"]}
    asked = ["--data", str(data(tmp_path, TEXT * 9)), "--samples", "9", "--seqlen", "16", "--dry-run"]
    command = [verb, str(source), str(tmp_path / "out"), *how[verb], *asked]
    shown, told = (CliRunner().invoke(main, [*command, *more]) for more in ([], ["--json"]))
    assert (shown.exit_code, told.exit_code) == (0, 0), shown.output + told.output
    lines = [line.strip() for line in [*shown.stdout.splitlines(), *shown.stderr.splitlines()]]
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert sorted(json.loads(told.stdout)["notes"]) == sorted(notes)
    for part in ("its tokenizer knows", "not part of the model, not copied: "):
        assert any(part in note for note in notes), notes


def manifest_for(source: Path, folder: Path) -> Path:
    """Keep the first half of the experts of every layer."""
    config = json.loads((source / "config.json").read_text())
    ids = list(range(config["num_experts"] // 2))
    keep = {str(layer): ids for layer in range(config["num_hidden_layers"])}
    (folder / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    return folder / "keep.json"


# -- the digest ----------------------------------------------------------------------------------------------------


def test_the_digest_is_of_what_a_tokenizer_does(tmp_path: Path) -> None:
    root = model(tmp_path / "m", byte_level(("1", "2")))
    windows = load(root, data(tmp_path, TEXT))
    found = tokenizer_digest(load_tokenizer(root))
    assert windows.provenance["tokenizer"] == found
    assert len(found) == 64
    file = root / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    (root / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(load_tokenizer(root)) == found
    others = [
        model(tmp_path / "a", byte_level(("1", "3"))),
        model(tmp_path / "b", byte_level(("1", "2")), tokenizer={"eos_token": "a"}),
        model(tmp_path / "c", byte_level(("1", "2")), "qwen3_5_moe_text"),
        model(tmp_path / "d", permuted()),
    ]
    assert len({found, *(tokenizer_digest(load_tokenizer(other)) for other in others)}) == 5
