"""From YAML files and dotted overrides to one `Config`, with every problem told at once.

pydantic-settings and tyro were looked at: their command lines want `--adapter.r 16` flags, and neither names
the file and line a value came from, refuses duplicate YAML keys or knows other trainers' key names, so nearly
all below would stand beside them all the same; pydantic-settings alone also triples the import time.

YAML is read by the rules of YAML 1.2: `2e-4` is a number, `no` and `2024-01-01` are text, `010` is ten.
"""

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raytune_ds.config import SECRET_NAME, Config, SourceConfig, holds_credentials, types_in
from raytune_ds.errors import UserError

KeyPath = tuple[str, ...]

COMMAND_LINE = "command line"
_INDEX = re.compile(r"[0-9]{1,4}")
_MAX_DEPTH = 8  # parts of a dotted key; the tree has four (data.sources.0.path)

# what other trainers (transformers, TRL, LLaMA-Factory, axolotl, Lightning, torchtune) call our keys
ALIASES: Mapping[str, tuple[str, ...]] = {
    "exp_name": ("run.name",),
    "experiment_name": ("run.name",),
    "run_name": ("run.name",),
    "output_dir": ("run.storage",),
    "save_dir": ("run.storage",),
    "storage_path": ("run.storage",),
    "data_seed": ("run.seed",),
    "random_seed": ("run.seed",),
    "overwrite_output_dir": ("run.resume",),
    "resume_from_checkpoint": ("run.resume",),
    "base_model": ("model.name",),
    "checkpoint_dir": ("model.name",),
    "model_id": ("model.name",),
    "model_name": ("model.name",),
    "model_name_or_path": ("model.name",),
    "model_path": ("model.name",),
    "pretrained_model_name_or_path": ("model.name",),
    "bf16": ("model.dtype",),
    "fp16": ("model.dtype",),
    "precision": ("model.dtype",),
    "torch_dtype": ("model.dtype",),
    "load_in_4bit": ("model.quantization",),
    "load_in_8bit": ("model.quantization",),
    "quantization_bit": ("model.quantization",),
    "attn_implementation": ("model.attention",),
    "flash_attention": ("model.attention",),
    "flash_attn": ("model.attention",),
    "finetuning_type": ("adapter.kind",),
    "use_lora": ("adapter.kind",),
    "use_peft": ("adapter.kind",),
    "lora_r": ("adapter.r",),
    "lora_rank": ("adapter.r",),
    "rank": ("adapter.r",),
    "lora_alpha": ("adapter.alpha",),
    "lora_dropout": ("adapter.dropout",),
    "lora_bias": ("adapter.bias",),
    "lora_target": ("adapter.targets",),
    "lora_target_modules": ("adapter.targets",),
    "target_modules": ("adapter.targets",),
    "loss_type": ("objective.kind",),
    "stage": ("objective.kind",),
    "data_files": ("data.sources",),
    "data_path": ("data.sources",),
    "dataset": ("data.sources",),
    "dataset_name": ("data.sources",),
    "dataset_path": ("data.sources",),
    "datasets": ("data.sources",),
    "train_data": ("data.sources",),
    "train_file": ("data.sources",),
    "dataset_format": ("data.sources.0.format",),
    "eval_dataset": ("data.eval.sources",),
    "validation_file": ("data.eval.sources",),
    "eval_fraction": ("data.eval.fraction",),
    "test_size": ("data.eval.fraction",),
    "val_set_size": ("data.eval.fraction",),
    "val_size": ("data.eval.fraction",),
    "validation_split": ("data.eval.fraction",),
    "block_size": ("data.seq_len",),
    "context_length": ("data.seq_len",),
    "cutoff_len": ("data.seq_len",),
    "max_length": ("data.seq_len",),
    "max_seq_len": ("data.seq_len",),
    "max_seq_length": ("data.seq_len",),
    "model_max_length": ("data.seq_len",),
    "sequence_len": ("data.seq_len",),
    "sequence_length": ("data.seq_len",),
    "template": ("data.chat_template",),
    "epochs": ("train.num_train_epochs",),
    "max_epochs": ("train.num_train_epochs",),
    "num_epochs": ("train.num_train_epochs",),
    "max_train_steps": ("train.max_steps",),
    "num_steps": ("train.max_steps",),
    "total_steps": ("train.max_steps",),
    "batch_size": ("train.global_batch", "train.micro_batch"),
    "global_batch_size": ("train.global_batch",),
    "train_batch_size": ("train.global_batch",),
    "gradient_accumulation_steps": ("train.global_batch", "train.micro_batch"),
    "micro_batch_size": ("train.micro_batch",),
    "per_device_batch_size": ("train.micro_batch", "train.global_batch"),
    "per_device_train_batch_size": ("train.micro_batch", "train.global_batch"),
    "lr": ("train.learning_rate",),
    "lr_scheduler": ("train.lr_scheduler_type",),
    "scheduler": ("train.lr_scheduler_type",),
    "warmup": ("train.warmup_ratio", "train.warmup_steps"),
    "num_warmup_steps": ("train.warmup_steps",),
    "wd": ("train.weight_decay",),
    "beta1": ("train.adam_beta1",),
    "beta2": ("train.adam_beta2",),
    "betas": ("train.adam_beta1", "train.adam_beta2"),
    "eps": ("train.adam_epsilon",),
    "clip_grad_norm": ("train.max_grad_norm",),
    "grad_clip": ("train.max_grad_norm",),
    "gradient_clip_val": ("train.max_grad_norm",),
    "gradient_clipping": ("train.max_grad_norm",),
    "gradient_checkpointing": ("train.activation_checkpointing",),
    "eval_interval": ("train.eval_steps",),
    "evals_per_epoch": ("train.eval_steps",),
    "log_every_n_steps": ("train.logging_steps",),
    "log_interval": ("train.logging_steps",),
    "deepspeed": ("engine.kind",),
    "fsdp": ("engine.kind",),
    "strategy": ("engine.kind",),
    "gpus": ("scaling.num_workers",),
    "nproc_per_node": ("scaling.num_workers",),
    "num_gpus": ("scaling.num_workers",),
    "num_processes": ("scaling.num_workers",),
    "world_size": ("scaling.num_workers",),
    "max_restarts": ("scaling.max_failures",),
    "save_interval": ("checkpoint.every_steps",),
    "save_steps": ("checkpoint.every_steps",),
    "save_total_limit": ("checkpoint.keep",),
    "logger": ("tracking.to",),
    "report_to": ("tracking.to",),
}


