// Dropout masks: Philox4x32-10, vectorised over groups of eight columns of one row. hyperformer_fast/philox.py defines
// the bits, which are the same for every instruction set.

typedef uint64_t vq __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 numbers
typedef uint16_t vn __attribute__((vector_size(kLanes * 4)));  // 2 * kLanes numbers
typedef int16_t vs_any __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int16_t vn_any __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

// The 64-bit products of the low halves of 64-bit lanes. What the high halves hold does not matter.
HFF_INLINE vq multiply_low(vq a, vq b) {
#if defined(__x86_64__) && HFF_LANES == 16
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__x86_64__) && HFF_LANES == 8
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// One counter of Philox in each 64-bit lane, word by word. Only the low halves of the lanes count.
struct Counters {
  vq word[4];

  HFF_INLINE void round(uint64_t key0, uint64_t key1) {
    const vq p0 = multiply_low(vq{} + 0xD2511F53u, word[0]), p1 = multiply_low(vq{} + 0xCD9E8D57u, word[2]);
    word[0] = (p1 >> 32) ^ word[1] ^ (vq{} + key0);
    word[1] = p1;
    word[2] = (p0 >> 32) ^ word[3] ^ (vq{} + key1);
    word[3] = p0;
  }
};

// What a dropout keeps of one row, as a mask in the first-level cache.
class Keep {
  // Counters of two vectors are taken together: each waits for its multiplications most of the time.
  static constexpr int kChains = 2;
  // Columns whose numbers one vector of counters gives.
  static constexpr int kColumns = 4 * kLanes;

 public:
  // Columns that are drawn together.
  static constexpr int64_t kDrawn = kChains * kColumns;

  // For rows of n columns.
  Keep(const Dropout& dropout, int64_t n) : n_(dropout.drops() ? n : 0), scale_(splat(dropout.scale)) {
    if (n_ == 0) return;
    mask_.resize((n + kDrawn - 1) / kDrawn * kDrawn / kMaskColumns);
    least_ = vn{} + uint16_t(dropout.threshold - 1);
    for (int i = 0; i < kRounds; ++i) {
      key_[i][0] = uint32_t(dropout.key[0] + i * 0x9E3779B9u);
      key_[i][1] = uint32_t(dropout.key[1] + i * 0xBB67AE85u);
    }
    stream_[0] = dropout.stream[0];
    stream_[1] = dropout.stream[1];
    // The lanes' groups of eight columns, in the order in which store() finds them side by side.
    for (int i = 0; i < kLanes / 2; ++i) lane_[i] = i % 2 * (kLanes / 4) + i / 2;
  }

  // Draws the mask of a row.
  HFF_INLINE void draw(int64_t row) {
    for (int64_t c = 0; c < n_; c += kDrawn) draw(row, c);
  }

  // v, of columns c to c + kLanes - 1 of the row that was drawn last, after the dropout: 0 where it is dropped,
  // whatever v is there. c is a multiple of kLanes.
  HFF_INLINE vf apply(int64_t c, vf v) const {
    if (n_ == 0) return v;
#if HFF_LANES == 16
    return reinterpret_cast<vf>(
        _mm512_maskz_mul_ps(mask_[c / kLanes], reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(scale_)));
#elif defined(__x86_64__) && HFF_LANES == 8
    const vi keep = reinterpret_cast<vi>(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(mask_.data() + c))));
    return reinterpret_cast<vf>(keep & reinterpret_cast<vi>(v * scale_));
#else
    const vi keep = __builtin_convertvector(*reinterpret_cast<const vs_any*>(mask_.data() + c), vi);
    return reinterpret_cast<vf>(keep & reinterpret_cast<vi>(v * scale_));
#endif
  }

 private:
  static constexpr int kRounds = 10;
  // The mask has a bit per column where the instruction set has masks, else 16.
  static constexpr int kMaskColumns = HFF_LANES == 16 ? 16 : 1;

  // Draws columns c to c + kDrawn - 1.
  HFF_INLINE void draw(int64_t row, int64_t c) {
    Counters counters[kChains];
#pragma GCC unroll 2
    for (int i = 0; i < kChains; ++i)
      counters[i] = {
          {lane_ + uint64_t((c + i * kColumns) / 8), vq{} + uint64_t(row), vq{} + stream_[0], vq{} + stream_[1]}};
#pragma GCC unroll 10
    for (int r = 0; r < kRounds; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kChains; ++i) counters[i].round(key_[r][0], key_[r][1]);
#pragma GCC unroll 2
    for (int i = 0; i < kChains; ++i) store(counters[i], c + i * kColumns);
  }

  HFF_INLINE void store(const Counters& counters, int64_t c) {
    const vq low = vq{} + 0xffffffffu;
    const vq a = (counters.word[0] & low) | (counters.word[1] << 32);
    const vq b = (counters.word[2] & low) | (counters.word[3] << 32);
#if HFF_LANES == 16
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14)), c);
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15)), c + 2 * kLanes);
#elif HFF_LANES == 8
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 0, 4, 2, 6)), c);
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 1, 5, 3, 7)), c + 2 * kLanes);
#else
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 0, 2)), c);
    store(reinterpret_cast<vn>(__builtin_shufflevector(a, b, 1, 3)), c + 2 * kLanes);
#endif
  }

  // Numbers are kept where they are above threshold - 1, which fits 16 bits for every threshold but 0.
  HFF_INLINE void store(vn numbers, int64_t c) {
#if HFF_LANES == 16
    const uint32_t bits =
        _mm512_cmpgt_epu16_mask(reinterpret_cast<__m512i>(numbers), reinterpret_cast<__m512i>(least_));
    std::memcpy(mask_.data() + c / kLanes, &bits, sizeof bits);
#else
    *reinterpret_cast<vn_any*>(mask_.data() + c) = numbers > least_;
#endif
  }

  int64_t n_;
  vf scale_;
  vn least_;
  vq lane_;
  uint64_t key_[kRounds][2], stream_[2];
  std::vector<uint16_t, LineAligned<uint16_t>> mask_;
};
