"""Published VAR generators: sizes and recipes of every row; layouts of checkpoints; strictness."""

import pytest
import torch

from conf_commands import composed
from generators.var_reference import recorded_tokens
from golden_cases import golden
from tessera.errors import CheckpointError, ConfigError
from tessera.generators import VAR, SamplingConfig
from tessera.run.build import make
from tessera.zoo import export, from_pretrained, from_public, var_generator
from tessera.zoo.export import build
from tessera.zoo.keys import key_problems, rename
from zoo.published_rows import meta_state, published_model, rows

ROWS = {name: row for name, row in rows("var").items() if "depth" in row["config"]}
RECIPES = {
    "VAR-d16": "var/d16",
    "VAR-d20": "var/d20",
    "VAR-d24": "var/d24",
    "VAR-d30": "var/d30",
    "VAR-d36-s": "var/d36_512",
    "VAR-d17-MSVR10P2-4096": "xqgan/var_d17_msvr10p2_4096",
}
PUBLISHED_SAMPLING = {"var": (1.5, 900, 0.96), "xqgan": (3.25, 750, 0.95)}  # cfg, top_k, top_p
CASES = pytest.mark.parametrize("case", ["var_p1_forward", "var_p1_saln_forward", "var_pq2_forward"])
pytestmark = pytest.mark.usefixtures("shipped_files")


@pytest.mark.parametrize("name", ROWS)
def test_sizes_of_the_published_row(name):
    config, model = ROWS[name]["config"], published_model("var", name)
    assert (model.num_tokens, model.latent_channels) == (config["L"], config["Cvae"])
    assert model.drop_path == pytest.approx(0.1 * config["depth"] / 24, abs=1e-5)  # our default


def training_options(row):
    """Options of the published command line, with the defaults of those that it leaves out."""
    words = [word.removeprefix("--").split("=") for word in row["config"]["train_args"].split() if "=" in word]
    return {"tblr": 1e-4, "twde": 0, "ep": 350} | {name: float(value) for name, value in words}


