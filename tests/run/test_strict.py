"""Unknown, missing and mistyped configuration keys, against a small configuration folder."""

import textwrap
from functools import partial

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tessera.errors import ConfigError
from tessera.run.strict import check_config, suggestion

CONF = {
    "train.yaml": """
        defaults:
          - paths: default
          - data: digits
          - net: small
          - parts: both
          - parts@other: both
          - head: null
          - _self_
          - experiment: null
        seed: 0
        pairs: {sigma: 0.5}
        weights: {reconstruction: 1.0}
    """,
    "eval.yaml": "defaults: [paths: default, _self_]\nckpt: ???\n",
    "paths/default.yaml": "runs: outputs\n",
    "data/digits.yaml": """
        _target_: strict_targets.Data
        _partial_: true
        dataset: {_target_: strict_targets.digits, _partial_: true, resolution: 16}
        views: [{_target_: strict_targets.View, width: 1}, {_target_: strict_targets.View, width: 2}]
    """,
    "net/small.yaml": "defaults: [{unit: vq}, _self_]\n_target_: strict_targets.Net\nwidth: 8\n",
    "net/none.yaml": "_target_: null\n",
    "head/loose.yaml": "_target_: strict_targets.loose\n",
    "net/unit/vq.yaml": "# @package net.branch.unit\n_target_: strict_targets.View\nwidth: 3\n",
    "parts/both.yaml": "defaults: [first, second]\n",
    "parts/first.yaml": "first: {_target_: strict_targets.View, width: 1}\n",
    "parts/second.yaml": "second: {_target_: strict_targets.View, width: 1}\n",
    "head/big.yaml": "_target_: strict_targets.View\nwidth: 9\n",
    "experiment/typo.yaml": "# @package _global_\nsead: 1\n",
    "experiment/typo_below.yaml": "# @package _global_\npairs: {sigmma: 1}\nweights: {reconstuction: 2.0}\n",
    "experiment/off.yaml": "# @package _global_\ndefaults: [{override /net: none}]\nnet: {width: 3}\n",
    "experiment/off_typo.yaml": "# @package _global_\ndefaults: [{override /net: none}]\nnet: {widht: 3}\n",
    "experiment/not_chosen.yaml": "# @package _global_\nhead: {width: 3}\n",
    "experiment/good.yaml": "# @package _global_\nseed: 3\npairs: {sigma: 1}\nparts: {first: {width: 5}}\n",
}

TARGETS = """
class Base:
    def __init__(self, required, width: int = 1, depth: int | None = None, rate: float = 0.1): ...

class Net(Base):
    def __init__(self, *, branch=None, **kwargs):
        super().__init__(required=1, **kwargs)

class Data:
    def __init__(self, dataset, views=(), batch_size: int = 4, rate: float | Base = 0.1, devices: int | str = 1): ...

class View:
    def __init__(self, width: int, name: str = "x"): ...

def digits(split, resolution): ...

def loose(**options): ...
"""


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    for name, text in CONF.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (folder / "strict_targets.py").write_text(TARGETS)
    return folder / "conf"


