"""Small tokenizers of every family, trained here, with added tokens that are awkward on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "You are a helpful assistant. Yesterday, all my troubles seemed so far away.",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n\n\n",
    "Grüße aus Köln, привет мир, 日本語のテキスト, naïve café 👩‍👩‍👧 12345 67 890",
] * 4
PLAIN = ["<|im_start|>", "<|im_end|>", "<|im|>", "<|", "|><|", "<\uff5cUser\uff5c>", "eot"]
AWKWARD = [
    AddedToken("<mask>", lstrip=True, special=True, normalized=False),
    AddedToken("<r>", rstrip=True, special=True, normalized=False),
    AddedToken("word", single_word=True, special=True, normalized=False),
    AddedToken("<w>", single_word=True, special=True, normalized=False),
    AddedToken("Yester", normalized=True),
    AddedToken("<n>", normalized=True, special=True),
    AddedToken("<tool>", normalized=False),
    AddedToken("  ", normalized=False),
    AddedToken("\n\n", special=True, normalized=False),
]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bpe() -> tuple[Tokenizer, trainers.BpeTrainer]:
    return Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)), trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )


def _byte_level() -> Tokenizer:
    tokenizer, _ = Tokenizer(models.BPE()), None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _byte_level_prefix_space() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def _llama3() -> Tokenizer:
    """As Llama 3 and Qwen 2: split by a pattern, bytes, NFC, a template that adds BOS."""
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])]
    )
    return tokenizer


def _metaspace(scheme: str, split: bool = True) -> Tokenizer:
    tokenizer, trainer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _llama2() -> Tokenizer:
    """Prefix space by normalizer, no pre-tokenizer."""
    tokenizer, trainer = _bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator([line for text in CORPUS for line in text.split()], trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return tokenizer


_BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "byte-level, prefix space": _byte_level_prefix_space,
    "llama3": _llama3,
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace never": lambda: _metaspace("never"),
    "metaspace first, unsplit": lambda: _metaspace("first", split=False),
    "llama2": _llama2,
    "word piece": _word_piece,
    "unigram": _unigram,
}
NAMES = tuple(_BUILDERS)


@cache
def build(name: str, *, awkward: bool = True) -> Tokenizer:
    """A tokenizer with the tokens in `PLAIN`, and those in `AWKWARD` if asked for. Do not change it."""
    tokenizer = _BUILDERS[name]()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in PLAIN])
    if awkward:
        tokenizer.add_tokens(AWKWARD)
    return tokenizer
