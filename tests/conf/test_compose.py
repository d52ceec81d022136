"""Every file of conf/, as it lies there: composes, resolves, has no unknown key, and builds."""

import copy
from functools import partial

import hydra.utils
import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf

from conf_commands import CONF, PRIMARY, composed, expanded, script_commands
from tessera.errors import ConfigError
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, VQCodebook
from tessera.run.build import make
from tessera.run.strict import RECIPES, check_config

FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
GROUP_FILES = [name for name in FILES if "/" in name and name.split("/")[0] not in (*RECIPES, "hydra")]
EXPERIMENTS = [name for name in FILES if name.startswith("experiment/")]
MODES = [name for name in FILES if name.split("/")[0] in ("debug", "sweep")]


def option(name):
    group, _, choice = name.rpartition("/")
    return group, choice


@pytest.mark.parametrize("primary", PRIMARY)
def test_primary(primary):
    composed(primary, [])


def any_script(overrides):
    """The configuration of the first script that accepts the overrides; fails with the reasons of all."""
    reasons = []
    for primary in ("train", "post_train", "eval"):
        try:
            return composed(primary, overrides)
        except (HydraException, ConfigError) as error:
            reasons.append(f"{primary}: {error}")
    pytest.fail("no script accepts it\n" + "\n".join(reasons))


@pytest.mark.parametrize("name", GROUP_FILES)
def test_option(name):
    group, choice = option(name)
    any_script([f"{group}={choice}"])


@pytest.mark.parametrize("name", MODES)
def test_mode(name):
    group, choice = option(name)
    any_script([f"{group}={choice}"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name):
    """The command in the recipe's header is the one that runs it, and it composes."""
    header = "".join(line for line in (CONF / f"{name}.yaml").open() if line.startswith("#"))
    commands = list(script_commands(header))
    assert commands, f"conf/{name}.yaml has no 'Command: python ...' in its header"
    for script, arguments in commands:
        for overrides in expanded(arguments):
            cfg = composed(script, overrides)
    chosen = f"experiment={name.removeprefix('experiment/')}"
    assert any(chosen in arguments for _, arguments in commands), f"the command in conf/{name}.yaml runs another recipe"
    assert OmegaConf.select(cfg, "name") is not None
    build_on_meta(cfg)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_fast_mode_suits_every_experiment(name):
    """Schedules and starts of the recipe fit into its few steps."""
    header = "".join(line for line in (CONF / f"{name}.yaml").open() if line.startswith("#"))
    script, arguments = next(script_commands(header))
    if script == "eval":
        pytest.skip("an evaluation has no steps")
    cfg = composed(script, [*expanded(arguments)[0], "debug=fast"])
    steps = cfg.trainer.max_steps
    assert steps == 4 and cfg.trainer.val_check_interval <= steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optimizer.lr)
    for key in ("scheduler", "discriminator_scheduler"):
        if cfg.stage.get(key) is not None:
            hydra.utils.instantiate(cfg.stage[key])(optimizer, steps)


def quantizer():
    """Of a tokenizer that every generator can be built on."""
    codebook = partial(VQCodebook, codebook_size=4096)
    branch = partial(MultiScaleQuantizer, codebook=codebook, grids=[1, 2, 4], phi_convs=4)
    return ProductQuantizer(branch=branch, branches=1, dim=8)


def build_on_meta(cfg):
    """Constructs the models of a configuration without memory, those aside that are read from a checkpoint."""
    with torch.device("meta"):
        for part in ("tokenizer", "generator", "discriminator"):
            node = cfg.get(part)
            if node is None or node.get("_target_") is None or "path" in node:
                continue
            model = make(node)
            if node.get("_partial_"):
                model = model(**model.func.sizes(quantizer(), num_classes=1000))
            assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", [n for n in GROUP_FILES if option(n)[0] == "generator" and option(n)[1] != "pretrained"]
)
def test_generator_builds(name):
    build_on_meta(any_script(["stage=generator", f"generator={option(name)[1]}"]))


SMALL = ("perturbation", "sampling", "discriminator", "discriminator_augment", "alignment", "scheduler", "logger")


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if option(name)[0] in SMALL])
def test_small_part_builds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_OUTPUTS", str(tmp_path))
    group, choice = option(name)
    with torch.device("meta"):  # where pretrained weights are not fetched
        built = make(any_script([f"{group}={choice}"])[group])
    assert (built is None) == (choice == "none")


@pytest.mark.parametrize("name", [name for name in GROUP_FILES if option(name)[0] == "optimizer"])
def test_optimizer_builds(name):
    factory = hydra.utils.instantiate(any_script([f"optimizer={option(name)[1]}"]).optimizer)
    assert isinstance(factory([torch.nn.Parameter(torch.zeros(2))]), torch.optim.Optimizer)


def test_a_file_in_the_wrong_place_would_be_seen():
    """The lists above are not empty, and cover every file but the primaries', Hydra's and local ones."""
    covered = {*GROUP_FILES, *EXPERIMENTS, *MODES, *PRIMARY}
    assert EXPERIMENTS and GROUP_FILES
    assert {name for name in FILES if name.split("/")[0] not in ("hydra", "local")} == covered


@pytest.mark.parametrize("primary", PRIMARY)
def test_an_unknown_key_is_refused_everywhere(primary):
    cfg = composed(primary, [])
    nodes = [key for key, node in cfg.items() if OmegaConf.is_dict(node)]
    assert nodes
    for key in nodes:
        misspelt = copy.deepcopy(cfg)
        OmegaConf.update(misspelt, f"{key}.misspelt", 1, force_add=True)
        with pytest.raises(ConfigError, match=rf"unknown config key '{key}\.misspelt'"):
            check_config(misspelt, primary, CONF)
