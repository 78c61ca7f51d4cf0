"""Routes: the same tokens for every model, and what gates are worth on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy import VocabMap
from engraphy.addresses import Addresser, HotIndex, Ngrams
from engraphy.analysis.routes import ALL, COLD, HOT, RoutedText, by_route, gate_report
from engraphy.data.packing import Batches
from engraphy.lm import LM, LMConfig, MemorySizes, memory_arm, moe_arm
from engraphy.lm.controls import make_memory
from engraphy.spec.hash import HashSpec

V = 24
VOCAB = VocabMap(np.arange(V) // 2)
MOE = LMConfig(
    V,
    16,
    layers=2,
    heads=2,
    ffn=40,
    moe_layers=(0, 1),
    experts=8,
    top_k=2,
    expert_ffn=12,
    shared_ffn=60,
)
BIGRAMS, TRIGRAMS = {(3, 4), (5, 5), (0, 2)}, {(1, 3, 4), (0, 0, 2)}


def text() -> RoutedText:
    documents = [np.random.default_rng(seed).integers(1, V, 40) for seed in range(4)]
    batches = Batches(documents, 0, batch=3, tokens=16, seed=None)
    spec = HashSpec.demo((0,), (2, 3), 1, 1, len(VOCAB), 0)
    ngrams = Ngrams({2: sorted(BIGRAMS), 3: sorted(TRIGRAMS)}, VOCAB.digest)
    return RoutedText.of(batches, Addresser(spec, VOCAB), HotIndex.build(ngrams))


def model(with_memory: bool = True) -> LM:
    torch.manual_seed(0)
    if not with_memory:
        return LM(moe_arm(MOE).model)
    arm = memory_arm(MOE, 0.5, MemorySizes(heads=2, dim=2), len(VOCAB), 0)
    return LM(arm.model, make_memory(arm.memory, VOCAB, 1.0, 0))


def test_a_token_has_the_highest_order_whose_ngram_is_frequent():
    routed = text()
    expected = []
    for ids_BT, targets_BT, starts_BT in routed.batches:
        rows = zip(ids_BT.tolist(), targets_BT.tolist(), starts_BT.tolist(), strict=True)
        for ids, targets, starts in rows:
            seen: list[int] = []
            for token, target, start in zip(ids, targets, starts, strict=True):
                seen = [0, 0] if start else seen  # the filler, id 0
                seen = [*seen, int(VOCAB.table[token])]
                two, three = tuple(seen[-2:]), tuple(seen[-3:])
                if target >= 0:
                    expected.append(3 if three in TRIGRAMS else 2 if two in BIGRAMS else 0)
    assert routed.routes_M.tolist() == expected
    assert {2, 0} <= set(expected)
    groups = routed.groups()
    assert (groups[HOT] ^ groups[COLD]).all()
    assert sum(routed.shares().values()) == pytest.approx(2 + routed.shares()[HOT])


def test_losses_by_route_are_those_of_the_model_with_and_without_a_memory():
    routed = text()
    for one in (model(False), model()):
        losses = [one.eval().token_losses(*batch) for batch in routed.batches]
        kept = [batch.targets_BT >= 0 for batch in routed.batches]
        losses_M = torch.cat([a[b] for a, b in zip(losses, kept, strict=True)]).numpy()
        means = by_route(one, routed)
        assert means["loss"][ALL] == pytest.approx(losses_M.mean(), rel=1e-5)
        cold_M = routed.routes_M == 0
        assert means["loss"][COLD] == pytest.approx(losses_M[cold_M].mean(), rel=1e-5)
        assert ("gate" in means) == (one.memory is not None)


def test_the_worth_of_gates_is_measured_against_both_ends():
    one, routed = model(), text()
    report = gate_report(one, routed)
    whole = report["by_route"]["all"]
    with one.memory.disabled():
        closed = [one.token_losses(*batch)[batch.targets_BT >= 0] for batch in routed.batches]
    assert whole["closed"] == pytest.approx(float(torch.cat(closed).mean()), abs=1e-6)
    assert whole["loss"] == pytest.approx(routed.read(one).losses_M.mean())
    assert whole["best"] < min(whole["loss"], whole["closed"], whole["opened"])
    assert 0 < whole["wrong"] < 1
    assert sum(bucket["share"] for bucket in report["buckets"].values()) == pytest.approx(1)
    for name, bucket in report["buckets"].items():
        low, high = map(float, name.split("-"))
        assert low <= bucket["gate"] <= high
