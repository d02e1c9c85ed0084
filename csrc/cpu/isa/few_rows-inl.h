// The forward of a few rows in float32 without a pre-norm, where nothing is saved, as in decoding. It gives the bits of
// forward-inl.h, whose preparations for many rows take longer than the sums of one.

template <Activation code>
void activate_row(float* z, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) F32::store(z + i, activate<code, false>(F32::load(z + i)).value);
}

// One row. z has room for padded(b + 1) numbers.
inline void forward_row(const Problem& p, const FoldedVectors& w, const float* const* down, const float* const* up,
                        const float* x, float* out, float* z) {
  const int64_t d = p.layout.d, b = p.layout.b, c = b + 1;
  dot<Widened<F32>>(&x, 1, down, b, d, z, 1);
  for (int64_t j = 0; j < b; ++j) z[j] += w.bias[j];
  with_activation(p.activation, [&](auto constant) { activate_row<constant()>(z, padded(b)); });
  z[b] = 1.0f;
  float r = 1.0f;
  if (p.layout.post_norm) {
    // Whole vectors of one number each, so that compilers fuse their multiplications and additions as in forward-inl.h.
    // If they knew that the numbers are equal, they would multiply only one.
    vf square = {};
    for (int64_t i = 0; i < c; ++i) {
      const int64_t first = i / kSumResults * kSumResults;  // where times_root begins, for the bits of its sums
      const float* root = w.root + i * c;
      vf sum = {};
      for (int64_t j = first; j < c; ++j) {
        vf h = splat(z[j]);
        HFF_IN_REGISTER(h);
        sum = Scaled<F32>::add(sum, root[j], h);
      }
      HFF_IN_REGISTER(sum);
      square += sum * sum;
    }
    r = 1.0f / __builtin_sqrtf(square[0] + kEps);
  }
  for (int64_t j = 0; j < c; ++j) z[j] = (j < b ? w.scale_of(j) : 1.0f) * r * z[j];
  const float* none = nullptr;
  sums_by_row<Scaled<F32>>(Coefficients<float>{z, c, 1}, 1, c, up, d,
                           ToRows<F32>{&x, &out, w.beta, nullptr, nullptr, &none});
}

inline void few_rows(const Problem& p, const Rows& x, const FoldedWeights& folded, void* out) {
  const int64_t d = p.layout.d, b = p.layout.b;
  Buffer z(padded(b + 1));
  std::vector<const float*> rows(2 * b + 1);
  const float **down = rows.data(), **up = down + b;
  const auto* source = static_cast<const float*>(x.data);
  for (int64_t s = 0; s < p.B; ++s) {
    const int64_t task = p.task == nullptr ? 0 : p.task[s];
    const FoldedVectors w(p, folded, task < 0 ? 0 : task);
    if (task >= 0) {
      const float* wd = static_cast<const float*>(folded.wd) + task * b * d;
      const float* wg = static_cast<const float*>(folded.wg) + task * b * d;
      for (int64_t j = 0; j < b; ++j) down[j] = wd + j * d, up[j] = wg + j * d;
      up[b] = w.up_bias;
    }
    for (int64_t i = s * p.M; i < (s + 1) * p.M; ++i) {
      float* to = static_cast<float*>(out) + i * d;
      if (task < 0)
        std::memcpy(to, source + x.offset[i], d * sizeof(float));
      else
        forward_row(p, w, down, up, source + x.offset[i], to, z.data());
    }
  }
}
