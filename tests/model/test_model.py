"""The head: equations, positions, the two steps, class surgery, attention maps, compile, export, autocast."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sadcl.classes import fit_width
from sadcl.head import SADCLHead, SADCLOutput
from sadcl.transformer import PositionSine, position_sine

GOLDEN = Path(__file__).parents[1] / "golden"
B, C, E = 3, 5, 16
FIXED_MAP_2_4 = [
    [-0.180112533772542, -0.96262768295249, -0.071848250060791, 0.189064137674909],
    [0.519784700403345, -0.246324473629874, 0.632627603618555, -0.518585030691607],
]


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"in_channels": 12, "num_classes": C, "hidden_dim": E, "num_heads": 4, "ffn_dim": 24} | kwargs
    sizes = {"proj_dim": 10, "feature_size": (3, 4), "bank_slots": 4} | sizes
    return SADCLHead(**sizes), torch.randn(B, sizes["in_channels"], 3, 4)


def test_positions_match_the_golden_numbers():
    golden = np.load(GOLDEN / "position_sine.npz")
    height, breadth = int(golden["H"]), int(golden["W"])
    got = position_sine(2 * int(golden["num_pos_feats"]), (height, breadth))
    want = torch.from_numpy(golden["pe"])[0].flatten(1).t()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_positions_of_other_sizes_are_made_once_and_serve_training_after_inference():
    position = PositionSine(8, (2, 3))
    with torch.inference_mode():
        first = position((4, 3))
    assert position((4, 3)) is first and not first.is_inference()
    torch.testing.assert_close(first, position_sine(8, (4, 3)))
    assert position((2, 3)) is position.position and not position.state_dict()
    position.to(torch.bfloat16).to(torch.float64)
    assert position((4, 3)).dtype == torch.float64
    torch.testing.assert_close(position((2, 3)), position_sine(8, (2, 3), dtype=torch.float64))
    materialised = PositionSine(8, (2, 3)).to("meta").to_empty(device="cpu")
    torch.testing.assert_close(materialised((2, 3)), position_sine(8, (2, 3)))
    for extra in range(1, 40):
        position((1, extra))
    assert len(position._cache) <= 8


def by_torch_modules(head: SADCLHead, x: torch.Tensor) -> torch.Tensor:
    """h from stock torch parts, following the published equations one by one."""

    def attention(module):
        peer = nn.MultiheadAttention(E, 4, batch_first=True).eval()
        peer.load_state_dict(module.state_dict())
        return lambda q, k, v: peer(q, k, v)[0]

    def ffn(module, t):
        return module.linear2(module.linear1(t).relu())

    pos = position_sine(E, (x.shape[2], x.shape[3]))
    memory = head.input_proj(x).flatten(2).transpose(1, 2)
    for layer in head.encoder:
        q = memory + pos
        memory = layer.norm1(memory + attention(layer.self_attn)(q, q, memory))
        memory = layer.norm2(memory + ffn(layer.ffn, memory))
    t = torch.zeros(x.shape[0], C, E)
    for layer in head.decoder:
        t = layer.norm1(t + attention(layer.cross_attn)(t + head.queries, memory + pos, memory))
        t = layer.norm2(t + ffn(layer.ffn, t))
    return head.decoder_norm(t)


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("size", [(3, 4), (5, 2)])
def test_head_follows_the_equations(layers, size):
    head, _ = make(encoder_layers=layers[0], decoder_layers=layers[1])
    head.eval()
    x = torch.randn(B, 12, *size)
    out = head(x)
    h = by_torch_modules(head, x)
    torch.testing.assert_close(out.label_features, h, rtol=1e-4, atol=1e-5)
    logits = torch.einsum("bce,ce->bc", h, head.classifier.weight) + head.classifier.bias
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    first, second = head.projection.layers
    for got, raw in (
        (out.embeddings, h),
        (out.bank_embeddings, head.memory_bank.slots[:B]),
        (out.prototype_embeddings, head.prototypes[None]),
    ):
        torch.testing.assert_close(got, second(first(raw).relu()), rtol=1e-4, atol=1e-5)
    assert out.prototype_embeddings.shape == (1, C, 10) and out.bank_embeddings.shape == (B, C, 10)


def test_input_projection_only_where_widths_differ_unless_asked():
    assert isinstance(make()[0].input_proj, nn.Conv2d)
    assert isinstance(make(in_channels=E)[0].input_proj, nn.Identity)
    assert isinstance(make(in_channels=E, input_proj=True)[0].input_proj, nn.Conv2d)
    assert SADCLHead(16, 3).ffn_dim == 64 and SADCLHead(16, 3).hidden_dim == 16
    with pytest.raises(ValueError, match="input_proj"):
        make(input_proj=False)


def test_two_steps():
    head, x = make(contrastive=False)
    out = head(x)
    assert out[2:] == (None, None, None, None)
    step1 = copy.deepcopy(head.state_dict())
    before = head.eval()(x)
    head.init_contrastive(torch.randn(C, E), batch_slots=6)
    out = head(x)
    assert torch.equal(out.logits, before.logits) and all(part is not None for part in out[:5])
    assert torch.equal(head.memory_bank.slots[5], head.prototypes)
    assert set(step1) < set(head.state_dict())
    weight = head.projection.layers[0].weight
    head.init_contrastive(batch_slots=2)
    assert head.projection.layers[0].weight is weight and head.memory_bank.batch_slots == 2
    with pytest.raises(ValueError, match="batch of 3 images: the memory bank has 2 slots"):
        head(x)
    assert head(x, contrastive=False).embeddings is None
    with pytest.raises(ValueError, match="prototypes"):
        head.init_contrastive(torch.randn(C + 1, E))
    with pytest.raises(ValueError, match="init_contrastive"):
        make(contrastive=False)[0].update_bank(out, torch.ones(B, C))


def test_training_step_updates_the_bank_before_the_backward():
    head, x = make(dropout=0.0)
    labels = torch.ones(B, C)
    slots = head.memory_bank.slots.clone()

    def gradients(update):
        head.zero_grad()
        out = head(x)
        loss = sum(part.square().mean() for part in out[:5])
        if update:
            head.update_bank(out, labels, threshold=0.0)
        loss.backward()
        return [p.grad.clone() for p in head.parameters()]

    want = gradients(False)
    assert torch.equal(head.memory_bank.slots, slots)
    for got, expected in zip(gradients(True), want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(head.memory_bank.slots[:B], head(x).label_features)
    assert torch.equal(head.memory_bank.slots[B:], slots[B:])
    assert all(g.abs().sum() > 0 for g in want)


def test_attention_maps():
    head, x = make()
    head.eval()
    assert head(x).attention is None
    last = head(x, need_weights=True).attention
    every = head(x, need_weights="all").attention
    assert last.shape == (B, 4, C, 3, 4) and every.shape == (2, B, 4, C, 3, 4)
    torch.testing.assert_close(every[-1], last)
    torch.testing.assert_close(every.sum((-2, -1)), torch.ones(2, B, 4, C))
    torch.testing.assert_close(head(x, need_weights=True).logits, head(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contrastive", [False, True])
def test_classes_kept_and_added_leave_the_logits_of_the_others(contrastive):
    head, x = make(contrastive=contrastive)
    head.eval()
    want = head(x)
    kept = [4, 0, 2]
    head.keep_classes(kept)
    assert head.num_classes == 3
    out = head(x)
    for got, expected in zip(out[:5], want[:5], strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected[:, kept], rtol=1e-5, atol=1e-6)
    head.extend_classes(2)
    head.extend_classes(torch.randn(1, 40))
    out = head(x)
    assert head.num_classes == 6 and out.logits.shape == (B, 6)
    torch.testing.assert_close(out.logits[:, :3], want.logits[:, kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.queries[5].norm(), torch.tensor(4.0))
    if contrastive:
        torch.testing.assert_close(out.embeddings[:, :3], want.embeddings[:, kept], rtol=1e-5, atol=1e-6)
        assert torch.equal(head.memory_bank.slots[:, 3:], head.prototypes[3:].expand(4, -1, -1))
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())
    twin = make(num_classes=6, contrastive=contrastive)[0].eval()
    twin.load_state_dict(head.state_dict())
    torch.testing.assert_close(twin(x).logits, out.logits)


def test_queries_from_embeddings():
    head, x = make()
    same = torch.randn(C, E)
    head.set_queries(same)
    assert torch.equal(head.queries, same) and head.queries.requires_grad
    narrow, wide = torch.randn(C, 6), torch.randn(C, 700, dtype=torch.float16)
    for given in (narrow, wide):
        head.set_queries(given)
        first = head.queries.detach().clone()
        torch.testing.assert_close(first.norm(dim=1), torch.full((C,), 4.0))
        head.set_queries(given)
        assert torch.equal(head.queries, first)  # fixed: the same text gives the same query on every run
    cosine = nn.functional.cosine_similarity
    got = fit_width(narrow, E)
    torch.testing.assert_close(cosine(got[0], got[1:]), cosine(narrow[0], narrow[1:]), rtol=1e-4, atol=1e-5)
    assert head(x).logits.isfinite().all()
    with pytest.raises(ValueError, match="expected 5 rows"):
        head.set_queries(torch.randn(C + 1, E))
    with pytest.raises(ValueError, match="finite"):
        head.set_queries(torch.full((C, 3), float("nan")))
    with pytest.raises(ValueError, match=r"\[C, E'\]"):
        head.set_queries(torch.randn(E))


def test_the_fixed_map_stays_what_it_is():
    """Checkpoints depend on it: classes added later must land in the space of the first ones."""
    from sadcl.classes import fixed_map

    got = fixed_map(2, 4)
    torch.testing.assert_close(got @ got.t(), torch.eye(2, dtype=torch.float64))
    want = torch.tensor(FIXED_MAP_2_4, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training):
    head, x = make(dropout=0.0)
    head.train(training)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x)[:5], head(x)[:5], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if training:
        leaves = list(head.parameters())
        want = torch.autograd.grad(sum(p.square().mean() for p in head(x)[:5]), leaves)
        got = torch.autograd.grad(sum(p.square().mean() for p in compiled(x)[:5]), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5)


def test_exports_with_a_dynamic_batch():
    head, x = make()
    head.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        head, (x,), {"contrastive": False}, dynamic_shapes={"feature_map": {0: batch}, "contrastive": None}
    )
    other = torch.randn(9, 12, 3, 4)
    got = program.module()(other, contrastive=False)
    torch.testing.assert_close(got.logits, head(other, contrastive=False).logits, rtol=1e-4, atol=1e-5)
    full = torch.export.export(head, (x,)).module()(x)
    torch.testing.assert_close(full.bank_embeddings, head(x).bank_embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 4), (4, 4)])
def test_autocast(size):
    head, _ = make(dropout=0.1)
    x = torch.randn(B, 12, *size)
    want = head.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x, need_weights=True)
        assert (out.logits.float() - want.logits).abs().max() < 0.1
        out = head.train()(x)
        head.update_bank(out, torch.ones(B, C), threshold=0.0)
        sum(part.float().square().mean() for part in out[:5]).backward()
    assert head.memory_bank.slots.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_state_dict_round_trip_and_the_bank_is_left_to_its_process():
    (head, x), (other, _) = make(0), make(1)
    head.memory_bank.slots.normal_()
    other.load_state_dict(head.state_dict())
    for got, want in zip(other.eval()(x)[:5], head.eval()(x)[:5], strict=True):
        assert torch.equal(got, want)
    assert "memory_bank.slots" in head.state_dict() and "memory_bank.slots" not in dict(head.named_buffers())
    assert isinstance(head(x), SADCLOutput)


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_built_on_meta_is_whole_after_assigning_a_state(nested):
    head, x = make(0)
    with torch.device("meta"):
        other, _ = make(1)
    loaded, state = (nn.Sequential(other), nn.Sequential(head)) if nested else (other, head)
    loaded.load_state_dict(state.state_dict(), assign=True)
    assert not [name for name, t in [*other.named_parameters(), *other.named_buffers()] if t.is_meta]
    for size in ((3, 4), (2, 5)):
        y = torch.randn(B, 12, *size)
        for got, want in zip(other.eval()(y)[:5], head.eval()(y)[:5], strict=True):
            assert torch.equal(got, want)
    assert other.double().position.position.dtype == torch.float64
    twin = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    assert torch.equal(twin(x.double()).logits, other(x.double()).logits)


def test_distributed_data_parallel_takes_the_output_apart(tmp_path):
    head, x = make(dropout=0.0)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(head)
        out = parallel(x)
        assert isinstance(out, SADCLOutput)
        sum(part.square().mean() for part in out[:5]).backward()
        assert all(p.grad is not None for p in head.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_bad_input():
    head, x = make()
    with pytest.raises(ValueError, match="feature_map"):
        head(x[0])
    with pytest.raises(ValueError, match=r"feature_map: expected \[B, 12"):
        head(x[:, :5])
    with pytest.raises(TypeError, match="feature_map"):
        head(x.long())
    for kwargs, name in (
        ({"hidden_dim": 18}, "hidden_dim=18"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_classes": 0}, "num_classes"),
        ({"decoder_layers": 0}, "decoder_layers"),
        ({"feature_size": (0, 3)}, "feature_size"),
        ({"dropout": 1.5}, "dropout"),
    ):
        with pytest.raises(ValueError, match=name):
            make(**kwargs)
    for indices in ([], [5], [-1], [1, 1], [0.5], [True]):
        with pytest.raises(ValueError, match="indices"):
            head.keep_classes(indices)
    for new in (0, True):
        with pytest.raises(ValueError, match="new"):
            head.extend_classes(new)
    with pytest.raises(ValueError, match="multiple of 4"):
        position_sine(6, (2, 2))
