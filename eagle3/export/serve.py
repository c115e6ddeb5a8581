"""`python -m eagle3.export.serve DRAFT [ENGINE]`: the command that serves a draft, as shell text.

The target and the draft length are those that the draft's config.json names, unless given. Flags
are those of SGLang 0.5.23, vLLM 0.32 and TensorRT-LLM 1.0 and later.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from eagle3.engines.sglang import SGLang
from eagle3.engines.vllm import VLLM
from eagle3.errors import RunError
from eagle3.export.read import absolute, kind_of, locate, named_layers, read_config, read_shape

LENGTH = 3  # drafts a round, where nothing says another: that of the published comparisons
ENGINES = {"sglang": SGLang(), "vllm": VLLM()}


def serve_text(
    engine: str, draft: str, target: str | None, length: int | None, port: int | None, more: list
) -> str:
    """The command of `sglang`, `vllm` or `trtllm`; `more` goes to it as it is. Raises RunError.

    A block drafter drafts its whole block unless `length` is less.
    """
    place = locate(draft, "DRAFT")
    config = read_config(place)
    kind = kind_of(config)
    alone, made_for = "speculators_model_type" in config, config.get("made_for") or {}
    if alone and not (engine in ENGINES and ENGINES[engine].reads_speculators):
        raise RunError(f"{engine} does not read the speculators form of {draft}; serve draft/")
    named = target or made_for.get("target")
    if not named or named.startswith("-"):  # which the engine would take for one of its options
        raise RunError(f"draft at {draft} does not name its target; set MODEL=<folder or hub id>")
    if named.startswith(("/", ".", "~")) and not Path(named).expanduser().is_dir():
        raise RunError(f"target {named} of draft {draft} is not there; set MODEL=<folder or id>")
    if kind.reads_mask_token:
        most = read_shape(place, config).most_drafts
        if (length := length or most) > most:
            raise RunError(f"draft at {draft} drafts at most {most} tokens a round, not {length}")
        if engine not in ENGINES:
            raise RunError(f"TensorRT-LLM serves no {kind.title} draft; take sglang or vllm")
    length = length or made_for.get("draft_length") or LENGTH
    # Absolute, so that the printed command can be used anywhere.
    model, folder = absolute(named), absolute(draft)
    address = ["--host", "127.0.0.1", *(["--port", str(port)] if port else [])]
    if engine != "trtllm":
        # A draft of the speculators form names target and length itself.
        if alone and made_for == {"target": named, "draft_length": length}:
            model, folder = folder, None
        command = ENGINES[engine].serve_command(model, folder, kind.method, length)
        return join([*command, address, more])
    # TensorRT-LLM reads its speculation from a file, and no layers from the draft.
    method = {"decoding_type": "Eagle", "speculative_model_dir": folder, "max_draft_len": length}
    layers = named_layers(config)
    if layers:
        method["eagle3_layers_to_capture"] = layers
    options = shlex.quote(json.dumps({"speculative_config": method}))
    command = join([["trtllm-serve", model], address, more])
    flag = "--extra_llm_api_options $options"
    return f"options=$(mktemp) && echo {options} > $options && \\\n{command} \\\n  {flag}"


def join(groups: list[list[str]]) -> str:
    return " \\\n  ".join(shlex.join(group) for group in groups if group)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("launch/serve.sh", description=__doc__)
    parser.add_argument("draft", help="folder or hub id")
    parser.add_argument("engine", nargs="?", choices=[*ENGINES, "trtllm"], default="sglang")
    model = os.environ.get("MODEL") or None
    parser.add_argument("--target", default=model, help="folder or hub id (or MODEL=)")
    parser.add_argument("--draft-length", type=int, choices=range(1, 17), metavar="N")
    parser.add_argument("--port", type=int)
    parser.add_argument("--run", action="store_true", help="run it, too")
    # What follows -- is the engine's: its options may bear the names of ours.
    own = arguments.index("--") if "--" in arguments else len(arguments)
    asked, more = parser.parse_args(arguments[:own]), arguments[own + 1 :]
    length, port = asked.draft_length, asked.port
    try:
        text = serve_text(asked.engine, asked.draft, asked.target, length, port, more)
    except RunError as error:
        sys.exit(f"error: {error}")
    print(text, flush=True)
    if asked.run:
        os.execvp("bash", ["bash", "-c", text])  # the server takes this process's place


if __name__ == "__main__":
    main(sys.argv[1:])
