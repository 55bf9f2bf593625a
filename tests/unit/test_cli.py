"""The command lines: quick answers without torch or Ray, exit codes, errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytune_ds import cli, train
from raytune_ds.command import guarded
from raytune_ds.errors import UserError

HEAVY = ("torch", "ray", "transformers", "numpy", "pyarrow", "datasets", "peft")
QUICK = {
    "help": ["--help"],
    "print-config": ["--print-config", "adapter.r=16"],
    "config-error": ["adapter.rank=3", "train.learning_rate=-1"],
}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", QUICK.values(), ids=QUICK)
def test_answers_without_heavy_imports(arguments: list[str]) -> None:
    """Not even numpy: the answer is there before anything slow could be imported."""
    code = (
        "import sys\nfrom raytune_ds import train\n"
        f"try: train.main({arguments!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    assert _python(code).stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", QUICK.values(), ids=QUICK)
def test_answers_within_a_second(arguments: list[str]) -> None:
    """The best of five, because the machine may be busy with something else."""

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "raytune_ds.train", *arguments], capture_output=True, check=False
        )
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 1.0


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """With its default."""
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for key in ("adapter.r", "data.seq_len", "train.learning_rate", "scaling.num_workers", "checkpoint.keep"):
        assert key in text
    assert "2048" in text


def test_print_config_is_the_resolved_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Files left to right, then overrides."""
    (tmp_path / "a.yaml").write_text("adapter: {r: 4, alpha: 8}\n")
    (tmp_path / "b.yaml").write_text("adapter: {r: 32}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert train.main(["--print-config", *files, "run.seed=7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["adapter"]["r"], printed["adapter"]["alpha"], printed["run"]["seed"]) == (32, 8.0, 7)


def test_all_config_errors_at_once_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, without a traceback."""
    assert train.main(["adapter.rank=3", "train.learning_rate=-1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean adapter.r?" in captured.err
    assert "train.learning_rate" in captured.err
    assert "Traceback" not in captured.err


def test_debug_lets_the_error_through() -> None:
    """For whoever wants the traceback."""
    with pytest.raises(UserError):
        train.main(["--debug", "adapter.rank=3"])


def test_what_is_not_the_users_fault_is_not_hidden() -> None:
    """A crash stays a crash."""

    def crash() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(crash, debug=False)


def test_a_full_disk_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever library met it: the words of the system are in all their messages."""

    def fill() -> int:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert guarded(fill, debug=False) == 1
    assert "Make room under run.storage" in capsys.readouterr().err


def test_train_as_a_verb_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """`raytune-ds train` is `python -m raytune_ds.train`."""
    assert cli.main(["train", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "tiny:deepseek-v3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "--run", "nowhere"], "no run directory"),
        (["generate", "--run", "nowhere", "--prompt", "x"], "no run directory"),
        (["generate", "--run", "nowhere", "--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_verbs_say_what_is_wrong(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2 and a line."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_prompts_from_files(tmp_path: Path) -> None:
    """A prompt a line, or JSON lines with prompt or messages; a bad line is named."""
    from raytune_ds.prompts import read_prompts

    plain, rows, bad = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "bad.jsonl"
    plain.write_text("one\n\ntwo\n")
    rows.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    bad.write_text('{"prompt": "one"}\n{"question": "two"}\n')
    expected = [[{"role": "user", "content": text}] for text in ("one", "two")]
    assert read_prompts(str(plain)) == read_prompts(str(rows)) == expected
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        read_prompts(str(bad))
