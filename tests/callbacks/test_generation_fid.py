import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from figure_setup import TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from tessera.callbacks import GenerationFID
from tessera.data import to_uint8
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.statistics import Statistics

N = 31


def run(data=None, stage=None, **options):
    callback = GenerationFID(TinyFeatures(), **({"num_samples": N} | options))
    trainer = validate([callback], stage or TinyStage(), data or TinyData())
    return callback.figures[0], trainer


def by_hand(seed: int = 0) -> float:
    stage, data, extractor, metric = TinyStage(), TinyData(), TinyFeatures(), FrechetDistance(12)
    labels = torch.arange(N) % 3
    with torch.no_grad():
        images = stage.tokenizer.detokenize(stage.generate_tokens(labels, torch.arange(N) + seed * N))
    metric.update(extractor(data.train.images), real=True)
    metric.update(extractor(images), real=False)
    return float(metric.compute())


@pytest.mark.parametrize("batch_size", [4, 64])
def test_figure_does_not_depend_on_the_batch_size(batch_size):
    figure, trainer = run(batch_size=batch_size)
    assert figure.label == "gFID[tiny]@N=31/ref=tiny-train"
    assert figure.value == pytest.approx(by_hand(), rel=1e-6)
    assert float(trainer.callback_metrics["val/gfid[tiny]@N=31/ref=tiny-train"]) == pytest.approx(figure.value)
    assert figure.protocol.extra["classes"] == 3 and figure.protocol.extra["per_class"] == [10, 11]
    assert figure.protocol.reference_samples == 40
    assert figure.details["expected_bias"] > 0


def test_seeds_are_other_samples():
    assert run(seed=1)[0].value == pytest.approx(by_hand(1), rel=1e-6)
    assert by_hand(1) != pytest.approx(by_hand(0), rel=1e-3)


def test_fixed_tokens_and_saving_them(tmp_path):
    path = tmp_path / "tokens" / "generated.safetensors"
    generated, _ = run(save_tokens=path)
    saved = load_file(path)
    assert saved["tokens"].shape == (N, 1, 16) and saved["labels"].tolist() == (torch.arange(N) % 3).tolist()
    fixed, _ = run(stage=TinyStage(generator=False), tokens=path, num_samples=None, batch_size=5)
    assert fixed.value == pytest.approx(generated.value, rel=1e-6)
    with pytest.raises(DataError, match="num_samples=32"):
        run(tokens=path, num_samples=32)
    save_file({"codes": saved["tokens"]}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="lacks `tokens`"):
        run(tokens=tmp_path / "other.safetensors")


def test_reference_is_cached_by_content(tmp_path):
    data = TinyData()
    first, _ = run(data, cache=tmp_path)
    (path,) = tmp_path.glob("*.npz")
    stamp = path.read_bytes()
    second, _ = run(TinyData(), cache=tmp_path)
    assert second.value == pytest.approx(first.value, rel=1e-12)
    assert path.read_bytes() == stamp
    run(TinyData(train=41), cache=tmp_path)  # other images
    assert len(list(tmp_path.glob("*.npz"))) == 2
    # the cache is really read
    statistics = Statistics.load(path)
    statistics.mu += 1
    statistics.save(path)
    assert run(TinyData(), cache=tmp_path)[0].value > first.value + 1


def test_reference_file(tmp_path):
    extractor, images = TinyFeatures(), TinyData().train.images
    metric = FrechetDistance(12, sides=("real",))
    metric.update(extractor(images), real=True)
    found = metric.statistics(real=True)
    Statistics(found.mu, found.sigma, found.n, extractor.identity, "my-set").save(tmp_path / "ref.npz")
    figure, _ = run(reference=tmp_path / "ref.npz")
    assert figure.label.endswith("/ref=my-set")
    assert figure.value == pytest.approx(by_hand(), rel=1e-6)
    named, _ = run(reference=tmp_path / "ref.npz", reference_id="imagenet-train-256")
    assert named.label == "gFID[tiny]@N=31"
    Statistics(found.mu, found.sigma, found.n, "another", "my-set").save(tmp_path / "other.npz")
    with pytest.raises(DataError, match="another"):
        run(reference=tmp_path / "other.npz")
    with pytest.raises(MissingFileError, match=r"none\.npz"):
        run(reference=tmp_path / "none.npz")


def test_images_as_reference_give_more_figures(tmp_path):
    levels = to_uint8(TinyData().train.images).permute(0, 2, 3, 1)
    np.savez(tmp_path / "images.npz", levels.numpy())
    callback = GenerationFID(TinyFeatures(), N, reference=tmp_path / "images.npz", figures=["recall", "FID", "KID"])
    trainer = validate([callback], TinyStage(), TinyData())
    labels = [
        "recall[tiny]@N=31/ref=images/real=40",
        "gFID[tiny]@N=31/ref=images",
        "KID[tiny,subset=31]@N=31/ref=images",
    ]
    assert [figure.label for figure in callback.figures] == labels
    assert callback.figures[1].value == pytest.approx(by_hand(), rel=1e-6)
    assert "val/kid[tiny,subset=31]@N=31/ref=images" in trainer.callback_metrics
    # statistics alone don't, which is said before anything is generated
    Statistics(torch.zeros(12).double(), torch.eye(12).double(), 9, TinyFeatures().identity).save(tmp_path / "s.npz")
    with pytest.raises(ConfigError, match="recall can't be measured with tiny against"):
        run(reference=tmp_path / "s.npz", figures=["recall"])


def test_bad_settings(tmp_path):
    with pytest.raises(ConfigError, match="'rFID' is unknown"):
        GenerationFID(TinyFeatures(), N, figures=["rFID"])
    with pytest.raises(ConfigError, match="IS can't be measured with tiny, as it needs a classifier"):
        GenerationFID(TinyFeatures(), N, figures=["IS"])
    with pytest.raises(ConfigError, match=r"callbacks\.gfid\.figures is empty"):
        GenerationFID(TinyFeatures(), N, figures=[])
    with pytest.raises(ConfigError, match="num_samples is needed"):
        GenerationFID(TinyFeatures())
    with pytest.raises(ConfigError, match="num_samples=1"):
        GenerationFID(TinyFeatures(), num_samples=1)
    with pytest.raises(ConfigError, match="batch_size=0"):
        GenerationFID(TinyFeatures(), num_samples=10, batch_size=0)
    with pytest.raises(MissingFileError, match=r"callbacks\.gfid\.tokens"):
        GenerationFID(TinyFeatures(), tokens=tmp_path / "none")


def _ranks(rank, world, folder):
    figure, _ = run(batch_size=4, cache=folder, save_tokens=folder / f"tokens_{world}.safetensors")
    return figure.value, figure.label, figure.protocol.extra["per_class"]


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "single").mkdir()
    value, label, per_class = _ranks(0, 1, tmp_path / "single")
    for answer in run_forked(_ranks, tmp_path):
        assert answer[0] == pytest.approx(value, rel=1e-6)
        assert answer[1:] == (label, per_class)
    single, both = (
        load_file(path) for path in (tmp_path / "single/tokens_1.safetensors", tmp_path / "tokens_2.safetensors")
    )
    assert torch.equal(single["tokens"], both["tokens"]) and torch.equal(single["labels"], both["labels"])
