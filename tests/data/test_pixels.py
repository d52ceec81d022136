"""Conversions between float images and bytes."""

import pytest
import torch

from golden_cases import golden
from tessera.data import from_uint8, to_uint8, unit_to_uint8
from tessera.data.pixels import TOLERANCE
from tessera.errors import ConfigError, DataError

# rule of the public code -> our conversion
PM1 = {
    "adm_127.5x_plus_128": "half_up",
    "round_half_even": "half_even",
    "seedvoken_clamp_half_times255_trunc": "truncate",
}
UNIT = {
    "save_image_mul255_add_half": "half_up",
    "titok_eval_round": "half_even",
    "titok_clamp_times255_trunc": "truncate",
    "imagefolder_var_255x_clamp_trunc": "truncate",
}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_preprocess"])
def test_golden_conversions(case):
    data = golden(case)
    checked = 0
    for key, expected in data.output.items():
        space, _, rule = key.partition("/")
        if space == "u8_pm1":
            found = to_uint8(data.input["pm1"], PM1[rule])
        elif space == "u8_unit":
            found = unit_to_uint8(data.input["unit"], UNIT[rule])
        else:
            continue
        assert torch.equal(found, expected), key
        checked += 1
    assert checked == len(PM1) + len(UNIT)


@pytest.mark.parametrize("rounding", ["half_up", "half_even"])
def test_levels_survive_a_round_trip(rounding):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels), rounding), levels)
    assert torch.equal(unit_to_uint8(levels / 255, rounding), levels)
    # float16 holds the levels well enough too, as the arithmetic is float32
    assert torch.equal(to_uint8(from_uint8(levels).half(), rounding), levels)


def test_half_up_is_unbiased_and_truncation_is_not():
    x = torch.linspace(-1, 1, 100_001)
    exact = (x.double() + 1) * 127.5
    assert abs((to_uint8(x).double() - exact).mean()) < 1e-3
    assert (to_uint8(x, "truncate").double() - exact).mean() < -0.45


def test_values_out_of_range_are_refused_with_their_share():
    x = torch.zeros(2, 3, 10, 10)
    x[0, 0, 0, :6] = 1.01
    with pytest.raises(DataError, match=r"1\.00% of the pixels"):
        to_uint8(x, tolerance=TOLERANCE)
    assert to_uint8(x, tolerance=0.02).max() == 255
    assert to_uint8(torch.tensor([1.0009, -1.0009]), tolerance=TOLERANCE).tolist() == [255, 0]
    with pytest.raises(DataError, match="outside"):
        unit_to_uint8(torch.tensor([-0.01, 0.5]), tolerance=TOLERANCE)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(DataError, match=r"50\.00%"):
            to_uint8(torch.tensor([bad, 0.0]), tolerance=TOLERANCE)


def test_without_tolerance_overshooting_is_clamped():
    assert to_uint8(torch.tensor([5.0, -5.0, 1.01])).tolist() == [255, 0, 255]
    assert unit_to_uint8(torch.tensor([5.0, -5.0, 1.01])).tolist() == [255, 0, 255]


def test_wrong_types_and_rules_are_refused():
    with pytest.raises(DataError, match="uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(DataError, match="float32"):
        from_uint8(torch.zeros(3))
    with pytest.raises(ConfigError, match="floor"):
        to_uint8(torch.zeros(3), "floor")
