"""The real client library, pointed at a test's own server in this process: it read its environment when it was imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub_server import Hub


def point_at(server: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    from huggingface_hub import constants

    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    for name, value in server.environment(home, token).items():
        monkeypatch.setenv(name, value)
