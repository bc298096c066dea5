"""Outputs that a server of OpenAI's API generates: the protocol, failures, and what is asked again."""

import json
import re
import threading
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import app.evaluation.server_requests
from app.evaluation.benchmark import EncodedQuestion, Question
from app.evaluation.server import Server
from app.evaluation.server_requests import ServerRequests
from app.models.decoding import Decoding
from tests.support.generation import one_at_a_time
from tests.support.openai_server import OpenAIServer
from tests.support.paths import DATA, needs_data
from tests.support.toy_benchmarks import Writing, write_config


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(app.evaluation.server_requests, "BACKOFF", 0.01)


@pytest.fixture
def model(run_models):
    """Return the tiny Llama and its tokenizer."""
    name = run_models / "llama"
    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


@pytest.fixture
def asking(tmp_path, run_models):
    """Return `asking(url, evals=None, **server)`, a configuration that asks a server."""

    def write(url, evals=None, **server):
        file = write_config(tmp_path, run_models / "llama")
        config = yaml.safe_load(file.read_text())
        options = config["data"]["init_args"]
        options["evals"] = evals or options["evals"][:1]
        options["server"] = {"url": url, **server}
        file.write_text(yaml.safe_dump(config))
        return file

    return write


def results(folder):
    (result,) = json.loads((folder / "benchmarks.json").read_text()).values()
    return result


