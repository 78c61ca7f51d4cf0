"""RMSNorm of the reference model: torch's values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engraphy.lm.norm import RMSNorm


def make(dtype: torch.dtype, hidden: int = 24) -> tuple[RMSNorm, torch.Tensor]:
    torch.manual_seed(0)
    norm = RMSNorm(hidden, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm, torch.randn(3, 5, hidden, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_torch_in_the_dtype_of_the_input(dtype):
    norm, x = make(dtype)
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.rms_norm(x, (24,), norm.weight, 1e-6))


def test_gradients_agree_with_finite_differences():
    norm, x = make(torch.float64)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(norm, {"weight": weight}, (x.detach(),)),
        (norm.weight,),
    )


def test_gradients_of_a_vector_of_zeros_are_finite():
    norm, _ = make(torch.float32)
    x = torch.zeros(1, 2, 24, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    expected = torch.zeros(1, 2, 24, requires_grad=True)
    F.rms_norm(expected, (24,), norm.weight.detach(), 1e-6).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
