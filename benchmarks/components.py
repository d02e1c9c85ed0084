"""What a training step's time goes to, by torch's profiler.

The time of an operator, without the operators that it calls, goes to a component by its own name, or by the Python
frames and modules around it. An operator of the backward goes where the operator went whose derivative it computes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

COMPONENTS = (
    "products", "attention", "dropout", "norms", "residuals", "activations", "adapters", "generation", "loss", "cache",
    "optimizer", "rest",
)  # fmt: skip

#: A component, and what in the name of an operator, a frame or a module tells it. An event goes to the first row that
#: one of its names fits; the names of a row are all tried before the next row is.
CONTEXTS = (
    ("optimizer", r"^Optimizer\.|_fused_adam"),
    ("cache", r"cache_utils\.py"),
    ("generation", r"generate_weights|hypernetwork\.py|original\.py|hyperformer_fast\S*::fold|: fold\b"),
    # kernels of ours by name: what is fused counts where most of its work is
    ("adapters", r"adapter_(residual_)?(for|back)ward|HyperAdapter|_Adapter|::Adapter|hyperformer_fast\S*::adapter"),
    ("norms", r"residual_(for|back)ward|_ResidualBackward|Residual\b|rms_norm"),
    ("activations", r"act_dropout|_?ActDropout"),
    ("attention", r"softmax_dropout|SoftmaxDropout|_AttentionBackward|hyperformer_fast\S*::attention"
                  r"|hyperformer_fast/\S+ attention_(for|back)ward"),
    ("loss", r"cross_entropy|CrossEntropy|log_softmax|nll_loss|hyperformer_fast/loss\.py|chunked"),
    ("dropout", r"dropout_seed|philox\.py\(\d+\): (draw|_draw)"),
    ("adapters", r"original_t5\.py\(\d+\): apply_adapter|reference\.py\(\d+\): (_?adapter|fold)"
                 r"|hyperformer_fast/(sites|ops/stack)\.py"),
    ("dropout", r"^aten::(native_)?dropout|bernoulli|nn\.Module: Dropout"),
    ("norms", r"nn\.Module: \w*(LayerNorm|RMSNorm)"),
    ("products", r"^aten::(linear|matmul)$|flash_attention"),
    ("attention", r"_softmax|scaled_dot_product|nn\.Module: (?!T5Layer)\w*Attention|compute_bias"),
    ("activations", r"nn\.Module: (ReLU|\w*GELU\w*|SiLU)|^aten::(relu|gelu)"),
    ("residuals", r"nn\.Module: T5Layer(SelfAttention|CrossAttention|FF)"),
)  # fmt: skip
_PRODUCT = re.compile(r"^(aten::(mm|bmm|addmm|baddbmm)|mkldnn::_linear_pointwise)$")
_COMPILED = [(name, re.compile(words)) for name, words in CONTEXTS]
_BACKWARD = "autograd::engine::evaluate_function: "


def around(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """An event and all that it runs in, innermost first."""
    found: FunctionEvent | None = event
    while found is not None:
        yield found
        found = found.cpu_parent


def by_names(names: Sequence[str]) -> str:
    """The component of an operator by its name, the first, and those of what it runs in."""
    found = next((place for place, words in _COMPILED if any(words.search(name) for name in names)), "rest")
    # a product is one wherever it is, except within the adapters and their generation
    return "products" if _PRODUCT.search(names[0]) and found not in ("adapters", "generation") else found


def component(event: FunctionEvent, forward: dict[int, FunctionEvent]) -> str:
    """The component of an operator's own time.

    Args:
        forward: the operator that made the node of each sequence number.
    """
    names = [each.name for each in around(event)]
    node = next((each for each in around(event) if each.name.startswith(_BACKWARD)), None)
    if node is None:
        return by_names(names)
    if "AccumulateGrad" in node.name:
        return "rest"
    inner = names[: names.index(node.name) + 1]
    own = by_names([name.removeprefix(_BACKWARD) for name in inner])
    maker = forward.get(node.sequence_nr)
    there = by_names([each.name for each in around(maker)]) if maker is not None else "rest"
    return own if there == "rest" or (own == "products" and there not in ("adapters", "generation")) else there


def is_operator(event: FunctionEvent) -> bool:
    """Whether this is an operator, and not a frame of Python, whose time the profiler makes much longer."""
    if event.name.startswith("<built-in method"):
        # a kernel of ours that is called without torch's dispatcher
        return "PyCapsule" in event.name
    return not (re.search(r"\.py\(\d+\): ", event.name) or event.name.startswith(("nn.Module: ", "<", "Optimizer.")))


def by_component(call: Callable[[], Any], warm: int = 1) -> list[tuple[str, FunctionEvent]]:
    """Every operator that a call runs, with its component.

    Args:
        warm: calls before the one that is looked at.
    """
    for _ in range(warm):
        call()
    with profile(activities=[ProfilerActivity.CPU], with_stack=True) as profiler:
        call()
    events = [event for event in profiler.events() if is_operator(event)]
    forward: dict[int, FunctionEvent] = {}
    for event in events:
        backward = any(each.name.startswith(_BACKWARD) for each in around(event))
        if event.sequence_nr >= 0 and not backward:
            # operators before the one that made the node have its number, too
            last = forward.get(event.sequence_nr)
            if last is None or event.time_range.start >= last.time_range.start:
                forward[event.sequence_nr] = event
    return [(component(event, forward), event) for event in events]


def shares(call: Callable[[], Any], warm: int = 1) -> dict[str, float]:
    """The share of each component in the time of all operators that a call runs.

    Args:
        warm: as in :func:`by_component`.
    """
    spent: Counter[str] = Counter()
    for name, event in by_component(call, warm):
        spent[name] += event.self_cpu_time_total
    total = sum(spent.values())
    return {name: spent[name] / total for name in COMPONENTS if spent[name]}


def peak_bytes(call: Callable[[], Any]) -> int:
    """By how much torch's allocations on the CPU rise at most during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for record in sorted(records, key=lambda e: e.start_ns()):
        now += record.nbytes()
        peak = max(peak, now)
    return peak
