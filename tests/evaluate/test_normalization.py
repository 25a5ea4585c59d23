"""Texts that sound the same are the same once normalised, in scripts with marks, without spaces or with two i's."""

from __future__ import annotations

import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from echox.evaluate.normalization import error_rate_name, normalize


def test_english_makes_the_same_of_what_sounds_the_same() -> None:
    assert normalize("The Capital, of France is PARIS!") == "the capital of france is paris"
    assert normalize("It's twenty one miles.") == normalize("it is 21 miles")
    assert normalize("Um,  Brasília ...") == "brasilia"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("ru", "Всё, что о́н «сказал» — ВОЛОС!", "все что он сказал волос"),
        ("ru", "Й и йод (смеётся) [музыка]", "й и йод"),
        ("ru", "И\u0306од", "йод"),
        ("uk", "Їжак, ґанок; м'яч.", "їжак ґанок м яч"),
        ("be", "Ён — тут", "ён тут"),
        ("de", "Die Größe: 3 Äpfel, „Straße“.", "die größe 3 äpfel straße"),
        ("de", "Fu\u0308nf", "fünf"),
        ("fr", "L’été, aujourd'hui, c'est Noël !", "l été aujourd hui c est noël"),
        ("fr", "Œuvre № 1", "œuvre no 1"),
        ("es", "¿Qué? ¡Niño!", "qué niño"),
        ("zh", "秘鲁的首都是利马。", "秘 鲁 的 首 都 是 利 马"),
        ("zh", "ＡＢ，１２！", "a b 1 2"),
        ("yue", "你好", "你 好"),
        ("ja", "東京タワー（とうきょう）は「高い」。", "東 京 タ ワ ー と う き ょ う は 高 い"),
        ("ja", "か\u3099", "が"),
        ("th", "น้ำตก อยู่ที่นี่", "น้\u0e4d า ต ก อ ยู่ ที่ นี่"),
        ("ar", "السَّلَامُ عَلَيْكُمْ، كيف حالك؟", "السلام عليكم كيف حالك"),
        ("ar", "الســـلام", "السلام"),
        ("he", "שָׁלוֹם!", "שלום"),
        ("hi", "मौसम बहुत अच्छा है।", "मौसम बहुत अच्छा है"),
        ("ko", "안녕하세요, 여러분!", "안녕하세요 여러분"),
        ("tr", "İSTANBUL, IĞDIR", "istanbul ığdır"),
        ("yo", "ẹ\u0301", "ẹ\u0301"),
        ("fr", "… — !", ""),
    ],
)
def test_other_languages_keep_their_letters_and_lose_the_rest(language: str, text: str, expected: str) -> None:
    assert normalize(text, language) == expected
    assert normalize(expected, language) == expected


@pytest.mark.parametrize("language", ["de", "fr", "es", "it", "pl", "zh"])
@pytest.mark.parametrize("text", ["Ça va, Größe: 12,5 %! <noise> (x) J’ai…", "Łódź & Ñandú", "你好，世界 ABC"])
def test_without_marks_it_is_the_basic_normaliser_of_whisper(language: str, text: str) -> None:
    stock = BasicTextNormalizer(split_letters=language == "zh")(text).split()
    assert normalize(text, language).split() == stock


def test_the_error_rate_is_said_by_its_name() -> None:
    assert [error_rate_name(code) for code in ("en", "ru", "hi", "ko")] == ["WER"] * 4
    assert [error_rate_name(code) for code in ("zh", "yue", "ja", "th", "lo", "my", "km")] == ["CER"] * 7