@pytest.mark.parametrize(("name", "recipe"), RECIPES.items())
def test_recipe_is_the_published_row(name, recipe):
    """Model, sampling and training of the recipe are those of the row."""
    row, cfg = ROWS[name], composed("train", [f"experiment={recipe}", "tokenizer.path=somewhere.ckpt"])
    published = var_generator.architecture(row["config"], meta_state("var", name))
    given = ("codebook_size", "grids", "latent_channels", "num_classes", "num_branches")
    with torch.device("meta"):
        ours = make(cfg.generator)(**{key: published[key] for key in given})
        theirs = build(published, name)
    assert key_problems(ours.state_dict(), theirs.state_dict()) == []
    for field in ("class_dropout", "num_heads", "label_smoothing"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.drop_path == pytest.approx(theirs.drop_path, abs=1e-5)

    sampling, (scale, top_k, top_p) = make(cfg.sampling), PUBLISHED_SAMPLING[recipe.split("/")[0]]
    assert (sampling.top_k, sampling.top_p) == (top_k, top_p)
    assert sampling.guidance_weights(5) == pytest.approx([1 + scale * k / 4 for k in range(5)])

    training = training_options(row)
    batch = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.num_nodes
    steps = cfg.trainer.max_steps
    assert batch == training["bs"]
    assert steps == training["ep"] * -(-1_281_167 // batch)
    assert cfg.generator.init_gate == training["alng"]
    assert (cfg.stage.decay_rule, cfg.stage.gradient_clip) == ("var", 2.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = make(cfg.optimizer)([parameter])
    peak = optimizer.param_groups[0]["lr"]
    assert peak == pytest.approx(training["tblr"] * batch / 256)
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["weight_decay"] == 0.05
    schedule = make(cfg.scheduler)(optimizer, steps)
    factor = schedule.lr_lambdas[0]
    assert factor(0) == pytest.approx(0.005)
    assert factor(steps // 50) == pytest.approx(1, abs=1e-3)
    assert factor(steps - 1) == pytest.approx(training["wpe"])
    assert (cfg.scheduler.get("end_weight_decay") or 0) == training["twde"]


def layouts(weights):
    """The same weights as every published file has them."""
    parts = {
        part: {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(part)}
        for part in ("var_wo_ddp", "vae_local")
    }
    compiled = {f"_orig_mod.{key}": value for key, value in parts["var_wo_ddp"].items()}
    training = {"epoch": 3, "iter": 0, "args": {}, "trainer": {"config": {}, **parts, "var_opt": {"optimizer": {}}}}
    return {
        "prefixed": weights,
        "training": training,
        "compiled": {**training, "trainer": {**training["trainer"], "var_wo_ddp": compiled}},
        "generator": parts["var_wo_ddp"],
    }


@CASES
def test_layouts_of_checkpoints(case):
    file = golden(case)
    expected = from_public("var", file.config, file.weights)
    for name, checkpoint in layouts(file.weights).items():
        model = from_public("var", file.config, checkpoint)
        assert not model.training
        torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
        if name == "generator":
            with pytest.raises(ConfigError, match="bind"):
                model.quantizer  # noqa: B018
            model.bind(expected.quantizer)
        else:
            torch.testing.assert_close(model.quantizer.state_dict(), expected.quantizer.state_dict(), atol=0, rtol=0)


@CASES
@pytest.mark.parametrize("named", [True, False])
def test_codes_are_compared_as_in_the_repository_of_the_file(case, named):
    """VAR's by distance, ImageFolder's by cosine, whether the config says so or not."""
    file = golden(case)
    options = {key: value for key, value in file.config.items() if named or key != "using_znorm"}
    codebook = from_public("var", options, file.weights).quantizer.branches[0].codebooks[0]
    assert codebook.search == ("cosine" if "codebook_size" in file.config else "euclidean")
    assert not codebook.l2_normalize


@CASES
def test_buffers_are_accepted_in_any_shape_and_never_required(case):
    file = golden(case)
    state = {k.removeprefix("var_wo_ddp."): v for k, v in file.weights.items() if k.startswith("var_wo_ddp.")}
    bare = rename(state, (), var_generator.IGNORED)
    padded = {**bare, "attn_bias_for_masking": torch.zeros(1, 1, 96, 96), "empty_emb.weight": torch.zeros(1, 1)}
    models = [from_public("var", file.config, weights) for weights in (state, bare, padded)]
    for model in models[1:]:
        torch.testing.assert_close(model.state_dict(), models[0].state_dict())


@CASES
def test_the_weights_tell_what_the_options_leave_out(case):
    file = golden(case)
    options = {key: file.config[key] for key in ("product_quant", "patch_nums", "depth") if key in file.config}
    sparse = from_public("var", options, layouts(file.weights)["generator"])
    full = from_public("var", file.config, file.weights)
    assert {**sparse.architecture} == {**full.architecture}
    if "var_wo_ddp.lvl_1L" in file.weights:  # so do the scales
        del options["patch_nums"]
        assert from_public("var", options, layouts(file.weights)["generator"]).grids == full.grids


@pytest.mark.parametrize("ratio", [{}, {"mlp_ratio": 2.5}])
def test_other_widths_of_the_feed_forward_networks(ratio):
    made = VAR(11, [1, 2], 4, 3, depth=2, hidden_size=16, num_heads=2, mlp_size=40)
    model = from_public("var", {"patch_nums": [1, 2], "depth": 2, **ratio}, made.state_dict())
    torch.testing.assert_close(model.state_dict(), made.state_dict())


@CASES
def test_export_and_back(case, tmp_path):
    file = golden(case)
    model = from_public("var", file.config, file.weights)
    again = from_pretrained(export(model, tmp_path))
    again.bind(model.quantizer)
    tokens, labels = recorded_tokens(file, model), file.input["label"]
    with torch.no_grad():
        assert torch.equal(again(tokens, labels), model(tokens, labels))


def test_the_tokenizer_of_a_training_checkpoint_stands_alone():
    """Its part of the file builds the decoder; a file without one is refused."""
    file = golden("var_pq2_sample")
    checkpoint = layouts(file.weights)["training"]
    pixels = var_generator.decoder(file.config, checkpoint)
    model = from_public("var", file.config, checkpoint)
    labels = torch.zeros(1, dtype=torch.int64)
    _, latent = model.generate_latent(labels, SamplingConfig(top_k=1))
    with torch.no_grad():
        assert pixels(latent).shape == (1, 3, file.config["img_size"], file.config["img_size"])
    with pytest.raises(CheckpointError, match=r"decoder of the published checkpoint.*missing"):
        var_generator.decoder(file.config, {"trainer": {"var_wo_ddp": {}, "vae_local": {}}})


@CASES
def test_scales_must_be_those_of_the_weights(case):
    file = golden(case)
    sides = file.config["patch_nums"]
    other = {**file.config, "patch_nums": sides[:-1], "v_patch_nums": sides[:-1]}
    with pytest.raises(CheckpointError, match=r"patch_nums=.*but the weights have"):
        from_public("var", other, file.weights)
    levels = torch.arange(len(sides)).repeat_interleave(torch.tensor(sides) ** 2)
    joined = {**file.weights, "var_wo_ddp.lvl_1L": levels[None] // 2}  # other scales of the same sum
    with pytest.raises(CheckpointError, match="but the weights have"):
        from_public("var", file.config, joined)
    with pytest.raises(ConfigError, match="contradicts its v_patch_nums"):
        from_public("var", {**file.config, "v_patch_nums": sides[:-1]}, file.weights)


@CASES
def test_loading_is_strict(case):
    file = golden(case)
    state = dict(file.weights)
    state["var_wo_ddp.stray"] = state.pop("var_wo_ddp.blocks.0.ffn.fc1.bias")
    state["var_wo_ddp.head.bias"] = state["var_wo_ddp.head.bias"][:-1]
    with pytest.raises(CheckpointError) as error:
        from_public("var", file.config, state)
    message = str(error.value)
    assert "missing blocks.0.ffn.fc1.bias" in message and "unexpected stray" in message and "head.bias is (" in message

    state = dict(file.weights)
    name = next(key for key in state if key.endswith("embedding.weight"))
    state[name] = state[name][:-1]
    with pytest.raises(CheckpointError, match=r"quantizer of the published checkpoint.*embedding is"):
        from_public("var", file.config, state)
    with pytest.raises(CheckpointError, match=r"lacks .*is it that of a VAR generator"):
        from_public("var", file.config, {"something": torch.zeros(1)})
    with pytest.raises(ConfigError, match="norm_eps=1e-05"):
        from_public("var", {**file.config, "norm_eps": 1e-5}, file.weights)
    with pytest.raises(ConfigError, match="lacks patch_nums"):
        bare = rename(layouts(file.weights)["generator"], (), var_generator.IGNORED)
        from_public("var", {"depth": 2}, bare)
    wrong = {**file.config, "depth": file.config["depth"] + 1}
    with pytest.raises(CheckpointError, match=rf"missing blocks\.{file.config['depth']}.attn\.q_bias"):
        from_public("var", wrong, file.weights)
