"""A model and its memory as one directory, which AutoModelForCausalLM loads.

    config.json          model_type "engraphy": text_config is the backbone's config,
                         the rest says which memory belongs to it
    model.safetensors    the backbone alone, as its own save_pretrained writes it
    engraphy/            what `memory.save` writes: the dense weights, and the table beside them
    modeling_engraphy.py imports the classes below, for programs that pass trust_remote_code=True

A process that has imported `engraphy.hf` needs no trust_remote_code, because the classes are
registered then. The model that loads is the backbone itself with its memory attached, not a model
around a model. So generation, PEFT, device maps and trainers meet the class that they know. A
memory alone (`memory.save`, `engraphy.load`) is smaller to share; this directory is for programs
that take one path.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..errors import ConfigError, DigestMismatch
from ..memory import saved
from ..memory.memory import EngramMemory
from ..system.files import check_folder, publish_folder, settle_modes, write_errors
from .attach import attach
from .backbone import unwrapped
from .card import write_card
from .hooks import has_adapters
from .hub import FOLDER, download, upload

_MODULE = "modeling_engraphy"
_CODE = '''"""The classes of a model that was saved with its Engraphy memory.

transformers imports this file if trust_remote_code=True is passed. All the code is in the package
engraphy.
"""

try:
    from engraphy.hf.composite import EngraphyConfig, EngraphyForCausalLM
except ImportError as error:
    raise ImportError(
        'this model has an Engraphy memory: pip install "engraphy[hf]" '
        f"({type(error).__name__}: {error})"
    ) from error

__all__ = ["EngraphyConfig", "EngraphyForCausalLM"]
'''
_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.EngraphyConfig",
    "AutoModelForCausalLM": f"{_MODULE}.EngraphyForCausalLM",
}
_IDENTITY = {"memory_config", "address_digest", "table_id"}
_OF_THE_WHOLE = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "text_config",
    "transformers_version",
}
_PUSH = ("private", "token", "revision", "commit_message", "commit_description", "create_pr")


class EngraphyConfig(PreTrainedConfig):
    """The config of a model saved with its memory.

    Attributes:
        text_config: The backbone's config.
        memory_config: `EngramConfig.to_json()` of the memory.
        address_digest: Address digest of the memory that belongs to these weights.
        table_id: Table id of the table that belongs to these weights.
    """

    model_type = "engraphy"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama", optional=True)
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    memory_config: dict[str, Any] | None = None
    address_digest: str | None = None
    table_id: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As that of every config. Settings that the backbone's config has are set on it."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        own_names = [name for name in kwargs if name in _IDENTITY or name == "text_config"]
        own = {name: kwargs.pop(name) for name in own_names}
        config = super().from_dict(config_dict, **own)
        text: Any = config.text_config
        config.text_config, unused = type(text).from_dict(
            text.to_dict(), return_unused_kwargs=True, **kwargs
        )
        return (config, unused) if return_unused else config

    def backbone(self) -> PreTrainedConfig:
        """A copy of the backbone's config, with what was set on this one after it was read."""
        text: Any = copy.deepcopy(self.text_config)
        default = PreTrainedConfig()
        for name, value in vars(self).items():
            if name.startswith("_") or name in _OF_THE_WHOLE or name in _IDENTITY:
                continue
            changed = name not in vars(default) or value != getattr(default, name)
            if changed and hasattr(text, name):
                setattr(text, name, value)
        return text

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing. transformers would copy this file into every folder that is saved, and
        modeling_engraphy.py is there already."""


class EngraphyForCausalLM:
    """The class that AutoModelForCausalLM calls for such a directory. It has no instances."""

    config_class = EngraphyConfig

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: EngraphyConfig,
        store: str | os.PathLike[str] | None = None,
        margin: int = 64,
        **options: Any,
    ) -> Any:
        """The backbone with its memory attached, in eval mode.

        Settings of the backbone's config (use_cache, ...) are in force whether they were passed to
        AutoModelForCausalLM.from_pretrained or set on `config`.

        Args:
            path: The directory, or a name on the hub.
            config: The config of the directory.
            store: The URL or folder to serve the rows from. Default: the saved table, read-only.
                "ram:" copies it into memory, to train it.
            margin: As in `attach`.
            options: Options of the backbone's own from_pretrained. A dtype also applies to the
                memory's dense layers, which keep theirs otherwise.

        Returns:
            What the backbone's own from_pretrained returns.

        Raises:
            DigestMismatch: The memory or the table belongs to another model.
            ConfigError: There is no memory.
            EngraphyError: Whatever `EngramMemory.load` and `attach` raise.
        """
        folder = _memory_folder(path, options)
        expected = {name: getattr(config, name) for name in sorted(_IDENTITY)}
        found = saved.identity_of(folder)
        if found != expected:
            raise DigestMismatch(
                f"{folder}: config.json belongs to the memory {expected}, found {found}"
            )
        memory = EngramMemory.load(folder, store)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, config=config.backbone(), **options)
            # output_loading_info=True gives (model, info).
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if options.get("dtype", options.get("torch_dtype", "auto")) not in ("auto", None):
                memory.to(model.dtype)
            attach(model, memory.train(model.training), margin=margin)
        except BaseException:
            memory.close()
            raise
        model.save_pretrained = MethodType(_save, model)
        # setattr, because pyright takes push_to_hub for a constant.
        setattr(model, "push_to_hub", MethodType(_push, model))  # noqa: B010
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing, as that of EngraphyConfig."""

    @classmethod
    def _from_config(cls, config: EngraphyConfig, **_: Any) -> Any:
        raise ConfigError(
            "a config has no rows: load a memory's model with from_pretrained, or make the "
            "backbone alone with from_config(config.text_config) and attach a memory"
        )


