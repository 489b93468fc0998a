"""What makes of a model one that is trained by all ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_ddp.distributed.context import DistContext


def wrap(model: nn.Module, context: DistContext) -> nn.Module:
    """`model` as DDP trains it; itself in a single process.

    `model` must be on the context's device and have the same weights on every rank: DDP does not send them again.
    """
    if context.world_size == 1:
        return model
    device_ids = [context.device.index] if context.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, init_sync=False, gradient_as_bucket_view=True)


def grad_sync(model: nn.Module, *, sync: bool) -> AbstractContextManager[None]:
    """The context of one micro-step, forward *and* backward: gradients are reduced over the ranks only if `sync`."""
    if sync or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def release(model: nn.Module) -> None:
    """Take apart what DDP made, before the process group is destroyed; `model` trains no more.

    DDP's reducer shares the group. Were it the last to let go, it would wait for gloo's threads while it holds Python's
    lock, which such a thread may need to forget its last collective: a rank that has finished would hang for ever.
    """
    if isinstance(model, DistributedDataParallel):
        del model.reducer, model.logger
