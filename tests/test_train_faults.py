"Training under failure: damaged checkpoints, full disks, changed data, processes that are gone."

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import train_toy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_train import ENV, HERE, Stop, free_port, history, launch, trained
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from train_toy import Net, Points

from vfm_lab.data.datasets import VideoManifest, make_loader
from vfm_lab.data.reader import sparse_indices
from vfm_lab.data.transforms import train_transform
from vfm_lab.files import locked
from vfm_lab.lab import asset
from vfm_lab.nn.vit import VideoClassifier
from vfm_lab.tasks.finetune import FineTune
from vfm_lab.train import callbacks as room
from vfm_lab.train import loop, resume
from vfm_lab.train.callbacks import EMA, Callback, LivePlot, ProgressBar, Validate, curves_png
from vfm_lab.train.loop import NonFiniteLoss, TrainConfig, fit
from vfm_lab.train.resume import RunError, checkpoints, fingerprint


class Watch(Callback):
    "A curve with a value at every third step."

    def on_step(self, run):
        if run.step % 3 == 0:
            run.log(third=run.step / 3)


def go(folder, *more, poisoned=-1, **options):
    "Twelve steps with everything that a checkpoint carries; the run and its history."
    torch.manual_seed(0)
    model = Net(dropout=0.1)
    ema, loader = EMA(model, 0.5), DataLoader(Points(0.1, poisoned), batch_size=10, shuffle=True)
    config = dict(steps=12, lr=1e-2, accumulate=2, folder=folder, save_every=4) | options
    curves = fit(model, loader, TrainConfig(**config), callbacks=[ema, Watch(), *more])
    return model, ema.model, curves


def same(a, b):
    for one, other in zip(a[:2], b[:2]):
        for name, w in one.state_dict().items():
            assert torch.equal(w, other.state_dict()[name]), name
    clock = ("seconds",)
    assert {k: v for k, v in a[2].items() if k not in clock} == {
        k: v for k, v in b[2].items() if k not in clock
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    "A run that ended in step 9, with checkpoints of step 4 and 8."
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        go(folder, Stop(9))
    assert [p.name for p in checkpoints(folder)] == ["step_00000004", "step_00000008"]
    return folder


@pytest.fixture
def cut(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "cut")


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x04
    file.write_bytes(content)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-7])


def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file):
    file.write_bytes(b"")


FILES = ("model.safetensors", "optimizer.pt", "ema.safetensors", "run.json")
DAMAGE = [(name, how) for name in FILES for how in (flip, shorten, grow, empty, Path.unlink)]


