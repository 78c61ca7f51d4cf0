"""A subclass of EngramLayer may define another gate."""

import torch

from engraphy.fusion.layer import EngramLayer
from engraphy.spec.layer import LayerSpec

SPEC = LayerSpec(8, 12, streams=2, order=2)


class Sigmoid(EngramLayer):
    def gate(self, u_BTS):
        return torch.sigmoid(u_BTS)


class Half(EngramLayer):
    def gate(self, u_BTS):
        return torch.full_like(u_BTS, 0.5)


def _inputs():
    torch.manual_seed(0)
    return torch.randn(2, 5, 2, 8), torch.randn(2, 5, 12)


def _with_weights_of(kind, other):
    layer = kind(SPEC)
    layer.load_state_dict(other.state_dict())
    return layer.eval()


def test_another_gate_is_computed_from_the_same_match_of_query_and_key():
    released = EngramLayer(SPEC).eval()
    x_BTSD, rows_BTE = _inputs()
    _, gate_BTS, _ = released(x_BTSD, rows_BTE)
    _, other_BTS, _ = _with_weights_of(Sigmoid, released)(x_BTSD, rows_BTE)
    u_BTS = torch.logit(other_BTS)  # of the plain sigmoid
    torch.testing.assert_close(gate_BTS, torch.sigmoid(u_BTS.sign() * u_BTS.abs().sqrt()))


def test_a_constant_gate_leaves_the_value_alone_to_decide():
    layer = _with_weights_of(Half, EngramLayer(SPEC))
    x_BTSD, rows_BTE = _inputs()
    update_BTSD, gate_BTS, _ = layer(x_BTSD, rows_BTE)
    assert (gate_BTS == 0.5).all()
    assert (layer(-x_BTSD, rows_BTE)[0] == update_BTSD).all()


def test_a_layer_with_another_gate_takes_no_native_path_for_one_token():
    layer = _with_weights_of(Half, EngramLayer(SPEC))
    assert layer._parts() is None
