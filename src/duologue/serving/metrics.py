"""Metrics of a server for Prometheus. Each app has its own registry, so that several apps can share a process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from duologue.conversation.events import Timings

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
BARGE_IN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TOKEN_RATES = (10, 20, 40, 60, 80, 100, 150, 200, 400, 800)
QUEUE_LENGTHS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters, gauges and histograms of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, file descriptors, processor time
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self.sessions = gauge("sessions", "Open real-time sessions.")
        self.sessions_opened = counter("sessions_opened", "Real-time sessions opened.")
        self.sessions_resumed = counter("sessions_resumed", "Sessions resumed after a dropped connection.")
        # reason: key, origin, host, full, full_for_key, busy, draining
        self.refused = counter("refused", "Refused clients, by reason.", "reason")
        # reason: client, idle, session_length, stalled, message_size, draining, moved, error
        self.closed = counter("sessions_closed", "Closed sessions, by reason.", "reason")
        self.requests = counter("requests", "REST requests, by route and status.", "route", "status")
        self.requests_running = gauge("requests_running", "REST requests that the models work on.")
        # status: completed, cancelled, incomplete, failed
        self.replies = counter("replies", "Replies, by status.", "status")
        self.first_audio = histogram(
            "time_to_first_audio_seconds", "From the end of the question to the first audio sent.", SECONDS, "route"
        )
        self.first_text = histogram(
            "time_to_first_text_seconds", "From the end of the question to the first text.", SECONDS, "route"
        )
        self.barge_in = histogram(
            "barge_in_seconds", "From detected speech of the user to the end of the reply.", BARGE_IN_SECONDS
        )
        self.underruns = counter("underruns", "Times that the client ran out of audio before the next block came.")
        self.tokens = counter("tokens", "Generated tokens, by kind (text, speech).", "kind")
        self.tokens_per_second = histogram(
            "reply_tokens_per_second", "Tokens of a reply divided by its duration.", TOKEN_RATES
        )
        self.audio_seconds = counter("audio_seconds", "Seconds of audio, by direction (in, out).", "direction")
        self.errors = counter("errors", "Errors sent to clients, by code.", "code")
        self.outbound_events = histogram(
            "outbound_events", "Length of a client's send queue when an event is added.", QUEUE_LENGTHS
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"duologue_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"duologue_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"duologue_{name}", text, labels, buckets=buckets, registry=self.registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is read at each scrape, such as the length of a queue."""
        self._gauge(name, text).set_function(value)

    def reply(self, route: str, status: str, timings: Timings) -> None:
        """Counts one reply.

        Args:
            route: "realtime", "speech" or "chat".
            status: as in the protocol: "completed", "cancelled", "incomplete" or "failed".
        """
        self.replies.labels(status).inc()
        if timings.first_audio_s is not None:
            self.first_audio.labels(route).observe(timings.first_audio_s)
        if timings.first_text_s is not None:
            self.first_text.labels(route).observe(timings.first_text_s)
        self.tokens.labels("text").inc(timings.num_text_tokens)
        self.tokens.labels("speech").inc(timings.num_speech_tokens)
        self.audio_seconds.labels("out").inc(timings.audio_s)
        if timings.total_s > 0:
            self.tokens_per_second.observe((timings.num_text_tokens + timings.num_speech_tokens) / timings.total_s)

    def exposition(self) -> bytes:
        """Returns the page that Prometheus scrapes. Call it on the event loop, whose tasks are among the metrics."""
        return generate_latest(self.registry)
