"""Our ViT encoders against timm's on the same tokens with the same weights: `python benchmarks/encoder.py` (about three minutes on 2 cores).

B/16 at 224 pixels, forward only. A video ViT on one frame is an image ViT. On eight frames it is an image ViT whose picture is eight frames high:
the same tokens in the same order. CLIP's tower stands beside timm's model of that name. The outputs are compared first. Turns alternate.
"""
from _common import DEVICE, alternate, faster, machine, report, seconds
import timm
import torch
from vfm_lab.models.checkpoints import load_weights
from vfm_lab.models.clip import CLIPVision
from vfm_lab.official.clip import vision_from_timm
from vfm_lab.nn.vit import VideoViT

PAIRS = 15

def video_pair(frames: int) -> dict:
    "Ours and timm's, each a function of a clip (B, 3, T, 224, 224)."
    peer = timm.create_model("vit_base_patch16_224", img_size=(frames * 224, 224), class_token=False, global_pool="", num_classes=0).eval().to(DEVICE)
    ours = VideoViT(frames=frames, dim=768, depth=12, heads=12, bias="qkv").eval().to(DEVICE)
    weights = peer.state_dict()
    ours.pos.copy_(weights.pop("pos_embed")[0])
    ours.load_state_dict(weights | {"patch_embed.proj.weight": weights["patch_embed.proj.weight"].unsqueeze(2)})
    return {"ours": ours, "timm": lambda clip: peer(clip.flatten(2, 3))}      # frame below frame

def clip_pair() -> dict:
    "The same for CLIP's tower on single pictures (B, 3, 1, 224, 224)."
    peer, ours = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=512).eval(), CLIPVision().eval()
    torch.nn.init.zeros_(peer.head.bias)
    load_weights(ours, peer.state_dict(), vision_from_timm)
    ours.to(DEVICE), peer.to(DEVICE)
    return {"ours": lambda clip: ours(clip[:, :, 0]), "timm": lambda clip: peer(clip[:, :, 0])}

@torch.inference_mode()
def measure(pair: dict, clips: int, frames: int) -> dict:
    clip = torch.randn(clips, 3, frames, 224, 224, device=DEVICE)
    a, b = (side(clip) for side in pair.values())
    apart = ((a - b).abs().max() / b.abs().max()).item()
    assert apart < (1e-4 if DEVICE.type == "cpu" else 1e-2), apart
    times = alternate({name: lambda side=side: side(clip) for name, side in pair.items()}, PAIRS)
    return {"outputs differ by": f"{apart:.0e}", **{f"{name}, clips/s": round(clips / seconds(times[name], 9), 1) for name in pair}, "ours over timm": faster(times, "ours", "timm")}

def main() -> None:
    about = machine("timm")
    rows = {"video ViT, one frame, 196 tokens, batch 8": measure(video_pair(1), 8, 1), "video ViT, eight frames, 1568 tokens, batch 1": measure(video_pair(8), 1, 8),
            "CLIP tower, one picture, 197 tokens, batch 8": measure(clip_pair(), 8, 1)}
    report("encoder", "ViT-B forward, against timm", f"{PAIRS} pairs, alternating; ratios are medians over the pairs. Both sides hold the same weights, in float32.", about, {"encoder": rows})

if __name__ == "__main__": main()