def answers(folder, name="writing"):
    (file,) = (folder / "answers").rglob(f"{name}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_server_of_the_model_gives_the_models_scores(model, asking, command, tmp_path):
    """The prompts are token ids, so that they are those of the model in memory; whose weights stay away."""

    def write(body):
        return one_at_a_time(*model, [body["prompt"]], body["max_tokens"])[0][0]

    folder = tmp_path / "runs" / "toy"
    with OpenAIServer(write).running() as server:
        assert command("test", "--config", asking(server.url)) == 0
    served, asked = answers(folder), results(folder)
    keys = [question.key for question in Writing().load()]
    assert [row["key"] for row in served] == keys
    assert (asked["served"], asked["api"], "weights" in asked) == ("served", "completions", False)
    (folder / "benchmarks.json").unlink()
    config = yaml.safe_load((tmp_path / "benchmarks.yaml").read_text())
    config["data"]["init_args"]["server"] = None
    (tmp_path / "alone.yaml").write_text(
        yaml.safe_dump(config | {"output": {**config["output"], "name": "alone"}})
    )
    assert command("test", "--config", tmp_path / "alone.yaml") == 0
    alone = tmp_path / "runs" / "alone"
    assert [row["outputs"] for row in served] == [row["outputs"] for row in answers(alone)]
    assert asked["scores"] == results(alone)["scores"]
    assert asked["questions"] == 23


def test_what_a_request_says(asking, command, monkeypatch, tmp_path):
    """OpenAI's names; a sample has a seed of its own; a stop string that the server leaves is cut."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    evals = [{"class_path": "Gsm8k", "init_args": {"path": str(tmp_path / "q.jsonl")}}]
    evals[0]["init_args"] |= {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 9}
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    server = OpenAIServer(lambda body: "#### 2 Q: more", ("a", "b"), key="secret")
    with server.running():
        file = asking(server.url + "/", evals, model="b", api="chat")
        assert command("test", "--config", file) == 0
    (body,) = server.asked
    assert body.pop("messages") == [{"role": "user", "content": "Q: 1 + 1?\nA: "}]
    assert 0 <= body.pop("seed") < 2**31
    assert body == {
        **{"model": "b", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9},
        "stop": ["Q:", "</s>", "<|im_end|>"],
    }
    (row,) = answers(tmp_path / "runs" / "toy", "gsm8k")
    assert (row["outputs"], row["tokens"], row["finished"]) == (["#### 2 "], [3], [True])
    assert row["scores"] == {"strict": 1.0, "flexible": 1.0, "lora_one": 1.0}


def test_samples_have_seeds_of_their_own(asking, command, tmp_path):
    evals = [{"class_path": "tests.support.toy_benchmarks.Writing"}]
    evals[0]["init_args"] = {"num_samples": 3, "size": 2}
    with OpenAIServer(lambda body: str(body["seed"])).running() as server:
        assert command("test", "--config", asking(server.url, evals)) == 0
    outputs = [text for row in answers(tmp_path / "runs" / "toy") for text in row["outputs"]]
    assert len(set(outputs)) == 6
    assert not any("n" in body for body in server.asked)  # which llama.cpp does not know


def test_a_busy_server_is_asked_again_and_many_at_once(asking, command, tmp_path):
    def write(body):
        time.sleep(0.02)
        return "e"

    server = OpenAIServer(write)
    server.failures = [503, 429, 500]
    with server.running():
        assert command("test", "--config", asking(server.url, concurrency=4)) == 0
    assert len(server.asked) == 23
    assert 1 < server.most_at_once <= 4
    assert results(tmp_path / "runs" / "toy")["scores"]["has_e"] == 1


def test_how_long_a_busy_server_asks_to_wait_is_said_once(asking, command, caplog, monkeypatch):
    waited = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    server = OpenAIServer(lambda body: "e")
    server.failures, server.retry_after = [429, 503, 429], "17"
    logger = "lightning.pytorch.utilities.rank_zero"
    with server.running(), caplog.at_level("INFO", logger=logger):
        assert command("test", "--config", asking(server.url, concurrency=2)) == 0
    assert waited.count(17) == 3
    assert caplog.text.count("asks to wait 17 s before it is asked again") == 1


def test_what_was_answered_before_a_failure_is_kept(asking, error_of, command, tmp_path):
    """A server that breaks down: one line, and the same command asks the rest alone."""
    server = OpenAIServer(lambda body: "e")
    with server.running():
        file = asking(server.url, concurrency=1, retries=0)
        written = server.write

        def breaks(body):
            if len(server.asked) == 9:
                server.failures = [500] * 20
            return written(body)

        server.write = breaks
        told = error_of("test", "--config", file)
        assert f"{server.url}/completions gives no answer (status 500: " in told
        assert "the same command goes on with those that are missing" in told
        assert "\n" not in told
        server.failures, server.write = [], written
        assert command("test", "--config", file) == 0
    prompts = [tuple(body["prompt"]) for body in server.asked]
    assert len(prompts) == len(set(prompts)) == 23
    assert results(tmp_path / "runs" / "toy")["answered_before"] == 10


def test_an_interrupted_process_does_not_wait_for_the_server(monkeypatch):
    """It ends with its last thread that is no daemon; what has not been asked is not asked any more."""
    question, ready = EncodedQuestion(Question("k", "p", None), [1], ""), threading.Event()
    server, before = OpenAIServer(lambda _: str(ready.wait(9))), set(threading.enumerate())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with server.running():
        requests = ServerRequests(Server(server.url, concurrency=2), "served", Decoding(5))
        monkeypatch.setattr(app.evaluation.server_requests, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(requests.ask([question] * 9))
        threads = set(threading.enumerate()) - before
        cancelled = [future.cancelled() for future in requests.waiting]
        ready.set()
    assert [thread.daemon for thread in threads] == [True] * len(threads)
    assert cancelled[2:] == [True] * 7


def test_another_served_model_is_asked_anew(asking, command, tmp_path):
    server = OpenAIServer(lambda body: "e", ("first",))
    with server.running():
        assert command("test", "--config", asking(server.url)) == 0
        server.models = ("second",)
        assert command("test", "--config", asking(server.url)) == 0
    assert len(server.asked) == 46
    scored = json.loads((tmp_path / "runs" / "toy" / "benchmarks.json").read_text())
    assert {result["served"] for result in scored.values()} == {"first", "second"}


WRONG = {
    "other model": (
        {"model": "mine"},
        "server.model is 'mine', but http.* serves one, two: set it",
    ),
    "several": ({}, "data.server.model is None, but http.* serves one, two: set it"),
    "address": ({"url": "localhost:8000"}, "url is 'localhost:8000': expected such as http://"),
    "path": ({"url": "{server}/v1"}, r"/models lists no models \(status 404: '{}'\): expected the"),
    "absent": (
        {"url": "http://127.0.0.1:9/v1"},
        r"cannot be reached \(.*Connection refused\): start",
    ),
    "https": ({"url": "https:{address}"}, r"cannot be reached \(.+\): start the server"),
    "concurrency": ({"concurrency": 0}, "data.server.concurrency is 0: expected at least 1"),
    "timeout": ({"timeout": 0}, "data.server.timeout is 0.*: expected seconds, more than 0"),
    "api": ({"api": "responses"}, "api is responses: expected one of completions, chat"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_server_is_told_before_questions_are_read(
    case, asking, error_of, monkeypatch
):
    options, message = WRONG[case]
    monkeypatch.setattr(Writing, "load", lambda _: pytest.fail("questions are read"))
    with OpenAIServer(lambda body: "", ("one", "two")).running() as server:
        address = server.url.removeprefix("http:")
        url = options.get("url", server.url).format(server=server.url, address=address)
        told = error_of("test", "--config", asking(**{**options, "url": url}))
    assert re.search(message, told), told
    assert "\n" not in told


def test_a_server_gives_no_likelihoods(asking, error_of):
    choosing = [{"class_path": "tests.support.toy_benchmarks.Choosing"}]
    with OpenAIServer(lambda body: "").running() as server:
        told = error_of("test", "--config", asking(server.url, choosing))
    assert "data.server generates text, but choosing in --data.evals needs the model's" in told


def test_a_page_that_is_no_server(asking, error_of):
    with OpenAIServer(lambda body: "").running() as server:
        server.reply = lambda *_: (200, "no list")
        told = error_of("test", "--config", asking(server.url))
    assert "lists no models (status 200" in told


def test_a_key_that_is_refused(asking, error_of):
    with OpenAIServer(lambda body: "", key="secret").running() as server:
        told = error_of("test", "--config", asking(server.url))
    assert "lists no models (status 401: " in told
    assert "its key in OPENAI_API_KEY" in told


@needs_data("gsm8k")
@pytest.mark.smollm2
def test_gsm8k_of_the_real_model(asking, command, smollm2_dir, smollm2_name, tmp_path):
    """Two questions, generated by transformers in float32 behind the server and by the benchmark itself."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)

    def write(body):
        return one_at_a_time(model, tokenizer, [body["prompt"]], body["max_tokens"])[0][0]

    path = str(DATA / "gsm8k" / "test.jsonl")
    evals = [{"class_path": "Gsm8k", "init_args": {"path": path, "limit": 2, "max_new_tokens": 8}}]
    with OpenAIServer(write).running() as server:
        file = asking(server.url, evals, concurrency=1)
        config = yaml.safe_load(file.read_text())
        config["model"]["name"] = smollm2_name
        file.write_text(yaml.safe_dump(config))
        assert command("test", "--config", file) == 0
    config["data"]["init_args"]["server"] = None
    config["output"]["name"] = "alone"
    file.write_text(yaml.safe_dump(config))
    assert command("test", "--config", file) == 0
    served, alone = (answers(tmp_path / "runs" / name, "gsm8k") for name in ("toy", "alone"))
    assert [row["outputs"] for row in served] == [row["outputs"] for row in alone]
    assert [row["scores"] for row in served] == [row["scores"] for row in alone]
