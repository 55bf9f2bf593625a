"""The config tree: what a run is asked to do, checked in full before anything is started.

Strict (an unknown key is an error), frozen (a run cannot change its mind halfway) and free of torch, ray and
transformers, so that a mistake is answered at once. Each check stands beside its field; one that needs two
fields stands beside the later one. A constructor raises `pydantic.ValidationError`; `raytune_ds.compose`
turns that into messages that name the key and where its value came from.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raytune_ds.adapterconfig import AdapterConfig
from raytune_ds.clusterconfig import ClusterConfig
from raytune_ds.compatible import conflicts
from raytune_ds.section import Count, Section, Text, about, without_credentials
from raytune_ds.sweepconfig import SweepConfig

PROFILED_STEPS = 50
TINY_MODELS = tuple(
    f"tiny:{name}"
    for name in ("deepseek-v2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4", "qwen2", "qwen3", "llama")
)


class RunConfig(Section):
    """The run's name, where its files go, and how it begins."""

    name: str | None = Field(
        default=None,
        max_length=128,
        description="Name of the run and of its directory: letters, digits, '.', '_' and '-', not "
        "beginning with a dot. null: made from model, data and time, so that two runs never"
        " share a directory by accident.",
    )
    storage: Text = Field(
        default="~/raytune_ds",
        description="Directory that holds all runs: a path or any URI pyarrow opens (s3://, gs://, "
        "hdfs://). The home directory is writable everywhere; several nodes need storage "
        "that all of them see.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of data order, initial adapter weights and dropout, from 0 to 2**32 - 1. "
        "Fixed by default, so that a run can be repeated.",
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: go on if the run directory is there, so that the same command survives a "
        "crash; never: refuse an existing directory; must: refuse a missing one.",
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_directory_name(cls, name: str | None) -> str | None:
        # a leading dot is kept for our own directories (.prepared) and rules out '.' and '..'
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise ValueError("use letters, digits, '.', '_' and '-' only, and no dot at the beginning")
        return name

    @field_validator("storage")
    @classmethod
    def _storage_without_credentials(cls, storage: str) -> str:
        return without_credentials(storage)


class ModelConfig(Section):
    """The model that is fine-tuned and the form it is held in."""

    name: Text = Field(
        default="tiny:deepseek-v3",
        description=f"A directory, a hub name, or one of {', '.join(TINY_MODELS)}: the real architecture "
        "with few random weights. A tiny one by default, so that a first run needs no download and no GPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Number format of the weights. auto: bfloat16 where the hardware computes in it, "
        "otherwise float32.",
    )
    quantization: Literal["none", "nf4", "int8", "int4", "fp8"] = Field(
        default="none",
        description="Quantization of the frozen linear layers and routed experts, from which values are made as they "
        "are needed. none: they keep model.dtype; nf4: 4 bits with double quantisation, as QLoRA has it; int8: 8 bits "
        "(both by bitsandbytes); int4, fp8: 4-bit integers, 8-bit floats (torchao).",
    )
    attention: Literal["auto", "varlen", "sdpa"] = Field(
        default="auto",
        description="How attention keeps the segments of a pack apart. varlen: one CUDA kernel for all;"
        " sdpa: one causal call a segment, on any device; auto: varlen where it runs, "
        "otherwise sdpa.",
    )
    experts_implementation: Literal["auto", "eager", "batched_mm", "grouped_mm"] = Field(
        default="auto",
        description="How routed experts are computed, as transformers names it. eager: one expert after the other; "
        "batched_mm: one product a token; grouped_mm: one product for all experts; auto: grouped_mm, which keeps up "
        "with the others everywhere and is far ahead where experts are trained.",
    )
    liger_kernel: bool | Literal["auto"] = Field(
        default="auto",
        description="Norms, rotary embeddings and SwiGLU by the fused kernels of liger-kernel. true: refused "
        "where it does not know the architecture. auto: where it does, on GPUs, if liger-kernel is installed (pip "
        "install liger-kernel).",
    )
    add_tokens: tuple[Text, ...] = Field(
        default=(),
        description="Words of the domain that become one token each, wherever they stand in the data. The embedding "
        "grows where it has no room for them, and is trained and saved whole.",
    )
    add_special_tokens: tuple[Text, ...] = Field(
        default=(),
        description="The same for control tokens, such as those of a data.chat_template; in contents of messages they "
        "stay text.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model's files. false: such code can do "
        "anything the user can, and the supported models need none.",
    )

    @field_validator("name")
    @classmethod
    def _tiny_model_is_known(cls, name: str) -> str:
        if name.startswith("tiny:") and name not in TINY_MODELS:
            raise ValueError(f"there is no such tiny model; choose one of {', '.join(TINY_MODELS)}")
        return without_credentials(name)


class ObjectiveConfig(Section):
    """What the loss is."""

    kind: Literal["sft", "pretrain"] = Field(
        default="sft",
        description="sft: supervised fine-tuning, cross-entropy on the supervised tokens; pretrain: continued "
        "pretraining on raw text, cross-entropy on every token.",
    )


class SourceConfig(Section):
    """One source of training or evaluation data, and its part in the mixture."""

    path: Text = Field(
        description="A file, a directory, a glob pattern, a URI or the hub name of a data set."
    )
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference", "kto"
    ] = Field(
        default="auto",
        description="Form of the rows. auto: told from the columns of the first rows, which is enough "
        "unless they are ambiguous.",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        max_length=64,
        description="What tables and metrics call it (loss/NAME, eval_loss/NAME). null: made from its path.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Share of an epoch's rows, relative to the other sources; exact over an epoch, to the row. An "
        "epoch is as long as it can be without a row coming more often than `epochs` of its source. null: as many "
        "rows as it has.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="How often its rows come in one epoch of the run; 0.5: half of them, drawn once by run.seed. With "
        "weights, the most that they may come. null: 1, as in any epoch.",
    )
    max_rows: Count | None = Field(
        default=None,
        description="Rows read of it, from its beginning, bad ones counted; the rest is not looked at. null: all.",
    )
    subset: Text | None = Field(
        default=None,
        description="Configuration of a data set of the hub that has several, such as 'main'. null: its only one.",
    )
    split: Text | None = Field(
        default=None,
        description="Split of a data set of the hub; for files it says nothing. null: train.",
    )

    @field_validator("path")
    @classmethod
    def _path_without_credentials(cls, path: str) -> str:
        return without_credentials(path)


