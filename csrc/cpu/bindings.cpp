// The raw ops of the CPU library. LibTorch's stable ABI lets one build serve every torch from 2.11 on. There is no
// autograd here and there are no fakes: hyperformer_fast/ops/ has those.
#include "bindings.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "call.h"
#include "kernels.h"

namespace hyperformer_fast {
namespace {

FoldedTensors fold_packed(const Tensor& packed, const AdapterLayout& layout, ScalarType scalar_type) {
  FoldedTensors made(lead_of(packed), layout, scalar_type);
  const int64_t T = rows_in(lead_of(packed));
  if (T == 0) return made;
  const Tensor dense = packed.is_contiguous() ? packed : torch::stable::contiguous(packed);
  kernels().fold(floats(dense), T, layout, compute_dtype("dtype", scalar_type),
                 {made.wd.mutable_data_ptr(), made.wg.mutable_data_ptr(), floats(made.vectors), floats(made.scale),
                  floats(made.root), floats(made.mean)},
                 run_parallel);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_op(const Tensor& packed, int64_t d, int64_t b,
                                                                   bool pre_norm, bool post_norm, ScalarType dtype) {
  STD_TORCH_CHECK(d >= 1 && b >= 1, "fold: d and b must be at least 1, got d = ", d, " and b = ", b);
  STD_TORCH_CHECK(d < kSizeLimit && b < kSizeLimit, "fold: d and b must be below ", kSizeLimit, ", got d = ", d,
                  " and b = ", b);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float, "fold: packed must be float32, got ",
                  name(packed.scalar_type()));
  compute_dtype("fold: dtype", dtype);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  STD_TORCH_CHECK(packed.dim() >= 1, "fold: packed must be [..., P], got a tensor without dimensions");
  const int64_t P = packed.size(packed.dim() - 1);
  STD_TORCH_CHECK(P == layout.numel(), "fold: packed must have ", layout.numel(), " numbers per adapter for d = ", d,
                  ", b = ", b, ", pre_norm = ", pre_norm, ", post_norm = ", post_norm, "; got ", P);
  return fold_packed(packed, layout, dtype).tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_forward_op(
    const Tensor& x, const Tensor& wd, const Tensor& wg, const Tensor& vectors, const Tensor& scale, const Tensor& root,
    const Tensor& mean, std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm, bool post_norm,
    int64_t activation, bool save) {
  const CpuCall call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  const FoldedArguments folded{wd, wg, vectors, scale, root, mean};
  call.check(folded);
  ForwardTensors made(empty_rows(lead_of(x), d, x.scalar_type()), x, call.layout, save);
  call.forward(x, folded, made, save);
  return made.tuple();
}

std::tuple<Tensor, Tensor> adapter_backward_op(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& r,
                                               const Tensor& pre_mean, const Tensor& pre_rstd, const Tensor& packed,
                                               const Tensor& wd, const Tensor& wg, const Tensor& vectors,
                                               const Tensor& scale, const Tensor& root, const Tensor& mean,
                                               std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                               bool post_norm, int64_t activation, bool need_dx, bool need_dpacked) {
  const CpuCall call(x, tasks_of(wd), task_index, d, b, pre_norm, post_norm, activation);
  const FoldedArguments folded{wd, wg, vectors, scale, root, mean};
  call.check(folded);
  call.check(g, x, {z, r, pre_mean, pre_rstd}, packed);
  Tensor dx = need_dx ? empty_rows(lead_of(x), d, x.scalar_type()) : empty({}, {0}, x.scalar_type());
  Tensor dpacked =
      need_dpacked ? empty({call.T}, {call.layout.numel()}, ScalarType::Float) : empty({}, {0}, ScalarType::Float);
  const RowView g_rows(g), x_rows(x);
  // SavedRows is shared with the forward, which writes; the backward only reads.
  const auto read = [](const Tensor& t) { return const_cast<float*>(floats(t)); };
  const SavedRows saved{const_cast<void*>(z.const_data_ptr()), read(r), read(pre_mean), read(pre_rstd)};
  kernels().backward(call.problem, g_rows.rows(), x_rows.rows(), saved, floats(packed), weights_of(folded),
                     need_dx ? dx.mutable_data_ptr() : nullptr, need_dpacked ? floats(dpacked) : nullptr, run_parallel);
  return {dx, dpacked};
}

Tensor generate_weights_op(const Tensor& E, const Tensor& G, const Tensor& g0) {
  expect_generator(E, G, g0);
  const int64_t Q = E.size(0), n = E.size(1), k = E.size(2), P = G.size(1);
  Tensor packed = empty({Q}, {n, P}, ScalarType::Float);
  if (Q * n * P == 0) return packed;
  for (int64_t q = 0; q < Q; ++q)
    kernels().generate(floats(E) + q * n * k, floats(G) + q * P * k, floats(g0) + q * P, n, P, k,
                       floats(packed) + q * n * P, run_parallel);
  return packed;
}

// Generation, folding and application of one site: what the three ops give, in one call.
HyperAdapterTensors hyper_adapter_op(const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                                     std::optional<Tensor> task_index, int64_t d, int64_t b, bool pre_norm,
                                     bool post_norm, int64_t activation, bool save) {
  expect_sizes(d, b);
  const AdapterLayout layout{d, b, pre_norm, post_norm};
  expect_site_generator(layout, E, G, g0);
  const int64_t T = E.size(0), k = E.size(1), P = layout.numel();
  const CpuCall call(x, T, task_index, d, b, pre_norm, post_norm, activation);
  Tensor packed = empty({T}, {P}, ScalarType::Float);
  if (T > 0) kernels().generate(floats(E), floats(G), floats(g0), T, P, k, floats(packed), run_parallel);
  const FoldedTensors folded = fold_packed(packed, layout, x.scalar_type());
  ForwardTensors made(empty_rows(lead_of(x), d, x.scalar_type()), x, layout, save);
  call.forward(x, folded.arguments(), made, save);
  return hyper_adapter_tensors(made, packed, folded);
}

// The index in kInstructionSets of the instruction set in use.
int64_t instruction_set_op() {
  int64_t i = 0;
  while (std::strcmp(kInstructionSets[i], kernels().name) != 0) ++i;
  return i;
}

STABLE_TORCH_LIBRARY(hyperformer_fast_cpu, m) {
  m.def("instruction_set() -> int");
  define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CPU, m) {
  m.impl("fold", TORCH_BOX(&fold_op));
  m.impl("adapter_forward", TORCH_BOX(&adapter_forward_op));
  m.impl("adapter_backward", TORCH_BOX(&adapter_backward_op));
  m.impl("generate_weights", TORCH_BOX(&generate_weights_op));
  m.impl("hyper_adapter", TORCH_BOX(&hyper_adapter_op));
}

STABLE_TORCH_LIBRARY_IMPL(hyperformer_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_op));
}

}  // namespace
}  // namespace hyperformer_fast
