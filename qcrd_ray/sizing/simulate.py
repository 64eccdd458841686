"""The memory of a forward and backward pass, by running the model's own code on tensors that have no data."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE_BLOCK = 32 * 2**20
"""glibc gives freed blocks of this size (its largest mmap threshold) back to the system, and keeps smaller ones."""


@dataclass(frozen=True)
class Blocks:
    """Bytes, by what becomes of them when they are freed: `large` goes to the system, `small` stays in the heap."""

    small: int = 0
    large: int = 0

    @property
    def total(self) -> int:
        return self.small + self.large

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks(self.small + other.small, self.large + other.large)

    @classmethod
    def of(cls, *sizes: float) -> Blocks:
        small = sum(int(size) for size in sizes if size < LARGE_BLOCK)
        return cls(small, sum(int(size) for size in sizes) - small)


@dataclass(frozen=True)
class PassMemory:
    """Peaks of one pass: of all tensors together, of small and of large blocks each by themselves."""

    peak: int
    small: int
    large: int

    def less(self, size: int) -> PassMemory:
        """Without so many bytes, of small blocks first."""
        small = max(0, self.small - size)
        return PassMemory(max(0, self.peak - size), small, max(0, self.large - max(0, size - self.small)))


class _Live(TorchDispatchMode):
    """Counts the storages that operations make, as long as anything holds them.

    Args:
        selected: rows that an index by a boolean mask selects, which tensors without data cannot tell.
    """

    def __init__(self, selected: int) -> None:
        super().__init__()
        self.selected = selected
        self.sizes: dict[int, int] = {}
        self.small = self.large = self.peak = self.small_peak = self.large_peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        fake = bool(args) and isinstance(args[0], FakeTensor)
        if fake and function is aten._local_scalar_dense.default:
            return False
        if fake and function is aten.index.Tensor and _is_mask(args[1]):
            made = args[0].new_empty((self.selected, *args[0].shape[args[1][0].dim() :]))
        elif fake and function in (aten.index_put.default, aten._index_put_impl_.default) and _is_mask(args[1]):
            made = torch.empty_like(args[0])
        else:
            made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        weakref.finalize(storage, self._free, key)
        self._add(size)
        self.peak = max(self.peak, self.small + self.large)
        self.small_peak, self.large_peak = max(self.small_peak, self.small), max(self.large_peak, self.large)

    def _free(self, key: int) -> None:
        self._add(-self.sizes.pop(key))

    def _add(self, size: int) -> None:
        if abs(size) < LARGE_BLOCK:
            self.small += size
        else:
            self.large += size


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def without_data() -> FakeTensorMode:
    """A context in which modules are made, and passes run, on tensors that have shapes and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def pass_memory(forward: Callable[[], Tensor], selected: int, *, backward: bool) -> PassMemory:
    """Peaks of what `forward` allocates and, with `backward`, its backward pass: gradients of the weights among it.

    Args:
        forward: runs a module that was made `without_data`; its sum is the loss.
    """
    live = _Live(selected)
    with warnings.catch_warnings(), torch.set_grad_enabled(backward), live:
        warnings.simplefilter("ignore")
        result = forward()
        if backward:
            result.sum().backward()
    return PassMemory(live.peak, live.small_peak, live.large_peak)
