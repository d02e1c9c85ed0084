// The choice of an instruction set, once, when the library is first used.
#include <cstdlib>
#include <cstring>

#include "adapter.h"

namespace hyperformer_fast {

#define HF_DECLARE(set)                                                                                                \
  namespace set {                                                                                                      \
  void adapter_forward(const Problem&, const Rows&, const FoldedWeights&, void*, const SavedRows&, const Parallel&);   \
  void adapter_backward(const Problem&, const Rows&, const Rows&, const SavedRows&, const float*,                      \
                        const FoldedWeights&, void*, float*, const Parallel&);                                         \
  void generate_weights(const float*, const float*, const float*, int64_t, int64_t, int64_t, float*, const Parallel&); \
  }
HF_DECLARE(portable)
#if defined(__x86_64__)
HF_DECLARE(avx2)
HF_DECLARE(avx512)
HF_DECLARE(avx512_bf16)
#endif
#undef HF_DECLARE

namespace {

struct Set {
  const char* name;
  bool usable;
  decltype(&portable::adapter_forward) forward;
  decltype(&portable::adapter_backward) backward;
  decltype(&portable::generate_weights) generate;
};

const Set& chosen() {
  static const Set set = [] {
#if defined(__x86_64__)
    const bool avx512_usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    const Set sets[] = {
#if defined(__x86_64__)
        {"avx512_bf16", avx512_usable && __builtin_cpu_supports("avx512bf16"), avx512_bf16::adapter_forward,
         avx512_bf16::adapter_backward, avx512_bf16::generate_weights},
        {"avx512", avx512_usable, avx512::adapter_forward, avx512::adapter_backward, avx512::generate_weights},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
         avx2::adapter_forward, avx2::adapter_backward, avx2::generate_weights},
#endif
        {"portable", true, portable::adapter_forward, portable::adapter_backward, portable::generate_weights},
    };
    const char* asked = std::getenv("HYPERFORMER_FAST_CPU_ISA");
    for (const Set& s : sets)
      if (s.usable && (asked == nullptr || *asked == 0 || std::strcmp(asked, s.name) == 0)) return s;
    for (const Set& s : sets)
      if (s.usable) return s;
    return sets[0];
  }();
  return set;
}

}  // namespace

void adapter_forward(const Problem& p, const Rows& x, const FoldedWeights& f, void* out, const SavedRows& s,
                     const Parallel& parallel) {
  chosen().forward(p, x, f, out, s, parallel);
}

void adapter_backward(const Problem& p, const Rows& g, const Rows& x, const SavedRows& s, const float* packed,
                      const FoldedWeights& f, void* dx, float* dpacked, const Parallel& parallel) {
  chosen().backward(p, g, x, s, packed, f, dx, dpacked, parallel);
}

void generate_weights(const float* E, const float* G, const float* g0, int64_t n, int64_t P, int64_t k, float* packed,
                      const Parallel& parallel) {
  chosen().generate(E, G, g0, n, P, k, packed, parallel);
}

const char* instruction_set() { return chosen().name; }

}  // namespace hyperformer_fast
