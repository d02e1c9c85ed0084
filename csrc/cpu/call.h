// A call of an adapter as the CPU kernels take it.
#pragma once

#include <utility>
#include <vector>

#include "bindings.h"

namespace hyperformer_fast {

inline FoldedWeights weights_of(const FoldedArguments& f) {
  return {f.wd.const_data_ptr(), f.wg.const_data_ptr(), floats(f.vectors),
          floats(f.scale),       floats(f.root),        floats(f.mean)};
}

// A call as the kernels take it.
struct CpuCall : Call {
  std::vector<int64_t> tasks;
  Problem problem;

  template <class... Arguments>
  CpuCall(const Tensor& x, Arguments&&... arguments) : Call(x, std::forward<Arguments>(arguments)...) {
    const int64_t n = rows_in(lead_of(x));
    problem = {layout, activation, dtype, 1, n, T, nullptr};
    if (!by_sample()) return;
    const int64_t B = problem.B = x.size(0);
    problem.M = B == 0 ? 0 : n / B;
    tasks.resize(B);
    for (int64_t i = 0; i < B; ++i) {
      tasks[i] = index_is_wide() ? static_cast<const int64_t*>(index->const_data_ptr())[i]
                                 : static_cast<const int32_t*>(index->const_data_ptr())[i];
      STD_TORCH_CHECK(tasks[i] >= -1 && tasks[i] < T, "task_index must be from -1 to ", T - 1, ", got ", tasks[i]);
    }
    problem.task = tasks.data();
  }
  CpuCall(const CpuCall&) = delete;

  void forward(const Tensor& x, const FoldedArguments& folded, ForwardTensors& made, bool save) const {
    check(folded);
    if (problem.B * problem.M == 0) return;
    const RowView rows(x);
    kernels().forward(problem, rows.rows(), weights_of(folded), made.out.mutable_data_ptr(), saved_rows(made, save),
                      run_parallel);
  }

  SavedRows saved_rows(ForwardTensors& made, bool save) const {
    const auto kept = [&](Tensor& t, bool on) { return save && on ? floats(t) : nullptr; };
    return {save ? made.z.mutable_data_ptr() : nullptr, kept(made.r, layout.post_norm),
            kept(made.pre_mean, layout.pre_norm), kept(made.pre_rstd, layout.pre_norm)};
  }
};

}  // namespace hyperformer_fast
