"""The fleet as tables: machines, workers, models, engines and problems."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rbee.cli.terminal import age, clean, console, size, table
from rbee.wire.fleet import Device, EngineReport, HiveView, ModelReport, Problem


def show_hives(hives: Sequence[HiveView]) -> None:
    """Print one line a machine, with why one cannot be reached."""
    table(
        ("hive", "state", "version", "devices", "models", "workers", "reported", "about"),
        (
            (
                h.hive,
                h.state,
                h.version,
                devices(h.devices),
                len(h.models),
                len(h.workers),
                f"{age(h.last_report_s)} ago" if h.last_report_s >= 0 else "never",
                h.reason,
            )
            for h in hives
        ),
    )


def show_workers(hives: Sequence[HiveView]) -> None:
    """Print one line a worker, with what keeps it from being ready."""
    table(
        (
            "worker",
            "hive",
            "model",
            "engine",
            "device",
            "state",
            "slots",
            "context",
            "memory",
            "port",
            "since",
            "about",
        ),
        (
            (
                w.name,
                h.hive,
                w.model,
                w.backend,
                w.device,
                w.state.value,
                w.slots,
                w.context_tokens or "",
                size(w.memory_bytes) if w.memory_bytes else "",
                w.port or "",
                age(time.time() - w.since) if w.since else "",
                w.reason or (f"{w.progress:.0%}" if w.state == "starting" and w.progress else ""),
            )
            for h in hives
            for w in h.workers
        ),
    )


def show_models(hives: Sequence[HiveView]) -> None:
    """Print one line a model and machine."""
    table(
        ("model", "hive", "format", "size", "parameters", "context", "quantization", "can", "about"),
        (
            (
                m.name,
                h.hive,
                m.format,
                size(m.size_bytes) if m.size_bytes else "",
                count(m.parameters),
                m.context_tokens or "",
                m.quantization,
                ", ".join(m.capabilities),
                m.problem or ("built in" if m.builtin else ""),
            )
            for h in hives
            for m in h.models
        ),
    )


def show_engines(engines: Sequence[EngineReport]) -> None:
    """Print one line an engine, with why one cannot be used."""
    table(
        ("engine", "version", "state", "can", "features", "formats", "devices", "about"),
        (
            (
                e.name,
                e.version,
                "fail" if e.problem else "ok",
                ", ".join(e.capabilities),
                ", ".join(e.features),
                ", ".join(e.formats),
                ", ".join(e.devices),
                e.problem or e.summary,
            )
            for e in engines
        ),
    )


def show_problems(problems: Sequence[Problem]) -> None:
    """Print what a person should know about."""
    out = console()
    for problem in problems:
        out.print(f"{clean(problem.where)}: {clean(problem.message)}", style="red")


def show_model(hive: str, model: ModelReport) -> None:
    """Print all that is known of one model."""
    facts = {
        "model": model.name,
        "hive": hive,
        "file": model.path,
        "format": model.format,
        "size": size(model.size_bytes) if model.size_bytes else "",
        "architecture": model.architecture,
        "parameters": count(model.parameters),
        "context": f"{model.context_tokens} tokens" if model.context_tokens else "",
        "quantization": model.quantization,
        "can": ", ".join(model.capabilities),
        "built in": "yes" if model.builtin else "no",
        "problem": model.problem,
    }
    out = console()
    for name, value in facts.items():
        if value:
            out.print(f"{name:<13} {clean(value)}")


def devices(found: Sequence[Device]) -> str:
    """Return the devices of a machine in a few words, with the free part of their memory."""
    return ", ".join(
        f"{d.kind} ({size(d.memory_free_bytes)} of {size(d.memory_total_bytes)} free)"
        if d.memory_total_bytes
        else d.kind
        for d in found
    )


def count(number: int) -> str:
    """Return a number of parameters as models are named by it: 1.1M, 8.0B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return str(number) if number else ""
