"""Personal data are found, by kind and severity; what only looks like them is not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from gemstill.evaluation.privacy import LEVELS, NAMES, SEVERITY, Detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("write to maria.keller@example.org soon", "EMAIL_ADDRESS", "maria.keller@example.org"),
        ("card 4111 1111 1111 1111, expires", "CREDIT_CARD", "4111 1111 1111 1111"),
        ("to IBAN DE89370400440532013000 today", "IBAN_CODE", "DE89370400440532013000"),
        ("her social security number is 536-90-4399", "US_SSN", "536-90-4399"),
        ("call +1 212-555-0143 at noon", "PHONE_NUMBER", "+1 212-555-0143"),
        ("she lives at 14 Linden Street, Springfield", "STREET_ADDRESS", "14 Linden Street"),
        ("at 221b Baker St. in the fog", "STREET_ADDRESS", "221b Baker St"),
        ("from 203.0.113.77 at night", "IP_ADDRESS", "203.0.113.77"),
    ],
)
def test_each_kind_is_found(detector: Detector, text: str, kind: str, found: str) -> None:
    (one,) = detector.find(text)
    assert (one.kind, one.severity, one.text) == (kind, SEVERITY[kind], found)
    assert text[one.start :].startswith(found)


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112, expires",  # fails its checksum
        "In the year 1815 the 3 armies met, 25,000 men against 12,000.",
        "see section 4.2.1 of version 3.11.7, line 1024",
        "def area_12(width, height): return width * height + 12",
        "a road of 12 miles, and 3 days on the way",
        "Maria Keller went to Springfield",  # names need a spaCy pipeline
    ],
)
def test_what_only_looks_like_them_is_not(detector: Detector, text: str) -> None:
    assert detector.find(text) == []


def test_only_what_begins_behind_the_prompt_is_told(detector: Detector) -> None:
    text = "mail a.b@example.org or c.d@example.org"
    assert [one.text for one in detector.find(text)] == ["a.b@example.org", "c.d@example.org"]
    assert [one.text for one in detector.find(text, start=8)] == ["c.d@example.org"]


def test_names_are_found_by_a_pipeline(tmp_path: Path) -> None:
    spacy: Any = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Maria Keller"}])
    pipeline.to_disk(tmp_path / "names")
    (one,) = Detector(str(tmp_path / "names")).find("Maria Keller went to Springfield")
    assert (one.kind, one.text) == ("PERSON", "Maria Keller")


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert [one.kind for one in Detector().find("write to a.b@example.org")] == ["EMAIL_ADDRESS"]


def test_every_kind_has_a_level_and_a_recognizer(detector: Detector) -> None:
    assert set(SEVERITY.values()) == set(LEVELS)
    assert set(detector.kinds) | set(NAMES) == set(SEVERITY)
    assert set(detector.kinds) <= set(detector._analyzer.get_supported_entities("en"))
