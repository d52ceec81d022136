import pytest
import torch
from torch import nn

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.discriminators import DINODiscriminator
from tessera.discriminators.dino import JointBatchNorm1d, SpectralConv1d, VirtualBatchNorm
from tessera.errors import ConfigError, MissingFileError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 3}


def tiny(**changes):
    torch.manual_seed(0)
    return DINODiscriminator(**{"pretrained": False, "readouts": (0, 2), "backbone": TINY, **changes})


class Fixed:
    """Draws that decide between crop and scaling."""

    def __init__(self, *values):
        self.values = values

    def shared(self, stream, *shape):
        assert stream == "dino/crop" and shape == (3,)
        return torch.tensor(self.values, dtype=torch.float64)


def published(file, changed=None):
    options = file.config
    names = ("img_size", "patch_size", "embed_dim", "num_heads", "depth")
    model = DINODiscriminator(
        pretrained=False,
        readouts=options["key_depths"],
        # one process is a machine, too
        norm={"lbn": "sbn", "hbn": "sbn"}.get(options["norm_type"], options["norm_type"]),
        backbone={name: options[name] for name in names},
    )
    weights = {**file.weights, **(changed or {})}
    heads = {key: value for key, value in weights.items() if key.startswith("heads.")}
    prefix = "dino_proxy.0."
    backbone = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    assert_close(model.standardise.scale, backbone.pop("x_scale"), atol=1e-7)
    assert_close(model.standardise.shift, backbone.pop("x_shift"), atol=1e-6)
    model.load_state_dict(heads, strict=True)
    model.backbone.module.load_state_dict(backbone, strict=True)
    return model.eval()


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_disc_dino"])
def test_published_discriminator(case):
    file = golden(case)
    model, given, expected = published(file), file.input, file.output
    images = given["image_small"].clone().requires_grad_()
    logits = model(images)
    assert_close(logits, expected["logits_small"], atol=1e-4)
    (gradient,) = torch.autograd.grad(logits.mean(), images)
    assert_close(gradient, expected["grad_image_small"], atol=1e-5)
    with torch.no_grad():
        found = model.features(model.resize(model.standardise(images)))
        readouts = [expected[f"activation_{number}"] for number in range(len(found))]
        assert sum(key.startswith("activation_") for key in expected) == len(found)
        for ours, theirs in zip(found, readouts, strict=True):
            assert_close(ours, theirs, atol=1e-4)
        batches = [key.removeprefix("image_") for key in given if key.startswith("image_small_b")]
        assert batches
        for name in batches:
            assert_close(model(given[f"image_{name}"]), expected[f"logits_{name}"], atol=1e-4)
        large = given["image_large"]
        assert_close(model(large, Fixed(1.0, 0, 0)), expected["logits_large_area"], atol=1e-4)
        places = [side - model.size + 1 for side in large.shape[-2:]]
        top, left = ((at + 0.5) / count for at, count in zip(given["crop_offset"].tolist(), places, strict=True))
        assert_close(model(large, Fixed(0.0, top, left)), expected["logits_large_crop"], atol=1e-4)
        # training improves the spectral norms first
        model.train()
        assert_close(model(given["image_small"]), expected["logits_small_train"], atol=1e-4)
        for key, value in expected.items():
            if key.startswith("after_train/"):
                assert_close(model.state_dict()[key.removeprefix("after_train/")], value, atol=1e-5)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", ["xqgan_disc_dino"])
def test_parity_sees_every_part(case):
    file = golden(case)
    last = file.config["key_depths"][-1]
    parts = ["dino_proxy.0.patch_embed.proj.weight", "dino_proxy.0.cls_token", "dino_proxy.0.pos_embed"]
    parts += [f"dino_proxy.0.blocks.{last}.{name}.weight" for name in ("norm1", "attn.qkv", "mlp.fc2")]
    parts += ["heads.0.0.0.weight_u", "heads.1.0.1.weight", "heads.1.1.fn.0.weight_orig", "heads.0.2.bias"]
    for key in parts:
        model = published(file, {key: file.weights[key] * -1.5 + 0.1})
        with torch.no_grad():
            assert not torch.allclose(model(file.input["image_small"]), file.output["logits_small"], atol=1e-3), key


def test_the_published_size():
    """7.386 M trainable parameters on a backbone of ViT-S/16; 980 logits per image."""
    with torch.device("meta"):
        model = DINODiscriminator()  # no weights are fetched for it there
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 7.386
    assert len(model.heads) * model.backbone.module.patch_embed.num_patches == 980


