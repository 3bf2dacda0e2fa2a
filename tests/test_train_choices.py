"What a run may choose: optimizer, schedule, validation, end, record; all of it bit for bit."

import json
import math
import signal
import time
from functools import partial

import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from test_train import Stop, final, history, same_run, toy
from torch.testing import assert_close
from torch.utils.data import DataLoader, Subset
from train_toy import Net, Points

from vfm_lab.train import loop
from vfm_lab.train.callbacks import (
    Callback,
    EarlyStop,
    KeepBest,
    LivePlot,
    Validate,
    losses_on,
)
from vfm_lab.train.loop import fit
from vfm_lab.train.optim import layer_numbers, param_groups
from vfm_lab.train.resume import best_checkpoint, checkpoints
from vfm_lab.train.run import TrainConfig, learning_rate, make_optimizer


def root(step):
    "A schedule without a name."
    return 1e-2 / math.sqrt(1 + step)


OPTIMIZERS = {
    "adamw": dict(),
    "adam": dict(optimizer="adam"),
    "sgd": dict(optimizer="sgd", momentum=0.8),
    "sgd without momentum": dict(optimizer="sgd", momentum=0.0),
    "given": dict(optimizer=partial(torch.optim.RMSprop, momentum=0.5)),
}
SCHEDULES = {
    "cosine": dict(warmup=2),
    "step": dict(schedule="step", milestones=(3, 7), gamma=0.3),
    "restarts": dict(schedule="restarts", cycle=2, cycle_mult=2, min_lr=1e-4, warmup=1),
    "plateau": dict(schedule="plateau", patience=0, factor=0.5, min_lr=1e-3),
    "given": dict(schedule=root),
}


def unseen():
    return DataLoader(Subset(Points(0.1), range(0, 52, 5)), batch_size=4)


def go(folder, *more, **options):
    torch.manual_seed(0)
    model = Net(dropout=0.1)
    loader = DataLoader(Points(0.1), batch_size=10, shuffle=True)
    config = dict(steps=12, lr=1e-2, folder=folder, save_every=4) | options
    watch = [Validate(losses_on(unseen()), 2), *more]
    curves = fit(model, loader, TrainConfig(**config), callbacks=watch)
    return model.state_dict(), {k: v for k, v in curves.items() if k != "seconds"}


def same(a, b):
    assert a[1] == b[1]
    for name, weight in a[0].items():
        assert torch.equal(weight, b[0][name]), name


CHOICES = [(o, "cosine") for o in OPTIMIZERS] + [("adamw", s) for s in SCHEDULES]
CHOICES += [("sgd", "plateau"), ("adam", "restarts")]


@pytest.mark.parametrize("optimizer,schedule", CHOICES)
def test_every_choice_goes_on_bit_for_bit(tmp_path, optimizer, schedule):
    options = OPTIMIZERS[optimizer] | SCHEDULES[schedule]
    whole = go(None, **options)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Stop(7), **options)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000004"]
    same(whole, go(tmp_path, **options))
    same(whole, go(tmp_path, **options))  # over: nothing is left to do


def test_another_choice_in_the_same_folder_is_refused(tmp_path):
    go(tmp_path, optimizer="sgd", schedule=root)
    with pytest.raises(ValueError, match="optimizer was 'sgd', now 'adamw'"):
        go(tmp_path, schedule=root)
    with pytest.raises(ValueError, match="schedule was 'test_train_choices.root', now 'cosine'"):
        go(tmp_path, optimizer="sgd")
    go(tmp_path, optimizer="sgd", schedule=root)
    go(tmp_path / "given", **OPTIMIZERS["given"])
    other = partial(torch.optim.RMSprop, momentum=0.6)
    with pytest.raises(ValueError, match="optimizer was .*RMSprop with .*0.5.*, now .*0.6"):
        go(tmp_path / "given", optimizer=other)


def test_an_older_checkpoint_knew_fewer_fields(tmp_path):
    whole = go(tmp_path)
    for path in checkpoints(tmp_path):
        state = json.loads((path / "run.json").read_text())
        for key in ("sha256", "lr_scale", "best"):
            del state[key]
        fields = ("schedule", "optimizer", "momentum", "milestones", "cycle", "log", "monitor")
        for key in fields:
            del state["config"][key]
        (path / "run.json").write_text(json.dumps(state))
    same(whole, go(tmp_path))
    with pytest.raises(ValueError, match="optimizer was 'adamw', now 'sgd'"):
        go(tmp_path, optimizer="sgd")


