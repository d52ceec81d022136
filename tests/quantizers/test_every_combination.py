"""Codebooks x structures x branches: what must hold for every combination."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forked import run_forked
from golden_cases import assert_close
from quantizer_cases import CODEBOOKS, COMBINATIONS, GRID, STRUCTURES, build
from tessera.errors import ConfigError
from tessera.perturbation import GaussianPerturbation, NearestCodePerturbation, RandomCodePerturbation
from tessera.quantizers.multiscale import rows_of
from tessera.rng import IndexedRng

every_combination = pytest.mark.parametrize(("codebook", "structure", "branches"), COMBINATIONS)
SEVERAL_SCALES = [structure for structure in STRUCTURES if structure != "single"]


def latent(quantizer, size: int = 4) -> torch.Tensor:
    """Random maps whose coarse scales are not all zero."""
    return torch.randn(size, quantizer.dim, *GRID) + 1.5 * torch.randn(size, quantizer.dim, 1, 1)


@every_combination
def test_round_trip(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    z = latent(quantizer)
    out = quantizer(z)
    assert out.tokens.shape == (4, branches, quantizer.num_tokens) and out.tokens.dtype == torch.int64
    assert out.tokens.min() >= 0 and out.tokens.max() < quantizer.codebook_size
    assert len(out.tokens.unique()) > 1
    assert torch.equal(quantizer.encode(z), out.tokens)
    assert_close(quantizer.decode(out.tokens), out.z_q, atol=1e-6)
    assert torch.equal(torch.cat([quantizer.encode(image[None]) for image in z]), out.tokens)


@every_combination
def test_gradients_and_losses(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z = latent(quantizer).requires_grad_()
    out = quantizer(z)
    (grad,) = torch.autograd.grad((out.z_q * torch.randn_like(out.z_q)).sum(), z, retain_graph=True)
    assert (grad != 0).float().mean() > 0.99, "the decoder's gradient must reach the encoder"
    for name, value in out.losses.items():
        assert value.ndim == 0 and torch.isfinite(value), name
    total = sum(out.losses.values()) + out.z_q.square().mean()
    total.backward()
    assert torch.isfinite(z.grad).all()
    for name, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, f"{name} is never trained"


@every_combination
def test_is_float32_under_autocast(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    z = latent(quantizer).bfloat16()
    expected = quantizer(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
        assert_close(quantizer.decode(out.tokens), expected.z_q, atol=1e-6)
    assert torch.equal(out.tokens, expected.tokens)
    assert out.z_q.dtype == torch.float32 and torch.equal(out.z_q, expected.z_q)
    for name, value in out.losses.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected.losses[name])


@every_combination
def test_state_dict_reload_is_exact(codebook, structure, branches):
    quantizer, other = build(codebook, structure, branches), build(codebook, structure, branches)
    z = latent(quantizer)
    quantizer.train()(z)  # moves what is not learned by gradient
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert torch.equal(other.eval()(z).z_q, quantizer.eval()(z).z_q)
    first, second = quantizer.train()(z), other.train()(z)
    assert torch.equal(first.z_q, second.z_q)
    for (name, value), copied in zip(quantizer.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, copied), name


@every_combination
def test_evaluation_changes_nothing_and_training_what_it_should(codebook, structure, branches):
    quantizer = build(codebook, structure, branches)
    z, before = latent(quantizer), copy.deepcopy(quantizer.state_dict())

    def same():
        return all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    evaluated = quantizer.eval()(z)
    assert same()
    trained = quantizer.train()(z)
    assert torch.equal(trained.tokens, evaluated.tokens) and torch.equal(trained.z_q, evaluated.z_q)
    assert trained.losses.keys() == evaluated.losses.keys()
    quantizer.encode(z)
    assert same() is not CODEBOOKS[codebook].updates


@every_combination
def test_neighbors_of_latents_and_tokens(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    z = latent(quantizer, 2)
    tokens = quantizer.encode(z)
    for query in (z, tokens):
        found = quantizer.neighbors(query, 5)
        assert found.shape == (2, branches, quantizer.num_tokens, 5)
        assert torch.equal(found[..., 0], tokens)
        assert found.min() >= 0 and found.max() < quantizer.codebook_size
        assert (found.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a code is its own neighbour once"
        assert torch.equal(quantizer.neighbors(query, 2), found[..., :2])
    assert quantizer.neighbors(z, quantizer.codebook_size).sort(-1).values[0, 0, 0].tolist() == list(
        range(quantizer.codebook_size)
    )


@every_combination
@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("neighbors_of", ["latent", "code"])
def test_perturbation(codebook, structure, branches, loop, neighbors_of):
    quantizer = build(codebook, structure, branches, dropout=0.0 if structure == "single" else 0.5).eval()
    z = latent(quantizer, 6).requires_grad_()
    clean = quantizer(z)
    strategy = NearestCodePerturbation(0.7, 0.5, 4, neighbors_of=neighbors_of, loop=loop)
    strategy.check(quantizer)
    rng = IndexedRng(1, torch.arange(6))
    output, rates = strategy(quantizer, z, clean, progress=0.0, rng=rng)
    selected = rng.uniform("perturb/image") < 0.5
    assert 0 < selected.sum() < 6 and rates["images"].item() == selected.float().mean().item()
    changed = output.tokens != clean.tokens
    assert not changed[~selected].any() and changed[selected].flatten(1).any(1).all()
    assert torch.equal(output.z_q[~selected], clean.z_q[~selected])
    assert_close(output.z_q, quantizer.decode(output.tokens), atol=1e-6)
    assert output.losses is clean.losses
    (grad,) = torch.autograd.grad(output.z_q.square().sum(), z)
    assert (grad[selected] != 0).any() and torch.isfinite(grad).all()
    # the first scale sees the same points in both loops; later ones only where nothing is wrong before them
    height, width = quantizer.grids[0]
    first = slice(0, height * width)
    hit = (rng.uniform("perturb/site", *clean.tokens.shape[1:]) < 0.7) & selected[:, None, None]
    assert not (changed & ~hit)[..., first].any()
    if loop == "open" or len(quantizer.grids) == 1:
        assert not (changed & ~hit).any()
        neighbors = quantizer.neighbors(z.detach() if neighbors_of == "latent" else clean.tokens, 4)
        assert (output.tokens[..., None] == neighbors).any(-1)[changed].all()


OTHERS = {
    "random": RandomCodePerturbation(0.7, 0.5),
    "random, closed": RandomCodePerturbation(0.7, 0.5, loop="closed", joint=True),
    "noise": GaussianPerturbation(0.7, 0.5, std=0.3),
    "matched noise": GaussianPerturbation(0.7, 0.5, matched_delta=4),
}


@every_combination
def test_other_perturbations(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    z = latent(quantizer, 6).requires_grad_()
    clean, rng = quantizer(z), IndexedRng(1, torch.arange(6))
    selected = rng.uniform("perturb/image") < 0.5
    for name, strategy in OTHERS.items():
        strategy.check(quantizer)
        output, rates = strategy(quantizer, z, clean, progress=0.0, rng=rng)
        changed = output.z_q != clean.z_q
        assert changed[selected].flatten(1).any(1).all() and not changed[~selected].any(), name
        assert output.losses is clean.losses and rates["displacement"] > 0, name
        assert rates["images"].item() == selected.float().mean().item(), name
        (grad,) = torch.autograd.grad(output.z_q.square().sum(), z, retain_graph=True)
        assert (grad[selected] != 0).any() and torch.isfinite(grad).all(), name
        if "noise" in name:
            assert torch.equal(output.tokens, clean.tokens)
        else:
            assert output.tokens.max() < quantizer.codebook_size
            assert_close(output.z_q[selected], quantizer.decode(output.tokens)[selected], atol=1e-6)
        if name == "random":
            hit = (rng.uniform("perturb/site", *clean.tokens.shape[1:]) < 0.7) & selected[:, None, None]
            assert not (output.tokens != clean.tokens)[~hit].any()


@every_combination
def test_tokens_can_be_replaced_while_encoding(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    z = latent(quantizer)
    seen = []

    def edit(branch, scale):
        seen.append((branch, scale.tokens.shape[1]))
        nearest = scale.neighbors("latent", 2)
        assert torch.equal(nearest[..., 0], scale.tokens)
        own = quantizer.branches[branch].codebooks[0].neighbors(scale.tokens.flatten(), 3)
        if len(quantizer.branches[branch].codebooks) == 1:
            assert torch.equal(scale.neighbors("code", 3).flatten(0, 1), own)
        return nearest[..., 1]

    replaced = quantizer.encode(z, edit)
    sizes = [height * width for height, width in quantizer.grids]
    assert seen == [(branch, size) for branch in range(branches) for size in sizes]
    clean = quantizer.encode(z)
    assert (replaced != clean)[..., : sizes[0]].all()
    assert torch.equal(quantizer.encode(z, lambda branch, scale: scale.tokens), clean)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("structure", SEVERAL_SCALES)
def test_quantizer_dropout(codebook, structure):
    quantizer = build(codebook, structure, 2, dropout=1.0, dropout_start=2)
    scales = len(quantizer.grids)
    z = latent(quantizer, 8)
    out = copy.deepcopy(quantizer).train()(z, IndexedRng(0, torch.arange(8)))
    assert out.depths.min() >= 2 and out.depths.max() <= scales and len(out.depths.unique()) > 1
    assert_close(out.z_q.detach(), quantizer.decode(out.tokens, out.depths).detach(), atol=1e-6)
    for image, depth in enumerate(out.depths.tolist()):
        part = quantizer.partial_decode(out.tokens[image : image + 1], depth)
        assert_close(out.z_q[image : image + 1].detach(), part.detach(), atol=1e-6)
    assert torch.equal(out.tokens, quantizer.eval().encode(z)), "all tokens are made whatever is dropped"
    assert quantizer(z).depths is None


def losses_and_gradients(branch, z, depths, chosen=slice(None)):
    """Of a copy of a branch on chosen images: losses, and gradients of their sum at every parameter and at z."""
    branch, z = copy.deepcopy(branch), z.clone().requires_grad_()
    losses = branch(z[chosen], depths[chosen]).losses
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in branch.named_parameters() if p.grad is not None}
    return {**losses, **gradients, "z": z.grad}


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("structure", SEVERAL_SCALES)
def test_dropped_scales_train_nothing(codebook, structure):
    """Losses and gradients are those of the images that keep a scale, whatever the others are."""
    quantizer = build(codebook, structure, 1).train()
    branch, z = quantizer.branches[0], latent(quantizer, 6)
    depths = torch.tensor([1, 3, 1, 3, 3, 1])  # the last scale of four is kept by none
    found = losses_and_gradients(branch, z, depths)
    every, some = depths.clamp(max=1), depths == 3
    coarse, fine = losses_and_gradients(branch, z, every), losses_and_gradients(branch, z, depths, some)
    shared = losses_and_gradients(branch, z, every, some)  # the coarsest scale, which `fine` has, too
    for name, value in found.items():
        if value is not None:
            assert_close(value, coarse[name] + fine[name] - shared[name], atol=1e-5)
    points, scales = branch._project(z), len(branch.grids)  # with depth 1, the first scale's losses are all there is
    if branch.codebooks[0].carries_gradient:
        first = rows_of(F.interpolate(points, branch.grids[0], mode="area"))
        expected = branch.codebooks[0](first).losses
    else:
        tokens = branch.encode(z)
        expected = {"commitment": F.mse_loss(points, branch.decode(tokens, every))}
    for name, value in expected.items():
        assert_close(coarse[name] * scales, value, atol=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("structure", SEVERAL_SCALES)
@pytest.mark.parametrize("branches", [1, 2])
def test_next_scale_interface(codebook, structure, branches):
    quantizer = build(codebook, structure, branches).eval()
    tokens = quantizer.encode(latent(quantizer))
    sizes = [height * width for height, width in quantizer.grids]
    inputs = quantizer.next_scale_input(tokens)
    assert inputs.shape == (4, sum(sizes[1:]), quantizer.dim)
    summed, made = torch.zeros(4, quantizer.dim, *GRID), []
    for scale, part in enumerate(tokens.split(sizes, dim=2)):
        before = summed.clone()
        new, following = quantizer.advance(summed, quantizer.embed(part, scale), scale)
        assert torch.equal(summed, before), "the caller's sum must stay as it is"
        summed = new
        assert_close(summed, quantizer.partial_decode(tokens, scale + 1), atol=1e-6)
        if following is not None:
            assert following.shape == (4, sizes[scale + 1], quantizer.dim)
            made.append(following)
    assert following is None and len(made) == len(sizes) - 1
    assert torch.equal(torch.cat(made, dim=1), inputs)
    assert_close(summed, quantizer.decode(tokens), atol=1e-6)


@pytest.mark.parametrize("branches", [1, 2])
def test_next_scale_interface_needs_scales(branches):
    quantizer = build("vq", "single", branches)
    tokens = quantizer.encode(latent(quantizer))
    for call in (
        lambda: quantizer.next_scale_input(tokens),
        lambda: quantizer.partial_decode(tokens, 1),
        lambda: quantizer.embed(tokens, 0),
        lambda: quantizer.advance(torch.zeros(4, quantizer.dim, *GRID), torch.zeros(4, 15, quantizer.dim), 0),
    ):
        with pytest.raises(ConfigError, match="quantizer=multiscale"):
            call()


class Autoencoder(nn.Module):
    """Linear encoder and decoder around a quantizer."""

    def __init__(self, quantizer, channels: int):
        super().__init__()
        self.encoder, self.quantizer = nn.Conv2d(channels, quantizer.dim, 1), quantizer
        self.decoder = nn.Conv2d(quantizer.dim, channels, 1)

    def loss(self, images):
        out = self.quantizer(self.encoder(images))
        weights = {"commitment": 0.25, "entropy_sample": 0.01, "entropy_batch": 0.01}
        extra = sum(weights.get(name, 1.0) * value for name, value in out.losses.items())
        return F.mse_loss(self.decoder(out.z_q), images), extra


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_learns_a_batch(codebook, structure):
    torch.manual_seed(0)
    model = Autoencoder(build(codebook, structure, 1), 3)
    images = torch.randn(2, 3, *GRID)
    start = model.eval().loss(images)[0].item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        reconstruction, extra = model.loss(images)
        (reconstruction + extra).backward()
        optimizer.step()
    assert model.eval().loss(images)[0].item() < 0.6 * start


def train_on_both(rank: int, world: int, z: torch.Tensor) -> dict[str, list]:
    """State of every updating combination after three steps on this rank's share of each batch."""
    states = {}
    for codebook, structure, branches in COMBINATIONS:
        if CODEBOOKS[codebook].updates:
            torch.manual_seed(0)
            quantizer = build(codebook, structure, branches).train()
            for batch in z:
                quantizer(batch[:, : quantizer.dim].chunk(world)[rank])
            state = {name: value.tolist() for name, value in quantizer.state_dict().items()}
            states[f"{codebook}/{structure}/{branches}"] = state
    return states


def test_two_processes_agree():
    z = torch.randn(3, 4, 16, *GRID)
    first, second = run_forked(train_on_both, z)
    assert first == second
    assert first
    alone = train_on_both(0, 1, z)
    for name, state in first.items():
        if "revival" in name:  # which random vector a code gets depends on the order of the joint batch
            continue
        for key, value in state.items():
            assert_close(torch.tensor(value), torch.tensor(alone[name][key]), atol=1e-5, rtol=1e-4)


def test_registry_is_what_there_is():
    """No codebook or structure of the package is left out."""
    from tessera import quantizers

    built = {type(build(c, "single", 1).branches[0].codebooks[0]) for c in CODEBOOKS}
    structures = {type(build("vq", s, 1).branches[0]) for s in STRUCTURES}
    for name in quantizers.__all__:
        value = getattr(quantizers, name)
        if isinstance(value, type) and issubclass(value, quantizers.Codebook) and value is not quantizers.Codebook:
            assert value in built, name
        if isinstance(value, type) and issubclass(value, quantizers.Structure) and value is not quantizers.Structure:
            assert value in structures, name
