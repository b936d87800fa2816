"""Build the book: execute every notebook of _toc.yml, stage the sources, run Jupyter Book.

    python book/build.py --profile smoke|quick|full     what `make book` calls
    python book/build.py --export-colab DIR             write the notebooks that Colab opens, without outputs
    python book/build.py --write-readme                 bring the README's tables and figure up to date

Everything is written under _build/<profile>: executed/ (notebooks with outputs, re-used while nothing they depend on
changes), src/ (what Jupyter Book reads), site/_build/html (the site), status.json (times, versions, hardware).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbformat import NotebookNode

import api
import landing
import light
import links
import pages
import polish
from bilevel_core.lab import files, parameters, results
from bilevel_core.lab.explorers.worker import pack_script, runtime
from bilevel_core.lab.studies import live_figures
from meter import PeakMemory

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ("smoke", "quick", "full")  # those that every notebook has
UNFILLED = 'REPOSITORY, REF = "", ""'
COLAB = "https://colab.research.google.com"
COLAB_BADGE = f"{COLAB}/assets/colab-badge.svg"  # what the notebooks on Colab show
SITE_BADGE = "../book/colab-badge.svg"  # what the site shows: it fetches nothing from elsewhere
# Without the menu and what it opens, 0.4 MB of 1.2; names of components: `mathjax3_config` of _config.yml
MATHJAX_PARTS = (
    "startup.js",
    "core.js",
    "input/tex.js",
    "input/tex/extensions",
    "output/chtml.js",
    "output/chtml/fonts",
)
MATHJAX_PARTS += ("a11y/assistive-mml.js",)
WIDGET = "application/vnd.jupyter.widget-view+json"


class BuildError(Exception):
    """The build cannot go on; the message is for the person who started it."""


# ---------------------------------------------------------------- the public address


@dataclass(frozen=True)
class Address:
    """Where readers find the repository, the commit this build publishes, and the branch of Colab's notebooks."""

    url: str
    ref: str
    branch: str

    def colab(self, name: str) -> str | None:
        """The page of Colab that opens notebook `name`; None where the repository is not on GitHub."""
        where = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", self.url)
        return f"{COLAB}/github/{where[1]}/blob/{self.branch}/notebooks/{name}.ipynb" if where else None


def find_address(config: dict[str, Any]) -> Address | None:
    """The address: on GitHub the environment's, else `repository: url` of _config.yml; None where that is empty."""
    repository = config.get("repository") or {}
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    url = f"{server}/{name}" if server and name else repository.get("url")
    if not url:
        return None
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        ref = os.environ.get("GITHUB_SHA") or subprocess.check_output(head, text=True).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the address {url} is set, but this is no git checkout to take the commit from") from error
    return Address(url, ref, repository.get("branch") or "colab")


# ---------------------------------------------------------------- notebooks


def chapters(toc: dict[str, Any]) -> list[str]:
    """Names of the notebooks in the table of contents, in its order."""

    def files(node: Any) -> Iterator[str]:
        if isinstance(node, dict) and "file" in node:
            yield node["file"]
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from files(child)

    names = [file.removeprefix("notebooks/") for file in files(toc) if file.startswith("notebooks/")]
    missing = [name for name in names if not (NOTEBOOKS / f"{name}.ipynb").is_file()]
    if missing:
        raise BuildError(f"_toc.yml names notebooks that do not exist: {', '.join(missing)}")
    return names


