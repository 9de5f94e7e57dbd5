"""Every broken adapter."""

from __future__ import annotations

from tests.corpus.answers import ANSWERS
from tests.corpus.broken import Broken
from tests.corpus.changes import CHANGES
from tests.corpus.claims import CLAIMS
from tests.corpus.configs import CONFIGS
from tests.corpus.files import FILES
from tests.corpus.places import PLACES
from tests.corpus.tensors import TENSORS
from tests.corpus.uploads import UPLOADS
from tests.corpus.weights import WEIGHTS

CORPUS: tuple[Broken, ...] = (
    *CONFIGS,
    *TENSORS,
    *WEIGHTS,
    *FILES,
    *PLACES,
    *CLAIMS,
    *CHANGES,
    *UPLOADS,
    *ANSWERS,
)
