// The acceptance and sampling ops of specdec_ops._C. The callers in specdec_ops/ops/acceptance/native.py have checked
// everything; arguments are grouped, since a call has fifty of them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <pybind11/stl.h>

#include "acceptance/cpu/kernels.h"
#include "acceptance/params.h"
#include "bindings/bind.h"
#ifdef SPECDEC_WITH_CUDA
#include "acceptance/cuda/launchers.h"
#endif

namespace specdec {
namespace {

using Pair = std::tuple<int64_t, int64_t>;
// A number for all requests and the address of one for each, or 0.
using Temperature = std::tuple<float, Address>;
using Integer = std::tuple<int64_t, Address>;
using Sampling = std::tuple<Temperature, Integer, Temperature>;

template <class T, class Number>
PerRequest<T> per_request(const std::tuple<Number, Address>& number) {
  return {pointer<T>(std::get<1>(number)), static_cast<T>(std::get<0>(number))};
}

SamplingParams sampling_params(const Sampling& sampling) {
  return {per_request<float>(std::get<0>(sampling)), per_request<int32_t>(std::get<1>(sampling)),
          per_request<float>(std::get<2>(sampling))};
}

}  // namespace

AcceptParams accept_params(int32_t rule, std::tuple<Address, int32_t, Pair> target,
                           std::tuple<Address, int32_t, Pair> draft, std::tuple<Address, int64_t, int32_t> draft_tokens,
                           Address target_to_draft, std::tuple<Address, Address, int64_t> links,
                           std::tuple<Address, int64_t> num_nodes, Sampling sampling, Sampling draft_sampling,
                           Integer seed, Integer position, std::vector<int32_t> eos,
                           std::tuple<float, float> thresholds, std::tuple<bool, bool, bool> flags,
                           std::tuple<Address, Address, Address, Address, Address, Address> outputs,
                           std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t> sizes) {
  AcceptParams p{};
  int32_t dtype;
  Address address;
  Pair strides;
  std::tie(address, dtype, strides) = target;
  p.target = pointer<void>(address);
  p.target_dtype = static_cast<DType>(dtype);
  std::tie(p.target_stride_batch, p.target_stride_node) = strides;
  std::tie(address, dtype, strides) = draft;
  p.draft = pointer<void>(address);
  p.draft_dtype = static_cast<DType>(dtype);
  std::tie(p.draft_stride_batch, p.draft_stride_row) = strides;
  std::tie(address, p.draft_tokens_stride_batch, p.first_token_node) = draft_tokens;
  p.draft_tokens = pointer<int32_t>(address);
  p.target_to_draft = pointer<int32_t>(target_to_draft);
  p.first_child = pointer<int32_t>(std::get<0>(links));
  p.next_sibling = pointer<int32_t>(std::get<1>(links));
  p.links_stride_batch = std::get<2>(links);
  p.num_nodes = pointer<int32_t>(std::get<0>(num_nodes));
  p.num_nodes_stride_batch = std::get<1>(num_nodes);
  p.target_sampling = sampling_params(sampling);
  p.draft_sampling = sampling_params(draft_sampling);
  p.seed = per_request<int64_t>(seed);
  p.position = per_request<int32_t>(position);
  p.eos_count = int32_t(std::min(eos.size(), size_t(kMaxEos)));
  std::copy_n(eos.begin(), p.eos_count, p.eos);
  std::tie(p.thresholds[0], p.thresholds[1]) = thresholds;
  std::tie(p.target_is_ids, p.replacement, p.child_rows) = flags;
  p.tokens = pointer<int32_t>(std::get<0>(outputs));
  p.path = pointer<int32_t>(std::get<1>(outputs));
  p.num_accepted = pointer<int32_t>(std::get<2>(outputs));
  p.next_tokens = pointer<int32_t>(std::get<3>(outputs));
  p.status = pointer<int32_t>(std::get<4>(outputs));
  p.finished = pointer<bool>(std::get<5>(outputs));
  std::tie(p.batch, p.nodes, p.vocab, p.draft_vocab, p.max_depth, p.width) = sizes;
  p.rule = static_cast<AcceptRule>(rule);
  return p;
}

SampleParams sample_params(std::tuple<Address, int32_t, Pair> logits, Address draft_to_target, Address parents,
                           int32_t first_parent, int32_t domain, bool replacement, Sampling sampling, Integer seed,
                           Integer position, std::tuple<Address, Address, Address, Address> outputs,
                           std::tuple<int32_t, int32_t, int32_t, int32_t> sizes) {
  SampleParams p{};
  p.logits = pointer<void>(std::get<0>(logits));
  p.dtype = static_cast<DType>(std::get<1>(logits));
  std::tie(p.logits_stride_batch, p.logits_stride_row) = std::get<2>(logits);
  p.draft_to_target = pointer<int32_t>(draft_to_target);
  p.parents = pointer<int32_t>(parents);
  p.first_parent = first_parent;
  p.domain = static_cast<SampleDomain>(domain);
  p.replacement = replacement;
  p.sampling = sampling_params(sampling);
  p.seed = per_request<int64_t>(seed);
  p.position = per_request<int32_t>(position);
  p.tokens = pointer<int32_t>(std::get<0>(outputs));
  p.logprobs = pointer<float>(std::get<1>(outputs));
  p.logsumexp = pointer<float>(std::get<2>(outputs));
  p.status = pointer<int32_t>(std::get<3>(outputs));
  std::tie(p.batch, p.rows, p.vocab, p.count) = sizes;
  return p;
}

#ifdef SPECDEC_WITH_CUDA
namespace {

using Scratch = std::tuple<Address, Address, int32_t>;  // and the path

template <class Launch, auto kMake>
struct LaunchOf;
template <class Launch, class Params, class... Args, Params (*kMake)(Args...)>
struct LaunchOf<Launch, kMake> {
  static Launch make(Args... args, Scratch scratch) {
    Launch launch{};
    launch.call = kMake(args...);
    launch.scratch = pointer<uint8_t>(std::get<0>(scratch));
    launch.counters = pointer<int32_t>(std::get<1>(scratch));
    if constexpr (std::is_same_v<Launch, AcceptLaunch>) {
      launch.launch_path = static_cast<AcceptPath>(std::get<2>(scratch));
    }
    return launch;
  }
};

using Sizes = std::tuple<int64_t, int64_t>;

Sizes accept_scratch_sizes(int32_t rule, int32_t batch, int32_t nodes, int32_t vocab, int32_t max_depth, bool ids,
                           bool has_draft, bool child_rows, int32_t path) {
  AcceptLaunch launch{};
  AcceptParams& p = launch.call;
  p.rule = static_cast<AcceptRule>(rule);
  p.batch = batch;
  p.nodes = nodes;
  p.vocab = vocab;
  p.max_depth = max_depth;
  p.target_is_ids = ids;
  p.draft = has_draft ? &p : nullptr;  // looked at, and not read
  p.child_rows = child_rows;
  launch.launch_path = static_cast<AcceptPath>(path);
  const CallScratch scratch = accept_scratch(launch);
  return {scratch.bytes, scratch.counters};
}

Sizes sample_scratch_sizes(int32_t batch, int32_t rows, int32_t vocab, int32_t count) {
  SampleLaunch launch{};
  launch.call.batch = batch;
  launch.call.rows = rows;
  launch.call.vocab = vocab;
  launch.call.count = count;
  const CallScratch scratch = sample_scratch(launch);
  return {scratch.bytes, scratch.counters};
}

}  // namespace
#endif

void bind_accept(pybind11::module_& m) {
  Bind<decltype(&accept_params)>::cpu(m, "accept_cpu", accept_params, accept_cpu);
  Bind<decltype(&sample_params)>::cpu(m, "sample_cpu", sample_params, sample_cpu);
#ifdef SPECDEC_WITH_CUDA
  using Accept = LaunchOf<AcceptLaunch, accept_params>;
  using Sample = LaunchOf<SampleLaunch, sample_params>;
  Bind<decltype(&Accept::make)>::cuda(m, "accept_cuda", Accept::make, accept_cuda);
  Bind<decltype(&Sample::make)>::cuda(m, "sample_cuda", Sample::make, sample_cuda);
  m.def("accept_scratch", accept_scratch_sizes, "Bytes of scratch, and zeroed int32 counters, for such a call.");
  m.def("sample_scratch", sample_scratch_sizes, "Bytes of scratch, and zeroed int32 counters, for such a call.");
#endif
}

}  // namespace specdec