def tagged(nb: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells of a notebook that carry a tag."""
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", ())]


def dress(nb: NotebookNode, name: str, address: Address | None, badge: str) -> NotebookNode:
    """Fill in the set-up cell's address and put the Colab badge under the title. Without an address: nothing."""
    if address is None:
        return nb
    for cell in tagged(nb, "setup"):
        if UNFILLED not in cell.source:
            raise BuildError(f"{name}: the set-up cell has no line {UNFILLED}")
        cell.source = cell.source.replace(UNFILLED, f'REPOSITORY, REF = "{address.url}", "{address.ref}"', 1)
    url = address.colab(name)
    if url:
        title, _, rest = nb.cells[0].source.partition("\n")
        nb.cells[0].source = f"{title}\n\n[![Open in Colab]({badge})]({url})\n{rest}"
    return nb


def clean(nb: NotebookNode) -> NotebookNode:
    """Make an executed notebook fit to be published.

    Drops papermill's paths and time stamps and whatever would be a dead control without a kernel; hides papermill's
    cell of parameters where it repeats the defaults.
    """
    nb.metadata.pop("papermill", None)
    nb.metadata.pop("widgets", None)
    defaults: dict[str, Any] = {}
    for cell in nb.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            defaults = parameters.literals(cell.source) or {}
        if "injected-parameters" in tags:
            given = parameters.literals(cell.source) or {}
            if all(name in defaults and defaults[name] == value for name, value in given.items()):
                cell.metadata["tags"] = [*tags, "remove-cell"]
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return nb


def digest(*paths: Path) -> str:
    """Hash of files and of everything in folders, except caches of Python."""
    sha = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                sha.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode())
                sha.update(file.read_bytes())
    return sha.hexdigest()


def depends_on(name: str, profile: str) -> str:
    """Hash of what a notebook's outputs depend on, except the recorded results, which it may write itself."""
    files = digest(NOTEBOOKS / f"{name}.ipynb", NOTEBOOKS / "profiles" / profile, ROOT / "bilevel_core")
    packages = sorted(f"{d.name}={d.version}" for d in importlib.metadata.distributions())
    rest = [sys.version, *packages, os.environ.get("BILEVEL_DATA", "")]
    return hashlib.sha256("\n".join([files, *rest]).encode()).hexdigest()


@dataclass(frozen=True)
class Executed:
    """An executed notebook: seconds and the peak of its memory (GiB) when it was executed; whether it is re-used."""

    path: Path
    seconds: float
    peak: float
    reused: bool


def execute(name: str, profile: str, out: Path, force: bool) -> Executed:
    """Execute a notebook with a profile, or re-use what an earlier build made of the same inputs.

    Raises BuildError with the cell, its error and the place of the partly executed notebook.
    """
    source, values = NOTEBOOKS / f"{name}.ipynb", NOTEBOOKS / "profiles" / profile / f"{name}.yaml"
    done, record, partial = (out / f"{name}{end}" for end in (".ipynb", ".json", ".partial.ipynb"))
    if not values.is_file():
        raise BuildError(f"{name} has no parameters for this profile: {values.relative_to(ROOT)} is missing")
    inputs = depends_on(name, profile)
    if not force and done.is_file() and record.is_file():
        known = json.loads(record.read_text())
        if known.get("peak") and known["key"] == [inputs, digest(ROOT / "book" / "results"), digest(done)]:
            return Executed(done, known["seconds"], known["peak"], True)
    out.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    begin = time.perf_counter()
    try:
        with PeakMemory() as memory:
            papermill.execute_notebook(
                str(source),
                str(partial),
                parameters=yaml.safe_load(values.read_text()),
                kernel_name="python3",
                language="python",
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                log_output=False,
                extra_arguments=["--log-level=CRITICAL"],  # of the kernel: no advice about its sockets on the terminal
            )
    except papermill.PapermillExecutionError as error:
        raise BuildError(describe(name, error, partial)) from None
    except Exception as error:  # a kernel that died, a parameter papermill cannot pass
        where = f"\nThe notebook so far: {partial}" if partial.is_file() else ""
        raise BuildError(f"{name} failed outside its cells: {type(error).__name__}: {error}{where}") from error
    seconds = time.perf_counter() - begin
    nb = clean(nbformat.read(partial, as_version=4))
    files.write_atomic(done, nbformat.writes(nb).encode())
    partial.unlink()
    key = [inputs, digest(ROOT / "book" / "results"), digest(done)]
    peak = memory.bytes / 2**30
    files.write_atomic(record, json.dumps({"key": key, "seconds": seconds, "peak": peak}).encode())
    return Executed(done, seconds, peak, False)


