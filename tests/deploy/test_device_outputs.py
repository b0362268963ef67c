"""Files for phones hold several outputs: names, structure and numbers are those of the model."""

import pytest
import torch
from torch import nn

from fedpress.deploy import FORMATS, Job, export, open_file, parity
from fedpress.deploy.outputs import NamedOutputs

PHONES = [name for name, row in FORMATS.items() if row.batch == 1]
SHAPE = (3, 6, 6)


class Heads(nn.Module):
    """A body with two heads; `nest` says how forward returns them."""

    def __init__(self, nest):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.sure, self.boxes, self.nest = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1), nest

    def forward(self, x):
        x = self.body(x)
        return self.nest(self.sure(x).flatten(1), self.boxes(x))


NESTS = {
    "dictionary": (lambda a, b: {"sure": a, "boxes": b}, ("sure", "boxes")),
    "none": (lambda a, b: {"z": a, "no": None, "a": [b]}, ("z", "a_0")),
    "twice": (lambda a, b: (b, (a, a)), ("output_0", "output_1_0", "output_1_1")),
    "whole numbers": (lambda a, b: [b.argmax(1), a], ("output_0", "output_1")),
    "list of one": (lambda a, b: [b], ("output_0",)),
}


def structure_of(found):
    """Returns found with the type of each leaf in place of it."""
    if isinstance(found, dict):
        return {key: structure_of(inner) for key, inner in found.items()}
    if isinstance(found, tuple | list):
        return tuple(structure_of(inner) for inner in found)
    return found is None


@pytest.fixture(params=PHONES)
def format(request):
    """A format for phones whose packages are installed."""
    if missing := FORMATS[request.param].missing():
        pytest.skip(missing)
    return request.param


@pytest.mark.deploy
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("kind", NESTS)
def test_a_file_gives_all_outputs_as_the_model_does(kind, integers, format, tmp_path):
    torch.manual_seed(0)
    nest, names = NESTS[kind]
    model, x = Heads(nest).eval(), torch.randn(12, *SHAPE)
    job = Job(SHAPE, batches=(x,) if integers else ())
    made = export(model, tmp_path / f"m{FORMATS[format].suffix}", format, job)
    session = open_file(made.path)
    assert session.outputs == names
    assert structure_of(session(x[:1].numpy())) == structure_of(model(x[:1]))
    program = made.program or model
    same = parity(program, made.path, x, tolerance=made.tolerance)
    assert same.examples == 12
    assert same.relative_error < (0.02 if integers else 1e-5)
    assert made.metadata.items() <= FORMATS[format].metadata(made.path).items()


def test_outputs_without_names_are_numbered():
    assert NamedOutputs.of_file({}, 1) == NamedOutputs(("logits",), 0)
    assert NamedOutputs.of_file({}, 2) == NamedOutputs(("output_0", "output_1"), [0, 1])


@pytest.mark.parametrize("kind", NESTS)
def test_what_is_written_into_a_file_is_read_again(kind):
    made = NamedOutputs.of_model(Heads(NESTS[kind][0]), SHAPE)
    assert made.names == NESTS[kind][1]
    assert NamedOutputs.of_file(made.metadata(), len(made.names)) == made
