"""Safety and utility regions against plain loops, planted sets, and models in files."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hftlight.analysis import regions
from hftlight.analysis.regions import Ranks, Regions, Sets, important_entries, important_ranks, shares
from hftlight.data.records import Record
from hftlight.data.tokens import Example
from hftlight.engine.weights.masks import pack
from hftlight.errors import InputError
from hftlight.evaluation.answering.generate import Answer
from tests.helpers.families import write_family
from tests.helpers.tiny_lm import tiny_lm
from tests.helpers.tokenizers import byte_tokenizer


def rows_of(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, 9), (3, 6), (5, 7)][:count]
    return [
        Example(str(n), "test", torch.randint(0, 48, (whole,), generator=generator).tolist(), prompt)
        for n, (prompt, whole) in enumerate(sizes)
    ]


ROWS = {"safety": rows_of(1), "utility": rows_of(2)}


def slow_top(model, rows, score, ratio):
    """Return the top entries of every linear layer's weight, from whole gradients and inputs of one row at a time."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    totals = dict.fromkeys(layers, 0.0)
    inputs = {name: [] for name in layers}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: inputs[n].append(x[0])) for n, m in layers.items()]
    for example in rows:
        ids = torch.tensor([example.input_ids])
        for seen in inputs.values():
            seen.append(None)
        logits = model(input_ids=ids).logits[0]
        own = range(example.prompt_length, len(example.input_ids))
        loss = -logits.log_softmax(-1)[[p - 1 for p in own], ids[0, list(own)]].mean()
        grads = torch.autograd.grad(loss, [m.weight for m in layers.values()])
        for (name, layer), grad in zip(layers.items(), grads, strict=True):
            if score == "snip":
                totals[name] = totals[name] + layer.weight.detach().abs() * grad.abs()
            else:
                totals[name] = totals[name] + inputs[name][-1][0, own.start :].square().sum(0)
    for hook in hooks:
        hook.remove()
    if score == "wanda":
        totals = {name: m.weight.detach().abs() * totals[name].sqrt() for name, m in layers.items()}
    masks = {}
    for name, values in totals.items():
        count = int(ratio * values.numel())
        mask = torch.zeros(values.numel(), dtype=torch.bool)
        mask[values.flatten().argsort(descending=True)[:count]] = True
        masks[f"{name}.weight"] = mask.view_as(values)
    return masks


@pytest.mark.parametrize("score", ["snip", "wanda"])
@pytest.mark.parametrize("memory", [1 << 31, 1])
def test_the_sets_are_those_of_whole_gradients_and_inputs(score, memory, monkeypatch):
    monkeypatch.setattr(regions, "MEMORY", memory)
    model = tiny_lm().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = important_entries(model, ROWS, score, 0.2, 0.1)
    safety, utility = (slow_top(model, ROWS[k], score, r) for k, r in (("safety", 0.2), ("utility", 0.1)))
    assert found.keys() == safety.keys()
    for name, sets in found.items():
        masks = sets.masks()
        assert torch.equal(masks["safety only"], safety[name] & ~utility[name])
        assert torch.equal(masks["utility only"], utility[name] & ~safety[name])
        overlap = sets.overlap()
        assert overlap.jaccard == pytest.approx(
            float((safety[name] & utility[name]).sum() / (safety[name] | utility[name]).sum())
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_same_rows_on_both_sides_leave_nothing_to_one_side():
    same = {"safety": ROWS["safety"], "utility": ROWS["safety"]}
    for sets in important_entries(tiny_lm().eval(), same, "snip", 0.2, 0.2).values():
        assert sets.overlap().jaccard == 1
        assert not any(mask.any() for mask in sets.masks().values())
    for ranks in important_ranks(tiny_lm().eval(), same, 0.25).values():
        assert_close(ranks.only("safety only"), torch.zeros_like(ranks.safety), rtol=0, atol=1e-5)


def test_ranks_are_the_leading_directions_of_the_outputs():
    model = tiny_lm().eval()
    found = important_ranks(model, ROWS, 0.25)
    layer, seen = model.model.layers[1].self_attn.q_proj, []
    hook = layer.register_forward_hook(lambda _, x, y: seen.append(y[0].detach()))
    for example in ROWS["safety"]:
        model(input_ids=torch.tensor([example.input_ids]))
        seen[-1] = seen[-1][example.prompt_length :]
    hook.remove()
    u = torch.linalg.svd(torch.cat(seen).T).U[:, :4]
    ours = found["model.layers.1.self_attn.q_proj.weight"].safety.double()
    assert_close(ours @ ours.T, u @ u.T, rtol=0, atol=1e-5)


def test_shares_of_entries_are_sums_inside_and_chance_is_the_size_of_the_set():
    safety = torch.tensor([[True, True, False], [False, False, False]])
    utility = torch.tensor([[False, True, True], [False, False, False]])
    sets = Sets(pack(safety), pack(utility), (2, 3))
    delta = torch.tensor([[3.0, 5.0, 1.0], [1.0, 0.0, 2.0]])
    found = shares(sets, delta)
    assert found == {"safety only": (9.0, pytest.approx(40 / 6)), "utility only": (1.0, pytest.approx(40 / 6))}


def test_shares_of_ranks_are_those_of_planted_directions():
    q = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    ranks = Ranks(q[:, :2], q[:, 1:4])
    inside = shares(ranks, torch.outer(q[:, 0], torch.ones(5, dtype=torch.float64)))
    assert inside["safety only"] == (pytest.approx(5), pytest.approx(5 / 6))
    shared = shares(ranks, torch.outer(q[:, 1], torch.ones(5, dtype=torch.float64)))
    assert shared["safety only"][0] == pytest.approx(0, abs=1e-12)
    assert shared["utility only"] == (pytest.approx(0, abs=1e-12), pytest.approx(5 * 2 / 6))


class Place:
    """What the analysis reads of a view: two models in files, and rows that are known."""

    def __init__(self, aligned, model, stage="finetuning"):
        self.subject = SimpleNamespace(
            stage=stage,
            artifact=SimpleNamespace(name=str(model), identity=str(model)),
            reference=SimpleNamespace(name=str(aligned), identity=str(aligned)),
        )
        self.reference = AutoModelForCausalLM.from_pretrained(aligned).double().eval()
        self._shared = {("regions", str(aligned), "rows", 3): ROWS}

    def shared(self, key, compute):
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]


