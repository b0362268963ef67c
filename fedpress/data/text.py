"""Reads texts as sequences of tokens for language models: the targets are the next tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data.classes import OTHER, rows_that_define_classes
from fedpress.data.examples import InputRows, Progress, SourceRows, TargetRows
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.data.settings import DataSettings
from fedpress.data.text_settings import TextSettings
from fedpress.data.vocabulary import CHARACTERS
from fedpress.errors import DataError
from fedpress.tasks.base import IGNORED

UNKNOWN = "<unknown>"
"""Name of token 0, which stands for tokens that are not in the vocabulary, and for padding."""
SPEAKER = "speaker"
"""`client_column = "speaker"`: each speaker of a play is a client."""
# A line such as "First Citizen:" after an empty line begins a speech. Other lines may end in a colon
# too, such as "Being vex'd a sea nourish'd with lovers' tears:".
SPEECH = re.compile(r"(?:\A|\n[ \t]*\n)([A-Z][^:\n]{0,60}):[ \t]*(?=\n|\Z)")
# A word, which may have apostrophes or hyphens inside, or one other visible character.
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
PADDING = -1
"""Token number of padding, before the vocabulary is known."""


def read_text(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns sequences of token numbers int64 [n, length], and as targets the tokens after them.

    The vocabulary is that of the public sequences, or the setting `classes`.

    Raises:
        DataError: if there is no text, it has another encoding, or a client has fewer than two
            tokens.
    """
    path = settings.path
    assert path is not None, "checked by DataSettings"
    texts, named = _texts(path, settings)
    number_of: dict[str, int] = {}
    parts: list[np.ndarray] = []
    owners: list[int] = []
    for owner, (name, documents) in enumerate(texts.items()):
        own = [_sequences(tokens_of(one, settings.text), number_of, settings) for one in documents]
        sequences = np.concatenate([*own, np.zeros((0, settings.text.length + 1), dtype=np.int64)])
        if not len(sequences):
            raise DataError(
                "fewer than two tokens, so there is none to predict",
                place=f"client '{name}' of '{path}'" if named else f"'{path}'",
                cure="give more text, or leave it out",
            )
        parts.append(sequences)
        owners += [owner] * len(sequences)
    rows = _TextRows(torch.from_numpy(np.concatenate(parts)), tuple(number_of), settings)
    count = len(rows.tokens)
    return SourceRows(
        path.stem,
        # The label of a text is none that rows could be dealt by.
        Arrays(torch.arange(count)[:, None], torch.zeros(count, dtype=torch.int64)),
        owners=torch.tensor(owners) if named else None,
        owner_names=tuple(texts) if named else (),
        targets=rows.targets,
        inputs=rows.inputs,
        default_task="language",
    )


@dataclass
class _TextRows:
    """The sequences of all clients.

    Attributes:
        tokens: int64 [n, length + 1]: position of each token in `words`, or `PADDING`.
        words: all tokens of all clients.
        settings: the `[data]` table of the recipe.
        names: the vocabulary, once it is known.
        number: int64 [words + 1]: number of each word in the vocabulary; the last is of padding.
    """

    tokens: Tensor
    words: tuple[str, ...]
    settings: DataSettings
    names: tuple[str, ...] = ()
    number: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def targets(self, public: Tensor) -> TargetRows:
        """Returns the next tokens int64 [n, length]; -100 for padding and unknown tokens."""
        names = self._vocabulary(public)
        most = self.settings.text.vocabulary
        if self.settings.statistics == "private" and most is not None and len(names) - 1 <= most:
            raise DataError(
                f"there are {len(names) - 1} candidates for a vocabulary of {most} tokens, so "
                "nothing needs to be asked",
                place="text.vocabulary",
                cure="give a smaller one, or leave statistics and the stage of this kind out",
            )
        position = {name: at for at, name in enumerate(names)}
        # Set here, because inputs and targets must have one vocabulary. The split asks for targets
        # first.
        self.names = names
        self.number = torch.tensor([*(position.get(word, 0) for word in self.words), 0])
        later = self.tokens[:, 1:]
        y = self.number[later]
        counted = later != PADDING
        if self.settings.unknown != OTHER:
            counted = counted & (y != 0)
        y = torch.where(counted, y, IGNORED)
        known = counted.any(1)
        if self.settings.unknown == "drop":
            known &= ((self.number[self.tokens] != 0) | (self.tokens == PADDING)).all(1)
        if not bool(known.any()):
            raise DataError(
                "no sequence has two tokens of the vocabulary",
                place=f"'{self.settings.path}'",
                cure="write the tokens of classes as they are in the text",
            )
        return TargetRows(y, names, known)

    def inputs(self, public: Tensor) -> InputRows:
        """Returns the tokens int64 [n, length]; 0 for padding and unknown tokens."""
        x = self.number[self.tokens[:, :-1]]
        settings = self.settings.text
        # A query has still to find the most frequent ones.
        if self.settings.statistics == "public":
            settings = settings.model_copy(update={"vocabulary": None})
        part = TextPart(settings, self.names, self.settings.unknown == OTHER)
        about = Preparation((), encoding=self.settings.encoding, part=part)
        return InputRows(x, torch.zeros(len(x), dtype=torch.bool), about)

    def _vocabulary(self, public: Tensor) -> tuple[str, ...]:
        """Returns the names of the token numbers, the first of which is `UNKNOWN`.

        With private statistics these are candidates, of which a query counts how frequent they are.
        """
        if self.settings.classes is not None:
            listed = tuple(name for name in self.settings.classes if name != UNKNOWN)
            return (UNKNOWN, *listed)
        asked_later = self.settings.statistics == "private"
        if asked_later and self.settings.text.tokens == "characters" and not len(public):
            return (UNKNOWN, *CHARACTERS)
        what = f"texts of '{self.settings.path}'"
        rows = rows_that_define_classes(public, len(self.tokens), self.settings, what)
        # A token that ends one sequence and begins the next is counted twice. Only the most
        # frequent ones could notice.
        seen = self.tokens[rows].flatten()
        counts = seen[seen != PADDING].bincount(minlength=len(self.words)).tolist()
        found = [at for at, count in enumerate(counts) if count]
        # Of equally frequent words the first in the alphabet is kept.
        found.sort(key=lambda at: (-counts[at], self.words[at]))
        kept = found if asked_later else found[: self.settings.text.vocabulary]
        return (UNKNOWN, *sorted(self.words[at] for at in kept))


