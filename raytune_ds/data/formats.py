"""Any row of a data set to one `Example`; what can't be used says why."""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMATS: tuple[str, ...] = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")

Message = dict[str, Any]

_NEEDS = {
    "messages": "'messages': a list of {role, content}",
    "sharegpt": "'conversations': a list of {from, value}",
    "alpaca": "'instruction' and 'output' (and 'input', 'system', 'history')",
    "prompt-completion": "'prompt' and 'completion' or 'response'",
    "text": "'text'",
}
# each set of keys is enough; the first format that has one wins
_KEYS: dict[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt-completion": (frozenset({"prompt", "completion"}), frozenset({"prompt", "response"})),
    "text": (frozenset({"text"}),),
}
# kinds of rows that `detect` knows and no objective trains on yet: support for one begins here
_FOR_NO_OBJECTIVE = {
    "preference": "preference rows (a chosen and a rejected answer each)",
    "kto": "KTO rows (an answer and whether it is desirable each)",
}
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
# what a message may carry beside role, content and tool_calls; templates know these
_EXTRAS = ("name", "tool_call_id", "reasoning_content")
# lists and objects in one another; what renders them needs a few frames of Python's stack for each
_DEEPEST = 100


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


class RowError(ValueError):
    """Why a row can't be used, in words that make sense behind 'file, row N: '."""


def detect(rows: Sequence[dict[str, Any]]) -> str:
    """The format of most of `rows`, the first hundred or so of a data set.

    Raises RowError where they are of none, or are preference or KTO rows.
    """
    votes = Counter(format for format in map(_format_of, rows) if format)
    if not votes:
        raise RowError(_unknown_format(rows))
    winner = votes.most_common(1)[0][0]
    if winner in _FOR_NO_OBJECTIVE:
        raise RowError(
            f"these are {_FOR_NO_OBJECTIVE[winner]}; the objective sft trains on demonstrations (a prompt and the"
            " one answer to learn), pretrain on raw text. To train on one of their columns all the same, name its"
            " format"
        )
    return winner


def to_example(row: dict[str, Any], format: str) -> Example:
    """The example that `row` holds; `format` is one of FORMATS.

    Null values count as absent. Every assistant message is meant to be trained on, those within a 'prompt' included,
    but for those with a 'weight' of 0 (as OpenAI has it) or 'train' false. Messages after the last one that is trained
    on are cut off. Raises RowError.
    """
    try:
        return _READERS[format](_without_nulls(row))
    except RecursionError:
        raise RowError("its values are nested too deeply") from None


def kind_of(value: object) -> str:
    """What a JSON value is, with its article: 'a list'."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


# ---- detection ------------------------------------------------------------------------------------


def _format_of(row: dict[str, Any]) -> str | None:
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if isinstance(row.get("label"), bool) and keys & {"messages", "conversations", "conversation", "prompt"}:
        return "kto"
    return next((format for format in FORMATS if any(needed <= keys for needed in _KEYS[format])), None)


def _unknown_format(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "there is no row to tell the format from"
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    known = sorted({key for sets in _KEYS.values() for needed in sets for key in needed} - set(keys))
    near = {near: key for key in known for near in _near(key, keys)}
    hints = "".join(f" (did you mean '{key}' by {wrong!r}?)" for wrong, key in near.items())
    needs = "; ".join(f"{format} needs {_NEEDS[format]}" for format in FORMATS)
    return f"the format of the rows is not known: they have {_listed(keys)}{hints}. {needs}"


def _near(key: str, keys: Sequence[str]) -> list[str]:
    lowered = {str(name).lower(): str(name) for name in keys}
    return [lowered[name] for name in difflib.get_close_matches(key, lowered, n=1, cutoff=0.75)]


def _listed(keys: Sequence[str], most: int = 10) -> str:
    if not keys:
        return "no keys at all"
    # repr also makes broken Unicode in a key printable
    shown = ", ".join(repr(str(key)[:40]) for key in keys[:most])
    return f"the keys {shown}{' ...' if len(keys) > most else ''}"


# ---- single values --------------------------------------------------------------------------------


def _without_nulls(value: Any) -> Any:
    """Without null members of objects, at any depth: Parquet and `datasets` fill missing keys with them."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _need(row: dict[str, Any], *keys: str, where: str = "the row") -> Any:
    """The value of the first of `keys` that `row` has."""
    for key in keys:
        if key in row:
            return row[key]
    near = [(key, name) for key in keys for name in _near(key, list(row))]
    hint = f" (did you mean '{near[0][0]}' by {near[0][1]!r}?)" if near else ""
    wanted = " or ".join(f"'{key}'" for key in keys)
    raise RowError(f"{where} has no {wanted}, it has {_listed(list(row))}{hint}")


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind_of(value)}, expected a string")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind_of(value)}, expected a list")
    return value


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{what} is {kind_of(value)}, expected an object")
    return value


