"""Trees of drafted tokens, as EAGLE-2 (arXiv 2406.16858) and SGLang build them.

The root, the newest token, has `topk` children; at every further step the `topk` likeliest of the
nodes just drafted have `topk` children each. Likely is the product of the draft's probabilities on
the way from the root. After `steps` steps the likeliest `verify_tokens` - 1 of all drafted tokens
are verified, with the root. A chain is `topk` 1.

B sequences, C candidates, K topk, F frontier nodes (1 at first, then K), W verify_tokens, Vd draft
vocabulary.
"""

from dataclasses import dataclass

import torch

from eagle3.errors import ConfigError


@dataclass
class Tree:
    """Tokens of one verification pass, parents before their children; number 0 is the root.

    `ids` int64 [B,W], target ids. `depths` int64 [B or 1,W]. A chain has `logits`, the draft's
    [B,Vd] of every step. A tree has `parents` int64 [B,W], the root's being 0, and `sees` bool
    [B,W,W], of each node its ancestors and itself.
    """

    ids: torch.Tensor
    depths: torch.Tensor
    logits: list[torch.Tensor] | None = None
    parents: torch.Tensor | None = None
    sees: torch.Tensor | None = None


def check_tree(steps: int, topk: int, verify_tokens: int, draft_vocab_size: int) -> None:
    """Raise ConfigError where such trees cannot be drafted."""
    config = f"steps={steps}, topk={topk}, verify_tokens={verify_tokens}"
    if steps < 1 or not 1 <= topk <= draft_vocab_size:
        raise ConfigError(
            f"{config}: steps must be at least 1, topk in 1..{draft_vocab_size} (the draft vocabulary)"
        )
    if topk == 1 and verify_tokens != steps + 1:
        raise ConfigError(
            f"{config}: a chain (topk=1) verifies steps + 1 tokens; set verify_tokens={steps + 1}"
        )
    most = 1 + topk + (steps - 1) * topk**2
    if not 2 <= verify_tokens <= most:
        raise ConfigError(
            f"{config}: verify_tokens must be in 2..{most}, at most the root and all that is drafted"
        )


class Candidates:
    """All tokens drafted in a round, and the frontier: the nodes whose children come next, at first
    the root.
    """

    def __init__(self, batch_size: int, topk: int, device: torch.device):
        self.topk, self.ids, self.scores, self.parents = topk, [], [], []
        self.reached = torch.zeros(
            batch_size, 1, device=device
        )  # log-probability of each node of the frontier
        self.numbers = torch.zeros(
            batch_size, 1, dtype=torch.long, device=device
        )  # 0 is the root's
        self.count = 1

    def extend(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `topk` children of every node of the frontier, given [B,F,Vd].

        Returns of the next frontier the draft's ids and the places of the parents in this one, both
        int64 [B,K].
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores, ids = logits.log_softmax(-1, dtype=wide).topk(self.topk)
        scores, ids = (self.reached[..., None] + scores).flatten(1), ids.flatten(1)
        self.ids.append(ids)
        self.scores.append(scores)
        self.parents.append(self.numbers.repeat_interleave(self.topk, dim=1))
        self.reached, best = scores.topk(self.topk)
        self.numbers = self.count + best
        self.count += ids.shape[1]
        return ids.gather(1, best), best // self.topk

    def tree(self, newest: torch.Tensor, target_ids: torch.Tensor, verify_tokens: int) -> Tree:
        """The best candidates behind `newest` int64 [B]; `target_ids` [Vd] translates."""
        scores = torch.cat(self.scores, dim=1)
        # stable, so that of equals the earlier is kept: a parent before a child that is certain
        best = (
            scores.sort(dim=1, descending=True, stable=True)
            .indices[:, : verify_tokens - 1]
            .sort(dim=1)
            .values
        )
        drafted, parents = (torch.cat(x, dim=1).gather(1, best) for x in (self.ids, self.parents))
        node = torch.arange(verify_tokens, device=best.device)
        places = best.new_zeros(len(best), self.count)  # of a candidate in the tree
        places.scatter_(1, best + 1, node[1:].expand_as(best))
        parents = torch.cat([torch.zeros_like(newest[:, None]), places.gather(1, parents)], dim=1)
        itself = (node[:, None] == node).expand(len(best), -1, -1)
        sees = itself
        for _ in self.scores:
            sees = itself | sees.gather(1, parents[..., None].expand_as(itself))
        ids = torch.cat([newest[:, None], target_ids[drafted]], dim=1)
        return Tree(ids, sees.sum(-1) - 1, parents=parents, sees=sees)
