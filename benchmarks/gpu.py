"""What a GPU shows and a CPU cannot: `python benchmarks/gpu.py --out FILE.json [--minutes 8]`.

It needs torch, timm, einops, transformers, accelerate, safetensors, numpy and huggingface_hub, and
nothing that reads videos or draws. Three questions: are the numbers right on this device (golden
cases in fp32, bf16 and fp16; masks; a run that is killed and resumed; a gradient scaler), how fast
is a training step (model FLOP utilisation, against transformers, kernels, waits of the host), and
how much memory does it take.

Each part runs in a process of its own with a share of the minutes. A part that fails or takes too
long is ended and the others go on; FILE.json is written anew after each row, so nothing that was
measured is lost. Without a GPU, or with `--device cpu`, everything runs once at toy size, which
shows that the script works and says nothing about speed.
"""
import time
START = time.monotonic()   # importing torch counts, too

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # equal sums in equal runs
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


import torch
import torch.profiler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import VideoMAEConfig, VideoMAEForPreTraining


class Anything:
    "Takes every argument; as a decorator it gives back what it is put on."

    def __new__(cls, *args, **more):
        return args[0] if args and isinstance(args[0], type) else super().__new__(cls)

    def __init__(self, *args, **more): pass
    def __call__(self, *args, **more): return args[0] if args else self
    def __class_getitem__(cls, item): return cls


class StandIn(ModuleType):
    "An empty package in the place of one that is not installed."

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"): raise AttributeError(name)
        return Anything


# Only recipes need these, to read their files. A chapter of `official/` declares its recipe beside
# its models, so that they are imported here as well, and on a bare machine they are not there.
FOR_RECIPES = ("annotated_types", "pydantic", "msgspec", "cattrs", "attrs")
MISSING = [name for name in FOR_RECIPES if importlib.util.find_spec(name) is None]
BEFORE = {name: sys.modules.pop(name) for name in MISSING if name in sys.modules}
sys.modules |= {name: StandIn(name) for name in MISSING}

from vfm_lab.files import write_json
from vfm_lab.golden import RUNNERS, Case, compare, read_case
from vfm_lab.hub import create_model, systems
from vfm_lab.models.clip import CLIPVision
from vfm_lab.models.umt import UMT
from vfm_lab.tokens import masking
from vfm_lab.train.callbacks import Callback
from vfm_lab.train.loop import TrainConfig, fit, switched

systems()
for name in MISSING: del sys.modules[name]   # others may ask whether it is there
sys.modules |= BEFORE
gc.freeze()   # what is imported stays: to collect garbage is quick then

# ---- sizes -------------------------------------------------------------------------------------

NAMES = {
    "umt": {"base": "umt_pretrain_vit_base_patch16", "large": "umt_pretrain_vit_large_patch16"},
    "videomae": {"base": "videomae_pretrain_vit_base_patch16",
                 "large": "videomae_pretrain_vit_large_patch16"},
    "uniformerv2": {"base": "uniformerv2_base_patch16", "large": "uniformerv2_large_patch14"}}

_B = dict(image_size=224, patch=16, dim=768, depth=12, heads=12)
_L = dict(image_size=224, patch=16, dim=1024, depth=24, heads=16)
FULL = {   # what the registered names stand for, said again, since the FLOPs are counted from it
    "umt": {
        "base": dict(_B, frames=8, layers=6, teacher=dict(_B, out_dim=512)),
        "large": dict(_L, frames=8, layers=6,
                      teacher=dict(_L, image_size=196, patch=14, out_dim=768))},
    "videomae": {
        "base": dict(_B, frames=16, tubelet=2, decoder_dim=384, decoder_depth=4, decoder_heads=6),
        "large": dict(_L, frames=16, tubelet=2, decoder_dim=512, decoder_depth=4,
                      decoder_heads=8)},
    "uniformerv2": {
        "base": dict(_B, frames=8, num_classes=400, global_layers=(8, 9, 10, 11)),
        "large": dict(_L, patch=14, frames=8, num_classes=400, global_layers=(20, 21, 22, 23))}}

_b = dict(image_size=32, patch=8, dim=48, depth=3, heads=4)
_l = dict(image_size=32, patch=8, dim=64, depth=4, heads=4)
SMALL = {
    "umt": {
        "base": dict(_b, frames=4, layers=2, teacher=dict(_b, out_dim=24)),
        "large": dict(_l, frames=4, layers=2,
                      teacher=dict(_l, image_size=28, patch=7, out_dim=32))},
    "videomae": {
        "base": dict(_b, frames=4, tubelet=2, decoder_dim=24, decoder_depth=2, decoder_heads=2),
        "large": dict(_l, frames=4, tubelet=2, decoder_dim=32, decoder_depth=2,
                      decoder_heads=2)},
    "uniformerv2": {
        "base": dict(_b, frames=4, num_classes=5, global_layers=(1, 2)),
        "large": dict(_l, frames=4, num_classes=5, global_layers=(2, 3))}}

BATCHES = {   # largest first; those that do not fit into memory are told and passed by
    "umt": {"base": (256, 128, 64, 32), "large": (128, 64, 32, 16)},
    "videomae": {"base": (512, 256, 128, 64), "large": (256, 128, 64, 32)},
    "uniformerv2": {"base": (128, 64, 32, 16), "large": (64, 32, 16, 8)}}