AutoConfig.register(EngraphyConfig.model_type, EngraphyConfig)
AutoModelForCausalLM.register(
    EngraphyConfig,
    EngraphyForCausalLM,  # pyright: ignore[reportArgumentType]
)


def save_pretrained(
    model: Any,
    path: str | os.PathLike[str],
    table: str = "copy",
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **options: Any,
) -> None:
    """Write a model and its attached memory to `path` as one.

    `AutoModelForCausalLM.from_pretrained` reads it. A new or empty `path` gets the whole model or
    nothing. If `path` holds a model, that is replaced: the memory whole, the backbone's files one
    by one. A README.md (`card`) is written if there is none.

    Args:
        model: The model.
        path: The directory.
        table: "copy", or "link" to the sealed table that is served, as in `EngramMemory.save`.
        is_main_process: False writes nothing, as with transformers.
        push_to_hub: Upload the folder afterwards, with the files beside the model (a tokenizer).
        repo_id: Where to upload. Default: the folder's name.
        options: Options of the backbone's own save_pretrained (state_dict, max_shard_size,
            variant, ...); with push_to_hub also private, token, revision, commit_message,
            commit_description, create_pr.

    Raises:
        ConfigError: The model has no memory, is inside PEFT (merge it first), or
            AutoModelForCausalLM does not load its class; or a link to the table is asked for that
            would be replaced or uploaded.
        WriteFailed: The system refuses. If that can be known before, nothing is written.
    """
    hub = {name: options.pop(name) for name in _PUSH if push_to_hub and name in options}
    inner: Any = unwrapped(model)
    folder = Path(path)
    memory = _check_savable(model, folder / FOLDER, table, push_to_hub)
    if not is_main_process:
        type(inner).save_pretrained(inner, folder, is_main_process=False, **options)
        return
    _save_whole(inner, memory, folder, table, options)
    if push_to_hub:
        upload(folder, repo_id or folder.absolute().name, **hub)


def _save_whole(
    inner: Any, memory: EngramMemory, folder: Path, table: str, options: dict[str, Any]
) -> None:
    """Write the parts into a new folder, or into one that holds something."""
    needed = saved.bytes_of(memory, table) + sum(value.nbytes for value in inner.parameters())
    if not (folder.is_dir() and os.listdir(folder)):
        with publish_folder(folder, needed=needed, last="config.json") as made:
            _write(inner, memory, made, table, options, folder.name)
        return
    check_folder(folder / FOLDER, needed, replace=True)
    others = {entry.inode() for entry in os.scandir(folder)}
    with write_errors(
        folder, "what is there is part old, part new: save it again before it is used"
    ):
        _write(inner, memory, folder, table, options, folder.name)
        settle_modes(folder, others)


def _write(
    inner: Any, memory: EngramMemory, folder: Path, table: str, options: dict[str, Any], name: str
) -> None:
    """Write the parts into `folder`. name: of the folder in its card."""
    with publish_folder(folder / FOLDER, replace=True, last="memory.json") as partial:
        saved.write(memory, partial, table)
        type(inner).save_pretrained(inner, folder, **options)
        text_config = copy.deepcopy(inner.config)  # EngraphyConfig sets things in its parts
        text_config._name_or_path = ""
        settings: dict[str, Any] = saved.identity_of(partial) | {"auto_map": dict(_AUTO_MAP)}
        whole = EngraphyConfig(
            text_config=text_config,
            dtype=inner.config.dtype,
            architectures=["EngraphyForCausalLM"],
            **settings,
        )
        (folder / f"{_MODULE}.py").write_text(_CODE)
        # Replaces the backbone's own. From here on another memory is refused.
        whole.save_pretrained(folder)
    if not (folder / "README.md").exists():
        write_card(folder, memory, base_model=inner.name_or_path, name=name)


