"""hf/qwen4.py, released/check.py and the page on serving: a released table served from a store
gives the model's own outputs, is never allocated, is never lost in silence, and is refused if it is
not the model's."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen4ExpConfig,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)
from transformers.models.qwen4_exp.modeling_qwen4_exp import (
    Qwen4ExpForConditionalGeneration,
    Qwen4ExpTextModel,
)

from engraphy import EngramConfig, HashSpec, RowFormat, Table, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, RowOutOfRange, StoreError, TableError
from engraphy.hf.qwen4 import (
    ServedRows,
    load_without_table,
    restore_table,
    serve_table,
    write_table,
)
from engraphy.released.check import check_config
from engraphy.store import FileStore, RamStore, RowStore, StoreInfo
from tests.tools.qwen4_models import TINY, batch, equal, make, outputs, ram_store, tables

# The fields of DeepSeek-V4.1-Flash's config.json that concern the memory, with the release's
# numbers but small tables.
DEEPSEEK = {
    "engram_layer_ids": [1, 3],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 50,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(folder of a checkpoint, folder of its table on disk, the model)"""
    folder, model = tmp_path_factory.mktemp("released"), make()
    model.save_pretrained(folder / "checkpoint")
    write_table(model, folder / "table")
    return folder / "checkpoint", folder / "table", model


# The outputs are the model's own.


