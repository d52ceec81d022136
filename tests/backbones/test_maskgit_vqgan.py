"""MaskGIT's VQGAN networks: sizes, range, published counts, refusals."""

import pytest
import torch

from tessera.backbones import MaskGITDecoder, MaskGITEncoder
from tessera.errors import ConfigError

TINY = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "norm_groups": 4}


def test_published_parameter_counts():
    with torch.device("meta"):
        encoder, decoder = MaskGITEncoder(), MaskGITDecoder()
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 3) == 23.775
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 3) == 30.478


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_sizes(height, width):
    encoder, decoder = MaskGITEncoder(**TINY), MaskGITDecoder(**TINY)
    z = encoder(torch.rand(2, 3, height, width) * 2 - 1)
    assert z.shape == (2, encoder.out_channels, height // 4, width // 4)
    assert decoder(z).shape == (2, 3, height, width)
    assert encoder.latent_grid(16) == (4, 4) and decoder.resolution((4, 4)) == 16
    assert decoder.in_channels == encoder.out_channels == 6


def test_the_convolutions_see_images_between_zero_and_one():
    encoder, decoder = MaskGITEncoder(**TINY), MaskGITDecoder(**TINY)
    seen = []
    encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    assert seen[0][0, :, 0, 0].tolist() == [0.0, 0.5, 1.0]
    with torch.no_grad():
        decoder.conv_out.weight.zero_()
        decoder.conv_out.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    assert decoder(torch.randn(1, 6, 1, 1))[0, :, 0, 0].tolist() == [-1.0, 0.0, 1.0]
    assert decoder.last_layer is decoder.conv_out.weight


def test_every_weight_gets_a_gradient():
    encoder, decoder = MaskGITEncoder(**TINY), MaskGITDecoder(**TINY)
    decoder(encoder(torch.randn(2, 3, 16, 16))).square().mean().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 6}, r"norm_groups=4 does not divide a width of 6"),
        ({"num_res_blocks": 0}, r"num_res_blocks=0"),
        ({"channel_multipliers": []}, r"channel_multipliers=\[\]"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
    ],
)
@pytest.mark.parametrize(("cls", "part"), [(MaskGITEncoder, "encoder"), (MaskGITDecoder, "decoder")])
def test_refusals_name_the_key(cls, part, change, message):
    with pytest.raises(ConfigError, match=rf"backbone\.{part}\.{message}"):
        cls(**{**TINY, **change})


def test_refuses_a_resolution_that_is_no_multiple():
    with pytest.raises(ConfigError, match=r"data\.dataset\.resolution=18"):
        MaskGITEncoder(**TINY).latent_grid(18)
