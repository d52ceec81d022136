"""Published multi-scale quantizers: values, losses, gradients, inputs of next-scale generators."""

from functools import partial

import pytest
import torch
from torch import Tensor

from golden_cases import Golden, assert_close, golden
from published_usage import PublishedUsage, assert_usage
from tessera.quantizers import BSQCodebook, LFQCodebook, MultiScaleQuantizer, ProductQuantizer, VQCodebook
from tessera.quantizers.multiscale import rows_of
from tessera.quantizers.phi import phi_table
from tessera.zoo.keys import (
    XQGAN_BINARY_IGNORED,
    XQGAN_IGNORED,
    XQGAN_MULTI_SCALE,
    XQGAN_SINGLE_GRID,
    load_strictly,
    rename,
)

RULES = (*XQGAN_MULTI_SCALE, *XQGAN_SINGLE_GRID)
IGNORED = (*XQGAN_BINARY_IGNORED, *XQGAN_IGNORED)
VQ_CASES = ["xqgan_q_msvq", "xqgan_q_msvq_l2", "xqgan_q_msvq_r10"]
BINARY_CASES = ["xqgan_q_mslfq", "xqgan_q_mslfq_hard"]


def quantizer_keys(weights: dict[str, Tensor], prefix: str = "quantizer.") -> dict[str, Tensor]:
    """Published quantizer weights under our names, without `prefix`."""
    return {key.removeprefix(prefix): value for key, value in rename(weights, RULES, IGNORED).items()}


def build(config: dict) -> ProductQuantizer:
    if config["class"] == "LFQ":
        codebook = partial(
            BSQCodebook if config["using_znorm"] else LFQCodebook,
            bits=config["Cvae"],
            entropy="soft" if config.get("soft_entropy", True) else "hard",
        )
        assert 2 ** config["Cvae"] == config["codebook_size"]
    else:
        search = "cosine" if config["using_znorm"] else "euclidean"
        codebook = partial(VQCodebook, codebook_size=config["vocab_size"], l2_normalize=False, search=search)
    branch = partial(
        MultiScaleQuantizer,
        codebook=codebook,
        grids=config["v_patch_nums"],
        phi_convs=config["share_quant_resi"],
        phi_ratio=abs(config.get("quant_resi", 0.5)),
        gain=config.get("scale", 1.0),
    )
    quantizer = ProductQuantizer(branch, branches=1, dim=config["Cvae"])
    quantizer.bind_grid((config["v_patch_nums"][-1],) * 2)
    return quantizer


def load(file: Golden) -> ProductQuantizer:
    quantizer = build(file.config)
    load_strictly(quantizer, quantizer_keys({f"quantize.{k}": v for k, v in file.weights.items()}), "golden")
    return quantizer


def steps(file: Golden) -> list[str]:
    return sorted(name.removeprefix("z_") for name in file.input if name.startswith("z_"))


def depths(file: Golden, step: str) -> Tensor | None:
    """Scales kept per image: the first step runs without dropout, later ones drop in their first images only."""
    if step == "0" or "dropout" not in file.input:
        return None
    batch, scales = len(file.input["z_0"]), len(file.config["v_patch_nums"])
    kept = torch.full((batch,), scales)
    dropped = int(batch * file.config.get("codebook_drop", 0.0))
    kept[:dropped] = file.input["dropout"][:dropped].clamp(max=scales)
    return kept


def compare_step(file: Golden, quantizer: ProductQuantizer, step: str, z: Tensor, total: Tensor) -> None:
    """Gradients of the recorded objective."""
    parameters = {f"quantize.{k}": v for k, v in file.weights.items()}
    named = dict(quantizer.named_parameters())
    names = {old: next(iter(quantizer_keys({old: torch.empty(0)})), None) for old in parameters}
    wanted = {old.removeprefix("quantize."): named[new] for old, new in names.items() if new in named}
    recorded = {name.split("grad/")[1] for name in file.output if name.startswith(f"s{step}_grad/")}
    assert recorded == set(wanted)
    trained = {name: parameter for name, parameter in wanted.items() if parameter.requires_grad}
    found = torch.autograd.grad(total, [z, *trained.values()], allow_unused=True)
    assert_close(found[0], file.output[f"s{step}_grad_z"], atol=1e-5, rtol=1e-4)
    grads = dict(zip(trained, found[1:], strict=True))
    for name, parameter in wanted.items():
        grad = torch.zeros_like(parameter) if grads.get(name) is None else grads[name]
        assert_close(grad, file.output[f"s{step}_grad/{name}"], atol=1e-5, rtol=1e-4)


def compare_usage(file: Golden, usage: PublishedUsage, step: str, tokens: Tensor) -> None:
    grids = [(side, side) for side in file.config["v_patch_nums"]]
    hits, used = usage.update(tokens, grids)
    assert_close(hits, file.output[f"s{step}_ema_vocab_hit_SV"])
    assert_usage(used, file.output[f"s{step}_usages"], hits, len(tokens) * grids[-1][0] ** 2)


