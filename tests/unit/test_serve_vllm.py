"""What Ray Serve is told of a run, and which adapters are refused; neither Ray nor vLLM is started."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftConfig

from raytune_ds import cli, storage
from raytune_ds.errors import UserError
from raytune_ds.servable import LIMITS, refusals
from raytune_ds.serving import vllm
from raytune_ds.serving.vllm import Wanted, served_names, settings
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
    assert "no finished run" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("fastapi", "vllm") else find(name, *a)
    )
    assert cli.main(["serve", "--run", str(folder)]) == 2
    assert "raytune_ds[serve]" in capsys.readouterr().err
