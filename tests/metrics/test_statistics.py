import numpy as np
import pytest
import torch

from tessera.errors import DataError, MissingFileError
from tessera.metrics.statistics import ADM_EXTRACTOR, Statistics


def some(d: int = 4, extractor: str = "tiny:1:none") -> Statistics:
    return Statistics(torch.arange(d).double(), torch.eye(d).double() * 2, 50, extractor, "set", crop="adm-8")


def test_round_trip(tmp_path):
    some().save(tmp_path / "deep" / "s.npz")
    loaded = Statistics.load(tmp_path / "deep" / "s.npz", "tiny:1:none")
    assert torch.equal(loaded.mu, some().mu) and torch.equal(loaded.sigma, some().sigma)
    assert (loaded.n, loaded.extractor, loaded.source, loaded.crop) == (50, "tiny:1:none", "set", "adm-8")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.npz"]


def test_another_extractor_is_refused(tmp_path):
    some().save(tmp_path / "s.npz")
    with pytest.raises(DataError, match=r"tiny:1:none.*tiny:2:none"):
        Statistics.load(tmp_path / "s.npz", "tiny:2:none")


def test_adm_reference_file(tmp_path):
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(3), sigma_s=np.eye(3))
    loaded = Statistics.load(path, ADM_EXTRACTOR)
    assert loaded.n is None and loaded.source == "VIRTUAL_imagenet256_labeled"
    with pytest.raises(DataError, match="digits-cnn"):
        Statistics.load(path, "digits-cnn:0:x")


def test_bad_files(tmp_path):
    with pytest.raises(MissingFileError, match=r"metrics\.reference"):
        Statistics.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(DataError, match="not an"):
        Statistics.load(tmp_path / "text.npz")
    for name, content, message in (
        ("keys", {"mu": np.zeros(3)}, "lacks mu or sigma"),
        ("shape", {"mu": np.zeros(3), "sigma": np.eye(4)}, "sigma of shape"),
        ("nan", {"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN"),
    ):
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(DataError, match=message):
            Statistics.load(tmp_path / f"{name}.npz")
