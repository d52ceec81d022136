"""The extractors that FID, sFID and the Inception Score are defined by."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.frozen import load_network, read_weights
from tessera.metrics.features import FeatureExtractor, Features, as_uint8
from tessera.metrics.inception_network import (
    NUM_CLASSES,
    NUM_SPATIAL,
    InceptionNetwork,
    fold_batch_norms,
)
from tessera.metrics.resize import check_resize, resize

INCEPTION_HASH = "6726825d"
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_VARIABLE = "TESSERA_INCEPTION"
TAPS = (64, 192, 768, 2048)


class InceptionFeatures(FeatureExtractor):
    """The 2015-12-05 FID Inception as the ADM evaluator uses it: pool_3, spatial features and logits of one pass.

    Args:
        weights_path: `weights-inception-2015-12-05-6726825d.pth` (or pytorch-fid's file of the same content).
            None: the file that the environment variable TESSERA_INCEPTION names, or else the one in torch.hub's cache,
            downloaded from torch-fidelity's release if it isn't there.
        weights_label: name for weights of another origin. Without it only the published file is accepted;
            with it all figures carry the label, e.g. `FID[random-inception-seed0]`.
        resize: to 299 pixels; another than legacy_tf is part of the figures' names.
        tap: width of the pooled features: 2048 (pool_3), or 64, 192 or 768, which are part of the figures' names.

    Raises:
        ConfigError: an unknown resize or tap.
        MissingFileError: no file, or the download failed.
        CheckpointError: another file than the published one, or weights that do not fit.

    Source: Heusel et al. 2017 (arXiv:1706.08500); openai/guided-diffusion, evaluations.
    """

    input_size, normalisation = 299, "(x-128)/128"
    num_spatial, num_classes = NUM_SPATIAL, NUM_CLASSES

    def __init__(
        self,
        weights_path: str | Path | None = None,
        weights_label: str | None = None,
        resize: str = "legacy_tf",
        tap: int = 2048,
    ):
        super().__init__()
        check_resize(resize)
        if tap not in TAPS:
            raise ConfigError(f"metrics.features.tap={tap} must be one of {', '.join(map(str, TAPS))}")
        path = inception_weights(weights_path)
        self.weights_id = _checked_hash(path, weights_label)
        self.name = (weights_label or "inception-2015-12-05") + ("" if tap == 2048 else f"-{tap}")
        self.is_image_quality = weights_label is None
        self.resize, self.num_features = resize, tap
        source = f"metrics.features.weights_path={path}"
        published = read_weights(path, "metrics.features.weights_path", "")
        with torch.device("meta"):  # initial weights would cost more than the file's
            network = InceptionNetwork()
        self.network = network.to_empty(device="cpu")
        load_network(self.network, fold_batch_norms(published, source), source)
        self.network.to(memory_format=torch.channels_last)
        self.freeze()

    def all_features(self, images_u8: Tensor) -> Features:
        # resizing and convolutions are fastest with channels last
        images = images_u8.contiguous(memory_format=torch.channels_last)
        out = self.network(self.normalise(resize(images, self.input_size, self.resize)))
        return Features(out.taps[self.num_features], out.spatial, out.logits)

    def normalise(self, levels: Tensor) -> Tensor:
        """0..255 to the network's range."""
        return (levels - 128) / 128


class PytorchFIDFeatures(InceptionFeatures):
    """The same network as pytorch-fid and IBQ run it: floats that aren't rounded, half-pixel resize, [-1, 1].

    Three deviations from the standard protocol at once, for comparison with figures published that way.

    Args:
        weights_path, weights_label: as `InceptionFeatures`.

    Source: mseitzer/pytorch-fid; TencentARC/SEED-Voken, metrics.
    """

    normalisation, quantisation = "x/127.5-1", "none"

    def __init__(self, weights_path: str | Path | None = None, weights_label: str | None = None):
        super().__init__(weights_path, weights_label, resize="half_pixel")
        self.name = weights_label or "pytorch-fid-float"

    def levels(self, images: Tensor) -> Tensor:
        as_uint8(images)  # for its checks
        if images.dtype == torch.uint8:
            return images
        return (images.float().clamp(-1, 1) + 1) * 127.5

    def normalise(self, levels: Tensor) -> Tensor:
        return levels / 127.5 - 1


def inception_weights(weights_path: str | Path | None) -> Path:
    """The weight file: given, named by the environment, or in torch.hub's cache (fetched, with hash check).

    Raises:
        MissingFileError: it isn't there and can't be had.
    """
    key = "metrics.features.weights_path"
    if weights_path is None and os.environ.get(INCEPTION_VARIABLE):
        key, weights_path = INCEPTION_VARIABLE, os.environ[INCEPTION_VARIABLE]
    if weights_path is not None:
        if not Path(weights_path).is_file():
            raise MissingFileError(
                f"{key}={weights_path} does not exist; give the path of {INCEPTION_FILE}, or null to download it"
            )
        return Path(weights_path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_HASH, progress=False)
    except Exception as error:  # URLError, HTTPError, timeouts, hash mismatch: one remedy for all
        raise MissingFileError(
            f"the FID Inception could not be downloaded ({error}); fetch {INCEPTION_URL} on a machine with a network "
            f"and set metrics.features.weights_path or {INCEPTION_VARIABLE} to the file, or choose metrics=digits"
        ) from error
    return path


def _checked_hash(path: Path, weights_label: str | None) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    if digest != INCEPTION_HASH and weights_label is None:
        raise CheckpointError(
            f"metrics.features.weights_path={path} has SHA-256 {digest}, not {INCEPTION_HASH}: it is not FID's "
            "2015-12-05 Inception. Give that file, or name these weights with metrics.features.weights_label"
        )
    return digest
