"""Flash backends of the causal part: for CPUs, inside torch for CUDA, and the flash-attn package.

Shapes as in `draft/attention.py`: T packed tokens, N query rows, H query heads of size d.
"""

import functools
import importlib.util
from itertools import accumulate, pairwise, starmap

import torch
import torch.nn.attention

from eagle3.draft.attention import Backend, Dense, empty_outputs, scale_of
from eagle3.kernels.eager import scatter


class FlashCPU:
    """The flash kernel that torch ships for CPUs (fp32, fp64, bf16), one call a document: it takes
    no lengths and aligns its causal mask top left, so queries begin with the document.

    It takes a query's place from its position in q and knows no gathered rows, so q is scattered to
    full length, which is cheap beside the rest of a step (attention is less than 5 % of the work).
    A row left at q = 0, lse = 0, grad = 0 adds nothing to any gradient.
    """

    @staticmethod
    def forward(q, rows, k, v, documents):
        q = scatter(q, rows, len(k))
        out, lse = empty_outputs(q)
        for span in starmap(slice, pairwise(accumulate(documents.lengths, initial=0))):
            heads = [x[span].transpose(0, 1)[None] for x in (q, k, v)]  # [1,heads,length,d]
            part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, True, scale=scale_of(q)
            )
            out[span], lse[span] = part_out[0].transpose(0, 1), part_lse[0].transpose(0, 1)
        return out[rows], lse[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents):
        grad_out, q, out, lse = (scatter(x, rows, len(k)) for x in (grad_out, q, out, lse))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for span in starmap(slice, pairwise(accumulate(documents.lengths, initial=0))):
            heads = [x[span].transpose(0, 1)[None] for x in (grad_out, q, k, v, out, lse)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads, 0.0, True, scale=scale_of(q)
            )
            for grad, part in zip(grads, parts, strict=True):
                grad[span] = part[0].transpose(0, 1)
        return grads[0][rows], grads[1], grads[2]


class Varlen:
    """A backend over a varlen kernel: all documents in one call, each at its cumulative lengths.

    The kernel aligns its causal mask bottom right: the last query of a document sees all its keys.
    A document whose queries begin at some token needs no queries before that, so there are as many
    as `documents.queries` says. Where no row is in need among them, any query and gradient will
    do, if lse is infinite: the kernel then finds probabilities of zero.
    """

    @staticmethod
    def place(rows, documents):
        """Where rows lie among the queries, and which of the rows to take for each of those."""
        places = documents.queries.of_token[rows]
        numbers = torch.arange(len(rows), device=rows.device)
        row_of_place = numbers.new_zeros(sum(documents.queries.counts))
        return places, row_of_place.index_copy_(0, places, numbers)

    @staticmethod
    def spans(documents):
        """cu_seqlens of queries and keys, and the longest of each."""
        queries = documents.queries
        longest = max(queries.counts), max(documents.lengths)
        return queries.cu_seqlens, documents.cu_seqlens, *longest

    @classmethod
    def forward(cls, q, rows, k, v, documents):
        if not len(rows):
            return empty_outputs(q)
        places, row_of_place = cls.place(rows, documents)
        out, lse_HS = cls.kernel(q[row_of_place], k, v, cls.spans(documents))
        return out[places], lse_HS.transpose(0, 1)[places]

    @classmethod
    def backward(cls, grad_out, q, rows, k, v, out, lse, documents):
        if not len(rows):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        places, row_of_place = cls.place(rows, documents)
        lse_HS = lse.new_full((lse.shape[1], len(row_of_place)), float("inf"))
        lse_HS[:, places] = lse.transpose(0, 1)
        grad_out, q, out = (x[row_of_place] for x in (grad_out, q, out))
        spans = cls.spans(documents)
        grad_q, grad_k, grad_v = cls.kernel_backward(grad_out, q, k, v, out, lse_HS, spans)
        return grad_q[places], grad_k, grad_v


@functools.cache
def use_flash_attention_3() -> None:
    """Have torch's flash operators call the package, where it is installed and the GPU a Hopper."""
    installed = importlib.util.find_spec("flash_attn_interface") is not None
    if installed and torch.cuda.get_device_capability() == (9, 0):
        torch.nn.attention.activate_flash_attention_impl("FA3")


class FlashCUDA(Varlen):
    """The varlen flash kernel inside torch, or FlashAttention 3 where installed: CUDA, fp16 and
    bf16, head size up to 256.
    """

    @staticmethod
    def kernel(q, k, v, spans):
        use_flash_attention_3()
        forward = torch.ops.aten._flash_attention_forward
        return forward(q, k, v, *spans, 0.0, True, False, scale=scale_of(q))[:2]

    @staticmethod
    def kernel_backward(grad_out, q, k, v, out, lse, spans):
        # The state of a random generator, which only dropout reads.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, *spans, 0.0, True, unused, unused, scale=scale_of(q)
        )


class FlashAttn(Varlen):
    """The flash-attn package (2.8): the same kernels, for those who built it for their card."""

    @staticmethod
    def kernel(q, k, v, spans):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        return _flash_attn_varlen_forward(q, k, v, *spans, 0.0, scale_of(q), causal=True)[:2]

    @staticmethod
    def kernel_backward(grad_out, q, k, v, out, lse, spans):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = [torch.empty_like(x) for x in (q, k, v)]
        # Causal, no window (-1, -1), no soft cap, no ALiBi slopes, not deterministic.
        options = (True, -1, -1, 0.0, None, False)
        _flash_attn_varlen_backward(
            grad_out, q, k, v, out, lse, *grads, *spans, 0.0, scale_of(q), *options
        )
        return grads


class Auto:
    """The fastest of the above that runs on the tensors given."""

    @staticmethod
    def pick(q: torch.Tensor) -> type[Backend]:
        if q.device.type == "cpu":
            return FlashCPU
        half = q.dtype in (torch.float16, torch.bfloat16)
        return FlashCUDA if half and q.shape[-1] <= 256 and q.device.type == "cuda" else Dense

    @staticmethod
    def forward(q, *args):
        return Auto.pick(q).forward(q, *args)

    @staticmethod
    def backward(grad_out, q, *args):
        return Auto.pick(q).backward(grad_out, q, *args)
