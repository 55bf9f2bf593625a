"""Data parallel: every rank holds all parameters, and the gradients are summed once an optimizer step.

The gradients live in one flat buffer that `parameter.grad` are views of. So the sum over ranks is one collective
without a copy, its norm is one call, and a parameter that took no part (an expert without tokens) simply has a gradient
of zero. torch's DistributedDataParallel would overlap the collective with the backward pass, at the price of a wrapper
that averages, wants every forward pass to go through it, and has to be told which micro-batch is the last. For
adapters, which are small, there is nothing to overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from raytune_ds.config import TrainConfig
from raytune_ds.engines import StepResult
from raytune_ds.errors import UserError
from raytune_ds.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class DdpEngine:
    """See the module."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        """Takes over the gradients of all trainable parameters of `module`, on every rank those of rank 0."""
        self.module = module
        self._world = world
        self._max_grad_norm = config.max_grad_norm
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._gradient = self._flatten_gradients()
        self._optimizer = torch.optim.AdamW(
            decay_groups(self._parameters, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        if world.size > 1:
            for parameter in self._parameters.values():
                dist.broadcast(parameter.data, src=0)

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        loss.backward()

    def step(self, lr: float) -> StepResult:
        """See Engine."""
        if self._world.size > 1:
            dist.all_reduce(self._gradient)
        grad_norm = float(torch.linalg.vector_norm(self._gradient))
        finite = grad_norm == grad_norm and grad_norm != float("inf")
        if finite:
            if 0 < self._max_grad_norm < grad_norm:
                self._gradient.mul_(self._max_grad_norm / grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._gradient.zero_()
        return StepResult(grad_norm, skipped=not finite)

    def state(self) -> dict[str, torch.Tensor]:
        """See Engine. All ranks hold the same, so each hands out every world-size-th parameter."""
        state = {}
        for name, parameter in list(self._parameters.items())[self._world.rank :: self._world.size]:
            state[f"model/{name}"] = parameter.detach()
            if moments := self._optimizer.state.get(parameter):
                state |= {f"{moment}/{name}": moments[moment] for moment in MOMENTS}
                state[f"step/{name}"] = moments["step"].reshape(1)
        return state

    def load_state(self, read: Callable[[str], torch.Tensor], names: Mapping[str, torch.Size]) -> None:
        """See Engine."""
        expected = {f"model/{name}": p.shape for name, p in self._parameters.items()}
        require_same_parameters(expected, {n: s for n, s in names.items() if n.startswith("model/")})
        # In the order of the files, because a reader holds one file at a time.
        for full_name in names:
            kind, _, name = full_name.partition("/")
            parameter = self._parameters[name]
            if kind == "model":
                parameter.data.copy_(read(full_name))
            else:
                like = torch.zeros((), device=parameter.device) if kind == "step" else parameter
                value = torch.empty_like(like).copy_(read(full_name).reshape(like.shape))
                self._optimizer.state[parameter][kind] = value

    def _flatten_gradients(self) -> torch.Tensor:
        parameters = list(self._parameters.values())
        gradient = torch.zeros(
            sum(p.numel() for p in parameters), dtype=torch.float32, device=self._world.device
        )
        start = 0
        for parameter in parameters:
            parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return gradient


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices, none for norms and biases, as the Hugging Face trainer has it."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def require_same_parameters(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Refuses the checkpoint of another model or adapter.

    Raises:
        UserError: names or shapes differ.
    """
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    changed = [n for n in expected if n in found and expected[n] != found[n]]
    if not (missing or foreign or changed):
        return
    lines = ["the checkpoint is of another model or adapter:"]
    lines += [f"  {n}: {list(found[n])} there, {list(expected[n])} here" for n in changed[:3]]
    lines += [f"  {n}: not in the checkpoint" for n in missing[:3]]
    lines += [f"  {n}: in the checkpoint only" for n in foreign[:3]]
    lines.append("Take the model and adapter settings it was made with, or another run.name to start anew.")
    raise UserError("\n".join(lines))