def _as_sources(value: Any) -> Any:
    """A bare string is a path, and one source may stand without a list around it."""
    if isinstance(value, (str, dict, SourceConfig)):
        value = [value]
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("is empty; name at least one source, or leave the key out")
        return [{"path": source} if isinstance(source, str) else source for source in value]
    return value


class EvalConfig(Section):
    """What the held-out loss is measured on: a fraction of the training data, or sources of its own."""

    fraction: float = Field(
        default=0.02,
        ge=0,
        le=0.5,
        description="Fraction of the examples held out of training, from 0 (no evaluation) to 0.5. 0.02"
        " costs little data and still shows overfitting. Becomes 0 where data.eval.sources "
        "are given.",
    )
    sources: tuple[SourceConfig, ...] | None = Field(
        default=None,
        description="Evaluation data of its own, written like data.sources; nothing is then held out. "
        "null: use data.eval.fraction, because most data sets come without a split.",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _normalise_sources(cls, value: Any) -> Any:
        return _as_sources(value)

    @model_validator(mode="before")
    @classmethod
    def _sources_replace_the_default_fraction(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("sources") is not None and "fraction" not in given:
            return {**given, "fraction": 0.0}
        return given

    @model_validator(mode="after")
    def _measures_rows_as_they_are(self) -> Self:
        for number, source in enumerate(self.sources or ()):
            for key in ("weight", "epochs"):
                if getattr(source, key) is not None:
                    raise about(
                        f"sources.{number}.{key}",
                        "mixes training data; held-out rows are measured once each (max_rows limits them)",
                    )
        return self

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if self.sources is not None and self.fraction > 0:
            raise about(
                "fraction",
                "data.eval.sources are given too; set one of them only, or this to 0",
            )
        return self


class DataConfig(Section):
    """What is trained on, and how rows become packs of tokens."""

    sources: tuple[SourceConfig, ...] | None = Field(
        default=None,
        description="Training data: a path, or a list of paths and of {path, weight, epochs ...}. null: the demo "
        "data that come with the package, so that a first run needs nothing.",
    )
    eval: EvalConfig = Field(default=EvalConfig(), description="What the held-out loss is measured on.")
    seq_len: int = Field(
        default=2048,
        ge=8,
        description="Length of a pack in tokens; examples are packed into it and a longer one is cut or"
        " dropped. 2048 holds nearly every instruction row and fits small GPUs.",
    )
    supervise: Literal["all-turns", "last-turn"] = Field(
        default="all-turns",
        description="Which answers of a conversation are trained on. all-turns: each, in its own context; last-turn: "
        "the last one, with all before it as context. Messages with 'weight': 0 or 'train': false never are.",
    )
    thinking: Literal["keep", "drop", "auto"] = Field(
        default="auto",
        description="What to do with the reasoning of answers: <think>...</think> at the beginning of a content, or "
        "'reasoning_content'. keep: train on it, every answer in thinking mode; drop: leave it out, every answer in "
        "non-thinking mode; auto: an answer with reasoning in thinking mode, one without in non-thinking mode, if the "
        "chat template has a switch, so that the model learns of both modes what the data have.",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail",
        description="What to do with a row that cannot be read. fail: stop and name file and row, "
        "because silent loss of data is worse; skip: count it and go on.",
    )
    on_finding: Literal["fail", "warn"] = Field(
        default="fail",
        description="What to do where what was prepared can't teach what it is meant to: most rows without an end "
        "token, with the question trained on ... fail: stop before training, naming rows; warn: say so and train.",
    )
    on_long_row: Literal["truncate", "drop"] = Field(
        default="truncate",
        description="What to do with an example longer than data.seq_len tokens. truncate: keep its "
        "beginning, so that no row is lost whole; drop: leave it out. Raw text is always "
        "split, never truncated.",
    )
    prepare_memory_mib: Count = Field(
        default=8,
        description="Mebibytes of source text that one task of the preparation holds at a time; documents are "
        "packed together within that much, and the task takes about six times as much memory. 8 leaves small "
        "machines room and fills packs well; hundreds make the preparation of a terabyte faster.",
    )
    chat_template: Text | None = Field(
        default=None,
        description="Path of a .jinja file that replaces the tokenizer's chat template. null: the "
        "tokenizer's own, which is what a server will use.",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _normalise_sources(cls, value: Any) -> Any:
        return _as_sources(value)

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        sources = self.sources or ()
        without = [source.path for source in sources if source.weight is None]
        if without and len(without) < len(sources):
            raise about(
                "sources",
                f"some have a weight and {', '.join(without)} has none; give each one or none of them"
                " (a weight is relative to the others)",
            )
        return self

    @field_validator("chat_template")
    @classmethod
    def _template_is_a_jinja_file(cls, path: str | None) -> str | None:
        if path is not None and not path.endswith(".jinja"):
            raise ValueError("must be the path of a .jinja file, not the template itself")
        return path


class TrainConfig(Section):
    """Length, batches, optimizer and learning-rate schedule. Batches count packs of data.seq_len tokens."""

    num_train_epochs: float = Field(
        default=3.0,
        gt=0,
        description="Passes over the training data, in epochs; may be a fraction. 3: the usual length "
        "for a few thousand domain rows. train.max_steps wins where it is given.",
    )
    max_steps: Count | None = Field(
        default=None,
        description="Length of the run in optimizer steps. null: train.num_train_epochs decides, "
        "because epochs do not depend on the size of the data.",
    )
    global_batch: Count = Field(
        default=16,
        description="Packs in one optimizer step over all workers together. 16 packs of 2048 tokens are"
        " 32768 tokens a step; it stays the same whatever the number of workers.",
    )
    micro_batch: Count | Literal["auto"] = Field(
        default="auto",
        description="Packs one worker computes at once; accumulation makes up the rest of train.global_batch. auto: as "
        "many as fit into a GPU's memory by an estimate that is made before training; on CPUs about 1024 tokens, which "
        "keep them busy. A restart with the same workers keeps what was chosen.",
    )
    learning_rate: float = Field(
        default=2.0e-4,
        gt=0,
        description="Peak learning rate of AdamW, per optimizer step. 2e-4 suits LoRA; when all "
        "parameters are trained take about a tenth.",
    )
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "cosine_with_restarts",
        "inverse_sqrt",
    ] = Field(
        default="cosine",
        description="Course of the learning rate after the warm-up, as transformers names it. cosine: "
        "falls to zero and is forgiving about the length of the run. constant has no "
        "warm-up.",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Warm-up as a fraction of all optimizer steps. 0.03 is enough for AdamW's moments "
        "to settle. train.warmup_steps wins where it is given.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Warm-up in optimizer steps; wins over train.warmup_ratio. null: the ratio decides,"
        " because it follows the length of the run.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="AdamW's decoupled weight decay, a factor per optimizer step and unit of learning "
        "rate. 0: a low-rank adapter is regularised by its rank.",
    )
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw_torch",
        description="AdamW, as the Hugging Face trainer names it. adamw_torch: moments in float32; adamw_8bit: in 8 "
        "bits (bitsandbytes), a quarter of their memory; paged_adamw_8bit: which also go to host memory where a CUDA "
        "GPU is full. Checkpoints hold float32 whichever it is. adamw_torch: an adapter's moments are small.",
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="AdamW's decay factor of the first moment; the customary value."
    )
    adam_beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="AdamW's decay factor of the second moment; the customary value.",
    )
    adam_epsilon: float = Field(
        default=1e-8,
        gt=0,
        description="AdamW's term against division by zero, in units of the gradient; the customary value.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Largest L2 norm of the whole gradient; a larger one is scaled down to it. 1.0 "
        "tames the rare bad batch; 0 turns clipping off.",
    )
    loss_spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="A step is skipped if its loss is more than this factor times the median of the last 64 losses, "
        "once there are 16. null: losses may jump, and only a step whose loss or gradient is not finite is skipped. "
        "3 catches the batches that ruin a model.",
    )
    max_skipped_steps: Count = Field(
        default=10,
        description="Optimizer steps skipped one after the other, for a loss or gradient that is not finite or a loss "
        "spike, at which train.on_skipped_steps says what to do. They change nothing: after 10, time is only burnt.",
    )
    on_skipped_steps: Literal["stop", "rewind"] = Field(
        default="stop",
        description="What to do after train.max_skipped_steps. stop: end the run and name steps and rows, for somebody "
        "should look at them; rewind: go back to the last checkpoint before them and train on without their batches.",
    )
    activation_checkpointing: str = Field(
        default="auto",
        description="Layers that recompute their activations in the backward pass instead of keeping them: none; full: "
        "all, which takes a third more time; every-N (every-2, every-3 ...): each N-th. auto: as few as let about 8192 "
        "tokens (on CPUs 1024) into the memory of a worker, by an estimate that is made before training.",
    )
    torch_compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Compile the layers of the model by torch.compile, one kind of layer at a time. auto: false, for "
        "each start pays for it, some ten seconds to a minute, and nothing tells that a run is long enough to earn it.",
    )
    eval_steps: Count | None = Field(
        default=None,
        description="Optimizer steps between two evaluations. null: once an epoch, but at most 20 times "
        "in a run of many short epochs.",
    )
    logging_steps: Count = Field(
        default=1,
        description="Optimizer steps between two points of the trackers' curves; metrics.jsonl has every step. "
        "1: a step takes long enough for that.",
    )

    profile: tuple[Count, Count] | None = Field(
        default=None,
        description="[first, last] of the optimizer steps that are profiled: where their time goes is written to "
        "profile/ in the run directory, a page (summary.md) and a trace of each worker. A few steps behind the first "
        f"ones are enough; of more than {PROFILED_STEPS} the first are. null: none, because a profiled step takes "
        "longer.",
    )

    @field_validator("profile", mode="before")
    @classmethod
    def _two_steps(cls, profile: Any) -> Any:
        if profile is not None and not (isinstance(profile, list | tuple) and len(profile) == 2):
            raise ValueError("takes two steps, the first and the last: [10, 14]")
        return profile

    @field_validator("profile")
    @classmethod
    def _first_comes_first(cls, profile: tuple[int, int] | None) -> tuple[int, int] | None:
        if profile is not None and profile[0] > profile[1]:
            raise ValueError(f"runs from {profile[0]} to {profile[1]}; write the first step first")
        return profile

    @field_validator("activation_checkpointing")
    @classmethod
    def _checkpointing_is_a_depth(cls, depth: str) -> str:
        if not re.fullmatch(r"auto|none|full|every-([2-9]|[1-9]\d+)", depth):
            raise ValueError("must be auto, none, full or every-N with an N from 2 on, such as every-2")
        return depth

    @field_validator("optim", mode="before")
    @classmethod
    def _one_name_for_one_thing(cls, optim: Any) -> Any:
        return "adamw_8bit" if optim == "adamw_bnb_8bit" else optim

    @field_validator("micro_batch")
    @classmethod
    def _micro_batch_fits(cls, micro_batch: int | str, info: ValidationInfo) -> int | str:
        global_batch = info.data.get("global_batch")
        if isinstance(micro_batch, int) and global_batch is not None and micro_batch > global_batch:
            raise ValueError(
                f"is more than train.global_batch ({global_batch}); lower it, raise the other or say auto"
            )
        return micro_batch

    @field_validator("lr_scheduler_type")
    @classmethod
    def _polynomial_has_room_to_fall(cls, kind: str, info: ValidationInfo) -> str:
        # transformers lets a polynomial schedule end at 1e-7 and refuses to begin below
        if kind == "polynomial" and info.data.get("learning_rate", 1.0) <= 1e-7:
            raise ValueError("ends at a learning rate of 1e-7; raise train.learning_rate or choose linear")
        return kind


