"""Export and reload of models."""

import json

import pytest
import torch
import yaml

from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.generators import SamplingConfig
from tessera.zoo import ModelCard, export, from_pretrained, from_public
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


FIGURE = {"label": "rFID[digits-cnn]@N=359", "value": 0.12345, "protocol": {"extractor": "digits-cnn", "samples": 359}}
CARD = ModelCard("tiny", "Apache-2.0", "digits", [FIGURE], "ema", "python train.py experiment=x", "abc", "Small.")


def test_the_card_says_what_the_model_is(tokenizer, tmp_path):
    folder = export(tokenizer, tmp_path, config(), CARD)
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "tessera"
    for part in (
        "# tiny",
        "Small.",
        "8 x 8 pixels",
        "2 x 16 of 16 codes",
        "averaged (EMA)",
        "`python train.py exp",
        "abc",
    ):
        assert part in text
    assert "| rFID[digits-cnn]@N=359 | 0.1235 | digits-cnn, 359 images |" in text
    assert from_pretrained(folder).card == CARD
    again = export(from_pretrained(folder), tmp_path / "again")  # the card travels with the model
    assert (again / "README.md").read_text() == text


def test_without_a_card_nothing_is_claimed(tokenizer, tmp_path):
    text = (export(tokenizer, tmp_path, config()) / "README.md").read_text()
    assert "| licence | not stated |" in text and "## Figures" not in text and "license:" not in text


def usage(text):
    """The lines of Python in a card."""
    return text.split("```python\n")[1].split("```")[0]


def test_the_usage_lines_of_the_cards_run(tokenizer, tmp_path):
    made = generator()
    tokens = export(tokenizer, tmp_path / "tokenizer", config())
    samples = export(made, tmp_path / "generator", GENERATOR, sampling={"_target_": f"{SAMPLING}", "temperature": 0.9})
    scope = {"images": torch.rand(2, 3, 8, 8) * 2 - 1}
    exec(usage((tokens / "README.md").read_text()).replace("<this folder, or its id on the hub>", str(tokens)), scope)
    assert scope["tokens"].shape == (2, 2, 16) and scope["images"].shape == (2, 3, 8, 8)
    lines = usage((samples / "README.md").read_text()).replace("<this folder, or its id on the hub>", str(samples))
    exec(lines.replace("<that of the tokenizer>", str(tokens)).replace("arange(8)", "arange(3)"), scope)
    assert scope["images"].shape == (3, 3, 8, 8)


SAMPLING = "tessera.generators.SamplingConfig"
GENERATOR = {
    "_target_": "tessera.generators.RAR", "codebook_size": 16, "num_branches": 2, "num_tokens": 16, "num_classes": 3,
    "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_size": 8, "extra_positions": 2, "extra_timesteps": 2,
}  # fmt: skip


def generator():
    return build(GENERATOR, "the test")


def test_a_generator_keeps_its_sampling_and_its_tokenizers_fingerprint(tmp_path):
    made = generator()
    made.tokenizer_fingerprint = "0123456789abcdef"
    loaded = from_pretrained(export(made, tmp_path, sampling={"_target_": SAMPLING, "guidance_scale": 2.0}))
    assert loaded.sampling == SamplingConfig(guidance_scale=2.0) and loaded.tokenizer_fingerprint == "0123456789abcdef"
    again = from_pretrained(export(loaded, tmp_path / "again"))
    assert again.sampling == loaded.sampling and again.tokenizer_fingerprint == loaded.tokenizer_fingerprint
    plain = from_pretrained(export(generator(), tmp_path / "plain"))
    assert plain.sampling is None and plain.tokenizer_fingerprint is None


def test_sampling_that_does_not_fit_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"top_k=17 is more than the 16 codes"):
        export(generator(), tmp_path, sampling={"_target_": SAMPLING, "top_k": 17})
    with pytest.raises(ConfigError, match="sampling belongs to a generator, but the model is a Tokenizer"):
        export(tokenizer, tmp_path, config(), sampling={"_target_": SAMPLING})
    assert not list(tmp_path.iterdir())
    folder = export(generator(), tmp_path, sampling={"_target_": SAMPLING})
    description = json.loads((folder / "config.json").read_text())
    description["sampling"]["_target_"] = "os.getcwd"
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"_target_='os\.getcwd', no part of tessera"):
        from_pretrained(folder)


def test_others_may_read_the_weights(tokenizer, tmp_path):
    folder = export(tokenizer, tmp_path, config())
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
