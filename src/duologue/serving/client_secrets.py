"""Client secrets: short-lived keys for web pages, made by `POST /v1/realtime/client_secrets`.

A web application asks for a secret with its own API key and gives the secret to its page. The secret opens real-time
sessions only, from one origin and for one model, until it expires. A running session may outlast its secret.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from duologue.serving.admission import AdmissionError
from duologue.serving.errors import ApiError, documented
from duologue.serving.objects import Body, SessionConfig, Strict, find_voice
from duologue.serving.service import Service
from duologue.serving.settings import is_origin
from duologue.serving.tools import check_tools

PREFIX = "ek_"
MAX_SECRETS = 10_000  # of one server; more are refused until some expire


class ExpiresAfter(Strict):
    """Time to live, in seconds."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(default=600, ge=10, le=7200)


class ClientSecretRequest(Body):
    """The body of a request for a client secret."""

    expires_after: ExpiresAfter = ExpiresAfter()
    session: dict[str, Any] = Field(default={}, description="The configuration of its sessions, as in session.update.")
    origin: str | None = Field(
        None,
        max_length=300,
        description="The origin of the page that may use the secret, such as https://app.example.org. Without it, the "
        "usual rules for origins hold, and the secret belongs to the origin that uses it first.",
    )


class ClientSecretObject(BaseModel):
    """A client secret; its value is shown only once."""

    value: str
    expires_at: int
    session: dict[str, Any]


@dataclass(eq=False)
class ClientSecret:
    """A client secret.

    Attributes:
        key: name of the API key that made it; its sessions count under this key.
        expires_at: Unix time.
        config: configuration of its sessions.
        model: the model that its sessions must name, or "" for any.
        origin: the page's origin; None until the first use, "" for programs, which send no origin.
    """

    key: str
    expires_at: float
    config: SessionConfig
    model: str = ""
    origin: str | None = None

    @property
    def allowed_origin(self) -> str | None:
        """The origin that may use the secret, if it is a page's."""
        return self.origin or None

    def claim(self, origin: str | None, model: str) -> None:
        """Checks one use of the secret.

        Raises:
            AdmissionError: the secret belongs to another origin or another model.
        """
        if self.origin is None:
            self.origin = origin or ""
        if self.origin != (origin or ""):
            owner = f"pages of {self.origin!r}" if self.origin else "programs, not pages"
            raise AdmissionError(403, "origin_not_allowed", f"this client secret is for {owner}")
        if self.model and model not in ("", self.model):
            raise AdmissionError(403, "model_not_allowed", f"this client secret is for the model {self.model!r}")


@dataclass(eq=False)
class ClientSecrets:
    """The valid client secrets of one server, by the hash of their value. Belongs to the event loop."""

    clock: Callable[[], float] = time.time
    _by_hash: dict[bytes, ClientSecret] = field(default_factory=dict)

    def add(self, secret: ClientSecret) -> str:
        """Stores a secret; returns its value. Raises AdmissionError if there are too many."""
        self._by_hash = {key: one for key, one in self._by_hash.items() if one.expires_at > self.clock()}
        if len(self._by_hash) >= MAX_SECRETS:
            raise AdmissionError(429, "too_many_client_secrets", "there are too many client secrets; try again later")
        value = PREFIX + secrets.token_urlsafe(32)
        self._by_hash[_hash(value)] = secret
        return value

    def has_origin(self, origin: str) -> bool:
        """Returns whether a valid secret belongs to this origin."""
        now = self.clock()
        return any(one.allowed_origin == origin and one.expires_at > now for one in self._by_hash.values())

    def find(self, value: str) -> ClientSecret | None:
        """Returns the secret of a value, or None if the value is a key of another kind.

        Raises:
            AdmissionError: the secret is unknown or expired.
        """
        if not value.startswith(PREFIX):
            return None
        secret = self._by_hash.get(_hash(value))
        if secret is None or secret.expires_at <= self.clock():
            raise AdmissionError(401, "invalid_client_secret", "the client secret is unknown or expired")
        return secret


def _hash(value: str) -> bytes:
    return hashlib.sha256(value.encode("utf-8", "replace")).digest()


def client_secret_routes(service: Service, store: ClientSecrets) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/realtime/client_secrets",
        tags=["realtime"],
        summary="Make a client secret for a web page",
        responses=documented(400, 413, 429),
    )
    async def client_secrets(body: ClientSecretRequest, key: str = Depends(service.key)) -> ClientSecretObject:
        if body.origin is not None and not is_origin(body.origin):
            raise ApiError(f"origin looks like https://app.example.org, not {body.origin!r}", param="origin")
        config = service.session_config().updated(body.session)
        find_voice(service.bot.models.card, config.audio.output.voice, "session.audio.output.voice")
        check_tools(service.bot.models.calls_tools, config.tools, config.tool_choice, "session")
        expires_at = int(store.clock()) + body.expires_after.seconds
        value = store.add(ClientSecret(key, expires_at, config, config.model, body.origin))
        shown = config.model_copy(update={"model": config.model or service.model, "expires_at": expires_at})
        return ClientSecretObject(value=value, expires_at=expires_at, session=shown.model_dump(mode="json"))

    return router