def test_the_backbone_is_no_part_of_the_module():
    model = tiny()
    assert all(name.startswith("heads.") for name in model.state_dict())
    assert all(name.startswith("heads.") for name, _ in model.named_parameters())
    model.requires_grad_(True).train()
    backbone = model.backbone.module
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    model(images).mean().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_it_follows_the_device_of_the_images():
    model, images = tiny().to("meta"), torch.empty(2, 3, 32, 32, device="meta")
    assert all(readout.is_meta for readout in model.features(model.resize(model.standardise(images))))
    assert next(model.backbone.module.parameters()).is_meta


@pytest.mark.parametrize("norm", ["bn", "sbn", "gn"])
@pytest.mark.parametrize("count", [1, 9])
def test_norms_take_any_batch_size(norm, count):
    model = tiny(norm=norm).train()
    assert model(torch.randn(count, 3, 32, 32)).shape == (count, 3 * 16)


def test_virtual_batches_are_nearly_equal_and_independent():
    norm, x = VirtualBatchNorm(4), torch.randn(17, 4, 5)
    whole = norm(x)
    parts = [6, 6, 5]
    for found, share in zip(whole.split(parts), x.split(parts), strict=True):
        variance, mean = torch.var_mean(share, (0, 2), correction=0, keepdim=True)
        torch.testing.assert_close(found, (share - mean) / (variance + 1e-6).sqrt())


def test_crops_are_drawn_for_the_whole_batch_from_the_step():
    model, images = tiny().eval(), torch.randn(3, 3, 40, 48)
    found = {tuple(model.resize(images, Fixed(0.0, u, v)).flatten().tolist()) for u in (0.0, 0.99) for v in (0.0, 0.99)}
    corners = [images[..., y : y + 32, x : x + 32].flatten().tolist() for y in (0, 8) for x in (0, 16)]
    assert found == {tuple(corner) for corner in corners}
    first, again = (model(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    others = [model(images, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert len({round(float(logits.sum().detach()), 3) for logits in others}) > 2


def test_spectral_norm_converges_to_the_largest_singular_value():
    torch.manual_seed(0)
    layer = SpectralConv1d(6, 5, 9).train()
    with torch.no_grad():
        layer.weight_orig.mul_(7)
        for _ in range(60):
            layer(torch.zeros(1, 6, 9))
        x = torch.randn(2, 6, 12)
        largest = torch.linalg.matrix_norm(layer.weight_orig.flatten(1), 2)
        ring = torch.cat([x[..., -4:], x, x[..., :4]], -1)
        expected = nn.functional.conv1d(ring, layer.weight_orig / largest, layer.bias)
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-3, atol=1e-3)
        vectors = layer.weight_u.clone()
        layer(x)
    assert torch.equal(vectors, layer.weight_u), "evaluation leaves the estimate alone"


def test_two_training_forwards_before_one_backward():
    model = tiny().train()
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    (model(real).mean() - model(fake).mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def _joint_norm(rank, world):
    norm = JointBatchNorm1d(3)
    return norm(_tokens()[rank * 2 : rank * 2 + 2]).tolist()


def _tokens():
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


def test_sbn_covers_all_processes():
    first, second = run_forked(_joint_norm)
    torch.testing.assert_close(torch.tensor(first + second), JointBatchNorm1d(3)(_tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "layer"}, r"discriminator\.norm='layer' is unknown; choose one of bn, sbn, gn"),
        ({"readouts": (0, 3)}, r"discriminator\.readouts=\[0, 3\].*at most 2"),
        ({"readouts": (2, 0)}, r"discriminator\.readouts=\[2, 0\]"),
        ({"crop_probability": 1.5}, r"discriminator\.crop_probability=1\.5"),
        ({"model": "vit_of_nobody"}, r"discriminator\.model='vit_of_nobody' is no model of timm"),
        ({"backbone": {**TINY, "width": 3}}, r"discriminator: timm can't build vit_small.*width"),
        ({"norm": "gn", "backbone": {**TINY, "embed_dim": 36}}, r"discriminator\.norm=gn needs channels"),
    ],
)
def test_impossible_arguments(changes, match):
    with pytest.raises(ConfigError, match=match):
        tiny(**changes)


def test_weights_from_disk(tmp_path):
    model = tiny()
    torch.save(model.backbone.module.state_dict(), tmp_path / "dino.pth")
    torch.manual_seed(7)
    again = DINODiscriminator(weights=tmp_path / "dino.pth", readouts=(0, 2), backbone={**TINY, "img_size": 64})
    torch.testing.assert_close(
        again.backbone.module.blocks[1].attn.qkv.weight, model.backbone.module.blocks[1].attn.qkv.weight
    )
    assert again.backbone.module.pos_embed.shape[1] == 65, "positions are resampled"
    with pytest.raises(MissingFileError, match=r"discriminator\.weights=.*discriminator\.pretrained=false"):
        tiny(pretrained=True, weights=tmp_path / "nothing.pth")
    assert again(torch.zeros(1, 3, 8, 8)).isfinite().all()
