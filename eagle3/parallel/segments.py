"""Attention of queries that are scattered over documents, against all of their documents' keys.

T packed tokens, S tokens with queries on this rank, N rows (a subset of the S, in any order), H
query and G key/value heads of size d.

Of a document at packed places 0..7, let this rank have the queries of tokens 0, 1, 6 and 7. These
are two segments: tokens 0 and 1 (`queries` 0:2) see `keys` 0:2, tokens 6 and 7 (`queries` 2:4) see
`keys` 0:8 and are `rows` 6 and 7 of those.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from eagle3.batch import Batch, DocumentSpans
from eagle3.draft.attention import Backend, empty_outputs
from eagle3.kernels.eager import scatter


class Segment(NamedTuple):
    """A run of neighbouring tokens of one document.

    `queries` are its places among the S tokens, `keys` the packed places from the document's start
    to the run's end, `rows` int64 [m] its places among those keys. `documents` tells a backend that
    queries begin behind the tokens before the run.
    """

    queries: slice
    keys: slice
    rows: torch.Tensor
    documents: DocumentSpans


@dataclass
class Segmented:
    """A backend (see `draft/attention.py`) that takes segments in the place of documents."""

    backend: Backend

    def forward(self, q, rows, k, v, segments: list[Segment]):
        """q [N,H,d] of `rows` [N] among the S tokens, k and v [T,G,d]; returns out and lse."""
        q_SHd = scatter(q, rows, sum(len(segment.rows) for segment in segments))
        out, lse = empty_outputs(q_SHd)
        for queries, keys, own_rows, documents in segments:
            given = q_SHd[queries], own_rows, k[keys], v[keys], documents
            out[queries], lse[queries] = self.backend.forward(*given)
        return out[rows], lse[rows]

    def backward(self, grad_out, q, rows, k, v, out, lse, segments: list[Segment]):
        length = sum(len(segment.rows) for segment in segments)
        grad_out, q, out, lse = (scatter(x, rows, length) for x in (grad_out, q, out, lse))
        grad_q = torch.empty_like(q)
        # A key is seen by every later segment of its document: bf16 would round at each addition.
        wide = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries, keys, own_rows, documents in segments:
            inputs = grad_out[queries], q[queries], own_rows, k[keys], v[keys]
            outputs = out[queries], lse[queries], documents
            grad_q[queries], own_k, own_v = self.backend.backward(*inputs, *outputs)
            grad_k[keys] += own_k
            grad_v[keys] += own_v
        return grad_q[rows], grad_k.to(k.dtype), grad_v.to(v.dtype)


def segments_of(tokens: torch.Tensor, batch: Batch) -> list[Segment]:
    """Cut sorted packed places `tokens` [S] into runs of neighbours within one document."""
    document_starts = tokens - batch.position_ids[tokens]
    begins = torch.ones(len(tokens), dtype=torch.bool)
    begins[1:] = (tokens.diff() != 1) | (document_starts.diff() != 0)
    segments = []
    for first, last in pairwise([*begins.nonzero()[:, 0].tolist(), len(tokens)]):
        start, end = int(document_starts[first]), int(tokens[last - 1]) + 1
        length = end - start
        rows = torch.arange(length - (last - first), length)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        documents = DocumentSpans(cu_seqlens, [length]).with_queries(torch.tensor([len(rows)]))
        segments.append(Segment(slice(first, last), slice(start, end), rows, documents))
    return segments
