"""The same steps in two commits, by turns: `python benchmarks/commits.py [COMMIT]` (ten minutes).

COMMIT is an earlier one, the last one without it; the other side is the tree as it is. Each runs in
a process of its own; weights, clips and masks have the same seeds. One step of either pre-training
and of fine-tuning a classifier at size B, seven pairs each.
"""
import importlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, alternate, machine, report

PAIRS, CLIPS = 7, 2
STEPS = {"UMT-B": "umt", "VideoMAE-B, running cell": "videomae", "UniFormerV2-B": "uniformerv2"}

def module(system):
    "The module to train; a commit names its models in `hub`, or where they are defined."
    import timm
    from vfm_lab.models.clip import CLIPVision
    try: importlib.import_module("vfm_lab.hub").systems()
    except ImportError: importlib.import_module(f"vfm_lab.models.{system}")
    if system == "umt":
        from vfm_lab.models.umt import UMT
        return UMT(timm.create_model("umt_pretrain_vit_base_patch16"), CLIPVision())
    if system == "videomae": return timm.create_model("videomae_pretrain_vit_base_patch16")
    from vfm_lab.tasks.finetune import FineTune
    return FineTune(timm.create_model("uniformerv2_base_patch16", num_classes=400), 400)

def serve(system):
    "One step for each line that comes in."
    import torch
    torch.manual_seed(0)
    model = module(system).train()
    frames = 16 if system == "videomae" else 8
    batch = {"clip": torch.randn(CLIPS, 3, frames, 224, 224), "label": torch.arange(CLIPS)}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)
    for _ in sys.stdin:
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
        print("done", flush=True)

def side(tree, system):
    "A process that steps when it is asked."
    command = [sys.executable, Path(__file__).resolve(), "serve", system, tree]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def step():
        process.stdin.write("\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n": raise RuntimeError(f"{tree}: {system} stopped")
    return process, step

def measure(old, system):
    "Both trees by turns."
    sides = {"old": side(old, system), "new": side(ROOT, system)}
    for _, step in sides.values(): step()
    times = alternate({name: step for name, (_, step) in sides.items()}, PAIRS)
    for process, _ in sides.values(): process.communicate()
    ratios = [new / old for old, new in zip(times["old"], times["new"])]
    return {"old, s": round(statistics.median(times["old"]), 2),
            "new, s": round(statistics.median(times["new"]), 2),
            "new over old, median": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}

def git(*words):
    "What git says."
    command = ["git", "-C", ROOT, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

def main(commit="HEAD~1"):
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        git("worktree", "add", "--detach", old, commit)
        try: rows = {name: measure(old, system) for name, system in STEPS.items()}
        finally: git("worktree", "remove", "--force", old)
    text = f"seconds of a training step, {PAIRS} pairs by turns, batch {CLIPS}."
    about = machine(**{n: git("rev-parse", "--short", c) for n, c in {"old": commit, "new": "HEAD"}.items()})
    report("commits", "The same steps in two commits", text, about, {"step": rows})

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.path.insert(0, sys.argv[3])
        serve(sys.argv[2])
    else: main(*sys.argv[1:])
