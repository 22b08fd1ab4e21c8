"""A local chat endpoint that fails in every way an endpoint does, and answers as a function says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def reply(content: str | None, stop: str = "stop", usage: Any = USAGE) -> str:
    """Return the JSON text of a reply."""
    choices = [{"message": {"content": content}, "finish_reason": stop}]
    return json.dumps({"model": "made-up-1", "choices": choices, **({"usage": usage} if usage else {})})


def grade(body: Any) -> str:
    """Return the reply ``#thescore: N`` to an answer ``grade N``."""
    content = body["messages"][0]["content"]
    number = content.split("<<<ANSWER\ngrade ")[1][0] if "<<<ANSWER\ngrade " in content else "1"
    return reply(f"A reason.\n#thescore: {number}")


class Endpoint(ThreadingHTTPServer):
    """A server that answers after the faults of its ``script``.

    A fault is a function that returns a fault, ``"drop"`` for a closed connection, (status, text) or (status, text,
    headers), a text for the content of the reply, or None for no fault.

    Args:
        port: the port; 0 for a free one.
        answer: returns the JSON text of the reply to a request's body.

    Attributes:
        seen: (path, authorization, body) of every request.
        served: bodies of the requests that got a reply.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, port: int = 0, answer: Callable[[Any], str] = grade) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script: list[Any] = []
        self.seen: list[tuple[str, str | None, Any]] = []
        self.served: list[Any] = []
        self.lock, self.answer = threading.Lock(), answer
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Handler of one request to an ``Endpoint``."""

    server: Endpoint

    def do_POST(self) -> None:
        """Answer, or fail as the script says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            fault = self.server.script.pop(0) if self.server.script else None
        if callable(fault):
            fault = fault()
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, tuple):
            self.send(*fault)
            return
        text = reply(fault) if fault else self.server.answer(body)
        self.server.served.append(body)
        self.send(200, text)

    def send(self, status: int, text: str, headers: Any = ()) -> None:
        """Send an HTTP answer."""
        data = text.encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def serving(answer: Callable[[Any], str] = grade, port: int = 0) -> Iterator[Endpoint]:
    """Yield a running server."""
    server = Endpoint(port, answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
