"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) are spread over the ranks.

DeepSpeed is called directly: wrappers that start process groups of their own tell every rank of a CPU group that it is
alone. What is kept in checkpoints is read from DeepSpeed's partitions and written to them; its own checkpoints, which
are bound to a world size, are not used.
"""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raytune_ds.engines import MOMENTS, Piece, StepResult, Task
from raytune_ds.engines.adamw import adamw_settings, groups_of
from raytune_ds.engines.ds.config import ds_config
from raytune_ds.engines.ds.work import DsConfig, Facts
from raytune_ds.engines.fill import become, fill, move_buffers
from raytune_ds.errors import UserError, first_line
from raytune_ds.model.build import Built
from raytune_ds.model.weights import Read
from raytune_ds.world import World

KINDS = ("model", *MOMENTS)


class ZeroEngine:
    """See the module."""

    def __init__(self, task: Task) -> None:
        """Reads the model on rank 0, one parameter at a time, and hands it out.

        Raises:
            UserError: DeepSpeed's config contradicts ours, or it can't be built here.
        """
        made = _config(task)
        task.record(made.values)
        for note in made.notes:
            task.say(note)
        deepspeed = _import_deepspeed(task.world)
        module, world = task.built.module, task.world
        buffers = [buffer.clone() for buffer in module.buffers()]
        if made.stage == 3:
            _fill_partitioned(deepspeed, task.built, made, world)
        else:
            fill(module, task.built.read, world)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = _optimizer(task, made, trained)
        self.module, self._zero, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=made.values, dist_init_required=False
        )
        # DeepSpeed casts buffers too, and frequencies of rotary embeddings or biases of a router do not survive that.
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.data = value.to(world.device)
        self._world = world
        self._partitions: _Partitions = (_Partitions3 if made.stage == 3 else _Partitions12)(
            self._zero, trained, world
        )
        if made.values["bf16"]["enabled"]:
            # DeepSpeed makes its float32 parameters of the rounded ones.
            self._partitions.load(
                lambda n, a, b: task.built.read(n.removeprefix("model/"), a, b), 0, ("model",)
            )

    @property
    def updates(self) -> int:
        """See Engine."""
        return self._partitions.updates

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        last = self.module.is_gradient_accumulation_boundary()
        # DeepSpeed takes the mean over the ranks.
        self.module.backward(loss * self._world.size, scale_wrt_gas=False)
        if not last:
            self.module.step()  # counts the micro-batch, and does no more than that

    def step(self, lr: float, wanted: bool = True) -> StepResult:
        """See Engine."""
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_scale"]
        grad_norm = self._partitions.grad_norm()
        # DeepSpeed passes over the step where this says so. It looks by itself only at elements, and its float32 norm
        # may overflow where none of them does.
        self._zero.overflow = not (wanted and math.isfinite(grad_norm))
        self.module.step()
        return StepResult(grad_norm, skipped=self._zero.overflow)

    def pieces(self) -> Iterator[Piece]:
        """See Engine."""
        return self._partitions.pieces()

    def load(self, read: Read, updates: int) -> None:
        """See Engine."""
        self._partitions.load(read, updates)


# ------------------------------------------------------------------------------------------- starting it


def _config(task: Task) -> DsConfig:
    facts = Facts(
        train=task.train,
        engine=task.engine,
        world_size=task.world.size,
        micro_batch=task.micro_batch,
        accumulation=task.accumulation,
        global_batch=task.train.global_batch,
        hidden_size=task.built.base.config.hidden_size,
        num_parameters=sum(p.numel() for p in task.built.module.parameters()),
        bf16=task.built.module.dtype == torch.bfloat16,
        gpu=task.world.device.type == "cuda",
        total_steps=task.total_steps,
        warmup_steps=task.warmup_steps,
    )
    return ds_config(task.given, facts)


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, in the process group that is there."""
    _set_environment(world.device)
    world.require_group()
    for name, value in (
        ("RANK", world.rank),
        ("WORLD_SIZE", world.size),
        ("LOCAL_RANK", world.device.index or 0),
    ):
        os.environ.setdefault(name, str(value))
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # Its shared-memory collectives serve inference alone, and would be compiled for a minute on every new machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _set_environment(device: torch.device) -> None:
    """What DeepSpeed looks at while it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It would refuse to be imported where torch has CUDA and the machine has no CUDA compiler.
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")


def _fill_partitioned(deepspeed: Any, built: Built, made: DsConfig, world: World) -> None:
    """Reads, hands out and partitions one parameter after the other, so that no rank ever holds all of them."""
    move_buffers(built.module, world.device)
    deepspeed.zero.Init(module=_OneByOne(built, world), config_dict_or_path=made.values)


class _OneByOne(nn.Module):
    """What DeepSpeed asks for parameters: each gets its memory when its turn comes, and its values on rank 0.

    DeepSpeed itself broadcasts them before it keeps this rank's part.
    """

    def __init__(self, built: Built, world: World) -> None:
        super().__init__()
        self._built, self._world = (built,), world

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Of the built module."""
        (built,) = self._built
        for name, parameter in built.module.named_parameters():
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._world.device)
            if self._world.is_main:
                value.copy_(built.read(name, 0, value.numel()).view_as(value))
            become(parameter, value)
            yield parameter


