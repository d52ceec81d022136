import pytest
import torch

from generated_weights import generated_inception
from golden_cases import golden
from tessera.data import from_uint8
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.metrics import inception
from tessera.metrics.inception import InceptionFeatures, PytorchFIDFeatures
from tessera.metrics.resize import resize

SEED = 12345


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(generated_inception(SEED), path)
    return path


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, key: str) -> None:
    assert actual.shape == expected.shape, key
    assert (actual - expected).norm() <= tolerance * expected.norm(), key


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_inception"])
def test_features_of_the_fid_inception(case, tmp_path):
    file = golden(case)
    path = tmp_path / "inception.pth"
    torch.save(generated_inception(file.config["base_seed"]), path)
    extractor = InceptionFeatures(path, weights_label="generated")
    antialiased = InceptionFeatures(path, weights_label="generated", resize="antialias")
    unrounded = PytorchFIDFeatures(path, weights_label="generated")
    compared, shapes = set(), []
    extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    assert file.config["images"]
    for number, (count, height, width) in enumerate(file.config["images"]):
        images = file.input[f"images_{number}"]
        assert images.shape == (count, 3, height, width) and images.dtype == torch.uint8
        out = extractor.extract(images)
        shapes.clear()
        with torch.no_grad():
            taps = extractor.network((resize(images, 299) - 128) / 128).taps
        actual = {f"adm/{width}": value for width, value in taps.items()}
        actual |= {"adm/logits_unbiased": out.logits, "adm/spatial7": out.spatial}
        actual["adm/logits"] = out.logits + extractor.network.fc.bias
        actual["torchmetrics_antialias_false/2048"] = out.pooled
        actual["torchmetrics_default_antialias/2048"] = antialiased(images)
        actual["pytorch_fid_seedvoken/2048"] = unrounded(from_uint8(images))
        for key, value in actual.items():
            near(value, file.output[f"images_{number}/{key}"], 2e-4, key)
        assert [list(s) for s in shapes] == [file.output[f"images_{number}/adm/mixed_6d_branch1x1_shape"].tolist()]
        compared |= {f"images_{number}/{key}" for key in actual}
        compared.add(f"images_{number}/adm/mixed_6d_branch1x1_shape")
    extractor.network.double()
    for number in range(len(file.config["images"])):
        key = f"images_{number}/adm_float64/2048"
        images = file.input[f"images_{number}"]
        with torch.no_grad():
            exact = extractor.network((resize(images.double(), 299) - 128) / 128).taps[2048]
        # weights are rounded to float32 once more where the batch norm is folded in
        near(exact, file.output[key], 1e-6, key)
        compared.add(key)
    assert compared == set(file.output)
    assert extractor.identity.startswith("generated:") and not extractor.is_image_quality


def test_installed_libraries_agree(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    images = torch.randint(0, 256, (1, 3, 40, 33), dtype=torch.uint8)
    out = InceptionFeatures(weights, weights_label="generated").extract(images)
    # it loads strictly: the layout is the published one
    fidelity = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    pooled, logits = fidelity(images)
    near(out.pooled, pooled, 1e-5, "torch-fidelity")
    near(out.logits, logits, 1e-5, "torch-fidelity's logits")
    theirs = NoTrainInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    theirs.use_antialias = False
    near(out.pooled, theirs(images), 1e-5, "torchmetrics")


def test_taps_and_other_options_are_part_of_the_name(weights):
    images = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    small = InceptionFeatures(weights, weights_label="generated", tap=192)
    assert small.name == "generated-192" and small(images).shape == (2, small.num_features) == (2, 192)
    assert small.num_spatial == 2023 and small.num_classes == 1008
    with pytest.raises(ConfigError, match=r"metrics\.features\.tap=100"):
        InceptionFeatures(weights, weights_label="generated", tap=100)
    with pytest.raises(ConfigError, match=r"metrics\.features\.resize='bicubic'"):
        InceptionFeatures(weights, weights_label="generated", resize="bicubic")
    unrounded = PytorchFIDFeatures(weights, weights_label="generated")
    assert unrounded.quantisation == "none" and unrounded.resize == "half_pixel"
    # sub-level differences count there, and only there
    x = from_uint8(images)
    shifted = (x + 0.3 / 127.5).clamp(-1, 1)
    assert not torch.equal(unrounded(x), unrounded(shifted)) and torch.equal(small(x), small(shifted))
    with pytest.raises(DataError, match="outside"):
        unrounded(x * 255)


def test_weights_are_checked(weights, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*, not 6726825d"):
        InceptionFeatures(weights)
    state = dict(generated_inception(SEED))
    for change, message in (
        (lambda s: s.pop("Mixed_6d.branch1x1.bn.running_var"), "lacks Mixed_6d.branch1x1.bn.running_var"),
        (lambda s: s.pop("fc.bias"), "missing fc.bias"),
        (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), r"fc.weight is \(1000, 2048\)"),
        (lambda s: s.update({"AuxLogits.fc.weight": torch.zeros(1)}), "unexpected AuxLogits.fc.weight"),
    ):
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            InceptionFeatures(tmp_path / "other.pth", weights_label="other")
    # counts of batches may be missing
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "plain.pth")
    monkeypatch.setenv("TESSERA_INCEPTION", str(tmp_path / "plain.pth"))
    assert InceptionFeatures(weights_label="by-environment").name == "by-environment"
    monkeypatch.setenv("TESSERA_INCEPTION", str(tmp_path / "nowhere.pth"))
    with pytest.raises(MissingFileError, match=r"TESSERA_INCEPTION=.*nowhere"):
        InceptionFeatures()


def test_published_file_carries_no_name(weights, monkeypatch):
    digest = InceptionFeatures(weights, weights_label="generated").weights_id
    monkeypatch.setattr(inception, "INCEPTION_HASH", digest)
    extractor = InceptionFeatures(weights)
    assert extractor.name == "inception-2015-12-05" and extractor.is_image_quality
