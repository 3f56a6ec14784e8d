"""Build the training and held-out text for the bundled models.

Text comes only from permissively licensed packages (PSF, BSD, MIT, Apache-2.0 and alike), fetched by
name with ``pip download`` (wheels) and ``apt-get download`` (documentation and the Python standard
library).  Files are cleaned, filtered, deduplicated and split by whole package or whole document.

Writes into OUT:
  train.txt.xz     training documents, UTF-8, each preceded by one NUL character
  heldout.txt      a sample of held-out documents (plain text) that ships with the models
  PROVENANCE.json  package, version, licence, number of files and characters, sha256 of the texts
"""

import argparse
import collections
import email.parser
import gzip
import hashlib
import html.parser
import io
import json
import lzma
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
import zlib

# licence -> packages.  Every package is checked again against its own metadata (see `declared_licence`).
WHEELS = {
    "BSD-3-Clause": """numpy scipy pandas scikit-learn sympy networkx statsmodels scikit-image seaborn bokeh dask
        distributed flask jinja2 werkzeug click django djangorestframework wagtail ipython notebook
        jupyter-client jupyter-server nbconvert traitlets ipykernel numba torchvision mne nilearn astropy sunpy yt
        rdflib shapely geopandas metpy pint httpx httpcore starlette uvicorn scrapy sphinx babel
        pygments imageio reportlab xlsxwriter markdown cartopy pyomo celery kombu""",
    "MIT": """sqlalchemy alembic pytest attrs urllib3 twisted fastapi pydantic gunicorn trio anyio pip setuptools poetry
        hatch tox black mypy rich textual typer optuna redis peewee pymysql fonttools openpyxl beautifulsoup4 nibabel
        pydicom spacy gymnasium stable-baselines3 simpy jedi parso pycodestyle pyflakes marshmallow langchain-core
        azure-core django-extensions virtualenv lark heat""",
    "Apache-2.0": """requests aiohttp tornado nox cython jax flax transformers lightning accelerate diffusers
        datasets peft huggingface-hub mlflow-skinny pymongo boto3 docker pymc arviz cvxpy qiskit cirq-core pennylane
        coverage nltk xarray mesa nova cinder neutron keystone glance swift homeassistant apache-airflow-core
        structlog cryptography""",
    "PSF-2.0": "matplotlib",
    "Biopython License Agreement OR BSD-3-Clause": "biopython",
}
DEBS = {
    "PSF-2.0": "libpython3.11-minimal libpython3.11-stdlib libpython3.11-testsuite python3.11-doc",
    "BSD-3-Clause": """python-django-doc python-scipy-doc python-pandas-doc python-sklearn-doc python-sympy-doc
        python-flask-doc python-werkzeug-doc python-click-doc python-jinja2-doc python-dask-doc python-distributed-doc
        python-statsmodels-doc python-skimage-doc python-astropy-doc python-scrapy-doc python-h5py-doc python-babel-doc
        python-ipython-doc python-notebook-doc python-nbconvert-doc python-traitlets-doc python-djangorestframework-doc
        python-pygments-doc sphinx-doc python-qutip-doc python-tables-doc python-rdflib-doc
        python-toolz-doc python-mpmath-doc cmake-doc dpdk-doc varnish-doc""",
    "MIT": """python-sqlalchemy-doc python-pytest-doc python-attr-doc python-gevent-doc python-setuptools-doc
        python-mako-doc python-structlog-doc twisted-doc python-pyqtgraph-doc python-fonttools-doc python-lark-doc
        python-nibabel-doc python-discord-doc python-peewee-doc nodejs-doc xorg-docs""",
    "Apache-2.0": """python-requests-doc python-tornado-doc python-aiohttp-doc python-xarray-doc python-cryptography-doc
        python-pymongo-doc python-elasticsearch-doc python-openstacksdk-doc apache2-doc tomcat10-docs
        erlang-doc""",
    "Apache-2.0 WITH LLVM-exception": "llvm-14-doc clang-14-doc",
    "PostgreSQL": "postgresql-doc-15",
    "MIT OR Apache-2.0": "rust-doc",
    "BSL-1.0": "libboost1.81-doc",
    "blessing (public domain)": "sqlite3-doc",
}
HELD_PACKAGES = {"flask", "requests", "structlog", "python-flask-doc", "python-requests-doc", "python-structlog-doc"}
HELD_STDLIB = re.compile(r"(^|[/_.])(asyncio|email|http|json|logging|xml)([/_.-]|$)")
HELD_ONE_IN = 100  # of the other documents of at least HELD_MIN characters
HELD_MIN = 4000
QUOTA = {"stdlib": 110_000, "code": 80_000, "pydoc": 80_000, "docs": 110_000}  # characters in heldout.txt

