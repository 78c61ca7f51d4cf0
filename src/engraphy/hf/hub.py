"""Memories on the hub: a name instead of a folder, and the upload of a folder."""

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
"""The folder of the memory in that of a model saved with its memory."""
ADAPTER = "adapter"
"""The folder in which `engraphy finetune --lora` puts adapters beside the memory."""
OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options of a download."""
_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MEMORY = ("memory.json", "memory.safetensors", "vocab.json", "table/*", f"{ADAPTER}/*")
# Lock files; hidden files, which an interrupted save leaves too (system/files.py); checkpoints.
_NOT_UPLOADED = ("*writer.lock", ".*", "*/.*", "checkpoint-*/*")


def find_memory(path: str | os.PathLike[str], **options: Any) -> str | os.PathLike[str]:
    """The folder of a memory: `path` itself, or the download of the repository that it names.

    The repository holds a memory alone, or a model saved with its memory. Only the memory is
    downloaded.

    Args:
        path: A folder, or "user/name" on the hub if no such folder exists.
        options: Some of OPTIONS, as `huggingface_hub.snapshot_download` takes them.

    Raises:
        ConfigError: There is no such option.
        DataUnavailable: The repository, or this revision of it, cannot be downloaded.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(
            f"expected options of a download, {', '.join(OPTIONS)}; found {', '.join(unknown)}"
        )
    name = os.fspath(path)
    if os.path.exists(path) or not _NAME.fullmatch(name):
        return path
    folder = download(name, [*_MEMORY, *(f"{FOLDER}/{pattern}" for pattern in _MEMORY)], options)
    inside = folder / FOLDER
    alone = (folder / "memory.json").exists()
    return inside if not alone and (inside / "memory.json").exists() else folder


def adapter_of(folder: str | os.PathLike[str]) -> Path | None:
    """The folder of the PEFT adapters that were trained with a memory; None if there are none."""
    adapter = Path(folder) / ADAPTER
    return adapter if (adapter / "adapter_config.json").exists() else None


def warn_without_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Warn if the memory was trained with adapters and the model has none."""
    adapter = adapter_of(folder)
    if adapter is not None and not hasattr(model, "peft_config"):
        warnings.warn(
            f"{folder}: the memory was trained together with the adapters in {adapter.name}/: "
            "unless the model has them merged, load them first, "
            f"peft.PeftModel.from_pretrained(model, {str(adapter)!r})",
            stacklevel=3,
        )


def download(name: str, patterns: Iterable[str], options: dict[str, Any]) -> Path:
    """Download the files of a repository that match `patterns`. Raises DataUnavailable.

    Returns their folder in the hub's cache.
    """
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
    """Upload a folder to a repository, which is made if it is not there.

    Lock files, leftovers of an interrupted save, hidden files and Trainer's checkpoints stay out.
    So does README.md if the repository has one.

    Args:
        folder: The folder.
        repo_id: "user/name", or "name" for the user of the token.
        private: Whether a new repository is private. None leaves that to the account.
        token: As huggingface_hub takes it.
        revision: The branch, which is made if it is not there.
        commit_message: Default: a line that names Engraphy.
        commit_description: The commit's longer text.
        create_pr: Whether the commit becomes a pull request.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        Exception: Whatever huggingface_hub raises.
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
