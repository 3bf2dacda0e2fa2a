"""Layers in the hands of other tools: adapters, hooks, int8, empty memory, export, wrong clips."""
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from vfm_lab.models.clip import CLIPText, CLIPVision
from vfm_lab.models.internvideo import CoupledTowers, VideoText
from vfm_lab.models.umt import UMT, UMTClassifier, UMTStudent
from vfm_lab.models.uniformerv2 import UniFormerV2
from vfm_lab.models.videomae import MaskedAutoencoder, VideoMAE, VideoMAEClassifier
from vfm_lab.nn.attention import Attention, CosineAttention, CrossAttention
from vfm_lab.nn.blocks import Block
from vfm_lab.nn.vit import VideoViT
from vfm_lab.objectives.reconstruction import pixel_cubes
from vfm_lab.tokens.masking import tube_mask
from vfm_lab.tokens.patching import TubeletEmbed, check_clip, is_plain, token_grid, visible_indices
from vfm_lab.tokens.positions import FixedPositions, resize_positions, sincos_1d

SIZE = dict(image_size=32, patch=8, dim=48, heads=3, depth=3)
VISION = dict(SIZE, out_dim=24)
UNI = dict(SIZE, frames=4, global_layers=(1, 2), num_classes=5, drop=0.0)
TEXT = dict(vocab=20, context=8, dim=48, depth=2, heads=3, out_dim=24)
DECODER = dict(decoder_dim=24, decoder_depth=2, decoder_heads=2)
CAPTIONS = dict(vocab=20, dim=48, kv_dim=48, depth=1, heads=2, head_dim=16, queries=5)
IDS = torch.tensor([[1, 5, 19, 0], [1, 3, 4, 19]])


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def clips(frames=4, batch=2): return torch.randn(batch, 3, frames, 32, 32, generator=seeded(7))
def hidden(): return tube_mask(2, (4, 4, 4), 0.5, generator=seeded(3))
def pretrain(): return {"clip": clips(8), "seed": torch.tensor([1, 2])}
def mae(**more): return VideoMAE(0.5, frames=8, tubelet=2, **DECODER, **SIZE, **more)
def towers(): return VideoMAEClassifier(5, frames=4, **SIZE), UniFormerV2(**UNI)


