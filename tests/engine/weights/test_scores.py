"""Scores against closed forms, slow loops over examples and layers, and plain singular value decompositions."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from hftlight import SafetyModule
from hftlight.engine.weights.masks import largest, whole_rows
from hftlight.engine.weights.scores import (
    calibration,
    checked,
    directions,
    framed_moments,
    gradient_sums,
    input_moments,
    kept,
    orthogonal_edit,
    read_scores,
    removed,
    snip_scores,
    undisturbed,
    wanda_scores,
    without_end,
    write_scores,
)
from hftlight.engine.weights.shards import share
from tests.helpers import warm
from tests.helpers.tiny_lm import reference_loss, tiny_lm, token_batch

CPU = torch.device("cpu")
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers_of(model):
    return {n: m for n, m in model.named_modules() if n.split(".")[-1] in KINDS and hasattr(m, "weight")}


def row(batch, k):
    return {name: value[k : k + 1] for name, value in batch.items()}


class Regression(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)

    def loss(self, batch):
        return (self.linear(batch["x"]) - batch["y"]).square().sum(dim=1).mean()


def test_snip_of_linear_regression_is_the_closed_form():
    """The residual is r = W x - y. One example's gradient is 2 r x^T, and the score is |W| sum |2 r x^T|."""
    generator = torch.Generator().manual_seed(0)
    w, x, y = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (6, 4), (6, 3)))
    model = Regression(w)
    data = calibration([{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}], 6)
    sums = gradient_sums(model.loss, {"w": model.linear}, {"w": model.linear.weight}, data)
    expected = sum((2 * torch.outer(w @ a - b, a)).abs() for a, b in zip(x, y, strict=True))
    assert_close(sums["w"], expected, rtol=0, atol=1e-12)
    assert_close(snip_scores(w, sums["w"]), w.abs() * expected, rtol=0, atol=1e-12)


def test_two_opposite_gradients_do_not_cancel():
    """The absolute value comes before the sum: residuals +1 and -1 at the same x give 2 + 2, not 0."""
    model = Regression(torch.ones(1, 1, dtype=torch.float64))
    data = calibration([{"x": torch.ones(2, 1).double(), "y": torch.tensor([[0.0], [2.0]]).double()}], 2)
    assert gradient_sums(model.loss, {"w": model.linear}, {"w": model.linear.weight}, data)["w"].item() == 4.0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_sweep_equals_a_replay_for_each_layer(lora):
    """The slow loop replays the data for each weight, with requires_grad on that weight alone, row by row."""
    model = tiny_lm(lora=lora)
    module = SafetyModule(model)
    layers = layers_of(model)
    weights = {
        name: m.get_base_layer().weight if hasattr(m, "get_base_layer") else m.weight for name, m in layers.items()
    }
    batches = [token_batch(seed) for seed in (1, 2)]
    with undisturbed(module, CPU):
        sums = gradient_sums(module.loss, layers, weights, calibration(batches, 5))
    assert len(layers) == 14
    for name, weight in weights.items():
        model.requires_grad_(False)
        weight.requires_grad_(True)
        slow = torch.zeros_like(weight)
        for batch, k in ((batches[0], 0), (batches[0], 1), (batches[0], 2), (batches[1], 0), (batches[1], 1)):
            slow += torch.autograd.grad(reference_loss(model, row(batch, k)), weight)[0].abs()
        assert_close(sums[name], slow, rtol=0, atol=1e-12, msg=name)


def test_a_model_without_any_trainable_parameter_is_scored_all_the_same():
    model = tiny_lm()
    data = calibration([token_batch(1)], 3)
    layers = layers_of(model)
    weights = {name: m.weight for name, m in layers.items()}
    alive = gradient_sums(SafetyModule(model).loss, layers, weights, data)
    frozen = gradient_sums(SafetyModule(model.requires_grad_(False)).loss, layers, weights, data)
    for name in layers:
        assert_close(frozen[name], alive[name], rtol=0, atol=1e-14)


def slow_moments(model, layers, batches, first, wanted):
    """Return the mean outer product of inputs at the wanted positions, one row at a time."""
    inputs = {name: [] for name in layers}
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach()))
        for name, m in layers.items()
    ]
    places = []
    with torch.no_grad():
        for batch in batches:
            for k in range(len(batch["labels"])):
                if len(places) < first:
                    model(**{n: t for n, t in row(batch, k).items() if n != "labels"})
                    places.append([t for t in range(batch["labels"].shape[1]) if wanted(batch["labels"][k], t)])
    for handle in handles:
        handle.remove()
    # For each layer, average over the chosen positions of all rows.
    return {
        name: torch.stack([torch.outer(x[0, t], x[0, t]) for x, ts in zip(xs, places, strict=True) for t in ts]).mean(0)
        for name, xs in inputs.items()
    }


