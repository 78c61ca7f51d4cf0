"""A model and its memory as one directory, which AutoModelForCausalLM loads once `engraphy.hf` is imported.

    config.json          model_type "engraphy": text_config is the backbone's config, the rest says which memory
    model.safetensors    the backbone alone, as its own save_pretrained writes it
    engraphy/            what `memory.save` writes: the dense weights, and the table beside them

What comes back is the backbone itself with its memory attached, not a model around a model: generation, PEFT, device
maps and trainers meet the class that they know. The directory of a memory alone (`memory.save`, `engraphy.load`) is
the smaller thing to share; this one is for programs that take one path.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.hub import snapshot_download  # pyright: ignore[reportPrivateImportUsage]

from .. import saved
from ..errors import ConfigError, DigestMismatch
from ..memory import EngramMemory
from ..system.files import check_folder, publish_folder, settle_modes, write_errors
from .attach import attach
from .backbone import unwrapped
from .card import saved_identity, write_card

FOLDER = "engraphy"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class EngraphyConfig(PreTrainedConfig):
    """text_config: the backbone's. memory_config: `EngramConfig.to_json()`. address_digest, table_id: the identities of
    the memory that belongs to these weights."""

    model_type = "engraphy"
    sub_configs_defaults = {"text_config": SubConfigSpec(AutoConfig, model_type="llama", optional=True)}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    memory_config: dict[str, Any] | None = None
    address_digest: str | None = None
    table_id: str | None = None


class EngraphyForCausalLM:
    """What AutoModelForCausalLM calls for such a directory. Has no instances."""

    config_class = EngraphyConfig

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, config: EngraphyConfig, store: str | None = None,
                        margin: int = 64, **options: Any) -> Any:
        """The backbone with its memory attached, in eval mode as all of from_pretrained's models.

        store: the URL to serve the rows from; default: the saved table through `file:`, read-only; "ram:" to train it.
        margin: as in `attach`. options: whatever the backbone's own from_pretrained takes; a dtype that is given is
        the memory's dense layers' too, else they keep theirs.
        Raises DigestMismatch for a memory or table of another model, ConfigError for a memory that is not there, and
        what `EngramMemory.load` and `attach` raise.
        """
        folder = _memory_folder(path, options)
        expected = {name: getattr(config, name) for name in ("memory_config", "address_digest", "table_id")}
        found = saved_identity(folder)
        if found != expected:
            raise DigestMismatch(f"{folder}: config.json belongs to the memory {expected}, found {found}")
        memory = EngramMemory.load(folder, store)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, config=config.text_config, **options)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True gives two things
            if options.get("dtype", "auto") != "auto":
                memory.to(model.dtype)
            attach(model, memory.train(model.training), margin=margin)
        except BaseException:
            for each in memory.stores.values():
                each.close()
            raise
        model.save_pretrained = MethodType(_save, model)
        return loaded

    @classmethod
    def _from_config(cls, config: EngraphyConfig, **_: Any) -> Any:
        raise ConfigError("a config has no rows: load a memory's model with from_pretrained, or make the backbone "
                          "alone with from_config(config.text_config) and attach a memory")


AutoConfig.register(EngraphyConfig.model_type, EngraphyConfig)
AutoModelForCausalLM.register(EngraphyConfig, EngraphyForCausalLM)  # pyright: ignore[reportArgumentType]


def save_pretrained(model: Any, path: str | os.PathLike[str], table: str = "copy", *, is_main_process: bool = True,
                    **options: Any) -> None:
    """Write a model and its attached memory to `path` as one; `AutoModelForCausalLM.from_pretrained` reads it.

    table: "copy", or "link" to the sealed table that is served, as in `EngramMemory.save`. options: the backbone's own
    (state_dict, max_shard_size, variant, ...). A model that `path` held is replaced. A README.md (`card`) is written
    where there is none. A new or empty `path` gets the whole model or nothing; in one that holds something the memory
    is replaced whole, the backbone's files one by one.
    Raises ConfigError for a model without a memory, one that AutoModelForCausalLM does not load, one inside PEFT (merge
    it first), a link to the table that would be replaced, and for push_to_hub (upload the folder: the table is part of
    it); WriteFailed if the system refuses, before anything is written where that can be known.
    """
    inner: Any = unwrapped(model)
    folder = Path(path)
    memory = _check_savable(model, folder / FOLDER, table, options)
    if not is_main_process:
        type(inner).save_pretrained(inner, folder, is_main_process=False, **options)
        return
    needed = saved.bytes_of(memory, table) + sum(value.nbytes for value in inner.parameters())
    if not (folder.is_dir() and os.listdir(folder)):
        with publish_folder(folder, needed=needed, last="config.json") as made:
            _write(inner, memory, made, table, options, folder.name)
        return
    check_folder(folder / FOLDER, needed, replace=True)
    others = {entry.inode() for entry in os.scandir(folder)}
    with write_errors(folder, "what is there is part old, part new: save it again before it is used"):
        _write(inner, memory, folder, table, options, folder.name)
        settle_modes(folder, others)


def _write(inner: Any, memory: EngramMemory, folder: Path, table: str, options: dict[str, Any], name: str) -> None:
    with publish_folder(folder / FOLDER, replace=True, last="memory.json") as partial:
        saved.write(memory, partial, table)
        type(inner).save_pretrained(inner, folder, **options)
        text_config = copy.deepcopy(inner.config)  # EngraphyConfig sets things in its parts
        text_config._name_or_path = ""
        whole = EngraphyConfig(text_config=text_config, dtype=inner.config.dtype, architectures=["EngraphyForCausalLM"],
                               **saved_identity(partial))
        whole.save_pretrained(folder)  # at once over the backbone's own; from here on another memory is refused
    if not (folder / "README.md").exists():
        write_card(folder, memory, base_model=inner.name_or_path, name=name)


def _check_savable(model: Any, target: Path, table: str, options: dict[str, Any]) -> EngramMemory:
    inner: Any = unwrapped(model)
    memory = getattr(inner, "engraphy", None)
    if not isinstance(memory, EngramMemory):
        raise ConfigError(f"{type(model).__name__}: expected a model with an attached memory, found none")
    if hasattr(model, "get_base_model"):
        raise ConfigError(f"{type(model).__name__}: expected a model without adapters, call merge_and_unload() first")
    kinds: Any = AutoModelForCausalLM._model_mapping.get(type(inner.config), ())
    if not isinstance(inner, kinds):
        raise ConfigError(f"{type(inner).__name__}: expected a model that AutoModelForCausalLM gives; save the memory "
                          "alone with memory.save")
    if options.pop("push_to_hub", False):
        raise ConfigError("push_to_hub: expected False; save to a directory, then upload the whole of it")
    if table == "skip":
        raise ConfigError('table: expected "copy" or "link" for a model that is to load as one, found "skip"')
    saved.check_choice(memory, table)
    served = next(iter(memory.stores.values())).info.path
    if table == "link" and served and Path(served).is_relative_to(os.path.abspath(target)):
        raise ConfigError(f'{target}: table="link" to the table in it, which would be replaced; save to another '
                          "directory, or copy")
    return memory


def _save(model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any) -> None:
    """save_pretrained of a model that was loaded as one: it is saved as one, without its memory as what it is then."""
    options["is_main_process"] = is_main_process
    if isinstance(getattr(model, "engraphy", None), EngramMemory):
        save_pretrained(model, save_directory, **options)
    else:
        type(model).save_pretrained(model, save_directory, **options)


def _memory_folder(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The directory of the memory, fetched where `path` is a name on the hub."""
    inside = Path(options.get("subfolder") or "") / FOLDER
    if not os.path.isdir(path):
        hub = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
        path = snapshot_download(os.fspath(path), allow_patterns=[f"{inside.as_posix()}/*"], **hub)
    return Path(path) / inside

