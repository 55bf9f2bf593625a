"""Answers from a finished run, base plus adapter or the trained model: batched, or streamed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune_ds import storage
from raytune_ds.before import Base, comes_back, commit
from raytune_ds.config import ModelConfig
from raytune_ds.data.chat import ChatTemplate
from raytune_ds.data.formats import Example, RowError
from raytune_ds.data.literal import Literals
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.decode import Answer, decode, ignores_padding
from raytune_ds.errors import UserError
from raytune_ds.model.load import compute_dtype, grow, load_for_generation
from raytune_ds.rundir import RunDir
from raytune_ds.sampling import Sampling

__all__ = ["Generator", "Messages", "Sampling"]

Messages = Sequence[dict[str, Any]]


class Generator:
    """A model that answers conversations."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        adapted: bool = True,
        before: Base | None = None,
        ends: Collection[int] = (),
    ) -> None:
        """Takes a loaded model.

        Args:
            model: a transformers or peft model in evaluation mode.
            tokenizer: of the prompts.
            adapted: whether its adapter is on.
            before: the base model of an adapter; None: the adapter names it.
            ends: tokens that end an answer, beside those that model and tokenizer know of.
        """
        self.model, self.tokenizer, self._adapted = model, tokenizer, adapted
        self._before, self._more_ends = before, ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @staticmethod
    def of_run(path: str, device: str = "auto") -> Generator:
        """The trained model of a run directory.

        Raises:
            UserError: it is no finished run, or its base model is gone.
        """
        final, config = finished(path)
        names = ("trust_remote_code", "quantization", "add_tokens", "add_special_tokens")
        model = ModelConfig(**{n: v for n, v in config["model"].items() if n in names})
        revision = commit(RunDir(storage.absolute(path)), config["model"]["name"])
        return _of(final, Base(model, revision), device)

    @staticmethod
    def of_directory(path: Path, trust_remote_code: bool = False, device: str = "auto") -> Generator:
        """A peft adapter directory or a model directory, with its tokenizer.

        Raises:
            UserError: it is neither, or the adapter's base model is gone.
        """
        adapter = path / "adapter_config.json"
        if not adapter.exists() and not (path / "config.json").exists():
            raise UserError(
                f"{path}: neither an adapter nor a model (it has no adapter_config.json or config.json)."
            )
        return _of(path, Base(ModelConfig(trust_remote_code=trust_remote_code)), device)

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter on a base model that it names."""
        return hasattr(self.model, "disable_adapter")

    def base(self, before: Base | None = None) -> Generator:
        """The model as it was before training, asked in the same chat format.

        Args:
            before: names it; not needed with an adapter, whose weights are shared where switching it off leaves them.

        Raises:
            UserError: it can't be loaded.
        """
        before = before or self._before
        if before is None:
            before = Base(ModelConfig(name=self.model.active_peft_config.base_model_name_or_path))
        model = before.model
        own = load_tokenizer(TokenizerSpec(model.name, self.tokenizer.chat_template, model.trust_remote_code))
        # Tokens that training added mean nothing to it.
        tokenizer = self.tokenizer if len(own) == len(self.tokenizer) else own
        if self.has_adapter and comes_back(self.model.active_peft_config):
            return Generator(self.model, tokenizer, adapted=False)
        return Generator(_load(_without_added(model), self.model.device.type, before.revision), tokenizer)

    @property
    def context(self) -> int:
        """How many tokens the model reads and writes at most; enough for anything where it does not say."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**31

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer: the generation config's, and the tokenizer's, which training put there."""
        known = self.model.generation_config.eos_token_id
        ids = [known] if isinstance(known, int) else known or []
        own = self.tokenizer.eos_token_id
        return frozenset([*ids, *self._more_ends, *([] if own is None else [own])])

    def prompt_ids(
        self,
        conversation: Messages,
        tools: Sequence[dict[str, Any]] = (),
        thinking: bool | None = None,
    ) -> list[int]:
        """What the model reads, token for token what training has in front of an answer.

        Args:
            conversation: messages, as in `Example`.
            tools: functions that may be called, for the template.
            thinking: sets the template's switch, if it has one; None leaves it as it was in training.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        if not self.tokenizer.chat_template:  # trained on raw text: what is asked is simply continued
            text = "".join(str(message["content"]) for message in conversation)
            # Training put the same token in front.
            return self._literals.ids([(self.tokenizer.bos_token or "") + text])[0]
        guarded = self._literals.guarded(Example(tuple(dict(m) for m in conversation), tuple(tools)))
        try:
            text = self._template.render(guarded.messages, guarded.tools, generate=True, thinking=thinking)
        except RowError as error:
            raise UserError(f"this conversation: {error}") from error
        return self._literals.ids([text])[0]

    def ask(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        position: int = 0,
        write: Callable[[str], None] | None = None,
        with_special: bool = False,
    ) -> Answer:
        """The answer that `run` will write to a prompt, cut where the model's context ends.

        Args:
            prompt: token ids.
            sampling: how tokens are chosen.
            position: tells its random numbers from those of other answers with the same seed.
            write: is given the text piece by piece, in the thread that runs it.
            with_special: keeps special tokens in the text, all but the end token: calls of tools are written in them.

        Raises:
            UserError: the prompt leaves no room for an answer.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"this conversation has {len(prompt)} tokens, and the model reads {self.context} at most, "
                "its answer included."
            )
        if room < sampling.max_new_tokens:
            sampling = Sampling(**{**vars(sampling), "max_new_tokens": room})
        generator = sampling.generator(position, self.model.device)
        return Answer(self.tokenizer, prompt, sampling, self.ends, generator, write, with_special)

    def run(self, answers: Sequence[Answer], pause: Callable[[], bool] = lambda: False) -> None:
        """Writes answers as one batch, or as one for each length where the model can't be padded; see `decode`."""
        paused = False

        def pauses() -> bool:
            nonlocal paused
            paused = pause()
            return paused

        with contextlib.nullcontext() if self._adapted else self.model.disable_adapter():
            for batch in self._batches(answers):
                if not paused:
                    decode(self.model, self.tokenizer, batch, pauses)

    def _batches(self, answers: Sequence[Answer]) -> list[list[Answer]]:
        by_length: dict[int, list[Answer]] = {}
        for answer in answers:
            by_length.setdefault(len(answer.prompt) + len(answer.ids), []).append(answer)
        if len(by_length) == 1 or self._ignores_padding:
            return [list(answers)]
        return list(by_length.values())

    def answer(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling,
        batch_size: int = 16,
        first: int = 0,
        watch: Callable[[Sequence[Answer]], None] = lambda _: None,
    ) -> Iterator[str]:
        """The answer to each conversation, in order; end token and special tokens left out.

        Prompts of like lengths are answered together, so that little is padded: out of `WINDOW` batches each time.

        Args:
            conversations: what is asked.
            sampling: how tokens are chosen; with a seed, each conversation has random numbers of its own.
            batch_size: how many are answered at once.
            first: the place of the first conversation in a list that is answered in parts.
            watch: is shown each batch behind every token.
        """
        for start in range(0, len(conversations), batch_size * self.WINDOW):
            asked = conversations[start : start + batch_size * self.WINDOW]
            answers = [
                self.ask(self.prompt_ids(conversation), sampling, first + start + offset)
                for offset, conversation in enumerate(asked)
            ]
            by_length = sorted(answers, key=lambda answer: len(answer.prompt), reverse=True)
            for begin in range(0, len(by_length), batch_size):
                batch = by_length[begin : begin + batch_size]
                self.run(batch, partial(_watched, watch, batch))
            yield from (answer.text for answer in answers)

    WINDOW = 8

    def stream(self, conversation: Messages, sampling: Sampling, write: Callable[[str], None]) -> str:
        """One answer, handed to `write` piece by piece as it is made; returned whole."""
        answer = self.ask(self.prompt_ids(conversation), sampling, write=write)
        self.run([answer])
        return answer.text

    @cached_property
    def _ignores_padding(self) -> bool:
        return ignores_padding(self.model, self.tokenizer)

    @cached_property
    def _literals(self) -> Literals:
        return Literals(self.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)


