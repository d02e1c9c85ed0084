from __future__ import annotations

import pytest
import torch

from hyperformer_fast import backends, hypernetwork, native
from hyperformer_fast.backends.cpu import CpuBackend
from hyperformer_fast.config import HyperFormerConfig
from hyperformer_fast.hypernetwork import POSITIONS, HyperNetwork, TaskEmbeddings
from hyperformer_fast.variants import HYPERNETWORK_VARIANTS as VARIANTS

TASKS = ["cola", "mnli", "stsb"]


def small(variant, **fields):
    defaults = {"reduction_factor": 4, "task_embedding_dim": 6, "projected_task_embedding_dim": 5, "task_hidden_dim": 7}
    return HyperFormerConfig(tasks=TASKS, variant=variant, **{**defaults, **fields})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.filterwarnings("ignore:conditional_layer_norm=False has no effect")
def test_shapes_and_gradients(variant, pre, conditional):
    config = small(variant, add_layer_norm_before_adapter=pre, conditional_layer_norm=conditional)
    embeddings, net = TaskEmbeddings(config), HyperNetwork(config, d=12, num_layers=2)
    packed = net(embeddings())
    assert packed.shape == (4, 3, net.layout.numel) and packed.dtype == torch.float32
    packed.square().sum().backward()
    for name, p in [*embeddings.named_parameters(), *net.named_parameters()]:
        assert p.grad is not None and p.grad.any(), name
    assert (net.generator.norms is not None) == (variant == "hyperformer" and not conditional)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialised_as_the_original(variant):
    torch.manual_seed(1)
    config = small(
        variant,
        conditional_layer_norm=variant != "hyperformer",
        task_embedding_dim=64,
        projected_task_embedding_dim=64,
        task_hidden_dim=128,
        recipe="authors",
    )
    embeddings, net = TaskEmbeddings(config), HyperNetwork(config, d=96, num_layers=3)
    drawn = torch.stack(list(embeddings.task_to_embeddings.values()))
    assert abs(drawn.std() - 1) < 0.15 and abs(drawn.mean()) < 0.2
    assert abs(net.generator.weight.std() - 1e-2) < 2e-4 and not net.generator.bias.any()
    if variant == "hyperformer":
        expected = torch.cat([torch.ones(96), torch.zeros(96)]).expand(6, -1)
        assert torch.equal(net.generator.norms, expected)
        return
    assert abs(net.projector[0].weight.std() - 1e-2) < 1e-3 and not net.projector[2].bias.any()
    assert abs(net.layer_embeddings.weight.std() - 1) < 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_shared(variant):
    """A generator's rows reach exactly the sites that the variant says."""
    config = small(variant)
    net = HyperNetwork(config, d=8, num_layers=3)
    tasks = torch.randn(2, 6)
    before = net(tasks)
    with torch.no_grad():
        net.generator.weight[-1] += 1
    changed = {int(i) for i in (net(tasks) != before).any(-1).any(-1).nonzero()}
    expected = {
        "hyperformer++": set(range(6)),
        "hyperformer-shared": {net.site(layer, "self_attention") for layer in range(3)},
        "hyperformer": {net.site(2, "self_attention")},
    }[variant]
    assert changed == expected


def test_every_site_of_plus_plus_differs():
    net = HyperNetwork(small("hyperformer++"), d=8, num_layers=3)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    packed = net(torch.randn(2, 6)).flatten(0, 1)
    distances = torch.cdist(packed, packed) + torch.eye(12) * 1e9
    assert distances.min() > 1e-3


def test_layers_and_positions_are_told_apart():
    net = HyperNetwork(small("hyperformer++"), d=8, num_layers=2)
    assert [net.site(layer, position) for position in POSITIONS for layer in range(2)] == [0, 1, 2, 3]
    e = net.embeddings(torch.randn(1, 6))
    with torch.no_grad():
        net.layer_embeddings.weight[1] += 1
        changed = (net.embeddings(torch.zeros(1, 6)) != e).any(-1)
    assert changed.all()  # the task changed too
    base = net.embeddings(torch.zeros(1, 6))
    with torch.no_grad():
        net.position_embeddings.weight[1] += 1  # self-attention
    changed = (net.embeddings(torch.zeros(1, 6)) != base).flatten(1).any(1).tolist()
    assert changed == [False, False, True, True]
    for bad, message in (
        ((2, "feed_forward"), "from 0 to 1, got 2"),
        ((0, "cross_attention"), "feed_forward, self_attention"),
    ):
        with pytest.raises(ValueError, match=message):
            net.site(*bad)


def test_one_embedding_can_be_frozen_and_unused_ones_get_zeros():
    config = small("hyperformer++")
    embeddings, net = TaskEmbeddings(config), HyperNetwork(config, d=8, num_layers=1)
    embeddings.task_to_embeddings["mnli"].requires_grad_(False)
    net(embeddings()[:1]).sum().backward()
    assert embeddings.task_to_embeddings["mnli"].grad is None
    assert torch.equal(embeddings.task_to_embeddings["stsb"].grad, torch.zeros(6))


