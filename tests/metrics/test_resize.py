import pytest
import torch

from golden_cases import golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.resize import RESIZES, resize

MODES = {
    "tf_legacy": "legacy_tf",
    "torch_fidelity": "legacy_tf",
    "tf_half_pixel": "half_pixel",
    "torch_half_pixel": "half_pixel",
    "torch_antialias": "antialias",
    "cleanfid_pil_bicubic_float": "pil_bicubic",
}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_resize"])
def test_published_flavours(case):
    file = golden(case)
    compared = set()
    for name, (height, width, channels, to_height, to_width) in file.config["resize"]["cases"].items():
        images = file.input[name]
        assert images.shape[1:] == (channels, height, width) and images.dtype == torch.uint8
        for key, expected in file.output.items():
            if key.startswith(f"{name}/"):
                actual = resize(images, (to_height, to_width), MODES[key.split("/")[1]])
                atol = 1e-4 if MODES[key.split("/")[1]] == "legacy_tf" else 2e-3
                torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
                compared.add(key)
    assert compared == set(file.output)


def test_flavours_differ_and_agree_where_they_should():
    images = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, large = ({mode: resize(images, size, mode) for mode in RESIZES} for size in (11, 33))
    for results in (small, large):
        for mode in RESIZES[1:]:
            assert (results[mode] - results["legacy_tf"]).abs().mean() > 1
    assert torch.allclose(large["half_pixel"], large["antialias"], atol=1e-3)
    assert not torch.allclose(small["half_pixel"], small["antialias"], atol=1)
    for mode in RESIZES:
        assert torch.equal(resize(images, (20, 24), mode), images.float())
        # an image doesn't depend on its batch, nor on the memory layout
        for layout in (torch.contiguous_format, torch.channels_last):
            assert torch.allclose(resize(images[1:].contiguous(memory_format=layout), 33, mode), large[mode][1:])
        assert resize(images.double(), 33, mode).dtype == torch.float64


def test_bad_input():
    with pytest.raises(ConfigError, match=r"metrics\.features\.resize='lanczos'"):
        resize(torch.zeros(1, 3, 4, 4), 8, "lanczos")
    with pytest.raises(DataError, match=r"\(B, C, H, W\)"):
        resize(torch.zeros(3, 4, 4), 8)
