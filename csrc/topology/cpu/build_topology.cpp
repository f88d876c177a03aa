// Ancestor sets, depths and links of each request's tree, on the CPU.
//
// One thread owns one request and visits its nodes once forwards and once backwards (tree_tables.h).
// Each request reads 4 bytes and writes 16 + 8 * words bytes per node, so memory is all it costs; small batches stay on
// the calling thread, since waking others takes longer than the work.
#include <algorithm>
#include <cstdint>

#include "common/cpu/thread_pool.h"
#include "topology/cpu/entry_points.h"
#include "topology/cpu/tree_tables.h"

namespace specdec::cpu {

namespace {

constexpr int64_t kMinWordsPerThread = 16384;  // about 10 us of work, several times the cost of starting a thread

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void build_topology_cpu(const BuildTopologyParams& p, int threads) {
  const int64_t work = int64_t{p.batch} * p.nodes * (p.words + 2);
  const int pool = static_cast<int>(std::clamp<int64_t>(work / kMinWordsPerThread, 1, std::max(threads, 1)));
  const int64_t at_once = (int64_t{p.batch} + 4 * pool - 1) / (4 * pool);
  Shares requests(p.batch, at_once);
  const auto build = [&](int64_t at) {
    const int32_t request = int32_t(at);
    const int64_t row = int64_t{request} * p.nodes;
    const int32_t asked = read_once(p.num_nodes + request), count = std::clamp(asked, 0, p.nodes);
    int32_t* parents = p.parents_out + row;
    const int32_t status = sound_parents(p.parents + row, parents, count, p.nodes);
    depths_and_ancestors(parents, p.depths + row, p.ancestors + row * p.words, count, p.nodes, p.words);
    links(parents, p.first_child + row, p.next_sibling + row, count, p.nodes);
    p.num_nodes_out[request] = count;
    p.status[request] = status | (count != asked ? kNumNodesOutOfRange : 0);
  };
  run_team(pool, [&](int) { requests.take(build); });
}

}  // namespace specdec
