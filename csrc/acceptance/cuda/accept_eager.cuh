// The first and the last launch of the eager path: work on rows, split over blocks (see accept.cuh).
//
// Every block has one span of one row. It writes its part, and the block that arrives last at the row's counter merges
// the parts in the order of the row, does what can't be split, and sets the counter back to zero.
#pragma once

#include "acceptance/cuda/accept_scratch.cuh"
#include "common/cuda/last_block.cuh"

namespace specdec::cuda {

// Whether the walk can ask for a row: of the target that of every node, of the draft those with a child, or with rows
// of their own all but node 0's. The memory of other draft rows may not exist.
__device__ inline bool row_is_needed(const AcceptParams& p, int32_t request, int32_t row) {
  const int32_t count = min(max(p.num_nodes[request * p.num_nodes_stride_batch], 1), p.nodes);
  const bool of_draft = row >= p.nodes;
  const int32_t node = of_draft ? row - p.nodes : row;
  if (node >= count) return false;
  if (!of_draft) return true;
  if (p.child_rows) return node > 0;
  if (p.first_child == nullptr) return node + 1 < count;
  const int32_t child = p.first_child[request * p.links_stride_batch + node];
  return child > node && child < count;
}

__global__ void __launch_bounds__(kTeamMaxThreads, 1) accept_distributions_kernel(AcceptLaunch launch) {
  const AcceptParams& p = launch.call;
  const int32_t rows = table_rows(p), spans = launch.spans;
  const int32_t span = int32_t(blockIdx.x % spans), row = int32_t(blockIdx.x / spans % rows);
  const int32_t request = int32_t(blockIdx.x / spans / rows);
  if (!row_is_needed(p, request, row)) return;
  SharedMemory memory;
  TeamReducer reduce({int32_t(threadIdx.x), int32_t(blockDim.x)}, memory.take<uint32_t>(TeamReducer::kWords));
  const CutScratch cut(memory);
  const RequestRows request_rows{p, request};
  const bool of_target = row < p.nodes;
  const Row logits = of_target ? request_rows.target(row) : request_rows.draft(row - p.nodes);
  const Sampling sampling = row_sampling(request_rows, of_target);
  const float scale = scale_of(sampling.temperature);

  const Span own{min(span * kEagerSpan, logits.vocab), min((span + 1) * kEagerSpan, logits.vocab)};
  DistributionPart part = distribution_part(reduce, logits, own, scale);
  DistributionPart* parts = parts_of(launch, request, row);
  if (threadIdx.x == 0) parts[span] = part;
  if (!arrives_last(reduce.team, launch.counters + int64_t(request) * (rows + 1) + row, spans)) return;
  part = parts[0];
  for (int32_t i = 1; i < spans; ++i) part = merged(part, parts[i], scale);
  const bool with_entropy = of_target && p.rule == AcceptRule::kTypical;
  const TokenDistribution distribution = finished_distribution(reduce, cut, logits, part, sampling, with_entropy);
  if (threadIdx.x == 0) distributions_of(launch, request)[row] = distribution;
}

// Only a sequence that goes on has a draw.
__device__ inline void write_next_token(const AcceptParams& p, int32_t request, int32_t token) {
  p.next_tokens[request] = token;
  p.finished[request] = is_eos(p, token);
  p.tokens[int64_t(request) * (p.max_depth + 1) + p.num_accepted[request]] = token;
}

__global__ void __launch_bounds__(kTeamMaxThreads, 1) accept_draw_kernel(AcceptLaunch launch) {
  const AcceptParams& p = launch.call;
  const int32_t span = int32_t(blockIdx.x % launch.spans), request = int32_t(blockIdx.x / launch.spans);
  const LastDraw draw = draw_of(launch, request);
  if (!draw.deferred->wanted) return;
  SharedMemory memory;
  TeamReducer reduce({int32_t(threadIdx.x), int32_t(blockDim.x)}, memory.take<uint32_t>(TeamReducer::kWords));
  const RequestRows rows{p, request};
  const NoiseKey noise = draw.deferred->noise;

  Span own{span * kEagerSpan, min((span + 1) * kEagerSpan, p.vocab)};
  DeferredDraw& deferred = *draw.deferred;
  for (bool alone = false;; alone = true, own = {0, p.vocab}) {
    uint64_t winner = pass_over(reduce, rows, deferred.weights, draw.bits, own, true, noise, kNoLimit).best;
    if (!alone) {
      if (threadIdx.x == 0) draw.parts[span] = winner;
      const int32_t counter = (request + 1) * (table_rows(p) + 1) - 1;
      if (!arrives_last(reduce.team, launch.counters + counter, launch.spans)) return;
      winner = 0;
      for (int32_t i = 0; i < launch.spans; ++i) winner = winner > draw.parts[i] ? winner : draw.parts[i];
    }
    if (winner != 0 || deferred.weights.with_excluded) {
      const int32_t token = winner != 0 ? id_of(winner) : deferred.weights.target.argmax;
      if (threadIdx.x == 0) write_next_token(p, request, token);
      return;
    }
    // Rounding has left nothing of the weights: what the walk does then (WalkBase::draw), with the whole row.
    reduce.team.sync();
    if (threadIdx.x == 0) {
      deferred.weights.with_excluded =
          deferred.weights.kind == WeightKind::kResidual && deferred.weights.terms == 0 && alone;
      deferred.weights.kind = WeightKind::kResidual;
      deferred.weights.terms = 0;
      p.status[request] |= kResidualEmpty;
    }
    reduce.team.sync();
  }
}

}  // namespace specdec::cuda
