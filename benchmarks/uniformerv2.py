"""What arming an image ViT for video costs: `python benchmarks/uniformerv2.py` (about 10 minutes on 2 cores).

UniFormerV2-B/16, 8 frames at 224 pixels, blocks added one at a time, against timm's CLIP ViT-B/16 on every frame, forward and training step with AdamW.
Global blocks are also written in three other ways with equal results: the usual cross-attention with keys and values for all tokens, on a
clone that is changed in place; the same with positions added out of place; and attention in which all tokens ask and one answer is kept.
Sides alternate; ratios are medians over the pairs. Peak memory is taken in a fresh process for each side.
"""
import statistics, sys
from _common import DEVICE, alternate, faster, in_process, machine, peak, report, seconds
import timm
import torch
from torch import nn
from torch.nn import functional as F
from vfm_lab.models.uniformerv2 import GlobalBlock, UniFormerV2

BATCH, PAIRS = (1, 3) if DEVICE.type == "cpu" else (16, 10)
LAST = (8, 9, 10, 11)

class PerFrame(nn.Module):
    "timm's CLIP on every frame, the mean of its class tokens, a head."
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=0)
        self.head = nn.Linear(768, 400)

    def forward(self, clip): return self.head(self.vit(clip.transpose(1, 2).flatten(0, 1)).view(len(clip), clip.shape[2], -1).mean(1))

