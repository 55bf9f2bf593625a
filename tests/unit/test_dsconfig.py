"""ds_config.json as the tutorials have it: what DeepSpeed is given in the end, and what is refused with which words."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as each
from hypothesis import strategies as st

from raytune_ds.config import EngineConfig, TrainConfig
from raytune_ds.engines.ds import autos, keys
from raytune_ds.engines.ds.config import check, ds_config, load
from raytune_ds.engines.ds.work import DsConfig, Facts
from raytune_ds.errors import UserError

FILE = "ds_config.json"


def facts(train: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **known: Any) -> Facts:
    """Two ranks on GPUs in bfloat16, four micro-batches of two packs each."""
    settings: dict[str, Any] = {
        "world_size": 2,
        "micro_batch": 2,
        "accumulation": 4,
        "global_batch": 16,
        "hidden_size": 64,
        "bf16": True,
        "gpu": True,
        "total_steps": 100,
        "warmup_steps": 3,
    }
    return Facts(
        TrainConfig(**(train or {})), EngineConfig(**({"config": FILE} | (engine or {}))), **settings | known
    )


def made(file: dict[str, Any], *, train: Any = None, engine: Any = None, **known: Any) -> DsConfig:
    return ds_config(file, facts(train, engine, **known))


def refused(file: dict[str, Any] | None, *, train: Any = None, engine: Any = None, **known: Any) -> list[str]:
    """The problems of a file."""
    with pytest.raises(UserError) as caught:
        ds_config(file, facts(train, engine, **known))
    return str(caught.value).splitlines()


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2} | keys}


def tutorial(stage: int = 2, **changes: Any) -> dict[str, Any]:
    """What is copied from tutorial to tutorial."""
    return {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": "cpu",
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_gather_16bit_weights_on_model_save": "auto",
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    } | changes


ALWAYS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "fp16": {"enabled": False},
    "steps_per_print": autos.QUIET,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


# ------------------------------------------------------------------------------------------- what is made


def test_the_tutorials_file() -> None:
    file = tutorial()
    before = copy.deepcopy(file)
    config = made(file)
    assert file == before
    assert config.values == ALWAYS | {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "allgather_partitions": True,
            "allgather_bucket_size": 200_000_000,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 64 * 64,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "contiguous_gradients": True,
        }
    }
    assert (config.stage, config.offload, config.optimizer_on_cpu) == (2, "optimizer", True)
    assert config.notes == (
        'zero_optimization.offload_optimizer = "cpu" in ds_config.json is read as {"device": "cpu"}',
        'scheduler in ds_config.json is left out (type = "WarmupDecayLR"): the learning rate follows '
        "train.lr_scheduler_type = cosine and its neighbours",
    )


def test_autos_of_stage_3_follow_the_hidden_size() -> None:
    values = made(tutorial(3)).values["zero_optimization"]
    assert values["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert values["stage3_param_persistence_threshold"] == 640


def test_a_scheduler_of_our_course_needs_no_note() -> None:
    train = {"lr_scheduler_type": "linear"}
    notes = made(tutorial(), train=train).notes
    assert len(notes) == 1
    assert "offload_optimizer" in notes[0]


def test_numbers_that_agree_with_the_config_are_fine() -> None:
    file = tutorial(
        train_batch_size=16,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=4,
        gradient_clipping=1,
        bf16={"enabled": True},
        optimizer={
            "type": "AdamW",
            "params": {"lr": 0.0002, "betas": [0.9, 0.999], "eps": "1e-8", "weight_decay": 0},
        },
        scheduler={
            "type": "WarmupCosineLR",
            "params": {"warmup_max_lr": 2e-4, "warmup_num_steps": 3, "total_num_steps": 100},
        },
    )
    config = made(file)
    assert config.values == made(tutorial()).values
    left_out = [note for note in config.notes if "left out" in note]
    assert [note.partition(" ")[0] for note in left_out] == ["optimizer", "scheduler"]


@pytest.mark.parametrize(
    ("engine", "stage", "offload", "section"),
    [
        ({}, 2, "none", {}),
        ({"stage": 1}, 1, "none", {}),
        (
            {"stage": 2, "offload": "optimizer"},
            2,
            "optimizer",
            {"offload_optimizer": {"device": "cpu", "pin_memory": True}},
        ),
        (
            {"stage": 3, "offload": "parameters"},
            3,
            "parameters",
            {
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "offload_param": {"device": "cpu", "pin_memory": True},
            },
        ),
    ],
)
def test_without_a_file_the_engine_section_decides(
    engine: dict[str, Any], stage: int, offload: str, section: dict[str, Any]
) -> None:
    config = ds_config(None, facts(engine={"config": None} | engine))
    assert (config.stage, config.offload, config.notes) == (stage, offload, ())
    values = dict(config.values["zero_optimization"])
    assert values.pop("reduce_bucket_size") == 4096
    assert [values.pop(key, None) for key in ("stage3_prefetch_bucket_size",)] == [
        3686 if stage == 3 else None
    ]
    assert values.pop("stage3_param_persistence_threshold", None) == (640 if stage == 3 else None)
    assert values == {"stage": stage} | section


def test_memory_is_pinned_on_gpus_alone() -> None:
    file = zero(offload_optimizer={"device": "cpu", "pin_memory": True})
    assert made(file).values["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    on_cpu = made(file, gpu=False)
    assert on_cpu.values["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert on_cpu.notes == ()


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize("how", ["nvme", {"device": "NVMe", "nvme_path": "/nvme"}])
@pytest.mark.parametrize("offload", [None, "parameters"])
def test_offload_to_a_disk_is_refused_and_says_what_to_do(part: str, how: Any, offload: str | None) -> None:
    lines = refused(zero(stage=3, **{part: how}), engine={"offload": offload})
    assert len(lines) == 1
    assert lines[0].startswith(f"zero_optimization.{part}.device = ")
    assert "checkpoints can't read" in lines[0]
    assert "engine.offload" in lines[0]


def test_what_belongs_to_a_disk_alone_stops_nothing() -> None:
    config = made(
        {"aio": {"queue_depth": 32, "block_size": "auto"}}
        | zero(stage=3, offload_param={"device": "cpu", "nvme_path": "/nvme"})
    )
    assert config.values["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert (config.offload, config.optimizer_on_cpu) == ("parameters", False)


def test_the_engine_section_completes_the_file() -> None:
    config = made(zero(stage=3, sub_group_size=1e8), engine={"offload": "parameters"})
    section = config.values["zero_optimization"]
    assert section["sub_group_size"] == 100_000_000
    assert section["offload_param"] == section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_what_deepspeed_knows_is_passed_on() -> None:
    known = {
        "communication_data_type": "fp32",
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 2, "unheard_of": [1]},
        "comms_logger": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "curriculum_learning": {"enabled": False},
        "elasticity": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    values = made(known | zero(zero_hpz_partition_size=2)).values
    assert {key: values[key] for key in known} == known
    assert values["zero_optimization"] == {"stage": 2, "zero_hpz_partition_size": 2}


def test_settings_that_mean_nothing_here_are_left_out() -> None:
    file = {"amp": {"enabled": "auto", "opt_level": "auto"}, "tensor_parallel": {"autotp_size": 1}}
    file |= {"activation_checkpointing": {"cpu_checkpointing": True}, "datastates_ckpt": False}
    config = made(file)
    assert config.values == ALWAYS | zero()
    assert [note.partition(" ")[0] for note in config.notes] == ["activation_checkpointing"]


def test_round_robin_gradients_are_left_out_with_a_note() -> None:
    """DeepSpeed 0.19 mixes the parameters' parts up with it; tutorials have it."""
    config = made(zero(round_robin_gradients=True))
    assert config.values == made(zero()).values
    assert "round_robin_gradients" in config.notes[0]
    assert made(zero(round_robin_gradients=False)).notes == ()


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_bfloat16_are_summed_in_float32_unless_the_file_says_otherwise(stage: int) -> None:
    values = made(zero(stage=stage), bf16=True).values
    assert values["data_types"]["grad_accum_dtype"] == values["communication_data_type"] == "fp32"
    file = zero(stage=stage) | {"communication_data_type": "bf16"}
    assert made(file, bf16=True).values["communication_data_type"] == "bf16"
    assert "communication_data_type" not in made(zero(stage=stage), bf16=False).values
    assert "communication_data_type" not in made(zero(stage=1), bf16=True).values
    assert made({"communication_data_type": "auto"}, bf16=True).values["communication_data_type"] == "fp32"


