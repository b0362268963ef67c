"""Types of names that several folders use: the id of a client."""

from typing import TypeAlias

ClientId: TypeAlias = str
