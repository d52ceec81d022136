from functools import partial

import lightning
import pytest
import torch

from forked import run_forked
from tessera.callbacks import ResumeState
from tessera.data import DigitsImages, ImageDataModule, build_token_cache
from tessera.data.sampler import EvalShare, TrainBatches
from tessera.errors import CheckpointError, ConfigError, DataError

DIGITS = partial(DigitsImages, resolution=8)


def batches_of(rank, world, batch_size):
    sampler = TrainBatches(103, batch_size, seed=5)
    found = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found, list(EvalShare(103))


def test_two_processes_see_together_what_one_sees():
    joint, everything = batches_of(0, 1, 8)
    (first, eval0), (second, eval1) = run_forked(batches_of, 4)
    for epoch in range(2):
        assert len(joint[epoch]) == len(first[epoch]) == 12
        for whole, a, b in zip(joint[epoch], first[epoch], second[epoch], strict=True):
            assert whole == a + b
    assert eval0 + eval1 == everything == list(range(103))


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return [key[1] for batch in TrainBatches(50, 10, seed, epoch) for key in batch]

    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == list(range(50))
    assert [key[1] for batch in TrainBatches(50, 10, 0, 0, start=3) for key in batch] == order(0, 0)[30:]
    assert len(TrainBatches(50, 10, 0, 0, start=3)) == 5
    with pytest.raises(ConfigError, match=r"data\.batch_size=51 x 1"):
        TrainBatches(50, 51, 0)


class Recorder(lightning.LightningModule):
    """Records the samples of each step and draws from the global generator, as dropout would."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append((batch["index"].tolist(), torch.rand(1).item()))
        return (self.weight * batch["label"].float().mean()).sum()

    def validation_step(self, batch, batch_index):
        torch.rand(3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, max_steps, workers=0, ckpt=None, every=None, **arguments):
    torch.manual_seed(1)
    module = Recorder()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "k", every_n_train_steps=every or 10**6)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        callbacks=[checkpoint, ResumeState()],
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(
        module, ImageDataModule(DIGITS, 256, num_workers=workers, **arguments), ckpt_path=ckpt, weights_only=True
    )
    return module, trainer


# an epoch has 5 batches: 3 is in its middle, 5 at its end, 7 in the next one
@pytest.mark.parametrize(("stop", "workers"), [(3, 0), (5, 0), (7, 0), (3, 2)])
def test_resumes_with_the_next_batch(tmp_path, stop, workers):
    whole, _ = fit(tmp_path / "whole", 12, workers, every=stop)
    assert len(whole.seen) == 12
    fit(tmp_path / "part", stop, workers, every=stop)
    resumed, trainer = fit(tmp_path / "rest", 12, workers, ckpt=tmp_path / "part" / "k.ckpt")
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight) and trainer.global_step == 12


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    fit(tmp_path, 3, every=3)
    module = ImageDataModule(DIGITS, 128)
    module.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    state = torch.load(tmp_path / "k.ckpt", weights_only=True)["ImageDataModule"]
    with pytest.raises(DataError, match="global batch size 256, this run has 128"):
        module.load_state_dict(state)


def cache(folder, split="train", **changes):
    arguments = {"tokenizer_fingerprint": "abc", "codebook_size": 10, "shape": (1, 2), **changes}
    images = DIGITS(split=split)
    return build_token_cache(folder, images, lambda b: b["label"][:, None, None].expand(-1, 1, 2), **arguments)


def test_serves_tokens_and_pairs(tmp_path):
    folder = cache(tmp_path / "c")
    images = DIGITS(split="train")
    for serve in ("tokens", "pairs"):
        data = ImageDataModule(DIGITS, 16, serve=serve, token_cache=folder, expected_fingerprint="abc")
        batch = next(iter(data.train_dataloader()))
        assert batch["tokens"].shape == (16, 1, 2) and torch.equal(batch["tokens"][:, 0, 0], batch["label"])
        number = int(batch["index"][3])
        assert images.label(number) == batch["label"][3]
        if serve == "pairs":
            assert torch.equal(batch["image"][3], images[number]["image"])
    with pytest.raises(CheckpointError, match="not of xyz"):
        ImageDataModule(DIGITS, 16, serve="tokens", token_cache=folder, expected_fingerprint="xyz").train_dataloader()
    with pytest.raises(CheckpointError, match="other images"):
        ImageDataModule(DIGITS, 16, serve="pairs", token_cache=cache(tmp_path / "v", "val")).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"serve": "videos"}, r"data\.serve='videos'"),
        ({"serve": "tokens"}, r"needs data\.token_cache"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"eval_batch_size": -3}, r"data\.eval_batch_size=-3"),
    ],
)
def test_impossible_arguments(arguments, match):
    with pytest.raises(ConfigError, match=match):
        ImageDataModule(DIGITS, 16, **arguments)


def test_a_trainer_that_replaces_samplers_is_refused():
    module = ImageDataModule(DIGITS, 16)
    module.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match=r"trainer\.use_distributed_sampler=false"):
        module.setup("fit")
