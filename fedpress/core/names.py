"""Types of names that many rooms use: the id of a client."""

from typing import TypeAlias

ClientId: TypeAlias = str
