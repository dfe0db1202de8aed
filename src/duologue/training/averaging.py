"""The moving average of the weights of a training.

At a high learning rate the weights walk around a minimum; their average lies closer to it (arXiv 1803.05407). The
average of a parameter is kept in the optimizer's state beside its moments, so checkpoints and sharding treat it alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FIELD = "average"


class WeightAverage:
    """Exponential moving averages of all trained parameters.

    Args:
        decay: share of the average that a step keeps; 0 averages nothing.
        start: share of the training after which the average begins, at the weights of that moment.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], decay: float, start: float) -> None:
        self._optimizers, self._decay, self._start = optimizers, decay, start

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Takes in the weights after a step at this share of the training."""
        if not self._decay or progress < self._start:
            return
        for parameter, state in self._states():
            if _FIELD not in state:
                state[_FIELD] = parameter.detach().clone()
            else:
                state[_FIELD].mul_(self._decay).add_(parameter.detach(), alpha=1.0 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold their averages, where these have begun."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, state in self._states():
            if _FIELD in state:
                kept = parameter.detach().clone()
                parameter.copy_(state[_FIELD])
                state[_FIELD].copy_(kept)

    def _states(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Parameters that have been trained. An optimizer makes their state in its first step and must find none."""
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if state := optimizer.state.get(parameter):
                        yield parameter, state