# ------------------------------------------------------------ public


def compose(files: Sequence[str | Path], overrides: Sequence[str]) -> Config:
    """Merge YAML files from left to right, then `key.sub=value` overrides, into a checked config.

    Mappings merge, everything else replaces; a value on the right wins. Override values are YAML, and a list
    takes an index (`data.sources.0.path=x`). Raises `UserError` with all problems, one a line, each with the
    place the value came from: file and line, or "command line".
    """
    given = _Given()
    for file in files:
        given.add_file(file)
    for argument in overrides:
        given.add_override(argument)
    return _checked(given)


def dump(config: Config) -> str:
    """The resolved config as JSON, keys in the tree's order, newline at the end; holds no secrets."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def load(text: str) -> Config:
    """The config that `dump` wrote; raises `UserError` where the text is not one."""
    given = _Given()
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the resolved config is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError("the resolved config must be a JSON object of sections")
    given.tree = tree
    given.origins[()] = "resolved config"
    return _checked(given)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key to (a's, b's value) for each key that differs, in the tree's order; a list is one value."""
    flat_a, flat_b = (dict(_flat(config.model_dump(mode="json"))) for config in (a, b))
    return {key: (flat_a[key], flat_b[key]) for key in flat_a if flat_a[key] != flat_b[key]}


def help_text() -> str:
    """Every key with type, default and description, by section, wrapped at the width of the terminal."""
    width = max(40, min(shutil.get_terminal_size().columns, 120))
    return "\n".join(_section_help(name, info, width) for name, info in Config.model_fields.items())


# ------------------------------------------------------------ the tree's keys


