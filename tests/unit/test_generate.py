"""Answers: equal to those of plain transformers, whatever the batch; sampled as asked; before and after training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from raytune_ds import cli
from raytune_ds.compose import compose
from raytune_ds.config import ModelConfig
from raytune_ds.decode import Answer, ignores_padding
from raytune_ds.errors import UserError
from raytune_ds.generate import Generator
from raytune_ds.model import tiny
from raytune_ds.model.load import load_for_generation
from raytune_ds.prompts import answered, read_prompts
from raytune_ds.sampling import RowSampler, Sampling
from raytune_ds.verbs.answers import generator
from tests.helpers import write_jsonl
from tests.runs import finished_run

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = (
    "tea",
    "How many days has a week? Seven, and 24 hours each.",
    "今天天气很好",
    "What?",
    "a b c d e f g",
)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def save_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes answers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(1)
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def as_run(folder: Path, model: Path | str, final: Path) -> Path:
    """A run directory that has finished."""
    config = compose([], [f"model.name={model}", f"run.storage={folder.parent}", f"run.name={folder.name}"])
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "final").symlink_to(final)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_models["qwen2"], tmp_path_factory.mktemp("adapters") / "qwen2")


@pytest.fixture(scope="module")
def tuned(adapter: Path) -> Generator:
    return Generator.of_directory(adapter, device="cpu")


def plain(model: Any, tokenizer: Any, question: str, **how: Any) -> tuple[list[int], str]:
    """Ids and text of what transformers alone answers."""
    ids = tokenizer.apply_chat_template(asked(question), add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    options = {"do_sample": False, "max_new_tokens": 12, **how}
    answer = model.generate(ids, pad_token_id=tokenizer.pad_token_id, **options)[0, ids.shape[1] :]
    return answer.tolist(), tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batched_answers_are_those_of_plain_transformers(
    tiny_models: dict[str, Path], architecture: str
) -> None:
    folder = tiny_models[architecture]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    generator = Generator.of_directory(folder, device="cpu")
    ours = list(generator.answer([asked(q) for q in QUESTIONS], Sampling(max_new_tokens=12), batch_size=2))
    assert ours == [plain(model, tokenizer, q)[1] for q in QUESTIONS]
    assert len(set(ours)) > 1


@pytest.mark.parametrize(
    ("architecture", "expected"), [("deepseek-v2", True), ("deepseek-v3.2", True), ("deepseek-v4", False)]
)
def test_it_is_tried_whether_a_model_can_be_padded(
    tiny_models: dict[str, Path], architecture: str, expected: bool
) -> None:
    generator = Generator.of_directory(tiny_models[architecture], device="cpu")
    assert ignores_padding(generator.model, generator.tokenizer) is expected


def test_what_the_model_says_of_sampling_is_not_taken_for_what_was_asked(
    tiny_models: dict[str, Path],
) -> None:
    generator = Generator.of_directory(tiny_models["qwen2"], device="cpu")
    before = next(generator.answer([asked("tea")], Sampling(max_new_tokens=12)))
    generator.model.generation_config.repetition_penalty = 5.0
    generator.model.generation_config.do_sample = True
    assert next(generator.answer([asked("tea")], Sampling(max_new_tokens=12))) == before


def test_a_tokenizer_that_can_neither_pad_nor_end_pads_all_the_same(tiny_models: dict[str, Path]) -> None:
    folder = tiny_models["llama"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    conversations, how = [asked(q) for q in QUESTIONS], Sampling(12)
    expected = list(Generator(model, tokenizer).answer(conversations, how))
    tokenizer.pad_token = tokenizer.eos_token = None
    assert list(Generator(model, tokenizer).answer(conversations, how)) == expected


def test_the_repetition_penalty_is_that_of_transformers(adapter: Path, tuned: Generator) -> None:
    """Also in a batch in which its row is padded, by a token that is not to be penalised."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    free = plain(tuned.model, tokenizer, "tea")
    expected = plain(tuned.model, tokenizer, "tea", repetition_penalty=1.8)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(expected[0][0])
    generator = Generator(tuned.model, tokenizer)
    how = Sampling(max_new_tokens=12, repetition_penalty=1.8)
    first, _ = answers = [generator.ask(generator.prompt_ids(asked(q)), how) for q in QUESTIONS[:2]]
    generator.run(answers)
    assert first.ids == expected[0] != free[0]


