"""Packs change nothing: every document is computed as if it were alone, and logits exist only where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from raytune_ds.config import ModelConfig
from raytune_ds.data.batch import Batch, collate
from raytune_ds.model import attention, crossentropy, load, tiny
from raytune_ds.model.load import parts
from raytune_ds.model.packed import PackedLM
from raytune_ds.objectives.sft import sft

ARCHITECTURES = list(tiny.ARCHITECTURES)
LENGTHS = [7, 1, 12, 30, 3]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path]) -> dict[str, Any]:
    """Each architecture with packed attention."""
    return {
        name: AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=implementation(ModelConfig(name=str(path)))
        ).eval()
        for name, path in tiny_models.items()
    }


def implementation(config: ModelConfig) -> str | None:
    return load.packed_attention(config) if load.runs_on_packs(config) else load.own_attention(config)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


def wrap(model: Any) -> PackedLM:
    end_to_end = model.config._attn_implementation == attention.PACKED
    return PackedLM(model, *parts(model), torch.float32, end_to_end=end_to_end)


def documents(seed: int = 0) -> list[list[int]]:
    """Token ids of documents of LENGTHS positions, each with the one token more that is only a target."""
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 450, length + 1).tolist() for length in LENGTHS]


def pack(rows: list[list[int]], weights: np.ndarray | None = None) -> Batch:
    lengths = np.array([len(row) - 1 for row in rows])
    return collate(
        [
            {
                "ids": np.concatenate([row[:-1] for row in rows]),
                "targets": np.concatenate([row[1:] for row in rows]),
                "weights": np.ones(lengths.sum()) if weights is None else weights,
                "lengths": lengths,
                "docs": np.arange(len(rows)),
            }
        ]
    )


def some_weights() -> np.ndarray:
    """Mostly zeros, ones, and something between."""
    return np.random.default_rng(1).choice([0.0, 0.0, 1.0, 0.25], sum(LENGTHS))


class HeadLog:
    """What the losses are made of: the logits, where they lay, and how many rows at once."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.places: set[int] = set()
        self._patch = pytest.MonkeyPatch()

    @property
    def rows(self) -> list[int]:
        return [len(logits) for logits in self.logits]

    def __enter__(self) -> HeadLog:
        losses = crossentropy._losses

        def note(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> Any:
            self.logits.append(logits_CV.clone())
            self.places.add(logits_CV.data_ptr())
            return losses(logits_CV, targets_C)

        self._patch.setattr(crossentropy, "_losses", note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()


@torch.no_grad()
def document_logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """The logits of every position that PackedLM makes, by document."""
    with HeadLog() as head:
        wrap(model)(pack(rows))
    (logits,) = head.logits
    return list(logits.split([len(row) - 1 for row in rows]))


# ---- isolation ------------------------------------------------------------------------------------


def experts(model: Any, implementation: str) -> None:
    if getattr(model.config, "n_routed_experts", None):
        model.set_experts_implementation(implementation)


@pytest.mark.parametrize("replaced", range(len(LENGTHS)))
def test_another_neighbour_changes_no_bit_of_a_document(model: Any, replaced: int) -> None:
    before = model.config._experts_implementation
    # Products a token: the default computes all tokens of an expert in one product, whose rounding depends on how
    # many there are.
    experts(model, "batched_mm")
    try:
        rows = documents()
        logits = document_logits(model, rows)
        rows[replaced] = documents(seed=9)[replaced]
        others = document_logits(model, rows)
    finally:
        experts(model, before)
    for number, (a, b) in enumerate(zip(logits, others, strict=True)):
        assert torch.equal(a, b) == (number != replaced)


def test_with_the_default_experts_a_neighbour_changes_rounding_only(model: Any) -> None:
    rows = documents()
    logits = document_logits(model, rows)
    rows[2] = documents(seed=9)[2]
    for number, (a, b) in enumerate(zip(logits, document_logits(model, rows), strict=True)):
        assert ((a - b).abs().max() < 1e-5) == (number != 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_document_equals_the_plain_model_on_it_alone(
    models: dict[str, Any], tiny_models: dict[str, Path], architecture: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_models[architecture], dtype=torch.float32).eval()
    rows = documents()
    for row, logits in zip(rows, document_logits(models[architecture], rows), strict=True):
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([row[:-1]])).logits[0]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_by_hand(scaling: float | None) -> None:
    # Grouped heads, values narrower than keys (MLA), and a scale that is not the usual one (YaRN changes it).
    torch.manual_seed(0)
    lengths = [3, 1, 4]
    query, key = torch.randn(1, 4, 8, 6), torch.randn(1, 2, 8, 6)
    value = torch.randn(1, 2, 8, 5)
    segments = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    found, _ = attention.packed_attention(
        nn.Module(), query, key, value, None, cu_seq_lens_q=segments, max_length_q=4, scaling=scaling
    )
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (document[:, None] == document[None]) & torch.ones(8, 8).tril().bool()
    scores = query @ key.transpose(2, 3) * (scaling or 6**-0.5)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2))