def compare_tokens(file: Golden, quantizer: ProductQuantizer) -> None:
    quantizer.eval()
    z = file.input["z_0"]
    sides = file.config["v_patch_nums"]
    tokens = quantizer.encode(z)
    assert torch.equal(quantizer(z).tokens, tokens)
    for scale, part in enumerate(tokens[:, 0].split([side**2 for side in sides], dim=1)):
        assert torch.equal(part, file.output[f"idx_s{scale}"]), scale
        partial_sum = quantizer.partial_decode(tokens, scale + 1)
        assert_close(partial_sum, file.output[f"fhat_s{scale}"])
        if f"embed_to_fhat_s{scale}" in file.output:
            assert_close(partial_sum, file.output[f"embed_to_fhat_s{scale}"])
    assert_close(quantizer.decode(tokens), file.output[f"fhat_s{len(sides) - 1}"])
    if "var_input" in file.output:
        assert_close(quantizer.next_scale_input(tokens), file.output["var_input"])
        latent, start = torch.zeros_like(z), 0
        for scale, side in enumerate(sides):
            vectors = quantizer.embed(tokens[:, :, start : start + side**2], scale)
            before = latent.clone()
            new, following = quantizer.advance(latent, vectors, scale)
            assert torch.equal(latent, before), "the caller's sum must not change"
            start += side**2
            if following is not None:
                first = start - sides[0] ** 2
                assert_close(following, file.output["var_input"][:, first : first + following.shape[1]])
            latent = new
        assert_close(latent, file.output[f"fhat_s{len(sides) - 1}"])


@pytest.mark.golden
@pytest.mark.parametrize("case", VQ_CASES)
def test_published_vector_quantizer(case):
    file = golden(case)
    quantizer, scales = load(file), len(file.config["v_patch_nums"])
    usage = PublishedUsage(file.weights["ema_vocab_hit_SV"])
    for step in steps(file):
        z = file.input[f"z_{step}"].clone().requires_grad_()
        out = quantizer.branches[0](z, depths(file, step))
        assert_close(out.z_q, file.output[f"s{step}_quant"])
        # the published commitment is a sum over scales, not a mean as everything else
        commitment = out.losses["commitment"] * file.config["beta"] * scales
        assert_close(out.losses["codebook"], file.output[f"s{step}_vq_loss"])
        assert_close(commitment, file.output[f"s{step}_commit_loss"])
        assert file.output[f"s{step}_entropy_loss"] == 0
        compare_usage(file, usage, step, out.tokens[:, 0])
        total = (out.z_q * file.input["G"]).sum() + out.losses["codebook"] + commitment
        compare_step(file, quantizer, step, z, total)
    out = quantizer.eval()(file.input["z_0"])
    assert_close(out.z_q, file.output["eval_forward_quant"])
    assert_close(out.losses["codebook"], file.output["eval_forward_vq"])
    assert_close(out.losses["commitment"] * file.config["beta"] * scales, file.output["eval_forward_commit"])
    compare_tokens(file, quantizer)


def published_entropy(file: Golden, branch: MultiScaleQuantizer, out) -> Tensor:
    """The recorded entropy term, from our entropies.

    The published soft form indexes the batch with its 0/1 mask as integers, so it sees images 0 and 1 only; the hard
    form divides its mean over kept images by their share once more.
    """
    scales, batch = len(branch.grids), len(out.latent)
    kept = torch.full((batch,), scales) if out.depths is None else out.depths
    terms = []
    for scale in range(scales):
        before = branch.decode(out.tokens[:, 0], kept.clamp(max=scale)).detach()
        mask = kept > scale
        residual = out.latent - before
        gain = file.config.get("scale", 1.0) ** scale
        if file.config.get("soft_entropy", True):
            found = branch.codebooks[0].penalties(rows_of(residual[mask.long()]), None, gain)
        else:
            sites = branch.grids[-1][0] * branch.grids[-1][1]
            found = branch.codebooks[0].penalties(rows_of(residual), mask.repeat_interleave(sites), gain)
        terms.append((found["entropy_sample"] + found["entropy_batch"]) / mask.float().mean())
    return torch.stack(terms).mean() * file.config["entropy_weight"]


