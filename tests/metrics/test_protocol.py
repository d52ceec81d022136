import json

import pytest
import torch

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