# ---- losses ---------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropy_where_the_weight_is_not_zero(model: Any) -> None:
    rows, weights = documents(), some_weights()
    with torch.no_grad():
        losses = wrap(model)(pack(rows, weights))
        total = sft(wrap(model), pack(rows, weights)).sum()
    full = torch.cat(document_logits(model, rows))
    expected = F.cross_entropy(full, torch.tensor([t for row in rows for t in row[1:]]), reduction="none")
    torch.testing.assert_close(losses, expected[torch.tensor(weights != 0)], rtol=0, atol=1e-5)
    by_hand = float((expected.double() * torch.tensor(weights)).sum())
    assert float(total) == pytest.approx(by_hand, abs=1e-4)


def test_logits_are_made_for_supervised_tokens_only(model: Any) -> None:
    weights = some_weights()
    with HeadLog() as head, torch.no_grad():
        wrap(model)(pack(documents(), weights))
    assert head.rows == [np.count_nonzero(weights)]


def gradients(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.requires_grad_(True).zero_grad(set_to_none=True)
    loss = sft(wrap(model), batch).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def four_at_a_time(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    """No more than four tokens' logits are in memory together."""
    monkeypatch.setitem(crossentropy.ROOM, "cpu", crossentropy.Room(4 * 4 * vocabulary, 512))


def test_chunks_of_logits_change_neither_loss_nor_gradient(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack(documents(), some_weights())
    loss, whole = gradients(model, batch)
    four_at_a_time(monkeypatch, model.config.vocab_size)
    with HeadLog() as head:
        chunked_loss, chunked = gradients(model, batch)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    assert chunked.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-4, atol=2e-6)
    # They never exist all at once, and are made once: the backward pass needs them no more.
    assert max(head.rows) == 4
    assert sum(head.rows) == len(batch.supervised_N)


def test_in_16_bits_gradients_are_rounded_but_not_shifted() -> None:
    """A factor that 16 bits can't hold is that of all tokens: rounded, all gradients would be off by as much."""
    torch.manual_seed(0)
    hidden = torch.randn(200, 16).bfloat16().requires_grad_()
    weight = torch.randn(50, 16).bfloat16().requires_grad_()
    targets, factor = torch.randint(0, 50, (200,)), 1 / 384.7

    def gradients_of(above: float) -> tuple[torch.Tensor, ...]:
        losses = crossentropy.linear_cross_entropy(hidden, weight, None, targets, torch.ones(200))
        return torch.autograd.grad(losses, (hidden, weight), torch.full((200,), above))

    assert abs(float(torch.tensor(factor).bfloat16().float()) / factor - 1) > 1e-3
    for scaled, plain in zip(gradients_of(factor), gradients_of(1.0), strict=True):
        ratio = float((scaled.double() * plain).sum() / plain.double().square().sum())
        assert ratio == pytest.approx(factor, rel=2e-4)


@pytest.mark.parametrize("trained", ["hidden", "weight bias", "hidden weight bias"])
@pytest.mark.parametrize("count", [0, 2, 9])
@pytest.mark.parametrize("above", ["a multiple", "anything"])
def test_the_loss_of_a_linear_layer_equals_torchs(
    monkeypatch: pytest.MonkeyPatch, trained: str, count: int, above: str
) -> None:
    four_at_a_time(monkeypatch, 11)
    torch.manual_seed(0)
    tensors = {"hidden": torch.randn(count, 6), "weight": torch.randn(11, 6), "bias": torch.randn(11)}
    tensors = {name: tensor.requires_grad_(name in trained) for name, tensor in tensors.items()}
    targets, expected = torch.randint(0, 11, (count,)), torch.rand(count) + 0.1
    factors = expected * 0.7 if above == "a multiple" else torch.rand(count)

    def gradients_of(losses: torch.Tensor) -> list[torch.Tensor]:
        wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
        return list(torch.autograd.grad((losses * factors).sum(), wanted))

    with HeadLog() as head:
        losses = crossentropy.linear_cross_entropy(*tensors.values(), targets, expected)
        found = gradients_of(losses)
    plain = F.cross_entropy(F.linear(*tensors.values()), targets, reduction="none")
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(found, gradients_of(plain))
    again = "weight" in trained and above == "anything"
    assert sum(head.rows) == count * (2 if again else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [crossentropy.Room(4 * 4 * 11, 512), crossentropy.Room(1 << 30, 4)])
def test_chunks_of_logits_take_turns_in_one_place(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, room: crossentropy.Room
) -> None:
    monkeypatch.setitem(crossentropy.ROOM, "cpu", room)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 6).to(dtype).requires_grad_() for n in (9, 11))
    targets = torch.randint(0, 11, (9,))
    with HeadLog() as head:
        losses = crossentropy.linear_cross_entropy(hidden, weight, None, targets, torch.ones(9))
    assert head.rows == [4, 4, 1]
    assert len(head.places) == 1
    plain = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    torch.testing.assert_close(losses, plain)
    found = torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), (hidden, weight)))
    # Gradients are scaled where they lie, so a second time they would be others: that is an error, and not silent.
    with pytest.raises(RuntimeError, match="inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("batch", [collate([]), pack(documents(), np.zeros(sum(LENGTHS)))])
def test_a_batch_of_weight_zero_has_a_gradient_of_zeros(model: Any, batch: Batch) -> None:
    # A rank of a sharded model has to take part in the backward pass, so the graph must be there.
    loss, found = gradients(model, batch)
    assert loss == 0
    assert any(name.startswith("model.layers.0.self_attn.") for name in found)
    assert "lm_head.weight" in found
    assert not any(gradient.any() for gradient in found.values())


def test_positions_count_from_each_document(models: dict[str, Any]) -> None:
    # Causal attention with relative positions does not notice a shift, so the positions themselves are looked at.
    seen: list[torch.Tensor] = []
    rotary = models["llama"].model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    try:
        document_logits(models["llama"], documents())
    finally:
        hook.remove()
    assert seen[0].tolist() == [[i for length in LENGTHS for i in range(length)]]


def test_parameters_have_one_name_each(models: dict[str, Any]) -> None:
    names = [name for name, _ in wrap(models["llama"]).named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(models["llama"].parameters()))
    assert all(name.startswith("model.") for name in names)


@pytest.mark.parametrize(
    "asked", [{"s_aux": torch.zeros(2)}, {"sliding_window": 16}, {"softcap": 30.0}, {"keys": 9}]
)
def test_attention_that_is_more_than_causal_is_refused(asked: dict[str, Any]) -> None:
    """Left out in silence, it would train another model."""
    from raytune_ds.errors import UserError
    from raytune_ds.model.attention import packed_attention

    num_keys = asked.pop("keys", 8)
    query, key = torch.randn(1, 2, 8, 4), torch.randn(1, 2, num_keys, 4)
    segments = torch.tensor([0, 8], dtype=torch.int32)

    def attend(**others: Any) -> None:
        packed_attention(
            nn.Identity(), query, key, key, None, cu_seq_lens_q=segments, max_length_q=8, **others
        )

    with pytest.raises(UserError, match="not supported"):
        attend(**asked)
    if num_keys == 8:
        attend(**dict.fromkeys(asked))
