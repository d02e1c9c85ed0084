// What the bindings of all pieces share.
#pragma once

#include <cmath>
#include <optional>

#include "bindings.h"
#include "pieces.h"

namespace hyperformer_fast {

// The rows of an argument that may be absent.
struct OptionalRows {
  std::optional<RowView> view;

  explicit OptionalRows(const std::optional<Tensor>& t) {
    if (t.has_value()) view.emplace(*t);
  }
  Rows rows() const { return view.has_value() ? view->rows() : Rows{nullptr, nullptr}; }
};

// The arguments "float p, Tensor? seed, int stream" of an op on `rows` rows.
inline Dropout dropout_of(double p, const std::optional<Tensor>& seed, int64_t stream, int64_t rows) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "the dropout's p must be from 0 to 1, got ", p);
  Dropout dropout;
  if (p == 0) return dropout;
  STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "a dropout with p > 0 needs a seed, int64 [1]");
  STD_TORCH_CHECK(rows <= int64_t(0xffffffff), "a dropout takes up to ", int64_t(0xffffffff), " rows, got ", rows);
  const auto key = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout.threshold = uint32_t(std::floor(p * 65536 + 0.5));
  dropout.scale = dropout.threshold == 65536 ? 0.0f : float(65536.0 / (65536 - dropout.threshold));
  dropout.key[0] = uint32_t(key);
  dropout.key[1] = uint32_t(key >> 32);
  dropout.stream[0] = uint32_t(stream);
  dropout.stream[1] = uint32_t(uint64_t(stream) >> 32);
  return dropout;
}

// Throws unless t, where it is given, has this dtype and the shape of `like`.
inline void expect_like(const char* what, const std::optional<Tensor>& t, ScalarType dtype, const Tensor& like) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->scalar_type() == dtype, what, " must be ", name(dtype), ", got ", name(t->scalar_type()));
  bool same = t->dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = t->size(i) == like.size(i);
  STD_TORCH_CHECK(same, what, " has the wrong shape");
}

// The width of the rows of t [..., n].
inline int64_t width_of(const char* what, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, what, " must be [..., n], got a tensor without dimensions");
  return t.size(t.dim() - 1);
}

}  // namespace hyperformer_fast
