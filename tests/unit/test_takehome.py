"""An export is complete and compared, or it is not there."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_ds import cli, gguf, storage, takehome
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.evaluation.card import section, update
from raytune_ds.evaluation.comparison import Metric
from raytune_ds.evaluation.intervals import Estimate
from raytune_ds.evaluation.results import Measured
from raytune_ds.logits import closeness_of
from raytune_ds.merge import Merged
from raytune_ds.modelfiles import ExportError
from raytune_ds.origin import Origin, of_run
from raytune_ds.takehome import Request, deliver
from tests.unit.test_merge import EXPERTS, MLA, in_bfloat16, lora, make_adapter

FLOAT, HALF = torch.float32, torch.bfloat16
PLAIN = lora(["q_proj", "v_proj"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A base model that a test may change, with all that may lie beside the weights."""
    folder = shutil.copytree(folders["llama"], tmp_path / "base")
    (folder / "LICENSE").write_text("MIT")
    GenerationConfig(do_sample=True, temperature=0.6).save_pretrained(folder)
    return folder


@pytest.fixture
def origin(base: Path, tmp_path: Path) -> Origin:
    adapter = make_adapter(base, PLAIN, tmp_path / "adapter")
    return Origin(adapter, ModelConfig(name=str(base)), facts=(("run", "my-run"), ("seed", "17")))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    match = re.match(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


# ---- what is written ------------------------------------------------------------------------------


def test_a_merged_model_has_all_that_a_model_has(origin: Origin, tmp_path: Path, capsys: Any) -> None:
    (origin.folder / "README.md").write_text("---\nlibrary_name: peft\ntags: [a, lora]\n---\n\n# my-run\n")
    target = tmp_path / "out" / "merged"
    deliver(origin, Request("merged", target))
    assert names_in(target) == {
        *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    assert names_in(target.parent) == {"merged"}
    assert GenerationConfig.from_pretrained(target).temperature == 0.6
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (target, origin.folder))
    assert ours.chat_template == theirs.chat_template
    head, text = card_of(target)
    assert (head["library_name"], head["tags"]) == ("transformers", ["a"])
    assert "# my-run" in text
    assert "| seed | 17 |" in text
    assert "| merged | layer by layer by peft, in float32, rounded once to float32 |" in text
    assert re.search(
        r"\| compared with the adapter \| a built-in text: on \d+ tokens in float32: logits differ", text
    )
    said = capsys.readouterr().out
    assert "merged 8 of" in said
    assert "the likeliest token is the same for 100.0 %" in said


def test_without_comparison_the_card_says_so(origin: Origin, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(takehome, "load_tuned", None)
    deliver(origin, Request("merged", tmp_path / "out", compare=False))
    assert "| compared with the adapter | no |" in card_of(tmp_path / "out")[1]


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_the_evaluation_in_the_runs_card_goes_along(origin: Origin, tmp_path: Path, to: str) -> None:
    figure = Metric("exact", Estimate(0.5, 0.4, 0.6, 80))
    measured = [Measured("tickets", "held-out", "/data", "f1ng3r", (figure,), {}, "nothing is forgotten")]
    (origin.folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# my-run\n")
    update(str(origin.folder / "README.md"), "my-run", measured)
    deliver(origin, Request(to, tmp_path / "out", compare=False))
    head, text = card_of(tmp_path / "out")
    assert section(measured) in text
    assert text.count("## Evaluation") == 1
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "exact", "value": 0.5, "name": "exact"}


def test_the_kind_of_an_adapter_is_no_tag_of_a_merged_model(base: Path, tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapter = make_adapter(base, config, tmp_path / "adapter")
    (adapter / "README.md").write_text("---\ntags: [raytune_ds, sft, ia3]\n---\n\n# my-run\n")
    origin = Origin(adapter, ModelConfig(name=str(base)))
    for to, tags in (("adapter", ["raytune_ds", "sft", "ia3"]), ("merged", ["raytune_ds", "sft"])):
        deliver(origin, Request(to, tmp_path / "out" / to, compare=False))
        assert card_of(tmp_path / "out" / to)[0]["tags"] == tags


def test_an_adapter_is_taken_as_it_is(origin: Origin, tmp_path: Path) -> None:
    deliver(origin, Request("adapter", tmp_path / "out"))
    for name in names_in(origin.folder) - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (origin.folder / name).read_bytes()
    assert names_in(tmp_path / "out") == names_in(origin.folder) | {"LICENSE"}
    assert card_of(tmp_path / "out")[0]["library_name"] == "peft"


def test_a_run_of_all_parameters(base: Path, tmp_path: Path) -> None:
    whole = Origin(base, None)
    with pytest.raises(UserError, match="trained all parameters"):
        deliver(whole, Request("adapter", tmp_path / "out"))
    deliver(whole, Request("merged", tmp_path / "out"))
    assert all((tmp_path / "out" / n).read_bytes() == (base / n).read_bytes() for n in names_in(base))


def test_a_run_of_all_parameters_has_the_licence_of_what_it_began_with(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders["llama"], run / "final")
    (run / "config.json").write_text(json.dumps({"model": {"name": str(base)}, "run": {"seed": 0}}))
    assert cli.main(["export", "--run", str(run), "--to", "merged"]) == 0
    assert (run / "exports" / "merged" / "LICENSE").read_text() == "MIT"


def test_a_licence_that_can_not_be_fetched_is_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import huggingface_hub

    asked = []

    def unreachable(name: str, **how: Any) -> str:
        asked.append((name, how["revision"], how["local_files_only"]))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    whole = Origin(folders["llama"], None, "c0ffee", began_with=ModelConfig(name="org/base"))
    deliver(whole, Request("merged", tmp_path / "out"))
    assert asked == [("org/base", "c0ffee", False), ("org/base", "c0ffee", True)]
    assert "the licence of org/base can't be fetched" in " ".join(capsys.readouterr().err.split())


# ---- for llama.cpp --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["deepseek-v2", "deepseek-v3", "qwen2"])
def test_what_llama_cpp_wants(
    architecture: str, folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    folder = in_bfloat16(folders[architecture], tmp_path / "base")
    values = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "modeling_x.py").write_text("X = 1\n")
    (folder / "merges.txt").write_text("a b\n")
    targets = {"deepseek-v3": MLA}.get(architecture, ["q_proj"])
    adapter = make_adapter(folder, lora(targets), tmp_path / "adapter")
    deliver(Origin(adapter, ModelConfig(name=str(folder))), Request("gguf-ready", tmp_path / "out"))
    assert names_in(tmp_path / "out") == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "merges.txt"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == AutoTokenizer.from_pretrained(folder).chat_template
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    entries = load_file(tmp_path / "out" / "model.safetensors")
    assert entries.keys() == load_file(folder / "model.safetensors").keys()
    if architecture != "qwen2":
        assert "model.layers.1.mlp.experts.7.up_proj.weight" in entries, "an entry an expert, as published"
    assert (
        f"convert_hf_to_gguf.py {tmp_path}/out --outfile out.gguf --outtype bf16" in capsys.readouterr().out
    )


def test_rows_without_a_token_are_named(base: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=FLOAT)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    model.save_pretrained(base)
    deliver(Origin(base, None), Request("gguf-ready", tmp_path / "out"))
    assert f"3 of {rows + 3} rows of the embedding have no token" in (said := capsys.readouterr().out)
    assert f"[PAD{rows}] to [PAD{rows + 2}]" in said


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"no rows for: .*<one-more>"):
        deliver(Origin(base, None), Request("gguf-ready", tmp_path / "out"))
    assert names_in(tmp_path) == {"base"}


def test_an_architecture_that_llama_cpp_does_not_know(
    origin: Origin, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gguf, "ARCHITECTURES", ("DeepseekV3ForCausalLM",))
    with pytest.raises(UserError, match="does not convert LlamaForCausalLM; it does DeepseekV3ForCausalLM"):
        deliver(origin, Request("gguf-ready", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # Nor is a large model copied first.
    monkeypatch.setattr(takehome, "_copy", None)
    with pytest.raises(UserError, match="does not convert LlamaForCausalLM"):
        deliver(
            Origin(Path(str(origin.base and origin.base.name)), None), Request("gguf-ready", tmp_path / "out")
        )


# ---- what is refused leaves nothing ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "experts"])
@pytest.mark.parametrize("wrong", [0.0, 0.5, 2.0])
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: Any, kind: str, wrong: float
) -> None:
    """The merge at another scale than that of the adapter."""
    folder = in_bfloat16(folders["deepseek-v3"], tmp_path / "base")
    config = lora(MLA) if kind == "linear" else lora(["o_proj"], target_parameters=EXPERTS)
    adapter = make_adapter(folder, config, tmp_path / "adapter")
    before = names_in(tmp_path)
    value = Merged._value

    def scaled(self: Merged, name: str) -> torch.Tensor:
        base_value = self._base(name).float()
        return (
            base_value + wrong * (value(self, name).float() - base_value)
            if name in self.merged
            else value(self, name)
        )

    monkeypatch.setattr(Merged, "_value", scaled)
    with pytest.raises(UserError, match="does not answer as the base model with the adapter does") as caught:
        deliver(Origin(adapter, ModelConfig(name=str(folder))), Request("merged", tmp_path / "out"))
    assert "Nothing is left of it." in str(caught.value)
    assert names_in(tmp_path) == before


def test_what_is_damaged_on_its_way_to_the_disk_is_refused(
    origin: Origin, tmp_path: Path, monkeypatch: Any
) -> None:
    write_bytes = storage.write_bytes
    monkeypatch.setattr(
        storage,
        "write_bytes",
        lambda path, content: write_bytes(path, content[:-1] + bytes([content[-1] ^ 1])),
    )
    before = names_in(tmp_path)
    with pytest.raises(UserError, match="is not read back as it was written"):
        deliver(origin, Request("merged", tmp_path / "out", compare=False))
    assert names_in(tmp_path) == before


def test_a_full_disk_leaves_nothing_and_is_named(origin: Origin, tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: str, content: bytes) -> None:
        Path(path).write_bytes(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    before = names_in(tmp_path)
    with pytest.raises(UserError, match=r"the disk is full\. Make room there"):
        deliver(origin, Request("merged", tmp_path / "out"))
    assert names_in(tmp_path) == before


def test_too_little_room_is_noticed_before_anything_is_written(
    origin: Origin, tmp_path: Path, monkeypatch: Any
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(takehome.shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    monkeypatch.setattr(storage, "write_bytes", None)
    with pytest.raises(UserError, match=r"GB are needed, and 0\.0 GB are free"):
        deliver(origin, Request("merged", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_touched(origin: Origin, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        deliver(origin, Request("merged", target))
    assert names_in(target) == {"mine"}
    (target / "mine").unlink()
    deliver(origin, Request("adapter", target))
    assert "adapter_model.safetensors" in names_in(target), "an empty folder is fine"


# ---- how near is near -----------------------------------------------------------------------------


def test_closeness() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(50, 200, generator=generator)
    effect = torch.randn(50, 200, generator=generator)

    def closeness(
        noise: float, base: float, has_experts: bool = False, spoilt: int = 0, files: Any = HALF
    ) -> Any:
        found = expected + noise * torch.randn(50, 200, generator=generator)
        found[:spoilt] += 1.0 * torch.randn(spoilt, 200, generator=generator)
        return closeness_of(found, expected, expected + base * effect, files, FLOAT, has_experts)

    assert closeness(0.02, 0.5).is_good
    assert not closeness(0.08, 0.5).is_good, "more than rounding explains"
    assert not closeness(0.02, 0.03).is_good, "more than half of what the adapter does is lost"
    assert closeness(0.005, 0.0).is_good, "an adapter that does nothing"
    assert not closeness(0.02, 0.5, files=FLOAT).is_good
    assert not closeness(0.01, 0.5, spoilt=3).is_good
    assert closeness(0.01, 0.5, has_experts=True, spoilt=3).is_good, "sent to other experts"
    assert not closeness(0.01, 0.5, has_experts=True, spoilt=15).is_good
    found = closeness(0.02, 0.5)
    assert found.difference == pytest.approx(0.02, rel=0.1)
    assert found.effect == pytest.approx(0.5, rel=0.1)
    assert 0.9 < found.same <= 1
    nan = closeness_of(expected * float("nan"), expected, expected, HALF, FLOAT, has_experts=True)
    assert not nan.is_good


# ---- the command line -----------------------------------------------------------------------------


@pytest.fixture
def finished(origin: Origin, base: Path, tmp_path: Path) -> Path:
    """A run directory as it is left, as far as an export looks at it."""
    run = tmp_path / "runs" / "my-run"
    shutil.copytree(origin.folder, run / "final")
    config = {"model": {"name": str(base), "trust_remote_code": False}, "run": {"seed": 3}}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_the_verb(finished: Path, tmp_path: Path) -> None:
    assert cli.main(["export", "--run", str(finished), "--to", "merged"]) == 0
    _, text = card_of(finished / "exports" / "merged")
    assert "| run | my-run |" in text
    assert "| seed | 3 |" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (["--run", "nowhere", "--to", "merged"], "no run directory"),
    (["--run", "{run}"], "--to is missing"),
    (["--run", "{run}", "--to", "merged", "--output", "s3://bucket/x"], "are written to this machine"),
    (["--run", "s3://bucket/run", "--to", "merged"], "say --output DIR"),
    (["--run", "{run}", "--to", "merged", "--weights", "1"], "are of --merge-adapters"),
    (["--run", "{run}", "--to", "merged", "--push", "me/it"], "needs a token"),
    (["--run", "{run}", "--to", "merged", "--push", "it"], "say whose it is"),
    (["--run", "{run}", "--to", "merged", "--push", "no such/name"], "is no name of a repository"),
    (["--merge-adapters", "{run}", "--to", "merged", "--output", "x"], "two adapters or more"),
    (["--merge-adapters", "{run}", "{run}", "--to", "merged"], "--output is missing"),
    (["--merge-adapters", "{run}", "{run}", "--to", "merged", "--output", "x", "--combination", "sum"], "choose one"),
])  # fmt: skip
def test_mistakes_are_named(
    finished: Path, arguments: list[str], message: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = set(finished.rglob("*"))
    assert cli.main(["export", *(word.format(run=finished) for word in arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert set(finished.rglob("*")) == before


def test_a_run_that_has_not_finished(finished: Path, capsys: Any) -> None:
    shutil.rmtree(finished / "final")
    assert cli.main(["export", "--run", str(finished), "--to", "merged"]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_a_run_somewhere_else_is_copied_here(finished: Path, bucket: str, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "bucket" / "runs" / "my-run")
    with of_run(f"{bucket}/my-run") as origin:
        deliver(origin, Request("merged", tmp_path / "out"))
        copy = origin.folder
    assert not copy.exists()
    assert "model.safetensors" in names_in(tmp_path / "out")


def test_a_run_that_added_tokens(base: Path, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", json.loads((base / "config.json").read_text())["vocab_size"] + 2
    config = lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    make_adapter(base, config, run / "final", rows)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<dose>", "<unit>"])
    tokenizer.save_pretrained(run / "final")
    values = {"model": {"name": str(base), "add_tokens": ["<dose>", "<unit>"]}, "run": {"seed": 0}}
    (run / "config.json").write_text(json.dumps(values))
    assert cli.main(["export", "--run", str(run), "--to", "gguf-ready"]) == 0
    merged = run / "exports" / "gguf-ready"
    made = json.loads((merged / "config.json").read_text())
    assert made["vocab_size"] == rows
    assert "grown_from" not in made
    expected = load_file(run / "final" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(load_file(merged / "model.safetensors")["lm_head.weight"], expected)


# ---- the hub --------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub, and notes what it is asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str) -> None:
        Hub.calls = [("token", {"is": token})]

    def create_repo(self, repo: str, **how: Any) -> Any:
        Hub.calls.append(("create", {"repo": repo, **how}))
        return namedtuple("Url", "repo_id")(repo)

    def upload_folder(self, **how: Any) -> None:
        there = names_in(Path(how["folder_path"]))
        Hub.calls.append(("upload", {**how, "names": there}))


def test_a_push(finished: Path, monkeypatch: Any, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ["export", "--run", str(finished), "--to", "adapter", "--push", "org/name", "--private"]
    assert cli.main(words) == 0
    target = finished / "exports" / "adapter"
    assert Hub.calls[0] == ("token", {"is": "hf_secret"})
    assert Hub.calls[1] == (
        "create",
        {"repo": "org/name", "repo_type": "model", "private": True, "exist_ok": True},
    )
    name, upload = Hub.calls[2]
    assert (name, upload["repo_id"], Path(upload["folder_path"])) == ("upload", "org/name", target)
    assert upload["names"] >= {"adapter_model.safetensors", "README.md"}
    assert not any("hf_secret" in file.read_text(errors="ignore") for file in target.iterdir())


def test_a_push_that_is_refused_leaves_the_export(finished: Path, monkeypatch: Any, capsys: Any) -> None:
    import huggingface_hub

    class Refuses(Hub):
        def create_repo(self, repo: str, **how: Any) -> Any:
            raise OSError("403 Forbidden: no right to write.\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refuses)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.main(["export", "--run", str(finished), "--to", "adapter", "--push", "org/name"]) == 2
    said = capsys.readouterr().err
    assert "403 Forbidden" in said
    assert "hf upload org/name" in said
    assert (finished / "exports" / "adapter").is_dir()


def test_checks_for_llama_cpp_are_real(base: Path, tmp_path: Path) -> None:
    """Each of them alone, on a directory that passes."""
    deliver(Origin(base, None), Request("gguf-ready", tmp_path / "out"))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]

    def refusal(**how: Any) -> str:
        with pytest.raises(ExportError) as caught:
            gguf.check(
                **{"folder": tmp_path / "out", "rows": rows, "dtypes": {FLOAT}, "has_template": True} | how
            )
        return str(caught.value)

    assert gguf.check(tmp_path / "out", rows, {FLOAT}, has_template=True) == []
    assert "config.json says" in refusal(rows=rows + 1)
    assert "does not read weights in torch.float8" in refusal(dtypes={torch.float8_e4m3fn})
    (tmp_path / "out" / "modeling_x.py").write_text("")
    assert "code of its own" in refusal()
    (tmp_path / "out" / "modeling_x.py").unlink()
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "gone.json")
    assert "no tokenizer.json" in refusal()
    (tmp_path / "gone.json").rename(tmp_path / "out" / "tokenizer.json")
    kept = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    del kept["chat_template"]
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(kept))
    assert "holds no chat template" in refusal()


def test_an_adapter_that_is_not_finite_is_refused(origin: Origin, tmp_path: Path) -> None:
    file = origin.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    for kind in ("adapter", "merged"):
        with pytest.raises(UserError):
            deliver(origin, Request(kind, tmp_path / "out"))
        assert names_in(tmp_path) == {"base", "adapter"}