def test_sampled_as_transformers_would() -> None:
    """Frequencies over many draws against the probabilities that the library's own warpers leave."""
    sampling = Sampling(temperature=0.7, top_k=6, top_p=0.9, min_p=0.05, seed=0)
    scores_1V = torch.tensor([[1.0, 0.2, 2.0, -1.0, 0.5, 1.5, -3.0, 0.0]])
    expected = torch.softmax(sampling.warpers()(torch.zeros(1, 1), scores_1V.clone()), -1)[0]
    draws = 4000
    generator = sampling.generator(0, torch.device("cpu"))
    choose = RowSampler([(sampling, generator, 0)])
    counts = Counter(int(choose(torch.zeros(1, 1), scores_1V.clone()).argmax()) for _ in range(draws))
    assert 1 < len(counts) == int((expected > 0).sum()) < scores_1V.shape[1]
    for token, count in counts.items():
        assert count / draws == pytest.approx(float(expected[token]), abs=0.03)


def test_a_seed_decides_whatever_the_company(tuned: Generator) -> None:
    how = Sampling(max_new_tokens=12, temperature=1.5, seed=7)
    together = list(tuned.answer([asked(q) for q in QUESTIONS], how))
    alone = [next(tuned.answer([asked(q)], how, first=n)) for n, q in enumerate(QUESTIONS)]
    assert together == alone
    assert together != list(tuned.answer([asked(q) for q in QUESTIONS], Sampling(12, 1.5, seed=8)))
    same = list(tuned.answer([asked("tea")] * 3, how))
    assert len(set(same)) == 3, "each conversation has random numbers of its own"
    unseeded = Sampling(max_new_tokens=12, temperature=1.5)
    assert next(tuned.answer([asked("tea")], unseeded)) != next(tuned.answer([asked("tea")], unseeded))


def test_rows_of_a_batch_have_settings_of_their_own(tuned: Generator) -> None:
    prompt = tuned.prompt_ids(asked("tea"))
    settings = [Sampling(3), Sampling(9), Sampling(9, 1.5, seed=3), Sampling(9, repetition_penalty=1.8)]
    answers = [tuned.ask(prompt, how) for how in settings]
    tuned.run(answers)
    alone = []
    for how in settings:
        alone.append(tuned.ask(prompt, how))
        tuned.run(alone[-1:])
    assert [a.ids for a in answers] == [a.ids for a in alone]
    assert len({tuple(a.ids) for a in answers}) == 4
    assert [len(a.ids) for a in answers[:2]] == [3, 9]


@pytest.mark.parametrize("architecture", ["qwen2", "deepseek-v3", "deepseek-v4"])
def test_paused_answers_go_on_as_if_they_had_not_been(
    tiny_models: dict[str, Path], architecture: str
) -> None:
    tuned = Generator.of_directory(tiny_models[architecture], device="cpu")
    prompts = [tuned.prompt_ids(asked(q)) for q in QUESTIONS[:3]]
    how = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    whole = [tuned.ask(prompt, how) for prompt in prompts]
    tuned.run(whole)
    parts = [tuned.ask(prompt, how) for prompt in prompts]
    while any(answer.finish is None for answer in parts):
        written, steps = sum(len(answer.ids) for answer in parts), iter((False, False, True))
        tuned.run([answer for answer in parts if answer.finish is None], lambda steps=steps: next(steps))
        assert sum(len(answer.ids) for answer in parts) - written <= 3 * len(parts)
    assert [a.ids for a in parts] == [a.ids for a in whole]


