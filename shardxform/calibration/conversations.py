"""Records of chat data as text, as a checkpoint's chat template renders them.

Conversations come as messages (`role` and `content`), as ShareGPT writes them (`from` and `value`), or as a prompt and
its completion. What clients do before they render is done here too: arguments of tool calls that were written as JSON
become objects, and where a template cannot take a content in parts, their texts are joined by newlines (vLLM,
`vllm/entrypoints/chat_utils.py`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.calibration.readers import COMPLETION, PROMPT, SYSTEM, TOOLS, DataRecord, listed
from shardxform.calibration.tokens import Tokenizer, line_of, type_name
from shardxform.errors import PlanError

__all__ = ["conversation"]

_ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
    "system": "system",
}
"""Who speaks in ShareGPT's `from`, as the roles that templates know."""
_TEXTS: Final = ("text", "input_text", "output_text")  # types of parts that are text
_Message = dict[str, Any]


class _Parts(list[_Message]):
    """A content in parts; as a string, its texts."""

    def __str__(self) -> str:
        return "\n".join(part["text"] for part in self)


class _Arguments(dict[str, Any]):
    """Arguments of a tool call; as a string, JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def conversation(tokenizer: Tokenizer, record: DataRecord) -> str:
    """Text of a record that is a conversation, as the checkpoint's chat template renders it.

    Raises:
        PlanError: it is none, there is no template, or the template refuses it.

    """
    messages, tools = _messages(record), _tools(record)
    if not tokenizer.inner.chat_template:
        raise PlanError(f"{tokenizer.root}: expected a tokenizer with a chat template, found none")
    best, fewest, refusal = "", -1, None
    for form in _forms(messages):
        try:
            found = str(tokenizer.inner.apply_chat_template(form, tools=tools, tokenize=False))
        except Exception as e:  # whatever a stranger's template raises
            refusal = refusal or e
            continue
        if fewest < 0 or _wrong(messages, found) < fewest:
            best, fewest = found, _wrong(messages, found)
        if not fewest:
            break
    if fewest < 0:
        assert refusal is not None  # there is a form
        raise PlanError(f"{record.place}: the chat template refuses it: {line_of(refusal)}") from refusal
    return best


def _wrong(messages: list[_Message], text: str) -> int:
    """How many parts and arguments a template left out, or wrote as Python does because it knows strings alone."""
    parts, arguments = [*map(_parts_of, messages)], [each for message in messages for each in _arguments_of(message)]
    left_out = sum(part["text"].strip() not in text for each in parts for part in each)
    as_python = [repr(each) in text for each in (*parts, *(each["arguments"] for each in arguments)) if each]
    return left_out + sum(as_python)


# -- forms of one conversation that templates take -----------------------------------------------------------------


def _forms(messages: list[_Message]) -> Iterator[list[_Message]]:
    """Yield the conversation as templates should take it, and then as some do that know strings alone."""
    yield messages
    if any(map(_parts_of, messages)):
        yield _changed(messages, _joined)
    if any(map(_arguments_of, messages)):
        yield _changed(messages, _written)
        if any(map(_parts_of, messages)):
            yield _changed(_changed(messages, _joined), _written)


def _changed(messages: list[_Message], change: Callable[[_Message], None]) -> list[_Message]:
    changed = copy.deepcopy(messages)
    for message in changed:
        change(message)
    return changed


def _joined(message: _Message) -> None:
    if _parts_of(message):
        message["content"] = str(message["content"])


def _written(message: _Message) -> None:
    for function in _arguments_of(message):
        function["arguments"] = str(function["arguments"])


def _parts_of(message: _Message) -> Sequence[_Message]:
    content = message.get("content")
    return content if isinstance(content, _Parts) else ()


def _arguments_of(message: _Message) -> list[dict[str, Any]]:
    """The functions that a message calls with arguments that are an object."""
    return [function for function in _functions(message) if isinstance(function.get("arguments"), _Arguments)]


def _functions(message: _Message) -> Iterator[dict[str, Any]]:
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        if isinstance(function, dict):
            yield function


# -- records -------------------------------------------------------------------------------------------------------


def _messages(record: DataRecord) -> list[_Message]:
    """The messages of a record, in the form that chat templates expect.

    Raises:
        PlanError: it has no list of messages, or one of them is none.

    """
    if record.key == PROMPT and COMPLETION in record.beside:
        found = [*_half(record, PROMPT, record.value, "user")]
        found += _half(record, COMPLETION, record.beside[COMPLETION], "assistant")
    else:
        found = _list(record, record.key, record.value)
    messages = [_message(f"{record.place}: message {number}", each) for number, each in enumerate(found, start=1)]
    system = record.beside.get(SYSTEM)
    if system and isinstance(system, str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _half(record: DataRecord, key: str, value: object, role: str) -> list[Any]:
    """A prompt or a completion: messages, or a string that one of `role` says."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(record, key, value)


