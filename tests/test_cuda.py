"""The parts of CUDA that can be checked without one: padded buckets, precision, streams and devices."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from duologue.cuda import CapturedGraphs, new_stream, next_size, on_stream, set_float32_precision
from duologue.layers import Padded
from duologue.released.decoder.blocks import Streaming
from duologue.released.decoder.flow import GRAPH_FRAMES
from tests.released_sizes import small_decoder, small_tokens


def buckets() -> CapturedGraphs:
    return CapturedGraphs(capture=False)


def test_static_buffers_are_used_again_and_results_are_copies() -> None:
    graphs, calls = buckets(), []

    def work(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.data_ptr())
        return x * y

    with torch.inference_mode():
        first = graphs.run("a", work, [torch.tensor([2.0]), torch.tensor([3.0])])
        second = graphs.run("a", work, [torch.tensor([4.0]), torch.tensor([5.0])])
    assert (first.item(), second.item()) == (6.0, 20.0)
    assert len(set(calls)) == 1
    assert len(graphs) == 1


def test_the_least_recently_used_graph_is_dropped() -> None:
    graphs, made = CapturedGraphs(max_graphs=2, capture=False), []

    def run(key: str) -> None:
        def work(x: Tensor) -> Tensor:
            made.append(key)
            return x + 1

        with torch.no_grad():
            graphs.run(key, work, [torch.zeros(1)])

    for key in ("a", "b", "a", "c", "a"):
        run(key)
    assert len(graphs) == 2
    before = made.count("b")
    run("b")
    assert made.count("b") > before


def test_graphs_are_not_for_gradients_autocast_or_a_cpu() -> None:
    x = torch.zeros(1)
    assert not buckets().usable(x)
    with torch.no_grad():
        assert buckets().usable(x)
        assert not CapturedGraphs().usable(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not buckets().usable(x)


def test_copies_of_a_module_have_no_graphs_of_the_original() -> None:
    graphs = CapturedGraphs(max_graphs=3, capture=False)
    with torch.no_grad():
        graphs.run("a", lambda x: x + 1, [torch.zeros(1)])
    assert len(graphs) == 1
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert len(other) == 0


def test_next_size() -> None:
    assert [next_size(size, (2, 4)) for size in (1, 2, 3, 5)] == [2, 2, 4, None]


@pytest.mark.parametrize("guidance", [0.7, 0.0])
@torch.inference_mode()
def test_a_padded_bucket_equals_the_plain_solve(guidance: float) -> None:
    """Three ragged rows in a bucket of four, and an odd number of frames."""
    flow = small_decoder().flow
    lengths = torch.tensor([101, 40, 7])
    generator = torch.Generator().manual_seed(0)
    mu, noise = (torch.randn(3, 101, 80, generator=generator) for _ in range(2))
    prompt = Padded(torch.randn(3, 30, 80, generator=generator), torch.tensor([30, 12, 0]))
    speaker = torch.randn(3, 12, generator=generator)
    plain = flow.solve(Padded(mu, lengths), speaker, prompt, noise, 3, guidance)
    flow.graphs = buckets()
    for _ in range(2):  # the capture, and its replay
        padded = flow.solve(Padded(mu, lengths), speaker, prompt, noise, 3, guidance)
        assert padded.shape == plain.shape
        for row, length in enumerate(lengths):
            torch.testing.assert_close(padded[row, :length], plain[row, :length], atol=1e-5, rtol=0)
    assert len(flow.graphs) == 1
    other = flow.solve(Padded(mu + 1, lengths), speaker, prompt, noise, 3, guidance)
    assert (other[0] - plain[0]).abs().max() > 1e-2  # the static inputs are filled anew


@torch.inference_mode()
def test_a_stream_in_buckets_equals_the_plain_stream() -> None:
    decoder = small_decoder(Streaming((10, 20), 12, 40))
    tokens = Padded(torch.stack([small_tokens(50), small_tokens(50, 1)]), torch.tensor([50, 33]))
    plain = decoder.flow(tokens, decoder.flow.init_state(2, num_steps=2)).rows()
    decoder.flow.graphs = buckets()
    padded = decoder.flow(tokens, decoder.flow.init_state(2, num_steps=2)).rows()
    assert len(decoder.flow.graphs) > 1
    for one, other in zip(padded, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_beyond_the_largest_bucket_the_solve_is_plain() -> None:
    flow = small_decoder().flow
    flow.graphs = buckets()
    frames = GRAPH_FRAMES[-1] + 1
    noise = torch.zeros(1, frames, 80)
    assert (
        flow.solve(Padded.full(noise), torch.zeros(1, 12), Padded.full(noise[:, :0]), noise, 1, 0.7).shape[1] == frames
    )
    assert len(flow.graphs) == 0
    assert not flow.capture(1, frames)


def test_capture_makes_the_graph_that_a_conversation_uses() -> None:
    flow = small_decoder().flow
    assert not flow.capture(2, 90)  # no graphs on a CPU
    flow.graphs = buckets()
    assert flow.capture(2, 90, num_steps=2)
    assert len(flow.graphs) == 1
    with torch.inference_mode():
        noise = torch.zeros(2, 85, 80)
        flow.solve(Padded.full(noise), torch.zeros(2, 12), Padded.full(noise[:, :0]), noise, 2, 0.7)
        assert len(flow.graphs) == 1
        flow.estimate_in(torch.bfloat16)
    assert len(flow.graphs) == 0


@torch.inference_mode()
def test_a_failed_capture_leaves_the_plain_solve(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CapturedGraphs):
        def run(self, *_: object) -> Tensor:
            raise RuntimeError("CUDA out of memory")

    flow = small_decoder().flow
    noise = torch.randn(1, 60, 80, generator=torch.Generator().manual_seed(0))
    given = Padded.full(noise), torch.zeros(1, 12), Padded.full(noise[:, :0]), noise, 2, 0.7
    plain = flow.solve(*given)
    flow.graphs = Broken(capture=False)
    assert torch.equal(flow.solve(*given), plain)
    assert flow.graphs is None
    assert "without CUDA graphs: CUDA out of memory" in caplog.text


def test_streams_are_only_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_stream("cpu") is None
    with on_stream(None):
        assert torch.zeros(1).sum() == 0
    asked = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: asked.append((device, priority)))
    new_stream("cuda:1", -1)
    assert asked == [(torch.device("cuda:1"), -1)]


@pytest.mark.parametrize("exact", [True, False])
def test_precision_is_set_for_products_and_convolutions_alike(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    products: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", products.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", exact)
    set_float32_precision("cpu", exact)
    assert products == []
    assert torch.backends.cudnn.allow_tf32 is exact
    set_float32_precision("cuda:0", exact)
    assert products == ["highest" if exact else "high"]
    assert torch.backends.cudnn.allow_tf32 is not exact
