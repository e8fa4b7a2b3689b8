"""Count the memory traffic of the package: each element that a kernel loads or stores, by launch and tensor.

The kernels run under Triton's interpreter.  Every launch of the package goes through `fastlora.kernels.launch.launch`, and
every access of a kernel, descriptors included, through four methods of Triton's InterpreterBuilder.  `counted()` watches both.
Masked elements do not count, nor the part of a descriptor's block outside the tensor: a GPU does not request them.  An access
outside every tensor of the launch is an error.

Operations of torch between the kernels, a cuBLAS GEMM, a copy, a cast, are launches too.  Their accesses cannot be counted, so
they are recorded with their compulsory traffic: each operand once.  The package's own operators are not such operations: what
they run is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.lib.stride_tricks import as_strided
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora import ops
from fastlora.blocks import group, mlp_ops
from fastlora.kernels import launch as launching

ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# The package's own operators -> what they run.
STEPS: dict[Any, Callable[..., Any]] = {
    ops.LORA_LINEAR: ops.forward,
    ops.LORA_LINEAR_BACKWARD: ops.backward,
    group.LORA_LINEARS: group.forward,
    group.LORA_LINEARS_BACKWARD: group.backward,
    mlp_ops.LORA_MLP: mlp_ops.forward,
    mlp_ops.LORA_MLP_BACKWARD: mlp_ops.backward,
}
OVERWRITING = {"copy_", "fill_", "zero_"}  # they write in place without reading


class Operand:
    """One tensor of a launch, with the number of loads and stores of each element."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.itemsize = tensor.element_size()
        self.address = tensor.data_ptr()
        self.shape, self._strides = tuple(tensor.shape), tensor.stride()
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self._loads, self._stores = np.zeros((2, span if tensor.numel() else 0), dtype=np.int32)

    @property
    def loads(self) -> np.ndarray:
        """In the shape of the tensor."""
        return self._in_shape(self._loads)

    @property
    def stores(self) -> np.ndarray:
        """In the shape of the tensor."""
        return self._in_shape(self._stores)

    @property
    def bytes_loaded(self) -> int:
        return int(self._loads.sum()) * self.itemsize

    @property
    def bytes_needed(self) -> int:
        """Bytes loaded at least once: the loads of a launch with a perfect cache."""
        return int(np.count_nonzero(self._loads)) * self.itemsize

    @property
    def bytes_stored(self) -> int:
        return int(self._stores.sum()) * self.itemsize

    def holds(self, first: int, last: int) -> bool:
        """Whether both addresses lie between the tensor's first and last element."""
        return self.address <= first and last < self.address + self._loads.size * self.itemsize

    def count(self, addresses: np.ndarray, stored: bool) -> None:
        np.add.at(self._stores if stored else self._loads, (addresses - self.address) // self.itemsize, 1)

    def _in_shape(self, counts: np.ndarray) -> np.ndarray:
        return as_strided(counts, self.shape, [stride * counts.itemsize for stride in self._strides])


@dataclass
class CountedLaunch:
    """One launch of a kernel, with counted accesses, or (`counted` False) one operation of torch, with compulsory traffic."""

    kernel: str
    grid: tuple[int, ...]
    operands: list[Operand]
    counted: bool
    constexprs: dict[str, Any] = field(default_factory=dict)
    atomics: int = 0

    def __getitem__(self, name: str) -> Operand:
        return next(operand for operand in self.operands if operand.name == name)

    def total(self, quantity: str) -> int:
        """The sum of bytes_loaded, bytes_needed or bytes_stored over the operands."""
        return sum(getattr(operand, quantity) for operand in self.operands)

    def count(self, pointers: np.ndarray, mask: np.ndarray, stored: bool) -> None:
        addresses = np.broadcast_to(pointers, mask.shape)[mask]
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max())
        operand = next((operand for operand in self.operands if operand.holds(first, last)), None)
        if operand is None:
            raise IndexError(f"{self.kernel} {'stores to' if stored else 'loads from'} memory outside the tensors it was given")
        operand.count(addresses, stored)


