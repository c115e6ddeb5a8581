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
from eagle3.export.folder import flatten, locate, named_layers, read_config

LENGTH = 3  # of the chain, where nothing says another: that of the published comparisons


@dataclass
class Served:
    """A draft and its target as engines are given them, folders absolute; `layers` are those it
    names, if any.

    `alone`: the draft's own config names this very target, in the speculators form.
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
    made_for = of_speculators(given) or given.get("made_for") or of_run(folder.resolve().parent)
    named = target or made_for.get("target")
    if not named:
        raise RunError(
            f"draft at {draft} does not say which target it was made for; set MODEL=<folder or hub id>"
        )
    if named.startswith(("/", ".", "~")) and not Path(named).expanduser().is_dir():
        raise RunError(
            f"the target {named} of draft {draft} is not there; set MODEL=<folder or hub id>"
        )
    length = draft_length or made_for.get("draft_length") or LENGTH
    is_speculators = "speculators_model_type" in given
    alone = (
        is_speculators
        and target in (None, made_for.get("target"))
        and length == made_for.get("draft_length")
    )
    return Served(
        absolute(draft),
        absolute(named),
        length,
        named_layers(flatten(given)),
        is_speculators,
        alone,
    )


def absolute(path: str) -> str:
    """A folder as an absolute path, a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def of_speculators(given: dict[str, Any]) -> dict[str, Any]:
    section = given.get("speculators_config") or {}
    method = (section.get("proposal_methods") or [{}])[0]
    target, length = (
        (section.get("verifier") or {}).get("name_or_path"),
        method.get("speculative_tokens"),
    )
    return {
        key: value for key, value in {"target": target, "draft_length": length}.items() if value
    }


def of_run(folder: Path) -> dict[str, Any]:
    """What the run that exported a draft was for; nothing where `folder` is no run."""
    try:
        config = json.loads((folder / "run.json").read_text())["config"]
        return {"target": config["model"]["path"], "draft_length": config["eval"]["draft_length"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def sglang(served: Served, port: int | None, more: list[str]) -> str:
    """A chain: topk 1, and one more token verified than drafted."""
    return lines(
        [program("sglang", "python"), "-m", "sglang.launch_server"],
        ["--model-path", served.target],
        ["--speculative-algorithm", "EAGLE3"],
        ["--speculative-draft-model-path", portable(served, "SGLang")],
        ["--speculative-num-steps", str(served.draft_length)],
        ["--speculative-eagle-topk", "1"],
        ["--speculative-num-draft-tokens", str(served.draft_length + 1)],
        ["--host", "127.0.0.1", "--port", str(port or 30000)],
        more,
    )


def vllm(served: Served, port: int | None, more: list[str]) -> str:
    """The speculators form is served alone: it names its target itself."""
    speculative = {
        "method": "eagle3",
        "model": served.draft,
        "num_speculative_tokens": served.draft_length,
    }
    return lines(
        [program("vllm", "vllm"), "serve", served.draft if served.alone else served.target],
        [] if served.alone else ["--speculative-config", json.dumps(speculative)],
        ["--host", "127.0.0.1", "--port", str(port or 8000)],
        more,
    )


def trtllm(served: Served, port: int | None, more: list[str]) -> str:
    """Its speculation is configured by a file; it does not read the layers from the draft."""
    speculative = {
        "decoding_type": "Eagle",
        "speculative_model_dir": portable(served, "TensorRT-LLM"),
        "max_draft_len": served.draft_length,
        **({"eagle3_layers_to_capture": served.layers} if served.layers else {}),
    }
    options = shlex.quote(json.dumps({"speculative_config": speculative}))
    return (
        f"options=$(mktemp) && echo {options} > $options && \\\n"
        + lines(
            ["trtllm-serve", served.target],
            ["--host", "127.0.0.1", "--port", str(port or 8000)],
            more,
        )
        + " \\\n  --extra_llm_api_options $options"
    )


ENGINES = {"sglang": sglang, "vllm": vllm, "trtllm": trtllm}


def portable(served: Served, engine: str) -> str:
    if served.is_speculators:
        raise RunError(
            f"{engine} does not read the speculators form of {served.draft}; serve the portable draft/"
        )
    return served.draft


def program(engine: str, name: str) -> str:
    """The engine's program in its own environment where launch/engines.sh has made one, else that
    on the PATH.
    """
    own = environment(engine) / "bin" / name
    return str(own) if own.exists() else name


def lines(*groups: list[str]) -> str:
    return " \\\n  ".join(shlex.join(group) for group in groups if group)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "launch/serve.sh", description="the command that serves a draft with its target"
    )
    parser.add_argument("draft", help="folder or hub id")
    parser.add_argument("engine", nargs="?", choices=ENGINES, default="sglang")
    parser.add_argument(
        "--target", default=os.environ.get("MODEL") or None, help="folder or hub id (or MODEL=)"
    )
    parser.add_argument("--draft-length", type=int, help="drafts a round")
    parser.add_argument("--port", type=int)
    own = arguments.index("--") if "--" in arguments else len(arguments)
    asked, more = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    if asked.draft_length is not None and asked.draft_length < 1:
        parser.error(f"--draft-length {asked.draft_length} must be at least 1")
    try:
        print(
            ENGINES[asked.engine](
                resolve(asked.draft, asked.target, asked.draft_length), asked.port, more
            )
        )
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
