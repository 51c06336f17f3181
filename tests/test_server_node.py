"""Clients for Node against the demo model: OpenAI's, and the AI SDK of Vercel. `make node` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from asked_pictures import MODEL, SEEDS, describes
from server_helpers import eventually

SCRIPTS = Path(__file__).with_name("node")
INSTALLED = SCRIPTS.parents[1] / ".venv" / "node"


def printed(script: str, server: Any) -> dict[str, Any]:
    """What a script prints. Its modules are looked for in the working directory."""
    if shutil.which("node") is None:
        pytest.skip("there is no node here")
    if not (INSTALLED / "node_modules").is_dir():
        pytest.skip("the clients for node are not installed (make node)")
    done = subprocess.run(
        ["node", "--input-type=module", "-", server.url, MODEL],
        input=(SCRIPTS / script).read_text(),
        cwd=INSTALLED,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openai(demo_server):
    found = printed("openai.mjs", demo_server)
    (choice,) = found["whole"]["choices"]
    text = choice["message"]["content"]
    assert describes(text, SEEDS[0]) and choice["finish_reason"] == "stop"
    assert found["text"] == found["helped"] == text and found["models"] == [MODEL]
    assert found["type"] == "application/json"
    assert found["usage"]["completion_tokens"] == found["whole"]["usage"]["completion_tokens"]
    assert found["parsed"]["kind"] in ("circle", "square")
    assert found["reason"] == "tool_calls"
    for call in (found["call"], found["streamedCall"]):
        assert call["name"] == "look" and call["parsed_arguments"]["place"] in ("left", "right")
    assert found["error"] == {
        "kind": "BadRequestError",
        "status": 400,
        "param": "top_p",
        "code": "invalid_request",
    }
    assert found["chunks"] < 50
    eventually(lambda: demo_server.metrics()["requests_open"] == 0)


def test_the_ai_sdk(demo_server):
    found = printed("ai_sdk.mjs", demo_server)
    text = found["whole"]["text"]
    assert describes(text, SEEDS[0]) and found["whole"]["reason"] == "stop"
    assert found["text"] == text
    for usage in (found["usage"], found["whole"]["usage"]):
        assert usage["inputTokens"] + usage["outputTokens"] == usage["totalTokens"]
    assert found["output"]["kind"] in ("circle", "square")
    for call in (found["call"], found["streamedCall"]):
        assert call["name"] == "look" and call["input"]["place"] in ("left", "right")
    error = found["error"]
    assert error["name"] == "AI_APICallError" and error["status"] == 400
    assert "top_p must be" in error["message"]
    assert found["parts"][-1] == "abort" and found["parts"].count("text-delta") < 50
    eventually(lambda: demo_server.metrics()["requests_open"] == 0)
