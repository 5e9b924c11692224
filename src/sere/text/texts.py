"""What people have on disk -> texts and chats, or a reason why not.

`SHAPES` is the table of what a record may look like, tried from the top; docs/calibration.md shows
it. Everything else is refused by what it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

# A text, or a chat: its messages, {"role", "content"} each.
Text: TypeAlias = str | list[dict[str, Any]]


class UnreadableError(ValueError):
    """One line, row or paragraph that is no text, and why."""


# ShareGPT's names of who speaks.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def text_of(record: Any) -> Text:
    """The text or chat that a record holds. Raises `UnreadableError`."""
    if isinstance(record, str):
        return _whole(record)
    if not isinstance(record, Mapping):
        raise UnreadableError(f"no text field ({_known()}); has {type(record).__name__}")
    for fields, read in SHAPES.items():
        if all(field in record for field in fields):
            return read(record)
    raise UnreadableError(f"no text field ({_known()}); has {', '.join(map(str, record))}")


def pair_of(record: Any) -> tuple[str, str] | None:
    """(prompt, answer) of a record that has both as strings; None of one that has not both."""
    if not (isinstance(record, Mapping) and {"prompt", "answer"} <= set(record)):
        return None
    prompt, answer = record["prompt"], record["answer"]
    if not (isinstance(prompt, str) and prompt and isinstance(answer, str) and answer):
        raise UnreadableError(
            'expected {"prompt": "...", "answer": "..."}, neither of them empty, got '
            f"{str(dict(record))[:80]}"
        )
    return _whole(prompt), _whole(answer)


def plain(text: Text) -> str:
    """A chat as its contents, line by line; a text as it is."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def _known() -> str:
    return ", ".join("+".join(fields) for fields in SHAPES)


def _field(name: str) -> Callable[[Mapping[str, Any]], Text]:
    return lambda record: _string(record, name)


def _joined(*names: str, by: str = "") -> Callable[[Mapping[str, Any]], Text]:
    """Strings one behind the other, or chats one behind the other."""

    def read(record: Mapping[str, Any]) -> Text:
        parts = [record[name] for name in names if record.get(name) not in (None, "")]
        if parts and all(isinstance(part, list) for part in parts):
            return _chat([message for part in parts for message in part])
        return by.join(_string(record, name) for name in names if record.get(name) != "")

    return read


def _prompt(record: Mapping[str, Any]) -> Text:
    prompt = record["prompt"]
    return _chat(prompt) if isinstance(prompt, list) else _string(record, "prompt")


def _preferred(record: Mapping[str, Any]) -> Text:
    """What was preferred; a chat has its prompt in it already where it begins with a user."""
    chosen, prompt = record["chosen"], record.get("prompt")
    if isinstance(chosen, list):
        first = chosen[0].get("role") if chosen and isinstance(chosen[0], Mapping) else None
        before = prompt if isinstance(prompt, list) and first == "assistant" else []
        return _chat([*before, *chosen])
    return _joined(*(name for name in ("prompt", "chosen") if record.get(name)))(record)


def _instruction(record: Mapping[str, Any]) -> Text:
    return _joined(*(n for n in ("instruction", "input", "output") if record.get(n)), by="\n")(
        record
    )


def _messages(name: str) -> Callable[[Mapping[str, Any]], Text]:
    def read(record: Mapping[str, Any]) -> Text:
        messages = record[name]
        if isinstance(messages, str):  # as some exports keep them
            try:
                messages = json.loads(messages)
            except ValueError:
                raise UnreadableError(f"its {name} is a string that is no JSON") from None
        return _chat(messages)

    return read


def _batch_line(record: Mapping[str, Any]) -> Text:
    """A line of an OpenAI batch file: what is asked stands in its body."""
    body = record["body"]
    if isinstance(body, Mapping) and "input" in body and "messages" not in body:
        return _chat(body["input"]) if isinstance(body["input"], list) else _string(body, "input")
    return text_of(body)


# Fields that a record must have -> how it is read. From the top: the more fields, the earlier.
SHAPES: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Text]] = {
    ("messages",): _messages("messages"),
    ("conversations",): _messages("conversations"),
    ("prompt", "completion"): _joined("prompt", "completion"),
    ("prompt", "answer"): _joined("prompt", "answer"),
    ("chosen",): _preferred,
    ("instruction", "output"): _instruction,
    ("question", "answer"): _joined("question", "answer", by="\n"),
    ("text",): _field("text"),
    ("content",): _field("content"),
    ("body",): _batch_line,
    ("prompt",): _prompt,
}


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        what = "null" if value is None else f"a {type(value).__name__}, not a string"
        raise UnreadableError(f"its {name} is {what}")
    return _whole(value)


def _whole(text: str) -> str:
    """Halves of a surrogate pair are no characters: no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnreadableError("it holds half a surrogate pair: a character cut in two") from None
    return text


def _chat(messages: Any) -> Text:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise UnreadableError("no text field: its messages are not a list of objects")
    return [_message(message) for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """{"role", "content": a string} and what else it has, as chat templates read it."""
    if "from" in message and "value" in message:
        role = _ROLES.get(str(message["from"]))
        if role is None:
            raise UnreadableError(
                f"a message from {message['from']!r}: expected one of {', '.join(_ROLES)}"
            )
        return {"role": role, "content": _content(message["value"])}
    if not isinstance(message.get("role"), str):
        raise UnreadableError(f"a message without a role; has {', '.join(map(str, message))}")
    read = {**message, "content": _content(message.get("content"))}
    if calls := message.get("tool_calls"):
        read["tool_calls"] = [_call(call) for call in calls]
    return read


def _content(content: Any) -> str:
    """A string; nothing where a message only calls tools; the text parts of a list."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _whole(content)
    if isinstance(content, list):
        return "".join(map(_part, content))
    raise UnreadableError(
        f"a message whose content is a {type(content).__name__}: expected a string, null or a list "
        "of parts"
    )


def _part(part: Any) -> str:
    if isinstance(part, str):
        return _whole(part)
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return _whole(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UnreadableError(f"a message with a part of type {kind}, which is not text")


def _call(call: Any) -> Any:
    """Arguments as an object, as chat templates expect them; on the wire they are a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("arguments"), str)):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
