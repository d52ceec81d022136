"""Strategies beside the nearest codes of latents: random codes, noise, tables of neighbours; rates and annealing."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from conf_commands import CONF, composed
from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.perturbation import (
    CodeNeighbors,
    GaussianPerturbation,
    LinearAnneal,
    NearestCodePerturbation,
    RandomCodePerturbation,
)
from tessera.perturbation.random_codes import uniform_codes
from tessera.quantizers import (
    FSQCodebook,
    GaussianBottleneck,
    LFQCodebook,
    MultiScaleQuantizer,
    ProductQuantizer,
    SingleGridQuantizer,
    VQCodebook,
)
from tessera.rng import GeneratorRng, IndexedRng
from tessera.run.build import make

SIZE, GRID, DIM = 24, (3, 4), 8


def build(branches: int = 1, structure=SingleGridQuantizer, codebook=None) -> ProductQuantizer:
    codebook = codebook or partial(VQCodebook, codebook_size=SIZE, l2_normalize=False)
    quantizer = ProductQuantizer(partial(structure, codebook=codebook), branches=branches, dim=DIM)
    quantizer.bind_grid(GRID)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(std=0.7)
    return quantizer


MULTISCALE = partial(MultiScaleQuantizer, grids=[1, 2, GRID], phi_ratio=0.0)


def run(strategy, quantizer, size: int = 6, progress: float = 0.0, seed: int = 0):
    z = torch.randn(size, DIM, *GRID, generator=torch.Generator().manual_seed(1)).requires_grad_()
    clean = quantizer(z)
    output, rates = strategy(quantizer, z, clean, progress=progress, rng=IndexedRng(seed, torch.arange(size)))
    return z, clean, output, rates


def test_random_codes_are_uniform_over_all_codes():
    _, clean, output, rates = run(RandomCodePerturbation(0.5, 1.0), build(), 2000)
    hit = IndexedRng(0, torch.arange(2000)).uniform("perturb/site", 1, 12) < 0.5
    assert torch.equal(output.tokens[~hit], clean.tokens[~hit])
    counts = torch.bincount(output.tokens[hit], minlength=SIZE).float()
    assert counts.sum() / SIZE == pytest.approx(counts.mean().item())
    assert (counts - counts.mean()).abs().max() < 5 * counts.mean().sqrt()
    assert rates["tokens_redrawn"].item() == pytest.approx(hit.float().mean().item())
    assert rates["tokens_changed"].item() == pytest.approx(0.5 * (1 - 1 / SIZE), abs=0.02)


@pytest.mark.parametrize("size", [3, 1 << 24, (1 << 24) + 1, 3 << 40, 1 << 62])
def test_codes_of_any_number_are_drawn(size):
    rng = IndexedRng(0, torch.arange(2000))
    codes = uniform_codes(rng, "perturb/code", size, 2, 8)
    assert codes.shape == (2000, 2, 8) and codes.min() >= 0 and codes.max() < size
    assert (codes.double() / size).mean().item() == pytest.approx(0.5 - 0.5 / size, abs=0.01)
    odd = (codes % 2).double().mean().item()  # the lowest bit is drawn, too
    assert odd == pytest.approx((size // 2) / size, abs=0.02)
    assert torch.equal(codes[5:6], uniform_codes(IndexedRng(0, torch.tensor([5])), "perturb/code", size, 2, 8))


def test_random_codes_in_a_closed_loop_are_repaired():
    quantizer = build(structure=MULTISCALE)
    errors = {}
    for loop in ("open", "closed"):
        strategy = RandomCodePerturbation(0.6, 1.0, loop=loop, scale_weights=[1.0, 1.0, 0.0])
        z, _, output, rates = run(strategy, quantizer, 40)
        errors[loop] = (output.z_q - z).square().mean().item()
        assert rates["tokens_redrawn"].item() == pytest.approx(0.6 * 5 / 17, abs=0.05)
    assert errors["closed"] < errors["open"]


@pytest.mark.parametrize("strategy", [NearestCodePerturbation, RandomCodePerturbation])
def test_joint_sites_are_those_of_all_branches(strategy):
    delta = {"delta": SIZE} if strategy is NearestCodePerturbation else {}
    quantizer = build(branches=2)
    _, clean, apart, rates = run(strategy(0.5, 1.0, **delta), quantizer, 200)
    _, _, joint, joint_rates = run(strategy(0.5, 1.0, joint=True, **delta), quantizer, 200)
    both = {name: (out.tokens != clean.tokens) for name, out in (("apart", apart), ("joint", joint))}
    together = {name: (changed[:, 0] & changed[:, 1]).float().mean().item() for name, changed in both.items()}
    # a changed site changes the other branch's, too, unless its draw keeps the value
    kept = (1 - 1 / SIZE) ** 2
    assert together["joint"] == pytest.approx(0.5 * kept, abs=0.04)
    assert together["apart"] == pytest.approx(0.25 * kept, abs=0.04)
    for found in (rates, joint_rates):
        assert found["tokens_redrawn"].item() == pytest.approx(0.5, abs=0.04)


def test_rates_are_what_happened():
    quantizer = build(branches=2)
    _, clean, output, rates = run(NearestCodePerturbation(0.7, 0.5, 5), quantizer, 8)
    draws = IndexedRng(0, torch.arange(8))
    selected = draws.uniform("perturb/image") < 0.5
    hit = (draws.uniform("perturb/site", 2, 12) < 0.7) & selected[:, None, None]
    assert 0 < selected.sum() < 8
    moved = (output.z_q - clean.z_q).square().sum((1, 2, 3)) / clean.z_q.square().sum((1, 2, 3))
    expected = {
        "images": selected.float().mean(),
        "displacement": moved.mean(),
        "tokens_redrawn": hit.float().mean(),
        "tokens_changed": (output.tokens != clean.tokens).float().mean(),
    }
    assert set(rates) == set(expected)
    for name, value in expected.items():
        assert_close(rates[name], value.detach(), atol=1e-6)
        assert not rates[name].requires_grad


def test_beta_is_annealed():
    strategy = NearestCodePerturbation(1.0, 0.8, 5, beta_schedule=LinearAnneal(0.0, 1.0, 0.25))
    assert strategy.strength(0.5) == {"alpha": 1.0, "beta": pytest.approx(0.5), "delta": 5}
    assert run(strategy, build(), 400, progress=1.0)[3]["images"].item() == pytest.approx(0.2, abs=0.06)
    off = NearestCodePerturbation(1.0, 0.8, 5, beta_schedule=LinearAnneal(0.0, 1.0, 0.0))
    _, clean, output, rates = run(off, build(), progress=1.0)
    assert output is clean and rates["images"] == 0.0


# ---- noise


@pytest.mark.parametrize("continuous", [False, True])
def test_noise_has_the_size_it_is_told(continuous):
    quantizer = GaussianBottleneck(DIM // 2).eval() if continuous else build()
    strategy = GaussianPerturbation(0.5, 0.5, std=0.4)
    strategy.check(quantizer)
    z, clean, output, rates = run(strategy, quantizer, 600)
    selected = IndexedRng(0, torch.arange(600)).uniform("perturb/image") < 0.5
    assert torch.equal(output.z_q[~selected], clean.z_q[~selected]) and output.tokens.equal(clean.tokens)
    noise = (output.z_q - clean.z_q)[selected].detach()
    cells = (noise != 0).all(1)
    assert torch.equal(cells, (noise != 0).any(1)), "a cell gets noise in all channels"
    assert cells.float().mean().item() == pytest.approx(0.5, abs=0.02)
    rms = clean.z_q[selected].square().mean((1, 2, 3)).sqrt().detach()
    relative = (noise / rms[:, None, None, None]).movedim(1, -1)[cells]
    assert relative.std().item() == pytest.approx(0.4, rel=0.02) and abs(relative.mean().item()) < 0.01
    assert rates["cells_noised"].item() == pytest.approx(cells.float().sum().item() / (600 * 12), abs=1e-6)
    assert rates["displacement"].item() == pytest.approx(0.5 * 0.5 * 0.4**2, rel=0.1)
    cotangent = torch.randn_like(output.z_q)
    grads = [torch.autograd.grad((out.z_q * cotangent).sum(), z, retain_graph=True)[0] for out in (clean, output)]
    assert torch.equal(*grads), "noise must not change the gradient"


@pytest.mark.parametrize("structure", [SingleGridQuantizer, MULTISCALE])
def test_noise_is_matched_to_the_energy_of_nearest_codes(structure):
    quantizer = build(branches=2, structure=structure)
    nearest = run(NearestCodePerturbation(0.6, 1.0, 8), quantizer, 300)[3]["displacement"].item()
    matched = run(GaussianPerturbation(0.6, 1.0, matched_delta=8), quantizer, 300)[3]["displacement"].item()
    assert matched == pytest.approx(nearest, rel=0.05) and nearest > 0.01


def test_noise_is_annealed():
    ramp = LinearAnneal(0.0, 1.0, 0.5)
    assert GaussianPerturbation(0.8, 0.1, std=0.4, schedule=ramp).strength(1.0) == {
        "alpha": 0.4,
        "beta": 0.1,
        "std": 0.2,
    }
    own = GaussianPerturbation(0.8, 0.1, std=0.4, schedule=ramp, std_schedule=LinearAnneal(0.0, 1.0, 0.0))
    assert own.strength(1.0) == {"alpha": 0.4, "beta": 0.1, "std": 0.0} and own.is_off(own.strength(1.0))
    matched = GaussianPerturbation(0.8, 0.1, matched_delta=8, schedule=ramp)
    assert matched.strength(1.0) == {"alpha": 0.4, "beta": 0.1, "delta": 4}


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: GaussianPerturbation(1.0, 0.1), r"perturbation\.std=None, perturbation\.matched_delta=None"),
        (lambda: GaussianPerturbation(1.0, 0.1, 0.2, 5), r"perturbation\.std=0\.2, perturbation\.matched_delta=5"),
        (lambda: GaussianPerturbation(1.0, 0.1, std=-0.1), r"perturbation\.std=-0\.1"),
        (lambda: GaussianPerturbation(1.0, 0.1, std=float("nan")), r"perturbation\.std=nan"),
        (lambda: GaussianPerturbation(1.0, 0.1, matched_delta=1.5), r"perturbation\.matched_delta=1\.5"),
        (lambda: GaussianPerturbation(1.2, 0.1, std=0.1), r"perturbation\.alpha=1\.2"),
        (lambda: RandomCodePerturbation(1.0, -1.0), r"perturbation\.beta=-1\.0"),
        (lambda: RandomCodePerturbation(1.0, 1.0, loop="half"), r"perturbation\.loop='half'"),
        (
            lambda: GaussianPerturbation(1.0, 0.1, matched_delta=SIZE + 1).check(build()),
            rf"perturbation\.matched_delta={SIZE + 1} exceeds the {SIZE} codes",
        ),
        (
            lambda: GaussianPerturbation(1.0, 0.1, matched_delta=2).check(GaussianBottleneck(4)),
            r"matched_delta=2 .*has none; set it to null",
        ),
        (
            lambda: RandomCodePerturbation(1.0, 1.0).check(GaussianBottleneck(4)),
            "has none; choose perturbation=gaussian",
        ),
        (
            lambda: NearestCodePerturbation(1.0, 1.0, 2).check(GaussianBottleneck(4)),
            "has none; choose perturbation=gaussian or perturbation=none",
        ),
    ],
)
def test_refuses(build_it, message):
    with pytest.raises(ConfigError, match=message):
        build_it()


# ---- neighbours of codes


def searches(monkeypatch, codebook) -> list[int]:
    """The numbers of codes that are searched from now on."""
    seen, original = [], codebook.neighbors_of_codes
    monkeypatch.setattr(codebook, "neighbors_of_codes", lambda codes, k: seen.append(len(codes)) or original(codes, k))
    return seen


@pytest.mark.parametrize(
    "codebook",
    [
        partial(VQCodebook, codebook_size=16, l2_normalize=True),
        partial(LFQCodebook, bits=DIM),
        partial(FSQCodebook, levels=[2] * DIM),
    ],
)
def test_a_codebook_that_stays_is_searched_once(monkeypatch, codebook):
    quantizer = build(codebook=codebook)
    book, size = quantizer.branches[0].codebooks[0], quantizer.codebook_size
    seen = searches(monkeypatch, book)
    found = CodeNeighbors(5)
    tokens = torch.arange(size).repeat(2).view(2, 1, size)
    rank = torch.arange(2 * size).view(2, 1, size) % 5
    expected = book.neighbors(tokens.flatten(), 5).view(2, 1, size, 5).gather(-1, rank[..., None])[..., 0]
    seen.clear()  # by the line above
    for _ in range(4):
        assert torch.equal(found.pick(book, tokens, rank, 5), expected)
    assert seen == [size, size], "the codes in use, then the table"
    narrow = rank % 3
    fewer = book.neighbors(tokens.flatten(), 3).view(2, 1, size, 3).gather(-1, narrow[..., None])[..., 0]
    assert torch.equal(found.pick(book, tokens, narrow, 3), fewer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_codebook_that_trains_is_searched_at_every_step(monkeypatch, fused):
    """Each optimizer's updates are noticed, and no table of all codes is built for a single step."""
    quantizer = build()
    book = quantizer.branches[0].codebooks[0]
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.5, fused=fused)
    found, seen = CodeNeighbors(6), searches(monkeypatch, book)
    tokens = torch.arange(SIZE).view(2, 1, 12)
    rank = torch.full_like(tokens, 5)
    before = None
    for _ in range(3):
        picked = found.pick(book, tokens, rank, 6)
        assert torch.equal(picked, quantizer.neighbors(tokens, 6)[..., 5])
        assert before is None or not torch.equal(picked, before)
        before = picked
        quantizer.decode(tokens).square().sum().backward()
        optimizer.step()
    assert set(seen[::2]) == {SIZE} and len(seen) == 6  # and one of each comparison