MODELS = {  # name: how it is built, how it is called
    "umt": (lambda: UMTClassifier(5, frames=4, **SIZE), lambda m: m(clips())),
    "umt student": (lambda: UMTStudent(24, 2, frames=4, **SIZE), lambda m: m(clips(), hidden())),
    "videomae": (lambda: VideoMAEClassifier(5, frames=8, **SIZE), lambda m: m(clips(8))),
    "videomae resized": (lambda: VideoMAEClassifier(5, [8, 14, 14], frames=8, **SIZE),
                         lambda m: m(clips(8))),
    "videomae pretraining": (mae, lambda m: m(pretrain())["loss"]),
    "videomae cosine": (lambda: mae(cosine=True, layer_scale=0.1), lambda m: m(pretrain())["loss"]),
    "videomae qkv": (lambda: mae(bias="qkv"), lambda m: m(pretrain())["loss"]),
    "uniformerv2": (lambda: UniFormerV2(**UNI), lambda m: m(clips())),
    "uniformerv2 local": (lambda: UniFormerV2(local="double", temporal_down=True, **UNI),
                          lambda m: m(clips())),
    "uniformerv2 queries": (lambda: UniFormerV2(fusion="hierarchical_q", **UNI),
                            lambda m: m(clips())),
    "clip vision": (lambda: CLIPVision(**VISION), lambda m: m(clips(1)[:, :, 0])),
    "clip teacher": (lambda: CLIPVision(**VISION), lambda m: m.teacher_features(clips(), 2)[0]),
    "clip text": (lambda: CLIPText(**TEXT), lambda m: m(IDS)),
    "video text": (lambda: VideoText({**UNI, "num_classes": 0}, TEXT, CAPTIONS),
                   lambda m: m({"clip": clips(), "ids": IDS})["loss"]),
    "coupled towers": (lambda: CoupledTowers(*towers(), [0, 1], heads=3), lambda m: m(clips())),
}
TARGETS = ["qkv", "q", "kv", "proj", "fc1", "fc2", "patch_embed.proj"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def build(name):
    "The model with weights that are nowhere zero, and its call."
    make, call = MODELS[name]
    torch.manual_seed(0)
    model, g = make().eval(), seeded()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model, call


def layers(model):
    "Linear layers and convolutions, by name."
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def pickled(model): return pickle.loads(pickle.dumps(model))  # noqa: S301


def near(a, b, tol=1e-5): return (a - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", [*TARGETS, "all"])
def test_lora_trains_and_can_be_merged(name, target):
    peft = pytest.importorskip("peft")
    (model, call), wanted = build(name), TARGETS if target == "all" else [target]
    found = [n for n in layers(model) if any(f".{n}".endswith(f".{t}") for t in wanted)]
    if not found: return
    before = call(model).detach()
    config = peft.LoraConfig(r=2, target_modules=wanted, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    parts = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    after = call(adapted.base_model.model)
    after.square().mean().backward()
    assert len(parts) == 2 * len(found)
    assert not [n for n, p in parts.items() if p.grad is None or not p.grad.any()]
    assert (after - before).abs().max() > 1e-6 * before.abs().max()
    assert near(call(adapted.merge_and_unload()), after)


@pytest.mark.parametrize("name", MODELS)
def test_a_hook_on_every_layer_fires_once_and_the_answer_stays(name):
    model, call = build(name)
    before, count, found = call(model).detach(), {}, layers(model)
    for n, layer in found.items():
        def count_it(*_, n=n): count[n] = count.get(n, 0) + 1
        layer.register_forward_hook(count_it)
    assert near(call(model), before) and count == dict.fromkeys(found, 1)


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_hook",
                                  "register_full_backward_pre_hook"])
def test_every_kind_of_hook_counts(kind):
    torch.manual_seed(0)
    chosen = torch.tensor([[0, 3], [1, 2]])
    for layer, name, call in ((Attention(48, 3), "qkv", lambda m, x: m(x, queries=2)),
                              (CrossAttention(48, 3), "kv", lambda m, x: m(x[:, :1], x)),
                              (TubeletEmbed(48, 8), "proj", lambda m, x: m(clips(), chosen))):
        inner, fired = getattr(layer, name), []
        getattr(inner, kind)(lambda *_, fired=fired: fired.append(1))
        call(layer, torch.randn(2, 6, 48, requires_grad=True)).sum().backward()
        assert len(fired) == 1


@pytest.mark.parametrize("name", MODELS)
def test_int8_linear_layers_run_and_are_near(name):
    model, call = build(name)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad(): a, b = call(model), call(quantized)
    assert not [m for m in quantized.modules() if type(m) is nn.Linear]
    assert a.numel() == 1 or F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
    assert near(b, a, 0.5)


@pytest.mark.parametrize("how", ["new weight norm", "old weight norm", "pruning", "own forward"])
@pytest.mark.parametrize("name", ["umt student", "videomae pretraining", "uniformerv2",
                                  "clip teacher"])
def test_a_layer_that_became_something_else_is_called(name, how):
    model, call = build(name)
    plain, found = copy.deepcopy(model), layers(model)
    targets = [n for n in found if n.endswith(("qkv", "kv", "patch_embed.proj"))]
    for n in targets:
        layer = found[n]
        if how == "new weight norm":
            parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0.data *= 2           # the lengths of the rows
        if how == "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weight_norm(layer)
            layer.weight_g.data *= 2
        if how == "pruning":
            prune.random_unstructured(layer, "weight", 0.5)
            layer.weight_mask.fill_(2)
        if how == "own forward":                                        # as offloading does it
            def twice(x, layer=layer):
                bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * 3 * (x.ndim == 5))
                return 2 * type(layer).forward(layer, x) - bias
            layer.forward = twice
    for n in targets: plain.get_submodule(n).weight.data *= 2
    assert not any(is_plain(found[n]) for n in targets)
    assert near(call(model), call(plain))


