"""Pairs of generated tokens with their images: from every generator, in any number of processes, after any kill."""

import json
import os
import signal
from functools import partial

import pytest
import torch

from conf_commands import composed
from forked import run_forked
from generators.generator_cases import CASES, CLASSES, build, quantizer
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import DIGITS, generator, tokenizer
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.data import DigitsImages, PairStore, TokenCache, token_build
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.generators import SamplingConfig
from tessera.rng import IndexedRng
from tessera.run.pairs import Pairs, PairSettings, given_pairs, tokens_of_pairs
from tessera.run.tokens import build_tokens, tokens_of_images, weights_fingerprint
from tessera.tokenizers import Tokenizer

SAMPLING = SamplingConfig(temperature=1.2)


def source(root, model=None, sampling=SAMPLING, batch_size=10, **settings):
    """Of 24 validation digits, with the tiny models."""
    settings = PairSettings(**{"num_images": 24, **settings})
    models = tokenizer().eval(), model or generator().eval()
    return tokens_of_pairs(root, DIGITS(split="val"), *models, sampling, settings, batch_size)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


def tokenizer_for(name, branches):
    """Makes the tokens of a generator case, of images of 12 pixels."""
    torch.manual_seed(0)
    size = {"channels": 4, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 2}
    made = quantizer(CASES[name].multiscale, branches)
    return Tokenizer(CNNEncoder(**size), made, CNNDecoder(**size), 12).eval()


class FewClasses(DigitsImages):
    """Digits modulo the classes of the generator cases."""

    def __init__(self):
        super().__init__("val", 12)
        self.num_classes = CLASSES

    def label(self, number):
        return super().label(number) % CLASSES


@pytest.mark.parametrize(
    ("name", "branches"), [("rar", 2), ("rar_random", 1), ("llama", 1), ("maskgit", 2), ("maskgit_uvit", 1), ("var", 2)]
)
def test_every_generator(tmp_path, name, branches):
    model, made, images = build(name, branches), tokenizer_for(name, branches), FewClasses()
    settings = PairSettings(sigma=[1.0, 0.0, 0.4, 0.7], draws=2, num_images=6, seed=3)
    sampling = CASES[name].sampling
    store = PairStore.open(build_tokens(tokens_of_pairs(tmp_path, images, made, model, sampling, settings, 6)))
    rows = range(len(store))
    assert len(rows) == 6 * 4 * 2 and store.manifest.sampling["kind"] == type(sampling).__name__
    batch, keep = store.rows(rows), store.keep(rows)
    numbers = store.index
    assert batch["index"].tolist() == [number * 8 + row for number in numbers for row in range(8)]
    assert store.sigma(rows).tolist() == [sigma for _ in numbers for sigma in settings.sigmas for _ in range(2)]
    assert store.draw(rows).tolist() == [0, 1] * 24
    samples = [images.views(number, "none") for number in numbers.tolist()]
    assert store.labels.tolist() == [sample["label"] for sample in samples]
    teacher = made.tokenize(torch.cat([sample["image"] for sample in samples]))

    tokens = batch["tokens"].view(6, 4, 2, *teacher.shape[1:])
    keep = keep.view_as(tokens)
    labels, index = torch.tensor(store.labels).long(), torch.tensor(store.index)
    for draw in range(2):
        rng = partial(IndexedRng, 3, index, step=draw)
        assert torch.equal(tokens[:, 0, draw], teacher) and keep[:, 0].all()
        assert torch.equal(tokens[:, 1, draw], model.generate(labels, sampling, rng=rng())) and not keep[:, 1].any()
        for row, sigma in ((2, 0.4), (3, 0.7)):
            kept = keep[:, row, draw]
            assert torch.equal(kept, rng().uniform("pairs/keep", *teacher.shape[1:]) < sigma)
            assert torch.equal(tokens[:, row, draw][kept], teacher[kept])
            again = model.generate(labels, sampling, teacher=teacher, keep=kept, rng=rng())
            assert torch.equal(tokens[:, row, draw], again) and (again != teacher).any()
    assert (keep[:, 3] | ~keep[:, 2]).all()  # what a larger sigma keeps includes what a smaller one does
    assert (tokens[:, 1, 0] != tokens[:, 1, 1]).any()
    shares = store.kept_shares()
    assert shares == {sigma: pytest.approx(keep[:, row].float().mean().item()) for row, sigma in enumerate(shares)}


