"""Residual structures: what they sum, what they refuse, and their losses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers import (
    BSQCodebook,
    LFQCodebook,
    MultiScaleQuantizer,
    RandomRevival,
    ResidualQuantizer,
    SingleGridQuantizer,
    VQCodebook,
)
from tessera.quantizers.multiscale import masked_mse, rows_of

VQ = partial(VQCodebook, codebook_size=13, l2_normalize=False)
GRIDS = [(1, 1), (2, 3), (4, 5)]


def maps(size: int = 3, dim: int = 6, grid=(4, 5)) -> torch.Tensor:
    return torch.randn(size, dim, *grid)


def by_hand(branch: MultiScaleQuantizer, z: torch.Tensor) -> tuple[list, torch.Tensor]:
    """The algorithm, written down step by step."""
    residual, total, tokens = z, torch.zeros_like(z), []
    grids, phi = branch.grids, branch.phi
    for k, grid in enumerate(grids):
        codebook = branch.codebooks[k if len(branch.codebooks) > 1 else 0]
        y = F.adaptive_avg_pool2d(residual, grid)
        distances = torch.cdist(rows_of(y) / branch.gain**k, codebook.embedding)
        index = distances.argmin(1)
        tokens.append(index.view(len(z), -1))
        h = codebook.embedding[index].view(len(z), *grid, -1).permute(0, 3, 1, 2) * branch.gain**k
        h = F.interpolate(h, grids[-1], mode="bicubic", align_corners=False)
        if len(phi):
            conv = phi[phi.table[k]]
            h = (1 - phi.ratio) * h + phi.ratio * F.conv2d(h, conv.weight, conv.bias, padding=1)
        residual, total = residual - h, total + h
    return tokens, total


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("convs", "ratio"), [(0, 0.5), (1, 0.5), (4, 0.3), (4, 0.0)])
@pytest.mark.parametrize("gain", [1.0, 0.8])
def test_equals_the_algorithm(shared, convs, ratio, gain):
    branch = MultiScaleQuantizer(6, VQ, GRIDS, shared, convs, ratio, gain)
    z = maps()
    with torch.no_grad():
        tokens, total = by_hand(branch, z)
        out = branch(z)
    assert torch.equal(out.tokens[:, 0], torch.cat(tokens, dim=1))
    assert_close(out.z_q, total)
    assert len(branch.codebooks) == (1 if shared else 3)


def test_repeated_grids_are_the_residual_quantizer():
    torch.manual_seed(0)
    general = MultiScaleQuantizer(6, VQ, [(4, 5)] * 3, phi_ratio=0.0)
    torch.manual_seed(0)
    residual = ResidualQuantizer(6, VQ, depth=3, grid=(4, 5))
    residual.load_state_dict(general.state_dict())
    z = maps()
    assert torch.equal(general.encode(z), residual.encode(z))
    assert residual.grids == [(4, 5)] * 3


def test_one_scale_without_convolutions_is_the_single_grid():
    multi = MultiScaleQuantizer(6, VQ, [(4, 5)], phi_ratio=0.0)
    single = SingleGridQuantizer(6, VQ, (4, 5))
    single.load_state_dict(multi.state_dict())
    z = maps()
    assert torch.equal(single.encode(z), multi.encode(z))
    for name, value in single(z).losses.items():
        assert_close(multi(z).losses[name], value)


def test_scales_are_numbers_or_pairs():
    branch = MultiScaleQuantizer(6, VQ, [1, [2, 3], (4, 4)])
    assert branch.grids == [(1, 1), (2, 3), (4, 4)]


def test_losses_are_means_over_scales_and_kept_images():
    branch = MultiScaleQuantizer(6, VQ, GRIDS)
    z, depths = maps(4), torch.tensor([1, 3, 2, 1])
    out = branch(z, depths)
    terms = []
    for scale in range(3):
        kept = depths > scale
        partial_sum = branch.partial_decode(out.tokens[kept, 0], scale + 1)
        terms.append(F.mse_loss(partial_sum, z[kept]))
    for name in ("codebook", "commitment"):
        assert_close(out.losses[name], torch.stack(terms).mean())
    assert_close(out.z_q, branch.decode(out.tokens[:, 0], depths))


@pytest.mark.parametrize("shared", [True, False])
def test_averages_and_usage_are_of_kept_images(shared):
    """As the codebook loss of codes that learn by gradient: what is dropped teaches nothing."""
    codebook = partial(VQ, update="ema", ema_decay=0.6, revival=partial(RandomRevival, decay=0.6, threshold=0.01))
    branch = MultiScaleQuantizer(6, codebook, GRIDS, shared).train()
    depths = torch.tensor([1, 2, 2, 1])  # nobody keeps the last scale
    tokens = branch(maps(4), depths).tokens[:, 0].split([1, 6, 20], dim=1)
    kept = [part[depths > scale].flatten() for scale, part in enumerate(tokens)]
    for unit, indices in zip(branch.codebooks, [torch.cat(kept)] if shared else kept, strict=True):
        counts = torch.bincount(indices, minlength=13).float()
        weight = 0.4 if len(indices) else 0.0
        assert_close(unit.averages.counts, torch.ones(13).lerp(counts, weight))
        assert_close(unit.revival.usage, torch.full((13,), 1 / 13).lerp(counts / max(len(indices), 1), weight))


def test_each_loss_moves_its_own_side_only():
    branch = MultiScaleQuantizer(6, VQ, GRIDS, phi_convs=1)
    z = maps().requires_grad_()
    out = branch(z)
    parameters = list(branch.parameters())
    grads = torch.autograd.grad(out.losses["codebook"], [z, *parameters], allow_unused=True, retain_graph=True)
    assert grads[0] is None and any(g is not None for g in grads[1:])
    for target in (out.losses["commitment"], out.z_q.sum()):
        grads = torch.autograd.grad(target, [z, *parameters], allow_unused=True, retain_graph=True)
        assert grads[0] is not None and all(g is None for g in grads[1:])


def test_scale_that_every_image_drops_costs_nothing():
    branch = MultiScaleQuantizer(6, partial(BSQCodebook, bits=6), GRIDS)
    z = maps().requires_grad_()
    out = branch(z, torch.ones(3, dtype=torch.int64))
    total = sum(out.losses.values())
    (grad,) = torch.autograd.grad(total, z)
    assert torch.isfinite(total) and torch.isfinite(grad).all()
    assert masked_mse(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([True, False])).item() == 1.0


@pytest.mark.parametrize("at", ["latent", "scale"])
@pytest.mark.parametrize("dropped", [False, True])
def test_entropies_are_of_the_residual_at_the_chosen_resolution(at, dropped):
    gain = 0.8
    branch = MultiScaleQuantizer(6, partial(LFQCodebook, bits=6), GRIDS, gain=gain, penalties_at=at)
    z = maps(4)
    depths = torch.tensor([1, 3, 2, 3]) if dropped else None
    out = branch(z, depths)
    kept = torch.full((4,), 3) if depths is None else depths
    expected: dict[str, list] = {"entropy_sample": [], "entropy_batch": []}
    for scale in range(3):
        selected = kept > scale
        residual = z[selected]
        if scale:
            residual = residual - branch.partial_decode(out.tokens[selected, 0], scale)
        if at == "scale":
            residual = F.adaptive_avg_pool2d(residual, branch.grids[scale])
        for name, value in branch.codebooks[0].penalties(rows_of(residual), None, gain**scale).items():
            expected[name].append(value)
    for name, values in expected.items():
        assert_close(out.losses[name], torch.stack(values).mean())


def test_entropy_gradient_reaches_the_latent_only():
    branch = MultiScaleQuantizer(6, partial(BSQCodebook, bits=6), GRIDS, phi_convs=1)
    z = maps().requires_grad_()
    out = branch(z)
    for name in ("entropy_sample", "entropy_batch"):
        grads = torch.autograd.grad(out.losses[name], [z, *branch.parameters()], allow_unused=True, retain_graph=True)
        assert grads[0].abs().sum() > 0 and all(g is None for g in grads[1:])


def test_gain_multiplies_the_codes_of_each_scale():
    branch = MultiScaleQuantizer(4, partial(LFQCodebook, bits=4), [2, 2, 2], phi_ratio=0.0, gain=0.5)
    z = maps(2, 4, (2, 2)).clamp(-1.7, 1.7)
    # 1, 1/2 and 1/4 with signs: every value in (-1.75, 1.75) to within 1/4
    assert (branch(z).z_q - z).abs().max() <= 0.25 + 1e-6
    assert_close(branch.embed(torch.zeros(1, 1, dtype=torch.int64), 2), -torch.ones(1, 1, 4))
    summed, _ = branch.advance(torch.zeros(1, 4, 2, 2), -torch.ones(1, 4, 4), 2)
    assert_close(summed, torch.full((1, 4, 2, 2), -0.25))


def test_unit_codes_with_their_latent_normalised_once():
    """BSQ's latent is put on the sphere at the start, its residuals are not."""
    branch = MultiScaleQuantizer(6, partial(BSQCodebook, bits=6), GRIDS)
    z = maps()
    out = branch(z)
    assert_close(out.latent, F.normalize(z, dim=1))
    assert torch.equal(branch.encode(z), branch.encode(3.7 * z))


