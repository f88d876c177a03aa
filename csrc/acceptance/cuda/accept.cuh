// Acceptance on a GPU: from rows of logits to accepted tokens.
//
// Lazy path, one launch: a block owns a request. Its first warp walks the tree (acceptance/walk.h), all lanes alike, and
// the other warps are a team that serves it: the distribution of a row, the sum of a node's weights, a draw. The walk posts a
// task in shared memory and waits until it is served. So each pass over a row is compiled once, whatever the number of
// rules that ask for it, the walk's state takes no registers from the passes, and a block reads what the walk asks for
// and nothing else: the rows of the nodes it reaches, one pass for the distribution (three with top-k or top-p, as a rule), one
// for each rejection that needs a sum, one for the draw that draws the next token. The links and tokens of the tree are
// copied to shared memory first, for a walk is a chain of dependent reads.
//
// Eager path, three launches, for few requests, where one block each would leave the GPU idle: the distributions of all rows
// that have a node, each row split over blocks, the last one of which merges the parts in the order of the row and
// applies the filters; then the walk as above, with distributions from memory and without its last draw; then that draw, split
// over blocks in the same way. No block ever waits for another one.
//
// Shared memory: one bit per token of the vocabulary for tokens that can't be drawn any more, 16 KiB for cuts, 12 bytes
// per node. Scratch in global memory: what the rule keeps per node or level, and the tables of the eager path.
#pragma once

#include "acceptance/cuda/accept_scratch.cuh"
#include "acceptance/cuda/top_k_top_p.cuh"
#include "acceptance/cuda/weighted_draw.cuh"
#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

constexpr int kPostedBarrier = 2, kServedBarrier = 3;
constexpr int32_t kMaxStagedNodes = 1024;
constexpr int kWalkMaxThreads = 384;  // the walk's warp and a team: more would leave the walk too few registers

enum class TaskKind : int32_t {
  kStop,
  kTargetDistribution,
  kDraftDistribution,
  kTargetProbability,
  kDraftProbability,
  kPass,
  kDraw,
  kDrawTop,
  kTopLogits,
  kRhoSums,
  kGreatestOfDraft,
  kDeferDraw
};

struct Task {
  TaskKind kind;
  int32_t row, count;  // count: or a token
  bool with_entropy;
  float low, step;
  int32_t* out;
  NoiseKey noise;
  Weights weights;
};

struct Answer {
  TokenDistribution distribution;
  Pass pass;
  RhoSums rho;
};

// Logits of one row, of the tokens of the children of its node: a lane has one. A walk asks for them one after the
// other, so the first question brings all of them.
struct ChildLogits {
  int32_t row;                              // -1: none yet
  int32_t token[kWarpSize], id[kWarpSize];  // -1: no child, or a token that the row doesn't have
  float logit[kWarpSize];
};

struct WalkShared {
  uint32_t* slots;  // of the reductions
  uint32_t* bits;   // excluded tokens
  Task* task;
  Answer* answer;
  ChildLogits* children;  // of the last target row and the last draft row that were asked for
  AcceptParams* call;     // with links and tokens in shared memory
  int32_t* nodes;         // [4, nodes] tokens, first children, next siblings, target ids; and how many nodes there are
  CutScratch cut;

  __device__ WalkShared(SharedMemory& memory, const AcceptParams& p)
      : slots(memory.take<uint32_t>(TeamReducer::kWords)),
        bits(memory.take<uint32_t>(bit_words(p))),
        task(memory.take<Task>(1)),
        answer(memory.take<Answer>(1)),
        children(memory.take<ChildLogits>(2)),
        call(memory.take<AcceptParams>(1)),
        nodes(memory.take<int32_t>(staged(p))),
        cut(memory) {}
  static size_t bytes(const AcceptParams& p) {
    return SharedMemory::bytes<uint32_t>(TeamReducer::kWords) + SharedMemory::bytes<uint32_t>(bit_words(p)) +
           SharedMemory::bytes<Task>(1) + SharedMemory::bytes<Answer>(1) + SharedMemory::bytes<ChildLogits>(2) +
           SharedMemory::bytes<AcceptParams>(1) + SharedMemory::bytes<int32_t>(staged(p)) + CutScratch::bytes();
  }
  __host__ __device__ static int32_t staged(const AcceptParams& p) {
    return p.nodes <= kMaxStagedNodes ? 4 * p.nodes + 1 : 0;
  }
};

