"""Muon for the matrices of a model, beside AdamW for everything else.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) steps along the nearest matrix with
equal singular values in place of the momentum itself. The step is scaled by 0.2 * sqrt(max(rows,
columns)), so that its entries are as large as AdamW's and both take the same learning rate and
decay (Moonlight, arXiv 2502.16982, section 2.2).

Which parameters are matrices follows from their shape: weights [out, in] of projections, and stacks
[E, in, out] of E experts, each of which is a matrix. A module says in a dict `matrices` what shape
does not tell, by the name of a child or of its own parameter:

    {"qkv": 3}            three matrices of equal size side by side, along the outputs
    {"kv": (64, 16)}      matrices of 64 and 16 outputs
    {"router": 0}         no matrix: AdamW's

Embeddings, norms, convs, biases and what is declared with 0 are AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Keller Jordan for a steep slope at zero: singular values are
not drawn to 1, but into a band around it."""
STEPS = 5
"""Iterations. Singular values that are at least 1/500 of the Frobenius norm then lie between 0.68
and 1.21."""
MOMENTUM = 0.95
_RMS = 0.2
_EPS = 1e-12


class Matrices(NamedTuple):
    """A parameter that holds matrices.

    Attributes:
        name: Its name in the model.
        parameter: [out, in], or [E, in, out].
        axis: The axis of the outputs.
        sizes: Outputs of the matrices that stand side by side along it.
    """

    name: str
    parameter: nn.Parameter
    axis: int
    sizes: tuple[int, ...]

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """The matrices in a tensor of the parameter's shape, as views [..., rows, columns]."""
        return values.split(self.sizes, self.axis)


def matrices_of(model: nn.Module) -> list[Matrices]:
    """The matrices of a model that Muon trains, each parameter once.

    Args:
        model: Any module. What `matrices` of its modules declares is taken over from the shape.

    Raises:
        ConfigError: A declaration does not fit the parameter, or names nothing.
    """
    found: dict[int, Matrices] = {}
    declared = _declared(model)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}".lstrip(".")
            parts = declared.get(id(parameter), 1)
            if parts == 0 or id(parameter) in embeddings or not _is_matrix(whole, parameter):
                continue
            axis = 0 if parameter.ndim == 2 else 2
            sizes = _sizes(whole, parts, parameter.shape[axis])
            found.setdefault(id(parameter), Matrices(whole, parameter, axis, sizes))
    return list(found.values())


def _declared(model: nn.Module) -> dict[int, int | tuple[int, ...]]:
    """What modules declare, by the id of the parameter."""
    declared: dict[int, int | tuple[int, ...]] = {}
    for path, module in model.named_modules():
        for name, parts in getattr(module, "matrices", {}).items():
            child = getattr(module, name, None)
            if child is None:  # an optional part
                continue
            parameter = getattr(child, "weight", child)
            if not isinstance(parameter, nn.Parameter):
                raise ConfigError(
                    f"{path}.matrices: expected the name of a parameter or of a module with a "
                    f"weight, found {name!r}"
                )
            declared[id(parameter)] = parts
    return declared


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad or "norm" in name or "conv" in name:
        return False
    is_weight = name.rpartition(".")[2] == "weight"
    return parameter.ndim == 3 or (parameter.ndim == 2 and is_weight)


def _sizes(name: str, parts: int | tuple[int, ...], outputs: int) -> tuple[int, ...]:
    sizes = (outputs // parts,) * parts if isinstance(parts, int) else parts
    if sum(sizes) != outputs or min(sizes) < 1:
        raise ConfigError(f"{name}: expected parts that add up to {outputs} outputs, found {parts}")
    return sizes


def orthogonalized(values: Tensor, steps: int = STEPS) -> Tensor:
    """Draws the singular values of each matrix into a band around 1, and keeps its singular
    vectors.

    Each step takes a singular value s to a*s + b*s**3 + c*s**5 with COEFFICIENTS; before the first
    one the matrix is divided by its Frobenius norm.

    Args:
        values: Matrices [..., rows, columns], float32 or float64.
        steps: Iterations.

    Returns:
        The same shape and dtype. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    is_tall = values.shape[-2] > values.shape[-1]
    x = values.mT if is_tall else values  # the smaller Gram matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        matrices: What to train, as `matrices_of` gives them.
        lr: Learning rate, as AdamW's.
        weight_decay: Each step multiplies the matrices by 1 - lr * weight_decay.
        momentum: Of the gradients.
    """

    def __init__(
        self,
        matrices: Iterable[Matrices],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = MOMENTUM,
    ):
        self.matrices = list(matrices)
        parameters = [item.parameter for item in self.matrices]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one update from the gradients. A parameter without a gradient stays as it is."""
        (group,) = self.param_groups
        momentum = group["momentum"]
        for item in self.matrices:
            parameter = item.parameter
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            mean = state["momentum"].lerp_(parameter.grad, 1 - momentum)
            ahead = parameter.grad.lerp(mean, momentum)  # Nesterov: the momentum after this step
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            for weight, direction in zip(item.split(parameter), item.split(ahead), strict=True):
                scale = _RMS * max(weight.shape[-2:]) ** 0.5
                weight.add_(orthogonalized(direction), alpha=-group["lr"] * scale)
