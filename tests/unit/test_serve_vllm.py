"""What Ray Serve is told of a run, and which adapters are refused; neither Ray nor vLLM is started."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import IA3Config, LoraConfig, PeftConfig

from raytune_ds import cli, storage
from raytune_ds.errors import UserError
from raytune_ds.servable import LIMITS, refusals
from raytune_ds.serving import vllm
from raytune_ds.serving.address import TOKEN
from raytune_ds.serving.vllm import Wanted, served_names, settings
from raytune_ds.verbs import serve as verb
from tests.unit.test_generate import as_run

PLAIN: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"]}
BASE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"


def saved(folder: Path, config: PeftConfig) -> dict[str, Any]:
    """What peft writes of a config."""
    config.save_pretrained(folder)
    return dict(json.loads((folder / "adapter_config.json").read_text()))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (LoraConfig(**PLAIN), None),
        (LoraConfig(**PLAIN, use_rslora=True, r=512), None),
        (LoraConfig(**PLAIN, use_dora=True), "DoRA"),
        (LoraConfig(**PLAIN, modules_to_save=["lm_head"]), "modules_to_save"),
        (LoraConfig(**PLAIN, bias="lora_only"), "biases"),
        (LoraConfig(**PLAIN, lora_bias=True), "biases"),
        (LoraConfig(**PLAIN, r=513), "rank above 512"),
        (LoraConfig(**PLAIN, rank_pattern={"q_proj": 4}), "rank_pattern"),
        (LoraConfig(**PLAIN, alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (LoraConfig(**PLAIN, target_parameters=["mlp.experts.down_proj"]), "experts"),
        (LoraConfig(**PLAIN, trainable_token_indices=[5]), "tokens"),
        (LoraConfig(**PLAIN, layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
        (IA3Config(**PLAIN, feedforward_modules=[]), "another kind"),
    ],
)
def test_what_vllm_can_not_serve_is_refused_with_its_reason(
    tmp_path: Path, config: PeftConfig, word: str | None
) -> None:
    reasons = refusals(saved(tmp_path, config))
    assert len(reasons) == (0 if word is None else 1)
    if word is not None:
        assert word in reasons[0]


def test_every_limit_says_where_it_is_known_from() -> None:
    assert all("vllm" in limit.source for limit in LIMITS)


@pytest.fixture
def run(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run in a bucket, by its URI."""
    monkeypatch.setattr(vllm, "BUCKETS", ("mem://",))
    final = tmp_path / "bucket" / "runs" / "law" / "final"
    saved(final, LoraConfig(**PLAIN, r=24, base_model_name_or_path=BASE))
    (final / "chat_template.jinja").write_text("{{ trained }}")
    return f"{bucket}/law"


def test_an_adapter_is_multiplexed_on_its_base(run: str) -> None:
    wanted = Wanted("law", f"{run}/final", 2048, 32)
    made = settings(wanted)
    assert made["model_loading_config"] == {"model_id": "law", "model_source": BASE}
    assert made["lora_config"] == {"dynamic_lora_loading_path": run, "max_num_adapters_per_replica": 1}
    assert made["engine_kwargs"] == {
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 32,
        "chat_template": "{{ trained }}",
    }
    assert served_names(wanted) == ["law:final", "law"]


def test_a_merged_model_is_served_as_it_is(tmp_path: Path) -> None:
    wanted = Wanted("law", str(tmp_path), None, 8, trust_remote_code=True)
    assert settings(wanted) == {
        "model_loading_config": {"model_id": "law", "model_source": str(tmp_path)},
        "engine_kwargs": {"max_num_seqs": 8, "trust_remote_code": True},
    }
    assert served_names(wanted) == ["law"]


def test_a_local_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, LoraConfig(**PLAIN, r=8, base_model_name_or_path=BASE))
    with pytest.raises(UserError, match="export --run DIR --to merged"):
        settings(Wanted("law", str(tmp_path), None, 8))
    with pytest.raises(UserError, match="a colon"):
        settings(Wanted("law:1", str(tmp_path), None, 8))


def test_an_adapter_of_a_quantised_base_is_refused_and_its_merged_model_is_not(
    run: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"held in nf4.*\n.*export --run DIR --to merged"):
        settings(Wanted("law", f"{run}/final", None, 8, quantization="nf4"))
    assert settings(Wanted("law", str(tmp_path), None, 8, quantization="nf4"))["model_loading_config"]


def test_the_template_is_found_in_either_file(tmp_path: Path) -> None:
    assert vllm.chat_template(str(tmp_path)) is None
    storage.write_json(f"{tmp_path}/tokenizer_config.json", {"chat_template": "in the config"})
    assert vllm.chat_template(str(tmp_path)) == "in the config"
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert vllm.chat_template(str(tmp_path)) == "of its own"


