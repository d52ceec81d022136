"""Sampling of MaskGIT: equal to the plain loop, its schedule of masks, filters, confidences, and pinned tokens."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from generators.maskgit_reference import KINDS, SMALL, small_maskgit
from tessera.errors import ConfigError
from tessera.generators import MaskGITSampling, MaskGITViT
from tessera.generators.maskgit_sampling import generate_masked, gumbel, least, masks_left
from tessera.rng import IndexedRng

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plain.maskgit import PlainMaskGIT

kinds = pytest.mark.parametrize("kind", KINDS)
LABELS = torch.tensor([1, 3, 1, 0, 2])
LINEAR = MaskGITSampling(guidance_scale=3.0, guidance_schedule="linear", num_steps=4)


def rng(seed=0, count=5):
    return IndexedRng(seed, torch.arange(count))


def model_of(kind=MaskGITViT, branches=1, seed=0, **changes):
    """Tiny model with parameters spread enough for tokens to depend on labels and on each other."""
    torch.manual_seed(seed)
    model = small_maskgit(kind, num_branches=branches, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def rounds(model, sampling, **arguments):
    """(tokens, per round the tokens, masks and rows of what entered the transformer)."""
    seen, features = [], model.features

    def watched(tokens, masked, conditions):
        seen.append((tokens[:5], masked[:5], len(tokens)))
        return features(tokens, masked, conditions)

    model.features = watched
    try:
        tokens = model.generate(LABELS, sampling, **{"rng": rng(), **arguments})
    finally:
        del model.features
    return tokens, seen


@kinds
@pytest.mark.parametrize(
    "sampling",
    [
        MaskGITSampling(),
        MaskGITSampling(num_steps=1, guidance_scale=2.0),
        MaskGITSampling(num_steps=9, gumbel_temperature=0.0),
        LINEAR,
        MaskGITSampling(1.3, 6.9, 3.0, temperature_end=0.5, num_steps=5, gumbel_temperature=2.8),
    ],
)
def test_equals_the_plain_loop(kind, sampling):
    model = model_of(kind)
    assert torch.equal(model.generate(LABELS, sampling, rng=rng()), PlainMaskGIT(model)(LABELS, sampling, rng()))


@pytest.mark.parametrize("branches", [1, 2])
def test_each_sample_has_its_own_schedule_of_masks(branches):
    """Pinned tokens enter unmasked and stay so; the schedule counts the others, sample by sample."""
    model, steps, total = model_of(branches=branches), 4, branches * SMALL["num_tokens"]
    sampling = MaskGITSampling(num_steps=steps)
    counts = [0, 1, total - 1, total, total // 2]
    keep = torch.stack([torch.randperm(total) < count for count in counts]).view(5, branches, -1)
    teacher = torch.randint(0, SMALL["codebook_size"], keep.shape)
    tokens, seen = rounds(model, sampling, teacher=teacher, keep=keep)
    assert torch.equal(tokens[keep], teacher[keep]) and len(seen) == steps
    for sample, count in enumerate(counts):
        free = left = total - count
        for step, (entering, masked, _) in enumerate(seen):
            assert masked[sample].sum() == left
            assert not (masked & keep)[sample].any()
            assert torch.equal(entering[sample][keep[sample]], teacher[sample][keep[sample]])
            wanted = math.floor(free * math.acos((step + 1) / steps) / (math.pi / 2))
            left = min(left, max(1, min(left - 1, wanted)))


def test_tokens_stay_once_they_are_unmasked():
    tokens, seen = rounds(model_of(branches=2), MaskGITSampling(num_steps=6))
    for (earlier, was_masked, _), (later, _, _) in zip(seen, [*seen[1:], (tokens, None, 0)], strict=True):
        assert torch.equal(earlier[~was_masked], later[~was_masked])


@pytest.mark.parametrize(
    ("free", "masked", "share", "expected"),
    [(16, 16, 0.84, 13), (16, 3, 0.84, 2), (16, 1, 0.5, 1), (16, 2, 0.0, 1), (1, 1, 0.9, 1), (0, 0, 0.5, 0)],
)
def test_masks_left(free, masked, share, expected):
    count = torch.tensor([[free]]), torch.tensor([[masked]])
    assert masks_left(*count, share).item() == expected


def test_least_takes_exactly_its_count():
    values = torch.tensor([[2.0, 1.0, 1.0, 1.0, torch.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert least(values, torch.tensor([[2], [3]])).tolist() == [
        [False, True, True, False, False],
        [True, True, True, False, False],
    ]


def test_gumbel_noise():
    noise = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert gumbel(torch.tensor([0.0, 1.0])).isfinite().all()


@kinds
def test_the_unconditional_half_runs_only_where_it_counts(kind):
    model = model_of(kind)
    assert [rows for *_, rows in rounds(model, LINEAR)[1]] == [5, 10, 10, 10]
    assert [rows for *_, rows in rounds(model, MaskGITSampling(num_steps=3))[1]] == [5, 5, 5]


def test_the_softmax_temperature_divides_the_logits():
    """Twice the temperature at the same noise is the same as half the noise, up to a factor of all scores."""
    model = model_of()
    hot = model.generate(LABELS, MaskGITSampling(2.0, gumbel_temperature=3.0), rng=rng())
    assert torch.equal(hot, model.generate(LABELS, MaskGITSampling(1.0, gumbel_temperature=6.0), rng=rng()))
    assert not torch.equal(hot, model.generate(LABELS, MaskGITSampling(1.0, gumbel_temperature=3.0), rng=rng()))
    cooled = MaskGITSampling(2.0, temperature_end=0.1, gumbel_temperature=3.0)
    assert not torch.equal(hot, model.generate(LABELS, cooled, rng=rng()))


def test_without_noise_nothing_is_random():
    model, sampling = model_of(), MaskGITSampling(gumbel_temperature=0.0)
    assert torch.equal(model.generate(LABELS, sampling, rng=rng(1)), model.generate(LABELS, sampling, rng=rng(2)))


@pytest.mark.parametrize(("filters", "codes"), [({"top_k": 2}, 2), ({"top_p": 1e-6}, 1), ({"top_k": 1}, 1)])
def test_filters_bound_what_noise_can_draw(filters, codes):
    """With much noise any code is drawn; with a filter, in one round, only the best."""
    model = model_of(branches=2)
    masked = torch.ones(5, 2, SMALL["num_tokens"], dtype=torch.bool)
    with torch.no_grad():
        logits = model(masked.long(), masked, model.condition_ids(LABELS)).transpose(1, 2)

    def ranks(**changes):
        sampling = MaskGITSampling(num_steps=2, gumbel_temperature=1e3, **changes)
        tokens = rounds(model, sampling)[1][1][0]  # as drawn in the first of two rounds
        return (logits > logits.gather(-1, tokens[..., None])).sum(-1)

    assert ranks().max() >= 4
    assert ranks(**filters).max() == codes - 1


@pytest.mark.parametrize("confidence", ["logit", "log_prob"])
def test_the_least_confident_are_masked_again(confidence):
    model = model_of(branches=2)
    _, seen = rounds(model, MaskGITSampling(num_steps=2, gumbel_temperature=0.0, confidence=confidence))
    (tokens, masked, _), (_, again, _) = seen
    with torch.no_grad():
        logits = model(tokens, masked, model.condition_ids(LABELS)).transpose(1, 2)
    scores = {"logit": logits.amax(-1), "log_prob": logits.log_softmax(-1).amax(-1)}
    expected = {name: least(score.flatten(1), again.flatten(1).sum(1, keepdim=True)) for name, score in scores.items()}
    assert torch.equal(again.flatten(1), expected[confidence])
    assert not torch.equal(expected["logit"], expected["log_prob"])


@kinds
@pytest.mark.parametrize("pinned", [False, True])
def test_no_round_waits_for_the_device(kind, pinned):
    """Tensors without values pass through the loop: no value is read."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = small_maskgit(kind, num_branches=2)
        labels = torch.zeros(3, dtype=torch.int64)
        shape = (3, 2, SMALL["num_tokens"])
        keep = torch.zeros(shape, dtype=torch.bool) if pinned else None
        teacher = torch.zeros(shape, dtype=torch.int64) if pinned else None
        sampling = MaskGITSampling(guidance_scale=2.0, top_k=3, top_p=0.9, num_steps=3)
        tokens = generate_masked(model, labels, sampling, teacher, keep, torch.Generator())
        assert tokens.shape == shape and tokens.dtype == torch.int64


def test_a_function_of_probabilities_is_no_source():
    with pytest.raises(ConfigError, match=r"rng can't be a function.*uniform\(stream, \*shape\)"):
        model_of().generate(LABELS, MaskGITSampling(), rng=lambda probs, step: probs.argmax(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "sampling.num_steps=0 must be a whole number of at least 1"),
        ({"num_steps": 2.5}, "sampling.num_steps=2.5"),
        ({"gumbel_temperature": -1.0}, "sampling.gumbel_temperature=-1.0 must be at least 0"),
        ({"gumbel_temperature": math.inf}, "sampling.gumbel_temperature=inf"),
        ({"confidence": "random"}, "sampling.confidence='random' is unknown; choose one of logit, log_prob"),
        ({"temperature": 0.0}, "sampling.temperature=0.0 must be positive"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MaskGITSampling(**change)
