// Searching codes as they lie in memory: one pass that reads every code once for all rows, in float32 with the bound of the
// difference rung, and scores in double precision what that cannot rule out. Nothing is kept, so nothing can be out of date.
#include <cmath>
#include <vector>

#include "search.h"

namespace tmm {
namespace {

constexpr int64_t kFirstChunk = 16, kChunk = 256;  // codes between two looks at the best distance so far

// The largest float32 result of a distance that may not be above `limit`.
float widened(double limit, int64_t d) {
  const double wide = limit * (1 + (static_cast<double>(d) + 8) * 0x1p-23 * 1.01) + static_cast<double>(d) * 2e-44;
  return wide < 3e38 ? std::nextafter(static_cast<float>(wide), std::numeric_limits<float>::infinity())
                     : std::numeric_limits<float>::infinity();
}

// Scores codes first .. last - 1 for all rows; false: some float32 distance is not finite.
bool scan(const Query& query, const RowKernels& kernels, int64_t first, int64_t last, std::vector<Leader>* leaders) {
  if (query.codes.dtype == TMM_F64) {
    for (Leader& leader : *leaders) leader.score(first, last);
    return true;
  }
  int32_t near[kChunk + kRowLanes];
  float total = 0;
  for (int64_t chunk = kFirstChunk; first < last; first += chunk, chunk = std::min(4 * chunk, kChunk)) {
    chunk = std::min(chunk, last - first);
    for (size_t row = 0; row < leaders->size(); ++row) {
      Leader& leader = (*leaders)[row];
      const int64_t count = kernels.near(query.z.f32(static_cast<int64_t>(row)), query.codes.f32(first), chunk, query.codes.d,
                                         widened(leader.limit(), query.codes.d), near, &total);
      for (int64_t i = 0; i < count; ++i) leader.score(first + near[i], first + near[i] + 1);
    }
  }
  return std::isfinite(total);
}

bool all_finite(const Rows& rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!rows.finite(i)) return false;
  return true;
}

}  // namespace

Stats search_live(const Query& query) {
  const RowKernels& kernels = *row_kernels(query.isa->lanes);
  const std::vector<Leader> empty = [&] {
    std::vector<Leader> made;
    for (int64_t row = 0; row < query.n; ++row) made.emplace_back(query, row);
    return made;
  }();
  std::vector<Leader> leaders = empty;
  std::mutex merge;
  bool certain = query.codes.dtype == TMM_F32;
  for_chunks(query.k, std::max<int64_t>(1024, (1 << 16) / query.codes.d), query.threads, [&](int64_t first, int64_t last) {
    std::vector<Leader> mine = empty;
    const bool finite = scan(query, kernels, first, last, &mine);
    std::lock_guard<std::mutex> lock(merge);
    for (size_t row = 0; row < mine.size(); ++row) leaders[row].merge(mine[row]);
    certain = certain && finite;
  });
  Stats stats;
  stats.rows = query.n;
  stats.bad_codes = !certain && !all_finite(query.codes, query.k);
  for (const Leader& leader : leaders) leader.store(&stats);
  return stats;
}

}  // namespace tmm
