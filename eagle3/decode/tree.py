"""Trees of drafted tokens, as EAGLE-2 (arXiv 2406.16858) and SGLang build them.

The root, the newest token, has `topk` children; at every further step the `topk` likeliest of the
nodes just drafted have `topk` children each. Likely is the product of the draft's probabilities on
the way from the root. After `steps` steps the likeliest `verify_tokens` - 1 of all drafted tokens
are verified, with the root. A chain is `topk` 1.

B sequences, K topk, F nodes of the frontier (1, then K), W verify_tokens, Vd draft vocabulary.
"""

from dataclasses import dataclass

import torch

from eagle3.errors import ConfigError


@dataclass
class Tree:
    """Tokens of one verification pass, parents before their children; node 0 is the root."""

    ids: torch.Tensor  # int64 [B,W] of the target's vocabulary
    depths: torch.Tensor  # int64 [B or 1,W]
    parents: torch.Tensor  # int64 [B or 1,W]; the root's is itself
    mask: torch.Tensor  # bool [B or 1,W,W]: each node's ancestors and itself
    logits: list[torch.Tensor] | None = None  # of a chain only: the draft's [B,Vd] of every step


def chain(ids: torch.Tensor, logits: list[torch.Tensor]) -> Tree:
    """The root and what was drafted behind it, int64 [B,W]."""
    node = torch.arange(ids.shape[1], device=ids.device)
    parents = (node - 1).clamp(min=0)
    return Tree(ids, node[None], parents[None], (node[:, None] >= node)[None], logits)


def check_tree(
    steps: int, topk: int, verify_tokens: int, draft_vocab_size: int = 1 << 62,
    most_drafts: int | None = None,
) -> None:  # fmt: skip
    """Raise ConfigError where a draft of that vocabulary, or of blocks, cannot draft such trees."""
    most = 1 + topk + (steps - 1) * topk**2
    if steps < 1 or not 1 <= topk <= draft_vocab_size:
        problem = f"steps must be at least 1, topk in 1..{draft_vocab_size} (the draft vocabulary)"
    elif most_drafts is not None and (topk > 1 or steps > most_drafts):
        problem = f"this draft drafts blocks: topk must be 1, steps in 1..{most_drafts}"
    elif topk == 1 and verify_tokens != steps + 1:
        problem = f"a chain (topk=1) verifies steps + 1 tokens; set verify_tokens={steps + 1}"
    elif not 2 <= verify_tokens <= most:
        problem = f"verify_tokens must be in 2..{most}, at most the root and all that is drafted"
    else:
        return
    raise ConfigError(f"steps={steps}, topk={topk}, verify_tokens={verify_tokens}: {problem}")


class Candidates:
    """All tokens drafted in a round, and the frontier: the nodes whose children come next."""

    def __init__(self, batch_size: int, topk: int, device: torch.device):
        self.topk, self.levels = topk, []
        # Of the frontier, at first the root (number 0): log-probability and number of each node.
        self.frontier_scores = torch.zeros(batch_size, 1, device=device)
        self.frontier = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.count = 1

    def extend(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `topk` children of every node of the frontier, given its logits [B,F,Vd]. Returns, of
        the next frontier, draft ids and places of the parents in this one, int64 [B,K] both.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores, ids = logits.log_softmax(-1, dtype=wide).topk(self.topk)  # [B,F,K]
        scores, ids = (self.frontier_scores[..., None] + scores).flatten(1), ids.flatten(1)
        self.levels.append((scores, ids, self.frontier.repeat_interleave(self.topk, dim=1)))
        self.frontier_scores, best = scores.topk(self.topk)
        self.frontier = self.count + best
        self.count += ids.shape[1]
        return ids.gather(1, best), best // self.topk

    def tree(self, newest: torch.Tensor, target_ids: torch.Tensor, verify_tokens: int) -> Tree:
        """The best candidates behind `newest` int64 [B]; `target_ids` [Vd] translates."""
        scores, ids, parents = (torch.cat(x, dim=1) for x in zip(*self.levels, strict=True))
        # Stable, so that of equals the earlier is kept: a parent before a child that is certain.
        ranking = scores.sort(dim=1, descending=True, stable=True).indices
        best = ranking[:, : verify_tokens - 1].sort(dim=1).values
        node = torch.arange(verify_tokens, device=best.device)
        node_of_candidate = best.new_zeros(len(best), self.count)  # candidate 0 is the root
        node_of_candidate.scatter_(1, best + 1, node[1:].expand_as(best))
        root = torch.zeros_like(newest[:, None])
        parents = torch.cat([root, node_of_candidate.gather(1, parents.gather(1, best))], dim=1)
        itself = (node[:, None] == node).expand(len(best), -1, -1)
        mask = itself
        for _ in self.levels:  # once more for each level: what my parent sees, I see
            mask = itself | mask.gather(1, parents[..., None].expand_as(itself))
        ids = torch.cat([newest[:, None], target_ids[ids.gather(1, best)]], dim=1)
        return Tree(ids, mask.sum(-1) - 1, parents, mask)
