// The fold of an adapter's weights (docs/design.md); the contract is hyperformer_fast/reference.py's `fold`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../adapter.h"

namespace hyperformer_fast {

enum class Dtype { f32, bf16, f16 };

// Where the results of one adapter go. Sizes are in elements; V = layout.vectors().
struct FoldedAdapter {
  void* wd;        // [b, d] compute dtype
  void* wg;        // [b, d] compute dtype
  float* vectors;  // [V]
  float* scale;    // [b], with post_norm
  float* root;     // [b+1, b+1], with post_norm
  float* mean;     // [b+1], with post_norm
};

// How many doubles fold_adapter needs to work in.
size_t fold_scratch(const AdapterLayout& layout);

// Folds one adapter, packed [P]. All sums in float64, in an order that depends on the layout alone.
void fold_adapter(const float* packed, const AdapterLayout& layout, Dtype dtype, const FoldedAdapter& out,
                  double* scratch);

}  // namespace hyperformer_fast
