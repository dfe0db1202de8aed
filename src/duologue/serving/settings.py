"""Settings of a server. The defaults are safe: loopback only, no recordings."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

MIN_KEY_LENGTH = 16
LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class Settings:
    """The settings of one server.

    Attributes:
        host, port: address to listen on; port 0 picks a free one. A host other than loopback needs `api_keys`.
        api_keys: accepted keys, never printed. Empty admits every client.
        allowed_origins: origins of other servers' pages (`https://talk.example.org`) that may use this server.
        allowed_hosts: host names accepted besides loopback on a server without keys (guards against DNS rebinding).
        max_message_bytes: size of one WebSocket message. The default holds an event of 15 MiB, as OpenAI's server.
        max_upload_bytes: size of one request body.
        max_input_chars: length of a text to speak or answer.
        max_request_audio_s: audio in one transcription or completion request.
        audio_buffer_s: uncommitted audio of a session.
        session_s: maximum duration of a session.
        idle_s: a session without client events for this time is closed.
        stalled_turn_s: a turn in which the client sends no audio for this time is ended.
        max_items: items of a session's conversation.
        max_sessions, max_sessions_per_key: concurrent sessions; without keys all clients share one key.
        max_requests: concurrent requests that use the models; more are refused.
        outbound_events: capacity of a client's send queue.
        stall_s: a client that reads nothing for this time while events wait is dropped.
        ahead_s: a reply is not generated further than this ahead of its playback.
        record_folder: folder of recordings; None records nothing.
        resume_s: time to keep the conversation of a dropped client in memory; 0 keeps none.
        store: folder or Redis URL where conversations are stored as token ids, so that another server or a restarted
            one can resume them; "" stores none.
        store_s: time to live of a stored conversation after its last change.
        drain_s: maximum time for current answers after SIGTERM.
        write_out_numbers: numbers in English text to be spoken become words; else the model reads digits.

    Raises:
        ValueError: names the value and the allowed range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_message_bytes: int = 16 * 2**20
    max_upload_bytes: int = 25 * 2**20
    max_input_chars: int = 4096
    max_request_audio_s: float = 600.0
    audio_buffer_s: float = 120.0
    session_s: float = 3600.0
    idle_s: float = 600.0
    stalled_turn_s: float = 3.0
    max_items: int = 1000
    max_sessions: int = 32
    max_sessions_per_key: int = 16
    max_requests: int = 16
    outbound_events: int = 512
    stall_s: float = 10.0
    ahead_s: float = 8.0
    record_folder: Path | None = None
    resume_s: float = 60.0
    store: str = field(default="", repr=False)  # a URL can hold a password
    store_s: float = 86_400.0
    drain_s: float = 20.0
    write_out_numbers: bool = True

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("the host must be an address or a name to listen on, such as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"the port must be from 0 to 65535, got {self.port}")
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            at_least_zero = name in ("resume_s", "drain_s")
            if name == "port" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value < 0 or value != value or (value == 0 and not at_least_zero):
                raise ValueError(f"{name} must be {'0 or more' if at_least_zero else 'above 0'}, got {value}")
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"an API key must have at least {MIN_KEY_LENGTH} characters, printable ASCII without blanks "
                    f"(one of {len(key)} characters was given)"
                )
        if not self.is_loopback and not self.api_keys:
            raise ValueError(
                f"a server on {self.host} can be reached from other machines and needs API keys: give --keys FILE or "
                "set DUOLOGUE_API_KEYS, or listen on 127.0.0.1"
            )
        for origin in self.allowed_origins:
            if not is_origin(origin):
                raise ValueError(f"an allowed origin looks like https://talk.example.org, not {origin!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback_host(self.host)


def is_origin(text: str) -> bool:
    """Returns whether a text is the origin of a web page."""
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and parts.netloc != "" and text == f"{parts.scheme}://{parts.netloc}"


def is_loopback_host(host: str) -> bool:
    """Returns whether a host name or address (without a port) is loopback."""
    if host.lower().rstrip(".") in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