@pytest.mark.parametrize("name,how", DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_checkpoint_costs_a_few_steps(whole, cut, name, how):
    how(cut / "step_00000008" / name)
    with pytest.warns(
        UserWarning, match=r"step_00000008 is damaged \(.*\): going on from step_00000004"
    ) as seen:
        run = go(cut)
    assert name in str(seen[0].message) or how is Path.unlink
    same(whole, run)
    names = sorted(p.name for p in cut.iterdir())
    kept = ["damaged_step_00000008", "log.jsonl", "step_00000008", "step_00000012"]
    assert names == [".lock", *kept]


def test_no_bit_of_a_checkpoint_can_flip_unseen(cut):
    "Of each file, 40 places from the first byte to the last."
    torch.manual_seed(0)
    run = loop.Run(Net(0.1), None, TrainConfig(steps=12, lr=1e-2, accumulate=2), None)
    path = cut / "step_00000008"
    resume._read(path, run)
    for name in FILES:
        good = (path / name).read_bytes()
        for k in range(41):
            flip(path / name, k / 40)
            with pytest.raises((resume._Damaged, ValueError)):
                resume._read(path, run)
            (path / name).write_bytes(good)
    resume._read(path, run)


def older(path, **changes):
    "As versions without checksums wrote it."
    state = json.loads((path / "run.json").read_text())
    for key in ("sha256", "files", "at", "data"):
        del state[key]
    (path / "run.json").write_text(json.dumps(state | changes))


def test_an_older_checkpoint_still_loads(whole, cut, capsys):
    for path in checkpoints(cut):
        older(path)
    same(whole, go(cut))
    assert "without checksums" in capsys.readouterr().out


WRONG = [
    dict(step=-3),
    dict(step=4),
    dict(step="8"),
    dict(step=True),
    dict(step=None),
    dict(epoch=-1),
    dict(batch=1.5),
    dict(history=[1]),
    dict(history={"loss": 3}),
    dict(history={"loss": [None]}),
    dict(config=None),
    dict(history={"loss": ["much"]}),
    dict(files=[]),
    dict(files={"model.safetensors": 1}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_run_json_is_damage(whole, cut, wrong):
    older(cut / "step_00000008", **wrong)
    with pytest.warns(UserWarning, match="step_00000008 is damaged"):
        same(whole, go(cut))


def test_nan_is_no_good_state(whole, cut):
    path = cut / "step_00000008"
    older(path)
    weights = load_file(path / "model.safetensors")
    weights["layers.2.weight"][3] = math.nan
    save_file(weights, path / "model.safetensors")
    with pytest.warns(UserWarning, match="layers.2.weight holds NaN"):
        same(whole, go(cut))


def test_strangers_in_the_folder(whole, cut):
    (cut / "step_zzz").write_text("x")
    (cut / "step_00000011").write_text("a file")
    shutil.copytree(cut / "step_00000008", cut / "step_00000008_backup")
    shutil.copytree(cut / "step_00000008", cut / ".step_00000010.77.draft")
    (cut / "step_00000009").mkdir()  # hollow, as after a power cut
    shutil.copytree(cut / "step_00000008", cut / "step_00000010")  # somebody's copy
    assert [p.name for p in checkpoints(cut)] == ["step_00000004", "step_00000008"]
    with pytest.warns(UserWarning, match="going on from step_00000008") as seen:
        same(whole, go(cut))
    assert len([w for w in seen if "damaged" in str(w.message)]) == 2
    assert (cut / "step_zzz").exists() and (cut / "step_00000008_backup").exists()
    assert not list(cut.glob(".step*"))


def test_when_none_is_left_all_reasons_are_told(cut):
    shorten(cut / "step_00000004" / "optimizer.pt")
    flip(cut / "step_00000008" / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        go(cut)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith(str(cut))
    assert (
        "step_00000004 (optimizer.pt: " in message
        and "step_00000008 (model.safetensors: " in message
    )
    assert [p.name for p in resume._named(cut)] == [
        "step_00000004",
        "step_00000008",
    ]  # nothing is moved


def test_another_model_is_refused(cut):
    config = TrainConfig(steps=12, lr=1e-2, accumulate=2, folder=cut, save_every=4)
    model = torch.nn.Sequential(Net())
    with pytest.raises(ValueError, match="does not fit the model"):
        fit(model, DataLoader(Points(0.1), 10), config)


def test_two_processes_choose_the_same_checkpoint(tmp_path):
    "Rank 1 alone could have taken the damaged one."
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        run = launch(tmp_path / name, noise=0.1, steps=12, save_every=4)
        assert run.returncode == 0, run.stderr
    folder = tmp_path / "cut"
    flip(checkpoints(folder / "run")[-1] / "model.safetensors")
    run = launch(folder, noise=0.1, steps=12, save_every=4)
    assert run.returncode == 0 and "step_00000012 is damaged" in run.stderr, run.stderr
    one, two = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("whole", "cut"))
    assert all(torch.equal(w, two[k]) for k, w in one.items())
    assert (
        history(folder, 0)["loss"]
        == history(folder, 1)["loss"]
        == history(tmp_path / "whole")["loss"]
    )


# what is written


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_stops_at_nan_goes_on_bit_for_bit(tmp_path, step):
    whole = go(None)
    order = [
        name
        for batch in resume.fixed_order(DataLoader(Points(), batch_size=10, shuffle=True), 0)(0)
        for name in batch["name"]
    ]
    bad = int(
        order[20 * step - 15].removeprefix("clip").removesuffix(".mp4")
    )  # a step has 20 clips
    with pytest.raises(NonFiniteLoss) as caught:
        go(tmp_path, poisoned=bad)
    path = checkpoints(tmp_path)[-1]
    assert str(path) in str(caught.value) and caught.value.step == int(path.name[5:]) + 1
    same(whole, go(tmp_path))


def test_averages_that_began_late_are_not_invented(tmp_path):
    "A weight without a gradient until step 5 has no averages, and none after a resume either."

    class Late(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)
            self.c = torch.nn.Linear(8, 1)
            self.c.weight = self.a.weight  # tied
            self.calls = 0

        def forward(self, batch):
            y = self.a(batch["x"]) + self.c(batch["x"] ** 2)
            if self.calls >= 5:
                y = y + self.b(batch["x"])
            self.calls += 1
            return dict(loss=(y[:, 0] - batch["y"]).square().mean())

    def run(folder, calls, *more):
        torch.manual_seed(0)
        model = Late()
        model.calls = calls
        fit(
            model,
            DataLoader(Points(), 10),
            TrainConfig(steps=8, lr=1e-2, folder=folder, save_every=2),
            callbacks=more,
        )
        return model

    whole = run(None, 0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 0, Stop(5))
    for a, b in zip(whole.parameters(), run(tmp_path, 4).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_spoilt_state_is_not_called_good(tmp_path):
    class Spoil(Callback):
        def on_step(self, run):
            if run.step == 6:
                run.model.layers[0].weight.data[0, 0] = math.inf

    with pytest.raises(NonFiniteLoss) as caught:
        go(tmp_path, Spoil())
    assert "layers.0.weight holds NaN or infinity" in str(caught.value)
    assert f"the last good one is {tmp_path / 'step_00000004'}" in str(caught.value)
    with pytest.raises(FloatingPointError, match="is not saved, the last good one is none yet"):
        go(tmp_path / "now", Spoil(), save_every=6)
    assert not checkpoints(tmp_path / "now")


def test_infinite_curves_and_masks_survive(tmp_path):
    class Odd(Callback):
        def on_step(self, run):
            run.log(odd=(math.inf, -math.inf, 1.0)[run.step % 3])

    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -math.inf))

    config = TrainConfig(steps=4, folder=tmp_path)
    first = fit(Masked(), DataLoader(Points(), 10), config, callbacks=[Odd()])
    json.loads((checkpoints(tmp_path)[-1] / "run.json").read_text(), parse_constant=pytest.fail)
    assert (
        fit(Masked(), DataLoader(Points(), 10), config)["odd"]
        == first["odd"]
        == [-math.inf, 1.0, math.inf, -math.inf]
    )


ERRORS = {
    "torch.save": (
        torch,
        "save",
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64\nmore"),
    ),
    "save_file": (
        resume,
        "save_file",
        SafetensorError("IoError(Os { code: 28, kind: StorageFull })"),
    ),
    "sync": (resume, "sync", OSError(28, "No space left on device")),
    "rename": (os, "replace", OSError(30, "Read-only file system")),
}


@pytest.mark.parametrize("where", ERRORS)
def test_a_disk_that_takes_no_more(whole, cut, monkeypatch, where):
    module, name, error = ERRORS[where]

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(RunError) as caught:
            go(cut)
    message = str(caught.value)
    assert (
        message.startswith(f"cannot write {cut / 'step_00000012'} (")
        and "MB free)" in message
        and "\n" not in message
    )
    assert [p.name for p in checkpoints(cut)] == ["step_00000004", "step_00000008"] and not list(
        cut.glob(".step*")
    )
    same(whole, go(cut))


def test_a_limit_on_files(tmp_path):
    "The real thing: the kernel refuses files above 8 kB."
    script = f"ulimit -f 8; exec {sys.executable} {HERE}/train_toy.py {tmp_path}"
    run = subprocess.run(
        ["bash", "-c", script], env=ENV, capture_output=True, text=True, timeout=120
    )
    assert (
        run.returncode == 1
        and f"RunError: cannot write {tmp_path}/run/step_00000005 (" in run.stderr
    ), run.stderr


def test_one_run_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another run is at work"):
        go(tmp_path)
    go(tmp_path)


def test_a_start_that_fails_leaves_the_folder_free(tmp_path):
    loader = DataLoader(Points(), batch_size=10)
    with pytest.raises(ValueError, match="trainable list `blocks`"):
        fit(Net(), loader, TrainConfig(steps=2, layer_decay=0.5, folder=tmp_path))
    with pytest.raises(ValueError, match="no batch"):
        fit(Net(), [], TrainConfig(steps=2, lr=0.1, folder=tmp_path))
    assert len(fit(Net(), loader, TrainConfig(steps=2, folder=tmp_path))["loss"]) == 2


# the data


class Known(Dataset):
    "Data that know their fingerprint."

    def __init__(self, word):
        self.word, self.points = word, Points()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, i):
        return self.points[i]

    def fingerprint(self):
        return self.word


class Flow(IterableDataset):
    def __iter__(self):
        return iter([Points()[i] for i in range(52)])


def test_changed_data_are_refused(tmp_path):
    def run(data, folder):
        return fit(
            Net(), DataLoader(data, batch_size=10), TrainConfig(steps=3, folder=tmp_path / folder)
        )

    run(Known("rows 1"), "own")
    assert len(run(Known("rows 1"), "own")["loss"]) == 3
    for other in (Known("rows 2"), ConcatDataset([Known("rows 1"), Known("rows 2")])):
        with pytest.raises(
            ValueError,
            match="step_00000003 belongs to a run on other data .rows 1, now .*its own folder",
        ):
            run(other, "own")
    run(Subset(Points(), range(40)), "subset")
    with pytest.raises(ValueError, match="other data"):
        run(Subset(Points(), range(1, 41)), "subset")
    run(Subset(Points(), range(40)), "subset")
    run(Points(), "plain")
    with pytest.raises(ValueError, match="other data .52 items, now 40 items"):
        run([Points()[i] for i in range(40)], "plain")
    run(Flow(), "plain")  # nothing is known about a stream
    run(Flow(), "flow")
    run(Points(), "flow")


def test_a_loader_may_know_it_too():
    class Shards:
        def fingerprint(self):
            return "17 tars"

    assert (
        fingerprint(Shards()) == "17 tars"
        and fingerprint(iter([])) is None
        and fingerprint(None) is None
    )
    assert fingerprint(DataLoader(Subset(Known("w"), [1]))).startswith("w · ")


class Used(Callback):
    "After each step the epoch, and how many of its clips are used."

    def __init__(self, batch):
        self.batch, self.clips = batch, []

    def on_step(self, run):
        self.clips.append((run.epoch, run.batch * self.batch))


@pytest.fixture(scope="module")
def accumulated():
    "35 clips from files, 8 in a step, in batches of 8, 4 and 2."
    runs = {}
    for n in (1, 2, 4):
        torch.manual_seed(0)
        model = VideoClassifier(
            8, image_size=16, patch=8, frames=2, tubelet=1, dim=16, depth=1, heads=2
        )
        views = dict(sampler=partial(sparse_indices, frames=2), transform=train_transform(16))
        clips = VideoManifest(asset("clips/manifest.csv"), **views).subset(range(35))
        loader = make_loader(clips, 8 // n, shuffle=True, drop_last=True)
        config = TrainConfig(steps=9, lr=1e-2, clip_grad=1.0, accumulate=n)
        task, used = FineTune(model, 8, mixup=0, cutmix=0, smoothing=0), Used(8 // n)
        runs[n] = fit(task, loader, config, callbacks=[used]), used.clips
    return runs


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_changes_memory_only(accumulated, n):
    one, many = accumulated[1], accumulated[n]
    for curve in ("step", "loss", "accuracy", "grad_norm", "lr"):
        assert_close(many[0][curve], one[0][curve], atol=1e-5, rtol=1e-4)
    assert (
        many[1] == one[1] == [(e, b) for e in (0, 1) for b in (8, 16, 24, 32)] + [(2, 8)]
    )  # 4 steps an epoch


def test_an_epoch_too_short_for_a_step():
    with pytest.raises(ValueError, match="accumulate: a step takes 7 batches, an epoch has 6"):
        trained(DataLoader(Points(), batch_size=10), steps=1, accumulate=7)


RANGES = [
    dict(steps=0),
    dict(steps=-5),
    dict(steps=2.0),
    dict(steps=10**8),
    dict(lr=-1),
    dict(lr=math.nan),
    dict(lr=math.inf),
    dict(lr="1"),
    dict(min_lr=-1e-9),
    dict(warmup=-1),
    dict(warmup=9),
    dict(weight_decay=math.nan),
    dict(layer_decay=0),
    dict(layer_decay=1.5),
    dict(betas=(0.9, 1.0)),
    dict(betas=(-0.1, 0.9)),
    dict(betas=(0.9,)),
    dict(betas=0.9),
    dict(eps=0),
    dict(clip_grad=0),
    dict(clip_grad=-1),
    dict(accumulate=0),
    dict(accumulate=True),
    dict(precision="fp8"),
    dict(save_every=-1),
    dict(keep=0),
    dict(keep=-1),
    dict(timeout=0),
    dict(seed=None),
]


@pytest.mark.parametrize("wrong", RANGES, ids=str)
def test_impossible_numbers_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{'beta' if name == 'betas' else name}"):
        TrainConfig(**dict(steps=8) | wrong)


# callbacks


class Fails(Callback):
    def __init__(self, moment):
        self.moment, self.ended = moment, False

    def on_start(self, run):
        if self.moment == "start":
            raise KeyError("the first error")

    def on_step(self, run):
        if self.moment == "step":
            raise KeyError("the first error")

    def on_end(self, run):
        self.ended = True
        raise OSError("a later error")


@pytest.mark.parametrize("moment", ["start", "step"])
def test_the_first_error_is_the_one_that_is_seen(moment):
    one, bar, two = Fails(None), ProgressBar(), Fails(moment)
    with (
        pytest.warns(UserWarning, match="on_end failed as well: OSError"),
        pytest.raises(KeyError, match="the first error"),
    ):
        fit(Net(), DataLoader(Points(), 10), TrainConfig(steps=2), callbacks=[one, two, bar])
    assert (
        one.ended and two.ended == (moment == "step") and hasattr(bar, "bar") == (moment == "step")
    )


def test_an_error_at_the_end_is_seen_too():
    one, two = Fails(None), Fails(None)
    with pytest.raises(OSError, match="a later error"):
        fit(Net(), DataLoader(Points(), 10), TrainConfig(steps=2), callbacks=[one, two])
    assert one.ended and two.ended


def test_curves_with_fewer_values_than_steps(tmp_path, monkeypatch, capsys):
    shown, drawn = [], []
    monkeypatch.setattr(room, "_in_notebook", lambda: True)
    monkeypatch.setattr(room._Shown, "show", lambda self, data: shown.append(data))
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **style: drawn.append((list(x), list(y))) or plot(self, x, y, **style),
    )
    watch = [ProgressBar(("loss", "third", "never")), LivePlot(("loss", "third", "never"), every=0)]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, *watch, Stop(7))
    *_, curves = go(tmp_path, *watch)
    loss, third, never = drawn[-3:]
    assert (
        third == ([3, 6, 9, 12], [1.0, 2.0, 3.0, 4.0])
        and never == ([], [])
        and loss[0] == curves["step"]
    )
    assert any("third=2" in str(data) for data in shown) and any(
        "image/png" in data for data in shown
    )
    assert curves_png(curves, ["loss", "never"], 12)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="third: 4 values for 12 steps"):
        curves_png(curves, ["third"], 12)


