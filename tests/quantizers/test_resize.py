"""Enlarging by matrix products against torch's interpolation."""

import pytest
import torch
import torch.nn.functional as F

from tessera.quantizers.resize import enlarge


@pytest.mark.parametrize(
    ("old", "new"), [((1, 1), (11, 11)), ((2, 3), (4, 7)), ((8, 8), (11, 11)), ((5, 4), (5, 4)), ((13, 1), (16, 3))]
)
def test_equals_bicubic_interpolation(old, new):
    maps = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, *new, dtype=torch.float64)
    results = enlarge(maps, new), F.interpolate(maps, size=new, mode="bicubic")
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-9)
    grads = [torch.autograd.grad((result * cotangent).sum(), maps)[0] for result in results]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-9)


def test_weights_made_in_inference_serve_training_too():
    with torch.inference_mode():
        enlarge(torch.randn(1, 1, 6, 7), (19, 23))
    maps = torch.randn(1, 1, 6, 7, requires_grad=True)
    enlarge(maps, (19, 23)).sum().backward()
    assert maps.grad is not None
