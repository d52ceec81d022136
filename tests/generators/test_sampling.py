"""Sampling settings, guidance weights, truncation and the draw."""

import math

import pytest
import torch

from golden_cases import assert_outputs, golden
from tessera.errors import ConfigError
from tessera.generators.guidance import guidance_weights
from tessera.generators.sampling import SamplingConfig, make_draw, probabilities, race
from tessera.rng import IndexedRng


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"guidance_scale": 0.0},
        {"guidance_scale": -2.0},
        {"guidance_scale": math.inf},
        {"guidance_power": -0.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature_end": 0.0},
        {"guidance_schedule": "quadratic"},
    ],
)
def test_bad_setting_is_refused_by_its_key(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"sampling.{name}="):
        SamplingConfig(**setting)


def test_published_guidance_weights():
    """The table of the public settings at steps 0, 64, 128, 192 and 255 of 256."""
    published = {
        (16.0, 2.75): (1, 1.018, 1.803, 7.40, 16.0),
        (15.5, 2.5): (1, 1.035, 2.09, 7.96, 15.5),
        (6.9, 1.5): (1, 1.225, 2.64, 5.29, 6.90),
        (8.0, 1.2): (1, 1.60, 3.79, 6.63, 8.00),
    }
    for (scale, power), expected in published.items():
        weights = guidance_weights(scale, power, 256)
        assert len(weights) == 256
        for step, value in zip((0, 64, 128, 192, 255), expected, strict=True):
            assert weights[step] == pytest.approx(value, abs=6e-3 * value)


def test_power_zero_is_constant_and_weight_one_is_no_guidance():
    assert guidance_weights(3.0, 0.0, 5) == [3.0] * 5
    assert SamplingConfig(guidance_scale=3.0).guidance_weights(2) == [3.0, 3.0]
    assert SamplingConfig(guidance_scale=None, guidance_power=2.0).guidance_weights(5) is None
    assert SamplingConfig(guidance_scale=1.0, guidance_power=2.0).guidance_weights(5) is None


def test_guidance_schedules():
    assert guidance_weights(3.0, 0.0, 4, "constant") == [3.0] * 4
    assert guidance_weights(3.0, 0.0, 4, "linear") == [1.0, 1.5, 2.0, 2.5]
    assert guidance_weights(2.5, 0.0, 4, "ramp") == [1.0, 1.5, 2.0, 2.5]  # VAR's 1 + cfg k / (S - 1) for cfg = 1.5
    assert guidance_weights(3.0, 0.0, 1, "ramp") == [1.0]
    assert guidance_weights(3.0, 0.0, 4, "cosine") == guidance_weights(3.0, 1.0, 4, "power_cosine")
    sampling = SamplingConfig(guidance_scale=3.0, guidance_schedule="linear")
    assert sampling.guidance_weights(2) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"guidance_power=2\.0 has no effect"):
        SamplingConfig(guidance_scale=3.0, guidance_power=2.0, guidance_schedule="linear")


def test_temperature_annealing():
    assert SamplingConfig(temperature=0.7).temperatures(3) == [0.7] * 3
    # MaskGIT's 0.5 + 0.8 (1 - (t + 1) / T)
    assert SamplingConfig(temperature=1.3, temperature_end=0.5).temperatures(4) == pytest.approx([1.1, 0.9, 0.7, 0.5])
    logits = torch.randn(3, 7)
    torch.testing.assert_close(probabilities(logits, SamplingConfig(), 2.0), (logits / 2).softmax(-1))


def test_temperature():
    logits = torch.randn(3, 2, 7)
    expected = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(probabilities(logits, SamplingConfig(temperature=0.5)), expected)


def test_softmax_is_float32():
    probs = probabilities(torch.randn(2, 1, 7, dtype=torch.bfloat16), SamplingConfig())
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 1))


@pytest.mark.parametrize("top_k", [1, 3, 7, 100])
def test_top_k_keeps_the_most_probable(top_k):
    logits = torch.randn(4, 2, 7)
    probs = probabilities(logits, SamplingConfig(top_k=top_k))
    kept = min(top_k, 7)
    assert ((probs > 0).sum(-1) == kept).all()
    assert torch.equal(probs.topk(kept).indices, logits.topk(kept).indices)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 2))
    full = logits.softmax(-1)
    renormalised = torch.where(probs > 0, full, 0)
    torch.testing.assert_close(probs, renormalised / renormalised.sum(-1, keepdim=True))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_top_p_is_the_smallest_sufficient_set(top_p):
    logits = torch.randn(50, 1, 12) * 2
    full = logits.softmax(-1)
    kept = probabilities(logits, SamplingConfig(top_p=top_p)) > 0
    for row, keep in zip(full[:, 0], kept[:, 0], strict=True):
        share, smallest = row[keep].sum(), row[keep].min()
        assert share >= top_p - 1e-6
        assert keep.sum() == 1 or share - smallest < top_p + 1e-6
        assert (row[~keep] <= smallest).all()