def push_to_hub(
    model: Any, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
) -> Any:
    """Upload a model and its attached memory, or an EngramMemory alone.

    The folder is written to a temporary place first, the table included. PEFT's adapters beside a
    memory are not uploaded with it: a warning says so.

    Args:
        model: The model, or the memory.
        repo_id: "user/name", or "name" for the user of the token.
        max_shard_size: Largest shard size of the backbone's files.
        options: private, token, revision, commit_message, commit_description, create_pr.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        EngraphyError: Whatever `save_pretrained` and `memory.save` raise.
        Exception: Whatever huggingface_hub raises.
    """
    inner: Any = unwrapped(model)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / repo_id.rpartition("/")[2]
        if isinstance(model, EngramMemory):
            if has_adapters(model):
                warnings.warn(
                    "the memory is uploaded without the adapters of its model: push those too, or "
                    "upload the folder that `engraphy finetune --lora` wrote",
                    stacklevel=2,
                )
            model.save(folder)
            write_card(folder, model, name=repo_id)
        else:
            save_pretrained(model, folder, max_shard_size=max_shard_size)
            write_card(folder, inner.engraphy, inner.name_or_path, name=repo_id)
        return upload(folder, repo_id, **options)


def _check_savable(model: Any, target: Path, table: str, pushed: bool) -> EngramMemory:
    """The memory of a model that can be saved with it, to `target`. Raises ConfigError."""
    inner: Any = unwrapped(model)
    memory = getattr(inner, "engraphy", None)
    if not isinstance(memory, EngramMemory):
        raise ConfigError(
            f"{type(model).__name__}: expected a model with an attached memory, found none"
        )
    if hasattr(model, "get_base_model"):
        raise ConfigError(
            f"{type(model).__name__}: expected a model without adapters, call merge_and_unload() "
            "first"
        )
    kinds: Any = AutoModelForCausalLM._model_mapping.get(type(inner.config), ())
    if not isinstance(inner, kinds):
        raise ConfigError(
            f"{type(inner).__name__}: expected a model that AutoModelForCausalLM gives; save the "
            "memory alone with memory.save"
        )
    _check_table(memory, target, table, pushed)
    return memory


def _check_table(memory: EngramMemory, target: Path, table: str, pushed: bool) -> None:
    if pushed and table != "copy":
        raise ConfigError(
            f'push_to_hub: expected table="copy", a repository holds its table; found {table!r}'
        )
    if table == "skip":
        raise ConfigError(
            'table: expected "copy" or "link" for a model that is to load as one, found "skip"'
        )
    saved.check_choice(memory, table)
    served = memory.stores.info.path
    if table == "link" and served and Path(served).is_relative_to(os.path.abspath(target)):
        raise ConfigError(
            f'{target}: table="link" to the table in it, which would be replaced; save to another '
            "directory, or copy"
        )


def _save(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
) -> None:
    """save_pretrained of a model that was loaded with its memory.

    It saves both as one, and the backbone alone after the memory was detached.
    """
    options["is_main_process"] = is_main_process
    if isinstance(getattr(model, "engraphy", None), EngramMemory):
        save_pretrained(model, save_directory, **options)
    else:
        type(model).save_pretrained(model, save_directory, **options)


def _push(model: Any, repo_id: str, *, tags: list[str] | None = None, **options: Any) -> Any:
    """push_to_hub of a model that was loaded with its memory; as `_save`."""
    if tags:
        raise ConfigError(
            "tags: expected none, a model with a memory has a card of its own; write them into "
            "README.md"
        )
    if isinstance(getattr(model, "engraphy", None), EngramMemory):
        return push_to_hub(model, repo_id, **options)
    return type(model).push_to_hub(model, repo_id, **options)


def _memory_folder(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The directory of the memory, downloaded if `path` is a name on the hub."""
    inside = Path(options.get("subfolder") or "") / FOLDER
    if not os.path.isdir(path):
        path = download(os.fspath(path), [f"{inside.as_posix()}/*"], options)
    return Path(path) / inside
