"""A server of OpenAI's API is asked 50 questions of GSM8K by a process that is killed half-way, and goes on."""

import json
import signal

import pytest
import yaml

from tests.support.openai_server import OpenAIServer
from tests.support.paths import DATA, needs_data
from tests.support.toy_benchmarks import write_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
LIMIT, AT_ONCE = 50, 4


def kept(folder):
    """Return the keys of the answers on disk, in files whole or in parts; a line may be cut."""
    keys = set()
    for path in (folder / "answers").rglob("gsm8k-*.jsonl"):
        for line in filter(None, path.read_text().splitlines()):
            keys.add(json.loads(line)["key"])
    return keys


@needs_data("gsm8k")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_answered_is_never_asked_again(processes, forked, finished, run_models, tmp_path):
    file = write_config(tmp_path, run_models / "llama", 8)
    config = yaml.safe_load(file.read_text())
    options, path = config["data"]["init_args"], str(DATA / "gsm8k" / "test.jsonl")
    arguments = {"path": path, "limit": LIMIT, "max_new_tokens": 9}
    options["evals"] = [{"class_path": "Gsm8k", "init_args": arguments}]
    folder = tmp_path / "runs" / "toy"
    with OpenAIServer(lambda body: "#### 18").running() as server:
        options["server"] = {"url": server.url, "concurrency": AT_ONCE}
        file.write_text(yaml.safe_dump(config))
        argv = ["test", f"--config={file}"]
        argv += ["--config=strategies/ddp.yaml", "--trainer.devices=2"] if processes == 2 else []
        job = {"argv": argv, "keep": str(tmp_path / "kept")}
        dying = {**job, "die": [processes - 1, "benchmark", 3]}
        ends = forked([dying], processes=processes)
        assert ends[-1][0] == -signal.SIGKILL, ends[-1][1][-3000:]
        before, asked = kept(folder), len(server.asked)
        assert 8 <= len(before) < LIMIT
        assert asked - len(before) <= AT_ONCE * processes  # those that were on their way
        finished([job], processes=processes)
    assert len(server.asked) - asked == LIMIT - len(before)
    (result,) = json.loads((folder / "benchmarks.json").read_text()).values()
    assert (result["questions"], result["answered_before"]) == (LIMIT, len(before))
    assert len(kept(folder)) == LIMIT
