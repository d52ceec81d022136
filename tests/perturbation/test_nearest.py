"""Nearest-code perturbation: published numbers, properties, refusals."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.perturbation import (
    LinearAnneal,
    NearestCodePerturbation,
    perturb_tokens,
    ranks,
    straight_through,
)
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import GeneratorRng, IndexedRng, SampleRng

SIZE, GRID, DIM = 24, (3, 4), 8


def build(branches: int = 1, l2_normalize: bool = True, codebook_size: int = SIZE) -> ProductQuantizer:
    codebook = partial(VQCodebook, codebook_size=codebook_size, l2_normalize=l2_normalize)
    branch = partial(SingleGridQuantizer, codebook=codebook)
    quantizer = ProductQuantizer(branch, branches=branches, dim=DIM)
    quantizer.bind_grid(GRID)
    return quantizer


def batch(quantizer: ProductQuantizer, size: int = 6):
    z = torch.randn(size, DIM, *GRID, requires_grad=True)
    return z, quantizer(z)


def rng(size: int = 6, seed: int = 0) -> IndexedRng:
    return IndexedRng(seed, torch.arange(size))


class Fixed:
    """Draws given in advance, by stream."""

    def __init__(self, **draws: torch.Tensor):
        self.draws = draws

    def uniform(self, stream: str, *shape: int) -> torch.Tensor:
        return self.draws[stream.split("/")[1]]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("l2_normalize", [True, False])
@pytest.mark.parametrize("neighbors_of", ["latent", "code"])
def test_replaces_tokens_by_neighbours_in_selected_images(branches, l2_normalize, neighbors_of):
    quantizer = build(branches, l2_normalize)
    z, clean = batch(quantizer)
    strategy = NearestCodePerturbation(0.7, 0.5, 5, neighbors_of=neighbors_of)
    output, rates = strategy(quantizer, z, clean, progress=0.0, rng=rng())
    selected = rng().uniform("perturb/image") < 0.5
    assert 0 < selected.sum() < 6, "the seed must select some images and not all"
    assert rates["images"].item() == selected.float().mean().item()
    changed = output.tokens != clean.tokens
    assert not changed[~selected].any()
    assert changed[selected].flatten(1).any(1).all()
    assert torch.equal(output.z_q[~selected], clean.z_q[~selected])
    neighbors = quantizer.neighbors(z.detach() if neighbors_of == "latent" else clean.tokens, 5)
    assert (output.tokens[..., None] == neighbors).any(-1)[changed].all()
    hit = (rng().uniform("perturb/site", *clean.tokens.shape[1:]) < 0.7) & selected[:, None, None]
    assert not changed[~hit].any()
    assert_close(output.z_q, quantizer.decode(output.tokens), atol=1e-6)
    assert output.losses is clean.losses


@pytest.mark.parametrize("setting", [(0.0, 1.0, 5), (1.0, 0.0, 5), (1.0, 1.0, 1)])
def test_off_means_the_same_object_and_no_work(setting, monkeypatch):
    quantizer = build()
    z, clean = batch(quantizer)
    for name in ("neighbors", "decode"):
        monkeypatch.setattr(quantizer, name, lambda *_: pytest.fail("work was done although perturbation is off"))
    untouched = Fixed()  # any draw would be a KeyError
    output, rates = NearestCodePerturbation(*setting)(quantizer, z, clean, progress=0.0, rng=untouched)
    assert output is clean and not any(rates.values())


def test_annealed_to_zero_is_off():
    quantizer = build()
    z, clean = batch(quantizer)
    strategy = NearestCodePerturbation(1.0, 1.0, 5, LinearAnneal(0.2, 0.6, 0.0))
    assert strategy(quantizer, z, clean, progress=0.6, rng=rng())[0] is clean
    assert strategy(quantizer, z, clean, progress=0.4, rng=rng())[0] is not clean


def test_no_selected_image_leaves_the_output():
    quantizer = build()
    z, clean = batch(quantizer)
    draws = Fixed(image=torch.full((6,), 0.9), site=torch.zeros(6, 1, 12), rank=torch.zeros(6, 1, 12))
    output, rates = NearestCodePerturbation(1.0, 0.5, 5)(quantizer, z, clean, progress=0.0, rng=draws)
    assert output is clean and not any(rates.values())


def test_only_selected_images_are_searched(monkeypatch):
    quantizer = build()
    z, clean = batch(quantizer)
    searched = []
    original = quantizer.neighbors
    monkeypatch.setattr(quantizer, "neighbors", lambda query, k: searched.append(len(query)) or original(query, k))
    draws = Fixed(
        image=torch.tensor([0.9, 0.1, 0.9, 0.9, 0.2, 0.9]),
        site=torch.zeros(6, 1, 12),
        rank=torch.full((6, 1, 12), 0.5),
    )
    output, rates = NearestCodePerturbation(1.0, 0.5, 5)(quantizer, z, clean, progress=0.0, rng=draws)
    assert searched == [2]
    assert rates["images"].item() == pytest.approx(2 / 6)
    # every site re-drawn at rank floor(0.5 * 5) = 2
    assert torch.equal(output.tokens[1], original(z[1:2].detach(), 5)[0, ..., 2])


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_gradient_is_the_straight_through_one(l2_normalize):
    quantizer = build(l2_normalize=l2_normalize)
    z, clean = batch(quantizer)
    output, _ = NearestCodePerturbation(1.0, 0.5, 5)(quantizer, z, clean, progress=0.0, rng=rng())
    cotangent = torch.randn_like(output.z_q)
    embedding = quantizer.branches[0].codebooks[0].embedding
    grad, codes = torch.autograd.grad((output.z_q * cotangent).sum(), (z, embedding), allow_unused=True)
    assert codes is None, "no gradient may reach the codebook"
    expected = cotangent
    if l2_normalize:
        (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * cotangent).sum(), z)
    assert_close(grad, expected)


def test_vq_losses_do_not_depend_on_the_perturbation():
    quantizer = build()
    z, clean = batch(quantizer)
    for alpha, beta, delta in [(1.0, 1.0, SIZE), (0.3, 0.5, 2)]:
        output, _ = NearestCodePerturbation(alpha, beta, delta)(quantizer, z, clean, progress=0.0, rng=rng())
        assert output.losses is clean.losses


def test_draws_belong_to_samples():
    """The same sample gets the same perturbation alone, in another order, or in another batch."""
    quantizer = build(2)
    z, clean = batch(quantizer)
    strategy = NearestCodePerturbation(0.6, 0.7, 5)
    whole, _ = strategy(quantizer, z, clean, progress=0.0, rng=rng())
    order = torch.tensor([4, 1, 5])
    part, _ = strategy(quantizer, z[order], quantizer(z[order]), progress=0.0, rng=IndexedRng(0, order))
    assert torch.equal(part.tokens, whole.tokens[order])
    assert_close(part.z_q, whole.z_q[order])
    other, _ = strategy(quantizer, z, clean, progress=0.0, rng=rng(seed=1))
    assert not torch.equal(other.tokens, whole.tokens)


@pytest.mark.parametrize("given", [None, "torch"])
def test_accepts_a_torch_generator_or_nothing(given):
    quantizer = build()
    z, clean = batch(quantizer)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        source = None if given is None else torch.Generator().manual_seed(3)
        return NearestCodePerturbation(1.0, 1.0, 8)(quantizer, z, clean, progress=0.0, rng=source)[0].tokens

    assert torch.equal(run(), run())
    assert not torch.equal(run(), clean.tokens)


def test_shares_of_images_and_tokens():
    """Images Bernoulli(beta); of their tokens alpha (1 - 1/delta) change."""
    quantizer = build()
    alpha, beta, delta, size = 0.8, 0.3, 4, 2000
    z, clean = batch(quantizer, size)
    output, rates = NearestCodePerturbation(alpha, beta, delta)(quantizer, z, clean, progress=0.0, rng=rng(size))
    assert rates["images"].item() == pytest.approx(beta, abs=4 * math.sqrt(beta * (1 - beta) / size))
    changed = (output.tokens != clean.tokens).float().mean().item() / rates["images"].item()
    assert changed == pytest.approx(alpha * (1 - 1 / delta), abs=0.03)


def test_replaced_sets_are_nested_in_alpha():
    tokens, neighbors = torch.zeros(4, 1, 50, dtype=torch.int64), torch.arange(1, 9).expand(4, 1, 50, 8)
    draws = rng(4)
    site, rank = draws.uniform("pfid/site", 1, 50), draws.uniform("pfid/rank", 1, 50)
    hits = [perturb_tokens(tokens, neighbors, site, ranks(rank, 8), alpha) for alpha in (0.0, 0.5, 0.9, 1.0)]
    assert (hits[0] == 0).all() and (hits[-1] > 0).all()
    for small, large in pairwise(hits):
        assert torch.equal(large[small > 0], small[small > 0])
        assert (large > 0).sum() > (small > 0).sum()


def test_ranks_cover_exactly_delta_neighbours():
    uniform = torch.rand(20000)
    for delta in (1, 3, 10):
        found = ranks(uniform, delta)
        assert found.unique().tolist() == list(range(delta))
        assert torch.equal(found, (uniform.double() * delta).floor().long())
    assert ranks(torch.tensor([1 - 2**-24]), 7).item() == 6


def test_annealing_reaches_the_draws():
    quantizer = build()
    z, clean = batch(quantizer, 50)
    strategy = NearestCodePerturbation(0.8, 1.0, 12, LinearAnneal(0.0, 1.0, 0.25))
    assert strategy.strength(0.0) == {"alpha": 0.8, "beta": 1.0, "delta": 12}
    assert strategy.strength(0.5) == pytest.approx({"alpha": 0.5, "beta": 1.0, "delta": 7})
    assert strategy.strength(1.0) == pytest.approx({"alpha": 0.2, "beta": 1.0, "delta": 3})
    late, _ = strategy(quantizer, z, clean, progress=1.0, rng=rng(50))
    fixed, _ = NearestCodePerturbation(0.2, 1.0, 3)(quantizer, z, clean, progress=0.0, rng=rng(50))
    assert torch.equal(late.tokens, fixed.tokens)
    own = NearestCodePerturbation(
        0.8, 1.0, 12, LinearAnneal(0.0, 1.0, 0.25), delta_schedule=LinearAnneal(0.0, 1.0, 1.0)
    )
    assert own.strength(1.0) == pytest.approx({"alpha": 0.2, "beta": 1.0, "delta": 12})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.3, 0.1, 5), r"perturbation\.alpha=1\.3 is outside \[0, 1\]"),
        ((-0.1, 0.1, 5), r"perturbation\.alpha=-0\.1"),
        ((float("nan"), 0.1, 5), r"perturbation\.alpha=nan"),
        ((1.0, 1.1, 5), r"perturbation\.beta=1\.1"),
        ((1.0, 0.1, 0), r"perturbation\.delta=0"),
        ((1.0, 0.1, 2.5), r"perturbation\.delta=2\.5"),
        ((1.0, 0.1, 5, None, "codes"), r"perturbation\.neighbors_of='codes'"),
    ],
)
def test_refuses_values_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NearestCodePerturbation(*arguments)


def test_refuses_more_neighbours_than_codes():
    quantizer = build()
    strategy = NearestCodePerturbation(1.0, 1.0, SIZE + 1)
    message = rf"perturbation\.delta={SIZE + 1}.*{SIZE} codes.*codebook_size"
    with pytest.raises(ConfigError, match=message):
        strategy.check(quantizer)
    z, clean = batch(quantizer)
    with pytest.raises(ConfigError, match=message):
        strategy(quantizer, z, clean, progress=0.0, rng=rng())
    NearestCodePerturbation(1.0, 1.0, SIZE).check(quantizer)


def test_generator_draws_do_not_depend_on_the_selection():
    """A resumed run must find its generator in the same state whatever was selected."""
    quantizer = build()
    z, clean = batch(quantizer)
    states = []
    for beta in (0.01, 0.99):
        generator = torch.Generator().manual_seed(5)
        source: SampleRng = GeneratorRng(6, generator)
        NearestCodePerturbation(1.0, beta, 5)(quantizer, z, clean, progress=0.0, rng=source)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["robustok_perturb_l2", "robustok_perturb_plain"])
def test_published_perturbation(case):
    file = golden(case)
    images, dim, height, width = file.config["shape"]
    size = file.config["codebook_size"]
    assert dim == file.config["z_channels"]
    codebook = partial(VQCodebook, codebook_size=size, l2_normalize=file.config["codebook_norm"])
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=1, dim=dim)
    quantizer.bind_grid((height, width))
    quantizer.load_state_dict({"branches.0.codebooks.0.embedding": file.weights["embedding.weight"]})
    embedding = quantizer.branches[0].codebooks[0].embedding

    z = file.input["z"].clone().requires_grad_()
    clean = quantizer(z)
    assert torch.equal(clean.tokens.flatten(), file.output["clean_ids"])
    assert_close(clean.z_q, file.output["clean_zq"])
    assert_close(clean.losses["codebook"], file.output["vq_loss"])
    assert_close(file.config.get("beta", 0.25) * clean.losses["commitment"], file.output["commit_loss"])

    settings, each = file.config["settings"], ("neighbours", "selected_ids", "out", "grad_z", "grad_codebook_absmax")
    recorded = {"clean_ids", "clean_zq", "vq_loss", "commit_loss"}
    recorded |= {f"s{i}.{name}" for i in range(len(settings)) for name in each}
    assert settings and set(file.output) == recorded, "every recorded output is compared"
    for i, setting in enumerate(settings):
        alpha, beta, delta = (setting[name] for name in ("alpha", "beta", "delta"))
        assert file.input[f"s{i}.alpha_beta_delta"].tolist() == [alpha, beta, delta]
        site, rank = (file.input[f"s{i}.{name}"].view(images, 1, height * width) for name in ("rand", "randint"))
        neighbors = quantizer.neighbors(z.detach(), delta)
        assert torch.equal(neighbors.flatten(0, 2), file.output[f"s{i}.neighbours"])
        # the public code re-draws where u <= alpha, ours where u < alpha
        inclusive = torch.nextafter(torch.tensor(alpha), torch.tensor(2.0))
        tokens = perturb_tokens(clean.tokens, neighbors, site, rank, inclusive)
        assert torch.equal(tokens.flatten(), file.output[f"s{i}.selected_ids"])
        exclusive = perturb_tokens(clean.tokens, neighbors, site, rank, alpha)
        assert torch.equal(exclusive[site != alpha], tokens[site != alpha])
        assert torch.equal(exclusive[site == alpha], clean.tokens[site == alpha])

        # the public code takes the first images of the batch; ours is given draws that select just these
        first = torch.arange(images) < math.floor(images * beta)
        draws = Fixed(
            image=torch.where(first, 0.0, 2.0),
            site=torch.where(site <= alpha, -1.0, 2.0),
            rank=(rank + 0.5) / delta,
        )
        strategy = NearestCodePerturbation(alpha, 1.0, delta)
        output, rates = strategy(quantizer, z, clean, progress=0.0, rng=draws)
        off = alpha == 0 or delta == 1
        assert float(rates["images"]) == (0.0 if off else pytest.approx(first.float().mean().item()))
        if off and (site <= alpha).any() and delta > 1:
            # a draw of exactly 0 is perturbed by the public code even for alpha = 0
            perturbed = straight_through(quantizer, clean.latent, tokens)
            z_q = torch.where(first[:, None, None, None], perturbed, clean.z_q)
        else:
            z_q = output.z_q
        assert_close(z_q, file.output[f"s{i}.out"])
        assert_close(straight_through(quantizer, clean.latent, tokens)[first], file.output[f"s{i}.out"][first])
        total = (z_q * file.input["cotangent"]).sum()
        grad_z, grad_codes = torch.autograd.grad(total, (z, embedding), retain_graph=True, allow_unused=True)
        assert_close(grad_z, file.output[f"s{i}.grad_z"])
        assert file.output[f"s{i}.grad_codebook_absmax"] == 0 and grad_codes is None


def residual(codebook_size: int = SIZE, branches: int = 1, **options) -> ProductQuantizer:
    """A multi-scale quantizer whose codes are spread like the residuals."""
    codebook = partial(VQCodebook, codebook_size=codebook_size, l2_normalize=False)
    branch = partial(MultiScaleQuantizer, codebook=codebook, grids=[1, 2, GRID], phi_ratio=0.0)
    quantizer = ProductQuantizer(branch, branches=branches, dim=DIM, **options)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(std=0.7)
    return quantizer


class Chosen(Fixed):
    """All images and given sites, always the neighbour of rank 2 of 4."""

    def __init__(self, size: int, branches: int, tokens: int, sites: slice):
        site = torch.ones(size, branches, tokens)
        site[..., sites] = 0.0
        super().__init__(image=torch.zeros(size), site=site, rank=torch.full((size, branches, tokens), 0.6))


@pytest.mark.parametrize("branches", [1, 2])
def test_closed_loop_encodes_what_the_wrong_codes_leave(branches):
    quantizer = residual(branches=branches)
    z, clean = batch(quantizer, 8)
    first, later = slice(0, 1), slice(1, None)
    draws = Chosen(8, branches, quantizer.num_tokens, first)
    result = {
        loop: NearestCodePerturbation(0.5, 1.0, 4, loop=loop)(quantizer, z, clean, progress=0.0, rng=draws)[0]
        for loop in ("open", "closed")
    }
    wrong = quantizer.neighbors(z.detach(), 4)[..., first, 2]
    for loop in result:
        assert torch.equal(result[loop].tokens[..., first], wrong)
        assert (result[loop].tokens[..., first] != clean.tokens[..., first]).all()
    assert torch.equal(result["open"].tokens[..., later], clean.tokens[..., later])
    # by hand: the residual of the wrong first scale, quantised on
    for p, (branch, part) in enumerate(zip(quantizer.branches, z.detach().chunk(branches, dim=1), strict=True)):
        rest = part - branch.partial_decode(
            torch.cat([wrong[:, p], torch.zeros(8, quantizer.num_tokens - 1, dtype=torch.int64)], dim=1), 1
        )
        shrunk = F.adaptive_avg_pool2d(rest, 2).permute(0, 2, 3, 1).reshape(-1, DIM // branches)
        second = branch.codebooks[0].assign(shrunk).view(8, 4)
        assert torch.equal(result["closed"].tokens[:, p, 1:5], second)
    errors = {loop: (result[loop].z_q - z).square().mean().item() for loop in result}
    assert errors["closed"] < errors["open"], "later scales must repair"


def test_the_loops_agree_where_only_the_last_scale_is_hit():
    quantizer = residual()
    z, clean = batch(quantizer, 8)
    draws = Chosen(8, 1, quantizer.num_tokens, slice(5, None))
    tokens = [
        NearestCodePerturbation(0.5, 1.0, 4, loop=loop)(quantizer, z, clean, progress=0.0, rng=draws)[0].tokens
        for loop in ("open", "closed")
    ]
    assert torch.equal(*tokens) and not torch.equal(tokens[0], clean.tokens)


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_dropped_scales_stay_dropped(loop):
    quantizer = residual(dropout=1.0)
    quantizer.train()
    z = torch.randn(6, DIM, *GRID, requires_grad=True)
    clean = quantizer(z, rng())
    assert len(clean.depths.unique()) > 1
    output, _ = NearestCodePerturbation(0.7, 0.6, 5, loop=loop)(quantizer, z, clean, progress=0.0, rng=rng())
    assert not torch.equal(output.tokens, clean.tokens)
    assert_close(output.z_q, quantizer.decode(output.tokens, clean.depths), atol=1e-6)


def test_refuses_an_unknown_loop():
    with pytest.raises(ConfigError, match=r"perturbation\.loop='half'"):
        NearestCodePerturbation(1.0, 0.1, 5, loop="half")


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_scales_have_their_own_share(loop):
    quantizer = residual()
    z, clean = batch(quantizer, 300)
    strategy = NearestCodePerturbation(0.8, 1.0, 4, loop=loop, scale_weights=[0.0, 0.0, 0.5])
    strategy.check(quantizer)
    output, _ = strategy(quantizer, z, clean, progress=0.0, rng=rng(300))
    changed = (output.tokens != clean.tokens).float().mean((0, 1))
    assert not changed[:5].any()
    assert changed[5:].mean().item() == pytest.approx(0.8 * 0.5 * 3 / 4, abs=0.04)


def test_refuses_shares_that_are_not_one_per_scale():
    with pytest.raises(ConfigError, match=r"perturbation\.scale_weights has 2 factors.*3 scales"):
        NearestCodePerturbation(0.8, 1.0, 4, scale_weights=[0.5, 1.0]).check(residual())
    with pytest.raises(ConfigError, match=r"perturbation\.scale_weights=\[0\.5, 2\]"):
        NearestCodePerturbation(0.8, 1.0, 4, scale_weights=[0.5, 2])
