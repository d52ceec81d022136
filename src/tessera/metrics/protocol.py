"""How a figure was measured, and the name it may therefore carry.

A bare name (`rFID`) means the field's standard protocol in full. Every deviation is part of the name, so that
two figures with equal names are comparable.
"""

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

STANDARD_SAMPLES = 50_000
STANDARD_EXTRACTOR, STANDARD_WEIGHTS, STANDARD_RESIZE = "inception-2015-12-05", "6726825d", "legacy_tf"
STANDARD_CROP = "adm-256"
STANDARD_ROUNDING = "half-up"
INPUTS = "inputs"  # reference id of figures whose reference is the very tensors that entered the tokenizer
STANDARD_REFERENCE = {
    "rFID": INPUTS,
    "pFID": INPUTS,
    "gFID": "imagenet-train-256",
    "FID": "imagenet-train-256",
    "sFID": "imagenet-train-256",
    "precision": "imagenet-train-256",
    "recall": "imagenet-train-256",
    "KID": "",  # has none: its reference is always named
}
# precision and recall are taken against the reference's images, not its statistics
STANDARD_REAL_IMAGES = 10_000


@dataclass
class Protocol:
    """What has to be equal for two figures to be comparable, and what is worth knowing besides.

    Attributes:
        extractor: name of the feature extractor; "" if none.
        weights_id: hash prefix of its weights.
        flavour: variant of the measure, e.g. `splits=1` or `uniform7`; "" for the standard one.
        resize: how images reach the extractor's size.
        quantisation: rounding to uint8.
        crop: id of the crop that made the inputs; "" when not recorded.
        reference: id of the reference set.
        reference_hash: identity of its content; "" when not recorded.
        reference_samples: N of the reference set.
        samples: N in total.
        unique_samples: N without repeats.
        dtype: of the extractor and of the sums.
        versions: of the libraries that take part.
        extra: further settings, e.g. alpha, delta, K, sigma, seed; those named in `in_label` go into the
            name.
        in_label: keys of `extra` shown in the name, in order.
    """

    extractor: str = ""
    weights_id: str = ""
    flavour: str = ""
    resize: str = ""
    quantisation: str = STANDARD_ROUNDING
    crop: str = ""
    reference: str = INPUTS
    reference_hash: str = ""
    reference_samples: int | None = None
    samples: int = 0
    unique_samples: int = 0
    dtype: str = "float32 features, float64 sums, TF32 off"
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    in_label: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.versions = self.versions or library_versions()
        self.unique_samples = self.unique_samples or self.samples

    def label(self, metric: str) -> str:
        """The name that `metric` may carry: `<metric>[<feature>]@N=<n>/ref=<id>/res=<resize>/crop=<id>`.

        Only deviations from the standard protocol of that metric appear; measures without a feature extractor
        (PSNR, SSIM) have no standard beyond the number of samples, and the Inception Score has no reference.
        """
        referenced = metric in STANDARD_REFERENCE
        inception = self.extractor == STANDARD_EXTRACTOR and self.weights_id == STANDARD_WEIGHTS
        variant = ",".join(filter(None, ("" if inception else self.extractor, self.flavour)))
        name = f"{metric}[{variant}]" if variant else metric
        parts = []
        shown = ",".join(f"{key}={_short(self.extra[key])}" for key in self.in_label)
        if self.unique_samples != STANDARD_SAMPLES or self.samples != self.unique_samples or shown:
            repeats = f"of{self.samples}" if self.samples != self.unique_samples else ""
            parts.append(f"N={self.unique_samples}{repeats}" + (f",{shown}" if shown else ""))
        if referenced and self.reference != STANDARD_REFERENCE[metric]:
            parts.append(f"ref={self.reference}")
        if metric in ("precision", "recall") and self.reference_samples != STANDARD_REAL_IMAGES:
            parts.append(f"real={self.reference_samples}")
        if inception and self.resize != STANDARD_RESIZE:
            parts.append(f"res={self.resize}")
        # a name that already says it is another network can't be mistaken for the standard one
        if inception and referenced and self.crop != STANDARD_CROP:
            parts.append(f"crop={self.crop or 'unrecorded'}")
        if self.quantisation != STANDARD_ROUNDING:
            parts.append(f"uint8={self.quantisation}")
        return f"{name}@{'/'.join(parts)}" if parts else name


@dataclass
class Figure:
    """A measured number with the protocol it was measured by.

    Attributes:
        name: the metric, e.g. `rFID`.
        value: the number, unrounded; a Frechet distance may be a rounding error below 0.
        protocol: how it was measured.
        details: further numbers, e.g. pFID's table, or `expected_bias`.
        warnings: what keeps the figure from being compared, see `tessera.metrics.checks`.
    """

    name: str
    value: float
    protocol: Protocol
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.protocol.label(self.name)

    @property
    def key(self) -> str:
        """The label with the metric's name in lower case, for log keys: `rfid[digits-cnn]@N=360`."""
        return self.name.lower() + self.label[len(self.name) :]

    def describe(self, warnings: bool = True) -> str:
        """One line for the console: the label, the value, the bias to expect of so few samples, and warnings.

        A Frechet distance that rounding left below 0 is shown as 0.
        """
        value = max(self.value, 0.0) if self.name.endswith("FID") else self.value
        text = f"{self.label} = {value:.4f}"
        bias = self.details.get("expected_bias")
        if bias is not None and self.protocol.unique_samples < STANDARD_SAMPLES:
            text += f" (about {bias:.2g} of it is to be expected of {self.protocol.unique_samples} samples)"
        shown = self.warnings if warnings else []
        return "; ".join([text, *(f"warning: {warning}" for warning in shown)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for results.json."""
        protocol = asdict(self.protocol)
        protocol.pop("in_label")
        return {
            "name": self.name,
            "label": self.label,
            "value": self.value,
            "details": self.details,
            "warnings": self.warnings,
            "protocol": protocol,
        }


def _short(value: Any) -> str:
    return "{" + ",".join(map(_short, value)) + "}" if isinstance(value, list | tuple) else str(value)


def library_versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    versions = {"python": platform.python_version()}
    for package in ("tessera", "torch", "torchmetrics", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def expected_bias(sigma: Tensor, n: int, n_reference: int | None = None) -> float:
    """Expected excess of a Frechet distance of `n` independent samples over its infinite-sample value.

    bias = (1/n) * [5/4 * sum_i l_i + 1/2 * sum_ij l_i l_j / (l_i + l_j)], l the eigenvalues of `sigma`.
    Second-order expansion for Gaussian features and nearly equal distributions; measured / formula is
    1.00-1.02 for n >= 2 000 and up to 1.27 at n = 100. Not for rFID, whose two sides are the same images.

    Args:
        sigma: (d, d) covariance of the sampled side.
        n: samples.
        n_reference: samples of the reference where it is sampled too; None for exact reference statistics.

    Returns:
        The expected bias; a figure far above it measures a real difference.
    """
    values = torch.linalg.eigvalsh(sigma.double()).clamp_min(0)
    sums = values[:, None] + values[None, :]
    pairs = torch.where(sums > 0, values[:, None] * values[None, :] / sums.clamp_min(1e-300), 0.0).sum()
    weight = 1 / n + (1 / n_reference if n_reference else 0.0)
    return float(weight * (1.25 * values.sum() + 0.5 * pairs))
