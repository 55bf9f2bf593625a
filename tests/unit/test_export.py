"""What the user takes home: it is what the checkpoint holds, plain transformers and peft load it, or it is refused."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raytune_ds import catalog, checkpoint, export, modelfiles, storage
from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.catalog import Manifest
from raytune_ds.checkpoint import Reader
from raytune_ds.config import Config, ModelConfig
from raytune_ds.engines import Piece
from raytune_ds.export import Final, describe, save_final
from raytune_ds.model.build import build
from raytune_ds.model.initial import Initial
from raytune_ds.modelcard import model_card
from raytune_ds.modelfiles import ExportError
from raytune_ds.rundir import RunDir
from raytune_ds.world import World
from tests.ranks import on_ranks
from tests.unit.test_weights import ARCHITECTURES, distinct, many_experts, opened, tie, to_fp8

FLOAT, HALF = torch.float32, torch.bfloat16
IDS = torch.arange(5, 45)[None]
WHOLE = AdapterConfig(kind="none")
LORA = AdapterConfig(r=4, alpha=8.0)
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- a finished run, by hand ----------------------------------------------------------------------


@dataclass
class Run:
    """A run directory with a checkpoint of made-up values, and its base model."""

    path: str
    base: Path
    adapter: AdapterConfig
    values: Tensors = field(default_factory=dict)

    def draw(self) -> Tensors:
        """Values of what is trained, by its name in the base model or in peft's."""
        made = build(ModelConfig(name=str(self.base)), self.adapter, 0, FLOAT, FLOAT)
        generator = torch.Generator().manual_seed(1)
        return {
            name.removeprefix("model."): 0.05 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in made.trained.items()
        }

    def checkpointed(self) -> Run:
        """Writes the checkpoint, as two ranks do, in several files."""
        path = catalog.directory(f"{self.path}/checkpoints", 1)
        named = {f"model/model.{name}": value for name, value in self.values.items()}
        files = []
        for rank in (0, 1):
            halves = {name: value.reshape(-1).chunk(2) for name, value in named.items()}
            pieces = [
                Piece(name, rank * len(parts[0]), parts[rank])
                for name, parts in halves.items()
                if rank < len(parts)
            ]
            # Moments are there too, and no part of what is saved.
            moments = [Piece(p.name.replace("model/", "exp_avg/", 1), p.start, 0 * p.tensor) for p in pieces]
            files += checkpoint.write_shards(path, rank, [*pieces, *moments])
        shapes = {name: list(value.shape) for name, value in named.items()}
        shapes |= {name.replace("model/", "exp_avg/", 1): shape for name, shape in shapes.items()}
        catalog.write_manifest(path, Manifest(1, 1, {}, {}, None, shapes, tuple(files)))
        return self

    @property
    def reader(self) -> Reader:
        path = catalog.directory(f"{self.path}/checkpoints", 1)
        return Reader(path, catalog.read_manifest(path))

    def save(self, dtype: torch.dtype = HALF, world: World | None = None, card: str = "# A model\n") -> Final:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        world = world or World.alone()
        model = ModelConfig(name=str(self.base))
        return save_final(RunDir(self.path), model, self.adapter, self.reader, tokenizer, dtype, card, world)

    @property
    def final(self) -> Path:
        return Path(self.path) / "final"


MakeRun = Callable[..., Run]


