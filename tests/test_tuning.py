"Frozen parts: which they are, that they stay still, and what is stored of the rest. peft is the yardstick."

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vfm_lab.nn.text import PostNormBlock
from vfm_lab.nn.tuning import (base_hash, freeze, frozen_parts, keep_eval, load_trained, release, save_trained,
                               trained, trained_state)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return 2 * torch.randn(32, 6, generator=torch.Generator().manual_seed(1)) + 3


def step(model, x):
    "One training step with weight decay, as a loop would do it."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    return model


def test_a_frozen_body_keeps_its_statistics_and_its_features(net, x):
    freeze(net, ["^head"])
    before, whole = net.body(x).clone(), copy.deepcopy(net.state_dict())
    for _ in range(3):
        step(net, x)
    assert not net.body.training and net.drop.training and net.head.training
    assert torch.equal(net.body(x), before)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, whole[k])}
    assert changed == {"head.weight", "head.bias"} == set(trained_state(net))


def test_what_learns_is_all_that_changes(net, x):
    freeze(net, ["^head", r"body\.4"])
    whole = copy.deepcopy(net.state_dict())
    step(net, x)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, whole[k])}
    assert changed == set(trained_state(net))                     # statistics of the norm that learns, too
    assert {"body.4.running_mean", "body.4.num_batches_tracked"} <= changed
    assert not net.body[1].training and net.body[4].training and net.body[2].training


def test_frozen_by_hand_and_not_kept_is_stored_with_its_statistics(net, x):
    net.body.requires_grad_(False)
    whole = copy.deepcopy(net.state_dict())
    step(net, x)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, whole[k])}
    assert changed <= set(trained_state(net))


def test_owners_with_a_teacher(net, x):
    class Owner(nn.Module):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.teacher = student, teacher.requires_grad_(False)
            keep_eval(teacher)

    owner = nn.Sequential(Owner(copy.deepcopy(net), net))
    for mode in (True, False, True):
        owner.train(mode)
        assert owner[0].student.training is mode and not any(m.training for m in net.modules())
    net.train()
    assert not net.training
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), net(x))
    release(owner)
    assert all(m.training for m in owner.modules())


def test_copies_and_pickles_keep_their_own_parts(net, x):
    freeze(net, ["^head"])
    stored = io.BytesIO()
    torch.save(net, stored)
    stored.seek(0)
    others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stored, weights_only=False)]  # noqa: S301
    for other in others:
        other.train()
        assert other.head.training and not other.body.training and other.body.train.args[0] is other.body
        release(other)
        assert other.body.training and not net.train().body.training


def test_a_class_with_a_train_of_its_own():
    class Own(nn.Linear):
        def train(self, mode=True):
            self.asked = mode
            return super().train(mode)

    part = Own(2, 2)
    keep_eval(part)
    nn.Sequential(part).train()
    assert part.asked is False and not part.training


def test_a_second_call_starts_anew(net):
    freeze(net, ["^head"])
    net.train()
    said = freeze(net, [r"body\.0"])
    assert list(said.sizes) == ["body.0.weight", "body.0.bias"]
    assert not net.head.train().training and net.body[0].training and not net.body[1].training
    assert freeze(net).sizes == {} and list(frozen_parts(net)) == [""] and not net.train().training
    assert len(freeze(net, ".").sizes) == 10 and all(m.training for m in net.train().modules())


def test_shared_parameters_learn_under_any_of_their_names():
    model = nn.Module()
    model.table, model.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    model.out.weight = model.table.weight
    assert sum(freeze(model, ["^out"]).sizes.values()) == 20 and model.table.weight.requires_grad
    assert set(trained_state(model)) == {"table.weight", "out.weight"}


