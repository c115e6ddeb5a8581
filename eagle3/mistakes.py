"""What Hydra and OmegaConf raise, as one sentence that names the key and the nearest valid one."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from eagle3.config import flat, nearest
from eagle3.errors import ConfigError, RunError

OPEN = (
    "data.sources",
    "data.chat_template_kwargs",
    "regenerate.extra_body",
)  # sections that take any key


def explain(error: BaseException, conf: Path) -> tuple[str, int]:
    """-> (sentence, exit code). Exceptions that wrap one of ours are seen through."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigError, RunError)):
            return str(cause), cause.exit_code
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MissingConfigException):
        return missing_option(error, conf), 2
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return wrong_value(error, conf), 2
    if isinstance(error, OSError):
        if error.filename is None:
            return " ".join(str(error).split()), 1
        return f"{error.strerror}: {error.filename}; name another folder or free it", 1
    return str(error), 1


def missing_option(error: MissingConfigException, conf: Path) -> str:
    """`model=lama`: the group exists, the option does not."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if not group or not options:
        groups = sorted({str(path.parent.relative_to(conf)) for path in conf.glob("*/**/*.yaml")})
        return f"{error.missing_cfg_file} is no config group; groups: {', '.join(groups)}{nearest(option, groups)}"
    return f"{group}={option} is unknown; allowed: {', '.join(options)}{nearest(option, options)}"


def wrong_value(error: Exception, conf: Path) -> str:
    """A key that does not exist, or a value of the wrong type."""
    text = str(error.__cause__ or error) + "\n" + str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    conversion = re.search(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", text
    )
    key = re.search(r"full_key: (\S+)", text)
    if conversion:
        return f"{key[1] if key else 'a value'}={conversion[1]} must be of type {conversion[2].lower()}"
    if unknown and any(unknown[1] == key or unknown[1].startswith(f"{key}.") for key in OPEN):
        return f"{unknown[1]} is new to the config: put + before it, as +{unknown[1]}=..."
    if unknown:
        return f"{unknown[1]} is no key of the config{nearest(unknown[1], known_keys(conf))}"
    merged = re.search(r"Error merging override (\S+?)=(\S+)", text)
    if merged and merged[1].startswith("+data.sources."):
        return f"{merged[1]} is no source yet: write '+data.sources={{{merged[1].split('.')[2]}: {{path: ...}}}}'"
    if merged:
        return f"{merged[1]}={merged[2]} has the wrong type; write a list as '{merged[1]}=[{merged[2].strip('[]')}]'"
    no_group = re.search(
        r"Could not find match for '?([\w/@]+)'?|No match in the defaults list for '([\w/@]+)'",
        text,
    )
    if no_group:
        return f"{no_group[1] or no_group[2]} is no config group{nearest(no_group[1] or no_group[2], known_keys(conf))}"
    return " ".join(str(error).split())


def known_keys(conf: Path) -> list[str]:
    """Every dotted key of the default config, and every section and group."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        keys = list(flat(compose("run", overrides=["name=x"])))
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    return keys + sorted(sections)