class Usual(GlobalBlock):
    "One query, keys and values for all tokens."
    def forward(self, q, x):
        y = self.norm_kv(self.add_position(x))
        k, v = self.attn.kv(y).unflatten(2, (2, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(self.attn.q(self.norm1(q)).unflatten(2, (self.attn.heads, -1)).transpose(1, 2), k, v)
        q = q + self.attn.proj(a.transpose(1, 2).flatten(2))
        return q + self.mlp(self.norm2(q))

class Clone(Usual):
    "The same; positions are written into a clone of the tokens."
    def add_position(self, x):
        side, y = int((x.shape[2] - 1) ** 0.5), x.clone()
        y[:, :, 1:] += self.dpe(x[:, :, 1:].unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).flatten(2, 3)
        return y.flatten(1, 2)

class Square(GlobalBlock):
    "All tokens ask, and the answer to the query is kept: torch's own layer, N×N pairs."
    def forward(self, q, x):
        y = self.norm_kv(self.add_position(x))
        a, m = self.attn, torch.cat([self.norm1(q), y], 1)
        w, b = torch.cat([a.q.weight, a.kv.weight]), torch.cat([a.q.bias, a.kv.bias])
        q = q + F.multi_head_attention_forward(m.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1), q.shape[2], a.heads, w, b, None, None, False, 0.0,
                                               a.proj.weight, a.proj.bias, need_weights=False)[0][:1].transpose(0, 1)
        return q + self.mlp(self.norm2(q))

WAYS = {"keys and values for all": Usual, "keys and values for all, in-place clone": Clone, "all ask (N×N)": Square}
ADDED = {"CLIP per frame": {}, **{f"+ {n} global": {"globals": n} for n in (1, 2, 3, 4)}, "+ 4 global, single local": {"globals": 4, "local": "single"}, "+ 4 global, double local": {"globals": 4, "local": "double"}}
SIDES = {**ADDED, **{n: {"globals": 4, "way": way} for n, way in WAYS.items()}}

class Armoury:
    "One model with everything, of which a side uses a part: fifteen models and their optimizers would not fit into memory."
    def __init__(self):
        self.model = UniFormerV2(local="double").to(DEVICE)
        self.local = [(b.local1, b.local2) for b in self.model.blocks]
        self.fusion, self.layers = self.model.fusion, list(self.model.fusion.layers)

    def arm(self, globals: int = 0, local: str | None = None, way: type = GlobalBlock) -> nn.Module:
        "The model with so many global blocks, of this kind, and these local blocks."
        for block, (one, two) in zip(self.model.blocks, self.local): block.local1, block.local2 = one if local else nn.Identity(), two if local == "double" else nn.Identity()
        for block in self.layers: block.__class__ = way
        self.fusion.layers = nn.ModuleList(self.layers[4 - globals:])
        self.model.global_layers, self.model.fusion = LAST[4 - globals:], self.fusion if globals else None
        return self.model

def build(name: str) -> nn.Module:
    "A side as a model of its own."
    if name == "timm": return PerFrame().to(DEVICE)
    side = SIDES[name]
    model = UniFormerV2(global_layers=LAST[4 - side.get("globals", 0):], local=side.get("local"))
    for block in model.fusion.layers if model.fusion else (): block.__class__ = side.get("way", GlobalBlock)
    return model.to(DEVICE)

def clips() -> torch.Tensor: return torch.randn(BATCH, 3, 8, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE)

def forward(get, clip):
    def run():
        with torch.no_grad(): get().eval()(clip)
    return run

def step(get, clip, optimizer):
    "A training step. Parameters that a side does not use have no gradient, and AdamW passes them by."
    label = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
    def run():
        optimizer.zero_grad()
        F.cross_entropy(get().train()(clip), label).backward()
        optimizer.step()
    return run

def alone(name: str):
    "The training step of a side in a process of its own."
    model = build(name)
    return step(lambda: model, clips(), torch.optim.AdamW(model.parameters(), 1e-5))

def kept(block: nn.Module, x: torch.Tensor, q: torch.Tensor) -> float:
    "MB that autograd keeps for one block, without its weights and the tokens it was given; every storage counts once."
    old, sizes = {t.untyped_storage().data_ptr() for t in (x, q, *block.parameters())}, {}
    def pack(t): sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = block(q, x)   # `out` keeps everything alive while we count
    return sum(n for p, n in sizes.items() if p not in old) / 2**20 + 0 * out.shape[0]

def one_block() -> dict:
    "One global block over 8 frames, forward and backward, every way; first all must agree."
    g = torch.Generator().manual_seed(0)
    block, x, q = GlobalBlock(768, 12).eval().to(DEVICE), torch.randn(4, 8, 197, 768, generator=g).to(DEVICE).requires_grad_(), torch.randn(4, 1, 768, generator=g).to(DEVICE)
    for p in block.parameters(): p.data = 0.03 * torch.randn(p.shape, generator=g).to(DEVICE)
    runs, memory, want = {}, {}, block(q, x).detach()
    for name, kind in {"ours": GlobalBlock, **WAYS}.items():
        def run(kind=kind):
            block.__class__ = kind
            block(q, x).sum().backward()
        block.__class__ = kind
        torch.testing.assert_close(block(q, x), want, atol=1e-4, rtol=1e-4)
        runs[name], memory[name] = run, kept(block, x, q)
        run()
    times = alternate(runs, 2 * PAIRS)
    return {n: {"ms, forward and backward": round(1e3 * seconds(times[n], 6), 1), "times the time of ours": faster(times, "ours", n), "MB kept for backward": round(memory[n], 1)} for n in runs}

def timed() -> dict:
    "Seconds of forward and training step of every side."
    armoury, clip, rows, per_frame = Armoury(), clips(), {n: {} for n in ("timm", *SIDES)}, PerFrame().to(DEVICE)
    get = {"timm": lambda: per_frame, **{n: lambda side=side: armoury.arm(**side) for n, side in SIDES.items()}}
    of = {"timm": torch.optim.AdamW(per_frame.parameters(), 1e-5), "ours": torch.optim.AdamW(armoury.arm(4, "double").parameters(), 1e-5)}
    for what in ("forward", "training step"):
        runs = {n: forward(get[n], clip) if what == "forward" else step(get[n], clip, of.get(n, of["ours"])) for n in rows}
        for run in runs.values(): run()                                        # warm-up
        times = alternate(runs, PAIRS)
        for n in rows: rows[n] |= {f"{what}, s": seconds(times[n], 3), f"{what}, over CLIP per frame": round(statistics.median(o / p for o, p in zip(times[n], times["CLIP per frame"])), 3)}
    return rows

def whole() -> dict:
    "Times of every side, then its peak memory, when the models of the timing are gone."
    rows = timed()
    for n in rows: rows[n]["peak MB of a step"] = round(in_process(__file__, n) if DEVICE.type == "cpu" else peak(lambda n=n: alone(n)))
    return {"CLIP per frame (timm)" if n == "timm" else f"4 global: {n}" if n in WAYS else n: row for n, row in rows.items()}

def main() -> None:
    if len(sys.argv) > 1: return print(peak(lambda: alone(sys.argv[1])))
    about, block = machine("timm"), one_block()
    report("uniformerv2" if DEVICE.type == "cpu" else "uniformerv2_gpu", "UniFormerV2-B: what each added block costs",
           f"8 frames at 224 pixels, float32; sides alternate, ratios are medians over the rounds. First table: one global block, 4 clips, written in four ways that give equal results; "
           f"*ours* carries the query to the tokens, which then need no keys and values. Second: the whole model at batch {BATCH}, blocks added one at a time, then the four global blocks in the other ways; at this batch the peak lies in the optimizer's step, where all ways are equal.",
           about, {"one global block": block, "whole model": whole()})

if __name__ == "__main__": main()