def test_torch_takes_the_same_steps():
    "SGD with momentum, decay and milestones, against torch's own loop."
    torch.manual_seed(0)
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    batches = list(DataLoader(Points(), batch_size=13))
    options = dict(optimizer="sgd", momentum=0.7, schedule="step", milestones=(3, 5), gamma=0.2)
    fit(model, batches, TrainConfig(steps=8, lr=0.05, weight_decay=0.1, **options))
    matrices = [p for p in other.parameters() if p.ndim > 1]
    rest = [p for p in other.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=rest)]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.7)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], 0.2)
    for i in range(8):
        optimizer.zero_grad()
        other(batches[i % 4])["loss"].backward()
        optimizer.step()
        scheduler.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_kinds_of_optimizers():
    groups = [dict(params=[torch.nn.Parameter(torch.ones(2))], weight_decay=0.3)]
    kinds = dict(adamw=torch.optim.AdamW, adam=torch.optim.Adam, sgd=torch.optim.SGD)
    for name, kind in kinds.items():
        made = make_optimizer(groups, TrainConfig(1, optimizer=name, betas=(0.5, 0.6)))
        assert type(made) is kind and made.param_groups[0]["weight_decay"] == 0.3
        assert made.defaults.get("betas", (0.5, 0.6)) == (0.5, 0.6)


