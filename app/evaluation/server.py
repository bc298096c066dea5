"""Settings of a server of OpenAI's API, such as vLLM, SGLang or llama.cpp, that generates outputs."""

import math
import os
from dataclasses import dataclass
from typing import Literal

import requests

from app.utils.errors import InputError

SECONDS_TO_LIST = 20.0


@dataclass(frozen=True)
class Server:
    """A server of OpenAI's API, and how it is asked; OPENAI_API_KEY is sent to it where it is set."""

    url: str  # up to /v1, such as http://localhost:8000/v1
    model: str | None = None  # the model's name there; None takes the only one
    api: Literal["completions", "chat"] = "completions"  # token ids, or a user's message as text
    concurrency: int = 32  # requests at once, of each process
    timeout: float = 600.0  # seconds of a request
    retries: int = 5  # of a request that fails or finds the server busy

    def __post_init__(self) -> None:
        for name, holds, expected in (
            (
                "url",
                self.url.startswith(("http://", "https://")),
                "such as http://localhost:8000/v1",
            ),
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("timeout", 0 < self.timeout < math.inf, "seconds, more than 0"),
            ("retries", self.retries >= 0, "at least 0"),
        ):
            if not holds:
                value = getattr(self, name)
                raise InputError(f"data.server.{name} is {value!r}: expected {expected}")

    def served_model(self) -> str:
        """Return the name of the model to ask.

        Raises:
            InputError: The server cannot be reached, or serves no such model.
        """
        where = f"data.server.url is {self.url!r}"
        try:
            reply = requests.get(
                f"{self.url.rstrip('/')}/models", headers=headers(), timeout=SECONDS_TO_LIST
            )
            names = [str(each["id"]) for each in reply.json()["data"]]
        except requests.exceptions.JSONDecodeError as error:
            raise InputError(
                f"{where}, whose /models is no JSON (status {reply.status_code}): expected the address of "
                "a server of OpenAI's API, up to /v1"
            ) from error
        except requests.RequestException as error:
            raise InputError(
                f"{where}, which cannot be reached ({reason_of(error)}): start the server, or change "
                "data.server.url"
            ) from error
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{where}, whose /models lists no models (status {reply.status_code}: {reply.text[:200]!r}): "
                "expected the address of a server of OpenAI's API, up to /v1, and its key in OPENAI_API_KEY"
            ) from error
        if self.model is None and len(names) == 1:
            return names[0]
        if self.model not in names:
            raise InputError(
                f"data.server.model is {self.model!r}, but {self.url} serves {', '.join(names) or 'none'}: set "
                "it to one of these, or start the server with the model to ask"
            )
        return str(self.model)


def headers() -> dict[str, str]:
    """Return the headers of a request: OPENAI_API_KEY, where it is set."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def reason_of(error: BaseException) -> str:
    """Return the innermost cause of a failed request, in one line."""
    cause = error
    while inner := [
        each
        for each in (getattr(cause, "reason", None), *cause.args[:1])  # of SSL, `reason` is text
        if isinstance(each, Exception)
    ]:
        cause = inner[0]
    return " ".join(str(cause).split()).rpartition(": ")[2] or type(error).__name__
