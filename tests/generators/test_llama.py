"""Llama: sizes, initialisation, training loss, branches and scales, options that are refused."""

from functools import partial

import pytest
import torch
from torch import nn

from generators.llama_reference import small_llama
from tessera.errors import CheckpointError, ConfigError
from tessera.generators import Llama, scores
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import IndexedRng

SCALES = {"num_tokens": 9, "grids": [(1, 1), (2, 2), (1, 4)]}


def batch(count=4, branches=1, size=11, length=9, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, size, (count, branches, length), generator=generator)
    return tokens, torch.randint(0, classes, (count,), generator=generator)


def quantizer(grids, branches=1, size=11):
    structure = SingleGridQuantizer if grids is None else partial(MultiScaleQuantizer, grids=grids)
    branch = partial(structure, codebook=partial(VQCodebook, codebook_size=size))
    product = ProductQuantizer(branch=branch, branches=branches, dim=4 * branches)
    if grids is None:
        product.bind_grid((1, 9))
    return product


@pytest.mark.parametrize(("hidden", "mlp"), [(1024, 2816), (1280, 3584), (1536, 4096), (1920, 5120), (384, 1024)])
def test_mlp_size_follows_from_the_width(hidden, mlp):
    with torch.device("meta"):
        model = Llama(16, 4, 2, [2], hidden_size=hidden, depth=1, num_heads=hidden // 64)
        given = Llama(16, 4, 2, [2], hidden_size=hidden, depth=1, num_heads=4, mlp_size=24)
    assert model.blocks[0].feed_forward.w1.out_features == mlp
    assert given.blocks[0].feed_forward.w2.in_features == 24


def test_initialisation():
    model = Llama(64, 16, 10, [(2, 2), (3, 4)], hidden_size=64, depth=2, num_heads=4, gate_init=1e-2)
    for name, parameter in model.named_parameters():
        if name == "head.weight" or name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.startswith("blocks") and "ada_lin" in name:
            assert parameter[:128].std().item() == pytest.approx(2e-4, rel=0.1), name
            assert parameter[128:].std().item() == pytest.approx(0.01, rel=0.1), name
        else:
            assert parameter.std().item() == pytest.approx(0.01 if "ada_lin" in name else 0.02, rel=0.2), name


@pytest.mark.parametrize("scales", [{}, SCALES])
def test_loss_equals_per_branch_cross_entropy(scales):
    model = small_llama(num_branches=3, **scales)
    tokens, labels = batch(branches=3)
    logits = model(tokens, labels)[:, :-1]
    losses = torch.stack(
        [nn.functional.cross_entropy(logits[:, :, p].transpose(1, 2), tokens[:, p], reduction="none") for p in range(3)]
    ).transpose(0, 1)
    hits = (logits.argmax(-1).transpose(1, 2) == tokens).float()
    result = model.loss(tokens, labels)
    torch.testing.assert_close(result["loss"], losses.mean())
    torch.testing.assert_close(result["accuracy"], hits.mean())
    torch.testing.assert_close(result["site_loss"], losses.sum(0).detach())
    torch.testing.assert_close(result["site_hits"], hits.sum(0))
    assert torch.equal(result["site_count"], torch.full((3, 9), 4.0))


@pytest.mark.parametrize("branches", [1, 2])
def test_large_heads_are_taken_by_tiles(branches, monkeypatch):
    """The same loss and gradients whether or not the logits are made at once."""
    tokens, labels = batch(branches=branches)
    results = []
    for budget in (2**40, 4 * 4 * 9 * 5):
        monkeypatch.setattr(scores, "TILE_BYTES", budget)
        model = small_llama(num_branches=branches)
        result = model.loss(tokens, labels)
        result["loss"].backward()
        results.append((result, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*results)


def test_every_branch_is_fed_back_to_later_tokens_only():
    model = small_llama(num_branches=2)
    tokens, labels = batch(branches=2)
    before = model(tokens, labels)
    for branch in range(2):
        changed = tokens.clone()
        changed[:, branch, 3] = (changed[:, branch, 3] + 1) % 11
        after = model(changed, labels)
        assert torch.equal(before[:, :4], after[:, :4])
        assert ((before[:, 4:] - after[:, 4:]).abs().amax((0, 1, 3)) > 1e-4).all()


def test_branches_have_their_own_embeddings():
    model = small_llama(num_branches=2)
    embedded = model.embed_tokens(torch.tensor([[[3], [5]], [[5], [3]]]))
    torch.testing.assert_close(embedded[0, 0], model.tok_emb.weight[3] + model.tok_emb.weight[11 + 5])
    assert not torch.allclose(embedded[0], embedded[1])


def test_scales_have_vectors_only_where_there_are_several():
    assert small_llama().levels() is None and "level_emb.weight" not in small_llama().state_dict()
    model = small_llama(**SCALES)
    assert torch.equal(model.levels(), model.level_emb.weight[[0, 1, 1, 1, 1, 2, 2, 2, 2]])
    # two equal grids: only these vectors tell which of them a token belongs to
    model = small_llama(num_tokens=4, grids=[(1, 2), (1, 2)])
    tokens, labels = batch(length=4)
    before = model(tokens, labels)
    with torch.no_grad():
        model.level_emb.weight[1] += 1
    assert torch.equal(model(tokens, labels)[:, :3], before[:, :3])
    assert not torch.allclose(model(tokens, labels)[:, 3:], before[:, 3:])


def test_a_tokens_cell_matters():
    """The same tokens on another grid of as many cells give other logits."""
    tokens, labels = batch(length=8)
    wide, tall = (small_llama(num_tokens=8, grids=grids) for grids in ([(2, 4)], [(4, 2)]))
    assert not torch.allclose(wide(tokens, labels)[:, 4:], tall(tokens, labels)[:, 4:], atol=1e-3)


def test_sizes_come_from_the_tokenizer():
    multi = quantizer([1, 2], branches=2)
    sizes = Llama.sizes(multi, 4)
    expected = {"codebook_size": 11, "num_tokens": 5, "num_branches": 2, "num_classes": 4, "grids": [(1, 1), (2, 2)]}
    assert sizes == expected
    model = Llama(**sizes, hidden_size=16, depth=1, num_heads=2)
    model.bind(multi)
    with pytest.raises(CheckpointError, match=r"grids=\[\(1, 1\), \(2, 2\)\] where the tokenizer has \[\(1, 9\)\]"):
        model.bind(quantizer(None, branches=2))
    # as they come back from JSON
    Llama(**{**sizes, "grids": [[1, 1], [2, 2]]}, hidden_size=16, depth=1, num_heads=2).bind(multi)
    assert Llama.sizes(quantizer(None), 4)["grids"] == [(1, 9)]


@pytest.mark.parametrize("place", ["token_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(place):
    off = dict.fromkeys(("token_dropout", "residual_dropout", "mlp_dropout", "class_dropout"), 0.0)
    tokens, labels = batch()
    expected = small_llama(**off).train().loss(tokens, labels)["loss"]
    model = small_llama(**off | {place: 0.5})
    torch.testing.assert_close(model.loss(tokens, labels)["loss"], expected)
    model.train()
    losses = [model.loss(tokens, labels)["loss"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_condition_is_not_dropped_out_of_the_modulation():
    """Token dropout touches the sequence; with all of it gone the class still speaks through the blocks."""
    model = small_llama(token_dropout=0.999, residual_dropout=0.0, mlp_dropout=0.0, class_dropout=0.0).train()
    tokens, _ = batch(1)
    logits = model(tokens.expand(4, -1, -1), torch.arange(4))
    assert (logits.std(0) > 0.01).any()


def test_labels_are_dropped_at_the_given_rate():
    model = small_llama(class_dropout=0.25, num_tokens=1, grids=[1]).train()
    seen = []
    model.class_emb.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tokens, labels = batch(4000, length=1)
    with torch.no_grad():
        model.loss(tokens, labels, rng=IndexedRng(0, torch.arange(4000)))
    dropped = seen[0] == model.none_id
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_half_precision_keeps_rotation_in_float32():
    model = small_llama()
    tokens, labels = batch()
    expected = model.loss(tokens, labels)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.loss(tokens, labels)["loss"]
    model = model.to(torch.bfloat16)
    assert model.rotation().dtype == torch.float32
    for loss in (autocast, model.loss(tokens, labels)["loss"]):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"num_branches": 0}, "num_branches"),
        ({"num_classes": 0}, "num_classes"),
        ({"hidden_size": 15}, "num_heads"),
        ({"hidden_size": 20}, "num_heads"),  # heads of 10 channels
        ({"depth": 0}, "depth"),
        ({"mlp_size": 0}, "mlp_size"),
        ({"mlp_multiple": 0}, "mlp_multiple"),
        ({"token_dropout": 1.0}, "token_dropout"),
        ({"residual_dropout": -0.1}, "residual_dropout"),
        ({"mlp_dropout": 1.5}, "mlp_dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"gate_init": 0.0}, "gate_init"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"grids": [(2, 4)]}, "grids"),
        ({"grids": [(0, 9)]}, "grids"),
    ],
)
def test_bad_option_is_refused_by_its_key(setting, key):
    with pytest.raises(ConfigError, match=f"generator.{key}="):
        small_llama(**setting)
