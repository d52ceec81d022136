"""Where a token cache gets its name: from what determines its content."""

from stage_setup import DIGITS, tokenizer
from tessera.data.views import Views
from tessera.run.tokens import tokens_of_images


def test_a_cache_is_named_by_its_content(tmp_path):
    def name(split="val", seed=0, views="none", batch_size=64):
        return tokens_of_images(tmp_path, DIGITS(split=split), tokenizer(seed), views, batch_size).folder.name

    assert name() == name(batch_size=7)
    others = [name(split="train"), name(seed=1), name(views="flip"), name(views=Views.of("random", 2, 5))]
    assert len({name(), *others}) == 5