@pytest.mark.parametrize("name", ["umt", "umt student", "videomae pretraining", "uniformerv2"])
def test_weights_that_wait_on_the_cpu_are_fetched(name):
    from accelerate import cpu_offload
    model, call = build(name)
    with torch.no_grad():
        before = call(model)
        waiting = cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in waiting.parameters())
        assert near(call(waiting), before)


def test_what_is_plain():
    assert is_plain(nn.Linear(2, 2)) and is_plain(nn.Conv3d(1, 1, 1))
    assert is_plain(nn.Linear(2, 2).half())
    class Mine(nn.Linear): pass
    shared = nn.Linear(2, 2)
    shared.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    many = nn.Sequential(nn.Linear(2, 2))
    for other in (Mine(2, 2), nn.Identity(), many, nn.LazyLinear(2), shared):
        assert not is_plain(other)


@pytest.mark.parametrize("bias", ["qv", "qkv", "none"])
def test_plain_attention_is_the_formula_to_the_last_bit(bias):
    torch.manual_seed(0)
    layer, x = Attention(48, 3, bias), torch.randn(2, 7, 48)
    for p in layer.parameters(): nn.init.normal_(p, std=0.2)
    b = {"qkv": layer.qkv.bias, "none": None}.get(bias, 0)
    if bias == "qv": b = torch.cat([layer.q_bias, torch.zeros(48), layer.v_bias])
    q, k, v = F.linear(x, layer.qkv.weight, b).view(2, 7, 3, 3, 16).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(layer(x), F.linear(y, layer.proj.weight, layer.proj.bias))
    last = F.linear(x[:, -2:], layer.qkv.weight[:48], None if b is None else b[:48])
    y = F.scaled_dot_product_attention(last.view(2, 2, 3, 16).transpose(1, 2), k, v)
    assert near(layer(x, queries=2), layer.proj(y.transpose(1, 2).flatten(2)))


def test_plain_patches_are_the_matrix_product_to_the_last_bit():
    embed, clip, chosen = TubeletEmbed(48, 8, 2), clips(), torch.tensor([[0, 5, 31], [7, 8, 9]])
    boxes = clip.unflatten(2, (2, 2)).unflatten(4, (4, 8)).unflatten(6, (4, 8))  # b c t u h p w q
    rows = boxes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)        # (B, N, C·u·p·q)
    whole = F.linear(rows, embed.proj.weight.flatten(1), embed.proj.bias)
    assert torch.equal(embed(clip), whole)
    assert near(embed(clip, chosen), whole[torch.arange(2)[:, None], chosen])


