"""What a forward and backward pass takes of memory, known before the model has weights.

The pass is run on fake tensors, which have shapes and no values, and what would be allocated and freed is counted. That
is what a CPU allocates to the byte (tests/unit/test_footprint.py); a GPU's kernels keep the same tensors, and their own
scratch space is not seen. Layers of a kind are alike, so few of each kind are run, and the cost does not grow with the
model, nor with the tokens.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_ds.data.batch import Batch, collate
from raytune_ds.model import crossentropy
from raytune_ds.model.build import Built


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass takes, in bytes.

    Attributes:
        kept: after the forward pass, for the backward pass.
        peak: the most at any time; the gradients that add up over passes, and the batch, do not count.
    """

    kept: int
    peak: int


def foreseen(built: Built, tokens: int, autocast: bool = True, device: str = "cpu") -> Pass:
    """What a pass over `tokens` tokens, all of them trained on, would take; the model needs no weights.

    Args:
        built: its layers recompute what they will.
        tokens: of the micro-batch.
        autocast: see model/packed; False: trained parameters are cast by the engine before they are used.
        device: the kind that it will run on.

    Raises:
        Exception: of any kind: the model's code looks at values, or uses what knows no fake tensors.
    """
    run, left = _chosen(built.blocks)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    live, exits = LiveBytes(), list[int]()
    cast = None if autocast else built.module.dtype
    with ExitStack() as stack:
        room = crossentropy.ROOM.get(device, crossentropy.ROOM["cuda"])
        stack.enter_context(mock.patch.dict(crossentropy.ROOM, cpu=room))
        stack.enter_context(_only(built, run))
        stack.enter_context(_without_values(built.module, mode, cast))
        batch = _fake(one_document(tokens), mode)
        for block in run:
            hook = block.register_forward_hook(lambda *_: exits.append(live.now))
            stack.callback(hook.remove)
        stack.enter_context(mode)
        stack.enter_context(live)
        loss = built.module.train()(batch).sum()
        kept, after = live.now, exits[: len(run)]
        loss.backward()
    each = {
        _kind(block): later - earlier
        for block, (earlier, later) in zip(run[1:], pairwise(after), strict=True)
    }
    more = sum(each[kind] * count for kind, count in left.items())
    # The peak comes while the last layer of some kind goes back, when what lies before it is still kept: layers that
    # are not run add no more to it than they keep.
    return Pass(kept + more, live.peak + more)


def gathered(built: Built) -> int:
    """Bytes of the parameters, and of their gradients, that a rank holds at once which otherwise has a part of each.

    These are two layers, one of them fetched ahead of time, and what lies outside of all layers.
    """
    blocks = [_whole(built, block.parameters()) for block in built.blocks]
    return _whole(built, built.module.parameters()) - sum(blocks) + 2 * max(blocks, default=0)


def _whole(built: Built, parameters: Iterator[nn.Parameter]) -> int:
    size = built.module.dtype.itemsize
    # A gradient in what is computed in, and in float32, in which it is summed.
    trained, frozen = size + size + 4, lambda p: p.dtype.itemsize
    return sum(p.numel() * (trained if p.requires_grad else frozen(p)) for p in parameters)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, and that are still there.

    Attributes:
        now: bytes.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation of torch and looks at what it returns."""
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)  # was there before
        result = _run(function, args, kwargs or {})
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    is_fake = bool(args) and isinstance(args[0], FakeTensor)
    if is_fake and function is torch.ops.aten._grouped_mm.default:
        # Real tensors may be float32, but the shape of a result is known for bfloat16 only.
        first, second, *others = args
        return function(first.bfloat16(), second.bfloat16(), *others, **kwargs).to(first.dtype)
    if is_fake and function is torch.ops.aten.allclose.default:
        return True  # a trained head's losses are multiplied by what it expects (model/crossentropy)
    return function(*args, **kwargs)


def _chosen(blocks: Sequence[nn.Module]) -> tuple[list[nn.Module], Counter[Any]]:
    """The layers that are run, the first and the last of each kind, and of each kind how many are not."""
    first, last = dict[Any, int](), dict[Any, int]()
    for number, block in enumerate(blocks):
        kind = _kind(block)
        first.setdefault(kind, number)
        last[kind] = number
    run = [blocks[number] for number in sorted({*first.values(), *last.values()})]
    return run, Counter(map(_kind, blocks)) - Counter(map(_kind, run))


def _kind(block: nn.Module) -> Any:
    """What tells a layer from others that keep something else."""
    parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), getattr(block, "gradient_checkpointing", False), tuple(parameters)


@contextmanager
def _only(built: Built, run: Sequence[nn.Module]) -> Iterator[None]:
    """The model with some of its layers alone."""
    (container,) = (
        m for m in built.base.modules() if isinstance(m, nn.ModuleList) and tuple(m) == built.blocks
    )
    whole = container._modules
    container._modules = {str(number): block for number, block in enumerate(run)}
    try:
        yield
    finally:
        container._modules = whole


@contextmanager
def _without_values(module: nn.Module, mode: FakeTensorMode, cast: torch.dtype | None) -> Iterator[None]:
    """The module with fake tensors for parameters and buffers; those that are trained have gradients, in `cast` too."""
    tables: list[dict[str, Any]] = [t for part in module.modules() for t in (part._parameters, part._buffers)]
    before = [dict(table) for table in tables]
    fakes: dict[int, torch.Tensor | None] = {id(None): None}
    for tensor in (tensor for table in tables for tensor in table.values() if tensor is not None):
        if id(tensor) not in fakes:
            with mode:
                fakes[id(tensor)] = _stand_in(tensor, cast)
    for table in tables:
        table.update({name: fakes[id(tensor)] for name, tensor in table.items()})
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)


def _stand_in(tensor: torch.Tensor, cast: torch.dtype | None) -> torch.Tensor:
    # All on the CPU, whatever the device: autocast and attention keep the same there.
    dtype = (cast if tensor.requires_grad else None) or tensor.dtype
    fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fake.grad = torch.empty_like(fake) if tensor.requires_grad else None
    return fake


def one_document(tokens: int) -> Batch:
    """A batch that is trained on whole. Attention keeps as much of one long document as of many short ones."""
    row = np.zeros(tokens, np.int64)
    each = {"lengths": np.array([tokens]), "docs": np.zeros(1, np.int64)}
    return collate([{"ids": row, "targets": row, "weights": np.ones(tokens), **each}])


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Without values, but for the lengths of documents, by which attention cuts the row."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "segments"}
    tensors: dict[str, Any] = {
        n: mode.from_tensor(v) for n, v in values.items() if isinstance(v, torch.Tensor)
    }
    return replace(batch, **tensors)
