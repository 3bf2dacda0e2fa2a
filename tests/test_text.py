"Tokenizers of three makes behind one protocol, and rows of ids as a rectangle."

import copy
import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer as Rules, models, pre_tokenizers, processors

from vfm_lab.lab import asset
from vfm_lab.models.clip import tiny_tokenizer
from vfm_lab.models.internvideo import caption_words
from vfm_lab.text import JsonTokenizer, Tokenizer, pad_ids, word_tokenizer

transformers = pytest.importorskip("transformers")


def clip_bpe():
    "A CLIP tokenizer of transformers with a small vocabulary: byte letters, a few merges, two special tokens."
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    pieces = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", "st", "ar</w>", "star</w>"]
    vocab = {t: i for i, t in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("r", "e"), ("re", "d</w>"), ("s", "t"), ("a", "r</w>"), ("st", "ar</w>")]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


def bert_pieces():
    names = "[PAD] [UNK] [CLS] [SEP] [MASK] a red star ring ##s move ##d .".split()
    return transformers.BertTokenizer(vocab={t: i for i, t in enumerate(names)})


def test_the_tiny_clip_reads_as_before():
    texts = ["A red circle", "star", "a white cross"]
    ours = JsonTokenizer(asset("weights/tiny_clip_tokenizer.json"))
    ids, real = ours(texts)
    assert ids.tolist() == [[1, 2, 3, 9, 15], [1, 12, 15, 0, 0], [1, 2, 8, 13, 15]]
    assert torch.equal(real, ids != 0) and torch.equal(tiny_tokenizer()(texts)[0], ids)
    assert isinstance(ours, Tokenizer) and ours.vocab == 16
    with pytest.raises(ValueError, match="'pink' 'cow'; it knows <pad> <start> a red"):
        ours(["a pink cow"])


def test_the_words_of_the_captions_read_as_before():
    texts = ["a red circle moves left", "a star turns counterclockwise", "a ring"]
    ours = word_tokenizer(caption_words(), longest=12)
    ids, _ = ours(texts)
    words = caption_words()
    rows = [[1, *map(words.index, text.split()), len(words) - 1] for text in texts]
    longest = max(map(len, rows))
    assert ids.tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert ours.decode(ids) == texts
    assert ours.decode(ids[:, :4]) == ["a red circle", "a star turns", "a ring"]   # unfinished


def test_clip_as_transformers_reads_it():
    theirs = clip_bpe()
    ours = JsonTokenizer(Rules.from_str(theirs._tokenizer.to_str()), longest=77)
    texts = ["A red star!", "red  stars, über alles", "", "日本"]
    ids, real = ours(texts)
    for text, row, mask in zip(texts, ids, real):
        assert row[mask].tolist() == theirs(text)["input_ids"]
    assert ours.pad == 0 and not ids[~real].any() and ids.argmax(1).tolist() == (real.sum(1) - 1).tolist()
    assert ours.decode(ids)[0] == theirs.decode(theirs("A red star!")["input_ids"], skip_special_tokens=True)
    with pytest.raises(ValueError, match="start or end token as a word"):
        ours(["a red <|endoftext|> star"])


def test_bert_as_transformers_reads_it():
    theirs = bert_pieces()
    ours = JsonTokenizer(Rules.from_str(theirs._tokenizer.to_str()), longest=6)
    texts = ["A red star moved.", "rings", "what [MASK]"]
    with pytest.raises(ValueError, match=r"'A red star moved\.' has 8 tokens, the tower reads 6"):
        ours(texts)
    for text in texts:
        assert JsonTokenizer(ours.rules)([text])[0][0].tolist() == theirs(text)["input_ids"]
    short = JsonTokenizer(ours.rules, longest=6, truncate=True)
    wanted = theirs(texts, truncation=True, max_length=6, padding=True)
    ids, real = short(texts)
    assert ids.tolist() == wanted["input_ids"] and real.long().tolist() == wanted["attention_mask"]


def test_padding_and_truncation_of_the_file_do_not_count(tmp_path):
    rules = bert_pieces()._tokenizer
    rules.enable_truncation(4)
    rules.enable_padding(length=64, pad_id=0)
    rules.save(str(tmp_path / "t.json"))
    ours = JsonTokenizer(tmp_path / "t.json")
    assert ours(["a red star moved"])[0].shape == (1, 7)
    assert rules.padding["length"] == 64 and rules.truncation["max_length"] == 4   # what was given is as it was


def test_padding_of_the_file_is_kept_and_stored():
    rules = bert_pieces()._tokenizer
    rules.enable_padding(pad_id=4, pad_token="[MASK]")
    ours = JsonTokenizer(rules)
    again = JsonTokenizer(json.loads(ours.to_str()))
    assert ours.pad == again.pad == 4 and again(["a", "a red"])[0].tolist() == [[2, 5, 3, 4], [2, 5, 6, 3]]
    assert JsonTokenizer(rules, pad=0)(["a", "a red"])[0][0, -1] == 0
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
        assert torch.equal(other(["a red"])[0], ours(["a red"])[0])


def test_without_start_and_end():
    rules = Rules(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ours = JsonTokenizer(rules, longest=2, truncate=True)
    ids, real = ours(["a b a", "b"])
    assert ids.tolist() == [[0, 1], [1, 0]] and real.tolist() == [[True, True], [True, False]]
    assert (ours.start, ours.end) == (None, None)
    rules.post_processor = processors.TemplateProcessing(single="$A b", special_tokens=[("b", 1)])   # an end alone
    ends = JsonTokenizer(rules)
    assert ends(["a"])[0].tolist() == [[0, 1]] and ends.decode(torch.tensor([[0, 1]])) == ["a"]


@pytest.mark.parametrize(
    "texts, said",
    [("a star", "expected a list"), ([], "no texts"), ([None], "NoneType"), (["a <end> star"], "start or end"),
     (["a\x1bstar"], r"\\x1b")],
)
def test_texts_that_cannot_be(texts, said):
    words = word_tokenizer(["<pad>", "<start>", "a", "star", "<end>"])
    with pytest.raises(ValueError, match=said) as e:
        words(texts)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{bad", "\x1b]0;x\x07"])
def test_files_that_are_none(tmp_path, content):
    file = tmp_path / "t.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="t.json: not a tokenizer") as e:
        JsonTokenizer(file)
    assert "\n" not in str(e.value) and "\x1b" not in str(e.value)


def test_rows():
    ids, mask = pad_ids([torch.tensor([1, 2], dtype=torch.int32), [3]], pad=-1)
    assert ids.tolist() == [[1, 2], [3, -1]] and ids.dtype == torch.long and mask.dtype == torch.bool
    assert pad_ids([[]])[0].shape == (1, 0)
    for wrong in ([], [[1.0]], [[True]], [[[1]]]):
        with pytest.raises(ValueError):
            pad_ids(wrong)
