"""Records of chat data: every usual spelling gives what transformers' own rendering of the plain one gives.

The oracle is `apply_chat_template` on messages written by hand, as a client would send them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shardxform.calibration.conversations import conversation
from shardxform.calibration.readers import DataFile, DataRecord, read_records
from shardxform.calibration.tokens import Tokenizer
from shardxform.errors import PlanError

transformers = pytest.importorskip("transformers")

# Each takes messages in a way of its own, as templates of releases do.
OPEN = """{%- if tools %}TOOLS {{ tools | tojson }}
{% endif %}{%- for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% elif m.content %}\
{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }}\
{{ c.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""
STRINGS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PRINTED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
DEAF = "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
ITEMS = """{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}\
{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"""
WRITTEN = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '!' + c.function.arguments }}{% endfor %}{% endfor %}"
)
PLAIN_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
)
NULLS = "{% for m in messages %}{% if m['content'] is none %}CALL{% else %}{{ m['content'] }}{% endif %}{% endfor %}"


@dataclass
class Template:
    """What a tokenizer does with its chat template, by transformers itself."""

    chat_template: str
    seen: list[Any] = field(default_factory=list)

    def apply_chat_template(self, messages: Any, *, tools: Any = None, tokenize: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered, _ = render_jinja_template(conversations=[messages], tools=tools, chat_template=self.chat_template)
        return str(rendered[0])


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(inner=Template(template), root=Path("m"), end=0, begin=(), vocab_size=9, sha256="")


def rendered(template: str, key: str = "messages", **record: Any) -> str:
    return conversation(tokenizer(template), DataRecord("d:7", key, record.pop(key), "", record))


def oracle(template: str, messages: Sequence[Any], tools: Any = None) -> str:
    return Template(template).apply_chat_template(messages, tools=tools)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(arguments: Any) -> list[Any]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


CALLS = [user("x"), {"role": "assistant", "content": None, "tool_calls": call({"a": "ü", "n": None})}]
TALK = [
    {"role": "system", "content": "s"},
    user("x"),
    {"role": "assistant", "content": "y"},
    {"role": "tool", "content": "z"},
]


@pytest.mark.parametrize("template", [OPEN, STRINGS, PRINTED, DEAF, NULLS])
def test_messages_are_given_to_the_template_as_they_are(template: str) -> None:
    assert rendered(template, messages=TALK) == oracle(template, TALK)
    extra = [{**TALK[1], "name": "n", "tool_calls": None}, {**TALK[2], "reasoning_content": "r"}]
    assert rendered("{{ messages }}", messages=extra) == oracle(
        "{{ messages }}", [{key: value for key, value in each.items() if value is not None} for each in extra]
    )


@pytest.mark.parametrize("template", [OPEN, ITEMS, NULLS])
def test_content_may_be_null_or_absent_beside_calls(template: str) -> None:
    assert rendered(template, messages=CALLS) == oracle(template, CALLS)
    absent = [CALLS[0], {key: value for key, value in CALLS[1].items() if key != "content"}]
    assert rendered(template, messages=absent) == oracle(template, absent)


@pytest.mark.parametrize("arguments", [{"a": "ü", "n": None}, '{"a": "ü", "n": null}'])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (OPEN, 'f{"a": "ü", "n": null}'),
        (ITEMS, "a=ü;n=None;"),
        (WRITTEN, '!{"a": "ü", "n": null}'),
        (PLAIN_CALLS, '{"a": "ü", "n": null}'),
    ],
)
def test_arguments_are_shown_as_json_however_they_were_given(arguments: Any, template: str, shown: str) -> None:
    found = rendered(
        template, messages=[user("x"), {"role": "assistant", "content": "", "tool_calls": call(arguments)}]
    )
    assert shown in found
    assert '\\"' not in found


def test_arguments_that_are_no_json_stay() -> None:
    assert rendered(WRITTEN, messages=[{**CALLS[1], "tool_calls": call("{a")}]) == "!{a"
    flat = [{"name": "f", "arguments": '{"a": 1}'}]
    shown = rendered("{{ messages[0].tool_calls | tojson }}", messages=[{**CALLS[1], "tool_calls": json.dumps(flat)}])
    assert json.loads(shown) == [{"name": "f", "arguments": {"a": 1}}]


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        [{"type": "input_text", "text": "one"}, {"text": "two"}],
        ["one", {"type": "output_text", "text": "two", "annotations": None}],
    ],
)
def test_parts_are_a_template_s_own_or_lines(parts: list[Any]) -> None:
    canonical = [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]
    assert rendered(OPEN, messages=[user(parts)]) == oracle(OPEN, canonical) == "<|user|>onetwo"
    for template in (STRINGS, PRINTED, DEAF):  # which raises, prints a Python list, leaves it out
        assert rendered(template, messages=[user(parts)]) == oracle(template, [user("one\ntwo")]) == "<user>one\ntwo"


