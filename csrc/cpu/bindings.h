// What the bindings of the CPU library share: rows of tensors, new outputs, torch's threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <functional>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace hyperformer_fast {

// Memory that malloc maps afresh on every call (it always does above 32 MiB) costs a page fault per 4 KiB, more than
// the kernel's own work; huge pages make that one per 2 MiB. This is only advice: where it is not taken, nothing
// changes.
inline Tensor empty_rows(const Sizes& lead, int64_t d, ScalarType dtype) {
  Tensor t = empty(lead, {d}, dtype);
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kMapped = uintptr_t(32) << 20;
  const uintptr_t bytes = uintptr_t(t.numel()) * (dtype == ScalarType::Float ? 4 : 2);
  if (bytes >= kMapped) {
    const uintptr_t first = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

inline Tensor nothing(ScalarType dtype) { return empty({}, {0}, dtype); }

inline void run_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 1) {
    if (count == 1) body(0, 1);
    return;
  }
  torch::stable::parallel_for(0, count, 1, body);
}

inline int64_t rows_in(const Sizes& lead) {
  int64_t n = 1;
  for (const int64_t size : lead) n *= size;
  return n;
}

// The rows of t [..., d], read where they lie if the last dimension is contiguous, else from a copy.
struct RowView {
  Tensor keep;
  std::vector<int64_t> offset;

  explicit RowView(const Tensor& t) : keep(dense_rows(t)) {
    const int64_t dims = keep.dim() - 1;
    int64_t n = 1;
    for (int64_t i = 0; i < dims; ++i) n *= keep.size(i);
    offset.resize(n);
    if (n == 0) return;
    offset[0] = 0;
    int64_t filled = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      const int64_t size = keep.size(i), stride = keep.stride(i);
      for (int64_t k = 1; k < size; ++k)
        for (int64_t j = 0; j < filled; ++j) offset[k * filled + j] = offset[j] + k * stride;
      filled *= size;
    }
  }

  Rows rows() const { return {keep.const_data_ptr(), offset.data()}; }
};

}  // namespace hyperformer_fast
