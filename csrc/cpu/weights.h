// One task's folded weights as the micro-kernels read them: float32, rows over d. Included once per instruction set.

constexpr int64_t BLOCK = 64;  // rows at a time: with d = 768 in float32, 192 KiB, which a second-level cache holds

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

struct Weights {
  Buffer down;        // [b, d]
  Buffer up;          // [b + 1, d]: the columns of Wg times their scale (exact: powers of two), then bg
  Buffer root;        // [b + 1, padded]: R
  Buffer root_t;      // [b + 1, padded]: R transposed
  const float* bias;  // [b]
  const float* beta;  // [d], or null
  std::vector<const float*> down_rows, up_rows, root_rows, root_t_rows;

  template <class S>
  Weights(const Problem& p, const FoldedWeights& f, int64_t task, S) {
    const int64_t d = p.layout.d, b = p.layout.b, c = b + 1, cp = padded(c);
    const auto* wd = static_cast<const typename S::T*>(f.wd) + task * b * d;
    const auto* wg = static_cast<const typename S::T*>(f.wg) + task * b * d;
    const float* vectors = f.vectors + task * p.layout.vectors();
    bias = vectors;
    beta = p.layout.post_norm ? vectors + b + d : nullptr;
    down.resize(b * d);
    for (int64_t i = 0; i < b * d; ++i) down[i] = S::one(wd[i]);
    up.resize(c * d);
    for (int64_t j = 0; j < b; ++j) {
      const float scale = p.layout.post_norm ? f.scale[task * b + j] : 1.0f;
      for (int64_t i = 0; i < d; ++i) up[j * d + i] = S::one(wg[i * b + j]) * scale;
    }
    for (int64_t i = 0; i < d; ++i) up[b * d + i] = vectors[b + i];
    down_rows = rows_of(down, b, d);
    up_rows = rows_of(up, c, d);
    if (!p.layout.post_norm) return;
    root.assign(c * cp, 0.0f);
    root_t.assign(c * cp, 0.0f);
    const float* R = f.root + task * c * c;
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < c; ++j) root[i * cp + j] = root_t[j * cp + i] = R[i * c + j];
    root_rows = rows_of(root, c, cp);
    root_t_rows = rows_of(root_t, c, cp);
  }

  static std::vector<const float*> rows_of(const Buffer& m, int64_t n, int64_t ld) {
    std::vector<const float*> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = m.data() + i * ld;
    return rows;
  }
};

// Results into a float32 matrix, starting from zero or from what is there.
struct ToFloat {
  float* out;
  int64_t ld;
  bool add;
  HF_INLINE vf first(int64_t i, int64_t c) const { return add ? F32::load(out + i * ld + c) : vf{}; }
  HF_INLINE void store(int64_t i, int64_t c, vf v) const { F32::store(out + i * ld + c, v); }
  HF_INLINE vf first_part(int64_t i, int64_t c, int n) const {
    return add ? load_part<F32>(out + i * ld + c, n) : vf{};
  }
  HF_INLINE void store_part(int64_t i, int64_t c, vf v, int n) const { store_part_f32(out + i * ld + c, v, n); }
  static HF_INLINE void store_part_f32(float* p, vf v, int n) {
    hyperformer_fast::HF_NAMESPACE::store_part<F32>(p, v, n);
  }
};

// Results in storage dtype, starting from a row of the input, plus a vector over d where there is one.
template <class S>
struct ToRows {
  const typename S::T* const* from;
  typename S::T* const* to;
  const float* plus;
  HF_INLINE vf first(int64_t i, int64_t c) const {
    const vf v = S::load(from[i] + c);
    return plus == nullptr ? v : v + F32::load(plus + c);
  }
  HF_INLINE void store(int64_t i, int64_t c, vf v) const { S::store(to[i] + c, v); }
  HF_INLINE vf first_part(int64_t i, int64_t c, int n) const {
    const vf v = load_part<S>(from[i] + c, n);
    return plus == nullptr ? v : v + load_part<F32>(plus + c, n);
  }
  HF_INLINE void store_part(int64_t i, int64_t c, vf v, int n) const {
    hyperformer_fast::HF_NAMESPACE::store_part<S>(to[i] + c, v, n);
  }
};
