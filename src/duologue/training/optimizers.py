"""Muon for the matrices of hidden layers, with AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.AdamW):
    """Orthogonalizes the momentum of hidden matrices (Muon) and updates all other parameters by AdamW.

    The size of Muon's update matches AdamW's (arXiv 2502.16982), so both share one learning rate. Muon keeps one moment
    for each weight of a matrix where AdamW keeps two.

    Args:
        matrices: parameters of two dimensions, without embeddings and output layers; the first group.
        groups: groups of AdamW for the rest.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        groups: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__([{"params": list(matrices), "weight_decay": weight_decay}, *groups], lr=lr, betas=betas)
        self._muon = torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self._muon.state = self.state  # one state, so that checkpoints and averages see all of it

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all parameters and drops the gradients of the matrices.

        Raises:
            ValueError: a closure, which would compute the dropped gradients again.
        """
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        matrices = self.param_groups[0]
        self._muon.param_groups[0]["lr"] = matrices["lr"]
        self._muon.step()
        for parameter in matrices["params"]:
            parameter.grad = None
        super().step()
        return None
