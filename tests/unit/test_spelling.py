"""Tokens spelled in bytes add up to the text that the tokenizer's own decoder makes of them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fettle.spelling import BYTES, Spelling, shown

TEXTS = ["plain words here", "Grüße, 漢字 — ok 🙂", "tabs\tand\nlines\x00", ' "quoted" {"a": [1.5]}']


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["words words here", "Grüße"] * 5, trainer)
    tokenizer.add_special_tokens([AddedToken("<|endé|>", special=True)])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocabulary |= {piece: 258 + place for place, piece in enumerate(["▁words", "w", "o", "r", "d", "s", "h", "e"])}
    merges = [("w", "o"), ("r", "d")]
    vocabulary |= {a + b: len(vocabulary) + place for place, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_those_of_the_text(make, text: str):
    tokenizer = make()
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(text).ids
    assert len(ids) > 4
    assert b"".join(map(spelling.bytes_of, ids)).decode() == text


def test_added_tokens_are_themselves_and_what_is_no_token_is_nothing():
    tokenizer = byte_level()
    spelling = Spelling(tokenizer)
    assert spelling.bytes_of(tokenizer.token_to_id("<|endé|>")) == "<|endé|>".encode()
    assert spelling.bytes_of(999_999) == b""


def test_a_vocabulary_of_whole_words_spells_them():
    tokenizer = Tokenizer(models.WordLevel({"fox": 0, "▁": 1}, "fox"))
    assert [Spelling(tokenizer).bytes_of(token) for token in (0, 1)] == [b"fox", "▁".encode()]


def test_every_byte_has_a_character_of_its_own():
    assert sorted(BYTES.values()) == [bytes([byte]) for byte in range(256)]
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())


def test_what_is_no_character_is_shown_in_bytes():
    assert shown("ü\n".encode()) == "ü\n"
    assert shown("漢".encode()[:2]) == "bytes:\\xe6\\xbc"
    assert shown(b"") == ""
