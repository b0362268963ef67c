import pytest

from fedpress.core import consent
from fedpress.errors import ModelError

NAME = "lab.nets_of_consent:Small"


def test_consent_is_for_one_name_and_one_block():
    assert not consent.allowed(NAME)
    with consent.allowing([NAME]):
        consent.check(NAME, (), "spec.architecture")
        with consent.allowing("other:f"):
            assert consent.allowed(NAME)
        assert not consent.allowed("other:f")
        for near in (
            "lab.nets_of_consent:Smal",
            "lab.nets_of_consent:Small2",
            "nets_of_consent:Small",
        ):
            with pytest.raises(ModelError, match="allow_code"):
                consent.check(near, (), "spec.architecture")
    assert not consent.allowed(NAME)


def test_consent_ends_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), consent.allowing([NAME]):
        raise ZeroDivisionError
    assert not consent.allowed(NAME)


@pytest.mark.parametrize(
    "names", ["nets", ["nets"], ["a:b", ""], [3], ("a:b", "c:d "), "*:*", ["a:*"]]
)
def test_only_whole_names_can_be_allowed(names):
    with (
        pytest.raises(ModelError, match=r"allow_code: got .*expected package\.module:function"),
        consent.allowing(names),
    ):
        pass


def test_the_cure_names_the_argument_that_allows_the_function():
    with pytest.raises(ModelError, match=r"^m/spec.json: spec.architecture: names ") as caught:
        consent.check("nets:Net", (), "m/spec.json: spec.architecture")
    assert str(caught.value).endswith('add allow_code=("nets:Net",)')
