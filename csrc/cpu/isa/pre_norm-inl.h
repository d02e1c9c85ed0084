// The norm before the down-projection. Its gamma and beta are folded into the projection; what remains is here.

template <class S>
HFF_INLINE void row_statistics(const typename S::T* x, int64_t d, float& mean, float& rstd) {
  double total = 0, square = 0;
  vf acc = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) acc += S::load(x + c);
  total = sum(acc);
  for (; c < d; ++c) total += S::one(x[c]);
  mean = float(total / d);
  acc = vf{};
  for (c = 0; c + kLanes <= d; c += kLanes) {
    const vf v = S::load(x + c) - splat(mean);
    acc += v * v;
  }
  square = sum(acc);
  for (; c < d; ++c) square += double(S::one(x[c]) - mean) * (S::one(x[c]) - mean);
  rstd = 1.0f / __builtin_sqrtf(float(square / d) + kEps);
}

// s.source = (x - mean) rstd in float32. Mean and rstd are read from `saved` if they are `known`, else computed and,
// where wanted, saved.
template <class S>
void normalise(const Block<S>& block, int64_t d, const SavedRows& saved, bool known, Scratch<S>& s) {
  for (int64_t i = 0; i < block.n; ++i) {
    float mean, rstd;
    if (known) {
      mean = saved.pre_mean[block.index[i]];
      rstd = saved.pre_rstd[block.index[i]];
    } else {
      row_statistics<S>(block.x[i], d, mean, rstd);
      if (saved.pre_mean != nullptr) {
        saved.pre_mean[block.index[i]] = mean;
        saved.pre_rstd[block.index[i]] = rstd;
      }
    }
    float* to = s.source.data() + i * d;
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) F32::store(to + c, (S::load(block.x[i] + c) - splat(mean)) * splat(rstd));
    for (; c < d; ++c) to[c] = (S::one(block.x[i][c]) - mean) * rstd;
  }
}

// z = source W_d^T for a normalised source, which is float32 whatever the storage dtype.
template <class S>
void down_normalised(const Weights<S>& w, int64_t n, int64_t b, int64_t d, Scratch<S>& s) {
  if constexpr (Weights<S>::paired)
    dot<Widened<F32>>(s.source_rows.data(), n, w.down_wide.data(), b, d, s.z.data(), kBlockRows);
  else
    dot<Widened<F32>>(s.source_rows.data(), n, w.down_dot.data(), b, d, s.z.data(), kBlockRows);
}

// dx = g + the gradient in s.out taken through the normalisation.
template <class S>
void through_normalise(const Block<S>& block, int64_t d, const SavedRows& saved, const Scratch<S>& s) {
  for (int64_t i = 0; i < block.n; ++i) {
    const float *branch = s.out.data() + i * d, *source = s.source.data() + i * d,
                rstd = saved.pre_rstd[block.index[i]];
    double mean = 0, along = 0;
    for (int64_t k = 0; k < d; ++k) {
      mean += branch[k];
      along += double(branch[k]) * source[k];
    }
    const float m = float(mean / d), a = float(along / d);
    for (int64_t k = 0; k < d; ++k)
      block.out[i][k] = S::narrow(S::one(block.g[i][k]) + rstd * (branch[k] - m - source[k] * a));
  }
}
