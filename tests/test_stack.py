"""A stack's adapters together against each adapter by itself: the same bits, however autograd is used.

Run by tests/interpreted/ too, with the Triton kernels, which finish the gradients of all sites at once.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from support.cases import random_packed
from torch.utils.checkpoint import checkpoint

from hyperformer_fast import backends, ops
from hyperformer_fast.layout import AdapterLayout

LAYOUT, SITES, SAMPLES, ROWS = AdapterLayout(16, 3), 3, 3, 2


class Case:
    """Weights and an input, once for a stack and once for its adapters by themselves."""

    def __init__(self, mixed: bool):
        torch.manual_seed(0)
        self.T = 2 if mixed else 1
        self.index = torch.tensor([1, 0, -1]) if mixed else None
        self.whole = torch.stack([random_packed(LAYOUT, self.T).float() for _ in range(SITES)])
        self.x = torch.randn(SAMPLES, ROWS, LAYOUT.d)

    def leaves(self):
        return self.whole.clone().requires_grad_(), self.x.clone().requires_grad_()

    def together(self, whole):
        """The adapters of ``whole``, as a function of an input, a site and perhaps a task index."""
        stack = ops.Stack(whole + 0, LAYOUT, "gelu_new")
        return lambda x, site, index=self.index: stack.adapter(x, site, index)

    def apart(self, whole):
        packed = whole + 0
        return lambda x, site, index=self.index: ops.adapter(x, packed[site], LAYOUT, "gelu_new", None, index)

    def both(self, program):
        """What ``program(adapt, whole, x)`` returns must be the same for both."""
        got, expected = (
            program(adapt_of(whole), whole, x)
            for adapt_of in (self.together, self.apart)
            for whole, x in [self.leaves()]
        )
        same(got, expected)
        return got


def same(got, expected):
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        assert torch.equal(g, e), f"{(g - e).abs().max()} apart"


def chain(adapt, x, sites=range(SITES)):
    for site in sites:
        x = adapt(x, site)
    return x


def loss_of(out):
    return out.pow(2).sum()


@pytest.fixture(params=[True, False], ids=["mixed tasks", "one task"])
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("sites", [(0, 1, 2), (1, 0, 2, 0), (2, 2), (1,), (0, 2)], ids=str)
def test_sites_in_any_order_twice_or_never(case, sites):
    case.both(lambda adapt, *leaves: torch.autograd.grad(loss_of(chain(adapt, leaves[1], sites)), leaves))


def test_sites_with_rows_of_their_own(case):
    def program(adapt, whole, x):
        inputs = x, x[:, :1], x.unflatten(1, (1, ROWS)), torch.cat([x] * 80, 1)
        outs = [adapt(x, site) for x, site in zip(inputs, (0, 1, 1, 2))]
        return torch.autograd.grad(sum(map(loss_of, outs)), (whole, x))

    case.both(program)


def test_an_input_without_rows(case):
    def program(adapt, whole, x):
        loss = loss_of(adapt(x, 0)) + loss_of(adapt(x[:, :0], 1))
        return torch.autograd.grad(loss, (whole, x))

    case.both(program)


def test_inputs_of_two_dtypes(case):
    def program(adapt, whole, x):
        loss = loss_of(adapt(x, 0)) + loss_of(adapt(x.bfloat16(), 1)).float()
        return torch.autograd.grad(loss, (whole, x))

    case.both(program)


def test_several_backward_passes_over_one_graph(case):
    def program(adapt, whole, x):
        loss = loss_of(chain(adapt, x))
        (of_x,) = torch.autograd.grad(loss, x, retain_graph=True)
        (of_whole,) = torch.autograd.grad(loss, whole, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return of_x, of_whole, whole.grad, x.grad

    case.both(program)


def test_a_part_of_the_graph_after_the_whole(case):
    def program(adapt, whole, x):
        first = adapt(x, 0)
        last = chain(adapt, first, (1, 2))
        of_all = torch.autograd.grad(loss_of(last), (whole, x), retain_graph=True)
        of_first = torch.autograd.grad(loss_of(first), (whole, x), retain_graph=True)
        return *of_all, *of_first

    case.both(program)


def test_a_backward_that_fails_leaves_nothing(case):
    def program(adapt, whole, x):
        middle = chain(adapt, x, (0, 1))
        loss = loss_of(adapt(middle, 2))

        def fail(g):
            raise RuntimeError("a hook fails")

        hook = middle.register_hook(fail)
        with pytest.raises(RuntimeError, match="a hook fails"):
            loss.backward(retain_graph=True)
        hook.remove()
        return torch.autograd.grad(loss_of(middle), (whole, x), retain_graph=True) + torch.autograd.grad(
            loss, (whole, x)
        )

    case.both(program)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoints(case, reentrant):
    def program(adapt, whole, x):
        middle = checkpoint(lambda x: chain(adapt, x, (0, 1)), x, use_reentrant=reentrant)
        loss_of(adapt(middle, 2)).backward()
        return whole.grad, x.grad

    case.both(program)


def test_each_site_in_a_checkpoint_of_its_own(case):
    def program(adapt, whole, x):
        out = x
        for site in range(SITES):
            out = checkpoint(adapt, out, site, use_reentrant=False)
        return torch.autograd.grad(loss_of(out), (whole, x))

    case.both(program)


def test_hooks_see_whole_gradients(case):
    def program(adapt, whole, x):
        seen = []
        whole.register_hook(seen.append)
        middle = adapt(x, 0)
        middle.register_hook(seen.append)
        middle.register_hook(lambda g: 2 * g)
        loss_of(chain(adapt, middle, (1, 2))).backward()
        return *seen, whole.grad, x.grad

    case.both(program)


def test_anomaly_detection(case):
    def program(adapt, whole, x):
        with torch.autograd.detect_anomaly(check_nan=True):
            return torch.autograd.grad(loss_of(chain(adapt, x)), (whole, x))

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        case.both(program)


def test_saved_tensors_elsewhere(case):
    def program(adapt, whole, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = loss_of(chain(adapt, x))
        return torch.autograd.grad(loss, (whole, x))

    case.both(program)


def test_one_of_the_gradients_alone(case):
    def program(adapt, whole, x):
        (of_whole,) = torch.autograd.grad(loss_of(chain(adapt, x.detach())), whole)
        return (of_whole,)

    case.both(program)
    case.both(lambda adapt, whole, x: torch.autograd.grad(loss_of(chain(adapt, x)), x))
    frozen = case.whole
    got, expected = (
        torch.autograd.grad(loss_of(chain(adapt_of(frozen), x)), x)
        for adapt_of in (case.together, case.apart)
        for _, x in [case.leaves()]
    )
    same(got, expected)


def test_without_gradients_first(case):
    def program(adapt, whole, x):
        with torch.no_grad():
            first = chain(adapt, x)
        with torch.inference_mode():
            adapt(x, 0)
        return first, *torch.autograd.grad(loss_of(chain(adapt, x)), (whole, x))

    case.both(program)


def test_threads(case):
    """Passes of several threads over one stack, in step with one another in the middle."""
    whole, _ = case.leaves()
    adapt = case.together(whole)
    barrier, found, n = threading.Barrier(3), {}, 3
    xs = [(case.x * (i + 1)).requires_grad_() for i in range(n)]
    losses = []
    for x in xs:
        middle = chain(adapt, x, (0, 1))
        middle.register_hook(lambda g: (barrier.wait(30), None)[1])
        losses.append(loss_of(adapt(middle, 2)))

    def run(i):
        found[i] = torch.autograd.grad(losses[i], (whole, xs[i]), retain_graph=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(n):
        whole, _ = case.leaves()
        x = (case.x * (i + 1)).requires_grad_()
        same(found[i], torch.autograd.grad(loss_of(chain(case.apart(whole), x)), (whole, x)))


def test_under_torch_func(case):
    def program(adapt_of):
        return torch.func.grad(lambda w, x: loss_of(chain(adapt_of(w), x)), argnums=(0, 1))(case.whole, case.x)

    with backends.use_backend("auto"):  # one with kernels that is asked for by name refuses
        same(program(case.together), program(case.apart))


def test_compiled(case):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def program(whole, x):
        return chain(case.together(whole), x)

    whole, x = case.leaves()
    got = torch.autograd.grad(loss_of(program(whole, x)), (whole, x))
    whole, x = case.leaves()
    same(got, torch.autograd.grad(loss_of(chain(case.apart(whole), x)), (whole, x)))


def test_compiled_autograd(case):
    torch._dynamo.reset()

    def program(adapt, whole, x):
        loss = loss_of(chain(adapt, x))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        return whole.grad, x.grad

    case.both(program)


def test_no_second_derivative(case):
    whole, x = case.leaves()
    loss = loss_of(chain(case.together(whole), x))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_weights_changed_in_between_are_noticed(case):
    whole, x = case.leaves()
    packed = whole + 0
    loss = loss_of(ops.Stack(packed, LAYOUT, "gelu_new").adapter(x, 0, case.index))
    packed.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified (by an inplace operation|inplace)"):
        loss.backward()


def test_a_task_index_with_strides():
    case = Case(mixed=True)
    index = torch.tensor([1, 5, 0, 5, 1, 5])[::2]
    case.both(lambda adapt, whole, x: torch.autograd.grad(loss_of(adapt(x, 1, index)), (whole, x)))


@pytest.mark.parametrize("known", [False, True], ids=["first call", "after a right call"])
def test_wrong_arguments_are_refused_alike(case, known):
    whole, x = case.leaves()
    wrong = [
        (x.long(), 0, case.index),
        (x[..., :-1], 0, case.index),
        (x[0, 0], 0, torch.tensor([0])),
        (x, 0, torch.zeros(SAMPLES + 1, dtype=torch.long)),
        (x, 0, torch.zeros(SAMPLES)),
        (x, 0, torch.full((SAMPLES,), case.T)),
        *([(x, 0, None)] if case.index is not None else []),
    ]
    for arguments in wrong:
        together, apart = case.together(whole), case.apart(whole)
        if known:
            together(x, 0)
        messages = []
        for adapt in (together, apart):
            with pytest.raises((ValueError, RuntimeError)) as error:
                adapt(*arguments)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]


def test_a_task_index_changed_in_place_is_checked_again():
    case = Case(mixed=True)
    adapt, index = case.together(case.whole), case.index.clone()
    adapt(case.x, 0, index)
    index[0] = 7
    with pytest.raises(ValueError, match="task_index must be from -1"):
        adapt(case.x, 0, index)


def test_a_step_is_freed_with_its_last_reference(case):
    whole, x = case.leaves()
    stack = ops.Stack(whole + 0, LAYOUT, "gelu_new")
    loss = loss_of(stack.adapter(x, 0, case.index))
    loss.backward()
    watched = weakref.ref(stack)
    gc.disable()
    try:
        del stack, loss
        assert watched() is None
    finally:
        gc.enable()
