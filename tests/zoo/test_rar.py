"""Published generators of RAR and RobusTok: the recipes' rows; layouts of options; strictness."""

import pytest
import torch

from conf_commands import composed
from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError
from tessera.generators import RAR
from tessera.run.build import make
from tessera.zoo import export, from_pretrained, from_public, rar
from tessera.zoo.export import build
from zoo.published_rows import rows

ROWS = rows("rar")
CASES = pytest.mark.parametrize("case", ["rar_forward", "robustok_gen_tf"])


@pytest.mark.parametrize("name", ROWS)
def test_recipe_is_the_published_row(name):
    """The recipe's model, sampling and training are those of the row."""
    row, (*system, size) = ROWS[name], name.split("_")
    recipe = f"robustok/generator_{size}" if "robustok" in system else f"rar/{size}"
    cfg = composed("train", [f"experiment={recipe}", "tokenizer.path=somewhere.ckpt"])
    published = rar.architecture(row["config"])
    assert rar.is_generator(row["config"])
    with torch.device("meta"):
        sizes = {key: published[key] for key in ("codebook_size", "num_tokens", "num_classes")}
        ours, theirs = make(cfg.generator)(**sizes), build(published, name)
    assert str(ours) == str(theirs)
    for field in ("class_dropout", "order_anneal", "hidden_size", "num_heads"):
        assert getattr(ours, field) == getattr(theirs, field)
    sampling, reported = make(cfg.sampling), row["sampling"]
    assert sampling.temperature == reported["randomize_temperature"]
    assert sampling.guidance_scale == reported["guidance_scale"]
    assert sampling.guidance_power == reported["guidance_scale_pow"]

    steps = cfg.trainer.max_steps
    assert steps == 250_000 and cfg.tokens.views == "ten_crop"
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes == 2048
    assert cfg.stage.gradient_clip == 1.0 and cfg.stage.decay_rule == "public" and "ema" not in cfg.callbacks
    assert cfg.trainer.precision == "bf16-mixed"
    optimizer = make(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (group["lr"], *group["betas"], group["weight_decay"]) == (4e-4, 0.9, 0.96, 0.03)
    (factor,) = make(cfg.scheduler)(optimizer, steps).lr_lambdas
    assert [factor(step) * 4e-4 for step in (0, 62_500, steps)] == pytest.approx([0, 4e-4, 1e-5])
    first, last = ours.order_anneal
    assert (first * steps, last * steps) == (125_000, 187_500)


@CASES
def test_layouts(case, tmp_path):
    """Options under "rar" or at the top, a causal mask among the weights, and an export that needs no config."""
    file = golden(case)
    options = file.config.get("rar", file.config)
    state = {**file.weights, "attn_mask": torch.zeros(3, 3)}
    model = from_public(file.metadata["family"], {"rar": options}, state)
    assert isinstance(model, RAR) and not model.training
    export(model, tmp_path)
    for other in (from_public("rar", options, file.weights), from_pretrained(tmp_path)):
        assert other.state_dict().keys() == file.weights.keys()
        assert all(torch.equal(value, file.weights[key]) for key, value in other.state_dict().items())
    assert model.class_dropout == options.get("class_label_dropout", 0.1)


@pytest.mark.usefixtures("shipped_files")
@CASES
def test_loading_is_strict(case):
    file = golden(case)
    options = file.config.get("rar", file.config)
    state = dict(file.weights)
    state["stray"] = state.pop("blocks.0.attn.q_norm.bias")
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.attn\.q_norm\.bias.*unexpected stray"):
        from_public("rar", options, state)
    other = {**options, "codebook_size": options["codebook_size"] + 1}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(\d+, \d+\), not"):
        from_public("rar", other, file.weights)
    with pytest.raises(ConfigError, match=r"lacks image_seq_len$"):
        from_public("rar", {key: value for key, value in options.items() if key != "image_seq_len"}, file.weights)
    with pytest.raises(ConfigError, match="head_dim=3 of the published config is not"):
        from_public("rar", {**options, "head_dim": 3}, file.weights)
