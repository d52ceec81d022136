import numpy as np
import pytest
import torch

from forked import run_forked
from tessera.data import DigitsImages
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.metrics import DigitsFeatures, comparison, reference
from tessera.metrics.comparison import compare, compare_pairs
from tessera.metrics.features import FeatureExtractor, Features
from tessera.metrics.fid import FrechetDistance, frechet_distance
from tessera.metrics.image_sets import DatasetImageSet, open_images
from tessera.metrics.inception_score import InceptionScore
from tessera.metrics.kid import subset_distances
from tessera.metrics.precision_recall import precision_recall
from tessera.metrics.reconstruction import psnr, ssim
from tessera.metrics.reference import load_reference
from tessera.metrics.set_measure import measure_set
from tessera.metrics.statistics import ADM_EXTRACTOR, Statistics


class TinyFeatures(FeatureExtractor):
    """Projections of the image quarters: pooled, spatial and logits."""

    name, weights_id, resize, normalisation = "tiny", "none", "none", "x/255"
    input_size, num_features, num_spatial, num_classes = 8, 6, 5, 4

    def __init__(self):
        super().__init__()
        draws = torch.randn(12, 15, generator=torch.Generator().manual_seed(0))
        self.register_buffer("projection", draws, persistent=False)
        self.calls = 0

    def all_features(self, images_u8):
        self.calls += 1
        # in float64, so that a sample's features don't depend on its batch even in the last digit
        x = torch.nn.functional.adaptive_avg_pool2d(images_u8.double() / 255, 2).flatten(1)
        values = (torch.sin(8 * x @ self.projection.double()) * 2).float()
        return Features(*values.split([6, 5, 4], 1))


class ADMFeatures(TinyFeatures):
    name, weights_id, resize = ADM_EXTRACTOR.split(":")


