"""A server of OpenAI's API, on a port of this machine, and what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any]]


class OpenAIServer:
    """Answers with `write(body)`, a text, in OpenAI's form, as vLLM, SGLang and llama.cpp do.

    Args:
        write: From the body of a request to the output.
        models: Names of the models that it lists.
        key: What it asks for, if it does.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], str],
        models: tuple[str, ...] = ("served",),
        key: str | None = None,
    ) -> None:
        self.write, self.models, self.key = write, models, key
        self.failures: list[int] = []  # statuses of the next replies
        self.retry_after: str | None = None  # what such replies ask to wait
        self.asked: list[dict[str, Any]] = []  # bodies that were answered
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, path: str, body: dict[str, Any] | None, key: str | None) -> Reply:
        """Return status and content of the reply to a request."""
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, {"error": {"message": "Invalid API key", "type": "invalid_request_error"}}
        if body is None:
            listed = [{"id": name, "object": "model"} for name in self.models]
            return (200, {"object": "list", "data": listed}) if path == "/v1/models" else (404, {})
        if self.failures:
            status = self.failures.pop()
            return status, {"error": {"message": "no room", "type": "server_error"}}
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        text = self.write(body)
        with self.lock:
            self.asked.append(body)
        choice = {"index": 0, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        if path == "/v1/chat/completions":
            choice["message"] = {"role": "assistant", "content": text}
        elif path == "/v1/completions":
            choice["text"] = text
        else:
            return 404, {"error": {"message": "Not Found"}}
        return 200, {"id": "1", "model": body["model"], "choices": [choice], "usage": usage}

    @contextmanager
    def running(self) -> Iterator["OpenAIServer"]:
        """Serve on a free port."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(*server.reply(self.path, None, self.headers["Authorization"]))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    reply = server.reply(self.path, body, self.headers["Authorization"])
                finally:
                    with server.lock:
                        server.at_once -= 1
                self._send(*reply)

            def _send(self, status: int, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status != 200 and server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
            http.daemon_threads = True
            self.url = f"http://127.0.0.1:{http.server_port}/v1"
            thread = threading.Thread(target=http.serve_forever, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                http.shutdown()
                thread.join()
