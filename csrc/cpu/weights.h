// One task's folded weights as the micro-kernels read them: float32, rows over d. Included once per instruction set.

constexpr int64_t BLOCK = 64;  // rows at a time: with d = 768 in float32, 192 KiB, which a second-level cache holds

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

struct Weights {
  const float* down;     // [b, d]: the folded tensor itself where it is float32
  const float* up;       // [b, d]: the same
  const float* bias;     // [b] of the down-projection
  const float* up_bias;  // [d]
  const float* beta;     // [d], or null
  const float* scale;    // [b], or null
  Buffer widened;        // down and up, where they are of 16 bits
  Buffer root;           // [b + 1, padded]: R
  Buffer root_t;         // [b + 1, padded]: R transposed
  std::vector<const float*> down_rows, up_rows, root_rows, root_t_rows;  // up_rows: up, then up_bias

  template <class S>
  Weights(const Problem& p, const FoldedWeights& f, int64_t task, S) {
    const int64_t d = p.layout.d, b = p.layout.b, c = b + 1, cp = padded(c);
    const auto* wd = static_cast<const typename S::T*>(f.wd) + task * b * d;
    const auto* wg = static_cast<const typename S::T*>(f.wg) + task * b * d;
    bias = f.vectors + task * p.layout.vectors();
    up_bias = bias + b;
    beta = p.layout.post_norm ? up_bias + d : nullptr;
    scale = p.layout.post_norm ? f.scale + task * b : nullptr;
    if constexpr (sizeof(typename S::T) == sizeof(float)) {
      down = wd;
      up = wg;
    } else {
      widened.resize(2 * b * d);
      widen<S>(wd, b * d, widened.data());
      widen<S>(wg, b * d, widened.data() + b * d);
      down = widened.data();
      up = down + b * d;
    }
    down_rows = rows_of(down, b, d);
    up_rows = rows_of(up, b, d);
    up_rows.push_back(up_bias);
    if (!p.layout.post_norm) return;
    root.assign(c * cp, 0.0f);
    root_t.assign(c * cp, 0.0f);
    const float* R = f.root + task * c * c;
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < c; ++j) root[i * cp + j] = root_t[j * cp + i] = R[i * c + j];
    root_rows = rows_of(root.data(), c, cp);
    root_t_rows = rows_of(root_t.data(), c, cp);
  }

  float scaled(float x, int64_t j) const { return scale == nullptr ? x : x * scale[j]; }

  template <class S>
  static void widen(const typename S::T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) F32::store(to + i, S::load(from + i));
    for (; i < n; ++i) to[i] = S::one(from[i]);
  }

  static std::vector<const float*> rows_of(const float* m, int64_t n, int64_t ld) {
    std::vector<const float*> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = m + i * ld;
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
