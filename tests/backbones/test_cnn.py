"""CNN encoder and decoder: sizes, published parameter counts, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import assert_close, golden
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.backbones.cnn import AttnBlock, Downsample, ResnetBlock
from tessera.errors import ConfigError

TINY = {
    "channels": 8,
    "channel_multipliers": (1, 2, 2),
    "num_res_blocks": 1,
    "z_channels": 6,
    "norm_groups": 4,
}


@pytest.mark.parametrize(
    ("sizes", "encoder_millions", "decoder_millions"),
    [
        ({}, 29.298, 42.450),
        ({"channel_multipliers": (1, 2, 2, 4)}, 28.559, 41.415),
        ({"num_res_blocks": 4}, 46.752, 59.904),
        ({"channels": 160, "z_channels": 32}, 44.108, 64.654),
    ],
    ids=["VQ-16", "VQ-8", "IBQ", "VAR"],
)
def test_published_parameter_counts(sizes, encoder_millions, decoder_millions):
    with torch.device("meta"):
        encoder, decoder = CNNEncoder(**sizes), CNNDecoder(**sizes)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 3) == encoder_millions
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 3) == decoder_millions
    assert encoder.downsample == decoder.upsample == 2 ** (len(sizes.get("channel_multipliers", "12345")) - 1)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_blocks"])
def test_published_blocks(case):
    file = golden(case)
    cin, cout = file.config["cin"], file.config["cout"]
    blocks = nn.ModuleDict({"res": ResnetBlock(cin, cout, 32, 0.0), "attn": AttnBlock(cout, 32)})
    blocks.load_state_dict(file.weights)
    x = file.input["x"]
    with torch.no_grad():
        res = blocks["res"](x)
        ours = {
            "res": res,
            "attn_of_res": blocks["attn"](res),
            "norm1": blocks["res"].norm1(x),
            "swish": F.silu(x[:1, :4]),
        }
    assert set(file.output) == set(ours), "every recorded output is compared"
    for name, expected in file.output.items():
        assert_close(ours[name], expected, atol=1e-5)


@pytest.mark.parametrize("levels", [None, [], [0, 2]])
def test_attention_lies_where_it_is_asked_for(levels):
    encoder, decoder = CNNEncoder(**TINY, attention_levels=levels), CNNDecoder(**TINY, attention_levels=levels)
    found = {level for level, part in enumerate(encoder.conv_blocks) if len(part.attn)}
    mirrored = {2 - level for level, part in enumerate(decoder.conv_blocks) if len(part.attn)}
    assert found == mirrored == set([2] if levels is None else levels)
    assert decoder(encoder(torch.randn(1, 3, 8, 8))).shape == (1, 3, 8, 8)


def test_middle_without_attention():
    for part in (CNNEncoder(**TINY, mid_attention=False), CNNDecoder(**TINY, mid_attention=False)):
        assert not any(isinstance(module, AttnBlock) for module in part.mid.modules())
        assert "mid.2.conv1.weight" in part.state_dict()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 20)])
def test_sizes(height, width):
    encoder, decoder = CNNEncoder(**TINY), CNNDecoder(**TINY)
    z = encoder(torch.randn(2, 3, height, width))
    assert z.shape == (2, encoder.out_channels, height // 4, width // 4)
    assert encoder.downsample == decoder.upsample == 4
    assert decoder.in_channels == encoder.out_channels == 6
    assert decoder(z).shape == (2, 3, height, width)


def test_one_level_keeps_the_resolution():
    sizes = {**TINY, "channel_multipliers": [1]}
    assert CNNEncoder(**sizes)(torch.randn(1, 3, 5, 7)).shape == (1, 6, 5, 7)
    assert CNNDecoder(**sizes)(torch.randn(1, 6, 5, 7)).shape == (1, 3, 5, 7)


def test_every_weight_gets_a_gradient():
    encoder, decoder = CNNEncoder(**TINY), CNNDecoder(**TINY)
    decoder(encoder(torch.randn(2, 3, 16, 16))).square().mean().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            # a key's bias shifts all scores of a query alike, which softmax doesn't see
            if not name.endswith(".k.bias"):
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_last_layer_is_the_output_projection():
    decoder = CNNDecoder(**TINY)
    assert decoder.last_layer is decoder.conv_out.weight
    assert decoder.last_layer.shape[0] == 3


def test_downsampling_pads_right_and_bottom_only():
    layer = Downsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 0, 0] = 1.0  # picks the window's first cell
        layer.conv.bias.zero_()
        image = torch.arange(16.0).view(1, 1, 4, 4)
        assert layer(image).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


def test_dropout_acts_in_training_only():
    encoder = CNNEncoder(**TINY, dropout=0.5)
    images = torch.randn(1, 3, 8, 8)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("cls", [CNNEncoder, CNNDecoder])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 6}, r"norm_groups=4 does not divide a width of 6"),
        ({"norm_groups": 3}, r"norm_groups=3"),
        ({"norm_groups": 0}, r"norm_groups=0"),
        ({"num_res_blocks": 0}, r"num_res_blocks=0"),
        ({"z_channels": 0}, r"z_channels=0"),
        ({"channel_multipliers": []}, r"channel_multipliers=\[\]"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers=\[1, 0\]"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
        ({"attention_levels": [3]}, r"attention_levels=\[3\]"),
    ],
)
def test_refusals_name_the_key(cls, change, message):
    part = "encoder" if cls is CNNEncoder else "decoder"
    with pytest.raises(ConfigError, match=rf"backbone\.{part}\.{message}"):
        cls(**{**TINY, **change})
