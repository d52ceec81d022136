"""Every published checkpoint by its name: keys, shapes and counts at full size, on the meta device."""

import argparse
import json
import re
from collections import OrderedDict

import pytest
import torch

from conf_commands import CONF
from tessera import zoo
from tessera.errors import CheckpointError
from tessera.generators import Generator
from tessera.metrics.inception_network import InceptionNetwork, fold_batch_norms
from tessera.tokenizers import Tokenizer
from tessera.zoo.keys import key_problems
from zoo.published_rows import FOLDER, ROWS, expanded, meta_state, millions, registered, rows


def published_count(family, row):
    """Parameters without frozen teachers, in millions; None where the row has no figure."""
    count = row.get("params_millions_inference", row.get("params_millions"))
    if isinstance(count, dict):
        return count["without_semantic_teacher"]
    parts = row.get("params_breakdown", {})
    if "semantic_model" in parts:
        return round(sum(value for part, value in parts.items() if part != "semantic_model") / 1e6, 3)
    return count


def layout(family, name, state):
    """A published file's content around the weights that its figures are of."""
    entry = registered(family, name)
    if entry.parts == ("ema", "model", "state_dict"):
        return {
            "model": {key: value for key, value in state.items() if "lvl1LC" not in key},
            "ema": state,
            "optimizer": {"state": {}, "param_groups": []},
            "steps": 7,
            "args": argparse.Namespace(vq_model="VQ-16", lr=3e-5, scales=[16], cloud=None),
        }
    if entry.parts == ("state_dict",):
        return {"state_dict": state, "epoch": 3, "global_step": 9}
    if entry.parts and entry.parts[0].startswith("trainer"):
        parts = {"var_wo_ddp": state, "vae_local": meta_state("var", "MSVR10P2-4096-in-VAR-ckpt")}
        if entry.kind == "tokenizer":
            parts = {"var_wo_ddp": meta_state("var", "VAR-d17-MSVR10P2-4096"), "vae_local": state}
        return {"epoch": 1, "iter": 0, "trainer": {"config": {}, **parts}, "args": OrderedDict(depth=17)}
    return state


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_row_is_loaded_by_name(family, name, tmp_path):
    """From a file of the published layout, strictly: every listed key is used, ignored by name, or an error."""
    path, state = tmp_path / "published.bin", meta_state(family, name)
    torch.save(layout(family, name, state), path)
    entry, row = registered(family, name), rows(family)[name]
    model = zoo.load(entry.name, path, check_hash=False)
    assert isinstance(model, Tokenizer if entry.kind == "tokenizer" else Generator) and not model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    assert millions(model) == entry.params_millions == published_count(family, row) or (
        millions(model) == entry.params_millions and published_count(family, row) is None
    )
    if family != entry.family or name != entry.published[0]:  # hyper-parameters in other words
        assert millions(zoo.from_public(family, row["config"], state)) == millions(model)
    if entry.kind == "generator":
        decoder = zoo.info(entry.tokenizer)
        assert decoder.kind == "tokenizer" and decoder.resolution == entry.resolution
        model.check_sampling(model.sampling)
    else:
        assert model.resolution == entry.resolution


TRAINING_ONLY = {
    "tokenizer", "cls", "image_range", "train_args", "sample_args", "training", "sampling_reported", "lossconfig",
    "use_ema", "ema_decay",
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [*ROWS, *(("eval", name) for name in rows("eval"))])
def test_row_is_described_as_published(family, name):
    entry, row = registered(family, name), rows(family)[name]
    if family == entry.family and name == entry.published[0] and isinstance(row["config"], dict) and entry.config:
        assert all(row["config"][key] == value for key, value in entry.config.items())
        assert row["config"].keys() - entry.config.keys() <= TRAINING_ONLY
    if family != "eval":
        assert (row["hub_repo"], row["filename"]) in {(entry.repository, entry.filename), *entry.mirrors}
    assert row.get("sha256") in (None, entry.sha256)
    # equal weights have one entry, and a generator's figures stand with the tokenizer that they need
    related = [entry, *([zoo.info(entry.tokenizer)] if entry.tokenizer else [])]
    figures = {value for other in related for value in published_figures(other)}
    assert {str(value) for value in entry.reported.values()} <= figures
    assert bool(entry.reported) == bool(entry.protocol)


def published_figures(entry):
    """Every number that is published of an entry, also inside a text."""
    for text in entry.published:
        family, _, name = text.rpartition(": ")
        yield from re.findall(r"\d+(?:\.\d+)?", json.dumps(rows(family or entry.family)[name]["reported"]))


@pytest.mark.parametrize("name", zoo.names("generator"))
def test_sampling_settings_are_those_of_the_configuration(name):
    import yaml

    entry = zoo.info(name)
    chosen = yaml.safe_load((CONF / "sampling" / f"{entry.sampling}.yaml").read_text())
    if entry.sampling != "default":
        assert entry.settings == {key: value for key, value in chosen.items() if key not in ("defaults", "_target_")}


@pytest.mark.parametrize(
    ("family", "name", "key"),
    [
        ("ibq", "ibq-ar-b", "transformer.blocks.0.attention.wo.weight"),
        ("ibq", "ibq-tokenizer-1024", "quant_conv.bias"),
        ("rar", "rar_b", "blocks.3.norm2.weight"),
        ("titok", "titok_s128", "encoder.ln_pre.bias"),
        ("titok", "titok_s128_generator", "mid_block.norm1.weight"),
        ("var", "VAR-d16", "blocks.3.ffn.fc1.bias"),
        ("xqgan", "VQ-4096", "encoder.model.blocks.3.norm1.weight"),
    ],
)
def test_a_changed_list_is_noticed(family, name, key):
    state = meta_state(family, name)
    state[f"{key}.stray"] = state.pop(key)
    with pytest.raises(CheckpointError, match=r"missing .*unexpected|no partner"):
        zoo.from_public(family, rows(family)[name]["config"], state)


def test_the_inception_has_the_published_keys():
    """Of the file that zoo.load("eval/inception") takes, by its hash alone."""
    [name] = zoo.info("eval/inception").published
    state, row = meta_state("eval", name), rows("eval")[name]
    with torch.device("meta"):
        network = InceptionNetwork()
    folded = fold_batch_norms(state, "the test")
    assert key_problems(network.state_dict(), folded) == []
    # every number once: means and variances besides
    statistics = sum(value.numel() for key, value in state.items() if "running" in key)
    assert round((sum(value.numel() for value in state.values()) - statistics) / 1e6, 3) == row["params_millions"]


def test_frozen_teachers_in_the_file_are_ignored(tmp_path):
    shapes = expanded(json.loads((FOLDER / "teachers.json").read_text()))
    teachers = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    path = tmp_path / "with_teachers.pt"
    torch.save({"ema": {**meta_state("xqgan", "MSBR10P2-4096"), **teachers}}, path)
    assert millions(zoo.load("xqgan/msbr10p2_4096", path)) == zoo.info("xqgan/msbr10p2_4096").params_millions
