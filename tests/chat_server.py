"""A small OpenAI-compatible server in this process: answers as told, and counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, Any]]  # body -> status, reply text or vectors


@dataclass
class Server:
    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def chat_server(answer: Answer, models: tuple[str, ...] = ("judge-1",)) -> Iterator[Server]:
    """Serves `/v1/models`, `/v1/chat/completions` and `/v1/embeddings` on loopback."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def send(self, status: int, payload: Any) -> None:
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            if status == 429:
                self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model"} for name in models]
            self.send(200, {"object": "list", "data": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.bodies.append(body)
                server.keys.append(self.headers.get("authorization"))
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            status, content = answer(body)
            with server.lock:
                server.in_flight -= 1
            if status != 200:
                self.send(status, {"error": {"message": content, "code": status}})
            elif self.path.endswith("/embeddings"):
                rows = [{"index": i, "embedding": v, "object": "embedding"} for i, v in content]
                self.send(200, {"object": "list", "data": rows, "model": "e"})
            else:
                message = {"role": "assistant", "content": content}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.send(200, {"id": "1", "object": "chat.completion", "created": 0,
                                "model": "judge-1", "choices": [choice]})  # fmt: skip

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.base_url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
