"""Every check that can be made before a model loads: values, files, then pairs of them.

A mistake is one ConfigError sentence with the key, what is allowed, and the nearest name.
"""

import inspect
import math
import types
import typing
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from hydra.utils import get_object
from transformers import PretrainedConfig

from eagle3.benchmark.request import asks_heldout, check_request, check_shape, in_steps
from eagle3.benchmark.scoring import namespaces
from eagle3.config import HYDRA_KEYS, Data, OneOf, RunConfig, Within, layout, nearest
from eagle3.data.chat import load_chat
from eagle3.data.sources import may_be_remote, names_data
from eagle3.data.vocab import complete_section
from eagle3.draft.initial import draft_config
from eagle3.errors import ConfigError
from eagle3.export.card import check_push
from eagle3.export.read import check_given
from eagle3.hidden_states.import_specforge import is_specforge
from eagle3.parallel.launch import is_torchrun
from eagle3.parallel.ranks import choose_device
from eagle3.runs.disk import parse_size
from eagle3.target.loading import check_croppable
from eagle3.target.spec import check_supported, read_spec

READS_DATA = {"regenerate", "view", "prepare", "generate", "capture"}


def check(config: RunConfig) -> None:
    """Raise ConfigError for the first value, path or pair that cannot work."""
    check_value("", config, RunConfig)
    check_stages(config)
    if set(config.stages) == {"compare"}:
        return
    check_processes(config)
    check_benchmark_section(config)
    if config.export.push_to_hub and "export" in config.stages and not config.plan:
        check_push(config.export.push_to_hub)
    check_data(config.data, ["plan"] if config.plan else reads_data(config))
    check_files(config)
    check_against_target(config)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Bounds of a value, of each element of a list, or of what a section has inside."""
    if isinstance(value, dict) and "_target_" in value:
        return check_node(value, key)
    if is_dataclass(value) or isinstance(value, dict):
        hints = typing.get_type_hints(type(value), include_extras=True)
        for name, inner in (value if isinstance(value, dict) else vars(value)).items():
            check_value(f"{key}.{name}".lstrip("."), inner, hints.get(name, Any))
        return
    for bound in bounds(hint):
        for element in value if isinstance(value, list) else [value]:
            if element is not None and element not in bound:
                near = nearest(element, bound) if isinstance(bound, OneOf) else ""
                raise ConfigError(f"{key}={value} must be {bound}{near}")


def bounds(hint: Any) -> list[Within | OneOf]:
    """What stands on a parameter, also inside an optional one: `Annotated[int, ...] | None`."""
    found = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Within | OneOf)]
    for argument in typing.get_args(hint):
        found += bounds(argument)
    return found


def check_node(node: dict[str, Any], key: str) -> None:
    """Bind a node with `_target_` to the signature of what it names, recursively."""
    name = node["_target_"]
    called = get_object(name)
    parameters = inspect.signature(called).parameters
    function = called.__init__ if inspect.isclass(called) else called
    hints = typing.get_type_hints(function, include_extras=True)
    # What is missing has a default, or is missing on purpose: `_partial_` gets the rest later.
    for parameter, value in node.items():
        if parameter in HYDRA_KEYS:
            continue
        if parameter not in parameters:
            allowed = ", ".join(parameters) + nearest(parameter, parameters)
            raise ConfigError(f"{key}.{parameter} is unknown to {name}; allowed: {allowed}")
        hint = hints.get(parameter, Any)
        if not fits(value, hint):
            given, bare = type(value).__name__, getattr(hint, "__origin__", hint)
            wanted = getattr(bare, "__name__", str(bare))
            raise ConfigError(f"{key}.{parameter}={value} is a {given}, but {name} takes {wanted}")
        check_value(f"{key}.{parameter}", value, hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can be what a hint asks for; what YAML cannot express fits anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(fits(v, arguments[0]) for v in value)
    if hint in (bool, str, int, float, type(None)):
        # By type: to Python a bool is an int, to a user of YAML it is none.
        return type(value) is hint or (hint is float and type(value) is int)
    return not inspect.isclass(hint) or isinstance(value, (dict, hint))


def check_stages(config: RunConfig) -> None:
    """Names of stages, and what a stage cannot do without."""
    stages = config.stages
    if not stages:
        raise ConfigError("stages is empty; name at least one")
    if "compare" in stages and not config.runs:
        raise ConfigError("stages=[compare] needs runs=[<folders of runs or sweeps, or patterns>]")
    if "regenerate" in stages and config.data.preformatted:
        raise ConfigError("stages: regenerate needs messages; set data.preformatted=false")
    hidden = config.hidden_states.path
    if "import" in stages and not (hidden and is_specforge(Path(hidden))):
        raise ConfigError("stages=[import] needs hidden_states.path=<folder of SpecForge's files>")
    length, room = config.data.max_length, config.train.tokens_per_step
    if length > room:  # a document would not fit into a micro-step
        raise ConfigError(f"data.max_length={length} must be at most train.tokens_per_step={room}")
    measured, chosen = config.eval.temperature, config.train.best_by
    if 0 not in measured or len({*measured}) < len(measured):
        raise ConfigError(f"eval.temperature={measured} must have 0, as [0,1] does, and each once")
    if not chosen or not {*chosen} <= {*measured}:
        raise ConfigError(f"train.best_by={chosen} must be some of eval.temperature={measured}")
    if config.hidden_states.max_disk is not None:  # read here, so that a typo ends no long run
        parse_size(config.hidden_states.max_disk)


def check_processes(config: RunConfig) -> None:
    """That the processes asked for exist and can be divided as asked for."""
    launch, group = config.launch, math.prod(layout(config))
    processes = launch.nproc_per_node * launch.nnodes
    if processes % group:
        product = f"launch.nproc_per_node x launch.nnodes = {processes}"
        raise ConfigError(f"parallel.ulysses x parallel.ring = {group} must divide {product}")
    device = choose_device(config.device)
    if config.plan:  # may be made anywhere
        return
    wanted, gpus = launch.nproc_per_node, torch.cuda.device_count()
    if device.type == "cuda" and wanted > gpus:
        problem = f"is more than the {gpus} GPUs that torch sees here"
        remedy = f"set launch.nproc_per_node={gpus}, or device=cpu"
        raise ConfigError(f"launch.nproc_per_node={wanted} {problem}; {remedy}")
    if launch.nnodes > 1 and not is_torchrun():
        needed = "launch/torchrun.sh on every node, or launch/slurm.sbatch"
        raise ConfigError(f"launch.nnodes={launch.nnodes} needs {needed}")


def check_benchmark_section(config: RunConfig) -> None:
    """What the benchmark is asked for, and whether it has what it needs."""
    section = config.benchmark
    check_request(section)
    if "benchmark" not in config.stages or config.plan:
        return
    if section["execute_code"] and not section["execute_code_unconfined"] and not namespaces():
        problem = "this system gives a program no namespaces of its own (unshare of util-linux)"
        remedy = "set benchmark.execute_code_unconfined=true to run the model's code as you do"
        raise ConfigError(f"benchmark.execute_code=true: {problem}; {remedy}")
    engine = get_object(section["_target_"])
    engine.check_settings(section)
    if engine.in_process and not get_object(config.target["_target_"]).in_process:
        raise ConfigError("benchmark=builtin needs target=hf; or set benchmark=sglang")


def reads_store_alone(config: RunConfig) -> bool:
    """Whether training reads hidden states of the user's folder and no data: those are SpecForge's,
    or no data is named.
    """
    folder = config.hidden_states.path
    if folder is None or not get_object(config.mode["_target_"]).captures:
        return False
    return is_specforge(Path(folder)) or not names_data(config.data)


def reads_data(config: RunConfig) -> list[str]:
    """The stages that read conversations, and so cannot do without `data`."""
    readers = set(READS_DATA) if reads_store_alone(config) else READS_DATA | {"train"}
    if asks_heldout(config.benchmark, config.data):
        readers.add("benchmark")
    return [stage for stage in config.stages if stage in readers]


def check_data(data: Data, readers: list[str]) -> None:
    """That there is data, from `path` or `sources`, for the stages that read it (`readers`)."""
    if data.path is not None and data.sources:
        raise ConfigError("data.path and data.sources exclude each other; set one of them")
    if not readers:
        return
    if not names_data(data):
        remedy = "set data=<preset> or data.path=<file, folder, hub id or address>"
        raise ConfigError(f"{readers[0]} reads data, but none is named; {remedy}")
    paths = {"data.path": data.path, "data.eval_path": data.eval_path}
    paths |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    for key, path in paths.items():
        if path is not None and not may_be_remote(path) and not Path(path).expanduser().exists():
            allowed = "a local file or folder, a hub id, or an address"
            raise ConfigError(f"{key}={path} does not exist; give {allowed}")


def check_files(config: RunConfig) -> None:
    """Paths that the run will read, where they are local."""
    hidden, mode = config.hidden_states.path, get_object(config.mode["_target_"])
    reads_stored = mode.captures and hidden is not None and "capture" not in config.stages
    if reads_stored and not Path(hidden).is_dir():
        raise ConfigError(f"hidden_states.path={hidden} does not exist; give a folder, or capture")
    drafts = {"draft_path": config.draft_path, "draft.init_from": config.draft.init_from}
    for key, path in drafts.items():
        if path is not None:
            check_given(path, key)


def check_against_target(config: RunConfig) -> None:
    """What only the target's config can tell: layers, vocabulary, and what its engine can do."""
    model, spec = config.model, read_spec(config.model)
    target, ids = spec.config, model.aux_layer_ids
    check_supported(target)
    config = replace(config, draft=complete_section(config.draft, spec))
    last = spec.num_layers - 1
    if ids is not None and (not ids or sorted(set(ids) & {*range(last + 1)}) != ids):
        wanted = f"different layers of 0..{last}, low to high"
        raise ConfigError(f"model.aux_layer_ids={ids} must be {wanted}")
    if not set(config.stages) <= {"check", "benchmark"}:  # a draft that is there has its own shape
        check_draft_shape(config, target, len(spec.aux_layer_ids))
    # `check` says so where there is no tokenizer, and stored hidden states need none.
    without = {"import", "train", "export", "check"} if reads_store_alone(config) else {"check"}
    if set(config.stages) - without:
        load_chat(model, config.data)
    training = {"train"} if get_object(config.mode["_target_"]).needs_target else set()
    asking = {"generate", "capture", "regenerate"} | training
    decodes = get_object(config.benchmark["_target_"]).in_process
    asked = (asking | {"benchmark"} if decodes else asking) & set(config.stages)
    if config.plan or not asked:  # the engine itself may be missing where a plan is made
        return
    get_object(config.target["_target_"]).check_settings(config.target, spec)
    if "benchmark" in asked:
        check_croppable(target)