def test_wanda_reads_inputs_where_response_tokens_stand():
    """Inputs count at response tokens, not one position earlier, and not at prompts or padding."""
    model = tiny_lm().eval()
    layers, batches = layers_of(model), [token_batch(3), token_batch(4)]
    module = SafetyModule(model)
    squares = input_moments(module.loss, layers, calibration(batches, 5))
    moments = input_moments(module.loss, layers, calibration(batches, 5), outer=True)
    standing = slow_moments(model, layers, batches, 5, lambda labels, t: labels[t] != -100)
    predicting = slow_moments(
        model, layers, batches, 5, lambda labels, t: t + 1 < len(labels) and labels[t + 1] != -100
    )
    for name, layer in layers.items():
        assert_close(moments[name], standing[name], rtol=0, atol=1e-12)
        assert_close(squares[name], standing[name].diagonal(), rtol=0, atol=1e-12)
        assert (squares[name] - predicting[name].diagonal()).abs().max() > 1e-3 * squares[name].max()
        expected = layer.weight.abs() * standing[name].diagonal().sqrt()
        assert_close(wanda_scores(layer.weight, squares[name]), expected, rtol=0, atol=1e-12)


def test_layers_with_a_common_input_share_its_moment():
    model = tiny_lm().eval()
    moments = input_moments(SafetyModule(model).loss, layers_of(model), calibration([token_batch(3)], 3), outer=True)
    assert len({id(m) for m in moments.values()}) == 2 * 4


def test_moments_in_frames_are_those_of_the_inputs_along_them():
    """Layers with a common input have frames of their own."""
    model = tiny_lm().eval()
    module, layers, batches = SafetyModule(model), layers_of(model), [token_batch(3), token_batch(4)]
    frames = {name: torch.randn(3, layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    moments = input_moments(module.loss, layers, calibration(batches, 5), outer=True)
    framed = framed_moments(module.loss, layers, frames, calibration(batches, 5))
    for name, q in frames.items():
        assert_close(framed[name], q @ moments[name] @ q.T, rtol=0, atol=1e-12)


def test_wanda_is_the_optimal_brain_surgeon_with_a_diagonal_hessian():
    """OBS scores W^2 / [H^-1]_jj. With H = diag(m), the OBS score is the square of Wanda's score."""
    generator = torch.Generator().manual_seed(0)
    w, m = torch.randn(5, 4, generator=generator).double(), torch.rand(4, generator=generator).double() + 0.1
    surgeon = w.square() / torch.linalg.inv(torch.diag(m)).diagonal()
    assert_close(wanda_scores(w, m).square(), surgeon, rtol=1e-12, atol=0)


def test_scores_follow_a_permutation_of_rows():
    generator = torch.Generator().manual_seed(0)
    w, x, y = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4), (6, 4), (6, 3)))
    order = torch.tensor([2, 0, 1])
    scores = []
    for weight, target in ((w, y), (w[order], y[:, order])):
        model = Regression(weight)
        data = calibration([{"x": x, "y": target}], 6)
        sums = gradient_sums(model.loss, {"w": model.linear}, {"w": model.linear.weight}, data)
        scores.append(snip_scores(weight, sums["w"]))
    assert_close(scores[0][order], scores[1], rtol=0, atol=1e-13)


