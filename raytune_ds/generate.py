"""Answers from a finished run, base plus adapter or the trained model: batched, or streamed to a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune_ds import storage
from raytune_ds.config import ModelConfig
from raytune_ds.console import say
from raytune_ds.data.chat import ChatTemplate
from raytune_ds.data.formats import RowError
from raytune_ds.data.tokenizer import TokenizerSpec, load_tokenizer
from raytune_ds.errors import UserError
from raytune_ds.model.load import compute_dtype, load_for_generation
from raytune_ds.rundir import RunDir

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token each time.
        top_p: samples from the smallest set of tokens with this much probability.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """As `generate` takes them."""
        if self.temperature == 0:
            return {
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
            }
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


class Generator:
    """A model that answers conversations."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """`model` is a transformers or peft model in evaluation mode."""
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @staticmethod
    def of_run(path: str, device: str = "auto") -> Generator:
        """The trained model of a run directory.

        Raises:
            UserError: it is no finished run, or its base model is gone.
        """
        run = RunDir(storage.absolute(path))
        if not storage.is_local(run.path):
            raise UserError(
                f"--run {path}: copy the run directory to this machine first (config.json and final/ will do)."
            )
        config = storage.read_json(run.config)
        if config is None:
            raise UserError(f"--run {path}: no run directory (it has no config.json).")
        if not storage.exists(run.final):
            raise UserError(
                f"--run {path}: the run has not finished (no final/). Start the same command again to go on."
            )
        return Generator.of_directory(Path(run.final), config["model"]["trust_remote_code"], device)

    @staticmethod
    def of_directory(path: Path, trust_remote_code: bool = False, device: str = "auto") -> Generator:
        """A peft adapter directory or a model directory, with its tokenizer.

        Raises:
            UserError: the adapter's base model is gone.
        """
        adapter = path / "adapter_config.json"
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else str(path)
        where = torch.device(_auto_device() if device == "auto" else device)
        config = ModelConfig(name=base, trust_remote_code=trust_remote_code)
        model: Any = load_for_generation(config, compute_dtype("auto", where), where)
        if adapter.exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(path)).eval()
        tokenizer = load_tokenizer(TokenizerSpec(str(path), None, trust_remote_code))
        return Generator(model, tokenizer)

    @torch.inference_mode()
    def answer(
        self, conversations: Sequence[Messages], sampling: Sampling, batch_size: int = 16
    ) -> Iterator[str]:
        """The answer to each conversation, in order; end token and special tokens left out."""
        for start in range(0, len(conversations), batch_size):
            inputs = self._encode(conversations[start : start + batch_size])
            output_BT = self.model.generate(**inputs, **self._options(sampling))
            answers_BT = output_BT[:, inputs["input_ids"].shape[1] :]
            yield from self.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)

    @torch.inference_mode()
    def stream(self, conversation: Messages, sampling: Sampling, write: Callable[[str], None]) -> str:
        """One answer, handed to `write` piece by piece as it is made; returned whole."""
        streamer = _Streamer(self.tokenizer, write)
        self.model.generate(**self._encode([conversation]), **self._options(sampling), streamer=streamer)
        return streamer.text

    def _encode(self, conversations: Sequence[Messages]) -> dict[str, torch.Tensor]:
        texts = [self._render(conversation) for conversation in conversations]
        # On the left, so that every answer starts where its row of the batch ends.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        names = ("input_ids", "attention_mask")
        return {name: encoded[name].to(self.model.device) for name in names}

    def _render(self, conversation: Messages) -> str:
        if not self.tokenizer.chat_template:  # trained on raw text: what is asked is simply continued
            # Training put the same token in front.
            return (self.tokenizer.bos_token or "") + "".join(
                str(message["content"]) for message in conversation
            )
        try:
            return ChatTemplate(self.tokenizer).render(conversation, (), generate=True)
        except RowError as error:
            raise UserError(f"this conversation: {error}") from error

    def _options(self, sampling: Sampling) -> dict[str, Any]:
        return {**sampling.options(), "pad_token_id": self.tokenizer.pad_token_id}


def chat(generator: Generator, sampling: Sampling, system: str | None) -> None:
    """A conversation in the terminal: answers are streamed and the history is kept. Ctrl-D or /exit ends it."""
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    say("Ask away. /new forgets the conversation, /exit or Ctrl-D ends it.", style="dim")
    while (question := _ask()) is not None:
        if question == "/new":
            history = list(opening)
        elif question:
            history.append({"role": "user", "content": question})
            answer = generator.stream(history, sampling, write_now)
            write_now("\n")
            history.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line == "/exit" else line


def write_now(text: str) -> None:
    """Text to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def read_prompts(path: str) -> list[Messages]:
    """Conversations from a file: plain text, one prompt a line, or JSON lines with `prompt` or `messages`.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: can't be read: {error}") from error
    conversations = [_conversation(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise UserError(f"--prompts {path}: there is no prompt in it.")
    return conversations


def _conversation(path: str, number: int, line: str) -> Messages:
    if not path.endswith((".jsonl", ".json")):
        return [{"role": "user", "content": line}]
    try:
        row = json.loads(line)
        return row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--prompts {path}, line {number}: a JSON object with prompt or messages is wanted ({error})."
        ) from error


def write_answers(conversations: Sequence[Messages], answers: Iterator[str], path: Path) -> None:
    """JSON lines of messages, the answer the last of them."""
    with path.open("x", encoding="utf-8") as file:
        for conversation, answer in zip(conversations, answers, strict=True):
            messages = [*conversation, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


class _Streamer:
    """Decodes tokens as they come, holding back what may still change (half a character, half a word)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        from transformers import TextStreamer

        outer = self
        self.text = ""

        class Pieces(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                outer.text += text
                write(text)

        self._streamer = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.put, self.end = self._streamer.put, self._streamer.end


def _auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
