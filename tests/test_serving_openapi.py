"""The routes against their own OpenAPI document, with generated valid and invalid requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from duologue.conversation.chatbot import load
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

KEY = "only-key-of-the-tests"
NUM_EXAMPLES = 8
ROUTES = [
    ("POST", "/v1/audio/speech"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/realtime/client_secrets"),
    ("POST", "/v1/realtime/calls"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bot = load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny"), max_tokens=30))
    with running(bot, api_keys=(KEY,), max_input_chars=40, max_request_audio_s=2.0) as it:
        yield it


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    import schemathesis

    with server.client() as client:
        return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


def test_documented_routes(document: Any) -> None:
    found = [(method.upper(), path) for path, item in document.raw_schema["paths"].items() for method in item]
    assert sorted(found) == sorted(ROUTES)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_routes_match_the_document(server: Running, document: Any, method: str, path: str, mode: str) -> None:
    import schemathesis

    operation = document[path][method]
    if mode == "negative" and not (operation.body or operation.path_parameters):
        return  # there is nothing to get wrong
    wanted = schemathesis.GenerationMode(mode)
    # A document cannot say everything: the names of voices, the length of a text, whether bytes are sound.
    unsaid = [schemathesis.checks.positive_data_acceptance]

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=wanted))
    def check(case: Any) -> None:
        case.call_and_validate(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=unsaid, timeout=300
        )

    check()
