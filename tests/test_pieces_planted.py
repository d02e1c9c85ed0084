"""Faults planted in the kernels of the pieces: the tolerance rule or the self-test must see each of them."""

from __future__ import annotations

import pytest
import torch
from support.pieces import (
    DTYPES,
    act_dropout_case,
    attention_case,
    check,
    cross_entropy_case,
    dropout_of,
    residual_case,
    softmax_case,
)

from hyperformer_fast import backends, philox
from hyperformer_fast.backends import selftest
from hyperformer_fast.backends.reference import ReferenceBackend

TENTH = dropout_of(0.1)


def randoms(*shapes):
    return [torch.randn(s) for s in shapes]


def shifted(dropout):
    """Another mask."""
    return dropout._replace(stream=dropout.stream + 1)


def rows_shifted(results, *which):
    """Results whose rows are those of their neighbours."""
    return tuple(t.roll(1, 0) if i in which and t.numel() else t for i, t in enumerate(results))


class Planted(ReferenceBackend):
    name = "planted"
    fault = ""

    def residual_forward(self, hidden, y, dropout, weight, eps, save):
        if self.fault == "the norm's statistic is of another row":
            return rows_shifted(super().residual_forward(hidden, y, dropout, weight, eps, save), 2)
        if self.fault == "the norm is of the residual stream without y" and weight is not None and hidden is not None:
            out, _, _ = super().residual_forward(hidden, y, dropout, weight, eps, save)
            _, normed, rstd = super().residual_forward(None, hidden, dropout._replace(p=0.0), weight, eps, save)
            return out, normed, rstd
        return super().residual_forward(hidden, y, dropout, weight, eps, save)

    def residual_backward(self, g_out, g_normed, out, weight, rstd, dropout, need_dy, need_dweight):
        if self.fault == "the residual's backward has another mask":
            dropout = shifted(dropout)
        results = super().residual_backward(g_out, g_normed, out, weight, rstd, dropout, need_dy, need_dweight)
        if self.fault == "the residual's backward drops the scale":
            return results[0], results[1] / philox.scale(dropout.p), results[2]
        if self.fault == "the weight's gradient misses a row" and g_normed is not None:
            missed = (g_normed * out * rstd.unsqueeze(-1)).reshape(-1, out.shape[-1])[-1]
            return results[0], results[1], results[2] - missed
        return results

    def act_dropout_forward(self, a, c, activation, dropout):
        out = super().act_dropout_forward(a, c, activation, dropout)
        if self.fault == "the activation's mask is off by one column":
            return (
                super()
                .act_dropout_forward(a.roll(1, -1), None if c is None else c.roll(1, -1), activation, dropout)
                .roll(-1, -1)
            )
        return out / philox.scale(dropout.p) if self.fault == "the activation drops the scale" else out

    def act_dropout_backward(self, g, a, c, activation, dropout):
        if self.fault == "the activation's backward has another mask":
            dropout = shifted(dropout)
        return super().act_dropout_backward(g, a, c, activation, dropout)

    def softmax_dropout_forward(self, scores, bias, mask, dropout, save):
        if self.fault == "the bias is of another head" and bias is not None:
            bias = bias.roll(1, 1)
        return super().softmax_dropout_forward(scores, bias, mask, dropout, save)

    def softmax_dropout_backward(self, g, probabilities, dropout):
        if self.fault == "the softmax's backward has another mask":
            dropout = shifted(dropout)
        return super().softmax_dropout_backward(g, probabilities, dropout)

    def attention_backward(self, g, q, k, v, probabilities, scaling, dropout, bias_shape):
        if self.fault == "the attention's backward forgets the dropout of v":
            dv = super().attention_backward(g, q, k, v, probabilities, scaling, dropout._replace(p=0.0), None)[2]
            dq, dk, _, dbias = super().attention_backward(g, q, k, v, probabilities, scaling, dropout, bias_shape)
            return dq, dk, dv, dbias
        return super().attention_backward(g, q, k, v, probabilities, scaling, dropout, bias_shape)

    def cross_entropy_forward(self, logits, labels, label_smoothing, ignore_index, need_grad):
        if self.fault == "the label is the next one":
            labels = torch.where(labels == ignore_index, labels, (labels + 1) % logits.shape[1])
        if self.fault == "the smoothing is left out of the gradient":
            loss, _ = super().cross_entropy_forward(logits, labels, label_smoothing, ignore_index, need_grad)
            return loss, super().cross_entropy_forward(logits, labels, 0.0, ignore_index, need_grad)[1]
        return super().cross_entropy_forward(logits, labels, label_smoothing, ignore_index, need_grad)


def residual():
    return residual_case(*randoms((3, 4, 40), (3, 4, 40), (40,)), TENTH)


def activation():
    return act_dropout_case(*randoms((3, 4, 40), (3, 4, 40)), "gelu_new", TENTH)


def softmax():
    return softmax_case(*randoms((2, 3, 4, 9), (1, 3, 4, 9)), None, TENTH)


def attention():
    return attention_case(*randoms((2, 3, 4, 8), (2, 3, 9, 8), (2, 3, 9, 8), (1, 3, 4, 9)), None, 0.3, TENTH)


def cross_entropy():
    return cross_entropy_case(torch.randn(5, 11), torch.tensor([0, 3, -100, 10, 4]), 0.2)