def _items_model(info: FieldInfo) -> type[BaseModel] | None:
    """The section class that a list field holds, or None."""
    models = [t for t in types_in(info.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
    return models[0] if models and info.annotation is not models[0] else None


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is itself a section, or None."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _walk(model: type[BaseModel], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every field below a section, sections included; entry 0 of a list of sections stands for all."""
    for name, info in model.model_fields.items():
        path = (*prefix, name)
        yield path, info
        items = _items_model(info)
        if inner := _section_of(info):
            yield from _walk(inner, path)
        elif items:
            yield from _walk(items, (*path, "0"))


_FIELDS: dict[KeyPath, FieldInfo] = dict(_walk(Config))
# dotted keys that take a value; an entry of a list of sources is written with index 0
KEYS: tuple[str, ...] = tuple(".".join(path) for path, info in _FIELDS.items() if not _section_of(info))


def _field(path: KeyPath) -> FieldInfo | None:
    return _FIELDS.get(tuple("0" if _INDEX.fullmatch(part) else part for part in path))


def _is_section(path: KeyPath) -> bool:
    info = _field(path)
    return info is not None and _section_of(info) is not None


def _takes_list(path: KeyPath) -> bool:
    info = _field(path)
    return info is not None and "tuple" in str(info.annotation)


def _takes_text(path: KeyPath) -> bool:
    """Whether any text will do for a field, or for an entry of the list it is."""
    if path and _INDEX.fullmatch(path[-1]):
        path = path[:-1]
    info = _field(path)
    return info is not None and not {str, SourceConfig}.isdisjoint(types_in(info.annotation))


# ------------------------------------------------------------ reading YAML


class _Problem(Exception):
    """One thing wrong, told without the place it came from."""


class _Loader(yaml.SafeLoader):
    """Used for its node graph only, with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def _parse(text: str) -> yaml.Node | None:
    """The node graph of one YAML document; None where it is empty. Raises yaml.YAMLError or _Problem."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node)
        _merge_keys(loader, node)
    except RecursionError:
        raise _Problem("is nested too deeply, or refers to itself") from None
    return node


def _children(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (value for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refuse_duplicates(node: yaml.Node | None) -> None:
    """Raise where a key stands twice in a mapping: PyYAML would silently keep the last."""
    seen: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise _Problem(f"line {line}: a key must be plain text, not a list or mapping")
        if key.value in seen:
            raise _Problem(
                f"line {line}: {_short(key.value)} is set twice, first in line {seen[key.value]}; keep one"
            )
        seen[key.value] = line
    for child in _children(node):
        _refuse_duplicates(child)


def _merge_keys(loader: yaml.SafeLoader, node: yaml.Node | None) -> None:
    """Resolve `<<: *anchor`; what a mapping sets itself wins."""
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
    for child in _children(node):
        _merge_keys(loader, child)


def _plain(node: yaml.Node | None) -> Any:
    """The Python value of a node graph: dict with text keys, list, or scalar."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    return _scalar(node)


def _scalar(node: yaml.Node | None) -> Any:
    """The value of a scalar node. An explicit tag that fits no scalar leaves the text as it stands."""
    if node is None:
        return None
    text = node.value
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text, flags=re.IGNORECASE))
    except ValueError:  # thousands of digits, or `!!int abc`
        return text
    if kind == "bool":
        return text.lower() == "true"
    return None if kind == "null" else text


def _yaml_problem(error: yaml.YAMLError) -> str:
    """One line about a YAML error: line, column, what."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}not valid YAML: {what}"


# ------------------------------------------------------------ merging


@dataclass
class _Given:
    """What the user gave, merged: the raw tree, where each part came from, and problems met on the way."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    after_secret: bool = False  # the argument before names a secret: `--api_key sk-...` in two words

    def add_file(self, file: str | Path) -> None:
        """Merge a YAML file; what is wrong with it becomes a problem."""
        try:
            node = _parse(Path(file).read_text(encoding="utf-8-sig"))
            if _plain(node) is None:
                return
            if not isinstance(node, yaml.MappingNode):
                raise _Problem("must be a mapping of sections, such as 'adapter: {r: 16}'")
            self._merge(node, (), str(file))
        except _Problem as problem:
            text = str(problem)
            self.problems.append(f"{file}{', ' if text.startswith('line ') else ': '}{text}")
        except yaml.YAMLError as error:
            text = _yaml_problem(error)
            self.problems.append(f"{file}{', ' if text.startswith('line ') else ': '}{text}")
        except RecursionError:
            self.problems.append(f"{file}: is nested too deeply")
        except FileNotFoundError:
            self.problems.append(f"{file}: there is no such config file")
        except UnicodeDecodeError as error:
            self.problems.append(f"{file}: is not UTF-8 text (byte {error.start})")
        except OSError as error:
            self.problems.append(f"{file}: cannot be read: {error.strerror or error}")
        except ValueError:  # a null byte in the name
            self.problems.append(f"{file}: is no file name")

    def add_override(self, argument: str) -> None:
        """Merge one `key.sub=value`; what is wrong with it becomes a problem."""
        key, equals, text = argument.partition("=")
        key = key.strip()
        path = tuple(key.split("."))
        if not equals:
            self.problems.append(
                f"{self._stray(argument)} ({COMMAND_LINE}): write key=value, such as adapter.r=16"
            )
        elif not all(path):
            shown = _short(key) if key else "=..."
            self.problems.append(
                f"{shown} ({COMMAND_LINE}): the key has an empty part; write section.key=value"
            )
        elif len(path) > _MAX_DEPTH:
            self.problems.append(f"{_key(path)} ({COMMAND_LINE}): unknown key; no key has that many parts")
        else:
            self._override(path, text)
        self.after_secret = not equals and bool(SECRET_NAME.search(argument))

    def _override(self, path: KeyPath, text: str) -> None:
        try:
            self._merge(_override_node(path, text), path, "")
        except (_Problem, RecursionError) as problem:
            self.problems.append(f"{_key(path)} ({COMMAND_LINE}): {problem}")
        except yaml.YAMLError as error:
            if (
                _field(path) is None
            ):  # the key is what is wrong; the parser may quote the value, a secret perhaps
                self._merge(None, path, "")
                return
            self.problems.append(
                f"{_key(path)} ({COMMAND_LINE}): {_yaml_problem(error)}; quote the value if it is text"
            )

    def _stray(self, argument: str) -> str:
        """An argument that is no override, shown as far as it may be a key."""
        if self.after_secret:
            return "an argument that is not shown"
        key = re.match(r"[\w./~-]*", argument)
        shown = key[0] if key else ""
        return _short(shown + ("" if shown == argument else "...")) or '""'

    def where(self, path: KeyPath) -> str:
        """Where a value came from: its own place, that of something in it, or that of what it stands in."""
        if path in self.origins:
            return self.origins[path]
        below = [origin for key, origin in self.origins.items() if key[: len(path)] == path]
        if path and below:
            return below[-1]
        return self.where(path[:-1]) if path else self.origins.get((), "defaults")

    def _merge(self, node: yaml.Node | None, path: KeyPath, file: str) -> None:
        """Set every leaf of a node graph; `file` is empty for the command line."""
        if isinstance(node, yaml.MappingNode) and (node.value or _is_section(path) or not path):
            for key, value in node.value:
                self._merge(value, (*path, key.value), file)
        elif not (_is_section(path) and _plain(node) is None):  # a section without keys sets nothing
            self.tree = _assigned(self.tree, path, _plain(node))
            self.origins = {key: origin for key, origin in self.origins.items() if key[: len(path)] != path}
            self._note_origins(node, path, file)

    def _note_origins(self, node: yaml.Node | None, path: KeyPath, file: str) -> None:
        line = node.start_mark.line + 1 if node is not None and node.start_mark else 1
        self.origins[path] = f"{file}, line {line}" if file else COMMAND_LINE
        keyed = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, value in keyed:
            self._note_origins(value, (*path, key.value), file)
        for index, value in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
            self._note_origins(value, (*path, str(index)), file)


def _override_node(path: KeyPath, text: str) -> yaml.Node | None:
    """The value of an override. A field for text takes what was typed: `run.name=007`, `data.sources=*`."""
    literal = yaml.ScalarNode("tag:yaml.org,2002:str", text.strip())
    collection = text.lstrip()[:1] in ("[", "{", '"', "'")
    try:
        node = _parse(text)
    except (yaml.YAMLError, _Problem):
        if _takes_text(path) and not collection:
            return literal
        raise
    if not _takes_text(path) or collection or _plain(node) is None:
        return node
    return literal


def _assigned(old: Any, path: KeyPath, value: Any, at: KeyPath = ()) -> Any:
    """A copy of `old` in which the value at `path` is replaced; raises _Problem for an index out of reach."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if _takes_list(at) and _INDEX.fullmatch(head):
        items = [] if old is None else list(old) if isinstance(old, list) else [old]
        index = int(head)
        if index > len(items):
            raise _Problem(f"the list is shorter; its next free index is {len(items)}")
        item = items[index] if index < len(items) else None
        if rest and isinstance(item, str):  # a bare string is short for a source with that path
            item = {"path": item}
        return [*items[:index], _assigned(item, rest, value, (*at, head)), *items[index + 1 :]]
    keys = dict(old) if isinstance(old, dict) else {}
    keys[head] = _assigned(keys.get(head), rest, value, (*at, head))
    return keys


# ------------------------------------------------------------ telling what is wrong


def _checked(given: _Given) -> Config:
    """The config of a merged tree; raises UserError with all problems of reading and of checking."""
    problems = list(given.problems)
    try:
        config = Config.model_validate(given.tree)
    except ValidationError as error:
        problems += _told(error, given)
    if problems:
        # keys and values may hold anything: a line stays a line, and a terminal is not steered
        raise UserError("\n".join(_printable(problem) for problem in dict.fromkeys(problems)))
    return config


def _told(error: ValidationError, given: _Given) -> Iterator[str]:
    """One line for each key that is wrong; the branches of a union are told together."""
    by_path: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = _error_path(item)
        if item["type"] == "extra_forbidden":
            yield from _unknown(path, item["input"], given)
        else:
            by_path.setdefault(path, []).append(item)
    for path, items in by_path.items():
        if _INDEX.fullmatch(path[-1] if path else "") and not _value_at(given.tree, path):
            path = path[:-1]  # a single entry given without a list around it
        value = _value_at(given.tree, path)
        yield f"{_key(path)}{value} ({given.where(path)}): {_message(path, items)}"


def _error_path(item: Any) -> KeyPath:
    """The key of a pydantic error: its location without the union branches pydantic adds."""
    path: KeyPath = ()
    for part in item["loc"]:
        longer = (*path, str(part))
        last_unknown = item["type"] == "extra_forbidden" and longer == tuple(map(str, item["loc"]))
        if not (_field(longer) or last_unknown or (isinstance(part, int) and _takes_list(path))):
            break
        path = longer
    about = item.get("ctx", {}).get("key") if item["type"] == "about" else None
    return (*path, about) if about else path


def _unknown(path: KeyPath, value: Any, given: _Given) -> Iterator[str]:
    """A line for an unknown key, or for each key of an unknown section. Never with its value."""
    if isinstance(value, dict) and value and len(path) < _MAX_DEPTH:
        for name, inner in value.items():
            yield from _unknown((*path, name), inner, given)
        return
    if any("." in part for part in path):
        parts = ".".join(path).split(".")
        nested = ": {".join(parts) + ": ..." + "}" * (len(parts) - 1)
        hint = f"; dots are for the command line, in a file write sections: {_short(nested)}"
    elif SECRET_NAME.search(path[-1]):
        hint = "; secrets do not belong in a config, set them in the environment of the nodes"
    else:
        names = suggestions(".".join(path))
        hint = f"; did you mean {' or '.join(names)}?" if names else "; --help lists all keys"
    yield f"{_key(path)} ({given.where(path)}): unknown key{hint}"


def suggestions(key: str) -> list[str]:
    """Up to three existing dotted keys that an unknown one may have meant, the likeliest first."""
    written = key.strip().lstrip("-").replace("-", "_").lower()
    parent, _, last = written.rpartition(".")
    if written in KEYS:
        return [written]
    if last in ALIASES:
        return list(ALIASES[last])
    siblings = [name for name in KEYS if name.rpartition(".")[0] == parent]
    if close := _close(last, [name.rpartition(".")[2] for name in siblings], 0.75):
        return [f"{parent}.{close[0]}" if parent else close[0]]
    same_last = [name for name in KEYS if name.rpartition(".")[2] == last]
    if len(same_last) > 1 and parent and (close := _close(written, same_last, 0.8)):
        return close[:1]
    if same_last:
        return same_last[:3]
    if close := [name for name in _close(written, KEYS, 0.8) if _close(last, [name.rpartition(".")[2]], 0.6)]:
        return close[:1]
    lasts = _close(last, {name.rpartition(".")[2] for name in KEYS}, 0.75)
    return [name for name in KEYS if lasts and name.rpartition(".")[2] == lasts[0]][:3]


def _close(word: str, names: Iterable[str], cutoff: float) -> list[str]:
    # difflib takes quadratic time, and nobody mistypes a key into 60 letters
    return difflib.get_close_matches(word, sorted(names), 3, cutoff) if len(word) <= 60 else []


_TYPE_PHRASES = {
    "bool": "true or false",
    "finite": "a finite number",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "string": "text",
    "tuple": "a list",
}


def _message(path: KeyPath, items: Sequence[Any]) -> str:
    """What is wrong with one key, from the errors of all branches of its type."""
    first = items[0]
    context = first.get("ctx", {})
    if first["type"] == "value_error":
        return str(context["error"])
    if first["type"] == "about":
        return str(context["message"])
    if first["type"] == "missing":
        return "is missing"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return _section_message(path)
    if first["type"] == "string_unicode":
        return "has characters that are not valid Unicode"
    phrases = list(dict.fromkeys(phrase for item in items for phrase in _phrase(item).split(" or ")))
    info = _field(path)
    if info is not None and NoneType in get_args(info.annotation):
        phrases.append("null")
    return f"must be {_either(phrases)}{_value_hint(items)}"


def _phrase(item: Any) -> str:
    """A few words that finish the sentence 'must be ...'."""
    kind, context = item["type"], item.get("ctx", {})
    bounds = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    for name, words in bounds.items():
        if name in context:
            return f"{words} {_number(context[name])}"
    if kind == "literal_error":
        return _either(re.findall(r"'([^']*)'", context["expected"]))
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters long"
    if kind == "string_too_short":
        return "some text, not empty"
    return _TYPE_PHRASES.get(kind.partition("_")[0], item["msg"].removeprefix("Input should be "))


def _section_message(path: KeyPath) -> str:
    info = _field(path)
    model = (_section_of(info) if info else SourceConfig) or SourceConfig
    if not path:
        model = Config
    names = ", ".join(model.model_fields)
    main = next((name for name in ("kind", "name") if name in model.model_fields), None)
    hint = f"; did you mean {_key((*path, main))}?" if main and path else ""
    return f"must be a section with keys ({names}){hint}"


def _value_hint(items: Sequence[Any]) -> str:
    """What to do about a misspelt choice, or a number where text is wanted."""
    for item in items:
        if item["type"] == "string_type" and isinstance(item["input"], (int, float)):
            return "; put the value in quotes"
        if item["type"] == "literal_error" and isinstance(item["input"], str):
            choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            if close := _close(item["input"].lower(), choices, 0.6):
                return f"; did you mean {close[0]}?"
    return ""


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _number(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _key(path: KeyPath) -> str:
    return _short(".".join(part or '""' for part in path), 80) if path else "config"


def _value_at(tree: Any, path: KeyPath) -> str:
    """' = value' as it was given, or nothing where there is none or it must not be shown."""
    for part in path:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and _INDEX.fullmatch(part) and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return ""
    if isinstance(tree, dict):  # a collection may hold anything, a misplaced secret included
        return " = a mapping"
    if isinstance(tree, list):
        return " = a list"
    if isinstance(tree, str):
        return "" if holds_credentials(tree) else f" = {_quoted(tree)}"
    try:
        return f" = {_short(json.dumps(tree))}"
    except ValueError:  # an int of thousands of digits
        return ""


def _quoted(text: str) -> str:
    plain = bool(text) and not re.search(r"[\s\"']", text)
    return _short(text if plain else json.dumps(text, ensure_ascii=False))


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------ help and dumps


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _section_help(name: str, info: FieldInfo, width: int) -> str:
    model = _section_of(info) or Config
    title = (model.__doc__ or "").strip().splitlines()[0]
    lines = textwrap.wrap(f"{name}: {title}", width)
    for path, inner in _walk(model, (name,)):
        # data.eval.sources has the entries of data.sources: once is enough
        if not _section_of(inner) and path[:4] != ("data", "eval", "sources", "0"):
            lines += _key_help(path, inner, width)
    return "\n".join(lines) + "\n"


def _key_help(path: KeyPath, info: FieldInfo, width: int) -> list[str]:
    key = ".".join("N" if part == "0" else part for part in path)
    default = "required" if info.is_required() else f"default {json.dumps(info.default)}"
    head = f"{key}: {_kind(info.annotation, info.metadata)}; {default}"
    wrapped = textwrap.wrap(
        head, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )
    return wrapped + textwrap.wrap(
        info.description or "",
        width,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )


_KIND_NAMES = {
    bool: "true | false",
    float: "number",
    int: "whole number",
    str: "text",
    NoneType: "null",
    SourceConfig: "path or {path, format}",
}


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: choices, bounds, lists."""
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " | ".join(_kind(part, metadata) for part in arguments)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of ({_kind(arguments[0])})"
    words = _KIND_NAMES.get(annotation, "value")
    return words + (_bounds(metadata) if annotation in (int, float) else "")


def _bounds(metadata: Sequence[Any]) -> str:
    """Bounds as ' >= 1 < 5'; Field() keeps them in its own metadata when it stands inside Annotated."""
    marks = [mark for data in metadata for mark in (data.metadata if isinstance(data, FieldInfo) else [data])]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(
        f" {sign} {_number(getattr(mark, name))}"
        for mark in marks
        for name, sign in signs.items()
        if hasattr(mark, name)
    )