// What the walk knows of the models: orders to the team, and reads of single logits.
class ControlWarp {
 public:
  __device__ ControlWarp(const AcceptLaunch& launch, const WalkShared& shared, int32_t request)
      : shared_(shared),
        rows_{*shared.call, request},
        distributions_(distributions_of(launch, request)),
        nodes_(launch.call.nodes),
        threads_(int32_t(blockDim.x)) {}

  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ void sync() const { warp_sync(); }

  __device__ TokenDistribution target_distribution(int32_t node, bool with_entropy) {
    if (distributions_ != nullptr) return distributions_[node];
    if (leader()) {
      shared_.task->row = node;
      shared_.task->with_entropy = with_entropy;
    }
    post(TaskKind::kTargetDistribution);
    return shared_.answer->distribution;
  }
  __device__ TokenDistribution draft_distribution(int32_t row) {
    if (distributions_ != nullptr) return distributions_[nodes_ + row];
    if (leader()) shared_.task->row = row;
    post(TaskKind::kDraftDistribution);
    return shared_.answer->distribution;
  }
  __device__ float target_probability(const TokenDistribution& distribution, int32_t node, int32_t token) const {
    return proposal(TaskKind::kTargetProbability, distribution, node, token).probability;
  }
  __device__ float draft_probability(const TokenDistribution& distribution, int32_t row, int32_t token) const {
    return draft_proposal(distribution, row, token).probability;
  }
  __device__ Proposal draft_proposal(const TokenDistribution& distribution, int32_t row, int32_t token) const {
    return proposal(TaskKind::kDraftProbability, distribution, row, token);
  }
  __device__ float greatest_of_draft(const TokenDistribution& distribution, int32_t row) {
    if (leader()) shared_.task->weights.first = {distribution, row, 1.0f};
    post(TaskKind::kGreatestOfDraft);
    return shared_.answer->pass.sum;
  }

  __device__ void exclude(int32_t token) {
    if (leader()) shared_.bits[token / 32] |= 1u << token % 32;
  }
  __device__ void include(int32_t token) {
    if (leader()) shared_.bits[token / 32] &= ~(1u << token % 32);
  }
  __device__ bool excluded(int32_t token) const { return has_token(shared_.bits, token); }

  __device__ Pass pass(const Weights& weights) {
    if (leader()) shared_.task->weights = weights;
    post(TaskKind::kPass);
    return shared_.answer->pass;
  }
  // With distributions in memory the last draw is left to a launch of its own, and any token stands for its winner.
  __device__ Pass draw(const Weights& weights, const NoiseKey& noise) {
    const bool later = distributions_ != nullptr && noise.domain != kNoiseSample;
    give(weights, noise);
    post(later ? TaskKind::kDeferDraw : TaskKind::kDraw);
    return later ? Pass{1.0f, 0} : shared_.answer->pass;
  }
  __device__ void draw_top(const Weights& weights, const NoiseKey& noise, int32_t count, int32_t* out) {
    give(weights, noise);
    give_output(0, count, out);
    post(TaskKind::kDrawTop);
  }
  __device__ void top_logits(int32_t node, int32_t count, int32_t* out) {
    give_output(node, count, out);
    post(TaskKind::kTopLogits);
  }
  __device__ RhoSums rho_sums(int32_t node, const TokenDistribution& target, const TokenDistribution& draft, float low,
                              float step) {
    if (leader()) {
      shared_.task->weights.node = node;
      shared_.task->weights.target = target;
      shared_.task->weights.first = {draft, node, 1.0f};
      shared_.task->low = low;
      shared_.task->step = step;
    }
    post(TaskKind::kRhoSums);
    return shared_.answer->rho;
  }
  __device__ void stop() {
    if (leader()) shared_.task->kind = TaskKind::kStop;
    if (threads_ > kWarpSize) group_sync<kPostedBarrier>(threads_);
  }

