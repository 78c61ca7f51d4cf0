"""hf/served.py: rows of a served table are read before their block needs them, the block's own
request decides, and calls do not meet."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Qwen4ExpConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForConditionalGeneration

from engraphy import RowFormat
from engraphy.errors import StoreError
from engraphy.hf.qwen4 import restore_table, serve_table
from engraphy.hf.served import _CALL
from engraphy.hf.versions import cache_argument
from engraphy.store import RamStore
from engraphy.store.wrapper import WrapperStore
from tests.tools.qwen4_models import TINY, batch, equal, make, outputs, ram_store, tables

FMT = RowFormat("f32", 8)
TWO: dict[str, Any] = {"ple_layer_ids": [2, 3]}


class Seen(WrapperStore):
    """A store that is not in memory, and keeps what it was asked for. `gate` may hold reads up."""

    def __init__(self, store: RamStore) -> None:
        super().__init__(store)
        self.asked: list[np.ndarray] = []
        self.begun = threading.Event()
        self.gate: Callable[[], object] = lambda: None

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self.begun.set()
        self.gate()
        self.asked.append(ids_N.copy())
        super()._gather(ids_N, out_NR)


def serve(model) -> dict[int, Seen]:
    """Serves the model's own rows, from stores that are not in memory."""
    stores = {layer: Seen(ram_store(rows.weight, FMT)) for layer, rows in tables(model).items()}
    serve_table(model, stores, FMT)
    return stores


def requests(model) -> dict[int, list[np.ndarray]]:
    """Fills with what the blocks ask for."""
    found: dict[int, list[np.ndarray]] = {}
    for layer, rows in tables(model).items():
        asked = found[layer] = []
        rows.register_forward_hook(
            lambda _, args, out, asked=asked: asked.append(args[0].numpy().reshape(-1).copy())
        )
    return found


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"eos_token_id": 30},
    ],
    ids=lambda options: next(iter(options), "greedy"),
)
@pytest.mark.parametrize("orders", [3, 4])
def test_what_blocks_ask_for_was_read_ahead_once_and_nothing_else_was(options, orders):
    model = make(**TWO, ngram_size=orders, ple_embed_dim=8 * 4 * (orders - 1))
    before = outputs(model, **options)
    stores, asked = serve(model), requests(model)
    assert equal(outputs(model, **options), before)
    assert sorted(asked) == [1, 2] and len(asked[1]) > 1
    for layer, store in stores.items():
        assert same(store.asked, asked[layer])
        assert tables(model)[layer].table.ahead.inline == 0


def test_rows_of_all_layers_are_being_read_while_the_first_block_computes():
    model = make(**TWO)
    stores, seen = serve(model), []

    def in_block(*_: object) -> None:
        seen.append([store.begun.wait(20) for store in stores.values()])

    model.model.layers[0].mlp.register_forward_hook(in_block)
    with torch.no_grad():
        model(**batch())
    assert seen == [[True, True]]


def test_a_block_waits_for_its_own_layer_alone():
    """Rows of the last layer come only after the block of the first layer has used its own."""
    model = make(**TWO)
    with torch.no_grad():
        expected = model(**batch()).logits
        stores, used = serve(model), threading.Event()
        stores[2].gate = lambda: used.wait(20) or pytest.fail("layer 1 waited for layer 2")
        model.model.layers[1].mlp.register_forward_hook(lambda *_: used.set())
        assert torch.equal(model(**batch()).logits, expected)


def test_the_multimodal_model_reads_ahead():
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    torch.manual_seed(3)
    config = Qwen4ExpConfig(text_config=TINY, vision_config=vision)
    model = Qwen4ExpForConditionalGeneration(config).eval()
    before = outputs(model)
    stores, asked = serve(model), requests(model)
    assert equal(outputs(model), before)
    assert same(stores[1].asked, asked[1])


# The block's request decides.


def test_a_block_that_asks_for_other_rows_gets_them():
    """The hash of a layer is changed after serving: reading ahead does not know it."""
    model, other = make(**TWO), make(**TWO)
    stores, asked = serve(model), requests(model)
    for changed in (model, other):
        changed.model.layers[2].ple.ple_embedding.layer_multipliers[1] += 2
    assert equal(outputs(model), outputs(other))
    assert same(stores[1].asked, asked[1])
    assert not same(stores[2].asked, asked[2])


def test_a_cache_that_is_cropped_gives_the_models_outputs():
    """All linear layers have a table: transformers does not crop the caches of others."""
    model, other = make(ple_layer_ids=[1, 2, 3]), make(ple_layer_ids=[1, 2, 3])
    stores, asked = serve(model), requests(model)
    ids = batch()["input_ids"][2:]

    def logits(of) -> torch.Tensor:
        """The last tokens once more, after they were taken back."""
        cache = DynamicCache(config=of.config)
        cache.activate_past_recording()
        with torch.no_grad():
            of.model(ids[:, :9], **{name: cache})
            of.model(ids[:, 9:], **{name: cache})
            cache.crop(-3)
            return of.model(ids[:, 11:], **{name: cache}).last_hidden_state

    name = cache_argument(inspect.signature(model.model.forward).parameters)
    assert torch.equal(logits(model), logits(other))
    for layer, store in stores.items():
        assert same(store.asked, asked[layer])


