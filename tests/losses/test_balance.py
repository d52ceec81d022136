import pytest
import torch
from torch import nn

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.discriminators import PatchGAN
from tessera.losses import LeCam, adaptive_weight, balanced_gradient


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_adv_losses"])
def test_lecam(case):
    data = golden(case)
    lecam = LeCam()
    steps = sum(name.startswith("lecam_step") for name in data.output)
    assert steps == sum(name.startswith("logits_real") for name in data.input)
    for step in range(steps):
        suffix = step + 1 if step else ""
        value = lecam(data.input[f"logits_real{suffix}"], data.input[f"logits_fake{suffix}"])
        assert_close(value, data.output[f"lecam_step{step}"], atol=1e-6)
        assert_close(lecam.mean_real, data.output[f"lecam_ema_real_step{step}"], atol=1e-7)
        assert_close(lecam.mean_fake, data.output[f"lecam_ema_fake_step{step}"], atol=1e-7)
    assert set(lecam.state_dict()) == {"mean_real", "mean_fake"}


def _lecam_on_rank(rank, world, settings):
    logits = torch.arange(8.0).view(2, 4)[rank : rank + 1].requires_grad_()
    lecam = LeCam(**settings)
    value = lecam(logits, -logits)
    value.backward()
    return value.item(), lecam.mean_real.item(), logits.grad.tolist()


@pytest.mark.parametrize("settings", [{}, {"of_means": True, "update_first": False}])
def test_lecam_over_two_processes_is_that_of_the_joint_batch(settings):
    logits = torch.arange(8.0).view(2, 4).requires_grad_()
    lecam = LeCam(**settings)
    expected = lecam(logits, -logits)
    expected.backward()
    (a, mean_a, grad_a), (b, mean_b, grad_b) = run_forked(_lecam_on_rank, settings)
    assert mean_a == mean_b == pytest.approx(lecam.mean_real.item())
    assert (a + b) / 2 == pytest.approx(expected.item())
    # the mean over processes that DistributedDataParallel takes
    torch.testing.assert_close(torch.tensor(grad_a + grad_b) / 2, logits.grad)


def test_lecam_of_means_before_their_update():
    """relu(mean real - m_fake)^2 + relu(m_real - mean fake)^2, by hand."""
    lecam = LeCam(decay=0.5, of_means=True, update_first=False)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -3.0])
    assert lecam(real, fake).item() == 4 + 4 and lecam.mean_real == 1 and lecam.mean_fake == -1
    assert lecam(real, fake).item() == 9 + 9 and lecam.mean_real == 1.5


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


def decoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).double()


def joint_batch():
    torch.manual_seed(1)
    return torch.randn(4, 4, 16, 16).double(), torch.rand(4, 3, 16, 16).double() * 2 - 1


def losses(images, targets):
    """Likelihood and adversarial loss; no statistics over the batch, so that shares of a batch can be averaged."""
    torch.manual_seed(2)
    discriminator = PatchGAN(3, 4, 2).double().eval()
    return (images - targets).square().mean(), -discriminator(images).mean()


def our_way(model, z, targets):
    reconstruction = model(z)
    images = reconstruction.detach().requires_grad_()
    gradients = [torch.autograd.grad(loss, images)[0] for loss in losses(images, targets)]
    combined, weight = balanced_gradient(reconstruction, *gradients, model[-1].weight, weight=0.5)
    reconstruction.backward(combined)
    return [p.grad for p in model.parameters()], weight


def test_equal_to_the_published_way_with_two_more_backward_passes():
    model, (z, targets) = decoder(), joint_batch()
    likelihood, adversarial = losses(model(z), targets)
    norms = [torch.autograd.grad(loss, model[-1].weight, retain_graph=True)[0] for loss in (likelihood, adversarial)]
    weight = adaptive_weight(*norms)
    expected = torch.autograd.grad(likelihood + 0.5 * weight * adversarial, list(model.parameters()))
    gradients, found = our_way(model, z, targets)
    torch.testing.assert_close(found, weight)
    for actual, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-9)


def _balanced_on_rank(rank, world):
    model, (z, targets) = decoder(), joint_batch()
    gradients, weight = our_way(model, z[rank::world], targets[rank::world])
    return weight.item(), [gradient.tolist() for gradient in gradients]


def test_over_two_processes_the_weight_is_that_of_the_joint_batch():
    model, (z, targets) = decoder(), joint_batch()
    expected, weight = our_way(model, z, targets)
    ranks = run_forked(_balanced_on_rank)
    assert ranks[0][0] == ranks[1][0] == pytest.approx(weight.item())
    for number, gradient in enumerate(expected):
        mean = sum(torch.tensor(gradients[number]).double() for _, gradients in ranks) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-7)


def test_without_balancing_the_weight_is_the_constant():
    layer = nn.Parameter(torch.ones(3, 2))
    y = torch.ones(4, 3) @ layer
    combined, factor = balanced_gradient(y, torch.ones(4, 2), torch.full((4, 2), 2.0), layer, 0.5, adaptive=False)
    assert factor == 1 and torch.equal(combined, torch.full((4, 2), 2.0))


def test_lecam_leaves_earlier_graphs_alone():
    lecam, real, fake = LeCam(), torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    first = lecam(real, fake)
    lecam(real * 5, fake)
    first.backward()
    # d/dr mean relu(r - m)^2 with m = 0; the pull on the fakes with m_real = 0.001
    torch.testing.assert_close(real.grad, torch.full((3,), 2 / 3))
    torch.testing.assert_close(fake.grad, torch.full((3,), -2 * 0.001 / 3))
