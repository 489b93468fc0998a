"""What tensors take of memory while something runs, counted by their storages."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the most bytes that lived at once of the tensors which operations of this thread took or
    gave."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self._seen[StorageWeakRef(storage)] = storage.nbytes()
        self._seen = {storage: size for storage, size in self._seen.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._seen.values()))
        return result
