"""Annealing: the corrected ramp and what it shares with the published one."""

from itertools import pairwise

import pytest

from golden_cases import golden
from tessera.errors import ConfigError
from tessera.perturbation import LinearAnneal, annealed_count, linear_ramp


def test_ramp():
    anneal = LinearAnneal(0.2, 0.6, 0.1)
    for progress, ratio in [(0, 1), (0.2, 1), (0.3, 0.775), (0.4, 0.55), (0.6, 0.1), (0.61, 0.1), (1, 0.1)]:
        assert anneal(progress) == pytest.approx(ratio)


@pytest.mark.parametrize("end_ratio", [0.0, 0.2, 0.5, 1.0])
def test_ramp_is_continuous_and_never_rises(end_ratio):
    """The public ramp jumps at its end for every end ratio but 0.5."""
    anneal = LinearAnneal(0.25, 0.75, end_ratio)
    ratios = [anneal(step / 1000) for step in range(1001)]
    steps = [before - after for before, after in pairwise(ratios)]
    assert min(steps) >= 0
    assert max(steps) <= (1 - end_ratio) / 500 + 1e-12
    assert ratios[0] == 1.0 and ratios[-1] == end_ratio


def test_equal_start_and_end_is_a_step():
    anneal = LinearAnneal(0.5, 0.5, 0.3)
    assert [anneal(p) for p in (0.49, 0.5, 1.0)] == [1.0, 0.3, 0.3]
    assert LinearAnneal(1.0, 1.0, 0.5)(0.999) == 1.0


def test_count_is_rounded_down_and_stays_at_one():
    assert [annealed_count(ratio, 100) for ratio in (1.0, 0.99375, 0.875, 0.5, 0.001, 0.0)] == [
        100,
        99,
        87,
        50,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "arguments", [(-0.1, 0.5, 0.5), (0.1, 1.5, 0.5), (0.1, 0.5, -0.5), (0.6, 0.5, 0.5), (40, 120, 0.5)]
)
def test_refuses_times_that_are_no_fractions(arguments):
    with pytest.raises(ConfigError, match=r"perturbation\.schedule\.(start|end|end_ratio)="):
        LinearAnneal(*arguments)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["robustok_anneal"])
def test_published_annealing(case):
    """Equal to the public schedule for end_ratio 0.5; elsewhere the ramp falls by 1 - end_ratio instead."""
    file = golden(case)
    recorded = {f"c{i}.{name}" for i in range(len(file.config)) for name in ("ratio", "alpha", "delta")}
    assert file.config and set(file.output) == recorded, "every recorded output is compared"
    for i, config in enumerate(file.config):
        start, end, end_ratio = config["anneal_start"], config["anneal_end"], config["end_ratio"]
        total = config["epochs"]
        anneal = LinearAnneal(min(start / total, 1.0), min(end / total, 1.0), end_ratio)
        epochs = file.input[f"c{i}.epochs"].tolist()
        assert epochs
        for j, epoch in enumerate(epochs):
            ratio = file.output[f"c{i}.ratio"][j].item()
            alpha, delta = file.output[f"c{i}.alpha"][j].item(), file.output[f"c{i}.delta"][j].item()
            ours = linear_ramp(epoch, start, end, end_ratio)
            if end <= total:
                assert anneal(epoch / total) == pytest.approx(ours, abs=1e-12)
            # at the corner itself the public ramp still shows its own end value
            on_ramp = start <= epoch <= end
            if on_ramp:
                # the same share of the way, down from 1 by the end ratio
                published = 1 - (epoch - start) / max(end - start, 1) * end_ratio
                assert ratio == pytest.approx(published, abs=1e-12)
                assert (1 - ours) * end_ratio == pytest.approx((1 - ratio) * (1 - end_ratio), abs=1e-12)
            assert alpha == pytest.approx(config["alpha"] * ratio, abs=1e-12)
            assert delta == int(ratio * config["delta"])
            if not on_ramp or end_ratio == 0.5:
                assert ours == pytest.approx(ratio, abs=1e-12)
                assert config["alpha"] * ours == pytest.approx(alpha, abs=1e-12)
                assert annealed_count(ours, config["delta"]) == max(1, delta)
            assert 1 <= annealed_count(ours, config["delta"]) <= config["delta"]