def test_more_scales_come_closer():
    branch = MultiScaleQuantizer(6, partial(VQCodebook, codebook_size=64, l2_normalize=False), GRIDS, phi_ratio=0.0)
    with torch.no_grad():
        branch.codebooks[0].embedding.normal_(std=0.5)
    z = maps(8)
    tokens = branch.encode(z)
    errors = [F.mse_loss(branch.partial_decode(tokens, k), z).item() for k in (1, 2, 3)]
    assert errors[2] < errors[0]
    for scales in (0, 4):
        with pytest.raises(ValueError, match=r"\[1, 3\]"):
            branch.partial_decode(tokens, scales)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], r"quantizer\.branch\.grids is empty"),
        ([1, 5, 4], r"\(5, 5\) is larger than the last, \(4, 4\)"),
        ([1, (2, 5), 4], r"\(2, 5\) is larger"),
        ([1, 0, 4], r"quantizer\.branch\.grids=0"),
    ],
)
def test_refuses_impossible_grids(grids, message):
    with pytest.raises(ConfigError, match=message):
        MultiScaleQuantizer(6, VQ, grids)


def test_last_grid_must_be_the_latent():
    branch = MultiScaleQuantizer(6, VQ, [1, 2, 4])
    branch.bind_grid((4, 4))
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grids ends in \(4, 4\).*\(5, 5\)"):
        branch.bind_grid((5, 5))
    with pytest.raises(ValueError, match="grid 4 x 4"):
        branch(maps(1, 6, (5, 5)))
    with pytest.raises(ValueError, match="6 channels"):
        branch(maps(1, 5, (4, 4)))
    with pytest.raises(ConfigError, match="gain=0"):
        MultiScaleQuantizer(6, VQ, [1, 2], gain=0.0)
    with pytest.raises(ConfigError, match="penalties_at='residual'"):
        MultiScaleQuantizer(6, VQ, [1, 2], penalties_at="residual")
    with pytest.raises(ConfigError, match="single grid"):
        single = MultiScaleQuantizer(6, VQ, [4])
        single.next_scale_input(single.encode(maps(1, 6, (4, 4))))


def test_residual_grid_is_given_later():
    branch = ResidualQuantizer(6, VQ, depth=2)
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid"):
        _ = branch.grids
    branch.bind_grid((3, 2))
    branch.bind_grid((3, 2))
    assert branch.grids == [(3, 2)] * 2
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.grid=\(3, 2\).*\(4, 4\)"):
        branch.bind_grid((4, 4))
    with pytest.raises(ConfigError, match=r"quantizer\.branch\.depth=0"):
        ResidualQuantizer(6, VQ, depth=0)


def test_keys_of_the_weights():
    branch = MultiScaleQuantizer(2, VQ, [1, 2, 4], shared_codebook=False, phi_convs=1)
    assert list(branch.state_dict()) == [
        "codebooks.0.embedding",
        "codebooks.1.embedding",
        "codebooks.2.embedding",
        "phi.0.weight",
        "phi.0.bias",
    ]
