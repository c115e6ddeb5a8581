"""`python -m eagle3.export.serve DRAFT [ENGINE]`: the command that serves a draft with its target,
as shell text.

The target and the draft length are what the draft's config.json says it was made for, else what the
run that trained it says (run.json beside the folder); both can be given. Flags are those of SGLang
0.5.23, vLLM 0.32 and TensorRT-LLM 1.0 and later.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3.engines.server import environment
from eagle3.errors import RunError
from eagle3.export.read import flatten, locate, named_layers, read_config

LENGTH = 3  # of the chain, where nothing says another: that of the published comparisons


@dataclass
class Served:
    """A draft and its target as engines are given them, folders absolute; `layers` are those it
    names, if any.

    `alone`: the draft's own config names this very target and length, in the speculators form.
    """

    draft: str
    target: str
    draft_length: int
    layers: list[int] | None
    is_speculators: bool
    alone: bool


def resolve(draft: str, target: str | None, draft_length: int | None) -> Served:
    """Raises RunError where there is no draft, or nothing names its target."""
    folder = locate(draft, "DRAFT")
    given = read_config(folder)
    is_speculators = "speculators_model_type" in given
    made_for = verifier_of(given) or given.get("made_for") or run_of(folder.resolve().parent)
    named = target or made_for.get("target")
    remedy = "set MODEL=<folder or hub id>"
    if not named:
        raise RunError(f"draft at {draft} does not say which target it was made for; {remedy}")
    if named.startswith(("/", ".", "~")) and not Path(named).expanduser().is_dir():
        raise RunError(f"the target {named} of draft {draft} is not there; {remedy}")
    length = draft_length or made_for.get("draft_length") or LENGTH
    own = (made_for.get("target"), made_for.get("draft_length"))
    return Served(
        draft=absolute(draft),
        target=absolute(named),
        draft_length=length,
        layers=named_layers(flatten(given)),
        is_speculators=is_speculators,
        alone=is_speculators and (named, length) == own,
    )


def absolute(path: str) -> str:
    """A folder as an absolute path, a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def verifier_of(given: dict[str, Any]) -> dict[str, Any]:
    """What a draft in the speculators form was made for; nothing for any other."""
    section = given.get("speculators_config") or {}
    [method, *_] = section.get("proposal_methods") or [{}]
    target = (section.get("verifier") or {}).get("name_or_path")
    known = {"target": target, "draft_length": method.get("speculative_tokens")}
    return {key: value for key, value in known.items() if value}


def run_of(folder: Path) -> dict[str, Any]:
    """What the run that exported a draft was for; nothing where `folder` is no run."""
    try:
        config = json.loads((folder / "run.json").read_text())["config"]
        return {"target": config["model"]["path"], "draft_length": config["eval"]["draft_length"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sglang(
    target: str, draft: str | None, draft_length: int, port: int | None, more: list[str]
) -> list[list[str]]:
    """A chain: topk 1, and one more token verified than drafted."""
    return [
        [program("sglang", "python"), "-m", "sglang.launch_server"],
        ["--model-path", target],
        ["--speculative-algorithm", "EAGLE3"],
        ["--speculative-draft-model-path", draft],
        ["--speculative-num-steps", str(draft_length)],
        ["--speculative-eagle-topk", "1"],
        ["--speculative-num-draft-tokens", str(draft_length + 1)],
        ["--host", "127.0.0.1", "--port", str(port or 30000)],
        more,
    ]


def vllm(
    target: str, draft: str | None, draft_length: int, port: int | None, more: list[str]
) -> list[list[str]]:
    """`draft` None: the speculators form is served alone, it names its target itself."""
    method = {"method": "eagle3", "model": draft, "num_speculative_tokens": draft_length}
    return [
        [program("vllm", "vllm"), "serve", target],
        ["--speculative-config", json.dumps(method)] if draft else [],
        ["--host", "127.0.0.1", "--port", str(port or 8000)],
        more,
    ]


COMMANDS = {"sglang": sglang, "vllm": vllm}


def serve_text(engine: str, served: Served, port: int | None, more: list[str]) -> str:
    """The command of `sglang`, `vllm` or `trtllm`; `more` goes to it as it is. Raises RunError for
    a draft in a form that the engine does not read.
    """
    if served.is_speculators and engine != "vllm":
        reason = "does not read the speculators form; serve the portable draft/, not"
        raise RunError(f"{engine} {reason} {served.draft}")
    if engine != "trtllm":
        target, draft = (served.draft, None) if served.alone else (served.target, served.draft)
        return lines(COMMANDS[engine](target, draft, served.draft_length, port, more))
    # TensorRT-LLM reads its speculation from a file, and does not read the layers from the draft.
    method = {"decoding_type": "Eagle", "speculative_model_dir": served.draft}
    method["max_draft_len"] = served.draft_length
    if served.layers:
        method["eagle3_layers_to_capture"] = served.layers
    options = shlex.quote(json.dumps({"speculative_config": method}))
    address = ["--host", "127.0.0.1", "--port", str(port or 8000)]
    text = lines([["trtllm-serve", served.target], address, more])
    return (
        f"options=$(mktemp) && echo {options} > $options && \\\n{text} \\\n"
        "  --extra_llm_api_options $options"
    )


def lines(groups: list[list[str]]) -> str:
    """Shell text, an option and its value to a line."""
    return " \\\n  ".join(shlex.join(group) for group in groups if group)


def program(engine: str, name: str) -> str:
    """The engine's program in its own environment where launch/engines.sh has made one, else that
    on the PATH.
    """
    own = environment(engine) / "bin" / name
    return str(own) if own.exists() else name


def main(arguments: list[str]) -> None:
    described = "the command that serves a draft with its target"
    parser = argparse.ArgumentParser("launch/serve.sh", description=described)
    parser.add_argument("draft", help="folder or hub id")
    parser.add_argument("engine", nargs="?", choices=[*COMMANDS, "trtllm"], default="sglang")
    model = os.environ.get("MODEL") or None
    parser.add_argument("--target", default=model, help="folder or hub id (or MODEL=)")
    parser.add_argument("--draft-length", type=int, help="drafts a round")
    parser.add_argument("--port", type=int)
    own = arguments.index("--") if "--" in arguments else len(arguments)
    asked, more = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    if asked.draft_length is not None and asked.draft_length < 1:
        parser.error(f"--draft-length {asked.draft_length} must be at least 1")
    try:
        served = resolve(asked.draft, asked.target, asked.draft_length)
        print(serve_text(asked.engine, served, asked.port, more))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
