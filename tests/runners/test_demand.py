"""What a request may demand of its runner, and when that means another load."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.runners.demand import NO_DEMAND, Demand


def a_model(trained: int = 0, **settings: object) -> Model:
    return Model("a", Path("/a.gguf"), ModelSettings.model_validate(settings), ModelDetails(context_length=trained))


def test_what_the_configuration_gives_already_is_no_demand() -> None:
    assert Demand(context=4096).within(a_model(context=8192)) is NO_DEMAND
    assert Demand(context=16384).within(a_model(context=8192)) == Demand(context=16384)
    assert Demand(context=4096, exact=True).within(a_model(context=8192)) == Demand(context=4096, exact=True)


def test_no_more_context_than_the_model_was_trained_for() -> None:
    assert Demand(context=10**6).within(a_model(trained=32768, context=8192)) == Demand(context=32768)
    assert Demand(context=10**6).within(a_model(trained=8192, context=8192)) is NO_DEMAND


def test_what_the_configuration_decides_no_request_changes() -> None:
    model = a_model(gpu_layers=10, flags={"t": 4, "mlock": True})
    assert Demand(gpu_layers=99, flags={"threads": 8}).within(model) is NO_DEMAND
    found = Demand(flags={"threads": 8, "batch-size": 256}).within(model)
    assert found == Demand(flags={"batch-size": 256})
    assert found.applied(model).settings.flags == {"t": 4, "mlock": True, "batch-size": 256}


def test_more_context_does_for_a_demand_that_is_not_exact() -> None:
    large = Demand(context=32768).applied(a_model(context=8192))
    assert large.context == 32768
    assert Demand(context=16384).is_met_by(large)
    assert not Demand(context=65536).is_met_by(large)
    assert not Demand(context=16384, exact=True).is_met_by(large)
    assert NO_DEMAND.is_met_by(large)


def test_flags_and_layers_are_met_by_the_same_alone() -> None:
    launched = Demand(gpu_layers=8, flags={"threads": 2}).applied(a_model())
    assert Demand(gpu_layers=8).is_met_by(launched)
    assert not Demand(gpu_layers=9).is_met_by(launched)
    assert not Demand(flags={"threads": 3}).is_met_by(launched)


demands = st.builds(
    Demand,
    context=st.none() | st.integers(1, 10**6),
    exact=st.booleans(),
    gpu_layers=st.none() | st.integers(0, 99),
    flags=st.dictionaries(st.sampled_from(["threads", "batch-size", "main-gpu"]), st.integers(0, 9)),
)


@given(demands, st.integers(0, 200_000), st.integers(0, 200_000))
def test_a_runner_loaded_for_a_demand_meets_it(demand: Demand, configured: int, trained: int) -> None:
    model = a_model(trained, context=configured)
    found = demand.within(model)
    assert found.is_met_by(found.applied(model))
    assert found.within(model) == found, "saying it twice changes nothing"


@given(demands, demands)
def test_joined_demands_are_both_met_by_the_one_that_wants_more(one: Demand, other: Demand) -> None:
    if one.joins(other):
        more = max(one, other, key=lambda demand: demand.context or 0)
        launched = more.applied(a_model(context=1))
        assert one.is_met_by(launched)
        assert other.is_met_by(launched)