HIDDEN = {"umt": 0.8, "videomae": 0.9}   # share of tokens
PEAK = {   # FLOP/s in bf16 without sparsity, from data sheets; the first name that is found counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "B200": 2250e12, "L40S": 362e12}


@dataclasses.dataclass(frozen=True)
class Plan:
    "On what, and how large."
    device: str       # "cuda" or "cpu"
    seconds: float    # of a timing
    bursts: int       # of steps in a timing
    few: int          # batch sizes of each model

    @property
    def small(self) -> bool: return self.device == "cpu"

    @property
    def sizes(self) -> dict: return SMALL if self.small else FULL

    def batches(self, system: str, size: str) -> tuple[int, ...]:
        "To be tried, largest first."
        return (4, 2) if self.small else BATCHES[system][size]


# ---- how many FLOPs a step needs ----------------------------------------------------------------

def linear(n: int, a: int, b: int) -> int:
    "n tokens from width a to width b."
    return 2 * n * a * b


def block(n: int, dim: int, asking: int | None = None, fed: int | None = None) -> int:
    "A transformer block: n tokens answer, `asking` of them ask, `fed` go through the MLP."
    asking = n if asking is None else asking
    fed = asking if fed is None else fed
    layers = linear(asking, dim, dim) + linear(n, dim, 2 * dim) + linear(asking, dim, dim)
    return layers + 4 * asking * n * dim + 2 * linear(fed, dim, 4 * dim)


def places(s: dict) -> int:
    "Tokens of one frame, or of one tubelet's depth."
    return (s["image_size"] // s["patch"]) ** 2


def cube(s: dict) -> int:
    "Numbers in a token's piece of the clip."
    return 3 * s.get("tubelet", 1) * s["patch"] ** 2


def visible(s: dict, hidden: float) -> int:
    "Tokens of a clip that the encoder sees."
    return s["frames"] // s.get("tubelet", 1) * (places(s) - int(places(s) * hidden))


def teacher_flops(s: dict, n: int) -> int:
    "UMT's teacher: all tokens of all frames; the last MLP and the projection for n of them."
    t, frames = s["teacher"], s["frames"]
    tokens, dim = 1 + places(t), t["dim"]
    rows = frames * 2 * tokens * dim   # where the class token looks
    last = frames * block(tokens, dim, fed=0) + 2 * linear(n, dim, 4 * dim)
    early = (t["depth"] - 1) * frames * block(tokens, dim)
    stem = linear(frames * places(t), cube(t), dim)
    return stem + early + last + rows + s["layers"] * linear(n, dim, t["out_dim"])


def forward_flops(system: str, s: dict, cell: bool = True) -> tuple[int, int, int]:
    "Of one clip: a frozen part, the trained part, and of this the stem."
    dim, n = s["dim"], visible(s, HIDDEN.get(system, 0.0))
    stem = linear(n, cube(s), dim)
    if system == "umt":
        heads = s["layers"] * linear(n, dim, s["teacher"]["out_dim"])
        return teacher_flops(s, n), stem + s["depth"] * block(n, dim) + heads, stem
    if system == "videomae":
        narrow, tokens = s["decoder_dim"], s["frames"] // s["tubelet"] * places(s)
        wanted = tokens // 2 if cell else tokens - n
        early = (s["decoder_depth"] - 1) * block(n + wanted, narrow)
        last = block(n + wanted, narrow, asking=wanted) + linear(wanted, narrow, cube(s))
        return 0, stem + s["depth"] * block(n, dim) + linear(n, dim, narrow) + early + last, stem
    tokens = 1 + places(s)
    read = 2 * 27 * n * dim + 4 * s["heads"] * s["frames"] * tokens * dim   # positions, attention
    few = 4 * linear(1, dim, dim) + 2 * linear(1, dim, 4 * dim)             # the query alone
    fusion = len(s["global_layers"]) * (read + few)
    tower = s["depth"] * s["frames"] * block(tokens, dim)
    return 0, stem + tower + fusion + linear(1, dim, s["num_classes"]), stem


def step_flops(system: str, s: dict, cell: bool = True) -> int:
    "Of one clip in training: backward is twice forward, no gradient for the clip, nothing twice."
    frozen, trained, stem = forward_flops(system, s, cell)
    return frozen + 3 * trained - stem


# ---- models and steps ---------------------------------------------------------------------------

def build(system: str, size: str, s: dict, device: str, cell: bool = True) -> nn.Module:
    "A model in training mode, made on its device."
    s = dict(s)
    torch.manual_seed(0)
    with torch.device(device):
        if system == "umt":
            sizes = s.pop("teacher")
            student = create_model(NAMES[system][size], teacher_dim=sizes["out_dim"], **s)
            model = UMT(student, CLIPVision(**sizes))
        elif system == "videomae":
            mask = "running_cell" if cell else None
            model = create_model(NAMES[system][size], decoder_mask=mask, **s)
        else: model = create_model(NAMES[system][size], **s)
    return model.to(device).train()


def transformers_model(s: dict, device: str) -> nn.Module:
    "transformers' VideoMAE with the same sizes."
    wide, narrow = s["dim"], s["decoder_dim"]
    config = VideoMAEConfig(
        image_size=s["image_size"], patch_size=s["patch"], num_frames=s["frames"],
        tubelet_size=s["tubelet"], use_mean_pooling=False, hidden_size=wide,
        num_hidden_layers=s["depth"], num_attention_heads=s["heads"], intermediate_size=4 * wide,
        decoder_hidden_size=narrow, decoder_num_hidden_layers=s["decoder_depth"],
        decoder_num_attention_heads=s["decoder_heads"], decoder_intermediate_size=4 * narrow)
    torch.manual_seed(0)
    with torch.device(device): model = VideoMAEForPreTraining(config)
    return model.to(device).train()


def batch_of(s: dict, batch: int, device: str) -> dict[str, Tensor]:
    "Clips of noise, with seeds for their masks."
    g, side = torch.Generator(device).manual_seed(0), s["image_size"]
    clip = torch.randn(batch, 3, s["frames"], side, side, generator=g, device=device)
    return {"clip": clip, "seed": torch.arange(batch, device=device)}


class Classify(nn.Module):
    "A classifier as something that gives its own loss."

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> dict[str, Tensor]:
        "Cross-entropy against the classes 0, 1, 2, …"
        scores = self.model(batch["clip"])
        return {"loss": F.cross_entropy(scores.float(), batch["seed"] % scores.shape[1])}


class Transformers(nn.Module):
    "transformers' model under a tube mask that is made once."

    def __init__(self, model: nn.Module, mask: Tensor):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, batch: dict) -> dict[str, Tensor]:
        "It wants (B, T, 3, H, W)."
        clip = batch["clip"].transpose(1, 2)
        return {"loss": self.model(clip, bool_masked_pos=self.mask[:len(clip)]).loss}


def trainable(system: str, size: str, plan: Plan, cell: bool = True, most: int = 1024) -> nn.Module:
    "A module whose forward gives a loss: one of ours, or transformers'."
    s = plan.sizes["videomae" if system == "transformers" else system][size]
    if system == "transformers":
        grid = (s["frames"] // s["tubelet"], *[s["image_size"] // s["patch"]] * 2)
        mask = masking.tube_mask(most, grid, HIDDEN["videomae"]).to(plan.device)
        return Transformers(transformers_model(s, plan.device), mask)
    model = build(system, size, s, plan.device, cell)
    return Classify(model) if system == "uniformerv2" else model


def stepper(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Callable[[dict], Tensor]:
    "A training step of AdamW under autocast; nothing in it asks for a number."
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    kind = trained[0].device.type

    def step(batch: dict) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype): loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


@contextmanager
def compiled(model: nn.Module, plan: Plan) -> Iterator[None]:
    "Blocks compiled as `TrainConfig.compile` does it; at toy size by the front end alone."
    quick = partial(torch.compile, backend="eager")
    swap = patch.object(torch, "compile", quick) if plan.small else nullcontext()
    with swap, switched(model, TrainConfig(steps=1, compile=True)): yield


# ---- measuring ----------------------------------------------------------------------------------

def wait(device: str) -> None:
    "Until the device has done what it was told."
    if device == "cuda": torch.cuda.synchronize()


def free(device: str) -> None:
    "Give memory back, and forget how much was used."
    gc.collect()
    if device != "cuda": return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float | None:
    "Most memory that tensors held since `free`; a CPU does not count it."
    return round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None


def burst(step: Callable, batch: dict, times: int, device: str) -> float:
    "Seconds of one step, the mean of so many without a break."
    wait(device)
    start = time.perf_counter()
    for _ in range(times): step(batch)
    wait(device)
    return (time.perf_counter() - start) / times


def timed(steps: dict[str, Callable], batch: dict, plan: Plan) -> dict[str, list[float]]:
    "Seconds of a step in several bursts of each side; the sides take turns, first and last too."
    for step in steps.values():
        for _ in range(2): step(batch)
    times = {}
    for name, step in steps.items():
        once = burst(step, batch, 1, plan.device)
        times[name] = max(1, min(20, round(plan.seconds / plan.bursts / once)))
    seconds = {name: [] for name in steps}
    for turn in range(plan.bursts):
        for name in list(steps)[::-1 if turn % 2 else 1]:
            seconds[name].append(burst(steps[name], batch, times[name], plan.device))
    return seconds


def speed_row(flops: int, batch: int, seconds: list[float], limit: float | None) -> dict:
    "What a timing means."
    once = statistics.median(seconds)
    rate = flops * batch / once
    return {"ms": round(1e3 * once, 3), "ms_min": round(1e3 * min(seconds), 3),
            "ms_max": round(1e3 * max(seconds), 3), "clips_per_s": round(batch / once, 1),
            "gflop_per_clip": round(flops / 1e9, 4), "tflop_per_s": round(rate / 1e12, 4),
            "mfu": round(rate / limit, 4) if limit else None}


def peak_flops(device: str) -> float | None:
    "FLOP/s of this GPU in bf16; None: not in the table."
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((value for key, value in PEAK.items() if key in name), None)


class HostReads(TorchDispatchMode):
    "Counts what would make the host wait, were the tensors on a GPU, and where it is asked for."

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        asks = name in ("_local_scalar_dense", "nonzero", "masked_select")
        if name in ("index", "index_put", "index_put_"):
            asks = any(t is not None and t.dtype == torch.bool for t in args[1])
        if asks: self.places.append(place(traceback.extract_stack()))
        return func(*args, **(kwargs or {}))


def place(stack: Iterable[traceback.FrameSummary]) -> str:
    "The innermost line that is the lab's, or transformers' or accelerate's, and not torch's."
    lines = [f"{Path(f.filename).as_posix()}:{f.lineno}" for f in stack]
    kinds = f"{re.escape(ROOT.as_posix())}/(vfm_lab/.*)|.*-packages/((transformers|accelerate)/.*)"
    found = [m[1] or m[2] for m in (re.fullmatch(kinds, line) for line in lines) if m]
    return found[-1] if found else "elsewhere"


def host_reads(work: Callable[[], object], device: str) -> Counter:
    "How often the host waits for the device in a piece of work, by place."
    if device != "cuda":
        with HostReads() as mode: work()
        return Counter(mode.places)
    found = []

    def note(message, *_, **__):
        if "called a synchronizing" in str(message): found.append(place(traceback.extract_stack()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try: work()
        finally: torch.cuda.set_sync_debug_mode("default")
    return Counter(found)


# ---- parts: each gives rows ---------------------------------------------------------------------

class Part:
    "What a part tells to the process that waits for it."

    def __init__(self, plan: Plan, seconds: float, before: dict, send: Callable):
        self.plan, self.end, self.before, self.send = plan, time.monotonic() + seconds, before, send
        self.longest = 0.0

    def add(self, **row) -> None:
        "A row is done."
        self.send("rows", row)

    def fits(self, what: str) -> bool:
        "Is there time for one more that takes as long as the longest so far? If not, it is told."
        if time.monotonic() + 1.2 * self.longest < self.end: return True
        self.send("left_out", f"{what}: no time")
        return False

    @contextmanager
    def one(self, what: str) -> Iterator[None]:
        "One measurement: too little memory is told, an error is told, and the part goes on."
        start = time.monotonic()
        try: yield
        except Exception as e:
            if isinstance(e, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(e):
                self.send("left_out", f"{what}: does not fit into memory")
            else: self.send("errors", f"{what}: {told(e)}")
        finally: self.longest = max(self.longest, time.monotonic() - start)


def told(error: Exception) -> str:
    "An error and the end of its way here."
    return "".join(traceback.format_exception(error))[-2000:]


def plain(value: object) -> object:
    "JSON has no NaN and no infinity: they become words."
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


MODES = {   # dtype of autocast, and the largest difference over scale that is still right
    "fp32": (None, None),   # the case's own tolerance
    "bf16": (torch.bfloat16, 0.05),   # 8 bits: steps of 0.4 %, added up over a few layers
    "fp16": (torch.float16, 0.01)}    # 11 bits: steps of 0.05 %; on a CPU both are met by half


def moved(case: Case, device: str) -> Case:
    "The same case with its tensors on a device."
    groups = {name: {k: v.to(device) for k, v in getattr(case, name).items()}
              for name in ("weights", "inputs", "outputs")}
    return dataclasses.replace(case, **groups)


def golden(part: Part) -> None:
    "Every golden case in three precisions, without TF32."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = part.plan.device
    for path in sorted((ROOT / "tests/golden").glob("*.json")):
        case = read_case(path)
        if case.system not in RUNNERS:
            part.send("left_out", f"{case.name}: no runner for {case.system}")
            continue
        for mode, (dtype, bound) in MODES.items():
            half = torch.autocast(device, dtype) if dtype else nullcontext()
            limit = bound or f"atol {case.atol}, rtol {case.rtol}"
            row = dict(case=case.name, mode=mode, bound=limit)
            try:
                with torch.no_grad(), torch.device(device), half:
                    ours = RUNNERS[case.system].run(moved(case, device))
            except Exception as e:
                part.add(**row, met=False, error=f"{type(e).__name__}: {e}"[:500])
                continue
            part.add(**row, **judged(case, ours, bound))


def judged(case: Case, ours: dict[str, Tensor], bound: float | None) -> dict:
    "Difference over scale of each output, and whether all are met."
    lines = compare(case, ours)
    met, worst = True, {}
    for line in lines:
        share = line.difference / line.scale if line.scale else line.difference
        worst[line.output] = float(f"{share:.3g}") if math.isfinite(share) else None
        whole = bound is None or line.note   # whole numbers and masks are exact in every precision
        met &= line.met if whole else worst[line.output] is not None and share <= bound
    return dict(met=bool(met), difference_over_scale=worst)


def masks(part: Part) -> None:
    "Masks of the device against those of the CPU: from a CPU generator, and from seeds."
    device, grid, batch = part.plan.device, (8, 14, 14), 64
    attention = torch.rand(batch, 8, 196, generator=torch.Generator().manual_seed(1)) + 1e-3
    seeds = torch.arange(batch)
    made = {
        "attention": lambda g, d: masking.attention_sampled_mask(attention.to(d), 0.8, generator=g),
        "random": lambda g, d: masking.random_mask(batch, grid, 0.9, generator=g, device=d),
        "tube": lambda g, d: masking.tube_mask(batch, grid, 0.9, generator=g, device=d),
        "frame": lambda g, d: masking.frame_mask(batch, grid, 0.5, generator=g, device=d),
        "running_cell": lambda g, d: masking.running_cell_mask(batch, grid, generator=g, device=d)}
    for name, make in made.items():
        for source in ("CPU generator", "seeds"):
            one, two = (make(_source(source, seeds.to(d)), d).cpu() for d in ("cpu", device))
            differ = int((one != two).any(1).sum())
            part.add(mask=name, source=source, clips=batch, clips_that_differ=differ)


def _source(kind: str, seeds: Tensor) -> "masking.Source":
    "A generator of the CPU, or the seeds of the clips where they lie."
    if kind == "seeds": return masking.clip_generators({"seed": seeds})
    return torch.Generator().manual_seed(2)


class Killed(Exception): "The end of a run, at a step that was agreed on."


def short_run(folder: Path, plan: Plan, precision: str, die_at: int | None = None):
    "Curves and weights of a short training, which may be killed before it has done a step."
    s = SMALL["videomae"]["base"] | dict(dim=128, heads=2, decoder_dim=64, decoder_heads=1)
    model = build("videomae", "base", s, plan.device)   # heads of 64, as the real ones have
    clips = batch_of(s, 12, "cpu")
    data = [{k: v[i] for k, v in clips.items()} for i in range(12)]
    calls = Counter()

    def count(*_):
        calls["forward"] += 1
        if calls["forward"] == die_at: raise Killed
    model.register_forward_pre_hook(count)
    config = TrainConfig(steps=8, lr=1e-3, warmup=2, precision=precision, folder=folder,
                         save_every=4, clip_grad=1.0)
    history = fit(model, DataLoader(data, batch_size=4, shuffle=True), config)
    return history, {k: v.cpu() for k, v in model.state_dict().items()}, calls["forward"]


def resume(part: Part) -> None:
    "A run of 8 steps; the same killed in its sixth and resumed from its fourth; equal curves."
    torch.use_deterministic_algorithms(True, warn_only=True)
    for precision in ("no", "bf16"):
        with tempfile.TemporaryDirectory() as top:
            whole = short_run(Path(top, "whole"), part.plan, precision)
            again = short_run(Path(top, "again"), part.plan, precision)
            try: short_run(Path(top, "killed"), part.plan, precision, die_at=6)
            except Killed: pass
            resumed = short_run(Path(top, "killed"), part.plan, precision)
        part.add(precision=precision, steps=8, steps_after_the_kill=resumed[2],
                 difference=unlike(whole, resumed), equal=unlike(whole, resumed) == 0,
                 difference_of_two_whole_runs=unlike(whole, again), loss=whole[0]["loss"])


def unlike(one: tuple, two: tuple) -> float:
    "Largest difference of two runs' curves and weights."
    curves = [abs(a - b) for k in one[0].keys() | two[0].keys() if k != "seconds"
              for a, b in zip(one[0][k], two[0][k], strict=True)]
    return max(*curves, *((one[1][k] - two[1][k]).abs().max().item() for k in one[1]))


class Scale(Callback):
    "Notes the factor of fp16 losses at the end."

    def on_end(self, run) -> None:
        self.last = run.accelerator.scaler.get_scale()


def fp16(part: Part) -> None:
    "Trains each system in fp16 with a gradient scaler: losses stay finite, few steps are skipped."
    plan = part.plan
    for system in NAMES:
        s = plan.sizes[system]["base"]
        with part.one(system):
            model, batch = trainable(system, "base", plan), batch_of(s, 4, plan.device)
            part.add(system=system, by="GradScaler", **scaled(model, batch, plan))
            if plan.small: part.send("left_out", f"{system} by fit: it refuses fp16 on a CPU")
            else: part.add(system=system, by="fit", **fitted(model, batch))


def fitted(model: nn.Module, batch: dict) -> dict:
    "The same by the lab's own loop."
    watch = Scale()
    losses = fit(model, [batch], TrainConfig(steps=10, precision="fp16"), callbacks=[watch])["loss"]
    finite = all(map(math.isfinite, losses))
    return dict(finite=finite, loss=[losses[0], losses[-1]], scale=watch.last, steps=10)


def scaled(model: nn.Module, batch: dict, plan: Plan, steps: int = 12) -> dict:
    "Steps of one batch by hand."
    scaler = torch.amp.GradScaler(plan.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    losses, scales = [], [scaler.get_scale()]
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(plan.device, torch.float16): loss = model(batch)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    finite = all(map(math.isfinite, losses))
    skipped = sum(b < a for a, b in zip(scales, scales[1:]))   # of a skipped step the scale falls
    return dict(finite=finite, loss=[losses[0], losses[-1]], skipped=skipped, scale=scales[-1],
                steps=steps)


def speed(part: Part) -> None:
    "A step of every system and size, at the largest batches that fit."
    for size in ("base", "large"):
        for system in NAMES:
            model = trainable(system, size, part.plan)
            step, done = stepper(model), 0
            for batch in part.plan.batches(system, size):
                what = f"{system} {size} batch {batch}"
                if done < part.plan.few and part.fits(what):
                    with part.one(what): done += measured(part, system, size, batch, step)
                free(part.plan.device)
            del model, step
            free(part.plan.device)


def measured(part: Part, system: str, size: str, batch: int, step: Callable, **more) -> bool:
    "One row of speed and memory; True when it is there."
    plan = part.plan
    s = plan.sizes[system][size]
    clips = batch_of(s, batch, plan.device)
    free(plan.device)
    start = time.perf_counter()
    step(clips)
    wait(plan.device)
    first = time.perf_counter() - start
    seconds = timed({"": step}, clips, plan)[""]
    row = speed_row(step_flops(system, s), batch, seconds, peak_flops(plan.device))
    part.add(system=system, size=size, batch=batch, **more, **row, peak_mib=peak_mib(plan.device),
             first_step_s=round(first, 2))
    return True


def best_batch(part: Part, system: str, size: str) -> int:
    "The batch with the most clips per second so far."
    rows = part.before.get("speed", {}).get("rows", [])
    mine = [r for r in rows if (r["system"], r["size"]) == (system, size)]
    if mine: return max(mine, key=lambda r: r["clips_per_s"])["batch"]
    return part.plan.batches(system, size)[-1]


def compile_blocks(part: Part) -> None:
    "The same with compiled blocks, at the batch that was best without."
    for size in ("base",) if part.plan.small else ("base", "large"):
        for system in NAMES:
            what = f"{system} {size} compiled"
            if not part.fits(what): continue
            torch._dynamo.reset()
            with part.one(what):
                model = trainable(system, size, part.plan)
                with compiled(model, part.plan):
                    measured(part, system, size, best_batch(part, system, size), stepper(model),
                             compiled=True)
            model = None
            free(part.plan.device)


SIDES = {"transformers": ("transformers", False), "ours, equal work": ("videomae", False),
         "ours, running cell": ("videomae", True)}


RACES = {"base": (128, 32), "large": (64, 16)}   # batches of the race against transformers


def rival(part: Part, compile: bool = False) -> None:
    "VideoMAE of transformers and of this lab: the same clips, steps that take turns."
    races = {"base": (4,)} if part.plan.small else RACES
    if compile: races = {"base": races["base"][:1]}
    for size, batches in races.items():
        for batch in batches:
            what = f"transformers {size} batch {batch}"
            if part.fits(what):
                with part.one(what): race(part, size, batch, compile)
            free(part.plan.device)


def race(part: Part, size: str, batch: int, compile: bool) -> None:
    "Speed over transformers at one batch: the median over the turns."
    plan, seconds = part.plan, {}
    s, limit = plan.sizes["videomae"][size], peak_flops(plan.device)
    clips = batch_of(s, batch, plan.device)
    models = {n: partial(trainable, system, size, plan, cell, batch)
              for n, (system, cell) in SIDES.items()}
    if compile:   # one after another: what one side compiles is not to be found by the next
        for name, make in models.items(): seconds |= alone(name, make(), clips, plan)
    else: seconds = timed({n: stepper(make()) for n, make in models.items()}, clips, plan)
    for name, (_, cell) in SIDES.items():
        ratios = [a / b for a, b in zip(seconds["transformers"], seconds[name])]
        part.add(side=name, size=size, batch=batch, compiled=compile,
                 over_transformers=round(statistics.median(ratios), 3),
                 **speed_row(step_flops("videomae", s, cell), batch, seconds[name], limit))


def alone(name: str, model: nn.Module, clips: dict, plan: Plan) -> dict[str, list[float]]:
    "Seconds of a compiled side: our blocks, or, as its users do, transformers' whole model."
    torch._dynamo.reset()
    backend = "eager" if plan.small else "inductor"
    if name != "transformers":
        with compiled(model, plan): return timed({name: stepper(model)}, clips, plan)
    model.model = torch.compile(model.model, backend=backend)
    return timed({name: stepper(model)}, clips, plan)


def one_step(system: str, plan: Plan) -> tuple[nn.Module, Callable[[], Tensor], dict]:
    "A model of base size at a moderate batch, and its step, which has been made twice."
    s = plan.sizes["videomae" if system == "transformers" else system]["base"]
    model, clips = trainable(system, "base", plan), 2 if plan.small else 32
    step, batch = stepper(model), batch_of(s, clips, plan.device)
    for _ in range(2): step(batch)
    wait(plan.device)
    return model, partial(step, batch), batch


def kernels(part: Part) -> None:
    "Which attention ran, and where the time of a step goes."
    device, kinds = part.plan.device, [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda": kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for system in (*NAMES, "transformers"):
        with part.one(system):
            _, step, _ = one_step(system, part.plan)
            with torch.profiler.profile(activities=kinds) as profile:
                step()
                wait(device)
            part.add(system=system, **profiled(profile.key_averages(), device))
        step = None
        free(device)


def profiled(events: Iterable, device: str) -> dict:
    "Attention by torch's name for it, and the twelve kernels that take longest."
    attention = {e.key.removeprefix("aten::_scaled_dot_product_"): e.count for e in events
                 if e.key.startswith("aten::_scaled_dot_product_")}
    def spent(e): return e.self_device_time_total if device == "cuda" else e.self_cpu_time_total
    if device == "cuda":
        events = [e for e in events if e.device_type.name == "CUDA"
                  and not getattr(e, "is_user_annotation", False)]
    total = sum(map(spent, events)) or 1
    top = sorted(events, key=spent, reverse=True)[:12]
    rows = [dict(kernel=e.key[:160], calls=e.count, ms=round(spent(e) / 1e3, 3),
                 share=round(spent(e) / total, 4)) for e in top]
    return dict(attention=attention, ms=round(total / 1e3, 2), kernels=rows)


def host(part: Part) -> None:
    "How often the host waits for the device: in a bare step, and in a step of `fit`."
    device = part.plan.device
    for system in (*NAMES, "transformers"):
        with part.one(system):
            model, step, batch = one_step(system, part.plan)
            bare = host_reads(step, device)
            part.add(system=system, of="a bare step", waits=sum(bare.values()), places=dict(bare))
            if system != "transformers": part.add(system=system, **fit_reads(model, batch, device))
        model = step = batch = None
        free(device)


def fit_reads(model: nn.Module, batch: dict, device: str) -> dict:
    "Waits in a step of `fit`: what three more steps add, a third of it."
    curves = {}

    def train(steps: int) -> None:
        curves.update(fit(model, [batch], TrainConfig(steps=steps, precision="bf16")))
    few, more = (host_reads(partial(train, n), device) for n in (3, 6))
    steady = {k: round(n / 3, 2) for k, n in (more - few).items()}
    return dict(of="a step of fit", waits=round(sum(steady.values()), 2), places=steady,
                ms=round(1e3 * statistics.median(curves["seconds"][2:]), 3))


def memory(part: Part) -> None:
    "Peak memory of a step at one batch, with activations kept or computed again."
    plan = part.plan
    for size in ("base", "large"):
        for system in NAMES:
            s, batch = plan.sizes[system][size], 2 if plan.small else 16
            for recompute in (False, True):
                what = f"memory of {system} {size}, recompute {recompute}"
                if not part.fits(what): continue
                free(plan.device)
                with part.one(what):
                    model = trainable(system, size, plan)
                    step, clips = stepper(model), batch_of(s, batch, plan.device)
                    with switched(model, TrainConfig(steps=1, recompute=recompute)):
                        for _ in range(2): step(clips)
                    wait(plan.device)
                    numbers = sum(p.numel() for p in model.parameters())
                    part.add(system=system, size=size, batch=batch, recompute=recompute,
                             parameters=numbers, peak_mib=peak_mib(plan.device))
                model = step = clips = None


def machine(part: Part) -> None:
    "What the numbers are taken on."
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    part.add(cpu=cpu[1].strip() if cpu else platform.processor(),
             cores=len(os.sched_getaffinity(0)), system=platform.system(),
             python=platform.python_version(),
             **{p: version(p) for p in ("torch", "timm", "transformers", "accelerate")})
    if part.plan.device != "cuda": return
    about = torch.cuda.get_device_properties(0)
    part.add(gpu=about.name, gib=round(about.total_memory / 2**30, 1), cuda=torch.version.cuda,
             capability=f"{about.major}.{about.minor}", cudnn=torch.backends.cudnn.version(),
             bf16_tflop_per_s=(peak_flops("cuda") or 0) / 1e12 or None)


PARTS = {   # what is run, in this order, and its share of the time that is left
    "machine": (machine, 2), "golden": (golden, 4), "masks": (masks, 1), "resume": (resume, 3),
    "fp16": (fp16, 3), "speed": (speed, 14), "transformers": (rival, 6), "kernels": (kernels, 4),
    "host": (host, 4), "memory": (memory, 4), "compile": (compile_blocks, 14),
    "transformers, compiled": (partial(rival, compile=True), 8)}

# ---- conducting ---------------------------------------------------------------------------------

def child(pipe, name: str, plan: Plan, seconds: float, before: dict) -> None:
    "One part, in a process of its own: its rows go into the pipe, and an error, if there is one."
    os.setsid()   # what it starts ends with it
    def send(kind, value): pipe.send((kind, plain(value)))
    try: PARTS[name][0](Part(plan, seconds, before, send))
    except Exception as e: send("errors", told(e))
    send("status", "done")


def conduct(name: str, plan: Plan, seconds: float, report: dict, save: Callable,
            start: str = "fork") -> None:
    "Start a part, write down what it says, end it when its time is over."
    context, began = multiprocessing.get_context(start), time.monotonic()
    here, there = context.Pipe(duplex=False)
    record = report["parts"][name] = dict(status="at work", rows=[], left_out=[], errors=[])
    worker = context.Process(target=child, args=(there, name, plan, seconds, report["parts"]))
    worker.start()
    there.close()   # so that its end is noticed
    try: listen(here, record, began + seconds + 1, save)
    finally: stop(worker)
    if record["status"] == "at work": record["status"] = "cut off"
    if record["errors"]: record["status"] = "failed"
    record["seconds"] = round(time.monotonic() - began, 1)
    save()


def listen(pipe, record: dict, end: float, save: Callable) -> None:
    "Until the part is done, or dead, or too late."
    while record["status"] == "at work":
        if not pipe.poll(max(0.0, end - time.monotonic())): return
        try: kind, value = pipe.recv()
        except EOFError:
            record["errors"].append("its process has ended without a word")
            return
        if kind == "status": record[kind] = value
        else: record[kind].append(value)
        save()


def stop(worker: multiprocessing.Process) -> None:
    "End a part and whatever it has started."
    worker.join(0.5)
    try: os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): pass   # all have ended, or it had not begun
    worker.kill()
    worker.join()


def probe(pipe) -> None:
    "Does a process that was forked here reach a GPU?"
    os.setsid()
    try: pipe.send(torch.cuda.is_available() and torch.zeros(1, device="cuda").device.type)
    except Exception as e: pipe.send(e.__class__.__name__)


def asked(start: str) -> object:
    "What a probe says: cuda, False for no GPU, or the name of an error; None: it died."
    context = multiprocessing.get_context(start)
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=probe, args=(there,))
    worker.start()
    there.close()
    try: return here.recv() if here.poll(60) else None
    except EOFError: return None
    finally: stop(worker)


def summary(parts: dict) -> dict[str, object]:
    "The aims, and how far they are met; nothing is said of what was not measured."
    def rows(*names): return [r for n in names for r in parts.get(n, {}).get("rows", [])]
    wrong = [f"{r['case']} {r['mode']}" for r in rows("golden") if not r["met"]]
    differ = [f"{r['mask']}, {r['source']}: {r['clips_that_differ']} of {r['clips']}"
              for r in rows("masks") if r["clips_that_differ"]]
    best, races = {}, {}
    for r in rows("speed", "compile"):
        key = f"{r['system']} {r['size']}{', compiled' if r.get('compiled') else ''}"
        best[key] = max(best.get(key, 0), r["mfu"] or r["tflop_per_s"])
    for r in rows("transformers", "transformers, compiled"):
        key = f"{r['side']}, {r['size']}, batch {r['batch']}{', compiled' if r['compiled'] else ''}"
        if r["side"] != "transformers": races[key] = r["over_transformers"]
    unit = "MFU (aim: 0.5)" if any(r["mfu"] for r in rows("speed")) else "TFLOP/s"
    found = {
        "golden": {"runs compared": len(rows("golden")), "not met": wrong},
        "masks": {"compared": len(rows("masks")), "differ": differ},
        "resume": {f"precision {r['precision']}, equal": r["equal"] for r in rows("resume")},
        "fp16": {f"{r['system']} by {r['by']}, finite": r["finite"] for r in rows("fp16")},
        f"best {unit}": best,
        "speed over transformers (aims: 1.05, with the running cell 1.5)": races,
        "waits of the host": {f"{r['system']}, {r['of']}": r["waits"] for r in rows("host")},
        "not done": [n for n, part in parts.items() if part["status"] not in ("done", "at work")]}
    measured = {"golden": rows("golden"), "masks": rows("masks")}
    return {k: v for k, v in found.items() if measured.get(k, v)}


def arguments() -> argparse.Namespace:
    "Of the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file; none: results/gpu_NAME.json, or, "
                        "on a CPU, nothing is written")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything, imports too")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="none: a GPU if there is one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    return parser.parse_args()


def main() -> None:
    "All parts, one after another."
    args = arguments()
    start, found = "fork", asked("fork") if args.device != "cpu" else False
    if found not in ("cuda", False): start, found = "spawn", asked("spawn")   # imports touched it
    if args.device == "cuda" and found != "cuda": sys.exit(f"no GPU is reached: {found}")
    device = "cuda" if found == "cuda" else "cpu"
    plan = Plan(device, *((2.0, 5, 3) if device == "cuda" else (0.0, 2, 2)))
    report = {"device": device, "minutes": args.minutes, "toy size": plan.small, "parts": {}}
    out = args.out

    def save():
        report["summary"] = summary(report["parts"])
        report["seconds"] = round(time.monotonic() - START, 1)
        if out: write_json(report, out)
    for i, name in enumerate(args.parts):
        left = 60 * args.minutes - (time.monotonic() - START) - 2
        shares = [PARTS[n][1] for n in args.parts[i:]]
        seconds = left * shares[0] / sum(shares)
        none = dict(status="left out", rows=[], left_out=["no time"], errors=[])
        if left < 3: report["parts"][name] = none
        else: conduct(name, plan, seconds, report, save, start)
        if name == "machine" and device == "cuda" and out is None: out = named(report)
        said = report["parts"][name]
        notes = said["left_out"] + [e.splitlines()[-1] for e in said["errors"]]
        print(f"{name}: {said['status']}, {len(said['rows'])} rows, {said.get('seconds', 0)} s",
              *notes, sep="\n  ", flush=True)
    save()
    print(json.dumps(report["summary"], indent=1, ensure_ascii=False))


def named(report: dict) -> Path:
    "Results carry the name of their GPU."
    gpus = [r["gpu"] for r in report["parts"]["machine"]["rows"] if "gpu" in r] or ["unknown"]
    return ROOT / "benchmarks/results" / f"gpu_{re.sub(r'[^a-z0-9]+', '_', gpus[0].lower())}.json"


if __name__ == "__main__": main()
