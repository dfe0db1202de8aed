"""What only CUDA devices need: precision settings, streams and captured graphs.

A small model on a GPU spends its time in kernel launches. `CapturedGraphs` records all launches of a function once and
replays them with one call. On other devices every function here does nothing, or runs the work directly.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_MAX_GRAPHS = 64
_CAPTURE_ERRORS = "thread_local"  # other threads may launch and allocate during a capture
CAPTURE_LOCK = threading.Lock()
"""Held by every capture of the process: a capture begins with a synchronization, which ends another one."""


def check_device(name: str | torch.device) -> None:
    """Checks that torch can use a device here. Raises ValueError, and TypeError for what is not a name."""
    if not isinstance(name, str | torch.device):
        raise TypeError(f"device must be a name such as 'cpu' or 'cuda', not {type(name).__name__}")
    if str(name) == "cpu":
        return
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"torch has no device {str(name)!r} on this machine ({reason})") from None


def set_float32_precision(device: torch.device | str, exact: bool = True) -> None:
    """Sets float32 matrix products and convolutions of the process to IEEE float32, or to TF32.

    PyTorch's defaults differ: TF32 for convolutions, float32 for products. TF32 in the first convolutions of the
    speech tokenizer changes its codes, so models run exactly. Other devices than CUDA are not touched.
    """
    if torch.device(device).type != "cuda":
        return
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def new_stream(device: torch.device | str, priority: int = 0) -> torch.cuda.Stream | None:
    """Returns a stream of a CUDA device, and None for other devices. A lower number is a higher priority."""
    device = torch.device(device)
    return torch.cuda.Stream(device, priority) if device.type == "cuda" else None


def on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which new work goes to the stream; None leaves the current one."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def wait_for(stream: torch.cuda.Stream | None, *tensors: Tensor) -> None:
    """Lets a stream wait for the current stream, if one of the tensors lies on a CUDA device."""
    if stream is not None and any(tensor.is_cuda for tensor in tensors):
        stream.wait_stream(torch.cuda.current_stream(stream.device))


@dataclass(frozen=True)
class _Graph:
    """Static inputs and output, and the call that computes the output from the inputs."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], object]


class CapturedGraphs:
    """Functions of tensors as CUDA graphs, one per key, captured at the first call.

    The least recently used graphs are dropped beyond a maximum. Graphs share one memory pool, so the first capture
    should be the largest. Thread-safe: calls run one after another, on the device too.

    Args:
        max_graphs: maximum number of graphs.
        capture: False runs the same static buffers without a graph on any device, for tests.
    """

    def __init__(self, max_graphs: int = _MAX_GRAPHS, capture: bool = True) -> None:
        self._max_graphs, self._capture = max_graphs, capture
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None  # of the last call
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __deepcopy__(self, memo: object) -> CapturedGraphs:
        """Returns an empty cache: a graph reads the weights of the module it was captured from."""
        return CapturedGraphs(self._max_graphs, self._capture)

    def __reduce__(self) -> tuple[type[CapturedGraphs], tuple[int, bool]]:
        return CapturedGraphs, (self._max_graphs, self._capture)

    def usable(self, x: Tensor) -> bool:
        """Returns whether work on this tensor can be captured here: on CUDA, without gradients and autocast."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        return x.is_cuda or not self._capture

    def clear(self) -> None:
        """Drops all graphs, for instance after the weights moved."""
        with self._lock:
            self._drop(len(self._graphs))

    def run(self, key: Hashable, work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Returns `work(*inputs)`.

        Args:
            key: everything that the work depends on besides the values of the inputs: shapes, settings, weights.
            work: a function without host synchronization, such as `.item()`, and without random numbers.
            inputs: tensors on one device, of the shapes and dtypes of the key.
        """
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                # Ordinary tensors, because inference tensors cannot be written outside of inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    graph = self._graphs[key] = self._made(work, tuple(x.clone() for x in inputs))
                self._drop(len(self._graphs) - self._max_graphs)
            self._graphs.move_to_end(key)
            if self._done is not None:  # a call from another stream may still use the shared memory
                torch.cuda.current_stream(inputs[0].device).wait_event(self._done)
            for static, x in zip(graph.inputs, inputs, strict=True):
                static.copy_(x)
            graph.replay()
            output = graph.output.clone()
            if output.is_cuda:
                self._done = torch.cuda.current_stream(output.device).record_event(self._done)
            return output

    def _drop(self, count: int) -> None:
        """Drops the least recently used graphs, after the last call has ended."""
        if count > 0 and self._done is not None:
            self._done.synchronize()
        for _ in range(count):
            self._graphs.popitem(last=False)

    def _made(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Graph:
        if not self._capture:
            output = work(*inputs)

            def run_again() -> None:
                with torch.inference_mode(False), torch.no_grad():
                    output.copy_(work(*inputs))

            return _Graph(inputs, output, run_again)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(inputs[0].device):
            replay, output = captured(lambda: work(*inputs), self._pool)
        return _Graph(inputs, output, replay)


def captured(work: Callable[[], Result], pool: Any = None) -> tuple[Callable[[], None], Result]:
    """Captures what `work` launches on the current CUDA device.

    Args:
        work: reads and writes tensors that stay at their addresses, and does not wait for the device.
        pool: memory shared with other graphs, which then must not run at the same time.

    Returns:
        a call that launches the same work again, and the result of `work`, which each call fills anew.
    """
    current, side = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with CAPTURE_LOCK:
        side.wait_stream(current)
        with torch.cuda.stream(side):  # which restores the current stream after a failed capture too
            work()  # libraries make their handles and plans before the capture
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=_CAPTURE_ERRORS):
                result = work()
        current.wait_stream(side)
    return graph.replay, result


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """Returns the one stream of a device for captures, because libraries keep memory for every stream."""
    return torch.cuda.Stream(index)


def next_size(size: int, sizes: Sequence[int]) -> int | None:
    """Returns the smallest of the ascending sizes that is not below `size`; None if all are."""
    return next((each for each in sizes if each >= size), None)
