"""Mean and covariance of a set of features, on disk together with the extractor that made them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.errors import DataError, MissingFileError

# What ADM's reference files (mu and sigma without a word about the extractor) were made with
ADM_EXTRACTOR = "inception-2015-12-05:6726825d:legacy_tf"
KEYS = ("mu", "sigma", "mu_s", "sigma_s", "n", "extractor", "source", "crop")


@dataclass
class Statistics:
    """Gaussian summary of a set of features.

    Attributes:
        mu: (d,) float64 mean.
        sigma: (d, d) float64 unbiased covariance.
        n: number of samples, None where the file doesn't say.
        extractor: identity of the extractor (`FeatureExtractor.identity`), "" when not recorded.
        source: what the set is, e.g. `digits-train`.
        crop: id of the crop that made its images; "" when not recorded.
        spatial: the same of the features that sFID compares, where known.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    extractor: str = ""
    source: str = ""
    spatial: "Statistics | None" = None
    crop: str = ""

    def save(self, path: str | Path) -> None:
        """Write an .npz with `mu`, `sigma`, `n`, `extractor`, `source`, `crop`, and `mu_s`, `sigma_s` where there are
        spatial ones; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "mu": self.mu.cpu().numpy(),
            "sigma": self.sigma.cpu().numpy(),
            "n": np.int64(-1 if self.n is None else self.n),
            "extractor": np.array(self.extractor),
            "source": np.array(self.source),
            "crop": np.array(self.crop),
        }
        if self.spatial is not None:
            content |= {"mu_s": self.spatial.mu.cpu().numpy(), "sigma_s": self.spatial.sigma.cpu().numpy()}
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **content)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, extractor: str | None = None) -> "Statistics":
        """Read statistics written by `save`, or an ADM reference file (its images are ignored).

        Args:
            path: .npz file.
            extractor: identity that the statistics must have; None accepts any.

        Raises:
            MissingFileError: no such file.
            DataError: not a statistics file, malformed, or made with another extractor.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"statistics file {path} does not exist; set metrics.reference to an .npz file")
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {key: file[key] for key in KEYS if key in file}
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not an .npz statistics file ({error})") from error
        mu, sigma = _gaussian(path, content, "mu", "sigma")
        n = int(content.get("n", -1))
        n_or_none = None if n < 0 else n
        found = str(content.get("extractor", ADM_EXTRACTOR if mu.numel() == 2048 else ""))
        if extractor is not None and found != extractor:
            raise DataError(
                f"{path} was made with extractor {found or 'unknown'!r}, but this run uses {extractor!r}; "
                "use statistics of the same extractor or change metrics.features"
            )
        source, spatial = str(content.get("source", path.stem)), None
        if "mu_s" in content:
            spatial = cls(*_gaussian(path, content, "mu_s", "sigma_s"), n_or_none, found, source)
        return cls(mu, sigma, n_or_none, found, source, spatial, str(content.get("crop", "")))


def _gaussian(path: Path, content: dict[str, np.ndarray], mu_key: str, sigma_key: str) -> tuple[Tensor, Tensor]:
    if mu_key not in content or sigma_key not in content:
        raise DataError(f"{path} lacks {mu_key} or {sigma_key}; it is not a statistics file")
    mu, sigma = (torch.from_numpy(np.asarray(content[key], dtype=np.float64)) for key in (mu_key, sigma_key))
    if mu.ndim != 1 or sigma.shape != (mu.numel(), mu.numel()):
        raise DataError(f"{path} has {mu_key} of shape {tuple(mu.shape)} and {sigma_key} of shape {tuple(sigma.shape)}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise DataError(f"{path} holds NaN or infinite statistics; make it again")
    return mu, sigma


def content_key(fingerprint: str, extractor: str) -> str:
    """Name of what an extractor makes of a set of images: 16 hex digits."""
    return hashlib.sha256(f"{fingerprint}|{extractor}".encode()).hexdigest()[:16]
