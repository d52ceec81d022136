"""ViT backbones: shapes, positions, registers, precision, caching, pretrained weights, refusals."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from golden_cases import assert_close
from tessera.backbones import ConvPixels, ViTDecoder, ViTEncoder
from tessera.backbones.vit_network import vision_transformer
from tessera.errors import CheckpointError, ConfigError, MissingFileError

SMALL = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"
TINY = {
    "model": SMALL,
    "resolution": 16,
    "patch_size": 4,
    "pretrained": False,
    "drop_path": 0.0,
    "width": 24,
    "depth": 2,
    "num_heads": 3,
    "layer_scale": 0.5,
}


def encoder(**options):
    return ViTEncoder(**{**TINY, "grid": 3, **options})


def decoder(**options):
    return ViTDecoder(**{**TINY, "grid": 3, **options})


def spread(module):
    """Give the near-zero initial tokens a size that shows in results."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("latent_tokens", "mask_token", "cls_token", "reg_token")):
                parameter.normal_()
    return module.eval()


@pytest.mark.parametrize("position", ["absolute", "learned"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("name", [SMALL, REGISTERS])
@pytest.mark.parametrize("grid", [3, 4, (2, 5)])
def test_sizes_and_gradients(name, groups, position, grid):
    reader = encoder(model=name, groups=groups, position=position, grid=grid)
    writer = decoder(model=name, position=position, grid=grid)
    sides = (grid, grid) if isinstance(grid, int) else grid
    assert reader.latent_grid(16) == sides and reader.groups == groups and reader.out_channels == 24
    z = reader(torch.rand(2, 3, 16, 16))
    assert z.shape == (2, groups * 24, *sides)
    images = writer(z[:, :24])
    assert images.shape == (2, 3, 16, 16) and writer.resolution(sides) == 16 and writer.in_channels == 24
    (images.square().mean() + z.square().mean()).backward()
    for module in (reader, writer):
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None, parameter_name


@pytest.mark.parametrize(("resolution", "patch_size"), [(24, 4), (20, 5), (8, 8)])
@pytest.mark.parametrize("name", [SMALL, REGISTERS])
def test_other_resolutions_and_patches(name, resolution, patch_size):
    """The public code takes patch_size^2 for the number of patches, and one token for the prefix."""
    sizes = {"model": name, "resolution": resolution, "patch_size": patch_size, "grid": 2}
    with torch.no_grad():
        z = encoder(**sizes)(torch.rand(2, 3, resolution, resolution))
        assert z.shape == (2, 24, 2, 2)
        assert decoder(**sizes)(z).shape == (2, 3, resolution, resolution)


def test_float64():
    reader, writer = encoder().double(), decoder().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert reader(images).dtype == torch.float64 == writer(reader(images)).dtype
    twin = encoder()
    twin.load_state_dict(reader.state_dict())
    assert_close(twin(images.float()).double(), reader(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 384, 12, 6),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12, 12),
        ("vit_large_patch14_dinov2", 1024, 24, 16),
        ("vit_giant_patch14_reg4_dinov2", 1536, 40, 24),
    ],
)
def test_dinov2_of_every_size(name, width, depth, heads):
    """Also: pretrained weights are not fetched on the meta device."""
    with torch.device("meta"):
        reader = ViTEncoder(model=name, resolution=224, patch_size=16, pretrained=True)
    assert (reader.width, len(reader.network.blocks)) == (width, depth)
    assert reader.network.blocks[0].attn.num_heads == heads
    # the giant's MLP is a gated one of 4096 hidden channels, the others' hold four times the width
    mlp = 3 * 4096 * width + 8192 + width if "giant" in name else 8 * width**2 + 5 * width
    block = 4 * width**2 + 4 * width + mlp + 6 * width  # attention, MLP, two norms, two scales
    prefix, positions = (5, 196) if "reg4" in name else (1, 197)
    embedding = (prefix + positions + 3 * 16**2 + 1) * width
    assert sum(p.numel() for p in reader.network.parameters()) == depth * block + embedding + 2 * width
    assert reader.latent_grid(224) == (16, 16) and reader.patch_grid == (14, 14)


def sequence_by_hand(reader, images):
    """The encoder's sequence, position by position, with timm's own resampling."""
    from timm.layers import resample_abs_pos_embed

    network, (rows, columns) = reader.network, reader.grid
    prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    patches = network._pos_embed(network.patch_embed(images)) + reader.level_embed[0]
    table = resample_abs_pos_embed(network.pos_embed, (rows, columns), num_prefix_tokens=prefix)[:, prefix:]
    groups = reader.latent_tokens.chunk(reader.groups, dim=1)
    latents = [latent + table + reader.level_embed[1 + p] for p, latent in enumerate(groups)]
    return torch.cat([patches, *(latent.expand(len(images), -1, -1) for latent in latents)], dim=1)