def flops(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad(): call()
    return counter.get_total_flops()


def test_a_plain_layer_still_saves_what_nobody_asks_for():
    x, D = torch.randn(1, 100, 48), 48
    attention, cross, embed = Attention(48, 3), CrossAttention(48, 3), TubeletEmbed(48, 8)
    asked = flops(lambda: attention(x, queries=4))                # the fused kernel counts 0
    assert asked == 2 * (4 + 2 * 100 + 4) * D * D                          # q; k, v; proj
    assert flops(lambda: cross(x[:, :1], x)) == 2 * 4 * D * D       # q, W_k q, W_v mean, proj
    assert flops(lambda: embed(clips(), torch.zeros(2, 5, dtype=torch.long))) == 2 * 2 * 5 * D * 192
    attention.qkv.register_forward_hook(lambda *_: None)
    assert flops(lambda: attention(x, queries=4)) == 2 * (3 * 100 + 4) * D * D


def test_half_precision_and_autocast_work_on_the_called_road():
    layer, x = Attention(48, 3), torch.randn(2, 6, 48)
    nn.init.normal_(layer.q_bias)
    plain = layer(x)
    layer.qkv.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert near(layer(x).float(), plain, 0.05)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# ---- tables of positions


TABLES = {
    "encoder": (lambda: VideoViT(32, 8, 4, dim=48, depth=1, heads=3), sincos_1d(64, 48)),
    "umt": (lambda: UMTClassifier(5, frames=4, **SIZE),
            resize_positions(sincos_1d(1568, 48), (8, 14, 14), (4, 4, 4))),
    "umt native": (lambda: UMTClassifier(0, **dict(SIZE, image_size=112), frames=8),
                   sincos_1d(1568, 48)),
    "videomae": (lambda: VideoMAEClassifier(5, frames=8, **SIZE), sincos_1d(64, 48)),
    "resized": (lambda: VideoMAEClassifier(5, pretrained_grid=(2, 4, 4), frames=8, **SIZE),
                resize_positions(sincos_1d(32, 48), (2, 4, 4), (4, 4, 4))),
    "decoder": (lambda: MaskedAutoencoder(frames=8, **DECODER, **SIZE), sincos_1d(64, 24)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_right_after_every_move(name):
    make, table = TABLES[name]
    with torch.device("meta"): model = make()
    assert model.pos.is_meta and torch.equal(make().pos, table)
    assert torch.equal(model.to_empty(device="cpu").pos, table)
    assert torch.equal(model.half().pos, table.half()) and "pos" not in model.state_dict()
    assert not any("pos" == k.split(".")[-1] for k in model.state_dict())
    for move in (copy.deepcopy, pickled, lambda m: m.share_memory(),
                 lambda m: m.to_empty(device="cpu"),
                 lambda m: m.to(memory_format=torch.channels_last_3d)):
        model = move(make())
        assert torch.equal(model.pos, table)
        assert model.double().pos.dtype == torch.float64 and torch.equal(model.pos, table.double())
    assert make().to("meta").pos.is_meta


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("road", ["copied", "assigned to new memory", "assigned"])
def test_a_model_built_without_memory_gives_the_right_answer(name, road):
    model, call = build(name)
    with torch.device("meta"): empty = MODELS[name][0]().eval()
    if road != "assigned": empty.to_empty(device="cpu")
    state = copy.deepcopy(model.state_dict())
    empty.load_state_dict(state, assign=road != "copied")
    with torch.no_grad(): assert torch.equal(call(empty), call(model))
    without_key = {n for n, _ in model.named_buffers()} - set(model.state_dict())
    fixed = [n for n, m in model.named_modules() if isinstance(m, FixedPositions)]
    tables = {f"{n}.pos".lstrip(".") for n in fixed}
    assert without_key == tables                          # no other tensor that a file leaves out


def test_a_table_put_in_by_hand_moves_along():
    table = torch.randn(64, 48, generator=seeded(1))
    net = VideoViT(32, 8, 4, dim=48, depth=1, heads=3)
    net.pos = table
    for move in (copy.deepcopy, lambda m: m.to_empty(device="cpu"), lambda m: m.double().float(),
                 pickled):
        net = move(net)
        assert torch.equal(net.pos, table) and "pos" not in net.state_dict()
    net.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(net.pos, table)
    net.register_buffer("pos", table)                             # now kept in files
    empty = copy.deepcopy(net).to_empty(device="cpu")
    assert torch.equal(empty.pos, table) and "pos" in empty.state_dict()
    net.pos = nn.Parameter(table)                                 # and trained
    assert "pos" in net.state_dict() and net.half().pos.dtype == torch.float16


# ---- export


@pytest.mark.parametrize("name", ["umt", "videomae", "videomae resized", "clip vision", "clip text",
                                  "uniformerv2", "uniformerv2 local", "uniformerv2 queries"])
def test_an_export_keeps_the_batch_open(name):
    model, _ = build(name)
    x = clips(8 if "videomae" in name else 4)
    if name == "clip vision": x = x[:, :, 0].contiguous()
    if name == "clip text": x = IDS
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    more = x.repeat(3, *[1] * (x.ndim - 1))[:5]
    with torch.no_grad(): assert near(exported(more), model(more), 1e-6)


@pytest.mark.parametrize("name", ["umt", "umt student", "videomae", "uniformerv2", "clip vision"])
def test_compile_finds_no_break(name):
    model, call = build(name)
    whole = torch.compile(model, fullgraph=name != "umt student", backend="eager")
    with torch.no_grad(): assert near(call(whole), call(model), 1e-6)


def test_cross_attention_takes_any_mask_on_both_roads():
    torch.manual_seed(0)
    cross, x, y = CrossAttention(48, 3), torch.randn(2, 2, 48), torch.randn(2, 9, 48)
    masks = [torch.arange(9)[None] < 5, torch.rand(2, 1, 1, 9) < 0.7, torch.rand(2, 3, 2, 9) < 0.7]
    for m in masks: m[..., 0] = True
    short = [cross(x, y, m) for m in (None, *masks)]
    cross.kv.register_forward_hook(lambda *_: None)
    for a, m in zip(short, (None, *masks)): assert near(cross(x, y, m), a)


# ---- clips that are none


@pytest.mark.parametrize("name", ["umt", "videomae", "uniformerv2", "uniformerv2 local"])
def test_frames_first_and_no_clips_are_refused(name):
    model, _ = build(name)
    clip = clips(8 if "videomae" in name else 4)
    for wrong in (clip.transpose(1, 2), clip[:0]):
        with pytest.raises(ValueError, match="channels before frames"): model(wrong)
    with pytest.raises(ValueError): model(clip[0])
    with pytest.raises(ValueError): model(clip[:, :, :0])


def test_pretraining_and_towers_refuse_them_too():
    model, student = build("videomae pretraining")[0], build("umt student")[0]
    with pytest.raises(ValueError): model({"clip": clips(8)[:0]})
    swapped, said = clips(8).transpose(1, 2), "channels before frames"
    with pytest.raises(ValueError, match=said): model({"clip": swapped})
    with pytest.raises(ValueError, match=said): student(swapped, hidden())
    umt = UMT(student, build("clip vision")[0], 0.5)
    with pytest.raises(ValueError, match=said): umt({"clip": swapped})
    for wrong in (torch.ones(2, 64, dtype=torch.bool), torch.zeros(0, 64, dtype=torch.bool)):
        with pytest.raises(ValueError, match="leave some visible"): visible_indices(wrong)
    for grid in ((0, (32, 32)), (4, (0, 32)), (4, (32, 30))):
        with pytest.raises(ValueError, match="does not divide"): token_grid(*grid, 8)
    check_clip(clips()), check_clip(clips()[:, :1], 1)


def test_cosine_attention_on_the_called_road():
    torch.manual_seed(0)
    layer, x = CosineAttention(48, 3), torch.randn(2, 6, 48)
    wanted = layer(x, queries=2), layer(x)
    layer.qkv.register_forward_pre_hook(lambda *_: None)
    assert near(layer(x, queries=2), wanted[0]) and near(layer(x), wanted[1])


@pytest.mark.parametrize("name", ["umt", "videomae", "uniformerv2", "clip vision", "clip text"])
def test_a_trace_keeps_the_batch_open(name):
    model, _ = build(name)
    x = IDS if name == "clip text" else clips(8 if name == "videomae" else 4)
    if name == "clip vision": x = x[:, :, 0]
    more = x.repeat(3, *[1] * (x.ndim - 1))[:5]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")              # sizes become constants: meant
        traced = torch.jit.trace(model, (x,))
        assert near(traced(more), model(more), 1e-6)


def test_weights_given_for_one_call_are_used():
    model, call = build("umt")
    other = {n: 2 * p.detach() for n, p in model.named_parameters()}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(other)
    given = torch.func.functional_call(model, other, (clips(),))
    assert near(given, call(wanted))
    one_each = torch.vmap(lambda clip: torch.func.functional_call(model, other, (clip[None],))[0])
    assert near(one_each(clips()), given)


@pytest.mark.parametrize("bad", [dict(mlp_ratio=0), dict(mlp_ratio=-1), dict(layer_scale=-1e-5)])
def test_blocks_that_cannot_be(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Block(8, 2, **bad)


def test_unknown_statistics_are_named():
    with pytest.raises(ValueError, match="no statistics named 'nope': .*imagenet"):
        pixel_cubes(torch.rand(1, 3, 2, 8, 8), 4, 2, "nope")
