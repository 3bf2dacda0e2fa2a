"""Settings that no released model has, against transformers and against formulas written out."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vfm_lab.models.checkpoints import load_weights
from vfm_lab.models.clip import CLIPText, CLIPVision, last_layers
from vfm_lab.models.umt import UMT, UMTClassifier, UMTStudent, teacher_target
from vfm_lab.models.uniformerv2 import UniFormerV2
from vfm_lab.models.videomae import VideoMAE, VideoMAEClassifier
from vfm_lab.official.clip import text_from_transformers, vision_from_transformers
from vfm_lab.official.videomae import from_transformers
from vfm_lab.tokens.patching import visible_indices
from vfm_lab.tokens.positions import resize_positions, sincos_1d

transformers = pytest.importorskip("transformers")
SMALL = dict(image_size=32, patch=8, dim=48, heads=3, depth=4)
MASK = torch.arange(32)[None].expand(2, -1) % 3 > 0                    # two thirds are hidden


def filled(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def clips(frames=4, batch=2, size=32):
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(3))


def mae_config(**more):
    return transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=60, decoder_hidden_size=18,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        **dict(decoder_intermediate_size=50, layer_norm_eps=1e-6) | more)


def ours(config, **more):
    return dict(image_size=32, patch=8, frames=4, dim=24, depth=2, heads=3, mlp_ratio=60 / 24,
                act=config.hidden_act, eps=config.layer_norm_eps,
                bias="qv", **more)


@pytest.mark.parametrize("more", [
    {}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"hidden_act": "silu"}, {"layer_norm_eps": 0.01},
    {"norm_pix_loss": False}, {"decoder_intermediate_size": 7}, {"use_mean_pooling": True}], ids=str)
def test_videomae_pretraining_of_transformers(more):
    config = mae_config(**{"use_mean_pooling": False} | more)
    theirs = filled(transformers.VideoMAEForPreTraining(config))
    mine = VideoMAE(0.5, decoder_dim=18, decoder_depth=2, decoder_heads=3, decoder_norm_eps=1e-5,
                    decoder_mlp_ratio=config.decoder_intermediate_size / 18,
                    norm_pix_loss=config.norm_pix_loss,
                    final_norm=not config.use_mean_pooling, **ours(config)).eval()
    load_weights(mine, theirs.state_dict(), from_transformers)
    clip = clips()
    with torch.no_grad():
        out = theirs(clip.transpose(1, 2), bool_masked_pos=MASK)
        assert_close(mine.predict(clip, MASK, ~MASK), out.logits, atol=2e-5, rtol=1e-4)
        assert_close(mine.loss(clip, MASK, ~MASK), out.loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"use_mean_pooling": False}, {"layer_norm_eps": 0.01, "hidden_act": "relu"}], ids=str)
def test_videomae_classifier_of_transformers(more):
    config = mae_config(num_labels=5, **more)
    theirs = filled(transformers.VideoMAEForVideoClassification(config))
    mine = VideoMAEClassifier(5, mean_pooling=config.use_mean_pooling, fc_eps=1e-5, **ours(config)).eval()
    load_weights(mine, theirs.state_dict(), from_transformers)
    with torch.no_grad():
        assert_close(mine(clips()), theirs(clips().transpose(1, 2)).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new"])
@pytest.mark.parametrize("eps", [1e-5, 0.01])
def test_clip_of_transformers(act, eps):
    shared = dict(hidden_act=act, layer_norm_eps=eps, projection_dim=16, num_hidden_layers=2,
                  num_attention_heads=3, hidden_size=24, intermediate_size=50)
    vision = filled(transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(image_size=32, patch_size=8, **shared)))
    text = filled(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=40, max_position_embeddings=8, eos_token_id=39, bos_token_id=1, **shared)))
    sizes = dict(dim=24, depth=2, heads=3, out_dim=16, mlp_ratio=50 / 24, act=act, eps=eps)
    mine, words = CLIPVision(32, 8, **sizes).eval(), CLIPText(40, 8, **sizes).eval()
    load_weights(mine, vision.state_dict(), vision_from_transformers)
    load_weights(words, text.state_dict(), text_from_transformers)
    image, ids = clips(1)[:, :, 0], torch.tensor([[1, 5, 7, 39, 0], [1, 39, 0, 0, 0]])
    with torch.no_grad():
        assert_close(mine(image), vision(image).image_embeds, atol=2e-5, rtol=1e-4)
        there = text(ids, attention_mask=(ids != 0).long() | (ids == 1))
        assert_close(words(ids, ids != 0), there.text_embeds, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layers, interval, wanted", [
    (3, 1, [9, 10, 11]), (3, 2, [7, 9, 11]), (4, 3, [2, 5, 8, 11]), (4, 1.5, [7, 8, 10, 11]), (1, 9, [11])])
def test_returned_layers_are_the_official_ones(layers, interval, wanted):
    official = sorted(12 - int(i * interval) - 1 for i in range(layers))    # of both official classes
    assert last_layers(12, layers, interval) == wanted == official


@pytest.mark.parametrize("bad", [(0, 1), (13, 1), (3, 6), (3, 0.3)])
def test_layers_that_are_not_there(bad):
    with pytest.raises(ValueError, match="12 blocks"): last_layers(12, *bad)


@pytest.mark.parametrize("normalize", [True, False])
def test_umt_with_intervals(normalize):
    student = filled(UMTStudent(20, 2, interval=2, normalize=normalize, eps=1e-3, frames=4, **SMALL))
    teacher = filled(CLIPVision(32, 8, 40, 4, 4, 20, eps=1e-2), 2)
    clip, mask = clips(), torch.arange(64)[None].expand(2, -1) % 2 == 0
    visible = visible_indices(mask)
    with torch.no_grad():
        x = student.encoder.embed(clip)[:, 1::2]
        kept = []
        for block in student.encoder.blocks:
            x = block(x)
            kept.append(x)
        wanted = []
        for head, k in zip(student.clip_decoder, (kept[1], kept[3])):
            z = F.layer_norm(k, (48,), student.encoder.norm.weight, student.encoder.norm.bias, 1e-3)
            z = head.head(z + sincos_1d(64, 48)[1::2])
            z = F.layer_norm(z, (20,), head.norm.weight, head.norm.bias, 1e-3)
            wanted.append(z / z.norm(dim=-1, keepdim=True) if normalize else z)
        assert_close(student(clip, mask), torch.stack(wanted), atol=1e-5, rtol=1e-4)
        states, attention = teacher.teacher_states(clip, 2, interval=3)      # blocks 0 and 3
        target = teacher_target(teacher, states, visible, normalize)
        _, every = teacher.forward_intermediates(clip)
        kept = torch.stack([every[0], every[3]])[:, :, :, 1:].flatten(2, 3)[:, :, 1::2]
        kept = teacher.project(kept)
        assert_close(target, F.normalize(kept, dim=-1) if normalize else kept, atol=1e-5, rtol=1e-4)
        model = UMT(student, teacher, 0.5, teacher_interval=3)
        assert model({"clip": clip})["loss"].isfinite() and attention.shape == (2, 4, 16)


def test_a_teacher_whose_stem_joins_two_frames():
    tower = filled(CLIPVision(32, 8, 24, 2, 3, 16, tubelet=2))
    clip = clips(6)
    with torch.no_grad():
        features, attention = tower.teacher_features(clip, 1)
        x = F.conv3d(clip, tower.patch_embed.proj.weight, stride=(2, 8, 8)).flatten(3).permute(0, 2, 3, 1)
        x = torch.cat([tower.cls_token.expand(2, 3, 1, -1), x], 2) + tower.pos_embed
        x = tower.norm_pre(x).flatten(0, 1)
        for block in tower.blocks: x = block(x)
    assert attention.shape == (2, 3, 16)
    assert_close(features[0], x[:, 1:].reshape(2, 48, 24), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", [None, (4, 7, 7), (8, 16, 16)])
def test_base_grid_of_the_position_table(base):
    grid = base or (8, 14, 14)
    model = UMTClassifier(3, base, frames=4, **SMALL)
    table = resize_positions(sincos_1d(grid[0] * grid[1] * grid[2], 48), grid, (4, 4, 4))
    assert torch.equal(model.pos, table) and model.config["base_grid"] == base


def test_patches_of_14_pixels_have_a_table_of_16_by_16():
    model = UMTClassifier(0, image_size=224, patch=14, dim=16, depth=1, heads=1, frames=8)
    assert torch.equal(model.pos, sincos_1d(2048, 16))


@pytest.mark.parametrize("reduction, inner", [(1.5, 32), (2, 24), (1.6, 29), (5, 9)])
def test_reduction_of_local_blocks_is_floored_as_there(reduction, inner):
    model = UniFormerV2(3, **SMALL, frames=4, local="double", global_layers=(3,), reduction=reduction)
    assert {m.reduce.out_features for b in model.blocks for m in (b.local1, b.local2)} == {inner}
    assert inner == int(48 // reduction)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_stem_reads_any_odd_number_of_frames(kernel):
    model = filled(UniFormerV2(3, **SMALL, frames=8, global_layers=(3,), temporal_down=True, stem_kernel=kernel))
    stem = nn.Conv3d(3, 48, (kernel, 8, 8), (2, 8, 8), ((kernel - 1) // 2, 0, 0), bias=False)
    stem.load_state_dict(model.patch_embed.proj.state_dict())
    with torch.no_grad():
        wanted = stem(clips(8)).flatten(2).transpose(1, 2)
        assert_close(model.patch_embed(clips(8)), wanted)
        assert model.patch_embed.grid(clips(8)) == (4, 4, 4) and model(clips(8)).shape == (2, 3)
        assert model(clips(7)).shape == (2, 3)


def test_eps_and_ratio_of_global_blocks():
    model = UniFormerV2(3, **SMALL, frames=4, global_layers=(2, 3), eps=1e-3, global_mlp_ratio=2.5)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    assert {b.mlp.fc1.out_features for b in model.fusion.layers} == {120}
    assert {b.mlp.fc1.out_features for b in model.blocks} == {192}