def _optimizer(task: Task, made: DsConfig, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = groups_of(
        trained,
        task.train.weight_decay,
        task.built.lr_scales,
        ndim=lambda p: len(getattr(p, "ds_shape", p.shape)),
    )
    settings = adamw_settings(task.train)
    if not made.optimizer_on_cpu:
        return torch.optim.AdamW(groups, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    del settings["fused"]
    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def prepare(made: DsConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Compiles what DeepSpeed compiles on first use.

    Raises:
        UserError: it can't be compiled here.
    """
    _set_environment(device)
    try:
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder import CPUAdamBuilder
    except Exception as error:  # it looks for compilers, CUDA, MPI and more while it is imported
        raise UserError(
            f"engine.kind = zero: DeepSpeed can't be imported here: {first_line(error)}"
        ) from error
    if not made.optimizer_on_cpu:
        return

    if not installed_ops.get("cpu_adam"):
        say(
            "DeepSpeed's CPU optimizer is compiled when it is first used on a machine, which takes about a minute"
        )
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # from torch's C++ extensions, ninja, the compiler or the linker
        missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
        if device.type == "cuda" and os.environ.get("CUDA_HOME") is None and shutil.which("nvcc") is None:
            missing.append("the CUDA toolkit (nvcc, CUDA_HOME)")
        raise UserError(
            f"engine.offload = {made.offload}: DeepSpeed can't compile its CPU optimizer here"
            + (f" ({' and '.join(missing)} not found)" if missing else "")
            + ".\nInstall a C++ compiler and ninja on every node (apt install build-essential ninja-build), on GPU "
            "nodes the CUDA toolkit too, and start again: the first build takes about a minute. Or set "
            "engine.offload=none.\n" + first_line(error)
        ) from error


# -------------------------------------------------------------------------------------- what a rank keeps


class _Partitions(ABC):
    """The float32 parameters and moments that DeepSpeed keeps on this rank, by name."""

    def __init__(self, zero: Any, trained: Mapping[str, nn.Parameter], world: World) -> None:
        self._zero, self._trained, self._world = zero, trained, world
        # DeepSpeed makes the moments at the first step; a checkpoint may come before it.
        for flat in self._masters():
            is_torch = isinstance(zero.optimizer, torch.optim.AdamW)
            zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device) if is_torch else 0,
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }

    @abstractmethod
    def _masters(self) -> Iterable[torch.Tensor]:
        """The flat float32 tensors that the optimizer works on."""

    @property
    def updates(self) -> int:
        """Steps applied."""
        return max((int(state["step"]) for state in self._zero.optimizer.state.values()), default=0)

    def grad_norm(self) -> float:
        """2-norm of the whole gradient; infinite or NaN where its square has no place in a float32. A collective."""
        squares = [*self._squared_norms()]
        (square,) = self._world.sum(torch.stack(squares).sum() if squares else 0.0)
        return math.sqrt(square) if torch.tensor(square, dtype=torch.float32).isfinite() else math.inf

    def _squared_norms(self) -> Iterator[torch.Tensor]:
        """Of the parts of the gradient that are here; of offloaded ones DeepSpeed keeps the norms."""
        zero = self._zero
        if getattr(zero, "norm_for_param_grads", None):
            for norm in zero.norm_for_param_grads.values():
                yield torch.as_tensor(norm).double() ** 2
            return
        for parts in zero.averaged_gradients.values():
            for part in parts or ():
                yield torch.linalg.vector_norm(part.detach(), dtype=torch.float64) ** 2

    def _set_updates(self, updates: int) -> None:
        for state in self._zero.optimizer.state.values():
            # torch's AdamW has a tensor, DeepSpeed's a number.
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(updates)
            else:
                state["step"] = updates

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """See Engine."""

    @abstractmethod
    def load(self, read: Read, updates: int, kinds: Sequence[str] = KINDS) -> None:
        """See Engine; `kinds` of state that are taken."""


class _Partitions12(_Partitions):
    """Stages 1 and 2: the parameters lie end to end in a flat buffer, of which each rank keeps a range."""

    def __init__(self, zero: Any, trained: Mapping[str, nn.Parameter], world: World) -> None:
        super().__init__(zero, trained, world)
        zero._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> Iterable[torch.Tensor]:
        masters: Iterable[torch.Tensor] = self._zero.single_partition_of_fp32_groups
        return masters

    def pieces(self) -> Iterator[Piece]:
        """See Engine."""
        for kind, name, fragment in self._fragments():
            yield Piece(f"{kind}/{name}", fragment.lp_fragment_address.start, _state(fragment, kind))

    def load(self, read: Read, updates: int, kinds: Sequence[str] = KINDS) -> None:
        """See Engine."""
        for kind, name, fragment in self._fragments(kinds):
            state, start = _state(fragment, kind), fragment.lp_fragment_address.start
            state.copy_(read(f"{kind}/{name}", start, start + state.numel()))
        self._set_updates(updates)
        self._refresh()

    def _fragments(self, kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, str, Any]]:
        for name, parameter in self._trained.items():
            fragment = getattr(parameter, "_hp_mapping", None)
            if fragment is not None:  # none of it is this rank's
                for kind in kinds:
                    yield kind, name, fragment

    def _refresh(self) -> None:
        """What is computed with, from the float32 parameters: as at the end of DeepSpeed's own step."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        for mine, master in zip(
            zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            mine[self._world.rank].data.copy_(master.data)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


def _state(fragment: Any, kind: str) -> torch.Tensor:
    state = fragment.get_hp_fragment(None if kind == "model" else kind)
    assert isinstance(state, torch.Tensor)
    return state.detach()


class _Partitions3(_Partitions):
    """Stage 3: each parameter is cut into as many equal ranges as there are ranks, the last one padded."""

    def _masters(self) -> Iterable[torch.Tensor]:
        masters: Iterable[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
        return masters

    def pieces(self) -> Iterator[Piece]:
        """See Engine."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for name, parameter in self._trained.items():
            start, stop = self._range(parameter)
            if start < stop:
                yield Piece(
                    f"model/{name}", start, safe_get_local_fp32_param(parameter).detach()[: stop - start]
                )
                for moment in MOMENTS:
                    state = safe_get_local_optimizer_state(parameter, moment)
                    yield Piece(f"{moment}/{name}", start, state[: stop - start])

    def load(self, read: Read, updates: int, kinds: Sequence[str] = KINDS) -> None:
        """See Engine."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in self._trained.items():
            for kind in kinds:
                value = self._padded(read, f"{kind}/{name}", parameter)
                if kind == "model":
                    safe_set_local_fp32_param(parameter, value)
                else:
                    safe_set_local_optimizer_state(parameter, value, kind)
        self._set_updates(updates)
        self._refresh()

    def _range(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.ds_numel
        start = min(parameter.ds_numel, self._world.rank * size)
        return start, min(parameter.ds_numel, start + size)

    def _padded(self, read: Read, name: str, parameter: Any) -> torch.Tensor:
        start, stop = self._range(parameter)
        value = torch.zeros(parameter.ds_tensor.ds_numel)
        if start < stop:
            value[: stop - start] = read(name, start, stop)
        return value

    def _refresh(self) -> None:
        """What is computed with, from the float32 parameters: as at the end of DeepSpeed's own step."""
        parameters: Iterable[Any] = self._trained.values()
        for parameter in parameters:
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.invalidate_secondary_tensor()