  __device__ static float log(float x) { return logf(x); }
  __device__ static float exp(float x) { return expf(x); }
  __device__ static float exp2(float x) { return fast_exp2(x); }
  __device__ static float log1p(float x) { return log1pf(x); }
  __device__ static float expm1(float x) { return expm1f(x); }

 private:
  __device__ void give(const Weights& weights, const NoiseKey& noise) {
    if (!leader()) return;
    shared_.task->weights = weights;
    shared_.task->noise = noise;
  }
  __device__ void give_output(int32_t row, int32_t count, int32_t* out) {
    if (!leader()) return;
    shared_.task->row = row;
    shared_.task->count = count;
    shared_.task->out = out;
  }
  // One element of a row: the code for it is large next to the task for it.
  __device__ Proposal proposal(TaskKind task, const TokenDistribution& distribution, int32_t row, int32_t token) const {
    if (leader()) {
      shared_.task->weights.target = distribution;
      shared_.task->row = row;
      shared_.task->count = token;
    }
    post(task);
    return {shared_.answer->pass.sum, shared_.answer->pass.winner != 0};
  }
  __device__ void post(TaskKind task) const {
    if (leader()) shared_.task->kind = task;
    group_sync<kPostedBarrier>(threads_);
    group_sync<kServedBarrier>(threads_);
  }

  const WalkShared& shared_;
  RequestRows rows_;
  const TokenDistribution* distributions_;  // [2, nodes] of target and draft rows, or nullptr
  int32_t nodes_, threads_;
};

// The team's side: one task after the other.
class WorkerWarps {
 public:
  __device__ WorkerWarps(const AcceptLaunch& launch, const WalkShared& shared, int32_t request)
      : launch_(launch),
        shared_(shared),
        rows_{*shared.call, request},
        reduce_({int32_t(threadIdx.x) - kWarpSize, int32_t(blockDim.x) - kWarpSize}, shared.slots) {}

  __device__ __forceinline__ void run() {
    for (;;) {
      group_sync<kPostedBarrier>(int(blockDim.x));
      if (shared_.task->kind == TaskKind::kStop) return;
      serve(*shared_.task);
      group_sync<kServedBarrier>(int(blockDim.x));
    }
  }

 private:
  __device__ bool leader() const { return reduce_.team.rank == 0; }

  __device__ __forceinline__ void serve(const Task& task) {
    switch (task.kind) {
      case TaskKind::kStop:
        break;
      case TaskKind::kTargetDistribution:
      case TaskKind::kDraftDistribution:
        answer_distribution(task);
        break;
      case TaskKind::kTargetProbability:
      case TaskKind::kDraftProbability:
        if (reduce_.team.rank < kWarpSize) {
          const Proposal found = proposal(task);
          if (leader()) shared_.answer->pass = {found.probability, found.possible};
        }
        break;
      case TaskKind::kPass:
      case TaskKind::kDraw:
      case TaskKind::kDrawTop:
        answer_draw(task);
        break;
      case TaskKind::kGreatestOfDraft: {
        const float greatest = greatest_of_draft(reduce_, rows_, task.weights.first, shared_.bits);
        if (leader()) shared_.answer->pass.sum = greatest;
        break;
      }
      case TaskKind::kTopLogits:
        answer_top_logits(task);
        break;
      case TaskKind::kRhoSums: {
        const RhoSums sums = rho_sums_of(reduce_, rows_, task.weights, task.low, task.step);
        if (leader()) shared_.answer->rho = sums;
        break;
      }
      case TaskKind::kDeferDraw:
        defer_draw(task);
        break;
    }
  }

  __device__ __forceinline__ void answer_distribution(const Task& task) {
    const bool of_target = task.kind == TaskKind::kTargetDistribution;
    const Row row = of_target ? rows_.target(task.row) : rows_.draft(task.row);
    const Sampling sampling = row_sampling(rows_, of_target);
    const DistributionPart part = distribution_part(reduce_, row, whole(row), scale_of(sampling.temperature));
    const TokenDistribution distribution =
        finished_distribution(reduce_, shared_.cut, row, part, sampling, of_target && task.with_entropy);
    if (leader()) shared_.answer->distribution = distribution;
  }

