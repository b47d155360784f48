// Means over windows of SSIM and of its contrast-structure factor. Planes are cut into strips of columns that fit in the first
// cache and are measured in double precision; the strips of a plane are added in order, so the bits depend neither on threads
// nor on the other planes.
#include <algorithm>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"
#include "rows.h"
#include "tokenizers_mm.h"

int tmm_ssim(const void* x, const void* y, int dtype, int64_t planes, int64_t height, int64_t width, const double* line, int64_t k,
             double c1, double c2, double offset, double* whole, double* contrast, int threads) {
  if (planes < 0 || k < 1 || k > tmm::kSsimTaps || height < k || width < k || threads < 1) return TMM_BAD_ARGUMENT;
  for (int64_t i = 0; i < k / 2; ++i)
    if (line[i] != line[k - 1 - i]) return TMM_BAD_ARGUMENT;
  try {
    const auto* kernels = tmm::row_kernels(tmm::current_isa()->lanes);
    const bool equal = std::all_of(line, line + k, [&](double weight) { return weight == 1 / static_cast<double>(k); });
    const int64_t rows = height - k + 1, columns = width - k + 1, size = dtype == TMM_F64 ? 8 : 4;
    const int64_t strips = (columns + tmm::kSsimColumns - 1) / tmm::kSsimColumns;
    std::vector<double> lost(2 * planes * strips);
    tmm::for_chunks(planes * strips, 1, height * width < 4096 ? 1 : threads, [&](int64_t first, int64_t last) {
      std::vector<double> memory(4 * (tmm::kSsimColumns + tmm::kSsimTaps) + 4 * k * tmm::kSsimColumns);
      for (int64_t task = first; task < last; ++task) {
        const int64_t start = task % strips * tmm::kSsimColumns, place = (task / strips * height * width + start) * size;
        tmm::SsimStrip strip{static_cast<const char*>(x) + place, static_cast<const char*>(y) + place, size == 8, width, rows,
                             std::min(columns - start, int64_t{tmm::kSsimColumns}), line, k, equal, c1, c2, offset, memory.data()};
        kernels->ssim(strip, lost.data() + 2 * task);
      }
    });
    for (int64_t plane = 0; plane < planes; ++plane) {
      double sums[2] = {};
      for (int64_t i = 2 * plane * strips; i < 2 * (plane + 1) * strips; ++i) sums[i % 2] += lost[i];
      whole[plane] = 1 - sums[0] / static_cast<double>(rows * columns);
      contrast[plane] = 1 - sums[1] / static_cast<double>(rows * columns);
    }
    return TMM_OK;
  } catch (const std::bad_alloc&) {
    return TMM_NO_MEMORY;
  }
}
