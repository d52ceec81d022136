"""The refining convolutions and their choice by scale."""

import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers.phi import PhiConvs, phi_table


@pytest.mark.parametrize(
    ("scales", "convs", "table"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]),
        (6, 4, [0, 0, 1, 2, 3, 3]),
        (5, 4, [0, 1, 2, 2, 3]),
        (4, 4, [0, 1, 2, 3]),
        (3, 4, [0, 2, 3]),
        (2, 4, [0, 3]),
        (10, 2, [0] * 5 + [1] * 5),
        (10, 3, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (10, 5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (1, 4, [0]),
        (7, 1, [0] * 7),
    ],
)
def test_published_tables(scales, convs, table):
    assert phi_table(scales, convs) == table


def test_one_convolution_per_scale_is_the_identity_table():
    for scales in range(1, 20):
        assert PhiConvs(2, scales, 0, 0.5).table == list(range(scales))
        assert len(PhiConvs(2, scales, 0, 0.5)) == scales


def test_values():
    phi = PhiConvs(3, 10, 4, 0.3)
    h = torch.randn(2, 3, 4, 5)
    conv = phi[phi.table[8]]
    assert_close(phi.refine(h, 8), 0.7 * h + 0.3 * F.conv2d(h, conv.weight, conv.bias, padding=1))
    off = PhiConvs(3, 10, 4, 0.0)
    assert off.refine(h, 8) is h and not list(off.parameters())


def test_convolutions_that_no_scale_uses_are_not_trained():
    phi = PhiConvs(2, 3, 4, 0.5)
    assert [all(p.requires_grad for p in conv.parameters()) for conv in phi] == [True, False, True, True]


@pytest.mark.parametrize(("options", "key"), [((-1, 0.5), "phi_convs=-1"), ((4, 1.5), r"phi_ratio=1\.5")])
def test_refuses_bad_settings(options, key):
    with pytest.raises(ConfigError, match=key):
        PhiConvs(2, 3, *options)
