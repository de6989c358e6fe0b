"""Small files beside the shards: what a failed download leaves is refused by plan, verification and upload alike."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import jinja2.ext
import pytest
from build import tiny, write_checkpoint

from shardxform.checkpoint.sidecars import fault_of, template_fault
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, OutputError
from shardxform.execution.runner import run
from shardxform.plan.prune import plan_prune
from shardxform.publish.contents import contents_of
from shardxform.verification import verify

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
TEMPLATE = """{#- the usual kinds of tags -#}
{%- macro shown(x, open='{{"') -%}{{ open ~ x['content'] }}{%- endmacro -%}
{% set ns = namespace(last=-1, map={'a': {'b': "%}"}}) %}
{% set head %}plain{% endset %}
{%- for m in messages if m.role != 'tool' -%}
  {%- if loop.first and "it's" in m.content %}{{ '<|im_start|>' + m['role'] }}{% elif not m %}x{% else %}y{% endif -%}
  {% generation %}{{ shown({'content': m.content | trim}) }}{% endgeneration %}
{%- endfor %}{% raw %}{{ not a tag {% endraw %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
WHOLE = {
    "tokenizer.json": b'{"version": "1.0", "model": {"vocab": {}}}',
    "tokenizer_config.json": b'{"eos_token": null, "chat_template": [{"name": "a", "template": "{{ messages }}"}]}',
    "generation_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b'{"<x>": 1}',
    "preprocessor_config.json": b'{"size": {}}',
    "processor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "chat_template.json": json.dumps({"chat_template": TEMPLATE}).encode(),
    "chat_template.jinja": TEMPLATE.encode(),
    "additional_chat_templates/rag.jinja": TEMPLATE.encode(),
    "vocab.json": b'{"a": 0, "chat_template": 1}',
    "vocab.txt": "a\nä\n".encode(),
    "merges.txt": "#version: 0.2\nĠ t\nh e\n".encode(),
    "tokenizer.model": b"\x0a\x05\x0a\x03<s>\x0a\x07\x0a\x05Hello\x12\x02\x08\x01\x1d\0\0\0\0",
    "qwen.tiktoken": b"IQ== 0\nIg== 1\n",
    "tokenization_own.py": b"class Own:\n    pass\n",
    "__init__.py": b"",
}
OBJECTS = [name for name in WHOLE if name.endswith(".json")]
BROKEN = {
    "lfs": (LFS, "a pointer of Git LFS"),
    "html": (HTML, "a page of HTML"),
    "empty": (b" \n", "empty"),
    "zeros": (b"\0" * 5000, "only zero bytes"),
    "answer": (b"Entry not found", "the answer of a server"),
    "json answer": (b'{"error": "Invalid username or password."}', "the answer of a server"),
}


def faults(tmp_path: Path, name: str, data: bytes) -> str:
    path = tmp_path / "file"
    path.write_bytes(data)
    return fault_of(path, name)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_taken_and_what_is_none_is_not(tmp_path: Path, name: str) -> None:
    assert faults(tmp_path, name, WHOLE[name]) == ""
    for kind, (data, wanted) in BROKEN.items():
        if name.endswith(".py") and kind == "empty":
            continue
        assert wanted in faults(tmp_path, name, data), kind


@pytest.mark.parametrize("name", OBJECTS)
def test_json_is_whole_and_an_object(tmp_path: Path, name: str) -> None:
    data = WHOLE[name] if len(WHOLE[name]) > 2 else b'{"a": [1, 2]}'
    assert "cut short" in faults(tmp_path, name, data[:-1])
    assert faults(tmp_path, name, data[: len(data) // 2]).startswith(("cut short", "not JSON"))
    assert "not JSON" in faults(tmp_path, name, b"{bad")
    assert "not JSON" in faults(tmp_path, name, b"\xef\xbb\xbf" + data)  # no reader of clients takes the mark
    assert "not UTF-8" in faults(tmp_path, name, b'{"a": "\xff"}')
    for value, kind in ((b"[]", "a list"), (b'"text"', "a string"), (b"null", "null"), (b"3", "3")):
        assert faults(tmp_path, name, value) == f"expected an object, found {kind}"


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template: expected a template or a list"),
        ("tokenizer_config.json", b'{"chat_template": "{% if x %}"}', "chat_template: cut short: {% if %}"),
        ("chat_template.json", b'{"chat_template": {"default": "{{ x"}}', "chat_template: cut short: {{"),
        ("merges.txt", b"#version: 0.2\n", "a heading"),
        ("merges.txt", b"a b\nc d\ne", "two tokens to merge, found 'e'"),
        ("qwen.tiktoken", b"IQ== 0\nIg==", "a token and its rank"),
        ("tokenizer.model", b"IQ== 0\nIg==", "a token and its rank"),
        ("tokenizer.model", WHOLE["tokenizer.model"][:-2], "cut short"),
        ("tokenizer.model", WHOLE["tokenizer.model"][:8], "cut short"),
        ("chat_template.jinja", b"You are a helpful assistant.", "no template"),
        ("chat_template.jinja", b"\xff{{ x }}", "not UTF-8"),
    ],
)
def test_what_only_one_kind_can_be(tmp_path: Path, name: str, data: bytes, wanted: str) -> None:
    assert wanted in faults(tmp_path, name, data)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "licence.txt", "NOTICE", "USE_POLICY.md", "readme.json"])
def test_files_for_people_may_hold_anything(tmp_path: Path, name: str) -> None:
    assert not any(faults(tmp_path, name, data) for data, _ in BROKEN.values())


def test_templates_are_cut_where_jinja_says_so() -> None:
    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=[Generation])

    def refused(text: str) -> bool:
        try:
            environment.parse(text)
        except jinja2.TemplateSyntaxError:
            return True
        return False

    assert not refused(TEMPLATE)
    for end in range(TEMPLATE.index("{%") + 2, len(TEMPLATE)):
        text = TEMPLATE[:end]
        if text.endswith(("{", "raw %}")):  # half a delimiter, or nothing at all that is raw: fine to Jinja
            continue
        assert bool(template_fault(text)) == refused(text), text[-30:]


# -- everywhere -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with whole sidecars, copied by a plan."""
    config, tensors = tiny("qwen3_moe")
    root = tmp_path_factory.mktemp("sidecars")
    source = write_checkpoint(root / "source", tensors, config, files=WHOLE)
    run(plan_prune(Checkpoint.open(source), None), root / "out")
    return root


def test_plan_verify_and_push_are_of_one_opinion(made: Path) -> None:
    source, out = made / "source", made / "out"
    assert verify(out, source=source, quick=True).sound
    assert {item.name for item in contents_of(out).items} >= set(WHOLE)
    for name in WHOLE:
        for data, wanted in BROKEN.values():
            if name.endswith(".py") and not data.strip():
                continue
            for root in (source, out):
                (root / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=f"source/{name}: {wanted}.*fetch it again"):
                plan_prune(Checkpoint.open(source), None)
            found = {(p.code, p.where) for p in verify(out, quick=True).problems}
            assert found == {("sidecar", name), ("record", name)}
            with pytest.raises(OutputError, match=f"out/{name}: {wanted}.*; not uploaded"):
                contents_of(out)
        for root in (source, out):
            (root / name).write_bytes(WHOLE[name])


def test_how_many_are_faulty_is_said(made: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    files = {"tokenizer.json": LFS, "merges.txt": b"", "README.md": LFS}
    source = write_checkpoint(made / "several", tensors, config, files=files)
    with pytest.raises(CheckpointError, match=r"several/merges\.txt: empty; .* \(and 1 more: tokenizer\.json\)"):
        plan_prune(Checkpoint.open(source), None)
