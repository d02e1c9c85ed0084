// One task's folded weights, as the products read them.

// Rows at a time. With d = 768 in float32 they take 192 KiB, which a second-level cache holds.
constexpr int64_t kBlockRows = 64;
static_assert(kBlockRows % kLanes == 0 && kBlockRows % 2 == 0, "whole vectors, and pairs, of rows");

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
std::vector<const T*> rows_of(const T* m, int64_t n, int64_t ld) {
  std::vector<const T*> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = m + i * ld;
  return rows;
}

// The float32 vectors, which weights of every storage type have.
struct FoldedVectors {
  const float* bias;     // [b] of the down-projection
  const float* up_bias;  // [d]
  const float* beta;     // [d], or null
  const float* scale;    // [b], or null
  const float* root;     // [b + 1, b + 1], or null

  FoldedVectors(const Problem& p, const FoldedWeights& f, int64_t task) {
    const int64_t b = p.layout.b, c = b + 1;
    const bool post = p.layout.post_norm;
    bias = f.vectors + task * p.layout.vectors();
    up_bias = bias + b;
    beta = post ? up_bias + p.layout.d : nullptr;
    scale = post ? f.scale + task * b : nullptr;
    root = post ? f.root + task * c * c : nullptr;
  }

  float scale_of(int64_t j) const { return scale == nullptr ? 1.0f : scale[j]; }
};

// The distance between rows of a copy. Strides that are multiples of 2 KiB map to few sets of the first-level cache
// (conflict misses), so they are padded by one vector.
inline int64_t spread(int64_t d) { return padded(d) * sizeof(float) % 2048 == 0 ? padded(d) + kLanes : padded(d); }
// From this number of rows on, copying the weights to pad their rows pays.
constexpr int64_t kSpreadRows = 512;

// Projections in float32: the folded tensors themselves if they are float32, else copies that are widened once.
template <class S>
struct Weights : FoldedVectors {
  using Dot = Widened<S>;
  using Sum = Scaled<F32>;
  static constexpr bool paired = false;
  Buffer widened;
  std::vector<const float*> down_dot, up_dot;         // [b], and [b + 1] because the bias follows
  const std::vector<const float*>&down_sum, &up_sum;  // the same

  Weights(const Problem& p, const FoldedWeights& f, int64_t task, int64_t rows)
      : FoldedVectors(p, f, task), down_sum(down_dot), up_sum(up_dot) {
    const int64_t d = p.layout.d, b = p.layout.b;
    const auto* wd = static_cast<const typename S::T*>(f.wd) + task * b * d;
    const auto* wg = static_cast<const typename S::T*>(f.wg) + task * b * d;
    constexpr bool in_place = sizeof(typename S::T) == sizeof(float);
    if (in_place && (rows < kSpreadRows || spread(d) == padded(d))) {
      down_dot = rows_of(reinterpret_cast<const float*>(wd), b, d);
      up_dot = rows_of(reinterpret_cast<const float*>(wg), b, d);
    } else {
      const int64_t ld = spread(d);
      widened.resize(2 * b * ld);
      for (int64_t j = 0; j < b; ++j) {
        widen(wd + j * d, d, widened.data() + j * ld);
        widen(wg + j * d, d, widened.data() + (b + j) * ld);
      }
      down_dot = rows_of<float>(widened.data(), b, ld);
      up_dot = rows_of<float>(widened.data() + b * ld, b, ld);
    }
    up_dot.push_back(up_bias);
  }

  static void widen(const typename S::T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) F32::store(to + i, S::load(from + i));
    for (; i < n; ++i) to[i] = S::one(from[i]);
  }

  Weights(const Weights&) = delete;
};

#if HFF_HAS_DPBF16
// Projections in bfloat16: as they are for dot products, interleaved by pairs of rows for weighted sums. The bias is
// float32; in a dot product, two bfloat16 rows stand for it, whose sum it is.
template <>
struct Weights<BF16> : FoldedVectors {
  using Dot = PairedDot;
  using Sum = PairedSum;
  static constexpr bool paired = true;
  std::vector<bf16_t> halves;
  std::vector<uint32_t, LineAligned<uint32_t>> pairs;
  Buffer wide;                                    // the down-projection in float32, for a normalised source
  std::vector<const bf16_t*> down_dot, up_dot;    // [b], [b + 2]
  std::vector<const float*> down_wide;            // [b], with a pre-norm
  std::vector<const uint32_t*> down_sum, up_sum;  // [ceil(b / 2)]

  Weights(const Problem& p, const FoldedWeights& f, int64_t task, int64_t) : FoldedVectors(p, f, task) {
    const int64_t d = p.layout.d, b = p.layout.b, half = (b + 1) / 2;
    down_dot = rows_of(static_cast<const bf16_t*>(f.wd) + task * b * d, b, d);
    up_dot = rows_of(static_cast<const bf16_t*>(f.wg) + task * b * d, b, d);
    pairs.resize(2 * half * d);
    for (int64_t j = 0; j < half; ++j) {
      const bool last = 2 * j + 1 == b;
      interleave(down_dot[2 * j], last ? nullptr : down_dot[2 * j + 1], d, pairs.data() + j * d);
      interleave(up_dot[2 * j], last ? nullptr : up_dot[2 * j + 1], d, pairs.data() + (half + j) * d);
    }
    down_sum = rows_of<uint32_t>(pairs.data(), half, d);
    up_sum = rows_of<uint32_t>(pairs.data() + half * d, half, d);
    halves.resize(2 * d);
    for (int64_t i = 0; i < d; ++i) {
      halves[i] = BF16::narrow(up_bias[i]);
      halves[d + i] = BF16::narrow(up_bias[i] - BF16::one(halves[i]));
    }
    up_dot.push_back(halves.data());
    up_dot.push_back(halves.data() + d);
    if (!p.layout.pre_norm) return;
    wide.resize(b * d);
    for (int64_t i = 0; i < b * d; ++i) wide[i] = BF16::one(down_dot[0][i]);
    down_wide = rows_of<float>(wide.data(), b, d);
  }

  Weights(const Weights&) = delete;
};
#endif