@pytest.mark.parametrize("patterns, said", [(["hed"], "'hed'"), (["head", r"adapter\."], "adapter"), (["("], "regular expression")])
def test_patterns_that_cannot_be_meant(net, patterns, said):
    with pytest.raises(ValueError, match=said):
        freeze(net, patterns)
    assert all(p.requires_grad for p in net.parameters())           # nothing has changed


def test_the_list():
    said = str(freeze(nn.Sequential(*[PostNormBlock(8, 2, 16) for _ in range(12)]), [r"norm\d\.weight"]))
    assert said.splitlines()[0].startswith("24 of 144 parameters learn: 192 of")
    assert [line.split() for line in said.splitlines()[1:]] == [[f"*.norm{n}.weight", "12", "×", "96"] for n in (1, 2)]


def test_files(net, x, tmp_path):
    freeze(net, ["^head"])
    start = copy.deepcopy(net)
    step(net, x).eval()
    file = tmp_path / "head.safetensors"
    save_trained(net, file)
    assert set(load_file(file)) == {"head.weight", "head.bias"} and file.stat().st_size < 600
    load_trained(start, file)
    assert torch.equal(start.eval()(x), net(x)) and base_hash(start) == base_hash(net)
    for change in ("weight", "running_mean"):
        other = copy.deepcopy(start)
        getattr(other.body[1], change).data[0] += 1e-6
        kept = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="head.safetensors: trained on another base"):
            load_trained(other, file)
        assert all(torch.equal(v, kept[k]) for k, v in other.state_dict().items())
    load_trained(other, trained_state(net))                         # a state has no fingerprint


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda s: s.pop("head.bias"), "missing 1: head.bias"),
        (lambda s: s.update({"body.0.bias": torch.zeros(8)}), "unexpected 1: body.0.bias"),
        (lambda s: s.update({"head.bias": torch.zeros(4)}), r"head.bias: \(4,\) instead of \(3,\)"),
        (lambda s: s.update({"head.bias": torch.full((3,), torch.inf)}), "NaN or infinity"),
    ],
)
def test_states_that_do_not_fit(net, tmp_path, spoil, said):
    freeze(net, ["^head"])
    state, before = trained_state(net), copy.deepcopy(net.state_dict())
    spoil(state)
    save_file(state, tmp_path / "s.safetensors")
    for source in (state, tmp_path / "s.safetensors"):
        with pytest.raises(ValueError, match=said):
            load_trained(net, source)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{bad}   "])
def test_files_that_are_none(net, tmp_path, content):
    freeze(net, ["^head"])
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="s.safetensors: not a safetensors file"):
        load_trained(net, tmp_path / "s.safetensors")


def test_half_precision_of_any_shape():
    model = nn.Module()
    model.low, model.scale = nn.Linear(3, 3, dtype=torch.bfloat16), nn.Parameter(torch.tensor(2.0))
    freeze(model, ["low"])
    assert len(base_hash(model)) == 64
    load_trained(model, {k: v.float() for k, v in trained_state(model).items()})
    assert model.low.weight.dtype == torch.bfloat16


def test_lora_of_peft_gives_the_same_part(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(*[PostNormBlock(16, 2, 32) for _ in range(3)])
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=[])
    model = peft.get_peft_model(base, config)
    learn, whole = model.get_nb_trainable_parameters()
    theirs = peft.get_peft_model_state_dict(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    said = freeze(model, ["lora_"])
    assert set(said.sizes) == names and (sum(said.sizes.values()), said.numbers) == (learn, whole)
    ours = trained_state(model)
    assert {k.replace(".default", "") for k in ours} == set(theirs)
    assert all(torch.equal(v, theirs[k.replace(".default", "")]) for k, v in ours.items())
    save_trained(model, tmp_path / "lora.safetensors")
    model.save_pretrained(tmp_path)
    sizes = [(tmp_path / n).stat().st_size for n in ("lora.safetensors", "adapter_model.safetensors")]
    assert sizes[0] < 1.5 * sizes[1]
    assert trained(model).sizes == said.sizes
