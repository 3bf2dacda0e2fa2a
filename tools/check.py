"""make test: everything CI runs, in steps that go on after a failure.
  python tools/check.py [STEP ...]     all steps, or the named ones: tree lint notebooks pytest browser docs wheel

The steps run in a copy of what git would commit, so the working tree is left alone, a file that was forgotten is missed here
and not on someone else's machine, and a notebook that litters is caught. Logs are kept in _out/check/. What could not run is
counted and named in the last lines; with CI=true it fails."""
import json, os, re, shutil, subprocess, sys, tempfile, time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
LOGS = HOME/"_out/check"
BIN = Path(sys.executable).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SITE = "https://github.com/vfm-lab/vfm_lab/blob/main/", "https://colab.research.google.com/github/vfm-lab/vfm_lab/blob/main/"


@dataclass
class Step:
    "What a step found: how many checks passed, which failed or could not run, and a line to show."
    passed: int = 0
    failed: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def check(self, ok, what):
        "Count one check; `what` names it when it fails."
        if ok: self.passed += 1
        else: self.failed.append(what)
        return ok


class Checkout:
    "A copy of the tracked and the new, not ignored files, and the commands that run in it."
    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="vfm_lab-check-"))
        names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=HOME, capture_output=True, text=True, check=True)
        self.names = sorted(n for n in names.stdout.split("\0") if n and (HOME/n).is_file())
        for n in self.names:
            (self.root/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HOME/n, self.root/n)
        outside = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}   # an activated environment would come in beside .venv
        self.env = {**outside, "PYTHONPATH": str(self.root), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "VENV": str(BIN.parent),
                    "VFM_LAB_BUDGET": "smoke", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "COVERAGE_FILE": str(LOGS/"coverage/data"),
                    "SCREENS": str(HOME/"_out/screens"), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, log, *command, limit=600, cwd=None, **env):
        "Run a command with its output in a log file; returns (exit status, output)."
        path = LOGS/f"{log}.log"
        with open(path, "w") as out:
            try: status = subprocess.run([str(c) for c in command], cwd=cwd or self.root, env={**self.env, **env}, stdin=subprocess.DEVNULL,
                                         stdout=out, stderr=subprocess.STDOUT, timeout=limit).returncode
            except subprocess.TimeoutExpired: status = out.write(f"\nstopped after {limit} s\n")
            except OSError as e: status = out.write(f"\n{e}\n")
        return status, path.read_text(errors="replace")

    def files(self):
        "Name and content of every file, caches apart."
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()
                and not re.search(r"(^|/)(__pycache__|\.\w+_cache|\.ipynb_checkpoints|_out|_docs|_proc|build|dist|[^/]*\.egg-info)(/|$)|\.pyc$", p.relative_to(self.root).as_posix())}

    def notebooks(self): return [n for n in self.names if re.fullmatch(r"nbs/(?:[^_.][^/]*/)*[^_.][^/]*\.ipynb", n)]


def changes(before, after): return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))

def tree(at):
    "Notebooks, exported modules and README agree; notebooks are fit to be read; internal links lead somewhere."
    step, before = Step(), at.files()
    for name, command in {"nbdev_clean": [BIN/"nbdev_clean"], "nbdev_export": [BIN/"nbdev_export"], "README": [sys.executable, "tools/readme.py"]}.items():
        if name == "nbdev_export":   # from nothing: a module whose notebook is gone does not come back
            for module in (at.root/"vfm_lab").rglob("*.py"):
                if module.name != "__init__.py": module.unlink()
        status, out = at.run(f"tree-{name}", *command)
        step.check(status == 0 and "Failed" not in out, f"{name}: {out.strip().splitlines()[-1:]}")
        after = at.files()
        step.check(not (changed := changes(before, after)), f"{name} changes {', '.join(changed)}: run it and commit")
        before = after
    for name in at.notebooks(): form(step, name, before[name])
    for name in before:
        if name.endswith((".md", ".ipynb")): links(step, name, before)
    return step

