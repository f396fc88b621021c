"""Text as it comes: pieces add up to the whole, no character is split, stop strings end it wherever they are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fettle.detokenize import REPLACEMENT, Detokenizer, StopStrings, TextStream
from fettle.errors import RequestError

TEXTS = [
    "plain words, and more words",
    "family 👩‍👩‍👧‍👦, flag 🇩🇪, thumbs 👍🏽",
    "漢字かな交じり文 and 한국어",
    "e\u0301a\u0308 combined, Zalgo t\u0337\u0321e\u0334xt",
    "two  spaces\n\n\tand lines \x00\x7f",
    "\ufffd is a character of its own\ufffd",
    "العربية עברית",
]
# One, two, three and four bytes long.
texts = st.text(
    st.sampled_from("ab \n▁é\u0301漢字👩\u200d👧🏽�") | st.characters(exclude_categories=["Cs"]), max_size=12
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def byte_fallback(*, strip: bool) -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "▁": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocabulary |= {piece: 259 + place for place, piece in enumerate(["▁plain", "é", "漢", *"adeilnoprsuw"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strip else "never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def words(decoder: object, pieces: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, pieces[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["[end]"])
    return tokenizer


OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "no decoder": lambda: words(None, ["the", "fox", "漢", "."]),
    "word pieces": lambda: words(decoders.WordPiece(), ["the", "##ing", "fox", "."]),
    "metaspace": lambda: words(decoders.Metaspace(), ["▁the", "▁fox", "es", "▁", "."]),
    "suffixes": lambda: words(decoders.BPEDecoder(), ["the</w>", "fo", "x</w>", "漢</w>"]),
}
BYTE_LEVEL, LLAMA, GEMMA = byte_level(), byte_fallback(strip=True), byte_fallback(strip=False)
FALLBACKS = pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA], ids=["strip", "no strip"])


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*map(stream.push, ids), stream.finish()]


def streamed(tokenizer: Tokenizer, ids: Sequence[int], **settings: object) -> str:
    return "".join(pieces(Detokenizer(tokenizer).stream(**settings), ids))


def whole(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special)


# Streams


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, GEMMA], ids=["byte level", "strip", "no strip"])
def test_pieces_add_up_and_no_character_is_split(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    parts = pieces(Detokenizer(tokenizer).stream(), ids)
    assert "".join(parts) == text == whole(tokenizer, ids)
    # The replacement character comes only where the text has it.
    assert sum(part.count(REPLACEMENT) for part in parts) == text.count(REPLACEMENT)
    assert parts[-1] == ""


@given(texts)
def test_any_text_byte_level(text: str):
    ids = BYTE_LEVEL.encode(text).ids
    assert streamed(BYTE_LEVEL, ids) == whole(BYTE_LEVEL, ids)


@FALLBACKS
@given(text=texts)
def test_any_text_with_byte_fallback(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    assert streamed(tokenizer, ids) == whole(tokenizer, ids)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=12), st.booleans())
def test_any_ids_byte_level(ids: list[int], skip_special: bool):
    assert streamed(BYTE_LEVEL, ids, skip_special=skip_special) == whole(BYTE_LEVEL, ids, skip_special=skip_special)


runs = st.lists(st.text(max_size=3).map(str.encode), max_size=3).map(b"".join)


@FALLBACKS
@given(parts=st.lists(st.sampled_from(["a", "é", "▁", "▁plain", "<s>"]) | runs, max_size=5))
def test_any_whole_characters_in_byte_tokens(tokenizer: Tokenizer, parts: list[str | bytes]):
    ids = [
        tokenizer.token_to_id(token)
        for part in parts
        for token in ([part] if isinstance(part, str) else [f"<0x{byte:02X}>" for byte in part])
    ]
    assert streamed(tokenizer, ids) == whole(tokenizer, ids)


@FALLBACKS
@given(st.lists(st.integers(0, LLAMA.get_vocab_size() - 1), max_size=12))
def test_any_ids_with_byte_fallback(tokenizer: Tokenizer, ids: list[int]):
    """Runs of byte tokens that are no characters show those that are, and a replacement character for every other."""
    spelled = []
    for token in ids:
        piece = tokenizer.id_to_token(token)
        byte = re.fullmatch("<0x(..)>", piece)
        spelled.append(bytes.fromhex(byte[1]) if byte else b"" if piece == "<s>" else piece.replace("▁", " ").encode())
    text = b"".join(spelled).decode(errors="surrogateescape")
    text = re.sub("[\udc80-\udcff]", REPLACEMENT, text)
    assert streamed(tokenizer, ids) == (text.removeprefix(" ") if tokenizer is LLAMA else text)


@FALLBACKS
def test_a_character_that_breaks_off(tokenizer: Tokenizer):
    first, second = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "漢".encode()[:2])
    ids = [tokenizer.token_to_id("a"), first, second]
    assert pieces(Detokenizer(tokenizer).stream(), ids) == ["a", "", "", REPLACEMENT * 2]
    ids.append(tokenizer.token_to_id("w"))
    assert pieces(Detokenizer(tokenizer).stream(), ids) == ["a", "", "", REPLACEMENT * 2 + "w", ""]
    assert streamed(tokenizer, ids) == whole(tokenizer, ids)


def test_bytes_that_never_become_a_character_do_not_hold_up_the_text():
    ids = BYTE_LEVEL.encode("漢").ids[:1]
    assert len(BYTE_LEVEL.encode("漢").ids) > 1
    parts = pieces(Detokenizer(BYTE_LEVEL).stream(), ids * 50 + BYTE_LEVEL.encode("a").ids)
    assert parts[0] == ""
    assert all(parts[1:50])
    assert parts[50] == REPLACEMENT + "a"


@FALLBACKS
def test_characters_before_a_bad_byte_stay(tokenizer: Tokenizer):
    """Where this is better than the tokenizer, which takes back what was already shown."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "漢".encode() + b"\xff"]
    assert streamed(tokenizer, ids) == "漢" + REPLACEMENT
    assert whole(tokenizer, ids) == REPLACEMENT * 4