@pytest.mark.parametrize("kind", ["url", "table", "ram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_served_table_gives_the_models_outputs_bit_for_bit(tmp_path, dtype, kind):
    model = make(dtype)
    before = outputs(model)
    write_table(model, tmp_path / "t")
    fmt = RowFormat("f32" if dtype == torch.float32 else "bf16", 8)
    store = {
        "url": f"file:{tmp_path / 't'}",
        "table": Table.open(tmp_path / "t"),
        "ram": ram_store(tables(model)[1].weight, fmt),
    }[kind]
    serve_table(model, store, fmt if kind == "ram" else None)
    with torch.no_grad():
        tables(model)[1].replaced.weight.zero_()  # nobody reads it any more
    assert equal(outputs(model), before)


def test_the_rows_decide_the_outputs():
    """Control of the test above: rows of zeros give other logits."""
    model, fmt = make(), RowFormat("f32", 8)
    before = outputs(model)
    serve_table(model, RamStore(len(tables(model)[1].weight), fmt.row_bytes), fmt)
    after = outputs(model)
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_checkpoint_is_served_from_its_own_files(released):
    checkpoint, _, model = released
    served = load_without_table(Qwen4ExpForCausalLM, checkpoint)
    serve_table(served, f"checkpoint:{checkpoint}")
    assert equal(outputs(served), outputs(model))


def test_a_gguf_file_is_served_where_it_lies(tmp_path):
    pytest.importorskip("gguf")
    from tests.tools.gguf_files import QWEN4, write_gguf

    model = make(torch.bfloat16)
    before = outputs(model)
    raw_NR = tables(model)[1].weight.detach().view(torch.uint8).numpy()
    path = write_gguf(tmp_path / "m.gguf", {1: raw_NR}, "bf16", model.config.to_dict(), QWEN4)
    with pytest.raises(DigestMismatch, match="expected address digest"):
        serve_table(model, f"checkpoint:{path}")  # 200 leads to the same primes as 211
    model.config.to_json_file(tmp_path / "config.json")
    serve_table(model, f"checkpoint:{path}")
    with torch.no_grad():
        tables(model)[1].replaced.weight.zero_()  # nobody reads it any more
    assert equal(outputs(model), before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_generate_give_the_models_outputs(released, options):
    _, table, _ = released
    model = make()
    before = outputs(model, **options)
    serve_table(model, f"file:{table}")
    assert equal(outputs(model, **options), before)


def test_several_layers_are_served_each_its_own_rows(tmp_path):
    model = make(ple_layer_ids=[1, 3], ngram_size=4, heads_per_ngram=2, ple_embed_dim=48)
    before = outputs(model)
    write_table(model, tmp_path / "t")
    serve_table(model, f"file:{tmp_path / 't'}")
    assert sorted(tables(model)) == [0, 2] and equal(outputs(model), before)
    restore_table(model)
    fmt = RowFormat("f32", 8)
    serve_table(
        model, {layer: ram_store(found.weight, fmt) for layer, found in tables(model).items()}, fmt
    )
    assert equal(outputs(model), before)


def test_the_whole_multimodal_model_is_served():
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    torch.manual_seed(3)
    model = Qwen4ExpForConditionalGeneration(
        Qwen4ExpConfig(text_config=TINY, vision_config=vision)
    ).eval()
    with torch.no_grad():
        before = model(**batch()).logits
        serve_table(
            model, ram_store(tables(model)[1].weight, RowFormat("f32", 8)), RowFormat("f32", 8)
        )
        assert torch.equal(model(**batch()).logits, before)


def test_a_compiled_layer_gives_the_layers_outputs(released):
    _, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    x, ids = torch.randn(3, 14, 4 * 32), batch()["input_ids"]
    with torch.no_grad():
        compiled = torch.compile(served.model.layers[1].ple, backend="eager")(x, ids, None)
        assert torch.equal(compiled, model.model.layers[1].ple(x, ids, None))
    torch.compiler.reset()


def test_rows_follow_the_models_dtype(released):
    """An f32 table under a bf16 model rounds as casting the embedding does."""
    _, table, model = released
    expected = outputs(copy.deepcopy(model).to(torch.bfloat16))
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    assert equal(outputs(served.to(torch.bfloat16)), expected)
    half = served.to(torch.float16)
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(tables(half)[1](ids), tables(model)[1](ids).half())


@pytest.mark.parametrize(
    "fmt",
    [RowFormat("fp8_scaled", 8, 0.01), RowFormat("int8", 8), RowFormat("bf16", 8)],
    ids=lambda fmt: fmt.kind,
)
def test_a_quantised_table_equals_the_model_with_the_rounded_rows(released, tmp_path, fmt):
    _, _, model = released
    write_table(model, tmp_path / "t", fmt)
    served, rounded = copy.deepcopy(model), copy.deepcopy(model)
    serve_table(served, f"file:{tmp_path / 't'}")
    weight = tables(rounded)[1].weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(fmt.decode(fmt.encode(weight.numpy()))))
    assert equal(outputs(served), outputs(rounded)) and not equal(outputs(served), outputs(model))


# What the model then is.


def test_parameters_and_state_dict_hold_no_table_and_the_rest_as_before(released):
    _, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    gone = {"model.layers.1.ple.ple_embedding.ngram_embedding.weight"}
    assert set(model.state_dict()) - set(served.state_dict()) == gone
    assert set(served.state_dict()) < set(model.state_dict())
    assert {name for name, _ in model.named_parameters()} - {
        name for name, _ in served.named_parameters()
    } == gone
    assert served.num_parameters() == model.num_parameters() - tables(model)[1].weight.numel()
    served.load_state_dict(served.state_dict(), strict=True)


def test_restoring_gives_the_model_back_bit_for_bit_and_closes_what_was_opened(released):
    _, table, model = released
    served, before = copy.deepcopy(model), outputs(model)
    embedding = tables(served)[1]
    serve_table(served, f"file:{table}")
    opened = tables(served)[1].store
    restore_table(served)
    assert tables(served)[1] is embedding and "save_pretrained" not in vars(served)
    assert equal(outputs(served), before)
    with pytest.raises(StoreError, match="closed"):
        opened.gather(np.array([0]))
    own = FileStore(Table.open(table), 1)
    serve_table(served, own)
    restore_table(served)
    assert own.gather(np.array([0])).shape == (1, 32)
    with pytest.raises(ConfigError, match="expected a served table, found none"):
        restore_table(served)


def test_a_table_is_not_served_over_another(released):
    _, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    with pytest.raises(ConfigError, match="served already"):
        serve_table(served, f"file:{table}")


def test_gradients_reach_the_dense_layers_and_rows_stay_constants(released):
    _, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    served(**batch()).logits.sum().backward()
    assert served.model.layers[1].ple.value_proj.weight.grad.abs().sum() > 0
    assert not tables(served)[1](torch.tensor([1])).requires_grad


def test_an_id_beyond_the_table_and_a_closed_store_are_errors(released):
    _, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    rows = tables(served)[1]
    with pytest.raises(RowOutOfRange, match=str(rows.store.info.rows)):
        rows(torch.tensor([[0, rows.store.info.rows]]))
    rows.store.close()
    with pytest.raises(StoreError, match="closed"), torch.no_grad():
        served(**batch())


# Saving.


def test_saving_refuses_to_lose_the_table_in_silence(released, tmp_path):
    checkpoint, table, model = released
    for served in (copy.deepcopy(model), load_without_table(Qwen4ExpForCausalLM, checkpoint)):
        serve_table(served, f"file:{table}")
        with pytest.raises(StoreError, match="without_table=True"):
            served.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    restore_table(served)
    with pytest.raises(StoreError, match="without_table=True"):  # it has none of its own
        served.save_pretrained(tmp_path / "lost")


def test_a_checkpoint_saved_without_its_table_is_loaded_without_it(released, tmp_path):
    checkpoint, table, model = released
    served = load_without_table(Qwen4ExpForCausalLM, checkpoint)
    serve_table(served, f"file:{table}")
    with torch.no_grad():
        served.lm_head.weight.mul_(2)
    served.save_pretrained(tmp_path / "dense", without_table=True)
    assert not [
        name
        for name in load_file(tmp_path / "dense" / "model.safetensors")
        if "ngram_embedding" in name
    ]
    again = load_without_table(Qwen4ExpForCausalLM, tmp_path / "dense")
    serve_table(again, f"file:{table}")
    assert equal(outputs(again), outputs(served)) and not equal(outputs(again), outputs(model))


def test_a_copy_of_a_model_saves_itself(released, tmp_path):
    checkpoint, _, _ = released
    model = load_without_table(Qwen4ExpForCausalLM, checkpoint)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path / "copy", without_table=True)
    assert not load_file(tmp_path / "copy" / "model.safetensors")["lm_head.weight"].any()


# Loading without the table.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_loaded_without_its_table_and_served_is_the_model(released, dtype):
    checkpoint, table, _ = released
    expected = Qwen4ExpForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = load_without_table(Qwen4ExpForCausalLM, checkpoint, dtype=dtype)
    assert type(model) is Qwen4ExpForCausalLM and not any(
        "ngram_embedding" in name for name in model.state_dict()
    )
    with pytest.raises(StoreError, match="serve_table"):
        model(**batch())
    serve_table(model, f"file:{table}")
    assert equal(outputs(model), outputs(expected))
    restore_table(model)
    with pytest.raises(StoreError, match="serve_table"):
        model(**batch())


def test_the_decoder_alone_is_loaded_and_records_what_it_is_asked_for(released):
    checkpoint, table, full = released
    model = load_without_table(Qwen4ExpTextModel, checkpoint)
    serve_table(model, f"file:{table}")
    with torch.no_grad():
        found = model(**batch(), output_hidden_states=True).hidden_states
        expected = full.model(**batch(), output_hidden_states=True).hidden_states
    assert len(found) == 5 and all(map(torch.equal, found, expected))


def rewrite(checkpoint: Path, target: Path, keep=lambda name: True, **changes) -> Path:
    """A checkpoint with some tensors left out and some fields of its config changed."""
    target.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = {
        name: value
        for name, value in load_file(checkpoint / "model.safetensors").items()
        if keep(name)
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_missing_dense_weight_is_an_error_and_buffers_are_computed(released, tmp_path):
    checkpoint, table, model = released
    lacking = rewrite(checkpoint, tmp_path / "a", lambda name: "value_proj" not in name)
    with pytest.raises(ConfigError, match="layers.1.ple.value_proj.weight"):
        load_without_table(Qwen4ExpForCausalLM, lacking)
    bare = rewrite(checkpoint, tmp_path / "b", lambda name: "ple_embedding" not in name)
    loaded = load_without_table(Qwen4ExpForCausalLM, bare)
    serve_table(loaded, f"file:{table}")
    assert equal(outputs(loaded), outputs(model))


def test_only_a_model_with_a_table_is_loaded_without_it(released, tmp_path):
    checkpoint, _, _ = released
    with pytest.raises(ConfigError, match="model's class"):
        load_without_table(checkpoint, Qwen4ExpForCausalLM)  # pyright: ignore
    with pytest.raises(
        ConfigError, match="model's class.*AutoModelForCausalLM"
    ):  # it would load the table
        load_without_table(AutoModelForCausalLM, checkpoint)  # pyright: ignore
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="expected a Qwen4-Exp model.*LlamaForCausalLM"):
        load_without_table(LlamaForCausalLM, tmp_path / "llama")
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        serve_table(llama, "file:none")


class ComputedRows(RowStore):
    """Rows that are a function of their id: a table of any size that takes no memory."""

    def __init__(self, rows: int, fmt: RowFormat, address_digest: str | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        self._info = StoreInfo(
            "computed", rows, fmt.row_bytes, False, format=fmt, address_digest=address_digest
        )

    @property
    def info(self) -> StoreInfo:
        return self._info

    def values(self, ids_N: np.ndarray) -> np.ndarray:
        return np.sin(ids_N[:, None] % 8191 + np.arange(self.fmt.d, dtype=np.float64)).astype(
            np.float32
        )

    def _gather(self, ids_N, out_NR):
        out_NR[...] = self.fmt.encode(self.values(ids_N))

    def _scatter(self, ids_N, rows_NR):
        raise NotImplementedError


def test_the_table_of_the_release_is_never_allocated(released, tmp_path):
    """320,001,536 rows of 160 f32 values, 190 GiB, with an address space of 6 GiB more than now."""
    sizes = {"ngram_vocab_size_base": 20_000_000, "heads_per_ngram": 8, "ple_embed_dim": 2560}
    torch.manual_seed(4)
    dense = make(heads_per_ngram=8, ple_embed_dim=2560)
    dense.save_pretrained(tmp_path / "small")
    del dense
    checkpoint = rewrite(
        tmp_path / "small", tmp_path / "large", lambda name: "ple_embedding" not in name, **sizes
    )
    limits, used = (
        resource.getrlimit(resource.RLIMIT_AS),
        int(Path("/proc/self/statm").read_text().split()[0]) * 4096,
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, limits[1]))
    try:
        with pytest.raises((RuntimeError, MemoryError)):  # the limit is real
            torch.empty(320_001_536, 160)
        model = load_without_table(Qwen4ExpForCausalLM, checkpoint)
        store = ComputedRows(320_001_536, RowFormat("f32", 160))
        serve_table(model, store)
        seen = []
        tables(model)[1].register_forward_hook(
            lambda _, args, out: seen.append((args[0].numpy(), out.numpy()))
        )
        found = model.generate(**batch(), max_new_tokens=3, do_sample=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert found.shape == (3, 17) and max(ids.max() for ids, _ in seen) > 300_000_000
    for ids, rows in seen:
        assert np.array_equal(rows.reshape(-1, 160), store.values(ids.reshape(-1)))


# Identity.


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seed": 7}, "seed: expected 1234, found 7"),
        (
            {"ngram_vocab_size_base": 223},
            r"rows_per_head \(ngram_vocab_size_base\): expected \[211, 211\], found \[223",
        ),
        (
            {"heads_per_ngram": 2},
            r"heads \(heads_per_ngram\): expected 4, found 2.*row width.*expected 8, found 16",
        ),
        (
            {"ngram_size": 5, "heads_per_ngram": 4},
            r"orders \(ngram_size\): expected \[2, 3\], found \[2, 3, 4, 5\]",
        ),
        ({"vocab_size": 99}, "vocab_size: expected 97, found 99"),
        ({"eos_token_id": [5, 4]}, r"filler_id \(eos_token_id\): expected 4, found 5"),
        (
            {"make_ngram_vocab_size_divisible_by": 64},
            r"pad_to \(make_ngram_\w+_by\): expected 128, found 64",
        ),
        (
            {"ple_embed_dim": 128},
            r"row width d \(ple_embed_dim over the columns\): expected 8, found 16",
        ),
    ],
)
def test_the_table_of_another_config_is_refused_naming_what_differs(tmp_path, change, told):
    model, other = make(), make(**change)
    write_table(other, tmp_path / "t")
    for store in (f"file:{tmp_path / 't'}", Table.open(tmp_path / "t")):
        with pytest.raises(DigestMismatch, match=told):
            serve_table(model, store)
    assert isinstance(tables(model)[1], nn.Embedding) and "save_pretrained" not in vars(model)


