// dropout(softmax(scores + bias + mask)) and its gradient, row by row. A row is computed in float32 in a buffer that is
// padded to whole vectors, so that no loop has a remainder.

// Adds n numbers, `stride` apart, to a row.
template <class S>
HFF_INLINE void add_numbers(const typename S::T* p, int64_t stride, int64_t n, float* row) {
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) row[j] += S::one(p[j * stride]);
    return;
  }
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) F32::store(row + j, F32::load(row + j) + S::load(p + j));
  for (; j < n; ++j) row[j] += S::one(p[j]);
}

// Replaces the scores that a mask forbids.
HFF_INLINE void forbid(const uint8_t* allowed, int64_t stride, int64_t n, float* row) {
  typedef uint8_t vb_any __attribute__((vector_size(kLanes), aligned(1), may_alias));
  constexpr float closed = -std::numeric_limits<float>::infinity();
  int64_t j = 0;
  for (; stride == 1 && j + kLanes <= n; j += kLanes) {
    const vi on = __builtin_convertvector(*reinterpret_cast<const vb_any*>(allowed + j), vi) != 0;
    F32::store(row + j, select(on, F32::load(row + j), splat(closed)));
  }
  for (; j < n; ++j) row[j] = allowed[j * stride] ? row[j] : closed;
}

inline void add_term(const ScoreTerm& term, int64_t b, int64_t h, int64_t i, int64_t n, float* row) {
  const int64_t at = term.row(b, h, i), stride = term.stride[3];
  switch (term.kind) {
    case ScoreTerm::kNone:
      return;
    case ScoreTerm::kFloat32:
      return add_numbers<F32>(static_cast<const float*>(term.data) + at, stride, n, row);
    case ScoreTerm::kBFloat16:
      return add_numbers<BF16>(static_cast<const bf16_t*>(term.data) + at, stride, n, row);
    case ScoreTerm::kFloat16:
      return add_numbers<F16>(static_cast<const f16_t*>(term.data) + at, stride, n, row);
    case ScoreTerm::kBool:
      return forbid(static_cast<const uint8_t*>(term.data) + at, stride, n, row);
  }
}

// The larger of each pair, and NaN where there is one: a comparison alone would drop it.
HFF_INLINE vf larger(vf m, vf x) { return select((x > m) | (x != x), x, m); }

