"The rival of a benchmark must do the same work: UMT's plain implementation gives the same loss and gradient as the lab's."
from pathlib import Path
import torch
from vfm_lab.models.clip import CLIPVision
from vfm_lab.models.umt import UMT, UMTStudent

def test_plain_umt(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from umt import plain_loss
    torch.manual_seed(0)
    model = UMT(UMTStudent(teacher_dim=24, layers=2, image_size=32, patch=8, frames=4, dim=48, depth=3, heads=4), CLIPVision(32, 8, 48, 3, 4, 24))
    batch = {"clip": torch.randn(3, 3, 4, 32, 32), "seed": torch.arange(3)}
    losses = plain_loss(model, batch), model(batch)["loss"]
    grads = [torch.autograd.grad(loss, model.student.encoder.patch_embed.proj.weight)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)

def test_teacher_in_bf16():
    torch.manual_seed(0)
    tower, clip = CLIPVision(32, 8, 48, 3, 4, 24).eval(), torch.randn(1, 3, 4, 32, 32)
    (hidden, look), (half, half_look) = tower.teacher_features(clip, 2), tower.to(torch.bfloat16).teacher_features(clip, 2)      # the clip stays in float32
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), hidden, atol=0.1, rtol=0)
    torch.testing.assert_close(half_look.float(), look, atol=0.01, rtol=0)
