"""Routes without audio: hosts, origins, keys, the page, metrics, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from duologue.conversation.chatbot import Chatbot, load
from duologue.serving.settings import Settings, is_loopback_host
from tests.serving import Running, running
from tests.tiny import write_tiny_chatbot

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(write_tiny_chatbot(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def server(bot: Chatbot) -> Iterator[Running]:
    with running(bot, max_upload_bytes=100_000) as it:
        yield it


@pytest.fixture(scope="module")
def guarded(bot: Chatbot) -> Iterator[Running]:
    with running(bot, api_keys=KEYS, allowed_origins=("https://talk.example.org",)) as it:
        yield it


def error_of(response: object) -> dict[str, object]:
    body = response.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(body)
    error: dict[str, object] = body["error"]
    return error


def test_the_page_has_security_headers(server: Running) -> None:
    with server.client() as client:
        page = client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert client.get("/app.js").status_code == 200
        assert client.get("/../settings.py").status_code == 404
        assert client.get("/%2e%2e/settings.py").status_code == 404


def test_only_allowed_origins_may_frame_the_page(guarded: Running) -> None:
    with guarded.client() as client:
        policy = client.get("/").headers["content-security-policy"]
        assert policy.endswith("frame-ancestors 'self' https://talk.example.org")


def test_model_routes(server: Running) -> None:
    with server.client() as client:
        models = client.get("/v1/models").json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["tiny"]
        assert client.get("/v1/models/tiny").json() == models["data"][0]
        assert models["data"][0] | {"trained": False, "voices": ["default"], "transcribes": True} == models["data"][0]
        assert models["data"][0]["num_parameters"] > 1000
        offered = {"questions": [], "follows_instructions": False, "records": False}
        assert models["data"][0] | offered == models["data"][0]
        missing = client.get("/v1/models/gpt-5")
        assert missing.status_code == 404
        assert error_of(missing)["code"] == "model_not_found"


def test_health_and_metrics(server: Running) -> None:
    with server.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready"}
        client.get("/v1/models/nothing")
        figures = client.get("/metrics").text
        assert 'duologue_requests_total{route="/v1/models/{model}",status="404"}' in figures
        for name in ("sessions", "worker_waiting", "sessions_kept", "underruns_total", "tokens_total", "errors_total"):
            assert f"duologue_{name}" in figures


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/audio/speech", 405, "method_not_allowed"),
        ("POST", "/v1/audio/speech", 400, "missing_required_parameter"),
        ("POST", "/v1/audio/transcriptions", 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", 400, "missing_required_parameter"),
    ],
)
def test_http_errors_have_openai_format(server: Running, method: str, path: str, status: int, code: str) -> None:
    with server.client() as client:
        response = client.request(method, path)
        assert response.status_code == status
        assert error_of(response)["code"] == code


def test_too_large_bodies_are_refused(server: Running) -> None:
    with server.client() as client:
        declared = client.post("/v1/chat/completions", content=b"x" * 100_001)
        assert declared.status_code == 413
        assert error_of(declared)["code"] == "too_large"
        undeclared = client.post("/v1/chat/completions", content=iter([b" " * 60_000, b" " * 60_000]))
        assert undeclared.status_code == 413
        assert "100000 bytes" in str(error_of(undeclared)["message"])


def test_invalid_json_is_refused(server: Running) -> None:
    with server.client() as client:
        for body in (b"{", b"[1", b"\xff\xfe", b"[" * 50_000):
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400, body[:4]
            error_of(response)


def test_foreign_origins_are_refused(server: Running) -> None:
    with server.client() as client:
        for origin in ("https://evil.example.org", "null", server.url.replace("127.0.0.1", "localhost")):
            response = client.post("/v1/chat/completions", headers={"Origin": origin}, json={})
            assert response.status_code == 403, origin
            assert error_of(response)["code"] == "origin_not_allowed"
            assert "--origin" in str(error_of(response)["message"])  # the way out
            assert "access-control-allow-origin" not in response.headers
        own = client.get("/v1/models", headers={"Origin": server.url})
        assert own.status_code == 200


def test_foreign_host_names_are_refused(server: Running) -> None:
    """DNS rebinding: a page of evil.example.org whose name resolves to 127.0.0.1 has the origin of its target."""
    with server.client() as client:
        port = server.url.rpartition(":")[2]
        host = f"evil.example.org:{port}"
        response = client.get("/v1/models", headers={"Host": host, "Origin": f"http://{host}"})
        assert response.status_code == 403
        assert error_of(response)["code"] == "host_not_allowed"
        assert "--keys" in str(error_of(response)["message"])
        for name in ("localhost", "127.0.0.1", "[::1]", "127.9.9.9"):
            assert client.get("/v1/models", headers={"Host": f"{name}:{port}"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics"])
def test_guarded_routes_need_a_key(guarded: Running, path: str) -> None:
    with guarded.client() as client:
        for headers in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": KEYS[0]},
            {"Authorization": "Basic eA=="},
        ):
            response = client.get(path, headers=headers)
            assert response.status_code == 401, headers
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert not any(key in response.text for key in KEYS)
        for key in KEYS:
            assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/transcriptions", "/v1/chat/completions"])
def test_model_routes_need_a_key(guarded: Running, path: str) -> None:
    with guarded.client() as client:
        assert client.post(path).status_code == 401
        assert client.post(path, content=b"{ not even JSON").status_code == 401


def test_open_routes(guarded: Running) -> None:
    with guarded.client() as client:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_allowed_origins_pass(guarded: Running) -> None:
    headers = {"Origin": "https://talk.example.org", "Authorization": f"Bearer {KEYS[1]}"}
    with guarded.client() as client:
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == headers["Origin"]
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        refused = client.get("/v1/models", headers={"Origin": headers["Origin"]})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == headers["Origin"]
        before = client.options("/v1/chat/completions", headers={**headers, **asked})
        assert before.status_code == 200
        assert "POST" in before.headers["access-control-allow-methods"]


def test_repr_hides_keys() -> None:
    settings = Settings(api_keys=KEYS)
    assert not any(key in repr(settings) for key in KEYS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"host": "0.0.0.0"}, "needs API keys"),
        ({"host": "192.168.1.5"}, "needs API keys"),
        ({"host": "talk.example.org"}, "needs API keys"),
        ({"host": ""}, "an address or a name"),
        ({"port": 70000}, "from 0 to 65535, got 70000"),
        ({"api_keys": ("short",)}, "at least 16 characters"),
        ({"api_keys": ("with blanks in between",)}, "without blanks"),
        ({"idle_s": 0}, "idle_s must be above 0, got 0"),
        ({"resume_s": -1.0}, "resume_s must be 0 or more, got -1.0"),
        ({"drain_s": float("nan")}, "drain_s must be 0 or more"),
        ({"max_sessions": 0}, "max_sessions must be above 0"),
        ({"allowed_origins": ("talk.example.org",)}, "looks like https://talk.example.org"),
        ({"allowed_origins": ("*",)}, "looks like https://talk.example.org"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(**settings)  # type: ignore[arg-type]


def test_is_loopback_host() -> None:
    assert all(map(is_loopback_host, ("localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(is_loopback_host, ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "")))
    Settings(host="0.0.0.0", api_keys=KEYS)
