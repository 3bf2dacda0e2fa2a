"""One VideoMAE pre-training step against transformers' `VideoMAEForPreTraining`: `python benchmarks/pretrain.py` (about ten minutes on 2 cores).

224 pixels, 16 frames, the same clips and the same tube mask at 0.9 on both sides, AdamW. First with the same work (everything that is hidden is
decoded), and the two losses are compared from the same weights; then ours with a running cell at one half. Steps alternate; the ratio is the median
over the pairs. On a CPU: B in float32, at two batches. Peak memory is taken in a fresh process for each side, at several batches: weights and
optimizer are the same on both sides and hide the difference when the batch is small. On a GPU: B and L in float32 and bf16, with and without
compile, and MFU.
"""
import sys
from contextlib import ExitStack
from functools import partial
from _common import DEVICE, alternate, faster, in_process, machine, peak, report, seconds
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from vfm_lab.models.checkpoints import load_weights
from vfm_lab.models.videomae import VideoMAE
from vfm_lab.official.videomae import DECODERS, SIZES, from_transformers
from vfm_lab.tokens.masking import running_cell_mask, tube_mask
from vfm_lab.train.loop import TrainConfig, switched

NAMES, BATCHES, PAIRS = ("transformers", "ours", "ours, running cell"), (4, 8, 16), 7
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}   # FLOP/s of a GPU in bf16 without sparsity, from data sheets

def peer(size: str) -> VideoMAEForPreTraining:
    s, d = SIZES[size], DECODERS[size]
    return VideoMAEForPreTraining(VideoMAEConfig(use_mean_pooling=False, hidden_size=s["dim"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=4 * s["dim"], decoder_hidden_size=d["decoder_dim"], decoder_num_attention_heads=d["decoder_heads"], decoder_intermediate_size=4 * d["decoder_dim"]))

def side(name: str, batch: int, size: str = "base", weights: dict | None = None, bf16: bool = False, compile: bool = False):
    "The step of one side."
    torch.manual_seed(0)
    clip, mask = torch.randn(batch, 3, 16, 224, 224), tube_mask(batch, (8, 14, 14), 0.9)
    skip = running_cell_mask(batch, (8, 14, 14), 0.5) if "cell" in name else ~mask
    clip, mask, skip = (x.to(DEVICE) for x in (clip, mask, skip))
    model = peer(size) if name == "transformers" else VideoMAE(**SIZES[size], **DECODERS[size])
    if weights: model.load_state_dict(weights) if name == "transformers" else load_weights(model, weights, from_transformers)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if name == "transformers":
        run = torch.compile(model) if compile else model
        loss = lambda: run(clip.transpose(1, 2), bool_masked_pos=mask).loss    # it wants (B, T, 3, H, W)
    else:
        ExitStack().enter_context(switched(model, TrainConfig(1, compile=True))) if compile else None
        loss = lambda: model.loss(clip, mask, skip)
    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16): value = loss()
        value.backward()
        optimizer.step()
        return value.item()
    return step

def race(batch: int, weights: dict) -> dict:
    "First loss, seconds per step and speed over transformers, at one batch."
    steps = {name: side(name, batch, weights=weights) for name in NAMES}
    first = {name: step() for name, step in steps.items()}    # also the warm-up
    assert abs(first["ours"] / first["transformers"] - 1) < 1e-4
    times = alternate(steps, PAIRS)
    return {n: {"first loss": round(first[n], 5), "seconds per step": seconds(times[n]), "clips/s over transformers": faster(times, n, "transformers")} for n in NAMES}

def on_cpu() -> dict:
    torch.manual_seed(0)
    weights = peer("base").state_dict()
    races = {f"step, batch {b}": race(b, weights) for b in BATCHES[:2]}
    memory = {(n, b): in_process(__file__, n, b) for n in NAMES for b in BATCHES}
    peaks = {n: {f"batch {b}": f"{memory[n, b]:.0f} MB, {memory[n, b] / memory['transformers', b]:.2f} ×" for b in BATCHES} for n in NAMES}
    return races | {"peak memory, and over transformers": peaks}

def on_gpu(batch: int = 32, sizes=("base", "large"), pairs: int = 10) -> dict:
    rows, limit = {}, next((v for k, v in PEAKS.items() if k in torch.cuda.get_device_name()), None) if DEVICE.type == "cuda" else None
    for size in sizes:
        weights = peer(size).state_dict()
        for kind, how in (("float32", {}), ("bf16", {"bf16": True}), ("bf16, compiled", {"bf16": True, "compile": True})):
            flops, memory, steps = {}, {}, {}
            for name in NAMES:
                with FlopCounterMode(display=False) as counter: side(name, batch, size)()
                flops[name] = counter.get_total_flops()
                memory[name] = peak(partial(side, name, batch, size, **how))
            for name in NAMES: steps[name] = side(name, batch, size, weights, **how)
            first = {name: [step(), step(), step()][0] for name, step in steps.items()}    # also the warm-up
            times = alternate(steps, pairs)
            for n in NAMES:
                mfu = round(flops[n] / seconds(times[n], 9) / limit, 2) if limit and "bf16" in kind else "–"
                rows[f"{size}, {kind}, {n}"] = {"first loss": round(first[n], 4), "ms per step": round(1e3 * seconds(times[n], 6), 1), "clips/s": round(batch / seconds(times[n], 6)),
                    "over transformers": faster(times, n, "transformers"), "TFLOP per step": round(flops[n] / 1e12, 2), "MFU": mfu, "peak MB": round(memory[n]), "peak over transformers": round(memory[n] / memory["transformers"], 2)}
    return {f"step, batch {batch}": rows}

def main() -> None:
    if len(sys.argv) > 1: return print(peak(lambda: side(sys.argv[1], int(sys.argv[2]))))
    about = machine("transformers")
    report("pretrain" if DEVICE.type == "cpu" else "pretrain_gpu", "A VideoMAE pre-training step, against transformers",
           "steps alternate; ratios of speed are medians over the pairs. *ours* does the same work as transformers; *ours, running cell* decodes half of the tokens. "
           "Weights, gradients and optimizer take the same memory on every side; activations grow with the batch.", about, on_gpu() if DEVICE.type == "cuda" else on_cpu())

if __name__ == "__main__": main()
