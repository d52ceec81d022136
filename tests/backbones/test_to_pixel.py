"""Pixel heads: parity, placement of patches, gradients, refusals."""

import pytest
import torch

from golden_cases import assert_close, golden
from tessera.backbones import ConvPixels, LinearPixels, SirenPixels
from tessera.backbones.to_pixel import unpatchify
from tessera.errors import ConfigError
from tessera.zoo.keys import XQGAN, load_strictly, rename

HEADS = {"linear": LinearPixels, "conv": ConvPixels, "siren": SirenPixels}


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, h w, p p C): the inverse of `unpatchify`, by loops."""
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches = []
    for row in range(rows):
        for column in range(columns):
            top, left = row * patch_size, column * patch_size
            patch = images[:, :, top : top + patch_size, left : left + patch_size]
            patches.append(patch.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(patches, dim=1)


def published(file, variant):
    config = file.config
    head = HEADS[variant](width=config["in_dim"], patch_size=config["patch_size"], channels=config["in_channels"])
    named = {key.replace(f"{variant}.", "decoder.to_pixel.", 1): value for key, value in file.weights.items()}
    ours = rename({key: value for key, value in named.items() if key.startswith("decoder.")}, XQGAN)
    load_strictly(head, {key.removeprefix("decoder.to_pixel."): value for key, value in ours.items()}, "golden")
    return head


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_to_pixel"])
@pytest.mark.parametrize("variant", HEADS)
def test_published_head(case, variant):
    file = golden(case)
    config, tokens = file.config, file.input["tokens"]
    side, p = config["img_size"], config["patch_size"]
    with torch.no_grad():
        image = published(file, variant)(tokens, (side // p, side // p))
    recorded = file.output[variant]
    assert image.shape == recorded.shape
    if variant == "siren":
        # the public code takes the patches' memory for that of an image
        assert not torch.allclose(image, recorded, atol=1e-2)
        assert_close(patchify(image, p).reshape(recorded.shape), recorded, atol=1e-4)
    else:
        assert_close(image, recorded)


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (4, 4)])
def test_unpatchify_puts_every_patch_in_its_place(grid):
    patches = torch.randn(2, grid[0] * grid[1], 5 * 5 * 3)
    images = unpatchify(patches, grid, 5)
    assert images.shape == (2, 3, grid[0] * 5, grid[1] * 5)
    assert torch.equal(patchify(images, 5), patches)


@pytest.mark.parametrize("variant", HEADS)
def test_a_token_makes_the_pixels_of_its_own_patch_only(variant):
    head = HEADS[variant](width=6, patch_size=4)
    tokens = torch.randn(1, 6, 6)
    changed = tokens.clone()
    changed[0, 4] += 1.0
    difference = (head(tokens, (2, 3)) - head(changed, (2, 3))).detach().abs().sum(1)[0] > 0
    assert difference[4:8, 4:8].any()
    difference[4:8, 4:8] = False
    assert not difference.any()


@pytest.mark.parametrize("variant", HEADS)
def test_last_layer_is_what_the_pixels_come_from(variant):
    head = HEADS[variant](width=6, patch_size=4)
    head(torch.randn(2, 4, 6), (2, 2)).square().mean().backward()
    assert head.last_layer is dict(head.named_parameters())["projection.weight"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_siren_is_exact_under_autocast_and_starts_in_the_range_of_its_sines():
    head, tokens = SirenPixels(width=32, patch_size=4), torch.randn(2, 4, 32)
    plain = head(tokens, (2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(tokens, (2, 2)), plain)
    assert plain.abs().max() <= 1
    assert head.hidden.weight.abs().max() <= 1 / 32
    assert head.projection.weight.abs().max() <= (6 / 64) ** 0.5 / 30


@pytest.mark.parametrize("sizes", [{"width": 0, "patch_size": 4}, {"width": 4, "patch_size": 0}])
def test_refuses_empty_sizes(sizes):
    with pytest.raises(ConfigError, match=r"backbone\.decoder"):
        LinearPixels(**sizes)
    with pytest.raises(ConfigError, match="frequency"):
        SirenPixels(4, 4, frequency=0)
