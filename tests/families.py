"""Chat formats of model families on tiny tokenizers: templates written anew for the formats that are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from raytune_ds.model.tiny import EOS

Message = dict[str, Any]
Tokenizers = dict[str, Any]

THINK = ("<think>", "</think>")

# No switch, and every prompt has closed thinking already.
_CLOSED = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<｜Assistant｜></think>' + message.content.split('</think>')[-1] + eos_token -}}
{%- else -%}
{{- ('<｜User｜>' if message.role == 'user' else '') + message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
"""


class Family(NamedTuple):
    """A chat format."""

    template: str | None  # None: the tiny models' own
    end: str = EOS
    special: tuple[str, ...] = ()  # further special tokens
    added: tuple[str, ...] = ()  # tokens that are not special, as published
    json_calls: bool = False  # arguments come as JSON text
    model: str = "deepseek-v3"  # whose tokenizer it is put on; transformers has Qwen2's normalize text


def _file(name: str) -> str:
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


_IM = ("<|im_start|>",)
FAMILIES = {
    "tiny": Family(None),
    "tiny-qwen2": Family(
        None, model="qwen2"
    ),  # a class of its own in transformers, with its own pre-tokenizer
    "v3": Family(_file("deepseek-v3"), json_calls=True),
    "v3.1": Family(_file("deepseek-v3.1"), added=THINK, json_calls=True),
    "r1": Family(_file("deepseek-r1-distill"), added=THINK, json_calls=True),
    "qwen2.5": Family(_file("qwen2.5"), "<|im_end|>", _IM, ("<tool_call>", "</tool_call>"), model="qwen2"),
    # As published: Llama-3's end of turn is not its EOS token.
    "llama3": Family(
        _file("llama-3"), "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
    ),
    "qwen3": Family(_file("qwen3"), "<|im_end|>", _IM, THINK, model="qwen2"),
    "closed": Family(_CLOSED),
}


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer that nobody else has, so it may be changed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def make_tokenizers(tiny_models: dict[str, Path]) -> Tokenizers:
    """A tokenizer for each family."""
    made = {}
    for name, family in FAMILIES.items():
        tokenizer = load_tokenizer(tiny_models[family.model])
        if family.template is not None:
            if family.end != EOS:
                tokenizer.add_tokens([family.end, *family.special], special_tokens=True)
            tokenizer.add_tokens(list(family.added))
            tokenizer.chat_template = family.template
        if family.end == "<|im_end|>":
            tokenizer.eos_token = family.end
        made[name] = tokenizer
    return made


def as_sent(family: Family, messages: list[Message]) -> list[Message]:
    """Messages as servers hand them to this template."""
    return [_with_json_calls(m) if family.json_calls and m.get("tool_calls") else m for m in messages]


def _with_json_calls(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def rendered_calls(name: str, message: Message) -> str:
    """What a family writes for the calls of a message that says nothing else."""
    calls = [call["function"] for call in message["tool_calls"]]
    return _CALLS[name]([(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls])


Calls = list[tuple[str, str]]


def _between_marks(call: str, separator: str) -> Callable[[Calls], str]:
    def write(calls: Calls) -> str:
        written = separator.join(
            f"<｜tool▁call▁begin｜>{call.format(name, arguments)}<｜tool▁call▁end｜>"
            for name, arguments in calls
        )
        return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"

    return write


_CALLS: dict[str, Callable[[Calls], str]] = {
    "tiny": _between_marks("function<｜tool▁sep｜>{}\n{}", ""),
    "tiny-qwen2": _between_marks("function<｜tool▁sep｜>{}\n{}", ""),
    "v3": _between_marks("function<｜tool▁sep｜>{}\n```json\n{}\n```", "\n"),
    "r1": _between_marks("function<｜tool▁sep｜>{}\n```json\n{}\n```", "\n"),
    "v3.1": _between_marks("{}<｜tool▁sep｜>{}", ""),
    "qwen2.5": lambda calls: "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    ),
    "llama3": lambda calls: f'{{"name": "{calls[0][0]}", "parameters": {calls[0][1]}}}',
}