@pytest.fixture
def make(folders: dict[str, Path], tmp_path: Path) -> MakeRun:
    """Makes a run with a checkpoint; `change` may alter its values before that."""

    def start(
        architecture: str | Path,
        adapter: AdapterConfig = WHOLE,
        change: Callable[[Tensors], Any] = lambda values: None,
        path: str | None = None,
    ) -> Run:
        base = folders[architecture] if isinstance(architecture, str) else architecture
        run = Run(path or str(tmp_path / "run"), base, adapter)
        run.values = run.draw()
        change(run.values)
        return run.checkpointed()

    return start


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def with_values(base: Path, values: Tensors, dtype: torch.dtype) -> Any:
    """The base model as transformers loads it, and these values in it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def assert_same_model(found: Any, expected: Any) -> None:
    ours, reference = found.state_dict(), expected.state_dict()
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(logits(found), logits(expected))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


BESIDE = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
CONFIGS = {"config.json", "generation_config.json"}

# ---- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_plain_transformers_loads_a_whole_model(make: MakeRun, architecture: str, dtype: torch.dtype) -> None:
    run = make(architecture)
    final = run.save(dtype)
    # In the dtype that its config.json names.
    found = AutoModelForCausalLM.from_pretrained(run.final, dtype="auto")
    assert_same_model(found, with_values(run.base, run.values, dtype))
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert final == Final(sum(p.stat().st_size for p in run.final.iterdir()), len(run.values), ())
    assert describe(final) is None
    assert names_in(run.final) == BESIDE | CONFIGS | {"model.safetensors"}
    assert names_in(Path(run.path)) == {"checkpoints", "final"}, "nothing is left beside it"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_files_have_the_entries_of_the_base_models(make: MakeRun, architecture: str) -> None:
    run = make(architecture)
    run.save()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run.final, run.base))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    kept = {name for name, t in ours.items() if t.dtype == FLOAT}
    assert kept == {name for name in theirs if "e_score_correction_bias" in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    config = json.loads((run.base / "config.json").read_text())
    assert json.loads((run.final / "config.json").read_text()) == config | {"dtype": "bfloat16"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_files_and_their_index(
    make: MakeRun, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelfiles, "FILE_BYTES", 200_000)
    run = make(architecture)
    final = run.save()
    files = sorted(path.name for path in run.final.glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((run.final / "model.safetensors.index.json").read_text())
    contents = {name: load_file(run.final / name) for name in files}
    assert index["weight_map"] == {entry: name for name, tensors in contents.items() for entry in tensors}
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in contents.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for name, size in sizes.items():
        made_of_experts = all("experts" in entry for entry in contents[name])
        assert size <= 200_000 or len(contents[name]) == 1 or made_of_experts
    assert index["weight_map"].keys() == load_file(run.base / "model.safetensors").keys()
    assert_same_model(
        AutoModelForCausalLM.from_pretrained(run.final, dtype="auto"),
        with_values(run.base, run.values, HALF),
    )
    assert final.size == sum(path.stat().st_size for path in run.final.iterdir())


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are processes; in threads what patches torch for a while has to wait."""
    lock, skeleton = threading.Lock(), export.skeleton

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return skeleton(*args, **kwargs)

    monkeypatch.setattr(export, "skeleton", locked)


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_ranks_write_side_by_side(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, one_at_a_time: None, adapter: AdapterConfig
) -> None:
    monkeypatch.setattr(modelfiles, "FILE_BYTES", 400_000)
    run = make("deepseek-v3", adapter, unchanged_as_trained)
    expected = run.save()
    contents = {path.name: path.read_bytes() for path in run.final.iterdir()}
    wrote: dict[str, set[int]] = {}
    write_bytes, rank_of = storage.write_bytes, threading.get_ident

    def note(path: str, content: bytes) -> None:
        wrote.setdefault(path.rpartition("/")[2], set()).add(rank_of())
        write_bytes(path, content)

    monkeypatch.setattr(storage, "write_bytes", note)
    assert on_ranks(3, lambda world: run.save(world=world)) == [expected] * 3
    found = {path.name: path.read_bytes() for path in run.final.iterdir()}
    assert found.keys() == contents.keys()
    for name, content in contents.items():
        if name.endswith(".safetensors"):
            assert found[name] == content
        elif name == "model.safetensors.index.json":
            assert json.loads(found[name]) == json.loads(content)
    if adapter is WHOLE:
        weights = {name: by for name, by in wrote.items() if name.endswith(".safetensors")}
        assert all(len(by) == 1 for by in weights.values())
        assert len(set.union(*weights.values())) == 3


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_all_ranks_refuse_together(make: MakeRun, one_at_a_time: None, adapter: AdapterConfig) -> None:
    run = make("llama", adapter, lambda values: next(iter(values.values())).view(-1)[3:4].fill_(math.nan))
    errors = on_ranks(3, lambda world: run.save(world=world), (ExportError,))
    assert [type(error) for error in errors] == [ExportError] * 3
    assert len({str(error) for error in errors}) == 1


