// The CPU kernels: what they compute and what they are given. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../layout.h"

namespace hyperformer_fast {

struct Problem {
  AdapterLayout layout;
  Activation activation;
  Dtype dtype;          // of x, out, g, dx, z and the folded projections
  int64_t B, M, T;      // samples, rows of a sample, tasks; there are N = B M rows
  const int64_t* task;  // [B]; null where all rows are task 0's
};

// Rows of x or g: row m of sample s starts at data + offset[s * M + m] elements. The last dimension is contiguous.
struct Rows {
  const void* data;
  const int64_t* offset;
};

// The folded weights of T adapters; V = layout.vectors(). docs/design.md says what they are.
template <class Any, class Float>
struct FoldedParts {
  Any* wd;         // [T, b, d] in the compute dtype
  Any* wg;         // [T, b, d] in the compute dtype
  Float* vectors;  // [T, V]
  Float* scale;    // [T, b], with post_norm
  Float* root;     // [T, b+1, b+1], with post_norm
  Float* mean;     // [T, b+1], with post_norm
};
using FoldedWeights = FoldedParts<const void, const float>;
using FoldedResults = FoldedParts<void, float>;

// What a forward writes and a backward reads; null where it is not wanted. Contiguous, N rows.
struct SavedRows {
  void* z;          // [N, b]
  float* r;         // [N]
  float* pre_mean;  // [N]
  float* pre_rstd;  // [N]
};

// Calls body(begin, end) over parts of [0, count) on torch's threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

struct PieceKernels;      // pieces.h
struct ResidualForward;   // pieces.h
struct AttentionKernels;  // attention.h
struct ResidualForward;   // pieces.h

// The kernels of one instruction set. Everything that is timed or that rounds is behind these functions.
struct Kernels {
  const char* name;

  // Folds T adapters, packed [T, P]. All sums are in float64, in an order that depends on the layout alone; the
  // contract is hyperformer_fast/reference.py's `fold`.
  void (*fold)(const float* packed, int64_t T, const AdapterLayout&, Dtype, const FoldedResults&, const Parallel&);

  void (*forward)(const Problem&, const Rows& x, const FoldedWeights&, void* out, const SavedRows&, const Parallel&);

  // The same for float32 without a pre-norm, on the calling thread, saving nothing: faster for a few rows.
  void (*few_rows)(const Problem&, const Rows& x, const FoldedWeights&, void* out);

  // dx [N, d] and dpacked [T, P] (float32) are written whole; either may be null.
  void (*backward)(const Problem&, const Rows& g, const Rows& x, const SavedRows&, const float* packed,
                   const FoldedWeights&, void* dx, float* dpacked, const Parallel&);

  // packed [n, P] = E [n, k] G^T + g0 with G [P, k]; all float32 and contiguous.
  void (*generate)(const float* E, const float* G, const float* g0, int64_t n, int64_t P, int64_t k, float* packed,
                   const Parallel&);

  // The sum with the adapter's output in place of y, which is not read; N and n are the problem's.
  void (*forward_residual)(const Problem&, const Rows& x, const FoldedWeights&, const ResidualForward&,
                           const SavedRows&, const Parallel&);

  const PieceKernels* pieces;
  const AttentionKernels* attention;
};

// The names of all instruction sets, in the order of backends/cpu.py's INSTRUCTION_SETS.
constexpr const char* kInstructionSets[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// The kernels in use: those of the widest instruction set that the CPU has, or of the one that
// HYPERFORMER_FAST_CPU_ISA names where the CPU has it. Chosen once, at the first call.
const Kernels& kernels();

}  // namespace hyperformer_fast
