"What a notebook cannot show of the training loop: killed runs, several processes, a launch from a real kernel."
import json, os, shutil, signal, socket, subprocess, sys, time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
import train_toy
from nbclient import NotebookClient
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from train_toy import Net, Points

from vfm_lab.data.datasets import make_loader
from vfm_lab.data.synth import SynthDataset
from vfm_lab.nn.blocks import Block
from vfm_lab.nn.vit import VideoClassifier
from vfm_lab.tasks.finetune import FineTune
from vfm_lab.train.callbacks import EMA, Callback, LivePlot, ProgressBar
from vfm_lab.train.loop import NonFiniteLoss, TrainConfig, fit
from vfm_lab.train.resume import checkpoints, fixed_order

HERE = Path(__file__).parent
ENV = dict(os.environ, PYTHONPATH=f"{HERE.parent}{os.pathsep}{HERE}", OMP_NUM_THREADS="1")


def toy(folder, wait=True, **options):
    "Run train_toy.py in a process of its own."
    folder.mkdir(exist_ok=True)
    command = [sys.executable, HERE / "train_toy.py", folder, json.dumps(options)]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
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
    left = sorted(p.name.strip(".").split(".")[0] for p in (tmp_path / "run").glob("*step_*"))
    assert left == ["step_00000005", "step_00000010", "step_00000015"]   # the last is a draft
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step_00000005", "step_00000010"]
    code, err = toy(tmp_path, noise=0.1, accumulate=2)
    assert code == 0, err
    same_run(whole, tmp_path)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [".lock", "log.jsonl", "step_00000035", "step_00000040"]