def test_loaded_and_updated_codes_are_noticed():
    quantizer, other = build(), build()
    book, found = quantizer.branches[0].codebooks[0], CodeNeighbors(4)
    tokens, rank = torch.arange(SIZE), torch.full((SIZE,), 3)
    changes = [
        lambda: quantizer.load_state_dict(other.state_dict()),
        lambda: book.embedding.detach().lerp_(torch.randn(SIZE, DIM), 0.5),
        lambda: setattr(book, "embedding", torch.nn.Parameter(torch.randn(SIZE, DIM))),
    ]
    for change in changes:
        for _ in range(3):
            found.pick(book, tokens, rank, 4)
        change()
        assert torch.equal(found.pick(book, tokens, rank, 4), book.neighbors(tokens, 4)[:, 3])


def test_big_binary_codebooks_have_no_table(monkeypatch):
    codebook = LFQCodebook(bits=40)
    found, seen = CodeNeighbors(100), searches(monkeypatch, codebook)
    codes = torch.arange(50) * 12345678901
    for _ in range(3):
        picked = found.pick(codebook, codes, torch.arange(50), 100)
    assert seen == [50, 50, 50]
    flipped = (picked ^ codes).tolist()
    # 40 codes differ in one bit: the ranks 1 to 40
    assert [bin(bits).count("1") for bits in flipped] == [0] + [1] * 40 + [2] * 9


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_neighbours_are_those_of_each_scales_own_codebook(shared, loop):
    quantizer = build(branches=2, structure=partial(MULTISCALE, shared_codebook=shared))
    strategy = NearestCodePerturbation(0.8, 1.0, 4, neighbors_of="code", loop=loop)
    outputs = [run(strategy, quantizer)[2].tokens for _ in range(3)]  # searched, then from tables
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    if loop == "open":
        _, clean, output, _ = run(strategy, quantizer)
        draws = IndexedRng(0, torch.arange(6))
        rank = (draws.uniform("perturb/rank", 2, 17) * 4).long()
        expected = quantizer.neighbors(clean.tokens, 4).gather(-1, rank[..., None])[..., 0]
        hit = draws.uniform("perturb/site", 2, 17) < 0.8
        assert torch.equal(output.tokens, torch.where(hit, expected, clean.tokens))