def test_a_key_for_comet_is_refused_unseen() -> None:
    (line,) = refused({"comet": {"enabled": True, "api_key": "s3cret"}})
    assert "COMET_API_KEY" in line


def test_comments_of_json_are_no_keys() -> None:
    assert made(
        {"_comment": "mine", "//": 1, "#": {}} | zero(**{"_why": "so", "offload_param": None})
    ) == made(zero())


# ----------------------------------------------------------------------------------------- common mistakes


@pytest.mark.parametrize(
    ("file", "same"),
    [
        (zero(offload_optimizer="cpu"), zero(offload_optimizer={"device": "cpu"})),
        (zero(offload_optimizer=True), zero(offload_optimizer={"device": "cpu"})),
        (zero(cpu_offload=True), zero(offload_optimizer={"device": "cpu"})),
        (zero(cpu_offload="true"), zero(offload_optimizer={"device": "cpu"})),
        (zero(stage=3, offload_param="cpu"), zero(stage=3, offload_param={"device": "cpu"})),
        (zero(stage=3, cpu_offload_param=True), zero(stage=3, offload_param={"device": "cpu"})),
        (zero(stage=3, cpu_offload_params=True), zero(stage=3, offload_param={"device": "cpu"})),
        (zero(stage="3"), zero(stage=3)),
        (zero(overlap_comm="True"), zero(overlap_comm=True)),
        (zero(reduce_bucket_size="5e8"), zero(reduce_bucket_size=500_000_000)),
        (zero(contiguous_gradients="auto"), zero()),
        (zero(cpu_offload_use_pin_memory=True), zero()),
        ({"zero_optimization": 3}, zero(stage=3)),
        ({"zero_optimization": "3"}, zero(stage=3)),
        ({"zero_optimization": True}, zero(stage=1)),  # as DeepSpeed has it
        ({"zero_optimization": {"overlap_comm": True}}, zero(overlap_comm=True)),
        ({"stage": 3}, zero(stage=3)),
        ({"stage": "3", "overlap_comm": True}, zero(stage=3, overlap_comm=True)),
        ({"offload_optimizer": "cpu"} | zero(), zero(offload_optimizer={"device": "cpu"})),
        ({"bf16": True}, {"bf16": {"enabled": True}}),
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"fp16": False}, {"fp16": {"enabled": False}}),
        ({"train_micro_batch_size_per_gpu": "2"}, {"train_micro_batch_size_per_gpu": 2}),
        ({"gradient_clipping": "1.0"}, {}),
        ({"wall_clock_breakdown": "false"}, {}),
        ({"optimizer": "AdamW"}, {}),
        ({"scheduler": "WarmupCosineLR"}, {}),
        ({"aio": {"thread_count": 2}}, {"aio": {"intra_op_parallelism": 2}}),
    ],
)
def test_a_mistake_is_understood_and_noted(file: dict[str, Any], same: dict[str, Any]) -> None:
    config = made(file)
    assert config.values == made(same).values
    assert config.notes
    assert all(FILE in note for note in config.notes)


