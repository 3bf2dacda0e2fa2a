"What a notebook cannot show of the training loop: killed runs, several processes, a launch from a real kernel."
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn
from torch.testing import assert_close

from vfm_lab.train.loop import NonFiniteLoss, TrainConfig, fit
from vfm_lab.train.resume import checkpoints

HERE = Path(__file__).parent
ENV = dict(os.environ, PYTHONPATH=f"{HERE.parent}{os.pathsep}{HERE}", OMP_NUM_THREADS="1")


def toy(folder, wait=True, **options):
    "Run train_toy.py in a process of its own."
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, HERE / "train_toy.py", folder, json.dumps(options)], env=ENV, stderr=subprocess.PIPE, text=True)
    if wait:
        _, err = process.communicate(timeout=120)
        return process.returncode, err
    return process


def final(folder): return torch.load(folder / "final.pt", weights_only=True)
def history(folder, rank=0): return json.loads((folder / f"history{rank}.json").read_text())
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def same_run(a, b):
    "Bit for bit: weights and every curve but the clock."
    for name, value in final(a).items(): assert torch.equal(value, final(b)[name]), name
    ha, hb = history(a), history(b)
    assert {k: v for k, v in ha.items() if k != "seconds"} == {k: v for k, v in hb.items() if k != "seconds"}
    assert ha["step"] == list(range(1, len(ha["step"]) + 1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbs, with augmentation, dropout and accumulation."
    folder = tmp_path_factory.mktemp("whole")
    code, err = toy(folder, noise=0.1, accumulate=2)
    assert code == 0, err
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_resume_is_bit_identical(whole, tmp_path, workers):
    process = toy(tmp_path, wait=False, noise=0.1, accumulate=2, slow=True, workers=workers)
    stop = time.time() + 60
    while len(checkpoints(tmp_path / "run")) < 2 and time.time() < stop: time.sleep(0.01)
    time.sleep(0.05)   # somewhere between two checkpoints
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "final.pt").exists()
    process.stderr.close()
    assert 10 <= int(checkpoints(tmp_path / "run")[-1].name[5:]) < 40
    code, err = toy(tmp_path, noise=0.1, accumulate=2, workers=workers)
    assert code == 0, err
    same_run(whole, tmp_path)


def test_kill_while_saving(whole, tmp_path):
    code, _ = toy(tmp_path, noise=0.1, accumulate=2, die_in=15)
    assert code == -signal.SIGKILL
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [".step_00000015", "step_00000005", "step_00000010"]
    code, err = toy(tmp_path, noise=0.1, accumulate=2)
    assert code == 0, err
    same_run(whole, tmp_path)
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == ["step_00000035", "step_00000040"]


def close_runs(one, two):
    for name, value in final(one).items(): assert_close(final(two)[name], value, atol=1e-5, rtol=1e-5)
    for k in ("loss", "mae", "lr", "grad_norm"): assert_close(history(two)[k], history(one)[k], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "One process, no randomness in data or model: what two processes must reproduce."
    folder = tmp_path_factory.mktemp("alone")
    code, err = toy(folder, accumulate=4)
    assert code == 0, err
    return folder


def test_two_processes_with_accelerate_launch(alone, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    run = subprocess.run([*launch, HERE / "train_toy.py", tmp_path, json.dumps(dict(accumulate=4))], env=ENV, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    close_runs(alone, tmp_path)
    drop = lambda h: {k: v for k, v in h.items() if k != "seconds"}
    assert drop(history(tmp_path, 0)) == drop(history(tmp_path, 1))
    assert len(checkpoints(tmp_path / "run")) == 2


@pytest.mark.parametrize("before", [False, True], ids=["fresh kernel", "after a fit in the same kernel"])
def test_notebook_launcher(alone, tmp_path, before):
    cells = ["import torch, train_toy\nfrom accelerate import notebook_launcher",
             f"train_toy.train({str(tmp_path / 'before')!r}, steps=3);" if before else "",
             f"notebook_launcher(train_toy.train, args=({str(tmp_path)!r}, 40, 4), num_processes=2, use_port={str(free_port())!r})"]
    (tmp_path / "before").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))).execute(env=ENV)
    close_runs(alone, tmp_path)
