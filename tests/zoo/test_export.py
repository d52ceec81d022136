"""Export and reload of models."""

import json

import pytest
import torch

from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.zoo import export, from_pretrained, from_public
from tessera.zoo.export import build

# family and the files that together hold a published tokenizer
PUBLISHED = [
    ("ibq", ["ibq_tokenizer_enc", "ibq_tokenizer_dec"]),
    ("maskgit_vqgan", ["maskgit_vqgan_encode", "maskgit_vqgan_decode"]),
    ("titok", ["titok_two_stage"]),
    ("titok", ["titok_single_stage_vq"]),
    ("titok", ["titok_vae"]),
    ("var", ["var_p1_vqvae"]),
    ("xqgan", ["xqgan_vp2"]),
    ("xqgan", ["xqgan_cnn_msvr"]),
]


def config(codebook_size: int = 16, branches: int = 2) -> dict:
    sizes = {
        "channels": 4,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 6,
        "norm_groups": 2,
    }
    return {
        "_target_": "tessera.tokenizers.Tokenizer",
        "encoder": {"_target_": "tessera.backbones.CNNEncoder", **sizes},
        "decoder": {"_target_": "tessera.backbones.CNNDecoder", **sizes},
        "quantizer": {
            "_target_": "tessera.quantizers.ProductQuantizer",
            "branches": branches,
            "dim": 4,
            "branch": {
                "_target_": "tessera.quantizers.SingleGridQuantizer",
                "_partial_": True,
                "codebook": {
                    "_target_": "tessera.quantizers.VQCodebook",
                    "_partial_": True,
                    "codebook_size": codebook_size,
                },
            },
        },
        "resolution": 8,
    }


@pytest.fixture
def tokenizer():
    import hydra.utils

    return hydra.utils.instantiate(config(), _convert_="all")


def test_round_trip_is_exact(tokenizer, tmp_path):
    folder = export(tokenizer, tmp_path / "models" / "tiny", config())
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = from_pretrained(folder)
    assert not loaded.training
    assert loaded.fingerprint() == tokenizer.fingerprint()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded(images).reconstruction, tokenizer(images).reconstruction)
    again = from_pretrained(export(loaded, tmp_path / "again"))  # the config travels with the model
    assert again.architecture == config()
    assert torch.equal(again.tokenize(images), tokenizer.tokenize(images))


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize(("family", "stems"), PUBLISHED, ids=[stems[0] for _, stems in PUBLISHED])
def test_published_tokenizers_are_exported_without_a_config(family, stems, tmp_path):
    files = [golden(stem) for stem in stems]
    public = dict(files[0].config)
    for part in ("model", "tiny_cnn", "tiny_backbone"):
        public |= public.pop(part, None) or {}
    model = from_public(family, public, {key: value for file in files for key, value in file.weights.items()})
    loaded = from_pretrained(export(model, tmp_path))
    images = torch.rand(2, 3, model.resolution, model.resolution) * 2 - 1
    with torch.no_grad():
        expected, found = model(images), loaded(images)
    assert torch.equal(found.reconstruction, expected.reconstruction)
    assert torch.equal(found.z, expected.z)
    assert found.tokens is expected.tokens is None or torch.equal(found.tokens, expected.tokens)


def test_values_that_a_part_refuses_are_named():
    impossible = config()
    impossible["quantizer"]["branch"]["codebook"]["ema_decay"] = 1.5
    impossible["quantizer"]["branch"]["codebook"]["update"] = "ema"
    with pytest.raises(ConfigError, match=r"ema_decay=1\.5"):
        build(impossible, "test")


def test_refuses_a_config_of_another_model(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"embedding is \(16, 2\), not \(32, 2\)"):
        export(tokenizer, tmp_path, config(codebook_size=32))
    with pytest.raises(ConfigError, match="needs config"):
        export(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="_target_"):
        export(tokenizer, tmp_path, {"encoder": {}})
    assert not list(tmp_path.iterdir()), "nothing is written before the check"


def test_refuses_what_is_no_export(tokenizer, tmp_path):
    with pytest.raises(MissingFileError, match=r"config\.json"):
        from_pretrained(tmp_path)
    folder = export(tokenizer, tmp_path / "tiny", config())
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors"):
        from_pretrained(folder)
    export(tokenizer, folder, config())
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not written by"):
        from_pretrained(folder)


def edit(folder, change) -> None:
    description = json.loads((folder / "config.json").read_text())
    change(description["config"])
    (folder / "config.json").write_text(json.dumps(description))


def test_refuses_weights_or_settings_changed_afterwards(tokenizer, tmp_path):
    folder = export(tokenizer, tmp_path, config())
    edit(folder, lambda c: c["quantizer"]["branch"]["codebook"].update(l2_normalize=False))
    with pytest.raises(CheckpointError, match="fingerprint"):
        from_pretrained(folder)
    export(tokenizer, folder, config())
    edit(folder, lambda c: c["quantizer"].update(branches=1))
    with pytest.raises(CheckpointError, match=r"branches\.1"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "tessera.nowhere",
        "tessera.zoo.keys",
        "subprocess.Popen",
        "tessera.zoo.keys.re.compile",
        "tessera.backbones.cnn.nn.Linear",
    ],
)
def test_never_calls_foreign_code_named_in_a_config(tokenizer, tmp_path, target):
    folder = export(tokenizer, tmp_path, config())
    edit(folder, lambda c: c.update(encoder={"_target_": target}))
    with pytest.raises(CheckpointError, match="no part of tessera"):
        from_pretrained(folder)
