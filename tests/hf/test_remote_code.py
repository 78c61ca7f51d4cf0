"""A model with its memory in processes that never heard of Engraphy. No test reaches a network."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import engraphy
from tests.tools.hf_saved import IDS_BT, logits


@pytest.fixture(scope="module")
def model(whole):
    return whole


LOADED = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
assert "engraphy" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(folder)
assert len(tokenizer("Ada Lovelace")["input_ids"]) > 1
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, use_cache=False)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "engraphy" and not model.config.use_cache
with torch.no_grad():
    torch.save(model(torch.arange(2, 26).view(2, 12)).logits, out)
model.save_pretrained(out + "-again")
"""


@pytest.mark.slow
def test_a_process_that_never_imported_engraphy_loads_the_model_where_it_trusts_its_code(
    saved, model, forks, tmp_path
):
    ran = forks.run(LOADED, saved, tmp_path / "logits", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), logits(model, IDS_BT))
    again = tmp_path / "logits-again"  # no file of the package is copied into what it saves
    assert [path.name for path in again.glob("*.py")] == ["modeling_engraphy.py"]
    kept = {
        name: json.loads((folder / "config.json").read_text())["auto_map"]
        for name, folder in (("saved", saved), ("again", again))
    }
    assert kept["saved"] == kept["again"]


@pytest.mark.slow
@pytest.mark.parametrize("trust", [None, False])
def test_without_trust_transformers_names_the_way_out_and_so_does_the_card(
    saved, forks, tmp_path, trust
):
    ran = forks.run(
        "import sys, transformers as t; "
        f"t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})",
        saved,
        cwd=tmp_path,
    )
    assert ran.returncode and "trust_remote_code=True" in ran.stderr
    assert "trust_remote_code=True" in (saved / "README.md").read_text()


@pytest.mark.slow
def test_without_the_package_the_error_says_what_to_install(saved, forks, tmp_path):
    ran = forks.run(
        "import sys; sys.modules['engraphy'] = None; import transformers as t; "
        "t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)",
        saved,
        cwd=tmp_path,
    )
    assert (
        ran.returncode
        and 'ImportError: this model has an Engraphy memory: pip install "engraphy[hf]"'
        in ran.stderr
    )


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_engraphy_is_imported_its_own_classes_load_whatever_is_trusted(saved, model, trust):
    loaded = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(saved, trust_remote_code=trust)
    assert type(config) is engraphy.hf.EngraphyConfig
    assert torch.equal(logits(loaded, IDS_BT), logits(model, IDS_BT))
