"""All figures of a set of images against a reference, each under the name that it may carry."""

from collections.abc import Sequence
from typing import Any

import torch

from tessera import distributed
from tessera.errors import ConfigError, DataError
from tessera.metrics.checks import (
    balance_warnings,
    duplicate_warnings,
    extractor_warnings,
    sample_warnings,
    size_warnings,
)
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import frechet_distance
from tessera.metrics.image_sets import ImageSet
from tessera.metrics.inception_score import SPLIT_SIZE
from tessera.metrics.kid import subset_distances
from tessera.metrics.lpips import LPIPSDistance
from tessera.metrics.pair_measure import PairMeasure
from tessera.metrics.precision_recall import precision_recall
from tessera.metrics.protocol import STANDARD_REAL_IMAGES, Figure, Protocol, expected_bias
from tessera.metrics.reference import Reference
from tessera.metrics.set_measure import Measured, measure_set
from tessera.metrics.statistics import Statistics

FIGURES = ("FID", "sFID", "IS", "precision", "recall", "KID")
KEEPS_FEATURES = {"precision", "recall", "KID"}  # not made of sums
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def available_figures(extractor: FeatureExtractor, reference: Reference) -> list[str]:
    """Which of `FIGURES` an extractor and a reference allow."""
    possible = {
        "FID": True,
        "sFID": bool(extractor.num_spatial) and reference.statistics.spatial is not None,
        "IS": bool(extractor.num_classes),
        "precision": reference.features is not None,
        "recall": reference.features is not None,
        "KID": reference.features is not None,
    }
    return [name for name in FIGURES if possible[name]]


def check_figures(figures: Sequence[str], extractor: FeatureExtractor) -> None:
    """Refuse figures that no reference can make possible.

    Raises:
        ConfigError: an unknown one, or one that the extractor doesn't allow.
    """
    for name in figures:
        if name not in FIGURES:
            raise ConfigError(f"figures: {name!r} is unknown; choose from {', '.join(FIGURES)}")
        if (name == "sFID" and not extractor.num_spatial) or (name == "IS" and not extractor.num_classes):
            needed = "spatial features" if name == "sFID" else "a classifier"
            raise ConfigError(
                f"figures: {name} can't be measured with {extractor.name}, as it needs {needed}; leave {name} out, or "
                "choose another extractor by metrics/features=..."
            )


def chosen_figures(figures: Sequence[str] | None, extractor: FeatureExtractor, reference: Reference) -> list[str]:
    """The figures asked for; None: all that are possible.

    Raises:
        ConfigError: an unknown one, or one that extractor or reference don't allow.
    """
    possible = available_figures(extractor, reference)
    check_figures(figures or (), extractor)
    for name in figures or ():
        if name not in possible:
            raise ConfigError(
                f"figures: {name} can't be measured with {extractor.name} against {reference.id}, which gives "
                f"{', '.join(possible)}; sFID needs spatial statistics, and precision, recall and KID images of the "
                "reference"
            )
    return possible if figures is None else list(figures)


