// Products of bfloat16 pairs (AVX-512-BF16's vdpbf16ps): two multiply-adds per lane, float32 sums, no widening. This
// file is empty for instruction sets without that instruction. A lane holds two neighbours along the sum: two columns
// of one row in a dot product, two source rows of one column in a weighted sum.

#if HFF_HAS_DPBF16
typedef uint32_t vu_any __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

HFF_INLINE vf add_pairs(vf sum, vu a, vu b) {
  return reinterpret_cast<vf>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

// A dot product of bfloat16 rows, 2 * kLanes numbers per step.
struct PairedDot {
  using X = bf16_t;
  using Y = bf16_t;
  static constexpr int kStep = 2 * kLanes;
  struct Operand {
    vu v;
  };
  static HFF_INLINE Operand x(const X* p) { return {*reinterpret_cast<const vu_any*>(p)}; }
  static HFF_INLINE Operand y(const Y* p) { return x(p); }
  static HFF_INLINE Operand x_part(const X* p, int n) {
    return {reinterpret_cast<vu>(_mm512_maskz_loadu_epi16((1u << n) - 1, p))};
  }
  static HFF_INLINE Operand y_part(const Y* p, int n) { return x_part(p, n); }
  static HFF_INLINE vf add(vf sum, Operand a, Operand b) { return add_pairs(sum, a.v, b.v); }
};

// A weighted sum of pairs of source rows, interleaved number by number. A coefficient is a pair as well.
struct PairedSum {
  using Source = uint32_t;
  using Coefficient = uint32_t;
  using Vector = vu;
  static HFF_INLINE vu load(const Source* p) { return *reinterpret_cast<const vu_any*>(p); }
  static HFF_INLINE vu load_part(const Source* p, int n) {
    return reinterpret_cast<vu>(_mm512_maskz_loadu_epi32((1u << n) - 1, p));
  }
  static HFF_INLINE vf add(vf sum, uint32_t a, vu v) { return add_pairs(sum, vu{} + a, v); }
};

// to[c] = (a[c], b[c]) for d numbers; a null b stands for zeros.
inline void interleave(const bf16_t* a, const bf16_t* b, int64_t d, uint32_t* to) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    const vu low = __builtin_convertvector(*reinterpret_cast<const vh_any*>(a + c), vu);
    const vu high = b == nullptr ? vu{} : __builtin_convertvector(*reinterpret_cast<const vh_any*>(b + c), vu);
    *reinterpret_cast<vu_any*>(to + c) = low | (high << 16);
  }
  for (; c < d; ++c) to[c] = a[c].bits | (b == nullptr ? 0u : uint32_t(b[c].bits) << 16);
}
#endif
