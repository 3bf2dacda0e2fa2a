"A small training run for `test_train.py`, started as a script, by `accelerate launch`, or imported."
import argparse, json, os, signal, time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Subset

from vfm_lab.data.datasets import make_loader
from vfm_lab.data.synth import SynthDataset
from vfm_lab.models.clip import tiny_clip
from vfm_lab.official.internvideo import tiny_video_text
from vfm_lab.nn.vit import VideoClassifier
from vfm_lab.objectives.contrastive import contrastive_loss, gather_batch
from vfm_lab.tasks.finetune import FineTune, evaluate
from vfm_lab.train.callbacks import EMA, Callback, EarlyStop, KeepBest, Validate, losses_on
from vfm_lab.train.loop import TrainConfig, fit


class Points:
    "52 points; with `noise` each reading of a point is another one, like an augmented clip. The poisoned point is NaN."
    def __init__(self, noise=0.0, poisoned=-1): self.noise, self.poisoned = noise, poisoned
    def __len__(self): return 52
    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 8) * (i / 26 - 1)
        y = (x + x.sin()).sum() if i != self.poisoned else torch.tensor(torch.nan)
        return dict(x=x + self.noise * torch.randn(8), y=y, name=f"clip{i}.mp4")


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(dropout), nn.Linear(32, 1))
    def forward(self, batch):
        error = self.layers(batch["x"])[:, 0] - batch["y"]
        return dict(loss=error.square().mean(), mae=error.abs().mean(), error=error)


class Slow(Callback):
    "Gives the test time to kill the run."
    def on_step(self, run): time.sleep(0.03)


class DieIn(Callback):
    "SIGKILL in the middle of writing the checkpoint of one step: the draft is there, its name is not."
    def __init__(self, step): self.step = step
    def on_step(self, run):
        if run.step == self.step - 1: os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)


def train(folder, steps=40, accumulate=1, noise=0.0, workers=0, slow=False, die_in=0, save_every=5,
          poisoned=-1, timeout=600):
    "Train and leave `history.json` (one per process) and `final.pt` in the folder."
    torch.manual_seed(0)
    model = Net(dropout=0.1 if noise else 0.0)
    loader = DataLoader(Points(noise, poisoned), batch_size=10, shuffle=True, num_workers=workers)   # the last batch of an epoch has 2
    config = TrainConfig(
        steps=steps, lr=1e-2, warmup=min(4, steps), clip_grad=1.0, accumulate=accumulate,
        folder=Path(folder) / "run", save_every=save_every, timeout=timeout)
    history = fit(model, loader, config, callbacks=[Slow()] * slow + [DieIn(die_in)] * (die_in > 0))
    leave(folder, model, history)
    return history


def leave(folder, model, history):
    rank = os.environ.get("RANK", "0")
    Path(folder, f"history{rank}.json").write_text(json.dumps(history))
    if rank == "0": torch.save(model.state_dict(), Path(folder, "final.pt"))


def tune(folder):
    "Fine-tune a little, and validate weights and average on 11 clips that the processes share."
    torch.manual_seed(0)
    model = VideoClassifier(8, image_size=16, patch=8, frames=2, tubelet=1, dim=16, depth=1, heads=2)
    task = FineTune(model, 8, mixup=0, cutmix=0, smoothing=0)
    unseen, ema = SynthDataset(11, frames=2, size=16, seed=1), EMA(task, 0.5)
    loader = make_loader(SynthDataset(16, frames=2, size=16), 4, shuffle=True)
    def measure(net):
        def here(run):
            share = range(run.accelerator.process_index, len(unseen), run.accelerator.num_processes)
            return evaluate(net.model, make_loader(Subset(unseen, share), 2), 8)
        return here
    watch = [ema, Validate(measure(task), 2), Validate(measure(ema.model), 3, "ema_")]
    history = fit(task, loader, TrainConfig(steps=5, lr=1e-2, timeout=60), callbacks=watch)
    leave(folder, task, history)
    return history


class Pair(nn.Module):
    "Two layers of one block; a list of pairs is a list of lists."

    def __init__(self, dim):
        super().__init__()
        self.parts = nn.ModuleDict(dict(one=nn.Linear(dim, dim), two=nn.Linear(dim, dim)))

    def forward(self, x):
        return x + self.parts["two"](self.parts["one"](x).tanh())


