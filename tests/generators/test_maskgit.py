"""MaskGIT: embeddings, masks and loss of training; inputs that are refused."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from generators.maskgit_reference import KINDS, SMALL, small_maskgit
from tessera.errors import ConfigError
from tessera.generators import MaskGITUViT, MaskGITViT
from tessera.generators.maskgit_layers import PostNormBlock, PreNormBlock
from tessera.rng import IndexedRng

kinds = pytest.mark.parametrize("kind", KINDS)
K, L = SMALL["codebook_size"], SMALL["num_tokens"]


def batch(branches=1, count=4, seed=0):
    """Tokens (B, P, L), masks (B, P, L) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, branches, L)
    tokens = torch.randint(0, K, shape, generator=generator)
    return tokens, torch.rand(shape, generator=generator) < 0.5, torch.arange(count) % SMALL["num_classes"]


@kinds
def test_initialisation(kind):
    model = kind(**{**SMALL, "hidden_size": 64, "codebook_size": 64, "depth": 1, "num_tokens": 32})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@kinds
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.1, 0.1), (0.3, 1.0)])
def test_loss_is_the_weighted_cross_entropy(kind, branches, smoothing, weight):
    model = small_maskgit(kind, num_branches=branches, label_smoothing=smoothing, unmasked_weight=weight)
    tokens, masked, labels = batch(branches)
    result = model.masked_loss(tokens, masked, model.condition_ids(labels))
    total, weights, hits = 0.0, 0.0, []
    logits = model(tokens, masked, model.condition_ids(labels))
    for b, p, place in torch.cartesian_prod(torch.arange(4), torch.arange(branches), torch.arange(L)).tolist():
        row, target, is_masked = logits[b, place, p], tokens[b, p, place], masked[b, p, place].item()
        share = 1.0 if is_masked else weight
        total += share * F.cross_entropy(row, target, label_smoothing=smoothing)
        weights += share
        if is_masked:
            hits.append(row.argmax() == target)
    torch.testing.assert_close(result["loss"], total / weights)
    assert result["accuracy"].item() == pytest.approx(sum(hits).item() / len(hits))
    assert torch.equal(result["site_count"], masked.sum(0).float())


@kinds
def test_masked_tokens_are_not_seen(kind):
    """Logits depend on every unmasked token, at every position, and on no masked one."""
    model = small_maskgit(kind, num_branches=2)
    with torch.no_grad():
        model.embeddings.weight.normal_()
    tokens, masked, labels = batch(2)
    conditions = model.condition_ids(labels)
    before = model(tokens, masked, conditions)
    for branch in range(2):
        for place in range(L):
            changed = tokens.clone()
            changed[:, branch, place] = (tokens[:, branch, place] + 1) % K
            after = model(changed, masked, conditions)
            hidden = masked[:, branch, place]
            assert torch.equal(after[hidden], before[hidden])
            assert ((after - before)[~hidden].abs().amax((-1, -2)) > 1e-6).all()


def test_embeddings_of_branches():
    """The tables of the branches lie one after another, and a masked token of any branch is the mask's row."""
    model = small_maskgit(MaskGITViT, num_branches=2)
    table = model.embeddings.weight
    embedded = model.embed_tokens(torch.tensor([[[3], [5]]]), torch.tensor([[[False], [True]]]))
    torch.testing.assert_close(embedded[0, 0], table[3] + table[2 * K])
    embedded = model.embed_tokens(torch.tensor([[[3], [5]]]), torch.tensor([[[False], [False]]]))
    torch.testing.assert_close(embedded[0, 0], table[3] + table[K + 5])
    ids = model.condition_ids(torch.tensor([0, 3]), torch.tensor([False, True]))
    assert ids.tolist() == [2 * K + 1, len(table) - 1]


class Given:
    """Draws that are given."""

    def __init__(self, share, order):
        self.draws = {"mask/share": share, "mask/order": order}

    def uniform(self, stream, *shape):
        return self.draws[stream].view(-1, *shape)


@pytest.mark.parametrize("branches", [1, 2])
def test_masks_follow_the_arccos_schedule(branches):
    model = small_maskgit(MaskGITViT, num_branches=branches)
    share = torch.tensor([0.0, 0.25, 0.5, 0.9, 1 - 2**-24])
    order = torch.rand(5, branches * L)
    masked = model.draw_masks(Given(share, order), torch.device("cpu"))
    total = branches * L
    expected = [max(1, round(total * math.acos(u) / (math.pi / 2))) for u in share.tolist()]
    assert masked.flatten(1).sum(1).tolist() == expected
    assert expected[0] == total and expected[-1] == 1


