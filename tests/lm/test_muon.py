"""Muon: singular values in the band of the coefficients, equal to a plain float64 version, and each
matrix by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from engraphy.errors import ConfigError
from engraphy.fusion import EngramLayer
from engraphy.lm import LM, LMConfig
from engraphy.lm.muon import (
    COEFFICIENTS,
    MOMENTUM,
    STEPS,
    Matrices,
    Muon,
    matrices_of,
    orthogonalized,
)
from engraphy.lm.optimizers import MuonAdamW
from engraphy.spec.layer import LayerSpec

CONFIG = LMConfig(
    32, 16, 2, 2, 24, moe_layers=(1,), experts=4, top_k=2, expert_ffn=8, shared_ffn=12
)


def with_condition(rows: int, columns: int, condition: float, seed: int = 0) -> np.ndarray:
    """A float64 matrix whose singular values fall geometrically from 1 to 1 / condition."""
    random = np.random.default_rng(seed)
    count = min(rows, columns)
    left = np.linalg.qr(random.standard_normal((rows, count)))[0]
    right = np.linalg.qr(random.standard_normal((columns, count)))[0]
    return left * np.geomspace(1, 1 / condition, count) @ right.T


def mapped(singular: np.ndarray) -> np.ndarray:
    """What the iteration does to singular values, one by one."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        singular = a * singular + b * singular**3 + c * singular**5
    return singular


def plain_orthogonalized(values: np.ndarray) -> np.ndarray:
    """Through the singular value decomposition, float64."""
    left, singular, right = np.linalg.svd(values, full_matrices=False)
    return left * mapped(singular / np.linalg.norm(values)) @ right


def plain_steps(start, grads, lr, decay, split) -> np.ndarray:
    """Muon in float64, written from its definition. split: the matrices of an array, as views."""
    weight, mean = start.astype(np.float64), np.zeros(start.shape)
    for grad in grads:
        mean = MOMENTUM * mean + (1 - MOMENTUM) * grad
        ahead = (1 - MOMENTUM) * grad + MOMENTUM * mean
        weight = weight * (1 - lr * decay)
        for target, direction in zip(split(weight), split(ahead), strict=True):
            target -= lr * 0.2 * np.sqrt(max(direction.shape)) * plain_orthogonalized(direction)
    return weight


# --- orthogonalised -------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("shape", [(8, 8), (16, 48), (48, 16), (64, 64), (128, 96)])
def test_singular_values_lie_in_the_band_of_the_coefficients(shape, condition):
    matrix = torch.tensor(with_condition(*shape, condition), dtype=torch.float32)
    found = torch.linalg.svdvals(orthogonalized(matrix.double()))
    assert found.min() > 0.68 and found.max() < 1.21
    single = torch.linalg.svdvals(orthogonalized(matrix))
    assert single.min() > 0.68 and single.max() < 1.21


def test_the_band_holds_for_what_is_above_a_500th_of_the_norm():
    band = mapped(np.geomspace(1 / 500, 1, 100_000))
    assert 0.68 < band.min() < 0.69 and 1.20 < band.max() < 1.21
    assert mapped(np.array([1 / 1000]))[0] < 0.5  # below it lies what is near to zero


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_singular_vectors_stay_and_values_are_mapped_one_by_one(shape):
    matrix = with_condition(*shape, 100) * 7
    found = orthogonalized(torch.tensor(matrix)).numpy()
    np.testing.assert_allclose(found, plain_orthogonalized(matrix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", [1, 100])
def test_float32_is_close_to_the_plain_float64_version(condition):
    matrix = with_condition(64, 96, condition).astype(np.float32)
    found = orthogonalized(torch.tensor(matrix)).numpy()
    # Five products of sums of 64 terms; the slope of the iteration at zero carries errors on.
    bound = STEPS * 64 * np.finfo(np.float32).eps * COEFFICIENTS[0]
    assert abs(found - plain_orthogonalized(matrix.astype(np.float64))).max() < bound


def test_the_scale_of_a_matrix_does_not_matter_and_zeros_stay():
    matrix = torch.tensor(with_condition(16, 24, 10))
    for scale in (1e-6, 1e6):
        assert torch.allclose(orthogonalized(matrix * scale), orthogonalized(matrix), atol=1e-5)
    assert not orthogonalized(torch.zeros(3, 4)).any()


def test_each_matrix_of_a_stack_is_by_itself():
    stack = torch.stack([torch.tensor(with_condition(8, 12, 10, seed)) for seed in range(3)])
    stack[1] *= 1000
    found = orthogonalized(stack)
    for one, alone in zip(found, stack, strict=True):
        assert torch.allclose(one, orthogonalized(alone), atol=1e-12)


# --- which matrices -------------------------------------------------------------------------------


def test_a_models_matrices_are_its_projections_and_experts():
    found = {item.name: item for item in matrices_of(LM(CONFIG))}
    dense = {"gate_up": (24, 24), "down": (16,)}
    expected = {f"blocks.0.ffn.{name}.weight": sizes for name, sizes in dense.items()}
    for layer in (0, 1):
        expected[f"blocks.{layer}.attention.qkv.weight"] = (16, 16, 16)
        expected[f"blocks.{layer}.attention.out.weight"] = (16,)
    expected |= {
        "blocks.1.ffn.gate_up": (8, 8),
        "blocks.1.ffn.down": (16,),
        "blocks.1.ffn.shared.gate_up.weight": (12, 12),
        "blocks.1.ffn.shared.down.weight": (16,),
    }
    assert {name: item.sizes for name, item in found.items()} == expected


def test_an_untied_head_and_a_frozen_weight_are_not_among_them():
    model = LM(LMConfig(32, 16, 1, 2, 24, tie_embeddings=False))
    model.blocks[0].attention.out.weight.requires_grad_(False)
    names = [item.name for item in matrices_of(model)]
    assert model.head is not None and "head.weight" not in names
    assert "blocks.0.attention.out.weight" not in names and len(names) == 3


def test_a_memorys_projections_are_matrices_one_a_stream():
    found = matrices_of(EngramLayer(LayerSpec(8, 12, streams=3)))
    assert {item.name: item.sizes for item in found} == {
        "key.weight": (8, 8, 8),
        "value.weight": (8,),
    }


def test_a_weight_that_is_tied_to_an_embedding_is_no_matrix():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8, bias=False)})
    model["out"].weight = model["embed"].weight
    assert matrices_of(model) == []


