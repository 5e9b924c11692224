"""A policy refuses what cannot be meant, says what to do instead, and survives JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sere.checks import told
from sere.policy import STOCK, Policy, PolicyError
from sere.results.names import check_names

FULL: dict[str, Any] = {
    "S": 1,
    "rho": 0.0,
    "rho_quantile": 0.25,
    "tau": None,
    "min_active": 3,
    "max_active": 9,
    "pool": 0.5,
    "fill": "similar",
    "rank": None,
    "weights": "scale",
    "rows": "all",
    "layers": {4: {"S": 3, "rho": 0.5}, 0: {"max_active": None}},
    "batches": {32: {"S": 2, "layers": {4: {"S": 4}}}, 8: None},
}


def test_round_trip_keeps_every_field() -> None:
    policy = Policy(**FULL)
    assert {field.name for field in dataclasses.fields(Policy)} == set(FULL)  # none left out above
    assert policy != Policy()
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.to_dict()["layers"] == {"0": {"max_active": None}, "4": {"S": 3, "rho": 0.5}}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rhoo": 0.1}, "did you mean 'rho'"),
        ({"s": 1}, "did you mean 'S'"),
        ({"max_activ": 8}, "did you mean 'max_active'"),
        ({"xyzzy": 1}, "known keys: S, rho"),
        ({"rho": "high"}, "rho='high'.*number"),
        ({"rho": True}, "rho=True"),
        ({"rho": math.nan}, "rho=nan"),
        ({"rho": -0.1}, "rho=-0.1.*>= 0"),
        ({"rho_quantile": 1}, "rho_quantile=1: expected a share.*0 <= share < 1"),
        ({"rho_quantile": "half"}, "rho_quantile='half'"),
        ({"rho_quantile": -0.1}, "rho_quantile=-0.1"),
        ({"tau": -0.1}, "tau=-0.1: expected a loss"),
        ({"tau": True}, "tau=True"),
        ({"tau": 0, "rho": 0.3}, "rho=0.3 and tau=0: give one threshold"),
        ({"tau": 0.1, "rho_quantile": 0.3}, "give one threshold"),
        ({"tau": 0.02, "rho_quantile": 0}, "rho_quantile=0 and tau=0.02: give one threshold"),
        ({"layers": {3: {"tau": 0, "rho_quantile": 0}}}, "rho_quantile=0 and tau=0: give one"),
        ({"fill": "nearest"}, "fill='nearest': expected one of similar, error, linear, constant"),
        ({"fill": "linear", "rho": 0.3}, 'fill="linear" looks at none: use tau instead'),
        ({"fill": "constant", "rho_quantile": 0}, 'fill="constant" looks at none'),
        ({"fill": "linear", "weights": "scale"}, "none does: leave weights out"),
        ({"layers": {3: {"fill": "linear"}}, "weights": "scale"}, "leave weights out"),
        ({"rank": 8}, 'rank=8 is for fill="linear"'),
        ({"fill": "constant", "rank": 8}, 'rank=8 is for fill="linear"'),
        ({"fill": "linear", "rank": 0}, "rank=0: expected a whole number >= 1"),
        ({"weights": "renormalise"}, "expected one of keep, scale"),
        ({"fill": "error", "rho": 0.3}, "use tau instead"),
        ({"rho": 0.3, "rho_quantile": 0.5}, "give one threshold, not several"),
        ({"S": 0}, "S=0.*>= 1"),
        ({"S": True}, "S=True"),
        ({"S": "2"}, "S='2'.*whole number"),
        ({"S": None}, "S=None"),
        ({"S": 1.0}, "S=1.0"),
        ({"min_active": 0}, "min_active=0"),
        ({"max_active": -1}, "max_active=-1"),
        ({"min_active": 9, "max_active": 8}, "lower min_active or raise max_active"),
        ({"rows": "prefill"}, 'rows=.*"decode" or "all"'),
        ({"layers": [1, 2]}, "layers="),
        ({"layers": {"-1": {"S": 1}}}, "'-1' is not a decoder layer index"),
        ({"layers": {"all": {"S": 1}}}, "'all' is not a decoder layer index"),
        ({"layers": {3: 2}}, r"layers\[3\]=2"),
        ({"layers": {3: {"s": 2}}}, r"layers\[3\]: unknown key 's'"),
        ({"layers": {3: {"rows": "all"}}}, r"layers\[3\]: unknown key 'rows'"),
        ({"layers": {3: {"rho": -1}}}, "rho=-1"),
        ({"max_active": 8, "layers": {3: {"min_active": 9}}}, "exceeds max_active"),
        ({"batches": [8]}, r"batches=\[8\]"),
        ({"batches": {0: {"S": 1}}}, "0 is not a number of rows"),
        ({"batches": {"08": None}}, "'08' is not a number of rows"),
        ({"batches": {8: 1}}, r"batches\[8\]=1: expected settings"),
        ({"batches": {8: {"rho": 0.5}}}, r"batches\[8\]: unknown key 'rho'"),
        ({"batches": {8: {"tau": 0.1}}}, "give the policy a tau"),
        ({"tau": 0.1, "batches": {8: {"tau": None}}}, "expected a number"),
        ({"tau": 0.1, "batches": {8: {"tau": 9}}}, "tau=9"),
        ({"batches": {8: {"layers": {1: {"fill": "error"}}}}}, "unknown key 'fill'"),
        ({"batches": {8: {"layers": [1]}}}, "layers="),
    ],
)
def test_nonsense_is_refused_with_the_remedy(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Policy.from_dict(settings)


@pytest.mark.parametrize("text", ["{S: 2}", "[1]", '"S"', "", '{"S": 1, "S": 2}'])
def test_json_that_holds_no_policy_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="policy"):
        Policy.from_json(text)


@pytest.mark.parametrize("name", [5, "two\nlines"])
def test_a_name_is_a_line_of_text(name: Any) -> None:
    with pytest.raises(PolicyError, match="expected a line of text"):
        check_names(["stock", name])


def test_a_layer_takes_its_overrides_and_the_rest_from_the_policy() -> None:
    policy = Policy(**FULL)
    flat = dataclasses.replace(policy, layers={}, batches={})
    assert policy.for_layer(4) == dataclasses.replace(flat, S=3, rho=0.5, rho_quantile=None)
    assert policy.for_layer(0) == dataclasses.replace(flat, max_active=None)
    assert policy.for_layer(7) == flat


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"S": 5}, "S=5 exceeds the 4 experts per token.*S=4 to switch re-routing off"),
        ({"max_active": 3}, "max_active=3 is below min_active=4.*raise max_active or set min"),
        ({"max_active": 17}, "max_active=17 exceeds this model's 16 experts"),
        ({"layers": {2: {"S": 6}}}, r"layers\[2\]: S=6"),
        ({"batches": {8: {"S": 6}}}, r"batches\[8\]: S=6"),
    ],
)
def test_a_policy_that_does_not_fit_the_model(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Policy(**settings).check_against(K=4, E=16)


def test_the_limits_themselves_fit_the_model() -> None:
    Policy(S=4, max_active=16).check_against(K=4, E=16)
    Policy(S=1, min_active=1, max_active=1).check_against(K=4, E=16)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().S = 1  # type: ignore[misc]


def test_a_layers_own_threshold_takes_the_place_of_the_other_kind() -> None:
    policy = Policy(rho_quantile=0.5, layers={0: {"rho": 0.3}})
    assert (policy.for_layer(0).rho, policy.for_layer(0).rho_quantile) == (0.3, None)
    assert policy.for_layer(1).rho_quantile == 0.5
    other = Policy(rho=0.3, layers={0: {"rho_quantile": 0.5}})
    assert (other.for_layer(0).rho, other.for_layer(0).rho_quantile) == (0.0, 0.5)
    tolerant = Policy(tau=0.02, layers={0: {"rho": 0.3}, 1: {"tau": 0.1}})
    assert (tolerant.for_layer(0).rho, tolerant.for_layer(0).tau) == (0.3, None)
    assert (tolerant.for_layer(1).tau, tolerant.for_layer(2).tau) == (0.1, 0.02)
    with pytest.raises(PolicyError, match="not several"):
        Policy(layers={0: {"rho": 0.3, "rho_quantile": 0.5}})


def test_tau_brings_the_policies_of_error_along_unless_told_otherwise() -> None:
    paper, error = Policy(rho=0.3), Policy(tau=0.02)
    assert not (paper.fills_by_error or paper.scales or paper.needs_errors)
    assert error.fills_by_error and error.scales and error.needs_errors
    plain = Policy(tau=0.02, fill="similar", weights="keep")
    assert not (plain.fills_by_error or plain.scales) and plain.needs_errors


def test_a_batch_size_has_its_own_numbers_or_stock_routing() -> None:
    layers = {1: {"S": 3}, 2: {"tau": 0.5}}
    own = {"S": 2, "tau": 0.1, "layers": {2: {"tau": 0.7}}}
    policy = Policy(S=1, tau=0.02, layers=layers, batches={"8": own, "96": None})
    assert [policy.bucket(rows) for rows in (1, 7, 8, 95, 96, 300)] == [0, 0, 8, 8, 96, 96]
    assert policy.for_bucket(0) == dataclasses.replace(policy, batches={})
    assert policy.for_bucket(96) is None
    eight = policy.for_bucket(8)
    assert eight is not None and not eight.batches
    assert (eight.for_layer(0).S, eight.for_layer(0).tau) == (2, 0.1)
    assert (eight.for_layer(1).S, eight.for_layer(1).tau) == (3, 0.1)
    assert (eight.for_layer(2).S, eight.for_layer(2).tau) == (2, 0.7)
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.brief() == "S=1 tau=0.02 per layer by batch"
    assert policy.at(95) == eight and policy.at(300) is None


@pytest.mark.parametrize("K", [1, 4])
def test_stock_as_a_policy_fits_every_model(K: int) -> None:
    STOCK.check_against(K, 8)
    assert STOCK.is_stock and all(STOCK.at(rows) is None for rows in (1, 2, 500))
    assert not Policy(batches={8: None}).is_stock


def test_what_is_told_of_a_policy_is_all_of_it_and_no_threshold_that_another_replaces() -> None:
    for settings in ({"tau": 0.02}, {"rho_quantile": 0.5}, {"rho": 0.3}, {"S": 1}):
        policy = Policy(**settings)
        said = told(policy.to_dict())
        assert Policy.from_dict(said) == policy
        assert ("rho" in said) is not ("tau" in said or "rho_quantile" in said)