def _texts(path: Path, settings: DataSettings) -> tuple[Mapping[str, list[str]], bool]:
    """Returns the texts of each client, and whether the data name the clients."""
    if path.is_dir():
        texts: dict[str, list[str]] = {}
        for child in sorted(path.iterdir()):
            if child.name.startswith("."):
                continue
            if child.is_dir():
                texts[child.name] = [
                    read_file(file, settings.encoding) for file in sorted(child.glob("*.txt"))
                ]
            elif child.suffix == ".txt":
                texts.setdefault(child.stem, []).append(read_file(child, settings.encoding))
        if not texts:
            raise DataError(
                f"no .txt file or folder in '{path}'",
                place="source 'text'",
                cure="expected client.txt, or client/text.txt",
            )
        return texts, True
    if not path.is_file():
        raise DataError(f"no such path '{path}'", place="source 'text'", cure="check the path")
    text = read_file(path, settings.encoding)
    if settings.client_column is None:
        return {"": [text]}, False
    if settings.client_column != SPEAKER:
        raise DataError(
            f"a text has no column '{settings.client_column}'",
            place="client_column",
            cure='write client_column = "speaker" for lines such as "ROMEO:", or give a folder '
            "with a file for each client",
        )
    return _speeches(text, path), True


def read_file(path: Path, encoding: str | None) -> str:
    """Returns the text of a file.

    Args:
        path: the file.
        encoding: its encoding; None: UTF-8.

    Raises:
        DataError: if the file cannot be read, or has another encoding.
    """
    try:
        return path.read_text(encoding or "utf-8-sig")
    except UnicodeError as error:
        raise DataError(
            f"not {encoding or 'UTF-8'}",
            place=f"'{path}'",
            cure='add its encoding to [data], such as encoding = "latin-1"',
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", place=f"'{path}'", cure="check its permissions"
        ) from error


def _speeches(text: str, path: Path) -> dict[str, list[str]]:
    """Returns what each speaker of a play says, as one text in the order of the play."""
    # split gives the text before the first speech, then speaker and speech in turn.
    parts = SPEECH.split(text)
    if len(parts) < 3:
        raise DataError(
            "it has no line that names a speaker",
            place=f"'{path}'",
            cure='expected lines such as "ROMEO:" before each speech, or leave client_column out',
        )
    found: dict[str, list[str]] = {}
    for name, speech in zip(parts[1::2], parts[2::2], strict=True):
        if speech.strip():
            found.setdefault(name, []).append(speech.strip() + "\n")
    return {name: ["".join(found[name])] for name in sorted(found)}


def tokens_of(text: str, settings: TextSettings) -> list[str]:
    """Returns the tokens of a text: its characters, or its words and marks.

    >>> tokens_of("Don't go.", TextSettings(tokens="words"))
    ["Don't", 'go', '.']
    """
    return list(text) if settings.tokens == "characters" else WORD.findall(text)


def _sequences(tokens: list[str], number_of: dict[str, int], settings: DataSettings) -> np.ndarray:
    """Returns int64 [n, length + 1]; the last token of a sequence is the first of the next.

    So every token but the first of a text is a target once.

    Args:
        tokens: the tokens of a text.
        number_of: number of each token; new tokens are added.
        settings: the `[data]` table of the recipe.
    """
    length = settings.text.length
    numbers = [number_of.setdefault(token, len(number_of)) for token in tokens]
    count = max(0, -(-(len(numbers) - 1) // length))
    padded = np.full(count * length + 1, PADDING, dtype=np.int64)
    padded[: len(numbers)] = numbers[: len(padded)]
    starts = np.arange(count)[:, None] * length
    found: np.ndarray = padded[starts + np.arange(length + 1)]
    return found
