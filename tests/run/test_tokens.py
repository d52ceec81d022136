"""Where token caches come from: images, and pairs of generated tokens with their images."""

import pytest
import torch

from stage_setup import DIGITS, generator, tokenizer
from tessera.data import TokenCache
from tessera.errors import ConfigError
from tessera.generators import SamplingConfig
from tessera.rng import IndexedRng
from tessera.run.tokens import build_tokens, tokens_of_images, tokens_of_pairs

SAMPLING = SamplingConfig(temperature=1.2)


def pairs(folder, sigma, num_images=24, seed=0):
    images = DIGITS(split="val")
    source = tokens_of_pairs(
        folder, images, tokenizer().eval(), generator().eval(), SAMPLING, sigma, seed, 10, num_images
    )
    return images, TokenCache.open(build_tokens(source)).rows(range(num_images))


def test_all_tokens_kept_are_the_images_own(tmp_path):
    images, batch = pairs(tmp_path, 1.0)
    whole = TokenCache.open(build_tokens(tokens_of_images(tmp_path, images, tokenizer().eval(), "none", 64)))
    own = whole.rows(batch["index"].tolist())
    assert torch.equal(batch["tokens"], own["tokens"]) and torch.equal(batch["label"], own["label"])
    assert len(set(batch["index"].tolist())) == 24 and batch["index"].tolist() != list(range(24))


def test_no_token_kept_is_plain_generation(tmp_path):
    _, batch = pairs(tmp_path, 0.0)
    rng = IndexedRng(0, batch["index"])
    assert torch.equal(batch["tokens"], generator().eval().generate(batch["label"], SAMPLING, rng=rng))


def test_the_kept_share_is_sigma(tmp_path):
    _, kept = pairs(tmp_path, 1.0)
    _, mixed = pairs(tmp_path, 0.7)
    agreement = (kept["tokens"] == mixed["tokens"]).float().mean()
    # generated tokens agree by chance now and then
    assert 0.62 < agreement < 0.82


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1.2,), r"pairs\.sigma=1\.2"), ((0.5, 0), r"pairs\.num_images=0"), ((0.5, 10**6), r"pairs\.num_images=1000000")],
)
def test_impossible_pairs(tmp_path, arguments, match):
    with pytest.raises(ConfigError, match=match):
        pairs(tmp_path, *arguments)


def test_other_settings_get_a_cache_of_their_own(tmp_path):
    for sigma, count, seed in ((0.5, 24, 0), (0.5, 23, 0), (0.6, 24, 0), (0.5, 24, 1)):
        pairs(tmp_path, sigma, count, seed)
    assert len(list(tmp_path.iterdir())) == 4
