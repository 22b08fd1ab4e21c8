"""Rewind on a random language model, against plain loops and dense matrices."""

import copy

import pytest
import torch
from torch.testing import assert_close

from hftlight.defenses.finetuning.freeze import Freeze
from hftlight.defenses.post_finetuning.rewind import Rewind, rank_factors
from hftlight.engine import Defense, Slot, Stage
from hftlight.engine.weights.lora import lora_updates
from hftlight.engine.weights.stored import ModelWeights
from hftlight.engine.weights.subject import Subject
from tests.helpers.regions import SIDE, endless, slow_scores, sorted_region, train
from tests.helpers.repairs import moved_model, small_llama, with_update
from tests.helpers.tiny_lm import tiny_lm


def batches(stream):
    return iter(SIDE[stream])


def rewind(q=0.4, p=0.3, **options):
    return Rewind(q, p, samples=6, **options)


def test_slots_stage_and_needs():
    training, rewinding = Freeze(), Rewind()
    assert (rewinding.stage, rewinding.slots) == (Stage.POST_FINETUNING, (Slot.WEIGHTS,))
    assert rewinding.needs == ("aligned",)
    assert training.state_key != rewinding.state_key


def test_rewinding_an_adapter_makes_a_whole_model_with_aligned_entries():
    model = with_update(small_llama())
    was = copy.deepcopy(model)
    subject = Subject(model, batches=batches)
    rewind().apply(subject)
    assert subject.dense
    aligned = was.unload()
    updates = lora_updates(with_update(small_llama()))
    for name, p in ModelWeights.of(model).parameters.items():
        before = aligned.get_parameter(name)
        if name not in updates:
            assert torch.equal(p, before)
            continue
        s, u = (slow_scores(aligned, name[:-7], SIDE[k], 6) for k in ("refusals", "task"))
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s)
        x = updates[name]
        assert torch.equal(p[mask], before[mask])
        assert torch.equal(p[~mask], (before + x.scale * x.b @ x.a)[~mask])
        row = subject.report["matrices"][name]
        assert row["kept"] == row["changed_entries"] == mask.sum()
    assert all(not u.b.any() for u in lora_updates(model).values())
    assert 0 < subject.report["realised_fraction"] < 0.4
    assert subject.report["changed_entries"] == subject.report["kept_entries"]


def test_rewinding_rows_of_an_adapter_leaves_an_adapter():
    model = with_update(small_llama())
    aligned = with_update(small_llama()).unload()
    before = {name: u.b.detach().clone() for name, u in lora_updates(model).items()}
    subject = Subject(model, batches=batches)
    rewind(unit="row").apply(subject)
    assert not subject.dense
    for name, u in lora_updates(model).items():
        s, v = (slow_scores(aligned, name[:-7], SIDE[k], 6).sum(dim=1) for k in ("refusals", "task"))
        rows = torch.tensor(sorted_region(s, v, 0.4, 0.3))
        assert not u.b[rows].any()
        assert torch.equal(u.b[~rows], before[name][~rows])
        assert subject.report["matrices"][name]["changed_entries"] == 4 * rows.sum()


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_rewinding_all_parameters_is_a_copy_of_the_aligned_values(score):
    aligned = small_llama()
    model = moved_model(aligned, 0.1, seed=1)
    was = copy.deepcopy(model)
    subject = Subject(model, ModelWeights.of(aligned), batches=batches)
    rewind(score=score).apply(subject)
    for name, p in model.named_parameters():
        if not name.endswith("_proj.weight"):
            assert torch.equal(p, was.get_parameter(name))
            continue
        s, u = (slow_scores(aligned, name[:-7], SIDE[k], 6, score) for k in ("refusals", "task"))
        mask = torch.tensor(sorted_region(s, u, 0.4, 0.3)).view_as(s)
        assert torch.equal(p, torch.where(mask, aligned.get_parameter(name), was.get_parameter(name)))
        assert subject.report["matrices"][name]["changed_entries"] == mask.sum()


