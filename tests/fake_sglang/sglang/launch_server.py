"""Serves a transformers model as SGLang would: requests reordered, mixed in one pass, in parts,
with padding behind.

POST /fake sets how it behaves: {"chunk": tokens of a part, "silent": no hook, "skip": prefixes that
never come}.
"""

import argparse
import importlib
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
for name in ("--model-path", "--port", "--forward-hooks", "--dtype", "--speculative-algorithm"):
    parser.add_argument(name, required=True)
parser.add_argument("--return-aux-hidden-state-layer-ids", type=int, nargs="+")
parser.add_argument("--disable-radix-cache", action="store_true")
parser.add_argument("--enable-return-aux-hidden-states", action="store_true")
given = parser.parse_known_args()[0]
behaviour = {"chunk": 1 << 30, "silent": False, "skip": 0}
lock = threading.Lock()

model = AutoModelForCausalLM.from_pretrained(
    given.model_path, dtype=getattr(torch, given.dtype)
).eval()
decoder, head = model.get_decoder(), model.get_output_embeddings().weight
L, V = len(decoder.layers), len(head)
explicit = given.return_aux_hidden_state_layer_ids
inputs_of = sorted({2, L // 2, L - 3}) if explicit is None else [i + 1 for i in explicit]
hook_spec = json.loads(given.forward_hooks)[0]
module, _, factory = hook_spec["hook_factory"].partition(":")
hook = getattr(importlib.import_module(module), factory)(hook_spec["config"])
padded = torch.cat([head.detach(), torch.full_like(head[:3], 9.0)])  # rows that are no tokens
shard = SimpleNamespace(org_vocab_start_index=0, num_org_elements=V)
lm_head = SimpleNamespace(weight=padded, tp_size=1, shard_indices=shard)


@torch.no_grad()
def hidden_states(ids):
    output = decoder(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return [output.hidden_states[i][0] for i in inputs_of], output.last_hidden_state[0]


def prefill(prompts, rids):
    parts = []
    for prompt, rid in zip(prompts, rids):
        aux, last = hidden_states(prompt)
        chunk = behaviour["chunk"]
        cuts = [slice(at, at + chunk) for at in range(behaviour["skip"], len(prompt), chunk)]
        parts.append([(rid, cut.start, [a[cut] for a in aux], last[cut]) for cut in cuts])
    random.shuffle(parts)
    while parts:
        batch = [part.pop(0) for part in parts[:3]]
        parts = [part for part in parts if part]
        random.shuffle(parts)
        mode = SimpleNamespace(is_extend=lambda: True)
        forward = SimpleNamespace(
            forward_mode=mode,
            rids=[rid for rid, *_ in batch],
            extend_seq_lens_cpu=[len(last) for *_, last in batch],
            extend_prefix_lens_cpu=[at for _, at, *_ in batch],
        )
        aux = [
            torch.cat([*(a[i] for _, _, a, _ in batch), batch[0][3][:1]])
            for i in range(len(inputs_of))
        ]
        last = torch.cat([*(last for *_, last in batch), batch[0][3][:1]])
        if not behaviour["silent"]:
            assert hook(None, (None, last, lm_head, forward, aux), None) is None


def answer(prompt, sampling):
    if sampling["max_new_tokens"] == 0:
        return []
    stop = sampling.get("stop_token_ids") or None
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=sampling["max_new_tokens"],
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


class Handler(BaseHTTPRequestHandler):
    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/server_info":
            hooks = {
                "forward_hooks": json.loads(given.forward_hooks),
                "model_path": given.model_path,
            }
            self.reply(200, vars(given) | hooks)
        else:
            self.reply(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/fake":
            behaviour.update(body)
            return self.reply(200, behaviour)
        prompts = body["input_ids"]
        if any(token >= V for prompt in prompts for token in prompt):
            return self.reply(400, {"error": {"message": "a token is out of the vocabulary"}})
        with lock:
            prefill(prompts, body.get("rid") or ["health"] * len(prompts))
            meta = {"finish_reason": {"type": "length"}}
            answers = [
                {"output_ids": answer(prompt, body["sampling_params"]), "meta_info": meta}
                for prompt in prompts
            ]
        self.reply(200, answers)

    def log_message(self, *args):
        pass


print("the stand-in is ready", flush=True)
ThreadingHTTPServer(("127.0.0.1", int(given.port)), Handler).serve_forever()
