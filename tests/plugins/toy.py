"""Three systems that the package does not know: a classifier, a way of pre-training, an adapter.

Everything that the lab needs to know of them stands here."""
from dataclasses import dataclass
from typing import ClassVar

from timm.models import register_model
from torch import nn

from vfm_lab.config import Part, Recipe
from vfm_lab.golden import golden
from vfm_lab.models.checkpoints import rename
from vfm_lab.models.registry import layout
from vfm_lab.nn.blocks import Block
from vfm_lab.nn.vit import VideoClassifier, VideoViT

SIZES = dict(image_size=32, patch=8, frames=4, dim=32, depth=2, heads=2)


# --- a classifier

class ToyClassifier(VideoClassifier):
    "Reads clips with a normalisation of its own."
    stats, sampling = "half", "dense"

    def __init__(self, num_classes=3, **vit):
        super().__init__(num_classes, **vit)
        self.config = dict(num_classes=num_classes, **vit)


@register_model
def toy_classifier(**args) -> ToyClassifier: return ToyClassifier(**SIZES | args)


@layout("toy_official", ToyClassifier, has=[r"toy\.stem\."])
def from_toy(state):
    "Their `toy.stem` is our patch embedding, their `toy.layer` a block."
    return rename({r"toy\.stem\.": "patch_embed.proj.", r"toy\.layer\.": "blocks.", r"toy\.": ""})(state)


def to_toy(state):
    "The other way round, for tests."
    names = {"patch_embed.proj.": "toy.stem.", "blocks.": "toy.layer."}
    def theirs(key): return next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), f"toy.{key}")
    return {theirs(k): v for k, v in state.items()}


@golden("toy", unused=["batch"])
def run_toy(case):
    model = ToyClassifier(case.config["num_classes"], **SIZES).eval()
    model.load_state_dict(from_toy(case.weights))
    return {"logits": model(case.inputs["clip"])}


# --- a way of pre-training

class ToyPretrain(nn.Module):
    "The mean colour of a clip from its tokens, some of which are dropped."
    def __init__(self, encoder, drop):
        super().__init__()
        self.encoder, self.drop, self.head = encoder, drop, nn.Linear(encoder.num_features, 3)

    def forward(self, batch):
        clip = batch["clip"]
        seen = nn.functional.dropout(self.encoder.forward_features(clip), self.drop, self.training)
        return {"loss": (self.head(seen.mean(1)) - clip.mean((2, 3, 4))).square().mean()}


class ToyEncoder(VideoViT):
    def __init__(self, **vit):
        super().__init__(**vit)
        self.config = vit


@register_model
def toy_encoder(**args) -> ToyEncoder: return ToyEncoder(**SIZES | args)


@layout("toy_start", ToyClassifier, has=[r"blocks\.", r"norm\."], lacks=[r"head\."],
        fresh=(r"fc_norm\.", r"head\."), whole=False)
def from_encoder(state):
    "A pre-trained encoder is the start of a classifier; its last norm stays behind."
    return rename({r"norm\.": None})(state)


@dataclass
class PretrainToy(Recipe):
    "Toy: repeat the mean colour."
    command: ClassVar[str] = "pretrain toy"
    keep: ClassVar[str] = "encoder"
    model: str = "toy_encoder"
    drop: Part = 0.5

    def build(self, create): return ToyPretrain(create(self.model, **self.model_args), self.drop)


# --- an adapter

class ToyAdapter(Block):
    "A block with a small detour behind it, which is all that is trained."
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.requires_grad_(False)
        self.detour = nn.Sequential(nn.Linear(dim, 4), nn.GELU(), nn.Linear(4, dim))
        nn.init.zeros_(self.detour[2].weight), nn.init.zeros_(self.detour[2].bias)

    def forward(self, x, *args, **kwargs):
        x = super().forward(x, *args, **kwargs)
        return x + self.detour(x)


class ToyAdapted(ToyClassifier):
    "The toy classifier with frozen blocks and a detour behind each."
    def __init__(self, num_classes=3, **vit):
        super().__init__(num_classes, **vit, block=lambda i: ToyAdapter(vit["dim"], vit["heads"]))
        self.config.pop("block")   # its name says which block it has
        self.patch_embed.requires_grad_(False)


@register_model
def toy_adapted(**args) -> ToyAdapted: return ToyAdapted(**SIZES | args)


@layout("toy_adapted_start", ToyAdapted, has=[r"patch_embed\.", r"head\."], lacks=[r".*detour"],
        fresh=(r"blocks\.\d+\.detour\.",), whole=False)
def adapted(state): return state


# --- a video and a text tower

class ToyTowers(nn.Module):
    "Reads texts in both directions, so it has to know what is padding."
    def __init__(self, video, vocab=20, dim=8):
        super().__init__()
        self.config = dict(video=video, vocab=vocab, dim=dim)
        self.video, self.words = ToyEncoder(**SIZES | video), nn.Embedding(vocab, dim)
        self.proj = nn.Linear(SIZES["dim"], dim)

    @property
    def input_spec(self): return self.video.input_spec

    def encode_video(self, clip): return self.proj(self.video.forward_features(clip).mean(1))

    def encode_text(self, ids, attention_mask):
        real = attention_mask[..., None].float()
        return (self.words(ids) * real).sum(1) / real.sum(1)


@register_model
def toy_towers(video=None, **args) -> ToyTowers: return ToyTowers(video or {}, **args)
