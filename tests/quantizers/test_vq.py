"""VQ codebook: values, losses, gradients."""

import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close, golden
from published_usage import PublishedUsage, assert_usage
from tessera.errors import ConfigError
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_quantises_to_the_nearest_code(l2_normalize):
    codebook = VQCodebook(4, 19, l2_normalize)
    x = torch.randn(30, 4) * 0.1
    codes = F.normalize(codebook.embedding, dim=1) if l2_normalize else codebook.embedding
    latents = F.normalize(x, dim=1) if l2_normalize else x
    expected = torch.cdist(latents, codes).argmin(1)
    out = codebook(x)
    assert torch.equal(out.indices, expected)
    assert torch.equal(codebook.assign(x), expected)
    assert_close(out.vectors, codes[expected].detach())
    assert_close(codebook.lookup(expected), codes[expected].detach())
    error = (codes[expected] - latents).square().mean()
    assert_close(out.losses["codebook"], error.detach())
    assert_close(out.losses["commitment"], error.detach())


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_each_loss_moves_its_own_side_only(l2_normalize):
    codebook = VQCodebook(4, 7, l2_normalize)
    x = torch.randn(12, 4, requires_grad=True)
    out = codebook(x)
    grad_x, grad_codes = torch.autograd.grad(
        out.losses["codebook"], (x, codebook.embedding), allow_unused=True, retain_graph=True
    )
    assert grad_x is None and grad_codes.abs().sum() > 0
    grad_x, grad_codes = torch.autograd.grad(
        out.losses["commitment"], (x, codebook.embedding), allow_unused=True, retain_graph=True
    )
    assert grad_x.abs().sum() > 0 and grad_codes is None
    grad_x, grad_codes = torch.autograd.grad(out.vectors.sum(), (x, codebook.embedding), allow_unused=True)
    assert grad_x.abs().sum() > 0 and grad_codes is None
    if not l2_normalize:
        assert torch.equal(grad_x, torch.ones_like(x))


def test_initial_codes():
    plain, unit = VQCodebook(3, 50, l2_normalize=False), VQCodebook(3, 50)
    assert plain.embedding.abs().max() <= 1 / 50
    assert plain.embedding.abs().max() > 0.5 / 50
    assert_close(unit.embedding.norm(dim=1), torch.ones(50))


