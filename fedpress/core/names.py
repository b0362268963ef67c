"""Names that travel through many rooms: who a client is."""

from typing import TypeAlias

ClientId: TypeAlias = str