def test_top_p_works_on_what_top_k_left():
    logits = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]).log()
    probs = probabilities(logits, SamplingConfig(top_k=2, top_p=0.5))
    # of the two kept the first has 4/7 > 0.5; of all four it would need the second too
    torch.testing.assert_close(probs, torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    assert (probabilities(logits, SamplingConfig(top_p=0.5)) > 0).sum() == 2


def test_top_p_none_and_top_k_none_are_off():
    logits = torch.randn(2, 1, 5)
    assert torch.equal(probabilities(logits, SamplingConfig(top_k=None, top_p=None)), logits.softmax(-1))


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_filters"])
def test_published_filters(case):
    file = golden(case)
    ours = {
        f"prob_k{top_k}_p{top_p}": probabilities(
            file.input["logits"],
            SamplingConfig(top_k=top_k, top_p=top_p or None),  # the public code writes "off" as 0
        )
        for top_k, top_p in file.config["combos"]
    }
    assert_outputs(ours, file, atol=1e-6)


def test_ties_at_both_filters():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).log()  # the last is -inf
    assert probabilities(logits, SamplingConfig(top_k=2)).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2, 0])
    # the more probable one holds 0.4; of the three equal ones, the last suffices
    kept = probabilities(logits, SamplingConfig(top_k=2, top_p=0.5))
    assert kept.tolist() == pytest.approx([2 / 3, 0, 0, 1 / 3, 0])
    assert torch.equal(kept, probabilities(logits, SamplingConfig(top_p=0.5)))


@pytest.mark.parametrize("top_k", [0, 1, 5, 20])
def test_nucleus_is_that_of_a_full_sort(top_k):
    """With many ties, and in the last row nothing but ties, whose sums meet the limit exactly."""
    logits = torch.cat([torch.randn(40, 20).mul(2).round() / 2, torch.zeros(1, 20)])
    for top_p in (0.1, 0.25, 0.3, 0.55, 0.6, 0.7, 0.9, 0.95):
        limit = logits.sort(descending=True).values[:, (top_k or 20) - 1, None]
        full = logits.masked_fill(logits < limit, -torch.inf).softmax(-1)
        values, order = full.sort(stable=True)
        dropped = values.cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        expected = full.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)
        found = probabilities(logits, SamplingConfig(top_k=top_k, top_p=top_p))
        torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_race_follows_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 40_000
    uniform = IndexedRng(3, torch.arange(count)).uniform("race", 5)
    shares = race(probs.expand(count, 5), uniform).bincount(minlength=5) / count
    # four standard deviations of a share are 0.01
    torch.testing.assert_close(shares, probs, atol=0.01, rtol=0)
    assert shares[4] == 0


def test_race_survives_the_ends_of_the_grid_of_uniforms():
    top = 1 - 2.0**-24
    # a draw of exactly 0 must not let an all but impossible code win
    probs = torch.tensor([1 - 1e-9, 1e-9])
    assert race(probs, torch.tensor([0.5, 0.0])) == 0
    # nor may the largest draw stop the only possible one
    assert race(torch.tensor([0.0, 1.0]), torch.tensor([0.0, top])) == 1


def test_draws_of_a_step_are_a_stream():
    index = torch.tensor([5, 9])
    draw = make_draw(IndexedRng(0, index), 2, torch.device("cpu"))
    probs = torch.full((2, 3, 40), 1 / 40)
    again = make_draw(IndexedRng(0, index), 2, torch.device("cpu"))
    assert torch.equal(draw(probs, 0), again(probs, 0))
    assert not torch.equal(draw(probs, 0), draw(probs, 1))


def test_generator_and_callable_draws():
    probs = torch.full((2, 1, 40), 1 / 40)
    device = torch.device("cpu")
    first, second = (make_draw(torch.Generator().manual_seed(1), 2, device) for _ in range(2))
    assert torch.equal(first(probs, 0), second(probs, 0))
    assert make_draw(lambda probs, step: step, 2, device)(probs, 7) == 7


def test_wrong_number_of_draws_is_refused():
    draw = make_draw(IndexedRng(0, torch.arange(3)), 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="one index per label"):
        draw(torch.ones(2, 1, 4), 0)