def pixels(n: int, seed: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (n, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "real.npz", pixels(60, 0))
    np.savez(tmp_path / "fake.npz", pixels(50, 1, 60))
    return tmp_path


def tensors(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def test_every_figure_is_its_own_class_applied_to_the_features(files):
    extractor = TinyFeatures()
    against = load_reference(files / "real.npz", extractor)
    calls = extractor.calls
    figures = compare(open_images(files / "fake.npz"), against, extractor, batch_size=17)
    assert extractor.calls - calls == 3  # one pass of three batches for all figures
    real, fake = extractor.extract(tensors(pixels(60, 0))), extractor.extract(tensors(pixels(50, 1, 60)))
    values = {figure.name: figure.value for figure in figures}
    assert list(values) == ["FID", "sFID", "IS", "precision", "recall", "KID"]
    for name, a, b in (("FID", real.pooled, fake.pooled), ("sFID", real.spatial, fake.spatial)):
        distance = FrechetDistance(a.shape[1])
        distance.update(a, real=True)
        distance.update(b, real=False)
        assert values[name] == pytest.approx(float(distance.compute()), rel=1e-9)
    score = InceptionScore(4, 50)
    score.update(fake.logits, index=torch.arange(50))
    assert values["IS"] == pytest.approx(float(score.compute()), rel=1e-6)
    expected = precision_recall(real=real.pooled, generated=fake.pooled)
    assert (values["precision"], values["recall"]) == expected and expected[0] != expected[1]
    assert values["KID"] == pytest.approx(float(subset_distances(real.pooled, fake.pooled, 100, 50).mean()), rel=1e-6)


def test_names_say_what_was_done(files):
    extractor = TinyFeatures()
    figures = compare(open_images(files / "fake.npz"), load_reference(files / "real.npz", extractor), extractor)
    assert [figure.label for figure in figures] == [
        "FID[tiny]@N=50/ref=real",
        "sFID[tiny]@N=50/ref=real",
        "IS[tiny]@N=50",
        "precision[tiny]@N=50/ref=real/real=60",
        "recall[tiny]@N=50/ref=real/real=60",
        "KID[tiny,subset=50]@N=50/ref=real",
    ]
    fid = figures[0]
    assert fid.protocol.reference_hash == open_images(files / "real.npz").fingerprint()
    assert any("measure no image quality" in warning for warning in fid.warnings)
    assert fid.details["expected_bias"] > 0 and fid.protocol.reference_samples == 60
    assert "is to be expected of 50 samples" in fid.describe() and "warning: fewer than 2048 samples" in fid.describe()
    assert any("number of real images, here 60" in warning for warning in figures[3].warnings)
    assert figures[2].protocol.extra == {"splits": 1} and figures[3].protocol.extra == {"k": 3}


def test_standard_protocol_has_bare_names(tmp_path, monkeypatch):
    extractor = ADMFeatures()
    real, fake = pixels(10, 0), pixels(12, 1)
    np.savez(tmp_path / "real.npz", real)
    measured = measure_set(open_images(tmp_path / "real.npz"), extractor)
    spatial = measured.statistics.spatial
    # an ADM file says nothing of an extractor and of a number; the statistics are of the whole training set
    adm = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": spatial.mu.numpy(), "sigma_s": spatial.sigma.numpy()}
    monkeypatch.setattr(reference, "ADM_FILES", {"VIRTUAL_imagenet256_labeled": 8})
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, arr_0=real, **adm)
    found = load_reference(path, extractor)
    assert found.id == "imagenet-train-8" and found.crop == "adm-8" and found.statistics.n is None
    assert len(found.features) == 10 and found.statistics.spatial.mu.shape == (5,)
    found.id, found.crop, found.statistics = "imagenet-train-256", "adm-256", measured.statistics
    monkeypatch.setattr(comparison, "STANDARD_REAL_IMAGES", 10)
    monkeypatch.setattr("tessera.metrics.protocol.STANDARD_REAL_IMAGES", 10)
    monkeypatch.setattr("tessera.metrics.protocol.STANDARD_SAMPLES", 12)
    np.savez(tmp_path / "fake.npz", fake)
    figures = compare(open_images(tmp_path / "fake.npz"), found, extractor)
    labels = [figure.label for figure in figures]
    assert labels[:5] == ["FID", "sFID", "IS", "precision", "recall"]
    # a file with that name but other images is not that file
    monkeypatch.setattr(reference, "ADM_FILES", {"VIRTUAL_imagenet256_labeled": 256})
    with pytest.raises(DataError, match=r"\(8, 8\) pixels, not the 256"):
        load_reference(path, extractor)


def test_reference_is_measured_once_per_content(files, tmp_path):
    extractor, cache = TinyFeatures(), tmp_path / "cache"
    first = load_reference(files / "real.npz", extractor, cache=cache)
    calls = extractor.calls
    (files / "real.npz").rename(files / "renamed.npz")
    again = load_reference(files / "renamed.npz", extractor, cache=cache)
    assert extractor.calls == calls and again.id == "renamed"
    assert torch.equal(first.statistics.sigma, again.statistics.sigma) and torch.equal(first.features, again.features)
    assert torch.equal(first.statistics.spatial.mu, again.statistics.spatial.mu)
    # statistics alone do not give features
    for file in cache.glob("features-*"):
        file.unlink()
    assert load_reference(files / "renamed.npz", extractor, keep_features=False, cache=cache).features is None
    assert extractor.calls == calls
    assert len(load_reference(files / "renamed.npz", extractor, cache=cache).features) == 60
    assert extractor.calls > calls
    np.savez(files / "renamed.npz", pixels(60, 5))
    calls = extractor.calls
    load_reference(files / "renamed.npz", extractor, cache=cache)
    assert extractor.calls > calls


def test_statistics_of_another_extractor(files):
    extractor = TinyFeatures()
    other = Statistics(torch.zeros(3).double(), torch.eye(3).double(), 9, "other:1:none", "train")
    other.save(files / "other.npz")
    with pytest.raises(DataError, match=r"other:1:none.*tiny:none:none"):
        load_reference(files / "other.npz", extractor)
    # with images there is something to measure
    np.savez(files / "both.npz", arr_0=pixels(60, 0), mu=np.zeros(2048), sigma=np.eye(2048))
    found = load_reference(files / "both.npz", extractor)
    assert found.id == "both-images" and found.statistics.n == 60
    own = measure_set(open_images(files / "real.npz"), extractor).statistics
    own.save(files / "own.npz")
    stored = load_reference(files / "own.npz", extractor)
    assert stored.features is None and torch.equal(stored.statistics.sigma, own.sigma)
    figures = compare(open_images(files / "fake.npz"), stored, extractor)
    assert [figure.name for figure in figures] == ["FID", "sFID", "IS"]
    with pytest.raises(ConfigError, match="KID can't be measured with tiny against real"):
        compare(open_images(files / "fake.npz"), stored, extractor, ["KID"])
    with pytest.raises(ConfigError, match="'fid' is unknown"):
        compare(open_images(files / "fake.npz"), stored, extractor, ["fid"])


def test_data_set_as_reference(tmp_path):
    extractor = DigitsFeatures()
    images = DatasetImageSet(DigitsImages("val", resolution=8))
    found = load_reference(images, extractor, keep_features=False)
    assert (found.id, found.crop, found.statistics.n) == ("digits-val", "resize-8", 359)
    # a file of the statistics alone remembers the crop
    found.statistics.save(tmp_path / "stored.npz")
    assert load_reference(tmp_path / "stored.npz", extractor).crop == "resize-8"
    train = DatasetImageSet(DigitsImages("train", resolution=8))
    figures = {figure.name: figure for figure in compare(train, found, extractor, ["FID", "IS"])}
    assert figures["FID"].label == "FID[digits-cnn]@N=1438/ref=digits-val"
    assert 5 < figures["IS"].value <= 10  # ten classes, told apart


def test_warnings(files):
    extractor = TinyFeatures()
    against = load_reference(files / "real.npz", extractor, keep_features=False)
    twice = np.concatenate([pixels(50, 1), pixels(50, 1)[:7]])
    labels = np.array([0] * 30 + [1] * 27)
    np.savez(files / "twice.npz", twice, labels)
    fid = compare(open_images(files / "twice.npz"), against, extractor, ["FID"])[0]
    assert fid.protocol.samples == 57 and fid.protocol.unique_samples == 50 and "@N=50of57" in fid.label
    text = fid.describe()
    assert "7 of 57 images are exact repeats" in text and "between 27 and 30 images" in text
    larger = np.random.default_rng(0).integers(0, 256, (20, 9, 9, 3), dtype=np.uint8)
    np.savez(files / "larger.npz", larger)
    fid = compare(open_images(files / "larger.npz"), against, extractor, ["FID"])[0]
    assert any("9 x 9 pixels are compared with ones of 8 x 8" in warning for warning in fid.warnings)
    np.savez(files / "five.npz", pixels(5, 0))
    fid = compare(open_images(files / "five.npz"), against, extractor, ["FID"])[0]
    assert any("5 samples do not determine a covariance of 6 features" in warning for warning in fid.warnings)


def test_unusable_sets(files):
    extractor = TinyFeatures()
    np.savez(files / "one.npz", pixels(1, 0))
    with pytest.raises(DataError, match="needs at least 2"):
        load_reference(files / "one.npz", extractor)
    np.savez(files / "none.npz", n=np.int64(3))
    with pytest.raises(DataError, match="has neither mu, sigma nor images"):
        load_reference(files / "none.npz", extractor)
    (files / "broken.npz").write_text("nothing")
    with pytest.raises(DataError, match=r"not an \.npz file"):
        load_reference(files / "broken.npz", extractor)
    with pytest.raises(MissingFileError, match="does not exist"):
        load_reference(files / "missing.npz", extractor)

    class Diverged(TinyFeatures):
        def all_features(self, images_u8):
            out = super().all_features(images_u8)
            out.pooled[1] = float("nan")
            return out

    with pytest.raises(DataError, match="sample 1 are NaN"):
        measure_set(open_images(files / "fake.npz"), Diverged())


def test_pairs(files):
    real, fake = pixels(20, 0), np.clip(pixels(20, 0).astype(int) + 9, 0, 255).astype(np.uint8)
    np.savez(files / "inputs.npz", real)
    np.savez(files / "outputs.npz", fake)
    sets = open_images(files / "outputs.npz"), open_images(files / "inputs.npz")
    figures = {figure.name: figure for figure in compare_pairs(*sets, TinyFeatures(), batch_size=6)}
    assert list(figures) == ["rFID", "PSNR", "SSIM"]
    pair = tensors(fake).double() / 255, tensors(real).double() / 255
    assert figures["PSNR"].value == pytest.approx(float(psnr(*pair).mean()))
    assert figures["SSIM"].value == pytest.approx(float(ssim(*pair).mean()))
    assert figures["SSIM"].label == "SSIM[uniform7]@N=20" and figures["rFID"].label == "rFID[tiny]@N=20"
    features = [TinyFeatures()(tensors(side)).double() for side in (real, fake)]
    gaussians = [part for x in features for part in (x.mean(0), x.T.cov())]
    assert figures["rFID"].value == pytest.approx(float(frechet_distance(*gaussians)), rel=1e-6)
    with pytest.raises(DataError, match=r"20 images of .* and fake 50"):
        compare_pairs(sets[0], open_images(files / "fake.npz"))


def test_pairs_of_files_have_equal_names(tmp_path):
    from PIL import Image

    for folder, names in (("a", "01"), ("b", "02")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(pixels(1, 0)[0]).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(DataError, match="a has 1 where b has 2"):
        compare_pairs(open_images(tmp_path / "a"), open_images(tmp_path / "b"))


def _shares(rank, world, folder):
    extractor = TinyFeatures()
    # the cache is private to rank 0, as on machines without a shared disk
    cache = folder / "cache" if rank == 0 else folder / "other"
    against = load_reference(folder / "real.npz", extractor, cache=cache)
    again = load_reference(folder / "real.npz", extractor, cache=cache)
    assert torch.equal(against.features, again.features)
    figures = compare(open_images(folder / "fake.npz"), against, extractor, batch_size=4 + rank)
    pairs = compare_pairs(open_images(folder / "fake.npz"), open_images(folder / "fake2.npz"), extractor, batch_size=7)
    return [figure.value for figure in figures + pairs]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(files, world):
    np.savez(files / "fake2.npz", pixels(50, 2))
    expected = _shares(0, 1, files)
    for answer in run_forked(_shares, files, world=world):
        assert answer == pytest.approx(expected, rel=1e-9)


def test_a_process_without_images(files):
    np.savez(files / "real.npz", pixels(2, 0))
    np.savez(files / "fake.npz", pixels(2, 1))
    answers = run_forked(_two_images, files, world=3)
    assert answers == pytest.approx([_two_images(0, 1, files)] * 3, rel=1e-9)


def _two_images(rank, world, folder):
    extractor = TinyFeatures()
    against = load_reference(folder / "real.npz", extractor, keep_features=False)
    return compare(open_images(folder / "fake.npz"), against, extractor, ["FID"])[0].value