def test_special_tokens_are_left_out_or_shown_and_other_added_ones_always_shown():
    ids = [BYTE_LEVEL.token_to_id(token) for token in ("a", "<|end|>", "<think>", "b")]
    assert streamed(BYTE_LEVEL, ids) == "a<think>b"
    assert streamed(BYTE_LEVEL, ids, skip_special=False) == "a<|end|><think>b"


def test_a_special_token_in_a_character_that_is_left_out_does_not_break_it():
    ids = BYTE_LEVEL.encode("字").ids
    assert len(ids) > 1
    end = BYTE_LEVEL.token_to_id("<|end|>")
    assert streamed(BYTE_LEVEL, [ids[0], end, *ids[1:]]) == "字"


def test_the_space_of_a_first_word_is_kept_where_it_continues_a_prompt():
    plain, start = LLAMA.token_to_id("▁plain"), LLAMA.token_to_id("<s>")
    assert streamed(LLAMA, [plain, plain]) == "plain plain"
    assert streamed(LLAMA, [start, plain]) == "plain"
    assert streamed(LLAMA, [plain], before=[start]) == "plain"
    assert streamed(LLAMA, [plain], before=[start, plain]) == " plain"
    assert streamed(GEMMA, [plain]) == " plain"


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_decoders(make: Callable[[], Tokenizer]):
    tokenizer = make()
    draw = random.Random(0)
    for _ in range(300):
        # With ids that no token has, as models with spare logits may give.
        ids = [draw.randrange(tokenizer.get_vocab_size() + 2) for _ in range(draw.randrange(20))]
        split = draw.randrange(len(ids) + 1)
        for skip in (True, False):
            before, after = ids[:split], ids[split:]
            text = whole(tokenizer, ids, skip_special=skip)
            assert streamed(tokenizer, ids, skip_special=skip) == text
            prompt = whole(tokenizer, before, skip_special=skip)
            assert prompt + streamed(tokenizer, after, skip_special=skip, before=before) == text


def test_an_unknown_decoder_with_bytes_splits_no_character():
    tokens = ["the", "<0xE6>", "<0xBC>", "<0xA2>", "x"]
    tokenizer = words(decoders.ByteFallback(), tokens)
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert pieces(Detokenizer(tokenizer).stream(), ids) == ["the", "", "", "漢", "x", ""]


def test_offsets_are_where_a_tokens_text_begins():
    ids = BYTE_LEVEL.encode("a漢b").ids
    end = BYTE_LEVEL.token_to_id("<|end|>")
    stream = Detokenizer(BYTE_LEVEL).stream()
    text = "".join(pieces(stream, [*ids, end]))
    assert text == "a漢b"
    assert stream.length == 3
    middle = len(ids) - 2
    assert middle > 1
    assert stream.offsets == [0, *[1] * middle, 2, 3]


