"""RAR: sizes, training loss, branches, inputs that are refused."""

import pytest
import torch
from torch import nn

from generators.rar_reference import small_rar
from tessera.errors import ConfigError, DataError
from tessera.generators import RAR
from tessera.generators.orders import raster_orders, sample_orders
from tessera.rng import IndexedRng

# hidden size, depth, MLP size, codebook size -> published parameter count in millions
PUBLISHED = {
    "rar_b": (768, 24, 3072, 1024, 260.924),
    "rar_l": (1024, 24, 4096, 1024, 461.668),
    "rar_xl": (1280, 32, 5120, 1024, 955.425),
    "rar_xxl": (1408, 40, 6144, 1024, 1498.521),
    "robustok_b": (768, 24, 3072, 4096, 265.645),
    "robustok_l": (1024, 24, 4096, 4096, 467.963),
}


def batch(count=4, branches=1, size=11, length=9, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, size, (count, branches, length), generator=generator)
    return tokens, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    hidden, depth, mlp, codebook, millions = PUBLISHED[name]
    with torch.device("meta"):
        model = RAR(codebook, 256, 1000, hidden_size=hidden, depth=depth, mlp_size=mlp)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=5e-4)


def test_published_keys_and_shapes():
    """The state dict of RAR-B, key by key."""
    d, m, n, length, codes, classes = 768, 3072, 24, 256, 1024, 1000
    expected = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, length + 1024, d),
        "target_aware_pos_embed": (1, length + 1024, d),
        "timesteps_embeddings": (1, length + 100, d),
        "embeddings.weight": (codes + classes + 2, d),
        "lm_head.weight": (codes, d),
        "lm_head.bias": (codes,),
        "adaln_before_head.adaLN_modulation.1.weight": (2 * d, d),
        "adaln_before_head.adaLN_modulation.1.bias": (2 * d,),
    }
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (m, d), "mlp.fc2": (d, m)}
    linears |= {"adaLN_modulation.1": (6 * d, d)}
    for i in range(n):
        for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
            width = d // 16 if "attn" in name else d
            expected |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        for name, shape in linears.items():
            expected |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    with torch.device("meta"):
        model = RAR(codes, length, classes)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_initialisation():
    torch.manual_seed(0)
    model = RAR(64, 16, 10, hidden_size=64, depth=1, num_heads=4, mlp_size=128)
    for name, parameter in model.named_parameters():
        if name == "cls_token" or "adaLN" in name or (name.endswith("bias")):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_loss_of_an_untrained_model_is_near_uniform():
    model = RAR(50, 9, 4, hidden_size=16, depth=1, num_heads=2, mlp_size=24)
    tokens, labels = batch(size=50)
    assert model.loss(tokens, labels)["loss"].item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.1)


def test_loss_equals_per_branch_cross_entropy():
    """P branches: each head's loss, on the sum of the branches' embeddings."""
    model = small_rar(num_branches=3)
    tokens, labels = batch(branches=3)
    orders = sample_orders(IndexedRng(0, torch.arange(4)), 4, 9, 1.0, torch.device("cpu"))
    result = model.loss_in_order(tokens, model.condition_ids(labels), orders)
    losses = []
    permuted = torch.stack([tokens[b][:, orders[b]] for b in range(4)])
    logits = model(permuted, model.condition_ids(labels), orders)
    for p in range(3):
        losses.append(nn.functional.cross_entropy(logits[:, :-1, p].flatten(0, 1), permuted[:, p].flatten()))
    torch.testing.assert_close(result["loss"], torch.stack(losses).mean())
    hits = (logits[:, :-1].argmax(-1).transpose(1, 2) == permuted).float().mean()
    torch.testing.assert_close(result["accuracy"], hits)


def test_every_branch_is_fed_back():
    """Changing one branch's first token changes the logits of later tokens only, in every branch."""
    model = small_rar(num_branches=2)
    tokens, labels = batch(branches=2)
    before = model(tokens, model.condition_ids(labels))
    for branch in range(2):
        changed = tokens.clone()
        changed[:, branch, 3] = (changed[:, branch, 3] + 1) % 11
        after = model(changed, model.condition_ids(labels))
        assert torch.equal(before[:, :4], after[:, :4])
        assert ((before[:, 4:] - after[:, 4:]).abs().amax((0, 1, 3)) > 1e-4).all()


def test_branches_have_their_own_embeddings():
    model = small_rar(num_branches=2)
    ids = torch.tensor([[[3], [5]], [[5], [3]]])
    embedded = model.embed_tokens(ids)
    table = model.embeddings.weight
    torch.testing.assert_close(embedded[0, 0], table[3] + table[11 + 5])
    assert not torch.allclose(embedded[0], embedded[1])
    assert model.none_id == len(table) - 1


