"""A long list of clips, seconds and memory: `python benchmarks/manifest.py` (about five minutes).

`VideoManifest` reads a CSV with a million rows and holds names and labels in columns. The peer is
the straightforward form, the standard library's `csv.DictReader` into a list of dicts with one
`os.path.isfile` a row. Both find that every file is there and none comes twice. Each side runs in
processes of its own; the files are empty, and there is one for every row.
"""
import csv, os, sys, tempfile
from pathlib import Path
from _common import high, in_process, machine, report, warm
from vfm_lab.data.datasets import VideoManifest
from vfm_lab.lab import budget, smoke

ROWS = budget(1_000_000, 2_000)
RUNS = budget(3, 1)

def by_dicts(file: Path) -> list[dict]:
    "The straightforward form, with the same checks."
    items, seen = [], set()
    with open(file, encoding="utf-8") as lines:
        for i, row in enumerate(csv.DictReader(lines)):
            path = str(file.parent / row["path"])
            if path in seen: raise ValueError(f"{path} comes twice")
            if not os.path.isfile(path): raise ValueError(f"no file {path}")
            seen.add(path)
            items.append({"path": path, "label": int(row["label"]), "index": i})
    return items

SIDES = {"VideoManifest": VideoManifest, "csv and a list of dicts": by_dicts}

def held() -> float:
    "Memory of this process now, in MB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def side(name: str, file: str, what: str) -> float:
    "One number of one side."
    warm()
    before, start = held(), os.times()
    data = SIDES[name](Path(file))
    assert len(data) == ROWS
    now = os.times()
    if what == "seconds": return now.user + now.system - start.user - start.system
    return {"peak": high, "held": held}[what]() - before

def measure(name: str, file: Path) -> dict:
    "The row of one side."
    times = [in_process(__file__, name, file, "seconds") for _ in range(RUNS)]
    peak, after = (in_process(__file__, name, file, what) for what in ("peak", "held"))
    return {"CPU seconds": round(min(times), 1), "peak memory, MB": round(peak),
            "held afterwards, MB": round(after), "bytes a row": round(after * 2**20 / ROWS)}

def main() -> None:
    about = machine(rows=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(400): (Path(folder) / f"class_{k:03}").mkdir()
        names = [f"class_{i % 400:03}/video_{i:08}.mp4" for i in range(ROWS)]
        for name in names: (Path(folder) / name).touch()
        file = Path(folder) / "list.csv"
        lines = [f"{name},{i % 400}\n" for i, name in enumerate(names)]
        file.write_text("path,label\n" + "".join(lines))
        rows = {name: measure(name, file) for name in SIDES}
    if smoke(): return print(rows)   # a few rows are no result
    text = (f"the best of {RUNS} runs for the seconds. What is held afterwards is what every "
            "worker process comes to copy if it is a list of Python objects.")
    report("manifest", "A million rows", text, about, {"reader": rows})

if __name__ == "__main__":
    if len(sys.argv) > 1: print(side(*sys.argv[1:]))
    else: main()
