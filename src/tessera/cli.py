"""What the three scripts share: composing the configuration, one-line errors, exit codes.

Imports neither torch nor anything that does: `--help`, `--cfg job` and a misspelt key answer at once.
"""

import functools
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from tessera.errors import ConfigError, TesseraError
from tessera.run.record import save_failure
from tessera.run.strict import RECIPES, suggestion

Task = Callable[[DictConfig], dict[str, Any]]

USER_ERROR = 2
LONGEST_LIST = 20  # options that an error names
HYDRA_OPTIONS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
)  # fmt: skip
EXCLUDE_KEYS = "hydra.job.config.override_dirname.exclude_keys"
PLUGINS = {  # options that are not files of conf/: (extra, package)
    "hydra/launcher/submitit_slurm": ("slurm", "hydra-submitit-launcher"),
    "hydra/launcher/submitit_local": ("slurm", "hydra-submitit-launcher"),
    "hydra/sweeper/optuna": ("optuna", "hydra-optuna-sweeper"),
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def hydra_entry(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorator that makes a script's main function a Hydra entry point.

    The configuration folder is `conf/` beside the script, wherever it is started from. An error that the user can act
    on becomes one line on stderr and exit code 2; a bug keeps its traceback. A run that a signal stopped exits with
    128 + the signal's number. In a sweep, a run returns the figure that `objective` names.

    Args:
        config_name: primary config in `conf/`.
    """

    def decorate(task: Task) -> Callable[[], None]:
        conf = Path(inspect.getfile(task)).resolve().parent / "conf"

        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            set_thread_variables(cfg)
            try:
                results = task(cfg)
                if results.get("stopped_by"):
                    hand_on(signal.Signals[results["stopped_by"]])
                return objective_value(results, cfg.get("objective"))
            except Exception as error:
                line = user_message(error, conf, config_name)
                save_failure(line or f"{type(error).__name__}: {_one_line(error)}")
                # Hydra would print a second line; in a sweep that line says which run failed
                if HydraConfig.get().mode == RunMode.RUN:
                    exit_if_user_error(error, conf, config_name)
                if cause := next((cause for cause in _causes(error) if isinstance(cause, TesseraError)), None):
                    raise cause from None  # a launcher's process gets the exception without what caused it
                raise

        @functools.wraps(task)
        def main() -> None:
            traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing its own digest
            sys.argv += job_folder_options(sys.argv[1:])
            try:
                check_options(sys.argv[1:])
                hydra.main(version_base=None, config_path=str(conf), config_name=config_name)(job)()
            except KeyboardInterrupt:
                sys.stderr.write("interrupted\n")
                raise SystemExit(128 + signal.SIGINT) from None
            except Exception as error:
                if not traceback_wanted:
                    exit_if_user_error(error, conf, config_name)
                raise

        return main

    return decorate


def set_thread_variables(cfg: DictConfig) -> None:
    """Limit the thread pools of numerical libraries to `num_threads`; they read this when they are first imported."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(cfg.get("num_threads", 1))


def check_options(arguments: list[str]) -> None:
    """Refuse `--key value`, of which Hydra would make the option that the key is the beginning of, or an exit.

    Raises:
        ConfigError: an option with two dashes that isn't Hydra's.
    """
    for text in arguments:
        name = text.partition("=")[0]
        if name.startswith("--") and name not in HYDRA_OPTIONS:
            key = name.removeprefix("--")
            raise ConfigError(f"{name} is no option; settings are written {key}=..., without dashes (see --help)")


def job_folder_options(arguments: list[str]) -> list[str]:
    """What to add to a command line so that job folders of a sweep (-m) are named after what is swept and no more.

    A single job then has the folder that it would have without -m, so that launchers don't change where runs are.
    """
    if not {"-m", "--multirun"} & set(arguments) or any(text.startswith(EXCLUDE_KEYS) for text in arguments):
        return []
    try:
        overrides = OverridesParser.create().parse_overrides([text for text in arguments if not text.startswith("-")])
    except OverrideParseException:
        return []  # Hydra reports it
    fixed = {override.key_or_group for override in overrides if not override.is_sweep_override()}
    swept = {override.key_or_group for override in overrides} - fixed
    named = {"name", "ckpt"} | ({"experiment"} if "name" not in fixed else set())  # a recipe names its run
    excluded = sorted((fixed | named) - (swept - named))
    return [f"{EXCLUDE_KEYS}=[{','.join(repr(key) for key in excluded)}]"]


def hand_on(stopped_by: signal.Signals) -> None:
    """End the process after a signal has stopped its run.

    In a submitit job the signal that announces the time limit goes on to submitit, which requeues the job.
    """
    if "SUBMITIT_EXECUTOR" in os.environ and stopped_by == signal.SIGUSR2:
        signal.raise_signal(stopped_by)
    raise SystemExit(128 + stopped_by)


def objective_value(results: dict[str, Any], objective: str | None) -> Any:
    """What a run returns to Hydra: the figure a sweeper optimises, or all results where `objective` is null.

    Args:
        results: as in results.json; `figures` is a list, or a dict of lists (before and after post-training).
        objective: a figure's name or label, e.g. `rFID`; in a dict of lists with its key, e.g. `after_ema/gFID`.

    Raises:
        ConfigError: no figure, or more than one, goes by that name.
    """
    if objective is None:
        return results
    figures = results["figures"]
    groups = {f"{key}/": items for key, items in figures.items()} if isinstance(figures, dict) else {"": figures}
    found = {
        prefix + figure["label"]: figure["value"]
        for prefix, items in groups.items()
        for figure in items
        if objective in (prefix + figure["name"], prefix + figure["label"])
    }
    if len(found) != 1:
        measured = ", ".join(f"{prefix}{figure['label']}" for prefix, items in groups.items() for figure in items)
        raise ConfigError(f"objective={objective} names {len(found)} figures; measured were: {measured or 'none'}")
    return float(next(iter(found.values())))


def exit_if_user_error(error: Exception, conf: Path, config_name: str) -> None:
    """End the process with one line on stderr if `error` is the user's; return if it is a bug."""
    line = user_message(error, conf, config_name)
    if line is not None:
        sys.stderr.write(f"error: {line}\n")
        raise SystemExit(USER_ERROR) from error


def user_message(error: BaseException, conf: Path, config_name: str) -> str | None:
    """One line on what to change, or None where the error is a bug.

    Args:
        error: caught; Hydra may have wrapped the one that matters.
        conf: configuration folder.
        config_name: primary config, for the keys that exist.
    """
    if recipe := _recipe_of_another_script(error, conf, config_name):
        return recipe
    for cause in _causes(error):
        if isinstance(cause, TesseraError):
            return _without_worker_traceback(cause)
        if isinstance(cause, MissingMandatoryValue):
            key = cause.full_key or _quoted(str(cause))
            return f"{key} is required; set {key}=..."
        if isinstance(cause, InterpolationResolutionError):
            return f"{cause.full_key} can't be resolved: {_first_line(cause)}"
        if type(cause).__name__ == "MisconfigurationException":  # Lightning's; by name, to not import it
            line = _one_line(cause).rstrip(".!")
            return f"trainer: {line}" + ("; choose trainer=cpu" if "No supported gpu" in line else "")
        if type(cause).__name__ in ("UncompletedJobError", "FailedJobError"):  # submitit's
            return _submitted_job(cause)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return _no_setting(error.override, conf)
        return (
            f"can't read {error.override!r}: {_first_line(error)}; quote values with special characters: 'key=\"a,b\"'"
        )
    if isinstance(error, MissingConfigException):
        return _missing_config(error, conf)
    if isinstance(error, ConfigCompositionException):
        return _composition(error, conf, config_name)
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return _no_choice(conf)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # an InstantiationException of Hydra may only quote what went wrong; what it was raised from counts
        error = error.__cause__ or (error.__context__ if isinstance(error, InstantiationException) else None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _without_worker_traceback(error: TesseraError) -> str:
    """The message itself, where torch's data loader has put it at the end of a worker's traceback."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2]
    return " ".join(text.split())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].strip()


def _quoted(text: str) -> str | None:
    match = re.search(r"'([^']+)'", text)
    return match.group(1) if match else None


def _submitted_job(error: BaseException) -> str:
    """For a job that couldn't be submitted, or has ended without a result."""
    result = re.search(r"with path (\S+)", str(error))
    if result is None:
        return f"hydra.launcher: {_one_line(error)}"
    return (
        f"a job was stopped or has crashed; its logs are in {Path(result.group(1)).parent}; "
        "the same command with ckpt=auto continues it"
    )


def _recipe_of_another_script(error: BaseException, conf: Path, config_name: str) -> str | None:
    """For keys of a recipe that this script doesn't have, as the recipe's header names another one."""
    for name, _, choice in (text.lstrip("+").partition("=") for text in _overrides()):
        path = conf / name / f"{choice}.yaml"
        if name != "experiment" or not path.is_file():
            continue
        header = re.search(r"^# Command: python (\w+)\.py", path.read_text(), re.MULTILINE)
        script = header.group(1) if header else config_name
        blamed = isinstance(error, ConfigCompositionException) or f"{name}/{choice}.yaml)" in str(error)
        if blamed and script != config_name:
            return f"{name}={choice} is a recipe of {script}.py; run: python {script}.py {name}={choice} ..."
    return None


def _no_setting(text: str, conf: Path) -> str:
    """For an argument that is not of the form key=value."""
    groups = [folder.name for folder in sorted(conf.iterdir()) if (folder / f"{text}.yaml").is_file()]
    example = f"did you mean {groups[0]}={text}?" if groups else "such as experiment=digits/tokenizer (see --help)"
    return f"{text!r} is no setting; settings are written key=value, {example}"


def _missing_config(error: MissingConfigException, conf: Path) -> str:
    path = str(error.missing_cfg_file or "").removesuffix(".yaml")
    if path in PLUGINS:
        group, _, choice = path.rpartition("/")
        extra, package = PLUGINS[path]
        return f"{group}: {choice} comes with {package}, which is not installed; pip install 'tessera[{extra}]'"
    given = [text.lstrip("+").partition("=") for text in _overrides()]
    group = next((name for name, _, choice in given if f"{name}/{choice}" == path), path.rpartition("/")[0])
    options = _options(conf, group)
    if not group or not options:
        return _one_line(error)
    choice = path.removeprefix(f"{group}/")
    hint = suggestion(choice, options)
    if hint and len(options) > LONGEST_LIST:
        return f"{group}={choice} does not exist; {hint}all are in {conf / group}"
    return f"{group}={choice} does not exist; {hint}available: {', '.join(options)}"


def _no_choice(conf: Path) -> str | None:
    """For `group=null`, which Hydra can't read on the command line."""
    for name, _, choice in (text.lstrip("+").partition("=") for text in _overrides()):
        if choice in ("null", "") and (options := _options(conf, name)):
            other = f"{name}=none" if "none" in options else f"~{name}"
            advice = f"leave the group out by {other}, or choose one: {_choices(conf, name)}"
            return f"{name}={choice} is no choice; {advice}"
    return None


def _composition(error: ConfigCompositionException, conf: Path, config_name: str) -> str:
    text = str(error)
    match = re.search(r"(Could not|You must specify)[^']*'([^']+)'", text)
    if match is None:
        cause = f" ({_first_line(error.__cause__)})" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        return _one_line(error) + cause
    key = match.group(2).lstrip("+~")
    group = key.partition(".")[0]
    if text.startswith("You must specify"):
        return f"{key} is required; choose one: {_choices(conf, key)}"
    if "/" in key:
        groups = sorted(folder.relative_to(conf).as_posix() for folder in conf.rglob("*") if folder.is_dir())
        return f"unknown config group '{key}'; {suggestion(key, groups)}groups: {', '.join(groups)}"
    cfg = _composed(conf, config_name, key)
    if cfg is None or key in _dotted_keys(OmegaConf.to_container(cfg, resolve=False)):
        return _one_line(error)  # the key exists: something else is wrong
    if any(node.get("_target_", "") is None for node in _parents(cfg, key)):
        return f"'{key}' can't be set, as {group} is switched off; choose one first: {_choices(conf, group)}"
    if group not in cfg and _options(conf, group):
        return f"'{key}' can't be set, as no {group} is chosen; choose one first: {_choices(conf, group)}"
    hint = suggestion(key, _dotted_keys(OmegaConf.to_container(cfg, resolve=False)))
    if not hint and any("_target_" in node for node in _parents(cfg, key)):
        hint = f"if it is an argument that no file of conf/ gives, add it by +{key}=...; all given ones: --cfg job"
    return f"unknown config key '{key}'; {hint or 'see --cfg job for all keys'}".rstrip()


def _parents(cfg: DictConfig, key: str) -> Iterator[DictConfig]:
    """The nodes above `key` that exist."""
    names = key.split(".")
    for length in range(1, len(names)):
        node = OmegaConf.select(cfg, ".".join(names[:length]), throw_on_resolution_failure=False)
        if isinstance(node, DictConfig):
            yield node


def _options(conf: Path, group: str) -> list[str]:
    """Choices of a config group, those in sub-folders of recipes included."""
    folder = conf / group
    nested = group in RECIPES
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("**/*.yaml" if nested else "*.yaml")
    )


def _choices(conf: Path, group: str) -> str:
    return ", ".join(f"{group}={option}" for option in _options(conf, group)) or "none is available"


def _overrides() -> list[str]:
    return [text for text in sys.argv[1:] if not text.startswith("-")]


def _composed(conf: Path, config_name: str, without: str) -> DictConfig | None:
    """What the command line asks for, less the overrides of one key; None where that can't be composed either."""
    given = [text for text in _overrides() if text.lstrip("+~").partition("=")[0] != without]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf), version_base=None):
        for overrides in (given, []):
            try:
                return hydra.compose(config_name, overrides)
            except Exception:  # another override is wrong too: fall back to the defaults
                continue
    return None


def _dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _dotted_keys(value, f"{prefix}{key}.")
