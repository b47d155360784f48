"""Operations of a float64 pass that make its result depend on more than its inputs: narrowing and random numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizers_mm._check import fail

NARROW = (torch.float32, torch.bfloat16, torch.float16)

EXACT = ("arange", "empty", "eye", "fill", "full", "lift_fresh", "ones", "scalar_tensor", "zeros", "copy_")
"""Beginnings of the names of operations that may make float32 values in a float64 pass: small whole numbers."""

RANDOM = ("bernoulli", "dropout", "multinomial", "normal", "rand", "uniform")
"""Beginnings of the names of operations that draw random numbers."""


class Watcher(TorchDispatchMode):
    """Notes operations that make a float64 pass depend on more than its inputs: narrowing and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode operations arrive whole: a dropout that is off, for example
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.lstrip("_")
        outputs = result if isinstance(result, (tuple, list)) else [result]
        dtypes = {item.dtype for item in outputs if isinstance(item, Tensor)}
        given = [item for item in args if isinstance(item, Tensor)]
        only_whole = bool(given) and not any(item.is_floating_point() for item in given)  # from ids, exact
        narrow = bool(dtypes & set(NARROW)) and not name.startswith(EXACT) and not only_whole
        if func.namespace == "aten" and (narrow or name.startswith(RANDOM)):
            self.found.append(name)
        return result

    def refuse(self) -> None:
        """Raise the ValueError for what was found, if anything was."""
        if self.found:
            names = ", ".join(list(dict.fromkeys(self.found))[:4])
            fail("stable", "an encoder that computes in float64 throughout, without chance", f"the operations {names}")
