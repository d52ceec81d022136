import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from golden_cases import assert_close, golden
from tessera.discriminators import BlurPatchGAN
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.losses import AdversarialLoss, ConvNeXtLogits, LeCam, PerceptualMean, pixel_loss

PREFIX = "stage2."
TINY = ((4, 6, 1), (6, None, 1))


class PooledDistance(nn.Module):
    """The file's stand-in for LPIPS."""

    def forward(self, x, y):
        return F.avg_pool2d((x - y) / 2, 4).square().mean((1, 2, 3))


def part(file, prefix):
    return {key.removeprefix(prefix): value for key, value in file.weights.items() if key.startswith(prefix)}


def published_convnext(file, folder, changed=None):
    weights = {**part(file, f"{PREFIX}perceptual_loss.convnext."), **(changed or {})}
    save_file(weights, folder / "convnext.safetensors")
    options = file.config["convnext"]
    return ConvNeXtLogits(folder / "convnext.safetensors", stages=options["blocks"], num_classes=options["num_classes"])


def published_discriminator(file):
    options = file.config["disc"]
    model = BlurPatchGAN(options["hidden_channels"], options["num_stages"])
    weights = part(file, f"{PREFIX}discriminator.")
    model.load_state_dict({key: value for key, value in weights.items() if not key.endswith("kernel")}, strict=True)
    return model


def published_perceptual(name, convnext):
    """The loss of a published name, e.g. "lpips-convnext_s-1.0-0.1"."""
    if "lpips" not in name or "convnext_s" not in name:
        return PooledDistance() if "lpips" in name else convnext
    first, second = (float(weight) for weight in name.split("-")[-2:])
    return PerceptualMean({"lpips": PooledDistance(), "convnext": convnext}, {"lpips": first, "convnext": second})


def signed(images_01):
    return 2 * images_01 - 1


@pytest.mark.golden
@pytest.mark.parametrize("case", ["titok_losses"])
def test_published_perceptual_losses(case, tmp_path):
    file = golden(case)
    x, y = signed(file.input["reconstruction"]), signed(file.input["image"])
    convnext = published_convnext(file, tmp_path)
    with torch.no_grad():
        assert_close(convnext.logits(y), file.output["convnext_logits_image"], atol=2e-5, rtol=1e-4)
        assert_close(convnext(x, y).mean(), file.output["convnext_loss"], atol=2e-5, rtol=1e-4)
        names = [options["perceptual_loss"] for options in file.config["losses"].values()]
        weighted = next(name for name in names if "lpips" in name and "convnext_s" in name)
        mean = published_perceptual(weighted, convnext)
        recorded = file.output["lpips_convnext_mix"]
        # the recorded one adds the batch's ConvNeXt term to every image's LPIPS
        assert recorded.shape == (len(x), 1, 1, 1)
        assert_close(mean(x, y).mean(), recorded.mean(), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("shipped_files")
def test_parity_sees_every_weight(tmp_path):
    file = golden("titok_losses")
    y, weights = signed(file.input["image"]), part(file, f"{PREFIX}perceptual_loss.convnext.")
    with torch.no_grad():
        for key in weights:
            if key.endswith("weight"):
                other = published_convnext(file, tmp_path, {key: -1.5 * weights[key]})
                assert not torch.allclose(other.logits(y), file.output["convnext_logits_image"], atol=1e-3), key


@pytest.mark.golden
@pytest.mark.parametrize("case", ["titok_losses"])
def test_published_discriminator_and_its_losses(case):
    file = golden(case)
    model, lecam, settings = published_discriminator(file), LeCam(of_means=True, update_first=False), file.config
    lecam.mean_real, lecam.mean_fake = (
        file.weights[f"{PREFIX}ema_{kind}_logits_mean"].squeeze() for kind in ("real", "fake")
    )
    fake = signed(file.input["reconstruction"])
    close = {"atol": 2e-5, "rtol": 1e-4}
    with torch.no_grad():
        images = signed(file.input["image"])
        assert_close(model(images), file.output["discriminator_logits_real"], **close)
        inside = model.blocks[0](model.block_in((images + 1) / 2)).mean((2, 3))
        assert_close(inside, file.output["discriminator_block0_mean"], **close)
    options = settings["losses"]["stage2"]
    weight, factor = options["lecam_regularization_weight"], options["discriminator_factor"]
    for number, name in enumerate(("image", "image2")):
        model.zero_grad()
        logits_real, logits_fake = model(signed(file.input[name])), model(fake)
        regulariser = weight * lecam(logits_real, logits_fake)
        loss = factor * AdversarialLoss().discriminator(logits_real, logits_fake) + regulariser
        loss.backward()
        found = {
            "discriminator_loss": loss,
            "lecam_loss": regulariser,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
            "ema_real_logits_mean": lecam.mean_real[None],
            "ema_fake_logits_mean": lecam.mean_fake[None],
            "grad_to_logits2_weight_norm": model.to_logits[2].weight.grad.norm(),
        }
        expected = {key.split("/")[1]: value for key, value in file.output.items() if key.startswith(f"disc{number}/")}
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_close(found[key].detach(), value, **close)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["titok_losses"])
def test_published_terms_of_the_generator(case, tmp_path):
    """Sums of our terms with the published weights; images in [-1, 1] make the squared error 4 times that of [0, 1]."""
    file = golden(case)
    discriminator, convnext = published_discriminator(file), published_convnext(file, tmp_path)
    target = signed(file.input["image"])
    mean, log_variance = file.input["moments"].chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(mean)
    for name, options in file.config["losses"].items():
        for moment in ("before", "after"):
            given = file.input["reconstruction"].clone().requires_grad_()
            images = signed(given)
            kind, range_factor = {"l2": ("mse", 4), "l1": ("l1", 2)}[options["reconstruction_loss"]]
            perceptual = published_perceptual(options["perceptual_loss"], convnext)
            terms = {
                "reconstruction_loss": pixel_loss(kind)(images, target) / range_factor,
                "perceptual_loss": perceptual(images, target).mean() * options["perceptual_weight"],
            }
            terms["reconstruction_loss"] *= options["reconstruction_weight"]
            logged = {}
            if "kl_weight" in options:
                terms["reconstruction_loss"] /= torch.tensor(options["logvar_init"]).exp()
                terms["kl_loss"] = kl * options["kl_weight"]
            else:
                terms["quantizer_loss"] = file.input["quantizer_loss"] * options["quantizer_weight"]
                logged = {key: file.input[key] for key in ("commitment_loss", "codebook_loss")}
            # the discriminator does not run before its start
            factor = options["discriminator_factor"] if moment == "after" else 0.0
            gan = AdversarialLoss().generator(discriminator(images)) if moment == "after" else torch.zeros(())
            terms["weighted_gan_loss"] = gan * options["discriminator_weight"] * factor
            total = sum(terms.values())
            total.backward()
            ours = {
                **terms,
                **logged,
                "gan_loss": gan,
                "discriminator_factor": torch.tensor(factor),
                "d_weight": torch.tensor(options["discriminator_weight"]),
                "total": total,
                "total_loss": total,
                "grad_reconstruction_norm": given.grad.norm(),
                "grad_reconstruction_crop": given.grad[..., :4, :4],
            }
            prefix = f"{name}/{moment}/"
            expected = {k.removeprefix(prefix): v for k, v in file.output.items() if k.startswith(prefix)}
            assert set(expected) == set(ours)
            for key, value in expected.items():
                assert_close(ours[key].detach(), value, atol=2e-5, rtol=1e-4)