WRONG = [
    dict(optimizer="lion"),
    dict(optimizer=3),
    dict(schedule="linear"),
    dict(schedule=None),
    dict(momentum=1.0),
    dict(momentum=-0.1),
    dict(schedule="step"),
    dict(milestones=(3,)),
    dict(schedule="step", milestones=(3, 3)),
    dict(schedule="step", milestones=(5, 3)),
    dict(schedule="step", milestones=(0, 3)),
    dict(schedule="step", milestones=3),
    dict(schedule="step", milestones=(1.5,)),
    dict(gamma=0),
    dict(gamma=math.nan),
    dict(schedule="restarts"),
    dict(cycle=3),
    dict(cycle=-1),
    dict(cycle_mult=0),
    dict(factor=0),
    dict(factor=1.0),
    dict(patience=-1),
    dict(patience=1.5),
    dict(monitor=""),
    dict(monitor=None),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_choices_that_cannot_be_meant_are_refused_by_name(wrong):
    names = [*wrong, "milestones", "cycle"]
    with pytest.raises(ValueError) as caught:
        TrainConfig(**dict(steps=8) | wrong)
    assert str(caught.value).split(":")[0] in names


def test_no_schedule_divides_by_a_warm_up_of_all_steps():
    for options in SCHEDULES.values():
        config = TrainConfig(**dict(steps=12, lr=1e-2) | options | dict(warmup=12))
        rates = [learning_rate(step, config) for step in range(13)]
        assert all(math.isfinite(rate) for rate in rates)


# validation


class Half(Net):
    "Its loss is the mean over some points only, and says over how many."

    def forward(self, batch):
        chosen = batch["y"] > 0
        out = super().forward(dict(x=batch["x"][chosen], y=batch["y"][chosen]))
        return out | dict(weight=chosen.sum())


@pytest.mark.parametrize("kind", [Net, Half])
def test_a_validation_is_the_mean_over_all_clips(kind):
    torch.manual_seed(0)
    model, data = kind(), Points()
    watch = Validate(losses_on(DataLoader(data, batch_size=9)), 3)
    curves = fit(model, DataLoader(data, batch_size=13), TrainConfig(steps=3), callbacks=[watch])
    every = {k: torch.stack([data[i][k] for i in range(52)]) for k in ("x", "y")}
    with torch.no_grad():
        want = model(every)
    assert_close(curves["val_loss"], [want["loss"].item()])
    assert_close(curves["val_mae"], [want["mae"].item()])


def test_a_validation_draws_the_same_each_time():
    torch.manual_seed(0)
    watch = Validate(losses_on(DataLoader(Points(noise=1.0), batch_size=9, shuffle=True)), 1)
    config = TrainConfig(steps=3, lr=0.0, weight_decay=0.0)
    curves = fit(Net(), DataLoader(Points(), batch_size=13), config, callbacks=[watch])
    first, *others = curves["val_loss"]
    assert_close(others, [first] * 2)


def test_a_loader_that_is_no_DataLoader():
    torch.manual_seed(0)
    batches = list(DataLoader(Points(), batch_size=9))
    watch = [Validate(losses_on(batches), 2), Validate(losses_on([]), 3, "none_")]
    with pytest.raises(ValueError, match="validation's loader gave no batch"):
        fit(Net(), batches, TrainConfig(steps=3), callbacks=watch)


# who acts


def test_the_order_of_callbacks_does_not_matter(tmp_path):
    "Those that wait for a value are called after the one that makes it."
    runs = []
    for i, turned in enumerate((False, True)):
        torch.manual_seed(0)
        watch = [Validate(losses_on(unseen()), 1), KeepBest(), EarlyStop(patience=1)]
        config = TrainConfig(steps=30, lr=0.3, folder=tmp_path / str(i))
        loader = DataLoader(Points(), batch_size=10)
        runs.append(fit(Net(), loader, config, callbacks=watch[::-1] if turned else watch))
    assert runs[0]["val_loss"] == runs[1]["val_loss"] and len(runs[0]["loss"]) < 30
    best = runs[0]["val_loss"].index(min(runs[0]["val_loss"])) + 1
    for i in (0, 1):
        assert best_checkpoint(tmp_path / str(i)).name == f"step_{best:08d}"


def test_killed_while_it_is_judged(tmp_path):
    "SIGKILL between checkpoints: best value, patience, plateau and rate are what they were."
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    options = dict(do="judged", save_every=3, patience=1)
    code, err = toy(tmp_path / "whole", **options)
    assert code == 0, err
    process = toy(tmp_path / "killed", wait=False, slow=True, **options)
    stop = time.time() + 60
    log = tmp_path / "killed" / "run" / "log.jsonl"
    while time.time() < stop and (not log.exists() or len(log.read_text().splitlines()) < 8):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    written = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert written == list(range(1, len(written) + 1))
    code, err = toy(tmp_path / "killed", **options)
    assert code == 0, err
    same_run(tmp_path / "whole", tmp_path / "killed")
    curves = history(tmp_path / "whole")
    assert len({*curves["lr"]}) > 1 and len(curves["loss"]) < 40
    runs = [tmp_path / name / "run" for name in ("whole", "killed")]
    assert best_checkpoint(runs[0]).name == best_checkpoint(runs[1]).name
    lines = [[json.loads(s) for s in (run / "log.jsonl").open()] for run in runs]
    for both in zip(*lines, strict=True):
        assert {**both[0], "seconds": 0} == {**both[1], "seconds": 0}
    assert final(tmp_path / "whole").keys() == final(tmp_path / "killed").keys()


def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path):
    class Rising(Callback):
        def on_step(self, run):
            run.log(score=-abs(run.step - 3))

    go(tmp_path, Rising(), KeepBest("score", "max"), keep=1, save_every=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000003", "step_00000012"]
    assert best_checkpoint(tmp_path).name == "step_00000003"
    go(tmp_path / "plain")
    with pytest.raises(ValueError, match="no checkpoint says which one is the best"):
        best_checkpoint(tmp_path / "plain")
    with pytest.raises(ValueError, match="KeepBest: the run has no folder"):
        go(None, KeepBest())


def test_a_run_that_was_stopped_stays_stopped_or_goes_on(tmp_path):
    class Pause(Callback):
        def on_step(self, run):
            if run.step == 5:
                run.stop = "the night is over"

    class Never(Callback):
        def on_step(self, run):
            run.log(flat=1.0)

    whole = go(None, Never())
    go(tmp_path / "pause", Never(), Pause())
    assert checkpoints(tmp_path / "pause")[-1].name == "step_00000005"
    same(whole, go(tmp_path / "pause", Never(), Pause()))  # it is past step 5
    for _ in range(2):
        _, curves = go(tmp_path / "early", Never(), EarlyStop("flat", patience=3))
        assert curves["step"] == [1, 2, 3, 4]


def test_nan_is_never_the_best(tmp_path):
    class Odd(Callback):
        def on_step(self, run):
            run.log(odd=math.nan if run.step != 2 else 7.0)

    keep = KeepBest("odd")
    _, curves = go(tmp_path, Odd(), keep, EarlyStop("odd", patience=4))
    assert best_checkpoint(tmp_path).name == "step_00000002" and curves["step"][-1] == 6


def test_a_curve_that_nobody_draws():
    for watcher in (EarlyStop("val_lose"), EarlyStop("val_lose", mode="max")):
        with pytest.raises(ValueError, match="no curve 'val_lose'; there are .*val_loss"):
            go(None, watcher)
    torch.manual_seed(0)
    config = TrainConfig(steps=3, schedule="plateau")
    with pytest.raises(ValueError, match="monitor: there is no curve 'val_loss'"):
        fit(Net(), DataLoader(Points(), batch_size=13), config, callbacks=[LivePlot()])
    for wrong in (dict(mode="up"), dict(patience=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EarlyStop(**wrong)


def test_a_judge_that_came_too_late(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Stop(7))
    with pytest.raises(ValueError, match="step 4 has no state of EarlyStop: the run began without"):
        go(tmp_path, EarlyStop())


def test_callbacks_replace_batches_and_rates(tmp_path):
    class Act(Callback):
        def on_batch(self, run, group):
            if run.step == 1:
                return [{k: v[:3] for k, v in batch.items()} for batch in group]

        def on_step(self, run):
            run.log(seen=len(run.history["loss"]))
            if run.step == 5:
                run.lr_scale = 0.1
            if run.step == 6:
                run.save = True

    whole = go(None, Act(), lr=1e-2, min_lr=1e-2)
    assert whole[1]["lr"] == [1e-2] * 5 + [1e-3] * 7
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Act(), Stop(8), lr=1e-2, min_lr=1e-2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000004", "step_00000006"]
    same(whole, go(tmp_path, Act(), lr=1e-2, min_lr=1e-2))
    plain = go(None, lr=1e-2, min_lr=1e-2)
    assert whole[1]["loss"][0] == plain[1]["loss"][0] != whole[1]["loss"][1] != plain[1]["loss"][1]


# the record


class Page(GeneralTracker):
    name, requires_logging_directory = "page", False

    def __init__(self):
        super().__init__()
        self.lines, self.ended = [], 0

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **more):
        self.lines.append((step, values))

    def finish(self):
        self.ended += 1


def test_the_record_on_disk(tmp_path):
    class Odd(Callback):
        def on_step(self, run):
            run.log(odd=math.inf)
            lines = (tmp_path / "log.jsonl").read_text().splitlines()
            assert len(lines) == run.step - 1  # the step before is on the disk

    page = Page()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Odd(), Stop(7), log=page)
    assert [step for step, _ in page.lines] == list(range(1, 7)) and page.ended == 1
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # half a line, as after a power cut
    _, curves = go(tmp_path, Odd(), log=page)
    text = (tmp_path / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == curves["loss"] and lines[3]["odd"] == "inf"
    assert [line["val_loss"] for line in lines[1::2]] == curves["val_loss"]
    assert page.lines[6][0] == 5 and page.lines[6][1]["loss"] == curves["loss"][4]
    assert page.settings["optimizer"] == "adamw" and page.ended == 2


def test_trackers_that_are_not_there(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="log: expected one of .*tensorboard.*, got 'paper'"):
        go(None, log="paper")
    monkeypatch.setattr(loop, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="log: 'wandb' is not installed: pip install wandb"):
        go(None, log="wandb")
    there = [LoggerType.TENSORBOARD]
    monkeypatch.setattr(loop, "get_available_trackers", lambda: there)
    with pytest.raises(ValueError, match="log: 'tensorboard' writes into the folder"):
        go(None, log="tensorboard")
    go(None)  # and nothing is left behind


# towers


def test_two_towers_decay_from_their_top():
    from vfm_lab.official.internvideo import tiny_video_text

    model = tiny_video_text(frames=2)
    numbers = layer_numbers(model)
    depths = [len(tower.blocks) for tower in (model.vision, model.text)]
    top = max(depths) + 1
    for tower, depth in zip(("vision", "text"), depths, strict=True):
        for i in range(depth):
            found = {n for name, n in numbers.items() if name.startswith(f"{tower}.blocks.{i}.")}
            assert found == {top - depth + i}
    assert numbers["text.token_embed.weight"] == top - depths[1] - 1
    assert numbers["logit_scale"] == numbers["proj"] == top
    shares = {id(p): g["lr_scale"] for g in param_groups(model, 0.05, 0.5) for p in g["params"]}
    assert len(shares) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert shares[id(p)] == 0.5 ** (top - numbers[name]), name
