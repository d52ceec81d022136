"""Which crops of an image are stored, and what determines the random ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import Squares, image_folder
from tessera.data import DigitsImages, FolderImages, TokenCache, build_token_cache
from tessera.data.transforms import random_crop_adm, sample_random
from tessera.data.views import Views
from tessera.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(("kind", "count"), [("none", 1), ("flip", 2), ("ten_crop", 10)])
def test_fixed_sets_have_their_number(kind, count):
    assert Views.of(kind) == Views.of(kind, count, seed=5) == Views(kind, count)
    with pytest.raises(ConfigError, match=rf"tokens\.views={kind} has {count} views .*tokens\.num_views=3"):
        Views.of(kind, 3)


@pytest.mark.parametrize("number", [None, 0])
def test_random_views_need_a_number(number):
    with pytest.raises(ConfigError, match=rf"tokens\.num_views={number} must be at least 1"):
        Views.of("random", number)


def test_random_views_are_fixed_by_seed_image_and_view(tmp_path):
    images = FolderImages("train", image_folder(tmp_path), 16)
    four = images.views(3, Views.of("random", 4))["image"]
    assert torch.equal(images.views(3, Views.of("random", 2))["image"], four[:2])
    other = FolderImages("train", tmp_path, 16, seed=7)  # of the augmentation in training
    assert torch.equal(other.views(3, Views.of("random", 4))["image"], four)
    stacks = [four, images.views(2, Views.of("random", 4))["image"], images.views(3, Views.of("random", 4, 1))["image"]]
    views = torch.cat(stacks)
    assert len({tuple(view.flatten().tolist()) for view in views}) == len(views)


def test_random_views_are_the_crops_of_training(tmp_path):
    images = FolderImages("train", image_folder(tmp_path), 16, random_crop="position", flip=False, seed=3)
    assert images.random_view_id == "position"
    for epoch in range(3):
        assert torch.equal(images[epoch, 1]["image"], images.views(1, Views.of("random", 3, 3))["image"][epoch])


def test_images_that_training_does_not_augment_get_adms_crops():
    images, seen = DigitsImages("train", 16), set()
    views = images.views(4, Views.of("random", 12, 2))["image"]
    picture = Image.fromarray(images.pixels[4]).convert("RGB")
    for number, view in enumerate(views):
        rng = sample_random(2, number, 4)
        crop = torch.from_numpy(np.array(random_crop_adm(picture, 16, rng)))[..., 0]
        flipped = rng.random() < 0.5
        assert torch.equal(view[0], (crop.flip(1) if flipped else crop).float() / 127.5 - 1)
        seen.add(flipped)
    assert seen == {True, False}


def test_views_that_would_be_alike_are_refused(tmp_path):
    images = FolderImages("train", image_folder(tmp_path / "images"), 16, random_crop=False, flip=False)
    with pytest.raises(ConfigError, match=r"tokens\.views=random needs data\.dataset\.random_crop"):
        build(tmp_path / "c", images, Views.of("random", 2))


def build(folder, images, views):
    def encode(batch):
        return (batch["image"].flatten(1).sum(1).abs() * 10).long().view(-1, 1, 1) % 999

    return build_token_cache(
        folder, images, encode, tokenizer_fingerprint="t", codebook_size=999, shape=(1, 1), views=views, batch_size=7
    )


def test_caches_of_other_views_are_other_caches(tmp_path):
    images = Squares("train", 9)
    folder = build(tmp_path / "c", images, Views.of("random", 3, 1))
    cache = TokenCache.open(folder)
    assert len(cache) == 27 and cache.rows([26])["index"].item() == 26 and cache.rows([26])["label"].item() == 8 % 3
    assert cache.manifest.view_set == Views("random", 3, 1)
    for other, named in [
        (Views.of("random", 4, 1), "num_views is 3, not 4"),
        (Views.of("random", 3, 2), "views_seed is 1, not 2"),
        (Views.of("flip"), "extra.random_views is 'adm.flip', not None"),
    ]:
        with pytest.raises(CheckpointError, match=named):
            build(tmp_path / "c", images, other)
