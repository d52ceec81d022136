"""What a run leaves behind so that it can be repeated: config, overrides, commit, versions, command."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tessera.distributed import rank

PACKAGES = (
    "tessera",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "torchmetrics",
    "timm",
    "torch-fidelity",
    "numpy",
)


def git_state() -> dict[str, Any] | None:
    """Commit and whether the work tree differs from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages results depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def save_record(cfg: DictConfig, run: Path) -> dict[str, Any]:
    """Write `config.yaml` and `run.yaml` into the run folder.

    Returns:
        The record with the resolved config as plain values, for checkpoints.
    """
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    record = {
        "stage": OmegaConf.select(cfg, "stage._target_"),
        "seed": int(cfg.seed),
        "overrides": overrides,
        "command": sys.argv,
        "git": git_state(),
        "versions": package_versions(),
    }
    config = OmegaConf.to_container(cfg, resolve=True)
    if rank() == 0:
        (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        (run / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(record)))
    return {**record, "config": config}