def test_masks_of_training_are_random_over_branches_and_places():
    model = small_maskgit(MaskGITViT, num_branches=2)
    masked = model.draw_masks(IndexedRng(0, torch.arange(4000)), torch.device("cpu")).float()
    mean = 2 / math.pi  # of arccos(u) / (pi / 2)
    assert masked.mean().item() == pytest.approx(mean, abs=0.02)
    torch.testing.assert_close(masked.mean(0), torch.full((2, L), mean), atol=0.03, rtol=0)
    # drawn apart in the two branches of a position
    assert (masked[:, 0] != masked[:, 1]).float().mean() > 0.2


@kinds
def test_masks_of_evaluation_belong_to_samples(kind):
    model = small_maskgit(kind, num_branches=2)
    tokens, _, _ = batch(2, count=64)
    masked = model.fixed_masks(tokens)
    assert torch.equal(model.fixed_masks(tokens[5:9]), masked[5:9])
    assert len(masked.flatten(1).unique(dim=0)) > 32
    assert 0.5 < masked.float().mean() < 0.75


@kinds
def test_training_drops_labels_and_masks_at_random(kind):
    model = small_maskgit(kind, class_dropout=1.0, **NO_DROPOUT)
    tokens, _, labels = batch()
    rng = IndexedRng(0, torch.arange(4))
    masked = model.draw_masks(rng, tokens.device)
    without = model.masked_loss(tokens, masked, torch.full((4,), model.none_id))["loss"]
    torch.testing.assert_close(model.train().loss(tokens, labels, rng=rng)["loss"], without)
    fixed = model.eval().masked_loss(tokens, model.fixed_masks(tokens), model.condition_ids(labels))["loss"]
    assert torch.equal(model.loss(tokens, labels, rng=rng)["loss"], fixed)
    assert not torch.allclose(fixed, without)


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


@kinds
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_dropouts_are_applied_in_training_only(kind, name):
    tokens, masked, labels = batch()
    model = small_maskgit(kind, **{**NO_DROPOUT, name: 0.5})
    inputs = (tokens, masked, model.condition_ids(labels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        assert torch.equal(model(*inputs), model(*inputs))
        model.train()
        assert not torch.allclose(model(*inputs), model(*inputs))
        plain = small_maskgit(kind, **NO_DROPOUT).train()
        assert torch.equal(plain(*inputs), plain(*inputs))


def test_published_dropouts_are_the_defaults():
    for kind, expected in ((MaskGITViT, 0.1), (MaskGITUViT, 0.0)):
        model = small_maskgit(kind)
        assert {block.attn.attention_dropout for block in model.blocks} == {expected}
        assert {block.attn.proj_drop.p for block in model.blocks} == {expected}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *((kind, {name: 0}, f"generator.{name}=0 must be at least 1") for kind in KINDS for name in SMALL),
        (MaskGITViT, {"depth": 0}, "generator.depth=0 must be at least 1"),
        (MaskGITUViT, {"depth": 4}, "generator.depth=4 must be odd"),
        (MaskGITViT, {"num_heads": 3}, "generator.num_heads=3 does not divide generator.hidden_size=16"),
        (MaskGITViT, {"dropout": 1.0}, "generator.dropout=1.0 is outside"),
        (MaskGITUViT, {"attention_dropout": -0.1}, "generator.attention_dropout=-0.1 is outside"),
        (MaskGITViT, {"class_dropout": 1.5}, "generator.class_dropout=1.5 is outside"),
        (MaskGITViT, {"label_smoothing": 1.0}, "generator.label_smoothing=1.0 is outside"),
        (MaskGITViT, {"unmasked_weight": -1.0}, "generator.unmasked_weight=-1.0 must be at least 0"),
        (MaskGITViT, {"unmasked_weight": math.nan}, "generator.unmasked_weight=nan must be at least 0"),
    ],
)
def test_bad_sizes_are_refused(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        small_maskgit(kind, **change)


@pytest.mark.parametrize("make", [PostNormBlock, partial(PreNormBlock, has_skip=False)])
def test_dropout_is_applied_to_both_branches_of_a_block(make):
    x = torch.randn(2, 5, 16)
    for branch in ("attn.proj", "mlp.fc2"):
        block = make(16, 2, 24, dropout=0.5).train()
        other = block.get_submodule(branch)
        torch.nn.init.zeros_(other.weight)
        torch.nn.init.zeros_(other.bias)
        assert not torch.allclose(block(x), block(x)), f"no dropout beside {branch}"
