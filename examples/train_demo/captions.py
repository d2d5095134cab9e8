"""Captions of the training pictures and the word-level tokenizers of both text encoders.

The two encoders can read different parts, so that what is learnt of a style on some things holds for others: what CLIP
reads modulates all layers of the transformer, what T5 reads is attended to.
"""

import random
from typing import Literal

import torch
from data import STYLES, Pair
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK, BOS = "<pad>", "</s>", "<unk>", "<s>"
SPECIALS = (PAD, EOS, UNK, BOS)  # ids 0 to 3
LENGTH = 32  # longest caption trained on, in tokens
CLIP_LENGTH = 77
T5_LENGTH = 512
VARIANTS = 24  # captions drawn up for one picture
FREE = 4  # place of the first free form
MAIN_SHARE, EMPTY_SHARE, STYLE_SHARE, CONCEPT_SHARE = 0.45, 0.08, 0.08, 0.04
Reads = Literal["everything", "style", "things"]
OTHER: dict[Reads, Reads] = {"everything": "everything", "style": "things", "things": "style"}  # for T5, by CLIP's part
STYLE_WORD = r"noto|twemoji|fluent(?= flat| 3d)|(?<=fluent )(?:flat|3d)"
STYLE_PHRASE = r",? ?(?:in )?\b(?:noto|twemoji|fluent flat|fluent 3d)\b(?: style\b)?"
TEMPLATES = (
    "a {label}, {style} style",
    "{label} in {style} style",
    "a {label} in {style} style",
    "{style} style {label}",
    "{style} {label}",
    "{label}, {style}",
    "an emoji of a {label}, {style} style",
    "a picture of a {label}, {style} style",
    "a drawing of a {label} in {style} style",
    "{label}, {tags}, {style} style",
    "a {label}, {tags}, {style} style",
    "{unknown} {label}, {style} style",
    "a {unknown} {label} in {style} style",
)


def variants(pair: Pair, seed: int) -> list[str]:
    """Caption 0 is the main one; 1, 2, 3 are empty, style only and concept only; the rest are free forms.

    The free forms of further concepts leave the name out, so that their pictures teach style by itself too.
    """
    rng = random.Random(seed)
    style = STYLES[pair.style]
    captions = [pair.caption, "", f"{style} style", pair.label]
    while len(captions) < VARIANTS:
        tags = rng.sample(pair.tags, min(len(pair.tags), rng.randint(1, 3)))
        label = UNK if pair.extra else pair.label
        text = rng.choice(TEMPLATES).format(label=label, style=style, tags=", ".join(tags), unknown=UNK)
        captions.append(text)
    return captions


def variant_shares() -> torch.Tensor:
    shares = torch.full((VARIANTS,), 1.0)
    fixed = torch.tensor([MAIN_SHARE, EMPTY_SHARE, STYLE_SHARE, CONCEPT_SHARE])
    shares[FREE:] = (1 - fixed.sum()) / (VARIANTS - FREE)
    shares[:FREE] = fixed
    return shares


def build_vocabulary(pairs: list[Pair], extras: list[Pair] | None = None) -> dict[str, int]:
    """Word -> id; words of further concepts come last, so that leaving them out changes no other's id."""
    texts = [text.format(label="", style="", tags="", unknown="") for text in TEMPLATES] + list(STYLES)
    texts += [t for p in pairs for t in (p.label, *p.tags)]
    words = words_of(texts)
    further = words_of([p.label for p in extras or []]) - words
    return {word: i for i, word in enumerate([*SPECIALS, *sorted(words), *sorted(further)])}


def words_of(texts: list[str]) -> set[str]:
    splitter = word_splitter()
    return {word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())}


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """Words and single punctuation marks; the unknown-word token stays whole."""
    return pre_tokenizers.Split(Regex(r"<unk>|\w+|[^\w\s]"), behavior="removed", invert=True)


def build_tokenizer(
    vocabulary: dict[str, int], reads: Reads = "everything", clip: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer that passes over what it does not read. One for CLIP starts with <s> and takes 77 tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    steps = [normalizers.NFKC(), normalizers.Lowercase()]
    if reads == "things":
        steps.append(normalizers.Replace(Regex(STYLE_PHRASE), " "))
    tokenizer.normalizer = normalizers.Sequence(steps)
    style_words = pre_tokenizers.Split(Regex(STYLE_WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = style_words if reads == "style" else word_splitter()
    template = f"{BOS} $A {EOS}" if clip else f"$A {EOS}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(s, vocabulary[s]) for s in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        bos_token=BOS if clip else None,
        model_max_length=CLIP_LENGTH if clip else T5_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_tokenizers(
    vocabulary: dict[str, int], clip_reads: Reads
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """CLIP's and T5's."""
    return build_tokenizer(vocabulary, clip_reads, clip=True), build_tokenizer(vocabulary, OTHER[clip_reads])


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int = LENGTH) -> torch.Tensor:
    """Padded and cut token ids, the way FluxPipeline makes them."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids.int()
