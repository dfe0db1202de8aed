"""What a server tells Prometheus. Each app has its own registry, so that several apps can live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from duologue.conversation.events import Timings

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
RATES = (10, 20, 40, 60, 80, 100, 150, 200, 400, 800)


class Metrics:
    """Counters, gauges and histograms; methods for what is counted at more than one place."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, file descriptors, processor time
        self.sessions = Gauge("duologue_sessions", "Real-time sessions that are open.", registry=registry)
        self.sessions_opened = Counter("duologue_sessions_opened", "Real-time sessions so far.", registry=registry)
        self.sessions_resumed = Counter(
            "duologue_sessions_resumed",
            "Sessions that went on after a dropped connection.",
            registry=registry,
        )
        self.refused = Counter(
            "duologue_refused", "Clients that were not let in.", ["reason"], registry=registry
        )  # key, origin, host, full, full_for_key, busy, draining
        self.closed = Counter(
            "duologue_sessions_closed",
            "Sessions that ended, by what ended them.",
            ["reason"],
            registry=registry,
        )  # client, idle, session_length, stalled, message_size, draining, error
        self.requests = Counter("duologue_requests", "REST requests.", ["route", "status"], registry=registry)
        self.requests_running = Gauge(
            "duologue_requests_running", "REST requests that the models work on.", registry=registry
        )
        self.replies = Counter(
            "duologue_replies", "Replies, by how they ended.", ["status"], registry=registry
        )  # completed, cancelled, incomplete, failed
        self.first_audio = Histogram(
            "duologue_time_to_first_audio_seconds",
            "From the end of the question to the first sound that was sent.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_text = Histogram(
            "duologue_time_to_first_text_seconds",
            "From the end of the question to the first text.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.barge_in = Histogram(
            "duologue_barge_in_seconds",
            "From detected speech of the user to the end of the reply.",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
            registry=registry,
        )
        self.underruns = Counter(
            "duologue_underruns",
            "Times that sound came after all sound before it had been played.",
            registry=registry,
        )
        self.tokens = Counter("duologue_tokens", "Tokens made.", ["kind"], registry=registry)  # text, speech
        self.tokens_per_second = Histogram(
            "duologue_reply_tokens_per_second", "Tokens of a reply over its time.", buckets=RATES, registry=registry
        )
        self.audio_seconds = Counter(
            "duologue_audio_seconds", "Seconds of sound.", ["direction"], registry=registry
        )  # in, out
        self.errors = Counter("duologue_errors", "Errors that clients were told, by code.", ["code"], registry=registry)
        self.outbound_events = Histogram(
            "duologue_outbound_events",
            "Events that wait for a client, seen whenever one is added.",
            buckets=(0, 1, 2, 5, 10, 20, 50, 100, 200, 500),
            registry=registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when somebody asks, such as the length of a queue."""
        Gauge(f"duologue_{name}", text, registry=self.registry).set_function(value)

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
        """The page that Prometheus reads; asked for on the event loop, whose tasks are among the figures."""
        return generate_latest(self.registry)
