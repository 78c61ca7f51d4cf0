"""The memory's part of a transformers cache: one extra layer at its end that carries a SequenceState.

Whatever transformers does to a cache (beams reordered, tokens taken back, sequences repeated or selected, everything
reset) is done to all of its layers, so it is done to the state too. The last ids of each sequence thus travel with
`past_key_values`, and the model holds no request state.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache, LinearAttentionLayer

from ..errors import InputError
from ..memory import EngramMemory
from ..state import SequenceState


class MemoryCacheLayer(LinearAttentionLayer):
    """A cache layer without keys and values: a SequenceState, made by the first forward that uses it.

    `is_compileable` stays True: with a layer that is not, transformers builds other masks for a static cache and
    decodes other text without a word.
    """

    is_compileable = True
    is_croppable = True  # pyright: ignore[reportAssignmentType]
    is_initialized = True
    keys = values = None  # what DynamicCache.__iter__ asks of every layer

    def __init__(self, memory: EngramMemory, margin: int) -> None:
        super().__init__()
        self.address_digest = memory.address_digest
        self.margin = margin
        self.state: SequenceState | None = None
        self.whole = True  # False within a forward, and after one that an error cut short

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """Whether tokens have been seen; models with linear attention ask the last layer of this family."""
        return {0: self.state is not None and self.state.length > 0}

    @has_previous_state.setter
    def has_previous_state(self, value: Any) -> None:
        """The base class sets what here follows from the state."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back -tokens_to_remove tokens. Raises StateTooShort beyond the margin."""
        if tokens_to_remove > 0:
            raise InputError(f"crop: expected minus the number of tokens to take back, found {tokens_to_remove}")
        if self.state is not None:
            self.state.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.repeat(repeats)

    def batch_select_indices(self, indices: Any) -> None:
        if self.state is not None:
            self.state.select(indices)

    def reset(self) -> None:
        self.state, self.whole = None, True

    def offload(self) -> None:
        """Nothing of it lies on another device."""

    prefetch = offload


def memory_layer(cache: Any) -> MemoryCacheLayer | None:
    """The memory's layer of a cache; None where it has none, or where there is no cache."""
    layers = reversed(getattr(cache, "layers", ()))
    return next((layer for layer in layers if isinstance(layer, MemoryCacheLayer)), None)


def tokens_seen(cache: Any) -> int:
    """How many tokens a cache holds; 0 without one. Raises InputError for what is no Cache of a decoder."""
    if cache is None:
        return 0
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise InputError(f"past_key_values: expected a Cache of a decoder, found {type(cache).__name__}")
    return int(cache.get_seq_length())


def ready_layer(cache: Cache, memory: EngramMemory, depth: int, batch: int, seen: int,
                margin: int) -> MemoryCacheLayer:
    """The layer of `cache` that carries the state for `memory`; on the first call a fresh one. depth: the model's own
    cache layers. seen: tokens in the cache.

    Raises InputError for a cache that has seen tokens which the memory has not (filled before the memory was attached,
    or by another model), for one that an error left half filled, and for one that belongs to another memory.
    """
    layer = memory_layer(cache)
    if layer is None:
        while cache.layer_class_to_replicate is not None and len(cache.layers) < depth:
            cache.layers.append(cache.layer_class_to_replicate())  # else a layer made later would stand behind ours
        layer = MemoryCacheLayer(memory, margin)
        cache.layers.append(layer)
    if layer.address_digest != memory.address_digest:
        raise InputError(f"past_key_values: belongs to a memory of address digest {layer.address_digest}, "
                         f"this one has {memory.address_digest}")
    if not layer.whole:
        raise InputError("past_key_values: an error cut short the forward that filled it, and some layers have seen "
                         "more than others; reset it, or use a new one")
    if layer.state is None:
        layer.state = memory.state(batch, margin)
    if seen != layer.state.length:
        raise InputError(f"past_key_values: the model has seen {seen} tokens, the memory {layer.state.length}; "
                         "use a cache that was filled by this model with the memory attached")
    return layer
