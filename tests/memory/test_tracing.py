"""What records a forward would keep one input's rows as constants: it is a named error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.errors import InputError
from engraphy.memory.tracing import refuse_tracing
from tests.tools.tiny_training import attach_tiny, tiny_model

LAYERS, HIDDEN, DIM, VOCAB = (1, 3), 12, 4, 40
IDS_BT = torch.arange(3, 15)[None]
CONSTANTS = "would keep the rows of these ids as constants"


class Own(nn.Module):
    """A model of one's own with a memory."""

    def __init__(self) -> None:
        super().__init__()
        spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=VOCAB, pad_id=0)
        config = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)
        self.memory = EngramMemory(config, VocabMap.identity(VOCAB))
        self.memory.init_rows(1.0, 0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, ids_BT):
        lookup, x_BTD = self.memory.lookup(ids_BT), self.embed(ids_BT)
        for layer in LAYERS:
            x_BTD = self.memory.fuse(layer, torch.tanh(x_BTD), lookup)
        return x_BTD


class Logits(nn.Module):
    """An attached model that takes ids and gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.memory = attach_tiny(self.model)

    def forward(self, ids_BT):
        return self.model(input_ids=ids_BT, use_cache=False).logits


def onnx(model):
    pytest.importorskip("onnxscript", reason="the exporter of torch.onnx needs onnxscript")
    torch.onnx.export(model, (IDS_BT,), dynamo=True)


def fake(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(IDS_BT))


RECORDERS = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, IDS_BT),
    "torch.export": lambda model: torch.export.export(model, (IDS_BT,), strict=False),
    "torch.onnx": onnx,
    "make_fx": lambda model: make_fx(model)(IDS_BT),
    "make_fx, fake": lambda model: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(
        IDS_BT
    ),
    "fake tensors": fake,
    "meta": lambda model: model(IDS_BT.to("meta")),
    "vmap": lambda model: torch.vmap(model)(IDS_BT[None].expand(3, -1, -1)),
    "vmap over weights": lambda model: torch.vmap(
        lambda weights: torch.func.functional_call(model, weights, (IDS_BT,))
    )({name: value[None] for name, value in model.named_parameters()}),
    "grad": lambda model: torch.func.grad(
        lambda weights: torch.func.functional_call(model, weights, (IDS_BT,)).sum()
    )(dict(model.named_parameters())),
    "functionalize": lambda model: torch.func.functionalize(model)(IDS_BT),
}


@pytest.fixture(params=[Own, Logits])
def model(request):
    return request.param().eval()


@pytest.mark.parametrize("name", RECORDERS)
def test_a_recorded_forward_is_a_named_error(name, model):
    if isinstance(model, Own) and name == "meta":
        model = model.to("meta")
    with pytest.raises(Exception) as caught:
        RECORDERS[name](model)
    found = caught.value
    while found is not None and not isinstance(found, InputError):  # exporters wrap what they meet
        found = found.__cause__ or found.__context__
    assert found is not None and CONSTANTS in str(found), repr(caught.value)


def test_symbolic_tracing_is_a_named_error():
    with pytest.raises(InputError, match=f"a Proxy.*{CONSTANTS}"):
        torch.fx.symbolic_trace(Own())


@pytest.mark.parametrize(
    "record",
    [
        lambda model: torch.compile(model, fullgraph=True, backend="eager")(IDS_BT),
        lambda model: torch.export.export(model, (IDS_BT,), strict=True),
    ],
    ids=["fullgraph", "strict export"],
)
def test_a_graph_of_the_whole_model_says_what_to_do(record, model):
    torch.compiler.reset()
    try:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the blocks"):
            record(model)
    finally:
        torch.compiler.reset()


def test_the_capture_of_a_cuda_graph_is_a_named_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match=f"CUDA graph.*{CONSTANTS}"):
        Own()(IDS_BT)


def test_nothing_is_read_and_no_state_changes_before_the_error():
    memory = Own().memory
    state = memory.state(1)
    with pytest.raises(InputError, match=CONSTANTS):
        torch.vmap(lambda ids_BT: memory.lookup(ids_BT, state).rows[1])(IDS_BT[None])
    assert state.length == 0 and memory.prefetcher.stats.tickets == 0


@torch.no_grad()
def test_what_runs_each_time_is_no_recording(model):
    expected = model(IDS_BT)
    weights = {name: value * 1 for name, value in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, weights, (IDS_BT,)), expected)
    with FlopCounterMode(display=False):
        assert torch.equal(model(IDS_BT), expected)
    with torch.autocast("cpu", enabled=False), torch.device("cpu"):
        assert torch.equal(model(IDS_BT), expected)


@torch.no_grad()
def test_a_model_whose_memory_is_disabled_can_be_recorded():
    model = Logits().eval()
    with model.memory.disabled():
        traced, expected = torch.jit.trace(model, IDS_BT, check_trace=False), model(IDS_BT)
        exported = torch.export.export(model, (IDS_BT,), strict=False)
    torch.testing.assert_close(traced(IDS_BT), expected)
    torch.testing.assert_close(exported.module()(IDS_BT), expected)


def test_the_look_costs_next_to_nothing(monkeypatch):
    """No mode is listed, and no class walked over, in an ordinary forward."""
    listed = torch.utils._python_dispatch
    monkeypatch.setattr(listed, "_get_current_dispatch_mode_stack", lambda: pytest.fail("listed"))
    refuse_tracing(IDS_BT)