def _end_with_parent(parent: int) -> None:
    """Lets this process end soon after its parent: one that was killed tells nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def execute_all(names: list[str], profile: str, out: Path, force: bool, workers: int) -> dict[str, Executed]:
    """`execute` for each notebook, `workers` at a time, a line for each as it is done; in the order of `names`.

    Raises the first BuildError when those that had begun are done.
    """
    done, width = {}, max(map(len, names), default=0)

    def tell(name: str, one: Executed | None) -> None:
        said = f"{one.seconds:7.1f} s {one.peak:5.2f} GiB{'  (reused)' if one.reused else ''}" if one else "FAILED"
        print(f"[{len(done) + 1}/{len(names)}] {name:<{width}}  {profile:<5} {said}", flush=True)

    options = {"mp_context": get_context("spawn"), "initializer": _end_with_parent, "initargs": (os.getpid(),)}
    with ProcessPoolExecutor(workers, **options) as pool:
        tasks = {pool.submit(execute, name, profile, out, force): name for name in names}
        for task in as_completed(tasks):
            try:
                one = task.result()
            except Exception:
                tell(tasks[task], None)
                pool.shutdown(cancel_futures=True)
                raise
            tell(tasks[task], one)
            done[tasks[task]] = one
    return {name: done[name] for name in names}


def describe(name: str, error: papermill.PapermillExecutionError, partial: Path) -> str:
    """A failed cell for a person: which one, how it begins, what it raised, where to look."""
    lines = error.source.strip().splitlines()
    head = "\n".join(f"    {line}" for line in lines[:8]) + ("\n    ..." if len(lines) > 8 else "")
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip().splitlines()
    tail = "\n".join(f"    {line}" for line in trace[-20:])
    return (
        f"notebooks/{name}.ipynb failed in code cell [{error.exec_count}], which begins\n{head}\n"
        f"with {error.ename}: {error.evalue}\n{tail}\nThe notebook so far: {partial}"
    )


# ---------------------------------------------------------------- the site


def stage(
    src: Path, config: dict[str, Any], executed: dict[str, Path], address: Address | None, written: dict[str, str]
) -> None:
    """Lay out in `src` everything that Jupyter Book reads. written: what stands for each comment <!-- name -->."""
    shutil.rmtree(src, ignore_errors=True)
    (src / "notebooks").mkdir(parents=True)
    left_out = shutil.ignore_patterns("*.py", "*.js", "print.css", "__pycache__", "results")
    shutil.copytree(ROOT / "book", src / "book", ignore=left_out)
    for page in (src / "book").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, content in written.items():
            text = text.replace(f"<!-- {name} -->", content)
        page.write_text(text, encoding="utf-8")
    for name, path in executed.items():
        nb = dress(nbformat.read(path, as_version=4), name, address, SITE_BADGE)
        for cell in tagged(nb, "setup"):  # for Colab: in what is downloaded, not on the page
            cell.metadata["tags"].append("remove-cell")
        nbformat.write(nb, src / "notebooks" / f"{name}.ipynb")
    shutil.copy(ROOT / "_toc.yml", src)
    vendor_mathjax(src / "_vendor" / "jslib" / "mathjax")
    write_live(src / "_vendor" / "live")
    shutil.move(src / "book" / "site.css", src / "_vendor" / "site.css")
    shutil.copy(ROOT / "book" / "site.js", src / "_vendor")
    shutil.copy(ROOT / "book" / "search.js", src)
    config = {**config, "repository": {"url": address.url if address else "", "branch": "colab"}}
    if address is None or address.colab("") is None:
        config.pop("launch_buttons", None)
    else:
        config["repository"]["branch"] = address.branch
        config["html"] = {**config.get("html", {}), "use_repository_button": True}
    (src / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def vendor_mathjax(target: Path) -> None:
    """Copy MathJax 3 from the installed package sphinx-mathjax-offline: mathematics renders without a network."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise BuildError("the package sphinx-mathjax-offline is not installed: pip install -e '.[book]'")
    mathjax = Path(spec.origin).parent / "static" / "mathjax"
    for part in MATHJAX_PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (mathjax / part).is_dir() else shutil.copy
        copy(mathjax / part, target / part)


