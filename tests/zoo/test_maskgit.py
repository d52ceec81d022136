"""Published MaskGIT-VQGAN: parity of both halves, strictness, file errors."""

import pytest
import torch
import torch.nn.functional as F

from golden_cases import Golden, assert_close, golden
from tessera.backbones import MaskGITDecoder, MaskGITEncoder
from tessera.backbones.cnn import Upsample
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public
from tessera.zoo.export import build
from tessera.zoo.keys import load_strictly, rename
from tessera.zoo.maskgit import PUBLISHED, architecture, maskgit_vqgan, rules

ENCODE, DECODE = "maskgit_vqgan_encode", "maskgit_vqgan_decode"


def published(file: Golden, weights: dict[str, torch.Tensor] | None = None) -> Tokenizer:
    """The tokenizer that a file holds one half of; the other half stays random. Nothing else may be missing."""
    tokenizer = build(architecture(file.config), "the golden file")
    renamed = rename(file.weights if weights is None else weights, rules(len(tokenizer.decoder.levels)))
    other = "decoder." if any(key.startswith("encoder.") for key in renamed) else "encoder."
    filled = {key: value for key, value in tokenizer.state_dict().items() if key.startswith(other)}
    load_strictly(tokenizer, {**filled, **renamed}, "the golden file")
    return tokenizer.eval()


def as_map(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B h w, C) -> (B, C, h, w)."""
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


@pytest.mark.golden
@pytest.mark.parametrize("case", [ENCODE])
def test_published_encoder(case):
    file = golden(case)
    tokenizer = published(file)
    seen = {}
    for number, level in enumerate(tokenizer.encoder.levels):
        name = f"down{number}_output"
        level.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    codebook = tokenizer.quantizer.branches[0].codebooks[0]
    with torch.no_grad():
        # by parts, as a file's pictures need not be square
        hidden = tokenizer.encoder(file.input["image"] * 2 - 1)
        rows = hidden.permute(0, 2, 3, 1).flatten(0, 2)
        quantized = codebook(rows)
        soft = -(rows[:, None] - codebook.embedding).square().sum(-1) / file.config["soft_temp"]
    ours = {
        "hidden": hidden,
        **seen,
        "indices": quantized.indices.view(file.output["indices"].shape),
        "quantized": as_map(quantized.vectors, hidden),
        "entry": as_map(codebook.lookup(quantized.indices), hidden).detach(),
        # published: beta on the codebook's term, where the paper has it on the encoder's
        "loss": quantized.losses["commitment"] + file.config["commitment_cost"] * quantized.losses["codebook"],
        # nothing here uses it; it shows that latents and codes are the published ones
        "soft_code": soft.softmax(-1).view(file.output["soft_code"].shape),
    }
    assert set(file.output) <= set(ours), "every recorded output is compared"
    assert torch.equal(ours["indices"], file.output["indices"])
    for name, expected in file.output.items():
        assert_close(ours[name], expected, atol=2e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", [DECODE])
def test_published_decoder(case):
    file = golden(case)
    tokenizer = published(file)
    seen = {}
    levels = len(tokenizer.decoder.levels)
    for position, level in enumerate(tokenizer.decoder.levels):
        name = f"up{levels - 1 - position}_output"
        level.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        rows = tokenizer.quantizer.branches[0].codebooks[0].lookup(file.input["codes"].flatten())
        quantized = as_map(rows, file.output["quantized"])
        image = (tokenizer.decode(quantized) + 1) / 2
    ours = {**seen, "quantized": quantized, "image": image, "image_clamped": image.clamp(0, 1)}
    assert set(file.output) <= set(ours), "every recorded output is compared"
    for name, expected in file.output.items():
        assert_close(ours[name], expected, atol=2e-5)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODE, DECODE])
def test_parity_fails_when_a_weight_of_any_part_changes(case):
    file = golden(case)

    def result(weights):
        tokenizer = published(file, weights)
        if case == DECODE:
            codes = file.input["codes"].flatten()
            rows = tokenizer.quantizer.branches[0].codebooks[0].lookup(codes)
            return tokenizer.decode(as_map(rows, file.output["quantized"]))
        return tokenizer.encoder(file.input["image"] * 2 - 1)

    with torch.no_grad():
        expected = result(file.weights)
        for key in file.weights:
            # the encoder is before the codes; norms of single channels take the upsampling's bias out again
            if (key.startswith("quantize.") and case == ENCODE) or key.endswith("upsample_conv.bias"):
                continue
            weights = {name: value.clone() for name, value in file.weights.items()}
            weights[key] = (
                weights[key] * torch.linspace(-1.5, 0.5, len(weights[key])).view(-1, *[1] * (weights[key].ndim - 1))
                + 0.1
            )
            assert not torch.allclose(result(weights), expected, atol=2e-5), key


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [ENCODE])
def test_loading_is_strict(case):
    file = golden(case)
    with pytest.raises(CheckpointError, match=r"missing decoder\.conv_in\.weight"):
        from_public("maskgit_vqgan", file.config, file.weights)


def test_published_names():
    config = {**PUBLISHED, "hidden_channels": 32, "channel_mult": (1, 2), "num_resolutions": 2, "resolution": 16}
    ours = build(architecture({**config, "z_channels": 4, "num_embeddings": 8}), "the test")
    found = {
        "quantize.embedding.weight": ours.quantizer.branches[0].codebooks[0].embedding,
        "encoder.down.1.block.0.nin_shortcut.weight": ours.encoder.levels[1].res[0].nin_shortcut.weight,
        "decoder.up.1.upsample_conv.weight": ours.decoder.levels[0].resample.conv.weight,
        "decoder.up.0.block.1.conv2.weight": ours.decoder.levels[1].res[1].conv2.weight,
        "stray": torch.zeros(1),
    }
    by_name = dict(ours.named_parameters())
    renamed = rename(found, rules(2))
    assert all(by_name[key] is value for key, value in renamed.items() if key != "stray")
    with pytest.raises(CheckpointError, match="unexpected stray"):
        load_strictly(ours, {**ours.state_dict(), **renamed}, "the test")


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="hidden_channels, z_channels"):
        from_public("maskgit_vqgan", {"channel_mult": [1], "num_res_blocks": 1}, {})
    config = {"channel_mult": [1], "num_resolutions": 2, "num_res_blocks": 1, "hidden_channels": 32, "z_channels": 8}
    with pytest.raises(ConfigError, match="num_resolutions=2"):
        from_public("maskgit_vqgan", config, {})
    with pytest.raises(ConfigError, match="num_embeddings, resolution"):
        from_public("maskgit_vqgan", {**config, "num_resolutions": 1}, {})
    with pytest.raises(MissingFileError, match=r"absent\.bin does not exist; download"):
        maskgit_vqgan(tmp_path / "absent.bin")
    (tmp_path / "damaged.bin").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"damaged\.bin is no weight file"):
        maskgit_vqgan(tmp_path / "damaged.bin")
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="missing"):
        maskgit_vqgan(tmp_path / "other.bin")


def test_the_shortcut_drops_its_input():
    """h + shortcut(h): with a zero shortcut nothing of x but h remains."""
    tiny = {"channels": 4, "channel_multipliers": [2], "num_res_blocks": 1, "z_channels": 3, "norm_groups": 2}
    block = MaskGITEncoder(**tiny).levels[0].res[0]
    x = torch.randn(1, 4, 5, 5)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    assert_close(block(x), h + block.nin_shortcut(h))
    assert isinstance(MaskGITDecoder(**{**tiny, "channel_multipliers": [1, 2]}).levels[0].resample, Upsample)
