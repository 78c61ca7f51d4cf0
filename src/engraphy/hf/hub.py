"""Memories on the hub: a name instead of a folder, and the upload of a folder that holds a model
with its memory."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from ..errors import ConfigError, DataUnavailable

FOLDER = "engraphy"
"""Where a model that was saved with its memory keeps the memory."""
ADAPTER = "adapter"
"""Where `engraphy finetune --lora` puts the adapters that were trained with a memory."""
OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What a download takes."""
_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MEMORY = ("memory.json", "memory.safetensors", "vocab.json", "table/*", f"{ADAPTER}/*")
_NOT_UPLOADED = ("*writer.lock", "*.partial/*", ".*", "*/.*", "checkpoint-*/*")


def find_memory(path: str | os.PathLike[str], **options: Any) -> str | os.PathLike[str]:
    """The folder of a memory that `path` names: itself, or where a repository of the hub was
    downloaded to.

    A name on the hub is "user/name" where no such folder exists. The repository holds a memory
    alone, or a model saved with its memory, of which only the memory is fetched. options: OPTIONS,
    as `huggingface_hub.snapshot_download`. Raises ConfigError for other options, DataUnavailable
    for a repository or revision that cannot be had.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(
            f"expected options of a download, {', '.join(OPTIONS)}; found {', '.join(unknown)}"
        )
    if os.path.exists(path) or not _NAME.fullmatch(name := os.fspath(path)):
        return path
    folder = download(name, [*_MEMORY, *(f"{FOLDER}/{pattern}" for pattern in _MEMORY)], options)
    whole = not (folder / "memory.json").exists() and (folder / FOLDER / "memory.json").exists()
    return folder / FOLDER if whole else folder


def adapter_of(folder: str | os.PathLike[str]) -> Path | None:
    """The PEFT adapters that were trained with the memory in `folder`; None = it was trained alone."""
    found = Path(folder) / ADAPTER
    return found if (found / "adapter_config.json").exists() else None


def warn_without_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Warns where a memory that was trained with adapters meets a model that PEFT did not wrap."""
    found = adapter_of(folder)
    if found is not None and not hasattr(model, "peft_config"):
        warnings.warn(
            f"{folder}: the memory was trained together with the adapters in {found.name}/: unless the model "
            f"has them merged, load them first, peft.PeftModel.from_pretrained(model, {str(found)!r})",
            stacklevel=3,
        )


def download(name: str, patterns: Iterable[str], options: dict[str, Any]) -> Path:
    """The files of a repository that match `patterns`, in the hub's cache. Raises DataUnavailable."""
    wanted = {option: options[option] for option in OPTIONS if options.get(option) is not None}
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **wanted)
        )
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataUnavailable(
            f"{name}: expected a folder, or a name on the hub, "
            f"found {type(error).__name__}: {reason}"
        ) from error


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload a folder to a repository, which is made if it is not there. Returns huggingface_hub's
    CommitInfo.

    Left out are lock files, what an interrupted save has left, hidden files and Trainer's
    checkpoints; and README.md where the repository has one. Raises what huggingface_hub raises.
    """
    api = huggingface_hub.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    ignored: list[str] = [*_NOT_UPLOADED]
    if api.file_exists(repo_id, "README.md", revision=revision):
        ignored.append("README.md")
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload a model with its Engraphy memory",
        commit_description=commit_description,
        ignore_patterns=ignored,
    )
