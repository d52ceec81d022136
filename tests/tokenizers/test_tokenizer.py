"""The tokenizer: round trips, gradients, fingerprint, refusals."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import assert_close
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.errors import ConfigError, DataError
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer

SIZES = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "z_channels": 12,
    "norm_groups": 4,
}


def build(branches: int = 1, resolution: int = 8, codebook_size: int = 32, l2_normalize: bool = True, **sizes):
    codebook = partial(VQCodebook, codebook_size=codebook_size, l2_normalize=l2_normalize)
    return Tokenizer(
        encoder=CNNEncoder(**{**SIZES, **sizes}),
        quantizer=ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=branches, dim=8),
        decoder=CNNDecoder(**{**SIZES, **sizes}),
        resolution=resolution,
    )


def pictures(n: int = 3, resolution: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, resolution, resolution) * 2 - 1


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_round_trip(branches, training):
    tokenizer = build(branches).train(training)
    images = pictures()
    tokens = tokenizer.tokenize(images)
    assert tokens.shape == (3, branches, 16) and tokens.dtype == torch.int64
    assert tokenizer.grid == (4, 4) and tokenizer.quantizer.num_tokens == 16
    decoded = tokenizer.detokenize(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= -1 and decoded.max() <= 1
    assert_close(decoded, tokenizer.reconstruct(images))
    output = tokenizer(images)
    assert torch.equal(output.tokens, tokens)
    assert_close(output.reconstruction.clamp(-1, 1), decoded)
    assert output.z.shape == output.z_q.shape == (3, 8, 4, 4)
    assert set(output.losses) == {"codebook", "commitment"}
    assert output.perturbation == {}


def test_detokenize_clamps_and_forward_does_not():
    tokenizer = build()
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias.fill_(3.0)
    images = pictures()
    assert tokenizer(images).reconstruction.max() > 1
    assert tokenizer.decode(tokenizer.quantizer(tokenizer.encode(images)).z_q).max() > 1
    assert tokenizer.detokenize(tokenizer.tokenize(images)).max() <= 1
    assert tokenizer.reconstruct(images).max() <= 1


@pytest.mark.parametrize("branches", [1, 2])
def test_gradient_of_the_reconstruction_reaches_the_encoder_but_not_the_codes(branches):
    tokenizer = build(branches)
    output = tokenizer(pictures())
    output.reconstruction.square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.last_layer.grad.abs().sum() > 0
    for branch in tokenizer.quantizer.branches:
        assert branch.codebooks[0].embedding.grad is None
    output = tokenizer(pictures())
    sum(output.losses.values()).backward()
    for branch in tokenizer.quantizer.branches:
        assert branch.codebooks[0].embedding.grad.abs().sum() > 0


def test_perturbation_changes_what_is_decoded_and_nothing_else():
    tokenizer = build().eval()
    images = pictures()
    clean = tokenizer(images)
    seen = {}

    def perturb(quantizer, z, output):
        seen.update(quantizer=quantizer, z=z, output=output)
        other = copy.copy(output)
        other.z_q, other.tokens = -output.z_q, output.tokens * 0
        return other, {"images": 0.25}

    output = tokenizer(images, perturb)
    assert seen["quantizer"] is tokenizer.quantizer
    assert torch.equal(seen["z"], clean.z) and torch.equal(seen["output"].z_q, clean.z_q)
    assert torch.equal(output.tokens, clean.tokens)
    assert torch.equal(output.z_q, -clean.z_q)
    assert_close(output.reconstruction, tokenizer.decode(-clean.z_q))
    assert output.perturbation == {"images": 0.25}
    for name, value in clean.losses.items():
        assert torch.equal(output.losses[name], value)


@pytest.mark.parametrize("training", [True, False])
def test_works_under_autocast_and_in_low_precision(training):
    from tessera.perturbation import NearestCodePerturbation

    tokenizer = build().train(training)
    strategy = NearestCodePerturbation(1.0, 1.0, 4)
    perturb = partial(strategy, progress=0.0, rng=IndexedRng(0, torch.arange(3)))
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(pictures(), perturb)
    (output.reconstruction.float().mean() + sum(output.losses.values())).backward()
    assert tokenizer.encoder.conv_in.weight.grad.isfinite().all()
    assert output.losses["commitment"].dtype == torch.float32
    low = build().bfloat16().train(training)
    assert low(pictures().bfloat16(), perturb).reconstruction.dtype == torch.bfloat16
    assert low.detokenize(low.tokenize(pictures().bfloat16())).dtype == torch.bfloat16


def test_fingerprint_is_the_identity_of_the_token_space():
    tokenizer = build()
    first = tokenizer.fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    assert tokenizer.fingerprint() == first
    assert tokenizer.eval().fingerprint() == first
    twin = build()
    assert twin.fingerprint() != first
    twin.load_state_dict(tokenizer.state_dict())
    assert twin.fingerprint() == first
    with torch.no_grad():
        twin.decoder.conv_out.weight.add_(1.0)
        twin.post_quant_conv.weight.add_(1.0)
    assert twin.fingerprint() == first, "post-training the decoder must not invalidate tokens"


@pytest.mark.parametrize(
    "name", ["encoder.conv_out.bias", "quant_conv.weight", "quantizer.branches.0.codebooks.0.embedding"]
)
def test_fingerprint_sees_the_smallest_change_of_each_part(name):
    tokenizer = build()
    before = tokenizer.fingerprint()
    parameter = dict(tokenizer.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(10.0))
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize("change", [{"l2_normalize": False}, {"resolution": 16}, {"norm_groups": 2}])
def test_fingerprint_sees_settings_that_no_weight_shows(change):
    tokenizer, other = build(), build(**change)
    other.load_state_dict(tokenizer.state_dict())
    assert other.fingerprint() != tokenizer.fingerprint()


def test_fingerprint_is_stable_over_releases():
    """Token caches and generators refer to tokenizers by fingerprint: changing it invalidates them all."""
    tokenizer = build()
    with torch.no_grad():
        for i, parameter in enumerate(tokenizer.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 64 + i)
    assert tokenizer.fingerprint() == "c0ee629d118a4f91"


def test_state_dict_reload_is_exact():
    tokenizer, other = build(2), build(2)
    other.load_state_dict(copy.deepcopy(tokenizer.state_dict()))
    images = pictures()
    assert torch.equal(other(images).reconstruction, tokenizer(images).reconstruction)
    prefixes = {key.split(".")[0] for key in tokenizer.state_dict()}
    assert prefixes == {"encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder"}


def test_decoder_modules_are_what_follows_the_tokens():
    tokenizer = build()
    modules = tokenizer.decoder_modules()
    assert modules == {"post_quant_conv": tokenizer.post_quant_conv, "decoder": tokenizer.decoder}


def test_refuses_a_resolution_the_encoder_cannot_halve():
    with pytest.raises(ConfigError, match=r"data\.dataset\.resolution=9.*backbone\.encoder\.channel_multipliers"):
        build(resolution=9)


def test_refuses_parts_that_do_not_fit():
    parts = build()
    with pytest.raises(ConfigError, match=r"backbone\.decoder\.channel_multipliers"):
        Tokenizer(parts.encoder, parts.quantizer, CNNDecoder(**{**SIZES, "channel_multipliers": (1, 1, 1)}), 8)
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid=\(4, 4\).*\(8, 8\)"):
        Tokenizer(parts.encoder, parts.quantizer, parts.decoder, 16)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 16, 16), (3, 8, 8)])
def test_refuses_images_of_another_shape(shape):
    with pytest.raises(DataError, match=r"data\.dataset\.resolution=8"):
        build().tokenize(torch.zeros(shape))


@pytest.mark.parametrize("branches", [1, 2])
def test_overfits_one_batch(branches):
    tokenizer = build(branches)
    images = pictures(2)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    errors = []
    for _ in range(40):
        output = tokenizer(images)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + output.losses["codebook"] + 0.25 * output.losses["commitment"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


class TwoGroups(nn.Module):
    """An encoder with one latent map per branch: the images' mean in map 0, its negative in map 1."""

    out_channels, groups = 3, 2

    def latent_grid(self, resolution):
        return (resolution // 2,) * 2

    def forward(self, images):
        pooled = F.avg_pool2d(images, 2)
        return torch.cat([pooled, -pooled], dim=1)


def test_an_encoder_with_a_map_per_branch_shares_one_projection():
    model = build(branches=2)
    grouped = Tokenizer(TwoGroups(), model.quantizer, model.decoder, 8)
    images = pictures()
    z = grouped.encode(images)
    assert grouped.quant_conv.weight.shape[:2] == (model.quantizer.dim // 2, 3)
    pooled = F.avg_pool2d(images, 2)
    torch.testing.assert_close(z, torch.cat([grouped.quant_conv(pooled), grouped.quant_conv(-pooled)], dim=1))


def test_refuses_groups_that_are_not_the_branches():
    model = build(branches=1)
    with pytest.raises(ConfigError, match=r"backbone\.encoder\.groups"):
        Tokenizer(TwoGroups(), model.quantizer, model.decoder, 8)


@pytest.mark.parametrize("kernel", [1, 3, None])
def test_projection_kernel(kernel):
    sizes = {**SIZES, "z_channels": 8}
    codebook = partial(VQCodebook, codebook_size=32)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=1, dim=8)
    tokenizer = Tokenizer(CNNEncoder(**sizes), quantizer, CNNDecoder(**sizes), 8, projection_kernel=kernel)
    images = pictures()
    tokens = tokenizer.eval().tokenize(images)
    assert tokens.shape == (3, 1, 16)
    assert_close(tokenizer.detokenize(tokens), tokenizer.reconstruct(images))
    if kernel is None:
        assert not list(tokenizer.quant_conv.parameters()) + list(tokenizer.post_quant_conv.parameters())
        assert torch.equal(tokenizer.encode(images), tokenizer.encoder(images))
    else:
        assert tokenizer.quant_conv.weight.shape == tokenizer.post_quant_conv.weight.shape == (8, 8, kernel, kernel)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(2, "projection_kernel=2 must be odd"), (-1, "must be odd"), (None, "12 meet 8 between backbone.encoder")],
)
def test_refuses_impossible_projections(kernel, message):
    codebook = partial(VQCodebook, codebook_size=32)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=1, dim=8)
    with pytest.raises(ConfigError, match=message):
        Tokenizer(CNNEncoder(**SIZES), quantizer, CNNDecoder(**SIZES), 8, projection_kernel=kernel)
