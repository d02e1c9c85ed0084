// The fused pieces between a T5's matrix products: what they compute and what they are given. Raw pointers, no torch.
// hyperformer_fast/t5_reference.py says what each computes.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hyperformer_fast {

// Which elements a dropout drops, and what multiplies the others. hyperformer_fast/philox.py defines the bits.
struct Dropout {
  uint32_t threshold = 0;  // an element is dropped where its 16-bit number is below this; 0: none is, 65536: all are
  float scale = 1.0f;      // multiplies what is kept
  uint32_t key[2] = {};
  uint32_t stream[2] = {};

  bool drops() const { return threshold > 0; }
};

// out = hidden + dropout(y), and T5's RMS norm of it.
struct ResidualForward {
  Dtype dtype;         // of hidden, y and out
  Dtype weight_dtype;  // of weight and normed
  int64_t N, n;        // rows, and their width
  Rows hidden;         // without data: y itself is normed, and out is null
  Rows y;
  Dropout dropout;
  const void* weight;  // [n]; null without a norm
  float eps;
  void* out;     // [N, n]
  void* normed;  // [N, n]; null without a norm
  float* rstd;   // [N]; null where it is not wanted
};

struct ResidualBackward {
  Dtype dtype;         // of g_out, out, dhidden and dy
  Dtype weight_dtype;  // of weight, g_normed and dweight
  int64_t N, n;
  Rows g_out;     // without data: zero
  Rows g_normed;  // without data: there was no norm, or its result was not used
  Rows out;       // what was normed
  const void* weight;
  const float* rstd;
  Dropout dropout;
  void* dhidden;  // [N, n]; null where it is not wanted
  void* dy;       // [N, n]; null where it is not wanted
  void* dweight;  // [n]; null where it is not wanted, or g_normed is absent
};

// out = dropout(act(a)), or dropout(act(a) * c) with a gate c.
struct ActDropoutForward {
  Dtype dtype;
  int64_t N, n;
  Rows a, c;  // c without data: no gate
  Activation activation;
  Dropout dropout;
  void* out;  // [N, n]
};

struct ActDropoutBackward {
  Dtype dtype;
  int64_t N, n;
  Rows g, a, c;
  Activation activation;
  Dropout dropout;
  void *da, *dc;  // [N, n]; dc is null without a gate
};

// The kernels of one instruction set.
struct PieceKernels {
  void (*residual_forward)(const ResidualForward&, const Parallel&);
  void (*residual_backward)(const ResidualBackward&, const Parallel&);
  void (*act_dropout_forward)(const ActDropoutForward&, const Parallel&);
  void (*act_dropout_backward)(const ActDropoutBackward&, const Parallel&);
};

// Those in use; see kernels().
const PieceKernels& pieces();

}  // namespace hyperformer_fast
