"""Loads model files with the real engine in this process, one after the other, and says how each went.

Run as a child: `python formats_engine.py REPORT FILE...`. REPORT gets a line `begin FILE` before each load; then
`answered FILE`, `refused FILE` or, when the engine ends the process, nothing. The engine writes to stdout and stderr.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TOKEN = "formats-test"
REQUEST_GUARD_S = 60.0


def serve(path: Path, kind: str) -> Any:
    """Start the engine on a free loopback port; `kind` is chat, embedding or rerank."""
    import xllamacpp  # type: ignore[import-untyped]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.api_keys = [TOKEN]
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.ui = False
    if kind != "chat":
        parameters.embedding = True
        pooling = "MEAN" if kind == "embedding" else "RANK"
        parameters.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
    return xllamacpp.Server(parameters)


def ask(server: Any, path: str, body: dict[str, Any]) -> Any:
    """Send one request; an error answer is an answer too."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_GUARD_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        return {"status": refused.code, "error": refused.read().decode("utf-8", "replace")}


def main(report: Path, paths: list[str]) -> None:
    with report.open("a", encoding="utf-8", buffering=1) as lines:
        for name in paths:
            lines.write(f"begin {name}\n")
            lines.write(f"{try_one(Path(name))} {name}\n")


def try_one(path: Path) -> str:
    """Load one file and send it small requests of its kind, which stands before the suffix of its name."""
    kind = path.name.split(".")[-2]
    try:
        server = serve(path, kind)
    except RuntimeError:
        return "refused"
    if kind == "chat":
        ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi\n!"}], "max_tokens": 8})
        ask(server, "/v1/completions", {"prompt": "the bees é €", "max_tokens": 8, "temperature": 0})
    elif kind == "embedding":
        ask(server, "/v1/embeddings", {"input": ["the bees", "é €"]})
    else:
        ask(server, "/v1/rerank", {"query": "bees", "documents": ["the bees", "é €"]})
    return "answered"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
