import numpy as np
import pytest
import torch

from forked import run_forked
from generated_weights import draw
from golden_cases import assert_close, golden
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.losses import LPIPS as Loss
from tessera.losses.lpips_network import linear_weights_of
from tessera.metrics import LPIPS, LPIPSDistance
from tessera.metrics.reconstruction import unit_range

# slices of the lpips package: numbers of torchvision's convolutions -> (out, in, side)
ALEX = {1: {0: (64, 3, 11)}, 2: {3: (192, 64, 5)}, 3: {6: (384, 192, 3)}, 4: {8: (256, 384, 3)}, 5: {10: (256, 256, 3)}}
VGG = {
    1: {0: (64, 3, 3), 2: (64, 64, 3)},
    2: {5: (128, 64, 3), 7: (128, 128, 3)},
    3: {10: (256, 128, 3), 12: (256, 256, 3), 14: (256, 256, 3)},
    4: {17: (512, 256, 3), 19: (512, 512, 3), 21: (512, 512, 3)},
    5: {24: (512, 512, 3), 26: (512, 512, 3), 28: (512, 512, 3)},
}


def generated_backbone(slices: dict, base_seed: int) -> dict[str, torch.Tensor]:
    state = {}
    for number, convs in slices.items():
        for layer, (out, width, side) in convs.items():
            stem, shape = f"net.slice{number}.{layer}", (out, width, side, side)
            scale = np.float32(np.sqrt(2 / (width * side * side)))
            state[f"{stem}.weight"] = torch.from_numpy(draw(f"{stem}.weight", shape, base_seed) * scale)
            state[f"{stem}.bias"] = torch.from_numpy(draw(f"{stem}.bias", (out,), base_seed) * np.float32(0.05))
    return state


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alex.pth"
    state = generated_backbone(ALEX, 1)
    # under torchvision's names, with the classifier that LPIPS doesn't need
    state = {f"features.{key.split('.', 2)[2]}": value for key, value in state.items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


def pair(n: int = 3, size: int = 32):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, size, size, generator=g) * 2 - 1
    return images, (images + 0.3 * torch.randn(images.shape, generator=g)).clamp(-1, 1)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_lpips"])
def test_published_implementations(case, tmp_path):
    file = golden(case)
    images, recon, out, compared = file.input["images"], file.input["recon"], file.output, set()
    assert images.shape == (file.config["n"], 3, file.config["h"], file.config["w"])
    for backbone, slices in (("alex", ALEX), ("vgg", VGG)):
        torch.save(generated_backbone(slices, file.config["base_seed"]), tmp_path / f"{backbone}.pth")
        distance = LPIPSDistance(backbone, tmp_path / f"{backbone}.pth")
        actual = {f"lin_checksum/{backbone}/lin{i}": getattr(distance, f"linear{i}").double().sum() for i in range(5)}
        value, stages = distance(recon, images), torch.stack(distance.terms(recon, images), 1)
        actual |= {f"lpips_pkg/{backbone}": value, f"lpips_pkg/{backbone}_per_layer": stages}
        actual |= {f"torchmetrics/{backbone}": value, f"torchmetrics/{backbone}_normalize01": value}
        if backbone == "vgg":
            actual["imagefolder/vgg"] = value
            # the loss of that name is the same distance
            assert_close(Loss(tmp_path / "vgg.pth")(recon, images), value)
        for key, ours in actual.items():
            assert_close(ours, out[key], atol=1e-5, rtol=1e-5)
        compared |= set(actual)
    assert compared == set(out)


def test_installed_package_agrees(tmp_path):
    """On a random backbone, of which the package makes its own state."""
    import lpips

    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = {key: value for key, value in theirs.state_dict().items() if key.startswith("net.")}
    torch.save(state, tmp_path / "alex.pth")
    images, recon = pair()
    with torch.no_grad():
        expected = theirs(recon, images).flatten()
    torch.testing.assert_close(LPIPSDistance("alex", tmp_path / "alex.pth")(recon, images), expected)


def test_mean_over_images_of_the_rounded_pairs(alex):
    images, recon = pair()
    distance = LPIPSDistance("alex", alex)
    metric = LPIPS(distance)
    for i in range(3):
        metric.update(recon[i : i + 1], images[i : i + 1])
    metric.update(recon, images, mask=torch.zeros(3, dtype=torch.bool))
    expected = distance(*(unit_range(x).float() * 2 - 1 for x in (recon, images))).double().mean()
    torch.testing.assert_close(metric.compute(), expected)
    assert not torch.allclose(expected, distance(recon, images).double().mean(), rtol=1e-6)
    as_u8 = [(unit_range(x) * 255).round().to(torch.uint8) for x in (recon, images)]
    torch.testing.assert_close(metric.values(*as_u8), metric.values(recon, images))
    assert metric.values(images, images).abs().max() == 0
    # generated weights are not the published ones, whose hash is in their name
    assert metric.flavour == f"alex-{distance.weights_id}"
    distance.weights_id = "7be5be79"
    assert metric.flavour == "alex"
    # the network is no state of the metric
    assert set(metric.state_dict()) == {"total", "n"} and not list(metric.parameters()) and not list(metric.children())


def test_bad_input(alex, tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.lpips\.backbone='squeeze'"):
        LPIPSDistance("squeeze", alex)
    with pytest.raises(
        MissingFileError, match=r"metrics\.lpips\.backbone_weights=.*no LPIPS without.*metrics/lpips=none"
    ):
        LPIPSDistance("alex", tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"lacks features\.2\.weight; give torchvision's vgg16"):
        LPIPSDistance("vgg", alex)
    with pytest.raises(CheckpointError, match=r"metrics\.lpips\.linear_weights=.*lin1.*192 channels"):
        LPIPSDistance("alex", alex, linear_weights_of("vgg", "metrics.lpips"))
    small = torch.zeros(1, 3, 40, 30)
    with pytest.raises(DataError, match=r"\(40, 30\) pixels are too small for LPIPS\[alex\]"):
        LPIPSDistance("alex", alex)(small, small)
    LPIPSDistance("alex", alex)(torch.zeros(1, 3, 31, 31), torch.zeros(1, 3, 31, 31))


def _uneven(rank, world, alex, recon, images):
    metric = LPIPS(LPIPSDistance("alex", alex))
    own = slice(0, 1) if rank == 0 else slice(1, None)
    metric.update(recon[own], images[own])
    return float(metric.compute())


def test_two_processes_equal_one(alex):
    images, recon = pair()
    expected = float(LPIPS(LPIPSDistance("alex", alex)).values(recon, images).mean())
    assert run_forked(_uneven, alex, recon, images) == pytest.approx([expected] * 2, rel=1e-6)
