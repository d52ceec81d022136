import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tessera.errors import CheckpointError, DataError, MissingFileError
from tessera.metrics import classifier_features
from tessera.metrics.classifier_features import WEIGHTS, DigitsFeatures, FashionFeatures
from tessera.metrics.features import FeatureExtractor, full_precision
from tessera.metrics.inception import InceptionFeatures


@pytest.mark.parametrize(("make", "limit_kb"), [(DigitsFeatures, 300), (FashionFeatures, 1000)])
def test_shipped_extractors(make, limit_kb):
    extractor = make()
    images = torch.rand(3, 3, 24, 20) * 2 - 1
    features = extractor(images)
    assert features.shape == (3, extractor.num_features) == (3, 64) and features.dtype == torch.float32
    assert (WEIGHTS / extractor.file).stat().st_size < limit_kb * 1000
    assert extractor.weights_id == extractor.shipped_hash and extractor.weights_id in extractor.identity
    with safe_open(WEIGHTS / extractor.file, framework="pt") as file:
        assert json.loads(file.metadata()["notes"])["val_accuracy"] == extractor.accuracy
    logits = extractor.extract(images).logits
    assert logits.shape == (3, extractor.num_classes) == (3, 10)
    # a float image gives what its PNG gives
    as_u8 = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(features, extractor(as_u8))
    # features of an image don't depend on its batch (up to summation order)
    torch.testing.assert_close(extractor(images[1:2])[0], features[1], atol=1e-5, rtol=1e-5)


def test_other_weights_are_named_and_damaged_ones_refused(tmp_path, monkeypatch):
    from tessera.metrics.feature_cnn import FeatureCNN, write_weights

    write_weights(tmp_path / "digits_cnn.safetensors", FeatureCNN(8, [4, 4, 4], 1, 5, 10), {})
    own = DigitsFeatures(tmp_path / "digits_cnn.safetensors")
    assert own.name == f"digits-cnn-{own.weights_id}" and own.weights_id != own.shipped_hash
    monkeypatch.setattr(classifier_features, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match=r"digits_cnn\.safetensors has SHA-256 .*, not fc1ab057 as shipped"):
        DigitsFeatures()


def test_never_trained_never_saved():
    extractor = DigitsFeatures().train().requires_grad_(True)
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    holder = nn.Module()
    holder.extractor, holder.layer = extractor, nn.Linear(1, 1)
    holder.train()
    assert not extractor.network.training
    assert set(holder.state_dict()) == {"layer.weight", "layer.bias"}
    assert not extractor(torch.rand(2, 3, 16, 16, requires_grad=True)).requires_grad


def test_always_float32():
    extractor, images = DigitsFeatures(), torch.rand(2, 3, 16, 16) * 2 - 1
    expected = extractor(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), expected)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with full_precision(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before


def test_features_tell_digits_apart():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images[4::5] / 16).float() * 2 - 1
    labels = torch.from_numpy(data.target[4::5])
    extractor = DigitsFeatures()
    images = nn.functional.interpolate(images[:, None].expand(-1, 3, -1, -1), scale_factor=2, mode="bilinear")
    features = extractor(images)
    logits = extractor.network.head(features)
    assert (logits.argmax(1) == labels).double().mean() > 0.98


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 16, 16), 1.01), r"100\.00% of the pixels are outside \[-1, 1\]"),
        (torch.rand(2, 3, 16, 16) * 255, "rescale images in another range"),
        (torch.full((2, 3, 16, 16), torch.nan), "not finite"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(DataError, match=message):
        DigitsFeatures()(images)


def test_missing_and_foreign_weights(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match=r"metrics\.features\.weights_path.*does not exist"):
        InceptionFeatures(tmp_path / "none.pth")
    with pytest.raises(MissingFileError, match="weights_path"):
        DigitsFeatures(tmp_path / "none.safetensors")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="6726825d"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        InceptionFeatures(tmp_path / "other.pth", weights_label="other")
    with pytest.raises(CheckpointError, match="FeatureCNN"):
        DigitsFeatures(tmp_path / "other.pth")

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingFileError, match=r"no route to host.*metrics\.features\.weights_path"):
        InceptionFeatures()


def test_every_extractor_says_what_it_is():
    for extractor in (DigitsFeatures(), FashionFeatures()):
        assert isinstance(extractor, FeatureExtractor)
        for attribute in ("name", "weights_id", "num_features", "input_size", "resize", "normalisation"):
            assert getattr(extractor, attribute)
        assert not extractor.is_image_quality
