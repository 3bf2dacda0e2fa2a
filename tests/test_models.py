"""Every registered model at a tiny size: what a user of timm, of torch.compile, of an exporter expects of it.

A GPU is not needed: torch's FakeTensorMode plays one, and stops where a step would make the host wait.
"""
import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import is_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vfm_lab.models.internvideo
import vfm_lab.models.umt  # noqa: F401
from vfm_lab.inputs import STATS
from vfm_lab.models.clip import CLIP, CLIPText, CLIPVision
from vfm_lab.models.internvideo import CoupledTowers, VideoText
from vfm_lab.models.umt import UMT, UMTStudent
from vfm_lab.models.uniformerv2 import UniFormerV2
from vfm_lab.models.videomae import VideoMAE, VideoMAEClassifier
from vfm_lab.nn.vit import Encoder

SIZE = dict(image_size=32, dim=48, heads=3, depth=2)
SMALL = dict(SIZE, patch=8)
UNI = dict(num_classes=5, frames=4, global_layers=(0, 1), drop=0.0)
TEXT = dict(vocab=20, context=8, dim=48, depth=2, heads=3, out_dim=24)
DECODER = dict(decoder_dim=24, decoder_depth=2, decoder_heads=2)
CAPTIONS = dict(vocab=20, dim=48, kv_dim=48, depth=1, heads=2, head_dim=16, queries=5)
OTHERS = [n for n in timm.list_models() if "vfm_lab" in timm.model_entrypoint(n).__module__]
SPECIAL = {  # arguments beside those of `tiny`
    "umt_vit": dict(num_classes=5, frames=4), "umt_pretrain": dict(frames=4, teacher_dim=24, layers=2),
    "videomae_vit": dict(num_classes=5, frames=8),
    "videomae_pretrain": dict(frames=8, mask_ratio=0.5, **DECODER),
    "uniformerv2": UNI}


def kind(name): return next(k for k in SPECIAL if name.startswith(k))


def tiny(name):
    "A registered model, small, with weights that are nowhere zero."
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **SPECIAL[kind(name)])
    return filled(model).eval()


def filled(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def clips(model, batch=2, seed=0):
    spec = model.input_spec
    shape = (batch, 3, spec.frames, spec.size, spec.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model, clip):
    "An answer that all parameters take part in."
    if isinstance(model, UMTStudent):
        mask = torch.zeros(clip.shape[0], 64, dtype=torch.bool)
        mask[:, ::2] = True
        return model(clip, mask)
    if isinstance(model, VideoMAE):
        mask = torch.arange(64)[None].expand(clip.shape[0], -1) % 2 == 0
        return model.loss(clip, mask, ~mask)
    return model(clip)


def near(a, b, tol=1e-5): return (a - b).abs().max() <= tol * b.abs().max()


CLASSIFIERS = [n for n in OTHERS if "pretrain" not in n]
every = pytest.mark.parametrize("name", OTHERS)
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)
KINDS = ["umt_vit_base_patch16", "videomae_vit_base_patch16", "uniformerv2_base_patch16",
         "uniformerv2_base_patch16_ssv2"]   # at this size all other names are one of these


def test_all_names_are_there():
    same = ("drop_path", "global_drop_path", "num_classes", "mlp_ratio")
    kinds = {name: {k: v for k, v in tiny(name).config.items() if k not in same} for name in CLASSIFIERS}
    assert all(any(kinds[n] == kinds[k] for k in KINDS) for n in CLASSIFIERS)
    assert len(OTHERS) == 19 and all(map(is_model, OTHERS)) and {kind(n) for n in OTHERS} == set(SPECIAL)


@every
def test_forward_and_a_gradient_in_every_parameter(name):
    model = tiny(name)
    out = call(model, clips(model))
    assert out.isfinite().all()
    out.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == [n for n in without if n.endswith("attn.kv.bias")]   # a shift of keys does nothing


@every
def test_spec_is_the_input_and_timm_reads_it(name):
    model = tiny(name)
    spec, cfg = model.input_spec, model.default_cfg
    assert cfg["input_size"] == (3, spec.frames, spec.size, spec.size) and spec.size == 32
    assert (cfg["mean"], cfg["std"]) == STATS[spec.stats] and cfg["num_classes"] == model.num_classes
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv3d)
    wanted = {"umt_vit": ("imagenet", "sparse"), "umt_pretrain": ("imagenet", "sparse"),
              "videomae_vit": ("imagenet", "dense"), "videomae_pretrain": ("imagenet", "dense"),
              "uniformerv2": ("half", "sparse")}[kind(name)]
    assert (spec.stats, spec.sampling) == wanted
    with torch.no_grad(): call(model, clips(model))
    with pytest.raises(ValueError): call(model, clips(model)[..., :24, :24])


