// The CPU kernels of attention and of the loss: what they compute and what they are given. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "pieces.h"

namespace hyperformer_fast {

// A tensor [B, H, L, n], or one that is broadcast to it: element (b, h, i, j) is at
// data + b stride[0] + h stride[1] + i stride[2] + j stride[3], counted in elements.
struct View4 {
  const void* data;
  int64_t stride[4];

  int64_t row(int64_t b, int64_t h, int64_t i) const { return b * stride[0] + h * stride[1] + i * stride[2]; }
};

// What is added to the scores before the softmax: nothing, numbers, or a mask that is true where a query attends.
struct ScoreTerm : View4 {
  enum Kind { kNone, kFloat32, kBFloat16, kFloat16, kBool } kind = kNone;
};

// dropout(softmax(scores + bias + mask)) for scores [B, H, Lq, Lk]. What a bool mask forbids has the score -inf, and a
// row of nothing else has probabilities of 0.
struct SoftmaxProblem {
  Dtype dtype;  // of the scores, or of q, k and v; also of the probabilities
  int64_t B, H, Lq, Lk;
  ScoreTerm bias, mask;
  Dropout dropout;

  int64_t rows() const { return B * H * Lq; }
};

// dropout(softmax(scaling q k^T + bias + mask)) v.
struct AttentionProblem : SoftmaxProblem {
  int64_t dk, dv;  // widths of a head: of q and k, and of v and the output
  float scaling;
};

// What attention's backward writes. dq is contiguous [B, Lq, H, dk]; dk and dv are [B, Lk, H, ...]. dscores, the
// gradient of the scores after scaling, is [B, H, Lq, Lk], or null.
struct AttentionGradients {
  void *dq, *dk, *dv, *dscores;
};

// The losses (1 - smoothing) nll + smoothing mean(-log p) of the rows of logits [N, V], and 0 for a label `ignored`. A
// label that is out of range gives NaN.
struct CrossEntropyProblem {
  Dtype dtype;  // of the logits and of their gradient
  int64_t N, V;
  const int64_t* labels;  // [N]
  int64_t ignored;
  double smoothing;
};

// The kernels of one instruction set. Every sum has a fixed order, whatever the number of threads.
struct AttentionKernels {
  // out and, unless it is null, probabilities (before dropout) are contiguous [B, H, Lq, Lk]. The last dimension of
  // `scores` is contiguous.
  void (*softmax_forward)(const SoftmaxProblem&, const View4& scores, void* out, void* probabilities, const Parallel&);

  // dscores from the gradient g of `out`; the last dimension of g is contiguous.
  void (*softmax_backward)(const SoftmaxProblem&, const View4& g, const void* probabilities, void* dscores,
                           const Parallel&);

  // out is contiguous [B, Lq, H, dv]; the last dimensions of q, k and v are contiguous.
  void (*attention_forward)(const AttentionProblem&, const View4& q, const View4& k, const View4& v, void* out,
                            void* probabilities, const Parallel&);

  // g is like `out`, with any strides but a contiguous last dimension.
  void (*attention_backward)(const AttentionProblem&, const View4& g, const View4& q, const View4& k, const View4& v,
                             const void* probabilities, const AttentionGradients&, const Parallel&);

  // loss [N], and unless it is null dlogits [N, V], the gradient of the sum of all losses; both are contiguous.
  void (*cross_entropy)(const CrossEntropyProblem&, const Rows& logits, float* loss, void* dlogits, const Parallel&);
};

// Those in use; see kernels().
const AttentionKernels& attention_kernels();

}  // namespace hyperformer_fast