def _list(record: DataRecord, key: str, value: object) -> list[Any]:
    shown = key if key.isprintable() else ascii(key)  # which may be a stranger's
    found = _parsed(value)
    if not isinstance(found, list) or not found:
        raise PlanError(f"{record.place}: {shown}: expected a list of messages, found {type_name(value)}")
    return found


def _message(place: str, message: object) -> _Message:
    """One message with the keys of chat templates.

    Raises:
        PlanError: nobody says it, or what is said is no text.

    """
    if not isinstance(message, dict):
        raise PlanError(f"{place}: expected an object, found {type_name(message)}")
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    sharegpt = "role" not in found
    if sharegpt and "from" in found:
        found = {"role": _role(place, found.pop("from")), **found}
    if found.get("content") is None and "value" in found:
        found["content"] = found.pop("value")
    if not isinstance(found.get("role"), str):
        told = f"found {type_name(found['role'])}" if "role" in found else f"found {listed(found)}"
        raise PlanError(f"{place}: expected a role, as 'role' and 'content' or 'from' and 'value' give it, {told}")
    if sharegpt and message.get("from") == "function_call":
        _call(place, found, found.pop("content", None))
    elif "function_call" in found and "tool_calls" not in found:  # as the first interface of OpenAI named them
        _call(place, found, found.pop("function_call"))
    if "content" in found:
        found["content"] = _content(place, found["content"])
    elif not found.get("tool_calls"):
        raise PlanError(f"{place}: expected 'content' or 'tool_calls', found {listed(found)}")
    if "tool_calls" in found:
        found["tool_calls"] = _calls(place, found["tool_calls"])
    return found


def _role(place: str, speaker: object) -> str:
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        told = repr(speaker[:40]) if isinstance(speaker, str) else type_name(speaker)
        raise PlanError(f"{place}: from: expected one of {', '.join(_ROLES)}, found {told}")
    return role


def _content(place: str, content: object) -> str | _Parts | None:
    """What is said: a string, nothing, or parts that are text.

    Raises:
        PlanError: anything else, such as a picture.

    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PlanError(f"{place}: content: expected a string, null or a list of parts, found {type_name(content)}")
    return _Parts(_part(f"{place}: part {number}", part) for number, part in enumerate(content, start=1))


def _part(place: str, part: object) -> _Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise PlanError(f"{place}: expected text, found {type_name(part)}")
    kind = part.get("type", "text")
    if kind not in _TEXTS or not isinstance(part.get("text"), str):
        told = repr(str(kind)[:40]) if kind not in _TEXTS else f"text that is {type_name(part.get('text'))}"
        raise PlanError(f"{place}: expected text, found {told}; a model is run on text alone")
    return {"type": "text", "text": part["text"]}


def _call(place: str, message: _Message, said: object) -> None:
    """Make what `function_call` says, an object or a list of them, or JSON of these, the calls of a message."""
    calls = _parsed(said)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise PlanError(f"{place}: expected a function call, as JSON with a name and arguments, found another value")
    message.setdefault("content", None)
    message["tool_calls"] = [{"type": "function", "function": call} for call in calls]


def _calls(place: str, calls: object) -> list[dict[str, Any]]:
    """The tool calls of a message, with objects for arguments.

    Raises:
        PlanError: they are no list of objects.

    """
    found = _parsed(calls)
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise PlanError(f"{place}: tool_calls: expected a list of objects, found {type_name(calls)}")
    found = copy.deepcopy(found)
    for function in _functions({"tool_calls": found}):
        arguments = _parsed(function.get("arguments"))
        if isinstance(arguments, dict):
            function["arguments"] = _Arguments(arguments)
    return found


def _tools(record: DataRecord) -> list[dict[str, Any]] | None:
    """The tools that a record offers: a list, or one as JSON; None where it has none.

    Raises:
        PlanError: they are no list of objects.

    """
    given = record.beside.get(TOOLS)
    found = _parsed(given) if given != "" else None
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise PlanError(f"{record.place}: {TOOLS}: expected a list of objects, found {type_name(given)}")
    return found


def _parsed(value: object) -> object:
    """A value, or what it says if it is a string of JSON: an object or a list."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = parse_object(b'{"":' + value.encode() + b"}")
    except (JsonError, UnicodeEncodeError):
        return value
    return found[""] if len(found) == 1 else value