def form(step, name, raw):
    "What every committed notebook keeps to."
    nb = json.loads(raw)
    texts = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    step.check(texts and re.match(r"# .+\n+> .+", texts[0]), f"{name}: does not open with '# Title' and '> one line'")
    step.check(not any(":::" in t for t in texts), f"{name}: a ::: box shows as it stands in JupyterLab; use a block quote")
    step.check("widgets" not in nb["metadata"], f"{name}: widget state is saved in it")
    step.check(not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs), f"{name}: a live widget is saved as an output")
    step.check(not any(o["output_type"] == "error" for o in outputs), f"{name}: an error is saved as an output")
    step.check(len(raw) <= 2**20, f"{name}: {len(raw)/2**20:.1f} MB, more than 1 MB")

def links(step, name, files):
    "Relative links and links to the repository's own files."
    text = files[name].decode()
    if name.endswith(".ipynb"): text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$", "", text, flags=re.S)
    for url in re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        own = next((url[len(s):] for s in SITE if url.startswith(s)), None)
        if own is None and re.match(r"\w+:|#", url): continue
        target = os.path.normpath(own or os.path.join(os.path.dirname(name), url)).split("#")[0].split("?")[0]
        step.check(target in files or any(f.startswith(f"{target}/") for f in files), f"{name}: {url} leads nowhere")

def lint(at):
    "ruff on everything that is Python; the contracts between rooms, no room without one; shared code names no system."
    step = Step()
    status, out = at.run("lint-ruff", BIN/"ruff", "check", "--no-cache", "--output-format=concise", "vfm_lab", "tools", "tests", "docs", "benchmarks", "setup.py")
    step.check(status == 0, "ruff (log: lint-ruff)")
    status, out = at.run("lint-imports", BIN/"lint-imports", "--no-cache")
    kept, broken = re.findall(r"^(.*) KEPT", out, re.M), re.findall(r"^(.*) BROKEN", out, re.M)
    step.passed += len(kept)
    step.failed += [f"contract broken: {b} (log: lint-imports)" for b in broken] or ([] if status == 0 and kept else ["import-linter did not run (log: lint-imports)"])
    named = re.findall(r"^source_modules = .*", (at.root/"pyproject.toml").read_text(), re.M)
    known = set(re.findall(r'"vfm_lab\.(\w+)', "\n".join(named))) | {"exercises", "cli", "parity", "recipes"}
    rooms = {re.match(r"vfm_lab/(\w+)", n)[1] for n in at.names if re.match(r"vfm_lab/[a-z].*\.py$", n)}
    step.check(rooms <= known, f"no import contract for {sorted(rooms - known)}")
    status, out = at.run("lint-law", sys.executable, "tools/law.py")
    if step.check(status == 0, "shared code names a system (log: lint-law)"): step.notes += out.splitlines()[-1:]
    return step

def flagged(name, raw, flags):
    "The cells of a notebook that nbdev_test would not run, and why."
    cells = ["".join(c["source"]) for c in json.loads(raw)["cells"]]
    if any("skip_exec: true" in c for c in cells): yield f"{name} (skip_exec)"
    for i, source in enumerate(cells):
        words = set(re.findall(r"^#\|\s*([\w-]+)\s*$", source, re.M)) & flags
        if words or re.search(r"^#\|\s*eval:\s*false", source, re.M): yield f"{name} cell {i} ({' '.join(words) or 'eval: false'})"