# Stop strings


def cut(stops: Sequence[str], texts: Sequence[str], *, include: bool = False) -> tuple[str, str | None]:
    strings = StopStrings(stops, include=include)
    text = "".join([*map(strings.push, texts), strings.finish()])
    assert strings.length == len(text)
    return text, strings.matched


def expected(stops: Sequence[str], text: str, *, include: bool = False) -> tuple[str, str | None]:
    """By looking at every beginning of the text."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@st.composite
def stopped(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Stop strings that are like each other, and a text of their parts."""
    stops = draw(st.lists(st.text("ab", min_size=1, max_size=7), max_size=3))
    stops += [stop[draw(st.integers(0, len(stop) - 1)) :] for stop in stops[:1]]
    parts = st.sampled_from([stop[:size] for stop in stops for size in range(1, len(stop) + 1)] or ["a"])
    return draw(st.permutations(stops)), draw(st.lists(parts | st.text("abc", max_size=3), max_size=6))


@settings(max_examples=500)
@given(stopped(), st.booleans())
def test_a_text_is_cut_at_the_first_stop_string_however_it_comes(case: tuple[list[str], list[str]], include: bool):
    stops, texts = case
    assert cut(stops, texts, include=include) == expected(stops, "".join(texts), include=include)


@given(stopped())
def test_no_more_is_held_back_than_may_begin_a_stop_string(case: tuple[list[str], list[str]]):
    stops, texts = case
    strings, came, passed = StopStrings(stops), "", ""
    for text in texts:
        came += text
        passed += strings.push(text)
        if strings.matched is not None:
            break
        held = came[len(passed) :]
        longest = max(
            (size for stop in stops for size in range(len(stop)) if size and came.endswith(stop[:size])), default=0
        )
        assert len(held) == longest


def test_a_stop_string_over_several_tokens():
    strings = StopStrings(["\n\nUser:"])
    assert [strings.push(text) for text in ["Hello", "\n", "\nUs", "er", ": more"]] == ["Hello", "", "", "", ""]
    assert strings.matched == "\n\nUser:"
    assert strings.push("ignored") == strings.finish() == ""


def test_what_only_looked_like_one_comes_after_all():
    strings = StopStrings(["</answer>"])
    assert [strings.push(text) for text in ["x</ans", "wer", "</a"]] == ["x", "", "</answer"]
    assert strings.finish() == "</a"
    assert strings.matched is None


def test_included_stop_strings_hold_nothing_back():
    strings = StopStrings(["END"], include=True)
    assert [strings.push(text) for text in ["a E", "N", "D b"]] == ["a E", "N", "D"]
    assert strings.matched == "END"


@pytest.mark.parametrize("stops", [["c", "abc"], ["abc", "c"]])
def test_of_several_that_end_at_one_place_the_longest_counts(stops: list[str]):
    assert cut(stops, ["xab", "cd"]) == ("x", "abc")


def test_a_stop_string_that_begins_within_one_that_failed():
    assert cut(["aabaaac"], ["aabaaabaaac"]) == ("aaba", "aabaaac")
    assert cut(["aabaaac"], "aabaaabaaac") == ("aaba", "aabaaac")


def test_no_stop_strings():
    assert cut([], ["a", "b"]) == ("ab", None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError) as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"


class Counted(str):
    """Counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, key):
        Counted.looks += 1
        return super().__getitem__(key)


def test_long_stop_strings_are_not_scanned_again_and_again(monkeypatch: pytest.MonkeyPatch):
    """The worst text for a 10 kB stop string, a character at a time: it nearly matches all the time."""
    monkeypatch.setattr(Counted, "looks", 0)
    size = 10_000
    strings = StopStrings([Counted("a" * (size - 1) + "b")])
    text = ("a" * (size - 2) + "c") * 3
    passed = "".join([*map(strings.push, text), strings.finish()])
    assert passed == text
    assert Counted.looks < 12 * len(text)


def test_a_long_stop_string_matches():
    stop = "".join(random.Random(0).choices("ab", k=10_000))
    assert cut([stop, "zz"], ["x" + stop[:5000], stop[:4999], stop[4999:], *stop, "y"])[1] == stop
