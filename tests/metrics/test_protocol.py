import json
import re

import pytest
import torch

from tessera.metrics.checks import (
    balance_warnings,
    duplicate_warnings,
    extractor_warnings,
    reference_warnings,
    sample_warnings,
    size_warnings,
)
from tessera.metrics.protocol import Figure, Protocol, expected_bias

STANDARD = {
    "extractor": "inception-2015-12-05",
    "weights_id": "6726825d",
    "resize": "legacy_tf",
    "crop": "adm-256",
    "samples": 50_000,
}


@pytest.mark.parametrize(
    ("metric", "changes", "label"),
    [
        ("rFID", {}, "rFID"),
        ("gFID", {"reference": "imagenet-train-256"}, "gFID"),
        ("FID", {"reference": "imagenet-train-256"}, "FID"),
        ("rFID", {"samples": 1000}, "rFID@N=1000"),
        ("gFID", {"reference": "imagenet-val"}, "gFID@ref=imagenet-val"),
        ("rFID", {"reference": "imagenet-train-256"}, "rFID@ref=imagenet-train-256"),
        ("rFID", {"samples": 50_048, "unique_samples": 50_000}, "rFID@N=50000of50048"),
        ("rFID", {"resize": "half_pixel"}, "rFID@res=half_pixel"),
        ("rFID", {"crop": "var-1.125"}, "rFID@crop=var-1.125"),
        ("rFID", {"crop": ""}, "rFID@crop=unrecorded"),
        ("rFID", {"quantisation": "none"}, "rFID@uint8=none"),
        ("rFID", {"weights_id": "00000000"}, "rFID[inception-2015-12-05]"),
        ("rFID", {"extractor": "digits-cnn", "samples": 360, "crop": ""}, "rFID[digits-cnn]@N=360"),
        (
            "FID",
            {"extractor": "dinov2-vits14-cls", "samples": 5000, "reference": "imagenet-val"},
            "FID[dinov2-vits14-cls]@N=5000/ref=imagenet-val",
        ),
        (
            "gFID",
            {"samples": 1000, "reference": "imagenet-val", "resize": "antialias", "crop": "x"},
            "gFID@N=1000/ref=imagenet-val/res=antialias/crop=x",
        ),
        (
            "pFID",
            {"extra": {"K": 4096, "delta": [50, 70, 90], "seed": 0}, "in_label": ("K", "delta")},
            "pFID@N=50000,K=4096,delta={50,70,90}",
        ),
        ("sFID", {"reference": "imagenet-train-256"}, "sFID"),
        ("sFID", {"reference": "imagenet-val", "samples": 10_000}, "sFID@N=10000/ref=imagenet-val"),
        ("precision", {"reference": "imagenet-train-256", "reference_samples": 10_000}, "precision"),
        ("recall", {"reference": "imagenet-train-256", "reference_samples": 5000}, "recall@real=5000"),
        ("IS", {"reference": "", "crop": ""}, "IS"),
        ("IS", {"flavour": "splits=1", "samples": 100}, "IS[splits=1]@N=100"),
        ("IS", {"flavour": "splits=1", "extractor": "digits-cnn"}, "IS[digits-cnn,splits=1]"),
        ("KID", {"reference": "imagenet-val"}, "KID@ref=imagenet-val"),
        ("PSNR", {"extractor": "", "samples": 50_000}, "PSNR"),
        ("PSNR", {"extractor": "", "samples": 10}, "PSNR@N=10"),
        ("SSIM", {"extractor": "uniform7", "samples": 10}, "SSIM[uniform7]@N=10"),
    ],
)
def test_names_carry_every_deviation(metric, changes, label):
    assert Protocol(**(STANDARD | changes)).label(metric) == label


