"""Codebooks x structures x branches under the convolutional and the 1-D backbones, in all pairs that fit."""

from functools import partial

import pytest
import torch
from torch import nn

from golden_cases import assert_close
from tessera.backbones import (
    CNNDecoder,
    CNNEncoder,
    MaskGITDecoder,
    MaskGITEncoder,
    TiTokDecoder,
    TiTokEncoder,
    TiTokProxyDecoder,
)
from tessera.errors import ConfigError
from tessera.perturbation import NearestCodePerturbation
from tessera.quantizers import (
    BSQCodebook,
    FSQCodebook,
    IBQCodebook,
    LFQCodebook,
    MultiScaleQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SingleGridQuantizer,
    VQCodebook,
)
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer

CNN = {"channels": 4, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 2}
ROW = {"resolution": 16, "num_latent_tokens": 16, "width": 16, "layers": 1, "heads": 2, "patch_size": 4}

ENCODERS = {
    "cnn": lambda: CNNEncoder(**CNN),
    "maskgit": lambda: MaskGITEncoder(**CNN),
    "titok": lambda: TiTokEncoder(**ROW),
    "titok_map": lambda: TiTokEncoder(**ROW, grid=(4, 4)),
}
DECODERS = {
    "cnn": lambda: CNNDecoder(**CNN),
    "maskgit": lambda: MaskGITDecoder(**CNN),
    "titok": lambda: TiTokDecoder(**ROW),
    "titok_proxy": lambda: TiTokProxyDecoder(**ROW, proxy_codebook_size=12, pixel_decoder=MaskGITDecoder(**CNN)),
}
CODEBOOKS = {
    "vq": partial(VQCodebook, codebook_size=16, l2_normalize=False),
    "vq_l2": partial(VQCodebook, codebook_size=16),
    "ibq": partial(IBQCodebook, codebook_size=16, entropy_temperature=1.0),
    "lfq": partial(LFQCodebook, bits=4),
    "bsq": partial(BSQCodebook, bits=4),
    "fsq": partial(FSQCodebook, levels=[4, 3, 2, 3]),
}
# grids of a row and of a map
GRIDS = {"row": [(1, 1), (1, 4), (1, 16)], "map": [1, 2, 4]}
PAIRS = [(e, d) for e in ENCODERS for d in DECODERS if e != "titok" or d.startswith("titok")]


def structure(name: str, encoder: str):
    if name == "multiscale":
        return partial(MultiScaleQuantizer, grids=GRIDS["row" if encoder == "titok" else "map"])
    return {"single": SingleGridQuantizer, "residual": partial(ResidualQuantizer, depth=2)}[name]


def build(encoder: str, decoder: str, codebook: str = "vq", form: str = "single", branches: int = 1) -> Tokenizer:
    branch = partial(structure(form, encoder), codebook=CODEBOOKS[codebook])
    return Tokenizer(ENCODERS[encoder](), ProductQuantizer(branch, branches, 4 * branches), DECODERS[decoder](), 16)


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check_round_trip(tokenizer: Tokenizer) -> None:
    tokenizer.eval()
    with torch.no_grad():
        tokens = tokenizer.tokenize(images())
        assert tokens.shape == (2, tokenizer.quantizer.num_branches, tokenizer.quantizer.num_tokens)
        assert_close(tokenizer.detokenize(tokens), tokenizer.reconstruct(images()), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert tokenizer.reconstruct(images()).isfinite().all()


def check_training(tokenizer: Tokenizer) -> None:
    """Perturbed training pass: the decoder's gradient reaches the encoder, and every weight has one."""
    perturbation = NearestCodePerturbation(alpha=0.5, beta=1.0, delta=3)
    rng = IndexedRng(0, torch.arange(2))

    def perturb(quantizer, z, output):
        return perturbation(quantizer, z, output, 0.5, rng)

    output = tokenizer.train()(images(), perturb, rng)
    assert output.perturbed_share == 1.0
    reconstruction = output.reconstruction.square().mean()
    # apart from the quantizer's losses, which could hide a decoder whose gradient stops at the codes
    (first,) = torch.autograd.grad(reconstruction, next(tokenizer.encoder.parameters()), retain_graph=True)
    assert first.abs().sum() > 0
    (reconstruction + sum(output.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        if parameter.requires_grad and not name.endswith(".k.bias"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def check_reload(tokenizer: Tokenizer, other: Tokenizer) -> None:
    other.load_state_dict(tokenizer.state_dict())
    assert other.fingerprint() == tokenizer.fingerprint()
    with torch.no_grad():
        assert torch.equal(other.eval().reconstruct(images()), tokenizer.eval().reconstruct(images()))


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("form", ["single", "residual", "multiscale"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("encoder", "decoder"), [("cnn", "cnn"), ("titok", "titok"), ("maskgit", "maskgit")])
def test_every_quantizer(encoder, decoder, codebook, form, branches):
    torch.manual_seed(0)
    tokenizer = build(encoder, decoder, codebook, form, branches)
    check_round_trip(tokenizer)
    check_training(tokenizer)
    check_reload(tokenizer, build(encoder, decoder, codebook, form, branches))


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_every_pair(encoder, decoder):
    torch.manual_seed(0)
    tokenizer = build(encoder, decoder)
    check_round_trip(tokenizer)
    check_training(tokenizer)
    check_reload(tokenizer, build(encoder, decoder))
    assert isinstance(tokenizer.last_layer, nn.Parameter)


@pytest.mark.parametrize("decoder", ["cnn", "maskgit"])
def test_a_row_of_tokens_does_not_fit_a_convolutional_decoder(decoder):
    with pytest.raises(ConfigError, match=r"4 pixels from the latent grid \(1, 16\)"):
        build("titok", decoder)
