"""Warnings that belong beside a figure: what makes it incomparable without making it wrong."""

import torch
from torch import Tensor

MIN_SAMPLES = 2048


def sample_warnings(samples: int, num_features: int) -> list[str]:
    """Warnings about the number of samples behind a Frechet distance.

    Args:
        samples: unique ones, of the smaller side.
        num_features: d.
    """
    if samples <= num_features:
        return [
            f"{samples} samples do not determine a covariance of {num_features} features; the value is mostly bias: "
            "compare it with nothing, or use KID, which is unbiased"
        ]
    if samples < MIN_SAMPLES:
        return [f"fewer than {MIN_SAMPLES} samples; the value is noisy and biased upwards: KID is unbiased"]
    return []


def duplicate_warnings(samples: int, unique: int) -> list[str]:
    """Warnings about images that occur more than once."""
    if unique == samples:
        return []
    return [f"{samples - unique} of {samples} images are exact repeats of others; was the set written twice?"]


def balance_warnings(labels: Tensor, num_classes: int | None = None) -> list[str]:
    """Warnings about classes of generated images, which the protocol wants in equal numbers (50 each of 1 000).

    Args:
        labels: (N,) int64.
        num_classes: that there should be; None: those that occur.
    """
    counts = torch.bincount(labels, minlength=num_classes or 0)
    if num_classes is None:
        counts = counts[counts > 0]
    if (missing := int((counts == 0).sum())) > 0:
        return [f"{missing} of {len(counts)} classes have no image; the score of a whole set needs all of them"]
    if len(counts) and int(counts.max() - counts.min()) > 1:
        return [f"classes have between {int(counts.min())} and {int(counts.max())} images; generate equal numbers"]
    return []


def reference_warnings(reference: str) -> list[str]:
    """Warnings about what a generator's images are compared with: by definition the images of its training.

    Args:
        reference: id of the reference set.
    """
    if reference.endswith(("-val", "-validation", "-test")):
        return [f"{reference} is not what a generator learns from; gFID is defined against the training images"]
    return []


def size_warnings(size: tuple[int, int], reference: tuple[int, int] | None) -> list[str]:
    """Warnings about images of another size than the reference's."""
    if reference is None or tuple(size) == tuple(reference):
        return []
    return [
        f"images of {size[0]} x {size[1]} pixels are compared with ones of {reference[0]} x {reference[1]}; the figure "
        "measures that difference too"
    ]


def extractor_warnings(name: str, is_image_quality: bool) -> list[str]:
    """Warnings about features that were not made to judge images."""
    return (
        [] if is_image_quality else [f"{name} features compare models with each other; they measure no image quality"]
    )
