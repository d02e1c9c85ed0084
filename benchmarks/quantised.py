"""A quantised frozen T5 under exact adapters, beside the same T5 in float32: errors, texts, bytes and time.

    python benchmarks/quantised.py [--t5 FOLDER] [--data FOLDER] [--forms torchao-int8 bnb-int8 bnb-nf4]
                                   [--rows 64] [--new-tokens 16] [--rounds 9] [--quick] [--output DIR]

Without --t5, a T5-small with random weights and rows of random tokens; with it, a pretrained T5 and its tokenizer (or
"embedded"), and rows of the built-in tasks, or of --data (a folder of tasks, as `hyperformer-fast train` takes it). The
adapters are HyperFormer++'s of eight tasks with random weights that matter, the very same in each model and never
quantised; rows of all tasks are in each batch. Compared with the float model: the relative error of the logits and the
loss of given targets, of the gradient of everything that is trained, and the share of rows with the same greedy text.
How far the adapters are from exact is the error of the gradient against a float T5 whose weights are what the quantised
ones are worth.
Times are ratios over the float model's, and only shown where the errors are within what the form may have. Packages
that are absent are named on one line.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_rows import Case, adapted, real_case
from timing import arguments, interleaved, machine, relative_error, show, write
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hyperformer_fast import HyperFormerModel
from hyperformer_fast.parameters import GLUE, T5_SHAPES
from hyperformer_fast.tiny import EMBEDDED

FLOAT = "float32"


def torchao_int8(t5: nn.Module) -> nn.Module:
    """Each linear's weight in int8 with a scale for each row; products in float32. The embeddings stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(t5, Int8WeightOnlyConfig())
    return t5


def bitsandbytes(bits: int) -> Callable[[nn.Module], nn.Module]:
    def quantised(t5: nn.Module) -> nn.Module:
        """As transformers does it, which leaves the head and T5's ``wo`` as they are."""
        import bitsandbytes as bnb

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which says of each product that it casts
        for name, module in list(t5.named_modules()):
            if not isinstance(module, nn.Linear) or name.rpartition(".")[2] in ("lm_head", "wo"):
                continue
            sizes, weight = (module.in_features, module.out_features, False), module.weight.detach().clone()
            made: Any
            if bits == 8:
                made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                made = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            t5.set_submodule(name, made)
        return t5.to("cpu")  # which quantises

    return quantised


#: Form -> (package, what quantises a T5, the largest relative error of logits with which it may be timed).
FORMS: dict[str, tuple[str, Callable[[nn.Module], nn.Module], float]] = {
    "torchao-int8": ("torchao", torchao_int8, 0.1),
    "bnb-int8": ("bitsandbytes", bitsandbytes(8), 0.1),
    "bnb-nf4": ("bitsandbytes", bitsandbytes(4), 0.5),
}


def options_of() -> argparse.Namespace:
    parser = arguments(__doc__ or "", rounds=9, quick="two blocks of a narrow T5, four rows, one round")
    parser.add_argument("--t5", metavar="FOLDER", help='a pretrained T5, or "embedded" (default: random weights)')
    parser.add_argument("--data", metavar="FOLDER", help="tasks to take rows of (default: the built-in ones)")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="default: all")
    parser.add_argument("--rows", type=int, default=64, help="rows to compare, and of a timed forward (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of a text (default: 16)")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(rows=4, new_tokens=3, rounds=1)
    return options


def random_case(options: argparse.Namespace) -> Case:
    shape = dict(T5_SHAPES["T5-small"])
    if options.quick:
        shape |= {"num_layers": 2, "d_model": 64, "d_ff": 128}
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    ids, labels = (torch.randint(3, t5.config.vocab_size, (options.rows, length)) for length in (32, 8))
    tasks = [GLUE[row % len(GLUE)] for row in range(options.rows)]
    return Case(t5, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, tasks)


def trained(model: HyperFormerModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def weight_bytes(module: nn.Module) -> int:
    """The bytes of all weights, those that a quantiser keeps beside or within its tensors included."""

    def parts(value: object) -> Iterator[Tensor]:
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from parts(getattr(value, name))
        elif isinstance(value, Tensor):
            yield value

    found = [part for value in module.state_dict().values() for part in parts(value)]
    return sum({part.data_ptr(): part.nbytes for part in found}.values())


def of_same_worth(quantised: nn.Module, t5: nn.Module) -> nn.Module:
    """A copy of ``t5`` whose linears have the weights that the quantised ones stand for."""
    twin = copy.deepcopy(t5)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                worth = quantised.get_submodule(name)(torch.eye(module.in_features)).T.contiguous()
            module.weight = nn.Parameter(worth)
    return twin


class Answers(NamedTuple):
    """What one model makes of the rows."""

    logits: Tensor
    loss: float
    gradient: Tensor  #: of everything that is trained, in one vector
    texts: list[list[int]]
    alone: float  #: the largest relative difference of a row's logits from a call for its task alone


def gradient_of(model: HyperFormerModel, case: Case) -> tuple[float, Tensor]:
    loss = model(**case.inputs, task=case.tasks).loss
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in trained(model).values()])
    model.zero_grad()
    return loss.item(), gradient


