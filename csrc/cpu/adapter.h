// The adapter's forward and backward on a CPU: what their kernels are given. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../adapter.h"
#include "fold.h"

namespace hyperformer_fast {

// Index of an activation, as hyperformer_fast/activations.py counts them.
enum Activation { GELU_NEW, GELU, RELU, SILU };

struct Problem {
  AdapterLayout layout;
  int activation;
  Dtype dtype;          // of x, out, g, dx, z and the folded projections
  int64_t B, M, T;      // samples, rows of a sample, tasks; N = B M
  const int64_t* task;  // [B], or null: all rows are task 0's
};

// Rows of x or g: sample s, row m of it starts at data + offset[s * M + m] elements. The last dimension is contiguous.
struct Rows {
  const void* data;
  const int64_t* offset;
};

struct FoldedWeights {
  const void* wd;        // [T, b, d]
  const void* wg;        // [T, b, d]
  const float* vectors;  // [T, V]
  const float* scale;    // [T, b]
  const float* root;     // [T, b+1, b+1]
  const float* mean;     // [T, b+1]
};

// What a forward writes and a backward reads; null where it is not wanted. Contiguous, N rows.
struct SavedRows {
  void* z;          // [N, b]
  float* r;         // [N]
  float* pre_mean;  // [N]
  float* pre_rstd;  // [N]
};

// Calls body(begin, end) over parts of [0, count), on torch's threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

void adapter_forward(const Problem&, const Rows& x, const FoldedWeights&, void* out, const SavedRows&, const Parallel&);

// dx [N, d] and dpacked [T, P] (float32) are written whole; either may be null.
void adapter_backward(const Problem&, const Rows& g, const Rows& x, const SavedRows&, const float* packed,
                      const FoldedWeights&, void* dx, float* dpacked, const Parallel&);

// packed [n, P] = E [n, k] G^T + g0, G [P, k]; all float32 and contiguous.
void generate_weights(const float* E, const float* G, const float* g0, int64_t n, int64_t P, int64_t k, float* packed,
                      const Parallel&);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace hyperformer_fast