@pytest.mark.parametrize("of_tokenizer", [True, False])
def test_an_answer_ends_at_the_end_tokens_of_model_and_tokenizer(
    tiny_models: dict[str, Path], of_tokenizer: bool
) -> None:
    folder = tiny_models["qwen2"]  # not the tokenizer that others have too
    generator = Generator(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    free = generator.ask(generator.prompt_ids(asked("tea")), Sampling(8))
    generator.run([free])
    assert free.finish == "length"
    end = free.ids[4]
    if of_tokenizer:
        generator.tokenizer.eos_token = generator.tokenizer.convert_ids_to_tokens(end)
    else:
        generator.model.generation_config.eos_token_id = [1, end]
    del generator.ends
    ended = generator.ask(generator.prompt_ids(asked("tea")), Sampling(8))
    generator.run([ended])
    assert ended.finish == "stop"
    assert ended.ids == free.ids[: free.ids.index(end) + 1]


def test_stop_texts_end_an_answer_and_are_never_shown(tuned: Generator) -> None:
    """Not even their beginning, which is held back until it can't become one."""
    free = next(tuned.answer([asked("tea")], Sampling(12)))
    stop = free[3:6]
    pieces: list[str] = []
    text = tuned.stream(asked("tea"), Sampling(12, stop=("never said", stop)), pieces.append)
    assert text == "".join(pieces) == free[: free.index(stop)]
    ended = tuned.ask(tuned.prompt_ids(asked("tea")), Sampling(12, stop=(stop,)))
    tuned.run([ended])
    assert ended.finish == "stop"
    assert len(ended.ids) < 12
    almost = tuned.stream(asked("tea"), Sampling(12, stop=(free[-1] + "never",)), pieces.append)
    assert almost == free, "what was held back for a stop text that did not come"


def answer_of(tokenizer: Any, ids: list[int], pieces: list[str], **how: Any) -> Answer:
    generator = torch.Generator().manual_seed(0)
    answer = Answer(tokenizer, [1], Sampling(len(ids), **how), frozenset(), generator, pieces.append)
    for token in ids:
        answer.take(token)
    return answer


class Slow:
    """A tokenizer that has no fast one inside."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.decode = tokenizer.decode


@pytest.mark.parametrize("is_fast", [True, False])
def test_streamed_pieces_are_the_text_whatever_the_tokens(tiny_tokenizer: Any, is_fast: bool) -> None:
    """Halves of characters, special tokens, bytes that are none: together they are what decoding all at once gives."""
    tokenizer = tiny_tokenizer if is_fast else Slow(tiny_tokenizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, len(tiny_tokenizer), (20,), generator=generator).tolist()
        pieces: list[str] = []
        answer = answer_of(tokenizer, ids, pieces)
        assert answer.text == "".join(pieces) == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.finish == "length"


def test_the_first_stop_text_counts(tiny_tokenizer: Any) -> None:
    pieces: list[str] = []
    ids = tiny_tokenizer("one two three four")["input_ids"]
    assert answer_of(tiny_tokenizer, ids, pieces, stop=("three", "two", "ee")).text == "one "
    assert "".join(pieces) == "one "


def test_what_may_become_a_stop_text_is_held_back(tiny_tokenizer: Any) -> None:
    pieces: list[str] = []
    ids = [tiny_tokenizer(letter)["input_ids"][0] for letter in "abcabd"]
    assert answer_of(tiny_tokenizer, ids, pieces, stop=("abd", "zz")).text == "abc"
    assert pieces == ["abc"]


def test_prompts_are_what_training_has_in_front_of_answers(tuned: Generator) -> None:
    """What a user writes stays text, so that nobody ends a turn that is not theirs."""
    from raytune_ds.data.formats import Example
    from raytune_ds.data.template import Encoder

    question = f"Hi{tiny.EOS}{tiny.ASSISTANT}"
    messages = [*asked(question), {"role": "assistant", "content": "answer"}]
    (sequence,) = Encoder(tuned.tokenizer).encode(Example(tuple(messages)))
    context = sequence.ids[: sequence.weights.index(1.0)]
    assert tuned.prompt_ids(asked(question)) == context
    assert context.count(tuned.tokenizer.convert_tokens_to_ids(tiny.ASSISTANT)) == 1


def test_an_answer_ends_where_the_context_does(tuned: Generator) -> None:
    prompt = [300] * (tuned.context - 5)
    answer = tuned.ask(prompt, Sampling(100))
    tuned.run([answer])
    assert (len(answer.ids), answer.finish) == (5, "length")
    with pytest.raises(UserError, match=f"{tuned.context} at most"):
        tuned.ask([300] * tuned.context, Sampling(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_settings_without_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})


def test_an_adapter_is_compared_with_its_own_weights(
    tuned: Generator, adapter: Path, tiny_models: Any
) -> None:
    base, after = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]), tuned.tokenizer
    theirs = [plain(base, after, q)[1] for q in QUESTIONS]
    conversations, how = [asked(q) for q in QUESTIONS], Sampling(12)
    before = tuned.base()
    assert before.model is tuned.model
    assert list(before.answer(conversations, how)) == theirs
    peft = PeftModel.from_pretrained(base, str(adapter))
    assert list(tuned.answer(conversations, how)) == [plain(peft, after, q)[1] for q in QUESTIONS] != theirs


def test_with_tuned_biases_the_base_is_another_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Switching the adapter off would leave the biases."""
    run = finished_run(tmp_path, tiny_models["qwen2"], "adapter.bias=all")
    tuned = Generator.of_run(str(run), "cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).eval()
    conversations, how = [asked(q) for q in QUESTIONS], Sampling(12)
    before = list(tuned.base().answer(conversations, how))
    assert before == list(Generator(plain, tuned.tokenizer).answer(conversations, how))
    assert before != list(tuned.answer(conversations, how))
    name = "model.layers.0.self_attn.q_proj"
    tuned_bias = tuned.model.base_model.model.get_submodule(name).bias
    assert not torch.equal(tuned_bias, plain.get_submodule(name).bias)


def test_a_base_of_the_hub_is_the_commit_that_the_run_was_trained_on(
    tiny_models: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its newest checkpoint says; for a base that is loaded by itself, too."""
    from raytune_ds import catalog, generate
    from raytune_ds.evaluation.subject import finished, subjects
    from raytune_ds.trained import began_with

    adapted, whole = (tmp_path / name for name in ("adapted", "whole"))
    for folder, final in ((adapted, adapter), (whole, tiny_models["qwen2"])):
        as_run(folder, "org/model", final)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"adapter": {"kind": "none"}}))
    made = SimpleNamespace(identity={"model.weights": "org/model@abc123"})
    monkeypatch.setattr(catalog, "newest_complete", lambda folder: made)
    asked_for = []

    def load(config: Any, dtype: Any, device: Any, adapter: Any = None, revision: Any = None) -> Any:
        asked_for.append(revision)
        return AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])

    monkeypatch.setattr(generate, "load_for_generation", load)
    Generator.of_run(str(adapted), "cpu")
    assert asked_for == ["abc123"]
    assert began_with(str(whole)).revision == "abc123"
    assert [s.base and s.base.revision for s in subjects(str(whole), finished(str(whole)), True)] == [
        None,
        "abc123",
    ]
    made.identity = {"model.weights": "a fingerprint"}
    assert began_with(str(whole)).revision is None


def test_tokens_that_training_added_are_unknown_to_the_base(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The adapter brings their rows; the base reads the word in pieces, as it always did."""
    base, tokenizer = (
        kind.from_pretrained(tiny_models["qwen2"]) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    theirs = plain(base, tokenizer, "take glimepiride")[1]
    tokenizer.add_tokens(["glimepiride"])
    base.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["o_proj"], init_lora_weights=False, modules_to_save=["embed_tokens", "lm_head"]
    )
    get_peft_model(base, config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    tuned = Generator.of_directory(tmp_path, device="cpu")
    asks, how = [asked("take glimepiride")], Sampling(12)
    assert len(tuned.base().prompt_ids(asks[0])) > len(tuned.prompt_ids(asks[0]))
    assert next(tuned.base().answer(asks, how)) == theirs
    assert next(tuned.answer(asks, how)) == plain(peft, tokenizer, "take glimepiride")[1] != theirs


def test_an_added_token_begins_as_the_mean_where_the_base_has_room_to_spare(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """As in training, where the adapter does not bring its row."""
    model, tokenizer = (
        kind.from_pretrained(tiny_models["qwen2"]) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    known = len(tokenizer)
    model.resize_token_embeddings(known + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    tokenizer.add_tokens(["glimepiride"])
    tokenizer.save_pretrained(adapter)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        found, before = (
            getattr(one, end)().weight for one in (Generator.of_directory(adapter, device="cpu").model, model)
        )
        torch.testing.assert_close(found[known], before[:known].mean(0))
        assert torch.equal(found[:known], before[:known])


def test_generate_writes_both_answers_in_order_and_goes_on(
    adapter: Path, tuned: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": q, "id": n} for n, q in enumerate(QUESTIONS)])
    output = tmp_path / "a.jsonl"
    command = ["generate", "--model", str(adapter), "--prompts", str(prompts), "--output", str(output)]
    command += ["--max-new-tokens", "12", "--compare-base", "--batch-size", "2"]
    assert cli.main(command) == 0
    whole = output.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    conversations, how = [asked(q) for q in QUESTIONS], Sampling(12)
    assert [row["messages"][:-1] for row in rows] == conversations
    assert [row["messages"][-1]["content"] for row in rows] == [row["tuned"] for row in rows]
    assert [row["tuned"] for row in rows] == list(tuned.answer(conversations, how))
    assert [row["base"] for row in rows] == list(tuned.base().answer(conversations, how))

    assert cli.main(command) == 2
    assert "--resume" in capsys.readouterr().err
    output.write_text(whole[: len("\n".join(whole.split("\n")[:2])) + 9])  # two lines, and a torn one
    assert cli.main([*command, "--resume"]) == 0
    assert output.read_text() == whole
    assert cli.main([*command, "--resume"]) == 0
    assert "5 answers are in" in capsys.readouterr().out
    write_jsonl(prompts, [{"prompt": "another"}])
    assert cli.main([*command, "--resume"]) == 2
    assert "line 1: answers another prompt" in capsys.readouterr().err


def test_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\ffour"
    rows, lines = tmp_path / "p.jsonl", tmp_path / "p.txt"
    rows.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" + json.dumps({"prompt": "b"}))
    lines.write_text(f"{text}\r\n\nb\n")
    for path in (rows, lines):
        assert read_prompts(str(path)) == [asked(text), asked("b")]


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": {}}, {"messages": "hello"}, {"prompt": 1}, []]
)
def test_a_row_that_asks_nothing_is_told_of_by_its_line(tmp_path: Path, row: Any) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: .* is wanted"):
        read_prompts(str(path))


def test_a_full_run_is_compared_with_the_model_it_began_with(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(final)
    AutoTokenizer.from_pretrained(tiny_models["llama"]).save_pretrained(final)
    run = as_run(tmp_path / "run", tiny_models["llama"], final)
    output = tmp_path / "out.jsonl"
    command = [
        "generate",
        "--prompt",
        "tea",
        "--max-new-tokens",
        "8",
        "--compare-base",
        "--output",
        str(output),
    ]
    assert cli.main([*command, "--run", str(run)]) == 0
    row = json.loads(output.read_text())
    how, asks = Sampling(8), [asked("tea")]
    assert row["base"] == next(Generator.of_directory(tiny_models["llama"], device="cpu").answer(asks, how))
    assert row["tuned"] == next(Generator.of_run(str(run), "cpu").answer(asks, how)) != row["base"]
    output.unlink()
    assert cli.main([*command, "--model", str(final)]) == 2
    assert "--run" in capsys.readouterr().err


def test_chat_shows_both_answers_and_goes_on_with_the_tuned_one(
    adapter: Path, tuned: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["tea", "/new", "tea", "and then?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--model", str(adapter), "--compare-base", "--max-new-tokens", "6"]) == 0
    shown = capsys.readouterr().out
    how = Sampling(6)
    first, base = (next(g.answer([asked("tea")], how)) for g in (tuned, tuned.base()))
    history = [*asked("tea"), {"role": "assistant", "content": first}, *asked("and then?")]
    second = next(tuned.answer([history], how))
    both = f"before: {base}\nafter:  {first}\n"
    assert shown.count(both) == 2
    assert shown.rpartition(both)[2].endswith(f"\nafter:  {second}\n")


@pytest.mark.parametrize(
    "content", ["", '{"messages": []}\n', '{"messages": [{"role": "user", "content": "x"}]}']
)
def test_files_without_a_whole_answer_are_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    if content.endswith("\n"):
        with pytest.raises(UserError, match="line 1"):
            answered([asked("x")], path)
    else:
        assert answered([asked("x")], path) == 0
        assert path.read_text() == ""


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--model", str(tmp_path / "none")]) == 2
    assert cli.main(["chat", "--model", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "no such directory" in shown
    assert "neither an adapter nor a model" in shown


@pytest.mark.parametrize("architecture", ["qwen2", "deepseek-v3"])
def test_a_run_on_a_quantised_base_answers_on_it(
    tiny_models: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Before and after training: both on the four bits that training saw."""
    base = tiny_models[architecture]
    run = as_run(tmp_path / "run", base, save_adapter(base, tmp_path / "adapter"))
    config = json.loads((run / "config.json").read_text())
    config["model"]["quantization"] = "nf4"
    (run / "config.json").write_text(json.dumps(config))
    tuned, full = (
        Generator.of_run(str(run), "cpu"),
        Generator.of_directory(tmp_path / "adapter", device="cpu"),
    )
    conversations, how = [asked(q) for q in QUESTIONS], Sampling(12)
    quantised = ModelConfig(name=str(base), quantization="nf4")
    four_bits = load_for_generation(quantised, torch.float32, torch.device("cpu"))
    before = list(tuned.base().answer(conversations, how))
    assert before == list(Generator(four_bits, tuned.tokenizer).answer(conversations, how))
    after = list(tuned.answer(conversations, how))
    assert after != before
    ids = torch.tensor([tuned.prompt_ids(conversations[1])])
    with torch.no_grad():
        assert (tuned.model(input_ids=ids).logits - full.model(input_ids=ids).logits).abs().max() > 1e-3


def test_tuned_biases_of_a_quantised_run_are_answered_with(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """By the run, and by its final/, whose run knows how the base model was held."""
    run = finished_run(tmp_path, tiny_models["qwen2"], "adapter.bias=all", "model.quantization=nf4")
    saved = load_file(run / "final" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    (key,) = (each for each in saved if name in each and each.endswith("bias"))
    given: Any = SimpleNamespace(run_dir=None, model_dir=str(run / "final"))
    for tuned in (Generator.of_run(str(run), "cpu"), generator(given)):
        layer: Any = tuned.model.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.bias.float(), saved[key])
        assert hasattr(layer.base_layer, "parametrizations"), "it is held in 4 bits"
