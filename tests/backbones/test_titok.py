"""TiTok's encoder and decoders: token counts, grids, gradients, initialisation, refusals."""

from functools import partial

import pytest
import torch

from golden_cases import assert_close
from tessera.backbones import MaskGITDecoder, TiTokDecoder, TiTokEncoder, TiTokProxyDecoder, tune
from tessera.backbones.titok_layers import Transformer
from tessera.errors import ConfigError
from tessera.optim import decayed_names
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.tokenizers import Tokenizer

TINY = {"resolution": 16, "num_latent_tokens": 5, "width": 16, "layers": 1, "heads": 2, "patch_size": 4}
PIXELS = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 6, "norm_groups": 4}


def proxy_decoder(**changes) -> TiTokProxyDecoder:
    return TiTokProxyDecoder(**{**TINY, **changes}, proxy_codebook_size=20, pixel_decoder=MaskGITDecoder(**PIXELS))


DECODERS = [TiTokDecoder, proxy_decoder]


def make(decoder=TiTokDecoder, branches: int = 1, **changes) -> Tokenizer:
    codebook = partial(VQCodebook, codebook_size=16)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=branches, dim=8)
    encoder = TiTokEncoder(**{**TINY, **changes})
    decoder_changes = {key: value for key, value in changes.items() if key not in ("grid", "latent_layout")}
    return Tokenizer(encoder, quantizer, decoder(**{**TINY, **decoder_changes}), 16)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize("layout", ["transposed", "reshaped"])
def test_round_trip_with_any_number_of_tokens(decoder, branches, count, layout):
    tokenizer = make(decoder, branches, num_latent_tokens=count, latent_layout=layout).eval()
    assert tokenizer.grid == (1, count)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.tokenize(images)
    assert tokens.shape == (2, branches, count)
    with torch.no_grad():
        assert_close(tokenizer.detokenize(tokens), tokenizer.reconstruct(images))
        # an image's tokens don't depend on its neighbours in the batch
        assert torch.equal(tokenizer.tokenize(images[1:]), tokens[1:])


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_weight_gets_a_gradient(decoder):
    tokenizer = make(decoder)
    output = tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_latents_may_lie_on_any_grid():
    row, square = make(num_latent_tokens=4), make(num_latent_tokens=4, grid=[2, 2])
    square.load_state_dict(row.state_dict())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert square.grid == (2, 2)
        assert torch.equal(square.tokenize(images), row.tokenize(images))
        assert_close(square.reconstruct(images), row.reconstruct(images))
    assert square.fingerprint() != row.fingerprint()


def test_layouts():
    """transposed: position n holds the features of token n; reshaped: the same numbers row by row."""
    plain = TiTokEncoder(**TINY).eval()
    mixed = TiTokEncoder(**TINY, latent_layout="reshaped").eval()
    mixed.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = plain(images)[:, :, 0].transpose(1, 2)  # (B, N, W)
        assert torch.equal(mixed(images).flatten(), tokens.flatten())


def test_pixel_head_places_patches():
    """A head that answers with (row, column, colour) of its channel shows them at these pixels."""
    decoder = TiTokDecoder(**TINY)
    with torch.no_grad():
        decoder.head.weight.zero_()
        rows, columns, colours = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(3), indexing="ij")
        decoder.head.bias.copy_((100 * rows + 10 * columns + colours).flatten().float())
        decoder.conv_out.weight.zero_()
        decoder.conv_out.weight[:, :, 1, 1] = torch.eye(3)
        decoder.conv_out.bias.zero_()
        image = (decoder(torch.randn(1, 16, 1, 5)) + 1) / 2
    for colour in range(3):
        for y, x in ((0, 0), (1, 3), (6, 5), (15, 12)):
            assert round(image[0, colour, y, x].item(), 2) == 100 * (y % 4) + 10 * (x % 4) + colour


def test_patch_order_is_row_by_row():
    """The encoder's position 1 + r g + c belongs to patch (r, c), and the decoder's likewise."""
    encoder = TiTokEncoder(**TINY)
    seen = []
    encoder.transformer.norm_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.zeros(1, 3, 16, 16)
    encoder(image)
    image[:, :, 4:8, 8:12] = 1.0  # patch (1, 2)
    encoder(image)
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [1 + 1 * 4 + 2]


def test_soft_codes_are_means_of_the_codebook():
    decoder = proxy_decoder()
    logits = torch.full((1, 20, 4, 4), -1e4)
    logits[0, 7] = 1e4
    soft = decoder.soft_codes(logits)
    assert_close(soft, decoder.pixel_embedding[7].view(1, 6, 1, 1).expand(1, 6, 4, 4))
    assert_close(decoder.soft_codes(torch.zeros(1, 20, 4, 4))[0, :, 0, 0], decoder.pixel_embedding.mean(0))
    assert decoder.last_layer is decoder.pixel_decoder.conv_out.weight


