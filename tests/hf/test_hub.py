"""Memories and models with a memory on the hub. No test reaches a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

import engraphy
from engraphy.errors import ConfigError, DataUnavailable, DigestMismatch
from engraphy.hf import push_to_hub, save_pretrained
from engraphy.system.temporaries import is_temporary
from tests.tools.hf_saved import IDS_BT, logits
from tests.tools.tiny_model import write_model


@pytest.fixture(scope="module")
def model(whole):
    return whole


COMMIT = "a" * 40


def test_no_lock_file_is_part_of_what_is_saved(saved, model, tmp_path):
    model.engraphy.save(tmp_path / "memory")
    for folder in (saved, tmp_path / "memory"):
        assert not list(folder.rglob("*.lock"))
    engraphy.Table.open(tmp_path / "memory" / "table", mode="w").close()  # a writer makes its own


class FakeHub:
    """What HfApi was asked to do, and copies of the files that it would have uploaded."""

    def __init__(self, place: Path) -> None:
        self.place, self.calls, self.has_card = place, [], False

    def __call__(self, token=None):
        self.calls.append(("HfApi", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(
            f"https://huggingface.co/someone/{repo_id.rpartition('/')[2]}"
        )

    def create_branch(self, repo_id, branch, exist_ok=False):
        self.calls.append(("create_branch", repo_id, branch))

    def file_exists(self, repo_id, filename, revision=None):
        return self.has_card

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        self.calls.append(("upload_folder", repo_id, options))
        names = [
            path.relative_to(folder_path).as_posix()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        ]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, ignore_patterns=ignore_patterns
        ):
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, self.place / name)
        return "uploaded"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = FakeHub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_that_was_loaded_as_one_pushes_itself_as_one(saved, hub):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    done = loaded.push_to_hub(
        "someone/remembers",
        private=True,
        token="secret",
        revision="v2",
        create_pr=True,
        commit_message="first",
    )
    assert done == "uploaded"
    assert hub.calls[:3] == [
        ("HfApi", "secret"),
        ("create_repo", "someone/remembers", True, True),
        ("create_branch", "someone/remembers", "v2"),
    ]
    name, repo, options = hub.calls[3]
    assert (name, repo) == ("upload_folder", "someone/remembers")
    assert (options["revision"], options["create_pr"], options["commit_message"]) == (
        "v2",
        True,
        "first",
    )
    assert files(hub.place) == files(saved) - {"tokenizer.json", "tokenizer_config.json"}
    assert 'from_pretrained("someone/remembers")' in (hub.place / "README.md").read_text()
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(hub.place), IDS_BT), logits(loaded, IDS_BT)
    )


def test_a_model_that_lost_its_memory_pushes_itself_as_the_backbone_that_it_is(saved, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    engraphy.detach(loaded)
    pushed = []
    monkeypatch.setattr(
        type(loaded), "push_to_hub", lambda self, *args, **options: pushed.append((args, options))
    )
    loaded.push_to_hub("someone/bare", private=True)
    assert pushed == [(("someone/bare",), {"private": True})]


def test_a_memory_alone_is_pushed_to_the_root_of_its_repository(model, hub):
    push_to_hub(model.engraphy, "someone/memory")
    model.peft_config = {"default": None}  # as PEFT leaves it in a model that has adapters
    try:
        with pytest.warns(UserWarning, match="without the adapters of its model"):
            push_to_hub(model.engraphy, "someone/memory")
    finally:
        del model.peft_config
    assert {
        "memory.json",
        "memory.safetensors",
        "vocab.json",
        "table/engram.json",
        "README.md",
    } <= files(hub.place)
    assert 'engraphy.load(model, "someone/memory")' in (hub.place / "README.md").read_text()


def test_saving_pushes_the_folder_with_what_lies_beside_the_model(model, base, hub, tmp_path):
    folder = tmp_path / "remembers"
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "checkpoint-3").mkdir()
    interrupted = ".table.0123abcd.engraphy-part"
    assert is_temporary(interrupted)
    (folder / "other" / interrupted).mkdir(parents=True)
    for name in (
        "checkpoint-3/optimizer.pt",
        f"other/{interrupted}/memory.json",
        ".hidden",
        "other/writer.lock",
    ):
        (folder / name).write_text("x")
    save_pretrained(model, folder, push_to_hub=True, private=True, commit_message="first")
    assert hub.calls[1][:3] == ("create_repo", "remembers", True)
    assert hub.calls[2][2]["commit_message"] == "first" and hub.calls[2][1] == "someone/remembers"
    expected = files(folder) - {
        "checkpoint-3/optimizer.pt",
        ".hidden",
        "other/writer.lock",
        f"other/{interrupted}/memory.json",
    }
    assert files(hub.place) == expected and "tokenizer.json" in expected
    save_pretrained(model, folder, push_to_hub=True, repo_id="other/name")
    assert hub.calls[-1][1] == "someone/name"


def test_a_card_that_the_repository_has_stays(model, hub):
    hub.has_card = True
    push_to_hub(model, "someone/remembers")
    assert "README.md" not in files(hub.place) and "config.json" in files(hub.place)


def test_what_would_not_be_whole_on_the_hub_is_not_pushed(saved, model, hub, tmp_path):
    with pytest.raises(ConfigError, match='push_to_hub: expected table="copy"'):
        save_pretrained(model, tmp_path / "one", table="link", push_to_hub=True)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ConfigError, match="tags"):
        loaded.push_to_hub("someone/remembers", tags=["mine"])
    assert not hub.calls


def repository(cache, name, folder):
    """`folder` as the hub's cache holds a repository that was downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    return cache


