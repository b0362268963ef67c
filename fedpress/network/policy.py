"""A data owner's policy: a TOML file that lists allowed servers, models and privacy promises."""

from __future__ import annotations

import hashlib
import re
import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
)

from fedpress.core import consent
from fedpress.core.settings import SETTINGS
from fedpress.errors import PolicyError, SettingError, suggestion
from fedpress.models import ARCHITECTURES, NETWORKS

Measure = Literal["loss", "examples", "score"]
"""Values that a client may send besides its updates, see `Policy.metrics`."""


def _fingerprint(text: str) -> str:
    """Returns a fingerprint as 64 lower-case hexadecimal digits.

    Accepts what openssl prints: upper case, with colons, with "sha256:" before it.
    """
    digits = text.removeprefix("sha256:").removeprefix("SHA256:").replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise SettingError(
            f"got {text[:80]!r}, expected a SHA-256 fingerprint (64 hexadecimal digits)",
            cure="print it with: openssl x509 -in ca.pem -noout -fingerprint -sha256",
        )
    return digits


def _families(names: tuple[str, ...]) -> tuple[str, ...]:
    """Checks that all names are architectures of fedpress."""
    for name in names:
        if name not in ARCHITECTURES:
            known = f"use some of {', '.join(NETWORKS)}; own functions go into the key code"
            raise SettingError(
                f"there is no '{name}'", cure=suggestion(name, list(ARCHITECTURES), known)
            )
    return names


def _code(names: tuple[str, ...]) -> tuple[str, ...]:
    """Checks that all names have the form `package.module:function`."""
    for name in names:
        if not consent.NAME.fullmatch(name):
            raise SettingError(
                f"got {name[:80]!r}, expected package.module:function",
                cure='write for instance code = ["nets:Small"]',
            )
    return names


def _no_privacy(value: Any) -> Any:
    """Converts the word "none" to None, because TOML has no null value."""
    if value == "none":
        return None
    if isinstance(value, str):
        raise SettingError(
            f"got {value[:80]!r}",
            cure='write privacy = "none", or a section [privacy] with its own keys',
        )
    return value


class PrivacyRules(BaseModel):
    """The section `[privacy]`: which differential privacy every run must promise."""

    model_config = SETTINGS

    unit: Literal["sample", "client"] = Field(
        default="sample",
        description="what must be protected: single rows (a promise about all rows of a client "
        "counts too), or all rows of this client together",
        examples=["sample"],
    )
    trust: tuple[Literal["local", "distributed", "central"], ...] = Field(
        default=("local", "distributed"),
        min_length=1,
        description="who may add the noise: each client, the clients together under a secure sum, "
        "or the server, which must then be trusted with updates without noise",
        examples=[["local", "distributed"]],
    )
    max_epsilon: float = Field(
        default=8.0, gt=0, description="largest epsilon that one recipe may spend", examples=[4.0]
    )
    total_epsilon: float = Field(
        default=8.0,
        gt=0,
        description="largest epsilon of all recipes and servers together on the same data",
        examples=[8.0],
    )
    delta: float = Field(
        default=1e-5, gt=0, lt=1, description="delta of both epsilons", examples=[1e-5]
    )
    secure_noise: bool = Field(
        default=True,
        description="whether noise and keys must come from the operating system; the server can "
        "compute noise and keys that follow from the seed",
        examples=[True],
    )


class Policy(BaseModel):
    """What a data owner allows. A key that is missing in the file has its default.

    Example: `min_cohort = 5` alone allows all models, but only rounds with at least 5 clients.
    """

    model_config = SETTINGS

    server: Annotated[str, AfterValidator(_fingerprint)] | None = Field(
        default=None,
        description="SHA-256 fingerprint of the CA's or the server's certificate that this client "
        "is started with; without it every server that TLS accepts is allowed",
        examples=["sha256:" + 32 * "0a"],
    )
    families: Annotated[tuple[str, ...], AfterValidator(_families)] = Field(
        default=tuple(ARCHITECTURES),
        description="architectures of models that may be trained here",
        examples=[["cnn", "mlp"]],
    )
    max_parameters: int | None = Field(
        default=None, ge=1, description="largest number of values in a model", examples=[1_000_000]
    )
    min_cohort: int = Field(
        default=2,
        ge=1,
        description="smallest number of clients in a run, a round, and a secure sum",
        examples=[5],
    )
    secure_sum: bool = Field(
        default=False,
        description="whether the server may only learn the sum of all updates",
        examples=[True],
    )
    rounds_per_day: int | None = Field(
        default=None,
        ge=0,
        description="largest number of rounds answered in 24 hours on the same data, in all runs",
        examples=[100],
    )
    metrics: tuple[Measure, ...] = Field(
        default=("loss", "examples", "score"),
        description="measures that may leave, where the recipe's privacy does not forbid them "
        "anyway: the training loss, the number of examples, the score of a model on the "
        "owner's examples",
        examples=[["examples"]],
    )
    require_approval: bool = Field(
        default=False,
        description="whether the client takes part only in recipes that the owner has approved "
        "with fedpress client approve",
        examples=[True],
    )
    code: Annotated[tuple[str, ...], AfterValidator(_code)] = Field(
        default=(),
        description="functions (module:function), installed here, that may build a model",
        examples=[["nets:Small"]],
    )
    privacy: Annotated[PrivacyRules | None, BeforeValidator(_no_privacy)] = Field(
        default=PrivacyRules(),
        description='what every run must promise; "none" also allows runs that promise nothing',
        examples=["none"],
    )