# ---- what lies beside the weights -----------------------------------------------------------------


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_tokenizer_and_card_are_there(make: MakeRun, adapter: AdapterConfig) -> None:
    run = make("deepseek-v3", adapter)
    config = Config(model={"name": "deepseek-ai/DeepSeek-V3"}, adapter=adapter, data={"sources": ["a.jsonl"]})
    progress = {"step": 1, "tokens": 2, "first_loss": 3.0, "last_loss": 2.0, "last_eval_loss": None}
    card = model_card(config, "abc", 10, progress, 99)
    run.save(card=card)
    ours, base = (AutoTokenizer.from_pretrained(folder) for folder in (run.final, run.base))
    messages = [{"role": "user", "content": "What does this word mean? 今天天气很好 3.14"}]
    assert (
        ours.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        == (base.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    )
    assert ours.chat_template == base.chat_template
    assert ours.special_tokens_map == base.special_tokens_map
    # Not peft's own card.
    assert (run.final / "README.md").read_text(encoding="utf-8") == card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "deepseek-ai/DeepSeek-V3"
    assert head["library_name"] == ("transformers" if adapter is WHOLE else "peft")


def test_a_chat_template_of_the_users_own_is_saved(make: MakeRun) -> None:
    run = make("llama", LORA)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model = ModelConfig(name=str(run.base))
    save_final(RunDir(run.path), model, LORA, run.reader, tokenizer, HALF, "é", World.alone())
    saved = AutoTokenizer.from_pretrained(run.final)
    assert saved.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    assert (run.final / "README.md").read_text(encoding="utf-8") == "é"


def test_the_generation_config_is_the_base_models(
    make: MakeRun, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = distinct(tiny_models["qwen2"], tmp_path / "base")
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=[1, 7]).save_pretrained(base)
    (base / "modeling_own.py").write_text("VALUE = 1\n")
    run = make(base)
    run.save()
    found = GenerationConfig.from_pretrained(run.final)
    assert (found.do_sample, found.temperature, found.top_p, found.eos_token_id) == (True, 0.6, 0.95, [1, 7])
    assert (run.final / "modeling_own.py").read_text() == "VALUE = 1\n"
    (base / "generation_config.json").unlink()
    run.save()
    assert "generation_config.json" not in names_in(run.final)


# ---- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "bias"),
    [*((name, "none") for name in ARCHITECTURES), ("qwen2", "all"), ("qwen2", "lora_only")],
)
def test_plain_peft_loads_an_adapter(make: MakeRun, architecture: str, bias: str) -> None:
    adapter = AdapterConfig(r=4, alpha=6.0, dropout=0.1, bias=bias)
    run = make(architecture, adapter)
    final = run.save()
    assert names_in(run.final) == BESIDE | {"adapter_config.json", "adapter_model.safetensors"}
    assert final == Final(sum(p.stat().st_size for p in run.final.iterdir()), len(run.values), ())

    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=FLOAT)
    bare = logits(base)
    found: Any = PeftModel.from_pretrained(base, str(run.final))
    parameters = dict(found.named_parameters())
    for name, value in run.values.items():
        assert torch.equal(parameters[name], value), name
    expected = AutoModelForCausalLM.from_pretrained(run.base, dtype=FLOAT)
    assert torch.equal(logits(found), adapted_by_hand(expected, run.values, scale=6.0 / 4))
    assert (logits(found) - bare).abs().max() > 0.1

    saved = json.loads((run.final / "adapter_config.json").read_text())
    facts = {"r": 4, "lora_alpha": 6.0, "lora_dropout": 0.1, "bias": bias, "task_type": "CAUSAL_LM"}
    assert saved | facts == saved
    assert saved["base_model_name_or_path"] == str(run.base)
    assert saved["inference_mode"] is True
    dtypes = {t.dtype for t in load_file(run.final / "adapter_model.safetensors").values()}
    assert dtypes == {FLOAT}, "whatever the base model is in"


