"""The script for a GPU runs to its end on a CPU, without what a bare machine lacks; what it counts
is counted right, and a part that fails takes no other with it."""
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]

BARE = '''
"No package beyond those of a bare machine, and none of theirs for the lab itself."
import builtins, sys
for name in ("av", "decord", "matplotlib", "plotly", "pydantic", "annotated_types", "tyro",
             "webdataset", "torchmetrics", "msgspec", "cattrs", "attrs", "IPython", "playwright"):
    sys.modules[name] = None   # as if it were not installed
known = builtins.__import__
def bare(name, globals=None, locals=None, fromlist=(), level=0):
    asks = (globals or {}).get("__name__", "")
    ours = asks.split(".")[0] in ("vfm_lab", "__main__")
    if ours and name.split(".")[0] in ("yaml", "tokenizers"):
        raise ImportError(f"{asks} imports {name}")
    return known(name, globals, locals, fromlist, level)
builtins.__import__ = bare
'''


@pytest.fixture
def gpu(monkeypatch):
    "The script as a module."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    return gpu


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "What the script writes on a bare machine without a GPU."
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BARE)
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    script, out = ROOT / "benchmarks/gpu.py", folder / "gpu.json"
    words = [sys.executable, script, "--device", "cpu", "--out", out, "--minutes", "20"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_all_parts_are_done(report, gpu):
    assert list(report["parts"]) == list(gpu.PARTS)
    for name, part in report["parts"].items():
        assert part["status"] == "done" and not part["errors"], (name, part["errors"])
        assert part["rows"], name
        assert all("by fit" in text for text in part["left_out"]), name


def test_what_it_finds_right(report):
    rows = {name: part["rows"] for name, part in report["parts"].items()}
    cases = {path.stem for path in (ROOT / "tests/golden").glob("*.json")}
    assert {(r["case"], r["mode"]) for r in rows["golden"]} == {
        (case, mode) for case in cases for mode in ("fp32", "bf16", "fp16")}
    assert all(r["met"] for r in rows["golden"]), report["summary"]["golden"]
    assert report["summary"]["golden"]["not met"] == report["summary"]["masks"]["differ"] == []
    assert not any(r["clips_that_differ"] for r in rows["masks"])
    assert all(r["equal"] and r["steps_after_the_kill"] == 4 for r in rows["resume"])
    assert all(r["finite"] and r["scale"] > 0 for r in rows["fp16"])
    assert all(sum(r["attention"].values()) for r in rows["kernels"])
    assert {r["side"] for r in rows["transformers"]} == {
        "transformers", "ours, equal work", "ours, running cell"}


KINDS = [("umt", True), ("videomae", True), ("videomae", False), ("uniformerv2", True)]


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("system, cell", KINDS)
def test_flops(gpu, system, cell, size):
    sizes = gpu.SMALL[system][size]
    model = gpu.trainable(system, size, gpu.Plan("cpu", 0, 1, 1), cell)
    batch = gpu.batch_of(sizes, 2, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(batch)["loss"]
        forward = counter.get_total_flops() / 2
        loss.backward()
    frozen, trained, _ = gpu.forward_flops(system, sizes, cell)
    assert forward == pytest.approx(frozen + trained, rel=0.01)
    if system == "uniformerv2": return   # torch counts depthwise gradients as dense ones
    assert counter.get_total_flops() / 2 == pytest.approx(
        gpu.step_flops(system, sizes, cell), rel=0.01)


def test_sizes_are_those_of_the_names(gpu):
    def shapes(model): return {k: v.shape for k, v in model.state_dict().items()}
    for system, names in gpu.NAMES.items():
        for size, name in names.items():
            sizes = {k: v for k, v in gpu.FULL[system][size].items() if k != "teacher"}
            with torch.device("meta"):
                one, two = gpu.create_model(name), gpu.create_model(name, **sizes)
            assert shapes(one) == shapes(two), name


def test_nothing_is_said_of_what_was_not_measured(gpu):
    none = dict(status="left out", rows=[], left_out=["no time"], errors=[])
    assert gpu.summary({}) == {}
    assert gpu.summary({"resume": none, "golden": none}) == {"not done": ["resume", "golden"]}


def raises(part):
    part.add(n=float("nan"))
    with part.one("first"): raise KeyError("no such thing")
    part.add(n=2)
    raise ValueError("broken")


def dies(part):
    part.add(n=1)
    time.sleep(0.2)   # what was said is on its way
    os._exit(3)


def hangs(part):
    part.add(n=1)
    time.sleep(600)


def test_a_part_that_fails_takes_no_other_with_it(gpu, monkeypatch):
    parts = {"raises": (raises, 1), "dies": (dies, 1), "hangs": (hangs, 1)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    report, saved = {"parts": {}}, []
    for name in parts:
        gpu.conduct(name, gpu.Plan("cpu", 0, 1, 1), 1, report, lambda: saved.append(1))
    one, two, three = report["parts"].values()
    assert one["status"] == "failed" and one["rows"] == [{"n": "nan"}, {"n": 2}]
    assert "first: " in one["errors"][0] and "ValueError: broken" in one["errors"][1]
    assert two["status"] == "failed" and two["rows"] == [{"n": 1}] and len(two["errors"]) == 1
    assert three["status"] == "cut off" and three["rows"] == [{"n": 1}]
    assert len(saved) >= 7   # after each row, and after each part


def test_waits_of_the_host(gpu, monkeypatch):
    x = torch.arange(6.)
    def work(): return x.sum().item(), x[x > 2], bool(x[0] > 1), x + 1, x[[1, 2]]
    assert sum(gpu.host_reads(work, "cpu").values()) == 3
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    def warned():
        for _ in range(2): warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert sum(gpu.host_reads(warned, "cuda").values()) == 2
    assert modes == ["warn", "default"]


def test_memory_that_is_not_there(gpu):
    said = []
    part = gpu.Part(gpu.Plan("cpu", 0, 1, 1), 60, {}, lambda *what: said.append(what))
    with part.one("much"): raise torch.OutOfMemoryError("CUDA out of memory")
    assert said == [("left_out", "much: does not fit into memory")]
