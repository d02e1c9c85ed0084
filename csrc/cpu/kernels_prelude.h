// What the kernels of every instruction set share, included before any target region.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "adapter.h"
#include "convert.h"
#include "multiversion.h"

#define HF_LAMBDA_INLINE __attribute__((always_inline))

namespace hyperformer_fast {

struct bf16_t {
  uint16_t bits;
};

struct f16_t {
  uint16_t bits;
};

inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000 | (mantissa << 13));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Cache-line aligned: a 64-byte load that straddles two lines costs two.
template <class T>
struct LineAligned {
  using value_type = T;
  LineAligned() = default;
  template <class U>
  LineAligned(const LineAligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAligned&) const { return true; }
  bool operator!=(const LineAligned&) const { return false; }
};

using Buffer = std::vector<float, LineAligned<float>>;

template <int N>
struct Width {
  static constexpr int value = N;
};

}  // namespace hyperformer_fast
