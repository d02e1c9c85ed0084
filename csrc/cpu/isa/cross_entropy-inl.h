// Label-smoothed cross-entropy of rows of logits, and its gradient while a row is still in the second-level cache.

// Like `load` of Whole and Part, but padded with -inf.
template <class S>
HFF_INLINE vf load_logits(Whole at, const typename S::T* p) {
  return at.template load<S>(p);
}
template <class S>
HFF_INLINE vf load_logits(Part at, const typename S::T* p) {
  vf v = splat(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < at.n; ++i) v[i] = S::one(p[i]);
  return v;
}

template <class S>
void cross_entropy_row(const CrossEntropyProblem& p, const typename S::T* x, int64_t label, float* loss,
                       typename S::T* gradient) {
  const int64_t V = p.V;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const auto finish = [&](float value) {
    *loss = value;
    if (gradient != nullptr)
      each_vector(V, [&](int64_t c, auto at) { at.template store<S>(gradient + c, splat(value)); });
  };
  if (label == p.ignored) return finish(0.0f);
  if (label < 0 || label >= V) return finish(nan);
  vf m = splat(-std::numeric_limits<float>::infinity());
  each_vector(V, [&](int64_t c, auto at) { m = larger(m, load_logits<S>(at, x + c)); });
  const vf largest = splat(largest_of(m));
  const auto exponentials = [&](const typename S::T* from, int64_t n) {
    return sum_vectors(n, [&](int64_t c, auto at) { return exp_negative(load_logits<S>(at, from + c) - largest); });
  };
  const double others = exponentials(x, label) + exponentials(x + label + 1, V - label - 1);
  const double mine = exp_negative(splat(S::one(x[label])) - largest)[0], total = others + mine;
  const double s = p.smoothing, log_total = largest[0] + std::log(total);
  double value = (1 - s) * (log_total - S::one(x[label]));
  if (s != 0) {
    const double logits = sum_vectors(V, [&](int64_t c, auto at) { return at.template load<S>(x + c); });
    value += s * (log_total - logits / double(V));
  }
  if (value != value) return finish(nan);
  *loss = float(value);
  if (gradient == nullptr) return;
  const vf factor = splat(float(1 / total)), even = splat(float(s / double(V)));
  each_vector(V, [&](int64_t c, auto at) {
    at.template store<S>(gradient + c, exp_negative(at.template load<S>(x + c) - largest) * factor - even);
  });
  // p - (1 - s) at the label. That is s less the other probabilities, too, and keeps its digits where p is nearly 1;
  // the difference keeps them where p is small.
  const double at_label = others < mine ? s - others / total : mine / total - (1 - s);
  gradient[label] = S::narrow(float(at_label - s / double(V)));
}

void cross_entropy_any(const CrossEntropyProblem& p, const Rows& logits, float* loss, void* dlogits,
                       const Parallel& parallel) {
  with_storage(p.dtype, [&]<class S>(S) {
    each_part(p.N, rows_at_a_time(std::max<int64_t>(p.V, 1)), parallel, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        cross_entropy_row<S>(p, row_of<S>(logits, r), p.labels[r], loss + r, row_of<S>(dlogits, p.V, r));
    });
  });
}