class Declared(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.matrices = {"mix": parts, "absent": 3}
        self.absent = None
        self.mix = nn.Linear(4, 10)


def test_parts_may_have_different_sizes():
    (found,) = matrices_of(Declared((7, 3)))
    assert found.sizes == (7, 3) and matrices_of(Declared(0)) == []
    views = found.split(found.parameter)
    assert [tuple(view.shape) for view in views] == [(7, 4), (3, 4)]


@pytest.mark.parametrize("parts", [3, (7, 4), (10, 0)])
def test_parts_that_do_not_fit_are_named(parts):
    with pytest.raises(ConfigError, match=r"mix\.weight: expected parts that add up to 10"):
        matrices_of(Declared(parts))


def test_a_declaration_of_something_without_a_weight_is_refused():
    module = Declared(2)
    module.matrices = {"training": 2}
    with pytest.raises(ConfigError, match="'training'"):
        matrices_of(module)


# --- steps ----------------------------------------------------------------------------------------


def stepped(shape, axis, sizes, dtype, lr=0.01, decay=0.1, steps=4):
    """The weight after some steps, and that of the plain version."""
    random = np.random.default_rng(0)
    start = random.standard_normal(shape)
    grads = [random.standard_normal(shape) * 10.0**-index for index in range(steps)]
    parameter = nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = Muon([Matrices("w", parameter, axis, sizes)], lr, decay)
    for grad in grads:
        parameter.grad = torch.tensor(grad, dtype=dtype)
        optimizer.step()
    return parameter.detach().numpy(), start, grads


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_equal_the_plain_float64_version(dtype, bound):
    found, start, grads = stepped((12, 20), 0, (12,), dtype)
    plain = plain_steps(start, grads, 0.01, 0.1, lambda values: [values])
    assert abs(found - plain).max() < bound


def test_query_key_and_value_are_three_matrices():
    found, start, grads = stepped((36, 8), 0, (12, 12, 12), torch.float64)
    plain = plain_steps(start, grads, 0.01, 0.1, lambda values: np.split(values, 3))
    assert abs(found - plain).max() < 1e-12
    whole = plain_steps(start, grads, 0.01, 0.1, lambda values: [values])
    assert abs(found - whole).max() > 1e-3


def test_gate_and_up_of_each_expert_are_two_matrices():
    found, start, grads = stepped((3, 6, 10), 2, (5, 5), torch.float64)

    def split(values):
        return [half for expert in values for half in np.split(expert, 2, axis=1)]

    plain = plain_steps(start, grads, 0.01, 0.1, split)
    assert abs(found - plain).max() < 1e-12


def test_an_expert_moves_by_its_own_gradient_alone():
    model = LM(CONFIG)
    experts = next(m for m in matrices_of(model) if m.name == "blocks.1.ffn.gate_up")
    before = experts.parameter.detach().clone()
    grad = torch.zeros_like(before)
    grad[2, :, :8] = 1e-5  # the gate of expert 2
    experts.parameter.grad = grad
    Muon([experts], lr=0.1).step()
    moved = experts.parameter.detach() != before
    assert moved[2, :, :8].all() and moved.sum() == moved[2, :, :8].sum()


def test_a_step_is_as_large_as_one_of_adamw():
    """Root mean square of the entries: about 0.2 at every shape (Moonlight, section 2.2)."""
    for shape in ((32, 32), (16, 64), (64, 16)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([Matrices("w", parameter, 0, (shape[0],))], lr=1.0).step()
        assert 0.14 < parameter.detach().square().mean().sqrt() < 0.24


def test_muon_and_adamw_divide_all_parameters_between_them():
    model = LM(CONFIG)
    both = MuonAdamW(model, 1e-2, 0.1)
    mine = [p for group in both.param_groups for p in group["params"]]
    assert len(mine) == len({id(p) for p in mine}) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for group in both.adamw.param_groups for p in group["params"]}
    assert {"embed.weight", "norm.weight", "blocks.1.ffn.router.weight"} <= plain
    others = ("norm", "embed", "head", "router")
    assert not {name for name in plain if not any(other in name for other in others)}


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ConfigError, match="found none"):
        MuonAdamW(nn.LayerNorm(3), 1e-2, 0.0)
