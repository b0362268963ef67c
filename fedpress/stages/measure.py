"""The measure stage: measures latency and memory in every installed runtime, in float and int8."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field
from torch import nn

from fedpress import deploy, storage
from fedpress.compress import cost
from fedpress.core.inputs import Inputs
from fedpress.core.random_source import public_stream
from fedpress.core.settings import SETTINGS
from fedpress.deploy import FORMATS, Candidate, Job
from fedpress.deploy.examples import InputSpec, example_of, take_rows
from fedpress.stages.base import Stage
from fedpress.workspace.atomic import write_json
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Name, State, Tick


class MeasureStage(BaseModel, Stage):
    """`[[stage]] kind = "measure"`: writes latency, memory and share of peak speed to measure.json.

    The share of peak speed is the speed of a run / the largest speed that this machine allows.
    """

    changes_model: ClassVar = False
    repeats_measurements: ClassVar = True

    model_config = SETTINGS

    kind: Literal["measure"]
    name: Name = "measure"
    # A batch of 1 is what a device computes for one request; a batch of 64 shows the throughput.
    batches: tuple[int, ...] = Field((1, 64), min_length=1, description="batch sizes to time")
    # One thread for the cost of the model itself, two to see whether it can use more cores.
    threads: tuple[int, ...] = Field(
        (1, 2), min_length=1, description="numbers of threads to time with"
    )
    seconds: float = Field(
        1.0,
        gt=0,
        description="time of each measurement: one runtime, batch size and number of threads",
    )
    int8: bool = Field(
        True, description="measure int8 files as well; their ranges come from public examples"
    )

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Returns the installed runtimes; measures nothing."""
        installed = [row.runtime for row in FORMATS.values() if row.missing() is None]
        return state, {"runtimes": ["torch", *installed]}

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Exports the model to every format, and measures the files one after another."""
        yield Tick(0, 1, "measuring in every runtime")
        model = state.model.to("cpu")
        public = None
        if self.int8:
            stream = public_stream(state.seed, "measure", self.name)
            order = stream.permutation(len(state.data.public))
            # 64 examples are enough for ranges: the accuracy of these files is not measured.
            public = state.data.preprocess(state.data.public.take(order[:64]).x)
        found = measure_model(
            model,
            state.input_spec,
            file_bytes=storage.file_bytes(state.spec, model),
            calibration=(public,) if public is not None and len(public) else (),
            batches=self.batches,
            threads=self.threads,
            seconds=self.seconds,
        )
        write_json(folder.path / "measure.json", found)
        yield Tick(1, 1)
        return replace(state, model=model, facts={"measure": found})


def measure_model(
    model: nn.Module,
    given: InputSpec,
    *,
    file_bytes: int | None = None,
    calibration: Sequence[Inputs] = (),
    batches: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1, 2),
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Measures `model` in eager torch and in every installed runtime.

    Args:
        model: in train or eval mode; it is not changed.
        given: shape of one float32 example, or a batch of inputs such as token ids.
        file_bytes: size of the model's file; by default the size of its parameters and buffers.
        calibration: batches of standardised examples [n, *input_shape], for the ranges of int8. If
            there are none, only float files are measured.
        batches: batch sizes.
        threads: numbers of threads.
        seconds: time of each measurement.

    Returns:
        A dictionary. `parameters`, `macs`: costs of the model. `activations`: number of values that
        all layers output for one example. `runtimes`: the records of `deploy.measure`. `left_out`:
        name of an export that failed -> reason.
    """
    one = take_rows(example_of(given), 1)
    job = Job.of(given)
    macs = cost.macs(model, one)
    activations = cost.activations(model, one)
    # Measuring switches to eval mode, and the caller's model must not change.
    modes = [(module, module.training) for module in model.modules()]
    with tempfile.TemporaryDirectory() as folder:
        files, left_out = deploy.export_all(model, job, Path(folder), calibration=calibration)
        candidates = {"torch": Candidate(model, macs, activations, file_bytes=file_bytes)}
        for label, path in files.items():
            candidates[label] = Candidate(path, macs, activations, int8=label.endswith("int8"))
        try:
            records = deploy.measure(
                candidates, given, batches=batches, threads=threads, seconds=seconds
            )
        finally:
            for module, training in modes:
                module.training = training
    return {
        "parameters": cost.parameters(model),
        "macs": macs,
        "activations": activations,
        # Tuples become lists, as they will be when `measure.json` is read.
        "runtimes": json.loads(json.dumps(records)),
        "left_out": left_out,
    }
