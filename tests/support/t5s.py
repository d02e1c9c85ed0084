"""Tiny random T5s, models around them whose adapters matter, and the method stated once more, without the library's
model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration

from hyperformer_fast import HyperFormerConfig, get_hyperformer_model

TASKS = ["mnli", "stsb", "cola"]
VARIANTS = ("hyperformer++", "hyperformer-shared", "hyperformer", "adapters")
# Not equal, so that the two cannot be taken for each other unseen (a deeper decoder breaks the cache of transformers
# 4.57).
LAYERS = {"encoder": 3, "decoder": 2}


def tiny_t5(gated=False, tied=True, dropout=0.0, dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": LAYERS["encoder"],
        "num_decoder_layers": LAYERS["decoder"],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": tied,
        "dropout_rate": dropout,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    t5 = T5ForConditionalGeneration(T5Config(**{**fields, **changes}))
    if not tied and t5.lm_head.weight is t5.shared.weight:
        # transformers 5 ties whatever the configuration says; a loaded T5 v1.1 has a head of its own
        t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.shared.weight))
    return t5.to(dtype).eval()


def tiny_config(variant="hyperformer++", tasks=TASKS, **changes):
    fields = {"task_embedding_dim": 6, "projected_task_embedding_dim": 6, "task_hidden_dim": 8, "reduction_factor": 8}
    fields["recipe"] = "authors"  # the paper's statement below is theirs
    return HyperFormerConfig(tasks=list(tasks), variant=variant, **{**fields, **changes})


def tiny_model(variant="hyperformer++", t5=None, fuse="auto", **changes):
    """A model whose adapters differ by task and site, and weigh as much as what they adapt."""
    model = get_hyperformer_model(tiny_t5() if t5 is None else t5, tiny_config(variant, **changes), fuse)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (model.task_embeddings, model.hypernetworks):
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def batch(B=4, L=7, M=5, seed=2):
    torch.manual_seed(seed)
    mask = torch.ones(B, L, dtype=torch.long)
    mask[0, -2:] = 0
    return {
        "input_ids": torch.randint(2, 64, (B, L)),
        "attention_mask": mask,
        "labels": torch.randint(2, 64, (B, M)),
    }


def stated_logits(model, t5, task, inputs):
    """Logits of ``t5`` with the adapters of ``model`` for one task, as the paper states them (section 2),
    differentiable.

    ``t5`` is bare: the adapters are put in by replacing methods of its modules, and computed part by part.
    """
    task_id = model.hyperformer_config.tasks.index(task)
    embeddings = model.task_embeddings()
    replaced = []
    for stack, layers in LAYERS.items():
        net = model.hypernetworks[stack]
        packed = net(embeddings)
        for layer in range(layers):
            block = getattr(t5, stack).block[layer]
            feed_forward = net.layout.unpack(packed[layer, task_id])
            attention = net.layout.unpack(packed[layers + layer, task_id])
            replaced.append(_adapt(block.layer[0].SelfAttention, attention))
            replaced.append(_adapt(block.layer[-1].DenseReluDense, feed_forward))
    try:
        return t5(**inputs).logits
    finally:
        for module in replaced:
            del module.forward


def _adapt(module, w):
    plain = module.forward

    def adapter(x):
        y = x
        if "down_weight" in w:  # absent in the ablation that leaves the norms alone
            z = F.gelu(x @ w["down_weight"].T + w["down_bias"], approximate="tanh")
            y = z @ w["up_weight"].T + w["up_bias"]
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x + y * w["post_gamma"] + w["post_beta"]

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        return (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out)

    module.forward = forward
    return module


def bare_copy(t5):
    """A copy of ``t5`` as it is now, without adapters."""
    twin = copy.deepcopy(t5)
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


def bits(module):
    """Every parameter of a T5, to compare later."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def train(model, steps=2, task="mnli"):
    """A few steps that move every trained parameter."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=step), task=task).loss.backward()
        optimizer.step()
