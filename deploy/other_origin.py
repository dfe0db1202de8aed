"""Serves a page of another origin, which talks with a running server through client secrets.

python deploy/other_origin.py [--server http://127.0.0.1:8000] [--port 8080]

The API key stays in this program, in the environment variable DUOLOGUE_API_KEY. The page gets a secret that is valid
for ten minutes and for its origin alone. The server needs the extra `webrtc`.
"""

import argparse
import json
import os
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser(description="Serves a page of another origin.")
parser.add_argument("--server", default="http://127.0.0.1:8000")
parser.add_argument("--port", type=int, default=8080)
args = parser.parse_args()
PAGE = Path(__file__).with_name("other-origin.html").read_bytes()


def client_secret(origin: str) -> str:
    """Asks the server for a secret of this origin's page, with transcripts of the user."""
    session = {"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
    body = json.dumps({"origin": origin, "session": session}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('DUOLOGUE_API_KEY', '')}"}
    request = urllib.request.Request(f"{args.server}/v1/realtime/client_secrets", body, headers)
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["value"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply("text/html; charset=utf-8", PAGE)

    def do_POST(self) -> None:
        """`/secret`: a real application asks its user to log in first."""
        secret = client_secret(f"http://localhost:{self.server.server_port}")  # type: ignore[attr-defined]
        self.reply("application/json", json.dumps({"server": args.server, "secret": secret}).encode())

    def reply(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


print(f"open http://localhost:{args.port}/ and press Talk", flush=True)
ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()