def test_tasks_may_share_an_embedding():
    config = small("hyperformer++", task_to_embeddings={"cola": "a", "mnli": "b", "stsb": "a"})
    embeddings = TaskEmbeddings(config)
    assert list(embeddings.task_to_embeddings) == ["a", "b"]
    out = embeddings()
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])


def test_add_task():
    config = small("hyperformer++")
    embeddings = TaskEmbeddings(config)
    a, b = (embeddings.task_to_embeddings[t].detach() for t in ("cola", "mnli"))
    embeddings.add_task("twin", "cola")
    embeddings.add_task("mean", ["cola", "mnli"])
    embeddings.add_task("fresh")
    assert config.tasks == TASKS and embeddings.config.tasks == [*TASKS, "twin", "mean", "fresh"]
    assert embeddings().shape == (6, 6)
    assert torch.equal(embeddings()[3], a) and torch.allclose(embeddings()[4], (a + b) / 2)
    for name, init, message in (
        ("cola", None, "'cola' exists already: choose a name other than cola, mnli"),
        ("x", "nope", "unknown task 'nope'"),
        ("x", [], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            embeddings.add_task(name, init)
    assert embeddings.config.tasks == [*TASKS, "twin", "mean", "fresh"]


def test_generation_keeps_precision_under_autocast():
    config = small("hyperformer++")
    net, tasks = HyperNetwork(config, d=8, num_layers=2), torch.randn(2, 6)
    plain = net(tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(tasks), plain)


def test_projected_task_embeddings():
    config = small("hyperformer", train_task_embeddings=True)
    embeddings = TaskEmbeddings(config)
    net = HyperNetwork(config, d=8, num_layers=1)
    assert embeddings().shape == (3, 5) and net.generator.weight.shape[-1] == 5 and net(embeddings()).shape[0] == 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("d", "layers", "k"), [(12, 1, 5), (17, 2, 33), (32, 3, 40)])
@pytest.mark.parametrize("at_once", [5, 1000])
def test_a_task_has_the_same_bits_in_any_company(variant, backend, d, layers, k, at_once, monkeypatch):
    """At sizes where matrix products round by the number of their rows."""
    monkeypatch.setattr(hypernetwork, "_ROWS_AT_ONCE", at_once)
    if backend == "cpu" and not native.status()["loaded"]:
        pytest.skip("the compiled library is not there")
    torch.manual_seed(0)
    tasks = [f"task{i}" for i in range(9)]
    config = small(variant, task_embedding_dim=k, projected_task_embedding_dim=k, normalize_embeddings=True)
    config = config.replace(tasks=tasks)
    embeddings, net = TaskEmbeddings(config)().detach(), HyperNetwork(config, d, layers)
    with torch.no_grad(), backends.use_backend(backend):
        net.generator.bias.normal_()
        together = net.forward_each(embeddings)
        torch.testing.assert_close(together, net(embeddings))
        for company in ([0], [1, 0], [2, 3, 0], [0, 4, 5, 6, 7], [8, 7, 6, 5, 4, 3, 2, 1]):
            assert torch.equal(net.forward_each(embeddings[company]), together[:, company]), company


def test_projected_embeddings_have_the_same_bits_in_any_company():
    torch.manual_seed(0)
    config = small("hyperformer", train_task_embeddings=True, task_embedding_dim=33, projected_task_embedding_dim=40)
    embeddings = TaskEmbeddings(config.replace(tasks=[f"task{i}" for i in range(9)]))
    with torch.no_grad():
        together = embeddings.each(range(9))
        torch.testing.assert_close(together, embeddings())
        for company in ([0], [1, 0], [2, 3, 0], [0, 4, 5, 6, 7], [8, 7, 6, 5, 4, 3, 2, 1]):
            assert torch.equal(embeddings.each(company), together[company]), company
        for other in (f"new{i}" for i in range(4)):
            embeddings.add_task(other)
            assert torch.equal(embeddings.each(range(9)), together)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generators_are_read_once_for_many_tasks(variant, monkeypatch):
    """Where each site has a generator of its own, reading all of them for each task took most of the time."""
    if not native.status()["loaded"]:
        pytest.skip("the compiled library is not there")
    config = small(variant).replace(tasks=[f"task{i}" for i in range(30)])
    embeddings, net = TaskEmbeddings(config).each(range(30)), HyperNetwork(config, 16, 1)
    calls = []
    generate = CpuBackend.generate_weights
    monkeypatch.setattr(CpuBackend, "generate_weights", lambda *a: calls.append(a[1].shape[1]) or generate(*a))
    with torch.no_grad(), backends.use_backend("cpu"):
        net.forward_each(embeddings)
        assert len(calls) == 1 and calls[0] == 30 * net.num_sites // len(net.generator.weight)
        net.forward_each(embeddings[:1])
    assert calls[1] >= 4