class EngineConfig(Section):
    """How parameters and optimizer state are spread over the workers."""

    kind: Literal["auto", "ddp", "zero", "fsdp"] = Field(
        default="auto",
        description="ddp: every worker holds the whole model; zero: DeepSpeed ZeRO; fsdp: torch's fully_shard. "
        "auto: ddp where the model and its optimizer fit into a worker's memory, otherwise fsdp, and it says why; "
        "zero where another key of this section asks for it. All give the same model, up to rounding.",
    )
    stage: Annotated[int, Field(ge=1, le=3)] | None = Field(
        default=None,
        description="ZeRO stage: 1 shards the optimizer state over the workers, 2 the gradients too, 3 the parameters "
        "too. null: what engine.config says, otherwise 2, which costs no more communication than ddp.",
    )
    offload: Literal["none", "optimizer", "parameters"] | None = Field(
        default=None,
        description="What is kept in host memory instead of the GPU's. optimizer: its state and its work (zero); "
        "parameters: these and the parameters (zero stage 3, fsdp). null: what engine.config says, otherwise none, "
        "which is fastest.",
    )
    config: Text | None = Field(
        default=None,
        description="Path of a DeepSpeed ds_config.json for zero. Its auto values are filled in from this config; "
        "values that contradict it are refused. null: made from this section, which is enough for most.",
    )

    @field_validator("stage", "offload", "config")
    @classmethod
    def _belongs_to_the_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind, name = info.data.get("kind", "auto"), info.field_name
        takes = ("auto", "zero", "fsdp") if name == "offload" else ("auto", "zero")
        if value not in (None, "none") and kind not in takes:
            raise ValueError(f"has no meaning with engine.kind={kind}; it takes {' or '.join(takes[1:])}")
        return value

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        if self.kind == "fsdp" and self.offload == "optimizer":
            raise about("offload", "fsdp offloads everything or nothing; write parameters, or take zero")
        if self.offload == "parameters" and self.stage in (1, 2):
            raise about(
                "offload", f"parameters are sharded by ZeRO stage 3 only, and engine.stage is {self.stage}"
            )
        return self

    @property
    def asks_for_zero(self) -> bool:
        """Whether a key is set that only DeepSpeed ZeRO knows."""
        given = self.stage is not None or self.config is not None
        return self.kind == "zero" or self.offload == "optimizer" or given


