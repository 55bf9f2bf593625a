"""What a model is made of, which of it gets an adapter, and the messages where a target is of another model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.config import ModelConfig
from raytune_ds.errors import UserError
from raytune_ds.model import tiny
from raytune_ds.model.anatomy import anatomy
from raytune_ds.model.load import skeleton
from raytune_ds.model.targets import GROUPS, choose, shortest_names

MLA = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = {"gate_proj", "up_proj", "down_proj"}
# Of V4's attention: projections, the compressors of keys, and the grouped projection of outputs.
V4 = {"q_a_proj", "q_b_proj", "kv_proj", "gate_proj", "o_a_proj", "o_b_proj"}
ATTENTION = {
    "deepseek-v2": {"q_proj", *MLA},
    "deepseek-v2-q": {"q_a_proj", "q_b_proj", *MLA},
    "deepseek-v3": {"q_a_proj", "q_b_proj", *MLA},
    "deepseek-v3.2": {"q_a_proj", "q_b_proj", *MLA},
    "deepseek-v4": V4,
    "qwen2": QKVO,
    "qwen3": QKVO,
    "llama": QKVO,
}
MOE = [name for name in ATTENTION if name.startswith("deepseek")]
DENSE_ONLY = [name for name in ATTENTION if name not in MOE]


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each architecture without weights; of DeepSeek-V2 also the one with low-rank queries, as the large one."""
    root = tmp_path_factory.mktemp("configs")
    shapes: dict[str, Any] = {**tiny.ARCHITECTURES}
    shapes["deepseek-v2-q"] = shapes["deepseek-v2"] | {"q_lora_rank": 96}
    for name, shape in shapes.items():
        AutoConfig.for_model(**shape, vocab_size=500).save_pretrained(root / name)
    return {name: skeleton(ModelConfig(name=str(root / name))) for name in shapes}


def chosen(model: Any, targets: Any, **values: Any) -> dict[str, set[str]]:
    """Part of the model -> short names of what gets an adapter in it."""
    found: dict[str, set[str]] = {}
    for matrix in choose(model, AdapterConfig(targets=targets, **values)).all:
        found.setdefault(matrix.part, set()).add(matrix.short)
    return found


def refusal(model: Any, targets: Any, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        choose(model, AdapterConfig(targets=targets, **values))
    return str(caught.value)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_every_matrix_belongs_to_one_part(skeletons: dict[str, Any], architecture: str) -> None:
    model = skeletons[architecture]
    names = [matrix.name for matrix in anatomy(model)]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.ndim >= 2)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_words_mean_the_parts_of_the_architecture(skeletons: dict[str, Any], architecture: str) -> None:
    model = skeletons[architecture]
    assert chosen(model, "attention") == {"attention": ATTENTION[architecture]}
    if architecture in DENSE_ONLY:
        assert chosen(model, "mlp") == {"mlp": DENSE}
        return
    assert chosen(model, "shared-experts") == {"shared-experts": DENSE}
    assert chosen(model, "experts") == {"experts": {"gate_up_proj", "down_proj"}}
    assert chosen(model, ["router"]) == {"router": {"gate"}}
    if architecture != "deepseek-v4":  # which has experts in every layer
        assert chosen(model, "mlp") == {"mlp": DENSE}


@pytest.mark.parametrize("architecture", ATTENTION)
def test_all_is_all_but_routers_indexers_embeddings_and_head(
    skeletons: dict[str, Any], architecture: str
) -> None:
    model = skeletons[architecture]
    parts = set(chosen(model, "all"))
    assert parts == {m.part for m in anatomy(model)} - {"router", "indexer", "embedding", "head", "other"}


@pytest.mark.parametrize("architecture", ATTENTION)
def test_auto_takes_what_peft_wraps_as_it_is(skeletons: dict[str, Any], architecture: str) -> None:
    model = skeletons[architecture]
    found = choose(model, AdapterConfig())
    assert not found.parameters
    names = {matrix.short for matrix in found.modules}
    # V4's grouped projection is no plain linear layer; peft does not move its names.
    dense = DENSE if architecture in (*DENSE_ONLY, "deepseek-v4") else set()
    assert names == (ATTENTION[architecture] | dense) - {"o_a_proj"}
    layers = {matrix.layer for matrix in found.modules}
    assert layers == set(range(model.config.num_hidden_layers))


