"""Synthetic run folders for the tests of the report: realistic numbers, written as the stages write them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LAYERS = ["stem", *(f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in range(2) for k in (1, 2))]
CLIENTS = [f"c{i}" for i in range(10)]


def write_run(
    path: Path,
    *,
    name: str = "cifar10-cpu",
    client: str = "c",
    clients: int = 10,
    private: bool = True,
) -> Path:
    """Writes a finished run: train, prune, train, federate, export."""
    ids = [f"{client}{i}" for i in range(clients)]
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.toml").write_text(
        f'# {name}\nname = "cifar10"\n\n[[stage]]\nkind = "train"\nepochs = 7\n', encoding="utf-8"
    )
    records = [
        *train(0, "train", 7, 0.941),
        prune(1),
        *train(2, "fine-tune", 10, 0.939),
        *federate(3, ids, private),
    ]
    write_json(
        path / "settings.json",
        {"name": name, "seed": 1, "stage": [{"kind": "train", "epochs": 7}, {"kind": "prune"}]},
    )
    write_json(path / "environment.json", environment(name))
    write_json(path / "result.json", result(name, ids, private))
    charge = {
        "what": "federate",
        "sampling_prob": 0.1,
        "noise_multiplier": 1.02,
        "steps": 200,
        "first_round": 1,
    }
    charges = [{"who": c, **charge, "last_round": 20} for c in ids]
    write_json(path / "ledger.json", {"version": 1, "unit": "sample", "charges": charges})
    (path / "records.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def environment(name: str) -> dict[str, Any]:
    versions = {"fedpress": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu"}
    command = f"fedpress run {name} --data data --out runs/x"
    return {
        **versions,
        "machine": "Linux x86_64, 2 cores",
        "commit": "b7e1e51c0ffee",
        "command": command,
    }


def train(stage: int, name: str, epochs: int, last: float) -> list[dict[str, Any]]:
    sizes = [16 if e < 0.45 * epochs else 24 if e < 0.75 * epochs else 32 for e in range(epochs)]
    return [
        {
            "stage": stage,
            "kind": "train",
            "name": name,
            "epoch": e + 1,
            "epochs": epochs,
            "loss": 0.5 + 1.4 * math.exp(-e / 2),
            "accuracy": last - 0.55 * math.exp(-e / 1.8) * (1 - e / epochs),
            "image_size": sizes[e],
            "seconds": 300.0 * (e + 1),
        }
        for e in range(epochs)
    ]


def prune(stage: int) -> dict[str, Any]:
    widths = [64] + [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    kept = [int(w * (0.85 - 0.03 * i)) // 8 * 8 for i, w in enumerate(widths)]
    layers = [
        {"name": n, "before": b, "after": a} for n, b, a in zip(LAYERS, widths, kept, strict=True)
    ]
    return {
        "stage": stage,
        "kind": "prune",
        "name": "prune",
        "layers": layers,
        "accuracy_cut": 0.21,
        "accuracy_restored": 0.74,
    }


def federate(stage: int, ids: list[str], private: bool, rounds: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "kind": "federate",
            "name": "federate",
            "round": r,
            "num_rounds": rounds,
            "accuracy": 0.934 + 0.004 * (1 - math.exp(-r / 6)),
            "loss": 0.31 - 0.001 * r,
            "bytes_up": 13_412_000 * len(ids),
            "bytes_down": 13_409_000 * len(ids),
            "epsilon": 1.4 + 6.5 * math.sqrt(r / rounds) if private else None,
            "clients": [
                {"client": c, "examples": 600, "update_norm": 1.2, "steps": 10} for c in ids
            ],
            "seconds": 61.5,
        }
        for r in range(1, rounds + 1)
    ]


def result(name: str, ids: list[str], private: bool) -> dict[str, Any]:
    dense: dict[str, Any] = {
        "parameters": 11_173_962,
        "macs": 556_651_520,
        "file_bytes": 44_760_000,
        "latency_ms": 13.2,
        "runtime": "torch",
    }
    dense["runtime"] = "torch"
    small: dict[str, Any] = {
        "parameters": 3_351_234,
        "macs": 168_001_000,
        "file_bytes": 13_430_000,
        "latency_ms": 4.6,
        "runtime": "torch",
    }
    small["runtime"] = "torch"
    privacy = {
        "unit": "sample",
        "epsilon": 7.9,
        "delta": 1e-5,
        "noise_multiplier": 1.02,
        "clip_norm": 1.0,
    }
    none = {
        "unit": "none",
        "epsilon": None,
        "delta": None,
        "noise_multiplier": None,
        "clip_norm": None,
    }
    federated = {
        "rounds": 20,
        "clients": len(ids),
        "accuracy_before": 0.9301,
        "bytes_up": 13_412_000 * len(ids) * 20,
        "bytes_down": 13_409_000 * len(ids) * 20,
        "client_accuracy": {}
        if private
        else {c: 0.90 + 0.06 * (i * 7 % 10) / 10 for i, c in enumerate(ids)},
        "stopped": None,
        **(privacy if private else none),
    }
    stages = [
        {
            "kind": "train",
            "name": "train",
            "seconds": 2450.0,
            "accuracy": 0.9385,
            "loss": 0.24,
            **dense,
        },
        {
            "kind": "prune",
            "name": "prune",
            "seconds": 41.0,
            "accuracy": 0.7431,
            "loss": 0.91,
            **small,
        },
        {
            "kind": "train",
            "name": "fine-tune",
            "seconds": 1490.0,
            "accuracy": 0.9301,
            "loss": 0.27,
            **small,
        },
        {
            "kind": "federate",
            "name": "federate",
            "seconds": 1230.0,
            "accuracy": 0.9312,
            "loss": 0.27,
            **small,
            **federated,
        },
        {
            "kind": "export",
            "name": "export",
            "seconds": 9.3,
            "accuracy": 0.9312,
            "loss": 0.27,
            **small,
            "file_bytes": 13_520_000,
        }
        | {
            "latency_ms": 2.1,
            "runtime": "onnxruntime",
            "artifact": "artifacts/model.onnx",
            "parity": 3.1e-6,
        },
    ]
    return {
        "recipe": name,
        "version": "0.1.0",
        "seed": 1,
        "seconds": 5220.3,
        "stages": stages,
        "final": stages[-1],
    }
