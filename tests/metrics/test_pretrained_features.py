import pytest
import torch
from torchvision import models

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.metrics.pretrained_features import TimmFeatures, TorchvisionFeatures
from tessera.metrics.resize import resize

VIT = {
    "model": "vit_tiny_patch16_224",
    "pretrained": False,
    "input_size": 32,
    "network": {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2},
}
IMAGES = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_vision_transformer():
    extractor = TimmFeatures(**VIT)
    out = extractor.extract(IMAGES)
    assert out.pooled.shape == (3, extractor.num_features) == (3, 12) and out.logits is out.spatial is None
    # the class token after the last norm of standardised images
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (resize(IMAGES, 32, "pil_bicubic") / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(out.pooled, extractor.network.forward_features(x)[:, 0])
    assert extractor.name == "random-vit_tiny_patch16_224-seed0" and extractor.weights_id == "random-seed-0"
    assert not extractor.is_image_quality and not extractor.train().network.training
    assert "pil_bicubic-32" in extractor.identity


def test_random_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first, again = TimmFeatures(**VIT)(IMAGES), TimmFeatures(**VIT)(IMAGES)
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, TimmFeatures(**VIT, seed=1)(IMAGES))


def test_weights_of_a_file(tmp_path):
    made = TimmFeatures(**VIT)
    torch.save(made.network.state_dict(), tmp_path / "vit.pth")
    options = VIT | {"pretrained": True, "weights": tmp_path / "vit.pth"}
    loaded = TimmFeatures(**options, name="tiny-vit")
    assert torch.equal(loaded(IMAGES), made(IMAGES))
    assert loaded.name == "tiny-vit" and len(loaded.weights_id) == 8 and loaded.is_image_quality
    with torch.no_grad():
        made.network.norm.bias += 1
    torch.save(made.network.state_dict(), tmp_path / "vit.pth")
    assert TimmFeatures(**options).weights_id != loaded.weights_id


def test_classifiers_give_logits():
    timm = TimmFeatures("resnet10t", pretrained=False, classifier=True, input_size=32, normalisation="half")
    out = timm.extract(IMAGES)
    assert out.pooled.shape == (3, 512) and out.logits.shape == (3, timm.num_classes) == (3, 1000)
    vision = TorchvisionFeatures("shufflenet_v2_x0_5", pretrained=False, input_size=32)
    out = vision.extract(IMAGES)
    assert out.pooled.shape == (3, 1024) and vision.name == "random-torchvision-shufflenet_v2_x0_5-seed0"
    with torch.no_grad():
        torch.testing.assert_close(vision.network.fc(out.pooled), out.logits)


def test_torchvision_weights_of_a_file(tmp_path):
    network = models.get_model("shufflenet_v2_x0_5", weights=None)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    extractor = TorchvisionFeatures("shufflenet_v2_x0_5", weights=tmp_path / "net.pth", input_size=32)
    assert extractor.name == "torchvision-shufflenet_v2_x0_5"
    with pytest.raises(CheckpointError, match=r"metrics\.features\.weights=.*does not fit squeezenet1_1"):
        TorchvisionFeatures("squeezenet1_1", weights=tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TimmFeatures("vit_of_nobody"), ConfigError, r"metrics\.features\.model='vit_of_nobody'"),
        (lambda: TimmFeatures(**VIT, resize="box"), ConfigError, r"metrics\.features\.resize='box'"),
        (lambda: TimmFeatures(**VIT, normalisation="x"), ConfigError, r"metrics\.features\.normalisation='x'"),
        (lambda: TimmFeatures("resnet10t", weights="none.pth"), MissingFileError, r"metrics\.features\.weights=none"),
        (lambda: TorchvisionFeatures("resnet0"), ConfigError, r"metrics\.features\.model='resnet0'"),
        (lambda: TorchvisionFeatures("resnet18", weights="none.pth"), MissingFileError, r"features\.weights=none"),
        (lambda: TorchvisionFeatures("squeezenet1_1", pretrained=False), ConfigError, "no linear classifier"),
    ],
)
def test_bad_choices(make, error, message):
    with pytest.raises(error, match=message):
        make()
