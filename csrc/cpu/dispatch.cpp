// The choice of an instruction set, made once, when the library is first used.
#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "kernels.h"
#include "pieces.h"

namespace hyperformer_fast {

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    struct Candidate {
      bool usable;
      const Kernels* kernels;
    };
#if defined(__x86_64__)
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    // The widest first.
    const Candidate candidates[] = {
#if defined(__x86_64__)
        {has_avx512 && __builtin_cpu_supports("avx512bf16"), &avx512_bf16::kKernels},
        {has_avx512, &avx512::kKernels},
        {__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
         &avx2::kKernels},
#endif
        {true, &portable::kKernels},
    };
    const char* asked = std::getenv("HYPERFORMER_FAST_CPU_ISA");
    if (asked != nullptr)
      for (const Candidate& c : candidates)
        if (c.usable && std::strcmp(asked, c.kernels->name) == 0) return *c.kernels;
    // An unknown or unusable name is not an error here: backends/cpu.py compares it with what was chosen, and refuses.
    for (const Candidate& c : candidates)
      if (c.usable) return *c.kernels;
    return portable::kKernels;
  }();
  return chosen;
}

const PieceKernels& pieces() { return *kernels().pieces; }

const AttentionKernels& attention_kernels() { return *kernels().attention; }

}  // namespace hyperformer_fast
