// The early exit ops of specdec_ops._C.
#include <string_view>

#include "bindings/bind.h"
#include "early_exit/cpu/head_reader.h"
#include "early_exit/params.h"
#include "struct_fields/early_exit.h"
#ifdef SPECDEC_WITH_CUDA
#include "early_exit/cuda/launchers.h"
#endif

namespace specdec {

static void derive(ExitParams& p, Call& call) {
  Tensor hidden = call.tensor("hidden"), head = call.tensor("head"), top_tokens = call.tensor("top_tokens");
  p.hidden_dtype = hidden.dtype();
  p.hidden_stride_row = hidden.stride(0);
  p.head_type = head.head_type();
  p.norm_dtype = call.tensor("norm_weight").dtype();
  p.rows = int32_t(hidden.size(0)), p.dim = int32_t(hidden.size(1)), p.vocab = int32_t(head.size(0));
  p.top_k = top_tokens ? int32_t(top_tokens.size(1)) : 0;
}

// To the contract, `scales` are those of the head.
static constexpr bool is_derived(const ScreenedParams&, std::string_view name) { return name == "scales"; }

static void derive(ScreenedParams& p, Call& call) {
  bind_call(p.exit, call);
  p.values = static_cast<int8_t*>(call.tensor("screen_values").address());
  p.scales = static_cast<float*>(call.tensor("screen_scales").address());
}

static void derive(BoundedParams& p, Call& call) {
  bind_call(p.exit, call);
  p.parts = call.list("ends").size();
}

static void derive(MlpParams& p, Call& call) {
  Tensor features = call.tensor("features");
  const List weights = call.list("weights"), biases = call.list("biases");
  p.features_dtype = features.dtype();
  p.features_stride_row = features.stride(0);
  p.count = weights.size();
  p.rows = int32_t(features.size(0)), p.inputs = int32_t(features.size(1));
  for (int i = 0; i < kMaxLayers; ++i) {
    p.layers[i] = MlpLayer{};
    if (i >= p.count) continue;
    Tensor weight(weights[i]);
    p.layers[i].weight = weight.address();
    p.layers[i].bias = static_cast<float*>(Tensor(biases[i]).address());
    p.layers[i].type = weight.head_type();
    p.layers[i].outputs = int32_t(weight.size(0));
  }
}

void bind_early_exit(py::module_& m) {
  bind_op(m, "exit_confidence", exit_confidence_cpu);
  bind_op(m, "screened_exit", screened_exit_cpu);
  bind_op(m, "bounded_exit", bounded_exit_cpu);
  bind_op(m, "exit_mlp", exit_mlp_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<ExitParams>(m, "exit_confidence", exit_confidence_scratch, exit_confidence_cuda);
  bind_cuda<ScreenedParams>(m, "screened_exit", screened_exit_scratch, screened_exit_cuda);
  bind_cuda<BoundedParams>(m, "bounded_exit", bounded_exit_scratch, bounded_exit_cuda);
  bind_cuda<MlpParams>(m, "exit_mlp", exit_mlp_scratch, exit_mlp_cuda);
#endif
}

}  // namespace specdec
