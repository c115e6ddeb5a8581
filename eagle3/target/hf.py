"""A transformers model as the target: hidden states of packed documents, without patching it.

T packed tokens, U teacher rows, H the hidden size, D the embedding's width, V the vocabulary.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice
from typing import Annotated, Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig

from eagle3.batch import Batch, DocumentSpans, Features
from eagle3.config import OneOf, Within
from eagle3.errors import ConfigError, RunError, first_line
from eagle3.target import loading
from eagle3.target.fused import Fused, statistics
from eagle3.target.generation import Sampler, Take, Text, TextBatch, answer, answer_padded, similar
from eagle3.target.packed_attention import applied_windows, asked_windows
from eagle3.target.spec import TargetSpec, check_supported, end_token_ids

TAKE_MASKS = ("packed", "sdpa", "eager")  # flash kernels do not


class HFTarget:
    """`target(batch) -> Features`, and the pieces that decoding needs.

    `embedding` [V,D] and `head` [V,H] are the model's own tensors; `eos_token_ids` a set of ints.
    `batch_tokens`: the size of a prefill that stores hidden states. Raises ConfigError, RunError.
    """

    in_process = True  # it has `states`, which decoding needs

    def __init__(
        self, spec: TargetSpec, device: torch.device, attention: str = "auto",
        batch_tokens: Annotated[int, Within(1)] = 16384, tp_size: int = 1,
        kernels: Annotated[str, OneOf(("auto", "eager", "fused"))] = "auto",
    ):  # fmt: skip
        self.spec, self.config, self.device = spec, spec.config, device
        self.batch_tokens, self.aux_layer_ids = batch_tokens, spec.aux_layer_ids
        assert tp_size == 1, "check_settings says what to do instead"
        check_supported(self.config)
        ours = attention in ("auto", "packed")  # where it is proven
        # Penalties, banned words or top_p of its own would bend what the draft learns.
        options = {"dtype": spec.dtype, "generation_config": GenerationConfig()}
        options |= {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        options["attn_implementation"] = None if ours else attention  # None: transformers chooses
        if os.environ.get("RANK", "0") == "0" and not os.path.isdir(spec.path):
            # Fetching may take an hour, and libraries' bars are off (run.py).
            print(f"target: loads {spec.path}, fetching what the hub's cache lacks", flush=True)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(spec.path, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = first_line(error)
            raise RunError(f"the target at {spec.path} does not load: {reason}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.decoder, layers = loading.find_layers(self.model, spec.num_layers)
        parameters = inspect.signature(self.decoder.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        anything = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        self.takes = lambda name: anything or name in parameters
        self.embedding = self.model.get_input_embeddings().weight
        self.head = self.model.get_output_embeddings().weight
        self.eos_token_ids = end_token_ids(spec)
        # Hooks on a few layers: `output_hidden_states=True` would keep the outputs of all.
        self.captured: dict[int, torch.Tensor] = {}

        def capture(layer_id: int, module, inputs, output) -> None:
            self.captured[layer_id] = output[0] if isinstance(output, tuple | list) else output

        for layer_id in self.aux_layer_ids:
            layers[layer_id].register_forward_hook(partial(capture, layer_id))
        self.way, self.longest_together, self.unmasked = "alone", math.inf, None
        self.fused, self.statistics = nullcontext(), statistics
        self.check_outputs()
        self.choose_way(ours)
        if kernels == "fused" or (kernels == "auto" and device.type == "cuda"):
            self.fuse(kernels)

    @staticmethod
    def check_settings(section: dict[str, Any], spec: TargetSpec) -> None:
        """Raise ConfigError for what the section `target` asks for and this class cannot do."""
        if (size := section.get("tp_size", 1)) > 1:
            remedy = "target=hf cannot split it; use target=sglang"
            raise ConfigError(f"target.tp_size={size}: {remedy}")
        loading.check_loadable(spec)

    @torch.no_grad()
    def check_outputs(self) -> None:
        """Raise ConfigError where the logits are not last hidden states times the head, or what
        decoder layers put out is not hidden states.

        The teacher's distribution is computed as that product. A bias or a scale that no key of the
        config names would train the draft towards another model, and no loss would show it.
        """
        ids = torch.arange(3, device=self.device)
        output = self.model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        shape = (1, 3, self.head.shape[1])
        known = [states for states in output.hidden_states or () if states.shape == shape]
        for layer_id, found in self.captured.items():
            same = found.shape == shape
            # Of the last layer, transformers has what the final norm makes of it.
            if same and output.hidden_states and layer_id < self.spec.num_layers - 1:
                same = any(torch.allclose(found, states, equal_nan=True) for states in known)
            if not same:
                reason = f"layer {layer_id} puts out something else than its hidden states"
                raise ConfigError(f"{type(self.model).__name__} is not supported: {reason}")
        logits, product = output.logits[0].double(), self.lm_head(self.states(ids, ids)[1]).double()
        if (logits - product).norm() > 0.02 * logits.norm():  # bf16 rounds by 0.004
            raise ConfigError(f"{self.spec.path} changes its logits behind the head: not supported")

    @torch.no_grad()
    def choose_way(self, automatic: bool) -> None:
        """Whether documents share a pass: `packed` in one row, `padded` in rows of their own, or
        each `alone`: the first of these that gives two documents, in both orders, the states that
        each has alone under transformers' own attention.
        """
        config, generator = self.model.config, torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.embedding), (2, 24), generator=generator).to(self.device)
        self.probe_ids = ids
        pair, own = (ids[0], ids[1, :20]), config._attn_implementation

        def both_orders() -> torch.Tensor:
            return torch.cat([self.probe(pair), self.probe(pair[::-1])])

        right = both_orders()
        # What other shapes of a batch make of the same text: rounding, and with it routing.
        noise = gap(self.probe([ids[0, :20]]), right[:20])
        rounding = max(1e-3, 4 * torch.finfo(right.dtype).eps)
        if noise > 4 * rounding:
            raise ConfigError(f"{type(self.model).__name__} sees later tokens: it is not causal")
        self.tolerance = max(rounding, 4 * noise)
        applied_windows.clear()
        for self.way in ("packed", "padded", "alone"):
            config._attn_implementation = "packed" if automatic and self.way == "packed" else own
            asked_windows.clear()
            close = attempt(lambda: gap(both_orders(), right)) <= self.tolerance
            if close and not asked_windows - applied_windows - {None, 0}:
                break
        self.unmasked = "documents" if config._attn_implementation == "packed" else None
        self.longest_together = loading.rope_limit(self.config)

    @torch.no_grad()
    def fuse(self, kernels: str) -> None:
        """Let packed documents go through fused kernels, if these give the states that the model's
        own code gives; else say why not, or raise ConfigError where nothing else is wanted.
        """
        pair = self.probe_ids[0], self.probe_ids[1, :20]
        right = self.probe(pair)
        try:
            self.fused = Fused(self.model)
            error = gap(self.probe(pair), right)
            # Compiled for as many rows as a chunk may have: few would be cut into parts.
            self.fused.statistics(self.lm_head(right[:1, -1].to(self.head).expand(512, -1)))
        except torch.OutOfMemoryError:  # says nothing of the model
            raise
        except Exception as failure:  # of whatever compiles
            reason = first_line(failure)
        else:
            if error <= self.tolerance:
                self.statistics = self.fused.statistics
                return
            reason = f"the states differ by {error:.2g}"
        self.fused = nullcontext()
        if kernels == "fused":
            remedy = "set target.kernels=eager"
            raise ConfigError(f"target.kernels=fused does not work here ({reason}); {remedy}")
        print(f"target: without fused kernels: {reason}")

    def probe(self, documents: Sequence[torch.Tensor]) -> torch.Tensor:
        """int64 [n] each -> [T,L+1,H]: the L layers' and the last hidden states, as batches get."""
        lengths = torch.tensor([len(document) for document in documents])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(self.device)
        places = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        spans = DocumentSpans(cu_seqlens, lengths.tolist())
        return self.by_layer(self.document_states(torch.cat(documents), places, spans))

    def by_layer(self, states: tuple) -> torch.Tensor:
        """What `states` returns -> [..,L+1,H]."""
        return torch.cat(states, dim=-1).unflatten(-1, (-1, self.head.shape[1]))

    @cached_property
    def pads_left(self) -> bool:
        """Whether `generate_padded` gives two texts the logits that each has alone."""
        texts = [self.probe_ids[0].tolist(), self.probe_ids[1, :20].tolist()]
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

        def logits(*prompts: list[int]) -> torch.Tensor:
            return self.generate_padded(prompts, **options).logits[0]

        def padding() -> float:
            return gap(logits(*texts), torch.cat([logits(text) for text in texts]))

        return attempt(padding) <= self.tolerance

    @cached_property
    def keeps_rows(self) -> bool:
        """Whether a RowsCache continues two texts of different lengths as each goes on alone, by
        tokens at other slots than their positions, as the nodes of a tree are.
        """
        ids, starts = self.probe_ids, self.probe_ids.new_tensor([[20], [16]])
        rows, slots = (torch.arange(count, device=self.device) for count in (2, 28))
        positions = starts + slots[:4]
        places = (positions + 4)[..., None]
        whole = ids[0], ids[1, :20]
        right = torch.stack([self.probe([text])[-4:] for text in whole])
        visible = (slots < starts[..., None]) | ((slots >= places[:, :1]) & (slots <= places))

        def continued() -> float:
            batch = TextBatch(self, 2, Sampler(None))
            batch.add([Text(None, text[:-4].tolist()) for text in whole])
            batch.cache.begin(rows, places[..., 0], len(slots), prefill=False)
            ahead = ids.gather(1, positions)
            found = self.states(ahead, positions, batch.cache, visible=visible)
            return gap(self.by_layer(found), right)

        # Two passes round here, and one where the tolerance comes from.
        return attempt(continued) <= 2 * self.tolerance

    def check_decoding(self) -> None:
        """Raise ConfigError where texts of different lengths cannot be decoded side by side."""
        loading.check_croppable(self.config)
        # Of other attentions `additive_mask` says what they can decode.
        if self.decoder.config._attn_implementation in TAKE_MASKS and not self.keeps_rows:
            sentence = f"{type(self.model).__name__} cannot be decoded in this process"
            reason = "it ignores what it is told of who sees whom, or where its cache is"
            raise ConfigError(f"{sentence} ({reason}); set another benchmark")

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n,H] -> logits [n,V]."""
        return hidden @ self.head.T

    @torch.no_grad()
    def states(self, input_ids, position_ids, cache=None, documents=None, visible=None) -> tuple:
        """int64 [T] or [B,T] -> aux_hidden_states [..,T,A] and, after the final norm,
        last_hidden_states [..,T,H].

        With `documents` the T tokens are packed documents; with `cache` they continue it. Each
        token sees all before it, or what `visible` bool [B,T,S] says of a RowsCache's S slots.
        """
        rows = input_ids.reshape(-1, input_ids.shape[-1])
        mask = None if visible is None else self.additive_mask(visible, position_ids, cache)
        options = {"attention_mask": mask, "position_ids": position_ids.reshape(rows.shape)}
        options |= {self.cache_name: cache, "use_cache": cache is not None, "documents": documents}
        options = {name: value for name, value in options.items() if self.takes(name)}
        output = self.decoder(input_ids=rows, **options)
        aux = torch.cat([self.captured[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self.captured.clear()  # or they would live until the next pass
        last = output.last_hidden_state
        return aux.reshape(*input_ids.shape, -1), last.reshape(*input_ids.shape, -1)

    def additive_mask(self, visible: torch.Tensor, position_ids, cache: Any) -> Any:
        """`visible` as transformers takes it ready-made: [B,1,T,S], 0 where a token is seen; by
        kind of layer where some have a window or chunks. Raises ConfigError where the attention
        ignores such masks.
        """
        attention = self.decoder.config._attn_implementation
        if attention not in TAKE_MASKS:
            remedy = "decodes only chains at batch 1; set it to eager"
            raise ConfigError(f"target.attention={attention} {remedy}")

        def additive(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self.embedding.dtype, device=seen.device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]

        # Windows and chunks count positions, not slots: the nodes of a tree share positions.
        slots = torch.arange(cache.slots, device=visible.device).expand(len(visible), -1)
        places = slots.scatter(1, cache.places, position_ids)[:, None]
        positions, masks = position_ids[..., None], {"full_attention": additive(visible)}
        if window := getattr(self.config, "sliding_window", None):
            masks["sliding_attention"] = additive(visible & (positions - places < window))
        if chunk := getattr(self.config, "attention_chunk_size", None):
            same = positions // chunk == places // chunk
            masks["chunked_attention"] = additive(visible & same)
        by_kind = len(masks) > 1 and getattr(self.config, "layer_types", None)
        return masks if by_kind else [*masks.values()][-1]

    def generate(self, prompts: list, max_new_tokens: int, sampling: dict | None = None) -> list:
        """Answers to prompts, lists of ids both, as `answer` gives them."""
        waiting = iter(enumerate(prompts))
        answers = self.answer(lambda: next(waiting, None), len(prompts), max_new_tokens, sampling)
        return [answer for _, answer in sorted(answers)]

    @torch.inference_mode()
    def answer(
        self, take: Take, batch_size: int, max_new_tokens: int, sampling: dict | None = None,
        count: Callable[[int], Any] = int,
    ) -> Iterator[tuple[Any, list[int]]]:  # fmt: skip
        """(key, answer ids) as answers end, with the end-of-turn token where it was generated.

        `take` gives a (key, prompt ids) while there is room for one, or None while none waits; it
        is asked again after each answer. `sampling` has temperature, top_p, top_k (0: all tokens)
        and seed; None is greedy. `count` hears of the tokens of each pass.
        """
        sampler, context = Sampler(sampling), loading.context_length(self.config)

        def take_text() -> Text | None:
            if (taken := take()) is None:
                return None
            key, prompt = taken
            most = max(1, min(max_new_tokens, context - len(prompt)))
            return Text(key, prompt, most, self.eos_token_ids)

        if self.keeps_rows:
            # Where RoPE changes with the longest text of a pass, each text has a pass of its own.
            size = batch_size if self.longest_together == math.inf else 1
            for text in answer(TextBatch(self, size, sampler), take_text, count):
                yield text.key, text.ids
            return
        size = batch_size if self.pads_left else 1
        while texts := list(islice(iter(take_text, None), size)):
            answer_padded(self, texts, sampler, count)
            yield from ((text.key, text.ids) for text in texts)

    def generate_padded(self, prompts: Sequence, **options: Any) -> Any:
        """transformers' `generate`, of prompts that are padded on the left: all end together."""
        width, pad = max(map(len, prompts)), min(self.eos_token_ids, default=0)
        padded = [[pad] * (width - len(p)) + p for p in prompts]
        attended = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = torch.tensor([padded, attended], device=self.device)
        return self.model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)

    def document_states(self, ids, places, documents: DocumentSpans) -> tuple:
        """`states` of packed documents, int64 [T] ids and positions."""
        together = max(documents.lengths) <= self.longest_together
        if self.way == "packed" and together:
            config, name = self.model.config, self.model.config._attn_implementation
            # Asked for masks, transformers would wait for the device to see where documents begin.
            config._attn_implementation = self.unmasked or name
            try:
                with self.fused:  # decoding is bound by the host, which kernels do not help
                    return self.states(ids, places, documents=documents)
            finally:
                config._attn_implementation = name
        texts, found = ids.split(documents.lengths), {}
        left = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        while left:
            count = 1
            if self.way == "padded" and together:
                # What pads a row stands behind its text, so that nothing of it sees that.
                count = similar([len(texts[i]) for i in left])
            rows = pad_sequence([texts[i] for i in left[:count]], batch_first=True)
            columns = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
            for i, *states in zip(left, *self.states(rows, columns)):
                found[i] = [each[: len(texts[i])] for each in states]
            left = left[count:]
        return tuple(torch.cat([found[i][part] for i in sorted(found)]) for part in (0, 1))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        aux, last = self.document_states(batch.input_ids, batch.position_ids, batch.documents)
        last = last[batch.teacher_rows]
        return Features(aux, last, *head_statistics(last, self.head, self.statistics))


def gap(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference of states [..,H], each relative to what is right."""
    found, right = (states.float().nan_to_num(torch.inf) for states in (found, right))
    # What is right may be zero, or not finite itself: then there is nothing to compare.
    return float(((found - right).norm(dim=-1) / right.norm(dim=-1)).nan_to_num(0).max())


def attempt(compute: Callable[[], float]) -> float:
    """A gap; infinite where the model cannot do it, such as without its own masks."""
    try:
        return compute()
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except Exception:
        return math.inf


def head_statistics(
    last: torch.Tensor, head: torch.Tensor, compute: Callable = statistics,
    chunk_bytes: int = 1 << 28,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """argmax int64 [U] and logsumexp [U] (at least fp32) of last @ head.T, in chunks of rows."""
    # All logits at once would be 8 GB for 16,384 rows of a vocabulary of 128k.
    parts = last.split(max(1, chunk_bytes // (4 * len(head))))
    argmax, logsumexp = zip(*(compute(rows @ head.T) for rows in parts), strict=True)
    return torch.cat(argmax), torch.cat(logsumexp)
