"""Let a server of OpenAI's API generate the outputs to questions, many at once."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import requests
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.util import Retry

from app.evaluation.benchmark import EncodedQuestion
from app.evaluation.server import Server, headers, reason_of
from app.models.decoding import Decoding
from app.utils.errors import InputError

BUSY = (408, 429, 500, 502, 503, 504)  # statuses that may be another one in a while
BACKOFF = 1.0  # seconds before the second retry, doubled before each further one


class WaitingRetry(Retry):
    """Say how long a server asks to wait before it is asked again, the first time that it does."""

    said = Lock()  # taken by the first that says it; the copies that urllib3 makes share it

    def new(self, **options: Any) -> "WaitingRetry":
        """Return what urllib3 makes for the next attempt."""
        following = super().new(**options)
        following.said = self.said
        return following

    def sleep_for_retry(self, response: BaseHTTPResponse) -> bool:
        """Wait as long as the server asks, if it does."""
        seconds = self.get_retry_after(response)
        if seconds and self.said.acquire(blocking=False):
            rank_zero_info(
                f"the server of data.server.url is busy (status {response.status}) and asks to wait "
                f"{seconds:.0f} s before it is asked again (Retry-After); this is said once"
            )
        return super().sleep_for_retry(response)


class ServerRequests:
    """Ask a server questions, many at once; answers come in the order in which it has them.

    Args:
        server: How it is asked.
        model: From `Server.served_model`.
        decoding: How outputs are generated.
    """

    def __init__(self, server: Server, model: str, decoding: Decoding) -> None:
        self.server, self.model, self.decoding = server, model, decoding
        self.session = requests.Session()
        self.session.headers.update(headers())
        again = WaitingRetry(
            server.retries,
            backoff_factor=BACKOFF,
            status_forcelist=BUSY,
            allowed_methods=None,
            raise_on_status=False,
        )
        again.said = Lock()
        adapter = HTTPAdapter(pool_maxsize=server.concurrency, max_retries=again)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, adapter)
        self.waiting: dict[Future[dict[str, Any]], EncodedQuestion] = {}
        self.queue: SimpleQueue[tuple[Future[dict[str, Any]], EncodedQuestion]] = SimpleQueue()
        # A ThreadPoolExecutor's threads would keep an interrupted process until the server has answered.
        for _ in range(server.concurrency):
            Thread(target=self._work, daemon=True).start()

    def ask(
        self, questions: Sequence[EncodedQuestion]
    ) -> Iterator[tuple[EncodedQuestion, dict[str, Any]]]:
        """Hand in questions; yield answers, also to earlier ones, until no more wait than are asked at once.

        Raises:
            InputError: The server refuses a request, or fails again and again.
        """
        for question in questions:
            future: Future[dict[str, Any]] = Future()
            self.waiting[future] = question
            self.queue.put((future, question))
        yield from self._answers(self.server.concurrency)

    def rest(self) -> Iterator[tuple[EncodedQuestion, dict[str, Any]]]:
        """Yield the answers that are still to come."""
        yield from self._answers(0)

    def _work(self) -> None:
        """Ask one question after the other, as long as the process lives."""
        while True:
            future, question = self.queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._answer(question))
                except Exception as error:
                    future.set_exception(error)

    def _answers(self, left: int) -> Iterator[tuple[EncodedQuestion, dict[str, Any]]]:
        failure: BaseException | None = None
        try:
            while len(self.waiting) > (0 if failure else left):
                for done in wait(self.waiting, return_when=FIRST_COMPLETED).done:
                    question = self.waiting.pop(done)
                    if (error := done.exception()) is None:
                        yield question, done.result()
                    else:  # those on their way may still be answered
                        failure = failure or error
                        self.waiting = {f: q for f, q in self.waiting.items() if not f.cancel()}
        except BaseException:  # the reader of the answers has failed, or is told to end
            for future in self.waiting:
                future.cancel()
            raise
        if failure is not None:
            raise failure

    def _answer(self, question: EncodedQuestion) -> dict[str, Any]:
        """Return outputs, their numbers of tokens, and whether they have ended."""
        replies = [self._output(question, number) for number in range(self.decoding.num_samples)]
        texts, tokens, finished = zip(*replies, strict=True)
        return {"outputs": list(texts), "tokens": list(tokens), "finished": list(finished)}

    def _output(self, question: EncodedQuestion, number: int) -> tuple[str, int, bool]:
        chat, decoding = self.server.api == "chat", self.decoding
        name = f"{decoding.seed}/{number}/{question.question.key}"
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1,
        }
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if chat:
            body["messages"] = [{"role": "user", "content": question.question.prompt}]
        else:
            body["prompt"] = list(question.prompt_ids)
        reply = self._post("/chat/completions" if chat else "/completions", body)
        try:
            choice = reply["choices"][0]
            text = (choice["message"]["content"] if chat else choice["text"]) or ""
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{self.server.url} answers with {str(reply)[:200]!r}, which is not OpenAI's API of "
                f"{self.server.api}: change data.server.url or data.server.api"
            ) from error
        ends = [place for place in map(text.find, decoding.stop) if place >= 0]
        tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
        return text[: min(ends, default=len(text))], tokens, choice.get("finish_reason") == "stop"

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = self.server.url.rstrip("/") + path
        try:
            reply = self.session.post(url, json=body, timeout=self.server.timeout)
            if reply.ok:
                return reply.json()
            why = f"status {reply.status_code}: {' '.join(reply.text.split())[:300]}"
        except requests.RequestException as error:
            why = reason_of(error)
        raise InputError(
            f"{url} gives no answer ({why}): see to the server, or change data.server; the answers so far are "
            "kept, and the same command goes on with those that are missing"
        )
