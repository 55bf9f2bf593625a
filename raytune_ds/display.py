"""A run as it goes on, for people: what the workers report, line by line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from raytune_ds.console import ProgressLine, human_count, say, warn

# One step's rate jumps about: a partial batch is slow.
RATE_STEPS = 20


class Display:
    """Shows the events of a run, and lets it go on."""

    judges = False

    def __init__(self) -> None:
        """Says nothing until something happens."""
        self._progress: ProgressLine | None = None
        self._rate: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS)

    def __enter__(self) -> Display:
        say("starting the workers ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def begins(self, stop: Callable[[], None]) -> None:
        """See fitting.Watcher."""

    def goes_on(self, step: int) -> bool:
        """See fitting.Watcher."""
        return True

    def show(self, kind: str, content: dict[str, Any]) -> None:
        """One event: its kind and content as the worker reported them."""
        getattr(self, f"_show_{kind}")(content)

    def _show_arrived(self, content: dict[str, Any]) -> None:
        """Nothing: there is more to tell once they train."""

    def _show_start(self, content: dict[str, Any]) -> None:
        self._close()
        first, total = content["step"] + 1, content["total_steps"]
        if first <= total:
            say(f"training steps {first} to {total}")
            self._progress = ProgressLine("training", total)
            self._progress.__enter__()
            self._progress.update(content["step"], "")
        else:
            say(f"all {total} steps are done already")

    def _show_step(self, content: dict[str, Any]) -> None:
        self._rate.append((content["tokens"], content["step_time_s"]))
        if self._progress:
            tokens, seconds = map(sum, zip(*self._rate, strict=True))
            detail = (
                f"step {content['step']}  loss {content['loss']:.4f}  lr {content['lr']:.2e}  "
                f"{human_count(tokens / seconds)} tokens/s"
            )
            self._progress.update(content["step"], detail)

    def _show_eval(self, content: dict[str, Any]) -> None:
        say(f"step {content['step']}: held-out loss {content['eval_loss']:.4f}")

    def _show_checkpoint(self, content: dict[str, Any]) -> None:
        """Nothing: that checkpoints are written is what people expect."""

    def _show_checkpoint_wait(self, content: dict[str, Any]) -> None:
        """Nothing, either: a long one comes with a note."""

    def _show_note(self, content: dict[str, Any]) -> None:
        say(content["text"])

    def _show_warning(self, content: dict[str, Any]) -> None:
        warn(content["text"])

    def _show_restart(self, content: dict[str, Any]) -> None:
        warn(content["text"])

    def _close(self) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)
            self._progress = None


def shares_of_time(progress: dict[str, Any]) -> str:
    """What a run did but compute, in shares of all the time that its workers trained."""
    spent = {name: progress.get(name, 0.0) for name in ("checkpoint_wait_s", "eval_s", "log_s")}
    whole = progress["seconds"] + sum(spent.values())
    names = {
        "data_wait_s": "waiting for data",
        "eval_s": "evaluations",
        "checkpoint_wait_s": "checkpoints",
        "log_s": "metrics",
    }
    return ", ".join(
        f"{name} {100 * progress.get(key, 0.0) / max(whole, 1e-9):.1f} %" for key, name in names.items()
    )