@pytest.mark.parametrize("name", [SMALL, REGISTERS])
@pytest.mark.parametrize("grid", [3, 4, 6])
def test_absolute_positions(name, grid):
    """The patches' positions are timm's; the latents' are its table, resampled by timm's rule, and their level's."""
    reader = spread(encoder(model=name, grid=grid, groups=2))
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        ours, expected = reader._sequence(images), sequence_by_hand(reader, images)
    assert_close(ours, expected, atol=1e-6)


def test_branches_differ_by_level_and_tokens_only():
    reader = spread(encoder(groups=2))
    with torch.no_grad():
        reader.latent_tokens[:, 9:] = reader.latent_tokens[:, :9]
        reader.level_embed[2] = reader.level_embed[1]
        first, second = reader(torch.rand(2, 3, 16, 16)).chunk(2, dim=1)
        assert_close(first, second)
        reader.level_embed[2] += torch.randn(24)
        first, second = reader(torch.rand(2, 3, 16, 16)).chunk(2, dim=1)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("name", [SMALL, REGISTERS])
def test_decoder_gives_the_latents_a_prefix_of_their_own(name):
    writer = spread(decoder(model=name))
    z = torch.randn(2, 24, 3, 3)
    prefix = writer.num_prefix
    assert prefix == (1 if name == SMALL else 5)
    with torch.no_grad():
        sequence = writer._sequence(z)
        assert sequence.shape[1] == 2 * prefix + 16 + 9
        levels = writer.level_embed
        assert_close(sequence[:, :prefix] - levels[0], sequence[:, prefix + 16 : -9] - levels[1], atol=1e-6)
        assert_close(sequence[0, 0] - levels[0], writer.prefix()[0, 0], atol=1e-6)
        learned = decoder(model=name, position="learned").eval()
        assert learned._sequence(z).shape[1] == prefix + 16 + 9


def test_patches_of_another_prefix_length_are_not_confused():
    """The pixels come from the patches' tokens: with zero attention and MLP each depends on its own position only."""
    writer = spread(decoder(model=REGISTERS))
    with torch.no_grad():
        for block in writer.network.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
        images = writer(torch.randn(1, 24, 3, 3))
        tokens = writer.mask_token + writer.network.pos_embed + writer.level_embed[0]
        assert_close(images, writer.to_pixel(writer.network.norm(tokens), (4, 4)))


def test_positions_are_added_in_float32_under_autocast():
    reader = spread(encoder())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sequence = reader._sequence(images)
        assert sequence.dtype == torch.float32
        assert torch.isfinite(reader(images)).all()
    with torch.no_grad():
        expected = reader._sequence(images)
    assert torch.equal(sequence[:, 17:], expected[:, 17:])  # the latents see no convolution
    half = spread(encoder()).to(torch.bfloat16)
    assert half(images.bfloat16()).dtype == torch.bfloat16


def test_resampled_positions_are_kept_in_evaluation_until_the_table_changes():
    reader = spread(encoder())
    with torch.no_grad():
        first = reader.positions((3, 3))
        assert reader.positions((3, 3)) is first
        reader.network.pos_embed += 1.0
        assert_close(reader.positions((3, 3)), first + 1, atol=1e-5)
        second = reader.positions((3, 3))
        reader.load_state_dict({k: v.clone() for k, v in reader.state_dict().items()})
        assert reader.positions((3, 3)) is not second
        reader.double()
        assert reader.positions((3, 3)) is not second
        twin = copy.deepcopy(reader)
        twin.network.pos_embed.zero_()
        assert twin.positions((3, 3)).abs().max() == 0
    with torch.inference_mode():
        kept = reader.positions((5, 5))
    assert not kept.is_inference()
    positions = reader.positions((3, 3))
    assert positions.requires_grad  # in training they are part of the graph
    reader.network.requires_grad_(False)
    assert reader.positions((3, 3)) is reader.positions((3, 3))


def test_drop_path_acts_in_training_only():
    reader = encoder(drop_path=0.5, depth=4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in reader.network.blocks]
    assert rates == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
    images = torch.rand(1, 3, 16, 16).repeat(16, 1, 1, 1)
    assert reader(images).std(0).max() > 0
    assert reader.eval()(images).std(0).max() < 1e-5


def test_pixel_head_is_a_choice():
    writer = decoder(to_pixel=ConvPixels)
    assert isinstance(writer.to_pixel, ConvPixels) and writer.last_layer is writer.to_pixel.projection.weight
    assert writer(torch.randn(1, 24, 3, 3)).shape == (1, 3, 16, 16)


def test_the_decoder_has_no_patch_embedding():
    assert not [key for key in decoder().state_dict() if "patch_embed" in key]


