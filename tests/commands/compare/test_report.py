"""`python train.py report`: its files and what it prints; the page in a parser and in a browser."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import matplotlib.image
import pytest

from tests.support.report_runs import RATES, fail, manifest, write_run
from tests.support.run_folders import table

OTHER_DATA = {"validation_size": 100, "max_length": 64, "batch_size": 8}
CURVES = {f"{what}_over_{over}" for what in ("loss", "accuracy") for over in ("steps", "seconds")}


class Reader(html.parser.HTMLParser):
    """Checks nesting, and notes what a page refers to and shows."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags, self.cells = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "b"):
            self.cells.append(data)


def test_the_page(report, runs, tmp_path):
    write_run(runs / "x" / "version_0", "<script>alert(1)</script>")
    (runs / f"lora_one-{RATES[1]}-0" / "version_0" / "alignment_captured.png").write_bytes(b"png")
    report(runs)
    out = tmp_path / "out"
    page = (out / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(link.startswith("data:") for link in reader.links)
    assert not re.search(r"https?://|url\(", page)
    assert "91.00 ± 1.00" in reader.cells
    assert "lora_one: Energy of the one-step gradient" in page
    pictures = [link for link in reader.links if link.startswith("data:image/png;base64,")]
    heat_map = "alignment_lora_one_captured"
    rates = {"learning_rate_validation", "learning_rate_test"}
    assert {path.stem for path in out.glob("*.png")} == rates | CURVES | {heat_map}
    contents = [base64.b64decode(link.partition(",")[2]) for link in pictures]
    assert len(contents) == 7
    assert contents.count(b"png") == 1
    for content in contents:
        if content != b"png":
            assert matplotlib.image.imread(io.BytesIO(content))[..., :3].std() > 0.02
    text = (out / "report.md").read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 7
    assert all((out / link).is_file() for link in links)
    assert f"({heat_map}.png)" in text


def test_a_report_takes_the_place_of_an_earlier_one(report, runs, tmp_path):
    write_run(tmp_path / "other" / "version_0", "lora", data=OTHER_DATA)
    report(runs, tmp_path / "other")
    out = tmp_path / "out"
    assert (out / "table_2.csv").is_file()
    assert (out / "loss_over_steps_2.png").is_file()
    for name in ("mine.png", "mine.csv"):
        (out / name).write_bytes(b"not of a report")
    report(runs)
    links = re.findall(r"!\[.*?\]\((.*?)\)", (out / "report.md").read_text())
    assert {path.name for path in out.glob("*.png")} == {*links, "mine.png"}
    tables = {"runs.csv", "table.csv", "differences.csv", "mine.csv"}
    assert {path.name for path in out.glob("*.csv")} == tables


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("app.commands.compare.report.comparison_plots", lambda _: [])


@pytest.mark.usefixtures("no_pictures")
def test_what_is_printed_and_written(report, runs, tmp_path):
    fail(runs, "pissa", 1e-3, 0, "why pissa failed")
    manifest(runs, [["pissa", 1e-3, 0], ["pissa", 1e-2, 0]])
    printed = report(runs)
    out = tmp_path / "out"
    rows = table(out, "table.csv")
    assert [row["method"] for row in rows] == ["lora_one", "lora", "pissa"]
    assert rows[0]["test accuracy, %"] in printed
    assert "Preliminary: 18 of 20 runs are finished, 1 are not." in printed
    text = (out / "report.md").read_text()
    assert "Alignment" not in text
    assert "| method | seed 0 | seed 1 | seed 2 |" in text
    for reason in ("why pissa failed", "it was not run"):
        assert reason in text
        assert reason in printed
    states = [row["state"] for row in table(out, "runs.csv")]
    assert states == ["finished"] * 18 + ["failed", "missing"]
    assert printed.endswith(f"report: {out / 'report.html'}\n")


@pytest.mark.usefixtures("no_pictures")
def test_tasks_share_no_table(report, runs, tmp_path):
    write_run(tmp_path / "other" / "version_0", "lora", data=OTHER_DATA)
    printed = report(runs, tmp_path / "other")
    assert "Task 2: glue/sst2" in printed
    assert len(table(tmp_path / "out", "table_1.csv")) == 2
    assert len(table(tmp_path / "out", "table_2.csv")) == 1
    assert "data.init_args.max_length (128, 64)" in (tmp_path / "out" / "report.html").read_text()


def test_errors_are_one_line(runs, tmp_path, error_of):
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([tmp_path / "absent"], "does not exist: expected a run folder"),
        ([runs, "--score=bleu"], "'bleu', which no run has: expected one of accuracy, loss"),
        ([runs, "--output", tmp_path / "file"], "the report cannot be written into"),
        ([runs, "--scor=loss"], "unrecognized arguments: --scor=loss; see python train.py report"),
    ):
        error = error_of("report", *argv)
        assert message in error
        assert "\n" not in error


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome to open the page in")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width, report, runs, tmp_path):
    """Wide tables scroll in their own boxes: the page is as wide as the window, and nothing is amiss."""
    report(runs)
    report_file = tmp_path / "out" / "report.html"
    # A headless window is never as narrow as a phone; a frame is. The frame writes down what it measures.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<body style="margin:0"><iframe id=f src="{report_file.as_uri()}" style="width:{width}px;height:900px;'
        'border:0"></iframe><script>f.onload = () => { const d = f.contentDocument, e = d.documentElement;'
        "const broken = [...d.images].filter(i => !i.naturalWidth).length;"
        "document.title = JSON.stringify([e.scrollWidth, e.clientWidth, d.images.length, broken,"
        "[...d.querySelectorAll('.table')].filter(t => t.scrollWidth > t.clientWidth).length]) }</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    options += ["--proxy-server=127.0.0.1:9"]  # no network
    done = subprocess.run(
        [BROWSER, *options, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert ":CONSOLE" not in done.stderr
    measured = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    scroll, client, images, broken, scrolling = json.loads(measured[1])
    assert (scroll, client) == (width, width)
    assert (images, broken) == (6, 0)
    assert (scrolling > 0) is (width == 390)
