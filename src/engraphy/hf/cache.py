"""The memory's part of a transformers cache: a SequenceState that the cache object itself carries.

Whatever transformers does to a cache (beams reordered, tokens taken back, sequences repeated or
selected, everything reset, copies made) is done to the state too. The last ids of each sequence
thus travel with the cache, and the model holds no request state. The cache keeps its layers as they
are, one for each of the model's: its class becomes a subclass of its own that hands on to the state
what is done to all layers.
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
    """What a cache carries for a memory. state: made by the first forward that uses it. whole:
    False within a forward, and after one that an error cut short."""

    address_digest: str
    margin: int
    state: SequenceState | None = None
    whole: bool = True


_Base: Any = Cache if TYPE_CHECKING else object


class _Carrying(_Base):
    """Mixed into the class of a cache that carries a memory's state."""

    engraphy: CachedState

    def crop(self, tokens_to_remove: int) -> None:
        """Take back -tokens_to_remove tokens. Raises StateTooShort beyond the margin: the cache
        stays as it is."""
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
        self.engraphy.state, self.engraphy.whole = None, True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the cache's own class, since this one is made when it is needed."""
        _, (kind, *arguments), *rest = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (kind.__mro__[2], *arguments), *rest


@functools.cache
def _carrying(kind: type[Cache]) -> type[Cache]:
    return type(
        kind.__name__, (_Carrying, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
    )


def _new(kind: type[Cache], *arguments: Any) -> Cache:
    return copyreg.__newobj__(_carrying(kind), *arguments)  # pyright: ignore[reportAttributeAccessIssue]


def cached_state(cache: Any) -> CachedState | None:
    """What a cache carries; None if it carries nothing, or where there is no cache."""
    return getattr(cache, "engraphy", None)


def counts_tokens(cache: Cache) -> bool:
    """Whether any layer of a cache knows how many tokens it has seen: those of state-space models
    do not."""
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    return grows or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def tokens_seen(cache: Any) -> int:
    """How many tokens a cache holds; 0 without one. Raises InputError for what is no Cache of a
    decoder."""
    if cache is None:
        return 0
    if (
        not isinstance(cache, Cache)
        or isinstance(cache, EncoderDecoderCache)
        or not counts_tokens(cache)
    ):
        raise InputError(
            "cache: expected a Cache of a decoder with attention, with which a memory's state can travel, "
            f"found {type(cache).__name__}; {PAGES}"
        )
    return int(cache.get_seq_length())


def reserve(cache: Any, memory: EngramMemory, margin: int) -> None:
    """Make an empty cache what it is with the memory, for tokens that the memory does not see.

    Any other cache stays as it is: it is the model's own matter.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return
    if cached_state(cache) is None and counts_tokens(cache) and not cache.get_seq_length():
        _carry(cache, memory, margin)


def _carry(cache: Cache, memory: EngramMemory, margin: int) -> CachedState:
    cache.__class__ = _carrying(type(cache))
    carried = CachedState(memory.address_digest, margin)
    cache.engraphy = carried  # pyright: ignore[reportAttributeAccessIssue]
    return carried


def ready_state(
    cache: Cache, memory: EngramMemory, batch: int, seen: int, margin: int
) -> CachedState:
    """What `cache` carries for `memory`; on the first call it is made. seen: tokens in the cache.

    Raises InputError for a cache that has seen tokens which the memory has not (filled before the
    memory was attached, or by another model), for one that an error left half filled, and for one
    that belongs to another memory.
    """
    carried = cached_state(cache)
    if carried is None:
        if seen:
            raise InputError(
                f"cache: it came with {seen} tokens that the memory has not seen. Either it was filled "
                "before the memory was attached or by another model: fill it with this one. Or it holds "
                "virtual tokens (prefix tuning), which have no ids to look up: detach the memory, or use "
                "an adapter that leaves the cache alone, such as LoRA"
            )
        carried = _carry(cache, memory, margin)
    if carried.address_digest != memory.address_digest:
        raise InputError(
            f"cache: belongs to a memory of address digest {carried.address_digest}, "
            f"this one has {memory.address_digest}"
        )
    if not carried.whole:
        raise InputError(
            "cache: an error cut short the forward that filled it, and some layers have seen more than "
            "others; reset it, or use a new one"
        )
    if carried.state is None:
        carried.state = memory.state(batch, margin)
    if seen != carried.state.length:
        raise InputError(
            f"cache: the model has seen {seen} tokens, the memory {carried.state.length}; use a cache "
            "that was filled by this model with the memory attached and not disabled"
        )
    return carried