def test_a_table_of_another_layer_is_refused(tmp_path):
    write_table(make(ple_layer_ids=[3]), tmp_path / "t")
    with pytest.raises(
        DigestMismatch, match=r"layer_ids \(ple_layer_ids, counted from 0\): expected \[1\], found"
    ):
        serve_table(make(), Table.open(tmp_path / "t"))
    with pytest.raises(ConfigError, match="layer 1.*expected one of.*2"):
        serve_table(make(), f"file:{tmp_path / 't'}")


def test_a_table_with_another_vocabulary_map_is_refused(tmp_path):
    memory = EngramConfig.from_hf(Qwen4ExpTextConfig(**TINY))
    swapped = VocabMap(np.arange(97)[::-1].copy())
    Table.create(tmp_path / "t", memory, RowFormat("f32", 8), swapped).seal()
    with pytest.raises(DigestMismatch, match="another vocabulary map"):
        serve_table(make(), f"file:{tmp_path / 't'}")


def test_a_model_whose_hash_is_not_its_configs_is_refused(tmp_path):
    for name in ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets"):
        model = make()
        getattr(model.model.layers[1].ple.ple_embedding, name)[1] += 2
        with pytest.raises(DigestMismatch, match=f"layer 1, {name}: the config gives"):
            write_table(model, tmp_path / "t")
    model = make()
    model.model.layers[1].ple.ple_embedding.ngram_embedding = nn.Embedding(1792, 8)
    with pytest.raises(
        DigestMismatch, match=r"\[rows, d\] = \[1920, 8\], the model has \[1792, 8\]"
    ):
        serve_table(model, "file:none")
    with pytest.raises(ConfigError, match="meta device"):
        serve_table(make().to("meta"), "file:none")


