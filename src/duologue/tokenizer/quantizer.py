"""Vector quantizer with an EMA codebook (arXiv:2412.02612)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from duologue.layers import Padded


@dataclass(frozen=True)
class QuantizerConfig:
    """Settings of the quantizer.

    Attributes:
        ema_decay: of the codebook's counts and sums (released: 0.99).
        restart_threshold: a code with a lower EMA count per step is replaced by a vector of the batch.
        normalize: standardizes vectors per channel and normalizes each before the search. Off in the released format.
            Without it a few large channels of Whisper dominate.
    """

    codebook_size: int = 2048
    ema_decay: float = 0.99
    restart_threshold: float = 0.05
    normalize: bool = False


@dataclass(frozen=True)
class Quantized:
    """The result of quantization.

    Attributes:
        codes: (B, T) int64 with row lengths.
        values: (B, T, D) code vectors with a straight-through gradient.
        commitment_loss: scalar, mean squared distance of valid inputs to their codes.
        margin: (B, T) second-best minus best squared distance.
    """

    codes: Padded
    values: Tensor
    commitment_loss: Tensor
    margin: Tensor


class Quantizer(nn.Module):
    """Nearest code by L2 distance, the lowest index on ties (docs/checkpoints.md 1.2, step 6)."""

    ema_count: Tensor
    ema_weight: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: QuantizerConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, width)
        self.codebook.weight.requires_grad_(False)
        self.register_buffer("ema_count", torch.zeros(config.codebook_size))
        self.register_buffer("ema_weight", self.codebook.weight.detach().clone())
        if config.normalize:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("std", torch.ones(width))
        self._norms_cache: tuple[Tensor, int, int, Tensor] | None = None

    def normalized(self, x: Tensor) -> Tensor:
        """Returns the vectors (..., D) float32 that are compared with the codes."""
        if not self.config.normalize:
            return x
        return functional.layer_norm((x - self.mean) / self.std, x.shape[-1:])

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def codes(self, x: Padded) -> Padded:
        """Returns the codes of (B, T, D), always computed in float32."""
        scores = _scores(self.normalized(x.values.float()), self.codebook.weight.float(), self._code_norms())
        return Padded(scores.argmin(1).unflatten(0, x.values.shape[:2]), x.lengths)

    def _code_norms(self) -> Tensor:
        """Returns |c|^2 of every code, (codebook_size,).

        Cached while the codebook is unchanged: recomputing costs more than one block's distances.
        """
        weight = self.codebook.weight
        if weight.is_inference():  # inference tensors carry no version counter
            return weight.float().square().sum(1)
        kept, place, version = self._norms_cache, weight.data_ptr(), weight._version
        if kept is None or kept[0] is not weight or kept[1:3] != (place, version):
            kept = self._norms_cache = weight, place, version, weight.float().square().sum(1)
        return kept[3]

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, x: Padded) -> Quantized:
        """Quantizes (B, T, D), always in float32."""
        values = self.normalized(x.values.float())
        table = self.codebook.weight.float()
        scores = _scores(values, table, table.square().sum(1))
        best = scores.topk(2, largest=False)
        codes = scores.argmin(1).unflatten(0, values.shape[:2])
        margin = (best.values[:, 1] - best.values[:, 0]).unflatten(0, values.shape[:2])
        quantized = functional.embedding(codes, table)
        mask = x.mask[:, :, None]
        distance = (values - quantized).square() * mask
        loss = distance.sum() / (mask.sum().clamp(min=1) * values.shape[-1])
        return Quantized(Padded(codes, x.lengths), values + (quantized - values).detach(), loss, margin)

    @torch.no_grad()
    def fit_normalization(self, vectors: Tensor) -> None:
        """Estimates mean and standard deviation per channel from vectors (N, D), if `normalize` is set."""
        if self.config.normalize:
            self.mean.copy_(vectors.mean(0))
            self.std.copy_(vectors.std(0).clamp(min=1e-3))

    @torch.no_grad()
    def fit_codebook(self, vectors: Tensor, num_rounds: int = 8) -> None:
        """Initializes the codebook by k-means on unnormalized vectors (N, D).

        Raises:
            ValueError: fewer vectors than codes.
        """
        size = self.config.codebook_size
        if len(vectors) < size:
            raise ValueError(f"k-means needs at least {size} vectors for {size} codes, got {len(vectors)}")
        vectors = self.normalized(vectors.float())
        table = vectors[torch.randperm(len(vectors), device=vectors.device)[:size]].clone()
        count = torch.ones(size, device=vectors.device)
        for _ in range(num_rounds):
            squares = table.square().sum(1)
            nearest = torch.cat([_scores(part[None], table, squares).argmin(1) for part in vectors.split(8192)])
            count = torch.bincount(nearest, minlength=size).to(table.dtype)
            total = torch.zeros_like(table).index_add_(0, nearest, vectors)
            empty = count == 0
            table = total / count.clamp(min=1)[:, None]
            table[empty] = vectors[torch.randint(len(vectors), (int(empty.sum()),), device=vectors.device)]
        self.ema_count.copy_(count.clamp(min=1) / count.clamp(min=1).mean())
        self.ema_weight.copy_(table * self.ema_count[:, None])
        self.codebook.weight.copy_(table)

    @torch.no_grad()
    def update(self, x: Padded, codes: Padded) -> None:
        """Updates the EMA codebook with the valid vectors of a batch and restarts dead codes.

        Under torch.distributed all ranks sum their statistics and keep the same codebook.
        """
        vectors, used = self.normalized(x.values[x.mask].float()), codes.values[codes.mask]
        size, decay = self.config.codebook_size, self.config.ema_decay
        count = torch.bincount(used, minlength=size).to(vectors.dtype)
        total = torch.zeros_like(self.ema_weight).index_add_(0, used, vectors)
        fresh = vectors[torch.randint(len(vectors), (size,), device=vectors.device)]
        if distributed.is_initialized():
            distributed.all_reduce(count)
            distributed.all_reduce(total)
            distributed.broadcast(fresh, 0)
        if not self.ema_count.any():  # the first batch is the codebook
            self.ema_weight.copy_(fresh)
            self.ema_count.fill_(1.0)
        self.ema_count.mul_(decay).add_(count, alpha=1 - decay)
        self.ema_weight.mul_(decay).add_(total, alpha=1 - decay)
        dead = self.ema_count < self.config.restart_threshold
        self.ema_weight[dead] = fresh[dead]
        self.ema_count[dead] = 1.0
        self.codebook.weight.copy_(self.ema_weight / self.ema_count[:, None])


def _scores(values: Tensor, table: Tensor, squares: Tensor) -> Tensor:
    """Returns squared distances without the constant |x|^2: (B T, codebook_size)."""
    return torch.addmm(squares, values.flatten(0, 1), table.T, alpha=-2.0)