@every
def test_names_of_parameters(name):
    model = tiny(name)
    names = [n for n, _ in model.named_parameters()]
    groups = model.layer_groups()
    assert sorted(sum(groups, [])) == sorted(names) and len(groups) == 4 and all(groups)
    assert any("patch_embed" in n for n in groups[0]) and all("blocks.1." in n for n in groups[2])
    assert any("head" in n or "decoder" in n for n in groups[-1])
    still = model.no_weight_decay()
    assert still <= set(names)
    tables = {n for n, p in model.named_parameters() if n.endswith(("_token", "pos_embed", "balance"))}
    assert tables <= still


@every_classifier
def test_features_then_head(name):
    model = tiny(name)
    with torch.no_grad():
        clip = clips(model)
        tokens, kept = model.forward_intermediates(clip, [0, -1])
        features = model.forward_features(clip)
        vector = model.forward_head(features, pre_logits=True)
        out = model(clip)
        assert torch.equal(model.forward_head(features), out)
        assert near(model.get_classifier()(vector), out, 1e-6)
        alone = model.forward_intermediates(clip, [0], intermediates_only=True)
        assert torch.equal(alone[0], kept[0]) and len(kept) == 2
        patches = tokens if tokens.ndim == 3 else tokens[:, :, 1:].flatten(1, 2)
        assert torch.equal(features[:, model.num_prefix_tokens:], patches)
        assert features.shape[-1] == vector.shape[-1] == model.num_features == 48
        with pytest.raises(ValueError): model.forward_intermediates(clip, [3])


@every_classifier
def test_the_head_can_go_and_come_back(name):
    model = tiny(name)
    clip = clips(model)
    with torch.no_grad():
        vector = model.forward_head(model.forward_features(clip), pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(clip), vector) and model.default_cfg["num_classes"] == 0
        assert not [n for n, _ in model.named_parameters() if n.startswith("head.")]
        model.reset_classifier(7)
        assert model(clip).shape == (2, 7) and model.config["num_classes"] == 7
    bare = timm.create_model(name, **SMALL, **SPECIAL[kind(name)] | {"num_classes": 0}).eval()
    assert bare(clip).shape == (2, 48)
    bare.reset_classifier(3)
    assert bare(clip).shape == (2, 3)


@every
def test_save_load_copy_and_pickle(name, tmp_path):
    model = tiny(name)
    clip = clips(model)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    again = type(model)(**model.config).eval()
    again.load_state_dict(load_file(tmp_path / "m.safetensors"))
    with torch.no_grad():
        wanted = call(model, clip)
        others = (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))  # noqa: S301
        for other in others: assert torch.equal(call(other, clip), wanted)


@every
def test_built_without_memory(name):
    model = tiny(name)
    with torch.device("meta"): empty = timm.create_model(name, **SMALL, **SPECIAL[kind(name)]).eval()
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(call(empty, clips(model)), call(model, clips(model)))


@every
def test_half_precision(name):
    model = tiny(name)
    with torch.no_grad():
        wanted, half = call(model, clips(model)), copy.deepcopy(model).bfloat16()
        assert near(call(half, clips(model).bfloat16()).float(), wanted, 0.25)
        with torch.autocast("cpu", torch.bfloat16): assert near(call(model, clips(model)).float(), wanted, 0.25)


@every
def test_checkpointing_changes_nothing(name):
    model, clip = tiny(name), clips(tiny(name))
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        out = call(model, clip)
        out.square().mean().backward()
        grads.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert any(getattr(m, "grad_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("name", KINDS)
def test_compile_export_and_trace(name):
    model = tiny(name)
    clip, more = clips(model), clips(model, 5, seed=2)
    with torch.no_grad():
        wanted = model(more)
        torch._dynamo.reset()
        assert near(torch.compile(model, backend="eager", fullgraph=True)(more), wanted, 1e-6)
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, (clip,), dynamic_shapes=({0: batch},)).module()
        assert near(exported(more), wanted, 1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # sizes become constants: meant
            assert near(torch.jit.trace(model, (clip,))(more), wanted, 1e-6)


# ---- a GPU that is only played


def fitting(grad, node, place):
    "In the shape and type of what the node gave, as autograd's engine sees to it."
    given = node.variable if hasattr(node, "variable") else node._input_metadata[place]
    return grad.sum_to_size(given.shape).to(given.dtype)


def backward(loss):
    """The gradient, node by node.

    Autograd's own engine asks a driver for the streams of a device; the nodes themselves do not."""
    order, seen, waiting = [], set(), [(loss.grad_fn, False)]
    while waiting:
        node, done = waiting.pop()
        if done: order.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(n, False) for n, _ in node.next_functions if n is not None]
    sums = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in reversed(order):
        given = sums.pop(node, None)
        if given is None: continue
        out = node(*given)
        out = out if isinstance(out, tuple) else (out,)
        for grad, (after, place) in zip(out, node.next_functions):
            if after is None or grad is None: continue
            room = 1 if hasattr(after, "variable") else len(after._input_metadata)
            held, grad = sums.setdefault(after, [None] * room), fitting(grad, after, place)
            held[place] = grad if held[place] is None else held[place] + grad


WAYS = {  # of pre-training: how it is built, frames
    **{f"umt {m}": (lambda m=m: UMT(UMTStudent(24, 2, frames=4, **SMALL), CLIPVision(**SMALL, out_dim=24), 0.5, m), 4)
       for m in ("attention", "random", "tube")},
    **{f"videomae {m}": (lambda m=m: VideoMAE(0.5, m, frames=8, **DECODER, **SMALL), 8)
       for m in ("running_cell", "random", "frame", None)},
    "video text": (lambda: VideoText({**SMALL, **UNI, "num_classes": 0}, TEXT, CAPTIONS), 4)}


@pytest.fixture
def mixed(request):
    "Autocast on a device that is not there: the context manager would switch it off."
    torch.set_autocast_enabled("cuda", request.param is not None)
    if request.param: torch.set_autocast_dtype("cuda", request.param)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("mixed", [None, torch.bfloat16, torch.float16], indirect=True)
@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_never_waits_for_the_device(way, seeds, mixed):
    make, frames = WAYS[way]
    with FakeTensorMode():
        with torch.device("cuda"): model = make().train()
        batch = {"clip": torch.randn(2, 3, frames, 32, 32, device="cuda"),
                 "ids": torch.ones(2, 6, dtype=torch.long, device="cuda")}
        if seeds: batch["seed"] = torch.arange(2, device="cuda")
        out = model(batch)
        backward(out["loss"])
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.device.type == "cuda" for p in trained
                   if p is not getattr(model, "mask_embed", None))
        assert all(v.device.type == "cuda" for v in out.values())


