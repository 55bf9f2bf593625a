"""Messages of any spelling to the one conversation that an `Example` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from raytune_ds.data.values import (
    RowError,
    as_list,
    as_object,
    as_string,
    check_unicode,
    kind_of,
    need,
    unpacked,
)

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
# what a message may carry beside role, content and tool_calls, and what templates call it; the last one wins
_EXTRAS = {"name": "name", "tool_call_id": "tool_call_id"} | dict.fromkeys(
    ("reasoning", "thinking", "reasoning_content"), "reasoning_content"
)


@dataclass(frozen=True)
class Example:
    """What one row asks to be trained on: a conversation, or raw text."""

    messages: tuple[Message, ...] = ()
    """Hugging Face chat messages: role (system, user, assistant or tool), content (str) and, where the row
    has them, tool_calls (OpenAI style, arguments as a dict), name, tool_call_id, reasoning_content. The last
    one is the assistant's; every assistant message has content or tool_calls."""
    tools: tuple[dict[str, Any], ...] = ()
    """`{"type": "function", "function": {...}}` each, as apply_chat_template(tools=...) takes them."""
    text: str | None = None
    """Raw text; then `messages` is empty."""
    silent: frozenset[int] = frozenset()
    """Positions of assistant messages that are context only; never the last message."""
    rejected: Example | None = None
    """The same prompt with the answer that is not preferred; then this example has the preferred one."""
    desirable: bool | None = None
    """Whether its answer is wanted, where the row says so."""


# ---- tools ----------------------------------------------------------------------------------------


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    specs = unpacked(row.get("tools"), "'tools'")
    if specs is None:
        return ()
    check_unicode(specs, "'tools'")
    return tuple(_tool(spec, f"tool {number}") for number, spec in enumerate(as_list(specs, "'tools'"), 1))


def _tool(spec: Any, where: str) -> dict[str, Any]:
    spec = as_object(unpacked(spec, where), where)
    if "function" not in spec:  # bare {name, description, parameters}
        spec = {"type": "function", "function": spec}
    function = as_object(spec["function"], f"the 'function' of {where}")
    as_string(need(function, "name", where=where), f"the 'name' of {where}")
    return spec


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = unpacked(value, where)
    if isinstance(calls, dict):
        calls = [calls]
    return [_tool_call(call, where) for call in as_list(calls, where)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = as_object(call, f"a call in {where}")
    function = as_object(call.get("function", call), f"the 'function' in {where}")
    name = as_string(need(function, "name", where=f"a call in {where}"), f"the 'name' in {where}")
    arguments = unpacked(function.get("arguments"), f"the 'arguments' in {where}")
    if arguments is None:  # absent, null or "": a call without arguments, unless they go by another name
        if "parameters" in function:
            raise RowError(f"a call in {where} has 'parameters', expected 'arguments'")
        arguments = {}
    identity = {"id": as_string(call["id"], f"the 'id' in {where}")} if "id" in call else {}
    arguments = as_object(arguments, f"the 'arguments' in {where}")
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


# ---- conversations --------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What to call a message in an error, the message, and whether it is trained on if it is the assistant's."""

    where: str
    message: Message
    trained: bool = True


def turns_of(value: object, what: str, within: str = "") -> list[Turn]:
    """The messages of the list that is called `what`, each {role, content} or {from, value}."""
    turns = []
    for number, item in enumerate(as_list(value, what), 1):
        where = f"message {number}{within}"
        turns.append(turn_of(as_object(item, where), where))
    return turns


def turn_of(item: Message, where: str) -> Turn:
    """One message, {role, content} or {from, value}."""
    spoken = as_string(need(item, "role", "from", where=where), f"the role of {where}")
    role = _ROLES.get(spoken)
    if role is None:
        raise RowError(f"{where} has the unknown role {spoken[:40]!r}; known are {', '.join(_ROLES)}")
    where = f"{where} ({spoken})"
    calls = _tool_calls(item["tool_calls"], f"'tool_calls' of {where}") if item.get("tool_calls") else []
    if calls and not item.keys() & {"content", "value"}:
        content: Any = ""
    else:
        content = need(item, "content", "value", where=where)
    if spoken == "function_call":
        calls, content = _tool_calls(content, where), ""
    message: Message = {"role": role, "content": as_string(content, f"the content of {where}")}
    if calls:
        message["tool_calls"] = calls
    extras = {
        name: as_string(item[key], f"'{key}' of {where}") for key, name in _EXTRAS.items() if item.get(key)
    }
    return Turn(where, message | extras, _is_trained(item, role, where))


def _is_trained(item: Message, role: str, where: str) -> bool:
    weight, train = item.get("weight", 1), item.get("train", role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"the 'weight' of {where} is {repr(weight)[:40]}, expected 0 or 1")
    if not isinstance(train, bool):
        raise RowError(f"'train' of {where} is {kind_of(train)}, expected true or false")
    if train and role != "assistant":
        raise RowError(f"{where} has 'train': true, but only the assistant's messages are trained on")
    return train and weight == 1


def said(where: str, role: str, content: object) -> Turn:
    """A message of plain text."""
    return Turn(where, {"role": role, "content": as_string(content, where)})


def conversation(row: dict[str, Any], turns: list[Turn]) -> Example:
    """The example of a conversation; `row` may add a system prompt and tools to it."""
    turns = _with_system(row, turns)
    answers = [i for i, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    if not answers:
        raise RowError("it has no assistant message: there is nothing to train on")
    trained = [i for i in answers if turns[i].trained]
    if not trained:
        raise RowError("none of its answers is to be trained on: each has 'weight' 0 or 'train' false")
    turns = turns[: trained[-1] + 1]
    opener, first, _ = next(turn for turn in turns if turn.message["role"] != "system")
    if first["role"] != "user":
        raise RowError(f"{opener} opens the conversation; after the system prompt a user message is expected")
    for where, message, is_trained in turns:
        empty = not message["content"].strip() and not message.get("tool_calls")
        if empty and is_trained and message["role"] == "assistant":
            raise RowError(f"{where} is empty: there is nothing to train on in this answer")
        check_unicode(message, where)
    silent = {i for i in answers if i < len(turns)} - set(trained)
    return Example(tuple(turn.message for turn in turns), _tools(row), silent=frozenset(silent))


def _with_system(row: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    system = as_string(row.get("system", ""), "'system'")
    prompts = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
    if not system.strip() or prompts == [system]:
        return turns
    if prompts:
        raise RowError("it has a 'system' and another system prompt among its messages: remove one")
    return [said("'system'", "system", system), *turns]