def answers(model: HyperFormerModel, case: Case, tokens: int) -> Answers:
    # before any inference, because bitsandbytes then packs 4-bit weights in a form through which no gradient flows
    loss, gradient = gradient_of(model, case)
    given = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        logits = model(**case.inputs, task=case.tasks).logits.clone()
        texts = model.generate(**given, task=case.tasks, max_new_tokens=tokens, do_sample=False)
        alone = 0.0
        for task in dict.fromkeys(case.tasks):
            rows = [row for row, of in enumerate(case.tasks) if of == task]
            single = model(**{name: value[rows] for name, value in case.inputs.items()}, task=task).logits
            alone = max(alone, relative_error(single, logits[rows]))
    eos = model.config.eos_token_id
    ended = [[*itertools.takewhile(lambda token: token != eos, row[1:])] for row in texts.tolist()]
    return Answers(logits, loss, gradient, ended, alone)


def calls_of(model: HyperFormerModel, case: Case, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed, by its name: a forward with targets, and the decoding of a fixed number of tokens."""

    def forward() -> object:
        with torch.inference_mode():
            return model(**case.inputs, task=case.tasks)

    calls: dict[str, Callable[[], object]] = {f"forward, {len(case.tasks)} rows": forward}
    for rows in sorted({1, min(8, len(case.tasks))}):
        given = {name: case.inputs[name][:rows] for name in ("input_ids", "attention_mask")}
        start, tasks = torch.zeros(rows, 1, dtype=torch.long), case.tasks[:rows]
        with torch.inference_mode():
            states = model(**given, decoder_input_ids=start, task=tasks).encoder_last_hidden_state
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        inputs = {"attention_mask": given["attention_mask"], "encoder_outputs": BaseModelOutput(states)}
        calls[f"a token, {rows} row{'s' if rows > 1 else ''}"] = lambda inputs=inputs, tasks=tasks: model.generate(
            **inputs, task=tasks, **options
        )
    return calls


def measure(options: argparse.Namespace) -> dict[str, Any]:
    case = random_case(options) if options.t5 is None else real_case(options.t5, options.data, options.rows)
    exact = adapted(copy.deepcopy(case.t5), case)
    truth = answers(exact, case, options.new_tokens)
    found: dict[str, Any] = {FLOAT: {"bytes": weight_bytes(exact.t5), "alone": truth.alone}}
    calls = {f"{FLOAT}: {what}": call for what, call in calls_of(exact, case, options.new_tokens).items()}
    absent = []
    for form in options.forms:
        package, quantise, most = FORMS[form]
        if importlib.util.find_spec(package) is None:
            absent.append(package)
            continue
        model = adapted(quantise(copy.deepcopy(case.t5)), case)
        for name, parameter in trained(model).items():
            if not torch.equal(parameter, trained(exact)[name]):
                raise SystemExit(f"{form}: {name} is not that of the float model")
        size = weight_bytes(model.t5)
        got = answers(model, case, options.new_tokens)
        _, same = gradient_of(adapted(of_same_worth(quantise(copy.deepcopy(case.t5)), case.t5), case), case)
        errors = {
            "logits": relative_error(got.logits, truth.logits),
            "loss": abs(got.loss - truth.loss) / truth.loss,
            "gradient": relative_error(got.gradient, truth.gradient),
            "gradient of equal weights": relative_error(got.gradient, same),
        }
        agree = sum(one == other for one, other in zip(got.texts, truth.texts, strict=True)) / len(truth.texts)
        right = errors["logits"] < most and got.alone < 1e-3
        found[form] = {"bytes": size, "errors": errors, "texts_agree": agree, "alone": got.alone, "timed": right}
        if right:
            calls |= {f"{form}: {what}": call for what, call in calls_of(model, case, options.new_tokens).items()}
        else:
            off = f"its logits by {errors['logits']:.2g}, those of a row in company by {got.alone:.2g}"
            print(f"{form} is not timed, because it is off: {off}")
    if absent:
        print(f"not installed, and left out: {', '.join(dict.fromkeys(absent))}")
    times = interleaved(calls, options.rounds)
    for name, seconds in times.items():
        form, _, what = name.partition(": ")
        found[form].setdefault("seconds", {})[what] = seconds
        found[form].setdefault("over_float", {})[what] = seconds / times[f"{FLOAT}: {what}"]
    return {
        "t5": options.t5 if options.t5 in (None, EMBEDDED) else Path(options.t5).name,
        "rows": len(case.tasks),
        "tasks": list(dict.fromkeys(case.tasks)),
        "new_tokens": options.new_tokens,
        "forms": found,
    }


def main() -> None:
    options = options_of()
    where, found = machine(), measure(options)
    forms = found["forms"]
    rows: list[tuple[object, ...]] = [("MB of the T5", *(f"{each['bytes'] / 1e6:.1f}" for each in forms.values()))]
    for error in ("logits", "loss", "gradient", "gradient of equal weights"):
        shown = (f"{each['errors'][error]:.2g}" if "errors" in each else "" for each in forms.values())
        rows.append((f"relative error, {error}", *shown))
    agree = (f"{each['texts_agree']:.0%}" if "texts_agree" in each else "" for each in forms.values())
    rows.append(("greedy texts that are the same", *agree))
    for what in forms[FLOAT]["seconds"]:
        rows.append((f"time of {what}", *(each.get("over_float", {}).get(what, "") for each in forms.values())))
    name = found["t5"] or "T5-small, random weights"
    show(f"{name}: {found['rows']} rows of {len(found['tasks'])} tasks", where, ("", *forms), rows)
    write(f"quantised-{found['t5'] or 'T5-small'}", where, found, options.output)


if __name__ == "__main__":
    main()