def notebooks(at):
    "Every cell of every notebook at smoke budget, each notebook in a process of its own, as many at a time as there are cores."
    step, before = Step(), at.files()
    flags = set(re.search(r"^tst_flags = (.*)", (at.root/"settings.ini").read_text(), re.M)[1].split())
    def test(name):
        start, log = time.time(), "notebook-" + name[4:-6].replace("/", "-")
        status, out = at.run(log, sys.executable, "-m", "coverage", "run", BIN/"nbdev_test", "--path", name, limit=300, OMP_NUM_THREADS="1")
        return name, status == 0 and "Success." in out, time.time() - start, log
    with ThreadPoolExecutor(min(CORES, 8)) as pool: results = list(pool.map(test, at.notebooks()))
    for name, ok, _, log in results:
        step.check(ok, f"{name} (log: {log})")
        step.skipped += flagged(name, before[name], flags)
    step.skipped += [f"{n} (folder not tested)" for n in at.names if n.startswith("nbs/") and n.endswith("/.notest")]
    slow = sorted(results, key=lambda r: -r[2])[:5]
    step.notes.append("slowest: " + ", ".join(f"{n[4:-6]} {s:.0f} s" for n, _, s, _ in slow))
    step.check(not (litter := changes(before, at.files())), f"running the notebooks changed {', '.join(litter)}")
    return step

def suite(at, log, *args, limit=900):
    "A pytest run, its tests counted one by one."
    step, report = Step(), LOGS/f"{log}.xml"
    status, out = at.run(log, sys.executable, "-m", "coverage", "run", "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", f"--junitxml={report}", *args, limit=limit)
    cases = list(xml.parse(report).iter("testcase")) if report.exists() else []
    for case in cases:
        name, kinds = f"{case.get('classname')}::{case.get('name')}", {child.tag for child in case}
        if kinds & {"failure", "error"}: step.failed.append(f"{name} (log: {log})")
        elif "skipped" in kinds: step.skipped.append(f"{name}: {case.find('skipped').get('message')}")
        else: step.passed += 1
    if (status or not cases) and not step.failed: step.failed.append(f"pytest ended with status {status} (log: {log})")
    return step

def pytest(at):
    "The tests that are not notebooks."
    shared = ("-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile")   # a file's tests share what they build
    return suite(at, "pytest", "tests", "--ignore=tests/test_browser.py", "--ignore=tests/test_site.py", *shared)

def browser(at):
    "JupyterLab in a real Chromium."
    return suite(at, "browser", "tests/test_browser.py", limit=600)

def docs(at):
    "The site builds, all its links lead somewhere, and it works in a real Chromium without a network."
    step = Step()
    status, out = at.run("docs", sys.executable, "docs/build.py")
    if not step.check(status == 0, "docs/build.py (log: docs)"): return step
    pages = {p.relative_to(at.root/"_docs").as_posix() for p in (at.root/"_docs").rglob("*.html")}
    for name in at.notebooks():
        page = re.sub(r"(^|/)\d+[a-zA-Z0-9]*_([^/]*)$", r"\1\2", name[4:]).replace(".ipynb", ".html")
        step.check(page in pages, f"the site has no page for {name}")
    site = suite(at, "site", "tests/test_site.py", limit=300)
    return Step(step.passed + site.passed, step.failed + site.failed, site.skipped)

def wheel(at):
    "Source archive and wheel in a clean environment without the dev extra: contents, import time, every module, CLI, README."
    step, place = Step(), Path(tempfile.mkdtemp(prefix="vfm_lab-wheel-"))
    try:   # plain `build` makes the wheel out of the source archive, as an index's user would
        status, _ = at.run("wheel-build", sys.executable, "-m", "build", "--outdir", place)
        if not step.check(status == 0, "build (log: wheel-build)"): return step
        built, source = next(place.glob("*.whl")), next(place.glob("*.tar.gz"))
        status, _ = at.run("wheel-twine", sys.executable, "-m", "twine", "check", "--strict", built, source)
        step.check(status == 0, "twine check (log: wheel-twine)")
        contents(step, built)
        if installed(step, at, place, built): library(step, at, place)
        status, _ = at.run("wheel-source", place/"venv/bin/python", "-m", "pip", "install", "-q", "--no-deps",
                           "--force-reinstall", "--disable-pip-version-check", source, PYTHONPATH="")
        step.check(status == 0, "install from the source archive (log: wheel-source)")
        step.check(shipped(place/"venv", built) == set(), f"the source archive installs without {sorted(shipped(place/'venv', built))[:5]}")
    finally: shutil.rmtree(place, ignore_errors=True)
    return step