COPYLEFT = re.compile(
    r"GNU\s+(Lesser|Library|Affero|General|Free)|\b[AL]?GPL(v?[23])?\b|\bGFDL\b|Mozilla Public|\bMPL\b|"
    r"Creative\s?Commons|\bCC[- ]BY|Eclipse Public|CeCILL|ShareAlike|non-?commercial",
    re.I,
)
DENIED = re.compile(r"GPL|GFDL|MPL|Mozilla|\bCC-|Creative Commons|Eclipse|EPL|CeCILL", re.I)
SKIP_PATH = re.compile(
    r"(^|/)(_vendor|vendored?|externals?|third_party|_modules|generated|locale|migrations|"
    r"whatsnew|changelog|release[-_]?notes?|_static|src|core_arch|arch|translations|"
    r"manual/(da|de|es|fr|ja|ko|pt-br|ru|tr|zh-cn))(/|$)|"
    r"(genindex|modindex|changelog|changes|history|news|release|print|search|license|copying|authors|all|toc|index-all|"
    r"hierarchy|classes|inherits|functions\w*|globals\w*|_8\w+_source|-members)(-\w+)?"
    r"(\.rst|\.md)?(\.txt|\.html?|\.xhtml)$",
    re.I,
)
GENERATED = re.compile(r"do not edit|auto-?generated|generated by|code generated", re.I)
LANGUAGE_SUFFIX = re.compile(r"\.html\.(?!en)[a-z-]+(\.[\w-]+)?$")
CAP_CODE, CAP_DOCS = 2_200_000, 6_000_000  # characters kept per package
RAW_CODE, RAW_DOCS = 4_000_000, 60_000_000  # bytes read per package

Doc = collections.namedtuple("Doc", "package path kind text")


