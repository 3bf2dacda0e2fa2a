"""python tools/law.py: how many lines of shared modules name a system, and which; exit 1 if there are any.

Shared is every module but those that belong to systems: the rooms official/, models/, adapt/ and exercises/ (models/registry
and models/checkpoints are shared), and the pictures of one system in viz/. A system has a module in official/. It is
named by a word that begins like the module, by an import of a system's module, and by the names that such a module
exports and that begin like it (`CLIPVision`). Prose does not count: papers may be cited in comments and docstrings."""
import ast, io, re, sys, tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent/"vfm_lab"
OWN = {"official", "models", "adapt", "exercises"}               # rooms of systems
SHARED = {"models/registry", "models/checkpoints"}               # in them, and yet shared
PICTURES = {"viz/fusion", "viz/running_cell"}                    # of one system each
WORDS = {"clip"}                                                 # a clip is a piece of video, too: only exported names count


def place(file): return file.relative_to(PACKAGE).with_suffix("").as_posix()

def shared():
    "Files of shared modules."
    files = sorted(f for f in PACKAGE.rglob("*.py") if f.name not in ("__init__.py", "_modidx.py"))
    return [f for f in files if place(f) in SHARED or (place(f).split("/")[0] not in OWN and place(f) not in PICTURES)]

def names():
    "What names a system: a pattern for words, a pattern for modules."
    systems = sorted(f.stem for f in (PACKAGE/"official").glob("[a-z]*.py"))
    modules = sorted(f.stem for f in (PACKAGE/"models").glob("[a-z]*.py") if place(f) not in SHARED)
    exported = set()
    for stem in modules:
        tree = ast.parse((PACKAGE/f"models/{stem}.py").read_text())
        listed = next((n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), None)
        exported |= {e.value for e in listed.elts} if listed else set()
    own = {e for e in exported if any(s in e.lower() for s in systems)}
    stems = "|".join(s for s in systems if s not in WORDS)
    exact = "|".join(sorted(own - WORDS))
    return re.compile(rf"\b(?i:{stems})|\b({exact})\b"), re.compile(rf"\b(models|official)\.({'|'.join(modules)})\b")

def code(text):
    "Lines without comments and docstrings."
    lines = text.splitlines()
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type == tokenize.COMMENT: lines[t.start[0]-1] = lines[t.start[0]-1].removesuffix(t.string)
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)): continue
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first] = lines[first].encode()[:node.col_offset].decode()
        lines[first+1:last+1] = [""]*(last - first)
    return lines

def named():
    "file:line: text of every line that names a system."
    word, module = names()
    for file in shared():
        for n, line in enumerate(code(file.read_text(encoding="utf-8")), 1):
            if word.search(line) or module.search(line): yield f"{place(file)}.py:{n}: {line.strip()}"

if __name__ == "__main__":
    found = list(named())
    print(*found, f"{len(found)} lines of {len(shared())} shared modules name a system", sep="\n")
    sys.exit(bool(found))
