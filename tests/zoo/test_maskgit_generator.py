"""Published generators of TiTok: the recipes' rows; layouts of options; strictness."""

import pytest
import torch

from conf_commands import composed
from generators.maskgit_reference import public_sampling
from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError
from tessera.run.build import make
from tessera.zoo import export, from_pretrained, from_public, maskgit_generator
from tessera.zoo.export import build
from zoo.published_rows import meta_state, rows

ROWS = {name: row for name, row in rows("titok").items() if row["kind"] == "generator"}
CASES = pytest.mark.parametrize("case", ["maskgit_imagebert", "maskgit_uvitbert"])
pytestmark = pytest.mark.usefixtures("shipped_files")


@pytest.mark.parametrize("name", ROWS)
def test_recipe_is_the_published_row(name):
    """The recipe's model and sampling are those of the row."""
    row, size = ROWS[name], name.split("_")[1]
    cfg = composed("train", [f"experiment=titok/generator_{size}", "tokenizer.path=somewhere.ckpt"])
    published = maskgit_generator.architecture(row["config"])
    with torch.device("meta"):
        sizes = {key: published[key] for key in ("codebook_size", "num_tokens", "num_classes")}
        ours, theirs = make(cfg.generator)(num_branches=1, **sizes), build(published, name)
    assert str(ours) == str(theirs)  # dropouts too
    for field in ("class_dropout", "label_smoothing", "unmasked_weight", "checkpoint_blocks"):
        assert getattr(ours, field) == getattr(theirs, field)
    settings = {**row["sampling"], "num_sample_steps": row["sampling"]["num_steps"]}
    assert make(cfg.sampling) == public_sampling(settings)


def test_positions_in_files_of_old_transformers_releases_are_ignored():
    name = next(iter(ROWS))
    state = {**meta_state("titok", name), "model.embeddings.position_ids": torch.empty(1, 9, device="meta")}
    assert from_public("titok", ROWS[name]["config"], state).state_dict()


def nested(config):
    """As in the hub's config.json."""
    model = {"vq_model": {"codebook_size": config["codebook_size"]}, "generator": config["generator"]}
    return {"model": model, "losses": config["losses"]}


LAYOUTS = {
    "golden": ("maskgit", lambda config: config),
    "nested": ("titok", nested),
    "flat": ("titok", lambda config: {"codebook_size": config["codebook_size"], **config["generator"]}),
}


@CASES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_options(case, layout):
    data = golden(case)
    family, change = LAYOUTS[layout]
    model = from_public(family, change(data.config), data.weights)
    assert not model.training
    assert model.state_dict().keys() == golden_model(data).state_dict().keys()
    if layout != "flat":
        assert model.unmasked_weight == data.config["losses"]["loss_weight_unmasked_token"]
        assert model.label_smoothing == data.config["losses"]["label_smoothing"]


def golden_model(data):
    return from_public("maskgit", data.config, data.weights)


def test_options_of_training_are_read():
    data = golden("maskgit_imagebert")
    config = {**data.config, "losses": {"label_smoothing": 0.2, "loss_weight_unmasked_token": 0.0}}
    config["generator"] = {**config["generator"], "dropout": 0.3, "attn_drop": 0.4, "class_label_dropout": 0.5}
    model = from_public("maskgit", config, data.weights)
    assert (model.label_smoothing, model.unmasked_weight, model.class_dropout) == (0.2, 0.0, 0.5)
    assert (model.embed_drop.p, model.blocks[0].attn.attention_dropout) == (0.3, 0.4)


def test_configured_dropout_does_not_reach_the_published_u_vit():
    model = golden_model(golden("maskgit_uvitbert"))
    assert {block.attn.attention_dropout for block in model.blocks} == {0.0}
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@CASES
def test_export_and_back(case, tmp_path):
    data = golden(case)
    model = golden_model(data)
    again = from_pretrained(export(model, tmp_path))
    tokens, labels = data.input["token_ids"][:, None], data.input["class_ids"]
    assert again.loss(tokens, labels)["loss"] == model.loss(tokens, labels)["loss"]


@CASES
def test_loading_is_strict(case):
    data = golden(case)
    weights = {**data.weights, "stray": torch.zeros(1)}
    key = next(key for key in weights if "proj.weight" in key or "query.weight" in key)
    del weights[key]
    with pytest.raises(CheckpointError) as error:
        from_public("maskgit", data.config, weights)
    assert "unexpected stray" in str(error.value) and "missing" in str(error.value)
    config = {**data.config, "codebook_size": data.config["codebook_size"] + 1}
    with pytest.raises(CheckpointError, match=r"embeddings\.weight is .*, not"):
        from_public("maskgit", config, data.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "DiT"}, "model_type='DiT'"),
        ({"image_seq_len": None}, "lacks image_seq_len"),
        ({"codebook_size": None}, "lacks codebook_size"),
    ],
)
def test_refuses_what_does_not_exist(change, message):
    config = {**ROWS["titok_l32_generator"]["config"], **change}
    with pytest.raises(ConfigError, match=message):
        from_public("titok", config, {})