def tiny():
    torch.manual_seed(0)
    return ConvNeXtLogits(pretrained=False, stages=TINY, num_classes=5)


def test_frozen_and_in_eval_mode():
    model = tiny().train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x, y = torch.rand(2, 3, 20, 24, requires_grad=True), torch.rand(2, 3, 20, 24)
    distances = model(x, y)
    distances.sum().backward()
    assert distances.shape == (2,) and x.grad.abs().sum() > 0
    assert model(y, y).abs().max() == 0


def test_the_published_network():
    with torch.device("meta"):
        assert sum(p.numel() for p in ConvNeXtLogits(pretrained=False).parameters()) == 50_223_688


def test_weights(tmp_path):
    with pytest.raises(MissingFileError, match=r"perceptual\.weights=.*nothing\.pth does not exist.*perceptual=none"):
        ConvNeXtLogits(tmp_path / "nothing.pth")
    state = tiny().network.state_dict()
    state["classifier.2.bias"] = state["classifier.2.bias"][:-1]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth does not fit: classifier\.2\.bias is \(4,\), not \(5,\)"):
        ConvNeXtLogits(tmp_path / "other.pth", stages=TINY, num_classes=5)
    with pytest.raises(ConfigError, match=r"perceptual\.pretrained=false"):
        ConvNeXtLogits(tmp_path / "other.pth", pretrained=False)


def test_mean_of_losses():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, y):
            return torch.full((len(x),), self.value)

    x = torch.zeros(2, 3, 4, 4)
    mean = PerceptualMean({"a": Constant(1.0), "b": Constant(5.0)}, {"a": 3.0, "b": 1.0})
    assert mean(x, x).tolist() == [2.0, 2.0]
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ConfigError, match=r"perceptual\.weights=.*: a, b"):
            PerceptualMean({"a": Constant(1.0), "b": Constant(5.0)}, weights)
