"""How long a training step waits for its clips: `python benchmarks/feed.py` (about four minutes on 2 cores).

VideoMAE-B with a running cell, 16 frames at 224 pixels, trained by `fit` from mp4 files like those of Kinetics (340×256, 10 seconds at 30 frames per
second, H.264) through `VideoManifest` and `make_loader`, with all decoding, cropping and flipping. What counts as waiting is all the time between
the end of a step and the moment when the model is called. The peer is the same run on clips that lie in memory.
"""
import os, tempfile, time
from functools import partial
from pathlib import Path
from _common import DEVICE, machine, report, seconds, write_video
import torch
from vfm_lab.data.datasets import VideoManifest, make_loader
from vfm_lab.data.reader import dense_indices
from vfm_lab.data.transforms import train_transform
from vfm_lab.models.videomae import VideoMAE
from vfm_lab.official.videomae import SIZES
from vfm_lab.train.callbacks import Callback
from vfm_lab.train.loop import TrainConfig, fit

GPU = DEVICE.type == "cuda"
BATCH, STEPS, SKIP = (32, 30, 5) if GPU else (4, 10, 2)     # the first steps start the workers and do not count
WORKERS = (0, 4, len(os.sched_getaffinity(0))) if GPU else (0, 1, 2)

class Watch(Callback):
    "Seconds that each step waits, and that it takes with its waiting."
    def __init__(self, model):
        self.waits, self.whole = [], []
        self.hook = model.register_forward_pre_hook(lambda *_: self.waits.append(time.perf_counter() - self.end))
    def on_start(self, run): self.end = time.perf_counter()
    def on_step(self, run):
        self.whole.append(time.perf_counter() - self.end)
        self.end = time.perf_counter()
    def on_end(self, run): self.hook.remove()

def measure(loader) -> dict:
    torch.manual_seed(0)
    model = VideoMAE(**SIZES["base"])
    watch = Watch(model)
    fit(model, loader, TrainConfig(STEPS, precision="bf16" if GPU else "no"), callbacks=[watch])
    waits, whole = watch.waits[SKIP:], watch.whole[SKIP:]
    return {"seconds per step": seconds(whole, 3), "of them waiting, median": seconds(waits, 3), "worst": round(max(waits), 3), "share of waiting": f"{sum(waits) / sum(whole):.1%}",
            "clips/s": round(BATCH * len(whole) / sum(whole), 2)}

def main() -> None:
    about = machine("av", batch=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = [write_video(folder/f"{i}.mp4", 340, 256, 300, 250, seed=i) for i in range(4)]
        names = [f"clip{i}.mp4" for i in range(BATCH * (STEPS + 2))]
        for i, name in enumerate(names): os.link(made[i % len(made)], folder/name)
        (folder/"list.csv").write_text("".join(f"{name},0\n" for name in names))
        data = VideoManifest(folder/"list.csv", sampler=partial(dense_indices, frames=16, stride=4), transform=train_transform(224))
        rows = {"clips in memory": measure([next(iter(make_loader(data, BATCH)))])}
        rows |= {f"files, {n or 'no'} worker{'s' * (n != 1)}": measure(make_loader(data, BATCH, shuffle=True, workers=n)) for n in WORKERS}
    report("feed", "Does the loader keep the step fed?", f"{STEPS - SKIP} steps of VideoMAE-B with a running cell, by `fit`, from mp4 files of 340×256 pixels and 300 frames. "
           "On a CPU the workers share the cores with the step: they slow it down even where it does not wait.", about, {"clips": rows})

if __name__ == "__main__": main()