@pytest.mark.parametrize(
    ("file", "same"),
    [
        (zero(offload_optimizer={"device": "none"}), zero()),
        (zero(offload_optimizer="none"), zero()),
        (zero(offload_optimizer=False, cpu_offload=False), zero()),
        (zero(offload_optimizer={"device": "auto", "pin_memory": "auto"}), zero()),
        (zero(offload_optimizer={"device": "CPU"}), zero(offload_optimizer={"device": "cpu"})),
        (zero(stage="auto"), zero()),
        (zero(overlap_comm=1), zero(overlap_comm=True)),
        ({"zero_optimization": "auto"}, zero()),
        ({}, zero()),
    ],
)
def test_other_ways_to_write_the_same_need_no_note(file: dict[str, Any], same: dict[str, Any]) -> None:
    assert made(file) == made(same)
    assert made(file).notes == ()


def test_an_offload_without_device_is_noted() -> None:
    config = made(zero(offload_optimizer={"pin_memory": True}))
    assert config.offload == "none"
    assert "names no device" in config.notes[0]


def test_defaults_that_deepspeed_takes_for_auto_are_noted() -> None:
    (note,) = made(zero(overlap_comm="auto", allgather_bucket_size="auto")).notes
    assert note == (
        'zero_optimization.overlap_comm, zero_optimization.allgather_bucket_size = "auto" in ds_config.json: '
        "DeepSpeed's default is taken"
    )