  // The team's first warp.
  __device__ Proposal proposal(const Task& task) const {
    const bool of_target = task.kind == TaskKind::kTargetProbability;
    const int32_t token = task.count;
    const TokenDistribution& distribution = task.weights.target;
    const Row row = of_target ? rows_.target(task.row) : rows_.draft(task.row);
    ChildLogits& known = shared_.children[of_target ? 0 : 1];
    uint32_t found = 0;
    if (!distribution.one_hot && WalkShared::staged(rows_.p) > 0 && (of_target || !rows_.p.child_rows)) {
      if (known.row != task.row) load_children(known, row, task.row, of_target);
      found = warp_ballot(known.token[reduce_.team.rank] == token);
    }
    const int32_t at = lowest_bit(found);
    const int32_t id = found != 0 ? known.id[at] : of_target ? token : rows_.draft_id(token);
    if (id < 0) return {0.0f, false};
    if (distribution.one_hot) return {id == distribution.argmax ? 1.0f : 0.0f, id == distribution.argmax};
    const float logit = found != 0 ? known.logit[at] : logit_at(row, id);
    return {probability_of(distribution, logit, id), logit > negative_infinity() && keeps(distribution, logit, id)};
  }

  // The tree is in shared memory, so lanes find their children side by side; what they load is under way at once.
  __device__ void load_children(ChildLogits& known, const Row& row, int32_t node, bool of_target) const {
    const AcceptParams& p = rows_.p;
    const int32_t lane = reduce_.team.rank, count = min(*p.num_nodes, p.nodes);
    int32_t before = node, child = p.first_child == nullptr ? node + 1 : p.first_child[node], token = -1;
    for (int32_t i = 0; i <= lane && child > before && child < count; ++i) {
      if (i == lane) token = p.draft_tokens[child - p.first_token_node];
      before = child;
      child = p.first_child == nullptr ? -1 : p.next_sibling[child];
    }
    if (token < 0 || token >= p.vocab) token = -1;
    const int32_t id = token < 0 || of_target ? token : rows_.draft_id(token);
    const float logit = id < 0 ? negative_infinity() : logit_at(row, id);
    warp_sync();
    known.token[lane] = token;
    known.id[lane] = id;
    known.logit[lane] = logit;
    if (lane == 0) known.row = node;
    warp_sync();
  }

  // The best tokens of one draw come out one by one: each pass looks below the one before. Where p alone is drawn from
  // and a score is not sure, the drawn tokens are excluded, and the rest of the draw is one relative to the greatest
  // logit left: that is one factor for all scores.
  __device__ __forceinline__ void answer_draw(const Task& task) {
    const bool many = task.kind == TaskKind::kDrawTop;
    const NoiseKey noise = task.noise;
    uint64_t limit = kNoLimit;
    for (int32_t i = 0; i < (many ? task.count : 1);) {
      const WeightsSum sum = pass_over(reduce_, rows_, task.weights, shared_.bits, {0, rows_.p.vocab},
                                       task.kind != TaskKind::kPass, noise, limit);
      const bool stated = limit == kNoLimit && i > 0;  // it has been so for this token
      if (many && i > 0 && !stated && !is_sure(sum.best) && state_anew(task, i)) {
        limit = kNoLimit;
        continue;
      }
      limit = sum.best;
      if (leader()) {
        if (many) {
          task.out[i] = token_or_none(sum.best);
        } else {
          shared_.answer->pass = {sum.sum, token_or_none(sum.best)};
        }
      }
      ++i;
    }
    if (many && leader()) {
      for (int32_t i = 0; i < task.count; ++i) {
        if (task.out[i] >= 0) shared_.bits[task.out[i] / 32] = 0;
      }
    }
  }