class TwoTowers(nn.Module):
    "Lists in lists, lists of dicts, two single numbers, one of them read outside of any block."

    def __init__(self, dim=8):
        super().__init__()
        self.left = nn.ModuleList(nn.ModuleList(Pair(dim) for _ in range(2)) for _ in range(2))
        self.right = nn.ModuleList(nn.ModuleDict(dict(a=Pair(dim))) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self, batch):
        a, b = batch["x"], batch["x"].flip(1) + self.shift
        for pairs in self.left:
            for pair in pairs:
                a = pair(a)
        for parts in self.right:
            b = parts["a"](b)
        return dict(loss=contrastive_loss(gather_batch(a), gather_batch(b), self.scale.exp()))


class Sentences:
    "Seven frames, clips and captions of unequal length; two pairs say the same."

    def __init__(self, vocab):
        rng = torch.Generator().manual_seed(3)
        self.clip = torch.randn(7, 3, 2, 64, 64, generator=rng, dtype=torch.double)
        self.ids = torch.randint(2, vocab - 1, (7, 8), generator=rng)
        for row, end in enumerate((7, 3, 5, 2, 7, 4, 6)):
            self.ids[row, end] = vocab - 1
            self.ids[row, end + 1 :] = 0
        self.idx = torch.tensor([0, 1, 2, 0, 4, 5, 6])

    def __len__(self):
        return 7

    def __getitem__(self, i):
        x = normalize(self.clip[i, 0, 0, 0, :8], dim=0)
        both = dict(clip=self.clip[i], image=self.clip[i, :, 0], x=x)
        return both | dict(ids=self.ids[i], idx=self.idx[i])


MODELS = dict(
    clip=tiny_clip,
    captions=lambda: tiny_video_text(frames=2),
    towers=TwoTowers,
)


def towers(folder, cases):
    "One step of plain gradient descent, so that the weights tell the gradient; in 64 bits."
    for name, shard in cases:
        torch.manual_seed(int(os.environ.get("RANK", "0")) if shard else 0)
        model = MODELS[name]().double()
        if name != "towers":
            torch.manual_seed(0)
            for p in model.parameters():
                p.data += 0.01 * torch.randn_like(p)
        vocab = model.text.config["vocab"] if name != "towers" else 9
        choice = dict(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, min_lr=1.0)
        where = Path(folder) / f"{name}{'_sharded' * shard}"
        config = TrainConfig(
            steps=2, clip_grad=0.5, shard=shard, folder=where, timeout=60, **choice
        )
        history = fit(model, DataLoader(Sentences(vocab), batch_size=7), config)
        rank = os.environ.get("RANK", "0")
        Path(folder, f"{where.name}{rank}.json").write_text(json.dumps(history))


def spread(folder, steps=6, shard=True, stop=0, **options):
    "The two towers with an optimizer that remembers, sharded or not."
    torch.manual_seed(0)
    config = dict(lr=0.01, clip_grad=0.1, save_every=2, timeout=60, min_lr=1e-3) | options
    config = TrainConfig(steps=steps, shard=shard, folder=Path(folder) / "run", **config)
    loader = DataLoader(Sentences(9), batch_size=7, shuffle=True)
    callbacks = [Pause(stop)] if stop else []
    history = fit(TwoTowers().double(), loader, config, callbacks=callbacks)
    Path(folder, f"history{os.environ.get('RANK', '0')}.json").write_text(json.dumps(history))
    return history


class Pause(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            run.stop = "enough for today"


def judged(folder, slow=False, **options):
    "Validated on data that do not fit the processes; a plateau, a best checkpoint, an end."
    torch.manual_seed(0)
    model = Net()
    others = DataLoader(Subset(Points(), range(0, 52, 5)), batch_size=5)  # 5 + 5 + 1
    config = dict(
        steps=40, lr=0.3, schedule="plateau", patience=1, factor=0.5, folder=Path(folder) / "run"
    )
    config = TrainConfig(**config | dict(timeout=60) | options)
    watch = [EarlyStop(patience=4), KeepBest(), Validate(losses_on(others), 2)]
    loader = DataLoader(Points(), batch_size=10, drop_last=True)
    history = fit(model, loader, config, callbacks=[*watch, *[Slow()] * slow])
    leave(folder, model, history)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("options", type=json.loads, nargs="?", default={})
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = dict(train=train, tune=tune, towers=towers, judged=judged, spread=spread)
    kinds[args.options.pop("do", "train")](args.folder, **args.options)
