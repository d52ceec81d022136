"""`eval.py task=compare`: figures of two sets of images that anyone may have made."""

import numpy as np
import pytest

from run.checkpoints import run
from tessera.errors import ConfigError, MissingFileError
from tessera.metrics import DigitsFeatures
from tessera.metrics.comparison import compare, compare_pairs
from tessera.metrics.image_sets import open_images
from tessera.metrics.reference import load_reference
from tessera.run.compare import Comparison


@pytest.fixture
def sets(tmp_path):
    """Files of 60 and 50 random images of different brightness."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.npz", "b.npz")]
    for path, count, high in zip(paths, (60, 50), (255, 200), strict=True):
        np.savez(path, arr_0=rng.integers(0, high, (count, 16, 16, 3), dtype=np.uint8))
    return [str(path) for path in paths]


def test_figures_are_the_librarys(tmp_path, sets):
    a, b = sets
    found = run(tmp_path, "task=compare", "metrics=digits", f"task.a={a}", f"task.b={b}", "task.batch_size=7")
    extractor = DigitsFeatures()
    expected = compare(open_images(a), load_reference(b, extractor), extractor)
    assert [figure["label"] for figure in found["figures"]] == [figure.label for figure in expected]
    for figure, other in zip(found["figures"], expected, strict=True):
        assert figure["value"] == pytest.approx(other.value, rel=1e-5)
    assert {figure["name"] for figure in found["figures"]} == {"FID", "IS", "precision", "recall", "KID"}
    assert (found["a"], found["b"]) == (a, b)


def test_pairs(tmp_path, sets):
    a, _ = sets
    with np.load(a) as content:
        np.savez(tmp_path / "r.npz", arr_0=content["arr_0"] // 8 * 8)
    files = [f"task.a={tmp_path}/r.npz", f"task.b={a}", "task.pairs=true"]
    found = run(tmp_path, "task=compare", "metrics=digits", *files)
    expected = compare_pairs(open_images(tmp_path / "r.npz"), open_images(a), DigitsFeatures())
    labels = ["rFID[digits-cnn]@N=60", "PSNR@N=60", "SSIM[uniform7]@N=60"]
    assert [figure["label"] for figure in found["figures"]] == labels == [figure.label for figure in expected]
    for figure, other in zip(found["figures"], expected, strict=True):
        assert figure["value"] == pytest.approx(other.value, rel=1e-5)
    with pytest.raises(ConfigError, match="LPIPS needs its network"):
        run(tmp_path, "task=compare", "metrics=digits", *files, "task.figures=[LPIPS]")
    with pytest.raises(ConfigError, match=r"no use with task\.pairs"):
        Comparison(a, a, pairs=True, reference_id="x")


def test_chosen_figures_alone(tmp_path, sets):
    a, b = sets
    choice = ["task.figures=[FID]", "task.reference_id=mine"]
    found = run(tmp_path, "task=compare", "metrics=digits", f"task.a={a}", f"task.b={b}", *choice)
    assert [figure["label"] for figure in found["figures"]] == ["FID[digits-cnn]@N=60/ref=mine"]
    # features are kept for figures that need them alone
    assert not list((tmp_path / "reference_statistics").glob("features-*"))


@pytest.mark.parametrize("missing", ["a", "b"])
def test_both_sets_are_required(missing):
    with pytest.raises(ConfigError, match=rf"task\.{missing} is required"):
        Comparison(**({"a": "x", "b": "y"} | {missing: None}))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["task.a={a}", "task.b={b}"], ConfigError, "metrics=..."),
        (["metrics=digits", "task.a={a}.gone", "task.b={b}"], MissingFileError, "does not exist"),
        (["metrics=digits", "task.a={a}", "task.b={b}", "task.figures=[sFID]"], ConfigError, "sFID can't be measured"),
    ],
)
def test_refusals(tmp_path, sets, overrides, error, message):
    a, b = sets
    with pytest.raises(error, match=message):
        run(tmp_path, "task=compare", *(each.format(a=a, b=b) for each in overrides))