@pytest.mark.golden
@pytest.mark.parametrize("case", BINARY_CASES)
def test_published_binary_quantizer(case):
    file = golden(case)
    quantizer = load(file)
    branch = quantizer.branches[0]
    value = branch.codebooks[0].value
    expected = torch.tensor([value * file.config.get("scale", 1.0) ** k for k in range(len(branch.grids))])
    assert_close(expected, file.weights["scaler"])
    usage = PublishedUsage(file.weights["ema_vocab_hit_SV"])
    for step in steps(file):
        z = file.input[f"z_{step}"].clone().requires_grad_()
        out = branch(z, depths(file, step))
        assert_close(out.z_q, file.output[f"s{step}_quant"])
        commitment = out.losses["commitment"] * file.config["beta"]
        assert_close(out.losses["codebook"], file.output[f"s{step}_vq_loss"])
        assert_close(commitment, file.output[f"s{step}_commit_loss"])
        compare_usage(file, usage, step, out.tokens[:, 0])
        entropy = published_entropy(file, branch, out)
        assert_close(entropy, file.output[f"s{step}_entropy_loss"])
        if out.depths is None and not file.config.get("soft_entropy", True):
            # nobody dropped: the published hard form is right, and ours as it comes
            ours = out.losses["entropy_sample"] + out.losses["entropy_batch"]
            assert_close(ours * file.config["entropy_weight"], file.output[f"s{step}_entropy_loss"])
        total = (out.z_q * file.input["G"]).sum() + out.losses["codebook"] + commitment + entropy
        compare_step(file, quantizer, step, z, total)
    compare_tokens(file, quantizer)


def of_var(config: dict, branches: int, channels: int, codebook_size: int) -> ProductQuantizer:
    """The quantizer of a VAR golden file, with `channels` per branch."""
    search = "cosine" if config["using_znorm"] else "euclidean"
    branch = partial(
        MultiScaleQuantizer,
        codebook=partial(VQCodebook, codebook_size=codebook_size, l2_normalize=False, search=search),
        grids=config["v_patch_nums"],
        phi_convs=config["share_quant_resi"],
        phi_ratio=abs(config["quant_resi"]),
    )
    return ProductQuantizer(branch, branches, branches * channels).eval()


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_pq2_tokenize"])
def test_published_product_of_two(case):
    """From the recorded latent on; the ViT before it has its own tests."""
    file = golden(case)
    config = file.config
    branches, size = config["product_quant"], config["codebook_embed_dim"]
    quantizer = of_var(config, branches, size, config["codebook_size"])
    weights = {k.removeprefix("vae_local."): v for k, v in file.weights.items()}
    load_strictly(quantizer, quantizer_keys({k: v for k, v in weights.items() if k.startswith("quantize")}), "golden")
    side = config["v_patch_nums"][-1]
    # (B, Cb, P n n, 1) with the branches one after the other -> (B, P Cb, n, n)
    encoded = file.output["encode"]
    z = encoded.view(len(encoded), size, branches, side, side).transpose(1, 2).flatten(1, 2)
    tokens = quantizer.encode(z)
    sizes = [n**2 for n in config["v_patch_nums"]]
    z_q = quantizer.decode(tokens)
    for p in range(branches):
        for scale, part in enumerate(tokens[:, p].split(sizes, dim=1)):
            assert torch.equal(part, file.output[f"idx_p{p}_{scale}"])
        assert_close(z_q[:, p * size : (p + 1) * size], file.output[f"f_hat_p{p}"], atol=2e-5)
    assert_close(quantizer.next_scale_input(tokens), file.output["var_input"], atol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_p1_vqvae"])
def test_published_quantizer_of_var(case):
    """From the recorded latent on: the Euclidean search of VAR's own tokenizer."""
    file = golden(case)
    config = file.config
    quantizer = of_var(config, 1, config["z_channels"], config["vocab_size"])
    weights = {key: value for key, value in file.weights.items() if key.startswith("quantize.")}
    load_strictly(quantizer, quantizer_keys(weights), "golden")
    z = file.output["f"]
    tokens = quantizer.encode(z)
    sizes = [n**2 for n in config["v_patch_nums"]]
    latent = torch.zeros_like(z)
    for scale, part in enumerate(tokens.split(sizes, dim=2)):
        assert torch.equal(part[:, 0], file.output[f"idx_{scale}"])
        assert_close(quantizer.partial_decode(tokens, scale + 1), file.output[f"f_hat_{scale}"], atol=2e-5)
        latent, following = quantizer.advance(latent, quantizer.embed(part, scale), scale)
        recorded = file.output[f"next_map_{scale}"]
        if following is None:
            assert_close(latent, recorded, atol=2e-5)
        else:
            assert_close(following, recorded.flatten(2).transpose(1, 2), atol=2e-5)
    assert_close(quantizer.next_scale_input(tokens), file.output["var_input"], atol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_schedules"])
def test_published_choice_of_convolutions(case):
    tables = {name.split("/")[1]: value for name, value in golden(case).output.items() if "phi_index" in name}
    assert tables
    for name, table in tables.items():
        scales, convs = (int(number) for number in name.removeprefix("S").split("_K"))
        assert phi_table(scales, convs) == table.tolist(), name
