// How one adapter lies in its packed vector; the C++ counterpart of hyperformer_fast/layout.py.
#pragma once

#include <cstdint>

namespace hyperformer_fast {

// Letters: d width, b bottleneck. Matrices are row-major; norm parts are there only where their norm is on.
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

  // V, the length of Folded.vectors: down bias [b], up bias [d], and with post_norm its beta [d].
  int64_t vectors() const { return b + d + (post_norm ? d : 0); }
};

}  // namespace hyperformer_fast
