"""Products by oneDNN: equal to the usual ones, and only where they apply."""

import pytest
import torch
import torch.nn.functional as F

from tessera.generators.inference import evaluating
from tessera.generators.layers import Linear, adaptive_projection
from tessera.generators.packing import MIN_ELEMENTS, is_large, packed

LARGE = (288, 256)  # out, in
needs_onednn = pytest.mark.skipif(not is_large(torch.zeros(LARGE)), reason="this torch has no oneDNN")


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 256), (256,), (1, 256), (2, 1, 256), (3, 5, 256), (70, 256)])
@pytest.mark.parametrize("is_packed", [True, False])
def test_products_are_those_of_the_plain_layer(has_bias, shape, is_packed):
    layer, x = Linear(256, 288, bias=has_bias), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    if is_packed:
        with evaluating(layer):
            actual = layer(x)
    else:
        with torch.no_grad():
            actual = layer(x)
    assert actual.shape == expected.shape and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_rows_apart_in_memory():
    layer, x = Linear(256, 288), torch.randn(2, 3, 512)[:, 1:, ::2]
    with evaluating(layer):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_what_is_packed_and_for_how_long():
    large, small, seldom = Linear(256, 288), Linear(8, 8), adaptive_projection(256, 6)
    module = torch.nn.Sequential(large, small, seldom)
    state = set(module.state_dict())
    with packed(module):
        assert large.packed.is_mkldnn and small.packed is None and seldom[1].packed is None
        assert set(module.state_dict()) == state
        inner = large.packed
        with packed(module):
            pass
        assert large.packed is inner
    assert large.packed is None
    with pytest.raises(RuntimeError, match="stop"), packed(module):
        raise RuntimeError("stop")
    assert large.packed is None and large.weight.numel() > MIN_ELEMENTS > small.weight.numel()


@needs_onednn
def test_a_changed_weight_is_packed_anew():
    layer, x = Linear(256, 288), torch.randn(4, 256)
    with evaluating(layer):
        layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with evaluating(layer):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_gradients_autocast_and_other_types_are_left_alone():
    layer, x = Linear(256, 288), torch.randn(4, 256)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16), evaluating(layer):
        assert layer.packed is None and layer(x).dtype == torch.bfloat16
    with evaluating(layer), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float64):
        with evaluating(layer.to(dtype)):
            assert layer.packed is None and layer(x.to(dtype)).dtype == dtype
