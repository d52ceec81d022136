import torch

from tessera.rng import GeneratorRng, IndexedRng


def test_draws_belong_to_samples_and_names_part_them():
    whole, part = IndexedRng(3, torch.arange(6), step=2), IndexedRng(3, torch.arange(2, 4), step=2)
    assert torch.equal(whole.uniform("a", 4)[2:4], part.uniform("a", 4))
    inner = whole.named("judge")
    assert inner.step == 2 and torch.equal(inner.uniform("a"), whole.named("judge").uniform("a"))
    draws = [rng.uniform("a") for rng in (whole, inner, inner.named("real"), whole.named("real"))]
    assert len({tuple(values.tolist()) for values in draws}) == 4
    assert torch.equal(inner.named("real").uniform("a"), whole.uniform("judge/real/a"))


def test_shared_draws_are_those_of_the_step():
    one, other = IndexedRng(3, torch.arange(6), step=2), IndexedRng(3, torch.arange(50, 52), step=2)
    draws = one.shared("crop", 3)
    assert draws.shape == (3,) and draws.device.type == "cpu" and ((draws >= 0) & (draws < 1)).all()
    assert torch.equal(draws, other.shared("crop", 3)), "whatever the samples, so on all processes"
    for changed in (IndexedRng(3, torch.arange(6), step=3), IndexedRng(4, torch.arange(6), step=2), one.named("x")):
        assert not torch.equal(draws, changed.shared("crop", 3))
    assert draws[0] != one.uniform("crop", 3)[0, 0]


def test_generators_give_fresh_shared_draws():
    rng = GeneratorRng(4, torch.Generator().manual_seed(0))
    first, second = rng.shared("crop", 2), rng.named("x").shared("crop", 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, GeneratorRng(4, torch.Generator().manual_seed(0)).shared("crop", 2))
