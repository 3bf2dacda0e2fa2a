"Chapters run where only the package is installed, as on Colab: no cell climbs out of its folder to find a file of the clone."
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FALLBACK = 'Path("../vfm_lab")'    # where an exported cell looks for its own package while it runs in a notebook


def climbing(source):
    "Lines of code that name a path above the notebook's folder."
    lines = source.replace(FALLBACK, "").splitlines()
    return [line for line in lines if re.search(r"""["'](\.\./|\.\.["'])""", line)]


def test_the_search_finds_what_it_should():
    assert climbing('x = Path("../../tests/golden")\ny = Path("..").resolve()\nz = f"../data/{name}"') != []
    assert len(climbing('x = Path("../../tests/golden")\ny = Path("..").resolve()\nz = f\'../data/{name}\'')) == 3
    assert climbing('here = Path("../vfm_lab").resolve()\nx = checkout("tests/golden")\nprint("…")') == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_no_cell_climbs_out_of_its_folder(path):
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert [line for source in cells for line in climbing(source)] == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package as a wheel lays it out: `data/` travels as `vfm_lab/_assets`, nothing else does."
    place = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(ROOT / "vfm_lab", place / "vfm_lab", ignore=shutil.ignore_patterns("__pycache__", "_assets"))
    shutil.copytree(ROOT / "data", place / "vfm_lab/_assets")
    return place


@pytest.mark.parametrize("name, left_out", [("00_lab", "tests/golden"), ("20_parity", "tests/golden")])
def test_a_chapter_runs_outside_the_clone(name, left_out, installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.setenv("VFM_LAB_BUDGET", "smoke")
    book = nbformat.read(ROOT / f"nbs/{name}.ipynb", 4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", []))
    assert f"Left out here: {left_out} is not in the package" in said
