"""What a dialect is: one frozen record with everything in which published memories differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..layer import LayerSpec

if TYPE_CHECKING:
    from ..hash import HashSpec

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class GgufNames:
    """What GGUF files call the parts of a memory. Forks of llama.cpp differ, so there are aliases.

    Keys of the metadata are written here without the architecture before the first dot, and with
    "_" for "."; so are the names of constants that a fork stores as tensors, without ".weight".

    Attributes:
        table: Name of a layer's tensor; without {layer} if one tensor holds all layers in order.
        fields: Field of config.json -> keys with its value. The field's own name is one, too.
        constants: Method of HashSpec, or "token_map" -> keys of the numbers of all layers in order.
        rows_field: The field with the least number of rows of a head, which few files have. It is
            found from the primes, or from the row counts.
        rows_per_head: Its value in the published models.
        zero_based: Fields that count layers from 1 in config.json, and from 0 in GGUF.
        compressed_filler: Keys of the filler's compressed id.
        width_field: The field with the row width; `width_of_all` if it is the width of all columns.
        width_of_all: See `width_field`.
    """

    table: str
    fields: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, tuple[str, ...]]
    rows_field: str
    rows_per_head: int
    zero_based: tuple[str, ...] = ()
    compressed_filler: tuple[str, ...] = ()
    width_field: str = ""
    width_of_all: bool = False


# What all architectures of llama.cpp call these.
COMMON_GGUF_FIELDS: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("block_count",),
    "hidden_size": ("embedding_length",),
    "rms_norm_eps": ("attention_layer_norm_rms_epsilon",),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class Release:
    """How the checkpoints of a dialect describe their memory: config fields and tensor names.

    Attributes:
        title: The release's name in messages.
        marker: The field of config.json that is set if, and only if, the model has this memory.
        hash_arguments: Reads the fields of a config; returns the arguments of HashSpec except
            `dialect`. Raises ConfigError naming the field that is missing or invalid.
        layer_arguments: Reads the fields of a config and the number of columns C; returns d, and
            the arguments of `Dialect.layer` except `width` and `order`. Raises ConfigError.
        field_names: Name of a HashSpec field -> its name in config.json, for messages. The release
            fixes the fields that are missing here.
        dim_name: How config.json gives the row width d, for messages.
        table: The table's name in a checkpoint, between "layers.L." and ".weight".
        block_scales: Rows are fp8 and a second tensor, "scale" in place of "weight", holds one
            scale for each 32 values. If False, rows are plain floats, or fp8 with one scale for
            the whole table in the tensor "weight_scale".
        hash_tensors: Name of a tensor or buffer beside the table -> the method of HashSpec that
            computes the same numbers. Checkpoints may leave these tensors out.
        row_counts: A field of config.json that repeats the row count of each layer.
        gguf: The same in GGUF files; None if no engine writes such files.
    """

    title: str
    marker: str
    hash_arguments: Callable[[Fields], dict[str, Any]]
    layer_arguments: Callable[[Fields, int], tuple[int, dict[str, Any]]]
    field_names: Mapping[str, str]
    dim_name: str
    table: str
    block_scales: bool = False
    hash_tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    row_counts: str | None = None
    gguf: GgufNames | None = None

    def hash_values(self, spec: HashSpec, layer: int) -> dict[str, tuple[int, ...]]:
        """What the tensors of `hash_tensors` have to hold for one layer.

        Args:
            spec: The hash of the memory.
            layer: A layer of the spec.

        Returns:
            Tensor name -> its numbers.
        """
        methods = self.hash_tensors.items()
        return {name: getattr(spec, method)(layer) for name, method in methods}


@dataclass(frozen=True)
class Dialect:
    """The rules of one published memory.

    Attributes:
        name: The value of `HashSpec.dialect`.
        multipliers: (spec, position of the layer in spec.layer_ids) -> N odd multipliers. Products
            with ids below spec.vocab_size must not overflow int64.
        primes: spec -> for each layer C moduli, order-major.
        layer: Constructor of the LayerSpec, with the arguments `hidden_size`, `width` and `order`,
            and those that the release gives.
        one_size: All orders have the same rows_per_head.
        stops_at_filler: Look-back ends at the id that fills empty places (EOS in Qwen4-Exp).
        raw_ids: Raw ids are hashed, so the vocabulary map is the identity.
        release: How checkpoints describe this memory, None if no checkpoint was released.
    """

    name: str
    multipliers: Callable[[HashSpec, int], tuple[int, ...]]
    primes: Callable[[HashSpec], tuple[tuple[int, ...], ...]]
    layer: Callable[..., LayerSpec]
    one_size: bool = False
    stops_at_filler: bool = False
    raw_ids: bool = False
    release: Release | None = None

    @property
    def released(self) -> Release:
        """The release. Raises ConfigError if no checkpoint of this dialect was released."""
        if self.release is None:
            raise ConfigError(f"dialect {self.name}: expected a released one, found no release")
        return self.release
