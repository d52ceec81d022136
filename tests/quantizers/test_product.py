"""Structures and products, for every codebook, structure and P: round trips, gradients, refusals."""

import copy
from functools import partial

import pytest
import torch

from golden_cases import assert_close
from tessera.errors import ConfigError, DataError
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook

CODEBOOKS = {
    "vq": partial(VQCodebook, codebook_size=17, l2_normalize=False),
    "vq_l2": partial(VQCodebook, codebook_size=17, l2_normalize=True),
}
STRUCTURES = {"single": SingleGridQuantizer}
GRID, DIM = (3, 5), 8


def build(codebook: str, structure: str, branches: int, **options) -> ProductQuantizer:
    unit = partial(CODEBOOKS[codebook], **options)
    quantizer = ProductQuantizer(partial(STRUCTURES[structure], codebook=unit), branches=branches, dim=DIM)
    quantizer.bind_grid(GRID)
    return quantizer


every_composition = pytest.mark.parametrize(
    ("codebook", "structure", "branches"),
    [(c, s, p) for c in CODEBOOKS for s in STRUCTURES for p in (1, 2)],
)


@every_composition
def test_round_trip(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z = torch.randn(4, DIM, *GRID)
    out = quantizer(z)
    assert out.tokens.shape == (4, branches, quantizer.num_tokens) and out.tokens.dtype == torch.int64
    assert out.tokens.min() >= 0 and out.tokens.max() < quantizer.codebook_size
    assert len(out.tokens.unique()) > 1
    assert torch.equal(quantizer.encode(z), out.tokens)
    assert_close(quantizer.decode(out.tokens), out.z_q, atol=1e-6)
    assert torch.equal(quantizer.encode(quantizer.decode(out.tokens)), out.tokens)


@every_composition
def test_gradient_reaches_the_encoder_and_losses_the_codes(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z = torch.randn(4, DIM, *GRID, requires_grad=True)
    out = quantizer(z)
    (grad,) = torch.autograd.grad((out.z_q * torch.randn_like(out.z_q)).sum(), z, retain_graph=True)
    assert (grad != 0).all()
    total = sum(out.losses.values())
    assert torch.isfinite(total)
    total.backward()
    for branch in quantizer.branches:
        assert branch.codebooks[0].embedding.grad.abs().sum() > 0


@every_composition
def test_tokens_do_not_depend_on_chunk_or_batch_size(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    chunked = build(codebook, structure, branches, chunk_size=3)
    chunked.load_state_dict(quantizer.state_dict())
    z = torch.randn(5, DIM, *GRID)
    tokens = quantizer.encode(z)
    assert torch.equal(chunked.encode(z), tokens)
    assert torch.equal(torch.cat([quantizer.encode(image[None]) for image in z]), tokens)


@every_composition
def test_state_dict_reload_is_exact(codebook, structure, branches):
    quantizer, other = build(codebook, structure, branches), build(codebook, structure, branches)
    z = torch.randn(2, DIM, *GRID)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert torch.equal(other(z).z_q, quantizer(z).z_q)
    assert list(quantizer.state_dict()) == [f"branches.{p}.codebooks.0.embedding" for p in range(branches)]


@every_composition
def test_neighbors_of_latents_and_tokens(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z = torch.randn(2, DIM, *GRID)
    tokens = quantizer.encode(z)
    for query in (z, tokens):
        found = quantizer.neighbors(query, 4)
        assert found.shape == (2, branches, quantizer.num_tokens, 4)
        assert torch.equal(found[..., 0], tokens)
        assert (found.sort(dim=-1).values.diff(dim=-1) > 0).all()  # distinct


@every_composition
def test_training_and_evaluation_agree(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z = torch.randn(2, DIM, *GRID)
    trained, evaluated = quantizer.train()(z), quantizer.eval()(z)
    assert torch.equal(trained.tokens, evaluated.tokens)
    assert trained.losses.keys() == evaluated.losses.keys()


def test_branches_see_their_own_channels_and_losses_are_averaged():
    quantizer = build("vq", "single", 2)
    z = torch.randn(3, DIM, *GRID)
    out = quantizer(z)
    parts = [branch(part) for branch, part in zip(quantizer.branches, z.chunk(2, dim=1), strict=True)]
    for p, part in enumerate(parts):
        assert torch.equal(out.tokens[:, p], part.tokens[:, 0])
        assert torch.equal(out.z_q[:, p * 4 : (p + 1) * 4], part.z_q)
    for name, value in out.losses.items():
        assert_close(value, (parts[0].losses[name] + parts[1].losses[name]) / 2)
    first, second = (branch.codebooks[0].embedding for branch in quantizer.branches)
    assert not torch.equal(first, second), "branches must not share a codebook by accident"


def test_tokens_are_in_raster_order():
    quantizer = build("vq", "single", 1)
    tokens = torch.randint(17, (2, 1, 15))
    z_q = quantizer.decode(tokens)
    row, column = 1, 3
    expected = quantizer.branches[0].codebooks[0].lookup(tokens[:, 0, row * GRID[1] + column])
    assert torch.equal(z_q[:, :, row, column], expected)


def test_facts_about_the_token_space():
    quantizer = build("vq", "single", 2)
    assert quantizer.num_branches == 2
    assert quantizer.codebook_size == 17
    assert quantizer.dim == DIM
    assert quantizer.grids == [GRID]
    assert quantizer.num_tokens == 15


def test_refuses_branches_that_do_not_divide_the_channels():
    branch = partial(SingleGridQuantizer, codebook=CODEBOOKS["vq"])
    with pytest.raises(ConfigError, match=r"quantizer\.branches=3 does not divide quantizer\.dim=8"):
        ProductQuantizer(branch, branches=3, dim=8)
    with pytest.raises(ConfigError, match=r"quantizer\.branches=0"):
        ProductQuantizer(branch, branches=0, dim=8)


def test_grid_is_bound_once_and_must_agree():
    branch = partial(SingleGridQuantizer, codebook=CODEBOOKS["vq"])
    unbound = ProductQuantizer(branch, branches=1, dim=8)
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid"):
        _ = unbound.grids
    configured = ProductQuantizer(partial(branch, grid=[2, 3]), branches=1, dim=8)
    configured.bind_grid((2, 3))
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid=\(2, 3\).*\(4, 4\)"):
        configured.bind_grid((4, 4))
    assert ProductQuantizer(partial(branch, grid=4), branches=1, dim=8).grids == [(4, 4)]
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid"):
        ProductQuantizer(partial(branch, grid=[2, 3, 4]), branches=1, dim=8)
    with pytest.raises(ValueError, match=r"grid 2 x 3"):
        configured(torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match="8 channels"):
        configured(torch.randn(1, 6, 2, 3))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 1, 14, dtype=torch.int64), r"\(2, 1, 14\).*15 tokens"),
        (torch.zeros(2, 15, dtype=torch.int64), r"\(2, 15\)"),
        (torch.zeros(2, 2, 15, dtype=torch.int64), "1 branches"),
        (torch.zeros(2, 1, 15), "float32"),
        (torch.full((2, 1, 15), 17), r"token 17 is outside \[0, 17\)"),
        (torch.full((2, 1, 15), -1), r"token -1 is outside \[0, 17\)"),
    ],
)
def test_refuses_foreign_tokens(tokens, message):
    quantizer = build("vq", "single", 1)
    with pytest.raises(DataError, match=message):
        quantizer.decode(tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_accepts_tokens_of_any_integer_type(dtype):
    quantizer = build("vq", "single", 1)
    tokens = torch.randint(17, (2, 1, 15))
    assert torch.equal(quantizer.decode(tokens.to(dtype)), quantizer.decode(tokens))


@every_composition
def test_codes_learn_a_batch(codebook, structure, branches):
    """The codebook loss alone pulls the codes to the latents."""
    quantizer = build(codebook, structure, branches)
    z = torch.randn(1, DIM, *GRID)

    def loss() -> torch.Tensor:
        return quantizer(z).losses["codebook"]

    start = loss().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert value.item() < 0.6 * start