def test_the_indexer_of_sparse_attention_never_gets_one(skeletons: dict[str, Any]) -> None:
    for architecture in ("deepseek-v3.2", "deepseek-v4"):
        left = choose(skeletons[architecture], AdapterConfig(targets="all")).left
        assert any("indexer" in matrix.name and "gradient" in why for matrix, why in left)
    assert "indexer" in refusal(skeletons["deepseek-v3.2"], r".*indexer\.wk")


def test_names_ends_of_names_and_patterns(skeletons: dict[str, Any]) -> None:
    model = skeletons["qwen2"]

    def names(targets: Any) -> list[str]:
        return [matrix.owner for matrix in choose(model, AdapterConfig(targets=targets)).all]

    assert {name.rpartition(".")[2] for name in names(["q_proj", "v_proj"])} == {"q_proj", "v_proj"}
    assert names(["layers.2.mlp.up_proj"]) == ["model.layers.2.mlp.up_proj"]
    assert names(r".*layers\.[01]\.self_attn\.o_proj") == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]
    assert chosen(skeletons["deepseek-v3"], ["o_proj", "shared-experts"]) == {
        "attention": {"o_proj"},
        "shared-experts": DENSE,
    }


def test_layers_are_numbers_and_ranges(skeletons: dict[str, Any]) -> None:
    found = choose(skeletons["llama"], AdapterConfig(layers=[0, [2, 3]]))
    assert {matrix.layer for matrix in found.modules} == {0, 2, 3}
    assert "layers 0 to 3" in refusal(skeletons["llama"], "auto", layers=[9])


def test_the_targets_of_the_tutorials_name_the_right_ones(skeletons: dict[str, Any]) -> None:
    message = refusal(skeletons["deepseek-v3"], ["q_proj", "v_proj"])
    assert (
        "'q_proj' matches no linear layer of this deepseek_v3 model; did you mean q_b_proj or q_a_proj"
        in message
    )
    assert "'v_proj' matches no linear layer" in message
    assert "attention: kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj, q_b_proj" in message
    # One of two is enough to be refused: half an adapter would be a surprise.
    assert "'v_proj'" in refusal(skeletons["deepseek-v2"], ["q_proj", "v_proj"])
    for architecture in DENSE_ONLY:
        assert chosen(skeletons[architecture], ["q_proj", "v_proj"]) == {"attention": {"q_proj", "v_proj"}}


def test_a_pattern_has_to_match_the_whole_name(skeletons: dict[str, Any]) -> None:
    assert "matches no linear layer" in refusal(skeletons["llama"], "q_proj")
    assert "matches no linear layer" in refusal(skeletons["llama"], ["proj"])
    assert "this llama model has no experts" in refusal(skeletons["llama"], ["experts"])
    assert "modules_to_save" in refusal(skeletons["llama"], ".*lm_head")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dropout": 0.1}, "adapter.dropout=0.1"),
        ({"use_dora": True}, "adapter.use_dora=true"),
        ({"init_lora_weights": "pissa"}, "adapter.init_lora_weights=pissa"),
        ({"kind": "ia3"}, "adapter.kind=ia3"),
    ],
)
def test_what_bare_parameters_do_not_go_with(
    skeletons: dict[str, Any], values: dict[str, Any], reason: str
) -> None:
    message = refusal(skeletons["deepseek-v3"], ["experts"], **values)
    assert reason in message
    assert "down_proj, gate_up_proj" in message
    assert choose(skeletons["deepseek-v3"], AdapterConfig(targets=["o_proj"], **values)).modules


def test_shortest_names_mean_no_other() -> None:
    others = ["model.layers.0.indexer.q_proj", "model.layers.0.mlp"]
    assert shortest_names(["model.layers.0.attn.q_proj"], others) == ["attn.q_proj"]
    assert shortest_names(["model.layers.0.attn.q_proj"], ["model.layers.1.attn.q_proj"]) == [
        "layers.0.attn.q_proj"
    ]
    assert shortest_names(["a.b.c"], [], words=2) == ["b.c"]
    assert set(GROUPS) >= {"attention", "mlp", "experts", "shared-experts", "all"}