def test_a_strategy_can_be_copied_and_sent_to_another_process():
    quantizer = build()
    strategy = NearestCodePerturbation(0.8, 1.0, 4, neighbors_of="code")
    tokens = [run(strategy, quantizer)[2].tokens for _ in range(3)][-1]
    for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert torch.equal(run(other, quantizer)[2].tokens, tokens)


# ---- all of them

STRATEGIES = {
    "random": RandomCodePerturbation(0.5, 0.5),
    "gaussian": GaussianPerturbation(0.5, 0.5, std=0.3),
    "matched": GaussianPerturbation(0.5, 0.5, matched_delta=4),
    "code": NearestCodePerturbation(0.5, 0.5, 4, neighbors_of="code"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_draws_belong_to_samples_and_not_to_the_selection(name):
    quantizer, strategy = build(2), copy.deepcopy(STRATEGIES[name])
    z = torch.randn(6, DIM, *GRID)
    whole, _ = strategy(quantizer, z, quantizer(z), progress=0.0, rng=IndexedRng(0, torch.arange(6)))
    order = torch.tensor([4, 1, 5])
    part, _ = strategy(quantizer, z[order], quantizer(z[order]), progress=0.0, rng=IndexedRng(0, order))
    assert torch.equal(part.tokens, whole.tokens[order])
    assert_close(part.z_q, whole.z_q[order])
    assert not torch.equal(whole.z_q, quantizer(z).z_q)
    states = []
    for beta in (0.01, 0.99):
        strategy.beta, generator = beta, torch.Generator().manual_seed(5)
        strategy(quantizer, z, quantizer(z), progress=0.0, rng=GeneratorRng(6, generator))
        states.append(generator.get_state())
    assert torch.equal(*states)


CHOICES = sorted(path.stem for path in (CONF / "perturbation").glob("*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_acts_on_a_batch(choice):
    assert {"none", "robustok", "code_neighbours", "random_codes", "gaussian"} <= set(CHOICES)
    node = composed("train", [f"perturbation={choice}", "quantizer=multiscale", "quantizer/codebook=fsq"]).perturbation
    strategy = make(node)
    if choice == "none":
        assert strategy is None
        return
    quantizer = build(2, codebook=partial(VQCodebook, codebook_size=200))
    strategy = instantiate(node, beta=1.0, _convert_="all")
    _, clean, output, rates = run(strategy, quantizer, progress=0.4)
    assert not torch.equal(output.z_q, clean.z_q) and rates["images"].item() == 1.0
    halfway = strategy.strength(0.4)
    assert halfway["alpha"] == pytest.approx(0.75 * strategy.alpha) and halfway["beta"] == 1.0
