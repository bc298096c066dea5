"""What `mkdocs build` does beside the pages of docs/: pages from other files, and links between all of them."""

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the reference is made from the project's own classes

import options  # noqa: E402

OUTSIDE = {
    "index.md": "README.md",
    "results.md": "RESULTS.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "license.md": "LICENSE",
    "citation.md": "CITATION.cff",
}
"""Pages of the site that are files at the root of the project."""

CONFIGURATIONS = "reference/configurations.md"
API = (
    "app.cli",
    "app.commands",
    "app.training",
    "app.evaluation",
    "app.initialization",
    "app.tracking",
    "app.models",
)
API += ("app.optim", "app.distributed", "app.utils", "callbacks", "data_modules")
OPTION = re.compile(r"(<pre\b.*?</pre>|<[^>]*>)|(?<![\w-])--\w+", re.DOTALL)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def is_relative(target: str) -> bool:
    """Return whether a link leads to a file of the project."""
    return not re.match(r"\w+:", target)


def origin(page: str) -> str:
    """Return the project's file that a page is made of."""
    return OUTSIDE.get(page, f"docs/{page}")


def anchor(path: str) -> str:
    """Return the anchor of a file of configs/ on the page of configurations."""
    return re.sub(r"\W+", "-", path.removeprefix("configs").removesuffix(".yaml").strip("/"))


def place(path: str) -> str:
    """Return where the site has a file of the project, given relative to its root."""
    for page, file in OUTSIDE.items():
        if path == file:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    if path.startswith("configs"):
        return f"{CONFIGURATIONS}#{anchor(path)}".removesuffix("#")
    return f"source/{path}.md"


def linked_files(text: str, page: str) -> set[str]:
    """Return the project's files that a page links to."""
    folder = posixpath.dirname(origin(page))
    targets = (found[2] for found in LINK.finditer(text))
    return {
        posixpath.normpath(posixpath.join(folder, each)) for each in targets if is_relative(each)
    }


def rewritten(text: str, page: str) -> str:
    """Return a page's text with links as the site needs them."""
    folder, here = posixpath.dirname(origin(page)), posixpath.dirname(page) or "."

    def link(found: re.Match[str]) -> str:
        if not is_relative(found[2]):
            return found[0]
        target = place(posixpath.normpath(posixpath.join(folder, found[2])))
        return found[1] + posixpath.relpath(target, here) + found[3]

    return LINK.sub(link, text)


def source_page(path: str) -> str:
    """Return a page that shows a file of the project."""
    kind = {".py": "python", ".sh": "bash", ".cff": "yaml"}.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{kind}\n{(ROOT / path).read_text().rstrip()}\n````\n"


def configurations_page() -> str:
    """Return a page with every file of configs/: its first comment as text, then the rest."""
    folders = {
        "": "Complete runs",
        "methods": "Methods",
        "models": "Models",
        "strategies": "Strategies",
        "callbacks": "Callbacks",
        "eval": "Benchmarks",
        "theory": "Theory",
    }
    parts = [
        "# Configurations",
        "Every file of `configs/`. How they are put together: [runs](../runs.md#settings).",
    ]
    for folder, title in folders.items():
        parts.append(f"## {title} {{#{folder or 'runs'}}}")
        for file in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            head = re.match(r"(?:#.*\n)*", text := file.read_text())
            assert head is not None
            path = f"{folder}/{file.name}".lstrip("/")
            parts.append(f"### {path} {{#{anchor(path)}}}")
            lines = [line.lstrip("# ") for line in head[0].splitlines()]
            if lines[0].startswith("python "):
                parts.append(f"```bash\n{lines.pop(0)}\n```")
            parts.append(" ".join(lines).replace("*", r"\*"))
            parts.append(f"```yaml\n{text[head.end() :].rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def api_page(package: str) -> str:
    """Return a page of a package's modules for mkdocstrings."""
    folder = ROOT / package.replace(".", "/")
    modules = sorted(file for file in folder.rglob("*.py") if file.name != "__init__.py")
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in modules]
    return "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)]) + "\n"


def notebook_page(path: Path) -> str:
    """Return a page of a notebook's cells and what they print; a cell's metadata has `alt` of its picture."""
    parts = []
    for each in json.loads(path.read_text())["cells"]:
        text = "".join(each["source"])
        parts.append(text if each["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in each.get("outputs", []):
            data = output.get("data", {})
            if picture := data.get("image/png"):
                parts.append(
                    f"![{each['metadata']['alt']}](data:image/png;base64,{picture.strip()})"
                )
            elif printed := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {page: source_page(file) for page, file in OUTSIDE.items() if not file.endswith(".md")}
    pages |= {
        page: (ROOT / file).read_text() for page, file in OUTSIDE.items() if file.endswith(".md")
    }
    pages |= options.option_pages()
    pages |= {f"reference/api/{package}.md": api_page(package) for package in API}
    pages[CONFIGURATIONS] = configurations_page()
    pages["notebook.md"] = notebook_page(ROOT / "docs" / "notebook.ipynb")
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for path in sorted(
        set().union(
            *(linked_files(f.content_string, f.src_uri) for f in files.documentation_pages())
        )
    ):
        page = place(path)
        if page.startswith("source/") and (ROOT / path).is_file():
            content = source_page(path)
            files.append(
                File.generated(config, page, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page, and say how it is shown and found."""
    uri = page.file.src_uri
    if uri in ("index.md", "results.md"):
        page.meta["hide"] = [
            "navigation"
        ]  # a page alone in its tab needs no list of pages beside it
    if uri in ("reference/trainer.md", "reference/output.md"):
        page.meta["hide"] = ["toc"]  # tables alone, which take its place
    if uri.startswith("reference/api/"):
        page.meta["search"] = {"boost": 0.2}  # guides come first
    return rewritten(markdown, uri)


def on_page_content(html: str, **_: Any) -> str:
    """Keep the hyphens of an option with its name: a browser would break the line behind them."""
    return OPTION.sub(lambda found: found[1] or f'<span class="option">{found[0]}</span>', html)
