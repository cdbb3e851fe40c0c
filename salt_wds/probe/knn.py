"""k nearest neighbours: the class of a clip by the clips with the most similar features.

It needs no training. The vote is DINO's (arXiv 2104.14294, after arXiv 1805.01978).

Shapes: M clips of the bank, Q queries, D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_AT_ONCE = 1024  # queries, so that their similarities to a large bank fit into memory


def vote(
    bank_MD: Tensor, labels_M: Tensor, queries_QD: Tensor, classes: int, k: int, temperature: float  # noqa: N803
) -> Tensor:  # fmt: skip
    """Votes (Q, C) fp32 of each query's `k` nearest in the bank (all, if it has fewer).

    Nearest by cosine similarity s; each votes for its class with exp(s / temperature).
    """
    bank = F.normalize(bank_MD.float(), dim=1)
    votes = []
    for queries in F.normalize(queries_QD.float(), dim=1).split(_AT_ONCE):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        # exp(s / temperature) up to a factor common to a query: a small temperature would overflow it
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(queries), classes, device=bank.device).scatter_add(1, labels_M[nearest], weights))
    return torch.cat(votes)
