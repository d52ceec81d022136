"""IBQ codebook: published values, options, diagnostics, use inside structures."""

import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.quantizers import IBQCodebook, ProductQuantizer, SingleGridQuantizer


def quantizer_of(file):
    config = file.config
    codebook = IBQCodebook(
        config["e_dim"],
        config["n_e"],
        use_entropy=config["use_entropy_loss"],
        entropy_temperature=config["entropy_temperature"],
    )
    quantizer = ProductQuantizer(lambda dim: SingleGridQuantizer(dim, lambda dim: codebook), 1, config["e_dim"])
    quantizer.load_state_dict({"branches.0.codebooks.0.embedding": file.weights["embedding.weight"]})
    return quantizer, codebook.embedding


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_quantizer", "ibq_quantizer_entropy"])
def test_published_quantizer(case):
    file = golden(case)
    config, expected = file.config, dict(file.output)
    quantizer, embedding = quantizer_of(file)
    z = file.input["z"].clone().requires_grad_()
    quantizer.bind_grid(z.shape[2:])
    out = quantizer(z)
    losses = out.losses
    # the released code weights the encoder's term by 1 and the codebook's by beta; the paper has it the other way round
    quant_loss = losses["joint"] + losses["commitment"] + config["beta"] * losses["codebook"]
    from_z_q = (out.z_q * file.input["grad_z_q"]).sum()
    total = from_z_q + config["quant_loss_weight"] * quant_loss
    terms = {"from_z_q": from_z_q, "quant_loss": quant_loss}
    if config["use_entropy_loss"]:
        terms |= {"sample_entropy": losses["entropy_sample"], "avg_entropy": -losses["entropy_batch"]}
        entropy_loss = config["sample_minimization_weight"] * losses["entropy_sample"]
        entropy_loss = entropy_loss + config["batch_maximization_weight"] * losses["entropy_batch"]
        total = total + config["entropy_loss_weight"] * entropy_loss
        assert_close(entropy_loss, expected.pop("entropy_loss"))
    terms["total"] = total
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    logits = (rows @ embedding.t()).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    assert_close(logits, expected.pop("logits"))
    assert torch.equal(out.tokens.flatten(), expected["indices"])
    assert torch.equal(quantizer.encode(z).flatten(), expected.pop("indices"))
    assert_close(out.z_q, expected.pop("z_q"))
    assert_close(quantizer.decode(out.tokens), expected.pop("codebook_entry"))
    for name in ("quant_loss", "total", "sample_entropy", "avg_entropy"):
        if name in terms:
            assert_close(terms[name], expected.pop(name), atol=1e-5, rtol=1e-5)
    for name, term in terms.items():
        for ours, side in zip(
            torch.autograd.grad(term, (z, embedding), retain_graph=True), ("z", "codebook"), strict=True
        ):
            assert_close(ours, expected.pop(f"grad_{side}/{name}"), atol=1e-5, rtol=1e-4)
    assert not expected, f"not compared: {sorted(expected)}"
    quantizer.eval()
    assert torch.equal(quantizer(z).tokens, out.tokens)


def test_losses_and_their_sides():
    codebook = IBQCodebook(6, 40).double()
    x = torch.randn(25, 6, dtype=torch.float64, requires_grad=True)
    out = codebook(x)
    assert set(out.losses) == {"joint", "commitment", "codebook", "entropy_sample", "entropy_batch"}
    error = (codebook.embedding[out.indices] - x).square().mean()
    for name in ("joint", "commitment", "codebook"):
        assert_close(out.losses[name], error.detach(), atol=1e-12)

    def sides(name):
        return torch.autograd.grad(
            out.losses[name], (x, codebook.embedding), retain_graph=True, allow_unused=True, materialize_grads=True
        )

    residual = (x - codebook.embedding[out.indices]).detach() * 2 / x.numel()
    to_x, to_codes = sides("commitment")
    torch.testing.assert_close(to_x, residual)
    assert not to_codes.any()
    to_x, to_codes = sides("codebook")
    assert not to_x.any()
    torch.testing.assert_close(to_codes, torch.zeros_like(to_codes).index_add(0, out.indices, -residual))
    assert all(side.any() for name in ("joint", "entropy_sample", "entropy_batch") for side in sides(name))
    # unlike plain straight-through, the gradient reaches codes that nothing chose
    to_codes = torch.autograd.grad(out.vectors.sum(), codebook.embedding)[0]
    unused = torch.ones(40, dtype=torch.bool)
    unused[out.indices] = False
    assert unused.any() and to_codes[unused].abs().sum(1).gt(0).all()