def test_the_verb_refuses_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "adapter"
    saved(final, LoraConfig(**PLAIN, use_dora=True, base_model_name_or_path=BASE))
    folder = as_run(tmp_path / "law", BASE, final)
    command = ["serve", "--engine", "vllm", "--run"]
    assert cli.main([*command, str(folder)]) == 2
    assert "DoRA" in capsys.readouterr().err
    assert cli.main([*command, str(folder), "--host", "0.0.0.0"]) == 2
    assert "loopback only" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("fastapi", "vllm") else find(name, *a)
    )
    assert cli.main(["serve", "--run", str(folder)]) == 2
    assert "raytune_ds[serve]" in capsys.readouterr().err


# ---- which engine ---------------------------------------------------------------------------------


class Started(NamedTuple):
    """What a verb has started: by which engine, and with what."""

    engine: str
    given: Any


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """On a machine with a GPU and vLLM, on which nothing really starts."""
    found: list[Started] = []
    monkeypatch.setattr(verb, "_has_vllm", lambda: True)
    monkeypatch.setattr(
        verb, "_by_transformers", lambda arguments: found.append(Started("transformers", arguments))
    )
    monkeypatch.setattr(
        "raytune_ds.serving.rayserve.serve", lambda *given: found.append(Started("vllm", given))
    )
    monkeypatch.delenv(TOKEN, raising=False)
    return found


@pytest.fixture
def remote(bucket: str, run: str, tmp_path: Path) -> str:
    """A run in a bucket that vLLM can serve."""
    config = {"model": {"name": BASE, "trust_remote_code": False}}
    (tmp_path / "bucket" / "runs" / "law" / "config.json").write_text(json.dumps(config))
    return run


def quantise(folder: Path) -> None:
    """A run that held its base model in 4 bits."""
    values = json.loads((folder / "config.json").read_text())
    values["model"]["quantization"] = "nf4"
    (folder / "config.json").write_text(json.dumps(values))


def words(text: str) -> str:
    return " ".join(text.split())


def test_auto_takes_vllm_for_what_it_can_serve(remote: str, started: list[Started]) -> None:
    assert cli.main(["serve", "--run", remote]) == 0
    (one,) = started
    assert one.engine == "vllm"
    assert one.given[1:] == (["law:final", "law"], "127.0.0.1", 8000)


@pytest.mark.parametrize(("adapter", "more", "reason"), [
    ({}, [], "this one is a local folder"),
    ({"use_dora": True}, [], "it has DoRA"),
    ({}, ["--host", "0.0.0.0"], "on loopback only"),
    ({}, ["--max-waiting", "3"], "--max-waiting 3: has no effect on vLLM"),
])  # fmt: skip
def test_auto_falls_back_to_transformers_and_says_why(
    tmp_path: Path,
    started: list[Started],
    capsys: pytest.CaptureFixture[str],
    adapter: dict[str, Any],
    more: list[str],
    reason: str,
) -> None:
    saved(tmp_path / "adapter", LoraConfig(**PLAIN, **adapter, base_model_name_or_path=BASE))
    folder = as_run(tmp_path / "law", BASE, tmp_path / "adapter")
    assert cli.main(["serve", "--run", str(folder), *more]) == 0
    assert [one.engine for one in started] == ["transformers"]
    said = capsys.readouterr().out
    assert reason in words(said)
    assert said.startswith("served by transformers, not vLLM: ")
    assert len(said.splitlines()) == 1
    assert cli.main(["serve", "--run", str(folder), *more, "--engine", "vllm"]) == 2
    assert reason in words(capsys.readouterr().err)
    assert len(started) == 1


def test_vllm_does_not_start_with_a_token_that_it_would_not_ask_for(
    remote: str, started: list[Started], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, "s3cret")
    assert cli.main(["serve", "--run", remote, "--engine", "vllm"]) == 2
    said = words(capsys.readouterr().err)
    assert f"{TOKEN} is set, and Ray Serve asks nobody for a token; it listens on loopback only" in said
    assert "s3cret" not in said
    assert started == []
    assert cli.main(["serve", "--run", remote]) == 0
    assert [one.engine for one in started] == ["transformers"]


@pytest.mark.parametrize("named", ["--run", "--model"])
def test_vllm_does_not_put_an_adapter_on_another_base_than_it_was_trained_on(
    remote: str, tmp_path: Path, started: list[Started], capsys: pytest.CaptureFixture[str], named: str
) -> None:
    quantise(tmp_path / "bucket" / "runs" / "law")
    place = remote if named == "--run" else f"{remote}/final"
    assert cli.main(["serve", named, place, "--engine", "vllm"]) == 2
    assert "held in nf4, and vLLM would put it on the unquantised one" in words(capsys.readouterr().err)
    assert started == []