def read(path: Path) -> Policy:
    """Reads a policy from a TOML file.

    Raises:
        PolicyError: if the file cannot be read, or a key is wrong. The error names the line.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"cannot be read ({error})", place=path, cure="give the policy's file"
        ) from error
    return parse(text, place=str(path))


def parse(text: str, *, place: str = "policy.toml") -> Policy:
    """Reads a policy from text.

    Args:
        text: content of a policy file, in TOML.
        place: name of the file, for errors.

    Raises:
        PolicyError: if the text is not TOML, or a key is wrong. The error names the line.

    >>> parse('min_cohort = 5').min_cohort, parse('privacy = "none"').privacy
    (5, None)
    >>> parse('famlies = ["cnn"]')
    Traceback (most recent call last):
        ...
    fedpress.errors.PolicyError: policy.toml:1: famlies: no such key; did you mean 'families'?
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(
            f"no TOML: {error}", place=place, cure='write lines such as: key = "value"'
        ) from error
    try:
        return Policy.model_validate(table)
    except ValidationError as error:
        raise _mistake(error, text, place) from error


def _mistake(error: ValidationError, text: str, place: str) -> PolicyError:
    """Converts one of pydantic's errors into a `PolicyError` with line and cure.

    This is the first error about an unknown key, or else the first error.
    """
    found = error.errors(include_url=False)
    # Unknown keys come first: a misspelled key is often the cause of the other errors.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    keys = [str(part) for part in first["loc"] if isinstance(part, str)]
    table: type[BaseModel] = PrivacyRules if keys[:1] == ["privacy"] and keys[1:] else Policy
    at = f"{place}:{_line(text, keys)}: {'.'.join(keys)}"
    if first["type"] == "extra_forbidden":
        known = list(table.model_fields)
        cure = suggestion(keys[-1], known) or f"the keys are {', '.join(known)}"
        return PolicyError("no such key", place=at, cure=cure)
    # An error of a validator of this file, which has its own cure.
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, SettingError):
        return PolicyError(raised.problem, place=at, cure=raised.cure)
    message = first["msg"]
    field = table.model_fields[keys[-1]]
    example = _in_toml((field.examples or [""])[0])
    return PolicyError(
        f"{message[0].lower()}{message[1:]}, got {str(first['input'])[:60]!r}",
        place=at,
        cure=f"write for instance {keys[-1]} = {example} ({field.description})",
    )


def _in_toml(value: Any) -> str:
    """Returns a value as it is written in a TOML file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_in_toml(one) for one in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _line(text: str, keys: list[str]) -> int:
    """Returns the number of the line that sets a key.

    If no line does, it is the line that begins the key's table; if there is none, 1.

    Args:
        text: the TOML file.
        keys: names of the tables and the key, such as `["privacy", "delta"]`.
    """
    # The text is searched because `tomllib` does not tell the lines of keys.
    above, last = keys[:-1], keys[-1]
    table: list[str] = []
    of_table = 1
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\]]*)\]", line)
        if header:
            table = [part.strip().strip("\"'") for part in header[1].split(".")]
            if table == keys:
                return number
            if table == above:
                of_table = number
            continue
        named = re.match(r"\s*([\w.\"'-]+)\s*=", line)
        if not named:
            continue
        path = [*table, *(part.strip("\"'") for part in named[1].split("."))]
        if path == keys or path == [*above, last]:
            return number
        # An inline table: `privacy = { max_epsilon = 1 }`.
        if above and path == above:
            of_table = number
    return of_table


def certificate_fingerprint(path: Path) -> str:
    """Returns the SHA-256 fingerprint of the first certificate in a PEM file.

    The result equals the output of `openssl x509 -noout -fingerprint -sha256`, in lower case and
    without colons.

    Raises:
        PolicyError: if the file contains no certificate.
    """
    try:
        text = path.read_text("ascii")
        begin = text.index(ssl.PEM_HEADER)
        end = text.index(ssl.PEM_FOOTER, begin) + len(ssl.PEM_FOOTER)
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text[begin:end])).hexdigest()
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"no certificate in PEM form ({error})",
            place=path,
            cure="give the file that the server's operator sent",
        ) from error
