// One row of a residual sum: dropout, sum and T5's RMS norm, while the row is in the first-level cache.

// out = hidden + dropout(y), rounded to storage. The sum of the squares of what is stored.
template <class S>
HFF_INLINE double add_row(const typename S::T* hidden, const typename S::T* y, const Keep& keep, int64_t n,
                          typename S::T* out) {
  return sum_vectors(n, [&](int64_t c, auto at) {
    const vf branch = keep.apply(c, at.template load<S>(y + c));
    const vf sum = at.template load<S>(hidden + c) + branch;
    at.template store<S>(out + c, sum);
    const vf stored = rounded<S>(sum);
    return stored * stored;
  });
}

template <class S>
HFF_INLINE double square_sum(const typename S::T* x, int64_t n) {
  return sum_vectors(n, [&](int64_t c, auto at) {
    const vf v = at.template load<S>(x + c);
    return v * v;
  });
}

// The norm rounds to the weight's type before it multiplies by the weight, where that is a 16-bit type.
template <class S, class W>
HFF_INLINE void norm_row(const typename S::T* x, float rstd, const float* weight, int64_t n, typename W::T* normed) {
  each_vector(n, [&](int64_t c, auto at) {
    const vf unit = rounded<W>(at.template load<S>(x + c) * splat(rstd));
    at.template store<W>(normed + c, unit * at.template load<F32>(weight + c));
  });
}

// The weight of a norm in float32; empty without one.
template <class W>
Buffer norm_weight(const void* weight, int64_t n) {
  return weight == nullptr ? Buffer() : widened<W>(weight, n);
}

// What one thread needs to finish rows of p.
template <class S, class W>
struct ResidualRows {
  const ResidualForward& p;
  const Buffer& weight;  // norm_weight
  Keep keep;

  ResidualRows(const ResidualForward& p, const Buffer& weight) : p(p), weight(weight), keep(p.dropout, p.n) {}

  // Row i, whose y is given.
  HFF_INLINE void operator()(int64_t i, const typename S::T* y) {
    const int64_t n = p.n;
    const typename S::T* x = y;
    double square;
    if (p.hidden.data != nullptr) {
      keep.draw(i);
      auto* out = row_of<S>(p.out, n, i);
      square = add_row<S>(row_of<S>(p.hidden, i), y, keep, n, out);
      x = out;
    } else {
      square = square_sum<S>(x, n);
    }
    if (p.weight == nullptr) return;
    const float rstd = 1.0f / __builtin_sqrtf(float(square / double(n)) + p.eps);
    if (p.rstd != nullptr) p.rstd[i] = rstd;
    norm_row<S, W>(x, rstd, weight.data(), n, row_of<W>(p.normed, n, i));
  }
};
