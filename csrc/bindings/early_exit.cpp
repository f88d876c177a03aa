// The early exit ops of specdec_ops._C. The callers in specdec_ops/ops/early_exit/native.py have checked everything.
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/bind.h"
#include "early_exit/cpu/head_reader.h"
#include "early_exit/params.h"

namespace specdec {

// A number for all rows and the address of one for each, or 0.
using RowNumber = std::tuple<float, Address>;

ExitParams exit_params(std::tuple<Address, int32_t, int64_t> hidden, std::tuple<Address, int32_t, Address> head,
                       std::tuple<Address, int32_t, float> norm, Address bias, RowNumber temperature, Address token_map,
                       RowNumber threshold, int32_t measure, int32_t level,
                       std::tuple<Address, Address, Address, Address, Address, Address, Address, Address> stats,
                       std::tuple<Address, Address, Address, Address> decision,
                       std::tuple<int32_t, int32_t, int32_t, int32_t> sizes) {
  ExitParams p{};
  p.hidden = pointer<void>(std::get<0>(hidden));
  p.hidden_dtype = static_cast<DType>(std::get<1>(hidden));
  p.hidden_stride_row = std::get<2>(hidden);
  p.head = pointer<void>(std::get<0>(head));
  p.head_type = static_cast<HeadType>(std::get<1>(head));
  p.scales = pointer<float>(std::get<2>(head));
  p.norm_weight = pointer<void>(std::get<0>(norm));
  p.norm_dtype = static_cast<DType>(std::get<1>(norm));
  p.norm_eps = std::get<2>(norm);
  p.bias = pointer<float>(bias);
  p.temperature = std::get<0>(temperature);
  p.temperatures = pointer<float>(std::get<1>(temperature));
  p.token_map = pointer<int32_t>(token_map);
  p.threshold = std::get<0>(threshold);
  p.thresholds = pointer<float>(std::get<1>(threshold));
  p.measure = static_cast<ExitMeasure>(measure);
  p.level = static_cast<ExitLevel>(level);
  p.token = pointer<int32_t>(std::get<0>(stats));
  p.max_prob = pointer<float>(std::get<1>(stats));
  p.margin = pointer<float>(std::get<2>(stats));
  p.entropy = pointer<float>(std::get<3>(stats));
  p.logsumexp = pointer<float>(std::get<4>(stats));
  p.top_tokens = pointer<int32_t>(std::get<5>(stats));
  p.top_logprobs = pointer<float>(std::get<6>(stats));
  p.status = pointer<int32_t>(std::get<7>(stats));
  p.exited = pointer<bool>(std::get<0>(decision));
  p.active_rows = pointer<int32_t>(std::get<1>(decision));
  p.inverse = pointer<int32_t>(std::get<2>(decision));
  p.num_active = pointer<int32_t>(std::get<3>(decision));
  std::tie(p.rows, p.dim, p.vocab, p.top_k) = sizes;
  return p;
}

// The same arguments, then what the screen adds: values, scales, error_norms, norms and error_gain; tolerance;
// rechecked.
template <class MakeParams>
struct Screened;
template <class... Args>
struct Screened<ExitParams (*)(Args...)> {
  static ScreenedParams make(Args... args, std::tuple<Address, Address, Address, Address, Address> screen,
                             float tolerance, Address rechecked) {
    ScreenedParams p{};
    p.exit = exit_params(args...);
    p.values = pointer<int8_t>(std::get<0>(screen));
    p.scales = pointer<float>(std::get<1>(screen));
    p.error_norms = pointer<float>(std::get<2>(screen));
    p.norms = pointer<float>(std::get<3>(screen));
    p.error_gain = pointer<float>(std::get<4>(screen));
    p.tolerance = tolerance;
    p.rechecked = pointer<int32_t>(rechecked);
    return p;
  }
};

// The same arguments, then what bounds add: norms_after, the ends of the parts, at most kMaxParts; seen.
template <class MakeParams>
struct Bounded;
template <class... Args>
struct Bounded<ExitParams (*)(Args...)> {
  static BoundedParams make(Args... args, Address norms_after, std::vector<int32_t> ends, Address seen) {
    BoundedParams p{};
    p.exit = exit_params(args...);
    p.norms_after = pointer<float>(norms_after);
    for (const int32_t end : ends) p.ends[p.parts++] = end;
    p.seen = pointer<int32_t>(seen);
    return p;
  }
};

// Layers are (weight, type of its elements, bias, outputs), at most kMaxLayers.
MlpParams mlp_params(std::tuple<Address, int32_t, int64_t> features,
                     std::vector<std::tuple<Address, int32_t, Address, int32_t>> layers, float threshold, Address score,
                     Address stop, std::tuple<int32_t, int32_t> sizes) {
  MlpParams p{};
  p.features = pointer<void>(std::get<0>(features));
  p.features_dtype = static_cast<DType>(std::get<1>(features));
  p.features_stride_row = std::get<2>(features);
  for (const auto& [weight, type, bias, outputs] : layers) {
    p.layers[p.count++] = {pointer<void>(weight), pointer<float>(bias), static_cast<HeadType>(type), outputs};
  }
  p.threshold = threshold;
  p.score = pointer<float>(score);
  p.stop = pointer<bool>(stop);
  std::tie(p.rows, p.inputs) = sizes;
  return p;
}

#ifdef SPECDEC_WITH_CUDA
namespace {

using Scratch = std::tuple<Address, Address, int32_t>;  // counters, and the device's multiprocessors

// The same arguments, then scratch.
template <class Launch, class MakeParams>
struct ExitLaunchOf;
template <class Launch, class Params, class... Args>
struct ExitLaunchOf<Launch, Params (*)(Args...)> {
  template <Params (*kMake)(Args...)>
  static Launch make(Args... args, Scratch scratch) {
    Launch launch{};
    launch.call = kMake(args...);
    launch.scratch = pointer<uint8_t>(std::get<0>(scratch));
    launch.counters = pointer<int32_t>(std::get<1>(scratch));
    launch.multiprocessors = std::get<2>(scratch);
    return launch;
  }
};

template <class Launch, auto kMake>
void bind_cuda(pybind11::module_& m, const char* name, cudaError_t (*launch)(const Launch&, int, cudaStream_t)) {
  constexpr auto make = &ExitLaunchOf<Launch, decltype(kMake)>::template make<kMake>;
  Bind<std::remove_const_t<decltype(make)>>::cuda(m, name, make, launch);
}

ExitParams sized(int32_t rows, int32_t vocab, int32_t top_k) {
  ExitParams p{};
  p.rows = rows;
  p.vocab = vocab;
  p.top_k = top_k;
  return p;
}

std::tuple<int64_t, int64_t> sizes_of(CallScratch scratch) { return {scratch.bytes, scratch.counters}; }

std::tuple<int64_t, int64_t> whole_scratch(int32_t rows, int32_t vocab, int32_t top_k, int32_t multiprocessors) {
  ExitLaunch launch{};
  launch.call = sized(rows, vocab, top_k);
  launch.multiprocessors = multiprocessors;
  return sizes_of(exit_confidence_scratch(launch));
}

std::tuple<int64_t, int64_t> screened_scratch(int32_t rows, int32_t vocab, int32_t top_k, int32_t multiprocessors) {
  ScreenLaunch launch{};
  launch.call.exit = sized(rows, vocab, top_k);
  launch.multiprocessors = multiprocessors;
  return sizes_of(screened_exit_scratch(launch));
}

std::tuple<int64_t, int64_t> bounded_scratch(int32_t rows, int32_t vocab, int32_t top_k, int32_t multiprocessors) {
  BoundedLaunch launch{};
  launch.call.exit = sized(rows, vocab, top_k);
  launch.multiprocessors = multiprocessors;
  return sizes_of(bounded_exit_scratch(launch));
}

// The same arguments, then scratch and counters.
template <class MakeParams>
struct MlpLaunchOf;
template <class... Args>
struct MlpLaunchOf<MlpParams (*)(Args...)> {
  static MlpLaunch make(Args... args, std::tuple<Address, Address> scratch) {
    MlpLaunch launch{};
    launch.call = mlp_params(args...);
    launch.scratch = pointer<uint8_t>(std::get<0>(scratch));
    launch.counters = pointer<int32_t>(std::get<1>(scratch));
    return launch;
  }
};

std::tuple<int64_t, int64_t> mlp_scratch_sizes(int32_t rows, int32_t inputs, std::vector<int32_t> outputs) {
  MlpLaunch launch{};
  launch.call.rows = rows;
  launch.call.inputs = inputs;
  for (const int32_t of_layer : outputs) launch.call.layers[launch.call.count++].outputs = of_layer;
  const CallScratch scratch = exit_mlp_scratch(launch);
  return {scratch.bytes, scratch.counters};
}

}  // namespace
#endif

void bind_exit(pybind11::module_& m) {
  Bind<decltype(&exit_params)>::cpu(m, "exit_confidence_cpu", exit_params, exit_confidence_cpu);
#ifdef SPECDEC_WITH_CUDA
  constexpr auto kScreened = &Screened<decltype(&exit_params)>::make;
  constexpr auto kBounded = &Bounded<decltype(&exit_params)>::make;
  constexpr auto kAbout = "Bytes of scratch, and zeroed int32 counters: for rows, vocab, top_k, multiprocessors.";
  bind_cuda<ExitLaunch, &exit_params>(m, "exit_confidence_cuda", exit_confidence_cuda);
  bind_cuda<ScreenLaunch, kScreened>(m, "screened_exit_cuda", screened_exit_cuda);
  bind_cuda<BoundedLaunch, kBounded>(m, "bounded_exit_cuda", bounded_exit_cuda);
  m.def("exit_confidence_scratch", whole_scratch, kAbout);
  m.def("bounded_exit_scratch", bounded_scratch, kAbout);
  m.def("screened_exit_scratch", screened_scratch, kAbout);
#endif
  const auto screened_params = &Screened<decltype(&exit_params)>::make;
  Bind<std::remove_const_t<decltype(screened_params)>>::cpu(m, "screened_exit_cpu", screened_params, screened_exit_cpu);
  const auto bounded_params = &Bounded<decltype(&exit_params)>::make;
  Bind<std::remove_const_t<decltype(bounded_params)>>::cpu(m, "bounded_exit_cpu", bounded_params, bounded_exit_cpu);
  Bind<decltype(&mlp_params)>::cpu(m, "exit_mlp_cpu", mlp_params, exit_mlp_cpu);
#ifdef SPECDEC_WITH_CUDA
  const auto mlp_launch = &MlpLaunchOf<decltype(&mlp_params)>::make;
  Bind<std::remove_const_t<decltype(mlp_launch)>>::cuda(m, "exit_mlp_cuda", mlp_launch, exit_mlp_cuda);
  m.def("exit_mlp_scratch", mlp_scratch_sizes, "Bytes of scratch, and zeroed int32 counters, for such a call.");
#endif
}

}  // namespace specdec
