// What both libraries know of an adapter: its layout in memory, its dtype, its activation.
#pragma once

#include <cstdint>

namespace hyperformer_fast {

// The dtype of x, and of everything that is stored in x's dtype.
enum class Dtype { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// The index of an activation in hyperformer_fast/activations.py.
enum Activation : int { kGeluNew, kGelu, kRelu, kSilu };

// The epsilon of both layer norms; hyperformer_fast/reference.py has the same.
constexpr float kEps = 1e-5f;

// Sizes d and b below this bound keep every product of order d * b * 8 bytes far from overflow.
constexpr int64_t kSizeLimit = int64_t(1) << 24;

// Where the parts of one adapter lie in its packed vector; the C++ counterpart of hyperformer_fast/layout.py. d is the
// width and b the bottleneck. Matrices are row-major. The parts of a norm exist only where that norm is on.
struct AdapterLayout {
  int64_t d, b;
  bool pre_norm, post_norm;

  int64_t down_weight() const { return 0; }                                     // [b, d]
  int64_t down_bias() const { return b * d; }                                   // [b]
  int64_t up_weight() const { return down_bias() + b; }                         // [d, b]
  int64_t up_bias() const { return up_weight() + d * b; }                       // [d]
  int64_t post_gamma() const { return up_bias() + d; }                          // [d], with post_norm
  int64_t post_beta() const { return post_gamma() + d; }                        // [d], with post_norm
  int64_t pre_gamma() const { return post_gamma() + (post_norm ? 2 * d : 0); }  // [d], with pre_norm
  int64_t pre_beta() const { return pre_gamma() + d; }                          // [d], with pre_norm
  int64_t numel() const { return pre_gamma() + (pre_norm ? 2 * d : 0); }        // P

  // The length of Folded.vectors: down bias [b], up bias [d], and beta [d] with post_norm.
  int64_t vectors() const { return b + d + (post_norm ? d : 0); }
};

}  // namespace hyperformer_fast
