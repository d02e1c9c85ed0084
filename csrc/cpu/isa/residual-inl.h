// Dropout, residual sum and T5's RMS norm of it, in one pass over memory each way.

template <class S, class W>
void residual_forward(const ResidualForward& p, const Parallel& parallel) {
  const Buffer weight = norm_weight<W>(p.weight, p.n);
  each_part(p.N, rows_at_a_time(p.n), parallel, [&](int64_t, int64_t first, int64_t last) {
    ResidualRows<S, W> finish(p, weight);
    for (int64_t i = first; i < last; ++i) finish(i, row_of<S>(p.y, i));
  });
}

// scaled = g_normed * weight, whose product with x is returned. The weight's gradient is added to dweight [n], if any.
template <class S, class W>
HFF_INLINE double norm_gradients(const typename W::T* g, const typename S::T* x, float rstd, const float* weight,
                                 int64_t n, float* scaled, float* dweight) {
  return sum_vectors(n, [&](int64_t c, auto at) {
    const vf from = at.template load<W>(g + c), v = at.template load<S>(x + c);
    const vf to = from * at.template load<F32>(weight + c);
    at.template store<F32>(scaled + c, to);
    if (dweight != nullptr)
      at.template store<F32>(dweight + c, at.template load<F32>(dweight + c) + from * rounded<W>(v * splat(rstd)));
    return to * v;
  });
}

// dhidden = g_out + the norm's gradient, and dy = the dropout's gradient for it. All but x may be null; without
// `scaled` there is no norm.
template <class S>
HFF_INLINE void sum_gradients(const typename S::T* g_out, const float* scaled, const typename S::T* x, float rstd,
                              double along, const Keep& keep, int64_t n, typename S::T* dhidden, typename S::T* dy) {
  const vf r = splat(rstd), mean = splat(float(along * rstd / double(n)));
  each_vector(n, [&](int64_t c, auto at) {
    vf v = g_out == nullptr ? vf{} : at.template load<S>(g_out + c);
    if (scaled != nullptr) v += r * (at.template load<F32>(scaled + c) - at.template load<S>(x + c) * r * mean);
    if (dhidden != nullptr) at.template store<S>(dhidden + c, v);
    if (dy != nullptr) at.template store<S>(dy + c, keep.apply(c, v));
  });
}

// Rows whose sums for the weight's gradient one part holds. It depends on the shape alone, so that any number of
// threads adds in the same order.
inline int64_t rows_per_sum(int64_t N, int64_t n) { return std::max(rows_at_a_time(n), (N + 63) / 64); }

template <class S, class W>
void residual_backward(const ResidualBackward& p, const Parallel& parallel) {
  const int64_t n = p.n;
  const bool norm = p.g_normed.data != nullptr;
  const bool need_dweight = p.dweight != nullptr;
  const Buffer weight = norm_weight<W>(norm ? p.weight : nullptr, n);
  const int64_t rows = need_dweight ? rows_per_sum(p.N, n) : rows_at_a_time(n), parts = (p.N + rows - 1) / rows;
  Buffer sums(need_dweight ? std::max<int64_t>(parts, 1) * n : 0, 0.0f);
  each_part(p.N, rows, parallel, [&](int64_t part, int64_t first, int64_t last) {
    Keep keep(p.dy == nullptr ? Dropout() : p.dropout, n);
    Buffer scaled(norm ? n : 0);
    float* dweight = need_dweight ? sums.data() + part * n : nullptr;
    for (int64_t i = first; i < last; ++i) {
      const auto* g_out = p.g_out.data == nullptr ? nullptr : row_of<S>(p.g_out, i);
      const typename S::T* x = nullptr;
      float rstd = 0;
      double along = 0;
      if (norm) {
        x = row_of<S>(p.out, i);
        rstd = p.rstd[i];
        along = norm_gradients<S, W>(row_of<W>(p.g_normed, i), x, rstd, weight.data(), n, scaled.data(), dweight);
      }
      if (p.dhidden == nullptr && p.dy == nullptr) continue;
      keep.draw(i);
      sum_gradients<S>(g_out, norm ? scaled.data() : nullptr, x, rstd, along, keep, n, row_of<S>(p.dhidden, n, i),
                       row_of<S>(p.dy, n, i));
    }
  });
  if (!need_dweight) return;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t c = 0; c < n; ++c) sums[c] += sums[part * n + c];
  auto* to = static_cast<typename W::T*>(p.dweight);
  for (int64_t c = 0; c < n; ++c) to[c] = W::narrow(sums[c]);
}

void residual_forward_any(const ResidualForward& p, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    with_storage(p.weight_dtype, [&]<class W>(W) { residual_forward<S, W>(p, parallel); });
  });
}

void residual_backward_any(const ResidualBackward& p, const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    with_storage(p.weight_dtype, [&]<class W>(W) { residual_backward<S, W>(p, parallel); });
  });
}