def _watched(watch: Callable[[Sequence[Answer]], None], batch: Sequence[Answer]) -> bool:
    """Shows a batch, which never pauses."""
    watch(batch)
    return False


def finished(path: str) -> tuple[Path, dict[str, Any]]:
    """`final/` of a finished run on this machine, and its config.

    Raises:
        UserError: it is none.
    """
    if not storage.is_local(path):
        raise UserError(
            f"--run {path}: copy the run directory to this machine first (config.json and final/ will do)."
        )
    run, config = RunDir.finished(path)
    return Path(run.final), config


def _of(path: Path, base: Base, device: str) -> Generator:
    """An adapter on the base model that it names, or a whole model; `base` says how it is loaded."""
    trust_remote_code = base.model.trust_remote_code
    tokenizer = load_tokenizer(TokenizerSpec(str(path), None, trust_remote_code))
    adapter = path / "adapter_config.json"
    if not adapter.exists():
        whole = ModelConfig(name=str(path), trust_remote_code=trust_remote_code)
        return Generator(_load(whole, device), tokenizer)
    says = json.loads(adapter.read_text())
    model = base.model.model_copy(update={"name": says["base_model_name_or_path"]})
    before = Base(model, base.revision or says.get("revision"))
    if model.quantization != "none":
        return Generator(_load(model, device, before.revision, path), tokenizer, before=before)
    from peft import PeftModel

    loaded = _load(_without_added(model), device, before.revision)
    known = len(load_tokenizer(TokenizerSpec(model.name, None, trust_remote_code)))
    if len(tokenizer) > known:  # a directory does not say which tokens were added
        grow(loaded, known, len(tokenizer))
    return Generator(PeftModel.from_pretrained(loaded, str(path)).eval(), tokenizer, before=before)


def _without_added(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"add_tokens": (), "add_special_tokens": ()})


def _load(config: ModelConfig, device: str, revision: str | None = None, adapter: Path | None = None) -> Any:
    where = torch.device(_auto_device() if device == "auto" else device)
    return load_for_generation(config, compute_dtype("auto", where), where, adapter, revision)


def _auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