def test_ids_that_the_vocabulary_has_not_are_the_models_own_matter():
    model, other = make(), make()
    stores, asked = serve(model), requests(model)
    embeds, ids = torch.randn(1, 6, 32), torch.tensor([[5, 9, 400, 7, -3, 8]])
    with torch.no_grad():
        found, expected = (
            of.model(inputs_embeds=embeds, ple_input_ids=ids).last_hidden_state
            for of in (model, other)
        )
    assert torch.equal(found, expected) and same(stores[1].asked, asked[1])


def test_recomputed_activations_give_the_models_gradients():
    grads = []
    for served in (True, False):
        model = make(**TWO).train()
        if served:
            serve(model)
        model.gradient_checkpointing_enable()
        model(**batch(), use_cache=False).logits.square().sum().backward()
        grads.append([block.ple.value_proj.weight.grad for block in model.model.layers[1:3]])
    assert all(map(torch.equal, *grads)) and grads[0][0].abs().sum() > 0


# Calls do not meet, and leave nothing behind.


def test_forwards_in_many_threads_get_their_own_rows():
    model = make(**TWO)
    ids = torch.randint(5, 97, (12, 2, 9), generator=torch.Generator().manual_seed(5))

    def logits(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids_BT).logits

    expected = [logits(ids_BT) for ids_BT in ids]
    stores = serve(model)
    together = threading.Barrier(4)

    def meet(*_: object) -> None:
        together.wait(20)

    model.model.layers[0].mlp.register_forward_hook(meet)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(logits, ids))
    assert all(map(torch.equal, found, expected))
    assert all(len(store.asked) == 12 for store in stores.values())


def test_a_model_within_another_reads_from_its_own_table():
    outer, inner, plain = make(**TWO), make(**TWO), make(**TWO)
    with torch.no_grad():
        for model in (inner, plain):
            for rows in tables(model).values():
                rows.weight.neg_()
    serve(outer)
    stores, asked = serve(inner), requests(inner)
    found: list[torch.Tensor] = []
    outer.model.layers[2].register_forward_hook(lambda *_: found.append(inner(**batch()).logits))
    with torch.no_grad():
        assert torch.equal(outer(**batch()).logits, make(**TWO)(**batch()).logits)
        assert torch.equal(found[0], plain(**batch()).logits)
    assert all(same(stores[layer].asked, asked[layer]) for layer in stores)


@pytest.mark.parametrize("where", ["before the tables", "between the tables", "head"])
def test_a_forward_that_raises_leaves_nothing_behind(where):
    model = make(**TWO)
    serve(model)
    part = {
        "before the tables": model.model.layers[0].mlp,
        "between the tables": model.model.layers[1].mlp,
        "head": model.lm_head,
    }[where]
    broken = part.register_forward_hook(_fail)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(**batch())
    assert _CALL.get() is None
    assert tables(model)[1].table.ahead.waiting == 0
    broken.remove()
    assert equal(outputs(model), outputs(make(**TWO)))


def test_a_read_that_fails_is_raised_by_its_block_and_the_next_forward_is_sound():
    model = make(**TWO)
    stores, reached = serve(model), []
    stores[2].gate = _fail
    model.model.layers[1].register_forward_hook(lambda *_: reached.append(1))
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(**batch())
    assert reached == [1] and _CALL.get() is None
    stores[2].gate = lambda: None
    assert equal(outputs(model), outputs(make(**TWO)))


def test_rows_that_no_block_asks_for_are_given_up():
    model = make(**TWO)
    serve(model)
    model.config.num_hidden_layers = 2  # an early exit
    with torch.no_grad():
        model(**batch(), use_cache=False)
    ahead = tables(model)[1].table.ahead
    assert (ahead.tickets, ahead.cancelled, ahead.waiting) == (2, 1, 0)


def test_a_restored_model_has_no_hook_and_reads_nothing():
    model = make(**TWO)
    stores = serve(model)
    table = tables(model)[1].table
    restore_table(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert equal(outputs(model), outputs(make(**TWO)))
    assert not any(store.asked for store in stores.values())
    with pytest.raises(StoreError, match="closed"):
        table._prefetcher.submit({1: np.zeros((1, 1, 8), np.int64)})


def test_few_rows_in_memory_are_read_without_another_thread():
    model = make(**TWO)
    expected = outputs(model)
    serve_table(
        model, {layer: ram_store(rows.weight, FMT) for layer, rows in tables(model).items()}, FMT
    )
    assert equal(outputs(model), expected)
    ahead = tables(model)[1].table.ahead
    assert ahead.tickets == ahead.inline > 0


def _fail(*_: object) -> None:
    raise ZeroDivisionError