@pytest.mark.parametrize("table_of", ["the model's own id", "the changed config"])
def test_an_eos_that_was_changed_on_a_living_model_is_compared_with_the_one_that_it_hashes_with(
    tmp_path, table_of
):
    model = make()
    write_table(make(eos_token_id=7) if table_of == "the changed config" else model, tmp_path / "t")
    model.config.eos_token_id = 7
    rows = ram_store(tables(model)[1].weight, RowFormat("f32", 8))
    for store in (f"file:{tmp_path / 't'}", Table.open(tmp_path / "t"), rows):
        with pytest.raises(
            DigestMismatch,
            match="layer 1, eos_token_id: the config gives 7, the model hashes with 4",
        ):
            serve_table(model, store, RowFormat("f32", 8))
    with pytest.raises(DigestMismatch, match="the model hashes with 4"):
        write_table(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    model.config.eos_token_id = [4, 7]  # the first of several is the one that is hashed
    if table_of == "the model's own id":
        before = outputs(model)
        serve_table(model, f"file:{tmp_path / 't'}")
        assert equal(outputs(model), before)


@pytest.mark.parametrize(
    "store, fmt, told",
    [
        (
            lambda: RamStore(1919, 32),
            RowFormat("f32", 8),
            "expected 1920 rows of d = 8, found 1919 of d = 8",
        ),
        (
            lambda: RamStore(1921, 32),
            RowFormat("f32", 8),
            "expected 1920 rows of d = 8, found 1921",
        ),
        (
            lambda: RamStore(1920, 64),
            RowFormat("f32", 16),
            "expected 1920 rows of d = 8, found 1920 of d = 16",
        ),
        (lambda: RamStore(1920, 32), RowFormat("bf16", 8), "16 bytes.*found 32"),
        (lambda: RamStore(1920, 32), None, "give row_format="),
        (
            lambda: RamStore(1920, 32, layer=2),
            RowFormat("f32", 8),
            "layer 1: expected its own store, found one of layer 2",
        ),
        (
            lambda: ComputedRows(1920, RowFormat("f32", 8), "0" * 64),
            None,
            "address digest \\w+, found 0{64}",
        ),
        (lambda: {2: RamStore(1920, 32)}, RowFormat("f32", 8), r"for layers \[1\], found \[2\]"),
        (lambda: "ram:", RowFormat("f32", 8), "holds none"),
        (lambda: None, None, "expected a URL"),
        (lambda: "redis:there", None, "redis"),
    ],
)
def test_a_store_of_other_sizes_is_refused_before_anything_is_read(store, fmt, told):
    model = make()
    with pytest.raises((ConfigError, DigestMismatch), match=told):
        serve_table(model, store(), fmt)
    assert isinstance(tables(model)[1], nn.Embedding)


def test_a_format_that_contradicts_the_tables_is_refused(released):
    _, table, model = released
    with pytest.raises(ConfigError, match="f32"):
        serve_table(copy.deepcopy(model), f"file:{table}", RowFormat("bf16", 8))


def test_layers_of_two_tables_are_refused(tmp_path):
    model = make(ple_layer_ids=[1, 3])
    for name in "ab":
        write_table(model, tmp_path / name)
    with pytest.raises(DigestMismatch, match="rows of one table"):
        serve_table(
            model,
            {
                0: FileStore(Table.open(tmp_path / "a"), 0),
                2: FileStore(Table.open(tmp_path / "b"), 2),
            },
        )


# Writing.


@pytest.mark.parametrize(
    "dtype, kind", [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")]
)
def test_a_written_table_keeps_every_bit_padding_rows_too(tmp_path, dtype, kind):
    model = make(dtype)
    table_id = write_table(model, tmp_path / "t")
    table = Table.open(tmp_path / "t")
    table.verify()
    weight = tables(model)[1].weight.detach()
    assert (table.table_id, table.fmt.kind, table.rows(1)) == (
        table_id,
        kind,
        1920,
    ) and weight.shape == (1920, 8)
    rows = FileStore(table, 1).gather(np.arange(1920))
    assert np.array_equal(rows, weight.view(torch.uint8).numpy().reshape(1920, -1))
    assert table.config == EngramConfig.from_hf(model.config)


def test_a_table_that_is_not_in_memory_is_not_written(released, tmp_path):
    checkpoint, table, model = released
    served = copy.deepcopy(model)
    serve_table(served, f"file:{table}")
    for source in (served, load_without_table(Qwen4ExpForCausalLM, checkpoint)):
        with pytest.raises(ConfigError, match="expected a table of f32, f16, bf16 in memory"):
            write_table(source, tmp_path / "t")
    with pytest.raises(TableError, match="taken"):
        write_table(model, table)


def test_a_table_on_the_meta_device_is_served(released):
    _, table, model = released
    served = copy.deepcopy(model)
    tables(served)[1].weight = nn.Parameter(torch.empty(1920, 8, device="meta"))
    serve_table(served, f"file:{table}")
    assert isinstance(tables(served)[1], ServedRows) and equal(outputs(served), outputs(model))


# check_config.


def compressed(raw: int = 64, size: int = 40) -> VocabMap:
    return VocabMap(np.arange(raw) % size)


def test_a_config_that_fits_gives_the_memory(tmp_path):
    memory = check_config(DEEPSEEK, compressed())
    assert (
        memory.hash == HashSpec.deepseek_v41((1, 3), (2, 3, 4), 2, 50, 40, 2) and memory.dim == 32
    )
    Table.create(tmp_path / "t", memory, RowFormat("fp8", 32), compressed()).seal()
    assert check_config(DEEPSEEK, compressed(), Table.open(tmp_path / "t")) == memory
    assert check_config(DEEPSEEK, table=Table.open(tmp_path / "t")) == memory
    assert check_config(Qwen4ExpTextConfig(**TINY), VocabMap.identity(97)).dim == 8


@pytest.mark.parametrize(
    "config, vocab, told",
    [
        (
            DEEPSEEK,
            compressed(size=39),
            "engram_compressed_vocab_size: expected 40 ids, as in the config, found 39 in the",
        ),
        (
            DEEPSEEK,
            compressed(raw=60),
            "vocab_size: expected 64 raw ids, as in the config, found 60 in the vocabulary map",
        ),
        (
            DEEPSEEK,
            VocabMap(np.where(np.arange(64) == 2, -1, np.arange(64) % 40)),
            "engram_pad_token_id.*found 2",
        ),
        (
            TINY,
            VocabMap.identity(96),
            "vocab_size: expected 97 ids, as in the config, found 96 in the vocabulary map",
        ),
        (TINY, VocabMap(np.arange(97)[::-1].copy()), "expected the identity of 97 ids"),
    ],
)
def test_a_config_that_does_not_fit_its_tokenizer_is_refused_by_name(config, vocab, told):
    with pytest.raises(DigestMismatch, match=told):
        check_config({"rms_norm_eps": 1e-6, **config}, vocab)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"engram_layer_ids": [1, 2]},
            r"layer_ids \(engram_layer_ids\): expected \[1, 2\], found \[1, 3\]",
        ),
        (
            {"engram_max_ngram_size": 3},
            r"orders \(engram_max_ngram_size\): expected \[2, 3\], found \[2, 3, 4\]",
        ),
        ({"engram_n_heads": 4}, r"heads \(engram_n_heads\): expected 4, found 2"),
        (
            {"engram_vocab_size": 60},
            r"rows_per_head \(engram_vocab_size\): expected \[60, 60, 60\], found \[50, 50, 50\]",
        ),
        (
            {"engram_compressed_vocab_size": 39},
            r"vocab_size \(engram_compressed_vocab_size\): expected 39, found 40",
        ),
        ({"engram_pad_token_id": 3}, r"filler_id \(engram_pad_token_id\): expected 3, found 2"),
        ({"engram_head_dim": 64}, r"row width d \(engram_head_dim\): expected 64, found 32"),
    ],
)
def test_a_config_that_does_not_fit_its_table_is_refused_by_name(tmp_path, change, told):
    Table.create(tmp_path / "t", check_config(DEEPSEEK), RowFormat("fp8", 32), compressed()).seal()
    with pytest.raises(DigestMismatch, match=told):
        check_config({**DEEPSEEK, **change}, table=Table.open(tmp_path / "t"))


def test_another_map_of_the_same_size_is_refused(tmp_path):
    Table.create(tmp_path / "t", check_config(DEEPSEEK), RowFormat("fp8", 32), compressed()).seal()
    other = VocabMap((np.arange(64) + 1) % 40)
    with pytest.raises(DigestMismatch, match="another vocabulary map of 40 ids"):
        check_config(DEEPSEEK, other, Table.open(tmp_path / "t"))


def test_every_field_of_a_spec_is_compared(tmp_path):
    memory = check_config(DEEPSEEK)
    other = dataclasses.replace(memory.hash, dialect="demo", seed=3, pad_to=2)
    Table.create(
        tmp_path / "t", dataclasses.replace(memory, hash=other), RowFormat("fp8", 32), compressed()
    ).seal()
    with pytest.raises(DigestMismatch) as error:
        check_config(DEEPSEEK, table=Table.open(tmp_path / "t"))
    assert (
        "dialect: expected deepseek_v41, found demo; seed: expected 0, found 3; "
        "pad_to: expected 1, found 2" in str(error.value)
    )
