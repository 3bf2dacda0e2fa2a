"The front door opens what transformers writes, in one file or in several, and the numbers are transformers'."
import pytest
import torch

import vfm_lab
from vfm_lab.models.bert import BERT
from vfm_lab.models.checkpoints import CheckpointError
from vfm_lab.models.clip import CLIP
from vfm_lab.models.videomae import VideoMAE, VideoMAEClassifier

transformers = pytest.importorskip("transformers")
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VIDEO = dict(TINY, image_size=32, patch_size=8, num_frames=4, tubelet_size=2, decoder_hidden_size=24,
             decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=48)


def made(kind, config):
    "A model of transformers whose parameters are nowhere zero."
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(0.2 * torch.randn(p.shape))
    return model


def folder(model, path, shards):
    model.save_pretrained(path, max_shard_size="20KB" if shards else "1GB")
    assert (path / "model.safetensors.index.json").exists() == shards
    return vfm_lab.load(path)


@pytest.mark.parametrize("shards", [False, True])
def test_a_videomae_classifier(tmp_path, shards):
    names = {0: "left", 1: "right", 2: "up"}
    config = transformers.VideoMAEConfig(**VIDEO, num_labels=3, id2label=names)
    theirs = made(transformers.VideoMAEForVideoClassification, config)
    found = folder(theirs, tmp_path, shards)
    clip = torch.randn(2, 3, 4, 32, 32)
    assert isinstance(found.model, VideoMAEClassifier) and found.report.clean
    assert (found.labels, found.spec.frames, found.spec.size) == (["left", "right", "up"], 4, 32)
    with torch.no_grad(): torch.testing.assert_close(found.model(clip), theirs(clip.transpose(1, 2)).logits)


def same_pixels(theirs, found):
    clip, mask = torch.randn(2, 3, 4, 32, 32), torch.arange(32).expand(2, -1) % 2 == 0
    assert isinstance(found.model, VideoMAE) and found.report.clean
    with torch.no_grad():
        said = theirs(clip.transpose(1, 2), mask)
        torch.testing.assert_close(found.model.predict(clip, mask, ~mask), said.logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.model.loss(clip, mask, ~mask), said.loss, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [
    {}, {"use_mean_pooling": False}, {"use_mean_pooling": True}, {"qv_bias": False}, {"norm_pix_loss": False},
    {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"initializer_range": 0.5, "layer_norm_eps": 0.01}], ids=str)
def test_a_videomae_before_training_for_a_task(tmp_path, more):
    theirs = made(transformers.VideoMAEForPreTraining, transformers.VideoMAEConfig(**VIDEO, **more))
    shift = any(k.endswith("query.bias") for k in theirs.state_dict())
    assert shift == more.get("qv_bias", True)       # a version of transformers with another word shows it
    same_pixels(theirs, folder(theirs, tmp_path, False))


NAMED = dict(image_size=32, patch=8, frames=4, dim=32, depth=2, heads=2, mlp_ratio=2.0, eps=1e-12)


@pytest.mark.parametrize("pooled", [True, False])
def test_the_keys_show_the_final_norm_where_no_config_does(tmp_path, pooled):
    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=pooled)
    theirs = made(transformers.VideoMAEForPreTraining, config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    decoder = dict(decoder_dim=24, decoder_depth=1, decoder_heads=2, decoder_mlp_ratio=2.0)
    found = vfm_lab.load(tmp_path, "videomae_pretrain_vit_small_patch16", **NAMED, **decoder)
    same_pixels(theirs, found)
    with pytest.raises(CheckpointError, match="config.json with the sizes is missing"): vfm_lab.load(tmp_path)


@pytest.mark.parametrize("pooled", [True, False])   # there
@pytest.mark.parametrize("mean", [True, False])     # and here
def test_a_classifier_starts_from_it(tmp_path, pooled, mean):
    config = transformers.VideoMAEConfig(**VIDEO, use_mean_pooling=pooled)
    theirs = made(transformers.VideoMAEForPreTraining, config)
    theirs.save_pretrained(tmp_path)
    found = vfm_lab.load(tmp_path, "videomae_vit_small_patch16", **NAMED, num_classes=3, mean_pooling=mean)
    norm, clip = ["norm.weight", "norm.bias"], torch.randn(2, 3, 4, 32, 32)
    assert set(norm) & set(found.report.fresh) == (set(norm) if pooled and not mean else set())
    with torch.no_grad():
        seen = theirs.videomae(clip.transpose(1, 2)).last_hidden_state
        ours = found.model.forward_features(clip)
        if mean and not pooled: ours = theirs.videomae.layernorm(ours)      # it stays behind
        if pooled and not mean: seen = torch.nn.functional.layer_norm(seen, (32,), eps=1e-12)   # it is new
        torch.testing.assert_close(ours, seen, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"layer_norm_eps": 0.01, "hidden_act": "gelu"}], ids=str)
def test_a_clip(tmp_path, more):
    text = dict(TINY, **more, vocab_size=40, max_position_embeddings=12, eos_token_id=39, bos_token_id=38)
    vision = dict(TINY, **more, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    theirs = made(transformers.CLIPModel, config)
    found = folder(theirs, tmp_path, False)
    ids, image = torch.tensor([[38, 5, 7, 39], [38, 9, 39, 39]]), torch.randn(2, 3, 32, 32)
    assert isinstance(found.model, CLIP) and found.report.clean and found.spec.stats == "clip"
    with torch.no_grad():
        said = theirs(input_ids=ids, pixel_values=image)
        seen, read = found.model.vision(image), found.model.text(ids)
    torch.testing.assert_close(torch.nn.functional.normalize(seen, dim=-1), said.image_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(read, dim=-1), said.text_embeds)


def test_a_bert(tmp_path):
    config = transformers.BertConfig(**TINY, vocab_size=40, max_position_embeddings=12)
    theirs = made(transformers.BertModel, config)
    found = folder(theirs, tmp_path, False)
    ids, mask = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    assert isinstance(found.model, BERT) and found.report.clean
    with torch.no_grad():
        said = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        ours = found.model.encode(found.model.embed(ids), mask)
    torch.testing.assert_close(ours[mask], said[mask])