def test_rows_do_not_depend_on_the_other_sigmas_and_draws(tmp_path):
    many = PairStore.open(build_tokens(source(tmp_path, sigma=[0.3, 0.6], draws=2)))
    one = PairStore.open(build_tokens(source(tmp_path, sigma=0.6)))
    assert torch.equal(many.rows(range(2, 96, 4))["tokens"], one.rows(range(24))["tokens"])
    assert one.rows(range(24))["index"].tolist() == one.index.tolist()  # of one row per image: the image's number


def test_other_settings_get_a_store_of_their_own(tmp_path):
    settings = [{}, {"sigma": 0.6}, {"sigma": [0.7, 0.6]}, {"draws": 2}, {"num_images": 23}, {"seed": 1}]
    folders = {source(tmp_path, **chosen).folder for chosen in settings}
    folders |= {source(tmp_path, sampling=SamplingConfig()).folder, source(tmp_path, generator(0.2)).folder}
    assert len(folders) == 7, "dropout is no weight: that generator makes the same tokens"
    assert source(tmp_path, batch_size=3).folder in folders


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sigma": 1.2}, r"pairs\.sigma=1\.2 is outside \[0, 1\]"),
        ({"sigma": [0.5, -0.1]}, r"pairs\.sigma=-0\.1 is outside"),
        ({"sigma": [0.5, 0.5]}, r"pairs\.sigma=\[0\.5, 0\.5\] must be one share or different ones; pairs\.draws"),
        ({"sigma": []}, r"pairs\.sigma=\[\]"),
        ({"draws": 0}, r"pairs\.draws=0"),
        ({"num_images": 0}, r"pairs\.num_images=0 is outside \[1, 359\]"),
        ({"num_images": 10**6}, r"pairs\.num_images=1000000"),
    ],
)
def test_impossible_pairs(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        source(tmp_path, **settings)


def _build(rank, world, root):
    return str(build_tokens(source(root, sigma=[0.7, 0.9], batch_size=5)))


def test_two_processes_equal_one_bit_by_bit(tmp_path, monkeypatch):
    fill = token_build.fill
    monkeypatch.setattr(token_build, "fill", lambda folder, manifest, chunk, *rest: fill(folder, manifest, 5, *rest))
    alone = PairStore.open(_build(0, 1, tmp_path / "one"))
    first, second = run_forked(_build, tmp_path / "two")
    assert first == second and contents(alone.folder) == contents(alone.folder.parents[1] / "two" / alone.folder.name)
    alone.verify()


def killed(function):
    """Run a function in a process that is killed by it."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.fixture
def small_chunks(monkeypatch):
    """Six images between two markers; `die_at` kills the process before it writes the image of that position."""
    write, fill = token_build.write_images, token_build.fill

    def chunks(folder, manifest, chunk, *rest):
        return fill(folder, manifest, 6, *rest)

    def die_at(position):
        def die(writer, images, *rest, **rows):
            if position in images:
                os.kill(os.getpid(), signal.SIGKILL)
            write(writer, images, *rest, **rows)

        monkeypatch.setattr(token_build, "write_images", die)

    monkeypatch.setattr(token_build, "fill", chunks)
    return die_at


def test_command_after_a_kill(tmp_path, small_chunks):
    """task=pairs, killed within its third chunk; the same command makes what one that wasn't killed makes."""
    path = generator_checkpoint(tmp_path)
    chosen = [f"ckpt={path}", "task=pairs", "task.num_images=24", "task.sigma=[0.7,0.9]", "task.draws=2"]
    chosen += ["task.batch_size=4", "sampling=default", "sampling.temperature=1.2"]

    def interrupted():
        small_chunks(14)
        run(tmp_path / "b", *chosen)

    whole = run(tmp_path / "a", *chosen)["pairs"]
    killed(interrupted)
    (folder,) = (tmp_path / "b" / "tokens").iterdir()
    assert list((folder / "done.bin").read_bytes()) == [1] * 12 + [0] * 12
    made = run(tmp_path / "b", *chosen)["pairs"]
    assert made["path"] == str(folder) and {**made, "path": ""} == {**whole, "path": ""}
    assert contents(folder) == contents(tmp_path / "a" / "tokens" / folder.name)
    content = json.loads((tmp_path / "b" / "eval" / "results.json").read_text())["pairs"]
    assert content["rows"] == 96 and set(content["kept_shares"]) == {"0.7", "0.9"}
    assert content["kept_shares"]["0.7"] == pytest.approx(0.7, abs=0.06)
    assert content["manifest"]["generator"] == weights_fingerprint(generator())
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    run(tmp_path / "b", *chosen)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_given_pairs_are_completed_or_refused(tmp_path, small_chunks):
    whole = build_tokens(source(tmp_path / "whole", sigma=[0.5, 0.8], seed=2))
    cut = source(tmp_path / "cut", sigma=[0.5, 0.8], seed=2)

    def interrupted():
        small_chunks(14)
        build_tokens(cut)

    killed(interrupted)
    given = partial(given_pairs, dataset=DIGITS(split="val"), tokenizer=tokenizer())
    with pytest.raises(CheckpointError, match=r"pairs\.path=.* is not finished; repeat the command .*generator\.path="):
        given(cut.folder, generator=None)
    completes = given(cut.folder, generator=generator().eval(), batch_size=10)
    build_tokens(completes)
    assert contents(cut.folder) == contents(whole)
    assert given(cut.folder, generator=None) is None and given(cut.folder, generator=generator()) is None


def test_pairs_of_other_weights_are_refused(tmp_path):
    folder = build_tokens(source(tmp_path))
    images = DIGITS(split="val")
    other = generator()
    other.embeddings.weight.data[0] += 1
    for arguments, match in (
        ((images, tokenizer(1), None), r"tokens of tokenizer \w+, but tokenizer\.path is \w+; give the tokenizer"),
        ((images, tokenizer(), other), r"was made by generator \w+, but generator\.path is \w+; give the generator"),
        ((DIGITS(split="train"), tokenizer(), None), r"was made of other images \(\w+\) than data\.dataset gives"),
    ):
        with pytest.raises(CheckpointError, match=rf"pairs\.path=.* {match}"):
            given_pairs(folder, *arguments)
    with pytest.raises(MissingFileError, match=r"pairs\.path=/none holds no pairs .*as post-training with a generator"):
        given_pairs("/none", images, tokenizer(), None)
    with pytest.raises(CheckpointError, match="holds pairs, not tokens"):
        TokenCache.open(folder)
    own = build_tokens(tokens_of_images(tmp_path, images, tokenizer().eval(), "none", 64))
    with pytest.raises(CheckpointError, match="holds tokens, not pairs"):
        given_pairs(own, images, tokenizer(), None)


def test_damage_is_found(tmp_path):
    store = PairStore.open(build_tokens(source(tmp_path)))
    path = store.folder / "keep.bin"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match="checksum"):
        store.verify()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"keep\.bin has {len(content) - 1} bytes, not {len(content)}"):
        PairStore.open(store.folder)


