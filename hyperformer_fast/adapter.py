"""``FusedHyperAdapter``: one adapter with its hypernetwork, as a module for any model."""

from __future__ import annotations

from torch import Tensor, nn

from . import ops
from .activations import canonical_activation
from .hypernetwork import Generator
from .layout import AdapterLayout


class FusedHyperAdapter(nn.Module):
    """A bottleneck adapter whose weights are generated from an embedding (paper sections 2 and 3).

    It replaces an ``AdapterController`` of the authors' code, or any ``adapter(x)`` that is applied to the output of a
    sublayer before the residual is added. The skip connection of the adapter itself is included.

    Args:
        input_dim: d, the width of x.
        down_sample_size: b, the width of the bottleneck.
        embedding_dim: k, the width of the embedding.
        non_linearity: ``gelu_new``, ``gelu``, ``relu`` or ``silu``.
        add_layer_norm_before_adapter: whether a layer norm is applied to the adapter's input.
        add_layer_norm_after_adapter: whether a layer norm is applied to its output, before the skip connection.
        conditional_layer_norm: whether the norms' parameters are generated, too. False makes them plain trained
            parameters.

    Raises:
        ValueError: an argument has a value that is not allowed; the message names the argument, the value and what is
            allowed.
    """

    def __init__(
        self,
        input_dim: int,
        down_sample_size: int,
        embedding_dim: int,
        non_linearity: str = "gelu_new",
        add_layer_norm_before_adapter: bool = False,
        add_layer_norm_after_adapter: bool = True,
        conditional_layer_norm: bool = True,
    ):
        super().__init__()
        for name, value in (
            ("input_dim", input_dim),
            ("down_sample_size", down_sample_size),
            ("embedding_dim", embedding_dim),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.activation = canonical_activation(non_linearity, field="non_linearity")
        self.layout = AdapterLayout(
            input_dim, down_sample_size, add_layer_norm_before_adapter, add_layer_norm_after_adapter
        )
        self.embedding_dim = embedding_dim
        self.generator = Generator(1, self.layout, embedding_dim, conditional_layer_norm)

    def forward(self, x: Tensor, embedding: Tensor, task_index: Tensor | None = None) -> Tensor:
        """Generate the adapter and apply it to x.

        Args:
            x: [..., d], or [B, ..., d] with ``task_index``.
            embedding: [k], or [T, k] with ``task_index``.
            task_index: [B] int32 or int64; which of the T embeddings each sample uses, or -1 for no adapter, which
                returns the sample as it is.

        Returns:
            A new tensor of x's shape and dtype.

        Raises:
            ValueError: shapes, dtypes or devices do not fit together; the message names both.
        """
        if embedding.dim() not in (1, 2) or embedding.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"embedding must be [{self.embedding_dim}] or [T, {self.embedding_dim}], got {list(embedding.shape)}"
            )
        generator = self.generator
        e = embedding.to(generator.weight.dtype).reshape(-1, self.embedding_dim)
        if generator.norms is None:
            G, g0 = generator.weight.squeeze(0), generator.bias.squeeze(0)
            return ops.hyper_adapter(x, e, G, g0, self.layout, self.activation, task_index)
        packed = generator(e.unsqueeze(0)).squeeze(0)
        return ops.adapter(x, packed, self.layout, self.activation, task_index=task_index)

    def extra_repr(self) -> str:
        return f"{self.layout}, k={self.embedding_dim}, activation={self.activation}"