@pytest.mark.parametrize("kind", ["memory alone", "whole model"])
def test_a_memory_loads_by_its_name_on_the_hub(kind, saved, base, model, tmp_path):
    folder = saved if kind == "whole model" else saved / "engraphy"
    cache = repository(tmp_path, "someone/remembers", folder)
    for revision in (None, COMMIT, "main"):
        bare = AutoModelForCausalLM.from_pretrained(base)
        engraphy.load(
            bare, "someone/remembers", cache_dir=cache, revision=revision, local_files_only=True
        )
        assert torch.equal(logits(bare, IDS_BT), logits(model, IDS_BT))


def test_only_the_files_of_the_memory_are_asked_for(saved, base, monkeypatch):
    asked = []

    def download(name, *, allow_patterns, **options):
        names = files(saved)
        asked.append(
            (
                name,
                set(
                    huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
                ),
                options,
            )
        )
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    engraphy.load(
        AutoModelForCausalLM.from_pretrained(base),
        "someone/remembers",
        revision="v2",
        token="secret",
        cache_dir="there",
        force_download=True,
    )
    options = {"revision": "v2", "token": "secret", "cache_dir": "there", "force_download": True}
    assert asked == [
        (
            "someone/remembers",
            {name for name in files(saved) if name.startswith("engraphy/")},
            options,
        )
    ]


def test_a_folder_is_a_folder_whatever_its_name(saved, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: 1 / 0)
    shutil.copytree(saved / "engraphy", Path("runs") / "finetune-1")
    engraphy.load(AutoModelForCausalLM.from_pretrained(base), "runs/finetune-1")
    for nowhere in ("nowhere", "/no/where", "./no/where", "a/b/c"):
        with pytest.raises(ConfigError, match="expected memory.json"):
            engraphy.load(AutoModelForCausalLM.from_pretrained(base), nowhere)


def test_a_repository_that_cannot_be_had_is_a_named_error(base, saved, monkeypatch, tmp_path):
    bare = AutoModelForCausalLM.from_pretrained(base)

    def unreachable(*args, **options):
        raise LocalEntryNotFoundError("cannot find the snapshot\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", unreachable)
        with pytest.raises(
            DataUnavailable,
            match="someone/gone: expected a folder, or a name on the hub, .*snapshot$",
        ):
            engraphy.load(bare, "someone/gone")
    with pytest.raises(DataUnavailable, match="someone/gone: .* LocalEntryNotFoundError"):
        engraphy.load(bare, "someone/gone", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(DataUnavailable, match="no--body/gone..: .* HFValidationError"):
        engraphy.load(bare, "no--body/gone..")
    with pytest.raises(ConfigError, match="expected options of a download, .*; found branch"):
        engraphy.load(bare, saved / "engraphy", branch="main")
    assert not hasattr(bare, "engraphy")


def test_a_memory_of_another_model_on_the_hub_is_refused_too(saved, tmp_path):
    cache = repository(tmp_path / "cache", "someone/remembers", saved)
    other = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "other", vocab_size=300))
    with pytest.raises(DigestMismatch, match="made for"):
        engraphy.load(other, "someone/remembers", cache_dir=cache, local_files_only=True)