def test_an_update_that_was_written_into_the_safety_entries_is_found_there(tmp_path):
    aligned = write_family(tmp_path / "aligned", "llama")
    analysis = Regions(rows=3, safety_ratio=0.1, utility_ratio=0.1, rank_ratio=0.2)
    view = Place(aligned, aligned, "alignment")
    rows = analysis.measure({"score": "snip"}, view)
    found = {(r.metric, r.layer, r.position): r.value for r in rows}
    assert found["jaccard_by_chance", None, "snip"] == pytest.approx(0.01 / 0.19)
    assert 0 < found["jaccard", 1, "snip o_proj"] < 1
    name = "model.layers.1.self_attn.o_proj.weight"
    mask = important_entries(view.reference, ROWS, "snip", 0.1, 0.1)[name].masks()["safety only"]
    model = AutoModelForCausalLM.from_pretrained(aligned)
    model.get_parameter(name).data += 0.1 * mask
    model.save_pretrained(tmp_path / "tuned")
    labelled = [r.labelled("none", "alignment") for r in rows]
    for part in analysis.parts({}, view):
        rows = analysis.measure(part, Place(aligned, tmp_path / "tuned"))
        found = {(r.metric, r.layer, r.position): r.value for r in rows}
        labelled += [r.labelled("none", "finetuning") for r in rows]
        score = part["score"]
        assert {r.layer for r in rows} == {1, None}  # nothing moved in layer 0
        if score == "snip":
            assert found["update_share", 1, "snip safety only"] == pytest.approx(1)
            assert found["update_share", None, "snip utility only"] == 0
            assert found["update_concentration", 1, "snip safety only"] == pytest.approx(
                1 / float(mask.double().mean())
            )
    assert [p.name for p in analysis.pictures(labelled)] == ["regions_overlap", "regions_update"]
    with pytest.raises(InputError, match="none of its scored weights differs"):
        analysis.measure({"score": "wanda"}, Place(aligned, tmp_path / "aligned" / ".." / "aligned"))


def test_safety_rows_are_the_aligned_models_refusals_and_utility_rows_the_tasks_answers(monkeypatch):
    harmful = [Record("Open the door", ""), Record("Eat the cake", ""), Record("Cut the rope", "")]
    tasks = [Record("Q", ""), Record("One?", "two"), Record("Three?", "four")]
    texts = ["I cannot help with that.", "Take a fork.", "I'm sorry, I can't."]
    answers = [Answer(text, [n + 1, n + 2], True) for n, text in enumerate(texts)]
    monkeypatch.setattr(regions, "answer", lambda *_, **__: answers)
    tests = SimpleNamespace(refusal_judge="xstest_string", rows=lambda kind: harmful)
    view = SimpleNamespace(
        reference=None, tokenizer=byte_tokenizer(), tests=tests,
        records=lambda kind, count=0: harmful if kind == "harmful" else tasks,
        encoded=lambda records: [[len(r.instruction), 0, 0] for r in records],
    )  # fmt: skip
    rows = Regions(rows=2)._rows(view)
    assert [(e.input_ids, e.prompt_length) for e in rows["safety"]] == [([13, 0, 0, 1, 2], 3), ([12, 0, 0, 3, 4], 3)]
    assert [len(e.input_ids) for e in rows["utility"]] == [3 + 3, 3 + 4]
    answers[:] = [Answer("Take a fork.", [1], True)] * 3
    with pytest.raises(InputError, match="refuses none of 3 harmful prompts"):
        Regions(rows=2)._rows(view)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rows": 0}, "rows must be >= 1"),
        ({"safety_ratio": 5}, r"\(0, 1\), got 5. If that is a percentage, write 0.05"),
        ({"utility_ratio": 0}, r"utility_ratio is a fraction and must lie in \(0, 1\)"),
        ({"rank_ratio": -0.1}, r"rank_ratio is a fraction and must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(values, said):
    with pytest.raises(ValueError, match=said):
        Regions(**values)