def _unpacked(value: Any, what: str) -> Any:
    """A value that may come as a string of JSON; nulls within the string are meant and stay."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(f"{what} is not valid JSON: {error}") from None


def _check_unicode(value: Any, what: str) -> None:
    for text in _strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character"
                f" {error.start + 1}"
            ) from None


def _strings(value: Any, levels: int = _DEEPEST) -> Iterator[str]:
    if levels < 0:
        raise RowError(f"its values are nested too deeply: more than {_DEEPEST} levels")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _strings(key)
            yield from _strings(member, levels - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, levels - 1)


# ---- tools ----------------------------------------------------------------------------------------


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    specs = _unpacked(row.get("tools"), "'tools'")
    if specs is None:
        return ()
    _check_unicode(specs, "'tools'")
    return tuple(_tool(spec, f"tool {number}") for number, spec in enumerate(_list(specs, "'tools'"), 1))


def _tool(spec: Any, where: str) -> dict[str, Any]:
    spec = _object(_unpacked(spec, where), where)
    if "function" not in spec:  # bare {name, description, parameters}
        spec = {"type": "function", "function": spec}
    function = _object(spec["function"], f"the 'function' of {where}")
    _string(_need(function, "name", where=where), f"the 'name' of {where}")
    return spec


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = _unpacked(value, where)
    if isinstance(calls, dict):
        calls = [calls]
    return [_tool_call(call, where) for call in _list(calls, where)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = _object(call, f"a call in {where}")
    function = _object(call.get("function", call), f"the 'function' in {where}")
    name = _string(_need(function, "name", where=f"a call in {where}"), f"the 'name' in {where}")
    arguments = _unpacked(function.get("arguments"), f"the 'arguments' in {where}")
    if arguments is None:  # absent, null or "": a call without arguments, unless they go by another name
        if "parameters" in function:
            raise RowError(f"a call in {where} has 'parameters', expected 'arguments'")
        arguments = {}
    identity = {"id": _string(call["id"], f"the 'id' in {where}")} if "id" in call else {}
    arguments = _object(arguments, f"the 'arguments' in {where}")
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


# ---- conversations --------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """What to call a message in an error, the message, and whether it is trained on if it is the assistant's."""

    where: str
    message: Message
    trained: bool = True


def _turns(value: object, what: str, within: str = "") -> list[_Turn]:
    """The messages of the list that is called `what`, each {role, content} or {from, value}."""
    turns = []
    for number, item in enumerate(_list(value, what), 1):
        where = f"message {number}{within}"
        turns.append(_turn(_object(item, where), where))
    return turns


def _turn(item: Message, where: str) -> _Turn:
    spoken = _string(_need(item, "role", "from", where=where), f"the role of {where}")
    role = _ROLES.get(spoken)
    if role is None:
        raise RowError(f"{where} has the unknown role {spoken[:40]!r}; known are {', '.join(_ROLES)}")
    where = f"{where} ({spoken})"
    calls = _tool_calls(item["tool_calls"], f"'tool_calls' of {where}") if item.get("tool_calls") else []
    if calls and not item.keys() & {"content", "value"}:
        content: Any = ""
    else:
        content = _need(item, "content", "value", where=where)
    if spoken == "function_call":
        calls, content = _tool_calls(content, where), ""
    message: Message = {"role": role, "content": _string(content, f"the content of {where}")}
    if calls:
        message["tool_calls"] = calls
    extras = {key: _string(item[key], f"'{key}' of {where}") for key in _EXTRAS if item.get(key)}
    return _Turn(where, message | extras, _is_trained(item, role, where))


