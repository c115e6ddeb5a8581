"""Stands in for an interpreter that has SGLang and vLLM: their servers count upwards, and every
round of a prompt accepts as many drafts as its first token says.
"""

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser(allow_abbrev=False)
FLAGS = {
    str: "host dtype model-path random-seed max-running-requests mem-fraction-static model seed "
    "max-num-seqs per-request-spec-decode-metrics gpu-memory-utilization speculative-algorithm "
    "speculative-draft-model-path tensor-parallel-size tp-size",
    int: "speculative-num-steps speculative-eagle-topk speculative-num-draft-tokens port "
    "speculative-dspark-block-size",
}
SWITCHES = "enable-metrics enable-per-request-metrics die-at-start die-at-request refuse "
SWITCHES += "disable-radix-cache no-enable-prefix-caching "
SWITCHES += "speculative-use-rejection-sampling"
for kind, names in FLAGS.items():
    for name in names.split():
        parser.add_argument(f"--{name}", type=kind)
for name in SWITCHES.split():
    parser.add_argument(f"--{name}", action="store_true")
parser.add_argument("--speculative-config", type=json.loads, default={})

under_way, most = 0, 0


def answer(prompt, wanted, steps):
    """New ids and the drafts accepted by every round."""
    ids = [(prompt[-1] + 1 + i) % 40 for i in range(wanted)]
    accepted = []
    while steps and sum(accepted) + len(accepted) < wanted - 1:
        accepted.append(min(prompt[0], steps))
    return ids, accepted


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, payload, status=200):
        payload = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        steps = options.speculative_config.get("num_speculative_tokens", 0)
        names = ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")
        count = (
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{}"}} 0.0\n'
        )
        replies = {"/health": "", "/most": [most]}
        replies["/server_info"] = {
            f"speculative_{name}": getattr(options, f"speculative_{name}") for name in names
        }
        lines = "".join(count.format(position) for position in range(steps))
        replies["/metrics"] = "vllm:num_requests_running 0.0\n" + lines
        self.reply(replies[self.path])

    def do_POST(self):
        global under_way, most
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if options.die_at_request:
            print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
            os._exit(1)
        if options.refuse:
            return self.reply({"error": "the prompt is too long"}, 400)
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.05)
        self.reply(sglang(body) if self.path == "/generate" else vllm(body))
        under_way -= 1


def sglang(body):
    steps = options.speculative_num_steps or (options.speculative_num_draft_tokens or 1) - 1
    ids, accepted = answer(body["input_ids"], body["sampling_params"]["max_new_tokens"], steps)
    meta = {"finish_reason": {"type": "length"}}
    if options.enable_metrics:
        meta["decode_throughput"] = 100.0 * (1 + steps)
    if steps:
        histogram = [accepted.count(count) for count in range(max(accepted, default=-1) + 1)]
        meta |= {"spec_verify_ct": len(accepted), "spec_correct_drafts_histogram": histogram}
    return {"text": " ".join(map(str, ids)), "output_ids": ids, "meta_info": meta}


def vllm(body):
    steps = options.speculative_config.get("num_speculative_tokens", 0)
    ids, accepted = answer(body["prompt"], body["max_tokens"], steps)
    metrics = {"generation_time_ms": 1000 * (len(ids) - 1) / (100 * (1 + steps))}
    if options.per_request_spec_decode_metrics == "detailed":
        rounds = {"num_spec_steps": len(accepted), "per_step_accepted": accepted}
        metrics["speculative_decoding"] = rounds
    choice = {"text": " ".join(map(str, ids)), "token_ids": ids, "finish_reason": "length"}
    return {"choices": [choice], "metrics": metrics}


if sys.argv[1] == "-c":
    versions = {"'sglang'": "0.5.23", "'vllm'": "0.32.0"}
    print(*[version for name, version in versions.items() if name in sys.argv[2]])
    sys.exit()
module = sys.argv[2]
assert module in ("sglang.launch_server", "vllm.entrypoints.openai.api_server")
options = parser.parse_args(sys.argv[3:])
print("started with", *sys.argv[3:], flush=True)
if options.die_at_start:
    sys.exit("ValueError: Model architectures ['TinyForCausalLM'] are not supported for now.")
ThreadingHTTPServer.daemon_threads = True
threading.stack_size(1 << 18)
ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
