from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dino import runtime
from dino.models import cpu_linear as module
from dino.models.cpu_linear import ENOUGH_ROWS, Linear, linear
from dino.models.vit import ViT


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every input that is convolved."""
    inputs: list[Tensor] = []
    convolve = module._convolve

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs.append(x)
        return convolve(x, weight, bias)

    monkeypatch.setattr(module, "_convolve", counted)
    return inputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("rows", [(ENOUGH_ROWS,), (16, 37), (2, 3, 101)])
def test_values_and_gradients_are_those_of_linear(
    rows: tuple[int, ...],
    contiguous: bool,
    bias: bool,
    two_threads: None,
    convolutions: list[Tensor],
) -> None:
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias)
    twin = torch.nn.Linear(24, 40, bias=bias).double()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(*rows, 24) if contiguous else torch.randn(24, *rows).movedim(0, -1)
    upstream = torch.randn(*rows, 40) if contiguous else torch.randn(40, *rows).movedim(0, -1)
    x = x.requires_grad_()
    x_twin = x.detach().double().requires_grad_()

    y, y_twin = layer(x), twin(x_twin)
    y.backward(upstream)
    y_twin.backward(upstream.double())

    assert len(convolutions) == 2
    assert y.shape == (*rows, 40)
    torch.testing.assert_close(y.double(), y_twin, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_twin.grad, rtol=1e-5, atol=1e-5)
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_gradients_are_computed_only_where_needed(
    two_threads: None, convolutions: list[Tensor]
) -> None:
    layer = Linear(8, 8)
    layer.weight.requires_grad_(False)
    layer(torch.randn(ENOUGH_ROWS, 8)).sum().backward()
    assert len(convolutions) == 1  # the images need no gradient
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), float(ENOUGH_ROWS)))


def test_gradients_of_gradients_and_functional_transforms(two_threads: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(ENOUGH_ROWS, 6), torch.randn(5, 6, requires_grad=True)

    def penalty(function) -> Tensor:  # type: ignore[no-untyped-def]
        images = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            function(images, weight, None).sin().sum(), images, create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(linear), penalty(F.linear), rtol=1e-4, atol=1e-4)

    many = torch.randn(3, ENOUGH_ROWS, 6)
    torch.testing.assert_close(
        torch.func.vmap(lambda part: linear(part, weight, None))(many),
        F.linear(many, weight),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("why", ["few rows", "double", "one thread", "autocast", "switch"])
def test_elsewhere_it_is_linear_itself(
    why: str,
    two_threads: None,
    convolutions: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = Linear(8, 8), torch.randn(ENOUGH_ROWS, 8)
    layer(x)
    assert len(convolutions) == 1
    if why == "few rows":
        x = x[:-1]
    if why == "double":
        layer, x = layer.double(), x.double()
    if why == "one thread":
        torch.set_num_threads(1)
    if why == "switch":
        monkeypatch.setattr(runtime, "ONEDNN_LINEAR", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(convolutions) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("unchecked")  # the sizes of a traced image are tensors
def test_exported_graphs_use_plain_linear_layers(
    two_threads: None, convolutions: list[Tensor]
) -> None:
    network = ViT(patch_size=8, embed_dim=16, depth=2, heads=2, image_size=32).eval()
    images = torch.randn(64, 3, 32, 32)
    assert ENOUGH_ROWS <= 64 * 17
    with torch.no_grad():
        expected = network(images)
        assert len(convolutions) > 0
        convolutions.clear()
        program = torch.export.export(network, (images,))
        traced = torch.jit.trace(network, images, check_trace=False)
    assert not convolutions
    for graph in (program.module(), traced):
        torch.testing.assert_close(graph(images), expected, rtol=1e-4, atol=1e-5)