def test_commands_that_are_refused(tmp_path):
    path, other = generator_checkpoint(tmp_path), tokenizer_checkpoint(tmp_path, seed=5)
    for overrides, error, match in (
        ([f"tokenizer_ckpt={other}"], CheckpointError, r"trained on the tokens of tokenizer \w+, but .*tokenizer5"),
        ([f"ckpt={other}"], ConfigError, r"Pairs needs a generator's checkpoint; ckpt=.*tokenizer5"),
        (["task.num_images=9999"], ConfigError, r"task\.num_images=9999 is outside \[1, 1438\]"),
    ):
        with pytest.raises(error, match=match):
            run(tmp_path, f"ckpt={path}", "task=pairs", *overrides)
    for settings, match in (
        ({"sigma": 1.5}, r"task\.sigma=1\.5 is outside"),
        ({"batch_size": 0}, r"task\.batch_size=0"),
    ):
        with pytest.raises(ConfigError, match=match):
            Pairs(**settings)


def test_the_published_recipes_are_of_the_same_pairs():
    """Images of the permutation of seed 42, of which the first five are recorded."""
    made = composed("eval", ["experiment=robustok/pairs_b", "ckpt=x"])
    used = composed("post_train", ["experiment=robustok/post_train_b", "tokenizer.path=x", "generator.path=y"])
    names = ("sigma", "draws", "num_images", "seed", "batch_size")
    assert {name: made.task[name] for name in names} == {name: used.pairs[name] for name in names}
    assert made.sampling == used.sampling and made.data.dataset == used.data.dataset
    settings = PairSettings(**{name: made.task[name] for name in names[:-1]})
    indices = set(settings.indices(1_281_167))
    assert len(indices) == 200_000 and indices >= {772957, 412848, 214023, 1211721, 1197191}
