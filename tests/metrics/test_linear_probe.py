"""The probe's layers against published numbers; its training: rates, determinism, what it can and cannot learn."""

import pytest
import torch
import torch.nn.functional as F

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.linear_probe import LinearProbe, ProbeTraining, TopKAccuracy, fit_linear_probe, pooled


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_linear_probe"])
def test_published_classifier(case):
    file = golden(case)
    probe = LinearProbe(file.config["c"], file.config["k"])
    probe.load_state_dict(file.weights)
    latent, labels = file.input["latent_bchw"], file.input["labels"]
    assert latent.shape[:2] == (file.config["n"], file.config["c"])
    with torch.no_grad():
        logits = probe.eval()(latent)
        assert_close(probe(pooled(latent)), logits)
        train_logits = probe.train()(latent)
    ours = {
        "logits_eval": logits,
        "logits_train": train_logits,
        "bn.running_mean_after": probe.bn.running_mean,
        "bn.running_var_after": probe.bn.running_var,
        "ce_eval": F.cross_entropy(logits, labels),
    }
    ours["top1_percent"], ours["top5_percent"] = accuracy(logits, labels, (1, 5))
    assert set(ours) == set(file.output)
    for name, expected in file.output.items():
        assert_close(ours[name], expected)


def accuracy(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...], batch: int = 3) -> torch.Tensor:
    metric = TopKAccuracy(ks)
    for rows in torch.arange(len(labels)).split(batch):
        metric.update(logits[rows], labels[rows])
    return metric.compute()


def test_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 0])
    assert accuracy(logits, labels, (1, 2, 3, 5)).tolist() == [50.0, 50.0, 100.0, 100.0]
    masked = TopKAccuracy((1, 2))
    masked.update(logits, labels, mask=torch.tensor([False, True]))
    assert masked.compute().tolist() == [0.0, 0.0]
    for change, message in (
        ((logits, labels[:1]), "do not belong together"),
        ((logits, labels + 3), "from 3 to 3, of 3 classes"),
        ((logits / 0, labels), "logits of sample 0, 1 are NaN or infinite"),
    ):
        with pytest.raises(DataError, match=message):
            masked.update(*change)
    with pytest.raises(ConfigError, match="ks="):
        TopKAccuracy((0,))


def _uneven(rank, world, logits, labels):
    metric = TopKAccuracy((1, 2))
    own = slice(0, 5) if rank == 0 else slice(5, None)
    metric.update(logits[own], labels[own])
    return metric.compute().tolist()


def test_two_processes_equal_one():
    logits = torch.randn(17, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(17) % 4
    assert run_forked(_uneven, logits, labels) == [accuracy(logits, labels, (1, 2)).tolist()] * 2


def test_rates():
    training = ProbeTraining(epochs=10, milestones=[0.3, 0.6, 0.9])
    expected = [1e-5, 1e-4, 1e-4] + [1e-5] * 3 + [1e-6] * 3 + [1e-7]
    assert [training.rate(epoch) for epoch in range(10)] == pytest.approx(expected)
    assert [ProbeTraining().rate(epoch) for epoch in (0, 1, 9)] == pytest.approx([1e-5, 1e-4, 1e-4])


def clusters(count, seed, dim=6, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9)) * 3
    return centres[labels] * 10 + 5 + torch.randn(count, dim, generator=generator), labels


QUICK = ProbeTraining(epochs=5, batch_size=16, lr=0.01, warmup_lr=0.01)


def test_learns_classes_and_not_shuffled_labels():
    train, val = clusters(201, 0), clusters(100, 1)
    learned = fit_linear_probe(QUICK, lambda epoch: train, val, 4)
    assert learned.top1[-1] > 95 and len(learned.top1) == len(learned.top5) == 5
    shuffled = train[0], train[1][torch.randperm(201, generator=torch.Generator().manual_seed(2))]
    assert fit_linear_probe(QUICK, lambda epoch: shuffled, val, 4).top1[-1] < 60


def test_seed_decides_everything():
    train, val = clusters(60, 0), clusters(40, 1)

    def weights(seed):
        before = torch.random.get_rng_state()
        result = fit_linear_probe(ProbeTraining(epochs=2), lambda epoch: train, val, 4, seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(3)
        return result.probe.linear.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_features_of_each_epoch_are_used():
    asked, val = [], clusters(20, 1)

    def train(epoch):
        asked.append(epoch)
        return clusters(33, epoch)  # one sample is left over from batches of 4

    fit_linear_probe(ProbeTraining(epochs=3), train, val, 4)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": 0.0}, "lr=0"),
        ({"warmup_lr": -1.0}, "warmup_lr=-1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"milestones": [0.5, 0.2]}, "milestones"),
        ({"milestones": [1.0]}, "milestones"),
    ],
)
def test_refuses_impossible_settings(change, key):
    with pytest.raises(ConfigError, match=rf"task\.{key}"):
        ProbeTraining(**change)


def test_refuses_too_few_samples():
    one = (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DataError, match="at least 2 training"):
        fit_linear_probe(QUICK, lambda epoch: one, one, 2)
