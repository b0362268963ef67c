"""What runtimes are told depends on the processor, and stands beside what was measured."""

import numpy as np
import pytest
import torch
from torch import nn

from fedpress import deploy
from fedpress.deploy import FORMATS, Job, Processor, this_processor
from fedpress.deploy.processor import FEATURES, OPTIONS, options_for

OLD = Processor("x86_64", "Haswell", 4, ("avx2",))
WIDE_OLD = Processor("x86_64", "Skylake-X", 4, ("avx2", "avx512"))
VNNI = Processor("AMD64", "Ice Lake", 4, ("avx2", "avx512", "avx512_vnni"))
CLIENT = Processor("x86_64", "Alder Lake", 4, ("avx2", "avx_vnni"))
AMX = Processor(
    "x86_64", "Sapphire Rapids", 4, ("avx2", "avx512", "amx_bf16", "amx_int8", "avx512_bf16")
)
ARM = Processor("aarch64", "Graviton 3", 4, ("dotprod", "i8mm", "bf16"))
EXACT = "session.x64quantprecision"


@pytest.mark.parametrize("processor", [OLD, WIDE_OLD, VNNI, CLIENT, AMX, ARM], ids=lambda p: p.name)
@pytest.mark.parametrize("wide", [False, True])
def test_exact_products_are_asked_for_where_they_would_overflow_and_only_there(processor, wide):
    overflows = processor in (OLD, WIDE_OLD)
    assert processor.overflows == overflows
    assert options_for("onnxruntime", wide=wide, processor=processor) == (
        {EXACT: "1"} if wide and overflows else {}
    )
    told = options_for("OpenVINO", wide=wide, processor=processor)
    assert ("LP_TRANSFORMS_MODE" in told) == (wide and overflows)
    assert told["INFERENCE_PRECISION_HINT"] == "f32", "else bfloat16 where the processor has it"
    assert told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0", (
        "else the inputs of packed weights are rounded"
    )


def test_every_row_is_of_a_known_runtime_and_says_why():
    runtimes = {row.runtime for row in FORMATS.values()}
    for row in OPTIONS:
        assert row.runtime in runtimes
        assert row.why


REAL = this_processor()


def test_this_processor_is_asked():
    here = this_processor()
    assert here.name
    assert here.cores >= 1
    assert set(here.features) <= set(FEATURES)
    if here.is_x86 and torch.cpu._is_avx512_supported():
        assert "avx512" in here.features
    if here.is_x86:
        assert torch.cpu._is_vnni_supported() == ("avx512_vnni" in here.features)


@pytest.mark.recipe
@pytest.mark.parametrize("processor", [OLD, VNNI], ids=lambda p: p.name)
def test_the_options_reach_the_session_and_stand_beside_latency_and_parity(
    tmp_path, monkeypatch, processor
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(64, 16)
    made = deploy.export(model, tmp_path / "m.onnx", "onnx", Job((16,), batches=(x,)))
    monkeypatch.setattr("fedpress.deploy.processor.this_processor", lambda: processor)
    session = deploy.open_file(made.path, threads=1)
    wanted = {EXACT: "1"} if processor is OLD else {}
    assert session.options == wanted
    assert np.isfinite(session(x.numpy())).all()
    # A processor that is only said to have VNNI gets sums wrong; here the options are looked at.
    tolerance = 10.0 if processor is VNNI and REAL.overflows else made.tolerance
    for found in (
        deploy.latency(made.path, (16,), seconds=0.01).conditions,
        deploy.parity(made.program, made.path, x, tolerance=tolerance).conditions,
    ):
        assert found["options"] == wanted
        assert found["processor"] == processor.name
        assert found["features"] == list(processor.features)
        assert found["version"]


@pytest.mark.recipe
def test_a_float_file_with_small_weights_is_compared_like_a_float_file(tmp_path):
    from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
    from fedpress.nn.quantized import quantize_layers_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    quantize_layers_(model, {"0": QuantizationScheme(weights=WeightQuantization(bits=4))})
    made = deploy.export(model, tmp_path / "m.onnx", "onnx", Job((64,)))
    assert made.tolerance == deploy.TOLERANCE
    made = deploy.export(
        model, tmp_path / "i.onnx", "onnx", Job((64,), batches=(torch.randn(8, 64),))
    )
    assert made.tolerance == deploy.ROUNDING
