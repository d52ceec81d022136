import pytest
import torch

from golden_cases import assert_close, golden
from tessera.discriminators import DiffAug
from tessera.discriminators.augment import blur, blur_fade
from tessera.errors import ConfigError
from tessera.rng import IndexedRng


class Fixed:
    """Captured draws: which of the three act, and the seven uniforms (7, B) of each image."""

    def __init__(self, acts, how):
        self.acts, self.how = acts, how

    def shared(self, stream, *shape):
        return torch.tensor([0.0 if act else 1.0 for act in self.acts])

    def uniform(self, stream, *shape):
        return self.how.T


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_diffaug"])
def test_published_augmentation(case):
    file = golden(case)
    images, how = file.input["image"], file.input["rand01"].flatten(1)
    everything = (True, True, True)
    probability = abs(file.config["prob"])
    augment = DiffAug(probability, cutout=file.config["cutout"])
    strengths = file.config["blur"]
    expected = {
        "all": (augment, 0.0, everything),
        "all_negative_prob": (DiffAug(probability, cutout=0.0), 0.0, everything),
        "translate_only": (augment, 0.0, (True, False, False)),
        "color_only": (augment, 0.0, (False, True, False)),
        "cutout_only": (augment, 0.0, (False, False, True)),
        "blur_and_all": (augment, strengths[1], everything),
        **{f"blur_{s}": (DiffAug(probability=0.0), s, (False, False, False)) for s in strengths},
    }
    assert set(expected) == set(file.output)
    for name, (aug, strength, acts) in expected.items():
        assert_close(aug(images, strength, Fixed(acts, how)), file.output[name], atol=1e-6)


def test_gradients_pass_and_the_draws_belong_to_samples():
    augment = DiffAug()
    images = torch.randn(4, 3, 16, 24, requires_grad=True)
    index = torch.arange(4)
    whole = augment(images, 0.5, IndexedRng(0, index))
    halves = [augment(images[part], 0.5, IndexedRng(0, index[part])) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.cat(halves))
    assert not torch.equal(whole, augment(images, 0.5, IndexedRng(0, index).named("real")))
    whole.square().sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_each_act_is_drawn_per_call():
    images = torch.ones(2, 3, 16, 16)
    unchanged = sum(
        torch.equal(DiffAug(probability=0.5)(images, 0.0, torch.Generator().manual_seed(seed)), images)
        for seed in range(80)
    )
    assert 3 <= unchanged <= 25  # 1 / 8 of 80 on average, and some translations by nothing
    assert torch.equal(DiffAug(probability=0.0)(images), images)


def test_the_kernel_follows_the_strength():
    images = torch.randn(1, 3, 64, 64)
    # sigma 5.6 and 5.4 have the same radius of 16, and another kernel
    assert not torch.equal(blur(images, 0.99), blur(images, 0.96))
    torch.testing.assert_close(blur(torch.full((1, 3, 16, 16), 0.7), 1.0), torch.full((1, 3, 16, 16), 0.7))
    assert torch.equal(blur(images, 0.01), images)
    assert blur(torch.randn(1, 3, 4, 4), 1.0).shape == (1, 3, 4, 4)


def test_half_precision_stays_out():
    """Rounded to bfloat16, the draws would point out of the image."""
    images = torch.randn(64, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = DiffAug()(images.bfloat16(), 0.5, IndexedRng(0, torch.arange(64)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, DiffAug()(images.bfloat16().float(), 0.5, IndexedRng(0, torch.arange(64))))
    assert DiffAug()(images.double()).dtype == torch.float64


def test_fade():
    assert [blur_fade(step, 0) for step in (-3, 0, 1, 9)] == [1.0, 1.0, 0.0, 0.0]
    assert blur_fade(5, 9) == pytest.approx(0.5) and blur_fade(10, 9) == 0.0
    assert DiffAug(blur_fade=0.1).strength(50, 1000) == pytest.approx(1 - 50 / 101)
    assert DiffAug().strength(0, 1000) == 0.0 and DiffAug(blur_fade=0.0).strength(0, 1000) == 1.0


@pytest.mark.parametrize("key", ["probability", "cutout", "blur_fade"])
def test_values_out_of_range(key):
    with pytest.raises(ConfigError, match=rf"discriminator_augment\.{key}=1\.5"):
        DiffAug(**{key: 1.5})
