"""The files of deploy/: what they name exists, and nginx passes everything on below its prefix."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.asyncio.client import connect

from duologue import cli
from duologue.serving.app import create_app
from duologue.serving.server import listen
from duologue.serving.settings import Settings
from tests.fuzz import SDP
from tests.live_server import TEXT, LiveServer, scripted_bot, serving

DEPLOY = Path(__file__).parent.parent / "deploy"
KEY = "a-key-of-enough-length"
STATEMENT = re.compile(r"\b(?:duologue|process)_\w+")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return found


def test_every_metric_of_the_dashboard_is_exported(tiny_folder: Path) -> None:
    bot, _ = scripted_bot(tiny_folder)
    service = create_app(bot, Settings(port=0)).state.service

    async def page() -> str:
        return str(service.metrics.exposition().decode())

    exported = set(re.findall(r"^# TYPE (\S+) (?:gauge|counter)$", asyncio.run(page()), re.MULTILINE))
    histograms = re.findall(r"^# TYPE (\S+) histogram$", asyncio.run(page()), re.MULTILINE)
    exported |= {f"{name}_bucket" for name in histograms}
    asked = {
        name
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in STATEMENT.findall(target["expr"])
    }
    assert asked
    assert asked <= exported, asked - exported


def test_the_panels_of_the_dashboard_do_not_overlap_and_use_its_data_source() -> None:
    panels = dashboard()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert (
        len(places)
        == len({panel["id"] for panel in panels})
        == len({panel["title"] for panel in panels})
        == len(panels)
    )
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {"${source}"}


def arguments(command: list[str]) -> Any:
    return cli.argument_parser().parse_command(["serve", *command])


def test_the_service_and_the_containers_start_the_server_with_keys_and_a_store() -> None:
    unit = (DEPLOY / "duologue.service").read_text(encoding="utf-8")
    [started] = re.findall(r"^ExecStart=\S+/duologue serve (.*)$", unit, re.MULTILINE)
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for command in (started.split(), services["duologue"]["command"], services["cuda"]["command"]):
        args = arguments(command)
        assert args.keys is not None
        assert args.store
    stops_s = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert stops_s > Settings().drain_s
    assert services["duologue"]["stop_grace_period"] == f"{stops_s}s"
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)  # TLS is the proxy's
    assert re.search(r"^NoNewPrivileges=yes$", unit, re.MULTILINE)


def test_nginx_has_the_limits_of_the_server() -> None:
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    [most] = re.findall(r"client_max_body_size (\d+)m;", text)
    assert int(most) * 2**20 == Settings().max_upload_bytes
    [read_s] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    assert int(read_s) > Settings().idle_s
    logged = re.search(r"log_format duologue (.*?);", text, re.DOTALL)
    assert logged is not None
    assert not re.search(r"\$(request|request_uri|args|query_string)\b", logged[1])  # session ids


@dataclass(frozen=True)
class Proxied:
    """A server behind nginx."""

    url: str
    context: ssl.SSLContext
    server: LiveServer
    folder: Path

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, verify=self.context, timeout=300, trust_env=False)


@pytest.fixture(scope="module")
def proxied(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if nginx is None or shutil.which("openssl") is None:
        pytest.skip("no nginx or no openssl (apt-get install nginx-light openssl)")
    folder = tmp_path_factory.mktemp("nginx")
    certificate = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    certificate += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    certificate += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(certificate, check=True, capture_output=True)
    with serving(*scripted_bot(tiny_folder), api_keys=(KEY,)) as server:
        backend = server.url.split("/")[2]
        with listen(Settings(port=0)) as free:
            port = free.getsockname()[1]
        text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
        changes = {
            "127.0.0.1:8000": backend,
            "listen 443": f"listen 127.0.0.1:{port}",
            "voice.example.org": "localhost",
            "/etc/ssl/duologue": str(folder),
            "/var/log/nginx": str(folder),
        }
        for given, wanted in changes.items():
            assert given in text
            text = text.replace(given, wanted)
        (folder / "site.conf").write_text(text)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        head = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        (folder / "main.conf").write_text(f"{head}http {{ {temporary} include {folder}/site.conf; }}\n")
        process = subprocess.Popen([nginx, "-c", str(folder / "main.conf")], stderr=subprocess.PIPE)
        try:
            context = ssl.create_default_context(cafile=folder / "certificate.pem")
            proxied = Proxied(f"https://localhost:{port}/voice/", context, server, folder)
            end = time.monotonic() + 300
            while True:
                try:
                    assert proxied.client().get("healthz").status_code == 200
                    break
                except httpx.TransportError:
                    assert process.poll() is None, process.communicate()[1]
                    assert time.monotonic() < end
                    time.sleep(0.05)
            yield proxied
        finally:
            process.terminate()
            process.communicate()


def test_page_and_rest_routes_behind_nginx(proxied: Proxied) -> None:
    with proxied.client() as client:
        page = client.get("")
        assert page.status_code == 200
        for path in re.findall(r'(?:src|href)="([\w.-]+)"', page.text):
            assert client.get(path).status_code == 200, path
        assert client.get(proxied.url.rstrip("/")).headers["location"].endswith("/voice/")
        assert client.get("metrics").status_code == 404  # Prometheus asks the server itself
        assert client.get("v1/models").json()["data"][0]["id"]
        asked = {"model": "any", "messages": [{"role": "user", "content": "Hello."}], "stream": True}
        with client.stream("POST", "v1/chat/completions", json=asked) as answer:
            assert answer.read().rstrip().endswith(b"data: [DONE]")
        call = client.post("v1/realtime/calls", content=SDP, headers={"Content-Type": "application/sdp"})
        if call.status_code == 201:  # with aiortc
            assert call.headers["location"].startswith("/voice/v1/realtime/calls/")
        assert client.post("v1/audio/speech", content=bytes(26 * 2**20)).status_code == 413


def test_a_realtime_turn_behind_nginx_leaves_no_session_id_in_its_log(proxied: Proxied) -> None:
    address = f"{proxied.url.replace('https', 'wss')}v1/realtime"
    headers = {"Authorization": f"Bearer {KEY}"}

    async def ask(query: str, *events: dict[str, Any]) -> list[dict[str, Any]]:
        async with connect(f"{address}?{query}", ssl=proxied.context, additional_headers=headers, proxy=None) as socket:
            seen = [json.loads(await socket.recv())]
            for event in events:
                await socket.send(json.dumps(event))
            while events and seen[-1]["type"] != "response.done":
                seen.append(json.loads(await socket.recv()))
            return seen

    content = [{"type": "input_text", "text": "Hello."}]
    item = {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content}}
    seen = asyncio.run(ask("model=tiny", item, {"type": "response.create"}))
    assert (
        "".join(event["delta"] for event in seen if event["type"] == "response.output_audio_transcript.delta") == TEXT
    )
    session_id = seen[0]["session"]["id"]
    assert asyncio.run(ask(f"session_id={session_id}"))[0]["session"]["id"] == session_id  # the same conversation
    for log in proxied.folder.glob("*.log"):
        assert session_id not in log.read_text()
    assert "GET /voice/v1/realtime" in (proxied.folder / "duologue.log").read_text()