def test_training_draws_belong_to_samples():
    """The loss of a batch is the mean of its samples' losses, whatever the batch they come in."""
    model = small_rar(dropout=0.0, attention_dropout=0.0, class_dropout=0.5).train()
    tokens, labels = batch(6)
    index = torch.tensor([7, 3, 9, 100, 5, 0])
    whole = model.loss(tokens, labels, progress=0.6, rng=IndexedRng(1, index, step=8))["loss"]
    parts = [
        model.loss(tokens[i : i + 2], labels[i : i + 2], progress=0.6, rng=IndexedRng(1, index[i : i + 2], step=8))
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(whole, torch.stack([part["loss"] for part in parts]).mean())
    later = model.loss(tokens, labels, progress=0.6, rng=IndexedRng(1, index, step=9))["loss"]
    assert not torch.allclose(whole, later)


def test_orders_and_dropped_labels_in_training_only():
    model = small_rar(dropout=0.0, attention_dropout=0.0, class_dropout=1.0, order_anneal=(0.5, 0.75))
    tokens, labels = batch()
    raster = raster_orders(4, 9)
    with_label = model.loss_in_order(tokens, model.condition_ids(labels), raster)["loss"]
    without = model.loss_in_order(tokens, torch.full((4,), model.none_id), raster)["loss"]
    rng = IndexedRng(0, torch.arange(4))
    torch.testing.assert_close(model.loss(tokens, labels, progress=0.0, rng=rng)["loss"], with_label)
    model.train()
    torch.testing.assert_close(model.loss(tokens, labels, progress=0.75, rng=rng)["loss"], without)
    assert not torch.allclose(model.loss(tokens, labels, progress=0.0, rng=rng)["loss"], without)


def test_class_dropout_rate():
    model = small_rar(class_dropout=0.25, dropout=0.0, attention_dropout=0.0).train()
    seen = []
    model.loss_in_order = lambda tokens, conditions, orders: seen.append(conditions)
    count = 4000
    tokens, labels = batch(count)
    model.loss(tokens, labels, rng=IndexedRng(0, torch.arange(count)))
    assert (seen[0] == model.none_id).float().mean() == pytest.approx(0.25, abs=0.03)
    kept = seen[0] != model.none_id
    assert torch.equal(seen[0][kept], labels[kept] + 12)


def test_dropout_acts_in_training_only():
    model = small_rar(dropout=0.5, attention_dropout=0.0, class_dropout=0.0)
    tokens, labels = batch()
    generator = torch.Generator()
    assert model.loss(tokens, labels)["loss"] == model.loss(tokens, labels)["loss"]
    model.train()
    losses = [model.loss(tokens, labels, rng=generator.manual_seed(0))["loss"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_checkpointed_blocks_give_the_same_gradients():
    model = small_rar(dropout=0.3, attention_dropout=0.3).train()
    tokens, labels = batch()
    gradients, runs = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(model.checkpoint_blocks))
    for checkpoint_blocks in (False, True):
        model.checkpoint_blocks = checkpoint_blocks
        model.zero_grad()
        torch.manual_seed(5)  # dropout masks; recomputed from the saved state in the backward pass
        model.loss(tokens, labels, rng=IndexedRng(0, torch.arange(4)))["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert runs == [False, True, True]  # run again in the backward pass, where asked for


def test_every_used_parameter_gets_a_gradient():
    model = small_rar()
    tokens, labels = batch()
    model.loss(tokens, labels)["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("k_norm.bias"):  # shifts all scores of a query equally
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert parameter.grad.abs().max() > 1e-6, name


def test_autocast_loss_is_float32():
    model = small_rar()
    tokens, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        result = model.loss(tokens, labels)
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"], model.loss(tokens, labels)["loss"], atol=0.1, rtol=0.05)


def overfit(model, tokens, labels, steps):
    """(first, last) raster loss of training on one batch for `steps` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.eval()
    first = model.loss(tokens, labels)["loss"].item()
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        rng = IndexedRng(0, torch.arange(len(labels)), step=step)
        model.loss(tokens, labels, progress=step / steps, rng=rng)["loss"].backward()
        optimizer.step()
    model.eval()
    return first, model.loss(tokens, labels)["loss"].item()


@pytest.mark.parametrize("branches", [1, 2])
def test_learns_one_batch(branches):
    tokens, labels = batch(4, branches)
    labels = torch.arange(4)
    torch.manual_seed(0)
    model = RAR(
        11, 9, 4, num_branches=branches, hidden_size=32, depth=2, num_heads=2, mlp_size=64,
        dropout=0.0, attention_dropout=0.0, class_dropout=0.0, extra_positions=2, extra_timesteps=2,
        order_anneal=(0.3, 0.6),
    )  # fmt: skip
    first, last = overfit(model, tokens, labels, 80)
    assert first > 2.2  # ln 11 = 2.4
    assert last < 0.2


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"num_branches": 0}, "num_branches"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_classes": 0}, "num_classes"),
        ({"hidden_size": 15}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"mlp_size": 0}, "mlp_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"order_anneal": (0.7, 0.5)}, "order_anneal"),
        ({"order_anneal": (0.5, 1.5)}, "order_anneal"),
        ({"order_anneal": (0.5,)}, "order_anneal"),
        ({"extra_positions": 1}, "extra_positions"),
        ({"extra_timesteps": 0}, "extra_timesteps"),
    ],
)
def test_bad_option_is_refused_by_its_key(setting, key):
    with pytest.raises(ConfigError, match=f"generator.{key}="):
        small_rar(**setting)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, y: (t[:, :, :-1], y), "shape"),
        (lambda t, y: (t[:, 0], y), "shape"),
        (lambda t, y: (t[:3], y), "shape"),
        (lambda t, y: (t.int(), y), "int64"),
        (lambda t, y: (t + 100, y), r"token 1\d\d is outside \[0, 11\).*generator.codebook_size"),
        (lambda t, y: (t - 100, y), r"token -\d+ is outside"),
        (lambda t, y: (t, y + 4), r"label \d is outside \[0, 4\).*generator.num_classes"),
        (lambda t, y: (t, y - 4), r"label -\d is outside"),
        (lambda t, y: (t, y[:, None]), "labels have shape"),
        (lambda t, y: (t, y.float()), "labels have shape"),
    ],
)
def test_bad_batch_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        small_rar().loss(*change(*batch()))
