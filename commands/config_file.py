"""Configurations read from a file: ``--config=FILE`` and ``--distill=FILE``."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.addresses import is_address
from dnnlib.errors import refusal
from dnnlib.files import check_source, read_file
from dnnlib.typed import parse_json, unique_keys
from training.config import RunConfig
from training.family import restore_run

_YAML = (".yaml", ".yml")


@functools.cache
def read_config_file(path: str) -> tuple[RunConfig | None, tuple[str, ...]]:
    """Return the run stored in a file, or None and the file's options as command-line arguments.

    The file is JSON or YAML. It is either the ``training_options.json`` of a run, or one object
    that maps option names, with hyphens or underscores, to values. Lists are joined by commas.
    Nothing in a file is executed. Raises ValueError with one sentence for anything else.
    """
    content = _parse(path)
    if isinstance(content.get("config"), Mapping):  # A run's training_options.json.
        try:
            return restore_run(content["config"]), ()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--config: {path}: {error}") from error
    options = (f"--{_name(path, name)}={_text(path, name, content[name])}" for name in content)
    return None, tuple(options)


def _parse(path: str) -> Mapping[str, Any]:
    is_yaml = Path(path).suffix.lower() in _YAML
    try:
        text = read_file(path).decode()
        content = _parse_yaml(path, text) if is_yaml else _parse_json(path, text)
    except OSError as error:
        raise ValueError(f"--config: {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config: {path} is not a text file.") from None
    if not isinstance(content, Mapping):
        but = f"{path} holds no option names with values"
        raise refusal("--config", but=but, remedy='write {"preset": "cifar10", "lr": 0.0001}')
    return content


def _parse_json(path: str, text: str) -> Any:
    try:
        return parse_json(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"--config: {path} is not valid JSON ({error}).") from None


def _parse_yaml(path: str, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        but = f"reading {path} needs the package pyyaml, which is not installed"
        raise refusal("--config", but=but, remedy="pip install pyyaml, or write JSON") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            unique_keys([(key.value, None) for key, _ in root.value if isinstance(key.value, str)])
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config: {path} is not valid YAML ({reason}).") from None


def _name(path: str, name: Any) -> str:
    option = str(name).lstrip("-").replace("_", "-")
    if option in ("config", "help", "h"):
        raise refusal("--config", but=f"{path} names --{option}", remedy="leave it out there")
    return option


def _text(path: str, name: Any, value: Any) -> str:
    if isinstance(value, Mapping) or value == []:
        but = f"{path} gives {name} the value {value!r}, which no option takes"
        raise refusal("--config", but=but, remedy="name options without sections, as in --help")
    if isinstance(value, list | tuple):
        return ",".join(_text(path, name, item) for item in value)
    return "none" if value is None else str(value)


def with_config_file(args: Sequence[str], path: str | None) -> list[str]:
    """Return ``args`` after the options of a file, so that typed options take precedence."""
    if path is None:
        return list(args)
    return [*read_config_file(path)[1], *args]


def read_teacher(distill: str, preset: str | None) -> RunConfig:
    """Return the configuration that students start from: their teacher's, with usual changes.

    The learning rate falls to 0 in each stage, as in progressive distillation (arXiv 2202.00512),
    but as a cosine, not linearly. Students always see their condition, and their EMA needs no
    ramp-up, because their weights are good from the start. Raises ValueError if ``preset`` is not
    the teacher's.
    """
    from training.portable import open_header

    if not is_address(distill):
        check_source(distill, where="--distill")
    config, _ = open_header(distill)
    if preset not in (None, config.preset):
        but = f"the teacher is of preset {config.preset}, which its students keep"
        raise refusal("--preset", preset, but=but, remedy="leave it out")
    usual = dict(lr_schedule="cosine", label_drop=0.0, ema_rampup=None, ema_stds=())
    return config.changed("training", **usual)