@pytest.fixture(params=[(6, 4), (4, 6), (5, 5)], ids=["tall", "wide", "square"])
def layer(request):
    generator = torch.Generator().manual_seed(0)
    out, inner = request.param
    w = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    return w, torch.randn(50, inner, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_removing_directions_takes_their_energy_and_no_more(layer, count):
    """After removal H' U = 0. |H - H'|^2 is the sum of the leading squared singular values of H."""
    w, x = layer
    u = directions(w, x.T @ x / len(x), count)
    h, h_without = x @ w.T, x @ removed(w, u).T
    sigma = torch.linalg.svdvals(h)
    assert u.shape == (len(w), count)
    assert_close(u.T @ u, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (h_without @ u).abs().sum() < 1e-10
    assert_close((h - h_without).square().sum(), sigma[:count].square().sum(), rtol=1e-10, atol=1e-12)
    assert_close(kept(w, u) + removed(w, u), w, rtol=0, atol=1e-12)


def test_directions_of_white_inputs_are_those_of_the_weight(layer):
    w, _ = layer
    u = directions(w, torch.eye(w.shape[1]), 2)
    plain = torch.linalg.svd(w)[0][:, :2]
    assert_close(u @ u.T, plain @ plain.T, rtol=0, atol=1e-10)


def test_more_directions_than_there_are_give_all(layer):
    w, x = layer
    u = directions(w, x.T @ x, 100)
    assert u.shape == (len(w), min(w.shape))
    assert_close(kept(w, u), w, rtol=0, atol=1e-10)


def test_the_orthogonal_edit_leaves_utility_directions_alone():
    """U_u^T dW = 0, and the rank is at most keep_s. Without utility directions, all safety directions are in."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    x, z = (torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    safety, utility = directions(w, x.T @ x, 3), directions(w, z.T @ z, 2)
    edit = orthogonal_edit(w, safety, utility)
    assert (utility.T @ edit).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(edit) == 3
    dense = (torch.eye(8).double() - utility @ utility.T) @ safety @ safety.T @ w
    assert_close(edit, dense, rtol=0, atol=1e-12)
    assert_close(orthogonal_edit(w, safety, utility[:, :0]), kept(w, safety), rtol=0, atol=1e-12)
    assert orthogonal_edit(w, safety, safety).abs().max() < 1e-12


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_scores_that_are_none_are_refused(value, tmp_path):
    """A file of negated scores would freeze the least important weights."""
    from safetensors.torch import save_file

    bad = torch.tensor([[1.0, value]])
    with pytest.raises(ValueError, match=r"Scores of w: they must be finite and >= 0"):
        checked(bad, "w")
    with pytest.raises(ValueError, match="Scores of w"):
        write_scores(tmp_path / "bad.safetensors", {"w": bad})
    save_file({"w": bad}, tmp_path / "bad.safetensors", {"higher_is_more_important": "true"})
    with pytest.raises(ValueError, match=r"Scores of w in .*stored negated"):
        read_scores(tmp_path / "bad.safetensors")


def test_a_file_of_scores_says_what_they_mean(tmp_path):
    from safetensors.torch import save_file

    scores = {"w": torch.rand(3, 4), "v": torch.zeros(2, 2)}
    write_scores(tmp_path / "scores.safetensors", scores, score="snip", data="alignment, 128 rows")
    loaded = read_scores(tmp_path / "scores.safetensors")
    assert loaded.keys() == scores.keys()
    assert all(torch.equal(loaded[name], scores[name]) for name in scores)
    save_file(scores, tmp_path / "dump.safetensors")
    with pytest.raises(ValueError, match="does not say higher_is_more_important"):
        read_scores(tmp_path / "dump.safetensors")


def numbered(*sizes):
    """Return batches whose rows have consecutive numbers, as a tensor and as a list."""
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [
        {"x": torch.arange(end - size, end), "id": [str(k) for k in range(end - size, end)], "window_tokens": 5.0}
        for size, end in zip(sizes, ends, strict=True)
    ]


def test_exactly_the_first_rows_count():
    batches = calibration(iter(numbered(3, 3, 3, 3)), 7)
    assert [counted for _, counted in batches] == [3, 3, 1]
    assert [batch["id"] for batch, _ in batches] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert all(batch["x"].tolist() == [int(k) for k in batch["id"]] for batch, _ in batches)
    assert all(batch["window_tokens"] == 5.0 for batch, _ in batches)
    assert [counted for _, counted in calibration(numbered(3, 3), 3)] == [3]
    assert [counted for _, counted in calibration(numbered(3, 3), 100)] == [3, 3]
    with pytest.raises(ValueError, match="at least one row"):
        calibration([], 4)
    with pytest.raises(TypeError, match="one example at a time"):
        calibration([torch.zeros(3)], 4)


def test_rows_can_be_taken_from_everywhere():
    """Batches may be sorted by length. The first rows would then be the shortest."""
    batches = calibration(numbered(*[4] * 25), 20, spread=True)
    rows = [row for batch, counted in batches for row in batch["x"].tolist() if counted]
    assert len(rows) == len(set(rows)) == 20 == sum(counted for _, counted in batches)
    assert min(rows) < 20
    assert max(rows) > 80
    again = calibration(numbered(*[10] * 10), 20, spread=True)
    assert rows == [row for batch, _ in again for row in batch["x"].tolist()]
    everything = calibration(numbered(2, 3), 100, spread=True)
    assert [batch["x"].tolist() for batch, _ in everything] == [[0, 1], [2, 3, 4]]


def test_what_cannot_be_measured_is_named():
    model = tiny_lm().eval()
    module, layers = SafetyModule(model), layers_of(model)
    with pytest.raises(RuntimeError, match="no input reached spare"):
        input_moments(module.loss, {**layers, "spare": nn.Linear(2, 2)}, calibration([token_batch(1)], 2))
    with torch.no_grad():
        model.model.embed_tokens.weight[token_batch(1)["input_ids"][0, 5]] = float("inf")
    with pytest.raises(RuntimeError, match="not finite"):
        input_moments(module.loss, layers, calibration([token_batch(1)], 2))


def state_of(module):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return (
        [p.detach().clone() for p in module.parameters()],
        [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        [p.requires_grad for p in module.parameters()],
        [m.training for m in module.modules()],
        torch.get_rng_state(),
        hooks,
    )


@pytest.mark.parametrize("failing_call", [None, 1, 3])
@pytest.mark.parametrize("kind", ["snip", "wanda"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_everything_is_left_as_found(lora, kind, failing_call):
    module = SafetyModule(tiny_lm(lora=lora, dropout=0.3)).train()
    first = next(iter(layers_of(module.model).values()))
    first.eval()  # a mixture of modes must be restored too
    module.loss(token_batch(9)).backward()
    next(p for p in module.parameters() if p.requires_grad).requires_grad_(False)
    before = state_of(module)
    calls = []

    def loss(batch):
        calls.append(module.training)
        torch.rand(3)
        value = module.loss(batch)
        if len(calls) == failing_call:
            raise FloatingPointError("inside the pass")
        return value

    layers = layers_of(module.model)
    weights = {name: getattr(m, "base_layer", m).weight for name, m in layers.items()}
    data = calibration([token_batch(k) for k in range(3)], 9)
    try:
        with undisturbed(module, CPU):
            if kind == "snip":
                gradient_sums(loss, layers, weights, data)
            else:
                input_moments(loss, layers, data)
    except FloatingPointError:
        assert failing_call
    else:
        assert not failing_call
    assert calls
    assert not any(calls)
    after = state_of(module)
    assert all(map(torch.equal, before[0], after[0]))
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5] == 0


def on_one_rank(rank, world, port, sharded, output):
    if world > 1:  # a single rank runs in the test process, whose environment later tests inherit
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    model = tiny_lm()
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    module, layers = SafetyModule(model), layers_of(model)
    weights = {name: m.weight for name, m in layers.items()}
    # Six rows count: three and one, then two and none. A rank without a counted row still runs its passes.
    batches = [token_batch(1, rows=4), token_batch(2, rows=5)]
    cuts = [slice(0, 4), slice(0, 5)] if world == 1 else [[slice(0, 3), slice(0, 2)], [slice(3, 4), slice(2, 5)]][rank]
    mine = [{name: t[cut] for name, t in batch.items()} for batch, cut in zip(batches, cuts, strict=True)]
    with undisturbed(module, CPU):
        data = calibration(mine, 6)
        sums = gradient_sums(module.loss, layers, weights, data)
        moments = input_moments(module.loss, layers, data, outer=True)
    masks = {name: largest(sums[name], 60, share(weights[name])) for name in layers}
    result = {
        "sums": {name: whole_rows(s, weights[name]) for name, s in sums.items()},
        "masks": {name: whole_rows(m.to(torch.uint8), weights[name]) for name, m in masks.items()},
        "moments": moments,
        "sharded": [share(w).group is not None for w in weights.values()],
    }
    torch.save(result, f"{output}.{rank}")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "fsdp2"])
def test_two_ranks_find_what_one_finds(sharded, tmp_path):
    on_one_rank(0, 1, 0, False, tmp_path / "one")
    one = torch.load(tmp_path / "one.0")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    call = "from tests.engine.weights.test_scores import on_one_rank as work; work({}, 2, {}, {}, {!r})"
    ranks = [warm.Command(["-c", call.format(rank, port, sharded, str(tmp_path / "two"))]) for rank in range(2)]
    for command in ranks:
        assert command.wait(timeout=200) == 0, command.stderr[-3000:]
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}")
        assert all(s == sharded for s in two["sharded"])
        for name in one["sums"]:
            assert_close(two["sums"][name], one["sums"][name], rtol=1e-11, atol=1e-15)
            assert_close(two["moments"][name], one["moments"][name], rtol=1e-11, atol=1e-15)
            assert torch.equal(two["masks"][name], one["masks"][name].to(torch.uint8))


def test_without_end_takes_the_label_of_each_rows_last_response_token():
    labels = torch.tensor([[-100, 5, 6, 2], [-100, 7, 2, -100], [-100, -100, 2, -100], [-100] * 4])
    batch = {"input_ids": torch.zeros(4, 4), "labels": labels.clone(), "id": ["a", "b", "c", "d"]}
    assert without_end(batch)["labels"].tolist() == [
        [-100, 5, 6, -100],
        [-100, 7, -100, -100],
        [-100, -100, 2, -100],  # a response of one token keeps its label
        [-100] * 4,
    ]
    assert torch.equal(batch["labels"], labels)
    assert without_end({"x": labels}) == {"x": labels}