def check_draft_shape(config: RunConfig, target: PretrainedConfig, num_layers: int) -> None:
    """Whether a draft for this target can be as the config says."""
    for name in ("max_position_embeddings", "num_attention_heads"):
        if getattr(target, name, None) is None:
            reason = f"its config has no {name}, which a draft's is made from"
            raise ConfigError(f"a {target.model_type} target is not supported: {reason}")
    shape, (ulysses, _) = draft_config(config.draft, target, num_layers), layout(config)
    for key, value, name in (
        ("data.max_length", config.data.max_length, "max_position_embeddings"),
        ("draft.vocab_size", config.draft.vocab_size, "vocab_size"),
    ):
        limit = getattr(shape, name)
        if value > limit:
            raise ConfigError(f"{key}={value} must be at most the target's {name}={limit}")
    if shape.reads_mask_token and config.export.speculators:
        problem = f"export.speculators=true is a form of EAGLE3, not of draft={shape.method}"
        raise ConfigError(f"{problem}, which engines read as it is exported; set it to false")
    drafted, length = config.draft.ttt_steps, config.eval.draft_length
    if shape.reads_mask_token and length > drafted:
        problem = (
            f"eval.draft_length={length} is more than the {drafted} tokens that a block drafts"
        )
        raise ConfigError(f"{problem}; raise draft.block or lower eval.draft_length")
    if "benchmark" in config.stages and config.draft_path is None:
        asked, protocol = config.benchmark["configs"], config.benchmark["protocol"]
        check_shape([in_steps(each, protocol) for each in asked], shape)
    # Each rank of a ulysses group has all tokens of some heads.
    if shape.num_key_value_heads % ulysses or shape.num_attention_heads % ulysses:
        heads = f"{shape.num_key_value_heads} key/value heads; make parallel.ring larger"
        raise ConfigError(f"parallel.ulysses={ulysses} must divide the draft's {heads}")
