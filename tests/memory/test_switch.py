"""memory.disabled() in a model of one's own: x stays as it is, and no state is out of step."""

from __future__ import annotations

import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, Trace, VocabMap
from engraphy.errors import ConfigError, InputError
from engraphy.lm import LM, LMConfig

LAYERS, HIDDEN, DIM, VOCAB = (1, 3), 12, 4, 40
IDS_BT = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
X_BTSD = torch.randn(2, 9, 1, HIDDEN, generator=torch.Generator().manual_seed(2))


def make_memory() -> EngramMemory:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=VOCAB, pad_id=0)
    config = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    memory.init_rows(std=1.0, seed=0)
    return memory.eval()


def test_apply_gives_x_itself_and_nothing_is_read():
    memory, trace = make_memory(), Trace()
    with memory.disabled():
        lookup = memory.lookup(IDS_BT, trace=trace)
        assert lookup.off and not lookup.rows
        assert memory.fuse(1, X_BTSD, lookup) is X_BTSD
        with pytest.raises(ConfigError, match="layer 2 has no memory"):
            memory.fuse(2, X_BTSD, lookup)
    assert memory.prefetcher.stats.tickets == 0 and not trace.row_ids and not trace.gates


def test_a_forward_stays_what_it_was_when_it_was_looked_up():
    memory = make_memory()
    lookup = memory.lookup(IDS_BT)
    expected = memory.fuse(1, X_BTSD, lookup)
    with memory.disabled():
        off = memory.lookup(IDS_BT)
        assert torch.equal(memory.fuse(1, X_BTSD, lookup), expected)
    assert memory.fuse(1, X_BTSD, off) is X_BTSD


def test_a_state_is_refused_while_the_memory_is_disabled_and_stays_as_it_was():
    memory = make_memory()
    state = memory.state(2)
    memory.lookup(IDS_BT, state)
    with (
        memory.disabled(),
        pytest.raises(InputError, match="expected none while the memory is disabled"),
    ):
        memory.lookup(IDS_BT[:, :1], state)
    assert state.length == 9


def test_the_reference_model_runs_without_its_memory():
    config = LMConfig(vocab_size=VOCAB, hidden_size=HIDDEN, layers=4, heads=2, ffn=16)
    model = LM(config, make_memory()).eval()
    with_it = model(IDS_BT)
    with model.memory.disabled():
        without = model(IDS_BT)
    memory, model.memory = model.memory, None
    assert torch.equal(model(IDS_BT), without) and not torch.equal(with_it, without)
    assert memory.enabled
