// Activation, gate and dropout, in one pass over memory each way.

template <class S, Activation code>
void act_dropout_forward(const ActDropoutForward& p, const Parallel& parallel) {
  const int64_t n = p.n;
  each_part(p.N, rows_at_a_time(n), parallel, [&](int64_t, int64_t first, int64_t last) {
    Keep keep(p.dropout, n);
    for (int64_t i = first; i < last; ++i) {
      const auto* a = row_of<S>(p.a, i);
      const auto* gate = p.c.data == nullptr ? nullptr : row_of<S>(p.c, i);
      auto* out = row_of<S>(p.out, n, i);
      keep.draw(i);
      each_vector(n, [&](int64_t c, auto at) {
        vf v = activate<code, false>(at.template load<S>(a + c)).value;
        if (gate != nullptr) v *= at.template load<S>(gate + c);
        at.template store<S>(out + c, keep.apply(c, v));
      });
    }
  });
}

// g act'(z). relu's is a choice, not a product: the other side of it is 0, whatever g is.
template <Activation code>
HFF_INLINE vf through_activation(vf g, vf z, vf derivative) {
  if constexpr (code == kRelu) return select(z <= splat(0.0f), splat(0.0f), g);
  return g * derivative;
}

template <class S, Activation code>
void act_dropout_backward(const ActDropoutBackward& p, const Parallel& parallel) {
  const int64_t n = p.n;
  each_part(p.N, rows_at_a_time(n), parallel, [&](int64_t, int64_t first, int64_t last) {
    Keep keep(p.dropout, n);
    for (int64_t i = first; i < last; ++i) {
      const auto *g = row_of<S>(p.g, i), *a = row_of<S>(p.a, i);
      const auto* gate = p.c.data == nullptr ? nullptr : row_of<S>(p.c, i);
      auto *da = row_of<S>(p.da, n, i), *dc = row_of<S>(p.dc, n, i);
      keep.draw(i);
      each_vector(n, [&](int64_t c, auto at) {
        const vf z = at.template load<S>(a + c);
        const Activated h = activate<code, true>(z);
        const vf from = at.template load<S>(g + c);
        vf to = through_activation<code>(from, z, h.derivative);
        if (gate != nullptr) {
          const vf to_gate = from * h.value;
          at.template store<S>(dc + c, keep.apply(c, to_gate));
          to *= at.template load<S>(gate + c);
        }
        at.template store<S>(da + c, keep.apply(c, to));
      });
    }
  });
}

void act_dropout_forward_any(const ActDropoutForward& p, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    with_activation(p.activation, [&](auto code) { act_dropout_forward<S, code()>(p, parallel); });
  });
}

void act_dropout_backward_any(const ActDropoutBackward& p, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    with_activation(p.activation, [&](auto code) { act_dropout_backward<S, code()>(p, parallel); });
  });
}
