import pytest
import torch
from torch import nn

from golden_cases import assert_close, golden
from tessera.discriminators import StyleGANDiscriminator
from tessera.errors import ConfigError, DataError


def published(file, weights=None):
    channels = {int(side): width for side, width in file.config["channels"].items()}
    model = StyleGANDiscriminator(file.config["image_size"], channels=channels)
    weights = file.weights if weights is None else weights
    # the blur's constant kernel is not learnt, so it is no part of our state
    model.load_state_dict({key: value for key, value in weights.items() if not key.endswith(".f")}, strict=True)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_disc_stylegan"])
def test_published_logits(case):
    file = golden(case)
    with torch.no_grad():
        assert_close(published(file)(file.input["image"]), file.output["logits"])


@pytest.mark.usefixtures("shipped_files")
def test_parity_sees_every_weight():
    file = golden("xqgan_disc_stylegan")
    with torch.no_grad():
        for key in [key for key in file.weights if key.endswith("weight")]:
            changed = {**file.weights, key: -1.5 * file.weights[key]}
            assert not torch.allclose(published(file, changed)(file.input["image"]), file.output["logits"], atol=1e-4)


def test_published_widths():
    with torch.device("meta"):
        model = StyleGANDiscriminator(1024)
    widths = [layer.out_channels for name, layer in model.named_modules() if name.endswith(("blocks.0", "conv_res"))]
    assert widths == [16, 32, 64, 128, 256, 512, 512, 512, 512]
    assert model.final_linear[0].weight.shape == (512, 8192)


def test_gradients_reach_image_and_weights():
    model = StyleGANDiscriminator(16, capacity=128, max_channels=8)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in model.parameters())
    assert next(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) == 8


def test_impossible_sizes():
    for resolution in (4, 24):
        with pytest.raises(ConfigError, match=rf"discriminator\.resolution={resolution} must be a power of two"):
            StyleGANDiscriminator(resolution)
    with pytest.raises(ConfigError, match=r"discriminator\.channels has no width of at least 1 for side 4"):
        StyleGANDiscriminator(8, channels={8: 4})
    with pytest.raises(ConfigError, match=r"for side 16.*discriminator\.capacity"):
        StyleGANDiscriminator(16, capacity=8)
    with pytest.raises(DataError, match=r"discriminator\.resolution=16"):
        StyleGANDiscriminator(16, capacity=64)(torch.zeros(1, 3, 8, 8))
