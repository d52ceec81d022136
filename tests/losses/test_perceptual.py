import pytest
import torch
from safetensors.torch import save_file

from golden_cases import assert_close, golden
from tessera.errors import CheckpointError, DataError, MissingFileError
from tessera.losses import LPIPS
from tessera.losses.lpips_network import linear_weights_of


def thin_lpips(data, tmp_path):
    save_file(
        {k: v.contiguous() for k, v in data.weights.items() if k.startswith("net.")}, tmp_path / "vgg.safetensors"
    )
    save_file({k: v.contiguous() for k, v in data.weights.items() if k.startswith("lin")}, tmp_path / "lin.safetensors")
    return LPIPS(tmp_path / "vgg.safetensors", tmp_path / "lin.safetensors")


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_lpips"])
def test_lpips(case, tmp_path):
    data = golden(case)
    lpips = thin_lpips(data, tmp_path).train()
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    x = data.input["x"].clone().requires_grad_()
    value = lpips(x, data.input["y"])
    assert_close(value, data.output["lpips"].flatten())
    for stage, features in enumerate(lpips.features(data.input["x"])):
        assert_close(features[:1], data.output[f"feat_{stage}"])
    value.mean().backward()
    assert_close(x.grad, data.output["grad_x"])
    assert lpips(x, x).abs().max() == 0


def test_lpips_without_weights(tmp_path):
    with pytest.raises(MissingFileError, match=r"perceptual\.backbone_weights=.*perceptual=none"):
        LPIPS(tmp_path / "nothing.pth")
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"lacks features\.2\.weight"):
        LPIPS(tmp_path / "part.pth")


def test_frozen_eval_and_without_gradient_for_equal_images(tmp_path):
    lpips = thin_lpips(golden("xqgan_lpips"), tmp_path)
    before = {name: value.clone() for name, value in lpips.named_buffers()}
    outer = torch.nn.ModuleList([lpips]).train().requires_grad_(True)
    assert not any(module.training for module in lpips.modules())
    assert not list(outer.parameters()) and not outer.state_dict() and not any(b.requires_grad for b in outer.buffers())
    # all features 0 in places: the norm has no derivative there
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(x, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all()
    assert len(before) > 26 and all(torch.equal(value, before[name]) for name, value in lpips.named_buffers())


def test_small_images_are_refused(tmp_path):
    lpips = thin_lpips(golden("xqgan_lpips"), tmp_path)
    with pytest.raises(DataError, match=r"\(15, 16\) pixels.*perceptual=none"):
        lpips(torch.zeros(1, 3, 15, 16), torch.zeros(1, 3, 15, 16))


def test_linear_weights_of_another_backbone_are_refused(tmp_path):
    data = golden("xqgan_lpips")
    thin_lpips(data, tmp_path)
    wider = {k: torch.cat([v, v], 1) for k, v in data.weights.items() if k.startswith("lin")}
    save_file(wider, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"perceptual\.linear_weights=.*lin0.*backbone"):
        LPIPS(tmp_path / "vgg.safetensors", tmp_path / "wide.safetensors")


def test_packaged_linear_weights_fit_the_real_widths():
    linear = linear_weights_of("vgg", "perceptual")
    found = torch.load(linear, map_location="cpu", weights_only=True)
    assert [found[f"lin{stage}.model.1.weight"].shape[1] for stage in range(5)] == [64, 128, 256, 512, 512]
    assert all((found[f"lin{stage}.model.1.weight"] >= 0).all() for stage in range(5))


def test_unreadable_weights(tmp_path):
    (tmp_path / "vgg.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"perceptual\.backbone_weights=.*can't be read"):
        LPIPS(tmp_path / "vgg.pth")