def test_settings_that_no_weight_shows_enter_the_text():
    assert encoder(num_heads=3).extra_repr() != encoder(num_heads=2).extra_repr()
    assert encoder(position="learned").extra_repr() != encoder().extra_repr()


def test_initial_positions():
    for position in ("absolute", "learned"):
        for build in (encoder, decoder):
            module = build(position=position, grid=12, position_std=0.5)
            table = module.network.pos_embed if position == "absolute" else module.latent_pos_embed
            assert 0.35 < table.std() < 0.5 and table.abs().max() <= 1.0  # normal, cut at two deviations


@pytest.fixture
def weights_file(tmp_path):
    """Weights as they would be published: 14 x 14 pixels per patch, a grid of 5 x 5."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    source = vision_transformer(SMALL, False, None, "test", img_size=70, patch_size=14, **sizes)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    return path, source


def test_pretrained_weights_from_a_file_are_resampled(weights_file):
    path, source = weights_file
    reader = encoder(pretrained=True, weights=str(path))
    state, expected = reader.network.state_dict(), source.state_dict()
    for key in expected.keys() - {"pos_embed", "patch_embed.proj.weight"}:
        assert torch.equal(state[key], expected[key]), key
    # FlexiViT: an image that shrinking takes nothing from (one in the range of the transposed resize) gives through the
    # resized kernel what it gave through the first one
    images = torch.zeros(1, 3, 14, 14, requires_grad=True)
    small = torch.nn.functional.interpolate(images, size=(4, 4), mode="bicubic", antialias=True)
    (images,) = torch.autograd.grad(small, images, torch.randn(1, 3, 4, 4))
    with torch.no_grad():
        small = torch.nn.functional.interpolate(images, size=(4, 4), mode="bicubic", antialias=True)
        before = torch.nn.functional.conv2d(images, expected["patch_embed.proj.weight"])
        after = torch.nn.functional.conv2d(small, state["patch_embed.proj.weight"])
    assert_close(after, before, atol=1e-5)
    assert torch.equal(state["pos_embed"][:, 0], expected["pos_embed"][:, 0])
    plane = expected["pos_embed"][:, 1:].mT.unflatten(2, (5, 5))
    plane = torch.nn.functional.interpolate(plane, size=(4, 4), mode="bicubic", antialias=True)
    assert_close(state["pos_embed"][:, 1:], plane.flatten(2).mT)
    writer = decoder(pretrained=True, weights=str(path))
    assert torch.equal(writer.network.norm.weight, expected["norm.weight"])


def test_pretrained_weights_that_are_missing_or_do_not_fit(weights_file, tmp_path, monkeypatch):
    path, _ = weights_file
    with pytest.raises(MissingFileError, match=r"backbone\.encoder\.weights=.*absent"):
        encoder(pretrained=True, weights=str(tmp_path / "absent.pth"))
    with pytest.raises(CheckpointError, match=r"backbone\.decoder\.weights=.*does not fit"):
        decoder(pretrained=True, weights=str(path), width=48)
    import timm

    def offline(*args, pretrained=False, **kwargs):
        assert pretrained
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        MissingFileError, match=r"backbone\.encoder\.model=.*no route to host.*backbone\.encoder\.weights"
    ):
        encoder(pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_huge_dinov9"}, r"encoder\.model='vit_huge_dinov9' is no vision transformer of timm"),
        ({"model": "resnet18", "width": None, "depth": None, "num_heads": None}, r"encoder\.model='resnet18'"),
        (
            {"model": "vit_base_patch16_rpn_224", "width": None, "depth": None, "num_heads": None},
            r"encoder\.model='vit_base_patch16_rpn_224'",
        ),
        ({"grid": 0}, r"encoder\.grid=0"),
        ({"grid": (2, 3, 4)}, r"encoder\.grid"),
        ({"groups": 0}, r"encoder\.groups=0"),
        ({"position": "rope"}, r"encoder\.position='rope'.*absolute, learned"),
        ({"drop_path": 1.0}, r"encoder\.drop_path=1.0"),
        ({"patch_size": 5}, r"encoder\.resolution=16 is not divisible by backbone\.encoder\.patch_size=5"),
        ({"num_heads": 5}, r"encoder\.num_heads=5 does not divide"),
        ({"depth": 0}, r"encoder\.depth=0"),
        ({"position_std": 0.0}, r"encoder\.position_std=0.0"),
        ({"layer_scale": -1.0}, r"encoder\.layer_scale=-1.0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        encoder(**options)


def test_refuses_another_resolution_or_grid():
    with pytest.raises(ConfigError, match=r"data\.dataset\.resolution=32.*backbone\.encoder\.resolution=16"):
        encoder().latent_grid(32)
    with pytest.raises(ConfigError, match=r"grid of \(4, 4\).*backbone\.decoder\.grid=\(3, 3\)"):
        decoder().resolution((4, 4))
