"""Any encoder with any decoder, for one branch and two: round trips, gradients, export."""

from functools import partial

import pytest
import torch

from golden_cases import assert_close
from tessera.backbones import CNNDecoder, CNNEncoder, ViTDecoder, ViTEncoder
from tessera.errors import ConfigError
from tessera.quantizers import (
    BSQCodebook,
    MultiScaleQuantizer,
    ProductQuantizer,
    SingleGridQuantizer,
    VQCodebook,
)
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer

VIT = {
    "model": "vit_small_patch14_dinov2",
    "resolution": 16,
    "patch_size": 4,
    "grid": 4,
    "pretrained": False,
    "drop_path": 0.0,
    "width": 12,
    "depth": 1,
    "num_heads": 3,
    "layer_scale": 0.5,
}
CNN = {"channels": 4, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "norm_groups": 2}
ENCODERS = {
    "vit_grouped": lambda p: ViTEncoder(**VIT, groups=p),
    "vit_shared": lambda p: ViTEncoder(**VIT),
    "cnn": lambda p: CNNEncoder(**CNN),
}
DECODERS = {"vit": lambda: ViTDecoder(**VIT), "cnn": lambda: CNNDecoder(**CNN)}
BRANCHES = {
    "single": partial(SingleGridQuantizer, codebook=partial(VQCodebook, codebook_size=16)),
    "multiscale": partial(MultiScaleQuantizer, codebook=partial(BSQCodebook, bits=4), grids=[1, 2, 4]),
}


def build(encoder="vit_grouped", decoder="vit", structure="single", branches=1):
    quantizer = ProductQuantizer(BRANCHES[structure], branches=branches, dim=4 * branches)
    return Tokenizer(ENCODERS[encoder](branches), quantizer, DECODERS[decoder](), resolution=16)


@pytest.mark.parametrize("structure", BRANCHES)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_pair(encoder, decoder, branches, structure):
    torch.manual_seed(0)
    tokenizer = build(encoder, decoder, structure, branches).eval()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    tokens = tokenizer.tokenize(images)
    assert tokens.shape == (3, branches, 16 if structure == "single" else 21)
    assert_close(tokenizer.detokenize(tokens), tokenizer.reconstruct(images), atol=1e-5)
    output = tokenizer.train()(images, rng=IndexedRng(0, torch.arange(3)))
    assert output.reconstruction.shape == images.shape
    loss = (output.reconstruction - images).square().mean() + output.losses["commitment"]
    loss.backward()
    for part in (tokenizer.encoder, tokenizer.decoder):
        missing = [n for n, p in part.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not missing
    assert tokenizer.last_layer.grad.abs().sum() > 0
    twin = build(encoder, decoder, structure, branches)
    twin.load_state_dict(tokenizer.state_dict())
    assert twin.fingerprint() == tokenizer.fingerprint()


def test_branches_of_a_grouped_encoder_see_their_own_tokens_only():
    tokenizer = build(branches=2).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokenizer.encoder.network.blocks = torch.nn.Identity()  # no attention: each token stays by itself
        before = tokenizer.encode(images)
        tokenizer.encoder.latent_tokens[:, 16:] += torch.randn(16, 12)
        after = tokenizer.encode(images)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-2)


def test_a_wrong_number_of_groups_or_another_grid_is_refused():
    quantizer = ProductQuantizer(BRANCHES["single"], branches=2, dim=8)
    with pytest.raises(ConfigError, match=r"backbone\.encoder\.groups"):
        Tokenizer(ViTEncoder(**VIT, groups=3), quantizer, ViTDecoder(**VIT), resolution=16)
    with pytest.raises(ConfigError, match=r"backbone\.decoder\.grid"):
        Tokenizer(ViTEncoder(**{**VIT, "grid": 3}), quantizer, ViTDecoder(**VIT), resolution=16)
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grids"):
        multiscale = ProductQuantizer(BRANCHES["multiscale"], branches=1, dim=4)
        Tokenizer(ViTEncoder(**{**VIT, "grid": 3}), multiscale, ViTDecoder(**{**VIT, "grid": 3}), resolution=16)
