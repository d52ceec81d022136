"""Layers: the cached pass equals the plain one, and the formulas hold."""

import pytest
import torch
import torch.nn.functional as F

from tessera.generators.cache import KVCache
from tessera.generators.compilation import Slots
from tessera.generators.layers import AdaptiveBlock, AdaptiveNorm, Attention


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module.eval()


def cache(rows=2, length=9, layers=1, dtype=torch.float32):
    store = KVCache(layers, rows, 3, length, 4, dtype, torch.device("cpu"))
    store.keys.fill_(float("nan"))  # a position that wasn't written must not be read
    store.values.fill_(float("nan"))
    return store


def test_attention_is_the_formula():
    layer = randomised(Attention(12, 3))
    x = torch.randn(2, 5, 12)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    scores = layer.q_norm(q) @ layer.k_norm(k).transpose(-1, -2) / 2
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(layer(x), expected)


def test_attention_with_cache_in_any_pieces():
    layer = randomised(Attention(12, 3))
    x = torch.randn(2, 9, 12)
    expected = layer(x)
    for pieces in ([9], [2, 1, 1, 1, 1, 1, 1, 1], [1, 4, 3, 1]):
        store, position, outputs = cache(), 0, []
        for length in pieces:
            outputs.append(layer(x[:, position : position + length], store, 0, position))
            position += length
        torch.testing.assert_close(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_at_slots(dtype):
    """Steps at tensor positions, under a mask over whole buckets, are those at numbers."""
    layer = randomised(Attention(12, 3)).to(dtype)
    x = torch.randn(2, 9, 12, dtype=dtype)
    slots = Slots(9, torch.device("cpu"), bucket=4)
    assert slots.length == 12 and [slots[p].visible.shape[1] for p in (0, 3, 4, 8)] == [4, 4, 8, 12]
    store = KVCache(1, 2, 3, slots.length, 4, dtype, torch.device("cpu"))
    outputs = [layer(x[:, :2], store, 0, 0)] + [layer(x[:, p : p + 1], store, 0, slots[p]) for p in range(2, 9)]
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x))


def test_cache_is_written_in_place_and_layers_are_apart():
    store = cache(layers=2)
    addresses = store.keys.data_ptr(), store.values.data_ptr()
    keys, values = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    seen_keys, seen_values = store.write(1, 0, keys, values)
    assert torch.equal(seen_keys, keys) and torch.equal(seen_values, values)
    more, _ = store.write(1, 2, keys[:, :, :1], values[:, :, :1])
    assert torch.equal(more, torch.cat([keys, keys[:, :, :1]], 2))
    assert store.keys[0].isnan().all()
    assert (store.keys.data_ptr(), store.values.data_ptr()) == addresses
    assert more.untyped_storage().data_ptr() == addresses[0]


def test_attention_dropout_in_training_only():
    layer = randomised(Attention(12, 3, dropout=0.0, attention_dropout=0.5))
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_block_is_the_identity_at_initialisation():
    block = AdaptiveBlock(12, 3, 20)
    x = torch.randn(2, 5, 12)
    assert torch.equal(block(x, torch.randn(2, 5, 12)), x)


def test_block_extends_as_it_runs():
    block = randomised(AdaptiveBlock(12, 3, 20))
    x, activated = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    expected = block(x, activated)
    store, modulation = cache(), block.modulation(activated)
    outputs = [block.extend(x[:, i : i + 1], modulation[:, i : i + 1], store, 0, i) for i in range(6)]
    torch.testing.assert_close(torch.cat(outputs, 1), expected)


def test_final_norm_takes_scale_before_shift():
    norm = randomised(AdaptiveNorm(12))
    x, activated = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    scale, shift = norm.adaLN_modulation[1](activated).split(12, -1)
    torch.testing.assert_close(norm(x, activated), F.layer_norm(x, (12,), eps=1e-6) * (1 + scale) + shift)