def test_our_own_optimizer_replaces_the_demand_for_deepspeeds() -> None:
    config = made({"zero_force_ds_cpu_optimizer": True} | zero(offload_optimizer={"device": "cpu"}))
    assert config.values["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" in config.notes[0]
    assert made({"zero_force_ds_cpu_optimizer": True}).notes == ()
    assert (
        made({"zero_force_ds_cpu_optimizer": "auto"} | zero(offload_optimizer={"device": "cpu"})).notes == ()
    )


# ------------------------------------------------------------------------------------- against the config


def params(**values: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": values}}


def course(**values: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupCosineLR", "params": values}}


@pytest.mark.parametrize(
    ("file", "theirs", "ours"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32", "train.global_batch = 16"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu = 8",
            "train.micro_batch = auto",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps = 1", "and 2 workers make 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5", "train.max_grad_norm = 1.0"),
        (params(lr=1e-3), "optimizer.params.lr = 0.001", "train.learning_rate = 0.0002"),
        (params(lr="1e-3"), "optimizer.params.lr = 0.001", "train.learning_rate = 0.0002"),
        (params(eps=1e-6), "optimizer.params.eps = 1e-06", "train.adam_epsilon = 1e-08"),
        (params(weight_decay=0.1), "optimizer.params.weight_decay = 0.1", "train.weight_decay = 0.0"),
        (params(max_grad_norm=2), "optimizer.params.max_grad_norm = 2", "train.max_grad_norm = 1.0"),
        (params(betas=[0.9, 0.95]), "optimizer.params.betas = [0.9, 0.95]", "train.adam_beta2 = 0.999"),
        (params(betas=[0.9]), "optimizer.params.betas = [0.9]", "train.adam_beta1 = 0.9"),
        (
            course(warmup_max_lr=1e-3),
            "scheduler.params.warmup_max_lr = 0.001",
            "train.learning_rate = 0.0002",
        ),
        (
            course(total_num_steps=1000),
            "scheduler.params.total_num_steps = 1000",
            "the run has 100 optimizer",
        ),
        (
            course(warmup_num_steps=50),
            "scheduler.params.warmup_num_steps = 50",
            "the warm-up takes 3 optimizer",
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled = false", "computes in bfloat16 (model.dtype)"),
    ],
)
def test_another_number_than_ours_is_refused_with_both(file: dict[str, Any], theirs: str, ours: str) -> None:
    (line,) = refused(file)
    assert line.startswith(f"{theirs} in ds_config.json")
    assert ours in line


@pytest.mark.parametrize(
    ("file", "engine", "theirs", "ours"),
    [
        (zero(stage=3), {"stage": 2}, "zero_optimization.stage = 3", "engine.stage = 2"),
        (
            zero(offload_optimizer="cpu"),
            {"offload": "none"},
            'zero_optimization.offload_optimizer.device = "cpu"',
            "engine.offload = none",
        ),
        (
            zero(offload_optimizer="none"),
            {"offload": "optimizer"},
            'zero_optimization.offload_optimizer.device = "none"',
            "engine.offload = optimizer",
        ),
        (
            zero(stage=3, offload_param="cpu"),
            {"offload": "optimizer"},
            'zero_optimization.offload_param.device = "cpu"',
            "engine.offload = optimizer",
        ),
    ],
)
def test_another_engine_than_ours_is_refused_with_both(
    file: dict[str, Any], engine: dict[str, Any], theirs: str, ours: str
) -> None:
    (line,) = refused(file, engine=engine)
    assert f"{theirs} in ds_config.json" in line
    assert f"{ours} in the config" in line


def test_what_agrees_with_the_engine_section_is_fine() -> None:
    engine = {"stage": 3, "offload": "parameters"}
    file = zero(stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert made(file, engine=engine).offload == "parameters"


def test_explicit_bf16_without_the_hardware_says_what_to_do() -> None:
    (line,) = refused({"bf16": {"enabled": True}}, bf16=False)
    assert line == (
        "bf16.enabled = true in ds_config.json, but this run computes in float32 (model.dtype): "
        'set model.dtype=bfloat16, or write "auto" in the file'
    )
    assert made(tutorial(), bf16=False).values["bf16"] == {"enabled": False}


def test_a_micro_batch_that_the_share_cuts_down_is_no_contradiction() -> None:
    file = {"train_micro_batch_size_per_gpu": 8}
    config = made(file, train={"micro_batch": 8}, micro_batch=2)
    assert config.values["train_micro_batch_size_per_gpu"] == 2
    (line,) = refused({"train_micro_batch_size_per_gpu": 4}, train={"micro_batch": 8}, micro_batch=2)
    assert "train.micro_batch = 8 in the config" in line


def test_a_warm_up_of_one_step_stands_for_none() -> None:
    assert made(course(warmup_num_steps=1), warmup_steps=0)
    assert refused(course(warmup_num_steps=2), warmup_steps=0)


@pytest.mark.parametrize("kind", ["Lamb", "OneBitAdam", "Lion", "Muon", "SGD"])
def test_another_optimizer_is_refused(kind: str) -> None:
    (line,) = refused({"optimizer": {"type": kind, "params": {"freeze_step": 4, "lr": "auto"}}})
    assert line.startswith(f'optimizer.type = "{kind}" in ds_config.json')


@pytest.mark.parametrize(
    ("kind", "extra", "weight_decay", "fine"),
    [
        ("Adam", {}, 0.1, True),  # DeepSpeed's Adam is AdamW
        ("AdamW", {"torch_adam": True}, 0.1, True),
        ("adamw", {"adam_w_mode": False}, 0.1, True),  # DeepSpeed's AdamW always is
        ("Adam", {"adam_w_mode": False}, 0.1, False),
        ("Adam", {"adam_w_mode": False, "torch_adam": True}, 0.1, False),
        ("Adam", {"adam_w_mode": False}, 0.0, True),  # the same without decay
        ("AdamW", {"bias_correction": False}, 0.0, False),
        ("AdamW", {"amsgrad": True}, 0.0, False),
        ("AdamW", {"fp32_optimizer_states": False}, 0.0, False),
    ],
)
def test_only_adamw_under_any_name_is_ours(
    kind: str, extra: dict[str, Any], weight_decay: float, fine: bool
) -> None:
    file = {"optimizer": {"type": kind, "params": {"lr": "auto", **extra}}}
    train = {"weight_decay": weight_decay}
    if fine:
        assert "optimizer" not in made(file, train=train).values
    else:
        (line,) = refused(file, train=train)
        assert "AdamW" in line


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2}, "gradient_predivide_factor"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types.grad_accum_dtype"),
        ({"data_types": {"grad_accum_dtype": "fp32"}} | zero(stage=1), "data_types.grad_accum_dtype"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
        ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop"),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
            "compression_training",
        ),
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"autotuning": {"enabled": True}}, "autotuning"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({"compile": {"deepcompile": True}}, "compile"),
        ({"nebula": {"enabled": True}}, "nebula"),
        ({"bf16": {"enabled": "auto", "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        (zero(zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients"),
        (zero(zero_quantized_weights="true"), "zero_optimization.zero_quantized_weights"),
        (zero(zenflow={"select_strategy": "auto"}), "zero_optimization.zenflow"),
        (zero(zenflow={}), "zero_optimization.zenflow"),
        (zero(zeropp_loco_param={"err_beta": 0.8}), "zero_optimization.zeropp_loco_param"),
        (zero(legacy_stage1=True), "zero_optimization.legacy_stage1"),
        (
            zero(offload_optimizer={"device": "cpu", "super_offload": True}),
            "zero_optimization.offload_optimizer.super_offload",
        ),
        (zero(mics_shard_size=4), "zero_optimization.mics_shard_size"),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "zero_optimization.offload_optimizer.ratio",
        ),
        (zero(stage=0), "zero_optimization.stage"),
        (zero(stage=4), "zero_optimization.stage"),
        ({"zero_optimization": False}, "zero_optimization.stage"),
        ({"zero_optimization": [2]}, "zero_optimization"),
        (zero(offload_param="cpu"), "zero_optimization.offload_param.device"),
        (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device"),
        (zero(cpu_offload=True, offload_optimizer="cpu"), "zero_optimization.cpu_offload"),
        ({"stage": 3} | zero(), "stage"),
        ({"bf16": {}, "bfloat16": {}}, "bfloat16"),
        (zero(overlap_comm="yes"), "zero_optimization.overlap_comm"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size"),
        (zero(reduce_bucket_size=True), "zero_optimization.reduce_bucket_size"),
        (zero(reduce_bucket_size=float("nan")), "zero_optimization.reduce_bucket_size"),
        (zero(reduce_bucket_size="inf"), "zero_optimization.reduce_bucket_size"),
        (params(lr=10**400), "optimizer.params.lr"),
        ({"train_batch_size": 0.5}, "train_batch_size"),
        ({"gradient_clipping": [1]}, "gradient_clipping"),
        ({"optimizer": [1]}, "optimizer"),
        ({"tensorboard": True}, "tensorboard"),
        ({"flops_profiler": {"profile_step": "auto"}}, "flops_profiler.profile_step"),
    ],
)
def test_what_can_not_be_is_refused_by_its_key(file: dict[str, Any], key: str) -> None:
    (line,) = refused(file)
    assert line.startswith(f"{key} = ")
    assert " in ds_config.json" in line


def test_gradients_are_summed_in_no_coarser_format() -> None:
    for key in ("communication_data_type", "data_types"):
        value: Any = "bf16" if key != "data_types" else {"grad_accum_dtype": "bf16"}
        assert made({key: value}).values[key] == value
        assert "float32" in refused({key: value}, bf16=False)[0]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (zero(overlap_com=True), "zero_optimization.overlap_com in {}: {}; did you mean overlap_comm?"),
        ({"overlap_com": True}, "overlap_com in {}: {}; did you mean zero_optimization.overlap_comm?"),
        ({"gradient_cliping": 1}, "gradient_cliping in {}: {}; did you mean gradient_clipping?"),
        (
            zero(gradient_clipping=1),
            "zero_optimization.gradient_clipping in {}: {} there; it belongs at the top, outside zero_optimization",
        ),
        ({"lr": 1e-4}, "lr in {}: {}; our key for that is train.learning_rate"),
        (
            zero(offload_optimizer={"device": "cpu", "pinmemory": True}),
            "zero_optimization.offload_optimizer.pinmemory in {}: {}; did you mean pin_memory?",
        ),
        (params(beta=1), "optimizer.params.beta in {}: {}; did you mean betas?"),
        ({"\x1b[31m\n": {"api_key": "s3cret"}}, "\\u001b[31m\\n in {}: {}; leave it out"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(file: dict[str, Any], line: str) -> None:
    assert refused(file) == [line.format(FILE, "DeepSpeed knows no such key")]


def test_all_problems_are_told_at_once() -> None:
    file = tutorial(4, train_batch_size=3, fp16={"enabled": True}, surely_unknown=1) | params(lr=1)
    lines = refused(file)
    keys = [
        "surely_unknown",
        "optimizer.params.lr",
        "fp16.enabled",
        "train_batch_size",
        "zero_optimization.stage",
    ]
    assert [line.partition(" ")[0] for line in lines] == keys


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        (
            {"offload": "parameters"},
            "engine.offload = parameters in the config: parameters are sharded, and so offloaded, in ZeRO stage 3 "
            "only, and the stage is 2; set it to 3",
        ),
    ],
)
def test_an_engine_section_that_can_not_be(engine: dict[str, Any], line: str) -> None:
    (found,) = refused(None, engine={"config": None} | engine)
    assert found.startswith(line)


# --------------------------------------------------------------------------------- before there are workers


def test_what_is_not_known_yet_is_not_checked_and_stays_auto() -> None:
    file = tutorial(3, train_micro_batch_size_per_gpu=7, gradient_accumulation_steps=3) | course(
        total_num_steps=9, warmup_num_steps=4
    )
    config = check(file, TrainConfig(), EngineConfig(config=FILE))
    assert (config.stage, config.offload) == (3, "optimizer")
    unknown = [path[-1] for path in autos._autos(config.values, ())]
    assert sorted(unknown) == [
        "enabled",
        "gradient_accumulation_steps",
        "reduce_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "train_micro_batch_size_per_gpu",
    ]
    # And all of it once it is known.
    assert len(refused(file)) == 4


def test_check_finds_what_is_wrong_in_every_world() -> None:
    train = TrainConfig(micro_batch=2, max_steps=50, warmup_steps=5)
    file = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    file |= course(total_num_steps=9, warmup_num_steps=4)
    with pytest.raises(UserError) as caught:
        check(file, train, EngineConfig(config=FILE, stage=1), gpu=False)
    keys = [line.partition(" ")[0].rpartition(".")[2] for line in str(caught.value).splitlines()]
    assert keys == [
        "total_num_steps",
        "warmup_num_steps",
        "enabled",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ]
    assert check({"bf16": {"enabled": True}}, train, EngineConfig(), dtype="bfloat16", gpu=False)


# -------------------------------------------------------------------------------------------- the file itself


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text("\ufeff" + json.dumps(tutorial()), encoding="utf-8")
    assert load(str(path)) == tutorial()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n}', ":3:1: is not JSON: "),
        ('{\n  // why\n  "a": 1}', ":2:3: is not JSON: "),
        ("", ":1:1: is not JSON: "),
        ('{"zero": {"a": 1, "a": 1}}', ': "a" is set twice in one section; keep one'),
        ("[1]", ": must be a JSON object of DeepSpeed's settings"),
        ('"cpu"', ": must be a JSON object"),
        ("[" * 100_000, ": is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", ": cannot be read: "),
        (b"\xff\xfe", ": is not UTF-8 text (byte 0)"),
    ],
)
def test_a_file_that_is_none_is_told_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}{message}")
    if "is not JSON" in message:
        assert "Comments and a comma after the last entry" in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/file.json", "/", "a\0b", "~surelynobody/x.json"])