def test_lookup_renormalises_after_an_update():
    codebook = VQCodebook(3, 5)
    with torch.no_grad():
        codebook.embedding.mul_(3.0)
    assert_close(codebook.lookup(torch.arange(5)).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_neighbors_of_latents_and_of_codes(l2_normalize):
    codebook = VQCodebook(4, 23, l2_normalize)
    x = torch.randn(40, 4)
    codes = codebook.lookup(torch.arange(23)).detach()
    latents = F.normalize(x, dim=1) if l2_normalize else x
    assert torch.equal(codebook.neighbors(x, 6), torch.cdist(latents, codes).argsort(1)[:, :6])
    assert torch.equal(codebook.neighbors(x, 1)[:, 0], codebook.assign(x))
    indices = codebook.assign(x)
    of_codes = codebook.neighbors(indices, 6)
    assert torch.equal(of_codes, torch.cdist(codes, codes).argsort(1)[indices, :6])
    assert torch.equal(of_codes[:, 0], indices)


def test_works_on_bfloat16_under_autocast_with_float32_results():
    codebook = VQCodebook(8, 31)
    x = torch.randn(64, 8).bfloat16()
    expected = codebook(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = codebook(x)
    assert torch.equal(out.indices, expected.indices)
    assert out.vectors.dtype == out.losses["commitment"].dtype == torch.float32
    assert torch.equal(out.vectors, expected.vectors)


def test_cosine_search_returns_the_codes_as_they_are():
    codebook = VQCodebook(4, 23, l2_normalize=False, search="cosine")
    with torch.no_grad():
        codebook.embedding.mul_(torch.rand(23, 1) * 3 + 0.1)
    x = torch.randn(40, 4)
    expected = (F.normalize(x, dim=1) @ F.normalize(codebook.embedding, dim=1).t()).argmax(1)
    out = codebook(x)
    assert torch.equal(out.indices, expected)
    assert torch.equal(codebook.assign(5 * x), expected)
    assert not torch.equal(torch.cdist(x, codebook.embedding).argmin(1), expected)
    assert_close(out.vectors, codebook.embedding[expected].detach())
    assert torch.equal(codebook.lookup(expected), codebook.embedding[expected])
    assert torch.equal(out.latents, x)
    assert torch.equal(codebook.neighbors(x, 3)[:, 0], expected)
    assert torch.equal(codebook.neighbors(expected, 3)[:, 0], expected)


def test_mixture_of_codes():
    weights = torch.rand(5, 7).softmax(1)
    plain, unit = VQCodebook(3, 7, l2_normalize=False), VQCodebook(3, 7)
    assert_close(plain.mix(weights), weights @ plain.embedding)
    assert_close(unit.mix(weights), F.normalize(weights @ unit.embedding, dim=1))
    assert_close(unit.mix(torch.eye(7)), unit.lookup(torch.arange(7)))


@pytest.mark.parametrize("option", [{"search": "l2"}, {"update": "sgd"}])
def test_refuses_unknown_choices(option):
    (name, value), *_ = option.items()
    with pytest.raises(ConfigError, match=rf"quantizer\.branch\.codebook\.{name}='{value}'"):
        VQCodebook(4, 8, **option)


def test_settings_that_decide_tokens_are_in_the_text_that_is_hashed():
    texts = {
        VQCodebook(4, 8, **options).extra_repr()
        for options in ({}, {"l2_normalize": False}, {"l2_normalize": False, "search": "cosine"})
    }
    assert len(texts) == 3


@pytest.mark.parametrize("name", ["codebook_size", "chunk_size"])
def test_refuses_sizes_below_one(name):
    with pytest.raises(ConfigError, match=rf"quantizer\.branch\.codebook\.{name}=0"):
        VQCodebook(**{"dim": 4, "codebook_size": 8, name: 0})
    with pytest.raises(ConfigError, match=r"quantizer\.dim"):
        VQCodebook(0, 8)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_q_vq", "xqgan_q_vq_l2"])
def test_published_quantizer(case):
    file = golden(case)
    dim, size = file.config["z_channels"], file.config["vocab_size"]
    assert file.weights["embedding.weight"].shape == (size, dim)
    quantizer = ProductQuantizer(
        branch=lambda dim: SingleGridQuantizer(
            dim, lambda dim: VQCodebook(dim, size, l2_normalize=file.config["codebook_norm"])
        ),
        branches=1,
        dim=dim,
    )
    quantizer.load_state_dict({"branches.0.codebooks.0.embedding": file.weights["embedding.weight"]})
    embedding = quantizer.branches[0].codebooks[0].embedding
    steps = sorted(name.removeprefix("z_") for name in file.input if name.startswith("z_"))
    assert steps
    usage = PublishedUsage(file.weights["ema_vocab_hit_SV"])
    for step in steps:
        z = file.input[f"z_{step}"].clone().requires_grad_()
        quantizer.bind_grid(z.shape[2:])
        out = quantizer(z)
        assert_close(out.z_q, file.output[f"s{step}_quant"])
        codebook_loss = out.losses["codebook"]
        commitment_loss = file.config["beta"] * out.losses["commitment"]
        assert_close(codebook_loss, file.output[f"s{step}_vq_loss"])
        assert_close(commitment_loss, file.output[f"s{step}_commit_loss"])
        assert file.output[f"s{step}_entropy_loss"] == 0
        hits, used = usage.update(out.tokens[:, 0], [z.shape[2:]])
        assert_close(hits, file.output[f"s{step}_ema_vocab_hit_SV"])
        assert_usage(used, file.output[f"s{step}_usages"], hits, out.tokens.numel())
        total = (out.z_q * file.input["G"]).sum() + codebook_loss + commitment_loss
        grad_z, grad_embedding = torch.autograd.grad(total, (z, embedding))
        assert_close(grad_z, file.output[f"s{step}_grad_z"], atol=1e-5, rtol=1e-4)
        assert_close(grad_embedding, file.output[f"s{step}_grad/embedding.weight"], atol=1e-5, rtol=1e-4)
    quantizer.eval()
    z = file.input["z_0"]
    tokens = quantizer.encode(z)
    assert tokens.shape == (z.shape[0], 1, z.shape[2] * z.shape[3])
    assert torch.equal(tokens.flatten(), file.output["idx_s0"])
    assert torch.equal(quantizer(z).tokens, tokens)
    assert_close(quantizer.decode(tokens), file.output["fhat_s0"])
