"""One VideoMAE-B pre-training step against transformers' `VideoMAEForPreTraining`: `python benchmarks/pretrain.py` (about five minutes on 2 cores).

224 pixels, 16 frames, the same clips and the same tube mask at 0.9 on both sides, AdamW, float32. First with the same work (everything that is
hidden is decoded), and the two losses are compared from the same weights; then ours with a running cell at one half. Steps alternate; the ratio is
the median over the pairs. Peak memory is taken in a process of its own for each side. Results go to `benchmarks/results/pretrain.json` and `.md`.
"""
import json, os, platform, re, statistics, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from vfm_lab.models.checkpoints import load_weights
from vfm_lab.models.videomae import VideoMAE, from_transformers
from vfm_lab.tokens.masking import running_cell_mask, tube_mask

ROOT, BATCH, PAIRS = Path(__file__).resolve().parents[1], 4, 5
SIZE = dict(dim=768, depth=12, heads=12)

def sides(names: list[str]) -> dict:
    "Name -> (model, step function); all with the same weights."
    from transformers import VideoMAEConfig, VideoMAEForPreTraining
    torch.manual_seed(0)
    clip, mask = torch.randn(BATCH, 3, 16, 224, 224), tube_mask(BATCH, (8, 14, 14), 0.9)
    skip, peer = running_cell_mask(BATCH, (8, 14, 14), 0.5), VideoMAEForPreTraining(VideoMAEConfig(use_mean_pooling=False))
    weights, out = peer.state_dict(), {}
    for name in names:
        model = peer if name == "transformers" else VideoMAE(**SIZE)
        if name != "transformers": load_weights(model, weights, from_transformers)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        def loss(model=model, name=name):
            if name == "transformers": return model(clip.transpose(1, 2), bool_masked_pos=mask).loss    # it wants (B, T, 3, H, W)
            return model.loss(clip, mask, ~mask if name == "ours" else skip)
        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            return value.item()
        out[name] = step
    return out

def peak(name: str) -> float:
    "Peak memory of two steps, in MB above what the process held before the model was made; run in a process of its own."
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmarks.pretrain as b; b.measure_peak({name!r})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip().splitlines()[-1])

def high() -> float:
    "Peak memory of this process so far in MB (Linux)."
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def measure_peak(name: str) -> None:
    before, step = high(), sides([name])[name]
    for _ in range(2): step()
    print(high() - before)

def main() -> None:
    names = ["transformers", "ours", "ours, running cell"]
    steps = sides(names)
    first = {name: steps[name]() for name in names}    # also the warm-up
    times = {name: [] for name in names}
    for pair in range(PAIRS):
        for name in names if pair % 2 else names[::-1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    speed = {name: round(statistics.median(p / o for p, o in zip(times["transformers"], times[name])), 2) for name in names}
    memory = {name: round(peak(name)) for name in names}
    rows = {name: {"first loss": round(first[name], 5), "seconds per step": round(statistics.median(times[name]), 2), "clips/s over transformers": speed[name],
                   "peak MB": memory[name], "peak over transformers": round(memory[name] / memory["transformers"], 2)} for name in names}
    import transformers
    about = {"cores": len(os.sched_getaffinity(0)), "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "batch": BATCH}
    head = list(next(iter(rows.values())))
    table = "\n".join([f"| step | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|", *(f"| {n} | {' | '.join(map(str, r.values()))} |" for n, r in rows.items())])
    print(table)
    out = ROOT/"benchmarks/results"
    (out/"pretrain.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    (out/"pretrain.md").write_text(f"# A VideoMAE-B pre-training step, against transformers\n\nMade by `python benchmarks/pretrain.py`: {PAIRS} pairs of steps, alternating; ratios are medians over the pairs.\n\n"
                                   f"{table}\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")

if __name__ == "__main__": main()
