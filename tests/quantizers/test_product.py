"""The product of branches: splitting, joining, dropout, refusals. What holds for all: test_every_combination.py."""

from functools import partial

import pytest
import torch

from golden_cases import assert_close
from tessera.errors import ConfigError, DataError
from tessera.quantizers import (
    FSQCodebook,
    MultiScaleQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SingleGridQuantizer,
    VQCodebook,
)
from tessera.rng import IndexedRng

CODEBOOKS = {
    "vq": partial(VQCodebook, codebook_size=17, l2_normalize=False),
    "vq_l2": partial(VQCodebook, codebook_size=17, l2_normalize=True),
}
GRID, DIM = (3, 5), 8


def build(codebook: str, branches: int, **options) -> ProductQuantizer:
    unit = partial(CODEBOOKS[codebook], **options)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=unit), branches=branches, dim=DIM)
    quantizer.bind_grid(GRID)
    return quantizer


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("branches", [1, 2])
def test_tokens_do_not_depend_on_chunk_size(codebook, branches):
    quantizer, chunked = build(codebook, branches), build(codebook, branches, chunk_size=3)
    chunked.load_state_dict(quantizer.state_dict())
    z = torch.randn(5, DIM, *GRID)
    assert torch.equal(chunked.encode(z), quantizer.encode(z))
    assert list(quantizer.state_dict()) == [f"branches.{p}.codebooks.0.embedding" for p in range(branches)]


def test_branches_see_their_own_channels_and_losses_are_averaged():
    quantizer = build("vq", 2)
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
    quantizer = build("vq", 1)
    tokens = torch.randint(17, (2, 1, 15))
    z_q = quantizer.decode(tokens)
    row, column = 1, 3
    expected = quantizer.branches[0].codebooks[0].lookup(tokens[:, 0, row * GRID[1] + column])
    assert torch.equal(z_q[:, :, row, column], expected)


def test_facts_about_the_token_space():
    quantizer = build("vq", 2)
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
    quantizer = build("vq", 1)
    with pytest.raises(DataError, match=message):
        quantizer.decode(tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_accepts_tokens_of_any_integer_type(dtype):
    quantizer = build("vq", 1)
    tokens = torch.randint(17, (2, 1, 15))
    assert torch.equal(quantizer.decode(tokens.to(dtype)), quantizer.decode(tokens))


def test_dim_may_be_left_to_the_codebooks():
    branch = partial(SingleGridQuantizer, codebook=partial(FSQCodebook, levels=[3, 4, 5]))
    assert ProductQuantizer(branch, branches=2, dim=None).dim == 6
    with pytest.raises(ConfigError, match=r"quantizer\.dim"):
        ProductQuantizer(partial(SingleGridQuantizer, codebook=CODEBOOKS["vq"]), branches=2, dim=None)


def test_dropout_needs_scales_to_drop():
    branch = partial(MultiScaleQuantizer, codebook=CODEBOOKS["vq"], grids=[1, 2, 3])
    for start in (3, 4):
        with pytest.raises(ConfigError, match=rf"quantizer\.dropout_start={start} .* but 3"):
            ProductQuantizer(branch, branches=1, dim=8, dropout=0.1, dropout_start=start)
    ProductQuantizer(branch, branches=1, dim=8, dropout=0.0, dropout_start=4)
    for key, options in {"dropout": {"dropout": 1.5}, "dropout_start": {"dropout_start": 0}}.items():
        with pytest.raises(ConfigError, match=rf"quantizer\.{key}="):
            ProductQuantizer(branch, branches=1, dim=8, **options)


@pytest.mark.parametrize(
    "branch",
    [
        partial(SingleGridQuantizer, grid=3),
        partial(MultiScaleQuantizer, grids=[3]),
        partial(ResidualQuantizer, depth=1),
    ],
)
def test_a_single_grid_has_nothing_to_drop(branch):
    with pytest.raises(ConfigError, match=r"quantizer\.dropout=0\.1 drops scales.*quantizer=multiscale"):
        ProductQuantizer(partial(branch, codebook=CODEBOOKS["vq"]), branches=2, dim=8, dropout=0.1)


def test_images_drop_scales_independently_and_by_their_own_draws():
    branch = partial(MultiScaleQuantizer, codebook=CODEBOOKS["vq"], grids=[1, 1, 2, 3])
    quantizer = ProductQuantizer(branch, branches=2, dim=8, dropout=0.6, dropout_start=2).train()
    count = 600
    z, index = torch.randn(count, 8, 3, 3), torch.arange(count)
    depths = quantizer(z, IndexedRng(0, index)).depths
    shares = torch.bincount(depths, minlength=5) / count
    # of the 60 % that are drawn, a third each keeps 2, 3 and all 4
    assert_close(shares, torch.tensor([0, 0, 0.2, 0.2, 0.6]), atol=0.06)
    part = torch.tensor([7, 3, 500])
    assert torch.equal(quantizer(z[part], IndexedRng(0, part)).depths, depths[part])
