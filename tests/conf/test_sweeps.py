"""Every file of conf/sweep: each of its jobs composes and builds."""

import itertools

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conf_commands import CONF, composed, script_commands
from tessera.run.build import make

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def jobs(sweep):
    """Overrides of each job; of an interval its ends."""
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("train", [f"sweep={sweep}"], return_hydra_config=True)
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    values = []
    for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
        key = override.get_key_element()
        if override.is_interval_sweep():
            found = [override.value().start, override.value().end]
        elif override.is_sweep_override():
            found = list(override.sweep_string_iterator())
        else:
            found = [override.get_value_element_as_str()]
        values.append([f"{key}={value}" for value in found])
    return [list(job) for job in itertools.product(*values)]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_first_and_last_jobs_of_each_value(sweep):
    """Every value occurs in a job that is built; not every combination."""
    every = jobs(sweep)
    assert len(every) == len({tuple(job) for job in every}) > 1
    seen = set()
    for job in [*every, *reversed(every)]:
        if set(job) <= seen:
            continue
        seen |= set(job)
        cfg = composed("train", [*job, f"sweep={sweep}"], fill=False)
        assert cfg.name == f"sweeps/{sweep}"
        with torch.device("meta"):
            make(cfg.tokenizer)
        make(cfg.perturbation)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_header_tells_the_command(sweep):
    text = (CONF / f"sweep/{sweep}.yaml").read_text()
    (script, arguments), *others = script_commands(text)
    assert script == "train" and arguments[:2] == ["-m", f"sweep={sweep}"]
    for script, arguments in others:
        composed(script, arguments)
        assert script == "eval" and f"task.folder=outputs/sweeps/{sweep}" in arguments
