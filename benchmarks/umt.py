"""One step of UMT's first stage against a plain implementation: `python benchmarks/umt.py` (about eight minutes on 2 cores).

B/16 student, CLIP B/16 teacher, 8 frames, 224 pixels, 80 % hidden, AdamW; the same weights, clips and seeds of the masks. The plain side stands in
this file: its teacher computes attention by hand, with the full map of all heads in every block, and runs every token through all of it; its student
embeds all tokens before it drops the hidden ones. The optimizer is the same. Several batches, since what the plain side writes into memory grows with
them. The first losses must agree. Then ours with the teacher in bf16 (`teacher.to(torch.bfloat16)`), where only the loss curves can agree: they are
drawn from fifty steps of a small model on synthetic clips.
"""
from _common import DEVICE, alternate, faster, machine, report, seconds
import torch
from torch.nn import functional as F
from vfm_lab.data.synth import synth_clips
from vfm_lab.data.transforms import normalize
from vfm_lab.models.clip import CLIPVision, tiny_clip
from vfm_lab.models.umt import UMT, UMTStudent
from vfm_lab.objectives.alignment import uta_loss
from vfm_lab.official.umt import SIZES
from vfm_lab.tokens.masking import attention_sampled_mask, clip_generators

BATCHES, PAIRS, STEPS, PLAIN, BF16 = (2, 4, 8), 5, 50, "plain", "ours, teacher in bf16"

def full_attention(layer, x):
    "Attention by hand: (B, N, D) and the map of all heads (B, heads, N, N)."
    B, N, D = x.shape
    q, k, v = layer.qkv(x).view(B, N, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(B, N, D)), weights

def plain_teacher(tower, clip, layers):
    "All tokens of the last layers, projected, and the attention of the class token."
    B, _, T = clip.shape[:3]
    x, kept = tower.embed(clip).flatten(0, 1), []     # (B·T, 1+S, D)
    for block in tower.blocks:
        y, weights = full_attention(block.attn, block.norm1(x))
        x = x + y
        inner = block.mlp.fc1(block.norm2(x))
        x = x + block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
        kept = [*kept, x[:, 1:]][-layers:]
    out = torch.stack(kept)
    return F.normalize(tower.project(out), dim=-1).view(layers, B, -1, tower.out_dim), weights.mean(1)[:, 0, 1:].view(B, T, -1)

def plain_student(student, clip, mask):
    "Embed everything with a convolution, then drop the hidden tokens."
    vit, kept = student.encoder, []
    x = vit.patch_embed.proj(clip).flatten(2).transpose(1, 2) + vit.pos
    x = x[~mask].view(len(clip), -1, vit.dim)
    for block in vit.blocks:
        x = block(x)
        kept = [*kept, x][-student.layers:]
    x = vit.norm(torch.stack(kept)) + vit.pos.expand(len(clip), -1, -1)[~mask].view(x.shape)
    return F.normalize(torch.stack([head(f) for head, f in zip(student.clip_decoder, x)]), dim=-1)

def plain_loss(model, batch):
    clip, student = batch["clip"], model.student
    with torch.no_grad():
        target, attention = plain_teacher(model.teacher, clip, student.layers)
        mask = attention_sampled_mask(attention, model.mask_ratio, generator=clip_generators(batch))
        target = target[:, ~mask].view(len(target), len(clip), -1, target.shape[-1])
    return uta_loss(plain_student(student, clip, mask), target)

def side(name, student, teacher, batches):
    "The step of one side, on one batch after another."
    model = UMT(student, teacher).to(DEVICE).train()
    if name == BF16: model.teacher.to(torch.bfloat16)
    optimizer, batches = torch.optim.AdamW(student.parameters(), 1e-3, betas=(0.9, 0.95), fused=True), iter(batches)
    def step():
        batch = next(batches)
        optimizer.zero_grad()
        value = plain_loss(model, batch) if name == PLAIN else model(batch)["loss"]
        value.backward()
        optimizer.step()
        return value.item()
    return step

def towers(make_student, make_teacher):
    torch.manual_seed(0)
    return make_student(), make_teacher()

def stream(shape=None):
    "Batches with a seed for every mask: noise of one shape, or synthetic clips."
    draw, n = torch.Generator().manual_seed(0), 0
    noise = torch.randn(shape, generator=draw).to(DEVICE) if shape else None
    while True:
        size = shape[0] if shape else 32
        clip = noise if shape else normalize(synth_clips(size, frames=4, generator=draw).clip).to(DEVICE)
        yield {"clip": clip, "seed": torch.arange(n, n + size)}
        n += size

def curves() -> dict:
    "Loss curves of a small student under the tiny CLIP, all from one start."
    small = dict(image_size=64, patch=8, frames=4, dim=96, depth=4, heads=4, layers=3)
    loss = {}
    for name in (PLAIN, "ours", BF16):
        student, teacher = towers(lambda: UMTStudent(teacher_dim=tiny_clip().vision.out_dim, **small), lambda: tiny_clip().vision)
        step = side(name, student, teacher, stream())
        loss[name] = torch.tensor([step() for _ in range(STEPS)])
    apart = {name: (curve / loss[PLAIN] - 1).abs() for name, curve in loss.items()}
    return {name: {**{f"loss at step {s}": round(curve[s - 1].item(), 4) for s in (1, 10, 25, STEPS)}, "mean relative difference": f"{apart[name].mean():.1e}",
                   "largest": f"{apart[name].max():.1e}"} for name, curve in loss.items()}

def race(batch: int) -> dict[str, dict[str, float]]:
    "First loss, seconds per step and speed over the plain side, at one batch."
    steps = {}
    for name in (PLAIN, "ours", BF16):
        student, teacher = towers(lambda: UMTStudent(**SIZES["base"], frames=8), CLIPVision)
        steps[name] = side(name, student, teacher, stream((batch, 3, 8, 224, 224)))
    first = {name: step() for name, step in steps.items()}    # also the warm-up
    assert abs(first["ours"] / first[PLAIN] - 1) < 1e-4, first
    times = alternate(steps, PAIRS)
    return {n: {f"first loss, batch {batch}": round(first[n], 5), "seconds": seconds(times[n]), f"clips/s over plain, batch {batch}": faster(times, n, PLAIN)} for n in steps}

def main() -> None:
    about, races = machine(), [race(batch) for batch in BATCHES]
    rows = {name: {k: v for r in races for k, v in r[name].items() if "over plain" in k} for name in races[0]}
    for name in rows: rows[name] |= {k: v for k, v in races[0][name].items() if "loss" in k} | {f"seconds per step, batch {BATCHES[-1]}": races[-1][name]["seconds"]}
    report("umt", "A step of UMT's first stage, against a plain implementation", f"{PAIRS} pairs of steps, alternating; ratios are medians over the pairs. The plain side computes attention by hand "
           "with full maps in the teacher, runs all of the teacher's tokens through its last MLP and projection, and embeds all of the student's before it drops the hidden ones. "
           "Below: the loss of a small model in training, from the same start on all sides.",
           about, {"step": rows, f"{STEPS} steps of a small model": curves()})

if __name__ == "__main__": main()
