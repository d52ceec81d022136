"""Codebooks x structures x branches under every backbone, and backbones in all pairs that fit."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from forked import run_forked
from golden_cases import assert_close
from tessera.backbones import (
    CNNDecoder,
    CNNEncoder,
    MaskGITDecoder,
    MaskGITEncoder,
    TiTokDecoder,
    TiTokEncoder,
    TiTokProxyDecoder,
    ViTDecoder,
    ViTEncoder,
)
from tessera.distributed import all_reduce_mean
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
    "position_std": 0.5,
}

# called with the number of branches
ENCODERS = {
    "cnn": lambda _: CNNEncoder(**CNN),
    "maskgit": lambda _: MaskGITEncoder(**CNN),
    "titok": lambda _: TiTokEncoder(**ROW),
    "titok_map": lambda _: TiTokEncoder(**ROW, grid=(4, 4)),
    "vit": lambda branches: ViTEncoder(**VIT, groups=branches),
}
DECODERS = {
    "cnn": lambda: CNNDecoder(**CNN),
    "maskgit": lambda: MaskGITDecoder(**CNN),
    "titok": lambda: TiTokDecoder(**ROW),
    "vit": lambda: ViTDecoder(**VIT),
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
FORMS = ("single", "residual", "multiscale")
# grids of a row and of a map
GRIDS = {"row": [(1, 1), (1, 4), (1, 16)], "map": [1, 2, 4]}
PAIRS = [(e, d) for e in ENCODERS for d in DECODERS if e != "titok" or d.startswith("titok")]


def structure(name: str, encoder: str):
    if name == "multiscale":
        return partial(MultiScaleQuantizer, grids=GRIDS["row" if encoder == "titok" else "map"])
    return {"single": SingleGridQuantizer, "residual": partial(ResidualQuantizer, depth=2)}[name]


def build(encoder: str, decoder: str, codebook: str = "vq", form: str = "single", branches: int = 1) -> Tokenizer:
    branch = partial(structure(form, encoder), codebook=CODEBOOKS[codebook])
    return Tokenizer(
        ENCODERS[encoder](branches), ProductQuantizer(branch, branches, 4 * branches), DECODERS[decoder](), 16
    )


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


def perturbed(tokenizer: Tokenizer, index: torch.Tensor, loop: str, beta: float = 1.0):
    """Training pass of some of four images, perturbed by draws of their own."""
    perturbation, rng = NearestCodePerturbation(alpha=0.7, beta=beta, delta=5, loop=loop), IndexedRng(0, index)

    def perturb(quantizer, z, output):
        return perturbation(quantizer, z, output, 0.0, rng)

    return tokenizer.train()(images(4)[index], perturb, rng)


def check_training(tokenizer: Tokenizer, loop: str = "open") -> None:
    """Perturbed training pass: the decoder's gradient reaches the encoder, and every weight has one."""
    tokenizer.zero_grad()
    output = perturbed(tokenizer, torch.arange(2), loop)
    assert output.perturbation["images"] == 1.0 and not torch.equal(output.z_q, output.z_q_clean)
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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("backbone", ["cnn", "vit", "titok", "maskgit"])
def test_every_quantizer(backbone, codebook, form, branches):
    torch.manual_seed(0)
    tokenizer = build(backbone, backbone, codebook, form, branches)
    check_round_trip(tokenizer)
    for loop in ("open",) if form == "single" else ("open", "closed"):
        check_training(tokenizer, loop)
    check_reload(tokenizer, build(backbone, backbone, codebook, form, branches))


def steps_of_a_share(rank: int, world: int, backbone: str) -> dict[str, dict[str, list[float]]]:
    """Losses and gradients, averaged over processes, of this one's share of a batch, for each combination."""
    found = {}
    for codebook, form in itertools.product(CODEBOOKS, FORMS):
        torch.manual_seed(0)
        tokenizer = build(backbone, backbone, codebook, form, 2)
        output = perturbed(tokenizer, torch.arange(4).chunk(world)[rank], "open", beta=0.5)
        # entropies over a batch are those of a process: tests/quantizers/test_every_combination.py
        losses = {name: value for name, value in output.losses.items() if not name.startswith("entropy")}
        losses["reconstruction"] = output.reconstruction.square().mean()
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
        values = {**losses, **gradients, "perturbed": output.perturbation["tokens_changed"]}
        found[f"{codebook}/{form}"] = {name: all_reduce_mean(value).tolist() for name, value in values.items()}
    return found


@pytest.mark.parametrize("backbone", ["cnn", "vit", "titok"])
def test_two_processes_train_as_one_with_the_joint_batch(backbone):
    first, second = run_forked(steps_of_a_share, backbone)
    alone = steps_of_a_share(0, 1, backbone)
    assert first == second and first.keys() == alone.keys()
    for name, values in first.items():
        assert values.keys() == alone[name].keys() and 0 < alone[name]["perturbed"] < 1
        for key, value in values.items():
            assert_close(torch.tensor(value), torch.tensor(alone[name][key]), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_every_pair(encoder, decoder):
    torch.manual_seed(0)
    tokenizer = build(encoder, decoder)
    check_round_trip(tokenizer)
    check_training(tokenizer)
    check_reload(tokenizer, build(encoder, decoder))
    assert isinstance(tokenizer.last_layer, nn.Parameter)


def test_a_row_of_tokens_does_not_fit_a_vit_decoder_of_a_map():
    with pytest.raises(ConfigError, match=r"\(1, 16\).*backbone\.decoder\.grid"):
        build("titok", "vit")


@pytest.mark.parametrize("decoder", ["cnn", "maskgit"])
def test_a_row_of_tokens_does_not_fit_a_convolutional_decoder(decoder):
    with pytest.raises(ConfigError, match=r"4 pixels from the latent grid \(1, 16\)"):
        build("titok", decoder)
