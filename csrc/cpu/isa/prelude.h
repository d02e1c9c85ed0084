// What the kernels of every instruction set share. It is included before any target region is opened, so that standard
// headers and what is here stay fit for every CPU, whichever translation unit's copy the linker keeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../rounding.h"
#include "../attention.h"
#include "../kernels.h"
#include "../pieces.h"

#define HFF_INLINE inline __attribute__((always_inline))

// HFF_OPEN_TARGET(set) and HFF_CLOSE_TARGET enclose code that is compiled for an instruction set. They are a region and
// not a compiler flag, because a flag would also compile the standard headers' inline functions for that set.
#define HFF_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HFF_OPEN_TARGET(set) HFF_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define HFF_CLOSE_TARGET HFF_PRAGMA(clang attribute pop)
#else
#define HFF_OPEN_TARGET(set)   \
  HFF_PRAGMA(GCC push_options) \
  HFF_PRAGMA(GCC target(set))  \
  HFF_PRAGMA(GCC target("prefer-vector-width=512"))
#define HFF_CLOSE_TARGET HFF_PRAGMA(GCC pop_options)
// The intrinsics of GCC 12's AVX-512 header start from a register that is deliberately left uninitialised.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace hyperformer_fast {

struct bf16_t {
  uint16_t bits;
};

struct f16_t {
  uint16_t bits;
};

// Aligns memory to cache lines: a 64-byte load that straddles two lines costs two loads.
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

}  // namespace hyperformer_fast
