"""The worked examples of docs/algorithms.md work as they stand."""

import re
from pathlib import Path

import pytest
import torch

from fedpress.codecs import Clip, Key
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, FedAvg, Guarantee, LocalSettings, Payload, Uplink
from fedpress.federation.gatherer import round_mean
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire import Message, pack, unpack
from tests.federation.algorithms.quadratics import Quadratics

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"
pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the pages are not part of an installed package"
)


def example(name):
    """Returns the class `name` of the page."""
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.S):
        if f"class {name}(" in block:
            space = {"__name__": "page"}
            exec(compile(block, str(PAGE), "exec"), space)
            if hasattr(space[name], "model_rebuild"):
                space[name].model_rebuild(_types_namespace=space)
            return space[name]
    raise AssertionError(f"no example {name}")


def test_the_algorithm_of_the_page_runs_and_equals_fedavg_where_all_take_as_many_steps():
    nova = Quadratics(example("FedNova")()).run(5)[-1].params
    torch.testing.assert_close(nova, Quadratics(FedAvg()).run(5)[-1].params)


def test_the_algorithm_of_the_page_is_charged_under_client_privacy():
    row, plan = example("FedNova"), PrivacyPlan("client", 1.0, 1.0, 2.0)
    with pytest.raises(RecipeError, match="'tau' has no clip_norm"):
        Quadratics(row(), privacy=plan)
    going = Quadratics(row(clip_norm=10.0), privacy=plan, settings=LocalSettings(epochs=3))
    assert going.uplink.vector_codecs[1].noise.plan.noise_std == pytest.approx(2.0 * 2**0.5 * 10.0)
    assert torch.isfinite(going.run(3)[-1].params).all()


def test_the_aggregator_of_the_page_takes_the_nearest_update():
    uplink = Uplink.bind(
        Payload(2, chain=(Clip(clip_norm=9.0),)),
        Cohort(6, 6),
        aggregator=example("Medoid")(),
        weights="equal",
    )
    sent = [[1.1, 1.0], [0.9, 1.0], [1.0, 1.0], [1.0, 1.1], [1.0, 0.9], [1e9, 0.0]]
    replies = [
        (f"c{i}", Message("update", {"round": 1, "examples": 1}, {"values": torch.tensor(x)}))
        for i, x in enumerate(sent)
    ]
    assert round_mean(uplink, replies, seed=1, round=1).update.tolist() == [1.0, 1.0]
    with pytest.raises(RecipeError, match="one client can change without limit"):
        Uplink.bind(
            Payload(2),
            Cohort(4, 4),
            aggregator=example("Medoid")(),
            weights="equal",
            guarantee=Guarantee(PrivacyPlan("client", 1.0, 1.0, 1.0)),
        )


def test_the_codec_of_the_page_halves_the_bytes():
    plain = Uplink.bind(Payload(4096), Cohort(2, 2))
    half = Uplink.bind(Payload(4096, chain=(example("Half")(),)), Cohort(2, 2))
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    sizes = []
    for uplink in (plain, half):
        data = pack(Message("update", {}, uplink.encode({"update": x}, Key(1, 1, "c"))))
        sizes.append(len(data))
        arrived = uplink.receive(unpack(data).tensors, Key(1, 1, "c"))["update"]
        torch.testing.assert_close(arrived, x, rtol=2**-8, atol=0)
    assert sizes[1] < 0.52 * sizes[0]