def close_runs(one, two):
    for name, value in final(one).items(): assert_close(final(two)[name], value, atol=1e-5, rtol=1e-5)
    for k in ("loss", "mae", "lr", "grad_norm"): assert_close(history(two)[k], history(one)[k], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "One process, no randomness in data or model: what two processes must reproduce."
    folder = tmp_path_factory.mktemp("alone")
    train_toy.train(folder, accumulate=4)
    return folder


def launch(folder, **options):
    "accelerate launch with two CPU processes."
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1", "--main_process_port",
               str(free_port()), HERE / "train_toy.py", folder, json.dumps(options)]
    return subprocess.run(command, env=dict(ENV, ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=120)


def test_two_processes_with_accelerate_launch(alone, tmp_path):
    run = launch(tmp_path, accumulate=4)
    assert run.returncode == 0, run.stderr
    close_runs(alone, tmp_path)
    drop = lambda h: {k: v for k, v in h.items() if k != "seconds"}
    assert drop(history(tmp_path, 0)) == drop(history(tmp_path, 1))
    assert len(checkpoints(tmp_path / "run")) == 2


def test_a_poisoned_clip_stops_both_processes(tmp_path):
    run = launch(tmp_path, poisoned=7)
    assert run.returncode == 1 and run.stderr.count("NonFiniteLoss: loss nan") == 2 and "clip7.mp4" in run.stderr, run.stderr
    path, = checkpoints(tmp_path / "run")
    weights = load_file(path / "model.safetensors")
    assert len(weights) == 6 and all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("before", [False, True], ids=["fresh kernel", "kernel that has trained"])
def test_notebook_launcher(alone, tmp_path, before):
    train_here = f"(torch.ones(1500, 1500) @ torch.ones(1500, 1500)).sum()\ntrain_toy.train({str(tmp_path / 'before')!r}, steps=3);"
    cells = ["import torch, train_toy\nfrom accelerate import notebook_launcher",
             train_here if before else "",
             f"notebook_launcher(train_toy.train, args=({str(tmp_path)!r}, 40, 4), num_processes=2, use_port={str(free_port())!r})"]
    (tmp_path / "before").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute(env=dict(ENV, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="4"))   # threads, which a fork would lose
    close_runs(alone, tmp_path)


def trained(loader, **options):
    torch.manual_seed(0)
    model = Net()
    return model, fit(model, loader, TrainConfig(lr=1e-2, **options))


@pytest.mark.parametrize("batch_size", [26, 13, 10, 7])
def test_accumulation_equals_one_big_batch(batch_size):
    "Even and uneven: 26+26, 4×13, 5×10+2, 7×7+3."
    big, h1 = trained(DataLoader(Points(), batch_size=52), steps=5)
    small, h2 = trained(DataLoader(Points(), batch_size=batch_size), steps=5, accumulate=-(-52 // batch_size))
    for a, b in zip(big.parameters(), small.parameters()): assert_close(b, a, atol=1e-5, rtol=1e-5)
    for k in ("loss", "mae", "grad_norm"): assert_close(h2[k], h1[k], atol=1e-5, rtol=1e-5)


class Numbers(IterableDataset):
    def __iter__(self):
        for i in range(20): yield dict(x=torch.rand(1), name=str(i))


class Reporting(DataLoader):
    "A loader with something to say at the end of an epoch."
    ended = 0
    def __iter__(self):
        yield from super().__iter__()
        Reporting.ended += 1


ITEMS = [dict(x=torch.tensor([i]), name=str(i)) for i in range(20)]
LOADERS = {
    "shuffled": lambda: DataLoader(ITEMS, batch_size=6, shuffle=True),
    "own generator": lambda: DataLoader(ITEMS, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(9)),
    "weighted": lambda: DataLoader(ITEMS, batch_size=6, sampler=WeightedRandomSampler(torch.arange(20.), 20)),
    "persistent workers": lambda: DataLoader(Points(0.1), batch_size=20, shuffle=True, num_workers=2, persistent_workers=True),
    "of the data room": lambda: make_loader(SynthDataset(20, frames=2, size=16), 6, shuffle=True, seed=1),
    "iterable": lambda: DataLoader(Numbers(), batch_size=6),
    "iterable with a worker": lambda: DataLoader(Numbers(), batch_size=6, num_workers=1),
    "list": lambda: [dict(x=torch.rand(4, generator=torch.Generator().manual_seed(i)), name=["a"] * 4) for i in range(3)],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_can_be_entered_anywhere(kind):
    flat = lambda batches: [(b["name"], b["x" if "x" in b else "clip"].tolist()) for b in batches]
    one, other = fixed_order(LOADERS[kind](), seed=3), fixed_order(LOADERS[kind](), seed=3)
    epochs = [flat(one(e)) for e in range(3)]
    assert flat(other(2, 1)) == epochs[2][1:] and flat(other(0)) == epochs[0]
    if kind != "list": assert epochs[0] != epochs[1]


def test_a_loader_of_your_own_class_stays_one():
    Reporting.ended = 0
    trained(Reporting(Points(), batch_size=26), steps=5)
    assert Reporting.ended == 2


@pytest.mark.parametrize("kind", ["shuffled", "list"])
def test_processes_share_every_batch(kind):
    whole = list(fixed_order(LOADERS[kind](), 3)(1))
    shares = [list(fixed_order(LOADERS[kind](), 3, rank, 3)(1)) for rank in range(3)]
    for i, parts in enumerate(zip(*shares)):
        for rank, part in enumerate(parts): assert torch.equal(part["x"], whole[i]["x"][rank::3])
    assert len(shares[0]) == len(shares[1]) == len(shares[2]) == len([b for b in whole if len(b["x"]) >= 3])


def test_bf16():
    _, full = trained(DataLoader(Points(), batch_size=13), steps=30)
    model, half = trained(DataLoader(Points(), batch_size=13), steps=30, precision="bf16")
    assert full["loss"] != half["loss"]
    assert_close(half["loss"], full["loss"], atol=0.1 * max(full["loss"]), rtol=0)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model(next(iter(DataLoader(Points(), batch_size=4))))["error"].dtype == torch.float32   # autocast is gone again


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="fp16 needs a GPU"): trained(DataLoader(Points(), batch_size=13), steps=1, precision="fp16")
    trained(DataLoader(Points(), batch_size=13), steps=1)   # and leaves nothing behind


def test_non_finite_loss(tmp_path):
    class End(Callback):
        called = False
        def on_end(self, run): self.called = True
    torch.manual_seed(0)
    model, end = Net(), End()
    config = TrainConfig(steps=20, lr=1e-2, warmup=10, folder=tmp_path)
    with pytest.raises(NonFiniteLoss) as caught: fit(model, DataLoader(Points(poisoned=30), batch_size=8), config, callbacks=[end])
    assert (caught.value.step, caught.value.names) == (4, [f"clip{i}.mp4" for i in range(24, 32)]) and abs(caught.value.lr - 4e-3) < 1e-12
    assert all(text in str(caught.value) for text in ("step 4", "4.00e-03", "clip30.mp4", "step_00000003"))
    assert end.called and all(p.isfinite().all() for p in model.parameters())
    saved = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    for name, w in model.state_dict().items(): assert torch.equal(saved[name], w)
    again = fit(model, DataLoader(Points(), batch_size=8), config)   # the clip is repaired: the run goes on
    assert again["step"] == list(range(1, 21))
    torch.manual_seed(0)
    whole = fit(Net(), DataLoader(Points(), batch_size=8), TrainConfig(steps=20, lr=1e-2, warmup=10))
    assert again["loss"] == whole["loss"]


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    loader = DataLoader(Points(), batch_size=13)
    _, first = trained(loader, steps=3, folder=tmp_path)
    with pytest.raises(ValueError, match="lr was 0.01, now 0.1"): fit(Net(), loader, TrainConfig(steps=3, lr=0.1, folder=tmp_path))
    assert trained(loader, steps=3, folder=tmp_path, save_every=1, keep=1)[1] == first   # how often to save does not matter


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="no batch"): trained([], steps=1)


def test_in_a_terminal(capsys):
    _, history = trained(DataLoader(Points(), batch_size=13), steps=3)
    fit(Net(), DataLoader(Points(), batch_size=13), TrainConfig(steps=3), callbacks=[ProgressBar(), LivePlot()])
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "loss=" in err


class Stop(Callback):
    "Ends the run after some step, as Ctrl-C does."
    def __init__(self, step): self.step = step
    def on_step(self, run):
        if run.step == self.step: raise KeyboardInterrupt


def tune(folder, *callbacks):
    "A fine-tuning with everything that a checkpoint must carry: rates per layer, mixtures, drop path, an average of the weights."
    torch.manual_seed(0)
    model = VideoClassifier(8, image_size=16, patch=8, frames=4, tubelet=2, dim=16, depth=3, heads=2, drop_path=0.2)
    task = FineTune(model, 8)
    ema = EMA(task, decay=0.8)
    loader = make_loader(SynthDataset(16, frames=4, size=16), 4, shuffle=True)
    history = fit(task, loader, TrainConfig(steps=10, lr=1e-2, layer_decay=0.6, folder=folder, save_every=4), callbacks=[ema, *callbacks])
    return task, ema, history


def test_rates_per_layer_and_average_survive_a_stop(tmp_path):
    task, ema, history = tune(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt): tune(tmp_path / "cut", Stop(6))
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["step_00000004"]
    task2, ema2, history2 = tune(tmp_path / "cut")
    assert history2["loss"] == history["loss"] and history2["step"] == list(range(1, 11))
    for a, b in ((task, task2), (ema.model, ema2.model)):
        for name, value in a.state_dict().items(): assert torch.equal(value, b.state_dict()[name]), name
    assert any(not torch.equal(v, ema.model.state_dict()[k]) for k, v in task.state_dict().items())


def test_an_average_is_in_every_checkpoint_or_in_none(tmp_path):
    loader = DataLoader(Points(), batch_size=10)
    torch.manual_seed(0)
    ema = EMA(Net())
    with pytest.raises(KeyboardInterrupt):   # a callback fails before the average has moved
        config = TrainConfig(steps=8, folder=tmp_path, save_every=2)
        fit(Net(), loader, config, callbacks=[Stop(4), ema])
    path, = checkpoints(tmp_path)
    assert path.name == "step_00000002" and (path / "ema.safetensors").exists()
    fit(Net(), loader, TrainConfig(steps=8, folder=tmp_path / "without"))
    with pytest.raises(ValueError, match="holds no average"):
        config = TrainConfig(steps=8, folder=tmp_path / "without")
        fit(Net(), loader, config, callbacks=[EMA(Net())])


def test_a_run_that_stops_at_nan_keeps_its_average(tmp_path):
    torch.manual_seed(0)
    model = Net()
    ema = EMA(model, decay=0.5)
    with pytest.raises(NonFiniteLoss): fit(model, DataLoader(Points(poisoned=33), batch_size=10), TrainConfig(steps=8, folder=tmp_path), callbacks=[ema])
    path, = checkpoints(tmp_path)
    saved = load_file(path / "ema.safetensors")
    for name, value in ema.model.state_dict().items(): assert torch.equal(value, saved[name])


class Stack(torch.nn.Module):
    "Blocks with stochastic depth, as many rates as blocks."
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(8, 2, drop_path=i / 20) for i in range(depth))
    def forward(self, batch):
        x = batch["x"].unflatten(1, (2, 4)).repeat(1, 1, 2)
        for block in self.blocks: x = block(x)
        return dict(loss=(x.mean((1, 2)) - batch["y"]).square().mean())


def stack_run(depth=3, **options):
    torch.manual_seed(0)
    model = Stack(depth)
    return model, fit(model, DataLoader(Points(), batch_size=13), TrainConfig(steps=4, lr=1e-2, **options))


def test_recompute_changes_nothing(tmp_path):
    plain, one = stack_run(folder=tmp_path)
    model, two = stack_run(recompute=True)
    assert one["loss"] == two["loss"] and all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))
    assert not any("forward" in vars(b) for b in model.blocks)
    shutil.rmtree(checkpoints(tmp_path)[-1])
    assert stack_run(recompute=True, folder=tmp_path)[1]["loss"] == one["loss"]   # it does not belong to a run's numbers


@pytest.mark.parametrize("recompute", [False, True])
def test_every_block_is_compiled(tmp_path, monkeypatch, recompute):
    "With more rates of stochastic depth than torch has patience for; the saved names are plain."
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile, backend=counter))
    torch._dynamo.reset()
    _, history = stack_run(10, compile=True, recompute=recompute, folder=tmp_path)
    assert counter.frame_count >= 10 and not any("_orig_mod" in name for name in load_file(checkpoints(tmp_path)[-1] / "model.safetensors"))
    assert_close(history["loss"], stack_run(10)[1]["loss"], atol=1e-5, rtol=1e-5)


def test_fsdp_of_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shard=True"): trained(DataLoader(Points(), batch_size=13), steps=1)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    trained(DataLoader(Points(), batch_size=13), steps=1)
