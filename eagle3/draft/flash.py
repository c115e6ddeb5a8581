"""Flash backends of the causal part: CPU, the varlen kernel inside torch, and the flash-attn
package.

Shapes as in `draft/attention.py`: T packed tokens, N query rows, H query heads of size d.
"""

import torch

from eagle3.draft.attention import Backend, Dense


def scatter(values: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Put `values` [N, ...] at `rows` of zeros [length, ...]: flash kernels know no gathered rows.

    A row left at q = 0, lse = 0, grad = 0 adds nothing to any gradient.
    """
    return values.new_zeros(length, *values.shape[1:]).index_copy_(0, rows, values)


class FlashCPU:
    """The flash kernel that torch ships for CPUs (fp32, fp64, bf16), one call a document."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        q = scatter(q, rows, len(k))
        out, lse = (
            torch.empty_like(q),
            q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)),
        )
        start = 0
        for length in documents.lengths:
            span = slice(start, start + length)
            heads = [x[span].transpose(0, 1)[None] for x in (q, k, v)]
            o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, True, scale=scale
            )
            out[span], lse[span] = o[0].transpose(0, 1), m[0].transpose(0, 1)
            start += length
        return out[rows], lse[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        grad_out, q, out, lse = (scatter(x, rows, len(k)) for x in (grad_out, q, out, lse))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        start = 0
        for length in documents.lengths:
            span = slice(start, start + length)
            heads = [x[span].transpose(0, 1)[None] for x in (grad_out, q, k, v, out, lse)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads, 0.0, True, scale=scale
            )
            for grad, part in zip(grads, parts, strict=True):
                grad[span] = part[0].transpose(0, 1)
            start += length
        return grads[0][rows], grads[1], grads[2]


class FlashCUDA:
    """The varlen flash kernel inside torch (CUDA, fp16 and bf16, head size up to 256): nothing to
    install.
    """

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (
            (cu - first).clamp(min=0),
            rows - first,
        )  # the kernel aligns its causal mask bottom right
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            scatter(q, rows, len(k) - first),
            k,
            v,
            cu_q,
            cu,
            longest - first,
            longest,
            0.0,
            True,
            False,
            scale=scale,
        )
        return out[rows], lse.transpose(0, 1)[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        grad_out, q, out, lse = (scatter(x, rows, len(k) - first) for x in (grad_out, q, out, lse))
        lse = lse.transpose(0, 1).contiguous()
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu,
            longest - first,
            longest,
            0.0,
            True,
            unused,
            unused,
            scale=scale,
        )
        return grads[0][rows], grads[1], grads[2]


class FlashAttn:
    """The flash-attn package (2.8): the same kernel family, for those who built it for their card."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        out, lse, *_ = _flash_attn_varlen_forward(
            scatter(q, rows, len(k) - first),
            k,
            v,
            cu_q,
            cu,
            longest - first,
            longest,
            0.0,
            scale,
            causal=True,
        )
        return out[rows], lse.transpose(0, 1)[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        grad_out, q, out, lse = (scatter(x, rows, len(k) - first) for x in (grad_out, q, out, lse))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        lse = lse.transpose(0, 1).contiguous()
        longest = (longest - first, longest)
        _flash_attn_varlen_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            *grads,
            cu_q,
            cu,
            *longest,
            0.0,
            scale,
            True,
            -1,
            -1,
            0.0,
            None,
            False,
        )
        return grads[0][rows], grads[1], grads[2]


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
