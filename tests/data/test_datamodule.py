"""What the data module serves, refuses, and leaves alone."""

import os
import signal
import warnings
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from data.pictures import Squares, image_folder
from forked import run_forked
from tessera.data import FolderImages, ImageDataModule, TokenCache, build_token_cache
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError

LENGTH = 4


def cache(folder, dataset, views="none", **settings):
    def encode(batch):
        return (batch["index"][:, None, None] + torch.arange(LENGTH)) % 300

    return build_token_cache(
        folder,
        dataset,
        encode,
        **({"tokenizer_fingerprint": "t0", "codebook_size": 300, "shape": (1, LENGTH), "views": views} | settings),
    )


def squares(split, train=40, val=10):
    return Squares(split, train if split == "train" else val)


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(lists):
    return [item for part in lists for item in part]


def test_images_are_served_in_batches_and_validation_in_order():
    data = ImageDataModule(squares, 8, eval_batch_size=4)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 5
    assert sorted(flat(indices(batches))) == list(range(40))
    first = batches[0]
    assert first["image"].shape == (8, 3, 4, 4) and first["label"].dtype == first["index"].dtype == torch.int64
    assert torch.equal(first["label"], first["index"] % 3)
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        assert flat(indices(loader)) == list(range(10)) and len(loader) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("views", ["none", "flip"])
def test_tokens_are_served_for_training_and_images_for_validation(tmp_path, workers, views):
    folder = cache(tmp_path / "c", squares("train"), views)
    data = ImageDataModule(
        squares, 8, num_workers=workers, serve="tokens", token_cache=folder, expected_fingerprint="t0"
    )
    data.setup("fit")
    rows = 40 * (2 if views == "flip" else 1)
    batches = list(data.train_dataloader())
    assert sorted(flat(indices(batches))) == list(range(rows))
    for batch in batches:
        assert set(batch) == {"tokens", "label", "index"} and batch["tokens"].shape == (8, 1, LENGTH)
        assert torch.equal(batch["tokens"][:, 0, 0], batch["index"]) and batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["label"], (batch["index"] // (rows // 40)) % 3)
    assert "image" in next(iter(data.val_dataloader()))


@pytest.mark.parametrize("views", ["none", "flip"])
def test_pairs_hold_the_image_the_tokens_were_made_from(tmp_path, views):
    root = image_folder(tmp_path / "images", per_class=4)
    factory = partial(FolderImages, root=root, resolution=16)
    folder = cache(tmp_path / "c", factory(split="train"), views, indices=[6, 1, 3, 2])
    data = ImageDataModule(factory, 2, serve="pairs", token_cache=folder)
    data.setup("fit")
    count = 2 if views == "flip" else 1
    seen = []
    for batch in data.train_dataloader():
        for tokens, image, label, index in zip(*(batch[k] for k in ("tokens", "image", "label", "index")), strict=True):
            number, view = divmod(index.item(), count)
            sample = factory(split="train").views(number, views)
            assert torch.equal(image, sample["image"][view]), "the fixed crop, though training images are augmented"
            assert label == sample["label"] and tokens[0, 0] == index
            seen.append(index.item())
    assert sorted(seen) == sorted(n * count + v for n in (6, 1, 3, 2) for v in range(count))


def test_reference_images_are_not_augmented(tmp_path):
    factory = partial(FolderImages, root=image_folder(tmp_path), resolution=16)
    data = ImageDataModule(factory, 4)
    images = torch.cat([batch["image"] for batch in data.reference_loader("train")])
    train = data.images("train")
    assert torch.equal(images, torch.cat([train.views(number, "none")["image"] for number in range(6)]))
    loader = data.reference_loader("train")
    assert len(loader.dataset) == 6 and loader.dataset.num_classes == 2
    assert loader.dataset.fingerprint() == data.images("train").fingerprint()
    assert data.images("train").augment, "the training loader's images stay augmented"


def test_augmentation_is_the_same_for_any_workers_and_differs_between_epochs(tmp_path):
    factory = partial(FolderImages, root=image_folder(tmp_path), resolution=16)

    def epochs(workers):
        data = ImageDataModule(factory, 2, num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.position = lambda epoch=epoch: (epoch, 0)
            found.append({n.item(): x for b in loader for n, x in zip(b["index"], b["image"], strict=True)})
        return found

    none, two = epochs(0), epochs(2)
    for epoch in range(2):
        assert none[epoch].keys() == two[epoch].keys()
        assert all(torch.equal(none[epoch][n], two[epoch][n]) for n in none[epoch])
    assert not any(torch.equal(none[0][n], none[1][n]) for n in none[0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"serve": "latents"}, r"data\.serve='latents'.*images, tokens, pairs"),
        ({"serve": "tokens"}, r"data\.serve=tokens needs data\.token_cache"),
        ({"token_cache": "x"}, r"data\.token_cache.*data\.serve=images"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size=0"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
    ],
)
def test_impossible_settings_are_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        ImageDataModule(**({"dataset": squares, "batch_size": 4} | arguments))


def test_wrong_caches_are_refused(tmp_path):
    folder = cache(tmp_path / "c", squares("train"))

    def loader(serve="tokens", token_cache=folder, fingerprint="t0", factory=squares):
        data = ImageDataModule(factory, 4, serve=serve, token_cache=token_cache, expected_fingerprint=fingerprint)
        data.setup("fit")
        return data.train_dataloader()

    loader(), loader("pairs")
    with pytest.raises(CheckpointError, match="of tokenizer t0, not of t1"):
        loader(fingerprint="t1")
    with pytest.raises(MissingFileError, match=r"no manifest\.json"):
        loader(token_cache=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"made from other images \(.*than data\.dataset"):
        loader("pairs", factory=partial(squares, train=39))
    with pytest.raises(ConfigError, match=r"data\.batch_size=4 .*exceeds the 3"):
        loader(token_cache=cache(tmp_path / "d", squares("train", train=3)))


def test_data_problems_show_before_training(tmp_path):
    factory = partial(FolderImages, root=tmp_path, resolution=16)
    image_folder(tmp_path)
    for path in sorted((tmp_path / "val").rglob("*.png")):
        path.unlink()
    with pytest.raises(DataError, match="no images"):
        ImageDataModule(factory, 2).setup("fit")


class Step(lightning.LightningModule):
    """Records the samples it is given; the buffer makes DDP communicate in every forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.register_buffer("count", torch.zeros(1))
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_index):
        self.trained.append(batch["index"].tolist())
        return self.layer(batch["image"].mean((1, 2, 3))[:, None]).square().mean()

    def validation_step(self, batch, batch_index):
        self.validated.append(batch["index"].tolist())

    def predict_step(self, batch, batch_index):
        self.predicted.append(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Save(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer(**settings):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
    }
    return lightning.Trainer(**(defaults | settings))


def test_overfitting_repeats_the_same_batches():
    module = Step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(many workers|logging interval|GPU|LeafSpec|isinstance).*")
        trainer(overfit_batches=2, max_epochs=3).fit(module, ImageDataModule(squares, 8))
    assert len(module.trained) == 6 and module.trained[:2] == module.trained[2:4] == module.trained[4:]


def test_prediction_covers_the_validation_images_in_order():
    module = Step()
    trainer().predict(module, ImageDataModule(squares, 4))
    assert flat(module.predicted) == list(range(10))


def test_resuming_within_an_epoch_raises_no_false_alarm(tmp_path):
    path = tmp_path / "x.ckpt"
    trainer(callbacks=[Save(path, 2)]).fit(Step(), ImageDataModule(squares, 8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer().fit(Step(), ImageDataModule(squares, 8), ckpt_path=path, weights_only=True)


def fit_forked(rank, world, replace, path, resume):
    from lightning.pytorch.strategies import DDPStrategy

    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    module = Step()
    data = ImageDataModule(partial(squares, val=11), 4, eval_batch_size=3)
    trainer(
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=replace,
        num_sanity_val_steps=0,
        max_epochs=2,
        callbacks=[Save(path, 7)] if path and not resume else [],
    ).fit(module, data, ckpt_path=path if resume else None, weights_only=True)
    return module.trained, module.validated


@pytest.mark.parametrize("replace", [False, True])
def test_lightning_leaves_the_samplers_alone_in_two_processes(replace):
    """Whatever use_distributed_sampler says; and uneven validation shares don't hang DDP's broadcasts."""
    (first, val_first), (second, val_second) = run_forked(fit_forked, replace, None, False)
    alone = Step()
    trainer(num_sanity_val_steps=0).fit(alone, ImageDataModule(squares, 8))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.trained
    assert sorted(flat(val_first) + flat(val_second)) == sorted([*range(11)] * 2)
    assert len(val_first) == len(val_second)


def test_two_processes_resume_within_an_epoch(tmp_path):
    path = tmp_path / "x.ckpt"
    whole = run_forked(fit_forked, False, path, False)
    rest = run_forked(fit_forked, False, path, True)
    assert [trained for trained, _ in rest] == [trained[7:] for trained, _ in whole]


class Signalling(Squares):
    """Sends signals to the loader process that reads image 5."""

    def read(self, number):
        if number == 5 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().read(number)


def test_loader_processes_outlive_signals_to_the_group():
    data = ImageDataModule(lambda split: Signalling(split, 40), 8, num_workers=1)
    data.setup("fit")
    assert sorted(flat(indices(data.train_dataloader()))) == list(range(40))


def test_cache_of_a_killed_build_is_not_served(tmp_path):
    def encode(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_token_cache(tmp_path, squares("train"), encode, tokenizer_fingerprint="t0", codebook_size=2, shape=(1, 1))
    data = ImageDataModule(squares, 4, serve="tokens", token_cache=tmp_path)
    data.setup("fit")
    with pytest.raises(CheckpointError, match="not finished"):
        data.train_dataloader()
    with pytest.raises(CheckpointError, match="not finished"):
        TokenCache.open(tmp_path)