@pytest.fixture
def check(conf, monkeypatch):
    monkeypatch.syspath_prepend(str(conf.parent))

    def run(*overrides, primary="train"):
        with initialize_config_dir(str(conf), version_base=None):
            cfg = compose(primary, list(overrides))
        before = OmegaConf.to_yaml(cfg)
        check_config(cfg, primary, conf)
        assert OmegaConf.to_yaml(cfg) == before

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=good"],
        ["experiment=off"],  # a part that is switched off may keep what a recipe set for it
        ["head=loose", "+head.anything=1"],
        ["+net.rate=0.5", "+net.depth=null"],
        ["+net.depth=${seed}"],
        ["+net._convert_=all", "+data.batch_size=3", "+data.devices=auto"],
        ["head=big", "+head.name=abc"],
        ["~data.views"],
    ],
    ids=" ".join,
)
def test_accepts(check, overrides):
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=typo"], r"unknown config key 'sead'; did you mean 'seed'\? \(set in conf/experiment/typo.yaml\)"),
        (["experiment=typo_below"], r"'pairs.sigmma'; did you mean 'pairs.sigma'\? .*typo_below"),
        (["experiment=typo_below"], r"'weights.reconstuction'; did you mean 'weights.reconstruction'\?"),
        (["experiment=off_typo"], r"'net.widht'; did you mean 'net.width'\?"),
        (["experiment=not_chosen"], r"^head has values but is not among the chosen parts.*not_chosen"),
        (["~parts.first._target_"], r"^parts.first has values but"),
        (["+other.third=1"], r"unknown config key 'other.third'; known here: first, second"),
        (["+paths.run=1"], r"'paths.run'; did you mean 'paths.runs'\?"),
        (["+ckpt=1"], r"unknown config key 'ckpt'"),  # eval's, not train's
        (["+net.widht=1"], r"'net.widht'; did you mean 'net.width'\?"),
        (["+net.branch.unit.nam=1"], r"'net.branch.unit.nam'; did you mean 'net.branch.unit.name'\?"),
        (["+data.dataset.resolutoin=1"], r"'data.dataset.resolutoin'; did you mean 'data.dataset.resolution'\?"),
        (
            ["data.views=[{_target_:strict_targets.View,with:3}]"],
            r"'data.views\[0\].with'; did you mean 'data.views\[0\].width'",
        ),
        (["data.views=[{_target_:strict_targets.View}]"], r"data.views\[0\].width is required by strict_targets.View"),
        (["~net.branch.unit.width"], r"net.branch.unit.width is required by .*; set net.branch.unit.width=\.\.\."),
        (["+data.batch_size=???"], r"data.batch_size is required; set data.batch_size=\.\.\."),
        (["net.width=wide"], r"net.width='wide' is not of type int"),
        (["+net.depth=deep"], r"net.depth='deep' is not of type int or null"),
        (["+data.rate=fast"], r"data.rate='fast' is not of type float"),  # as optimizers take a float or a tensor
        (["net._target_=strict_targets.Nett"], r"net._target_=strict_targets.Nett can't be imported"),
        (["net._target_=no_such_module.Net"], r"net._target_=no_such_module.Net can't be imported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses(check, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(*overrides)
    assert "\n" not in str(caught.value)


def test_every_problem_is_named(check):
    with pytest.raises(ConfigError, match=r"'paths.run'.*'net.widht'"):
        check("+net.widht=1", "+paths.run=1")


def test_the_other_primary_config(check):
    check("ckpt=x", primary="eval")
    with pytest.raises(ConfigError, match=r"^ckpt is required"):
        check(primary="eval")
    with pytest.raises(ConfigError, match="unknown config key 'seed'"):
        check("ckpt=x", "+seed=1", primary="eval")


def test_positional_arguments_and_builtins(conf, monkeypatch):
    monkeypatch.syspath_prepend(str(conf.parent))
    check = partial(check_config, primary="train", conf=conf)
    check(OmegaConf.create({"head": {"_target_": "strict_targets.View", "_args_": [3]}}))
    check(OmegaConf.create({"head": {"_target_": "builtins.dict", "any": 3}}))  # written in C: nothing is known
    with pytest.raises(ConfigError, match=r"'head.out_feature'; did you mean 'head.out_features'"):
        check(OmegaConf.create({"head": {"_target_": "torch.nn.Linear", "in_features": 1, "out_feature": 3}}))


def test_a_module_class_hands_nothing_on(conf, monkeypatch, tmp_path):
    """`nn.Module.__init__(*args, **kwargs)` refuses every argument, whatever its signature says."""
    (tmp_path / "strict_module.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n    def __init__(self, width=1, **rest):\n        super().__init__(**rest)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'head.widht'"):
        check_config(OmegaConf.create({"head": {"_target_": "strict_module.Net", "widht": 3}}), "train", conf)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("trainer.max_step", "did you mean 'trainer.max_steps'? "),
        ("max_steps", ""),
        ("stage.max_steps", "did you mean 'trainer.max_steps'? "),
        ("data.datset.resolution", "did you mean 'data.dataset.resolution'? "),
        ("trainer.xyz", ""),  # the parent itself would be no help
        ("data._partial", ""),
    ],
)
def test_suggestion(key, expected):
    known = ["trainer", "trainer.max_steps", "trainer.devices", "data.dataset.resolution", "data._partial_"]
    assert suggestion(key, known) == expected
