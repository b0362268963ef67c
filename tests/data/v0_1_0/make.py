"""Made the files beside it, in an empty folder, with fedpress 0.1.0 (see README.md); kept to be read, not to be run.

Its imports are those of commit e7c6de5, and stand inside functions: whoever collects tests need not have them.
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROUNDING = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
RUNS = ("finished", "secure", "feedback", "sample", "rate")
KILLED = {
    "secure": ("tick", "round 3/4"),
    "feedback": ("client", 4),
    "sample": ("tick", "round 2/3"),
}
"""Before a round, or in the fourth when one of its two clients has answered."""
KEPT = ("finished", "secure", "feedback", "sample", "packed", "command")
PACKED = {
    "float": ("finished/stages/0-dense",),
    "int8": ("finished/stages/4-quantize",),
    "binary": ("finished/stages/0-dense", "weights=binary"),
    "ternary": ("finished/stages/0-dense", "weights=ternary"),
    "cluster": ("finished/stages/0-dense", "weights=cluster", "bits=3"),
    "mlp": ("secure/stages/0-train",),
}


def fedpress(*words: str, kill: str = "", tap: str = "") -> None:
    """Runs the command line in a process of its own; it kills itself where `KILLED` says, or notes messages."""
    command = [sys.executable, str(HERE / "make.py"), "cli", kill, tap, *words]
    done = subprocess.run(command, env=os.environ | ROUNDING, check=False)
    assert done.returncode == (-signal.SIGKILL if kill else 0), (words, done.returncode)


def cli(kill: str, tap: str, words: list[str]) -> None:
    """What the process does."""
    # ruff: noqa: I001 (names of then, some of which are gone)
    from fedpress import run
    from fedpress.cli import main
    from fedpress.federate import Client
    from fedpress.state import Tick

    execute, handle = run.execute, Client.handle
    told, wanted = KILLED.get(kill, ("", ""))
    seen: dict[str, tuple[str, bytes]] = {}
    answered = []

    def executed(*args, **named):
        for event in execute(*args, **named):
            if told == "tick" and isinstance(event, Tick) and event.note.startswith(wanted):
                os.kill(os.getpid(), signal.SIGKILL)
            yield event

    def handled(self, request):
        from fedpress.wire.message import unpack

        message = unpack(request)
        reply = handle(self, request)
        for data in (request, reply):
            one = unpack(data)
            later = "-later" if one.kind == "fit" and one.header["round"] > 1 else ""
            seen.setdefault(f"{tap}-{one.kind}{later}", data)
        if told == "client" and message.header.get("round") == wanted:
            answered.append(self.name)
            if len(answered) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return reply

    run.execute, Client.handle = executed, handled
    sys.argv = ["fedpress", *words]
    try:
        main()
    finally:
        if tap:
            page = {name: base64.b64encode(data).decode() for name, data in seen.items()}
            Path(f"{tap}.messages").write_text(json.dumps(page))


def digest(tensors) -> str:
    """BLAKE2b of named tensors: name, type, shape and bytes of each, in the order of the names."""
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        made.update(tensor.contiguous().numpy().tobytes())
    return made.hexdigest()


def short(outputs) -> list[list[float]]:
    """Logits with six places behind the point."""
    return [[round(value, 6) for value in row] for row in outputs.tolist()]


def numbers() -> None:
    """Opens everything once and notes what it gives."""
    import numpy as np
    import onnxruntime
    import torch
    from safetensors.torch import load_file
    from sklearn.datasets import load_digits

    from fedpress import storage
    from fedpress.wire.message import unpack

    pixels, labels = load_digits(return_X_y=True)
    raw = torch.from_numpy(np.round(pixels * (255 / 16)) / 255).float().view(-1, 1, 8, 8)
    page = {"models": {}, "files": {}, "runs": {}, "messages": {}}
    for path in sorted(
        [*Path().glob("*/stages/*/spec.json"), *Path().glob("packed/*.safetensors")]
    ):
        place = path.parent if path.name == "spec.json" else path
        spec, model = storage.load(place)
        x = (raw - spec.mean[0]) / spec.std[0]
        with torch.no_grad():
            out = model.eval()(x)
        if place.parts[0] not in KEPT:
            continue
        page["models"][str(place)] = {
            "tensors": digest(model.state_dict()),
            "outputs": short(out[:4]),
            "accuracy": (out.argmax(1).numpy() == labels).mean().item(),
            "quantized": len(spec.quantized),
            "sparse": len(spec.sparse),
        }
    for path in sorted(Path().glob("*/artifacts/*.onnx")):
        session = onnxruntime.InferenceSession(str(path))
        spec, _ = storage.load(path.parents[1])
        x = ((raw[:4] - spec.mean[0]) / spec.std[0]).numpy()
        page["files"][str(path)] = {
            "outputs": short(session.run(None, {session.get_inputs()[0].name: x})[0])
        }
    for name in ("finished", *(f"{name}-whole" for name in KILLED)):
        result = json.loads((Path(name) / "result.json").read_text())
        last = max((Path(name) / "stages").iterdir())
        told = ("accuracy", "loss", "parameters", "epsilon", "bytes_up", "bytes_down", "rounds")
        page["runs"][name.removesuffix("-whole")] = {
            "tensors": digest(load_file(last / "model.safetensors")),
            **{key: result["final"][key] for key in told if key in result["final"]},
        }
    for name in RUNS:
        for kind, text in json.loads(Path(f"{name}.messages").read_text()).items():
            if kind.startswith(("sample", "rate-fit", "finished-fit-later")):
                continue  # of the same sort as others
            message = unpack(base64.b64decode(text))
            page["messages"][kind] = {
                "bytes": text,
                "kind": message.kind,
                "header": dict(message.header),
                "tensors": {
                    key: [str(t.dtype), list(t.shape), digest({key: t})]
                    for key, t in message.tensors.items()
                },
            }
    messages = page.pop("messages")
    Path("numbers.json").write_text(lines(page))
    Path("messages.json").write_text(lines({"messages": messages}))


def lines(page: dict) -> str:
    """JSON with a line for each thing."""
    parts = [
        f'"{part}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(about)}" for name, about in things.items())
        + "\n}"
        for part, things in page.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Makes all of it in the present folder."""
    for name in RUNS:
        shutil.copyfile(HERE / f"{name}.toml", f"{name}.toml")
        fedpress("run", f"{name}.toml", "--out", f"{name}-whole", tap=name)
        if name in KILLED:
            fedpress("run", f"{name}.toml", "--out", name, kill=name)
    shutil.move("finished-whole", "finished")
    for name, (model, *keys) in PACKED.items():
        if keys:
            fedpress("quantize", model, *keys, "--out", f"made-{name}")
            model = f"made-{name}"
        fedpress("pack", model, "--out", f"pack-{name}")
        Path("packed").mkdir(exist_ok=True)
        shutil.copyfile(
            f"pack-{name}/artifacts/model.packed.safetensors", f"packed/{name}.safetensors"
        )
    fedpress("prune", "packed/mlp.safetensors", "keep_params=0.7", "round_to=1", "--out", "command")
    numbers()
    for path in [*Path().glob("*/report.html"), *Path().glob("*/lock"), *Path().glob("*.messages")]:
        path.unlink()  # reports are drawn anew, a lock names a process that is dead
    for path in Path().iterdir():
        if path.is_dir() and path.name not in KEPT:
            shutil.rmtree(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cli"]:
        cli(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
