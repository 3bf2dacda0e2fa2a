"Text layers and BERT against transformers' own: every setting of its config, files as it writes them, golden cases."

import copy
import itertools
import json
import pickle

import pytest
import torch

from vfm_lab.models.bert import BERT
from vfm_lab.official.bert import from_official, run_bert, sizes_from_config
from vfm_lab.models.checkpoints import CheckpointError, load_weights, save_weights
from vfm_lab.nn.text import PostNormBlock, may_attend
from vfm_lab.golden import Case, compare

transformers = pytest.importorskip("transformers")
SMALL = dict(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=12,
)


def randomised(model, seed=0):
    "Every parameter random, norms and biases too, so that none of them hides."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    return model.eval()


def official(**settings):
    return randomised(transformers.BertModel(transformers.BertConfig(**SMALL | settings)))


def inputs(types=2):
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return {
        "token_ids": torch.randint(40, (2, 7), generator=g),
        "attention_mask": mask,
        "type_ids": torch.randint(types, (2, 7), generator=g),
    }


def reader():
    g = torch.Generator().manual_seed(2)
    seen = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    return {"context": torch.randn(2, 5, 24, generator=g), "context_mask": seen}


def run_official(model, given):
    "What transformers gives, under the names of a golden case."
    with torch.no_grad():
        out = model(
            given["token_ids"],
            given["attention_mask"],
            token_type_ids=given["type_ids"],
            encoder_hidden_states=given.get("context"),
            encoder_attention_mask=given.get("context_mask"),
            output_hidden_states=True,
        )
    return {
        "last_hidden": out.last_hidden_state,
        "hidden_states": torch.stack(out.hidden_states),
        "pooled": out.pooler_output,
    }


def as_case(model, given, **config):
    about = dict(
        vocab_size=40, embed_dim=24, depth=2, num_heads=3, mlp_dim=40, max_positions=12
    )
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = run_official(model, given)
    return Case("made here", "bert", about | config, weights, given, outputs, 1e-5, 1e-5)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_activation_and_eps(act, eps):
    case = as_case(
        official(hidden_act=act, layer_norm_eps=eps), inputs(), activation=act, ln_eps=eps
    )
    with torch.no_grad():
        assert all(line.met for line in compare(case, run_bert(case)))


@pytest.mark.parametrize("causal, cross", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("types", [1, 2, 3])
def test_causal_cross_attention_and_types(causal, cross, types):
    given = inputs(types) | (reader() if cross else {})
    model = official(is_decoder=causal, add_cross_attention=cross, type_vocab_size=types)
    case = as_case(model, given, causal=causal, cross_attention=cross)
    with torch.no_grad():
        lines = compare(case, run_bert(case))
    assert len(lines) == 3 and all(line.met for line in lines), lines


def test_a_case_without_mask_types_or_pooler():
    model = official()
    given = {"token_ids": inputs()["token_ids"]}
    full = {**given, "attention_mask": None, "type_ids": None}
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("pooler")}
    case = as_case(model, full)
    case.weights, case.inputs = weights, given
    del case.outputs["pooled"]
    with torch.no_grad():
        assert all(line.met for line in compare(case, run_bert(case)))


def test_a_tower_without_types_is_one_whose_types_are_zero():
    model = official(type_vocab_size=1)
    model.embeddings.token_type_embeddings.weight.data.zero_()
    case = as_case(model, {**inputs(1)})
    del case.weights["embeddings.token_type_embeddings.weight"], case.inputs["type_ids"]
    with torch.no_grad():
        assert all(line.met for line in compare(case, run_bert(case)))


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_hugging_face(tmp_path, old):
    model = official(layer_norm_eps=1e-3, hidden_act="relu", is_decoder=True, num_attention_heads=4)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    ours = BERT(**sizes_from_config(about)).eval()
    file = tmp_path / "model.safetensors"
    if old:   # bert-base-uncased as it was uploaded first
        state = {f"bert.{k}": v for k, v in model.state_dict().items()}
        state = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in state.items()}
        file = tmp_path / "pytorch_model.bin"
        torch.save(state | {"bert.embeddings.position_ids": torch.arange(12)[None]}, file)
    report = load_weights(ours, file, from_official)
    assert report.clean and not report.fresh
    given = inputs()
    wanted = run_official(model, given)
    with torch.no_grad():
        got = ours(given["token_ids"], given["attention_mask"], given["type_ids"])
    torch.testing.assert_close(got, wanted["pooled"], atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="num_attention_heads"):   # no shape shows the heads
        load_weights(BERT(**sizes_from_config(about | {"num_attention_heads": 3})), tmp_path / "model.safetensors", from_official)


