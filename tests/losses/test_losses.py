import pytest
import torch
from safetensors.torch import save_file

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.losses import LPIPS, AdversarialLoss, LeCam, adaptive_weight, balanced_gradient, pixel_loss


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
    # the swapped arguments of the public code are not reproduced
    assert not torch.allclose(soft.generator(fake), data.output["public_non_saturating_g"], atol=1e-3)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_adv_losses"])
def test_lecam(case):
    data = golden(case)
    lecam = LeCam()
    for step, suffix in enumerate(("", "2")):
        value = lecam(data.input[f"logits_real{suffix}"], data.input[f"logits_fake{suffix}"])
        assert_close(value, data.output[f"lecam_step{step}"], atol=1e-6)
        assert_close(lecam.mean_real, data.output[f"lecam_ema_real_step{step}"], atol=1e-7)
        assert_close(lecam.mean_fake, data.output[f"lecam_ema_fake_step{step}"], atol=1e-7)
    assert set(lecam.state_dict()) == {"mean_real", "mean_fake"}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_adv_losses"])
def test_adaptive_weight(case):
    data = golden(case)
    layer = torch.nn.Parameter(data.input["weight"].clone())
    y = data.input["feat"] @ layer.T
    likelihood = (y - data.input["target"]).square().mean()
    adversarial = -(torch.tanh(y) @ data.input["dvec"]).mean()
    grads = [torch.autograd.grad(loss, y, retain_graph=True)[0] for loss in (likelihood, adversarial)]
    combined, weight = balanced_gradient(y, *grads, layer, weight=0.5)
    assert_close(weight, data.output["adaptive_weight"], atol=1e-5)
    # continuing from the reconstruction gives the gradient of the published weighted sum
    y.backward(combined)
    expected = torch.autograd.grad(_weighted(data, layer, weight), layer)[0]
    torch.testing.assert_close(layer.grad, expected)


def _weighted(data, layer, weight):
    y = data.input["feat"] @ layer.T
    likelihood = (y - data.input["target"]).square().mean()
    return likelihood - 0.5 * weight * (torch.tanh(y) @ data.input["dvec"]).mean()


def test_adaptive_weight_is_bounded():
    assert adaptive_weight(torch.ones(3) * 1e9, torch.zeros(3)).item() == 1e4


def _lecam_on_rank(rank, world):
    logits = torch.arange(8.0).view(2, 4)
    lecam = LeCam()
    value = lecam(logits[rank : rank + 1], -logits[rank : rank + 1])
    return value.item(), lecam.mean_real.item()


def test_lecam_over_two_processes_is_that_of_the_joint_batch():
    logits = torch.arange(8.0).view(2, 4)
    lecam = LeCam()
    expected = lecam(logits, -logits).item()
    (a, mean_a), (b, mean_b) = run_forked(_lecam_on_rank)
    assert mean_a == mean_b == pytest.approx(lecam.mean_real.item())
    assert (a + b) / 2 == pytest.approx(expected)


def thin_lpips(data, tmp_path):
    save_file(
        {k: v.contiguous() for k, v in data.weights.items() if k.startswith("net.")}, tmp_path / "vgg.safetensors"
    )
    save_file({k: v.contiguous() for k, v in data.weights.items() if k.startswith("lin")}, tmp_path / "lin.safetensors")
    return LPIPS(tmp_path / "vgg.safetensors", tmp_path / "lin.safetensors")


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_lpips"])
def test_lpips(case, tmp_path):
    data = golden(case)
    lpips = thin_lpips(data, tmp_path).train()
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    x = data.input["x"].clone().requires_grad_()
    value = lpips(x, data.input["y"])
    assert_close(value, data.output["lpips"].flatten())
    for stage, features in enumerate(lpips.features(data.input["x"])):
        assert_close(features[:1], data.output[f"feat_{stage}"])
    value.mean().backward()
    assert_close(x.grad, data.output["grad_x"])
    assert lpips(x, x).abs().max() == 0


def test_lpips_without_weights(tmp_path):
    with pytest.raises(MissingFileError, match=r"perceptual\.backbone_weights=.*perceptual=none"):
        LPIPS(tmp_path / "nothing.pth")
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"lacks features\.2\.weight"):
        LPIPS(tmp_path / "part.pth")


@pytest.mark.parametrize("build", [lambda: AdversarialLoss("wasserstein"), lambda: pixel_loss("l3")])
def test_unknown_names(build):
    with pytest.raises(ConfigError, match=r"stage\..*unknown; choose one of"):
        build()


def test_pixel_losses():
    x, y = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert pixel_loss("mse")(x, y) == 4 and pixel_loss("l1")(x, y) == 2
