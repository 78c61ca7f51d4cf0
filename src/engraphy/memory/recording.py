"""Records what the blocks of a model return, in a Trace: for any model whose blocks are modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .lookup import Trace


@contextmanager
def recorded(blocks: Sequence[nn.Module], trace: Trace) -> Iterator[None]:
    """Fills `trace.hidden` in the forwards inside the `with`.

    Args:
        blocks: The blocks of a model, in order. Each returns the hidden states, [B, T, ...].
        trace: Gets copies, detached, by layer.

    Raises:
        InputError: In a forward: a block returns something else than a tensor.
    """
    with ExitStack() as hooks:
        for layer, block in enumerate(blocks):
            handle = block.register_forward_hook(partial(_record, trace, layer))
            hooks.callback(handle.remove)
        yield


def _record(trace: Trace, layer: int, block: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise InputError(
            f"layer {layer}: expected a block that returns the hidden states, "
            f"found one that returns a {type(output).__name__}"
        )
    trace.hidden[layer] = output.detach().clone()
