"""What a run leaves behind so that it can be repeated: config, overrides, commit, versions, command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.yaml"
FAILURE_FILE = "failed.yaml"
# LOCAL_RANK, which Lightning sets, before SLURM_PROCID, which an interactive session sets for all that it starts
RANKS = ("RANK", "SUBMITIT_LOCAL_GLOBALID", "LOCAL_RANK", "SLURM_PROCID")
PACKAGES = (
    "tessera",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "timm",
    "torch-fidelity",
    "numpy",
)


def git_state(source: Path | None = None) -> dict[str, Any] | None:
    """Commit of the running code, and whether the work tree differs from it.

    Args:
        source: a file of that code; by default this one.

    Returns:
        {"commit", "dirty"}, or None where the code is not under version control: no git, no repository, or installed
        somewhere inside another project's repository.
    """
    source = source or Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # optional, or run from a source tree
            continue
    return versions


def is_first_process() -> bool:
    """Whether this is rank 0; asked before Lightning has started the process group, so by environment."""
    own = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return int(own) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def save_record(cfg: DictConfig, run: Path) -> dict[str, Any]:
    """Write `config.yaml` (resolved) and `run.yaml` (how it was started, oldest first) into the run folder.

    A run that is continued adds an entry to `run.yaml`, so that no commit or override that shaped it is lost. Only the
    first process of a distributed run writes.

    Args:
        cfg: composed configuration, with every value set.
        run: the run folder, which exists.

    Returns:
        The record of this start with the resolved config, as plain values that `torch.load(weights_only=True)` reads.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    record = {
        "stage": OmegaConf.select(cfg, "stage._target_"),
        "seed": int(cfg.seed),
        "overrides": _overrides(),
        "command": _command(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": package_versions(),
    }
    if is_first_process():
        _write(run / CONFIG_FILE, config)
        path = run / RECORD_FILE
        earlier = yaml.safe_load(path.read_text()) if path.exists() else []
        _write(path, [*earlier, record])
        (run / FAILURE_FILE).unlink(missing_ok=True)
    return {**record, "config": config}


def save_failure(message: str) -> None:
    """Leave the reason why a run failed in its folder, until it is started again."""
    content = {"error": message, "overrides": _overrides(), "command": _command()}
    _write(Path(HydraConfig.get().runtime.output_dir) / FAILURE_FILE, content)


def _overrides() -> list[str]:
    if not HydraConfig.initialized():
        return []
    # one that is an interpolation is resolved where it stands in the config, not here
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def _command() -> str:
    """What starts this run; of a job of a sweep, what would start it alone."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return shlex.join(["python", f"{HydraConfig.get().job.config_name}.py", *_overrides()])
    return shlex.join([Path(sys.executable).name, *sys.argv])


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    os.replace(temporary, path)
