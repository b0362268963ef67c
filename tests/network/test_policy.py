"""The policy file: its defaults, and what is said of a mistake in it."""

import hashlib
import ssl

import pytest

from fedpress.errors import PolicyError
from fedpress.network.policy import Policy, PrivacyRules, certificate_fingerprint, parse, read


def test_a_policy_that_says_nothing_asks_for_privacy_and_allows_no_code():
    assert parse("") == Policy()
    assert Policy().privacy == PrivacyRules()
    assert Policy().code == ()
    assert "central" not in PrivacyRules().trust


def test_every_key_has_a_meaning_and_an_example_that_is_allowed():
    for table in (Policy, PrivacyRules):
        for name, field in table.model_fields.items():
            assert field.description, name
            assert field.examples, name
            table.model_validate({name: field.examples[0]})


def test_privacy_can_be_given_up_by_a_word_alone():
    assert parse('privacy = "none"').privacy is None
    with pytest.raises(PolicyError, match=r'privacy: got .no.; write privacy = "none"'):
        parse('privacy = "no"')


@pytest.mark.parametrize(
    ("text", "line", "key", "cure"),
    [
        ("\nmin_cohort = 0", 2, "min_cohort", "write for instance min_cohort = 5"),
        ("min_chort = 3", 1, "min_chort", "did you mean 'min_cohort'?"),
        ("[privacy]\n\nmax_epsilon = -1", 3, "privacy.max_epsilon", "max_epsilon = 4.0"),
        ("min_cohort = 3\n[privacy]\nunits = 1", 3, "privacy.units", "did you mean 'unit'?"),
        ("privacy = { delta = 2 }", 1, "privacy.delta", "delta = 1e-05"),
        ("privacy.unit = 'row'", 1, "privacy.unit", 'unit = "sample"'),
        ('families = ["cnnn"]', 1, "families", "did you mean 'cnn'?"),
        ('code = ["nets"]', 1, "code", 'code = ["nets:Small"]'),
        ('server = "abc"', 1, "server", "openssl x509"),
        ("metrics = [\n  'accuracy',\n]", 1, "metrics", 'metrics = ["examples"]'),
    ],
)
def test_a_mistake_is_named_with_its_line_its_key_and_a_cure(text, line, key, cure):
    with pytest.raises(PolicyError) as found:
        parse(text)
    assert found.value.place == f"policy.toml:{line}: {key}"
    assert cure in str(found.value)


def test_text_that_is_no_toml_is_refused_with_its_line(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("a = 1\nb = \n")
    with pytest.raises(PolicyError, match=r"own\.toml: no TOML: .*line 2"):
        read(path)
    with pytest.raises(PolicyError, match="cannot be read"):
        read(tmp_path / "absent.toml")


def test_a_fingerprint_is_the_one_that_openssl_prints(tmp_path):
    der = bytes(range(200))
    path = tmp_path / "ca.pem"
    path.write_text("a comment\n" + ssl.DER_cert_to_PEM_cert(der))
    digits = hashlib.sha256(der).hexdigest()
    assert certificate_fingerprint(path) == digits
    colons = ":".join(digits[at : at + 2] for at in range(0, 64, 2)).upper()
    assert parse(f'server = "{colons}"').server == digits
    path.write_text("nothing")
    with pytest.raises(PolicyError, match="no certificate"):
        certificate_fingerprint(path)
