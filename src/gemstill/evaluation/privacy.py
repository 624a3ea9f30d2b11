"""Personal data in text, by kind and severity, found by `presidio-analyzer`.

What has a form (numbers, addresses) is found by patterns and checksums. Names of people and places have none: they are
looked for when a spaCy pipeline that marks them is named, and not otherwise.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import Any, NamedTuple

from gemstill.core.errors import Error

# By the levels of Google Cloud's Sensitive Data Protection (its page on "Data risk and sensitivity levels"), the
# report's detector: high for card numbers and national identifiers, moderate for what identifies a person otherwise,
# such as email addresses and telephone numbers. What tells of a person without saying which one is low here.
SEVERITY = {
    "CREDIT_CARD": "high",
    "IBAN_CODE": "high",
    "US_BANK_NUMBER": "high",
    "US_DRIVER_LICENSE": "high",
    "US_ITIN": "high",
    "US_PASSPORT": "high",
    "US_SSN": "high",
    "MEDICAL_LICENSE": "high",
    "CRYPTO": "moderate",
    "EMAIL_ADDRESS": "moderate",
    "PHONE_NUMBER": "moderate",
    "STREET_ADDRESS": "moderate",
    "PERSON": "moderate",
    "IP_ADDRESS": "low",
    "MAC_ADDRESS": "low",
    "LOCATION": "low",
    "NRP": "low",  # nationality, religion, politics
}
LEVELS = ("high", "moderate", "low")
NAMES = ("PERSON", "LOCATION", "NRP")  # found by a spaCy pipeline alone
SURE = 0.4  # presidio's score from which on something is counted; patterns without form or context score less
LANGUAGE = "en"
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Sq|Terrace|Way|Parkway|Pkwy"
)
_ADDRESS = rf"\b\d{{1,5}}[A-Za-z]?,? (?:[A-Z][\w'’-]+\.? ){{1,3}}(?:{_STREETS})\b"


class Found(NamedTuple):
    """One piece of personal data. start: in characters of the text. score: from 0 to 1, presidio's."""

    kind: str
    severity: str
    text: str
    start: int
    score: float


class Detector:
    """Looks for the kinds of SEVERITY in English text.

    names: a spaCy pipeline that marks people and places, installed or a folder ("en_core_web_lg"); without one NAMES
    are not looked for. Nothing is fetched.

    Raises:
        Error: presidio-analyzer is not installed, or there is no such pipeline.
    """

    def __init__(self, names: str = "") -> None:
        try:
            import spacy
            from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
            from presidio_analyzer.nlp_engine import SpacyNlpEngine
        except ImportError as error:
            fix = "pip install 'gemstill[privacy]'"
            raise Error(f"personal data are found by presidio-analyzer ({error})", where="privacy", fix=fix) from error
        _stay_offline()
        logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # it warns of every other language's patterns
        engine: Any = SpacyNlpEngine(models=[{"lang_code": LANGUAGE, "model_name": names or "blank"}])
        engine.nlp = {LANGUAGE: _pipeline(spacy, names)}
        registry = RecognizerRegistry()
        registry.load_predefined_recognizers(languages=[LANGUAGE])
        registry.add_recognizer(_street_addresses())
        self.kinds = [kind for kind in SEVERITY if names or kind not in NAMES]
        self.name = f"presidio-analyzer {importlib.metadata.version('presidio-analyzer')}"
        self._analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[LANGUAGE])

    def find(self, text: str, start: int = 0) -> list[Found]:
        """The personal data of `text` that begin at or behind the character `start`; what comes before is context.

        Where several kinds overlap, the one of the highest score is told, of equals the longest.
        """
        raw: list[Any] = self._analyzer.analyze(text=text, language=LANGUAGE, entities=self.kinds, score_threshold=SURE)
        raw.sort(key=lambda result: (-result.score, result.start - result.end, result.start))
        kept: list[Any] = []
        for result in raw:
            if all(result.end <= other.start or other.end <= result.start for other in kept):
                kept.append(result)
        return [
            Found(r.entity_type, SEVERITY[r.entity_type], text[r.start : r.end], r.start, float(r.score))
            for r in sorted(kept, key=lambda result: result.start)
            if r.start >= start
        ]


def _pipeline(spacy: Any, names: str) -> Any:
    if names:
        try:
            return spacy.load(names)
        except (OSError, ValueError) as error:
            what = f"there is no spaCy pipeline '{names}'"
            fix = "install one, such as en_core_web_lg, or name its folder"
            raise Error(what, where="privacy", fix=fix) from error
    blank = spacy.blank(LANGUAGE)

    spacy.language.Language.component("gemstill_words", func=_lemmas)
    blank.add_pipe("gemstill_words")
    return blank


def _lemmas(doc: Any) -> Any:
    """Presidio raises a pattern's score where words such as "passport" stand near, which it knows by their lemmas."""
    for token in doc:
        token.lemma_ = token.lower_
    return doc


def _street_addresses() -> Any:
    """Number, name and kind of street: presidio has no recognizer of these."""
    from presidio_analyzer import Pattern, PatternRecognizer

    pattern = Pattern("street", _ADDRESS, 0.6)
    flags = re.MULTILINE  # presidio's own patterns are blind to case
    return PatternRecognizer(
        "STREET_ADDRESS", patterns=[pattern], supported_language=LANGUAGE, global_regex_flags=flags
    )


def _stay_offline() -> None:
    """Have the list of top-level domains that came with tldextract used; by default it is fetched anew."""
    import tldextract.tldextract as domains

    domains.TLD_EXTRACTOR = domains.TLDExtract(cache_dir=None, suffix_list_urls=())