def write_live(target: Path) -> None:
    """What the live figures' buttons load: the runtime, and each pack of weights, as scripts."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "runtime.js").write_text(runtime()[0], encoding="utf-8")
    for pack in live_figures.pack_files():
        (target / f"{pack.name}.js").write_text(pack_script(pack), encoding="utf-8")


def build_site(src: Path, site: Path, finish: Callable[[Path], None] = lambda html: None) -> Path:
    """Run Jupyter Book with warnings as errors; the site that was there stays until the new one is complete.

    finish  what is still to be done to the new site's folder of pages before it takes the old one's place
    """
    for left in site.parent.glob("site-*"):  # by builds that were killed
        shutil.rmtree(left, ignore_errors=True)
    fresh, old = site.with_name(f"site-new-{os.getpid()}"), site.with_name("site-old")  # theirs may still be written to
    log = site.with_name("jupyter-book.log")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", "-W", "-n", "--keep-going", "--path-output", fresh, src]
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=src.parent).returncode
    html = fresh / "_build" / "html"
    if code or not (html / "index.html").is_file():
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text())
        warnings = [line for line in text.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)]
        shown = "\n".join(warnings or text.splitlines()[-40:])
        raise BuildError(f"Jupyter Book found problems (all of its output: {log}):\n{shown}")
    finish(html)
    if site.exists():
        site.rename(old)
    fresh.rename(site)
    shutil.rmtree(old, ignore_errors=True)
    return site / "_build" / "html" / "index.html"


def offer_clean_notebooks(html: Path, names: list[str], address: Address | None) -> None:
    """The page's download button gives the notebook as it is opened on Colab: no outputs, the address filled in."""
    for name in names:
        nb = dress(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4), name, address, COLAB_BADGE)
        files.write_atomic(html / "_sources" / "notebooks" / f"{name}.ipynb", nbformat.writes(nb).encode())


def write_pages(status: dict[str, Any], names: list[str], address: Address | None) -> dict[str, str]:
    """What the build writes into the pages, by the name of the comment that it replaces."""
    listed = [pages.Chapter.read(NOTEBOOKS / f"{name}.ipynb") for name in names]
    records = pages.results(ROOT / "book" / "results")
    places = [ROOT / "_build" / profile / "status.json" for profile in PROFILES if profile != status["profile"]]
    others = [json.loads(place.read_text()) for place in places if place.is_file()]

    def badge(name: str) -> str:
        url = address.colab(name) if address else None
        return f"[![Open {name} in Colab](colab-badge.svg)]({url})" if url else ""

    full = pages.full_runs(records, names)
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return {
        "api": api.markdown(),
        "changelog": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "citation": pages.citation(cff, address.url if address else None),
        "moving-figure": f"`````{{raw}} html\n{landing.figure()}\n`````",
        "live-figure": f"`````{{raw}} html\n{live_figures.pull().html()}\n`````",
        "chapters": pages.chapter_map(listed, status, full, pages.verdicts(), badge),
        "gpu-plan": pages.gpu_plan(records),
        "status": pages.status_page(status, [other for other in others if "peak_gib" in other], listed, records),
    }


# ---------------------------------------------------------------- the commands


