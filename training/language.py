"""The stages that make the text side: a sentencepiece tokenizer and a T5 encoder that understands the grammar.

The encoder learns to name the attributes of its prompt from the mean of its output. A cross-attention that has
learnt nothing takes such a mean, so the transformer is told all attributes from its first step on.
"""

from __future__ import annotations

import io
import random
import string
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from toolchain.models.open_sora_v1_2.prompts import suffixes
from toolchain.models.open_sora_v1_2.t5 import T5Encoder
from toolchain.player.prompt import prepare_prompt
from toolchain.player.tokenizer import T5Tokenizer
from training.grammar import LABELS, Scene, scenes, split
from training.loop import Plan, train
from training.sizes import TEXT_TOKENS, text_encoder

TEXT = Plan("text", steps=1000, lr=2e-3)
PROMPTS_A_BATCH = 64
PIECES = 240


def prepared(prompt: str) -> str:
    """The text of a prompt as a bundle's player tokenizes it."""
    return prepare_prompt(prompt, [(s.label, s.text) for s in suffixes()])


def train_tokenizer(folder: Path, seed: int) -> None:
    """``spiece.model``: pieces of the grammar's prompts as the toolchain prepares them."""
    rng = random.Random(seed)
    corpus = sorted({prepared(scene.varied(rng).worded(rng)) for scene in scenes() for _ in range(40)})
    words = sorted({word.strip(string.punctuation) for text in corpus for word in text.split()})
    # a piece must be part of two different words, else it is none: so all words come with endings, too
    inflected = [word + ending for word in words for ending in ("s", "ed", "ing")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus + inflected),
        model_writer=model,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        model_type="unigram",
        character_coverage=1.0,
        required_chars=string.ascii_lowercase + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer(folder / "spiece.model")
    counts = [tokenizer(text, TEXT_TOKENS + 50).count for text in corpus]
    print(f"tokenizer: longest prompt {max(counts)} of {TEXT_TOKENS} tokens, mean {sum(counts) / len(counts):.1f}")


class Tokenized:
    """Prompts as tensors ``[n, L]``: ids and mask. Prompts seen before are remembered."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = T5Tokenizer(folder / "spiece.model")
        self.known: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        for prompt in prompts:
            if prompt not in self.known:
                tokens = self.tokenizer(prepared(prompt), TEXT_TOKENS)
                self.known[prompt] = tokens.ids, tokens.mask
        ids, mask = zip(*(self.known[p] for p in prompts), strict=True)
        return torch.tensor(ids), torch.tensor(mask, dtype=torch.float32)


class Namer(nn.Module):
    """The encoder and, for training only, one linear layer an attribute."""

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.d_model, n) for n in LABELS)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Scores of each attribute's values."""
        y = self.encoder(ids, mask)
        mean = (y * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return [head(mean) for head in self.heads]


def start_text_encoder(encoder: T5Encoder) -> None:
    """Weights to begin training with."""
    for name, weight in encoder.named_parameters():
        if name.endswith("layer_norm.weight"):
            nn.init.ones_(weight)
        elif "shared" in name or "embed_tokens" in name:
            nn.init.normal_(weight, std=1.0)
        elif "relative_attention_bias" in name:
            nn.init.normal_(weight, std=0.1)
        else:
            nn.init.xavier_uniform_(weight)


def train_text(folder: Path, seed: int, plan: Plan, device: str) -> None:
    """The encoder, on training scenes' prompts in many words; prints how it does on held-out scenes."""
    tokenized = Tokenized(folder)
    torch.manual_seed(seed + 2)
    encoder = T5Encoder(text_encoder(tokenized.tokenizer._pieces.get_piece_size()))
    start_text_encoder(encoder)
    namer = Namer(encoder).to(device)
    seen, held_out = split()

    def scores(what: list[Scene], prompts: list[str]) -> tuple[torch.Tensor, float]:
        ids, mask = (t.to(device) for t in tokenized(prompts))
        labels = torch.tensor([s.labels() for s in what], device=device)
        out = namer(ids, mask)
        right = torch.stack([o.argmax(dim=1) == labels[:, i] for i, o in enumerate(out)])
        return sum(F.cross_entropy(o, labels[:, i]) for i, o in enumerate(out)), float(right.all(dim=0).float().mean())

    def loss(rng: random.Random, _: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        what = [rng.choice(seen).varied(rng) for _ in range(PROMPTS_A_BATCH)]
        value, right = scores(what, [s.worded(rng) for s in what])
        return value, {"right": right}

    train(plan, namer, loss, folder, seed + 2, every=250)
    rng = random.Random(seed)
    with torch.no_grad():
        what = [scene.varied(rng) for scene in held_out * 20]
        print(f"text: all attributes of held-out prompts right: {scores(what, [s.worded(rng) for s in what])[1]:.4f}")
    torch.save(encoder.state_dict(), folder / "text_encoder.pt")


def load_text_encoder(folder: Path, device: str = "cpu") -> T5Encoder:
    """The trained encoder."""
    state = torch.load(folder / "text_encoder.pt", weights_only=True)
    encoder = T5Encoder(text_encoder(len(state["shared.weight"])))
    encoder.load_state_dict(state)
    return encoder.to(device).eval()
