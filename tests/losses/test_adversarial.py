import math

import pytest
import torch

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.losses import AdversarialLoss


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_adv_losses"])
def test_adversarial_losses(case):
    data = golden(case)
    real, fake = data.input["logits_real"], data.input["logits_fake"]
    hinge, soft = AdversarialLoss("hinge", "hinge"), AdversarialLoss("non_saturating", "non_saturating")
    assert_close(hinge.generator(fake), data.output["hinge_g"], atol=1e-6)
    assert_close(hinge.discriminator(real, fake), data.output["hinge_d"], atol=1e-6)
    assert_close(AdversarialLoss("vanilla").discriminator(real, fake), data.output["vanilla_d"], atol=1e-6)
    assert_close(soft.generator(fake), data.output["correct_non_saturating_g"], atol=1e-6)
    assert_close(soft.discriminator(real, fake), data.output["correct_non_saturating_d"], atol=1e-6)
    # weight 0 before the start, which is where ours does not run the discriminator, and the given one from there on
    assert data.output["adopt_weight_before"] == 0 < data.output["adopt_weight_at"]
    # the public code swaps inputs and targets: ones as logits against the logits as targets, and zeros likewise
    swapped = 1 + math.log1p(math.exp(-1))
    assert_close(swapped - fake.mean(), data.output["public_non_saturating_g"], atol=1e-6)
    public = 0.5 * (swapped - real.mean() + math.log(2))
    assert_close(public, data.output["public_non_saturating_d"], atol=1e-6)


def test_minimising_moves_logits_apart_even_far_out():
    real, fake = torch.full((2, 3), -200.0, requires_grad=True), torch.full((2, 3), 200.0, requires_grad=True)
    for name in ("hinge", "vanilla", "non_saturating"):
        pair = torch.autograd.grad(AdversarialLoss(name).discriminator(real, fake), (real, fake))
        torch.testing.assert_close(pair[0], torch.full_like(real, -0.5 / 6))
        torch.testing.assert_close(pair[1], torch.full_like(fake, 0.5 / 6))
    for name in ("hinge", "non_saturating"):
        (gradient,) = torch.autograd.grad(AdversarialLoss(generator=name).generator(real), real)
        torch.testing.assert_close(gradient, torch.full_like(real, -1 / 6))


def test_half_precision_logits_are_averaged_in_float32():
    fake = torch.full((400, 400), 1.0, dtype=torch.float16)
    loss = AdversarialLoss().generator(fake)
    assert loss.dtype == torch.float32 and loss.item() == -1.0


@pytest.mark.parametrize("key", ["discriminator", "generator"])
def test_unknown_names(key):
    with pytest.raises(ConfigError, match=rf"stage\.adversarial\.{key}='wasserstein' is unknown; choose one of hinge"):
        AdversarialLoss(**{key: "wasserstein"})


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_losses"])
def test_adversarial_losses_of_ibq(case):
    data = golden(case)
    real, fake = data.output["val/logits_real"], data.output["val/logits_fake"]
    assert_close(AdversarialLoss("hinge").discriminator(real, fake), data.output["val/hinge"], atol=1e-6)
    assert_close(AdversarialLoss("vanilla").discriminator(real, fake), data.output["val/vanilla"], atol=1e-6)
    per_image = AdversarialLoss(generator="non_saturating", per_image=True)
    assert_close(per_image.generator(fake), data.output["val/nonsat_gen"], atol=1e-6)
    # IBQ sums the two halves of the discriminator's non-saturating loss, which it cannot select, over images' means
    means = [logits.flatten(1).mean(1) for logits in (real, fake)]
    soft = AdversarialLoss("non_saturating").discriminator(*means)
    assert_close(2 * soft, data.output["val/nonsat_disc"], atol=1e-6)


def test_hinge_does_not_ask_for_images():
    fake = torch.randn(3, 1, 4, 5)
    torch.testing.assert_close(AdversarialLoss(per_image=True).generator(fake), AdversarialLoss().generator(fake))