class HtmlText(html.parser.HTMLParser):
    """Reduce an HTML page to text: paragraphs wrapped at 88 columns, <pre> blocks indented and kept as they are."""

    DROP = {"script", "style", "nav", "head", "header", "footer", "svg", "button", "form"}
    DROP_CLASS = re.compile(
        r"sidebar|related|footer|headerlink|nav(header|footer|bar)|toc|breadcrumb|menu|anchor-link|linenos"
    )
    BLOCK = {"p", "div", "section", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "br", "hr", "article", "main"}
    BLOCK |= {"h1", "h2", "h3", "h4", "h5", "h6", "blockquote"}
    VOID = {"br", "hr", "img", "input", "meta", "link", "col", "area", "wbr", "source"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out, self.buf, self.pre, self.drop = [], [], 0, []

    def flush(self, prefix=""):
        text = " ".join("".join(self.buf).split())
        self.buf = []
        if text and text != prefix.strip():
            indent = "  " if text.startswith("* ") else ""
            lines = textwrap.wrap(text, 88, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            self.out.append("\n".join(lines))

    def handle_starttag(self, tag, attrs):
        if self.drop:
            if tag == self.drop[0]:
                self.drop.append(tag)
            return
        classes = dict(attrs).get("class") or ""
        if tag not in self.VOID and (tag in self.DROP or self.DROP_CLASS.search(classes.lower())):
            self.drop.append(tag)
        elif tag == "pre":
            self.flush()
            self.pre += 1
        elif not self.pre and tag in self.BLOCK:
            self.flush()
            if tag == "li":
                self.buf.append("* ")
        elif not self.pre and tag in ("td", "th"):
            self.buf.append("  ")

    def handle_endtag(self, tag):
        if self.drop:
            if tag == self.drop[0]:
                self.drop.pop()
        elif tag == "pre" and self.pre:
            self.pre -= 1
            code = "".join(self.buf).expandtabs().strip("\n").rstrip()
            self.buf = []
            if code:
                self.out.append(textwrap.indent(textwrap.dedent(code), "    "))
        elif not self.pre and tag in self.BLOCK:
            self.flush()

    def handle_data(self, data):
        if not self.drop:
            self.buf.append(data)


def html_text(page):
    """Text of an HTML page (str -> str)."""
    parser = HtmlText()
    parser.feed(page)
    parser.flush()
    return "\n\n".join(parser.out)


def clean(path, raw):
    """Decode and clean one file; return its text, or None where it is not worth learning."""
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").expandtabs()
    except UnicodeDecodeError:
        return None
    if COPYLEFT.search(text) or (path.endswith(".py") and GENERATED.search(text[:2000])):
        return None
    if re.search(r"\.x?html?(\.en)?(\.utf8)?$", path):
        text = html_text(text)
    if path.endswith(".py"):  # licence headers are the same everywhere
        text = re.sub(r"\A(?:#.*\n|\s*\n)*", lambda m: "" if re.search("copyright|licen[cs]e", m[0], re.I) else m[0], text)
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip() + "\n"
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    n = len(text)
    if not 500 <= n <= 200_000 or any(ord(c) < 32 and c != "\n" for c in text):
        return None
    lines = text.split("\n")
    letters = sum(c.isalpha() and c.isascii() for c in text)
    if (
        letters < 0.5 * n
        or sum(map(len, lines)) > 100 * len(lines)
        or max(map(len, lines)) > 1500
        or sum(c.isdigit() for c in text) > 0.12 * n
        or sum(not c.isascii() for c in text) > 0.03 * n
    ):
        return None
    if re.search(r"[A-Za-z0-9+/=]{160,}", text) or n > 9 * len(zlib.compress(text.encode(), 6)):
        return None
    return text


def clean_job(job):
    path, raw = job
    return clean(path, raw)


def deb_files(path):
    """Yield (member path, bytes) of a Debian package's text files; gzip members are unpacked."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            if member.isfile():
                raw, name = archive.extractfile(member).read(), member.name.removeprefix("./")
                if name.endswith(".gz"):
                    raw, name = gzip.decompress(raw), name.removesuffix(".gz")
                yield name, raw


def wheel_files(path):
    """Yield (member path, bytes) of a wheel."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            yield name, archive.read(name)


def declared_licence(files):
    """The licence that the package itself declares (wheel METADATA or Debian copyright file), as text."""
    for name, raw in files.items():
        if name.endswith(".dist-info/METADATA"):
            meta = email.parser.Parser().parsestr(raw.decode("utf-8", "replace"), headersonly=True)
            names = [c.split("::")[-1].strip() for c in meta.get_all("Classifier", []) if c.startswith("License ::")]
            return (meta["License-Expression"] or "; ".join(names) or (meta["License"] or "").split("\n")[0])[:120]
        if re.search(r"usr/share/doc/[^/]+/copyright$", name):
            found = re.search(r"^Files:\s*\*\s*$.*?^License:\s*(.+?)$", raw.decode("utf-8", "replace"), re.M | re.S)
            return found[1].strip()[:120] if found else "see the package's copyright file"
    return "see the package's copyright file"


def fetch(names, folder, tool):
    """Download packages by name into folder/<name>/ with pip or apt-get; yield (name, file)."""
    for name in names:
        target = folder / name
        if not target.is_dir() or not any(target.iterdir()):
            target.mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "download", "-q", name]
            if tool == "wheel":
                options = ["-q", "--no-deps", "--only-binary=:all:", "--python-version=3.13"]
                command = [sys.executable, "-m", "pip", "download", *options, name]
            done = subprocess.run(command, cwd=target, capture_output=True, text=True)
            if done.returncode:
                print(f"skipped {name}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:150]}", file=sys.stderr)
                continue
        files = sorted(p for p in target.iterdir() if p.suffix in (".deb", ".whl"))
        if files:
            yield name, files[0]


def wanted(name, files, tool):
    """The members to read, [(path, bytes)], and their kind."""
    if tool == "wheel" or name.startswith("libpython"):
        kind = "stdlib" if name.startswith("libpython") else "code"
        pick = [(p, r) for p, r in files.items() if p.endswith((".py", ".md", ".rst")) and ".dist-info/" not in p]
    else:
        kind = "pydoc" if name == "python3.11-doc" else "docs"
        pick = [(p, r) for p, r in files.items() if "/_sources/" in p and p.endswith(".txt")]
        if not pick:
            pick = [
                (p, r)
                for p, r in files.items()
                if re.search(r"\.(x?html?|html\.en(\.utf8)?|rst|md)$", p) and not LANGUAGE_SUFFIX.search(p)
            ]
    sources = {p.removesuffix(".md") for p, _ in pick if p.endswith(".md")}  # better than the page made of it
    pick = [
        (p, r)
        for p, r in pick
        if not SKIP_PATH.search(p) and 500 < len(r) < 1_500_000 and p.removesuffix(".html") not in sources
    ]
    pick.sort(key=lambda f: hashlib.sha256(f"{name}/{f[0]}".encode()).digest())
    kept, size = [], 0
    limit = RAW_CODE if kind == "code" else RAW_DOCS
    for p, r in pick:
        if size < limit:
            kept.append((p, r))
            size += len(r)
    return kept, kind


def is_held(name, path, kind, text):
    """True where a document belongs to the held-out part."""
    if name in HELD_PACKAGES or (kind in ("stdlib", "pydoc") and HELD_STDLIB.search(path)):
        return True
    digest = hashlib.sha256(f"held/{name}/{path}".encode()).digest()
    return kind == "docs" and len(text) >= HELD_MIN and int.from_bytes(digest[:4], "big") % HELD_ONE_IN == 0


def long_lines(text):
    return {hash(line.strip()) for line in text.split("\n") if len(line.strip()) >= 24}


def deduplicate(docs, against, limit, store):
    """Drop documents whose share of long lines already in a set of `against` is above its `limit`."""
    for doc in docs:
        lines = long_lines(doc.text)
        if lines and all(len(lines & seen) <= share * len(lines) for seen, share in zip(against, limit)):
            store |= lines
            yield doc


def sample_heldout(held):
    """Whole held-out documents of every kind, in hash order within a kind, QUOTA characters each."""
    out = []
    for kind, quota in QUOTA.items():
        docs = sorted(
            (d for d in held if d.kind == kind and 2500 <= len(d.text) <= 24_000 and "/test" not in d.path),
            key=lambda d: hashlib.sha256(d.path.encode()).digest(),
        )
        for doc in docs:
            if quota >= len(doc.text):
                out.append(doc)
                quota -= len(doc.text)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder for the texts and the manifest")
    parser.add_argument("--downloads", type=pathlib.Path, required=True, help="folder that keeps the downloaded packages")
    parser.add_argument("--max-chars", type=int, default=250_000_000, help="training text at most (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that clean text (default: %(default)s)")
    args = parser.parse_args()
    if args.max_chars <= 0 or args.jobs <= 0:
        parser.error("--max-chars and --jobs must be positive")
    args.out.mkdir(parents=True, exist_ok=True)

    docs, manifest = [], {}
    with multiprocessing.Pool(args.jobs) as pool:
        for tool, table, reader in (("deb", DEBS, deb_files), ("wheel", WHEELS, wheel_files)):
            for licence, names in table.items():
                for name, path in fetch(sorted(names.split()), args.downloads / tool, tool):
                    files = dict(reader(path))
                    declared = declared_licence(files)
                    if DENIED.search(declared):
                        print(f"skipped {name}: declares {declared!r}", file=sys.stderr)
                        continue
                    pick, kind = wanted(name, files, tool)
                    texts = pool.map(clean_job, pick, chunksize=16)
                    cap, kept = (CAP_DOCS if kind in ("docs", "pydoc") else CAP_CODE), []
                    if kind == "stdlib" or name in HELD_PACKAGES:
                        cap = 1 << 40
                    for (member, _), text in zip(pick, texts):
                        if text and cap > 0:
                            kept.append(Doc(name, member, kind, text))
                            cap -= len(text)
                    version = path.name.split("_" if tool == "deb" else "-")[1].replace("%3a", ":")
                    counts = dict(train_files=0, train_chars=0, heldout_files=0, heldout_chars=0)
                    manifest[f"{tool}:{name}"] = dict(version=version, licence=licence, declared=declared, **counts)
                    docs += sorted(kept, key=lambda d: d.path)
                    size = sum(len(d.text) for d in kept) / 1e6
                    print(f"{name} {version} {declared[:40]!r}: {len(kept)} files, {size:.2f} MB", flush=True)

    held_lines, seen = set(), set()
    held = list(deduplicate((d for d in docs if is_held(*d)), [held_lines], [0.5], held_lines))
    train, size = [], 0
    for doc in deduplicate((d for d in docs if not is_held(*d)), [held_lines, seen], [0.2, 0.5], seen):
        if size + len(doc.text) <= args.max_chars:
            train.append(doc)
            size += len(doc.text)
    shipped = sample_heldout(held)
    for part, chosen in (("train", train), ("heldout", shipped)):
        for doc in chosen:
            entry = manifest[("wheel:" if doc.kind == "code" else "deb:") + doc.package]
            entry[f"{part}_files"] += 1
            entry[f"{part}_chars"] += len(doc.text)

    text = "".join("\0" + d.text for d in train).encode()
    heldout = "\n\n".join(d.text for d in shipped).encode()
    filters = [dict(id=lzma.FILTER_LZMA2, preset=6, dict_size=1 << 26)]
    with lzma.open(args.out / "train.txt.xz", "wb", filters=filters) as file:
        file.write(text)
    (args.out / "heldout.txt").write_bytes(heldout)
    kinds = collections.Counter()
    for doc in train:
        kinds[doc.kind] += len(doc.text)
    summary = dict(
        train=dict(files=len(train), bytes=len(text), sha256=hashlib.sha256(text).hexdigest(), chars_by_kind=dict(kinds)),
        heldout=dict(
            files=len(shipped),
            bytes=len(heldout),
            sha256=hashlib.sha256(heldout).hexdigest(),
            documents=[dict(package=d.package, path=d.path, chars=len(d.text)) for d in shipped],
        ),
        packages={k: v for k, v in manifest.items() if v["train_files"] or v["heldout_files"]},
    )
    (args.out / "PROVENANCE.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({k: {a: b for a, b in summary[k].items() if a != "documents"} for k in ("train", "heldout")}))


if __name__ == "__main__":
    main()
