from __future__ import annotations

import sys
from typing import Any

import pytest

from anabranch.cli.main import main


def call(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["anabranch", *arguments])
    monkeypatch.delenv("ANABRANCH_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: call([str(word) for word in arguments], monkeypatch, capsys)
