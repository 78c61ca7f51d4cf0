"""op.py: the fusion as a torch operation, which torch can check, differentiate and compile."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.fusion.layer import EngramLayer
from engraphy.fusion.op import fuse
from engraphy.memory import Lookup
from tests.tools.bounds import fusion

SPECS = {
    "demo": LayerSpec.demo(8, 6, streams=2, order=2),
    "qwen4": LayerSpec.qwen4(8, 6, streams=1, order=2),
    "deepseek_v41": LayerSpec.deepseek_v41(8, 6, streams=3),
}
CORES = ("off", "auto") if _native.core else ("off",)
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def trained(spec: LayerSpec, dtype: torch.dtype = torch.float64) -> EngramLayer:
    torch.manual_seed(0)
    layer = EngramLayer(spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.2, 0.6)
    return layer.to(dtype)


def arguments(
    layer: EngramLayer, *, past: bool, inputs: bool = False, residual: bool = False, tokens: int = 7
) -> tuple:
    """Of `fuse`. past: with a window, dead positions and starts."""
    spec, dtype = layer.spec, layer.value.weight.dtype
    torch.manual_seed(1)
    shape = (spec.streams, spec.hidden_size)
    wide = torch.promote_types(dtype, torch.float32)
    window = live = starts = None
    if past:
        live, starts = torch.rand(2, tokens) < 0.7, torch.rand(2, tokens) < 0.2
        if spec.kernel:
            window = torch.randn(2, spec.window, *shape, dtype=wide)
    eps = 1e-6 if spec.eps is None else spec.eps
    numbers = (dtype, spec.order, eps, spec.conv_eps, spec.unit_offset, inputs, residual)
    return (
        torch.randn(2, tokens, *shape, dtype=dtype),
        torch.randn(2, tokens, spec.width, dtype=wide),
        layer.key.weight,
        layer.key.bias,
        layer.value.weight,
        layer.value.bias,
        layer.query_norm,
        layer.key_norm,
        layer.conv_norm,
        layer.conv,
        window,
        live,
        starts,
        *numbers,
    )


def learning(values: tuple) -> tuple:
    """The same values, as leaves that require gradients where they are numbers."""
    return tuple(
        value.detach().clone().requires_grad_(value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for value in values
    )


# --- torch's own checks


SAMPLES = [
    (name, dtype, past, inputs)
    for name in SPECS
    for dtype in FLOATS
    for past, inputs in ((False, True), (True, False))
]


@pytest.mark.slow
@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@pytest.mark.parametrize(("name", "dtype", "past", "inputs"), SAMPLES)
def test_torch_finds_nothing_wrong_with_the_operation(name, dtype, past, inputs):
    layer = trained(SPECS[name], dtype)
    values = arguments(layer, past=past, inputs=inputs, residual=past)
    torch.library.opcheck(fuse, learning(values))
    with torch.no_grad():
        torch.library.opcheck(fuse, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "deepseek_v41"])
def test_torch_finds_nothing_wrong_without_the_core(name):
    values = arguments(trained(SPECS[name], torch.float32), past=True, residual=True)
    with _native.forced("off"):
        torch.library.opcheck(fuse, learning(values))


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@pytest.mark.parametrize("past", [False, True])
def test_torch_finds_nothing_wrong_with_the_backward_pass(past):
    from engraphy.fusion.op import fuse_backward

    values = arguments(trained(SPECS["demo"], torch.float32), past=past)
    out, gate, inputs, key, value, stats = fuse(*values)
    grads = [torch.randn_like(part) for part in (out, gate, inputs)]
    numbers = values[14:]
    for given in (grads, [grads[0], None, None]):
        call = (*given, values[0], key, value, *values[6:13], gate, stats, *numbers, True, past)
        torch.library.opcheck(fuse_backward, tuple(learning(call)), test_utils=NO_AUTOGRAD)


NO_AUTOGRAD = ("test_schema", "test_faketensor")  # what is a gradient has none of its own


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("inputs", [False, True])
def test_gradients_are_those_of_differences(name, inputs, core):
    spec = SPECS[name]
    layer = trained(LayerSpec(3, 3, 2, 2, spec.kernel and 2, spec.bias, spec.eps, spec.conv_eps))
    values = learning(arguments(layer, past=True, inputs=inputs, residual=True, tokens=4))
    with _native.forced(core):
        assert torch.autograd.gradcheck(lambda *given: fuse(*given)[:3], values)


@pytest.mark.parametrize("core", CORES)
def test_gradients_have_gradients(core):
    layer = trained(LayerSpec(3, 3, 1, 2, 2))
    values = learning(arguments(layer, past=True, tokens=3))
    with _native.forced(core):
        assert torch.autograd.gradgradcheck(lambda *given: fuse(*given)[:3], values)


@pytest.mark.parametrize("core", CORES)
def test_only_what_is_needed_gets_a_gradient(core):
    layer = trained(SPECS["demo"])
    for place in (0, 1, 2, 9, 10):
        values = list(arguments(layer, past=True))
        values = [v.detach() if isinstance(v, Tensor) else v for v in values]
        values[place] = values[place].clone().requires_grad_()
        with _native.forced(core):
            fuse(*values)[0].sum().backward()
        assert values[place].grad.abs().sum() > 0


# --- who runs it


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of `fuse`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.engraphy.fuse.default
        return func(*args, **(kwargs or {}))


def case(layer: EngramLayer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    spec = layer.spec
    x_BTSD = torch.randn(2, 5, spec.streams, spec.hidden_size).to(dtype)
    return x_BTSD, torch.randn(2, 5, spec.width)


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
def test_a_layer_on_the_cpu_is_one_operation():
    layer = trained(SPECS["demo"], torch.float32)
    for autocast in (False, True):
        with Calls() as calls, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(*case(layer))
        assert calls.count == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.half(),
        lambda layer: layer.key.register_forward_hook(lambda *_: None),
        lambda layer: layer.value.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.key.register_full_backward_hook(lambda *_: None),
        lambda layer: setattr(layer, "key", nn.Sequential(layer.key)),
        lambda layer: layer.value.double(),
    ],
    ids=["float16", "hook", "pre-hook", "backward hook", "another projection", "two dtypes"],
)
def test_what_the_native_pass_does_not_do_is_left_to_the_plain_formula(change):
    layer = trained(SPECS["deepseek_v41"], torch.float32)
    change(layer)
    weight = next(layer.key.parameters())
    with Calls() as calls:
        try:
            layer(*case(layer, weight.dtype))
        except RuntimeError as error:  # torch multiplies no two dtypes
            assert "dtype" in str(error)
    assert calls.count == 0


def test_without_the_core_a_layer_is_plain():
    layer = trained(SPECS["demo"], torch.float32)
    with _native.forced("off"), Calls() as calls:
        layer(*case(layer))
    assert calls.count == 0


def test_a_conv_of_more_taps_than_the_kernel_has_places_for_is_plain():
    layer = trained(LayerSpec(4, 3, kernel=17, order=1), torch.float32)
    with Calls() as calls:
        layer(*case(layer))
    assert calls.count == 0


def test_transforms_of_torch_func_and_forward_mode_differentiate_the_plain_formula():
    layer = trained(SPECS["demo"])
    x_BTSD, rows_BTE = (values.double() for values in case(layer))
    each = torch.vmap(lambda x, rows: layer(x[None], rows[None])[0][0])(x_BTSD, rows_BTE)
    torch.testing.assert_close(each, layer(x_BTSD, rows_BTE)[0])
    leaf = x_BTSD.clone().requires_grad_()
    layer(leaf, rows_BTE)[0].sum().backward()
    found = torch.func.grad(lambda x: layer(x, rows_BTE)[0].sum())(x_BTSD)
    torch.testing.assert_close(found, leaf.grad)
    _, along = torch.func.jvp(lambda x: layer(x, rows_BTE)[0], (x_BTSD,), (leaf.grad,))
    torch.testing.assert_close(along.sum(), (leaf.grad**2).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_BTSD, leaf.grad)
        again = torch.autograd.forward_ad.unpack_dual(layer(dual, rows_BTE)[0]).tangent
    torch.testing.assert_close(again, along)


def test_an_exported_layer_needs_no_library():
    layer = trained(SPECS["demo"], torch.float32).eval()
    values = case(layer)
    program = torch.export.export(layer, values)
    assert "engraphy" not in str(program.graph)
    torch.testing.assert_close(program.module()(*values)[0], layer(*values)[0])


@pytest.mark.parametrize("core", CORES)
def test_a_window_may_be_written_to_before_the_backward_pass(core):
    layer = trained(SPECS["demo"])
    x_BTSD, rows_BTE = (values.double() for values in case(layer))
    rows_BTE.requires_grad_()
    window = torch.randn(2, layer.spec.window, 2, 8, dtype=torch.float64)
    found = []
    for written in (False, True):
        with _native.forced(core):
            out = layer(x_BTSD, rows_BTE, window)[0]
            if written:
                window.fill_(torch.nan)
            found.append(torch.autograd.grad(out.sum(), [rows_BTE, layer.conv]))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("core", CORES)
def test_the_residual_may_be_part_of_it(core):
    for dtype in (torch.float32, torch.bfloat16):
        layer = trained(SPECS["demo"], dtype)
        x_BTSD, rows_BTE = case(layer, dtype)
        live = torch.rand(2, 5) < 0.6
        with _native.forced(core):
            update = layer(x_BTSD, rows_BTE, live=live)[0]
            out = layer(x_BTSD, rows_BTE, live=live, residual=True)[0]
        assert torch.equal(out, x_BTSD + update)


# --- compiled


class Block(nn.Module):
    """A block of one's own that is given a Lookup."""

    def __init__(self, memory: EngramMemory, layer: int) -> None:
        super().__init__()
        self.memory = memory
        self.layer = layer
        self.linear = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor, lookup: Lookup) -> Tensor:
        return torch.tanh(self.linear(self.memory.fuse(self.layer, x_BTD, lookup)))