FAULTS = {
    "the norm's statistic is of another row": residual,
    "the norm is of the residual stream without y": residual,
    "the residual's backward has another mask": residual,
    "the residual's backward drops the scale": residual,
    "the weight's gradient misses a row": residual,
    "the activation's mask is off by one column": activation,
    "the activation drops the scale": activation,
    "the activation's backward has another mask": activation,
    "the bias is of another head": softmax,
    "the softmax's backward has another mask": softmax,
    "the attention's backward forgets the dropout of v": attention,
    "the label is the next one": cross_entropy,
    "the smoothing is left out of the gradient": cross_entropy,
}


@pytest.fixture
def planted():
    backend = Planted()
    backends.register(backend)
    yield backend
    backends.unregister(backend.name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(planted, fault):
    case = FAULTS[fault]()
    check(case, torch.float32, planted.name)
    assert max(selftest.errors(planted).values()) < selftest.TOLERANCE[torch.float32]
    planted.fault = fault
    with pytest.raises(AssertionError, match="error .* allowed"):
        check(case, torch.float32, planted.name)
    assert max(selftest.errors(planted).values()) > selftest.TOLERANCE[torch.float32]


def past_columns(count):
    def spoil(t):
        t[..., count:] *= 1.1

    return spoil


def past_rows(count):
    """All rows after the first ``count``."""

    def spoil(t):
        t.flatten(0, -2)[count:] *= 1.1

    return spoil


def past_queries(count):
    def spoil(t):
        t[..., count:, :] *= 1.1

    return spoil


def past_a_block_of_a_task(t):
    """Rows after the 64th of task 1, whose second sample is the last one."""
    if t.dim() == 3:
        t[3, 24:] *= 1.1


#: What a kernel could do wrong in later turns of its loops, by op: after so many columns, or after a part of the rows.
LATER = {
    "adapter_forward": (past_columns(256), past_a_block_of_a_task),
    "adapter_backward": (past_columns(256), past_a_block_of_a_task),
    "adapter_residual_forward": (past_columns(256), past_a_block_of_a_task),
    "residual_forward": (past_columns(64), past_columns(192), past_rows(80)),
    "residual_backward": (past_columns(64), past_columns(192), past_rows(80)),
    "act_dropout_forward": (past_columns(64), past_columns(1024), past_rows(14)),
    "act_dropout_backward": (past_columns(64), past_columns(1024), past_rows(14)),
    "softmax_dropout_forward": (past_columns(64), past_rows(230)),
    "softmax_dropout_backward": (past_columns(64), past_rows(230)),
    "attention_forward": (past_queries(64), past_queries(256)),
    "attention_backward": (past_queries(64), past_queries(256)),
    "cross_entropy_forward": (past_columns(64), past_columns(4096), past_rows(3)),
}


class Later(ReferenceBackend):
    """One op's results are wrong in a later turn of a loop."""

    name = "later"

    def __init__(self, op, spoil):
        right = getattr(ReferenceBackend(), op)

        def wrong(*arguments):
            results = right(*arguments)
            for t in [results] if isinstance(results, torch.Tensor) else results:
                if isinstance(t, torch.Tensor) and t.dim() > 1:  # a matrix of results, not a sum
                    spoil(t)
            return results

        setattr(self, op, wrong)


@pytest.mark.parametrize(("op", "which"), [(op, i) for op, spoils in LATER.items() for i in range(len(spoils))])
def test_the_self_test_reaches_later_turns_of_every_loop(op, which):
    wrong = selftest.errors(Later(op, LATER[op][which]))
    assert wrong[op] > 100 * selftest.TOLERANCE[torch.float32], wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", LATER)
def test_it_reaches_them_in_half_precision(op, dtype):
    assert selftest.errors(Later(op, LATER[op][0]), dtype)[op] > 2 * selftest.TOLERANCE[dtype]


@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["adapter_forward", "residual_forward", "act_dropout_forward", "attention_forward"])
def test_the_self_test_has_a_row_that_ends_within_a_vector(op, dtype, lanes):
    """Of every instruction set and dtype."""

    def after_the_last_whole_vector(t):
        n = t.shape[-1]
        if t.dtype == dtype and n > lanes:
            t[..., n - n % lanes :] *= 1.2

    name = str(dtype).removeprefix("torch.")
    assert any(f.startswith(f"{op} in {name} is off") for f in selftest.faults(Later(op, after_the_last_whole_vector)))


@pytest.mark.parametrize(("op", "place"), [("residual_forward", 1), ("adapter_backward", 1), ("attention_backward", 3)])
def test_a_nan_in_any_result_is_seen(op, place):
    backend = ReferenceBackend()
    right = getattr(backend, op)

    def wrong(*arguments):
        results = list(right(*arguments))
        if results[place] is not None and results[place].numel():
            results[place][..., -1] = torch.nan
        return results

    setattr(backend, op, wrong)
    assert selftest.errors(backend)[op] == torch.inf
    assert any(fault.startswith(f"{op} in float32 is off by inf") for fault in selftest.faults(backend))


@pytest.mark.parametrize("term", ["bias", "mask"])
@pytest.mark.parametrize("op", ["softmax_dropout_forward", "attention_forward"])
def test_the_self_test_tells_the_samples_terms_apart(op, term):
    backend = ReferenceBackend()
    right, place = getattr(backend, op), {"softmax_dropout_forward": 1, "attention_forward": 3}[op] + (term == "mask")

    def of_the_first_sample(*arguments):
        return right(*arguments[:place], arguments[place][:1], *arguments[place + 1 :])

    setattr(backend, op, of_the_first_sample)
    assert selftest.errors(backend)[op] > 100 * selftest.TOLERANCE[torch.float32]
