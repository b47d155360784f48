// Counts and sums of the vectors of each code. Rows are first grouped by code with a stable counting sort; then each code's
// rows are added in their order, in double precision, so the bits depend neither on threads nor on scheduling.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "pool.h"
#include "tokenizers_mm.h"

namespace {

constexpr int64_t kCodesPerClaim = 64;

template <class T>
void sum_codes(const T* vectors, const std::vector<int64_t>& order, const int64_t* start, const int64_t* counts, int64_t d,
               int64_t first, int64_t last, double* sums) {
  for (int64_t code = first; code < last; ++code) {
    double* total = sums + code * d;
    std::fill(total, total + d, 0.0);
    for (int64_t i = 0; i < counts[code]; ++i) {
      const T* row = vectors + order[start[code] + i] * d;
      for (int64_t j = 0; j < d; ++j) total[j] += static_cast<double>(row[j]);
    }
  }
}

}  // namespace

int tmm_code_sums(const void* vectors, int dtype, const int64_t* ids, int64_t n, int64_t d, int64_t k, int64_t* counts, double* sums,
                  int threads) {
  try {
    std::fill(counts, counts + k, int64_t{0});
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] < 0 || ids[i] >= k) return TMM_BAD_ARGUMENT;
      ++counts[ids[i]];
    }
    std::vector<int64_t> start(k), next(k), order(n);
    for (int64_t code = 1; code < k; ++code) start[code] = start[code - 1] + counts[code - 1];
    next = start;
    for (int64_t i = 0; i < n; ++i) order[next[ids[i]]++] = i;
    std::atomic<int64_t> claim{0};
    auto work = [&](int) {
      for (;;) {
        const int64_t first = claim.fetch_add(kCodesPerClaim);
        if (first >= k) return;
        const int64_t last = std::min(k, first + kCodesPerClaim);
        if (dtype == TMM_F64) {
          sum_codes(static_cast<const double*>(vectors), order, start.data(), counts, d, first, last,
                    sums);
        } else {
          sum_codes(static_cast<const float*>(vectors), order, start.data(), counts, d, first, last,
                    sums);
        }
      }
    };
    tmm::run_parallel(n * d < 65536 ? 1 : threads, work);
    return TMM_OK;
  } catch (const std::bad_alloc&) {
    return TMM_NO_MEMORY;
  }
}
