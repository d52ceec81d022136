"""Token caches from the command line, and training on a cache that exists already."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from forked import run_forked
from run.checkpoints import CONF, generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import tokenizer
from tessera import distributed
from tessera.data import DigitsImages, TokenCache
from tessera.data.views import Views
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.run.build import read_checkpoint
from tessera.run.pretokenize import Pretokenize
from tessera.run.tokens import build_tokens, tokens_of_images
from tessera.run.train import train

QUICK = [
    "experiment=digits/generator",
    "logger=none",
    "callbacks=training",
    "trainer.max_steps=2",
    "+trainer.limit_val_batches=1",
    "generator.depth=1",
    "generator.hidden_size=16",
    "generator.num_heads=2",
    "scheduler.warmup_steps=0",
]


def train_generator(outputs, tokenizer_path, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        chosen = [*QUICK, f"paths.outputs={outputs}", f"tokenizer.path={tokenizer_path}", *overrides]
        return train(compose("train", overrides=chosen))


def caches(outputs):
    return sorted((outputs / "tokens").iterdir()) if (outputs / "tokens").exists() else []


@pytest.mark.parametrize(("views", "count"), [("none", 1), ("flip", 2), ("ten_crop", 10), ("random", 3)])
def test_each_view_is_tokenised(tmp_path, views, count):
    chosen = [f"task.views={views}", *[f"task.num_views={count}", "task.seed=5"] * (views == "random")]
    made = run(tmp_path, f"ckpt={tokenizer_checkpoint(tmp_path)}", "task=pretokenize", "task.split=val", *chosen)
    (folder,) = caches(tmp_path)
    assert made["token_cache"] == str(folder) and made["rows"] == 359 * count
    content = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert content["manifest"]["views"] == views and content["figures"] == []
    cache = TokenCache.open(folder, tokenizer_fingerprint=tokenizer().fingerprint())
    images = DigitsImages("val", 16).views(7, Views.of(views, count, 5))["image"]
    assert cache.rows(range(7 * count, 8 * count))["tokens"].equal(tokenizer().eval().tokenize(images))


def test_training_finds_what_pretokenisation_made(tmp_path):
    path, chosen = tokenizer_checkpoint(tmp_path), ("views=random", "num_views=2", "seed=5")
    run(tmp_path, f"ckpt={path}", "task=pretokenize", *[f"task.{text}" for text in chosen])
    (folder,) = caches(tmp_path)
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    train_generator(tmp_path, path, "name=g", *[f"tokens.{text}" for text in chosen])
    assert caches(tmp_path) == [folder] and (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_tokens_go_out_and_come_in_and_are_trained_on(tmp_path):
    path, lines, cache = tokenizer_checkpoint(tmp_path), tmp_path / "t.jsonl", tmp_path / "imported"
    made = run(tmp_path, f"ckpt={path}", "task=pretokenize")["token_cache"]
    export = ["task=export_tokens", f"task.path={lines}"]  # needs no checkpoint
    run(tmp_path, *export, f"task.cache={made}")
    assert len(lines.read_text().splitlines()) == 1438
    again = ["task=import_tokens", f"ckpt={path}", f"task.path={lines}", f"task.cache={cache}"]
    found = run(tmp_path, *again)
    assert found["manifest"]["num_classes"] == 10 and found["manifest"]["data"] == ""
    own, back = TokenCache.open(made), TokenCache.open(cache, tokenizer_fingerprint=tokenizer().fingerprint())
    assert (own.tokens == back.tokens).all() and (own.labels == back.labels).all()
    before = caches(tmp_path)
    weights = []
    for name, folder in (("a", made), ("b", cache)):
        path_of = train_generator(tmp_path, path, f"name={name}", f"tokens.path={folder}")["checkpoint"]
        weights.append(read_checkpoint(path_of)["state_dict"])
    assert caches(tmp_path) == before  # nothing was tokenised
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    refused = [
        (ConfigError, r"task\.path=.*t\.jsonl exists", [*export, f"task.cache={made}"]),
        (MissingFileError, r"task\.cache=/none holds no token cache", [*export, "task.cache=/none"]),
        (CheckpointError, "already holds", again),
    ]
    for error, message, overrides in refused:
        with pytest.raises(error, match=message):
            run(tmp_path, *overrides)


def test_lines_of_another_tokenizer_are_refused(tmp_path):
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"class_id": 0, "tokens": [1, 2, 3]}\n')
    chosen = ["task=import_tokens", f"ckpt={tokenizer_checkpoint(tmp_path)}", f"task.path={lines}"]
    with pytest.raises(DataError, match=r"tokens of shape \(1, 3\) per line, but the tokenizer makes \(1, 16\)"):
        run(tmp_path, *chosen, f"task.cache={tmp_path}/c")
    lines.write_text(json.dumps({"class_id": 4, "tokens": [1] * 16}))
    with pytest.raises(DataError, match=r"label 4, outside \[0, 3\)"):
        run(tmp_path, *chosen, f"task.cache={tmp_path}/c", "task.num_classes=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    path = tokenizer_checkpoint(outputs)
    images = DigitsImages("val", 16)
    images.num_classes = 11
    eleven = build_tokens(tokens_of_images(outputs / "eleven", images, tokenizer().eval(), "none", 64))
    return outputs, path, run(outputs, f"ckpt={path}", "task=pretokenize", "task.split=val")["token_cache"], eleven


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("other tokenizer", CheckpointError, r"tokens\.path=.* holds tokens of tokenizer \w+, not of \w+"),
        ("views", ConfigError, r"tokens\.views=flip has no effect on tokens\.path="),
        ("classes", ConfigError, r"tokens\.path=.* has 11 classes, but the data set digits has 10"),
        ("missing", MissingFileError, r"tokens\.path=/none holds no token cache"),
    ],
)
def test_caches_that_do_not_fit_are_refused_before_training(made, case, error, message):
    outputs, path, folder, eleven = made
    arguments = {
        "other tokenizer": (tokenizer_checkpoint(outputs, seed=5), f"tokens.path={folder}"),
        "views": (path, f"tokens.path={folder}", "tokens.views=flip"),
        "classes": (path, f"tokens.path={eleven}"),
        "missing": (path, "tokens.path=/none"),
    }
    with pytest.raises(error, match=message):
        train_generator(outputs, *arguments[case], "name=refused")


def test_a_generator_is_not_pretokenised_with(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a tokenizer's checkpoint; ckpt=.*is a generator's"):
        run(tmp_path, f"ckpt={generator_checkpoint(tmp_path)}", "task=pretokenize")


def _build(rank, world, root):
    images = DigitsImages("val", 16)
    source = tokens_of_images(root, images, tokenizer().eval(), Views.of("random", 2, 1), 64)
    folder = build_tokens(source)
    return str(folder), distributed.world_size()


def test_two_processes_share_the_work(tmp_path):
    alone, _ = _build(0, 1, tmp_path / "one")
    (folder, world), _ = run_forked(_build, tmp_path / "two")
    assert world == 2
    assert TokenCache.open(folder).manifest == TokenCache.open(alone).manifest


@pytest.mark.parametrize(
    ("chosen", "message"), [(["random"], r"task\.num_views=None"), (["five"], r"task\.views='five'")]
)
def test_impossible_views_are_named(chosen, message):
    with pytest.raises(ConfigError, match=message):
        Pretokenize("train", *chosen)
