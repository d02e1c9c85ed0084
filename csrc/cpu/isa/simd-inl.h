// Vectors of kLanes floats for one instruction set, by the compiler's vector extension.

constexpr int kLanes = HFF_LANES;
static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef float v4 __attribute__((vector_size(16)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// All lanes are written out: for `vf{} + x` the compiler would emit an addition, since x may be -0.
#if HFF_LANES == 16
HFF_INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#elif HFF_LANES == 8
HFF_INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
#else
HFF_INLINE vf splat(float x) { return vf{x, x, x, x}; }
#endif

// Keeps a value in a register. Otherwise compilers repeat its load in every instruction that uses it, and the load
// ports are the bottleneck.
#if defined(__x86_64__)
#define HFF_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define HFF_IN_REGISTER(v) (void)0
#endif

// Storage types. Arithmetic is float32 throughout; 16-bit numbers are widened in registers.
struct F32 {
  using T = float;
  static HFF_INLINE vf load(const T* p) { return *reinterpret_cast<const vf_any*>(p); }
  static HFF_INLINE void store(T* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
  static HFF_INLINE float one(T x) { return x; }
  static HFF_INLINE T narrow(float x) { return x; }
};

// The nearest bfloat16 of each number, in the lower half of its lane.
HFF_INLINE vu bf16_halves(vf v) {
  vu bits = reinterpret_cast<vu>(v);
  round_to_bf16<vu>(bits, reinterpret_cast<vu>(v != v));
  return bits;
}

struct BF16 {
  using T = bf16_t;
  // GCC makes six instructions of a conversion that is one.
  static HFF_INLINE vf load(const T* p) {
#if defined(__x86_64__) && HFF_LANES == 16
    const vu wide = reinterpret_cast<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__x86_64__) && HFF_LANES == 8
    const vu wide = reinterpret_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    const vu wide = __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu);
#endif
    return reinterpret_cast<vf>(wide << 16);
  }
#if HFF_HAS_DPBF16
  // Like the products of this instruction set, this instruction takes subnormal numbers for zero.
  static HFF_INLINE void store(T* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  }
#else
  static HFF_INLINE void store(T* p, vf v) {
    *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bf16_halves(v), vh);
  }
#endif
  static HFF_INLINE float one(T x) { return from_bf16(x.bits); }
  static HFF_INLINE T narrow(float x) { return T{to_bf16(x)}; }
};

struct F16 {
  using T = f16_t;
#if HFF_HAS_F16C && HFF_LANES == 16
  static HFF_INLINE vf load(const T* p) {
    return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
  }
  static HFF_INLINE void store(T* p, vf v) {
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif HFF_HAS_F16C && HFF_LANES == 8
  static HFF_INLINE vf load(const T* p) {
    return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
  }
  static HFF_INLINE void store(T* p, vf v) {
    _mm_storeu_si128((__m128i*)p,
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static HFF_INLINE vf load(const T* p) {
    vf v;
    for (int i = 0; i < kLanes; ++i) v[i] = one(p[i]);
    return v;
  }
  static HFF_INLINE void store(T* p, vf v) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow(v[i]);
  }
#endif
  static HFF_INLINE float one(T x) { return from_f16(x.bits); }
  static HFF_INLINE T narrow(float x) { return T{to_f16(x)}; }
};

// Loads n <= kLanes numbers; the rest of the vector is zero. Never reads beyond them, and store_part never writes
// beyond.
template <class S>
HFF_INLINE vf load_part(const typename S::T* p, int n) {
  vf v = {};
  for (int i = 0; i < n; ++i) v[i] = S::one(p[i]);
  return v;
}

template <class S>
HFF_INLINE void store_part(typename S::T* p, vf v, int n) {
  for (int i = 0; i < n; ++i) p[i] = S::narrow(v[i]);
}

HFF_INLINE vf select(vi mask, vf a, vf b) {
  return reinterpret_cast<vf>((mask & reinterpret_cast<vi>(a)) | (~mask & reinterpret_cast<vi>(b)));
}

// The sum of the four-lane pieces of a vector.
HFF_INLINE v4 quarter_sum(vf v) {
#if HFF_LANES == 16
  typedef float v8 __attribute__((vector_size(32)));
  const v8 h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif HFF_LANES == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// In the order of sums_of, so that a row's result does not depend on how many rows there are.
HFF_INLINE float sum(vf v) {
  const v4 q = quarter_sum(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Writes the sums of kDotRows vectors side by side. This is a transposition that adds on the way.
#if HFF_LANES == 16
constexpr int kDotRows = 8;

HFF_INLINE void sums_of(const vf* a, float* out) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v8_any __attribute__((vector_size(32), aligned(4), may_alias));
  vf t[4], u[2];
  for (int i = 0; i < 4; ++i)
    t[i] =
        __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(a[2 * i], a[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    u[i] = __builtin_shufflevector(t[2 * i], t[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(t[2 * i], t[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  // Each 128-bit lane now holds two parts each of sums i and i + 4.
  const vf v = __builtin_shufflevector(u[0], u[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(u[0], u[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const v8 s = __builtin_shufflevector(v, v, 0, 4, 8, 12, 2, 6, 10, 14) +
               __builtin_shufflevector(v, v, 1, 5, 9, 13, 3, 7, 11, 15);
  *reinterpret_cast<v8_any*>(out) = s;
}
#else
constexpr int kDotRows = 4;

HFF_INLINE void sums_of(const vf* a, float* out) {
  typedef float v4_any __attribute__((vector_size(16), aligned(4), may_alias));
  const v4 p = quarter_sum(a[0]), q = quarter_sum(a[1]), r = quarter_sum(a[2]), s = quarter_sum(a[3]);
  const v4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const v4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  *reinterpret_cast<v4_any*>(out) =
      __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}
#endif