HFF_INLINE float largest_of(vf m) {
#if HFF_LANES == 16
  m = larger(m, __builtin_shufflevector(m, m, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  m = larger(m, __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  m = larger(m, __builtin_shufflevector(m, m, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  m = larger(m, __builtin_shufflevector(m, m, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif HFF_LANES == 8
  m = larger(m, __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3));
  m = larger(m, __builtin_shufflevector(m, m, 2, 3, 0, 1, 6, 7, 4, 5));
  m = larger(m, __builtin_shufflevector(m, m, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  m = larger(m, __builtin_shufflevector(m, m, 2, 3, 0, 1));
  m = larger(m, __builtin_shufflevector(m, m, 1, 0, 3, 2));
#endif
  return m[0];
}

// Replaces the n scores of a row by their softmax, and what pads them by zeros. A row whose scores are all -inf becomes
// zeros.
inline void softmax_row(float* row, int64_t n) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const int64_t end = padded(n);
  for (int64_t c = n; c < end; ++c) row[c] = lowest;
  vf m = splat(lowest);
  for (int64_t c = 0; c < end; c += kLanes) m = larger(m, F32::load(row + c));
  const float largest = largest_of(m);
  if (largest == lowest) {
    std::memset(row, 0, end * sizeof(float));
    return;
  }
  vf total = {};
  for (int64_t c = 0; c < end; c += kLanes) {
    const vf e = exp_negative(F32::load(row + c) - splat(largest));
    F32::store(row + c, e);
    total += e;
  }
  // A product with the reciprocal would be rounded twice, which shows where one score dominates.
  const vf divisor = splat(sum(total));
  for (int64_t c = 0; c < end; c += kLanes) F32::store(row + c, F32::load(row + c) / divisor);
}

// The n numbers of a row, widened into a padded buffer.
template <class S>
HFF_INLINE void widen_row(const typename S::T* from, int64_t n, float* to) {
  each_vector(n, [&](int64_t c, auto at) { F32::store(to + c, at.template load<S>(from + c)); });
}

// The first n numbers of a padded buffer, rounded to storage.
template <class S>
HFF_INLINE void store_row(const float* from, int64_t n, typename S::T* to) {
  each_vector(n, [&](int64_t c, auto at) { at.template store<S>(to + c, F32::load(from + c)); });
}

// Replaces dp, the gradient of what the dropout made of the probabilities p, by the gradient of the scores,
// p (dp - mean of dp). Both are padded with zeros up to `end`. The probabilities were rounded to storage, so that they
// do not sum to 1, and the mean is divided by their sum. The mean of what is left, 0 but for the rounding of the first
// mean, is subtracted too: that rounding is not small beside dp - mean where one probability is nearly 1.
HFF_INLINE void softmax_gradient(const float* p, const Keep& keep, int64_t end, float* dp) {
  vf inner = {}, rest = {}, total = {};
  for (int64_t c = 0; c < end; c += kLanes) {
    const vf g = keep.apply(c, F32::load(dp + c)), v = F32::load(p + c);
    F32::store(dp + c, g);
    inner += v * g;
    total += v;
  }
  const float weight = sum(total);
  const auto mean_of = [&](vf products) { return splat(weight == 0.0f ? 0.0f : sum(products) / weight); };
  const vf mean = mean_of(inner);
  for (int64_t c = 0; c < end; c += kLanes) {
    const vf g = F32::load(dp + c) - mean;
    F32::store(dp + c, g);
    rest += F32::load(p + c) * g;
  }
  const vf left = mean_of(rest);
  for (int64_t c = 0; c < end; c += kLanes) F32::store(dp + c, F32::load(p + c) * (F32::load(dp + c) - left));
}

// A row of the scores [B, H, Lq, Lk].
struct ScoreRow {
  int64_t b, h, i;

  static ScoreRow of(const SoftmaxProblem& p, int64_t r) { return {r / p.Lq / p.H, r / p.Lq % p.H, r % p.Lq}; }
  int64_t index(const SoftmaxProblem& p) const { return (b * p.H + h) * p.Lq + i; }
};

// Adds bias and mask to a row of scores.
inline void add_terms(const SoftmaxProblem& p, const ScoreRow& at, float* row) {
  add_term(p.bias, at.b, at.h, at.i, p.Lk, row);
  add_term(p.mask, at.b, at.h, at.i, p.Lk, row);
}

template <class S>
HFF_INLINE const typename S::T* row_of(const View4& t, const ScoreRow& at) {
  return static_cast<const typename S::T*>(t.data) + t.row(at.b, at.h, at.i);
}

template <class S>
void softmax_forward(const SoftmaxProblem& p, const View4& scores, void* out, void* probabilities,
                     const Parallel& parallel) {
  const int64_t n = p.Lk;
  each_part(p.rows(), rows_at_a_time(n), parallel, [&](int64_t, int64_t first, int64_t last) {
    Buffer row(padded(n));
    Keep keep(p.dropout, n);
    for (int64_t r = first; r < last; ++r) {
      const ScoreRow at = ScoreRow::of(p, r);
      widen_row<S>(row_of<S>(scores, at), n, row.data());
      add_terms(p, at, row.data());
      softmax_row(row.data(), n);
      if (probabilities != nullptr) store_row<S>(row.data(), n, row_of<S>(probabilities, n, r));
      keep.draw(r);
      auto* to = row_of<S>(out, n, r);
      each_vector(
          n, [&](int64_t c, auto part) { part.template store<S>(to + c, keep.apply(c, F32::load(row.data() + c))); });
    }
  });
}

template <class S>
void softmax_backward(const SoftmaxProblem& p, const View4& g, const void* probabilities, void* dscores,
                      const Parallel& parallel) {
  const int64_t n = p.Lk;
  each_part(p.rows(), rows_at_a_time(n), parallel, [&](int64_t, int64_t first, int64_t last) {
    Buffer row(padded(n)), dp(padded(n));
    Keep keep(p.dropout, n);
    for (int64_t r = first; r < last; ++r) {
      widen_row<S>(static_cast<const typename S::T*>(probabilities) + r * n, n, row.data());
      widen_row<S>(row_of<S>(g, ScoreRow::of(p, r)), n, dp.data());
      keep.draw(r);
      softmax_gradient(row.data(), keep, padded(n), dp.data());
      store_row<S>(dp.data(), n, row_of<S>(dscores, n, r));
    }
  });
}

void softmax_forward_any(const SoftmaxProblem& p, const View4& scores, void* out, void* probabilities,
                         const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { softmax_forward<S>(p, scores, out, probabilities, parallel); });
}

void softmax_backward_any(const SoftmaxProblem& p, const View4& g, const void* probabilities, void* dscores,
                          const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) { softmax_backward<S>(p, g, probabilities, dscores, parallel); });
}
