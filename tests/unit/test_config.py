"""The config tree: defaults, bounds, cross-checks, and that every field explains itself."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from raytune_ds import config as c
from raytune_ds.compose import compose
from raytune_ds.config import Config, SourceConfig
from raytune_ds.errors import UserError
from raytune_ds.keys import FIELDS, KEYS, section_of
from raytune_ds.section import SECRET_NAME, holds_credentials, types_in


def make(key: str, value: Any) -> Config:
    """A config with one dotted key set."""
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return Config.model_validate(tree)


def get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


DEFAULTS = {
    "run": {"name": None, "storage": "~/raytune_ds", "seed": 0, "resume": "auto"},
    "model": {
        "name": "tiny:deepseek-v3",
        "dtype": "auto",
        "quantization": "none",
        "attention": "auto",
        "experts_implementation": "auto",
        "liger_kernel": "auto",
        "add_tokens": [],
        "add_special_tokens": [],
        "trust_remote_code": False,
    },
    "adapter": {
        **{
            "kind": "lora",
            "r": 8,
            "alpha": 16,
            "dropout": 0.0,
            "bias": "none",
            "targets": "auto",
            "layers": None,
        },
        **{"use_rslora": False, "use_dora": False, "init_lora_weights": "default", "loraplus_lr_ratio": None},
        **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "path": None, "options": {}},
    },
    "objective": {"kind": "sft"},
    "data": {
        "sources": None,
        "eval": {"fraction": 0.02, "sources": None},
        "seq_len": 2048,
        "supervise": "all-turns",
        "on_finding": "fail",
        "thinking": "auto",
        "on_bad_row": "fail",
        "on_long_row": "truncate",
        "prepare_memory_mib": 8,
        "chat_template": None,
    },
    "train": {
        "num_train_epochs": 3,
        "max_steps": None,
        "global_batch": 16,
        "micro_batch": "auto",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "warmup_steps": None,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "loss_spike_factor": None,
        "max_skipped_steps": 10,
        "on_skipped_steps": "stop",
        "activation_checkpointing": "auto",
        "torch_compile": "auto",
        "eval_steps": None,
        "logging_steps": 1,
        "profile": None,
    },
    "engine": {"kind": "auto", "stage": None, "offload": None, "config": None},
    "scaling": {
        "num_workers": "auto",
        "resize_interval_s": 60.0,
        "use_gpu": "auto",
        "cpus_per_worker": 1,
        "max_failures": 3,
        "max_preemptions": -1,
        "stop_grace_s": 2.0,
        "hang_timeout_s": 600.0,
        "collective_timeout_s": 1800,
    },
    "checkpoint": {"every_steps": "auto", "keep": 2, "background": True, "rehearse": True},
    "tracking": {"to": ["tensorboard"]},
    "sweep": {
        "space": None,
        "trial": {},
        "metric": ["eval_loss"],
        "mode": "auto",
        "trials": "auto",
        "reports": 9,
        "max_concurrent": "auto",
        "give_up_after": 3,
        "searcher": {"kind": "auto", "startup_trials": 5},
        "scheduler": {
            "kind": "asha",
            "grace_period": 1,
            "reduction_factor": 3,
            "perturbation_interval": 1,
            "quantile_fraction": 0.25,
        },
        "budget": {"tokens": None, "hours": None, "money": None, "price_per_hour": None},
    },
}


def test_defaults_are_the_documented_interface() -> None:
    assert Config().model_dump(mode="json", exclude={"cluster"}) == DEFAULTS


def test_defaults_pass_their_own_checks() -> None:
    assert Config.model_validate(DEFAULTS) == Config()


def test_frozen_and_hashable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.learning_rate = 1.0  # type: ignore[misc]
    assert hash(Config()) == hash(Config())


@pytest.mark.parametrize("section", list(DEFAULTS))
def test_unknown_keys_are_refused(section: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        make(f"{section}.surely_unknown", 1)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("run.seed", [-1, 2**32, 1.5], [0, 2**32 - 1]),
        ("run.name", ["", ".hidden", "..", "a/b", "a b", "a\n", "x" * 129], ["a", "run-1_2.3", "x" * 128]),
        ("run.storage", [""], ["s3://bucket/x", "/mnt/x"]),
        ("run.resume", ["yes"], ["auto", "never", "must"]),
        ("model.name", ["", "tiny:gpt2"], [*c.TINY_MODELS, "org/name", "./dir"]),
        ("model.dtype", ["float16"], ["auto", "float32", "bfloat16"]),
        ("model.quantization", ["nf2", "4bit"], ["none", "nf4", "int8", "int4", "fp8"]),
        ("model.attention", ["flash"], ["auto", "varlen", "sdpa"]),
        ("model.experts_implementation", ["loop"], ["auto", "eager", "batched_mm", "grouped_mm"]),
        ("model.liger_kernel", ["yes!", 2], ["auto", True, False]),
        ("adapter.kind", ["", "LoRA", "lo ra"], ["lora", "none", "vera", "ia3"]),
        ("adapter.layers", [[-1], [[3, 1]], 4, "all"], [None, (0,), (0, (2, 5))]),
        (
            "adapter.init_lora_weights",
            ["pisa", "pissa_niter_0"],
            ["pissa_niter_16", "olora", "eva", "default"],
        ),
        ("adapter.loraplus_lr_ratio", [0, -1], [None, 16]),
        ("adapter.alpha_pattern", [{"a": "x"}, {"a": 0}, {"a": True}], [()]),
        ("adapter.rank_pattern", [{"a": 1.5}, {"a": 1, "b": {"c": 2}, "b.c": 3}, 8], [()]),
        (
            "adapter.options",
            [{"target_modules": ["a"]}, {"use_dora": True}, {"trainable_token_indices": [1]}],
            [()],
        ),
        ("adapter.r", [0, -1, 1.5, True], [1, 256]),
        ("adapter.alpha", [0, -1, float("inf")], [0.5]),
        ("adapter.dropout", [-0.1, 1], [0, 0.99]),
        ("adapter.bias", ["some"], ["none", "all", "lora_only"]),
        ("adapter.targets", ["", "(", [], [""], [1], 5], ["all-linear", r".*\.q_proj", ("q_proj", "o_proj")]),
        ("objective.kind", ["dpo"], ["sft"]),
        ("data.sources", [[], 3, [3], [{}], ""], []),
        ("data.eval.fraction", [-0.1, 0.6], [0, 0.5]),
        ("data.seq_len", [7], [8]),
        ("data.supervise", ["first-turn", True], ["all-turns", "last-turn"]),
        ("data.thinking", ["on", True, None], ["keep", "drop", "auto"]),
        ("data.on_bad_row", ["warn"], ["fail", "skip"]),
        ("data.on_long_row", ["split"], ["truncate", "drop"]),
        ("data.chat_template", ["", "{{ messages }}"], [None, "a/b.jinja"]),
        ("train.num_train_epochs", [0, float("nan")], [0.5, 3]),
        ("train.max_steps", [0], [None, 1]),
        ("train.global_batch", [0, True], [1]),
        ("train.micro_batch", [0, "all", True], ["auto", 1, 16]),
        ("train.learning_rate", [0, -1], [1e-5]),
        ("train.lr_scheduler_type", ["greedy", "reduce_lr_on_plateau", "cosine_with_min_lr"], ["linear"]),
        ("train.warmup_ratio", [-0.1, 1.1], [0, 1]),
        ("train.warmup_steps", [-1], [None, 0, 5]),
        ("train.weight_decay", [-0.1], [0.1]),
        ("train.adam_beta1", [1, -0.1], [0]),
        ("train.adam_beta2", [1, -0.1], [0.95]),
        ("train.adam_epsilon", [0], [1e-6]),
        ("train.max_grad_norm", [-1], [0]),
        ("train.loss_spike_factor", [1, 0.5, True], [None, 1.5, 3]),
        ("train.max_skipped_steps", [0, None, True], [1, 1000]),
        ("train.on_skipped_steps", ["ignore", None], ["stop", "rewind"]),
        (
            "train.activation_checkpointing",
            [
                True,
                None,
                2,
                "",
                "some",
                "every",
                "every-",
                "every-0",
                "every-1",
                "every-02",
                "every-n",
                "every--2",
            ],
            ["auto", "none", "full", "every-2", "every-3", "every-10", "every-61"],
        ),
        ("train.torch_compile", ["default", 2], ["auto", True, False]),
        ("train.eval_steps", [0], [None, 1]),
        ("train.logging_steps", [0], [1]),
        ("train.profile", [5, [5], [0, 3], [4, 3], [1, 2, 3]], [None, (1, 1), (3, 8)]),
        ("engine.kind", ["megatron"], ["auto", "ddp", "zero", "fsdp"]),
        ("engine.stage", [0, 4], [1, 2, 3, None]),
        ("engine.offload", ["cpu"], ["none", "optimizer", "parameters", None]),
        ("scaling.num_workers", [0, "all"], ["auto", 1, 16]),
        ("scaling.use_gpu", ["maybe", 2], [True, False, "auto"]),
        ("scaling.cpus_per_worker", [0], [1]),
        ("scaling.max_failures", [-2], [-1, 0]),
        ("checkpoint.every_steps", [0, "never"], ["auto", 1]),
        ("checkpoint.keep", [0], [1]),
        ("tracking.to", ["neptune", ["tensorboard", "x"]], []),
    ],
)
def test_bounds_and_choices(key: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ValidationError):
            make(key, value)
    for value in good:
        assert get(make(key, value), key) == value


def test_numeric_strings_are_numbers() -> None:
    assert make("train.learning_rate", "2e-4").train.learning_rate == 2e-4
    assert make("scaling.num_workers", "4").scaling.num_workers == 4


def test_sources_are_normalised() -> None:
    a = SourceConfig(path="a.jsonl")
    for value in ["a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}, [{"path": "a.jsonl"}], [a], a]:
        assert make("data.sources", value).data.sources == (a,)
    mixed = make("data.sources", ["a.jsonl", {"path": "b", "format": "alpaca"}]).data.sources
    assert mixed == (a, SourceConfig(path="b", format="alpaca"))


def test_empty_sources_say_what_to_do() -> None:
    with pytest.raises(ValidationError, match="is empty; name at least one source"):
        make("data.sources", [])


@pytest.mark.parametrize("given", ["5", "[5]", "[1, 2, 3]", "3-8"])
def test_a_profile_takes_two_steps(given: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile.*takes two steps, the first and the last"):
        compose([], [f"train.profile={given}"])


def test_eval_sources_replace_the_fraction() -> None:
    config = make("data.eval.sources", "held.jsonl")
    assert config.data.eval.fraction == 0
    assert config.data.eval.sources == (SourceConfig(path="held.jsonl"),)
    with pytest.raises(ValidationError, match=r"data\.eval\.sources are given too; set one of them only"):
        make("data.eval", {"sources": "x", "fraction": 0.1})
    assert make("data.eval", {"sources": None, "fraction": 0.1}).data.eval.fraction == 0.1


def test_micro_batch_fits_the_global_batch() -> None:
    with pytest.raises(ValidationError, match=r"is more than train\.global_batch \(4\)"):
        make("train", {"global_batch": 4, "micro_batch": 5})
    assert make("train", {"global_batch": 4, "micro_batch": 4}).train.micro_batch == 4


def test_every_worker_has_a_slot() -> None:
    with pytest.raises(
        ValidationError, match="each worker needs at least one pack of the global batch, which has 16"
    ):
        make("scaling.num_workers", 17)
    assert Config.model_validate({"train": {"global_batch": 17}, "scaling": {"num_workers": 17}})


def test_polynomial_needs_room_to_fall() -> None:
    with pytest.raises(ValidationError, match="ends at a learning rate of 1e-7"):
        make("train", {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7})
    assert make("train.lr_scheduler_type", "polynomial")


def test_trackers_count_once_and_need_no_list() -> None:
    assert make("tracking.to", "wandb").tracking.to == ("wandb",)
    assert make("tracking.to", ["wandb", "mlflow", "wandb"]).tracking.to == ("wandb", "mlflow")
    assert make("tracking.to", []).tracking.to == ()


@pytest.mark.parametrize("key", ["run.storage", "model.name", "data.sources"])
def test_credentials_are_refused(key: str) -> None:
    for uri in ["s3://key:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2&region=eu"]:
        with pytest.raises(ValidationError, match="holds credentials"):
            make(key, uri)


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/x?region=eu", "hdfs://user@host/x", "C:\\data", "org/name@main", "https://[bad", "a:b@c"],
)
def test_plain_uris_hold_no_credentials(uri: str) -> None:
    assert not holds_credentials(uri)


UNITS = {
    "adapter.r": "dimensions",
    "adapter.alpha": "factor",
    "adapter.layers": "ends count",
    "adapter.loraplus_lr_ratio": "times",
    "adapter.dropout": "Probability",
    "data.eval.fraction": "Fraction of the examples",
    "data.seq_len": "tokens",
    "data.sources.0.weight": "Share of an epoch's rows",
    "data.sources.0.epochs": "How often its rows come",
    "data.sources.0.max_rows": "Rows read",
    "data.eval.sources.0.weight": "Share of an epoch's rows",
    "data.eval.sources.0.epochs": "How often its rows come",
    "data.eval.sources.0.max_rows": "Rows read",
    "data.prepare_memory_mib": "Mebibytes",
    "train.num_train_epochs": "epochs",
    "train.max_steps": "optimizer steps",
    "train.global_batch": "Packs",
    "train.micro_batch": "Packs",
    "train.learning_rate": "per optimizer step",
    "train.warmup_ratio": "fraction of all optimizer steps",
    "train.warmup_steps": "optimizer steps",
    "train.weight_decay": "factor per optimizer step",
    "train.adam_beta1": "factor",
    "train.adam_beta2": "factor",
    "train.adam_epsilon": "units of the gradient",
    "train.max_grad_norm": "L2 norm",
    "train.loss_spike_factor": "factor times the median",
    "train.max_skipped_steps": "Optimizer steps",
    "train.eval_steps": "Optimizer steps",
    "train.logging_steps": "Optimizer steps",
    "train.profile": "optimizer steps",
    "scaling.num_workers": "Worker processes",
    "scaling.cpus_per_worker": "CPUs",
    "scaling.resize_interval_s": "Seconds",
    "scaling.max_failures": "Restarts",
    "scaling.max_preemptions": "Restarts",
    "scaling.stop_grace_s": "Seconds",
    "scaling.hang_timeout_s": "Seconds",
    "scaling.collective_timeout_s": "Seconds",
    "checkpoint.every_steps": "Optimizer steps",
    "checkpoint.keep": "Checkpoints",
    "run.seed": "Seed",
    "engine.stage": "stage",
    "cluster.max_nodes": "GPU nodes",
    "cluster.min_nodes": "GPU nodes",
    "cluster.gpus_per_node": "GPUs",
    "cluster.cpus_per_node": "CPUs",
    "cluster.memory_gib_per_node": "GiB",
    "cluster.idle_timeout_minutes": "Minutes",
    "cluster.aws.disk_gib": "GiB",
    "cluster.gcp.disk_gib": "GiB",
    "cluster.kubernetes.shm_gib": "GiB",
    "sweep.trials": "Trials",
    "sweep.reports": "How often",
    "sweep.max_concurrent": "Trials at once",
    "sweep.give_up_after": "Failed trials",
    "sweep.searcher.startup_trials": "Trials",
    "sweep.scheduler.grace_period": "Reports",
    "sweep.scheduler.reduction_factor": "of so many trials",
    "sweep.scheduler.perturbation_interval": "reports",
    "sweep.scheduler.quantile_fraction": "share",
    "sweep.budget.tokens": "Tokens",
    "sweep.budget.hours": "Hours",
    "sweep.budget.money": "cost",
    "sweep.budget.price_per_hour": "per hour",
}


def test_every_field_is_described() -> None:
    for path, info in FIELDS.items():
        assert info.description, path
        if not section_of(info):
            assert info.description.endswith("."), path
            assert len(info.description) > 40, path


def test_every_number_names_its_unit() -> None:
    numeric = {".".join(p) for p, i in FIELDS.items() if {int, float} & set(types_in(i.annotation))}
    assert numeric == set(UNITS)
    for key, unit in UNITS.items():
        assert unit in (FIELDS[tuple(key.split("."))].description or ""), key


def test_no_key_is_named_like_a_secret() -> None:
    assert not [key for key in KEYS if SECRET_NAME.search(key.rpartition(".")[2])]
    assert all(
        SECRET_NAME.search(k) for k in ["token", "hf_token", "api_key", "apikey", "password", "aws_secret"]
    )
    assert not any(SECRET_NAME.search(k) for k in ["max_tokens", "author", "tokenizer", "num_tokens"])


def test_every_choice_is_explained_or_plain() -> None:
    """Choices whose name does not explain itself are spelled out where the user reads them."""
    for key in ["run.resume", "data.on_bad_row", "data.on_long_row", "model.attention"]:
        info = FIELDS[tuple(key.split("."))]
        for choice in types_in(info.annotation):
            assert re.search(rf"\b{choice}\b", info.description or ""), (key, choice)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.kind=ddp", "engine.stage=3"],
            "engine.stage = 3 (command line): has no meaning with engine.kind=ddp",
        ),
        (
            ["engine.kind=fsdp", "engine.config=x.json"],
            "engine.config = x.json (command line): has no meaning",
        ),
        (["engine.kind=fsdp", "engine.offload=optimizer"], "fsdp offloads everything or nothing"),
        (["engine.stage=2", "engine.offload=parameters"], "parameters are sharded by ZeRO stage 3 only"),
        (
            ["engine.stage=3", "engine.nvme_path=/nvme"],
            "engine.nvme_path (command line): unknown key; DeepSpeed's offload to a disk (nvme) is not supported",
        ),
    ],
)
def test_engine_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([], overrides)
    assert message in str(caught.value)


def test_options_of_peft_are_written_as_they_are_read() -> None:
    given = {
        "rank_pattern": {"layers.1.o_proj": 16},
        "options": {"eva_config": {"rho": 1.5}, "fan_in_fan_out": False},
    }
    config = c.Config.model_validate({"adapter": given})
    assert hash(config) == hash(c.Config.model_validate(config.model_dump(mode="json")))
    written = config.model_dump(mode="json")["adapter"]
    assert written["rank_pattern"] == {"layers.1.o_proj": 16}
    assert written["options"] == {"eva_config.rho": 1.5, "fan_in_fan_out": False}


def test_other_methods_begin_with_the_ranks_of_peft() -> None:
    adapter = c.Config.model_validate({"adapter": {"kind": "vera"}}).adapter
    assert (adapter.r, adapter.alpha) == (None, None)
    assert c.Config.model_validate({"adapter": adapter.model_dump(mode="json")}).adapter == adapter
    for given in ({"kind": "lora", "r": None}, {"kind": "vera", "use_dora": True}):
        with pytest.raises(ValidationError):
            c.Config.model_validate({"adapter": given})