def memory() -> EngramMemory:
    torch.manual_seed(0)
    spec = HashSpec.demo((1,), (2, 3), 2, 53, vocab_size=40, pad_id=0)
    made = EngramMemory(
        EngramConfig(spec, LayerSpec(8, spec.columns * 4), 4), VocabMap.identity(40)
    )
    made.init_rows(1.0, 0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def compiled(block: Block, backend: str) -> Block:
    torch.compiler.reset()
    block = copy.copy(block)
    block.compile(fullgraph=True, backend=backend)
    return block


COMPILERS = [(core, backend) for core in CORES for backend in ("eager", "aot_eager")]
if shutil.which("g++") and _native.core:
    COMPILERS.append(("auto", "inductor"))


@pytest.mark.slow
@pytest.mark.parametrize(("core", "backend"), COMPILERS)
def test_a_block_that_is_fed_a_finished_lookup_compiles_to_one_graph(core, backend):
    with _native.forced(core), memory() as held:
        block = Block(held, 1)
        fast = compiled(block, backend)
        ids = torch.arange(3, 15)[None]
        starts = torch.arange(12)[None] == 5
        found = []
        for run in (block, fast):
            for given in (None, starts):
                lookup = held.lookup(ids, starts=given).finished()
                x_BTD = torch.linspace(-1, 1, 96).view(1, 12, 8).requires_grad_()
                out_BTD = run(x_BTD, lookup)
                out_BTD.square().sum().backward()
                grads = [parameter.grad for parameter in block.parameters()]
                (rows,) = held.drain_row_grads()
                found.append([out_BTD, x_BTD.grad, torch.from_numpy(rows.grad), *grads])
                block.zero_grad(set_to_none=True)
        torch.compiler.reset()
    for plain, fused in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
def test_a_compiled_graph_holds_the_operation_as_one_node():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    layer = trained(SPECS["demo"], torch.float32)
    x_BTSD, rows_BTE = case(layer)
    out = torch.compile(layer, fullgraph=True, backend=keep)(x_BTSD, rows_BTE)[0]
    torch.compiler.reset()
    assert str(graphs[0].graph).count("engraphy.fuse") == 1
    fusion(layer, x_BTSD, rows_BTE).update.assert_holds(out)


def test_a_finished_lookup_has_waited_for_its_rows():
    with memory() as held:
        lookup = held.lookup(torch.arange(3, 15)[None])
        finished = lookup.finished()
        assert type(finished.rows) is dict and list(finished.rows) == [1]
        assert finished.rows[1] is lookup.rows[1]
        assert finished.starts is lookup.starts and finished.live is lookup.live