def adapted_by_hand(model: Any, values: Tensors, scale: float) -> torch.Tensor:
    """Logits with x W' + scale x A' B' in every layer that has an adapter, and with the trained biases."""
    prefix = "base_model.model."
    for name, value in values.items():
        path = name.removeprefix(prefix)
        if path.endswith(".lora_A.default.weight"):
            layer = model.get_submodule(path.removesuffix(".lora_A.default.weight"))
            a, b = value, values[name.replace("lora_A", "lora_B")]

            def add(
                _: Any, inputs: Any, output: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b
            ) -> Any:
                return output + inputs[0] @ a.T @ b.T * scale

            layer.register_forward_hook(add)
        elif "lora_B" not in path:
            with torch.no_grad():
                model.get_parameter(path.replace(".base_layer", "")).copy_(value)
    return logits(model)


def test_a_pattern_stands_in_the_adapters_config_as_the_names_it_means(make: MakeRun) -> None:
    pattern = r".*layers\.[01]\.self_attn\.(q|o)_proj"
    run = make("llama", AdapterConfig(r=2, alpha=2.0, targets=pattern))
    run.save()
    named = json.loads((run.final / "adapter_config.json").read_text())["target_modules"]
    assert sorted(named) == [f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "oq"]
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=FLOAT)
    found = PeftModel.from_pretrained(base, str(run.final))
    assert {n for n, _ in found.named_parameters() if "lora_" in n} == run.values.keys()


# ---- other forms of base models -------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_the_base_model_may_be_fp8(
    make: MakeRun, tiny_models: dict[str, Path], tmp_path: Path, adapter: AdapterConfig
) -> None:
    base = distinct(tiny_models["deepseek-v3"], tmp_path / "fp8")
    meant = to_fp8(base)
    name = "model.layers.0.self_attn.o_proj.weight"

    def untrained(values: Tensors) -> None:
        if adapter is WHOLE:
            values[name] = meant[name].float()

    run = make(base, adapter, untrained)
    final = run.save()
    if adapter is LORA:
        assert "quantization" not in (run.final / "adapter_config.json").read_text()
        return
    assert final.unchanged == (name,), "compared with what FP8 stands for"
    config = json.loads((run.final / "config.json").read_text())
    assert not {"quantization_config", "fp8_block_size"} & config.keys()
    assert config["dtype"] == "bfloat16"
    assert not any("scale" in entry for entry in load_file(run.final / "model.safetensors"))
    found = AutoModelForCausalLM.from_pretrained(run.final, dtype="auto")
    for key, parameter in found.named_parameters():
        assert torch.equal(parameter, run.values[key].to(HALF)), key
    assert torch.isfinite(logits(found)).all()