def test_a_missing_file_is_told(path: str) -> None:
    with pytest.raises(UserError, match=r"no such file|cannot be read"):
        load(path)


# --------------------------------------------------------------------------------------- whatever is given

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.just(10**400)
    | st.sampled_from(["auto", "cpu", "true", "3", "nvme", "", "AdamW", "x" * 99]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["enabled", "device", "params", "type", "lr", "betas", "stage", "a.b", ""]), inner
        )
    ),
    max_leaves=6,
)


@each(
    st.dictionaries(st.sampled_from([*keys.TOP_KEYS, "stage", "bfloat16", "other"]), VALUES, max_size=4),
    st.dictionaries(st.sampled_from([*keys.ZERO_KEYS, "cpu_offload_params", "other"]), VALUES, max_size=4),
    st.booleans(),
)
def test_anything_is_either_made_whole_or_refused(top: Any, section: Any, known: bool) -> None:
    file = {"zero_optimization": section} | top
    before = copy.deepcopy(file)
    told = facts() if known else Facts(TrainConfig(), EngineConfig(config=FILE))
    with contextlib.suppress(UserError):
        config = ds_config(file, told)
        assert config.stage in (1, 2, 3)
        assert not known or not list(autos._autos(config.values, ()))
        assert not {"optimizer", "scheduler", "train_batch_size"} & config.values.keys()
    assert repr(file) == repr(before)


