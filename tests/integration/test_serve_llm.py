"""What Ray Serve is told of a run, against Ray's own config classes; vLLM itself is not needed for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ds.serving.vllm import BUCKETS, Wanted, served_names, settings


@pytest.mark.parametrize("bucket", BUCKETS)
def test_ray_takes_the_settings_of_an_adapter(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.llm._internal.common.utils.lora_utils import get_base_model_id, get_lora_id
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    from raytune_ds import storage

    adapter = {"peft_type": "LORA", "r": 16, "base_model_name_or_path": "org/base"}
    files = {f"{bucket}place/law/final/adapter_config.json": adapter}
    monkeypatch.setattr(storage, "read_json", files.get)
    monkeypatch.setattr(storage, "exists", files.__contains__)
    wanted = Wanted("law", f"{bucket}place/law/final", 4096, 32)
    config = LLMConfig(**settings(wanted))
    assert config.model_id == "law"
    assert config.max_request_context_length == 4096
    tuned, base = served_names(wanted)
    assert get_base_model_id(tuned) == base == config.model_id
    # Where Ray looks for the adapter that a request names.
    assert f"{config.lora_config.dynamic_lora_loading_path}/{get_lora_id(tuned)}" == wanted.folder
    assert config.engine_kwargs["max_lora_rank"] >= adapter["r"]


def test_ray_takes_the_settings_of_a_model(tmp_path: Path) -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = LLMConfig(**settings(Wanted("law", str(tmp_path), None, 8)))
    assert config.model_loading_config.model_source == str(tmp_path)
    assert config.lora_config is None