def installed(step, at, place, built):
    "Put the wheel and what it requires into an environment of its own."
    start, python = time.time(), place/"venv/bin/python"
    status, _ = at.run("wheel-install", "sh", "-c", f"'{sys.executable}' -m venv '{place}/venv' && '{python}' -m pip install -q "
                       f"--no-compile --disable-pip-version-check -c constraints.txt '{built}'", PYTHONPATH="")
    step.notes.append(f"clean install {time.time() - start:.0f} s, wheel {built.stat().st_size/1e6:.1f} MB")
    return step.check(status == 0, "install (log: wheel-install)")

def shipped(environment, built):
    "Files of the wheel that an environment lacks."
    import zipfile
    names = {n for n in zipfile.ZipFile(built).namelist() if n.startswith("vfm_lab/")}
    root = next(environment.glob("lib/python*/site-packages"))
    return {n for n in names if not (root/n).exists()}

MODULES = """import pkgutil, importlib, vfm_lab
for m in pkgutil.walk_packages(vfm_lab.__path__, 'vfm_lab.'):
    print(m.name, flush=True)
    importlib.import_module(m.name)"""

def library(step, at, place):
    "What somebody meets who has only installed the package, in an empty folder."
    python, empty = place/"venv/bin/python", place/"empty"
    empty.mkdir()
    def bare(log, *command): return at.run(log, *command, cwd=empty, PYTHONPATH="", PYTHONDONTWRITEBYTECODE="")
    clock = "import torch, time; t = time.perf_counter(); import vfm_lab; print(time.perf_counter() - t)"
    seconds = [float(out) for status, out in (bare("wheel-import", python, "-c", clock) for _ in range(5)) if status == 0]
    if step.check(len(seconds) == 5, "import vfm_lab (log: wheel-import)"):
        step.notes.append(f"import vfm_lab takes {min(seconds)*1000:.0f} ms on top of import torch")
        step.check(min(seconds) <= .5, f"import vfm_lab takes {min(seconds):.2f} s on top of import torch, more than 0.5 s")
    status, out = bare("wheel-modules", python, "-c", MODULES)
    step.check(status == 0, f"a module does not import without the dev extra: {(out.strip().splitlines() or ['?'])[-1]} (log: wheel-modules)")
    status, out = bare("wheel-cli", place/"venv/bin/vfm_lab", "--help")
    step.check(status == 0 and "usage" in out.lower(), "vfm_lab --help (log: wheel-cli)")
    version = re.search(r"^version = (.*)", (at.root/"settings.ini").read_text(), re.M)[1]
    status, out = bare("wheel-version", place/"venv/bin/vfm_lab", "--version")
    step.check(status == 0 and version in out, "vfm_lab --version (log: wheel-version)")
    status, out = bare("wheel-recipe", place/"venv/bin/vfm_lab", "pretrain", "videomae", "--config", "videomae_tiny", "--steps", "1", "--out", "run")
    step.check(status == 0, "a recipe by its name (log: wheel-recipe)")
    lines = re.search(r"```python\n(.*?)```", (at.root/"README.md").read_text(), re.S)
    if step.check(lines, "README.md shows no first lines of Python"):
        step.check(bare("wheel-first-lines", python, "-c", lines[1])[0] == 0, "the first Python block of README.md (log: wheel-first-lines)")