def build(profile: str, force: bool = False, workers: int = 0) -> Path:
    """Build the book at a profile; returns its first page. workers: notebooks at a time; 0: two, of full ones one."""
    begin = time.perf_counter()
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    names = chapters(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    address = find_address(config)
    if address is None:
        print("No public address is set (_config.yml, repository: url): the site shows no Colab badges or buttons.")
    elif address.colab("") is None:
        print(f"{address.url} is not on GitHub, where Colab reads from: the site shows no Colab badges or buttons.")
    else:
        print(f"Colab badges and set-up cells point to {address.url} at {address.ref[:12]}.")
    out = ROOT / "_build" / profile
    os.environ["BILEVEL_STATIC"] = "1"  # the notebooks' explorers emit pages that work without a kernel
    os.environ["BILEVEL_ROOT"] = str(ROOT)
    os.environ.pop("BILEVEL_COLAB", None)
    if profile != "full":  # the small profiles' networks are too small for threads to help
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = workers or (1 if profile == "full" else min(2, os.cpu_count() or 1))
    executed = execute_all(names, profile, out / "executed", force, workers)
    made = results.provenance()
    status = {
        "profile": profile,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": made["commit"],
        "dirty": made["dirty"],
        "seconds": {name: round(done.seconds, 1) for name, done in executed.items()},
        "peak_gib": {name: round(done.peak, 2) for name, done in executed.items()},
        "versions": made["versions"] | {p: importlib.metadata.version(p) for p in ("papermill", "jupyter-book")},
        "hardware": made["hardware"] | {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))},
    }
    print("site  ", end="", flush=True)
    site_begin = time.perf_counter()
    notebooks = {name: done.path for name, done in executed.items()}
    stage(out / "src", config, notebooks, address, write_pages(status, names, address))

    def finish(html: Path) -> None:
        offer_clean_notebooks(html, names, address)
        polish.polish(html)
        links.link(html)
        light.lighten(html)
        status["page_bytes"] = pages.fill_sizes(html, names)

    try:
        page = build_site(out / "src", out / "site", finish)
    except BuildError:
        print("FAILED", flush=True)
        raise
    status["site_seconds"] = round(time.perf_counter() - site_begin, 1)
    files.write_atomic(out / "status.json", json.dumps(status, indent=1).encode())
    print(f"{status['site_seconds']:.1f} s; in all {time.perf_counter() - begin:.1f} s")
    print(f"Open {page.as_uri()}")
    return page


def export_colab(folder: Path) -> None:
    """Write the notebooks as Colab opens them: clean, with the address and commit filled in and the badge in place."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    address = find_address(config)
    if address is None:
        raise BuildError("no public address is set: put it into _config.yml, repository: url")
    names = chapters(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for name in names:
        nb = dress(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4), name, address, COLAB_BADGE)
        files.write_atomic(folder / "notebooks" / f"{name}.ipynb", nbformat.writes(nb).encode())
    listing = "\n".join(f"- [{name}]({address.colab(name) or f'notebooks/{name}.ipynb'})" for name in names)
    readme = (
        f"# Notebooks of the book, for Colab\n\nWritten by the workflow that publishes the book, from commit "
        f"{address.ref} of {address.url}; do not edit them here. Each clones that commit when it runs.\n\n{listing}\n"
    )
    files.write_atomic(folder / "README.md", readme.encode())
    print(f"{len(names)} notebooks for {address.url} at {address.ref} in {folder}")


def write_readme() -> None:
    """Bring the README's tables of chapters and results and its figure up to date."""
    names = chapters(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    listed = [pages.Chapter.read(NOTEBOOKS / f"{name}.ipynb") for name in names]
    readme = ROOT / "README.md"
    claims = pages.report.claims()
    table = pages.readme_table(listed, pages.verdicts(claims))
    text = pages.between(readme.read_text(encoding="utf-8"), "chapters", table)
    text = pages.between(text, "results", pages.readme_results(claims, names))
    files.write_atomic(readme, text.encode())
    files.write_atomic(ROOT / "book" / "learning-lambda.svg", landing.still(landing.stories()[0]).encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="parameters of the notebooks")
    parser.add_argument("--force", action="store_true", help="execute every notebook again")
    parser.add_argument(
        "--workers", type=int, default=0, help="notebooks to execute at a time (default: 2, with profile full 1)"
    )
    parser.add_argument("--export-colab", metavar="DIR", type=Path, help="only write the notebooks for Colab")
    parser.add_argument("--write-readme", action="store_true", help="only bring README.md up to date")
    options = parser.parse_args(argv)
    if options.workers < 0:
        parser.error(f"--workers {options.workers}: it must be at least 1, or 0 for the default")
    try:
        if options.export_colab:
            export_colab(options.export_colab)
        elif options.write_readme:
            write_readme()
        else:
            build(options.profile, options.force, options.workers)
    except BuildError as error:
        print(f"\nbuild failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
