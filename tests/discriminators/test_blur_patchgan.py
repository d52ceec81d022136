import pytest
import torch

from tessera.discriminators import BlurPatchGAN
from tessera.discriminators.blur_patchgan import BlurDown
from tessera.errors import ConfigError

# parity: tests/losses/test_convnext.py, whose golden file holds the discriminator


def test_the_published_size():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in BlurPatchGAN().parameters()) / 1e6, 3) == 1.910


@pytest.mark.parametrize("side", [7, 8, 33])
def test_blur_keeps_constants_inside_and_halves(side):
    made = BlurDown()(torch.ones(1, 2, side, side + 1))
    assert made.shape == (1, 2, -(-side // 2), -(-(side + 1) // 2))
    torch.testing.assert_close(made[..., 1:-1, 1:-1], torch.ones_like(made[..., 1:-1, 1:-1]))


@pytest.mark.parametrize("side", [16, 20, 256])
def test_logits_have_one_size(side):
    model = BlurPatchGAN(8, 3, norm_groups=4, logits_size=4)
    images = torch.randn(1, 3, side, side, requires_grad=True)
    logits = model(images)
    logits.sum().backward()
    assert logits.shape == (1, 1, 4, 4) and images.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_impossible_sizes():
    for key in ("channels", "num_stages", "norm_groups", "logits_size"):
        with pytest.raises(ConfigError, match=rf"discriminator\.{key}=0"):
            BlurPatchGAN(**{key: 0})
    with pytest.raises(ConfigError, match=r"discriminator\.norm_groups=32 does not divide discriminator\.channels=40"):
        BlurPatchGAN(channels=40)
