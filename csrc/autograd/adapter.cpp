// Autograd nodes in C++ around the raw ops of the compiled libraries.
//
// An autograd.Function written in Python costs some 30 us a site for a forward and backward; these cost a few. They
// compute nothing themselves: what hyperformer_fast/ops/eager.py does in Python is done here. LibTorch's stable ABI has
// no autograd, so this library fits only the torch that it was built against; with another one the Python functions
// serve.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace hyperformer_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kFolded = 6;  // wd, wg, vectors, scale, root, mean
constexpr size_t kSaved = 4;   // z, r, pre-norm mean and reciprocal deviation
constexpr size_t kSpec = 5;    // d, b, pre_norm, post_norm, activation

// The raw ops of one compiled library, looked up once.
struct Library {
  c10::OperatorHandle forward, backward, site;

  explicit Library(const std::string& name)
      : forward(find(name, "adapter_forward")),
        backward(find(name, "adapter_backward")),
        site(find(name, "hyper_adapter")) {}

  static c10::OperatorHandle find(const std::string& library, const char* op) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("hyperformer_fast_" + library + "::" + op).c_str(), "");
  }
};

const Library& library_of(int64_t index) {
  TORCH_CHECK_VALUE(index == 0 || index == 1, "library must be 0 (cpu) or 1 (cuda), got ", index);
  if (index == 0) {
    static const Library cpu("cpu");
    return cpu;
  }
  static const Library cuda("cuda");
  return cuda;
}

// What is the same for a forward and its backward, beside tensors.
struct Spec {
  int64_t d, b;
  bool pre_norm, post_norm;
  int64_t activation;

  explicit Spec(at::IntArrayRef values) : d(), b(), pre_norm(), post_norm(), activation() {
    TORCH_CHECK_VALUE(values.size() == kSpec, "spec must have ", kSpec, " entries, got ", values.size());
    d = values[0], b = values[1], pre_norm = values[2] != 0, post_norm = values[3] != 0, activation = values[4];
  }

  void push(torch::jit::Stack& stack) const {
    stack.emplace_back(d);
    stack.emplace_back(b);
    stack.emplace_back(pre_norm);
    stack.emplace_back(post_norm);
    stack.emplace_back(activation);
  }
};

void push(torch::jit::Stack& stack, const std::optional<Tensor>& tensor) {
  if (tensor && tensor->defined()) {
    stack.emplace_back(*tensor);
  } else {
    stack.emplace_back();
  }
}

variable_list call(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  // A raw op has kernels for devices only; below autograd the dispatcher goes to them at once.
  at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(stack);
  variable_list results;
  results.reserve(stack.size());
  for (c10::IValue& value : stack) results.push_back(std::move(value).toTensor());
  return results;
}

// The output of a forward, and what it saves.
variable_list call_forward(const c10::OperatorHandle& op, at::ArrayRef<Tensor> inputs,
                           const std::optional<Tensor>& task_index, const Spec& spec) {
  torch::jit::Stack stack;
  stack.reserve(inputs.size() + 1 + kSpec + 1);
  for (const Tensor& input : inputs) stack.emplace_back(input);
  push(stack, task_index);
  spec.push(stack);
  stack.emplace_back(true);
  return call(op, stack);
}

// The error of gradients.py, for the same reasons.
void refuse_second_derivative(const Tensor& g) {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "the adapter has no second derivative: call backward without create_graph=True, or use "
              "hyperformer_fast.reference.adapter, which autograd can differentiate twice");
  TORCH_CHECK(!g._fw_grad(/*level=*/0).defined(),
              "the adapter's backward has no forward-mode derivative: run the forward within the dual level, too, or "
              "use torch.func.jvp over torch.func.grad");
}

// dx and dpacked [T, P]; an undefined tensor in place of one that is not needed.
std::tuple<Tensor, Tensor> adapter_gradients(const Library& library, const Spec& spec, const Tensor& g, const Tensor& x,
                                             at::ArrayRef<Tensor> saved, const Tensor& packed,
                                             at::ArrayRef<Tensor> folded, const std::optional<Tensor>& task_index,
                                             bool need_dx, bool need_dpacked) {
  torch::jit::Stack stack;
  stack.reserve(2 + kSaved + 1 + kFolded + 1 + kSpec + 2);
  stack.emplace_back(g);
  stack.emplace_back(x);
  for (const Tensor& part : saved) stack.emplace_back(part.contiguous());
  stack.emplace_back(packed.to(at::kFloat).contiguous());
  for (const Tensor& part : folded) stack.emplace_back(part);
  push(stack, task_index);
  spec.push(stack);
  stack.emplace_back(need_dx);
  stack.emplace_back(need_dpacked);
  variable_list found = call(library.backward, stack);
  return {need_dx ? found[0] : Tensor(), need_dpacked ? found[1].to(packed.scalar_type()) : Tensor()};
}