def test_a_file_of_masked_word_training(tmp_path):
    model = randomised(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    ours = BERT(**sizes_from_config(about), pool="first").eval()
    report = load_weights(ours, tmp_path / "model.safetensors", from_official)
    assert report.dropped and all(k.startswith("cls.") for k in report.dropped)
    ids = inputs()["token_ids"]
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(ours.encode(ours.embed(ids)), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="missing 2: pool.dense"):
        load_weights(BERT(**sizes_from_config(about)), tmp_path / "model.safetensors", from_official)


def test_a_roberta_has_the_same_keys_and_is_refused(tmp_path):
    config = transformers.RobertaConfig(**SMALL, pad_token_id=1)
    model = transformers.RobertaModel(config)
    assert {k for k in model.state_dict()} == {k for k in official().state_dict()}
    with pytest.raises(ValueError, match="roberta"):
        sizes_from_config(config.to_dict())


def test_some_blocks_read_a_video_of_another_width():
    torch.manual_seed(0)
    bert = BERT(
        40, 12, 24, 3, 3, 40,
        block=lambda i: PostNormBlock(24, 3, 40, context_dim=16 if i == 2 else None),
    ).eval()
    ids, video = inputs()["token_ids"], torch.randn(2, 6, 16)
    x = bert.embed(ids)
    (a, low), (b, lower) = bert.forward_intermediates(x), bert.forward_intermediates(x, context=video)
    assert torch.equal(low[1], lower[1]) and not torch.allclose(a, b)
    assert [len(bert.forward_intermediates(x, indices=i)[1]) for i in ([], [0], [0, -1])] == [0, 1, 2]


def test_gradients_copies_and_files(tmp_path):
    torch.manual_seed(0)
    bert = BERT(40, 12, 24, 2, 3, 40, context_dim=24, causal=True, drop=0.1).eval()
    ids, real = inputs()["token_ids"], inputs()["attention_mask"]
    x = bert.encode(bert.embed(ids, inputs()["type_ids"]), real, **reader())
    bert.pool(x).square().sum().backward()
    without = [n for n, p in bert.named_parameters() if p.grad is None]
    assert not without
    pickled = pickle.loads(pickle.dumps(bert))  # noqa: S301
    for other in (copy.deepcopy(bert), pickled):
        assert torch.equal(other(ids, real), bert(ids, real))
    save_weights(bert, tmp_path / "b.safetensors")
    with torch.device("meta"):
        BERT(**bert.config)
    other = BERT(**bert.config).eval()
    load_weights(other, tmp_path / "b.safetensors")
    assert torch.equal(other(ids, real), bert(ids, real))
    compiled = torch.compile(bert, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, real), bert(ids, real))


@pytest.mark.parametrize("causal, none", list(itertools.product([False, True], [False, True])))
def test_masks_by_hand(causal, none):
    real = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mask = may_attend(None if none else real, causal)
    if none:
        assert mask is None
        return
    wanted = [[[bool(real[b, j]) and (not causal or j <= i) for j in range(3)] for i in range(3)] for b in range(2)]
    assert mask.expand(2, 1, 3, 3)[:, 0].tolist() == wanted


def test_an_empty_text_gives_no_nan():
    torch.manual_seed(0)
    bert = BERT(40, 12, 24, 2, 3, 40, causal=True, pool="mean").eval()
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert bert(ids, torch.tensor([[1] * 4, [0] * 4])).isfinite().all()