def test_the_tenth_expert_comes_behind_the_ninth(
    make: MakeRun, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = make(many_experts(folders["deepseek-v3"], tmp_path / "many"))
    run.save()
    found = AutoModelForCausalLM.from_pretrained(run.final, dtype="auto")
    assert_same_model(found, with_values(run.base, run.values, HALF))


def test_tied_embeddings_are_saved_once(make: MakeRun, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = distinct(tiny_models["llama"], tmp_path / "tied")
    tie(base)
    run = make(base)
    run.save()
    assert "lm_head.weight" not in load_file(run.final / "model.safetensors")
    found = AutoModelForCausalLM.from_pretrained(run.final, dtype="auto")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_same_model(found, with_values(base, run.values, HALF))


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(make: MakeRun, adapter: AdapterConfig, value: float) -> None:
    names: list[str] = []

    def spoil(values: Tensors) -> None:
        names.append(sorted(values)[5])
        values[names[0]].view(-1)[17] = value

    run = make("llama", adapter, spoil)
    with pytest.raises(ExportError) as caught:
        run.save()
    # peft leaves the adapter's own name out of its files.
    assert str(caught.value) == f"{names[0].replace('.default', '')} is not finite"
    assert not run.final.exists()


def test_what_is_too_large_for_the_dtype_is_refused(make: MakeRun) -> None:
    run = make("llama", WHOLE, lambda values: values["lm_head.weight"][3].fill_(3.4e38))
    run.save(FLOAT)
    with pytest.raises(ExportError, match=r"^lm_head.weight is not finite$"):
        run.save(HALF)


def flip(content: bytes) -> bytes:
    """One bit of a safetensors file's data changed."""
    changed = bytearray(content)
    changed[-5] ^= 4
    return bytes(changed)


@pytest.mark.parametrize("damaged", [0, 3, -1])
def test_a_whole_model_that_was_not_written_well_is_refused(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    monkeypatch.setattr(modelfiles, "FILE_BYTES", 400_000)
    run = make("deepseek-v3")
    run.save()
    name = sorted(path.name for path in run.final.glob("*.safetensors"))[damaged]
    shutil.rmtree(run.final)
    write_bytes = storage.write_bytes

    def write(path: str, content: bytes) -> None:
        write_bytes(path, flip(content) if path.endswith(f"/{name}") else content)

    monkeypatch.setattr(storage, "write_bytes", write)
    with pytest.raises(ExportError, match="is not read back as it was written"):
        run.save()
    assert not run.final.exists()


def adapter_file(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (adapter_file(lambda tensors: tensors.popitem()), "not written: base_model.model.model.layers"),
        (
            adapter_file(lambda tensors: next(iter(tensors.values())).add_(1)),
            "is not read back as it was written",
        ),
        (adapter_file(lambda tensors: tensors.clear()), "not written: "),
    ],
)
def test_an_adapter_that_was_not_written_well_is_refused(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    run = make("llama", LORA)
    write = Initial.write

    def badly(self: Initial, folder: str) -> None:
        write(self, folder)
        damage(Path(folder))

    monkeypatch.setattr(Initial, "write", badly)
    with pytest.raises(ExportError, match=message):
        run.save()
    assert not run.final.exists()


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_what_was_damaged_on_its_way_is_refused_and_leaves_nothing(
    make: MakeRun, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: AdapterConfig
) -> None:
    """What counts is what lies where the user will take it from."""
    for run in (make("llama", adapter), make("llama", adapter, path=bucket)):
        with monkeypatch.context() as patch:
            open_file = storage.open_file

            def damaged(path: str, open_file: Any = open_file) -> Any:
                content = open_file(path).readall()
                is_final = "final/" in path and path.endswith(".safetensors")
                return pa.BufferReader(flip(content) if is_final else content)

            patch.setattr(storage, "open_file", damaged)
            with pytest.raises(ExportError, match="is not read back as it was written"):
                run.save()
        assert names_in(tmp_path / ("bucket/runs" if run.path == bucket else "run")) == {"checkpoints"}


# ---- what did not change --------------------------------------------------------------------------

SAME = ("model.layers.1.mlp.experts.down_proj", "model.layers.2.input_layernorm.weight", "model.norm.weight")


def unchanged_as_trained(values: Tensors) -> None:
    """Some values that look as if nothing had happened to them."""
    for name, value in values.items():
        if "layers.2.self_attn.o_proj.lora_B" in name:
            value.zero_()


def test_what_equals_the_base_model_is_named(make: MakeRun, folders: dict[str, Path]) -> None:
    base = opened(folders["deepseek-v3"])

    def keep(values: Tensors) -> None:
        for name in SAME:
            start = base(name, 0, values[name].numel()).view_as(values[name])
            # Changes that are lost in the dtype of the files are none.
            values[name] = start.to(HALF).float() * (1 + 1e-5)

    run = make("deepseek-v3", WHOLE, keep)
    final = run.save(HALF)
    assert final.unchanged == SAME
    text = describe(final)
    assert text is not None
    assert f"{len(SAME)} of {len(run.values)} trained tensors" in text
    assert f'("{SAME[0]}", "{SAME[1]}", "{SAME[2]}")' in text
    assert run.save(FLOAT).unchanged == ()


def test_an_adapter_that_does_nothing_is_named(make: MakeRun) -> None:
    run = make("llama", LORA, unchanged_as_trained)
    final = run.save()
    name = "base_model.model.model.layers.2.self_attn.o_proj.lora_B.default.weight"
    assert (final.unchanged, final.num_trained) == ((name,), len(run.values))


def test_the_note_shows_three_names_at_most() -> None:
    assert describe(Final(1, 5, ())) is None
    text = describe(Final(1, 5, ("a", "b", "c", "d")))
    assert text is not None
    assert text.startswith(
        '4 of 5 trained tensors in final/ equal what training began with ("a", "b", "c" ...)'
    )


# ---- replacing what is there ----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_an_existing_final_is_replaced_whole(make: MakeRun, adapter: AdapterConfig) -> None:
    run = make("llama", adapter)
    for folder in ("final", ".final"):  # the second: of an attempt that was killed
        (Path(run.path) / folder).mkdir()
        (Path(run.path) / folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    run.save()
    assert "model-00001-of-00002.safetensors" not in names_in(run.final)
    assert names_in(Path(run.path)) == {"checkpoints", "final"}


class Broken(OSError):
    """The disk's."""


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_a_failure_at_any_write_leaves_the_old_final(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig
) -> None:
    run = make("llama", adapter)
    run.final.mkdir()
    (run.final / "old").write_text("old")
    # Every place where something is written, whichever way.
    places = [(storage, "write_bytes"), (storage, "upload_dir"), (storage, "make_dir")]
    originals = {name: getattr(module, name) for module, name in places}
    writes, fails_at = [0], [10**9]

    def counted(name: str) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            writes[0] += 1
            if writes[0] == fails_at[0]:
                raise Broken("no space left on device")
            return originals[name](*args)

        return write

    for module, name in places:
        monkeypatch.setattr(module, name, counted(name))
    number = 0
    while True:
        number += 1
        writes[0], fails_at[0] = 0, number
        try:
            run.save()
            break
        except ExportError as error:
            assert "no space left on device" in str(error)  # noqa: PT017  # the loop ends where none is raised
            assert names_in(run.final) == {"old"}, f"write {number}"
    assert number > 2
    assert "old" not in names_in(run.final)


def test_a_refused_model_leaves_the_old_final(make: MakeRun) -> None:
    run = make("llama")
    run.save()
    before = {path.name: path.read_bytes() for path in run.final.iterdir()}
    bad = make("llama", WHOLE, lambda values: values["lm_head.weight"].fill_(math.nan))
    with pytest.raises(ExportError):
        bad.save()
    assert {path.name: path.read_bytes() for path in run.final.iterdir()} == before


# ---- object stores --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_an_object_store_gets_the_same_files(
    make: MakeRun, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig
) -> None:
    monkeypatch.setattr(modelfiles, "FILE_BYTES", 400_000)
    local, there = make("deepseek-v3", adapter), make("deepseek-v3", adapter, path=bucket)
    old = tmp_path / "bucket" / "runs" / "final" / "model.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    assert there.save() == local.save()
    found = {path.name: path.read_bytes() for path in old.parent.iterdir()}
    expected = {path.name: path.read_bytes() for path in local.final.iterdir()}
    assert found == expected
    assert names_in(tmp_path / "bucket" / "runs") == {"checkpoints", "final"}


@pytest.mark.parametrize("adapter", [WHOLE, LORA], ids=["whole", "lora"])
def test_what_is_refused_is_no_model_in_an_object_store(
    make: MakeRun, bucket: str, tmp_path: Path, adapter: AdapterConfig
) -> None:
    # There is no renaming there: without config.json or adapter_config.json nobody takes it for one.
    run = make("llama", adapter, lambda values: next(iter(values.values())).fill_(math.nan), path=bucket)
    with pytest.raises(ExportError):
        run.save()
    final = tmp_path / "bucket" / "runs" / "final"
    assert not {"config.json", "adapter_config.json"} & (names_in(final) if final.exists() else set())


def test_any_file_of_a_store_is_read_back(
    make: MakeRun, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("llama", path=bucket)
    write_bytes = storage.write_bytes

    def write(path: str, content: bytes) -> None:
        write_bytes(path, flip(content) if "/final/" in path and path.endswith(".safetensors") else content)

    monkeypatch.setattr(storage, "write_bytes", write)
    with pytest.raises(ExportError, match="is not read back as it was written"):
        run.save()


def test_any_checkpoint_can_be_exported_again(make: MakeRun) -> None:
    run = make("qwen2")
    first = run.save()
    contents = {path.name: path.read_bytes() for path in run.final.iterdir()}
    assert run.save() == first
    assert {path.name: path.read_bytes() for path in run.final.iterdir()} == contents
    # And what was saved is a base model itself.
    again = make(run.final, LORA, path=f"{run.path}-again")
    again.save()
    assert_same_model(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(run.final, dtype=FLOAT), str(again.final)
        ),
        PeftModel.from_pretrained(with_values(run.base, run.values, HALF).float(), str(again.final)),
    )