// What a backward is told beside tensors.
void keep(AutogradContext* ctx, variable_list tensors, int64_t library, const Spec& spec) {
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["library"] = library;
  ctx->saved_data["spec"] = std::vector<int64_t>{spec.d, spec.b, spec.pre_norm, spec.post_norm, spec.activation};
}

struct Adapter : torch::autograd::Function<Adapter> {
  // Kept: x, packed, folded, what the forward saved, task_index.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& packed, int64_t library, const Spec& spec,
                        const variable_list& folded, const std::optional<Tensor>& task_index) {
    variable_list inputs{x};
    inputs.insert(inputs.end(), folded.begin(), folded.end());
    variable_list made = call_forward(library_of(library).forward, inputs, task_index, spec);
    variable_list kept{x, packed};
    kept.reserve(2 + kFolded + kSaved + 1);
    kept.insert(kept.end(), folded.begin(), folded.end());
    kept.insert(kept.end(), made.begin() + 1, made.end());
    kept.push_back(task_index.value_or(Tensor()));
    keep(ctx, std::move(kept), library, spec);
    return made[0];
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative(gradients[0]);
    const variable_list kept = ctx->get_saved_variables();
    const at::ArrayRef<Tensor> all(kept);
    const auto [dx, dpacked] =
        adapter_gradients(library_of(ctx->saved_data["library"].toInt()), Spec(ctx->saved_data["spec"].toIntVector()),
                          gradients[0], all[0], all.slice(2 + kFolded, kSaved), all[1], all.slice(2, kFolded),
                          all.back(), ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    return {dx, dpacked, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct HyperAdapter : torch::autograd::Function<HyperAdapter> {
  // Kept: x, E, G, what the forward saved, packed, folded, task_index.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                        int64_t library, const Spec& spec, const std::optional<Tensor>& task_index) {
    variable_list made = call_forward(library_of(library).site, {x, E, G, g0}, task_index, spec);
    variable_list kept{x, E, G};
    kept.insert(kept.end(), made.begin() + 1, made.end());
    kept.push_back(task_index.value_or(Tensor()));
    keep(ctx, std::move(kept), library, spec);
    return made[0];
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    refuse_second_derivative(gradients[0]);
    const variable_list kept = ctx->get_saved_variables();
    const at::ArrayRef<Tensor> all(kept);
    const Tensor &E = all[1], &G = all[2];
    const bool need_E = ctx->needs_input_grad(1), need_G = ctx->needs_input_grad(2), need_g0 = ctx->needs_input_grad(3);
    const auto [dx, dpacked] =
        adapter_gradients(library_of(ctx->saved_data["library"].toInt()), Spec(ctx->saved_data["spec"].toIntVector()),
                          gradients[0], all[0], all.slice(3, kSaved), all[3 + kSaved], all.slice(4 + kSaved, kFolded),
                          all.back(), ctx->needs_input_grad(0), need_E || need_G || need_g0);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return {dx,
            need_E ? at::mm(dpacked, G) : Tensor(),
            need_G ? at::mm(dpacked.t(), E) : Tensor(),
            need_g0 ? dpacked.sum(0) : Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor adapter(const Tensor& x, const Tensor& packed, at::TensorList folded, const std::optional<Tensor>& task_index,
               at::IntArrayRef spec, int64_t library) {
  TORCH_CHECK_VALUE(folded.size() == kFolded, "folded must have ", kFolded, " tensors, got ", folded.size());
  variable_list parts;
  parts.reserve(kFolded);
  for (const Tensor& part : folded) parts.push_back(part.contiguous());
  return Adapter::apply(x, packed, library, Spec(spec), parts, task_index);
}

Tensor hyper_adapter(const Tensor& x, const Tensor& E, const Tensor& G, const Tensor& g0,
                     const std::optional<Tensor>& task_index, at::IntArrayRef spec, int64_t library) {
  return HyperAdapter::apply(x, E.contiguous(), G.contiguous(), g0.contiguous(), library, Spec(spec), task_index);
}

TORCH_LIBRARY(hyperformer_fast_autograd, m) {
  m.def("adapter(Tensor x, Tensor packed, Tensor[] folded, Tensor? task_index, int[] spec, int library) -> Tensor",
        &adapter);
  m.def("hyper_adapter(Tensor x, Tensor E, Tensor G, Tensor g0, Tensor? task_index, int[] spec, int library) -> Tensor",
        &hyper_adapter);
}

}  // namespace
}  // namespace hyperformer_fast
