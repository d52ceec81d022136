"""Published IBQ generators: the recipes' rows; layouts of checkpoints; strictness."""

import re

import pytest
import torch

from conf_commands import composed
from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError
from tessera.generators import Llama
from tessera.run.build import make
from tessera.zoo import export, from_pretrained, from_public, ibq_generator
from tessera.zoo.export import build
from zoo.published_rows import rows

ROWS = {name: row for name, row in rows("ibq").items() if row["kind"] != "tokenizer"}
CASE = pytest.mark.parametrize("case", ["ibq_gpt"])
STEPS_PER_EPOCH = 1669


@pytest.mark.parametrize("name", ROWS)
def test_recipe_is_the_published_row(name):
    """The recipe's model, sampling and training are those of the row."""
    row, size = ROWS[name], name.rpartition("-")[2]
    cfg = composed("train", [f"experiment=ibq/generator_{size}", "tokenizer.path=somewhere.ckpt"])
    published = ibq_generator.architecture(row["config"])
    with torch.device("meta"):
        sizes = {key: published[key] for key in ("codebook_size", "num_tokens", "num_classes", "grids")}
        ours, theirs = make(cfg.generator)(**sizes), build(published, name)
    assert str(ours) == str(theirs)
    assert cfg.generator.gate_init == published["gate_init"]
    for field in ("class_dropout", "rope_base", "checkpoint_blocks"):
        assert getattr(ours, field) == getattr(theirs, field)
    sampling, reported = make(cfg.sampling), row["config"]["sampling_reported"]
    assert (sampling.temperature, sampling.guidance_scale) == (reported["temperature"], reported["cfg_scale"])
    assert sampling.guidance_weights(3) == [reported["cfg_scale"]] * 3
    assert (sampling.top_k or 0, sampling.top_p or 1.0) == (reported["top_k"], reported["top_p"])

    training, steps = row["config"]["training"], cfg.trainer.max_steps
    assert steps == training["max_epochs"] * STEPS_PER_EPOCH
    assert cfg.data.batch_size == training["batch_per_device"]
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes == training["global_batch"]
    assert cfg.stage.gradient_clip == training["gradient_clip_val"] and cfg.stage.decay_rule == "matrix"
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = make(cfg.optimizer)([parameter])
    group = optimizer.param_groups[0]
    assert tuple(group["betas"]) == (0.9, 0.95) and group["weight_decay"] == training["weight_decay"]
    scheduler = make(cfg.scheduler)(optimizer, steps)
    lr, warmup = training["learning_rate"], training["wp_epochs"] * STEPS_PER_EPOCH
    rates = [lr * factor(step) for factor in scheduler.lr_lambdas for step in (0, warmup, steps - 1)]
    assert rates == pytest.approx([lr * training["wp0"], lr, lr * training["wpe"]])
    assert cfg.scheduler.get("end_weight_decay") == (training["twde"] or None)


@pytest.mark.usefixtures("shipped_files")
@CASE
def test_layouts_of_checkpoints(case):
    file = golden(case)
    expected = from_public("ibq", file.config, file.weights)
    assert isinstance(expected, Llama) and not expected.training
    stored = {f"transformer.{key}": value for key, value in file.weights.items()}
    stored["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    stored["transformer.blocks.0.attention.kv_cache.k_cache"] = torch.zeros(2)
    model = from_public("ibq", file.config, {"state_dict": stored, "epoch": 3})
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])


@pytest.mark.usefixtures("shipped_files")
@CASE
def test_export_needs_no_config(case, tmp_path):
    file = golden(case)
    model = from_public("ibq", file.config, file.weights)
    again = from_pretrained(export(model, tmp_path))
    labels = file.input["labels"].flatten()
    tokens = file.input["tokens"][:, None, :-1]
    with torch.no_grad():
        assert torch.equal(again(tokens, labels), model(tokens, labels))
    assert again.grids == model.grids and again.rope_base == model.rope_base


@pytest.mark.usefixtures("shipped_files")
@CASE
def test_loading_is_strict(case):
    file = golden(case)
    state = dict(file.weights)
    state["stray"] = state.pop("blocks.0.attention.wo.weight")
    state["head.weight"] = state["head.weight"][1:]
    with pytest.raises(CheckpointError) as error:
        from_public("ibq", file.config, state)
    for problem in ("missing blocks.0.attention.wo.weight", "unexpected stray", r"head.weight is \(\d+, \d+\), not"):
        assert re.search(problem, str(error.value))


@pytest.mark.usefixtures("shipped_files")
@CASE
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_aln": True}, "shared_aln=True"),
        ({"cls_token_num": 4}, "cls_token_num=4 .* only 1"),
        ({"n_kv_head": 1}, "n_kv_head=1"),
        ({"cond_dim": 7}, "cond_dim=7"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"drop_path_rate": 0.1}, "drop_path_rate=0.1"),
        ({"use_pretrained_codebook": True}, "use_pretrained_codebook=True"),
        ({"block_size": 15}, "block_size=15 .* no square"),
        ({"n_embd": None}, "lacks n_embd"),
    ],
)
def test_refuses_options_it_would_have_to_ignore(case, change, message):
    config = {**golden(case).config, **change}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        from_public("ibq", config, {})


@pytest.mark.usefixtures("shipped_files")
@CASE
def test_options_are_read(case):
    """Those that the shipped file has at their defaults, and those that only training needs."""
    given = {
        "rope_base": 77, "norm_eps": 1e-3, "multiple_of": 24, "token_drop": 0.2, "resid_dropout_p": 0.3,
        "ffn_dropout_p": 0.4, "attn_dropout_p": 0.15, "class_dropout_prob": 0.25,
    }  # fmt: skip
    with torch.device("meta"):
        model = build(ibq_generator.architecture({**golden(case).config, **given}), "the test")
    block = model.blocks[0]
    assert (model.rope_base, model.class_dropout, model.tok_dropout.p) == (77, 0.25, 0.2)
    assert (block.attention.dropout.p, block.attention.attention_dropout, block.feed_forward.dropout.p) == (
        0.3, 0.15, 0.4,
    )  # fmt: skip
    assert block.ffn_norm.eps == block.attention_norm.eps == 1e-3 and model.head_nm.rmsnorm.eps == 1e-5
    assert block.feed_forward.w1.out_features % 24 == 0
