import pytest
import torch
from torch import nn

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.discriminators import PatchGAN
from tessera.discriminators.patchgan import JointBatchNorm2d
from tessera.errors import ConfigError, DataError


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_disc_patchgan"])
def test_patchgan(case):
    data = golden(case)
    options = data.config
    model = PatchGAN(options["input_nc"], options["ndf"], options["n_layers"])
    model.load_state_dict(data.weights, strict=True)
    (images,) = data.input.values()
    assert_close(model.eval()(images), data.output["logits_eval"])
    assert_close(model.train()(images), data.output["logits_train"])
    running = {k.removeprefix("after_train/"): v for k, v in data.output.items() if k.startswith("after_train/")}
    assert running
    for name, expected in running.items():
        assert_close(model.state_dict()[name], expected)


def build():
    torch.manual_seed(0)
    return PatchGAN(3, 4, 2).double()


def joint_batch():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def _on_rank(rank, world):
    model = build()
    images = joint_batch()
    share = images[rank * 3 : rank * 3 + 3].clone().requires_grad_()
    logits = model(share)
    logits.square().sum().backward()
    return (
        logits.detach().tolist(),
        [p.grad.tolist() for p in model.parameters()],
        model.main[3].running_var.tolist(),
        share.grad.tolist(),
    )


def test_batch_statistics_cover_all_processes():
    model, images = build(), joint_batch().requires_grad_()
    logits = model(images)
    logits.square().sum().backward()
    (first, grads0, var0, x0), (second, grads1, var1, x1) = run_forked(_on_rank)
    torch.testing.assert_close(torch.tensor(first + second).double(), logits.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(x0 + x1).double(), images.grad, atol=1e-4, rtol=1e-4)
    assert var0 == var1
    torch.testing.assert_close(torch.tensor(var0).double(), model.main[3].running_var, atol=1e-5, rtol=1e-5)
    for a, b, expected in zip(grads0, grads1, model.parameters(), strict=True):
        torch.testing.assert_close(
            torch.tensor(a).double() + torch.tensor(b).double(), expected.grad, atol=1e-4, rtol=1e-4
        )


def test_small_images_are_refused():
    assert PatchGAN(3, 4, 2)(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)
    with pytest.raises(DataError, match=r"discriminator\.num_layers=3, which needs 24"):
        PatchGAN(3, 4, 3)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"discriminator\.num_layers=0"):
        PatchGAN(num_layers=0)


def _offset_norm(rank, world):
    share = offset_batch().split([1, 3])[rank]  # uneven shares
    return JointBatchNorm2d(2)(share.float()).tolist()


def offset_batch():
    """A mean 10,000 times the deviation: E[x^2] - E[x]^2 has no digit left in float32."""
    return 100 + 0.01 * torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def test_variance_survives_a_large_mean():
    expected = nn.BatchNorm2d(2).double()(offset_batch())
    first, second = run_forked(_offset_norm)
    torch.testing.assert_close(torch.tensor(first + second).double(), expected, atol=0.02, rtol=0.02)


def test_initialisation():
    model = PatchGAN(3, 64, 3)
    convolutions = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d)])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([m.weight for m in norms])
    assert convolutions.std().item() == pytest.approx(0.02, rel=0.01) and abs(convolutions.mean()) < 1e-4
    assert scales.mean().item() == pytest.approx(1.0, abs=0.01) and scales.std().item() == pytest.approx(0.02, rel=0.2)
    assert all((m.bias == 0).all() for m in norms)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_discriminator"])
def test_published_by_ibq(case):
    data = golden(case)
    model = PatchGAN(3, data.config["ndf"], data.config["n_layers"])
    model.load_state_dict(data.weights, strict=True)
    with torch.no_grad():
        assert_close(model.eval()(data.input["x"]), data.output["logits_eval"], atol=1e-6)
        assert_close(model.train()(data.input["x"]), data.output["logits_train"], atol=5e-6)
    running = {k.split("/", 1)[1]: v for k, v in data.output.items() if k.startswith("after_train_forward/")}
    assert len(running) == 3 * data.config["n_layers"]
    for name, expected in running.items():
        assert_close(model.state_dict()[name], expected, atol=1e-6)


def test_norms_and_biases():
    """A convolution has a bias where no batch norm follows it."""
    for norm, kind in (("batch", JointBatchNorm2d), ("group", nn.GroupNorm), ("none", None)):
        model = PatchGAN(3, 4, 2, norm)
        biases = [m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert biases == [True, norm != "batch", norm != "batch", True]
        norms = [m for m in model.main if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert len(norms) == (2 if kind else 0) and all(isinstance(m, kind) for m in norms)
        assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 1, 2, 2)
    with pytest.raises(ConfigError, match=r"discriminator\.norm='layer' is unknown"):
        PatchGAN(norm="layer")
    with pytest.raises(ConfigError, match=r"discriminator\.norm=group needs widths"):
        PatchGAN(channels=9, norm="group", num_layers=3)