def test_rows_to_rewind_by_come_from_the_whole_stream():
    """The batch size of the stream does not change the mask.

    All of the stream counts, and not only its first rows, which may be the shortest.
    """

    # The first ``samples`` rows come in batches of ``size``. SIDE has two batches of three rows.
    def cut(size):
        def read(stream):
            for k in range(0, 6, size):
                yield {name: t[k % 3 : k % 3 + size] for name, t in SIDE[stream][k // 3].items()}

        return read

    digests = []
    for samples, read in ((3, cut(3)), (3, cut(1)), (6, lambda stream: iter(SIDE[stream][:1]))):
        subject = Subject(with_update(small_llama()), batches=read)
        Rewind(0.4, 0.3, samples=samples).apply(subject)
        digests.append(subject.report["mask_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_training_and_rewinding_end_at_different_models():
    """Both models have the aligned values under the same mask. With Freeze the other entries adapted to the mask."""
    start = tiny_lm()
    frozen = train(copy.deepcopy(start), [Freeze(0.4, 0.3, samples=6, streams=SIDE)]).model
    free = train(copy.deepcopy(start), []).model
    subject = Subject(free, ModelWeights.of(start), batches=batches)
    rewind().apply(subject)
    same = {n: (p == start.get_parameter(n)) & n.endswith("_proj.weight") for n, p in frozen.named_parameters()}
    rewound = {n: (p == start.get_parameter(n)) & n.endswith("_proj.weight") for n, p in free.named_parameters()}
    assert all(torch.equal(same[n], rewound[n]) for n in same)
    assert any((p != free.get_parameter(n)).any() for n, p in frozen.named_parameters())


def actsvd(keep_s=3, keep_u=2):
    return Rewind(score="actsvd", samples=6, keep_s=keep_s, keep_u=keep_u)


def slow_edit(model, name, keep_s, keep_u):
    """Return the dense (I - Pi_u) Pi_s, from singular vectors of the layer's outputs at response tokens."""
    layer, projectors = model.get_submodule(name), []
    for stream, keep in (("refusals", keep_s), ("task", keep_u)):
        outputs = []
        handle = layer.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y))
        rows = [endless({k: t[i : i + 1] for k, t in batch.items()}) for batch in SIDE[stream] for i in range(3)]
        with torch.no_grad():
            for row in rows:
                model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
        handle.remove()
        h = torch.cat([y[row["labels"] != -100] for y, row in zip(outputs, rows, strict=True)])
        v = torch.linalg.svd(h, full_matrices=False)[2][:keep].T
        projectors.append(v @ v.T)
    return (torch.eye(len(projectors[0])).double() - projectors[1]) @ projectors[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rewinding_directions_takes_them_out_of_the_update(lora):
    aligned = small_llama()
    if lora:
        model = with_update(small_llama())
        subject = Subject(model, batches=batches)
        names = list(lora_updates(model))
        update = {n: u.scale * u.b.detach() @ u.a.detach() for n, u in lora_updates(model).items()}
    else:
        model = moved_model(aligned, 0.1, seed=1)
        subject = Subject(model, ModelWeights.of(aligned), batches=batches)
        names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]
        update = {n: (model.get_parameter(n) - aligned.get_parameter(n)).detach() for n in names}
    actsvd().apply(subject)
    assert not subject.dense
    now = (
        {n: u.weight + u.scale * u.b @ u.a for n, u in lora_updates(model).items()}
        if lora
        else dict(model.named_parameters())
    )
    for name in names:
        edit = slow_edit(aligned, name[:-7], 3, 2)
        expected = aligned.get_parameter(name) + update[name] - edit @ update[name]
        assert_close(now[name], expected, rtol=0, atol=1e-9, msg=name)
        assert (edit @ update[name]).abs().max() > 1e-3
    assert subject.report["changed_entries"] > 0


def test_rank_factors_make_the_edit():
    generator = torch.Generator().manual_seed(0)
    s, u = (torch.linalg.qr(torch.randn(7, k, generator=generator).double()).Q for k in (3, 2))
    d, right = rank_factors(s, u)
    assert_close(d @ right.T, (torch.eye(7).double() - u @ u.T) @ s @ s.T, rtol=0, atol=1e-12)
    assert (u.T @ d).abs().max() < 1e-12


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_exception_while_rewinding_leaves_the_fine_tuned_model(lora):
    aligned = small_llama()
    model = with_update(small_llama()) if lora else moved_model(aligned, 0.1, seed=1)
    before = [p.detach().clone() for p in model.parameters()]

    def failing(stream):
        yield SIDE[stream][0]
        raise FloatingPointError("while reading")

    with pytest.raises(FloatingPointError):
        rewind().apply(Subject(model, None if lora else ModelWeights.of(aligned), batches=failing))
    assert all(map(torch.equal, before, model.parameters()))


def test_rewinding_needs_to_know_the_aligned_weights():
    with pytest.raises(RuntimeError, match=r"needs the aligned model, .*give aligned=\.\.\."):
        rewind().apply(Subject(moved_model(small_llama(), 0.1, seed=1), batches=batches))
    with pytest.raises(RuntimeError, match=r"needs the aligned model"):
        rewind().apply(Subject(with_update(small_llama()), batches=batches, dense=True))


def test_rewinding_after_a_repair_that_left_no_adapter():
    """An earlier repair has written the weights under the adapter, so aligned values come from the aligned model."""
    aligned = small_llama()
    model = with_update(moved_model(aligned, 0.1, seed=1))
    with torch.no_grad():
        for u in lora_updates(model).values():
            u.b.zero_()
    plain = moved_model(aligned, 0.1, seed=1)
    subject = Subject(model, ModelWeights.of(aligned), batches=batches, dense=True)
    rewind().apply(subject)
    other = Subject(plain, ModelWeights.of(aligned), batches=batches)
    rewind().apply(other)
    for name, p in ModelWeights.of(model).parameters.items():
        if name in lora_updates(model):
            assert torch.equal(p, plain.get_parameter(name)), name


def test_rewinding_nothing_says_why():
    subject = Subject(with_update(small_llama()), batches=lambda stream: iter(SIDE["refusals"]))
    with pytest.warns(UserWarning, match="Rewind changed no weight: no weight is among the top 0.3 of safety"):
        rewind(0.3, 0.3).apply(subject)


def test_on_a_trainer_of_ones_own_rewinding_writes_a_model(tmp_path):
    from transformers import AutoModelForCausalLM

    start = with_update(small_llama()).train()
    with torch.no_grad():
        for u in lora_updates(start).values():
            u.b.zero_()
    defense = rewind(streams=SIDE, output=str(tmp_path / "rewound"))
    module = train(start, [defense], lr=0.05)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "rewound", dtype=torch.float64)
    aligned = small_llama()
    for name, p in ModelWeights.of(module.model).parameters.items():
        assert torch.equal(written.get_parameter(name), p)
        if name in defense.report["matrices"]:
            assert (p == aligned.get_parameter(name)).sum() >= defense.report["matrices"][name]["kept"] > 0
    assert defense.applied
    assert isinstance(defense, Defense)