def compare(
    generated: ImageSet,
    reference: Reference,
    extractor: FeatureExtractor,
    figures: Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> list[Figure]:
    """Figures of a set of images against a reference, from one pass; all processes call it together.

    Args:
        generated: the set.
        reference: made with the same extractor, see `load_reference`.
        extractor: of the features.
        figures: some of `FIGURES`; None: all that extractor and reference allow.
        batch_size: per process.
        device: of the extractor.

    Raises:
        ConfigError: figures that can't be measured.
        DataError: fewer than two images, or unusable ones.
    """
    chosen = chosen_figures(figures, extractor, reference)
    keep = bool(KEEPS_FEATURES & set(chosen))
    measured = measure_set(generated, extractor, batch_size, keep, "IS" in chosen, device)
    warnings = size_warnings(generated.size, reference.size)
    if generated.labels is not None:
        warnings += balance_warnings(generated.labels)
    return figures_against(measured, reference, extractor, chosen, warnings, device=device)


def figures_against(
    measured: Measured,
    reference: Reference,
    extractor: FeatureExtractor,
    figures: Sequence[str] | None = None,
    warnings: Sequence[str] = (),
    prefix: str = "",
    device: torch.device | str = "cpu",
    settings: dict[str, Any] | None = None,
    in_label: Sequence[str] = (),
) -> list[Figure]:
    """Figures of a measured set against a reference.

    Args:
        measured: of the generated images.
        reference, extractor, figures: as `compare`.
        warnings: that all figures shall carry.
        prefix: of FID's name: "g" for images of a generator.
        device: where distances are computed.
        settings: of what made the images, for the protocol.
        in_label: those of them that go into the names.

    Raises:
        ConfigError: figures that can't be measured.
    """
    common = {
        **extractor.protocol_fields,
        "samples": measured.samples,
        "unique_samples": measured.unique,
        "extra": settings or {},
        "in_label": tuple(in_label),
    }
    against = common | {"crop": reference.crop, "reference": reference.id, "reference_hash": reference.hash}
    warnings = [
        *warnings,
        *duplicate_warnings(measured.samples, measured.unique),
        *extractor_warnings(extractor.name, extractor.is_image_quality),
    ]
    features = None if reference.features is None else reference.features.to(device)
    generated = None if measured.features is None else measured.features.to(device)
    found, shares = [], None
    for name in chosen_figures(figures, extractor, reference):
        if name in ("FID", "sFID"):
            sides = [side if name == "FID" else side.spatial for side in (reference.statistics, measured.statistics)]
            found.append(_frechet(prefix + name if name == "FID" else name, *sides, against, warnings, device))
        elif name == "IS":
            splits = {"extra": {**common["extra"], "splits": -(-measured.samples // SPLIT_SIZE)}}
            protocol = Protocol(**common | splits, flavour=measured.score_flavour, reference="")
            found.append(Figure("IS", measured.inception_score, protocol, warnings=list(warnings)))
        elif name == "KID":
            size = min(KID_SUBSET_SIZE, len(features), len(generated))
            values = subset_distances(features, generated, KID_SUBSETS, size)
            flavour = "" if size == KID_SUBSET_SIZE else f"subset={size}"
            protocol = Protocol(**against, reference_samples=len(features), flavour=flavour)
            details = {"std_over_subsets": float(values.std(correction=0)), "subsets": KID_SUBSETS}
            found.append(Figure("KID", float(values.mean()), protocol, details, list(warnings)))
        else:
            if shares is None:
                shares = precision_recall(real=features, generated=generated, k=NEIGHBOURS)
            neighbours = {"extra": {**against["extra"], "k": NEIGHBOURS}}
            protocol = Protocol(**against | neighbours, reference_samples=len(features))
            own = list(warnings)
            if len(features) != STANDARD_REAL_IMAGES:
                own.append(f"precision and recall depend on the number of real images, here {len(features)}")
            found.append(Figure(name, shares[name == "recall"], protocol, warnings=own))
    return found


def _frechet(
    name: str,
    reference: Statistics,
    generated: Statistics,
    against: dict,
    warnings: Sequence[str],
    device: torch.device | str,
) -> Figure:
    parts = [part.to(device) for side in (reference, generated) for part in (side.mu, side.sigma)]
    value = float(frechet_distance(*parts, reference.n, generated.n))
    protocol = Protocol(**against, reference_samples=reference.n)
    fewest = min(n for n in (reference.n, protocol.unique_samples) if n is not None)
    own = [*warnings, *sample_warnings(fewest, generated.mu.numel())]
    bias = expected_bias(generated.sigma.to(device), generated.n, reference.n)
    return Figure(name, value, protocol, {"expected_bias": bias}, own)


def compare_pairs(
    reconstructions: ImageSet,
    inputs: ImageSet,
    extractor: FeatureExtractor | None = None,
    lpips: LPIPSDistance | None = None,
    figures: Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> list[Figure]:
    """rFID, PSNR, SSIM and LPIPS of reconstructions of the very images they are compared with.

    All processes call it together.

    Args:
        reconstructions, inputs: as many images of one size, in the same order.
        extractor: of the rFID; None: no rFID.
        lpips: network of the LPIPS; None: no LPIPS.
        figures: some of `PAIR_FIGURES`; None: all that extractor and network allow.
        batch_size: per process.
        device: of extractor and network.

    Raises:
        ConfigError: a figure that is unknown, or lacks its network.
        DataError: sets that do not belong together.
    """
    if len(reconstructions) != len(inputs) or reconstructions.size != inputs.size:
        raise DataError(
            f"{reconstructions.name} has {len(reconstructions)} images of {reconstructions.size} pixels and "
            f"{inputs.name} {len(inputs)} of {inputs.size}; reconstructions are compared with their own inputs"
        )
    names = [[file.stem for file in images.files] for images in (reconstructions, inputs) if hasattr(images, "files")]
    if len(names) == 2 and names[0] != names[1]:
        culprit = next(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
        raise DataError(
            f"{reconstructions.name} has {culprit[0]} where {inputs.name} has {culprit[1]}; name both alike"
        )
    measure = PairMeasure(figures, extractor, lpips)
    measure.begin(device)
    own = distributed.share(len(inputs))
    share = own.start, own.stop, batch_size
    for (index, fake), (_, real) in zip(reconstructions.batches(*share), inputs.batches(*share), strict=True):
        measure.update(fake.to(device), real.to(device), index)
    return measure.finish(len(inputs), inputs.crop)