def test_validation_leaves_the_model_as_it_was():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.layers[2].eval()  # this part never trains
            return self

    seen = []

    def measure(run):
        seen.append((run.step, [m.training for m in run.model.modules()], torch.is_grad_enabled()))
        return dict(top1=torch.tensor(0.5), interval=(0, 1), confusion=torch.zeros(2, 2), videos=3)

    def run(*callbacks):
        torch.manual_seed(0)
        model = Frozen(0.1)
        return model, fit(
            model, DataLoader(Points(), 10), TrainConfig(steps=5, lr=1e-2), callbacks=callbacks
        )

    (_, h1), (model, h2) = run(), run(Validate(measure, 2))
    assert [s for s, *_ in seen] == [2, 4, 5] and not any(
        any(modes) or grad for _, modes, grad in seen
    )
    assert model.training and not model.layers[2].training and h1["loss"] == h2["loss"]
    assert (
        h2["val_top1"] == [0.5] * 3
        and h2["val_videos"] == [3] * 3
        and set(h2) - set(h1) == {"val_top1", "val_videos"}
    )
    with pytest.raises(ValueError, match="every"):
        Validate(measure, 0)


# several processes


def test_two_processes_validate_as_one(tmp_path):
    "evaluate() adds up over the processes: called on the main one alone, it would wait for ever."
    alone = tmp_path / "alone"
    alone.mkdir()
    one = train_toy.tune(alone)
    run = launch(tmp_path, do="tune")
    assert run.returncode == 0, run.stderr
    for rank in (0, 1):
        two = history(tmp_path, rank)
        for name in ("val_top1", "val_top5", "ema_top1", "val_videos"):
            assert_close(two[name], one[name], atol=1e-6, rtol=0)
    assert one["val_videos"] == [11] * 3 and len(one["ema_top1"]) == 2


def ranks(folder, **options):
    "Two processes, started by hand, so that nobody ends one when the other does."
    here = dict(
        ENV,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
    )
    command = [sys.executable, HERE / "train_toy.py", folder, json.dumps(options)]
    return [
        subprocess.Popen(
            command,
            env=dict(here, RANK=str(r), LOCAL_RANK=str(r)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in (0, 1)
    ]


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_gone_is_reported(tmp_path, how):
    both = ranks(tmp_path, slow=True, steps=2000, timeout=5)
    stop = time.time() + 60
    while not checkpoints(tmp_path / "run") and time.time() < stop:
        time.sleep(0.05)
    both[1].send_signal(how)
    try:
        _, err = both[0].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
        both[1].communicate()
    assert (
        both[0].returncode == 1
        and "RunError: another process of this run has ended, or did not answer for 5 s" in err
    ), err
    assert checkpoints(tmp_path / "run")


def test_all_processes_hear_why_the_main_one_fails(tmp_path):
    with locked(tmp_path / "run"):
        run = launch(tmp_path, steps=5)
    assert (
        run.returncode == 1 and run.stderr.count("another run is at work in this folder\n") == 2
    ), run.stderr
