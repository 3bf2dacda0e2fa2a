"A small training run for `test_train.py`, started as a script, by `accelerate launch`, or imported."
import argparse, json, os, signal, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from vfm_lab.data.datasets import make_loader
from vfm_lab.data.synth import SynthDataset
from vfm_lab.nn.vit import VideoClassifier
from vfm_lab.tasks.finetune import FineTune, evaluate
from vfm_lab.train.callbacks import EMA, Callback, Validate
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("options", type=json.loads, nargs="?", default={})
    args = parser.parse_args()
    torch.set_num_threads(1)
    dict(train=train, tune=tune)[args.options.pop("do", "train")](args.folder, **args.options)
