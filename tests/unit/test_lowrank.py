"""Adapters of bare parameters on the tokens: what peft computes, without a gradient of the frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.model import adapters, grouped, lowrank
from raytune_ds.model.targets import choose

pytestmark = pytest.mark.usefixtures("one_thread")

MOE = ["deepseek-v2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4"]
IDS_BT = torch.arange(5, 45)[None]
RANK = 3  # no multiple of what grouped kernels want


def adapted(folder: Path, **adapter: Any) -> Any:
    """In peft's hands, with an adapter that changes something."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = AdapterConfig(**{"r": RANK, "alpha": 6.0, "targets": "all", **adapter})
    ready = get_peft_model(model, adapters.peft_config(model, config, choose(model, config)))
    torch.manual_seed(1)
    for name, parameter in ready.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return ready


def outcome(ready: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of some tokens, and the gradient of each parameter of the adapter."""
    logits = ready(input_ids=IDS_BT, use_cache=False).logits
    ready.zero_grad()
    F.cross_entropy(logits[0, :-1].float(), IDS_BT[0, 1:]).backward()
    return logits.detach(), {n: p.grad for n, p in ready.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((architecture, {}) for architecture in MOE),
        ("qwen2", {"bias": "all", "use_rslora": True}),
        ("qwen2", {"dropout": 0.5}),  # not in training
        ("deepseek-v3", {"targets": ["router", "experts"], "use_rslora": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_it_computes_what_peft_computes(
    tiny_models: dict[str, Path], architecture: str, settings: dict[str, Any], recomputed: bool
) -> None:
    ready = adapted(tiny_models[architecture], **settings).eval()
    names, (logits, gradients) = [*ready.state_dict()], outcome(ready)
    lowrank.compute_on_tokens(ready)
    if recomputed and "dropout" not in settings:
        ready.train()
        ready.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours, our_gradients = outcome(ready)
    assert [*ready.state_dict()] == names
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(our_gradients[name] / scale, gradient / scale, atol=1e-5, rtol=0), name


@pytest.mark.parametrize("architecture", MOE)
def test_switched_off_it_computes_what_the_base_model_does(
    tiny_models: dict[str, Path], architecture: str
) -> None:
    ready = adapted(tiny_models[architecture])
    with ready.disable_adapter(), torch.no_grad():
        plain = ready(input_ids=IDS_BT, use_cache=False).logits
    lowrank.compute_on_tokens(ready)
    assert (outcome(ready)[0] - plain).abs().max() > 1e-3  # and nothing of it is left behind
    with ready.disable_adapter(), torch.no_grad():
        ours = ready(input_ids=IDS_BT, use_cache=False).logits
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


class Made(TorchDispatchMode):
    """Shapes of the tensors that are computed, views of others left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage(a) for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and storage(tensor) not in given:
                self.shapes.add(tensor.shape)
        return result


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_nothing_of_the_size_of_a_frozen_weight_is_made(tiny_models: dict[str, Path]) -> None:
    ready = adapted(tiny_models["deepseek-v3"])
    weights = {p.shape for n, p in ready.named_parameters() if not p.requires_grad and ".mlp." in n}
    wide = {shape for shape in weights if shape.numel() > 128 * 96}
    assert len(wide) == 4  # gate and up, and down, of routed experts and of the dense layer
    with Made() as made:
        outcome(ready)
    assert made.shapes & wide
    lowrank.compute_on_tokens(ready)
    with Made() as made:
        outcome(ready)
    assert not made.shapes & wide


def test_a_change_below_the_last_bit_of_a_weight_counts() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).bfloat16()
    torch.nn.init.ones_(base[0].weight)
    ready = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_parameters=["0.weight"]))
    a_RI, b_OR = (p for name, p in ready.named_parameters() if "lora_" in name)
    with torch.no_grad():
        a_RI.copy_(torch.eye(8)[:1])
        b_OR.fill_(1 / 1024)
    x = torch.tensor([[1.0, -1.0, 0, 0, 0, 0, 0, 0]]).bfloat16()
    assert not ready(x).any()  # 1 + 1/1024 is 1 in bfloat16
    lowrank.compute_on_tokens(ready)
    assert (ready(x) == 1 / 1024).all()


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"use_dora": True}], ids=str)
def test_variants_are_left_to_peft(tiny_models: dict[str, Path], settings: dict[str, Any]) -> None:
    for left, more in ((True, settings), (False, {})):
        ready = adapted(tiny_models["qwen2"], **more)
        before = {name: module.forward for name, module in ready.named_modules()}
        lowrank.compute_on_tokens(ready)
        changed = [n for n, module in ready.named_modules() if module.forward != before[n]]
        assert (changed == []) == left


@pytest.mark.parametrize("ours", [False, True])
def test_the_backward_pass_keeps_no_copy_of_what_comes_in(ours: bool) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False)).bfloat16()
    ready = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    for name, parameter in ready.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if ours:
        lowrank.compute_on_tokens(ready)
    x = torch.randn(7, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        ready(x).sum()
    copies = [t for t in kept if t.numel() == x.numel() and storage(t) != storage(x)]
    assert (copies == []) == ours


# ---- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_hold_each_choice_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chosen_TK = (
        torch.stack([torch.randperm(5)[:2] for _ in range(40)]) * 2
    )  # odd experts of ten have no tokens
    groups = grouped.Groups.of(chosen_TK, 10, dtype)
    starts = [0, *groups.ends_E.tolist()]
    assert all(end % grouped.ROUNDED == 0 for end in starts) == (dtype == torch.bfloat16)
    for choice, row in enumerate(groups.rows_S.tolist()):
        expert = int(chosen_TK.view(-1)[choice])
        assert starts[expert] <= row < starts[expert + 1]
        assert groups.tokens_N[row] == choice // 2
    assert len(set(groups.rows_S.tolist())) == 80
    assert len(groups.tokens_N) == starts[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_tokens_have_a_gradient_of_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chosen_TK = torch.tensor([[0, 2], [2, 5], [5, 0]])
    groups = grouped.Groups.of(chosen_TK, 6, dtype)
    weight_EOD = torch.randn(6, 8, 16, dtype=dtype, requires_grad=True)
    x_TD, weights_TK = torch.randn(3, 16, dtype=dtype, requires_grad=True), torch.rand(3, 2)
    y_ND = grouped.grouped_product(groups.spread(x_TD), weight_EOD, groups.ends_E)
    y_TD = groups.collect(y_ND, weights_TK)
    y_TD.square().sum().backward()
    grads = weight_EOD.grad, x_TD.grad
    weight_EOD.grad = x_TD.grad = None
    by_hand = torch.stack(
        [
            sum(w * (weight_EOD[e] @ x) for e, w in zip(es, ws, strict=True))
            for x, es, ws in zip(x_TD, chosen_TK, weights_TK, strict=True)
        ]
    )
    by_hand.square().sum().backward()
    close = {"atol": 0.3, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(y_TD, by_hand, check_dtype=False, **close)
    for ours, expected in zip(grads, (weight_EOD.grad, x_TD.grad), strict=True):
        torch.testing.assert_close(ours, expected, **close)
    assert grads[0] is not None
    assert not grads[0][[1, 3, 4]].any()
    assert grads[0][[0, 2, 5]].any()