class ScalingConfig(Section):
    """How many workers there are and what each of them gets."""

    num_workers: Count | tuple[Count, Count] | Literal["auto"] = Field(
        default="auto",
        description="Worker processes, one GPU each where GPUs are used. auto: one for each GPU of the "
        "cluster; without GPUs two, if there is room. [fewest, most]: as many of these as the cluster has room for, "
        "fewer when nodes go and more when they come; the result is the same.",
    )
    resize_interval_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds between two looks for nodes that have come, where scaling.num_workers is [fewest, most]. "
        "60: growing costs a restart from the newest checkpoint, which nobody wants more often.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto",
        description="Give each worker a GPU. auto: where the cluster has any, so that one config serves"
        " laptop and cluster.",
    )
    cpus_per_worker: Count = Field(
        default=1,
        description="CPUs reserved for each worker. 1: more would keep small machines from starting; "
        "the data pipeline asks for its own share.",
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="Restarts of the worker group after a worker died, before the run gives up; -1: no "
        "limit. 3 outlives lost nodes and still ends when the program itself is at fault.",
    )
    max_preemptions: int = Field(
        default=-1,
        ge=-1,
        description="Restarts after nodes that gave notice and went, which count apart; -1: no limit, for a spot "
        "machine that goes is nobody's fault.",
    )
    stop_grace_s: float = Field(
        default=2.0,
        ge=0,
        description="Seconds that a run which is asked to stop (Ctrl-C, SIGTERM, `ray job stop`) has for a checkpoint "
        "of its newest step. 2: Ray kills a job after three (RAY_JOB_STOP_WAIT_TIME_S raises it).",
    )

    hang_timeout_s: float | None = Field(
        default=600.0,
        gt=0,
        description="Seconds without a sign of progress (a micro-batch, a file of a checkpoint) after which workers "
        "count as hung: their stacks go to hangs/ in the run directory, and those that hold up the others are ended, "
        "which restarts the group. null: never. 600: no micro-batch takes as long, and a cluster that stands still "
        "costs more.",
    )
    collective_timeout_s: Count = Field(
        default=1800,
        description="Seconds after which a rank that waits for the others in a collective gives up: torch's timeout of "
        "a process group. 1800: as in Ray Train, long enough for nodes that load a large model at unequal speed.",
    )

    @field_validator("num_workers")
    @classmethod
    def _fewest_come_first(cls, num_workers: Any) -> Any:
        if isinstance(num_workers, tuple) and num_workers[0] > num_workers[1]:
            raise ValueError(f"runs from {num_workers[0]} to {num_workers[1]}; write the fewest first")
        return num_workers

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The fewest and the most workers; None where the cluster decides."""
        if self.num_workers == "auto":
            return None
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2


class CheckpointConfig(Section):
    """How often the run is saved, and how much of that is kept."""

    every_steps: Count | Literal["auto"] = Field(
        default="auto",
        description="Optimizer steps between two checkpoints. auto: a tenth of the run, between 10 and 500, "
        "which is what a crash may cost, and each evaluation that is the best so far.",
    )
    keep: Count = Field(
        default=2,
        description="Checkpoints kept: the newest ones, and beside them the one of the best held-out loss, where that "
        "was measured at its very step. Others are deleted. 2: should the newest be damaged, one is left.",
    )
    background: bool = Field(
        default=True,
        description="Copy the state to host memory and write it while training goes on, one checkpoint at a time. "
        "false: training waits for the disk, and a worker's share of the state needs no second place in memory.",
    )
    rehearse: bool = Field(
        default=True,
        description="Write, verify, load and delete a whole checkpoint before the first step, so that one that fails "
        "does so at once and not hours later.",
    )


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=("tensorboard",),
        description="Trackers. tensorboard needs no server and no account; an empty list: none. Keys of"
        " the others come from the environment.",
    )

    @field_validator("to", mode="before")
    @classmethod
    def _one_tracker_without_a_list(cls, to: Any) -> Any:
        return [to] if isinstance(to, str) else to

    @field_validator("to")
    @classmethod
    def _each_once(cls, to: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(to))


class Config(Section):
    """The whole config of a run. Frozen; equal configs compare and hash equal."""

    run: RunConfig = Field(default=RunConfig(), description="Name, place and beginning of the run.")
    model: ModelConfig = Field(default=ModelConfig(), description="The model that is fine-tuned.")
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="What is trained.")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="What the loss is.")
    data: DataConfig = Field(default=DataConfig(), description="What is trained on.")
    train: TrainConfig = Field(default=TrainConfig(), description="Length, batches and optimizer.")
    engine: EngineConfig = Field(default=EngineConfig(), description="How the model is spread over workers.")
    scaling: ScalingConfig = Field(
        default=ScalingConfig(), description="How many workers, and their resources."
    )
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="How often the run is saved."
    )
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Where metrics go.")
    cluster: ClusterConfig = Field(
        default=ClusterConfig(), description="The machines of `raytune-ds render`; a run does not look at it."
    )
    sweep: SweepConfig = Field(
        default=SweepConfig(),
        description="What `python -m raytune_ds.sweep` searches; a run does not look at it.",
    )

    @field_validator("adapter")
    @classmethod
    def _adapter_goes_with_the_model(cls, adapter: AdapterConfig, info: ValidationInfo) -> AdapterConfig:
        model = info.data.get("model")
        if model is not None:
            chosen = {"adapter.kind": adapter.kind, "model.quantization": model.quantization}
            for reason in conflicts(chosen, "adapter.kind"):
                raise about("kind", reason)
            begins = {
                "adapter.init_lora_weights": adapter.init_lora_weights.partition("_")[0],
                "model.quantization": model.quantization,
            }
            for reason in conflicts(begins, "adapter.init_lora_weights"):
                raise about("init_lora_weights", reason)
        return adapter

    @field_validator("train")
    @classmethod
    def _compiling_goes_with_the_model(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        model = info.data.get("model")
        if model is not None:
            compiled = str(train.torch_compile).lower()
            chosen = {"train.torch_compile": compiled, "model.quantization": model.quantization}
            for reason in conflicts(chosen, "train.torch_compile"):
                raise about("torch_compile", reason)
        return train

    @field_validator("engine")
    @classmethod
    def _engine_goes_with_the_optimizer(cls, engine: EngineConfig, info: ValidationInfo) -> EngineConfig:
        train = info.data.get("train")
        if train is not None:
            kind = "zero" if engine.asks_for_zero else engine.kind
            adapter = info.data.get("adapter")
            chosen = {"train.optim": train.optim, "engine.kind": kind}
            chosen |= {"train.torch_compile": str(train.torch_compile).lower()}
            chosen |= {"adapter.kind": adapter.kind} if adapter is not None else {}
            for reason in conflicts(chosen, "engine.kind"):
                raise about("kind", reason)
            for reason in conflicts(
                {"train.optim": train.optim, "engine.offload": str(engine.offload)}, "engine.offload"
            ):
                raise about("offload", reason)
        return engine

    @field_validator("scaling")
    @classmethod
    def _every_rank_has_a_slot(cls, scaling: ScalingConfig, info: ValidationInfo) -> ScalingConfig:
        train = info.data.get("train")
        if train is not None and scaling.bounds is not None and scaling.bounds[1] > train.global_batch:
            raise about(
                "num_workers",
                f"each worker needs at least one pack of the global batch, which has {train.global_batch}; "
                "lower it or raise train.global_batch",
            )
        return scaling
