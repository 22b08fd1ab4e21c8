"""Stub models of judges: each records its inputs and answers with logits set by hand."""

from types import SimpleNamespace

import torch
from torch import nn


class StubClassifier(nn.Module):
    """A sequence classifier. ``logits_of`` maps a row's token ids, padding removed, to its logits."""

    def __init__(self, logits_of, pad=258, labels=None):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(pad_token_id=pad, id2label=labels or {}, _name_or_path="")
        self.logits_of, self.rows, self.batches = logits_of, [], []

    def forward(self, input_ids, attention_mask):
        assert not self.training
        self.batches.append(tuple(input_ids.shape))
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert (ids[mask == 0] == self.config.pad_token_id).all()
        self.rows += rows
        return SimpleNamespace(logits=torch.tensor([self.logits_of(row) for row in rows]))


class StubLM(nn.Module):
    """A causal LM. ``next_of`` maps a row's token ids, padding removed, to {token id: logit}. Others are -30."""

    def __init__(self, next_of, vocabulary=259):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(_name_or_path="", max_position_embeddings=None)
        self.next_of, self.vocabulary, self.rows, self.batches = next_of, vocabulary, [], []

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep):
        assert not self.training
        assert logits_to_keep == 1
        assert attention_mask[:, -1].all()
        self.batches.append(tuple(input_ids.shape))
        logits = torch.full((len(input_ids), 1, self.vocabulary), -30.0)
        for place, (ids, mask, positions) in enumerate(zip(input_ids, attention_mask, position_ids, strict=True)):
            row = ids[mask.bool()].tolist()
            assert positions[mask.bool()].tolist() == list(range(len(row)))
            assert positions.min() >= 0  # a position table has no negative rows
            self.rows.append(row)
            for token, value in self.next_of(row).items():
                logits[place, 0, token] = value
        return SimpleNamespace(logits=logits)


class StubWriter(nn.Module):
    """A causal LM that writes the token ids of ``answer_of(ids)``, one generate call per STRIDE tokens."""

    def __init__(self, answer_of, end=257):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(_name_or_path="", max_position_embeddings=None)
        self.answer_of, self.end, self.prompts = answer_of, end, []

    def generate(self, input_ids, attention_mask, generation_config, past_key_values=None):
        cache = past_key_values or StubCache(
            [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        )
        if past_key_values is None:
            self.prompts += cache.prompts
            cache.left = [[*self.answer_of(prompt), self.end] for prompt in cache.prompts]
        width = min(generation_config.max_new_tokens, max(map(len, cache.left)))
        new = [(tokens + [self.end] * width)[:width] for tokens in cache.left]
        cache.left = [tokens[width:] for tokens in cache.left]
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor(new)], dim=1), past_key_values=cache)


class StubCache:
    """The tokens that remain to be written. ``reorder_cache`` drops finished rows."""

    def __init__(self, prompts):
        self.prompts, self.left = prompts, []

    def reorder_cache(self, keep):
        self.left = [self.left[i] for i in keep]
