"""Letters on pictures: those of this machine's fonts, and never empty boxes."""

from pathlib import Path

import matplotlib
import pytest

from cogvx.data import lettering
from cogvx.data.lettering import drawable, font, font_file, letters_of

DEJAVU = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
CHINESE = "\u732b\u5750"


@pytest.fixture
def no_other_font(monkeypatch):
    monkeypatch.setattr(lettering, "system_font", lambda letter: None)


def test_letters_without_a_font_are_written_out(no_other_font):
    assert drawable(f"a {CHINESE} cat") == "a \\u732b\\u5750 cat"
    assert drawable("\u043a\u043e\u0442, \u00e9t\u00e9") == "\u043a\u043e\u0442, \u00e9t\u00e9"
    assert Path(font(10, CHINESE).path) == DEJAVU


def test_a_font_of_this_machine_is_taken_when_it_has_more_of_the_letters(monkeypatch, tmp_path):
    """As a font for Chinese would: a copy of DejaVu that knows two letters more."""
    from fontTools.ttLib import TTFont

    with TTFont(DEJAVU) as file:
        for table in file["cmap"].tables:
            if table.isUnicode():
                table.cmap |= {ord(letter): "A" for letter in CHINESE}
        file.save(tmp_path / "more.ttf")
    monkeypatch.setattr(lettering, "system_font", lambda letter: tmp_path / "more.ttf")
    assert font_file("a cat") == DEJAVU and font_file(CHINESE) == tmp_path / "more.ttf"
    assert drawable(f"{CHINESE} cat") == f"{CHINESE} cat"
    assert Path(font(10, CHINESE).path) == tmp_path / "more.ttf"


def test_fontconfig_is_not_believed_when_its_font_has_not_the_letter(monkeypatch):
    lettering.system_font.cache_clear()
    monkeypatch.setattr(lettering.shutil, "which", lambda name: "fc-match")
    answer = type("Done", (), {"stdout": str(DEJAVU)})
    monkeypatch.setattr(lettering.subprocess, "run", lambda *given, **more: answer)
    assert lettering.system_font("\u732b") is None and lettering.system_font("a") == DEJAVU
    lettering.system_font.cache_clear()


def test_a_damaged_font_has_no_letters(tmp_path):
    (tmp_path / "bad.ttf").write_bytes(b"nothing")
    assert letters_of(tmp_path / "bad.ttf") == frozenset()