def test_batch_entropy_spreads_and_sample_entropy_sharpens():
    """The signs: descending on a term moves its entropy the way its name says."""
    for name, better in (("entropy_batch", torch.gt), ("entropy_sample", torch.lt)):
        torch.manual_seed(0)
        codebook = IBQCodebook(4, 12, entropy_temperature=1.0)
        x = torch.randn(64, 4)

        def entropies(codebook=codebook, x=x):
            p = (x @ codebook.embedding.detach().t()).softmax(1)
            mean = p.mean(0)
            return {
                "entropy_sample": -(p * p.log()).sum(1).mean(),
                "entropy_batch": -(mean * mean.log()).sum(),
            }

        before = entropies()[name]
        optimizer = torch.optim.SGD(codebook.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            codebook(x).losses[name].backward()
            optimizer.step()
        assert better(entropies()[name], before), name


def test_without_entropy():
    codebook = IBQCodebook(4, 9, use_entropy=False)
    assert set(codebook(torch.randn(5, 4)).losses) == {"joint", "commitment", "codebook"}


def test_neighbors_rank_vectors_by_product_and_codes_by_distance():
    codebook = IBQCodebook(4, 30, chunk_size=7)
    with torch.no_grad():
        codebook.embedding[3] *= 10  # a long code wins products far from it
    codes, x = codebook.embedding.detach(), torch.randn(50, 4)
    assert torch.equal(codebook.neighbors(x, 5), (x @ codes.t()).argsort(1, descending=True)[:, :5])
    assert torch.equal(codebook.neighbors(x, 1)[:, 0], codebook.assign(x))
    indices = torch.arange(30)
    assert torch.equal(codebook.neighbors(indices, 5), torch.cdist(codes, codes).argsort(1)[:, :5])
    assert torch.equal(codebook.neighbors(indices, 1)[:, 0], indices)
    assert not torch.equal((codes @ codes.t()).argmax(1), indices)


def test_shortened_latents_keep_tokens_and_revive_the_gradient_path():
    torch.manual_seed(0)
    plain, short = IBQCodebook(64, 500), IBQCodebook(64, 500, max_latent_rms=0.3)
    short.load_state_dict(plain.state_dict())
    x = torch.randn(40, 64) * 5
    x[:3] *= 0.01  # these are short enough
    out = short(x)
    assert torch.equal(out.indices, plain(x).indices)
    assert_close(out.latents[3:].square().mean(1).sqrt(), torch.full((37,), 0.3))
    assert torch.equal(out.latents[:3], x[:3])
    assert_close(short(out.latents).latents, out.latents)  # once is enough
    x = x[3:]
    before, after = plain.diagnostics(x), short.diagnostics(x)
    assert before["gradient_path"] < 0.3 < 0.8 < after["gradient_path"] < 1.2
    assert before["max_probability"] > 0.9 > 0.5 > after["max_probability"]
    assert after["logit_std"] == pytest.approx(0.3 * 8, rel=0.1)


def test_diagnostics_are_those_of_the_gradient():
    """`gradient_path` is the trace of d output / d latent, per dimension."""
    codebook = IBQCodebook(5, 30).double()
    x = torch.randn(70, 5, dtype=torch.float64)
    trace = torch.zeros((), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    vectors = codebook(leaf).vectors
    for i in range(5):
        trace += torch.autograd.grad(vectors[:, i].sum(), leaf, retain_graph=True)[0][:, i].sum()
    found = codebook.diagnostics(x)
    assert found["gradient_path"].item() == pytest.approx(trace.item() / (70 * 5))
    logits = x @ codebook.embedding.detach().t()
    assert found["max_probability"].item() == pytest.approx(logits.softmax(1).amax(1).mean().item())
    assert found["logit_std"].item() == pytest.approx(logits.std(1, correction=0).mean().item())


def test_works_on_bfloat16_under_autocast_with_float32_results():
    codebook = IBQCodebook(8, 31)
    x = torch.randn(64, 8).bfloat16()
    expected = codebook(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = codebook(x)
    assert torch.equal(out.indices, expected.indices)
    assert out.vectors.dtype == out.losses["entropy_sample"].dtype == torch.float32
    assert torch.equal(out.losses["entropy_sample"], expected.losses["entropy_sample"])


def test_any_chunk_size_gives_the_same():
    x = torch.randn(50, 8, dtype=torch.float64)
    reference = IBQCodebook(8, 100).double()
    for chunk_size in (1, 7, 100, 5000):
        codebook = IBQCodebook(8, 100, chunk_size=chunk_size).double()
        codebook.load_state_dict(reference.state_dict())
        assert torch.equal(codebook.assign(x), reference.assign(x))
        out, expected = codebook(x), reference(x)
        assert torch.equal(out.indices, expected.indices)
        torch.testing.assert_close(out.losses, expected.losses)


def test_initial_codes_are_standard_normal_and_exist_on_meta():
    codes = IBQCodebook(64, 2000).embedding
    assert abs(codes.mean().item()) < 0.02 and codes.std().item() == pytest.approx(1, abs=0.02)
    with torch.device("meta"):
        assert IBQCodebook(256, 262144).embedding.is_meta


def test_learns_to_use_its_codes():
    """A few steps on clustered latents: the quantisation error falls far below that of the first codes."""
    torch.manual_seed(0)
    centres = torch.randn(16, 8) * 2
    codebook = IBQCodebook(8, 32, entropy_temperature=0.1)
    optimizer = torch.optim.Adam(codebook.parameters(), lr=0.05)

    def batch():
        return centres[torch.randint(16, (128,))] + 0.1 * torch.randn(128, 8)

    errors = []
    for _ in range(150):
        losses = codebook(batch()).losses
        errors.append(losses["codebook"].item())
        optimizer.zero_grad()
        (losses["joint"] + losses["codebook"] + 0.05 * (losses["entropy_sample"] + losses["entropy_batch"])).backward()
        optimizer.step()
    assert errors[-1] < 0.1 * errors[0]
    with torch.no_grad():
        assert F.mse_loss(codebook.lookup(codebook.assign(centres)), centres) < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"entropy_temperature": 0.0}, r"entropy_temperature=0\.0"),
        ({"max_latent_rms": -1.0}, r"max_latent_rms=-1\.0"),
        ({"entropy_over": "world"}, "entropy_over='world'"),
    ],
)
def test_refuses_impossible_values(change, key):
    with pytest.raises(ConfigError, match=rf"quantizer\.branch\.codebook\.{key}"):
        IBQCodebook(**{"dim": 4, "codebook_size": 8, **change})
    with pytest.raises(ConfigError, match=r"quantizer\.dim"):
        IBQCodebook(0, 8)