@every
def test_forward_on_a_played_device(name):
    with FakeTensorMode():
        with torch.device("cuda"): model = timm.create_model(name, **SMALL, **SPECIAL[kind(name)]).eval()
        spec = model.input_spec
        clip = torch.randn(2, 3, spec.frames, 32, 32, device="cuda")
        with torch.device("cuda"):
            if isinstance(model, UMTStudent): out = model(clip, visible=torch.arange(32).expand(2, -1))
            elif isinstance(model, VideoMAE): out = model({"clip": clip})["loss"]
            else: out = model(clip)
        assert out.device.type == "cuda"


def test_backward_node_by_node_is_autograds():
    model = tiny("uniformerv2_base_patch16")
    grads = []
    for how in (lambda loss: loss.backward(), backward):
        model.zero_grad()
        how(model(clips(model)).square().mean())
        grads.append([p.grad for p in model.parameters()])
    assert all(near(a, b) for a, b in zip(*grads) if a is not None)


# ---- models of two towers, and what has no registered name


TOWERS = {
    "clip vision": lambda: CLIPVision(**SMALL, out_dim=24),
    "clip": lambda: CLIP(CLIPVision(**SMALL, out_dim=24), CLIPText(**TEXT)),
    "umt": lambda: UMT(UMTStudent(24, 2, frames=4, **SMALL), CLIPVision(**SMALL, out_dim=24)),
    "video text": lambda: VideoText({**SMALL, **UNI, "num_classes": 0}, TEXT, CAPTIONS),
    "coupled": lambda: CoupledTowers(VideoMAEClassifier(5, frames=4, **SMALL), UniFormerV2(**SMALL, **UNI), [0, 1], heads=3)}


@pytest.mark.parametrize("name", TOWERS)
def test_two_towers_answer_the_same_questions(name):
    model = TOWERS[name]()
    assert isinstance(model, Encoder)
    names = [n for n, _ in model.named_parameters()]
    groups = model.layer_groups()
    assert sorted(sum(groups, [])) == sorted(names) and len(groups) == 4
    assert model.no_weight_decay() <= set(names) and model.num_features == 48
    stats = {"clip vision": "clip", "clip": "clip", "video text": "clip"}.get(name, "imagenet")
    spec = model.input_spec
    assert (spec.size, spec.stats) == (32, stats)
    assert spec.frames == (1 if stats == "clip" and name != "video text" else 4)
    assert model.default_cfg["input_size"] == (3, spec.frames, 32, 32)
    model.set_grad_checkpointing()
    towers = [m for m in model.modules() if getattr(m, "grad_checkpointing", False)]
    assert len(towers) >= 1


def test_a_clip_tower_reads_clips():
    tower = filled(CLIPVision(**SMALL, out_dim=24)).eval()
    clip = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        frames = torch.stack([tower(clip[:, :, i]) for i in range(3)])
        assert near(tower(clip), frames.mean(0))
        features = tower.forward_features(clip)
        assert features.shape == (2, 3 + 3 * 16, 48) and torch.equal(tower.forward_head(features), tower(clip))
        tower.reset_classifier(0)
        assert torch.equal(tower(clip), features[:, :3].mean(1))


def test_onnx_if_there_is_an_exporter():
    pytest.importorskip("onnxscript")
    model = tiny("umt_vit_base_patch16")
    torch.onnx.export(model, (clips(model),), io.BytesIO(), dynamo=True)
