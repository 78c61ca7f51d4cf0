"""The memory's part of a transformers cache: a SequenceState that the cache object itself carries.

Whatever transformers does to a cache is done to the state too: it reorders beams, takes tokens
back, repeats and selects sequences, resets, and copies. So the last ids of each sequence travel
with the cache, and the model holds no request state. The cache keeps its layers, one for each layer
of the model. Its class becomes a subclass that does to the state what is done to all layers.
"""

from __future__ import annotations

import copyreg
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from ..errors import InputError
from ..memory.memory import EngramMemory
from ..memory.state import SequenceState
from .versions import PAGES


@dataclass
class CachedState:
    """What a cache carries for a memory.

    Attributes:
        address_digest: Address digest of the memory.
        margin: How many tokens can be taken back.
        state: None until the first forward that uses it.
        whole: False within a forward, and after one that an error cut short.
    """

    address_digest: str
    margin: int
    state: SequenceState | None = None
    whole: bool = True


_Base: Any = Cache if TYPE_CHECKING else object


class _Carrying(_Base):
    """Mixed into the class of a cache that carries a memory's state."""

    engraphy: CachedState

    def crop(self, tokens_to_remove: int) -> None:
        """Take back -tokens_to_remove tokens.

        Raises StateTooShort beyond the margin, and the cache stays as it is.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop: expected minus the number of tokens to take back, found {tokens_to_remove}"
            )
        if self.engraphy.state is not None:
            self.engraphy.state.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        if self.engraphy.state is not None:
            self.engraphy.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.engraphy.state is not None:
            self.engraphy.state.repeat(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        if self.engraphy.state is not None:
            self.engraphy.state.select(indices)

    def reset(self) -> None:
        super().reset()
        self.engraphy.state = None
        self.engraphy.whole = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the cache's own class, because this one is made at run time."""
        _, (kind, *arguments), *rest = super().__reduce_ex__(max(int(protocol), 2))
        own_class = kind.__mro__[2]  # after the class that _carrying made, and _Carrying
        return _new, (own_class, *arguments), *rest


@functools.cache
def _carrying(kind: type[Cache]) -> type[Cache]:
    """The subclass of a class of caches that carries a state, under the same name."""
    return type(
        kind.__name__, (_Carrying, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
    )


def _new(kind: type[Cache], *arguments: Any) -> Cache:
    make: Any = copyreg.__newobj__  # pyright: ignore[reportAttributeAccessIssue]
    return make(_carrying(kind), *arguments)


def cached_state(cache: Any) -> CachedState | None:
    """Returns what a cache carries for a memory; None if it carries nothing, or is None itself."""
    return getattr(cache, "engraphy", None)


def counts_tokens(cache: Cache) -> bool:
    """Whether any layer of a cache knows how many tokens it has seen.

    The layers of state-space models do not.
    """
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    return grows or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def tokens_seen(cache: Any) -> int:
    """Number of tokens that a cache holds; 0 if `cache` is None.

    Raises InputError unless it is the Cache of a decoder with attention.
    """
    if cache is None:
        return 0
    if not _is_decoders(cache) or not counts_tokens(cache):
        raise InputError(
            "cache: expected a Cache of a decoder with attention, with which a memory's state can "
            f"travel, found {type(cache).__name__}; {PAGES}"
        )
    return int(cache.get_seq_length())


def reserve(cache: Any, memory: EngramMemory, margin: int) -> None:
    """Let an empty cache carry the memory's part, for a forward that leaves the memory out.

    Any other cache stays as it is, because only the model uses it.
    """
    if not _is_decoders(cache):
        return
    if cached_state(cache) is None and counts_tokens(cache) and not cache.get_seq_length():
        _carry(cache, memory, margin)


def _is_decoders(cache: Any) -> bool:
    return isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache)


def _carry(cache: Cache, memory: EngramMemory, margin: int) -> CachedState:
    cache.__class__ = _carrying(type(cache))
    carried = CachedState(memory.address_digest, margin)
    cache.engraphy = carried  # pyright: ignore[reportAttributeAccessIssue]
    return carried


def ready_state(
    cache: Cache, memory: EngramMemory, batch: int, seen: int, margin: int
) -> CachedState:
    """Returns what `cache` carries for `memory`. The first call makes it.

    Args:
        cache: The cache of the call.
        memory: The attached memory.
        batch: Number of sequences.
        seen: Number of tokens in the cache.
        margin: How many tokens can be taken back.

    Raises:
        InputError: The cache has seen tokens that the memory has not (it was filled before the
            memory was attached, or by another model), an error has left it half filled, or it
            belongs to another memory.
    """
    carried = cached_state(cache)
    if carried is None:
        if seen:
            raise InputError(
                f"cache: it came with {seen} tokens that the memory has not seen. Either it was "
                "filled before the memory was attached or by another model: fill it with this one. "
                "Or it holds virtual tokens (prefix tuning), which have no ids to look up: detach "
                "the memory, or use an adapter that leaves the cache alone, such as LoRA"
            )
        carried = _carry(cache, memory, margin)
    if carried.address_digest != memory.address_digest:
        raise InputError(
            f"cache: expected one of a memory with address digest {memory.address_digest}, "
            f"found {carried.address_digest}"
        )
    if not carried.whole:
        raise InputError(
            "cache: an error cut short the forward that filled it, and some layers have seen more "
            "than others; reset it, or use a new one"
        )
    if carried.state is None:
        carried.state = memory.state(batch, margin)
    if seen != carried.state.length:
        raise InputError(
            f"cache: the model has seen {seen} tokens, the memory {carried.state.length}; use a "
            "cache that was filled by this model with the memory attached and not disabled"
        )
    return carried