@contextmanager
def counted() -> Iterator[list[CountedLaunch]]:
    """Count every launch inside.  Yields the list of the launches, in order.

    Raises:
        RuntimeError: a kernel is not interpreted.
        ValueError: two arguments of a launch share memory.
        InterpreterError: an access lies outside the tensors of its launch.
    """
    launches: list[CountedLaunch] = []
    operations = _Operations(launches)
    launch = launching.launch

    def count_launch(plan: launching.Plan, *args: Any) -> None:
        kernel = plan.kernel
        if not isinstance(kernel, InterpretedFunction):
            raise RuntimeError(f"{kernel} is not interpreted: set TRITON_INTERPRET=1 before the kernels are imported")
        if 0 not in plan.grid:
            constexprs = {name: value for name, value in plan.options.items() if name in kernel.arg_names}
            name = kernel.__name__.removesuffix("_kernel")
            launches.append(CountedLaunch(name, plan.grid, _operands(kernel.arg_names, args), True, constexprs))
        with operations.paused():
            launch(plan, *args)

    def counting(method: str, count: Callable[..., None]) -> Any:
        original = getattr(InterpreterBuilder, method)

        def access(builder: InterpreterBuilder, *args: Any, **keywords: Any) -> Any:
            count(*args, **keywords)
            return original(builder, *args, **keywords)

        return patch.object(InterpreterBuilder, method, access)

    def load(pointers: Any, mask: Any, *_: Any, **__: Any) -> None:
        launches[-1].count(pointers.data, mask.data, stored=False)

    def store(pointers: Any, value: Any, mask: Any, *_: Any, **__: Any) -> None:
        launches[-1].count(pointers.data, mask.data, stored=True)

    def atomic(*_: Any, **__: Any) -> None:
        launches[-1].atomics += 1

    with ExitStack() as stack:
        stack.enter_context(patch.object(launching, "launch", count_launch))
        stack.enter_context(counting("create_masked_load", load))
        stack.enter_context(counting("create_masked_store", store))
        stack.enter_context(counting("create_atomic_rmw", atomic))
        stack.enter_context(counting("create_atomic_cas", atomic))
        stack.enter_context(operations)
        yield launches


def _operands(names: Sequence[str], args: Sequence[Any]) -> list[Operand]:
    tensors = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args]
    named = [(name, tensor) for name, tensor in zip(names, tensors, strict=False) if isinstance(tensor, Tensor)]
    operands = [Operand(name, tensor) for name, tensor in named if tensor.numel()]
    for index, operand in enumerate(operands):
        for other in operands[:index]:
            if other.holds(operand.address, operand.address) or operand.holds(other.address, other.address):
                raise ValueError(f"arguments {other.name} and {operand.name} share memory: their accesses cannot be told apart")
    return operands


class _Operations(TorchDispatchMode):
    """Records the operations of torch that do work on a device: all but views and allocations."""

    def __init__(self, launches: list[CountedLaunch]) -> None:
        super().__init__()
        self._launches = launches
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is recorded: the interpreter itself uses torch."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in STEPS:
            with self:
                return STEPS[func](*args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not self._paused and not is_view and name not in ALLOCATIONS:
            self._launches.append(CountedLaunch(name, (), _compulsory(func._schema, args, kwargs, result), False))
        return result


def _compulsory(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Operand]:
    """The operands of an operation: inputs are loaded once, outputs stored once, tensors updated in place both."""
    operands = []
    values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        value = values.get(argument.name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor):
                operand = Operand(argument.name, tensor)
                written = argument.alias_info is not None and argument.alias_info.is_write
                overwritten = argument.name == "out" or schema.name.removeprefix("aten::") in OVERWRITING
                operand.stores[...] = written
                operand.loads[...] = not (written and overwritten)
                operands.append(operand)
    for output in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(output, Tensor) and not any(output.data_ptr() == operand.address for operand in operands):
            operands.append(Operand("result", output))
            operands[-1].stores[...] = True
    return operands