def test_no_fact_leaks_from_one_config_into_the_next() -> None:
    ds_config(None, facts(engine={"config": None}))
    assert (
        ds_config(None, replace(facts(engine={"config": None}), hidden_size=8)).values["zero_optimization"][
            "reduce_bucket_size"
        ]
        == 64
    )


# ----------------------------------------------------------------------------------------- DeepSpeed's word


def test_our_lists_of_keys_are_those_of_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero import config as zero_config
    from deepspeed.runtime.zero import offload_config

    def names(model: Any) -> set[str]:
        return {name for key, item in model.model_fields.items() for name in (key, item.alias) if name}

    class Asked(dict[str, Any]):
        """Remembers which keys it was asked for."""

        keys_asked: set[str] = set()  # noqa: RUF012

        def get(self, key: str, default: Any = None) -> Any:
            self.keys_asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            self.keys_asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    sections = keys.SECTIONS
    assert names(zero_config.DeepSpeedZeroConfig) == set(keys.ZERO_KEYS)
    assert names(offload_config.DeepSpeedZeroOffloadOptimizerConfig) == set(
        sections["zero_optimization.offload_optimizer"]
    )
    assert names(offload_config.DeepSpeedZeroOffloadParamConfig) == set(
        sections["zero_optimization.offload_param"]
    )
    assert names(DeepSpeedBF16Config) == set(sections["bf16"])
    DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1))
    assert Asked.keys_asked - {"bfloat16"} <= set(keys.TOP_KEYS)


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        (tutorial(), {}),
        (tutorial(3), {}),
        (None, {"config": None}),
        (zero(stage=3, offload_optimizer="cpu", offload_param="cpu"), {}),
        ({"aio": {"queue_depth": "auto"}} | zero(stage=1, overlap_comm="auto"), {}),
    ],
)
def test_deepspeed_takes_what_is_made(file: dict[str, Any] | None, engine: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = ds_config(file, facts(engine=engine))
    json.dumps(config.values)
    taken = DeepSpeedConfig(copy.deepcopy(config.values))
    assert taken.zero_optimization_stage == config.stage
    assert taken.train_batch_size == 8 * taken.world_size
    assert taken.gradient_clipping == 1.0
    assert taken.bfloat16_config.enabled
    assert not taken.float16_config.enabled
    assert taken.optimizer_name is taken.scheduler_name is None
    offload = taken.zero_config.offload_optimizer
    assert config.optimizer_on_cpu == (offload is not None and offload.device != "none")
