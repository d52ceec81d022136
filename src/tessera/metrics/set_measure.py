"""Everything that figures need of one set of images, from one pass of the extractor over it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tessera import distributed
from tessera.errors import DataError
from tessera.metrics.features import FeatureExtractor, as_uint8
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.image_sets import ImageSet, image_hashes
from tessera.metrics.inception_score import InceptionScore
from tessera.metrics.statistics import Statistics
from tessera.metrics.sums import FeatureSets


@dataclass
class Measured:
    """What a pass over a set of images gives, over all processes.

    Attributes:
        statistics: of the pooled features, with those of the spatial ones where the extractor has them.
        features: (N, d) float32 on the CPU, in the order of the sample numbers; None where they weren't kept.
        inception_score: None where the extractor has no classifier, or the score wasn't asked for.
        score_flavour: see `InceptionScore.flavour`.
        samples: N.
        unique: number of different images.
    """

    statistics: Statistics
    features: Tensor | None
    inception_score: float | None
    score_flavour: str
    samples: int
    unique: int


class SetMeasure:
    """Collects what `Measured` holds, batch by batch; each process adds its own samples.

    Args:
        extractor: of the features.
        num_samples: N over all processes where known, for the splits of the Inception Score.
        keep_features: for precision, recall and KID; N d float32 numbers.
        score: take the Inception Score where the extractor has a classifier.
        device: where the extractor runs and the sums are kept.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        num_samples: int | None = None,
        keep_features: bool = False,
        score: bool = True,
        device: torch.device | str = "cpu",
    ):
        self.extractor, self.device = extractor.to(device), torch.device(device)
        self.pooled = FrechetDistance(extractor.num_features, sides=("fake",)).to(device)
        self.spatial, self.score, self.rows = None, None, None
        if extractor.num_spatial:
            self.spatial = FrechetDistance(extractor.num_spatial, sides=("fake",)).to(device)
        if extractor.num_classes and score:
            self.score = InceptionScore(extractor.num_classes, num_samples).to(device)
        if keep_features:
            self.rows = FeatureSets(extractor.num_features).to(device)
        self.hashes: list[Tensor] = []

    def update(self, images: Tensor, index: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: (B, 3, H, W) uint8, or float in [-1, 1].
            index: (B,) int64, the samples' numbers in [0, N).
            mask: (B,) bool; rows that are False are left out.

        Raises:
            DataError: images out of range, or features that are not finite (the sample is named).
        """
        images = images.to(self.device)
        if mask is not None:
            images, index = images[mask.to(images.device)], index[mask.to(index.device)]
        if len(images) == 0:
            return
        out = self.extractor.extract(images)
        self.pooled.update(out.pooled, real=False, index=index)
        if self.spatial is not None:
            self.spatial.update(out.spatial, real=False, index=index)
        if self.score is not None:
            self.score.update(out.logits, index=index)
        if self.rows is not None:
            self.rows.update(out.pooled, real=False, index=index)
        self.hashes.append(image_hashes(as_uint8(images)))

    def finish(self) -> Measured:
        """The result over all processes, which must all call it.

        Raises:
            DataError: fewer than two samples, or not as many as announced.
        """
        statistics = self._statistics(self.pooled)
        if self.spatial is not None:
            statistics.spatial = self._statistics(self.spatial)
        hashes = torch.cat([*self.hashes, torch.empty(0, dtype=torch.int64)])
        if distributed.is_distributed():
            shares: list = [None] * distributed.world_size()
            dist.all_gather_object(shares, hashes)
            hashes = torch.cat(shares)
        return Measured(
            statistics,
            None if self.rows is None else self.rows.compute()[1].cpu(),
            None if self.score is None else float(self.score.compute()),
            "" if self.score is None else self.score.flavour,
            len(hashes),
            len(hashes.unique()),
        )

    def _statistics(self, metric: FrechetDistance) -> Statistics:
        with metric.sync_context():
            found = metric.statistics(real=False)
        found.extractor = self.extractor.identity
        return found


def measure_set(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    keep_features: bool = False,
    score: bool = True,
    device: torch.device | str = "cpu",
) -> Measured:
    """One pass over a set, shared among the processes, which must all call it; every image exactly once.

    Args:
        images: the set.
        extractor, keep_features, score, device: as `SetMeasure`.
        batch_size: per process.

    Raises:
        DataError: fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"{images.name} holds {len(images)} image; a set to be measured needs at least 2")
    measure = SetMeasure(extractor, len(images), keep_features, score, device)
    own = distributed.share(len(images))
    for index, batch in images.batches(own.start, own.stop, batch_size):
        measure.update(batch, index)
    measured = measure.finish()
    measured.statistics.source = images.name
    if measured.statistics.spatial is not None:
        measured.statistics.spatial.source = images.name
    if measured.samples != len(images):
        raise DataError(f"{measured.samples} images of {images.name} were measured, of {len(images)}")
    return measured