def test_figure_is_plain_values():
    protocol = Protocol(**(STANDARD | {"samples": 100}), extra={"delta": (1, 2)})
    figure = Figure("rFID", 1.5, protocol, {"table": {"a": 1.0}})
    assert figure.key == "rfid@N=100" and figure.label == "rFID@N=100"
    content = json.loads(json.dumps(figure.to_dict()))
    assert content["label"] == "rFID@N=100" and content["value"] == 1.5
    assert content["protocol"]["weights_id"] == "6726825d" and content["protocol"]["unique_samples"] == 100
    assert "torch" in content["protocol"]["versions"]


def test_expected_bias_by_simulation():
    from tessera.metrics.fid import frechet_distance

    d, n, g = 6, 400, torch.Generator().manual_seed(0)
    eigenvalues = torch.tensor([4.0, 2, 1, 0.5, 0.25, 0.1], dtype=torch.float64)
    values = []
    for _ in range(200):
        x = torch.randn(n, d, generator=g, dtype=torch.float64) * eigenvalues.sqrt()
        values.append(frechet_distance(torch.zeros(d), eigenvalues.diag(), x.mean(0), x.T.cov()))
    measured = float(torch.stack(values).mean())
    assert expected_bias(eigenvalues.diag(), n) == pytest.approx(measured, rel=0.1)
    both = expected_bias(eigenvalues.diag(), n, n)
    assert both == pytest.approx(2 * expected_bias(eigenvalues.diag(), n))
    assert expected_bias(torch.zeros(3, 3), 10) == 0


def test_console_line_states_bias_and_warnings():
    few = Figure(
        "gFID", 12.5, Protocol(**(STANDARD | {"samples": 100})), {"expected_bias": 3.25}, ["too few", "uneven"]
    )
    assert few.describe() == (
        f"{few.label} = 12.5000 (about 3.2 of it is to be expected of 100 samples); warning: too few; warning: uneven"
    )
    assert few.to_dict()["warnings"] == ["too few", "uneven"]
    assert few.describe(warnings=False) == few.describe().partition(";")[0]
    # rounding may leave a distance of equal sets below 0; a kernel distance may well be negative
    below = Figure("rFID", -1e-12, Protocol(**STANDARD))
    assert below.describe() == "rFID = 0.0000" and below.to_dict()["value"] == -1e-12
    assert Figure("KID", -0.5, Protocol(**STANDARD)).describe().endswith("= -0.5000")
    full = Figure("rFID", 1.5, Protocol(**STANDARD), {"expected_bias": 0.1})
    assert full.describe() == "rFID = 1.5000"


@pytest.mark.parametrize(
    ("warnings", "expected"),
    [
        (sample_warnings(50_000, 2048), None),
        (sample_warnings(2048, 2048), "do not determine a covariance of 2048"),
        (sample_warnings(2047, 64), "fewer than 2048 samples"),
        (duplicate_warnings(10, 10), None),
        (duplicate_warnings(10, 8), "2 of 10 images are exact repeats"),
        (balance_warnings(torch.arange(20) % 10, 10), None),
        (balance_warnings(torch.arange(23) % 10, 10), None),
        (balance_warnings(torch.tensor([0, 0, 0, 1]), 2), "between 1 and 3 images"),
        (balance_warnings(torch.tensor([0, 0, 2, 2]), 4), "2 of 4 classes have no image"),
        (balance_warnings(torch.tensor([5, 5, 9, 9])), None),
        (extractor_warnings("inception-2015-12-05", True), None),
        (extractor_warnings("digits-cnn", False), "digits-cnn features .* no image quality"),
        (reference_warnings("digits-train"), None),
        (reference_warnings("imagenet-val"), "imagenet-val is not what a generator learns from"),
        (size_warnings((8, 8), (8, 8)), None),
        (size_warnings((8, 8), None), None),
        (size_warnings((8, 8), (16, 16)), "8 x 8 pixels are compared with ones of 16 x 16"),
    ],
)
def test_warnings(warnings, expected):
    assert len(warnings) == (expected is not None)
    assert expected is None or re.search(expected, warnings[0])
