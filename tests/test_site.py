"""The documentation as a site: it builds without a warning, reads as the files do, and has every option."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from html import unescape

import pytest
import yaml
from markdown_it import MarkdownIt
from mkdocs.__main__ import cli

from tests.support.pages import Page
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

PAGES = {f"docs/{file.name}": file.stem for file in (ROOT / "docs").glob("*.md")}
PAGES |= {"README.md": "index", "RESULTS.md": "results", "CHANGELOG.md": "changelog"}
PAGES |= {"CONTRIBUTING.md": "contributing"}
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for room in ("app", "callbacks", "data_modules")
    for file in (ROOT / room).rglob("*.py")
    if file.name != "__init__.py"
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site with every warning an error, of links and their anchors too; return its folder."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml"))
    cli(["build", *options, "--site-dir", str(folder)], standalone_mode=False)
    return folder


def text_of(site, *parts):
    return Page(site.joinpath(*parts).read_text(), "article").text


def test_pages_read_as_on_a_code_host(site):
    """Markdown is CommonMark there and Python-Markdown here, which differ in lists and stars."""
    host = MarkdownIt("commonmark").enable("table")
    for file, name in PAGES.items():
        there = Page(host.render((ROOT / file).read_text()))
        here = Page((site / f"{name}.html").read_text(), "article")
        assert here.text == there.text, file
        assert here.blocks == there.blocks, file


def test_no_text_is_taken_for_html():
    """Text such as </s> is nowhere to be seen, neither on the site nor on a code host."""
    for file in PAGES:
        for token in MarkdownIt("commonmark").parse((ROOT / file).read_text()):
            for part in [token, *(token.children or [])]:
                is_comment = part.content.startswith("<!--")
                assert part.type not in ("html_inline", "html_block") or is_comment, part.content


def settings(value, kind="", name=""):
    """Yield each setting of a configuration: the class that it is an argument of, if any, and its name."""
    if isinstance(value, dict) and "class_path" in value:
        yield from settings(value.get("init_args") or {}, value["class_path"].rpartition(".")[2])
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from settings(inner, kind, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from settings(part, kind, name)
    else:
        yield kind, name


def test_every_setting_of_the_configurations_is_in_the_reference(site):
    """In the table of its section or class."""
    tables = {}
    for file in (site / "reference").glob("*.html"):
        for part in file.read_text().split("<h2 id="):
            title = re.match(r'"\w+">(\w+)<', part)
            names = re.findall(r"<td><code>([\w.]+)</code></td>", part)
            tables.setdefault(title[1] if title else "", set()).update(names)
    inside = {"model.adapter.adalora.": "AdaLoraBudget", "model.adapter.": "LoraSettings"}
    found = 0
    for file in (ROOT / "configs").rglob("*.yaml"):
        if file.parent.name == "theory":
            continue  # a command with a parser of its own
        for kind, name in settings(yaml.safe_load(file.read_text())):
            for prefix, record in inside.items():
                if not kind and name.startswith(prefix):
                    kind, name = record, name.removeprefix(prefix)
            known = tables.get(kind, set())
            if ".init_args." in name:  # of the class that another file names
                name, known = name.partition(".init_args.")[2], set().union(*tables.values())
            if kind not in ("AdamW", "DDPStrategy", "ModelCheckpoint"):  # torch's, Lightning's
                assert name.rstrip("+") in known, (file.name, kind, name)
            found += 1
    assert found > 500


def test_every_configuration_is_shown(site):
    text = text_of(site, "reference", "configurations.html")
    for file in (ROOT / "configs").rglob("*.yaml"):
        body = "".join(line for line in file.read_text().splitlines() if line[:1] != "#")
        assert "".join(body.split()) in text, file.name


def test_every_module_is_in_the_api(site):
    pages = (site / "reference" / "api").glob("*.html")
    ids = set().union(*(Page(page.read_text()).ids for page in pages))
    assert set(MODULES) <= ids


def test_what_a_function_returns_is_one_text(site):
    """And not an item for each line of it."""
    found = 0
    for page in (site / "reference" / "api").glob("*.html"):
        for part in page.read_text().split(">Returns:<")[1:]:
            assert part.partition("</ul>")[0].count("<li") == 1, (page.name, part[:300])
            found += 1
    assert found > 30


def test_nothing_is_fetched_from_elsewhere(site):
    for file in site.rglob("*.html"):
        assert not [src for src in Page(file.read_text()).loaded if re.match(r"(https?:)?//", src)]
    for file in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", file.read_text())


def test_source_files_that_pages_link_to_are_shown(site):
    file = "data_modules/movie_reviews.py"
    assert f"source/{file}.html" in (site / "data.html").read_text()
    assert "".join((ROOT / file).read_text().split()) in text_of(site, "source", f"{file}.html")


@pytest.fixture
def address(site):
    """Serve the site."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_pages_in_a_browser(site, address):
    """As wide as a phone no page is wider, every image is there and has a text, and text stands out."""
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    probe = (ROOT / "tests" / "support" / "probe.html").read_text()
    (site / "probe.html").write_text(probe.replace("PAGES", json.dumps(pages), 1))
    index = site / "search" / "search_index.json"  # each page reads it anew, which takes seconds
    index.write_text(json.dumps({**json.loads(index.read_text()), "docs": []}))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    options += ("--window-size=1280,900", "--virtual-time-budget=600000", "--dump-dom")
    command = ["chromium", *options, f"{address}/probe.html"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    (site / "probe.html").unlink()
    assert not [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    body = re.search(r"<body[^>]*>(.*?)</body>", ran.stdout, re.DOTALL)
    seen = json.loads(unescape(body[1]))
    assert sorted(seen) == pages
    for page, result in seen.items():
        assert result.pop("width") <= 390, page
        assert not any(result.values()), (page, result)