def test_initialisation():
    torch.manual_seed(0)
    encoder = TiTokEncoder(32, 64, width=128, layers=2, heads=4, patch_size=8)
    block = encoder.transformer.blocks[0]
    for weight in (block.attn.proj.weight, block.mlp[0].weight, encoder.patch_embed.weight):
        assert 0.018 < weight.std() < 0.022
    bound = (6 / (128 + 3 * 128)) ** 0.5
    assert 0.98 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert 0.9 < encoder.latent_tokens.std() * 128**0.5 < 1.1
    for bias in (block.attn.qkv.bias, block.mlp[2].bias, encoder.patch_embed.bias):
        assert not bias.any()


def test_named_sizes():
    with torch.device("meta"):
        for size, width, layers, heads in (("small", 512, 8, 8), ("base", 768, 12, 12), ("large", 1024, 24, 16)):
            encoder = TiTokEncoder(256, 32, size=size)
            assert isinstance(encoder.transformer, Transformer) and len(encoder.transformer.blocks) == layers
            assert encoder.out_channels == width and encoder.transformer.blocks[0].attn.heads == heads
        assert TiTokEncoder(256, 32, size="small", layers=3).transformer.blocks[2].attn.heads == 8


@pytest.mark.parametrize(("cls", "part"), [(TiTokEncoder, "encoder"), (TiTokDecoder, "decoder")])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 18}, r"resolution=18 .* is not divisible by backbone\.\w+\.patch_size=4"),
        ({"patch_size": 0}, r"patch_size=0"),
        ({"num_latent_tokens": 0}, r"num_latent_tokens=0"),
        ({"size": "huge"}, r"size='huge' is unknown; choose one of small, base, large"),
        ({"heads": 3}, r"heads=3 does not divide backbone\.\w+\.width=16"),
        ({"layers": 0}, r"layers=0"),
    ],
)
def test_refusals_name_the_key(cls, part, change, message):
    with pytest.raises(ConfigError, match=rf"backbone\.{part}\.{message}"):
        cls(**{**TINY, **change})


def test_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"backbone\.encoder\.grid=\[2, 3\].*num_latent_tokens=5"):
        TiTokEncoder(**TINY, grid=[2, 3])
    with pytest.raises(ConfigError, match=r"latent_layout='scrambled'.*transposed, reshaped"):
        TiTokEncoder(**TINY, latent_layout="scrambled")
    with pytest.raises(ConfigError, match=r"data\.dataset\.resolution=32.*backbone\.encoder\.resolution=16"):
        TiTokEncoder(**TINY).latent_grid(32)
    with pytest.raises(ConfigError, match=r"backbone\.decoder\.num_latent_tokens=5; set it to 7"):
        TiTokDecoder(**TINY).resolution((1, 7))
    with pytest.raises(ConfigError, match=r"makes images of 8 pixels from 2 x 2 proxy codes.*patch_size=4"):
        proxy_decoder(patch_size=8)
    with pytest.raises(ConfigError, match=r"proxy_codebook_size=0"):
        TiTokProxyDecoder(**TINY, proxy_codebook_size=0, pixel_decoder=MaskGITDecoder(**PIXELS))


def test_transformers_take_adapters_or_are_frozen():
    """Tokens, positions and heads around a frozen transformer go on training."""
    for mode in ("lora", "frozen"):
        for backbone in (TiTokEncoder(**TINY), TiTokDecoder(**TINY)):
            tune(backbone, mode, "tokenizer.encoder_tuning")
            trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
            assert "latent_position_embedding" in trained and "transformer.blocks.0.attn.qkv.weight" not in trained
            assert ("transformer.blocks.0.mlp.2.lora_a" in trained) == (mode == "lora")
            assert ("transformer.blocks.0.attn.qkv.lora_b" in trained) == (mode == "lora")


def test_published_weight_decay():
    """The names that the published rule leaves out are left out under ours."""
    with torch.device("meta"):
        tokenizer = make(proxy_decoder)
    decayed = decayed_names(tokenizer, "public")
    free = {name for name, p in tokenizer.named_parameters() if p.ndim >= 2} - decayed
    assert free == {
        "encoder.class_embedding", "encoder.position_embedding", "encoder.latent_position_embedding",
        "encoder.latent_tokens", "encoder.patch_embed.weight", "quantizer.branches.0.codebooks.0.embedding",
        "post_quant_conv.weight", "decoder.class_embedding", "decoder.position_embedding", "decoder.mask_token",
        "decoder.latent_position_embedding", "decoder.pixel_embedding",
    }  # fmt: skip
    assert {"quant_conv.weight", "decoder.head.0.weight", "encoder.transformer.blocks.0.mlp.0.weight"} <= decayed
