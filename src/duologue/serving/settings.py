"""What a server allows: addresses, keys, limits, where recordings go. Safe by default: loopback only, nothing kept."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

MIN_KEY_LENGTH = 16
LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Attributes:
        host, port: where it listens; port 0 takes a free one. Any host but a loopback one needs `api_keys`.
        api_keys: a client must show one of them where there are any; never printed.
        allowed_origins: pages of other servers (`https://talk.example.org`) that may use this one; its own always may.
        allowed_hosts: names that a request may be addressed to besides the loopback ones, while there are no keys: a
            foreign name that points here is how a page of another server would pass as one of ours.
        max_message_bytes: of one WebSocket message, as sent.
        max_upload_bytes: of the body of one request.
        max_input_chars: of a text to be spoken or answered.
        max_request_audio_s: sound in one request to be transcribed or answered.
        audio_buffer_s: sound that waits uncommitted in a session.
        session_s: the longest session.
        idle_s: a session in which the client sends nothing for so long is closed.
        max_items: items of a session's conversation.
        max_sessions, max_sessions_per_key: conversations at a time; without keys all clients are one.
        max_requests: requests at a time that the models work on; more are told to come back.
        outbound_events: events that wait for a client that reads slowly.
        stall_s: a client that reads nothing for so long while events wait is dropped.
        record_folder: conversations are recorded there; None records nothing.
        resume_s: a conversation whose client was dropped is kept so long; 0 keeps none.
        drain_s: how long current answers may go on after SIGTERM.

    Raises:
        ValueError: one sentence that names the value and what it may be.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_message_bytes: int = 4 * 2**20
    max_upload_bytes: int = 25 * 2**20
    max_input_chars: int = 4096
    max_request_audio_s: float = 600.0
    audio_buffer_s: float = 120.0
    session_s: float = 3600.0
    idle_s: float = 600.0
    max_items: int = 1000
    max_sessions: int = 32
    max_sessions_per_key: int = 16
    max_requests: int = 16
    outbound_events: int = 512
    stall_s: float = 10.0
    record_folder: Path | None = None
    resume_s: float = 60.0
    drain_s: float = 20.0

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError("the host must be an address or a name to listen on, such as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"the port must be from 0 to 65535, got {self.port}")
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            at_least_zero = name in ("resume_s", "drain_s")
            if name == "port" or not isinstance(value, int | float):
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
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"an allowed origin looks like https://talk.example.org, not {origin!r}")

    @property
    def is_loopback(self) -> bool:
        """Can only this machine reach the server?"""
        return is_loopback_host(self.host)


def is_loopback_host(host: str) -> bool:
    """Is this name or address (without a port) one of the machine itself?"""
    if host.lower().rstrip(".") in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