def _is_trained(item: Message, role: str, where: str) -> bool:
    weight, train = item.get("weight", 1), item.get("train", role == "assistant")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"the 'weight' of {where} is {repr(weight)[:40]}, expected 0 or 1")
    if not isinstance(train, bool):
        raise RowError(f"'train' of {where} is {kind_of(train)}, expected true or false")
    if train and role != "assistant":
        raise RowError(f"{where} has 'train': true, but only the assistant's messages are trained on")
    return train and weight == 1


def _conversation(row: dict[str, Any], turns: list[_Turn]) -> Example:
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
        _check_unicode(message, where)
    silent = {i for i in answers if i < len(turns)} - set(trained)
    return Example(tuple(turn.message for turn in turns), _tools(row), silent=frozenset(silent))


def _with_system(row: dict[str, Any], turns: list[_Turn]) -> list[_Turn]:
    system = _string(row.get("system", ""), "'system'")
    prompts = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
    if not system.strip() or prompts == [system]:
        return turns
    if prompts:
        raise RowError("it has a 'system' and another system prompt among its messages: remove one")
    return [_said("'system'", "system", system), *turns]


# ---- the formats ----------------------------------------------------------------------------------


def _messages(row: dict[str, Any]) -> Example:
    return _conversation(row, _turns(_need(row, "messages"), "'messages'"))


def _sharegpt(row: dict[str, Any]) -> Example:
    return _conversation(row, _turns(_need(row, "conversations", "conversation"), "'conversations'"))


def _alpaca(row: dict[str, Any]) -> Example:
    instruction = _string(_need(row, "instruction"), "'instruction'")
    parts = [instruction, _string(row.get("input", ""), "'input'")]
    prompt = "\n".join(part for part in parts if part.strip())
    if not prompt:
        raise RowError("'instruction' and 'input' are both empty")
    answer = _string(_need(row, "output"), "'output'")
    turns = [_said("'instruction'", "user", prompt), _said("'output'", "assistant", answer)]
    return _conversation(row, _history(row) + turns)


def _history(row: dict[str, Any]) -> list[_Turn]:
    turns = []
    for number, pair in enumerate(_list(row.get("history", []), "'history'"), 1):
        where = f"pair {number} of 'history'"
        if len(_list(pair, where)) != 2:
            raise RowError(f"{where} has {len(pair)} items, expected a question and its answer")
        question, answer = pair
        turns.append(_said(f"the question in {where}", "user", question))
        turns.append(_said(f"the answer in {where}", "assistant", answer))
    return turns


def _prompt_completion(row: dict[str, Any]) -> Example:
    prompt = _side(_need(row, "prompt"), "'prompt'", "user")
    if not any(turn.message["content"].strip() for turn in prompt):
        raise RowError("'prompt' is empty")
    key = "completion" if "completion" in row else "response"
    completion = _side(_need(row, "completion", "response"), f"'{key}'", "assistant")
    return _conversation(row, prompt + completion)


def _side(value: object, what: str, role: str) -> list[_Turn]:
    """One side of prompt and completion: a string, or a list of messages as TRL has it."""
    if isinstance(value, str):
        return [_said(what, role, value)]
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind_of(value)}, expected a string or a list of messages")
    return _turns(value, what, within=f" of {what}")


def _said(where: str, role: str, content: object) -> _Turn:
    return _Turn(where, {"role": role, "content": _string(content, where)})


def _text(row: dict[str, Any]) -> Example:
    text = _string(_need(row, "text"), "'text'")
    if not text.strip():
        raise RowError("'text' is empty")
    _check_unicode(text, "'text'")
    return Example(text=text)


_READERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