def contents(step, built):
    "What the wheel must and must not carry."
    import zipfile
    entries = zipfile.ZipFile(built).infolist()
    names = [e.filename for e in entries]
    alien = [n for n in names if re.search(r"\.ipynb$|(^|/)(tests?|nbs|golden|tools|docs|benchmarks)/", n)]
    step.check(not alien, f"the wheel carries {alien[:5]}")
    step.check(any(re.search(r"_assets/clips/.*\.mp4$", n) for n in names), "the wheel carries no clips")
    step.check(any(re.search(r"_assets/weights/.*\.safetensors$", n) for n in names), "the wheel carries no weights")
    step.check(sum(n.startswith("vfm_lab/_recipes/") for n in names) >= 50, "the wheel carries no recipes")
    step.check("vfm_lab/py.typed" in names, "the wheel carries no py.typed")
    about = zipfile.ZipFile(built).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    for line in ("License-Expression: Apache-2.0", "Classifier: Programming Language", "Project-URL: Source", "Requires-Python:"):
        step.check(f"\n{line}" in about, f"the wheel's metadata lacks {line}")
    size = sum(e.file_size for e in entries if "/_assets/" in e.filename)/1e6
    step.notes.append(f"data in the wheel {size:.1f} MB")
    step.check(size <= 6, f"data in the wheel: {size:.1f} MB, more than 6 MB")

STEPS = {f.__name__: f for f in (tree, lint, notebooks, pytest, browser, docs, wheel)}

def coverage(at):
    "How much of the package the notebooks and the tests ran."
    if not any((LOGS/"coverage").iterdir()): return
    at.run("coverage-combine", sys.executable, "-m", "coverage", "combine", "--keep", "-q")
    _, table = at.run("coverage", sys.executable, "-m", "coverage", "report")
    print(f"\nCoverage of vfm_lab by what was run above. A chapter defines its code in the notebook itself, so a module is covered by the other\n"
          f"notebooks and tests that import it.\n{table}")

def main(*chosen):
    if unknown := set(chosen) - STEPS.keys(): sys.exit(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    shutil.rmtree(LOGS, ignore_errors=True)
    (LOGS/"coverage").mkdir(parents=True)
    at, begin, results = Checkout(), time.time(), {}
    try:
        for name in chosen or STEPS:
            print(f"== {name}: {STEPS[name].__doc__}", flush=True)
            start = time.time()
            try: step = STEPS[name](at)
            except Exception as e: step = Step(failed=[f"{name} broke off: {type(e).__name__}: {e}"])
            results[name] = step, time.time() - start
            print(f"   {step.passed} passed, {len(step.failed)} failed, {len(step.skipped)} skipped in {time.time() - start:.0f} s"
                  + "".join(f"\n   {n}" for n in step.notes) + "".join(f"\n   FAILED {f}" for f in step.failed), flush=True)
            for log in dict.fromkeys(re.findall(r"\(log: ([\w.-]+)\)", "\n".join(step.failed))):
                text = (LOGS/f"{log}.log").read_text(errors="replace") if (LOGS/f"{log}.log").exists() else ""
                print(f"---- {log}.log, its end\n{text[-6000:]}\n----", flush=True)
        coverage(at)
    finally: shutil.rmtree(at.root, ignore_errors=True)
    return close(results, time.time() - begin)

def close(results, seconds):
    "The last lines: time per step, everything that failed or did not run, and the sum."
    ci = os.environ.get("CI", "").lower() in ("1", "true")
    failed, skipped = ([(n, x) for n, (s, _) in results.items() for x in getattr(s, kind)] for kind in ("failed", "skipped"))
    print("\n" + "\n".join(f"{name:10} {took:6.0f} s  {s.passed} passed, {len(s.failed)} failed, {len(s.skipped)} skipped" for name, (s, took) in results.items()))
    for name, what in failed: print(f"FAILED  {name}: {what}")
    for name, what in skipped: print(f"SKIPPED {name}: {what}")
    if missing := [n for n in STEPS if n not in results]: print(f"not asked for: {', '.join(missing)}")
    if ci and skipped: print("in CI, what could not run counts as failed")
    print(f"make test: {sum(s.passed for s, _ in results.values())} passed, {len(failed)} failed, {len(skipped)} skipped in {seconds/60:.1f} min")
    return bool(failed or (ci and skipped))

if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