  // Excludes the first `drawn` tokens and makes the target's distribution relative to what is left. False where that can't be.
  __device__ bool state_anew(const Task& task, int32_t drawn) {
    const Weights& weights = task.weights;
    if (weights.terms > 0 || weights.target.one_hot) return false;
    if (leader()) {
      for (int32_t i = 0; i < drawn; ++i) {
        if (task.out[i] >= 0) shared_.bits[task.out[i] / 32] |= 1u << task.out[i] % 32;
      }
    }
    reduce_.team.sync();
    const float max = greatest_left(reduce_, rows_.target(weights.node), weights.target,
                                    [&](int32_t id) { return !has_token(shared_.bits, id); });
    if (leader() && max > negative_infinity()) {
      shared_.task->weights.target.max = max;
      shared_.task->weights.target.inverse_sum = 1.0f;
    }
    reduce_.team.sync();
    return max > negative_infinity();
  }

  __device__ void answer_top_logits(const Task& task) {
    uint64_t limit = kNoLimit;
    for (int32_t i = 0; i < task.count; ++i) {
      limit = greatest_logit(reduce_, rows_.target(task.row), {0, rows_.p.vocab}, limit);
      if (leader()) task.out[i] = token_or_none(limit);
    }
  }

  __device__ void defer_draw(const Task& task) {
    const LastDraw draw = draw_of(launch_, rows_.request);
    for (int32_t word = reduce_.team.rank; word < bit_words(rows_.p); word += reduce_.team.size) {
      draw.bits[word] = shared_.bits[word];
    }
    if (leader()) *draw.deferred = {task.noise, task.weights, true};
  }

  const AcceptLaunch& launch_;
  const WalkShared& shared_;
  RequestRows rows_;
  TeamReducer reduce_;
};

// Copies what the walk reads of the tree, and the parameters, which then point to the copies.
__device__ inline void stage(const AcceptLaunch& launch, const WalkShared& shared, int32_t request) {
  const AcceptParams& p = launch.call;
  for (int32_t word = threadIdx.x; word < bit_words(p); word += blockDim.x) shared.bits[word] = 0;
  if (threadIdx.x == 0) {
    *shared.call = p;
    shared.children[0].row = shared.children[1].row = -1;
  }
  if (WalkShared::staged(p) == 0) return;
  const int32_t asked = p.num_nodes[request * p.num_nodes_stride_batch], count = min(max(asked, 1), p.nodes);
  int32_t *tokens = shared.nodes, *first_child = tokens + p.nodes, *next_sibling = first_child + p.nodes;
  int32_t* ids = next_sibling + p.nodes;
  for (int32_t node = threadIdx.x; node < count; node += blockDim.x) {
    if (node < count - p.first_token_node) tokens[node] = p.draft_tokens[request * p.draft_tokens_stride_batch + node];
    if (p.first_child != nullptr) {
      first_child[node] = p.first_child[request * p.links_stride_batch + node];
      next_sibling[node] = p.next_sibling[request * p.links_stride_batch + node];
    }
    if (p.target_is_ids) {
      const auto* target = static_cast<const int32_t*>(p.target) + request * p.target_stride_batch;
      ids[node] = target[node * p.target_stride_node];
    }
  }
  if (threadIdx.x != 0) return;
  AcceptParams& call = *shared.call;
  ids[p.nodes] = asked;
  call.num_nodes = ids + p.nodes;
  call.num_nodes_stride_batch = 0;
  call.draft_tokens = tokens;
  call.draft_tokens_stride_batch = 0;
  if (p.first_child != nullptr) {
    call.first_child = first_child;
    call.next_sibling = next_sibling;
    call.links_stride_batch = 0;
  }
  if (p.target_is_ids) {
    call.target = ids;
    call.target_stride_batch = 0;
    call.target_stride_node = 1;
  }
}

__global__ void __launch_bounds__(kWalkMaxThreads, 1) accept_walk_kernel(AcceptLaunch launch) {
  SharedMemory memory;
  const WalkShared shared(memory, launch.call);
  const int32_t request = blockIdx.x;
  stage(launch, shared, request);
  block_sync();
  if (threadIdx.x < kWarpSize) {
    ControlWarp rows(launch, shared, request);
    if (launch.spans > 0 && rows.leader()) draw_of(launch, request).deferred->wanted = false;
    accept_walk(*shared.call, request, rows, walk_scratch_of(launch, request));
    rows.stop();
  } else {
    WorkerWarps(launch, shared, request).run();
  }
}

}  // namespace specdec::cuda