def test_parts_and_written_arguments_in_one_conversation() -> None:
    template = STRINGS.replace("m.content", "m.content + (m.tool_calls[0].function.arguments if m.tool_calls else '')")
    both = {"role": "assistant", "content": ["b"], "tool_calls": call({"a": 1})}
    assert rendered(template, messages=[user(["a"]), both]) == '<user>a<assistant>b{"a": 1}'


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
def test_sharegpt_says_the_same(key: str) -> None:
    speakers = ("system", "human", "gpt", "observation")
    told = [{"from": speaker, "value": each["content"]} for speaker, each in zip(speakers, TALK, strict=True)]
    assert rendered(OPEN, key, **{key: told}) == oracle(OPEN, TALK)
    assert rendered(OPEN, key, **{key: told[1:], "system": "s"}) == oracle(OPEN, TALK)
    assert rendered(OPEN, key, **{key: told, "system": "other"}) == oracle(OPEN, TALK)
    assert rendered(OPEN, key, **{key: json.dumps(told)}) == oracle(OPEN, TALK)
    mixed = [{"from": "human", "role": None, "value": "x", "content": None}]
    assert rendered(OPEN, key, **{key: mixed}) == oracle(OPEN, [user("x")])


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
    ],
)
def test_calls_in_older_spellings(message: dict[str, Any]) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    plain = [user("x"), {"role": "assistant", "content": None, "tool_calls": calls}]
    assert rendered(OPEN, messages=[user("x"), message]) == oracle(OPEN, plain)


TOOL = {"type": "function", "function": {"name": "g", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_the_tools_of_a_record_are_given_to_the_template(tools: Any) -> None:
    assert rendered(OPEN, messages=[user("x")], tools=tools) == oracle(OPEN, [user("x")], [TOOL])
    for none in (None, [], "", "[]"):
        assert rendered(OPEN, messages=[user("x")], tools=none) == oracle(OPEN, [user("x")])


def test_a_prompt_and_its_completion() -> None:
    expected = oracle(OPEN, [user("x"), {"role": "assistant", "content": "y"}])
    assert rendered(OPEN, "prompt", prompt="x", completion="y") == expected
    assert rendered(OPEN, "prompt", prompt=[user("x")], completion=[{"role": "assistant", "content": "y"}]) == expected
    assert rendered(OPEN, "prompt", prompt=[user("x")], tools=[TOOL]) == oracle(OPEN, [user("x")], [TOOL])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [user("x"), {"from": "alien", "value": "x"}]}, "d:7: message 2: from: expected one of human, "),
        (
            {"messages": [{"text": "x"}]},
            "d:7: message 1: expected a role, as 'role' and 'content' or 'from' and 'value'",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, "d:7: message 1: expected a role, as "),
        ({"messages": [{"role": "user"}]}, "d:7: message 1: expected 'content' or 'tool_calls', found 'role'"),
        (
            {"messages": [user({"a": 1})]},
            "d:7: message 1: content: expected a string, null or a list of parts, found dict",
        ),
        ({"messages": [user([{"type": "image", "image": "b"}])]}, "message 1: part 1: expected text, found 'image'"),
        ({"messages": [user([{"type": "text", "text": None}])]}, "part 1: expected text, found text that is null"),
        ({"messages": [user([3])]}, "message 1: part 1: expected text, found int"),
        ({"messages": "[1"}, "d:7: messages: expected a list of messages, found str"),
        ({"messages": '[1], "a": [2]'}, "d:7: messages: expected a list of messages, found str"),
        ({"messages": [{**CALLS[1], "tool_calls": 3}]}, "message 1: tool_calls: expected a list of objects, found int"),
        ({"messages": [{"from": "function_call", "value": "f()"}]}, "message 1: expected a function call, as JSON"),
        ({"messages": [user("x")], "tools": [3]}, "d:7: tools: expected a list of objects, found list"),
        ({"messages": [user("x")], "tools": "f"}, "d:7: tools: expected a list of objects, found str"),
        ({"prompt": 3, "completion": "y"}, "d:7: prompt: expected a list of messages, found int"),
        ({"prompt": "x", "completion": None}, "d:7: completion: expected a list of messages, found null"),
    ],
)
def test_what_is_no_conversation_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        rendered(OPEN, next(iter(record)), **record)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_first_refusal_of_a_template_is_told() -> None:
    with pytest.raises(PlanError, match=r"^d:7: the chat template refuses it: no$"):
        rendered("{{ raise_exception('no') }}", messages=[user(["x"]), CALLS[1]])


def test_tables_hold_null_for_what_a_message_has_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    asked = [
        {**CALLS[1], "tool_calls": call({"a": "b"})},
        {"role": "tool", "content": "c", "tool_calls": call({"z": "1"})},
    ]
    parquet.write_table(pyarrow.table({"messages": [[user("x"), *asked]], "tools": [[TOOL]], "other": [1]}), path)
    file = DataFile(name="d", place="d", kind="parquet", fetch=lambda: path)
    (record,) = read_records(file, "messages", iter([True]), beside=("tools", "system"))
    assert record is not None
    assert conversation(tokenizer(OPEN), record) == oracle(OPEN, [user("x"), *asked], [TOOL])
